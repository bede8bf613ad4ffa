"""kvcomp.bsr's one-call functions, random patterns, and BlockSparseLinear."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
from kvcomp.bsr import (  # noqa: E402
    BLOCKS,
    PATTERNS,
    BlockSparseLinear,
    BSRMatrix,
    convert,
    convert_to_bsr,
    get_optimal_block_size,
    random_bsr,
    sparse_mm,
    tune,
    validate_sparse_matrix,
    way_of,
)
from kvcomp.bsr.patterns import block_mask  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .*:UserWarning")


# ---- patterns


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [(64, 64), (40, 70), (70, 40), (1, 9)])
def test_patterns_hold_as_many_blocks_as_asked(pattern: str, grid: tuple[int, int]) -> None:
    for sparsity in (0.5, 0.78, 0.9, 1.0) if grid == (64, 64) else (0.9,):
        mask = block_mask(grid, sparsity, pattern, seed=4)
        assert mask.shape == grid and mask.sum() == round((1 - sparsity) * grid[0] * grid[1])
        assert (mask == block_mask(grid, sparsity, pattern, seed=4)).all(), "seeded"
    if pattern in ("uniform", "causal", "power_law", "clustered") and grid == (64, 64):
        assert (block_mask(grid, 0.78, pattern, 4) != block_mask(grid, 0.78, pattern, 5)).any()


def test_patterns_look_as_they_are_called() -> None:
    grid = (64, 64)
    row, column = np.indices(grid)
    masks = {pattern: block_mask(grid, 0.78, pattern, seed=0) for pattern in PATTERNS}
    lengths = {pattern: np.sort(mask.sum(1)) for pattern, mask in masks.items()}
    assert np.abs((row - column)[masks["banded"]]).max() <= 8, "close to the diagonal"
    for pattern in ("causal", "sliding_window"):
        assert (column <= row)[masks[pattern]].all() and masks[pattern].diagonal().sum() >= 10
    assert (row - column)[masks["sliding_window"]].max() <= 17 and masks["sliding_window"].diagonal().all()
    assert (row - column)[masks["causal"]].max() > 50
    assert lengths["power_law"][-1] == 64 and lengths["power_law"][32] < lengths["uniform"][32], "few long rows"
    assert lengths["uniform"][0] > 3 and lengths["uniform"][-1] < 26
    tiles = masks["clustered"].reshape(16, 4, 16, 4).sum((1, 3))
    assert ((tiles == 0) | (tiles == 16)).sum() >= 255
    near = (masks["clustered"][:, 1:] & masks["clustered"][:, :-1]).sum()
    assert near > 3 * (masks["uniform"][:, 1:] & masks["uniform"][:, :-1]).sum()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"pattern": "diagonal"}, "random_bsr: pattern: expected one of uniform, banded, .* got 'diagonal'"),
        ({"sparsity": 1.5}, "random_bsr: sparsity: expected a fraction of empty blocks"),
        ({"sparsity": float("nan")}, "random_bsr: sparsity: expected a fraction of empty blocks"),
        ({"sparsity": 0.3, "pattern": "causal"}, "random_bsr: sparsity: expected 0.375 or more, as the pattern causal"),
        ({"block_size": 48}, "random_bsr: block_size: expected one of 16, 32, 64, 128, got 48"),
        ({"m": -1}, "random_bsr: shape: expected"),
        ({"scale": -1.0}, "random_bsr: scale: expected 0 or more, got -1.0"),
        ({"seed": -1}, r"random_bsr: seed: expected an integer in \[0, 2\*\*64\), got -1"),
    ],
)
def test_bad_patterns_are_refused(how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        random_bsr(**({"m": 64, "k": 64, "block_size": 16} | how))
    with pytest.raises(TypeError, match="random_bsr: dtype: expected float16"):
        random_bsr(64, 64, 16, dtype=torch.int32)


def test_random_values() -> None:
    a = random_bsr(500, 700, 64, 0.5, seed=2)
    assert a.dtype == torch.float16 and a.row_ptr.dtype == torch.int32
    assert float(a.to_dense().float().std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.1)
    again = random_bsr(500, 700, 64, 0.5, seed=2, index_dtype=torch.int64)
    assert torch.equal(a.values, again.values) and torch.equal(a.col_idx.long(), again.col_idx)
    # What lies beyond the matrix is zero.
    assert float(a.values.float().square().sum()) == pytest.approx(float(a.to_dense().float().square().sum()), rel=1e-4)
    assert not torch.equal(random_bsr(500, 700, 64, 0.5, seed=3).to_dense(), a.to_dense())


# ---- functions


def test_sparse_mm_takes_any_form() -> None:
    a = random_bsr(128, 192, 32, 0.7, dtype=torch.float32, scale=1.0)
    dense, b = a.to_dense(), torch.randn(192, 20)
    want = dense @ b
    forms: list[Any] = [a, a.to_torch(), a.to_torch("csr"), dense.to_sparse_coo(), dense, dense.numpy()]
    for form in forms:
        assert torch.allclose(sparse_mm(form, b), want, atol=1e-4)
        for block in BLOCKS:
            assert torch.allclose(sparse_mm(form, b, block_size=block), want, atol=1e-4)
    half = sparse_mm(a.to_torch("csr"), b.half(), block_size=32, out_dtype=torch.float32)
    assert half.dtype == torch.float32 and torch.allclose(half, want, atol=0.2)


def test_tune() -> None:
    """What was measured decides, not the table; what lost is not kept."""
    a = random_bsr(256, 256, 32, 0.9, dtype=torch.float32)
    b = torch.randn(256, 64)
    times = tune(a, b)
    assert set(times) == {"sparse", "dense"} and list(times.values()) == sorted(times.values())
    best = next(iter(times))
    assert way_of(a, 64) == way_of(a.with_values(-a.values), 64) == best
    assert bool(a.kept_nbytes) == (best == "dense")
    assert torch.allclose(sparse_mm(a, b, autotune=True), a.to_dense() @ b, atol=1e-4)
    assert set(tune(a.to(torch.float64), b.double())) == {"dense"}
    with pytest.raises(ValueError, match="matmul: b: expected 256 rows"):
        tune(a, b[:5])


def test_tune_that_fails_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a = random_bsr(256, 256, 32, 0.9, dtype=torch.float32)
    b, reasons = torch.randn(256, 64), [RuntimeError("broken"), torch.OutOfMemoryError("full")]

    def fail(self: BSRMatrix) -> Any:
        raise reasons[0]

    monkeypatch.setattr(BSRMatrix, "dense", fail)
    with pytest.raises(RuntimeError, match="broken"):
        tune(a, b)
    assert not a.structure.ways
    a.structure.ways[64, False, torch.float32] = 1
    with pytest.raises(RuntimeError, match="broken"):
        tune(a, b)
    assert way_of(a, 64) == "sparse"
    reasons.pop(0)
    assert set(tune(a, b)) == {"sparse"}, "without the way that has no room"


def test_sparse_mm_of_scipy() -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    a = random_bsr(128, 192, 32, 0.7, dtype=torch.float32)
    b = torch.randn(192, 20)
    for theirs in (a.to_scipy(), a.to_scipy("csr"), sparse.csc_array(a.to_dense().numpy())):
        assert torch.allclose(sparse_mm(theirs, b), a.to_dense() @ b, atol=1e-4)


@pytest.mark.parametrize(
    ("matrix", "error", "sentence"),
    [
        ("A", TypeError, "sparse_mm: matrix: expected a tensor or an array of numbers, got str"),
        (torch.ones(3), ValueError, "sparse_mm: matrix: expected two dimensions, got float32"),
        (torch.ones(32, 4, dtype=torch.int32), TypeError, "from_dense: dense: expected a dense tensor of float16"),
    ],
)
def test_bad_matrices_are_refused(matrix: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"^{sentence}"):
        sparse_mm(matrix, torch.ones(4, 2))


def test_convert_to_bsr() -> None:
    a = random_bsr(256, 256, 32, 0.75, dtype=torch.float32)
    for block in (16, 32):
        made = convert_to_bsr(a.to_dense(), block)
        assert made.block_size == block and torch.equal(made.to_dense(), a.to_dense())
    assert convert_to_bsr(a, 32) is a and convert_to_bsr(a, 64, 0.0).block_size == 64
    scattered = torch.randn(256, 256) * (torch.rand(256, 256) > 0.78)
    with pytest.raises(ValueError, match=r"^convert_to_bsr: matrix: expected 50.0% of its blocks of 16 empty, got 0"):
        convert_to_bsr(scattered)
    assert convert_to_bsr(scattered, sparsity_threshold=0).density == 1
    with pytest.raises(ValueError, match="convert_to_bsr: sparsity_threshold: expected a fraction"):
        convert_to_bsr(scattered, 16, 2.0)
    with pytest.raises(ValueError, match="convert_to_bsr: block_size: expected one of"):
        convert_to_bsr(scattered, 8)


@pytest.mark.parametrize("shape", [(256, 256), (250, 300)])
def test_zeros_are_dropped_on_the_way_to_other_blocks(shape: tuple[int, int]) -> None:
    """However they were stored; to larger blocks and back nothing is lost."""
    dense = torch.zeros(shape)
    dense[130:140, 20:30], dense[-1, -1] = 2.0, 3.0
    whole = BSRMatrix.from_dense(dense, 128)
    for form in (whole, whole.to_torch("csr"), *([dense.to_sparse_bsr((128, 128))] if shape[1] == 256 else [])):
        made = convert_to_bsr(form, 16)
        assert torch.equal(made.to_dense(), dense) and made.blocks == BSRMatrix.from_dense(dense, 16).blocks
        BSRMatrix(made.values, made.row_ptr, made.col_idx, made.shape)
        larger = convert_to_bsr(made, 64, 0.0)
        assert larger.block_size == 64 and torch.equal(larger.to_dense(), dense)
    values = torch.ones_like(whole.values).requires_grad_()
    sparse_mm(whole.with_values(values), torch.ones(shape[1], 2), block_size=16).sum().backward()
    assert values.grad is not None and bool(values.grad.any())


def test_get_optimal_block_size() -> None:
    assert [get_optimal_block_size((side, 65536)) for side in (512, 2048, 2049, 8192, 8193)] == [32, 32, 64, 64, 128]
    for block in (16, 128):
        found = get_optimal_block_size(random_bsr(2048, 2048, block, 0.9, seed=1).to_dense().float())
        assert found <= block if block == 16 else found >= 64
    assert get_optimal_block_size(random_bsr(512, 512, 64, 0.5)) >= 64, "its blocks are not split"
    with pytest.raises(ValueError, match="get_optimal_block_size: shape: expected"):
        get_optimal_block_size((5,))
    for how in ({"n": -5}, {"device": "nodev"}):
        with pytest.raises(ValueError, match=f"get_optimal_block_size: {next(iter(how))}: expected "):
            get_optimal_block_size(torch.ones(64, 64), **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sparsity", "rating"), [(0.3, "dense"), (0.6, "good"), (0.78, "optimal"), (0.95, "very_sparse")]
)
def test_validate(sparsity: float, rating: str) -> None:
    a = random_bsr(1024, 1024, 64, sparsity, seed=1)
    ok, info = validate_sparse_matrix(a)
    assert ok == (sparsity >= 0.5) and info["performance_rating"] == rating
    assert info["shape"] == (1024, 1024) and info["sparsity"] == pytest.approx(sparsity, abs=0.02)
    assert info["nnz"] == int(a.to_dense().count_nonzero()) and info["block_size"] in (64, 128)
    assert info["block_sparsity"][64] == pytest.approx(a.sparsity) and set(info["block_sparsity"]) == {64, 128}
    assert info["recommendation"] == (f"take blocks of {info['block_size']}" if ok else "multiply it dense")
    for sentence in (info["message"], info["recommendation"]):
        assert sentence and "\n" not in sentence
    assert info["message"].startswith("the matrix has " if ok else "validate_sparse_matrix: matrix: expected at least")


def test_validate_sees_through_scattered_zeros() -> None:
    """78 % of the elements are zero, and no block is empty: what the seed's benchmark took for block-sparse."""
    scattered = torch.randn(512, 512) * (torch.rand(512, 512) > 0.78)
    ok, info = validate_sparse_matrix(scattered)
    assert not ok and info["performance_rating"] == "dense" and 0.76 < info["sparsity"] < 0.8
    assert "0.0% of its blocks" in info["message"] and "spread over nearly all blocks" in info["recommendation"]
    assert validate_sparse_matrix(scattered, min_sparsity=0.0)[0]


def test_validate_expectations() -> None:
    a = random_bsr(512, 512, 64, 0.75)
    assert validate_sparse_matrix(a, expected_sparsity=0.77)[0]
    ok, info = validate_sparse_matrix(a, expected_sparsity=0.9)
    assert not ok and info["message"] == (
        f"validate_sparse_matrix: matrix: expected 90.0% of its elements zero, got {info['sparsity']:.1%}"
    )
    with pytest.raises(ValueError, match="validate_sparse_matrix: min_sparsity: expected a fraction"):
        validate_sparse_matrix(a, min_sparsity=70)


# ---- the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "sparsity"), [(16, 0.9), (64, 0.5), (32, 0.0)])
def test_linear(block: int, sparsity: float, dtype: Any) -> None:
    """The same as a dense layer of the same weight, forward and backward, sparse or dense as the table says."""
    torch.manual_seed(0)
    layer = BlockSparseLinear(200, 150, block_size=block, sparsity=sparsity, dtype=dtype)
    twin = torch.nn.Linear(200, 150, dtype=dtype)
    with torch.no_grad():
        twin.weight.copy_(layer.weight().to_dense())
        twin.bias.copy_(layer.bias)
    x = torch.randn(3, 11, 200, dtype=dtype, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    got, want = layer(x), twin(z)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad)
    stored = layer.weight().with_values(torch.ones_like(layer.values)).to_dense()
    of_values = layer.weight().with_values(layer.values.grad).to_dense()
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.02}
    assert torch.allclose(got, want, **near) and torch.allclose(x.grad, z.grad, **near)
    assert torch.allclose(of_values, twin.weight.grad * stored, **near)
    assert torch.allclose(layer.bias.grad, twin.bias.grad, **near)
    spread = float(layer.values.float().abs().max())
    assert spread == pytest.approx((200 * layer.weight().density) ** -0.5, rel=0.05)


def test_linear_learns() -> None:
    torch.manual_seed(0)
    goal = BlockSparseLinear(64, 48, block_size=16, sparsity=0.5, seed=3)
    layer = BlockSparseLinear(64, 48, block_size=16, sparsity=0.5, seed=3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(256, 64)
    first = last = 0.0
    for step in range(150):
        loss = (layer(x) - goal(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (float(loss), last) if step == 0 else (first, float(loss))
    assert last < 1e-2 * first


def test_linear_counts_the_dense_weight_that_it_would_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every forward: the fewer rows x has, the more of the time that is."""
    layer = BlockSparseLinear(1024, 1024, block_size=64, sparsity=0.4, dtype=torch.bfloat16)
    made: list[bool] = []
    honest = convert.scattered
    monkeypatch.setattr(convert, "scattered", lambda *inputs: (made.append(True), honest(*inputs))[1])
    layer(torch.zeros(256, 1024, dtype=torch.bfloat16))
    assert not made, "the product alone would be faster dense"
    layer(torch.zeros(8192, 1024, dtype=torch.bfloat16))
    assert made


def test_linear_state() -> None:
    """Other places of as many blocks come with the state, and the plans follow; a copy is independent."""
    one, two = (BlockSparseLinear(96, 64, block_size=16, sparsity=0.5, seed=seed) for seed in (1, 2))
    x = torch.randn(4, 96)
    want = one(x)
    assert set(one.state_dict()) == {"values", "bias", "row_ptr", "col_idx"}
    assert not torch.equal(one.col_idx, two.col_idx)
    two.load_state_dict(one.state_dict())
    assert torch.allclose(two(x), want, atol=1e-6)
    again = copy.deepcopy(one)
    with torch.no_grad():
        again.values.zero_()
    assert torch.allclose(one(x), want, atol=1e-6)
    bad = one.state_dict()
    bad["col_idx"] = torch.full_like(bad["col_idx"], 99)
    with pytest.raises(RuntimeError, match="bsr_check: "):
        two.load_state_dict(bad)
    assert torch.equal(two.col_idx, one.col_idx) and torch.allclose(two(x), want, atol=1e-6), "as it was"
    assert torch.allclose(one.double()(x.double()).float(), want, atol=1e-5)
    assert "12 of 24 blocks" in repr(one)


def test_linear_from_dense() -> None:
    """Keeps the largest blocks."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(128, 64)
    with torch.no_grad():
        dense.weight[:16, 112:] *= 10
    layer = BlockSparseLinear.from_linear(dense, 16, 0.75)
    weight = layer.weight()
    assert weight.blocks == 8 and bool(weight.to_dense()[:16, 112:].all())
    x = torch.randn(5, 128)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, weight.to_dense(), dense.bias), atol=1e-5)
    whole = BlockSparseLinear.from_linear(dense, 16, 0.0)
    assert torch.allclose(whole(x), dense(x), atol=1e-5)
    no_bias = BlockSparseLinear.from_linear(torch.nn.Linear(32, 32, bias=False), 16, 0.5)
    assert no_bias.bias is None and no_bias(torch.zeros(2, 32)).shape == (2, 32)


def test_linear_compiles_and_casts() -> None:
    layer = BlockSparseLinear(96, 64, block_size=16, sparsity=0.8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, y = (torch.randn(9, 96, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        y.copy_(x)
    layer(x).square().sum().backward()
    before = layer.values.grad.clone()
    layer.zero_grad()
    compiled(y).square().sum().backward()
    assert torch.allclose(layer.values.grad, before, atol=1e-4) and torch.allclose(x.grad, y.grad, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), layer(x), atol=0.1)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.ones(2, 33), r"BlockSparseLinear: x: expected \(\.\.\., 32\) of torch.float32, got float32 \(2, 33\)"),
        (torch.tensor(1.0), r"BlockSparseLinear: x: expected \(\.\.\., 32\) of torch.float32, got float32 \(\)"),
        (torch.ones(2, 32, dtype=torch.half), r"BlockSparseLinear: x: expected \(\.\.\., 32\) of torch.float32, got"),
    ],
)
def test_linear_refuses(x: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        BlockSparseLinear(32, 32, block_size=16, sparsity=0.5)(x)
    with pytest.raises(TypeError, match="BlockSparseLinear: dtype: expected float16"):
        BlockSparseLinear(32, 32, block_size=16, dtype=torch.int32)
    with pytest.raises(ValueError, match="BlockSparseLinear: bias: expected"):
        BlockSparseLinear.from_bsr(random_bsr(32, 32, 16, 0.5), torch.ones(3))
    with pytest.raises(ValueError, match="from_linear: sparsity: "):
        BlockSparseLinear.from_linear(torch.nn.Linear(32, 32), 16, -1)


def test_from_bsr_shares_memory() -> None:
    a = random_bsr(64, 64, 16, 0.5, dtype=torch.float32)
    layer = BlockSparseLinear.from_bsr(a)
    assert layer.values.data_ptr() == a.values.data_ptr() and layer.bias is None
    assert isinstance(layer.weight(), BSRMatrix) and torch.equal(layer.weight().to_dense(), a.to_dense())


def test_indices_are_the_layers_own() -> None:
    """What a load changes is the layer alone: not the matrix it was made of, its twin, or a matrix it gave."""
    one, other = (random_bsr(64, 96, 16, 0.5, dtype=torch.float32, seed=seed) for seed in (1, 2))
    layer, twin = BlockSparseLinear.from_bsr(one), BlockSparseLinear.from_bsr(one)
    given, places = layer.weight(), one.col_idx.clone()
    for assign in (False, True):
        state = copy.deepcopy(BlockSparseLinear.from_bsr(other).state_dict())
        layer.load_state_dict(state, assign=assign)
        assert torch.equal(layer.col_idx, other.col_idx) and not torch.equal(layer.col_idx, places)
        assert torch.equal(one.col_idx, places) and torch.equal(twin.col_idx, places)
        state["col_idx"].zero_()
        assert torch.equal(layer.weight().to_dense(), other.to_dense())
    assert torch.equal(given.col_idx, places)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("blocks", r"BlockSparseLinear: values: expected \(12, 16, 16\), got float32 \(18, 16, 16\) on cpu"),
        ("count", r"BlockSparseLinear: col_idx: expected \(12,\), got int32 \(11,\) on cpu"),
        ("lone", "BlockSparseLinear: row_ptr, col_idx: expected both or neither, got one of them"),
        ("bias", r"BlockSparseLinear: bias: expected \(64,\), got float32 \(63,\) on cpu"),
    ],
)
def test_a_refused_state_changes_nothing(change: str, sentence: str, strict: bool) -> None:
    layer = BlockSparseLinear(96, 64, block_size=16, sparsity=0.5, seed=1)
    state = BlockSparseLinear(96, 64, block_size=16, sparsity=0.25 if change == "blocks" else 0.5, seed=2).state_dict()
    if change == "count":
        state["col_idx"] = state["col_idx"][:-1]
    elif change == "lone":
        del state["col_idx"]
    elif change == "bias":
        state["bias"] = state["bias"][:-1]
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(3, 96)
    want = layer(x)
    with pytest.raises(RuntimeError, match=sentence):
        layer.load_state_dict(state, strict=strict)
    after = layer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(layer(x), want) and layer.weight().blocks == 12


def test_a_layer_on_meta_takes_a_state() -> None:
    layer = BlockSparseLinear(96, 64, block_size=16, sparsity=0.5, seed=1, device="meta")
    other = BlockSparseLinear(96, 64, block_size=16, sparsity=0.5, seed=2)
    with pytest.raises(RuntimeError, match="BlockSparseLinear: row_ptr: expected indices that can be read"):
        other.load_state_dict(layer.state_dict())
    layer.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), other(x))
