"""Units of ``kvcomp policies`` -> cells, a summary of every method, the goals, and what the joint plan gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from .. import results
from ..eval import perplexity
from . import runner
from . import workload as work
from .methods import AUTOMATIC, BASELINE, SINGLE, Entry

Parts = Mapping[str, Any]  # of one method, by unit: "task/family/mode/seed/method" or "text/number/method"
_MODES = {"aware": ("aware",), "agnostic": ("agnostic",), "all": ("aware", "agnostic")}
_ERRORS = ("attention_output_error", "attention_output_error_of_dropping", "attention_output_error_of_quantizing")
# What was asked for: words, the method (group, label, ratio), mode, largest accuracy drop.
_GOALS: tuple[tuple[str, tuple[str, str, float | None], str, float], ...] = (
    ("4 bits, every token kept", ("quantize", "4 bits", None), "all", 0.005),
    ("4 bits with searched steps, every token kept", ("quantize", "4 bits, search", None), "all", 0.005),
    ("joint plan at 4x, agnostic", ("joint", AUTOMATIC, 4.0), "agnostic", 0.01),
    ("joint plan at 8x, aware", ("joint", AUTOMATIC, 8.0), "aware", 0.02),
    ("joint plan at 12x, aware", ("joint", AUTOMATIC, 12.0), "aware", 0.05),
)


def fill(
    found: dict[str, Any],
    subject: work.Subject,
    workload: work.Workload,
    entries: Sequence[Entry],
    done: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Completes a results object from all units: name -> method -> what was measured.

    A method whose budget could not be met on some prompt has no cells; ``infeasible`` says which ratio it can meet.
    """
    found["workload"] = {**vars(workload), "families": list(workload.families)}
    found["infeasible"] = _infeasible(entries, done)
    out = {(entry["group"], entry["method"], entry["target_ratio"]) for entry in found["infeasible"]}
    feasible = [entry for entry in entries if _place(entry) not in out]
    parts = {
        entry.name: {
            f"{unit}/{entry.name}": values[entry.name] for unit, values in done.items() if entry.name in values
        }
        for entry in feasible
    }
    for entry in feasible:
        found["cells"] += _cells(subject, workload, entry, parts[entry.name])
    summaries = {entry.name: _summary(entry, workload.seed, parts) for entry in feasible}
    found["summary"] = list(summaries.values())
    ratios = list(dict.fromkeys(entry.target_ratio for entry in entries if entry.group == "joint"))
    best = (_best_single(ratio, feasible, summaries, parts, workload.seed) for ratio in ratios)
    found["best_single"] = [one for one in best if one is not None]
    found["goals"] = goals(found)
    return found


def _place(entry: Entry) -> tuple[str, str, float | None]:
    return entry.group, entry.label, entry.target_ratio if entry.budgeted else None


def _head(entry: Entry) -> dict[str, Any]:
    return dict(zip(("group", "method", "target_ratio"), _place(entry), strict=True))


def _infeasible(entries: Sequence[Entry], done: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for entry in entries:
        parts = [values[entry.name] for values in done.values() if entry.name in values]
        ratios = [part["least_ratio"] for part in parts if "least_ratio" in part]
        if ratios:
            found.append({**_head(entry), "least_ratio": min(ratios), "contexts": len(ratios), "of": len(parts)})
    return found


def _text_parts(own: Mapping[str, Any]) -> list[Any]:
    return [part for name, part in own.items() if name.startswith("text/")]


def _cells(subject: work.Subject, workload: work.Workload, entry: Entry, own: Parts) -> list[dict[str, Any]]:
    case = {"model": subject.path.name, **_head(entry), "seed": workload.seed, "s": workload.length}
    cells = []
    text = _text_parts(own)
    if text:
        cells.append(
            results.cell(
                runner.impl(entry),
                {**case, "task": "held_out", "mode": "continuation"},
                error=runner.budget_error(entry, text),
                **_text_values(text),
                **runner.mean_bytes(text),
                window_losses=[part["loss"] for part in text],
                window_kls=[part["kl"] for part in text],
            )
        )
    for family in workload.families:
        for mode in ("aware", "agnostic"):
            parts = runner.task_parts(own, entry.name, mode, family)
            if not parts:
                continue
            scores = [score for part in parts for score in part["scores"]]
            cells.append(
                results.cell(
                    runner.impl(entry),
                    {**case, "task": family, "mode": mode},
                    error=runner.budget_error(entry, parts),
                    **runner.accuracy_of(scores),
                    contexts=len(parts),
                    scores=scores,
                    ratio=runner.mean_bytes(parts)["ratio"],
                    kept_fraction=fmean([part["kept_fraction"] for part in parts]),
                )
            )
    return cells


def _text_values(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over windows of text, which have the same number of tokens each, and roughly their context's bytes."""
    elements = sum(part["bf16_bytes"] / 2 * part["kept_fraction"] for part in parts)
    averaged = [name for name in ("key_mse", "value_mse", *_ERRORS) if name in parts[0]]
    return {
        "perplexity": perplexity.perplexity([part["loss"] for part in parts]),
        "kl": fmean([part["kl"] for part in parts]),
        "top1_agreement": fmean([part["top1"] for part in parts]),
        "n": sum(part["tokens"] for part in parts),
        "kept_fraction": fmean([part["kept_fraction"] for part in parts]),
        # Everything allocated, per element of a kept token.
        "bits_per_element": 8 * sum(part["nbytes"] for part in parts) / elements,
        **{name: fmean([part[name] for part in parts]) for name in averaged},
    }


def _drop(
    parts: Mapping[str, Parts], method: str, base: str, seed: int, mode: str | None = None
) -> dict[str, Any] | None:
    """Accuracy of ``base`` less the method's, over the questions (of a mode) that the method was asked."""
    units = {name.rsplit("/", 1)[0] for name in parts[method]}
    both = {
        name: part
        for name, part in {**parts[base], **parts[method]}.items()
        if name.rsplit("/", 1)[0] in units and mode in (None, name.split("/")[2])
    }
    return runner.accuracy_drop(both, method, seed=seed, base=base)


def _summary(entry: Entry, seed: int, parts: Mapping[str, Parts]) -> dict[str, Any]:
    """One method over all tasks and all text: accuracy by mode, each beside what bf16 answers to the same questions."""
    own = parts[entry.name]
    text = _text_parts(own)
    accuracy = {}
    for name, modes in _MODES.items():
        asked = [part for mode in modes for part in runner.task_parts(own, entry.name, mode)]
        scores = [score for part in asked for score in part["scores"]]
        accuracy[name] = runner.accuracy_of(scores) if scores else None
    return {
        **_head(entry),
        "ratio": runner.mean_bytes(list(own.values()))["ratio"],
        "accuracy": accuracy,
        "accuracy_drop": {
            name: _drop(parts, entry.name, BASELINE.name, seed, modes[0] if len(modes) == 1 else None)
            for name, modes in _MODES.items()
        },
        **(_text_values(text) if text else {}),
    }


def _best_single(
    ratio: float,
    entries: Sequence[Entry],
    summaries: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Parts],
    seed: int,
) -> dict[str, Any] | None:
    """The automatic joint plan beside the best that tokens alone and bits alone can do in the same bytes.

    The best is chosen by accuracy over all questions, the same ones that are shown, and by KL among equals. Fixed bits
    take part where they meet the ratio. None without the joint plan.
    """
    joint = f"joint {AUTOMATIC} {ratio:g}x"
    if joint not in summaries:
        return None
    found: dict[str, Any] = {"target_ratio": ratio, "joint": summaries[joint]}
    best = {}
    for group, name in zip(SINGLE, ("eviction", "quantization"), strict=True):
        fitting = [
            entry.name
            for entry in entries
            if entry.group == group
            and (entry.target_ratio == ratio if entry.budgeted else summaries[entry.name]["ratio"] >= ratio)
        ]
        found[name] = None
        if fitting:
            best[name] = max(fitting, key=lambda method: _rank(summaries[method]))
            found[name] = summaries[best[name]]
    singles = sorted(best.values(), key=lambda method: _rank(summaries[method]))
    # What the plan answers less what the best single method does.
    found["gain"] = _drop(parts, singles[-1], joint, seed) if singles else None
    return found


def _rank(summary: Mapping[str, Any]) -> tuple[float, float]:
    accuracy = summary["accuracy"]["all"]
    return accuracy["accuracy"] if accuracy else 0.0, -summary.get("kl", 0.0)


def goals(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the summary of a results object says beside what was asked for; ``met`` is None where nothing was measured.

    ``error``: that of the attention output, in all and by what dropping tokens and quantizing the others do to it.
    """
    summaries = {(entry["group"], entry["method"], entry["target_ratio"]): entry for entry in results["summary"]}
    found = []
    for goal, method, mode, limit in _GOALS:
        summary = summaries.get(method)
        drop = summary["accuracy_drop"][mode] if summary else None
        found.append({
            "goal": goal,
            "metric": f"accuracy drop against bf16, {mode}",
            "limit": limit,
            "measured": drop["mean"] if drop else None,
            "ci95": drop["ci95"] if drop else None,
            "met": drop["mean"] <= limit if drop else None,
            "error": {name: summary.get(name) for name in _ERRORS} if summary else None,
        })  # fmt: skip
    gains = {f"{best['target_ratio']:g}x": best["gain"] for best in results["best_single"] if best["gain"]}
    least = min(gains.values(), key=lambda gain: float(gain["mean"])) if gains else None
    found.append({
        "goal": "joint plan no worse than the best single method at every budget",
        "metric": "accuracy gained over the better of eviction alone and quantization alone, least of all budgets",
        "limit": 0.0,
        "measured": least["mean"] if least else None,
        "ci95": least["ci95"] if least else None,
        "met": least["mean"] >= 0 if least else None,
        "gains": gains,
    })  # fmt: skip
    return found
