"""Block-sparse matrices for tests: structures, what they are as dense matrices, how wrong a product may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from kvcomp import _C

Array = np.ndarray[Any, np.dtype[Any]]
BLOCKS = (16, 32, 64, 128)


@dataclass
class Structure:
    m: int
    k: int
    block: int
    indptr: Array
    indices: Array

    @property
    def rows(self) -> int:
        return -(-self.m // self.block)

    @property
    def columns(self) -> int:
        return -(-self.k // self.block)

    @property
    def nnzb(self) -> int:
        return len(self.indices)


def random_structure(m: int, k: int, block: int, density: float, seed: int, dtype: str = "int32") -> Structure:
    mask = np.random.default_rng(seed).random((-(-m // block), -(-k // block))) < density
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))])
    return Structure(m, k, block, indptr.astype(dtype), np.nonzero(mask)[1].astype(dtype))


def places(s: Structure) -> list[tuple[int, int]]:
    rows = np.repeat(np.arange(s.rows), np.diff(s.indptr))
    return list(zip(rows.tolist(), s.indices.tolist(), strict=True))


def dense_of(s: Structure, values: Array) -> Array:
    full = np.zeros((s.rows, s.columns, s.block, s.block), values.dtype)
    for i, (r, c) in enumerate(places(s)):
        full[r, c] = values[i]
    whole = full.transpose(0, 2, 1, 3).reshape(s.rows * s.block, s.columns * s.block)
    return np.ascontiguousarray(whole[: s.m, : s.k])


def plan_of(s: Structure, transpose: int) -> Array:
    plan = np.empty(_C.bsr_plan_words(s.m, s.k, s.block, s.nnzb, transpose), np.int32)
    return plan[: _C.bsr_plan(plan, s.indptr, s.indices, s.m, s.k, s.block, transpose)].copy()


def rounding(exact: Array, dtype: str) -> Array:
    """The most that rounding to a type, nearest even, takes away."""
    step, tiny = {"float32": (2.0**-24, 2.0**-150), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}[
        dtype
    ]
    return np.maximum(abs(exact) * step, tiny) * 1.01


def bound(a: Array, dense: Array, out_dtype: str) -> Array:
    """Of |product - exact|: fp32 sums of exact products, rounded to out's type."""
    limit: Array = (abs(a) @ abs(dense)) * 2e-6 + rounding(a @ dense, out_dtype)
    return limit
