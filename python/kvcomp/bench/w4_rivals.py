"""What 4-bit linear layers are measured against: 16 bits (cuBLAS; torch's own on the CPU), torch's int4 product, and,
where they are installed, Humming (PyPI: humming-kernels) and bitsandbytes' NF4 (configuration C2 of the matrix)."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..w4 import arms

GROUP = 128
INT4 = ("torch int4", "Humming int4", "bitsandbytes NF4")
PACKAGES = {"Humming int4": "humming-kernels", "bitsandbytes NF4": "bitsandbytes"}
_INNER_TILES = 8  # of torch's int4 packing
_ROUNDED = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative error (L2) of sums and outputs of these types

Call = Callable[[int], Any]


@dataclass
class Rival:
    """One cell to be: a call that takes a running number, what its weights take, the weights (n, k) in float32 that its
    result is compared with, and the relative error (L2) that it may have."""

    impl: str
    call: Call
    nbytes: int
    reference: torch.Tensor
    bound: float


def dense(weight: torch.Tensor, xs: list[torch.Tensor], copies: int) -> Rival:
    """x W^T in the dtype of both."""
    held = [weight, *(weight.clone() for _ in range(copies - 1))]
    out = torch.empty(xs[0].shape[0], weight.shape[0], dtype=weight.dtype, device=weight.device)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[weight.dtype]
    return Rival(
        f"{'cuBLAS' if weight.is_cuda else 'torch'} {name}",
        lambda number: torch.mm(xs[number % len(xs)], held[number % len(held)].T, out=out),
        weight.nbytes,
        weight,
        _ROUNDED[weight.dtype],
    )


def torch_int4(codes: torch.Tensor, scales: torch.Tensor, xs: list[torch.Tensor], copies: int) -> Rival:
    """``_weight_int4pack_mm`` on the same codes (n, k) int8, -8..7, and scales (n, groups); bf16 only. Whatever it
    raises says why it is not here."""
    device = xs[0].device
    unsigned = (codes.to(device) + 8).to(torch.uint8)
    rounded = scales.to(device).bfloat16()
    if device.type == "cuda":
        nibbles = unsigned[:, 0::2] << 4 | unsigned[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(nibbles.contiguous(), _INNER_TILES)
        multiply = torch.ops.aten._weight_int4pack_mm
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.int(), 1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    both = torch.stack((rounded, torch.zeros_like(rounded)), -1).transpose(0, 1).contiguous()
    held = [(packed, both), *((packed.clone(), both.clone()) for _ in range(copies - 1))]

    def call(number: int) -> Any:
        weight, factors = held[number % len(held)]
        return multiply(xs[number % len(xs)], weight, GROUP, factors)

    call(0)
    exact = codes.to(device).float().view(len(codes), -1, GROUP) * rounded.float()[..., None]
    return Rival("torch int4", call, packed.nbytes + both.nbytes, exact.view(codes.shape), _ROUNDED[torch.bfloat16])


def humming(weight: torch.Tensor, xs: list[torch.Tensor], copies: int) -> Rival:
    """Humming's int4 layer of the same weights, with codes and scales of its own; so what it may differ by from the
    weights themselves is the error of any 4-bit codes. Whatever it raises says why it is not here."""
    if importlib.util.find_spec("humming") is None:
        raise ImportError("humming-kernels is not installed")
    from humming.layer import HummingLayer  # type: ignore[import-not-found,unused-ignore]

    n, k = weight.shape
    layer: Any = HummingLayer(
        shape_n=n, shape_k=k, weight_config={"dtype": "int4", "group_size": GROUP}, torch_dtype=weight.dtype
    ).to(weight.device)
    layer.load_from_unquantized(weight)
    layer.transform()
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]

    def call(number: int) -> Any:
        return layers[number % len(layers)](xs[number % len(xs)])

    call(0)
    nbytes = sum(part.nbytes for name, part in layer.state_dict().items() if name != "locks")
    return Rival("Humming int4", call, nbytes, weight, 0.25)


def nf4(weight: torch.Tensor, xs: list[torch.Tensor], copies: int) -> Rival:
    """bitsandbytes' layer of the same weights, whose scales are not quantized again. Whatever it raises says why it is
    not here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("bitsandbytes is not installed")
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found,unused-ignore]

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    layers: list[Any] = [arms.nf4(linear, double=False) for _ in range(copies)]
    first = layers[0].weight
    exact = dequantize_4bit(first.data, first.quant_state).float()
    nbytes = sum(part.nbytes for part in arms.held(layers[0]))
    with torch.no_grad():
        layers[0](xs[0])
    return Rival(
        "bitsandbytes NF4",
        lambda number: layers[number % copies](xs[number % len(xs)]),
        nbytes,
        exact,
        _ROUNDED[weight.dtype],
    )
