"""A model's linear layers, found and quantized in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from . import weights
from .linear import SharedScaleLinear

TARGETS = ("mlp", "all")
_ATTENTION = ("attn", "attention")
# What chooses experts, or gates their sum: small, and everything after depends on it.
_ROUTERS = ("router", "gate", "shared_expert_gate")


@dataclass(frozen=True)
class LayerReport:
    name: str
    out_features: int
    in_features: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.out_features * self.in_features)


@dataclass(frozen=True)
class W4Report:
    """What quantize_model did. Bytes are those that layers hold, scales and what pads among them; biases are not."""

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def weights(self) -> int:
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


def find_linears(model: torch.nn.Module, target: str = "mlp", skip: Sequence[str] = ()) -> list[str]:
    """Names of the nn.Linear layers of a model's repeated blocks, in its order: "all" of them, or those of "mlp", which
    are the ones outside attention modules; by where they are and not by their own names, so that fused projections
    (qkv_proj, gate_up_proj) are found as others are. Embeddings and the output layer are not in blocks; routers of
    experts are left out, and so is what has a name, or a part of its path, in ``skip``.

    ValueError where there are none."""
    if target not in TARGETS:
        raise ValueError(f"quantize_model: target: expected one of {', '.join(TARGETS)}, got {target!r}")
    found = []
    for name, module in model.named_modules():
        path = name.split(".")
        if not isinstance(module, torch.nn.Linear) or not any(part.isdigit() for part in path):
            continue
        if path[-1] in _ROUTERS or name in skip or set(path) & set(skip):
            continue
        attends = any(mark in part for part in path[:-1] for mark in _ATTENTION)
        if target == "all" or not attends:
            found.append(name)
    if not found:
        raise ValueError(
            f"quantize_model: model: expected nn.Linear layers in repeated blocks (target {target}), got none in "
            f"{type(model).__name__}"
        )
    return found


def quantize_model(
    model: torch.nn.Module,
    target: str = "mlp",
    *,
    group_size: int = 128,
    scale_mbits: int = 5,
    rounding: str = "nearest",
    skip: Sequence[str] = (),
) -> W4Report:
    """Replaces a model's linear layers, those of its MLPs or "all" of its blocks', by SharedScaleLinear, one after the
    other, where they are. A transformers model is then one that save_pretrained and from_pretrained know.

    ValueError for formats that do not exist and models without such layers; weights that are not finite are found
    before anything is replaced."""
    weights.check_format("quantize_model", group_size, scale_mbits, rounding)
    names = find_linears(model, target, skip)
    for name in names:
        if not bool(linear_at(model, name).weight.isfinite().all()):
            raise ValueError(f"quantize_model: {name}: expected finite weights, got NaN or Inf")
    for name in names:
        layer = SharedScaleLinear.from_linear(linear_at(model, name), group_size, scale_mbits, rounding=rounding)
        replace_module(model, name, layer)
    if hasattr(model, "save_pretrained"):
        from .hf import W4Config, mark

        mark(model, W4Config(target, group_size, scale_mbits, rounding, list(skip)))
    return report(model)


def report(model: torch.nn.Module) -> W4Report:
    """Of the quantized layers that a model has."""
    return W4Report(
        [
            LayerReport(name, module.out_features, module.in_features, module.weight.nbytes)
            for name, module in model.named_modules()
            if isinstance(module, SharedScaleLinear)
        ]
    )


def linear_at(model: torch.nn.Module, name: str) -> torch.nn.Linear:
    """A layer that find_linears found."""
    module = model.get_submodule(name)
    assert isinstance(module, torch.nn.Linear)
    return module


def replace_module(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; what several names share counts once."""
    held = {part.data_ptr(): part.nbytes for part in (*model.parameters(), *model.buffers()) if part.nbytes}
    return sum(held.values())
