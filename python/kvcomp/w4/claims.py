"""``python scripts/w4_claims.py``: the four claims of the seed's last section, each answered with figures of this run.

1. C3 and C4 are equally fast: compressed scales cost no time.
2. C4 is as good as C3: five mantissa bits lose nothing.
3. Quality falls with the mantissa bits of C5.
4. C3 and C4 are at least as fast as C2.

Times are those of whole models' tokens (tables of the offline bench) and of linear layers alone (``kvcomp bench w4``).
What was not measured is said so. A claim holds, or does not, where the whole 95 % interval of a ratio says so: of two
times over repeats or samples, of two perplexities over the same windows of text. Where there is no second repeat or
window, the ratio does.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .. import results
from ..bench.offline_table import half_interval, read_aggregated
from ..errors import one_line

BAD_INPUT = 2
SAME_SPEED = 0.02  # what two times may differ by and still be called the same
SAME_PERPLEXITY = 0.01
Row = Mapping[str, str]


def answer(
    tables: Sequence[Sequence[Row]], quality: Mapping[str, Any] | None, products: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """{claim, holds (True, False, or None: not decided), figures, why} for each; of aggregated tables of the offline
    bench, and of results objects of kinds ``w4_quality`` and ``w4``."""
    times = [one for table in tables for one in _tokens(table)] + [one for found in products for one in _layers(found)]
    return [
        _speed("C3 and C4 are equally fast", times, ("C4",), "C3", exact=True),
        _quality(quality),
        _falls(quality),
        _speed("C3 and C4 are at least as fast as C2", times, ("C3", "C4"), "C2", exact=False),
    ]


@dataclass(frozen=True)
class _Time:
    """Of one configuration in one case. ``half``: of the 95 % interval of its mean, None for a single value."""

    config_id: str
    what: str
    place: str
    case: str
    unit: str
    value: float
    half: float | None


def _tokens(table: Sequence[Row]) -> Iterator[_Time]:
    """Times per token (the median of an answer's), means over repeats."""
    for row in table:
        if row["tpot_p50_ms_mean"]:
            place = ", ".join(part for part in (row["model"], row["processor"], _cache(row)) if part)
            case = f"{row['prompt_len']} in, {row['output_len']} out"
            half = float(row["tpot_p50_ms_ci95"]) if row["tpot_p50_ms_ci95"] else None
            yield _Time(row["config_id"], "time per token", place, case, "ms", float(row["tpot_p50_ms_mean"]), half)


def _cache(row: Row) -> str:
    return "" if row["kv_cache_dtype"] == "auto" else f"cache {row['kv_cache_dtype']}"


def _layers(found: Mapping[str, Any]) -> Iterator[_Time]:
    """Times of linear layers in the formats of C2, C3 and C4."""
    formats = {("kvcomp", -1): "C3", ("kvcomp", 5): "C4", ("bitsandbytes NF4", None): "C2"}
    place = found["machine"]["gpu"] or found["machine"]["cpu"]
    for cell in found["cells"]:
        case = cell["case"]
        name = formats.get((cell["impl"], case.get("scale_mbits")))
        if name is not None and (name == "C2" or case["group"] == 128):
            shape = f"{case['n']}x{case['k']}, {case['m']} rows, {case['dtype']}"
            half = half_interval(stdev(cell["samples_us"]), len(cell["samples_us"]))
            yield _Time(name, "linear layers' time", place, shape, "us", cell["median_us"], half)


def _speed(claim: str, times: Sequence[_Time], ours: Sequence[str], other: str, *, exact: bool) -> dict[str, Any]:
    """Times of ``ours`` over ``other``'s, case by case; exact: the same, else at most that."""
    beside = {(one.what, one.place, one.case): one for one in times if one.config_id == other}
    found: list[dict[str, Any]] = []
    for one in times:
        theirs = beside.get((one.what, one.place, one.case))
        if one.config_id in ours and theirs is not None:
            ratio = one.value / theirs.value
            half = None
            if one.half is not None and theirs.half is not None:
                half = ratio * math.hypot(one.half / one.value, theirs.half / theirs.value)
            found.append(
                {"config_id": one.config_id, "over": other, "what": one.what, "place": one.place, "case": one.case,
                 f"ours_{one.unit}": one.value, f"theirs_{one.unit}": theirs.value, "ratio": ratio, "ratio_ci95": half}
            )  # fmt: skip
    if not found:
        return {"claim": claim, "holds": None, "figures": [], "why": f"no times of {' and '.join(ours)} beside {other}"}
    gaps = [(abs(one["ratio"] - 1) if exact else one["ratio"] - 1,
             math.inf if one["ratio_ci95"] is None else one["ratio_ci95"]) for one in found]  # fmt: skip
    beyond = sum(gap - half > SAME_SPEED for gap, half in gaps)
    unclear = sum(gap - half <= SAME_SPEED < gap + half for gap, half in gaps)
    holds = False if beyond else None if unclear else True
    said = [f"{beyond} of {len(gaps)} cells are more than {100 * SAME_SPEED:g} % {'apart' if exact else 'slower'}"]
    said += [f"{unclear} of {len(gaps)} cells vary by too much to tell {100 * SAME_SPEED:g} %"] if unclear else []
    return {"claim": claim, "holds": holds, "figures": found, "why": None if holds else "; ".join(said[not beyond :])}


def _quality(found: Mapping[str, Any] | None) -> dict[str, Any]:
    claim = "C4 is as good as C3"
    if found is None or not {"C3", "C4"} <= set(found["configs"]):
        return {"claim": claim, "holds": None, "figures": [], "why": "no quality of C3 and C4"}
    ratio, low, high = _perplexities(found, "C4", "C3")
    figures = [*(_figure(found, name) for name in ("C3", "C4")), {"C4 over C3": ratio, "ci95": [low, high]}]
    most = 1 + SAME_PERPLEXITY
    holds = True if high <= most else False if low > most else None
    why = f"the windows differ by too much to tell {100 * SAME_PERPLEXITY:g} %" if holds is None else None
    return {"claim": claim, "holds": holds, "figures": figures, "why": why}


def _falls(found: Mapping[str, Any] | None) -> dict[str, Any]:
    claim = "quality falls with the mantissa bits of C5"
    configs = {} if found is None else found["configs"]
    names = sorted((name for name in configs if name.startswith("C5_m")), key=lambda name: int(name[4:]))
    if found is None or len(names) < 2:
        return {"claim": claim, "holds": None, "figures": [], "why": "no quality of two or more of C5"}
    figures = [_figure(found, name) for name in names]
    same: list[str] = []
    holds: bool | None = True
    for fewer, more in itertools.pairwise(names):
        ratio, low, high = _perplexities(found, fewer, more)
        figures.append({f"{fewer} over {more}": ratio, "ci95": [low, high]})
        if high < 1:
            holds = False
        elif low <= 1:
            same.append(f"{fewer} and {more}")
    if same and holds:
        holds = None
    why = f"{', '.join(same)} cannot be told apart" if holds is None else None
    return {"claim": claim, "holds": holds, "figures": figures, "why": why}


def _figure(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    names = ("bits_per_weight", "perplexity", "kl", "top1", "accuracy", "avg_relative_drop_pct", "accepted")
    return {"config_id": name, **{what: found["configs"][name][what] for what in names}}


def _perplexities(found: Mapping[str, Any], name: str, other: str) -> tuple[float, float, float]:
    """The ratio of two perplexities, and the ends of its 95 % interval: of the differences window by window."""
    losses = {
        cell["case"]["config_id"]: cell["window_losses"]
        for cell in found["cells"]
        if cell["case"]["task"] == "held_out"
    }
    gaps = [mine - theirs for mine, theirs in zip(losses[name], losses[other], strict=True)]
    middle = mean(gaps)
    half = half_interval(stdev(gaps), len(gaps)) if len(gaps) > 1 else 0.0
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="w4_claims.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--agg_csv", type=Path, nargs="+", default=[], help="tables of scripts/aggregate_results.py")
    parser.add_argument("--bench_json", type=Path, nargs="+", default=[], help="results of kvcomp bench w4")
    parser.add_argument("--quality_json", type=Path, help="results of scripts/w4_quality.py")
    parser.add_argument("--output", type=Path, help="write the answers here, as JSON")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    try:
        if not options.agg_csv and not options.bench_json and options.quality_json is None:
            raise ValueError("expected --agg_csv, --bench_json or --quality_json, got none of them")
        if options.output is not None:
            results.check_writable(options.output, "--output")
        tables = [read_aggregated(path) for path in options.agg_csv]
        products = [results.read(path, kind="w4") for path in options.bench_json]
        quality = None if options.quality_json is None else results.read(options.quality_json, kind="w4_quality")
        found = results.new("w4_claims", command=" ".join(["python scripts/w4_claims.py", *given]))
        found["claims"] = answer(tables, quality, products)
        if options.output is not None:
            results.write(options.output, found)
    except (ValueError, OSError) as reason:
        print(f"w4_claims: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT
    for number, one in enumerate(found["claims"], 1):
        said = {True: "holds", False: "does not hold", None: "not decided"}[one["holds"]]
        print(f"{number}. {one['claim']}: {said}" + (f" ({one['why']})" if one["why"] else ""))
        for figure in one["figures"]:
            print("   " + ", ".join(f"{name} {_short(value)}" for name, value in figure.items()))
    return 0


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
