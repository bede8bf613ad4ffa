"""Tables of ``kvcomp policies``: all methods by budget, what the joint plan gains, ways of coding rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .policies_results import goals

Results = Mapping[str, Any]
Row = tuple[str, ...]
NOTHING = "-"
_GROUPS = {
    "evict": "tokens alone",
    "quantize": "bits alone",
    "joint": "joint",
    "allocator": "joint, without a part",
}

_ERRORS = (
    ("attention_output_error", ".3f"),
    ("attention_output_error_of_dropping", ".3f"),
    ("attention_output_error_of_quantizing", ".3f"),
)


def method_rows(found: Results) -> tuple[Row, list[Row]]:
    """Header and rows: one row per method, one column per budget: accuracy aware / agnostic in percent.

    Fixed bits stand in the column whose ratio is the nearest to theirs, which the row names.
    """
    return _by_method(found, _modes)


def text_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same with what held-out text says: perplexity / KL / top-1 agreement in percent / attention error."""
    return _by_method(found, _on_text)


def _by_method(found: Results, show: Callable[[Results], str]) -> tuple[Row, list[Row]]:
    shown = [entry for entry in found["summary"] if entry["group"] in _GROUPS]
    left_out = [entry for entry in found["infeasible"] if entry["group"] in _GROUPS]
    ratios = sorted({entry["target_ratio"] for entry in [*shown, *left_out] if entry["target_ratio"]})
    base = next(entry for entry in found["summary"] if entry["group"] == "bf16")
    rows: dict[Row, dict[float, str]] = {}
    for group in _GROUPS:
        for entry in (entry for entry in [*shown, *left_out] if entry["group"] == group):
            label, ratio = entry["method"], entry["target_ratio"]
            if ratio is None:
                label += f" ({entry['ratio']:.2f}x)"
                ratio = min(ratios, key=lambda r: abs(math.log(r / entry["ratio"])), default=0.0)
            cells = rows.setdefault((_GROUPS[group], label), {})
            cells[ratio] = f"at most {entry['least_ratio']:.2f}x" if "least_ratio" in entry else show(entry)
    header = ("spends", "method", *(f"{ratio:g}x" for ratio in ratios))
    body = [(*name, *(cells.get(ratio, NOTHING) for ratio in ratios)) for name, cells in rows.items()]
    return header, [("bf16", "", *(show(base) for _ in ratios)), *body]


def gain_rows(found: Results) -> tuple[Row, list[Row]]:
    """Header and rows: at every budget the joint plan, the best eviction and the best quantization."""
    header = (
        "budget", "cache", "accuracy, aware", "accuracy, agnostic", "perplexity", "KL", "attention error",
        "of dropping", "of quantizing",
    )  # fmt: skip
    names = {"joint": "joint plan", "eviction": "best eviction", "quantization": "best quantization"}
    rows = []
    for best in found["best_single"]:
        for name, label in names.items():
            entry = best[name]
            if entry is None:
                rows.append((f"{best['target_ratio']:g}x", f"{label}: none fits", *[NOTHING] * (len(header) - 2)))
                continue
            method = "" if name == "joint" else f": {entry['method']}"
            rows.append((
                f"{best['target_ratio']:g}x",
                label + method,
                *(_accuracy(entry, mode) for mode in ("aware", "agnostic")),
                *(_number(entry, key, form) for key, form in (("perplexity", ".3f"), ("kl", ".4f"), *_ERRORS)),
            ))  # fmt: skip
    return header, rows


_CODING: dict[str, tuple[str, str, float]] = {
    "bits per element": ("bits_per_element", ".2f", 1),
    "key error (mse)": ("key_mse", ".4f", 1),
    "value error (mse)": ("value_mse", ".4f", 1),
    "attention error": ("attention_output_error", ".3f", 1),
    "perplexity": ("perplexity", ".3f", 1),
    "KL": ("kl", ".4f", 1),
    "top-1, %": ("top1_agreement", ".1f", 100),
}


def coding_rows(found: Results) -> tuple[Row, list[Row]]:
    """Header and rows: one row per way of coding; in each cell the figures of all numbers of bits."""
    by_way: dict[str, list[Results]] = {}
    for entry in found["summary"]:
        if entry["group"] == "coding":
            by_way.setdefault(entry["method"].rsplit(",", 1)[0], []).append(entry)
    bits = list(dict.fromkeys(e["method"].rsplit(", ", 1)[1].split()[0] for way in by_way.values() for e in way))
    rows = []
    for way, entries in by_way.items():
        columns = [[_number(entry, *column) for entry in entries] for column in _CODING.values()]
        columns.append([_accuracy(entry, "all").removesuffix(" %") for entry in entries])
        rows.append((way, *map(" / ".join, columns)))
    return (f"coding, {' / '.join(bits)} bits", *_CODING, "needles, %"), rows


_WORDS = {True: "met", False: "missed", None: "not measured"}


def goal_rows(found: Results) -> tuple[Row, list[Row]]:
    """Header and rows: every goal, its limit, and what was measured, with its 95 % interval."""
    rows: list[Row] = []
    for goal in goals(found):
        measured = NOTHING
        if goal["measured"] is not None:
            low, high = goal["ci95"]
            measured = f"{100 * goal['measured']:.2f} % ({100 * low:.2f} to {100 * high:.2f})"
        gained = goal["limit"] == 0
        limit = "at least 0 % gained" if gained else f"at most {100 * goal['limit']:g} % lost"
        rows.append((goal["goal"], limit, measured, _WORDS[goal["met"]]))
    return ("goal", "accuracy", "measured", ""), rows


def goal_lines(found: Results) -> list[str]:
    """The goals, one sentence each, and what no budget could be met with."""
    lines = [f"{goal}: {met}: {measured}, {limit}" for goal, limit, measured, met in goal_rows(found)[1]]
    for entry in found["infeasible"]:
        ratio = "" if entry["target_ratio"] is None else f" at {entry['target_ratio']:g}x"
        lines.append(f"{entry['group']} {entry['method']}{ratio}: infeasible, {entry['least_ratio']:g}x is the most")
    return lines


def _modes(entry: Results) -> str:
    return " / ".join(_accuracy(entry, mode).removesuffix(" %") for mode in ("aware", "agnostic"))


def _on_text(entry: Results) -> str:
    figures = (("perplexity", ".3f", 1), ("kl", ".4f", 1), ("top1_agreement", ".1f", 100), (_ERRORS[0][0], ".3f", 1))
    return " / ".join(_number(entry, *figure) for figure in figures)


def _accuracy(entry: Results, mode: str) -> str:
    accuracy = entry["accuracy"][mode]
    return f"{100 * accuracy['accuracy']:.1f} %" if accuracy else NOTHING


def _number(entry: Results, name: str, form: str, times: float = 1) -> str:
    value = entry.get(name)
    return NOTHING if value is None else f"{times * value:{form}}"


ROWS = {
    "policies": method_rows,
    "policies_text": text_rows,
    "policies_gain": gain_rows,
    "coding": coding_rows,
    "policies_goals": goal_rows,
}

TITLES = {
    "policies": "accuracy, aware / agnostic, %",
    "policies_text": "held-out text: perplexity / KL / top-1, % / attention error",
    "policies_gain": "the joint plan beside the best single method",
    "coding": "ways of coding rows",
}
