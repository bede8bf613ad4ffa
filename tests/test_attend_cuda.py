"""attend on CUDA against float64 attention over the unpacked values, and against the CPU's (csrc/kvcomp/attend.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kvcomp import _C

torch = pytest.importorskip("torch", reason="needs torch for CUDA tensors")
from kvcomp.bench.near import HALF_UNIT  # noqa: E402
from reference_torch import (  # noqa: E402
    BFLOAT16,
    BITS,
    CLASSES,
    E5M3,
    FLOAT16,
    FP16,
    GROUPS,
    HEAD_DIMS,
    LAYOUTS,
    TAIL_TOKENS,
    TOKENS,
    UNIT,
    Cache,
    Page,
    assert_near,
    check_many_huge_logits,
    many_lists,
    mixed,
    queries_of,
    same_bits,
    spots,
    uniform,
)
from test_w4_cuda import Weights  # noqa: E402

CUDA = _C.cuda_info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA["available"], reason=CUDA["why"] or ""),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LONG = 1 << 17


def device_of(cache: Cache) -> str:
    return str(cache.arena.device)


def ragged(seed: int, n: int, most: int) -> list[list[Page]]:
    """Lists of 0 to most tokens; every seventh is empty, every eleventh has one token."""
    random = np.random.default_rng(seed)
    lengths = [0 if i % 7 == 3 else 1 if i % 11 == 5 else int(random.integers(0, most + 1)) for i in range(n)]
    return [mixed(length, seed + i) for i, length in enumerate(lengths)]


def test_small() -> None:
    """One of everything, for the sanitizers; and pages of one kind for every warp of a block."""
    for head_dim, group, zero_point, scale_dtype in ((64, 64, 1, FP16), (80, 16, 0, E5M3), (128, 128, 1, E5M3)):
        lists = [
            [(k, v, 5 if k == v == 16 else 33) for k, v in CLASSES],
            [],
            [(4, 4, 64), (2, 2, 64), (16, 16, 16), (16, 16, 1)],
            [(16, 16, 1)],
        ]
        cache = Cache((head_dim, group, zero_point, FLOAT16, scale_dtype), lists, batch=2)
        for q in (1, 3):
            cache.check(queries_of(1, 2, 6, q, head_dim))
            cache.check(queries_of(1, 2, 6, q, head_dim), with_mass=False, division=cache.divide())
    cache = Cache((128, 128, 1, FLOAT16, FP16), [uniform(2, 2, 9 * 64), uniform(4, 4, 9 * 64)] * 64, batch=64)
    cache.check(queries_of(1, 64, 8, 1, 128), with_mass=False, division=cache.divide())


# ---- every class, size, shape


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("zero_point, half, scale_dtype", LAYOUTS)
def test_every_class(head_dim: int, zero_point: int, half: int, scale_dtype: int) -> None:
    """A sequence for each of the 25 classes: a list of full pages and a shorter one, a list of one token."""
    lists = []
    for k_bits, v_bits in CLASSES:
        room = _C.page_tokens(k_bits, v_bits)
        lists += [[(k_bits, v_bits, room)] * 9 + [(k_bits, v_bits, room - 5)], [(k_bits, v_bits, 1)]]
    cache = Cache((head_dim, head_dim, zero_point, half, scale_dtype), lists, batch=25, rotation=zero_point)
    queries = queries_of(1, 25, 6, 1, head_dim)
    out = cache.check(queries)
    cpu = cache.to("cpu").attend(queries.cpu())
    assert_near(out.cpu(), cpu.double(), float(cache.values.abs().max()))
    cache.check(queries_of(2, 25, 4, 3, head_dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("k_bits", BITS)
def test_one_class_alone(k_bits: int) -> None:
    """Lists long enough that every block has work of the one class only."""
    for v_bits in BITS:
        lists = [uniform(k_bits, v_bits, tokens) for tokens in (5000, 8192, 640, 63)]
        cache = Cache((128, 128, 1, FLOAT16, FP16), lists, batch=2)
        cache.check(queries_of(3, 2, 8, 1, 128, dtype=torch.float16), out=torch.empty(2, 8, 1, 128, device="cuda"))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_all_classes_in_one_list(head_dim: int) -> None:
    """Twenty-five classes in random order, pages of every fill, in each list."""
    lists = [mixed(6000, seed) for seed in range(4)]
    for half in FLOAT16, BFLOAT16:
        cache = Cache((head_dim, head_dim, 1, half, FP16), lists, batch=2, seed=head_dim)
        cache.check(queries_of(4, 2, 8, 1, head_dim))
        cache.check(queries_of(4, 2, 2, 9, head_dim))


@pytest.mark.parametrize("head_dim, group", [(d, g) for d, g in GROUPS if g < d])
def test_every_group_of_channels(head_dim: int, group: int) -> None:
    for zero_point, half, scale_dtype in LAYOUTS:
        lists = [mixed(1500, seed) for seed in range(2)]
        cache = Cache((head_dim, group, zero_point, half, scale_dtype), lists, rotation=zero_point, seed=group)
        cache.check(queries_of(5, 1, 6, 1, head_dim))
        cache.check(queries_of(5, 1, 4, 5, head_dim))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 16, 21])
def test_grouped_queries(group: int) -> None:
    """Query heads of a KV head, odd ratios too; two sequences of three KV heads with lists of their own lengths."""
    lists = [mixed(length) for length in (3000, 3, 0, 257, 64, 1)]
    for head_dim in 64, 128, 256:
        cache = Cache((head_dim, head_dim, 1, BFLOAT16, FP16), lists, batch=2)
        cache.check(queries_of(6, 2, 3 * group, 1, head_dim, dtype=torch.bfloat16))
        cache.check(queries_of(6, 2, 3 * group, 2, head_dim))


@pytest.mark.parametrize("q", [*range(1, 17), 33, 64])
def test_new_tokens_are_causal(q: int) -> None:
    """Lists longer and shorter than the new tokens; query j sees all tokens but the last q-1-j."""
    lists = [mixed(length) for length in (2500, 70, 40, 0, 7, 300)]
    for head_dim, group in ((64, 4), (128, 1), (128, 4), (128, 5), (80, 8)):
        cache = Cache((head_dim, head_dim, 1, FLOAT16, FP16), lists, batch=3)
        out = cache.check(queries_of(7, 3, 2 * group, q, head_dim))
        assert q <= 40 or bool((out[1, :group, : q - 40] == 0).all()), "queries that see nothing"


@pytest.mark.parametrize("new", [[0, 5], [5, 0], [1, 4], [5, 5], [2, 3]])
def test_left_padded_new_tokens(new: list[int]) -> None:
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(length) for length in (150, 5, 700, 30)], batch=2)
    queries = queries_of(8, 2, 4, 5, 64)
    out = cache.check(queries, new=new, with_mass=False)
    cache.check(queries, new=new)
    for i, count in enumerate(new):
        assert bool((out[i, :, : 5 - count] == 0).all())
        queries[i, :, : 5 - count] = torch.nan  # padding does not matter
    again = cache.attend(queries, new=new)
    for i, count in enumerate(new):
        assert bool((again[i, :, : 5 - count] == 0).all()), "padding gives zeros"
    assert_near(again, out.double(), float(cache.values.abs().max()))


def test_thousands_of_ragged_lists() -> None:
    lists = ragged(9, 4096, 600)
    cache = Cache((64, 64, 1, FLOAT16, FP16), lists, batch=1024)
    queries = queries_of(9, 1024, 16, 1, 64, dtype=torch.float16)
    cache.check(queries, out=torch.empty(1024, 16, 1, 64, device="cuda"))
    cache.check(queries, with_mass=False, division=cache.divide())


def test_thousands_of_lists_of_a_page() -> None:
    """Most warps of a block have nothing to do for dozens of lists, one after the other."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), [[(4, 4, 4 + i % 61)] for i in range(2048)], batch=512)
    cache.check(queries_of(13, 512, 16, 1, 128), division=cache.divide())
    cache.check(queries_of(13, 512, 16, 4, 128), with_mass=False, division=cache.divide())


def test_one_long_list_among_short_ones() -> None:
    """Work is divided by bytes: the long list crosses most blocks, the short ones share a few."""
    lists = [*ragged(10, 15, 100), mixed(60_000, 1), *ragged(11, 16, 100)]
    cache = Cache((128, 128, 1, FLOAT16, FP16), lists, batch=4)
    cache.check(queries_of(10, 4, 32, 1, 128, dtype=torch.bfloat16), division=cache.divide())


def test_nothing_to_see() -> None:
    """Only empty lists; no lists; no queries: zeros, and no crash."""
    cache = Cache((64, 64, 1, FLOAT16, FP16), [[], [], [(16, 16, 0)], [(4, 4, 0), (16, 16, 0)]], batch=2)
    assert bool((cache.check(queries_of(11, 2, 4, 2, 64)) == 0).all())
    assert bool((cache.check(queries_of(11, 2, 4, 1, 64), division=cache.divide()) == 0).all())
    some = Cache((64, 64, 1, FLOAT16, FP16), [mixed(70), []])
    mass = torch.full((2, 70), 77.0, device="cuda")
    assert some.attend(queries_of(0, 1, 4, 0, 64), mass=mass).numel() == 0
    assert bool((mass == 0).all())
    none = Cache((64, 64, 1, FLOAT16, FP16), [], batch=0)
    none.heads = 1
    assert none.attend(queries_of(0, 0, 4, 1, 64)).numel() == 0


def test_tail_pages_among_others() -> None:
    """Runs of 16-bit pages, full and not, between packed ones; lists that are a tail and nothing else."""
    lists = [
        [(16, 16, 16)] * 67
        + [(16, 16, 3), (4, 4, 64), (16, 16, 16), (16, 16, 9), (16, 16, 16), (16, 16, 16), (2, 3, 7)],
        [(2, 2, 64)] * 62 + [(16, 16, 16)] * 5 + [(16, 16, 1), (16, 16, 0), (16, 16, 4)],
        [(16, 16, 0), (4, 4, 0), (16, 16, 2)],
        [(16, 16, 16)] * 6 + [(16, 16, 5)],
    ]
    for half in FLOAT16, BFLOAT16:
        for rotation in 0, 1:
            cache = Cache((80, 80, 1, half, FP16), lists, rotation=rotation)
            cache.check(queries_of(12, 1, 4, 5, 80))
            cache.check(queries_of(12, 1, 12, 1, 80))


# ---- types, strides, options


@pytest.mark.parametrize("dtype", list(HALF_UNIT))
def test_types_of_queries_and_output(dtype: torch.dtype) -> None:
    cache = Cache((96, 96, 1, FLOAT16, FP16), [mixed(1500), mixed(77)])
    queries = queries_of(13, 1, 8, 2, 96, dtype=dtype)
    wide = cache.check(queries, out=torch.empty(1, 8, 2, 96, device="cuda"))
    for other in HALF_UNIT:
        out = cache.check(queries, out=torch.empty(1, 8, 2, 96, dtype=other, device="cuda"))
        assert same_bits(out, wide.to(other))


@pytest.mark.parametrize("dtype", list(HALF_UNIT))
def test_strided_queries_and_output(dtype: torch.dtype) -> None:
    """(b,q,h,d) memory, longer rows, rows that begin at an odd element, and one head's queries for all."""
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(999), mixed(40), mixed(5), []], batch=2)
    for offset, pitch in ((0, 64), (16, 96), (9, 83)):
        memory = queries_of(14, 2, 4, 6, pitch, dtype=dtype)
        queries = memory[..., offset : offset + 64].transpose(1, 2)
        target = torch.full((2, 4, 6, pitch), 77, dtype=dtype, device="cuda")
        out = target[..., offset : offset + 64].transpose(1, 2)
        cache.attend(queries, out=out)
        assert same_bits(out, cache.attend(queries.contiguous()))
        target[..., offset : offset + 64] = 77
        assert bool((target == 77).all()), "written beside the output"
    shared = queries[:, :1].expand(2, 6, 4, 64)
    assert same_bits(cache.attend(shared), cache.attend(shared.contiguous()))


def test_scales_and_softcap() -> None:
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(900), mixed(50)])
    queries = queries_of(15, 1, 4, 3, 64)
    for scale in (1e-30, 1e-3, 0.125, 0.5):
        for softcap in (0.0, 1e-3, 1.0, 50.0, 1e30):
            cache.check(queries, scale=scale, softcap=softcap)


def test_mass() -> None:
    """It sums to the queries that see something, and leaves the output as it is."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), [mixed(length) for length in (7000, 3, 0, 64)], batch=2)
    queries = queries_of(16, 2, 6, 9, 128)
    mass = torch.full((4, 7001), 77.0, device="cuda")
    out = cache.attend(queries, mass=mass, new=[9, 4])
    assert torch.allclose(mass.double().sum(1).cpu(), torch.tensor([27.0, 9, 0, 12], dtype=torch.float64), rtol=1e-3)
    assert bool((mass >= 0).all())
    assert_near(cache.attend(queries, new=[9, 4]), out.double(), float(cache.values.abs().max()))


# ---- numbers


def test_one_token_is_its_value() -> None:
    cache = Cache((64, 64, 1, FLOAT16, FP16), [[(16, 16, 1)]], rotation=0)
    out = cache.check(queries_of(17, 1, 1, 1, 64) * 1e3, scale=1e3)
    assert_near(out, cache.values[:, :, :1].double(), 1.0)


@pytest.mark.parametrize("spot", [0, 63, 64, 499])
@pytest.mark.parametrize("rotation", [0, 1])
def test_one_huge_logit(spot: int, rotation: int) -> None:
    """A logit of thousands above the others takes everything, wherever it lies; one of thousands below, nothing."""
    rows = spots(slice(spot, spot + 1), 100.0)
    for pages in (uniform(4, 4, 448) + uniform(16, 16, 52), uniform(2, 8, 500), uniform(16, 3, 500)):
        cache = Cache((64, 64, 1, FLOAT16, FP16), [pages], rotation=rotation, rows=rows)
        for sign in (1.0, -1.0):
            out = cache.check(torch.full((1, 2, 1, 64), sign, device="cuda"), scale=1.0)
            if sign > 0:
                assert_near(out, cache.values[:, :, spot : spot + 1].double().expand(out.shape), 1.0)
        cache.check(torch.ones(1, 2, 1, 64, device="cuda"), scale=1.0, softcap=50.0)


@pytest.mark.parametrize("size", [1e6, 3e7, 4e8, 1e9, 1e12, 1e30, 1e37])
def test_huge_logits(size: float) -> None:
    """float has no step of 1 at such logits: still, one that is above the others takes everything, one below them
    nothing, and among equal ones weights are shares."""
    for heads, spot in ((2, 0), (2, 70), (6, 499)):
        for pages in (uniform(4, 4, 448) + uniform(16, 16, 52), uniform(2, 8, 500), uniform(16, 3, 500)):
            cache = Cache((64, 64, 1, FLOAT16, FP16), [pages], rows=spots(slice(spot, spot + 1), 100.0))
            for sign in (1.0, -1.0):
                cache.check(torch.full((1, heads, 1, 64), sign * size / 6400, device="cuda"), scale=1.0)
    check_many_huge_logits(size, 1, heads=(1, 4, 8))


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("gap", [30.0, 65.0, 78.0, 80.0, 88.0, 150.0, 1e4])
def test_zero_scales_of_values(value: float, gap: float) -> None:
    """Rows of V that are one number have a scale of 0, which bounds no weight: neither is it infinite, nor lost. Lists
    of which a warp has one page, and so many that it has several."""
    for where in (slice(1200, 1201), slice(1216, None, 2)):
        for bits in (4, 2, 8):
            cache = many_lists(uniform(bits, bits, 1500), spots(where, 1.0, value), rotation=0)
            for heads in (2, 8):
                queries = torch.full((264, heads, 1, 64), gap / 64, device="cuda")
                cache.check(queries, scale=1.0, with_mass=False)
    for where in (slice(0, 1), slice(70, 71), slice(499, 500), slice(1, None, 2), slice(192, 256)):
        for pages in (uniform(4, 4, 500), uniform(2, 2, 500), uniform(8, 3, 500) + uniform(16, 16, 40)):
            for layout in ((64, 64, 1, FLOAT16, FP16), (64, 64, 1, FLOAT16, E5M3))[: 1 if value else 2]:
                cache = Cache(layout, [pages], rows=spots(where, 1.0, value), rotation=0)
                for heads in (2, 8):
                    queries = torch.full((1, heads, 1, 64), gap / 64, device="cuda")
                    queries[:, 1::2] *= -1
                    cache.check(queries, scale=1.0)


@pytest.mark.parametrize("step", [0.01, 0.1, 1.0, 3.0])
def test_rising_and_falling_logits(step: float) -> None:
    """The softmax's reference moves on every page, by little and by much; nothing overflows."""
    for sign in (1, -1):

        def rows(
            shape: tuple[int, ...], generator: torch.Generator, sign: int = sign
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys = torch.zeros(shape, device=generator.device)
            keys[..., 0] = sign * step * torch.arange(shape[2], device=generator.device)
            return keys, torch.randn(shape, generator=generator, device=generator.device)

        queries = torch.zeros(1, 1, 1, 64, device="cuda")
        queries[..., 0] = 1
        for pages in (uniform(16, 16, 640), uniform(16, 4, 2560), uniform(8, 2, 2560)):
            cache = Cache((64, 64, 1, BFLOAT16, FP16), [pages], rotation=0, rows=rows)
            cache.check(queries, scale=1.0)


def test_equal_logits_are_the_mean() -> None:
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(3000)])
    out = cache.check(torch.zeros(1, 1, 1, 64, device="cuda"))
    assert_near(out, cache.values.double().mean(2, keepdim=True), 1.0)


def rows_of(kind: str) -> Any:
    """Keys and values that break what is good enough for normal ones."""

    def rows(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        device = generator.device
        keys, values = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        token = torch.arange(shape[2], device=device)[:, None]
        if kind == "subnormal scales":
            values *= 3e-6
            keys *= 3e-6
        elif kind == "subnormal scales among others":
            values *= torch.where(token % 3 == 0, 3e-6, 1.0)
            keys *= torch.where(token % 2 == 0, 3e-6, 1.0)
        elif kind == "zero rows":
            values *= token % 2
            keys *= token % 3 > 0
        elif kind == "zeros":
            values *= 0
        elif kind == "scales near the largest":
            values *= 1.9e5
        elif kind == "large keys":
            keys *= 1e4
        elif kind == "values from tiny to huge":
            values *= 10.0 ** (token % 9 - 4)
        elif kind == "one outlier a row":
            values[..., 5] += 100
            keys[..., 7] += 10
        elif kind == "a large mean":
            values += 30
        return keys, values

    return rows


@pytest.mark.parametrize(
    "kind",
    [
        "subnormal scales",
        "subnormal scales among others",
        "zero rows",
        "zeros",
        "scales near the largest",
        "values from tiny to huge",
        "one outlier a row",
        "a large mean",
    ],
)
@pytest.mark.parametrize("rotation", [0, 1])
def test_hard_rows(kind: str, rotation: int) -> None:
    for zero_point, half, scale_dtype in LAYOUTS:
        if zero_point and kind == "one outlier a row":
            continue  # the same as a large mean, and the outlier's channel hides the others' errors
        lists = [uniform(bits, bits, 1000) for bits in BITS] + [mixed(2000)]
        cache = Cache((128, 128, zero_point, half, scale_dtype), lists, batch=3, rotation=rotation, rows=rows_of(kind))
        cache.check(queries_of(18, 3, 8, 1, 128))


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_any_size(exponent: int, dtype: torch.dtype) -> None:
    """A power of two on the queries and off the scale changes nothing: neither overflow nor underflow of 16 bits."""
    for lists in ([uniform(4, 4, 700)], [uniform(16, 16, 100)], [uniform(16, 8, 700)], [mixed(1000)]):
        for rotation in 0, 1:
            cache = Cache((128, 128, 1, BFLOAT16, FP16), lists, rotation=rotation)
            queries = queries_of(19, 1, 4, 1, 128, dtype=dtype) * 2.0**exponent
            out = torch.empty(1, 4, 1, 128, device="cuda")
            cache.check(queries, scale=128**-0.5 * 2.0**-exponent, out=out)


def test_query_heads_of_different_size() -> None:
    """Each head of a group has its own range: a small one beside a large one keeps its digits."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), [mixed(1500), mixed(300)], rows=rows_of("large keys"))
    queries = queries_of(20, 1, 8, 3, 128)
    queries *= torch.tensor([1.0, 2.0**-8, 2.0**-16, 2.0**-24], device="cuda").repeat(2).view(1, 8, 1, 1)
    # Keys of 1e4: the first head's logits are of size 1, and the others' of 2^-8 and less, where all that can go wrong
    # is that they become something else.
    cache.check(queries, scale=128**-0.5 * 1e-4)
    cache.check(queries[:, [1, 1, 2, 3, 1, 1, 2, 3]], scale=128**-0.5 * 1e-4 * 2.0**8)


def long_rows(kind: str) -> Any:
    def rows(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(2))
        pattern = torch.randn(shape[-1], generator=generator, device=generator.device)
        if kind == "ones":
            values[:] = 1
        elif kind == "one row":
            values[:] = pattern
        elif kind == "one row and noise":
            values += pattern
        return keys, values

    return rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["ones", "one row", "one row and noise", "noise"])
def test_128k_uniform_tokens(bits: int, kind: str) -> None:
    """Long sums of equal shares do not drift: tensor cores truncate, so they are emptied in time."""
    for zero_point, rotation in ((1, 1), (0, 0)):
        lists = [uniform(bits, bits, LONG), uniform(bits, bits, LONG - 64 * 300)]
        cache = Cache((128, 128, zero_point, FLOAT16, FP16), lists, rows=long_rows(kind), rotation=rotation)
        cache.check(torch.zeros(1, 8, 1, 128, device="cuda"))
        cache.check(queries_of(21, 1, 8, 1, 128, dtype=torch.bfloat16), out=torch.empty(1, 8, 1, 128, device="cuda"))
        # Many lists at once: a block then holds more tokens of one list than where it has all multiprocessors.
    many = Cache((64, 64, 1, FLOAT16, FP16), [uniform(bits, bits, 1 << 13)] * 256, batch=32, rows=long_rows(kind))
    many.check(torch.zeros(32, 8, 1, 64, device="cuda"), with_mass=False)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("octaves", [12, 25, 43])
def test_a_sink_among_128k_tokens(bits: int, octaves: int) -> None:
    """One token has 2^25 times the share of each of 128k others: together they still count 2^-8 of it. Values are one
    row of both signs, so what the others add goes through the codes, not the zero points."""
    d = 64
    half = 0.5 * octaves * float(np.log(2)) / d

    def rows(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.full(shape, -half, device=generator.device)
        values = torch.randn(d, generator=generator, device=generator.device).sign().expand(shape).contiguous()
        keys[:, :, 0] = half
        values[:, :, 0] *= -1
        return keys, values

    # Symmetric scales do not hold a row of one number: there K has 16 bits.
    for zero_point, k_bits, tail in ((1, bits, 48), (0, 16, 0)):
        pages = [(16, 16, 1), *uniform(k_bits, bits, LONG - 64), *uniform(16, 16, tail)]
        cache = Cache((d, d, zero_point, FLOAT16, FP16), [pages], rotation=0, rows=rows)
        queries = torch.ones(1, 4, 1, d, device="cuda")
        exact = cache.exact(queries, scale=1.0)[0]
        gap = float((exact / cache.values[0, 0, 0].double() - 1).abs().max())
        assert (gap > 2e-3) == (octaves <= 25), "the others count, where they should"
        cache.check(queries, scale=1.0, with_mass=False)


def test_a_sink_without_values() -> None:
    """A sink that takes most of the attention and adds nothing: the others' small shares are all there is."""

    def rows(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(2))
        keys *= 0.1
        keys[:, :, 0] = 12 * 128**-0.5
        values[:, :, 0] = 0
        return keys, values

    for bits in (2, 4, 8):
        cache = Cache((128, 128, 1, FLOAT16, FP16), [[(16, 16, 1), *uniform(bits, bits, 1 << 15)]], rows=rows)
        cache.check(torch.ones(1, 4, 1, 128, device="cuda"))


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "all ones"])
@pytest.mark.parametrize("dtype", list(HALF_UNIT))
def test_queries_that_are_no_numbers(kind: str, dtype: torch.dtype) -> None:
    """They give NaN for their own query and harm no other; "all ones" is the very NaN that marks what is not there."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), [mixed(5000), mixed(300), mixed(64), []], batch=2)
    for q in 1, 4:
        queries = queries_of(22, 2, 8, q, 128, dtype=dtype)
        out = torch.empty(2, 8, q, 128, device="cuda")
        clean = cache.check(queries, out=out).clone()
        where = (0, 1, q - 1)
        if kind == "all ones":
            size = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
            queries.view(size)[where] = -1
        else:
            queries[(*where, 77)] = float(kind)
        workspace = cache.workspace(4, q)
        cache.attend(queries, out=out, workspace=workspace)
        torch.cuda.synchronize()
        assert bool(out[where].isnan().all())
        out[where] = clean[where]
        assert_near(out, clean.double(), float(cache.values.abs().max()))
        queries[where] = 0
        cache.check(queries, out=out, with_mass=False, workspace=workspace)


# ---- memory


def test_offsets_beyond_32_bits() -> None:
    """Pages behind 5 GiB of arena."""
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory")
    cache = Cache((128, 128, 1, FLOAT16, FP16), [mixed(900), mixed(2000)], first_unit=(5 << 30) // UNIT)
    cache.check(queries_of(23, 1, 8, 1, 128))
    smaller = Cache((128, 16, 1, FLOAT16, FP16), [mixed(900), mixed(2000)], first_unit=(5 << 29) // UNIT)
    smaller.check(queries_of(23, 1, 8, 1, 128))


def test_the_workspace_is_left_as_it_was() -> None:
    """0xFF before the first call and after every one, so that calls of every shape may share it; what lies behind its
    bytes is not touched."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), ragged(24, 64, 3000), batch=8)
    division, columns = cache.divide(), cache.keys.shape[2]
    shapes = [(1, 4), (4, 4), (16, 12), (1, 4)]
    nbytes = max(cache.workspace(group, q, columns).numel() for q, group in shapes)
    memory = torch.full((nbytes + 4096,), 0xFF, dtype=torch.uint8, device="cuda")
    memory[nbytes:] = 0x5A
    workspace = memory[:nbytes]
    for q, group in shapes:
        queries = queries_of(24, 8, 8 * group, q, 128)
        first = cache.attend(queries, workspace=workspace, division=division)
        assert bool((workspace == 0xFF).all())
        assert same_bits(first, cache.attend(queries, workspace=workspace)), "it divides by itself the same way"
        assert bool((workspace == 0xFF).all())
        cache.attend(queries, workspace=workspace, mass=torch.zeros(64, columns, device="cuda"))
        assert bool((workspace == 0xFF).all())
        assert same_bits(first, cache.attend(queries, division=division)), "the same in a workspace of its own"
    assert bool((memory[nbytes:] == 0x5A).all())


def test_a_hundred_runs_are_the_same_bits() -> None:
    cache = Cache((128, 128, 1, FLOAT16, FP16), ragged(25, 64, 2500), batch=8)
    for q, dtype in ((1, torch.bfloat16), (3, torch.float32)):
        queries = queries_of(25, 8, 32, q, 128, dtype=dtype)
        workspace, division = cache.workspace(4, q, cache.keys.shape[2]), cache.divide()
        first = cache.attend(queries, workspace=workspace)
        for i in range(100):
            assert same_bits(first, cache.attend(queries, workspace=workspace, division=(division, None)[i % 2])), i
        seen = set()
        for _ in range(100 if q == 1 else 20):  # kernels of their own
            mass = torch.full((64, cache.keys.shape[2]), 77.0, device="cuda")
            out = cache.attend(queries, workspace=workspace, mass=mass)
            seen.add((out.view(torch.uint8).cpu().numpy().tobytes(), mass.cpu().numpy().tobytes()))
        assert len(seen) == 1


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("group", "q"), [(4, 1), (3, 2), (8, 1)])
def test_lists_that_share_code_give_the_same(head_dim: int, group: int, q: int) -> None:
    """What a division says of a list's classes chooses code, not results: bit by bit, and near to what is exact."""
    lists = [mixed(length, seed) for seed, length in enumerate((4000, 700, 0, 2500))]
    cache = Cache((head_dim, head_dim, 1, BFLOAT16, FP16), lists, batch=2)
    queries = queries_of(31, 2, 2 * group, q, head_dim)
    division = cache.divide()
    shares = division[4 : 4 + 4 * 4].view(4, 4)
    outs = []
    for mark in (0, 1):
        shares[:, 3] = mark
        cache.check(queries, with_mass=False, division=division)
        outs.append(cache.attend(queries, division=division))
    assert same_bits(*outs)


# ---- decode steps: appends, divisions from before, overlap, graphs, streams

STEPS = 150


def growing(seed: int = 0, *, aged: tuple[int, int] = (4, 4), group: int = 128) -> Cache:
    lists = [mixed(1000, seed), [], mixed(17, seed), uniform(2, 4, 640) + uniform(16, 16, 40)]
    return Cache((128, group, 1, FLOAT16, FP16), lists, batch=2, room=STEPS + 64, aged=aged, seed=seed)


def steps_of(seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values of every step."""
    queries = queries_of(seed, STEPS, 2, 8, 1, 128, dtype=dtype)
    keys, values = (queries_of(seed + 1 + i, STEPS, 2, 2, 1, 128, dtype=dtype) for i in range(2))
    return queries, keys, values


@pytest.mark.parametrize("every", [1, 16, STEPS])
def test_divisions_from_before_the_last_appends(every: int) -> None:
    """A division goes on being right while lists grow, and while pages of their tails age."""
    cache = growing()
    queries, keys, values = steps_of(26)
    tokens = cache.lists[:, TOKENS].clone()
    for i in range(STEPS):
        if i % every == 0:
            division = cache.divide()
        cache.append(keys[i], values[i])
        if i % 10 == 9:
            cache.unpack()
            cache.check(queries[i], out=torch.empty(2, 8, 1, 128, device="cuda"), division=division)
    assert torch.equal(cache.lists[:, TOKENS], tokens + STEPS)
    assert bool((cache.lists[:, TAIL_TOKENS] < 100).all()), "tokens have aged"


@pytest.mark.parametrize("group", [128, 32])
def test_overlap_with_the_kernel_before(group: int) -> None:
    """early=1 gives the bits of early=0, with launches queued close behind each other."""
    for seed, aged in ((0, (4, 4)), (1, (2, 8)), (2, (16, 3)), (3, (16, 16))):
        early, late = (growing(seed, aged=aged, group=group) for _ in range(2))
        queries, keys, values = steps_of(27 + seed)
        workspace = early.workspace(4, 1)
        wanted, got = [], []
        for i in range(STEPS):
            if i % 16 == 0:
                division = late.divide()
            late.append(keys[i], values[i])
            torch.cuda.synchronize()
            wanted.append(late.attend(queries[i], division=division))
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # all launches wait here, so that nothing but order keeps them apart
        for i in range(STEPS):
            if i % 16 == 0:
                division = early.divide()
            early.append(keys[i], values[i])
            got.append(early.attend(queries[i], division=division, workspace=workspace, early=1))
        assert same_bits(torch.stack(got), torch.stack(wanted))
        assert same_bits(early.lists, late.lists) and same_bits(early.arena, late.arena)


def test_attends_one_after_the_other_overlap() -> None:
    """Layers share a workspace; each attend may begin to read while the one before still merges."""
    layers = [Cache((128, 128, 1, FLOAT16, FP16), ragged(seed, 16, 3000), batch=4, seed=seed) for seed in range(8)]
    queries = [queries_of(28 + i, 4, 16, 1, 128, dtype=torch.bfloat16) for i in range(8)]
    divisions = [layer.divide() for layer in layers]
    pairs = list(zip(layers, queries, divisions, strict=True))
    wanted = [layer.attend(rows, division=division) for layer, rows, division in pairs]
    workspace = max((layer.workspace(4, 1) for layer in layers), key=len)
    torch.cuda.synchronize()
    for _ in range(20):
        torch.cuda._sleep(1_000_000)
        got = [layer.attend(rows, division=part, workspace=workspace, early=1) for layer, rows, part in pairs]
        assert all(map(same_bits, got, wanted))


class Products:
    """Decode steps through four layers: a 4-bit product gives queries, keys and values, append stores, attend reads,
    and another product takes what it gives to the next layer."""

    def __init__(self, dtype: torch.dtype, aged: tuple[int, int]) -> None:
        hidden, rows = 8 * 128, (8 + 2 + 2) * 128
        self.inward, self.outward = (
            [Weights(seed + i, n, hidden, 128, 3, 1 / 32) for i in range(4)] for seed, n in ((60, rows), (70, hidden))
        )
        self.caches = [growing(i, aged=aged) for i in range(4)]
        self.states = [torch.zeros(2, hidden, dtype=dtype, device="cuda") for _ in range(5)]
        self.rows = [torch.zeros(2, rows, dtype=dtype, device="cuda") for _ in range(4)]
        self.out = [torch.zeros(2, 8, 1, 128, dtype=dtype, device="cuda") for _ in range(4)]
        self.divisions = [cache.divide() for cache in self.caches]
        self.workspace = max((cache.workspace(4, 1) for cache in self.caches), key=len)
        nbytes = max(_C.w4_workspace(2, n, hidden) for n in (rows, hidden))
        self.scratch = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device="cuda")

    def step(self, early: int, then: Callable[[], object]) -> None:
        """``then`` is called behind every launch."""

        def product(out: torch.Tensor, x: torch.Tensor, w: Weights) -> None:
            _C.w4_matmul(out, x, w.packed, None, self.scratch, *w.format, w.exponent, 0, early)
            then()

        for cache, division in zip(self.caches, self.divisions, strict=True):
            _C.divide(division[None], cache.table[None], cache.lists[None], cache.layout)
            then()
        for i, cache in enumerate(self.caches):
            product(self.rows[i], self.states[i], self.inward[i])
            queries, keys, values = self.rows[i].view(2, 12, 1, 128).split((8, 2, 2), 1)
            cache.append(keys, values)
            then()
            cache.attend(queries, out=self.out[i], workspace=self.workspace, division=self.divisions[i], early=early)
            then()
            product(self.states[i + 1], self.out[i].view(2, -1), self.outward[i])

    def found(self) -> torch.Tensor:
        return torch.cat([part.flatten() for part in (*self.rows, *self.out, *self.states[1:])])


@pytest.mark.parametrize("aged", [(4, 4), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_kernel_that_append_overlaps(dtype: torch.dtype, aged: tuple[int, int]) -> None:
    """In a graph every launch may begin before the one before it has ended: append while the product still writes its
    rows, attend while append does, the next product while attend does. Bits are those of the same steps one by one."""
    steps = 20
    inputs = queries_of(80, steps, 2, 8 * 128, dtype=dtype)
    alone, graphed = (Products(dtype, aged) for _ in range(2))
    wanted, got = [], []
    for i in range(steps):
        alone.states[0].copy_(inputs[i])
        torch.cuda.synchronize()
        alone.step(0, torch.cuda.synchronize)
        wanted.append(alone.found())
    assert bool(torch.stack(wanted).isfinite().all()) and not same_bits(wanted[0], wanted[-1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step(1, lambda: None)
    torch.cuda._sleep(20_000_000)  # all replays are queued by then
    for i in range(steps):
        graphed.states[0].copy_(inputs[i])
        graph.replay()
        got.append(graphed.found())
    for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert same_bits(one, other), i
    for one, other in zip(graphed.caches, alone.caches, strict=True):
        assert same_bits(one.lists, other.lists) and same_bits(one.arena, other.arena)
    assert bool((graphed.scratch == 0xFF).all())


@pytest.mark.parametrize("early", [0, 1])
def test_graph_of_a_decode_step(early: int) -> None:
    """A captured step, replayed while the cache grows, equals the step run by itself."""
    captured, plain = growing(4), growing(4)
    queries, keys, values = steps_of(29)
    inputs = [torch.zeros_like(rows[0]) for rows in (queries, keys, values)]
    out = torch.zeros_like(inputs[0])
    workspace = captured.workspace(4, 1)
    division = captured.divide()

    def step() -> None:
        _C.divide(division[None], captured.table[None], captured.lists[None], captured.layout)
        captured.append(inputs[1], inputs[2])
        captured.attend(inputs[0], out=out, workspace=workspace, division=division, early=early)

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(STEPS):
        for target, rows in zip(inputs, (queries, keys, values), strict=True):
            target.copy_(rows[i])
        graph.replay()
        before = plain.divide()
        plain.append(keys[i], values[i])
        assert same_bits(out, plain.attend(queries[i], division=before)), i
    plain.unpack()
    plain.check(queries[-1], out=torch.empty(2, 8, 1, 128, device="cuda"))


def test_graph_without_a_division() -> None:
    """attend divides inside the graph, of the lists as they are when it is replayed."""
    cache = growing(5)
    queries, keys, values = steps_of(30)
    rows, out, workspace = torch.zeros_like(queries[0]), torch.zeros_like(queries[0]), cache.workspace(4, 1)
    cache.attend(rows, out=out, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.attend(rows, out=out, workspace=workspace)
    for i in range(0, STEPS, 10):
        cache.append(*(torch.cat(list(part[i : i + 10]), 2) for part in (keys, values)))
        rows.copy_(queries[i])
        graph.replay()
        assert same_bits(out, cache.attend(queries[i]))


def test_two_streams() -> None:
    """Calls at the same time with workspaces of their own; each sees what its own stream queued before."""
    caches = [Cache((128, 128, 1, FLOAT16, FP16), ragged(seed, 64, 4000), batch=8, seed=seed) for seed in range(2)]
    queries = [queries_of(31 + i, 8, 32, 1, 128, dtype=torch.bfloat16) for i in range(2)]
    wanted = [cache.attend(rows) for cache, rows in zip(caches, queries, strict=True)]
    streams, workspaces = [torch.cuda.Stream() for _ in caches], [cache.workspace(4, 1) for cache in caches]
    torch.cuda.synchronize()
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for i, cache in enumerate(caches):
            with torch.cuda.stream(streams[i]):
                late = torch.zeros_like(queries[i]).copy_(queries[i])
                got[i].append(cache.attend(late, workspace=workspaces[i]))
    torch.cuda.synchronize()
    assert all(same_bits(out, want) for outs, want in zip(got, wanted, strict=True) for out in outs)


def test_a_busy_device() -> None:
    """Blocks that wait for others make progress while another stream's kernels take most of the multiprocessors."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), ragged(32, 64, 4000), batch=8)
    queries = queries_of(32, 8, 32, 1, 128, dtype=torch.bfloat16)
    wanted, workspace, other = cache.attend(queries), cache.workspace(4, 1), torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        for _ in range(50):
            a @ a
    got = [cache.attend(queries, workspace=workspace) for _ in range(50)]
    torch.cuda.synchronize()
    assert all(same_bits(out, wanted) for out in got)


# ---- refusals


def test_refusals() -> None:
    """Each names the argument; the output stays as it was, and the next call works."""
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(200), mixed(30)])
    queries = queries_of(33, 1, 4, 2, 64)
    names = ["out", "mass", "queries", "arena", "table", "lists", "new_tokens", "workspace"]

    def refused(error: type[Exception], message: str, **changed: Any) -> None:
        arguments = cache.arguments(queries, mass=torch.full((2, 200), 77.0, device="cuda"), new=[2])
        places = {**{name: i for i, name in enumerate(names)}, "scale": 10, "division": 13, "early": 14}
        out = arguments[0]
        for name, value in changed.items():
            arguments[places[name]] = value
        with pytest.raises(error, match=rf"^attend: {message}"):
            _C.attend(*arguments)
        assert bool((out == 77).all())

    workspace = cache.workspace(2, 2, 200)
    refused(ValueError, r"workspace: expected \d+ bytes, got 64", workspace=workspace[:64])
    refused(ValueError, r"workspace: expected \d+ bytes, got 64", workspace=workspace[:64], mass=None)
    refused(ValueError, r"workspace: expected 64-byte alignment", workspace=torch.cat([workspace, workspace])[4:])
    # The first tensor of a call says where it runs.
    refused(ValueError, "queries: expected the device of out .cuda:0., got cpu:0", queries=queries.cpu())
    refused(ValueError, "table: expected the device of out .cuda:0., got cpu:0", table=cache.table.cpu())
    refused(ValueError, "workspace: expected the device of out .cuda:0., got cpu:0", workspace=workspace.cpu())
    refused(ValueError, "queries: expected contiguous channels", queries=queries_of(0, 1, 4, 2, 128)[..., ::2])
    refused(ValueError, "queries: expected shape ", queries=queries_of(0, 1, 4, 2, 96))
    refused(ValueError, "queries: expected the 2 lists to divide ", queries=queries_of(0, 1, 3, 2, 64), out=queries_of(0, 1, 3, 2, 64))  # fmt: skip # noqa: E501
    refused(TypeError, "queries: expected float32, float16 or bfloat16, got float64", queries=queries.double())
    refused(ValueError, "lists: expected shape ", lists=cache.lists[:1])
    refused(ValueError, "mass: expected ", mass=torch.zeros(3, 200, device="cuda"))
    refused(ValueError, "new_tokens: expected shape ", new_tokens=torch.tensor([1, 1], dtype=torch.int32).cuda())
    refused(ValueError, "scale: expected a number in ", scale=0.0)
    refused(ValueError, "division: expected ", division=cache.divide()[:-4], mass=None)
    refused(ValueError, "early: expected an integer in 0..1, got 2", early=2)
    cache.check(queries)


def test_the_cpu_takes_no_division() -> None:
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(100)], device="cpu")
    queries = queries_of(34, 1, 2, 1, 64, device="cpu")
    with pytest.raises(ValueError, match=r"^attend: division: expected "):
        cache.attend(queries, division=torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^attend: early: expected "):
        cache.attend(queries, early=1)
    cache.check(queries)


def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(500), mixed(30)])
    twin = cache.to("cuda:1")
    queries = queries_of(35, 1, 4, 1, 64)
    assert same_bits(twin.attend(queries.to("cuda:1")).cpu(), cache.attend(queries).cpu())
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=r"^attend: queries: expected the device of out .cuda:0., got cuda:1"):
        cache.attend(queries.to("cuda:1"), out=torch.zeros_like(queries))
