"""The fuzz targets (fuzz/), without a fuzzer: the kept corpus, every kept finding; and the fuzzer on a planted bug."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))

import corpus  # noqa: E402

HANG = 5.0  # seconds


def replayed(module: Any, data: bytes) -> None:
    before = time.monotonic()
    module.target(data)
    assert time.monotonic() - before < HANG


@pytest.mark.parametrize("target", corpus.TARGETS)
def test_corpus(target: str) -> None:
    module = importlib.import_module(target)
    inputs = corpus.read(FUZZ / "corpus", target)
    assert inputs
    for data in (b"", *getattr(module, "seeds", list)(), *inputs):
        try:
            replayed(module, data)
        except BaseException as error:
            raise AssertionError(f"{target}: {data!r}") from error


FINDINGS = [(target, path) for target in corpus.TARGETS for path in corpus.findings(FUZZ / "findings", target)]


@pytest.mark.parametrize("target, path", FINDINGS, ids=[f"{target}-{path.name}" for target, path in FINDINGS])
def test_findings(target: str, path: Path) -> None:
    replayed(importlib.import_module(target), path.read_bytes())


def test_a_target_that_is_none(tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ / "run.py"), "--target", "nosuch", "--report", str(tmp_path / "report.json")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.returncode == 2 and "--target: expected pages, saves, configs, arguments, or" in said.stderr
    assert not list(tmp_path.iterdir())


def test_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in FUZZ.rglob("*") if path.suffix != ".py" and path.is_file()) < 400_000


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="libFuzzer wants sanitizers of its own")
@pytest.mark.parametrize("what", ["a wrong exception", "a hang", "a crash", "nothing"])
def test_planted_bugs(what: str, tmp_path: Path) -> None:
    body = {
        "a wrong exception": "raise KeyError(data)",
        "a hang": "while True: pass",
        "a crash": "import ctypes; ctypes.string_at(8)",
        "nothing": "return",
    }[what]
    (tmp_path / "planted.py").write_text(
        f"def target(data):\n    if data[:2] == b'BU':\n        {body}\n\n\ndef words():\n    return [b'BU']\n"
    )
    command = [sys.executable, str(FUZZ / "run.py"), "--target", str(tmp_path / "planted.py"), "--cases", "50000"]
    command += ["--findings", str(tmp_path / "findings"), "--corpus", str(tmp_path / "corpus")]
    found = subprocess.run(
        [*command, "--report", str(tmp_path / "report.json")], capture_output=True, text=True, timeout=120
    )
    report = json.loads((tmp_path / "report.json").read_text())
    kept = corpus.findings(tmp_path / "findings", "planted")
    assert report["schema"] == "kvcomp.fuzz/1"
    assert len(report["targets"]["planted"]["findings"]) == len(kept)
    if what == "nothing":
        assert (found.returncode, kept, report["cases"]) == (0, [], 50000)
    else:
        assert found.returncode == 1, found.stdout + found.stderr
        assert [path.read_bytes()[:2] for path in kept] == [b"BU"]
        assert kept[0].with_name(f"{kept[0].name}.txt").stat().st_size
