"""attend on CUDA with several queries a list: what attend_rows.cuh serves on devices with wgmma, against float64
attention over the unpacked values. What holds for every kernel is in test_attend_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest
from kvcomp import _C

torch = pytest.importorskip("torch", reason="needs torch for CUDA tensors")
from kvcomp.bench.near import HALF_UNIT  # noqa: E402
from reference_torch import (  # noqa: E402
    BFLOAT16,
    BITS,
    CLASSES,
    FLOAT16,
    FP16,
    HEAD_DIMS,
    LAYOUTS,
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

CUDA = _C.cuda_info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA["available"], reason=CUDA["why"] or ""),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LONG = 1 << 17
# Query heads of a KV head, and new tokens: 9 to 64 queries a list, and more than a block takes at once.
SHAPES = [(9, 1), (5, 2), (4, 4), (1, 17), (4, 8), (3, 11), (8, 8), (5, 13), (8, 9), (8, 20)]


def ragged() -> list[list[Page]]:
    """Six lists, of which one is empty, and one has one token."""
    return [mixed(length) for length in (2500, 70, 40, 0, 1, 300)]


def test_small() -> None:
    """For the sanitizers: blocks of 16, 32 and 64 queries."""
    for head_dim in 64, 128:
        lists = [mixed(150), [], uniform(4, 4, 330), [(16, 16, 1)]]
        cache = Cache((head_dim, head_dim, 1, FLOAT16, FP16), lists, batch=2)
        for q in 3, 6, 13:
            cache.check(queries_of(q, 2, 8, q, head_dim), with_mass=False, division=cache.divide())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("zero_point, half, scale_dtype", LAYOUTS)
def test_every_class(head_dim: int, zero_point: int, half: int, scale_dtype: int) -> None:
    """A sequence for each of the 25 classes: a list of full pages and a shorter one, a list of one token."""
    lists = []
    for k_bits, v_bits in CLASSES:
        room = _C.page_tokens(k_bits, v_bits)
        lists += [[(k_bits, v_bits, room)] * 9 + [(k_bits, v_bits, room - 5)], [(k_bits, v_bits, 1)]]
    cache = Cache((head_dim, head_dim, zero_point, half, scale_dtype), lists, batch=25, rotation=zero_point)
    for group, q in ((4, 3), (4, 7), (4, 16)):
        queries = queries_of(group, 25, 2 * group, q, head_dim)
        out = cache.check(queries, with_mass=False)
        if q == 7:
            cpu = cache.to("cpu").attend(queries.cpu())
            assert_near(out.cpu(), cpu.double(), float(cache.values.abs().max()))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group, q", SHAPES)
def test_every_number_of_queries(head_dim: int, group: int, q: int) -> None:
    """Causal, over lists longer and shorter than the new tokens, with pages of all classes and every fill."""
    for half, dtype in ((FLOAT16, torch.float32), (BFLOAT16, torch.bfloat16), (FLOAT16, torch.float16)):
        cache = Cache((head_dim, head_dim, 1, half, FP16), ragged(), batch=3, seed=q)
        out = torch.empty(3, 2 * group, q, head_dim, device="cuda")
        cache.check(queries_of(q, 3, 2 * group, q, head_dim, dtype=dtype), with_mass=False, out=out)
        cache.check(queries_of(q, 3, 2 * group, q, head_dim, dtype=dtype), with_mass=False)


@pytest.mark.parametrize("columns", [*range(8, 18), 31, 32, 33, 63, 64, 65, 96, 97, 128, 129])
def test_columns(columns: int) -> None:
    """As query heads of one token, and as tokens of one head."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), ragged(), batch=3)
    cache.check(queries_of(columns, 3, 2 * columns, 1, 128), with_mass=False, division=cache.divide())
    cache.check(queries_of(columns, 3, 2, columns, 128), with_mass=False)


@pytest.mark.parametrize("bits", BITS)
def test_one_class_alone(bits: int) -> None:
    """Lists long enough that every block has work of the one class only."""
    for v_bits in BITS:
        lists = [uniform(bits, v_bits, tokens) for tokens in (5000, 8192, 640, 63)]
        for head_dim in 64, 128, 256:
            cache = Cache((head_dim, head_dim, 1, FLOAT16, FP16), lists, batch=2)
            for q in 4, 8, 16:
                cache.check(queries_of(q, 2, 8, q, head_dim), with_mass=False)


@pytest.mark.parametrize("new", [[0, 9], [9, 0], [1, 8], [9, 9], [2, 3]])
def test_left_padded_new_tokens(new: list[int]) -> None:
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(length) for length in (150, 5, 700, 30)], batch=2)
    queries = queries_of(1, 2, 4, 9, 64)
    cache.check(queries, new=new, with_mass=False)
    for i, count in enumerate(new):
        queries[i, :, : 9 - count] = torch.nan  # padding does not matter
    again = cache.attend(queries, new=new)
    for i, count in enumerate(new):
        assert bool((again[i, :, : 9 - count] == 0).all()), "padding gives zeros"
    queries.nan_to_num_()
    assert_near(again, cache.exact(queries, new=new)[0], float(cache.values.abs().max()))


@pytest.mark.parametrize("spot", [0, 63, 64, 400, 499])
@pytest.mark.parametrize("q", [3, 7, 16])
def test_one_huge_logit(spot: int, q: int) -> None:
    """A logit of thousands above the others takes everything, wherever it lies; one of thousands below, nothing."""
    rows = spots(slice(spot, spot + 1), 100.0)
    for pages in (uniform(4, 4, 448) + uniform(16, 16, 52), uniform(2, 8, 500), uniform(16, 3, 500)):
        cache = Cache((64, 64, 1, FLOAT16, FP16), [pages], rows=rows)
        for sign in (1.0, -1.0):
            cache.check(torch.full((1, 4, q, 64), sign, device="cuda"), scale=1.0, with_mass=False)
        cache.check(torch.ones(1, 4, q, 64, device="cuda"), scale=1.0, softcap=50.0, with_mass=False)


@pytest.mark.parametrize("size", [1e6, 3e7, 4e8, 1e9, 1e12, 1e30, 1e37])
@pytest.mark.parametrize("q", [3, 7, 16])
def test_huge_logits(size: float, q: int) -> None:
    """float has no step of 1 at such logits: still, one that is above the others takes everything, one below them
    nothing, and among equal ones weights are shares."""
    for spot in (0, 70, 400):
        for pages in (uniform(4, 4, 448) + uniform(16, 16, 52), uniform(2, 8, 500), uniform(16, 3, 500)):
            cache = Cache((64, 64, 1, FLOAT16, FP16), [pages], rows=spots(slice(spot, spot + 1), 100.0))
            for sign in (1.0, -1.0):
                queries = torch.full((1, 4, q, 64), sign * size / 6400, device="cuda")
                cache.check(queries, scale=1.0, with_mass=False)
    check_many_huge_logits(size, q)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("gap", [30.0, 65.0, 78.0, 80.0, 88.0, 150.0, 1e4])
def test_zero_scales_of_values(value: float, gap: float) -> None:
    """Rows of V that are one number have a scale of 0, which bounds no weight: neither is it infinite, nor lost. Lists
    of which a warpgroup has one page, and so many that it has several."""
    for where in (slice(1200, 1201), slice(1216, None, 2)):
        for bits in (4, 2, 8):
            cache = many_lists(uniform(bits, bits, 1500), spots(where, 1.0, value), rotation=0)
            for q in (4, 8, 16):
                queries = torch.full((264, 4, q, 64), gap / 64, device="cuda")
                cache.check(queries, scale=1.0, with_mass=False)
    for where in (slice(0, 1), slice(70, 71), slice(400, 401), slice(1, None, 2), slice(192, 256), slice(None)):
        for pages in (uniform(4, 4, 500), uniform(2, 2, 500), uniform(8, 3, 500) + uniform(16, 16, 40)):
            cache = Cache((64, 64, 1, FLOAT16, FP16), [pages], rows=spots(where, 1.0, value), rotation=0)
            for q in (4, 16):
                queries = torch.full((1, 4, q, 64), gap / 64, device="cuda")
                queries[:, 1::2] *= -1
                cache.check(queries, scale=1.0, with_mass=False)


@pytest.mark.parametrize("step", [0.01, 0.1, 1.0, 3.0])
def test_rising_and_falling_logits(step: float) -> None:
    """The weights' unit moves on every page, by little and by much, of some queries and not of others."""
    for sign in (1, -1):

        def rows(
            shape: tuple[int, ...], generator: torch.Generator, sign: int = sign
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys = torch.zeros(shape, device=generator.device)
            keys[..., 0] = sign * step * torch.arange(shape[2], device=generator.device)
            return keys, torch.randn(shape, generator=generator, device=generator.device)

        for q in 7, 16:
            queries = torch.zeros(1, 4, q, 64, device="cuda")
            queries[..., 0] = torch.linspace(-1, 1, q, device="cuda")
            for pages in (uniform(16, 16, 640), uniform(16, 4, 2560), uniform(8, 2, 2560)):
                cache = Cache((64, 64, 1, BFLOAT16, FP16), [pages], rotation=0, rows=rows)
                cache.check(queries, scale=1.0, with_mass=False)


def test_scales_and_softcap() -> None:
    cache = Cache((64, 64, 1, FLOAT16, FP16), [mixed(900), mixed(50)])
    for q in 3, 8, 16:
        queries = queries_of(15, 1, 8, q, 64)
        for scale in (1e-30, 1e-3, 0.125, 0.5):
            for softcap in (0.0, 1e-3, 50.0, 1e30):
                cache.check(queries, scale=scale, softcap=softcap, with_mass=False)


def test_queries_of_different_size() -> None:
    """Each query has its own range: a small one beside a large one keeps its digits."""

    def rows(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(2))
        return 1e4 * keys, values

    cache = Cache((128, 128, 1, FLOAT16, FP16), [mixed(1500), mixed(300)], rows=rows)
    for q in 3, 8, 16:
        queries = queries_of(20, 1, 8, q, 128)
        queries *= torch.tensor([1.0, 2.0**-8, 2.0**-16, 2.0**-24], device="cuda").repeat(2).view(1, 8, 1, 1)
        cache.check(queries, scale=128**-0.5 * 1e-4, with_mass=False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["ones", "one row", "one row and noise", "noise"])
def test_128k_uniform_tokens(bits: int, kind: str) -> None:
    """Long sums of equal shares do not drift: tensor cores truncate, so they are emptied in time."""

    def rows(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (torch.randn(shape, generator=generator, device=generator.device) for _ in range(2))
        pattern = torch.randn(shape[-1], generator=generator, device=generator.device)
        if kind == "ones":
            values[:] = 1
        elif kind != "noise":
            values = pattern.expand(shape).contiguous() + (values if kind == "one row and noise" else 0)
        return keys, values

    lists = [uniform(bits, bits, LONG), uniform(bits, bits, LONG - 64 * 300)]
    cache = Cache((128, 128, 1, FLOAT16, FP16), lists, rows=rows)
    for q in 3, 8, 16:
        cache.check(torch.zeros(1, 8, q, 128, device="cuda"), with_mass=False)
        cache.check(queries_of(21, 1, 8, q, 128), with_mass=False)
    # Many lists at once: a block then holds more tokens of one list than where it has all multiprocessors.
    many = Cache((64, 64, 1, FLOAT16, FP16), [uniform(bits, bits, 1 << 13)] * 256, batch=32, rows=rows)
    many.check(torch.zeros(32, 8, 8, 64, device="cuda"), with_mass=False)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("octaves", [12, 25, 43])
def test_a_sink_among_128k_tokens(bits: int, octaves: int) -> None:
    d = 64
    half = 0.5 * octaves * 0.6931471805599453 / d

    def rows(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.full(shape, -half, device=generator.device)
        values = torch.randn(d, generator=generator, device=generator.device).sign().expand(shape).contiguous()
        keys[:, :, 0] = half
        values[:, :, 0] *= -1
        return keys, values

    pages = [(16, 16, 1), *uniform(bits, bits, LONG - 64), *uniform(16, 16, 48)]
    cache = Cache((d, d, 1, FLOAT16, FP16), [pages], rotation=0, rows=rows)
    for q in 4, 16:
        cache.check(torch.ones(1, 4, q, d, device="cuda"), scale=1.0, with_mass=False)


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", list(HALF_UNIT))
def test_queries_that_are_no_numbers(kind: str, dtype: torch.dtype) -> None:
    """They give NaN for their own query and harm no other."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), [mixed(5000), mixed(300), mixed(64), []], batch=2)
    for q in 3, 8, 16:
        queries = queries_of(22, 2, 8, q, 128, dtype=dtype)
        out = torch.empty(2, 8, q, 128, device="cuda")
        clean = cache.check(queries, out=out, with_mass=False).clone()
        where = (0, 1, q - 1)
        queries[(*where, 77)] = float(kind)
        cache.attend(queries, out=out)
        assert bool(out[where].isnan().all())
        out[where] = clean[where]
        assert_near(out, clean.double(), float(cache.values.abs().max()))


def test_many_blocks_share_a_list() -> None:
    """One long list crosses most blocks; the workspace is left as it was, and every run gives the same bits."""
    lists = [mixed(60_000, 1), *[mixed(100 * i, i) for i in range(15)]]
    for head_dim in HEAD_DIMS:
        cache = Cache((head_dim, head_dim, 1, FLOAT16, FP16), lists, batch=2, seed=head_dim)
        division = cache.divide()
        for q in 3, 8, 16, 20:
            queries = queries_of(q, 2, 32, q, head_dim)
            workspace = cache.workspace(4, q)
            first = cache.check(queries, with_mass=False, workspace=workspace, division=division)
            assert bool((workspace == 0xFF).all())
            for i in range(20):
                again = cache.attend(queries, workspace=workspace, division=(division, None)[i % 2])
                assert same_bits(first, again), i
            assert bool((workspace == 0xFF).all())


@pytest.mark.parametrize("group", [9, 12, 16, 32])
def test_decode_steps_overlap(group: int) -> None:
    """One token of many heads a step: early=1 gives the bits of early=0, with launches close behind each other."""
    steps, lists = 60, [mixed(1000), [], mixed(17), uniform(2, 4, 640) + uniform(16, 16, 40)]
    early, late = (Cache((128, 128, 1, FLOAT16, FP16), lists, batch=2, room=steps + 64) for _ in range(2))
    queries = queries_of(1, steps, 2, 2 * group, 1, 128, dtype=torch.bfloat16)
    keys, values = (queries_of(2 + i, steps, 2, 2, 1, 128, dtype=torch.bfloat16) for i in range(2))
    workspace = early.workspace(group, 1)

    def run(cache: Cache, **options: Any) -> torch.Tensor:
        out = []
        for i in range(steps):
            if i % 16 == 0:
                division = cache.divide()
            cache.append(keys[i], values[i])
            if not options:
                torch.cuda.synchronize()
            out.append(cache.attend(queries[i], division=division, **options))
        return torch.stack(out)

    wanted = run(late)
    torch.cuda._sleep(20_000_000)  # all launches wait here, so that nothing but order keeps them apart
    assert same_bits(run(early, workspace=workspace, early=1), wanted)
    late.unpack()
    late.check(queries[-1], with_mass=False, out=torch.empty(2, 2 * group, 1, 128, device="cuda"))


def test_a_busy_device() -> None:
    """Blocks that wait for others make progress while another stream's kernels take most of the multiprocessors."""
    cache = Cache((128, 128, 1, FLOAT16, FP16), [mixed(4000, i) for i in range(64)], batch=8)
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for q in 8, 40:
        queries = queries_of(q, 8, 32, q, 128, dtype=torch.bfloat16)
        wanted, workspace = cache.attend(queries), cache.workspace(4, q)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            for _ in range(50):
                a @ a
        got = [cache.attend(queries, workspace=workspace) for _ in range(20)]
        torch.cuda.synchronize()
        assert all(same_bits(out, wanted) for out in got)
