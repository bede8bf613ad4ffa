"""cuSPARSE's generic SpMM by ctypes: BSR, Blocked-ELL and CSR matrices times a dense one, row-major, sums in float32.

The library is the one that torch has loaded or brings along, else the toolkit's. Constants are those of cusparse.h
(CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..bsr import BSRMatrix

FORMATS = ("bsr", "blocked-ell", "csr")
_NAMES = ("libcusparse.so.12", "libcusparse.so.13", "libcusparse.so")
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_FLOAT, _INT32 = 0, 2
_ROW_MAJOR = 2
_ALGORITHMS = {"bsr": 14, "blocked-ell": 13, "csr": 6}  # CUSPARSE_SPMM_BSR_ALG1, BLOCKED_ELL_ALG1, CSR_ALG2
_PREPROCESSED = ("csr",)

_I64, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_SPMM = (_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _POINTER)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cusparseCreate": (_POINTER,),
    "cusparseSetStream": (_POINTER, _POINTER),
    "cusparseCreateBsr": (_POINTER, *[_I64] * 5, *[_POINTER] * 3, *[_INT] * 5),
    "cusparseCreateBlockedEll": (_POINTER, *[_I64] * 4, *[_POINTER] * 2, *[_INT] * 3),
    "cusparseCreateCsr": (_POINTER, *[_I64] * 3, *[_POINTER] * 3, *[_INT] * 4),
    "cusparseCreateDnMat": (_POINTER, *[_I64] * 3, _POINTER, _INT, _INT),
    "cusparseDestroySpMat": (_POINTER,),
    "cusparseDestroyDnMat": (_POINTER,),
    "cusparseSpMM_bufferSize": _SPMM,
    "cusparseSpMM_preprocess": _SPMM,
    "cusparseSpMM": _SPMM,
}


class CusparseError(RuntimeError):
    """A call that cuSPARSE refused."""


@functools.cache
def _library() -> ctypes.CDLL:
    """OSError where there is none."""
    folders = [Path("/usr/local/cuda/lib64")]
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        folders += [path.parent for path in Path(root).glob("*/lib/libcusparse.so*")]
    candidates = [*_NAMES, *(str(folder / name) for folder in folders for name in _NAMES if (folder / name).exists())]
    for name in candidates:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for function, types in _SIGNATURES.items():
            getattr(library, function).argtypes = types
        library.cusparseGetErrorString.restype = ctypes.c_char_p
        return library
    raise OSError("cusparse: expected libcusparse from torch's CUDA packages or the toolkit, got none")


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        said = _library().cusparseGetErrorString(status)
        raise CusparseError(f"{name}: {said.decode() if said else status}")


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _call("cusparseCreate", ctypes.byref(handle))
    return handle


class Product:
    """out = A·b for fixed tensors on CUDA; ``run`` only launches, on the current stream."""

    def __init__(self, form: str, matrix: BSRMatrix, b: torch.Tensor, out: torch.Tensor) -> None:
        """OSError without the library, CusparseError for what it does not do; ``matrix``: of whole blocks."""
        self._held: list[Any] = [matrix, b, out]
        self._handle = _handle(torch.cuda.current_device())
        self._one, self._zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._matrix = ctypes.c_void_p()
        self._dense: list[ctypes.c_void_p] = []
        self._algorithm = _ALGORITHMS[form]
        makers: dict[str, Callable[[BSRMatrix], None]] = {"bsr": self._bsr, "blocked-ell": self._ell, "csr": self._csr}
        makers[form](matrix)
        for tensor in (b, out):
            made = ctypes.c_void_p()
            _call("cusparseCreateDnMat", ctypes.byref(made), *tensor.shape, tensor.stride(0), tensor.data_ptr(),
                  _TYPES[tensor.dtype], _ROW_MAJOR)  # fmt: skip
            self._dense.append(made)
        size = ctypes.c_size_t()
        self._spmm("cusparseSpMM_bufferSize", ctypes.byref(size))
        self._buffer = torch.empty(max(int(size.value), 1), dtype=torch.uint8, device=b.device)
        if form in _PREPROCESSED:
            self._spmm("cusparseSpMM_preprocess", self._buffer.data_ptr())

    def run(self) -> None:
        self._spmm("cusparseSpMM", self._buffer.data_ptr())

    def _spmm(self, name: str, last: Any) -> None:
        _call("cusparseSetStream", self._handle, torch.cuda.current_stream().cuda_stream)
        one, zero = ctypes.byref(self._one), ctypes.byref(self._zero)
        _call(name, self._handle, 0, 0, one, self._matrix, self._dense[0], zero, self._dense[1], _FLOAT,
              self._algorithm, last)  # fmt: skip

    def _bsr(self, matrix: BSRMatrix) -> None:
        parts = self._hold(matrix.row_ptr.int(), matrix.col_idx.int(), matrix.values)
        block = matrix.block_size
        _call("cusparseCreateBsr", ctypes.byref(self._matrix), *matrix.structure.grid, matrix.blocks, block, block,
              *parts, _INT32, _INT32, 0, _TYPES[matrix.dtype], _ROW_MAJOR)  # fmt: skip

    def _ell(self, matrix: BSRMatrix) -> None:
        indices, values = blocked_ell(matrix)
        parts = self._hold(indices, values)
        _call("cusparseCreateBlockedEll", ctypes.byref(self._matrix), *matrix.shape, matrix.block_size, values.shape[1],
              *parts, _INT32, 0, _TYPES[matrix.dtype])  # fmt: skip

    def _csr(self, matrix: BSRMatrix) -> None:
        csr = matrix.to_torch("csr")
        parts = self._hold(csr.crow_indices().int(), csr.col_indices().int(), csr.values())
        _call("cusparseCreateCsr", ctypes.byref(self._matrix), *matrix.shape, csr.values().shape[0], *parts,
              _INT32, _INT32, 0, _TYPES[matrix.dtype])  # fmt: skip

    def _hold(self, *tensors: torch.Tensor) -> list[int]:
        self._held += tensors
        return [tensor.data_ptr() for tensor in tensors]

    def __del__(self) -> None:
        # What was made before a call failed.
        for made in getattr(self, "_dense", ()):
            _library().cusparseDestroyDnMat(made)
        if getattr(self, "_matrix", None):
            _library().cusparseDestroySpMat(self._matrix)


def blocked_ell(matrix: BSRMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row of blocks as long as the longest: columns (rows of blocks, width) int32, -1 where there is none, and
    values (m, width · block), each row of the matrix contiguous."""
    structure, block = matrix.structure, matrix.block_size
    rows = structure.grid[0]
    lengths = matrix.row_ptr.diff().long()
    width = max(1, int(lengths.max())) if rows else 1
    place = torch.arange(matrix.blocks, device=matrix.device) - matrix.row_ptr[:-1].long()[structure.rows]
    indices = torch.full((rows, width), -1, dtype=torch.int32, device=matrix.device)
    indices[structure.rows, place] = matrix.col_idx.int()
    values = matrix.values.new_zeros(rows, block, width, block)
    values.transpose(1, 2)[structure.rows, place] = matrix.values
    return indices, values.view(rows * block, width * block)
