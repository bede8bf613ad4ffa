#!/usr/bin/env python
"""Fuzzes kvcomp: page headers, saved caches, experiment files, arguments. Exits with 1 on a finding.

    python fuzz/run.py --seconds 60                        all targets, the time shared out
    python fuzz/run.py --target saves --cases 100000       one; a path of a module with a function `target` will do
    python fuzz/run.py --seconds 600 --keep                and add to the corpus what found new ways

A finding is an exception that no contract names, a refusal that is no sentence or that changed something, a hang of
5 s, 3 GB of memory, or a crash. Its input is stored under --findings, with what was said about it beside it; once it is
fixed, it stays there, and tests/test_fuzz.py replays it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import corpus

_HANG, _MEMORY = 5, 3000  # seconds, MiB
_LIBRARIES = ("kvcomp", "atheris", "numpy", "pydantic", "PyYAML")


@dataclass
class Done:
    target: str
    cases: int
    seconds: float
    findings: list[str]


def main() -> int:
    options = _options()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # targets write a file a case
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as folder,
        ThreadPoolExecutor(options.processes) as pool,
    ):
        started, before = datetime.now(UTC), time.monotonic()
        done = list(pool.map(lambda target: _fuzz(target, Path(folder), options), options.target))
        seconds = time.monotonic() - before
    for one in done:
        print(f"{one.target}: {one.cases} cases in {one.seconds:.0f} s, {len(one.findings)} findings")
        for finding in one.findings:
            print(f"  {finding}")
    if options.report is not None:
        options.report.write_text(json.dumps(_report(done, started, seconds), indent=1) + "\n")
    return 1 if any(one.findings or one.cases == 0 for one in done) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzzes kvcomp.")
    parser.add_argument("--seconds", type=float, help="of all targets together (default: 60, or as --cases takes)")
    parser.add_argument("--cases", type=int, help="the most of each target")
    parser.add_argument("--target", nargs="+", default=corpus.TARGETS, help=f"default: {' '.join(corpus.TARGETS)}")
    parser.add_argument("--corpus", type=Path, default=corpus.FUZZ / "corpus")
    parser.add_argument("--findings", type=Path, default=corpus.FUZZ / "findings")
    parser.add_argument("--processes", type=int, default=2, help="at once (default: 2)")
    parser.add_argument("--keep", action="store_true", help="make the corpus anew, of what it has and what was found")
    parser.add_argument("--report", type=Path, help="write cases, seconds, findings and versions here, as JSON")
    options = parser.parse_args()
    for target in options.target:
        if not _module(target).is_file():
            parser.error(f"--target: expected {', '.join(corpus.TARGETS)}, or the path of a module, got {target}")
    if options.seconds is None and options.cases is None:
        options.seconds = 60.0
    return options


def _module(target: str) -> Path:
    return Path(target).resolve() if target.endswith(".py") else corpus.FUZZ / f"{target}.py"


def _fuzz(target: str, folder: Path, options: argparse.Namespace) -> Done:
    module = _module(target)
    name, folder = module.stem, folder / module.stem
    for part in ("old", "new", "seeds", "found", "merged"):
        (folder / part).mkdir(parents=True)
    for place, data in enumerate(corpus.read(options.corpus, name)):
        (folder / "old" / str(place)).write_bytes(data)
    limits = [f"-timeout={_HANG}", f"-rss_limit_mb={_MEMORY}", "-max_len=4096", "-print_final_stats=1"]
    limits += [] if options.cases is None else [f"-runs={options.cases}"]
    most = None
    if options.seconds is not None:
        most = max(1, round(options.seconds * options.processes / max(len(options.target), options.processes)))
        limits.append(f"-max_total_time={most}")
    before = time.monotonic()
    code, said = _run(module, folder, [*limits, f"-artifact_prefix={folder / 'found'}/", "new", "old", "seeds"], most)
    seconds = time.monotonic() - before
    cases = re.findall(r"^stat::number_of_executed_units: +(\d+)", said, re.M) or re.findall(r"^#(\d+)\t", said, re.M)
    findings = _stored(folder / "found", options.findings / name, said)
    if code and not findings:  # it did not even start, or hung where libFuzzer does not look
        findings = [" ".join(said.split()[-100:])]
    if options.keep and not findings:
        code, said = _run(module, folder, ["-merge=1", *limits[:2], "merged", "old", "new", "seeds"], None)
        if code:
            raise RuntimeError(f"fuzz: {name}: expected a merged corpus, got {' '.join(said.split()[-100:])}")
        corpus.write(options.corpus, name, [path.read_bytes() for path in (folder / "merged").iterdir()])
    return Done(name, int(cases[-1]) if cases else 0, seconds, findings)


def _run(module: Path, folder: Path, arguments: list[str], seconds: int | None) -> tuple[int, str]:
    """Exit code, and what was said."""
    environment = os.environ | {
        "KVCOMP_FUZZ_TARGET": str(module),
        "KVCOMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "TMPDIR": str(folder),
    }
    log = folder / "log"
    with log.open("wb") as file:
        command = [sys.executable, str(corpus.FUZZ / "one.py"), *arguments]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(None if seconds is None else seconds + 120)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    return code, log.read_text(errors="replace")


def _stored(found: Path, folder: Path, said: str) -> list[str]:
    """The inputs that were found, moved to where findings are kept; and a line for each."""
    lines = []
    for path in sorted(found.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
        start = min((said.find(text) for text in ("=== Uncaught Python", "ERROR: ") if text in said), default=0)
        (folder / f"{path.name}.txt").write_text(said[start:][-20000:])
        what = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Finding|Exit)\b.*|^SUMMARY: .*", said[start:], re.M)
        lines.append(f"{folder / path.name}: {' / '.join(what)[:400]}")
    return lines


def _report(done: list[Done], started: datetime, seconds: float) -> dict[str, Any]:
    return {
        "schema": "kvcomp.fuzz/1",
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "cases": sum(one.cases for one in done),
        "targets": {
            one.target: {"cases": one.cases, "seconds": round(one.seconds, 1), "findings": one.findings} for one in done
        },
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in _LIBRARIES},
    }


if __name__ == "__main__":
    sys.exit(main())
