"""Between stored blocks and other forms of a matrix: dense, compressed rows (CSR), blocks of scipy and torch.

All on tensors, on any device; nothing is made dense on the way from CSR.
"""

from __future__ import annotations

from typing import Any

import torch

from .structure import Structure, pointers, said

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Indices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def check_values(op: str, name: str, values: Any) -> torch.Tensor:
    """TypeError for anything but a dense tensor of floating point that the package stores."""
    if not isinstance(values, torch.Tensor) or values.layout != torch.strided or values.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{op}: {name}: expected a dense tensor of {kinds}, got {said(values)}")
    return values


def as_tensor(op: str, name: str, matrix: Any) -> torch.Tensor:
    """A tensor of two dimensions over an array's or a tensor's memory."""
    try:
        tensor = torch.as_tensor(matrix)
    except (TypeError, ValueError, RuntimeError) as reason:
        raise TypeError(f"{op}: {name}: expected a tensor or an array of numbers, got {said(matrix)}") from reason
    if tensor.ndim != 2:
        raise ValueError(f"{op}: {name}: expected two dimensions, got {said(tensor)}")
    return tensor


def of_dense(dense: torch.Tensor, block: int, threshold: float) -> tuple[torch.Tensor, Structure]:
    """Blocks with an element larger than ``threshold`` (NaN counts as larger); the rest is dropped."""
    blocks = tiled(dense, block)
    large = (blocks > threshold) | (blocks < -threshold) | blocks.isnan()
    return picked(dense, large.any(3).any(2), block)


def picked(dense: torch.Tensor, kept: torch.Tensor, block: int) -> tuple[torch.Tensor, Structure]:
    """The blocks of (m, k) that a mask of (rows, columns) of blocks names; differentiable."""
    row, column = kept.nonzero(as_tuple=True)
    m, k = dense.shape
    return tiled(dense, block)[row, column], _sorted_structure(row, column, (m, k), block)


def tiled(dense: torch.Tensor, block: int) -> torch.Tensor:
    """(rows, columns, block, block): every block of (m, k), zeros beyond it."""
    m, k = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -k % block, 0, -m % block))
    return padded.reshape(-(-m // block), block, -(-k // block), block).transpose(1, 2)


def to_dense(values: torch.Tensor, structure: Structure) -> torch.Tensor:
    """(m, k); differentiable in the values."""
    return scattered(values, structure.rows, structure.columns, structure.shape)


def scattered(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(m, k) with blocks at places of blocks (rows, columns), zero elsewhere; differentiable in the values."""
    block, (m, k) = values.shape[1], shape
    down, across = -(-m // block), -(-k // block)
    dense = values.new_zeros(down * block, across * block)
    dense.view(down, block, across, block).transpose(1, 2)[rows, columns] = values
    return dense[:m, :k].contiguous()


def of_elements(
    row: torch.Tensor, column: torch.Tensor, elements: torch.Tensor, shape: tuple[int, int], block: int
) -> tuple[torch.Tensor, Structure]:
    """Blocks that hold the elements at (row, column), both int64; elements that stand twice are added."""
    columns = max(1, -(-shape[1] // block))
    places, inverse = torch.unique((row // block) * columns + column // block, return_inverse=True)
    inside = (inverse * block + row % block) * block + column % block
    values = elements.new_zeros(len(places) * block * block).index_put((inside,), elements, accumulate=True)
    return values.view(-1, block, block), _sorted_structure(places // columns, places % columns, shape, block)


def split(values: torch.Tensor, structure: Structure, block: int) -> tuple[torch.Tensor, Structure]:
    """In blocks of a side that divides theirs, those that hold more than zeros; differentiable."""
    f, (m, k) = structure.block // block, structure.shape
    rows, columns = -(-m // block), -(-k // block)
    parts = values.view(-1, f, block, f, block).transpose(2, 3)
    number, down, across = (parts != 0).any(4).any(3).nonzero(as_tuple=True)
    row, column = structure.rows[number] * f + down, structure.columns[number] * f + across
    order = torch.argsort(row * columns + column)
    order = order[((row < rows) & (column < columns))[order]]
    made = _sorted_structure(row[order], column[order], (m, k), block)
    return parts[number[order], down[order], across[order]], made


def to_elements(values: torch.Tensor, structure: Structure) -> Indices:
    """CSR of every stored element, zeros among them: row pointers and columns (int64), elements; columns rise."""
    block, (m, k) = structure.block, structure.shape
    numbers = torch.arange(block, device=values.device)
    row = (structure.rows[:, None, None] * block + numbers[:, None]).expand(values.shape)
    column = (structure.columns[:, None, None] * block + numbers).expand(values.shape)
    real = (row < m) & (column < k)
    row = row[real]
    # By row alone: within a row, blocks and their columns rise already.
    order = torch.argsort(row, stable=True)
    return pointers(row, m, torch.int64), column[real][order], values[real][order]


def of_csr(op: str, matrix: torch.Tensor, block: int) -> tuple[torch.Tensor, Structure]:
    """Blocks of a torch CSR tensor; ValueError for indices that are none of it, which torch does not look for."""
    row_ptr, column = matrix.crow_indices(), matrix.col_indices()
    m, k = matrix.shape
    lengths = row_ptr.diff()
    faults = [row_ptr[0] != 0, row_ptr[-1] != len(column), (lengths < 0).any(), ((column < 0) | (column >= k)).any()]
    if bool(torch.stack(faults).any()):
        raise ValueError(
            f"{op}: matrix: expected row pointers that rise from 0 to {len(column)} and columns below {k}, got others"
        )
    row = torch.repeat_interleave(torch.arange(m, device=column.device), lengths.long(), output_size=len(column))
    elements = check_values(op, "matrix", matrix.values())
    return of_elements(row, column.long(), elements, (m, k), block)


def of_coo(op: str, matrix: torch.Tensor, block: int) -> tuple[torch.Tensor, Structure]:
    """Blocks of a torch COO tensor, in any order; ValueError for places outside."""
    row, column = matrix._indices()
    m, k = matrix.shape
    if bool(((row < 0) | (row >= m) | (column < 0) | (column >= k)).any()):
        raise ValueError(f"{op}: matrix: expected places inside {m} × {k}, got others")
    return of_elements(row, column, check_values(op, "matrix", matrix._values()), (m, k), block)


def rising(values: torch.Tensor, row_ptr: torch.Tensor, col_idx: torch.Tensor) -> Indices:
    """Blocks with the columns of every row sorted; the very tensors where they are, or where the parts do not fit
    together (``Structure.checked`` says how)."""
    lengths = row_ptr.diff()
    if len(values) != len(col_idx) or bool((lengths < 0).any()) or int(lengths.sum()) != len(col_idx):
        return values, row_ptr, col_idx
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=col_idx.device), lengths.long())
    if not bool(((col_idx.diff() < 0) & (rows.diff() == 0)).any()):
        return values, row_ptr, col_idx
    order = torch.argsort(col_idx, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    return values[order], row_ptr, col_idx[order]


def is_scipy(matrix: object) -> bool:
    """Whether it is a sparse matrix or array of scipy, which need not be installed."""
    return type(matrix).__module__.startswith("scipy.sparse") and hasattr(matrix, "tocsr")


def of_scipy(op: str, matrix: Any) -> torch.Tensor:
    """torch's CSR tensor of a sparse matrix of scipy, over its arrays where it is CSR."""
    csr = matrix.tocsr()
    data = check_values(op, "matrix", _tensor(op, csr.data))
    row_ptr, column = _tensor(op, csr.indptr), _tensor(op, csr.indices)
    return torch.sparse_csr_tensor(row_ptr, column, data, size=csr.shape, check_invariants=False)


def scipy_blocks(op: str, bsr: Any) -> Indices:
    """Values, row pointers and columns of a BSR matrix of scipy, as tensors over its arrays."""
    data = check_values(op, "matrix", _tensor(op, bsr.data))
    return data, _tensor(op, bsr.indptr), _tensor(op, bsr.indices)


def _tensor(op: str, array: Any) -> torch.Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError as reason:
        raise TypeError(f"{op}: matrix: expected floating point, got {array.dtype}") from reason


def _sorted_structure(row: torch.Tensor, column: torch.Tensor, shape: tuple[int, int], block: int) -> Structure:
    """Of places that are sorted by row, then column, each once."""
    row_ptr = pointers(row, -(-shape[0] // block), torch.int32)
    return Structure(row_ptr, column.int(), shape, block)
