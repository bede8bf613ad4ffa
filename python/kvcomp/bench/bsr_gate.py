"""Whether a product is right: its difference from float64, against a bound that grows with √K."""

from __future__ import annotations

from typing import Any

import torch

SCALE = 0.1  # standard deviation of values and b
LIMIT = 0.01  # largest difference with float32 out, at that scale
_SUMMING = 2.0**-18  # of sums in float32 for each √K, relative to the result: tensor cores truncate
_HALF_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_WRONG = 3e38  # stands for NaN and infinity, which JSON has not
_ROWS = 2048  # compared at a time


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in float64."""
    return a.double() @ b.double()


def difference(got: torch.Tensor, reference: torch.Tensor, k: int, *, half_units: float = 1) -> dict[str, Any]:
    """An ``error`` for a results cell: the largest difference anywhere.

    Bound: ``_SUMMING`` · √k of the reference's root mean square, and ``half_units`` of got's dtype at its largest
    element; with float32 at most ``LIMIT``, too."""
    worst = squares = largest = 0.0
    sound = True
    for first in range(0, reference.shape[0], _ROWS):
        part = reference[first : first + _ROWS]
        gap = (got[first : first + _ROWS].double() - part).abs().max()
        sound = sound and bool(torch.isfinite(gap))
        worst = max(worst, float(gap)) if sound else _WRONG
        squares += float(part.square().sum())
        largest = max(largest, float(part.abs().max()))
    size = (squares / max(reference.numel(), 1)) ** 0.5
    bound = _SUMMING * k**0.5 * size + half_units * _HALF_UNIT[got.dtype] * largest
    if got.dtype == torch.float32:
        bound = min(bound, LIMIT)
    kind = str(got.dtype).removeprefix("torch.")
    return {
        "metric": f"largest difference from float64, {kind} out",
        "value": worst,
        "bound": bound,
        "relative": min(worst / size, _WRONG) if size else 0.0,
    }
