"""README tables of GPU results: from small files of the same schema (kvcomp.experiment.tables_gpu)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kvcomp import results
from kvcomp.experiment import tables, tables_gpu

ERROR = {"metric": "largest error", "value": 3.2e-4, "bound": 1e-3}


def case(b: int, s: int, k_bits: Any, v_bits: Any, **more: Any) -> dict[str, Any]:
    shape = {"b": b, "s": s, "q_heads": 32, "kv_heads": 8, "d": 128, "q": 1}
    return {**shape, "k_bits": k_bits, "v_bits": v_bits, "device": "cuda"} | more


def cell(impl: str, where: dict[str, Any], us: float, **more: Any) -> dict[str, Any]:
    rate = 1e6 / us
    return results.cell(
        impl, where, error=ERROR, median_us=us, samples_us=[us], bytes=10**9, gb_per_s=rate,
        fraction_of_peak=rate / 4600, floor_us=10**6 / 4600, divide_us=0.3, dividing_samples_us=[80.25], run=1, **more,
    )  # fmt: skip


@pytest.fixture
def attend() -> dict[str, Any]:
    ceiling = cell("torch sum int64", {"read": "sum", "bytes": 10**9, "device": "cuda"}, 240.0)
    return {
        **results.new("attend", command="kvcomp bench attend --device cuda"),
        "absent": [{"impl": "torch flex_attention compiled", "case": case(8, 32768, 16, 16), "reason": "no compiler"}],
        "call_cost": {"host_us": 4.9, "empty_launch_us": 3.0, "target_us": 2.0, "torch_add_us": 3.1, "kernel_us": 4.0},
        "cells": [
            ceiling | {"role": "ceiling", "error": None, "run": 0},  # of a run before
            ceiling | {"role": "ceiling", "error": None},
            cell("kvcomp", case(8, 32768, 4, 4), 68.0, target_us=69.0, prototype_us=80.0, times_torch=3.51),
            cell("kvcomp in order", case(8, 32768, 4, 4), 69.5),
            cell("kvcomp", case(8, 32768, 2, 2), 42.3, target_us=41.0, times_torch=5.65),
            cell("kvcomp", case(1, 4096, 3, 3), 4.9),
            cell("kvcomp", case(8, 32768, "mixed", "mixed"), 70.0, times_uniform=1.09, target_ratio=1.15),
            cell("kvcomp", case(8, 32768, 4, 4, d=64), 36.0),
            cell("kvcomp", case(8, 32768, 4, 4, q_heads=64, q=4), 80.0),
            cell("kvcomp", case(8, 32768, 4, 2), 55.0),
            cell("kvcomp", case(8, 32768, 4, 4, scales="e5m3"), 66.0),
            cell("torch sdpa cudnn, enable_gqa", case(8, 32768, 16, 16), 239.0),
            cell("torch sdpa flash, group as rows", case(8, 32768, 16, 16), 251.0),
        ],
    }


@pytest.fixture
def decode() -> dict[str, Any]:
    where = {"model": "llama-3.1-8b", "b": 1, "s": 32768, "w_bits": 16, "new": 256}
    common = {"ttft_ms": 2100.4, "tokens_per_s": 190.5, "kv_bytes": 1.3e9, "kv_ratio": 3.3, "peak_bytes": 19.2e9}
    shares = {
        "kernels_ms": {"attend": 0.6, "linear": 4.0, "elementwise": 0.3},
        "idle_ms": 0.1,
        "step_ms": 5.0,
        "around_ms": 0.25,
    }
    return {
        **results.new("decode", command="kvcomp bench decode"),
        "not_measured": {"transformers QuantizedCache, batch 1": "optimum-quanto is not installed"},
        "cells": [
            results.cell("kvcomp", where | {"k_bits": 4, "v_bits": 4}, error=ERROR, tpot_ms=5.25, **common)
            | {"shares": shares},
            *(
                results.cell(
                    f"transformers {name}Cache", where | {"k_bits": 16, "v_bits": 16}, error=ERROR, tpot_ms=ms, **common
                )
                | {"peak_bytes": None}
                for name, ms in (("Dynamic", 55.8), ("Static", 16.8))
            ),
        ],
    }


def operations() -> dict[str, list[dict[str, Any]]]:
    """Cells of append, pack and score."""
    step = {"b": 8, "k_bits": 4, "v_bits": 4, "lists": "in step", "device": "cuda"}
    rows = {"s": 32768, "dtype": "bfloat16", "bits": 4, "device": "cuda"}
    copying = cell("copy on the device", {"bytes": 10**9}, 250.0) | {"role": "ceiling", "error": None}
    window = {"tokens": 32768, "window": 64, "device": "cuda"}
    return {
        "append": [
            cell("kvcomp append", step | {"step": "average"}, 2.0, target_us=2.5),
            cell("kvcomp append", step | {"step": "page begins"}, 1.5),
        ],
        "pack": [
            copying,
            cell("kvcomp pack", rows | {"scale": "search"}, 500.0, fraction_of_copy=0.5, target_fraction=0.65),
        ],
        "score": [cell("kvcomp score", window, 100.0, tflops_executed=385.0, target_tflops=350.0)],
    }


def rendered(folder: Path, name: str) -> list[str]:
    text = tables.render(f"before\n<!-- table: {name} -->\nold\n<!-- /table -->\nafter\n", folder)
    lines = text.splitlines()
    assert lines[:2] == ["before", f"<!-- table: {name} -->"] and lines[-2:] == ["<!-- /table -->", "after"]
    return lines[2:-2]


def test_every_table(tmp_path: Path, attend: dict[str, Any], decode: dict[str, Any]) -> None:
    results.write(tmp_path / "experiments/results/h200/attend.json", attend)
    results.write(tmp_path / "experiments/results/h200/decode.json", decode)
    for kind, cells in operations().items():
        found = results.new(kind, command=f"kvcomp bench {kind}") | {"cells": cells}
        results.write(tmp_path / f"experiments/results/h200/{kind}.json", found)
    made = {name: rendered(tmp_path, name) for name in tables_gpu.ROWS}
    for name, lines in made.items():
        assert len(lines) > 2, name
        assert len({line.count("|") for line in lines}) == 1, name
    assert made["attend_gpu"] == [
        "| µs | torch's best, bf16 | 4 bit | 2 bit | 3 bit |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| B8/32k | 239.0 (cudnn) | 68.0 (≤ 69: met by 1.4 %) | 42.3 (≤ 41: missed by 3.2 %) | - |",
        "| B1/4k | - | - | - | 4.9 |",
    ]
    assert made["attend_gpu_gain"][2] == "| B8/32k | 239.0 µs | 3.51× | 5.65× | - |"
    assert made["attend_gpu_rates"][3] == "| B1/4k | - | - | - | 204082 (4437 %) |"
    assert "| ≤ 69: met by 1.4 %, ≤ 80 (prototype): met by 15.0 % |" in made["attend_gpu_parts"][2]
    assert made["attend_gpu_parts"][3:] == [
        "| B8/32k | 2 | 1000.0 MB | 217.4 | 42.3 | 80.2 | 23641 (514 %) | ≤ 41: missed by 3.2 % | 3.2e-04 |",
        "| B1/4k | 3 | 1000.0 MB | 217.4 | 4.9 | 80.2 | 204082 (4437 %) | - | 3.2e-04 |",
    ]
    more = made["attend_gpu_more"]
    assert [line.split(" | ")[0].strip("| ") for line in more[2:]] == [
        "B8/32k",
        "B8/32k, d 64",
        "B8/32k, 64 / 8 heads, 4 new tokens",
        "B8/32k",
        "B8/32k, scales: e5m3",
    ]
    assert "mixed, ragged" in more[2] and "1.090 (≤ 1.15: met by 5.2 %)" in more[2] and "| 4 / 2 |" in more[5]
    assert made["attend_gpu_rivals"][-1] == "| torch flex_attention compiled | not run |"
    assert made["attend_gpu_ceilings"][2:] == [
        "| torch sum int64, 1.0 GB | 4167 GB/s |",
        "| launching a kernel that ends at once | 3.00 µs |",
        "| a call of attend from Python, its launch included | 4.90 µs |",
        "| of which beyond a launch | 1.90 µs (≤ 2: met by 5.0 %) |",
        "| a call of torch.add, for comparison | 3.10 µs |",
        "| attend's kernel over one page | 4.00 µs |",
    ]
    assert made["append"][2:] == [
        "| average, in step | 4 | 2.00 | ≤ 2.5: met by 20.0 % |",
        "| page begins, in step | 4 | 1.50 | - |",
    ]
    assert made["pack"][2:] == [
        "| copy on the device | - | - | - | 4000 | - |",
        "| 32k tokens, bfloat16, search | 4 | 500.0 | 1000.0 MB | 2000 (50 %) | ≥ 0.65: missed by 23.1 % |",
    ]
    assert made["score"][2:] == ["| 64 queries, 32k tokens | 100.0 | 385 | ≥ 350: met by 10.0 % |"]
    assert made["decode"][2] == (
        "| kvcomp | B1/32k | 4 | 2100 ms, 1.000× (≤ 1.01: met by 1.0 %) | 5.25 ms (≤ 5.5: met by 4.5 %) | "
        "3.20× (≥ 3: met by 6.7 %) | 190 | 1.30 GB, 1/3.30 (≥ 3: met by 10.0 %) | 19.2 GB |"
    )
    assert made["decode"][4].endswith("| - |") and made["decode"][5].endswith("| not run |")
    assert made["decode_shares"][2] == (
        "| kvcomp, B1/32k, 4 bits | 0.60 | - | - | - | 4.00 | 0.30 | 0.10 | 5.00 | 0.25 |"
    )


def test_files_of_the_wrong_kind_are_refused(tmp_path: Path, decode: dict[str, Any]) -> None:
    results.write(tmp_path / "experiments/results/h200/attend.json", decode)
    with pytest.raises(ValueError, match="expected a file of kind attend, got decode"):
        rendered(tmp_path, "attend_gpu")
    with pytest.raises(OSError):
        rendered(tmp_path, "decode")
