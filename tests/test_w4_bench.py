"""kvcomp bench w4, on the CPU with small matrices: what it checks, writes and relates."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from kvcomp import _C, results  # noqa: E402
from kvcomp.bench import w4, w4_rivals  # noqa: E402
from kvcomp.cli import main  # noqa: E402
from kvcomp.experiment import tables_w4  # noqa: E402


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = w4.weight_errors
    monkeypatch.setattr(w4, "_CPU", {(128, 256): (1, 3)})
    monkeypatch.setattr(w4, "weight_errors", lambda seed: errors(seed, (256, 1024)))
    monkeypatch.setattr(w4, "_copies", lambda nbytes, device: 2)


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(monkeypatch)
    before = torch.get_num_threads(), _C.threads()
    out = tmp_path / "w4.json"
    try:
        assert main(["bench", "w4", "--device", "cpu", "--samples", "5", "--output", str(out)]) == 0
    finally:
        torch.set_num_threads(before[0])
        _C.set_threads(before[1])
    found = results.read(out, kind="w4")
    timed = [cell for cell in found["cells"] if "median_us" in cell]
    assert [(cell["impl"], cell["case"]["m"]) for cell in timed if cell["impl"] == "kvcomp"] == [
        ("kvcomp", 1), ("kvcomp", 3),
    ]  # fmt: skip
    for cell in timed:
        assert 0 <= cell["error"]["value"] <= cell["error"]["bound"] and len(cell["samples_us"]) == 5
        assert cell["case"].keys() == {"n", "k", "m", "group", "scale_mbits", "dtype", "device"}
    ours = next(cell for cell in timed if cell["impl"] == "kvcomp")
    dense = next(cell for cell in timed if cell["impl"] == "torch bf16")
    assert ours["over_dense"] == pytest.approx(ours["median_us"] / dense["median_us"])
    assert ours["weight_bytes"] == _C.w4_bytes(128, 256, 128, 5) and dense["weight_bytes"] == 2 * 128 * 256
    weights = [cell for cell in found["cells"] if "rel_mse" in cell]
    assert len(weights) == 22 and results.failures(found) == []
    assert "128×256" in capsys.readouterr().out
    _, rows = tables_w4.weight_rows(found)
    assert [row[:2] for row in rows[:3]] == [
        ("exact of 128", "4.125"),
        ("E5M5 of 128", "4.078"),
        ("E5M3 of 128", "4.062"),
    ]
    assert ("E5M3 of 32, searched", "4.250") in [row[:2] for row in rows] and "(1.000×)" in rows[0][2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sections", "speed"], "--sections: expected among table, sweep, scales, weights, got speed"),
        (["--samples", "2"], "--samples: expected at least 5, got 2"),
        (["--output", "."], "--output: expected the name of a file that can be written"),
    ],
)
def test_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "w4", "--device", "cpu", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_claims_about_weights() -> None:
    """E5M3 and E5M5 lose at most a percent; small groups with E5M3 and search save 40 % in 4.29 bits."""
    cells = w4.weight_errors(3, (512, 2048))
    of = {(c["case"]["distribution"], c["case"]["group"], c["case"]["scale_mbits"], c["case"]["rounding"]): c
          for c in cells}  # fmt: skip
    for name in ("normal", "student t, 5 degrees"):
        for bits in (3, 5):
            assert of[name, 128, bits, "nearest"]["over_exact_error"] <= 1.01
        small = of[name, 32, 3, "search"]
        assert small["over_exact_error"] <= 0.6 and small["bits_per_weight"] <= 4.29
    assert not results.failures({"cells": cells})


def test_a_wrong_product_is_found() -> None:
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    exact = torch.randn(128, 256)
    right = (x.double() @ exact.double().T).bfloat16()
    rows = torch.arange(128)
    assert w4.bound_error(right, x, rows, exact, torch.device("cpu"), 5) <= 1
    wrong = right.clone()
    wrong[3, 127] *= 1.1
    assert w4.bound_error(wrong, x, rows, exact, torch.device("cpu"), 5) > 1
    wrong[0, 0] = torch.nan
    assert w4.bound_error(wrong, x, rows, exact, torch.device("cpu"), 5) == 1e30


@pytest.mark.parametrize(
    ("device", "m", "dtype", "mbits", "allowed"),
    [
        ("cpu", 64, torch.float32, 5, 2.0**-20),
        ("cuda", 32, torch.float16, -1, 2.0**-20),
        ("cuda", 33, torch.float16, 7, 2.0**-16),
        ("cuda", 64, torch.float16, 8, 2.0**-16 + 2.0**-12),
        ("cuda", 48, torch.float16, -1, 2.0**-16 + 2.0**-12),
        ("cuda", 33, torch.bfloat16, 4, 2.0**-16),
        ("cuda", 33, torch.bfloat16, 5, 2.0**-16 + 2.0**-9),
        ("cuda", 4096, torch.bfloat16, 8, 2.0**-16 + 2.0**-8),
        ("cuda", 4096, torch.bfloat16, -1, 2.0**-16 + 2.0**-8),
    ],
)
def test_bounds_are_the_headers(device: str, m: int, dtype: Any, mbits: int, allowed: float) -> None:
    """csrc/kvcomp/w4.h, kvc_w4_matmul_args: other kernels take more than 32 rows."""
    assert w4._slack(torch.device(device), m, dtype, mbits) == allowed


def test_places_that_are_checked() -> None:
    cpu = torch.device("cpu")
    assert w4._some(1, cpu).tolist() == [0] and w4._some(3, cpu).tolist() == [0, 1, 2]
    many = w4._some(8192, cpu)
    assert len(many.unique()) == 256 and many[0] == 0 and many[-1] == 8191


def test_torchs_int4_is_fed_the_same_weights() -> None:
    codes = torch.randint(-8, 8, (64, 256), dtype=torch.int8)
    scales = torch.rand(64, 2) + 0.5
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    try:
        rival = w4_rivals.torch_int4(codes, scales, [x], 2)
    except Exception as reason:
        pytest.skip(f"torch's int4 product does not run here: {reason}")
    exact = x.double() @ rival.reference.double().T
    assert (rival.call(1).double() - exact).norm() / exact.norm() < rival.bound


def test_bitsandbytes_is_beside_it() -> None:
    """Where it is installed its product is checked against its own weights."""
    weight, x = torch.randn(64, 128).bfloat16(), torch.randn(3, 128, dtype=torch.bfloat16)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match="bitsandbytes is not installed"):
            w4_rivals.nf4(weight, [x], 2)
        return
    rival = w4_rivals.nf4(weight, [x], 2)
    exact = x.double() @ rival.reference.double().T
    assert (rival.call(1).double() - exact).norm() / exact.norm() < rival.bound
    assert rival.nbytes >= 64 * 128 / 2 + 4 * 64 * 128 / 64


def test_targets_are_judged() -> None:
    def cell(m: int, us: float, mbits: int = 5, **more: Any) -> dict[str, Any]:
        case = {"n": 8, "k": 4, "m": m, "group": 128, "scale_mbits": mbits, "dtype": "fp16"}
        return {"impl": "kvcomp", "case": case, "median_us": us, **more}

    def weights(group: int, mbits: int, rounding: str, over: float, bits: float) -> dict[str, Any]:
        case = {"group": group, "scale_mbits": mbits, "rounding": rounding, "distribution": "normal"}
        return {"impl": "kvcomp weights", "case": case, "rel_mse": 0.1, "over_exact_error": over,
                "bits_per_weight": bits}  # fmt: skip

    cells = [
        cell(1, 10.0, goal_us=9.0, over_dense=0.5, over_dense_allowed=1.05, over_exact=1.02),
        cell(2, 10.0, goal_us=20.0, over_dense=1.26, over_dense_allowed=1.05, over_exact=1.03),
        cell(2, 9.9, mbits=0, over_exact=1.5, over_dense=9.0, over_dense_allowed=1.05),
        weights(128, 3, "nearest", 1.009, 4.06), weights(128, 3, "search", 2.0, 4.06),
        weights(32, 3, "search", 0.55, 4.25), weights(32, 3, "search", 0.55, 4.30),
        {"impl": "torch sum", "case": {"read": "sum"}, "role": "ceiling"},
    ]  # fmt: skip
    _, rows = tables_w4.target_rows({"cells": cells})
    assert [row[1:] for row in rows] == [
        ("1 of 2", "missed", "1.111: 8×4, M = 1, fp16, E5M5"),
        ("-", "not measured", "-"),
        ("-", "not measured", "-"),
        ("1 of 2", "missed", "1.200: 8×4, M = 2, fp16, E5M5"),
        ("1 of 2", "missed", "1.010: 8×4, M = 2, fp16, E5M5"),
        ("1 of 1", "met", "0.999: E5M3, normal"),
        ("1 of 2", "missed", "1.002: E5M3, normal"),
    ]


def test_cells_are_related() -> None:
    def cell(impl: str, us: float, **case: Any) -> dict[str, Any]:
        shape = {"n": 4096, "k": 4096, "m": 128, "group": 128, "scale_mbits": 5, "dtype": "fp16"}
        return {"impl": impl, "case": shape | case, "median_us": us, "gb_per_s": 1.0}

    cells = [
        cell("kvcomp", 10.0), cell("kvcomp", 8.0, scale_mbits=-1), cell("cuBLAS fp16", 20.0, group=None),
        cell("cuBLAS bf16", 40.0, dtype="bf16"), cell("Humming int4", 16.0), cell("cuBLAS fp16", 1.0, m=1),
        cell("bitsandbytes NF4", 20.0, group=64), cell("bitsandbytes NF4", 1.0, group=64, dtype="bf16"),
    ]  # fmt: skip
    w4.relate(cells)
    assert cells[0]["over_dense"] == 0.5 and cells[0]["over_dense_allowed"] == 1.10
    assert cells[0]["over_humming"] == 10 / 16 and cells[0]["over_exact"] == 1.25
    assert cells[0]["over_bitsandbytes"] == 0.5
    assert w4.allowed_over_dense(4096, 4096, 1024) == w4.allowed_over_dense(8192, 8192, 128) == 1.05


def test_tables_of_speed() -> None:
    def cell(impl: str, m: int, us: float, group: int | None = 128, mbits: int | None = 5, **more: Any) -> Any:
        case = {"n": 4096, "k": 8192, "m": m, "group": group, "scale_mbits": mbits, "dtype": "fp16", "device": "cuda"}
        return {"impl": impl, "case": case, "median_us": us, "gb_per_s": 3000.0, **more}

    cells = [
        {"impl": "torch sum", "case": {"read": "sum"}, "gb_per_s": 4600.0, "role": "ceiling"},
        cell("kvcomp", 1, 10.0, goal_us=11.0), cell("cuBLAS fp16", 1, 40.0, None, None),
        cell("Humming int4", 1, 16.0, 128, None), cell("kvcomp", 1, 10.1, 128, -1), cell("kvcomp", 1, 10.2, 32, 3),
        cell("kvcomp", 16, 14.0, goal_us=13.5), cell("kvcomp", 128, 50.0), cell("cuBLAS fp16", 128, 40.0, None, None),
    ]  # fmt: skip
    w4.relate(cells)
    found = {"cells": cells}
    _, rows = tables_w4.speed_rows(found)
    assert rows == [
        ("4096×8192", "1", "fp16", "40.0", "-", "16.0", "10.0", "11", "3000"),
        ("4096×8192", "16", "fp16", "-", "-", "-", "14.0", "13.5 (missed)", "3000"),
    ]
    _, beside = tables_w4.speed_rows({"cells": [*cells, cell("bitsandbytes NF4", 1, 30.0, 64, None)]})
    assert beside[0] == ("4096×8192", "1", "fp16", "40.0", "-", "16.0", "30.0", "10.0", "11", "3000")
    header, rows = tables_w4.sweep_rows(found)
    assert rows[0][:2] == ("4096×8192 fp16", "0.25") and rows[0][-1] == "128"
    assert rows[0][header.index("128")] == "1.25" and rows[0][header.index("256")] == "-"
    header, rows = tables_w4.scale_rows(found)
    assert header[1:] == ("4096×8192, M = 1",)
    assert rows == [("E5M5 of 128", "0.990"), ("exact of 128", "1.000"), ("E5M3 of 32", "1.010")]


def test_decoding_with_weights_of_four_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kvcomp bench decode --weight-bits: the plain model first, whose rivals have no other weights."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path / "decode.json"
    arguments = ["bench", "decode", "--model-shape", "tiny", "--device", "cpu", "--compile", "no", "--context", "90",
                 "--new", "10", "--batch", "1", "--rivals", "dynamic", "--output", str(out)]  # fmt: skip
    assert main([*arguments, "--weight-bits", "4", "16"]) == 0
    found = results.read(out, kind="decode")
    assert [(cell["impl"], cell["case"]["w_bits"]) for cell in found["cells"]] == [
        ("kvcomp", 16), ("transformers DynamicCache", 16), ("kvcomp", 4),
    ]  # fmt: skip
    assert all(0 < cell["error"]["value"] <= cell["error"]["bound"] for cell in found["cells"][::2])
    assert 4 < found["packed_weights"]["bits_per_weight"] < 5
    assert found["packed_weights"]["stacks"] == 2 * 2  # queries, keys and values; gate and up
    assert "4 bit, weights of 4 bit" in capsys.readouterr().err
