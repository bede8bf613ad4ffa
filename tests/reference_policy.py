"""What score, norms, accumulate, select, ada, share, pyramid and plan must give, in NumPy's fp64 and plain Python.

Straight from the contracts; nothing here shares code or structure with csrc: loops over rows, sorted lists, fractions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BITS = (2, 3, 4, 8, 16)


def workspace(nbytes: int) -> Array:
    """Zeroed bytes at a 64-byte boundary, (nbytes,) uint8."""
    memory = np.zeros(nbytes + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + nbytes]


# ---- score


def probabilities(queries: Array, keys: Array, scale: float, softcap: float) -> Array:
    """Softmax rows (w,s) of the last w queries (w,d) over keys (s,d), query r seeing keys 0 .. s-w+r."""
    w, s = len(queries), len(keys)
    logits = queries.astype(np.float64) @ keys.astype(np.float64).T * scale
    if softcap > 0:
        logits = softcap * np.tanh(logits / softcap)
    logits[np.arange(s)[None, :] > np.arange(s - w, s)[:, None]] = -np.inf
    weights: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def pooled(values: Array, width: int, kind: int) -> Array:
    """Average (0) or maximum (1) over `width` tokens, those outside left out."""
    take = (np.mean, np.max)[kind]
    half = width // 2
    return np.array([float(take(values[max(t - half, 0) : t + half + 1])) for t in range(len(values))])


def score(
    queries: Array,
    keys: Array,
    first: Array | None,
    scale: float,
    softcap: float = 0.0,
    reduce: int = 0,
    pool_kind: int = 0,
    pool: int = 1,
) -> Array:
    """Importance (b,h,s) float64 of queries (b,hq,w,d) over keys (b,h,s,d)."""
    b, hq, w, _ = queries.shape
    h, s = keys.shape[1:3]
    out = np.zeros((b, h, s))
    for i in range(b):
        begin = 0 if first is None else int(first[i])
        used = min(w, s - begin)
        if used == 0:
            continue
        for j in range(h):
            heads = range(j * (hq // h), (j + 1) * (hq // h))
            rows = [probabilities(queries[i, g, w - used :], keys[i, j, begin:], scale, softcap) for g in heads]
            seen = np.count_nonzero(np.arange(s - begin)[None, :] <= np.arange(s - begin)[-used:, None], axis=0)
            by = {0: 1, 1: used, 2: seen}[reduce]
            mass = np.mean([np.sum(r, axis=0) / by for r in rows], axis=0)
            out[i, j, begin : s - used] = pooled(mass[:-used], pool, pool_kind)
            out[i, j, s - used :] = pooled(mass[-used:], pool, pool_kind)
    return out


def score_bound(queries: Array, keys: Array, scale: float) -> float:
    """Relative error an importance may have in fp32: the logits' rounding, which softmax turns into a factor, and sums.

    A dot product of d terms is off by at most (d + 2) * 2^-24 * sum |q k|; numerator and denominator both carry it.
    Exponentials are within 4e-7, sums over rows and chunks within a thousand roundings.
    """
    d = queries.shape[-1]
    longest = np.abs(queries.astype(np.float64)).sum(-1).max(initial=0) * np.abs(keys.astype(np.float64)).max(initial=0)
    return math.expm1(2 * (d + 2) * 2.0**-24 * abs(scale) * longest) + 1e-6 + 1000 * 2.0**-24


def norms(rows: Array, first: Array | None, centered: bool) -> Array:
    """L2 norms (b,h,s) float64 of rows (b,h,s,d), 0 before first."""
    b, h, s, _ = rows.shape
    out = np.zeros((b, h, s))
    for i in range(b):
        begin = 0 if first is None else int(first[i])
        for j in range(h if begin < s else 0):
            real = rows[i, j, begin:].astype(np.float64)
            out[i, j, begin:] = np.sqrt(((real - (real.mean(axis=0) if centered else 0)) ** 2).sum(axis=1))
    return out


def accumulate(worth: Array, mass: Array, pages: list[list[int]], keep: float, gain: float) -> Array:
    """worth (n,c) after mass (n,m), float64; pages: tokens of every page in use, by list."""
    out = np.zeros(worth.shape)
    for i, tokens in enumerate(pages):
        ends = np.cumsum([0, *tokens])
        for p in range(len(tokens)):
            out[i, p] = keep * float(worth[i, p]) + gain * math.fsum(mass[i, ends[p] : ends[p + 1]].tolist())
    return out


# ---- select


def select(importance: Array | None, keep: int, first: int, s: int, sinks: int, window: int) -> Array:
    """Kept tokens (s,) bool of one list."""
    real = list(range(first, s))
    count = len(real) if len(real) <= window else min(keep, len(real))
    order = real[len(real) - min(window, len(real)) :][::-1]  # the newest first
    order += [t for t in real[:sinks] if t not in order]
    others = [t for t in real if t not in set(order)]
    order += others[::-1] if importance is None else sorted(others, key=lambda t: (-float(importance[t]), t))
    kept = np.zeros(s, bool)
    kept[order[:count]] = True
    return kept


def ada(
    importance: Array, keep: list[int], first: list[int], heads: int, floor: list[int], sinks: int, window: int
) -> Array:
    """Kept tokens (n,s) bool."""
    n, s = importance.shape
    kept = np.array(
        [select(importance[i], floor[i // heads], first[i], s, sinks, window) for i in range(n)], bool
    ).reshape(n, s)
    for b, most in enumerate(keep):
        lists = range(b * heads, (b + 1) * heads)
        others = [(-float(importance[i, t]), i, t) for i in lists for t in range(first[i], s) if not kept[i, t]]
        for _, i, t in sorted(others)[: max(most - int(kept[list(lists)].sum()), 0)]:
            kept[i, t] = True
    return kept


def share_level(weight: list[Fraction], floor: list[int], ceiling: list[int], total: int) -> list[Fraction]:
    """Exact real-valued parts: clip(weight * x, floor, ceiling) with the sum `total`."""
    heavy = sum(c if w else f for w, f, c in zip(weight, floor, ceiling, strict=True))
    if total > heavy:  # what layers with a weight cannot hold goes to the others, evenly
        floor = [c if w else f for w, f, c in zip(weight, floor, ceiling, strict=True)]
        weight = [Fraction(0) if w else Fraction(1) for w in weight]

    def parts(x: Fraction) -> list[Fraction]:
        return [min(max(w * x, Fraction(f)), Fraction(c)) for w, f, c in zip(weight, floor, ceiling, strict=True)]

    bends = {Fraction(bound) / w for w, f, c in zip(weight, floor, ceiling, strict=True) if w for bound in (f, c)}
    low = Fraction(0)
    for high in sorted(bends | {Fraction(0)}):
        if sum(parts(high)) >= total:
            rise = sum(parts(high)) - sum(parts(low))
            return parts(low + (high - low) * (total - sum(parts(low))) / rise if rise else high)
        low = high
    raise AssertionError("total above the sum of ceilings")


def share(weight: list[Fraction], floor: list[int], ceiling: list[int], total: int) -> list[int]:
    """Whole parts: rounded down, then one more to the largest remainders, lower layers first."""
    parts = share_level(weight, floor, ceiling, total)
    shares = [math.floor(p) for p in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (shares[i] - parts[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


# ---- plan


@dataclass
class Plan:
    """Arguments of `plan` in the contract's order, and what they say about sizes."""

    importance: Array
    kept: Array
    fixed: Array
    distortion_k: Array
    distortion_v: Array
    drop: Array
    allowed: Array
    least_tokens: Array | None = None
    guard: Array | None = None
    layout: tuple[int, int, int, int, int] = (128, 128, 1, 1, 0)
    entry_bytes: int = 8
    list_bytes: int = 16
    fixed_class: int = 0

    def page_bytes(self, k_bits: int, v_bits: int) -> int:
        d, group, zero_point, _, e5m3 = self.layout
        pair = (2 if zero_point else 1) * (1 if e5m3 else 2)
        tokens = 16 if k_bits == v_bits == 16 else 64
        halves = 0
        for bits in (k_bits, v_bits):
            halves += tokens * d * bits // 8 + (0 if bits == 16 else tokens * (d // group) * pair)
        return -(-halves // 128) * 128 + self.entry_bytes

    @property
    def tail_bytes(self) -> int:
        return self.page_bytes(16, 16)

    def candidates(self, i: int) -> list[int]:
        tokens = np.flatnonzero((self.kept[i] == 1) & (self.fixed[i] == 0))
        return sorted(tokens.tolist(), key=lambda t: (-float(self.importance[i, t]), t))


def plan_bytes(plan: Plan, k_bits: Array, v_bits: Array) -> tuple[int, int]:
    """Bytes and pages of bits (n,s): exact, from the bits alone and the rule that runs are 64 tokens by importance."""
    total = pages = 0
    for i in range(len(k_bits)):
        tail = int((plan.fixed[i] == 1).sum())
        order = plan.candidates(i)
        for at in range(0, len(order), 64):
            run = order[at : at + 64]
            classes = {(int(k_bits[i, t]), int(v_bits[i, t])) for t in run}
            assert len(classes) == 1, "a run of more than one class"
            (k, v) = classes.pop()
            if (k, v) == (16, 16):
                tail += len(run)
            elif k:
                pages += 1
                total += plan.page_bytes(k, v)
        tail_pages = -(-tail // 16) + -(-int((plan.fixed[i] == 2).sum()) // 16)
        pages += tail_pages
        total += tail_pages * plan.tail_bytes + plan.list_bytes
    return total, pages


def plan_error(plan: Plan, k_bits: Array, v_bits: Array) -> float:
    """Sum over tokens with kept = 1 of importance times distortion, or times drop."""
    column = {bits: c for c, bits in enumerate(BITS)}
    total = 0.0
    for i, t in zip(*np.nonzero(plan.kept), strict=True):
        k, v = int(k_bits[i, t]), int(v_bits[i, t])
        d = float(plan.drop[i])
        if k:
            d = float(plan.distortion_k[i, column[k]]) + float(plan.distortion_v[i, column[v]])
        total += float(plan.importance[i, t]) * d
    return total


@dataclass
class Level:
    k: int
    v: int
    bytes: int
    distortion: float


@dataclass
class List:
    """Levels of one list, level 0 dropped, and its runs."""

    levels: list[Level]
    start: int  # the level of tokens that must be kept
    packed_next: dict[int, int] = field(default_factory=dict)
    free_next: dict[int, int] = field(default_factory=dict)  # of runs that may be at (16, 16)
    runs: list[list[int]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    guarded: int = 0
    required: int = 0
    last_tail_bytes: int = 0

    def next(self, run: int, level: int) -> int:
        return (self.free_next if run < self.guarded else self.packed_next).get(level, 0)

    def bytes(self, run: int, level: int) -> int:
        here = self.levels[level]
        return self.last_tail_bytes if here.k == here.v == 16 and run == len(self.runs) - 1 else here.bytes

    def best(self, run: int, level: int) -> int:
        while self.next(run, level):
            level = self.next(run, level)
        return level


def make_list(plan: Plan, i: int) -> List:
    order = plan.candidates(i)
    sinks = int((plan.fixed[i] == 1).sum())
    runs = [order[at : at + 64] for at in range(0, len(order), 64)]
    made = List(levels=[Level(0, 0, 0, float(plan.drop[i]))], start=0, runs=runs)
    made.weights = [sum(float(plan.importance[i, t]) for t in run) for run in runs]
    if not runs:
        return made
    least = 0 if plan.least_tokens is None else min(int(plan.least_tokens[i]), len(order))
    guard = len(order) if plan.guard is None else int(plan.guard[i])
    made.required = -(-least // 64)
    made.guarded = len(runs) if guard >= len(order) else guard // 64
    made.last_tail_bytes = (-(-(sinks + len(runs[-1])) // 16) - -(-sinks // 16)) * plan.tail_bytes

    def level(k: int, v: int) -> Level:
        distortion = float(plan.distortion_k[i, k]) + float(plan.distortion_v[i, v])
        return Level(BITS[k], BITS[v], plan.page_bytes(BITS[k], BITS[v]), distortion)

    def below(a: Level, b: Level) -> bool:
        return a.k <= b.k and a.v <= b.v

    classes = [level(k, v) for k, v in zip(*np.nonzero(plan.allowed), strict=True)]
    packed = [c for c in classes if (c.k, c.v) != (16, 16)]
    dropped = math.inf if plan.fixed_class else made.levels[0].distortion

    def climb(start: Level, top: Level) -> list[Level]:
        path = [start]
        while True:
            now = path[-1]
            steps = [c for c in packed if below(c, top) and below(now, c) and c.bytes > now.bytes]
            steps = [c for c in steps if c.distortion < now.distortion]
            if not steps:
                return path
            path.append(max(steps, key=lambda c: ((now.distortion - c.distortion) / (c.bytes - now.bytes), -c.bytes)))

    if packed:
        top = min(packed, key=lambda c: (c.distortion, c.bytes))
        chain = climb(Level(0, 0, 0, dropped), top)[1:]
        entry = chain[0] if chain else top
        cheapest = min((c for c in packed if below(c, entry)), key=lambda c: (c.bytes, c.distortion))
        prefix = climb(cheapest, entry)[:-1]
        made.levels += prefix + (chain or climb(entry, top))
        made.start = 1
        if chain:
            made.packed_next[0] = 1 + len(prefix)
        made.packed_next |= {a: a + 1 for a in range(1, len(made.levels) - 1)}
    made.free_next = dict(made.packed_next)
    whole = [c for c in classes if (c.k, c.v) == (16, 16)]
    if whole and made.guarded and (len(made.levels) == 1 or whole[0].distortion < made.levels[-1].distortion):
        whole[0].bytes = made.last_tail_bytes if len(runs) == 1 else 4 * plan.tail_bytes
        index = len(made.levels)
        for a in range(index):
            now = dropped if a == 0 else made.levels[a].distortion
            if now <= whole[0].distortion:
                continue
            jump = whole[0].bytes - made.levels[a].bytes
            after = made.levels[made.packed_next.get(a, 0)]
            stride, saved = after.bytes - made.levels[a].bytes, now - after.distortion
            if a not in made.packed_next or jump <= 0 or (now - whole[0].distortion) * stride > saved * jump:
                made.free_next[a] = index
        made.levels.append(whole[0])
        if made.start == 0 or (len(runs) == 1 and whole[0].bytes <= made.levels[made.start].bytes):
            made.start = index
    start = made.levels[made.start]
    if made.required > made.guarded and (made.start == 0 or start.k == start.v == 16):
        raise ValueError("guard")
    return made


@dataclass
class Planned:
    k_bits: Array
    v_bits: Array
    bytes: int
    least_bytes: int
    most_bytes: int


def make_plan(plan: Plan, budget: int) -> Planned | int:
    """The plan under `budget` by the contract's rule, or the least bytes where none fits."""
    lists = [make_list(plan, i) for i in range(len(plan.kept))]
    state = [[made.start if r < made.required else 0 for r in range(len(made.runs))] for made in lists]
    tails = sum(-(-int((row == kind).sum()) // 16) for row in plan.fixed for kind in (1, 2))
    fixed = len(plan.fixed) * plan.list_bytes + tails * plan.tail_bytes
    runs = [(i, r) for i, made in enumerate(lists) for r in range(len(made.runs))]
    best = [[lists[i].best(r, at) for r, at in enumerate(row)] for i, row in enumerate(state)]
    base = fixed + sum(lists[i].bytes(r, state[i][r]) for i, r in runs)
    most = fixed + sum(lists[i].bytes(r, best[i][r]) for i, r in runs)
    if 0 <= budget < min(base, most):
        return min(base, most)
    spent = base
    if budget < 0 or budget >= most:
        state, spent = best, most
    else:
        room, dead = math.inf, set()
        while True:
            offers = []
            for i, r in runs:
                made, now = lists[i], state[i][r]
                to = made.next(r, now)
                if not to or (i, r) in dead or (r and state[i][r - 1] < to):
                    continue
                cost = made.bytes(r, to) - made.bytes(r, now)
                saved = made.weights[r] * max(made.levels[now].distortion - made.levels[to].distortion, 0.0)
                offers.append((saved / cost if cost > 0 else math.inf, -i, -r, to, cost, saved))
            if not offers:
                break
            _, i, r, to, cost, saved = max(offers)
            i, r = -i, -r
            if cost > budget - spent:
                room = min(room, saved)
                dead.add((i, r))
            elif saved > room:
                dead.add((i, r))
            else:
                state[i][r] = to
                spent += cost
                room -= saved
    k_bits = np.where(plan.fixed > 0, 16, 0).astype(np.uint8)
    v_bits = k_bits.copy()
    for i, r in runs:
        here = lists[i].levels[state[i][r]]
        k_bits[i, lists[i].runs[r]] = here.k
        v_bits[i, lists[i].runs[r]] = here.v
    return Planned(k_bits, v_bits, spent, min(base, most), most)
