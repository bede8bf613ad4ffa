"""kvcomp bench bsr on the CPU: its gate, cells, resuming, tables, flags, and the scripts around it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch")
from kvcomp import results  # noqa: E402
from kvcomp.bench import (  # noqa: E402
    bsr,
    bsr_cusparse,
    bsr_gate,
    bsr_goals,
    bsr_rivals,
    bsr_samples,
    bsr_settings,
)
from kvcomp.bsr import BLOCKS, PATTERNS, random_bsr  # noqa: E402
from kvcomp.cli import main  # noqa: E402
from kvcomp.experiment import report, tables, tables_bsr  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .*:UserWarning")
SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = ["bench", "bsr", "--device", "cpu", "--sizes", "256", "--iterations", "5"]


def command(*more: object) -> list[str]:
    return [*SMALL, *map(str, more)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("bsr") / "bsr.json"
    flags = ("--block-sizes", 16, 64, "--patterns", "uniform", "banded", "--sparsity", 0.78, "--output", output)
    assert main(command(*flags)) == 0
    return results.read(output, kind="bsr")


# ---- the gate


def test_gate_lets_rounding_pass_and_nothing_else() -> None:
    a = random_bsr(512, 512, 64, 0.5, dtype=torch.float16)
    b = torch.randn(512, 512).mul_(bsr_gate.SCALE).half()
    reference = bsr_gate.exact(a.to_dense(), b)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        error = bsr_gate.difference(reference.to(dtype), reference, 512)
        assert error["value"] <= error["bound"], dtype
        assert error["bound"] <= bsr_gate.LIMIT or dtype == torch.bfloat16
        # One block that is missing, one product left out of the sums, one element that nobody wrote.
        values = a.values.clone()
        values[3] = 0
        less = a.with_values(values).to_dense().double() @ b.double()
        assert not bsr_gate.difference(less.to(dtype), reference, 512)["value"] <= error["bound"]
        short = reference.to(torch.float32)
        short[17] -= (a.to_dense()[17, 100] * b[100]).float() if a.to_dense()[17, 100] else 0.05
        assert (
            not bsr_gate.difference(short, reference, 512)["value"]
            <= bsr_gate.difference(short, short.double(), 512)["bound"]
        )
        for bad in (float("nan"), float("inf")):
            wrong = reference.to(dtype)
            wrong[500, 3] = bad
            found = bsr_gate.difference(wrong, reference, 512)
            assert not found["value"] <= found["bound"]
            json.dumps(found, allow_nan=False)


def test_gate_grows_with_the_root_of_k() -> None:
    reference = torch.full((4, 4), 2.0, dtype=torch.float64)
    bounds = [bsr_gate.difference(reference.float(), reference, k)["bound"] for k in (1024, 4096)]
    assert bounds[1] / bounds[0] == pytest.approx(2, rel=0.05)
    huge = bsr_gate.difference((1e6 * reference).float(), 1e6 * reference, 1 << 20)
    assert huge["bound"] == bsr_gate.LIMIT, "whatever the scale"


def test_a_wrong_product_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is timed then, and the exit code is 1."""
    honest = bsr.matmul

    def broken(a: Any, b: Any, **how: Any) -> Any:
        found = honest(a, b, **how)
        found[-1, -1] += 0.05
        return found

    monkeypatch.setattr(bsr, "matmul", broken)
    output = tmp_path / "bsr.json"
    assert main(command("--block-sizes", 64, "--rivals", "none", "--output", output)) == 1
    (cell,) = [cell for cell in results.read(output)["cells"] if cell["impl"] == "kvcomp"]
    assert "median_us" not in cell and cell["error"]["value"] == pytest.approx(0.05, rel=0.01)
    said = capsys.readouterr()
    assert "expected at most" in said.err and "wrong" in said.out


def test_wrong_only_in_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 out is right, the dtype that is timed is not: it fails all the same."""
    honest = bsr.matmul

    def broken(a: Any, b: Any, *, out: Any = None, **how: Any) -> Any:
        found = honest(a, b, out=out, **how)
        return found if out is None else out.add_(0.1)

    monkeypatch.setattr(bsr, "matmul", broken)
    settings = bsr_settings.Settings(
        sizes=[128], sparsity=[0.5], blocks=[16], iterations=5, device="cpu", dtype="float16", rivals=()
    )
    found = bsr.bench(settings, command="", tell=lambda line: None)
    (sentence,) = results.failures(found)
    assert "float16 out" in sentence


def test_a_wrong_rival_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: bsr_rivals.Problem) -> bsr_rivals.Call:
        return lambda i: torch.zeros_like(problem.outs[0])

    def broken(problem: bsr_rivals.Problem) -> bsr_rivals.Call:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(bsr_rivals, "CPU", {"torch dense": bsr_rivals.dense, "wrong": wrong, "broken": broken})
    settings = bsr_settings.Settings(sizes=[128], sparsity=[0.5], blocks=[16], iterations=5, device="cpu")
    found = bsr.bench(settings, command="", tell=lambda line: None)
    assert {cell["impl"] for cell in found["cells"]} == {"torch dense, full", "torch dense", "kvcomp"}
    reasons = {entry["impl"]: entry["reason"] for entry in found["absent"]}
    assert reasons["broken"] == "no such kernel" and reasons["wrong"].startswith("wrong by ")
    assert not results.failures(found)
    header, rows = tables_bsr.rival_rows(found | {"cells": []})
    assert header and rows == []


# ---- cells


def test_cells(measured: dict[str, Any]) -> None:
    assert measured["schema"] == results.SCHEMA and measured["settings"]["device"] == "cpu"
    ours = [cell for cell in measured["cells"] if cell["impl"] == "kvcomp"]
    assert len(ours) == 2 * 2
    for cell in ours:
        case = cell["case"]
        assert set(case) == {"m", "n", "k", "block", "sparsity", "pattern", "dtype", "out_dtype", "device"}
        work = 2 * cell["blocks"] * case["block"] ** 2 * 256
        assert cell["useful_tflops"] == pytest.approx(work / cell["median_us"] / 1e6)
        assert cell["dense_equivalent_tflops"] == pytest.approx(2 * 256**3 / cell["median_us"] / 1e6)
        (dense,) = [other for other in measured["cells"] if other["impl"] == "torch dense" and other["case"] == case]
        assert cell["speedup"] == pytest.approx(dense["median_us"] / cell["median_us"])
        assert cell["fraction_of_dense"] == pytest.approx(cell["useful_tflops"] / dense["dense_equivalent_tflops"])
        assert len(cell["samples_us"]) == 5 and cell["timing"] == "clock"
        assert cell["density"] == pytest.approx(1 - case["sparsity"], abs=0.05)
        assert cell["row_blocks"]["least"] <= cell["row_blocks"]["mean"] <= cell["row_blocks"]["most"]
        assert cell["error"]["value"] <= cell["error"]["bound"] <= bsr_gate.LIMIT
    impls = {cell["impl"] for cell in measured["cells"]}
    assert {"torch dense", "torch bsr", "torch csr", "torch dense, full"} <= impls
    scipy = {"scipy bsr", "scipy csr"}
    assert scipy <= impls | {entry["impl"] for entry in measured["absent"]}


def test_a_file_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bsr.json"
    flags = ("--rivals", "torch dense", "--output", output)
    assert main(command("--block-sizes", 64, *flags)) == 0
    before = results.read(output)
    counted: list[Any] = []
    honest = bsr._Run.measure
    monkeypatch.setattr(bsr._Run, "measure", lambda run, where: (counted.append(where), honest(run, where)))
    assert main(command("--block-sizes", 64, 32, *flags)) == 0
    after = results.read(output)
    assert counted == [(256, 32, 0.78, "uniform")]
    assert after["cells"][: len(before["cells"])] == before["cells"] and len(after["cells"]) > len(before["cells"])
    counted.clear()
    assert main(command("--block-sizes", 64, "--seed", 1, *flags)) == 0
    assert counted == [(256, 64, 0.78, "uniform")] and results.read(output)["settings"]["seed"] == 1


def test_a_wrong_cell_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "bsr.json"
    flags = command("--block-sizes", 64, "--rivals", "torch dense", "--output", output)
    with monkeypatch.context() as patch:
        honest = bsr.matmul
        patch.setattr(bsr, "matmul", lambda *inputs, **how: honest(*inputs, **how).add_(0.1))
        assert main(flags) == 1
    assert main(flags) == 0
    cells = results.read(output)["cells"]
    assert sorted(cell["impl"] for cell in cells if "median_us" in cell) == [
        "kvcomp",
        "torch dense",
        "torch dense, full",
    ]
    assert len({cell["impl"] for cell in cells}) == len(cells)


def test_a_wrong_ceiling_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bsr_rivals, "multiplied", lambda left, others, outs: lambda i: torch.zeros_like(outs[0]))
    settings = bsr_settings.Settings(sizes=[128], sparsity=[0.5], blocks=[16], iterations=5, device="cpu", rivals=())
    found = bsr.bench(settings, command="", tell=lambda line: None)
    assert {cell["impl"] for cell in found["cells"]} == {"kvcomp"}
    assert [entry["impl"] for entry in found["absent"]] == ["torch dense, full"]


def test_ceilings_that_a_run_without_rivals_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's file that was begun with none has no product of 2:4 matrices: the next run adds it, or says why not."""
    settings = bsr_settings.Settings(device="cuda", dtype="bfloat16", out_dtype="bfloat16", rivals=())
    found: dict[str, Any] = {"cells": [], "absent": []}
    run = bsr._Run(settings, found, lambda line: None)
    found["cells"] = [results.cell(bsr._FULL, run.case(8192, None, 0.0, "full"), error=None, median_us=1.0)]
    monkeypatch.setattr(bsr._Run, "normal", lambda *_: pytest.fail("made inputs"))
    run.ceilings(8192)
    run.settings = replace(settings, rivals=None)
    with pytest.raises(pytest.fail.Exception, match="made inputs"):
        run.ceilings(8192)
    run.leave_out(bsr._HALVED, run.case(8192, None, 0.5, "2:4"), "not built")
    run.ceilings(8192)


def test_other_dtypes_out_on_the_cpu() -> None:
    """torch writes its own dtype there, and its cells say so."""
    told: list[Any] = []
    settings = bsr_settings.Settings(
        sizes=[128], sparsity=[0.5], blocks=[16], iterations=5, device="cpu", dtype="bfloat16", out_dtype="float32",
        rivals=["torch dense"],
    )  # fmt: skip
    found = bsr.bench(settings, command="", tell=told.append)
    assert not results.failures(found) and not found["absent"]
    writes = {cell["impl"]: cell.get("writes") for cell in found["cells"] if cell["impl"] != "kvcomp sparse"}
    assert writes == {"torch dense, full": "bfloat16", "torch dense": "bfloat16", "kvcomp": None}
    assert any("bfloat16 out, " in line for line in told)


def test_cases_without_room_are_told() -> None:
    told: list[Any] = []
    settings = bsr_settings.Settings(
        sizes=[128], sparsity=[0.3], blocks=[16], patterns=["causal", "uniform"], iterations=5, device="cpu", rivals=()
    )
    found = bsr.bench(settings, command="", tell=told.append)
    (entry,) = found["absent"]
    assert entry["case"]["pattern"] == "causal" and entry["impl"] == "kvcomp"
    assert told[0].startswith("kvcomp (128, block 16, 0.3 causal): not measured: no room for so few empty blocks")
    again = bsr.bench(settings, command="", before=found, tell=told.append)
    assert again["absent"] == [entry]


def test_samples_are_fewer_where_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bsr_samples._count(100.0, 100, 5, "cpu") == 100
    assert bsr_samples._count(1e5, 100, 5, "cpu") == 30
    assert bsr_samples._count(1e8, 100, 5, "cpu") == 5
    assert bsr_samples._count(2e4, 100, 5, "cuda") == 20, "cuSPARSE's product of 8192³"
    found, how = bsr_samples.of(lambda number: number, 2, 7, 5, "cpu")
    assert len(found) == 7 and how == "clock"


def test_settings() -> None:
    cpu = bsr_settings.Settings(device="cpu").resolved()
    assert cpu.sizes == (1024, 2048) and cpu.dtype == cpu.out_dtype == "float32" and cpu.blocks == BLOCKS
    every = bsr_settings.Settings(device="cpu", patterns=PATTERNS, sparsity=[0.3, 0.9], sizes=[256], blocks=[16, 16])
    cases = list(every.resolved().cases())
    assert len(cases) == 6 + 4 and (256, 16, 0.3, "causal") not in cases


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--sizes", "100"], "bench: --sizes: expected multiples of the block sizes, got 100"),
        (["--block-sizes", "48"], "bench: --block-sizes: expected among 16, 32, 64, 128, got 48"),
        (["--sparsity", "1.0"], "bench: --sparsity: expected fractions of empty blocks in [0, 1), got 1.0"),
        (
            ["--sparsity", "0.3", "--patterns", "causal"],
            "bench: --sparsity: expected 0.5 or more for the patterns causal",
        ),
        (["--patterns", "diagonal"], "bench: --patterns: expected among uniform, banded, "),
        (["--rivals", "cutlass"], "bench: --rivals: expected among torch dense, "),
        (["--minutes", "0"], "bench: --minutes: expected more than 0, got 0"),
        (["--iterations", "2"], "bench: --iterations: expected at least 5, got 2"),
        (["--dtype", "int8"], "bench: --dtype: expected among float16, bfloat16, float32, got int8"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(*flags)) == 2
    assert capsys.readouterr().err.startswith(f"kvcomp: {sentence}")


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "bsr", "--device", "cuda"]) == 2
    assert "bench: --device: expected a CUDA device, got none" in capsys.readouterr().err


# ---- tables


def test_tables(measured: dict[str, Any]) -> None:
    for rows in tables_bsr.ROWS.values():
        header, lines = rows(measured)
        assert lines and all(len(line) == len(header) for line in lines)
        assert report.markdown(header, lines).startswith("| ")
    header, lines = tables_bsr.all_rows(measured)
    assert len(lines) == len(measured["cells"]) and all(len(line) == len(header) for line in lines)
    _, lines = tables_bsr.pattern_rows(measured)
    assert [line[0] for line in lines] == ["256³, block 16", "256³, block 64"]


def test_tables_of_a_readme(measured: dict[str, Any], tmp_path: Path) -> None:
    for name in (*tables_bsr.ROWS, "bsr_cpu"):
        text = f"<!-- table: {name} -->\nold\n<!-- /table -->\n"
        with pytest.raises(FileNotFoundError):
            tables.render(text, tmp_path)
        path = tmp_path / tables.SOURCES[name][0]
        results.write(path, measured)
        made = tables.render(text, tmp_path)
        assert made.count("\n") > 3 and "old" not in made
        path.unlink()


def timed_cell(impl: str, us: float, block: int = 128, pattern: str = "uniform", size: int = 8192) -> dict[str, Any]:
    """As a GPU's file has it."""
    case = {"m": size, "n": size, "k": size, "block": block, "sparsity": 0.78, "pattern": pattern, "device": "cuda"}
    error = {"metric": "", "value": 1e-5, "bound": 1e-2}
    return results.cell(impl, case, error=error, median_us=us, samples_us=[us], blocks=901)


def test_goals_are_judged() -> None:
    times = {
        "kvcomp": 400.0,
        "torch dense": 1400.0,
        "torch bsr": 1030.0,
        "cusparse csr": 70000.0,
        "cusparse bsr": 19000.0,
    }
    cells = [timed_cell(impl, us) for impl, us in times.items()]
    found = results.new("bsr", command="kvcomp bench bsr") | {"cells": bsr_goals.related(cells), "absent": []}
    _, ((name, _, us, useful, share, faster, goal, beside),) = tables_bsr.speed_rows(found)
    assert (name, us, useful, faster) == ("8192³, block 128", "400.0", "605", "3.50×")
    assert share == "77" and beside == "2.6× (torch bsr)"
    assert goal == "650 TFLOPS (missed), 3.7× dense (missed), 50× cuSPARSE (missed), 2× Triton"
    header, rows = tables_bsr.rival_rows(found)
    assert ("cusparse csr", "70000 (175×)") in rows and header[1] == "block 128"
    (ours,) = [cell for cell in found["cells"] if cell["impl"] == "kvcomp"]
    assert ours["times_cusparse"] == pytest.approx(47.5), "of the faster one"
    assert ours["targets"] == bsr_goals.TARGETS[8192, 128, 0.78, "uniform"]


def test_patterns_are_judged_by_uniform_blocks() -> None:
    """Whichever of them was measured first; and what is not in the file is said to be missing."""
    cells = [timed_cell("kvcomp", 432.0, pattern="banded"), timed_cell("kvcomp", 450.0, pattern="clustered")]
    assert "times_uniform" not in bsr_goals.related(cells)[0]
    cells = bsr_goals.related([*cells, timed_cell("kvcomp", 400.0)])
    judged = {verdict.where: verdict for verdict in bsr_goals.verdicts(cells) if verdict.measure == "times_uniform"}
    banded, clustered, missing = (judged[8192, 128, 0.78, pattern] for pattern in ("banded", "clustered", "power_law"))
    assert banded.found == pytest.approx(1.08) and banded.met
    assert clustered.found == pytest.approx(1.125) and not clustered.met
    assert missing.found is None and not missing.met and missing.line().endswith("got nothing: not measured")
    assert (
        clustered.line()
        == "(8192, block 128, 0.78 clustered): expected ≤ 1.1× uniform's time, got 1.12× uniform's time: missed"
    )
    rows = dict(tables_bsr.goal_rows({"cells": cells})[1])
    assert rows["8192³, block 128, 78% empty, banded"] == "≤ 1.1× uniform's time: 1.08"
    assert rows["8192³, block 128, 78% empty, clustered"].endswith("1.12 (missed)")
    assert rows["16384³, block 128, 78% empty, uniform"] == "≥ 0.9 of the dense rate: not measured"
    assert len(rows) == len(bsr_goals.TARGETS)


def test_the_design_is_what_a_gpu_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that has a target, and 50 and 90 % of every block size; other flags are a sweep."""
    monkeypatch.setattr(bsr_settings.Settings, "_check", lambda settings, gpu: None)
    design = bsr_settings.Settings(device="cuda").resolved()
    cases = list(design.cases())
    assert set(bsr_goals.TARGETS) <= set(cases) and len(set(cases)) == len(cases) and not list(design.without_room())
    assert {(8192, block, sparsity, "uniform") for block in BLOCKS for sparsity in (0.5, 0.9)} <= set(cases)
    assert set(design.rivals_of(cases[0])) == set(bsr_rivals.CUDA)
    assert design.rivals_of((8192, 64, 0.5, "uniform")) == ("torch dense", "torch bsr")
    sweep = bsr_settings.Settings(device="cuda", sizes=[4096, 32768], sparsity=[0.5], blocks=[64]).resolved()
    assert list(sweep.cases()) == [(4096, 64, 0.5, "uniform"), (32768, 64, 0.5, "uniform")]
    assert sweep.iterations == 100 and set(sweep.rivals_of((4096, 64, 0.5, "uniform"))) == set(bsr_rivals.CUDA)
    assert bsr_settings.Settings(device="cuda", rivals=()).resolved().rivals_of(cases[0]) == ()


def test_minutes_cut_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run leaves, the next one measures, into the same file."""
    output = tmp_path / "bsr.json"
    flags = command("--block-sizes", 16, 32, "--rivals", "torch dense", "--output", output)
    now = iter(range(0, 10000, 40))
    with monkeypatch.context() as patch:
        patch.setattr(bsr, "time", SimpleNamespace(perf_counter=lambda: next(now)))
        assert main([*flags, "--minutes", "1"]) == 0
    assert "left for the next run, after 1 minutes: 1 of 2 matrices" in capsys.readouterr().err
    assert {cell["case"]["block"] for cell in results.read(output)["cells"]} == {None, 16}
    assert main([*flags, "--minutes", "9"]) == 0
    after = results.read(output)
    assert {cell["case"]["block"] for cell in after["cells"]} == {None, 16, 32}
    assert after["command"].count(" && ") == 1


def test_a_rival_that_was_not_asked_for_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its matrix is measured again, with all in one run; a file of other settings is begun anew, and that is said."""
    output = tmp_path / "bsr.json"
    flags = command("--block-sizes", 64, "--output", output)
    for rivals in (["torch dense"], ["torch dense", "torch csr"], ["torch csr"]):
        assert main([*flags, "--rivals", *rivals]) == 0
    impls = [cell["impl"] for cell in results.read(output)["cells"]]
    assert sorted(impls) == ["kvcomp", "torch csr", "torch dense", "torch dense, full"]
    assert "measured anew" not in capsys.readouterr().err
    assert main([*flags, "--rivals", "none", "--seed", "3"]) == 0
    assert "what there was is of other settings: everything is measured anew" in capsys.readouterr().err


def test_the_dense_way_and_the_dense_rival_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    honest = bsr_samples.timing.rotate

    def rotate(calls: Any, *more: Any, **how: Any) -> Any:
        order.append(" ".join(calls))
        return honest(calls, *more, **how)

    monkeypatch.setattr(bsr_samples.timing, "rotate", rotate)
    monkeypatch.setattr(bsr, "way_of", lambda matrix, n: "dense")
    settings = bsr_settings.Settings(
        sizes=[128], sparsity=[0.5], blocks=[16], iterations=5, device="cpu", rivals=["torch csr", "torch dense"]
    )
    found = bsr.bench(settings, command="", tell=lambda line: None)
    assert order.count("kvcomp torch dense") == 1
    cells = {cell["impl"]: cell for cell in found["cells"]}
    for impl in ("kvcomp", "torch dense"):
        assert cells[impl]["timing"] == "clock, in turn" and len(cells[impl]["samples_us"]) == 5
    assert "speedup" in cells["kvcomp"] and cells["kvcomp sparse"]["timing"] == "clock"
    settings = replace(settings, rivals=())
    assert bsr.bench(settings, command="", tell=lambda line: None)["cells"][1]["timing"] == "clock"


def test_a_rival_that_fails_while_it_is_timed_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose turn it is with ours is then timed by itself, and so is ours."""

    def failing(problem: bsr_rivals.Problem) -> bsr_rivals.Call:
        calls, honest = [0], bsr_rivals.dense(problem)

        def call(number: int) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > 3:
                raise RuntimeError("no more of this")
            return honest(number)

        return call

    monkeypatch.setattr(bsr_rivals, "CPU", {"torch dense": failing, "torch csr": bsr_rivals.CPU["torch csr"]})
    monkeypatch.setattr(bsr, "way_of", lambda matrix, n: "dense")
    settings = bsr_settings.Settings(sizes=[128], sparsity=[0.5], blocks=[16], iterations=5, device="cpu")
    found = bsr.bench(settings, command="", tell=lambda line: None)
    cells = {cell["impl"]: cell for cell in found["cells"] if cell["case"]["block"] == 16}
    assert [(entry["impl"], entry["reason"]) for entry in found["absent"]] == [("torch dense", "no more of this")]
    assert cells["kvcomp"]["timing"] == cells["torch csr"]["timing"] == "clock" and "torch dense" not in cells


_ONCE = -(10**6)


def test_events_alternate_behind_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of a GPU: one call keeps it busy, then events around as many as take a millisecond; the first is left
    out, slow calls have nothing before them. No call finds its inputs where the one before has left them."""
    log: list[str] = []
    numbers: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("|")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bsr_samples, "_once", lambda call, copies, device: call(_ONCE))
    once = {"a": 600.0, "b": 300.0}

    def named(name: str) -> bsr_samples.Call:
        def call(number: int) -> float:
            if number != _ONCE:
                log.append(name)
                numbers.extend([number] * (name == "b"))
            return once[name]

        return call

    found, how = bsr_samples.in_turn({name: named(name) for name in once}, 1, 7, 5, "cuda", graph=False)
    assert how == "events" and found == {"a": [1500.0] * 7, "b": [500.0] * 7}
    assert "".join(log) == "a|a|b|bbb|" * 8
    assert numbers[:8] == [-1, 0, 1, 2, 2, 3, 4, 5]
    log.clear()
    once["a"] = 1e5
    assert bsr_samples.of(named("a"), 1, 7, 5, "cuda") == ([1500.0] * 5, "events")
    assert "".join(log) == "|a|" * 6


# ---- what cuSPARSE is given


def test_blocked_ell() -> None:
    a = random_bsr(96, 128, 32, 0.5, dtype=torch.float32, pattern="power_law", seed=3)
    indices, values = bsr_cusparse.blocked_ell(a)
    width = int(a.row_ptr.diff().max())
    assert indices.shape == (3, width) and values.shape == (96, 32 * width)
    dense = torch.zeros(96, 128)
    for row in range(3):
        for place, column in enumerate(indices[row].tolist()):
            part = values[32 * row : 32 * row + 32, 32 * place : 32 * place + 32]
            if column < 0:
                assert not part.any()
            else:
                dense[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = part
    assert torch.equal(dense, a.to_dense())


def test_two_of_four() -> None:
    pruned = bsr_rivals.pruned(torch.tensor([[1.0, -3, 2, 0.5, 0, 0, 1, 9]]))
    assert pruned.tolist() == [[0, -3, 2, 0, 0, 0, 1, 9]]


# ---- scripts


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, timeout=100)


def test_the_script_is_the_same_command() -> None:
    def usage(*command: object) -> str:
        said = run(sys.executable, *command, "--help")
        assert said.returncode == 0, said.stderr
        return said.stdout[said.stdout.index("usage:") :]

    assert usage(SCRIPTS / "comprehensive_benchmark.py") == usage("-m", "kvcomp", "bench", "bsr")


def test_quickstart() -> None:
    said = run(sys.executable, SCRIPTS / "quickstart_bsr.py", "--device", "cpu", "--size", 512, "--block-size", 32)
    assert said.returncode == 0, said.stderr
    assert "worth it (optimal)" in said.stdout and "times faster" in said.stdout
    said = run(sys.executable, SCRIPTS / "quickstart_bsr.py", "--device", "cpu", "--sparsity", 2)
    assert said.returncode == 2 and said.stderr.startswith("quickstart_bsr: random_bsr: sparsity: ")
    said = run(sys.executable, SCRIPTS / "quickstart_bsr.py", "--device", "cpu", "--size", 0)
    assert said.returncode == 2 and said.stderr.startswith("quickstart_bsr: --size, --calls: expected 1 or more")


COLUMNS = (
    "ID",
    "Process ID",
    "Kernel Name",
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
)
NCU = f"""#!/bin/sh
echo "==PROF== Connected to process 1"
echo "BSRMatrix printed this"
cat <<'END'
{",".join(f'"{name}"' for name in COLUMNS)}
"","","","ns","%","%"
"0","1","kvc_bsr_kernel(float, int)","346,000","91.5","88.25"
"1","1","kvc_bsr_kernel(float, int)","350,000","90.5",""
END
exit ${{NCU_STATUS:-0}}
"""


@pytest.fixture
def fake_ncu(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    ncu = folder / "ncu"
    ncu.write_text(NCU)
    ncu.chmod(ncu.stat().st_mode | stat.S_IEXEC)
    return folder


def test_profile(fake_ncu: Path, tmp_path: Path) -> None:
    output, path = tmp_path / "made" / "profile.csv", f"{fake_ncu}{os.pathsep}{os.environ['PATH']}"
    said = run(SCRIPTS / "profile_ncu.sh", "-o", output, "true", PATH=path)
    assert said.returncode == 0, said.stderr
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == ["kvc_bsr_kernel(float, int)"] * 2
    assert rows[0]["time_us"] == "346" and rows[0]["sm_pct"] == "91.5" and rows[0]["l2_hit_pct"] == "88.25"
    assert rows[1]["l2_hit_pct"] == "" and rows[0]["occupancy_pct"] == ""
    for word in ("dram_pct", "l2_pct", "occupancy_pct", "registers"):
        assert word in rows[0]
    said = run(SCRIPTS / "profile_ncu.sh", "-o", output, "true", PATH=path, NCU_STATUS="9")
    assert said.returncode == 1 and "got exit code 9" in said.stderr


def test_profile_refuses(fake_ncu: Path, tmp_path: Path) -> None:
    output = tmp_path / "none.csv"
    said = run(SCRIPTS / "profile_ncu.sh", "-o", output, PATH="/usr/bin:/bin", CUDA_HOME=str(tmp_path / "none"))
    if not list(Path("/opt/nvidia/nsight-compute").glob("*/ncu")):
        assert said.returncode == 2 and said.stderr.startswith("profile_ncu: ncu: expected NVIDIA Nsight Compute")
    (fake_ncu / "ncu").write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\nexit 1\n")
    path = f"{fake_ncu}{os.pathsep}{os.environ['PATH']}"
    said = run(SCRIPTS / "profile_ncu.sh", "-o", output, "true", PATH=path)
    assert said.returncode == 2 and "permission to read the GPU's counters" in said.stderr
    (fake_ncu / "ncu").write_text("#!/bin/sh\necho '==PROF== nothing'\n")
    said = run(SCRIPTS / "profile_ncu.sh", "-o", output, "-k", "gemm", "true", PATH=path)
    assert said.returncode == 1 and "expected a launch of a kernel like gemm, got none" in said.stderr
    assert not output.exists()
    for bad in (tmp_path, fake_ncu / "ncu" / "profile.csv"):
        said = run(SCRIPTS / "profile_ncu.sh", "-o", bad, "true", PATH=path)
        assert said.returncode == 2 and "-o: expected the name of a file that can be written" in said.stderr
    for flags in (["-c", "0"], ["-s", "x"], ["-q"]):
        assert run(SCRIPTS / "profile_ncu.sh", *flags).returncode == 2


# ---- from L2 to shared memory

L2_LINE = {
    "panel_bytes": 16777216, "blocks": 132, "bytes_filled": 2e10, "bytes_read": 5e9, "flops": 1.6e12,
    "checked_words": 1000, "wrong_words": 0, "samples_us": [2000.0, 2500.0, 2100.0],
}  # fmt: skip


def l2_program(folder: Path, lines: list[dict[str, Any]], code: int = 0) -> Path:
    program = folder / "l2_rate"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint({chr(10).join(map(json.dumps, lines))!r})\n"
                       f"print('l2_rate: expected a GPU', file=sys.stderr)\nsys.exit({code})\n")  # fmt: skip
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return program


def test_l2_rate(tmp_path: Path) -> None:
    """The results file of what the program prints, and its table."""
    lines = [
        {"mode": mode, "multicast": multicast, "columns": 1024, **L2_LINE, "flops": 1.6e12 * (mode == "product")}
        for multicast in (1, 4)
        for mode in ("shared", "product")
    ]
    output, script = tmp_path / "l2.json", [sys.executable, SCRIPTS / "l2_rate.py"]
    said = run(*script, "--program", l2_program(tmp_path, lines), "--output", output)
    assert said.returncode == 0, said.stderr
    found = results.read(output, kind="l2_rate")
    assert found["origin"] == "measured" and len(found["cells"]) == 4 and not results.failures(found)
    cell = found["cells"][-1]
    assert cell["case"] == {"mode": "product", "multicast": 4, "columns": 1024} and len(cell["samples_us"]) == 3
    assert cell["tb_per_s_filled"] == pytest.approx(2e10 / 2100 / 1e6) and cell["tflops"] == pytest.approx(762, abs=1)
    header, rows = tables_bsr.l2_rows(found)
    assert rows[1] == ("16.8 MB (1024 columns)", "4", "9.52", "2.38", "9.52", "2.38", "762") and len(header) == 7
    assert rows[0][1] == "1" and len(rows) == 2
    wrong = [lines[0] | {"wrong_words": 3}]
    said = run(*script, "--program", l2_program(tmp_path, wrong))
    assert said.returncode == 1 and "expected at most 0, got 3" in said.stderr


def test_l2_rate_refuses(tmp_path: Path) -> None:
    script = [sys.executable, SCRIPTS / "l2_rate.py"]
    for code in (1, 2):
        said = run(*script, "--program", l2_program(tmp_path, [], code))
        assert said.returncode == code and said.stderr == "l2_rate: expected a GPU\n"
    for flags, sentence in (
        (["--samples", 0], "--samples: expected 1 or more, got 0"),
        (["--program", tmp_path / "none"], "--program: expected a program that runs here"),
        (["--program", tmp_path / "l2_rate", "--output", tmp_path], "--output: expected the name of a file"),
    ):
        said = run(*script, *flags)
        assert said.returncode == 2 and said.stderr.startswith(f"l2_rate: {sentence}")
    said = run(*script, PATH="/none", CUDA_HOME="/none")
    assert said.returncode == 2 and said.stderr.startswith("l2_rate: nvcc: expected a CUDA compiler")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_l2_rate_is_built() -> None:
    """And says which GPU it wants where there is none."""
    said = run(sys.executable, SCRIPTS / "l2_rate.py", "--samples", 1, CUDA_VISIBLE_DEVICES="")
    assert said.returncode == 2 and said.stderr == "l2_rate: expected a GPU of compute capability 9.0, got none\n"
