#!/usr/bin/env python3
"""The rate from L2 to shared memory by tensor copies, to 1, 2 or 4 blocks of a cluster at once (``l2_rate.cu``).

Builds that program with nvcc (sm_90a), runs it on the first GPU, and writes what it found as a results file of kind
``l2_rate``: raw samples, and for every case how many words arrived otherwise than they lie in memory. Exit codes: 0;
1 a case was wrong, or the program failed; 2 no compiler, no Hopper GPU, bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from kvcomp import results

SOURCE = Path(__file__).with_suffix(".cu")
ROOT = SOURCE.parents[1]
BUILD = [
    "-gencode=arch=compute_90a,code=sm_90a", '-DKVC_CUDA_ARCHS="90a"', "-std=c++17", "-O3",
    f"-I{ROOT / 'cuda'}", f"-I{ROOT / 'csrc'}",
]  # fmt: skip
METRIC = "words that arrived otherwise than they lie in memory"


class Refused(Exception):
    """A sentence, and the exit code."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def main() -> int:
    parser = argparse.ArgumentParser(description="L2 to shared memory by TMA, multicast to 1, 2 and 4 blocks.")
    parser.add_argument("--samples", type=int, default=20, help="launches of every case (default: 20)")
    parser.add_argument("--program", type=Path, help="l2_rate.cu as it was built before (default: nvcc builds it)")
    parser.add_argument("--output", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    try:
        if options.samples < 1:
            raise Refused(2, f"--samples: expected 1 or more, got {options.samples}")
        if options.output is not None:
            results.check_writable(options.output, "--output")
        found = measured(options.program, options.samples)
    except (Refused, ValueError, OSError) as reason:
        print(f"l2_rate: {reason}", file=sys.stderr)
        return reason.code if isinstance(reason, Refused) else 2
    for cell in found["cells"]:
        print(line(cell))
    if options.output is not None:
        results.write(options.output, found)
    for sentence in results.failures(found):
        print(f"l2_rate: {sentence}", file=sys.stderr)
    return 1 if results.failures(found) else 0


def measured(program: Path | None, samples: int) -> dict[str, Any]:
    """A results object of the program's lines."""
    found = results.new("l2_rate", command=" ".join(["python", *sys.argv]))
    with tempfile.TemporaryDirectory() as folder:
        said = run(built(Path(folder)) if program is None else program, str(samples))
    for text in said.splitlines():
        found["cells"].append(cell_of(json.loads(text)))
    return found


def cell_of(facts: dict[str, Any]) -> dict[str, Any]:
    """Of a line that the program printed."""
    case = {name: facts.pop(name) for name in ("mode", "multicast", "columns")}
    error = {"metric": METRIC, "value": facts.pop("wrong_words"), "bound": 0}
    taken = median(facts["samples_us"])
    rates = {f"tb_per_s_{name}": facts[f"bytes_{name}"] / taken / 1e6 for name in ("filled", "read")}
    if flops := facts.pop("flops"):
        rates["tflops"] = flops / taken / 1e6
    return results.cell("TMA", case, error=error, median_us=taken, **facts, **rates)


def built(folder: Path) -> Path:
    nvcc = shutil.which("nvcc") or shutil.which(
        "nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    )
    if nvcc is None:
        raise Refused(2, "nvcc: expected a CUDA compiler on PATH or in CUDA_HOME, got none")
    program = folder / "l2_rate"
    run(nvcc, *BUILD, str(SOURCE), "-o", str(program))
    return program


def run(program: str | Path, *arguments: str) -> str:
    """What it prints; Refused with what it says where it fails."""
    try:
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    except OSError as reason:
        raise Refused(2, f"--program: expected a program that runs here, got {program}") from reason
    if done.returncode:
        said = (done.stderr.strip() or f"{program}: expected success, got exit code {done.returncode}").splitlines()[0]
        raise Refused(2 if done.returncode == 2 else 1, said.removeprefix("l2_rate: "))
    return done.stdout


def line(cell: dict[str, Any]) -> str:
    case = cell["case"]
    said = (
        f"{case['mode']}, {case['columns']} columns, to {case['multicast']}: {cell['tb_per_s_filled']:.2f} TB/s filled"
    )
    said += f", {cell['tb_per_s_read']:.2f} from L2"
    return said + (f", at most {cell['tflops']:.0f} TFLOPS" if "tflops" in cell else "")


if __name__ == "__main__":
    sys.exit(main())
