"""Holding a byte budget while tokens are appended: the pages of least worth lose bits or go.

A page of 64 tokens goes as a whole, so that nothing is quantized again to the bits that it has: a page only ever moves
to fewer bits, each half from what it is (a half that keeps its bits is copied), or is evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import _C
from .layer_input import Array
from .packed import Packed
from .ranks import WORTH_BYTES
from .spend import allowed, exponent
from .store import PAGE, PAGES, SLAB_BYTES, SPARE_ENTRIES, TAIL_PAGE, Layout, PackedLayer, workspace

_ENTRY_BYTES = PAGE.itemsize + WORTH_BYTES
_TAIL_SPAN = 64 + 16  # tokens that a tail may hold beyond its window
PAGES_TOGETHER = 4  # pages of class (16, 16) that fill one of another class


def least_held(layers: Sequence[PackedLayer]) -> int:
    """Bytes below which nothing can be held: full 16-bit tails, one packed page a list, pages that stay, and tables."""
    total = 0
    for layer in layers:
        layout, n = layer.coding.layout, len(layer.lists)
        tail = -(-(layer.window + _TAIL_SPAN) // _C.page_tokens(16, 16))
        packed = max(_C.page_bytes(layout, int(k), int(v)) for k, v in layer.aged) if n else 0
        kept = 0
        if layer.ranks is not None and layer.ranks.holds:
            kept = int(np.isinf(layer.ranks.worth).sum()) * _C.page_bytes(layout, 16, 16)
        slabs = n * (tail * _C.page_bytes(layout, 16, 16) + packed) + kept + 3 * SLAB_BYTES
        total += slabs + layer.table_bytes + n * _ENTRY_BYTES * (tail + 1 + SPARE_ENTRIES)
    return total


def make_room(packed: Packed, nbytes: int) -> None:
    """Shrinks the cache until ``nbytes`` more fit ``packed.hold_bytes``. BudgetError, with the cache still sound, where
    all that may go is not enough."""
    if packed.hold_bytes is None or packed.nbytes + nbytes <= packed.hold_bytes:
        return
    _tidy(packed)
    if packed.nbytes + nbytes <= packed.hold_bytes:
        return
    packed.positions = None
    # All layers take the same soon: freed together, so that this happens once in 16 tokens.
    ahead = sum(len(layer.lists) * _C.page_bytes(layer.coding.layout, 16, 16) for layer in packed.layers)
    while (wanted := packed.nbytes + nbytes - packed.hold_bytes) > 0:
        try:
            _shrink(packed, wanted + ahead)
        except _C.BudgetError as error:
            if ahead == 0:
                raise _too_little(packed, nbytes, error.least_bytes) from None
            ahead = 0
            continue
        _tidy(packed)
        ahead = 0


def _too_little(packed: Packed, nbytes: int, left: int) -> _C.BudgetError:
    """``left``: bytes of all pages outside of tails, entries included, once those that may go are gone."""
    now = sum(
        (size + _ENTRY_BYTES) * len(members)
        for layer in packed.layers
        for size, members in layer.by_size(_units(layer).entries)
    )
    least = packed.nbytes + nbytes - (now - left)
    error = _C.BudgetError(
        f"append: budget: expected at least {least} bytes, which tails and pages that stay take, "
        f"got {packed.hold_bytes} bytes"
    )
    error.least_bytes = least
    return error


def _tidy(packed: Packed) -> None:
    for layer in packed.layers:
        layer.trim()
    compact(packed.arena, packed.layers)


@dataclass
class _Units:
    """What shrinks as one, of a layer: its pages that are in no tail; up to four of class (16, 16) together, which fill
    a page of 64 tokens when they lose bits.

    mask: (n, c) bool, where the pages stand in the table; entries: they, in this order; of: (pages,) the unit of each;
    leader: (pages,) bool, the first of each unit; owner: (units,) the list.
    """

    mask: Array
    entries: Array
    of: Array
    leader: Array
    owner: Array

    def sums(self, values: Array) -> Array:
        """(units,) sums over pages."""
        return np.bincount(self.of, values, minlength=len(self.owner))


def _units(layer: PackedLayer) -> _Units:
    mask = np.arange(layer.table.shape[1]) < layer.lists[:, TAIL_PAGE, None]
    rows = np.nonzero(mask)[0]
    entries = layer.table[mask].view(PAGE)
    assert layer.ranks is not None
    whole = (entries["k_bits"] == 16) & (entries["v_bits"] == 16) & np.isfinite(layer.ranks.worth[mask])
    place = np.arange(len(entries))
    follows = np.zeros(len(entries), bool)
    follows[1:] = whole[1:] & whole[:-1] & (rows[1:] == rows[:-1])
    run = place - np.maximum.accumulate(np.where(follows, 0, place))
    leader = run % PAGES_TOGETHER == 0
    return _Units(mask, entries, np.cumsum(leader) - 1, leader, rows[leader])


def _shrink(packed: Packed, wanted: int) -> None:
    """Lowers bits and evicts until at least ``wanted`` bytes of pages and entries are free."""
    policy, layout = packed.policy, packed.layers[0].coding.layout
    units = [_units(layer) for layer in packed.layers]
    ranks = [layer.ranks for layer in packed.layers if layer.ranks is not None]
    offsets = np.cumsum([0] + [len(layer.lists) for layer in packed.layers])
    weights = []
    for one, rank in zip(units, ranks, strict=True):
        tokens = np.maximum(one.sums(one.entries["tokens"]), 1)
        weights.append(tokens * (one.sums(rank.worth[one.mask]) / tokens) ** exponent(policy))
    k_bits = np.concatenate([one.entries["k_bits"][one.leader] for one in units])
    v_bits = np.concatenate([one.entries["v_bits"][one.leader] for one in units])
    lists = np.concatenate([one.owner + offset for one, offset in zip(units, offsets, strict=False)])
    counts = np.concatenate([one.sums(np.ones(len(one.entries))) for one in units])
    distortion_k, distortion_v, drop = (
        np.concatenate([getattr(rank, name) for rank in ranks]) for name in ("distortion_k", "distortion_v", "drop")
    )
    _C.shrink(
        k_bits, v_bits, lists.astype(np.int32), counts.astype(np.uint8), np.concatenate(weights).astype(np.float32),
        distortion_k, distortion_v, drop, allowed(policy), workspace(_C.shrink_workspace(len(drop), len(lists))),
        layout, _ENTRY_BYTES, wanted,
    )  # fmt: skip
    at = 0
    for layer, one in zip(packed.layers, units, strict=True):
        end = at + len(one.owner)
        _apply(layer, one, k_bits[at:end], v_bits[at:end])
        at = end


def _apply(layer: PackedLayer, units: _Units, k_bits: Array, v_bits: Array) -> None:
    """Gives a layer's units their new bits; 0, 0: evicted."""
    entries, of, leader = units.entries, units.of, units.leader
    changed = (entries["k_bits"][leader] != k_bits) | (entries["v_bits"][leader] != v_bits)
    if not changed.any():
        return
    old = entries[changed[of]]
    gone = (k_bits == 0)[of]
    lower = changed & (k_bits > 0)
    if lower.any():
        pages = lower[of]
        number = np.cumsum(lower)[of[pages]] - 1
        new = _requantized(layer, entries[pages], number, k_bits[lower], v_bits[lower])
        entries[pages & leader] = new
        gone |= pages & ~leader  # their tokens are on the leader's page now
        assert layer.ranks is not None
        worth = layer.ranks.worth[units.mask]
        worth[leader] = units.sums(worth)
        layer.ranks.worth[units.mask] = worth
        layer.table[units.mask] = entries.view(np.uint64)
    layer.free_pages(old)
    removed = np.zeros(units.mask.shape, bool)
    removed[units.mask] = gone
    layer.remove(removed)


def _requantized(layer: PackedLayer, old: Array, number: Array, k_bits: Array, v_bits: Array) -> Array:
    """New pages of fewer bits with the rows of ``old``, page i of which goes to page number[i]. Rows stay rotated."""
    coding, count = layer.coding, len(k_bits)
    new = np.zeros(count, PAGE)
    new["k_bits"], new["v_bits"] = k_bits, v_bits
    new["tokens"] = np.bincount(number, old["tokens"], minlength=count)
    for size, members in layer.by_size(new):
        new["unit"][members] = layer.arena.alloc(size, len(members))
    # Every new page is a list of its own here: (pages, 1, 64, d).
    shape = (count, 1, 64, coding.layout.head_dim)
    keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    before = np.cumsum(old["tokens"], dtype=np.int64) - old["tokens"]
    first = np.flatnonzero(np.r_[True, number[1:] != number[:-1]])
    start = (before - before[first][number]).astype(np.int32)
    every, zero, tokens = np.arange(count, dtype=np.int32), np.zeros(count, np.int32), np.arange(64, dtype=np.int32)
    _C.unpack(
        keys, values, layer.arena, np.ascontiguousarray(old).view(np.uint64), number.astype(np.int32), start, tokens,
        coding.layout, 0,
    )  # fmt: skip
    _C.pack(
        layer.arena, keys, values, new.view(np.uint64), every, zero, tokens, coding.layout, 0, coding.scale, 0,
        layer.layer, coding.seed,
    )  # fmt: skip
    _copy_unchanged(layer, old[first], new)
    return new


def _copy_unchanged(layer: PackedLayer, old: Array, new: Array) -> None:
    """Halves that keep their bits keep their codes and scales, too."""
    layout = layer.coding.layout
    for name, other in (("k_bits", "v_bits"), ("v_bits", "k_bits")):
        same = (old[name] == new[name]) & (_rooms(old) == _rooms(new))
        kinds = np.stack([old[name], old[other], new[other]], 1)
        for bits, before, after in np.unique(kinds[same], axis=0):
            members = np.flatnonzero(same & (kinds == (bits, before, after)).all(1))
            sources = _read(layer, old["unit"][members], name, int(bits), int(before))
            targets = _read(layer, new["unit"][members], name, int(bits), int(after))
            width = _half_bytes(layout, int(bits))
            skip = [0 if name == "k_bits" else _half_bytes(layout, int(k)) for k in (before, after)]
            targets[:, skip[1] : skip[1] + width] = sources[:, skip[0] : skip[0] + width]
            layer.arena.write(targets.shape[1], new["unit"][members], targets)


def _read(layer: PackedLayer, units: Array, name: str, bits: int, other: int) -> Array:
    k_bits, v_bits = (bits, other) if name == "k_bits" else (other, bits)
    out = np.empty((len(units), _C.page_bytes(layer.coding.layout, k_bits, v_bits)), np.uint8)
    layer.arena.read(out.shape[1], units, out)
    return out


def _half_bytes(layout: Layout, bits: int) -> int:
    """Of K or V of a page of 64 tokens: codes and scales (format.h)."""
    return 64 * layout.head_dim * bits // 8 + _C.scale_bytes(layout, bits, 16)


def _rooms(pages: Array) -> Array:
    return np.where((pages["k_bits"] == 16) & (pages["v_bits"] == 16), 16, 64)


def compact(arena: _C.Arena, layers: Sequence[PackedLayer]) -> None:
    """Moves pages together, size by size, and gives what lies behind them back."""
    sizes: dict[int, list[tuple[PackedLayer, Array]]] = {}
    for layer in layers:
        used = np.arange(layer.table.shape[1]) < layer.lists[:, PAGES, None]
        entries = layer.table[used].view(PAGE)
        for size, members in layer.by_size(entries):
            places = np.flatnonzero(used.reshape(-1))[members]
            sizes.setdefault(size, []).append((layer, places))
    for size, found in sizes.items():
        units = np.concatenate([layer.table.reshape(-1)[places].view(PAGE)["unit"] for layer, places in found]).astype(
            np.uint32
        )
        arena.compact(size, units)
        at = 0
        for layer, places in found:
            entries = layer.table.reshape(-1)[places].view(PAGE)
            entries["unit"] = units[at : at + len(places)]
            layer.table.reshape(-1)[places] = entries.view(np.uint64)
            at += len(places)
