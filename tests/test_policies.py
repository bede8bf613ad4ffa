"""kvcomp policies: one read for many methods, units in several processes, cut short and taken up again, and what the
results say."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from experiment_support import save_model  # noqa: E402
from kvcomp import H2O, AdaKV, KeyNorm, Policy, PyramidKV, Rotation, SnapKV, Streaming, results  # noqa: E402
from kvcomp.cli import main  # noqa: E402
from kvcomp.eval import quality, tasks  # noqa: E402
from kvcomp.experiment import methods, policies, policies_report, policies_results, policies_units  # noqa: E402
from kvcomp.experiment import workload as work  # noqa: E402
from kvcomp.experiment.methods import BASELINE, Entry  # noqa: E402
from kvcomp.experiment.policies_workers import Job, hand_out  # noqa: E402

ROTATIONS = {name: Rotation.random(2, 1, 64, seed) for seed, name in enumerate(("random", "calibrated"))}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> work.Subject:
    folder = save_model(tmp_path_factory.mktemp("model"))
    text = folder / "text.txt"
    text.write_text("".join(f"line {number}: {number * 37 % 101} apples\n" for number in range(400)))
    return work.load(folder, text)


# ---- methods


def test_methods_have_names_of_their_own_and_keys_without_matrices() -> None:
    listed = methods.listed(methods.RATIOS, 7, ROTATIONS)
    assert len({entry.name for entry in listed}) == len(listed) == len({(e.group, e.name) for e in listed})
    assert {entry.group for entry in listed} == set(methods.GROUPS) - {"bf16"}
    assert all(entry.policy is not None and entry.policy.seed == 7 for entry in listed)
    other = methods.listed(methods.RATIOS, 7, {name: Rotation.random(2, 1, 64, 9) for name in ROTATIONS})
    assert [entry.key for entry in other] == [entry.key for entry in listed]
    assert not any("/" in entry.name for entry in listed)
    assert pickle.loads(pickle.dumps(listed)) == listed


def test_methods_are_chosen_by_patterns() -> None:
    listed = methods.listed([2.0, 4.0], 0, ROTATIONS)
    names = [entry.name for entry in methods.chosen(listed, ["joint plan *", "quantize ? bits"])]
    assert names == ["joint plan 2x", "joint plan 4x", *(f"quantize {bits} bits" for bits in (2, 3, 4, 8))]
    assert methods.chosen(listed, ["*"]) == listed
    with pytest.raises(ValueError, match=r"--methods: expected patterns .* got 'plan'"):
        methods.chosen(listed, ["joint*", "plan"])


# ---- one read for many methods

SAME = {
    "plan": Policy(target_ratio=5),
    "h2o": Policy(target_ratio=3, select=H2O()),
    "h2o evicts": Policy(target_ratio=3, select=H2O(), allocate="uniform", classes=((16, 16),)),
    "ada": Policy(target_ratio=5, select=AdaKV(keep=0.5), sinks=2),
    "pyramid": Policy(target_ratio=4, select=PyramidKV(), allocate="uniform", classes=((16, 16),)),
    "streaming": Policy(target_ratio=4, select=Streaming(), sinks=4),
    "key norm": Policy(target_ratio=4, select=KeyNorm()),
    "values": Policy(target_ratio=4, select=SnapKV(pool=15, values="centered")),
    "heads": Policy(target_ratio=4, granularity="head"),
    "random": Policy(target_ratio=4, allocate="random", seed=3),
    "layerwise": Policy(target_ratio=4, prefill="layerwise"),
    "bits": Policy(bits=3, rotation=ROTATIONS["random"]),
}


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_a_cache_made_of_the_plain_models_read_answers_as_one_that_was_prefilled(
    subject: work.Subject, mode: str
) -> None:
    task = tasks.generate("needle_multi_key", length=600, seed=3, mode=mode, questions=1 if mode == "aware" else 2)
    model, tokenizer = subject.model, subject.tokenizer
    with BASELINE.cache(model) as cache, torch.inference_mode():
        prompt = policies_units.Prompt(model, quality.read(model, cache, quality.prompt_of(tokenizer, task)[None]))
    for name, policy in SAME.items():
        entry = Entry(name, 1.0, policy, "joint", name)
        with entry.cache(model) as cache:
            fresh = quality.answer(model, tokenizer, cache, task)
        with entry.cache(model, prompt.layers_for(policy)) as cache:
            nbytes = cache.nbytes
            texts = quality.ask(model, tokenizer, cache, task, prompt.read.logits)
        assert (texts, nbytes) == (fresh.texts, fresh.nbytes), name


def test_text_is_measured_as_kvcomp_quality_measures_it(subject: work.Subject) -> None:
    workload = work.Workload(length=700, windows=1, scored=60, single=10)
    entries = [Entry(name, 1.0, SAME[name], "joint", name) for name in ("plan", "h2o", "bits")]
    window = work.windows(subject, workload)[0]
    found = policies_units.measure_text(subject, workload, entries, window)
    known = work._text(subject, workload, [BASELINE, *entries], window)
    for name in ("bf16", "plan", "h2o", "bits"):
        assert found[name]["nbytes"] == known[name]["nbytes"]
        assert np.isclose(found[name]["loss"], np.mean(known[name]["losses"]), rtol=1e-4)
        assert np.isclose(found[name]["kl"], np.mean(known[name]["kl"]), rtol=1e-3, atol=1e-7)
    for name in ("plan", "h2o", "bits"):
        for error in ("key_mse", "attention_output_error", "attention_output_error_of_dropping"):
            assert np.isclose(found[name][error], known[name]["errors"][error], rtol=1e-3, atol=1e-9)


def test_a_budget_that_cannot_be_met_says_what_can(subject: work.Subject) -> None:
    task = tasks.generate("needle_single", length=700, seed=1)
    tight = Entry("tight", 20.0, Policy(target_ratio=20, drop=False), "quantize", "tight")
    found = policies_units.measure_task(subject, [tight], task)
    least = found["tight"]["least_ratio"]
    assert set(found["tight"]) == {"least_ratio"} and 2 < least < 8
    fits = replace(tight, target_ratio=least, policy=Policy(target_ratio=least, drop=False))
    assert "scores" in policies_units.measure_task(subject, [fits], task)["tight"]


def test_rotations_are_fitted_to_text_between_the_windows(subject: work.Subject) -> None:
    made = policies.rotations(subject, work.Workload(length=700, windows=3))
    assert set(made) == {"random", "calibrated"} and all(one.fits(2, 1, 64) for one in made.values())
    with pytest.raises(ValueError, match="--text: expected room for 64 bytes between windows"):
        policies.rotations(subject, work.Workload(length=len(subject.text) // 3, windows=3))


# ---- results


def known_units() -> tuple[list[Entry], dict[str, Any]]:
    """Two contexts of four questions and a window of text, with scores that are easy to add up."""
    entries = [
        BASELINE,
        Entry("evict A 4x", 4.0, Policy(target_ratio=4), "evict", "A"),
        Entry("evict B 4x", 4.0, Policy(target_ratio=4), "evict", "B"),
        Entry("quantize 4 bits", 1.0, Policy(bits=4), "quantize", "4 bits"),
        Entry("quantize C 4x", 4.0, Policy(target_ratio=4), "quantize", "C"),
        Entry("joint plan 4x", 4.0, Policy(target_ratio=4), "joint", "plan"),
        Entry("coding default, 2 bits", 1.0, Policy(bits=2), "coding", "default, 2 bits"),
        Entry("coding default, 3 bits", 1.0, Policy(bits=3), "coding", "default, 3 bits"),
    ]
    right = {"bf16": 4, "evict A 4x": 2, "evict B 4x": 3, "quantize 4 bits": 4, "joint plan 4x": 4}

    def part(entry: Entry, **values: Any) -> dict[str, Any]:
        nbytes = int(800_000 / 3.8) if entry.name == "quantize 4 bits" else 800_000 / entry.target_ratio
        return {"nbytes": nbytes, "bf16_bytes": 800_000, "kept_fraction": 1.0, **values}

    done: dict[str, Any] = {"text/0": {}}
    errors = dict.fromkeys(policies_units._TEXT_ERRORS, 0.5)
    for entry in entries:
        said = {"tokens": 10, "loss": 0.0, "kl": 0.25, "top1": 0.5}
        done["text/0"][entry.name] = part(entry, **said, **({} if entry is BASELINE else errors))
    for mode in ("aware", "agnostic"):
        done[f"task/needle_single/{mode}/1"] = {
            entry.name: part(entry, scores=[1.0] * right[entry.name] + [0.0] * (4 - right[entry.name]))
            for entry in entries
            if entry.name in right
        }
        done[f"task/needle_single/{mode}/1"]["quantize C 4x"] = {"least_ratio": 3.9}
    return entries, done


@pytest.fixture
def known(subject: work.Subject) -> dict[str, Any]:
    entries, done = known_units()
    workload = work.Workload(families=("needle_single",))
    return policies_results.fill(results.new("quality", command="test"), subject, workload, entries, done)


def test_cells_summary_and_what_cannot_be_met(known: dict[str, Any]) -> None:
    assert results.failures(known) == []
    case = known["cells"][1]["case"]
    assert set(case) == {"model", "task", "mode", "method", "target_ratio", "seed", "group", "s"}
    assert known["infeasible"] == [
        {"group": "quantize", "method": "C", "target_ratio": 4.0, "least_ratio": 3.9, "contexts": 2, "of": 3}
    ]
    assert not any(cell["case"]["method"] == "C" for cell in known["cells"])
    summary = {(entry["group"], entry["method"]): entry for entry in known["summary"]}
    evicted = summary["evict", "B"]
    assert evicted["accuracy"]["all"]["accuracy"] == 0.75 and evicted["accuracy"]["all"]["n"] == 8
    assert evicted["accuracy_drop"]["aware"]["mean"] == 0.25 and evicted["accuracy_drop"]["all"]["contexts"] == 2
    assert evicted["perplexity"] == 1.0 and evicted["bits_per_element"] == 4.0 and evicted["ratio"] == 4.0
    assert summary["coding", "default, 2 bits"]["accuracy"]["all"] is None


def test_goals_and_gain(known: dict[str, Any]) -> None:
    (best,) = known["best_single"]
    assert best["eviction"]["method"] == "B"
    assert best["quantization"] is None  # 3.8x is not 4x, and what would be 4x does not exist
    assert best["gain"]["mean"] == 0.25
    met = {goal["goal"]: goal["met"] for goal in known["goals"]}
    assert list(met.values()) == [True, None, True, None, None, True]
    assert known["goals"][0]["measured"] == 0 and known["goals"][0]["limit"] == 0.005
    assert known["goals"][-1]["measured"] == 0.25


def test_tables_of_policies(known: dict[str, Any]) -> None:
    header, rows = policies_report.method_rows(known)
    assert header == ("spends", "method", "4x")
    assert ("tokens alone", "B", "75.0 / 75.0") in rows and ("bits alone", "C", "at most 3.90x") in rows
    assert ("bits alone", "4 bits (3.80x)", "100.0 / 100.0") in rows and rows[0] == ("bf16", "", "100.0 / 100.0")
    header, rows = policies_report.gain_rows(known)
    assert [row[1] for row in rows] == ["joint plan", "best eviction: B", "best quantization: none fits"]
    assert all(len(row) == len(header) for row in rows)
    header, rows = policies_report.coding_rows(known)
    assert header[:2] == ("coding, 2 / 3 bits", "bits per element")
    assert rows == [("default", "16.00 / 16.00", *["0.5000 / 0.5000"] * 2, "0.500 / 0.500", "1.000 / 1.000",
                     "0.2500 / 0.2500", "50.0 / 50.0", "- / -")]  # fmt: skip
    first, searched, *_ = policies_report.goal_lines(known)
    assert first == "4 bits, every token kept: met: 0.00 % (0.00 to 0.00), at most 0.5 % lost"
    assert "not measured: -" in searched


# ---- the command


def command(subject: work.Subject, *arguments: object) -> list[str]:
    return [
        "policies", "--model", str(subject.path), "--text", str(subject.path / "text.txt"), "--length", "700",
        "--families", "needle_multi_key", "--aware", "1", "--agnostic", "1", "--questions", "2", "--windows", "2",
        "--scored", "40", *map(str, arguments),
    ]  # fmt: skip


def test_cut_short_and_taken_up_again_by_several_processes(
    subject: work.Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "policies.json", tmp_path / "policies.json.partial"
    patterns = ["joint plan*", "evict plan*", "*default, 3*", "quantize bits per * 4x"]
    arguments = command(subject, "--ratios", 4, "--methods", *patterns, "--output", out)
    assert main([*arguments, "--limit-seconds", "0.01"]) == 130
    assert "interrupted before the first unit was done" in capsys.readouterr().err
    assert not out.exists() and not partial.exists()

    def three(job: Job, names: list[str], *_: Any) -> Iterator[tuple[str, Any]]:
        for name in names[:3]:
            yield name, policies_units.units(subject, job.workload, job.entries)[name]()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(policies, "hand_out", three)
        assert main(arguments) == 130
    assert "3 units are kept in" in capsys.readouterr().err
    kept = json.loads(partial.read_text())["units"]
    assert main([*arguments, "--jobs", "2"]) == 0
    assert "3 of 4 units were measured before" in capsys.readouterr().err
    assert not partial.exists()
    found = results.read(out, kind="quality")
    assert found["command"].startswith("kvcomp policies") and found["workload"]["seed"] == 2000
    assert {cell["case"]["group"] for cell in found["cells"]} == {"bf16", "evict", "joint", "quantize", "coding"}
    assert [best["target_ratio"] for best in found["best_single"]] == [4.0] and len(found["goals"]) == 6
    losses = {
        (cell["case"]["group"], cell["case"]["method"]): cell["window_losses"]
        for cell in found["cells"]
        if cell["case"]["task"] == "held_out"
    }
    assert losses["joint", "plan"][0] == kept["text/0"]["joint plan 4x"]["loss"]
    scores = next(c["scores"] for c in found["cells"] if c["case"]["mode"] == "agnostic")
    assert len(scores) == 2  # of the unit that was left to a worker


def test_a_worker_that_fails_says_why(subject: work.Subject, tmp_path: Path) -> None:
    text = subject.path / "text.txt"
    entry = Entry("wide", 1.0, Policy(bits=4, group=48), "coding", "wide")  # no divisor of 64 channels
    job = Job(subject.path, text, work.Workload(length=700, families=(), windows=1, scored=40), (entry,))
    with pytest.raises(ValueError, match="group"):
        list(hand_out(job, ["text/0"], 1, None))


def test_bad_input_of_policies(subject: work.Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (("--jobs", 0), "--jobs: expected 1 or more, got 0"),
        (("--limit-seconds", 0), "--limit-seconds: expected more than 0"),
        (("--methods", "nothing"), "--methods: expected patterns"),
        (("--ratios", "0.5"), "target_ratio: expected 1 or more"),
        (("--output", tmp_path), "--output: expected the name of a file"),
    ):
        assert main(command(subject, *arguments)) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
