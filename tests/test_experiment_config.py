"""Experiment files: every key means what it says, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from experiment_support import EXPERIMENTS, write_config
from kvcomp.experiment import config as experiment
from kvcomp.selectors import H2O, AdaKV, Full, Hybrid, Streaming

# The seed's table: spec/kv_cache.md A1.
SEED = {
    "hybrid_6x": (65536, 0.36, 256, 0.65, 2048, 18, {0: 0.52, 7: 0.34, 15: 0.22, 23: 0.16}, 4, 3, 0.48, 16, 6),
    "hybrid_8x": (65536, 0.32, 288, 0.6, 2688, 20, {0: 0.45, 7: 0.22, 15: 0.14, 23: 0.10}, 3, 2, 0.60, 32, 8),
    "hybrid_12x": (
        131072, 0.42, 320, 0.5, 3328, 24, {0: 0.38, 8: 0.22, 16: 0.16, 24: 0.12, 31: 0.08}, 3, 2, 0.55, 64, 12,
    ),
    "qwen_8x": (32768, 0.32, 256, 0.6, 2048, 20, {0: 0.45, 7: 0.28, 14: 0.18, 21: 0.12}, 3, 2, 0.60, 32, 8),
    "qwen_8x_aggressive": (
        32768, 0.18, 256, 0.6, 2048, 20, {0: 0.35, 7: 0.20, 14: 0.12, 21: 0.08, 27: 0.05}, 2, 2, 0.50, 32, 8,
    ),
    "qwen_12x": (
        32768, 0.12, 256, 0.5, 2048, 15, {0: 0.28, 7: 0.15, 14: 0.08, 21: 0.05, 27: 0.03}, 2, 2, 0.40, 64, 12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEED)
def test_shipped_files_hold_the_seeds_values(name: str) -> None:
    config = experiment.load(EXPERIMENTS / f"{name}.yaml")
    selector, quantization = config.selector, config.quantization
    assert (
        config.max_sequence_length,
        selector.global_retain_ratio,
        selector.min_tokens,
        selector.attention_temperature,
        selector.window_size,
        selector.clustering_k,
        {budget.layer_index: budget.retain_ratio for budget in selector.layer_budgets},
        quantization.key_bits,
        quantization.value_bits,
        quantization.high_precision_guard,
        quantization.group_size,
        config.budget.target_compression_ratio,
    ) == SEED[name]
    assert selector.strategy == "hybrid" and quantization.asymmetric and quantization.stochastic_rounding


def test_baseline_is_the_uncompressed_cache() -> None:
    config = experiment.load(EXPERIMENTS / "baseline_full.yaml")
    assert config.uncompressed and config.selector.strategy == "pyramid"
    assert experiment.to_policy(config, prompt_tokens=4096).bits == 16


def test_the_policy_of_hybrid_8x() -> None:
    config = experiment.load(EXPERIMENTS / "hybrid_8x.yaml")
    policy = experiment.to_policy(config, prompt_tokens=4096, seed=5)
    assert (policy.target_ratio, policy.window, policy.sinks, policy.group) == (8.0, 168, 4, 32)
    assert (policy.zero_point, policy.stochastic, policy.seed, policy.calibration_tokens) == (True, True, 5, 256)
    assert (policy.guard, policy.importance_temperature) == (0.6, 0.6)
    assert policy.classes == ((2, 2), (3, 2))
    select = policy.select
    assert isinstance(select, Hybrid)
    assert (select.pool, select.keep, select.min_tokens, select.base, select.model_layers) == (
        21,
        0.32,
        18,
        "pyramid",
        40,
    )
    assert [(ratio.layer_index, ratio.retain_ratio) for ratio in select.layer_ratios] == [
        (0, 0.45), (7, 0.22), (15, 0.14), (23, 0.1), (24, 0.32), (39, 0.32),
    ]  # fmt: skip


def test_policy_load_reads_experiment_files() -> None:
    from kvcomp import Policy

    assert Policy.load(EXPERIMENTS / "hybrid_6x.yaml", prompt_tokens=4096).window == 128
    assert Policy.load(EXPERIMENTS / "hybrid_6x.yaml").window == 2048


def policy_of(path: Path, prompt_tokens: int = 512, **changes: Any) -> Any:
    config = experiment.load(write_config(path / "config.yaml", **changes))
    return experiment.to_policy(config, prompt_tokens=prompt_tokens)


@pytest.mark.parametrize(
    ("changes", "attribute", "expected"),
    [
        ({"budget": {"target_compression_ratio": 5}}, "target_ratio", 5.0),
        ({"selector": {"window_size": 64}}, "window", 32),
        ({"max_sequence_length": 512}, "window", 32),
        ({"selector": {"window_size": None}}, "window", 0),
        ({"selector": {"attention_temperature": 0.5}}, "importance_temperature", 0.5),
        ({"quantization": {"asymmetric": False}}, "zero_point", False),
        ({"quantization": {"stochastic_rounding": False}}, "stochastic", False),
        ({"quantization": {"group_size": 64}}, "group", 64),
        ({"quantization": {"calibration_steps": 128}}, "calibration_tokens", 128),
        ({"quantization": {"high_precision_guard": 0.0}}, "guard", 0.0),
        ({"quantization": {"key_bits": 3, "value_bits": 2}}, "classes", ((2, 2), (3, 2))),
        ({"quantization": {"key_bits": None, "value_bits": None, "default_bits": 2}}, "classes", ((2, 2),)),
        ({"quantization": {"enabled": False}}, "classes", ((16, 16),)),
        ({"quantization": {"enabled": False}}, "guard", None),
        ({"selector": {"strategy": "snap"}}, "sinks", 0),
        ({"selector": {"strategy": "hybrid"}}, "sinks", 4),
    ],
)
def test_a_key_reaches_the_policy(tmp_path: Path, changes: dict[str, Any], attribute: str, expected: Any) -> None:
    assert getattr(policy_of(tmp_path, **changes), attribute) == expected


@pytest.mark.parametrize(
    ("changes", "attribute", "expected"),
    [
        ({"global_retain_ratio": 0.5}, "keep", 0.5),
        ({"min_tokens": 64}, "min_tokens", 32),
        ({"clustering_k": 9}, "pool", 9),
        ({"clustering_k": 10}, "pool", 11),
        ({"strategy": "snap"}, "base", "snap"),
        ({"strategy": "pyramid"}, "base", "pyramid"),
    ],
)
def test_a_key_reaches_the_selector(tmp_path: Path, changes: dict[str, Any], attribute: str, expected: Any) -> None:
    assert getattr(policy_of(tmp_path, selector=changes).select, attribute) == expected


def test_streaming_and_full(tmp_path: Path) -> None:
    streaming = policy_of(tmp_path, selector={"strategy": "streaming", "window_size": None, "global_retain_ratio": 0.3})
    assert streaming.select == Streaming(keep=0.3)
    assert (streaming.window, streaming.sinks) == (64, 4)
    # Least tokens: 900 of 1024 are 450 of 512, more than 0.3 of them.
    more = policy_of(tmp_path, selector={"strategy": "streaming", "global_retain_ratio": 0.3, "min_tokens": 900})
    assert more.select == Streaming(keep=450 / 512)
    for strategy, kind in (("ada", AdaKV), ("h2o", H2O)):
        policy = policy_of(tmp_path, selector={"strategy": strategy, "clustering_k": 4, "global_retain_ratio": 0.3})
        assert isinstance(policy.select, kind) and (policy.select.keep, policy.select.pool) == (0.3, 5)
    full = policy_of(tmp_path, selector={"strategy": "full", "global_retain_ratio": None, "min_tokens": None})
    assert full.select == Full()


def test_layers_are_scaled_and_interpolated(tmp_path: Path) -> None:
    """Layers 1 and 3 of 9 are listed; at a depth of 5 the layers are 0, 2, 4, 6, 8 of them."""
    from kvcomp.choose import layer_priorities, layer_shares

    budgets = [
        {"layer_index": 3, "retain_ratio": 0.2, "priority": 3.0},
        {"layer_index": 1, "retain_ratio": 0.4, "priority": 2.0},
    ]
    changes = {"global_retain_ratio": 0.5, "layer_budgets": budgets, "min_tokens": 1}
    select = policy_of(tmp_path, model_layers=9, selector=changes).select
    # Layer 2 lies half-way between the listed; the others keep global_retain_ratio.
    assert layer_shares(select, 5, 100, 1).tolist() == [50, 30, 50, 50, 50]
    assert layer_priorities(select, 5).tolist() == [1.0, 2.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"selector": {"colour": 1}}, "selector.colour: expected a known key"),
        ({"speed": 3}, "speed: expected a known key"),
        ({"selector": {"strategy": "best"}}, "selector.strategy: expected 'full', 'streaming'"),
        ({"selector": {"global_retain_ratio": 0.0}}, "selector.global_retain_ratio: expected a number > 0"),
        ({"selector": {"global_retain_ratio": "half"}}, "selector.global_retain_ratio: expected a valid number"),
        ({"quantization": {"key_bits": 5}}, "quantization.key_bits: expected 2, 3, 4, 8 or 16, got 5"),
        ({"quantization": {"group_size": 24}}, "quantization.group_size: expected a multiple of 16, got 24"),
        ({"quantization": {"high_precision_guard": 1.5}}, "quantization.high_precision_guard: expected a number <= 1"),
        ({"budget": {"target_compression_ratio": 0.5}}, "budget.target_compression_ratio: expected a number >= 1"),
        ({"budget": {"target_compression_ratio": None}}, "budget.target_compression_ratio: expected a value, got none"),
        ({"metrics": {"compressed_speed": 2.0}}, "metrics: expected keys among"),
        ({"selector": {"strategy": "streaming", "clustering_k": 9}}, "selector.clustering_k: expected to be left out"),
        ({"selector": {"strategy": "full"}}, "selector.global_retain_ratio: expected to be left out"),
        (
            {
                "model_layers": 4,
                "selector": {"strategy": "h2o", "layer_budgets": [{"layer_index": 1, "retain_ratio": 1}]},
            },
            "selector.layer_budgets: expected to be left out",
        ),
        ({"selector": {"layer_budgets": [{"layer_index": 9, "retain_ratio": 0.5}]}}, "below model_layers = 4, got 9"),
        (
            {"selector": {"layer_budgets": [{"layer_index": 1, "retain_ratio": 0.5}] * 2}},
            "selector.layer_budgets: expected every layer_index once",
        ),
        (
            {"model_layers": None, "selector": {"layer_budgets": [{"layer_index": 1, "retain_ratio": 0.5}]}},
            "model_layers: expected the depth that layer_budgets count on",
        ),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        experiment.load(write_config(tmp_path / "config.yaml", **changes))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["model_name: [", "- 1\n- 2\n", "a: 1\na: 2\n", "\x00\x01", "model_name: {a: 1}\n"])
def test_a_foreign_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        experiment.load(path)
    assert str(caught.value).startswith(f"config: {path}: ") and "\n" not in str(caught.value)


def test_json_is_read_too(tmp_path: Path) -> None:
    import json

    import yaml

    values = yaml.safe_load((EXPERIMENTS / "hybrid_8x.yaml").read_text())
    path = tmp_path / "hybrid_8x.json"
    path.write_text(json.dumps(values))
    assert experiment.load(path) == experiment.load(EXPERIMENTS / "hybrid_8x.yaml")
