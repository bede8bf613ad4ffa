"""Rates of block-sparse products, their ratios to others of the same run, and what the design asks of them.

Everything is worked out from the times in a results file's cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Cell = dict[str, Any]
Where = tuple[int, int, float, str]  # size, block, sparsity, pattern

OURS, DENSE, UNIFORM = "kvcomp", "torch dense", "uniform"
# Ratio: the libraries whose time is divided by kvcomp's; the fastest of them counts.
_RATIOS: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {"times_cusparse": ("cusparse bsr", "cusparse csr"), "times_triton": ("torch bsr",)},
    "cpu": {"times_scipy": ("scipy bsr",)},
}
# Measure: how a number of it is written, and whether it has to be at least (1) or may be at most (-1) the target.
_FORMS = {
    "useful_tflops": ("{:.3g} TFLOPS", 1),
    "speedup": ("{:.3g}× dense", 1),
    "fraction_of_dense": ("{:.3g} of the dense rate", 1),
    "times_cusparse": ("{:.3g}× cuSPARSE", 1),
    "times_triton": ("{:.3g}× Triton", 1),
    "times_scipy": ("{:.3g}× SciPy", 1),
    "times_uniform": ("{:.3g}× uniform's time", -1),
}
_RIVALRY = {"times_cusparse": 50.0, "times_triton": 2.0}
BLOCKS = (128, 64, 32, 16)  # in the order of their weight
LIKE_UNIFORM = ("banded", "power_law", "clustered")
# What the design asks of an H200.
TARGETS: dict[Where, dict[str, float]] = {
    (8192, 128, 0.78, UNIFORM): {"useful_tflops": 650.0, "speedup": 3.7, **_RIVALRY},
    (8192, 64, 0.78, UNIFORM): {"useful_tflops": 380.0, **_RIVALRY},
    (8192, 32, 0.78, UNIFORM): {"useful_tflops": 190.0, "speedup": 1.0, **_RIVALRY},
    (8192, 16, 0.78, UNIFORM): {"speedup": 1 / 1.03, **_RIVALRY},  # never more than 3 % behind dense
    (16384, 128, 0.78, UNIFORM): {"fraction_of_dense": 0.9},
    (8192, 128, 0.5, UNIFORM): {"speedup": 1.0},
    (8192, 64, 0.5, UNIFORM): {"speedup": 1.0},
    **{(8192, block, 0.78, pattern): {"times_uniform": 1.1} for pattern in LIKE_UNIFORM for block in BLOCKS},
}
_CPU_TARGETS = {"times_scipy": 1.0}


@dataclass(frozen=True)
class Verdict:
    """One target of one matrix; ``found``: None where it was not measured."""

    where: Where
    measure: str
    target: float
    found: float | None

    @property
    def met(self) -> bool:
        return self.found is not None and _FORMS[self.measure][1] * (self.found - self.target) >= 0

    @property
    def asked(self) -> str:
        """Such as "650 TFLOPS"."""
        return _FORMS[self.measure][0].format(self.target)

    def line(self) -> str:
        size, block, sparsity, pattern = self.where
        return f"({size}, block {block}, {sparsity:g} {pattern}): expected {self.bound}, got {self.said}"

    @property
    def bound(self) -> str:
        """Such as "≥ 650 TFLOPS"."""
        return f"{'≥' if _FORMS[self.measure][1] > 0 else '≤'} {self.asked}"

    @property
    def said(self) -> str:
        """What was found."""
        if self.found is None:
            return "nothing: not measured"
        return f"{_FORMS[self.measure][0].format(self.found)}: {'met' if self.met else 'missed'}"


def related(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of a file with rates and ratios beside their times; kvcomp's with their targets. Cells of no block
    (ceilings) and without a time stay as they are."""
    made = [dict(cell) for cell in cells]
    groups: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for cell in made:
        if "median_us" in cell and cell["case"]["block"] is not None:
            groups.setdefault(_key(cell["case"]), {})[cell["impl"]] = cell
    for group in groups.values():
        ours, dense = group.get(OURS), group.get(DENSE)
        for cell in group.values():
            case, taken = cell["case"], cell["median_us"]
            whole = 2 * case["m"] * case["n"] * case["k"]
            cell["useful_tflops"] = tflops(2 * cell["blocks"] * case["block"] ** 2 * case["n"], taken)
            cell["dense_equivalent_tflops"] = tflops(whole, taken)
            if dense is not None:
                cell["speedup"] = dense["median_us"] / taken
                cell["fraction_of_dense"] = cell["useful_tflops"] / tflops(whole, dense["median_us"])
            if ours is not None and cell is not ours:
                cell["times_kvcomp"] = taken / ours["median_us"]
        if ours is not None:
            _compare(ours, group, groups)
    return made


def _compare(ours: Cell, group: dict[str, Cell], groups: dict[tuple[Any, ...], dict[str, Cell]]) -> None:
    case = ours["case"]
    for name, impls in _RATIOS[case["device"]].items():
        times = [group[impl]["median_us"] for impl in impls if impl in group]
        if times:
            ours[name] = min(times) / ours["median_us"]
    uniform = groups.get(_key(case | {"pattern": UNIFORM}), {}).get(OURS)
    if uniform is not None and uniform is not ours:
        ours["times_uniform"] = ours["median_us"] / uniform["median_us"]
    if targets := _targets(case):
        ours["targets"] = targets


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """Of ``related`` cells: every target of a GPU, whether its matrix was measured or not; on the CPU those of the
    matrices that were."""
    found: dict[Where, Cell] = {}
    for cell in cells:
        if cell["impl"] == OURS and "median_us" in cell:
            found[_where(cell["case"])] = cell
    gpu = any(cell["case"]["device"] == "cuda" for cell in cells)
    wanted: dict[Where, dict[str, float]] = TARGETS if gpu else dict.fromkeys(found, _CPU_TARGETS)
    return [judged for where, targets in wanted.items() for judged in _judged(where, targets, found.get(where, {}))]


def of_cell(cell: Cell) -> list[Verdict]:
    """Of one ``related`` cell."""
    return list(_judged(_where(cell["case"]), _targets(cell["case"]), cell))


def _judged(where: Where, targets: dict[str, float], cell: Cell) -> Iterator[Verdict]:
    for measure, target in targets.items():
        yield Verdict(where, measure, target, cell.get(measure))


def _targets(case: dict[str, Any]) -> dict[str, float]:
    return TARGETS.get(_where(case), {}) if case["device"] == "cuda" else _CPU_TARGETS


def _where(case: dict[str, Any]) -> Where:
    return case["m"], case["block"], case["sparsity"], case["pattern"]


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(case.items()))


def tflops(operations: float, microseconds: float) -> float:
    return operations / microseconds / 1e6
