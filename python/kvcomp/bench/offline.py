"""``python -m kvcomp.bench.offline --config_id C4``: speed, memory and energy of a configuration of the matrix.

Every repeat is a process of its own, which loads the model once and answers every prompt length at every output length
(kvcomp.bench.offline_repeat). Written are:

    OUT/raw/<config>-r<i>-<8 hex>.jsonl     what was measured, a record for every cell
    OUT/summary/<config>_<8 hex>_flat.csv   a row for every cell and repeat
    OUT/summary/<config>_<8 hex>_agg.csv    their means and 95 % intervals
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import results
from ..experiment import places
from ..w4 import arms, matrix
from . import offline_repeat, offline_table

BAD_INPUT = 2
WORKLOADS = ("offline_batch_decode", "long_context_stress")


class Failed(Exception):
    """A repeat's process ended with this code, and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a repeat ended with exit code {code}")
        self.code = code


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return run(options)
    except Failed as failed:
        print(f"offline: {failed}", file=sys.stderr)
        return failed.code if 0 < failed.code < 256 else 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, NotImplementedError, OSError) as reason:
        print(f"offline: {' '.join(str(reason).split())}", file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvcomp.bench.offline",
        description="Time to the first token, time per token, throughput, memory and energy of one configuration.",
    )
    parser.add_argument("--config", type=Path, help="experiment matrix (default: the shipped one)")
    parser.add_argument("--config_id", required=True, help="C0, C4, ...; C5 runs as C5_m0, C5_m3 and C5_m5")
    parser.add_argument("--repeats", type=int, help="processes (default: the matrix's)")
    parser.add_argument("--out_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--workload", choices=[*WORKLOADS, "online_serving"], default=WORKLOADS[0])
    parser.add_argument("--prompt_lens", type=int, nargs="+", help="instead of the workload's")
    parser.add_argument("--output_lens", type=int, nargs="+", help="instead of the workload's")
    offline_repeat.add_subject(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    path = options.config or places.shipped(matrix.MATRIX, "--config")
    loaded = matrix.load(path)
    arms_asked = loaded.arms(options.config_id)
    prompts, outputs, leave_out = lengths(loaded, options.workload)
    prompts, outputs = options.prompt_lens or prompts, options.output_lens or outputs
    repeats = loaded.workloads.offline_batch_decode.repeats if options.repeats is None else options.repeats
    if repeats < 1:
        raise ValueError(f"--repeats: expected 1 or more, got {repeats}")
    results.check_writable(options.out_dir / "raw" / "a.jsonl", "--out_dir")
    fairness = loaded.fairness_constraints
    shared = ["--prompt_lens", *map(str, prompts), "--output_lens", *map(str, outputs)]
    shared += ["--warmup_runs", str(fairness.warmup_runs), "--device", options.device]
    shared += ["--kv_cache_dtype", options.kv_cache_dtype or fairness.kv_cache_dtype]
    shared += ["--seed", str(fairness.decoding.seed if options.seed is None else options.seed)]
    shared += ["--leave_out"] if leave_out else []
    if options.model_shape is None:
        shared += ["--model", options.model or str(places.shipped(places.MODEL, "--model", beside=path))]
    else:
        shared += ["--model_shape", options.model_shape]
    shared += ["--model2", options.model2] if options.model2 else []
    for arm in arms_asked:
        reason = arms.why_not(arm)
        if reason is not None:
            print(f"offline: {arm.config_id} is skipped: {reason}", file=sys.stderr)
            continue
        measure(arm, shared, repeats, options.out_dir, loaded.metrics.performance)
    return 0


def lengths(loaded: matrix.Matrix, workload: str) -> tuple[list[int], list[int], bool]:
    """A workload's prompt lengths and output lengths, and whether what does not fit is left out."""
    if workload == "online_serving":
        raise NotImplementedError(
            f"--workload: expected one of {', '.join(WORKLOADS)}, got online_serving (which needs a server)"
        )
    if workload == "long_context_stress":
        stress = loaded.workloads.long_context_stress
        if stress is None:
            raise ValueError("--workload: expected one that the matrix has, got long_context_stress")
        return stress.prompts, [stress.output_len], stress.enabled_if_memory_allows
    usual = loaded.workloads.offline_batch_decode
    return usual.prompt_lengths, usual.output_lengths, False


def measure(
    arm: matrix.Arm, shared: Sequence[str], repeats: int, out: Path, metrics: Sequence[str]
) -> tuple[Path, list[offline_table.Row]]:
    """Runs the repeats of one configuration -> the flat summary's path, and its rows."""
    token = uuid.uuid4().hex[:8]
    rows: list[offline_table.Row] = []
    for repeat in range(repeats):
        name = f"{arm.config_id}-r{repeat}-{token}"
        raw = out / "raw" / f"{name}.jsonl"
        print(f"{arm.config_id}: repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        ended = subprocess.run(
            [
                sys.executable, "-m", "kvcomp.bench.offline_repeat", *shared,
                "--quant_mode", arm.mode, "--scale_mbits", str(arm.scale_mbits), "--group_size", str(arm.group_size),
                "--quant_target", arm.quant_target, "--rounding", arm.rounding, "--dtype", arm.dtype,
                "--out_jsonl", str(raw), "--run_id_prefix", name,
            ],
            check=False,
        )  # fmt: skip
        if ended.returncode != 0:
            raise Failed(ended.returncode)
        rows += [
            offline_table.flat_row(record, arm.config_id, repeat)
            for record in read_records(raw)
            if record["result"] is not None
        ]
    summary = out / "summary"
    flat = summary / f"{arm.config_id}_{token}_flat.csv"
    offline_table.write(flat, rows, offline_table.FLAT)
    print(f"{arm.config_id}: {flat}")
    if rows:
        aggregated = summary / f"{arm.config_id}_{token}_agg.csv"
        offline_table.write(aggregated, offline_table.aggregate(rows, metrics))
        print(f"{arm.config_id}: {aggregated}")
    return flat, rows


def read_records(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
