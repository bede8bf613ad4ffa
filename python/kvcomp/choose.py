"""Which tokens of which layer may be kept."""

from __future__ import annotations

import numpy as np

from . import _C
from .layer_input import Array
from .policy import Policy
from .selectors import AUTOMATIC, AdaKV, Hybrid, PyramidKV, Selector, Streaming
from .store import workspace


def _interpolated_ratios(select: Hybrid, layers: int) -> Array:
    """Retain ratio of each layer at hand, its position mapped onto the model the list was made for."""
    assert select.model_layers is not None
    at = np.arange(layers) * (select.model_layers - 1) / max(layers - 1, 1)
    return np.interp(at, [r.layer_index for r in select.layer_ratios], [r.retain_ratio for r in select.layer_ratios])


def layer_priorities(select: Selector | None, layers: int) -> Array:
    if not isinstance(select, Hybrid) or not select.layer_ratios:
        return np.ones(layers)
    assert select.model_layers is not None
    at = np.arange(layers) * (select.model_layers - 1) / max(layers - 1, 1)
    return np.interp(at, [r.layer_index for r in select.layer_ratios], [r.priority for r in select.layer_ratios])


def layer_shares(select: Selector, layers: int, tokens: int, least: int, scale: float = 1.0) -> Array:
    """Tokens each layer may keep of ``tokens``: (layers,) int64, at least ``least``, conserved after clipping.

    ``scale``: of what the selector asks for, all of the tokens where it asks for none.
    """
    floor = np.full(layers, min(least, tokens), np.int64)
    if isinstance(select, Hybrid) and select.layer_ratios:
        wanted = np.floor(scale * _interpolated_ratios(select, layers) * tokens).astype(np.int64)
        return np.asarray(np.clip(wanted, floor, tokens))
    weight = np.ones(layers)
    if isinstance(select, PyramidKV) or (isinstance(select, Hybrid) and select.base == "pyramid"):
        _C.pyramid(weight, select.beta)
    shares = np.empty(layers, np.int64)
    keep = 1.0 if select.keep is None else select.keep
    total = max(round(min(1.0, scale * keep) * tokens) * layers, int(floor.sum()))
    _C.share(shares, weight, floor, np.full(layers, tokens, np.int64), total)
    return shares


def candidates_of(
    importance: Array, first: Array, policy: Policy, index: int, layers: int, scale: float | None = None
) -> Array:
    """Tokens of layer ``index`` of ``layers`` that may be stored: (b*h, s) uint8, of its importance (b, h, s).

    ``scale``: of the tokens that the selector asks for; None: as many as it says, all where it does not say.
    """
    b, h, s = importance.shape
    select = policy.select
    if scale is None and (select is None or select.keep is None):
        return np.repeat((np.arange(s) >= first[:, None]).astype(np.uint8), h, 0)
    if select is None:
        select = AUTOMATIC
    least = max(policy.sinks + policy.kept_window, select.min_tokens if isinstance(select, Hybrid) else 0)
    part = 1.0 if scale is None else scale
    shares = np.array([layer_shares(select, layers, int(s - f), least, part)[index] for f in first], np.int64)
    kept = np.empty((b * h, s), np.uint8)
    flat, begin = importance.reshape(b * h, s), np.repeat(first, h)
    if isinstance(select, AdaKV):
        floor = np.maximum(np.minimum(least, shares), np.floor(select.safeguard * shares)).astype(np.int32)
        scratch = workspace(_C.ada_workspace(b * h, s))
        _C.ada(kept, flat, (shares * h).astype(np.int32), begin, scratch, h, floor, policy.sinks, policy.kept_window)
        return kept
    scratch = workspace(_C.select_workspace(b * h, s))
    scores = None if isinstance(select, Streaming) else flat
    _C.select(kept, scores, np.repeat(shares, h).astype(np.int32), begin, scratch, policy.sinks, policy.kept_window)
    return kept
