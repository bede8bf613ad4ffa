"""Caches in files: what a cache holds -> one safetensors file, and back, refused unless all of it is sound.

    strings   checksum (tensorfile), schema, kvcomp (version), format (of pages), model (facts, JSON), fingerprint (the
              SHA-256 of model), policy, report, cache (JSON): plain's values
    arrays    padding.counts (b,) int32, padding.runs (r,) int64: each sequence's runs, alternately padding and real
              per layer I, n lists:
              layers.I.table (n,c) uint64, c the longest list's pages: entries, units counted from the blob's beginning
              layers.I.lists (n,4) int32: states
              layers.I.pages (bytes,) uint8: the blob, the pages in table order, one after the other
              layers.I.aged (n,2) uint8, layers.I.ranks.*, rotations

What is read is taken for hostile: nothing of it reaches an arena or another C operation before it has been checked
against all the rest. The checksum finds damage; it is no signature.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _C, plain, tensorfile
from .layer_input import Array
from .packed import Packed, Report
from .pages import page_sizes
from .policy import BITS, Policy
from .ranks import Ranks
from .store import PAGE, PAGES, ROTATIONS, SCALES, TAIL_PAGE, TAIL_TOKENS, TOKENS, Coding, PackedLayer
from .tensorfile import Tensor, refusal, short

SCHEMA = "kvcomp.cache/1"
UNIT = 128  # bytes (KVC_UNIT)
_STRINGS = {"schema", "kvcomp", "format", "model", "fingerprint", "policy", "report", "cache"}
_MOST = 2**31 - 1  # positions
_MOST_WINDOW = 1 << 24  # csrc/kvcomp/append.h
_MOST_SEED = 2**63 - 1

# What decides whether a model's K and V are those of a cache. Weights do too, and are not looked at.
_FACTS = (
    *("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"),
    *("vocab_size", "max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling"),
    *("partial_rotary_factor", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier", "clip_qkv"),
)


def model_facts(config: Any, layers: int) -> dict[str, Any]:
    """The facts of a decoder's configuration that a saved cache is bound to, in the order of comparison."""
    facts = {name: getattr(config, name, None) for name in _FACTS} | {"num_hidden_layers": layers}
    heads = facts["num_attention_heads"]
    if facts["num_key_value_heads"] is None:
        facts["num_key_value_heads"] = heads
    if facts["head_dim"] is None and heads:
        facts["head_dim"] = facts["hidden_size"] // heads
    given: dict[str, Any] = json.loads(json.dumps({k: v for k, v in facts.items() if v is not None}, default=str))
    return given


@dataclass
class Saved:
    """What a file holds of a cache.

    Attributes:
        positions: seen by every layer, padding included.
        runs: of each sequence, lengths alternately of padding and of real tokens; their sum is ``positions``.
        ratio: at the end of the first pass.
    """

    packed: Packed
    positions: int
    runs: list[list[int]]
    ratio: float | None


@dataclass(frozen=True)
class LayerFacts:
    heads: int
    window: int
    decay: float
    ranks: Ranks | None
    rotation: tuple[Array, Array] | None


@dataclass(frozen=True)
class Facts:
    """The string "cache": what is neither an array nor the policy."""

    coding: Coding
    positions: int
    ratio: float | None
    hold_bytes: int | None
    layers: list[LayerFacts]


# ---- save


def save(path: Path, cache: Saved, model: Mapping[str, Any]) -> None:
    """Writes the file beside ``path`` and renames it: whole or not at all.

    ValueError for a policy with values of kinds that could not be read again; OSError where it cannot be written.
    """
    packed = cache.packed
    if packed.stacked is not None:
        packed.stacked.read()
    layers = [_layer_facts(layer) for layer in packed.layers]
    facts = Facts(packed.layers[0].coding, cache.positions, cache.ratio, packed.hold_bytes, layers)
    arrays: dict[str, Array] = {}
    strings = {"schema": SCHEMA, "kvcomp": _C.VERSION, "format": str(_C.FORMAT_VERSION), "model": json.dumps(model)}
    strings["fingerprint"] = _fingerprint(strings["model"])
    for name, value in (("policy", packed.policy), ("report", packed.report), ("cache", facts)):
        try:
            plainly = plain.encode(value, name, arrays)
            plain.decode(plainly, type(value), name, arrays)  # what is written can be read
        except (ValueError, TypeError) as error:
            raise ValueError(f"save: {error}") from error
        strings[name] = json.dumps(plainly, separators=(",", ":"), allow_nan=False)
    tensors = {name: Tensor.of(array) for name, array in arrays.items()}
    tensors["padding.counts"] = Tensor.of(np.array([len(runs) for runs in cache.runs], np.int32))
    tensors["padding.runs"] = Tensor.of(np.array([length for runs in cache.runs for length in runs], np.int64))
    for index, layer in enumerate(packed.layers):
        sizes = page_sizes(layer.entries(), layer.coding.layout)
        tensors[f"layers.{index}.table"] = Tensor.of(_compact_table(layer, sizes))
        tensors[f"layers.{index}.lists"] = Tensor.of(layer.lists)
        tensors[f"layers.{index}.aged"] = Tensor.of(layer.aged)
        tensors[f"layers.{index}.pages"] = Tensor(np.dtype(np.uint8), (int(sizes.sum()),), _blob_of(layer, sizes))
    tensorfile.write(path, tensors, strings)


def _fingerprint(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()


def _layer_facts(layer: PackedLayer) -> LayerFacts:
    ranks = layer.ranks
    if ranks is not None and ranks.holds:  # as many columns as the file's table has
        ranks = dataclasses.replace(ranks, worth=np.ascontiguousarray(ranks.worth[:, : _longest(layer.lists)]))
    return LayerFacts(layer.heads, layer.window, layer.decay, ranks, layer.rotation)


def _longest(lists: Array) -> int:
    return int(lists[:, PAGES].max(initial=0))


def _rows(begin: Array, size: int) -> Array:
    """(pages, units of a page): the rows, of one unit each, of the pages of ``size`` bytes that begin there."""
    return np.asarray(begin[:, None] // UNIT + np.arange(size // UNIT))


def _compact_table(layer: PackedLayer, sizes: Array) -> Array:
    columns = _longest(layer.lists)
    table = np.zeros((len(layer.lists), columns), np.uint64)
    entries = layer.entries().copy()
    entries["unit"] = (np.cumsum(sizes) - sizes) // UNIT
    table[np.arange(columns) < layer.lists[:, PAGES, None]] = entries.view(np.uint64)
    return table


def _blob_of(layer: PackedLayer, sizes: Array) -> Callable[[], Array]:
    def blob() -> Array:
        units, begin = layer.entries()["unit"], np.cumsum(sizes) - sizes
        out = np.zeros((int(sizes.sum()) // UNIT, UNIT), np.uint8)
        for size in np.unique(sizes):
            members = np.flatnonzero(sizes == size)
            pages = np.empty((len(members), int(size)), np.uint8)
            layer.arena.read(int(size), np.ascontiguousarray(units[members]), pages)
            out[_rows(begin[members], int(size))] = pages.reshape(len(members), -1, UNIT)
        return out.reshape(-1)

    return blob


# ---- load


class _Given(dict[str, Array]):
    """A file's arrays, and which of them were asked for."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        super().__init__(arrays)
        self.left = set(arrays)

    def __getitem__(self, name: str) -> Array:
        self.left.discard(name)
        return super().__getitem__(name)


def load(path: Path, model: Mapping[str, Any], device: Any = None) -> Saved:
    """What ``save`` wrote, in an arena of its own, for a model of these facts; on ``device``, a torch.device or its
    name, None: on the host.

    It takes at most the bytes that the saved cache took: tables have no spare columns, and the pages of one size share
    one slab, so that what had been freed inside slabs is not there. ValueError, in one sentence, for a foreign, damaged
    or truncated file and for one of another model or format; OSError where it cannot be read.
    """
    arrays, strings = tensorfile.read(path, SCHEMA)
    if strings.keys() != _STRINGS:
        raise refusal(path, f"the strings {', '.join(sorted(_STRINGS))}", short(sorted(strings)))
    if strings["format"] != str(_C.FORMAT_VERSION):
        raise refusal(path, f"pages of format {_C.FORMAT_VERSION}", short(strings["format"]))
    _check_model(path, strings, model)
    # Blobs are copied into the arena; nothing that stays may keep the whole file in memory.
    given = _Given({name: value if name.endswith(".pages") else value.copy() for name, value in arrays.items()})
    policy, report, facts = (
        _decoded(path, strings[name], name, kind, given)
        for name, kind in (("policy", Policy), ("report", Report), ("cache", Facts))
    )
    _check_facts(path, facts, model)
    runs = _padding(path, given, facts.positions)
    layers = [_checked_layer(path, given, facts, index, runs) for index in range(len(facts.layers))]
    if given.left:
        raise refusal(path, "the arrays of a saved cache", f"{short(sorted(given.left)[0])} besides")
    arena = _C.Arena()
    packed = Packed(arena, _placed(arena, layers, facts), report, policy, hold_bytes=facts.hold_bytes)
    if device is not None:
        packed = packed.to(device)
    return Saved(packed, facts.positions, runs, facts.ratio)


def _check_model(path: Path, strings: Mapping[str, str], model: Mapping[str, Any]) -> None:
    if strings["fingerprint"] != _fingerprint(strings["model"]):
        raise refusal(path, "the fingerprint of the model's facts in it", "another one")
    try:
        found = tensorfile.parse(strings["model"])
    except ValueError as error:
        raise refusal(path, "JSON in model", str(error)) from error
    if not isinstance(found, dict):
        raise refusal(path, "the model's facts", short(found))
    for name in (*model, *found):
        if found.get(name) != model.get(name):
            expected, got = short(model.get(name)), short(found.get(name))
            raise refusal(path, f"a cache of a model with {name} {expected}, as this one", got)


def _decoded(path: Path, text: str, name: str, kind: type, given: _Given) -> Any:
    try:
        return plain.decode(tensorfile.parse(text), kind, name, given)
    except RecursionError:
        raise refusal(path, f"plain values in {name}", "deeply nested ones") from None
    except (ValueError, TypeError, OverflowError, ArithmeticError) as error:  # a policy's own checks too
        raise ValueError(f"load: {path}: {error}") from error


def _check_facts(path: Path, facts: Facts, model: Mapping[str, Any]) -> None:
    coding, layout = facts.coding, facts.coding.layout
    try:
        _C.page_bytes(layout, 16, 16)
    except (ValueError, NotImplementedError) as error:
        raise refusal(path, "a page layout that exists", short(tuple(layout))) from error
    for name, value, most in (
        ("coding.rotation", coding.rotation, max(ROTATIONS.values())),
        ("coding.scale", coding.scale, max(SCALES.values())),
        ("coding.stochastic", coding.stochastic, 1),
        ("coding.seed", coding.seed, _MOST_SEED),
        ("positions", facts.positions, _MOST),
        ("hold_bytes", facts.hold_bytes or 0, _MOST_SEED),
    ):
        if not 0 <= value <= most:
            raise refusal(path, f"{name} in 0..{most}", short(value))
    if layout.head_dim != model.get("head_dim", layout.head_dim):
        raise refusal(path, f"head_dim {model['head_dim']}", short(layout.head_dim))
    if len(facts.layers) != model["num_hidden_layers"]:
        raise refusal(path, f"{model['num_hidden_layers']} layers", str(len(facts.layers)))
    for index, layer in enumerate(facts.layers):
        heads = model.get("num_key_value_heads")
        if layer.heads != heads if isinstance(heads, int) else not 1 <= layer.heads <= _MOST:
            raise refusal(path, f"{heads} KV heads in layer {index}", short(layer.heads))
        if not 0 <= layer.window <= _MOST_WINDOW or not 0 <= layer.decay < 1:
            raise refusal(path, f"a window and a decay in layer {index}", f"{short(layer.window)}, {layer.decay}")


def _array(path: Path, given: _Given, name: str, dtype: type, shape: tuple[int | None, ...]) -> Array:
    """The array of that name; None in ``shape`` stands for any number."""
    if name not in given:
        raise refusal(path, f"an array {name}", "none")
    found = given[name]
    same = len(found.shape) == len(shape) and all(b in (None, a) for a, b in zip(found.shape, shape, strict=True))
    if found.dtype != dtype or not same:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise refusal(path, f"{name} ({wanted}) {np.dtype(dtype)}", f"{found.shape} {found.dtype}")
    return found


def _padding(path: Path, given: _Given, positions: int) -> list[list[int]]:
    counts = _array(path, given, "padding.counts", np.int32, (None,))
    lengths = _array(path, given, "padding.runs", np.int64, (None,))
    even = bool((counts >= 2).all()) and not (counts % 2).any() and counts.sum(dtype=np.int64) == len(lengths)
    if not len(counts) or not even or (lengths < 0).any() or (lengths > positions).any():
        raise refusal(path, f"runs of padding and real tokens in 0..{positions}", "others")
    runs = [part.tolist() for part in np.split(lengths, np.cumsum(counts)[:-1])]
    for sequence, part in enumerate(runs):
        if sum(part) != positions:
            raise refusal(path, f"{positions} positions in sequence {sequence}", str(sum(part)))
    return runs


@dataclass(frozen=True)
class _Checked:
    """A layer's arrays, found sound; ``begin``, ``sizes`` (pages,): the bytes of each page in ``blob``."""

    table: Array
    lists: Array
    aged: Array
    blob: Array
    used: Array
    begin: Array
    sizes: Array


def _checked_layer(path: Path, given: _Given, facts: Facts, index: int, runs: list[list[int]]) -> _Checked:
    where, layer, layout = f"layers.{index}", facts.layers[index], facts.coding.layout
    n = len(runs) * layer.heads

    def check(sound: Any, name: str, expected: str) -> None:
        if not sound:
            raise refusal(path, f"{where}.{name}: {expected}", "others")

    lists = _array(path, given, f"{where}.lists", np.int32, (n, 4))
    table = _array(path, given, f"{where}.table", np.uint64, (n, None))
    aged = _array(path, given, f"{where}.aged", np.uint8, (n, 2))
    check(np.isin(aged, BITS).all(), "aged", f"bits in {BITS}")
    pages, tail_page = lists[:, PAGES, None], lists[:, TAIL_PAGE, None]
    check((lists >= 0).all(), "lists", "0 or more")
    check(table.shape[1] == _longest(lists), "table", "as many columns as the longest list has pages")
    check((tail_page <= pages).all(), "lists", "the tail inside the list")
    column = np.arange(table.shape[1])
    used, entries = column < pages, table.view(PAGE)
    check((table[~used] == 0).all(), "table", "zeros behind a list's pages")
    k_bits, v_bits, tokens = entries["k_bits"], entries["v_bits"], entries["tokens"].astype(np.int64)
    check(np.isin(k_bits[used], BITS).all() and np.isin(v_bits[used], BITS).all(), "table", f"bits in {BITS}")
    wide = (k_bits == 16) & (v_bits == 16)
    room = np.where(wide, _C.page_tokens(16, 16), _C.page_tokens(2, 2))
    check(((tokens >= 1) & (tokens <= room))[used].all(), "table", "1 token a page, or as many as there is room for")
    check((entries["flags"] == 0).all(), "table", "no flags")
    tail = used & (column >= tail_page)
    check((wide & ((tokens == room) | (column == pages - 1)))[tail].all(), "table", "16-bit tails, full but at the end")
    check(((tokens * tail).sum(1) == lists[:, TAIL_TOKENS]).all(), "lists", "the tail's tokens as in its pages")
    check(((tokens * used).sum(1) == lists[:, TOKENS]).all(), "lists", "the tokens of all pages")
    real = np.repeat([sum(part[1::2]) for part in runs], layer.heads)
    check((lists[:, TOKENS] <= real).all(), "lists", "no more tokens than the sequence has")
    sizes = page_sizes(entries[used], layout)
    begin = np.cumsum(sizes) - sizes
    blob = _array(path, given, f"{where}.pages", np.uint8, (int(sizes.sum()),))
    check((entries["unit"][used].astype(np.int64) * UNIT == begin).all(), "table", "pages one after the other")
    if layer.rotation is not None:
        for matrices in layer.rotation:
            square = matrices.shape == (layer.heads, layout.head_dim, layout.head_dim)
            check(square and matrices.dtype == np.float32, "rotation", "a float32 matrix for each head")
            check(np.isfinite(matrices).all(), "rotation", "finite numbers")
    held = layer.ranks is not None and layer.ranks.holds
    check(facts.hold_bytes is None or held, "ranks", "what pages are worth, where a budget is held")
    if layer.ranks is not None:
        _check_ranks(layer.ranks, n, table.shape[1], lambda sound, expected: check(sound, "ranks", expected))
    return _Checked(table, lists, aged, blob, used, begin, sizes)


def _check_ranks(ranks: Ranks, n: int, columns: int, check: Callable[[Any, str], None]) -> None:
    check(ranks.drop.ndim == 1, "drop of one dimension")
    each, columns = (n, columns) if ranks.holds else (0, 0)
    shapes = {"kind": (n, 4, 2), "level": (n, 4), "recent": (n, 2), "worth": (n, columns), "drop": (each,)}
    shapes |= {"distortion_k": (each, 5), "distortion_v": (each, 5)}
    for name, shape in shapes.items():
        value = getattr(ranks, name)
        check(value.shape == shape, f"{name} of shape {shape}")
        check(value.dtype == (np.uint8 if name == "kind" else np.float32), f"{name} of its type")
        check(not (value < 0).any() and not (value != value).any(), f"{name}: 0 or more")
    there = (ranks.kind > 0).all(2)
    classes = there.sum(1)
    check(np.isin(ranks.kind, (0, *BITS)).all() and (there == (ranks.kind > 0).any(2)).all(), f"bits in {BITS}")
    check((there == (np.arange(4) < classes[:, None])).all(), "kinds one after the other")
    last = np.arange(4) >= classes[:, None] - 1
    check((ranks.level[last] == 0).all(), "level 0 for the last kind")
    check(np.isfinite(ranks.recent).all(), "recent: finite numbers")


def _placed(arena: _C.Arena, layers: list[_Checked], facts: Facts) -> list[PackedLayer]:
    """The layers, their pages in the arena: each size's in one slab, with no more slack than its last memory page."""
    every = np.concatenate([layer.sizes for layer in layers])
    units = np.zeros(len(every), np.uint32)
    for size in np.unique(every):
        units[every == size] = arena.alloc(int(size), int((every == size).sum()))
    packed, end = [], 0
    for index, (layer, known) in enumerate(zip(layers, facts.layers, strict=True)):
        here = units[end : end + len(layer.sizes)]
        end += len(layer.sizes)
        blob = layer.blob.reshape(-1, UNIT)
        for size in np.unique(layer.sizes):
            members = np.flatnonzero(layer.sizes == size)
            pages = blob[_rows(layer.begin[members], int(size))].reshape(len(members), int(size))
            arena.write(int(size), np.ascontiguousarray(here[members]), pages)
        entries = layer.table[layer.used].view(PAGE)
        entries["unit"] = here
        layer.table[layer.used] = entries.view(np.uint64)
        packed.append(
            PackedLayer(
                arena, facts.coding, layer.table, layer.lists, heads=known.heads, layer=index, aged=layer.aged,
                window=known.window, ranks=known.ranks, rotation=known.rotation, decay=known.decay,
            )
        )  # fmt: skip
    return packed
