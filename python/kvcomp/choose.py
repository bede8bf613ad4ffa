"""Which tokens of which layer may be kept."""

from __future__ import annotations

import numpy as np

from . import _C
from .layer_input import Array
from .policy import Hybrid, Policy, PyramidKV, Selector, Streaming
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


def layer_shares(select: Selector, layers: int, tokens: int, least: int) -> Array:
    """Tokens each layer may keep of ``tokens``: (layers,) int64, at least ``least``, conserved after clipping."""
    assert select.keep is not None
    floor = np.full(layers, min(least, tokens), np.int64)
    if isinstance(select, Hybrid) and select.layer_ratios:
        wanted = np.floor(_interpolated_ratios(select, layers) * tokens).astype(np.int64)
        return np.asarray(np.clip(wanted, floor, tokens))
    weight = np.ones(layers)
    if isinstance(select, PyramidKV) or (isinstance(select, Hybrid) and select.base == "pyramid"):
        _C.pyramid(weight, select.beta)
    shares = np.empty(layers, np.int64)
    total = max(round(select.keep * tokens) * layers, int(floor.sum()))
    _C.share(shares, weight, floor, np.full(layers, tokens, np.int64), total)
    return shares


def candidates_of(select: Selector | None, importance: list[Array], first: Array, policy: Policy) -> list[Array]:
    """Per layer (b*h, s) uint8: tokens that may be stored."""
    layers, (b, _, s) = len(importance), importance[0].shape
    if select is None or select.keep is None:
        real = (np.arange(s) >= first[:, None]).astype(np.uint8)
        return [np.repeat(real, scores.shape[1], 0) for scores in importance]
    least = max(policy.sinks + policy.kept_window, select.min_tokens if isinstance(select, Hybrid) else 0)
    shares = np.stack([layer_shares(select, layers, int(s - f), least) for f in first])
    kept = []
    for index, scores in enumerate(importance):
        h = scores.shape[1]
        out = np.empty((b * h, s), np.uint8)
        keep = np.repeat(shares[:, index], h).astype(np.int32)
        scratch = workspace(_C.select_workspace(b * h, s))
        flat = None if isinstance(select, Streaming) else scores.reshape(b * h, s)
        _C.select(out, flat, keep, np.repeat(first, h), scratch, policy.sinks, policy.kept_window)
        kept.append(out)
    return kept
