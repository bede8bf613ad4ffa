"""Where packed layers live: for a device, the arena and the kind of layer. torch is imported for GPUs only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _C
from .store import PackedLayer

if TYPE_CHECKING:
    from .store_cuda import Stacked


def arena_on(device: Any) -> _C.Arena:
    """``device``: a torch.device; None and those of type "cpu" are the host."""
    return _C.Arena(device=_ordinal(device)) if device is not None and device.type == "cuda" else _C.Arena()


def _ordinal(device: Any) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else int(device.index)


def kind_of_layer(arena: _C.Arena) -> type[PackedLayer]:
    if arena.device < 0:
        return PackedLayer
    from .store_cuda import CudaLayer

    return CudaLayer


def stack(arena: _C.Arena, layers: Sequence[PackedLayer]) -> Stacked | None:
    """What runs passes over the layers of an arena on a GPU; None: they are on the host, and need nothing."""
    if arena.device < 0:
        return None
    import torch

    from .store_cuda import CudaLayer, Stacked

    return Stacked([layer for layer in layers if isinstance(layer, CudaLayer)], torch.device("cuda", arena.device))


def refuse_hold(op: str, device: Any) -> None:
    """NotImplementedError: a byte budget is held on the host only."""
    raise NotImplementedError(f"{op}: decode: expected 'grow' on {device}, got 'hold' (a held budget works on the CPU)")
