"""Tokens of chosen classes -> pages, written into one arena; and pages from one arena into another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from . import _C
from .layer_input import Array, LayerInput, cuda_of, upload
from .store import PAGE, PAGES, SLAB_BYTES, Coding, Layout, PackedLayer

GRANULE_BYTES = 2 << 20  # that slabs of a GPU's arena share (csrc/core/arena.h)
_TAIL = 16 * 32 + 16 + 1  # behind every class: 32 * k_bits + v_bits


@dataclass
class PageRows:
    """Pages to be written for one layer, and the table that will name them: page i holds ``pages["tokens"][i]`` tokens
    of list ``lists[i]``, those that ``tokens`` names from ``start[i]`` on; pages of a list follow each other."""

    pages: Array
    lists: Array
    start: Array
    tokens: Array
    states: Array

    @cached_property
    def tokens_by_class(self) -> dict[tuple[int, int], int]:
        """Tokens stored per class (k_bits, v_bits)."""
        kinds = self.pages["k_bits"].astype(np.int32) * 32 + self.pages["v_bits"]
        pages, tokens = np.bincount(kinds), np.bincount(kinds, self.pages["tokens"])
        return {divmod(int(kind), 32): int(tokens[kind]) for kind in np.flatnonzero(pages)}

    def positions(self) -> Array:
        """The token at each stored place, lists one after the other in page order."""
        counts = self.pages["tokens"].astype(np.int64)
        before = np.cumsum(counts) - counts
        return np.asarray(self.tokens[np.repeat(self.start - before, counts) + np.arange(counts.sum())])


def _pages(runs: Array) -> tuple[Array, Array, Array]:
    """Runs (r,5) of tokens that share pages: list, where they begin, K bits, V bits, count -> pages, lists, start."""
    lists, begin, k_bits, v_bits, counts = runs.T
    room = np.where((k_bits == 16) & (v_bits == 16), _C.page_tokens(16, 16), _C.page_tokens(2, 2))
    number = -(-counts // room)
    owner = np.repeat(np.arange(len(runs)), number)
    before = (np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number)) * room[owner]
    pages = np.zeros(len(owner), PAGE)
    pages["k_bits"], pages["v_bits"] = k_bits[owner], v_bits[owner]
    pages["tokens"] = np.minimum(room[owner], counts[owner] - before)
    return pages, lists[owner].astype(np.int32), (begin[owner] + before).astype(np.int32)


def paged(k_bits: Array, v_bits: Array, fixed: Array, importance: Array | None = None) -> PageRows:
    """Cuts every list's tokens into pages: by class, 16 bits last, then the tail (fixed == 2); each by position, or,
    but for the tail, by falling importance (n, s), sinks first: pages that can be evicted one by one."""
    runs: list[tuple[int, int, int, int, int]] = []
    tokens: list[Array] = [np.zeros(0, np.int64)]
    states = np.zeros((len(k_bits), 4), np.int32)
    used = 0
    for row in range(len(k_bits)):
        kinds = k_bits[row].astype(np.int32) * 32 + v_bits[row]
        kinds[(fixed[row] == 2) & (kinds > 0)] = _TAIL
        found = [int(kind) for kind in np.flatnonzero(np.bincount(kinds, minlength=_TAIL + 1)) if kind]
        for kind in found:
            members = np.flatnonzero(kinds == kind)
            if importance is not None and kind != _TAIL:
                rank = np.where(fixed[row, members] == 1, np.inf, importance[row, members])
                members = members[np.argsort(-rank, kind="stable")]
            k, v = divmod(min(kind, _TAIL - 1), 32)
            if kind == _TAIL:
                states[row, 2] = len(members)
            else:
                states[row, 1] += -(-len(members) // _C.page_tokens(k, v))
            runs.append((row, used, k, v, len(members)))
            tokens.append(members)
            used += len(members)
            states[row, 3] += len(members)
    states[:, 0] = states[:, 1] + -(-states[:, 2] // _C.page_tokens(16, 16))
    return PageRows(*_pages(np.array(runs, np.int64).reshape(-1, 5)), np.concatenate(tokens).astype(np.int32), states)


def whole_pages(first: Array, heads: int, s: int, pair: tuple[int, int], sinks: int, window: int) -> PageRows:
    """Every token from ``first`` (b,) on at one class, as ``paged`` would cut them: full pages of it, sinks at 16 bits,
    the newest rest and the window in the tail. The same for every head."""
    begin = np.minimum(first.astype(np.int64), s)
    recent = np.maximum(begin, s - window)  # where the window begins
    behind = np.minimum(begin + sinks, recent)  # and where the sinks end
    room = _C.page_tokens(*pair)
    if pair == (16, 16):
        spans = [(begin, recent - begin, pair)]
        tail = recent
    else:
        tail = behind + (recent - behind) // room * room
        spans = [(behind, tail - behind, pair), (begin, behind - begin, (16, 16))]
    spans.append((tail, s - tail, (16, 16)))
    full = np.full(len(first), 0)
    runs = np.stack([np.stack([full + np.arange(len(first)), at, full + k, full + v, n]) for at, n, (k, v) in spans])
    runs = runs.transpose(2, 0, 1)  # (b, spans, 5)
    every = np.repeat(runs, heads, 0)
    every[:, :, 0] = np.arange(len(every))[:, None]
    pages, lists, start = _pages(every.reshape(-1, 5))
    states = np.zeros((len(every), 4), np.int32)
    states[:, 0] = np.bincount(lists, minlength=len(every))
    states[:, 2] = every[:, -1, 4]
    states[:, 1] = states[:, 0] - -(-states[:, 2] // _C.page_tokens(16, 16))
    states[:, 3] = every[:, :, 4].sum(1)
    return PageRows(pages, lists, start, np.arange(s, dtype=np.int32), states)


def by_size(pages: Array, layout: Layout) -> dict[int, Array]:
    """Page bytes -> the pages that have them."""
    kinds = pages["k_bits"].astype(np.int32) * 32 + pages["v_bits"]
    found: dict[int, list[Array]] = {}
    for kind in np.flatnonzero(np.bincount(kinds, minlength=1)):
        found.setdefault(_C.page_bytes(layout, *divmod(int(kind), 32)), []).append(np.flatnonzero(kinds == kind))
    return {size: parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts)) for size, parts in found.items()}


def page_sizes(pages: Array, layout: Layout) -> Array:
    """(pages,) bytes of each page."""
    sizes = np.zeros(len(pages), np.int64)
    for size, members in by_size(pages, layout).items():
        sizes[members] = size
    return sizes


class Supply:
    """Pages of an arena by size, in the order of their memory: enough for several layers may be had at once, in one
    slab a size, with no more slack than its last memory page."""

    def __init__(self, arena: _C.Arena) -> None:
        self.arena = arena
        self._ready: dict[int, Array] = {}

    def stock(self, counts: dict[int, int]) -> None:
        """So many pages of each size."""
        for size, count in counts.items():
            self._ready[size] = self.arena.alloc(size, count)

    def take(self, size: int, count: int) -> Array:
        """Units of ``count`` pages."""
        ready = self._ready.get(size, np.zeros(0, np.uint32))
        if len(ready) < count:
            return self.arena.alloc(size, count)
        self._ready[size] = ready[count:]
        return ready[:count]

    def close(self) -> None:
        """Gives back what was not taken."""
        for size, units in self._ready.items():
            self.arena.free(size, np.ascontiguousarray(units))
        self._ready = {}


def table_of(rows: PageRows) -> Array:
    """(lists, most pages) uint64: the page table of a layer whose pages have their units."""
    table = np.zeros((len(rows.states), int(rows.states[:, 0].max(initial=0))), np.uint64)
    table[np.arange(table.shape[1]) < rows.states[:, :1]] = rows.pages.view(np.uint64)
    return table


def write_pages(
    arena: _C.Arena, layers: Sequence[LayerInput], plans: Sequence[PageRows], coding: Coding, first_index: int
) -> list[Array]:
    """Allocates the pages of layers ``first_index`` .. and packs their tokens; returns the layers' page tables."""
    supply, sizes = Supply(arena), [by_size(rows.pages, coding.layout) for rows in plans]
    counts: dict[int, int] = {}
    for found in sizes:
        for size, members in found.items():
            counts[size] = counts.get(size, 0) + len(members)
    supply.stock(counts)
    tables = []
    for place, (layer, rows, found) in enumerate(zip(layers, plans, sizes, strict=True)):
        for size, members in found.items():
            rows.pages["unit"][members] = supply.take(size, len(members))
        pack(arena, layer, rows, coding, first_index + place, indices(rows, cuda_of(layer.keys)))
        tables.append(table_of(rows))
    return tables


def indices(rows: PageRows, device: Any) -> tuple[Any, Any, Any]:
    """lists, start, tokens of pack, on ``device``; None: the host."""
    parts = rows.lists, rows.start, rows.tokens
    return parts if device is None else tuple(upload(part, device) for part in parts)


def pack(
    arena: _C.Arena, layer: LayerInput, rows: PageRows, coding: Coding, index: int, places: tuple[Any, Any, Any]
) -> None:
    """Packs layer ``index`` into its pages."""
    device, pages = cuda_of(layer.keys), rows.pages.view(np.uint64)
    _C.pack(
        arena, layer.keys, layer.values, pages if device is None else upload(pages, device), *places,
        coding.layout, coding.rotation, coding.scale, coding.stochastic, index, coding.seed,
    )  # fmt: skip


class WholePages:
    """The pages of layers that keep every token at one class: cut once for all layers that are alike, and had at once
    for as many layers as there will be, if all are like the first one."""

    def __init__(self, arena: _C.Arena, coding: Coding, layers: int) -> None:
        self.arena, self.coding, self.layers = arena, coding, layers
        self.supply = Supply(arena)
        self._heads = 0
        self.odd = False  # layers were not alike: pages are not all in one slab a size

    def write(
        self, layer: LayerInput, first: Array, pair: tuple[int, int], sinks: int, window: int, index: int
    ) -> tuple[PageRows, Array]:
        """Packs layer ``index``: its pages, good until the next one, and its page table."""
        _, heads, s, _ = layer.shape
        if heads != self._heads:
            self.odd = self._heads > 0
            self._heads, self._rows = heads, whole_pages(first, heads, s, pair, sinks, window)
            self._sizes = by_size(self._rows.pages, self.coding.layout)
            self._places = indices(self._rows, cuda_of(layer.keys))
            if not self.odd:
                self.supply.stock({size: len(members) * self.layers for size, members in self._sizes.items()})
        rows = self._rows
        for size, members in self._sizes.items():
            rows.pages["unit"][members] = self.supply.take(size, len(members))
        pack(self.arena, layer, rows, self.coding, index, self._places)
        return rows, table_of(rows)


def bytes_held(plans: Sequence[PageRows], layout: Layout, entry_bytes: int, list_bytes: int, granule: int = 1) -> int:
    """Bytes that arena and tables will hold for these pages: each size's in one slab, all slabs in whole granules."""
    counts: dict[int, int] = {}
    table = 0
    for rows in plans:
        for size, members in by_size(rows.pages, layout).items():
            counts[size] = counts.get(size, 0) + len(members)
        table += len(rows.states) * (list_bytes + int(rows.states[:, 0].max(initial=0)) * entry_bytes)
    slabs = sum(-(-size * count // SLAB_BYTES) * SLAB_BYTES for size, count in counts.items())
    return -(-slabs // granule) * granule + table


def copied(layers: Sequence[PackedLayer], arena: _C.Arena) -> list[Array]:
    """The layers' page tables after all their pages were copied into another arena, each size's into one slab."""
    tables = [layer.table[:, : int(layer.lists[:, PAGES].max(initial=0))].copy() for layer in layers]
    used = [np.arange(len(table.T)) < layer.lists[:, PAGES, None] for table, layer in zip(tables, layers, strict=True)]
    counts: dict[int, int] = {}
    for layer, table, some in zip(layers, tables, used, strict=True):
        for size, members in by_size(table[some].view(PAGE), layer.coding.layout).items():
            counts[size] = counts.get(size, 0) + len(members)
    supply = Supply(arena)
    supply.stock(counts)
    for layer, table, some in zip(layers, tables, used, strict=True):
        pages = table[some].view(PAGE)
        for size, members in by_size(pages, layer.coding.layout).items():
            units = supply.take(size, len(members))
            data = np.empty((len(members), size), np.uint8)
            layer.arena.read(size, np.ascontiguousarray(pages["unit"][members]), data)
            arena.write(size, np.ascontiguousarray(units), data)
            pages["unit"][members] = units
        table[some] = pages.view(np.uint64)
    return tables
