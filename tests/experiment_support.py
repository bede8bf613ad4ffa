"""A random model small enough for tests, and what the experiment tests share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"

# A workload that takes a second or two on a random model.
SMALL = [
    "--length", "768", "--families", "needle_multi_key", "--aware", "1", "--agnostic", "1", "--questions", "2",
    "--windows", "1", "--scored", "40",
]  # fmt: skip


def save_model(folder: Path, *, seed: int = 0) -> Path:
    """Two layers, two query heads and one KV head of 64 channels, fp32, with the shipped models' tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    sys.path.insert(0, str(EXPERIMENTS / "models"))
    try:
        import package
    finally:
        sys.path.pop(0)
    torch.manual_seed(seed)
    config = package.configuration()
    config.update({"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 1024,
                   "initializer_range": 0.2})  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    package.tokenizer(chat=False).save_pretrained(folder)
    return folder


def write_config(path: Path, **changes: Any) -> Path:
    """A hybrid experiment for the small model; ``changes`` update its sections, or replace keys outside them."""
    values: dict[str, Any] = {
        "model_name": "small",
        "model_layers": 4,
        "max_sequence_length": 1024,
        "selector": {"strategy": "hybrid", "global_retain_ratio": 0.8, "window_size": 32, "min_tokens": 16},
        "quantization": {"key_bits": 4, "value_bits": 4, "high_precision_guard": 0.2, "group_size": 32},
        "budget": {"target_compression_ratio": 4.0},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = {k: v for k, v in {**values[key], **value}.items() if v is not None}
        else:
            values[key] = value
    path.write_text(yaml.safe_dump(values))
    return path
