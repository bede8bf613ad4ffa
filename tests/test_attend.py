"""attend against float64 attention over the unpacked values (csrc/kvcomp/attend.h)."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
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
    E5M3,
    FLOAT16,
    FP16,
    GROUPS,
    HEAD_DIMS,
    PAGE,
    Array,
    Layout,
    Options,
    Pages,
    aligned,
    attention,
    error_bound,
    page_tokens,
)

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Cache:
    """Lists of pages of given classes and fill, random rows in them, and the values they unpack to."""

    def __init__(
        self,
        layout: Layout,
        lists: list[list[tuple[int, int, int]]],
        *,
        batch: int,
        seed: int = 0,
        rotation: int = 1,
        rows: Any = None,
    ) -> None:
        """lists: (k_bits, v_bits, tokens) of every page. rows(shape) -> (keys, values); default: normal."""
        random = np.random.default_rng(seed)
        n, d = len(lists), layout.head_dim
        self.layout, self.batch, self.rotation = layout, batch, rotation
        self.tokens = [sum(page[2] for page in pages) for pages in lists]
        shape = (n, 1, max([1, *self.tokens]), d)
        keys, values = rows(shape) if rows else (random.standard_normal(shape), random.standard_normal(shape))
        wanted = []
        for i, pages in enumerate(lists):
            used = 0
            for k_bits, v_bits, count in pages:
                wanted.append((i, k_bits, v_bits, range(used, used + count)))
                used += count
        pages = Pages(layout, wanted)
        _C.pack(
            pages.arena, keys.astype(np.float32), values.astype(np.float32), *pages.index, layout, *Options(rotation)
        )
        back = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        _C.unpack(*back, pages.arena, *pages.index, layout, rotation)
        self.keys = [k[0, :count] for k, count in zip(back[0], self.tokens, strict=True)]
        self.values = [v[0, :count] for v, count in zip(back[1], self.tokens, strict=True)]
        self.arena = pages.arena
        self.table = np.zeros((n, max([0, *map(len, lists)])), np.uint64)
        self.lists = np.zeros((n, 4), np.int32)
        for i in range(n):
            mine = pages.entries[pages.lists == i]
            self.table[i, : len(mine)] = mine.view(np.uint64)
            self.lists[i] = len(mine), len(mine), 0, self.tokens[i]

    def arguments(
        self,
        queries: Any,
        *,
        scale: float = 0.1,
        softcap: float = 0.0,
        new: Any = None,
        mass: Any = None,
        out: Any = None,
        threads: int = 0,
    ) -> list[Any]:
        if out is None:
            out = np.full(queries.shape, 77, queries.dtype)
        group = queries.shape[1] * self.batch // max(len(self.lists), 1)
        pages = int(self.lists[:, 0].max(initial=0))
        workspace = aligned(_C.attend_workspace(len(self.lists), pages, group, queries.shape[2], self.layout.head_dim))
        return [
            out,
            mass,
            queries,
            self.arena,
            self.table,
            self.lists,
            None if new is None else np.array(new, np.int32),
            workspace,
            self.layout,
            self.rotation,
            scale,
            softcap,
            threads,
        ]

    def attend(self, queries: Any, **options: Any) -> Any:
        arguments = self.arguments(queries, **options)
        _C.attend(*arguments, None, 0)
        return arguments[0]

    def check(self, queries: Array, *, length: float = 0.0, **options: Any) -> Array:
        """Output and mass within the contract's bound; returns the output. length: scale * |q| |k|."""
        mass = np.full((len(self.lists), max([1, *self.tokens]) + 3), 77, np.float32)
        out = self.attend(queries, mass=mass, **options)
        expected, masses = attention(
            queries.astype(np.float64),
            self.keys,
            self.values,
            scale=options.get("scale", 0.1),
            softcap=options.get("softcap", 0.0),
            new_tokens=options.get("new"),
        )
        bound = error_bound(self.values, max(self.tokens, default=0), length)
        if out.dtype != np.float32:
            bound = bound + 0.5 * np.abs(np.spacing(np.abs(expected).astype(out.dtype)).astype(np.float64))
        assert (np.abs(out.astype(np.float64) - expected) <= bound).all(), np.abs(out - expected).max()
        for row, exact in zip(mass, masses, strict=True):
            assert np.abs(row[: len(exact)] - exact).max(initial=0) <= (1e-5 + 1e-7 * length) * max(
                1, exact.max(initial=0)
            )
            assert (row[len(exact) :] == 0).all()
        return out


def queries_of(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mixed(tokens: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Pages of random classes and fill that hold `tokens` tokens, 16-bit ones last."""
    random, pages, left = np.random.default_rng(seed), [], tokens
    while left > 40:
        k_bits, v_bits = CLASSES[random.integers(len(CLASSES) - 1)]
        pages.append((k_bits, v_bits, min(left, int(random.integers(1, 65)))))
        left -= pages[-1][2]
    while left:
        pages.append((16, 16, min(left, 16)))
        left -= pages[-1][2]
    return pages


# ---- every class, size, shape


@pytest.mark.parametrize("k_bits, v_bits", CLASSES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_class(k_bits: int, v_bits: int, head_dim: int) -> None:
    room = page_tokens(k_bits, v_bits)
    for zero_point, half, scale_dtype in (
        (1, FLOAT16, FP16),
        (0, BFLOAT16, FP16),
        (1, BFLOAT16, E5M3),
        (0, FLOAT16, E5M3),
    ):
        layout = Layout(head_dim, head_dim, zero_point, half, scale_dtype)
        lists = [[(k_bits, v_bits, room)] * 3 + [(k_bits, v_bits, room - 5)], [(k_bits, v_bits, 1)]]
        cache = Cache(layout, lists, batch=1)
        cache.check(queries_of(1, 1, 6, 2, head_dim))


@pytest.mark.parametrize("head_dim, group", GROUPS)
def test_every_group_of_channels(head_dim: int, group: int) -> None:
    for zero_point, scale_dtype in itertools.product((0, 1), (FP16, E5M3)):
        layout = Layout(head_dim, group, zero_point, FLOAT16, scale_dtype)
        cache = Cache(layout, [mixed(300, seed=group)], batch=1, rotation=zero_point)
        cache.check(queries_of(2, 1, 3, 1, head_dim))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 16, 21])
def test_grouped_queries(group: int) -> None:
    """Query heads of a KV head, odd ratios too; two sequences of three KV heads with lists of their own lengths."""
    lists = [mixed(length, seed=length) for length in (100, 3, 0, 257, 64, 1)]
    Cache(Layout(64, 64, 1, FLOAT16), lists, batch=2).check(queries_of(3, 2, 3 * group, 1, 64))


@pytest.mark.parametrize("q", [1, 2, 3, 4, 5, 16, 33, 63, 64, 65, 70])
def test_new_tokens_are_causal(q: int) -> None:
    """Lists longer and shorter than the new tokens; query j sees all but the last q-1-j tokens."""
    lists = [mixed(length, seed=length) for length in (150, 70, 40, 0)]
    cache = Cache(Layout(64, 64, 1, FLOAT16), lists, batch=2)
    out = cache.check(queries_of(4, 2, 4, q, 64))
    if q > 40:
        assert (out[1, :, : q - 40] == 0).all(), "queries that see nothing"


@pytest.mark.parametrize("new", [[0, 5], [5, 0], [1, 4], [5, 5], [2, 3]])
def test_left_padded_new_tokens(new: list[int]) -> None:
    lists = [mixed(length, seed=length) for length in (150, 5, 70, 30)]
    cache = Cache(Layout(64, 64, 1, FLOAT16), lists, batch=2)
    queries = queries_of(5, 2, 4, 5, 64)
    out = cache.check(queries, new=new)
    for i, count in enumerate(new):
        assert (out[i, :, : 5 - count] == 0).all()
        queries[i, :, : 5 - count] = np.nan  # padding does not matter
    assert np.array_equal(cache.attend(queries, new=new), out)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_lists(data: st.DataObject) -> None:
    head_dim, channels = data.draw(st.sampled_from(GROUPS))
    layout = Layout(
        head_dim,
        channels,
        data.draw(st.integers(0, 1)),
        data.draw(st.sampled_from([FLOAT16, BFLOAT16])),
        data.draw(st.sampled_from([FP16, E5M3])),
    )
    b, h, group = (data.draw(st.integers(1, most)) for most in (3, 2, 5))
    seed = data.draw(st.integers(0, 2**32))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 15, 16, 17, 64, 65, 130, 400]), min_size=b * h, max_size=b * h))
    cache = Cache(
        layout,
        [mixed(length, seed + i) for i, length in enumerate(lengths)],
        batch=b,
        seed=seed,
        rotation=data.draw(st.integers(0, 1)),
    )
    q = data.draw(st.integers(0, 9))
    cache.check(
        queries_of(seed, b, h * group, q, head_dim),
        scale=data.draw(st.sampled_from([0.02, 0.125, 0.5])),
        softcap=data.draw(st.sampled_from([0.0, 1.0, 30.0])),
        new=data.draw(st.none() | st.lists(st.integers(0, q), min_size=b, max_size=b)),
        threads=data.draw(st.integers(0, 3)),
    )


def test_tail_pages_among_others() -> None:
    """Runs of 16-bit pages, full and not, between packed ones and across the cut into chunks of 64 pages."""
    lists = [
        [(16, 16, 16)] * 67
        + [(16, 16, 3), (4, 4, 64), (16, 16, 16), (16, 16, 9), (16, 16, 16), (16, 16, 16), (2, 3, 7)],
        [(2, 2, 64)] * 62 + [(16, 16, 16)] * 5 + [(16, 16, 1), (16, 16, 0), (16, 16, 4)],
        [(16, 16, 0), (4, 4, 0), (16, 16, 2)],
    ]
    cache = Cache(Layout(80, 16, 1, FLOAT16), lists, batch=1)
    cache.check(queries_of(6, 1, 3, 5, 80))
    cache.check(queries_of(7, 1, 6, 70, 80))


# ---- numbers


@pytest.mark.parametrize("name", FLOATS)
def test_types_of_queries_and_output(name: str) -> None:
    cache = Cache(Layout(96, 96, 1, FLOAT16), [mixed(500)], batch=1)
    queries = queries_of(8, 1, 4, 1, 96).astype(FLOATS[name])
    out = cache.check(queries)
    wide = np.zeros(queries.shape, np.float32)
    cache.attend(queries, out=wide)
    assert np.array_equal(wide.astype(FLOATS[name]), out)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.from_numpy(queries.astype(np.float32)).to(getattr(torch, name))
    result = cache.attend(tensor, out=torch.empty_like(tensor))
    assert np.array_equal(result.float().numpy(), out.astype(np.float32))


def test_strided_queries_and_output() -> None:
    cache = Cache(Layout(64, 64, 1, FLOAT16), [mixed(99), mixed(40)], batch=1)
    queries = queries_of(9, 1, 3, 4, 80)[..., 9:73].transpose(0, 2, 1, 3)
    memory = np.full((1, 3, 4, 80), 77, np.float32)
    out = memory[..., :64].transpose(0, 2, 1, 3)
    cache.attend(queries, out=out)
    assert np.array_equal(out, cache.attend(np.ascontiguousarray(queries))) and (memory[..., 64:] == 77).all()
    shared = np.broadcast_to(queries[:, :1], queries.shape)
    assert np.array_equal(cache.attend(shared), cache.attend(np.ascontiguousarray(shared)))


def test_one_token_is_its_value() -> None:
    cache = Cache(Layout(64, 64, 1, FLOAT16), [[(16, 16, 1)]], batch=1, rotation=0)
    out = cache.attend(queries_of(10, 1, 1, 1, 64) * 1e6, scale=1e6)
    assert np.array_equal(out[0, 0, 0], cache.values[0][0])


def test_all_logits_equal_is_the_mean() -> None:
    rows = np.random.default_rng(11)
    cache = Cache(
        Layout(64, 64, 1, FLOAT16),
        [mixed(1000)],
        batch=1,
        rows=lambda shape: (np.ones(shape), rows.standard_normal(shape)),
    )
    out = cache.check(np.zeros((1, 1, 1, 64), np.float32))
    mean = cache.values[0].astype(np.float64).mean(0)
    assert np.abs(out[0, 0, 0] - mean).max() <= error_bound(cache.values, 1000)


def test_one_huge_logit() -> None:
    """A logit of thousands above the others takes everything, wherever it lies."""
    for spot in (0, 63, 64, 499):

        def rows(shape: tuple[int, ...], spot: int = spot) -> tuple[Array, Array]:
            keys = np.zeros(shape)
            keys[..., spot, :] = 100
            return keys, np.random.default_rng(12).standard_normal(shape)

        cache = Cache(
            Layout(64, 64, 1, FLOAT16), [[(4, 4, 64)] * 7 + [(16, 16, 16)] * 3 + [(16, 16, 4)]], batch=1, rows=rows
        )
        for sign in (1, -1):
            out = cache.check(np.full((1, 1, 1, 64), sign, np.float32), scale=1.0)
            if sign == 1:
                assert np.abs(out[0, 0, 0] - cache.values[0][spot]).max() < 1e-6
        cache.check(np.full((1, 1, 1, 64), 1, np.float32), scale=1.0, softcap=50.0)


def test_rising_and_falling_logits() -> None:
    """The softmax's reference moves on every page, by little and by much; nothing overflows."""
    for step in (0.01, 0.1, 1.0, 3.0):
        for direction in (1, -1):

            def rows(shape: tuple[int, ...], step: float = step * direction) -> tuple[Array, Array]:
                keys = np.zeros(shape)
                keys[..., 0] = step * np.arange(shape[2])
                return keys, np.random.default_rng(13).standard_normal(shape)

            cache = Cache(Layout(64, 64, 1, BFLOAT16), [[(16, 16, 16)] * 40], batch=1, rotation=0, rows=rows)
            queries = np.zeros((1, 1, 1, 64), np.float32)
            queries[..., 0] = 1
            cache.check(queries, scale=1.0)


def test_scales_and_softcap() -> None:
    cache = Cache(Layout(64, 64, 1, FLOAT16), [mixed(300), mixed(50)], batch=1)
    queries = queries_of(14, 1, 2, 3, 64)
    for scale in (1e-30, 1e-3, 0.125, 1.0):
        for softcap in (0.0, 1e-3, 1.0, 50.0, 1e30):
            cache.check(queries, scale=scale, softcap=softcap)


@pytest.mark.parametrize("offset", [3, 30, 100])
@pytest.mark.parametrize("rotation", [0, 1])
def test_large_logits(offset: float, rotation: int) -> None:
    """Keys with a large mean, logits of thousands close together: the bound grows with scale * |q| |k|, no faster."""

    def rows(shape: tuple[int, ...]) -> tuple[Array, Array]:
        random = np.random.default_rng(21)
        return 0.3 * random.standard_normal(shape) + offset, random.standard_normal(shape)

    queries = queries_of(22, 1, 4, 1, 128)
    for bits in ((4, 4), (8, 8), (16, 2)):
        cache = Cache(Layout(128, 128, 1, BFLOAT16), [[(*bits, 64)] * 8], batch=1, rotation=rotation, rows=rows)
        length = 4 * np.linalg.norm(queries, axis=3).max() * np.linalg.norm(cache.keys[0], axis=1).max()
        assert length > 100 * offset
        cache.check(queries, scale=4.0, length=float(length))


def long_cache(keys: float, sink: bool) -> Cache:
    """128k tokens of one value each, or zero values and one sink that nearly takes all."""
    tokens = 1 << 17

    def rows(shape: tuple[int, ...]) -> tuple[Array, Array]:
        k, v = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        k[:] = keys / shape[3]
        if sink:
            k[:, :, 0] = -keys / shape[3]
            v[:, :, 0] = -1
        return k, v

    return Cache(
        Layout(64, 64, 1, FLOAT16),
        [[(16, 16, 16)] + [(4, 4, 64)] * ((tokens - 16) // 64) + [(16, 16, 16)] * 3],
        batch=1,
        rotation=0,
        rows=rows,
    )


def test_128k_uniform_tokens() -> None:
    """A long sum of equal shares does not drift: 128k tokens of value 1 give 1."""
    cache = long_cache(0.0, sink=False)
    mass = np.zeros((1, cache.tokens[0]), np.float32)
    out = cache.attend(np.ones((1, 2, 1, 64), np.float32), mass=mass)
    assert np.abs(out - 1).max() <= error_bound(cache.values, cache.tokens[0])
    assert np.abs(mass * cache.tokens[0] / 2 - 1).max() < 1e-5


@pytest.mark.parametrize("logit", [8.0, 17.3, 30.0])
def test_a_sink_among_128k_tokens(logit: float) -> None:
    """Shares of 2^-25 beside a sink's add up: nothing underflows on its way into the sum."""
    cache = long_cache(-logit / 2, sink=True)
    out = cache.check(np.ones((1, 1, 1, 64), np.float32), scale=1.0)
    rest = (cache.tokens[0] - 1) * np.exp(-logit)
    assert np.abs(out - (rest - 1) / (rest + 1)).max() < 0.01
    if logit < 20:
        assert (out > -0.999).all()


def test_mass_sums_to_the_queries_that_see_something() -> None:
    lists = [mixed(length, seed=length) for length in (700, 3, 0, 64)]
    cache = Cache(Layout(128, 128, 1, FLOAT16), lists, batch=2)
    mass = np.full((4, 700), 77, np.float32)
    cache.attend(queries_of(15, 2, 6, 9, 128), mass=mass, new=[9, 4])
    assert np.allclose(mass.sum(1), [27, 9, 0, 12], rtol=1e-5)
    assert (mass >= 0).all()


def test_mass_does_not_change_the_output() -> None:
    cache = Cache(Layout(64, 64, 1, FLOAT16), [mixed(5000)], batch=1)
    queries = queries_of(16, 1, 4, 3, 64)
    mass = np.zeros((1, 5000), np.float32)
    assert np.array_equal(cache.attend(queries), cache.attend(queries, mass=mass))


def test_no_queries() -> None:
    cache = Cache(Layout(64, 64, 1, FLOAT16), [mixed(70), []], batch=1)
    mass = np.full((2, 70), 77, np.float32)
    assert cache.attend(np.zeros((1, 4, 0, 64), np.float32), mass=mass).shape == (1, 4, 0, 64)
    assert (mass == 0).all()
    empty = Cache(Layout(64, 64, 1, FLOAT16), [], batch=0)
    assert empty.attend(np.zeros((0, 4, 1, 64), np.float32)).size == 0


# ---- same bits


def test_threads_do_not_change_a_bit() -> None:
    """Several chunks and blocks, so that there is work to share out."""
    lists = [[(4, 2, 64)] * 150 + [(16, 16, 16)] * 3, mixed(3000), []]
    cache = Cache(Layout(128, 64, 1, FLOAT16), lists, batch=1)
    queries, results = queries_of(17, 1, 12, 7, 128), []
    for threads in (1, 2, 3, 7, 64, 0):
        mass = np.zeros((3, max(cache.tokens)), np.float32)
        results.append((cache.attend(queries, mass=mass, threads=threads).tobytes(), mass.tobytes()))
    assert len(set(results)) == 1


# Every instruction set on the same cache, in a process of its own.
PROGRAM = """
import json, sys
sys.path[:] = {path!r}
import numpy as np
from kvcomp import _C
from reference import Layout, error_bound, attention
from test_attend import Cache, mixed, queries_of
every = [(b, c, 50) for b in (2, 3, 4, 8, 16) for c in (2, 3, 4, 8)]
lists = [mixed(900, 1), every + [(16, 16, 16)] * 5 + [(16, 16, 2)]]
worst, results = 0.0, []
for layout in ((64, 64, 1, 1, 0), (80, 16, 0, 2, 0), (256, 128, 1, 2, 0), (64, 32, 1, 1, 1), (80, 80, 0, 2, 1)):
    cache = Cache(Layout(*layout), lists, batch=1)
    queries = queries_of(1, 1, 10, 3, layout[0])
    out = cache.attend(queries, softcap=20.0)
    exact = attention(queries, cache.keys, cache.values, scale=0.1, softcap=20.0)[0]
    worst = max(worst, float(np.abs(out - exact).max()) / error_bound(cache.values, max(cache.tokens)))
    results.append(out.tobytes().hex())
print(json.dumps([_C.simd(), worst, results]))
"""


def in_a_process(code: str, **environment: str) -> Any:
    """What the code prints, as JSON; the code runs on the same kvcomp as this process."""
    site = ["-S"] if sys.flags.no_site else []
    result = subprocess.run(
        [sys.executable, *site, "-c", code.format(path=sys.path)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_instruction_sets() -> None:
    """base, avx2 and avx512, where there are: each within the bound."""
    names = []
    for limit in ("base", "avx2", "avx512"):
        name, worst, results = in_a_process(PROGRAM, KVCOMP_SIMD=limit, KVCOMP_NUM_THREADS="1")
        assert worst <= 1
        assert results == in_a_process(PROGRAM, KVCOMP_SIMD=limit, KVCOMP_NUM_THREADS="3")[2]
        names.append(name)
    assert names[0] == "base" and set(names) <= {"base", "avx2", "avx512"}
    assert names[2] == _C.simd() or "KVCOMP_SIMD" in os.environ


# ---- refusals


def change(cache: Cache, what: str) -> list[Any]:
    arguments = cache.arguments(queries_of(18, 1, 2, 3, 64), mass=np.full((2, 200), 77, np.float32))
    entry = cache.table[1].view(PAGE)
    queries = arguments[2]
    if what == "workspace":
        arguments[7] = arguments[7][:-1]
    elif what == "workspace alignment":
        arguments[7] = aligned(len(arguments[7]) + 64)[4:]
    elif what == "workspace type":
        arguments[7] = np.zeros(len(arguments[7]), np.int64)
    elif what == "page beyond the arena":
        entry["unit"][0] = 2**32 - 1
    elif what == "bits of a page":
        entry["v_bits"][0] = 6
    elif what == "tokens of a page":
        entry["tokens"][0] = 65
    elif what == "tokens of a list":
        cache.lists[1, 3] += 1
    elif what == "pages of a list":
        cache.lists[1, 0] = 2**31 - 1
    elif what == "negative pages":
        cache.lists[1, 0] = -1
    elif what == "lists":
        arguments[5] = cache.lists[:1]
    elif what == "new tokens":
        arguments[6] = np.array([4], np.int32)
    elif what == "negative new tokens":
        arguments[6] = np.array([-1], np.int32)
    elif what == "shape of new tokens":
        arguments[6] = np.array([1, 1], np.int32)
    elif what == "heads":
        arguments[2] = arguments[0] = queries_of(0, 1, 3, 3, 64)
        arguments[0] = np.zeros_like(arguments[2])
    elif what == "batch":
        arguments[2] = queries_of(0, 3, 2, 3, 64)
        arguments[0] = np.zeros_like(arguments[2])
    elif what == "channels":
        arguments[2] = queries_of(0, 1, 2, 3, 128)[..., ::2]
    elif what == "head_dim":
        arguments[2] = queries_of(0, 1, 2, 3, 96)
    elif what == "shape of out":
        arguments[0] = np.zeros((1, 2, 4, 64), np.float32)
    elif what == "type of out":
        arguments[0] = np.zeros((1, 2, 3, 64), np.float64)
    elif what == "out is queries":
        arguments[0] = queries
    elif what == "short mass":
        arguments[1] = np.zeros((2, 149), np.float32)
    elif what == "type of mass":
        arguments[1] = np.zeros((2, 200), np.float64)
    elif what == "strided mass":
        arguments[1] = np.zeros((2, 400), np.float32)[:, ::2]
    elif what == "rows of mass":
        arguments[1] = np.zeros((3, 200), np.float32)
    elif what == "scale":
        arguments[10] = 0.0
    elif what == "scale is not a number":
        arguments[10] = float("nan")
    elif what == "text for a scale":
        arguments[10] = "0.1"
    elif what == "softcap":
        arguments[11] = -1.0
    elif what == "threads":
        arguments[12] = 65
    elif what == "arena":
        arguments[3] = arguments[3].view(np.int8)
    return arguments


PAGE_ERROR = r"table: expected a valid page, got K {}, V {} bits, {} tokens at unit {} in list 1"
HEADS = r"queries: expected the 2 lists to divide \(b, hq, q, d\) with hq a multiple of the KV heads, got "
REFUSED = {
    "workspace": r"workspace: expected (\d+) bytes, got \d+",
    "workspace alignment": "workspace: expected 64-byte alignment",
    "workspace type": "workspace: expected uint8, got int64",
    "page beyond the arena": PAGE_ERROR.format(4, 4, 64, 4294967295),
    "bits of a page": PAGE_ERROR.format(4, 6, 64, r"\d+"),
    "tokens of a page": PAGE_ERROR.format(4, 4, 65, r"\d+"),
    "tokens of a list": "lists: expected 80 tokens as in the pages, got 81 in list 1",
    "pages of a list": r"lists: expected 0\.\.3 pages, got 2147483647 in list 1",
    "negative pages": r"lists: expected 0\.\.3 pages, got -1 in list 1",
    "lists": r"lists: expected shape \(2, 4\), got \(1, 4\)",
    "new tokens": r"new_tokens: expected 0\.\.3, got 4",
    "negative new tokens": r"new_tokens: expected 0\.\.3, got -1",
    "shape of new tokens": r"new_tokens: expected shape \(1,\), got \(2,\)",
    "heads": HEADS + r"\(1, 3, 3, 64\)",
    "batch": HEADS + r"\(3, 2, 3, 64\)",
    "channels": r"queries: expected contiguous channels \(last stride 1\), got last stride 2",
    "head_dim": r"queries: expected shape \(\*, \*, \*, 64\), got \(1, 2, 3, 96\)",
    "shape of out": r"out: expected shape \(1, 2, 3, 64\), got \(1, 2, 4, 64\)",
    "type of out": "out: expected float32, float16 or bfloat16, got float64",
    "out is queries": "out: expected memory of its own, got an overlap with queries",
    "short mass": r"mass: expected \(2, 150 or more\), got \(2, 149\)",
    "type of mass": "mass: expected float32, got float64",
    "strided mass": r"mass: expected a contiguous array, got strides over shape \(2, 200\)",
    "rows of mass": r"mass: expected shape \(2, \*\), got \(3, 200\)",
    "scale": r"scale: expected a number in 1e-30\.\.1e\+30, got 0\.0",
    "scale is not a number": r"scale: expected a number in 1e-30\.\.1e\+30, got nan",
    "text for a scale": "scale: expected a number, got str",
    "softcap": r"softcap: expected a number in 0\.\.1e\+30, got -1\.0",
    "threads": r"threads: expected an integer in 0\.\.64, got 65",
    "arena": "arena: expected a plain float or integer array, got int8",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    lists = [[(4, 4, 64), (4, 4, 64), (4, 4, 22)], [(4, 4, 64), (16, 16, 16)]]
    cache = Cache(Layout(64, 64, 1, FLOAT16), lists, batch=1)
    arguments = change(cache, what)
    before = [np.copy(arguments[0]), np.copy(arguments[1])]
    with pytest.raises((ValueError, TypeError), match=rf"^attend: {REFUSED[what]}$"):
        _C.attend(*arguments, None, 0)
    assert np.array_equal(arguments[0], before[0]) and np.array_equal(arguments[1], before[1])


def test_workspace_of_impossible_sizes() -> None:
    assert _C.attend_workspace(1, 1, 1, 1, 64) == 4 * 66 * 4
    assert _C.attend_workspace(2**24, 2**24, 2**24, 2**24, 256) == 2**63 - 1
    with pytest.raises(ValueError, match=r"^attend_workspace: pages: expected an integer in 0\.\.16777216, got -1$"):
        _C.attend_workspace(1, -1, 1, 1, 64)
