"""Saved caches: files that ``kvcomp.saved`` wrote, damaged; and others under a right checksum.

The first byte says how: the bytes behind it are the file; or edits of a valid file's bytes, with the checksum as it was
or made right; or edits of what is in the file (strings, trees of plain values, arrays, the header), written anew. What
is accepted is used: attended to, appended to, counted, saved and loaded again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import numpy as np
from kvcomp import hold, saved
from kvcomp.layer_input import LayerInput
from kvcomp.policy import Policy
from kvcomp.prompt import compress_prompt
from kvcomp.rotation import Rotation
from kvcomp.selectors import SnapKV
from reader import NUMBERS, Finding, Reader, refusing
from scratch import FOLDER

_HEADS, _DIM, _WINDOW = 2, 64, 8
_START = b'{"__metadata__":{"checksum":"'
_TYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint8": "U8",
}


def _model(layers: int) -> dict[str, Any]:
    return {"model_type": "fuzz", "num_hidden_layers": layers, "num_key_value_heads": _HEADS, "head_dim": _DIM}


def _cache(layers: int, batch: int, tokens: int, policy: Policy) -> saved.Saved:
    random = np.random.default_rng(tokens)

    def rows(count: int) -> Any:
        return random.standard_normal((batch, _HEADS, count, _DIM)).astype(np.float32)

    padding = [5 * sequence for sequence in range(batch)]
    inputs = [LayerInput(rows(tokens), rows(tokens), rows(_WINDOW), first=np.array(padding)) for _ in range(layers)]
    packed = compress_prompt(inputs, policy)
    return saved.Saved(packed, tokens, [[pad, tokens - pad] for pad in padding], packed.ratio)


def _files() -> list[tuple[bytes, dict[str, Any]]]:
    """Valid files, and their models."""
    caches = [
        _cache(2, 2, 70, Policy(bits=4)),
        _cache(1, 1, 210, Policy(budget_bytes=90_000, select=SnapKV(window=_WINDOW), decode="hold", sinks=2, window=4)),
        _cache(1, 1, 70, Policy(k_bits=3, v_bits=2, scale_dtype="e5m3", rotation=Rotation.random(1, _HEADS, _DIM))),
    ]
    found = []
    for cache in caches:
        model = _model(len(cache.packed.layers))
        saved.save(_PATH, cache, model)
        found.append((_PATH.read_bytes(), model))
    return found


_PATH = FOLDER / "cache"
_FILES = _files()


def target(data: bytes) -> None:
    reader = Reader(data)
    kind = reader.below(16)
    base, model = reader.pick(_FILES)
    if kind == 0:
        file = reader.rest()
    elif kind <= 4:
        file = _edited(reader, base)
        if kind >= 3:
            file = _checked(file)
    else:
        file = _tampered(reader, base)
    _PATH.write_bytes(file)
    cache = None
    with refusing(ValueError, sentence="load: "):
        cache = saved.load(_PATH, model)
    if cache is not None:
        _use(cache, model, reader)


# ---- edits of bytes


def _edited(reader: Reader, base: bytes) -> bytes:
    made = bytearray(base)
    for _ in range(1 + reader.below(4)):
        if not made:
            break
        place = int.from_bytes(reader.take(3), "little") % len(made)
        if reader.flag():
            place %= 4096  # the header
        kind, length = reader.below(5), reader.byte()
        if kind == 0:
            made[place] = reader.byte()
        elif kind == 1:
            del made[place : place + length]
        elif kind == 2:
            made[place:place] = reader.take(length % 16)
        elif kind == 3:
            del made[place + 1 :]
        else:
            made[place : place + length] = made[length : 2 * length]
    return bytes(made)


def _checked(file: bytes) -> bytes:
    """The checksum made right, where there is a place for it."""
    begin = 8 + len(_START)
    if len(file) < begin + 64:
        return file
    digest = hashlib.sha256(file[:begin] + b"0" * 64 + file[begin + 64 :]).hexdigest()
    return file[:begin] + digest.encode() + file[begin + 64 :]


# ---- edits of what is in a file


def _tampered(reader: Reader, base: bytes) -> bytes:
    length = int.from_bytes(base[:8], "little")
    header = json.loads(base[8 : 8 + length])
    strings, data = header.pop("__metadata__"), base[8 + length :]
    arrays = {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], _dtype(entry["dtype"])).reshape(entry["shape"])
        for name, entry in header.items()
    }
    late: list[int] = []
    for _ in range(1 + reader.below(4)):
        kind = reader.below(8)
        if kind <= 3:
            _edit_array(reader, arrays)
        elif kind <= 5:
            name = reader.pick(("cache", "policy", "report", "cache", "policy", "model"))
            _edit_string(reader, strings, name)
        elif kind == 6:
            name = reader.pick(sorted(strings))
            strings[name] = reader.pick((reader.take(4).decode("latin-1"), 5, "[" * 5000, '{"a":' * 5000, None))
        else:
            late.append(reader.byte())
    if reader.flag() and isinstance(strings.get("model"), str):
        strings["fingerprint"] = hashlib.sha256(strings["model"].encode("utf-8", "replace")).hexdigest()
    return _container(reader, strings, arrays, late)


def _dtype(code: str) -> np.dtype[Any]:
    return np.dtype(next(name for name, known in _TYPES.items() if known == code))


def _edit_array(reader: Reader, arrays: dict[str, Any]) -> None:
    if not arrays:
        return
    small = [name for name in sorted(arrays) if not name.endswith("pages")]
    name = reader.pick(small if small and reader.byte() % 8 else sorted(arrays))
    array, kind = arrays[name], reader.below(10)
    if kind <= 5 and array.size:
        array = array.copy()
        flat = array.reshape(-1).view(np.uint8) if reader.flag() else array.reshape(-1)
        place = reader.below(flat.size)
        if flat.dtype.kind == "f":
            with np.errstate(over="ignore"):
                flat[place] = reader.real()
        else:
            bits, whole = 8 * flat.itemsize, reader.whole()
            whole = (int(flat[place]) + whole % 5 - 2 if reader.flag() else whole) % (1 << bits)
            flat[place] = whole - (1 << bits if flat.dtype.kind == "i" and whole >> (bits - 1) else 0)
        arrays[name] = array
    elif kind == 6:
        arrays[name] = reader.pick(
            (array[None], array.reshape(-1), array[:-1], array[:0], array[..., :-1]) if array.ndim else (array[None],)
        )
    elif kind == 7:
        arrays[name] = array.astype(_dtype(reader.pick((*_TYPES.values(),))))
    elif kind == 8:
        del arrays[name]
    else:
        arrays[reader.pick((*sorted(arrays), "other", "", "layers.9.table"))] = array


def _edit_string(reader: Reader, strings: dict[str, Any], name: str) -> None:
    try:
        tree = [json.loads(strings[name])]
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    _edit_tree(reader, tree)
    strings[name] = json.dumps(tree[0])


def _edit_tree(reader: Reader, tree: list[Any]) -> None:
    """Some place in a tree of plain values is changed."""
    node: Any = tree
    while True:
        key = reader.pick(sorted(node)) if isinstance(node, dict) else reader.below(len(node))
        if not isinstance(node[key], dict | list) or not node[key] or reader.byte() >= 240:
            break
        node = node[key]
    kind = reader.below(8)
    if kind == 0 and isinstance(node, dict):
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[reader.pick((*sorted(node), "other"))] = copy.deepcopy(node[key])
    elif kind == 2:
        node[key] = reader.pick(
            ({"tuple": [node[key]]}, [node[key]], {"dict": {"a": node[key]}}, {"array": "padding.runs"})
        )
    elif kind == 3:
        other = tree[0]
        while isinstance(other, dict) and other and reader.flag():
            other = other[reader.pick(sorted(other))]
        node[key] = copy.deepcopy(other)
    elif kind == 4 and isinstance(node[key], int | float):
        node[key] += reader.pick((1, -1, 0.5, 64, -64))
    else:
        node[key] = _plain(reader)


def _plain(reader: Reader) -> Any:
    number = reader.pick(NUMBERS)
    if abs(number) > 10**4000:  # more digits than json.dumps writes
        number = 10**4000
    choices: tuple[Any, ...] = (
        *(None, True, False, number, number, 0.5, -0.25, 1e308, float("nan"), float("inf"), "", "fp16", "hadamard"),
        *([], {}, [1, 2], {"tuple": []}, {"dict": {}}, {"array": "layers.0.table"}, {"array": "layers.0.pages"}),
        *({"class": "Policy", "fields": {}}, {"class": "Full", "fields": {}}, {"tuple": [4, 4]}, "layerwise", "hold"),
    )
    return reader.pick(choices)


def _container(reader: Reader, strings: dict[str, Any], arrays: dict[str, Any], late: list[int]) -> bytes:
    """A file of these strings and arrays; ``late``: edits of its header."""
    header: dict[str, Any] = {"__metadata__": {**strings, "checksum": "0" * 64}}
    header["__metadata__"] = {"checksum": header["__metadata__"].pop("checksum"), **header["__metadata__"]}
    end, parts = 0, []
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize):
        parts.append(np.ascontiguousarray(array).tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": _TYPES[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    if late:
        header = json.loads(json.dumps(header))
        metadata = header.pop("__metadata__")
        tree = [header]
        for _ in late:
            _edit_tree(reader, tree)
            if not isinstance(tree[0], dict):
                break
        header = {"__metadata__": metadata, **tree[0]} if isinstance(tree[0], dict) else tree[0]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _checked(len(text).to_bytes(8, "little") + text + b"".join(parts))


# ---- what was accepted


def _use(cache: saved.Saved, model: dict[str, Any], reader: Reader) -> None:
    packed, batch = cache.packed, len(cache.runs)
    if sum(packed.ledger().values()) != packed.nbytes:
        raise Finding(f"a ledger of other bytes than the {packed.nbytes} held")
    saved.save(_PATH, cache, model)
    again = saved.load(_PATH, model)
    if again.packed.nbytes > packed.nbytes:
        raise Finding(f"loaded again it takes {again.packed.nbytes} bytes, before {packed.nbytes}")
    rows = np.zeros((batch, _HEADS, 1 + reader.below(70), _DIM), np.float32)
    with refusing(ValueError, MemoryError, sentence=".*expected"):
        for layer in packed.layers:
            room = None if packed.hold_bytes is None else lambda nbytes: hold.make_room(packed, nbytes)
            layer.append_attend(rows, rows, rows, scale=0.125, make_room=room)
    if sum(packed.ledger().values()) != packed.nbytes:
        raise Finding(f"after appending, a ledger of other bytes than the {packed.nbytes} held")
