"""Tokens of chosen classes -> pages, written into one arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import _C
from .layer_input import Array, LayerInput
from .store import PAGE, SLAB_BYTES, Coding, Layout


def _slabs(counts: dict[int, int]) -> int:
    """Bytes the arena takes for pages by size, each size's in one slab."""
    return sum(-(-size * count // SLAB_BYTES) * SLAB_BYTES for size, count in counts.items() if count)


@dataclass
class PageRows:
    """Pages to be written for one layer, and the table that will name them."""

    pages: Array
    lists: Array
    start: Array
    tokens: Array
    states: Array


def paged(k_bits: Array, v_bits: Array, fixed: Array, importance: Array | None = None) -> PageRows:
    """Cuts every list's tokens into pages: by class, 16 bits last, then the tail (fixed == 2); each by position, or,
    but for the tail, by falling importance (n, s), sinks first: pages that can be evicted one by one."""
    pages: list[tuple[int, int, int, int, int]] = []
    tokens: list[Array] = []
    states = np.zeros((len(k_bits), 4), np.int32)
    used = 0
    for row in range(len(k_bits)):
        tail = fixed[row] == 2
        kinds = k_bits[row].astype(np.int32) * 32 + v_bits[row]
        groups = [(int(kind), np.flatnonzero((kinds == kind) & ~tail)) for kind in np.unique(kinds[~tail]) if kind]
        groups.append((16 * 32 + 16, np.flatnonzero(tail & (kinds > 0))))
        for position, (kind, members) in enumerate(groups):
            if importance is not None and position < len(groups) - 1:
                rank = np.where(fixed[row, members] == 1, np.inf, importance[row, members])
                members = members[np.argsort(-rank, kind="stable")]
            k, v = divmod(kind, 32)
            room = _C.page_tokens(k, v)
            if position == len(groups) - 1:
                states[row, 1:3] = states[row, 0], len(members)
            for begin in range(0, len(members), room):
                count = min(room, len(members) - begin)
                pages.append((row, used + begin, k, v, count))
                states[row, 0] += 1
            tokens.append(members)
            used += len(members)
            states[row, 3] += len(members)
    table = np.array(pages, np.int64).reshape(-1, 5)
    records = np.zeros(len(table), PAGE)
    for column, name in ((2, "k_bits"), (3, "v_bits"), (4, "tokens")):
        records[name] = table[:, column]
    flat = np.concatenate(tokens).astype(np.int32) if tokens else np.zeros(0, np.int32)
    return PageRows(records, table[:, 0].astype(np.int32), table[:, 1].astype(np.int32), flat, states)


def page_sizes(rows: PageRows, layout: Layout) -> Array:
    """(pages,) bytes of each page."""
    return np.array([_C.page_bytes(layout, int(page["k_bits"]), int(page["v_bits"])) for page in rows.pages], np.int64)


def write_pages(
    arena: _C.Arena, layers: Sequence[LayerInput], plans: Sequence[PageRows], coding: Coding, first_index: int
) -> list[Array]:
    """Allocates the pages of layers ``first_index`` .. and packs their tokens; returns the layers' page tables."""
    sizes = [page_sizes(rows, coding.layout) for rows in plans]
    every = np.concatenate(sizes)
    units = np.zeros(len(every), np.uint32)
    for size in np.unique(every):  # one slab a size: no more slack than the last memory page
        units[every == size] = arena.alloc(int(size), int((every == size).sum()))
    ends = np.cumsum([len(size) for size in sizes])
    tables = []
    for place, (layer, rows) in enumerate(zip(layers, plans, strict=True)):
        rows.pages["unit"] = units[ends[place] - len(rows.pages) : ends[place]]
        _C.pack(
            arena, layer.keys, layer.values, rows.pages.view(np.uint64), rows.lists, rows.start, rows.tokens,
            coding.layout, coding.rotation, coding.scale, coding.stochastic, first_index + place, coding.seed,
        )  # fmt: skip
        table = np.zeros((len(rows.states), int(rows.states[:, 0].max(initial=0))), np.uint64)
        table[np.arange(table.shape[1]) < rows.states[:, :1]] = rows.pages.view(np.uint64)
        tables.append(table)
    return tables


def bytes_held(plans: Sequence[PageRows], layout: Layout, entry_bytes: int, list_bytes: int) -> int:
    """Bytes that arena and tables will hold for these pages."""
    counts: dict[int, int] = {}
    table = 0
    for rows in plans:
        for size, count in zip(*np.unique(page_sizes(rows, layout), return_counts=True), strict=True):
            counts[int(size)] = counts.get(int(size), 0) + int(count)
        table += len(rows.states) * (list_bytes + int(rows.states[:, 0].max(initial=0)) * entry_bytes)
    return _slabs(counts) + table
