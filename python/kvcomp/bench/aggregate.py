"""``python scripts/aggregate_results.py``: repeats of the offline bench become means with their 95 % intervals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import results
from ..errors import one_line
from . import offline_table

BAD_INPUT = 2


def collect(folder: Path, config_ids: Sequence[str] | None = None) -> list[offline_table.Row]:
    """The flat rows of a summary folder, of these configurations or of all. Aggregated files (``*_agg.csv``), which lie
    beside them, are left alone; one that has another name is an error, and so is a configuration without rows."""
    if not folder.is_dir():
        raise ValueError(f"--summary_dir: expected a folder of summaries, got {folder}")
    rows: list[offline_table.Row] = []
    for path in sorted(folder.glob("*.csv")):
        if not path.name.endswith("_agg.csv"):
            rows += offline_table.read_flat(path)
    known = sorted({row["config_id"] for row in rows})
    for name in config_ids or ():
        if name not in known:
            raise ValueError(f"--config_ids: expected among {', '.join(known) or 'none'} (in {folder}), got {name}")
    return [row for row in rows if config_ids is None or row["config_id"] in config_ids]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aggregate_results.py",
        description="Mean, standard deviation and 95 % interval over repeats, per model, configuration, prompt and "
        "output length, from the *_flat.csv files of the offline bench.",
    )
    parser.add_argument("--summary_dir", type=Path, default=Path("results/summary"), help="default: results/summary")
    parser.add_argument("--config_ids", nargs="+", metavar="ID", help="configurations (default: all)")
    parser.add_argument("--out_csv", type=Path, default=Path("results/aggregate/table.csv"),
                        help="default: results/aggregate/table.csv")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        results.check_writable(options.out_csv, "--out_csv")
        rows = collect(options.summary_dir, options.config_ids)
        if not rows:
            raise ValueError(f"--summary_dir: expected runs in *_flat.csv files of the offline bench, got none in "
                             f"{options.summary_dir}")  # fmt: skip
        made = offline_table.aggregate(rows)
        offline_table.write(options.out_csv, made)
    except (ValueError, OSError) as reason:
        print(f"aggregate_results: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT
    print(f"{len(made)} rows of {len(rows)} runs: {options.out_csv}")
    return 0
