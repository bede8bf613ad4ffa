"""Rows of the offline bench: one for every repeat of every cell (flat), and their means (aggregated), as CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .. import results

METRICS = (
    "ttft_ms",
    "tpot_ms",
    "tpot_p50_ms",  # the median of tokens: without those at which a decode step is recorded
    "throughput_output_tok_s",
    "throughput_total_tok_s",
    "model_mem_mb",
    "peak_gpu_mem_mb",
    "joules_per_token",
)
# A flat row's columns: what it is of, what was measured.
CASE = (
    "config_id",
    "repeat",
    "subrun_id",
    "model",
    "model_digest",
    "quant_mode",
    "scale_mbits",
    "group_size",
    "quant_target",
    "rounding",
    "dtype",
    "kv_cache_dtype",
    "device",
    "processor",  # the GPU's name, or the CPU's
    "git",
    "prompt_len",
    "output_len",
)
FLAT = (*CASE, *METRICS, "bits_per_weight", "flags")
GROUP = ("model", "config_id", "prompt_len", "output_len")
# What all rows of a group must have in common for their mean to be of anything.
SAME = (
    "model_digest",
    "quant_mode",
    "scale_mbits",
    "group_size",
    "quant_target",
    "rounding",
    "dtype",
    "kv_cache_dtype",
    "device",
    "processor",
    "git",
)
Row = dict[str, Any]


def flat_row(record: Mapping[str, Any], config_id: str, repeat: int) -> Row:
    """A raw record's row."""
    env = record["env"]
    made = {"processor": env["gpu_name"] or env["cpu"], "git": env["git"]}
    values = {**record["result"], **made, "config_id": config_id, "repeat": repeat, "subrun_id": record["run_id"]}
    return {name: "; ".join(values["flags"]) if name == "flags" else values.get(name) for name in FLAT}


def aggregate(rows: Iterable[Mapping[str, Any]], metrics: Sequence[str] = METRICS) -> list[Row]:
    """Mean, standard deviation and half of the 95 % interval of every metric over the repeats of (model, config,
    prompt, output). None where a repeat has no figure; std and ci95 of a single one are None, too.

    ValueError where a group's rows are not repeats of one thing (two models of one name are not), one of them is there
    twice, or does not say of which model it is."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        one = tuple(row[name] for name in ("subrun_id", *GROUP))
        if one in seen:
            raise ValueError(f"aggregate: rows: expected every run once, got {row['subrun_id']} twice")
        seen.add(one)
        if not row["model"]:
            raise ValueError(f"aggregate: model: expected a name in every row, got none in {row['subrun_id']}")
        groups.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    made = []
    for key, members in groups.items():
        common = {name: members[0].get(name) for name in SAME}
        for row in members:
            for name in SAME:
                if row.get(name) != common[name]:
                    raise ValueError(
                        f"aggregate: {name}: expected {common[name]} in all repeats of {key[1]} ({key[0]}, {key[2]} "
                        f"in, {key[3]} out), got {row.get(name)}"
                    )
        out: Row = dict(zip(GROUP, key, strict=True)) | common | {"n_repeats": len(members)}
        for metric in metrics:
            values = [float(row[metric]) for row in members if row.get(metric) is not None]
            values = values if len(values) == len(members) else []
            out[f"{metric}_mean"] = mean(values) if values else None
            several = len(values) > 1
            out[f"{metric}_std"] = stdev(values) if several else None
            out[f"{metric}_ci95"] = half_interval(stdev(values), len(values)) if several else None
        out["flagged"] = sum(1 for row in members if row.get("flags"))
        made.append(out)
    return sorted(made, key=lambda row: (row["model"], row["config_id"], row["prompt_len"], row["output_len"]))


def half_interval(deviation: float, n: int) -> float:
    """Half of the 95 % confidence interval of a mean of n values, by Student's t."""
    return student_t(n - 1) * deviation / math.sqrt(n)


def student_t(freedom: int, level: float = 0.975) -> float:
    """The quantile of Student's distribution, by bisection on its integral; exact to about 1e-9."""
    low, high = 0.0, 1.0
    while _student_below(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_below(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _student_below(t: float, freedom: int) -> float:
    """P(T < t), t >= 0: the integral of cos^(freedom - 1) up to atan(t / sqrt(freedom)), by Simpson's rule."""
    steps, end = 400, math.atan(t / math.sqrt(freedom))
    width = end / steps
    sides = sum((4 if i % 2 else 2) * math.cos(i * width) ** (freedom - 1) for i in range(1, steps))
    area = (1 + sides + math.cos(end) ** (freedom - 1)) * width / 3
    return 0.5 + area * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)


def write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """A CSV file, whole or not at all; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    results.write_text(path, text.getvalue())


def read_flat(path: Path) -> list[Row]:
    """The rows of a flat file; numbers as numbers, empty cells as None.

    ValueError for a file of aggregated rows, or one that is not of this bench."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as reason:
        raise ValueError(f"aggregate: {path}: expected a CSV file, got: {reason}") from None
    if any(name.endswith(("_mean", "_std", "_ci95")) for name in header) or "n_repeats" in header:
        raise ValueError(f"aggregate: {path}: expected one row for every repeat, got aggregated rows")
    missing = [name for name in FLAT if name not in header]
    if missing:
        raise ValueError(f"aggregate: {path}: expected a summary of the offline bench, got none of its {missing[0]}")
    found = []
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"aggregate: {path}: expected {len(header)} cells in every row, got another number")
        found.append({name: _value(path, name, row[name]) for name in FLAT})
    return found


def read_aggregated(path: Path) -> list[dict[str, str]]:
    """The rows of a table of scripts/aggregate_results.py, as they are written. ValueError for another file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not rows or not {*GROUP, *SAME, "n_repeats", "tpot_p50_ms_mean", "tpot_p50_ms_ci95"} <= set(rows[0]):
        raise ValueError(f"aggregate: {path}: expected a table of aggregate_results.py, got another file")
    return rows


_NUMBERS = {*METRICS, "bits_per_weight"}
_COUNTS = {"repeat", "scale_mbits", "group_size", "prompt_len", "output_len"}


def _value(path: Path, name: str, text: str) -> Any:
    if text == "":
        return None
    kind = float if name in _NUMBERS else int if name in _COUNTS else str
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"aggregate: {path}: {name}: expected a number, got {text!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"aggregate: {path}: {name}: expected a finite number, got {text}")
    return value
