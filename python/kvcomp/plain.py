"""Objects of kvcomp's own classes -> plain values for JSON, with arrays set apart, and back by type hints.

    None, bool, int, float, str      themselves
    list, tuple, dict                [...], {"tuple": [...]}, {"dict": {...}}
    array                            {"array": its name}
    dataclass, named tuple, Rotation {"class": its name, "fields": {...}}

Which classes may come back is decided by the hints, never by the file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from .layer_input import Array
from .rotation import Rotation
from .tensorfile import short


class _Misfit(ValueError):
    def __init__(self, where: str, expected: object, got: object) -> None:
        super().__init__(f"{where}: expected {getattr(expected, '__name__', expected)}, got {short(got)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any] | None:
    """The constructor's arguments, each an attribute of the same name, with their hints; None for other classes."""
    if cls is Rotation:
        return {name: hint for name, hint in get_type_hints(cls.__init__).items() if name != "return"}
    if dataclasses.is_dataclass(cls) and cls.__module__.startswith("kvcomp."):
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    if issubclass(cls, tuple) and hasattr(cls, "_fields") and cls.__module__.startswith("kvcomp."):
        return get_type_hints(cls)
    return None


def encode(value: Any, where: str, arrays: dict[str, Array]) -> Any:
    """``value`` as plain values. Arrays in it are added to ``arrays`` under dotted names from ``where`` on, once each.

    ValueError, with the dotted name, for what is none of the above, NaN and infinities.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, np.ndarray):
        known = (name for name, array in arrays.items() if array is value)
        name = next(known, where)
        arrays[name] = value
        return {"array": name}
    hints = _hints(type(value))  # type: ignore[arg-type]
    if hints is not None:
        fields = {name: encode(getattr(value, name), f"{where}.{name}", arrays) for name in hints}
        return {"class": type(value).__name__, "fields": fields}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{where}.{index}", arrays) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: encode(item, f"{where}.{name}", arrays) for name, item in value.items()}}
    raise _Misfit(where, "finite numbers, strings, arrays and kvcomp's own objects", value)


def decode(value: Any, hint: Any, where: str, arrays: Mapping[str, Array]) -> Any:
    """What ``encode`` was given, where it is what ``hint`` says. ValueError, with the dotted name, where it is not;
    whatever else a class's constructor raises."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for arm in args:
            try:
                return decode(value, arm, where, arrays)
            except _Misfit:
                continue
    elif hint is Any:
        return _decode_any(value, where, arrays)
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif hint in (bool, int, float):  # a bool is an int, and both are floats; flags may be 0 and 1
        kinds: dict[Any, tuple[type, ...]] = {float: (bool, int, float), int: (bool, int), bool: (bool, int)}
        most = 1 if hint is bool else 2**1000
        if type(value) in kinds[hint] and (hint is not bool or value >= 0) and abs(value) <= most:
            return value
    elif hint is str:
        if isinstance(value, str):
            return value
    elif origin is np.ndarray or hint is np.ndarray:
        return _array(value, where, arrays)
    elif origin in (tuple, list, Sequence):
        return _decode_items(value, hint, where, arrays)
    elif origin is dict:
        inner = _marked(value, "dict")
        if isinstance(inner, dict):
            return {name: decode(item, args[1], f"{where}.{name}", arrays) for name, item in inner.items()}
    elif isinstance(value, dict) and value.keys() == {"class", "fields"}:
        hints = _hints(hint) if isinstance(hint, type) and value["class"] == hint.__name__ else None
        if hints is not None:
            return _decode_class(value["fields"], hint, hints, where, arrays)
    raise _Misfit(where, hint, value)


def _marked(value: Any, mark: str) -> Any:
    return value[mark] if isinstance(value, dict) and value.keys() == {mark} else None


def _array(value: Any, where: str, arrays: Mapping[str, Array]) -> Array:
    name = _marked(value, "array")
    if not isinstance(name, str) or name not in arrays:
        raise _Misfit(where, "the name of an array", value)
    return arrays[name]


def _decode_items(value: Any, hint: Any, where: str, arrays: Mapping[str, Array]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    items = value if isinstance(value, list) else _marked(value, "tuple")
    if origin is Sequence and _marked(value, "array") is not None:
        return _array(value, where, arrays)
    if not isinstance(items, list):
        raise _Misfit(where, hint, value)
    if origin is tuple and args[-1:] != (...,):
        if len(items) != len(args):
            raise _Misfit(where, hint, value)
    else:
        args = args[:1] * len(items)
    made = [decode(item, arg, f"{where}.{i}", arrays) for i, (item, arg) in enumerate(zip(items, args, strict=True))]
    return made if isinstance(value, list) else tuple(made)


def _decode_any(value: Any, where: str, arrays: Mapping[str, Array]) -> Any:
    if isinstance(value, list):
        return [_decode_any(item, f"{where}.{index}", arrays) for index, item in enumerate(value)]
    if isinstance(value, dict):
        items, inner = _marked(value, "tuple"), _marked(value, "dict")
        if isinstance(items, list):
            return tuple(_decode_any(item, f"{where}.{index}", arrays) for index, item in enumerate(items))
        if not isinstance(inner, dict):
            raise _Misfit(where, "a plain value", value)
        return {name: _decode_any(item, f"{where}.{name}", arrays) for name, item in inner.items()}
    return value


def _decode_class(given: Any, cls: type, hints: Mapping[str, Any], where: str, arrays: Mapping[str, Array]) -> Any:
    if not isinstance(given, dict) or given.keys() != hints.keys():
        raise ValueError(f"{where}: expected the fields of {cls.__name__}, got {short(given)}")
    try:
        fields = {name: decode(given[name], hint, f"{where}.{name}", arrays) for name, hint in hints.items()}
    except _Misfit as error:  # the class is right: no other arm of a union is meant
        raise ValueError(str(error)) from None
    return cls(**fields)
