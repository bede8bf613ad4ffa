"""The ``kvcomp`` command. Exit codes: 0; 1 a cell over its error bound, or a table out of date; 2 bad input, with one
sentence; 130 interrupted.

What a subcommand needs is imported when it runs: ``kvcomp env`` works without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import one_line

BAD_INPUT = 2
INTERRUPTED = 130
_QUICK = {
    "length": 1024,
    "families": ("needle_single", "needle_multi_key"),
    "aware": 2,
    "agnostic": 1,
    "questions": 4,
    "windows": 1,
    "scored": 128,
    "single": 16,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    command = shlex.join(["kvcomp", *arguments])
    from .experiment.resume import Interrupted

    try:
        return int(options.run(options, command))
    except Interrupted as kept:
        return _stop(str(kept), INTERRUPTED)
    except KeyboardInterrupt:
        return _stop("interrupted", INTERRUPTED)
    except ModuleNotFoundError as reason:
        if options.traceback:
            raise
        return _stop(f"expected {reason.name} to be installed (pip install 'kvcomp[hf]'), got none", BAD_INPUT)
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError, MemoryError) as reason:
        if options.traceback:
            raise
        return _stop(one_line(reason), BAD_INPUT)


def _stop(sentence: str, code: int) -> int:
    print(f"kvcomp: {sentence}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvcomp", description="A byte budget for the KV cache.")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_quality(commands)
    _add_policies(commands)
    _add_bench(commands)
    _add_capture(commands)
    _add_tables(commands)
    env = commands.add_parser("env", help="versions, driver, backend, and why CUDA is off when it is")
    env.set_defaults(run=_env)
    return parser


# ---- kvcomp run


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="one experiment: compress, generate from the packed bytes, measure bytes and quality",
        description="Runs an experiment file. Without paths: on the shipped model and text. With --cache-path: on a "
        "stored KV cache (.pt or .safetensors, tensors keys and values, [L,T,H,D] or [L,B,H,T,D], and optionally "
        "attention, [L,T] or [L,H,T]). With --simulate: on a random one.",
    )
    run.add_argument("experiment", nargs="?", type=Path, metavar="CONFIG", help="experiment file (YAML or JSON)")
    run.add_argument("--config", type=Path, help="the same, as a flag")
    run.add_argument("--cache-path", type=Path, help="stored KV cache to compress")
    run.add_argument("--attention-stats", type=Path, help="attention of its tokens, where the cache's file has none")
    run.add_argument(
        "--simulate", action="store_true", help="compress random K and V; every figure is stamped simulated"
    )
    run.add_argument("--report-path", "--output", type=Path, help="write the results here, as JSON")
    run.add_argument("--plot", type=Path, help="write a picture of the results here")
    _add_workload(run)
    run.set_defaults(run=_run)


def _add_workload(parser: argparse.ArgumentParser, seed: int = 0) -> None:
    parser.add_argument("--model", type=Path, help="folder of a transformers model (default: the shipped tiny-base)")
    parser.add_argument("--text", type=Path, help="held-out ASCII text (default: the shipped one)")
    parser.add_argument("--length", type=int, help="bytes of each prompt (default: 4096; quick: 1024)")
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="tasks (default: all; quick: two)")
    parser.add_argument("--aware", type=int, help="tasks of each family whose question is in the prompt")
    parser.add_argument("--agnostic", type=int, help="contexts of each family, compressed before they are asked about")
    parser.add_argument("--questions", type=int, help="questions to each of those, at most")
    parser.add_argument("--windows", type=int, help="windows of held-out text")
    parser.add_argument("--scored", type=int, help="tokens scored in each window")
    parser.add_argument("--seed", type=int, default=seed, help=f"of tasks and of stochastic rounding (default: {seed})")
    parser.add_argument("--quick", action="store_true", help="few and short prompts: a look, not a measurement")


def _workload(options: argparse.Namespace, **defaults: Any) -> Any:
    from .eval import tasks
    from .experiment.workload import Workload

    if options.quick:
        defaults = dict(_QUICK)
    given = {
        name: value
        for name in ("length", "families", "aware", "agnostic", "questions", "windows", "scored", "seed")
        if (value := getattr(options, name)) is not None
    }
    for name, least in (("aware", 0), ("agnostic", 0), ("questions", 1), ("windows", 1), ("scored", 2), ("seed", 0)):
        if given.get(name, least) < least:
            raise ValueError(f"--{name}: expected {least} or more, got {given[name]}")
    for family in given.get("families", ()):
        if family not in tasks.FAMILIES:
            raise ValueError(f"--families: expected among {', '.join(tasks.FAMILIES)}, got {family}")
    if "families" in given:
        given["families"] = tuple(dict.fromkeys(given["families"]))
    return Workload(**{**defaults, **given})


def _subject(options: argparse.Namespace, beside: Path | None) -> Any:
    from .experiment import places, workload

    return workload.load(
        options.model or places.shipped(places.MODEL, "--model", beside=beside),
        options.text or places.shipped(places.TEXT, "--text", beside=beside),
    )


def _run(options: argparse.Namespace, command: str) -> int:
    from . import results
    from .experiment import config as experiment
    from .experiment import offline, report, runner

    if (options.experiment is None) == (options.config is None):
        raise ValueError("run: --config: expected one experiment file, got " + ("two" if options.config else "none"))
    path: Path = options.experiment or options.config
    for flag in ("report_path", "plot"):
        if getattr(options, flag) is not None:
            results.check_writable(getattr(options, flag), f"run: --{flag.replace('_', '-')}")
    config = experiment.load(path)
    kept = None
    if options.simulate or options.cache_path is not None or options.attention_stats is not None:
        with _status("compressing") as tell:
            found = offline.run(
                config,
                name=path.stem,
                command=command,
                cache_path=options.cache_path,
                attention_path=options.attention_stats,
                simulate=options.simulate,
                seed=options.seed,
                tell=tell,
            )
    else:
        found, kept = runner.run(
            config,
            _subject(options, path),
            _workload(options),
            name=path.stem,
            command=command,
            report=options.report_path,
            track=_track("compressing and asking"),
        )
    if options.report_path is not None:
        results.write(options.report_path, found)
    if kept is not None:
        kept.finish()
    report.print_experiment(found, _console())
    if options.plot is not None:
        from .experiment import plot

        plot.save(found, options.plot)
    return _judge(found)


# ---- kvcomp quality


def _add_quality(commands: Any) -> None:
    quality = commands.add_parser(
        "quality",
        help="several ratios, or experiment files, beside the uncompressed cache",
        description="Measures bf16 against every ratio (the plan chooses tokens and bits by itself) and every "
        "experiment file, on the same questions and text.",
    )
    quality.add_argument("--ratios", nargs="+", type=float, default=[4.0, 8.0, 12.0], help="default: 4 8 12")
    quality.add_argument("--configs", nargs="+", type=Path, default=[], help="experiment files, besides")
    quality.add_argument("--output", "--report-path", type=Path, help="write the results here, as JSON")
    _add_workload(quality)
    quality.set_defaults(run=_quality)


def _quality(options: argparse.Namespace, command: str) -> int:
    from . import results
    from .eval.quality import Method
    from .experiment import config as experiment
    from .experiment import report, runner
    from .policy import Policy

    if options.output is not None:
        results.check_writable(options.output, "quality: --output")
    # A table of several methods is read closely: more contexts and questions than one run asks.
    workload = _workload(options, aware=12, agnostic=4, questions=16, windows=8)
    methods = [
        Method(f"{ratio:g}x", ratio, Policy(target_ratio=ratio, seed=workload.seed))
        for ratio in dict.fromkeys(options.ratios)
    ]
    for path in options.configs:
        config = experiment.load(path)
        runner.refuse_metrics(config)
        policy = experiment.to_policy(config, prompt_tokens=workload.length, seed=workload.seed)
        methods.append(Method(path.stem, config.budget.target_compression_ratio, policy))
    found, kept = runner.compare(
        _subject(options, None), workload, methods, command=command, report=options.output, track=_track("measuring")
    )
    if options.output is not None:
        results.write(options.output, found)
    kept.finish()
    for title, rows in (("quality", report.quality_rows), ("by task", report.task_rows)):
        report.print_rows(*rows(found), _console(), title)
    return _judge(found)


# ---- kvcomp policies


def _add_policies(commands: Any) -> None:
    policies = commands.add_parser(
        "policies",
        help="eviction, quantization and joint plans at equal bytes; ways of coding rows",
        description="Measures every selector, ways of sharing out bits, and plans of both, on the same questions and "
        "text; each prompt is read once for all of them. A run that was cut short goes on with the same command, on "
        "any machine with the same sources.",
    )
    policies.add_argument("--ratios", nargs="+", type=float, help="default: 2 4 6 8 12; quick: 4")
    policies.add_argument("--methods", nargs="+", default=["*"], metavar="PATTERN", help="names, with * and ?; all")
    policies.add_argument("--jobs", type=int, default=1, help="processes that measure at once (default: 1)")
    policies.add_argument("--limit-seconds", type=float, help="stop then, and keep what is done")
    policies.add_argument("--output", "--report-path", type=Path, help="write the results here, as JSON")
    # Far from the seeds that defaults were chosen on.
    _add_workload(policies, seed=2000)
    policies.set_defaults(run=_policies)


def _policies(options: argparse.Namespace, command: str) -> int:
    from . import results
    from .experiment import methods, places, policies, policies_report, report

    if options.output is not None:
        results.check_writable(options.output, "policies: --output")
    if options.jobs < 1:
        raise ValueError(f"policies: --jobs: expected 1 or more, got {options.jobs}")
    if options.limit_seconds is not None and not options.limit_seconds > 0:
        raise ValueError(f"policies: --limit-seconds: expected more than 0, got {options.limit_seconds}")
    workload = _workload(options, aware=6, agnostic=6, questions=16, windows=8)
    ratios = dict.fromkeys(options.ratios or ([4.0] if options.quick else methods.RATIOS))
    text = options.text or places.shipped(places.TEXT, "--text")
    found, kept = policies.run(
        _subject(options, None),
        text,
        workload,
        list(ratios),
        options.methods,
        jobs=options.jobs,
        limit_seconds=options.limit_seconds,
        command=command,
        report=options.output,
        track=_track("measuring"),
    )
    if options.output is not None:
        results.write(options.output, found)
    kept.finish()
    for name, title in policies_report.TITLES.items():
        header, rows = policies_report.ROWS[name](found)
        if rows:
            report.print_rows(header, rows, _console(), title)
    for line in policies_report.goal_lines(found):
        _console().print(line, highlight=False)
    return _judge(found)


# ---- kvcomp bench


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="speed, beside rivals and ceilings of the same run")
    operations = bench.add_subparsers(required=True, metavar="OPERATION")
    attend = operations.add_parser("attend", help="decode attention over packed pages against torch's bf16 attention")
    attend.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    attend.add_argument("--output", type=Path, help="write the results here, as JSON")
    attend.add_argument("--tokens", type=int, help="tokens in the cache (cpu; default: 16384)")
    attend.add_argument("--bits", nargs="+", type=int, choices=[2, 3, 4, 8, 16], help="default: all that it measures")
    attend.add_argument("--sections", nargs="+", metavar="SECTION", help="parts to measure (cuda; default: all)")
    attend.add_argument("--samples", type=int, help="of every cell (default: 30; cuda: its own)")
    attend.add_argument("--minutes", type=float, help="begin nothing later than this; the next run goes on (cuda)")
    attend.add_argument("--seed", type=int, default=0)
    attend.set_defaults(run=_bench_attend)
    for name, doing in _CUDA_BENCHES.items():
        one = operations.add_parser(name, help=doing)
        one.add_argument("--device", choices=["cuda"], default="cuda")
        one.add_argument("--output", type=Path, help="write the results here, as JSON")
        one.add_argument("--samples", type=int, help="of every cell (default: its own)")
        one.add_argument("--seed", type=int, default=0)
        one.set_defaults(run=_bench_cuda, operation=name)
    _add_bench_decode(operations)
    _add_bench_bsr(operations)
    _add_bench_w4(operations)


# Operation: what its bench measures. On a GPU only, in kvcomp.bench.X_cuda or kvcomp.bench.X.
_CUDA_BENCHES = {
    "append": "a new token into the 16-bit tails, and aged ones into packed pages",
    "pack": "rows into packed pages, against the rate of copying",
    "score": "importance of a prompt's tokens from its last queries",
}


def _bench_attend(options: argparse.Namespace, command: str) -> int:
    if options.device == "cuda":
        options.operation = "attend"
        return _bench_cuda(options, command)
    for flag in ("sections", "minutes"):
        if getattr(options, flag) is not None:
            raise ValueError(f"bench: --{flag}: expected none with --device cpu, got {getattr(options, flag)}")
    from . import results
    from .bench import attend
    from .experiment import report

    if options.output is not None:
        results.check_writable(options.output, "bench: --output")
    tokens = 16384 if options.tokens is None else options.tokens
    found = attend.bench(
        command=command,
        tokens=tokens,
        bits=options.bits or [2, 3, 4, 8, 16],
        samples=30 if options.samples is None else options.samples,
        seed=options.seed,
    )
    if options.output is not None:
        results.write(options.output, found)
    title = f"attention of one decode step, {tokens} tokens, {found['threads']} threads"
    report.print_rows(*report.attend_rows(found), _console(), title)
    return _judge(found)


def _bench_cuda(options: argparse.Namespace, command: str) -> int:
    """A bench of one operation on a GPU: ``bench(command=..., ...)`` of its module, with what it takes of these."""
    import importlib
    import importlib.util
    import inspect

    from . import _C, results
    from .bench import goals

    name = options.operation
    if options.output is not None:
        results.check_writable(options.output, "bench: --output")
    info = _C.cuda_info()
    if not info["available"]:
        raise NotImplementedError(f"bench: --device: expected a CUDA device, got none: {info['why']}")
    own = f"{__package__}.bench.{name}_cuda"
    module = importlib.import_module(own if importlib.util.find_spec(own) else f"{__package__}.bench.{name}")
    takes = inspect.signature(module.bench).parameters
    given: dict[str, Any] = {"seed": options.seed}
    if "command" in takes:
        given["command"] = command
    if "before" in takes and options.output is not None and options.output.exists():
        given["before"] = results.read(options.output, kind=name)
    for flag in ("samples", "bits", "sections", "minutes", "tokens"):
        value = getattr(options, flag, None)
        if value is not None and flag not in takes:
            raise ValueError(f"bench: --{flag}: expected none for {name} on cuda, got {value}")
        if value is not None:
            given[flag] = value
    if "tell" in takes:
        given["tell"] = _say
    if "save" in takes and options.output is not None:
        given["save"] = functools.partial(results.write, options.output)
    measured = module.bench(**given)
    for entry in [] if "command" in takes else measured:
        if excess := goals.excess(entry):
            entry["over_target"] = excess
    found: dict[str, Any] = measured if "command" in takes else results.new(name, command=command) | {"cells": measured}
    if options.output is not None:
        results.write(options.output, found)
    _print_cells(found, name)
    return _judge(found)


def _print_cells(found: dict[str, Any], title: str) -> None:
    """Every cell's case, median time, rate, and what was asked of it."""
    from .bench import goals
    from .experiment import report

    rows = [
        (
            entry["impl"],
            ", ".join(f"{name} {value}" for name, value in entry["case"].items()),
            f"{entry['median_us']:.2f}" if "median_us" in entry else "",
            f"{entry['gb_per_s']:.0f}" if "gb_per_s" in entry else "",
            goals.verdict(entry),
        )
        for entry in found["cells"]
    ]
    report.print_rows(("", "case", "us", "GB/s", "target"), rows, _console(), title)


def _say(line: str) -> None:
    """Progress of something slow: a line as it happens."""
    print(line, file=sys.stderr, flush=True)


def _add_bench_decode(operations: Any) -> None:
    decode = operations.add_parser(
        "decode",
        help="generate from the packed cache against transformers' own caches",
        description="A model of known shape with random bf16 weights reads random prompts and answers greedily. Parts "
        "that the output file has already are not measured again.",
    )
    decode.add_argument("--model-shape", default="llama-3.1-8b", help="llama-3.1-8b (default) or tiny")
    decode.add_argument("--layers", type=int, help="of the model, in the place of the shape's own number")
    decode.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], help="default: 1 8 32")
    decode.add_argument("--context", type=int, default=32768, help="tokens of each prompt (default: 32768)")
    decode.add_argument("--new", type=int, default=256, help="tokens of each answer (default: 256)")
    decode.add_argument("--bits", nargs="+", type=int, choices=[2, 3, 4, 8, 16], default=[4], help="default: 4")
    decode.add_argument("--weight-bits", nargs="+", type=int, choices=[4, 16], default=[16],
                        help="of all layers' weights, for kvcomp's cache (default: 16)")  # fmt: skip
    decode.add_argument(
        "--rivals", nargs="+", default=["dynamic", "static", "quantized"], metavar="RIVAL",
        help="dynamic, static, quantized (default: all), or none",
    )  # fmt: skip
    decode.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    decode.add_argument("--compile", default="auto", metavar="HOW",
                        help="decoder layers of decode steps: auto (default), yes, no, tuned (inductor searches, too), "
                        "or options of torch.compile: name=value,name=value")  # fmt: skip
    decode.add_argument("--no-graphs", action="store_true", help="decode steps are not recorded as CUDA graphs")
    decode.add_argument(
        "--first-samples", type=int, default=3, help="prompts read for the first token's median time (default: 3)"
    )
    decode.add_argument("--minutes", type=float, help="begin no part later than this; the next run goes on (--output)")
    decode.add_argument("--seed", type=int, default=0)
    decode.add_argument("--output", type=Path, help="write the results here, as JSON, after every part")
    decode.set_defaults(run=_bench_decode)


def _compile_options(text: str) -> Any:
    """Of kvcomp.compress, as a flag says it; values are JSON."""
    words: dict[str, Any] = {"auto": "auto", "yes": True, "no": False, "tuned": {"coordinate_descent_tuning": True}}
    if text in words:
        return words[text]
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        return {name: json.loads(value) for name, _, value in pairs}
    except json.JSONDecodeError:
        expected = f"{', '.join(words)} or name=value,name=value with values as in JSON"
        raise ValueError(f"bench: --compile: expected {expected}, got {text}") from None


def _bench_decode(options: argparse.Namespace, command: str) -> int:
    from . import results
    from .bench import decode
    from .experiment import report, tables_gpu

    output: Path | None = options.output
    before = None
    if output is not None:
        results.check_writable(output, "bench: --output")
        if output.exists():
            before = results.read(output, kind="decode")
    found = decode.bench(
        decode.Settings(
            shape=options.model_shape,
            layers=options.layers,
            batches=options.batch,
            context=options.context,
            new=options.new,
            bits=options.bits,
            weight_bits=list(dict.fromkeys(options.weight_bits)),
            rivals=[] if options.rivals == ["none"] else options.rivals,
            device=options.device,
            compile=_compile_options(options.compile),
            graphs=not options.no_graphs,
            first_samples=options.first_samples,
            minutes=options.minutes,
            seed=options.seed,
        ),
        command=command,
        before=before,
        save=(lambda found: None) if output is None else functools.partial(results.write, output),
        tell=_say,
    )
    for title, rows in (("decode", tables_gpu.decode_rows), ("where a step's time goes", tables_gpu.share_rows)):
        header, made = rows(found)
        if made:
            report.print_rows(header, made, _console(), title)
    return _judge(found)


def _add_bench_bsr(operations: Any) -> None:
    bsr = operations.add_parser(
        "bsr",
        help="block-sparse times dense, against dense and other sparse products of the same matrix",
        description="Square matrices with random blocks. Every product is checked before it is timed; a wrong one "
        "makes the command exit with 1. Matrices that the output file has already are not measured again. A GPU "
        "that is told no size, sparsity, block and pattern measures what the design names, and judges it.",
    )
    bsr.add_argument("--sizes", nargs="+", type=int, metavar="N", help="default: 4096 8192 16384; cpu: 1024 2048")
    bsr.add_argument("--sparsity", nargs="+", type=float, metavar="S",
                     help="shares of empty blocks (default: 0.5 0.7 0.78 0.9; cpu: 0.78)")  # fmt: skip
    bsr.add_argument("--block-sizes", nargs="+", type=int, metavar="B", help="default: 16 32 64 128")
    bsr.add_argument("--patterns", nargs="+", metavar="PATTERN",
                     help="uniform (default), banded, sliding_window, causal, power_law, clustered; all")  # fmt: skip
    bsr.add_argument("--iterations", type=int, help="samples of every cell (default: 100; cpu: 20), slow ones fewer")
    bsr.add_argument("--rivals", nargs="+", metavar="RIVAL",
                     help="as the cells name them, or none (default: all; two for most of the design)")  # fmt: skip
    bsr.add_argument("--minutes", type=float, help="begin no matrix later than this; the next run goes on (--output)")
    bsr.add_argument("--dtype", help="float16, bfloat16 (default), float32 (cpu alone, and its default)")
    bsr.add_argument("--out-dtype", help="of what is timed (default: as --dtype)")
    bsr.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where it can be used")
    bsr.add_argument("--seed", type=int, default=0)
    bsr.add_argument("--output", type=Path, help="write the results here, as JSON, after every matrix")
    bsr.set_defaults(run=_bench_bsr)


def _bench_bsr(options: argparse.Namespace, command: str) -> int:
    from . import results
    from .bench import bsr, bsr_settings
    from .bsr import PATTERNS
    from .experiment import report, tables_bsr

    output: Path | None = options.output
    before = None
    if output is not None:
        results.check_writable(output, "bench: --output")
        if output.exists():
            before = results.read(output, kind="bsr")
    settings = bsr_settings.Settings(
        sizes=options.sizes,
        sparsity=options.sparsity,
        blocks=options.block_sizes,
        patterns=PATTERNS if options.patterns == ["all"] else options.patterns,
        iterations=options.iterations,
        device=options.device,
        dtype=options.dtype,
        out_dtype=options.out_dtype,
        rivals=() if options.rivals == ["none"] else options.rivals,
        seed=options.seed,
        minutes=options.minutes,
    )
    save = None if output is None else functools.partial(results.write, output)
    found = bsr.bench(settings, command=command, before=before, save=save, tell=_say)
    if output is not None:
        results.write(output, found)
    report.print_rows(*tables_bsr.all_rows(found), _console(), "block-sparse times dense")
    return _judge(found)


def _add_bench_w4(operations: Any) -> None:
    w4 = operations.add_parser(
        "w4",
        help="linear layers of packed 4-bit weights against cuBLAS, torch's int4, Humming and bitsandbytes",
        description="Sections: table (the design's cells), sweep (1 to 8192 rows against cuBLAS), scales (groups and "
        "mantissa bits), weights (errors of weights).",
    )
    w4.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where it can be used")
    w4.add_argument("--sections", nargs="+", metavar="SECTION", help="default: all; cpu: table weights")
    w4.add_argument("--samples", type=int, help="of every cell (default: its own)")
    w4.add_argument("--seed", type=int, default=0)
    w4.add_argument("--output", type=Path, help="write the results here, as JSON, after every matrix")
    w4.set_defaults(run=_bench_w4)


def _bench_w4(options: argparse.Namespace, command: str) -> int:
    from . import _C, results
    from .bench import w4
    from .experiment import report, tables_w4

    if options.output is not None:
        results.check_writable(options.output, "bench: --output")
    info = _C.cuda_info()
    if options.device == "cuda" and not info["available"]:
        raise NotImplementedError(f"bench: --device: expected a CUDA device, got none: {info['why']}")
    found = w4.bench(
        command=command,
        device=options.device or ("cuda" if info["available"] else "cpu"),
        sections=options.sections,
        samples=options.samples,
        seed=options.seed,
        save=None if options.output is None else functools.partial(results.write, options.output),
        tell=_say,
    )
    if options.output is not None:
        results.write(options.output, found)
    report.print_rows(*tables_w4.speed_rows(found), _console(), "x times 4-bit weights")
    report.print_rows(*tables_w4.target_rows(found), _console(), "what the design asks for")
    return _judge(found)


# ---- kvcomp capture


def _add_capture(commands: Any) -> None:
    capture = commands.add_parser(
        "capture",
        help="store a prompt's KV cache and attention statistics, for kvcomp run --cache-path",
        description="Reads a prompt with a model and writes DIR/cache.safetensors (keys, values), "
        "DIR/attention.safetensors (attention that each token got, per layer and KV head; scores of the last queries; "
        "second moments of queries and values) and DIR/capture.json.",
    )
    capture.add_argument("--model", type=Path, required=True, help="folder of a transformers model and its tokenizer")
    capture.add_argument("--prompt-file", type=Path, required=True, help="UTF-8 text; - for standard input")
    capture.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    capture.add_argument("--max-tokens", type=int, help="take the first tokens of the prompt only")
    capture.add_argument("--chunk", type=int, help="tokens of a forward pass (default: the whole prompt in one)")
    capture.add_argument("--window", type=int, default=32, help="last queries behind the window scores (default: 32)")
    capture.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                         help="of the model (default: as it is stored)")  # fmt: skip
    capture.add_argument(
        "--model-name", help="name in the files, as an experiment's model_name (default: the folder's)"
    )
    capture.add_argument("--no-cache", action="store_true", help="statistics only")
    capture.add_argument("--force", action="store_true", help="replace an earlier capture")
    capture.set_defaults(run=_capture)


def _capture(options: argparse.Namespace, command: str) -> int:
    from .experiment import capture

    for name in ("max_tokens", "chunk", "window"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"capture: --{name.replace('_', '-')}: expected 1 or more, got {value}")
    if options.model_name == "":
        raise ValueError("capture: --model-name: expected a name, got none")
    capture.check_out(options.out, force=options.force)
    text = capture.read_text(options.prompt_file)
    with _status("reading the model"):
        prompt = capture.load(
            options.model, text, max_tokens=options.max_tokens, dtype=options.dtype, model_name=options.model_name
        )
    found = capture.run(
        prompt,
        options.out,
        command=command,
        chunk=options.chunk,
        window=options.window,
        with_cache=not options.no_cache,
        force=options.force,
        track=_track("capturing"),
    )
    print(f"{found['prompt']['tokens']} tokens of {found['model']['name']}:")
    for name, file in found["files"].items():
        print(f"  {options.out / name}  {file['bytes'] / 2**20:.2f} MiB")
    return 0


# ---- kvcomp tables, kvcomp env


def _add_tables(commands: Any) -> None:
    tables = commands.add_parser("tables", help="make the tables of a README anew from the results files they name")
    tables.add_argument("files", nargs="*", type=Path, default=[Path("README.md")], help="default: README.md")
    tables.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table differs")
    tables.set_defaults(run=_tables)


def _tables(options: argparse.Namespace, command: str) -> int:
    from . import results
    from .experiment import tables

    made = {path: tables.render(path.read_text(encoding="utf-8"), _with_results(path)) for path in options.files}
    differing = [path for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    for path in differing:
        if options.check:
            print(f"kvcomp: tables: {path}: a table differs from its results file (make it anew: kvcomp tables {path})",
                  file=sys.stderr)  # fmt: skip
        else:
            results.write_text(path, made[path])
    return 1 if options.check and differing else 0


def _with_results(path: Path) -> Path:
    """The nearest folder above that holds experiments/results; the file's own where there is none."""
    return next((folder for folder in path.resolve().parents if (folder / "experiments/results").is_dir()), path.parent)


def _env(options: argparse.Namespace, command: str) -> int:
    from .env import print_environment

    print_environment()
    return 0


# ---- shared


def _console() -> Any:
    from rich.console import Console

    # Off a terminal Rich would cut tables to 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _judge(found: dict[str, Any]) -> int:
    """1 where a cell has no error or one over its bound, each said in a sentence."""
    from . import results

    failures = results.failures(found)
    for sentence in failures:
        print(f"kvcomp: {sentence}", file=sys.stderr)
    return 1 if failures else 0


@contextlib.contextmanager
def _status(title: str) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is being done; elsewhere nothing."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda doing: None
        return
    with console.status(title) as status:
        yield lambda doing: status.update(f"{title}: {doing}")


def _track(title: str) -> Any:
    """Progress on a terminal; elsewhere nothing. What it returns is experiment.runner's ``Track``."""

    @contextlib.contextmanager
    def track(total: int, before: int) -> Iterator[Callable[[str], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if before:
            console.print(f"{before} of {total} units were measured before", highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[unit]}"),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(title, total=total, unit="")

            def advance(name: str) -> None:
                progress.update(bar, advance=1, unit=name)

            yield advance

    return track
