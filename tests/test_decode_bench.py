"""kvcomp bench decode, on the CPU with a tiny model: what it writes, goes on with and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from kvcomp.bench import decode  # noqa: E402
from kvcomp.cli import main  # noqa: E402

SMALL = [
    "bench",
    "decode",
    "--model-shape",
    "tiny",
    "--device",
    "cpu",
    "--compile",
    "no",
    "--context",
    "90",
    "--new",
    "10",
]


def settings(**changes: Any) -> decode.Settings:
    given = {"shape": "tiny", "batches": [1], "context": 90, "new": 10, "rivals": ["dynamic"], "device": "cpu"}
    return decode.Settings(**{**given, "compile": False, **changes})


def test_writes_every_part_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    arguments = [*SMALL, "--batch", "1", "2", "--bits", "4", "--output", str(out)]
    assert main([*arguments, "--rivals", "none"]) == 0
    first = json.loads(out.read_text())
    assert (first["schema"], first["kind"]) == ("kvcomp.results/1", "decode")
    assert [(cell["impl"], cell["case"]["b"]) for cell in first["cells"]] == [("kvcomp", 1), ("kvcomp", 2)]
    for cell in first["cells"]:
        assert cell["case"] == {
            "model": "tiny", "b": cell["case"]["b"], "s": 90, "w_bits": 16, "new": 10, "k_bits": 4, "v_bits": 4,
        }  # fmt: skip
        assert 0 < cell["error"]["value"] <= cell["error"]["bound"]
        assert len(cell["tpot_samples_ms"]) == 9 and len(cell["ttft_samples_ms"]) == 2
        assert cell["tokens_per_s"] == pytest.approx(cell["case"]["b"] / cell["tpot_ms"] * 1e3)
        assert cell["kv_ratio"] > 1.2 and cell["peak_bytes"] is None
    assert main([*arguments, "--rivals", "dynamic", "static", "quantized"]) == 0
    second = json.loads(out.read_text())
    assert second["cells"][:2] == first["cells"] and second["started"] == first["started"]
    rivals = {cell["impl"] for cell in second["cells"][2:]}
    assert {"transformers DynamicCache", "transformers StaticCache"} <= rivals
    if "transformers QuantizedCache" not in rivals:
        assert set(second["not_measured"].values()) == {"optimum-quanto is not installed"}
    plain = [cell for cell in second["cells"] if cell["impl"] == "transformers DynamicCache"]
    assert [cell["kv_ratio"] for cell in plain] == [1.0, 1.0]
    assert all(cell["error"]["value"] <= cell["error"]["bound"] for cell in plain)
    assert "kvcomp, batch 1, 90 tokens, 4 bit" in capsys.readouterr().err


def test_files_of_another_machine_are_made_anew(tmp_path: Path) -> None:
    found = decode.bench(settings(rivals=[]), command="x")
    other = found | {"machine": found["machine"] | {"cores": -1}}
    again = decode.bench(settings(rivals=[]), command="x", before=other)
    assert again["machine"] == found["machine"] and len(again["cells"]) == 1
    assert again["cells"][0]["tpot_samples_ms"] != found["cells"][0]["tpot_samples_ms"]


def test_out_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto")

    monkeypatch.setattr(decode, "_answer", full)
    saved: list[Any] = []
    found = decode.bench(settings(rivals=[]), command="x", save=saved.append)
    assert found["cells"] == [] and len(saved) == 1
    assert found["not_measured"] == {"kvcomp, batch 1, 90 tokens, 4 bit": "out of memory: CUDA out of memory. Tried"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shape": "huge"}, "--model-shape: expected one of llama-3.1-8b, tiny, got huge"),
        ({"context": 1}, "--context: expected 2 or more, got 1"),
        ({"context": 4090}, "--context: expected at most"),
        ({"new": 3}, "--new: expected 9 or more, got 3"),
        ({"batches": [0]}, r"--batch: expected 1 or more, got \[0\]"),
        ({"rivals": ["vllm"]}, "--rivals: expected among dynamic, static, quantized or none, got vllm"),
        ({"first_samples": 0}, "--first-samples: expected 1 or more, got 0"),
    ],
)
def test_refuses(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^bench: " + sentence):
        decode.bench(settings(**changes), command="x")


def test_an_error_over_its_bound_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decode, "_BF16", -1.0)
    assert main([*SMALL, "--batch", "1", "--rivals", "none"]) == 1
    assert "relative error (L2) of the logits of 4 steps" in capsys.readouterr().err


def test_kinds_of_kernels() -> None:
    for kernel, kind in (
        ("void attend_kernel<4, 128>(kvc_attend_args)", "attend"),
        ("append_token", "append"),
        ("divide_kernel", "divide"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "linear"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "linear"),
        ("triton_red_fused_mm_mul_3", "linear"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "rest"),
        ("void at::native::elementwise_kernel<128, 4>", "rest"),
        ("pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
    ):
        assert decode.kind_of(kernel) == kind
