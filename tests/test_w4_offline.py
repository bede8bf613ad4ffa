"""The experiment matrix, the offline bench, its tables, and what a GPU draws."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from experiment_support import EXPERIMENTS, ROOT  # noqa: E402
from kvcomp.bench import aggregate, offline, offline_repeat, offline_table, power  # noqa: E402
from kvcomp.experiment import tables_w4  # noqa: E402
from kvcomp.w4 import arms, matrix  # noqa: E402

MATRIX = EXPERIMENTS / "experiment_matrix.yaml"


# ---- the matrix


def changed(path: Path, key: str, value: Any) -> Path:
    """The shipped matrix with one key changed; None: left out."""
    values = yaml.safe_load(MATRIX.read_text())
    *parents, last = key.split(".")
    place = values
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_shipped_matrix() -> None:
    loaded = matrix.load(MATRIX)
    assert list(loaded.configs) == [f"C{i}" for i in range(9)]
    found = {arm.config_id: arm for name in loaded.configs for arm in loaded.arms(name)}
    assert {name: arm.mode for name, arm in found.items()} == {
        "C0": "none", "C1": "fp8", "C2": "w4a16_bnb", "C3": "w4_shared_scale", "C4": "w4_shared_scale",
        "C5_m0": "w4_shared_scale", "C5_m3": "w4_shared_scale", "C5_m5": "w4_shared_scale", "C6": "w4a16_bnb_dq",
        "C7": "w4_shared_scale", "C8": "w4_shared_scale",
    }  # fmt: skip
    assert [found[name].scale_mbits for name in ("C3", "C4", "C5_m0", "C5_m3", "C5_m5", "C7")] == [-1, 5, 0, 3, 5, 5]
    assert [found[name].quant_target for name in ("C4", "C7")] == ["mlp", "all"]
    assert loaded.arms("C5_m3") == [found["C5_m3"]]
    usual = loaded.workloads.offline_batch_decode
    assert (usual.prompt_lengths, usual.output_lengths, usual.repeats) == ([128, 512, 2048], [64, 256], 3)
    serving = loaded.workloads.online_serving
    assert serving is not None and serving.concurrency == [1, 4, 8, 16, 32] and serving.runner == "vllm"
    # C2 and C6 differ, C4 and C5_m5 do not.
    assert found["C2"].mode != found["C6"].mode
    with pytest.raises(ValueError, match=r"--config_id: expected among C0, C1, .*C5_m0.*, got C10"):
        loaded.arms("C10")


def test_the_seeds_matrix_is_read(tmp_path: Path) -> None:
    """Its keys and values, in other words where they are words."""
    path = tmp_path / "m.yaml"
    path.write_text("""
experiment: {name: a, date_frozen: "2026-03-22", models: [microsoft/Phi-3.5-mini-instruct, b], model_revision: main}
fairness_constraints:
  tokenizer: same
  chat_template: none
  decoding: {temperature: 0.0, do_sample: false, top_p: 1.0, seed: 42}
  runtime: torch_runner
  warmup_runs: 1
  kv_cache_dtype: auto
configs:
  C0: {name: BF16, runtime: torch, quant: {mode: none, dtype: bf16}}
  C1: {name: FP8, runtime: torch, quant: {mode: fp8_te, dtype: bf16}}
  C5: {name: sweep, runtime: torch, notes: three,
       quant: {mode: w4_shared_scale, scale_mbits_sweep: [0, 3, 5], group_size: 128, dtype: bf16, quant_target: mlp}}
workloads:
  offline_batch_decode: {prompt_lengths: [128, 512, 2048], output_lengths: [64, 256], repeats: 3}
  online_serving: {concurrency: [1, 4], prompt_len: 512, output_len: 128, num_prompts: 64, runner: vllm}
  long_context_stress: {prompts: [8192, 32768], output_len: 64, enabled_if_memory_allows: true}
metrics:
  performance: [throughput_output_tok_s, throughput_total_tok_s, ttft_ms, tpot_ms, model_mem_mb, joules_per_token]
  quality: {harness: lm-eval, tasks: [hellaswag, gsm8k], num_fewshot: 0, report_relative_drop_vs: C0,
            acceptance_target_avg_relative_drop_pct: 3.0}
""")
    loaded = matrix.load(path)
    assert [arm.config_id for arm in loaded.arms("C5")] == ["C5_m0", "C5_m3", "C5_m5"]
    with pytest.raises(NotImplementedError, match="needs a server"):
        offline.lengths(loaded, "online_serving")
    assert offline.lengths(loaded, "long_context_stress") == ([8192, 32768], [64], True)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("configs.C4.quant.group_size", 100, "configs.C4.quant.group_size"),
        ("configs.C4.quant.scale_mbits", 11, "configs.C4.quant.scale_mbits"),
        ("configs.C4.quant.scale_mbits", None, "expected one of scale_mbits and scale_mbits_sweep"),
        ("configs.C4.quant.scale_mbits_sweep", [0], "expected one of scale_mbits and scale_mbits_sweep"),
        ("configs.C4.quant.mode", "w8", "configs.C4.quant.mode"),
        ("configs.C4.quant.bits", 4, "configs.C4.quant.bits"),
        ("configs.C0.quant.quant_target", "mlp", "expected to be left out with mode none"),
        ("configs.C2.quant.group_size", 64, "group_size: expected to be left out with mode w4a16_bnb"),
        ("configs.C0.runtime", "vllm", "configs.C0.runtime"),
        ("fairness_constraints.decoding.temperature", 0.7, "temperature"),
        ("fairness_constraints.decoding.do_sample", True, "do_sample"),
        ("fairness_constraints.kv_cache_dtype", "fp8", "kv_cache_dtype"),
        ("workloads.offline_batch_decode", None, "workloads.offline_batch_decode"),
        ("workloads.offline_batch_decode.repeats", 0, "repeats"),
        ("metrics.quality.tasks", ["hellaswag"], "tasks: expected among needle_single"),
        ("metrics.performance", ["speed"], "metrics.performance.0"),
        ("configs", {}, "configs"),
    ],
)
def test_matrix_refused(key: str, value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        matrix.load(changed(tmp_path / "m.yaml", key, value))
    assert str(tmp_path / "m.yaml") in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00", "configs: 3"])
def test_no_matrix(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"m\.yaml: "):
        matrix.load(tmp_path / "m.yaml")


def test_nf4_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    (arm,) = matrix.load(MATRIX).arms("C2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "C2 needs bitsandbytes, which is not installed" in str(arms.why_not(arm))
    assert arms.why_not(matrix.load(MATRIX).arms("C4")[0]) is None


# ---- the bench


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "offline_bench.py"), *arguments],
        capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two repeats of C4 on the shipped model."""
    folder = tmp_path_factory.mktemp("offline")
    ended = run("--config_id", "C4", "--repeats", "2", "--prompt_lens", "16", "33", "--output_lens", "1", "5",
                "--out_dir", str(folder), "--device", "cpu")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return folder


def test_raw_records(out: Path) -> None:
    files = sorted((out / "raw").glob("C4-r*-*.jsonl"))
    assert len(files) == 2 and len({path.stem.rpartition("-")[2] for path in files}) == 1
    for repeat, path in enumerate(files):
        records = offline.read_records(path)
        assert [(r["result"]["prompt_len"], r["result"]["output_len"]) for r in records] == [
            (16, 1), (16, 5), (33, 1), (33, 5),
        ]  # fmt: skip
        for record in records:
            found = record["result"]
            assert set(record) == {"run_id", "env", "gpu_state_before", "gpu_state_after", "result"}
            assert record["run_id"].startswith(f"C4-r{repeat}-")
            assert (
                found["model"] == "tiny-base"
                and len(found["model_digest"]) == 16
                and found["quant_mode"] == "w4_shared_scale"
            )
            assert (found["scale_mbits"], found["quant_target"]) == (5, "mlp")
            assert found["quantized_layers"] == 18 and found["bits_per_weight"] == 4.078125
            assert len(found["token_ms"]) == found["output_len"] and found["token_ms"] == sorted(found["token_ms"])
            assert 0 < found["prefill_ms"] <= found["ttft_ms"] == found["token_ms"][0] <= found["total_gen_ms"]
            assert found["throughput_output_tok_s"] == pytest.approx(found["output_len"] / found["total_gen_ms"] * 1e3)
            if found["output_len"] == 1:
                assert found["tpot_ms"] is None
            else:
                spent = found["total_gen_ms"] - found["ttft_ms"]
                assert found["tpot_ms"] == pytest.approx(spent / (found["output_len"] - 1))
            assert found["peak_gpu_mem_mb"] is None and 6 < found["model_mem_mb"] < 6.5
            assert found["joules_per_token"] is None and found["energy"]["why"] == "the run is on the CPU"
            assert record["gpu_state_before"] == {"pynvml_error": "the run is on the CPU"}
            told = {"time", "platform", "cpu", "cores", "threads", "torch", "bitsandbytes", "gpu_name", "gpu_cc"}
            assert told <= set(record["env"])


def test_summaries_and_their_table(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (flat,) = (out / "summary").glob("C4_*_flat.csv")
    (agg,) = (out / "summary").glob("C4_*_agg.csv")
    rows = offline_table.read_flat(flat)
    assert len(rows) == 8 and {row["config_id"] for row in rows} == {"C4"}
    assert [row["repeat"] for row in rows] == [0] * 4 + [1] * 4
    table = tmp_path / "deep" / "paper_table.csv"
    assert aggregate.main(["--summary_dir", str(flat.parent), "--config_ids", "C4", "--out_csv", str(table)]) == 0
    with table.open() as file:
        made = list(csv.DictReader(file))
    assert len(made) == 4 and all(row["n_repeats"] == "2" for row in made)
    one = next(row for row in made if (row["prompt_len"], row["output_len"]) == ("33", "5"))
    values = [row["tpot_ms"] for row in rows if (row["prompt_len"], row["output_len"]) == (33, 5)]
    half = abs(values[0] - values[1]) / 2
    assert float(one["tpot_ms_mean"]) == pytest.approx(sum(values) / 2)
    assert float(one["tpot_ms_std"]) == pytest.approx(half * math.sqrt(2))
    assert float(one["tpot_ms_ci95"]) == pytest.approx(12.7062 * half, rel=1e-5)
    assert one["joules_per_token_mean"] == "" and one["peak_gpu_mem_mb_mean"] == ""
    # The same, as a table of a Markdown file.
    head, shown = tables_w4.offline_rows({"rows": offline_table.read_aggregated(table)})
    assert [row[:2] for row in shown] == [
        ("C4: E5M5 of 128, mlp", f"16 / 33 in, {output} out") for output in (1, 5)
    ]  # fmt: skip
    for row in shown:
        assert row[2].count(" / ") == 1 and row[4:] == ("6.36", "-", "-", "2") and len(row) == len(head)
    assert shown[0][3] == "-" and shown[1][3].count(" / ") == 1
    other = [row | {"model": "m", "quant_mode": "w4a16_bnb"} for row in offline_table.read_aggregated(table)]
    _, both = tables_w4.offline_rows({"rows": [*other, *offline_table.read_aggregated(table)]})
    assert [row[0] for row in both] == ["C4: NF4, mlp (m)"] * 2 + ["C4: E5M5 of 128, mlp (tiny-base)"] * 2
    with pytest.raises(ValueError, match=r"expected a table of aggregate_results\.py, got another file"):
        offline_table.read_aggregated(flat)
    # Aggregated rows are never taken for repeats.
    with pytest.raises(ValueError, match="expected one row for every repeat, got aggregated rows"):
        offline_table.read_flat(agg)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a_flat.csv").write_bytes(flat.read_bytes())
    (mixed / "b.csv").write_bytes(agg.read_bytes())
    capsys.readouterr()
    assert aggregate.main(["--summary_dir", str(mixed), "--out_csv", str(table)]) == 2
    assert "got aggregated rows" in capsys.readouterr().err
    (mixed / "b.csv").write_bytes(flat.read_bytes())
    assert aggregate.main(["--summary_dir", str(mixed), "--out_csv", str(table)]) == 2
    assert "expected every run once" in capsys.readouterr().err
    assert aggregate.main(["--summary_dir", str(flat.parent), "--config_ids", "C4", "C9", "--out_csv", str(table)]) == 2
    assert "--config_ids: expected among C4" in capsys.readouterr().err
    assert aggregate.main(["--summary_dir", str(tmp_path / "none")]) == 2
    offline_table.write(tmp_path / "left_out" / "C4_0_flat.csv", [], offline_table.FLAT)
    assert aggregate.main(["--summary_dir", str(tmp_path / "left_out"), "--out_csv", str(table)]) == 2
    assert "--summary_dir: expected runs in *_flat.csv files of the offline bench, got none" in capsys.readouterr().err


def test_prompts_are_the_same_for_every_configuration() -> None:
    class Model:
        class config:
            vocab_size = 100

    def subject(mode: str) -> Any:
        arm = matrix.Arm("x", "", mode)  # type: ignore[arg-type]
        return offline_repeat.Subject(Model, "m", arm, "auto", torch.device("cpu"), 42, "d", {})

    first, second = (offline_repeat._ids(subject(mode), 17) for mode in ("none", "w4_shared_scale"))
    assert torch.equal(first, second) and first.shape == (1, 17)


def test_with_the_packed_cache(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    arguments = ["--prompt_lens", "96", "--output_lens", "4", "--quant_mode", "w4_shared_scale", "--scale_mbits", "3",
                 "--device", "cpu", "--out_jsonl", str(path), "--run_id_prefix", "a", "--warmup_runs", "0"]  # fmt: skip
    assert offline_repeat.main([*arguments, "--kv_cache_dtype", "kv4"]) == 0
    (packed,) = offline.read_records(path)
    plain = 2 * 6 * 2 * 128 * 2 * 99  # bf16 of 99 tokens, 6 layers of 2 heads
    assert packed["result"]["kv_cache_dtype"] == "kv4" and packed["result"]["kv_bytes"] < 0.75 * plain
    assert offline_repeat.main([*arguments, "--kv_cache_dtype", "auto"]) == 2  # the file is there


def test_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    arguments = ["--prompt_lens", "16", "9000", "--output_lens", "2", "--device", "cpu", "--run_id_prefix", "a"]
    assert offline_repeat.main([*arguments, "--out_jsonl", str(path)]) == 2
    assert "expected prompt and output of at most 8192 tokens" in capsys.readouterr().err
    assert not path.exists()
    other = tmp_path / "s.jsonl"
    assert offline_repeat.main([*arguments, "--out_jsonl", str(other), "--leave_out", "--warmup_runs", "0"]) == 0
    one, two = offline.read_records(other)
    assert one["result"]["prompt_len"] == 16 and two["result"] is None
    assert two["left_out"] == "tiny-base has 8192 positions"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--config_id", "C2"], 0, "C2 is skipped: C2 needs bitsandbytes"),
        (["--config_id", "C1", "--repeats", "1", "--device", "cpu"], 2, "expected a GPU whose torch multiplies FP8"),
        (["--config_id", "C0", "--model", "/nowhere"], 2, "--model: expected a transformers model, got /nowhere"),
        (["--config_id", "C0", "--repeats", "0"], 2, "--repeats: expected 1 or more"),
        (["--config_id", "C0", "--workload", "online_serving"], 2, "needs a server"),
        (["--config_id", "X"], 2, "--config_id: expected among"),
        (["--config_id", "C0", "--config", "/nowhere.yaml"], 2, "/nowhere.yaml"),
    ],
)
def test_commands_that_do_not_measure(
    arguments: list[str], code: int, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if arguments[1] == "C2" and arms.why_not(matrix.load(MATRIX).arms("C2")[0]) is None:
        pytest.skip("bitsandbytes is installed")
    assert offline.main([*arguments, "--out_dir", str(tmp_path)]) == code
    assert said in capfd.readouterr().err
    assert not list(tmp_path.rglob("*.csv"))


def measured_by(monkeypatch: pytest.MonkeyPatch, ended: Any) -> list[str]:
    """Repeats are records that nothing was measured for; ``ended``: their exit codes, by name. -> the names."""
    asked: list[str] = []

    def repeat(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        path = Path(command[command.index("--out_jsonl") + 1])
        asked.append(path.stem.rpartition("-")[0])
        code = ended(asked[-1])
        if code == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            result = {"model": "m", "prompt_len": 1, "output_len": 1, "ttft_ms": 1.0, "flags": []}
            env = {"gpu_name": None, "cpu": "P", "git": "a"}
            path.write_text(json.dumps({"run_id": f"{path.stem}-p1-o1", "env": env, "result": result}) + "\n")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", repeat)
    return asked


def test_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offline.results, "versions", lambda: {"git": "a"})  # which runs git
    monkeypatch.setattr(offline.results, "machine", dict)
    arguments = ["--config_id", "C3", "C4", "--repeats", "2", "--device", "cpu", "--out_dir", str(tmp_path)]
    asked = measured_by(monkeypatch, lambda name: 130 if name == "C4-r1" else 0)
    assert offline.main(arguments) == 130
    assert asked == ["C3-r0", "C4-r0", "C3-r1", "C4-r1"]  # they take turns
    assert not list(tmp_path.rglob("*.csv")) and len(list(tmp_path.rglob("*.jsonl"))) == 3
    # Other settings are another run's.
    asked = measured_by(monkeypatch, lambda name: 130)
    assert offline.main([*arguments, "--output_lens", "7"]) == 130 and asked == ["C3-r0"]
    asked = measured_by(monkeypatch, lambda name: 0)
    assert offline.main(arguments) == 0
    assert asked == ["C4-r1"] and len(list(tmp_path.rglob("*_flat.csv"))) == 2
    for path in tmp_path.rglob("*_flat.csv"):
        assert [row["repeat"] for row in offline_table.read_flat(path)] == [0, 1]
    # What is finished is measured again, beside it.
    asked = measured_by(monkeypatch, lambda name: 0)
    assert offline.main(arguments) == 0
    assert len(asked) == 4 and len(list(tmp_path.rglob("*_flat.csv"))) == 4
    rows = aggregate.collect(tmp_path / "summary")
    assert [row["n_repeats"] for row in offline_table.aggregate(rows)] == [4, 4]


def test_a_configuration_that_cannot_run_keeps_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offline.results, "versions", dict)
    monkeypatch.setattr(offline.results, "machine", dict)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = measured_by(monkeypatch, lambda name: 3 if name == "C3-r0" else 0)
    arguments = ["--config_id", "C1", "C2", "C3", "C4", "C4", "--repeats", "2", "--device", "cpu"]
    assert offline.main([*arguments, "--out_dir", str(tmp_path)]) == 3
    assert asked == ["C3-r0", "C4-r0", "C4-r1"]
    said = capsys.readouterr().err
    assert "C1 is refused: fp8: expected a GPU whose torch multiplies FP8 by rows" in said
    assert "C2 is skipped: C2 needs bitsandbytes" in said and "C3: a repeat ended with exit code 3" in said
    assert [path.name[:3] for path in tmp_path.rglob("*_flat.csv")] == ["C4_"]
    assert offline.main(["--config_id", "C1", "C4", "--repeats", "1", "--device", "cpu",
                         "--out_dir", str(tmp_path)]) == 2  # fmt: skip


def test_a_repeat_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def records(*arguments: Any) -> Any:
        yield {"run_id": "a"}
        raise KeyboardInterrupt

    monkeypatch.setattr(offline_repeat, "_records", records)
    arguments = ["--prompt_lens", "1", "--output_lens", "1", "--device", "cpu", "--run_id_prefix", "a"]
    assert offline_repeat.main([*arguments, "--out_jsonl", str(tmp_path / "r.jsonl")]) == 130
    assert not list(tmp_path.iterdir())


# ---- rows


def rows_of(*tpots: float | None, **changes: Any) -> list[dict[str, Any]]:
    case = dict.fromkeys(offline_table.FLAT) | {
        "config_id": "C4", "model": "m", "prompt_len": 128, "output_len": 64, "device": "cuda", "flags": ""
    }  # fmt: skip
    return [case | {"repeat": i, "subrun_id": f"r{i}", "tpot_ms": t} | changes for i, t in enumerate(tpots)]


def test_aggregate() -> None:
    (one,) = offline_table.aggregate(rows_of(1.0, 2.0, 3.0))
    assert (one["n_repeats"], one["tpot_ms_mean"], one["tpot_ms_std"]) == (3, 2.0, 1.0)
    assert one["tpot_ms_ci95"] == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    (single,) = offline_table.aggregate(rows_of(5.0))
    assert (single["tpot_ms_mean"], single["tpot_ms_std"], single["tpot_ms_ci95"]) == (5.0, None, None)
    (partly,) = offline_table.aggregate(rows_of(1.0, None))
    assert partly["tpot_ms_mean"] is None and partly["n_repeats"] == 2  # never a mean of fewer than it says
    # Models, configurations and lengths are kept apart.
    apart = [*rows_of(1.0), *rows_of(2.0, model="n"), *rows_of(3.0, config_id="C3"), *rows_of(4.0, output_len=256)]
    assert len(offline_table.aggregate(apart)) == 4
    assert offline_table.aggregate([]) == []
    for name, value in (("device", "cpu"), ("processor", "Q"), ("git", "b")):
        with pytest.raises(ValueError, match=f"{name}: expected .* in all repeats of C4 .*, got {value}"):
            offline_table.aggregate([*rows_of(1.0), *rows_of(2.0, subrun_id="x", **{name: value})])


def test_models_of_one_name_are_not_one() -> None:
    rows = [*rows_of(1.0, model_digest="a"), *rows_of(2.0, model_digest="b", subrun_id="x")]
    with pytest.raises(ValueError, match="aggregate: model_digest: expected a in all repeats of C4"):
        offline_table.aggregate(rows)
    for name in (None, ""):
        with pytest.raises(ValueError, match="aggregate: model: expected a name in every row, got none in r0"):
            offline_table.aggregate([*rows_of(1.0, model=name), *rows_of(2.0)])


def test_a_models_name_and_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXPERIMENTS / "models" / "tiny-base")
    cpu = torch.device("cpu")
    model, name = arms.load(".", "bf16", cpu)
    assert name == "tiny-base"
    digest = arms.digest(model)
    assert digest == arms.digest(arms.load(None, "bf16", cpu)[0])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 3] += 1
    assert arms.digest(model) != digest


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, answered: Any) -> offline_repeat.Subject:
    """A subject whose answers are these, on a GPU that is not asked for anything."""
    config = type("Config", (), {"vocab_size": 100, "max_position_embeddings": 4096})
    weights = {"weight_bytes": 1, "bits_per_weight": 16.0, "quantized_layers": 0}
    subject = offline_repeat.Subject(
        type("Model", (), {"config": config}), "m", matrix.Arm("C0", "", "none"), "auto", torch.device("cuda"), 0, "d",
        weights,
    )  # fmt: skip
    monkeypatch.setattr(offline_repeat, "_ids", lambda subject, length: torch.zeros(1, length, dtype=torch.long))
    monkeypatch.setattr(offline_repeat, "answer", answered)
    monkeypatch.setattr(offline_repeat, "environment", lambda device: {})
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    return subject


def test_the_timed_answer_is_not_the_first_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with any cache: the first loads and chooses kernels, and takes memory."""
    asked: list[tuple[int, int]] = []

    def answered(subject: Any, ids: Any, output: int) -> offline_repeat.Timed:
        asked.append((ids.shape[1], output))
        return offline_repeat.Timed(1.0, [1.0 + i for i in range(output)], 0)

    found, state = offline_repeat.measure(on_a_gpu(monkeypatch, answered), 512, 64, power.Gpu(None), None)
    assert asked == [(512, 4), (512, 64)] and found["output_len"] == 64
    assert state == {"pynvml_error": "the run is on the CPU"}


def test_throttling_during_answers_is_flagged(bus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow clocks are those of a GPU at work: of an idle one they say nothing."""
    nvml = Nvml(counter=True)

    def answered(subject: Any, ids: Any, output: int) -> offline_repeat.Timed:
        nvml.reasons, nvml.celsius = 0x40, 80
        return offline_repeat.Timed(1.0, [1.0 + i for i in range(output)], 0)

    def tidied(device: Any) -> None:
        nvml.reasons, nvml.celsius = 1, 40

    subject = on_a_gpu(monkeypatch, answered)
    gpu = power.Gpu(0, nvml)
    monkeypatch.setattr(power, "Gpu", lambda ordinal: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(power, "idle_watts", lambda gpu: None)
    monkeypatch.setattr(offline_repeat, "_ENERGY_SECONDS", 1e-4)
    monkeypatch.setattr(offline_repeat, "_tidy", tidied)
    (record,) = offline_repeat.sweep(subject, [16], [2], 0, "a")
    assert record["result"]["flags"] == ["80 C (above 75)", "throttled: hardware thermal slowdown"]
    assert record["gpu_state_before"]["throttle_reasons"] == 1 and record["gpu_state_after"]["temperature_c"] == 80


def test_the_worst_state() -> None:
    one = {"sm_clock_mhz": 1980, "mem_clock_mhz": 3201, "temperature_c": 40, "power_w": None, "throttle_reasons": 1,
           "throttle_names": ["idle"]}  # fmt: skip
    two = one | {"sm_clock_mhz": 900, "temperature_c": 70, "power_w": 600.0, "throttle_reasons": 4}
    assert power.worst(one, two) == {
        "sm_clock_mhz": 900, "mem_clock_mhz": 3201, "temperature_c": 70, "power_w": 600.0, "throttle_reasons": 5,
        "throttle_names": ["idle", "software power cap"],
    }  # fmt: skip


def test_students_quantiles() -> None:
    for freedom, value in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1000, 1.96234)):
        assert offline_table.student_t(freedom) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "expected a summary of the offline bench"),
        ("", "expected a summary of the offline bench"),
        (",".join(offline_table.FLAT) + "\n1,2\n", "cells in every row"),
        (",".join(offline_table.FLAT) + "\n" + ",".join(["x"] * len(offline_table.FLAT)) + "\n", "expected a number"),
    ],
)
def test_foreign_summaries(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a_flat.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        offline_table.read_flat(path)


# ---- power


class Nvml:
    """What kvcomp.bench.power asks of NVML."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 0, 1, 2

    def __init__(self, *, counter: bool, watts: float = 300.0, reasons: int = 1, celsius: int = 40) -> None:
        self.counter, self.drawn, self.reasons, self.celsius = counter, watts, reasons, celsius
        self.start = time.perf_counter()

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByPciBusId(self, address: bytes) -> int:
        return 7

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if not self.counter:
            raise RuntimeError("not supported")
        return round(1e3 * self.drawn * (time.perf_counter() - self.start))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return round(1e3 * self.drawn)

    def nvmlDeviceGetClockInfo(self, handle: int, which: int) -> int:
        return (1980, 3201)[which]

    def nvmlDeviceGetTemperature(self, handle: int, which: int) -> int:
        return self.celsius

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.reasons


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_bus_id", lambda ordinal: b"0")


@pytest.mark.parametrize("counter", [True, False])
def test_energy(counter: bool, bus: None) -> None:
    gpu = power.Gpu(0, Nvml(counter=counter))
    found = power.measure(gpu, lambda: time.sleep(0.3), idle=100.0, least=0.2)
    assert found.source == ("counter" if counter else "samples") and found.why is None
    assert found.joules == pytest.approx(300 * found.seconds, rel=0.1)
    assert found.joules is not None and found.net == pytest.approx(found.joules - 100 * found.seconds)
    brief = power.measure(gpu, lambda: None, idle=100.0, least=0.2)
    assert brief.joules is None and "too few to tell" in str(brief.why)
    assert power.idle_watts(gpu, 0.15) == pytest.approx(300, rel=0.1)


def test_trapezoids() -> None:
    assert power.trapezoids([(0.0, 100.0), (1.0, 200.0), (3.0, 200.0)]) == 150 + 400
    assert power.trapezoids([(0.0, 100.0)]) is None


def test_states_and_flags(bus: None) -> None:
    gpu = power.Gpu(0, Nvml(counter=True))
    assert gpu.state() == {
        "sm_clock_mhz": 1980, "mem_clock_mhz": 3201, "temperature_c": 40, "power_w": 300.0, "throttle_reasons": 1,
        "throttle_names": ["idle"],
    }  # fmt: skip
    assert power.flags(gpu.state()) == []
    hot = power.Gpu(0, Nvml(counter=True, celsius=80, reasons=0x4 | 0x40)).state()
    assert power.flags(gpu.state(), hot) == [
        "80 C (above 75)", "throttled: software power cap, hardware thermal slowdown",
    ]  # fmt: skip


def test_without_nvml(bus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert power.Gpu(None).why == "the run is on the CPU"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu = power.Gpu(0)
    assert gpu.why is not None and gpu.why.startswith("pynvml is not installed")
    assert gpu.state() == {"pynvml_error": gpu.why} and power.idle_watts(gpu) is None
    assert power.measure(gpu, lambda: None, idle=None).why == gpu.why

    class Broken(Nvml):
        def nvmlInit(self) -> None:
            raise RuntimeError("Driver Not Loaded")

    assert power.Gpu(0, Broken(counter=True)).why == "NVML: Driver Not Loaded"


def test_energy_of_answers(bus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer draws 300 W for 10 ms of reading and 2 ms a token, 100 W of it idle."""
    monkeypatch.setattr(power, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(offline_repeat, "_ENERGY_SECONDS", 0.3)
    monkeypatch.setattr(offline_repeat, "answer", lambda subject, ids, tokens: time.sleep(0.01 + 0.002 * (tokens - 1)))
    measure = power.measure
    monkeypatch.setattr(power, "measure", lambda gpu, work, *, idle: measure(gpu, work, idle=idle, least=0.0))
    gpu = power.Gpu(0, Nvml(counter=True))
    states: list[dict[str, Any]] = []
    found = offline_repeat.energy(None, None, 11, gpu, 100.0, states)  # type: ignore[arg-type]
    assert len(states) >= 4 and states[0] == gpu.state()
    assert found["joules_per_token"] == pytest.approx(200 * 0.03 / 11, rel=0.25)
    assert found["energy"]["prefill_joules"] == pytest.approx(200 * 0.01, rel=0.25)
    assert found["energy"]["decode_joules_per_token"] == pytest.approx(200 * 0.002, rel=0.35)
    assert found["energy"]["source"] == "counter" and found["energy"]["idle_w"] == 100.0
    assert json.dumps(found)
