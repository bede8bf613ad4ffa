"""``kvcomp bench decode``: generate with a model of known shape and random weights, from the packed cache and from
transformers' own: time to the first token, time per token, bytes, and where a step's time goes.

Every cell is checked: the logits of its first decode steps, of the first sequence, against transformers' attention over
what the cache holds, unpacked, given the same tokens; a plain cache's against the bf16 DynamicCache. How far
quantization takes the logits of such a model from the bf16 cache's, which says nothing about a trained one, is in
``bf16_cache_error``. Parts that the results file has already are not measured again, so that a bench can be made in
slices of some minutes each. Every prompt is read whole: no cache is made up or copied.
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

from .. import Policy, results, w4
from ..errors import first_line
from ..hf import compress
from . import decode_goals

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

# What two orders of summing in bf16 differ by at most, of logits behind one layer; it grows with the layers' root
# (measured: 0.015 behind 2, 0.063 behind 32). A rival that quantizes is another cache: only nonsense is refused.
_BF16, _OTHER = 0.025, 1.0
# The first that a kernel's name matches.
_KINDS = (
    ("attend", r"attend"),
    ("append", r"append"),
    ("divide", r"divide"),
    ("attention", r"flash|fmha|sdpa|cudnn_generated|attention"),
    ("linear", r"w4_|gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|(^|_)(add)?b?mm(_|$)"),
)


@dataclass
class Settings:
    """What is measured. ``weight_bits``: 16, and 4 (all layers, groups of 128, E5M5 scales) for kvcomp's cache alone.
    ``compile``, ``graphs``: of kvcomp.compress. ``layers``: fewer or more than the shape has;
    ``minutes``: no part is begun later than this."""

    shape: str = "llama-3.1-8b"
    layers: int | None = None
    batches: Sequence[int] = (1, 8, 32)
    context: int = 32768
    new: int = 256
    bits: Sequence[int] = (4,)
    weight_bits: Sequence[int] = (16,)
    rivals: Sequence[str] = RIVALS
    device: str = "cuda"
    compile: Any = "auto"
    graphs: bool = True
    first_samples: int = 3
    minutes: float | None = None
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """Of the model."""
        return SHAPES[self.shape] | ({} if self.layers is None else {"num_hidden_layers": self.layers})

    @property
    def name(self) -> str:
        """Of the model, in results."""
        return self.shape if self.layers is None else f"{self.shape}, {self.layers} layers"


@dataclass
class _Answer:
    """One generate call."""

    first_ms: float
    token_ms: list[float]
    tokens: torch.Tensor
    logits: list[torch.Tensor] = field(default_factory=list)  # (vocabulary,) of the first sequence
    cache: Any = None


class _Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Never stops; notes when each token is there: on a GPU by events, which make nobody wait."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._on_gpu = ids.device.type == "cuda"
        self._going_on = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self._marks: list[Any] = []
        _wait(ids.device)
        self._mark()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **arguments: Any) -> torch.Tensor:
        self._mark()
        return self._going_on

    def _mark(self) -> None:
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
        event.record()
        self._marks.append(event)

    def token_ms(self) -> list[float]:
        """From each mark to the next; the first is when the clock was made."""
        if self._on_gpu:
            self._marks[-1].synchronize()
            return [before.elapsed_time(after) for before, after in itertools.pairwise(self._marks)]
        return [1e3 * (after - before) for before, after in itertools.pairwise(self._marks)]


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
    """A results object of kind ``decode``. ``before``: one to go on with, of the same machine, versions, seed and way
    of decoding; ``save`` is called with what is there after every part. ValueError for settings out of range."""
    _check(settings)
    began = time.perf_counter()
    device = torch.device(settings.device)
    found = results.new("decode", command=command)
    found["settings"] = {"compile": settings.compile, "graphs": settings.graphs, "seed": settings.seed}
    found = results.continued(found, before, ("machine", "versions", "settings"), tell)
    found.setdefault("not_measured", {})
    done = {(cell["impl"], *sorted(cell["case"].items())) for cell in found["cells"]}
    parts = [part for part in _parts(settings) if (part[0], *sorted(part[1].items())) not in done]
    if not parts:
        return found
    model = build(settings.config, device, settings.seed)
    _wait(device)
    found["weight_bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    tell(
        f"{settings.name}, {found['weight_bytes'] / 1e9:.1f} GB of random weights: {time.perf_counter() - began:.0f} s"
    )
    for impl, case, measure in parts:
        name = f"{impl}, batch {case['b']}, {case['s']} tokens, {case['k_bits']} bit"
        name += "" if case["w_bits"] == 16 else f", weights of {case['w_bits']} bit"
        started = time.perf_counter()
        if settings.minutes is not None and started - began > 60 * settings.minutes:
            tell(f"{name}: left for the next run, after {settings.minutes:g} minutes")
            continue
        tell(name)
        if case["w_bits"] == 4 and not w4.report(model).layers:
            quantized = w4.quantize_model(model, "all")
            found["packed_weights"] = {
                "bytes": quantized.nbytes, "bits_per_weight": quantized.bits_per_weight, "stacks": quantized.stacks
            }  # fmt: skip
            _tidy(device)
        try:
            cell = measure(model, impl, case)
        except (torch.OutOfMemoryError, MemoryError) as error:
            found["not_measured"][name] = "out of memory: " + first_line(error)
        except ImportError as error:
            found["not_measured"][name] = str(error)
        except Exception as error:
            if impl == "kvcomp":
                raise
            found["not_measured"][name] = first_line(error)  # a rival's own reason for not being here
        else:
            found["not_measured"].pop(name, None)
            found["cells"].append(cell)
            tell(
                f"{name}: first token {cell['ttft_ms']:.1f} ms, then {cell['tpot_ms']:.2f} ms a token; "
                f"{time.perf_counter() - started:.0f} s"
            )
        # A rival's compiled forward would be made anew for any batch, instead of for the next one.
        vars(model).pop("_compiled_call", None)
        if name in found["not_measured"]:
            tell(f"{name}: not measured: {found['not_measured'][name]}")
        torch._dynamo.reset()
        _tidy(device)
        found["cells"] = decode_goals.relate(found["cells"])
        save(found)
    return found


def _check(settings: Settings) -> None:
    if settings.shape not in SHAPES:
        raise ValueError(f"bench: --model-shape: expected one of {', '.join(SHAPES)}, got {settings.shape}")
    for name, least in (("context", 2), ("new", WARM_TOKENS + CHECKED + 1), ("first_samples", 1), ("layers", 1)):
        if getattr(settings, name) is not None and getattr(settings, name) < least:
            raise ValueError(
                f"bench: --{name.replace('_', '-')}: expected {least} or more, got {getattr(settings, name)}"
            )
    most = settings.config["max_position_embeddings"] - settings.new - WARM_TOKENS - 2 * PROFILED
    if settings.context > most:
        raise ValueError(f"bench: --context: expected at most {most} for {settings.shape}, got {settings.context}")
    if not settings.batches or min(settings.batches) < 1:
        raise ValueError(f"bench: --batch: expected 1 or more, got {list(settings.batches)}")
    for rival in settings.rivals:
        if rival not in RIVALS:
            raise ValueError(f"bench: --rivals: expected among {', '.join(RIVALS)} or none, got {rival}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: --device: expected a CUDA device that torch can use, got none")


def build(shape: dict[str, Any], device: torch.device, seed: int = 0) -> Any:
    """A model of this shape, bf16, weights N(0, 0.02^2), made where it is to be."""
    config = transformers.LlamaConfig(
        **shape, tie_word_embeddings=False, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None
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

    # The model is quantized in place, so 4-bit weights come last.
    for w_bits, batch in itertools.product(sorted(settings.weight_bits, reverse=True), settings.batches):
        case = {"model": settings.name, "b": batch, "s": settings.context, "w_bits": w_bits, "new": settings.new}
        for bits in settings.bits:
            parts.append(("kvcomp", case | {"k_bits": bits, "v_bits": bits}, ours))
        for name in settings.rivals if w_bits == 16 else ():
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
    # Libraries load kernels when they are first called; those for long prompts are others than those for short ones.
    _answer(model, ids[:, :_SHORT], WARM_TOKENS, {})
    _answer(model, ids[:1], 1, arguments)
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
        values |= {"replayed_steps": packing.steps.replays - replays, "joined": packing.steps.joined}
        values["compile"] = str(settings.compile)
    if device.type == "cuda" and "cache_implementation" not in arguments:
        shares = values["shares"] = _shares(model, cache, answer.tokens)
        shares["around_ms"] = max(0.0, values["tpot_ms"] - shares["step_ms"])
    tokens, logits = answer.tokens[:1, settings.context :], answer.logits
    del answer, cache
    if packing is not None:
        packing.cache = None
    _tidy(device)
    plain = _plain(model, ids[:1])
    metric, value = "bf16 DynamicCache", _difference(model, plain, tokens, logits)
    bound = _OTHER if packing is None and case["k_bits"] < 16 else _BF16 * model.config.num_hidden_layers**0.5
    del plain
    if packing is not None:
        values["bf16_cache_error"] = value
        metric, value = "packed cache, unpacked", _difference(model, _held(model, ids[:1], packing), tokens, logits)
    metric = f"relative error (L2) of the logits of {len(logits) - 1} steps, first sequence, against the {metric}"
    return results.cell(impl, case, error={"metric": metric, "value": value, "bound": bound}, **values)


def _answer(model: Any, ids: torch.Tensor, new: int, arguments: dict[str, Any]) -> _Answer:
    keep, mask = _Keep(), torch.ones_like(ids)
    clock = _Clock(ids)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
        logits_processor=transformers.LogitsProcessorList([keep]),
        **arguments,
    )
    steps = clock.token_ms()
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
        names = ("keys", "values", "_quantized_keys", "_quantized_values")
        held = sum(_bytes(vars(layer).get(name)) for layer in cache.layers for name in names)
    return {"kv_bytes": int(held), "kv_ratio": plain / held if held else None}


def _bytes(part: Any) -> int:
    """Of a tensor, of those that a quantized one is made of, of all tensors in a container."""
    if isinstance(part, dict):
        return sum(_bytes(value) for value in part.values())
    if isinstance(part, list | tuple):
        return sum(_bytes(value) for value in part)
    if not isinstance(part, torch.Tensor):
        return 0
    if hasattr(part, "__tensor_flatten__"):
        return sum(_bytes(getattr(part, name)) for name in part.__tensor_flatten__()[0])
    return int(part.nbytes)


def _plain(model: Any, ids: torch.Tensor) -> Any:
    """A DynamicCache that has read ids (1, n)."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _held(model: Any, ids: torch.Tensor, packing: Any) -> Any:
    """A DynamicCache of what the packed cache holds once it has read ids (1, n)."""
    _answer(model, ids, 1, {})
    cache = transformers.DynamicCache(config=model.config)
    for i, layer in enumerate(packing.cache._state.packed.layers):
        cache.update(*(torch.from_numpy(rows).to(ids.device, model.dtype) for rows in layer.unpack()), i)
    packing.cache = None
    return cache


def _difference(model: Any, cache: Any, tokens: torch.Tensor, logits: list[torch.Tensor]) -> float:
    """Of the logits of decode steps 1 .. CHECKED, from those of the cache given the same tokens; the largest."""
    worst, context = 0.0, int(cache.get_seq_length())
    with torch.no_grad():
        for step, ours in enumerate(logits[1:]):
            positions = torch.full((1, 1), context + step, device=tokens.device)
            out = model(
                input_ids=tokens[:, step : step + 1], position_ids=positions, past_key_values=cache, use_cache=True
            )
            expected = out.logits[0, -1].float()
            worst = max(worst, float((ours - expected).norm() / expected.norm()))
    return worst


def _shares(model: Any, cache: Any, sequences: torch.Tensor) -> dict[str, Any]:
    """Milliseconds of a decode step by kind of kernel, the whole step's, and what of it no kernel ran in.

    The host does not wait between these steps, as generate does."""
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
    fused = kernel.startswith("triton_")  # named after all that it stands between, attention too
    for kind, pattern in _KINDS:
        if re.search(pattern, kernel, re.IGNORECASE) and (kind == "linear" or not fused):
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
