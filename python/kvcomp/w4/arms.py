"""A model as a configuration of the matrix keeps its weights: quantized in place, or refused in a sentence."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..experiment import places
from ..experiment.workload import no_bars
from .fp8 import Fp8Linear, why_no_fp8
from .matrix import Arm
from .model import find_linears, hung_scales, linear_at, model_bytes, quantize_model, replace_module

_SEEN = 16  # weights of a parameter that a digest is of
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def why_not(arm: Arm) -> str | None:
    """Why a configuration cannot run here whatever the model: an optional package is not installed. None: it can."""
    if arm.mode.startswith("w4a16_bnb") and importlib.util.find_spec("bitsandbytes") is None:
        return f"{arm.config_id} needs bitsandbytes, which is not installed (pip install bitsandbytes)"
    return None


def why_refused(arm: Arm, device: torch.device) -> str | None:
    """Why a configuration cannot run on this device: C1 where torch does not multiply FP8. None: it can."""
    reason = why_no_fp8(device) if arm.mode in ("fp8", "fp8_te") else None
    return None if reason is None else f"fp8: expected a GPU whose torch multiplies FP8 by rows, got none: {reason}"


def load(path: str | None, dtype: str, device: torch.device) -> tuple[Any, str]:
    """A model in 16 bits, and its name in results; None: the shipped one. ValueError for what is no such model."""
    found = str(places.shipped(places.MODEL, "--model")) if path is None else path
    try:
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(found, dtype=DTYPES[dtype])
    except Exception as reason:  # transformers, tokenizers and safetensors raise many kinds
        said = " ".join(str(reason).split())[:200]
        raise ValueError(f"--model: expected a transformers model, got {found} ({said})") from None
    name = (Path(found).resolve().name if Path(found).exists() else "") or found
    return model.to(device).eval().requires_grad_(False), name


def digest(model: Any) -> str:
    """Sixteen digits that tell models of one name apart: of the configuration, and of the first weights of every
    parameter. Of a model before it is quantized."""
    said = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    found = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:_SEEN].float().cpu()
        found.update(f"{name} {tuple(parameter.shape)} {first.tolist()}".encode())
    return found.hexdigest()[:16]


def prepare(model: Any, arm: Arm) -> dict[str, Any]:
    """Quantizes ``model`` as ``arm`` says, where it is -> {bits_per_weight, quantized_layers, weight_bytes}: of the
    quantized layers, from the bytes that they hold (16 and 0 layers for C0).

    NotImplementedError where its mode cannot run here."""
    if arm.mode == "w4_shared_scale":
        report = quantize_model(
            model, arm.quant_target, group_size=arm.group_size, scale_mbits=arm.scale_mbits, rounding=arm.rounding
        )
        layers, bits = len(report.layers), report.bits_per_weight
    elif arm.mode == "none":
        layers, bits = 0, 16.0
    else:
        layers, bits = _replace(model, arm)
    return {"bits_per_weight": bits, "quantized_layers": layers, "weight_bytes": model_bytes(model)}


def _replace(model: Any, arm: Arm) -> tuple[int, float]:
    reason = why_not(arm) or why_refused(arm, next(model.parameters()).device)
    if reason is not None:
        raise NotImplementedError(reason)
    names = find_linears(model, arm.quant_target)
    nbytes = elements = 0
    for name in names:
        linear = linear_at(model, name)
        elements += linear.weight.numel()
        double = arm.mode == "w4a16_bnb_dq"
        made = Fp8Linear.from_linear(linear) if arm.mode.startswith("fp8") else nf4(linear, double=double)
        nbytes += sum(part.nbytes for part in held(made))
        replace_module(model, name, made)
    return len(names), 8 * nbytes / elements


def nf4(linear: torch.nn.Linear, *, double: bool) -> torch.nn.Module:
    """bitsandbytes' NF4 in blocks of 64. double: scales are quantized again (C6's are, C2's are not)."""
    import bitsandbytes as bnb  # type: ignore[import-not-found,unused-ignore]

    made: Any = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
        compress_statistics=double, quant_type="nf4",
    )  # fmt: skip
    made.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
    )
    if linear.bias is not None:
        made.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
    module: torch.nn.Module = made.to(linear.weight.device)  # quantizes
    return module


def held(module: Any) -> list[torch.Tensor]:
    """The tensors that stand for a quantized layer's weight: all but its bias, bitsandbytes' scales among them."""
    parts = [part for name, part in (*module.named_parameters(), *module.named_buffers()) if name != "bias"]
    return parts + hung_scales(module)
