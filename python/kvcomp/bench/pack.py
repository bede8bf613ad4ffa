"""``pack`` on CUDA against copying on the device: bytes read and written a second, of the same run.

Rows are random, rotated over more memory than the L2 holds; before a cell is timed, a sample of its pages is compared
with the CPU's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from .. import _C, results
from . import timing_cuda

KV_HEADS, HEAD_DIM = 8, 128
SCALES = {"sigma": 0, "minmax": 1, "search": 2}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYOUT = (HEAD_DIM, HEAD_DIM, 1, 2, 0)  # one scale and zero a row, fp16; 16-bit halves are bfloat16
UNIT = 128
# What the design asks for: of the copy rate, from this many tokens on.
TARGET, TARGET_SEARCH, TARGET_TOKENS = 0.80, 0.65, 32768
_SAMPLED = 32

Rows = tuple[torch.Tensor, torch.Tensor]


class _Pages:
    """Every token of one sequence's lists in pages of one class."""

    def __init__(self, bits: int, tokens: int) -> None:
        self.bits, self.tokens = bits, tokens
        self.room = _C.page_tokens(bits, bits)
        self.bytes = _C.page_bytes(LAYOUT, bits, bits)
        self.each = tokens // self.room
        self.count = self.each * KV_HEADS
        self.nbytes = self.count * self.bytes
        index = (
            self.entries(self.count).view(np.int64),
            np.repeat(np.arange(KV_HEADS, dtype=np.int32), self.each),
            np.tile(np.arange(self.each, dtype=np.int32) * self.room, KV_HEADS),
            np.arange(tokens, dtype=np.int32),
        )
        entries, lists, start, numbers = (torch.from_numpy(part).cuda() for part in index)
        self.index = entries.view(torch.uint64), lists, start, numbers

    def entries(self, count: int) -> Any:
        """The first pages of an arena, full."""
        units = np.arange(count, dtype=np.uint64) * np.uint64(self.bytes // UNIT)
        return units | np.uint64(self.bits << 32 | self.bits << 40 | self.room << 48)

    def pack(self, arena: torch.Tensor, rows: Rows, scale: str) -> None:
        _C.pack(arena, *rows, *self.index, LAYOUT, 1, SCALES[scale], 0, 0, 0)

    def differ(self, arena: torch.Tensor, rows: Rows, scale: str) -> int:
        """Bytes of sampled pages that are not the CPU's."""
        count = min(_SAMPLED, self.count)
        pages = torch.from_numpy(np.random.default_rng(0).choice(self.count, count, replace=False)).cuda()
        keys, values = (part.reshape(1, self.count, self.room, HEAD_DIM)[:, pages].cpu() for part in rows)
        memory = torch.zeros(count * self.bytes + UNIT, dtype=torch.uint8)
        expected = memory[-memory.data_ptr() % UNIT :][: count * self.bytes]
        lists, start = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
        numbers = np.arange(self.room, dtype=np.int32)
        _C.pack(
            expected, keys, values, self.entries(count), lists, start, numbers, LAYOUT, 1, SCALES[scale], 0, 0, 0
        )  # fmt: skip
        got = arena.view(self.count, self.bytes)[pages].cpu()
        return int((got.flatten() != expected).sum())


def bench(
    device: torch.device | int = 0,
    *,
    tokens: Sequence[int] = (4096, 32768, 131072),
    bits: Sequence[int] = (2, 3, 4, 8, 16),
    scales: Sequence[str] = ("sigma", "search", "minmax"),
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    samples: int = timing_cuda.REPLAYS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Cells: copying on the device, and pack with its share of that rate. ``tokens``: multiples of 64."""
    with torch.cuda.device(device):
        cells = [_copy(samples)]
        copied = cells[0]["gb_per_s"]
        for dtype in dtypes:
            for count in tokens:
                generator = torch.Generator(device="cuda").manual_seed(seed)
                shape = (1, KV_HEADS, count, HEAD_DIM)
                nbytes = 2 * KV_HEADS * count * HEAD_DIM * DTYPES[dtype].itemsize
                inputs = [
                    (_random(shape, dtype, generator), _random(shape, dtype, generator))
                    for _ in range(timing_cuda.copies(nbytes))
                ]
                for width, scale in _cases(bits, scales):
                    cells.append(_cell(inputs, _Pages(width, count), scale, dtype, copied, samples))
    return cells


def _random(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cuda").to(DTYPES[dtype])


def _cases(bits: Sequence[int], scales: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Class 16 has no scales: once. 8 bits know no sigma: that is min-max there."""
    for width in bits:
        yield from ((width, scale) for scale in (scales if width < 16 else scales[:1]))


def _cell(inputs: list[Rows], pages: _Pages, scale: str, dtype: str, copied: float, samples: int) -> dict[str, Any]:
    arenas = [torch.empty(pages.nbytes, dtype=torch.uint8, device="cuda") for _ in inputs]
    pages.pack(arenas[-1], inputs[-1], scale)
    wrong = pages.differ(arenas[-1], inputs[-1], scale)
    took = timing_cuda.rotated_us(
        lambda i: pages.pack(arenas[i % len(inputs)], inputs[i % len(inputs)], scale), len(inputs), replays=samples
    )
    middle = median(took)
    moved = sum(part.nbytes for part in inputs[0]) + pages.nbytes
    rate = moved / middle / 1e3
    case = {"b": 1, "s": pages.tokens, "kv_heads": KV_HEADS, "d": HEAD_DIM, "dtype": dtype, "bits": pages.bits}
    target = TARGET_SEARCH if scale == "search" else TARGET
    return results.cell(
        "kvcomp pack",
        {**case, "scale": scale, "device": "cuda"},
        error={"metric": f"bytes of {_SAMPLED} pages that differ from the CPU's", "value": wrong, "bound": 0},
        median_us=middle,
        samples_us=took,
        bytes=moved,
        gb_per_s=rate,
        fraction_of_copy=rate / copied,
        **({"target_fraction": target} if pages.tokens >= TARGET_TOKENS else {}),
    )


def _copy(samples: int, nbytes: int = 1 << 30) -> dict[str, Any]:
    source = torch.randint(-(1 << 62), 1 << 62, (nbytes // 8,), dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    took = timing_cuda.rotated_us(lambda _: target.copy_(source), replays=samples)
    middle = median(took)
    return results.cell(
        "copy on the device",
        {"bytes": nbytes, "device": "cuda"},
        error=None,
        role="ceiling",
        median_us=middle,
        samples_us=took,
        bytes=2 * nbytes,
        gb_per_s=2 * nbytes / middle / 1e3,
    )
