"""rotate: rows times a matrix of their KV head, against float64 (rotate.h)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp import _C

Array = np.ndarray[Any, Any]
TYPES = {np.float32: 0.0, np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8}  # half a unit in the last place


def inputs(seed: int, b: int, h: int, group: int, q: int, d: int, kind: Any = np.float32) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((b, h * group, q, d)).astype(kind)
    return rows, random.standard_normal((h, d, d)).astype(np.float32)


def expected(rows: Array, matrix: Array, transpose: bool) -> tuple[Array, Array]:
    """The product in float64, and the bound of an fp32 sum's error."""
    group = rows.shape[1] // len(matrix)
    m = np.repeat(matrix.astype(np.float64), group, axis=0)
    m = m.swapaxes(1, 2) if transpose else m
    x = rows.astype(np.float64)
    return x @ m, np.abs(x) @ np.abs(m) * rows.shape[3] * 2.0**-24


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_against_float64(data: st.DataObject) -> None:
    b, h, group = (data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)))
    q = data.draw(st.sampled_from([0, 1, 2, 3, 5, 64, 70]))
    d = data.draw(st.sampled_from([64, 80, 96, 128, 256]) | st.integers(1, 256))
    kind, out_kind = data.draw(st.sampled_from(list(TYPES))), data.draw(st.sampled_from(list(TYPES)))
    transpose = data.draw(st.booleans())
    rows, matrix = inputs(data.draw(st.integers(0, 2**32)), b, h, group, q, d, kind)
    out = np.full(rows.shape, 7, out_kind)
    _C.rotate(out, rows, matrix, transpose)
    exact, bound = expected(rows, matrix, transpose)
    assert (np.abs(out.astype(np.float64) - exact) <= bound + np.abs(exact) * TYPES[out_kind] * 1.01 + 1e-7).all()


@pytest.mark.parametrize("transpose", [False, True])
def test_strides_and_other_libraries(transpose: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rows, matrix = inputs(1, 2, 2, 3, 9, 96)
    plain = np.empty_like(rows)
    _C.rotate(plain, rows, matrix, transpose)
    strided = np.empty((2, 9, 6, 96), np.float32).transpose(0, 2, 1, 3)
    _C.rotate(strided, np.ascontiguousarray(rows.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3), matrix, transpose)
    assert np.array_equal(strided, plain)
    out = torch.empty(rows.shape)
    _C.rotate(out, torch.from_numpy(rows), torch.from_numpy(matrix), transpose)
    assert np.array_equal(out.numpy(), plain)
    narrow = np.zeros((2, 6, 9, 200), np.float32)
    _C.rotate(narrow[..., 100:196], rows, matrix, transpose)
    assert np.array_equal(narrow[..., 100:196], plain) and not narrow[..., :100].any() and not narrow[..., 196:].any()


@pytest.mark.parametrize("transpose", [False, True])
def test_threads_and_company_do_not_show(transpose: bool) -> None:
    rows, matrix = inputs(2, 2, 2, 4, 300, 128)
    outs = []
    threads = _C.threads()
    for count in (1, 3):
        _C.set_threads(count)
        try:
            out = np.empty_like(rows)
            _C.rotate(out, rows, matrix, transpose)
        finally:
            _C.set_threads(threads)
        outs.append(out)
    assert np.array_equal(*outs)
    alone = np.empty_like(rows[:, :, 17:18])
    _C.rotate(alone, rows[:, :, 17:18], matrix, transpose)
    assert np.array_equal(alone, outs[0][:, :, 17:18])


@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_there_and_back(d: int) -> None:
    """An orthogonal matrix and then its transpose."""
    rows, matrix = inputs(3, 1, 2, 2, 8, d)
    matrix = np.linalg.qr(matrix.astype(np.float64))[0].astype(np.float32)
    there, back = np.empty_like(rows), np.empty_like(rows)
    _C.rotate(there, rows, matrix, False)
    _C.rotate(back, there, matrix, True)
    assert np.abs(back - rows).max() < 1e-5 < np.abs(there - rows).max()


@pytest.mark.parametrize("d", [64, 80, 7, 250])
@pytest.mark.parametrize("transpose", [False, True])
def test_nan_and_infinity_pass_through(d: int, transpose: bool) -> None:
    """Only into their own rows, whatever lies beside them."""
    rows, matrix = inputs(4, 1, 2, 1, 6, d)
    clean, out = np.empty_like(rows), np.empty_like(rows)
    _C.rotate(clean, rows, matrix, transpose)
    rows[0, 0, 2, d - 1], rows[0, 1, 3, 0] = np.nan, np.inf
    _C.rotate(out, rows, matrix, transpose)
    assert np.isnan(out[0, 0, 2]).all() and not np.isfinite(out[0, 1, 3]).any()
    clean[0, 0, 2] = out[0, 0, 2]
    clean[0, 1, 3] = out[0, 1, 3]
    assert np.array_equal(out, clean, equal_nan=True)
    matrix[1] = np.nan
    _C.rotate(out, rows, matrix, transpose)
    assert np.array_equal(out[:, 0], clean[:, 0], equal_nan=True) and np.isnan(out[:, 1]).all()


def test_16_bit_output_saturates() -> None:
    rows, matrix = np.full((1, 1, 1, 64), 60000, np.float16), np.ones((1, 64, 64), np.float32)
    out = np.empty_like(rows)
    _C.rotate(out, rows, matrix, False)
    assert (out == 65504).all()


REFUSED = {
    "heads": "rows: expected a multiple of matrix's 3 heads, got 4",
    "no heads": "rows: expected a multiple of matrix's 0 heads, got 4",
    "matrix": r"matrix: expected shape \(\*, 64, 64\), got \(2, 64, 32\)",
    "matrix dimensions": r"matrix: expected shape \(\*, 64, 64\), got \(64, 64\)",
    "matrix type": "matrix: expected float32, got float64",
    "matrix strides": r"matrix: expected a contiguous array, got strides over shape \(2, 64, 64\)",
    "out": r"out: expected shape \(1, 4, 5, 64\), got \(1, 4, 4, 64\)",
    "out type": "out: expected float32, float16 or bfloat16, got int32",
    "out strides": r"out: expected contiguous channels \(last stride 1\), got last stride 2",
    "rows dimensions": r"rows: expected shape \(\*, \*, \*, \*\), got \(4, 5, 64\)",
    "rows type": "rows: expected float32, float16 or bfloat16, got float64",
    "rows strides": r"rows: expected contiguous channels \(last stride 1\), got last stride 2",
    "no channels": r"rows: expected 1\.\.256 channels, got 0",
    "many channels": r"rows: expected 1\.\.256 channels, got 257",
    "transpose": r"transpose: expected an integer in 0\.\.1, got 2",
    "overlap": "out: expected memory of its own, got an overlap with rows",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    rows, matrix = inputs(5, 1, 2, 2, 5, 64)
    memory = np.zeros((1, 4, 5, 128), np.float32)
    arguments: dict[str, list[Any]] = {
        "heads": [memory[..., :64], rows, np.zeros((3, 64, 64), np.float32), 0],
        "no heads": [memory[..., :64], rows, matrix[:0], 0],
        "matrix": [memory[..., :64], rows, np.zeros((2, 64, 32), np.float32), 0],
        "matrix dimensions": [memory[..., :64], rows, matrix[0], 0],
        "matrix type": [memory[..., :64], rows, matrix.astype(np.float64), 0],
        "matrix strides": [memory[..., :64], rows, matrix.swapaxes(1, 2), 0],
        "out": [memory[:, :, :4, :64], rows, matrix, 0],
        "out type": [memory[..., :64].astype(np.int32), rows, matrix, 0],
        "out strides": [memory[..., ::2], rows, matrix, 0],
        "rows dimensions": [memory[..., :64], rows[0], matrix, 0],
        "rows type": [memory[..., :64], rows.astype(np.float64), matrix, 0],
        "rows strides": [memory[..., :64], np.repeat(rows, 2, axis=3)[..., ::2], matrix, 0],
        "no channels": [memory[..., :0], rows[..., :0], matrix[:, :0, :0], 0],
        "many channels": [np.zeros((1, 4, 5, 257), np.float32)] * 2 + [matrix, 0],
        "transpose": [memory[..., :64], rows, matrix, 2],
        "overlap": [memory[..., :64], memory[..., 64:], matrix, 0],
    }
    given = arguments[what]
    if what == "many channels":
        given[0] = given[0].copy()
    with pytest.raises((ValueError, TypeError), match=rf"^rotate: {REFUSED[what]}$"):
        _C.rotate(*given)
    assert not memory.any()
