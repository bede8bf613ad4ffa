"""``kvcomp::w4_linear``: a linear layer of packed 4-bit weights, as torch.library knows it, so that torch.compile fuses
the rest of a model around it; ``kvcomp::w4_stack``: several of the same x."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

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


@torch.library.custom_op("kvcomp::w4_stack", mutates_args=())
def w4_stack(
    x: torch.Tensor,
    packed: list[torch.Tensor],
    biases: list[torch.Tensor],
    rows: list[int],
    k: int,
    group: int,
    scale_bits: int,
    exponents: list[int],
) -> torch.Tensor:
    """x (..., k) -> the outputs of layers (w4_linear) of these rows side by side, (..., sum(rows)), with biases of all
    or none: one product where they lie behind each other in one buffer, else one each."""
    out = stack(x, packed, biases, rows, k, group, scale_bits, exponents)
    if out is not None:
        return out
    outs = [
        linear(x, packed[i], biases[i] if biases else None, rows[i], k, group, scale_bits, exponents[i])
        for i in range(len(rows))
    ]
    return torch.cat(outs, -1)


@w4_stack.register_fake
def _(
    x: torch.Tensor,
    packed: list[torch.Tensor],
    biases: list[torch.Tensor],
    rows: list[int],
    k: int,
    group: int,
    scale_bits: int,
    exponents: list[int],
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(rows)))


def stack(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    rows: Sequence[int],
    k: int,
    group: int,
    scale_bits: int,
    exponents: Sequence[int],
) -> torch.Tensor | None:
    """w4_stack as one product, without torch's dispatcher; None: packed bytes or biases lie apart."""
    whole, bias = joined(packed), joined(biases) if biases else None
    if whole is None or (biases and bias is None):
        return None
    return linear(x, whole, bias, sum(rows), k, group, scale_bits, tuple(zip(rows, exponents, strict=True)))


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Vectors of which each begins in memory where the one before ends, as the one vector that they are; None: they lie
    apart."""
    first = parts[0]
    begin = end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype or not part.is_contiguous():
            return None
        end += part.nbytes
    # Neighbours by chance are not within the first one's memory.
    if first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize < end - begin:
        return None
    return first.as_strided(((end - begin) // first.itemsize,), (1,))


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    scale_bits: int,
    exponent: int | tuple[tuple[int, int], ...],
) -> torch.Tensor:
    """w4_linear without torch's dispatcher, which adds about five microseconds to every call. ``exponent``: also
    (rows, exponent) of several matrices, whose packed bytes follow each other.

    Recorded CUDA graphs may be replayed at the same time, on any streams, beside calls that are not recorded: every
    recording has workspaces of its own, one for each of its streams. RuntimeError where a graph is being recorded
    before any call on this device was made."""
    rows = x.reshape(-1, k)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = x.new_empty((rows.shape[0], n))
    workspace, early = None, 0
    if x.is_cuda:
        workspace = _workspace(x.device.index)
        early = _early(packed)
        if workspace is None:  # filled as a part of the graph, right before the kernel, which cannot start early then
            workspace, early = x.new_full((_workspace_bytes(),), 0xFF, dtype=torch.uint8), 0
    _C.w4_matmul(out, rows, packed, bias, workspace, group, scale_bits, exponent, 0, early)
    return out.view(*x.shape[:-1], n)


_MOST_ROWS = 1 << 30  # what a workspace takes does not grow with rows for ever: it is made for any number at once
_SPARES = 2
_RELAXED, _ACTIVE = 2, 1  # CU_STREAM_CAPTURE_MODE_RELAXED, CU_STREAM_CAPTURE_STATUS_ACTIVE
# Workspaces of kernels, by device and stream. Two kernels that run at the same time must not share one.
_workspaces: dict[tuple[int, int], torch.Tensor] = {}
# Those of graphs, by device, recording and stream; none is ever given back, as the graph may be replayed. They are made
# ahead: memory that is taken and filled while a graph is recorded is the graph's.
_recorded: dict[tuple[int, int, int], torch.Tensor] = {}
_spare: dict[int, list[torch.Tensor]] = {}
_taking = threading.Lock()
# Packed weights that kernels have read before: nothing the stream may still be doing writes those.
_read: set[tuple[int, int]] = set()


def _workspace(device: int) -> torch.Tensor | None:
    """That of the current stream or, while it is recorded, of the recording's part on it; every byte 0xFF between
    calls. None: a recording that found no spare one, as several were made one after the other without a call between.
    RuntimeError where a graph is being recorded before any call on this device was made."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)  # a Stream takes ten times as long
    if torch.cuda.is_current_stream_capturing():
        return _of_recording(device, stream)
    found = _workspaces.get((device, stream))
    if found is not None and len(_spare[device]) >= _SPARES:
        return found
    with _taking:
        spare = _spare.setdefault(device, [])
        while len(spare) < _SPARES:
            spare.append(_made(device))
        if (device, stream) not in _workspaces:
            _workspaces[device, stream] = _made(device)
        return _workspaces[device, stream]


def _of_recording(device: int, stream: int) -> torch.Tensor | None:
    if device not in _spare:
        raise RuntimeError("w4_linear: x: expected a call on this device before a graph is recorded, got none")
    recording = _recording(stream)
    if recording is None:
        return None
    key = device, recording, stream
    with _taking:
        if key not in _recorded and _spare[device]:
            _recorded[key] = _spare[device].pop()
        return _recorded.get(key)


def _recording(stream: int) -> int | None:
    """The number of what a stream records, which no other recording of the process has; None: the driver is silent."""
    driver = _driver()
    if driver is None:
        return None
    status, number = ctypes.c_int(0), ctypes.c_ulonglong(0)
    failed = driver.cuStreamGetCaptureInfo(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number))
    return None if failed or status.value != _ACTIVE else number.value


@functools.cache
def _driver() -> Any:
    """CUDA's driver, which torch has loaded already; its first cuStreamGetCaptureInfo, which stays: stream, status,
    number."""
    try:
        found = ctypes.CDLL("libcuda.so.1")
        found.cuStreamGetCaptureInfo.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return found


def place(x: torch.Tensor) -> Any:
    """Where in the device's work a kernel on x would stand now: after those of the same place before it."""
    if not x.is_cuda:
        return None
    stream: int = torch._C._cuda_getCurrentRawStream(x.device.index)
    return stream, (_recording(stream) or -1) if torch.cuda.is_current_stream_capturing() else 0


def _workspace_bytes() -> int:
    return _C.w4_workspace(_MOST_ROWS, 1, 1)


def _made(device: int) -> torch.Tensor:
    """By a thread of its own, whose memory comes from no pool that the caller may have set up (torch.compile's graphs
    want theirs back), and who may take memory while another thread records a graph."""
    nbytes = _workspace_bytes()
    found: list[torch.Tensor] = []

    def make() -> None:
        with torch.cuda.device(device):
            stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
            driver = _driver()
            if driver is not None:
                driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_RELAXED)))
            with torch.cuda.stream(stream):
                made = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=f"cuda:{device}")
            stream.synchronize()
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
