"""A prompt's K and V of all layers -> packed layers under one byte budget, with a report of what was decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _C
from .choose import candidates_of, layer_priorities
from .layer_input import Array, LayerInput, first_tokens
from .measure import distortion_of, importance_of
from .pages import PageRows, bytes_held, paged, write_pages
from .policy import BITS, Hybrid, Policy
from .store import BFLOAT16, FLOAT16, LEDGER, PAGE, ROTATIONS, SCALES, Coding, Layout, PackedLayer, workspace

_LIST_BYTES = 16


@dataclass
class Report:
    """What a plan decided. Counts are over all layers unless they are lists per layer.

    ``configured`` holds what the policy asked for, ``effective`` what became of it under the budget.
    """

    prompt_tokens: int  # real tokens of all sequences
    bf16_bytes: int  # of the uncompressed cache of those tokens
    budget_bytes: int | None
    planned_bytes: int
    least_bytes: int | None  # of the smallest plan, before the arena rounds up
    kept_fraction: float
    kept_per_layer: list[float]
    bits_per_element: float  # of kept tokens' codes
    tokens_per_class: dict[str, int]  # "k_bits/v_bits" -> tokens
    high_precision_fraction: float  # of kept tokens at 16 bits, sinks and window included
    over_budget: bool = False  # the smallest plan was kept although it does not fit
    configured: dict[str, Any] = field(default_factory=dict)
    effective: dict[str, Any] = field(default_factory=dict)


class Packed:
    """The packed layers of one prompt, and what they take.

    Attributes:
        positions: per layer, the token at each stored place, lists one after the other in page order, where they were
            asked for. Attention needs none; they serve measurements, and are not part of the cache's bytes.
    """

    def __init__(
        self, arena: _C.Arena, layers: list[PackedLayer], report: Report, positions: list[Array] | None = None
    ) -> None:
        self.arena, self.layers, self.report, self.positions = arena, layers, report, positions

    @property
    def nbytes(self) -> int:
        """Everything held: slabs of the arena, page tables, list states."""
        return int(self.arena.nbytes) + sum(layer.table_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """bf16 bytes of the prompt's real tokens over ``nbytes`` as it is now."""
        return self.report.bf16_bytes / self.nbytes

    def ledger(self) -> dict[str, int]:
        """Bytes by use: codes, scales, positions, page_table, slack, window; they sum to ``nbytes``."""
        ledger = dict.fromkeys(LEDGER, 0)
        for layer in self.layers:
            for name, nbytes in layer.page_ledger().items():
                ledger[name] += nbytes
            ledger["page_table"] += layer.table_bytes
        ledger["slack"] = self.nbytes - sum(ledger.values())
        return ledger


def _half(tensor: Any) -> int:
    return BFLOAT16 if "bfloat16" in str(tensor.dtype) else FLOAT16


def _check(layers: Sequence[LayerInput], policy: Policy) -> Layout:
    if not layers:
        raise ValueError("compress: layers: expected at least one, got none")
    for index, layer in enumerate(layers):
        keys, values = (tuple(getattr(part, "shape", ())) for part in (layer.keys, layer.values))
        if len(keys) != 4 or keys != values or 0 in keys[:2]:
            raise ValueError(
                f"compress: layers[{index}]: expected keys and values of one shape (b, h, s, d), "
                f"got {keys} and {values}"
            )
        if layer.shape[0] != layers[0].shape[0] or layer.shape[2:] != layers[0].shape[2:]:
            raise ValueError(f"compress: layers[{index}]: expected shape {layers[0].shape}, got {layer.shape}")
        if not np.array_equal(first_tokens(layer), first_tokens(layers[0])):
            raise ValueError(
                f"compress: layers[{index}]: expected first {first_tokens(layers[0]).tolist()} as in layers[0], "
                f"got {first_tokens(layer).tolist()}"
            )
        if layer.importance is not None and tuple(layer.importance.shape) != layer.shape[:3]:
            raise ValueError(
                f"compress: importance: expected {layer.shape[:3]} in layer {index}, "
                f"got {tuple(layer.importance.shape)}"
            )
    head_dim = layers[0].shape[3]
    group = head_dim if policy.group is None else policy.group
    layout = Layout(head_dim, group, int(policy.zero_point), _half(layers[0].keys))
    _C.page_bytes(layout, 16, 16)  # refuses head dimensions and groups by name
    return layout


def fixed_bits(kept: Array, fixed: Array, pair: tuple[int, int]) -> tuple[Array, Array]:
    """K and V bits of every token when each list fills pages of one class and leaves the newest rest to its tail."""
    k_bits, v_bits = np.zeros_like(kept), np.zeros_like(kept)
    room = _C.page_tokens(*pair)
    for row in range(len(kept)):
        k_bits[row, kept[row] > 0], v_bits[row, kept[row] > 0] = 16, 16
        if pair == (16, 16):
            continue
        plain = np.flatnonzero((kept[row] > 0) & (fixed[row] == 0))
        packed = plain[: len(plain) // room * room]
        k_bits[row, packed], v_bits[row, packed] = pair
        fixed[row, plain[len(packed) :]] = 2
    return k_bits, v_bits


def _allowed(policy: Policy) -> Array:
    allowed = np.zeros((5, 5), np.uint8)
    pairs = policy.classes if policy.classes is not None else [(k, v) for k in BITS[:-1] for v in BITS[:-1]]
    for k, v in pairs:
        allowed[BITS.index(k), BITS.index(v)] = 1
    allowed[4, 4] = 1
    return allowed


def compress_prompt(
    layers: Sequence[LayerInput], policy: Policy, *, least_if_over: bool = False, positions: bool = False
) -> Packed:
    """Packs a prompt's layers under ``policy``; all layers share one byte budget.

    ``positions``: keep which token every place holds (``Packed.positions``).

    ``least_if_over``: keep the smallest plan (``report.over_budget``) where the budget is below it, instead of raising
    ``BudgetError``.
    """
    layout = _check(layers, policy)
    coding = Coding(layout, ROTATIONS[policy.rotation], SCALES[policy.scale], int(policy.stochastic), policy.seed)
    first = first_tokens(layers[0])
    s, d = layers[0].shape[2], layout.head_dim
    heads = sum(layer.shape[1] for layer in layers)
    real = int((s - first).sum())
    bf16_bytes = real * heads * d * 2 * 2
    pair = policy.fixed_class
    select = policy.select

    position = np.arange(s)
    fixed = [np.zeros((layer.shape[0] * layer.shape[1], s), np.uint8) for layer in layers]
    for layer, marks in zip(layers, fixed, strict=True):
        begin = np.repeat(first, layer.shape[1])[:, None]
        marks[(position >= begin) & (position < begin + policy.sinks)] = 1
        marks[(position >= np.maximum(begin, s - policy.kept_window))] = 2
    needs_scores = pair is None or (select is not None and select.keep is not None)
    if needs_scores:
        importance = [importance_of(layer, policy) for layer in layers]
    else:
        importance = [np.zeros(layer.shape[:3], np.float32) for layer in layers]
    kept = candidates_of(select, importance, first, policy)
    for candidates, marks in zip(kept, fixed, strict=True):
        marks[candidates == 0] = 0

    budget, least, over = -1, None, False
    if pair is not None:
        if pair == (16, 16) and policy.rotation != "none":
            coding = Coding(layout, ROTATIONS["none"], coding.scale, coding.stochastic, coding.seed)
        bits = [fixed_bits(k, f, pair) for k, f in zip(kept, fixed, strict=True)]
        plans = [paged(k, v, f) for (k, v), f in zip(bits, fixed, strict=True)]
    else:
        budget = policy.budget(bf16_bytes)
        plans, least, over = _planned(layers, policy, coding, importance, kept, fixed, budget, least_if_over)
    aged = pair if pair is not None else _aged_class(plans)
    arena, packed = write_pages(layers, plans, coding, aged, policy.kept_window)
    report = _report(packed, policy, real, bf16_bytes, budget, least, over, layers)
    return Packed(arena, packed, report, [rows.tokens for rows in plans] if positions else None)


def _aged_class(plans: list[PageRows]) -> tuple[int, int]:
    """The class most packed tokens have, which new tokens take when they age."""
    counts: dict[tuple[int, int], int] = {}
    for rows in plans:
        for page in rows.pages:
            key = (int(page["k_bits"]), int(page["v_bits"]))
            if key != (16, 16):
                counts[key] = counts.get(key, 0) + int(page["tokens"])
    return max(counts, key=lambda key: counts[key]) if counts else (4, 4)


def _planned(
    layers: Sequence[LayerInput],
    policy: Policy,
    coding: Coding,
    importance: list[Array],
    kept: list[Array],
    fixed: list[Array],
    budget: int,
    least_if_over: bool,
) -> tuple[list[PageRows], int, bool]:
    """Runs plan until what the arena will really take fits the budget."""
    s = layers[0].shape[2]
    priority = layer_priorities(policy.select, len(layers))
    exponent = 0.5 / policy.importance_temperature
    sharp = np.concatenate(
        [
            (scores.reshape(-1, s).astype(np.float64) ** exponent * weight).astype(np.float32)
            for scores, weight in zip(importance, priority, strict=True)
        ]
    )
    tables = [distortion_of(layer, coding, policy.calibration_tokens, index) for index, layer in enumerate(layers)]
    distortion_k, distortion_v, drop = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    every_kept, every_fixed = np.concatenate(kept), np.concatenate(fixed)
    candidates = ((every_kept > 0) & (every_fixed == 0)).sum(1)
    guard = None if policy.guard is None else np.floor(policy.guard * every_kept.astype(bool).sum(1)).astype(np.int32)
    floor = policy.select.min_tokens if isinstance(policy.select, Hybrid) else 0
    least_tokens = np.minimum(np.maximum(floor - (every_fixed > 0).sum(1), 0), candidates).astype(np.int32)
    n = len(sharp)
    k_bits, v_bits = np.empty((n, s), np.uint8), np.empty((n, s), np.uint8)
    splits = np.cumsum([len(part) for part in kept])[:-1]

    def run(limit: int) -> tuple[int, int, int, int, int, float]:
        return _C.plan(
            k_bits, v_bits, sharp, every_kept, every_fixed, distortion_k, distortion_v, drop, _allowed(policy),
            least_tokens, guard, workspace(_C.plan_workspace(n, s)), coding.layout, limit,
            PAGE.itemsize, _LIST_BYTES, 0,
        )  # fmt: skip

    limit = budget
    while True:
        try:
            _, least, *_ = run(limit)
            smallest = False
        except _C.BudgetError as error:
            least, smallest = error.least_bytes, True
            run(least)
        plans = [
            paged(k, v, f)
            for k, v, f in zip(*(np.split(part, splits) for part in (k_bits, v_bits, every_fixed)), strict=True)
        ]
        held = bytes_held(plans, coding.layout)
        if held <= budget:
            return plans, least, False
        if smallest and not least_if_over:
            raise _budget_error(held, budget, layers)
        if smallest:
            return plans, least, True
        limit -= held - budget


def ratio_text(ratio: float) -> str:
    """A ratio that still works, rounded down to hundredths."""
    return f"{math.floor(100 * ratio) / 100:.2f}"


def _budget_error(least: int, budget: int, layers: Sequence[LayerInput]) -> _C.BudgetError:
    first = first_tokens(layers[0])
    _, _, s, d = layers[0].shape
    whole = int((s - first).sum()) * sum(layer.shape[1] for layer in layers) * d * 4
    error = _C.BudgetError(
        f"plan: budget: expected at least {least} bytes (a ratio of {ratio_text(whole / least)} or less), "
        f"got {budget} bytes"
    )
    error.least_bytes = least
    return error


def _report(
    packed: list[PackedLayer],
    policy: Policy,
    real: int,
    bf16_bytes: int,
    budget: int,
    least: int | None,
    over: bool,
    layers: Sequence[LayerInput],
) -> Report:
    first = first_tokens(layers[0])
    s = layers[0].shape[2]
    histogram: dict[tuple[int, int], int] = {}
    per_layer = []
    for layer in packed:
        for key, count in layer.bits_histogram().items():
            histogram[key] = histogram.get(key, 0) + count
        whole = int((s - first).sum()) * layer.heads
        per_layer.append(float(layer.tokens.sum()) / whole if whole else 0.0)
    stored = sum(histogram.values())
    whole = real * sum(layer.heads for layer in packed)
    arena_bytes = int(packed[0].arena.nbytes) + sum(layer.table_bytes for layer in packed)
    return Report(
        prompt_tokens=real,
        bf16_bytes=bf16_bytes,
        budget_bytes=None if budget < 0 else budget,
        planned_bytes=arena_bytes,
        least_bytes=least,
        kept_fraction=stored / whole if whole else 0.0,
        kept_per_layer=per_layer,
        bits_per_element=sum((k + v) / 2 * n for (k, v), n in histogram.items()) / stored if stored else 0.0,
        tokens_per_class={f"{k}/{v}": n for (k, v), n in sorted(histogram.items())},
        high_precision_fraction=histogram.get((16, 16), 0) / stored if stored else 0.0,
        over_budget=over,
        configured={
            "sinks": policy.sinks,
            "window": policy.window,
            "guard": policy.guard,
            "keep": getattr(policy.select, "keep", None),
            "target_ratio": policy.target_ratio,
        },
        effective={
            "window": policy.kept_window,
            "aged_class": list(packed[0].aged),
            "ratio": bf16_bytes / arena_bytes if arena_bytes else None,
        },
    )
