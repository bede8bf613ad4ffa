"""Held-out text on the decode path: a context is read (and compressed), then its continuation is fed, teacher-forced,
against what the cache holds. Never one forward pass over everything, in which a compressed cache would have no part.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import BudgetError, BudgetWarning

CHUNK = 32


@dataclass
class Continuation:
    """What a model said about a continuation of n tokens."""

    logits: torch.Tensor  # (n, vocabulary) float32: before each token of the continuation
    prefill_seconds: float  # reading the context, compression included
    step_seconds: list[float] = field(default_factory=list)  # of each token fed alone


@torch.inference_mode()
def prefill(model: Any, cache: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Read tokens (b, s) int64 into an empty cache -> logits behind the last one (b, vocabulary), and seconds.

    Raises BudgetError where a packed cache cannot meet its budget: what it then keeps is not what was asked for.
    """
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - start
    report = getattr(cache, "report", None)
    if report is not None and report.over_budget:
        least = cache.nbytes
        raise BudgetError(
            f"run: budget: expected at least {least} bytes for this prompt (a ratio of "
            f"{math.floor(100 * report.bf16_bytes / least) / 100:g} or less), got {report.budget_bytes} bytes"
        )
    return out.logits[:, -1].float(), seconds


@torch.inference_mode()
def continuation(
    model: Any,
    cache: Any,
    context: torch.Tensor,
    following: torch.Tensor,
    *,
    single: int = 0,
    chunk: int = CHUNK,
    after_prefill: Callable[[], None] | None = None,
) -> Continuation:
    """Feed following (n,) int64 behind context (s,) int64: the first ``single`` tokens one by one (and timed), the rest
    in chunks of ``chunk``. ``after_prefill`` is called when the context has been read (and compressed)."""
    last, seconds = prefill(model, cache, context[None])
    if after_prefill is not None:
        after_prefill()
    steps: list[float] = []
    logits = follow(model, cache, last, following, single=single, chunk=chunk, steps=steps)
    return Continuation(logits, seconds, steps)


@torch.inference_mode()
def follow(
    model: Any,
    cache: Any,
    last: torch.Tensor,
    following: torch.Tensor,
    *,
    single: int = 0,
    chunk: int = CHUNK,
    steps: list[float] | None = None,
) -> torch.Tensor:
    """The same on a cache that holds the context: last (1, vocabulary) behind it -> logits (n, vocabulary) before each
    token of following (n,). ``steps`` receives the seconds of each token fed alone."""
    logits = [last]
    fed = following[:-1]  # nothing is asked behind the last token
    single = min(single, len(fed))
    pieces = [*torch.split(fed[:single], 1), *torch.split(fed[single:], chunk)]
    for number, piece in enumerate(filter(len, pieces)):
        start = time.perf_counter()
        out = model(input_ids=piece[None], past_key_values=cache, use_cache=True)
        if steps is not None and number < single:
            steps.append(time.perf_counter() - start)
        logits.append(out.logits[0].float())
    return torch.cat(logits)


def token_losses(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood (n,) in nats of each token of a continuation, logits (n, vocabulary)."""
    return torch.nn.functional.cross_entropy(logits, following, reduction="none")


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) in nats at every place, (n, vocabulary) each -> (n,)."""
    expected = reference.log_softmax(-1)
    return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)


def agreement(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """1.0 where both have the same most likely token, (n, vocabulary) each -> (n,)."""
    return (reference.argmax(-1) == logits.argmax(-1)).float()


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean loss in nats."""
    return math.exp(sum(losses) / len(losses))
