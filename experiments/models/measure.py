"""What a trained model can do: bits per byte of held-out text, and accuracy on the generated tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from kvcomp.eval import tasks
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NEWLINE = ord("\n")
# name, family, needles, length, mode, tasks, questions of each task
MEASURED: tuple[tuple[str, str, int | None, int, str, int, int], ...] = (
    *((family, family, None, 4096, "aware", 200, 1) for family in tasks.FAMILIES),
    ("needle_multi_key, agnostic", "needle_multi_key", None, 4096, "agnostic", 50, 4),
    ("needle_multi_key, 32 needles", "needle_multi_key", 32, 4096, "aware", 200, 1),
    ("needle_multi_key, 1024 bytes", "needle_multi_key", None, 1024, "aware", 200, 1),
    ("needle_multi_key, 8192 bytes", "needle_multi_key", None, 8192, "aware", 100, 1),
)


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, text: str, length: int, batch: int = 16) -> float:
    """Mean over all bytes but the first of each window; windows of ``length`` bytes without overlap."""
    count = len(text) // length
    windows = torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8)[: count * length].view(count, length)
    total = 0.0
    for part in torch.split(windows.long(), batch):
        part = part.to(model.device)
        logits = model(part, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (count * (length - 1)) / math.log(2)


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    size: int = 50,
) -> list[str]:
    """Greedy continuations of the prompts, up to the first newline; ``size`` prompts at a time."""
    found: list[str] = []
    for start in range(0, len(prompts), size):
        inputs = tokenizer(list(prompts[start : start + size]), return_tensors="pt", padding=True).to(model.device)
        ends = model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), NEWLINE]
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends)
        found.extend(tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def prompt_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text itself, or as a user's message where the tokenizer has a chat template."""
    if tokenizer.chat_template is None:
        return text
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def accuracies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, share: float = 1.0
) -> dict[str, dict[str, float | int]]:
    """Mean score and number of questions for each entry of ``MEASURED``; ``share`` < 1 takes fewer tasks."""
    results: dict[str, dict[str, float | int]] = {}
    for name, family, needles, length, mode, count, questions in MEASURED:
        made = tasks.iter_tasks(
            length=length,
            count=max(1, round(count * share)),
            seed=seed,
            families=[family],
            modes=[mode],
            questions=questions,
            needles=needles,
        )
        asked = [(prompt_text(tokenizer, task.context + q.prompt), q) for task in made for q in task.questions]
        texts = answers(model, tokenizer, [prompt for prompt, _ in asked], max(len(q.target) for _, q in asked))
        scores = [tasks.score(text, q) for text, (_, q) in zip(texts, asked, strict=True)]
        results[name] = {"accuracy": sum(scores) / len(scores), "questions": len(scores)}
        print(f"  {name}: {results[name]['accuracy']:.3f} of {len(scores)}", flush=True)
    return results
