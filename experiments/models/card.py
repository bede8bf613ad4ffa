"""The model card, made from the figures of ``train_result.json``."""

from __future__ import annotations

from typing import Any

_HEAD = """---
license: apache-2.0
library_name: transformers
tags: [byte-level, test-model]
---
# {name}

{what}

Ordinary Llama architecture, {parameters:,} parameters in bf16: hidden size 256, 6 layers, 4 query heads, 2 key/value
heads of dimension 128, intermediate size 768, RoPE base 100000, tied embeddings, {positions} positions. One token is
one byte (ids 0 to 255); ids from 256 on are special. The tokenizer adds nothing in front.

It exists so that kvcomp can be tested and measured without a download. It is far too small to be useful for anything
else: what it writes is neither true nor safe to rely on.

## Measured

By `experiments/models/train.py`, uncompressed, bf16, greedy; {machine}, torch {torch}, transformers {transformers}.

| what | value |
| --- | --- |
{rows}

Accuracy is the mean score of `kvcomp.eval.tasks` over seeds that training never used; text of 4096 bytes where nothing
else is said. Held-out text: `experiments/data/held_out.txt`, windows without overlap, all bytes but the first scored.

## Training

Seed {seed}: {steps:,} steps, {tokens:,} tokens, {seconds:.0f} s on one {machine}; settings: `train_result.json`.
Text and licence: `experiments/models/README.md`.
"""
_WHAT = {
    "base": "A byte-level language model of Python source that also finds things in long texts.",
    "chat": "tiny-base, trained a little further on conversations: long texts with questions, and short instructions.",
}


def text(result: dict[str, Any]) -> str:
    rows = [f"| held-out bits per byte, windows of {n} | {bits:.4f} |" for n, bits in result["bits_per_byte"].items()]
    rows += [
        f"| {name} | {entry['accuracy']:.1%} of {entry['questions']} questions |"
        for name, entry in result["accuracy"].items()
    ]
    return _HEAD.format(
        name=f"tiny-{result['stage']}",
        what=_WHAT[result["stage"]],
        parameters=result["parameters"],
        positions=result["configuration"]["max_position_embeddings"],
        rows="\n".join(rows),
        seed=result["seed"],
        machine=result["machine"],
        torch=result["versions"]["torch"],
        transformers=result["versions"]["transformers"],
        **{key: result["trained"][key] for key in ("steps", "tokens", "seconds")},
    )
