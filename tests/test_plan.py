"""plan against its definition, against exact optima, and every refusal."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvcomp import _C
from reference_plan import GroupPlan, Optimum, make_group_plan, optimum_of_groups, optimum_of_runs
from reference_policy import BITS, Array, Plan, make_list, make_plan, plan_bytes, plan_error, workspace

LAYOUTS = [(128, 128, 1, 1, 0), (64, 16, 1, 2, 0), (80, 80, 0, 1, 0), (96, 32, 1, 2, 0), (256, 64, 0, 1, 1)]
GAUSSIAN = np.array([0.118, 0.0345, 0.0095, 0.00004, 0.0], np.float32)


Summary = tuple[int, int, int, int, int, float]


def run(plan: Plan, budget: int, groups: Array | None = None) -> tuple[Array, Array, Summary]:
    n, s = plan.kept.shape
    k_bits, v_bits = np.full((n, s), 77, np.uint8), np.full((n, s), 77, np.uint8)
    summary = _C.plan(
        k_bits,
        v_bits,
        plan.importance,
        plan.kept,
        plan.fixed,
        plan.distortion_k,
        plan.distortion_v,
        plan.drop,
        plan.allowed,
        plan.least_tokens,
        plan.guard,
        groups,
        workspace(_C.plan_workspace(n, s)),
        plan.layout,
        budget,
        plan.entry_bytes,
        plan.list_bytes,
        plan.fixed_class,
    )
    return k_bits, v_bits, summary


def simple(importance: Array, **more: Any) -> Plan:
    """All tokens candidates, Gaussian distortions, all classes allowed."""
    n = len(importance)
    table = np.tile(GAUSSIAN, (n, 1))
    arguments: dict[str, Any] = {
        "importance": importance.astype(np.float32),
        "kept": np.ones(importance.shape, np.uint8),
        "fixed": np.zeros(importance.shape, np.uint8),
        "distortion_k": table,
        "distortion_v": table.copy(),
        "drop": np.full(n, 2, np.float32),
        "allowed": np.ones((5, 5), np.uint8),
    }
    return Plan(**(arguments | more))


def check_invariants(plan: Plan, budget: int, k_bits: Array, v_bits: Array, summary: Summary) -> None:
    total, least, most, kept, pages, error = summary
    assert (total, pages) == plan_bytes(plan, k_bits, v_bits)
    assert budget < 0 or total <= budget
    assert least <= most
    assert kept == np.count_nonzero(k_bits)
    np.testing.assert_allclose(error, plan_error(plan, k_bits, v_bits), rtol=1e-9, atol=1e-300)
    np.testing.assert_array_equal(k_bits == 0, v_bits == 0)
    assert not k_bits[plan.kept == 0].any()
    assert (k_bits[plan.fixed > 0] == 16).all() and (v_bits[plan.fixed > 0] == 16).all()
    for i in range(len(k_bits)):
        order = plan.candidates(i)
        for bits in (k_bits, v_bits):
            assert (np.diff(bits[i, order].astype(int)) <= 0).all()
        classes = {(int(k), int(v)) for k, v in zip(k_bits[i, order], v_bits[i, order], strict=True)} - {(0, 0)}
        assert all(plan.allowed[BITS.index(k), BITS.index(v)] for k, v in classes)
        if plan.least_tokens is not None:
            assert k_bits[i, order[: plan.least_tokens[i]]].all()
        if plan.guard is not None:
            assert np.count_nonzero((k_bits[i, order] == 16) & (v_bits[i, order] == 16)) <= plan.guard[i]


IMPORTANCE = st.one_of(
    st.floats(0, 1, width=32),
    st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 1e-45, 3.4028235e38]),
    st.floats(0, 1e6, width=32),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    n, s = draw(st.integers(1, 3)), draw(st.one_of(st.integers(0, 40), st.integers(60, 420)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["flat", "zero", "skewed", "ties", "list", "one"]))
    importance = np.full((n, s), 0.5 if kind == "flat" else 0.0)
    if kind == "skewed":
        importance = rng.exponential(size=(n, s)) ** 4
    elif kind == "ties":
        importance = rng.integers(0, 3, (n, s)).astype(float)
    elif kind == "list" and s:
        few = draw(st.lists(IMPORTANCE, min_size=1, max_size=8))
        importance = rng.choice(few, (n, s))
    elif kind == "one" and s:
        importance[rng.integers(n), rng.integers(s)] = 3e38
    kept = (rng.random((n, s)) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))).astype(np.uint8)
    fixed = np.zeros((n, s), np.uint8)
    for i in range(n):
        real = np.flatnonzero(kept[i])
        fixed[i, real[: draw(st.integers(0, 20))]] = 1
        window = draw(st.integers(0, 40))
        fixed[i, real[len(real) - min(window, len(real)) :]] = 2
    falling = draw(st.booleans())
    tables = rng.random((2, n, 5)).astype(np.float32) * np.float32(draw(st.sampled_from([1.0, 1e-6, 0.0])))
    if falling:
        tables = -np.sort(-tables, axis=-1)
    if draw(st.booleans()):
        tables[..., 4] = 0
    fixed_class = draw(st.integers(0, 1))
    allowed = np.zeros(25, np.uint8)
    choice = draw(st.sampled_from(["all", "rectangle", "any", "one"]))
    if fixed_class or choice == "one":
        allowed[draw(st.integers(0, 24))] = 1
    elif choice == "any":
        allowed[draw(st.lists(st.integers(0, 24), min_size=1, max_size=25))] = 1
    else:
        rows, columns = np.ones(5, bool), np.ones(5, bool)
        if choice == "rectangle":
            rows, columns = rng.random(5) < 0.6, rng.random(5) < 0.6
            rows[draw(st.integers(0, 4))] = columns[draw(st.integers(0, 4))] = True
        allowed = np.outer(rows, columns).astype(np.uint8).reshape(-1)
    counts = st.none() | st.lists(st.sampled_from([0, 1, 16, 63, 64, 65, 128, 200, 10**6]), min_size=n, max_size=n)
    least, guard = draw(counts), draw(counts)
    return Plan(
        importance.astype(np.float32),
        kept,
        fixed,
        tables[0].copy(),
        tables[1].copy(),
        (rng.random(n) * draw(st.sampled_from([0.0, 0.5, 4.0]))).astype(np.float32),
        allowed.reshape(5, 5),
        None if least is None else np.array(least, np.int32),
        None if guard is None else np.array(guard, np.int32),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from([0, 8, 1000])),
        draw(st.sampled_from([0, 16])),
        fixed_class,
    )


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), st.data())
def test_definition(plan: Plan, data: st.DataObject) -> None:
    try:
        free = make_plan(plan, -1)
    except ValueError:
        with pytest.raises(ValueError, match=r"^plan: guard: expected room for the least_tokens of list"):
            run(plan, -1)
        return
    assert not isinstance(free, int)
    low, high = free.least_bytes, max(free.most_bytes, free.least_bytes)
    budgets = [-1, low, high, high - 1, data.draw(st.integers(low, high)), data.draw(st.integers(low, high)), low - 1]
    for budget in budgets:
        want = make_plan(plan, budget)
        if isinstance(want, int):
            with pytest.raises(_C.BudgetError) as raised:
                run(plan, budget)
            assert raised.value.least_bytes == want == low
            continue
        k_bits, v_bits, summary = run(plan, budget)
        np.testing.assert_array_equal(k_bits, want.k_bits)
        np.testing.assert_array_equal(v_bits, want.v_bits)
        assert summary[:3] == (want.bytes, want.least_bytes, want.most_bytes)
        check_invariants(plan, budget, k_bits, v_bits, summary)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans())
def test_more_budget_is_never_worse(plan: Plan) -> None:
    try:
        *_, (_, least, most, _, _, floor) = run(plan, -1)
    except ValueError:
        return
    if plan.fixed_class and (plan.distortion_k[:, :, None] + plan.distortion_v[:, None, :]).max() > plan.drop.min():
        return  # storing some tokens is worse than dropping them, and asked for
    last = np.inf
    for budget in np.unique(np.linspace(least, max(least, most), 60).astype(np.int64)).tolist():
        k_bits, v_bits, summary = run(plan, budget)
        check_invariants(plan, budget, k_bits, v_bits, summary)
        assert summary[5] <= last * (1 + 1e-12)
        last = summary[5]
    assert last == floor


def test_a_free_step_behind_a_dear_one_does_not_make_a_smaller_budget_better() -> None:
    """List 0's short last run goes to (16, 16) for nothing once the run before it is there. List 1's step is the next
    in order and saves more than that run's alone, but less than both: one byte less of budget must not buy both."""
    importance = np.ones((2, 96))
    importance[1] = 0.5322
    plan = simple(
        importance,
        distortion_k=np.tile(np.array([1, 1, 1, 0.5, 0], np.float32), (2, 1)),
        distortion_v=np.tile(np.array([1, 1, 1, 0.5, 0], np.float32), (2, 1)),
        drop=np.array([100, 3], np.float32),
        allowed=np.diag([0, 0, 0, 1, 1]).astype(np.uint8),
    )
    plan.kept[1, 64:] = 0
    packed, whole = plan.page_bytes(8, 8), 4 * plan.tail_bytes
    assert packed > whole - packed and 2 * plan.tail_bytes <= packed
    base = 2 * plan.list_bytes + 2 * packed
    k_bits, _, (_, _, _, _, _, worse) = run(plan, base + packed - 1)
    assert k_bits[0].tolist() == [16] * 64 + [8] * 32 and not k_bits[1].any()
    k_bits, _, (_, _, _, _, _, better) = run(plan, base + packed)
    assert k_bits[0].tolist() == [8] * 96 and (k_bits[1, :64] == 8).all()
    assert better < worse
    np.testing.assert_array_equal(run(plan, base + whole - packed + packed)[0], [[16] * 96, [8] * 64 + [0] * 32])


def test_every_byte_of_a_small_range() -> None:
    """Each budget on its own, where short last runs and shared 16-token pages make costs uneven."""
    rng = np.random.default_rng(4)
    plan = simple(rng.exponential(size=(2, 140)) ** 2)
    plan.fixed[:, :5] = 1
    *_, (_, least, most, *_) = run(plan, -1)
    last, sizes = np.inf, set()
    for budget in range(least, most + 1, 37):
        *_, (total, _, _, _, _, error) = run(plan, budget)
        assert total <= budget
        assert error <= last * (1 + 1e-12)
        last = error
        sizes.add(total)
    assert len(sizes) > 20


def assignments(plan: Plan, i: int) -> tuple[Array, Array]:
    """(bytes, error) of every assignment of allowed classes, or dropped, to the runs of list i, falling or not."""
    runs = make_list(plan, i).runs
    weights = [float(plan.importance[i, run].astype(np.float64).sum()) for run in runs]
    classes: list[tuple[int, int] | None] = [None, *zip(*np.nonzero(plan.allowed), strict=True)]
    sinks = int((plan.fixed[i] == 1).sum())
    costs, errors = [], []
    for choice in itertools.product(classes, repeat=len(runs)):
        tail, cost, error = sinks, plan.list_bytes, 0.0
        for run_tokens, weight, bits in zip(runs, weights, choice, strict=True):
            if bits is None:
                error += weight * float(plan.drop[i])
                continue
            k, v = bits
            error += weight * (float(plan.distortion_k[i, k]) + float(plan.distortion_v[i, v]))
            if k == v == 4:
                tail += len(run_tokens)
            else:
                cost += plan.page_bytes(BITS[k], BITS[v])
        costs.append(cost + -(-tail // 16) * plan.tail_bytes)
        errors.append(error)
    return np.array(costs), np.array(errors)


def largest_step(plan: Plan) -> float:
    largest = 0.0
    for i in range(len(plan.kept)):
        made = make_list(plan, i)
        for next_of in (made.packed_next, made.free_next):
            for now, after in next_of.items():
                step = made.levels[now].distortion - made.levels[after].distortion
                largest = max(largest, *(weight * step for weight in made.weights))
    return largest


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2), st.integers(0, 63), st.integers(0, 9), st.integers(0, 2))
def test_near_the_optimum(seed: int, full: int, short: int, sinks: int, entry: int) -> None:
    """Within one step's saving of the best of all assignments; a short last run may lose what it can save in all."""
    rng = np.random.default_rng(seed)
    s = 64 * full + short + sinks
    rows, columns = np.zeros(5), np.zeros(5)
    rows[rng.permutation(5)[:2]] = columns[rng.permutation(5)[:2]] = 1
    plan = simple(
        rng.exponential(size=(2, s)) ** 3,
        distortion_k=-np.sort(-rng.random((2, 5)).astype(np.float32)),
        distortion_v=-np.sort(-rng.random((2, 5)).astype(np.float32)),
        drop=(rng.random(2) * 3 + 1).astype(np.float32),
        allowed=np.outer(rows, columns).astype(np.uint8),
        entry_bytes=(0, 8, 5000)[entry],
    )
    plan.fixed[:, :sinks] = 1
    (costs, errors), (other_costs, other_errors) = assignments(plan, 0), assignments(plan, 1)
    costs, errors = np.add.outer(costs, other_costs).ravel(), np.add.outer(errors, other_errors).ravel()
    fixed_error = sum(
        float(plan.importance[i, :sinks].sum(dtype=np.float64))
        * (float(plan.distortion_k[i, 4]) + float(plan.distortion_v[i, 4]))
        for i in range(2)
    )
    slack = largest_step(plan)
    if short:
        for i in range(2):
            made = make_list(plan, i)
            slack += made.weights[-1] * (made.levels[0].distortion - made.levels[-1].distortion)
    *_, (_, least, most, *_) = run(plan, -1)
    for budget in np.linspace(least, most, 25).astype(np.int64).tolist():
        error = run(plan, budget)[2][5] - fixed_error
        best = errors[costs <= budget].min()
        assert error <= (best + slack) * (1 + 1e-9)
        assert error >= best * (1 - 1e-9) - 1e-9 * fixed_error


# ---- one class for a group of lists


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Plan, Array]:
    plan = draw(plans())
    plan.fixed_class = 0
    n = len(plan.kept)
    return plan, np.array(draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)), np.int32)


def classes_of(plan: Plan, groups: Array, k_bits: Array, v_bits: Array) -> dict[int, tuple[int, int]]:
    """The class of every group with candidates, which must be one for all of them."""
    free = (plan.kept > 0) & (plan.fixed == 0)
    found = {}
    for g in np.unique(groups).tolist():
        chosen = free & (groups == g)[:, None]
        pairs = set(zip(k_bits[chosen].tolist(), v_bits[chosen].tolist(), strict=True))
        assert len(pairs) <= 1
        if pairs:
            found[g] = pairs.pop()
    return found


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(grouped(), st.data())
def test_groups_definition(case: tuple[Plan, Array], data: st.DataObject) -> None:
    plan, groups = case
    try:
        free = make_group_plan(plan, groups, -1)
    except ValueError:
        with pytest.raises(ValueError, match=r"^plan: guard: expected room for the least_tokens of list"):
            run(plan, -1, groups)
        return
    assert isinstance(free, GroupPlan)
    low, high = free.least_bytes, free.most_bytes
    for budget in [-1, low, high, high - 1, data.draw(st.integers(low, high)), low - 1]:
        want = make_group_plan(plan, groups, budget)
        if isinstance(want, int):
            with pytest.raises(_C.BudgetError) as raised:
                run(plan, budget, groups)
            assert raised.value.least_bytes == want == low
            continue
        k_bits, v_bits, summary = run(plan, budget, groups)
        assert summary[1:3] == (want.least_bytes, want.most_bytes)
        assert summary[3] == np.count_nonzero(plan.kept)
        np.testing.assert_allclose(summary[5], want.error, rtol=1e-9, atol=1e-300)
        check_invariants(plan, budget, k_bits, v_bits, summary)
        classes_of(plan, groups, k_bits, v_bits)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(grouped())
def test_groups_more_budget_is_never_worse(case: tuple[Plan, Array]) -> None:
    plan, groups = case
    try:
        *_, (_, least, most, _, _, floor) = run(plan, -1, groups)
    except ValueError:
        return
    last = np.inf
    for budget in np.unique(np.linspace(least, most, 60).astype(np.int64)).tolist():
        k_bits, v_bits, summary = run(plan, budget, groups)
        check_invariants(plan, budget, k_bits, v_bits, summary)
        assert summary[5] <= last * (1 + 1e-12)
        last = summary[5]
    np.testing.assert_allclose(last, floor, rtol=1e-12)


def test_many_groups_take_steps_only() -> None:
    """Above 256 lists, where every list's class is known from the steps alone."""
    rng = np.random.default_rng(7)
    plan = realistic(rng, 300, 100)
    plan.kept[:] = np.arange(100) < rng.integers(0, 101, 300)[:, None]
    groups = rng.permutation(300).astype(np.int32)
    *_, (_, least, most, *_) = run(plan, -1, groups)
    last = np.inf
    for budget in np.linspace(least, most, 12).astype(np.int64).tolist():
        want = make_group_plan(plan, groups, budget)
        assert isinstance(want, GroupPlan)
        k_bits, v_bits, summary = run(plan, budget, groups)
        for g, pair in classes_of(plan, groups, k_bits, v_bits).items():
            assert pair == tuple(BITS[c] for c in want.classes[g])
        assert summary[5] <= last
        last = summary[5]


def test_a_head_that_matters_gets_the_bits() -> None:
    importance = np.ones((4, 200))
    importance[2] = 50
    plan = simple(importance, drop=np.full(4, 1e9, np.float32))
    each, together = np.arange(4, dtype=np.int32), np.array([3, 3, 0, 0], np.int32)
    *_, (_, least, *_) = run(plan, -1, each)
    assert least == 4 * (plan.list_bytes + 4 * plan.page_bytes(2, 2))
    extra = 4 * (plan.page_bytes(8, 8) - plan.page_bytes(2, 2))
    k_bits, v_bits, _ = run(plan, least + extra, each)
    assert [int(row[0]) for row in k_bits] == [2, 2, 8, 2]
    np.testing.assert_array_equal(k_bits, v_bits)
    k_bits, v_bits, _ = run(plan, least + 2 * extra, together)
    assert [int(row[0]) for row in k_bits] == [2, 2, 8, 8]


def test_sixteen_bits_need_a_guard_over_the_whole_group() -> None:
    plan = simple(np.ones((3, 100)), guard=np.array([100, 99, 100], np.int32))
    k_bits, v_bits, _ = run(plan, -1, np.array([0, 0, 1], np.int32))
    whole = [(int(k[0]), int(v[0])) == (16, 16) for k, v in zip(k_bits, v_bits, strict=True)]
    assert whole == [False, False, True]


@pytest.mark.parametrize("groups", [None, np.array([0, 1, 1], np.int32)])
def test_bytes_are_what_the_arena_hands_out(groups: Array | None) -> None:
    """Tokens of a list and class fill pages, the tail has pages of its own; each is one entry of a table."""
    plan = simple(np.random.default_rng(6).exponential(size=(3, 500)) ** 3)
    plan.kept[:, 450:] = np.array([[1], [0], [1]])
    plan.fixed[:, :4], plan.fixed[:, 430:450] = 1, 2
    plan.fixed[:, 450:] = np.array([[2], [0], [2]])
    *_, (_, least, most, *_) = run(plan, -1, groups)
    for budget in np.linspace(least, most, 9).astype(np.int64).tolist():
        k_bits, v_bits, summary = run(plan, budget, groups)
        arena, entries = _C.Arena(), 0
        for i in range(3):
            tail = plan.fixed[i] == 2
            for part, k, v in itertools.product((tail, ~tail), BITS, BITS):
                tokens = int((part & (k_bits[i] == k) & (v_bits[i] == v)).sum())
                pages = -(-tokens // _C.page_tokens(k, v))
                arena.alloc(_C.page_bytes(plan.layout, k, v), pages)
                entries += pages
        assert summary[0] == arena.used + entries * plan.entry_bytes + 3 * plan.list_bytes
        assert summary[4] == entries


# ---- exact optima

MEASURED = np.array([0.116, 0.036, 0.011, 4e-5, 0], np.float32)  # of N(0, 1) at 2, 3, 4, 8, 16 bits


def realistic(rng: np.random.Generator, n: int, s: int) -> Plan:
    """Heavy-tailed importance, lists of unequal weight and sensitivity, the classes that policies allow."""
    tails = [rng.lognormal(0, 2, (n, s)), rng.pareto(1.2, (n, s)) + 1e-3, rng.exponential(size=(n, s)) ** 4]
    scale = rng.lognormal(0, 0.5, (2, n, 1))
    allowed = np.zeros((5, 5), np.uint8)
    allowed[:4, :4] = allowed[4, 4] = 1
    return simple(
        tails[rng.integers(3)] * rng.lognormal(0, 1, (n, 1)),
        distortion_k=(MEASURED * scale[0]).astype(np.float32),
        distortion_v=(MEASURED * scale[1]).astype(np.float32),
        drop=scale.sum((0, 2)).astype(np.float32),
        allowed=allowed,
        layout=(64, 64, 1, 1, 0),
        entry_bytes=0,
    )


def gaps(plan: Plan, optimum: Optimum, ratios: list[float], groups: Array | None = None) -> list[float]:
    """How far the error is above the optimum, as a part of it, at budgets that are a part of the best plan's bytes."""
    _, _, (_, least, most, *_) = run(plan, -1, groups)
    found = []
    for ratio in ratios:
        budget = int(most / ratio)
        if budget >= least:
            error, best = run(plan, budget, groups)[2][5], optimum(budget)
            assert error >= best * (1 - 1e-9)
            found.append(error / best - 1)
    return found


@pytest.mark.parametrize("s", [1024, 1000])
def test_runs_within_a_percent_of_the_optimum(s: int) -> None:
    """The optimum may give every run any allowed class, as long as no half rises with the rank."""
    found: list[float] = []
    for seed in range(20):
        plan = realistic(np.random.default_rng(seed), 12, s)
        found += gaps(plan, optimum_of_runs(plan), [2, 3, 4, 6, 8, 10, 12, 16])
    assert len(found) == 160
    assert max(found) <= 0.01 and np.median(found) <= 1e-4


@pytest.mark.parametrize(
    ("by", "heads", "ragged", "entry_bytes"),
    [(1, 12, False, 8), (1, 12, True, 0), (2, 12, False, 0), (2, 12, True, 8), (8, 256, False, 0), (1, 256, False, 0)],
)
def test_groups_within_a_percent_of_the_optimum(by: int, heads: int, ragged: bool, entry_bytes: int) -> None:
    found: list[float] = []
    for seed in range(8 if heads > 100 else 40):
        rng = np.random.default_rng(seed)
        plan = realistic(rng, heads, 256)
        plan.entry_bytes = entry_bytes
        if ragged:
            plan.kept[:] = np.arange(256) < rng.integers(64, 257, heads)[:, None]
        groups = (np.arange(heads) // by).astype(np.int32)
        found += gaps(plan, optimum_of_groups(plan, groups), [2, 3, 4, 5, 6], groups)
    assert len(found) >= 30
    assert max(found) <= 0.01 and np.median(found) <= 1e-4


# ---- by hand


def test_equal_scores_fill_the_lower_list_and_the_older_tokens_first() -> None:
    plan = simple(np.ones((2, 256)), allowed=np.diag([0, 0, 1, 0, 0]).astype(np.uint8), list_bytes=0)
    page = plan.page_bytes(4, 4)
    k_bits, _, summary = run(plan, 5 * page + page - 1)
    assert summary[0] == 5 * page
    np.testing.assert_array_equal(k_bits[0], 4)
    np.testing.assert_array_equal(np.flatnonzero(k_bits[1]), np.arange(64))


def test_one_huge_score_gets_the_best_class_first() -> None:
    importance = np.full((3, 200), 1e-3)
    importance[1, 77] = 1e30
    plan = simple(importance)
    k_bits, v_bits, summary = run(plan, 3 * plan.list_bytes + 4 * plan.tail_bytes)
    assert k_bits[1, 77] == v_bits[1, 77] == 16
    assert summary[4] == 4 and not k_bits[[0, 2]].any()


def test_zero_importance_is_kept_while_it_fits() -> None:
    plan = simple(np.zeros((2, 128)))
    *_, (total, least, most, kept, _, error) = run(plan, -1)
    assert (total, kept, error) == (most, 256, 0.0)
    k_bits, _, summary = run(plan, (least + most) // 2)
    assert summary[5] == 0.0 and 0 < np.count_nonzero(k_bits) <= 256


def test_nothing_to_choose() -> None:
    """No candidates, a window longer than the sequence, one token, no tokens, no lists."""
    plan = simple(np.ones((2, 10)))
    plan.fixed[:] = 2
    _, _, summary = run(plan, -1)
    assert summary[:5] == (2 * (plan.tail_bytes + 16),) * 3 + (20, 2)
    plan = simple(np.ones((2, 10)), kept=np.zeros((2, 10), np.uint8))
    assert run(plan, 32)[2] == (32, 32, 32, 0, 0, 0.0)
    plan = simple(np.ones((1, 1)))
    assert run(plan, -1)[2] == (16 + plan.tail_bytes, 16, 16 + plan.tail_bytes, 1, 1, 0.0)
    assert run(simple(np.ones((2, 0))), -1)[2] == (32, 32, 32, 0, 0, 0.0)
    assert run(simple(np.ones((0, 5))), 0)[2] == (0, 0, 0, 0, 0, 0.0)


def test_short_run_beside_sinks_is_free() -> None:
    """Ten candidates fit into the page that six sinks have to pay for anyway."""
    plan = simple(np.ones((1, 16)))
    plan.fixed[0, :6] = 1
    k_bits, _, summary = run(plan, plan.list_bytes + plan.tail_bytes)
    assert (k_bits == 16).all()
    assert summary[:5] == (16 + plan.tail_bytes, 16 + plan.tail_bytes, 16 + plan.tail_bytes, 16, 1)


def test_sinks_and_runs_share_pages_but_not_with_the_window() -> None:
    plan = simple(np.ones((1, 64 + 20 + 4 + 3)), allowed=np.diag([0, 0, 0, 0, 1]).astype(np.uint8))
    plan.fixed[0, :4], plan.fixed[0, -3:] = 1, 2
    _, _, summary = run(plan, -1)
    assert summary[4] == -(-(4 + 64 + 20) // 16) + 1
    assert summary[0] == summary[4] * plan.tail_bytes + 16


def test_budget_at_and_below_the_least() -> None:
    plan = simple(np.random.default_rng(1).random((2, 300)), least_tokens=np.array([100, 0], np.int32))
    plan.fixed[:, :4], plan.fixed[:, -32:] = 1, 2
    least = 2 * 16 + 2 * 3 * plan.tail_bytes + 2 * plan.page_bytes(2, 2)
    k_bits, v_bits, summary = run(plan, least)
    assert summary[:2] == (least, least)
    assert np.count_nonzero(k_bits[0] == 2) == np.count_nonzero(v_bits[0] == 2) == 128
    assert np.count_nonzero(k_bits[1]) == 36
    for budget in (least - 1, 0):
        with pytest.raises(_C.BudgetError) as raised:
            run(plan, budget)
        assert str(raised.value) == f"plan: budget: expected at least {least} bytes, got {budget}"
        assert raised.value.least_bytes == least
        assert isinstance(raised.value, ValueError)


def test_fixed_class_keeps_what_fits() -> None:
    importance = np.random.default_rng(2).exponential(size=(2, 640))
    allowed = np.diag([0, 0, 0, 1, 0]).astype(np.uint8)
    plan = simple(importance, allowed=allowed, fixed_class=1)
    page = plan.page_bytes(8, 8)
    k_bits, v_bits, summary = run(plan, 32 + 7 * page)
    assert summary[0] == 32 + 7 * page
    assert set(np.unique(k_bits)) == {0, 8} and summary[3] == 7 * 64
    np.testing.assert_array_equal(k_bits, v_bits)
    plan.drop[:] = 0  # though nothing is saved by it
    assert run(plan, -1)[2][3] == 2 * 640


def test_guard_is_an_upper_bound_of_whole_runs() -> None:
    importance = np.random.default_rng(3).exponential(size=(3, 300))
    plan = simple(importance, guard=np.array([0, 130, 300], np.int32))
    k_bits, v_bits, _ = run(plan, -1)
    assert [int(((k == 16) & (v == 16)).sum()) for k, v in zip(k_bits, v_bits, strict=True)] == [0, 128, 300]
    assert (k_bits > 0).all()


def test_threads_do_not_change_a_bit() -> None:
    plan = simple(np.random.default_rng(5).exponential(size=(130, 500)) ** 3)
    before, results = _C.threads(), []
    try:
        for threads in (1, 3):
            _C.set_threads(threads)
            results.append(run(plan, 6_000_000))
    finally:
        _C.set_threads(before)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


# ---- refusals


def good() -> dict[str, Any]:
    plan = simple(np.ones((2, 70)))
    return {
        "k_bits": np.full((2, 70), 7, np.uint8),
        "v_bits": np.full((2, 70), 7, np.uint8),
        "importance": plan.importance,
        "kept": plan.kept,
        "fixed": plan.fixed,
        "distortion_k": plan.distortion_k,
        "distortion_v": plan.distortion_v,
        "drop": plan.drop,
        "allowed": plan.allowed,
        "least_tokens": np.array([0, 10], np.int32),
        "guard": np.array([64, 64], np.int32),
        "groups": None,
        "workspace": workspace(_C.plan_workspace(2, 70)),
        "layout": (128, 128, 1, 1, 0),
        "budget": -1,
        "entry_bytes": 8,
        "list_bytes": 16,
        "fixed_class": 0,
    }


def put(name: str, at: Any, value: Any) -> dict[str, Any]:
    array = good()[name]
    array[at] = value
    return {name: array}


ONE = "allowed: expected one class with fixed_class, got 25"
WINDOW = "fixed: expected window tokens (2) after all others that are kept, got token 6 of list 1 after one"
ONLY_WHOLE = np.diag([0, 0, 0, 0, 1]).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"k_bits": np.zeros((2, 70), np.int32)}, TypeError, "k_bits: expected uint8, got int32"),
        ({"k_bits": np.zeros(70, np.uint8)}, ValueError, "k_bits: expected shape (*, *), got (70,)"),
        ({"v_bits": np.zeros((2, 69), np.uint8)}, ValueError, "v_bits: expected shape (2, 70), got (2, 69)"),
        ({"importance": np.ones((2, 70))}, TypeError, "importance: expected float32, got float64"),
        ({"kept": np.ones((1, 70), np.uint8)}, ValueError, "kept: expected shape (2, 70), got (1, 70)"),
        ({"fixed": np.ones((2, 70), np.int32)}, TypeError, "fixed: expected uint8, got int32"),
        ({"distortion_k": np.ones((2, 4), np.float32)}, ValueError, "distortion_k: expected shape (2, 5), got (2, 4)"),
        ({"distortion_v": np.ones((1, 5), np.float32)}, ValueError, "distortion_v: expected shape (2, 5), got (1, 5)"),
        ({"drop": np.ones(3, np.float32)}, ValueError, "drop: expected shape (2,), got (3,)"),
        ({"allowed": np.ones((5, 4), np.uint8)}, ValueError, "allowed: expected shape (5, 5), got (5, 4)"),
        ({"least_tokens": np.zeros(3, np.int32)}, ValueError, "least_tokens: expected shape (2,), got (3,)"),
        ({"guard": np.zeros(2)}, TypeError, "guard: expected int32, got float64"),
        ({"workspace": workspace(64)}, ValueError, f"workspace: expected {_C.plan_workspace(2, 70)} bytes, got 64"),
        (
            {"layout": (72, 72, 1, 1, 0)},
            NotImplementedError,
            "head_dim: expected 64, 80, 96, 128 or 256, got 72",
        ),
        ({"entry_bytes": -1}, ValueError, f"entry_bytes: expected an integer in 0..{2**63 - 1}, got -1"),
        ({"entry_bytes": 2**20 + 1}, ValueError, "entry_bytes: expected 0..1048576, got 1048577"),
        ({"list_bytes": 2**20 + 1}, ValueError, "list_bytes: expected 0..1048576, got 1048577"),
        ({"fixed_class": 2}, ValueError, "fixed_class: expected an integer in 0..1, got 2"),
        ({"fixed_class": 1}, ValueError, ONE),
        ({"allowed": np.zeros((5, 5), np.uint8)}, ValueError, "allowed: expected at least one class, got none"),
        (put("allowed", (0, 0), 2), ValueError, "allowed: expected 0 or 1, got 2"),
        (
            put("importance", (1, 3), np.nan),
            ValueError,
            "importance: expected finite values >= 0, got nan at list 1, token 3",
        ),
        (
            put("importance", (1, 3), np.inf),
            ValueError,
            "importance: expected finite values >= 0, got inf at list 1, token 3",
        ),
        (
            put("importance", (0, 69), -1e-3),
            ValueError,
            "importance: expected finite values >= 0, got -0.001 at list 0, token 69",
        ),
        (
            put("distortion_k", (1, 2), np.nan),
            ValueError,
            "distortion_k: expected finite values >= 0, got nan for list 1",
        ),
        (put("distortion_v", (0, 4), -1), ValueError, "distortion_v: expected finite values >= 0, got -1 for list 0"),
        (put("drop", 1, np.inf), ValueError, "drop: expected finite values >= 0, got inf for list 1"),
        (put("least_tokens", 1, -2), ValueError, "least_tokens: expected counts >= 0, got -2 for list 1"),
        (put("guard", 0, -1), ValueError, "guard: expected counts >= 0, got -1 for list 0"),
        (put("kept", (1, 5), 2), ValueError, "kept: expected 0 or 1, got 2 at list 1, token 5"),
        (
            put("fixed", (1, 5), 3),
            ValueError,
            "fixed: expected 0, 1 or 2, and 0 where kept is 0, got 3 at list 1, token 5",
        ),
        (
            put("fixed", (0, 5), 1) | put("kept", (0, 5), 0),
            ValueError,
            "fixed: expected 0, 1 or 2, and 0 where kept is 0, got 1 at list 0, token 5",
        ),
        (put("fixed", (1, 5), 2), ValueError, WINDOW),
        (
            {"allowed": ONLY_WHOLE, "guard": np.array([0, 63], np.int32)},
            ValueError,
            "guard: expected room for the least_tokens of list 1, for which only (16, 16) is allowed, got 63",
        ),
        ({"groups": np.zeros(3, np.int32)}, ValueError, "groups: expected shape (2,), got (3,)"),
        ({"groups": np.zeros(2, np.int64)}, TypeError, "groups: expected int32, got int64"),
        ({"groups": np.array([0, 2], np.int32)}, ValueError, "groups: expected 0..1, got 2 for list 1"),
        ({"groups": np.array([-1, 0], np.int32)}, ValueError, "groups: expected 0..1, got -1 for list 0"),
        (
            {"groups": np.zeros(2, np.int32), "fixed_class": 1, "allowed": ONLY_WHOLE},
            ValueError,
            "fixed_class: expected 0 with groups, got 1",
        ),
        (
            {"groups": np.zeros(2, np.int32), "allowed": ONLY_WHOLE},
            ValueError,
            "guard: expected room for the least_tokens of list 0, for which only (16, 16) is allowed, got 64",
        ),
        (
            {"groups": np.zeros(2, np.int32), "budget": 5},
            _C.BudgetError,
            "budget: expected at least 18496 bytes, got 5",
        ),
        ({"budget": 5}, _C.BudgetError, "budget: expected at least 4648 bytes, got 5"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = good() | change
    before = arguments["k_bits"].copy(), arguments["v_bits"].copy()
    with pytest.raises(error) as raised:
        _C.plan(*arguments.values())
    assert str(raised.value) == f"plan: {sentence}"
    np.testing.assert_array_equal(arguments["k_bits"], before[0])
    np.testing.assert_array_equal(arguments["v_bits"], before[1])


def test_count_and_sizes() -> None:
    with pytest.raises(TypeError, match="plan: expected 18 positional arguments, got 0"):
        _C.plan()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"plan_workspace: n: expected an integer in 0..2147483647, got -1"):
        _C.plan_workspace(-1, 1)
    assert _C.plan_workspace(2**31 - 1, 2**31 - 1) == 2**63 - 1
