"""``BSRMatrix``: a block-sparse matrix of square blocks, from and to the forms that torch and scipy have."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch

from . import convert
from .kept import Kept, capturing
from .structure import BLOCKS, Structure, check_block, said

Layout = Literal["bsr", "csr"]
_DENSE = 0  # among the factors of what is kept


class BSRMatrix:
    """(m, k) of stored blocks of 16, 32, 64 or 128 square, every other block zero.

    values: (blocks, block, block), row-major; float16 and bfloat16 multiply block by block, float32 on the CPU, too;
    float64, and float32 on CUDA, as dense matrices. row_ptr: (rows of blocks + 1); col_idx: (blocks), rising in every
    row; int32 or int64. Blocks reach beyond the matrix where block does not divide m or k: what they hold there is
    finite and takes no part. The tensors are kept as they are, not copied; this is torch's own layout of BSR tensors.
    """

    __slots__ = ("_kept", "_values", "structure")

    def __init__(
        self, values: torch.Tensor, row_ptr: torch.Tensor, col_idx: torch.Tensor, shape: tuple[int, int]
    ) -> None:
        """ValueError, TypeError: one sentence on what does not fit together. Waits for the GPU of CUDA tensors."""
        values = convert.check_values("bsr", "values", values)
        if values.ndim != 3 or values.shape[1] != values.shape[2]:
            raise ValueError(f"bsr: values: expected (blocks, block, block), got {tuple(values.shape)}")
        structure = Structure.checked("bsr", row_ptr, col_idx, shape, int(values.shape[1]))
        self._take(values, structure)

    def _take(self, values: torch.Tensor, structure: Structure) -> None:
        self.structure = structure
        self.values = values

    @classmethod
    def of(cls, values: torch.Tensor, structure: Structure) -> BSRMatrix:
        """From a structure that has been checked: no index is looked at again."""
        made = cls.__new__(cls)
        made._take(values, structure)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy and pickle: without what is kept."""
        return BSRMatrix.of, (self.values, self.structure)

    # ---- facts

    @property
    def values(self) -> torch.Tensor:
        """(blocks, block, block); may be set to others of the same shape on the same device."""
        return self._values

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        structure = self.structure
        want = (structure.count, structure.block, structure.block)
        values = convert.check_values("bsr", "values", values)
        if tuple(values.shape) != want or values.device != structure.device:
            raise ValueError(
                f"bsr: values: expected {want} on {structure.device} as the indices say, got {said(values)}"
            )
        self._values = values.contiguous()
        self._kept: dict[int, Kept] = {}

    @property
    def row_ptr(self) -> torch.Tensor:
        return self.structure.row_ptr

    @property
    def col_idx(self) -> torch.Tensor:
        return self.structure.col_idx

    @property
    def shape(self) -> tuple[int, int]:
        return self.structure.shape

    @property
    def block_size(self) -> int:
        return self.structure.block

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def blocks(self) -> int:
        """Stored blocks."""
        return self.structure.count

    @property
    def density(self) -> float:
        """Stored blocks over all."""
        return self.structure.density

    @property
    def sparsity(self) -> float:
        """Empty blocks over all."""
        return 1 - self.structure.density

    @property
    def nbytes(self) -> int:
        """Values and indices; what products keep besides is in ``kept_nbytes``."""
        return self.values.nbytes + self.row_ptr.nbytes + self.col_idx.nbytes

    @property
    def kept_nbytes(self) -> int:
        """Of the copies that ``dense`` and ``joined`` keep: values alone."""
        return sum(_memory(kept.copy).nbytes for kept in self._kept.values())

    def __repr__(self) -> str:
        m, k = self.shape
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"BSRMatrix({m} × {k}, {self.blocks} blocks of {self.block_size} ({self.sparsity:.1%} empty), {kind}, "
            f"{self.device})"
        )

    # ---- from other forms

    @classmethod
    def from_dense(cls, dense: Any, block_size: int, *, threshold: float = 0.0) -> BSRMatrix:
        """Of a tensor or array (m, k): the blocks that hold an element larger in size than ``threshold``, whole."""
        block = check_block("from_dense", block_size)
        tensor = convert.check_values("from_dense", "dense", convert.as_tensor("from_dense", "dense", dense))
        if not threshold >= 0:
            raise ValueError(f"from_dense: threshold: expected 0 or more, got {threshold!r}")
        return cls.of(*convert.of_dense(tensor, block, threshold))

    @classmethod
    def from_csr(cls, matrix: Any, block_size: int, *, dtype: torch.dtype | None = None) -> BSRMatrix:
        """Of a CSR matrix of torch or any sparse one of scipy: the blocks that hold one of its elements. Elements that
        stand twice are added. ``dtype``: of the values (default: the matrix's own)."""
        block = check_block("from_csr", block_size)
        tensor = convert.of_scipy("from_csr", matrix) if convert.is_scipy(matrix) else matrix
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.sparse_csr or tensor.ndim != 2:
            raise TypeError(f"from_csr: matrix: expected CSR of torch or scipy with two dimensions, got {said(matrix)}")
        values, structure = convert.of_csr("from_csr", tensor, block)
        return cls.of(values if dtype is None else values.to(dtype), structure)

    @classmethod
    def from_torch(cls, matrix: torch.Tensor, block_size: int | None = None) -> BSRMatrix:
        """Of a torch tensor: BSR of a block size that is supported over the same memory (sorted where its columns do
        not rise), any other through its elements, in blocks of ``block_size``."""
        if not isinstance(matrix, torch.Tensor) or matrix.ndim != 2:
            raise TypeError(f"from_torch: matrix: expected a tensor of two dimensions, got {said(matrix)}")
        if matrix.layout == torch.sparse_bsr:
            side = tuple(matrix.values().shape[1:])
            if side[0] == side[1] and side[0] in BLOCKS and block_size in (None, side[0]):
                parts = convert.rising(matrix.values(), matrix.crow_indices(), matrix.col_indices())
                return cls(*parts, (int(matrix.shape[0]), int(matrix.shape[1])))
        if block_size is None:
            raise ValueError(
                f"from_torch: block_size: expected one of {', '.join(map(str, BLOCKS))} for {said(matrix)}, got none"
            )
        if matrix.layout == torch.strided:
            return cls.from_dense(matrix, block_size)
        if matrix.layout == torch.sparse_csr:
            return cls.from_csr(matrix, block_size)
        return cls.of(*convert.of_coo("from_torch", matrix.to_sparse(), check_block("from_torch", block_size)))

    @classmethod
    def from_scipy(cls, matrix: Any, block_size: int | None = None, *, dtype: torch.dtype | None = None) -> BSRMatrix:
        """Of a sparse matrix of scipy: BSR of a block size that is supported over the same memory, any other through
        its elements, in blocks of ``block_size``. ``dtype``: of the values, as scipy has no 16-bit ones."""
        if not convert.is_scipy(matrix):
            raise TypeError(f"from_scipy: matrix: expected a sparse matrix of scipy, got {type(matrix).__name__}")
        if matrix.format == "bsr":
            side = matrix.blocksize
            if side[0] == side[1] and side[0] in BLOCKS and block_size in (None, side[0]):
                values, row_ptr, col_idx = convert.rising(*convert.scipy_blocks("from_scipy", matrix))
                return cls(values if dtype is None else values.to(dtype), row_ptr, col_idx, matrix.shape)
        if block_size is None:
            raise ValueError(
                f"from_scipy: block_size: expected one of {', '.join(map(str, BLOCKS))} for {matrix.format}, got none"
            )
        return cls.from_csr(matrix, block_size, dtype=dtype)

    # ---- to other forms

    def to_dense(self) -> torch.Tensor:
        """(m, k); differentiable in the values."""
        return convert.to_dense(self.values, self.structure)

    def to_torch(self, layout: Layout = "bsr") -> torch.Tensor:
        """torch's BSR tensor over the same memory, or its CSR tensor of every stored element."""
        if layout == "csr":
            pointers, columns, elements = convert.to_elements(self.values, self.structure)
            return torch.sparse_csr_tensor(pointers, columns, elements, size=self.shape, check_invariants=False)
        if layout != "bsr":
            raise ValueError(f"to_torch: layout: expected bsr or csr, got {layout!r}")
        self._check_whole("to_torch")
        return torch.sparse_bsr_tensor(self.row_ptr, self.col_idx, self.values, size=self.shape, check_invariants=False)

    def to_scipy(self, layout: Layout = "bsr") -> Any:
        """scipy's BSR matrix over the same memory, or its CSR matrix of every stored element; 16-bit values become
        float32, which scipy multiplies."""
        sparse: Any = importlib.import_module("scipy.sparse")
        values = self.values.detach().cpu()
        values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        if layout == "csr":
            pointers, columns, elements = convert.to_elements(values, self.structure.to("cpu"))
            return sparse.csr_matrix((elements.numpy(), columns.numpy(), pointers.numpy()), shape=self.shape)
        if layout != "bsr":
            raise ValueError(f"to_scipy: layout: expected bsr or csr, got {layout!r}")
        self._check_whole("to_scipy")
        indices = (self.col_idx.cpu().numpy(), self.row_ptr.cpu().numpy())
        return sparse.bsr_matrix((values.numpy(), *indices), shape=self.shape)

    def _check_whole(self, op: str) -> None:
        """torch's and scipy's blocks must divide the matrix."""
        block = self.block_size
        if any(side % block for side in self.shape):
            raise ValueError(f"{op}: shape: expected multiples of the block size {block} for bsr, got {self.shape}")

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> BSRMatrix:
        """On a device, of a dtype; this very matrix where nothing changes."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        values = self.values.to(device=device, dtype=dtype)
        structure = self.structure if device is None else self.structure.to(device)
        return self if values is self.values and structure is self.structure else BSRMatrix.of(values, structure)

    def with_values(self, values: torch.Tensor) -> BSRMatrix:
        """The same blocks with other values."""
        return BSRMatrix.of(values, self.structure)

    def transpose(self) -> BSRMatrix:
        """(k, m), a copy."""
        structure, order = self.structure.transposed
        return BSRMatrix.of(self.values[order].transpose(1, 2).contiguous(), structure)

    @property
    def T(self) -> BSRMatrix:
        return self.transpose()

    def dense(self) -> torch.Tensor:
        """(m, k), kept for the next call until the values change: what products take where dense is faster.

        Changes that torch counts are seen: in place, by an optimizer, another tensor in ``values``. Of tensors of
        inference mode, whose changes are not counted, nothing is kept; nor in the capture of a CUDA graph, in which
        the copy is made at every replay, of the values then."""
        dense: torch.Tensor = self._keep(_DENSE, self.to_dense)
        return dense

    def joined(self, factor: int) -> BSRMatrix:
        """The same matrix in blocks ``factor`` (2, 4, 8) times as large, at most 128, kept as ``dense`` is."""
        if factor not in (2, 4, 8) or factor * self.block_size > BLOCKS[-1]:
            raise ValueError(f"joined: factor: expected 2, 4 or 8 and blocks of at most 128, got {factor!r}")
        merged = self.structure.merged(factor)
        matrix: BSRMatrix = self._keep(factor, lambda: BSRMatrix.of(merged.values(self.values), merged.structure))
        return matrix

    def _keep(self, factor: int, make: Callable[[], Any]) -> Any:
        if self.values.is_inference() or capturing(self.device):
            with torch.inference_mode(False), torch.no_grad():
                return make()
        kept = self._kept.get(factor)
        if kept is None or not kept.follows(self.values):
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept[factor] = Kept(self.values, make())
        kept.ready(_memory(kept.copy))
        return kept.copy

    def forget(self, keep: int | None = None) -> None:
        """Drops what ``dense`` (0) and ``joined`` (its factor) keep, but for one of them."""
        self._kept = {factor: kept for factor, kept in self._kept.items() if factor == keep}

    # ---- products

    def matmul(self, b: torch.Tensor, **how: Any) -> torch.Tensor:
        """``kvcomp.bsr.matmul(self, b, ...)``."""
        from .multiply import matmul

        return matmul(self, b, **how)

    def __matmul__(self, b: torch.Tensor) -> torch.Tensor:
        return self.matmul(b)


def _memory(copy: torch.Tensor | BSRMatrix) -> torch.Tensor:
    return copy if isinstance(copy, torch.Tensor) else copy.values
