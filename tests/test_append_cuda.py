"""append on CUDA: the CPU's bytes, tables, lists and stacks after any appends, and what append_walk says of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from kvcomp import _C

torch = pytest.importorskip("torch", reason="needs torch for CUDA tensors")
CUDA = _C.cuda_info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA["available"], reason=CUDA["why"] or ""),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

BITS = (2, 3, 4, 8, 16)
CLASSES = [(k_bits, v_bits) for k_bits in BITS for v_bits in BITS]
GROUPS = [(d, g) for d in (64, 80, 96, 128, 256) for g in range(16, d + 1, 16) if d % g == 0]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = 128
NAMES = ("arena", "table", "lists", "pool_tail", "pool_packed", "left")
PLAIN = (1, 0, 0, 5, 7)  # rotation, scale, stochastic, layer, seed


class Cache:
    """append's tensors on one device. Units of all stacks are shuffled, with gaps between pages."""

    def __init__(
        self,
        layout: tuple[int, ...],
        classes: list[tuple[int, int]],
        window: int,
        b: int,
        h: int,
        options: tuple[int, ...] = PLAIN,
        capacity: int = 80,
    ) -> None:
        n, random = b * h, np.random.default_rng(0)
        self.layout, self.window, self.options, self.b, self.h = layout, window, options, b, h
        steps = [_C.page_bytes(layout, *pair) // UNIT + 1 for pair in [(16, 16), *classes]]
        most = 4 * capacity
        tails = 1 + random.permutation(n * most).reshape(n, most) * steps[0]
        first = 1 + n * most * steps[0] + capacity * np.cumsum([0, *steps[1:-1]])
        packed = np.stack(
            [start + random.permutation(capacity) * step for start, step in zip(first, steps[1:], strict=True)]
        )
        units = 1 + n * most * steps[0] + capacity * sum(steps[1:])
        arrays = [
            np.full(units * UNIT, 0xA5, np.uint8),
            np.zeros((n, capacity), np.uint64),
            np.zeros((n, 4), np.int32),
            tails.astype(np.uint32),
            packed.astype(np.uint32),
            np.tile(np.array([most, capacity], np.int32), (n, 1)),
        ]
        self.classes = torch.from_numpy(np.array(classes, np.uint8).reshape(n, 2))
        self.state = [torch.from_numpy(array) for array in arrays]

    def to(self, device: str) -> Cache:
        other = copy.copy(self)
        other.state = [tensor.to(device, copy=True) for tensor in self.state]
        other.classes = self.classes.to(device, copy=True)
        return other

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        _C.append(*self.state, keys, values, valid, self.classes, self.layout, self.window, *self.options)

    def walk(self, q: int, valid: torch.Tensor | None = None) -> None:
        _C.append_walk(*self.state[1:], valid, self.classes, self.window, q)

    def differs(self, other: Cache, *, rows: bool = True) -> str | None:
        """What does not have the same bytes; without ``rows``, the arena is not looked at."""
        for name, ours, theirs in zip(NAMES, self.state, other.state, strict=True):
            a, b = (tensor.cpu().view(torch.uint8).reshape(-1) for tensor in (ours, theirs))
            if (rows or name != "arena") and not torch.equal(a, b):
                where = (a != b).nonzero()
                return f"{name}: {len(where)} bytes, the first at {int(where[0])}"
        return None


def rows_of(random: np.random.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Normal rows, some of zeros, of one number, with an outlier, as large or as small as their type allows."""
    rows = random.standard_normal(shape).astype(np.float32)
    flat = rows.reshape(-1, shape[-1])
    with np.errstate(over="ignore", under="ignore"):
        for i, kind in enumerate(random.integers(0, 24, len(flat))):
            if kind == 0:
                flat[i] = np.copysign(0, flat[i])
            elif kind == 1:
                flat[i] = -3.25
            elif kind == 2:
                flat[i, i % shape[-1]] = 3e4
            elif kind == 3:
                flat[i] *= np.float32(10.0 ** random.uniform(-42, 37))
            elif kind == 4:
                flat[i] = np.copysign(np.float32(3.3e38), flat[i])
            elif kind == 5:
                flat[i] += 1000
    most = torch.finfo(dtype).max
    return torch.from_numpy(rows).clamp(-most, most).to(dtype)


def case_of(seed: int, head_dim: int, group: int) -> tuple[np.random.Generator, Cache, torch.dtype]:
    random = np.random.default_rng([seed, head_dim, group])
    layout = (head_dim, group, *(int(random.integers(*span)) for span in ((0, 2), (1, 3), (0, 2))))
    options = (*(int(random.integers(0, most)) for most in (2, 3, 2, 100)), int(random.integers(0, 1 << 60)))
    b, h = (int(x) for x in random.integers(1, 4, 2))
    classes = [CLASSES[i] for i in random.integers(0, len(CLASSES), b * h)]
    window = int(random.choice([0, 1, 16, 40, 64, 100]))
    return random, Cache(layout, classes, window, b, h, options), DTYPES[seed % 3]


@pytest.mark.parametrize("head_dim, group", GROUPS)
def test_same_bytes(head_dim: int, group: int) -> None:
    """Random classes, layouts, input types, rotation, scales, rounding, windows, and numbers of tokens in any order."""
    for seed in range(24):
        random, cpu, dtype = case_of(seed, head_dim, group)
        cuda, mirror = cpu.to("cuda"), cpu.to("cpu")
        for q in random.choice([0, 1, 1, 1, 2, 15, 16, 17, 63, 64, 65, 90, 130], 7).tolist():
            keys, values = (rows_of(random, dtype, cpu.b, cpu.h, q, head_dim) for _ in range(2))
            valid = None
            if random.integers(2):
                valid = torch.from_numpy(random.integers(0, q + 1, cpu.b).astype(np.int32))
                for i, count in enumerate(valid.tolist()):
                    keys[i, :, : q - count] = torch.nan  # padding is not looked at
                    values[i, :, : q - count] = torch.inf
            cpu.append(keys, values, valid)
            mirror.walk(q, valid)
            cuda.append(keys.cuda(), values.cuda(), None if valid is None else valid.cuda())
            what = (seed, cpu.layout, cpu.options, cpu.window, cpu.classes.tolist(), q, valid)
            assert cuda.differs(cpu) is None, (cuda.differs(cpu), what)
            assert cuda.differs(mirror, rows=False) is None, what


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_by_token(dtype: torch.dtype) -> None:
    """The short way: pages that begin, pages that fill up, flushes, in lists that are not in step."""
    random = np.random.default_rng(1)
    for head_dim, group, rotation in ((128, 128, 1), (256, 256, 1), (80, 16, 0), (96, 96, 1), (64, 64, 1)):
        cpu = Cache((head_dim, group, 1, 2, 0), [(4, 4), (2, 3), (16, 16), (8, 2)], 8, 2, 2, (rotation, 0, 0, 1, 2))
        keys, values = (rows_of(random, dtype, 2, 2, 230, head_dim) for _ in range(2))
        cpu.append(keys[:, :, :40], values[:, :, :40], torch.tensor([3, 40], dtype=torch.int32))
        cuda, mirror = cpu.to("cuda"), cpu.to("cpu")
        there = keys.cuda(), values.cuda()
        for j in range(40, 230):
            cpu.append(keys[:, :, j : j + 1], values[:, :, j : j + 1])
            cuda.append(there[0][:, :, j : j + 1], there[1][:, :, j : j + 1])
            if j % 13 == 0:
                assert cuda.differs(cpu) is None, (head_dim, j, cuda.differs(cpu))
        mirror.walk(190)
        assert cuda.differs(cpu) is None and cuda.differs(mirror, rows=False) is None, head_dim


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype) -> None:
    """(b,q,h,d) memory, and rows at an odd element, which no vector load can take."""
    random = np.random.default_rng(2)
    keys, values = (rows_of(random, dtype, 2, 3, 70, 96) for _ in range(2))
    for offset in (0, 1):
        cpu = Cache((96, 32, 0, 1, 1), [(3, 4)] * 6, 0, 2, 3)
        cuda = cpu.to("cuda")
        memory = torch.zeros(2, 2, 70, 3, 96 + 3 * offset, dtype=dtype, device="cuda")
        there = [memory[i, ..., offset : offset + 96].transpose(1, 2) for i in range(2)]
        there[0].copy_(keys)
        there[1].copy_(values)
        for start, end in ((0, 66), (66, 67), (67, 70)):
            cpu.append(keys[:, :, start:end], values[:, :, start:end])
            cuda.append(*(rows[:, :, start:end] for rows in there))
        assert cuda.differs(cpu) is None, (offset, cuda.differs(cpu))


def test_long_tails() -> None:
    """More tail pages than a block has threads: they move up when the first four are packed."""
    random = np.random.default_rng(3)
    cpu = Cache((64, 64, 1, 1, 0), [(2, 2), (16, 16)], 5000, 1, 2, capacity=400)
    keys, values = (rows_of(random, torch.float16, 1, 2, 5300, 64) for _ in range(2))
    cuda, there = cpu.to("cuda"), (keys.cuda(), values.cuda())
    for start, end in ((0, 5060), (5060, 5070), (5070, 5300)):
        cpu.append(keys[:, :, start:end], values[:, :, start:end])
        cuda.append(*(rows[:, :, start:end] for rows in there))
        assert cuda.differs(cpu) is None, (start, cuda.differs(cpu))


def test_window_that_shrinks() -> None:
    """What a larger window kept leaves the tail at once: pages are packed one after the other."""
    random = np.random.default_rng(10)
    for head_dim, group, count in ((128, 128, 1), (64, 32, 1), (256, 256, 40)):
        cpu = Cache((head_dim, group, 1, 2, 0), [(4, 4), (3, 2), (8, 16), (16, 16)], 300, 1, 4)
        cuda = cpu.to("cuda")
        for window, q in ((300, 350), (100, 1), (0, count), (0, 70)):
            keys, values = (rows_of(random, torch.bfloat16, 1, 4, q, head_dim) for _ in range(2))
            cpu.window = cuda.window = window
            cpu.append(keys, values)
            cuda.append(keys.cuda(), values.cuda())
            assert cuda.differs(cpu) is None, (head_dim, window, cuda.differs(cpu))


def test_offsets_beyond_32_bits() -> None:
    """Pages behind 4 GiB of arena."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    random = np.random.default_rng(4)
    cpu = Cache((128, 128, 1, 2, 0), [(4, 4)] * 2, 0, 1, 2)
    cuda, skip = cpu.to("cuda"), (5 << 30) // UNIT
    near = cuda.state[0]
    cuda.state[0] = torch.full((skip * UNIT + near.numel(),), 0xA5, dtype=torch.uint8, device="cuda")
    for at in (3, 4):
        cuda.state[at] = (cpu.state[at].view(torch.int32) + skip).view(torch.uint32).cuda()
    for q in (66, 1):
        keys, values = (rows_of(random, torch.bfloat16, 1, 2, q, 128) for _ in range(2))
        cpu.append(keys, values)
        cuda.append(keys.cuda(), values.cuda())
    assert torch.equal(cuda.state[0][skip * UNIT :].cpu(), cpu.state[0])
    assert bool((cuda.state[0][: skip * UNIT] == 0xA5).all())


@pytest.mark.parametrize("window", [0, 64])
def test_graph(window: int) -> None:
    """One captured append, replayed 200 times, leaves what 200 calls leave, and what a walk of 200 says."""
    random = np.random.default_rng(5)
    keys, values = (rows_of(random, torch.bfloat16, 2, 4, 200, 128).cuda() for _ in range(2))
    classes = [(4, 4), (2, 2), (8, 4), (16, 16), (3, 3), (4, 2), (2, 16), (8, 8)]
    start = Cache((128, 128, 1, 2, 0), classes, window, 2, 4)
    replayed, eager, cpu, mirror = (start.to(device) for device in ("cuda", "cuda", "cpu", "cpu"))
    row = [torch.zeros(2, 4, 1, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    spare = start.to("cuda")
    spare.append(*row)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.append(*row)
    for j in range(200):
        here = [rows[:, :, j : j + 1] for rows in (keys, values)]
        for static, new in zip(row, here, strict=True):
            static.copy_(new)
        graph.replay()
        eager.append(*here)
        cpu.append(*(rows.cpu() for rows in here))
    mirror.walk(200)
    assert replayed.differs(eager) is None and replayed.differs(cpu) is None
    assert replayed.differs(mirror, rows=False) is None


def test_streams() -> None:
    """Each call runs on its caller's stream: what was queued before it there is seen."""
    random = np.random.default_rng(6)
    rows = [[rows_of(random, torch.float16, 1, 2, 3, 64) for _ in range(2)] for _ in range(2)]
    cpus = [Cache((64, 64, 1, 1, 0), [(4, 4), (2, 2)], 0, 1, 2) for _ in rows]
    cudas, streams = [cache.to("cuda") for cache in cpus], [torch.cuda.Stream() for _ in rows]
    there = [[part.cuda() for part in pair] for pair in rows]
    torch.cuda.synchronize()
    for _ in range(50):
        for cuda, stream, pair in zip(cudas, streams, there, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000)  # without stream order, append would read the zeros
                cuda.append(*(torch.zeros_like(part).copy_(part, non_blocking=True) for part in pair))
        for cpu, pair in zip(cpus, rows, strict=True):
            cpu.append(*pair)
    torch.cuda.synchronize()
    for cpu, cuda in zip(cpus, cudas, strict=True):
        assert cuda.differs(cpu) is None


def test_small() -> None:
    """One of everything, for the sanitizers."""
    random = np.random.default_rng(7)
    for group, zero_point, scale_dtype, scale in ((80, 1, 0, 0), (16, 1, 1, 2), (16, 0, 1, 1)):
        cpu = Cache((80, group, zero_point, 2, scale_dtype), [(2, 3), (4, 8), (16, 3), (16, 16)], 3, 2, 2)
        cpu.options = (1, scale, 1, 2, 3)
        cuda = cpu.to("cuda")
        for q in (1, 68, 1, 17):
            keys, values = (rows_of(random, torch.float32, 2, 2, q, 80) for _ in range(2))
            cpu.append(keys, values)
            cuda.append(keys.cuda(), values.cuda())
        assert cuda.differs(cpu) is None


# ---- refusals, and states that do not hold together


def spoil(cache: Cache, what: str) -> None:
    """One thing wrong with list 1."""
    _, table, lists, pool_tail, pool_packed, left = (tensor.numpy() for tensor in cache.state)
    entries = table.view(np.uint32).reshape(*table.shape, 2)
    last = int(lists[1, 0]) - 1
    if what == "tail page beyond the arena":
        entries[1, last, 0] = 2**32 - 1
    elif what == "first tail page beyond the arena":
        entries[1, lists[1, 1], 0] = 2**32 - 1
    elif what == "tail page of another class":
        entries[1, last, 1] ^= 16 ^ 4
    elif what == "tail page with other tokens":
        entries[1, last, 1] += 1 << 16
    elif what == "pages":
        lists[1, 0] = 2**31 - 1
    elif what == "negative pages":
        lists[1, 0] = -5
    elif what == "tail page index":
        lists[1, 1] = -(2**31)
    elif what == "tail tokens":
        lists[1, 2] = 2**31 - 1
    elif what == "tokens":
        lists[1, 3] = 2**31 - 1
    elif what == "negative left":
        left[1] = -1
    elif what == "left beyond the stacks":
        left[1] = 2**31 - 1
    elif what == "nothing left":
        left[1] = 0
    elif what == "stacks beyond the arena":
        pool_tail[1] = pool_packed[1] = 2**32 - 1
    elif what == "class":
        cache.classes[1, 1] = 7
    elif what == "large class":
        cache.classes[1, 0] = 255


# Tokens in the tail, and new ones: the short way into a page and onto a new one, a flush, and several of them.
WAYS = {"page": (30, 1), "new page": (32, 1), "flush": (64, 1), "many": (30, 150)}
SPOILED = {
    "tail page beyond the arena": ("page", "flush", "many"),
    "first tail page beyond the arena": ("flush", "many"),
    "tail page of another class": ("page", "flush", "many"),
    "tail page with other tokens": ("page", "flush", "many"),
    "pages": ("page", "new page", "flush", "many"),
    "negative pages": ("page", "new page", "flush", "many"),
    "tail page index": ("page", "new page", "flush", "many"),
    "tail tokens": ("page", "new page", "flush", "many"),
    "tokens": ("page", "new page", "flush", "many"),
    "negative left": ("page", "new page", "flush", "many"),
    "left beyond the stacks": ("page", "new page", "flush", "many"),
    "nothing left": ("new page", "flush", "many"),
    "stacks beyond the arena": ("new page", "flush", "many"),
    "class": ("flush", "many"),
    "large class": ("flush", "many"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_list_that_does_not_hold_together_is_left_as_it_was(what: str) -> None:
    """Nothing of it changes, nothing else is written, and the other lists are appended to."""
    random = np.random.default_rng(8)
    for way in SPOILED[what]:
        tail, q = WAYS[way]
        cpu = Cache((64, 64, 1, 1, 0), [(4, 4)] * 3, 0, 1, 3)
        cpu.append(*(rows_of(random, torch.float16, 1, 3, tail, 64) for _ in range(2)))
        broken = cpu.to("cpu")
        spoil(broken, what)
        before, cuda = broken.to("cpu"), broken.to("cuda")
        keys, values = (rows_of(random, torch.float16, 1, 3, q, 64) for _ in range(2))
        cuda.append(keys.cuda(), values.cuda())
        torch.cuda.synchronize()
        for name, got, was in zip(NAMES[1:], cuda.state[1:], before.state[1:], strict=True):
            assert torch.equal(got[1].cpu().view(torch.uint8), was[1].view(torch.uint8)), (way, name)
        arena = cpu.state[0].clone()
        cpu.append(keys, values)
        others = [cache.to("cpu") for cache in (cuda, cpu)]
        for at in range(1, 6):
            for one in others:
                one.state[at][1] = 0
        # What the CPU wrote of list 1 is not in the GPU's arena: its pages are as they were.
        mine = [*cpu.state[3][1].tolist(), *(int(entry) & 0xFFFFFFFF for entry in cpu.state[1][1].tolist())]
        size = _C.page_bytes(cpu.layout, 16, 16)
        packed = [int(unit) for unit in cpu.state[4][1].tolist()]
        for unit, nbytes in [(unit, size) for unit in mine] + [(u, _C.page_bytes(cpu.layout, 4, 4)) for u in packed]:
            others[1].state[0][unit * UNIT : unit * UNIT + nbytes] = arena[unit * UNIT : unit * UNIT + nbytes]
        assert others[0].differs(others[1]) is None, (way, others[0].differs(others[1]))


def test_errors() -> None:
    cache = Cache((64, 64, 1, 1, 0), [(4, 4)] * 2, 0, 1, 2).to("cuda")
    rows = torch.ones(1, 2, 3, 64, device="cuda")
    before = cache.to("cpu")

    def call(at: int, changed: Any) -> None:
        arguments = [*cache.state, rows, rows, None, cache.classes, cache.layout, 0, *PLAIN]
        arguments[at] = changed
        _C.append(*arguments)

    cases: list[tuple[int, Any, str]] = [
        (6, rows.cpu(), r"keys: expected the device of arena .cuda:0., got cpu:0"),
        (2, cache.state[2].cpu(), r"lists: expected the device of arena .cuda:0., got cpu:0"),
        (8, torch.ones(1, dtype=torch.int32), r"valid: expected the device of arena .cuda:0., got cpu:0"),
        (8, torch.ones(2, dtype=torch.int32, device="cuda"), r"valid: expected shape \(1,\), got \(2,\)"),
        (6, rows.double(), r"keys: expected float32, float16 or bfloat16, got float64"),
        (7, rows.half(), r"values: expected float32, got float16"),
        (6, rows[..., ::2], r"keys: expected shape .*"),
        (1, cache.state[1][:1], r"table: expected shape \(2, \*\), got \(1, 80\)"),
        (3, cache.state[3][0], r"pool_tail: expected shape \(2, \*\), got .*"),
        (5, cache.state[5][:, :1].contiguous(), r"left: expected shape \(2, 2\), got \(2, 1\)"),
        (9, cache.classes.int(), r"classes: expected uint8, got int32"),
        (0, cache.state[0][1:], r"arena: expected 16-byte alignment, got address .*"),
        (11, -1, r"window: expected an integer in 0\.\.16777216, got -1"),
    ]
    for at, changed, sentence in cases:
        with pytest.raises((ValueError, TypeError), match=rf"^append: {sentence}$"):
            call(at, changed)
    torch.cuda.synchronize()
    assert cache.differs(before) is None
    with pytest.raises(ValueError, match=r"^append_walk: [a-z_]+: expected a CPU tensor, got one on cuda:0$"):
        cache.walk(1)


def test_nothing_to_append() -> None:
    cache = Cache((64, 64, 1, 1, 0), [(4, 4)] * 2, 0, 1, 2).to("cuda")
    before = cache.to("cpu")
    none = torch.ones(1, 2, 0, 64, device="cuda")
    cache.append(none, none)
    assert cache.differs(before) is None
    cache.state[1:] = [tensor[:0] for tensor in cache.state[1:]]
    cache.classes = cache.classes[:0]
    for shape in ((0, 2, 3, 64), (1, 0, 3, 64)):
        none = torch.ones(shape, device="cuda")
        cache.append(none, none)
    assert torch.equal(cache.state[0].cpu(), before.state[0])


def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cpu = Cache((128, 128, 1, 2, 0), [(4, 4)] * 2, 0, 1, 2)
    cuda = cpu.to("cuda:1")
    rows = rows_of(np.random.default_rng(9), torch.bfloat16, 1, 2, 70, 128)
    cpu.append(rows, rows)
    torch.cuda.set_device(0)
    cuda.append(rows.to("cuda:1"), rows.to("cuda:1"))
    assert cuda.differs(cpu) is None and torch.cuda.current_device() == 0
