"""One prompt, read by the model once, with every method that ``kvcomp policies`` compares.

Every packed cache is made of the K, V and queries of that one pass, as if the model had read the prompt with it.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import BudgetError, BudgetWarning
from ..eval import perplexity, quality, tasks
from ..eval.quality import Read
from ..layer_input import LayerInput
from ..measure import importance_of
from ..policy import Policy
from ..prompt import compress_prompt
from ..selectors import H2O
from . import workload as work
from .methods import BASELINE, Entry

# The tasks by which ways of coding rows are compared, besides text.
CODING_FAMILY = "needle_multi_key"
_TEXT_ERRORS = (
    "key_mse", "value_mse", "attention_output_error", "attention_output_error_of_dropping",
    "attention_output_error_of_quantizing",
)  # fmt: skip
_DIGITS = 5


def units(subject: work.Subject, workload: work.Workload, entries: Sequence[Entry]) -> dict[str, Callable[[], Any]]:
    """Unit name -> what to do for it: method -> JSON values. The longest come first, so that several processes end at
    about the same time."""
    found: dict[str, Callable[[], Any]] = {}
    for index, window in enumerate(work.windows(subject, workload)):
        found[f"text/{index}"] = functools.partial(measure_text, subject, workload, entries, window)
    for task in sorted(workload.tasks(), key=lambda task: -sum(len(question.target) for question in task.questions)):
        asked = [entry for entry in entries if entry.group != "coding" or task.family == CODING_FAMILY]
        if asked:
            found[f"task/{task.family}/{task.mode}/{task.seed}"] = functools.partial(measure_task, subject, asked, task)
    return found


class Prompt:
    """A prompt that was read once, for caches under many policies."""

    def __init__(self, model: Any, read: Read) -> None:
        self.model, self.read = model, read
        self.tokens = read.layers[0].shape[2]
        self.bf16_bytes = quality.uncompressed_bytes(model, self.tokens)
        self._importance: dict[H2O, list[Any]] = {}

    def layers_for(self, policy: Policy) -> list[LayerInput]:
        """What a cache under ``policy`` would have seen. H2O's importance, of all queries, is measured once."""
        layers = self.read.layers_for(policy)
        if not isinstance(policy.select, H2O):
            return layers
        select = replace(policy.select, keep=None)
        if select not in self._importance:
            self._importance[select] = [importance_of(layer, policy, index) for index, layer in enumerate(layers)]
        return [
            replace(layer, importance=scores) for layer, scores in zip(layers, self._importance[select], strict=True)
        ]

    def measure(self, entry: Entry, ask: Callable[[Any, list[LayerInput]], dict[str, Any]]) -> dict[str, Any]:
        """Bytes of the method's cache and what ``ask`` (cache, layers) finds out about it; or, where its budget cannot
        be met, the largest ratio that can."""
        assert entry.policy is not None
        layers = self.layers_for(entry.policy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            try:
                with entry.cache(self.model, layers) as cache:
                    nbytes = int(cache.nbytes)
                    if cache.report.over_budget:
                        return self._infeasible(nbytes)
                    return {
                        "nbytes": nbytes,
                        "bf16_bytes": self.bf16_bytes,
                        "kept_fraction": _rounded(cache.report.kept_fraction),
                        **ask(cache, layers),
                    }
            except BudgetError as error:
                return self._infeasible(error.least_bytes)

    def _infeasible(self, least_bytes: int) -> dict[str, Any]:
        return {"least_ratio": math.floor(100 * self.bf16_bytes / least_bytes) / 100}


@torch.inference_mode()
def measure_task(subject: work.Subject, entries: Sequence[Entry], task: tasks.Task) -> dict[str, Any]:
    """Every method's scores on one task."""
    model, tokenizer = subject.model, subject.tokenizer

    def scores(cache: Any, logits: torch.Tensor) -> dict[str, Any]:
        texts = quality.ask(model, tokenizer, cache, task, logits)
        return {"scores": [_rounded(tasks.score(t, q)) for t, q in zip(texts, task.questions, strict=True)]}

    with BASELINE.cache(model) as cache:
        prompt = Prompt(model, quality.read(model, cache, quality.prompt_of(tokenizer, task)[None]))
        logits = prompt.read.logits
        found = {BASELINE.name: {**_plain(prompt, cache), **scores(cache, logits)}}
    for entry in entries:
        found[entry.name] = prompt.measure(entry, lambda cache, _: scores(cache, logits))
    return found


@torch.inference_mode()
def measure_text(
    subject: work.Subject, workload: work.Workload, entries: Sequence[Entry], window: tasks.Window
) -> dict[str, Any]:
    """Every method's means over one window of text, and its errors on the K and V of the plain cache."""
    model = subject.model
    context, following = work.window_tokens(subject.tokenizer, window)

    def follow(cache: Any, last: torch.Tensor) -> torch.Tensor:
        return perplexity.follow(model, cache, last, following, single=workload.single)

    def said(logits: torch.Tensor) -> dict[str, Any]:
        return {
            "tokens": len(following),
            "loss": _rounded(perplexity.token_losses(logits, following).mean()),
            "kl": _rounded(perplexity.divergence(reference, logits).mean()),
            "top1": _rounded(perplexity.agreement(reference, logits).mean()),
        }

    with BASELINE.cache(model) as cache:
        prompt = Prompt(model, quality.read(model, cache, context[None]))
        plain = _plain(prompt, cache)
        asked = quality.asked_next(model, copy.deepcopy(cache), following[: work.PROBES])
        reference = follow(cache, prompt.read.logits)
        found = {BASELINE.name: {**plain, **said(reference)}}
    for entry in entries:

        def measured(cache: Any, layers: list[LayerInput], entry: Entry = entry) -> dict[str, Any]:
            assert entry.policy is not None
            packed = compress_prompt(layers, entry.policy, positions=True)
            errors = quality.cache_errors(packed, layers, asked)
            logits = follow(cache, prompt.read.logits)
            return {**said(logits), **{name: _rounded(errors[name]) for name in _TEXT_ERRORS}}

        found[entry.name] = prompt.measure(entry, measured)
    return found


def _plain(prompt: Prompt, cache: Any) -> dict[str, Any]:
    return {"nbytes": quality.allocated_bytes(cache), "bf16_bytes": prompt.bf16_bytes, "kept_fraction": 1.0}


def _rounded(value: Any) -> float:
    return float(f"{float(value):.{_DIGITS}g}")
