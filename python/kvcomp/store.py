"""Packed pages of one layer, and what can be done with them: append, attend, copy, count."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _C
from .layer_input import real_counts, to_float32

if TYPE_CHECKING:
    from .ranks import Ranks

FLOAT16, BFLOAT16 = 1, 2  # kvc_dtype
ROTATIONS = {"none": 0, "hadamard": 1}
SCALES = {"sigma": 0, "minmax": 1, "search": 2}
SCALE_DTYPES = {"fp16": 0, "e5m3": 1}
SLAB_BYTES = 4096  # a slab is a whole number of memory pages (csrc/core/arena.c)
LEDGER = ("codes", "scales", "positions", "page_table", "slack", "window")
CHUNK = 64  # new tokens that are appended before their queries attend
SPARE_ENTRIES = 8  # of a page table that is made larger
_TAIL_PAGE_TOKENS = _C.page_tokens(16, 16)

PAGE = np.dtype([("unit", "<u4"), ("k_bits", "u1"), ("v_bits", "u1"), ("tokens", "u1"), ("flags", "u1")])
# Columns of a list's state.
PAGES, TAIL_PAGE, TAIL_TOKENS, TOKENS = range(4)


class Layout(NamedTuple):
    """How pages are laid out (``kvc_layout``): channels, channels a scale, whether zeros are stored, 16-bit type, type
    of the scales."""

    head_dim: int
    group: int
    zero_point: int
    half: int
    scale_dtype: int = 0


@dataclass(frozen=True)
class Coding:
    """How rows become codes; the same for every layer of a cache."""

    layout: Layout
    rotation: int
    scale: int
    stochastic: int
    seed: int


_scratch = threading.local()


def workspace(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """At least ``nbytes`` bytes of this thread's scratch memory, 64-byte aligned; the last one's contents are lost."""
    buffer: np.ndarray[Any, np.dtype[np.uint8]] | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < nbytes:
        raw = np.empty(nbytes + nbytes // 4 + 64, np.uint8)
        buffer = raw[-raw.ctypes.data % 64 :]
        _scratch.buffer = buffer
    return buffer


def empty_like(tensor: Any) -> Any:
    """An uninitialized contiguous tensor of the same library, type and shape."""
    return np.empty(tensor.shape, tensor.dtype) if isinstance(tensor, np.ndarray) else tensor.new_empty(tensor.shape)


def rotated(rows: Any, matrices: np.ndarray[Any, Any], *, back: bool = False) -> np.ndarray[Any, Any]:
    """rows (b, heads, q, d) times each KV head's matrix, or (``back``) its transpose, as float32."""
    out = np.empty(tuple(rows.shape), np.float32)
    _C.rotate(out, rows, matrices, back)
    return out


def _classes(entries: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One number for each entry's class: 32 * k_bits + v_bits."""
    return np.asarray(entries["k_bits"].astype(np.int32) * 32 + entries["v_bits"])


class PackedLayer:
    """The lists of pages of one layer, list = sequence * heads + head.

    Attributes:
        table: (lists, capacity) uint64, entries of ``kvc_page``.
        lists: (lists, 4) int32, ``kvc_list``: pages, first tail page, tail tokens, tokens.
        aged: (lists, 2) uint8, K and V bits of the tokens that leave the tail next.
        ranks: what sets ``aged`` while decoding, and what pages are worth; None: ``aged`` stays as it is.
        rotation: matrices (heads, d, d) float32 that keys and values were rotated by; None: Hadamard's or none
            (``coding.rotation``).
    """

    def __init__(
        self,
        arena: _C.Arena,
        coding: Coding,
        table: np.ndarray[Any, Any],
        lists: np.ndarray[Any, Any],
        *,
        heads: int,
        layer: int,
        aged: np.ndarray[Any, Any],
        window: int,
        ranks: Ranks | None = None,
        rotation: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None,
        decay: float = 0.0,
    ) -> None:
        self.arena, self.coding, self.table, self.lists = arena, coding, table, lists
        self.heads, self.layer, self.aged, self.window = heads, layer, aged, window
        self.ranks, self.rotation, self.decay = ranks, rotation, decay
        self.appends = 0  # how often rows were stored
        # Of the outputs, transposed once: _C.rotate would turn the matrices again at every step.
        self._value_back = None if rotation is None else np.ascontiguousarray(rotation[1].transpose(0, 2, 1))

    @property
    def batch(self) -> int:
        return len(self.lists) // self.heads

    @property
    def tokens(self) -> np.ndarray[Any, Any]:
        """(lists,) tokens stored."""
        return np.asarray(self.lists[:, TOKENS])

    def entries(self) -> np.ndarray[Any, Any]:
        """The page-table entries in use, as records with fields unit, k_bits, v_bits, tokens; all lists in a row."""
        used = np.arange(self.table.shape[1]) < self.lists[:, PAGES, None]
        return np.asarray(self.table[used].view(PAGE))

    # ---- decode

    def append(
        self,
        keys: Any,
        values: Any,
        valid: np.ndarray[Any, Any] | None = None,
        make_room: Callable[[int], None] | None = None,
    ) -> None:
        """Adds rows (b, h, q, d) behind every list; of a left-padded sequence only the last ``valid[b]`` ones.

        ``make_room`` is called with the most bytes that will be taken, before they are.
        """
        _, q = self._group_and_new("append", "keys", keys, most=1)
        valid = real_counts("append", "valid", valid, self.batch, q)
        if self.rotation is not None:
            k_turn, v_turn = self.rotation
            keys, values = rotated(keys, k_turn), rotated(values, v_turn)
        tail = self.lists[:, TAIL_TOKENS]
        if q == 1 and valid is None and (tail % _TAIL_PAGE_TOKENS > 0).all() and (tail < self.window + CHUNK).all():
            none = np.zeros(len(self.lists), np.int64)
            self._write(keys, values, None, self.table, self.aged, none, none)
            return
        added = np.full(len(self.lists), q) if valid is None else np.repeat(valid, self.heads)
        tails, flushes = self._needs(added)
        aged = self.aged.copy()
        if self.ranks is not None and flushes.any():
            self.ranks.age(aged, flushes > 0)
        if make_room is not None:  # may evict pages, of this very layer too: what would be refused is refused before
            for name, rows in (("keys", keys), ("values", values)):
                self._check_finite(name, rows, valid)
            make_room(self._bytes_needed(tails, flushes, aged))
        table = self._grown(int((tails + flushes).max(initial=0)))
        before = self.lists[:, TAIL_PAGE].copy()
        self._write(keys, values, valid, table, aged, tails, flushes)
        self.table, self.aged = table, aged
        if self.ranks is not None:
            self.ranks.recent[flushes > 0] = 0
            self.ranks.grow(table.shape[1])
            for done in range(int(flushes.max(initial=0))):
                rows = np.flatnonzero(flushes > done)
                self.ranks.merge(rows, before[rows] + done)

    def _write(
        self,
        keys: Any,
        values: Any,
        valid: np.ndarray[Any, Any] | None,
        table: np.ndarray[Any, Any],
        aged: np.ndarray[Any, Any],
        tails: np.ndarray[Any, Any],
        flushes: np.ndarray[Any, Any],
    ) -> None:
        """Aged tokens of list i take class aged[i]; tails[i], flushes[i]: most 16-bit and packed pages."""
        coding, n = self.coding, len(self.lists)
        tail_pages = self.lists[:, PAGES] - self.lists[:, TAIL_PAGE]
        stacks = (
            np.zeros((n, int((tail_pages + tails).max(initial=0))), np.uint32),
            np.zeros((n, int(flushes.max(initial=0))), np.uint32),
        )
        left = np.zeros((n, 2), np.int32)
        sizes: list[tuple[int, int, Any]] = []  # stack, page bytes, its lists
        if stacks[1].size or tails.any():
            sizes.append((0, _C.page_bytes(coding.layout, 16, 16), np.arange(n)))
            for k, v in np.unique(aged[flushes > 0], axis=0):
                rows = np.flatnonzero((aged == (k, v)).all(1))
                sizes.append((1, _C.page_bytes(coding.layout, int(k), int(v)), rows))
        try:
            for which, size, rows in sizes:
                stack, count = stacks[which], (flushes if which else tails)[rows]
                units = np.zeros((len(rows), stack.shape[1]), np.uint32)
                units[np.arange(stack.shape[1]) < count[:, None]] = self.arena.alloc(size, int(count.sum()))
                stack[rows], left[rows, which] = units, count
            _C.append(
                self.arena, table, self.lists, *stacks, left, keys, values, valid, aged, coding.layout, self.window,
                coding.rotation, coding.scale, coding.stochastic, self.layer, coding.seed,
            )  # fmt: skip
            self.appends += 1
        finally:
            for which, size, rows in sizes:
                units = stacks[which][rows]
                self.arena.free(size, units[np.arange(units.shape[1]) < left[rows, which, None]])

    def _check_finite(self, name: str, rows: Any, counts: np.ndarray[Any, Any] | None) -> None:
        q = int(rows.shape[2])
        for sequence, real in enumerate([q] * self.batch if counts is None else counts):
            if not np.isfinite(to_float32(rows[sequence, :, q - real :])).all():
                raise ValueError(f"append: {name}: expected finite values, got NaN or Inf in sequence {sequence}")

    def _needs(self, added: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Pages (n,) that the lists take at most for ``added`` tokens each: 16-bit ones, packed ones."""
        packs = (self.aged != 16).any(1)
        states, back = np.unique(
            np.stack([self.lists[:, TAIL_TOKENS], added, packs.astype(added.dtype)]), axis=1, return_inverse=True
        )
        needs = [_C.append_need(int(tail), int(new), self.window, bool(pack)) for tail, new, pack in states.T]
        found = np.array(needs, np.int64).reshape(-1, 2)[back.reshape(-1)]
        return found[:, 0], found[:, 1]

    def _bytes_needed(
        self, tails: np.ndarray[Any, Any], flushes: np.ndarray[Any, Any], aged: np.ndarray[Any, Any]
    ) -> int:
        """Bytes that an append takes at most: new slabs, and a larger table."""
        layout = self.coding.layout
        needs: list[int] = [_C.page_bytes(layout, 16, 16) * int(tails.sum())]
        for k, v in np.unique(aged, axis=0):
            members = (aged == (k, v)).all(1)
            needs.append(_C.page_bytes(layout, int(k), int(v)) * int(flushes[members].sum()))
        slabs = sum(-(-need // SLAB_BYTES) * SLAB_BYTES for need in needs)
        capacity = int(self.lists[:, PAGES].max(initial=0)) + int((tails + flushes).max(initial=0)) + SPARE_ENTRIES
        entry = PAGE.itemsize + (self.ranks.worth.itemsize if self.ranks is not None and self.ranks.holds else 0)
        return slabs + max(0, capacity - int(self.table.shape[1])) * len(self.lists) * entry

    def _group_and_new(self, op: str, name: str, rows: Any, most: int | None = None) -> tuple[int, int]:
        """Heads of ``rows`` (b, heads, q, d) for each of the layer's, and q; ValueError for rows that do not fit."""
        shape = tuple(getattr(rows, "shape", ()))
        head_dim = self.coding.layout.head_dim
        group, rest = divmod(shape[1], self.heads) if len(shape) == 4 else (0, 0)
        if group < 1 or rest or group > (most or group) or shape[0] != self.batch or shape[3] != head_dim:
            heads = str(self.heads) if most == 1 else f"a multiple of {self.heads}"
            raise ValueError(f"{op}: {name}: expected shape ({self.batch}, {heads}, q, {head_dim}), got {shape}")
        return group, int(shape[2])

    def _grown(self, pages: int) -> np.ndarray[Any, Any]:
        """The table, or a larger copy of it, with room for ``pages`` more in every row."""
        wanted = int(self.lists[:, PAGES].max(initial=0)) + pages
        if wanted <= self.table.shape[1]:
            return self.table
        table = np.zeros((len(self.lists), wanted + SPARE_ENTRIES), np.uint64)
        table[:, : self.table.shape[1]] = self.table
        return table

    def attend(
        self,
        queries: Any,
        *,
        scale: float,
        softcap: float = 0.0,
        new_tokens: np.ndarray[Any, Any] | None = None,
        out: Any = None,
        mass: Any = None,
    ) -> Any:
        """Attention of queries (b, hq, q, d) over the packed tokens; causal among the last q (``new_tokens[b]``) ones.

        ``mass``: (lists, tokens or more) float32, receives every token's attention probability in page order.
        """
        group, q = self._group_and_new("attend", "queries", queries)
        counts = real_counts("attend", "new_tokens", new_tokens, self.batch, q)
        out = empty_like(queries) if out is None else out
        if self.rotation is not None:
            turned = rotated(queries, self.rotation[0])
            mixed = np.empty_like(turned)
            self._attend(mixed, turned, group, q, counts, scale, softcap, mass)
            _C.rotate(out, mixed, self._value_back, False)
        else:
            self._attend(out, queries, group, q, counts, scale, softcap, mass)
        return out

    def _attend(
        self,
        out: Any,
        queries: Any,
        group: int,
        q: int,
        counts: np.ndarray[Any, Any] | None,
        scale: float,
        softcap: float,
        mass: Any,
    ) -> None:
        layout = self.coding.layout
        pages = int(self.lists[:, PAGES].max(initial=0))
        scratch = workspace(_C.attend_workspace(len(self.lists), pages, group, q, layout.head_dim))
        _C.attend(
            out, mass, queries, self.arena, self.table, self.lists, counts, scratch, layout, self.coding.rotation,
            scale, softcap, 0, None, 0,
        )  # fmt: skip

    def append_attend(
        self,
        queries: Any,
        keys: Any,
        values: Any,
        *,
        scale: float,
        softcap: float = 0.0,
        valid: np.ndarray[Any, Any] | None = None,
        make_room: Callable[[int], None] | None = None,
    ) -> Any:
        """Appends q new tokens and attends with their queries, 64 at a time; causal. Returns out, shaped as queries.

        With ranks, the attention of the steps before a list packs its next page is taken in.
        """
        _, q = self._group_and_new("append", "queries", queries)
        if q != self._group_and_new("append", "keys", keys, most=1)[1]:
            raise ValueError(f"append: queries: expected those of {keys.shape[2]} new tokens, got {q}")
        counts = real_counts("append", "valid", valid, self.batch, q)
        # What would be refused after the first append is refused before it.
        self.attend(queries[:, :, :0], scale=scale, softcap=softcap)
        if q <= CHUNK:
            self.append(keys, values, counts, make_room)
            return self._attend_observed(queries, scale, softcap, counts, empty_like(queries))
        for name, rows in (("keys", keys), ("values", values)):
            self._check_finite(name, rows, counts)
        out = empty_like(queries)
        for start in range(0, q, CHUNK):
            chunk = slice(start, min(start + CHUNK, q))
            width = chunk.stop - start
            part = None if counts is None else np.clip(counts - (q - chunk.stop), 0, width)
            self.append(keys[:, :, chunk], values[:, :, chunk], part, make_room)
            self._attend_observed(queries[:, :, chunk], scale, softcap, part, out[:, :, chunk])
        return out

    def _attend_observed(
        self, queries: Any, scale: float, softcap: float, counts: np.ndarray[Any, Any] | None, out: Any
    ) -> Any:
        q = int(queries.shape[2])
        ranks = self.ranks
        if ranks is None or not ranks.due(self.lists, q, self.window):
            return self.attend(queries, scale=scale, softcap=softcap, new_tokens=counts, out=out)
        mass = np.empty((len(self.lists), int(self.tokens.max(initial=1))), np.float32)
        self.attend(queries, scale=scale, softcap=softcap, new_tokens=counts, out=out, mass=mass)
        new = np.full(self.batch, q, np.int32) if counts is None else counts
        ranks.observe(mass, self.table, self.lists, int(queries.shape[1]) // self.heads, new, self.decay)
        return out

    # ---- whole lists

    def unpack(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Keys, values (b, h, most tokens, d) float32 in page order, zeros behind the end. For tests and metrics."""
        entries = self.entries()
        lists = np.repeat(np.arange(len(self.lists), dtype=np.int32), self.lists[:, PAGES])
        ends = np.cumsum(entries["tokens"], dtype=np.int64)
        before = np.cumsum(self.tokens, dtype=np.int64) - self.tokens  # in the lists before
        start = (ends - entries["tokens"] - before[lists]).astype(np.int32)
        most = int(self.tokens.max(initial=0))
        shape = (self.batch, self.heads, most, self.coding.layout.head_dim)
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        _C.unpack(
            keys, values, self.arena, np.ascontiguousarray(entries).view(np.uint64), lists, start,
            np.arange(most, dtype=np.int32), self.coding.layout, self.coding.rotation,
        )  # fmt: skip
        if self.rotation is not None:
            k_turn, v_turn = self.rotation
            keys, values = rotated(keys, k_turn, back=True), rotated(values, v_turn, back=True)
        return keys, values

    def select(self, sequences: np.ndarray[Any, Any]) -> None:
        """Reorders, repeats and drops sequences: the new sequence i is the old ``sequences[i]``."""
        heads, wanted = self.heads, np.asarray(sequences)
        integers = wanted.ndim == 1 and (wanted.dtype.kind in "iu" or wanted.size == 0)
        if not integers or (wanted < 0).any() or (wanted >= self.batch).any():
            raise ValueError(f"select: sequences: expected indices in 0..{self.batch - 1}, got {wanted.tolist()}")
        chosen = (wanted.astype(np.int64)[:, None] * heads + np.arange(heads)).reshape(-1)
        table, lists = self.table[chosen], self.lists[chosen]
        _, first = np.unique(chosen, return_index=True)
        copies = np.setdiff1d(np.arange(len(chosen)), first)
        copied: list[tuple[int, np.ndarray[Any, Any]]] = []
        try:
            for row in copies:
                entries = table[row, : lists[row, PAGES]].view(PAGE)
                for size, members in self.by_size(entries):
                    new = self.arena.alloc(size, len(members))
                    copied.append((size, new))
                    self.arena.copy(size, np.ascontiguousarray(entries["unit"][members]), new)
                    entries["unit"][members] = new
        except MemoryError:
            for size, new in copied:
                self.arena.free(size, new)
            raise
        self._free(np.setdiff1d(np.arange(len(self.lists)), chosen))
        self.table, self.lists = np.ascontiguousarray(table), np.ascontiguousarray(lists)
        self.aged = np.ascontiguousarray(self.aged[chosen])
        if self.ranks is not None:
            self.ranks.select(chosen)

    def release(self) -> None:
        """Gives every page back."""
        self._free(np.arange(len(self.lists)))
        self.table, self.lists, self.aged = self.table[:0], self.lists[:0], self.aged[:0]
        if self.ranks is not None:
            self.ranks.select(np.arange(0))

    def by_size(self, entries: np.ndarray[Any, Any]) -> list[tuple[int, np.ndarray[Any, Any]]]:
        """Page bytes, and the entries that have them."""
        classes, members = np.unique(_classes(entries), return_inverse=True)
        sizes = np.array([_C.page_bytes(self.coding.layout, *divmod(int(c), 32)) for c in classes], np.int64)[members]
        return [(int(size), np.flatnonzero(sizes == size)) for size in np.unique(sizes)]

    def _free(self, rows: np.ndarray[Any, Any]) -> None:
        for row in rows:
            self.free_pages(self.table[row, : self.lists[row, PAGES]].view(PAGE))

    def free_pages(self, entries: np.ndarray[Any, Any]) -> None:
        """Gives the memory of pages back; the table is the caller's to change."""
        for size, members in self.by_size(entries):
            self.arena.free(size, np.ascontiguousarray(entries["unit"][members]))

    def remove(self, gone: np.ndarray[Any, Any]) -> None:
        """Takes the entries under ``gone`` (lists, capacity) bool, none of them in a tail, out of the table."""
        order = np.argsort(gone, 1, kind="stable")  # what stays, as it was; then what goes
        self.table = np.take_along_axis(np.where(gone, np.uint64(0), self.table), order, 1)
        if self.ranks is not None and self.ranks.holds:
            self.ranks.worth = np.take_along_axis(np.where(gone, np.float32(0), self.ranks.worth), order, 1)
        for column in (PAGES, TAIL_PAGE):
            self.lists[:, column] -= gone.sum(1).astype(np.int32)
        used = np.arange(self.table.shape[1]) < self.lists[:, PAGES, None]
        self.lists[:, TOKENS] = (np.ascontiguousarray(self.table).view(PAGE)["tokens"] * used).sum(1)

    def trim(self) -> None:
        """Gives back what the table has room for beyond a few spare entries."""
        wanted = int(self.lists[:, PAGES].max(initial=0)) + SPARE_ENTRIES
        if wanted < self.table.shape[1]:
            self.table = np.ascontiguousarray(self.table[:, :wanted])
            if self.ranks is not None and self.ranks.holds:
                self.ranks.worth = np.ascontiguousarray(self.ranks.worth[:, :wanted])

    # ---- bytes

    @property
    def table_bytes(self) -> int:
        """Page table, list states, and what decoding keeps for each list."""
        ranks = 0 if self.ranks is None else self.ranks.nbytes
        return int(self.table.nbytes + self.lists.nbytes + self.aged.nbytes) + ranks

    def page_ledger(self) -> dict[str, int]:
        """Bytes of live pages by use: codes and scales of valid tokens, the 16-bit tail's tokens as window."""
        layout, entries = self.coding.layout, self.entries()
        column = np.broadcast_to(np.arange(self.table.shape[1]), self.table.shape)
        used = column < self.lists[:, PAGES, None]
        in_tail = (column >= self.lists[:, TAIL_PAGE, None])[used]
        codes = entries["tokens"].astype(np.int64) * layout.head_dim * (
            entries["k_bits"].astype(np.int64) + entries["v_bits"]
        ) // 8  # fmt: skip
        per_token = _C.scale_bytes(layout, 2, 16) // _C.page_tokens(2, 16)
        halves = (entries["k_bits"] < 16).astype(np.int64) + (entries["v_bits"] < 16)
        scales = entries["tokens"].astype(np.int64) * per_token * halves
        return {"codes": int(codes[~in_tail].sum()), "scales": int(scales.sum()), "window": int(codes[in_tail].sum())}

    def bits_histogram(self) -> dict[tuple[int, int], int]:
        """Tokens stored per class (k_bits, v_bits)."""
        entries = self.entries()
        classes, members = np.unique(_classes(entries), return_inverse=True)
        counts = np.bincount(members, entries["tokens"], minlength=len(classes))
        return {divmod(int(c), 32): int(n) for c, n in zip(classes, counts, strict=True)}
