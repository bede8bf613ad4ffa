"""select on CUDA: the CPU's bytes, ties included (csrc/kvcomp/select.h)."""

from __future__ import annotations

import random
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

SPECIAL = [0.0, -0.0, 1.0, 1e-45, 1.1754944e-38, 3.4028235e38, 0.5, float(np.nextafter(np.float32(0.5), 1))]


def run(
    device: str,
    importance: torch.Tensor | None,
    keep: list[int],
    s: int,
    first: list[int] | None = None,
    sinks: int = 0,
    window: int = 0,
) -> torch.Tensor:
    kept = torch.full((len(keep), s), 9, dtype=torch.uint8, device=device)
    scratch = torch.empty(64, dtype=torch.uint8, device=device)
    assert _C.select_workspace(len(keep), s) == 0
    begin = None if first is None else torch.tensor(first, dtype=torch.int32, device=device)
    values = None if importance is None else importance.to(device)
    _C.select(kept, values, torch.tensor(keep, dtype=torch.int32, device=device), begin, scratch, sinks, window)
    return kept.cpu()


def check(importance: torch.Tensor | None, keep: list[int], s: int, *how: Any) -> torch.Tensor:
    got = run("cuda", importance, keep, s, *how)
    assert torch.equal(got, run("cpu", importance, keep, s, *how))
    return got


def test_small() -> None:
    """For the sanitizers: one block and several."""
    for s in (300, 5000):
        values = torch.rand(3, s, generator=torch.Generator().manual_seed(s))
        check(values, [s // 3, 20, s], s, [0, 5, 0], 4, 8)
        check(values.mul(9).round(), [s // 3, 20, s], s)
    check(None, [5, 9], 40, None, 2, 3)


@pytest.mark.parametrize("seed", range(100))
def test_random(seed: int) -> None:
    draw = random.Random(seed)
    n, s = draw.randint(1, 5), draw.choice([draw.randint(0, 40), draw.randint(900, 5000)])
    importance = None
    if draw.random() < 0.8:
        kind = draw.randrange(4)
        importance = torch.rand(n, s, generator=torch.Generator().manual_seed(seed))
        if kind == 1:
            importance = (importance * draw.choice([2, 50])).round() / 50  # many ties
        elif kind == 2:
            importance = torch.tensor(draw.choices(SPECIAL, k=n * s), dtype=torch.float32).view(n, s)
        elif kind == 3:
            importance = importance**30
    keep = [draw.choice([0, 1, s // 2, s, s + 9, draw.randint(0, s)]) for _ in range(n)]
    first = draw.choice([None, [draw.choice([0, s, draw.randint(0, s)]) for _ in range(n)]])
    sinks, window = draw.choice([0, 4, s, 2**31 - 1]), draw.choice([0, 32, draw.randint(0, s), 2**31 - 1])
    if importance is not None and first is not None:
        check(importance, keep, s, first, sinks, window)
        for i, begin in enumerate(first):
            importance[i, :begin] = torch.nan  # not read
    got = check(importance, keep, s, first, sinks, window)
    for i in range(n):
        real = s - (first[i] if first else 0)
        assert got[i].sum() == (real if real <= window else min(keep[i], real))


@pytest.mark.parametrize("s", [1023, 1024, 1025, 32768, 131077])
def test_long_lists(s: int) -> None:
    importance = torch.from_numpy(np.random.default_rng(s).exponential(size=(6, s)).astype(np.float32) ** 4)
    importance[1] = importance[1].mul(10).round() / 10
    importance[2, ::7] = 0
    importance[3] = 0.25
    importance[4, s // 2 :] = 0.25
    keep = [s // 7, s // 2, s - 1, s // 3, s // 2 + 100, 5]
    check(importance, keep, s, None, 4, 64)
    check(importance, keep, s, [0, 123, 0, 1, 99, s - 7], 4, 64)


@pytest.mark.parametrize("value", [0.0, 1.0, 3e38])
def test_equal_scores_keep_the_oldest(value: float) -> None:
    got = check(torch.full((1, 5000), value), [3000], 5000, None, 2, 8)
    assert got[0].nonzero().flatten().tolist() == [*range(2992), *range(4992, 5000)]


def test_many_lists() -> None:
    check(torch.rand(2000, 257, generator=torch.Generator().manual_seed(0)), [*range(2000)], 257, None, 4, 8)


def test_every_run_is_the_same() -> None:
    importance = torch.rand(8, 32768, generator=torch.Generator().manual_seed(0)).mul(1000).round()
    want = run("cuda", importance, [5000] * 8, 32768, None, 4, 32)
    for _ in range(5):
        assert torch.equal(run("cuda", importance, [5000] * 8, 32768, None, 4, 32), want)


def test_nonsense_stays_inside() -> None:
    """Values cannot be refused without waiting for the device: NaN and negative ones count as large, and the numbers
    of tokens are right all the same."""
    importance = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    importance[0, ::3] = torch.nan
    importance[1] = torch.inf
    importance[2] = -torch.nan
    got = run("cuda", importance, [500, -3, 2**31 - 1, 700], 3000, [-9, 0, 5000, 2990], 4, 32)
    assert got.max() == 1
    assert got.sum(1).tolist() == [500, 0, 0, 10]


def good() -> dict[str, Any]:
    return {
        "kept": torch.full((2, 6), 7, dtype=torch.uint8, device="cuda"),
        "importance": torch.ones(2, 6, device="cuda"),
        "keep": torch.tensor([3, 4], dtype=torch.int32, device="cuda"),
        "first": torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
        "workspace": torch.empty(64, dtype=torch.uint8, device="cuda"),
        "sinks": 1,
        "window": 2,
    }


@pytest.mark.parametrize(
    ("name", "value", "error", "sentence"),
    [
        ("kept", torch.zeros(2, 6, dtype=torch.int32), TypeError, "kept: expected uint8, got int32"),
        ("importance", torch.ones(2, 5), ValueError, r"importance: expected shape \(2, 6\), got \(2, 5\)"),
        ("keep", torch.zeros(3, dtype=torch.int32), ValueError, r"keep: expected shape \(2,\), got \(3,\)"),
        ("sinks", -1, ValueError, "sinks: expected an integer in 0..2147483647, got -1"),
    ],
)
def test_refused(name: str, value: Any, error: type[Exception], sentence: str) -> None:
    arguments = good()
    before = arguments["kept"].clone()
    kept = arguments["kept"]
    arguments[name] = value.to("cuda") if isinstance(value, torch.Tensor) else value
    with pytest.raises(error, match=f"select: {sentence}"):
        _C.select(*arguments.values())
    assert torch.equal(kept, before)


@pytest.mark.parametrize("name", ["kept", "importance", "keep", "first"])
def test_another_device_is_refused(name: str) -> None:
    arguments = good()
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match="select: "):
        _C.select(*arguments.values())
