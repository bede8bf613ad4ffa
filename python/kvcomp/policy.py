"""What to keep of a KV cache and in how many bits: a byte budget and, optionally, how tokens are selected.

One method is one small dataclass, with its source in the docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

BITS = (2, 3, 4, 8, 16)
PoolKind = Literal["avg", "max"]
Reduce = Literal["sum", "mean"]


def _fail(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"policy: {argument}: expected {expected}, got {got!r}")


def _check_fraction(argument: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise _fail(argument, "a fraction in (0, 1]", value)


def _check_whole(argument: str, value: object, least: int, expected: str) -> None:
    if not isinstance(value, Integral) or value < least:
        raise _fail(argument, expected, value)


def _check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise _fail(argument, " or ".join(choices), value)


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every token is a candidate; the byte budget alone decides."""

    window: int = 32  # queries that importance is measured with
    pool: int = 1
    pool_kind: PoolKind = "avg"
    reduce: Reduce = "mean"
    keep: float | None = None

    def __post_init__(self) -> None:
        _check_whole("select.window", self.window, 1, "1 or more queries")
        _check_whole("select.pool", self.pool, 1, "a width of 1 or more")
        _check_choice("select.pool_kind", self.pool_kind, ("avg", "max"))
        _check_choice("select.reduce", self.reduce, ("sum", "mean"))
        _check_fraction("select.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """The first tokens (``Policy.sinks``) and the newest ones.

    Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    keep: float | None = None  # of the tokens; None: as many as the budget holds

    def __post_init__(self) -> None:
        _check_fraction("select.keep", self.keep)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Full):
    """The tokens that the prompt's last ``window`` queries attend to most, pooled along the sequence, per KV head.

    Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469.
    """

    pool: int = 5


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
            raise _fail("select.keep", "a fraction to share out over the layers", None)
        if not self.beta >= 1:
            raise _fail("select.beta", "1 or more", self.beta)


@dataclass(frozen=True, kw_only=True)
class LayerRatio:
    """Tokens kept in one layer of the model that the ratios were made for."""

    layer_index: int
    retain_ratio: float
    priority: float = 1.0

    def __post_init__(self) -> None:
        _check_whole("layer_index", self.layer_index, 0, "0 or more")
        _check_fraction("retain_ratio", self.retain_ratio)
        if not self.priority > 0:
            raise _fail("priority", "a positive weight", self.priority)


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
            raise _fail("select.keep", "a fraction to share out over the layers", None)
        _check_whole("select.min_tokens", self.min_tokens, 0, "0 or more")
        _check_choice("select.base", self.base, ("pyramid", "snap"))
        if not self.beta >= 1:
            raise _fail("select.beta", "1 or more", self.beta)
        indices = [ratio.layer_index for ratio in self.layer_ratios]
        if sorted(set(indices)) != indices:
            raise _fail("select.layer_ratios", "rising layer indices, each once", indices)
        if self.layer_ratios and (self.model_layers is None or self.model_layers <= indices[-1]):
            raise _fail("select.model_layers", f"the ratios' depth, more than {indices[-1]}", self.model_layers)


Selector = Full | Streaming | SnapKV | PyramidKV | Hybrid


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a cache is compressed.

    Exactly one budget:
        bits: every token at this many bits (2, 3, 4, 8, 16); or k_bits and v_bits apart. Tokens on pages that are not
            full yet stay at 16 bits.
        target_ratio: bytes of the bf16 cache of all real prompt tokens over ``cache.nbytes`` at the end of prefill.
        fraction: the same as a fraction of the bf16 bytes.
        budget_bytes: the same in bytes.

    Others:
        select: which tokens may be kept; None: all of them, the budget decides by measured importance.
        sinks, window: first and newest tokens that stay at 16 bits (inside the budget). A byte budget with nothing
            selected keeps a window of 16 where none is given.
        rotation: "hadamard" (Gaussian-like rows, the default) or "none".
        group: channels that share a scale: a divisor of head_dim and a multiple of 16; None: head_dim.
        seed: of stochastic rounding.
        scale: how steps are fitted: "sigma", "minmax", "search"; zero_point: False drops it (symmetric codes).
        stochastic: stochastic rounding (Philox, seeded); the default rounds to nearest.
        classes: (k_bits, v_bits) that a budget may use for tokens besides 16 bits; None: all of 2, 3, 4, 8.
        guard: largest fraction of a list's kept tokens that a budget may leave at 16 bits; None: no limit.
        importance_temperature: importance is raised to 1 / (2 * temperature) before planning; smaller is sharper. At 1,
            the square root: what the prompt's last queries attend to foretells later ones only roughly.
        calibration_tokens: tokens per KV head from which the distortion at each number of bits is measured.
    """

    bits: int | None = None
    k_bits: int | None = None
    v_bits: int | None = None
    target_ratio: float | None = None
    fraction: float | None = None
    budget_bytes: int | None = None
    select: Selector | None = None
    sinks: int = 0
    window: int = 0
    rotation: Literal["hadamard", "none"] = "hadamard"
    group: int | None = None
    seed: int = 0
    scale: Literal["sigma", "minmax", "search"] = "sigma"
    zero_point: bool = True
    stochastic: bool = False
    classes: Sequence[tuple[int, int]] | None = None
    guard: float | None = None
    importance_temperature: float = 1.0
    calibration_tokens: int = 256

    def __post_init__(self) -> None:
        split = self.k_bits is not None or self.v_bits is not None
        budgets = {
            "bits": self.bits is not None,
            "k_bits and v_bits": split,
            "target_ratio": self.target_ratio is not None,
            "fraction": self.fraction is not None,
            "budget_bytes": self.budget_bytes is not None,
        }
        given = [name for name, there in budgets.items() if there]
        if len(given) != 1:
            raise _fail("budget", f"exactly one of {', '.join(budgets)}", given or None)
        if split and (self.k_bits is None or self.v_bits is None):
            raise _fail("k_bits, v_bits", "both", (self.k_bits, self.v_bits))
        for name in ("bits", "k_bits", "v_bits"):
            value = getattr(self, name)
            if value is not None and value not in BITS:
                raise _fail(name, "2, 3, 4, 8 or 16", value)
        if self.target_ratio is not None and not self.target_ratio >= 1:
            raise _fail("target_ratio", "1 or more", self.target_ratio)
        _check_fraction("fraction", self.fraction)
        if self.budget_bytes is not None:
            _check_whole("budget_bytes", self.budget_bytes, 1, "1 or more bytes")
        for name in ("sinks", "window", "seed"):
            _check_whole(name, getattr(self, name), 0, "0 or more")
        _check_choice("rotation", self.rotation, ("hadamard", "none"))
        _check_choice("scale", self.scale, ("sigma", "minmax", "search"))
        if self.group is not None and (self.group < 16 or self.group % 16):
            raise _fail("group", "a multiple of 16", self.group)
        for pair in self.classes or ():
            if len(pair) != 2 or any(bits not in BITS for bits in pair):
                raise _fail("classes", "pairs of 2, 3, 4, 8 or 16 bits", pair)
        if self.guard is not None and not 0 <= self.guard <= 1:
            raise _fail("guard", "a fraction in [0, 1]", self.guard)
        if not self.importance_temperature > 0:
            raise _fail("importance_temperature", "a positive number", self.importance_temperature)
        _check_whole("calibration_tokens", self.calibration_tokens, 16, "16 or more")
        if self.fixed_class is not None:
            for name in ("guard", "classes"):
                if getattr(self, name) is not None:
                    raise _fail(name, "a byte budget beside it (fixed bits leave nothing to plan)", getattr(self, name))

    @property
    def fixed_class(self) -> tuple[int, int] | None:
        """(k_bits, v_bits) of a policy of fixed bits; None where a byte budget decides."""
        if self.bits is not None:
            return self.bits, self.bits
        if self.k_bits is not None and self.v_bits is not None:
            return self.k_bits, self.v_bits
        return None

    @property
    def scoring_window(self) -> int:
        """Queries of the prompt's end that importance is measured with; 0: none are needed."""
        if isinstance(self.select, Streaming):
            return 0
        if self.select is None:
            return 0 if self.fixed_class is not None else AUTOMATIC.window
        if self.fixed_class is not None and self.select.keep is None:
            return 0
        return self.select.window

    @property
    def kept_window(self) -> int:
        """Newest tokens that stay at 16 bits."""
        return 16 if self.window == 0 and self.select is None and self.fixed_class is None else self.window

    def budget(self, bf16_bytes: int) -> int:
        """Bytes allowed, given the bytes of the uncompressed bf16 cache; -1: no limit."""
        if self.target_ratio is not None:
            return int(bf16_bytes / self.target_ratio)
        if self.fraction is not None:
            return int(bf16_bytes * self.fraction)
        return -1 if self.budget_bytes is None else self.budget_bytes

    @staticmethod
    def load(path: str | Path, **sizes: Any) -> Policy:
        """The policy of an experiment's YAML file (keys: README, "Experiment files").

        ``sizes``: ``prompt_tokens``, to which the file's windows scale (default: its ``max_sequence_length``).
        """
        from .experiment.config import load_policy

        return load_policy(path, **sizes)
