"""``kvcomp bench attend``: decode attention over packed pages against torch's bf16 attention on the same tokens.

Every cell is checked against fp64 on the values that it reads: packed ones on what the pages hold, torch's on its bf16
tensors. The ceiling is the rate at which the same threads read memory and do next to nothing with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from .. import _C, Policy, results
from ..layer_input import LayerInput
from ..prompt import compress_prompt
from . import timing

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = 1 / math.sqrt(HEAD_DIM)
SAMPLES_LEAST = 5
# torch rounds probabilities and outputs to bf16, 2^-8 each, relative.
TORCH_BOUND = 1e-2
_CEILING_BYTES = 256 << 20


@dataclass
class _Rival:
    """One cell to be: a call that takes a running number, what it reads, and its error."""

    impl: str
    case: dict[str, Any]
    call: Callable[[int], Any]
    nbytes: int
    error: dict[str, Any] | None


def bench(
    *,
    command: str,
    tokens: int = 16384,
    bits: Sequence[int] = (2, 3, 4, 8, 16),
    samples: int = 30,
    seed: int = 0,
) -> dict[str, Any]:
    """A results object of kind ``attend``, of one decode step at one sequence. ValueError for numbers out of range."""
    if tokens < 1:
        raise ValueError(f"bench: --tokens: expected at least 1, got {tokens}")
    if samples < SAMPLES_LEAST:
        raise ValueError(f"bench: --samples: expected at least {SAMPLES_LEAST}, got {samples}")
    found = results.new("attend", command=command)
    threads = found["machine"]["cores"]
    _C.set_threads(threads)
    torch.set_num_threads(threads)
    found["threads"] = threads
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, KV_HEADS, tokens, HEAD_DIM, generator=generator) for _ in range(2))
    queries = torch.randn(1, Q_HEADS, 1, HEAD_DIM, generator=generator).bfloat16()
    rivals = [
        _ceiling(),
        *_torch_rivals(queries, keys.bfloat16(), values.bfloat16()),
        *(_packed(queries, keys.bfloat16(), values.bfloat16(), width) for width in dict.fromkeys(bits)),
    ]
    taken = timing.rotate({str(number): rival.call for number, rival in enumerate(rivals)}, samples)
    for number, rival in enumerate(rivals):
        found["cells"].append(_cell(rival, taken[str(number)]))
    _relate(found["cells"])
    return found


def _cell(rival: _Rival, samples_us: list[float]) -> dict[str, Any]:
    middle = median(samples_us)
    role = {"role": "ceiling"} if rival.error is None else {}
    return results.cell(
        rival.impl,
        rival.case,
        error=rival.error,
        **role,
        median_us=middle,
        samples_us=samples_us,
        bytes=rival.nbytes,
        gb_per_s=rival.nbytes / middle / 1e3,
    )


def _relate(cells: list[dict[str, Any]]) -> None:
    """Every cell's rate beside the ceiling's, and kvcomp's time beside the fastest form of torch's."""
    peak = max(entry["gb_per_s"] for entry in cells if entry.get("role") == "ceiling")
    fastest = min(entry["median_us"] for entry in cells if entry["impl"].startswith("torch sdpa"))
    for entry in cells:
        entry["fraction_of_peak"] = entry["gb_per_s"] / peak
        if entry["impl"] == "kvcomp":
            entry["times_torch"] = fastest / entry["median_us"]


def _case(tokens: int, k_bits: int, v_bits: int) -> dict[str, Any]:
    shape = {"b": 1, "s": tokens, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "d": HEAD_DIM}
    return {**shape, "k_bits": k_bits, "v_bits": v_bits, "device": "cpu"}


def _packed(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bits: int) -> _Rival:
    layer_input = LayerInput(keys=keys, values=values, scale=SCALE)
    packed = [compress_prompt([layer_input], Policy(bits=bits))]
    nbytes = packed[0].nbytes
    packed += [compress_prompt([layer_input], Policy(bits=bits)) for _ in range(timing.copies(nbytes) - 1)]
    layers = [copy.layers[0] for copy in packed]
    stored_keys, stored_values = layers[0].unpack()
    out = torch.empty_like(queries)
    layers[0].attend(queries, scale=SCALE, out=out)
    tokens = keys.shape[2]
    expected = _reference(queries, stored_keys, stored_values)
    # attend.h's bound, and half a unit of the output's bf16.
    bound = 2e-6 * float(np.abs(stored_values).max()) * (1 + math.log(tokens)) + 2.0**-8 * float(np.abs(expected).max())
    error = float(np.abs(out.double().numpy() - expected).max())
    return _Rival(
        "kvcomp",
        _case(tokens, bits, bits),
        lambda number: layers[number % len(layers)].attend(queries, scale=SCALE, out=out),
        nbytes,
        {"metric": "largest absolute error against fp64 on the packed values", "value": error, "bound": bound},
    )


def _torch_rivals(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> list[_Rival]:
    """torch's attention in both forms: heads of a group shared by enable_gqa, or laid out as rows of one KV head."""
    nbytes = keys.nbytes + values.nbytes
    inputs = [(keys.clone(), values.clone()) for _ in range(timing.copies(nbytes))]
    rows = queries.view(1, KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM)
    attention = torch.nn.functional.scaled_dot_product_attention
    forms: dict[str, Callable[[int], torch.Tensor]] = {
        "torch sdpa enable_gqa": lambda number: attention(
            queries, *inputs[number % len(inputs)], scale=SCALE, enable_gqa=True
        ),
        "torch sdpa group as rows": lambda number: attention(rows, *inputs[number % len(inputs)], scale=SCALE),
    }
    expected = _reference(queries, keys.float().numpy(), values.float().numpy())
    rivals = []
    for impl, call in forms.items():
        got = call(0).double().numpy().reshape(expected.shape)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        measured = {"metric": "relative error (L2) against fp64", "value": error, "bound": TORCH_BOUND}
        rivals.append(_Rival(impl, _case(keys.shape[2], 16, 16), call, nbytes, measured))
    return rivals


def _ceiling() -> _Rival:
    """Reading alone: the sum of 64-bit integers, which costs one addition for eight bytes."""
    memory = torch.ones(_CEILING_BYTES // 8, dtype=torch.int64)
    case = {"read": "sum of int64", "bytes": _CEILING_BYTES, "device": "cpu"}
    return _Rival("torch sum", case, lambda _: memory.sum(), _CEILING_BYTES, None)


def _reference(queries: torch.Tensor, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """fp64 attention of queries (1,hq,1,d) over keys, values (1,h,s,d) -> (1,hq,1,d)."""
    group = Q_HEADS // KV_HEADS
    rows = queries.double().numpy().reshape(KV_HEADS, group, HEAD_DIM)
    out = np.empty_like(rows)
    for head in range(KV_HEADS):
        logits = SCALE * rows[head] @ keys[0, head].astype(np.float64).T
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out[head] = weights / weights.sum(axis=-1, keepdims=True) @ values[0, head].astype(np.float64)
    return out.reshape(1, Q_HEADS, 1, HEAD_DIM)
