"""What the design asks of 4-bit weights, target by target, and what a results object of kind ``w4`` says to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

SAME_SPEED = 1.02  # compressed scales over exact ones
SAME_ERROR = 1.01
SEARCHED_ERROR, SEARCHED_BITS = 0.6, 4.29  # groups of 32 with E5M3 and search
Cell = Mapping[str, Any]


def judge(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{target, met, cells, largest, at} for each: how many of so many cells meet it, and the largest of their ratios to
    what it is a bound of (1 is the bound, more a miss), where. Of no cells: nothing was measured that says."""
    timed = [cell for cell in found["cells"] if cell["impl"] == "kvcomp"]
    weights = [cell for cell in found["cells"] if "rel_mse" in cell]
    shown = [cell for cell in timed if _format(cell) == (128, 5)]
    # These rivals are of one type of x alone.
    humming = [cell for cell in shown if cell["case"]["dtype"] == "fp16"]
    int4 = [cell for cell in shown if cell["case"]["dtype"] == "bf16"]
    scaled = [cell for cell in timed if _format(cell) in ((128, 3), (128, 5))]
    nearest = [cell for cell in weights if _format(cell) in ((128, 3), (128, 5)) and _rounding(cell) == "nearest"]
    searched = [cell for cell in weights if _format(cell) == (32, 3) and _rounding(cell) == "search"]
    return [
        _target("the design's times", timed, "goal_us", lambda cell: cell["median_us"] / cell["goal_us"]),
        _target("at most Humming's time", humming, "over_humming", lambda cell: cell["over_humming"]),
        _target("at most the time of torch's int4", int4, "over_torch", lambda cell: cell["over_torch"]),
        _target(
            "at most 5 % slower than 16 bits (10 % at 4096×4096, M = 128 to 512)",
            shown,
            "over_dense",
            lambda cell: cell["over_dense"] / cell["over_dense_allowed"],
        ),
        _target(
            "E5M3, E5M5: at most 2 % slower than exact scales",
            scaled,
            "over_exact",
            lambda cell: cell["over_exact"] / SAME_SPEED,
        ),
        _target(
            "E5M3, E5M5: error of weights at most 1 % above that of exact scales",
            nearest,
            "over_exact_error",
            lambda cell: cell["over_exact_error"] / SAME_ERROR,
        ),
        _target(
            "groups of 32, E5M3, searched: error at least 40 % lower than of exact scales of 128, in 4.29 bits at most",
            searched,
            "over_exact_error",
            lambda cell: max(cell["over_exact_error"] / SEARCHED_ERROR, cell["bits_per_weight"] / SEARCHED_BITS),
        ),
    ]


def _target(target: str, cells: Sequence[Cell], needs: str, ratio: Callable[[Cell], float]) -> dict[str, Any]:
    ratios = [(ratio(cell), _place(cell)) for cell in cells if needs in cell]
    largest, at = max(ratios, default=(None, None))
    return {"target": target, "met": sum(value <= 1 for value, _ in ratios), "cells": len(ratios), "largest": largest,
            "at": at}  # fmt: skip


def _format(cell: Cell) -> tuple[int, int]:
    return cell["case"]["group"], cell["case"]["scale_mbits"]


def _rounding(cell: Cell) -> str:
    return str(cell["case"]["rounding"])


def _place(cell: Cell) -> str:
    case = cell["case"]
    scales = "exact" if case["scale_mbits"] < 0 else f"E5M{case['scale_mbits']}"
    if "distribution" in case:
        return f"{scales}, {case['distribution']}"
    return f"{case['n']}×{case['k']}, M = {case['m']}, {case['dtype']}, {scales}"
