"""Arena: pages are taken and given back, memory returns to the system, and a wrong unit changes nothing (arena.h)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kvcomp import _C

UNIT, MEMORY_PAGE = 128, 4096
SIZES = [128, 256, 1152, 4096, 9984]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * MEMORY_PAGE


def units(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)


def rounded(nbytes: int) -> int:
    return -(-nbytes // MEMORY_PAGE) * MEMORY_PAGE


def write(arena: _C.Arena, page_units: np.ndarray, value: float) -> None:
    """Fills pages of class (16, 16), 64 channels, with one value."""
    n = len(page_units)
    pages = np.zeros(n, np.dtype([("unit", "<u4"), ("k", "u1"), ("v", "u1"), ("tokens", "u1"), ("flags", "u1")]))
    pages["unit"], pages["k"], pages["v"], pages["tokens"] = page_units, 16, 16, 16
    rows, zeros = np.full((1, 1, 16, 64), value, np.float32), np.zeros(n, np.int32)
    _C.pack(
        arena,
        rows,
        rows,
        pages.view(np.uint64),
        zeros,
        zeros,
        np.arange(16, dtype=np.int32),
        (64, 64, 1, 1, 0),
        0,
        0,
        0,
        0,
        0,
    )


def read(arena: _C.Arena, unit: int) -> set[float]:
    """The values in one such page."""
    page, zeros = np.array([unit | 16 << 32 | 16 << 40 | 16 << 48], np.uint64), np.zeros(1, np.int32)
    keys, values = np.zeros((1, 1, 16, 64), np.float32), np.zeros((1, 1, 16, 64), np.float32)
    _C.unpack(keys, values, arena, page, zeros, zeros, np.arange(16, dtype=np.int32), (64, 64, 1, 1, 0), 0)
    return set(np.concatenate([keys, values]).ravel().tolist())


SIZE = _C.page_bytes((64, 64, 1, 1, 0), 16, 16)


def test_pages_do_not_overlap_and_slabs_are_whole_memory_pages() -> None:
    arena = _C.Arena(1 << 30)
    assert arena.nbytes == arena.used == 0
    spans = []
    nbytes = used = 0
    for page_bytes, count in ((128, 3), (4096, 2), (1152, 100), (5376, 7), (1 << 20, 1)):
        for unit in arena.alloc(page_bytes, count):
            spans.append((int(unit) * UNIT, int(unit) * UNIT + page_bytes))
        nbytes, used = nbytes + rounded(page_bytes * count), used + page_bytes * count
        assert (arena.nbytes, arena.used) == (nbytes, used)
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_free_space_of_slabs_is_used_first() -> None:
    arena = _C.Arena(1 << 30)
    first = arena.alloc(1152, 10)
    arena.free(1152, first[2:7].copy())
    nbytes = arena.nbytes
    again = arena.alloc(1152, 5)
    assert arena.nbytes == nbytes and set(again.tolist()) == set(first[2:7].tolist())
    more = arena.alloc(1152, 1)
    assert arena.nbytes == nbytes + rounded(1152) and int(more[0]) not in first


def test_memory_is_given_back() -> None:
    """64 MiB written and freed: the process shrinks by it, and the address space is there again."""
    arena = _C.Arena(1 << 30)
    pages = arena.alloc(SIZE, (64 << 20) // SIZE)
    before = resident()
    write(arena, pages, 1.5)
    full = resident()
    assert full - before > 60 << 20
    arena.free(SIZE, pages)
    assert arena.nbytes == arena.used == 0
    assert full - resident() > 60 << 20
    again = arena.alloc(SIZE, len(pages))
    assert sorted(again.tolist()) == sorted(pages.tolist())
    assert read(arena, int(again[5])) == {0.0}, "what was freed is still there"


def test_reserving_takes_no_memory_and_dropping_gives_all_back() -> None:
    before = resident()
    arenas = [_C.Arena() for _ in range(20)]
    assert resident() - before < 4 << 20
    for arena in arenas:
        write(arena, arena.alloc(SIZE, 1000), 1.0)
    assert resident() - before > 20 * 1000 * SIZE * 0.9
    del arenas, arena
    assert resident() - before < 8 << 20


def test_live_pages_stay_where_they_are() -> None:
    arena = _C.Arena(1 << 30)
    kept = arena.alloc(SIZE, 50)
    for i, unit in enumerate(kept):
        write(arena, units(unit), i)
    for _ in range(10):
        other = arena.alloc(SIZE, 100)
        write(arena, other, -1.0)
        arena.free(SIZE, other)
    assert [read(arena, int(unit)) for unit in kept] == [{float(i)} for i in range(50)]


def test_copy() -> None:
    arena = _C.Arena(1 << 30)
    pages = arena.alloc(SIZE, 4)
    for i, unit in enumerate(pages):
        write(arena, units(unit), i)
    arena.copy(SIZE, pages[:2].copy(), pages[2:].copy())
    assert [read(arena, int(unit)) for unit in pages] == [{0.0}, {1.0}, {0.0}, {1.0}]
    arena.copy(SIZE, pages[:3].copy(), pages[1:].copy())  # one after the other
    assert [read(arena, int(unit)) for unit in pages] == [{0.0}] * 4
    for source, target, name in ((units(1 << 20), pages[:1], "source"), (pages[:1], units(pages[0] + 1), "target")):
        with pytest.raises(ValueError, match=rf"^arena: {name}: expected live pages of {SIZE} bytes, got unit \d+$"):
            arena.copy(SIZE, source, target.copy())
    with pytest.raises(ValueError, match=r"^arena: target: expected shape \(2,\), got \(1,\)$"):
        arena.copy(SIZE, pages[:2].copy(), pages[:1].copy())


def filled(arena: _C.Arena, size: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """New pages of random bytes: units and contents."""
    pages = arena.alloc(size, count)
    data = np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8)
    arena.write(size, pages, data)
    return pages, data


def content(arena: _C.Arena, size: int, pages: np.ndarray) -> np.ndarray:
    data = np.zeros((len(pages), size), np.uint8)
    arena.read(size, pages, data)
    return data


@pytest.mark.parametrize("size", [128, 1152, 2688, 4096, 5376, 1 << 20])
@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [40], [5, 30, 1, 1, 7], [30, 5]])
def test_compact_alone_takes_the_fewest_memory_pages(size: int, sizes: list[int]) -> None:
    """Several slabs, any share of their pages free: what is left is one piece, and behind it nothing."""
    for share in (0.0, 0.3, 0.9):
        random = np.random.default_rng(3)
        arena = _C.Arena(1 << 30)
        parts = [filled(arena, size, count, seed) for seed, count in enumerate(sizes)]
        pages, data = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        order = random.permutation(len(pages))
        gone = order[: int(share * len(pages))]
        kept = np.setdiff1d(order, gone, assume_unique=True)
        random.shuffle(kept)
        arena.free(size, pages[gone])
        places = pages[kept]
        arena.compact(size, places)
        assert arena.nbytes == rounded(len(kept) * size) and arena.used == len(kept) * size
        assert (content(arena, size, places) == data[kept]).all()
        assert (np.diff(np.sort(places)) == size // UNIT).all()
        again = places.copy()
        arena.compact(size, again)
        assert (again == places).all(), "nothing moves twice"
        arena.free(size, places)
        assert arena.nbytes == arena.used == 0


def test_compact_keeps_in_place_what_can_stay() -> None:
    """Only pages behind the last one of the compacted slab move, into the holes before it."""
    arena = _C.Arena(1 << 30)
    pages, _ = filled(arena, 1152, 100)
    arena.free(1152, pages[10:30].copy())
    live = np.delete(pages, np.arange(10, 30))
    places = live.copy()
    arena.compact(1152, places)
    assert (places[:60] == live[:60]).all() and set(places[60:].tolist()) == set(pages[10:30].tolist())
    assert len(places) == 80


def test_compact_leaves_other_sizes_alone() -> None:
    """Slabs between slabs of another size: one piece all the same, and pages of the other size stay."""
    arena = _C.Arena(1 << 30)
    mine, other = [], []
    for i in range(6):
        mine.append(filled(arena, 1152, 5 + i, i))
        other.append(filled(arena, 2688, 3, 10 + i))
    places, stay = np.concatenate([part[0] for part in mine]), np.concatenate([part[0] for part in other])
    nbytes, beside = arena.nbytes, sum(rounded(3 * 2688) for _ in range(6))
    arena.compact(1152, places)
    assert arena.nbytes == rounded(len(places) * 1152) + beside < nbytes
    assert (content(arena, 1152, places) == np.concatenate([part[1] for part in mine])).all()
    assert (content(arena, 2688, stay) == np.concatenate([part[1] for part in other])).all()
    arena.compact(2688, stay)
    assert arena.nbytes == rounded(len(places) * 1152) + rounded(len(stay) * 2688)
    assert (content(arena, 2688, stay) == np.concatenate([part[1] for part in other])).all()


def test_compact_without_room_in_one_piece() -> None:
    """Where other pages leave no stretch that is long enough, the slabs there are get filled from the front."""
    arena = _C.Arena(1 << 18)
    mine, other = [], []
    for i in range(4):
        mine.append(filled(arena, 4096, 12, i))
        other.append(filled(arena, 8192, 2, 10 + i))
    assert arena.nbytes == 1 << 18
    pages, data = np.concatenate([part[0] for part in mine]), np.concatenate([part[1] for part in mine])
    kept = np.flatnonzero(np.arange(48) % 3 > 0)
    arena.free(4096, pages[np.arange(48) % 3 == 0])
    places = pages[kept]
    arena.compact(4096, places)
    assert arena.nbytes == (32 + 16) * 4096
    assert (content(arena, 4096, places) == data[kept]).all()
    assert all((content(arena, 8192, part[0]) == part[1]).all() for part in other)
    arena.alloc(4096, 12)
    assert arena.nbytes == (32 + 16 + 12) * 4096


def test_compact_gives_memory_back_on_the_way() -> None:
    """64 MiB that has to move to somewhere else: no second copy of it is held, and holes go back to the system."""
    arena = _C.Arena(1 << 30)
    size = 5376
    pages = arena.alloc(size, (64 << 20) // size)
    arena.alloc(128, 1)
    pages = np.append(pages, arena.alloc(size, 20))
    for part in np.array_split(pages, 8):
        arena.write(size, part, np.ones((len(part), size), np.uint8))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    except OSError:
        pytest.skip("the system does not let a process measure its peak memory anew")
    full = resident()
    arena.compact(size, pages)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    assert peak - full < 24 << 20
    arena.free(size, pages[::2].copy())
    pages = pages[1::2].copy()
    arena.compact(size, pages)
    assert full - resident() > 28 << 20


@pytest.mark.parametrize(
    "wrong", ["one missing", "one too many", "one twice", "a free one", "another size", "far away"]
)
def test_compact_refuses(wrong: str) -> None:
    arena = _C.Arena(1 << 30)
    pages, data = filled(arena, 512, 20)
    arena.free(512, pages[:1].copy())
    other = arena.alloc(256, 19)
    live, size = pages[1:].copy(), 512
    given, got = live.copy(), f"live pages of 512 bytes, got unit {2**32 - 1}"
    if wrong == "one missing":
        given, got = given[1:].copy(), "all 19 live pages of 512 bytes, got 18 units"
    elif wrong == "one too many":
        given, got = np.append(given, pages[0]), "all 19 live pages of 512 bytes, got 20 units"
    elif wrong == "one twice":
        given[3] = given[5]
        got = f"every live page of 512 bytes once, got unit {given[5]} twice"
    elif wrong == "a free one":
        given[7] = pages[0]
        got = f"live pages of 512 bytes, got unit {pages[0]}"
    elif wrong == "another size":
        size, got = 256, f"live pages of 256 bytes, got unit {given[0]}"
    else:
        given[18] = 2**32 - 1
    before, nbytes = given.copy(), arena.nbytes
    with pytest.raises(ValueError, match=rf"^arena: units: expected {got}$"):
        arena.compact(size, given)
    assert (given == before).all() and arena.nbytes == nbytes
    assert (content(arena, 512, live) == data[1:]).all()
    arena.free(256, other)
    arena.compact(512, live)


def test_compact_of_nothing() -> None:
    arena = _C.Arena(1 << 20)
    arena.compact(128, units())
    assert arena.nbytes == 0
    arguments: list[tuple[type[Exception], str, object]] = [
        (TypeError, "units: expected uint32, got int32", np.zeros(1, np.int32)),
        (ValueError, r"units: expected shape \(\*,\), got \(1, 1\)", np.zeros((1, 1), np.uint32)),
        (ValueError, "page_bytes: expected a positive multiple of 128, got 100", units()),
    ]
    for error, sentence, given in arguments:
        with pytest.raises(error, match=rf"^arena: {sentence}$"):
            arena.compact(100 if "page_bytes" in sentence else 128, given)  # type: ignore[arg-type]
    read_only = arena.alloc(128, 1)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match=r"^arena: units: expected a writable tensor, got a read-only one$"):
        arena.compact(128, read_only)


@pytest.mark.parametrize("wrong", ["freed before", "twice at once", "another size", "inside a page", "far away"])
def test_a_wrong_unit_frees_nothing(wrong: str) -> None:
    arena = _C.Arena(1 << 30)
    arena.alloc(256, 3)
    pages = arena.alloc(512, 20)
    gone = arena.alloc(512, 20)
    arena.free(512, gone)
    size, bad = 512, int(gone[0])
    if wrong == "twice at once":
        bad = int(pages[3])
    elif wrong == "another size":
        size, bad = 256, int(pages[3])
    elif wrong == "inside a page":
        bad = int(pages[3]) + 1
    elif wrong == "far away":
        bad = 2**32 - 1
    good = pages[:10] if wrong != "another size" else units()
    state = arena.nbytes, arena.used
    with pytest.raises(ValueError, match=rf"^arena: units: expected live pages of {size} bytes, got unit {bad}$"):
        arena.free(size, np.append(good, units(bad)))
    assert (arena.nbytes, arena.used) == state
    arena.free(512, pages)
    assert arena.used == 3 * 256


def test_out_of_room_takes_nothing() -> None:
    arena = _C.Arena(1 << 20)
    arena.alloc(1 << 19, 1)
    state = arena.nbytes, arena.used
    sentence = "arena: expected room for 2 pages of 524288 bytes, got 1048576 bytes reserved and 524288 taken"
    with pytest.raises(MemoryError, match=rf"^{sentence}$"):
        arena.alloc(1 << 19, 2)
    assert (arena.nbytes, arena.used) == state
    arena.alloc(1 << 19, 1)
    with pytest.raises(MemoryError, match=r"^arena: expected room for 1 pages of 128 bytes, "):
        arena.alloc(128, 1)
    assert arena.alloc(128, 0).shape == (0,)


@pytest.mark.parametrize(
    "arguments, error, sentence",
    [
        ((100, 1), ValueError, "page_bytes: expected a positive multiple of 128, got 100"),
        ((0, 1), ValueError, r"page_bytes: expected an integer in 1\.\.2147483647, got 0"),
        ((128, -1), ValueError, r"count: expected an integer in 0\.\.2147483647, got -1"),
        ((128, 1.0), TypeError, "count: expected an integer, got float"),
        ((128,), TypeError, "expected 2 positional arguments, got 1"),
    ],
)
def test_alloc_refuses(arguments: tuple[object, ...], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=rf"^arena: {sentence}$"):
        _C.Arena(1 << 20).alloc(*arguments)  # type: ignore[arg-type]


def test_new_refuses() -> None:
    for arguments in ((1, -2), (1, 2**31), (1, "cuda"), (1, None), ("x",), (0,), (-5,), (1 << 20, -1, 0)):
        with pytest.raises((TypeError, ValueError), match=r"^arena: "):
            _C.Arena(*arguments)
    with pytest.raises(TypeError, match=r"^arena: expected reserve_bytes and device at most$"):
        _C.Arena(bytes=5)  # type: ignore[call-arg]
    assert _C.Arena(None).device == _C.Arena(reserve_bytes=1 << 20, device=-1).device == -1


def test_a_device_that_is_not_there() -> None:
    found = _C.cuda_info()
    wanted, error = (99, ValueError) if found["available"] else (0, _C.CudaError)
    sentence = "device: expected a CUDA device in 0" if found["available"] else "expected CUDA to be usable: cuda: "
    with pytest.raises(error, match=f"^arena: {sentence}"):
        _C.Arena(device=wanted)


def test_addresses_beyond_32_bits() -> None:
    """Pages behind 4 GiB of reserved, untouched pages."""
    arena = _C.Arena(1 << 36)
    for gap, value in ((1 << 31, 3.0), (1 << 32, 5.0), (1 << 34, 7.0)):
        arena.alloc(1 << 30, gap >> 30)
        far = arena.alloc(SIZE, 2)
        assert int(far[0]) * UNIT >= gap
        write(arena, far, value)
        assert read(arena, int(far[1])) == {value}
    assert arena.nbytes > 1 << 34


# ---- bookkeeping of a device's memory, without a device


EXTENSION = Path(_C.__file__)
FAKE = Path(__file__).with_name("fake_cuda.c")
GRANULE, MEMORY, IDLE = 64 << 10, 160 << 20, 64 << 20  # the first two are fake_cuda.c's

PRELUDE = f"""
import importlib.util, os
import numpy as np
spec = importlib.util.spec_from_file_location("kvcomp._C", os.path.abspath({EXTENSION.name!r}))
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
GRANULE, MEMORY, IDLE = {GRANULE}, {MEMORY}, {IDLE}
random = np.random.default_rng(1)

def filled(arena, size, count):
    pages, data = arena.alloc(size, count), random.integers(0, 256, (count, size), np.uint8)
    arena.write(size, pages, data)
    return pages, data

def content(arena, size, pages):
    data = np.zeros((len(pages), size), np.uint8)
    arena.read(size, pages, data)
    return data

def refused(error, sentence, function, *arguments):
    try:
        function(*arguments)
    except error as found:
        assert str(found).startswith(sentence), found
    else:
        raise AssertionError(sentence)
"""

RANDOM_USE = """
for seed in range(6):
    random = np.random.default_rng(seed)
    arena = _C.Arena([1 << 22, 1 << 24, None][seed % 3], 0)
    sizes = [128, 1152, 4096, 9984, 100096]
    live = {size: (np.zeros(0, np.uint32), np.zeros((0, size), np.uint8)) for size in sizes}
    for _ in range(120):
        size = sizes[random.integers(len(sizes))]
        pages, data = live[size]
        state, action = (arena.nbytes, arena.used), random.integers(4)
        if action < 2:
            try:
                more, bytes = filled(arena, size, int(random.integers(60)))
            except MemoryError:
                assert (arena.nbytes, arena.used) == state
                continue
            live[size] = np.concatenate([pages, more]), np.concatenate([data, bytes])
        elif action == 2:
            gone = random.random(len(pages)) < random.random()
            arena.free(size, pages[gone])
            live[size] = pages[~gone], data[~gone]
        else:
            try:
                arena.compact(size, pages)
            except MemoryError:
                assert (arena.nbytes, arena.used) == state
        touched = set()
        for size, (pages, data) in live.items():
            assert (content(arena, size, pages) == data).all()
            for unit in pages.tolist():
                touched.update(range(unit * 128 // GRANULE, (unit * 128 + size - 1) // GRANULE + 1))
        assert arena.used == sum(data.size for _, data in live.values())
        assert len(touched) * GRANULE <= arena.nbytes
    for size, (pages, _) in live.items():
        arena.free(size, pages)
    assert arena.used == 0 and arena.nbytes <= IDLE
    del arena
"""

IDLE_MEMORY = """
arena = _C.Arena(device=0)
assert arena.device == 0 and arena.nbytes == 0
small, _ = filled(arena, 128, 3)
assert (arena.nbytes, arena.used) == (GRANULE, 384)
other, _ = filled(arena, 4096, 4)
assert (arena.nbytes, arena.used) == (GRANULE, 384 + 4 * 4096), "slabs share a granule"
large, data = filled(arena, 1 << 20, 100)
assert arena.nbytes == (100 << 20) + GRANULE
state = arena.nbytes, arena.used
refused(MemoryError, "arena: expected 73400320 bytes of free memory on cuda:0, got 62849024 of 167772160",
        arena.alloc, 1 << 20, 70)
assert (arena.nbytes, arena.used) == state and (content(arena, 1 << 20, large) == data).all()
arena.free(1 << 20, large[:50].copy())
assert arena.nbytes == state[0], "its slab lives"
arena.free(1 << 20, large[50:].copy())
assert arena.used == 384 + 4 * 4096 and 0 < arena.nbytes - GRANULE <= IDLE // 2
again = arena.alloc(1 << 20, 20)
assert arena.nbytes - GRANULE <= IDLE // 2, "what was idle is taken first"
arena.free(1 << 20, again)
os.environ["FAKE_CAPTURE"] = "1"  # nothing can be taken back
pages = arena.alloc(1 << 20, 100)
arena.free(1 << 20, pages)
assert arena.nbytes - GRANULE >= 100 << 20
del os.environ["FAKE_CAPTURE"]
arena.free(128, small[:1].copy())
assert arena.nbytes - GRANULE <= IDLE // 2
"""

REFUSED = """
refused(ValueError, "arena: device: expected a CUDA device in 0..0, got 1", _C.Arena, None, 1)
arena, host = _C.Arena(None, 0), _C.Arena()
pages = arena.alloc(128, 4)
refused(ValueError, "arena: units: expected live pages of 128 bytes, got unit 77", arena.free, 128,
        np.array([77], np.uint32))
refused(MemoryError, "arena: expected room for ", arena.alloc, 1 << 30, 1)
rows, index = np.zeros((1, 1, 16, 64), np.float32), np.zeros(1, np.int32)
refused(ValueError, "pack: keys: expected the device of arena (cuda:0), got cpu:0", _C.pack, arena, rows, rows,
        np.zeros(1, np.uint64), index, index, index, (64, 64, 1, 1, 0), 0, 0, 0, 0, 0)
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the extension and a library beside it that says it is CUDA."""
    folder = tmp_path_factory.mktemp("fake")
    shutil.copy(EXTENSION, folder)
    command = ["cc", "-shared", "-fPIC", f"-DMEMORY=({MEMORY})", "-I", str(FAKE.parents[1] / "csrc"), str(FAKE)]
    subprocess.run([*command, "-o", str(folder / "libkvcomp_cuda.so")], check=True)
    return folder


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("code", [RANDOM_USE, IDLE_MEMORY, REFUSED], ids=["random use", "idle memory", "refused"])
def test_granules_of_a_device(fake: Path, code: str) -> None:
    result = subprocess.run([sys.executable, "-c", PRELUDE + code], cwd=fake, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Model(RuleBasedStateMachine):
    """Random use against a set of spans and what is in them."""

    @initialize(reserve=st.sampled_from([18, 20, 24]))
    def start(self, reserve: int) -> None:
        self.arena = _C.Arena(1 << reserve)
        self.live: dict[int, list[int]] = {}
        self.bytes: dict[int, bytes] = {}
        self.random = np.random.default_rng(0)

    @rule(size=st.sampled_from(SIZES), count=st.integers(0, 40))
    def alloc(self, size: int, count: int) -> None:
        state = self.arena.nbytes, self.arena.used
        try:
            pages = self.arena.alloc(size, count)
        except MemoryError:
            assert (self.arena.nbytes, self.arena.used) == state
            return
        data = self.random.integers(0, 256, (count, size), np.uint8)
        self.arena.write(size, pages, data)
        self.live.setdefault(size, []).extend(pages.tolist())
        self.bytes.update((unit, row.tobytes()) for unit, row in zip(pages.tolist(), data, strict=True))

    @precondition(lambda self: any(self.live.values()))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        size = data.draw(st.sampled_from([size for size, pages in self.live.items() if pages]))
        chosen = data.draw(st.sets(st.sampled_from(self.live[size]), min_size=1))
        self.arena.free(size, units(*chosen))
        self.live[size] = [unit for unit in self.live[size] if unit not in chosen]
        for unit in chosen:
            del self.bytes[unit]

    @rule(size=st.sampled_from(SIZES), order=st.randoms(use_true_random=False))
    def compact(self, size: int, order: Random) -> None:
        old = self.live.get(size, [])
        order.shuffle(old)
        places, nbytes = units(*old), self.arena.nbytes
        self.arena.compact(size, places)
        data = [self.bytes.pop(unit) for unit in old]
        self.live[size] = places.tolist()
        self.bytes.update(zip(self.live[size], data, strict=True))
        assert self.arena.nbytes <= nbytes
        if all(other == size or not pages for other, pages in self.live.items()):
            assert self.arena.nbytes == rounded(len(old) * size)

    @invariant()
    def spans(self) -> None:
        if not hasattr(self, "arena"):
            return
        spans = sorted((unit, unit + size // UNIT) for size, pages in self.live.items() for unit in pages)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        used = sum(size * len(pages) for size, pages in self.live.items())
        assert self.arena.used == used <= self.arena.nbytes
        assert used or self.arena.nbytes == 0
        for size, pages in self.live.items():
            data = b"".join(self.bytes[unit] for unit in pages)
            assert content(self.arena, size, units(*pages)).tobytes() == data


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)
