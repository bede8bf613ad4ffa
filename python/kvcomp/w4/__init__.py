"""4-bit weights with packed scales: the seed's functions, the layer, whole models, transformers' quantization config.

Importing needs torch; ``W4Config``, which importing it registers with transformers, needs that, too.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(f"kvcomp.w4: expected torch (pip install 'kvcomp[hf]'), got: {error}") from error

from .linear import SharedScaleLinear
from .model import LayerReport, W4Report, find_linears, quantize_model, report
from .weights import dequantize_weights, quant_error, quantize_scale, quantize_weights

try:
    from .hf import W4Config
except ModuleNotFoundError as _error:  # layers and functions need torch alone
    if _error.name != "transformers":
        raise

__all__ = [
    "LayerReport",
    "SharedScaleLinear",
    "W4Config",
    "W4Report",
    "dequantize_weights",
    "find_linears",
    "quant_error",
    "quantize_model",
    "quantize_scale",
    "quantize_weights",
    "report",
]
