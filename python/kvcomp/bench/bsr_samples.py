"""Samples of a product's time: as many as asked for, fewer where it is slow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import timing

_BUDGET_US = {"cpu": 3e6, "cuda": 4e5}  # of one cell
_SLOW_US = 2e4  # from here on a call's own start costs nothing beside it
_SAMPLE_US = 1e3  # least time between two events

Call = Callable[[int], Any]


def of(call: Call, copies: int, most: int, least: int, device: str, *, graph: bool = True) -> tuple[list[float], str]:
    """Microseconds of a call, which takes a running number to choose among ``copies`` of its inputs, ``least`` to
    ``most`` of them; and how they were taken: a clock, replays of a CUDA graph, or events on a stream. ``graph``: False
    for a call that does in a graph what it does not do outside."""
    found, how = in_turn({"": call}, copies, most, least, device, graph=graph)
    return found[""], how


def in_turn(
    calls: Mapping[str, Call], copies: int, most: int, least: int, device: str, *, graph: bool = True
) -> tuple[dict[str, list[float]], str]:
    """The same of several calls whose samples alternate: a clock that drifts, drifts for all of them."""
    once = {name: _once(call, copies, device) for name, call in calls.items()}
    slowest = max(once.values())
    count = _count(slowest, most, least, device)
    if device == "cpu":
        return timing.rotate(calls, count, warmup=1 if slowest > _SLOW_US else 3), "clock"
    if graph and slowest < _SLOW_US:
        from . import timing_cuda

        try:
            return timing_cuda.rotated_in_turn(calls, copies, replays=count), "graph"
        except (RuntimeError, NotImplementedError):  # a library that cannot be captured
            torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(count + 1):
        for name, call in calls.items():
            taken = _between_events(call, number, once[name])
            if number:
                found[name].append(taken)
    return found, "events"


def _once(call: Call, copies: int, device: str) -> float:
    """About what a call takes, when it has been made for every input."""
    for number in range(copies if device == "cuda" else 1):
        call(number)
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    call(1)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - begin) / 1e3


def _count(once: float, most: int, least: int, device: str) -> int:
    return max(least, min(most, int(_BUDGET_US[device] / max(once, 1.0))))


def _between_events(call: Call, number: int, once: float) -> float:
    """Microseconds a call, of so many that follow each other on the stream that they take a millisecond. Behind one
    that keeps the GPU busy while the host asks for them, but for calls beside which that is nothing."""
    each = max(1, int(_SAMPLE_US / max(once, 1.0)))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call,unused-ignore]
    if once < _SLOW_US:
        call(number * each - 1)  # of other inputs than those that follow
    begin.record()
    for i in range(each):
        call(number * each + i)
    end.record()
    end.synchronize()
    taken: float = begin.elapsed_time(end) * 1e3 / each
    return taken
