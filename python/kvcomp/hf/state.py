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
        self._compressor: Compressor | None = None  # while the first pass runs
        self._first: np.ndarray[Any, Any] | None = None  # first real token of every sequence
        self._padding = Padding()
        self._rows = Rows()

    def take(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Layer `index` is given keys, values (b,h,q,d), held until its attention has run. Layers come in order, one
        pass after the other."""
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
            self._check_mask(real, batch)
            self._first = None if real is None or bool(real.all()) else left_padding(real).numpy()
            self._compressor = Compressor(self.policy, self.layers, least_if_over=True)
        assert self._compressor is not None
        window = self.policy.scoring_window
        whole = self.policy.prefill == "joint"  # kept until the last layer has run
        self._compressor.add(
            LayerInput(
                keys=_own(keys) if whole else keys,
                values=_own(values) if whole else values,
                queries=queries[:, :, -window:] if window else None,
                first=self._first,
                scale=scale,
                softcap=softcap,
            )
        )
        self._new = None
        if index == self.layers - 1:
            self._padding.extend(None if self._first is None else real, batch, count)
            self._finish()

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
        if index == 0:
            self._rows = self._new_rows(batch, count, real)
        rows, packed = self._rows, self.packed
        layer = packed.layers[index]
        before = layer.appends
        try:
            out = layer.append_attend(
                rows.gather(queries),
                rows.gather(keys),
                rows.gather(values),
                scale=scale,
                softcap=softcap,
                valid=None if rows.valid is None else rows.valid.numpy(),
                make_room=None if packed.hold_bytes is None else lambda nbytes: make_room(packed, nbytes),
            )
        except BaseException as error:
            # Whoever stops the program may do so anywhere; errors leave a layer whole, with some of the rows or none.
            self._broken = layer.appends != before or not isinstance(error, Exception)
            raise
        if index == 0:
            self._padding.extend(None if real is None else real[:, -count:], batch, count)
        self._new = None
        return rows.scatter(out)

    def _new_rows(self, batch: int, count: int, real: torch.Tensor | None) -> Rows:
        """Which of the `count` new rows are padding. ValueError where the mask denies what is stored."""
        self._check_mask(real, batch)
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
