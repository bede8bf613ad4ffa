"""Policy and selectors: exactly one budget, every field checked by name, nothing accepted that would mean nothing."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import kvcomp
import numpy as np
import pytest
from kvcomp import (
    H2O,
    AdaKV,
    Full,
    Hybrid,
    KeyNorm,
    LayerRatio,
    Policy,
    PyramidKV,
    Random,
    Rotation,
    SnapKV,
    Streaming,
)

BUDGET = r"policy: budget: expected exactly one of bits, k_bits and v_bits, target_ratio, fraction, budget_bytes, got "


@pytest.mark.parametrize(
    "budget",
    [{}, {"bits": 4, "fraction": 0.5}, {"target_ratio": 4, "budget_bytes": 5}, {"bits": 4, "k_bits": 4, "v_bits": 4}],
)
def test_exactly_one_budget(budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{BUDGET}"):
        Policy(**budget)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"bits": 5}, "bits: expected 2, 3, 4, 8 or 16, got 5"),
        ({"bits": "4"}, "bits: expected 2, 3, 4, 8 or 16, got '4'"),
        ({"k_bits": 4}, r"k_bits, v_bits: expected both, got \(4, None\)"),
        ({"k_bits": 4, "v_bits": 1}, "v_bits: expected 2, 3, 4, 8 or 16, got 1"),
        ({"target_ratio": 0.5}, "target_ratio: expected 1 or more, got 0.5"),
        ({"target_ratio": math.nan}, "target_ratio: expected 1 or more, got nan"),
        ({"fraction": 0.0}, r"fraction: expected a fraction in \(0, 1\], got 0.0"),
        ({"fraction": 1.5}, r"fraction: expected a fraction in \(0, 1\], got 1.5"),
        ({"fraction": math.nan}, r"fraction: expected a fraction in \(0, 1\], got nan"),
        ({"budget_bytes": 0}, "budget_bytes: expected 1 or more bytes, got 0"),
        ({"budget_bytes": 1e9}, "budget_bytes: expected 1 or more bytes, got 1000000000.0"),
    ],
)
def test_wrong_budgets(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^policy: {sentence}$"):
        Policy(**fields)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"sinks": -1}, "sinks: expected 0 or more, got -1"),
        ({"sinks": 1.5}, "sinks: expected 0 or more, got 1.5"),
        ({"window": -3}, "window: expected 0 or more, got -3"),
        ({"window": "3"}, "window: expected 0 or more, got '3'"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"seed": 2**63}, f"seed: expected at most {2**63 - 1}, got {2**63}"),
        ({"sinks": 2**31}, f"sinks: expected at most {2**31 - 1}, got {2**31}"),
        ({"window": 2**24 + 1}, f"window: expected at most {2**24}, got {2**24 + 1}"),
        ({"rotation": "fourier"}, "rotation: expected hadamard or none, got 'fourier'"),
        ({"scale": "max"}, "scale: expected sigma or minmax or search, got 'max'"),
        ({"group": 8}, "group: expected a multiple of 16, got 8"),
        ({"group": 24}, "group: expected a multiple of 16, got 24"),
        ({"classes": ((4, 5),)}, r"classes: expected pairs of 2, 3, 4, 8 or 16 bits, got \(4, 5\)"),
        ({"classes": ((4, 4, 4),)}, r"classes: expected pairs of 2, 3, 4, 8 or 16 bits, got \(4, 4, 4\)"),
        ({"guard": -0.1}, r"guard: expected a fraction in \[0, 1\], got -0.1"),
        ({"guard": math.nan}, r"guard: expected a fraction in \[0, 1\], got nan"),
        ({"importance_temperature": 0.0}, "importance_temperature: expected a positive number, got 0.0"),
        ({"importance_temperature": math.nan}, "importance_temperature: expected a positive number, got nan"),
        ({"calibration_tokens": 15}, "calibration_tokens: expected 16 or more, got 15"),
        ({"rotation": np.eye(4)}, r"rotation: expected hadamard or none, got array\([\s\S]*\)"),
        ({"select": "snap"}, "select: expected a selector or None, got 'snap'"),
        ({"select": SnapKV}, "select: expected a selector or None, got <class 'kvcomp.selectors.SnapKV'>"),
        ({"scale_dtype": "fp8"}, "scale_dtype: expected fp16 or e5m3, got 'fp8'"),
        ({"scale_dtype": np.float16}, "scale_dtype: expected fp16 or e5m3, got <class 'numpy.float16'>"),
        ({"allocate": "greedy"}, "allocate: expected plan or uniform or random or position, got 'greedy'"),
        ({"granularity": "token"}, "granularity: expected run or head or layer, got 'token'"),
        ({"granularity": ["run"]}, r"granularity: expected run or head or layer, got \['run'\]"),
        ({"prefill": "chunked"}, "prefill: expected joint or layerwise, got 'chunked'"),
        ({"decode": "evict"}, "decode: expected grow or hold, got 'evict'"),
        ({"decay": 1.0}, r"decay: expected a factor in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"decay: expected a factor in \[0, 1\), got -0.1"),
        ({"decay": math.nan}, r"decay: expected a factor in \[0, 1\), got nan"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^policy: {sentence}$"):
        Policy(target_ratio=4, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"guard": 0.5},
        {"classes": ((4, 4),)},
        {"allocate": "uniform"},
        {"allocate": "random"},
        {"granularity": "head"},
        {"granularity": "layer"},
        {"decode": "hold"},
        {"drop": False},
        {"importance_temperature": 0.5},
        {"calibration_tokens": 64},
        {"layer_weights": (1, 2)},
    ],
)
def test_fixed_bits_leave_nothing_to_plan(fields: dict[str, Any]) -> None:
    for budget in ({"bits": 4}, {"k_bits": 4, "v_bits": 2}):
        for prefill in ("joint", "layerwise"):
            with pytest.raises(ValueError, match=rf"^policy: {next(iter(fields))}: expected a byte budget "):
                Policy(**budget, **fields, prefill=prefill)


@pytest.mark.parametrize("budget", [{"bits": 4}, {"target_ratio": 4}])
def test_only_what_is_held_decays(budget: dict[str, Any]) -> None:
    sentence = r"^policy: decay: expected decode='hold' beside it \(elsewhere nothing is evicted\), got 0.5$"
    with pytest.raises(ValueError, match=sentence):
        Policy(**budget, decay=0.5)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"bits": 4, "select": SnapKV()},
            "select.keep: expected a fraction with fixed bits, beside which nothing else limits tokens, got None",
        ),
        (
            {"target_ratio": 4, "select": AdaKV()},
            "select.keep: expected a fraction with AdaKV, as the plan shares tokens among heads by itself, got None",
        ),
        (
            {"target_ratio": 4, "allocate": "uniform", "importance_temperature": 0.5},
            "importance_temperature: expected 1 with allocate='uniform', which weighs no errors, got 0.5",
        ),
    ],
)
def test_what_would_have_no_effect(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        Policy(**fields)
    assert str(raised.value) == f"policy: {sentence}"
    Policy(target_ratio=4, allocate="uniform", importance_temperature=0.5, decode="hold")
    Policy(target_ratio=4, allocate="uniform", select=AdaKV())


@pytest.mark.parametrize("fields", [{"granularity": "head"}, {"granularity": "layer"}, {"guard": 0.5}, {"drop": False}])
def test_uniform_has_one_class(fields: dict[str, Any]) -> None:
    name, value = next(iter(fields.items()))
    sentence = rf"^policy: {name}: expected the default with allocate='uniform', which has one class for all, got "
    with pytest.raises(ValueError, match=rf"{sentence}{value!r}$"):
        Policy(target_ratio=4, allocate="uniform", **fields)


@pytest.mark.parametrize("weights", [(), (1, 0), (1, -1), (1, math.nan), (1, math.inf), 5, ("a",), (None,)])
def test_layer_weights_are_positive_numbers(weights: Any) -> None:
    with pytest.raises(ValueError, match=r"^policy: layer_weights: expected a positive number for every layer, got "):
        Policy(target_ratio=4, prefill="layerwise", layer_weights=weights)


def test_layer_weights_are_of_layers_one_by_one() -> None:
    sentence = r"^policy: layer_weights: expected a byte budget and prefill='layerwise' beside it, got \(1, 2\)$"
    with pytest.raises(ValueError, match=sentence):
        Policy(target_ratio=4, layer_weights=(1, 2))
    Policy(target_ratio=4, prefill="layerwise", layer_weights=np.ones(3))


@pytest.mark.parametrize("classes", [(), ((16, 16),), [(16, 16), (16, 16)]])
def test_what_is_held_has_less_than_16_bits(classes: Any) -> None:
    sentence = r"^policy: classes: expected one of fewer than 16 bits with decode='hold' \(16-bit tokens stay\), got "
    with pytest.raises(ValueError, match=sentence):
        Policy(target_ratio=4, decode="hold", classes=classes)
    Policy(target_ratio=4, classes=classes)
    Policy(target_ratio=4, decode="hold", classes=((16, 8),))


@pytest.mark.parametrize(
    "fields",
    [
        {"decode": "hold", "prefill": "layerwise", "allocate": "uniform"},
        {"granularity": "layer", "guard": 0.1, "allocate": "random", "scale_dtype": "e5m3"},
        {"prefill": "layerwise", "layer_weights": (1, 2), "decode": "hold", "decay": 0.0, "drop": False},
        {"rotation": Rotation.random(1, 1, 64), "granularity": "head", "select": AdaKV(keep=0.5)},
    ],
)
def test_what_goes_together(fields: dict[str, Any]) -> None:
    assert Policy(target_ratio=4, **fields) == Policy(target_ratio=4, **fields)
    assert hash(Policy(target_ratio=4, **fields)) == hash(Policy(target_ratio=4, **fields))


@pytest.mark.parametrize(
    "selector, fields, sentence",
    [
        (Full, {"window": 0}, "select.window: expected 1 or more queries, got 0"),
        (SnapKV, {"window": 2.0}, "select.window: expected 1 or more queries, got 2.0"),
        (SnapKV, {"pool": 0}, "select.pool: expected a width of 1 or more, got 0"),
        (SnapKV, {"pool_kind": "mean"}, "select.pool_kind: expected avg or max, got 'mean'"),
        (SnapKV, {"reduce": "avg"}, "select.reduce: expected sum or mean, got 'avg'"),
        (SnapKV, {"keep": 0.0}, r"select.keep: expected a fraction in \(0, 1\], got 0.0"),
        (Streaming, {"keep": 1.01}, r"select.keep: expected a fraction in \(0, 1\], got 1.01"),
        (PyramidKV, {"keep": None}, "select.keep: expected a fraction to share out over the layers, got None"),
        (PyramidKV, {"beta": 0.9}, "select.beta: expected 1 or more, got 0.9"),
        (PyramidKV, {"beta": math.nan}, "select.beta: expected 1 or more, got nan"),
        (PyramidKV, {"beta": math.inf}, "select.beta: expected 1 or more, got inf"),
        (Hybrid, {"keep": None}, "select.keep: expected a fraction to share out over the layers, got None"),
        (Hybrid, {"min_tokens": -1}, "select.min_tokens: expected 0 or more, got -1"),
        (Hybrid, {"base": "snapkv"}, "select.base: expected pyramid or snap, got 'snapkv'"),
        (AdaKV, {"safeguard": -0.1}, r"select.safeguard: expected a fraction in \[0, 1\], got -0.1"),
        (AdaKV, {"safeguard": 1.1}, r"select.safeguard: expected a fraction in \[0, 1\], got 1.1"),
        (AdaKV, {"safeguard": math.nan}, r"select.safeguard: expected a fraction in \[0, 1\], got nan"),
        (AdaKV, {"window": 0}, "select.window: expected 1 or more queries, got 0"),
        (Full, {"values": "mean"}, "select.values: expected none or norm or centered, got 'mean'"),
        (H2O, {"values": None}, "select.values: expected none or norm or centered, got None"),
        (H2O, {"pool": 0}, "select.pool: expected a width of 1 or more, got 0"),
        (H2O, {"pool_kind": "sum"}, "select.pool_kind: expected avg or max, got 'sum'"),
        (H2O, {"keep": 2}, r"select.keep: expected a fraction in \(0, 1\], got 2"),
        (KeyNorm, {"values": "l2"}, "select.values: expected none or norm or centered, got 'l2'"),
        (KeyNorm, {"keep": 0}, r"select.keep: expected a fraction in \(0, 1\], got 0"),
        (Random, {"keep": -1}, r"select.keep: expected a fraction in \(0, 1\], got -1"),
        (Hybrid, {"beta": 0}, "select.beta: expected 1 or more, got 0"),
        (LayerRatio, {"layer_index": -1, "retain_ratio": 0.5}, "layer_index: expected 0 or more, got -1"),
        (LayerRatio, {"layer_index": 0, "retain_ratio": 0}, r"retain_ratio: expected a fraction in \(0, 1\], got 0"),
        (
            LayerRatio,
            {"layer_index": 0, "retain_ratio": 1, "priority": 0},
            "priority: expected a positive weight, got 0",
        ),
        (
            LayerRatio,
            {"layer_index": 0, "retain_ratio": 1, "priority": math.nan},
            "priority: expected a positive weight, got nan",
        ),
        (
            LayerRatio,
            {"layer_index": 0, "retain_ratio": 1, "priority": math.inf},
            "priority: expected a positive weight, got inf",
        ),
    ],
)
def test_wrong_selectors(selector: Any, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^policy: {sentence}$"):
        selector(**fields)


def ratios(*indices: int) -> tuple[LayerRatio, ...]:
    return tuple(LayerRatio(layer_index=i, retain_ratio=0.5) for i in indices)


def test_layer_ratios_rise_inside_their_model() -> None:
    for indices in ((1, 0), (0, 0), (0, 3, 2)):
        with pytest.raises(
            ValueError, match=r"^policy: select.layer_ratios: expected rising layer indices, each once, got \["
        ):
            Hybrid(layer_ratios=ratios(*indices), model_layers=12)
    for depth in (None, 3, 2):
        with pytest.raises(ValueError, match=rf"^policy: select.model_layers: expected .*more than 3, got {depth}$"):
            Hybrid(layer_ratios=ratios(0, 3), model_layers=depth)
    Hybrid(layer_ratios=ratios(0, 3), model_layers=4)


def test_budgets_in_bytes() -> None:
    assert Policy(target_ratio=4).budget(1000) == 250
    assert Policy(target_ratio=3).budget(1000) == 333
    assert Policy(fraction=0.25).budget(1000) == 250
    assert Policy(budget_bytes=77).budget(1000) == 77
    assert Policy(budget_bytes=np.int64(77)).budget(1000) == 77
    assert Policy(bits=4).budget(1000) == -1


def test_fixed_class() -> None:
    assert Policy(bits=3).fixed_class == (3, 3)
    assert Policy(k_bits=4, v_bits=2).fixed_class == (4, 2)
    assert Policy(fraction=0.5).fixed_class is None


@pytest.mark.parametrize(
    "policy, window",
    [
        (Policy(bits=4), 0),
        (Policy(bits=4, select=SnapKV(window=9, keep=0.5)), 9),
        (Policy(bits=4, select=Streaming(keep=0.5)), 0),
        (Policy(target_ratio=4), 32),
        (Policy(target_ratio=4, select=Streaming()), 0),
        (Policy(target_ratio=4, select=SnapKV(window=9)), 9),
        (Policy(target_ratio=4, select=PyramidKV(window=7)), 7),
        (Policy(bits=2, select=Hybrid(window=5)), 5),
        (Policy(target_ratio=4, select=KeyNorm()), 0),
        (Policy(target_ratio=4, select=Random()), 0),
        (Policy(target_ratio=4, select=AdaKV(window=6, keep=0.5)), 6),
        (Policy(target_ratio=4, select=H2O()), 1 << 30),
        (Policy(bits=4, select=H2O(keep=0.5)), 1 << 30),
    ],
)
def test_scoring_window(policy: Policy, window: int) -> None:
    """How many of the prompt's last queries have to be kept for scoring; 0 where nothing reads them."""
    assert policy.scoring_window == window


def test_policies_are_values() -> None:
    assert Policy(bits=4) == Policy(bits=4) != Policy(bits=4, sinks=1)
    assert hash(Policy(target_ratio=4, select=SnapKV())) == hash(Policy(target_ratio=4, select=SnapKV()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy(bits=4).bits = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Policy(4)  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"^policy: sinks: "):
        dataclasses.replace(Policy(bits=4), sinks=-1)


def test_every_method_names_its_source() -> None:
    for selector, source in (
        (Streaming, "2309.17453"),
        (SnapKV, "2404.14469"),
        (PyramidKV, "2406.02069"),
        (Hybrid, "KV-cache-paper"),
        (AdaKV, "2407.11550"),
        (H2O, "2306.14048"),
        (KeyNorm, "2406.11430"),
    ):
        assert source in (selector.__doc__ or "")


def test_importing_needs_numpy_only() -> None:
    """No torch, no transformers, no driver: import, then every name that does not need them."""
    code = f"""
import sys
sys.path[:] = {sys.path!r}
import kvcomp
from kvcomp import Policy, prompt
needed = [name for name in ("torch", "transformers", "cupy", "matplotlib", "lm_eval") if name in sys.modules]
assert not needed, needed
assert all(hasattr(kvcomp, name) for name in kvcomp.__all__ if name not in ("Cache", "compress", "BudgetWarning"))
"""
    site = ["-S"] if sys.flags.no_site else []
    result = subprocess.run([sys.executable, *site, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match=r"^module 'kvcomp' has no attribute 'nothing'$"):
        kvcomp.nothing  # noqa: B018
