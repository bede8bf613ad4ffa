"""Measuring methods on a model: units of work -> a results object, the uncompressed model's cells beside the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from .. import results
from ..eval import perplexity
from ..eval.quality import Method
from . import workload as work
from .config import ExperimentConfig, to_policy
from .keys import configured_and_effective
from .resume import Interrupted, Units

BASELINE = Method("bf16", 1.0)
_BOOTSTRAPS = 2000
# (units in all, units done before) -> a context that gives what to call with the name of each unit that is done.
Track = Callable[[int, int], AbstractContextManager[Callable[[str], None]]]


def depends_on(subject: work.Subject, workload: work.Workload, methods: Sequence[Method]) -> dict[str, Any]:
    """Everything that the figures of a run depend on, as JSON values: two runs alike in it may share units."""
    files = sorted(path for path in subject.path.iterdir() if path.is_file())
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {
        "model": weights,
        "text": hashlib.sha256(subject.text.encode()).hexdigest(),
        "workload": asdict(workload),
        "methods": [repr(method) for method in methods],
        "versions": results.versions(),
    }


def run(
    config: ExperimentConfig,
    subject: work.Subject,
    workload: work.Workload,
    *,
    name: str,
    command: str,
    report: Path | None,
    track: Track,
) -> tuple[dict[str, Any], Units]:
    """The results object of one experiment on a model, with the seed's fields at its top level; and the units it is
    made of, to be finished when the object has been written. ``Interrupted`` on Ctrl-C.
    """
    if config.selector.importance != "attention":
        raise ValueError(
            "config: selector.importance: expected attention, as a model's queries are at hand, got key_norm"
        )
    refuse_metrics(config)
    methods = [BASELINE]
    if not config.uncompressed:
        policy = to_policy(config, prompt_tokens=workload.length, seed=workload.seed)
        methods.append(Method(name, config.budget.target_compression_ratio, policy))
    found, done, kept = _measured(subject, workload, methods, command, report, track)
    measured = methods[-1]
    cells = {entry["case"]["method"]: entry for entry in found["cells"] if entry["case"]["task"] == "held_out"}
    found.update(_headline(cells[BASELINE.name], cells[measured.name]))
    found["method"] = measured.name
    found["accuracy"] = {
        method.name: {mode: _pooled(done, method.name, mode) for mode in ("aware", "agnostic")} for method in methods
    }
    drop = accuracy_drop(done, measured.name, seed=workload.seed)
    found["accuracy_drop"] = drop
    found["limits"] = limits(
        config, throughput_gain=found["throughput_gain"], accuracy_drop=drop["mean"] if drop else None
    )
    plan = cells[measured.name].get("plan")
    found["config"] = config.model_dump(mode="json")
    found["keys"] = configured_and_effective(config, workload.length, plan, found["compression_ratio"])
    return found, kept


def compare(
    subject: work.Subject,
    workload: work.Workload,
    methods: Sequence[Method],
    *,
    command: str,
    report: Path | None,
    track: Track,
) -> tuple[dict[str, Any], Units]:
    """The same of several methods beside the uncompressed cache."""
    found, done, kept = _measured(subject, workload, [BASELINE, *methods], command, report, track)
    found["accuracy_drop"] = {method.name: accuracy_drop(done, method.name, seed=workload.seed) for method in methods}
    return found, kept


def refuse_metrics(config: ExperimentConfig) -> None:
    """Typed-in figures belong to simulations alone."""
    if config.metrics:
        raise ValueError(f"config: metrics.{min(config.metrics)}: expected measured figures only, got a typed-in one "
                         "(metrics are for --simulate)")  # fmt: skip


def _measured(
    subject: work.Subject,
    workload: work.Workload,
    methods: Sequence[Method],
    command: str,
    report: Path | None,
    track: Track,
) -> tuple[dict[str, Any], dict[str, Any], Units]:
    work.check(subject, workload)
    kept = Units(report, depends_on(subject, workload, methods))
    found = results.new("quality", command=command)
    try:
        with track(len(work.units(subject, workload, methods)), kept.resumed) as advance:
            done = work.measure(subject, workload, methods, kept, advance)
    except KeyboardInterrupt:
        raise Interrupted(kept.kept()) from None
    found["workload"] = asdict(workload)
    found["cells"] = [cell for method in methods for cell in _cells(subject, workload, method, done)]
    return found, done, kept


def _cells(
    subject: work.Subject, workload: work.Workload, method: Method, done: Mapping[str, Any]
) -> list[dict[str, Any]]:
    case = {
        "model": subject.path.name,
        "method": method.name,
        "target_ratio": method.target_ratio,
        "seed": workload.seed,
        "s": workload.length,
    }
    cells = [_text_cell(method, case, [part[method.name] for name, part in done.items() if name.startswith("text/")])]
    for family in workload.families:
        for mode in ("aware", "agnostic"):
            parts = task_parts(done, method.name, mode, family)
            if parts:
                cells.append(_task_cell(method, {**case, "task": family, "mode": mode}, parts))
    return cells


def impl(method: Method) -> str:
    return "transformers DynamicCache" if method.policy is None else "kvcomp"


def budget_error(method: Method, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest share of its byte budget that a cache took: at most 1."""
    worst = max(part["nbytes"] / (part["bf16_bytes"] / method.target_ratio) for part in parts)
    # A model of 32-bit floats keeps twice the bf16 bytes without compression.
    bound = 1.0 if method.policy is not None else max(1.0, worst)
    return {"metric": "allocated bytes / byte budget", "value": worst, "bound": bound}


def mean_bytes(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    nbytes, whole = fmean([part["nbytes"] for part in parts]), fmean([part["bf16_bytes"] for part in parts])
    return {"nbytes": nbytes, "bf16_bytes": whole, "ratio": whole / nbytes}


def task_parts(done: Mapping[str, Any], method: str, mode: str, family: str | None = None) -> list[dict[str, Any]]:
    found = []
    for name, part in done.items():
        kind, *rest = name.split("/")
        if kind == "task" and rest[1] == mode and rest[3] == method and family in (None, rest[0]):
            found.append(part)
    return found


def _task_cell(method: Method, case: dict[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [score for part in parts for score in part["scores"]]
    prefill = [part["prefill_ms"] for part in parts]
    return results.cell(
        impl(method),
        case,
        error=budget_error(method, parts),
        **accuracy_of(scores),
        contexts=len(parts),
        scores=scores,
        **mean_bytes(parts),
        ttft_ms=median(prefill),
        ttft_samples_ms=prefill,
    )


def accuracy_of(scores: Sequence[float]) -> dict[str, Any]:
    return {"accuracy": fmean(scores), "n": len(scores), "ci95": list(results.wilson(fmean(scores), len(scores)))}


def _pooled(done: Mapping[str, Any], method: str, mode: str) -> dict[str, Any] | None:
    """Accuracy over all questions of a mode."""
    scores = [score for part in task_parts(done, method, mode) for score in part["scores"]]
    return accuracy_of(scores) if scores else None


def _text_cell(method: Method, case: dict[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses, divergences, agreements = ([x for part in parts for x in part[name]] for name in ("losses", "kl", "top1"))
    prefill, token = [part["prefill_ms"] for part in parts], [ms for part in parts for ms in part["token_ms"]]
    values: dict[str, Any] = {
        "perplexity": perplexity.perplexity(losses),
        "kl": fmean(divergences),
        "top1_agreement": fmean(agreements),
        "n": len(losses),
        **mean_bytes(parts),
        "ttft_ms": median(prefill),
        "ttft_samples_ms": prefill,
        "tpot_ms": median(token) if token else None,
        "tpot_samples_ms": token,
        "losses": losses,
    }
    if "errors" in parts[0]:
        values.update(_mean_of([part["errors"] for part in parts]))
        values["ledger"] = _mean_of([part["ledger"] for part in parts])
        values["plan"] = _mean_of([part["plan"] for part in parts])
        values["kept_fraction"] = values["plan"]["kept_fraction"]
        elements = sum(part["bf16_bytes"] / 2 * part["plan"]["kept_fraction"] for part in parts)
        # Everything allocated, per element of a kept token.
        values["bits_per_element"] = 8 * sum(part["nbytes"] for part in parts) / elements
    return results.cell(
        impl(method),
        {**case, "task": "held_out", "mode": "continuation"},
        error=budget_error(method, parts),
        **values,
    )


def _mean_of(parts: Sequence[Any]) -> Any:
    """Numbers averaged, place by place, in dicts and lists of one form; what is no number is the first's."""
    first = parts[0]
    if isinstance(first, dict):
        names = list(dict.fromkeys(name for part in parts for name in part))
        return {name: _mean_of([part.get(name, 0) for part in parts]) for name in names}
    if isinstance(first, list):
        return [_mean_of(list(items)) for items in zip(*parts, strict=True)]
    if isinstance(first, bool) or not isinstance(first, int | float):
        return first
    return fmean(parts)


def _headline(base: Mapping[str, Any], packed: Mapping[str, Any]) -> dict[str, Any]:
    """The seed's fields (MiB, ms), of the held-out text at prompt length; allocated bytes on both sides of the ratio's
    definition: bf16 bytes of the prompt / what the cache holds."""
    gain = base["tpot_ms"] / packed["tpot_ms"] if base["tpot_ms"] and packed["tpot_ms"] else None
    whole, held = packed["bf16_bytes"], packed["nbytes"]
    return {
        "memory_reduction": 1 - held / whole,
        "original_mb": whole / results.MIB,
        "compressed_mb": held / results.MIB,
        "throughput_gain": gain,
        "ttft_delta_ms": packed["ttft_ms"] - base["ttft_ms"],
        "tpot_delta_ms": None if gain is None else packed["tpot_ms"] - base["tpot_ms"],
        "compression_ratio": whole / held,
    }


def limits(
    config: ExperimentConfig, *, throughput_gain: float | None, accuracy_drop: float | None
) -> dict[str, dict[str, Any]]:
    """The acceptance limits beside what was measured: met, missed, or (None) not measured."""
    least, most = config.budget.min_throughput_gain, config.budget.max_accuracy_drop
    return {
        "min_throughput_gain": {
            "limit": least,
            "measured": throughput_gain,
            "met": None if throughput_gain is None else throughput_gain >= least,
        },
        "max_accuracy_drop": {
            "limit": most,
            "measured": accuracy_drop,
            "met": None if accuracy_drop is None else accuracy_drop <= most,
        },
    }


def accuracy_drop(
    done: Mapping[str, Any], method: str, *, seed: int, base: str = BASELINE.name
) -> dict[str, Any] | None:
    """Accuracy of the uncompressed cache (or of ``base``) less the method's, over all questions, each asked of both.

    With a 95 % bootstrap interval over contexts, as the questions of one are not independent. None without questions.
    """
    pairs = [
        (part["scores"], done[name.rsplit("/", 1)[0] + "/" + method]["scores"])
        for name, part in done.items()
        if name.startswith("task/") and name.endswith("/" + base)
    ]
    if not pairs:
        return None
    differences = np.array([sum(first) - sum(other) for first, other in pairs])
    counts = np.array([len(first) for first, _ in pairs])
    chosen = np.random.default_rng(seed).integers(0, len(pairs), (_BOOTSTRAPS, len(pairs)))
    drops = differences[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(drops, [0.025, 0.975]).tolist()
    total = float(differences.sum() / counts.sum())
    return {"mean": total, "ci95": [low, high], "n": int(counts.sum()), "contexts": len(pairs)}
