"""Samples of a product's time: as many as asked for, fewer where it is slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from . import timing

_BUDGET_US = 3e6  # of one cell
_SLOW_US = 2e4  # from here on a call's own start costs nothing beside it


def of(call: Callable[[int], Any], copies: int, most: int, least: int, device: str) -> tuple[list[float], str]:
    """Microseconds of a call, which takes a running number to choose among ``copies`` of its inputs, ``least`` to
    ``most`` of them; and how they were taken: a clock, replays of a CUDA graph, or events on a stream."""
    if device == "cpu":
        call(0)
        once = _clocked(call)
        count = _count(once, most, least)
        return timing.rotate({"": call}, count, warmup=1 if once > _SLOW_US else 3)[""], "clock"
    from . import timing_cuda

    for number in range(copies):
        call(number)
    torch.cuda.synchronize()
    once = _clocked(call, torch.cuda.synchronize)
    count = _count(once, most, least)
    if once < _SLOW_US:
        try:
            return timing_cuda.rotated_us(call, copies, replays=count), "graph"
        except (RuntimeError, NotImplementedError):  # a library that cannot be captured
            torch.cuda.synchronize()
    return _events(call, copies, count, once), "events"


def _clocked(call: Callable[[int], Any], wait: Callable[[], None] = lambda: None) -> float:
    begin = time.perf_counter_ns()
    call(1)
    wait()
    return (time.perf_counter_ns() - begin) / 1e3


def _count(once: float, most: int, least: int) -> int:
    return max(least, min(most, int(_BUDGET_US / max(once, 1.0))))


def _events(call: Callable[[int], Any], copies: int, count: int, once: float) -> list[float]:
    """Calls that follow each other on the stream, so many to a sample that it takes a millisecond."""
    each = max(1, int(1e3 / max(once, 1.0)))
    found = []
    for number in range(count + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call,unused-ignore]
        begin.record()
        for i in range(each):
            call(number * each + i)
        end.record()
        end.synchronize()
        if number:
            found.append(begin.elapsed_time(end) * 1e3 / each)
    return found
