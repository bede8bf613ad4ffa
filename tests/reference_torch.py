"""Lists of any pages on a torch device, and attention over what they hold in float64, on that device.

Needs torch only: the NumPy references (reference.py) would take minutes over the sizes that GPU tests use."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from kvcomp import _C
from kvcomp.bench import near

BITS = (2, 3, 4, 8, 16)
CLASSES = list(itertools.product(BITS, BITS))
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = [(d, group) for d in HEAD_DIMS for group in range(16, d + 1, 16) if d % group == 0]
FLOAT16, BFLOAT16 = 1, 2  # kvc_dtype
FP16, E5M3 = 0, 1  # kvc_step
# Layouts: every combination once of zero point, 16-bit type, type of the scales.
LAYOUTS = [(1, FLOAT16, FP16), (0, BFLOAT16, FP16), (1, BFLOAT16, E5M3), (0, FLOAT16, E5M3)]
UNIT = 128
PAGES, TAIL_PAGE, TAIL_TOKENS, TOKENS = range(4)  # columns of kvc_list

# attend.h, CUDA: error over the root mean square of the exact output's channels, for float32 output.
BOUND = 1e-3

Page = tuple[int, int, int]  # k_bits, v_bits, tokens
Rows = Callable[[tuple[int, ...], torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def normal(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(2))
    return keys, values


def spots(where: slice, key: float, value: float | None = None) -> Rows:
    """Keys of zeros but for some tokens; values of normal numbers, but for the same tokens'."""

    def rows(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = torch.zeros(shape, device=generator.device), torch.empty(shape, device=generator.device)
        values.normal_(generator=generator)
        keys[..., where, :] = key
        if value is not None:
            values[..., where, :] = value
        return keys, values

    return rows


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def queries_of(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> torch.Tensor:
    """Normal numbers, the same on every device."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return rows.to(dtype).to(device)


def uniform(k_bits: int, v_bits: int, tokens: int) -> list[Page]:
    """Full pages of one class, and what is left over in a last one."""
    room = _C.page_tokens(k_bits, v_bits)
    full, rest = divmod(tokens, room)
    return [(k_bits, v_bits, room)] * full + [(k_bits, v_bits, rest)] * (rest > 0)


def mixed(tokens: int, seed: int = 0, classes: Sequence[tuple[int, int]] = CLASSES) -> list[Page]:
    """Pages of random classes and fill that hold `tokens` tokens, the last ones in a 16-bit tail."""
    random, pages, left = np.random.default_rng([seed, tokens]), [], tokens
    while left > 40:
        k_bits, v_bits = classes[random.integers(len(classes))]
        room = _C.page_tokens(k_bits, v_bits)
        count = room if random.integers(2) else int(random.integers(1, room + 1))
        pages.append((k_bits, v_bits, min(left, count)))
        left -= pages[-1][2]
    return pages + uniform(16, 16, left)


def assert_within(out: torch.Tensor, values: torch.Tensor) -> None:
    """Of each channel, between the least and the greatest of the list's values, but for rounding."""
    low, high = values.amin(2, keepdim=True) - 0.02, values.amax(2, keepdim=True) + 0.02
    assert bool(((out >= low) & (out <= high)).all())


class Cache:
    """Pages in shuffled order with gaps between, filled by pack; `keys`, `values` are what they unpack to, float32.

    What no list uses is filled with 0xA5 (arena) and ones (table)."""

    def __init__(
        self,
        layout: Sequence[int],
        lists: Sequence[Sequence[Page]],
        *,
        batch: int = 1,
        rotation: int = 1,
        seed: int = 0,
        rows: Rows = normal,
        device: str = "cuda",
        first_unit: int = 1,
        room: int = 0,
        aged: tuple[int, int] = (4, 4),
        window: int = 32,
    ) -> None:
        """first_unit: where pages begin. room: tokens that every list can be appended, those that age of class aged."""
        random = np.random.default_rng(seed)
        self.layout, self.batch, self.rotation, self.window = tuple(layout), batch, rotation, window
        self.heads, n = len(lists) // max(batch, 1), len(lists)
        pages = [page for entries in lists for page in entries]
        spare = [*[(16, 16, 0)] * (n * (window // 16 + 10)), *[(*aged, 0)] * (n * (room // 64 + 2))] if room else []
        self.sizes = {c: _C.page_bytes(self.layout, *c) for c in CLASSES}
        gaps = np.array([self.sizes[k, v] // UNIT + 1 for k, v, _ in [*pages, *spare]], np.int64)
        order, units = random.permutation(len(gaps)), np.zeros(len(gaps), np.int64)
        units[order] = first_unit + np.cumsum(gaps[order]) - gaps[order]
        table = np.full((n, max([1, *map(len, lists)]) + (room // 16 + 8 if room else 1)), -1, np.int64)
        state, at = np.zeros((n, 4), np.int32), 0
        for i, entries in enumerate(lists):
            for j, (k_bits, v_bits, count) in enumerate(entries):
                table[i, j] = units[at] | k_bits << 32 | v_bits << 40 | count << 48
                at += 1
            tail = self.tail_of(entries)
            tokens = sum(count for _, _, count in entries)
            state[i] = len(entries), tail, sum(count for _, _, count in entries[tail:]), tokens
        self.table = torch.from_numpy(table).to(device).view(torch.uint64)
        self.lists = torch.from_numpy(state).to(device)
        self.arena = torch.full(((first_unit + int(gaps.sum())) * UNIT,), 0xA5, dtype=torch.uint8, device=device)
        if room:
            self._pools(units[at:], state, window // 16 + 10, aged)
        generator = torch.Generator(device).manual_seed(seed)
        shape = (batch, self.heads, max(1, int(state[:, TOKENS].max(initial=0))), self.layout[0])
        _C.pack(self.arena, *rows(shape, generator), *self.index(), self.layout, rotation, 0, 0, 0, 0)
        self.unpack()

    @staticmethod
    def tail_of(entries: Sequence[Page]) -> int:
        """The first page of the longest run of 16-bit pages at the end that are full, but the last."""
        first = len(entries)
        while first and entries[first - 1][:2] == (16, 16) and (first == len(entries) or entries[first - 1][2] == 16):
            first -= 1
        return first

    def _pools(self, units: np.ndarray, state: np.ndarray, tails: int, aged: tuple[int, int]) -> None:
        n = len(state)
        tail_pages = int((state[:, PAGES] - state[:, TAIL_PAGE]).max(initial=0))
        pool = np.zeros((n, tails + tail_pages), np.int32)
        pool[:, :tails] = units[: n * tails].reshape(n, tails)
        packed = units[n * tails :].reshape(n, -1).astype(np.int32)
        left = np.tile(np.array([[tails, packed.shape[1]]], np.int32), (n, 1))
        device = self.lists.device
        self.pool_tail = torch.from_numpy(pool).to(device).view(torch.uint32)
        self.pool_packed = torch.from_numpy(packed).to(device).view(torch.uint32)
        self.left = torch.from_numpy(left).to(device)
        self.classes = torch.tensor([aged] * n, dtype=torch.uint8, device=device)

    def to(self, device: str) -> Cache:
        """A copy on a device of its own memory; "cuda" to "cuda" too."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(twin, name, value.to(device, copy=True))
        return twin

    def index(self) -> list[torch.Tensor]:
        """Pages in use, their lists, first token and tokens, as pack and unpack want them."""
        state = self.lists.cpu().numpy().astype(np.int64)
        table = self.table.view(torch.int64).cpu().numpy()
        entries = table[np.arange(table.shape[1]) < state[:, PAGES, None]]
        who = np.repeat(np.arange(len(state)), state[:, PAGES])
        counts = entries >> 48 & 0xFF
        before = np.cumsum(counts) - counts
        start = before - (np.cumsum(state[:, TOKENS]) - state[:, TOKENS])[who]
        tokens = np.arange(max(1, int(state[:, TOKENS].max(initial=0))))
        index = [torch.from_numpy(x.astype(np.int32)).to(self.lists.device) for x in (who, start, tokens)]
        return [torch.from_numpy(entries).to(self.lists.device).view(torch.uint64), *index]

    def unpack(self) -> None:
        """Sets keys and values, (b, h, tokens, d) float32, and the lists' tokens."""
        index = self.index()
        shape = (self.batch, self.heads, len(index[3]), self.layout[0])
        self.keys, self.values = (torch.zeros(shape, device=self.arena.device) for _ in range(2))
        _C.unpack(self.keys, self.values, self.arena, *index, self.layout, self.rotation)
        self.tokens = self.lists[:, TOKENS].view(self.batch, self.heads).long()

    # ---- operations

    def workspace(self, group: int, q: int, mass_tokens: int = 0) -> torch.Tensor:
        n, c = self.table.shape
        if self.arena.device.type == "cpu":
            return torch.empty(_C.attend_workspace(n, c, group, q, self.layout[0]), dtype=torch.uint8)
        nbytes = _C.attend_workspace_cuda(n, c, group, q, self.layout[0], mass_tokens)
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=self.arena.device)

    def divide(self) -> torch.Tensor:
        words = _C.divide_words(len(self.lists), self.arena.device.index)
        divisions = torch.full((1, words), -7, dtype=torch.int32, device=self.arena.device)
        _C.divide(divisions, self.table[None], self.lists[None], self.layout)
        return divisions[0]

    def arguments(
        self,
        queries: torch.Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        new: Sequence[int] | None = None,
        mass: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
        division: torch.Tensor | None = None,
        early: int = 0,
    ) -> list[Any]:
        if out is None:
            out = torch.full(tuple(queries.shape), 77, dtype=queries.dtype, device=queries.device)
        if workspace is None:
            group = queries.shape[1] // max(self.heads, 1)
            workspace = self.workspace(group, queries.shape[2], 0 if mass is None else mass.shape[1])
        fresh = None if new is None else torch.tensor(new, dtype=torch.int32, device=self.arena.device)
        return [
            out, mass, queries, self.arena, self.table, self.lists, fresh, workspace, self.layout, self.rotation,
            self.layout[0] ** -0.5 if scale is None else scale, softcap, 0, division, early,
        ]  # fmt: skip

    def attend(self, queries: torch.Tensor, **options: Any) -> torch.Tensor:
        arguments = self.arguments(queries, **options)
        _C.attend(*arguments)
        out: torch.Tensor = arguments[0]
        return out

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Rows (b, h, q, d); keys and values of this object stay as they were until unpack."""
        _C.append(
            self.arena, self.table, self.lists, self.pool_tail, self.pool_packed, self.left, keys, values, None,
            self.classes, self.layout, self.window, self.rotation, 0, 0, 0, 0,
        )  # fmt: skip

    # ---- what is right

    def exact(
        self, queries: torch.Tensor, scale: float | None = None, softcap: float = 0.0, new: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (b, hq, q, d) and mass (lists, tokens) in float64 from keys and values, a few sequences at a time."""
        b, hq, q, d = queries.shape
        h, s = self.heads, self.keys.shape[2]
        out = torch.zeros((b, hq, q, d), dtype=torch.float64, device=queries.device)
        mass = torch.zeros((b, h, s), dtype=torch.float64, device=queries.device)
        fresh = torch.full((b,), q) if new is None else torch.tensor(new)
        fresh = fresh.to(queries.device).view(b, 1, 1, 1, 1)
        back = torch.arange(q - 1, -1, -1, device=queries.device).view(1, 1, 1, q, 1)
        step = max(1, (1 << 27) // max(1, hq * q * s + 2 * h * s * d))
        for i in range(0, b, step):
            part = slice(i, i + step)
            rows = queries[part].double().view(-1, h, hq // max(h, 1), q, d)
            logits = torch.einsum("bhgqd,bhsd->bhgqs", rows, self.keys[part].double())
            logits *= self.layout[0] ** -0.5 if scale is None else scale
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            seen = (self.tokens[part].view(-1, h, 1, 1, 1) - back) * (back < fresh[part])
            hidden = torch.arange(s, device=queries.device) >= seen
            weights = torch.where(hidden.all(-1, keepdim=True), 0.0, logits.masked_fill(hidden, -torch.inf).softmax(-1))
            out[part] = torch.einsum("bhgqs,bhsd->bhgqd", weights, self.values[part].double()).reshape(-1, hq, q, d)
            mass[part] = weights.sum((2, 3))
        return out, mass.view(b * h, s)

    def check(self, queries: torch.Tensor, *, with_mass: bool = True, bound: float = BOUND, **options: Any) -> Any:
        """Output, without mass and (unless told otherwise) with it, and mass, within their bounds of the exact ones;
        returns the output without: on CUDA, kernels of their own give the mass."""
        asked = {name: options[name] for name in ("scale", "softcap", "new") if name in options}
        exact, masses = self.exact(queries, **asked)
        largest = float(self.values.abs().max())
        out = self.attend(queries, **options)
        assert_near(out, exact, largest, bound)
        if not with_mass:
            return out
        n, s = masses.shape
        mass = torch.full((n, s + 3), 77.0, device=queries.device)
        other = self.attend(queries, **options | {"mass": mass, "out": torch.full_like(out, 77), "workspace": None})
        assert_near(other, exact, largest, bound)
        excess = (mass[:, :s] - masses).abs() - (3 * bound * masses + 1e-6)
        assert not bool((excess > 0).any()), f"mass: {float(excess.max()):.3g} over its bound"
        hidden = torch.arange(s + 3, device=mass.device) >= self.tokens.view(n, 1)
        assert bool((mass[hidden] == 0).all()), "mass behind a list's last token"
        return out


def assert_near(out: torch.Tensor, exact: torch.Tensor, largest: float, bound: float = BOUND) -> None:
    """Every row's error within `bound` times the row in root mean squares over its channels, and every channel within
    five times that, plus half a unit of its type. (Weights are rounded to 11 bits before they meet V, as all
    tensor-core attention does: where few tokens hold the weight, one channel in a hundred is off by 2 to 4e-3 of the
    row's size.) largest: the largest value; sums that cancel exactly may miss zero by 1e-7 of it."""
    if not out.numel():
        return
    whole, most, size, rest = near.missed(out, exact, largest)
    ratio = torch.maximum(whole / (bound * size + rest), most / (5 * bound * size + rest))
    worst = int(ratio.argmax())
    where = np.unravel_index(worst, tuple(ratio.shape))
    assert float(ratio.flatten()[worst]) <= 1, (
        f"{float(ratio.flatten()[worst]):.3g} times the bound at (sequence, head, query) "
        f"{tuple(int(i) for i in where)}; {int((ratio > 1).sum())} of {ratio.numel()} rows are over it"
    )


def many_lists(pages: Sequence[Page], rows: Rows, rotation: int = 1) -> Cache:
    """So many equal lists that whoever works on one of 1500 tokens has several of its pages."""
    return Cache((64, 64, 1, FLOAT16, FP16), [pages] * 264, batch=264, rows=rows, rotation=rotation)


def check_many_huge_logits(size: float, q: int, heads: Sequence[int] = (4,)) -> None:
    """Of `many_lists` with q new tokens: a logit of `size` above the others takes everything; among equal ones, of so
    many query heads, weights are shares."""
    for bits in (4, 2, 16):
        cache = many_lists(uniform(bits, bits, 1500), spots(slice(1200, 1201), 100.0))
        cache.check(torch.full((264, 4, q, 64), size / 6400, device="cuda"), scale=1.0, with_mass=False)
    for pages in (uniform(4, 4, 1000), uniform(2, 2, 1000) + uniform(16, 16, 100), uniform(16, 8, 1000)):
        cache = many_lists(pages, spots(slice(None), 100.0), rotation=0)
        for count in heads:
            out = cache.attend(torch.full((264, count, q, 64), size / 6400, device="cuda"), scale=1.0)
            assert_within(out, cache.values)
