"""append: rows into 16-bit tails, and tails into packed pages, step by step as append.h says."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp import _C
from reference import (
    BFLOAT16,
    CLASSES,
    FLOAT16,
    GROUPS,
    PAGE,
    PLAIN,
    SEARCH,
    UNIT,
    Array,
    Layout,
    Options,
    aligned,
    clamp,
    from_half,
    pack_page,
    page_bytes,
    rotate,
    to_half,
)

LAYOUT = Layout(64, 64, 1, FLOAT16)


class Cache:
    """append's arguments, and beside them what the contract's text makes of the same calls."""

    def __init__(
        self,
        layout: Layout,
        bits: tuple[int, int] | list[tuple[int, int]],
        window: int,
        b: int,
        h: int,
        o: Options = PLAIN,
        capacity: int = 40,
    ) -> None:
        """``bits``: the class of every list, or of each."""
        n = b * h
        self.layout, self.window, self.b, self.h, self.o = layout, window, b, h, o
        self.bits = bits if isinstance(bits, list) else [bits] * n
        self.classes = np.array(self.bits, np.uint8).reshape(n, 2)
        self.table = np.zeros((n, capacity), np.uint64)
        self.lists = np.zeros((n, 4), np.int32)
        # Page sizes differ: every list's packed pages lie in a stretch of their own behind all tail pages.
        tail_bytes, most = page_bytes(layout, 16, 16), 4 * capacity
        sizes = np.array([page_bytes(layout, *pair) for pair in self.bits])
        first = n * most * tail_bytes + capacity * (np.cumsum(sizes) - sizes)
        self.arena = aligned(n * most * tail_bytes + capacity * int(sizes.sum()))
        tails = np.random.default_rng(0).permutation(n * most).reshape(n, most) * tail_bytes
        packed = first[:, None] + np.arange(capacity) * sizes[:, None]
        self.pools = [(units // UNIT).astype(np.uint32) for units in (tails, packed)]
        self.left = np.tile(np.array([most, capacity], np.int32), (n, 1))
        self.owned = [[set(row) for row in pool.tolist()] for pool in self.pools]
        # the model: packed pages and tail of every list, rows as they were handed in
        self.packed: list[list[bytes]] = [[] for _ in range(n)]
        self.tail: list[list[tuple[Array, Array]]] = [[] for _ in range(n)]

    def arguments(self, keys: Any, values: Any, valid: Any = None) -> list[Any]:
        return [
            self.arena,
            self.table,
            self.lists,
            *self.pools,
            self.left,
            keys,
            values,
            valid,
            self.classes,
            self.layout,
            self.window,
            *self.o,
        ]

    def append(self, keys: Array, values: Array, valid: Any = None) -> None:
        _C.append(*self.arguments(keys, values, None if valid is None else np.array(valid, np.int32)))
        q = keys.shape[2]
        for i in range(self.b * self.h):
            for j in range(q - (q if valid is None else valid[i // self.h]), q):
                self.add(i, keys[i // self.h, i % self.h, j], values[i // self.h, i % self.h, j])

    def add(self, i: int, key: Array, value: Array) -> None:
        while self.bits[i] != (16, 16) and len(self.tail[i]) >= self.window + 64:
            aged, self.tail[i] = self.tail[i][:64], self.tail[i][64:]
            numbers = 64 * len(self.packed[i]) + np.arange(64)
            rows = (np.stack(part) for part in zip(*aged, strict=True))
            self.packed[i].append(pack_page(*rows, *self.bits[i], self.layout, self.o._replace(rotation=0), i, numbers))
        pair = [np.asarray(row, np.float32)[None] for row in (key, value)]
        if self.o.rotation:
            pair = [rotate(clamp(row)) for row in pair]
        self.tail[i].append(tuple(from_half(to_half(row, self.layout.half), self.layout.half)[0] for row in pair))

    def check(self) -> None:
        """Every page, entry, state and stack is what the text says; no page is in two places."""
        for i, (packed, tail) in enumerate(zip(self.packed, self.tail, strict=True)):
            units = [pool[i, :left].tolist() for pool, left in zip(self.pools, self.left[i], strict=True)]
            pages = [tail[j : j + 16] for j in range(0, len(tail), 16)]
            state = [len(packed) + len(pages), len(packed), len(tail), 64 * len(packed) + len(tail)]
            assert self.lists[i].tolist() == state
            entries = self.table[i, : state[0]].view(PAGE)
            for entry, data in zip(entries, packed, strict=False):
                assert entry.tolist()[1:] == (*self.bits[i], 64, 0)
                assert self.bytes_at(entry) == data
                units[1].append(int(entry["unit"]))
            for entry, page in zip(entries[len(packed) :], pages, strict=True):
                assert entry.tolist()[1:] == (16, 16, len(page), 0)
                rows = (np.stack(part) for part in zip(*page, strict=True))
                assert self.bytes_at(entry) == pack_page(*rows, 16, 16, self.layout, Options(0))
                units[0].append(int(entry["unit"]))
            for stack, found in enumerate(units):
                assert set(found) == self.owned[stack][i] and len(found) == len(self.owned[stack][i])

    def bytes_at(self, entry: Any) -> bytes:
        first = int(entry["unit"]) * UNIT
        size = page_bytes(self.layout, int(entry["k_bits"]), int(entry["v_bits"]))
        return self.arena[first : first + size].tobytes()

    def state(self) -> list[bytes]:
        return [x.tobytes() for x in (self.arena, self.table, self.lists, *self.pools, self.left)]


class Mirror:
    """A cache's table, lists, stacks and counts, of its own memory: what append_walk takes."""

    def __init__(self, cache: Cache) -> None:
        self.window, self.classes = cache.window, cache.classes
        self.arrays = [array.copy() for array in (cache.table, cache.lists, *cache.pools, cache.left)]

    def walk(self, q: int, valid: Any = None) -> None:
        counts = None if valid is None else np.array(valid, np.int32)
        _C.append_walk(*self.arrays, counts, self.classes, self.window, q)

    def state(self) -> list[bytes]:
        return [array.tobytes() for array in self.arrays]


def rows_of(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", CLASSES)
def test_token_by_token(bits: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    cache = Cache(LAYOUT, bits, window=5, b=1, h=2)
    keys, values = rows_of(random, 1, 2, 140, 64), rows_of(random, 1, 2, 140, 64)
    for j in range(140):
        cache.append(keys[:, :, j : j + 1], values[:, :, j : j + 1])
        if j in (0, 15, 16, 63, 64, 68, 69, 70, 132, 133, 134):
            cache.check()
    cache.check()
    expected = 0 if bits == (16, 16) else 2  # flushed when the 70th and the 134th token came
    assert [len(pages) for pages in cache.packed] == [expected] * 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_appends(data: st.DataObject) -> None:
    head_dim, group = data.draw(st.sampled_from(GROUPS[:9]))
    layout = Layout(head_dim, group, data.draw(st.integers(0, 1)), data.draw(st.sampled_from([FLOAT16, BFLOAT16])))
    b, h = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    o = Options(*(data.draw(st.integers(0, most)) for most in (1, 2, 1, 5, 1 << 40)))
    classes = data.draw(st.lists(st.sampled_from(CLASSES), min_size=b * h, max_size=b * h))
    cache = Cache(layout, classes, data.draw(st.sampled_from([0, 1, 16, 40, 100])), b, h, o)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(1, 4))):
        q = data.draw(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 90]))
        valid = data.draw(st.none() | st.lists(st.integers(0, q), min_size=b, max_size=b))
        keys, values = rows_of(random, b, h, q, head_dim), rows_of(random, b, h, q, head_dim)
        if valid is not None:
            for i, count in enumerate(valid):
                keys[i, :, : q - count] = np.nan  # padding is not looked at
                values[i, :, : q - count] = np.inf
        mirror = Mirror(cache)
        cache.append(keys, values, valid)
        mirror.walk(q, valid)
        assert mirror.state() == cache.state()[1:]
    cache.check()


@pytest.mark.parametrize("window", [0, 1, 63, 64, 100])
@pytest.mark.parametrize("q", [1, 7, 64, 200])
def test_the_newest_tokens_stay_at_16_bits(window: int, q: int) -> None:
    """After every call, window + 1 .. window + 64 tokens of a long list are in its tail."""
    cache = Cache(LAYOUT, (2, 2), window, 1, 1)
    rows = np.zeros((1, 1, q, 64), np.float32)
    for _ in range(420 // q):
        before = int(cache.lists[0, 2])
        cache.append(rows, rows)
        tail, tokens = int(cache.lists[0, 2]), int(cache.lists[0, 3])
        assert tail == tokens if tokens <= window + 64 else window < tail <= window + 64
        assert q > 1 or tail == before + 1 or before == window + 64
    cache.check()


def test_pages_stay_in_the_order_of_arrival() -> None:
    random = np.random.default_rng(1)
    cache = Cache(LAYOUT, (8, 8), 10, 1, 1)
    keys = np.arange(200, dtype=np.float32)[None, None, :, None] + 0.01 * rows_of(random, 1, 1, 200, 64)
    for start in range(0, 200, 40):
        cache.append(keys[:, :, start : start + 40], keys[:, :, start : start + 40])
    pages, _, _, tokens = cache.lists[0]
    entries = cache.table[0, :pages].view(PAGE)
    ends = np.cumsum(entries["tokens"])
    out = [np.zeros((1, 1, 200, 64), np.float32) for _ in range(2)]
    _C.unpack(
        *out,
        cache.arena,
        cache.table[0, :pages],
        np.zeros(pages, np.int32),
        (ends - entries["tokens"]).astype(np.int32),
        np.arange(200, dtype=np.int32),
        LAYOUT,
        1,
    )
    assert tokens == 200 and np.array_equal(out[0][0, 0].mean(1).round(), np.arange(200))


def test_exact_as_pack_without_rotation() -> None:
    """fp16 rows that have gone through a tail give the pages that pack makes of them, each in its list's class."""
    classes = [(2, 8), (3, 4), (16, 16), (8, 8), (2, 8), (16, 2)]
    random = np.random.default_rng(2)
    keys, values = rows_of(random, 3, 2, 129, 64).astype(np.float16), rows_of(random, 3, 2, 129, 64).astype(np.float16)
    cache = Cache(LAYOUT, classes, 0, 3, 2, Options(0, SEARCH, 1, 4, 17))
    cache.append(keys, values)
    cache.check()
    packed = np.array([0, 1, 3, 4, 5]).repeat(2)
    bits = [classes[i] for i in packed]
    sizes = [page_bytes(LAYOUT, *pair) for pair in bits]
    pages = np.zeros(len(packed), PAGE)
    pages["unit"] = (np.cumsum(sizes) - sizes) // UNIT
    pages["k_bits"], pages["v_bits"] = np.array(bits).T
    pages["tokens"] = 64
    arena = aligned(sum(sizes))
    _C.pack(
        arena,
        keys,
        values,
        pages.view(np.uint64),
        packed.astype(np.int32),
        np.tile([0, 64], len(packed) // 2).astype(np.int32),
        np.arange(128, dtype=np.int32),
        LAYOUT,
        *cache.o,
    )
    entries = cache.table[packed, np.tile([0, 1], len(packed) // 2)].view(PAGE)
    assert b"".join(cache.bytes_at(entry) for entry in entries) == arena.tobytes()
    assert cache.lists[2].tolist() == [9, 0, 129, 129] and cache.lists[3].tolist() == [3, 2, 1, 129]
    assert cache.left[:, 1].tolist() == [38, 38, 40, 38, 38, 38]


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_input_types_and_strides(kind: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    random = np.random.default_rng(3)
    memory = rows_of(random, 2, 70, 2, 64).astype(kind)
    strided = memory.transpose(0, 2, 1, 3)
    caches = [Cache(Layout(64, 64, 1, BFLOAT16), (4, 4), 0, 2, 2) for _ in range(2)]
    caches[0].append(strided, strided)
    caches[0].check()
    tensor = torch.from_numpy(strided.astype(np.float32)).to(getattr(torch, np.dtype(kind).name)).transpose(1, 2)
    tensor = tensor.contiguous().transpose(1, 2)
    _C.append(*caches[1].arguments(tensor, tensor))
    assert caches[0].state() == caches[1].state()


# ---- how many pages


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 200), st.booleans())
def test_need(tail: int, q: int, window: int, packs: bool) -> None:
    """Walks through the contract's loop, counting pages."""
    need = _C.append_need(tail, q, window, packs)
    pages = start = -(-tail // 16)
    peak = flushes = 0
    for _ in range(q):
        while packs and tail >= window + 64:
            tail, pages, flushes = tail - 64, pages - 4, flushes + 1
        pages += tail % 16 == 0
        tail += 1
        peak = max(peak, pages - start)
    assert need == (peak, flushes)


def filled(tokens: int, window: int = 0, h: int = 1) -> Cache:
    cache = Cache(LAYOUT, (4, 2), window, 1, h)
    rows = rows_of(np.random.default_rng(4), 1, h, tokens, 64)
    cache.append(rows, rows)
    return cache


def test_just_enough_pages() -> None:
    """With exactly the pages that append_need states it works, with one less of either kind it changes nothing."""
    row = np.ones((1, 1, 65, 64), np.float32)
    for tokens in (1, 16, 63, 64, 65):
        need = _C.append_need(filled(tokens).lists[0, 2], 65, 0, True)
        for short in ((0, 0), (1, 0), (0, 1)):
            cache = filled(tokens)
            cache.left[0] = np.subtract(need, short)
            before = cache.state()
            mirror = Mirror(cache)
            if short == (0, 0):
                _C.append(*cache.arguments(row, row))
                assert cache.left[0, 1] == 0
            elif cache.left.min() >= 0:
                text = r"left: expected \d+ tail and \d+ packed pages for list 0, got \d+ and \d+$"
                with pytest.raises(ValueError, match=f"^append: {text}"):
                    _C.append(*cache.arguments(row, row))
                assert cache.state() == before
                with pytest.raises(ValueError, match=f"^append_walk: {text}"):
                    mirror.walk(65)
                assert mirror.state() == before[1:]


def test_stacks_of_pages() -> None:
    """A flush pushes its four pages, in order, onto its own list's stack; what comes next takes the last of them."""
    cache = filled(64, h=3)
    cache.left[:] = [[0, 1], [0, 2], [5, 1]]
    before, tails = cache.pools[0].copy(), cache.table[:, :4].view(PAGE)["unit"].copy()
    packed = cache.pools[1][[0, 1, 2], [0, 1, 0]]
    row = np.ones((1, 3, 1, 64), np.float32)
    _C.append(*cache.arguments(row, row))
    assert cache.left.tolist() == [[3, 0], [3, 1], [8, 0]] and (cache.lists == [2, 1, 1, 65]).all()
    assert np.array_equal(cache.table[:, :2].view(PAGE)["unit"], np.stack([packed, tails[:, 3]], 1))
    for i, start in enumerate((0, 0, 5)):
        assert np.array_equal(cache.pools[0][i, start : start + 4], tails[i])
        assert np.array_equal(
            np.delete(cache.pools[0][i], range(start, start + 4)), np.delete(before[i], range(start, start + 4))
        )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 100), st.integers(0, 300), st.integers(0, 200), st.lists(st.sampled_from(CLASSES), min_size=4))
def test_a_walk_of_many_tokens_is_many_walks_of_one(
    window: int, tokens: int, q: int, bits: list[tuple[int, int]]
) -> None:
    one = Mirror(Cache(LAYOUT, bits[:4], window, 2, 2))
    one.walk(tokens)
    many = Mirror(Cache(LAYOUT, bits[:4], window, 2, 2))
    many.arrays = [array.copy() for array in one.arrays]
    one.walk(q)
    for _ in range(q):
        many.walk(1)
    assert one.state() == many.state()


# ---- refusals: one sentence, nothing changed


def test_not_finite_changes_nothing() -> None:
    cache = filled(70, h=2)
    before = cache.state()
    rows = np.ones((1, 2, 3, 64), np.float32)
    for bad in (np.nan, np.inf):
        broken = rows.copy()
        broken[0, 1, 2, 7] = bad
        for pair, name in (((broken, rows), "keys"), ((rows, broken), "values")):
            with pytest.raises(
                ValueError, match=rf"^append: {name}: expected finite values, got NaN or Inf in row 2 of list 1$"
            ):
                _C.append(*cache.arguments(*pair))
            assert cache.state() == before


def change(cache: Cache, what: str) -> list[Any]:
    """Arguments with one thing wrong."""
    row = np.ones((1, 1, 30, 64), np.float32)
    arguments = cache.arguments(row, row)
    entry = cache.table[0, int(cache.lists[0, 1]) :].view(PAGE)
    if what == "tail page beyond the arena":
        entry["unit"][0] = 2**32 - 1
    elif what == "tail page of another class":
        entry["k_bits"][0] = 4
    elif what == "tail page with other tokens":
        entry["tokens"][0] = 3
    elif what == "tail tokens":
        cache.lists[0, 2] = 2**31 - 1
    elif what == "tail page index":
        cache.lists[0, 1] = 2**31 - 1
    elif what == "negative pages":
        cache.lists[0, 0] = -1
    elif what == "tokens":
        cache.lists[0, 3] = 2**31 - 5
    elif what == "pool beyond the arena":
        cache.pools[1][0, int(cache.left[0, 1]) - 1] = 2**32 - 1
    elif what == "tail pool beyond the arena":
        cache.pools[0][0, 0] = 2**32 - 1
    elif what == "negative left":
        cache.left[0, 1] = -1
    elif what == "left beyond the pool":
        cache.left[0, 0] = 2**31 - 1
    elif what == "left of one stack":
        arguments[5] = cache.left[:, :1].copy()
    elif what == "stacks of two lists":
        arguments[4] = np.concatenate([cache.pools[1]] * 2)
    elif what == "one stack for all":
        arguments[3] = cache.pools[0][0].copy()
    elif what == "valid":
        arguments[8] = np.array([31], np.int32)
    elif what == "negative valid":
        arguments[8] = np.array([-1], np.int32)
    elif what == "shape of valid":
        arguments[8] = np.array([3, 3], np.int32)
    elif what == "full table":
        arguments[1] = np.ascontiguousarray(cache.table[:, : int(cache.lists[0, 0])])
    elif what == "small pool array":
        arguments[3] = cache.pools[0][:, :3].copy()
        cache.left[0, 0] = 2
    elif what == "bits":
        cache.classes[0, 0] = 7
    elif what == "class of another list":
        arguments[9] = np.full((2, 2), 4, np.uint8)
    elif what == "type of classes":
        arguments[9] = cache.classes.astype(np.int32)
    elif what == "window":
        arguments[11] = -1
    elif what == "heads":
        arguments[6] = arguments[7] = np.ones((1, 2, 30, 64), np.float32)
    elif what == "channels":
        arguments[6] = np.ones((1, 1, 30, 128), np.float32)[..., ::2]
    elif what == "type":
        arguments[6] = row.astype(np.float64)
    elif what == "read-only table":
        arguments[1] = cache.table.view()
        arguments[1].flags.writeable = False
    elif what == "overlap":
        arguments[3] = arguments[4]
    return arguments


TAIL = "table: expected a tail page of 16 tokens in the arena, got K {}, V 16, {} tokens at unit {} in list 0"
STATE = "lists: expected a consistent state, got pages {}, tail_page {}, tail_tokens {} in list 0"
REFUSED = {
    "tail page beyond the arena": TAIL.format(16, 16, 4294967295),
    "tail page of another class": TAIL.format(4, 16, r"\d+"),
    "tail page with other tokens": TAIL.format(16, 3, r"\d+"),
    "tail tokens": STATE.format(3, 1, 2147483647),
    "tail page index": STATE.format(3, 2147483647, 30),
    "negative pages": STATE.format(-1, 1, 30),
    "tokens": r"lists: expected fewer than 2\^31 tokens, got 2147483643 and 30 more",
    "pool beyond the arena": r"pool_packed: expected pages inside the arena's \d+ bytes, got unit 4294967295",
    "tail pool beyond the arena": r"pool_tail: expected pages inside the arena's \d+ bytes, got unit 4294967295",
    "negative left": r"left: expected 0\.\.40 pages in pool_packed, got -1 in list 0",
    "left beyond the pool": r"left: expected 0\.\.160 pages in pool_tail, got 2147483647 in list 0",
    "left of one stack": r"left: expected shape \(1, 2\), got \(1, 1\)",
    "stacks of two lists": r"pool_packed: expected shape \(1, \*\), got \(2, 40\)",
    "one stack for all": r"pool_tail: expected shape \(1, \*\), got \(160,\)",
    "valid": r"valid: expected 0\.\.30, got 31",
    "negative valid": r"valid: expected 0\.\.30, got -1",
    "shape of valid": r"valid: expected shape \(1,\), got \(2,\)",
    "full table": "table: expected room for 2 more pages in list 0, got capacity 3 with 3 in use",
    "small pool array": "pool_tail: expected room for 4 pages, its own and the tail's, got 3 in list 0",
    "bits": "classes: expected bits of 2, 3, 4, 8 or 16, got K 7, V 2 in list 0",
    "class of another list": r"classes: expected shape \(1, 2\), got \(2, 2\)",
    "type of classes": "classes: expected uint8, got int32",
    "window": r"window: expected an integer in 0\.\.16777216, got -1",
    "heads": r"table: expected shape \(2, \*\), got \(1, 40\)",
    "channels": r"keys: expected contiguous channels \(last stride 1\), got last stride 2",
    "type": "keys: expected float32, float16 or bfloat16, got float64",
    "read-only table": "table: expected a writable tensor, got a read-only one",
    "overlap": "pool_tail: expected memory of its own, got an overlap with pool_packed",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    cache = filled(94)
    arguments = change(cache, what)
    before = cache.state()
    with pytest.raises((ValueError, TypeError), match=rf"^append: {REFUSED[what]}$"):
        _C.append(*arguments)
    assert cache.state() == before


WALK = ("table", "lists", "pool_tail", "pool_packed", "left", "valid", "classes", "window", "q")
WALK_REFUSED = {  # argument, what is put in its place, sentence
    "tail tokens": ("lists", [[3, 1, 2**31 - 1, 94]], STATE.format(3, 1, 2147483647)),
    "left": ("left", [[0, 0]], "left: expected 2 tail and 0 packed pages for list 0, got 0 and 0"),
    "too many left": ("left", [[161, 0]], r"left: expected 0\.\.160 pages in pool_tail, got 161 in list 0"),
    "bits": ("classes", [[4, 5]], "classes: expected bits of 2, 3, 4, 8 or 16, got K 4, V 5 in list 0"),
    "valid": ("valid", [31], r"valid: expected 0\.\.30, got 31"),
    "no sequences": ("valid", [], "valid: expected a divisor of the 1 lists, got 0 sequences"),
    "sequences": ("valid", [1, 1], "valid: expected a divisor of the 1 lists, got 2 sequences"),
    "window": ("window", 1 << 25, r"window: expected an integer in 0\.\.16777216, got 33554432"),
    "q": ("q", -1, r"q: expected an integer in 0\.\.16777216, got -1"),
}


@pytest.mark.parametrize("what", WALK_REFUSED)
def test_walk_refused(what: str) -> None:
    name, bad, sentence = WALK_REFUSED[what]
    mirror = Mirror(filled(94))
    arguments = [*mirror.arrays, np.array([30], np.int32), mirror.classes, 0, 30]
    at = WALK.index(name)
    arguments[at] = bad if isinstance(bad, int) else np.array(bad, arguments[at].dtype)
    before = [np.asarray(x).tobytes() for x in arguments]
    with pytest.raises(ValueError, match=rf"^append_walk: {sentence}$"):
        _C.append_walk(*arguments)
    assert [np.asarray(x).tobytes() for x in arguments] == before


def test_nothing_to_walk() -> None:
    for lists, valid in ((0, None), (0, np.zeros(0, np.int32)), (3, np.zeros(3, np.int32))):
        arrays = [np.zeros((lists, 4), kind) for kind in (np.uint64, np.int32, np.uint32, np.uint32)]
        before = [array.copy() for array in arrays]
        _C.append_walk(*arrays, np.zeros((lists, 2), np.int32), valid, np.full((lists, 2), 4, np.uint8), 5, 7)
        assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


@pytest.mark.parametrize("staggered", [False, True])
def test_what_the_benchmark_compares(staggered: bool) -> None:
    """Its lists, on the CPU: row by row they become what the check makes of all rows at once."""
    pytest.importorskip("torch", reason="torch is not installed")
    from kvcomp.bench import append_cuda

    caches = append_cuda.Caches(2, 4, 3, staggered=staggered, device="cpu", seed=0)
    for _ in range(100):
        for layer in range(2):
            caches.append(layer)
    assert caches.wrong_bytes(100) == 0
    assert caches.wrong_bytes(99) > 0
    caches.arena[int(caches.units[5]) * UNIT] ^= 1
    assert caches.wrong_bytes(100) == 1
