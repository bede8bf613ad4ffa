"""What is measured on a model, in units that can be kept and taken up again: one task or one window of text each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..eval import perplexity, products, quality, tasks
from ..eval.quality import Method
from ..hf import Cache
from ..packed import Report
from ..prompt import compress_prompt
from .resume import Units

# Queries of a continuation by which the error of the attention output is measured.
PROBES = 8
_CONTINUED = 0.125  # of a window of text


@dataclass(frozen=True)
class Workload:
    """How much is asked. Lengths in bytes (tokens, for the shipped models)."""

    length: int = 4096
    families: tuple[str, ...] = tasks.FAMILIES
    aware: int = 4  # tasks of every family, one question each
    agnostic: int = 1  # contexts of every family
    questions: int = 8  # at most, of each agnostic context
    windows: int = 3  # of held-out text
    scored: int = 512  # tokens of each window that are scored, behind length - scored tokens of context
    single: int = 48  # of them fed one by one, and timed
    seed: int = 0

    def tasks(self) -> Iterator[tasks.Task]:
        for mode, count in (("aware", self.aware), ("agnostic", self.agnostic)):
            if count:
                yield from tasks.iter_tasks(
                    length=self.length,
                    count=count,
                    seed=self.seed,
                    families=self.families,
                    modes=[mode],
                    questions=self.questions,
                )


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer and the text held out from it."""

    path: Path
    model: Any
    tokenizer: Any
    text: str


def load(model_path: Path, text_path: Path) -> Subject:
    """ValueError, naming the flag, for a folder without a model or a file that is no ASCII text."""
    if not (model_path / "config.json").is_file():
        raise ValueError(f"--model: expected a folder with a transformers model, got {model_path}")
    try:
        text = text_path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as reason:
        raise ValueError(f"--text: expected a file of ASCII text, got {text_path} ({reason})") from None
    try:
        with no_bars():
            tokenizer = AutoTokenizer.from_pretrained(model_path)
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").eval()
    except Exception as reason:
        # transformers, tokenizers and safetensors raise many kinds for a damaged folder.
        said = " ".join(str(reason).split())[:200]
        raise ValueError(f"--model: expected a folder with a transformers model, got {model_path} ({said})") from None
    products.suit_cpu(model)
    return Subject(model_path, model, tokenizer, text)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """transformers draws a bar for loading weights, even where nobody looks at a terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def check(subject: Subject, workload: Workload) -> None:
    """ValueError where the model or the text are too short for the workload."""
    most = getattr(subject.model.config, "max_position_embeddings", workload.length)
    if workload.length > most:
        raise ValueError(f"--length: expected at most {most}, the model's positions, got {workload.length}")
    list(workload.tasks())
    windows(subject, workload)


def windows(subject: Subject, workload: Workload) -> tuple[tasks.Window, ...]:
    return tasks.held_out(subject.text, length=workload.length, count=workload.windows, scored=workload.scored)


def units(subject: Subject, workload: Workload, methods: Sequence[Method]) -> dict[str, Callable[[], Any]]:
    """Unit name -> what to do for it; each gives JSON values. Text comes first: it says at once whether a budget can be
    met."""
    found: dict[str, Callable[[], Any]] = {}
    for index, window in enumerate(windows(subject, workload)):
        found[f"text/{index}"] = functools.partial(_text, subject, workload, methods, window)
    for task in workload.tasks():
        for method in methods:
            name = f"task/{task.family}/{task.mode}/{task.seed}/{method.name}"
            found[name] = functools.partial(_task, subject, method, task)
    return found


def measure(
    subject: Subject,
    workload: Workload,
    methods: Sequence[Method],
    kept: Units,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All units' results by name; ``advance`` is told the name of each that is done."""
    done = {}
    for name, work in units(subject, workload, methods).items():
        done[name] = kept.get(name, work)
        advance(name)
    return done


def plan_values(report: Report) -> dict[str, Any]:
    """A plan's report as JSON values, less what experiment.keys says of configured and effective values."""
    values = dataclasses.asdict(report)
    del values["configured"], values["effective"]
    return values


def _task(subject: Subject, method: Method, task: tasks.Task) -> dict[str, Any]:
    with method.cache(subject.model) as cache:
        answers = quality.answer(subject.model, subject.tokenizer, cache, task)
    scores = [tasks.score(text, question) for text, question in zip(answers.texts, task.questions, strict=True)]
    whole = quality.uncompressed_bytes(subject.model, answers.prompt_tokens)
    return {
        "scores": scores,
        "nbytes": answers.nbytes,
        "bf16_bytes": whole,
        "prefill_ms": 1e3 * answers.prefill_seconds,
    }


def window_tokens(tokenizer: Any, window: tasks.Window) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (s,) and continuation (n,) int64."""
    context, following = (
        torch.tensor(tokenizer(text, add_special_tokens=first)["input_ids"], dtype=torch.int64)
        for text, first in ((window.context, True), (window.continuation, False))
    )
    return context, following


def _text(
    subject: Subject, workload: Workload, methods: Sequence[Method], window: tasks.Window
) -> dict[str, dict[str, Any]]:
    """Every method on one window of text, the first being the one that the others are compared with."""
    model, tokenizer = subject.model, subject.tokenizer
    context, following = window_tokens(tokenizer, window)
    found: dict[str, dict[str, Any]] = {}
    reference: torch.Tensor | None = None
    for method in methods:
        held: dict[str, Any] = {}
        with method.cache(model) as cache:

            def read(cache: Any = cache, held: dict[str, Any] = held) -> None:
                held["nbytes"] = quality.allocated_bytes(cache)
                if isinstance(cache, Cache):
                    assert cache.report is not None
                    held["ledger"] = cache.ledger()
                    held["plan"] = plan_values(cache.report)

            said = perplexity.continuation(model, cache, context, following, single=workload.single, after_prefill=read)
        reference = said.logits if reference is None else reference
        found[method.name] = {
            **held,
            "bf16_bytes": quality.uncompressed_bytes(model, len(context)),
            "prefill_ms": 1e3 * said.prefill_seconds,
            "token_ms": [1e3 * seconds for seconds in said.step_seconds],
            "losses": perplexity.token_losses(said.logits, following).tolist(),
            "kl": perplexity.divergence(reference, said.logits).tolist(),
            "top1": perplexity.agreement(reference, said.logits).tolist(),
        }
    _add_errors(subject, methods, context, following, found)
    return found


def _add_errors(
    subject: Subject,
    methods: Sequence[Method],
    context: torch.Tensor,
    following: torch.Tensor,
    found: dict[str, dict[str, Any]],
) -> None:
    """Key, value and attention-output error of every packed method, on the K and V that a plain cache holds."""
    packed = [method for method in methods if method.policy is not None]
    if not packed:
        return
    model = subject.model
    with methods[0].cache(model) as cache:
        exact = quality.read(model, cache, context[None])
        asked = quality.asked_next(model, cache, following[:PROBES])
    for method in packed:
        assert method.policy is not None
        layers = exact.layers_for(method.policy)
        compressed = compress_prompt(layers, method.policy, positions=True)
        found[method.name]["errors"] = quality.cache_errors(compressed, layers, asked)
