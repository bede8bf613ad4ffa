"""What ``kvcomp bench bsr`` measures: sizes, blocks, sparsities, patterns, and which rivals beside."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import _C
from ..bsr import BLOCKS, PATTERNS
from . import bsr_goals, bsr_rivals
from .bsr_goals import Where

SAMPLES_LEAST = 5
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_HALVED = ("causal", "sliding_window")  # patterns that leave a triangle empty
# What the design names: what a GPU measures where nothing else is asked for, in the order of its weight.
_TABLE = tuple((8192, block, 0.78, bsr_goals.UNIFORM) for block in bsr_goals.BLOCKS)
DESIGN: tuple[Where, ...] = (
    *_TABLE,
    (16384, 128, 0.78, bsr_goals.UNIFORM),
    *((8192, block, 0.78, pattern) for block in bsr_goals.BLOCKS for pattern in bsr_goals.LIKE_UNIFORM),
    *((8192, block, sparsity, bsr_goals.UNIFORM) for block in bsr_goals.BLOCKS for sparsity in (0.5, 0.9)),
)
_FEW = ("torch dense", "torch bsr")  # rivals of the design's matrices beside its table: the others take seconds


@dataclass(frozen=True)
class Settings:
    """What to measure; None: the device's own. With no size, sparsity, block and pattern a GPU measures ``DESIGN``."""

    sizes: Sequence[int] | None = None
    sparsity: Sequence[float] | None = None
    blocks: Sequence[int] | None = None
    patterns: Sequence[str] | None = None
    iterations: int | None = None
    device: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    rivals: Sequence[str] | None = None  # names; empty: none
    seed: int = 0
    minutes: float | None = None  # no matrix is begun later than this
    design: bool = False  # set by ``resolved``

    def resolved(self) -> Settings:
        """Everything named; ValueError for what cannot be measured."""
        device = self.device or ("cuda" if _C.cuda_info()["available"] and torch.cuda.is_available() else "cpu")
        gpu = device == "cuda"
        dtype = self.dtype or ("bfloat16" if gpu else "float32")
        made = replace(
            self,
            design=gpu and (self.sizes, self.sparsity, self.blocks, self.patterns) == (None,) * 4,
            sizes=_each(self.sizes if self.sizes is not None else (4096, 8192, 16384) if gpu else (1024, 2048)),
            sparsity=_each(self.sparsity if self.sparsity is not None else (0.5, 0.7, 0.78, 0.9) if gpu else (0.78,)),
            blocks=_each(BLOCKS if self.blocks is None else self.blocks),
            patterns=_each((bsr_goals.UNIFORM,) if self.patterns is None else self.patterns),
            iterations=(100 if gpu else 20) if self.iterations is None else self.iterations,
            device=device,
            dtype=dtype,
            out_dtype=self.out_dtype or dtype,
            rivals=None if self.rivals is None else _each(self.rivals),
        )
        made._check(gpu)
        return made

    def _check(self, gpu: bool) -> None:
        choices: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
            "block-sizes": (self.blocks or (), BLOCKS),
            "patterns": (self.patterns or (), PATTERNS),
            "rivals": (self.rivals or (), tuple(bsr_rivals.of(str(self.device)))),
            "dtype": ([self.dtype], tuple(DTYPES) if not gpu else tuple(DTYPES)[:2]),
            "out-dtype": ([self.out_dtype], tuple(DTYPES)),
            "device": ([self.device], ("cpu", "cuda")),
        }
        for flag, (given, allowed) in choices.items():
            for value in given:
                if value not in allowed:
                    raise ValueError(f"bench: --{flag}: expected among {', '.join(map(str, allowed))}, got {value}")
        for size in self.sizes or ():
            if size < 1 or any(size % block for block in self.blocks or ()):
                raise ValueError(f"bench: --sizes: expected multiples of the block sizes, got {size}")
        for sparsity in self.sparsity or ():
            if not 0 <= sparsity < 1:
                raise ValueError(f"bench: --sparsity: expected fractions of empty blocks in [0, 1), got {sparsity}")
        if not any(True for _ in self.cases()):
            raise ValueError(
                f"bench: --sparsity: expected 0.5 or more for the patterns {', '.join(_HALVED)}, got "
                f"{', '.join(map(str, self.sparsity or ()))}"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"bench: --minutes: expected more than 0, got {self.minutes:g}")
        if (self.iterations or 0) < SAMPLES_LEAST:
            raise ValueError(f"bench: --iterations: expected at least {SAMPLES_LEAST}, got {self.iterations}")
        if gpu and not (_C.cuda_info()["available"] and torch.cuda.is_available()):
            raise NotImplementedError(f"bench: --device: expected a CUDA device, got none: {_C.cuda_info()['why']}")

    def cases(self) -> Iterator[Where]:
        """Size, block, sparsity, pattern; but for those ``without_room``."""
        if self.design:
            return iter(DESIGN)
        return itertools.filterfalse(_is_full, self._products())

    def without_room(self) -> Iterator[Where]:
        """Those whose pattern has no room for so few empty blocks."""
        return filter(_is_full, self._products())

    def _products(self) -> Iterator[Where]:
        return itertools.product(self.sizes or (), self.blocks or (), self.sparsity or (), self.patterns or ())

    def rivals_of(self, where: Where) -> Sequence[str]:
        """What is measured beside kvcomp on a matrix."""
        if self.rivals is not None:
            return self.rivals
        return _FEW if self.design and where not in _TABLE else tuple(bsr_rivals.of(str(self.device)))


def _is_full(case: Where) -> bool:
    return case[3] in _HALVED and case[2] < 0.5


def _each(values: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
