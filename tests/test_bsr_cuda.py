"""bsr on CUDA: wgmma and mma.sync against fp64 (csrc/kvcomp/bsr.h)."""

from __future__ import annotations

import random

import numpy as np
import pytest
from kvcomp import _C
from reference_bsr import BLOCKS, Structure, plan_of, random_structure

torch = pytest.importorskip("torch", reason="needs torch for CUDA tensors")
CUDA = _C.cuda_info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA["available"], reason=CUDA["why"] or ""),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

HALVES = (torch.float16, torch.bfloat16)
OUT = (torch.float32, torch.float16, torch.bfloat16)
STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def random_values(s: Structure, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Nothing beyond the edges, as what makes blocks leaves it."""
    values = torch.randn(s.nnzb, s.block, s.block, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    row, column = coordinates(s)
    inner = torch.arange(s.block, device="cuda")
    values *= (row[:, None] * s.block + inner < s.m)[:, :, None]
    values *= (column[:, None] * s.block + inner < s.k)[:, None, :]
    return values.to(dtype)


def coordinates(s: Structure) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.repeat(np.arange(s.rows), np.diff(s.indptr))
    return torch.from_numpy(rows).cuda(), torch.from_numpy(s.indices.astype(np.int64)).cuda()


def full_of(s: Structure, values: torch.Tensor) -> torch.Tensor:
    row, column = coordinates(s)
    full = torch.zeros(s.rows, s.columns, s.block, s.block, dtype=torch.float64, device="cuda")
    full[row, column] = values.double()
    return full.transpose(1, 2).reshape(s.rows * s.block, s.columns * s.block)[: s.m, : s.k]


def random_dense(k: int, n: int, dtype: torch.dtype, seed: int = 1, pitch: int = 0, shift: int = 0) -> torch.Tensor:
    """(k, n), rows `pitch` apart, NaN between them."""
    x = torch.randn(k, n, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)
    if not pitch:
        return x
    apart = torch.full((k * pitch + shift,), torch.nan, dtype=dtype, device="cuda")
    view = apart[shift:].view(k, pitch)[:, :n]
    view.copy_(x)
    return view


def workspace() -> torch.Tensor:
    return torch.full((_C.BSR_WORKSPACE,), 0xFF, dtype=torch.uint8, device="cuda")


def matmul(
    out: torch.Tensor,
    s: Structure,
    values: torch.Tensor,
    dense: torch.Tensor,
    transpose: int = 0,
    beta: float = 0.0,
) -> torch.Tensor:
    plan = torch.from_numpy(plan_of(s, transpose)).cuda()
    _C.bsr_matmul(out, values, plan, dense, workspace(), s.m, s.k, transpose, beta)
    return out


def check(
    s: Structure,
    n: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    beta: float = 0.0,
    pitch: int = 0,
    shift: int = 0,
) -> None:
    values = random_values(s, dtype)
    full = full_of(s, values)
    for transpose in (0, 1):
        a = full.T if transpose else full
        dense = random_dense(a.shape[1], n, dtype, 2, pitch, shift)
        # Guards on all sides: whatever is written beside out shows.
        width = max(n, pitch) + 64
        room = torch.full((a.shape[0] + 2, width), 77.0, dtype=out_dtype, device="cuda")
        out = (
            room[1:-1, 32 : 32 + n]
            if pitch or n % 8
            else torch.full((a.shape[0], n), 77.0, device="cuda").to(out_dtype)
        )
        before = random_dense(a.shape[0], n, out_dtype, 3)
        out.copy_(before if beta else torch.full_like(before, torch.nan))
        matmul(out, s, values, dense, transpose, beta)
        want = a @ dense.double() + (beta * before.double() if beta else 0.0)
        sizes = a.abs() @ dense.double().abs() + abs(beta) * before.double().abs()
        limit = 8e-6 * sizes + 1.01 * STEP[out_dtype] * want.abs() + 2.0**-24
        wrong = (out.double() - want).abs() - limit
        assert not out.isnan().any(), (s.m, s.k, s.block, n, transpose)
        assert (wrong <= 0).all(), (s.m, s.k, s.block, n, transpose, float(wrong.max()))
        if pitch or n % 8:
            room[1:-1, 32 : 32 + n] = 77.0
            assert (room == 77.0).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("out_dtype", OUT)
def test_dtypes_and_blocks(block: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    s = random_structure(1000, 1300, block, 0.3, seed=block)
    for n in (1024, 512, 256, 264, 77):
        check(s, n, dtype, out_dtype)
    check(s, 520, dtype, out_dtype, beta=-0.5)
    check(s, 77, dtype, out_dtype, beta=2.0)


@pytest.mark.parametrize("block", BLOCKS)
def test_small(block: int) -> None:
    """For the sanitizers: both kernels, tails on all sides, empty rows."""
    s = random_structure(3 * block - 7, 2 * block + 9, block, 0.5, seed=block)
    for n in (40, 37, 600):
        check(s, n, torch.float16, torch.float32)
        check(s, n, torch.bfloat16, torch.bfloat16, beta=1.0)
    for n in (40, 37):
        check_sddmm(s, n, torch.float16, torch.float32)


@pytest.mark.parametrize("seed", range(60))
def test_random(seed: int) -> None:
    draw = random.Random(seed)
    block = draw.choice(BLOCKS)
    m, k = (draw.choice([1, block, 127, 128, 129, draw.randint(1, 3000)]) for _ in range(2))
    s = random_structure(m, k, block, draw.choice([0.0, 0.02, 0.2, 1.0]), seed, draw.choice(["int32", "int64"]))
    n = draw.choice([1, 8, 63, 64, 128, 255, 256, 257, 512, 1000, 1024, 1030, 1032, 2048, 2304])
    pitch = draw.choice([0, 0, (n + 15) // 8 * 8, n + 3])
    shift = draw.choice([0, 0, 1, 8]) if pitch else 0
    check(s, n, draw.choice(HALVES), draw.choice(OUT), draw.choice([0.0, 0.0, 1.0, 0.25]), pitch, shift)


@pytest.mark.parametrize("block", (32, 64, 128))
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 8, 16, 17])
def test_clusters_and_panels(block: int, columns: int) -> None:
    """Every number of 256-column tiles: clusters of 1 and 2, tiles that nobody wants, several panels."""
    s = random_structure(700, 1100, block, 0.3, seed=columns)
    check(s, 256 * columns - (8 if columns % 2 else 0), torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("block", BLOCKS)
def test_uneven_rows(block: int) -> None:
    """Full rows beside empty ones, in a tile and between tiles; more tiles than fit on a device at a time."""
    rows, columns = 4096 // block, 2048 // block
    mask = np.zeros((rows, columns), bool)
    mask[::7] = True
    mask[5, :] = False
    mask[rows // 2 :, 0] = True
    mask[-1, -1] = True
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
    s = Structure(4096, 2048, block, indptr, np.nonzero(mask)[1].astype(np.int32))
    check(s, 2048, torch.float16, torch.float16)


def test_no_blocks_at_all() -> None:
    for block in BLOCKS:
        s = random_structure(300, 200, block, 0.0, seed=0)
        for n in (64, 5):
            out = torch.full((300, n), 3.0, device="cuda")
            values = torch.empty(0, block, block, dtype=torch.float16, device="cuda")
            dense = torch.ones(200, n, dtype=torch.float16, device="cuda")
            assert (matmul(out, s, values, dense, beta=0.5) == 1.5).all()
            assert not matmul(out, s, values, dense).any()
    for m, k, n in ((0, 40, 8), (40, 0, 8), (40, 40, 0)):
        s = random_structure(m, k, 32, 1.0, seed=0)
        values = torch.ones(s.nnzb, 32, 32, dtype=torch.float16, device="cuda")
        out = torch.full((m, n), torch.nan, device="cuda")
        matmul(out, s, values, torch.ones(k, n, dtype=torch.float16, device="cuda"))
        assert not out.isnan().any() and (k > 0 or not out.any())


def test_too_large_becomes_infinite() -> None:
    for block in BLOCKS:
        s = random_structure(block, block, block, 1.0, seed=0)
        values = torch.full((1, block, block), 60000.0, dtype=torch.float16, device="cuda")
        for n in (64, 5):
            dense = torch.ones(block, n, dtype=torch.float16, device="cuda")
            out = torch.empty(block, n, dtype=torch.float16, device="cuda")
            assert (matmul(out, s, values, dense) == torch.inf).all()
            assert (matmul(out, s, -values, dense) == -torch.inf).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_the_same_every_time_and_in_graphs(block: int) -> None:
    s = random_structure(2000, 3000, block, 0.2, seed=1)
    values, dense = random_values(s, torch.bfloat16), random_dense(3000, 1536, torch.bfloat16)
    plan, scratch = torch.from_numpy(plan_of(s, 0)).cuda(), workspace()
    want = matmul(torch.empty(2000, 1536, device="cuda"), s, values, dense)
    out = torch.empty_like(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _C.bsr_matmul(out, values, plan, dense, scratch, s.m, s.k, 0, 0.0)
        _C.bsr_matmul(out, values, plan, dense, scratch, s.m, s.k, 0, 0.0)
    for _ in range(20):
        out.fill_(torch.nan)
        scratch.fill_(0xFF)
        graph.replay()
        assert torch.equal(out, want)


def test_two_streams() -> None:
    s = random_structure(4000, 4000, 64, 0.2, seed=1)
    values, dense = random_values(s, torch.float16), random_dense(4000, 2048, torch.float16)
    plan = torch.from_numpy(plan_of(s, 0)).cuda()
    want = matmul(torch.empty(4000, 2048, device="cuda"), s, values, dense)
    streams, outs = [torch.cuda.Stream() for _ in range(2)], [torch.empty_like(want) for _ in range(2)]
    scratch = [workspace() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, out, mine in zip(streams, outs, scratch, strict=True):
            with torch.cuda.stream(stream):
                _C.bsr_matmul(out, values, plan, dense, mine, s.m, s.k, 0, 0.0)
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_the_cpu_agrees() -> None:
    for block in BLOCKS:
        s = random_structure(500, 600, block, 0.4, seed=2)
        values, dense = random_values(s, torch.bfloat16), random_dense(600, 320, torch.bfloat16)
        got = matmul(torch.empty(500, 320, device="cuda"), s, values, dense).cpu()
        want = torch.empty(500, 320)
        _C.bsr_matmul(want, values.cpu(), plan_of(s, 0), dense.cpu(), None, s.m, s.k, 0, 0.0)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_wrong_plan_changes_nothing(block: int) -> None:
    s = random_structure(500, 600, block, 0.4, seed=2)
    values, dense = random_values(s, torch.float16), random_dense(600, 256, torch.float16)
    out = torch.full((500, 256), 5.0, device="cuda")
    other = random_structure(512, 640, block, 0.9, seed=3)
    for plan in (plan_of(other, 0), np.zeros(1 << 16, np.int32)):
        _C.bsr_matmul(out, values, torch.from_numpy(plan).cuda(), dense, workspace(), s.m, s.k, 0, 0.0)
    torch.cuda.synchronize()
    assert (out == 5.0).all()


def test_beyond_two_to_the_31() -> None:
    """Elements of out and of dense whose offsets pass 2^31, by wgmma and by mma.sync."""
    m = k = 70000
    for n, block in ((32768, 128), (32760, 64), (32771, 32), (32768, 16)):
        indptr = np.zeros(-(-m // block) + 1, np.int32)
        indptr[-1] = indptr[-2] = 0
        rows, columns = -(-m // block), -(-k // block)
        mask_rows, mask_columns = [0, rows - 1], [columns - 1, 0]
        for r in mask_rows:
            indptr[r + 1 :] += 1
        s = Structure(m, k, block, indptr, np.array(mask_columns, np.int32))
        values = random_values(s, torch.float16)
        dense = torch.randn(k, n, dtype=torch.float16, device="cuda")
        out = torch.full((m, n), torch.nan, dtype=torch.float16, device="cuda")
        matmul(out, s, values, dense)
        for i, (r, c) in enumerate(zip(mask_rows, mask_columns, strict=True)):
            here = dense[c * block : (c + 1) * block].double()
            want = values[i].double()[:, : len(here)] @ here
            got = out[r * block : (r + 1) * block]
            torch.testing.assert_close(got.double(), want[: len(got)], rtol=2e-3, atol=2e-2)
        middle = out[block : (rows - 1) * block]
        assert not any(part.any() for part in middle.split(4096))
        del dense, out, middle


# ---- sddmm


def check_sddmm(s: Structure, n: int, dtype: torch.dtype, out_dtype: torch.dtype, shift: int = 0) -> None:
    left = random_dense(s.m, n, dtype, 4, n + shift if shift else 0, shift)
    right = random_dense(s.k, n, dtype, 5, n + shift if shift else 0, shift)
    row, column = coordinates(s)

    def blocks(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(s.rows * s.block, s.columns * s.block, dtype=torch.float64, device="cuda")
        whole[: s.m, : s.k] = x @ y.T
        return whole.view(s.rows, s.block, s.columns, s.block)[row, :, column, :]

    want, sizes = blocks(left.double(), right.double()), blocks(left.double().abs(), right.double().abs())
    for transpose in (0, 1):
        out = torch.full((s.nnzb, s.block, s.block), torch.nan, dtype=out_dtype, device="cuda")
        _C.bsr_sddmm(out, torch.from_numpy(plan_of(s, transpose)).cuda(), left, right, transpose)
        limit = 8e-6 * sizes + 1.01 * STEP[out_dtype] * want.abs() + 2.0**-24
        assert ((out.double() - want).abs() <= limit).all(), (s.m, s.k, s.block, n, transpose)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("out_dtype", OUT)
def test_sddmm(block: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for m, k, n in ((1000, 700, 512), (300, 500, 1), (3 * block + 1, 2 * block - 1, 777), (256, 256, 2000)):
        check_sddmm(random_structure(m, k, block, 0.4, seed=n), n, dtype, out_dtype)
    check_sddmm(random_structure(300, 200, block, 0.5, seed=0), 96, dtype, out_dtype, shift=3)


# ---- what is refused


def test_refused() -> None:
    s = random_structure(64, 64, 32, 1.0, seed=0)
    plan = torch.from_numpy(plan_of(s, 0)).cuda()
    values = torch.zeros(s.nnzb, 32, 32, dtype=torch.float16, device="cuda")
    dense, out = torch.zeros(64, 8, dtype=torch.float16, device="cuda"), torch.full((64, 8), 3.0, device="cuda")
    with pytest.raises(NotImplementedError, match="bsr_matmul: values: expected float16 or bfloat16 on CUDA"):
        _C.bsr_matmul(out, values.float(), plan, dense.float(), workspace(), 64, 64, 0, 0.0)
    with pytest.raises(ValueError, match="bsr_matmul: workspace: expected 64 bytes, got 63"):
        _C.bsr_matmul(out, values, plan, dense, workspace()[:63], 64, 64, 0, 0.0)
    with pytest.raises(TypeError, match="bsr_matmul: workspace: expected uint8"):
        _C.bsr_matmul(out, values, plan, dense, None, 64, 64, 0, 0.0)
    with pytest.raises(ValueError, match=r"bsr_matmul: dense: expected the device of out \(cuda:0\), got cpu"):
        _C.bsr_matmul(out, values, plan, dense.cpu(), workspace(), 64, 64, 0, 0.0)
    with pytest.raises(ValueError, match="bsr_matmul: dense: expected shape"):
        _C.bsr_matmul(out, values, plan, dense[:63], workspace(), 64, 64, 0, 0.0)
    with pytest.raises(ValueError, match="bsr_plan: plan: expected a CPU tensor"):
        _C.bsr_plan(plan, s.indptr, s.indices, 64, 64, 32, 0)
    assert (out == 3.0).all()
