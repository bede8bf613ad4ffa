"""w4_matmul on CUDA: fp64 on the unpacked weights, over all shapes, formats and regimes (csrc/kvcomp/w4.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kvcomp import _C

torch = pytest.importorskip("torch", reason="needs torch for CUDA tensors")
CUDA = _C.cuda_info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA["available"], reason=CUDA["why"] or ""),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = (torch.float16, torch.bfloat16)
GUARD = 4096
EPSILON = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Weights:
    exponent: Any  # or those of parts: ((rows, exponent), ...)

    def __init__(self, seed: int, n: int, k: int, group: int, bits: int, size: float = 0.02) -> None:
        self.n, self.k, self.format = n, k, (group, bits)
        packed = torch.empty(_C.w4_bytes(n, k, group, bits), dtype=torch.uint8)
        self.exponent = exponent = _C.w4_pack(packed, size * normal(seed, n, k), group, bits, None, 1, 0)
        dense = torch.empty(n, k)
        _C.w4_unpack(dense, None, None, packed, n, k, group, bits, exponent, 0)
        self.dense, self.packed = dense.double().cuda(), packed.cuda()

    @staticmethod
    def stacked(parts: list[Weights]) -> Weights:
        """Several, as one."""
        whole = object.__new__(Weights)
        whole.n, whole.k, whole.format = sum(part.n for part in parts), parts[0].k, parts[0].format
        whole.exponent = tuple((part.n, part.exponent) for part in parts)
        whole.dense, whole.packed = (torch.cat([getattr(part, name) for part in parts]) for name in ("dense", "packed"))
        return whole

    def workspace(self, m: int) -> torch.Tensor:
        """As many bytes as stated, between guards; all of it 0xFF before and after."""
        need = _C.w4_workspace(m, self.n, self.k)
        return torch.full((need + 2 * GUARD,), 0xFF, dtype=torch.uint8, device="cuda")

    def matmul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        early: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        out = torch.full((x.shape[0], self.n), torch.nan, dtype=dtype, device="cuda") if out is None else out
        scratch = self.workspace(x.shape[0])
        _C.w4_matmul(
            out, x, self.packed, bias, scratch[GUARD : len(scratch) - GUARD], *self.format, self.exponent, 0, early
        )
        assert (scratch == 0xFF).all()
        return out

    def check(self, x: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        x = x.cuda()
        got = self.matmul(x, bias, dtype=dtype).double()
        want, size = x.double() @ self.dense.T, x.double().abs() @ self.dense.abs().T
        if bias is not None:
            want, size = want + bias.double(), size + bias.double().abs()
        rounded = 2.0**-12 if x.dtype == torch.float16 else 2.0**-9
        bound = (2.0**-20 if x.shape[0] <= 32 else 2.0**-16 + rounded) * size + EPSILON[dtype] * (want.abs() + 2.0**-13)
        worst = ((got - want).abs() / bound.clamp_min(1e-30)).max()
        assert worst <= 1, f"{float(worst):.2f} times the bound"


ROWS = (1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 100, 128, 129, 256, 300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [-1, 0, 3, 5])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_formats(group: int, bits: int, dtype: torch.dtype) -> None:
    weights = Weights(1, 320, 768, group, bits)
    for m in ROWS:
        weights.check(normal(m, m, 768, dtype=dtype), normal(3, 320).cuda())


def test_small() -> None:
    """For the sanitizers: both kernels, whole tiles and tails."""
    for n, k, group, bits in ((130, 300, 64, 3), (128, 512, 128, 5), (64, 256, 32, -1)):
        weights = Weights(1, n, k, group, bits)
        for m in (1, 12, 20, 40, 300):
            weights.check(normal(m, m, k, dtype=torch.bfloat16), normal(3, n).cuda())


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 7, 8, 9, 10])
def test_rare_formats(bits: int) -> None:
    for group in (32, 64, 128):
        weights = Weights(1, 130, 300, group, bits)
        for m in (1, 16, 24, 40, 200):
            weights.check(normal(m, m, 300, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (63, 127), (64, 128), (65, 129), (200, 1000), (129, 5), (1000, 333), (64, 8), (3, 4100)]
)
def test_tails(n: int, k: int, dtype: torch.dtype) -> None:
    for group, bits in ((128, 3), (128, 5), (32, 5), (128, 0)):
        weights = Weights(2, n, k, group, bits)
        for m in ROWS:
            weights.check(normal(m, m, k, dtype=dtype), normal(5, n, dtype=dtype).cuda())


@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (8192, 8192), (14336, 4096), (28672, 4096), (4096, 14336), (16384, 3072), (256, 32768)]
)
def test_sizes_of_models(n: int, k: int) -> None:
    weights = Weights(3, n, k, 128, 3)
    for dtype in DTYPES:
        for m in (1, 8, 16, 32, 64, 128, 200, 256, 512, 1000):
            weights.check(normal(m, m, k, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("bits", [5, 0])  # blocks of 128 and of 256 inputs
@pytest.mark.parametrize(
    ("n", "k", "m"),
    [
        (1024, 4096, 64),
        (4096, 1024, 50),
        (4096, 3968, 128),
        (14336, 640, 64),
        (14336, 512, 130),
        (20_000, 640, 257),
        (50_000, 256, 64),
        (9000, 2048, 384),
        (24_576, 384, 600),
    ],
)
def test_many_rows(n: int, k: int, m: int, bits: int) -> None:
    """Sizes of the kinds that w4_large.cuh plans differently: few tiles, as many as blocks, some more, many."""
    Weights(n, n, k, 128, bits).check(normal(m, m, k, dtype=torch.float16))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_dtypes_of_out_and_bias(dtype: torch.dtype) -> None:
    weights = Weights(4, 200, 512, 64, 3)
    for m in (1, 20, 70, 300):
        weights.check(normal(m, m, 512, dtype=torch.bfloat16), normal(6, 200, dtype=dtype).cuda(), dtype)


def test_sums_of_many_equal_terms() -> None:
    """Sums that grow: what tensor cores cut off must not add up."""
    weights = Weights(5, 128, 16384, 128, 3)
    for m in (1, 16, 32):
        x = torch.ones(m, 16384, dtype=torch.float16)
        weights.check(x)
    weights.dense.abs_()
    packed = torch.empty_like(weights.packed, device="cpu")
    weights.exponent = _C.w4_pack(packed, weights.dense.float().cpu(), 128, 3, None, 1, 0)
    dense = torch.empty(128, 16384)
    _C.w4_unpack(dense, None, None, packed, 128, 16384, 128, 3, weights.exponent, 0)
    weights.packed, weights.dense = packed.cuda(), dense.double().cuda()
    for m in (1, 16, 32, 64, 256):
        weights.check(torch.ones(m, 16384, dtype=torch.float16))


def test_large_and_small_x() -> None:
    weights = Weights(6, 128, 512, 128, 3)
    for size in (2.0**-20, 2.0**10):
        for m in (1, 16, 32, 64, 256):
            weights.check((size * normal(m, m, 512)).half())
    for size in (2.0**-100, 2.0**100):
        for m in (1, 16, 32, 64, 256):
            weights.check((size * normal(m, m, 512)).bfloat16())


@pytest.mark.parametrize("m", [1, 5, 12, 30, 50, 130, 300])
def test_rows_of_x_and_out_apart(m: int) -> None:
    """As in one piece, bit for bit, where m is small or rows can be copied by 16 bytes; else by another kernel."""
    weights = Weights(7, 200, 256, 32, 3)
    for first in (0, 8, 3):
        x, out = normal(1, m, 600, dtype=torch.float16).cuda(), torch.full((m, 500), 7.0, device="cuda")
        part = x[:, first : first + 256]
        weights.matmul(part, out=out[:, 100:300])
        if m <= 32 or first % 8 == 0:
            assert torch.equal(out[:, 100:300], weights.matmul(part.contiguous()))
        else:
            weights.check(part)
            torch.testing.assert_close(out[:, 100:300], weights.matmul(part.contiguous()), rtol=2e-4, atol=2e-4)
        assert (out[:, :100] == 7).all() and (out[:, 300:] == 7).all()


@pytest.mark.parametrize("m", [2, 12, 30, 50, 130, 300])
def test_nan_stays_in_its_row(m: int) -> None:
    weights = Weights(8, 200, 200, 32, 3)
    x = normal(1, m, 200, dtype=torch.float16).cuda()
    want = weights.matmul(x)
    x[m // 2, 199] = torch.nan
    got = weights.matmul(x)
    assert got[m // 2].isnan().all()
    others = torch.arange(m, device="cuda") != m // 2
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 256])
def test_every_run_is_the_same(m: int) -> None:
    weights = Weights(9, 2048, 4096, 128, 3)
    x = normal(1, m, 4096, dtype=torch.bfloat16).cuda()
    want = weights.matmul(x)
    for _ in range(20):
        assert torch.equal(weights.matmul(x), want)


@pytest.mark.parametrize("m", [1, 16, 32, 64, 256])
def test_layers_one_after_the_other(m: int) -> None:
    """Launches that overlap, in a graph, with one workspace: each reads what the one before has written."""
    layers = [Weights(seed, 1024, 1024, 128, 3) for seed in range(4)]
    first = normal(1, m, 1024, dtype=torch.float16).cuda()
    states = [first] + [torch.empty_like(first) for _ in range(12)]
    scratch = torch.full((_C.w4_workspace(m, 1024, 1024),), 0xFF, dtype=torch.uint8, device="cuda")

    def step(early: int) -> None:
        for i in range(12):
            w = layers[i % 4]
            _C.w4_matmul(states[i + 1], states[i], w.packed, None, scratch, *w.format, w.exponent, 0, early)

    step(0)
    want = [x.clone() for x in states]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(1)
    for _ in range(20):
        for x in states[1:]:
            x.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(states, want, strict=True))
    assert (scratch == 0xFF).all()


def test_as_the_cpu() -> None:
    weights = Weights(10, 300, 700, 64, 5)
    x, bias = normal(1, 20, 700, dtype=torch.float16), normal(2, 300)
    out = torch.empty(20, 300)
    _C.w4_matmul(out, x, weights.packed.cpu(), bias, None, *weights.format, weights.exponent, 0, 0)
    torch.testing.assert_close(weights.matmul(x.cuda(), bias.cuda()).cpu(), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "bits"), [(128, 5), (128, 3), (64, -1), (32, 3), (32, 10)])
@pytest.mark.parametrize(
    ("rows", "k"),
    [
        ((64, 192, 70), 300),
        ((1024, 256, 256), 1024),
        ((1344, 1344), 1024),
        ((64,) * 8, 512),
        ((4096, 1024, 1024), 4096),
    ],
)
def test_stacked_matrices(rows: tuple[int, ...], k: int, group: int, bits: int, dtype: torch.dtype) -> None:
    """One product of all: each part as near to fp64 as alone, though sums may be of another order."""
    parts = [Weights(i, n, k, group, bits, 0.02 * 2.0 ** (-9 * (i % 3))) for i, n in enumerate(rows)]
    assert len({part.exponent for part in parts}) > 1
    whole = Weights.stacked(parts)
    bias = normal(5, sum(rows)).cuda()
    for m in (1, 8, 16, 17, 33, 64, 300):
        whole.check(normal(m, m, k, dtype=dtype), bias)
        whole.check(normal(m, m, k, dtype=dtype), dtype=dtype)


def test_nothing() -> None:
    bias = normal(1, 5).cuda()
    for m, n, k in ((0, 5, 7), (3, 0, 7), (3, 5, 0)):
        packed = torch.empty(_C.w4_bytes(n, k, 64, 3), dtype=torch.uint8, device="cuda")
        out = torch.full((m, n), torch.nan, device="cuda")
        x = torch.zeros(m, k, dtype=torch.float16, device="cuda")
        scratch = torch.full((max(1, _C.w4_workspace(m, n, k)),), 0xFF, dtype=torch.uint8, device="cuda")
        _C.w4_matmul(out, x, packed, bias[:n], scratch, 64, 3, 0, 0, 0)
        assert torch.equal(out, bias[:n].expand(m, n))


def good() -> dict[str, Any]:
    weights = Weights(0, 64, 128, 32, 3)
    return {
        "out": torch.full((3, 64), 7.0, device="cuda"),
        "x": normal(1, 3, 128, dtype=torch.float16).cuda(),
        "packed": weights.packed,
        "bias": normal(2, 64).cuda(),
        "workspace": torch.full((_C.w4_workspace(3, 64, 128),), 0xFF, dtype=torch.uint8, device="cuda"),
        "group": 32,
        "scale_bits": 3,
        "exponent": weights.exponent,
        "threads": 0,
        "early": 0,
    }


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"x": torch.zeros(3, 128)}, ValueError, "x: expected the device of out"),
        ({"packed": torch.zeros(5, dtype=torch.uint8)}, ValueError, "packed: expected the device of out"),
        ({"workspace": None}, TypeError, "workspace: expected uint8"),
        ({"workspace": "small"}, ValueError, r"workspace: expected \d+ bytes, got 64"),
        ({"x": "float32"}, TypeError, "x: expected float16 or bfloat16 on CUDA, got float32"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = good()
    for name, value in change.items():
        if value == "small":
            value = torch.zeros(64, dtype=torch.uint8, device="cuda")
        elif isinstance(value, str):
            value = arguments[name].float()
        arguments[name] = value
    with pytest.raises(error, match=f"w4_matmul: {sentence}"):
        _C.w4_matmul(*arguments.values())
    assert (arguments["out"] == 7).all()


def test_weights_that_went_through_numpy() -> None:
    """The packed bytes of the CPU are those of the GPU: no second format."""
    w = np.random.default_rng(0).standard_normal((100, 200)).astype(np.float32)
    packed = np.empty(_C.w4_bytes(100, 200, 128, 5), np.uint8)
    if packed.ctypes.data % 16:
        pytest.skip("this NumPy array is not aligned to 16 bytes")
    exponent = _C.w4_pack(packed, w, 128, 5, None, 1, 0)
    x = normal(1, 2, 200, dtype=torch.float16)
    want, got = torch.empty(2, 100), torch.empty(2, 100, device="cuda")
    _C.w4_matmul(want, x, packed, None, None, 128, 5, exponent, 0, 0)
    scratch = torch.full((_C.w4_workspace(2, 100, 200),), 0xFF, dtype=torch.uint8, device="cuda")
    _C.w4_matmul(got, x.cuda(), torch.from_numpy(packed).cuda(), None, scratch, 128, 5, exponent, 0, 0)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
