"""Random block-sparse matrices: which blocks are stored follows a pattern and a seed, columns sorted, each once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from . import convert
from .matrix import BSRMatrix
from .structure import Structure, check_block, check_shape, pointers

Array = np.ndarray[Any, Any]
_CLUSTER = 4  # blocks along the side of a cluster
_OUTSIDE = 2.0  # added to the score of a place that the pattern keeps empty; scores inside are below it


def _uniform(grid: tuple[int, int], rng: np.random.Generator) -> Array:
    return rng.random(grid)


def _banded(grid: tuple[int, int], rng: np.random.Generator) -> Array:
    """Around the diagonal, as wide as the sparsity lets it be."""
    distance = np.abs(_behind(grid))
    return np.asarray(distance / max(grid))


def _sliding_window(grid: tuple[int, int], rng: np.random.Generator) -> Array:
    """What a row of a causal window sees: the columns up to the diagonal, the nearest ones."""
    behind = _behind(grid)
    return np.asarray(np.where(behind > -0.5, np.abs(behind) / max(grid), _OUTSIDE))


def _causal(grid: tuple[int, int], rng: np.random.Generator) -> Array:
    """Uniform on and below the diagonal, nothing above it."""
    return np.asarray(np.where(_behind(grid) > -0.5, rng.random(grid), _OUTSIDE))


def _clustered(grid: tuple[int, int], rng: np.random.Generator) -> Array:
    """Square clusters of 4 × 4 blocks on a grid, uniform; the last one may be incomplete."""
    rows, columns = grid
    tiles = (-(-rows // _CLUSTER), -(-columns // _CLUSTER))
    rank = rng.permutation(tiles[0] * tiles[1]).reshape(tiles) / max(tiles[0] * tiles[1], 1)
    return np.asarray(np.kron(rank, np.ones((_CLUSTER, _CLUSTER)))[:rows, :columns])


def _behind(grid: tuple[int, int]) -> Array:
    """How many columns each place lies left of its row's diagonal, which ends in the last corner."""
    rows, columns = grid
    diagonal = (np.arange(rows) + 0.5) * (columns / max(rows, 1)) - 0.5
    return np.asarray(diagonal[:, None] - np.arange(columns))


# Pattern: the places' scores; the lowest are stored.
_SCORES: dict[str, Callable[[tuple[int, int], np.random.Generator], Array]] = {
    "uniform": _uniform,
    "banded": _banded,
    "sliding_window": _sliding_window,
    "causal": _causal,
    "clustered": _clustered,
}
PATTERNS = (*list(_SCORES)[:4], "power_law", "clustered")


def block_mask(grid: tuple[int, int], sparsity: float, pattern: str, seed: int) -> Array:
    """(rows, columns) bool: ``round((1 - sparsity) · rows · columns)`` places of the pattern, the same for a seed.

    ValueError for an unknown pattern, a sparsity outside [0, 1], or one that the pattern has no room for."""
    if pattern not in PATTERNS:
        raise ValueError(f"random_bsr: pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"random_bsr: sparsity: expected a fraction of empty blocks in [0, 1], got {sparsity!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"random_bsr: seed: expected an integer in [0, 2**64), got {seed!r}")
    rng = np.random.default_rng(seed)
    count = round((1 - sparsity) * grid[0] * grid[1])
    if pattern == "power_law":
        return _power_law(grid, count, rng)
    score = _SCORES[pattern](grid, rng).ravel()
    room = int((score < _OUTSIDE).sum())
    if count > room:
        raise ValueError(
            f"random_bsr: sparsity: expected {1 - room / len(score):.3f} or more, as the pattern {pattern} leaves "
            f"{room} of {len(score)} blocks, got {sparsity!r}"
        )
    mask = np.zeros(len(score), bool)
    mask[np.argsort(score, kind="stable")[:count]] = True
    return mask.reshape(grid)


def _power_law(grid: tuple[int, int], count: int, rng: np.random.Generator) -> Array:
    """Rows of lengths as 1/rank, in random order, none longer than the matrix; uniform within a row."""
    rows, columns = grid
    lengths = np.zeros(rows, np.int64)
    weights = 1 / np.arange(1, rows + 1)
    # What does not fit in a row that is full goes to the others, in the same proportions.
    while (left := count - int(lengths.sum())) > 0:
        open_rows = lengths < columns
        share = left * weights * open_rows / (weights * open_rows).sum()
        more = np.minimum(share.astype(np.int64), columns - lengths)
        if not more.any():
            more[np.flatnonzero(open_rows)[:left]] = 1
        lengths += more
    lengths = rng.permutation(lengths)
    rank = rng.random(grid).argsort(1).argsort(1)
    return np.asarray(rank < lengths[:, None])


def random_bsr(
    m: int,
    k: int,
    block_size: int = 64,
    sparsity: float = 0.78,
    *,
    pattern: str = "uniform",
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 0.1,
    index_dtype: torch.dtype = torch.int32,
) -> BSRMatrix:
    """A matrix whose stored blocks hold normal values of standard deviation ``scale``.

    ``sparsity``: the fraction of blocks that are empty. Patterns: ``uniform``; ``banded``, around the diagonal;
    ``sliding_window``, the nearest columns up to the diagonal; ``causal``, uniform up to the diagonal; ``power_law``,
    row lengths as 1/rank; ``clustered``, squares of 4 × 4 blocks. The places depend on shape, pattern and seed alone,
    the values on the device, too."""
    if dtype not in convert.DTYPES:
        raise TypeError(f"random_bsr: dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"random_bsr: scale: expected 0 or more, got {scale!r}")
    structure = random_structure((m, k), block_size, sparsity, pattern, seed, index_dtype).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.empty(structure.count, *[structure.block] * 2, dtype=dtype, device=device)
    values.normal_(0, scale, generator=generator)
    _clear_tails(values, structure)
    return BSRMatrix.of(values, structure)


def random_structure(
    shape: tuple[int, int],
    block_size: int,
    sparsity: float,
    pattern: str,
    seed: int,
    index_dtype: torch.dtype = torch.int32,
) -> Structure:
    """Of ``random_bsr``, on the CPU."""
    block, (m, k) = check_block("random_bsr", block_size), check_shape("random_bsr", shape)
    if index_dtype not in (torch.int32, torch.int64):
        raise TypeError(f"random_bsr: index_dtype: expected int32 or int64, got {index_dtype}")
    rows = -(-m // block)
    row, column = map(torch.from_numpy, block_mask((rows, -(-k // block)), sparsity, pattern, seed).nonzero())
    return Structure(pointers(row, rows, index_dtype), column.to(index_dtype).contiguous(), (m, k), block)


def _clear_tails(values: torch.Tensor, structure: Structure) -> None:
    """Zero where the last blocks reach beyond the matrix."""
    (m, k), (rows, columns), block = structure.shape, structure.grid, structure.block
    if m % block:
        values[structure.rows == rows - 1, m % block :] = 0
    if k % block:
        values[structure.columns == columns - 1, :, k % block :] = 0
