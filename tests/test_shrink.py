"""shrink against its definition, against exact optima, and every refusal."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp import _C
from kvcomp.store import Layout
from reference_plan import Pages, optimum_of_shrink, shrink
from reference_policy import BITS, workspace

LAYOUTS = [Layout(128, 128, 1, 1), Layout(64, 16, 1, 2), Layout(80, 80, 0, 1), Layout(256, 64, 1, 1)]
MEASURED = np.array([0.116, 0.036, 0.011, 4e-5, 0], np.float32)  # of N(0, 1) at 2, 3, 4, 8, 16 bits
CLASSES = [(0, 0)] + [(k, v) for k in BITS for v in BITS]


def run(pages: Pages, wanted: int) -> tuple[Pages, int]:
    """The pages afterwards, and the bytes freed."""
    after = dataclasses.replace(pages, k_bits=pages.k_bits.copy(), v_bits=pages.v_bits.copy())
    freed = _C.shrink(
        after.k_bits,
        after.v_bits,
        after.lists,
        None,
        after.weight,
        after.distortion_k,
        after.distortion_v,
        after.drop,
        after.allowed,
        workspace(_C.shrink_workspace(len(after.drop), len(after.lists))),
        after.layout,
        after.entry_bytes,
        wanted,
    )
    return after, freed


def freeable(pages: Pages) -> int:
    sizes = [pages.page_bytes(int(k), int(v)) for k, v in zip(pages.k_bits, pages.v_bits, strict=True)]
    return sum(size for size, weight in zip(sizes, pages.weight, strict=True) if np.isfinite(weight))


def check_invariants(before: Pages, after: Pages, wanted: int, freed: int) -> None:
    assert wanted <= freed == before.bytes() - after.bytes()
    assert (after.k_bits <= before.k_bits).all() and (after.v_bits <= before.v_bits).all()
    np.testing.assert_array_equal(after.k_bits == 0, after.v_bits == 0)
    for p in np.flatnonzero((after.k_bits != before.k_bits) | (after.v_bits != before.v_bits)):
        k, v = int(after.k_bits[p]), int(after.v_bits[p])
        assert np.isfinite(before.weight[p])
        assert k == 0 or before.allowed[BITS.index(k), BITS.index(v)]


@st.composite
def some_pages(draw: st.DrawFn) -> Pages:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, m = draw(st.integers(1, 3)), draw(st.integers(0, 10))
    classes = np.array(draw(st.lists(st.sampled_from(CLASSES), min_size=m, max_size=m)), np.uint8).reshape(m, 2)
    weights = st.sampled_from([0.0, -0.0, 1.0, 1e-45, 3e38, np.inf]) | st.floats(0, 1e6, width=32)
    tables = rng.random((2, n, 5)).astype(np.float32) * np.float32(draw(st.sampled_from([1.0, 1e-6, 0.0])))
    if draw(st.booleans()):
        tables = -np.sort(-tables, axis=-1)
    allowed = np.zeros(25, np.uint8)
    allowed[draw(st.lists(st.integers(0, 24), min_size=1, max_size=25))] = 1
    return Pages(
        classes[:, 0].copy(),
        classes[:, 1].copy(),
        rng.integers(0, n, m).astype(np.int32),
        np.array(draw(st.lists(weights, min_size=m, max_size=m)), np.float32),
        tables[0].copy(),
        tables[1].copy(),
        (rng.random(n) * draw(st.sampled_from([0.0, 0.5, 4.0]))).astype(np.float32),
        np.ones((5, 5), np.uint8) if draw(st.booleans()) else allowed.reshape(5, 5),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from([0, 8, 1000])),
    )


@settings(max_examples=300, deadline=None)
@given(some_pages(), st.data())
def test_definition(pages: Pages, data: st.DataObject) -> None:
    most = freeable(pages)
    for wanted in (0, 1, most, data.draw(st.integers(0, most)), data.draw(st.integers(0, most))):
        if wanted > most:
            continue
        after, freed = run(pages, wanted)
        k_bits, v_bits, expected = shrink(pages, wanted)
        np.testing.assert_array_equal(after.k_bits, k_bits)
        np.testing.assert_array_equal(after.v_bits, v_bits)
        assert freed == expected
        check_invariants(pages, after, wanted, freed)
    with pytest.raises(_C.BudgetError) as raised:
        run(pages, most + 1)
    assert raised.value.least_bytes == pages.bytes() - most


def realistic(rng: np.random.Generator, m: int) -> Pages:
    """Pages as `plan` leaves them: the important ones have more bits; convex tables."""
    n = 4
    weight = np.sort(rng.lognormal(0, 2, m) if rng.integers(2) else rng.pareto(1.2, m) + 1e-3)
    classes = rng.choice([2, 3, 4, 8], (m, 2))
    classes[rng.random(m) < 0.2] = 16
    scale = rng.lognormal(0, 0.5, (2, n, 1))
    allowed = np.zeros((5, 5), np.uint8)
    allowed[:4, :4] = 1
    return Pages(
        classes[:, 0].astype(np.uint8),
        classes[:, 1].astype(np.uint8),
        rng.integers(0, n, m).astype(np.int32),
        weight[np.argsort(np.argsort(classes.sum(1)))].astype(np.float32),
        (MEASURED * scale[0]).astype(np.float32),
        (MEASURED * scale[1]).astype(np.float32),
        scale.sum((0, 2)).astype(np.float32),
        allowed,
        Layout(64, 64, 1, 1),
        0,
    )


@pytest.mark.parametrize(("m", "most", "typical"), [(400, 0.01, 1e-3), (12, 0.5, 0.01)])
def test_near_the_optimum(m: int, most: float, typical: float) -> None:
    """Of all moves, along steps or not. Few pages are within one step's error, which is much of theirs."""
    gaps = []
    for seed in range(20):
        pages = realistic(np.random.default_rng(seed), m)
        pages.weight[::10] = np.inf
        curve, unit = optimum_of_shrink(pages)
        held, total = freeable(pages), freeable(pages)
        for wanted in np.linspace(0, total, 12)[1:-1].astype(int).tolist():
            after, freed = run(pages, wanted)
            check_invariants(pages, after, wanted, freed)
            error, best = sum(after.errors()), curve[(held - wanted) // unit]
            assert error >= best * (1 - 1e-9)
            gaps.append(error / best - 1)
    assert len(gaps) == 200
    assert max(gaps) <= most and np.median(gaps) <= typical


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_more_bytes_wanted_are_never_better(seed: int, m: int) -> None:
    pages = realistic(np.random.default_rng(seed), m)
    last = 0.0
    for wanted in np.unique(np.linspace(0, freeable(pages), 60).astype(np.int64)).tolist():
        after, freed = run(pages, wanted)
        check_invariants(pages, after, wanted, freed)
        error = sum(after.errors())
        assert error >= last * (1 - 1e-12)
        last = error


# ---- by hand


def of_class(k_bits: list[int], v_bits: list[int], weight: list[float], **more: Any) -> Pages:
    """Pages of one list of Gaussian rows; every class allowed."""
    arguments: dict[str, Any] = {
        "k_bits": np.array(k_bits, np.uint8),
        "v_bits": np.array(v_bits, np.uint8),
        "lists": np.zeros(len(weight), np.int32),
        "weight": np.array(weight, np.float32),
        "distortion_k": MEASURED[None].copy(),
        "distortion_v": MEASURED[None].copy(),
        "drop": np.array([2], np.float32),
        "allowed": np.ones((5, 5), np.uint8),
    }
    return Pages(**(arguments | more))


def test_the_least_important_page_gives_first() -> None:
    pages = of_class([8, 8, 8], [8, 8, 8], [3, 1, 2])
    step = pages.page_bytes(8, 8) - pages.page_bytes(4, 8)
    after, freed = run(pages, step)
    assert (after.k_bits.tolist(), after.v_bits.tolist(), freed) == ([8, 4, 8], [8, 8, 8], step)
    after, freed = run(pages, 2 * step + 1)
    assert (after.k_bits.tolist(), after.v_bits.tolist(), freed) == ([8, 4, 4], [8, 4, 8], 3 * step)


def test_ties_take_the_lower_page() -> None:
    pages = of_class([4] * 5, [4] * 5, [1] * 5)
    step = pages.page_bytes(4, 4) - pages.page_bytes(3, 4)
    after, _ = run(pages, 2 * step)
    assert list(zip(after.k_bits.tolist(), after.v_bits.tolist(), strict=True))[2:] == [(4, 4)] * 3
    assert int(after.k_bits.sum() + after.v_bits.sum()) == 38


def test_worthless_pages_go_before_others_lose_bits() -> None:
    pages = of_class([2, 8], [2, 8], [0, 1])
    after, freed = run(pages, pages.page_bytes(2, 2))
    assert (after.k_bits.tolist(), freed) == ([0, 8], pages.page_bytes(2, 2))


def test_the_last_step_is_no_larger_than_it_has_to_be() -> None:
    """By error per byte page 0 goes next, by error for the byte that is still wanted page 1 loses a bit."""
    pages = of_class([2, 4], [2, 4], [0.01, 0.05])
    after, freed = run(pages, 1)
    assert (after.k_bits.tolist(), freed) == ([2, 3], pages.page_bytes(4, 4) - pages.page_bytes(3, 4))


def test_sixteen_bits_move_where_that_frees_bytes() -> None:
    """16 tokens at (16, 16) take 8 KiB; 64 places of (8, 8) take more, of (2, 2) less."""
    pages = of_class([16], [16], [1])
    less = pages.page_bytes(16, 16) - pages.page_bytes(3, 3)
    after, freed = run(pages, less)
    assert (after.k_bits.tolist(), after.v_bits.tolist(), freed) == ([3], [3], less)
    only = np.zeros((5, 5), np.uint8)
    only[3, 3] = 1
    after, freed = run(of_class([16], [16], [1], allowed=only), 1)
    assert (after.k_bits.tolist(), freed) == ([0], pages.page_bytes(16, 16))


def test_nothing_is_encoded_upwards() -> None:
    """(2, 8) may not become (4, 4), which takes fewer bytes."""
    only = np.zeros((5, 5), np.uint8)
    only[2, 2] = 1
    after, _ = run(of_class([2], [8], [1], allowed=only), 1)
    assert after.k_bits.tolist() == [0]


def test_untouchable_and_evicted_pages_stay() -> None:
    pages = of_class([8, 0, 16], [8, 0, 16], [np.inf, 1, 1])
    after, freed = run(pages, 1)
    assert after.k_bits.tolist()[:2] == [8, 0] and freed > 0
    with pytest.raises(_C.BudgetError) as raised:
        run(pages, pages.page_bytes(16, 16) + 1)
    assert raised.value.least_bytes == pages.page_bytes(8, 8)


def test_nothing_wanted_and_no_pages() -> None:
    pages = of_class([8], [8], [1])
    after, freed = run(pages, 0)
    assert (after.k_bits.tolist(), freed) == ([8], 0)
    assert run(of_class([], [], []), 0)[1] == 0
    nothing = np.zeros((0, 5), np.float32)
    empty = of_class([], [], [], distortion_k=nothing, distortion_v=nothing.copy(), drop=np.zeros(0, np.float32))
    assert run(empty, 0)[1] == 0


def test_many_pages_on_any_number_of_threads() -> None:
    pages = realistic(np.random.default_rng(3), 100_000)
    wanted = freeable(pages) // 2
    before, results = _C.threads(), []
    try:
        for threads in (1, 3):
            _C.set_threads(threads)
            results.append(run(pages, wanted))
    finally:
        _C.set_threads(before)
    np.testing.assert_array_equal(results[0][0].k_bits, results[1][0].k_bits)
    np.testing.assert_array_equal(results[0][0].v_bits, results[1][0].v_bits)
    assert wanted <= results[0][1] == results[1][1] < wanted + 20_000


def test_four_16_bit_pages_move_to_one() -> None:
    """Alone a page of 16 tokens saves nothing at 4 bits (8704 bytes against 8192 of head_dim 128); four do."""
    layout, arguments = Layout(128, 128, 1, 1), good()
    arguments |= {"k_bits": np.full(3, 16, np.uint8), "v_bits": np.full(3, 16, np.uint8), "layout": layout}
    arguments |= {"allowed": np.zeros((5, 5), np.uint8), "counts": np.array([4, 1, 2], np.uint8), "entry_bytes": 8}
    arguments |= {"weight": np.array([1, 1e6, 1e6], np.float32), "drop": np.full(1, 100, np.float32)}
    arguments |= {"distortion_k": MEASURED[None].copy(), "distortion_v": MEASURED[None].copy()}
    arguments["allowed"][2, 2] = 1
    assert _C.page_bytes(layout, 4, 4) == 8704
    freed = 4 * (8192 + 8) - (8704 + 8)
    assert _C.shrink(*(arguments | {"wanted": freed}).values()) == freed
    assert arguments["k_bits"].tolist() == arguments["v_bits"].tolist() == [4, 16, 16]
    # Then the two, which save 16400 - 8712, before any is evicted.
    arguments["counts"][0] = 1
    assert (
        _C.shrink(*(arguments | {"wanted": 100, "weight": np.array([np.inf, np.inf, 1], np.float32)}).values()) == 7688
    )
    assert arguments["k_bits"].tolist() == [4, 16, 4]


# ---- refusals


def good() -> dict[str, Any]:
    pages = of_class([8, 4, 0], [8, 2, 0], [1, 2, 3])
    fields = {field.name: getattr(pages, field.name) for field in dataclasses.fields(pages)[:8]}
    halves = {name: fields.pop(name) for name in ("k_bits", "v_bits", "lists")}
    return (
        halves
        | {"counts": np.ones(3, np.uint8)}
        | fields
        | {
            "workspace": workspace(_C.shrink_workspace(1, 3)),
            "layout": pages.layout,
            "entry_bytes": 8,
            "wanted": 1,
        }
    )


def put(name: str, at: Any, value: Any) -> dict[str, Any]:
    array = good()[name]
    array[at] = value
    return {name: array}


HALVES = "k_bits: expected 2, 3, 4, 8 or 16 for both halves, or 0 for both, got"


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"k_bits": np.zeros(3, np.int32)}, TypeError, "k_bits: expected uint8, got int32"),
        ({"k_bits": np.zeros((3, 1), np.uint8)}, ValueError, "k_bits: expected shape (*,), got (3, 1)"),
        ({"v_bits": np.zeros(2, np.uint8)}, ValueError, "v_bits: expected shape (3,), got (2,)"),
        ({"lists": np.zeros(3, np.int64)}, TypeError, "lists: expected int32, got int64"),
        ({"weight": np.zeros(4, np.float32)}, ValueError, "weight: expected shape (3,), got (4,)"),
        ({"distortion_k": np.ones((1, 4), np.float32)}, ValueError, "distortion_k: expected shape (1, 5), got (1, 4)"),
        ({"distortion_v": np.ones((2, 5), np.float32)}, ValueError, "distortion_v: expected shape (1, 5), got (2, 5)"),
        ({"drop": np.ones((1, 1), np.float32)}, ValueError, "drop: expected shape (*,), got (1, 1)"),
        ({"allowed": np.ones((5, 4), np.uint8)}, ValueError, "allowed: expected shape (5, 5), got (5, 4)"),
        ({"allowed": np.zeros((5, 5), np.uint8)}, ValueError, "allowed: expected at least one class, got none"),
        (put("allowed", (0, 0), 2), ValueError, "allowed: expected 0 or 1, got 2"),
        ({"workspace": workspace(64)}, ValueError, f"workspace: expected {_C.shrink_workspace(1, 3)} bytes, got 64"),
        (
            {"layout": Layout(72, 72, 1, 1)},
            NotImplementedError,
            "head_dim: expected 64, 80, 96, 128 or 256, got 72",
        ),
        ({"entry_bytes": 2**20 + 1}, ValueError, "entry_bytes: expected 0..1048576, got 1048577"),
        ({"wanted": -1}, ValueError, f"wanted: expected an integer in 0..{2**63 - 1}, got -1"),
        (put("k_bits", 1, 5), ValueError, f"{HALVES} 5 and 2 at page 1"),
        (put("k_bits", 0, 0), ValueError, f"{HALVES} 0 and 8 at page 0"),
        (put("v_bits", 2, 16), ValueError, f"{HALVES} 0 and 16 at page 2"),
        (put("lists", 1, 1), ValueError, "lists: expected 0..0, got 1 at page 1"),
        (put("lists", 2, -1), ValueError, "lists: expected 0..0, got -1 at page 2"),
        (put("counts", 1, 2), ValueError, "counts: expected 1, or up to 4 pages of class (16, 16), got 2 at page 1"),
        (put("counts", 0, 0), ValueError, "counts: expected 1, or up to 4 pages of class (16, 16), got 0 at page 0"),
        ({"counts": np.ones(2, np.uint8)}, ValueError, "counts: expected shape (3,), got (2,)"),
        (put("weight", 0, np.nan), ValueError, "weight: expected values >= 0, got nan at page 0"),
        (put("weight", 2, -1), ValueError, "weight: expected values >= 0, got -1 at page 2"),
        (
            put("distortion_k", (0, 2), np.nan),
            ValueError,
            "distortion_k: expected finite values >= 0, got nan for list 0",
        ),
        (put("distortion_v", (0, 4), -1), ValueError, "distortion_v: expected finite values >= 0, got -1 for list 0"),
        (put("drop", 0, np.inf), ValueError, "drop: expected finite values >= 0, got inf for list 0"),
        (
            {"wanted": 10**6},
            _C.BudgetError,
            "wanted: expected at most 23568 bytes, which evicting every page of finite weight frees, got 1000000",
        ),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = good() | change
    before = arguments["k_bits"].copy(), arguments["v_bits"].copy()
    with pytest.raises(error) as raised:
        _C.shrink(*arguments.values())
    assert str(raised.value) == f"shrink: {sentence}"
    np.testing.assert_array_equal(arguments["k_bits"], before[0])
    np.testing.assert_array_equal(arguments["v_bits"], before[1])


def test_count_and_sizes() -> None:
    with pytest.raises(TypeError, match="shrink: expected 13 positional arguments, got 0"):
        _C.shrink()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"shrink_workspace: m: expected an integer in 0..2147483647, got -1"):
        _C.shrink_workspace(1, -1)
