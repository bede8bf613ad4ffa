"""Error of every layer at several scales, and bytes of every configuration: ``scripts/w4_per_layer_sensitivity.py`` and
``scripts/w4_memory_audit.py``, which write CSV files."""

from __future__ import annotations

import argparse
import csv
import gc
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import results
from ..errors import one_line
from ..experiment import places
from . import arms, matrix, weights
from .matrix import Arm
from .model import find_linears, linear_at, model_bytes

BAD_INPUT = 2
SENSITIVITY = ("layer_name", "scale_mbits", "rel_mse", "max_rel_mse", "cosine_sim", "bits_per_weight")
AUDIT = (
    "config", "scale_mbits", "model_mem_mb", "theoretical_saving_pct", "saving_pct", "bits_per_weight",
    "theoretical_bits_per_weight", "gpu_mem_mb",
)  # fmt: skip
Row = dict[str, Any]


def sensitivity(
    model: torch.nn.Module, scale_mbits: Sequence[int], *, group_size: int = 128, target: str = "all",
    rounding: str = "nearest",
) -> Iterator[Row]:  # fmt: skip
    """A row for every layer and number of mantissa bits: errors of what the layer would hold, and its bits."""
    for bits in scale_mbits:
        weights.check_format("sensitivity", group_size, bits, rounding)
    for name in find_linears(model, target):
        weight = linear_at(model, name).weight.detach().float().cpu()
        n, k = weight.shape
        for bits in scale_mbits:
            packed, exponent = weights.pack(weight, group_size, bits, rounding)
            near = weights.unpack(packed, exponent, n, k, group_size, bits)
            # A last group that is short counts as one that ends in zeros, which are exact.
            whole = torch.nn.functional.pad(torch.stack((weight, near)), (0, -k % group_size))
            yield {
                "layer_name": name,
                "scale_mbits": bits,
                **weights.quant_error(whole[0], whole[1], group_size),
                "bits_per_weight": 8 * packed.nbytes / (n * k),
            }


def audit(path: str | None, asked: Sequence[Arm], device: torch.device, tell: Callable[[str], object]) -> list[Row]:
    """A row for every configuration, each loaded alone: bytes that its tensors hold, and what the format alone says.
    Savings are of the whole model in 16 bits. A configuration that cannot run here is left out, and said."""
    made: list[Row] = []
    model: Any = None
    for arm in asked:
        model = None  # the last one's, before its bytes are taken for somebody else's
        _tidy(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        model, _ = arms.load(path, arm.dtype, device)
        plain = model_bytes(model)
        row: Row = {"config": arm.config_id, "scale_mbits": arm.scale_mbits, "theoretical_saving_pct": None}
        try:
            if arm.mode == "w4_shared_scale":
                row["theoretical_bits_per_weight"] = bits = 4 + (16 if arm.scale_mbits < 0 else 5 + arm.scale_mbits) / (
                    arm.group_size
                )
                count = sum(linear_at(model, name).weight.numel() for name in find_linears(model, arm.quant_target))
                row["theoretical_saving_pct"] = 100 * count * (16 - bits) / 8 / plain
            found = arms.prepare(model, arm)
        except NotImplementedError as reason:
            tell(f"{arm.config_id} is left out: {reason}")
            continue
        _tidy(device)
        row |= {
            "model_mem_mb": found["weight_bytes"] / results.MIB,
            "saving_pct": 100 * (1 - found["weight_bytes"] / plain),
            "bits_per_weight": found["bits_per_weight"],
            "gpu_mem_mb": (torch.cuda.memory_allocated(device) - before) / results.MIB
            if device.type == "cuda"
            else None,
        }
        made.append({name: row.get(name) for name in AUDIT})
    return made


def main_sensitivity(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="w4_per_layer_sensitivity.py", description="Error of every layer's weights.")
    _shared(parser)
    parser.add_argument("--scale_mbits_list", type=int, nargs="+", default=[-1, 0, 3, 5], help="default: -1 0 3 5")
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--quant_target", choices=["mlp", "all"], default="all")
    parser.add_argument("--rounding", choices=["floor", "nearest", "search"], default="nearest")
    options = parser.parse_args(arguments)

    def run() -> None:
        model, _ = arms.load(options.model, "bf16", torch.device(options.device))
        found = sensitivity(
            model, options.scale_mbits_list, group_size=options.group_size, target=options.quant_target,
            rounding=options.rounding,
        )  # fmt: skip
        _write(options.out_csv, list(found), SENSITIVITY)

    return _guard("w4_per_layer_sensitivity", options.out_csv, run)


def main_audit(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="w4_memory_audit.py", description="Bytes of every configuration.")
    _shared(parser)
    parser.add_argument("--config", type=Path, help="experiment matrix (default: the shipped one)")
    parser.add_argument("--config_ids", nargs="+", metavar="ID", help="default: all of the matrix")
    options = parser.parse_args(arguments)

    def run() -> None:
        loaded = matrix.load(options.config or places.shipped(matrix.MATRIX, "--config"))
        asked = [arm for name in options.config_ids or loaded.configs for arm in loaded.arms(name)]
        _write(options.out_csv, audit(options.model, asked, torch.device(options.device), _say), AUDIT)

    return _guard("w4_memory_audit", options.out_csv, run)


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or name of a transformers model (default: the shipped tiny-base)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out_csv", type=Path, help="write the rows here (default: print them)")


def _guard(name: str, out: Path | None, run: Callable[[], None]) -> int:
    try:
        if out is not None:
            results.check_writable(out, "--out_csv")
        run()
    except KeyboardInterrupt:
        return 130
    except (ValueError, NotImplementedError, OSError) as reason:
        print(f"{name}: {one_line(reason)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _write(path: Path | None, rows: Sequence[Row], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if path is None:
        print(text.getvalue(), end="")
    else:
        results.write_text(path, text.getvalue())
        print(f"{len(rows)} rows: {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
