"""Importance of tokens, and the error that each number of bits costs, measured on the prompt itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _C
from .layer_input import Array, LayerInput, cuda_of, fetching, first_tokens, to_float32, upload
from .policy import BITS, Policy
from .selectors import AUTOMATIC, H2O, Full, KeyNorm, Random, Streaming
from .store import PAGE, Coding, workspace


def importance_of(layer: LayerInput, policy: Policy, index: int) -> Array:
    """(b, h, s) float32 importance of every token of layer ``index``, as the policy's selector measures it; what was
    handed in with the layer takes its place."""
    return importance_begun(layer, policy, index)()


def importance_begun(layer: LayerInput, policy: Policy, index: int) -> Callable[[], Array]:
    """``importance_of``, in two halves: what a GPU has to do for it is queued now, and the call waits for that."""
    if layer.importance is not None:
        given = np.ascontiguousarray(to_float32(layer.importance))
        if not np.isfinite(given).all() or (given < 0).any():
            raise ValueError("compress: importance: expected finite values of 0 or more, got NaN, Inf or less")
        return lambda: given
    select = policy.select if policy.select is not None else AUTOMATIC
    shape = layer.shape  # what waits holds neither rows nor queries
    if isinstance(select, Streaming):
        return lambda: recency(shape)
    if isinstance(select, Random):
        return lambda: at_random(shape, policy.seed, index)
    found = _norms(layer, layer.keys) if isinstance(select, KeyNorm) else _attention(layer, select)
    weights = None if select.values == "none" else _norms(layer, layer.values, centered=select.values == "centered")
    real = np.arange(shape[2]) >= first_tokens(layer)[:, None]

    def importance() -> Array:
        importance = found()
        if isinstance(select, KeyNorm):
            np.divide(1, np.maximum(importance, 1e-6), out=importance)
            importance *= real[:, None]
        if weights is not None:
            importance *= weights()
        return importance

    return importance


def recency(shape: tuple[int, int, int, int]) -> Array:
    """(b, h, s): newer tokens are more important; ``shape``: of a layer."""
    b, h, s, _ = shape
    return np.broadcast_to(np.arange(1, s + 1, dtype=np.float32) / max(s, 1), (b, h, s)).copy()


def at_random(shape: tuple[int, int, int, int], seed: int, index: int) -> Array:
    """(b, h, s) uniform in [0, 1); ``shape``: of a layer."""
    return np.random.default_rng((seed, index)).random(shape[:3], np.float32)


def _norms(layer: LayerInput, rows: Any, *, centered: bool = False) -> Callable[[], Array]:
    """(b, h, s) L2 norms of a layer's rows (b, h, s, d), or of what they differ from their list's mean; 0: padding."""
    out, first = _output(layer), _first(layer)
    _C.norms(out, rows, first, int(centered))
    return _fetching(out, "norms: rows")


def _output(layer: LayerInput) -> Any:
    """(b, h, s) float32, uninitialized, where the layer's keys are."""
    device = cuda_of(layer.keys)
    if device is None:
        return np.empty(layer.shape[:3], np.float32)
    import torch

    return torch.empty(layer.shape[:3], dtype=torch.float32, device=device)


def _scratch(nbytes: int, device: Any) -> Any:
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _first(layer: LayerInput) -> Any:
    """The layer's first real tokens, where its keys are."""
    device, first = cuda_of(layer.keys), first_tokens(layer)
    return first if device is None else upload(first, device)


def _fetching(found: Any, what: str) -> Callable[[], Array]:
    """What was found, on its way to the host. A GPU's operations look for no NaN or Inf in what they read: they give
    them on."""
    if isinstance(found, np.ndarray):
        return lambda: found
    coming = fetching(found)

    def fetched() -> Array:
        (there,) = coming()
        if not np.isfinite(there).all():
            sequence = int(np.flatnonzero(~np.isfinite(there).all((1, 2)))[0])
            raise ValueError(f"{what}: expected finite values, got NaN or infinity in sequence {sequence}")
        return there.copy()  # kept until the prompt's end: in pageable memory

    return fetched


def peaks_on_gpu(layer: LayerInput, first: Array) -> list[tuple[str, Any]]:
    """Names and largest magnitudes, tensors that nobody waits for, of the real rows of a layer's keys and values: as
    finite as those. (A sum may overflow; torch takes one in double from a copy, four times the rows.)"""
    import torch

    found = []
    for name, rows in (("keys", layer.keys), ("values", layer.values)):
        real = [part[:, int(f) :] for part, f in zip(rows, first, strict=True)] if first.any() else [rows]
        found += [(name, torch.linalg.vector_norm(part, float("inf"))) for part in real if part.numel()]
    return found


def check_peaks(peaks: Sequence[tuple[str, Any]]) -> None:
    """ValueError that names the first one that is not finite; waits for all of them."""
    if not peaks:
        return
    import torch

    finite = torch.stack([part for _, part in peaks]).isfinite().cpu().numpy()
    if not finite.all():
        name, where = peaks[int(np.argmin(finite))][0].split(": ")
        raise ValueError(f"pack: {name}: expected finite values, got NaN or Inf in {where}")


def _attention(layer: LayerInput, select: Full | H2O) -> Callable[[], Array]:
    """What the prompt's queries attend to: its last ones, or (H2O) all of them."""
    b, h, s, d = layer.shape
    if layer.queries is None:
        raise ValueError("compress: queries: expected the prompt's last queries or an importance, got neither")
    if s == 0:
        return lambda: np.zeros((b, h, s), np.float32)
    if isinstance(select, H2O):
        window, reduce = s, 2
        if layer.queries.shape[2] < s:
            raise ValueError(
                f"compress: queries: expected those of all {s} tokens for H2O, got {layer.queries.shape[2]}"
            )
    else:
        window, reduce = min(select.window, s), 0 if select.reduce == "sum" else 1
    queries = layer.queries[:, :, layer.queries.shape[2] - window :]
    out, first, device = _output(layer), _first(layer), cuda_of(layer.keys)
    nbytes = _C.score_workspace(b, int(queries.shape[1]), int(queries.shape[2]), s, d)
    scratch = workspace(nbytes) if device is None else _scratch(nbytes, device)
    _C.score(
        out, queries, layer.keys, first, scratch, layer.logit_scale, layer.softcap, reduce,
        0 if select.pool_kind == "avg" else 1, select.pool | 1,
    )  # fmt: skip
    return _fetching(out, "score: keys")


def distortion_begun(
    layer: LayerInput, coding: Coding, tokens: int, index: int
) -> Callable[[], tuple[Array, Array, Array]]:
    """Error of a unit of attention on one token: K, V stored at 2, 3, 4, 8, 16 bits (lists, 5), dropped (lists,).

    Squared error of the attention output, measured on ``tokens`` evenly spaced real tokens of every list. A value's
    error enters as it is, ``d * mse``. A key's error moves the logit by a nearly normal amount of variance
    ``v = scale^2 |q|^2 mse``, and so the token's weight by ``exp(v) - 1`` of its square, times the values' spread.
    A token that is dropped costs that spread.

    What a GPU has to do for it is queued now; the call waits for that, and does the rest.
    """
    _, _, s, d = layer.shape
    scale = layer.logit_scale
    first = first_tokens(layer)
    spots = [np.unique(np.linspace(f, max(s - 1, f), min(tokens, s - f)).astype(np.int32)) for f in first]
    samples = _samples(layer, spots)
    query_norm = _query_norms(layer, first)

    def distortion() -> tuple[Array, Array, Array]:
        keys, values, real = samples()
        for name, sample in (("keys", keys), ("values", values)):  # pack would name the token by its place in these
            if not np.isfinite(sample).all():
                raise ValueError(f"pack: {name}: expected finite values, got NaN or Inf in layer {index}")
        b, h = keys.shape[:2]
        counts = np.maximum(real.sum(2), 1)
        mean = values.sum(2) / counts
        spread = ((values - mean[:, :, None]) ** 2 * real).sum((2, 3)) / counts[..., 0]
        errors = np.zeros((2, b * h, len(BITS)), np.float32)
        for column, bits in enumerate(BITS[:-1]):
            for part, mse in enumerate(_round_trip(keys, values, real, coding, bits, index)):
                errors[part, :, column] = mse
        variance = (scale**2 * query_norm().reshape(-1, 1)) * errors[0]
        drop = np.maximum(spread.reshape(-1), 1e-12).astype(np.float32)
        distortion_k = np.expm1(np.minimum(variance, 2.0)) * drop[:, None]
        return _falling(distortion_k), _falling(d * errors[1]), drop

    return distortion


def _samples(layer: LayerInput, spots: Sequence[Array]) -> Callable[[], tuple[Array, Array, Array]]:
    """Keys and values (b, h, most, d) float32 of every sequence's tokens ``spots``; (b, 1, most, 1) 1 for real ones."""
    b, h, _, d = layer.shape
    device = cuda_of(layer.keys)
    if device is None:
        rows = [(to_float32(layer.keys[i][:, spot]), to_float32(layer.values[i][:, spot]))
                for i, spot in enumerate(spots)]  # fmt: skip
        coming: Callable[[], list[Array]] = lambda: [part for pair in rows for part in pair]  # noqa: E731
    else:
        there = [upload(spot, device) for spot in spots]
        coming = fetching(
            *(part[i].index_select(1, spot).float() for i, spot in enumerate(there)
              for part in (layer.keys, layer.values))
        )  # fmt: skip

    def samples() -> tuple[Array, Array, Array]:
        most = max((len(spot) for spot in spots), default=0)
        keys, values = np.zeros((b, h, most, d), np.float32), np.zeros((b, h, most, d), np.float32)
        real = np.zeros((b, 1, most, 1), np.float32)
        found = coming()
        for row, spot in enumerate(spots):
            keys[row, :, : len(spot)], values[row, :, : len(spot)] = found[2 * row : 2 * row + 2]
            real[row, :, : len(spot)] = 1
        return keys, values, real

    return samples


def _query_norms(layer: LayerInput, first: Array) -> Callable[[], Array]:
    """(b, h): mean squared length of the real queries of each KV head; head_dim where there are none."""
    b, h, s, d = layer.shape
    none = np.full((b, h), float(d), np.float32)
    if layer.queries is None:
        return lambda: none
    _, heads, w, _ = layer.queries.shape
    lengths = _squares(layer.queries)

    def query_norms() -> Array:
        real = np.arange(s - w, s) >= first[:, None]
        squares = np.where(real[:, None], lengths(), 0)
        seen = real.sum(1)[:, None] * (heads // h)
        return np.where(seen > 0, squares.reshape(b, h, heads // h * w).sum(2) / np.maximum(seen, 1), none)

    return query_norms


def _squares(queries: Any) -> Callable[[], Array]:
    """(b, hq, w): squared lengths; head by head, as H2O brings the queries of the whole prompt."""
    heads = range(int(queries.shape[1]))
    if cuda_of(queries) is None:
        squares = np.stack([np.square(to_float32(queries[:, head])).sum(2) for head in heads], 1)
        return lambda: squares
    import torch

    coming = fetching(torch.stack([queries[:, head].float().square().sum(2) for head in heads], 1))
    return lambda: coming()[0]


def _falling(table: Array) -> Array:
    """Rows made non-increasing with bits: a measured mean may wiggle on few tokens."""
    return np.ascontiguousarray(np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1], np.float32)


def _round_trip(keys: Array, values: Array, real: Array, coding: Coding, bits: int, index: int) -> tuple[Array, Array]:
    """Mean squared error per element of K, V (lists,) after packing at ``bits``; ``real`` (b, 1, s, 1) marks rows."""
    b, h, most, _ = keys.shape
    size, room = _C.page_bytes(coding.layout, bits, bits), _C.page_tokens(bits, bits)
    per_list = -(-most // room)
    arena = _C.Arena(b * h * per_list * size + 4096)
    pages = np.zeros(b * h * per_list, PAGE)
    pages["unit"] = arena.alloc(size, len(pages))
    pages["k_bits"] = pages["v_bits"] = bits
    start = np.tile(np.arange(per_list) * room, b * h).astype(np.int32)
    pages["tokens"] = np.minimum(room, most - start)
    lists = np.repeat(np.arange(b * h, dtype=np.int32), per_list)
    tokens = np.arange(most, dtype=np.int32)
    _C.pack(
        arena, keys, values, pages.view(np.uint64), lists, start, tokens, coding.layout, coding.rotation, coding.scale,
        coding.stochastic, index, coding.seed,
    )  # fmt: skip
    out = np.empty_like(keys), np.empty_like(values)
    _C.unpack(*out, arena, pages.view(np.uint64), lists, start, tokens, coding.layout, coding.rotation)
    counts = np.maximum(real.sum(2), 1)
    for after, before in zip(out, (keys, values), strict=True):  # in place: the prompt waits for this
        after -= before
        np.square(after, out=after)
        after *= real
    k, v = ((squares.mean(3).sum(2) / counts[..., 0]).reshape(-1) for squares in out)
    return k, v
