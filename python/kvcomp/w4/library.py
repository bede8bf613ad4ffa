"""``kvcomp::w4_linear``: a linear layer of packed 4-bit weights, as torch.library knows it, so that torch.compile fuses
the rest of a model around it."""

from __future__ import annotations

import threading

import torch

from .. import _C


@torch.library.custom_op("kvcomp::w4_linear", mutates_args=())
def w4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    scale_bits: int,
    exponent: int,
) -> torch.Tensor:
    """x (..., k) -> x W^T + bias (..., n) in x's dtype; W as packed bytes hold it (csrc/kvcomp/w4.h)."""
    return linear(x, packed, bias, n, k, group, scale_bits, exponent)


@w4_linear.register_fake
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    scale_bits: int,
    exponent: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], n))


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    scale_bits: int,
    exponent: int,
) -> torch.Tensor:
    """The same without torch's dispatcher, which adds about five microseconds to every call."""
    rows = x.reshape(-1, k)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = x.new_empty((rows.shape[0], n))
    workspace, early = None, 0
    if x.is_cuda:
        workspace = _workspace(x.device.index)
        early = _early(packed)
    _C.w4_matmul(out, rows, packed, bias, workspace, group, scale_bits, exponent, 0, early)
    return out.view(*x.shape[:-1], n)


# Workspaces of kernels, by device and stream; none is ever given back, as a recorded graph may hold it. That of stream
# None is for graphs that are recorded on a stream which has none of its own.
_workspaces: dict[tuple[int, int | None], torch.Tensor] = {}
_MOST_ROWS = 1 << 30  # what a workspace takes does not grow with rows for ever: it is made for any number at once
# Packed weights that kernels have read before: nothing the stream may still be doing writes those.
_read: set[tuple[int, int]] = set()


def _workspace(device: int) -> torch.Tensor:
    """The current stream's, every byte 0xFF between calls. RuntimeError where a graph is being recorded before any call
    on this device was made."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)  # a Stream takes ten times as long
    found = _workspaces.get((device, stream))
    if found is not None:
        return found
    capturing = torch.cuda.is_current_stream_capturing()
    for key in ((device, None), *(() if capturing else ((device, stream),))):
        if key not in _workspaces:
            if capturing:
                raise RuntimeError("w4_linear: x: expected a call on this device before a graph is recorded, got none")
            _workspaces[key] = _made(device)
    return _workspaces[device, None if capturing else stream]


def _made(device: int) -> torch.Tensor:
    """By a thread of its own, whose memory comes from no pool that the caller may have set up (torch.compile's graphs
    want theirs back)."""
    nbytes = _C.w4_workspace(_MOST_ROWS, 1, 1)
    found: list[torch.Tensor] = []

    def make() -> None:
        with torch.cuda.device(device):
            made = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=f"cuda:{device}")
            torch.cuda.synchronize(device)
            found.append(made)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not found:
        raise torch.OutOfMemoryError(f"w4_linear: workspace: expected {nbytes} free bytes on cuda:{device}, got fewer")
    return found[0]


def _early(packed: torch.Tensor) -> int:
    place = packed.data_ptr(), packed.numel()
    if place in _read:
        return 1
    _read.add(place)
    return 0
