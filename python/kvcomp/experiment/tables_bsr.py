"""Tables of block-sparse products: kvcomp beside the dense product of the same matrix, and beside other libraries'."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..bench import bsr_goals
from .report import NOTHING, Results, Row

_OURS = bsr_goals.OURS
_MAIN = (0.78, "uniform")  # sparsity and pattern of the main table
_SIDE = 8192  # of the tables that show one size, where it was measured


def speed_rows(found: Results) -> tuple[Row, list[Row]]:
    """Uniform blocks, 78 % empty: one row per size and block."""
    rows: list[Row] = []
    for cell in _ours({"cells": bsr_goals.related(found["cells"])}):
        case = cell["case"]
        if (case["sparsity"], case["pattern"]) == _MAIN:
            best = _best_rival(found, case)
            beside = NOTHING if best is None else f"{best['times_kvcomp']:.1f}× ({best['impl']})"
            rows.append((f"{_size(case)}, block {case['block']}", *_figures(cell), _goal(cell), beside))
    header = ("", "way", "µs", "useful TFLOPS", "% of dense", "faster than dense", "goal", "next best sparse takes")
    return header, rows


def sparsity_rows(found: Results) -> tuple[Row, list[Row]]:
    """Uniform blocks: times faster than the dense product, a column for each sparsity."""
    return _grid(found, lambda case: case["pattern"] == _MAIN[1], "sparsity", "{:.0%} empty", "faster than dense")


def pattern_rows(found: Results) -> tuple[Row, list[Row]]:
    """78 % empty: time of every pattern, and of uniform blocks' time."""
    cells = {
        (cell["case"]["m"], cell["case"]["block"], cell["case"]["pattern"]): cell
        for cell in _ours(found)
        if cell["case"]["sparsity"] == _MAIN[0]
    }
    patterns = list(dict.fromkeys(pattern for _, _, pattern in cells if pattern != _MAIN[1]))
    rows: list[Row] = []
    for (size, block, pattern), uniform in cells.items():
        others = [cells.get((size, block, other)) for other in patterns]
        if pattern == _MAIN[1]:
            shown = [NOTHING if other is None else _against(other, uniform) for other in others]
            rows.append((f"{_size(uniform['case'])}, block {block}", f"{uniform['median_us']:.0f}", *shown))
    return ("µs (of uniform)", _MAIN[1], *patterns), rows


def rival_rows(found: Results) -> tuple[Row, list[Row]]:
    """One row per library at 78 % empty uniform blocks of one size: microseconds, a column for each block."""
    cells = [
        cell
        for cell in found["cells"]
        if (cell["case"]["sparsity"], cell["case"]["pattern"]) == _MAIN and "median_us" in cell
    ]
    size = _one_size(cells)
    cells = [cell for cell in cells if cell["case"]["m"] == size]
    blocks = sorted({cell["case"]["block"] for cell in cells})
    times = {(cell["impl"], cell["case"]["block"]): cell for cell in cells}
    absent = {(entry["impl"], entry["case"]["block"]) for entry in found.get("absent", ())}
    names = [cell["impl"] for cell in cells] + [entry["impl"] for entry in found.get("absent", ())]
    rows: list[Row] = []
    for impl in dict.fromkeys(names):
        shown = [_time(times.get((impl, block)), (impl, block) in absent) for block in blocks]
        if set(shown) - {NOTHING}:
            rows.append((impl, *shown))
    rows += [
        (f"{cell['impl']} (another matrix)", *[_time(cell, False)] * len(blocks))
        for cell in found["cells"]
        if cell["case"]["m"] == size and cell["case"]["pattern"] in ("full", "2:4")
    ]
    return (f"µs (of kvcomp's), {size}³", *(f"block {block}" for block in blocks)), rows


def goal_rows(found: Results) -> tuple[Row, list[Row]]:
    """What the design asks for, and what was found: one row per matrix."""
    rows: dict[bsr_goals.Where, list[bsr_goals.Verdict]] = {}
    for verdict in bsr_goals.verdicts(bsr_goals.related(found["cells"])):
        rows.setdefault(verdict.where, []).append(verdict)
    shown: list[Row] = []
    for (size, block, sparsity, pattern), judged in rows.items():
        said = "; ".join(f"{verdict.bound}: {_found(verdict)}" for verdict in judged)
        shown.append((f"{size}³, block {block}, {sparsity:.0%} empty, {pattern}", said))
    return ("", "asked: found"), shown


def _found(verdict: bsr_goals.Verdict) -> str:
    if verdict.found is None:
        return "not measured"
    return f"{verdict.found:.3g}" + ("" if verdict.met else " (missed)")


def l2_rows(found: Results) -> tuple[Row, list[Row]]:
    """From L2 to shared memory (scripts/l2_rate.py): one row per panel and number of blocks that a copy goes to."""
    cells = {
        (cell["case"]["mode"], cell["case"]["columns"], cell["case"]["multicast"]): cell for cell in found["cells"]
    }
    rows: list[Row] = []
    for columns, multicast in dict.fromkeys((columns, multicast) for _, columns, multicast in cells):
        shared, product = (cells.get((mode, columns, multicast)) for mode in ("shared", "product"))
        panel = next(cell for cell in (shared, product) if cell is not None)["panel_bytes"]
        bound = NOTHING if product is None else f"{product['tflops']:.0f}"
        rows.append(
            (f"{panel / 1e6:.1f} MB ({columns} columns)", str(multicast), *_rates(shared), *_rates(product), bound)
        )
    header = ("panel", "blocks that a copy goes to", "all shared: TB/s filled", "TB/s from L2")
    return (*header, "as products do: TB/s filled", "TB/s from L2", "at most TFLOPS"), rows


def _rates(cell: Results | None) -> Row:
    return (NOTHING, NOTHING) if cell is None else (f"{cell['tb_per_s_filled']:.2f}", f"{cell['tb_per_s_read']:.2f}")


def all_rows(found: Results) -> tuple[Row, list[Row]]:
    """Every cell, for a terminal."""
    rows: list[Row] = []
    for cell in found["cells"]:
        case = cell["case"]
        error = cell.get("error")
        rows.append((
            cell["impl"],
            f"{_size(case)} {case['pattern']}",
            NOTHING if case["block"] is None else str(case["block"]),
            f"{case['sparsity']:.0%}",
            *_figures(cell),
            NOTHING if error is None else f"{error['value']:.1e} of {error['bound']:.1e}",
        ))  # fmt: skip
    header = ("", "matrix", "block", "empty", "way", "µs", "useful TFLOPS", "% of dense", "faster than dense", "error")
    return header, rows


def _ours(found: Results) -> list[Any]:
    return [cell for cell in found["cells"] if cell["impl"] == _OURS and "median_us" in cell]


def _figures(cell: Results) -> Row:
    """Way, time, useful TFLOPS, percent of the dense product's TFLOPS, times faster than it."""
    rate = cell.get("useful_tflops", cell.get("tflops"))
    return (
        cell.get("way", NOTHING),
        f"{cell['median_us']:.1f}" if "median_us" in cell else "wrong",
        NOTHING if rate is None else f"{rate:.0f}" if rate >= 10 else f"{rate:.3f}",
        f"{100 * cell['fraction_of_dense']:.0f}" if "fraction_of_dense" in cell else NOTHING,
        f"{cell['speedup']:.2f}×" if "speedup" in cell else NOTHING,
    )


def _goal(cell: Results) -> str:
    """What the design asks for, and what of it is missed or was not measured."""
    said = []
    for verdict in bsr_goals.of_cell(dict(cell)):
        unmet = "not measured" if verdict.found is None else "missed"
        said.append(verdict.asked + ("" if verdict.met else f" ({unmet})"))
    return ", ".join(said) or NOTHING


def _grid(found: Results, keep: Callable[[Results], bool], column: str, form: str, title: str) -> tuple[Row, list[Row]]:
    cells = {
        (cell["case"]["m"], cell["case"]["block"], cell["case"][column]): cell
        for cell in _ours(found)
        if keep(cell["case"]) and "speedup" in cell
    }
    columns = sorted({value for *_, value in cells})
    rows: list[Row] = []
    for size, block in sorted({(size, block) for size, block, _ in cells}):
        shown = [cells.get((size, block, value)) for value in columns]
        times = [NOTHING if cell is None else f"{cell['speedup']:.2f}×" for cell in shown]
        rows.append((f"{size}³, block {block}", *times))
    return (title, *(form.format(value) for value in columns)), rows


def _best_rival(found: Results, case: Results) -> Results | None:
    """The fastest sparse product of the same matrix that is not kvcomp's."""
    rivals = [
        cell
        for cell in found["cells"]
        if cell["case"] == case and "times_kvcomp" in cell and not cell["impl"].startswith((_OURS, "torch dense"))
    ]
    return min(rivals, key=lambda cell: float(cell["median_us"]), default=None)


def _one_size(cells: Iterable[Results]) -> int:
    sizes = {int(cell["case"]["m"]) for cell in cells}
    return _SIDE if _SIDE in sizes else max(sizes, default=0)


def _size(case: Results) -> str:
    return f"{case['m']}³"


def _time(cell: Results | None, absent: bool) -> str:
    if cell is None:
        return "not run" if absent else NOTHING
    beside = f" ({cell['times_kvcomp']:.3g}×)" if "times_kvcomp" in cell else ""
    return f"{cell['median_us']:.0f}{beside}"


def _against(cell: Results, uniform: Results) -> str:
    return f"{cell['median_us']:.0f} ({cell['median_us'] / uniform['median_us']:.2f})"


ROWS = {
    "bsr": speed_rows,
    "bsr_sparsity": sparsity_rows,
    "bsr_patterns": pattern_rows,
    "bsr_rivals": rival_rows,
    "bsr_goals": goal_rows,
}
OTHER_ROWS = {"l2_rate": l2_rows}  # of files of their own
