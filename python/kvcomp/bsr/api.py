"""One-call functions around ``BSRMatrix``: multiply, convert, say whether a matrix is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import breakeven, convert
from .matrix import BSRMatrix
from .multiply import Method, matmul
from .structure import BLOCKS, check_block, check_shape
from .tune import tune

# Sides up to which a matrix whose elements are not known gets blocks of 32 and of 64.
_SMALL, _MEDIUM = 2048, 8192
_TOLERANCE = 0.05  # of an expected sparsity
_RATINGS = ((0.5, "dense"), (0.7, "good"), (0.9, "optimal"))  # below these; above the last: very_sparse


def as_bsr(op: str, matrix: Any, block_size: int | None = None) -> BSRMatrix:
    """A BSRMatrix of what it is: itself, a torch tensor of any layout, a sparse matrix of scipy, an array.

    ``block_size``: None for that of the blocks it has, or ``get_optimal_block_size`` of the matrix. Blocks of another
    size are made without those that hold zeros alone."""
    if isinstance(matrix, BSRMatrix):
        side, block = matrix.block_size, check_block(op, matrix.block_size if block_size is None else block_size)
        if block > side:
            merged = matrix.structure.merged(block // side)
            return BSRMatrix.of(merged.values(matrix.values), merged.structure)
        return matrix if block == side else BSRMatrix.of(*convert.split(matrix.values, matrix.structure, block))
    of: Any = BSRMatrix.from_scipy
    if not convert.is_scipy(matrix):
        of, matrix = BSRMatrix.from_torch, convert.as_tensor(op, "matrix", matrix)
    sides = _sides(matrix)
    if block_size is None and (sides is None or sides[0] != sides[1] or sides[0] not in BLOCKS):
        block_size = get_optimal_block_size(matrix)
    made: BSRMatrix = of(matrix, block_size)
    if sides == (made.block_size,) * 2 or (isinstance(matrix, torch.Tensor) and matrix.layout == torch.strided):
        return made
    return BSRMatrix.of(*convert.split(made.values, made.structure, made.block_size))


def _sides(matrix: Any) -> tuple[int, ...] | None:
    """Of the blocks that a BSR matrix of torch or scipy has."""
    if isinstance(matrix, torch.Tensor):
        return tuple(matrix.values().shape[1:]) if matrix.layout == torch.sparse_bsr else None
    return tuple(matrix.blocksize) if matrix.format == "bsr" else None


def sparse_mm(
    a: Any,
    b: torch.Tensor,
    *,
    block_size: int | None = None,
    out_dtype: torch.dtype | None = None,
    method: Method = "auto",
    autotune: bool = False,
) -> torch.Tensor:
    """A·B of a sparse A of any form and a dense B (k, n).

    A that is no BSRMatrix is converted in every call, to B's dtype and device: convert it once for more products.
    ``autotune``: the ways are measured first (``tune``), which a BSRMatrix remembers."""
    matrix = as_bsr("sparse_mm", a, block_size)
    if isinstance(b, torch.Tensor) and not isinstance(a, BSRMatrix):
        matrix = matrix.to(b.device, b.dtype)
    if autotune:
        tune(matrix, b)
    return matmul(matrix, b, out_dtype=out_dtype, method=method)


def convert_to_bsr(matrix: Any, block_size: int = 16, sparsity_threshold: float = 0.5) -> BSRMatrix:
    """A matrix of any form in blocks; ValueError where fewer than ``sparsity_threshold`` of its blocks are empty, as
    a matrix whose zeros do not lie together gains nothing from blocks (0 takes any)."""
    if not 0 <= sparsity_threshold <= 1:
        raise ValueError(
            f"convert_to_bsr: sparsity_threshold: expected a fraction in [0, 1], got {sparsity_threshold!r}"
        )
    made = as_bsr("convert_to_bsr", matrix, check_block("convert_to_bsr", block_size))
    if made.sparsity < sparsity_threshold:
        raise ValueError(
            f"convert_to_bsr: matrix: expected {sparsity_threshold:.1%} of its blocks of {block_size} empty, got "
            f"{made.sparsity:.1%}"
        )
    return made


def get_optimal_block_size(
    matrix: Any, *, n: int | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> int:
    """Of a matrix: the block size whose product with n columns (default: as many as its own) is expected to be the
    fastest on the device. Of a shape alone: 32 up to a side of 2048, 64 up to 8192, else 128."""
    if isinstance(matrix, Sequence):
        least = min(check_shape("get_optimal_block_size", matrix))
        return 32 if least <= _SMALL else 64 if least <= _MEDIUM else 128
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
        raise ValueError(f"get_optimal_block_size: n: expected 0 or more columns, got {n!r}")
    there = None if device is None else breakeven.usable("get_optimal_block_size", device)
    whole = _smallest("get_optimal_block_size", matrix)
    kind = whole.dtype if dtype is None else dtype
    rates = breakeven.rates_of(there or whole.device, kind)
    columns = whole.shape[1] if n is None else n
    times = {}
    for block in BLOCKS:
        if block >= whole.block_size:
            structure = whole.structure.in_blocks_of(block)
            facts = (structure.shape, block, structure.count, structure.plan(False).steps)
            times[block] = breakeven.sparse_us(rates, *facts, columns, kind.itemsize)
    # Of equals the larger: fewer indices.
    return min(times, key=lambda block: (times[block], -block))


def _smallest(op: str, matrix: Any) -> BSRMatrix:
    """In the smallest blocks that may hold it: its own, or 16."""
    return matrix if isinstance(matrix, BSRMatrix) else as_bsr(op, matrix, BLOCKS[0])


def validate_sparse_matrix(
    matrix: Any, expected_sparsity: float | None = None, min_sparsity: float = 0.5
) -> tuple[bool, dict[str, Any]]:
    """Whether blocks pay, and facts: (ok, info).

    info: shape; nnz, elements that are not zero; sparsity, of elements; block_sparsity, {block size: empty blocks};
    block_size, the one to take; performance_rating, by the empty blocks of that size: dense below 50 %, good below 70,
    optimal up to 90, very_sparse; message and recommendation, a sentence each. ok: at least ``min_sparsity`` of those
    blocks are empty and, where it is given, the elements' sparsity is within 5 % of ``expected_sparsity``."""
    for name, value in (("expected_sparsity", expected_sparsity), ("min_sparsity", min_sparsity)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"validate_sparse_matrix: {name}: expected a fraction in [0, 1], got {value!r}")
    whole = _smallest("validate_sparse_matrix", matrix)
    m, k = whole.shape
    nnz = int(torch.count_nonzero(whole.values))
    sparsity = 1 - nnz / (m * k) if m * k else 0.0
    structure = whole.structure
    empty = {block: 1 - structure.in_blocks_of(block).density for block in BLOCKS if block >= structure.block}
    best = get_optimal_block_size(whole)
    rating = next((name for bound, name in _RATINGS if empty[best] < bound), "very_sparse")
    found = f"{empty[best]:.1%} of its blocks of {best} empty ({sparsity:.1%} of its elements zero)"
    message, ok = f"the matrix has {found}", empty[best] >= min_sparsity
    if not ok:
        message = f"validate_sparse_matrix: matrix: expected at least {min_sparsity:.1%} empty blocks, got {found}"
    elif expected_sparsity is not None and abs(sparsity - expected_sparsity) > _TOLERANCE:
        ok = False
        message = (
            f"validate_sparse_matrix: matrix: expected {expected_sparsity:.1%} of its elements zero, got {sparsity:.1%}"
        )
    if empty[best] >= 0.5:
        recommendation = f"take blocks of {best}"
    elif sparsity >= 0.5:
        recommendation = "multiply it dense, or move its zeros together: they are spread over nearly all blocks"
    else:
        recommendation = "multiply it dense"
    return ok, {
        "shape": (m, k),
        "nnz": nnz,
        "sparsity": sparsity,
        "block_sparsity": empty,
        "block_size": best,
        "performance_rating": rating,
        "message": message,
        "recommendation": recommendation,
    }
