"""Pictures of results files. Needs matplotlib (``pip install 'kvcomp[plot]'``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import results

Results = Mapping[str, Any]
_COLOURS = {"bf16": "#7f7f7f", "method": "#1f77b4"}


def save(found: Results, path: Path) -> None:
    """One experiment (``kvcomp run``) as a picture; the suffix chooses the format.

    ImportError without matplotlib; ValueError for a format it does not know.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise ImportError("run: --plot: expected matplotlib (pip install 'kvcomp[plot]'), got none") from reason
    form = path.suffix.lstrip(".")
    if form not in FigureCanvasAgg.get_supported_filetypes():
        raise ValueError(f"run: --plot: expected a file such as plot.png, got {path}")
    cells = found["cells"]
    tasks = [cell for cell in cells if "accuracy" in cell]
    figure = Figure(figsize=(12 if tasks else 8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if tasks else 2, width_ratios=[1, 1.4, 2.2] if tasks else [1, 1.4])
    stamp = "" if found["origin"] == "measured" else f" ({found['origin']})"
    figure.suptitle(f"{found['method']}: {found['compression_ratio']:.2f} times fewer bytes{stamp}")
    packed = next((cell for cell in cells if "ledger" in cell), cells[-1])
    _bytes(axes[0], found, packed)
    _layers(axes[1], packed)
    if tasks:
        _accuracy(axes[2], tasks, found["method"])
    results.replace(path, lambda part: figure.savefig(part, dpi=120))


def _bytes(axes: Any, found: Results, packed: Results) -> None:
    axes.bar(["bf16"], [found["original_mb"]], color=_COLOURS["bf16"])
    bottom = 0.0
    for name, nbytes in (packed.get("ledger") or {"all": found["compressed_mb"] * results.MIB}).items():
        size = nbytes / results.MIB
        axes.bar([found["method"]], [size], bottom=bottom, label=name.replace("_", " ") if size else None)
        bottom += size
    axes.set_ylabel("allocated, MiB")
    _legend(axes)


def _legend(axes: Any) -> None:
    """Below the axes, where it covers nothing."""
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _layers(axes: Any, packed: Results) -> None:
    fractions = packed["plan"]["kept_per_layer"] if "plan" in packed else [packed.get("kept_fraction", 1.0)]
    axes.bar(range(len(fractions)), fractions, color=_COLOURS["method"])
    axes.set_xlabel("layer")
    axes.set_ylabel("tokens kept, fraction")
    axes.set_ylim(0, 1)


def _accuracy(axes: Any, tasks: list[Results], method: str) -> None:
    names = list(dict.fromkeys((cell["case"]["task"], cell["case"]["mode"]) for cell in tasks))
    for offset, arm in ((0.2, "bf16"), (-0.2, method)):
        cells = [cell for cell in tasks if cell["case"]["method"] == arm]
        if not cells:
            continue
        places = [len(names) - 1 - names.index((c["case"]["task"], c["case"]["mode"])) + offset for c in cells]
        means = [cell["accuracy"] for cell in cells]
        spread = [
            [max(0.0, mean - cell["ci95"][0]) for mean, cell in zip(means, cells, strict=True)],
            [max(0.0, cell["ci95"][1] - mean) for mean, cell in zip(means, cells, strict=True)],
        ]
        colour = _COLOURS["bf16" if arm == "bf16" else "method"]
        axes.barh(places, means, height=0.4, xerr=spread, color=colour, label=arm, error_kw={"elinewidth": 1})
        if arm == method == "bf16":
            break
    axes.set_yticks(range(len(names)), [f"{task.replace('_', ' ')}, {mode}" for task, mode in reversed(names)])
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy, with 95 % intervals")
    _legend(axes)
