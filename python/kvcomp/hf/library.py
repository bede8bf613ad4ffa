"""The operations on packed layers, as torch.library knows them, so that torch.compile fuses the rest of a model around
them: ``kvcomp::append_attend``, which is what decode steps do, ``kvcomp::append`` and ``kvcomp::attend``.

A packed layer is named by a tensor that holds its number: as a tensor it is an input of compiled code, which all layers
of a model then share (a number would be compiled in); and as one that is written to, since what it names is.
"""

import itertools
import weakref
from typing import Any

import torch

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
