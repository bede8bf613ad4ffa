"""Measures the ways of a product on the very operands, and has ``matmul`` take the fastest from then on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

import torch

from . import multiply
from .matrix import BSRMatrix
from .structure import BLOCKS

_SAMPLES = 5


def tune(a: BSRMatrix, b: torch.Tensor, *, transpose: bool = False) -> dict[str, float]:
    """Microseconds of every way, by its name, the fastest first. It is remembered for all matrices of the same blocks
    (``BSRMatrix.with_values``), products with as many columns, and this dtype; copies that lost are dropped. A way
    whose copy has no room is left out; after any other error the choice is what it was."""
    with torch.no_grad():
        multiply.matmul(a, b, transpose=transpose, method="sparse")  # refuses what does not fit
        if not multiply.in_core(a.dtype, a.device):
            return {"dense": _microseconds(lambda: multiply.matmul(a, b, transpose=transpose), a.device)}
        ways = [1, multiply.DENSE]
        if a.device.type == "cuda" and a.blocks:
            ways += [factor for factor in (2, 4, 8) if factor * a.block_size <= BLOCKS[-1]]
        key = (1 if b.ndim == 1 else int(b.shape[1]), transpose, a.dtype)
        chosen, times = a.structure.ways, {}
        before = chosen.get(key)
        try:
            for way in ways:
                chosen[key] = way
                # A copy may be more than there is room for.
                with suppress(torch.OutOfMemoryError):
                    times[way] = _microseconds(lambda: multiply.matmul(a, b, transpose=transpose), a.device)
            before = min(times, key=lambda way: times[way])
        finally:
            if before is None:
                del chosen[key]
            else:
                chosen[key] = before
        a.forget(keep=before)
    return {multiply.name_of(way, a.block_size): times[way] for way in sorted(times, key=lambda way: times[way])}


def _microseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of a call among others like it, the first of which makes plans and copies."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    samples = []
    for _ in range(_SAMPLES):
        begin = time.perf_counter_ns()
        call()
        call()
        wait()
        samples.append((time.perf_counter_ns() - begin) / 2e3)
    return median(samples)
