"""What 4-bit weights do to a model's answers: perplexity and task accuracy of the configurations of a matrix, of the
quantized model itself, as a results object of kind ``w4_quality``.

    python scripts/w4_quality.py [--config_ids C0 C3 C4 ...] [--output FILE]

Every configuration answers the same questions and reads the same text, through the framework's own cache. Every token
is counted in every quantized layer: a layer that a token went around makes the command fail. What the figures decide is
in kvcomp.w4.acceptance. With --output, finished contexts are kept in FILE.partial, and the same command goes on there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from .. import results
from ..errors import one_line
from ..eval import perplexity, products, quality, tasks
from ..eval.quality import Method
from ..experiment import places, runner, tables_w4, workload
from ..experiment.report import print_rows
from ..experiment.resume import Interrupted, Units
from . import acceptance, arms, matrix
from .fp8 import Fp8Linear
from .linear import SharedScaleLinear
from .matrix import Arm, Matrix

BAD_INPUT = 2
CONFIG_IDS = ("C0", "C3", "C4", "C5", "C7", "C8")
_CACHE = Method("bf16", 1.0)
Tell = Callable[[str], object]
# Of this package: what answers depend on. Changes there make other units; those of tables and rules do not.
_SOURCES = ("arms.py", "fp8.py", "library.py", "linear.py", "model.py", "quality.py", "weights.py")


@dataclass(frozen=True)
class Asked:
    """How much is asked. ``length``: bytes of every prompt, tokens for the shipped model."""

    length: int = 2048
    questions: int = 48  # of every family, at least
    per_context: int = 4  # at most, of families that have as many
    windows: int = 8  # of held-out text
    scored: int = 1024  # tokens of each
    seed: int = 7000  # far from those that anything was chosen on

    def text(self) -> workload.Workload:
        return workload.Workload(
            length=self.length, families=(), aware=0, agnostic=0, windows=self.windows, scored=self.scored, single=0,
            seed=self.seed,
        )  # fmt: skip

    def tasks(self, family: str) -> list[tasks.Task]:
        """Contexts of a family, each with as many questions, of the seeds from ``seed`` on. ValueError for numbers that
        make none."""
        for name in ("questions", "per_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected 1 or more, got {getattr(self, name)}")
        each = min(self.questions, self.per_context, tasks.questions_max(family))
        count = -(-self.questions // each)
        return list(
            tasks.iter_tasks(
                length=self.length, count=count, seed=self.seed, families=[family], modes=["agnostic"], questions=each
            )
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="w4_quality.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, help="experiment matrix (default: the shipped one)")
    parser.add_argument("--config_ids", nargs="+", default=list(CONFIG_IDS), metavar="ID",
                        help=f"default: {' '.join(CONFIG_IDS)}")  # fmt: skip
    parser.add_argument("--model", type=Path, help="folder of a transformers model (default: the shipped tiny-base)")
    parser.add_argument("--text", type=Path, help="held-out ASCII text (default: the shipped one)")
    for name, default in vars(Asked()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--output", "--report-path", type=Path, help="write the results here, as JSON")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    try:
        if options.output is not None:
            results.check_writable(options.output, "--output")
        path = options.config or places.shipped(matrix.MATRIX, "--config")
        found, kept = measure(
            matrix.load(path),
            options.config_ids,
            Asked(**{name: getattr(options, name) for name in vars(Asked())}),
            model=options.model or places.shipped(places.MODEL, "--model", beside=path),
            text=options.text or places.shipped(places.TEXT, "--text", beside=path),
            command=" ".join(["python scripts/w4_quality.py", *given]),
            report=options.output,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if options.output is not None:
            results.write(options.output, found)
        kept.finish()
    except Interrupted as kept_so_far:
        print(f"w4_quality: {kept_so_far}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        return 130
    except (ValueError, NotImplementedError, OSError, ImportError) as reason:
        print(f"w4_quality: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT
    for title, rows in (("text, and all tasks", tables_w4.quality_rows), ("tasks", tables_w4.task_rows)):
        print_rows(*rows(found), Console(width=None if sys.stdout.isatty() else 200), title)
    failures = results.failures(found)
    for sentence in failures:
        print(f"w4_quality: {sentence}", file=sys.stderr)
    return 1 if failures else 0


def measure(
    loaded: Matrix,
    config_ids: Sequence[str],
    asked: Asked,
    *,
    model: Path,
    text: Path,
    command: str,
    report: Path | None = None,
    tell: Tell = lambda line: None,
) -> tuple[dict[str, Any], Units]:
    """A results object, and the units it is made of, to be finished when it has been written: for every configuration a
    cell of text and a cell of every family; ``acceptance``: by what is judged; ``configs``: averages, drops relative to
    the reference configuration, and whether the target is met. The reference runs first, asked for or not. A
    configuration that cannot run here is in ``skipped``, with the reason. ``Interrupted`` on Ctrl-C."""
    aims = loaded.metrics.quality
    if aims.harness != "kvcomp":
        raise NotImplementedError(f"metrics.quality.harness: expected kvcomp, got {aims.harness}")
    subject = workload.load(model, text)
    workload.check(subject, asked.text())
    questions = {family: asked.tasks(family) for family in aims.tasks}
    (reference,) = loaded.arms(aims.report_relative_drop_vs)
    wanted = list(dict.fromkeys([reference, *(arm for name in config_ids for arm in loaded.arms(name))]))
    found = results.new("w4_quality", command=command)
    found |= {"asked": asdict(asked), "acceptance": None, "configs": {}, "skipped": {}}
    kept = Units(report, _depends_on(subject, asked, aims.tasks, wanted))
    if kept.resumed:
        tell(f"{kept.resumed} units of an earlier run are kept")

    @functools.cache
    def base() -> list[torch.Tensor]:
        plain, _, _ = _prepared(subject, reference)
        return _logits(plain, asked)

    try:
        for arm in wanted:
            reason = arms.why_not(arm) or arms.why_refused(arm, torch.device("cpu"))
            if reason is not None:
                found["skipped"][arm.config_id] = reason
                tell(f"{arm.config_id} is skipped: {reason}")
                continue
            tested, name, weights = _prepared(subject, arm)
            text_cell = _text_cell(arm, tested, asked, weights, base, kept)
            cells = [text_cell, *(_task_cell(arm, tested, weights, mine, kept) for mine in questions.values())]
            for cell in cells:
                cell["case"] |= {"model": name}
            found["cells"] += cells
            found["configs"][arm.config_id] = one = _summary(arm, weights, cells)
            tell(f"{arm.config_id}: perplexity {one['perplexity']:.4f}, accuracy {100 * one['accuracy']:.1f} %")
    except KeyboardInterrupt:
        raise Interrupted(kept.kept()) from None
    _judge(found, reference.config_id, aims, asked.seed)
    return found, kept


def _depends_on(
    subject: workload.Subject, asked: Asked, families: Sequence[str], wanted: Sequence[Arm]
) -> dict[str, Any]:
    """What makes two runs share units."""
    found = runner.depends_on(subject, asked.text(), [])
    source = hashlib.sha256()
    for path in (Path(__file__).parent / name for name in _SOURCES):
        source.update(path.read_bytes())
    del found["versions"]["git"]
    return found | {
        "asked": asdict(asked), "families": list(families), "arms": [asdict(arm) for arm in wanted],
        "source": source.hexdigest(),
    }  # fmt: skip


def _prepared(subject: workload.Subject, arm: Arm) -> tuple[workload.Subject, str, dict[str, Any]]:
    """The subject with its weights as a configuration keeps them; its name, and what is held."""
    tested, name = arms.load(str(subject.path), arm.dtype, torch.device("cpu"))
    products.suit_cpu(tested)
    weights = arms.prepare(tested, arm)
    return workload.Subject(subject.path, tested, subject.tokenizer, subject.text), name, weights


@dataclass
class Counted:
    """Tokens that went through a model, and through each of its quantized layers."""

    model: int
    layers: dict[str, int]


@contextlib.contextmanager
def tokens_through(model: torch.nn.Module) -> Iterator[Counted]:
    """Inside, tokens are counted at the model's input and in the products of its quantized layers themselves."""
    counted = Counted(0, {})
    hooks = []

    def see(module: Any, arguments: Any, named: Any) -> None:
        ids = named.get("input_ids", arguments[0] if arguments else None)
        counted.model += int(ids.numel())

    hooks.append(model.register_forward_pre_hook(see, with_kwargs=True))
    for name, layer in model.named_modules():
        if isinstance(layer, SharedScaleLinear | Fp8Linear) or type(layer).__name__ == "Linear4bit":
            counted.layers[name] = 0

            def count(module: Any, given: Any, out: torch.Tensor, name: str = name) -> None:
                counted.layers[name] += out.numel() // out.shape[-1]

            hooks.append(layer.register_forward_hook(count))
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def missed(counted: Counted, quantized: int) -> float:
    """Of a model with so many quantized layers, the largest share of tokens that one of them did not see. All of them,
    where the model that was evaluated does not have these layers."""
    least = min(counted.layers.values(), default=counted.model)
    whole = len(counted.layers) == quantized and counted.model > 0
    return 1 - least / counted.model if whole else 1.0


def _case(arm: Arm, task: str) -> dict[str, Any]:
    return {"config_id": arm.config_id, "mode": arm.mode, "scale_mbits": arm.scale_mbits, "group_size": arm.group_size,
            "quant_target": arm.quant_target, "rounding": arm.rounding, "task": task}  # fmt: skip


def _error(value: float) -> dict[str, Any]:
    return {"metric": "tokens that went around a quantized layer", "value": value, "bound": 0.0}


def _logits(subject: workload.Subject, asked: Asked) -> list[torch.Tensor]:
    """What a model says before every scored token of every window."""
    found = []
    for window in workload.windows(subject, asked.text()):
        context, following = workload.window_tokens(subject.tokenizer, window)
        with _CACHE.cache(subject.model) as cache:
            said = perplexity.continuation(subject.model, cache, context, following, chunk=len(following))
        found.append(said.logits)
    return found


def _text_cell(
    arm: Arm, subject: workload.Subject, asked: Asked, weights: dict[str, Any],
    base: Callable[[], list[torch.Tensor]], kept: Units,
) -> dict[str, Any]:  # fmt: skip
    """The held-out text: means over its tokens, and those of every window. KL and top-1 are beside the reference."""

    def work() -> dict[str, Any]:
        with tokens_through(subject.model) as counted:
            logits = _logits(subject, asked)
        found: dict[str, list[float]] = {"tokens": [], "losses": [], "kl": [], "top1": []}
        for said, expected, window in zip(logits, base(), workload.windows(subject, asked.text()), strict=True):
            _, following = workload.window_tokens(subject.tokenizer, window)
            found["tokens"].append(len(following))
            found["losses"].append(float(perplexity.token_losses(said, following).double().mean()))
            found["kl"].append(max(0.0, float(perplexity.divergence(expected, said).double().mean())))
            found["top1"].append(float(perplexity.agreement(expected, said).double().mean()))
        return found | {"missed": missed(counted, weights["quantized_layers"])}

    said = kept.get(f"{arm.config_id}/held_out", work)
    tokens = sum(said["tokens"])
    means = {
        name: sum(n * value for n, value in zip(said["tokens"], said[name], strict=True)) / tokens
        for name in ("losses", "kl", "top1")
    }
    return results.cell(
        "kvcomp", _case(arm, "held_out"), error=_error(said["missed"]), perplexity=math.exp(means["losses"]),
        kl=means["kl"], top1=means["top1"], tokens=tokens, window_tokens=said["tokens"], window_losses=said["losses"],
        window_kl=said["kl"],
    )  # fmt: skip


def _task_cell(
    arm: Arm, subject: workload.Subject, weights: dict[str, Any], asked: Sequence[tasks.Task], kept: Units
) -> dict[str, Any]:
    """One family. ``scores``: of every question, those of a context one after another."""

    def work(task: tasks.Task) -> dict[str, Any]:
        with tokens_through(subject.model) as counted, _CACHE.cache(subject.model) as cache:
            answers = quality.answer(subject.model, subject.tokenizer, cache, task)
        scores = [tasks.score(text, question) for text, question in zip(answers.texts, task.questions, strict=True)]
        return {"scores": scores, "missed": missed(counted, weights["quantized_layers"])}

    family = asked[0].family
    found = [kept.get(f"{arm.config_id}/{family}/{task.seed}", functools.partial(work, task)) for task in asked]
    scores = [score for one in found for score in one["scores"]]
    return results.cell(
        "kvcomp", _case(arm, family), error=_error(max(one["missed"] for one in found)),
        accuracy=mean(scores), ci95=list(results.wilson(mean(scores), len(scores))), n=len(scores),
        contexts=len(asked), scores=scores,
    )  # fmt: skip


def _summary(arm: Arm, weights: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """``accuracy``: of all questions of all families, pooled."""
    text, *others = cells
    return {
        "name": arm.name,
        **weights,
        "perplexity": text["perplexity"],
        "kl": text["kl"],
        "top1": text["top1"],
        "accuracy": mean(score for cell in others for score in cell["scores"]),
        "per_task": {cell["case"]["task"]: cell["accuracy"] for cell in others},
    }


def _judge(found: dict[str, Any], reference: str, aims: matrix.Quality, seed: int) -> None:
    """Adds ``acceptance``, and to every configuration what stands beside the reference."""
    cells: dict[str, dict[str, Any]] = {name: {} for name in found["configs"]}
    for cell in found["cells"]:
        if cell["case"]["task"] != "held_out":
            cells[cell["case"]["config_id"]][cell["case"]["task"]] = cell
    found["acceptance"] = acceptance.rule(reference, cells[reference], aims)
    theirs = found["configs"][reference]
    for name, mine in found["configs"].items():
        mine["perplexity_rise_pct"] = 100 * (mine["perplexity"] / theirs["perplexity"] - 1)
        pooled = theirs["accuracy"]
        mine["pooled_relative_drop_pct"] = 100 * (1 - mine["accuracy"] / pooled) if pooled > 0 else None
        mine |= acceptance.judge(cells[name], cells[reference], found["acceptance"], seed)
