"""Which families of tasks decide whether a configuration is good enough, and what they say: a rule that is fixed before
anything is measured, by ``metrics.quality`` of the matrix.

A family counts where the reference answers at least ``min_reference_accuracy`` of it, and where it has at least
``min_questions`` questions. A configuration's drop in a family is 100 (1 - its accuracy / the reference's) percent, a
gain being a negative drop; its average drop is the mean over the families that count, each weighing the same; it passes
where that is below ``acceptance_target_avg_relative_drop_pct``. Families that do not count are asked all the same, and
every accuracy is reported, as is that of all questions of all families pooled.

Beside the average stands its 95 % interval, of contexts drawn again (both configurations' answers to a context
together): contexts are what is independent, questions about one of them are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .matrix import Quality

_DRAWS = 4000
Results = dict[str, Any]


def rule(reference: str, cells: Mapping[str, Results], aims: Quality) -> Results:
    """By what is judged: the reference's cells by family -> the families that count, and why others do not."""
    shown_only: dict[str, str] = {}
    for family, cell in cells.items():
        if len(cell["scores"]) < aims.min_questions:
            shown_only[family] = f"{len(cell['scores'])} questions, fewer than {aims.min_questions}"
        elif cell["accuracy"] < aims.min_reference_accuracy:
            shown_only[family] = (
                f"{reference} answers {100 * cell['accuracy']:.1f} %, less than {100 * aims.min_reference_accuracy:g} %"
            )
    return {
        "reference": reference,
        "min_reference_accuracy": aims.min_reference_accuracy,
        "min_questions": aims.min_questions,
        "target_avg_relative_drop_pct": aims.acceptance_target_avg_relative_drop_pct,
        "averaged": [family for family in cells if family not in shown_only],
        "shown_only": shown_only,
    }


def judge(
    mine: Mapping[str, Results], theirs: Mapping[str, Results], decided: Mapping[str, Any], seed: int = 0
) -> Results:
    """A configuration's cells by family beside the reference's -> drops of every family that the reference has a right
    answer to, their average over those that count with its interval, and whether that passes (None: none counts)."""
    drops = {
        family: 100 * (1 - mine[family]["accuracy"] / cell["accuracy"])
        for family, cell in theirs.items()
        if cell["accuracy"] > 0
    }
    averaged = decided["averaged"]
    average = float(np.mean([drops[family] for family in averaged])) if averaged else None
    return {
        "relative_drop_pct": drops,
        "avg_relative_drop_pct": average,
        "avg_relative_drop_ci95": _interval(mine, theirs, averaged, seed) if averaged else None,
        "accepted": None if average is None else average < decided["target_avg_relative_drop_pct"],
    }


def _interval(
    mine: Mapping[str, Results], theirs: Mapping[str, Results], families: list[str], seed: int
) -> list[float]:
    random = np.random.default_rng(seed)
    total = np.zeros(_DRAWS)
    for family in families:
        contexts = theirs[family]["contexts"]
        means = [np.reshape(one[family]["scores"], (contexts, -1)).mean(1) for one in (mine, theirs)]
        drawn = random.integers(contexts, size=(_DRAWS, contexts))
        got, base = (values[drawn].mean(1) for values in means)
        # Where a drawing has no right answer of the reference, it says nothing against the other.
        total += np.where(base > 0, 100 * (1 - got / np.where(base > 0, base, 1)), 0)
    return [float(end) for end in np.quantile(total / len(families), (0.025, 0.975))]
