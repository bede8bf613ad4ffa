"""with kvcomp.compress(model, policy): every generate call, and every forward pass that would start a cache of its own,
gets a fresh packed one; long prompts are read in bounded memory, and decode steps are recorded and replayed."""

import functools
import inspect
from types import TracebackType
from typing import Any

import torch

from ..policy import Policy
from . import loop
from .attention import register, set_implementation
from .cache import Cache
from .graph import Compile, Steps
from .prefill import Prefill
from .step import mark_real_tail, without_known_mask
from .support import count_layers, decoder_config

_MADE_KWARGS = "_update_model_kwargs_for_generation"  # what makes the mask of a generate's next step


class Compressing:
    """The context manager that `compress` returns."""

    cache: Cache | None = None  # the last one made
    steps: Steps  # what runs decode steps, inside

    def __init__(
        self,
        model: Any,
        policy: Policy,
        graphs: bool,
        compile: Compile,
        prefill_chunk: int | None,
        by_sequence: bool | None,
    ) -> None:
        if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
            raise TypeError(
                f"compress: model: expected a transformers model that generates, got {type(model).__name__}"
            )
        if not isinstance(policy, Policy):
            raise TypeError(f"compress: policy: expected a kvcomp.Policy, got {type(policy).__name__}")
        if not isinstance(graphs, bool):
            raise TypeError(f"compress: graphs: expected True or False, got {graphs!r}")
        if not isinstance(compile, bool | dict) and compile != "auto":
            raise TypeError(
                f"compress: compile: expected True, False, 'auto' or torch.compile's options, got {compile!r}"
            )
        self._config = decoder_config(model.config)
        self._layers = count_layers(self._config)
        self._model = model
        self._policy = policy
        self._graphs, self._compile = graphs, compile
        self._prefill = Prefill(self._config, policy, model.forward, prefill_chunk, by_sequence)

    def __enter__(self) -> "Compressing":
        model = self._model
        self._implementation = self._config._attn_implementation
        # What is put in the place of the class's own, and what this very object had there before.
        self._own = {name: vars(model)[name] for name in ("generate", "forward", _MADE_KWARGS) if name in vars(model)}
        plain, forward = model.generate, model.forward

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("past_key_values") is None and self._generate_caches(args, kwargs):
                kwargs["past_key_values"] = self._fresh()
            ours = "generate" not in self._own and isinstance(kwargs.get("past_key_values"), Cache)
            if ours and self._graphs and _kind_of(model) == "cuda" and len(args) <= 1 and loop.takes(model, kwargs):
                steps = self.steps if _runs(model, run, self._hook) else None
                kwargs["custom_generate"] = functools.partial(loop.decode, steps=steps)
            return plain(*args, **kwargs)

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(self._names, args, strict=False)) | kwargs
            for special in (self.steps, self._prefill):
                out = special.run(given)
                if out is not None:
                    return out
            return forward(*args, **without_known_mask(kwargs))

        register()
        set_implementation(self._config)
        self._names = list(inspect.signature(model.forward).parameters)
        self._prefill.forward = forward
        self.steps = Steps(model, self._config, self._layers, forward, self._graphs, self._compile)
        model.generate, model.forward = generate, run
        if hasattr(model, _MADE_KWARGS):
            setattr(model, _MADE_KWARGS, _marking(getattr(model, _MADE_KWARGS)))
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        for name in ("generate", "forward", _MADE_KWARGS):
            vars(self._model).pop(name, None)
        for name, value in self._own.items():
            setattr(self._model, name, value)
        self._config._attn_implementation = self._implementation
        self.steps.close()

    def _fresh(self) -> Cache:
        self.cache = Cache(self._config, self._policy)
        return self.cache

    def _generate_caches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this generate call uses a cache: its own word, its configuration's, the model's."""
        settings = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        for use in (
            kwargs.get("use_cache"),
            getattr(settings, "use_cache", None),
            getattr(self._model.generation_config, "use_cache", None),
        ):
            if use is not None:
                return bool(use)
        return True

    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        use = given.get("use_cache")
        if use is None:
            use = getattr(self._config, "use_cache", False)
        if use and given.get("past_key_values") is None:
            # In its place among the positional arguments, where that is how it was left out.
            place = self._names.index("past_key_values") if "past_key_values" in self._names else len(args)
            if place < len(args):
                args = (*args[:place], self._fresh(), *args[place + 1 :])
            else:
                kwargs = kwargs | {"past_key_values": self._fresh()}
        return args, kwargs


def _runs(model: Any, forward: Any, hook: Any) -> bool:
    """Whether a call of the model is a call of `forward` and of nothing else but `hook` before it."""
    return (
        vars(model).get("forward") is forward
        and list(model._forward_pre_hooks) == [hook.id]
        and not model._forward_hooks_always_called
        and not torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _kind_of(model: Any) -> str:
    return str(getattr(getattr(model, "device", None), "type", ""))


def _marking(make: Any) -> Any:
    """A generate's way to the next step's arguments, whose mask is marked as one that ends in real tokens."""

    @functools.wraps(make)
    def marking(outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        before = model_kwargs.get("attention_mask")
        made = make(outputs, model_kwargs, *args, **kwargs)
        mark_real_tail(before, made.get("attention_mask"))
        return made

    return marking


def compress(
    model: Any,
    policy: Policy,
    *,
    graphs: bool = True,
    compile: Compile = False,
    prefill_chunk: int | None = None,
    by_sequence: bool | None = None,
) -> Compressing:
    """Inside `with compress(model, policy) as c:` every generate call of `model` that brings no cache of its own gets a
    fresh kvcomp.Cache, and so does every forward pass that would start one; `c.cache` is the last. On the way out, by
    an exception or not, the model is as it was.

    graphs: on a GPU, decode steps (passes of one new token of every sequence) are recorded as a CUDA graph once and
        replayed. KVCOMP_GRAPHS=0 in the environment turns it off, too.
    compile: torch.compile runs the decoder layers of decode steps and what lies beside them (embedding, positions, last
        norm): True; "auto": on a GPU, and where it works; or its options, as a dict. The first step takes as long as
        compiling does. Layers that read the same rows (queries, keys and values; gate and up) are then one product:
        their weights are parts of one tensor until the way out. Its kernels begin while those ahead of them end, and
        small ones side by side are one, where the device and torch can do that (sm_90; its own options
        triton.enable_pdl and combo_kernels turn that off).
    prefill_chunk: tokens of a prompt that are read at once, where only the last one's logits are asked for, as generate
        does; keys and values of all of them are kept until the last chunk has run. None: all.
    by_sequence: read the prompts of a batch one after the other, each compressed before the next (bytes of a budget are
        shared out by their tokens); None: where the 16-bit keys and values of all would take much of a GPU's memory.
    """
    return Compressing(model, policy, graphs, compile, prefill_chunk, by_sequence)
