"""Layers that a module calls with the same x (queries, keys and values; gate and up) as one product: at few rows of x
most of a product's time is not its bytes'.

The packed bytes of a stack's layers lie behind each other in one buffer, of which their weights are views. The first of
them, when it is called, computes the product of all, and a sibling that is called next with the very same x takes its
part of that. Whatever else is called, or changed, or moved apart, is multiplied alone. Not seen are changes of x in
place between the calls in compiled code, and of inference tensors, whose changes torch does not count."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from ..siblings import SETS
from . import library

if TYPE_CHECKING:
    from .linear import SharedScaleLinear

# Rows of x: more take as long apart, and the parts of a product of many, each of which keeps all of it, would be large.
MOST_ROWS = 256
_WHOLE = 64  # rows of W: parts before the last one end with a strip (csrc/kvcomp/w4.h)
_OTHER_X = ("cross", "encoder_attn")  # in the path of modules whose keys and values are of another x


class _Hand(threading.local):
    """The product whose parts have not all been taken, one at most: (x, product, outputs of each layer, their (weight,
    bias, exponent), how all that was then, the first layer whose part may be taken)."""

    open: tuple[Any, ...] | None = None


class _TracedHand:
    """As _Hand, of code that is being compiled: empty again where the code ends."""

    open: tuple[Any, ...] | None = None


_plain, _traced = _Hand(), _TracedHand()
# The first layer of the stack that a layer is of.
_firsts: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[SharedScaleLinear]] = weakref.WeakKeyDictionary()


def stack_layers(model: torch.nn.Module) -> int:
    """Stacks the quantized layers below ``model`` that belong together: children of one module with the names of a set,
    of one number of inputs and one format, all or none with biases, in no other module; not those of cross-attention.
    Their number."""
    modules = dict(model.named_modules())
    uses = Counter(id(child) for module in modules.values() for child in module.children())
    count = 0
    for path, module in modules.items():
        if any(mark in path for mark in _OTHER_X):
            continue
        for names in SETS:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if _fit(layers) and all(uses[id(layer)] == 1 for layer in layers):
                for rank, layer in enumerate(layers):
                    layer.stack_rank = rank
                layers[0].stack_siblings = tuple(layers[1:])
                restored(layers[0])
                count += 1
    return count


def stacked(model: torch.nn.Module) -> int:
    """Stacks below ``model`` that lie in one buffer each."""
    stacks = [_layers(module) for module in model.modules() if getattr(module, "stack_siblings", ())]
    return sum(library.joined([layer.weight for layer in layers]) is not None for layers in stacks)


def restored(layer: SharedScaleLinear) -> None:
    """A layer, if it is the first of a stack, is found from all of it, and what they hold is one buffer: after it was
    made, copied or pickled, which keeps no views."""
    if layer.stack_siblings:
        for each in _layers(layer):
            _firsts[each] = weakref.ref(layer)
        _settle(_layers(layer))


def moved(layer: SharedScaleLinear) -> None:
    """What a stack's layers hold is one buffer again, once all of them are in one place, whichever comes last."""
    found = _firsts.get(layer)
    first = None if found is None else found()
    if first is not None:
        _settle(_layers(first))


def part(layer: SharedScaleLinear, given: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """What a stacked layer makes of x, which is `given` or what autocast made of it: (..., its outputs), a view of the
    stack's product. None: it is to be multiplied alone."""
    if x.numel() > MOST_ROWS * layer.in_features:
        return None
    tracing = torch.compiler.is_dynamo_compiling()
    hand = _traced if tracing else _plain
    return _open(hand, layer, given, x, tracing) if layer.stack_siblings else _take(hand, layer, given, x, tracing)


def _open(hand: Any, layer: SharedScaleLinear, given: Any, x: torch.Tensor, tracing: bool) -> torch.Tensor | None:
    layers = _layers(layer)
    weights = [each.weight for each in layers]
    biases = [each.bias for each in layers if each.bias is not None]
    exponents = [each.exponent for each in layers]
    if len(biases) not in (0, len(layers)) or None in exponents:
        return None
    if any(held.device != x.device for held in (*weights, *biases)):
        return None
    call = torch.ops.kvcomp.w4_stack if tracing else library.stack
    rows = [each.out_features for each in layers]
    out: torch.Tensor | None = call(
        x, weights, biases, rows, layer.in_features, layer.group_size, layer.scale_mbits, exponents
    )
    if out is None:
        return None
    held = list(zip(weights, biases or [None] * len(rows), exponents, strict=True))
    before = None if tracing else (_moment(given), [_versions(*each) for each in held])
    hand.open = given, out, rows, held, before, 1
    return out.narrow(-1, 0, rows[0])


def _take(hand: Any, layer: SharedScaleLinear, given: Any, x: torch.Tensor, tracing: bool) -> torch.Tensor | None:
    rank = layer.stack_rank
    if rank is None or hand.open is None:
        return None
    of, out, rows, held, before, due = hand.open
    # A part is given once: whoever has it may change it.
    if of is not given or out.dtype != x.dtype or not due <= rank < len(rows):
        return None
    weight, bias, exponent = held[rank]
    if weight is not layer.weight or bias is not layer.bias or exponent != layer.exponent:
        return None
    if not tracing and (before[0] != _moment(given) or before[1][rank] != _versions(*held[rank])):
        return None
    hand.open = None if rank == len(rows) - 1 else (of, out, rows, held, before, rank + 1)
    return out.narrow(-1, sum(rows[:rank]), rows[rank])  # type: ignore[no-any-return]


def _moment(given: torch.Tensor) -> tuple[Any, ...]:
    """What must be the same when a sibling is called: x has not changed, and what is computed now comes behind the
    product."""
    return _versions(given), torch.is_inference_mode_enabled(), library.place(given)


def _versions(*held: Any) -> tuple[int | None, ...]:
    """How often tensors have been changed in place."""
    return tuple([one._version if isinstance(one, torch.Tensor) and not one.is_inference() else None for one in held])


def _layers(first: Any) -> list[Any]:
    return [first, *first.stack_siblings]


def _fit(layers: list[Any]) -> bool:
    from .linear import SharedScaleLinear

    if any(type(layer) is not SharedScaleLinear or layer.stack_rank is not None for layer in layers):
        return False
    kinds = {(layer.in_features, layer.group_size, layer.scale_mbits, layer.bias is None) for layer in layers}
    return len(kinds) == 1 and all(layer.out_features % _WHOLE == 0 for layer in layers[:-1])


def _settle(layers: list[Any]) -> None:
    """Weights, and biases, of one kind that lie apart become views of one buffer."""
    for name in ("weight", "bias"):
        held = [getattr(layer, name) for layer in layers]
        if any(one is None or one.is_meta for one in held) or len({(one.device, one.dtype) for one in held}) > 1:
            continue
        if library.joined(held) is not None:
            continue
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat(held)
            if whole.is_cuda:  # kernels begin to read weights before what the stream still does has ended
                torch.cuda.current_stream(whole.device).synchronize()
            end = 0
            for layer, one in zip(layers, held, strict=True):
                begin, end = end, end + len(one)
                view = whole[begin:end]
                setattr(layer, name, view if name == "weight" else torch.nn.Parameter(view, requires_grad=False))
