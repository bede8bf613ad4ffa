"""What plan's groups and shrink must give by their contracts, and the exact optima that both are measured against.

Plain Python and NumPy; nothing here shares code with csrc. The optima are dynamic programs over bytes in units of the
greatest common divisor of all costs, so that nothing is rounded: `best[b]` is the least error with at most b units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from reference_policy import BITS, Array, Plan

Class = tuple[int, int]  # columns of the distortion tables


def candidates_of(plan: Plan, i: int) -> int:
    return int(((plan.kept[i] == 1) & (plan.fixed[i] == 0)).sum())


def allowed_classes(plan: Plan) -> list[Class]:
    return [(int(k), int(v)) for k, v in zip(*np.nonzero(plan.allowed), strict=True)]


def distortion(plan: Plan, i: int, pair: Class) -> float:
    return float(plan.distortion_k[i, pair[0]]) + float(plan.distortion_v[i, pair[1]])


def fixed_bytes(plan: Plan) -> int:
    """Bytes of sinks, windows and list states."""
    pages = sum(-(-int((row == kind).sum()) // 16) for row in plan.fixed for kind in (1, 2))
    return len(plan.fixed) * plan.list_bytes + pages * plan.tail_bytes


def fixed_error(plan: Plan) -> float:
    return sum(float(plan.importance[i, t]) * distortion(plan, i, (4, 4)) for i, t in np.argwhere(plan.fixed > 0))


def whole_bytes(plan: Plan, i: int, tokens: int) -> int:
    """What so many tokens at (16, 16) add to the pages of list i's sinks."""
    sinks = int((plan.fixed[i] == 1).sum())
    return (-(-(sinks + tokens) // 16) - -(-sinks // 16)) * plan.tail_bytes


# ---- optima


@dataclass
class Optimum:
    """The least error by bytes: exact at every multiple of `unit` above `base`."""

    base: int
    unit: int
    best: Array

    def __call__(self, budget: int) -> float:
        at = (budget - self.base) // self.unit
        return float("inf") if at < 0 else float(self.best[min(at, len(self.best) - 1)])


def shifted(values: Array, units: int) -> Array:
    """The curve with everything `units` dearer."""
    out = np.full_like(values, np.inf)
    out[units:] = values[: len(values) - units]
    return out


def choose_one(curve: Array, options: Sequence[tuple[int, float]]) -> Array:
    """The curve after one of `options` (units, error)."""
    out = np.full_like(curve, np.inf)
    for units, error in options:
        if units < len(curve):
            np.minimum(out, shifted(curve, units) + error, out=out)
    return out


def optimum_of_runs(plan: Plan) -> Optimum:
    """Every run at an allowed class or dropped, no half rising with the rank; least_tokens and guard kept to."""
    classes: list[Class | None] = [None, *allowed_classes(plan)]

    def below(a: Class | None, b: Class | None) -> bool:
        return a is None or (b is not None and a[0] <= b[0] and a[1] <= b[1])

    lists = []
    for i in range(len(plan.kept)):
        order = plan.candidates(i)
        runs = [order[at : at + 64] for at in range(0, len(order), 64)]
        least = 0 if plan.least_tokens is None else int(plan.least_tokens[i])
        guard = len(order) if plan.guard is None else int(plan.guard[i])
        rows: list[dict[int, tuple[int, float]]] = []
        for r, run in enumerate(runs):
            weight = sum(float(plan.importance[i, t]) for t in run)
            row: dict[int, tuple[int, float]] = {}
            for c, pair in enumerate(classes):
                if pair is None:
                    if r * 64 >= least:
                        row[c] = (0, weight * float(plan.drop[i]))
                elif pair == (4, 4):
                    if guard >= len(order) or (r + 1) * 64 <= guard:
                        row[c] = (whole_bytes(plan, i, len(run)), weight * distortion(plan, i, pair))
                else:
                    row[c] = (plan.page_bytes(BITS[pair[0]], BITS[pair[1]]), weight * distortion(plan, i, pair))
            rows.append(row)
        lists.append(rows)
    costs = [cost for rows in lists for row in rows for cost, _ in row.values() if cost]
    unit = math.gcd(*costs) if costs else 1
    size = 1 + sum(max(cost for cost, _ in row.values()) // unit for rows in lists for row in rows)
    curve = np.zeros(size)
    for rows in lists:
        states = {0: curve} if not rows else {}
        for r, row in enumerate(rows):
            after = {}
            for c, (cost, error) in row.items():
                before = [states[o] for o in states if below(classes[c], classes[o])] if r else [curve]
                if before:
                    after[c] = shifted(np.minimum.reduce(before), cost // unit) + error
            states = after
        curve = np.minimum.reduce(list(states.values()))
    return Optimum(fixed_bytes(plan), unit, curve + fixed_error(plan))


# ---- groups


def members_of(groups: Array) -> dict[int, list[int]]:
    return {int(g): np.flatnonzero(groups == g).tolist() for g in np.unique(groups)}


def group_options(plan: Plan, members: Sequence[int]) -> dict[Class, tuple[int, float]]:
    """Bytes and error of a group's candidates at each class it may have."""
    options = {}
    for pair in allowed_classes(plan):
        cost, error = 0, 0.0
        for i in members:
            tokens = candidates_of(plan, i)
            if pair == (4, 4):
                if plan.guard is not None and plan.guard[i] < tokens:
                    break
                cost += whole_bytes(plan, i, tokens)
            else:
                cost += -(-tokens // 64) * plan.page_bytes(BITS[pair[0]], BITS[pair[1]])
            real = (plan.kept[i] == 1) & (plan.fixed[i] == 0)
            error += sum(plan.importance[i, real].astype(np.float64).tolist()) * distortion(plan, i, pair)
        else:
            options[pair] = (cost, error)
    return options


@dataclass
class Rung:
    """A level of a group."""

    pair: Class
    bytes: int
    error: float

    def below(self, other: Rung) -> bool:
        return self.pair[0] <= other.pair[0] and self.pair[1] <= other.pair[1]


def group_rungs(plan: Plan, members: Sequence[int]) -> tuple[Rung, Rung, list[Rung]]:
    """The cheapest class, that of least error above it, and all from the one to the other."""
    rungs = [Rung(pair, *at) for pair, at in group_options(plan, members).items()]
    if not rungs:
        raise ValueError("guard")
    low = min(rungs, key=lambda rung: (rung.bytes, rung.error))
    high = min((rung for rung in rungs if low.below(rung)), key=lambda rung: (rung.error, rung.bytes))
    return low, high, [rung for rung in rungs if low.below(rung) and rung.below(high)]


def group_levels(plan: Plan, members: Sequence[int]) -> list[Rung]:
    low, _, rungs = group_rungs(plan, members)
    levels = [low]
    while True:
        now = levels[-1]
        steps = [r for r in rungs if now.below(r) and r.bytes > now.bytes and r.error < now.error]
        if not steps:
            return levels
        levels.append(max(steps, key=lambda r: ((now.error - r.error) / (r.bytes - now.bytes), -r.bytes)))


def group_steps(levels: dict[int, list[Rung]], left: int) -> dict[int, int]:
    """The level of every group after steps by error saved per byte, with the rule for steps that do not fit."""
    state = dict.fromkeys(levels, 0)
    room, dead = math.inf, set()
    while True:
        offers = []
        for g, at in state.items():
            if g not in dead and at + 1 < len(levels[g]):
                now, after = levels[g][at], levels[g][at + 1]
                cost, saved = after.bytes - now.bytes, now.error - after.error
                offers.append((saved / cost, -g, cost, saved))
        if not offers:
            return state
        _, g, cost, saved = max(offers)
        if cost > left:
            room = min(room, saved)
        if cost > left or saved > room:
            dead.add(-g)
        else:
            state[-g] += 1
            left -= cost
            room -= saved


def group_least_error(plan: Plan, groups: Array, left: int, reach: int, units: int = 2**14) -> float:
    """The least error of all groups in `left` bytes above the smallest plan, costs rounded up as the contract says."""
    choices = []
    for members in members_of(groups).values():
        low, _, rungs = group_rungs(plan, members)
        open_to = [(rung.bytes - low.bytes, rung.error) for rung in rungs]
        choices.append(
            [(c, e) for c, e in open_to if not any((o, f) != (c, e) and o <= c and f <= e for o, f in open_to)]
        )
    unit = math.gcd(*(cost for row in choices for cost, _ in row))
    unit *= -(-(reach // unit) // units)
    curve = np.zeros(left // unit + 1)
    for row in choices:
        curve = choose_one(curve, [(-(-cost // unit), error) for cost, error in row])
    return float(curve[-1])


@dataclass
class GroupPlan:
    least_bytes: int
    most_bytes: int
    error: float  # with fixed tokens
    classes: dict[int, Class]  # by steps alone


def make_group_plan(plan: Plan, groups: Array, budget: int) -> GroupPlan | int:
    """The plan under `budget` by the contract's rule, or the least bytes where none fits."""
    levels = {g: group_levels(plan, members) for g, members in members_of(groups).items()}
    least = fixed_bytes(plan) + sum(row[0].bytes for row in levels.values())
    most = fixed_bytes(plan) + sum(row[-1].bytes for row in levels.values())
    if 0 <= budget < least:
        return least
    if budget < 0 or budget >= most:
        state = {g: len(row) - 1 for g, row in levels.items()}
    else:
        state = group_steps(levels, budget - least)
    error = sum(levels[g][at].error for g, at in state.items())
    if len(groups) <= 256 and 0 <= budget < most:
        error = min(error, group_least_error(plan, groups, budget - least, most - least))
    classes = {g: levels[g][at].pair for g, at in state.items()}
    return GroupPlan(least, most, error + fixed_error(plan), classes)


def optimum_of_groups(plan: Plan, groups: Array) -> Optimum:
    """Every group at any class it may have."""
    options = [list(group_options(plan, members).values()) for members in members_of(groups).values()]
    least = [min(cost for cost, _ in row) for row in options]
    options = [[(cost - low, error) for cost, error in row] for row, low in zip(options, least, strict=True)]
    unit = math.gcd(*(cost for row in options for cost, _ in row)) or 1
    curve = np.zeros(1 + sum(max(cost for cost, _ in row) for row in options) // unit)
    for row in options:
        curve = choose_one(curve, [(cost // unit, error) for cost, error in row])
    return Optimum(fixed_bytes(plan) + sum(least), unit, curve + fixed_error(plan))


# ---- shrink


@dataclass
class Pages:
    """Arguments of `shrink`."""

    k_bits: Array
    v_bits: Array
    lists: Array
    weight: Array
    distortion_k: Array
    distortion_v: Array
    drop: Array
    allowed: Array
    layout: tuple[int, int, int, int, int] = (128, 128, 1, 1, 0)
    entry_bytes: int = 8

    def page_bytes(self, k_bits: int, v_bits: int) -> int:
        """Bytes of a page and its entry; 0 of an evicted one."""
        if k_bits == 0:
            return 0
        nothing = np.zeros((0, 0))
        sized = Plan(*(nothing,) * 7, layout=self.layout, entry_bytes=self.entry_bytes)
        return sized.page_bytes(k_bits, v_bits)

    def bytes(self) -> int:
        return sum(self.page_bytes(int(k), int(v)) for k, v in zip(self.k_bits, self.v_bits, strict=True))

    def distortion(self, i: int, k_bits: int, v_bits: int) -> float:
        if k_bits == 0:
            return float(self.drop[i])
        return float(self.distortion_k[i, BITS.index(k_bits)]) + float(self.distortion_v[i, BITS.index(v_bits)])

    def errors(self) -> list[float]:
        """Of every page that may be touched, 0 of the others."""
        return [
            float(w) * self.distortion(int(i), int(k), int(v)) if np.isfinite(w) else 0.0
            for i, k, v, w in zip(self.lists, self.k_bits, self.v_bits, self.weight, strict=True)
        ]

    def moves(self, k_bits: int, v_bits: int) -> list[tuple[int, int]]:
        """Classes, (0, 0) among them, that a page of this class may go to."""
        if k_bits == 0:
            return []
        pairs = [(BITS[k], BITS[v]) for k, v in np.argwhere(self.allowed)]
        lower = [pair for pair in pairs if pair[0] <= k_bits and pair[1] <= v_bits]
        now = self.page_bytes(k_bits, v_bits)
        return [(0, 0)] + [pair for pair in lower if self.page_bytes(*pair) < now]


def shrink(pages: Pages, wanted: int) -> tuple[Array, Array, int]:
    """k_bits, v_bits and the bytes freed by the contract's rule."""
    k_bits, v_bits = pages.k_bits.copy(), pages.v_bits.copy()
    freed = 0

    def step(p: int) -> tuple[float, int, int, int]:
        """(error added per byte freed, bytes freed, class) of the page's next step."""
        now, i = (int(k_bits[p]), int(v_bits[p])), int(pages.lists[p])
        found = []
        for pair in pages.moves(*now):
            less = pages.page_bytes(*now) - pages.page_bytes(*pair)
            rate = (pages.distortion(i, *pair) - pages.distortion(i, *now)) / less
            found.append((rate, less, *pair))
        rate, less, k, v = min(found)
        return float(pages.weight[p]) * rate, less, k, v

    while freed < wanted:
        steps = {p: step(p) for p in range(len(k_bits)) if k_bits[p] and np.isfinite(pages.weight[p])}
        left = wanted - freed
        p = min(steps, key=lambda p: (steps[p][0], p))
        if steps[p][1] >= left:
            enough = [p for p, (_, less, *_) in steps.items() if less >= left]
            p = min(enough, key=lambda p: (steps[p][0] * steps[p][1], steps[p][0], p))
        _, less, k_bits[p], v_bits[p] = steps[p]
        freed += less
    return k_bits, v_bits, freed


def optimum_of_shrink(pages: Pages) -> tuple[Array, int]:
    """The least error by units left to the pages that may be touched, and the unit: every page at any of its moves."""
    options = []
    for i, k, v, w in zip(pages.lists, pages.k_bits, pages.v_bits, pages.weight, strict=True):
        if k and np.isfinite(w):
            places = [(int(k), int(v)), *pages.moves(int(k), int(v))]
            options.append([(pages.page_bytes(*at), float(w) * pages.distortion(int(i), *at)) for at in places])
    unit = math.gcd(*(cost for row in options for cost, _ in row)) or 1
    curve = np.zeros(1 + sum(max(cost for cost, _ in row) for row in options) // unit)
    for row in options:
        curve = choose_one(curve, [(cost // unit, error) for cost, error in row])
    return curve, unit
