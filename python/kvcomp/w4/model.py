"""A model's linear layers, found and quantized in place."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import stack, weights
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
    stacks: int = 0  # sets of layers that are one product each

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def weights(self) -> int:
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """0 of no layers."""
        return 8 * self.nbytes / max(self.weights, 1)


def find_linears(model: torch.nn.Module, target: str = "mlp", skip: Sequence[str] = ()) -> list[str]:
    """Names of the nn.Linear layers of a model's repeated blocks, in its order: "all" of them, or those of "mlp", which
    are the ones outside attention modules; by where they are and not by their own names, so that fused projections
    (qkv_proj, gate_up_proj) are found as others are. Embeddings and the output layer are not in blocks. Left out are
    routers of experts; experts, where all are one parameter of three dimensions; subclasses of nn.Linear, whose own
    forward would be lost; layers whose ``weight`` a module above them reads itself (T5's wo, those of
    nn.TransformerEncoderLayer), which packed bytes cannot stand for; what transformers keeps in fp32; and what has a
    name, or a part of its path, in ``skip``.

    ValueError where there are none."""
    if target not in TARGETS:
        raise ValueError(f"quantize_model: target: expected one of {', '.join(TARGETS)}, got {target!r}")
    left = {*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    found = []
    for name, module in model.named_modules():
        path = name.split(".")
        if type(module) is not torch.nn.Linear or not any(part.isdigit() for part in path):
            continue
        if path[-1] in _ROUTERS or name in left or set(path) & left or _is_read(model, path):
            continue
        attends = any(mark in part.lower() for part in path[:-1] for mark in _ATTENTION)
        if target == "all" or not attends:
            found.append(name)
    if not found:
        raise ValueError(
            f"quantize_model: model: expected nn.Linear layers in repeated blocks (target {target}), got none in "
            f"{type(model).__name__}"
        )
    return found


def _is_read(model: torch.nn.Module, path: list[str]) -> bool:
    """Whether a module above the layer reads more of its weight than where it is."""
    above = model
    for depth, part in enumerate(path):
        kind: Any = type(above)
        if ".".join(path[depth:]) in _reads(kind):
            return True
        above = above.get_submodule(part)
    return False


@functools.cache
def _reads(kind: type) -> frozenset[str]:
    """Names whose ``weight`` the methods of a class of modules use: self.<name>.weight."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base is torch.nn.Module:
            break
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # made without a file
            continue
        found.update(re.findall(r"\bself\.([A-Za-z_][\w.]*)\.weight\b(?!\.device\b)", source))
    return frozenset(found)


def quantize_model(
    model: torch.nn.Module,
    target: str = "mlp",
    *,
    group_size: int = 128,
    scale_mbits: int = 5,
    rounding: str = "nearest",
    skip: Sequence[str] = (),
    stacked: bool = True,
) -> W4Report:
    """Replaces a model's linear layers, those of its MLPs or "all" of its blocks', by SharedScaleLinear, one after the
    other, where they are. A transformers model is then one that save_pretrained and from_pretrained know.

    stacked: layers that a module calls with the same x (q_proj, k_proj and v_proj; gate_proj and up_proj) are one
        product where x has few rows; their weights are then parts of one buffer (stack.py).

    ValueError for formats that do not exist, models without such layers and models that are quantized already (their
    configuration has room for one format); weights that are not finite, or not there (device meta), are found before
    anything is replaced."""
    weights.check_format("quantize_model", group_size, scale_mbits, rounding)
    held = len(report(model).layers)
    if held or getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError(
            "quantize_model: model: expected one that is not quantized, got one "
            + (f"with {held} packed layers" if held else "whose configuration says that it is")
        )
    names = find_linears(model, target, skip)
    for name in names:
        weight = linear_at(model, name).weight
        if weight.is_meta:
            raise ValueError(f"quantize_model: {name}: expected weights that are loaded, got none (device meta)")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"quantize_model: {name}: expected finite weights, got NaN or Inf")
    for name in names:
        layer = SharedScaleLinear.from_linear(linear_at(model, name), group_size, scale_mbits, rounding=rounding)
        replace_module(model, name, layer)
    if stacked:
        stack.stack_layers(model)
    if hasattr(model, "save_pretrained"):
        from .hf import W4Config, mark

        mark(model, W4Config(target, group_size, scale_mbits, rounding, list(skip), stacked))
    return report(model)


def report(model: torch.nn.Module) -> W4Report:
    """Of the quantized layers that a model has."""
    return W4Report(
        [
            LayerReport(name, module.out_features, module.in_features, module.weight.nbytes)
            for name, module in model.named_modules()
            if isinstance(module, SharedScaleLinear)
        ],
        stack.stacked(model),
    )


def linear_at(model: torch.nn.Module, name: str) -> torch.nn.Linear:
    """A layer that find_linears found."""
    module = model.get_submodule(name)
    assert isinstance(module, torch.nn.Linear)
    return module


def replace_module(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Wherever the module of this name is: a model may have one in several places."""
    former = model.get_submodule(name)
    for parent in list(model.modules()):
        for last, child in list(parent._modules.items()):
            if child is former:
                setattr(parent, last, module)


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, and of the scales that bitsandbytes hangs on its weights; what several names
    share counts once."""
    parts = [*model.parameters(), *model.buffers()]
    parts += [scale for module in model.modules() for scale in hung_scales(module)]
    return sum({part.data_ptr(): part.nbytes for part in parts if part.nbytes}.values())


def hung_scales(module: torch.nn.Module) -> list[torch.Tensor]:
    """Tensors of bitsandbytes' ``weight.quant_state``, which are neither parameters nor buffers."""
    parts: list[torch.Tensor] = []
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    while state is not None:
        held = (getattr(state, name, None) for name in ("absmax", "code", "offset"))
        parts += [part for part in held if isinstance(part, torch.Tensor)]
        state = getattr(state, "state2", None)
    return parts
