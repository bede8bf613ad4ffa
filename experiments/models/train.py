"""Train the two small models.

    python experiments/models/prepare_text.py --out TEXT   # an absolute path
    cd experiments/models
    python train.py --stage base --text TEXT --out tiny-base --minutes 6.5
    python train.py --stage chat --text TEXT --out tiny-chat --minutes 1 --base tiny-base

The model, its tokenizer, ``train_result.json`` (what was done and measured) and a model card are written to --out.
An interrupted run goes on from --checkpoint where it stopped. kvcomp must be importable (its Python part is enough).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import card
import corpus
import measure
import numpy as np
import package
import torch
import transformers
from kvcomp.eval import tasks

HELD_OUT = Path(__file__).resolve().parent.parent / "data" / "held_out.txt"


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained.

    Steps have sequences of the usual length, in the last ``long_share`` of the time of the long one; of them
    ``made_share`` are made (tasks, conversations) and the others source text. Every ``SHORT_EVERY``-th step has short
    sequences, all made: counting words is learnt there, where one question has few words before it.
    """

    maker: corpus.Maker
    learning_rate: float
    made_share: float
    long_share: float
    warmup_share: float
    # Sequences to make for each minute of training: about as many as it takes.
    made_per_minute: dict[int, int]


TOKENS_PER_STEP = 16 * package.CONTEXT
SHORT_EVERY = 4
RECIPES = {
    "base": Recipe(
        corpus.base_sequence,
        2e-3,
        0.25,
        0.12,
        0.02,
        {package.SHORT_CONTEXT: 19000, package.CONTEXT: 3300, package.LONG_CONTEXT: 170},
    ),
    "chat": Recipe(
        corpus.chat_sequence,
        5e-4,
        1.0,
        # Positions beyond the usual length are soon forgotten unless much of the training has them.
        0.6,
        0.05,
        {package.SHORT_CONTEXT: 19000, package.CONTEXT: 6000, package.LONG_CONTEXT: 3200},
    ),
}
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=tuple(RECIPES), required=True)
    parser.add_argument("--text", type=Path, required=True, help="folder with train.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--base", type=Path, help="folder of the base model (stage chat)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=6.5, help="training time, compilation not counted")
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--tokens-per-step", type=int, default=TOKENS_PER_STEP)
    parser.add_argument("--checkpoint", type=Path, help="file to keep the state in, and to go on from")
    parser.add_argument("--measure-share", type=float, default=1.0, help="fraction of the tasks to measure")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


class Sampler:
    """Batches on the device: a fixed share of made sequences, taken in order, and random pieces of the text."""

    def __init__(self, text: corpus.Text, made: corpus.Sequences, made_share: float, seed: int, device: str) -> None:
        self.text = torch.from_numpy(text.tokens).to(device)
        self.tokens = torch.from_numpy(made.tokens).to(device)
        self.weights = torch.from_numpy(made.weights).to(device)
        self.length = made.tokens.shape[1]
        self.made_share = made_share
        self.seed = seed
        self.device = device

    def batch(self, index: int, tokens_per_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and weights, (sequences, length), a function of the seed and the index alone."""
        rows = max(1, tokens_per_step // self.length)
        # Rounded differently from batch to batch, so that the share holds on average.
        first = math.floor(index * rows * self.made_share)
        made = math.floor((index + 1) * rows * self.made_share) - first
        taken = (first + torch.arange(made, device=self.device)) % len(self.tokens)
        random = np.random.default_rng((self.seed, self.length, index))
        starts = torch.from_numpy(random.integers(0, len(self.text) - self.length, rows - made)).to(self.device)
        plain = self.text[starts[:, None] + torch.arange(self.length, device=self.device)]
        tokens = torch.cat([self.tokens[taken], plain]).long()
        weights = torch.cat([self.weights[taken], torch.full_like(plain, corpus.TEXT_WEIGHT, dtype=torch.uint8)])
        return tokens, weights.float()


def optimizer_of(model: torch.nn.Module, rate: float, device: str) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=device == "cuda")


def rate_at(progress: float, recipe: Recipe) -> float:
    """Learning rate after a fraction of the training: a linear rise, then a cosine to 0."""
    if progress < recipe.warmup_share:
        return recipe.learning_rate * progress / recipe.warmup_share
    done = (progress - recipe.warmup_share) / (1 - recipe.warmup_share)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Clock:
    """Training progress in [0, 1], by steps or by seconds; pauses (compilation) are left out."""

    def __init__(self, steps: int | None, seconds: float, elapsed: float) -> None:
        self.steps = steps
        self.seconds = seconds
        self.start = time.monotonic() - elapsed

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def leave_out(self, seconds: float) -> None:
        self.start += seconds

    def progress(self, step: int) -> float:
        return step / self.steps if self.steps else self.elapsed() / self.seconds


def train(
    model: transformers.LlamaForCausalLM,
    samplers: dict[int, Sampler],
    recipe: Recipe,
    options: argparse.Namespace,
    device: str,
) -> dict[str, Any]:
    """Train in place; there is a sampler for each length."""
    optimizer = optimizer_of(model, recipe.learning_rate, device)

    def weighted_loss(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (each * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()

    loss_of = torch.compile(weighted_loss, dynamic=False) if device == "cuda" else weighted_loss
    step, elapsed, seen = 0, 0.0, 0
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed, seen = state["step"], state["elapsed"], state["seen"]
        print(f"going on from step {step}", flush=True)
    clock = Clock(options.steps, options.minutes * 60, elapsed)
    compiled: set[int] = set()
    reported = saved = time.monotonic()
    history = []
    while (progress := clock.progress(step)) < 1:
        if step % SHORT_EVERY == SHORT_EVERY - 1:
            sampler, index = samplers[package.SHORT_CONTEXT], step // SHORT_EVERY
        else:
            late = progress >= 1 - recipe.long_share
            sampler, index = samplers[package.LONG_CONTEXT if late else package.CONTEXT], step - step // SHORT_EVERY
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, recipe)
        tokens, weights = sampler.batch(index, options.tokens_per_step)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(tokens, weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if sampler.length not in compiled:
            compiled.add(sampler.length)
            print(f"first step of length {sampler.length}: loss {loss.item():.3f}, {time.monotonic() - began:.1f} s")
            clock.leave_out(time.monotonic() - began)
        step += 1
        seen += tokens.numel()
        now = time.monotonic()
        if now - reported > 10:
            reported = now
            history.append({"step": step, "loss": round(loss.item(), 4)})
            print(
                f"step {step}, {progress:.0%}, loss {loss.item():.4f}, {seen / clock.elapsed() / 1e6:.2f} M tokens/s",
                flush=True,
            )
        if options.checkpoint and now - saved > 60:
            saved = now
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state.update(step=step, elapsed=clock.elapsed(), seen=seen)
            beside = options.checkpoint.with_name(options.checkpoint.name + ".part")
            torch.save(state, beside)
            os.replace(beside, options.checkpoint)
    return {"steps": step, "tokens": seen, "seconds": round(clock.elapsed(), 1), "loss": history}


def main() -> int:
    options = arguments()
    if (options.stage == "chat") != (options.base is not None):
        print("train: --base: expected with --stage chat, and only there", file=sys.stderr)
        return 2
    if not (options.text / "train.txt.xz").is_file():
        print(f"train: --text: expected a folder with train.txt.xz, got {options.text}", file=sys.stderr)
        return 2
    recipe = RECIPES[options.stage]
    chat = options.stage == "chat"
    torch.manual_seed(options.seed)

    began = time.monotonic()
    text = corpus.Text(options.text, options.seed)
    made = {
        length: corpus.sequences(
            recipe.maker, max(64, round(each * options.minutes)), length, options.seed, text, options.workers
        )
        for length, each in recipe.made_per_minute.items()
    }
    print(f"made {[m.tokens.shape for m in made.values()]} sequences in {time.monotonic() - began:.1f} s", flush=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = package.load(options.base) if chat else transformers.LlamaForCausalLM(package.configuration())
    model = model.to(device).train()
    samplers = {
        length: Sampler(text, each, 1.0 if length == package.SHORT_CONTEXT else recipe.made_share, options.seed, device)
        for length, each in made.items()
    }
    done = train(model, samplers, recipe, options, device)
    package.save(model, options.out, chat=chat)

    model = transformers.AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.bfloat16).to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.out)
    held_out = HELD_OUT.read_text("ascii")
    bits = {str(n): measure.bits_per_byte(model, held_out, n) for n in (package.CONTEXT, package.LONG_CONTEXT)}
    print(f"bits per byte by window: {bits}", flush=True)
    accuracy = measure.accuracies(model, tokenizer, seed=0, share=options.measure_share)
    result = {
        "stage": options.stage,
        "seed": options.seed,
        "minutes": options.minutes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "configuration": model.config.to_diff_dict(),
        "recipe": {key: value for key, value in asdict(recipe).items() if key != "maker"},
        "betas": BETAS,
        "weight_decay": WEIGHT_DECAY,
        "text_bytes": text.bytes,
        "made_sequences": {str(length): len(each.tokens) for length, each in made.items()},
        "tokens_per_step": options.tokens_per_step,
        "short_every": SHORT_EVERY,
        "trained": done,
        "tasks_version": tasks.TASKS_VERSION,
        "bits_per_byte": bits,
        "accuracy": accuracy,
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (options.out / "train_result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (options.out / "README.md").write_text(card.text(result), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
