"""kvcomp bench attend --device cuda: its data, what it makes of times; the whole of it on a GPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kvcomp import _C, results

torch = pytest.importorskip("torch", reason="needs torch")
from kvcomp.bench import attend_cuda, goals, near, score, timing_cuda  # noqa: E402
from kvcomp.bench.lists_cuda import Layers, mixed, uniform  # noqa: E402
from kvcomp.cli import main  # noqa: E402
from kvcomp.store import BFLOAT16, PAGE, Layout  # noqa: E402
from reference_torch import assert_near  # noqa: E402


def test_forms_of_lists() -> None:
    form = uniform(6, 1000, 4, 2, tail_tokens=70)
    state = form.state()
    assert (state == [15 + 5, 15, 70, 1000]).all()
    layout = Layout(128, 128, 1, BFLOAT16)
    assert form.page_bytes(layout).sum() == 6 * (15 * _C.page_bytes(layout, 4, 2) + 5 * _C.page_bytes(layout, 16, 16))
    form = mixed(40, 5000, seed=1)
    pages, tail_page, tail_tokens, tokens = form.state().T
    assert (tail_tokens == 80).all() and (pages - tail_page == 5).all()
    assert (np.abs(tokens - 5000) <= 2501).all() and len(set(tokens.tolist())) > 30, "ragged"
    behind = np.arange(form.tokens.shape[1]) >= pages[:, None]
    assert (form.tokens[behind] == 0).all() and (form.tokens[~behind] > 0).all()
    assert len({*zip(form.k_bits[~behind].tolist(), form.v_bits[~behind].tolist(), strict=True)}) == 7
    assert (form.page_bytes(layout)[behind] == 0).all()


def test_layers_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page lies in two places, all layers read normal rows, and the L2 is passed thrice before a second look."""
    monkeypatch.setattr(timing_cuda, "l2_bytes", lambda device=0: 1 << 20)
    layout = Layout(64, 64, 1, BFLOAT16)
    for form in (uniform(4, 500, 2, 2), mixed(4, 900, seed=2)):
        layers = Layers(form, layout, heads=2, group=8, seed=3, device="cpu")
        count, n, _ = layers.tables.shape
        assert count % 8 == 0 and count % layers.copies == 0 and layers.copies * layers.nbytes > 3 << 20
        assert layers.lists.shape == (count, n, 4) and n == 4
        entries = layers.tables[: layers.copies].numpy().view(PAGE)
        entries = entries[entries["tokens"] > 0]
        sizes = [_C.page_bytes(layout, int(entry["k_bits"]), int(entry["v_bits"])) // 128 for entry in entries]
        order = np.argsort(entries["unit"])
        ends = entries["unit"].astype(np.int64) + sizes
        assert (entries["unit"][order][1:] >= ends[order][:-1]).all() and sum(sizes) * 128 == layers.arena.used
        assert not (np.diff(entries["unit"].astype(np.int64)) > 0).all(), "shuffled"
        for layer in (0, count - 1):
            for keys, values in layers.rows(layer, [0, n - 1]):
                assert len(keys) == len(values) and 0.7 < float(keys.std()) < 1.2 and 0.7 < float(values.std()) < 1.2


def test_copies() -> None:
    assert timing_cuda.copies(200, l2=60) == 1
    assert timing_cuda.copies(180, l2=60) == 2
    assert timing_cuda.copies(10, l2=60) == 19


def test_cells_beside_each_other() -> None:
    def cell(impl: str, us: float, gb_per_s: float, run: int = 1, **case: Any) -> dict[str, Any]:
        shape = {"b": 1, "s": 4096, "q_heads": 32, "kv_heads": 8, "d": 128, "q": 1, "k_bits": 4} | case
        return {"impl": impl, "case": shape, "median_us": us, "bytes": 8e6, "gb_per_s": gb_per_s, "run": run}

    cells = [
        cell("torch sum int64", 1, 4000.0) | {"role": "ceiling"},
        cell("copy on the device", 1, 4200.0) | {"role": "ceiling"},
        cell("torch sdpa cudnn, enable_gqa", 12.0, 1000.0),
        cell("torch sdpa flash, enable_gqa", 15.0, 900.0),
        cell("kvcomp", 4.0, 3000.0) | {"role": "table", "target_us": 5.0},
        cell("kvcomp", 4.0, 3000.0, k_bits="mixed") | {"times_uniform": 1.265, "target_ratio": 1.15},
        cell("kvcomp", 4.0, 3000.0, d=64),
        cell("torch sum int64", 1, 3000.0, run=2) | {"role": "ceiling"},
        cell("kvcomp", 2.0, 3000.0, run=2, k_bits=2) | {"role": "table"},
        cell("kvcomp", 4.4, 3000.0, run=2, k_bits=3) | {"role": "table"},
    ]
    for _ in range(2):
        attend_cuda.relate(cells)
        assert cells[4]["fraction_of_peak"] == 0.75 and cells[4]["times_torch"] == 3.0
        assert cells[4]["floor_us"] == 2.0 and cells[4]["over_target"] == pytest.approx({"target_us": -0.2})
        assert cells[5]["over_target"] == pytest.approx({"target_ratio": 0.1})
        assert "times_torch" not in cells[5] and "times_torch" not in cells[6]
        assert cells[8]["fraction_of_peak"] == 1.0, "the rate of its own run"
        assert cells[9]["target_us"] == 4.0 and cells[9]["times_2_bits"] == pytest.approx(2.2)
        assert goals.verdict(cells[9]) == "≤ 4: missed by 10.0 %"


def test_verdicts() -> None:
    assert goals.verdict({"median_us": 3.0}) == "" == goals.verdict({"target_us": 3.0})
    assert goals.verdict({"median_us": 3.0, "target_us": 3.0}) == "≤ 3: met by 0.0 %"
    assert goals.verdict({"fraction_of_copy": 0.6, "target_fraction": 0.8}) == "≥ 0.8: missed by 25.0 %"
    assert goals.verdict({"tflops_executed": 385.0, "target_tflops": 350.0}) == "≥ 350: met by 10.0 %"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_follow_the_rule_of_the_tests(dtype: torch.dtype) -> None:
    """A row's and a channel's, on both sides of the bound."""
    exact = torch.randn(3, 2, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    largest = float(exact.abs().max())
    for row, channel in ((5e-4, 0.0), (2e-2, 0.0), (0.0, 4e-3), (0.0, 3e-2)):
        out = exact * (1 + row)
        out[1, 1, 7] += channel * float(exact[1, 1].square().mean().sqrt())
        found = near.Errors()
        found.add(out.to(dtype), exact, largest)
        passes = found.error()["value"] <= found.error()["bound"]
        assert passes == (max(row, channel) < 1e-2)
        if passes:
            assert_near(out.to(dtype), exact, largest)
        else:
            with pytest.raises(AssertionError, match="times the bound"):
                assert_near(out.to(dtype), exact, largest)
    found.add(torch.full((1, 128), torch.nan, dtype=dtype), exact[0, :1], largest)
    json.dumps(found.error(), allow_nan=False)
    assert found.value > 1e20


def test_refusals() -> None:
    with pytest.raises(ValueError, match="--sections: expected among table, rivals, mixed, shapes, got speed"):
        attend_cuda.bench(command="", sections=("speed",))
    with pytest.raises(ValueError, match="--samples: expected at least 5, got 4"):
        attend_cuda.bench(command="", samples=4)


class Faked:
    """No GPU: every cell takes a microsecond; ``made`` is what was measured, ``failing`` a rival that does not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.failing = "flex"
        self.tensors = 0

        def cell(impl: str, case: dict[str, Any], **more: Any) -> dict[str, Any]:
            error = {"metric": "m", "value": 0.0, "bound": 1.0}
            timed = {"median_us": 1.0, "samples_us": [1.0], "bytes": 1000, "gb_per_s": 1.0}
            return results.cell(impl, case, error=error, **timed) | more

        def packed(run: Any, shape: Any, form: Any, layout: Any, case: Any, impls: Any, **more: Any) -> Any:
            self.made += [(impl, case) for impl in impls]
            first, *_ = [run.add(cell(impl, case, **more)) for impl in impls]
            return first

        def tensors(*arguments: Any) -> Any:
            self.tensors += 1
            return SimpleNamespace(nbytes=1000, copies=[0], error=lambda call: cell("", {})["error"])

        def call_of(name: str, rows: Any, tensors: Any) -> Any:
            return (lambda: 1 / 0) if name == self.failing else lambda: self.made.append((name, {"rows": rows}))

        def rotated(call: Any, least: int, *, replays: int) -> list[float]:
            call()
            return [2.0] * replays

        ceiling = cell("torch sum int64", {"read": "sum"}, role="ceiling") | {"error": None}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(timing_cuda, "read_rate", lambda replays: [dict(ceiling)])
        monkeypatch.setattr(timing_cuda, "rotated_us", rotated)
        monkeypatch.setattr(attend_cuda, "call_cost", lambda: {"host_us": 1.5, "target_us": 2.0})
        monkeypatch.setattr(attend_cuda._Run, "packed", packed)
        monkeypatch.setattr(attend_cuda.rivals, "Tensors", tensors)
        monkeypatch.setattr(attend_cuda.rivals, "call_of", call_of)


def names(found: dict[str, Any]) -> list[str]:
    cells = [cell for cell in found["cells"] if cell.get("role") != "ceiling"]
    return sorted(f"{cell['impl']} {json.dumps(cell['case'], sort_keys=True)}" for cell in cells)


def test_what_there_is_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections one by one make the cells of one run; a rival that did not run is tried again."""
    faked = Faked(monkeypatch)
    saved: list[int] = []
    quiet: dict[str, Any] = {"tell": lambda line: None, "cases": [(1, 4096), (8, 4096)], "samples": 5}
    whole = attend_cuda.bench(command="all", **quiet, save=lambda found: saved.append(len(found["cells"])))
    assert saved == sorted(saved) and len(saved) > 30 and len(set(names(whole))) == len(names(whole))
    assert len(whole["absent"]) == 2 and whole["runs"] == 1 and not results.failures(whole)
    order = [(cell["impl"].split()[0], cell["case"].get("s")) for cell in whole["cells"][1:17]]
    assert order[:4] == [("torch", 4096)] * 4 and order[4] == ("kvcomp", 4096), "rivals of a shape first"
    found = None
    for section in ("table", "rivals", "mixed", "shapes"):
        found = attend_cuda.bench(command=section, sections=(section,), before=found, **quiet)
    assert found is not None and names(found) == names(whole)
    assert found["runs"] == 4 and found["command"] == "table && rivals && mixed && shapes"
    assert {cell["run"] for cell in found["cells"] if cell["case"].get("k_bits") == 2} == {1}
    made, faked.failing = len(faked.made), ""
    found = attend_cuda.bench(command="table", before=found, **quiet)
    assert len(faked.made) == made + 2 and found["absent"] == [] and found["runs"] == 5
    tensors = faked.tensors
    again = attend_cuda.bench(command="table", before=found, **quiet)
    assert again["runs"] == 5 and (len(faked.made), faked.tensors) == (made + 2, tensors), "nothing is left"


class OnCPU(torch.overrides.TorchFunctionMode):
    """Tensors that are asked for on CUDA."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = dict(named or {})
        if named.get("device") == "cuda":
            named["device"] = "cpu"
        return function(*arguments, **named)


def test_a_step_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed, divided, counted and checked of a step of 32 layers, with the CPU's attention; a wrong output is
    seen."""
    attend, generator = _C.attend, torch.Generator
    divided: list[int] = []
    graphs: list[int] = []
    spoilt = 0.0

    def one(out: torch.Tensor, *arguments: Any) -> None:
        need = _C.attend_workspace(arguments[4].shape[0], arguments[3].shape[1], 2, arguments[1].shape[2], 64)
        scratch = torch.empty(need, dtype=torch.uint8)
        wide = torch.empty(out.shape)
        attend(wide, *arguments[:6], scratch, *arguments[7:12], None, 0)
        out.copy_(wide * (1 + spoilt))

    def graph_us(step: Any, calls: int, *, replays: int) -> list[float]:
        step()
        graphs.append(calls)
        before = len(divided)
        step()
        return [18.0 if calls == 32 and len(divided) > before else 2.0] * replays

    monkeypatch.setattr(timing_cuda, "l2_bytes", lambda device=0: 1 << 10)
    monkeypatch.setattr(timing_cuda, "graph_us", graph_us)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    monkeypatch.setattr(attend_cuda, "Layers", functools.partial(Layers, device="cpu"))
    monkeypatch.setattr(_C, "divide_words", lambda n, device: n)
    monkeypatch.setattr(_C, "divide", lambda divisions, *rest: divided.append(len(divisions)))
    monkeypatch.setattr(_C, "attend_workspace_cuda", lambda *sizes: 16)
    monkeypatch.setattr(_C, "attend", one)
    shape = attend_cuda.Shape(2, 200, q_heads=4, kv_heads=2, d=64)
    form, case = uniform(shape.lists, shape.s, 4, 4), shape.case(4, 4)
    found: dict[str, Any] = {"cells": [], "runs": 0}
    run = attend_cuda._Run(found, 5, 0, lambda line: None)
    with OnCPU():
        first = run.packed(shape, form, shape.layout(), case, ("kvcomp", "kvcomp in order"), target_us=2.5)
        assert first is found["cells"][0] and not results.failures(found)
        spoilt = 5e-3
        run.packed(shape, form, shape.layout(), case, ("kvcomp",))
    assert graphs == [20 * 32, 32, 32, 32, 32, 20 * 32, 32, 32] and set(divided) == {32}
    assert len(divided) == 2 * (20 + 1 + 1 + 20 + 1), "one in two steps divides"
    assert first["dividing_samples_us"] == [18.0] * 5 and first["between_samples_us"] == [2.0] * 5
    assert first["median_us"] == 3.0, "one step in 16 divides"
    assert first["divide_us"] == 2.0 and first["row_error"] < 1e-3 and first["target_us"] == 2.5
    nbytes = form.page_bytes(shape.layout()).sum() + 8 * (form.tokens > 0).sum()
    assert first["bytes"] == nbytes and first["gb_per_s"] == pytest.approx(nbytes / 3e3)
    assert [cell["impl"] for cell in found["cells"]] == ["kvcomp in order", "kvcomp"], "the second in the first's place"
    assert len(results.failures(found)) == 1


def test_every_target_of_the_table_is_beside_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    Faked(monkeypatch)
    found = attend_cuda.bench(command="", sections=("table", "mixed", "shapes"), tell=lambda line: None)
    ours = [cell for cell in found["cells"] if cell["impl"] == "kvcomp"]
    for (b, s), asked in attend_cuda.TARGETS.items():
        for bits, us in asked.items():
            case = attend_cuda.Shape(b, s).case(bits, bits)
            (cell,) = (cell for cell in ours if cell["case"] == case)
            assert cell["target_us"] == us < cell["prototype_us"]
            assert set(cell["over_target"]) == {"target_us", "prototype_us"}
    assert sum("target_us" in cell for cell in ours) == 6 * 4, "3 bits between 2 and 4"
    assert sum("target_ratio" in cell for cell in ours) == 4
    rivals = {tuple(cell["case"].values()) for cell in found["cells"] if cell["impl"].startswith("torch sdpa")}
    for b in (1, 8, 64):
        for q_heads, d in ((8, 128), (64, 128), (32, 64), (32, 256)):
            shape = attend_cuda.Shape(b, 32768, q_heads=q_heads, d=d)
            assert shape.case(4, 4) in [cell["case"] for cell in ours] and tuple(shape.case(16, 16).values()) in rivals


def test_score_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cuda, "l2_bytes", lambda device=0: 1)
    monkeypatch.setattr(timing_cuda, "rotated_us", lambda call, least, *, replays: [1000.0] * replays)
    (cell,) = score.bench("cpu", tokens=300, windows=(8,), samples=6)
    assert cell["error"]["value"] <= cell["error"]["bound"] and len(cell["samples_us"]) == 6
    assert cell["tflops_executed"] == pytest.approx(4 * 32 * 8 * 300 * 128 / 1e9)
    assert goals.excess(cell)["target_tflops"] > 0.99


def test_rivals_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of SDPA give what fp64 does, by the inputs' turns."""
    generator = torch.Generator
    monkeypatch.setattr(timing_cuda, "l2_bytes", lambda device=0: 1 << 18)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    with OnCPU():
        tensors = attend_cuda.rivals.Tensors(2, 300, 8, 2, 64, 0)
    assert len(tensors.copies) > 2
    forms = attend_cuda.rivals.forms("flash")
    assert list(forms) == ["torch sdpa flash, enable_gqa", "torch sdpa flash, group as rows"]
    for rows in forms.values():
        call = attend_cuda.rivals.call_of("flash", rows, tensors)
        error = tensors.error(call)
        assert 0 < error["value"] <= error["bound"]
        assert torch.equal(call(0), call(len(tensors.copies))) and not torch.equal(call(0), call(1))


def test_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    faked = Faked(monkeypatch)
    told: list[str] = []
    found = attend_cuda.bench(command="", minutes=0.0, cases=[(1, 4096)], sections=("table",), tell=told.append)
    assert faked.made == [] and told[-1] == "10 cells are left for the next run, after 0 minutes"
    found = attend_cuda.bench(command="", before=found, cases=[(1, 4096)], sections=("table",), tell=told.append)
    assert len(faked.made) == 10 and found["runs"] == 2


def test_results_of_another_machine_are_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    Faked(monkeypatch)
    told: list[str] = []
    asked: dict[str, Any] = {"cases": [(1, 4096)], "sections": ("table",), "tell": told.append}
    before = attend_cuda.bench(command="a", **asked)
    found = attend_cuda.bench(command="b", before=before | {"machine": {"cpu": "other"}}, **asked)
    assert found["command"] == "b" and found["runs"] == 1
    assert "what there was is of other machine: everything is measured anew" in told
    attend_cuda.bench(command="c", before=results.new("attend", command="on a CPU"), **asked)
    assert "what there was is of other layers and settings: everything is measured anew" in told
    found = attend_cuda.bench(command="d", before=before, seed=1, **asked)
    assert told.count("what there was is of other settings: everything is measured anew") == 1 and found["runs"] == 1


def test_the_command_hands_on_sections_and_saves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    out = tmp_path / "attend.json"

    def bench(
        *, command: str, sections: Any = (), bits: Any = (), samples: int = 9, minutes: float | None = None,
        seed: int = 0, before: Any = None, save: Any, tell: Any,
    ) -> Any:  # fmt: skip
        given.update(sections=sections, bits=bits, samples=samples, minutes=minutes, seed=seed, before=before)
        found = results.new("attend", command=command)
        save(found)
        assert json.loads(out.read_text())["cells"] == []
        return found | {"more": 1}

    why = _C.cuda_info()
    monkeypatch.setattr(_C, "cuda_info", lambda: why | {"available": True})
    monkeypatch.setattr(attend_cuda, "bench", bench)
    flags = ["--sections", "table", "rivals", "--bits", "4", "--samples", "7", "--seed", "3", "--output", str(out)]
    assert main(["bench", "attend", "--device", "cuda", *flags]) == 0
    handed = {"sections": ["table", "rivals"], "bits": [4], "samples": 7, "minutes": None, "seed": 3}
    assert given == handed | {"before": None}
    assert json.loads(out.read_text())["more"] == 1
    assert main(["bench", "attend", "--device", "cuda", *flags, "--minutes", "2.5"]) == 0
    assert given["minutes"] == 2.5 and given["before"]["more"] == 1, "what the file has is gone on with"
    assert main(["bench", "attend", "--device", "cuda", "--tokens", "5"]) == 2
    assert "--tokens: expected none for attend on cuda, got 5" in capsys.readouterr().err
    assert main(["bench", "attend", "--minutes", "5"]) == 2
    assert "--minutes: expected none with --device cpu, got 5.0" in capsys.readouterr().err


@pytest.mark.gpu
def test_bench() -> None:
    saved: list[int] = []
    found = attend_cuda.bench(
        command="kvcomp bench attend --device cuda",
        sections=("table", "rivals"),
        cases=[(1, 4096)],
        bits=(4, 2),
        samples=5,
        save=lambda found: saved.append(len(found["cells"])),
        tell=lambda line: None,
    )
    assert not results.failures(found)
    assert len(saved) == 3 and saved == sorted(saved) and saved[-1] == len(found["cells"])
    json.dumps(found, allow_nan=False)
    ours = [cell for cell in found["cells"] if cell["impl"] == "kvcomp"]
    assert len(ours) == 2 and all(cell["times_torch"] > 1 and len(cell["samples_us"]) == 5 for cell in ours)
    assert all(0 < cell["divide_us"] < cell["median_us"] and cell["over_target"] for cell in ours)
    assert all(0 < cell["fraction_of_peak"] < 1.3 for cell in found["cells"])
    assert found["call_cost"]["host_us"] < 50
