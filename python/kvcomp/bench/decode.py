"""``kvcomp bench decode``: generate with a model of known shape and random weights, from the packed cache and from
transformers' own: time to the first token, time per token, bytes, and where a step's time goes.

Every cell is checked: the logits of its first decode steps, of the first sequence, against the plain bf16 cache that is
given the same tokens. Parts that the results file has already are not measured again.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
import transformers

from .. import Policy, results
from ..hf import compress

RIVALS = ("dynamic", "static", "quantized")
WARM_TOKENS = 4  # of each answer, left out of the median: recording, compiling
CHECKED = 4  # decode steps whose logits are compared
PROFILED = 8  # decode steps that are profiled
_SHORT = 128  # tokens of the prompt that readies libraries

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_parameters": _LLAMA3,
    },
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 256, "vocab_size": 320, "max_position_embeddings": 4096,
    },
}  # fmt: skip

# Relative error of rows at these bits (design of the default scales: 0.116, 0.036, 0.011 of the variance), and what two
# orders of summing in bf16 differ by at most.
_ROWS = {2: 0.34, 3: 0.19, 4: 0.105, 8: 0.008, 16: 0.0}
_BF16 = 0.03
# The first that a kernel's name matches.
_KINDS = (
    ("attend", r"attend"),
    ("append", r"append"),
    ("divide", r"divide"),
    ("attention", r"flash|fmha|sdpa|cudnn_generated|attention"),
    ("linear", r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|(^|_)(add)?b?mm(_|$)"),
)


@dataclass
class Settings:
    """What is measured. ``compile``, ``graphs``: of kvcomp.compress."""

    shape: str = "llama-3.1-8b"
    batches: Sequence[int] = (1, 8, 32)
    context: int = 32768
    new: int = 256
    bits: Sequence[int] = (4,)
    rivals: Sequence[str] = RIVALS
    device: str = "cuda"
    compile: Any = "auto"
    graphs: bool = True
    first_samples: int = 2
    seed: int = 0


@dataclass
class _Answer:
    """One generate call."""

    first_ms: float
    token_ms: list[float]
    tokens: torch.Tensor
    logits: list[torch.Tensor] = field(default_factory=list)  # (vocabulary,) of the first sequence
    cache: Any = None


class _Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes when each token was there. generate waits for the device at every token anyway."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.times = device, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **arguments: Any) -> torch.Tensor:
        _wait(self._device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Keep(transformers.LogitsProcessor):  # type: ignore[misc]
    """Changes nothing; keeps the first sequence's logits of the first steps."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.logits) <= CHECKED:
            self.logits.append(scores[0].float().clone())
        return scores


def bench(
    settings: Settings,
    *,
    command: str,
    before: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda found: None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """A results object of kind ``decode``. ``before``: one to go on with, of the same machine and versions; ``save`` is
    called with what is there after every part. ValueError for settings out of range."""
    _check(settings)
    device = torch.device(settings.device)
    found = results.new("decode", command=command)
    if before is not None and all(before.get(name) == found[name] for name in ("machine", "versions")):
        found = before | {"command": command}
    found.setdefault("not_measured", {})
    done = {(cell["impl"], *sorted(cell["case"].items())) for cell in found["cells"]}
    parts = [part for part in _parts(settings) if (part[0], *sorted(part[1].items())) not in done]
    if not parts:
        return found
    tell(f"making {settings.shape} with random weights")
    model = build(settings.shape, device, settings.seed)
    found["weight_bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    for impl, case, measure in parts:
        name = f"{impl}, batch {case['b']}, {case['s']} tokens, {case['k_bits']} bit"
        tell(name)
        started = time.perf_counter()
        try:
            cell = measure(model, impl, case)
        except torch.OutOfMemoryError as error:
            found["not_measured"][name] = "out of memory: " + str(error).splitlines()[0]
        except ImportError as error:
            found["not_measured"][name] = str(error)
        else:
            found["not_measured"].pop(name, None)
            found["cells"].append(cell)
            tell(
                f"{name}: first token {cell['ttft_ms']:.1f} ms, then {cell['tpot_ms']:.2f} ms a token; "
                f"{time.perf_counter() - started:.0f} s"
            )
        # A rival's compiled forward would be made anew for any batch, instead of for the next one.
        vars(model).pop("_compiled_call", None)
        torch._dynamo.reset()
        _tidy(device)
        save(found)
    return found


def _check(settings: Settings) -> None:
    if settings.shape not in SHAPES:
        raise ValueError(f"bench: --model-shape: expected one of {', '.join(SHAPES)}, got {settings.shape}")
    for name, least in (("context", 2), ("new", WARM_TOKENS + CHECKED + 1), ("first_samples", 1)):
        if getattr(settings, name) < least:
            raise ValueError(
                f"bench: --{name.replace('_', '-')}: expected {least} or more, got {getattr(settings, name)}"
            )
    most = SHAPES[settings.shape]["max_position_embeddings"] - settings.new - PROFILED
    if settings.context > most:
        raise ValueError(f"bench: --context: expected at most {most} for {settings.shape}, got {settings.context}")
    if not settings.batches or min(settings.batches) < 1:
        raise ValueError(f"bench: --batch: expected 1 or more, got {list(settings.batches)}")
    for rival in settings.rivals:
        if rival not in RIVALS:
            raise ValueError(f"bench: --rivals: expected among {', '.join(RIVALS)} or none, got {rival}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device: expected a CUDA device that torch can use, got none")


def build(shape: str, device: torch.device, seed: int = 0) -> Any:
    """A model of this shape, bf16, weights N(0, 0.02^2), made where it is to be."""
    config = transformers.LlamaConfig(
        **SHAPES[shape], tie_word_embeddings=False, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def _parts(settings: Settings) -> list[tuple[str, dict[str, Any], Callable[..., dict[str, Any]]]]:
    """(impl, case, measure) in the order of measuring."""
    parts: list[tuple[str, dict[str, Any], Callable[..., dict[str, Any]]]] = []
    plain: dict[str, tuple[str, int, dict[str, Any]]] = {
        "dynamic": ("transformers DynamicCache", 16, {}),
        "static": ("transformers StaticCache", 16, {"cache_implementation": "static"}),
        "quantized": (
            "transformers QuantizedCache", 4,
            {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}},
        ),
    }  # fmt: skip

    def ours(model: Any, impl: str, case: dict[str, Any]) -> dict[str, Any]:
        policy = Policy(bits=case["k_bits"])
        with compress(model, policy, graphs=settings.graphs, compile=settings.compile) as packing:
            return _cell(settings, model, impl, case, {}, packing)

    def rival(arguments: dict[str, Any]) -> Callable[..., dict[str, Any]]:
        def measure(model: Any, impl: str, case: dict[str, Any]) -> dict[str, Any]:
            if arguments.get("cache_implementation") == "quantized" and not _has_quanto():
                raise ImportError("optimum-quanto is not installed")
            return _cell(settings, model, impl, case, arguments, None)

        return measure

    for batch in settings.batches:
        case = {"model": settings.shape, "b": batch, "s": settings.context, "w_bits": 16, "new": settings.new}
        for bits in settings.bits:
            parts.append(("kvcomp", case | {"k_bits": bits, "v_bits": bits}, ours))
        for name in settings.rivals:
            impl, bits, arguments = plain[name]
            parts.append((impl, case | {"k_bits": bits, "v_bits": bits}, rival(arguments)))
    return parts


def _has_quanto() -> bool:
    try:
        return importlib.util.find_spec("optimum.quanto") is not None
    except ImportError:
        return False


def prompts(settings: Settings, batch: int, vocabulary: int) -> torch.Tensor:
    """(batch, context) random tokens; sequence i is the same in every batch."""
    rows = [
        torch.randint(0, vocabulary, (settings.context,), generator=torch.Generator().manual_seed(settings.seed + i))
        for i in range(batch)
    ]
    return torch.stack(rows).to(settings.device)


def _cell(
    settings: Settings, model: Any, impl: str, case: dict[str, Any], arguments: dict[str, Any], packing: Any
) -> dict[str, Any]:
    device = torch.device(settings.device)
    ids = prompts(settings, case["b"], model.config.vocab_size)
    _answer(model, ids[:, :_SHORT], WARM_TOKENS, {})  # readies libraries
    first = []
    for _ in range(settings.first_samples - 1):
        _tidy(device)
        first.append(_answer(model, ids, 1, arguments).first_ms)
    _tidy(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    replays = 0 if packing is None else packing.steps.replays
    answer = _answer(model, ids, settings.new, arguments)
    first.append(answer.first_ms)
    cache = answer.cache if packing is None else packing.cache
    samples = answer.token_ms[WARM_TOKENS:]
    values: dict[str, Any] = {
        "ttft_ms": median(first),
        "ttft_samples_ms": first,
        "tpot_ms": median(samples),
        "tpot_mean_ms": mean(samples),
        "tpot_samples_ms": answer.token_ms,
        "warm_tokens": WARM_TOKENS,
        "tokens_per_s": case["b"] / median(samples) * 1e3,
        "peak_bytes": _peak_bytes(device, packing),
        **_kv_bytes(cache, model, case["b"]),
    }
    if packing is not None:
        values |= {"replayed_steps": packing.steps.replays - replays, "compile": str(settings.compile)}
    if device.type == "cuda" and "cache_implementation" not in arguments:
        values["shares"] = _shares(model, cache, answer.tokens)
    tokens, logits = answer.tokens[:1, settings.context :], answer.logits
    del answer, cache
    if packing is not None:
        packing.cache = None
    _tidy(device)
    error = _error(model, ids[:1], tokens, logits, _ROWS[case["k_bits"]] + _BF16)
    return results.cell(impl, case, error=error, **values)


def _answer(model: Any, ids: torch.Tensor, new: int, arguments: dict[str, Any]) -> _Answer:
    clock, keep = _Clock(ids.device), _Keep()
    _wait(ids.device)
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
        logits_processor=transformers.LogitsProcessorList([keep]),
        **arguments,
    )
    times = [start, *clock.times]
    steps = [1e3 * (after - before) for before, after in itertools.pairwise(times)]
    return _Answer(steps[0], steps[1:], out.sequences, keep.logits, out.past_key_values)


def _peak_bytes(device: torch.device, packing: Any) -> int | None:
    """Memory that tensors took at most, and the packed pages, which are not torch's."""
    if device.type != "cuda":
        return None
    pages = 0
    if packing is not None and packing.cache._state.packed is not None:
        pages = int(packing.cache._state.packed.arena.nbytes)
    return int(torch.cuda.max_memory_allocated(device)) + pages


def _kv_bytes(cache: Any, model: Any, batch: int) -> dict[str, Any]:
    """Bytes that the cache holds at the end, and how many times fewer they are than those of its tokens in bf16."""
    config = model.config
    positions = int(cache.get_seq_length())
    head_dim = config.hidden_size // config.num_attention_heads
    plain = batch * positions * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2 * 2
    held = getattr(cache, "nbytes", None)
    if held is None:
        held = sum(
            part.nbytes
            for layer in cache.layers
            for part in (vars(layer).get("keys"), vars(layer).get("values"))
            if isinstance(part, torch.Tensor)
        )
    return {"kv_bytes": int(held), "kv_ratio": plain / held if held else None}


def _error(
    model: Any, ids: torch.Tensor, tokens: torch.Tensor, logits: list[torch.Tensor], bound: float
) -> dict[str, Any]:
    """Of the logits of decode steps 1 .. CHECKED, against the plain bf16 cache given the same tokens."""
    cache = transformers.DynamicCache(config=model.config)
    worst = 0.0
    context = ids.shape[1]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for step, ours in enumerate(logits[1:]):
            positions = torch.full((1, 1), context + step, device=ids.device)
            out = model(
                input_ids=tokens[:, step : step + 1], position_ids=positions, past_key_values=cache, use_cache=True
            )
            expected = out.logits[0, -1].float()
            worst = max(worst, float((ours - expected).norm() / expected.norm()))
    metric = f"relative error (L2) of the logits of {len(logits) - 1} steps, first sequence, against the bf16 cache"
    return {"metric": metric, "value": worst, "bound": bound}


def _shares(model: Any, cache: Any, sequences: torch.Tensor) -> dict[str, Any]:
    """Milliseconds of a decode step by kind of kernel, the whole step's, and what of it no kernel ran in."""
    position = int(cache.get_seq_length())
    tokens = sequences[:, -1:].contiguous()
    step: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1, "return_dict": True}

    def run(count: int) -> None:
        nonlocal position
        for _ in range(count):
            positions = torch.full(tuple(tokens.shape), position, device=tokens.device)
            model(input_ids=tokens, position_ids=positions, **step)
            position += 1
        torch.cuda.synchronize()

    with torch.no_grad():
        run(WARM_TOKENS)
        start = time.perf_counter()
        run(PROFILED)
        wall = 1e3 * (time.perf_counter() - start) / PROFILED
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(PROFILED)
    kinds: dict[str, float] = {}
    names: dict[str, float] = {}
    for event in profile.key_averages():
        took = float(event.self_device_time_total) / 1e3 / PROFILED
        if took <= 0:
            continue
        kind = kind_of(event.key)
        kinds[kind] = kinds.get(kind, 0.0) + took
        names[event.key[:120]] = took
    longest = dict(sorted(names.items(), key=lambda item: -item[1])[:16])
    return {
        "step_ms": wall,
        "kernels_ms": kinds,
        "idle_ms": max(0.0, wall - sum(kinds.values())),
        "longest_ms": longest,
    }


def kind_of(kernel: str) -> str:
    """The part of a decode step that a kernel of this name is."""
    for kind, pattern in _KINDS:
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "rest"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tidy(device: torch.device) -> None:
    """Gives back what the last part held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table of a results object: header, rows."""
    header = ("", "batch", "tokens", "bits", "first token ms", "ms a token", "tokens/s", "KV MiB", "x bf16", "peak GiB")
    made: list[tuple[str, ...]] = []
    for cell in found["cells"]:
        case, peak = cell["case"], cell["peak_bytes"]
        made.append(
            (
                cell["impl"],
                str(case["b"]),
                str(case["s"]),
                str(case["k_bits"]),
                f"{cell['ttft_ms']:.1f}",
                f"{cell['tpot_ms']:.2f}",
                f"{cell['tokens_per_s']:.0f}",
                f"{cell['kv_bytes'] / 2**20:.1f}",
                "" if cell["kv_ratio"] is None else f"{cell['kv_ratio']:.2f}",
                "" if peak is None else f"{peak / 2**30:.1f}",
            )
        )
    return header, made
