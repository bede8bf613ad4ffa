"""Arena on a CUDA device: mapped by granules, addresses that stay, copies in all directions (arena.h, backend.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kvcomp import _C

torch = pytest.importorskip("torch", reason="needs torch for CUDA tensors")
pytestmark = pytest.mark.gpu

GRANULE, IDLE = 2 << 20, 64 << 20
LAYOUT = (64, 64, 1, 1, 0)
SIZE = _C.page_bytes(LAYOUT, 16, 16)
TOKENS = 16


def random_bytes(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8)


def filled(arena: _C.Arena, size: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """New pages of random bytes: units and contents."""
    pages, data = arena.alloc(size, count), random_bytes(count, size, seed)
    arena.write(size, pages, data)
    return pages, data


def content(arena: _C.Arena, size: int, pages: np.ndarray) -> np.ndarray:
    data = np.zeros((len(pages), size), np.uint8)
    arena.read(size, pages, data)
    return data


class Rows:
    """One page of 16-bit rows at every unit, packed from `keys` and `values`, on one device."""

    def __init__(self, units: np.ndarray, device: str = "cuda") -> None:
        n = len(units)
        entries = units.astype(np.uint64) | np.uint64(16 << 32 | 16 << 40 | TOKENS << 48)
        self.pages = torch.from_numpy(entries).to(device)
        self.lists = torch.arange(n, dtype=torch.int32, device=device)
        self.start = torch.zeros(n, dtype=torch.int32, device=device)
        self.tokens = torch.arange(TOKENS, dtype=torch.int32, device=device)
        self.keys = torch.zeros(n, 1, TOKENS, 64, dtype=torch.float16, device=device)
        self.values = torch.zeros_like(self.keys)

    def pack(self, arena: _C.Arena) -> None:
        index = self.pages, self.lists, self.start, self.tokens
        _C.pack(arena, self.keys, self.values, *index, LAYOUT, 0, 0, 0, 0, 0)

    def unpack(self, arena: _C.Arena) -> tuple[Any, Any]:
        keys, values = torch.empty_like(self.keys), torch.empty_like(self.values)
        _C.unpack(keys, values, arena, self.pages, self.lists, self.start, self.tokens, LAYOUT, 0)
        return keys, values


def test_what_is_counted_is_what_is_mapped() -> None:
    arena = _C.Arena(device=0)
    assert arena.device == 0 and arena.nbytes == arena.used == 0
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info(0)[0]
    small = arena.alloc(128, 3)
    assert (arena.nbytes, arena.used) == (GRANULE, 384)
    arena.alloc(4096, 5)
    assert arena.nbytes == GRANULE, "slabs share a granule"
    large = arena.alloc(1 << 20, 512)
    assert (arena.nbytes, arena.used) == ((512 << 20) + GRANULE, 384 + 5 * 4096 + (512 << 20))
    assert abs(free - torch.cuda.mem_get_info(0)[0] - arena.nbytes) <= 16 << 20
    arena.free(1 << 20, large)
    assert arena.nbytes <= IDLE + GRANULE and arena.used == 384 + 5 * 4096
    assert free - torch.cuda.mem_get_info(0)[0] <= IDLE + (16 << 20)
    arena.free(128, small)
    del arena
    assert abs(free - torch.cuda.mem_get_info(0)[0]) <= 16 << 20


def test_growth_keeps_addresses() -> None:
    arena = _C.Arena(device=0)
    parts = [filled(arena, 1152, 100 + 1000 * i, i) for i in range(8)]
    for pages, data in parts:
        assert (content(arena, 1152, pages) == data).all()
    for pages, _ in parts[::2]:
        arena.free(1152, pages)
    for pages, data in parts[1::2]:
        assert (content(arena, 1152, pages) == data).all()


def test_out_of_memory_changes_nothing() -> None:
    arena = _C.Arena(device=0)
    pages, data = filled(arena, 1152, 100)
    free, total = torch.cuda.mem_get_info(0)
    state = arena.nbytes, arena.used
    with pytest.raises(MemoryError, match=rf"^arena: expected \d+ bytes of free memory on cuda:0, got \d+ of {total}$"):
        arena.alloc(1 << 30, (free >> 30) + 1)
    sentence = rf"^arena: expected room for {4 * total >> 30} pages of {1 << 30} bytes, got \d+ bytes reserved and "
    with pytest.raises(MemoryError, match=sentence):
        arena.alloc(1 << 30, 4 * total >> 30)
    assert (arena.nbytes, arena.used) == state
    assert (content(arena, 1152, pages) == data).all()
    with pytest.raises(MemoryError, match=r"^arena: expected room for 2 pages of 2097152 bytes, got 2097152 bytes res"):
        _C.Arena(1 << 20, 0).alloc(1 << 21, 2)


def test_more_than_the_device_holds_in_small_steps() -> None:
    """The driver's own refusal, after the free memory has been looked up."""
    taken = torch.empty(max(torch.cuda.mem_get_info(0)[0] - (1 << 30), 0), dtype=torch.uint8, device="cuda")
    arena, steps = _C.Arena(device=0), 0
    with pytest.raises(MemoryError, match=r"^arena: expected 33554432 bytes of free memory on cuda:0, got \d+ of \d+$"):
        for _ in range(64):
            arena.alloc(1 << 20, 32)
            steps += 1
    assert arena.nbytes == arena.used == steps * 32 << 20
    del taken, arena
    torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [128, 1152, 9984, 1 << 20])
def test_read_write_and_copy(size: int) -> None:
    arena, count = _C.Arena(device=0), 40
    pages, data = filled(arena, size, count)
    shuffled = np.random.default_rng(1).permutation(pages)
    order = np.searchsorted(pages, shuffled)
    assert (content(arena, size, shuffled) == data[order]).all()
    out = torch.zeros(count, size, dtype=torch.uint8, device="cuda")
    arena.read(size, shuffled, out)
    assert (out.cpu().numpy() == data[order]).all()
    arena.write(size, pages, out)
    assert (content(arena, size, pages) == data[order]).all()
    arena.copy(size, pages[:-1].copy(), pages[1:].copy())  # one after the other
    assert (content(arena, size, pages) == data[order][0]).all()


def test_tensors_of_the_device_are_in_the_order_of_their_stream() -> None:
    arena, stream = _C.Arena(device=0), torch.cuda.Stream()
    pages = arena.alloc(1 << 20, 8)
    with torch.cuda.stream(stream):
        for i in range(20):
            torch.cuda._sleep(2_000_000)
            rows = torch.full((8, 1 << 20), i, dtype=torch.uint8, device="cuda")
            arena.write(1 << 20, pages, rows)
            rows.fill_(77)
            out = torch.empty_like(rows)
            arena.read(1 << 20, pages, out)
            assert (out == i).all()
        torch.cuda._sleep(20_000_000)
        arena.write(1 << 20, pages, torch.full_like(rows, 5))
    assert (content(arena, 1 << 20, pages) == 5).all(), "host memory waits for every stream"


def test_the_same_places_as_on_the_cpu() -> None:
    """Random use on both: units, counts and contents agree; compact moves alike."""
    random = np.random.default_rng(0)
    arenas = _C.Arena(1 << 28), _C.Arena(1 << 28, 0)
    sizes = [128, 1152, 4096, 9984, 100096, 3 << 20]
    live = {size: np.zeros(0, np.uint32) for size in sizes}
    for step in range(150):
        size, action = sizes[random.integers(len(sizes))], random.integers(4)
        pages = live[size]
        if action < 2:
            count = int(random.integers(60 if size < 1 << 20 else 5))
            found = [filled(arena, size, count, step)[0] for arena in arenas]
            assert (found[0] == found[1]).all()
            live[size] = np.concatenate([pages, found[0]])
        elif action == 2:
            gone = random.random(len(pages)) < random.random()
            for arena in arenas:
                arena.free(size, pages[gone])
            live[size] = pages[~gone]
        else:
            places = [pages.copy(), pages.copy()]
            for arena, place in zip(arenas, places, strict=True):
                arena.compact(size, place)
            assert (places[0] == places[1]).all()
            live[size] = places[0]
        assert arenas[0].used == arenas[1].used
        assert arenas[1].nbytes % GRANULE == 0
    for size, pages in live.items():
        assert (content(arenas[0], size, pages) == content(arenas[1], size, pages)).all()


def test_compact_gives_memory_back() -> None:
    arena = _C.Arena(device=0)
    pages, data = filled(arena, SIZE, (512 << 20) // SIZE)
    full = arena.nbytes
    arena.free(SIZE, pages[np.arange(len(pages)) % 4 > 0])
    kept, data = pages[::4].copy(), data[::4]
    assert arena.nbytes == full
    arena.compact(SIZE, kept)
    assert (content(arena, SIZE, kept) == data).all()
    assert arena.nbytes <= full // 4 + IDLE + GRANULE


def test_addresses_beyond_32_bits() -> None:
    arena = _C.Arena(device=0)
    gap = arena.alloc(1 << 30, 5)
    units = arena.alloc(SIZE, 4)
    assert int(units.min()) * 128 >= 5 << 30
    rows = Rows(units)
    rows.keys.normal_()
    rows.values.normal_()
    rows.pack(arena)
    assert all(torch.equal(*pair) for pair in zip(rows.unpack(arena), (rows.keys, rows.values), strict=True))
    data = random_bytes(4, SIZE)
    arena.write(SIZE, units, data)
    assert (content(arena, SIZE, units) == data).all()
    arena.free(1 << 30, gap)


def captured(rows: Rows, arena: _C.Arena) -> Any:
    graph = torch.cuda.CUDAGraph()
    rows.pack(arena)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        rows.pack(arena)
    return graph


def test_a_graph_stays_right_when_the_arena_grows() -> None:
    arena = _C.Arena(device=0)
    rows = Rows(arena.alloc(SIZE, 32))
    graph = captured(rows, arena)
    for i in range(4):
        arena.alloc(1 << 20, 100 << i)
        rows.keys.normal_()
        rows.values.normal_()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(rows.unpack(arena), (rows.keys, rows.values), strict=True))


def test_memory_is_mapped_while_a_stream_captures() -> None:
    arena = _C.Arena(device=0)
    rows = Rows(arena.alloc(SIZE, 4))
    rows.pack(arena)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        far = arena.alloc(1 << 20, 200)
        rows.pack(arena)
    rows.keys.normal_()
    graph.replay()
    assert torch.equal(rows.unpack(arena)[0], rows.keys)
    data = random_bytes(200, 1 << 20)
    arena.write(1 << 20, far, data)
    assert (content(arena, 1 << 20, far) == data).all()


def test_memory_that_kernels_use_is_not_taken_from_them() -> None:
    """Freed, or dropped with the arena, right behind a launch: the launch ends well first."""
    for dropped in (False, True):
        arena = _C.Arena(device=0)
        units = arena.alloc(SIZE, (256 << 20) // SIZE)
        rows = Rows(units)
        torch.cuda._sleep(50_000_000)
        for _ in range(4):
            rows.pack(arena)
        if dropped:
            del arena
        else:
            arena.free(SIZE, units)
            assert arena.nbytes <= IDLE
        torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_one_device_for_all() -> None:
    arena, host = _C.Arena(device=0), _C.Arena(1 << 20)
    rows = Rows(arena.alloc(SIZE, 2))
    with pytest.raises(ValueError, match=r"^pack: keys: expected the device of arena \(cpu:0\), got cuda:0$"):
        rows.pack(host)
    rows.lists = rows.lists.cpu()
    with pytest.raises(ValueError, match=r"^pack: lists: expected the device of arena \(cuda:0\), got cpu:0$"):
        rows.pack(arena)
    units = host.alloc(128, 1)
    with pytest.raises(ValueError, match=r"^arena: bytes: expected a CPU tensor, got cuda:0$"):
        host.read(128, units, torch.zeros(1, 128, dtype=torch.uint8, device="cuda"))
    with pytest.raises(ValueError, match=r"^arena: units: expected a CPU tensor, got one on cuda:0$"):
        arena.free(SIZE, torch.zeros(1, dtype=torch.uint32, device="cuda"))


def test_a_device_that_is_not_the_current_one() -> None:
    """Memory, launches and the current stream of the tensors' device, whatever device is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arena = _C.Arena(device=1)
    rows = Rows(arena.alloc(SIZE, 8), "cuda:1")
    stream = torch.cuda.Stream(1)
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    for i in range(10):
        with torch.cuda.stream(stream), torch.cuda.device(1):
            torch.cuda._sleep(5_000_000)
            rows.keys.fill_(i)
        before = torch.cuda.current_stream(1)
        torch.cuda.set_stream(stream)  # of device 1, and makes device 1 current
        torch.cuda.set_device(0)
        rows.pack(arena)
        keys, _ = rows.unpack(arena)
        assert (keys == i).all()
        torch.cuda.set_stream(before)
        torch.cuda.set_device(0)
    other = torch.zeros(8, SIZE, dtype=torch.uint8, device="cuda:0")
    with pytest.raises(ValueError, match=r"^arena: bytes: expected a tensor on the CPU or cuda:1, got cuda:0$"):
        arena.read(SIZE, np.zeros(8, np.uint32), other)
