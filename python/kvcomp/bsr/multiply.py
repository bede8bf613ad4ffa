"""Block-sparse times dense: the choice of the way, torch's operators with their gradients, the call into the core.

Ways: the stored blocks as they are; joined into larger ones (CUDA); dense, of which a copy is kept.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal

import torch

from .. import _C
from . import breakeven, convert
from .matrix import BSRMatrix
from .structure import BLOCKS, Structure, said

Method = Literal["auto", "sparse", "dense"]
DENSE = 0  # among ways; the others are factors by which blocks are joined
METHODS = ("auto", "sparse", "dense")
# What the core multiplies; float32 on the CPU only. Anything else is multiplied dense.
_CORE = (torch.float16, torch.bfloat16)
_OUT = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST = torch.finfo(torch.float32).max  # that beta may be
_ALIGNED = 16  # bytes: rows of CUDA tensors that TMA reads
_HEAD_WORDS, _TILE_WORDS, _TILE_ROWS = 16, 4, 128  # bsr.h: kvc_bsr_coordinates


def matmul(
    a: BSRMatrix,
    b: torch.Tensor,
    *,
    transpose: bool = False,
    out: torch.Tensor | None = None,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
    method: Method = "auto",
) -> torch.Tensor:
    """C = A·B (+ beta·out), or Aᵀ·B with ``transpose``; b: (k, n), (m, n), or a vector; sums in float32.

    ``out``: written and returned; between its first element and its last lies nothing of b or the values (columns of
    one tensor are refused). ``out_dtype``: float16, bfloat16 or float32 (default: that of b). ``method``: "auto" takes
    what ``breakeven`` expects to be faster, and keeps what that needs (joined blocks or a dense copy, see
    ``BSRMatrix.kept_nbytes``). The first product of a matrix makes a plan on the CPU; it has to come before the capture
    of a CUDA graph (else RuntimeError). Gradients flow to the values and to b. ValueError, TypeError: one sentence;
    nothing is written then."""
    if not isinstance(a, BSRMatrix):
        raise TypeError(f"matmul: a: expected a BSRMatrix, got {said(a)}")
    if not isinstance(b, torch.Tensor) or b.layout != torch.strided or b.ndim not in (1, 2):
        raise TypeError(f"matmul: b: expected a dense tensor of one or two dimensions, got {said(b)}")
    if b.dtype != a.dtype or b.device != a.device:
        raise TypeError(f"matmul: b: expected {a.dtype} on {a.device} as the values, got {said(b)}")
    inner, rows = a.shape if transpose else reversed(a.shape)
    if b.shape[0] != inner:
        raise ValueError(f"matmul: b: expected {inner} rows, got {said(b)}")
    if method not in METHODS:
        raise ValueError(f"matmul: method: expected one of {', '.join(METHODS)}, got {method!r}")
    shape = (rows, *b.shape[1:])
    dtype = _result_dtype(a, b, shape, out, out_dtype)
    needs_grad = torch.is_grad_enabled() and (a.values.requires_grad or b.requires_grad)
    if not isinstance(beta, Real) or not abs(beta) <= _LARGEST or (out is None and beta != 0):
        raise ValueError(f"matmul: beta: expected {'0 without out' if out is None else 'a number'}, got {beta!r}")
    if out is not None and (needs_grad or (torch.is_grad_enabled() and out.requires_grad)):
        raise ValueError("matmul: out: expected none where gradients are needed, got one (torch.no_grad() allows it)")
    columns = b if b.ndim == 2 else b[:, None]
    target = out if out is None or out.ndim == 2 else out[:, None]
    way = _way(a, columns.shape[1], transpose, method)
    if needs_grad:
        found = _with_gradients(a, columns, transpose, dtype, way)
    elif way == DENSE:
        found = _dense_product(a.dense(), columns, transpose, dtype, target, beta)
    else:
        matrix = a if way == 1 else a.joined(way)
        plan = matrix.structure.plan(transpose)
        found = _product(matrix.values, plan.words, columns, a.shape, transpose, dtype, target, beta)
    return found if out is None and b.ndim == 2 else out if out is not None else found[:, 0]


def way_of(a: BSRMatrix, n: int, *, transpose: bool = False) -> str:
    """What "auto" takes for n columns: "sparse", "joined into N" or "dense"."""
    return name_of(_way(a, n, transpose, "auto"), a.block_size)


def name_of(way: int, block: int) -> str:
    return "sparse" if way == 1 else "dense" if way == DENSE else f"joined into {way * block}"


def _result_dtype(
    a: BSRMatrix, b: torch.Tensor, shape: tuple[int, ...], out: torch.Tensor | None, asked: torch.dtype | None
) -> torch.dtype:
    if out is not None:
        if not isinstance(out, torch.Tensor) or tuple(out.shape) != shape or out.device != a.device:
            raise ValueError(f"matmul: out: expected {shape} on {a.device}, got {said(out)}")
        if asked not in (None, out.dtype):
            raise ValueError(f"matmul: out_dtype: expected {out.dtype} as out, got {asked}")
        if _folded(out):
            raise ValueError(f"matmul: out: expected memory of its own for each element, got strides {out.stride()}")
        first, last = _span(out)
        if any(max(begin, first) < min(end, last) for begin, end in (_span(b), _span(a.values))):
            raise ValueError("matmul: out: expected memory apart from b and the values, got some of theirs")
        asked = out.dtype
    dtype = b.dtype if asked is None else asked
    if dtype not in _OUT and dtype != b.dtype:
        raise TypeError(f"matmul: out_dtype: expected float16, bfloat16 or float32, got {dtype}")
    return dtype


def _span(part: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and behind its last; twice the same for one without elements."""
    begin = part.data_ptr()
    if part.is_contiguous() or not part.numel():
        return begin, begin + part.nbytes
    last = sum((n - 1) * step for n, step in zip(part.shape, part.stride(), strict=True))
    return begin, begin + part.itemsize * (1 + last)


def _folded(out: torch.Tensor) -> bool:
    """Whether elements may share memory: a step that does not reach beyond all smaller ones."""
    if out.is_contiguous():
        return False
    reach = 0
    for step, n in sorted(zip(out.stride(), out.shape, strict=True)):
        if n > 1 and step <= reach and out.numel():
            return True
        reach += step * (n - 1)
    return False


def in_core(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype in _CORE or (dtype == torch.float32 and device.type == "cpu")


def _way(a: BSRMatrix, n: int, transpose: bool, method: Method) -> int:
    """1: the blocks as they are; 2, 4, 8: joined so many by so many; DENSE."""
    if method != "auto" or n == 0:
        return DENSE if method == "dense" else 1
    if not in_core(a.dtype, a.device):
        return DENSE
    return choose(a.structure, n, transpose, a.dtype)


def choose(structure: Structure, n: int, transpose: bool, dtype: torch.dtype) -> int:
    """The way that is expected to be the fastest; remembered."""
    key = (n, transpose, dtype)
    if key not in structure.ways:
        rates = breakeven.rates_of(structure.device, dtype)
        joined = [f for f in (2, 4, 8) if f * structure.block <= BLOCKS[-1] and rates.merges and structure.count]
        times = {DENSE: breakeven.dense_us(rates, structure.shape, n, dtype.itemsize)}
        for factor in (1, *joined):
            larger = structure.in_blocks_of(factor * structure.block)
            facts = (larger.shape, larger.block, larger.count, larger.plan(transpose).steps)
            times[factor] = breakeven.sparse_us(rates, *facts, n, dtype.itemsize)
        structure.ways[key] = min(times, key=lambda way: times[way])
    return structure.ways[key]


# ---- without gradients


def _product(
    values: torch.Tensor,
    plan: torch.Tensor,
    b: torch.Tensor,
    shape: tuple[int, int],
    transpose: bool,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    beta: float = 0.0,
) -> torch.Tensor:
    """op(A)·b + beta·out by the core, or dense for values that it does not multiply."""
    if not in_core(values.dtype, values.device):
        dense = convert.scattered(values, *places(plan, shape, transpose, len(values)), shape)
        return _dense_product(dense, b, transpose, dtype, out, beta)
    rows, n = shape[1 if transpose else 0], b.shape[1]
    b = _readable(b)
    # Rows that TMA can write lie a multiple of 16 bytes apart.
    made = torch.empty(rows, _pitch(n, dtype, b.device), dtype=dtype, device=b.device)[:, :n] if out is None else out
    if (made.stride(1) != 1 and n > 1) or (made.stride(0) < n and rows > 1):
        assert out is not None
        made = out.contiguous()
    on_cuda = b.device.type == "cuda"
    workspace = torch.empty(_C.BSR_WORKSPACE, dtype=torch.uint8, device=b.device) if on_cuda else None
    _C.bsr_matmul(made, values.detach(), plan, b.detach(), workspace, *shape, int(transpose), float(beta))
    if out is not None and made is not out:
        out.copy_(made)
        return out
    return made if out is not None else made.contiguous()


def _pitch(n: int, dtype: torch.dtype, device: torch.device) -> int:
    """Elements from row to row of a new tensor."""
    step = _ALIGNED // dtype.itemsize
    return -(-n // step) * step if device.type == "cuda" else n


def _readable(b: torch.Tensor) -> torch.Tensor:
    """b, or a copy whose rows are contiguous and, on CUDA, lie where TMA reads them."""
    contiguous = (b.stride(1) == 1 or b.shape[1] <= 1) and (b.stride(0) >= b.shape[1] or b.shape[0] <= 1)
    if b.device.type == "cpu":
        return b if contiguous else b.contiguous()
    if contiguous and b.data_ptr() % _ALIGNED == 0 and b.stride(0) * b.itemsize % _ALIGNED == 0:
        return b
    copy = torch.empty(b.shape[0], _pitch(b.shape[1], b.dtype, b.device), dtype=b.dtype, device=b.device)
    return copy[:, : b.shape[1]].copy_(b)


def _dense_product(
    dense: torch.Tensor,
    b: torch.Tensor,
    transpose: bool,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    beta: float = 0.0,
) -> torch.Tensor:
    left = dense.T if transpose else dense
    if dtype == b.dtype:
        if out is None:
            return left @ b
        return torch.addmm(out, left, b, beta=beta, out=out) if beta else torch.mm(left, b, out=out)
    if b.device.type == "cuda" and b.dtype in _CORE:
        found: torch.Tensor = _Widened.apply(left, b)  # type: ignore[no-untyped-call,unused-ignore]
    else:
        found = left.float() @ b.float()
    if out is None:
        return found.to(dtype)
    # Rounded once, with what is added.
    return out.copy_(found.add_(out, alpha=beta) if beta else found)


class _Widened(torch.autograd.Function):
    """left·b of 16-bit matrices in float32 (CUDA), of which torch knows no derivative."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left, b)
        return torch.mm(left, b, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        left, b = ctx.saved_tensors
        grad = grads[0].to(b.dtype)
        return grad @ b.T if ctx.needs_input_grad[0] else None, left.T @ grad if ctx.needs_input_grad[1] else None


# ---- torch's operators


@torch.library.custom_op("kvcomp::bsr_matmul", mutates_args=())
def matmul_op(
    values: torch.Tensor,
    plan: torch.Tensor,
    plan_transposed: torch.Tensor,
    b: torch.Tensor,
    m: int,
    k: int,
    transpose: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """op(A)·b; plan, plan_transposed: of A and of its transpose, whichever of them the product is of."""
    return _product(values, plan_transposed if transpose else plan, b, (m, k), transpose, dtype)


@matmul_op.register_fake
def _matmul_fake(
    values: torch.Tensor,
    plan: torch.Tensor,
    plan_transposed: torch.Tensor,
    b: torch.Tensor,
    m: int,
    k: int,
    transpose: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return b.new_empty(k if transpose else m, b.shape[1], dtype=dtype)


@torch.library.custom_op("kvcomp::bsr_sddmm", mutates_args=())
def sddmm_op(
    plan: torch.Tensor,
    plan_transposed: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    count: int,
    block: int,
) -> torch.Tensor:
    """The blocks of left (m, n) · right (k, n)ᵀ that A stores, (count, block, block)."""
    if in_core(left.dtype, left.device):
        found = left.new_empty(count, block, block)
        _C.bsr_sddmm(found, plan, _readable(left).detach(), _readable(right).detach(), 0)
        return found
    shape = (left.shape[0], right.shape[0])
    rows, columns = places(plan, shape, False, count)
    product = torch.nn.functional.pad(left @ right.T, (0, -shape[1] % block, 0, -shape[0] % block))
    whole = product.view(-(-shape[0] // block), block, -(-shape[1] // block), block)
    return whole.transpose(1, 2)[rows, columns]


@sddmm_op.register_fake
def _sddmm_fake(
    plan: torch.Tensor,
    plan_transposed: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    count: int,
    block: int,
) -> torch.Tensor:
    return left.new_empty(count, block, block)


def places(
    plan: torch.Tensor, shape: tuple[int, int], transpose: bool, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of A's blocks, as its plan has them."""
    tiles = -(-shape[1 if transpose else 0] // _TILE_ROWS)
    first = _HEAD_WORDS + _TILE_WORDS * tiles
    places = plan[first : first + 2 * count].view(count, 2).long()
    return places[:, 0], places[:, 1]


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, plan, plan_transposed, b, m, k, transpose, _ = inputs
    ctx.save_for_backward(values, plan, plan_transposed, b)
    ctx.fixed = (m, k, transpose)


def _matmul_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    values, plan, plan_transposed, b = ctx.saved_tensors
    m, k, transpose = ctx.fixed
    grad = grad.to(b.dtype)
    of_values = of_b = None
    if ctx.needs_input_grad[0]:
        left, right = (b, grad) if transpose else (grad, b)
        of_values = sddmm_op(plan, plan_transposed, left, right, values.shape[0], values.shape[1])
    if ctx.needs_input_grad[3]:
        of_b = matmul_op(values, plan, plan_transposed, grad, m, k, not transpose, b.dtype)
    return of_values, None, None, of_b, None, None, None, None


matmul_op.register_autograd(_matmul_backward, setup_context=_matmul_setup)


def _sddmm_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _sddmm_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The same blocks as values: times right, and transposed times left."""
    plan, plan_transposed, left, right = ctx.saved_tensors
    fixed = (left.shape[0], right.shape[0])
    grad = grad.contiguous()
    of_left = of_right = None
    if ctx.needs_input_grad[2]:
        of_left = matmul_op(grad, plan, plan_transposed, right, *fixed, False, left.dtype)
    if ctx.needs_input_grad[3]:
        of_right = matmul_op(grad, plan, plan_transposed, left, *fixed, True, right.dtype)
    return None, None, of_left, of_right, None, None


sddmm_op.register_autograd(_sddmm_backward, setup_context=_sddmm_setup)


def product(
    values: torch.Tensor, structure: Structure, b: torch.Tensor, transpose: bool, dtype: torch.dtype
) -> torch.Tensor:
    """op(A)·b by torch's operator: with gradients, and as one node for torch.compile."""
    words = structure.plan(False).words, structure.plan(True).words
    found: torch.Tensor = matmul_op(values, *words, b, *structure.shape, transpose, dtype)
    return found


def _with_gradients(a: BSRMatrix, b: torch.Tensor, transpose: bool, dtype: torch.dtype, way: int) -> torch.Tensor:
    if way == DENSE and in_core(a.dtype, a.device):
        return _dense_product(a.to_dense(), b, transpose, dtype)
    if way in (1, DENSE):
        return product(a.values, a.structure, b, transpose, dtype)
    merged = a.structure.merged(way)
    return product(merged.values(a.values), merged.structure, b, transpose, dtype)
