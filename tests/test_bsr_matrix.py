"""BSRMatrix: what it is made of and made into, products of every way, gradients."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
from kvcomp.bsr import BLOCKS, BSRMatrix, matmul, matrix, multiply, random_bsr, structure, way_of  # noqa: E402
from kvcomp.bsr.kept import Kept  # noqa: E402
from kvcomp.bsr.structure import Structure  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def normal(*shape: int, dtype: Any = torch.float32, seed: int = 7) -> Any:
    return torch.empty(shape, dtype=dtype).normal_(0, 1, generator=torch.Generator().manual_seed(seed))


def close(got: Any, want: Any, k: int) -> None:
    """Within two roundings to got's type, and sums of k products of normal numbers in float32."""
    half = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}.get(got.dtype, 2**-53)
    assert got.shape == want.shape
    assert float((got.double() - want.double()).abs().max()) <= 2 * half * float(want.abs().max()) + 2**-18 * k**0.5


# ---- forms


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(256, 384), (250, 300), (1, 129), (130, 1)])
def test_round_trips(block: int, shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        a = random_bsr(*shape, block, 0.5, dtype=dtype, seed=3)
        dense = a.to_dense()
        assert dense.shape == shape and a.dtype == dtype
        again = BSRMatrix.from_dense(dense, block)
        assert torch.equal(again.to_dense(), dense)
        assert torch.equal(again.row_ptr, a.row_ptr) and torch.equal(again.col_idx, a.col_idx)
        assert torch.equal(BSRMatrix.from_csr(a.to_torch("csr"), block).to_dense(), dense)
        assert torch.equal(a.T.to_dense(), dense.T) and torch.equal(a.T.T.to_dense(), dense)
        assert torch.equal(a.to_torch("csr").to_dense(), dense)
    array = dense.numpy()
    assert torch.equal(BSRMatrix.from_dense(array, block).to_dense(), dense)


@pytest.mark.parametrize("block", BLOCKS)
def test_torch_bsr_shares_memory(block: int) -> None:
    for index_dtype in (torch.int32, torch.int64):
        a = random_bsr(256, 384, block, 0.6, index_dtype=index_dtype)
        tensor = a.to_torch()
        assert tensor.values().data_ptr() == a.values.data_ptr() and torch.equal(tensor.to_dense(), a.to_dense())
        back = BSRMatrix.from_torch(tensor)
        assert back.values.data_ptr() == a.values.data_ptr() and back.col_idx.data_ptr() == a.col_idx.data_ptr()
        assert back.row_ptr.dtype == index_dtype and back.shape == a.shape
    with pytest.raises(ValueError, match=r"^to_torch: shape: expected multiples of the block size"):
        random_bsr(250, 384, block, 0.6).to_torch()


def test_torch_layouts() -> None:
    """Blocks that are not ours go through elements; so do CSR, COO and dense tensors."""
    dense = torch.zeros(64, 96)
    dense[8:16, 24:32], dense[50, 90] = 1.5, -2
    odd = dense.to_sparse_bsr((8, 8))
    for tensor in (odd, dense.to_sparse_csr(), dense.to_sparse_coo(), dense, odd.half(), dense.half().to_sparse_coo()):
        made = BSRMatrix.from_torch(tensor, 16)
        assert made.block_size == 16 and torch.equal(made.to_dense(), dense.to(tensor.dtype))
        with pytest.raises(ValueError, match="from_torch: block_size: expected one of 16, 32, 64, 128"):
            BSRMatrix.from_torch(tensor)
    with pytest.raises(TypeError, match="from_torch: matrix: expected a tensor of two dimensions, got list"):
        BSRMatrix.from_torch([1.0])  # type: ignore[arg-type]


def test_unsorted_columns_are_sorted_and_twice_is_refused() -> None:
    a = random_bsr(128, 128, 16, 0.5, seed=1)
    order = torch.arange(a.blocks)
    first, last = int(a.row_ptr[2]), int(a.row_ptr[3])
    order[first:last] = order[first:last].flip(0)
    shuffled = torch.sparse_bsr_tensor(a.row_ptr, a.col_idx[order], a.values[order], size=a.shape)
    assert torch.equal(BSRMatrix.from_torch(shuffled).to_dense(), a.to_dense())
    twice = a.col_idx.clone()
    twice[first + 1] = twice[first]
    with pytest.raises(ValueError, match="bsr_check: "):
        BSRMatrix(a.values, a.row_ptr, twice, a.shape)


def test_scipy() -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    a = random_bsr(128, 192, 32, 0.6, dtype=torch.float32)
    dense = a.to_dense()
    for layout in ("bsr", "csr"):
        theirs = a.to_scipy(layout)  # type: ignore[arg-type]
        assert theirs.format == layout and np.array_equal(theirs.toarray(), dense.numpy())
        made = BSRMatrix.from_csr(theirs, 32) if layout == "csr" else BSRMatrix.from_scipy(theirs)
        assert torch.equal(made.to_dense(), dense)
    theirs = a.to_scipy()
    back = BSRMatrix.from_scipy(theirs)
    assert back.values.data_ptr() == theirs.data.ctypes.data, "no copy"
    assert BSRMatrix.from_scipy(theirs, dtype=torch.float16).dtype == torch.float16
    # Elements that stand twice are one: their sum.
    twice = sparse.csr_matrix((np.ones(3, np.float32), [5, 5, 2], [0, 2, 3, *[3] * 14]), shape=(16, 20))
    made = BSRMatrix.from_csr(twice, 16)
    assert made.blocks == 1 and made.to_dense()[0, 5] == 2 and made.to_dense()[1, 2] == 1
    assert torch.equal(BSRMatrix.from_scipy(sparse.coo_matrix(dense.numpy()), 64).to_dense(), dense)
    with pytest.raises(ValueError, match="from_scipy: block_size: "):
        BSRMatrix.from_scipy(sparse.coo_matrix(dense.numpy()))
    with pytest.raises(TypeError, match="from_csr: matrix: expected a dense tensor of float16"):
        BSRMatrix.from_csr(sparse.csr_matrix(np.eye(16, dtype=np.int64)), 16)


def test_threshold_keeps_blocks_whole() -> None:
    dense = torch.full((32, 32), 0.1)
    dense[0, 0], dense[20, 31] = 1, float("nan")
    made = BSRMatrix.from_dense(dense, 16, threshold=0.5)
    assert made.blocks == 2 and made.col_idx.tolist() == [0, 1] and float(made.values[0, 5, 5]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="from_dense: threshold: expected 0 or more"):
        BSRMatrix.from_dense(dense, 16, threshold=float("nan"))


def test_dtype_and_device() -> None:
    a = random_bsr(64, 64, 16, 0.5)
    assert a.to("cpu") is a and a.to(torch.float16) is a
    b = a.to(torch.float32)
    assert b.dtype == torch.float32 and b.structure is a.structure
    assert a.to("meta").device.type == "meta"
    assert a.nbytes == a.values.nbytes + a.row_ptr.nbytes + a.col_idx.nbytes
    assert "64 × 64" in repr(a) and "50.0% empty" in repr(a)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"values": torch.ones(2, 16)}, ValueError, "bsr: values: expected .blocks, block, block., got"),
        ({"values": torch.ones(2, 8, 8)}, ValueError, "bsr: block_size: expected one of 16, 32, 64, 128, got 8"),
        ({"values": torch.ones(3, 16, 16)}, ValueError, "bsr: values: expected .2, 16, 16. on cpu as the indices say"),
        ({"values": torch.ones(2, 16, 16, dtype=torch.int8)}, TypeError, "bsr: values: expected a dense tensor of"),
        ({"row_ptr": [0, 1, 2]}, TypeError, "bsr: row_ptr: expected a tensor of int32 or int64, got list"),
        (
            {"row_ptr": torch.ones(3, dtype=torch.int32, device="meta"), "col_idx": torch.ones(2, device="meta")},
            ValueError,
            "bsr: row_ptr: expected indices that can be read, got int32 .3,. on meta",
        ),
        ({"row_ptr": torch.tensor([0, 1, 2, 2])}, ValueError, "bsr_check: "),
        ({"row_ptr": torch.tensor([0, 2, 1])}, ValueError, "bsr_check: "),
        ({"row_ptr": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "bsr_check: "),
        ({"col_idx": torch.tensor([0, 9])}, ValueError, "bsr_check: "),
        ({"col_idx": torch.tensor([0, -1])}, ValueError, "bsr_check: "),
        ({"shape": (32,)}, ValueError, "bsr: shape: expected .m, k., both 0 or more"),
        ({"shape": (32.9, 32)}, ValueError, "bsr: shape: expected .m, k., both 0 or more, got .32.9, 32."),
        ({"shape": (32, True)}, ValueError, "bsr: shape: expected .m, k., both 0 or more"),
        ({"shape": (32, -1)}, ValueError, "bsr: shape: expected .m, k., both 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    good: dict[str, Any] = {
        "values": torch.ones(2, 16, 16),
        "row_ptr": torch.tensor([0, 1, 2]),
        "col_idx": torch.tensor([0, 1]),
        "shape": (32, 32),
    }
    BSRMatrix(**good)
    with pytest.raises(error, match=f"^{sentence}") as refused:
        BSRMatrix(**(good | change))
    assert "\n" not in str(refused.value)


def test_bad_csr_is_refused() -> None:
    for pointers, columns in (([0, 1, 3], [0, 1]), ([0, 2, 2], [0, 7]), ([1, 2, 2], [0, 1])):
        csr = torch.sparse_csr_tensor(pointers, columns, torch.ones(2), size=(2, 4), check_invariants=False)
        with pytest.raises(ValueError, match="from_csr: matrix: expected row pointers that rise from 0 to 2"):
            BSRMatrix.from_csr(csr, 16)


# ---- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_products(block: int, dtype: Any) -> None:
    """Every way, tails everywhere, both directions, strided b, out and beta."""
    a = random_bsr(200, 330, block, 0.5, dtype=dtype, scale=1.0, seed=block)
    dense = a.to_dense().double()
    for transpose in (False, True):
        left = dense.T if transpose else dense
        b = normal(left.shape[1], 75, dtype=dtype)
        want = left @ b.double()
        for method in multiply.METHODS:
            got = matmul(a, b, transpose=transpose, method=method)
            assert got.dtype == dtype and got.is_contiguous()
            close(got, want, 330)
            strided = normal(75, left.shape[1], dtype=dtype).T
            close(matmul(a, strided, transpose=transpose, method=method), left @ strided.double(), 330)
            vector = matmul(a, b[:, 0], transpose=transpose, method=method)
            close(vector, want[:, 0], 330)
            if dtype == torch.float64:
                continue
            for out_dtype in (torch.float32, torch.float16, torch.bfloat16):
                close(matmul(a, b, transpose=transpose, out_dtype=out_dtype, method=method), want, 330)
                out = normal(left.shape[0], 75, dtype=out_dtype, seed=5)
                expected = want - 0.5 * out.double()
                assert matmul(a, b, transpose=transpose, out=out, beta=-0.5, method=method) is out
                close(out, expected, 330)
            wide = torch.full((left.shape[0], 150), 9.0, dtype=torch.float32)
            matmul(a, b, transpose=transpose, out=wide[:, ::2], method=method)
            close(wide[:, ::2], want, 330)
            assert (wide[:, 1::2] == 9).all(), "only its own elements"
    close(a @ normal(330, 3, dtype=dtype), dense @ normal(330, 3, dtype=dtype).double(), 330)
    same = normal(1, 9, dtype=dtype).expand(330, 9)
    close(matmul(a, same, method="sparse"), dense @ same.double(), 330)


def test_nothing_stored_and_nothing_asked() -> None:
    empty = random_bsr(70, 50, 16, 1.0)
    assert empty.blocks == 0 and not (empty @ normal(50, 4, dtype=torch.float16)).any()
    out = torch.ones(70, 4)
    matmul(empty, normal(50, 4, dtype=torch.float16), out=out, beta=2.0)
    assert (out == 2).all()
    some = random_bsr(70, 50, 16, 0.5)
    for method in multiply.METHODS:
        assert matmul(some, torch.ones(50, 0, dtype=torch.float16), method=method).shape == (70, 0)
    none = random_bsr(0, 50, 16, 0.5)
    assert (none @ torch.ones(50, 3, dtype=torch.float16)).shape == (0, 3)
    assert random_bsr(50, 0, 16, 0.5).to_dense().shape == (50, 0)


@pytest.mark.parametrize(
    ("how", "error", "sentence"),
    [
        ({"b": torch.ones(63, 2)}, ValueError, "matmul: b: expected 64 rows, got float32"),
        ({"b": torch.ones(64, 2).half()}, TypeError, "matmul: b: expected torch.float32 on cpu as the values"),
        ({"b": torch.ones(2, 64, 2)}, TypeError, "matmul: b: expected a dense tensor of one or two dimensions"),
        ({"b": np.ones((64, 2), np.float32)}, TypeError, "matmul: b: expected a dense tensor .* got ndarray"),
        ({"method": "fast"}, ValueError, "matmul: method: expected one of auto, sparse, dense, got 'fast'"),
        ({"beta": float("nan"), "out": torch.ones(48, 2)}, ValueError, "matmul: beta: expected a number, got nan"),
        ({"beta": "x", "out": torch.ones(48, 2)}, ValueError, "matmul: beta: expected a number, got 'x'"),
        ({"beta": 1e300, "out": torch.ones(48, 2), "method": "dense"}, ValueError, "matmul: beta: expected a number"),
        ({"out": torch.ones(48, 1).expand(48, 2)}, ValueError, "matmul: out: expected memory of its own for each"),
        ({"out": torch.ones(49).as_strided((48, 2), (1, 1))}, ValueError, "matmul: out: expected memory of its own"),
        ({"beta": 1.0}, ValueError, "matmul: beta: expected 0 without out, got 1.0"),
        ({"out": torch.ones(48, 3)}, ValueError, r"matmul: out: expected .48, 2. on cpu"),
        ({"out": torch.ones(48, 2), "out_dtype": torch.half}, ValueError, "matmul: out_dtype: expected torch.float32"),
        ({"out_dtype": torch.int8}, TypeError, "matmul: out_dtype: expected float16, bfloat16 or float32"),
    ],
)  # fmt: skip
def test_bad_products_are_refused(how: dict[str, Any], error: type[Exception], sentence: str) -> None:
    a = random_bsr(48, 64, 16, 0.5, dtype=torch.float32)
    with pytest.raises(error, match=f"^{sentence}"):
        matmul(a, **({"b": torch.ones(64, 2)} | how))
    with pytest.raises(TypeError, match="matmul: a: expected a BSRMatrix, got float32"):
        matmul(torch.ones(2, 2), torch.ones(2, 2))  # type: ignore[arg-type]


def test_out_is_memory_of_its_own() -> None:
    a = random_bsr(64, 64, 16, 0.5, dtype=torch.float32)
    memory = normal(64, 10)
    for out in (memory[:, :5], a.values.view(-1)[: 64 * 5].view(64, 5)):
        before = memory.clone()
        with pytest.raises(ValueError, match="matmul: out: expected memory apart from b and the values"):
            matmul(a, memory[:, 2:7], out=out)
        assert torch.equal(memory, before)
    both = torch.zeros(128, 5)
    both[:64] = normal(64, 5)
    matmul(a, both[:64], out=both[64:])
    close(both[64:], a.to_dense().double() @ both[:64].double(), 64)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks: sparse; all: dense; small blocks side by side: joined, where the table allows it."""
    rates = multiply.breakeven.RATES["sm_90"]
    monkeypatch.setitem(multiply.breakeven.RATES, "cpu float16", rates)
    assert way_of(random_bsr(2048, 2048, 128, 0.9), 2048) == "sparse"
    assert way_of(random_bsr(2048, 2048, 128, 0.0), 2048) == "dense"
    assert way_of(random_bsr(2048, 2048, 16, 0.7), 2048) == "dense"
    near = random_bsr(2048, 2048, 16, 0.9, pattern="clustered")
    assert way_of(near, 2048) == "joined into 64" and near.kept_nbytes == 0
    b = normal(2048, 8, dtype=torch.float16)
    monkeypatch.setattr(multiply, "_way", lambda a, n, transpose, method: 4)
    got, want = near @ b, near.to_dense().float() @ b.float()
    close(got, want, 200)
    assert near.kept_nbytes == near.joined(4).values.nbytes
    close(matmul(near, got, transpose=True), near.to_dense().float().T @ got.float(), 200)


def test_break_even_is_where_the_two_are_equal() -> None:
    from kvcomp.bsr import breakeven

    for name, rates in breakeven.RATES.items():
        assert set(rates.stored_tflops) == set(rates.step_tflops) == set(BLOCKS), name
    rates = breakeven.RATES["cpu bfloat16"]
    even = breakeven.break_even(128, "cpu", torch.bfloat16)
    assert even == pytest.approx(min(1.0, rates.stored_tflops[128] / rates.dense_tflops), abs=1e-6)


@pytest.mark.parametrize(("capability", "name"), [((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_80")])
def test_rates_of_gpus(capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Hopper runs Hopper's kernel."""
    breakeven = multiply.breakeven
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert breakeven.rates_of(torch.device("cuda"), torch.float16) is breakeven.RATES[name]


def test_words_of_a_plan_of_no_block_size() -> None:
    from kvcomp import _C

    with pytest.raises(ValueError, match=r"^bsr_plan_words: block: expected 16, 32, 64 or 128, got 17$"):
        _C.bsr_plan_words(64, 64, 17, 1, 0)


def test_break_even_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcomp.bsr import break_even

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 0 < break_even(64) <= 1
    with pytest.raises(ValueError, match="break_even: device: expected one that torch can use, got cuda"):
        break_even(64, "cuda")
    with pytest.raises(ValueError, match="break_even: block_size: expected one of"):
        break_even(8)


def test_kept_copies_follow_the_values() -> None:
    a = random_bsr(64, 64, 16, 0.5)
    dense = a.dense()
    assert a.dense() is dense and a.kept_nbytes == dense.nbytes
    a.values.mul_(2)
    assert torch.equal(a.dense(), 2 * dense)
    joined = a.joined(2)
    assert joined.block_size == 32 and torch.equal(joined.to_dense(), a.to_dense()) and a.joined(2) is joined
    a.values.zero_()
    assert not a.joined(2).to_dense().any()
    with pytest.raises(ValueError, match="joined: factor: "):
        random_bsr(64, 64, 128, 0.0).joined(2)


def test_other_values_in_the_same_memory_are_seen() -> None:
    """An address and a count of changes say nothing of another tensor: only the tensor does."""
    array = np.ones((8, 16, 16), np.float32)
    a = random_bsr(64, 64, 16, 0.5, dtype=torch.float32)
    a.values = torch.from_numpy(array)
    once = a.dense().clone()
    array *= 7
    a.values = torch.from_numpy(array)
    assert torch.equal(a.dense(), 7 * once)
    parameter = torch.nn.Parameter(torch.ones(8, 16, 16))
    a.values = parameter
    assert torch.equal(a.dense(), once)
    parameter.data = torch.full((8, 16, 16), 3.0)
    assert torch.equal(a.dense(), 3 * once)


@pytest.mark.parametrize("inside", [True, False])
def test_changes_in_inference_mode_are_seen(inside: bool) -> None:
    """Tensors of that mode count no changes."""
    a = random_bsr(64, 64, 16, 0.5, dtype=torch.float32)
    b = normal(64, 3)
    with torch.inference_mode():
        a = random_bsr(64, 64, 16, 0.5, dtype=torch.float32) if inside else a
        once, joined = matmul(a, b, method="dense"), a.joined(2).to_dense()
        a.values.mul_(2)
        assert torch.equal(matmul(a, b, method="dense"), 2 * once)
        assert torch.equal(a.joined(2).to_dense(), 2 * joined)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_products_in_inference_mode_leave_it_trainable(index_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in (0, 1, 2):
        with torch.inference_mode():
            a = random_bsr(64, 48, 16, 0.5, dtype=torch.float32, index_dtype=index_dtype)
            monkeypatch.setattr(multiply, "_way", lambda *_, way=way: way)
            for transpose in (False, True):
                matmul(a, normal(64 if transpose else 48, 3), transpose=transpose)
            a.transpose()
        values = torch.ones(a.blocks, 16, 16, requires_grad=True)
        for trained in (a.with_values(values), a.with_values(values).T):
            (trained @ normal(trained.shape[1], 3)).sum().backward()
        assert values.grad is not None


def test_values_are_checked_when_they_are_set() -> None:
    a = random_bsr(64, 64, 16, 0.5, dtype=torch.float32)
    before = a.values
    for bad in (before[:1], before[0], before.to("meta")):
        with pytest.raises(ValueError, match=r"^bsr: values: expected \(8, 16, 16\) on cpu as the indices say, got "):
            a.values = bad
    with pytest.raises(TypeError, match=r"^bsr: values: expected a dense tensor of float16"):
        a.values = before.int()
    assert a.values is before
    a.values = before.transpose(1, 2)
    assert a.values.is_contiguous() and torch.equal(a.values, before.transpose(1, 2))


def test_what_a_capture_makes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies made in the capture of a CUDA graph belong to the graph; plans must be there before."""
    a, fresh = (random_bsr(64, 64, 16, 0.5, dtype=torch.float32) for _ in range(2))
    b = normal(64, 3)
    kept = a.dense()
    monkeypatch.setattr(matrix, "capturing", lambda device: True)
    monkeypatch.setattr(structure, "capturing", lambda device: True)
    made = a.dense()
    assert made is not kept and a.dense() is not made
    for method in ("sparse", "dense"):
        with pytest.raises(RuntimeError, match=r"^bsr: CUDA graph: expected a product of the same kind before"):
            matmul(fresh, b, method=method)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert a.dense() is kept and fresh.kept_nbytes == 0
    assert torch.equal(matmul(fresh, b, method="sparse"), matmul(a, b, method="sparse"))


def test_copies_of_a_matrix_leave_what_is_kept() -> None:
    a = random_bsr(64, 64, 16, 0.5, dtype=torch.float32)
    dense = a.dense().clone()
    for other in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert other.kept_nbytes == 0 and torch.equal(other.to_dense(), dense)
        other.values.zero_()
    assert torch.equal(a.to_dense(), dense)


def test_a_copy_waits_for_its_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another stream than that on which it was made; with streams of paper, as there may be no GPU."""

    class Stream:
        def __init__(self) -> None:
            self.waits: list[Any] = []

        def record_event(self) -> str:
            return "made"

        def wait_event(self, event: Any) -> None:
            self.waits.append(event)

    maker, other = Stream(), Stream()
    held: list[Any] = []
    device = torch.device("cuda")
    source: Any = SimpleNamespace(device=device, _version=0, detach=lambda: None)
    memory: Any = SimpleNamespace(device=device, record_stream=held.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: maker)
    made = Kept(source, memory)
    made.ready(memory)
    assert not maker.waits and not held
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
    made.ready(memory)
    assert other.waits == ["made"] and held == [other]


def test_dense_products_round_once() -> None:
    """With beta, too: what leaves float16's range halfway comes back."""
    a = BSRMatrix.from_dense(torch.full((16, 16), 100.0), 16)
    b, out = torch.full((16, 2), 50.0), torch.full((16, 2), 60000.0, dtype=torch.float16)
    for method in ("sparse", "dense"):
        got = matmul(a, b, out=out.clone(), beta=-1.0, method=method)  # type: ignore[arg-type]
        assert torch.equal(got, torch.full((16, 2), 20000.0, dtype=torch.float16))


# ---- gradients


def test_gradcheck() -> None:
    """In float64, where the operators multiply dense: what flows where, twice over."""
    a = random_bsr(40, 50, 16, 0.5, dtype=torch.float64, scale=1.0)
    values = a.values.clone().requires_grad_()
    for transpose in (False, True):
        b = normal(40 if transpose else 50, 3, dtype=torch.float64).requires_grad_()

        def product(values: Any, b: Any, transpose: bool = transpose) -> Any:
            return matmul(a.with_values(values), b, transpose=transpose, method="sparse")

        assert torch.autograd.gradcheck(product, (values, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(product, (values, b), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("block", [16, 64])
def test_gradients_are_the_dense_products(block: int, dtype: Any) -> None:
    a = random_bsr(130, 200, block, 0.5, dtype=dtype, scale=1.0)
    grad = normal(130, 33, dtype=dtype, seed=9)
    dense = a.to_dense().double().requires_grad_()
    other = normal(200, 33, dtype=dtype)
    wide = other.double().requires_grad_()
    (dense @ wide).backward(grad.double())
    stored = a.with_values(torch.ones_like(a.values)).to_dense().bool()
    for way in ("sparse", "dense"):
        values, b = a.values.clone().requires_grad_(), other.clone().requires_grad_()
        matmul(a.with_values(values), b, method=way).backward(grad)  # type: ignore[arg-type]
        close(a.with_values(values.grad).to_dense(), dense.grad * stored, 200)
        close(b.grad, wide.grad, 200)
    assert matmul(a.with_values(values), b).requires_grad
    with pytest.raises(ValueError, match="matmul: out: expected none where gradients are needed"):
        matmul(a.with_values(values), b, out=torch.empty(130, 33, dtype=dtype))


def test_gradients_of_wide_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.mm with out_dtype has no derivative; here it is put in place of, as only CUDA has it."""
    left, b = (normal(20, 20, dtype=torch.bfloat16, seed=seed).requires_grad_() for seed in (1, 2))
    grad = normal(20, 20, seed=3)
    honest = torch.mm
    monkeypatch.setattr(torch, "mm", lambda one, other, out_dtype: honest(one.to(out_dtype), other.to(out_dtype)))
    found = multiply._Widened.apply(left, b)
    found.backward(grad)
    close(found.detach(), left.detach().double() @ b.detach().double(), 20)
    close(left.grad, grad.double() @ b.detach().double().T, 20)
    close(b.grad, left.detach().double().T @ grad.double(), 20)


def test_gradients_through_joined_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a = random_bsr(96, 80, 16, 0.5, dtype=torch.float32)
    b = normal(80, 5)
    found = []
    for way in (1, 2, 4):
        monkeypatch.setattr(multiply, "_way", lambda *_, way=way: way)
        values = a.values.clone().requires_grad_()
        (a.with_values(values) @ b).square().sum().backward()
        found.append(values.grad)
    for grad in found[1:]:
        assert torch.allclose(grad, found[0], atol=1e-5)


def test_the_operators_are_sound() -> None:
    """Schema, fake implementation and autograd as torch's own checker wants them."""
    a = random_bsr(48, 40, 16, 0.5, dtype=torch.float32)
    plans = a.structure.plan(False).words, a.structure.plan(True).words
    values, b = a.values.clone().requires_grad_(), normal(40, 6).requires_grad_()
    torch.library.opcheck(multiply.matmul_op, (values, *plans, b, 48, 40, False, torch.float32))
    torch.library.opcheck(multiply.matmul_op, (values, *plans, normal(48, 6), 48, 40, True, torch.float16))
    torch.library.opcheck(multiply.sddmm_op, (*plans, normal(48, 6).requires_grad_(), b, a.blocks, 16))


def test_plans_are_made_once() -> None:
    structure = random_bsr(300, 300, 32, 0.5).structure
    assert structure.plan(False) is structure.plan(False) and structure.merged(2) is structure.merged(2)
    assert structure.plan(False).steps > 0 and structure.to("cpu") is structure
    assert isinstance(structure.in_blocks_of(128), Structure) and structure.in_blocks_of(32) is structure
