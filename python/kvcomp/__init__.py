"""kvcomp: a byte budget for the KV cache. Importing needs NumPy only: no torch, no GPU, no driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._C import FORMAT_VERSION, BudgetError, CudaError
from ._C import VERSION as __version__
from .errors import BudgetWarning
from .policy import Policy
from .rotation import Rotation
from .selectors import H2O, AdaKV, Full, Hybrid, KeyNorm, LayerRatio, PyramidKV, Random, SnapKV, Streaming

if TYPE_CHECKING:
    from .hf import Cache, compress

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
    "__version__",
    "compress",
]


def __getattr__(name: str) -> Any:
    if name in ("Cache", "compress"):  # these need torch and transformers
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")
