"""divide: attend's work by blocks, each page exactly once, evenly by bytes (csrc/kvcomp/divide.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from kvcomp import _C

torch = pytest.importorskip("torch", reason="needs torch for CUDA tensors")
from reference_torch import PAGES, TAIL_PAGE, Cache, Page, mixed, uniform  # noqa: E402

CUDA = _C.cuda_info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA["available"], reason=CUDA["why"] or ""),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LAYOUT = (128, 128, 1, 1, 0)
# Bytes that a page (one of 16 bits: a quarter), and a list that a block begins, are charged beyond what is read.
PAGE_CHARGE, LIST_CHARGE = 60 << 6, 300 << 10
MIXED_PAGES, MOST_LISTS = 128, 49152  # divide.cu


class Division(NamedTuple):
    runs: np.ndarray[Any, Any]  # (blocks, 4): first list, first page, end list, end page
    shares: np.ndarray[Any, Any]  # (lists, 4): first block, blocks, fixed pages, mixed
    first: np.ndarray[Any, Any]  # (blocks, 12): entries of the runs' first pages


def state_of(lists: list[list[Page]], capacity: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Table and lists; units only name the entries."""
    table, state = np.full((len(lists), capacity), -1, np.int64), np.zeros((len(lists), 4), np.int32)
    for i, pages in enumerate(lists):
        tail = Cache.tail_of(pages)
        for j, (k_bits, v_bits, tokens) in enumerate(pages):
            table[i, j] = i << 16 | j | k_bits << 32 | v_bits << 40 | tokens << 48
        state[i] = len(pages), tail, sum(page[2] for page in pages[tail:]), sum(page[2] for page in pages)
    return table, state


def divide(layers: list[list[list[Page]]]) -> tuple[list[Division], np.ndarray[Any, Any]]:
    """The layers' divisions, in one launch, and their lists."""
    capacity = 3 + max(len(pages) for lists in layers for pages in lists)
    tables, states = map(np.stack, zip(*(state_of(lists, capacity) for lists in layers), strict=True))
    words = _C.divide_words(states.shape[1], torch.cuda.current_device())
    assert words % 4 == 0
    # A row more than asked for, and its end, stay as they are.
    divisions = torch.full((len(layers) + 1, words), -7, dtype=torch.int32, device="cuda")
    arguments = torch.from_numpy(tables).cuda().view(torch.uint64), torch.from_numpy(states).cuda(), LAYOUT
    _C.divide(divisions[:-1], *arguments)
    assert bool((divisions[-1] == -7).all())
    again = torch.full_like(divisions[:-1], 5)
    _C.divide(again, *arguments)
    found = [read(row) for row in divisions[:-1].cpu().numpy()]
    for first, second in zip(found, map(read, again.cpu().numpy()), strict=True):
        assert all(map(np.array_equal, first, second)), "the same again"
    for division, table, state in zip(found, tables, states, strict=True):
        assert_first(division, table, state)
        assert_mixed(division, table, state)
    return found, states


def read(row: np.ndarray[Any, Any]) -> Division:
    blocks, lists = row[:2]
    assert not row[2:4].any() and blocks >= 1
    shares, runs = row[4 : 4 + 4 * lists], row[4 + 4 * lists : 4 + 4 * (lists + blocks)]
    most = (len(row) - 4 - 4 * lists) // 28  # blocks that there may be
    first = row[4 + 4 * (lists + most) :].view(np.int64).reshape(most, 12)[:blocks]
    return Division(runs.reshape(-1, 4), shares.reshape(-1, 4), first)


def assert_first(division: Division, table: np.ndarray[Any, Any], state: np.ndarray[Any, Any]) -> None:
    """Entries of the pages that blocks begin with: those of one list that appends leave as they are."""
    for run, entries in zip(division.runs.tolist(), division.first, strict=True):
        first_list, first_page, end_list, end_page = run
        end = min(int(state[first_list, TAIL_PAGE]), end_page if end_list == first_list else 1 << 30)
        expected = np.zeros(12, np.int64)
        pages = table[first_list, first_page : max(first_page, min(end, first_page + 12))]
        expected[: len(pages)] = pages
        assert np.array_equal(entries, expected)


def assert_mixed(division: Division, table: np.ndarray[Any, Any], state: np.ndarray[Any, Any]) -> None:
    """Marked: lists of more classes, but 16 bits, than blocks, whose blocks have few pages."""
    for share, entries, (pages, tail, *_) in zip(division.shares.tolist(), table, state.tolist(), strict=True):
        classes = {int(entry) >> 32 & 0xFFFF for entry in entries[:pages]} - {16 << 8 | 16}
        assert share[3] == (len(classes) > share[1] and tail < MIXED_PAGES * share[1])


def pieces(division: Division, pages: np.ndarray[Any, Any]) -> list[list[tuple[int, int, int]]]:
    """(list, first page, end page) of each block, where lists have so many pages now."""
    found = []
    for first_list, first_page, end_list, end_page in division.runs.tolist():
        mine = []
        for i in range(first_list, min(end_list + 1, len(pages))):
            begin = first_page if i == first_list else 0
            end = min(end_page, int(pages[i])) if i == end_list else int(pages[i])
            if begin < end:
                mine.append((i, begin, end))
        found.append(mine)
    return found


def assert_whole(division: Division, state: np.ndarray[Any, Any], pages: np.ndarray[Any, Any]) -> None:
    """Runs follow each other from the first list to the last; every page is in one block; shares name the blocks."""
    n = len(state)
    assert len(division.shares) == n
    assert division.runs[0, :2].tolist() == [0, 0] and division.runs[-1, 2:].tolist() == [n, 0]
    assert np.array_equal(division.runs[1:, :2], division.runs[:-1, 2:])
    covered = [np.zeros(count, np.int64) for count in pages]
    for block, mine in enumerate(pieces(division, pages)):
        for i, begin, end in mine:
            covered[i][begin:end] += 1
            first, blocks = division.shares[i, :2]
            assert first <= block < first + blocks
    assert all((count == 1).all() for count in covered)
    assert np.array_equal(division.shares[:, 2], state[:, TAIL_PAGE]), "pages that appends leave as they are"
    first_list, end_list, end_page = division.runs[:, 0], division.runs[:, 2], division.runs[:, 3]
    for i in range(n):
        touching = np.flatnonzero((first_list <= i) & ((end_list > i) | ((end_list == i) & (end_page > 0))))
        first, blocks = division.shares[i, :2]
        assert blocks >= 1 and touching.tolist() == list(range(first, first + blocks))


def assert_even(division: Division, lists: list[list[Page]]) -> None:
    """No block has more than its equal share and the charge of a list, to within two pages."""
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    assert len(division.runs) <= blocks
    sizes = {
        bits: _C.page_bytes(LAYOUT, *bits) + PAGE_CHARGE // (4 if bits == (16, 16) else 1)
        for bits in {page[:2] for pages in lists for page in pages}
    }
    before = [np.concatenate([[0], np.cumsum([sizes[page[:2]] for page in pages])]) for pages in lists]
    costs = [
        sum(int(before[i][end] - before[i][begin]) for i, begin, end in mine)
        for mine in pieces(division, np.array([len(pages) for pages in lists]))
    ]
    share = (sum(costs) + LIST_CHARGE * len(lists)) / blocks
    assert max(costs) <= share + LIST_CHARGE + 2 * max(sizes.values(), default=0)


def ragged(seed: int, n: int, most: int) -> list[list[Page]]:
    random = np.random.default_rng(seed)
    return [mixed(int(random.integers(0, most + 1)), seed + i) for i in range(n)]


CASES: dict[str, list[list[Page]]] = {
    "one list": [uniform(4, 4, 4096)],
    "one page": [uniform(4, 4, 64)],
    "one tail page": [uniform(16, 16, 3)],
    "one empty list": [[]],
    "8 lists of 4k": [uniform(2, 2, 4096)] * 8,
    "8 lists of 128k": [uniform(4, 4, 1 << 17)] * 8,
    "64 lists of 32k": [uniform(4, 4, 1 << 15)] * 64,
    "512 lists of 8k": [uniform(8, 8, 1 << 13)] * 512,
    "131 lists": [uniform(4, 4, 2048)] * 131,
    "132 lists": [uniform(4, 4, 2048)] * 132,
    "133 lists": [uniform(4, 4, 2048)] * 133,
    "ragged": ragged(1, 64, 20_000),
    "mixed ones of 32k": [mixed(32_000, i) for i in range(64)],
    "thousands": ragged(2, 4096, 500),
    "empty ones": [[], *ragged(3, 30, 900), [], [], *ragged(4, 30, 900), []],
    "nothing but empty ones": [[]] * 300,
    "a long one among short ones": [*ragged(5, 20, 60), mixed(100_000, 1), *ragged(6, 20, 60)],
    "long ones at the ends": [mixed(30_000, 1), *ragged(7, 200, 60), mixed(30_000, 2)],
    "16 bits and 2 bits": [uniform(16, 16, 8000), uniform(2, 2, 8000)] * 8,
    # Shared memory has no room for the costs of such lists' segments: pages are counted from the first.
    "a long one among thousands": [*ragged(10, 2000, 60), mixed(100_000, 3), *ragged(11, 2095, 60)],
    "a very long one": [uniform(2, 2, 2048), uniform(4, 4, 64 * 41_000), *[uniform(2, 2, 2048)] * 129],
    "as many as there may be": [uniform(4, 4, 100)] * MOST_LISTS,
}


def test_cases_without_room_for_segments() -> None:
    """Those that are to be: divide.cu's SEGMENT pages a segment, MOST_SHARED bytes."""
    without = []
    for name, lists in CASES.items():
        segments = -(-(3 + max(map(len, lists))) // 128)
        if segments > (160 << 10) // 4 // len(lists) - 1:
            without.append(name)
    assert without == ["a long one among thousands", "a very long one", "as many as there may be"]


def test_small() -> None:
    """For the sanitizers: both ways to divide, several layers."""
    for n in (5, 200):
        lists = ragged(n, n, 700)
        for division, state in zip(*divide([lists, lists[::-1]]), strict=True):
            assert_whole(division, state, state[:, PAGES])


@pytest.mark.parametrize("name", CASES)
def test_every_page_once_and_evenly(name: str) -> None:
    lists = CASES[name]
    (division,), (state,) = divide([lists])
    assert_whole(division, state, state[:, PAGES])
    assert_even(division, lists)


@pytest.mark.parametrize("name", CASES)
def test_appends_leave_no_page_out(name: str) -> None:
    """Lists grow, and tails shrink where pages age; what was before the tail stays."""
    (division,), (state,) = divide([CASES[name]])
    random = np.random.default_rng(8)
    for _ in range(4):
        fewest = state[:, TAIL_PAGE]
        assert_whole(division, state, fewest + random.integers(0, 12, len(state)))
        assert_whole(division, state, np.maximum(state[:, PAGES], fewest) + random.integers(0, 300, len(state)))
    assert_whole(division, state, state[:, TAIL_PAGE])


def test_short_lists_leave_multiprocessors_free() -> None:
    """Where every list has blocks of its own, a block has eight pages, one for each of its warps, rather than fewer."""
    (division,), _ = divide([[uniform(2, 2, 64 * pages) for pages in (64, 60, 8, 7, 1)]])
    assert division.shares[:, 1].tolist() == [8, 8, 1, 1, 1]


def test_layers_do_not_touch_each_other() -> None:
    layers = [ragged(seed, 96, 1000 * seed) for seed in range(5)] + [[[]] * 96, [uniform(2, 2, 4096)] * 96]
    divisions, states = divide(layers)
    for lists, division, state in zip(layers, divisions, states, strict=True):
        assert_whole(division, state, state[:, PAGES])
        assert_even(division, lists)
        alone = divide([lists])[0][0]
        assert all(map(np.array_equal, alone, division))


def test_no_layers_and_no_lists() -> None:
    words = _C.divide_words(0, 0)
    for layers, n in ((0, 3), (2, 0)):
        tables = torch.zeros(layers, n, 4, dtype=torch.int64, device="cuda").view(torch.uint64)
        divisions = torch.full((layers, _C.divide_words(n, 0)), -7, dtype=torch.int32, device="cuda")
        _C.divide(divisions, tables, torch.zeros(layers, n, 4, dtype=torch.int32, device="cuda"), LAYOUT)
    assert words % 4 == 0


def test_graph() -> None:
    """A captured launch divides the lists as they are when it is replayed."""
    lists = ragged(9, 64, 3000)
    table, state = state_of(lists, 3 + max(map(len, lists)))
    tables, states = torch.from_numpy(table)[None].cuda().view(torch.uint64), torch.from_numpy(state)[None].cuda()
    divisions = torch.zeros(1, _C.divide_words(64, 0), dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _C.divide(divisions, tables, states, LAYOUT)
    for seed in range(3):
        shorter = [pages[: len(pages) // (seed + 1)] for pages in lists]
        table, state = state_of(shorter, table.shape[1])
        tables.view(torch.int64).copy_(torch.from_numpy(table)[None])
        states.copy_(torch.from_numpy(state)[None])
        graph.replay()
        division = read(divisions[0].cpu().numpy())
        assert_whole(division, state, state[:, PAGES])
        assert_even(division, shorter)


def test_refusals() -> None:
    tables = torch.zeros(2, 3, 4, dtype=torch.int64, device="cuda").view(torch.uint64)
    lists = torch.zeros(2, 3, 4, dtype=torch.int32, device="cuda")
    divisions = torch.full((2, _C.divide_words(3, 0)), -7, dtype=torch.int32, device="cuda")
    for message, arguments in (
        ("divisions: expected shape ", (divisions[:, :-4].contiguous(), tables, lists, LAYOUT)),
        ("divisions: expected shape ", (divisions[:1], tables, lists, LAYOUT)),
        ("lists: expected shape ", (divisions, tables, lists[:, :2].contiguous(), LAYOUT)),
        ("tables: expected shape ", (divisions, tables[0], lists, LAYOUT)),
        ("tables: expected the device of divisions .cuda:0., got cpu:0", (divisions, tables.cpu(), lists, LAYOUT)),
        ("group: ", (divisions, tables, lists, (128, 48, 1, 1, 0))),
    ):
        with pytest.raises(ValueError, match=rf"^divide: {message}"):
            _C.divide(*arguments)
    with pytest.raises(TypeError, match=r"^divide: tables: expected uint64, got "):
        _C.divide(divisions, lists.long(), lists, LAYOUT)
    with pytest.raises(ValueError, match=r"^divide: divisions: expected a CUDA tensor"):
        _C.divide(divisions.cpu(), tables.cpu(), lists.cpu(), LAYOUT)
    assert bool((divisions == -7).all())
    n = MOST_LISTS + 1
    tables = torch.zeros(1, n, 1, dtype=torch.int64, device="cuda").view(torch.uint64)
    divisions = torch.zeros(1, _C.divide_words(n, 0), dtype=torch.int32, device="cuda")
    with pytest.raises(
        NotImplementedError, match=rf"^divide: lists: expected at most {MOST_LISTS} lists a layer, got {n}$"
    ):
        _C.divide(divisions, tables, torch.zeros(1, n, 4, dtype=torch.int32, device="cuda"), LAYOUT)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"^divide_words: device: expected "):
        _C.divide_words(3, 63)
