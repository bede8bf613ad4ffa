"""Timing on CUDA: a graph of many calls, replayed and timed by events, over more memory than the L2 holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from .. import results

REPLAYS = 17
_WARMUP = 3
_LEAST_GRAPH_US = 1000.0  # so that the start of a graph is a small part of it
_MOST_CALLS = 256

# What the design's reader (16-byte bulk copies into shared memory, ../shared/prototypes/reader.cu) reached on an H200.
READER_GB_S = 4590.0


def l2_bytes(device: torch.device | int = 0) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies(nbytes: int, *, l2: int | None = None) -> int:
    """How many inputs of ``nbytes`` to rotate, so that more than three times the L2 passes before one is read again."""
    l2 = l2_bytes() if l2 is None else l2
    return 1 if nbytes > 3 * l2 else -(-3 * l2 // max(nbytes, 1)) + 1


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]


def graph_us(step: Callable[[], Any], calls: int, *, replays: int = REPLAYS) -> list[float]:
    """Microseconds a call of ``step``, which makes ``calls`` of them, in each of ``replays`` runs of its graph.

    The step runs twice outside a graph first: what is compiled or allocated once is ready then."""
    return graphs_us({"": (step, calls)}, replays=replays)[""]


def graphs_us(steps: Mapping[str, tuple[Callable[[], Any], int]], *, replays: int = REPLAYS) -> dict[str, list[float]]:
    """The same of several steps, whose graphs run in turn: a clock that drifts, drifts for all of them."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, (step, _) in steps.items():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        stream.synchronize()
        graphs[name] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    begin, end = _event(), _event()
    with torch.cuda.stream(stream):
        for i in range(_WARMUP + replays):
            for name, (_, calls) in steps.items():
                begin.record()
                graphs[name].replay()
                end.record()
                end.synchronize()
                if i >= _WARMUP:
                    samples[name].append(begin.elapsed_time(end) * 1e3 / calls)
    for graph in graphs.values():
        graph.reset()
    return samples


def repeats(call: Callable[[int], Any], least: int = 1) -> int:
    """Calls for a graph: a multiple of ``least``, and enough to take a millisecond."""
    call(0)
    torch.cuda.synchronize()
    begin, end = _event(), _event()
    begin.record()
    for i in range(4):
        call(i)
    end.record()
    end.synchronize()
    once = max(begin.elapsed_time(end) * 1e3 / 4, 1.0)
    return least * -(-min(_MOST_CALLS, int(_LEAST_GRAPH_US / once) + 1) // least)


def rotated_us(call: Callable[[int], Any], least: int = 1, *, replays: int = REPLAYS) -> list[float]:
    """Microseconds of ``call``, which takes a running number to choose its input by; ``least`` inputs take turns."""
    return rotated_in_turn({"": call}, least, replays=replays)[""]


def rotated_in_turn(
    calls: Mapping[str, Callable[[int], Any]], least: int = 1, *, replays: int = REPLAYS
) -> dict[str, list[float]]:
    """The same of several calls, whose graphs run in turn."""

    def many(call: Callable[[int], Any], count: int) -> Callable[[], Any]:
        def step() -> None:
            for i in range(count):
                call(i)

        return step

    counts = {name: repeats(call, least) for name, call in calls.items()}
    return graphs_us({name: (many(call, counts[name]), counts[name]) for name, call in calls.items()}, replays=replays)


def host_us(call: Callable[[], Any], *, calls: int = 200, rounds: int = 17) -> list[float]:
    """Microseconds that a call keeps the host, its kernels running behind it; fewer calls than a stream can hold."""
    samples = []
    for number in range(_WARMUP + rounds):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        taken = time.perf_counter_ns() - start
        if number >= _WARMUP:
            samples.append(taken / calls / 1e3)
    torch.cuda.synchronize()
    return samples


def read_rate(*, nbytes: int = 4 << 30, replays: int = REPLAYS) -> list[dict[str, Any]]:
    """Ceilings of this run, as cells: reading alone (torch's reductions over ``nbytes`` of random bits), and copying.

    ``gb_per_s`` of a copy counts reading and writing."""
    memory = torch.randint(-(1 << 62), 1 << 62, (nbytes // 8,), dtype=torch.int64, device="cuda")
    target = torch.empty_like(memory[: memory.numel() // 2])
    reads: dict[str, tuple[Callable[[int], Any], int]] = {
        "torch sum int64": (lambda _: memory.sum(), nbytes),
        "torch sum int32": (lambda _: memory.view(torch.int32).sum(dtype=torch.int32), nbytes),
        "torch max int64": (lambda _: memory.max(), nbytes),
        "torch max int32": (lambda _: memory.view(torch.int32).max(), nbytes),
        "copy on the device": (lambda _: target.copy_(memory[: target.numel()]), 2 * target.nbytes),
    }
    cells = []
    for impl, (call, moved) in reads.items():
        samples = rotated_us(call, replays=replays)
        middle = median(samples)
        rate = moved / middle / 1e3
        cells.append(
            results.cell(
                impl,
                {"read": impl, "bytes": moved, "device": "cuda"},
                error=None,
                role="ceiling",
                median_us=middle,
                samples_us=samples,
                bytes=moved,
                gb_per_s=rate,
                fraction_of_reader=rate / READER_GB_S,
            )
        )
    return cells


def peak(cells: list[dict[str, Any]]) -> float:
    """GB/s of the fastest read among ``read_rate``'s cells; copies do not count."""
    reads = [
        cell["gb_per_s"] for cell in cells if cell.get("role") == "ceiling" and not cell["impl"].startswith("copy")
    ]
    return float(max(reads))
