"""``python scripts/w4_pareto_plot.py``: what scales cost, and what they buy, as a picture made from results files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _C, results
from ..bench.offline_table import read_aggregated
from ..errors import one_line
from .weights import check_format

BAD_INPUT = 2
_FRONT, _REST = "#1f77b4", "#7f7f7f"
Point = tuple[str, float, float]  # name, cost, loss


def scale_bytes(out_features: int, in_features: int, group_size: int, scale_mbits: int) -> int:
    """Bytes of a layer's scales, padding of the layer included: all that it holds less its codes."""
    check_format("scale_bytes", group_size, scale_mbits, "nearest")
    return _C.w4_bytes(out_features, in_features, group_size, scale_mbits) - out_features * in_features // 2


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none costs as little and loses less, or costs less and loses as little."""
    return [
        point
        for point in points
        if not any(
            other[1] <= point[1] and other[2] <= point[2] and (other[1] < point[1] or other[2] < point[2])
            for other in points
        )
    ]


def quality_points(found: Mapping[str, Any], what: str = "perplexity") -> list[Point]:
    """(configuration, bytes of the model's weights in MiB, perplexity or another figure) of a w4_quality file."""
    return [(name, one["weight_bytes"] / results.MIB, float(one[what])) for name, one in found["configs"].items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="w4_pareto_plot.py", description=__doc__)
    parser.add_argument("--quality_json", "--lmeval_json", "--lmeval_jsons", type=Path, nargs="+", default=[],
                        help="results of scripts/w4_quality.py; of several the configurations are joined")  # fmt: skip
    parser.add_argument("--agg_csv", type=Path, help="table of scripts/aggregate_results.py: adds time per token")
    parser.add_argument("--mbits_list", type=int, nargs="+", default=[-1, 0, 3, 5], help="default: -1 0 3 5")
    parser.add_argument("--out_features", type=int, default=3072)
    parser.add_argument("--in_features", type=int, default=3072)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--out_png", type=Path, default=Path("pareto.png"), help="default: pareto.png")
    options = parser.parse_args(arguments)
    try:
        results.check_writable(options.out_png, "--out_png")
        for name in ("out_features", "in_features"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name}: expected 1 or more, got {getattr(options, name)}")
        points: dict[str, Point] = {}
        for path in options.quality_json:
            points |= {point[0]: point for point in quality_points(results.read(path, kind="w4_quality"))}
        times = {} if options.agg_csv is None else _times(options.agg_csv)
        storage = {
            bits: scale_bytes(options.out_features, options.in_features, options.group_size, bits)
            for bits in options.mbits_list
        }
        title = f"scales of {options.out_features} x {options.in_features}, groups of {options.group_size}"
        save(options.out_png, storage, title, list(points.values()), times)
    except (ValueError, OSError, ImportError) as reason:
        print(f"w4_pareto_plot: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT
    print(options.out_png)
    return 0


def save(
    path: Path, storage: Mapping[int, int], title: str, points: Sequence[Point], times: Mapping[str, float]
) -> None:
    """Panels: bytes of scales; perplexity against the weights' bytes; where there are any, against time per token."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError("--out_png: expected matplotlib (pip install 'kvcomp[plot]'), got none") from reason
    if path.suffix.lstrip(".") not in FigureCanvasAgg.get_supported_filetypes():
        raise ValueError(f"--out_png: expected a file such as plot.png, got {path}")
    panels = 1 + bool(points) + bool(points and times)
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    names = ["fp16" if bits < 0 else f"E5M{bits}" for bits in storage]
    bars = all_axes[0].bar(names, [size / 1024 for size in storage.values()], color=_FRONT)
    all_axes[0].bar_label(bars, fmt="%.0f")
    all_axes[0].set_ylabel("KiB")
    all_axes[0].set_title(title, fontsize="medium")
    if points:
        _scatter(all_axes[1], points, "weights of the model, MiB")
    if points and times:
        timed = [(name, times[name], loss) for name, _, loss in points if name in times]
        _scatter(all_axes[2], timed, "time per token, ms")
    results.replace(path, lambda part: figure.savefig(part, dpi=120))


def _scatter(axes: Any, points: Sequence[Point], label: str) -> None:
    front = sorted(pareto_front(points), key=lambda point: point[1])
    axes.plot([point[1] for point in front], [point[2] for point in front], color=_FRONT, linewidth=1)
    for point in points:
        axes.plot([point[1]], [point[2]], "o", color=_FRONT if point in front else _REST)
        axes.annotate(point[0], point[1:], textcoords="offset points", xytext=(4, 4), fontsize="small")
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity")


def _times(path: Path) -> dict[str, float]:
    """Mean time per token of every configuration, over its cells."""
    rows = read_aggregated(path)
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["tpot_p50_ms_mean"]:
            found.setdefault(row["config_id"], []).append(float(row["tpot_p50_ms_mean"]))
    return {name: sum(values) / len(values) for name, values in found.items()}
