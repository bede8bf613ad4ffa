"""append on CUDA at decoding's shape: microseconds of one layer's launch, by what the step has to do.

A replay is one decode step: a graph of one append a layer, over pages and tables that are not in the L2. What it makes
of a layer is compared with what the CPU makes of the same rows, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from .. import _C, results
from ..store import BFLOAT16, Layout
from . import timing_cuda

BATCH, HEADS, HEAD_DIM, WINDOW = 8, 8, 128, 64
LAYERS = 128  # so that the start of a graph is a small part of it
PERIOD = 64  # steps from one flush of a list to its next
START = 100  # tokens of every list before the first step
TARGETS = {"average": 2.5, "flush": 6.0}
_OPTIONS = (1, 0, 0, 0, 0)  # Hadamard, sigma, nearest, layer, seed
_TAIL_PAGES, _UNIT = 12, 128
_CHECKED = 0  # the layer that is compared


class Caches:
    """Layers of lists of START tokens; ``staggered``: of every sequence 8 fewer than of the one before."""

    def __init__(self, layers: int, bits: int, flushes: int, *, staggered: bool, device: str | int, seed: int) -> None:
        n, random = BATCH * HEADS, np.random.default_rng(seed)
        self.layout = Layout(HEAD_DIM, HEAD_DIM, 1, BFLOAT16)
        place, end = random.permutation(layers * n)[:, None], 0  # a layer's pages lie anywhere
        stacks: list[np.ndarray[Any, Any]] = []
        pages: list[np.ndarray[Any, Any]] = []
        for width, count in ((16, _TAIL_PAGES), (bits, flushes)):
            size = _C.page_bytes(self.layout, width, width) // _UNIT
            units = (end + (place * count + np.arange(count)) * size).reshape(layers, n, count)
            stacks.append(units.astype(np.uint32))
            pages.append((units[_CHECKED, ..., None] + np.arange(size)).reshape(-1))
            end += layers * n * count * size
        arrays: list[np.ndarray[Any, Any]] = [
            np.zeros((layers, n, _TAIL_PAGES + flushes), np.uint64),
            np.zeros((layers, n, 4), np.int32),
            *stacks,
            np.tile(np.array([_TAIL_PAGES, flushes], np.int32), (layers, n, 1)),
        ]
        self.units = torch.from_numpy(np.concatenate(pages))  # of the checked layer
        self.before = [torch.from_numpy(array[_CHECKED].copy()) for array in arrays]
        self.state = [torch.from_numpy(array).to(device) for array in arrays]
        self.classes = torch.full((n, 2), bits, dtype=torch.uint8, device=device)
        self.arena = torch.zeros(end * _UNIT, dtype=torch.uint8, device=device)
        shape = (2, layers, BATCH, HEADS, 1, HEAD_DIM)
        self.rows = torch.from_numpy(random.standard_normal(shape, np.float32)).bfloat16().to(device)
        self.valid = (START - 8 * staggered * torch.arange(BATCH)).int().to(device)
        for layer in range(layers):
            self.append(layer, START, self.valid)

    def append(self, layer: int, q: int = 1, valid: torch.Tensor | None = None) -> None:
        """The layer's row, ``q`` times."""
        self._append(self.arena, [tensor[layer] for tensor in self.state], self.rows[:, layer], q, valid, self.classes)

    def wrong_bytes(self, steps: int) -> int:
        """How many bytes of a layer are not what the CPU makes of START and ``steps`` rows."""
        arena, state = torch.zeros(self.arena.numel(), dtype=torch.uint8), [part.clone() for part in self.before]
        rows, classes = self.rows[:, _CHECKED].cpu(), self.classes.cpu()
        self._append(arena, state, rows, START, self.valid.cpu(), classes)
        self._append(arena, state, rows, steps, None, classes)
        ours = self.arena.view(-1, _UNIT)[self.units.to(self.arena.device)].cpu()
        pairs = [(ours, arena.view(-1, _UNIT)[self.units])]
        pairs += [(tensor[_CHECKED].cpu(), made) for tensor, made in zip(self.state, state, strict=True)]
        return sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs)

    def _append(
        self,
        arena: torch.Tensor,
        state: Sequence[torch.Tensor],
        rows: torch.Tensor,
        q: int,
        valid: torch.Tensor | None,
        classes: torch.Tensor,
    ) -> None:
        keys, values = (row.expand(-1, -1, q, -1) for row in rows)
        table, lists, tails, packed, left = state
        _C.append(
            arena, table, lists, tails, packed, left, keys, values, valid, classes, self.layout, WINDOW, *_OPTIONS
        )


def bench(
    device: int = 0, *, bits: Sequence[int] = (4, 2, 8), rounds: int = 6, seed: int = 0, layers: int = LAYERS
) -> list[dict[str, Any]]:
    """Cells: all lists in step (the average, and every kind of step), and staggered; ``rounds`` of 64 steps each."""
    cells = []
    for width in bits:
        cells += _in_step(device, width, rounds, seed, layers)
        caches = Caches(layers, width, rounds + 2, staggered=True, device=device, seed=seed)
        samples = _steps(caches, layers, rounds * PERIOD)
        averages = [mean(samples[start : start + PERIOD]) for start in range(0, len(samples), PERIOD)]
        cells.append(_cell("average", "staggered", width, averages, caches.wrong_bytes(len(samples)), layers))
    return cells


def _in_step(device: int, width: int, rounds: int, seed: int, layers: int) -> list[dict[str, Any]]:
    caches = Caches(layers, width, rounds + 2, staggered=False, device=device, seed=seed)
    samples = _steps(caches, layers, rounds * PERIOD)
    wrong = caches.wrong_bytes(len(samples))
    kinds: dict[str, list[float]] = {"average": [], "flush": [], "page begins": [], "page goes on": []}
    tail = START
    for step, taken in enumerate(samples):
        kind = "flush" if tail == WINDOW + PERIOD else "page goes on" if tail % 16 else "page begins"
        kinds[kind].append(taken)
        tail += 1 - PERIOD * (kind == "flush")
        if step % PERIOD == PERIOD - 1:
            kinds["average"].append(mean(samples[step + 1 - PERIOD : step + 1]))
    return [_cell(kind, "in step", width, taken, wrong, layers) for kind, taken in kinds.items()]


def _cell(step: str, lists: str, width: int, samples_us: list[float], wrong: int, layers: int) -> dict[str, Any]:
    shape = {"b": BATCH, "kv_heads": HEADS, "d": HEAD_DIM, "q": 1, "window": WINDOW, "k_bits": width, "v_bits": width}
    target = {"target_us": TARGETS[step]} if step in TARGETS else {}
    return results.cell(
        "kvcomp append",
        {**shape, "step": step, "lists": lists, "layers": layers, "device": "cuda"},
        error={"metric": "bytes that differ from the CPU's", "value": wrong, "bound": 0},
        median_us=median(samples_us),
        samples_us=samples_us,
        **target,
    )


def _steps(caches: Caches, layers: int, steps: int) -> list[float]:
    """Microseconds a layer of every step."""
    with torch.cuda.device(caches.arena.device):
        flood = torch.empty(3 * timing_cuda.l2_bytes(caches.arena.device), dtype=torch.uint8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(layers):
                caches.append(layer)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call,unused-ignore]
        samples = []
        for number in range(steps):
            flood.fill_(number % 256)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1e3 / layers)
    return samples
