"""The attention and mask functions that transformers knows as "kvcomp".

A packed layer's `update` hands on the new rows as fresh views that carry the layer itself; the attention function reads
it from `key`. The first pass over a prompt goes to the implementation that was set before, and the layer is then
measured and compressed, at once or with all others; later passes append to and attend over the packed bytes. Without a
packed layer both functions are the ones that were set before, so that plain generation is unchanged.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .library import append_attend
from .support import check_arguments

NAME = "kvcomp"
_LAYER = "_kvc_layer"  # on a key: the packed layer it belongs to
_REAL = "_kvc_real"  # on a mask: (b, positions) bool of real tokens, None where none is padding
STEP = "_kvc_step"  # on an attention module, during a decode step (step.py): its packed layer's handle


class Implementation(str):
    """The name "kvcomp" as set in a configuration, together with the name that was set before. Copies of the
    configuration keep both."""

    previous: str

    def __new__(cls, name: str = NAME) -> "Implementation":
        return super().__new__(cls, name)


class WaitingLayer(Protocol):
    """What the attention function asks of a packed layer."""

    index: int
    config: Any

    def first(self, queries: torch.Tensor, real: torch.Tensor | None, scale: float, softcap: float) -> None: ...
    def later(self, queries: torch.Tensor, real: torch.Tensor | None, scale: float, softcap: float) -> torch.Tensor: ...
    def give_back(self) -> None: ...
    @property
    def is_first(self) -> bool: ...


class _Waiting(threading.local):
    """Packed layers that have taken new rows and whose attention has not run yet."""

    def __init__(self) -> None:
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()


_waiting = _Waiting()


def set_implementation(config: Any) -> None:
    """Makes the modules that hold `config` call "kvcomp", which remembers what they called before."""
    before = config._attn_implementation
    if isinstance(before, Implementation):
        return
    name = Implementation()
    # None: no model has been built from this configuration; transformers' own first choice.
    name.previous = "sdpa" if before in (None, NAME) else before
    if name.previous not in AttentionMaskInterface._global_mapping:
        raise NotImplementedError(
            f"Cache: config: expected an attention implementation with a mask function, got {before}"
        )
    config._attn_implementation = name


def _previous(config: Any) -> str:
    name = config._attn_implementation
    return name.previous if isinstance(name, Implementation) else "sdpa"


def hand_on(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """keys, values as fresh views, the former carrying `layer`, which from now on waits for its attention."""
    for other in _waiting.layers:
        if other.config is layer.config:
            index = other.index
            _waiting.layers.clear()
            raise RuntimeError(
                f"Cache: layer {index}: its attention did not run as {NAME!r}: expected the configuration that the "
                f"model's modules hold (model.config), got another one, or a model with an attention of its own"
            )
    _waiting.layers.add(layer)
    tagged = keys.view_as(keys)
    setattr(tagged, _LAYER, layer)
    return tagged, values.view_as(values)


def forget(layer: Any) -> None:
    """`layer` waits no more."""
    _waiting.layers.discard(layer)


def _previous_attention(module: torch.nn.Module) -> Callable[..., Any]:
    """The function that `module` called before: its file's own eager one, or a registered one."""
    for kind in type(module).__mro__:
        file = vars(sys.modules[kind.__module__])
        if "eager_attention_forward" in file:
            functions = file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
            found: Callable[..., Any] = functions.get_interface(
                _previous(module.config), file["eager_attention_forward"]
            )
            return found
    found = ALL_ATTENTION_FUNCTIONS[_previous(module.config)]
    return found


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query (b,hq,q,d), key and value (b,h,q,d) -> output (b,q,hq,d) and no weights."""
    handle: torch.Tensor | None = getattr(module, STEP, None)
    if handle is not None:  # what it is called with was checked when the prompt came by
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = append_attend(query, key, value, handle, scale, arguments.get("softcap") or 0.0)
        return out.transpose(1, 2).contiguous(), None
    layer: WaitingLayer | None = getattr(key, _LAYER, None)
    if layer is None:
        for other in _waiting.layers:
            if other.config is module.config:
                forget(other)
                other.give_back()
                raise RuntimeError(
                    f"Cache: layer {other.index}: the mark on its keys was lost between update and attention: "
                    f"{type(module).__name__} changes them on the way"
                )
        plain: tuple[torch.Tensor, torch.Tensor | None] = _previous_attention(module)(
            module, query, key, value, attention_mask, scaling=scaling, **arguments
        )
        return plain
    if layer not in _waiting.layers:
        raise RuntimeError(f"Cache: layer {layer.index}: expected one attention call for every update, got two")
    forget(layer)
    try:
        return _packed_attention(layer, module, query, key, value, attention_mask, scaling, arguments)
    except BaseException:
        layer.give_back()
        raise


def _packed_attention(
    layer: WaitingLayer,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    check_arguments(module, arguments)
    if attention_mask is not None and not hasattr(attention_mask, _REAL):
        raise NotImplementedError(
            f"Cache: attention_mask: expected a causal mask, made from (b, positions), got another one of shape "
            f"{tuple(attention_mask.shape)}"
        )
    real = getattr(attention_mask, _REAL, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = arguments.get("softcap") or 0.0
    if not layer.is_first:
        return layer.later(query, real, scale, softcap).transpose(1, 2).contiguous(), None
    out, _ = _previous_attention(module)(module, query, key, value, attention_mask, scaling=scaling, **arguments)
    layer.first(query, real, scale, softcap)
    return out, None


def mask(
    *,
    q_length: int,
    kv_offset: int = 0,
    q_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    config: Any,
    **arguments: Any,
) -> Any:
    """The mask that was made before; but for later passes over a packed cache (whose layers ask for a mask of the new
    rows alone, get_mask_sizes) the 2-D padding mask itself, or None without one. Both carry the padding mask, which
    the attention function asks for; masks of patterns that it does not know come without."""
    later = isinstance(kv_offset, int) and kv_offset > 0 and kv_offset == q_offset
    if later and (q_length == 1 or mask_function is causal_mask_function):
        made: Any = None if attention_mask is None else attention_mask.view_as(attention_mask)
    else:
        made = ALL_MASK_ATTENTION_FUNCTIONS[_previous(config)](
            q_length=q_length,
            kv_offset=kv_offset,
            q_offset=q_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            **arguments,
        )
        if later:
            return made
    if made is not None:
        setattr(made, _REAL, attention_mask)
    return made


def register() -> None:
    """Makes both functions known to transformers. A mask function that is missing would mean no mask at all."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
