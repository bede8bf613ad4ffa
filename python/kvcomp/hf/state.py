"""What the layers of one packed cache share: the prompt until it is compressed, the packed layers, the padding."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import BudgetWarning
from ..hold import least_held, make_room
from ..layer_input import LayerInput
from ..packed import Packed, ratio_text
from ..policy import Policy
from ..prompt import Compressor
from ..saved import Saved
from .padding import Padding, Rows, left_padding, new_rows


def _own(rows: torch.Tensor) -> torch.Tensor:
    """rows, copied where they are a part of something larger that would stay alive with them."""
    return rows if rows.untyped_storage().nbytes() <= rows.nbytes else rows.clone()


class State:
    """The shared state of a cache of `layers` layers."""

    def __init__(self, config: Any, policy: Policy, layers: int) -> None:
        self.config = config
        self.policy = policy
        self.layers = layers
        self.reset()

    def reset(self) -> None:
        """Back to an unused cache."""
        self.seen = [0] * self.layers  # positions each layer has been given, padding included
        self.packed: Packed | None = None
        self.ratio: float | None = None
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None  # K, V between update and attention
        self._at = 0  # the layer that they are of
        self._broken = False  # a later pass stopped half-way through a layer
        self.stepping = False  # the pass at hand is a decode step of step.py
        self._before: list[int] = []  # appends of every layer when it began
        self._compressor: Compressor | None = None  # while the first pass runs
        self._first: np.ndarray[Any, Any] | None = None  # first real token of every sequence
        self._real: torch.Tensor | None = None  # (b,s) bool on the CPU, of the first pass; None: no mask was given
        self._padding = Padding()
        self._rows = Rows()
        self._device: torch.device | None = None
        self.expected = 0  # positions of a prompt that comes in several passes; 0: in one
        self._kept: dict[int, list[torch.Tensor]] = {}  # K, V and last queries of its layers so far

    @property
    def used(self) -> bool:
        """Whether anything has been given to it."""
        return self.packed is not None or any(self.seen) or self._compressor is not None

    def check_device(self, device: torch.device) -> None:
        """NotImplementedError for devices that a packed cache cannot be on: neither CPU nor CUDA, or not that of the
        other layers."""
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(f"Cache: keys and values: expected CPU or CUDA tensors, got {device}")
        if self._device is not None and device != self._device and self.used:
            refused = NotImplementedError(
                f"Cache: keys and values: expected all layers on one device, {self._device}, got {device} (a model "
                f"that is split over several devices?)"
            )
            if self.packed is None:
                self.reset()
            raise refused
        if self.packed is not None and (device.type == "cuda") != (self.packed.arena.device >= 0):
            self.packed = self.packed.to(device)  # a cache from a file
        self._device = device

    def take(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Layer `index` is given keys, values (b,h,q,d), held until its attention has run. Layers come in order, one
        pass after the other. Returns what is to be attended over: them, or all of a prompt in several passes."""
        if index == 0 and self._new is not None:  # an earlier pass ended before that layer's attention
            self.give_back(self._at)
        count = keys.shape[2]
        ahead = self.seen[0] if index else self.seen[0] + count
        halfway = self._broken or (index == 0 and (len(set(self.seen)) > 1 or self._compressor))
        if halfway or self.seen[index] + count != ahead:
            raise RuntimeError(
                f"Cache: layer {index}: expected every layer once in every forward pass, got an earlier pass that did "
                f"not finish; reset() empties the cache"
            )
        self.seen[index] += count
        self._new, self._at = (keys, values), index
        if self.expected and self.packed is None:
            self._new = self._gathered(index, keys, values)
        return self._new

    def _gathered(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a prompt so far, these last."""
        end = self.seen[index]
        if end > self.expected:
            raise RuntimeError(f"Cache: prompt: expected {self.expected} tokens, got {end}")
        if index not in self._kept:
            b, h, _, d = keys.shape
            self._kept[index] = [rows.new_empty(b, h, self.expected, d) for rows in (keys, values)]
        whole = self._kept[index][:2]
        for rows, new in zip(whole, (keys, values), strict=True):
            rows[:, :, end - new.shape[2] : end] = new
        return whole[0][:, :, :end], whole[1][:, :, :end]

    def give_back(self, index: int) -> None:
        """The pass failed in layer `index`: undone where nothing has been stored yet."""
        if self.packed is None:
            self.reset()
        elif self._new is not None:
            self.seen[index] -= self._new[0].shape[2]
        self._new = None

    def _check_mask(self, real: torch.Tensor | None, batch: int) -> None:
        if real is not None and tuple(real.shape) != (batch, self.seen[0]):
            raise ValueError(
                f"Cache: attention_mask: expected shape ({batch}, {self.seen[0]}), all positions seen and the new "
                f"ones, got {tuple(real.shape)}"
            )

    def first(self, index: int, queries: torch.Tensor, real: torch.Tensor | None, scale: float, softcap: float) -> None:
        """Layer `index` has attended over the prompt with queries (b,hq,s,d): the layer is measured, and compressed at
        once or together with all others after the last one, as the policy says.

        real (b,s) bool: left padding. ValueError for padding anywhere else."""
        assert self._new is not None
        keys, values = self._new
        batch, _, count, _ = keys.shape
        if index == 0:
            self._real = None if real is None else real.cpu()
            self._check_mask(self._real, batch)
            self._first = None if self._real is None or bool(self._real.all()) else left_padding(self._real).numpy()
            if self.seen[0] >= self.expected:
                self._leave_room(keys.nbytes + values.nbytes)
                self._compressor = Compressor(self.policy, self.layers, least_if_over=True)
        window = self.policy.scoring_window
        last = queries[:, :, -window:] if window else None
        if self.expected:
            if last is not None:
                last = torch.cat([*self._kept[index][2:], last], dim=2)[:, :, -window:]
            if self.seen[index] < self.expected:
                self._kept[index][2:] = [] if last is None else [last.clone()]
                self._new = None
                return
            del self._kept[index]
        assert self._compressor is not None
        whole = self._compressor.keeps  # until the last layer has run
        self._compressor.add(
            LayerInput(
                keys=_own(keys) if whole else keys,
                values=_own(values) if whole else values,
                queries=last,
                first=self._first,
                scale=scale,
                softcap=softcap,
            )
        )
        self._new = None
        if index == self.layers - 1:
            self._padding.extend(None if self._first is None else self._real, batch, count)
            self._finish()

    def _leave_room(self, nbytes: int) -> None:
        """On a GPU: pages are not torch's memory. Where all layers' might not fit beside what torch keeps for later,
        that is given back. nbytes: of one layer at 16 bits."""
        device = self._device
        if device is not None and device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < nbytes * self.layers:
            torch.cuda.empty_cache()

    def prime(self, prompt: Sequence[LayerInput]) -> None:
        """As if the first pass had gone over this prompt, whose layers are at hand. Without padding."""
        if len(prompt) != self.layers:
            raise ValueError(f"Cache: prompt: expected {self.layers} layers, got {len(prompt)}")
        self._compressor = Compressor(self.policy, self.layers, least_if_over=True)
        try:
            for layer in prompt:
                self._compressor.add(layer)
            self._finish()
        except BaseException:
            self.reset()
            raise
        batch, _, count, _ = prompt[0].shape
        self.seen = [count] * self.layers
        self._padding.extend(None, batch, count)

    def adopt(self, packed: Packed, positions: int, real: torch.Tensor | None, batch: int) -> None:
        """As if the first pass had gone over `positions` of `batch` sequences and given `packed`; real (b,positions)
        bool, None without padding."""
        self.packed, self.ratio = packed, packed.ratio
        self.seen = [positions] * self.layers
        self._padding.extend(real, batch, positions)

    def _finish(self) -> None:
        assert self._compressor is not None
        packed = self._compressor.finish()
        self._compressor = None
        if packed.report.over_budget:
            least = packed.nbytes if packed.hold_bytes is None else packed.hold_bytes
            warnings.warn(
                f"Cache: policy: expected a budget of at least {least} bytes for this prompt (a ratio of "
                f"{ratio_text(packed.report.bf16_bytes / least)} or less), got {packed.report.budget_bytes} bytes: "
                f"the smallest plan is kept",
                BudgetWarning,
                stacklevel=2,
            )
        self.packed, self.ratio = packed, packed.ratio

    def later(
        self, index: int, queries: torch.Tensor, real: torch.Tensor | None, scale: float, softcap: float
    ) -> torch.Tensor:
        """Appends the new keys and values to layer `index` and attends with queries (b,hq,q,d); zeros for padding."""
        assert self.packed is not None and self._new is not None
        keys, values = self._new
        batch, _, count, _ = keys.shape
        packed = self.packed
        if index == 0:
            real = None if real is None else real.cpu()
            self._check_mask(real, batch)
            self._rows = self._new_rows(batch, count, real).to(keys.device)
            if packed.stacked is not None:
                packed.stacked.begin_step(count, self._rows.counts)
        rows, layer = self._rows, packed.layers[index]
        alone: dict[str, Any] = {}
        if packed.stacked is None:  # a layer at a time; elsewhere begin_step has seen to all of them
            alone["valid"] = rows.counts
            if packed.hold_bytes is not None:
                alone["make_room"] = lambda nbytes: make_room(packed, nbytes)
        before = layer.appends
        try:
            out = layer.append_attend(
                rows.gather(queries), rows.gather(keys), rows.gather(values), scale=scale, softcap=softcap, **alone
            )
        except BaseException as error:
            # Whoever stops the program may do so anywhere; errors leave a layer whole, with some of the rows or none.
            self._broken = layer.appends != before or not isinstance(error, Exception)
            raise
        if index == 0:
            self._padding.extend(None if real is None else real[:, -count:], batch, count)
        self._new = None
        return rows.scatter(out)

    # ---- decode steps (step.py)

    def takes_step(self, batch: int, mask: torch.Tensor | None) -> bool:
        """Whether a pass of one token each of `batch` sequences can be a step: between two passes, without padding
        among the new tokens. mask (b, positions), 0 for padding, or None. ValueError as in a pass of any kind."""
        packed = self.packed
        if packed is None or self._broken or self._new is not None or len(set(self.seen)) > 1:
            return False
        if packed.stacked is not None:
            if packed.stacked.batches != {batch}:
                return False
        elif any(layer.batch != batch for layer in packed.layers):
            return False
        if mask is not None:
            real = mask.cpu().bool()
            if tuple(real.shape) != (batch, self.seen[0] + 1) or self._new_rows(batch, 1, real).valid is not None:
                return False
        self._before = [layer.appends for layer in packed.layers]
        return True

    def step_began(self) -> bool:
        """Whether a step that failed has stored anything."""
        assert self.packed is not None
        return [layer.appends for layer in self.packed.layers] != self._before

    def step_failed(self) -> None:
        """A step was stopped by an error."""
        self._broken = self._broken or self.step_began()

    def step_done(self) -> None:
        """Every layer has taken one token of every sequence."""
        assert self.packed is not None
        self.seen = [count + 1 for count in self.seen]
        self._padding.extend(None, self.packed.layers[0].batch, 1)

    def _new_rows(self, batch: int, count: int, real: torch.Tensor | None) -> Rows:
        """Which of the `count` new rows are padding. ValueError where the mask denies what is stored."""
        if real is None:
            return Rows()
        wrong = (real[:, :-count] != self._padding.real()).nonzero()
        if len(wrong):
            sequence, position = wrong[0].tolist()
            raise ValueError(
                f"Cache: attention_mask: expected the padding that the cache was filled with (what is stored cannot be "
                f"masked later), got another value for sequence {sequence}, position {position}"
            )
        return new_rows(real[:, -count:])

    def select(self, index: int, indices: torch.Tensor) -> None:
        """The batch of layer `index` becomes its sequences `indices`, in that order, with repetitions."""
        if self.packed is None:
            return
        chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        packed = self.packed
        packed.layers[index].select(chosen.cpu().numpy())
        if index < self.layers - 1:
            return
        before = self._padding.tokens()
        self._padding.select(chosen.tolist())
        if packed.hold_bytes is not None and before:
            # Each sequence's share of a held budget is that of its tokens; but no less than decoding needs.
            share = packed.hold_bytes * self._padding.tokens() // before
            packed.hold_bytes = max(share, min(packed.hold_bytes, least_held(packed.layers)))
            make_room(packed, 0)

    def saved(self) -> Saved:
        """What a file of this cache holds. RuntimeError for an unused cache, and inside of a forward pass."""
        if self._broken or self._new is not None or self._compressor is not None or len(set(self.seen)) > 1:
            raise RuntimeError("save: cache: expected one between two forward passes, got one in the middle of a pass")
        if self.packed is None:
            raise RuntimeError("save: cache: expected one that holds a prompt, got an unused one")
        runs = self._padding.runs
        if not runs or any(layer.batch != len(runs) for layer in self.packed.layers):
            raise RuntimeError(
                f"save: cache: expected every layer's batch to be one of {len(runs)} sequences, got others"
            )
        return Saved(self.packed, self.seen[0], runs, self.ratio)

    def restore(self, saved: Saved) -> None:
        """Back to where a saved cache was."""
        self.reset()
        self.seen = [saved.positions] * self.layers
        self.packed, self.ratio = saved.packed, saved.ratio
        self._padding.runs = saved.runs
