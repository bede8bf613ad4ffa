"""Named arrays and strings in one safetensors file, under a checksum.

The format (https://github.com/huggingface/safetensors: eight bytes of header length, a JSON header, the arrays' bytes)
is written and read here: the library orders strings at random, takes the last of two equal names without a word, and
wants all bytes at once. Its readers read these files.

The checksum, the first string of the metadata, is the SHA-256 of the whole file with its own 64 digits as zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .layer_input import Array
from .results import replace

_DTYPES = {"U64": "<u8", "I64": "<i8", "F64": "<f8", "U32": "<u4", "I32": "<i4", "F32": "<f4", "U8": "|u1"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_START = b'{"__metadata__":{"checksum":"'
_ZEROS = b"0" * 64
_MOST_HEADER = 4 << 20  # bytes; a claim beyond it is not believed
_MOST_DIMS = 8


@dataclass(frozen=True)
class Tensor:
    """An array to be written: its type and shape now, its elements when their turn comes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @staticmethod
    def of(array: Array) -> Tensor:
        return Tensor(array.dtype, array.shape, lambda: array)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def short(value: object) -> str:
    """repr, for the end of a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refusal(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(f"load: {path}: expected {expected}, got {got}")


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the file whole or not at all; metadata, with "schema" in it, gets the checksum. OSError as open has it."""
    header: dict[str, Any] = {"__metadata__": {"checksum": _ZEROS.decode(), **metadata}}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that all elements are aligned
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        raise ValueError(f"save: {path}: expected a header of at most {_MOST_HEADER} bytes, got {len(text)}")

    def save(part: Path) -> None:
        digest = hashlib.sha256()
        with part.open("wb") as file:

            def put(piece: Any) -> None:
                digest.update(piece)
                file.write(piece)

            put(len(text).to_bytes(8, "little"))
            put(text)
            for name, tensor in ordered:
                array = np.ascontiguousarray(tensor.make())
                assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), name
                put(array.reshape(-1).view(np.uint8).data if array.size else b"")
            file.seek(8 + len(_START))
            file.write(digest.hexdigest().encode())

    replace(path, save)


def parse(text: str | bytes) -> Any:
    """JSON without duplicate names, NaN and infinities. ValueError for everything else, however deep."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError("a number that is not finite")
        return value

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("too deep") from error


def read(path: Path, schema: str) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays and strings of a file that ``write`` made with this schema; the checksum is checked and left out.

    Nothing larger than the file is allocated. ValueError, in one sentence, for a foreign, damaged or truncated file;
    OSError as open has it.
    """
    if path.exists() and not path.is_file():
        raise refusal(path, "a file", "something else")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MOST_HEADER):
            raise refusal(path, f"a file of schema {schema}", "a foreign or truncated one")
        raw = file.read(length)
        try:
            header = parse(raw)
        except ValueError as error:
            raise refusal(path, f"a file of schema {schema}", "a foreign or damaged one") from error
        given = header.pop("__metadata__", None) if isinstance(header, dict) else None
        metadata: dict[str, str] = given if isinstance(given, dict) else {}
        found = metadata.get("schema")
        if found != schema:
            raise refusal(path, f"a file of schema {schema}", "a foreign one" if found is None else short(found))
        if not raw.startswith(_START) or not all(isinstance(value, str) for value in metadata.values()):
            raise refusal(path, "strings as metadata, the checksum first", "a damaged file")
        places = _places(path, header, size - 8 - length)
        data = np.empty(size - 8 - length, np.uint8)
        filled = 0
        while filled < len(data) and (count := file.readinto(data[filled:])):  # type: ignore[arg-type]
            filled += count
    if filled < len(data):
        raise refusal(path, f"{size} bytes", f"{8 + length + filled} (truncated while it was read)")
    digest = hashlib.sha256(head + _START + _ZEROS + raw[len(_START) + len(_ZEROS) :])
    digest.update(data.data)
    if metadata.pop("checksum") != digest.hexdigest():
        raise refusal(path, "the checksum written in it", "another one (a damaged file)")
    arrays = {
        name: data[begin:end].view(dtype).reshape(shape) for name, (dtype, shape, begin, end) in places.items()
    }  # fmt: skip
    return arrays, metadata


def _whole(values: object, most: int) -> bool:
    """A list of integers in 0..most."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= most for value in values)


def _places(path: Path, header: dict[str, Any], size: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """dtype, shape, first byte and end of every array; together they are all ``size`` bytes of data."""
    places = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise refusal(path, f"dtype, shape and data_offsets of {short(name)}", "others (a damaged file)")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = _DTYPES.get(code) if isinstance(code, str) else None
        if dtype is None:
            raise refusal(path, f"{short(name)} of type {', '.join(_DTYPES)}", short(code))
        if not _whole(shape, size) or len(shape) > _MOST_DIMS or not _whole(offsets, size) or len(offsets) != 2:
            raise refusal(path, f"{short(name)} inside the file's {size} bytes of data", "a damaged or truncated file")
        if offsets[1] - offsets[0] != math.prod(shape) * np.dtype(dtype).itemsize:
            raise refusal(path, f"bytes for shape {shape} in {short(name)}", f"{offsets[1] - offsets[0]} of them")
        places[name] = (dtype, tuple(shape), offsets[0], offsets[1])
    end = 0
    for begin, stop in sorted(place[2:] for place in places.values()):
        if begin != end:
            raise refusal(path, "arrays one after the other", "a hole or an overlap (a damaged file)")
        end = stop
    if end != size:
        raise refusal(path, f"{end} bytes of data", f"{size} (a damaged or truncated file)")
    return places
