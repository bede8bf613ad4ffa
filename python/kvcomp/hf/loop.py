"""generate's loop over new tokens for one answer a prompt, greedy or sampled, inside kvcomp.compress on a GPU.

What it gives is what transformers' `_sample` gives. transformers waits for the GPU after every token to learn whether
all sequences have ended, and prepares the next step while the GPU has nothing to do. Here the next step is prepared
while the GPU is still at this one: the answer is waited for when nothing is left to do but to start the pass, so that
no pass runs that transformers would not run. Between two passes a GPU runs little kernels, 2 us each: what that answer
needs comes first, so that the rest runs while the host learns of it, and what the host knows is not asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin, MaxLengthCriteria
from transformers.generation.configuration_utils import GenerationMode

from .graph import Ended, Steps

# Of generate: what another loop than this one takes, or what makes it another. Left out, None or False: this one.
_OTHERS = (
    "assistant_model", "assistant_early_exit", "assistant_tokenizer", "constraints", "custom_generate", "dola_layers",
    "force_words_ids", "is_assistant", "negative_prompt_ids", "output_attentions", "output_hidden_states",
    "penalty_alpha", "prompt_lookup_num_tokens", "stop_strings", "streamer", "synced_gpus", "token_healing",
    "tokenizer", "use_mtp",
)  # fmt: skip
_OWN = ("generate", "_sample")
_BEAMS = ("num_beams", "num_beam_groups")
_PARTS = ("_prefill", "_optimize_model_for_decode", "_update_model_kwargs_for_generation")
_MOST_PARTS, _LEAST_PARTS = 512, 16  # of a row of logits


def takes(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether a generate call with these arguments is for `decode`: transformers' own loop, one answer a prompt,
    nothing streamed, no other way of decoding asked for by the call, its configuration or the model's."""
    if any(getattr(type(model), name, None) is not getattr(GenerationMixin, name) for name in _OWN):
        return False  # one with a loop of its own, or that hands over to another model
    if not all(hasattr(model, name) for name in _PARTS) or model.config.is_encoder_decoder:
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():  # ranks may have to go on together
        return False
    settings = (given.get("generation_config"), getattr(model, "generation_config", None))
    for name in _OTHERS:
        if given.get(name) or any(getattr(part, name, None) for part in settings):
            return False
    for name in _BEAMS:
        said = [given.get(name), *(getattr(part, name, None) for part in settings)]
        if next((count for count in said if count is not None), 1) != 1:
            return False
    return True


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    steps: Steps | None = None,
    **model_kwargs: Any,
) -> Any:
    """generate's ``custom_generate``, for calls that `takes` allows: the arguments and the result of `_sample`. steps:
    what runs the model's passes; None: nobody knows, and the model is not called before it is known that it has to be.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or synced_gpus or streamer is not None:
        raise NotImplementedError(f"generate: expected one answer a prompt, greedy or sampled, got {mode.value}")
    return _decode(model, input_ids, logits_processor, stopping_criteria, generation_config, steps, model_kwargs)


@functools.cache
def _parts_of(count: int) -> int:
    """Equal parts of a row of so many; 0: there are none of a good size."""
    return next((n for n in range(_MOST_PARTS, _LEAST_PARTS - 1, -1) if count % n == 0), 0)


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """torch.argmax(rows, -1) of rows (b, n), the first of several; in two steps, as torch gives a row to few blocks of
    threads on a GPU (H200, 1 and 8 rows of 128256: 27 us)."""
    count = rows.shape[-1]
    parts = _parts_of(count)
    if not parts:
        return torch.argmax(rows, dim=-1)
    best, at = rows.reshape(len(rows), parts, count // parts).max(dim=-1)
    part = best.argmax(dim=-1, keepdim=True)
    return torch.add(at.gather(1, part), part, alpha=count // parts).squeeze(1)


def _ends(criteria: Any, ids: torch.Tensor, scores: Any) -> tuple[bool, torch.Tensor | None]:
    """Whether all sequences end by what the host knows, and which end by what is on the device; None: none can."""
    over, ended = False, None
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            over = bool(criterion(torch.empty(()).expand(1, ids.shape[1]), None)) or over
        else:
            found = criterion(ids, scores)
            ended = found if ended is None else ended | found
    return over, ended


class _Flag:
    """A boolean on its way from a device."""

    def __init__(self, device: torch.device) -> None:
        self._host = torch.zeros((), dtype=torch.bool, pin_memory=True) if device.type == "cuda" else None

    def send(self, flag: torch.Tensor) -> None:
        if self._host is None:
            self._there = flag
            return
        self._host.copy_(flag, non_blocking=True)
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sent.record(torch.cuda.current_stream(flag.device))

    def wait(self) -> bool:
        if self._host is None:
            return bool(self._there)
        self._sent.synchronize()
        return bool(self._host)


def _decode(
    model: Any,
    ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    config: Any,
    steps: Steps | None,
    model_kwargs: dict[str, Any],
) -> Any:
    if steps is not None and not steps.runs(model):
        steps = None
    returns = config.return_dict_in_generate
    scores: tuple[torch.Tensor, ...] | None = () if returns and config.output_scores else None
    raw: tuple[torch.Tensor, ...] | None = () if returns and config.output_logits else None
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad: Any = config._pad_token_tensor
    pad = None if pad is None else pad.to(ids.device)
    unfinished, going_on = torch.ones(len(ids), dtype=torch.bool, device=ids.device), _Flag(ids.device)
    outputs = model._prefill(ids, config, model_kwargs, is_first_iteration=True)
    with model._optimize_model_for_decode():
        while True:
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
            processed = logits_processor(ids, logits)
            if scores is not None:
                scores += (processed,)
            if raw is not None:
                raw += (logits,)
            if config.do_sample:
                tokens = torch.multinomial(torch.nn.functional.softmax(processed, dim=-1), num_samples=1).squeeze(1)
            else:
                tokens = _largest(processed)
            if pads:
                tokens = torch.where(unfinished, tokens, pad)
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            over, now = _ends(stopping_criteria, ids, scores)
            if now is not None:
                unfinished = unfinished > now
            going_on.send(unfinished.any())
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
            del outputs  # a prompt's logits may be large
            if over:
                break
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
            )
            if steps is None:
                if not going_on.wait():
                    break
                outputs = model(**inputs, return_dict=True)
                continue
            try:
                with steps.asking(lambda: not going_on.wait()):
                    outputs = model(**inputs, return_dict=True)
            except Ended:
                break
    if not returns:
        return ids
    cache = model_kwargs.get("past_key_values")
    return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=raw, past_key_values=cache)
