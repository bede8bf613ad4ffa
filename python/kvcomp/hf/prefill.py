"""The first pass over long prompts in bounded memory, inside kvcomp.compress: sequence by sequence, each compressed
before the next one is read, and in chunks, whose keys and values are kept until the last one has run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..policy import Policy
from .cache import Cache
from .join import absorb, finish
from .padding import left_padding

SHARE = 0.4  # of free memory: a batch whose 16-bit keys and values would take more is read sequence by sequence
_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
_KNOWN = (*_INPUTS, "cache_position", "use_cache", "logits_to_keep", "return_dict")


class Prefill:
    """Runs the first passes of one model.

    forward: the model's own, set anew on the way into the context. chunk: tokens read at once; None: all. by_sequence:
    None: where memory asks for it."""

    def __init__(
        self, config: Any, policy: Policy, forward: Callable[..., Any], chunk: int | None, by_sequence: bool | None
    ) -> None:
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise ValueError(f"compress: prefill_chunk: expected 1 or more tokens, or None, got {chunk!r}")
        if by_sequence is not None and not isinstance(by_sequence, bool):
            raise TypeError(f"compress: by_sequence: expected True, False or None, got {by_sequence!r}")
        self._config, self._policy, self.forward = config, policy, forward
        self._chunk, self._by_sequence = chunk, by_sequence

    def run(self, given: dict[str, Any]) -> Any:
        """The output of a forward pass with these arguments; None: it is not for here: no first pass over a prompt of a
        packed cache, or one of which more is asked for than the logits of the last position, as generate does."""
        cache, ids = given.get("past_key_values"), given.get("input_ids")
        if not isinstance(cache, Cache) or cache._state.used or cache._state.config is not self._config:
            return None
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not len(ids) or torch.is_grad_enabled():
            return None
        others = [value for name, value in given.items() if name not in _KNOWN]
        if any(value is not None and value is not False for value in others) or given.get("return_dict") is False:
            return None
        keep, mask, positions = (given.get(name) for name in ("logits_to_keep", "attention_mask", "position_ids"))
        if not isinstance(keep, int) or keep != 1 or given.get("use_cache") is False:
            return None
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
            return None
        if positions is not None and (positions.dim() != 2 or positions.shape[1] != ids.shape[1]):
            return None
        chunk = self._chunk if self._chunk is not None and self._chunk < ids.shape[1] else None
        alone = len(ids) > 1 and (self._too_large(ids) if self._by_sequence is None else self._by_sequence)
        if alone:
            return self._sequences(cache, ids, mask, positions, chunk)
        return None if chunk is None else self._chunks(cache, ids, mask, positions, chunk)

    def _too_large(self, ids: torch.Tensor) -> bool:
        if ids.device.type != "cuda":
            return False
        config = self._config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        free, _ = torch.cuda.mem_get_info(ids.device)
        free += torch.cuda.memory_reserved(ids.device) - torch.cuda.memory_allocated(ids.device)
        return bool(ids.numel() * config.num_hidden_layers * heads * head_dim * 2 * 2 > SHARE * free)

    def _chunks(self, cache: Cache, ids: torch.Tensor, mask: Any, positions: Any, chunk: int | None) -> Any:
        """One pass after the other over `chunk` tokens each."""
        count = ids.shape[1]
        if chunk is not None and chunk < count:
            cache._state.expected = count
        out = None
        try:
            for start in range(0, count, chunk or count):
                part = slice(start, min(start + (chunk or count), count))
                out = self.forward(
                    input_ids=ids[:, part],
                    attention_mask=None if mask is None else mask[:, : part.stop],
                    position_ids=None if positions is None else positions[:, part],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        except BaseException:
            cache.reset()
            raise
        return out

    def _sequences(self, cache: Cache, ids: torch.Tensor, mask: Any, positions: Any, chunk: int | None) -> Any:
        """One sequence after the other, without its padding, in a cache of its own; then all in one."""
        batch, count = ids.shape
        real = None if mask is None else mask.cpu().bool()
        first = [0] * batch if real is None or bool(real.all()) else left_padding(real).tolist()
        if max(first) == count:  # a sequence of padding alone has no pass of its own
            return None
        if positions is None:
            positions = torch.arange(count, device=ids.device)[None]
        rows = positions.expand(batch, count)
        packed, logits, out = None, [], None
        tokens = sum(count - start for start in first)
        for sequence, start in enumerate(first):
            own = Cache(self._config, _share(self._policy, count - start, tokens))
            one = slice(sequence, sequence + 1)
            out = self._chunks(own, ids[one, start:], None, rows[one, start:], chunk)
            logits.append(out.logits)
            part = own._state.packed
            assert part is not None
            if packed is None:
                packed = part
            else:
                absorb(packed, part)
            del own, part
        assert packed is not None and out is not None
        finish(packed)
        packed.policy = self._policy
        cache._state.adopt(packed, count, None if max(first) == 0 else real, batch)
        for layer in cache.layers:
            layer.is_initialized = True
        return type(out)(logits=torch.cat(logits), past_key_values=cache)


def _share(policy: Policy, tokens: int, whole: int) -> Policy:
    """The policy for a sequence of `tokens` among `whole`: ratios are each sequence's own, bytes are shared out."""
    if policy.budget_bytes is None:
        return policy
    return dataclasses.replace(policy, budget_bytes=max(1, policy.budget_bytes * tokens // whole))
