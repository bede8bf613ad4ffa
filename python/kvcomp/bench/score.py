"""Time of score on CUDA: an observation window over a long prompt, checked against fp64 on a sample of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from .. import _C, results
from . import timing_cuda

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = 1 / math.sqrt(HEAD_DIM)
BOUND = 2e-3  # of the largest importance of a head
TARGET_TFLOPS = 350.0  # executed, of the design
_SAMPLED = 256  # tokens


def _sampled_error(queries: torch.Tensor, keys: torch.Tensor, importance: torch.Tensor) -> float:
    """Largest error of a sample of tokens, its ends included, of the largest importance of their head."""
    group, s, w = queries.shape[1] // keys.shape[1], keys.shape[2], queries.shape[2]
    device = keys.device
    tokens = torch.linspace(0, s - 1, _SAMPLED, device=device).long()
    seen = torch.arange(s, device=device)[None] <= torch.arange(s - w, s, device=device)[:, None]
    worst = 0.0
    for j in range(keys.shape[1]):
        want = torch.zeros(len(tokens), dtype=torch.float64, device=device)
        for q in queries[0, j * group : (j + 1) * group]:
            logits = (q.double() @ keys[0, j].double().T * SCALE).masked_fill(~seen, -torch.inf)
            want += torch.softmax(logits, -1)[:, tokens].sum(0) / group
        got = importance[0, j]
        worst = max(worst, float((got[tokens].double() - want).abs().max() / got.max()))
    return worst


def bench(
    device: torch.device | str = "cuda",
    *,
    tokens: int = 32768,
    windows: Sequence[int] = (64, 512),
    samples: int = timing_cuda.REPLAYS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Cells of score at one sequence of an 8-billion model's layer, bf16; `tflops_executed` counts both passes."""
    generator = torch.Generator(device).manual_seed(seed)
    cells = []
    for w in windows:
        nbytes = 2 * HEAD_DIM * (KV_HEADS * tokens + Q_HEADS * w)
        count = timing_cuda.copies(nbytes)
        how: dict[str, Any] = {"generator": generator, "dtype": torch.bfloat16, "device": device}
        queries = [torch.randn(1, Q_HEADS, w, HEAD_DIM, **how) for _ in range(count)]
        keys = [torch.randn(1, KV_HEADS, tokens, HEAD_DIM, **how) for _ in range(count)]
        importance = torch.empty(1, KV_HEADS, tokens, device=device)
        need = _C.score_workspace(1, Q_HEADS, w, tokens, HEAD_DIM)
        scratch = torch.empty(need, dtype=torch.uint8, device=device)

        def call(
            number: int,
            queries: list[torch.Tensor] = queries,
            keys: list[torch.Tensor] = keys,
            importance: torch.Tensor = importance,
            scratch: torch.Tensor = scratch,
        ) -> None:
            at = number % len(keys)
            _C.score(importance, queries[at], keys[at], None, scratch, SCALE, 0.0, 0, 0, 1)

        call(0)
        error = _sampled_error(queries[0], keys[0], importance)
        took = timing_cuda.rotated_us(call, count, replays=samples)
        middle = median(took)
        executed = 2 * 2 * Q_HEADS * w * tokens * HEAD_DIM
        cells.append(
            results.cell(
                "kvcomp score",
                {
                    "tokens": tokens,
                    "window": w,
                    "q_heads": Q_HEADS,
                    "kv_heads": KV_HEADS,
                    "head_dim": HEAD_DIM,
                    "device": "cuda",
                },
                error={"metric": "largest, of the head's largest", "value": error, "bound": BOUND},
                median_us=middle,
                samples_us=took,
                workspace_bytes=need,
                tflops_executed=executed / middle / 1e6,
                target_tflops=TARGET_TFLOPS,
            )
        )
    return cells
