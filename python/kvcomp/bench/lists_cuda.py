"""Random packed caches on the GPU for benchmarks: pages of any classes, in shuffled order, for many layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import _C
from ..devices import arena_on
from ..store import TOKENS, Layout
from . import timing_cuda

_CHUNK_BYTES = 1 << 30  # of 16-bit rows that wait to be packed
_ENTRY_BYTES = 8
_HADAMARD, _SIGMA = 1, 0
_MIXED = ((2, 2), (3, 3), (4, 2), (4, 4), (8, 4), (8, 8), (16, 16))  # pages are sorted by class
_TAIL_TOKENS = 80


@dataclass(frozen=True)
class Form:
    """The pages of n lists: bits and tokens (n, c), zero behind a list's last page; pages of each list's tail (n,)."""

    k_bits: np.ndarray[Any, Any]
    v_bits: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]
    tail: np.ndarray[Any, Any]

    def state(self) -> np.ndarray[Any, Any]:
        """(n, 4): ``kvc_list``."""
        pages = (self.tokens > 0).sum(1)
        behind = np.arange(self.tokens.shape[1]) >= (pages - self.tail)[:, None]
        columns = pages, pages - self.tail, (self.tokens * behind).sum(1), self.tokens.sum(1)
        return np.stack(columns, 1).astype(np.int32)

    def page_bytes(self, layout: Layout) -> np.ndarray[Any, Any]:
        """(n, c): bytes of each page, 0 behind the last."""
        found = np.zeros(self.tokens.shape, np.int64)
        for k_bits, v_bits in {*zip(self.k_bits[self.tokens > 0], self.v_bits[self.tokens > 0], strict=True)}:
            mine = (self.k_bits == k_bits) & (self.v_bits == v_bits) & (self.tokens > 0)
            found[mine] = _C.page_bytes(layout, int(k_bits), int(v_bits))
        return found


def _form(lists: Sequence[Sequence[tuple[int, int, int]]], tail: Sequence[int]) -> Form:
    table = np.zeros((3, len(lists), max(map(len, lists))), np.int64)
    for i, pages in enumerate(lists):
        table[:, i, : len(pages)] = np.array(pages, np.int64).T
    k_bits, v_bits, tokens = table
    return Form(k_bits, v_bits, tokens, np.array(tail, np.int64))


def _pages(k_bits: int, v_bits: int, tokens: int) -> list[tuple[int, int, int]]:
    full, rest = divmod(tokens, room := _C.page_tokens(k_bits, v_bits))
    return [(k_bits, v_bits, room)] * full + [(k_bits, v_bits, rest)] * (rest > 0)


def uniform(n: int, tokens: int, k_bits: int, v_bits: int, tail_tokens: int = 0) -> Form:
    """Every list the same: pages of one class, then a 16-bit tail."""
    tail = _pages(16, 16, tail_tokens)
    one = _form([_pages(k_bits, v_bits, tokens - tail_tokens) + tail], [len(tail)])
    return Form(*(np.repeat(part, n, 0) for part in (one.k_bits, one.v_bits, one.tokens, one.tail)))


def mixed(n: int, tokens: int, seed: int) -> Form:
    """Lists of half to one and a half times ``tokens``, shares of the classes at random, most of them at few bits, the
    last page of every class partly filled, and a tail."""
    random = np.random.default_rng(seed)
    lists, tails = [], []
    for _ in range(n):
        length = int(tokens * random.uniform(0.5, 1.5))
        shares = random.dirichlet([2.0, 1.5, 1.5, 2.0, 0.7, 0.5, 0.3])
        ends = np.round(np.cumsum(shares) * (length - _TAIL_TOKENS)).astype(int)
        counts = np.diff(ends, prepend=0)
        pages = [page for bits, count in zip(_MIXED, counts, strict=True) for page in _pages(*bits, int(count))]
        tail = _pages(16, 16, _TAIL_TOKENS)
        lists.append(pages + tail)
        tails.append(len(tail))
    return _form(lists, tails)


class Layers:
    """Lists of ``layers`` layers in an arena as caches have, each size's pages in random order; the layers take turns
    over as many copies as keep the L2 from helping.

    Attributes:
        tables: (layers, n, c) uint64, each layer's own memory. lists: (layers, n, 4) int32.
        nbytes: what one layer's attention has to read: its pages and their entries.
    """

    def __init__(self, form: Form, layout: Layout, *, heads: int, group: int, seed: int, device: str = "cuda") -> None:
        """``group``: layers that are divided in one launch; there is a whole number of them."""
        random = np.random.default_rng(seed)
        self.layout, self.heads, self.seed = layout, heads, seed
        state, sizes = form.state(), form.page_bytes(layout)
        used = form.tokens > 0
        self.nbytes = int(sizes.sum()) + int(used.sum()) * _ENTRY_BYTES
        copies = timing_cuda.copies(self.nbytes)
        layers = group * -(-copies // group)
        # Each as often as the others, so that the next run begins with the one that was read longest ago.
        self.copies = copies = next(i for i in range(copies, layers + 1) if layers % i == 0)
        every = np.tile(sizes[used], copies)
        starts = np.empty(len(every), np.int64)
        self.device = torch.device(device)
        self.arena = arena_on(self.device)
        for size in np.unique(every):
            pages = np.flatnonzero(every == size)
            starts[pages] = random.permutation(self.arena.alloc(int(size), len(pages)))
        tables = np.zeros((copies, *form.tokens.shape), np.int64)
        tables[:, used] = starts.reshape(copies, -1)
        tables |= np.where(used, form.k_bits << 32 | form.v_bits << 40 | form.tokens << 48, 0)
        host = torch.from_numpy(tables)
        self._pack(form, host, state)
        self.tables = host.to(device).repeat(layers // copies, 1, 1).view(torch.uint64)
        self.lists = torch.from_numpy(state).to(device).expand(layers, -1, -1).contiguous()

    def _pack(self, form: Form, tables: torch.Tensor, state: np.ndarray[Any, Any]) -> None:
        """Normal rows, as many sequences at a time as memory is meant for."""
        device, h = self.device, self.heads
        generator = torch.Generator(device).manual_seed(self.seed)
        most, d = int(state[:, TOKENS].max()), self.layout.head_dim
        step = max(1, _CHUNK_BYTES // (h * most * d * 4))
        before = np.cumsum(form.tokens, 1) - form.tokens
        for copy in tables:
            for first in range(0, len(state) // h, step):
                rows = slice(first * h, (first + step) * h)
                part, start = copy[rows].numpy(), before[rows]
                who, page = np.nonzero(form.tokens[rows])
                shape = (len(part) // h, h, most, d)
                keys, values = (
                    torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator) for _ in range(2)
                )
                lists, starts = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (who, start[who, page]))
                entries = torch.from_numpy(part[who, page]).to(device).view(torch.uint64)
                tokens = torch.arange(most, dtype=torch.int32, device=device)
                _C.pack(
                    self.arena, keys, values, entries, lists, starts, tokens,
                    self.layout, _HADAMARD, _SIGMA, 0, 0, self.seed,
                )  # fmt: skip

    def rows(self, layer: int, lists: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (tokens, d) float32 that these lists of a layer hold."""
        found = []
        for i in lists:
            pages, _, _, tokens = self.lists[layer, i].tolist()
            entries = self.tables[layer, i, :pages].contiguous()
            counts = entries.view(torch.int64) >> 48 & 0xFF
            start = (counts.cumsum(0) - counts).int()
            shape = 1, 1, tokens, self.layout.head_dim
            keys, values = (torch.empty(shape, device=self.device) for _ in range(2))
            every = torch.arange(tokens, dtype=torch.int32, device=self.device)
            _C.unpack(keys, values, self.arena, entries, torch.zeros_like(start), start, every, self.layout, _HADAMARD)
            found.append((keys[0, 0], values[0, 0]))
        return found
