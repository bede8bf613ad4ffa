"""``pack`` on CUDA against copying on the device: bytes read and written a second, of the same run.

Rows are random, rotated over more memory than the L2 holds; a sample of pages is compared with the CPU's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from .. import _C, results
from . import timing_cuda

KV_HEADS, HEAD_DIM, TOKENS = 8, 128, 32768
SCALES = {"sigma": 0, "minmax": 1, "search": 2}
LAYOUT = (HEAD_DIM, HEAD_DIM, 1, 2, 0)  # one scale and zero a row, fp16; 16-bit halves are bfloat16
UNIT = 128
_SAMPLED = 16


@dataclass
class _Pages:
    """Every token of every list in pages of one class."""

    bits: int
    batch: int
    tokens: int

    def __post_init__(self) -> None:
        self.room = _C.page_tokens(self.bits, self.bits)
        self.units = _C.page_bytes(LAYOUT, self.bits, self.bits) // UNIT
        each = self.tokens // self.room
        self.count = each * self.batch * KV_HEADS
        entries = np.arange(self.count, dtype=np.uint64) * self.units
        entries |= np.uint64(self.bits << 32 | self.bits << 40 | self.room << 48)
        first = np.arange(each, dtype=np.int32) * self.room
        index = (
            entries.view(np.int64),
            np.repeat(np.arange(self.batch * KV_HEADS, dtype=np.int32), each),
            np.tile(first, self.batch * KV_HEADS),
            np.arange(self.tokens, dtype=np.int32),
        )
        tensors = [torch.from_numpy(part).cuda() for part in index]
        self.index = tensors[0].view(torch.uint64), tensors[1], tensors[2], tensors[3]
        self.nbytes = self.count * self.units * UNIT

    def differ(self, arena: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], scale: int) -> int:
        """Bytes of the sampled pages that are not the CPU's."""
        one = self.units * UNIT
        each = self.tokens // self.room
        found = 0
        for page in np.random.default_rng(0).choice(self.count, _SAMPLED, replace=False):
            who, first = int(page) // each, int(page) % each * self.room
            keys, values = (
                part[who // KV_HEADS, who % KV_HEADS, first : first + self.room][None, None].cpu() for part in rows
            )
            expected = torch.from_numpy(np.zeros(one + UNIT, np.uint8))
            expected = expected[-expected.data_ptr() % UNIT :][:one]
            entry = np.array([self.bits << 32 | self.bits << 40 | self.room << 48], np.uint64)
            zero, numbers = np.zeros(1, np.int32), np.arange(self.room, dtype=np.int32)
            _C.pack(expected, keys, values, entry, zero, zero, numbers, LAYOUT, 1, scale, 0, 0, 0)
            found += int((arena[int(page) * one : (int(page) + 1) * one].cpu() != expected).sum())
        return found


def bench(
    device: torch.device | int = 0,
    *,
    batches: Sequence[int] = (1, 8),
    bits: Sequence[int] = (2, 3, 4, 8, 16),
    scales: Sequence[str] = ("sigma", "search"),
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    replays: int = timing_cuda.REPLAYS,
) -> list[dict[str, Any]]:
    """Cells: copying on the device, and pack with its share of that rate. ``tokens``: a multiple of 64."""
    with torch.cuda.device(device):
        copying = _copy(replays)
        cells = [copying]
        for batch in batches:
            nbytes = 2 * batch * KV_HEADS * tokens * HEAD_DIM * dtype.itemsize
            generator = torch.Generator(device="cuda").manual_seed(batch)
            shape = (batch, KV_HEADS, tokens, HEAD_DIM)
            inputs = [
                tuple(torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2))
                for _ in range(timing_cuda.copies(nbytes))
            ]
            for width, scale in _cases(bits, scales):
                cells.append(_cell(inputs, _Pages(width, batch, tokens), scale, copying["gb_per_s"], replays))
    return cells


def _cases(bits: Sequence[int], scales: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Class 16 has no scales: once."""
    for width in bits:
        yield from ((width, scale) for scale in (scales if width < 16 else scales[:1]))


def _cell(inputs: list[Any], pages: _Pages, scale: str, copied: float, replays: int) -> dict[str, Any]:
    arenas = [torch.empty(pages.nbytes, dtype=torch.uint8, device="cuda") for _ in inputs]

    def call(number: int) -> None:
        which = number % len(inputs)
        keys, values = inputs[which]
        _C.pack(arenas[which], keys, values, *pages.index, LAYOUT, 1, SCALES[scale], 0, 0, 0)

    samples = timing_cuda.rotated_us(call, len(inputs), replays=replays)
    middle = median(samples)
    moved = sum(part.nbytes for part in inputs[0]) + pages.nbytes
    rate = moved / middle / 1e3
    shape = {"b": pages.batch, "s": pages.tokens, "kv_heads": KV_HEADS, "d": HEAD_DIM}
    rows = {"dtype": str(inputs[0][0].dtype).removeprefix("torch."), "bits": pages.bits, "scale": scale}
    wrong = pages.differ(arenas[0], inputs[0], SCALES[scale])
    return results.cell(
        "kvcomp pack",
        {**shape, **rows, "device": "cuda"},
        error={"metric": f"bytes of {_SAMPLED} pages that differ from the CPU's", "value": wrong, "bound": 0},
        median_us=middle,
        samples_us=samples,
        bytes=moved,
        gb_per_s=rate,
        fraction_of_copy=rate / copied,
    )


def _copy(replays: int, nbytes: int = 1 << 30) -> dict[str, Any]:
    source = torch.randint(-(1 << 62), 1 << 62, (nbytes // 8,), dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    samples = timing_cuda.rotated_us(lambda _: target.copy_(source), replays=replays)
    middle = median(samples)
    return results.cell(
        "copy on the device",
        {"bytes": nbytes, "device": "cuda"},
        error=None,
        role="ceiling",
        median_us=middle,
        samples_us=samples,
        bytes=2 * nbytes,
        gb_per_s=2 * nbytes / middle / 1e3,
    )
