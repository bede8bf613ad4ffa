"""Tables of 4-bit weights: what they do to a model's answers, and what their products cost on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bench import w4_goals
from .report import NOTHING, Results, Row

_SHOWN = (128, 5)  # group and mantissa bits of the main table
_MODES = {"none": "16 bit", "w4a16_bnb": "NF4", "w4a16_bnb_dq": "NF4, scales in 8 bits"}
_ROUNDED = {"nearest": "", "floor": ", floor", "search": ", searched"}
_RIVALS = ("torch int4", "Humming int4", "bitsandbytes NF4")
_SWEPT = (1, 4, 16, 64, 128, 256, 512, 1024, 4096, 8192)  # rows of the sweep that are shown


def quality_rows(found: Results) -> tuple[Row, list[Row]]:
    """One row per configuration of a results object of kind ``w4_quality``: text, and all tasks."""
    decided = found["acceptance"]
    cells = {cell["case"]["config_id"]: cell["case"] for cell in found["cells"]}
    counts = {name: 0 for name in found["configs"]}
    for cell in found["cells"]:
        counts[cell["case"]["config_id"]] += len(cell.get("scores", ()))
    rows: list[Row] = []
    for name, one in found["configs"].items():
        passed = {True: "passed", False: "missed"}.get(one["accepted"], NOTHING)
        rows.append((
            f"{name}: {_described(cells[name])}",
            f"{one['bits_per_weight']:.3f}",
            f"{one['perplexity']:.4f} ({one['perplexity_rise_pct']:+.2f} %)",
            f"{one['kl']:.4f}",
            f"{100 * one['top1']:.1f} %",
            f"{100 * one['accuracy']:.1f} % of {counts[name]}",
            _drop(one),
            NOTHING if name == decided["reference"] else passed,
        ))  # fmt: skip
    target = f"average drop < {decided['target_avg_relative_drop_pct']:g} %"
    header = ("", "bits per weight", "perplexity", "KL", "top-1", "accuracy, all pooled", "average drop [95 %]", target)
    return header, rows


def task_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same file: one row per family, one column per configuration; all families, counted or not."""
    decided, configs = found["acceptance"], found["configs"]
    counts = {cell["case"]["task"]: len(cell["scores"]) for cell in found["cells"] if "scores" in cell}
    rows: list[Row] = [
        (
            family.replace("_", " "),
            str(count),
            "yes" if family in decided["averaged"] else f"no: {decided['shown_only'][family]}",
            *(f"{100 * one['per_task'][family]:.1f} %" for one in configs.values()),
        )
        for family, count in counts.items()
    ]
    return ("task", "questions", "in the average", *configs), rows


def speed_rows(found: Results) -> tuple[Row, list[Row]]:
    """The design's cells of a results object of kind ``w4``, and their rivals."""
    times: dict[tuple[Any, ...], dict[str, Results]] = {}
    with_goals = any("goal_us" in cell for cell in found["cells"])  # the design's are for one GPU
    # bitsandbytes is optional, and no rival of the design's.
    beside = [name for name in _RIVALS if name != _RIVALS[2] or any(cell["impl"] == name for cell in found["cells"])]
    for cell in found["cells"]:
        case = cell["case"]
        if "m" in case and (cell["impl"] != "kvcomp" or (case["group"], case["scale_mbits"]) == _SHOWN):
            name = cell["impl"] if cell["impl"] in ("kvcomp", *_RIVALS) else "dense"
            times.setdefault((case["n"], case["k"], case["m"], case["dtype"]), {})[name] = cell
    rows: list[Row] = []
    for (n, k, m, dtype), cells in times.items():
        ours = cells.get("kvcomp")
        if ours is None or (with_goals and "goal_us" not in ours):
            continue
        others = [f"{cells[name]['median_us']:.1f}" if name in cells else NOTHING for name in ("dense", *beside)]
        goal = ours.get("goal_us")
        met = NOTHING if goal is None else f"{goal:g}" + ("" if ours["median_us"] <= goal else " (missed)")
        rows.append((f"{n}×{k}", str(m), dtype, *others, f"{ours['median_us']:.1f}", met, f"{ours['gb_per_s']:.0f}"))
    names = (f"{name.removeprefix('bitsandbytes ').replace('Humming int4', 'Humming')} µs" for name in beside)
    return ("N×K", "M", "dtype", "16 bit µs", *names, "kvcomp µs", "goal µs", "GB/s"), rows


def sweep_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same file: kvcomp's time over the 16-bit product's, one row per matrix, one column per number of rows."""
    ratios: dict[tuple[Any, ...], dict[int, Results]] = {}
    for cell in found["cells"]:
        case = cell["case"]
        if cell["impl"] == "kvcomp" and "over_dense" in cell and (case["group"], case["scale_mbits"]) == _SHOWN:
            ratios.setdefault((case["n"], case["k"], case["dtype"]), {})[case["m"]] = cell
    rows: list[Row] = []
    for (n, k, dtype), cells in ratios.items():
        if len(cells) > 1:
            over = sorted(m for m, cell in cells.items() if cell["over_dense"] > cell["over_dense_allowed"])
            shown = [f"{cells[m]['over_dense']:.2f}" if m in cells else NOTHING for m in _SWEPT]
            rows.append((f"{n}×{k} {dtype}", *shown, ", ".join(map(str, over)) or "none"))
    return ("time of 16 bit, M =", *map(str, _SWEPT), "M slower than allowed"), rows


def scale_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same file: time of every format over that of exact scales of groups of 128."""
    cells = [cell for cell in found["cells"] if "over_exact" in cell]
    places = list(dict.fromkeys(_place(cell["case"]) for cell in cells))
    times = {(_described(cell["case"]), _place(cell["case"])): cell["over_exact"] for cell in cells}
    rows: list[Row] = [
        (name, *(f"{times[name, place]:.3f}" if (name, place) in times else NOTHING for place in places))
        for name in dict.fromkeys(name for name, _ in times)
    ]
    return ("time of exact scales", *places), rows


def weight_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same file: bits per weight of the formats, and their relative squared error on two distributions."""
    cells = [cell for cell in found["cells"] if "rel_mse" in cell]
    names = list(dict.fromkeys(cell["case"]["distribution"] for cell in cells))
    of = {(_described(cell["case"]), cell["case"]["distribution"]): cell for cell in cells}
    rows: list[Row] = []
    for what in dict.fromkeys(what for what, _ in of):
        shown = [of[what, name] for name in names]
        errors = [f"{cell['rel_mse']:.5f} ({cell['over_exact_error']:.3f}×)" for cell in shown]
        rows.append((what, f"{shown[0]['bits_per_weight']:.3f}", *errors))
    return ("scales", "bits per weight", *(f"error, {name}" for name in names)), rows


def target_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same file: every target of the design, and how many of the cells that it is of meet it."""
    rows: list[Row] = []
    for one in w4_goals.judge(found):
        said = (NOTHING, "not measured", NOTHING)
        if one["cells"]:
            met = "met" if one["met"] == one["cells"] else "missed"
            said = (f"{one['met']} of {one['cells']}", met, f"{one['largest']:.3f}: {one['at']}")
        rows.append((one["target"], *said))
    return ("asked for", "cells that meet it", "", "largest, over what is allowed"), rows


def offline_rows(found: Results) -> tuple[Row, list[Row]]:
    """One row per configuration and output length of a table of scripts/aggregate_results.py, prompt lengths one behind
    the other."""
    several = len({row["model"] for row in found["rows"]}) > 1
    cases: dict[tuple[str, int, str], list[Results]] = {}
    for row in sorted(found["rows"], key=lambda row: int(row["prompt_len"])):
        cases.setdefault((row["model"], int(row["output_len"]), row["config_id"]), []).append(row)
    rows: list[Row] = []
    for (model, output, config), members in sorted(cases.items()):
        case = {name: int(members[0][name]) for name in ("scale_mbits", "group_size")}
        name = f"{config}: {_described({**members[0], **case})}" + (f" ({model})" if several else "")
        lengths = f"{' / '.join(row['prompt_len'] for row in members)} in, {output} out"
        shown = [(metric, digits) for metric, digits, _ in _OFFLINE]
        rows.append((name, lengths, *(_means(members, *one) for one in shown), members[0]["n_repeats"]))
    return ("", "tokens", *(title for _, _, title in _OFFLINE), "repeats"), rows


_OFFLINE = (
    ("ttft_ms", 0, "TTFT ms"),
    ("tpot_p50_ms", 2, "ms a token"),
    ("model_mem_mb", 2, "model MiB"),
    ("peak_gpu_mem_mb", 0, "GPU MiB"),
    ("joules_per_token", 2, "J a token"),
)


def _means(rows: list[Results], name: str, digits: int) -> str:
    """Means of several cases, each with half of its 95 % interval where that is not zero; once where they are equal."""
    said = []
    for row in rows:
        mean, half = row.get(f"{name}_mean"), f"{float(row.get(f'{name}_ci95') or 0):.{digits}f}"
        said.append((f"{float(mean):.{digits}f}" if mean else NOTHING) + (f" ± {half}" if float(half) else ""))
    return " / ".join(said if len(set(said)) > 1 else said[:1])


def _described(case: Results) -> str:
    """A format in words."""
    mode = case.get("mode") or case.get("quant_mode", "w4_shared_scale")
    target = f", {case['quant_target']}" if "quant_target" in case else ""
    if mode != "w4_shared_scale":
        return _MODES.get(mode, str(mode)) + (target if mode != "none" else "")
    scales = "exact" if case["scale_mbits"] < 0 else f"E5M{case['scale_mbits']}"
    return f"{scales} of {case['group_size'] if 'group_size' in case else case['group']}" + (
        _ROUNDED[case.get("rounding", "nearest")] + target
    )


def _drop(one: Results) -> str:
    if one["avg_relative_drop_pct"] is None:
        return NOTHING
    low, high = one["avg_relative_drop_ci95"]
    return f"{one['avg_relative_drop_pct']:.1f} % [{low:.1f}, {high:.1f}]"


def _place(case: Results) -> str:
    return f"{case['n']}×{case['k']}, M = {case['m']}"


def claim_rows(found: Results) -> tuple[Row, list[Row]]:
    """One row per claim of a results object of kind ``w4_claims``: whether it holds, and the figures that say so."""
    rows: list[Row] = []
    for one in found["claims"]:
        holds = {True: "holds", False: "does not hold", None: "not decided"}[one["holds"]]
        rows.append((one["claim"], holds + (f": {one['why']}" if one["why"] else ""), _figures(one["figures"])))
    return ("claim", "", "figures [95 %]"), rows


def _figures(figures: list[Any]) -> str:
    """Ratios of times as the ends of all cells of a place; ratios of perplexities one by one, and accuracies."""
    times: dict[str, list[float]] = {}
    said: list[str] = []
    right = [f"{one['config_id']} {100 * one['accuracy']:.1f} %" for one in figures if "accuracy" in one]
    for one in figures:
        if "place" in one:
            name = f"{one['what']} of {one['config_id']} / {one['over']} ({one['place']})"
            times.setdefault(name, []).append(one["ratio"])
        elif "ci95" in one:
            name = next(name for name in one if name != "ci95")
            low, high = one["ci95"]
            said.append(f"perplexity of {name}: {one[name]:.4f} [{low:.4f}, {high:.4f}]")
    said += [f"accuracy of {', '.join(right)}"] if right else []
    said += [f"{name}: {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} cells" for name, ratios in times.items()]
    return "; ".join(said) or NOTHING


ROWS = {
    "w4_quality": quality_rows,
    "w4_tasks": task_rows,
    "w4": speed_rows,
    "w4_sweep": sweep_rows,
    "w4_scales": scale_rows,
    "w4_weights": weight_rows,
    "w4_targets": target_rows,
    "w4_claims": claim_rows,
    "w4_offline": offline_rows,
}
_QUALITY = Path("experiments/results/w4_quality.json")
_H200 = Path("experiments/results/h200")
# Name of a table -> the results file it is made from, that file's kind, and the rows it shows.
SOURCES = {
    "w4_quality": (_QUALITY, "w4_quality", "w4_quality"),
    "w4_tasks": (_QUALITY, "w4_quality", "w4_tasks"),
    **{name: (_H200 / "w4.json", "w4", name) for name in ("w4", "w4_sweep", "w4_scales", "w4_weights", "w4_targets")},
    "w4_offline": (Path("experiments/results/cpu/w4_paper_table.csv"), "w4_offline", "w4_offline"),
    "w4_offline_h200": (_H200 / "w4_paper_table.csv", "w4_offline", "w4_offline"),
    "w4_offline_h200_packed": (_H200 / "w4_packed_paper_table.csv", "w4_offline", "w4_offline"),
    "w4_claims": (Path("experiments/results/w4_claims.json"), "w4_claims", "w4_claims"),
}
