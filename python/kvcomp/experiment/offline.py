"""Compressing a KV cache without its model: one that is stored in files, or a random one (``--simulate``)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import results
from ..eval.quality import ErrorSums, error_sums, stored_rows
from ..layer_input import LayerInput
from ..packed import Packed
from ..prompt import compress_prompt
from .config import ExperimentConfig, to_policy
from .keys import configured_and_effective
from .runner import limits, refuse_metrics
from .stored import StoredCache, load, simulated
from .workload import plan_values

# The seed's sizes of a simulated cache.
SIMULATED_LAYERS, SIMULATED_HEADS, SIMULATED_HEAD_DIM = 32, 32, 128


def run(
    config: ExperimentConfig,
    *,
    name: str,
    command: str,
    cache_path: Path | None,
    attention_path: Path | None,
    simulate: bool,
    seed: int,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The results object of one experiment on a stored cache, or on a simulated one where asked for.

    ``tell`` is told what is being done, for people who wait.

    ValueError, TypeError or BudgetError with one sentence; FileNotFoundError for a missing file.
    """
    if simulate:
        if cache_path is not None or attention_path is not None:
            raise ValueError("run: --simulate: expected no --cache-path or --attention-stats beside it, got one")
        cache = simulated(
            layers=round(config.metrics.get("layers", config.model_layers or SIMULATED_LAYERS)),
            tokens=max(1, config.max_sequence_length // 4),
            heads=SIMULATED_HEADS,
            head_dim=SIMULATED_HEAD_DIM,
            seed=seed,
        )
    else:
        refuse_metrics(config)
        if cache_path is None:
            raise ValueError("run: --attention-stats: expected --cache-path beside it, got none")
        cache = load(cache_path, attention_path)
        _check_origin(config, cache)
    cache = _telling(cache, tell)
    found = results.new("quality", command=command, origin="simulated" if simulate else "measured")
    packed = None
    if not config.uncompressed:
        _check_importance(config, cache)
        policy = to_policy(config, prompt_tokens=cache.tokens, seed=seed)
        reader = _Reader(cache, config.selector.importance)
        layers = [_StoredLayer(reader, index) for index in range(cache.layers)]
        packed = compress_prompt(layers, policy, positions=True)
    held = cache.bf16_bytes if packed is None else packed.nbytes
    cell = _cell(config, cache, packed, name=name, seed=seed)
    found["cells"] = [cell]
    found["method"] = name
    found.update(_headline(config, cache.bf16_bytes, held))
    found["limits"] = limits(config, throughput_gain=found["throughput_gain"], accuracy_drop=None)
    found["config"] = config.model_dump(mode="json")
    found["keys"] = configured_and_effective(config, cache.tokens, cell.get("plan"), found["compression_ratio"])
    return found


def _telling(cache: StoredCache, tell: Callable[[str], None]) -> StoredCache:
    """The same cache, which tells when a layer is read or made."""

    def layer(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tell(f"layer {index + 1} of {cache.layers}")
        return cache.layer(index)

    return dataclasses.replace(cache, layer=layer)


def _check_origin(config: ExperimentConfig, cache: StoredCache) -> None:
    # Organizations are left out by some who name models: the last component decides.
    if cache.model_name is not None and Path(cache.model_name).name != Path(config.model_name).name:
        raise ValueError(
            f"run: --cache-path: expected a cache of {config.model_name}, the experiment's model_name, "
            f"got one of {cache.model_name}"
        )


def _check_importance(config: ExperimentConfig, cache: StoredCache) -> None:
    wanted = config.selector.importance
    if config.selector.strategy == "streaming":
        return
    if wanted == "attention" and cache.attention is None:
        raise ValueError(
            "run: --attention-stats: expected the attention that each token got, got none "
            "(selector.importance: key_norm does without)"
        )
    if wanted == "key_norm" and cache.attention is not None:
        raise ValueError(
            "config: selector.importance: expected attention, as there is a tensor of it at hand, got key_norm"
        )


class _Reader:
    """Reads the layers of a stored cache, and keeps the last one: what compression asks for comes layer by layer."""

    def __init__(self, cache: StoredCache, importance: str) -> None:
        self.cache = cache
        self._importance = importance
        self._last: tuple[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._last is None or self._last[0] != index:
            self._last = None  # before the next is read: one layer in memory, not two
            self._last = index, self.cache.layer(index)
        return self._last[1]

    def importance(self, index: int) -> Any:
        if self._importance == "key_norm":
            return key_norm_importance(self.rows(index)[0]).numpy()
        return None if self.cache.attention is None else self.cache.attention(index).numpy()


class _StoredLayer(LayerInput):
    """A layer that is read when its rows are asked for; its shape is known without."""

    def __init__(self, reader: _Reader, index: int) -> None:
        self._reader, self._index = reader, index
        self.importance = reader.importance(index)

    @property
    def keys(self) -> Any:
        return self._reader.rows(self._index)[0]

    @property
    def values(self) -> Any:
        return self._reader.rows(self._index)[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        cache = self._reader.cache
        return cache.batch, cache.heads, cache.tokens, cache.head_dim


def key_norm_importance(keys: torch.Tensor) -> torch.Tensor:
    """keys (b,h,s,d) -> (b,h,s) float32: one over the key's L2 norm.

    Keys of small norm get the most attention: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression, arXiv 2406.11430.
    """
    norms: torch.Tensor = torch.linalg.vector_norm(keys.float(), dim=-1)
    return norms.clamp(min=1e-6).reciprocal()


def _cell(
    config: ExperimentConfig, cache: StoredCache, packed: Packed | None, *, name: str, seed: int
) -> dict[str, Any]:
    target = config.budget.target_compression_ratio
    case = {
        "model": config.model_name,
        "task": "stored cache",
        "mode": "offline",
        "method": name,
        "target_ratio": target,
        "seed": seed,
        "layers": cache.layers,
        "b": cache.batch,
        "kv_heads": cache.heads,
        "s": cache.tokens,
        "d": cache.head_dim,
    }
    if packed is None:
        error = {"metric": "allocated bytes / byte budget", "value": 1.0, "bound": 1.0}
        whole = {"nbytes": cache.bf16_bytes, "bf16_bytes": cache.bf16_bytes, "ratio": 1.0, "kept_fraction": 1.0}
        return results.cell("transformers DynamicCache", case, error=error, **whole)
    plan = plan_values(packed.report)
    kept = plan["kept_fraction"]
    budget = {
        "metric": "allocated bytes / byte budget",
        "value": packed.nbytes * target / cache.bf16_bytes,
        "bound": 1.0,
    }
    return results.cell(
        "kvcomp",
        case,
        error=budget,
        nbytes=packed.nbytes,
        bf16_bytes=cache.bf16_bytes,
        ratio=packed.ratio,
        ledger=packed.ledger(),
        kept_fraction=kept,
        bits_per_element=8 * packed.nbytes / (cache.bf16_bytes / 2 * kept),
        plan=plan,
        **_errors(cache, packed),
    )


def _errors(cache: StoredCache, packed: Packed) -> dict[str, Any]:
    """Error of K and V, and what became of the attention at hand: how much of it lies on kept tokens, and the relative
    error (L2) of the output that it gives. Layer by layer."""
    sums = ErrorSums()
    covered = whole = square = norm = 0.0
    for index, (keys, values) in enumerate(cache):
        stored_keys, stored_values, kept = stored_rows(packed, index, LayerInput(keys=keys, values=values))
        sums.add(error_sums(keys, values, stored_keys, stored_values, kept))
        if cache.attention is None:
            continue
        attention = cache.attention(index)
        remaining = attention * kept
        covered += float(remaining.sum())
        whole += float(attention.sum())
        exact = _output(attention, values)
        square += float((_output(remaining, stored_values) - exact).square().sum())
        norm += float(exact.square().sum())
    known = whole > 0 and norm > 0
    return {
        **sums.summary(),
        "attention_coverage": covered / whole if known else None,
        "attention_output_error": math.sqrt(square / norm) if known else None,
        "high_precision_fraction": packed.report.high_precision_fraction,
    }


def _output(attention: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values (b,h,s,d) averaged by attention (b,h,s) -> (b,h,d)."""
    weights = attention / attention.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.einsum("bhs,bhsd->bhd", weights, values.float())


def _headline(config: ExperimentConfig, whole: int, held: int) -> dict[str, Any]:
    """The seed's fields. Speeds cannot be measured without a model: a simulation's are those typed into ``metrics``."""
    typed = config.metrics

    def both(figure: str, combine: Any) -> float | None:
        names = f"compressed_{figure}", f"baseline_{figure}"
        return combine(*(typed[name] for name in names)) if all(name in typed for name in names) else None

    return {
        "memory_reduction": 1 - held / whole,
        "original_mb": whole / results.MIB,
        "compressed_mb": held / results.MIB,
        "throughput_gain": both("tps", lambda packed, base: packed / base),
        "ttft_delta_ms": both("ttft_ms", lambda packed, base: packed - base),
        "tpot_delta_ms": both("tpot_ms", lambda packed, base: packed - base),
        "compression_ratio": whole / held,
    }
