"""``python -m kvcomp.bench.offline --config_id C4``: speed, memory and energy of configurations of the matrix.

Every repeat is a process of its own, which loads the model once and answers every prompt length at every output length
(kvcomp.bench.offline_repeat). Several configurations take turns, repeat by repeat. Written are:

    OUT/raw/<config>-r<i>-<8 hex>.jsonl     what was measured, a record for every cell; whole or not at all
    OUT/summary/<config>_<8 hex>_flat.csv   a row for every cell and repeat
    OUT/summary/<config>_<8 hex>_agg.csv    their means and 95 % intervals

The eight digits are of the settings, the versions and the machine: the same command goes on where it was stopped, at
the first repeat that is not there, and measures anew, beside the former files, once the summary is written.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import results
from ..errors import one_line
from ..experiment import places
from ..w4 import arms, matrix
from . import offline_repeat, offline_table

BAD_INPUT = 2
INTERRUPTED = 130
WORKLOADS = ("offline_batch_decode", "long_context_stress")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, NotImplementedError, OSError) as reason:
        print(f"offline: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvcomp.bench.offline",
        description="Time to the first token, time per token, throughput, memory and energy of configurations.",
    )
    parser.add_argument("--config", type=Path, help="experiment matrix (default: the shipped one)")
    parser.add_argument("--config_id", required=True, nargs="+", metavar="ID",
                        help="C0, C4, ...; C5 runs as C5_m0, C5_m3 and C5_m5")  # fmt: skip
    parser.add_argument("--repeats", type=int, help="processes of each (default: the matrix's)")
    parser.add_argument("--out_dir", type=Path, default=Path("results"), help="default: results")
    parser.add_argument("--workload", choices=[*WORKLOADS, "online_serving"], default=WORKLOADS[0])
    parser.add_argument("--prompt_lens", type=int, nargs="+", help="instead of the workload's")
    parser.add_argument("--output_lens", type=int, nargs="+", help="instead of the workload's")
    offline_repeat.add_subject(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """The exit code of the last process that failed, else BAD_INPUT where a configuration was refused, else 0. A
    configuration that is refused or fails keeps no other from being measured."""
    path = options.config or places.shipped(matrix.MATRIX, "--config")
    loaded = matrix.load(path)
    asked = list(dict.fromkeys(arm for name in options.config_id for arm in loaded.arms(name)))
    prompts, outputs, leave_out = lengths(loaded, options.workload)
    prompts, outputs = options.prompt_lens or prompts, options.output_lens or outputs
    repeats = loaded.workloads.offline_batch_decode.repeats if options.repeats is None else options.repeats
    if repeats < 1:
        raise ValueError(f"--repeats: expected 1 or more, got {repeats}")
    results.check_writable(options.out_dir / "raw" / "a.jsonl", "--out_dir")
    device = offline_repeat.device_of(options.device)
    fairness = loaded.fairness_constraints
    shared = ["--prompt_lens", *map(str, prompts), "--output_lens", *map(str, outputs)]
    shared += ["--warmup_runs", str(fairness.warmup_runs), "--device", device.type]
    shared += ["--kv_cache_dtype", options.kv_cache_dtype or fairness.kv_cache_dtype]
    shared += ["--seed", str(fairness.decoding.seed if options.seed is None else options.seed)]
    shared += ["--leave_out"] if leave_out else []
    if options.model_shape is None:
        shared += ["--model", options.model or str(places.shipped(places.MODEL, "--model", beside=path))]
    else:
        shared += ["--model_shape", options.model_shape]
    shared += ["--model2", options.model2] if options.model2 else []
    code = 0
    runs: list[Run] = []
    for arm in asked:
        missing, refused = arms.why_not(arm), arms.why_refused(arm, device)
        if missing is not None:
            print(f"offline: {arm.config_id} is skipped: {missing}", file=sys.stderr)
        elif refused is not None:
            print(f"offline: {arm.config_id} is refused: {refused}", file=sys.stderr)
            code = BAD_INPUT
        else:
            runs.append(begin(arm, shared, options.out_dir))
    for repeat in range(repeats):
        for one in list(runs):
            failed = one.measure(repeat, repeats)
            if failed:
                print(f"offline: {one.arm.config_id}: a repeat ended with exit code {failed}", file=sys.stderr)
                code = failed if failed > 0 else 1
                runs.remove(one)
            if failed == INTERRUPTED:
                return code
    for one in runs:
        one.summarize(repeats, loaded.metrics.performance)
    return code


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


@dataclass(frozen=True)
class Run:
    """The repeats of one configuration. ``token``: eight digits that its files are named by."""

    arm: matrix.Arm
    shared: Sequence[str]
    out: Path
    token: str

    def raw(self, repeat: int) -> Path:
        return self.out / "raw" / f"{self.arm.config_id}-r{repeat}-{self.token}.jsonl"

    def flat(self) -> Path:
        return self.out / "summary" / f"{self.arm.config_id}_{self.token}_flat.csv"

    def measure(self, repeat: int, repeats: int) -> int:
        """A process, unless an earlier run of the command has its records already -> its exit code."""
        arm, raw = self.arm, self.raw(repeat)
        there = " is there" if raw.exists() else ""
        print(f"{arm.config_id}: repeat {repeat + 1} of {repeats}{there}", file=sys.stderr, flush=True)
        if there:
            return 0
        ended = subprocess.run(
            [
                sys.executable, "-m", "kvcomp.bench.offline_repeat", *self.shared,
                "--quant_mode", arm.mode, "--scale_mbits", str(arm.scale_mbits), "--group_size", str(arm.group_size),
                "--quant_target", arm.quant_target, "--rounding", arm.rounding, "--dtype", arm.dtype,
                "--out_jsonl", str(raw), "--run_id_prefix", raw.stem,
            ],
            check=False,
        )  # fmt: skip
        return ended.returncode

    def summarize(self, repeats: int, metrics: Sequence[str]) -> None:
        rows = [
            offline_table.flat_row(record, self.arm.config_id, repeat)
            for repeat in range(repeats)
            for record in read_records(self.raw(repeat))
            if record["result"] is not None
        ]
        offline_table.write(self.flat(), rows, offline_table.FLAT)
        print(f"{self.arm.config_id}: {self.flat()}")
        if rows:
            aggregated = self.flat().with_name(self.flat().name.replace("_flat", "_agg"))
            offline_table.write(aggregated, offline_table.aggregate(rows, metrics))
            print(f"{self.arm.config_id}: {aggregated}")


def begin(arm: matrix.Arm, shared: Sequence[str], out: Path) -> Run:
    """The first run of these settings that has no summary: one that was stopped, or a new one."""
    settings = [asdict(arm), list(shared), results.versions(), results.machine()]
    for number in itertools.count():
        token = hashlib.sha256(json.dumps([settings, number], sort_keys=True).encode()).hexdigest()[:8]
        made = Run(arm, shared, out, token)
        if not made.flat().exists():
            return made
    raise AssertionError


def read_records(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
