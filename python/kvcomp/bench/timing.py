"""Timing on the CPU: rivals take turns, inputs rotate through more memory than the caches hold, samples are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

# Where the size of the last cache cannot be read.
_CACHE_BYTES = 64 << 20

_PAUSE_SECONDS = 0.02


def last_cache_bytes() -> int:
    """Size of the largest cache of core 0, as the kernel states it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        sizes.append(int(text.rstrip("KMG")) * units.get(text[-1], 1))
    return max(sizes, default=_CACHE_BYTES)


def copies(nbytes: int, most: int = 64) -> int:
    """How many inputs of ``nbytes`` to rotate, so that twice the last cache passes before one is read again."""
    return max(2, min(most, -(-2 * last_cache_bytes() // nbytes) + 1))


def rotate(calls: Mapping[str, Callable[[int], object]], samples: int, warmup: int = 3) -> dict[str, list[float]]:
    """Microseconds of each call, ``samples`` times, in turn; each gets a running number to choose its input by.

    A pause before each lets the threads of the call before, which spin for a while after their work, go to sleep."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup + samples):
        for name, call in calls.items():
            time.sleep(_PAUSE_SECONDS)
            start = time.perf_counter_ns()
            call(number)
            taken = time.perf_counter_ns() - start
            if number >= warmup:
                found[name].append(taken / 1e3)
    return found
