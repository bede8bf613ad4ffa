"""kvcomp: a byte budget for the KV cache. Importing needs NumPy only: no torch, no GPU, no driver."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._C import FORMAT_VERSION, BudgetError, CudaError
from ._C import VERSION as __version__
from .errors import BudgetWarning
from .policy import Policy
from .rotation import Rotation
from .selectors import H2O, AdaKV, Full, Hybrid, KeyNorm, LayerRatio, PyramidKV, Random, SnapKV, Streaming

if TYPE_CHECKING:
    from . import bsr as bsr
    from . import w4 as w4
    from .hf import Cache, compress
    from .w4 import W4Config

__all__ = [
    "FORMAT_VERSION",
    "H2O",
    "AdaKV",
    "BudgetError",
    "BudgetWarning",
    "Cache",
    "CudaError",
    "Full",
    "Hybrid",
    "KeyNorm",
    "LayerRatio",
    "Policy",
    "PyramidKV",
    "Random",
    "Rotation",
    "SnapKV",
    "Streaming",
    "W4Config",
    "__version__",
    "compress",
]


def __getattr__(name: str) -> Any:
    if name in ("Cache", "compress"):  # these need torch and transformers
        from . import hf

        return getattr(hf, name)
    if name in ("bsr", "w4"):  # these need torch
        return import_module(f".{name}", __name__)
    if name == "W4Config":
        return import_module(".w4", __name__).W4Config
    raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")
