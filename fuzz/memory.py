"""Arrays beside memory that cannot be touched, so that reading or writing past them is a crash in any build."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_ROOM = 1 << 20
_EDGE = mmap.PAGESIZE
_STEP = _ROOM + _EDGE
_NO_ACCESS = 0  # PROT_NONE


class Slots:
    """As many arrays at once as there are slots; the next one takes the place of the first."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count * _STEP + _EDGE)
        self._count, self._next = count, 0
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for slot in range(count + 1):
            if protect(start + slot * _STEP, _EDGE, _NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")

    def put(self, array: Array, *, at_end: bool) -> Array:
        """A copy that ends (or begins) at an edge."""
        if array.nbytes > _ROOM:
            raise ValueError(f"slots: array: expected at most {_ROOM} bytes, got {array.nbytes}")
        begin = self._next % self._count * _STEP + _EDGE
        self._next += 1
        if at_end:
            begin += _ROOM - array.nbytes
        placed = np.ndarray(array.shape, array.dtype, buffer=self._memory, offset=begin)
        placed[...] = array
        return placed
