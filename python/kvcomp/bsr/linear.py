"""A linear layer whose weight is block-sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import breakeven, convert, multiply
from .matrix import BSRMatrix
from .patterns import random_structure
from .structure import Structure, check_block, said

_STATE = ("values", "bias", "row_ptr", "col_idx")


class BlockSparseLinear(nn.Module):
    """y = x Wᵀ + bias, W (out_features, in_features) block-sparse: ``values`` is the parameter, which blocks are stored
    stays as it is. x: (..., in_features), of the values' dtype or under autocast.

    The state holds values, bias and indices; loading one with as many blocks in other places changes the pattern. For
    every x the layer takes the stored blocks, or a dense weight that it makes on the spot, as ``breakeven`` expects to
    be faster, and joins no blocks into larger ones. It works under torch.compile.
    """

    values: nn.Parameter
    row_ptr: torch.Tensor
    col_idx: torch.Tensor
    plan: torch.Tensor
    plan_transposed: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        sparsity: float = 0.78,
        pattern: str = "uniform",
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Blocks at the places of ``random_bsr``; values and bias uniform as nn.Linear's, for as many inputs as a row
        has on average."""
        dtype = dtype or torch.get_default_dtype()
        if dtype not in convert.DTYPES:
            raise TypeError(f"BlockSparseLinear: dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
        structure = random_structure((out_features, in_features), block_size, sparsity, pattern, seed).to(device)
        bound = max(in_features * structure.density, 1) ** -0.5
        values = torch.empty(structure.count, *[structure.block] * 2, device=device, dtype=dtype)
        values.uniform_(-bound, bound)
        offsets = torch.empty(out_features, device=device, dtype=dtype).uniform_(-bound, bound) if bias else None
        self._take(BSRMatrix.of(values, structure), offsets)

    @classmethod
    def from_bsr(cls, weight: BSRMatrix, bias: torch.Tensor | None = None) -> BlockSparseLinear:
        """Over the memory of W's values. ``bias``: (out_features)."""
        if bias is not None and tuple(bias.shape) != weight.shape[:1]:
            raise ValueError(f"BlockSparseLinear: bias: expected ({weight.shape[0]},), got {said(bias)}")
        made = cls.__new__(cls)
        made._take(weight, bias)
        return made

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, sparsity: float = 0.78) -> BlockSparseLinear:
        """Keeps the blocks of a dense layer's weight that have the largest norms: ``1 - sparsity`` of all blocks."""
        block = check_block("from_linear", block_size)
        if not 0 <= sparsity <= 1:
            raise ValueError(f"from_linear: sparsity: expected a fraction of empty blocks in [0, 1], got {sparsity!r}")
        weight = linear.weight.detach()
        sizes = convert.tiled(weight, block).float().square().sum((2, 3))
        kept = torch.zeros(sizes.numel(), dtype=torch.bool, device=weight.device)
        kept[sizes.flatten().argsort(descending=True, stable=True)[: round((1 - sparsity) * len(kept))]] = True
        matrix = BSRMatrix.of(*convert.picked(weight, kept.view_as(sizes), block))
        return cls.from_bsr(matrix, None if linear.bias is None else linear.bias.detach().clone())

    def _take(self, weight: BSRMatrix, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block_size = weight.block_size
        self.values = nn.Parameter(weight.values.detach())
        self.bias = None if bias is None else nn.Parameter(bias.to(weight.device, weight.dtype))
        # Its own indices: W's must not change when a state is loaded.
        self.register_buffer("row_ptr", weight.row_ptr.clone())
        self.register_buffer("col_idx", weight.col_idx.clone())
        self._plan(weight.structure)

    def _plan(self, structure: Structure) -> None:
        plan = structure.plan(False)
        self.register_buffer("plan", plan.words, persistent=False)
        self.register_buffer("plan_transposed", structure.plan(True).words, persistent=False)
        self.steps = plan.steps

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """A state that does not fit is refused before anything of this layer is loaded; plans follow the indices."""
        try:
            structure = self._offered({name: state_dict.get(prefix + name) for name in _STATE})
        except (ValueError, TypeError) as reason:
            errors: list[str] = rest[-1]
            errors.append(f"{prefix}: {reason}")
            return
        # Not into the indices of a matrix that ``weight`` has given, nor those of the state by ``assign``.
        self._own_indices()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # type: ignore[no-untyped-call,unused-ignore]
        if structure is not None:
            self._own_indices()
            self._plan(structure.to(self.values.device))

    def _own_indices(self) -> None:
        self.row_ptr, self.col_idx = self.row_ptr.clone(), self.col_idx.clone()

    def _offered(self, state: dict[str, Any]) -> Structure | None:
        """What a state's indices say, None for one without; ValueError, TypeError for parts of other shapes."""
        for name, tensor in state.items():
            own = getattr(self, name)
            if isinstance(tensor, torch.Tensor) and own is not None and tensor.shape != own.shape:
                raise ValueError(f"BlockSparseLinear: {name}: expected {tuple(own.shape)}, got {said(tensor)}")
        row_ptr, col_idx = state["row_ptr"], state["col_idx"]
        if row_ptr is None and col_idx is None:
            return None
        if row_ptr is None or col_idx is None:
            raise ValueError("BlockSparseLinear: row_ptr, col_idx: expected both or neither, got one of them")
        shape = (self.out_features, self.in_features)
        return Structure.checked("BlockSparseLinear", row_ptr, col_idx, shape, self.block_size)

    def weight(self) -> BSRMatrix:
        """W over the layer's own values; its indices are checked again."""
        shape = (self.out_features, self.in_features)
        structure = Structure.checked("BlockSparseLinear", self.row_ptr, self.col_idx, shape, self.block_size)
        return BSRMatrix.of(self.values, structure)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.values
        bias: torch.Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, values, bias = x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
        if x.ndim == 0 or x.shape[-1] != self.in_features or x.dtype != values.dtype:
            raise ValueError(
                f"BlockSparseLinear: x: expected (..., {self.in_features}) of {values.dtype}, got {said(x)}"
            )
        rows, shape = x.reshape(-1, self.in_features), (self.out_features, self.in_features)
        if self._is_sparse(rows.shape[0], values):
            found = multiply.matmul_op(values, self.plan, self.plan_transposed, rows.T, *shape, False, values.dtype)
            y: torch.Tensor = found.T if bias is None else found.T + bias
        else:
            places = multiply.places(self.plan, shape, False, values.shape[0])
            y = nn.functional.linear(rows, convert.scattered(values, *places, shape), bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _is_sparse(self, n: int, values: torch.Tensor) -> bool:
        if not multiply.in_core(values.dtype, values.device):
            return False
        rates = breakeven.rates_of(values.device, values.dtype)
        shape, itemsize = (self.out_features, self.in_features), values.dtype.itemsize
        sparse = breakeven.sparse_us(rates, shape, self.block_size, values.shape[0], self.steps, n, itemsize)
        copy = breakeven.copy_us(rates, shape, values.shape[0], self.block_size, itemsize)
        return sparse <= copy + breakeven.dense_us(rates, shape, n, itemsize)

    def extra_repr(self) -> str:
        blocks = -(-self.out_features // self.block_size) * -(-self.in_features // self.block_size)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, {len(self.values)} of {blocks} blocks"
        )
