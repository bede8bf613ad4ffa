"""The kvcomp command: help, exit codes, one sentence on bad input and nothing written, interrupting and resuming."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from experiment_support import EXPERIMENTS, ROOT, SMALL, save_model, write_config
from kvcomp import results
from kvcomp.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "small.yaml")


def small(model: Path, *arguments: object) -> list[str]:
    return ["--model", str(model), *SMALL, *map(str, arguments)]


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object) -> str:
    """The one sentence of a command that exits with 2 and changes no file."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert len(said) == 1 and said[0].startswith("kvcomp: "), said
    return said[0]


# ---- help


@pytest.mark.parametrize("command", [[], ["run"], ["quality"], ["policies"], ["bench", "attend"], ["tables"], ["env"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: kvcomp" in capsys.readouterr().out


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_the_script_is_the_same_command() -> None:
    """Same flags under the checklist's name; and the module runs as a program."""

    def usage(*command: str) -> str:
        out = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, check=True).stdout
        return out[out.index("usage:") :]

    assert usage(str(ROOT / "scripts" / "run_experiment.py")) == usage("-m", "kvcomp", "run")


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert "backend" in capsys.readouterr().out


# ---- the main job


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run on the small model, with a picture."""
    folder = tmp_path_factory.mktemp("run")
    path = write_config(folder / "small.yaml")
    out, picture = folder / "deep" / "report.json", folder / "plot.png"
    arguments = ["run", "--config", str(path), *small(model, "--report-path", out, "--plot", picture)]
    assert main(arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in out.parent.iterdir()) == ["report.json"]
    found = results.read(out, kind="quality")
    assert found["command"] == " ".join(["kvcomp", *arguments])
    return found


def test_report_has_the_seeds_fields_and_the_stamp(report: dict[str, Any]) -> None:
    for name in ("memory_reduction", "original_mb", "compressed_mb", "throughput_gain", "ttft_delta_ms",
                 "tpot_delta_ms", "compression_ratio"):  # fmt: skip
        assert isinstance(report[name], float), name
    assert report["schema"] == "kvcomp.results/1" and report["origin"] == "measured"
    assert report["machine"]["cpu"] and report["versions"]["torch"] and report["versions"]["page_format"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", report["started"])
    assert report["compression_ratio"] >= 4
    text = json.dumps(report)
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_report_puts_every_figure_beside_the_uncompressed_models(report: dict[str, Any]) -> None:
    cells = {(c["case"]["method"], c["case"]["task"], c["case"]["mode"]): c for c in report["cells"]}
    tasks = [("held_out", "continuation"), ("needle_multi_key", "aware"), ("needle_multi_key", "agnostic")]
    assert set(cells) == {(method, *task) for method in ("bf16", "small") for task in tasks}
    plain, packed = cells["bf16", *tasks[0]], cells["small", *tasks[0]]
    assert (plain["impl"], packed["impl"]) == ("transformers DynamicCache", "kvcomp")
    assert plain["kl"] == 0 and packed["kl"] > 0 and plain["top1_agreement"] == 1
    for cell in (plain, packed):
        assert cell["n"] == len(cell["losses"]) == 40
        assert len(cell["tpot_samples_ms"]) == 39 and cell["perplexity"] > 1 and cell["ttft_ms"] > 0
    assert sum(packed["ledger"].values()) == packed["nbytes"]
    assert packed["nbytes"] * 4 <= packed["bf16_bytes"] == 2 * 2 * 2 * 64 * 728
    for name in ("key_mse", "value_mse", "key_cosine", "value_cosine", "attention_output_error", "kept_fraction",
                 "bits_per_element"):  # fmt: skip
        assert packed[name] > 0, name
    agnostic = cells["small", *tasks[2]]
    assert agnostic["n"] == len(agnostic["scores"]) == 2 and agnostic["contexts"] == 1
    assert agnostic["ci95"][0] <= agnostic["accuracy"] <= agnostic["ci95"][1]
    assert report["accuracy"]["small"]["agnostic"]["n"] == 2
    assert report["accuracy_drop"]["n"] == 3 and report["accuracy_drop"]["contexts"] == 2


def test_report_states_configured_and_effective_values_and_limits(report: dict[str, Any]) -> None:
    assert report["keys"]["selector.window_size"] == {"configured": 32, "effective": 24}
    bits = report["keys"]["quantization.key_bits"]
    assert bits["configured"] == 4 and 2 <= bits["effective"] <= 4
    gain = report["limits"]["min_throughput_gain"]
    assert gain["measured"] == report["throughput_gain"] and gain["met"] == (gain["measured"] >= 1.0)
    drop = report["limits"]["max_accuracy_drop"]
    assert drop["met"] == (report["accuracy_drop"]["mean"] <= 0.02)


def test_the_uncompressed_cache_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "base.json"
    assert main(["run", str(EXPERIMENTS / "baseline_full.yaml"), *small(model, "--report-path", out)]) == 0
    found = results.read(out)
    assert {cell["case"]["method"] for cell in found["cells"]} == {"bf16"}
    assert found["throughput_gain"] == 1.0
    assert "allocated" in capsys.readouterr().out


def test_quality_compares_ratios_and_configs(model: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality.json"
    arguments = small(model, "--ratios", 2, 4, "--configs", config, "--output", out)
    assert main(["quality", *arguments]) == 0
    found = results.read(out, kind="quality")
    ratios = {cell["case"]["method"]: cell["ratio"] for cell in found["cells"] if cell["case"]["task"] == "held_out"}
    assert list(ratios) == ["bf16", "2x", "4x", "small"]
    assert ratios["2x"] >= 2 and ratios["4x"] >= 4 and ratios["small"] >= 4


# ---- bad input


def test_bad_input_of_run(model: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"

    def said(*arguments: object) -> str:
        return refused(capsys, tmp_path, "run", *arguments, "--report-path", report)

    assert "--config: expected one experiment file, got none" in said()
    assert "--config: expected one experiment file, got two" in said(config, "--config", config)
    assert "No such file" in said(tmp_path / "nowhere.yaml")
    assert "--model: expected a folder with a transformers model" in said(config, "--model", tmp_path)
    assert "--text: expected a file of ASCII text" in said(config, *small(model, "--text", tmp_path / "no.txt"))
    assert "--length: expected at most 1024" in said(config, *small(model, "--length", 2048))
    assert "length: expected at least" in said(config, *small(model, "--length", 64, "--scored", 8))
    assert "--aware: expected 0 or more, got -1" in said(config, *small(model, "--aware", -1))
    assert "--families: expected among needle_single" in said(config, *small(model, "--families", "needle"))
    write_config(tmp_path / "typed.yaml", metrics={"compressed_tps": 9.0})
    assert "metrics.compressed_tps: expected measured figures" in said(tmp_path / "typed.yaml", *small(model))
    write_config(tmp_path / "norm.yaml", selector={"importance": "key_norm"})
    assert "selector.importance: expected attention" in said(tmp_path / "norm.yaml", *small(model))
    write_config(tmp_path / "tight.yaml", selector={"window_size": 512}, budget={"target_compression_ratio": 8.0})
    smallest = re.search(r"a ratio of ([\d.]+) or less", said(tmp_path / "tight.yaml", *small(model)))
    assert smallest is not None
    # The ratio that is named does work.
    write_config(
        tmp_path / "fits.yaml",
        selector={"window_size": 512},
        budget={"target_compression_ratio": float(smallest[1])},
    )
    assert main(["run", str(tmp_path / "fits.yaml"), *small(model, "--aware", 0, "--agnostic", 0)]) == 0


def test_bad_paths_to_write_to(model: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for flag in ("--report-path", "--plot"):
        for path in (tmp_path, tmp_path / "file" / "report.json"):
            said = refused(capsys, tmp_path, "run", config, *small(model, flag, path))
            assert f"{flag}: expected the name of a file that can be written" in said
    assert "--plot: expected a file such as plot.png" in refused(
        capsys, tmp_path, "run", config, *small(model, "--plot", tmp_path / "plot.xyz")
    )


def test_a_damaged_model_is_one_sentence(
    model: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in model.iterdir():
        if path.is_file():
            (damaged / path.name).write_bytes(path.read_bytes()[: 2000 if path.suffix == ".safetensors" else None])
    assert "--model: expected a folder with a transformers model" in refused(
        capsys, tmp_path, "run", config, *small(damaged)
    )


def test_without_torch(config: Path) -> None:
    """What needs torch says so; what does not, runs."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = f"import sys; sys.modules['torch'] = None; from kvcomp.cli import main; sys.exit(main({arguments!r}))"
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    env, job = run("env"), run("run", str(config))
    assert env.returncode == 0 and "backend" in env.stdout, env.stderr
    assert job.returncode == 2 and job.stderr.count("\n") == 1, job.stderr
    assert "expected torch to be installed (pip install 'kvcomp[hf]')" in job.stderr


def test_traceback_on_request(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "run", str(tmp_path / "nowhere.yaml")])


# ---- interrupting


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvcomp", "run", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_interrupted_and_resumed(model: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, partial = tmp_path / "report.json", tmp_path / "report.json.partial"
    arguments = [str(config), *small(model, "--aware", 30, "--report-path", report)]
    running = start(arguments)
    try:
        end = time.monotonic() + 60
        while not partial.exists() and running.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert "units are kept in" in said and "Traceback" not in said
    assert not report.exists()
    units = json.loads(partial.read_text())["units"]
    assert 0 < len(units) < 1 + 2 * 31
    # Another command does not touch them.
    other = refused(capsys, tmp_path, "run", *arguments, "--seed", 1)
    assert "expected the partial file of this very command" in other
    # The same goes on: what was measured is in the report as it was.
    assert main(["run", *arguments]) == 0
    assert f"{len(units)} of {1 + 2 * 31} units were measured before" in capsys.readouterr().err
    assert not partial.exists()
    cells = results.read(report)["cells"]
    kept = units["text/0"]["small"]["token_ms"]
    assert (
        next(c for c in cells if c["case"]["method"] == "small" and c["case"]["task"] == "held_out")["tpot_samples_ms"]
        == kept
    )
    aware = next(c for c in cells if c["case"]["method"] == "bf16" and c["case"]["mode"] == "aware")
    assert aware["n"] == 30


def test_a_foreign_partial_file_is_refused(
    model: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json.partial").write_text("{}")
    said = refused(capsys, tmp_path, "run", config, *small(model, "--report-path", tmp_path / "report.json"))
    assert "expected the partial file of this very command" in said


# ---- bench and tables


def test_bench_attend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attend.json"
    arguments = ["bench", "attend", "--tokens", "300", "--bits", "3", "16", "--samples", "5", "--output", str(out)]
    assert main(arguments) == 0
    found = results.read(out, kind="attend")
    roles = [(cell["impl"], cell.get("role"), cell["case"].get("k_bits")) for cell in found["cells"]]
    assert roles == [
        ("torch sum", "ceiling", None),
        ("torch sdpa enable_gqa", None, 16),
        ("torch sdpa group as rows", None, 16),
        ("kvcomp", None, 3),
        ("kvcomp", None, 16),
    ]
    for cell in found["cells"][1:]:
        case = cell["case"]
        assert {"b", "s", "q_heads", "kv_heads", "d", "k_bits", "v_bits", "device"} <= set(case)
        assert len(cell["samples_us"]) == 5 and cell["bytes"] > 0 and cell["fraction_of_peak"] > 0
        assert 0 < cell["error"]["value"] <= cell["error"]["bound"] < 0.05
    assert found["cells"][0]["error"] is None and "times_torch" in found["cells"][3]
    assert "read rate" in capsys.readouterr().out


def test_bench_attend_fails_over_its_bound(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from kvcomp.bench import attend

    monkeypatch.setattr(attend, "TORCH_BOUND", 0.0)
    assert main(["bench", "attend", "--tokens", "64", "--bits", "4", "--samples", "5"]) == 1
    assert "expected at most 0, got" in capsys.readouterr().err


def test_bench_attend_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcomp._C.cuda_info", lambda: {"available": False, "why": "none"})
    assert "--device: expected a CUDA device, got none" in refused(
        capsys, tmp_path, "bench", "attend", "--device", "cuda"
    )
    assert "--sections: expected none with --device cpu" in refused(
        capsys, tmp_path, "bench", "attend", "--sections", "table"
    )
    assert "--tokens: expected at least 1" in refused(capsys, tmp_path, "bench", "attend", "--tokens", 0)
    assert "--samples: expected at least 5" in refused(capsys, tmp_path, "bench", "attend", "--samples", 1)


def test_targets_of_benches_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stand beside their cells, met or missed by how much, in the file and on the screen."""
    pytest.importorskip("torch", reason="needs torch")
    from kvcomp import _C
    from kvcomp.bench import pack

    info = _C.cuda_info() | {"available": True}

    def bench(*, samples: int = 3, seed: int = 0) -> list[dict[str, Any]]:
        error = {"metric": "bytes", "value": 0, "bound": 0}
        case = {"s": 32768, "device": "cuda"}
        return [results.cell("kvcomp pack", case, error=error, fraction_of_copy=0.6, target_fraction=0.8)]

    monkeypatch.setattr(_C, "cuda_info", lambda: info)
    monkeypatch.setattr(pack, "bench", bench)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["bench", "pack", "--output", str(tmp_path / "pack.json")]) == 0
    (cell,) = results.read(tmp_path / "pack.json", kind="pack")["cells"]
    assert cell["over_target"] == {"target_fraction": pytest.approx(0.25)}
    assert "≥ 0.8: missed by 25.0 %" in capsys.readouterr().out


def test_tables(report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(tmp_path / "experiments/results/tiny_quality.json", report)
    readme = tmp_path / "README.md"
    readme.write_text(
        "# A\n<!-- table: quality -->\nold\n<!-- /table -->\nb\n<!-- table: tasks -->\n<!-- /table -->\nend\n"
    )
    assert main(["tables", str(readme), "--check"]) == 1
    assert "a table differs from its results file" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert main(["tables", str(readme)]) == 0
    text = readme.read_text()
    assert "old" not in text and text.startswith("# A\n") and text.endswith("end\n") and "\nb\n" in text
    assert "| bf16 |" in text and "| small |" in text and "| needle multi key | agnostic | 2 |" in text
    assert main(["tables", str(readme), "--check"]) == 0
    below = tmp_path / "experiments/results/note.md"  # its tables are of the same folder
    below.write_text(text)
    assert main(["tables", str(readme), str(below), "--check"]) == 0
    readme.write_text(text.replace("| small |", "| large |"))
    assert main(["tables", str(readme), "--check"]) == 1


def test_tables_refuse(tmp_path: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    readme, found = tmp_path / "README.md", tmp_path / "experiments/results/tiny_quality.json"
    readme.write_text("<!-- table: quality -->\n<!-- /table -->\n")
    assert "No such file" in refused(capsys, tmp_path, "tables", readme)
    found.parent.mkdir(parents=True)
    found.write_text('{"schema": "other"}')
    assert "expected schema kvcomp.results/1, got other" in refused(capsys, tmp_path, "tables", readme)
    found.write_text('{"schema": ')
    assert "got a foreign or truncated file" in refused(capsys, tmp_path, "tables", readme)
    results.write(found, {**report, "kind": "attend"})
    assert "expected a file of kind quality, got attend" in refused(capsys, tmp_path, "tables", readme)
    readme.write_text("<!-- table: speed -->\n<!-- /table -->\n")
    assert "expected a table named quality, quality_fresh, tasks, attend" in refused(capsys, tmp_path, "tables", readme)


# ---- results files


def test_a_results_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write(path, {"schema": results.SCHEMA, "samples": [1.5, -2e-9, 3], "names": ["a", "b"], "nothing": []})
    assert results.read(path)["samples"] == [1.5, -2e-9, 3]
    assert '"samples": [1.5, -2e-09, 3]' in path.read_text()
    before = path.read_text()
    with pytest.raises(ValueError):
        results.write(path, {"value": float("nan")})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_cells_without_error_or_over_their_bound_fail() -> None:
    good = results.cell("x", {}, error={"metric": "e", "value": 1.0, "bound": 1.0})
    over = results.cell("x", {}, error={"metric": "e", "value": 1.1, "bound": 1.0})
    unknown = results.cell("x", {}, error={"metric": "e", "value": float("nan"), "bound": 1.0})
    none = results.cell("x", {}, error=None)
    ceiling = results.cell("x", {}, error=None, role="ceiling")
    assert results.failures({"cells": [good, ceiling]}) == []
    assert len(results.failures({"cells": [over, none, unknown]})) == 3


def test_wilson_against_its_formula() -> None:
    low, high = results.wilson(0.5, 10)
    assert abs(low - 0.236593) < 1e-5 and abs(high - 0.763407) < 1e-5
    assert results.wilson(0.0, 5)[0] == 0.0 and results.wilson(1.0, 5)[1] == 1.0
