"""Quality of a compressed cache beside the model's own: answers, cache error, attention error.

A :class:`Method` makes the cache; everything else is the same code for all methods, the framework's cache among them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import Policy
from ..hf import Cache
from ..layer_input import LayerInput
from ..packed import Packed
from ..store import PackedLayer
from .perplexity import prefill
from .tasks import Task

_PROBE = "kvcomp_probe"


@dataclass(frozen=True)
class Method:
    """How the cache is kept: under a policy, or, with none, as the framework keeps it."""

    name: str
    target_ratio: float
    policy: Policy | None = None

    @contextlib.contextmanager
    def cache(self, model: Any, prompt: Sequence[LayerInput] | None = None) -> Iterator[Any]:
        """A fresh cache, or a packed one of a prompt that was read before; the model's attention is afterwards what it
        was."""
        before = model.config._attn_implementation
        try:
            if self.policy is None:
                yield DynamicCache(config=model.config)
            elif prompt is None:
                yield Cache(model.config, self.policy)
            else:
                yield Cache.of_prompt(model.config, self.policy, prompt)
        finally:
            model.config._attn_implementation = before


def uncompressed_bytes(model: Any, tokens: int) -> int:
    """bf16 bytes of K and V of so many tokens, in all layers."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 2 * tokens * int(config.num_hidden_layers) * int(heads) * int(head_dim)


def allocated_bytes(cache: Any) -> int:
    """What a cache holds: a packed one's allocation, or the framework's K and V tensors."""
    if isinstance(cache, Cache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@dataclass
class Answers:
    """What was answered to the questions of one task, on one cache."""

    texts: list[str]
    nbytes: int  # at the end of prefill
    prompt_tokens: int
    prefill_seconds: float
    step_seconds: list[float]  # of each decode step, all questions of the task at once


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, cache: Any, task: Task) -> Answers:
    """Greedy answers. ``aware``: context and question are read together. ``agnostic``: the context is read (and
    compressed) alone, then every question is asked on a copy of what the cache then holds."""
    tokens = prompt_of(tokenizer, task)
    logits, seconds = prefill(model, cache, tokens[None])
    nbytes = allocated_bytes(cache)
    steps: list[float] = []
    texts = ask(model, tokenizer, cache, task, logits, steps)
    return Answers(texts, nbytes, len(tokens), seconds, steps)


def prompt_of(tokenizer: Any, task: Task) -> torch.Tensor:
    """The tokens (s,) int64 that are read, and compressed, before a task's answers."""
    return _tokens(tokenizer, task.context + (task.questions[0].prompt if task.mode == "aware" else ""))


@torch.inference_mode()
def ask(
    model: Any, tokenizer: Any, cache: Any, task: Task, logits: torch.Tensor, steps: list[float] | None = None
) -> list[str]:
    """Greedy answers to a task's questions, on a cache that holds ``prompt_of`` it; logits (1, vocabulary) behind that.

    ``steps`` receives the seconds of each decode step.
    """
    steps = [] if steps is None else steps
    count = len(task.questions)
    mask = torch.ones(count, cache.get_seq_length(), dtype=torch.int64)
    if task.mode != "aware":
        if count > 1:
            cache.batch_repeat_interleave(count)
        prompts = [_tokens(tokenizer, question.prompt, begins=False) for question in task.questions]
        width = max(map(len, prompts))
        asked = torch.zeros(count, width, dtype=torch.int64)
        new = torch.zeros_like(asked)
        for row, prompt in enumerate(prompts):
            asked[row, width - len(prompt) :] = prompt
            new[row, width - len(prompt) :] = 1
        mask = torch.cat([mask, new], dim=1)
        logits = _feed(model, cache, asked, mask, steps)
    ends = {token for token in _tokens(tokenizer, "\n", begins=False).tolist()}
    most = max(len(_tokens(tokenizer, question.target, begins=False)) for question in task.questions)
    chosen = logits.argmax(-1)
    written = [chosen]
    done = torch.tensor([int(token) in ends for token in chosen])
    while len(written) < most and not bool(done.all()):
        mask = torch.cat([mask, torch.ones(count, 1, dtype=torch.int64)], dim=1)
        chosen = _feed(model, cache, chosen[:, None], mask, steps).argmax(-1)
        written.append(chosen)
        done |= torch.tensor([int(token) in ends for token in chosen])
    return [str(text) for text in tokenizer.batch_decode(torch.stack(written, dim=1), skip_special_tokens=True)]


def _tokens(tokenizer: Any, text: str, *, begins: bool = True) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=begins)["input_ids"], dtype=torch.int64)


def _feed(model: Any, cache: Any, tokens: torch.Tensor, mask: torch.Tensor, seconds: list[float]) -> torch.Tensor:
    """Logits behind the last of the new tokens (b, q), mask (b, all positions)."""
    whole = bool(mask.all())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    start = time.perf_counter()
    out = model(
        input_ids=tokens,
        attention_mask=None if whole else mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    seconds.append(time.perf_counter() - start)
    return torch.as_tensor(out.logits[:, -1].float())


@dataclass(frozen=True)
class Asked:
    """What one attention layer was asked: queries (b,hq,q,d) after RoPE, and the logits' scale."""

    queries: torch.Tensor
    scale: float


@contextlib.contextmanager
def probe(model: Any) -> Iterator[list[Asked]]:
    """Inside, the list grows by one entry for every attention layer that a forward pass goes through, in order."""
    before = model.config._attn_implementation
    found: list[Asked] = []

    def attention(module: Any, query: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        scale = named.get("scaling")
        found.append(Asked(query.clone(), query.shape[-1] ** -0.5 if scale is None else float(scale)))
        return ALL_ATTENTION_FUNCTIONS[before](module, query, *arguments, **named)

    AttentionInterface.register(_PROBE, attention)
    AttentionMaskInterface.register(_PROBE, ALL_MASK_ATTENTION_FUNCTIONS[before])
    try:
        model.config._attn_implementation = _PROBE
        yield found
    finally:
        model.config._attn_implementation = before


@dataclass(frozen=True)
class Read:
    """A prompt as the plain model read it.

    Attributes:
        logits: (1, vocabulary) float32, behind its last token.
        layers: exact K and V, and all of the prompt's queries.
    """

    logits: torch.Tensor
    layers: list[LayerInput]

    def layers_for(self, policy: Policy) -> list[LayerInput]:
        """What a packed cache under ``policy`` would have seen: no more of the queries than it measures with."""
        window = policy.scoring_window
        return [replace(layer, queries=layer.queries[:, :, -window:] if window else None) for layer in self.layers]


def read(model: Any, cache: Any, tokens: torch.Tensor) -> Read:
    """Read tokens (1, s) int64 into an empty plain cache."""
    with probe(model) as seen:
        logits, _ = prefill(model, cache, tokens)
    layers = [
        LayerInput(layer.keys, layer.values, queries=asked.queries, scale=asked.scale)
        for layer, asked in zip(cache.layers, seen, strict=True)
    ]
    return Read(logits, layers)


def asked_next(model: Any, cache: Any, tokens: torch.Tensor) -> list[Asked]:
    """What tokens (q,) int64 ask of each layer, behind what a plain cache holds; they are added to it."""
    with probe(model) as seen:
        prefill(model, cache, tokens[None])
    return list(seen)


@dataclass
class ErrorSums:
    """Sums behind the cache's error against exact K and V; of one layer, or added up over layers and prompts."""

    elements: float = 0.0
    kept_rows: float = 0.0
    rows: float = 0.0
    key_square: float = 0.0
    value_square: float = 0.0
    key_cosine: float = 0.0
    value_cosine: float = 0.0
    key_cosine_kept: float = 0.0
    value_cosine_kept: float = 0.0
    layers: float = 0.0

    def add(self, other: ErrorSums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def summary(self) -> dict[str, float]:
        """The seed's fields: mean squared error over the whole cache (dropped tokens are zeros), cosine of the
        flattened layer, mean over layers, and mean cosine per kept row (token and head)."""
        return {
            "key_mse": self.key_square / self.elements,
            "value_mse": self.value_square / self.elements,
            "key_cosine": self.key_cosine / self.layers,
            "value_cosine": self.value_cosine / self.layers,
            "key_cosine_selected": self.key_cosine_kept / self.kept_rows,
            "value_cosine_selected": self.value_cosine_kept / self.kept_rows,
            "selected_fraction": self.kept_rows / self.rows,
        }


def error_sums(
    keys: torch.Tensor, values: torch.Tensor, stored_keys: torch.Tensor, stored_values: torch.Tensor, kept: torch.Tensor
) -> ErrorSums:
    """Exact K, V (b,h,s,d) against what is stored (the same shape, zeros where dropped), kept (b,h,s) bool."""
    sums = ErrorSums(elements=float(keys.numel()), kept_rows=float(kept.sum()), rows=float(kept.numel()), layers=1.0)
    for name, exact, stored in (("key", keys, stored_keys), ("value", values, stored_values)):
        # Sums over a row's channels in fp32, over rows in fp64.
        exact, stored = exact.float(), stored.float()
        square, product, norm, stored_norm = (
            (first * second).sum(-1).double()
            for first, second in (
                (exact - stored, exact - stored),
                (exact, stored),
                (exact, exact),
                (stored, stored),
            )
        )
        whole = math.sqrt(float(norm.sum()) * float(stored_norm.sum()))
        cosine = (product / (norm * stored_norm).sqrt().clamp(min=1e-30))[kept]
        setattr(sums, f"{name}_square", float(square.sum()))
        setattr(sums, f"{name}_cosine", float(product.sum()) / whole if whole else 1.0)
        setattr(sums, f"{name}_cosine_kept", float(cosine.sum()))
    return sums


def stored_rows(packed: Packed, index: int, like: LayerInput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a layer holds, each token at its place: keys, values (b,h,s,d), zeros where dropped; kept (b,h,s).

    ``packed`` has its positions (``compress_prompt(..., positions=True)``).
    """
    assert packed.positions is not None
    layer = packed.layers[index]
    b, h, s, d = like.shape
    counts = torch.from_numpy(layer.tokens.astype("int64"))
    lists = torch.arange(b * h).repeat_interleave(counts)
    column = torch.arange(len(lists)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.from_numpy(packed.positions[index].astype("int64"))
    found = []
    for rows in layer.unpack():
        whole = torch.zeros(b * h, s, d)
        whole[lists, place] = torch.from_numpy(rows).view(b * h, -1, d)[lists, column]
        found.append(whole.view(b, h, s, d))
    kept = torch.zeros(b * h, s, dtype=torch.bool)
    kept[lists, place] = True
    return found[0], found[1], kept.view(b, h, s)


# Errors of the attention output: in all; that of dropping tokens, the kept ones being exact; that of quantizing those.
_PARTS = ("", "_of_dropping", "_of_quantizing")


@torch.inference_mode()
def cache_errors(packed: Packed, layers: Sequence[LayerInput], asked: Sequence[Asked]) -> dict[str, Any]:
    """Errors of a packed prompt (no padding) against its exact K and V: the fields of ``ErrorSums.summary``, and the
    relative error (L2) of the attention output to the queries ``asked`` of each layer, overall and per layer.

    ``attention_output_error_of_dropping`` is what is left of it where the kept tokens are exact, ``..._of_quantizing``
    the distance from there to the packed layer's output.
    """
    sums = ErrorSums()
    squares, norms = [], []
    for index, layer in enumerate(layers):
        stored_keys, stored_values, kept = stored_rows(packed, index, layer)
        sums.add(error_sums(layer.keys, layer.values, stored_keys, stored_values, kept))
        parts, norm = attention_errors(packed.layers[index], asked[index], layer.keys, layer.values, kept)
        squares.append(parts)
        norms.append(norm)
    whole = {
        f"attention_output_error{name}": math.sqrt(sum(part) / sum(norms))
        for name, part in zip(_PARTS, zip(*squares, strict=True), strict=True)
    }
    return {
        **sums.summary(),
        **whole,
        "attention_output_error_per_layer": [math.sqrt(s[0] / n) for s, n in zip(squares, norms, strict=True)],
    }


def attention_errors(
    layer: PackedLayer, asked: Asked, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
) -> tuple[tuple[float, float, float], float]:
    """Squared errors of attention over a packed layer (in all, of dropping, of quantizing), and the squared norm of
    exact attention in fp32.

    Every query sees all of keys, values (b,h,s,d), of which the layer holds those that are kept (b,h,s).
    """
    queries = asked.queries.float()
    group = queries.shape[1] // keys.shape[1]
    k, v, mask = (part.repeat_interleave(group, dim=1) for part in (keys.float(), values.float(), kept))
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(queries, k, v, scale=asked.scale)
    # A head that keeps nothing puts out zeros.
    some = mask.any(-1)[..., None, None]
    on_kept = attend(queries, k, v, attn_mask=mask[:, :, None] | ~some, scale=asked.scale) * some
    # One query at a time: several at once would be taken for new tokens, of which the first do not see the last.
    rows = [layer.attend(query.contiguous(), scale=asked.scale) for query in torch.split(queries, 1, dim=2)]
    out = torch.cat(rows, dim=2)
    total, dropping, quantizing = (
        float((x - y).square().sum()) for x, y in ((out, exact), (on_kept, exact), (out, on_kept))
    )
    return (total, dropping, quantizing), float(exact.square().sum())
