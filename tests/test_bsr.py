"""bsr: block-sparse rows times dense on the CPU, in fp64 and against SciPy (csrc/kvcomp/bsr.h)."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvcomp import _C
from reference_bsr import BLOCKS, Array, Structure, bound, dense_of, places, plan_of, random_structure, rounding

DTYPES = ("float32", "float16", "bfloat16")


def to(x: Array, dtype: str) -> Any:
    """`x` rounded to a type, as NumPy or torch has it."""
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch", reason="needs torch for bfloat16")
        return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()
    return np.ascontiguousarray(x, dtype)


def wide(x: Any) -> Array:
    return np.asarray(x.double() if hasattr(x, "double") else x, np.float64)


def multiply(
    s: Structure,
    values: Any,
    dense: Any,
    transpose: int = 0,
    out: Any = None,
    beta: float = 0.0,
    dtype: str = "float32",
) -> Any:
    if out is None:
        out = to(np.full((s.k if transpose else s.m, dense.shape[1]), np.nan), dtype)
    _C.bsr_matmul(out, values, plan_of(s, transpose), dense, None, s.m, s.k, transpose, beta)
    return out


def check(s: Structure, n: int, dtype: str = "float32", out_dtype: str = "float32", beta: float = 0.0) -> None:
    rng = np.random.default_rng(s.m + 7 * n)
    values = to(rng.standard_normal((s.nnzb, s.block, s.block)), dtype)
    full = dense_of(s, wide(values))
    for transpose in (0, 1):
        a = full.T if transpose else full
        dense = to(rng.standard_normal((a.shape[1], n)), dtype)
        before = to(rng.standard_normal((a.shape[0], n)), out_dtype)
        out = to(np.full((a.shape[0], n), np.nan), out_dtype) if beta == 0.0 else to(wide(before), out_dtype)
        got = wide(multiply(s, values, dense, transpose, out, beta))
        want = a @ wide(dense) + (beta * wide(before) if beta else 0.0)
        limit = bound(a, wide(dense), out_dtype) + rounding(want, out_dtype)
        limit += 2.0**-22 * (abs(want) + abs(beta) * abs(wide(before)))
        assert (abs(got - want) <= limit).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_dtypes_and_blocks(block: int, dtype: str, out_dtype: str) -> None:
    check(random_structure(300, 410, block, 0.4, seed=block), 70, dtype, out_dtype)
    check(random_structure(300, 410, block, 0.4, seed=block), 33, dtype, out_dtype, beta=-0.5)


@pytest.mark.parametrize("seed", range(40))
def test_random(seed: int) -> None:
    draw = random.Random(seed)
    block = draw.choice(BLOCKS)
    m, k = (draw.choice([1, block - 1, block, block + 1, draw.randint(1, 500)]) for _ in range(2))
    s = random_structure(m, k, block, draw.choice([0.0, 0.1, 0.5, 1.0]), seed, draw.choice(["int32", "int64"]))
    n = draw.choice([1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600])
    check(s, n, draw.choice(DTYPES), draw.choice(DTYPES), draw.choice([0.0, 1.0, 0.25]))


def test_scipy() -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="compares with SciPy")
    for block in BLOCKS:
        s = random_structure(4 * block, 6 * block, block, 0.4, seed=1)
        rng = np.random.default_rng(0)
        values = rng.standard_normal((s.nnzb, block, block)).astype(np.float32)
        dense = rng.standard_normal((s.k, 40)).astype(np.float32)
        matrix = sparse.bsr_matrix((values, s.indices, s.indptr), shape=(s.m, s.k))
        np.testing.assert_allclose(multiply(s, values, dense), matrix @ dense, rtol=1e-4, atol=1e-4)


def test_nothing_at_all() -> None:
    for m, k, n in ((0, 40, 5), (40, 0, 5), (40, 40, 0), (0, 0, 0)):
        s = random_structure(m, k, 16, 0.5, seed=0)
        check(s, n)
        out = np.empty((s.nnzb, 16, 16), np.float32)
        _C.bsr_sddmm(out, plan_of(s, 0), np.ones((m, n), np.float32), np.ones((k, n), np.float32), 0)
        assert not out[:, : m % 16 or 16].any() or n > 0
    s = random_structure(200, 100, 64, 0.0, seed=0)
    out = np.full((200, 7), 3.0, np.float32)
    assert (multiply(s, np.empty((0, 64, 64), np.float32), np.ones((100, 7), np.float32), 0, out, 0.5) == 1.5).all()
    assert not multiply(s, np.empty((0, 64, 64), np.float32), np.ones((100, 7), np.float32), 0, out).any()


def test_what_lies_beyond_the_edges_takes_no_part() -> None:
    for block in BLOCKS:
        m, k = 2 * block - 3, 3 * block - 5
        s = random_structure(m, k, block, 1.0, seed=0)
        values = np.random.default_rng(0).standard_normal((s.nnzb, block, block)).astype(np.float32)
        spoiled = values.copy()
        spoiled[3:, -3:] = np.nan
        spoiled[[2, 5], :, -5:] = np.nan
        for transpose in (0, 1):
            dense = np.random.default_rng(1).standard_normal((m if transpose else k, 20)).astype(np.float32)
            want = multiply(s, values, dense, transpose)
            np.testing.assert_array_equal(multiply(s, spoiled, dense, transpose), want)


def test_infinite_and_too_large() -> None:
    s = random_structure(16, 16, 16, 1.0, seed=0)
    values = np.zeros((1, 16, 16), np.float16)
    values[0, 0, 0], values[0, 1, 1], values[0, 2, 2], values[0, 3, 3] = 60000, np.inf, np.nan, -60000
    dense = np.eye(16, dtype=np.float16) * 2
    for dtype in DTYPES:
        got = wide(multiply(s, values, dense, dtype=dtype))
        assert got[1, 1] == np.inf and np.isnan(got[2]).all()
        if dtype == "float16":
            assert got[0, 0] == np.inf and got[3, 3] == -np.inf
        else:
            assert abs(got[0, 0] - 120000) <= 512


def test_rows_apart_and_threads() -> None:
    s = random_structure(500, 300, 32, 0.3, seed=3)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((s.nnzb, 32, 32)).astype(np.float16)
    dense = rng.standard_normal((300, 777)).astype(np.float16)
    want = multiply(s, values, dense)
    apart = np.full((300, 1000), np.nan, np.float16)
    apart[:, 100:877] = dense
    out = np.full((500, 900), 7.0, np.float32)
    multiply(s, values, apart[:, 100:877], 0, out[:, 50:827])
    np.testing.assert_array_equal(out[:, 50:827], want)
    assert (out[:, :50] == 7.0).all() and (out[:, 827:] == 7.0).all()
    threads = _C.threads()
    try:
        _C.set_threads(1)
        np.testing.assert_array_equal(multiply(s, values, dense), want)
    finally:
        _C.set_threads(threads)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sddmm(block: int, dtype: str) -> None:
    for m, k, n in ((3 * block - 5, 2 * block + 1, 100), (block, 2 * block, 1), (2 * block, block, 1030)):
        s = random_structure(m, k, block, 0.6, seed=n)
        rng = np.random.default_rng(n)
        left, right = (to(rng.standard_normal((rows, n)), dtype) for rows in (m, k))
        whole = np.zeros((s.rows * block, s.columns * block))
        whole[:m, :k] = wide(left) @ wide(right).T
        sizes = np.zeros_like(whole)
        sizes[:m, :k] = abs(wide(left)) @ abs(wide(right)).T
        for transpose in (0, 1):
            for out_dtype in DTYPES:
                out = to(np.full((s.nnzb, block, block), np.nan), out_dtype)
                _C.bsr_sddmm(out, plan_of(s, transpose), left, right, transpose)
                for i, (r, c) in enumerate(places(s)):
                    at = (slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block))
                    limit = 2e-6 * sizes[at] + rounding(whole[at], out_dtype)
                    assert (abs(wide(out)[i] - whole[at]) <= limit).all()


@pytest.mark.parametrize("seed", range(12))
def test_merge(seed: int) -> None:
    draw = random.Random(seed)
    block = draw.choice([16, 32, 64])
    factor = draw.choice([f for f in (2, 4, 8) if f * block <= 128])
    s = random_structure(draw.randint(1, 400), draw.randint(1, 400), block, draw.choice([0.05, 0.5]), seed)
    big = factor * block
    indptr = np.full(-(-s.m // big) + 1, -7, np.int64)
    indices, place = np.full(s.nnzb, -7, np.int64), np.full(s.nnzb, -7, np.int64)
    count = _C.bsr_merge(indptr, indices, place, s.indptr, s.indices, s.m, s.k, block, factor)
    values = np.random.default_rng(seed).standard_normal((s.nnzb, block, block))
    merged = np.zeros((count, factor, block, factor, block))
    which, row, column = place // factor**2, place % factor**2 // factor, place % factor
    merged[which, row, :, column, :] = values
    larger = Structure(s.m, s.k, big, indptr, indices[:count].copy())
    _C.bsr_check(larger.indptr, larger.indices, s.m, s.k, big)
    np.testing.assert_array_equal(dense_of(larger, merged.reshape(count, big, big)), dense_of(s, values))
    assert count == len(np.unique(which)) and (indices[count:] == -7).all()


def test_plan_is_what_it_says() -> None:
    for block in BLOCKS:
        s = random_structure(1000, 700, block, 0.2, seed=block)
        for transpose in (0, 1):
            plan = plan_of(s, transpose)
            subs, rows = 128 // block, s.k if transpose else s.m
            tiles = -(-rows // 128)
            assert plan[:7].tolist() == [0x31525342, block, transpose, tiles, s.m, s.k, s.nnzb]
            table = plan[16 : 16 + 4 * tiles].reshape(tiles, 4)
            assert sorted(table[:, 0]) == list(range(tiles)) and (np.diff(table[:, 2]) <= 0).all()
            at = 16 + 4 * tiles
            pairs = plan[at : at + 2 * s.nnzb].reshape(-1, 2)
            assert pairs.tolist() == [list(x) for x in places(s)]
            steps = plan[at + 2 * s.nnzb :].reshape(-1, 1 + subs)
            assert len(steps) == plan[7] == table[:, 2].sum()
            seen = []
            for row, first, count, _ in table:
                mine = steps[first : first + count]
                assert (np.diff(mine[:, 0]) > 0).all() and (mine[:, 1:] >= 0).any(1).all()
                for step in mine:
                    for i, which in enumerate(step[1:]):
                        if which >= 0:
                            here = [row * subs + i, step[0]]
                            assert pairs[which].tolist() == (here[::-1] if transpose else here)
                            seen.append(which)
            assert sorted(seen) == list(range(s.nnzb))
            assert plan[8] == (table[:, 2] * tiles > 2 * plan[7]).sum() and not plan[9:16].any()


def test_tiles_longer_than_twice_the_mean_are_counted() -> None:
    mask = np.zeros((10, 20), bool)
    mask[:, 0] = True
    mask[[3, 7]] = True  # 20 steps, the others 1: the mean is 4.8
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
    s = Structure(1280, 2560, 128, indptr, np.nonzero(mask)[1].astype(np.int32))
    plan = plan_of(s, 0)
    assert plan[8] == 2 and plan[16 : 16 + 8].reshape(2, 4)[:, 0].tolist() == [3, 7]
    assert plan_of(s, 1)[8] == 1  # 10 steps, the others 2
    assert plan_of(random_structure(1280, 2560, 128, 0.0, seed=0), 0)[8] == 0
    assert plan_of(random_structure(1280, 2560, 128, 1.0, seed=0), 0)[8] == 0


PLACES = """
#include "kvcomp/bsr.h"
void places(uint32_t *out, uint32_t tiles, uint32_t long_tiles, uint32_t groups, uint32_t panel) {
    for (uint32_t work = 0; work < tiles * groups; work++) {
        const kvc_bsr_place place = kvc_bsr_place_of(work, tiles, long_tiles, groups, panel);
        out[2 * work] = place.tile;
        out[2 * work + 1] = place.group;
    }
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_order_of_the_work_on_cuda(tmp_path: Path) -> None:
    """Every tile of every group once: long tiles, then the others; panels, then tiles, then groups of the panel."""
    source, library = tmp_path / "places.c", tmp_path / "places.so"
    source.write_text(PLACES)
    headers = Path(__file__).parent.parent / "csrc"
    subprocess.run(["cc", "-std=c11", "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(library)], check=True)
    places = ctypes.CDLL(str(library)).places
    for tiles, groups, panel in itertools.product((1, 2, 5, 33), (1, 2, 3, 8), (1, 2, 3, 8)):
        for long_tiles in {0, 1, tiles // 2, tiles}:
            found = np.full((tiles * groups, 2), 99, np.uint32)
            places(ctypes.c_void_p(found.ctypes.data), tiles, long_tiles, groups, panel)
            want = [
                (tile, group)
                for first, end in ((0, long_tiles), (long_tiles, tiles))
                for begin in range(0, groups, panel)
                for tile in range(first, end)
                for group in range(begin, min(begin + panel, groups))
            ]
            assert found.tolist() == [list(place) for place in want]


REFUSED_STRUCTURES: list[tuple[list[int], list[int], str]] = [
    ([1, 2, 3], [0, 1, 2], "indptr: expected to begin with 0, got 1"),
    ([0, 2, 2], [0, 1, 2], "indptr: expected to end with the 3 blocks of indices, got 2"),
    ([0, 4, 3], [0, 1, 2], "indptr: expected numbers that do not fall, up to 3, got 4 after 0 at block row 0"),
    ([0, -1, 3], [0, 1, 2], "indptr: expected numbers that do not fall, up to 3, got -1 after 0 at block row 0"),
    ([0, 1, 3], [0, 1, 3], r"indices: expected block columns in 0..2, got 3 in block row 1"),
    ([0, 1, 3], [-1, 1, 2], r"indices: expected block columns in 0..2, got -1 in block row 0"),
    ([0, 1, 3], [0, 2, 1], "indices: expected ascending block columns, each once, got 1 after 2 in block row 1"),
    ([0, 1, 3], [0, 2, 2], "indices: expected ascending block columns, each once, got 2 after 2 in block row 1"),
    ([0, 3], [0, 1, 2], r"indptr: expected shape \(3,\), got \(2,\)"),
]


@pytest.mark.parametrize(("indptr", "indices", "sentence"), REFUSED_STRUCTURES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_structures_refused(indptr: list[int], indices: list[int], sentence: str, dtype: Any) -> None:
    structure = np.array(indptr, dtype), np.array(indices, dtype), 30, 40, 16
    with pytest.raises(ValueError, match=f"bsr_check: {sentence}"):
        _C.bsr_check(*structure)
    plan = np.full(500, 5, np.int32)
    with pytest.raises(ValueError, match=f"bsr_plan: {sentence}"):
        _C.bsr_plan(plan, *structure, 0)
    assert (plan == 5).all()


def good() -> dict[str, Any]:
    s = random_structure(100, 130, 32, 0.5, seed=0)
    return {
        "out": np.zeros((100, 9), np.float32),
        "values": np.zeros((s.nnzb, 32, 32), np.float32),
        "plan": plan_of(s, 0),
        "dense": np.zeros((130, 9), np.float32),
        "workspace": None,
        "m": 100,
        "k": 130,
        "transpose": 0,
        "beta": 0.0,
    }


def other_plan() -> Array:
    return plan_of(random_structure(100, 130, 32, 0.5, seed=0), 1)


def broken_plan() -> Array:
    plan = good()["plan"]
    plan[-1] = 10**6
    return plan


REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("out", lambda: np.zeros((100, 8), np.float32), ValueError, r"out: expected shape \(100, 9\), got \(100, 8\)"),
    ("out", lambda: np.zeros((100, 9), np.int32), TypeError, "out: expected float32, float16 or bfloat16, got int32"),
    ("out", lambda: np.zeros((9, 100), np.float32).T, ValueError, "out: expected contiguous channels"),
    ("values", lambda: np.zeros((3, 24, 24), np.float32), ValueError, "values: expected square blocks of 16, 32, 64"),
    ("values", lambda: np.zeros((1, 32, 32), np.float32), ValueError, "plan: expected one of a"),
    ("dense", lambda: np.zeros((130, 9), np.float16), TypeError, "dense: expected float32, got float16"),
    ("dense", lambda: np.zeros((129, 9), np.float32), ValueError, r"dense: expected shape \(130, \*\)"),
    ("plan", lambda: np.zeros(3, np.int32), ValueError, "plan: expected at least"),
    ("plan", lambda: np.zeros(3000, np.int32), ValueError, "plan: expected one that bsr_plan made"),
    ("plan", other_plan, ValueError, "plan: expected one of a .* transpose 0, got one of .* transpose 1"),
    ("plan", broken_plan, ValueError, "plan: expected one that bsr_plan made, got step"),
    ("m", lambda: 99, ValueError, "out: expected shape"),
    ("transpose", lambda: 2, ValueError, "transpose: expected an integer in 0..1, got 2"),
    ("beta", lambda: float("nan"), ValueError, "beta: expected a number"),
]


@pytest.mark.parametrize(("name", "value", "error", "sentence"), REFUSED)
def test_refused(name: str, value: Any, error: type[Exception], sentence: str) -> None:
    arguments = good()
    arguments["out"] += 3.0
    before = arguments["out"].copy()
    changed = arguments | {name: value()}
    with pytest.raises(error, match=f"bsr_matmul: {sentence}"):
        _C.bsr_matmul(*changed.values())
    assert (arguments["out"] == before).all()


def test_merge_refuses() -> None:
    s = random_structure(64, 64, 32, 1.0, seed=0)
    indptr, indices, place = np.zeros(2, np.int64), np.zeros(4, np.int64), np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="bsr_merge: factor: expected 2, 4 or 8"):
        _C.bsr_merge(indptr, indices, place, s.indptr, s.indices, 64, 64, 32, 8)
    with pytest.raises(ValueError, match="bsr_merge: indices_out: expected shape"):
        _C.bsr_merge(indptr, indices[:3], place, s.indptr, s.indices, 64, 64, 32, 2)
