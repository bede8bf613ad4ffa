"""with kvcomp.compress(model, policy): every generate call, and every forward pass that would start a cache of its own,
gets a fresh packed one."""

import functools
import inspect
from types import TracebackType
from typing import Any

from ..policy import Policy
from .attention import register, set_implementation
from .cache import Cache
from .support import count_layers, decoder_config


class Compressing:
    """The context manager that `compress` returns."""

    cache: Cache | None = None  # the last one made

    def __init__(self, model: Any, policy: Policy) -> None:
        if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
            raise TypeError(
                f"compress: model: expected a transformers model that generates, got {type(model).__name__}"
            )
        if not isinstance(policy, Policy):
            raise TypeError(f"compress: policy: expected a kvcomp.Policy, got {type(policy).__name__}")
        self._config = decoder_config(model.config)
        count_layers(self._config)
        self._model = model
        self._policy = policy

    def __enter__(self) -> "Compressing":
        model = self._model
        self._implementation = self._config._attn_implementation
        self._own = vars(model).get("generate")  # a generate of this very object, in the place of its class's
        plain = model.generate

        @functools.wraps(plain)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("past_key_values") is None and self._generate_caches(args, kwargs):
                kwargs["past_key_values"] = self._fresh()
            return plain(*args, **kwargs)

        register()
        set_implementation(self._config)
        model.generate = generate
        self._names = list(inspect.signature(model.forward).parameters)
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        del self._model.generate
        if self._own is not None:
            self._model.generate = self._own
        self._config._attn_implementation = self._implementation

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


def compress(model: Any, policy: Policy) -> Compressing:
    """Inside `with compress(model, policy) as c:` every generate call of `model` that brings no cache of its own gets a
    fresh kvcomp.Cache, and so does every forward pass that would start one; `c.cache` is the last. On the way out, by
    an exception or not, the model is as it was."""
    return Compressing(model, policy)
