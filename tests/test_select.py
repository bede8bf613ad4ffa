"""select, ada, share and pyramid against plain sorting and exact fractions, and every refusal."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp import _C
from reference_policy import Array, ada, select, share, share_level, workspace


def run(importance: Array | None, keep: list[int], s: int, first: list[int] | None, sinks: int, window: int) -> Array:
    kept = np.full((len(keep), s), 9, np.uint8)
    scratch = workspace(_C.select_workspace(len(keep), s))
    begin = None if first is None else np.array(first, np.int32)
    _C.select(kept, importance, np.array(keep, np.int32), begin, scratch, sinks, window)
    return kept


SCORES = st.one_of(
    st.floats(0, 1, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 1e-45, 1.1754944e-38, 3.4028235e38, 0.5, float(np.nextafter(np.float32(0.5), 1))]),
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_random(data: st.DataObject) -> None:
    n, s = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 40))
    importance = None
    if data.draw(st.booleans()):
        scores = data.draw(st.lists(SCORES, min_size=n * s, max_size=n * s))
        importance = np.array(scores, np.float32).reshape(n, s)
    keep = data.draw(st.lists(st.integers(0, 50), min_size=n, max_size=n))
    first = data.draw(st.none() | st.lists(st.integers(0, s), min_size=n, max_size=n))
    sinks, window = data.draw(st.integers(0, 45)), data.draw(st.integers(0, 45))
    got = run(importance, keep, s, first, sinks, window)
    for i in range(n):
        begin = 0 if first is None else first[i]
        want = select(None if importance is None else importance[i], keep[i], begin, s, sinks, window)
        np.testing.assert_array_equal(got[i], want)
        real = s - begin
        assert got[i].sum() == (real if real <= window else min(keep[i], real))


def test_long_lists() -> None:
    rng = np.random.default_rng(0)
    importance = rng.exponential(size=(3, 5000)).astype(np.float32) ** 4
    importance[1] = np.round(importance[1], 1)  # many ties
    importance[2, ::7] = 0
    got = run(importance, [700, 2500, 4999], 5000, [0, 123, 0], 4, 64)
    for i, (keep, first) in enumerate(zip([700, 2500, 4999], [0, 123, 0], strict=True)):
        np.testing.assert_array_equal(got[i], select(importance[i], keep, first, 5000, 4, 64))


@pytest.mark.parametrize("value", [0.0, 1.0, 3e38])
def test_equal_scores_keep_the_oldest(value: float) -> None:
    got = run(np.full((1, 100), value, np.float32), [30], 100, None, 2, 8)
    np.testing.assert_array_equal(np.flatnonzero(got[0]), [*range(22), *range(92, 100)])


def test_one_huge_score() -> None:
    importance = np.full((1, 50), 1e-30, np.float32)
    importance[0, 20] = 3e38
    assert np.flatnonzero(run(importance, [5], 50, None, 1, 3)[0]).tolist() == [0, 20, 47, 48, 49]


def test_small_budgets_keep_the_newest() -> None:
    importance = np.ones((1, 20), np.float32)
    assert np.flatnonzero(run(importance, [3], 20, None, 4, 8)[0]).tolist() == [17, 18, 19]
    assert np.flatnonzero(run(importance, [10], 20, None, 4, 8)[0]).tolist() == [0, 1, *range(12, 20)]
    assert run(importance, [0], 20, None, 4, 8).sum() == 0


def test_shorter_than_the_window_is_kept_whole() -> None:
    assert run(np.zeros((2, 20), np.float32), [0, 0], 20, [12, 11], 0, 8).sum(1).tolist() == [8, 0]


def test_scores_before_the_first_token_are_not_read() -> None:
    importance = np.ones((1, 10), np.float32)
    importance[0, :4] = np.nan
    assert np.flatnonzero(run(importance, [3], 10, [4], 1, 1)[0]).tolist() == [4, 5, 9]


def good() -> dict[str, Any]:
    return {
        "kept": np.full((2, 6), 7, np.uint8),
        "importance": np.ones((2, 6), np.float32),
        "keep": np.array([3, 4], np.int32),
        "first": np.array([0, 1], np.int32),
        "workspace": workspace(0),
        "sinks": 1,
        "window": 2,
    }


def scores(value: float) -> Array:
    importance = np.ones((2, 6), np.float32)
    importance[1, 3] = value
    return importance


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"kept": np.zeros((2, 6), np.int32)}, TypeError, "kept: expected uint8, got int32"),
        ({"kept": np.zeros(6, np.uint8)}, ValueError, "kept: expected shape (*, *), got (6,)"),
        ({"importance": np.ones((2, 5), np.float32)}, ValueError, "importance: expected shape (2, 6), got (2, 5)"),
        ({"importance": np.ones((2, 6))}, TypeError, "importance: expected float32, got float64"),
        (
            {"importance": scores(np.nan)},
            ValueError,
            "importance: expected finite values >= 0, got nan at list 1, token 3",
        ),
        (
            {"importance": scores(np.inf)},
            ValueError,
            "importance: expected finite values >= 0, got inf at list 1, token 3",
        ),
        ({"importance": scores(-1)}, ValueError, "importance: expected finite values >= 0, got -1 at list 1, token 3"),
        ({"keep": np.array([3, -1], np.int32)}, ValueError, "keep: expected counts >= 0, got -1 for list 1"),
        ({"keep": np.array([3], np.int32)}, ValueError, "keep: expected shape (2,), got (1,)"),
        ({"first": np.array([0, 7], np.int32)}, ValueError, "first: expected 0..6, got 7 for list 1"),
        ({"first": np.array([-1, 7], np.int32)}, ValueError, "first: expected 0..6, got -1 for list 0"),
        ({"sinks": -1}, ValueError, "sinks: expected an integer in 0..2147483647, got -1"),
        ({"window": -1}, ValueError, "window: expected an integer in 0..2147483647, got -1"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = good() | change
    before = arguments["kept"].copy()
    with pytest.raises(error) as raised:
        _C.select(*arguments.values())
    assert str(raised.value) == f"select: {sentence}"
    np.testing.assert_array_equal(arguments["kept"], before)


# ---- ada


def adapt(
    importance: Array, keep: list[int], first: list[int] | None, floor: list[int], sinks: int, window: int
) -> Array:
    n, s = importance.shape
    kept = np.full((n, s), 9, np.uint8)
    scratch = workspace(_C.ada_workspace(n, s))
    scratch[:] = 0xAB
    begin = None if first is None else np.array(first, np.int32)
    heads = n // len(keep)
    _C.ada(kept, importance, np.array(keep, np.int32), begin, scratch, heads, np.array(floor, np.int32), sinks, window)
    return kept


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_ada_random(data: st.DataObject) -> None:
    b, heads, s = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 25))
    n = b * heads
    scores = data.draw(st.lists(SCORES, min_size=n * s, max_size=n * s))
    importance = np.array(scores, np.float32).reshape(n, s)
    keep = data.draw(st.lists(st.integers(0, 110), min_size=b, max_size=b))
    floor = data.draw(st.lists(st.integers(0, 30), min_size=b, max_size=b))
    first = data.draw(st.none() | st.lists(st.integers(0, s), min_size=n, max_size=n))
    sinks, window = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 12))
    begin = first or [0] * n
    want = ada(importance, keep, begin, heads, floor, sinks, window)
    for i, f in enumerate(begin):
        importance[i, :f] = np.nan  # not read
    got = adapt(importance, keep, first, floor, sinks, window)
    np.testing.assert_array_equal(got, want)
    for i in range(b):
        real = [s - f for f in begin[i * heads : (i + 1) * heads]]
        floors = sum(r if r <= window else min(floor[i], r) for r in real)
        assert got[i * heads : (i + 1) * heads].sum() == max(min(keep[i], sum(real)), floors)


def test_ada_long_lists() -> None:
    rng = np.random.default_rng(1)
    importance = rng.exponential(size=(6, 3000)).astype(np.float32) ** 4
    importance[1] *= 0.01
    importance[3:] = np.round(importance[3:], 1)  # many ties
    first = [0, 0, 0, 17, 17, 17]
    got = adapt(importance, [2000, 4000], first, [100, 64], 4, 32)
    np.testing.assert_array_equal(got, ada(importance, [2000, 4000], first, 3, [100, 64], 4, 32))
    assert got[1].sum() < got[0].sum()  # the head that needs less gives to the others


def test_ada_is_select_for_one_head() -> None:
    importance = np.random.default_rng(2).random((2, 60)).astype(np.float32)
    got = adapt(importance, [30, 7], None, [30, 7], 2, 5)
    np.testing.assert_array_equal(got, run(importance, [30, 7], 60, None, 2, 5))
    whole = adapt(importance, [30, 7], None, [7, 7], 2, 5)  # sinks and window fit the floor: the same again
    np.testing.assert_array_equal(whole, got)


def test_ada_ties() -> None:
    got = adapt(np.full((3, 10), 0.5, np.float32), [14], None, [2], 0, 1)
    assert [np.flatnonzero(row).tolist() for row in got] == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 9], [0, 9]]
    zeros = np.array([[0.0, -0.0, 0.0], [-0.0, 0.0, 0.0]], np.float32)
    assert adapt(zeros, [4], None, [0], 0, 0).tolist() == [[1, 1, 1], [1, 0, 0]]


def test_ada_budgets() -> None:
    importance = np.arange(20, dtype=np.float32).reshape(2, 10)
    assert adapt(importance, [0], None, [0], 2, 3).sum() == 0
    assert adapt(importance, [3], None, [5], 0, 0).sum(1).tolist() == [5, 5]  # the floors win
    assert adapt(importance, [99], None, [5], 0, 0).sum() == 20
    assert adapt(importance, [2**31 - 1], None, [2**31 - 1], 0, 0).sum() == 20
    assert adapt(importance, [8], None, [0], 0, 0).sum(1).tolist() == [0, 8]
    assert adapt(importance, [0], [8, 0], [0], 0, 3).sum(1).tolist() == [2, 0]  # no longer than the window: whole
    assert adapt(np.zeros((2, 1), np.float32), [1], None, [0], 0, 0).tolist() == [[1], [0]]
    assert adapt(importance, [4], [10, 10], [4], 1, 1).sum() == 0  # no real token


def good_ada() -> dict[str, Any]:
    return {
        "kept": np.full((4, 6), 7, np.uint8),
        "importance": np.ones((4, 6), np.float32),
        "keep": np.array([3, 4], np.int32),
        "first": np.array([0, 1, 0, 0], np.int32),
        "workspace": workspace(_C.ada_workspace(4, 6)),
        "heads": 2,
        "floor": np.array([1, 2], np.int32),
        "sinks": 1,
        "window": 2,
    }


def scores_of_four(value: float) -> Array:
    importance = np.ones((4, 6), np.float32)
    importance[1, 3] = value
    return importance


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"kept": np.zeros((4, 6), np.int32)}, TypeError, "kept: expected uint8, got int32"),
        ({"kept": np.zeros(6, np.uint8)}, ValueError, "kept: expected shape (*, *), got (6,)"),
        ({"importance": np.ones((4, 5), np.float32)}, ValueError, "importance: expected shape (4, 6), got (4, 5)"),
        ({"importance": np.ones((4, 6))}, TypeError, "importance: expected float32, got float64"),
        ({"importance": None}, TypeError, "importance: expected a tensor, got None"),
        *(
            (
                {"importance": scores_of_four(value)},
                ValueError,
                f"importance: expected finite values >= 0, got {value:g} at list 1, token 3",
            )
            for value in (np.nan, np.inf, -1)
        ),
        ({"heads": 3}, ValueError, "kept: expected a multiple of 3 heads as lists, got 4"),
        ({"heads": 0}, ValueError, "heads: expected an integer in 1..2147483647, got 0"),
        ({"keep": np.array([3, -1], np.int32)}, ValueError, "keep: expected counts >= 0, got -1 for sequence 1"),
        ({"keep": np.array([3, 1, 1, 1], np.int32)}, ValueError, "keep: expected shape (2,), got (4,)"),
        ({"keep": np.array([3, 1])}, TypeError, "keep: expected int32, got int64"),
        ({"floor": np.array([-2, 1], np.int32)}, ValueError, "floor: expected counts >= 0, got -2 for sequence 0"),
        ({"floor": np.array([1], np.int32)}, ValueError, "floor: expected shape (2,), got (1,)"),
        ({"first": np.array([0, 0], np.int32)}, ValueError, "first: expected shape (4,), got (2,)"),
        ({"first": np.array([0, 0, 7, 0], np.int32)}, ValueError, "first: expected 0..6, got 7 for list 2"),
        ({"first": np.array([0, -1, 0, 0], np.int32)}, ValueError, "first: expected 0..6, got -1 for list 1"),
        ({"sinks": -1}, ValueError, "sinks: expected an integer in 0..2147483647, got -1"),
        ({"window": -1}, ValueError, "window: expected an integer in 0..2147483647, got -1"),
        (
            {"workspace": workspace(64)},
            ValueError,
            f"workspace: expected {_C.ada_workspace(4, 6)} bytes, got 64",
        ),
    ],
)
def test_ada_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = good_ada() | change
    before = arguments["kept"].copy()
    with pytest.raises(error) as raised:
        _C.ada(*arguments.values())
    assert str(raised.value) == f"ada: {sentence}"
    np.testing.assert_array_equal(arguments["kept"], before)


# ---- share


def divide(weight: list[float], floor: list[int], ceiling: list[int], total: int) -> list[int]:
    shares = np.full(len(weight), -1, np.int64)
    _C.share(shares, np.array(weight, np.float64), np.array(floor, np.int64), np.array(ceiling, np.int64), total)
    return shares.tolist()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_share_random(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 12))
    weight = data.draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers).filter(any))
    floor = data.draw(st.lists(st.integers(0, 50), min_size=layers, max_size=layers))
    ceiling = [f + data.draw(st.integers(0, 200)) for f in floor]
    total = data.draw(st.integers(sum(floor), sum(ceiling)))
    got = divide([w / 8 for w in weight], floor, ceiling, total)
    assert sum(got) == total
    exact = share_level([Fraction(w, 8) for w in weight], floor, ceiling, total)
    for part, f, c, x in zip(got, floor, ceiling, exact, strict=True):
        assert f <= part <= c
        assert abs(part - x) < 1
    want = share([Fraction(w, 8) for w in weight], floor, ceiling, total)
    remainders = [x - int(x) for x in exact]
    if all(a == b or abs(a - b) > 1e-9 for a in remainders for b in remainders) and len(set(weight)) == layers:
        for part, other, x in zip(got, want, exact, strict=True):  # equal remainders may fall either way in doubles
            assert part == other or remainders.count(x - int(x)) > 1
    if len(set(weight)) == 1 and len(set(floor)) == len(set(ceiling)) == 1:
        assert got == want  # ties: the lower layer


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-100, 1e100), min_size=1, max_size=20),
    st.integers(0, 2**50),
)
def test_share_wild_weights(weight: list[float], total: int) -> None:
    """Exactly the total, within a token and a part in 10^12 of the proportion."""
    if min(weight) / max(weight) <= 1e-200:
        return
    got = divide(weight, [0] * len(weight), [2**53] * len(weight), total)
    assert sum(got) == total
    whole = sum(map(Fraction, weight))
    for part, w in zip(got, weight, strict=True):
        assert abs(part - total * Fraction(w) / whole) <= 1 + total * 1e-12


@pytest.mark.parametrize(
    ("weight", "floor", "ceiling", "total", "want"),
    [
        ([1, 1, 1], [0, 0, 0], [9, 9, 9], 10, [4, 3, 3]),
        ([3, 2, 1], [0, 0, 0], [4, 99, 99], 12, [4, 5, 3]),  # 6 4 2, clipping frees 2: 4, 5 1/3, 2 2/3
        ([3, 2, 1], [0, 0, 4], [99, 99, 99], 12, [5, 3, 4]),  # 6 4 2, the floor takes 2: 4.8, 3.2
        ([0, 1, 0], [1, 1, 1], [9, 5, 9], 7, [1, 5, 1]),
        ([0, 1, 0], [1, 1, 0], [9, 5, 9], 12, [4, 5, 3]),  # 7 left for two layers without weight
        ([1, 1], [3, 3], [3, 3], 6, [3, 3]),
        ([1e-3], [0], [100], 100, [100]),
    ],
)
def test_share_by_hand(weight: list[float], floor: list[int], ceiling: list[int], total: int, want: list[int]) -> None:
    assert divide(weight, floor, ceiling, total) == want


@pytest.mark.parametrize(
    ("weight", "floor", "ceiling", "total", "sentence"),
    [
        ([], [], [], 0, "weight: expected at least one layer, got none"),
        ([1, -1], [0, 0], [5, 5], 5, "weight: expected finite values >= 0, got -1 for layer 1"),
        ([1, np.nan], [0, 0], [5, 5], 5, "weight: expected finite values >= 0, got nan for layer 1"),
        ([0, 0], [0, 0], [5, 5], 5, "weight: expected at least one value > 0, got only zeros"),
        (
            [1, 1e-300],
            [0, 0],
            [5, 5],
            5,
            "weight: expected 0 or more than 1e-200 of the largest, 1, got 1e-300 for layer 1",
        ),
        ([1, 1], [0, -1], [5, 5], 5, "floor: expected 0..2^53, got -1 for layer 1"),
        ([1, 1], [0, 2], [5, 1], 5, "ceiling: expected at least the floor 2, got 1 for layer 1"),
        ([1, 1], [1, 2], [5, 5], 11, "total: expected 3..10 (sums of floor and ceiling), got 11"),
        ([1, 1], [1, 2], [5, 5], 2, "total: expected 3..10 (sums of floor and ceiling), got 2"),
        ([1, 1], [1, 2], [5, 5], 2**53 + 1, f"total: expected 0..2^53, got {2**53 + 1}"),
        ([1, 1], [1, 2], [5, 5, 5], 5, "ceiling: expected shape (2,), got (3,)"),
    ],
)
def test_share_refused(weight: list[float], floor: list[int], ceiling: list[int], total: int, sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        divide(weight, floor, ceiling, total)
    assert str(raised.value) == f"share: {sentence}"


# ---- pyramid


@pytest.mark.parametrize("layers", [1, 2, 7, 80])
@pytest.mark.parametrize("beta", [1, 1.1, 20.0, 1e6])
def test_pyramid(layers: int, beta: float) -> None:
    weight = np.zeros(layers)
    _C.pyramid(weight, beta)
    np.testing.assert_allclose(weight.mean(), 1.0, rtol=1e-14)
    if layers > 1:
        np.testing.assert_allclose(weight[-1], 1 / beta, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(np.diff(weight), -2 * (1 - 1 / beta) / (layers - 1), atol=1e-14)


@pytest.mark.parametrize(
    ("weight", "beta", "error", "sentence"),
    [
        (np.zeros(3), 0.5, ValueError, "beta: expected a number in 1.."),
        (np.zeros(3), float("nan"), ValueError, "beta: expected a number in 1.."),
        (np.zeros(3), "a", TypeError, "beta: expected a number, got str"),
        (np.zeros(0), 2.0, ValueError, "weight: expected at least one layer, got 0"),
        (np.zeros(3, np.float32), 2.0, TypeError, "weight: expected float64, got float32"),
    ],
)
def test_pyramid_refused(weight: Array, beta: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as raised:
        _C.pyramid(weight, beta)
    assert str(raised.value).startswith(f"pyramid: {sentence}")
