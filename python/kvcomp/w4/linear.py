"""SharedScaleLinear: a linear layer whose weights are 4-bit codes with packed scales, multiplied as they are."""

from __future__ import annotations

from typing import Any

import torch

from .. import _C
from . import library, weights


class SharedScaleLinear(torch.nn.Module):
    """Takes the place of an nn.Linear for inference.

    Attributes:
        weight: packed bytes (uint8) of codes and scales, the format of csrc/kvcomp/w4.h. All that is held of weights.
        exponent: the binary exponent that its scales have in common; saved beside it, as extra state.
        bias: (out_features,), in the dtype of the layer it was made of.
    """

    weight: torch.Tensor
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        scale_mbits: int = 5,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``dtype``: of the bias. The weights are zeros until they are loaded."""
        super().__init__()
        weights.check_format("SharedScaleLinear", group_size, scale_mbits, "nearest")
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"SharedScaleLinear: {name}: expected 1 or more, got {value}")
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.scale_mbits = group_size, scale_mbits
        self.exponent = 0
        nbytes = _C.w4_bytes(out_features, in_features, group_size, scale_mbits)
        self.register_buffer("weight", torch.zeros(nbytes, dtype=torch.uint8, device=device))
        self.bias = (
            torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
            if bias
            else None
        )

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, group_size: int = 128, scale_mbits: int = 5, *, rounding: str = "nearest"
    ) -> SharedScaleLinear:
        """Quantizes a layer's weights; the new layer is on its device. rounding: of scales, "floor", "nearest" or
        "search" (each the one of least squared error).

        TypeError for what is no nn.Linear; ValueError for weights that are not finite and formats that do not exist."""
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"SharedScaleLinear: linear: expected an nn.Linear, got {type(linear).__name__}")
        weights.check_format("SharedScaleLinear", group_size, scale_mbits, rounding)
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, group_size, scale_mbits, has_bias, device="meta")
        packed, exponent = weights.pack(linear.weight, group_size, scale_mbits, rounding)
        layer.weight, layer.exponent = packed.to(linear.weight.device), exponent
        if has_bias:
            layer.bias = torch.nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer.train(linear.training)

    @property
    def bits_per_weight(self) -> float:
        """From the bytes that are held, scales and what pads among them."""
        return 8 * self.weight.nbytes / (self.in_features * self.out_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights (out_features, in_features) that the packed bytes stand for."""
        found = weights.unpack(
            self.weight, self.exponent, self.out_features, self.in_features, self.group_size, self.scale_mbits, dtype
        )
        return found.to(self.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"SharedScaleLinear: x: expected (..., {self.in_features}), got {tuple(x.shape)}")
        # Compiled code and traces see the operation; a plain call does not go through torch's dispatcher.
        plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
        call = library.linear if plain and x.device.type in ("cpu", "cuda") else torch.ops.kvcomp.w4_linear
        if plain and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "SharedScaleLinear: x: expected one without gradients, got one that requires them"
            )
        out: torch.Tensor = call(
            x, self.weight, self.bias, self.out_features, self.in_features, self.group_size, self.scale_mbits,
            self.exponent,
        )  # fmt: skip
        return out

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.exponent], dtype=torch.int32, device="cpu")

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.exponent = int(state)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, scale_mbits={self.scale_mbits}"
        )
