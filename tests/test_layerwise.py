"""Policy(prefill="layerwise"): every layer in its share, nothing of it kept behind it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kvcomp import AdaKV, BudgetError, Hybrid, LayerRatio, Policy, PyramidKV, Rotation, SnapKV, Streaming
from kvcomp.layer_input import LayerInput
from kvcomp.prompt import Compressor, compress_prompt
from test_hf_memory import resettable
from test_prompt import LAYERS, SELECTORS, B, H, S, bf16_bytes, check_bytes, check_contents, check_tails, inputs

PEAK = """
import ctypes, gc, json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import kvcomp

LAYERS, PROMPT, RATIO = 12, 16384, 8
kind = sys.argv[1]

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))

torch.set_num_threads(1)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=PROMPT + 64)).eval()
ids = torch.randint(3, 64, (1, PROMPT))
# Attention over the prompt is not what is measured, and slow: any cheap stand-in will do for it.
torch.nn.functional.scaled_dot_product_attention = lambda query, key, value, **_: value.expand_as(query).contiguous()

def run(tokens):
    cache = None
    if kind != "none":
        cache = kvcomp.Cache(model.config, kvcomp.Policy(target_ratio=RATIO, prefill=kind))
    with torch.inference_mode():
        model(ids[:, :tokens], past_key_values=cache, use_cache=kind != "none", logits_to_keep=1)
    return cache

run(2048)  # what is allocated once
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # VmHWM := VmRSS
before = kib("VmHWM")
cache = run(PROMPT)
print(json.dumps({"added": 1024 * (kib("VmHWM") - before), "layer": PROMPT * 2 * 2 * 64 * 4,
                  "nbytes": 0 if cache is None else cache.nbytes, "budget": LAYERS * PROMPT * 2 * 2 * 64 * 2 // RATIO}))
"""


def peak(kind: str) -> dict[str, int]:
    # What is freed goes back at once: glibc's moving threshold keeps up to a layer in some runs, and not in others.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not resettable(), reason="needs Linux's /proc/self/clear_refs")
def test_no_more_than_one_layer_is_ever_uncompressed() -> None:
    """12 layers of 16 MiB each, a budget of 12 MiB. Above what the model alone takes (no cache), the peak is one
    layer, the budget and a half layer of scratch memory at most; compressed jointly, ten layers at least."""
    alone, layerwise, joint = peak("none"), peak("layerwise"), peak("joint")
    layer, budget = layerwise["layer"], layerwise["budget"]
    assert 0 < layerwise["nbytes"] <= budget and 0 < joint["nbytes"] <= budget
    assert layerwise["added"] - alone["added"] <= 1.5 * layer + budget, (alone, layerwise)
    assert joint["added"] - alone["added"] >= 10 * layer, (alone, joint)


# ---- budgets


def layered(select: Any = None, ratio: float = 4.0, **fields: Any) -> Policy:
    return Policy(target_ratio=ratio, select=select, prefill="layerwise", **fields)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("ratio", [2.5, 4.0, 6.0])
def test_a_ratio_is_met_in_held_bytes(name: str, ratio: float) -> None:
    first = np.array([0, 75], np.int32)
    layers = inputs(first=first)
    policy = layered(SELECTORS[name], ratio, sinks=4, window=16)
    packed = compress_prompt(layers, policy, positions=True)
    joint = compress_prompt(layers, replace(policy, prefill="joint"))
    assert packed.nbytes <= bf16_bytes(layers, first) / ratio == joint.report.bf16_bytes / ratio
    assert packed.report.bf16_bytes == joint.report.bf16_bytes and not packed.report.over_budget
    assert packed.report.budget_bytes == joint.report.budget_bytes
    if SELECTORS[name] is None:
        assert packed.nbytes >= 0.9 * joint.nbytes, "what is allowed is used"
    check_bytes(packed)
    check_tails(packed, 16, S - first)
    check_contents(packed, layers, first, policy)


@pytest.mark.parametrize(
    "fields",
    [
        {"allocate": "uniform"},
        {"allocate": "random"},
        {"granularity": "head"},
        {"granularity": "layer"},
        {"scale_dtype": "e5m3"},
        {"rotation": Rotation.random(LAYERS, H, 64)},
        {"drop": False},
        {"decode": "hold"},
    ],
    ids=lambda fields: "-".join(map(str, fields)),
)
def test_with_every_other_field(fields: dict[str, Any]) -> None:
    layers = inputs(s=1000)
    policy = layered(ratio=5.0, **fields)
    packed = compress_prompt(layers, policy, positions=True)
    assert packed.nbytes <= bf16_bytes(layers) / 5
    check_bytes(packed)


def test_fixed_bits_are_the_same_one_by_one() -> None:
    for policy in (Policy(bits=4), Policy(k_bits=3, v_bits=2, select=SnapKV(keep=0.5), sinks=2)):
        one, other = (
            compress_prompt(inputs(), replace(policy, prefill=prefill), positions=True)
            for prefill in ("joint", "layerwise")
        )
        assert one.nbytes == other.nbytes and one.ledger() == other.ledger() and one.report == other.report
        for a, b in zip(one.layers, other.layers, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a.unpack(), b.unpack(), strict=True))


def test_nothing_of_a_layer_is_kept() -> None:
    """What the compressor holds after a layer: its pages. Compressed before the next layer is there."""
    layers = inputs()
    compressor = Compressor(layered(), LAYERS)
    held = []
    for layer in layers:
        compressor.add(layer)
        assert not compressor._ready
        held.append(compressor._held())
    assert held == sorted(held) and held[0] > 0
    assert compressor.finish().nbytes <= held[-1], "slabs are shared in the end"


# ---- shares


def test_layer_weights_are_honoured() -> None:
    layers = inputs(s=1000)
    share = bf16_bytes(layers) / 4 / 10
    packed = compress_prompt(layers, layered(layer_weights=(5, 2, 3)))
    for weight, nbytes in zip((5, 2, 3), packed.report.bytes_per_layer, strict=True):
        assert 0.85 * weight * share <= nbytes <= 1.1 * weight * share, "less rounding, and what is left over"
    equal = compress_prompt(layers, layered()).report.bytes_per_layer
    assert max(equal) <= 1.05 * min(equal)
    assert equal == compress_prompt(layers, layered(layer_weights=(7.5, 7.5, 7.5))).report.bytes_per_layer


def test_what_a_layer_leaves_is_the_others() -> None:
    """The first layer may keep a quarter of its tokens only: what it does not take rolls over."""
    layers = inputs(s=1000)
    given = []
    for index, layer in enumerate(layers):
        importance = np.ones((B, H, 1000), np.float32)
        given.append(LayerInput(layer.keys, layer.values, importance=importance))
        if index == 0:  # most of it is padding to the plan: one class of 2 bits will do
            given[0].importance[:, :, 100:] = 0
    policy = layered(ratio=4.0, classes=((2, 2),), guard=0.0, select=SnapKV(), layer_weights=(8, 1, 1))
    rich = compress_prompt(given, policy).report
    assert rich.budget_bytes is not None
    alone = rich.budget_bytes * 8 / 10
    assert rich.bytes_per_layer[0] < 0.8 * alone, "2 bits for all tokens are less than its share"
    for nbytes in rich.bytes_per_layer[1:]:
        assert nbytes > 1.5 * rich.budget_bytes / 10


@pytest.mark.parametrize("select", [PyramidKV(keep=0.4, beta=5), Hybrid(keep=0.4, beta=5)], ids=["pyramid", "hybrid"])
def test_a_selectors_shares_are_the_layers_shares(select: Any) -> None:
    layers = inputs(s=1500, layers=6)
    report = compress_prompt(layers, layered(select, 8.0)).report
    assert report.kept_per_layer == sorted(report.kept_per_layer, reverse=True)
    assert report.bytes_per_layer[0] > 3 * report.bytes_per_layer[-1]
    assert all(a > 0.95 * b for a, b in itertools.pairwise(report.bytes_per_layer))


@pytest.mark.parametrize("select", [None, Streaming(keep=0.5), AdaKV(keep=0.5)], ids=["none", "streaming", "ada"])
def test_equal_shares_without_a_pyramid(select: Any) -> None:
    found = compress_prompt(inputs(s=1000), layered(select, 6.0)).report.bytes_per_layer
    assert max(found) <= 1.1 * min(found)


# ---- too little


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer_weights": (1, 30, 1)},
        {"layer_weights": (30, 1, 1)},
        {"layer_weights": (1, 1, 30)},
        {"select": PyramidKV(window=16, keep=0.4, beta=20)},
        {"allocate": "uniform"},
        {"drop": False},
    ],
    ids=["equal", "middle", "first", "last", "pyramid", "uniform", "drop"],
)
def test_the_smallest_budget_is_named_and_works(fields: dict[str, Any]) -> None:
    """Layers whose share is below their smallest plan take that from the others."""
    layers = inputs()
    policy = Policy(budget_bytes=1000, prefill="layerwise", sinks=4, window=32, **fields)
    with pytest.raises(
        BudgetError, match=r"^plan: budget: expected at least \d+ bytes \(a ratio of [\d.]+ or less\), got 1000 bytes$"
    ) as caught:
        compress_prompt(layers, policy)
    least = caught.value.least_bytes
    packed = compress_prompt(layers, replace(policy, budget_bytes=least))
    assert packed.nbytes <= least and not packed.report.over_budget
    check_bytes(packed)
    over = compress_prompt(layers, policy, least_if_over=True)
    assert over.report.over_budget and 1000 < over.nbytes <= least
    check_bytes(over)
    joint = compress_prompt(layers, replace(policy, prefill="joint", layer_weights=None), least_if_over=True)
    # Each layer in slabs of its own: at most one memory page a layer and page size above the joint plan.
    assert least <= joint.nbytes + LAYERS * 2 * 4096
    for budget in (least - 8 * 4096, least // 2):
        with pytest.raises(BudgetError):
            compress_prompt(layers, replace(policy, budget_bytes=budget))


def test_tiny_budgets_end() -> None:
    """A limit that falls below zero while slack is taken off is not: no limit."""
    for nbytes in (1, 50, 4095, 4097, 8191, 9000):
        for s in (1, 3, 17):
            for prefill in ("joint", "layerwise"):
                policy = Policy(budget_bytes=nbytes, prefill=prefill, select=SnapKV(), window=1)  # type: ignore[arg-type]
                over = compress_prompt(inputs(s=s), policy, least_if_over=True)
                assert over.nbytes <= nbytes or over.report.over_budget


def test_weights_of_another_depth() -> None:
    with pytest.raises(ValueError, match=r"^compress: layer_weights: expected one for each of 3 layers, got 2$"):
        compress_prompt(inputs(), layered(layer_weights=(1, 2)))


def test_layers_come_one_by_one_and_all_of_them() -> None:
    layers = inputs()
    compressor = Compressor(layered(), LAYERS)
    compressor.add(layers[0])
    with pytest.raises(ValueError, match=r"^compress: layers: expected 3, got 1$"):
        compressor.finish()
    compressor.add(layers[1])
    compressor.add(layers[2])
    with pytest.raises(ValueError, match=r"^compress: layers: expected 3, got more$"):
        compressor.add(layers[0])
    assert compressor.finish().nbytes > 0


def test_priorities_weigh_the_shares() -> None:
    def shares(middle: float) -> list[int]:
        ratios = tuple(
            LayerRatio(layer_index=index, retain_ratio=1.0, priority=middle if index == 1 else 1.0)
            for index in range(3)
        )
        select = Hybrid(window=16, model_layers=3, layer_ratios=ratios)
        policy = Policy(target_ratio=5, prefill="layerwise", select=select)
        return compress_prompt(inputs(s=1000), policy).report.bytes_per_layer

    even, uneven = shares(1.0), shares(2.0)
    assert uneven[1] > 1.3 * even[1] and uneven[2] < even[2]
