"""score against fp64, its edges, and every refusal."""

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
from reference_policy import Array, score, score_bound, workspace

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
        reduce=data.draw(st.integers(0, 1)),
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


def test_padding_is_never_read() -> None:
    first = np.array([5, 0, 30, 31], np.int32)
    queries, keys = normal(5, 4, 4, 6, 16), normal(6, 4, 2, 31, 16)
    for reduce in (0, 1):
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
            results.append(run(queries, keys, scale=0.125, pool=5))
    finally:
        _C.set_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("simd", ["base", "avx2", "avx512"])
def test_instruction_sets(simd: str) -> None:
    """The same bound whatever the loops were compiled for (a name the machine lacks falls back)."""
    code = "import test_score as t; t.check(t.normal(1, 1, 4, 8, 80), t.normal(2, 1, 2, 600, 80), scale=0.1, pool=3)"
    env = os.environ | {"KVCOMP_SIMD": simd, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=os.path.dirname(__file__))


# ---- refusals


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
        ({"reduce": 2}, ValueError, "reduce: expected an integer in 0..1, got 2"),
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
