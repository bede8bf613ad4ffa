"""C1: weights and activations in FP8 (E4M3), multiplied by torch's own scaled product: one scale for every row of the
weights, and one for every row of the activations, found as they come."""

from __future__ import annotations

import functools

import torch

_MOST = 448.0  # of E4M3 (torch.float8_e4m3fn)
_LEAST = 1e-12  # a row of zeros has a scale, too
_MULTIPLE = 16  # of rows and columns of the weights, as the product asks


@functools.cache
def why_no_fp8(device: torch.device) -> str | None:
    """Why torch cannot multiply FP8 with scales of rows on this device, None where it can: asked by doing it."""
    if device.type != "cuda":
        return "the model is on the CPU"
    try:
        x = torch.ones(_MULTIPLE, _MULTIPLE, device=device, dtype=torch.bfloat16)
        layer = torch.nn.Linear(_MULTIPLE, _MULTIPLE, bias=False, device=device, dtype=torch.bfloat16)
        Fp8Linear.from_linear(layer)(x)
        torch.cuda.synchronize(device)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    return None


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (m, k) -> E4M3 (m, k), and scales (m, 1) float32 by which they are multiplied."""
    scale = (x.abs().amax(-1, keepdim=True).float() / _MOST).clamp(min=_LEAST)
    return (x.float() / scale).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn), scale


class Fp8Linear(torch.nn.Module):
    weight: torch.Tensor  # (out, in) E4M3
    weight_scale: torch.Tensor  # (1, out) float32

    def __init__(self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear) -> Fp8Linear:
        """ValueError for sizes that the product does not take."""
        if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
            raise ValueError(
                f"Fp8Linear: linear: expected sizes that are multiples of {_MULTIPLE}, got {linear.out_features} x "
                f"{linear.in_features}"
            )
        weight, scale = _rows(linear.weight.data)
        return cls(weight, scale.T.contiguous(), None if linear.bias is None else linear.bias.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = _rows(x.reshape(-1, self.in_features))
        out = torch._scaled_mm(rows, self.weight.T, scale_a=scale, scale_b=self.weight_scale, out_dtype=x.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
