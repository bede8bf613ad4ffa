"""Block-sparse matrices times dense ones: ``BSRMatrix @ b``. Needs torch.

A is stored as torch and scipy store BSR: square blocks of 16, 32, 64 or 128, sorted columns. float16 and bfloat16 with
sums in float32, on the CPU (float32, too) and on CUDA; gradients for the stored values and for b.
"""

from .api import convert_to_bsr, get_optimal_block_size, sparse_mm, validate_sparse_matrix
from .breakeven import break_even
from .linear import BlockSparseLinear
from .matrix import BSRMatrix
from .multiply import matmul, way_of
from .patterns import PATTERNS, random_bsr
from .structure import BLOCKS
from .tune import tune

__all__ = [
    "BLOCKS",
    "PATTERNS",
    "BSRMatrix",
    "BlockSparseLinear",
    "break_even",
    "convert_to_bsr",
    "get_optimal_block_size",
    "matmul",
    "random_bsr",
    "sparse_mm",
    "tune",
    "validate_sparse_matrix",
    "way_of",
]
