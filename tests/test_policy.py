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
from kvcomp import Full, Hybrid, LayerRatio, Policy, PyramidKV, SnapKV, Streaming

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
    ],
)
def test_wrong_fields(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^policy: {sentence}$"):
        Policy(target_ratio=4, **fields)


@pytest.mark.parametrize("fields", [{"guard": 0.5}, {"classes": ((4, 4),)}])
def test_fixed_bits_leave_nothing_to_plan(fields: dict[str, Any]) -> None:
    for budget in ({"bits": 4}, {"k_bits": 4, "v_bits": 2}):
        with pytest.raises(ValueError, match=rf"^policy: {next(iter(fields))}: expected a byte budget beside it "):
            Policy(**budget, **fields)


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
        (Hybrid, {"keep": None}, "select.keep: expected a fraction to share out over the layers, got None"),
        (Hybrid, {"min_tokens": -1}, "select.min_tokens: expected 0 or more, got -1"),
        (Hybrid, {"base": "snapkv"}, "select.base: expected pyramid or snap, got 'snapkv'"),
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
        (Policy(bits=4, select=Full()), 0),
        (Policy(bits=4, select=SnapKV(window=9, keep=0.5)), 9),
        (Policy(bits=4, select=Streaming(keep=0.5)), 0),
        (Policy(target_ratio=4), 32),
        (Policy(target_ratio=4, select=Streaming()), 0),
        (Policy(target_ratio=4, select=SnapKV(window=9)), 9),
        (Policy(target_ratio=4, select=PyramidKV(window=7)), 7),
        (Policy(bits=2, select=Hybrid(window=5)), 5),
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
