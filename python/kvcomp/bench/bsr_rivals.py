"""What ``kvcomp bench bsr`` measures beside kvcomp, on the same matrix: dense, torch's, scipy's, cuSPARSE's products.

Every rival is made for one problem and gives its product for a running number that chooses among copies of the inputs.
What it cannot do it raises.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..bsr import BSRMatrix
from . import bsr_cusparse

Call = Callable[[int], torch.Tensor]
HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Problem:
    """Copies of a matrix, of what it is multiplied with, and of room for the result."""

    matrices: list[BSRMatrix]
    others: list[torch.Tensor]
    outs: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.matrices)


def dense(problem: Problem) -> Call:
    """torch.mm of the same matrix, its zeros stored: cuBLAS on CUDA."""
    return multiplied([matrix.to_dense() for matrix in problem.matrices], problem.others, problem.outs)


def multiplied(left: list[torch.Tensor], others: list[torch.Tensor], outs: list[torch.Tensor]) -> Call:
    """Products of dense matrices, into the outs where torch can. On the CPU it writes no other dtype than theirs."""
    dtype = outs[0].dtype
    if dtype == left[0].dtype:
        return lambda i: torch.mm(left[i % len(left)], others[i % len(left)], out=outs[i % len(left)])
    if left[0].device.type == "cpu":
        return lambda i: torch.mm(left[i % len(left)], others[i % len(left)])
    return lambda i: torch.mm(left[i % len(left)], others[i % len(left)], out_dtype=dtype)


def torch_sparse(layout: str) -> Callable[[Problem], Call]:
    """torch.mm of its own BSR (Triton on CUDA) or CSR tensor."""

    def make(problem: Problem) -> Call:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that they are in beta
            left = [matrix.to_torch("bsr" if layout == "bsr" else "csr") for matrix in problem.matrices]
        others = problem.others
        return lambda i: torch.mm(left[i % len(left)], others[i % len(others)])

    return make


def scipy_sparse(layout: str) -> Callable[[Problem], Call]:
    """scipy's product, in float32 where it has no such type; it uses one thread."""

    def make(problem: Problem) -> Call:
        importlib.import_module("scipy.sparse")
        left = [matrix.to_scipy("bsr" if layout == "bsr" else "csr") for matrix in problem.matrices]
        others = [other.float().numpy() if other.dtype in HALVES else other.numpy() for other in problem.others]
        return lambda i: torch.from_numpy(left[i % len(left)] @ others[i % len(others)])

    return make


def cusparse(form: str) -> Callable[[Problem], Call]:
    """CSR writes fp32: with a 16-bit result it rounds on the way, and is wrong by more than the gate lets pass."""

    def make(problem: Problem) -> Call:
        outs = [out.float() for out in problem.outs] if form == "csr" else problem.outs
        products = [
            bsr_cusparse.Product(form, *triple) for triple in zip(problem.matrices, problem.others, outs, strict=True)
        ]

        def call(number: int) -> torch.Tensor:
            at = number % len(products)
            products[at].run()
            return outs[at]

        return call

    return make


def two_of_four(left: list[torch.Tensor], others: list[torch.Tensor]) -> Call:
    """Another problem, for the record: matrices of which two of any four elements of a row are gone (``pruned``)."""
    packed: list[Any] = [torch.sparse.to_sparse_semi_structured(part) for part in left]
    return lambda i: torch.mm(packed[i % len(packed)], others[i % len(others)])


def pruned(matrix: torch.Tensor) -> torch.Tensor:
    """The two largest of any four elements of a row, zeros for the others."""
    fours = matrix.view(matrix.shape[0], -1, 4)
    order = fours.abs().argsort(-1, descending=True)
    return fours.scatter(-1, order[..., 2:], 0).view_as(matrix)


CPU: dict[str, Callable[[Problem], Call]] = {
    "torch dense": dense,
    "torch bsr": torch_sparse("bsr"),
    "torch csr": torch_sparse("csr"),
    "scipy bsr": scipy_sparse("bsr"),
    "scipy csr": scipy_sparse("csr"),
}
CUDA: dict[str, Callable[[Problem], Call]] = {
    "torch dense": dense,
    "torch bsr": torch_sparse("bsr"),
    **{f"cusparse {form}": cusparse(form) for form in bsr_cusparse.FORMATS},
}


def of(device: str) -> dict[str, Callable[[Problem], Call]]:
    """Name of each rival on a device: what makes it."""
    return CUDA if device == "cuda" else CPU
