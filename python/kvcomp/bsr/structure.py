"""Which blocks of a block-sparse matrix are stored, checked once, and what products read of it: plans."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .. import _C
from .kept import capturing

# Sides of the square blocks that the operation multiplies.
BLOCKS = (16, 32, 64, 128)
_STEPS_WORD = 7  # of kvc_bsr_head


def check_block(op: str, block: object) -> int:
    """The side of a block as int; ValueError for one that is none of ``BLOCKS``."""
    if isinstance(block, bool) or not isinstance(block, int) or block not in BLOCKS:
        raise ValueError(f"{op}: block_size: expected one of {', '.join(map(str, BLOCKS))}, got {block!r}")
    return block


def check_shape(op: str, shape: Any) -> tuple[int, int]:
    """(m, k), both int of 0 or more."""
    try:
        m, k = (-1 if isinstance(side, bool) else operator.index(side) for side in shape)
    except (TypeError, ValueError):
        m = k = -1
    if m < 0 or k < 0:
        raise ValueError(f"{op}: shape: expected (m, k), both 0 or more, got {shape!r}")
    return m, k


@dataclass(eq=False)
class Plan:
    """What ``_C.bsr_matmul`` reads of a structure: int32 words on the values' device; steps: how many it takes."""

    words: torch.Tensor
    steps: int


@dataclass(eq=False)
class Structure:
    """The stored blocks of a matrix of ``shape`` (m, k), row by row, columns rising.

    row_ptr: (ceil(m/block) + 1) and col_idx: (blocks), int32 or int64, on one device; they must not change. Blocks of
    the last row and column of blocks reach beyond the matrix where block does not divide m or k. Made by ``checked``,
    or where the tensors are known to be sound.
    """

    row_ptr: torch.Tensor
    col_idx: torch.Tensor
    shape: tuple[int, int]
    block: int
    _plans: dict[bool, Plan] = field(default_factory=dict, init=False, repr=False)
    _merged: dict[int, Merged] = field(default_factory=dict, init=False, repr=False)
    # What multiply.choose found, by columns, transpose and dtype.
    ways: dict[tuple[int, bool, torch.dtype], int] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def checked(
        cls, op: str, row_ptr: torch.Tensor, col_idx: torch.Tensor, shape: tuple[int, int], block: int
    ) -> Structure:
        """ValueError, TypeError: one sentence on the first place that is wrong. Waits for the GPU of CUDA tensors."""
        block, shape = check_block(op, block), check_shape(op, shape)
        for name, tensor in (("row_ptr", row_ptr), ("col_idx", col_idx)):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise TypeError(f"{op}: {name}: expected a tensor of int32 or int64, got {said(tensor)}")
        if row_ptr.device != col_idx.device:
            raise ValueError(f"{op}: col_idx: expected {row_ptr.device} as row_ptr, got {col_idx.device}")
        if row_ptr.device.type == "meta":
            raise ValueError(f"{op}: row_ptr: expected indices that can be read, got {said(row_ptr)}")
        found = cls(row_ptr.contiguous(), col_idx.contiguous(), shape, block)
        _C.bsr_check(*found.host, *shape, block)
        return found

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        m, k = self.shape
        return -(-m // self.block), -(-k // self.block)

    @property
    def count(self) -> int:
        """Stored blocks."""
        return int(self.col_idx.shape[0])

    @property
    def density(self) -> float:
        """Stored blocks over all; 0 for a matrix without elements."""
        rows, columns = self.grid
        return self.count / (rows * columns) if rows * columns else 0.0

    @property
    def device(self) -> torch.device:
        return self.col_idx.device

    @cached_property
    def host(self) -> tuple[torch.Tensor, torch.Tensor]:
        """row_ptr and col_idx on the CPU, where plans are made."""
        return self.row_ptr.cpu(), self.col_idx.cpu()

    @contextmanager
    def _making(self) -> Iterator[None]:
        """Around whatever is made once and kept: ordinary tensors in inference mode, too, done before any stream
        reads them. RuntimeError in the capture of a CUDA graph, where nothing is computed."""
        if capturing(self.device):
            raise RuntimeError(
                "bsr: CUDA graph: expected a product of the same kind before the capture, to make its plan, got none"
            )
        with torch.inference_mode(False), torch.no_grad():
            yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @cached_property
    def rows(self) -> torch.Tensor:
        """(blocks) int64: the row of blocks that each stored block lies in."""
        with self._making():
            numbers = torch.arange(self.grid[0], device=self.device)
            return torch.repeat_interleave(numbers, self.row_ptr.diff().long(), output_size=self.count)

    @cached_property
    def columns(self) -> torch.Tensor:
        """(blocks) int64: col_idx as torch's own indexing wants it."""
        with self._making():
            return self.col_idx.clone().long() if self.col_idx.is_inference() else self.col_idx.long()

    def plan(self, transpose: bool) -> Plan:
        """For products with the matrix or with its transpose; made once."""
        if transpose not in self._plans:
            with self._making():
                words = torch.empty(
                    _C.bsr_plan_words(*self.shape, self.block, self.count, int(transpose)), dtype=torch.int32
                )
                used = _C.bsr_plan(words, *self.host, *self.shape, self.block, int(transpose))
                # A copy: of what was room for the worst case, the plan is a small part.
                words = words[:used].clone()
                self._plans[transpose] = Plan(words.to(self.device), int(words[_STEPS_WORD]))
        return self._plans[transpose]

    def merged(self, factor: int) -> Merged:
        """The structure of blocks ``factor`` (2, 4, 8; at most 128 in the end) times as large; made once."""
        if factor not in self._merged:
            with self._making():
                row_ptr = torch.empty(-(-self.shape[0] // (factor * self.block)) + 1, dtype=torch.int64)
                col_idx, place = (torch.empty(self.count, dtype=torch.int64) for _ in range(2))
                count = _C.bsr_merge(row_ptr, col_idx, place, *self.host, *self.shape, self.block, factor)
                row_ptr, col_idx = (part.to(self.device, torch.int32) for part in (row_ptr, col_idx[:count]))
                larger = Structure(row_ptr, col_idx, self.shape, factor * self.block)
                self._merged[factor] = Merged(larger, place.to(self.device), factor)
        return self._merged[factor]

    def in_blocks_of(self, block: int) -> Structure:
        """The structure that holds this one in blocks at least as large; itself for its own."""
        return self if block == self.block else self.merged(block // self.block).structure

    @cached_property
    def transposed(self) -> tuple[Structure, torch.Tensor]:
        """The structure of the transposed matrix, and (blocks) int64: which block of this one stands at each place."""
        columns, rows, (m, k) = self.columns, self.rows, self.shape
        with self._making():
            order = torch.argsort(columns, stable=True)
            row_ptr = pointers(columns, self.grid[1], self.row_ptr.dtype)
            return Structure(row_ptr, rows[order].to(self.col_idx.dtype), (k, m), self.block), order

    def to(self, device: torch.device | str) -> Structure:
        """This very one where it lies on the device already."""
        row_ptr = self.row_ptr.to(device)
        if row_ptr is self.row_ptr:
            return self
        moved = Structure(row_ptr, self.col_idx.to(device), self.shape, self.block)
        moved.__dict__["host"] = self.host
        return moved


@dataclass(eq=False)
class Merged:
    """Larger blocks that hold all blocks of a structure; place: (blocks) int64, where each went (bsr_merge)."""

    structure: Structure
    place: torch.Tensor
    factor: int

    def values(self, values: torch.Tensor) -> torch.Tensor:
        """(larger blocks, ...) of the smaller blocks' values, zero between them; differentiable."""
        f, block = self.factor, values.shape[1]
        large = values.new_zeros(self.structure.count, f, block, f, block)
        cell = self.place % (f * f)
        large.transpose(2, 3)[self.place // (f * f), cell // f, cell % f] = values
        return large.view(-1, f * block, f * block)


def pointers(rows: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """(count + 1): where each row begins in a list that is sorted by row; ``rows`` (entries) int64, in any order."""
    found = torch.zeros(count + 1, dtype=dtype, device=rows.device)
    found[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return found


def said(value: Any) -> str:
    """A tensor's dtype, shape and device, or the name of another type, for a sentence."""
    if isinstance(value, torch.Tensor):
        kind = "" if value.layout == torch.strided else f" ({str(value.layout).removeprefix('torch.')})"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}{kind}"
    return type(value).__name__
