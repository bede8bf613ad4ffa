"""Packed prompts of single sequences -> one packed batch."""

import dataclasses
from typing import Any

import numpy as np

from .. import _C
from ..hold import compact
from ..packed import Packed, Report
from ..pages import Supply, by_size
from ..ranks import Ranks
from ..store import PAGE, PAGES, PackedLayer

_COPY_BYTES = 64 << 20  # of pages, copied at once
_SLACK = 64  # parts of the arena, of which one may stay free
_BY_LIST = ("kind", "level", "recent", "worth")  # what Ranks keeps for each list; and, to hold a budget:
_BY_LIST_HELD = ("distortion_k", "distortion_v", "drop")


def absorb(packed: Packed, other: Packed) -> None:
    """The sequences of `other` come behind those of `packed`, in its arena. `other` is used up. Both fresh from their
    prompts, of one model and policy; MemoryError, with `packed` as it was, where the arena has no room."""
    supply = Supply(packed.arena)
    counts: dict[int, int] = {}
    for layer in other.layers:
        for size, members in by_size(layer.entries(), layer.coding.layout).items():
            counts[size] = counts.get(size, 0) + len(members)
    try:
        supply.stock(counts)
    except MemoryError:
        supply.close()
        raise
    tables = [_moved(supply, layer) for layer in other.layers]
    for layer, more, table in zip(packed.layers, other.layers, tables, strict=True):
        width = max(layer.table.shape[1], table.shape[1])
        layer.table = np.concatenate([_wide(layer.table, width), _wide(table, width)])
        layer.lists = np.concatenate([layer.lists, more.lists])
        layer.aged = np.concatenate([layer.aged, more.aged])
        if layer.ranks is not None:
            assert more.ranks is not None
            _join_ranks(layer.ranks, more.ranks, width)
    packed.report = _joined(packed.report, other.report)
    packed.positions = None
    if packed.hold_bytes is not None and other.hold_bytes is not None:
        packed.hold_bytes += other.hold_bytes


def finish(packed: Packed) -> None:
    """All sequences are there: what their pages left free in the arena is given back, where it is worth it."""
    if packed.arena.nbytes - packed.arena.used > packed.arena.nbytes // _SLACK:
        compact(packed.arena, packed.layers)
    held = packed.nbytes
    packed.report.planned_bytes = held
    packed.report.effective = packed.report.effective | {"ratio": packed.report.bf16_bytes / held if held else None}


def _moved(supply: Supply, layer: PackedLayer) -> np.ndarray[Any, Any]:
    """The layer's table, its pages copied to the supply's arena."""
    table, arena = layer.table.copy(), supply.arena
    used = np.arange(table.shape[1]) < layer.lists[:, PAGES, None]
    entries = table[used].view(PAGE)
    for size, members in by_size(entries, layer.coding.layout).items():
        source = np.ascontiguousarray(entries["unit"][members])
        target = np.ascontiguousarray(supply.take(size, len(members)))
        step = max(1, _COPY_BYTES // size)
        for at in range(0, len(members), step):
            buffer = _buffer(arena, (len(source[at : at + step]), size))
            layer.arena.read(size, source[at : at + step], buffer)
            arena.write(size, target[at : at + step], buffer)
        entries["unit"][members] = target
    table[used] = entries.view(np.uint64)
    return table


def _buffer(arena: _C.Arena, shape: tuple[int, int]) -> Any:
    """Memory where the arena's is."""
    if arena.device < 0:
        return np.empty(shape, np.uint8)
    import torch

    return torch.empty(shape, dtype=torch.uint8, device=torch.device("cuda", arena.device))


def _wide(rows: np.ndarray[Any, Any], width: int) -> np.ndarray[Any, Any]:
    out = np.zeros((len(rows), width), rows.dtype)
    out[:, : rows.shape[1]] = rows
    return out


def _join_ranks(ranks: Ranks, more: Ranks, width: int) -> None:
    if ranks.holds:
        ranks.worth, more.worth = _wide(ranks.worth, width), _wide(more.worth, width)
    for name in _BY_LIST + (_BY_LIST_HELD if ranks.holds else ()):
        setattr(ranks, name, np.concatenate([getattr(ranks, name), getattr(more, name)]))
    if not ranks.holds:
        ranks.worth = np.zeros((len(ranks.kind), 0), np.float32)


def _joined(one: Report, other: Report) -> Report:
    """Of both together: sums, and means by real tokens."""
    weights = one.prompt_tokens, other.prompt_tokens
    whole = max(sum(weights), 1)

    def mean(first: float, second: float, by: tuple[float, float] = weights) -> float:
        return (first * by[0] + second * by[1]) / max(sum(by), 1e-30)

    def total(name: str) -> int | None:
        parts = getattr(one, name), getattr(other, name)
        return None if None in parts else sum(parts)

    kept = one.kept_fraction * weights[0] / whole, other.kept_fraction * weights[1] / whole
    classes = dict(one.tokens_per_class)
    for name, count in other.tokens_per_class.items():
        classes[name] = classes.get(name, 0) + count
    return dataclasses.replace(
        one,
        prompt_tokens=sum(weights),
        bf16_bytes=one.bf16_bytes + other.bf16_bytes,
        budget_bytes=total("budget_bytes"),
        planned_bytes=one.planned_bytes + other.planned_bytes,
        least_bytes=total("least_bytes"),
        kept_fraction=sum(kept),
        kept_per_layer=[mean(*pair) for pair in zip(one.kept_per_layer, other.kept_per_layer, strict=True)],
        bytes_per_layer=[sum(pair) for pair in zip(one.bytes_per_layer, other.bytes_per_layer, strict=True)],
        bits_per_element=mean(one.bits_per_element, other.bits_per_element, kept),
        tokens_per_class=classes,
        high_precision_fraction=mean(one.high_precision_fraction, other.high_precision_fraction, kept),
        over_budget=one.over_budget or other.over_budget,
    )
