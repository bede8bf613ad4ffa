"""kvcomp bench attend --device cuda: its data, what it makes of times; the whole of it on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvcomp import _C, results

torch = pytest.importorskip("torch", reason="needs torch")
from kvcomp.bench import attend_cuda, timing_cuda  # noqa: E402
from kvcomp.bench.lists_cuda import Layers, mixed, uniform  # noqa: E402
from kvcomp.cli import main  # noqa: E402
from kvcomp.store import BFLOAT16, PAGE, Layout  # noqa: E402


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
        assert (entries["unit"][order][1:] == ends[order][:-1]).all() and ends.max() * 128 == len(layers.arena)
        assert not (np.diff(entries["unit"].astype(np.int64)) > 0).all(), "shuffled"
        for layer in (0, count - 1):
            for keys, values in layers.rows(layer, [0, n - 1]):
                assert len(keys) == len(values) and 0.7 < float(keys.std()) < 1.2 and 0.7 < float(values.std()) < 1.2


def test_copies() -> None:
    assert timing_cuda.copies(200, l2=60) == 1
    assert timing_cuda.copies(180, l2=60) == 2
    assert timing_cuda.copies(10, l2=60) == 19


def test_cells_beside_each_other() -> None:
    def cell(impl: str, us: float, gb_per_s: float, **case: Any) -> dict[str, Any]:
        shape = {"b": 1, "s": 4096, "q_heads": 32, "kv_heads": 8, "d": 128, "q": 1, "k_bits": 4} | case
        return {"impl": impl, "case": shape, "median_us": us, "gb_per_s": gb_per_s}

    cells = [
        cell("torch sum int64", 1, 4000.0) | {"role": "ceiling"},
        cell("copy on the device", 1, 4200.0) | {"role": "ceiling"},
        cell("torch sdpa cudnn, enable_gqa", 12.0, 1000.0),
        cell("torch sdpa flash, enable_gqa", 15.0, 900.0),
        cell("kvcomp", 4.0, 3000.0),
        cell("kvcomp", 4.0, 3000.0, k_bits="mixed"),
        cell("kvcomp", 4.0, 3000.0, d=64),
    ]
    attend_cuda.relate(cells)
    assert cells[4]["fraction_of_peak"] == 0.75 and cells[4]["times_torch"] == 3.0
    assert "times_torch" not in cells[5] and "times_torch" not in cells[6]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="--sections: expected among table, mixed, shapes, rivals, got speed"):
        attend_cuda.bench(command="", sections=("speed",))
    with pytest.raises(ValueError, match="--samples: expected at least 5, got 4"):
        attend_cuda.bench(command="", samples=4)


def test_the_command_hands_on_sections_and_saves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    out = tmp_path / "attend.json"

    def bench(
        *, command: str, sections: Any = (), bits: Any = (), samples: int = 9, seed: int = 0, save: Any, tell: Any
    ) -> Any:
        given.update(sections=sections, bits=bits, samples=samples, seed=seed)
        found = results.new("attend", command=command)
        save(found)
        assert json.loads(out.read_text())["cells"] == []
        return found | {"more": 1}

    why = _C.cuda_info()
    monkeypatch.setattr(_C, "cuda_info", lambda: why | {"available": True})
    monkeypatch.setattr(attend_cuda, "bench", bench)
    flags = ["--sections", "table", "rivals", "--bits", "4", "--samples", "7", "--seed", "3", "--output", str(out)]
    assert main(["bench", "attend", "--device", "cuda", *flags]) == 0
    assert given == {"sections": ["table", "rivals"], "bits": [4], "samples": 7, "seed": 3}
    assert json.loads(out.read_text())["more"] == 1
    assert main(["bench", "attend", "--device", "cuda", "--tokens", "5"]) == 2
    assert "--tokens: expected none for attend on cuda, got 5" in capsys.readouterr().err


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
    assert len(saved) == 2 and saved[0] < saved[1] == len(found["cells"])
    json.dumps(found, allow_nan=False)
    ours = [cell for cell in found["cells"] if cell["impl"] == "kvcomp"]
    assert len(ours) == 2 and all(cell["times_torch"] > 1 and len(cell["samples_us"]) == 5 for cell in ours)
    assert all(0 < cell["fraction_of_peak"] < 1.3 for cell in found["cells"])
    assert found["call_cost"]["host_us"] < 50
