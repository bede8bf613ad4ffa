"""What a list remembers of its plan while tokens are appended: which bits which importance got, and what its pages are
worth.

Importance is attention probability per query, averaged over the query heads of a KV head: it sums to 1 over a list's
tokens. A prompt's was measured once; new tokens' comes from attend's mass output, in the steps before the oldest 64
of the 16-bit tail are quantized ("observation"), 16 queries or so at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from . import _C
from .layer_input import Array
from .store import PAGES, TAIL_TOKENS, TOKENS

LEVELS = 4  # classes that a list's aged tokens may take
PAGE_TOKENS = 64
TAIL_PAGES = 4  # 16-bit pages whose tokens become one packed page
WORTH_BYTES = 4  # of a page's worth, beside its entry in the page table
WATCHED = 16  # tokens before a page is due, from which on attention is observed


@dataclass
class Ranks:
    """Arrays over a layer's n lists; c is the page table's capacity, 0 where no byte budget is held.

    Attributes:
        kind: (n, 4, 2) uint8 K and V bits of the list's packed classes, the most important tokens' first; 0, 0: none.
        level: (n, 4) float32 mean importance per token from which on 64 tokens take that class; the last one's is 0.
        recent: (n, 2) float32 attention that the oldest 64 tokens of the tail gathered, and from how many queries.
        worth: (n, c) float32 importance of every page, the sum of its tokens'; inf: it stays whatever happens.
        distortion_k, distortion_v: (n, 5) float32, drop: (n,) float32: the error of a unit of importance (plan.h).
    """

    kind: Array
    level: Array
    recent: Array
    worth: Array
    distortion_k: Array
    distortion_v: Array
    drop: Array

    @property
    def nbytes(self) -> int:
        return sum(int(getattr(self, field.name).nbytes) for field in fields(self))

    @property
    def holds(self) -> bool:
        """Whether pages' worth is kept, so that a byte budget can be held."""
        return len(self.drop) > 0

    def copy(self) -> Ranks:
        return Ranks(*(getattr(self, field.name).copy() for field in fields(self)))

    def select(self, rows: Array) -> None:
        """The lists become the old ``rows``."""
        for field in fields(self):
            value = getattr(self, field.name)
            if len(value):
                setattr(self, field.name, np.ascontiguousarray(value[rows]))

    def grow(self, capacity: int) -> None:
        """Room for as many pages as the page table has."""
        if self.holds and self.worth.shape[1] < capacity:
            worth = np.zeros((len(self.worth), capacity), np.float32)
            worth[:, : self.worth.shape[1]] = self.worth
            self.worth = worth

    # ---- observation

    def due(self, lists: Array, q: int, window: int) -> bool:
        """Whether the q tokens that were just appended bring a list near its next packed page."""
        return bool((lists[:, TAIL_TOKENS] + q > window + PAGE_TOKENS - WATCHED).any())

    def observe(self, mass: Array, table: Array, lists: Array, heads: int, queries: Array, decay: float) -> None:
        """Takes in what attention gave: mass (n, m) of ``queries`` (b,) real queries of ``heads`` query heads each."""
        counts = np.repeat(np.asarray(queries, np.float32), len(lists) // len(queries))
        start = (lists[:, TOKENS] - lists[:, TAIL_TOKENS])[:, None]
        columns = start + np.arange(PAGE_TOKENS)
        inside = columns < lists[:, TOKENS, None]
        gathered = np.take_along_axis(mass, np.minimum(columns, mass.shape[1] - 1), 1)
        self.recent[:, 0] += (gathered * inside).sum(1) / heads
        self.recent[:, 1] += counts
        if self.holds:
            most = int(queries.max(initial=0))
            keep = decay ** (most / WATCHED)
            unseen = self.worth[counts == 0]
            _C.accumulate(self.worth, mass, table, lists, keep, (1 - keep) / max(heads * most, 1))
            self.worth[counts == 0] = unseen

    # ---- aging

    def age(self, aged: Array, rows: Array) -> None:
        """Sets the class that each list in ``rows`` (n,) bool packs next, by the importance of the tokens it takes."""
        seen = rows & (self.recent[:, 1] > 0) & (self.kind[:, 0, 0] > 0)
        mean = self.recent[seen, 0] / self.recent[seen, 1] / PAGE_TOKENS
        place = (mean[:, None] >= self.level[seen]).argmax(1)  # the last level is 0: one is always reached
        aged[seen] = self.kind[seen][np.arange(len(place)), place]

    def merge(self, rows: Array, tail_page: Array) -> None:
        """In ``rows`` (r,) four tail pages from ``tail_page`` (r,) on became one: its worth is their sum."""
        if not self.holds or not len(rows):
            return
        block = self.worth[rows]
        at, columns = tail_page[:, None].astype(np.int64), np.arange(block.shape[1])
        whole = np.take_along_axis(block, at + np.arange(TAIL_PAGES), 1).sum(1)
        behind = np.minimum(columns + TAIL_PAGES - 1, block.shape[1] - 1)
        block = np.take_along_axis(block, np.where(columns <= at, columns, behind), 1)
        block[:, 1 - TAIL_PAGES :] = 0
        block[np.arange(len(block)), at[:, 0]] = whole
        self.worth[rows] = block


def list_bytes(hold: bool) -> int:
    """What Ranks takes for each list, the pages' worth apart: kind, level, recent; and, to hold bytes, the tables."""
    return LEVELS * (2 + 4) + 2 * 4 + ((5 + 5 + 1) * 4 if hold else 0)


def ladder(importance: Array, k_bits: Array, v_bits: Array, fixed: Array) -> tuple[Array, Array]:
    """kind, level (Ranks) of a plan: importance (n, s) float32, bits (n, s) as plan wrote them, fixed (n, s)."""
    n = len(importance)
    classes = np.where((fixed == 0) & (k_bits > 0), k_bits.astype(np.int32) * 32 + v_bits, 0)
    found = [int(c) for c in np.flatnonzero(np.bincount(classes.reshape(-1))) if c not in (0, 16 * 32 + 16)]
    counts = np.stack([(classes == c).sum(1) for c in found], 1) if found else np.zeros((n, 0), np.int64)
    sums = [np.where(classes == c, importance, 0).sum(1, dtype=np.float64) for c in found]
    means = (np.stack(sums, 1) if found else np.zeros((n, 0))) / np.maximum(counts, 1)
    if len(found) > LEVELS:  # the classes of most tokens
        small = np.argsort(-counts, 1, kind="stable")[:, LEVELS:]
        np.put_along_axis(counts, small, 0, 1)
    order = np.argsort(np.where(counts > 0, -means, np.inf), 1, kind="stable")[:, :LEVELS]
    kind, level = np.zeros((n, LEVELS, 2), np.uint8), np.zeros((n, LEVELS), np.float32)
    pairs = np.array([divmod(c, 32) for c in found], np.uint8).reshape(-1, 2)
    width = order.shape[1]
    there = np.take_along_axis(counts, order, 1) > 0
    kind[:, :width] = pairs[order] * there[..., None] if width else 0
    ranked = np.take_along_axis(means, order, 1)
    # Between two classes the geometric middle of their tokens' mean importance.
    level[:, : max(width - 1, 0)] = (np.sqrt(ranked[:, :-1] * ranked[:, 1:]) * there[:, 1:])[:, : max(width - 1, 0)]
    return kind, level


def page_worth(importance: Array, pages: Array, lists: Array, start: Array, tokens: Array, fixed: Array) -> Array:
    """(pages,) float32: importance (n, s) of each page's tokens, summed; inf for pages with sinks (fixed 1)."""
    runs = [np.arange(int(b), int(b) + int(c)) for b, c in zip(start, pages["tokens"], strict=True)]
    place = np.concatenate([np.zeros(0, np.int64), *runs])
    owner = np.repeat(np.arange(len(pages)), pages["tokens"])
    token = tokens[place]
    worth = np.bincount(owner, importance[lists[owner], token], minlength=len(pages)).astype(np.float32)
    worth[owner[fixed[lists[owner], token] == 1]] = np.inf
    return worth


def spread(values: Array, states: Array, capacity: int) -> Array:
    """Values of pages, all lists in a row -> (n, capacity) float32 as the page table has them."""
    out = np.zeros((len(states), capacity), np.float32)
    out[np.arange(capacity) < states[:, PAGES, None]] = values
    return out
