"""How far attention's output may lie from fp64's: a row's error in root mean squares, and a channel's.

Weights are rounded to 11 bits before they meet V, as all tensor-core attention does: where few tokens hold the weight,
one channel in a hundred is off by 2 to 4e-3 of its row's size, while the row as a whole stays within 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ROW, CHANNEL = 1e-3, 5e-3  # of the root mean square of the row's exact output
METRIC = "root mean square of a row's error over its output's, or a fifth of a channel's, beyond half a unit"
# Half a unit in the last place, relative, of the output's type.
HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
_LEAST_HALF = 2.0**-25  # of fp16's subnormal numbers
_CANCELLED = 1e-7  # of the largest value: what sums that cancel exactly may miss zero by
_MOST = 1e30  # in the place of infinities, which JSON has no words for


def missed(
    out: torch.Tensor, exact: torch.Tensor, largest: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Of rows (..., channels): the root mean square and the largest of their errors beyond half a unit, the root mean
    square of their exact values (fp64), and what sums that cancel exactly may miss zero by. ``largest``: magnitude
    among the values that were read."""
    unit = HALF_UNIT[out.dtype] * exact.abs() + (_LEAST_HALF if out.dtype == torch.float16 else 0.0)
    beyond = ((out.double() - exact).abs() - unit).nan_to_num(torch.inf).clamp_min(0)
    size = exact.square().mean(-1).sqrt()
    return beyond.square().mean(-1).sqrt(), beyond.amax(-1), size, _CANCELLED * largest + 1e-30


@dataclass
class Errors:
    """The worst of all rows that were checked: ``row`` and ``channel`` over the row's size, ``value`` against ROW."""

    row: float = 0.0
    channel: float = 0.0
    value: float = 0.0

    def add(self, out: torch.Tensor, exact: torch.Tensor, largest: float) -> None:
        """Rows as in ``missed``."""
        whole, most, size, rest = missed(out, exact, largest)
        ratio = torch.maximum(whole / (ROW * size + rest), most / (CHANNEL * size + rest))
        self.row = max(self.row, _worst(whole / (size + rest)))
        self.channel = max(self.channel, _worst(most / (size + rest)))
        self.value = max(self.value, ROW * _worst(ratio))

    def error(self) -> dict[str, Any]:
        """Of a results cell."""
        return {"metric": METRIC, "value": self.value, "bound": ROW}


def _worst(ratio: torch.Tensor) -> float:
    return min(float(ratio.nan_to_num(torch.inf).max()), _MOST)
