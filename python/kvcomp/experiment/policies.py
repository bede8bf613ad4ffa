"""``kvcomp policies``: many methods on the same prompts, each of which is read by the model once.

A unit of work is one prompt (a task, or a window of text) with all methods (policies_units); several processes measure
units at once (policies_workers), and what they found becomes cells, a summary and goals (policies_results).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import results
from ..rotation import Rotation
from . import policies_results, runner
from . import workload as work
from .capture import capture
from .methods import BASELINE, Entry, chosen, listed
from .policies_units import units
from .policies_workers import Job, hand_out
from .resume import Interrupted, Units
from .runner import Track


def run(
    subject: work.Subject,
    text: Path,
    workload: work.Workload,
    ratios: Sequence[float],
    patterns: Sequence[str],
    *,
    jobs: int,
    limit_seconds: float | None,
    command: str,
    report: Path | None,
    track: Track,
) -> tuple[dict[str, Any], Units]:
    """The results object of the methods whose names match a pattern, beside the uncompressed cache, and the units it is
    made of, to be finished when the object has been written. ``Interrupted`` on Ctrl-C, and when ``limit_seconds`` are
    over.

    ``text``: the file of the subject's text, which the workers read.
    """
    work.check(subject, workload)
    entries = chosen(listed(ratios, workload.seed, rotations(subject, workload)), patterns)
    kept = Units(report, depends_on(subject, workload, entries))
    found = results.new("quality", command=command)
    names = list(units(subject, workload, entries))
    job = Job(subject.path, text, workload, entries)
    try:
        with track(len(names), kept.resumed) as advance:
            for name in filter(kept.__contains__, names):
                advance(name)
            missing = [name for name in names if name not in kept]
            for name, value in hand_out(job, missing, jobs, limit_seconds):
                kept.get(name, functools.partial(_given, value))
                advance(name)
    except KeyboardInterrupt:
        raise Interrupted(kept.kept()) from None
    if any(name not in kept for name in names):
        raise Interrupted(kept.kept())
    done = {name: kept.get(name, dict) for name in names}
    return policies_results.fill(found, subject, workload, [BASELINE, *entries], done), kept


def _given(value: Any) -> Any:
    return value


def depends_on(subject: work.Subject, workload: work.Workload, entries: Sequence[Entry]) -> dict[str, Any]:
    """What makes two runs share units: as ``runner.depends_on``, but alike on every machine with the same sources."""
    found = runner.depends_on(subject, workload, [])
    versions = found["versions"]
    package = Path(__file__).parents[1]
    source = hashlib.sha256()
    for path in sorted(path for part in (".", "hf", "eval") for path in (package / part).glob("*.py")):
        if path.name != "cli.py":
            source.update(path.read_bytes())
    return {
        **found,
        "methods": [entry.key for entry in entries],
        "versions": {
            **{name: versions[name] for name in ("kvcomp", "page_format", "transformers")},
            "torch": str(versions["torch"]).split("+")[0],
        },
        "source": source.hexdigest(),
    }


def rotations(subject: work.Subject, workload: work.Workload) -> dict[str, Rotation]:
    """Matrices to be compared with Hadamard's: random ones, and ones fitted to the text between the first two windows.
    ValueError where there is too little of it."""
    length, count = workload.length, workload.windows
    room = len(subject.text) - count * length
    size = min(length, room if count == 1 else room // (count - 1))
    if size < 64:
        raise ValueError(
            f"--text: expected room for 64 bytes between windows, to fit rotations to, got {len(subject.text)} bytes "
            f"for {count} windows of {length}"
        )
    tokens = subject.tokenizer(subject.text[length : length + size])["input_ids"]
    captured = capture(subject.model, torch.tensor(tokens, dtype=torch.int64))
    moments = [[layer.double().numpy() for layer in part] for part in (captured.query_moment, captured.value_moment)]
    heads, head_dim = moments[0][0].shape[:2]
    return {
        "random": Rotation.random(len(moments[0]), heads, head_dim, workload.seed),
        "calibrated": Rotation.calibrated(*moments),
    }
