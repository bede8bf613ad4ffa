"""One layer of a prompt, as compression takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class LayerInput:
    """One layer of a prompt.

    Attributes:
        keys, values: (b, h, s, d) float32, float16 or bfloat16, NumPy or torch, after RoPE.
        queries: (b, hq, w, d) the prompt's last w queries after RoPE, for importance; None where nothing needs them.
        importance: (b, h, s) float32 >= 0 from outside, in the place of scores; None: scored from queries.
        first: (b,) first real token of each left-padded sequence; None: 0.
        scale, softcap: of the attention's logits; scale None: 1 / sqrt(d).
    """

    keys: Any
    values: Any
    queries: Any = None
    importance: Any = None
    first: Array | None = None
    scale: float | None = None
    softcap: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, d = self.keys.shape
        return int(b), int(h), int(s), int(d)

    @property
    def logit_scale(self) -> float:
        return float(self.shape[3]) ** -0.5 if self.scale is None else self.scale


def to_float32(tensor: Any) -> Array:
    """float32 values of a NumPy or torch tensor, on the host."""
    if isinstance(tensor, np.ndarray):
        return np.asarray(tensor, np.float32)
    return np.asarray(tensor.detach().float().cpu())


def cuda_of(tensor: Any) -> Any:
    """The torch.device of a tensor on a GPU; None: on the host."""
    device = getattr(tensor, "device", None)
    return device if getattr(device, "type", "cpu") == "cuda" else None


_SIGNED = {"uint64": np.int64, "uint32": np.int32}


def staged(array: Array, device: Any) -> Any:
    """The array as a torch tensor on the host from which ``device`` copies without anybody waiting; unsigned words as
    signed ones, which torch can copy everywhere."""
    import torch

    own = np.require(array, requirements=["C", "W"])  # torch warns of arrays that are read-only
    host = torch.from_numpy(own.view(_SIGNED.get(array.dtype.name, array.dtype)))
    return host.pin_memory() if device.type == "cuda" else host


def upload(array: Array, device: Any) -> Any:
    """A copy of the array on ``device``, in its stream's order (``staged``)."""
    import torch

    copy = staged(array, device).to(device, non_blocking=True, copy=True)
    return copy.view(getattr(torch, array.dtype.name))


@contextmanager
def memory_of(op: str, device: Any) -> Iterator[None]:
    """MemoryError, in one sentence, where torch finds no room on ``device`` inside; None: on the host."""
    if device is None:
        yield
        return
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError(f"{op}: memory: expected room for rows and sums on {device}, got none") from None


def fetching(*tensors: Any) -> Callable[[], list[Array]]:
    """Tensors of one device on their way to the host, behind what their stream is doing; the call waits for them.

    What it gives lies in page-locked memory, of which torch keeps as much as was ever held at once: copy what stays."""
    import torch

    if not tensors or tensors[0].device.type != "cuda":
        copies = [tensor.detach().clone().numpy() for tensor in tensors]
        return lambda: copies
    there = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(there, tensors, strict=True):
        copy.copy_(tensor.detach(), non_blocking=True)
    arrived = torch.cuda.current_stream(tensors[0].device).record_event()

    def fetched() -> list[Array]:
        arrived.synchronize()
        return [copy.numpy() for copy in there]

    return fetched


def real_counts(op: str, name: str, given: Any, batch: int, q: int) -> Array | None:
    """(batch,) int32 of the real ones among q new tokens; None: all are."""
    if given is None:
        return None
    counts = np.asarray(given)
    if counts.dtype.kind not in "iu" or counts.shape != (batch,) or (counts < 0).any() or (counts > q).any():
        raise ValueError(f"{op}: {name}: expected {batch} integers in 0..{q}, got {counts.tolist()}")
    return np.ascontiguousarray(counts, np.int32)


def first_tokens(layer: LayerInput) -> Array:
    b, _, s, _ = layer.shape
    first = np.zeros(b, np.int32) if layer.first is None else np.asarray(layer.first)
    if first.dtype.kind not in "iu" or first.shape != (b,) or (first < 0).any() or (first > s).any():
        raise ValueError(f"compress: first: expected {b} indices in 0..{s}, got {first.tolist()}")
    return np.ascontiguousarray(first, np.int32)
