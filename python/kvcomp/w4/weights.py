"""The seed's functions on weights: int4 codes, two to a byte, beside their scales. What layers hold is packed further
(csrc/kvcomp/w4.h); the codes and scales are the same.

The method is that of maia-inspired-phi35-smq: q = w / s rounded to -8..7, s = max|w| / 7 over a group of consecutive
inputs, kept as E5Mx: 5 exponent and x mantissa bits.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from .. import _C

GROUPS = (32, 64, 128)
MOST_PACKED_MBITS = 10  # of what layers hold; the functions here take up to 14
MOST_MBITS = 14
MOST_EXPONENT = 120  # and its negative
EXACT = -1
Rounding = Literal["floor", "nearest", "search"]
ROUNDINGS: dict[str, int] = {"floor": 0, "nearest": 1, "search": 2}
_LEVELS = 7  # of the largest weight of a group
_TINY = 1e-200  # in the place of 0, where it divides; squares of float32 are larger


def check_format(op: str, group_size: int, scale_mbits: int, rounding: str) -> None:
    """ValueError for a format that layers cannot hold."""
    if group_size not in GROUPS:
        raise ValueError(f"{op}: group_size: expected one of {', '.join(map(str, GROUPS))}, got {group_size}")
    if not _is_int(scale_mbits) or not EXACT <= scale_mbits <= MOST_PACKED_MBITS:
        raise ValueError(f"{op}: scale_mbits: expected -1 (exact) or 0 to {MOST_PACKED_MBITS}, got {scale_mbits}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}: rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")


def quantize_scale(
    s: torch.Tensor, scale_mbits: int, *, rounding: str | None = None, exponent: int = 0
) -> torch.Tensor:
    """Scales, of any shape, rounded to E5Mx with x = ``scale_mbits`` of 0..14; their dtype and signs are kept. -1: as
    they are.

    rounding: "nearest" (ties to even) or "floor"; None is the seed's: nearest, but floor for x = 0.
    exponent: the range is that of fp16 times 2^exponent: what is larger saturates at (2 - 2^-x) 2^(15 + exponent), what
        is smaller than 2^(exponent - 14) is a multiple of 2^(exponent - 14 - x), 0 among them.

    ValueError for scales that are not finite; TypeError for what is no tensor of floats.
    """
    if not isinstance(s, torch.Tensor) or not s.is_floating_point():
        raise TypeError(f"quantize_scale: s: expected a tensor of floats, got {_kind(s)}")
    if not _is_int(scale_mbits) or not EXACT <= scale_mbits <= MOST_MBITS:
        raise ValueError(f"quantize_scale: scale_mbits: expected -1 (exact) or 0 to {MOST_MBITS}, got {scale_mbits}")
    if scale_mbits == EXACT:
        return s
    how = _rounding("quantize_scale", scale_mbits, rounding)
    if how == "search":
        raise ValueError("quantize_scale: rounding: expected floor or nearest, got 'search' (which looks at weights)")
    given = s.detach().float().cpu().contiguous()
    out = torch.empty_like(given)
    _C.w4_scales(out, given.abs(), scale_mbits, exponent, ROUNDINGS[how])
    return torch.copysign(out, given).to(device=s.device, dtype=s.dtype)


def quantize_weights(
    w: torch.Tensor, group_size: int, scale_mbits: int, *, rounding: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """w (out, in) of any float dtype -> packed (out, in / 2) uint8, scales (out, in / group_size) float32.

    A byte holds an even column's code in its low half, the next one's in its high half, as two's complement. The range
    of the scales lies where those of w are: the largest is at most nine of 30 binades below the end of it. Groups of
    zeros have scale 0; -1 keeps scales in float32.
    rounding: of scales, "floor", "nearest" or "search" (the scale of least squared error); None: as quantize_scale.

    ValueError where in is no multiple of group_size, or w is not finite.
    """
    _check_matrix("quantize_weights", "w", w)
    rows, columns = w.shape
    _check_groups("quantize_weights", columns, group_size)
    if columns % 2:
        raise ValueError(f"quantize_weights: w: expected an even number of columns, got {columns}")
    if not _is_int(scale_mbits) or not EXACT <= scale_mbits <= MOST_MBITS:
        raise ValueError(f"quantize_weights: scale_mbits: expected -1 (exact) or 0 to {MOST_MBITS}, got {scale_mbits}")
    how = _rounding("quantize_weights", scale_mbits, rounding)
    given = w.detach().float().cpu().contiguous()
    if scale_mbits != EXACT and scale_mbits <= MOST_PACKED_MBITS and group_size in GROUPS:
        codes, scales = codes_of(*pack(given, group_size, scale_mbits, how), rows, columns, group_size, scale_mbits)
    elif how == "search":
        raise ValueError(
            f"quantize_weights: rounding: expected floor or nearest for scales of {scale_mbits} bits of groups of "
            f"{group_size}, got 'search'"
        )
    else:
        codes, scales = _by_largest(given, group_size, scale_mbits, how)
    nibbles = (codes & 15).to(torch.uint8)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return packed.contiguous().to(w.device), scales.to(w.device)


def dequantize_weights(packed: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """packed (out, in / 2) uint8, scales (out, in / group_size) -> (out, in) float32."""
    _check_matrix("dequantize_weights", "scales", scales)
    if not isinstance(packed, torch.Tensor) or packed.dtype != torch.uint8 or packed.dim() != 2:
        raise TypeError(f"dequantize_weights: packed: expected a matrix of uint8, got {_kind(packed)}")
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    _check_groups("dequantize_weights", columns, group_size)
    if tuple(scales.shape) != (rows, columns // group_size):
        raise ValueError(
            f"dequantize_weights: scales: expected ({rows}, {columns // group_size}), got {tuple(scales.shape)}"
        )
    codes = torch.stack((packed & 15, packed >> 4), -1).reshape(rows, columns).to(torch.int8)
    signed = torch.where(codes > 7, codes - 16, codes).float()
    return (signed.view(rows, -1, group_size) * scales.float()[..., None]).view(rows, columns)


def quant_error(w: torch.Tensor, w_hat: torch.Tensor, group_size: int) -> dict[str, float]:
    """{rel_mse, max_rel_mse, cosine_sim} of w_hat against w (out, in) each: mean, largest and mean over groups. A group
    that is zero and stays it counts as exact. ValueError for matrices without elements."""
    _check_matrix("quant_error", "w", w)
    if not isinstance(w_hat, torch.Tensor) or w_hat.shape != w.shape:
        raise ValueError(f"quant_error: w_hat: expected the shape of w, {tuple(w.shape)}, got {_kind(w_hat)}")
    _check_groups("quant_error", w.shape[1], group_size)
    if w.numel() == 0:
        raise ValueError(f"quant_error: w: expected one element or more, got {_kind(w)}")
    exact, near = (part.detach().double().reshape(-1, group_size) for part in (w, w_hat))
    square = (exact - near).square().mean(-1)
    relative = square / exact.square().mean(-1).clamp(min=_TINY)
    norms = exact.norm(dim=-1) * near.norm(dim=-1)
    cosine = torch.where(norms > 0, (exact * near).sum(-1) / norms.clamp(min=_TINY), (square == 0).double())
    return {
        "rel_mse": float(relative.mean()),
        "max_rel_mse": float(relative.max()),
        "cosine_sim": float(cosine.mean()),
    }


def pack(weights: torch.Tensor, group_size: int, scale_mbits: int, rounding: str) -> tuple[torch.Tensor, int]:
    """weights (n, k) of float dtype, on any device -> what a layer holds, on the CPU: packed bytes, the exponent."""
    n, k = weights.shape
    if weights.is_meta:
        raise ValueError("w4_pack: weights: expected ones that are loaded, got none (device meta)")
    given = weights.detach().cpu()
    if given.stride(-1) != 1:
        given = given.contiguous()
    if given.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        given = given.float()
    packed = torch.empty(_C.w4_bytes(n, k, group_size, scale_mbits), dtype=torch.uint8)
    largest = max(abs(float(end)) for end in given.aminmax()) if given.numel() else 0.0
    exponent = _C.w4_pack(packed, given, group_size, scale_mbits, exponent_for(largest), ROUNDINGS[rounding], 0)
    return packed, exponent


def exponent_for(largest: float) -> int:
    """The exponent of a matrix whose largest weight is this: a multiple of 8, so that the layers of a model have one or
    two of them (compiled code has it built in). The largest scale is two to nine of 30 binades below saturation."""
    if not 0 < largest < math.inf:
        return 0
    return max(-MOST_EXPONENT, min(MOST_EXPONENT, -((14 - math.frexp(largest / _LEVELS)[1]) // 8) * 8))


def codes_of(
    packed: torch.Tensor, exponent: int, n: int, k: int, group_size: int, scale_mbits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (n, k) int8, -8..7, and scales (n, groups) float32 that packed bytes hold."""
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, -(-k // group_size))
    _C.w4_unpack(None, codes, scales, packed.cpu(), n, k, group_size, scale_mbits, exponent, 0)
    return codes.to(torch.int8) - 8, scales


def unpack(
    packed: torch.Tensor, exponent: int, n: int, k: int, group_size: int, scale_mbits: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """The weights (n, k) that packed bytes stand for, on the CPU."""
    out = torch.empty(n, k, dtype=dtype)
    _C.w4_unpack(out, None, None, packed.cpu(), n, k, group_size, scale_mbits, exponent, 0)
    return out


def _by_largest(w: torch.Tensor, group_size: int, scale_mbits: int, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of formats that layers cannot hold: float32, more than 10 mantissa bits, other groups."""
    if not bool(w.isfinite().all()):
        raise ValueError("quantize_weights: w: expected finite weights, got NaN or Inf")
    groups = w.view(w.shape[0], -1, group_size)
    scales = groups.abs().amax(-1) / _LEVELS
    if scale_mbits != EXACT and scales.numel():
        exponent = exponent_for(_LEVELS * float(scales.max()))
        scales = quantize_scale(scales, scale_mbits, rounding=how, exponent=exponent)
    inverse = scales[..., None]
    codes = torch.where(inverse > 0, groups / inverse, 0.0).round().clamp(-8, 7)
    return codes.view(w.shape).to(torch.int8), scales


def _rounding(op: str, scale_mbits: int, rounding: str | None) -> str:
    if rounding is None:
        return "floor" if scale_mbits == 0 else "nearest"
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}: rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    return rounding


def _check_matrix(op: str, name: str, w: object) -> None:
    if not isinstance(w, torch.Tensor) or w.dim() != 2 or not w.is_floating_point():
        raise TypeError(f"{op}: {name}: expected a matrix of floats, got {_kind(w)}")


def _check_groups(op: str, columns: int, group_size: int) -> None:
    if not _is_int(group_size) or group_size < 1 or columns % group_size:
        raise ValueError(f"{op}: group_size: expected a divisor of {columns} columns, got {group_size}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
