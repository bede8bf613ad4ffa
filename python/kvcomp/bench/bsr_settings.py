"""What ``kvcomp bench bsr`` measures: sizes, blocks, sparsities, patterns, and what the design asks of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import _C
from ..bsr import BLOCKS, PATTERNS
from . import bsr_rivals

SAMPLES_LEAST = 5
Where = tuple[int, int, float, str]  # size, block, sparsity, pattern
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_HALVED = ("causal", "sliding_window")  # patterns that leave a triangle empty
# What the design asks of an H200.
TARGETS: dict[Where, dict[str, float]] = {
    (8192, 128, 0.78, "uniform"): {"target_tflops": 650.0, "target_speedup": 3.7},
    (8192, 64, 0.78, "uniform"): {"target_tflops": 380.0},
    (8192, 32, 0.78, "uniform"): {"target_tflops": 190.0, "target_speedup": 1.0},
    (8192, 16, 0.78, "uniform"): {"target_speedup": 0.97},
    (16384, 128, 0.78, "uniform"): {"target_fraction_of_dense": 0.9},
    (8192, 128, 0.5, "uniform"): {"target_speedup": 1.0},
    (8192, 64, 0.5, "uniform"): {"target_speedup": 1.0},
}


@dataclass(frozen=True)
class Settings:
    """What to measure; None: the device's own."""

    sizes: Sequence[int] | None = None
    sparsity: Sequence[float] | None = None
    blocks: Sequence[int] = BLOCKS
    patterns: Sequence[str] = ("uniform",)
    iterations: int | None = None
    device: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    rivals: Sequence[str] | None = None  # names; empty: none
    seed: int = 0

    def resolved(self) -> Settings:
        """Everything named; ValueError for what cannot be measured."""
        device = self.device or ("cuda" if _C.cuda_info()["available"] and torch.cuda.is_available() else "cpu")
        gpu = device == "cuda"
        dtype = self.dtype or ("bfloat16" if gpu else "float32")
        made = replace(
            self,
            sizes=_each(self.sizes if self.sizes is not None else (4096, 8192, 16384) if gpu else (1024, 2048)),
            sparsity=_each(self.sparsity if self.sparsity is not None else (0.5, 0.7, 0.78, 0.9) if gpu else (0.78,)),
            blocks=_each(self.blocks),
            patterns=_each(self.patterns),
            iterations=(100 if gpu else 20) if self.iterations is None else self.iterations,
            device=device,
            dtype=dtype,
            out_dtype=self.out_dtype or dtype,
            rivals=_each(self.rivals if self.rivals is not None else bsr_rivals.of(device)),
        )
        made._check(gpu)
        return made

    def _check(self, gpu: bool) -> None:
        choices: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
            "block-sizes": (self.blocks, BLOCKS),
            "patterns": (self.patterns, PATTERNS),
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
            if size < 1 or any(size % block for block in self.blocks):
                raise ValueError(f"bench: --sizes: expected multiples of the block sizes, got {size}")
        for sparsity in self.sparsity or ():
            if not 0 <= sparsity < 1:
                raise ValueError(f"bench: --sparsity: expected fractions of empty blocks in [0, 1), got {sparsity}")
        if not any(True for _ in self.cases()):
            raise ValueError(
                f"bench: --sparsity: expected 0.5 or more for the patterns {', '.join(_HALVED)}, got "
                f"{', '.join(map(str, self.sparsity or ()))}"
            )
        if (self.iterations or 0) < SAMPLES_LEAST:
            raise ValueError(f"bench: --iterations: expected at least {SAMPLES_LEAST}, got {self.iterations}")
        if gpu and not (_C.cuda_info()["available"] and torch.cuda.is_available()):
            raise NotImplementedError(f"bench: --device: expected a CUDA device, got none: {_C.cuda_info()['why']}")

    def cases(self) -> Iterator[Where]:
        """Size, block, sparsity, pattern; but for those ``without_room``."""
        return itertools.filterfalse(_is_full, self._products())

    def without_room(self) -> Iterator[Where]:
        """Those whose pattern has no room for so few empty blocks."""
        return filter(_is_full, self._products())

    def _products(self) -> Iterator[Where]:
        return itertools.product(self.sizes or (), self.blocks, self.sparsity or (), self.patterns)


def _is_full(case: Where) -> bool:
    return case[3] in _HALVED and case[2] < 0.5


def _each(values: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
