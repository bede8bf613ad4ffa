"""Packed pages of one layer, and what can be done with them: append, attend, copy, count."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _C
from .layer_input import to_float32

FLOAT16, BFLOAT16 = 1, 2  # kvc_dtype
ROTATIONS = {"none": 0, "hadamard": 1}
SCALES = {"sigma": 0, "minmax": 1, "search": 2}
LEDGER = ("codes", "scales", "positions", "page_table", "slack", "window")
CHUNK = 64  # new tokens that are appended before their queries attend

PAGE = np.dtype([("unit", "<u4"), ("k_bits", "u1"), ("v_bits", "u1"), ("tokens", "u1"), ("flags", "u1")])
# Columns of a list's state.
PAGES, TAIL_PAGE, TAIL_TOKENS, TOKENS = range(4)


class Layout(NamedTuple):
    """How pages are laid out (``kvc_layout``): channels, channels a scale, whether zeros are stored, 16-bit type."""

    head_dim: int
    group: int
    zero_point: int
    half: int


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


def _classes(entries: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One number for each entry's class: 32 * k_bits + v_bits."""
    return np.asarray(entries["k_bits"].astype(np.int32) * 32 + entries["v_bits"])


class PackedLayer:
    """The lists of pages of one layer, list = sequence * heads + head.

    Attributes:
        table: (lists, capacity) uint64, entries of ``kvc_page``.
        lists: (lists, 4) int32, ``kvc_list``: pages, first tail page, tail tokens, tokens.
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
        aged: tuple[int, int],
        window: int,
    ) -> None:
        self.arena, self.coding, self.table, self.lists = arena, coding, table, lists
        self.heads, self.layer, self.aged, self.window = heads, layer, aged, window

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

    def append(self, keys: Any, values: Any, valid: np.ndarray[Any, Any] | None = None) -> None:
        """Adds rows (b, h, q, d) behind every list; of a left-padded sequence only the last ``valid[b]`` ones."""
        _, q = self._group_and_new("append", "keys", keys, most=1)
        valid = self._counts("append", "valid", valid, q)
        layout, (k_bits, v_bits) = self.coding.layout, self.aged
        packs = self.aged != (16, 16)
        added = np.full(len(self.lists), q) if valid is None else np.repeat(valid, self.heads)
        states, counts = np.unique(np.stack([self.lists[:, TAIL_TOKENS], added]), axis=1, return_counts=True)
        tail_need = packed_need = grow = 0
        for (tail, new), lists in zip(states.T, counts, strict=True):
            tails, packed = _C.append_need(int(tail), int(new), self.window, packs)
            tail_need += tails * int(lists)
            packed_need += packed * int(lists)
            grow = max(grow, tails + packed)
        table = self._grown(grow)
        tail_bytes, packed_bytes = _C.page_bytes(layout, 16, 16), _C.page_bytes(layout, k_bits, v_bits)
        in_tails = int((self.lists[:, PAGES] - self.lists[:, TAIL_PAGE]).sum())
        pool_tail, pool_packed = np.zeros(tail_need + in_tails, np.uint32), np.zeros(packed_need, np.uint32)
        left = np.zeros(2, np.int32)
        try:
            pool_tail[:tail_need] = self.arena.alloc(tail_bytes, tail_need)
            left[0] = tail_need
            pool_packed[:] = self.arena.alloc(packed_bytes, packed_need)
            left[1] = packed_need
            coding = self.coding
            _C.append(
                self.arena, table, self.lists, pool_tail, pool_packed, left, keys, values, valid, layout, k_bits,
                v_bits, self.window, coding.rotation, coding.scale, coding.stochastic, self.layer, coding.seed,
            )  # fmt: skip
            self.table = table
        finally:
            self.arena.free(tail_bytes, pool_tail[: left[0]])
            self.arena.free(packed_bytes, pool_packed[: left[1]])

    def _group_and_new(self, op: str, name: str, rows: Any, most: int | None = None) -> tuple[int, int]:
        """Heads of ``rows`` (b, heads, q, d) for each of the layer's, and q; ValueError for rows that do not fit."""
        shape = tuple(getattr(rows, "shape", ()))
        head_dim = self.coding.layout.head_dim
        group, rest = divmod(shape[1], self.heads) if len(shape) == 4 else (0, 0)
        if group < 1 or rest or group > (most or group) or shape[0] != self.batch or shape[3] != head_dim:
            heads = str(self.heads) if most == 1 else f"a multiple of {self.heads}"
            raise ValueError(f"{op}: {name}: expected shape ({self.batch}, {heads}, q, {head_dim}), got {shape}")
        return group, int(shape[2])

    def _counts(self, op: str, name: str, given: Any, q: int) -> np.ndarray[Any, Any] | None:
        """(b,) int32 of the real ones among q new tokens; None: all are."""
        if given is None:
            return None
        counts = np.asarray(given)
        if counts.dtype.kind not in "iu" or counts.shape != (self.batch,) or (counts < 0).any() or (counts > q).any():
            raise ValueError(f"{op}: {name}: expected {self.batch} integers in 0..{q}, got {counts.tolist()}")
        return np.ascontiguousarray(counts, np.int32)

    def _grown(self, pages: int) -> np.ndarray[Any, Any]:
        """The table, or a larger copy of it, with room for ``pages`` more in every row."""
        wanted = int(self.lists[:, PAGES].max(initial=0)) + pages
        if wanted <= self.table.shape[1]:
            return self.table
        table = np.zeros((len(self.lists), wanted + 8), np.uint64)
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
        layout = self.coding.layout
        group, q = self._group_and_new("attend", "queries", queries)
        counts = self._counts("attend", "new_tokens", new_tokens, q)
        out = empty_like(queries) if out is None else out
        pages = int(self.lists[:, PAGES].max(initial=0))
        scratch = workspace(_C.attend_workspace(len(self.lists), pages, group, q, layout.head_dim))
        _C.attend(
            out, mass, queries, self.arena, self.table, self.lists, counts, scratch, layout, self.coding.rotation,
            scale, softcap, 0,
        )  # fmt: skip
        return out

    def append_attend(
        self,
        queries: Any,
        keys: Any,
        values: Any,
        *,
        scale: float,
        softcap: float = 0.0,
        valid: np.ndarray[Any, Any] | None = None,
    ) -> Any:
        """Appends q new tokens and attends with their queries, 64 at a time; causal. Returns out, shaped as queries."""
        _, q = self._group_and_new("append", "queries", queries)
        if q != self._group_and_new("append", "keys", keys, most=1)[1]:
            raise ValueError(f"append: queries: expected those of {keys.shape[2]} new tokens, got {q}")
        counts = self._counts("append", "valid", valid, q)
        # What would be refused after the first append is refused before it.
        self.attend(queries[:, :, :0], scale=scale, softcap=softcap)
        if q <= CHUNK:
            self.append(keys, values, counts)
            return self.attend(queries, scale=scale, softcap=softcap, new_tokens=counts)
        for name, rows in (("keys", keys), ("values", values)):
            for sequence, real in enumerate([q] * self.batch if counts is None else counts):
                if not np.isfinite(to_float32(rows[sequence, :, q - real :])).all():
                    raise ValueError(f"append: {name}: expected finite values, got NaN or Inf in sequence {sequence}")
        out = empty_like(queries)
        for start in range(0, q, CHUNK):
            chunk = slice(start, min(start + CHUNK, q))
            width = chunk.stop - start
            part = None if counts is None else np.clip(counts - (q - chunk.stop), 0, width)
            self.append(keys[:, :, chunk], values[:, :, chunk], part)
            self.attend(queries[:, :, chunk], scale=scale, softcap=softcap, new_tokens=part, out=out[:, :, chunk])
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
                for size, members in self._by_size(entries):
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

    def release(self) -> None:
        """Gives every page back."""
        self._free(np.arange(len(self.lists)))
        self.table, self.lists = self.table[:0], self.lists[:0]

    def _by_size(self, entries: np.ndarray[Any, Any]) -> list[tuple[int, np.ndarray[Any, Any]]]:
        classes, members = np.unique(_classes(entries), return_inverse=True)
        sizes = np.array([_C.page_bytes(self.coding.layout, *divmod(int(c), 32)) for c in classes], np.int64)[members]
        return [(int(size), np.flatnonzero(sizes == size)) for size in np.unique(sizes)]

    def _free(self, rows: np.ndarray[Any, Any]) -> None:
        for row in rows:
            entries = self.table[row, : self.lists[row, PAGES]].view(PAGE)
            for size, members in self._by_size(entries):
                self.arena.free(size, np.ascontiguousarray(entries["unit"][members]))

    # ---- bytes

    @property
    def table_bytes(self) -> int:
        """Page table and list states."""
        return int(self.table.nbytes + self.lists.nbytes)

    def page_ledger(self) -> dict[str, int]:
        """Bytes of live pages by use: codes and scales of valid tokens, the 16-bit tail's tokens as window."""
        layout, entries = self.coding.layout, self.entries()
        column = np.broadcast_to(np.arange(self.table.shape[1]), self.table.shape)
        used = column < self.lists[:, PAGES, None]
        in_tail = (column >= self.lists[:, TAIL_PAGE, None])[used]
        codes = entries["tokens"].astype(np.int64) * layout.head_dim * (
            entries["k_bits"].astype(np.int64) + entries["v_bits"]
        ) // 8  # fmt: skip
        per_token = layout.head_dim // layout.group * (4 if layout.zero_point else 2)
        halves = (entries["k_bits"] < 16).astype(np.int64) + (entries["v_bits"] < 16)
        scales = entries["tokens"].astype(np.int64) * per_token * halves
        return {"codes": int(codes[~in_tail].sum()), "scales": int(scales.sum()), "window": int(codes[in_tail].sum())}

    def bits_histogram(self) -> dict[tuple[int, int], int]:
        """Tokens stored per class (k_bits, v_bits)."""
        entries = self.entries()
        classes, members = np.unique(_classes(entries), return_inverse=True)
        counts = np.bincount(members, entries["tokens"], minlength=len(classes))
        return {divmod(int(c), 32): int(n) for c, n in zip(classes, counts, strict=True)}
