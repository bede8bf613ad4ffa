"""The operations on packed layers, as torch.library knows them, so that torch.compile fuses the rest of a model around
them: ``kvcomp::append_attend``, which is what decode steps do, ``kvcomp::append`` and ``kvcomp::attend``; and those on
tensors alone (``divide``, ``score``, ``norms``, ``select``, ``accumulate``, ``pack``), which write to what they are
given and take the arguments of ``_C``; shapes and units stand in the core's headers.

A packed layer is named by a tensor that holds its number: as a tensor it is an input of compiled code, which all layers
of a model then share (a number would be compiled in); and as one that is written to, since what it names is.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .. import _C

_numbers = itertools.count(1)
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def handle(layer: Any) -> torch.Tensor:
    """(1,) int64 on the CPU: a new number of `layer`, anything with an ``append_attend``, for as long as that lives."""
    number = next(_numbers)
    _layers[number] = layer
    with torch.inference_mode(False):  # what is written to must have a version
        return torch.tensor([number], dtype=torch.int64, device="cpu")


def _found(op: str, layer: torch.Tensor) -> Any:
    found = _layers.get(int(layer))
    if found is None:
        raise RuntimeError(f"{op}: layer: expected the handle of a packed layer, got {int(layer)}")
    return found


@torch.library.custom_op("kvcomp::append_attend", mutates_args=("layer",))
def append_attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """queries (b,hq,q,d), keys and values (b,h,q,d), all real tokens -> attention output, shaped as queries:
    the rows are appended to the layer of this handle and attended over with all others."""
    out: torch.Tensor = _found("append_attend", layer).append_attend(
        queries, keys, values, scale=scale, softcap=softcap
    )
    return out.contiguous()


@append_attend.register_fake
def _(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return queries.new_empty(queries.shape)


@torch.library.custom_op("kvcomp::append", mutates_args=("layer",))
def append(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor) -> None:
    """keys and values (b,h,q,d), all real tokens, are appended to the layer of this handle."""
    _found("append", layer).append(keys, values)


@append.register_fake
def _(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor) -> None:
    return None


# A layer that is only read is named as one that is written, too: no attention moves across an append to it.
@torch.library.custom_op("kvcomp::attend", mutates_args=("layer",))
def attend(queries: torch.Tensor, layer: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """queries (b,hq,q,d) of the newest q tokens -> attention output over this handle's layer, causal among them."""
    out: torch.Tensor = _found("attend", layer).attend(queries, scale=scale, softcap=softcap)
    return out.contiguous()


@attend.register_fake
def _(queries: torch.Tensor, layer: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    return queries.new_empty(queries.shape)


# ---- on tensors alone


def _layout(layout: Sequence[int]) -> tuple[int, int, int, int, int]:
    head_dim, group, zero_point, half, scale_dtype = layout
    return head_dim, group, zero_point, half, scale_dtype


@torch.library.custom_op("kvcomp::divide", mutates_args=("divisions",))
def divide(
    divisions: torch.Tensor,
    tables: torch.Tensor,
    lists: torch.Tensor,
    layout: Sequence[int],
) -> None:
    """The work of attention over all layers' lists, shared out by bytes."""
    _C.divide(divisions, tables, lists, _layout(layout))


@torch.library.custom_op("kvcomp::score", mutates_args=("importance", "workspace"))
def score(
    importance: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    first: torch.Tensor | None,
    workspace: torch.Tensor,
    scale: float,
    softcap: float,
    reduce: int,
    pool_kind: int,
    pool: int,
) -> None:
    """What a prompt's last queries attend to."""
    _C.score(importance, queries, keys, first, workspace, scale, softcap, reduce, pool_kind, pool)


@torch.library.custom_op("kvcomp::norms", mutates_args=("out",))
def norms(
    out: torch.Tensor,
    rows: torch.Tensor,
    first: torch.Tensor | None,
    centered: int,
) -> None:
    """L2 norms of rows."""
    _C.norms(out, rows, first, centered)


@torch.library.custom_op("kvcomp::select", mutates_args=("kept", "workspace"))
def select(
    kept: torch.Tensor,
    importance: torch.Tensor | None,
    keep: torch.Tensor,
    first: torch.Tensor | None,
    workspace: torch.Tensor,
    sinks: int,
    window: int,
) -> None:
    """The most important tokens of every list."""
    _C.select(kept, importance, keep, first, workspace, sinks, window)


@torch.library.custom_op("kvcomp::accumulate", mutates_args=("worth",))
def accumulate(
    worth: torch.Tensor,
    mass: torch.Tensor,
    table: torch.Tensor,
    lists: torch.Tensor,
    keep: float,
    gain: float,
) -> None:
    """Attention mass onto what tokens were worth."""
    _C.accumulate(worth, mass, table, lists, keep, gain)


@torch.library.custom_op("kvcomp::pack", mutates_args=("arena",))
def pack(
    arena: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    lists: torch.Tensor,
    start: torch.Tensor,
    tokens: torch.Tensor,
    layout: Sequence[int],
    rotation: int,
    scale: int,
    stochastic: int,
    layer: int,
    seed: int,
) -> None:
    """Rows into packed pages of an arena that is a tensor."""
    _C.pack(arena, keys, values, pages, lists, start, tokens, _layout(layout), rotation, scale, stochastic, layer, seed)


def _written(*arguments: Any) -> None:
    """What these give back of fake tensors: nothing."""


for _op in (divide, score, norms, select, accumulate, pack):
    _op.register_fake(_written)
