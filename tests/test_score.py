"""score, norms and accumulate against fp64, their edges, and every refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp import _C
from reference_policy import Array, accumulate, norms, score, score_bound, workspace

ml_dtypes = pytest.importorskip("ml_dtypes")
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
FLUSHED = 1e-36  # probabilities below e^-87 of a row's largest are 0


def run(
    queries: Array,
    keys: Array,
    first: Array | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    reduce: int = 0,
    pool_kind: int = 0,
    pool: int = 1,
) -> Array:
    b, hq, w, d = queries.shape
    importance = np.full((b, *keys.shape[1:3]), np.nan, np.float32)
    scratch = workspace(_C.score_workspace(b, hq, w, keys.shape[2], d))
    _C.score(importance, queries, keys, first, scratch, scale, softcap, reduce, pool_kind, pool)
    return importance


def check(queries: Array, keys: Array, first: Array | None = None, scale: float = 1.0, **how: Any) -> None:
    got = run(queries, keys, first, scale, **how)
    want = score(queries, keys, first, scale, **how)
    np.testing.assert_allclose(got, want, rtol=score_bound(queries, keys, scale), atol=FLUSHED)


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 64, 80, 96, 128, 256])
def test_dtypes_and_head_dims(dtype: Any, d: int) -> None:
    check(normal(d, 2, 4, 8, d, dtype=dtype), normal(d + 1, 2, 2, 150, d, dtype=dtype), scale=d**-0.5, pool=5)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random(data: st.DataObject) -> None:
    b, h, group = (data.draw(st.integers(1, high)) for high in (3, 3, 5))
    s = data.draw(st.one_of(st.integers(1, 70), st.integers(500, 1100)))
    w = data.draw(st.integers(1, min(s, 40)))
    d = data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 2**32))
    first = data.draw(st.none() | st.lists(st.integers(0, s), min_size=b, max_size=b))
    check(
        normal(seed, b, h * group, w, d, dtype=data.draw(st.sampled_from(DTYPES))),
        normal(seed + 1, b, h, s, d, dtype=data.draw(st.sampled_from(DTYPES))),
        None if first is None else np.array(first, np.int32),
        data.draw(st.sampled_from([0.0, 0.1, 1.0, -0.5])),
        softcap=data.draw(st.sampled_from([0.0, 2.0, 50.0])),
        reduce=data.draw(st.integers(0, 2)),
        pool_kind=data.draw(st.integers(0, 1)),
        pool=data.draw(st.sampled_from([1, 3, 7, 101, 2**31 - 1])),
    )


def test_equal_keys_share_evenly() -> None:
    """Row r of the window sees s - w + r + 1 tokens, each with the same probability: the sums are known."""
    s, w = 1500, 32
    got = run(normal(0, 1, 2, w, 16), np.ones((1, 1, s, 16), np.float32))
    seen = np.arange(s - w + 1, s + 1)
    want = np.array([(1.0 / seen[seen > t]).sum() for t in range(s)])
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-5)


def test_mass_is_conserved() -> None:
    got = run(normal(1, 2, 6, 24, 64), normal(2, 2, 3, 2000, 64), scale=0.125)
    np.testing.assert_allclose(got.sum(-1), 24.0, rtol=1e-5)
    got = run(normal(1, 2, 6, 24, 64), normal(2, 2, 3, 2000, 64), scale=0.125, reduce=1)
    np.testing.assert_allclose(got.sum(-1), 1.0, rtol=1e-5)


def test_one_huge_score() -> None:
    """A key that takes everything: all else is below float32's range, and exactly 0 is right for it."""
    queries, keys = np.ones((1, 1, 4, 8), np.float32), np.zeros((1, 1, 700, 8), np.float32)
    keys[0, 0, 123] = 1e6
    got = run(queries, keys)
    assert got[0, 0, 123] == 4.0
    assert np.count_nonzero(got) == 1


def test_large_equal_logits_do_not_overflow() -> None:
    queries, keys = np.full((1, 1, 2, 4), 1e9, np.float32), np.full((1, 1, 64, 4), 1e9, np.float32)
    np.testing.assert_allclose(run(queries, keys).sum(), 2.0, rtol=1e-6)
    np.testing.assert_allclose(run(-queries, keys).sum(), 2.0, rtol=1e-6)


def test_window_is_the_whole_sequence() -> None:
    check(normal(3, 1, 2, 9, 16), normal(4, 1, 1, 9, 16), pool=3)
    check(normal(3, 1, 2, 1, 16), normal(4, 1, 1, 1, 16), pool=3)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_long_windows(data: st.DataObject) -> None:
    """The window is the whole prompt, or most of it: several bands of rows, several chunks of tokens."""
    h, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    s = data.draw(st.integers(1, 700))
    w = data.draw(st.one_of(st.just(s), st.integers(max(1, s - 70), s)))
    d, seed = data.draw(st.integers(1, 24)), data.draw(st.integers(0, 2**32))
    first = data.draw(st.none() | st.integers(0, s) | st.integers(0, min(s, 3)))
    check(
        normal(seed, 1, h * group, w, d, dtype=data.draw(st.sampled_from(DTYPES))),
        normal(seed + 1, 1, h, s, d, dtype=data.draw(st.sampled_from(DTYPES))),
        None if first is None else np.array([first], np.int32),
        0.3,
        softcap=data.draw(st.sampled_from([0.0, 2.0])),
        reduce=data.draw(st.integers(0, 2)),
        pool_kind=data.draw(st.integers(0, 1)),
        pool=data.draw(st.sampled_from([1, 7])),
    )


def test_the_mean_over_rows_that_see_a_token() -> None:
    """With equal keys row r gives 1 / (r + 1) to each token it sees: token t gets (H_s - H_t) / (s - t)."""
    s = 900
    got = run(normal(0, 1, 2, s, 16), np.ones((1, 1, s, 16), np.float32), reduce=2)[0, 0]
    given = 1.0 / np.arange(1, s + 1)
    want = [given[t:].mean() for t in range(s)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got[-1] == np.float32(1 / s)  # the last token is seen by one row, and not at a disadvantage
    whole = run(normal(1, 1, 2, s, 16), normal(2, 1, 1, s, 16), reduce=0)[0, 0]
    mean = run(normal(1, 1, 2, s, 16), normal(2, 1, 1, s, 16), reduce=2)[0, 0]
    np.testing.assert_allclose(mean, whole / np.arange(s, 0, -1), rtol=1e-6)
    np.testing.assert_allclose(whole.sum(), s, rtol=1e-5)


def test_pooling_of_a_window_that_covers_all_tokens() -> None:
    """Pooled over all real tokens, with w = s as well as where padding leaves fewer real tokens than w."""
    queries, keys = normal(11, 1, 2, 20, 8), normal(12, 1, 1, 20, 8)
    for w, first in ((20, 0), (20, 5), (15, 5), (12, 9)):
        begin = np.array([first], np.int32)
        raw = run(queries[:, :, -w:], keys, begin, reduce=2)[0, 0, first:]
        got = run(queries[:, :, -w:], keys, begin, reduce=2, pool=5)[0, 0, first:]
        want = [raw[max(t - 2, 0) : t + 3].mean() for t in range(len(raw))]
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_workspace_grows_with_window_plus_tokens() -> None:
    def need(w: int, s: int) -> int:
        return _C.score_workspace(1, 4, w, s, 128)

    long = 1 << 20
    assert need(long, long) < 3 * (need(long, 1) + need(1, long))
    assert need(2 * long, 2 * long) <= 2 * need(long, long)
    assert need(4096, 4096) < 4 << 20


def test_padding_is_never_read() -> None:
    first = np.array([5, 0, 30, 31], np.int32)
    queries, keys = normal(5, 4, 4, 6, 16), normal(6, 4, 2, 31, 16)
    for reduce in (0, 1, 2):
        want = run(queries, keys, first, reduce=reduce, pool=5)
        spoiled_queries, spoiled_keys = queries.copy(), keys.copy()
        for i, begin in enumerate(first):
            spoiled_keys[i, :, :begin] = np.nan
            spoiled_queries[i, :, : max(0, 6 - (31 - begin))] = np.inf
        np.testing.assert_array_equal(run(spoiled_queries, spoiled_keys, first, reduce=reduce, pool=5), want)
        np.testing.assert_allclose(want, score(queries, keys, first, 1.0, reduce=reduce, pool=5), rtol=1e-4)
        assert not want[3].any()
        assert want[2, :, 30].all() and not want[2, :, :30].any()


@pytest.mark.parametrize("kind", [0, 1])
def test_pooling_leaves_the_window_and_the_padding_alone(kind: int) -> None:
    queries, keys = np.ones((1, 1, 2, 4), np.float32), np.zeros((1, 1, 20, 4), np.float32)
    keys[0, 0, 18] = keys[0, 0, 4] = 8.0
    got = run(queries, keys, np.array([4], np.int32), pool_kind=kind, pool=5)[0, 0]
    assert not got[:4].any()
    assert (got[4:7] > 0.15).all()  # reached by token 4
    assert (got[7:18] < 1e-10).all()  # token 18 is of the window
    assert (got[18:] > 0.4).all()


def test_strides() -> None:
    queries, keys = normal(7, 2, 40, 6, 24), normal(8, 2, 90, 3, 24)
    got = run(queries.transpose(0, 2, 1, 3)[:, :, -8:], keys.transpose(0, 2, 1, 3)[:, :, ::-1])
    want = run(
        np.ascontiguousarray(queries.transpose(0, 2, 1, 3)[:, :, -8:]),
        np.ascontiguousarray(keys.transpose(0, 2, 1, 3)[:, :, ::-1]),
    )
    np.testing.assert_array_equal(got, want)


def test_threads_do_not_change_a_bit() -> None:
    queries, keys = normal(9, 1, 4, 32, 64), normal(10, 1, 2, 3000, 64)
    before = _C.threads()
    try:
        results = []
        for threads in (1, 2, 5):
            _C.set_threads(threads)
            long = run(normal(11, 1, 4, 900, 64), normal(12, 1, 2, 900, 64), scale=0.125, reduce=2)
            results.append(np.concatenate([run(queries, keys, scale=0.125, pool=5), long], axis=-1))
    finally:
        _C.set_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("simd", ["base", "avx2", "avx512"])
def test_instruction_sets(simd: str) -> None:
    """The same bound whatever the loops were compiled for (a name the machine lacks falls back)."""
    code = (
        "import test_score as t; t.check(t.normal(1, 1, 4, 8, 80), t.normal(2, 1, 2, 600, 80), scale=0.1, pool=3);"
        "t.check(t.normal(3, 1, 4, 300, 80), t.normal(4, 1, 2, 300, 80), scale=0.1, reduce=2)"
    )
    env = os.environ | {"KVCOMP_SIMD": simd, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=os.path.dirname(__file__))


# ---- score's refusals


def good() -> dict[str, Any]:
    return {
        "importance": np.full((2, 2, 10), 7, np.float32),
        "queries": normal(0, 2, 4, 3, 8),
        "keys": normal(1, 2, 2, 10, 8),
        "first": np.array([0, 1], np.int32),
        "workspace": workspace(_C.score_workspace(2, 4, 3, 10, 8)),
        "scale": 1.0,
        "softcap": 0.0,
        "reduce": 0,
        "pool_kind": 0,
        "pool": 5,
    }


def spoiled(array: Array, value: float, *at: int) -> Array:
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"importance": np.zeros((2, 2, 9), np.float32)},
            ValueError,
            "importance: expected shape (2, 2, 10), got (2, 2, 9)",
        ),
        ({"importance": np.zeros((2, 2, 10))}, TypeError, "importance: expected float32, got float64"),
        (
            {"importance": np.zeros((2, 2, 20), np.float32)[..., ::2]},
            ValueError,
            "importance: expected a contiguous array",
        ),
        ({"queries": normal(0, 4, 3, 8)}, ValueError, "queries: expected shape (*, *, *, *), got (4, 3, 8)"),
        (
            {"queries": normal(0, 2, 4, 3, 8, dtype=np.float64)},
            TypeError,
            "queries: expected float32, float16 or bfloat16",
        ),
        ({"queries": normal(0, 2, 4, 3, 16)[..., ::2]}, ValueError, "queries: expected contiguous channels"),
        (
            {"queries": normal(0, 2, 3, 3, 8)},
            ValueError,
            "queries: expected a multiple of the 2 KV heads of keys, got 3 heads",
        ),
        (
            {"queries": normal(0, 2, 4, 11, 8)},
            ValueError,
            "queries: expected a window of 1..10 tokens (those of keys), got 11",
        ),
        (
            {"queries": normal(0, 2, 4, 0, 8)},
            ValueError,
            "queries: expected a window of 1..10 tokens (those of keys), got 0",
        ),
        ({"keys": normal(0, 2, 2, 10, 9)}, ValueError, "keys: expected shape (2, *, *, 8), got (2, 2, 10, 9)"),
        (
            {"keys": normal(0, 2, 2, 10, 8).astype(np.int32)},
            TypeError,
            "keys: expected float32, float16 or bfloat16, got int32",
        ),
        ({"keys": normal(0, 2, 2, 10, 16)[..., ::2]}, ValueError, "keys: expected contiguous channels"),
        (
            {"queries": normal(0, 2, 4, 3, 257), "keys": normal(0, 2, 2, 10, 257)},
            ValueError,
            "keys: expected 1..256 channels, got 257",
        ),
        ({"first": np.array([0, 11], np.int32)}, ValueError, "first: expected 0..10, got 11"),
        ({"first": np.array([-1, 0], np.int32)}, ValueError, "first: expected 0..10, got -1"),
        ({"first": np.array([0], np.int32)}, ValueError, "first: expected shape (2,), got (1,)"),
        ({"first": np.array([0, 0])}, TypeError, "first: expected int32, got int64"),
        ({"workspace": workspace(64)}, ValueError, "workspace: expected"),
        ({"workspace": workspace(1 << 20)[1:]}, ValueError, "workspace: expected 64-byte alignment"),
        ({"scale": float("nan")}, ValueError, "scale: expected a number in"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a number in 0"),
        ({"reduce": 3}, ValueError, "reduce: expected an integer in 0..2, got 3"),
        ({"reduce": -1}, ValueError, "reduce: expected an integer in 0..2, got -1"),
        ({"pool_kind": -1}, ValueError, "pool_kind: expected an integer in 0..1, got -1"),
        ({"pool": 4}, ValueError, "pool: expected an odd width >= 1, got 4"),
        ({"pool": 0}, ValueError, "pool: expected an integer in 1.."),
        (
            {"queries": spoiled(normal(0, 2, 4, 3, 8), np.nan, 1, 3, 2, 7)},
            ValueError,
            "queries: expected finite values, got NaN or infinity in sequence 1",
        ),
        (
            {"keys": spoiled(normal(0, 2, 2, 10, 8), -np.inf, 0, 1, 0, 0)},
            ValueError,
            "keys: expected finite values, got NaN or infinity in sequence 0",
        ),
        (
            {"keys": spoiled(normal(0, 2, 2, 10, 8), np.nan, 1, 0, 9, 3)},
            ValueError,
            "keys: expected finite values, got NaN or infinity in sequence 1",
        ),
        (
            {"queries": np.full((2, 4, 3, 8), 1e30, np.float32), "keys": np.full((2, 2, 10, 8), 1e30, np.float32)},
            ValueError,
            "queries: expected logits within float32, got an overflow in sequence 0",
        ),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = good() | change
    before = arguments["importance"].copy()
    with pytest.raises(error) as raised:
        _C.score(*arguments.values())
    assert str(raised.value).startswith(f"score: {sentence}")
    np.testing.assert_array_equal(arguments["importance"], before)


def test_overlap_is_refused() -> None:
    arguments = good()
    arguments["importance"] = arguments["keys"].reshape(-1)[:40].reshape(2, 2, 10)
    with pytest.raises(ValueError, match="score: importance: expected memory of its own, got an overlap with keys"):
        _C.score(*arguments.values())


def test_count_and_sizes() -> None:
    with pytest.raises(TypeError, match="score: expected 10 positional arguments, got 1"):
        _C.score(np.zeros(1))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="score_workspace: w: expected an integer in"):
        _C.score_workspace(1, 1, -1, 1, 1)
    assert _C.score_workspace(2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1, 256) == 2**63 - 1
    assert _C.score_workspace(0, 1, 1, 1, 1) == _C.score_workspace(1, 1, 0, 1, 1) == 0


# ---- norms


def measure(rows: Array, first: Array | None = None, centered: int = 0) -> Array:
    out = np.full(rows.shape[:3], np.nan, np.float32)
    _C.norms(out, rows, first, centered)
    return out


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_norms_random(data: st.DataObject) -> None:
    b, h, s = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 3), (0, 60)))
    d, seed = data.draw(st.integers(1, 256)), data.draw(st.integers(0, 2**32))
    rows = normal(seed, b, h, s, d) * 10.0 ** data.draw(st.integers(-3, 3)) + data.draw(st.sampled_from([0, 5]))
    rows = rows.astype(data.draw(st.sampled_from(DTYPES)))
    first = data.draw(st.none() | st.lists(st.integers(0, s), min_size=b, max_size=b))
    begin = None if first is None else np.array(first, np.int32)
    centered = data.draw(st.integers(0, 1))
    want = norms(rows, begin, bool(centered))
    longest = np.abs(rows.astype(np.float64)).max(initial=0)
    np.testing.assert_allclose(measure(rows, begin, centered), want, rtol=2.0**-23, atol=1e-12 * longest)


def test_norms_by_hand() -> None:
    rows = np.array([[[[3, 4], [0, 0], [-6, -8]]]], np.float32)
    assert measure(rows).tolist() == [[[5, 0, 10]]]
    assert measure(rows, np.array([1], np.int32), 1).tolist() == [[[0, 5, 5]]]  # about (-3, -4)
    assert measure(rows, np.array([3], np.int32), 1).tolist() == [[[0, 0, 0]]]
    assert measure(rows[:, :, :1], None, 1).tolist() == [[[0]]]  # one token is its own mean


def test_norms_keep_what_cancels() -> None:
    """Rows far from zero and close to each other: the mean is taken off in double."""
    rows = (4096 + normal(0, 1, 1, 2000, 64)).astype(np.float32)
    np.testing.assert_allclose(measure(rows, None, 1), norms(rows, None, True), rtol=1e-6)


def test_norms_of_the_largest_numbers() -> None:
    most = np.finfo(np.float32).max
    assert measure(np.full((1, 1, 1, 4), most, np.float32)).item() == most
    assert measure(np.full((1, 1, 1, 1), -most, np.float32)).item() == most


def test_norms_never_read_padding_and_take_strides() -> None:
    rows, first = normal(3, 2, 3, 20, 16), np.array([7, 20], np.int32)
    want = measure(rows, first, 1)
    rows[0, :, :7] = np.nan
    rows[1] = np.inf
    np.testing.assert_array_equal(measure(rows, first, 1), want)
    rows = normal(4, 2, 20, 3, 16)
    view = rows.transpose(0, 2, 1, 3)[:, :, ::-1]
    np.testing.assert_array_equal(measure(view, None, 1), measure(np.ascontiguousarray(view), None, 1))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"out": np.zeros((2, 2, 4), np.float32)}, ValueError, "out: expected shape (2, 2, 5), got (2, 2, 4)"),
        ({"out": np.zeros((2, 2, 5))}, TypeError, "out: expected float32, got float64"),
        ({"out": np.zeros((2, 2, 10), np.float32)[..., ::2]}, ValueError, "out: expected a contiguous array"),
        ({"rows": normal(0, 2, 5, 8)}, ValueError, "rows: expected shape (*, *, *, *), got (2, 5, 8)"),
        ({"rows": normal(0, 2, 2, 5, 8, dtype=np.float64)}, TypeError, "rows: expected float32, float16 or bfloat16"),
        ({"rows": normal(0, 2, 2, 5, 257)}, ValueError, "rows: expected 1..256 channels, got 257"),
        ({"rows": normal(0, 2, 2, 5, 0)}, ValueError, "rows: expected 1..256 channels, got 0"),
        ({"rows": normal(0, 2, 2, 5, 16)[..., ::2]}, ValueError, "rows: expected contiguous channels"),
        ({"first": np.array([0, 6], np.int32)}, ValueError, "first: expected 0..5, got 6"),
        ({"first": np.array([-1, 0], np.int32)}, ValueError, "first: expected 0..5, got -1"),
        ({"first": np.array([0], np.int32)}, ValueError, "first: expected shape (2,), got (1,)"),
        ({"first": np.array([0, 0])}, TypeError, "first: expected int32, got int64"),
        ({"centered": 2}, ValueError, "centered: expected an integer in 0..1, got 2"),
        (
            {"rows": spoiled(normal(0, 2, 2, 5, 8), np.nan, 1, 1, 4, 7)},
            ValueError,
            "rows: expected finite values, got NaN or infinity in sequence 1",
        ),
        (
            {"rows": spoiled(normal(0, 2, 2, 5, 8), -np.inf, 0, 1, 0, 0)},
            ValueError,
            "rows: expected finite values, got NaN or infinity in sequence 0",
        ),
    ],
)
def test_norms_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    fine = {"out": np.full((2, 2, 5), 7, np.float32), "rows": normal(0, 2, 2, 5, 8), "first": None, "centered": 0}
    arguments: dict[str, Any] = fine | change
    before = arguments["out"].copy()
    with pytest.raises(error) as raised:
        _C.norms(*arguments.values())
    assert str(raised.value).startswith(f"norms: {sentence}")
    np.testing.assert_array_equal(arguments["out"], before)


# ---- accumulate

PAGE = np.dtype([("unit", "<u4"), ("k_bits", "u1"), ("v_bits", "u1"), ("tokens", "u1"), ("flags", "u1")])


def paged(pages: list[list[int]], capacity: int, bits: int = 4) -> tuple[Array, Array]:
    """Page table (n,c) and lists (n,4) with pages of so many tokens, all of one class."""
    table = np.zeros((len(pages), capacity), PAGE)
    lists = np.zeros((len(pages), 4), np.int32)
    for i, tokens in enumerate(pages):
        table["k_bits"][i, : len(tokens)] = table["v_bits"][i, : len(tokens)] = bits
        table["tokens"][i, : len(tokens)] = tokens
        lists[i] = len(tokens), len(tokens), 0, sum(tokens)
    return table.view(np.uint64), lists


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_accumulate_random(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 16]))
    tokens = st.integers(0, 16 if bits == 16 else 64)
    pages = data.draw(st.lists(st.lists(tokens, max_size=6), min_size=1, max_size=5))
    capacity = max(map(len, pages)) + data.draw(st.integers(0, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    worth = rng.exponential(size=(len(pages), capacity)).astype(np.float32)
    mass = rng.exponential(size=(len(pages), max(map(sum, pages)) + data.draw(st.integers(0, 3)))).astype(np.float32)
    keep, gain = data.draw(st.sampled_from([0.0, 0.5, 1.0])), data.draw(st.sampled_from([0.0, 0.25, 3.0]))
    want = accumulate(worth, mass, pages, keep, gain)
    for i, row in enumerate(pages):  # what is not in use is not looked at
        worth[i, len(row) :] = np.nan
        mass[i, sum(row) :] = np.nan
    table, lists = paged(pages, capacity, bits)
    _C.accumulate(worth, mass, table, lists, keep, gain)
    np.testing.assert_allclose(worth, want, rtol=2.0**-23)
    assert all(not worth[i, len(row) :].any() for i, row in enumerate(pages))


def test_accumulate_takes_attends_mass() -> None:
    """One query after another: what is collected is what each page's tokens got, and one per query and head."""
    layout, d, group = (64, 64, 1, 1, 0), 64, 3
    pages = [[64, 40], [64, 64, 1]]
    table, lists = paged(pages, 3, 16)
    table.view(PAGE)["v_bits"][:] = table.view(PAGE)["v_bits"].clip(max=8)
    arena = _C.Arena()
    size = _C.page_bytes(layout, 16, 8)
    for i, tokens in enumerate(pages):
        table.view(PAGE)["unit"][i, : len(tokens)] = arena.alloc(size, len(tokens))
    mass, worth = np.zeros((2, 140), np.float32), np.zeros((2, 3), np.float32)
    scratch = workspace(_C.attend_workspace(2, 3, group, 1, d))
    for step in range(4):
        queries = normal(step, 2, group, 1, d)
        out = np.zeros_like(queries)
        _C.attend(out, mass, queries, arena, table, lists, None, scratch, layout, 0, 0.125, 0.0, 0, None, 0)
        _C.accumulate(worth, mass, table, lists, 1.0, 1.0 / group)
    share = np.array([[64 / 104, 40 / 104, 0], [64 / 129, 64 / 129, 1 / 129]])  # zeros: all keys are alike
    np.testing.assert_allclose(worth, 4 * share, rtol=1e-5)


def test_accumulate_leaves_infinity() -> None:
    table, lists = paged([[64, 3], [5]], 3)
    worth = spoiled(np.ones((2, 3), np.float32), np.inf, 0, 0)
    _C.accumulate(worth, np.ones((2, 70), np.float32), table, lists, 0.0, 1.0)
    assert worth[0, 0] == np.inf and np.isfinite(worth[1:]).all() and np.isfinite(worth[0, 1:]).all()


def test_accumulate_edges() -> None:
    table, lists = paged([[2], []], 2)
    worth = np.array([[3, 9], [9, 9]], np.float32)
    _C.accumulate(worth, np.zeros((2, 2), np.float32), table, lists, 0.5, 1.0)
    assert worth.tolist() == [[1.5, 0], [0, 0]]  # no mass: decay alone
    most = np.finfo(np.float32).max
    _C.accumulate(worth, np.full((2, 2), most, np.float32), table, lists, 1.0, 3e38)
    assert worth[0, 0] == most
    table, lists = paged([], 0)
    _C.accumulate(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), table, lists, 0.5, 1.0)


def changed(table: Array, field: str, value: int) -> Array:
    table.view(PAGE)[field][1, 0] = value
    return table


def lists_with(column: int, value: int) -> Array:
    lists = paged([[64, 3], [5]], 3)[1]
    lists[1, column] = value
    return lists


TABLE = paged([[64, 3], [5]], 3)[0]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"worth": np.ones((2, 4), np.float32)}, ValueError, "worth: expected shape (2, 3), got (2, 4)"),
        ({"worth": np.ones((2, 3))}, TypeError, "worth: expected float32, got float64"),
        (
            {"worth": spoiled(np.ones((2, 3), np.float32), np.nan, 0, 1)},
            ValueError,
            "worth: expected values of 0..inf, got nan at list 0, entry 1",
        ),
        (
            {"worth": spoiled(np.ones((2, 3), np.float32), -1, 1, 0)},
            ValueError,
            "worth: expected values of 0..inf, got -1 at list 1, entry 0",
        ),
        ({"mass": np.ones((3, 70), np.float32)}, ValueError, "mass: expected shape (2, *), got (3, 70)"),
        ({"mass": np.ones((2, 66), np.float32)}, ValueError, "mass: expected (2, 67 or more), got (2, 66)"),
        (
            {"mass": spoiled(np.ones((2, 70), np.float32), np.nan, 1, 4)},
            ValueError,
            "mass: expected values of 0..3.40282e+38, got nan at list 1, entry 4",
        ),
        (
            {"mass": spoiled(np.ones((2, 70), np.float32), -1, 0, 66)},
            ValueError,
            "mass: expected values of 0..3.40282e+38, got -1 at list 0, entry 66",
        ),
        ({"table": TABLE.astype(np.int64)}, TypeError, "table: expected uint64, got int64"),
        ({"table": TABLE[0]}, ValueError, "table: expected shape (*, *), got (3,)"),
        (
            {"table": changed(TABLE.copy(), "k_bits", 5)},
            ValueError,
            "table: expected a valid page, got K 5, V 4 bits, 5 tokens at unit 0 in list 1",
        ),
        (
            {"table": changed(TABLE.copy(), "v_bits", 0)},
            ValueError,
            "table: expected a valid page, got K 4, V 0 bits, 5 tokens at unit 0 in list 1",
        ),
        (
            {"table": changed(TABLE.copy(), "tokens", 65)},
            ValueError,
            "table: expected a valid page, got K 4, V 4 bits, 65 tokens at unit 0 in list 1",
        ),
        (
            {"table": changed(TABLE.copy(), "tokens", 6)},
            ValueError,
            "lists: expected 6 tokens as in the pages, got 5 in list 1",
        ),
        ({"lists": lists_with(0, 4)}, ValueError, "lists: expected 0..3 pages, got 4 in list 1"),
        ({"lists": lists_with(0, -1)}, ValueError, "lists: expected 0..3 pages, got -1 in list 1"),
        ({"lists": lists_with(3, 6)}, ValueError, "lists: expected 5 tokens as in the pages, got 6 in list 1"),
        ({"lists": lists_with(0, 1)[:1]}, ValueError, "lists: expected shape (2, 4), got (1, 4)"),
        ({"lists": lists_with(0, 1).astype(np.int64)}, TypeError, "lists: expected int32, got int64"),
        ({"keep": 1.5}, ValueError, "keep: expected a number in 0..1, got 1.5"),
        ({"keep": float("nan")}, ValueError, "keep: expected a number in 0..1, got nan"),
        ({"gain": -1.0}, ValueError, "gain: expected a number in 0..3.40282e+38, got -1.0"),
        ({"gain": float("inf")}, ValueError, "gain: expected a number in 0..3.40282e+38, got inf"),
    ],
)
def test_accumulate_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    table, lists = paged([[64, 3], [5]], 3)
    fine = {"worth": np.ones((2, 3), np.float32), "mass": np.ones((2, 70), np.float32), "table": table, "lists": lists}
    arguments: dict[str, Any] = fine | {"keep": 0.5, "gain": 1.0} | change
    before = arguments["worth"].copy()
    with pytest.raises(error) as raised:
        _C.accumulate(*arguments.values())
    assert str(raised.value) == f"accumulate: {sentence}"
    np.testing.assert_array_equal(arguments["worth"], before)
