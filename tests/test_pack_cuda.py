"""pack and unpack on CUDA: the CPU's bytes, bit for bit (csrc/kvcomp/pack.h)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
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
CLASSES = list(itertools.product(BITS, BITS))
GROUPS = [(d, g) for d in (64, 80, 96, 128, 256) for g in range(16, d + 1, 16) if d % g == 0]
HALF = {torch.float16: 1, torch.bfloat16: 2}  # kvc_dtype
UNIT = 128


def adversarial(rows: torch.Tensor, generator: torch.Generator) -> None:
    """Overwrites every second row of (..., s, d) with the kinds that break quantizers."""
    most = min(torch.finfo(rows.dtype).max, 3e38)
    least = torch.finfo(rows.dtype).smallest_normal
    signs = torch.randint(0, 2, rows.shape[-1:], generator=generator).to(rows.dtype) * 2 - 1
    noise = torch.randn(rows.shape[-1:], generator=generator)
    outlier = noise.clone()
    outlier[rows.shape[-1] // 3] = 3e4
    kinds = [
        torch.zeros_like(noise),
        -torch.zeros_like(noise),
        torch.zeros_like(noise) * signs,
        torch.full_like(noise, 3.25),
        torch.full_like(noise, -6e4),
        6e4 * signs,
        most * signs,
        torch.full_like(noise, most),
        least / 4 * noise,
        1e-7 * noise,
        outlier,
        1000 + 1e-3 * noise,
        torch.full_like(noise, -1e-9),
        torch.arange(noise.numel()) % 4 - 1.5,
    ]
    for i, kind in enumerate(kinds):
        rows[..., 1 + 2 * i :: 2 * len(kinds), :] = kind.to(rows.dtype)


@dataclass
class Case:
    """Pages of all 25 classes in a gappy arena, full and ragged, over lists of random tokens."""

    head_dim: int
    group: int
    zero_point: int = 1
    half: torch.dtype = torch.bfloat16
    scale_dtype: int = 0  # 1: E5M3
    dtype: torch.dtype = torch.float32
    seed: int = 0
    shape: tuple[int, int, int] = (2, 3, 333)
    classes: list[tuple[int, int]] = field(default_factory=lambda: CLASSES)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        random = np.random.default_rng(self.seed)
        self.layout = (self.head_dim, self.group, self.zero_point, HALF[self.half], self.scale_dtype)
        shape = (*self.shape, self.head_dim)
        self.keys, self.values = ((3 * torch.randn(shape, generator=generator)).to(self.dtype) for _ in range(2))
        for rows in self.keys, self.values:
            adversarial(rows, generator)
        lists = self.shape[0] * self.shape[1]
        unused = [random.permutation(self.shape[2]).tolist() for _ in range(lists)]  # no row twice: unpack would race
        pages, tokens, start, unit = [], [], [], 3
        for i, (k_bits, v_bits) in enumerate(self.classes):
            room = _C.page_tokens(k_bits, v_bits)
            count = room if i % 2 else int(random.integers(0, room + 1))
            pages.append(unit | k_bits << 32 | v_bits << 40 | count << 48)
            start.append(len(tokens))
            tokens += [unused[i % lists].pop() for _ in range(count)]
            unit += _C.page_bytes(self.layout, k_bits, v_bits) // UNIT + i % 2
        self.pages = torch.from_numpy(np.array(pages, np.uint64).view(np.int64)).view(torch.uint64)
        self.lists = torch.arange(len(pages), dtype=torch.int32) % lists
        self.start = torch.tensor(start, dtype=torch.int32)
        self.tokens = torch.tensor(tokens, dtype=torch.int32)
        self.arena_bytes = (unit + 2) * UNIT

    @property
    def index(self) -> list[torch.Tensor]:
        return [self.pages, self.lists, self.start, self.tokens]

    def arena(self, device: str) -> torch.Tensor:
        return torch.full((self.arena_bytes,), 0xA5, dtype=torch.uint8, device=device)

    def pack(self, device: str, rotation: int = 1, scale: int = 0, stochastic: int = 0) -> torch.Tensor:
        arena = self.arena(device)
        rows = [self.keys.to(device), self.values.to(device)]
        index = [t.to(device) for t in self.index]
        _C.pack(arena, *rows, *index, self.layout, rotation, scale, stochastic, 5, 1 << 40 | self.seed)
        return arena.cpu()

    def unpack(self, device: str, arena: torch.Tensor, rotation: int, dtype: torch.dtype) -> list[torch.Tensor]:
        rows = [torch.full((*self.shape, self.head_dim), 77, dtype=dtype, device=device) for _ in range(2)]
        _C.unpack(*rows, arena.to(device), *[t.to(device) for t in self.index], self.layout, rotation)
        return [t.cpu() for t in rows]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same_pages(case: Case, got: torch.Tensor, expected: torch.Tensor, what: Any) -> None:
    if torch.equal(got, expected):
        return
    byte = int((got != expected).nonzero()[0])
    starts = [int(page) % 2**32 * UNIT for page in case.pages.view(torch.int64)]
    page = max((i for i, first in enumerate(starts) if first <= byte), default=-1)
    pytest.fail(
        f"{what}: {int((got != expected).sum())} bytes differ, the first at {byte}: "
        f"page {page} of class {case.classes[page]}, byte {byte - starts[page]} of it"
    )


@pytest.mark.parametrize("head_dim, group", GROUPS)
def test_same_bytes(head_dim: int, group: int) -> None:
    """Every class x scale kind x rotation x layout x input type, nearest and stochastic rounding; and back again."""
    sixteen = [(torch.float32, torch.float16), (torch.float32, torch.bfloat16), *((half, half) for half in HALF)]
    options = [(dtype, zero_point, half, 0) for dtype, half in sixteen for zero_point in (0, 1)]
    options += [(dtype, zero_point, half, 1) for dtype, half in (sixteen[0], sixteen[3]) for zero_point in (0, 1)]
    for seed, (dtype, zero_point, half, scale_dtype) in enumerate(options):
        case = Case(head_dim, group, zero_point, half, scale_dtype, dtype, seed)
        for rotation, scale, stochastic in itertools.product((0, 1), (0, 1, 2), (0, 1)):
            what = (dtype, zero_point, half, scale_dtype, rotation, scale, stochastic)
            expected = case.pack("cpu", rotation, scale, stochastic)
            assert_same_pages(case, case.pack("cuda", rotation, scale, stochastic), expected, what)
            if stochastic or scale != 1:
                continue  # unpack reads pages, whatever wrote them
            for out in torch.float32, torch.float16, torch.bfloat16:
                cpu = case.unpack("cpu", expected, rotation, out)
                cuda = case.unpack("cuda", expected, rotation, out)
                assert same_bits(cpu[0], cuda[0]) and same_bits(cpu[1], cuda[1]), (*what, out)


def test_small() -> None:
    """One of everything, for the sanitizers."""
    for zero_point, scale_dtype in ((1, 0), (1, 1), (0, 1)):  # the last one's page (16, 3) ends in padding
        classes = [(2, 3), (4, 8), (16, 3), (16, 16)]
        case = Case(80, 16, zero_point, scale_dtype=scale_dtype, classes=classes, shape=(1, 2, 130))
        expected = case.pack("cpu", 1, 2, 1)
        assert_same_pages(case, case.pack("cuda", 1, 2, 1), expected, "small")
        cpu, cuda = (case.unpack(device, expected, 1, torch.float32) for device in ("cpu", "cuda"))
        assert same_bits(cuda[0], cpu[0]) and same_bits(cuda[1], cpu[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strided_rows(dtype: torch.dtype) -> None:
    """(b,s,h,d) memory, and rows at an odd element, which no vector load can take."""
    case = Case(96, 96, dtype=dtype)
    b, h, s = case.shape
    expected = case.pack("cpu")
    for offset in 0, 1:
        memory = torch.zeros(2, b, s, h, 96 + 2 * offset + offset, dtype=dtype, device="cuda")
        keys, values = (memory[i, ..., offset : offset + 96].transpose(1, 2) for i in range(2))
        keys.copy_(case.keys)
        values.copy_(case.values)
        arena = case.arena("cuda")
        index = [t.cuda() for t in case.index]
        _C.pack(arena, keys, values, *index, case.layout, 1, 0, 0, 5, 1 << 40)
        assert_same_pages(case, arena.cpu(), expected, offset)
        before = memory.clone()
        keys.fill_(77)
        values.fill_(77)
        _C.unpack(keys, values, arena, *index, case.layout, 1)
        for got, want in zip((keys, values), case.unpack("cpu", expected, 1, dtype), strict=True):
            assert same_bits(got.cpu(), want)
        keys.zero_(), values.zero_()
        keys.copy_(case.keys), values.copy_(case.values)
        assert same_bits(memory.cpu(), before.cpu()), "unpack wrote beside the rows"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_both_kernels(head_dim: int, dtype: torch.dtype) -> None:
    """Rows on 16-byte addresses go to the tensor core, others to the general kernel: the CPU's bytes from both, from
    rows of every size (a row's own power of two decides how it is rounded) and next to ties."""
    generator = torch.Generator().manual_seed(head_dim)
    sizes = (-24, 16) if dtype == torch.float16 else (-70, 100)
    for scale_dtype, zero_point in itertools.product((0, 1), (0, 1)):
        case = Case(head_dim, head_dim, zero_point, dtype, scale_dtype, dtype)
        b, h, s = case.shape
        for rows in case.keys, case.values:
            exponents = torch.randint(*sizes, (b, h, s, 1), generator=generator).float()
            spread = torch.randint(-20, 1, (b, h, s, head_dim), generator=generator).float()
            few_bits = torch.randint(-7, 8, (b, h, s, head_dim), generator=generator) / 8
            rows.copy_((few_bits * 2.0 ** (exponents + spread)).to(dtype))
        for scale in 0, 1, 2:
            expected = case.pack("cpu", 1, scale)
            for offset in 0, 4:
                memory = torch.zeros(2, b, h, s, head_dim + 8, dtype=dtype, device="cuda")
                keys, values = (part[..., offset : offset + head_dim] for part in memory)
                keys.copy_(case.keys)
                values.copy_(case.values)
                arena = case.arena("cuda")
                _C.pack(arena, keys, values, *[t.cuda() for t in case.index], case.layout, 1, scale, 0, 5, 1 << 40)
                assert_same_pages(case, arena.cpu(), expected, (scale_dtype, zero_point, scale, offset))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rotated_rows_of_one_sign(head_dim: int, dtype: torch.dtype) -> None:
    """A channel that outweighs the others gives many rotated ones its sign: the tensor core's kernel, which first looks
    for the extremes among numbers of both signs, has to look again."""
    generator = torch.Generator().manual_seed(head_dim)
    case = Case(head_dim, head_dim, 1, dtype, 0, dtype)
    for rows in case.keys, case.values:
        rows.copy_((torch.randn(rows.shape, generator=generator) / 64).to(dtype))
        for i, channel in enumerate((0, 2, 4, 6, 8, 12)):
            rows[..., 2 * i :: 14, channel] = 8
            rows[..., 2 * i + 1 :: 14, channel] = -8
    for scale in 1, 2:
        assert_same_pages(case, case.pack("cuda", 1, scale), case.pack("cpu", 1, scale), scale)


@pytest.mark.parametrize("dtype, half", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sixteen_bits_of_the_other_type(head_dim: int, dtype: torch.dtype, half: torch.dtype) -> None:
    """bfloat16 rows in float16 halves and the other way round, from both kernels, rotated and not: rows of every size,
    beyond float16's largest number and among its subnormal ones; and back again."""
    case = Case(head_dim, head_dim, half=half, dtype=dtype)
    generator = torch.Generator().manual_seed(head_dim)
    for rows in case.keys, case.values:
        exponents = torch.randint(-30, 16, (*case.shape, 1), generator=generator).float()
        some = torch.rand((*case.shape, 1), generator=generator) < 0.5
        rows.copy_(torch.where(some, (rows.float() * 2.0**exponents).clamp(-6e4, 6e4), rows.float()).to(dtype))
    for rotation, scale in itertools.product((0, 1), (0, 1, 2)):
        expected = case.pack("cpu", rotation, scale)
        for offset in 0, 4:  # elements: rows on 16-byte addresses, and not
            memory = torch.zeros(2, *case.shape, head_dim + 8, dtype=dtype, device="cuda")
            keys, values = (part[..., offset : offset + head_dim] for part in memory)
            keys.copy_(case.keys)
            values.copy_(case.values)
            arena, index = case.arena("cuda"), [t.cuda() for t in case.index]
            _C.pack(arena, keys, values, *index, case.layout, rotation, scale, 0, 5, 1 << 40)
            assert_same_pages(case, arena.cpu(), expected, (rotation, scale, offset))
        for out in torch.float32, dtype, half:
            cuda, cpu = (case.unpack(device, expected, rotation, out) for device in ("cuda", "cpu"))
            assert same_bits(cuda[0], cpu[0]) and same_bits(cuda[1], cpu[1]), (rotation, scale, out)


def test_offsets_beyond_32_bits() -> None:
    """A page behind 4 GiB of arena, a head behind 4 GiB of keys."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    case = Case(128, 128, dtype=torch.bfloat16, classes=[(4, 2), (16, 16)], shape=(1, 2, 64))
    expected = case.pack("cpu")
    skip = (5 << 30) // UNIT
    arena = torch.full((skip * UNIT + case.arena_bytes,), 0xA5, dtype=torch.uint8, device="cuda")
    heads = [torch.empty(5 << 29, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    stride = (5 << 29) - 64 * 128
    keys, values = (head.as_strided((1, 2, 64, 128), (0, stride, 128, 1)) for head in heads)
    keys.copy_(case.keys)
    values.copy_(case.values)
    pages = (case.pages.view(torch.int64) + skip).view(torch.uint64).cuda()
    index = [pages, *[t.cuda() for t in case.index[1:]]]
    _C.pack(arena, keys, values, *index, case.layout, 1, 0, 0, 5, 1 << 40)
    assert_same_pages(case, arena[skip * UNIT :].cpu(), expected, "far")
    assert bool((arena[: skip * UNIT] == 0xA5).all())
    keys.fill_(77)
    values.fill_(77)
    _C.unpack(keys, values, arena, *index, case.layout, 1)
    for got, want in zip((keys, values), case.unpack("cpu", expected, 1, torch.bfloat16), strict=True):
        assert same_bits(got.cpu(), want)


def test_streams() -> None:
    """Each call runs on its caller's stream: work queued before it there is seen, whatever other streams do."""
    cases = [Case(128, 128, dtype=torch.bfloat16, seed=seed) for seed in range(2)]
    expected = [case.pack("cpu") for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    inputs = [([case.keys.cuda(), case.values.cuda()], [t.cuda() for t in case.index]) for case in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        arenas = []
        for stream, case, (rows, index) in zip(streams, cases, inputs, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # without stream order, pack would read the zeros
                late = [torch.zeros_like(row).copy_(row, non_blocking=True) for row in rows]
                arena = case.arena("cuda")
                _C.pack(arena, *late, *index, case.layout, 1, 0, 0, 5, 1 << 40 | case.seed)
                arenas.append(arena)
        for stream, case, arena, want in zip(streams, cases, arenas, expected, strict=True):
            stream.synchronize()
            assert_same_pages(case, arena.cpu(), want, "stream")


def test_graph() -> None:
    """pack and unpack can be captured: they allocate nothing and wait for nothing."""
    case, other = (Case(128, 64, dtype=torch.float16, seed=seed) for seed in (1, 2))
    rows, back = ([torch.zeros_like(case.keys, device="cuda") for _ in range(2)] for _ in range(2))
    index = [t.cuda() for t in case.index]
    arena = case.arena("cuda")

    def step() -> None:
        _C.pack(arena, *rows, *index, case.layout, 1, 0, 0, 5, 1 << 40 | case.seed)
        _C.unpack(*back, arena, *index, case.layout, 1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for keys, values in (case.keys, case.values), (other.keys, other.values):
        rows[0].copy_(keys)
        rows[1].copy_(values)
        back[0].fill_(77)
        back[1].fill_(77)
        graph.replay()
        case.keys, case.values = keys, values
        expected = case.pack("cpu")
        assert_same_pages(case, arena.cpu(), expected, "replay")
        for got, want in zip(back, case.unpack("cpu", expected, 1, torch.float16), strict=True):
            assert same_bits(got.cpu(), want)


def test_repeats() -> None:
    case = Case(256, 256, dtype=torch.bfloat16)
    rows, index = [case.keys.cuda(), case.values.cuda()], [t.cuda() for t in case.index]
    first = None
    for _ in range(100):
        arena = case.arena("cuda")
        _C.pack(arena, *rows, *index, case.layout, 1, 2, 1, 5, 7)
        first = arena if first is None else first
        assert torch.equal(arena, first)


def test_no_pages() -> None:
    case = Case(64, 64, classes=[])
    assert torch.equal(case.pack("cuda"), case.arena("cpu"))


def test_entries_out_of_range_touch_nothing() -> None:
    """The host checks tables on the CPU only; on CUDA a wrong entry is skipped, and the device lives on."""
    case = Case(64, 64, classes=[(4, 4)] * 7)
    pages = case.pages.view(torch.int64)
    pages[0] |= 0xFFFFFFFF  # beyond the arena
    pages[1] ^= (4 ^ 5) << 32  # 5 bits
    pages[2] |= 0xFF << 48  # 255 tokens
    case.lists[3] = 6
    case.lists[4] = -1
    case.start[5] = 1 << 30
    case.start[6] = -1
    assert torch.equal(case.pack("cuda"), case.arena("cpu"))
    back = case.unpack("cuda", case.arena("cpu"), 1, torch.float32)
    assert all(bool((rows == 77).all()) for rows in back)


def pack_on(case: Case, **changed: torch.Tensor) -> None:
    names = ("arena", "keys", "values", "pages", "lists", "start", "tokens")
    tensors = dict(zip(names, [case.arena("cpu"), case.keys, case.values, *case.index], strict=True))
    tensors = {name: tensor.cuda() for name, tensor in tensors.items()} | changed
    _C.pack(*tensors.values(), case.layout, 1, 0, 0, 0, 0)


def test_errors() -> None:
    case = Case(64, 64, classes=[(4, 4)])
    pack_on(case)
    for name in "keys", "pages", "tokens":
        tensor = getattr(case, name)
        with pytest.raises(ValueError, match=rf"^pack: {name}: expected the device of arena .cuda:0., got cpu:0$"):
            pack_on(case, **{name: tensor})
    with pytest.raises(TypeError, match=r"^pack: keys: expected float32, float16 or bfloat16, got float64$"):
        pack_on(case, keys=case.keys.double().cuda(), values=case.values.double().cuda())
    with pytest.raises(ValueError, match=r"^pack: keys: expected shape "):
        pack_on(case, keys=case.keys[..., :32].cuda())
    with pytest.raises(ValueError, match=r"^pack: arena: expected 16-byte alignment, got address "):
        pack_on(case, arena=case.arena("cuda")[1:])
    with pytest.raises(ValueError, match=r"^pack: lists: expected shape "):
        pack_on(case, lists=case.lists.repeat(2).cuda())
    assert torch.equal(case.pack("cuda"), case.pack("cpu"))


def test_cpu_operations_refuse_cuda_tensors_by_name() -> None:
    importance = torch.zeros(4, 100, device="cuda")
    kept = torch.zeros(4, 13, dtype=torch.uint8)
    keep, floor = torch.full((4,), 10, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    workspace = torch.zeros(_C.ada_workspace(4, 100), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^ada: importance: expected a CPU tensor, got one on cuda:0$"):
        _C.ada(kept, importance, keep, None, workspace, 2, floor, 0, 0)


def test_bench() -> None:
    """A cell for each case, whose sampled pages are the CPU's bytes."""
    from kvcomp.bench import pack

    copying, *cells = pack.bench(tokens=(1024,), bits=(4, 16), dtypes=("bfloat16", "float32"), samples=2)
    assert copying["gb_per_s"] > 0 and len(cells) == 2 * (3 + 1)
    for cell in cells:
        assert cell["error"]["value"] == 0 < cell["fraction_of_copy"]


def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = Case(128, 128)
    expected = case.pack("cpu")
    torch.cuda.set_device(0)
    assert_same_pages(case, case.pack("cuda:1"), expected, "cuda:1")
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=r"^pack: keys: expected the device of arena .cuda:0., got cuda:1$"):
        pack_on(case, keys=case.keys.to("cuda:1"))
