"""One budget -> the pages of one layer or of all: tokens, their bits, and the bytes that this really takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import _C
from .choose import candidates_of
from .layer_input import Array, LayerInput
from .pages import PageRows, bytes_held, paged
from .policy import BITS, Policy
from .selectors import Hybrid
from .store import PAGE, Layout, workspace

LIST_BYTES = 16 + 2  # a list's state and the class of its aged tokens


@dataclass
class Ready:
    """One layer, measured, before bytes are given to its tokens. Lists are the rows of all arrays.

    Attributes:
        layer: keys and values as they will be packed; its queries are no longer needed.
        index: the layer's number.
        importance: (b, h, s) float32 as measured.
        first: (b,) first real tokens.
        kept, fixed: (lists, s) uint8 as plan takes them.
        tables: distortion_k, distortion_v (lists, 5), drop (lists,); None for fixed bits.
        priority: weight of the layer's error.
        layers: how many layers there are in all.
    """

    layer: LayerInput
    index: int
    importance: Array
    first: Array
    kept: Array
    fixed: Array
    tables: tuple[Array, Array, Array] | None
    priority: float
    layers: int


@dataclass
class Spent:
    """What each layer stores. ``bits``: (k_bits, v_bits) (lists, s) uint8 each."""

    plans: list[PageRows]
    bits: list[tuple[Array, Array]]
    fixed: list[Array]
    least: int | None = None  # bytes of the smallest plan, before the arena rounds up
    over: bool = False  # it is kept although it does not fit


@dataclass(frozen=True)
class Account:
    """What a page-table entry and a list's state take, with all that is kept beside them."""

    layout: Layout
    entry_bytes: int = PAGE.itemsize
    list_bytes: int = LIST_BYTES
    granule: int = 1  # what all slabs together are rounded up to

    def held(self, plans: Sequence[PageRows]) -> int:
        return self._held(plans, self.granule)

    def _held(self, plans: Sequence[PageRows], granule: int) -> int:
        return bytes_held(plans, self.layout, self.entry_bytes, self.list_bytes, granule)

    def excess(self, plans: Sequence[PageRows], budget: int) -> int:
        """Bytes to be saved until as many granules as the budget cannot hold are free; what is held is over it."""
        held = self.held(plans)
        return self._held(plans, 1) - held - (budget - held) // self.granule * self.granule


class Over(Exception):
    """The smallest plan takes ``held`` bytes, more than there are."""

    def __init__(self, held: int) -> None:
        super().__init__(held)
        self.held = held


def spend(ready: Sequence[Ready], policy: Policy, account: Account, budget: int, *, least_if_over: bool) -> Spent:
    """``budget`` bytes over the layers at hand, as the policy allocates. ``Over`` where the smallest plan does not fit
    (``least_if_over``: it is kept)."""
    if policy.allocate == "uniform":
        return _uniform(ready, policy, account, budget, least_if_over)
    return _planned(ready, policy, account, budget, least_if_over)


def fixed_bits(ready: Sequence[Ready], pair: tuple[int, int]) -> Spent:
    """All selected tokens at one class."""
    found = [one_class(one.kept, one.fixed, pair) for one in ready]
    fixed = [marks for _, marks in found]
    return Spent([paged(*bits, marks) for bits, marks in found], [bits for bits, _ in found], fixed)


def one_class(kept: Array, fixed: Array, pair: tuple[int, int]) -> tuple[tuple[Array, Array], Array]:
    """K and V bits of every token when each list fills pages of one class and leaves the newest rest to its tail; and
    ``fixed`` with that rest marked as tail."""
    k_bits, v_bits, fixed = np.zeros_like(kept), np.zeros_like(kept), np.where(kept > 0, fixed, 0).astype(np.uint8)
    room = _C.page_tokens(*pair)
    for row in range(len(kept)):
        k_bits[row, kept[row] > 0], v_bits[row, kept[row] > 0] = 16, 16
        if pair == (16, 16):
            continue
        plain = np.flatnonzero((kept[row] > 0) & (fixed[row] == 0))
        packed = plain[: len(plain) // room * room]
        k_bits[row, packed], v_bits[row, packed] = pair
        fixed[row, plain[len(packed) :]] = 2
    return (k_bits, v_bits), fixed


def classes_of(policy: Policy) -> list[tuple[int, int]]:
    """The classes that a byte budget may use for tokens besides 16 bits."""
    if policy.classes is not None:
        return [(int(k), int(v)) for k, v in policy.classes]
    return [(k, v) for k in BITS[:-1] for v in BITS[:-1]]


def allowed(policy: Policy) -> Array:
    """(5, 5) uint8 as plan takes it."""
    table = np.zeros((5, 5), np.uint8)
    for k, v in classes_of(policy):
        table[BITS.index(k), BITS.index(v)] = 1
    table[4, 4] = 1
    return table


def exponent(policy: Policy) -> float:
    """What measured importance is raised to before it weighs errors."""
    return 0.5 / policy.importance_temperature


def _pages(one: Ready, bits: tuple[Array, Array], fixed: Array, policy: Policy) -> PageRows:
    rank = one.importance.reshape(fixed.shape) if policy.decode == "hold" else None
    return paged(*bits, fixed, rank)


def _sharpened(one: Ready, policy: Policy) -> Array:
    """(lists, s) float32: what a unit of error on each token weighs."""
    weight = one.importance.reshape(one.kept.shape).astype(np.float64) ** exponent(policy) * one.priority
    return np.minimum(weight, np.finfo(np.float32).max).astype(np.float32)


# ---- by measured error per byte


def _planned(ready: Sequence[Ready], policy: Policy, account: Account, budget: int, least_if_over: bool) -> Spent:
    """Runs plan until what the arena will really take fits the budget."""
    s = ready[0].layer.shape[2]
    sharp = np.concatenate([_sharpened(one, policy) for one in ready])
    tables = [one.tables for one in ready if one.tables is not None]
    distortion_k, distortion_v, drop = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    kept, fixed = np.concatenate([one.kept for one in ready]), np.concatenate([one.fixed for one in ready])
    candidates = ((kept > 0) & (fixed == 0)).sum(1)
    guard = None if policy.guard is None else np.floor(policy.guard * kept.astype(bool).sum(1)).astype(np.int32)
    floor = policy.select.min_tokens if isinstance(policy.select, Hybrid) else 0
    least_tokens = np.minimum(np.maximum(floor - (fixed > 0).sum(1), 0), candidates).astype(np.int32)
    if not policy.drop:
        least_tokens = candidates.astype(np.int32)
    n = len(sharp)
    splits = np.cumsum([len(one.kept) for one in ready])[:-1]
    groups = None
    if policy.granularity == "head":
        groups = np.arange(n, dtype=np.int32)
    elif policy.granularity == "layer":
        groups = np.repeat(np.arange(len(ready)), [len(one.kept) for one in ready]).astype(np.int32)
    k_bits, v_bits = np.empty((n, s), np.uint8), np.empty((n, s), np.uint8)

    def run(limit: int) -> int:
        return _C.plan(
            k_bits, v_bits, sharp, kept, fixed, distortion_k, distortion_v, drop, allowed(policy), least_tokens, guard,
            groups, workspace(_C.plan_workspace(n, s)), account.layout, limit, account.entry_bytes,
            account.list_bytes, 0,
        )[1]  # fmt: skip

    limit = budget
    while True:
        smallest = False
        try:
            least = run(limit)
        except _C.BudgetError as error:
            least, smallest = error.least_bytes, True
            run(least)
        bits = list(zip(*(np.split(part, splits) for part in (k_bits, v_bits)), strict=True))
        plans = [_pages(one, pair, one.fixed, policy) for pair, one in zip(bits, ready, strict=True)]
        held = account.held(plans)
        if held <= budget or (smallest and least_if_over):
            return Spent(plans, bits, [one.fixed for one in ready], least, held > budget)
        if smallest:
            raise Over(held)
        limit = max(limit - account.excess(plans, budget), 0)  # below 0 it would be none


# ---- one class for all


def _uniform(ready: Sequence[Ready], policy: Policy, account: Account, budget: int, least_if_over: bool) -> Spent:
    """As many tokens as the budget holds, shared out by the selector, at the richest class that holds as many."""
    classes = sorted(classes_of(policy), key=lambda pair: (sum(pair), pair)) or [(16, 16)]

    def at(chosen: Sequence[tuple[Array, Array]], pair: tuple[int, int]) -> Spent:
        found = [one_class(kept, fixed, pair) for kept, fixed in chosen]
        plans = [_pages(one, bits, marks, policy) for one, (bits, marks) in zip(ready, found, strict=True)]
        return Spent(plans, [bits for bits, _ in found], [marks for _, marks in found])

    def part(scale: float) -> list[tuple[Array, Array]]:
        """Each layer's kept and fixed tokens when the selector gets that part of what it asks for at most."""
        return [
            (candidates_of(one.importance, one.first, policy, one.index, one.layers, scale), one.fixed) for one in ready
        ]

    whole = [(one.kept, one.fixed) for one in ready]
    for pair in reversed(classes):
        found = at(whole, pair)
        if account.held(found.plans) <= budget:
            return found
    tokens = ready[0].layer.shape[2]
    fits, too_many = 0, tokens
    best = at(part(0.0), classes[0])
    if account.held(best.plans) > budget:
        if not least_if_over:
            raise Over(account.held(best.plans))
        best.over = True
        return best
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        found = at(part(middle / tokens), classes[0])
        if account.held(found.plans) <= budget:
            fits, best = middle, found
        else:
            too_many = middle
    return best
