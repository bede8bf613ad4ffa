"""A copy that follows a tensor: valid until the tensor changes, on whatever stream it is read."""

from __future__ import annotations

from typing import Any

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is asked of the device goes into a CUDA graph at the moment."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Kept:
    """``copy``, made just now of ``source``, whose storage is held: its address is nobody else's meanwhile."""

    def __init__(self, source: torch.Tensor, copy: Any) -> None:
        self.copy = copy
        self._source, self._version = source.detach(), source._version
        self._stream: Any = None
        if source.device.type == "cuda":
            self._stream = torch.cuda.current_stream(source.device)
            self._made = self._stream.record_event()

    def follows(self, source: torch.Tensor) -> bool:
        """Whether the tensor is still what the copy was made of, as far as torch counts changes."""
        return source.data_ptr() == self._source.data_ptr() and source._version == self._version

    def ready(self, memory: torch.Tensor) -> None:
        """To be called before the copy, which lies in ``memory``, is read: another stream waits until it is made, and
        the memory is not used again before that stream is done with it."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(memory.device)
        if stream != self._stream:
            stream.wait_event(self._made)
            memory.record_stream(stream)
