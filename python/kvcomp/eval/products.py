"""Matrix products of bfloat16 models on CPUs whose instructions have none."""

from __future__ import annotations

import functools
from typing import Any

import torch


def slow_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 matrices without vectors here (no AVX-512, no AMX, no Arm BF16)."""
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and not (onednn and supported())


def suit_cpu(model: Any) -> None:
    """``multiply_in_float32`` where that is sooner. Models whose outputs are compared are all to be treated so."""
    if slow_bfloat16():
        multiply_in_float32(model)


def multiply_in_float32(model: Any) -> None:
    """Has a model's bfloat16 linear layers on the CPU multiply several rows in float32 and round the result.

    It is what torch computes as well, which sums bfloat16 products in float32 (in another order), 6 to 11 times sooner
    where ``slow_bfloat16``: a prompt of the shipped model takes a third of the time. A single row stays with torch,
    whose product with a vector does use vectors.
    """
    for module in model.modules():
        if _is_slow(module):
            module.forward = functools.partial(_linear, module)


def _is_slow(module: Any) -> bool:
    if type(module) is not torch.nn.Linear or "forward" in vars(module):  # or one that somebody else changed
        return False
    return _suits(module.weight)


def _suits(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def _linear(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if x.numel() == x.shape[-1] or not (_suits(x) and _suits(module.weight)):
        return torch.nn.functional.linear(x, module.weight, module.bias)
    bias = None if module.bias is None else module.bias.float()
    return torch.nn.functional.linear(x.float(), module.weight.float(), bias).to(x.dtype)
