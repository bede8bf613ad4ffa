"""One repeat of the offline bench, in a process of its own: a model is loaded and quantized once, then every prompt
length is answered at every output length, and each is one line of JSON.

    python -m kvcomp.bench.offline_repeat --prompt_lens 128 --output_lens 64 --out_jsonl FILE --run_id_prefix NAME

A prompt has exactly so many tokens, drawn from the seed; an answer has exactly so many, greedy, whatever they are: none
ends it. Time to the first token and time per token are of the same answer, by events on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from .. import Policy, results
from ..env import installed
from ..errors import one_line
from ..hf import Cache, compress
from ..w4 import arms
from ..w4.matrix import Arm
from . import decode, power

BAD_INPUT = 2
WARM_PROMPT, WARM_OUTPUT = 128, 32
_ENERGY_SECONDS = 1.2  # a little more than power.LEAST_SECONDS
CACHES = ("auto", "kv16", "kv8", "kv4", "kv3", "kv2")
# Shapes of known models; their weights are random, which takes as long as others.
_PHI = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072, "sliding_window": None,
}  # fmt: skip
SHAPES = ("phi-3.5-mini", *decode.SHAPES)


@dataclass
class Subject:
    """A model that is measured, and how."""

    model: Any
    name: str
    arm: Arm
    kv_cache_dtype: str
    device: torch.device
    seed: int
    digest: str  # of arms.digest, before it was quantized
    weights: dict[str, Any]  # of arms.prepare


@dataclass
class Timed:
    """One answer. Milliseconds since its start of: the prompt read, and every token there."""

    read_ms: float
    token_ms: list[float]
    kv_bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as reason:
        print(f"offline: {one_line(reason)}", file=sys.stderr, flush=True)
        return BAD_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvcomp.bench.offline_repeat", description=__doc__.split("\n")[0])
    parser.add_argument("--prompt_lens", type=int, nargs="+", required=True)
    parser.add_argument("--output_lens", type=int, nargs="+", required=True)
    parser.add_argument("--quant_mode", choices=["none", "fp8", "fp8_te", "w4a16_bnb", "w4a16_bnb_dq",
                                                 "w4_shared_scale"], default="none")  # fmt: skip
    parser.add_argument("--scale_mbits", type=int, default=-1)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--quant_target", choices=["mlp", "all"], default="mlp")
    parser.add_argument("--rounding", choices=["floor", "nearest", "search"], default="nearest")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--warmup_runs", type=int, default=1)
    parser.add_argument("--leave_out", action="store_true", help="what does not fit is left out, and said")
    parser.add_argument("--out_jsonl", type=Path, required=True)
    parser.add_argument("--run_id_prefix", required=True)
    add_subject(parser)
    return parser


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model is measured, and where; shared with the driver."""
    parser.add_argument("--model", help="folder or name of a transformers model (default: the shipped tiny-base)")
    parser.add_argument("--model2", help="a second one")
    parser.add_argument("--model_shape", choices=SHAPES, help="a model of this shape with random weights, instead")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--kv_cache_dtype", choices=CACHES, help="auto: the framework's cache; kv16 ... kv2: kvcomp's "
                        "packed one, whose decode steps are recorded as CUDA graphs")  # fmt: skip
    parser.add_argument("--seed", type=int, help="of prompts")


def run(options: argparse.Namespace) -> None:
    for name, least in (("prompt_lens", 1), ("output_lens", 1), ("warmup_runs", 0)):
        given = getattr(options, name)
        if min(given if isinstance(given, list) else [given]) < least:
            raise ValueError(f"--{name}: expected {least} or more, got {given}")
    if options.model_shape is not None and (options.model or options.model2):
        raise ValueError(f"--model_shape: expected none with --model or --model2, got {options.model_shape}")
    if options.out_jsonl.exists():
        raise ValueError(f"--out_jsonl: expected a new file, got {options.out_jsonl}")
    device = device_of(options.device)
    arm = Arm(
        options.run_id_prefix, "", options.quant_mode, options.dtype, options.scale_mbits, options.group_size,
        options.quant_target, options.rounding,
    )  # fmt: skip

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            for record in _records(options, arm, device):
                file.write(json.dumps(record, allow_nan=False) + "\n")

    results.replace(options.out_jsonl, write)


def _records(options: argparse.Namespace, arm: Arm, device: torch.device) -> Iterator[dict[str, Any]]:
    for number, path in enumerate([options.model, *([options.model2] if options.model2 else [])]):
        if options.model_shape is not None:
            model = build(options.model_shape, device, arms.DTYPES[arm.dtype])
            name = f"{options.model_shape} shape, random weights"
        else:
            model, name = arms.load(path, arm.dtype, device)
        digest = arms.digest(model)
        weights = arms.prepare(model, arm)
        subject = Subject(
            model, name, arm, options.kv_cache_dtype or "auto", device, options.seed or 0, digest, weights
        )
        prefix = options.run_id_prefix + (f"-model{number + 1}" if number else "")
        with _packing(subject):
            yield from sweep(
                subject, options.prompt_lens, options.output_lens, options.warmup_runs, prefix,
                leave_out=options.leave_out,
            )  # fmt: skip
        del model, subject
        _tidy(device)


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a CUDA device that torch can use, got none")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of a known shape with random weights, made where it is to be."""
    if shape in decode.SHAPES:
        return decode.build(decode.SHAPES[shape], device).to(dtype)
    config = transformers.Phi3Config(
        **_PHI, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def sweep(
    subject: Subject,
    prompts: Sequence[int],
    outputs: Sequence[int],
    warmup: int,
    prefix: str,
    *,
    leave_out: bool = False,
) -> Iterator[dict[str, Any]]:
    """A record for every prompt length and output length. ValueError, before anything is measured, for lengths that the
    model has no positions for, unless they are to be left out."""
    most = getattr(subject.model.config, "max_position_embeddings", None)
    cells = list(itertools.product(dict.fromkeys(prompts), dict.fromkeys(outputs)))
    if most is not None and not leave_out:
        for prompt, output in cells:
            if prompt + output > most:
                raise ValueError(
                    f"--prompt_lens: expected prompt and output of at most {most} tokens, the positions of "
                    f"{subject.name}, got {prompt} and {output}"
                )
    gpu = power.Gpu(torch.cuda.current_device() if subject.device.type == "cuda" else None)
    idle = power.idle_watts(gpu)
    for _ in range(warmup):
        answer(subject, _ids(subject, WARM_PROMPT), WARM_OUTPUT)
    for prompt, output in cells:
        head = {"run_id": f"{prefix}-p{prompt}-o{output}", "env": environment(subject.device)}
        before = gpu.state()
        reason = None
        if most is not None and prompt + output > most:
            reason = f"{subject.name} has {most} positions"
        else:
            try:
                found, after = measure(subject, prompt, output, gpu, idle)
            except torch.OutOfMemoryError as error:
                if not leave_out:
                    raise NotImplementedError(
                        f"{prompt} tokens in, {output} out: {str(error).splitlines()[0]}"
                    ) from None
                reason = "out of memory"
        _tidy(subject.device)
        states = {"gpu_state_before": before, "gpu_state_after": gpu.state() if reason is not None else after}
        if reason is not None:
            print(f"offline: {head['run_id']}: left out: {reason}", file=sys.stderr, flush=True)
            yield head | states | {"result": None, "left_out": reason}
            continue
        found["flags"] = power.flags(*states.values())
        yield head | states | {"result": found}


def measure(
    subject: Subject, prompt: int, output: int, gpu: power.Gpu, idle: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of one cell, and the GPU's state: the worst of those right after the timed answer and during the ones
    whose energy is measured."""
    cuda = subject.device.type == "cuda"
    ids = _ids(subject, prompt)
    if cuda:
        answer(subject, ids, min(output, 4))  # memory of this size is there, and kernels are loaded and chosen
        torch.cuda.reset_peak_memory_stats()
    timed = answer(subject, ids, output)
    states = [gpu.state()]
    peak = (torch.cuda.max_memory_allocated() + _packed_bytes(subject, timed)) / results.MIB if cuda else None
    total = timed.token_ms[-1]
    steps = [later - earlier for earlier, later in itertools.pairwise(timed.token_ms)]
    arm = subject.arm
    result = {
        "model": subject.name,
        "model_digest": subject.digest,
        "device": subject.device.type,
        "quant_mode": arm.mode,
        "scale_mbits": arm.scale_mbits,
        "group_size": arm.group_size,
        "quant_target": arm.quant_target,
        "rounding": arm.rounding,
        "dtype": arm.dtype,
        "kv_cache_dtype": subject.kv_cache_dtype,
        "prompt_len": ids.shape[1],
        "output_len": len(timed.token_ms),
        "prefill_ms": timed.read_ms,
        "ttft_ms": timed.token_ms[0],
        "tpot_ms": sum(steps) / len(steps) if steps else None,
        "tpot_p50_ms": median(steps) if steps else None,
        "total_gen_ms": total,
        "throughput_total_tok_s": (prompt + output) / total * 1e3,
        "throughput_output_tok_s": output / total * 1e3,
        "model_mem_mb": subject.weights["weight_bytes"] / results.MIB,
        "peak_gpu_mem_mb": peak,
        "kv_bytes": timed.kv_bytes,
        **{name: subject.weights[name] for name in ("bits_per_weight", "quantized_layers")},
        **energy(subject, ids, output, gpu, idle, states),
        "token_ms": timed.token_ms,
    }
    return result, power.worst(*states)


def answer(subject: Subject, ids: torch.Tensor, output: int) -> Timed:
    """Reads ids (1, prompt) and answers greedily with exactly ``output`` tokens; nothing ends it earlier."""
    model, device = subject.model, subject.device
    positions = torch.arange(ids.shape[1] + output, device=device)[None]
    with torch.no_grad():
        cache = _empty_cache(subject)
        clock = _Clock(device)
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        clock.mark()
        chosen = out.logits[:, -1:].argmax(-1)
        clock.mark()
        for at in range(ids.shape[1], ids.shape[1] + output - 1):
            out = model(input_ids=chosen, position_ids=positions[:, at : at + 1], past_key_values=cache, use_cache=True)
            chosen = out.logits[:, -1:].argmax(-1)
            clock.mark()
        read, *tokens = clock.milliseconds()
        nbytes = (
            cache.nbytes
            if isinstance(cache, Cache)
            else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        )
        return Timed(read, tokens, int(nbytes))


def _policy(subject: Subject) -> Policy | None:
    """Of the packed cache that is measured; None: the framework's cache is."""
    kind = subject.kv_cache_dtype
    return None if kind == "auto" else Policy(bits=int(kind.removeprefix("kv")))


def _packing(subject: Subject) -> Any:
    """Inside, decode steps over packed caches are recorded and replayed where there is a GPU."""
    policy = _policy(subject)
    return contextlib.nullcontext() if policy is None else compress(subject.model, policy)


def _empty_cache(subject: Subject) -> Any:
    policy, config = _policy(subject), subject.model.config
    return transformers.DynamicCache(config=config) if policy is None else Cache(config, policy)


class _Clock:
    """Moments since it was made: events on a GPU, whose host runs ahead; the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        first, *rest = self._marks
        if self._cuda:
            torch.cuda.synchronize()
            return [float(first.elapsed_time(mark)) for mark in rest]
        return [1e3 * (mark - first) for mark in rest]


def energy(
    subject: Subject, ids: torch.Tensor, output: int, gpu: power.Gpu, idle: float | None, states: list[dict[str, Any]]
) -> dict[str, Any]:
    """Joules for a generated token, what an idle GPU takes subtracted: of answers that are not timed, as many as take
    about a second, so that a counter of ten readings a second can tell. The GPU's states meanwhile go to ``states``."""
    if gpu.why is not None:
        return {"joules_per_token": None, "energy": {"why": gpu.why}}

    def joules(tokens: int) -> tuple[power.Energy, int]:
        count = 0

        def answers() -> None:
            nonlocal count
            end = time.perf_counter() + _ENERGY_SECONDS
            while count == 0 or time.perf_counter() < end:
                answer(subject, ids, tokens)
                count += 1

        return power.measure(gpu, lambda: states.extend(power.watch(gpu, answers)), idle=idle), count

    whole, answers = joules(output)
    prefill, prefills = joules(1)
    why = whole.why or prefill.why
    if why is not None or whole.net is None or prefill.net is None:
        return {"joules_per_token": None, "energy": {"why": why or "the power of the idle GPU is not known"}}
    per_answer, per_prefill = whole.net / answers, prefill.net / prefills
    assert whole.joules is not None
    return {
        "joules_per_token": per_answer / output,
        "energy": {
            "source": whole.source,
            "idle_w": idle,
            "joules_per_token_with_idle": whole.joules / answers / output,
            "prefill_joules": per_prefill,
            "decode_joules_per_token": (per_answer - per_prefill) / (output - 1) if output > 1 else None,
            "answers": answers,
            "seconds": whole.seconds,
            "why": None,
        },
    }


def _ids(subject: Subject, length: int) -> torch.Tensor:
    """(1, length) tokens of the vocabulary, the same for every configuration."""
    generator = torch.Generator().manual_seed(subject.seed)
    return torch.randint(0, subject.model.config.vocab_size, (1, length), generator=generator).to(subject.device)


def _packed_bytes(subject: Subject, timed: Timed) -> int:
    """Packed pages are not torch's memory."""
    return 0 if subject.kv_cache_dtype == "auto" else timed.kv_bytes


def environment(device: torch.device) -> dict[str, Any]:
    """Where a record was made; no names of hosts or users."""
    found, machine = results.versions(), results.machine()
    env = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **{name: machine[name] for name in ("platform", "cpu", "cores")},
        "threads": torch.get_num_threads(),
        **{name: found[name] for name in ("kvcomp", "git", "python", "torch", "transformers")},
        "bitsandbytes": installed("bitsandbytes"),
        "cuda_version": torch.version.cuda,
        "gpu_name": None,
        "gpu_count": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "gpu_cc": None,
        "gpu_mem_total_bytes": None,
        **{name: os.environ.get(name) for name in ("COLAB_RELEASE_TAG", "NVIDIA_VISIBLE_DEVICES")},
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        env["gpu_name"] = properties.name
        env["gpu_cc"] = f"{properties.major}.{properties.minor}"
        env["gpu_mem_total_bytes"] = properties.total_memory
    return env


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
