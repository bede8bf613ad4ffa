"""One decode step of a model over a packed cache: which forward passes are one, and how a model runs it.

A step is a pass of one new token of every sequence. While it runs, every attention module holds its packed layer's
handle, and the attention function is one call of ``kvcomp::append_attend``: without marks on keys, weak references or
other things that neither torch.compile nor a CUDA graph could take along."""

import contextlib
import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import first_line
from .attention import NAME, STEP
from .cache import Cache
from .library import handle

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache")
_SETTINGS = ("logits_to_keep", "return_dict")
_REAL_TAIL = "_kvc_real_tail"  # on a mask: generate added its last column, of ones, to a mask that had been checked


Compiled = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], Any]  # of a module, its forward's arguments


@dataclass
class Step:
    """The arguments of a forward pass that is a step."""

    cache: Cache
    tensors: dict[str, torch.Tensor]  # input_ids (b,1), position_ids and cache_position where given
    settings: dict[str, Any]
    mask: torch.Tensor | None  # (b, positions); None: none was given, or all new rows are known to be real

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What a recording of this step is good for."""
        return (
            tuple((name, tuple(value.shape), value.dtype) for name, value in self.tensors.items()),
            tuple(sorted(self.settings.items())),
        )


def step_of(given: dict[str, Any]) -> Step | None:
    """The step that a forward pass with these arguments is, or None: more than one new token, no packed cache, autograd
    or anything asked for that a step does not give."""
    cache, ids = given.get("past_key_values"), given.get("input_ids")
    if not isinstance(cache, Cache) or cache._state.packed is None:
        return None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or not ids.shape[0]:
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type):
        return None
    for name, value in given.items():
        if value is None or name in _ARGUMENTS or name in _SETTINGS:
            continue
        if value is not False:  # output_attentions, output_hidden_states, inputs_embeds, labels, ...
            return None
    if given.get("use_cache") is False or given.get("return_dict") is False:
        return None
    keep, mask = given.get("logits_to_keep"), given.get("attention_mask")
    if (keep is not None and not isinstance(keep, int)) or keep not in (None, 0, 1):
        return None
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return None
    tensors = {name: given[name] for name in _ARGUMENTS[:4] if name != "attention_mask" and given.get(name) is not None}
    if any(not isinstance(value, torch.Tensor) or value.device != ids.device for value in tensors.values()):
        return None
    settings = {name: given[name] for name in _SETTINGS if given.get(name) is not None}
    return Step(cache, tensors, settings, None if _known(cache, mask) else mask)


def mark_real_tail(before: Any, after: Any) -> None:
    """`after` is the mask `before` with a column of ones behind it, as generate makes it for the next step."""
    both = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dim() == after.dim() == 2
    if both and tuple(after.shape) == (before.shape[0], before.shape[1] + 1):
        setattr(after, _REAL_TAIL, True)


def without_known_mask(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward pass, on a GPU without a mask that says nothing new: looking at it would mean waiting."""
    cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
    if not isinstance(cache, Cache) or cache._state.packed is None or not _known(cache, mask):
        return arguments
    return arguments if mask is None or mask.device.type == "cpu" else arguments | {"attention_mask": None}


def _known(cache: Cache, mask: torch.Tensor | None) -> bool:
    """Whether nothing in the mask of a pass of one new token has to be looked at."""
    return getattr(mask, _REAL_TAIL, False) and mask is not None and mask.shape[1] == cache._state.seen[0] + 1


def _layer_of(module: torch.nn.Module) -> int:
    number: Any = module.layer_idx
    return int(number)


class Parts:
    """What of a model a step runs in its own way: attention modules by layer; decoder layers, all of which run one
    compiled function; and what lies beside these in their model (embedding, positions, last norm), each of which runs
    one of its own. Read again when a hook was added anywhere."""

    def __init__(self, model: torch.nn.Module, config: Any, layers: int) -> None:
        self.hooks = RemovableHandle.next_id
        modules = [module for module in model.modules() if module is not model]
        self.attention = [
            module for module in modules
            if isinstance(getattr(module, "layer_idx", None), int) and getattr(module, "config", None) is config
        ]  # fmt: skip
        numbers = sorted(_layer_of(module) for module in self.attention)
        hooked = any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules
        )
        self.usable = numbers == list(range(layers)) and not hooked
        self.positions_on_host = any(
            str(getattr(module, "rope_type", "")) == "longrope" or "dynamic" in str(getattr(module, "rope_type", ""))
            for module in modules
        )  # position embeddings that look at positions, which a recording cannot
        self.decoders, self.beside = self._decoders(model, layers)
        if self.positions_on_host:
            self.beside = []
        self._tensors = [*model.parameters(), *model.buffers()]
        self.look()
        devices = {parameter.device for parameter in model.parameters()}
        self.device = devices.pop() if len(devices) == 1 else None

    def _decoders(self, model: torch.nn.Module, layers: int) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
        """Decoder layers of one kind, and the modules beside their list; nothing where there are none."""
        for holder in model.modules():
            for module in holder.children():
                if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
                    inside = [sum(part in self.attention for part in layer.modules()) for layer in module]
                    if all(count == 1 for count in inside) and len({type(layer) for layer in module}) == 1:
                        return list(module), [child for child in holder.children() if child is not module]
        return [], []

    def look(self) -> None:
        """Where the model's tensors are now. All of them: of a model that moved, some may be where they were."""
        self.addresses = tuple([tensor.data_ptr() for tensor in self._tensors])

    @property
    def hooks_changed(self) -> bool:
        return bool(self.hooks != RemovableHandle.next_id)


def _run_module(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(module).forward(module, *args, **kwargs)


def compiled_forward(options: dict[str, Any]) -> Compiled:
    """torch.compile of the forward of modules of one type, of a code object of its own: how often one may be compiled
    anew is limited, and other models must not count."""
    own = types.FunctionType(_run_module.__code__.replace(), _run_module.__globals__, "step_module")
    compiled: Compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options or None)
    return compiled


def compiled_or_plain(options: dict[str, Any]) -> Compiled:
    """The same, of modules that run as they are from where compiling them has failed on."""
    compiled: Compiled | None = compiled_forward(options)

    def run(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal compiled
        if compiled is not None:
            try:
                return compiled(module, args, kwargs)
            except Exception as error:
                compiled = None
                message = f"compress: compile: {type(module).__name__} runs as it is: {first_line(error)}"
                warnings.warn(message, stacklevel=2)
        return _run_module(module, args, kwargs)

    return run


def step_options(device: torch.device) -> dict[str, Any]:
    """Options of torch.compile with which its kernels begin before the ones ahead of them have ended, as this package's
    do (programmatic dependent launch, sm_90 and later), and small ones that do not need each other (the rotations of
    queries and keys) are one; none where the device or this torch has no such thing. That rests on every kernel waiting
    for the one ahead of it before it ends, as inductor's that load anything do."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    from torch import _inductor  # takes long, and is loaded by what comes next anyway

    names = ("triton.enable_pdl", "combo_kernels")
    return dict.fromkeys(names, True) if set(names) <= set(_inductor.list_options()) else {}


@contextlib.contextmanager
def stepping(parts: Parts, cache: Cache, compiled: Mapping[torch.nn.Module, Compiled]) -> Iterator[None]:
    """Inside, forward passes of the model are steps over `cache`; the modules that are `compiled` run that."""
    state = cache._state
    assert state.packed is not None
    handles = [handle(layer) for layer in state.packed.layers]
    # The cache's layers are asked for nothing but lengths: the attention function goes to the packed ones.
    state.stepping = True
    implementation = state.config._attn_implementation
    try:
        for module in parts.attention:
            setattr(module, STEP, handles[_layer_of(module)])
        if compiled:
            # A plain str: torch.compile does not look up others in every version. What was set before is not asked for.
            state.config._attn_implementation = NAME
            for module, run in compiled.items():
                module.forward = functools.partial(_without_cache, run, module)
        yield
    finally:
        state.stepping = False
        state.config._attn_implementation = implementation
        for module in parts.attention:
            vars(module).pop(STEP, None)
        for module in compiled:
            vars(module).pop("forward", None)


def _without_cache(compiled: Compiled, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module without the cache, whose update would be asked for by number and so compile every layer anew."""
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    return compiled(module, args, kwargs)
