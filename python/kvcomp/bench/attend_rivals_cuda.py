"""torch's attentions in bf16 on the GPU: SDPA with each of its backends, and FlexAttention, for one decode step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import timing_cuda

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
_FLEX = "torch flex_attention compiled"
# bf16 probabilities and outputs, 2^-8 each, relative.
BOUND = 1e-2

Call = Callable[[int], torch.Tensor]


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """fp64 attention of queries (heads, q, d) over one list's rows (tokens, d); the last q tokens are the queries'."""
    q, tokens = queries.shape[1], len(keys)
    logits = queries.double() @ keys.double().T * queries.shape[2] ** -0.5
    seen = tokens - torch.arange(q - 1, -1, -1, device=keys.device)
    hidden = torch.arange(tokens, device=keys.device) >= seen[:, None]
    exact: torch.Tensor = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values.double()
    return exact


class Tensors:
    """Queries (b, hq, 1, d), and keys and values (b, h, s, d) often enough that the L2 does not help."""

    def __init__(self, b: int, s: int, q_heads: int, kv_heads: int, d: int, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)

        self.nbytes = 2 * b * kv_heads * s * d * 2
        self.queries = normal(b, q_heads, 1, d)
        self.copies = [
            (normal(b, kv_heads, s, d), normal(b, kv_heads, s, d)) for _ in range(timing_cuda.copies(self.nbytes))
        ]

    def error(self, call: Call) -> dict[str, Any]:
        """Relative, over the first and the last list of the first copy."""
        b, q_heads, _, d = self.queries.shape
        keys, values = self.copies[0]
        h = keys.shape[1]
        got = call(0).reshape(b, h, q_heads // h, d)
        rows = self.queries.view(b, h, q_heads // h, 1, d)
        gap = size = 0.0
        for i, head in {(0, 0), (b - 1, h - 1)}:
            exact = attention(rows[i, head], keys[i, head], values[i, head])[:, 0]
            gap += float((got[i, head].double() - exact).square().sum())
            size += float(exact.square().sum())
        return {"metric": "relative error (L2) against fp64", "value": (gap / size) ** 0.5, "bound": BOUND}


def forms(name: str) -> dict[str, bool | None]:
    """Names in results of each form of a rival; whether the query heads of a KV head are rows (None: FlexAttention)."""
    if name == "flex":
        return {_FLEX: None}
    return {f"torch sdpa {name}, {form}": rows for form, rows in (("enable_gqa", False), ("group as rows", True))}


def call_of(name: str, rows: bool | None, tensors: Tensors) -> Call:
    """A call of one form, that takes a running number to choose its input by."""
    return _flex(tensors) if rows is None else functools.partial(_sdpa, tensors, _BACKENDS[name], rows)


def _sdpa(tensors: Tensors, backend: SDPBackend, rows: bool, number: int) -> torch.Tensor:
    """rows: the query heads of a KV head as so many queries of one head, which all see every token."""
    keys, values = tensors.copies[number % len(tensors.copies)]
    queries = tensors.queries
    if rows:
        b, q_heads, _, d = queries.shape
        queries = queries.view(b, keys.shape[1], q_heads // keys.shape[1], d)
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, enable_gqa=not rows)


def _flex(tensors: Tensors) -> Call:
    def call(number: int) -> torch.Tensor:
        keys, values = tensors.copies[number % len(tensors.copies)]
        found = _compiled()(tensors.queries, keys, values, enable_gqa=True)
        assert isinstance(found, torch.Tensor)
        return found

    return call


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 64  # one program for each shape
    return torch.compile(flex_attention, dynamic=False)
