"""Selectors: which tokens of a prompt may be kept, and what importance is measured with.

One method is one small dataclass, with its source in the docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

PoolKind = Literal["avg", "max"]
Reduce = Literal["sum", "mean"]
Values = Literal["none", "norm", "centered"]
VALUES = ("none", "norm", "centered")


def fail(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"policy: {argument}: expected {expected}, got {' '.join(repr(got).split())}")


def check_fraction(argument: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise fail(argument, "a fraction in (0, 1]", value)


def check_whole(argument: str, value: object, least: int, expected: str) -> None:
    if not isinstance(value, Integral) or value < least:
        raise fail(argument, expected, value)


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise fail(argument, " or ".join(choices), value)


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every token is a candidate; the byte budget alone decides."""

    window: int = 32  # queries that importance is measured with
    pool: int = 1
    pool_kind: PoolKind = "avg"
    reduce: Reduce = "mean"
    keep: float | None = None
    values: Values = "none"  # importance times the norm of the token's value: as it is, or less the values' mean

    def __post_init__(self) -> None:
        check_whole("select.window", self.window, 1, "1 or more queries")
        check_whole("select.pool", self.pool, 1, "a width of 1 or more")
        check_choice("select.pool_kind", self.pool_kind, ("avg", "max"))
        check_choice("select.reduce", self.reduce, ("sum", "mean"))
        check_choice("select.values", self.values, VALUES)
        check_fraction("select.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """The first tokens (``Policy.sinks``) and the newest ones.

    Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    keep: float | None = None  # of the tokens; None: as many as the budget holds

    def __post_init__(self) -> None:
        check_fraction("select.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Full):
    """The tokens that the prompt's last ``window`` queries attend to most, pooled along the sequence, per KV head.

    Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469.
    """

    pool: int = 5


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV's scores; the heads of a layer share its tokens, every head keeping at least ``safeguard`` of the mean.

    Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, arXiv 2407.11550.
    """

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise fail("select.safeguard", "a fraction in [0, 1]", self.safeguard)


@dataclass(frozen=True, kw_only=True)
class H2O:
    """The tokens that gathered most attention from all of the prompt's queries, per query that sees them.

    Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs, arXiv 2306.14048.
    """

    pool: int = 1
    pool_kind: PoolKind = "avg"
    keep: float | None = None
    values: Values = "none"

    def __post_init__(self) -> None:
        check_whole("select.pool", self.pool, 1, "a width of 1 or more")
        check_choice("select.pool_kind", self.pool_kind, ("avg", "max"))
        check_choice("select.values", self.values, VALUES)
        check_fraction("select.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class KeyNorm:
    """The tokens whose keys have the smallest L2 norm: they get the most attention. Needs no queries.

    Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430.
    """

    keep: float | None = None
    values: Values = "none"

    def __post_init__(self) -> None:
        check_choice("select.values", self.values, VALUES)
        check_fraction("select.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class Random:
    """Tokens at random (``Policy.seed``): what every other selector must beat."""

    keep: float | None = None

    def __post_init__(self) -> None:
        check_fraction("select.keep", self.keep)


# What a byte budget measures importance with where nothing is selected. The wide pool keeps a needle's neighbours with
# it: on tiny-base at 12x, questions that come after compression are answered nearly as by the uncompressed model.
AUTOMATIC = SnapKV(pool=15)


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV's scores with budgets that fall from layer to layer; what clipping frees goes to the other layers.

    Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv 2406.02069.
    """

    keep: float | None = 0.25
    beta: float = 20.0  # the last layer's share is 1/beta of the mean

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None:
            raise fail("select.keep", "a fraction to share out over the layers", None)
        if not 1 <= self.beta < float("inf"):
            raise fail("select.beta", "1 or more", self.beta)


@dataclass(frozen=True, kw_only=True)
class LayerRatio:
    """Tokens kept in one layer of the model that the ratios were made for."""

    layer_index: int
    retain_ratio: float
    priority: float = 1.0

    def __post_init__(self) -> None:
        check_whole("layer_index", self.layer_index, 0, "0 or more")
        check_fraction("retain_ratio", self.retain_ratio)
        if not 0 < self.priority < float("inf"):
            raise fail("priority", "a positive weight", self.priority)


@dataclass(frozen=True, kw_only=True)
class Hybrid(SnapKV):
    """Scores of SnapKV, budgets per layer, sinks and a recent window, all inside the budget.

    Per-layer ratios are interpolated between the listed layers of a model of ``model_layers`` layers; without a list,
    ``base="pyramid"`` shares ``keep`` out as PyramidKV does and ``base="snap"`` gives every layer the same.
    Source: the hybrid selector of akchaud5/KV-cache-paper, with its budget conserved.
    """

    keep: float | None = 0.25
    base: Literal["pyramid", "snap"] = "pyramid"
    beta: float = 20.0
    layer_ratios: tuple[LayerRatio, ...] = ()
    model_layers: int | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None:
            raise fail("select.keep", "a fraction to share out over the layers", None)
        check_whole("select.min_tokens", self.min_tokens, 0, "0 or more")
        check_choice("select.base", self.base, ("pyramid", "snap"))
        if not 1 <= self.beta < float("inf"):
            raise fail("select.beta", "1 or more", self.beta)
        indices = [ratio.layer_index for ratio in self.layer_ratios]
        if sorted(set(indices)) != indices:
            raise fail("select.layer_ratios", "rising layer indices, each once", indices)
        if self.layer_ratios and (self.model_layers is None or self.model_layers <= indices[-1]):
            raise fail("select.model_layers", f"the ratios' depth, more than {indices[-1]}", self.model_layers)


Selector = Full | Streaming | SnapKV | PyramidKV | Hybrid | AdaKV | H2O | KeyNorm | Random
