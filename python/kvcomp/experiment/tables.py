"""Tables in Markdown files, made from results files and from nothing else.

A table stands between two comments, the first of which names it: ``<!-- table: quality -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .. import results
from ..bench.offline_table import read_aggregated
from . import policies_report, report, tables_bsr, tables_gpu, tables_w4
from .report import markdown

_POLICIES = Path("experiments/results/policies.json")
_FRESH = Path("experiments/results/policies_seed6000.json")  # the best single methods of the former on other prompts
_H200 = Path("experiments/results/h200")

# Name of a table -> the results file it is made from, that file's kind, and the rows it shows.
SOURCES = {
    "quality": (Path("experiments/results/tiny_quality.json"), "quality", "quality"),
    "quality_fresh": (Path("experiments/results/tiny_quality_seed1000.json"), "quality", "quality"),
    "tasks": (Path("experiments/results/tiny_quality.json"), "quality", "tasks"),
    "attend": (Path("experiments/results/cpu/attend.json"), "attend", "attend"),
    **{name: (_POLICIES, "quality", name) for name in ("policies", "policies_text", "policies_gain", "coding")},
    **{f"{name}_fresh": (_FRESH, "quality", name) for name in ("policies", "policies_gain", "policies_goals")},
    **{name: (_H200 / f"{name.split('_')[0]}.json", name.split("_")[0], name) for name in tables_gpu.ROWS},
    "decode_w4": (_H200 / "decode_w4.json", "decode", "decode"),
    "decode_w4_shares": (_H200 / "decode_w4.json", "decode", "decode_shares"),
    **{name: (_H200 / "bsr.json", "bsr", name) for name in tables_bsr.ROWS},
    "l2_rate": (_H200 / "l2_rate.json", "l2_rate", "l2_rate"),
    "bsr_cpu": (Path("experiments/results/cpu/bsr.json"), "bsr", "bsr_rivals"),
    **tables_w4.SOURCES,
}
ROWS = {
    **report.ROWS,
    **policies_report.ROWS,
    **tables_gpu.ROWS,
    **tables_bsr.ROWS,
    **tables_bsr.OTHER_ROWS,
    **tables_w4.ROWS,
}
_TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def render(text: str, folder: Path) -> str:
    """The text with every table made anew from the results files under ``folder``.

    ValueError for a table of an unknown name, or a file that is no results file of its kind; OSError without a file.
    """

    def table(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in SOURCES:
            raise ValueError(f"tables: {name}: expected a table named {', '.join(SOURCES)}, got another")
        path, kind, rows = SOURCES[name]
        return begin + markdown(*ROWS[rows](_read(folder / path, kind))) + end

    return _TABLE.sub(table, text)


def _read(path: Path, kind: str) -> dict[str, Any]:
    """A results object; of a CSV file, which has no head, its rows."""
    return {"rows": read_aggregated(path)} if path.suffix == ".csv" else results.read(path, kind=kind)
