"""The C extension. Arguments are positional; tensors are NumPy arrays or anything that speaks DLPack.

Contracts (shapes, units, layout, errors, sources): csrc/kvcomp/<operation>.h.
"""

from typing import Any, TypeAlias, final

import numpy as np

_Tensor: TypeAlias = Any
_Layout: TypeAlias = tuple[int, int, int, int, int]

class BudgetError(ValueError):
    least_bytes: int

class CudaError(RuntimeError): ...

@final
class Arena:
    """Page memory on the CPU or a CUDA device: address space reserved once, committed and given back by the slab."""

    def __new__(cls, reserve_bytes: int | None = None, device: int = -1) -> Arena: ...
    def alloc(self, page_bytes: int, count: int, /) -> np.ndarray[Any, np.dtype[np.uint32]]: ...
    def free(self, page_bytes: int, units: np.ndarray[Any, np.dtype[np.uint32]], /) -> None: ...
    def copy(
        self,
        page_bytes: int,
        source: np.ndarray[Any, np.dtype[np.uint32]],
        target: np.ndarray[Any, np.dtype[np.uint32]],
        /,
    ) -> None: ...
    def read(self, page_bytes: int, units: np.ndarray[Any, np.dtype[np.uint32]], bytes: _Tensor, /) -> None: ...
    def write(self, page_bytes: int, units: np.ndarray[Any, np.dtype[np.uint32]], bytes: _Tensor, /) -> None: ...
    def compact(self, page_bytes: int, units: np.ndarray[Any, np.dtype[np.uint32]], /) -> None: ...
    @property
    def device(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def used(self) -> int: ...

def pack(
    arena: Arena | _Tensor,
    keys: _Tensor,
    values: _Tensor,
    pages: _Tensor,
    lists: _Tensor,
    start: _Tensor,
    tokens: _Tensor,
    layout: _Layout,
    rotation: int,
    scale: int,
    stochastic: int,
    layer: int,
    seed: int,
    /,
) -> None: ...
def unpack(
    keys: _Tensor,
    values: _Tensor,
    arena: Arena | _Tensor,
    pages: _Tensor,
    lists: _Tensor,
    start: _Tensor,
    tokens: _Tensor,
    layout: _Layout,
    rotation: int,
    /,
) -> None: ...
def append(
    arena: Arena | _Tensor,
    table: _Tensor,
    lists: _Tensor,
    pool_tail: _Tensor,
    pool_packed: _Tensor,
    left: _Tensor,
    keys: _Tensor,
    values: _Tensor,
    valid: _Tensor | None,
    classes: _Tensor,
    layout: _Layout,
    window: int,
    rotation: int,
    scale: int,
    stochastic: int,
    layer: int,
    seed: int,
    /,
) -> None: ...
def append_walk(
    table: _Tensor,
    lists: _Tensor,
    pool_tail: _Tensor,
    pool_packed: _Tensor,
    left: _Tensor,
    valid: _Tensor | None,
    classes: _Tensor,
    window: int,
    q: int,
    /,
) -> None: ...
def append_need(tail_tokens: int, q: int, window: int, packs: bool, /) -> tuple[int, int]: ...
def attend(
    out: _Tensor,
    mass: _Tensor | None,
    queries: _Tensor,
    arena: Arena | _Tensor,
    table: _Tensor,
    lists: _Tensor,
    new_tokens: _Tensor | None,
    workspace: _Tensor,
    layout: _Layout,
    rotation: int,
    scale: float,
    softcap: float,
    threads: int,
    division: _Tensor | None,
    early: int,
    /,
) -> None: ...
def attend_workspace(lists: int, pages: int, group: int, q: int, head_dim: int, /) -> int: ...
def attend_workspace_cuda(n: int, c: int, group: int, q: int, head_dim: int, mass_tokens: int, /) -> int: ...
def divide(divisions: _Tensor, tables: _Tensor, lists: _Tensor, layout: _Layout, /) -> None: ...
def divide_words(n: int, device: int, /) -> int: ...
def rotate(out: _Tensor, rows: _Tensor, matrix: _Tensor, transpose: bool, /) -> None: ...
def page_bytes(layout: _Layout, k_bits: int, v_bits: int, /) -> int: ...
def page_tokens(k_bits: int, v_bits: int, /) -> int: ...
def scale_bytes(layout: _Layout, k_bits: int, v_bits: int, /) -> int: ...
def score(
    importance: _Tensor,
    queries: _Tensor,
    keys: _Tensor,
    first: _Tensor | None,
    workspace: _Tensor,
    scale: float,
    softcap: float,
    reduce: int,
    pool_kind: int,
    pool: int,
    /,
) -> None: ...
def score_workspace(b: int, hq: int, w: int, s: int, d: int, /) -> int: ...
def norms(out: _Tensor, rows: _Tensor, first: _Tensor | None, centered: int, /) -> None: ...
def accumulate(
    worth: _Tensor,
    mass: _Tensor,
    table: _Tensor,
    lists: _Tensor,
    keep: float,
    gain: float,
    /,
) -> None: ...
def select(
    kept: _Tensor,
    importance: _Tensor | None,
    keep: _Tensor,
    first: _Tensor | None,
    workspace: _Tensor,
    sinks: int,
    window: int,
    /,
) -> None: ...
def select_workspace(n: int, s: int, /) -> int: ...
def ada(
    kept: _Tensor,
    importance: _Tensor,
    keep: _Tensor,
    first: _Tensor | None,
    workspace: _Tensor,
    heads: int,
    floor: _Tensor,
    sinks: int,
    window: int,
    /,
) -> None: ...
def ada_workspace(n: int, s: int, /) -> int: ...
def share(shares: _Tensor, weight: _Tensor, floor: _Tensor, ceiling: _Tensor, total: int, /) -> None: ...
def pyramid(weight: _Tensor, beta: float, /) -> None: ...
def plan(
    k_bits: _Tensor,
    v_bits: _Tensor,
    importance: _Tensor,
    kept: _Tensor,
    fixed: _Tensor,
    distortion_k: _Tensor,
    distortion_v: _Tensor,
    drop: _Tensor,
    allowed: _Tensor,
    least_tokens: _Tensor | None,
    guard: _Tensor | None,
    groups: _Tensor | None,
    workspace: _Tensor,
    layout: _Layout,
    budget: int,
    entry_bytes: int,
    list_bytes: int,
    fixed_class: int,
    /,
) -> tuple[int, int, int, int, int, float]: ...
def plan_workspace(n: int, s: int, /) -> int: ...
def shrink(
    k_bits: _Tensor,
    v_bits: _Tensor,
    lists: _Tensor,
    counts: _Tensor | None,
    weight: _Tensor,
    distortion_k: _Tensor,
    distortion_v: _Tensor,
    drop: _Tensor,
    allowed: _Tensor,
    workspace: _Tensor,
    layout: _Layout,
    entry_bytes: int,
    wanted: int,
    /,
) -> int: ...
def shrink_workspace(n: int, m: int, /) -> int: ...
def bsr_check(indptr: _Tensor, indices: _Tensor, m: int, k: int, block: int, /) -> None: ...
def bsr_plan_words(m: int, k: int, block: int, nnzb: int, transpose: int, /) -> int: ...
def bsr_plan(
    plan: _Tensor,
    indptr: _Tensor,
    indices: _Tensor,
    m: int,
    k: int,
    block: int,
    transpose: int,
    /,
) -> int: ...
def bsr_merge(
    indptr_out: _Tensor,
    indices_out: _Tensor,
    place: _Tensor,
    indptr: _Tensor,
    indices: _Tensor,
    m: int,
    k: int,
    block: int,
    factor: int,
    /,
) -> int: ...
def bsr_matmul(
    out: _Tensor,
    values: _Tensor,
    plan: _Tensor,
    dense: _Tensor,
    workspace: _Tensor | None,
    m: int,
    k: int,
    transpose: int,
    beta: float,
    /,
) -> None: ...
def bsr_sddmm(out: _Tensor, plan: _Tensor, left: _Tensor, right: _Tensor, transpose: int, /) -> None: ...
def w4_bytes(n: int, k: int, group: int, scale_bits: int, /) -> int: ...
def w4_scales(out: _Tensor, scales: _Tensor, scale_bits: int, exponent: int, rounding: int, /) -> None: ...
def w4_pack(
    packed: _Tensor,
    weights: _Tensor,
    group: int,
    scale_bits: int,
    exponent: int | None,
    rounding: int,
    threads: int,
    /,
) -> int: ...
def w4_unpack(
    out: _Tensor | None,
    codes: _Tensor | None,
    scales: _Tensor | None,
    packed: _Tensor,
    n: int,
    k: int,
    group: int,
    scale_bits: int,
    exponent: int,
    threads: int,
    /,
) -> None: ...
def w4_matmul(
    out: _Tensor,
    x: _Tensor,
    packed: _Tensor,
    bias: _Tensor | None,
    workspace: _Tensor | None,
    group: int,
    scale_bits: int,
    exponent: int | tuple[tuple[int, int], ...],
    threads: int,
    early: int,
    /,
) -> None: ...
def w4_workspace(m: int, n: int, k: int, /) -> int: ...
def set_threads(threads: int, /) -> None: ...
def threads() -> int: ...
def cuda_info() -> dict[str, Any]: ...
def simd() -> str: ...

BSR_WORKSPACE: int
FORMAT_VERSION: int
VERSION: str
