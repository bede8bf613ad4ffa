"""w4 in C: packed bytes, rounding of scales, products, against NumPy in fp64 (csrc/kvcomp/w4.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp import _C

Array = npt.NDArray[Any]
SCALE_BITS = (-1, *range(11))
GROUPS = (32, 64, 128)
FLOOR, NEAREST, SEARCH = 0, 1, 2


def aligned(count: int, fill: int = 0) -> Array:
    memory = np.full(count + 16, fill, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + count]


def pack(w: Array, group: int, bits: int, exponent: int | None = None, rounding: int = NEAREST) -> tuple[Array, int]:
    packed = aligned(_C.w4_bytes(*w.shape, group, bits), 0xA5)
    return packed, _C.w4_pack(packed, w, group, bits, exponent, rounding, 0)


def unpack(packed: Array, shape: tuple[int, int], group: int, bits: int, exponent: int) -> tuple[Array, Array, Array]:
    n, k = shape
    out, codes = np.full(shape, np.nan, np.float32), np.full(shape, 99, np.uint8)
    scales = np.full((n, -(-k // group)), np.nan, np.float32)
    _C.w4_unpack(out, codes, scales, packed, n, k, group, bits, exponent, 0)
    return out, codes, scales


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def grid(bits: int) -> Array:
    """Every number of 5 exponent and `bits` mantissa bits."""
    mantissa = np.arange(1 << bits) * 2.0**-bits
    return np.concatenate([mantissa * 2.0**-14, *((1 + mantissa) * 2.0 ** (e - 15) for e in range(1, 31))])


def group_scales(w: Array, group: int) -> Array:
    n, k = w.shape
    padded = np.zeros((n, -(-k // group) * group), np.float32)
    padded[:, :k] = w
    return abs(padded.reshape(n, -1, group)).max(2, initial=0) / np.float32(7)


def relative_error(w: Array, group: int, bits: int, rounding: int) -> float:
    packed, exponent = pack(w, group, bits, None, rounding)
    out, _, _ = unpack(packed, w.shape, group, bits, exponent)
    return float(((out - w).astype(np.float64) ** 2).sum() / (w.astype(np.float64) ** 2).sum())


# ---- scales


@pytest.mark.parametrize("bits", range(15))
def test_scales_are_rounded_to_the_grid(bits: int) -> None:
    numbers = grid(bits)
    rng = np.random.default_rng(bits)
    middles = (numbers[1:] + numbers[:-1]) / 2
    scales = np.concatenate([numbers, middles, 2.0 ** rng.uniform(-20, 17, 1000), [0, 1e-30, 3e38]]).astype(np.float32)
    floor, nearest = np.empty_like(scales), np.empty_like(scales)
    _C.w4_scales(floor, scales, bits, 0, FLOOR)
    _C.w4_scales(nearest, scales, bits, 0, NEAREST)
    below = np.searchsorted(numbers, scales, side="right") - 1
    above = np.minimum(below + 1, len(numbers) - 1)
    assert np.array_equal(floor, numbers[below].astype(np.float32))
    down, up = scales - numbers[below], numbers[above] - scales
    pick_up = (down > up) | ((down == up) & (below % 2 == 1))
    assert np.array_equal(nearest, np.where(pick_up, numbers[above], numbers[below]).astype(np.float32))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0, 2.0**127, width=32), max_size=30),
    st.integers(-1, 14),
    st.integers(-120, 120),
    st.sampled_from([FLOOR, NEAREST]),
)
def test_scales_properties(values: list[float], bits: int, exponent: int, rounding: int) -> None:
    """Idempotent, monotone, exact at 0, floor never above, and shifted by the exponent."""
    scales = np.sort(np.array(values, np.float32))
    once, twice = np.empty_like(scales), np.empty_like(scales)
    _C.w4_scales(once, scales, bits, exponent, rounding)
    _C.w4_scales(twice, once, bits, exponent, rounding)
    assert np.array_equal(once, twice)
    assert (np.diff(once) >= 0).all() and (once[scales == 0] == 0).all()
    if bits < 0:
        assert np.array_equal(once, scales)
    elif rounding == FLOOR:
        assert (once <= scales).all()
    if bits >= 0:
        wide = scales.astype(np.float64)
        assert (once.astype(np.float64) <= (2 - 2.0**-bits) * 2.0 ** (15 + exponent)).all()
        normal_range = (wide >= 2.0 ** (exponent - 14)) & (wide < 2.0 ** (exponent + 15)) & (wide >= 2.0**-126)
        bound = 2.0**-bits if rounding == FLOOR else 2.0 ** -(bits + 1)
        assert (abs(once - wide)[normal_range] <= bound * wide[normal_range]).all()


# ---- packed bytes


@pytest.mark.parametrize("bits", SCALE_BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_round_trip(group: int, bits: int) -> None:
    for seed, shape in enumerate([(1, 1), (64, 256), (70, 300), (129, 33), (5, 513)]):
        for dtype in (np.float32, np.float16):
            w = (3.0**seed * normal(seed, *shape)).astype(dtype)
            w[0, : min(group, shape[1])] = 0
            packed, exponent = pack(w, group, bits)
            out, codes, scales = unpack(packed, shape, group, bits, exponent)
            plain = group_scales(w.astype(np.float32), group)
            want = np.empty_like(plain)
            if bits < 0:
                want = (plain * 2.0**-exponent).astype(np.float16).astype(np.float32) * np.float32(2.0**exponent)
            else:
                _C.w4_scales(want, plain, bits, exponent, NEAREST)
            assert np.array_equal(scales, want)
            spread = np.repeat(want, group, 1)[:, : shape[1]]
            q = np.divide(w.astype(np.float32), spread, out=np.zeros(shape, np.float32), where=spread > 0)
            assert np.array_equal(codes, np.clip(np.rint(q), -8, 7) + 8)
            assert np.array_equal(out, (codes.astype(np.float32) - 8) * spread)
            assert not out[0, : min(group, shape[1])].any()


def test_bytes_are_really_packed() -> None:
    for group in GROUPS:
        for bits in SCALE_BITS:
            per_scale = 16 if bits < 0 else 5 + bits
            assert _C.w4_bytes(4096, 4096, group, bits) * 8 == 4096 * 4096 * 4 + 4096 * 4096 // group * per_scale
    assert _C.w4_bytes(0, 5, 128, 3) == 0 and _C.w4_bytes(5, 0, 128, 3) == 0
    assert 8 * _C.w4_bytes(4096, 4096, 32, 3) / 4096**2 <= 4.29


def test_same_bytes_from_any_number_of_threads() -> None:
    w = normal(1, 500, 700)
    one, three = (aligned(_C.w4_bytes(500, 700, 32, 3)) for _ in range(2))
    assert _C.w4_pack(one, w, 32, 3, None, SEARCH, 1) == _C.w4_pack(three, w, 32, 3, None, SEARCH, 3)
    assert np.array_equal(one, three)


def test_weights_of_rows_apart_and_of_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    w = torch.randn(70, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = torch.randn(70, 400).bfloat16()
    wide[:, 100:300] = w
    a, b = (pack(x, 64, 5)[0] for x in (w, wide[:, 100:300]))
    assert np.array_equal(a, b) and np.array_equal(a, pack(w.float().numpy(), 64, 5)[0])
    out = torch.empty(70, 200, dtype=torch.bfloat16)
    exponent = pack(w, 64, 5)[1]
    _C.w4_unpack(out, None, None, a, 70, 200, 64, 5, exponent, 0)
    assert torch.equal(out, torch.from_numpy(unpack(a, (70, 200), 64, 5, exponent)[0]).bfloat16())


def test_exponent_saturates_and_flushes() -> None:
    w = np.zeros((3, 128), np.float32)
    w[0, 0], w[1, 0], w[2, 0] = 7 * 2.0**20, 7.0, 7 * 2.0**-30
    packed, exponent = pack(w, 128, 3, 0)
    _, codes, scales = unpack(packed, w.shape, 128, 3, exponent)
    assert exponent == 0 and scales[:, 0].tolist() == [61440.0, 1.0, 0.0]
    assert codes[:, 0].tolist() == [15, 15, 8]
    chosen, exponent = pack(w, 128, 3)
    assert exponent == 7 and unpack(chosen, w.shape, 128, 3, exponent)[2][0, 0] == 2.0**20


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.floats(-120, 110), st.sampled_from(GROUPS), st.sampled_from(SCALE_BITS))
def test_error_is_half_a_step(seed: int, size: float, group: int, bits: int) -> None:
    """However large or small the weights are: half a step of the rounded scale, and what is clipped by its rounding."""
    w = (2.0**size * normal(seed, 3, 2 * group)).astype(np.float32)
    packed, exponent = pack(w, group, bits)
    out, _, scales = unpack(packed, w.shape, group, bits, exponent)
    spread = np.repeat(scales, group, 1).astype(np.float64)
    clipped = np.maximum(abs(w) - 7 * spread, 0)
    assert (abs(out - w.astype(np.float64)) <= np.maximum(0.5000002 * spread, clipped * 1.000001)).all()


def test_order_of_errors() -> None:
    """The figures of the specification: search beats nearest beats floor; small groups of E5M3 beat large ones."""
    w = normal(5, 512, 2048)
    for group in GROUPS:
        for bits in (-1, 0, 3, 5):
            floor, nearest, search = (relative_error(w, group, bits, how) for how in (FLOOR, NEAREST, SEARCH))
            assert search < nearest
            assert bits != 0 or nearest < floor
    exact = relative_error(w, 128, -1, NEAREST)
    for bits in (3, 5):
        assert abs(relative_error(w, 128, bits, NEAREST) / exact - 1) < 0.01
    assert relative_error(w, 32, 3, SEARCH) < 0.6 * exact
    assert 0.98 * exact < 0.0137 < 1.02 * exact


# ---- products


def check(
    x: Any, w: Array, group: int, bits: int, bias: Any = None, out_dtype: Any = np.float32, threads: int = 0
) -> None:
    packed, exponent = pack(w, group, bits)
    dense = unpack(packed, w.shape, group, bits, exponent)[0].astype(np.float64)
    out = np.full((x.shape[0], w.shape[0]), np.nan, out_dtype)
    before = packed.copy()
    _C.w4_matmul(out, x, packed, bias, None, group, bits, exponent, threads, 0)
    assert np.array_equal(packed, before)
    wide = x.astype(np.float64)
    want, size = wide @ dense.T, abs(wide) @ abs(dense).T
    if bias is not None:
        want, size = want + bias, size + abs(bias)
    bound = 2.0**-20 * size + (2.0**-11 * abs(want) + 2.0**-25 if out_dtype == np.float16 else 0)
    assert (abs(out.astype(np.float64) - want) <= bound).all()


@pytest.mark.parametrize("bits", SCALE_BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_products(group: int, bits: int) -> None:
    for seed, (m, n, k) in enumerate(
        [(1, 64, 256), (2, 70, 300), (3, 1, 1), (4, 130, 129), (5, 65, 513), (70, 66, 40)]
    ):
        for dtype in (np.float32, np.float16):
            check(normal(seed, m, k, dtype=dtype), normal(seed + 50, n, k), group, bits, normal(seed, n))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 140),
    st.integers(1, 140),
    st.integers(1, 400),
    st.sampled_from(GROUPS),
    st.sampled_from(SCALE_BITS),
    st.integers(0, 3),
)
def test_any_shape(m: int, n: int, k: int, group: int, bits: int, threads: int) -> None:
    check(normal(m, m, k, dtype=np.float16), normal(k, n, k), group, bits, None, np.float16, threads)


@pytest.mark.parametrize("m", [255, 256, 257, 600])
def test_more_rows_than_share_a_block(m: int) -> None:
    """However the rows are divided among threads, the bits are the same."""
    x, w = normal(m, m, 260, dtype=np.float16), normal(3, 70, 260)
    check(x, w, 64, 5, normal(4, 70))
    packed, exponent = pack(w, 64, 5)
    outs = [np.full((m, 70), np.nan, np.float32) for _ in range(4)]
    for threads, out in zip((1, 2, 5, 64), outs, strict=True):
        _C.w4_matmul(out, x, packed, None, None, 64, 5, exponent, threads, 0)
    assert all(np.array_equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("m, k", [(1, 70), (5, 33), (9, 129), (70, 300), (257, 513)])
def test_rows_of_bfloat16(m: int, k: int, group: int) -> None:
    """Which some processors multiply in pairs."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(normal(m, m, k)).bfloat16()
    w, out = normal(k, 70, k), torch.full((m, 70), torch.nan)
    for bits in (-1, 3, 5):
        packed, exponent = pack(w, group, bits)
        dense = unpack(packed, w.shape, group, bits, exponent)[0].astype(np.float64)
        for threads in (1, 3):
            _C.w4_matmul(out, x, packed, None, None, group, bits, exponent, threads, 0)
            wide = x.double().numpy()
            size = abs(wide) @ abs(dense).T
            assert (abs(out.double().numpy() - wide @ dense.T) <= 2.0**-20 * size).all()
    x[m // 2, k // 2] = torch.nan
    _C.w4_matmul(out, x, packed, None, None, group, bits, exponent, 0, 0)
    assert torch.equal(out.isnan().any(dim=1), torch.arange(m) == m // 2) and out[m // 2].isnan().all()


def test_instruction_sets_agree(tmp_path: Any) -> None:
    import os
    import subprocess
    import sys

    program = (
        "import numpy as np, sys; sys.path.insert(0, sys.argv[1]); from test_w4 import *\n"
        "for m in (1, 4, 9, 77): check(normal(1, m, 300, dtype=np.float16), normal(2, 70, 300), 32, 3)"
    )
    for name in ("base", "avx2", "avx512"):
        subprocess.run(
            [sys.executable, "-c", program, os.path.dirname(__file__)],
            check=True,
            env={**os.environ, "KVCOMP_SIMD": name},
        )


@pytest.mark.parametrize("bits", SCALE_BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_stacked_matrices_are_multiplied_as_alone(group: int, bits: int) -> None:
    """Bit for bit, each with its own exponent; the last one ends within a strip."""
    rows, k = (64, 192, 70), 300
    weights = [2.0 ** (9 * i) * normal(i, n, k) for i, n in enumerate(rows)]
    packed, exponents = zip(*(pack(w, group, bits) for w in weights), strict=True)
    assert len(set(exponents)) == 3
    whole = aligned(sum(map(len, packed)))
    whole[:] = np.concatenate(packed)
    bias = 100 * normal(9, sum(rows))
    for m in (1, 3, 5, 70):
        x, out = normal(m, m, k, dtype=np.float16), np.full((m, sum(rows)), np.nan, np.float32)
        stack = tuple(zip(rows, exponents, strict=True))
        _C.w4_matmul(out, x, whole, bias, None, group, bits, stack, 0, 0)
        end = 0
        for n, part, exponent in zip(rows, packed, exponents, strict=True):
            begin, end = end, end + n
            alone = np.full((m, n), np.nan, np.float32)
            _C.w4_matmul(alone, x, part, bias[begin:end], None, group, bits, exponent, 0, 0)
            assert np.array_equal(out[:, begin:end], alone)


def test_as_many_stacked_matrices_as_there_may_be() -> None:
    w, x = normal(1, 8 * 64, 40), normal(2, 2, 40)
    packed, exponent = pack(w, 32, 3)
    one, eight = np.empty((2, 8 * 64), np.float32), np.empty((2, 8 * 64), np.float32)
    _C.w4_matmul(one, x, packed, None, None, 32, 3, exponent, 0, 0)
    _C.w4_matmul(eight, x, packed, None, None, 32, 3, tuple((64, exponent + i) for i in range(8)), 0, 0)
    assert np.array_equal(eight.reshape(2, 8, 64), np.ldexp(one.reshape(2, 8, 64), np.arange(8)[:, None]))


def test_rows_of_x_and_out_apart() -> None:
    w, x = normal(1, 70, 200), normal(2, 9, 500)
    packed, exponent = pack(w, 32, 3)
    out, want = np.full((9, 100), 7, np.float32), np.empty((9, 70), np.float32)
    _C.w4_matmul(out[:, 20:90], x[:, 100:300], packed, None, None, 32, 3, exponent, 0, 0)
    _C.w4_matmul(want, np.ascontiguousarray(x[:, 100:300]), packed, None, None, 32, 3, exponent, 0, 0)
    assert np.array_equal(out[:, 20:90], want) and (out[:, :20] == 7).all() and (out[:, 90:] == 7).all()


@pytest.mark.parametrize("m", [1, 3, 6])
def test_nan_stays_in_its_row(m: int) -> None:
    w, x = normal(1, 70, 200), normal(2, m + 1, 200, dtype=np.float16)
    packed, exponent = pack(w, 128, 0)
    clean, dirty = np.empty((m + 1, 70), np.float32), np.empty((m + 1, 70), np.float32)
    _C.w4_matmul(clean, x, packed, None, None, 128, 0, exponent, 0, 0)
    x[m, 199] = np.nan
    _C.w4_matmul(dirty, x, packed, None, None, 128, 0, exponent, 0, 0)
    assert np.array_equal(clean[:m], dirty[:m]) and np.isnan(dirty[m]).all()


def test_nothing() -> None:
    bias = normal(1, 5)
    for m, n, k in ((0, 5, 7), (3, 0, 7), (3, 5, 0)):
        packed, exponent = pack(normal(0, n, k), 64, 3)
        out = np.full((m, n), np.nan, np.float32)
        _C.w4_matmul(out, normal(1, m, k), packed, bias[:n], None, 64, 3, exponent, 0, 0)
        assert np.array_equal(out, np.broadcast_to(bias[:n], (m, n)))


# ---- what is refused


def good() -> dict[str, Any]:
    packed, exponent = pack(normal(0, 10, 40), 32, 3)
    return {
        "out": np.full((3, 10), 7, np.float32),
        "x": normal(1, 3, 40),
        "packed": packed,
        "bias": normal(2, 10),
        "workspace": None,
        "group": 32,
        "scale_bits": 3,
        "exponent": exponent,
        "threads": 0,
        "early": 0,
    }


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"group": 48}, ValueError, "group: expected 32, 64 or 128, got 48"),
        ({"group": 256}, ValueError, "group: expected an integer in 32..128, got 256"),
        ({"scale_bits": 11}, ValueError, "scale_bits: expected an integer in -1..10, got 11"),
        ({"exponent": 121}, ValueError, "exponent: expected an integer in -120..120, got 121"),
        ({"exponent": None}, TypeError, "exponent: expected an integer, got NoneType"),
        ({"exponent": ()}, ValueError, r"exponent: expected an integer or 1 to 8 pairs \(rows, exponent\), got \(\)"),
        ({"exponent": (64, 0)}, ValueError, r"exponent: expected an integer or 1 to 8 pairs .*, got \(64, 0\)"),
        ({"exponent": ((1, 0),) * 9}, ValueError, "exponent: expected an integer or 1 to 8 pairs"),
        ({"exponent": ((10, 0.5),)}, TypeError, "exponent: expected an integer, got float"),
        ({"exponent": ((10, 121),)}, ValueError, r"exponent: expected an integer in -120\.\.120, got 121"),
        ({"exponent": ((-1, 0),)}, ValueError, r"rows: expected an integer in 0\.\."),
        ({"exponent": ((9, 0),)}, ValueError, "rows: expected parts of 10 in all, got 9"),
        ({"exponent": ((11, 0),)}, ValueError, "rows: expected parts of 10 in all, got 11"),
        ({"exponent": ((64, 0), (0, 0))}, ValueError, "rows: expected one or more in every part, got 0 in part 1"),
        ({"exponent": ((5, 0), (5, 0))}, ValueError, "rows: expected a multiple of 64 before the last part, got 5"),
        ({"x": normal(1, 3, 400)}, ValueError, r"packed: expected shape \(\d+,\), got \(\d+,\)"),
        ({"x": normal(1, 40)}, ValueError, r"x: expected shape \(\*, 0\), got \(40,\)"),
        ({"x": np.zeros((3, 40), np.int32)}, TypeError, "x: expected float32, float16 or bfloat16, got int32"),
        ({"x": normal(1, 40, 3).T}, ValueError, "x: expected contiguous channels"),
        ({"out": np.full((4, 10), 7, np.float32)}, ValueError, r"out: expected shape \(3, 10\), got \(4, 10\)"),
        ({"bias": normal(2, 9)}, ValueError, r"bias: expected shape \(10,\), got \(9,\)"),
        ({"packed": np.zeros(5, np.uint8)}, ValueError, "packed: expected shape"),
        ({"packed": np.zeros(5, np.int32)}, TypeError, "packed: expected uint8, got int32"),
        ({"early": 1}, ValueError, "early: expected 0, or 1 on CUDA, got 1"),
        ({"threads": 65}, ValueError, "threads: expected an integer in 0..64, got 65"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = {**good(), **change}
    before = arguments["out"].copy()
    with pytest.raises(error, match=f"w4_matmul: {sentence}"):
        _C.w4_matmul(*arguments.values())
    assert np.array_equal(arguments["out"], before)


def test_misaligned_bytes_are_refused() -> None:
    arguments = good()
    arguments["packed"] = aligned(len(arguments["packed"]) + 1)[1:]
    with pytest.raises(ValueError, match="w4_matmul: packed: expected 16-byte alignment"):
        _C.w4_matmul(*arguments.values())


def test_weights_that_are_refused() -> None:
    w = normal(0, 10, 40)
    packed = aligned(_C.w4_bytes(10, 40, 32, 3), 0xA5)
    for value in (np.nan, np.inf, -np.inf):
        w[9, 39] = value
        with pytest.raises(ValueError, match="w4_pack: weights: expected finite numbers, got Inf or NaN"):
            _C.w4_pack(packed, w, 32, 3, None, NEAREST, 0)
    with pytest.raises(ValueError, match=r"w4_pack: rounding: expected an integer in 0\.\.2, got 3"):
        _C.w4_pack(packed, normal(0, 10, 40), 32, 3, None, 3, 0)
    with pytest.raises(ValueError, match="w4_scales: scales: expected finite numbers >= 0, got -1 at element 1"):
        _C.w4_scales(np.empty(2, np.float32), np.array([1, -1], np.float32), 3, 0, NEAREST)
    assert (packed == 0xA5).all()
    for n, k in ((2**62, 2**62), (2**60, 64)):
        with pytest.raises(ValueError, match="w4_bytes: weights: expected a matrix that memory can hold"):
            _C.w4_bytes(n, k, 32, 3)


def test_unpack_refuses() -> None:
    packed, exponent = pack(normal(0, 10, 40), 32, 3)
    out = np.full((10, 40), 7, np.float32)
    with pytest.raises(ValueError, match=r"w4_unpack: scales: expected shape \(10, 2\), got \(10, 1\)"):
        _C.w4_unpack(out, None, np.empty((10, 1), np.float32), packed, 10, 40, 32, 3, exponent, 0)
    with pytest.raises(ValueError, match=r"w4_unpack: out: expected shape \(11, 40\), got \(10, 40\)"):
        _C.w4_unpack(out, None, None, packed, 11, 40, 32, 3, exponent, 0)
    assert (out == 7).all()
