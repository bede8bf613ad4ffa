"""Decode steps inside kvcomp.compress: each recorded once as a CUDA graph, where asked for with decoder layers and what
lies beside them compiled, and replayed from then on. What cannot be recorded runs as it always did.

A step of a new kind (another cache, batch, arguments; tensors that moved) runs as it is, which is also what readies
libraries and compilers; the second one of its kind is recorded, which runs nothing, and replayed, as are all later
ones. A step that observes attention is a kind of its own (kvcomp.store_cuda)."""

import contextlib
import gc
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import first_line
from .joined import Joined
from .step import Compiled, Parts, Step, compiled_forward, compiled_or_plain, step_of, step_options, stepping

Compile = bool | Literal["auto"] | dict[str, Any]


@dataclass
class _Recording:
    """Without the cache: what is kept of a cache must not keep it."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    kind: type  # of the output
    output: dict[str, Any]

    def copied(self, cache: Any) -> Any:
        """The model's output, with copies of the tensors, which the next replay overwrites."""
        own = {name: part.clone() if isinstance(part, torch.Tensor) else part for name, part in self.output.items()}
        return self.kind(**own, past_key_values=cache)


class _Kinds:
    """The kinds of steps of one packed cache: those that have run, and those that are recorded."""

    def __init__(self) -> None:
        self.generation: Any = None
        self.run: set[Any] = set()
        self.recorded: dict[Any, _Recording] = {}

    def at(self, generation: Any) -> None:
        """What was recorded before tensors moved is worth nothing."""
        if generation != self.generation:
            self.generation = generation
            self.run.clear()
            self.recorded.clear()


class Ended(Exception):
    """No pass is wanted any more: `Steps.asking`."""


class Steps:
    """Runs the decode steps of one model.

    forward: the model's own. graphs: record steps over caches on a GPU (KVCOMP_GRAPHS=0 in the environment: never).
    compile: compile decoder layers, and what lies beside them (embedding, positions, last norm): True, or "auto": on a
        GPU, and left alone where it fails; or options of torch.compile, which go before `step_options`.
    """

    def __init__(
        self, model: Any, config: Any, layers: int, forward: Callable[..., Any], graphs: bool, compile: Compile
    ) -> None:
        self._model, self._config, self._layers, self._forward = model, config, layers, forward
        self._takes_positions = "position_ids" in inspect.signature(forward).parameters
        self._graphs = graphs and os.environ.get("KVCOMP_GRAPHS", "1") != "0"
        self._compile = compile
        self._functions: dict[type, Compiled] = {}  # by type of module
        self._modules: dict[torch.nn.Module, Compiled] = {}  # of the parts: what runs compiled, where anything does
        self._joins = True
        self._joined: Joined | None = None
        self._joined_at: tuple[int, ...] = ()  # addresses
        self._parts: Parts | None = None
        self._kinds: weakref.WeakKeyDictionary[Any, _Kinds] = weakref.WeakKeyDictionary()
        self._side: torch.cuda.Stream | None = None
        self._ended: Callable[[], bool] | None = None
        self.replays = 0

    @contextlib.contextmanager
    def asking(self, ended: Callable[[], bool]) -> Iterator[None]:
        """Inside, the first pass asks `ended` when all is prepared and nothing has run yet. Where that is so, Ended is
        raised in the pass's place; behind it, where it went another way than through `run`."""
        self._ended = ended
        try:
            yield
            self._ask()
        finally:
            self._ended = None

    def runs(self, model: Any) -> bool:
        """Whether it is this model's steps that it runs."""
        return model is self._model

    def _ask(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None and ended():
            raise Ended

    def run(self, given: dict[str, Any]) -> Any:
        """The output of a forward pass with these arguments; None: it is not for here."""
        out = self._run(given)
        if out is None:
            self._ask()
        return out

    def _run(self, given: dict[str, Any]) -> Any:
        step = step_of(given)
        if step is None or self._model.training or torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        state, device = step.cache._state, step.tensors["input_ids"].device
        packed = state.packed
        assert packed is not None
        graphs = self._graphs and packed.stacked is not None
        compiles = self._compiles(device)
        if not (graphs or compiles) or state.config is not self._config:
            return None
        if (device.type == "cuda") != (packed.arena.device >= 0):
            return None  # a cache from a file, which is not where the model is yet
        if packed.stacked is None and packed.hold_bytes is not None:  # room is made layer by layer
            return None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        if self._parts is None or self._parts.hooks_changed:
            self._parts, self._modules = Parts(self._model, self._config, self._layers), {}
            self._kinds.clear()
        parts = self._parts
        if (
            not parts.usable
            or parts.device != device
            or not state.takes_step(len(step.tensors["input_ids"]), step.mask)
        ):
            return None
        parts.look()
        compiled = self._compiled(parts) if compiles else {}
        if compiled and self._joins:
            self._join(parts)
        if packed.stacked is None:
            return self._eager(step, parts, compiled)
        if not packed.stacked.begins_quietly(1):
            self._ask()
        packed.stacked.begin_step(1, None)
        if not graphs or parts.positions_on_host or not self._takes_positions:
            return self._eager(step, parts, compiled)
        if "position_ids" not in step.tensors:  # the model would ask the cache: a number, which would be recorded
            step.tensors["position_ids"] = torch.full((1, 1), state.seen[0], device=device)
        return self._recorded(step, parts, compiled)

    def _compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" if self._compile == "auto" else bool(self._compile)

    def _compiled(self, parts: Parts) -> dict[torch.nn.Module, Compiled]:
        """What runs compiled; nothing, where the decoder layers are not of one kind."""
        if not parts.decoders or parts.device is None:
            return {}
        if not self._modules:  # asking for options takes milliseconds
            options = step_options(parts.device) | (self._compile if isinstance(self._compile, dict) else {})
            for modules, make in ((parts.beside, compiled_or_plain), (parts.decoders, compiled_forward)):
                for module in modules:
                    kind = type(module)
                    if kind not in self._functions:
                        self._functions[kind] = make(options)
                    self._modules[module] = self._functions[kind]
        return self._modules

    def _join(self, parts: Parts) -> None:
        """Layers that read the same rows are one product in compiled steps; again after the model moved."""
        if self._joined is not None and self._joined_at == parts.addresses:
            return
        self._ask()
        self._undo_joins()
        try:
            self._joined = Joined(module for layer in parts.decoders for module in layer.modules())
        except torch.OutOfMemoryError:
            self._joins = False
        parts.look()
        self._joined_at = parts.addresses

    def _undo_joins(self) -> None:
        if self._joined is not None:
            self._joined.undo()
            self._joined = None

    @contextlib.contextmanager
    def _stepping(self, step: Step, parts: Parts, compiled: dict[torch.nn.Module, Compiled]) -> Iterator[None]:
        joined = self._joined if compiled else None
        with stepping(parts, step.cache, compiled), contextlib.nullcontext() if joined is None else joined.active():
            yield

    @property
    def joined(self) -> int:
        """Sets of layers that are one product each in compiled steps."""
        return 0 if self._joined is None else len(self._joined)

    def close(self) -> None:
        """The model is as it was."""
        self._kinds.clear()
        self._undo_joins()

    # ---- as it is

    def _eager(self, step: Step, parts: Parts, compiled: dict[torch.nn.Module, Compiled]) -> Any:
        """The step, run now."""
        self._ask()
        state = step.cache._state
        try:
            out = self._tried(step, parts, compiled)
        except BaseException:
            state.step_failed()
            raise
        state.step_done()
        return out

    def _tried(self, step: Step, parts: Parts, compiled: dict[torch.nn.Module, Compiled]) -> Any:
        """The step's output; where compiling fails, without joined layers, and then ("auto") without compiling."""
        try:
            with self._stepping(step, parts, compiled):
                return self._call(step, step.tensors)
        except Exception as error:
            if not compiled or step.cache._state.step_began():
                raise
            if self.joined:
                self._joins = False
                self._undo_joins()
            elif self._compile == "auto":
                self._compile, compiled = False, {}
                warnings.warn(f"compress: compile: decoder layers run as they are: {first_line(error)}", stacklevel=2)
            else:
                raise
        return self._tried(step, parts, compiled)

    def _call(self, step: Step, tensors: dict[str, torch.Tensor]) -> Any:
        return self._forward(**tensors, **step.settings, past_key_values=step.cache, use_cache=True)

    # ---- recorded

    def _recorded(self, step: Step, parts: Parts, compiled: dict[torch.nn.Module, Compiled]) -> Any:
        """The step replayed; recorded before, where it is the second of its kind; as it is, where it is the first."""
        state = step.cache._state
        assert state.packed is not None and state.packed.stacked is not None
        stacked = state.packed.stacked
        kinds = self._kinds.setdefault(state.packed, _Kinds())
        key = stacked.step_key()
        kinds.at((key[0], parts.addresses))
        kind = (key, step.shapes, bool(compiled))
        recording = kinds.recorded.get(kind)
        if recording is None:
            self._ask()
        if recording is None and kind in kinds.run:
            try:
                recording = kinds.recorded[kind] = self._record(step, parts, compiled)
            except Exception as error:  # nothing has run yet
                self._graphs = False
                warnings.warn(f"compress: graphs: steps run as they are: {first_line(error)}", stacklevel=2)
        if recording is None:
            out = self._on_side(lambda: self._eager(step, parts, compiled))
            kinds.run.add(kind)
            return out
        for name, value in step.tensors.items():
            recording.inputs[name].copy_(value)
        self._ask()
        try:
            recording.graph.replay()
        except BaseException:
            state.step_failed()
            raise
        stacked.replayed()
        self.replays += 1
        state.step_done()
        return recording.copied(step.cache)

    def _record(self, step: Step, parts: Parts, compiled: dict[torch.nn.Module, Compiled]) -> _Recording:
        packed = step.cache._state.packed
        assert packed is not None and packed.stacked is not None
        inputs = {name: value.clone(memory_format=torch.contiguous_format) for name, value in step.tensors.items()}
        graph = torch.cuda.CUDAGraph()

        def record() -> Any:
            # What the collector might free here frees memory of the device, and a recording may not.
            collects = gc.isenabled()
            gc.disable()
            try:
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    return self._call(step, inputs)
                finally:
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()

        with packed.stacked.capture(), self._stepping(step, parts, compiled):
            out = self._on_side(record)
        parts_of = {name: part for name, part in out.items() if name != "past_key_values"}
        return _Recording(graph, inputs, type(out), parts_of)

    def _on_side(self, work: Callable[[], Any]) -> Any:
        """`work` on a stream of this object's own, which is the one that steps are recorded on: what libraries keep for
        each stream is there by then."""
        current = torch.cuda.current_stream()
        if self._side is None or self._side.device != current.device:
            self._side = torch.cuda.Stream(current.device)  # type: ignore[no-untyped-call]
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                return work()
        finally:
            current.wait_stream(self._side)
