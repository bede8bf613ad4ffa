"""A cache that keeps K and V as they are, and statistics of what its queries attend to: kvcomp capture.

Its layers are handed to the attention function of ``kvcomp.hf.attention``, which runs the model's own attention and
then shows them the queries. Scores are added up over blocks of queries, so that no attention matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from .. import _C
from ..hf.attention import forget, hand_on, register, set_implementation
from ..hf.support import count_layers, decoder_config
from ..store import workspace

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Queries that are scored at once: the scratch memory of `score` grows with it, times the length of the prompt.
BLOCK = 512
_SUM, _MEAN = 0, 1  # kvc_reduce of csrc/kvcomp/score.h


class Captured:
    """What is captured of a prompt of ``tokens`` tokens; its tensors are made when the first layer's rows arrive.

    Attributes:
        keys, values: (L,1,H,T,D) in the model's dtype, after RoPE; H are KV heads.
        attention: (L,H,T) float32. What a token gets of a row of attention: mean over the rows that see it (its own
            and all later ones) and over the query heads that share the KV head (H2O, arXiv 2306.14048, less the bias
            towards tokens that many rows see).
        window: (L,H,T) float32. The same over the last ``width`` rows, whether they see the token or not: the scores of
            SnapKV (arXiv 2404.14469), not pooled.
        query_moment, value_moment: (L,H,D,D) float32. Mean of q q^T over rows and query heads of the group, after RoPE
            and without the logits' scale; mean of v v^T over tokens.
        query_heads: heads that ask, a multiple of H.
    """

    keys: torch.Tensor
    values: torch.Tensor
    attention: torch.Tensor
    window: torch.Tensor
    query_moment: torch.Tensor
    value_moment: torch.Tensor
    query_heads: int

    def __init__(self, layers: int, tokens: int, width: int) -> None:
        self.layers, self.tokens, self.width = layers, tokens, min(width, tokens)

    def allocate(self, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.keys, self.values = (
            torch.empty(self.layers, 1, heads, self.tokens, head_dim, dtype=dtype) for _ in range(2)
        )
        self.attention, self.window = (torch.zeros(self.layers, heads, self.tokens) for _ in range(2))
        self.query_moment, self.value_moment = (torch.zeros(self.layers, heads, head_dim, head_dim) for _ in range(2))


class CaptureLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer, as transformers sees it: K and V of all tokens so far."""

    is_sliding = False
    supports_early_init = False
    is_first = True  # for the attention function: the model's own attention runs, then `first`

    def __init__(self, captured: Captured, index: int, config: Any, advance: Callable[[str], None]) -> None:
        super().__init__()
        self.index, self.config = index, config
        self.seen = 0  # tokens whose K and V have arrived
        self.scored = 0  # and whose queries have
        self._captured, self._advance = captured, advance

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Checks what the model hands over, and makes room for it."""
        if key_states.shape != value_states.shape:
            raise NotImplementedError(
                f"capture: --model: expected keys and values of one shape, got {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)}"
            )
        if key_states.dtype not in DTYPES or value_states.dtype != key_states.dtype:
            raise NotImplementedError(
                f"capture: --dtype: expected float32, float16 or bfloat16 for keys and values, got "
                f"{key_states.dtype} and {value_states.dtype}"
            )
        _, heads, _, head_dim = key_states.shape
        if self.index == 0:
            self._captured.allocate(heads, head_dim, key_states.dtype)
        self._sums = torch.zeros(heads, self._captured.tokens, dtype=torch.float64)
        self._moments = torch.zeros(2, heads, head_dim, head_dim, dtype=torch.float64)  # of queries, of values
        self._last: torch.Tensor | None = None  # the last queries, up to the window's width
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New rows (1,h,q,d) -> K and V of all tokens so far, marked with this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.seen = self.seen, self.seen + key_states.shape[2]
        everything = self._captured.keys[self.index], self._captured.values[self.index]
        for whole, new in zip(everything, (key_states, value_states), strict=True):
            whole[:, :, begin : self.seen] = new
        self._moments[1] += _second_moment(value_states[0])
        return hand_on(self, *(whole[:, :, : self.seen] for whole in everything))

    def first(self, queries: torch.Tensor, real: torch.Tensor | None, scale: float, softcap: float) -> None:
        """The attention over new rows has run: queries (1,hq,q,d), of the last tokens so far."""
        captured = self._captured
        hq, count, d = queries.shape[1:]
        keys = captured.keys[self.index]
        heads = keys.shape[1]
        captured.query_heads = hq
        for begin in range(0, count, BLOCK):
            block = queries[:, :, begin : begin + BLOCK]
            # The causal window of `score`: rows at the end of the keys that the last of them sees.
            end = self.scored + block.shape[2]
            self._sums[:, :end] += _score(block, keys[:, :, :end], scale, softcap, _SUM)
            self._moments[0] += _second_moment(block[0].reshape(heads, -1, d))
            self.scored = end
        last = queries if self._last is None else torch.cat([self._last, queries], dim=2)
        self._last = last[:, :, -captured.width :].clone()
        if self.scored == captured.tokens:
            self._finish(self._last, scale, softcap)
        self._advance(f"layer {self.index + 1} of {captured.layers}, {self.scored} of {captured.tokens} tokens")

    def _finish(self, last: torch.Tensor, scale: float, softcap: float) -> None:
        captured, index, tokens = self._captured, self.index, self._captured.tokens
        group = captured.query_heads // captured.keys.shape[2]
        captured.attention[index] = self._sums / torch.arange(tokens, 0, -1)
        captured.window[index] = _score(last, captured.keys[index], scale, softcap, _MEAN)
        captured.query_moment[index] = self._moments[0] / (tokens * group)
        captured.value_moment[index] = self._moments[1] / tokens
        del self._sums, self._moments, self._last

    def later(self, queries: torch.Tensor, real: torch.Tensor | None, scale: float, softcap: float) -> torch.Tensor:
        """Never asked for: every pass goes to the model's own attention."""
        raise NotImplementedError

    def give_back(self) -> None:
        """The attention failed: nothing of this capture is kept."""

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1


class CaptureCache(cache_utils.Cache):  # type: ignore[misc]
    """For forward passes over one prompt of ``tokens`` tokens, whole or in chunks; ``captured`` is complete when all
    have run. The configuration's attention implementation becomes "kvcomp" (kvcomp.hf.attention).

    NotImplementedError, naming it, for models whose cache kvcomp does not hold (kvcomp.hf.support)."""

    def __init__(self, config: Any, tokens: int, width: int, advance: Callable[[str], None] = lambda _: None) -> None:
        decoder = decoder_config(config)
        self.captured = Captured(count_layers(decoder), tokens, width)
        layers = [CaptureLayer(self.captured, index, decoder, advance) for index in range(self.captured.layers)]
        super().__init__(layers=layers)
        register()
        set_implementation(decoder)

    def release(self) -> None:
        """No layer waits for its attention any more, however the passes ended."""
        for layer in self.layers:
            forget(layer)

    def check_complete(self) -> None:
        """NotImplementedError unless every layer's attention has run on every token."""
        for layer in self.layers:
            if layer.scored != self.captured.tokens:
                raise NotImplementedError(
                    f"capture: --model: expected attention by transformers' attention functions, which did not run on "
                    f"all tokens in layer {layer.index}: the model has its own"
                )


def _score(queries: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float, reduce: int) -> torch.Tensor:
    """Attention that keys (1,h,s,d) get of their last rows, queries (1,hq,w,d): mean over the group, sum or mean over
    rows -> (h,s) float32."""
    _, heads, tokens, d = keys.shape
    out = np.empty((1, heads, tokens), np.float32)
    scratch = workspace(_C.score_workspace(1, queries.shape[1], queries.shape[2], tokens, d))
    _C.score(out, queries, keys, None, scratch, scale, softcap, reduce, 0, 1)
    return torch.from_numpy(out[0])


def _second_moment(rows: torch.Tensor) -> torch.Tensor:
    """rows (h,n,d) -> sum of r r^T (h,d,d) float64, products in fp32."""
    total = torch.zeros(rows.shape[0], rows.shape[2], rows.shape[2], dtype=torch.float64)
    for block in torch.split(rows, BLOCK, dim=1):
        block = block.float()
        total += block.mT @ block
    return total
