"""What the design asks of a measured cell, and by how much the cell meets or misses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Target: the measured value that it is for, whether that may be at most (1) or has to be at least (-1) as much.
_GOALS: dict[str, tuple[str, int]] = {
    "target_us": ("median_us", 1),
    "prototype_us": ("median_us", 1),
    "target_ratio": ("times_uniform", 1),
    "target_fraction": ("fraction_of_copy", -1),
    "target_tflops": ("tflops_executed", -1),
    "target_tpot_ms": ("tpot_ms", 1),
    "target_times_plain": ("times_plain", -1),
    "target_ttft_ratio": ("ttft_ratio", 1),
    "target_kv_ratio": ("kv_ratio", -1),
}


def excess(cell: Mapping[str, Any]) -> dict[str, float]:
    """For every target of a cell how far beyond it the cell is, relative; met where that is zero or less."""
    found = {}
    for target, (value, sign) in _GOALS.items():
        if target in cell and value in cell:
            found[target] = sign * (cell[value] / cell[target] - 1)
    return found


def verdict(cell: Mapping[str, Any], *, prototype: bool = True, only: str | None = None) -> str:
    """Such as "≤ 69: met by 1.4 %"; nothing for cells without a target. ``prototype``: what it took is named, too.
    ``only``: that target alone."""
    said = []
    for target, beyond in excess(cell).items():
        if (target == "prototype_us" and not prototype) or only not in (None, target):
            continue
        sign, name = "≤" if _GOALS[target][1] > 0 else "≥", " (prototype)" if target == "prototype_us" else ""
        said.append(f"{sign} {cell[target]:g}{name}: {'met' if beyond <= 0 else 'missed'} by {100 * abs(beyond):.1f} %")
    return ", ".join(said)
