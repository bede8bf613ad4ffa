"""Results files: one JSON object per benchmark or experiment, with raw samples, machine, versions and origin.

Tables, plots and README figures are made from such files only. Layout: ``new`` for the head, ``cells`` for what was
measured; a cell states its error, and ``failures`` lists the cells that have none or exceed their bound.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .env import environment

SCHEMA = "kvcomp.results/1"
MIB = 1024.0 * 1024.0
_AND = " && "  # between the commands of several runs
Origin = Literal["measured", "simulated"]


def new(kind: str, *, command: str, origin: Origin = "measured") -> dict[str, Any]:
    """The head of a results object, with no cells yet. ``command`` is what a reader types to make the file again."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "origin": origin,
        "cells": [],
    }


def continued(
    found: dict[str, Any], before: dict[str, Any] | None, alike: Sequence[str], tell: Callable[[str], object]
) -> dict[str, Any]:
    """``before``, a file's object, with the command of ``found`` behind its own, where what ``alike`` names is the same
    in both; else ``found``, and ``tell`` is told what is not."""
    if before is None:
        return found
    other = [name for name in alike if before.get(name) != found[name]]
    if other:
        tell(f"what there was is of other {' and '.join(other)}: everything is measured anew")
        return found
    commands, command = before["command"].split(_AND), found["command"]
    return before | {"command": _AND.join(commands + [command] * (command not in commands))}


def machine() -> dict[str, Any]:
    """What ran: processor, usable cores, memory in bytes, and the GPUs and their driver where there are any.

    Names of hosts and users are left out.
    """
    found = environment()
    devices = found["cuda"]["devices"]
    return {
        "cpu": found["cpu"]["name"],
        "cores": found["cpu"]["cores"],
        "simd": found["cpu"]["simd"],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": found["platform"],
        "gpu": ", ".join(device["name"] for device in devices) or None,
        "driver": found["cuda"]["driver"],
    }


def versions() -> dict[str, Any]:
    """Versions of kvcomp, its page format, its source (git), Python, CUDA and the libraries measured against."""
    found = environment()
    names = ("kvcomp", "page_format", "python", "numpy", "torch", "transformers")
    return {**{name: found[name] for name in names}, "cuda": found["cuda"]["runtime"], "git": _git_commit()}


def _git_commit() -> str | None:
    """Commit of the source tree this module lies in, with ``+changes`` where tracked files differ from it; in a copy
    without its history what ``KVCOMP_GIT_COMMIT`` says, or nothing."""
    here = Path(__file__)
    run = functools.partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True)
    try:
        run(["git", "ls-files", "--error-unmatch", here.name])
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("KVCOMP_GIT_COMMIT")
    return commit + ("+changes" if changed else "")


def cell(impl: str, case: Mapping[str, Any], *, error: Mapping[str, Any] | None, **values: Any) -> dict[str, Any]:
    """One measured cell. ``error`` is {metric, value, bound}; only a ceiling (``role="ceiling"``) has none."""
    return {"impl": impl, "case": dict(case), **values, "error": None if error is None else dict(error)}


def failures(results: Mapping[str, Any]) -> list[str]:
    """One sentence for every cell without its error, or whose error is over its bound (or not a number)."""
    found = []
    for entry in results["cells"]:
        name = f"{entry['impl']} {json.dumps(entry['case'], sort_keys=True)}"
        error = entry.get("error")
        if error is None:
            if entry.get("role") != "ceiling":
                found.append(f"{name}: no error was measured")
        elif not error["value"] <= error["bound"]:
            found.append(f"{name}: {error['metric']}: expected at most {error['bound']:.3g}, got {error['value']:.3g}")
    return found


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all: beside its place first, then renamed. Missing folders are made.

    Raises ValueError for NaN and infinities, which JSON has no words for; OSError where the file cannot be written.
    """
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    # Lists of numbers (raw samples) on one line each.
    text = re.sub(r"\[\s+([-+.,\deE\s]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def replace(path: Path, save: Callable[[Path], object]) -> None:
    """Call ``save`` with a path beside ``path``, then rename what it wrote; on failure nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        save(part)
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: Path, flag: str) -> None:
    """Raise ValueError unless a file can be written at ``path``: asked before long work, changing nothing."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: expected the name of a file that can be written, got {path}")


def read(path: Path, *, kind: str | None = None) -> dict[str, Any]:
    """A results object from its file.

    Raises ValueError for a file that is not one, or of another schema or kind; OSError where it cannot be read.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise ValueError(f"results: {path}: expected a JSON object, got a foreign or truncated file") from reason
    schema = loaded.get("schema") if isinstance(loaded, dict) else type(loaded).__name__
    if schema != SCHEMA:
        raise ValueError(f"results: {path}: expected schema {SCHEMA}, got {schema}")
    if kind is not None and loaded.get("kind") != kind:
        raise ValueError(f"results: {path}: expected a file of kind {kind}, got {loaded.get('kind')}")
    return dict(loaded)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a mean of n scores in [0, 1], taken as independent.

    Exact in kind for right-or-wrong scores, wider than needed for scores in between, whose variance is smaller.
    """
    z = 1.959964
    spread = z * z / n
    centre = (mean + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(mean * (1 - mean) / n + spread / (4 * n))
    # At the ends the interval begins or ends there, but for rounding.
    return 0.0 if mean == 0 else max(0.0, centre - half), 1.0 if mean == 1 else min(1.0, centre + half)
