"""Sparse or dense: what a product is expected to take each way, from one table of measured rates.

A product of a matrix with ``n`` columns is taken for ``launch_us`` and the longest of

- the bytes of its operands and its result, once each, at ``gb_per_s``;
- the arithmetic of the stored blocks, 2 · blocks · block² · n, at ``stored_tflops`` of their block size;
- its steps: tiles of 128 rows read the columns in which any of their rows of blocks has a block, so that a step is as
  2 · 128 · block · n of arithmetic, at ``step_tflops``. How many there are, the plan says.

The dense product takes 2 · m · k · n at ``dense_tflops``. Sparse is taken where it is not slower: for a large n and
blocks of 128 that is a share of stored blocks up to ``stored_tflops / dense_tflops``, the break-even density.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .structure import BLOCKS, check_block

_TILE = 128  # rows (KVC_BSR_ROWS)


@dataclass(frozen=True)
class Rates:
    """Of one device and kind of values; all in the units of the names. Blocks: of 16, 32, 64, 128."""

    dense_tflops: float
    stored_tflops: dict[int, float]
    step_tflops: dict[int, float]
    gb_per_s: float
    launch_us: float
    merges: bool  # whether blocks may be joined into larger ones
    origin: str  # where the numbers are from


_UNBOUNDED = dict.fromkeys(BLOCKS, 1e9)

# The one place where these numbers stand. Keys: "sm_90" (Hopper alone, whose kernel is its own), "sm_80" (every other
# GPU) and "cpu" with a dtype. How to measure them, with `kvcomp bench bsr` at 8192³: dense_tflops is 2·m·n·k / time of
# "torch dense"; stored_tflops the useful TFLOPS of kvcomp's sparse cells at clustered or banded blocks (few empty
# places in a step); step_tflops those of uniform ones at 78 % empty, times steps · (128 / block) / blocks (1 for 128,
# 1.78 for 64, 2.86 for 32, 3.92 for 16).
RATES: dict[str, Rates] = {
    "sm_90": Rates(
        dense_tflops=780.0,
        stored_tflops={16: 110.0, 32: 600.0, 64: 650.0, 128: 650.0},
        step_tflops={16: 292.0, 32: 641.0, 64: 680.0, 128: 650.0},
        gb_per_s=4200.0,
        launch_us=3.0,
        merges=True,
        origin="step_tflops of 16 measured on an H200 (experiments/results/h200/bsr.json), of 32 before its kernel "
        "became a tenth faster, the rest predicted by the design's bounds, which its cells of 64 and 128 exceed",
    ),
    "sm_80": Rates(
        dense_tflops=250.0,
        stored_tflops={16: 60.0, 32: 100.0, 64: 120.0, 128: 130.0},
        step_tflops={16: 60.0, 32: 100.0, 64: 120.0, 128: 130.0},
        gb_per_s=1500.0,
        launch_us=4.0,
        merges=True,
        origin="guessed, not measured",
    ),
    "cpu float32": Rates(
        dense_tflops=0.082,
        stored_tflops={16: 0.290, 32: 0.358, 64: 0.396, 128: 0.426},
        step_tflops=_UNBOUNDED,
        gb_per_s=16.0,
        launch_us=8.0,
        merges=False,
        origin="measured: 768³, twice a core's rate, AVX-512, torch 2.13.0 (slow in float32 on that processor)",
    ),
    "cpu bfloat16": Rates(
        dense_tflops=0.854,
        stored_tflops={16: 0.330, 32: 0.380, 64: 0.420, 128: 0.434},
        step_tflops=_UNBOUNDED,
        gb_per_s=16.0,
        launch_us=8.0,
        merges=False,
        origin="measured: as above, where torch has AVX512_BF16",
    ),
    "cpu float16": Rates(
        dense_tflops=0.001,
        stored_tflops={16: 0.312, 32: 0.374, 64: 0.408, 128: 0.418},
        step_tflops=_UNBOUNDED,
        gb_per_s=16.0,
        launch_us=8.0,
        merges=False,
        origin="measured: as above; torch's own product is not vectorized",
    ),
}


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """The table's line for a device."""
    if device.type != "cuda":
        return RATES.get(f"cpu {str(dtype).removeprefix('torch.')}", RATES["cpu float32"])
    return RATES["sm_90" if torch.cuda.get_device_capability(device)[0] == 9 else "sm_80"]


def usable(op: str, device: Any) -> torch.device:
    """ValueError for a device that is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or (found.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"{op}: device: expected one that torch can use, got {device}")
    return found


def sparse_us(rates: Rates, shape: tuple[int, int], block: int, count: int, steps: int, n: int, itemsize: int) -> float:
    """Microseconds that the product of ``count`` stored blocks in ``steps`` steps is expected to take."""
    m, k = shape
    stored = 2 * count * block * block * n / rates.stored_tflops[block] / 1e6
    stepped = 2 * steps * _TILE * block * n / rates.step_tflops[block] / 1e6
    moved = itemsize * (count * block * block + (m + k) * n) / rates.gb_per_s / 1e3
    return rates.launch_us + max(stored, stepped, moved)


def dense_us(rates: Rates, shape: tuple[int, int], n: int, itemsize: int) -> float:
    """Microseconds that the dense product of the same shape is expected to take."""
    m, k = shape
    arithmetic = 2 * m * k * n / rates.dense_tflops / 1e6
    moved = itemsize * (m * k + (m + k) * n) / rates.gb_per_s / 1e3
    return rates.launch_us + max(arithmetic, moved)


def copy_us(rates: Rates, shape: tuple[int, int], count: int, block: int, itemsize: int) -> float:
    """Microseconds that a dense copy is expected to take: zeros everywhere, then the blocks from place to place."""
    m, k = shape
    return itemsize * (m * k + 2 * count * block * block) / rates.gb_per_s / 1e3


def break_even(block_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float16) -> float:
    """The share of stored blocks up to which sparse is taken, for many columns and blocks that lie anywhere.

    With a chance d for each block, a tile of S = 128 / block rows of blocks takes 1 - (1 - d)^S of the columns.
    ``device``: None for the GPU where there is one; ValueError for one that is not there."""
    check_block("break_even", block_size)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    rates = rates_of(usable("break_even", best if device is None else device), dtype)
    side = _TILE // block_size
    low, high = 0.0, 1.0
    for _ in range(40):
        d = (low + high) / 2
        time = max(d / rates.stored_tflops[block_size], (1 - (1 - d) ** side) / rates.step_tflops[block_size])
        low, high = (d, high) if time <= 1 / rates.dense_tflops else (low, d)
    return low
