"""SharedScaleLinear: a linear layer whose weights are 4-bit codes with packed scales, multiplied as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from .. import _C
from . import library, stack, weights


class SharedScaleLinear(torch.nn.Module):
    """Takes the place of an nn.Linear for inference.

    Attributes:
        weight: packed bytes (uint8) of codes and scales, the format of csrc/kvcomp/w4.h. All that is held of weights.
        exponent: the binary exponent that its scales have in common; None: not read yet. Saved beside the weight, as
            extra state: [exponent, group_size, scale_mbits]. A state without it, or of another format, is refused.
        bias: (out_features,), in the dtype of the layer it was made of.
        stack_rank: its place in a stack of layers that are one product (stack.py); None: in none.
        stack_siblings: of the first layer of a stack, the others.

    Sums are float32 and without 2^exponent (-16 for most weights) until they are done: they may be Inf where
    |x| |W|^T >= 2^(127 + exponent), which x of fp16 never reaches.
    """

    weight: torch.Tensor
    bias: torch.nn.Parameter | None
    exponent: int | None
    stack_rank: int | None = None
    stack_siblings: tuple[SharedScaleLinear, ...] = ()

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

        TypeError for what is no nn.Linear, subclasses among it, whose own forward would be lost; ValueError for weights
        that are not finite and formats that do not exist."""
        if type(linear) is not torch.nn.Linear:
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
            self.weight, self._known_exponent(), self.out_features, self.in_features, self.group_size,
            self.scale_mbits, dtype,
        )  # fmt: skip
        return found.to(self.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"SharedScaleLinear: x: expected (..., {self.in_features}), got {tuple(x.shape)}")
        given, kind = x, x.device.type
        # Not is_autocast_available: torch.compile of torch 2.11 does not know it.
        autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
        if autocast and x.is_floating_point() and x.dtype != torch.float64:  # as nn.Linear does
            x = x.to(torch.get_autocast_dtype(kind))
        # Compiled code and traces see the operation; a plain call does not go through torch's dispatcher.
        plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
        direct = plain and kind in ("cpu", "cuda")
        if plain and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "SharedScaleLinear: x: expected one without gradients, got one that requires them"
            )
        if self.stack_rank is not None and (direct or torch.compiler.is_dynamo_compiling()):
            part = stack.part(self, given, x)
            if part is not None:
                return part
        call = library.linear if direct else torch.ops.kvcomp.w4_linear
        out: torch.Tensor = call(
            x, self.weight, self.bias, self.out_features, self.in_features, self.group_size, self.scale_mbits,
            self._known_exponent(),
        )  # fmt: skip
        return out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call,unused-ignore]
        stack.moved(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call,unused-ignore]
        stack.restored(self)

    def get_extra_state(self) -> torch.Tensor:
        known = [] if self.exponent is None else [self.exponent, self.group_size, self.scale_mbits]
        return torch.tensor(known, dtype=torch.int32, device="cpu")  # an empty one is refused

    def set_extra_state(self, state: torch.Tensor) -> None:
        """ValueError for that of another format: its bytes may be as many, and stand for other weights."""
        self.exponent = self._exponent_of(state)

    def _exponent_of(self, state: object) -> int:
        """What a state says, once it is one of this layer's format."""
        found = state.tolist() if isinstance(state, torch.Tensor) and state.dim() == 1 else None
        if (
            found is None
            or len(found) != 3
            or found[1:] != [self.group_size, self.scale_mbits]
            or abs(found[0]) > weights.MOST_EXPONENT
        ):
            raise ValueError(
                f"SharedScaleLinear: _extra_state: expected [exponent, group_size {self.group_size}, scale_mbits "
                f"{self.scale_mbits}], got {type(state).__name__ if found is None else found}"
            )
        return int(found[0])

    def _known_exponent(self) -> int:
        if self.exponent is None:
            raise ValueError("SharedScaleLinear: _extra_state: expected to be loaded with the weight, got none")
        return self.exponent

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A layer of another format, or one whose exponent is missing, is an error before any of it is copied."""
        key = f"{prefix}_extra_state"
        try:
            if key in state_dict:
                self._exponent_of(state_dict[key])
            elif f"{prefix}weight" in state_dict:
                raise ValueError(f"SharedScaleLinear: {key}: expected beside the weight, got none")
        except ValueError as reason:
            error_msgs.append(str(reason))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, scale_mbits={self.scale_mbits}"
        )
