"""Configured and effective values of the keys that a plan may lower, or that scale to the prompt and depth at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ExperimentConfig, most_bits, pool_width, scaled, scaled_window


def configured_and_effective(
    config: ExperimentConfig, prompt_tokens: int, plan: Mapping[str, Any] | None, ratio: float
) -> dict[str, dict[str, Any]]:
    """Key -> {configured, effective}. ``plan``: a ``kvcomp.prompt.Report`` as a dict, None without compression."""
    selector, quantization = config.selector, config.quantization
    keys: dict[str, tuple[Any, Any]] = {
        "budget.target_compression_ratio": (config.budget.target_compression_ratio, ratio),
    }
    if plan is not None:
        k_bits, v_bits = _mean_bits(plan["tokens_per_class"])
        keys |= {
            "selector.global_retain_ratio": (selector.global_retain_ratio, plan["kept_fraction"]),
            "selector.layer_budgets": (
                [budget.model_dump() for budget in selector.layer_budgets],
                plan["kept_per_layer"],
            ),
            "selector.window_size": (selector.window_size, scaled_window(config, prompt_tokens)),
            "selector.min_tokens": (selector.min_tokens, scaled(selector.min_tokens, config, prompt_tokens)),
            "selector.clustering_k": (selector.clustering_k, pool_width(config)),
            "quantization.high_precision_guard": (
                quantization.high_precision_guard,
                plan["high_precision_fraction"],
            ),
            "quantization.key_bits": (most_bits(config)[0], k_bits),
            "quantization.value_bits": (most_bits(config)[1], v_bits),
        }
    return {key: {"configured": asked, "effective": became} for key, (asked, became) in keys.items()}


def _mean_bits(tokens_per_class: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Mean bits of keys and values over the tokens that are not at 16 bits; None where there are none."""
    counts = {tuple(map(int, name.split("/"))): count for name, count in tokens_per_class.items() if name != "16/16"}
    total = sum(counts.values())
    if not total:
        return None, None
    return tuple(sum(bits[part] * count for bits, count in counts.items()) / total for part in (0, 1))  # type: ignore[return-value]
