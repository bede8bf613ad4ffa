"""Arguments: of the command line, up to where a model would be needed; and of ``kvcomp._C``, one or several of a valid
call replaced by odd objects: arrays of other types, shapes, strides and byte orders, broken DLPack producers, numbers
out of any range, things that are no numbers.

DLPack's shapes and strides stay inside the producer's memory: nobody can check a lie about that.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import state as states
from kvcomp import _C, cli
from kvcomp.policy import Policy
from memory import Slots
from reader import Finding, Reader, refusing
from state import Array

importlib.import_module("kvcomp.experiment.workload")  # now: with all that it imports, it takes longer than a case may
_PARSER = cli._parser()
_STATE = states.made(states.LAYOUTS[0], 1)
_SLOTS = Slots(24)
_TYPES = ("f4", "f2", "f8", "u1", "u4", "u8", "i4", "i8", "i1", "?", "c8", "O", "U3", "M8[s]", ">f4", ">i4", "u2", "g")


def target(data: bytes) -> None:
    if data[:1] < b"\x40":
        _command_line(data[1:])
    else:
        _call(Reader(data[1:]))


# ---- the command line


def _command_line(data: bytes) -> None:
    """Arguments are lines, as the system would hand them over."""
    arguments = [os.fsdecode(part) for part in data.replace(b"\0", b"").split(b"\n")]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            options = _PARSER.parse_args(arguments)
    except SystemExit as stop:
        if stop.code not in (0, 2) or not said.getvalue():
            raise Finding(f"the parser left with {stop.code!r}") from stop
        return
    if "families" in options:
        with refusing(ValueError, sentence="--[a-z-]+: "):
            cli._workload(options)
    for ratio in getattr(options, "ratios", None) or ():
        with refusing(ValueError, sentence="policy: "):
            Policy(target_ratio=ratio, seed=0)


def _options() -> list[str]:
    found, parsers = [], [_PARSER]
    while parsers:
        for action in parsers.pop()._actions:
            found.extend(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                found.extend(action.choices)
                parsers.extend(action.choices.values())
            elif action.choices:
                found.extend(str(choice) for choice in action.choices)
    return list(dict.fromkeys(found))


def words() -> list[bytes]:
    return [word.encode() for option in _options() for word in (option, f"\n{option}\n")]


def seeds() -> list[bytes]:
    lines = ("env", "run\nhybrid.yaml\n--quick\n--aware\n2\n--families\ncopy", "quality\n--ratios\n4\n1e2\n--seed\n1")
    return [b"\0" + line.encode() for line in lines]


# ---- calls of _C

_ARENA: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "alloc": (lambda arena: arena.alloc, ("page", "few")),
    "free": (lambda arena: arena.free, ("page", "units")),
    "copy": (lambda arena: arena.copy, ("page", "units", "units_to")),
    "read": (lambda arena: arena.read, ("page", "units", "bytes")),
    "write": (lambda arena: arena.write, ("page", "units", "bytes")),
    "compact": (lambda arena: arena.compact, ("page", "all_units")),
    "new": (lambda arena: _C.Arena, ("reserve",)),
}
_CALLS = (*states.OPERATIONS, *_ARENA)
_SENTENCES = dict.fromkeys(_ARENA, "arena: ") | {"set_threads": r"set_threads: |kvcomp\._C\.set_threads\(\) takes"}


def _call(reader: Reader) -> None:
    operation = reader.pick(_CALLS)
    if operation in _ARENA:
        arena = _C.Arena(1 << 20)
        units = arena.alloc(256, 5)
        own = {"page": 256, "few": 3, "units": units[:3].copy(), "units_to": units[2:].copy(), "all_units": units}
        own |= {"bytes": np.zeros((3, 256), np.uint8), "reserve": 1 << 20}
        function, names = _ARENA[operation][0](arena), _ARENA[operation][1]
    else:
        function, names, own = getattr(_C, operation), states.OPERATIONS[operation][0], _STATE
    at_end = reader.flag()
    given = [_SLOTS.put(v, at_end=at_end) if isinstance(v := own[name], np.ndarray) else v for name in names]
    for _ in range(1 + reader.below(3)):
        place = reader.below(len(given))
        given[place] = _odd(reader, given[place], given)
    count = reader.below(32)
    if count == 30:
        given.append(_odd(reader, None, given))
    elif count == 31:
        given.pop()
    errors = (ValueError, TypeError, NotImplementedError, MemoryError, _C.CudaError)
    try:
        with np.errstate(all="ignore"), refusing(*errors, sentence=_SENTENCES.get(operation, f"{operation}: ")):
            function(*given)
    finally:
        _C.set_threads(1)


class _Raises:
    """Every way of asking it for a number or a tensor fails with this error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise self.error

    __index__ = __float__ = __int__ = __str__ = __repr__ = __dlpack__ = __dlpack_device__ = _fail  # type: ignore[assignment]


class _Unspeakable(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class _Fickle:
    """A number the first time that it is asked for."""

    def __init__(self, value: Any) -> None:
        self.value, self.asked = value, 0

    def _once(self) -> Any:
        self.asked += 1
        if self.asked > 1:
            raise RuntimeError("asked again")
        return self.value

    __index__ = __float__ = _once


class _OddName(type):
    @property
    def __name__(cls) -> Any:  # type: ignore[override]
        return 7


class _Named(metaclass=_OddName):
    pass


class _Sub(np.ndarray[Any, Any]):
    pass


class _Tensor(ctypes.Structure):
    _fields_ = [
        *[("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)],
        *[("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)],
        *[("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64))],
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        *[("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p)],
        *[("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _Tensor)],
    ]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _Producer:
    """An array behind a capsule, some of whose fields are odd."""

    def __init__(self, array: Array, reader: Reader) -> None:
        self.array = array
        self.versioned = reader.flag()
        self.struct = _Versioned() if self.versioned else _Managed()
        tensor = self.struct.tensor
        ndim = array.ndim
        shape, strides = list(array.shape), [stride // max(array.itemsize, 1) for stride in array.strides]
        tensor.data, tensor.device_type, tensor.ndim, tensor.lanes = array.ctypes.data, 1, ndim, 1
        tensor.code, tensor.bits = {"f": 2, "i": 0, "u": 1}.get(array.dtype.kind, 6), array.itemsize * 8
        given_strides = reader.flag() or not array.flags.c_contiguous
        for _ in range(reader.below(4)):
            kind = reader.below(12)
            if kind == 0:
                tensor.device_type = reader.pick((1, 2, 3, 10, 0, -1))
            elif kind == 1:
                tensor.device_id = reader.pick((0, 1, -1, 2**31 - 1))
            elif kind == 2 and reader.flag():
                tensor.ndim = reader.pick((-1, 6, 2**31 - 1, 0))
            elif kind == 2:
                shape, strides = [1, *shape], [reader.pick((1, 0, 2**62, -(2**62))), *strides]
                tensor.ndim = len(shape)
            elif kind == 3:
                tensor.code = reader.pick((0, 1, 2, 4, 5, 6, 255)) if array.itemsize > 1 else 1
            elif kind == 4:
                tensor.bits = reader.pick((0, 1, 8, array.itemsize * 8))
            elif kind == 5:
                tensor.lanes = reader.pick((0, 1, 2, 65535))
            elif kind == 6:
                tensor.data = None
            elif kind == 7 and shape:  # fewer, none, or a negative number
                axis = reader.below(len(shape))
                shape[axis] = reader.pick((0, 1, shape[axis] - 1, -1, -(2**63), -(2**31)))
                given_strides = True
            elif kind == 8 and shape:
                axis = reader.below(len(shape))
                if shape[axis] <= 1:
                    strides[axis] = reader.pick((2**62, -(2**63), 2**63 - 1, 0))
                else:
                    strides[axis] = 0
                given_strides = True
            elif kind == 9 and tuple(shape) == array.shape and tensor.data == array.ctypes.data:  # from behind
                reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) * array.itemsize
                if 0 <= reach < array.nbytes and array.flags.c_contiguous and 0 not in strides:
                    tensor.data, given_strides = array.ctypes.data + reach, True
                    strides = [-stride for stride in strides]
            elif kind == 10 and self.versioned:
                self.struct.major = reader.pick((0, 2, 2**32 - 1))
                self.struct.flags = reader.byte()
        self.major = reader.below(16) != 15
        if self.versioned and not self.struct.major:
            self.struct.major = 1 if self.major else 0
        self.shape = (ctypes.c_int64 * max(len(shape), 6))(*shape)
        self.strides = (ctypes.c_int64 * max(len(strides), 6))(*strides)
        tensor.shape = self.shape
        if given_strides:
            tensor.strides = self.strides
        self.device_error, self.old = reader.below(8) == 7, reader.flag()

    def __dlpack_device__(self) -> Any:
        if self.device_error:
            raise RuntimeError("no device")
        return self.struct.tensor.device_type, self.struct.tensor.device_id

    def __dlpack__(self, **options: Any) -> Any:
        if "max_version" in options and self.old:
            raise TypeError("unexpected argument")
        return _new_capsule(
            ctypes.addressof(self.struct), b"dltensor_versioned" if self.versioned else b"dltensor", None
        )


class _Returns:
    """__dlpack__ that returns this."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __dlpack__(self, **_: Any) -> Any:
        return self.result


def _odd(reader: Reader, value: Any, given: list[Any]) -> Any:
    kind = reader.below(16)
    # What a broadcast array stands for takes terabytes to copy.
    if kind <= 6 and isinstance(value, np.ndarray) and value.nbytes < 1 << 24:
        try:
            return _odd_array(reader, value)
        except (ValueError, TypeError, IndexError, MemoryError, OverflowError, RuntimeError):  # odd already
            return value
    if kind <= 8 and type(value) is np.ndarray and 0 < value.nbytes < 1 << 20 and value.ndim < 6:
        return _Producer(value, reader)
    if kind == 9 and isinstance(value, tuple) and value:
        fields = list(value)
        fields[reader.below(len(fields))] = reader.pick((reader.whole(), reader.real(), None, "1", True))
        return reader.pick((tuple(fields), fields, (*value, 1), value[:-1], tuple(fields)))
    if kind <= 11:
        return reader.whole()
    if kind == 12:
        return reader.real()
    if kind == 13:
        return reader.pick(given)
    error = reader.pick((_Unspeakable(), RuntimeError(), OverflowError("x" * 3000), BufferError("\udc80"), KeyError(1)))
    return reader.pick(
        (
            *(None, True, "", "text", b"bytes", [], [1.0], {}, (), object(), type, Ellipsis, 1j, memoryview(b"1234")),
            *(np.float32(3), np.int64(-1), np.uint64(2**64 - 1), np.array(3), np.array(2.5), np.bool_(True)),
            *(
                np.array(None),
                np.array("a"),
                _C.Arena(1 << 16),
                _Raises(error),
                _Fickle(2),
                _Fickle(2.0),
                _Named(),
                _Named,
            ),
            *(_Returns(None), _Returns(7), _Returns(np.zeros(3).__dlpack__()), _Returns(_Raises(error))),
            *(_new_capsule(ctypes.addressof(_STRAY), b"other", None), float, np.ndarray, lambda: 3, range(4), _C),
        )
    )


_STRAY = ctypes.c_int64(7)


def _odd_array(reader: Reader, value: Array) -> Any:
    kind = reader.below(14)
    if kind == 0:
        with np.errstate(all="ignore"):
            return value.astype(reader.pick(_TYPES))
    if kind == 1:
        return value.astype(value.dtype.newbyteorder())
    if kind == 2:
        return reader.pick(
            (value.reshape(-1), value[None], value[None, None, None], value[:0], value[..., :0], value.T)
        )
    if kind == 3:
        return reader.pick((value[::-1], value[..., ::-1], value[::2], value[..., ::2], value[..., None][..., 0]))
    if kind == 4:
        raw = np.zeros(value.nbytes + value.itemsize, np.uint8)[1:]
        return raw[: value.nbytes].view(value.dtype).reshape(value.shape)
    if kind == 5:
        value.flags.writeable = False
        return value
    if kind == 6:
        return np.broadcast_to(
            value.reshape(-1)[:1].reshape(()), reader.pick((value.shape, (2**40,), (2**20, 2**20, 1, 64)))
        )
    if kind == 7:
        return value.reshape(-1)[0] if value.size else value
    if kind == 8:
        return value.view(_Sub)
    if kind == 9:
        pairs = np.zeros(value.shape, [("a", value.dtype), ("b", "u1")])
        return reader.pick((pairs, pairs["a"]))
    if kind == 10:  # of one element, with strides that lead anywhere
        return np.lib.stride_tricks.as_strided(
            value.reshape(-1)[:1], [1] * value.ndim, [2**40 * value.itemsize] * value.ndim
        )
    if kind == 11 and value.size:
        with np.errstate(all="ignore"):
            if value.dtype.kind == "f":
                value.reshape(-1)[reader.below(value.size)] = reader.real()
            else:
                value.reshape(-1)[reader.below(value.size)] = reader.byte()
        return value
    if kind == 12:
        return value.tolist() if value.size < 100 else list(value.shape)
    return np.ma.masked_array(value) if reader.flag() else memoryview(value)
