"""score, norms and accumulate on CUDA: fp64, and what the CPU says (csrc/kvcomp/score.h)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from kvcomp import _C
from reference_policy import Array, score, score_bound

torch = pytest.importorskip("torch", reason="needs torch for CUDA tensors")
CUDA = _C.cuda_info()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA["available"], reason=CUDA["why"] or ""),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 80, 96, 128, 256)
GUARD = 4096


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def workspace(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Exactly as many bytes as stated, of nonsense (as floats NaN), between guards."""
    b, hq, w, d = queries.shape
    need = _C.score_workspace(b, hq, w, keys.shape[2], d)
    return torch.full((need + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=keys.device)


def run(
    queries: torch.Tensor,
    keys: torch.Tensor,
    first: list[int] | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    reduce: int = 0,
    pool_kind: int = 0,
    pool: int = 1,
) -> torch.Tensor:
    queries, keys = queries.to("cuda"), keys.to("cuda")
    scratch = workspace(queries, keys)
    importance = torch.full(keys.shape[:3], torch.nan, device="cuda")
    begin = None if first is None else torch.tensor(first, dtype=torch.int32, device="cuda")
    _C.score(importance, queries, keys, begin, scratch[GUARD:-GUARD], scale, softcap, reduce, pool_kind, pool)
    assert (scratch[:GUARD] == 0xFF).all() and (scratch[-GUARD:] == 0xFF).all()
    return importance.cpu()


def wide(x: torch.Tensor) -> Array:
    return x.double().cpu().numpy()


def check(
    queries: torch.Tensor, keys: torch.Tensor, first: list[int] | None = None, scale: float = 1.0, **how: Any
) -> None:
    """Within the bound of score.h of fp64; a factor 2, as tensor cores cut off what does not fit a sum."""
    got = run(queries, keys, first, scale, **how).numpy()
    begin = None if first is None else np.array(first, np.int32)
    want = score(wide(queries), wide(keys), begin, scale, **how)
    np.testing.assert_allclose(got, want, rtol=2 * score_bound(wide(queries), wide(keys), scale), atol=1e-36)
    assert abs(got - want).max(initial=0) <= 1e-4 * want.max(initial=0)  # for logits as small as in these tests


def test_small() -> None:
    """For the sanitizers: all three operations."""
    for dtype in DTYPES:
        for d in (80, 128):
            check(
                normal(1, 2, 6, 20, d, dtype=dtype), normal(2, 2, 2, 330, d, dtype=dtype), [0, 7], 0.1, reduce=2, pool=5
            )
            # Rows that stay for the second pass; a sequence of padding alone.
            check(normal(3, 2, 16, 20, d, dtype=dtype), normal(4, 2, 2, 330, d, dtype=dtype), [9, 330], 0.1, pool=3)
    test_norms_of_strided_and_padded_rows()
    test_accumulate(3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_dtypes_and_head_dims(dtype: torch.dtype, d: int) -> None:
    for group in (1, 4, 7, 8):
        queries, keys = normal(d, 2, 2 * group, 21, d, dtype=dtype), normal(d + 1, 2, 2, 333, d, dtype=dtype)
        check(queries, keys, scale=d**-0.5, pool=5)
        check(queries, keys, [3, 320], scale=d**-0.5, reduce=2, pool=3, pool_kind=1)


@pytest.mark.parametrize("seed", range(60))
def test_random(seed: int) -> None:
    draw = random.Random(seed)
    b, h, group = draw.randint(1, 3), draw.randint(1, 3), draw.choice([1, 2, 3, 4, 5, 8])
    s = draw.choice([draw.randint(1, 70), draw.randint(500, 1100)])
    w = draw.choice([1, s, draw.randint(1, min(s, 70)), draw.randint(1, s)])
    d = draw.choice([64, 64, 80, 96, 128, 256])
    first = draw.choice([None, [draw.choice([0, s, draw.randint(0, s)]) for _ in range(b)]])
    check(
        normal(seed, b, h * group, w, d, dtype=draw.choice(DTYPES)),
        normal(seed + 1, b, h, s, d, dtype=draw.choice(DTYPES)),
        first,
        draw.choice([0.0, 0.02, 0.1, -0.1]),
        softcap=draw.choice([0.0, 2.0, 50.0]),
        reduce=draw.randint(0, 2),
        pool_kind=draw.randint(0, 1),
        pool=draw.choice([1, 3, 7, 101, 2**31 - 1]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 321])
def test_sizes_around_tiles(dtype: torch.dtype, s: int) -> None:
    for w in {1, s, max(1, s - 1), (s + 1) // 2}:
        check(normal(s, 1, 3, w, 64, dtype=dtype), normal(s + 1, 1, 1, s, 64, dtype=dtype), scale=0.2, reduce=w % 3)


@pytest.mark.parametrize("shape", [(1, 8, 2, 64, 20000), (1, 2, 1, 3000, 3000), (3, 32, 8, 32, 5000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """Parts of keys and of rows; fp64 on the device."""
    b, hq, h, w, s = shape
    queries, keys = normal(1, b, hq, w, 128, dtype=dtype).cuda(), normal(2, b, h, s, 128, dtype=dtype).cuda()
    for reduce, first in ((0, None), (2, [s // 3] * b)):
        got = run(queries, keys, first, 128**-0.5, reduce=reduce).double()
        begin = first[0] if first else 0
        want = torch.zeros(b, h, s, dtype=torch.float64, device="cuda")
        seen = torch.arange(s, device="cuda")[None] <= torch.arange(s - w, s, device="cuda")[:, None]
        seen &= (torch.arange(s, device="cuda") >= begin)[None]
        real = torch.arange(s - w, s, device="cuda") >= begin
        for i in range(b):
            for j in range(hq):
                logits = queries[i, j].double() @ keys[i, j * h // hq].double().T * 128**-0.5
                rows = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).nan_to_num(0)[real]
                sums = rows.sum(0) / (seen[real].sum(0).clamp(1) if reduce == 2 else 1)
                want[i, j * h // hq] += sums / (hq // h)
        want = want.cpu()
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-36)


def test_strides_and_places() -> None:
    """Transposed, reversed in memory, off by one element: the slow way in and the quick one, and mixed types."""
    for dtype in DTYPES:
        queries, keys = normal(7, 2, 40, 6, 64, dtype=dtype).cuda(), normal(8, 2, 90, 3, 64, dtype=dtype).cuda()
        view = queries.transpose(1, 2)[:, :, -8:], keys.transpose(1, 2)
        want = run(view[0].contiguous(), view[1].contiguous(), [0, 9], 0.1)
        torch.testing.assert_close(run(*view, [0, 9], 0.1), want, rtol=0, atol=0)
        odd = [torch.empty(x.numel() + 1, dtype=dtype, device="cuda")[1:].view(x.shape).copy_(x) for x in view]
        # Other kernels take these, which add up in another order.
        torch.testing.assert_close(run(odd[0], odd[1], [0, 9], 0.1), want, rtol=1e-5, atol=0)
        torch.testing.assert_close(run(view[0], odd[1], [0, 9], 0.1), want, rtol=1e-5, atol=0)
        wider = [torch.zeros(*x.shape[:-1], 67, dtype=dtype, device="cuda")[..., 2:66].copy_(x) for x in view]
        torch.testing.assert_close(run(wider[0], wider[1], [0, 9], 0.1), want, rtol=1e-5, atol=0)
        for other in DTYPES:
            got = run(view[0].float() if other == torch.float32 else view[0], view[1].to(other), [0, 9], 0.1)
            exact = run(view[0].float(), view[1].to(other).float(), [0, 9], 0.1)
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=0)


def test_equal_keys_share_evenly() -> None:
    for s, w in ((20000, 32), (1500, 1500)):
        got = run(normal(0, 1, 2, w, 64, dtype=torch.bfloat16), torch.ones(1, 1, s, 64, dtype=torch.bfloat16))
        seen = np.arange(s - w + 1, s + 1)
        ends = np.cumsum(1.0 / seen[::-1])[::-1]
        want = np.concatenate([np.full(s - w, ends[0]), ends])
        np.testing.assert_allclose(got[0, 0].numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_huge_score(dtype: torch.dtype) -> None:
    """A key that takes everything: all else is below float32's range, and exactly 0 is right for it."""
    queries, keys = torch.ones(1, 1, 4, 64, dtype=dtype), torch.zeros(1, 1, 7000, 64, dtype=dtype)
    for token in (0, 123, 6995):
        spoiled = keys.clone()
        spoiled[0, 0, token] = 6e4
        got = run(queries, spoiled)[0, 0]
        torch.testing.assert_close(got[token].item(), 4.0, rtol=1e-6, atol=0)
        assert torch.count_nonzero(got) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_equal_logits_do_not_overflow(dtype: torch.dtype) -> None:
    for value in (1e3, 2.5e3):  # 6e7, 4e8: as far as score.h goes
        queries, keys = torch.full((1, 1, 2, 64), value, dtype=dtype), torch.full((1, 1, 300, 64), value, dtype=dtype)
        torch.testing.assert_close(run(queries, keys).sum().item(), 2.0, rtol=1e-5, atol=0)
        torch.testing.assert_close(run(-queries, keys).sum().item(), 2.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_growing_and_falling_logits(dtype: torch.dtype) -> None:
    """Every key outdoes the one before it by far: references move again and again; and they never move."""
    s = 400
    keys = torch.zeros(1, 1, s, 64, dtype=dtype)
    for step in (0.25, 40.0):
        keys[0, 0, :, 0] = torch.arange(s) * step
        keys[0, 0, :, 1] = 1.0
        queries = torch.zeros(1, 4, 5, 64, dtype=dtype)
        queries[..., 0] = torch.tensor([1.0, -1.0, 2.0, 0.0])[None, :, None]
        queries[..., 1] = 3.0
        got = run(queries, keys).numpy()
        want = score(wide(queries), wide(keys), None, 1.0)
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-30)


def test_scale_zero_and_softcaps() -> None:
    queries, keys = normal(3, 1, 4, 40, 64, dtype=torch.bfloat16), normal(4, 1, 2, 300, 64, dtype=torch.bfloat16)
    for scale, softcap in ((0.0, 0.0), (0.0, 3.0), (1.0, 0.5), (-1.0, 5.0), (0.1, 1e6), (3.0, 1e-3)):
        check(queries, keys, [7], scale, softcap=softcap, reduce=2)


def test_mass_is_conserved() -> None:
    got = run(normal(1, 2, 6, 24, 64), normal(2, 2, 3, 2000, 64), scale=0.125)
    np.testing.assert_allclose(got.sum(-1).numpy(), 24.0, rtol=1e-5)


def test_padding_is_never_read() -> None:
    first = [5, 0, 30, 31]
    for dtype in DTYPES:
        queries, keys = normal(5, 4, 4, 6, 64, dtype=dtype), normal(6, 4, 2, 31, 64, dtype=dtype)
        for reduce in (0, 1, 2):
            want = run(queries, keys, first, 0.2, reduce=reduce, pool=5)
            spoiled_queries, spoiled_keys = queries.clone(), keys.clone()
            for i, begin in enumerate(first):
                spoiled_keys[i, :, :begin] = torch.nan
                spoiled_queries[i, :, : max(0, 6 - (31 - begin))] = torch.inf
            got = run(spoiled_queries, spoiled_keys, first, 0.2, reduce=reduce, pool=5)
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            assert not want[3].any() and want[2, :, 30].all() and not want[2, :, :30].any()


def test_the_cpu_agrees() -> None:
    for dtype in DTYPES:
        queries, keys = normal(5, 2, 8, 33, 128, dtype=dtype), normal(6, 2, 2, 1000, 128, dtype=dtype)
        how: dict[str, Any] = {"scale": 0.09, "softcap": 30.0, "reduce": 2, "pool_kind": 1, "pool": 7}
        got = run(queries, keys, [0, 77], **how)
        want = torch.empty(2, 2, 1000)
        first = torch.tensor([0, 77], dtype=torch.int32)
        scratch = torch.empty(_C.score_workspace(2, 8, 33, 1000, 128), dtype=torch.uint8)
        _C.score(want, queries, keys, first, scratch, *how.values())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-36)


@pytest.mark.parametrize("shape", [(1, 8, 2, 64, 20000), (1, 2, 1, 3000, 3000)])
def test_every_run_is_the_same(shape: tuple[int, int, int, int, int]) -> None:
    b, hq, h, w, s = shape
    queries, keys = normal(1, b, hq, w, 128, dtype=torch.float16), normal(2, b, h, s, 128, dtype=torch.float16)
    want = run(queries, keys, scale=0.1, pool=5)
    for _ in range(5):
        assert torch.equal(run(queries, keys, scale=0.1, pool=5), want)


@pytest.mark.parametrize("w", [16, 48])
def test_in_a_graph(w: int) -> None:
    queries = normal(1, 2, 8, w, 128, dtype=torch.bfloat16).cuda()
    keys = normal(2, 2, 2, 3000, 128, dtype=torch.bfloat16).cuda()
    first = torch.tensor([0, 5], dtype=torch.int32, device="cuda")
    scratch, importance = workspace(queries, keys)[GUARD:-GUARD], torch.zeros(2, 2, 3000, device="cuda")
    kept = torch.zeros(4, 3000, dtype=torch.uint8, device="cuda")
    keep = torch.tensor([100, 200, 300, 3000], dtype=torch.int32, device="cuda")
    lists = torch.tensor([0, 0, 5, 5], dtype=torch.int32, device="cuda")
    lengths = torch.zeros(2, 2, 3000, device="cuda")

    def step() -> None:
        _C.score(importance, queries, keys, first, scratch, 0.09, 0.0, 0, 0, 5)
        _C.select(kept, importance.view(4, 3000), keep, lists, scratch, 4, 32)
        _C.norms(lengths, keys, first, 1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (3, 4):
        keys.copy_(normal(seed, 2, 2, 3000, 128, dtype=torch.bfloat16))
        first[0] = 10 * seed
        lists[:2] = 10 * seed
        graph.replay()
        torch.cuda.synchronize()
        got = [x.clone() for x in (importance, kept, lengths)]
        step()
        assert all(torch.equal(a, b) for a, b in zip(got, (importance, kept, lengths), strict=True))
        assert kept.sum(1).tolist() == [100, 200, 300, 2995]


def test_a_stream_of_its_own() -> None:
    queries, keys = normal(1, 1, 4, 16, 128).cuda(), normal(2, 1, 2, 3000, 128).cuda()
    want = run(queries, keys)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = run(queries, keys)
    assert torch.equal(got, want)


def test_bad_first_stays_inside() -> None:
    """Values cannot be refused without waiting for the device: they are taken as the nearest that make sense."""
    queries, keys = normal(1, 2, 4, 16, 64).cuda(), normal(2, 2, 2, 300, 64).cuda()
    torch.testing.assert_close(run(queries, keys, [-7, 400]), run(queries, keys, [0, 300]), rtol=0, atol=0)


def test_nan_stays_in_its_sequence() -> None:
    queries, keys = normal(1, 2, 4, 16, 64).cuda(), normal(2, 2, 2, 300, 64).cuda()
    want = run(queries, keys)
    keys[1, 1, 50, 3] = torch.nan
    got = run(queries, keys)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1, 0], want[1, 0])
    assert got[1, 1].isnan().any()


def test_no_sequences() -> None:
    assert run(normal(1, 0, 4, 16, 64), normal(2, 0, 2, 300, 64)).shape == (0, 2, 300)


def good() -> dict[str, Any]:
    queries, keys = normal(0, 2, 4, 3, 64).cuda(), normal(1, 2, 2, 10, 64).cuda()
    return {
        "importance": torch.full((2, 2, 10), 7.0, device="cuda"),
        "queries": queries,
        "keys": keys,
        "first": torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
        "workspace": workspace(queries, keys)[GUARD:-GUARD],
        "scale": 1.0,
        "softcap": 0.0,
        "reduce": 0,
        "pool_kind": 0,
        "pool": 5,
    }


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"importance": (torch.zeros, 2, 2, 9)}, ValueError, r"importance: expected shape \(2, 2, 10\), got \(2, 2, 9\)"),
    ({"queries": (normal, 0, 2, 3, 3, 64)}, ValueError, "queries: expected a multiple of the 2 KV heads of keys"),
    ({"queries": (normal, 0, 2, 4, 11, 64)}, ValueError, "queries: expected a window of 1..10 tokens"),
    (
        {"queries": (normal, 0, 2, 4, 3, 72), "keys": (normal, 0, 2, 2, 10, 72), "workspace": (1 << 22,)},
        NotImplementedError,
        "keys: expected 64, 80, 96, 128 or 256 channels on CUDA, got 72",
    ),
    ({"workspace": (64,)}, ValueError, "workspace: expected"),
    ({"pool": 4}, ValueError, "pool: expected an odd width >= 1, got 4"),
    ({"reduce": 3}, ValueError, "reduce: expected an integer in 0..2, got 3"),
]


@pytest.mark.parametrize(("change", "error", "sentence"), REFUSED)
def test_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = good()
    for name, value in change.items():
        if name == "workspace":
            value = torch.empty(*value, dtype=torch.uint8, device="cuda")
        elif isinstance(value, tuple):
            value = value[0](*value[1:]).to("cuda")
        arguments[name] = value
    before = arguments["importance"].clone()
    with pytest.raises(error, match=f"score: {sentence}"):
        _C.score(*arguments.values())
    assert torch.equal(arguments["importance"], before)


@pytest.mark.parametrize("name", ["importance", "queries", "keys", "first", "workspace"])
def test_another_device_is_refused(name: str) -> None:
    arguments = good()
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match="score: "):
        _C.score(*arguments.values())


# ---- norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 33, 64, 80, 96, 128, 255, 256])
def test_norms(dtype: torch.dtype, d: int) -> None:
    for seed, s in enumerate((1, 7, 300)):
        rows = 10.0 ** (seed - 1) * normal(seed, 2, 3, s, d) + 3
        rows = rows.to(dtype).cuda()
        for first, centered in ((None, 0), (None, 1), ([s // 2, s], 0), ([s // 2, s], 1)):
            out = torch.full((2, 3, s), torch.nan, device="cuda")
            begin = None if first is None else torch.tensor(first, dtype=torch.int32, device="cuda")
            _C.norms(out, rows, begin, centered)
            want = torch.zeros(2, 3, s, dtype=torch.float64)
            for i, at in enumerate(first or [0, 0]):
                if at == s:
                    continue
                real = rows[i, :, at:].double().cpu()
                want[i, :, at:] = (real - real.mean(1, keepdim=True) if centered else real).norm(dim=-1)
            longest = float(rows.double().abs().max())
            torch.testing.assert_close(out.double().cpu(), want, rtol=2.0**-23, atol=1e-12 * longest)


def test_norms_of_strided_and_padded_rows() -> None:
    rows = normal(4, 2, 2000, 3, 16).cuda()
    view = rows.transpose(1, 2)
    first = torch.tensor([7, 2000], dtype=torch.int32, device="cuda")
    out, want = torch.empty(2, 3, 2000, device="cuda"), torch.empty(2, 3, 2000)
    _C.norms(want, view.cpu(), first.cpu(), 1)
    view[0, :, :7] = torch.nan
    view[1] = torch.inf
    _C.norms(out, view, first, 1)
    torch.testing.assert_close(out.cpu(), want, rtol=2.0**-23, atol=0)
    most = torch.full((1, 1, 1, 4), torch.finfo(torch.float32).max, device="cuda")
    _C.norms(out[:1, :1, :1], most, None, 0)
    assert out[0, 0, 0].item() == most[0, 0, 0, 0].item()


# ---- accumulate


@pytest.mark.parametrize("seed", range(8))
def test_accumulate(seed: int) -> None:
    """Pages of both kinds, ragged; what the CPU makes of the same arguments, in double, so to a rounding."""
    rng = np.random.default_rng(seed)
    n, c = int(rng.integers(1, 6)), int(rng.integers(1, 300))
    table, lists = np.zeros((n, c), np.uint64), np.zeros((n, 4), np.int32)
    for i in range(n):
        pages = int(rng.integers(0, c + 1))
        for p in range(pages):
            bits = int(rng.choice([2, 3, 4, 8, 16]))
            tokens = int(rng.integers(0, (16 if bits == 16 else 64) + 1))
            table[i, p] = bits << 32 | bits << 40 | tokens << 48
            lists[i, 3] += tokens
        lists[i, 0] = pages
    room = int(lists[:, 3].max(initial=0)) + int(rng.integers(0, 3))
    mass = rng.random((n, room), np.float32)
    worth = rng.random((n, c), np.float32)
    worth[:, ::7] = np.inf
    arguments = [torch.from_numpy(x) for x in (mass, table.view(np.int64), lists)]
    arguments[1] = arguments[1].view(torch.uint64)
    want, got = torch.from_numpy(worth.copy()), torch.from_numpy(worth.copy()).cuda()
    _C.accumulate(want, *arguments, 0.75, 1.5)
    _C.accumulate(got, *[x.cuda() for x in arguments], 0.75, 1.5)
    torch.testing.assert_close(got.cpu(), want, rtol=2.0**-23, atol=0)


def test_accumulate_of_tables_that_lie() -> None:
    """More pages and tokens than there are: nothing is read or written outside, and the device goes on."""
    table = torch.full((2, 70), 4 << 32 | 4 << 40 | 255 << 48, dtype=torch.int64).view(torch.uint64).cuda()
    lists = torch.tensor([[1000, 0, 0, 9], [-3, 0, 0, 9]], dtype=torch.int32, device="cuda")
    worth, mass = torch.zeros(2, 70, device="cuda"), torch.ones(2, 300, device="cuda")
    _C.accumulate(worth, mass, table, lists, 1.0, 1.0)
    assert worth[0].tolist() == [255.0, 45.0] + [0.0] * 68
    assert not worth[1].any()
