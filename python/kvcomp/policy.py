"""What to keep of a KV cache and in how many bits: a byte budget and, optionally, how tokens are selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .rotation import Rotation
from .selectors import (
    AUTOMATIC,
    H2O,
    AdaKV,
    KeyNorm,
    Random,
    Selector,
    Streaming,
    check_choice,
    check_fraction,
    check_whole,
)
from .selectors import fail as _fail

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

BITS = (2, 3, 4, 8, 16)
_ALL = 1 << 30  # queries: as many as the prompt has
_MOST = {"sinks": 2**31 - 1, "window": 1 << 24, "seed": 2**63 - 1}  # csrc/kvcomp/append.h, pack.h
_PLANNED = (
    *("guard", "classes", "allocate", "granularity", "decode", "drop"),
    *("importance_temperature", "calibration_tokens"),
)
_CHOICES = {
    "scale": ("sigma", "minmax", "search"),
    "scale_dtype": ("fp16", "e5m3"),
    "allocate": ("plan", "uniform", "random", "position"),
    "granularity": ("run", "head", "layer"),
    "prefill": ("joint", "layerwise"),
    "decode": ("grow", "hold"),
}


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
        rotation: "hadamard" (Gaussian-like rows, the default), "none", or a Rotation: orthogonal matrices of your own.
        group: channels that share a scale: a divisor of head_dim and a multiple of 16; None: head_dim.
        seed: of stochastic rounding.
        scale: how steps are fitted: "sigma", "minmax", "search"; zero_point: False drops it (symmetric codes).
        scale_dtype: of stored steps: "fp16", or "e5m3" (8 bits; zeros as eighths of the step), half the bytes.
        stochastic: stochastic rounding (Philox, seeded); the default rounds to nearest.
        classes: (k_bits, v_bits) that a budget may use for tokens besides 16 bits; None: all of 2, 3, 4, 8.
        guard: largest fraction of a list's kept tokens that a budget may leave at 16 bits; None: no limit.
        importance_temperature: importance is raised to 1 / (2 * temperature) before planning; smaller is sharper. At 1,
            the square root: what the prompt's last queries attend to foretells later ones only roughly.
        calibration_tokens: tokens per KV head from which the distortion at each number of bits is measured.
        drop: False: a byte budget lowers bits, and drops none of the selected tokens (decode="hold" may, later).
        allocate: how a byte budget is spent: "plan" (by measured error per byte); "uniform" (one class for all tokens,
            the richest of which as many tokens as possible fit; the selector shares them out); for comparisons "random"
            and "position" (the plan, told random importance, or that newer is more important).
        granularity: what has a number of bits of its own: a "run" of 64 tokens of equal rank, a KV "head", or a
            "layer". The latter two drop none of the selected tokens (decode="hold" may, later).
        prefill: "joint" compresses all layers together at the prompt's end, under one plan; "layerwise" compresses a
            layer as soon as it is done, in its share of the bytes, so that no more than one layer is ever uncompressed.
        layer_weights: shares of the layers with "layerwise" (None: equal, or as the selector shares tokens out, by its
            priorities too).
        decode: "grow": new tokens add bytes, at the bits that the plan gave their rank when they leave the 16-bit
            window; "hold": the byte budget is held for good, by evicting the least important and lowering bits.
        decay: of a page's importance from one observation (16 queries) to the next, with decode="hold".
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
    rotation: Literal["hadamard", "none"] | Rotation = "hadamard"
    group: int | None = None
    seed: int = 0
    scale: Literal["sigma", "minmax", "search"] = "sigma"
    scale_dtype: Literal["fp16", "e5m3"] = "fp16"
    zero_point: bool = True
    stochastic: bool = False
    classes: Sequence[tuple[int, int]] | None = None
    guard: float | None = None
    importance_temperature: float = 1.0
    calibration_tokens: int = 256
    drop: bool = True
    allocate: Literal["plan", "uniform", "random", "position"] = "plan"
    granularity: Literal["run", "head", "layer"] = "run"
    prefill: Literal["joint", "layerwise"] = "joint"
    layer_weights: Sequence[float] | None = None
    decode: Literal["grow", "hold"] = "grow"
    decay: float = 0.8

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
        check_fraction("fraction", self.fraction)
        if self.budget_bytes is not None:
            check_whole("budget_bytes", self.budget_bytes, 1, "1 or more bytes")
        for name, most in _MOST.items():
            value = getattr(self, name)
            check_whole(name, value, 0, "0 or more")
            if value > most:
                raise _fail(name, f"at most {most}", value)
        if self.select is not None and not isinstance(self.select, Selector):
            raise _fail("select", "a selector or None", self.select)
        if not isinstance(self.rotation, Rotation):
            check_choice("rotation", self.rotation, ("hadamard", "none"))
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.group is not None and (self.group < 16 or self.group % 16):
            raise _fail("group", "a multiple of 16", self.group)
        for pair in self.classes or ():
            if len(pair) != 2 or any(bits not in BITS for bits in pair):
                raise _fail("classes", "pairs of 2, 3, 4, 8 or 16 bits", pair)
        if self.guard is not None and not 0 <= self.guard <= 1:
            raise _fail("guard", "a fraction in [0, 1]", self.guard)
        if not self.importance_temperature > 0:
            raise _fail("importance_temperature", "a positive number", self.importance_temperature)
        check_whole("calibration_tokens", self.calibration_tokens, 16, "16 or more")
        if not 0 <= self.decay < 1:
            raise _fail("decay", "a factor in [0, 1)", self.decay)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """What one argument asks for and another one rules out."""
        if self.fixed_class is not None:
            for name in _PLANNED:
                value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                if value != default:
                    raise _fail(name, "a byte budget beside it (fixed bits leave nothing to plan)", value)
            if self.select is not None and self.select.keep is None:
                raise _fail("select.keep", "a fraction with fixed bits, beside which nothing else limits tokens", None)
        if self.decode != "hold" and self.decay != type(self).__dataclass_fields__["decay"].default:
            raise _fail("decay", "decode='hold' beside it (elsewhere nothing is evicted)", self.decay)
        if self.decode == "hold" and self.classes is not None and all(min(pair) == 16 for pair in self.classes):
            raise _fail("classes", "one of fewer than 16 bits with decode='hold' (16-bit tokens stay)", self.classes)
        if self.allocate == "uniform":
            for name in ("granularity", "guard", "drop"):
                value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                if value != default:
                    raise _fail(name, "the default with allocate='uniform', which has one class for all", value)
            if self.decode != "hold" and self.importance_temperature != 1:
                expected = "1 with allocate='uniform', which weighs no errors"
                raise _fail("importance_temperature", expected, self.importance_temperature)
        elif self.fixed_class is None and isinstance(self.select, AdaKV) and self.select.keep is None:
            raise _fail("select.keep", "a fraction with AdaKV, as the plan shares tokens among heads by itself", None)
        if self.layer_weights is not None:
            if self.prefill != "layerwise" or self.fixed_class is not None:
                raise _fail("layer_weights", "a byte budget and prefill='layerwise' beside it", self.layer_weights)
            try:
                weights = [float(weight) for weight in self.layer_weights]
            except (TypeError, ValueError):
                weights = []
            if not weights or not all(0 < weight < float("inf") for weight in weights):
                raise _fail("layer_weights", "a positive number for every layer", self.layer_weights)

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
        """Queries of the prompt's end, at most, that importance is measured with; 0: none are needed."""
        if isinstance(self.select, Streaming | KeyNorm | Random):
            return 0
        if self.fixed_class is not None and (self.select is None or self.select.keep is None):
            return 0
        if self.select is None:
            return AUTOMATIC.window
        return _ALL if isinstance(self.select, H2O) else self.select.window

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
