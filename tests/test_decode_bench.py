"""kvcomp bench decode, on the CPU with a tiny model: what it writes, goes on with and refuses."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from kvcomp import results  # noqa: E402
from kvcomp.bench import decode, decode_goals, goals  # noqa: E402
from kvcomp.cli import _compile_options, main  # noqa: E402

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
        assert len(cell["tpot_samples_ms"]) == 9 and len(cell["ttft_samples_ms"]) == 3
        assert cell["tokens_per_s"] == pytest.approx(cell["case"]["b"] / cell["tpot_ms"] * 1e3)
        assert cell["kv_ratio"] > 1.2 and cell["peak_bytes"] is None
    assert main([*arguments, "--rivals", "dynamic", "static", "quantized"]) == 0
    second = json.loads(out.read_text())
    for cell, alone in zip(second["cells"], first["cells"], strict=False):  # rivals that came later are beside it now
        plain = [rival for rival in second["cells"] if rival["impl"].startswith("transformers ")]
        plain = [rival for rival in plain if rival["case"]["b"] == cell["case"]["b"] and rival["case"]["k_bits"] == 16]
        assert cell.pop("times_plain") == min(rival["tpot_ms"] for rival in plain) / cell["tpot_ms"]
        assert cell.pop("ttft_ratio") == cell["ttft_ms"] / min(rival["ttft_ms"] for rival in plain)
        assert cell == alone
    assert second["started"] == first["started"]
    rivals = {cell["impl"] for cell in second["cells"][2:]}
    assert {"transformers DynamicCache", "transformers StaticCache"} <= rivals
    if "transformers QuantizedCache" not in rivals:
        assert set(second["not_measured"].values()) == {"optimum-quanto is not installed"}
    plain = [cell for cell in second["cells"] if cell["impl"] == "transformers DynamicCache"]
    assert [cell["kv_ratio"] for cell in plain] == [1.0, 1.0]
    assert all(cell["error"]["value"] <= cell["error"]["bound"] for cell in plain)
    assert "kvcomp, batch 1, 90 tokens, 4 bit" in capsys.readouterr().err


def test_every_sample_comes_after_a_prompt_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first long prompt of a process loads what later ones have."""
    lengths: list[tuple[int, int]] = []
    answer = decode._answer

    def noted(model: Any, ids: Any, new: int, arguments: Any) -> Any:
        lengths.append(tuple(ids.shape))
        return answer(model, ids, new, arguments)

    monkeypatch.setattr(decode, "_answer", noted)
    given = settings(rivals=["dynamic"], batches=[2], first_samples=2, context=200)
    found = decode.bench(given, command="x")
    assert [len(cell["ttft_samples_ms"]) for cell in found["cells"]] == [2, 2]
    assert lengths[:4] == [(2, 128), (1, 200), (2, 200), (2, 200)]
    assert lengths[-4:] == [(2, 128), (1, 200), (2, 200), (2, 200)]


class Pair(torch.Tensor):
    """What quantized tensors are: a tensor on the outside, others within."""

    codes: Any
    scale: Any

    @staticmethod
    def __new__(cls, codes: Any, scale: Any) -> Any:
        pair = torch.Tensor._make_wrapper_subclass(cls, (64, 64), dtype=torch.bfloat16)
        pair.codes, pair.scale = codes, scale
        return pair

    @classmethod
    def __torch_dispatch__(cls, *arguments: Any) -> Any:
        raise NotImplementedError

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], None


def test_bytes_of_quantized_tensors_are_those_within() -> None:
    codes, scale = torch.zeros(64 * 32, dtype=torch.uint8), torch.zeros(64, dtype=torch.bfloat16)
    assert decode._bytes(Pair(codes, scale)) == 64 * 32 + 64 * 2
    assert decode._bytes(torch.zeros(3, 5)) == 60 and decode._bytes(None) == decode._bytes(4) == 0
    assert decode._bytes((codes, {"scale": scale, "bits": 4})) == 64 * 32 + 64 * 2  # as HQQ has them

    class Layer:
        def __init__(self) -> None:
            self.keys = self.values = torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16)  # not quantized yet
            self._quantized_keys = self._quantized_values = Pair(codes, scale)

    class Cache:
        layers = (Layer(),)

        def get_seq_length(self) -> int:
            return 66

    shape = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = types.SimpleNamespace(config=transformers.LlamaConfig(**shape))
    held = 2 * (64 * 32 + 64 * 2 + 2 * 64 * 2)
    assert decode._kv_bytes(Cache(), model, 1) == {"kv_bytes": held, "kv_ratio": 66 * 64 * 2 * 2 / held}


def test_what_is_asked_of_cells() -> None:
    """Targets of Llama-3.1-8B's shape at 4 bits, with weights of 4 bits of a token's time alone; cells of other shapes
    and bits have none."""
    case = {"model": "llama-3.1-8b", "b": 1, "s": 32768, "w_bits": 16, "new": 256, "k_bits": 4, "v_bits": 4}
    ours = {"impl": "kvcomp", "case": case, "tpot_ms": 5.0, "ttft_ms": 1410.0, "kv_ratio": 3.75}
    plain = [
        {"impl": name, "case": case | {"k_bits": 16, "v_bits": 16}, "tpot_ms": tpot, "ttft_ms": ttft, "kv_ratio": 1.0}
        for name, tpot, ttft in (
            ("transformers DynamicCache", 55.0, 1400.0),
            ("transformers StaticCache", 16.0, 1420.0),
        )
    ]
    quantized = {"impl": "transformers QuantizedCache", "case": case, "tpot_ms": 1.0, "ttft_ms": 1.0, "kv_ratio": 3.5}
    cell, *others = decode_goals.relate([ours, *plain, quantized])
    assert others == [*plain, quantized] and "times_plain" not in ours
    assert cell["times_plain"] == 16.0 / 5.0 and cell["ttft_ratio"] == 1410 / 1400
    assert goals.excess(cell) == pytest.approx(
        {
            "target_tpot_ms": 5 / 5.5 - 1,
            "target_times_plain": 1 - 3.2 / 3,
            "target_ttft_ratio": 1410 / 1400 / 1.01 - 1,
            "target_kv_ratio": 1 - 3.75 / 3,
        }
    )
    assert goals.verdict(cell, only="target_tpot_ms") == "≤ 5.5: met by 9.1 %"
    for change in ({"b": 32}, {"s": 4096}, {"k_bits": 2, "v_bits": 2}, {"model": "tiny"}, {"w_bits": 4, "b": 32}):
        (other,) = decode_goals.relate([ours | {"case": case | change}])
        assert set(goals.excess(other)) == ({"target_kv_ratio"} if change == {"b": 32} else set())
        assert "times_plain" not in other
    for batch, target in ((1, 3.0), (8, 5.0)):
        (small,) = decode_goals.relate([ours | {"case": case | {"w_bits": 4, "b": batch}}])
        assert goals.excess(small) == {"target_tpot_ms": pytest.approx(5 / target - 1)}


def test_files_of_another_machine_are_made_anew(tmp_path: Path) -> None:
    found = decode.bench(settings(rivals=[]), command="x")
    other = found | {"machine": found["machine"] | {"cores": -1}}
    said: list[str] = []
    again = decode.bench(settings(rivals=[]), command="x", before=other, tell=said.append)
    assert said[0] == "what there was is of other machine: everything is measured anew"
    assert again["machine"] == found["machine"] and len(again["cells"]) == 1
    assert again["cells"][0]["tpot_samples_ms"] != found["cells"][0]["tpot_samples_ms"]


def test_other_ways_of_decoding_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, compiling and the seed are no part of a case; more first samples go on with what is there."""
    counted: list[str] = []

    def measured(settings: Any, model: Any, impl: str, case: dict[str, Any], *others: Any) -> dict[str, Any]:
        counted.append(impl)
        return results.cell(impl, case, error=None, ttft_ms=1.0, tpot_ms=1.0)

    monkeypatch.setattr(decode, "_cell", measured)
    before = decode.bench(settings(rivals=[]), command="x")
    assert len(decode.bench(settings(rivals=[], first_samples=4), command="y", before=before)["cells"]) == 1
    assert len(counted) == 1
    for change in ({"graphs": not settings().graphs}, {"compile": True}, {"seed": 5}):
        said: list[str] = []
        again = decode.bench(settings(rivals=[], **change), command="y", before=before, tell=said.append)
        assert said[0] == "what there was is of other settings: everything is measured anew"
        assert again["command"] == "y" and len(again["cells"]) == 1
    assert len(counted) == 4


def test_out_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto")

    monkeypatch.setattr(decode, "_answer", full)
    saved: list[Any] = []
    found = decode.bench(settings(rivals=[]), command="x", save=saved.append)
    assert found["cells"] == [] and len(saved) == 1
    assert found["not_measured"] == {"kvcomp, batch 1, 90 tokens, 4 bit": "out of memory: CUDA out of memory. Tried"}


def test_a_run_ends_where_its_minutes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that has begun is finished; the next run does the others."""
    now = [0.0]

    def measured(settings: Any, model: Any, impl: str, case: dict[str, Any], *others: Any) -> dict[str, Any]:
        now[0] += 120
        return results.cell(impl, case, error=None, ttft_ms=1.0, tpot_ms=1.0)

    monkeypatch.setattr(decode, "_cell", measured)
    monkeypatch.setattr(decode.time, "perf_counter", lambda: now[0])
    given = settings(batches=[1, 2], minutes=3)
    said: list[str] = []
    found = decode.bench(given, command="x", tell=said.append)
    assert [cell["case"]["b"] for cell in found["cells"]] == [1, 1]
    assert said[-1] == "transformers DynamicCache, batch 2, 90 tokens, 16 bit: left for the next run, after 3 minutes"
    found = decode.bench(given, command="y", before=found)
    assert [cell["case"]["b"] for cell in found["cells"]] == [1, 1, 2, 2] and found["command"] == "x && y"


def test_a_rival_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(settings: Any, model: Any, impl: str, *others: Any) -> Any:
        raise RuntimeError(f"{impl} is broken\nin many words")

    monkeypatch.setattr(decode, "_cell", fails)
    with pytest.raises(RuntimeError, match="kvcomp is broken"):
        decode.bench(settings(), command="x")
    rivals = decode._parts(settings())[1:]
    monkeypatch.setattr(decode, "_parts", lambda given: rivals)
    found = decode.bench(settings(), command="x")
    assert found["not_measured"] == {
        "transformers DynamicCache, batch 1, 90 tokens, 16 bit": "transformers DynamicCache is broken"
    }


def test_fewer_layers_are_another_model() -> None:
    found = decode.bench(settings(rivals=[], layers=1), command="x")
    whole = decode.bench(settings(rivals=[]), command="x", before=found)
    assert [cell["case"]["model"] for cell in whole["cells"]] == ["tiny, 1 layers", "tiny"]
    assert whole["weight_bytes"] > found["cells"][0]["kv_bytes"] > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shape": "huge"}, "--model-shape: expected one of llama-3.1-8b, tiny, got huge"),
        ({"context": 1}, "--context: expected 2 or more, got 1"),
        ({"context": 4090}, "--context: expected at most"),
        ({"new": 3}, "--new: expected 9 or more, got 3"),
        ({"batches": [0]}, r"--batch: expected 1 or more, got \[0\]"),
        ({"rivals": ["vllm"]}, "--rivals: expected among dynamic, static, quantized or none, got vllm"),
        ({"layers": 0}, "--layers: expected 1 or more, got 0"),
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


def test_how_to_compile_as_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert _compile_options("auto") == "auto" and _compile_options("no") is False
    assert _compile_options("max_autotune=true,combo_kernels=false") == {"max_autotune": True, "combo_kernels": False}
    assert main([*SMALL, "--compile", "fast"]) == 2
    assert "--compile: expected auto, yes, no, tuned or name=value" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Steps are replayed, and every part of one is found again."""
    given = settings(device="cuda", compile="auto", rivals=["dynamic", "static"], context=400, new=24, batches=[1, 3])
    said: list[str] = []
    found = decode.bench(given, command="x", tell=said.append)
    assert not results.failures(found) and not found["not_measured"], said
    for cell in found["cells"]:
        assert len(cell["tpot_samples_ms"]) == 23 and min(cell["tpot_samples_ms"]) > 0 < cell["peak_bytes"]
        if cell["impl"] == "kvcomp":
            kinds = cell["shares"]["kernels_ms"]
            assert cell["replayed_steps"] >= 20 and cell["joined"] == 2 * 2, "compiled, with joined layers"
            assert min(kinds["attend"], kinds["append"], kinds["linear"]) > 0


def test_kinds_of_kernels() -> None:
    for kernel, kind in (
        ("void attend_kernel<4, 128>(kvc_attend_args)", "attend"),
        ("append_token", "append"),
        ("divide_kernel", "divide"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "linear"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "linear"),
        ("triton_red_fused_mm_mul_3", "linear"),
        ("triton_poi_fused__unsafe_view_add_append_attend_cat_mul_neg_2", "rest"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "rest"),
        ("void at::native::elementwise_kernel<128, 4>", "rest"),
        ("pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
    ):
        assert decode.kind_of(kernel) == kind
