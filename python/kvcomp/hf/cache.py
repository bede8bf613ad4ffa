"""kvcomp.Cache: a transformers Cache whose layers are packed in the first pass over a prompt, under one byte budget for
all of them, and are attended over as they are from then on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from ..layer_input import LayerInput
from ..packed import Report
from ..policy import Policy
from ..saved import load, model_facts, save
from ..store import LEDGER
from .attention import NAME, forget, hand_on, register, set_implementation
from .state import State
from .support import count_layers, decoder_config

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PackedCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a packed cache, as transformers sees it. `update` gives back what it was given; the attention
    function does the rest."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, state: State, index: int) -> None:
        super().__init__()
        self.index = index
        self.config = state.config
        self._state = state

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Checks what the model hands over: (b,h,q,d), all layers' on one device, 32 or 16 bit, outside autograd."""
        if self.config._attn_implementation != NAME:
            raise RuntimeError(
                f"Cache: config._attn_implementation: expected {NAME!r} as long as the cache is used, got "
                f"{self.config._attn_implementation!r}"
            )
        for states in (key_states, value_states):
            self._state.check_device(states.device)
            if states.dtype not in _DTYPES:
                raise TypeError(f"Cache: keys and values: expected float32, float16 or bfloat16, got {states.dtype}")
            if states.requires_grad:
                raise NotImplementedError(
                    "Cache: keys and values: expected no autograd through a packed cache (torch.no_grad() or "
                    "inference_mode()), got tensors that require grad"
                )
        if key_states.shape != value_states.shape:
            raise NotImplementedError(
                f"Cache: keys and values: expected the same shape, got {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)} (MLA?)"
            )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(b,h,q,d) -> the same, marked with this layer, which holds them until its attention has run."""
        if self._state.stepping:
            return key_states, value_states
        self.lazy_initialization(key_states, value_states)
        keys, values = self._state.take(self.index, key_states, value_states)
        try:
            return hand_on(self, keys, values)
        except RuntimeError:
            self._state.give_back(self.index)
            raise

    @property
    def is_first(self) -> bool:
        """Nothing has been compressed: the pass at hand is the one over the prompt."""
        return self._state.packed is None

    def first(self, queries: torch.Tensor, real: torch.Tensor | None, scale: float, softcap: float) -> None:
        """The attention over the prompt has run with queries (b,hq,s,d): the layer is measured for compression."""
        self._state.first(self.index, queries, real, scale, softcap)

    def later(self, queries: torch.Tensor, real: torch.Tensor | None, scale: float, softcap: float) -> torch.Tensor:
        """Append and attend: queries (b,hq,q,d) -> output of the same shape. real (b, positions) bool or None."""
        return self._state.later(self.index, queries, real, scale, softcap)

    def give_back(self) -> None:
        """The attention that this layer waited for failed."""
        self._state.give_back(self.index)

    def get_seq_length(self) -> int:
        """Positions seen, padding included: what position ids go on from."""
        return self._state.seen[self.index]

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """(length, offset) of what a mask must cover: the new rows, all others being stored or padding. Versions of
        transformers that hand over cache positions (q,) in the place of their number are understood."""
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        if self._state.expected and self.is_first:  # a prompt in several passes attends over all of them
            return self.get_seq_length() + count, 0
        return count, self.get_seq_length()

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Empties the whole cache: the layers are compressed under one budget, and live and die together."""
        forget(self)
        self.is_initialized = False
        self._state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to remove, or NotImplementedError: what was compressed has been chosen with the tokens behind it."""
        if tokens_to_remove != 0:
            raise NotImplementedError(f"Cache: crop: expected 0 for a packed cache, got {tokens_to_remove}")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: the batch becomes its sequences beam_idx (b,)."""
        self._state.select(self.index, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The batch becomes its sequences `indices`: numbers, or a bool mask."""
        self._state.select(self.index, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other."""
        if self._state.packed is not None:
            batch = self._state.packed.layers[self.index].batch
            self._state.select(self.index, torch.arange(batch).repeat_interleave(repeats))

    def offload(self) -> None:
        """Refused: packed bytes stay where they are."""
        raise NotImplementedError("Cache: offload: expected a cache without offloading, got a packed one")

    prefetch = offload


class Cache(cache_utils.Cache):  # type: ignore[misc]
    """A packed KV cache for model.generate(..., past_key_values=cache) and for plain forward passes.

    config: the configuration that the model's modules hold (model.config). Its attention implementation becomes
    "kvcomp", which does what was set before wherever no packed cache is used.
    policy: the byte budget and how to meet it.

    The first pass is over a prompt of any length, left-padded where the sequences differ; its layers are compressed
    together when the last one has run, or (policy.prefill="layerwise") each when it has. Later passes, of one row or
    many, append to the packed bytes and attend over them.
    NotImplementedError, naming it, for everything that the packed cache does not do (kvcomp.hf.support)."""

    def __init__(self, config: Any, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"Cache: policy: expected a kvcomp.Policy, got {type(policy).__name__}")
        decoder = decoder_config(config)
        self._state = State(decoder, policy, count_layers(decoder))
        super().__init__(layers=[PackedCacheLayer(self._state, index) for index in range(self._state.layers)])
        register()
        set_implementation(decoder)

    @classmethod
    def of_prompt(cls, config: Any, policy: Policy, prompt: Sequence[LayerInput]) -> "Cache":
        """A cache as it is after a first pass over a prompt without padding, whose layers are at hand: K and V, and
        the queries that the policy measures importance with (all of the prompt's, for H2O)."""
        cache = cls(config, policy)
        cache._state.prime(prompt)
        for layer in cache.layers:
            layer.is_initialized = True
        return cache

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: the batch becomes its sequences beam_idx (b,), which are brought to the host once."""
        super().reorder_cache(beam_idx.cpu())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The batch becomes its sequences `indices`: numbers, or a bool mask."""
        super().batch_select_indices(indices.cpu())

    @property
    def nbytes(self) -> int:
        """Everything the cache holds, preallocated or not; 0 before the first prompt."""
        return self._state.packed.nbytes if self._state.packed else 0

    def ledger(self) -> dict[str, int]:
        """What nbytes is made of: codes, scales, positions, page_table, slack, window."""
        return self._state.packed.ledger() if self._state.packed else dict.fromkeys(LEDGER, 0)

    @property
    def ratio(self) -> float | None:
        """bf16 bytes of all prompt tokens that are not padding / nbytes, at the end of the first pass; None before."""
        return self._state.ratio

    @property
    def report(self) -> Report | None:
        """The plan's report (kvcomp.compress); None before the first prompt."""
        return self._state.packed.report if self._state.packed else None

    def save(self, path: str | Path) -> None:
        """Writes everything the cache holds, and its policy, to a safetensors file (kvcomp.saved), whole or not at all.

        RuntimeError for an unused cache, and inside of a forward pass; OSError where the file cannot be written."""
        save(Path(path), self._state.saved(), model_facts(self._state.config, self._state.layers))

    @classmethod
    def load(cls, path: str | Path, config: Any) -> "Cache":
        """The cache that `save` wrote, for the model of `config`: from here on it gives what the saved one would give.

        The file names the model by the facts that decide what K and V look like, and says nothing about its weights:
        those must be the same, and it is for you to know. ValueError, in one sentence, for a damaged, foreign or
        truncated file, another model's, or another page format's; OSError where it cannot be read. The cache's bytes
        are at most the saved one's: what had been freed inside of slabs and tables is not written. With
        decode="hold" it may therefore evict later."""
        decoder = decoder_config(config)
        saved = load(Path(path), model_facts(decoder, count_layers(decoder)))
        cache = cls(config, saved.packed.policy)
        cache._state.restore(saved)
        for layer in cache.layers:
            layer.is_initialized = True
        return cache

    def activate_past_recording(self) -> None:
        """Assisted generation asks for this, to take tokens back: refused."""
        raise NotImplementedError("Cache: assisted generation: expected a cache that can be cropped, got a packed one")
