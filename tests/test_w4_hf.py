"""kvcomp.w4 and transformers: quantized while it is read, saved, read again, with the packed cache, compiled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from experiment_support import EXPERIMENTS  # noqa: E402
from kvcomp.w4 import SharedScaleLinear, W4Config, find_linears, quantize_model, report  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = EXPERIMENTS / "models" / "tiny-base"
IDS = torch.randint(32, 120, (1, 48), generator=torch.Generator().manual_seed(0))


def load(path: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", **arguments).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids.to(model.device)).logits.float().cpu()
    return found


def phi(folder: Path) -> Path:
    """A model of fused projections, fp32."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        sliding_window=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def qwen(folder: Path) -> Path:
    """A model with biases, bf16."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


MODELS = {"llama": lambda folder: TINY, "phi": phi, "qwen": qwen}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target": "all", "group_size": 32, "scale_mbits": 3, "rounding": "search"},
        {"target": "all", "scale_mbits": -1, "skip": ["o_proj"]},
    ],
)
def test_read_quantized_saved_and_read_again(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    source = MODELS[kind](tmp_path / "plain")
    model = load(source, quantization_config=W4Config(**settings))
    plain = load(source)
    names = find_linears(plain, settings.get("target", "mlp"), settings.get("skip", ()))
    assert [layer.name for layer in report(model).layers] == names
    quantize_model(plain, **{"target": "mlp", **settings})
    expected = logits(plain)
    assert torch.equal(logits(model), expected)
    for number, made in enumerate((model, plain)):  # saved as the one, or as the other
        folder = tmp_path / f"saved{number}"
        made.save_pretrained(folder)
        assert not list(folder.glob("*.bin"))
        again = load(folder)
        assert torch.equal(logits(again), expected)
        assert report(again) == report(model) and again.dtype == model.dtype
        layers = [module for module in again.modules() if isinstance(module, SharedScaleLinear)]
        assert all(layer.weight.data_ptr() % 16 == 0 for layer in layers)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "kvcomp_w4" and config["format_version"] == 1


def test_checkpoint_holds_packed_bytes(tmp_path: Path) -> None:
    model = load(TINY, quantization_config=W4Config("all"))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.down_proj"
        assert file.get_slice(f"{name}.weight").get_dtype() == "U8"
        assert file.get_tensor(f"{name}._extra_state").tolist() == [model.get_submodule(name).exponent, 128, 5]
    assert (tmp_path / "model.safetensors").stat().st_size < 0.28 * (TINY / "model.safetensors").stat().st_size


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = load(TINY, quantization_config=W4Config("all"))
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_another_process_reads_it(tmp_path: Path) -> None:
    model = load(TINY, quantization_config=W4Config())
    model.save_pretrained(tmp_path)
    said = subprocess.run(
        [sys.executable, "-c", "import sys, torch, kvcomp.w4, transformers\n"
         "torch.set_num_threads(1)\n"
         "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
         "print(kvcomp.w4.report(model).bits_per_weight, type(model.config.quantization_config).__name__)\n",
         str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert said.stdout.split() == ["4.078125", "W4Config"]


def test_nothing_is_reported_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=W4Config("all"), output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    model.save_pretrained(tmp_path)
    _, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]


def test_generates_with_the_packed_cache() -> None:
    model = load(TINY, quantization_config=W4Config("all"))
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0
    }  # fmt: skip
    plain = model.generate(IDS, **arguments)
    assert plain.shape == (1, 60)
    with kvcomp.compress(model, kvcomp.Policy(bits=16)) as packing:
        assert torch.equal(model.generate(IDS, **arguments)[0, :52], plain[0, :52])
    with kvcomp.compress(model, kvcomp.Policy(bits=4)) as packing:
        assert model.generate(IDS, **arguments).shape == (1, 60)
    assert packing.cache is not None and packing.cache.nbytes > 0
    assert torch.equal(model.generate(IDS, **arguments), plain)


def test_compiles() -> None:
    model = load(TINY, quantization_config=W4Config("all"))
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        found = compiled(IDS).logits.float()
    assert torch.allclose(found, expected, atol=0.05, rtol=0.05)
    layer = torch.compile(model.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(layer(x), model.model.layers[0].mlp(x))


def test_dequantizes() -> None:
    model = load(TINY, quantization_config=W4Config("all", 32, 3))
    expected = logits(model)
    plain = model.dequantize(torch.float32).to(torch.bfloat16)
    assert not any(isinstance(module, SharedScaleLinear) for module in plain.modules())
    assert not hasattr(plain.config, "quantization_config")
    assert (logits(plain) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"target": "attention"}, "W4Config: target: expected one of mlp, all, got 'attention'"),
        ({"group_size": 16}, "W4Config: group_size"),
        ({"scale_mbits": 11}, "W4Config: scale_mbits"),
        ({"rounding": "up"}, "W4Config: rounding"),
        ({"format_version": 2}, "W4Config: format_version: expected 1, got 2"),
    ],
)
def test_config_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        W4Config(**arguments)
    assert said in str(caught.value)


def test_config_is_the_packages() -> None:
    assert kvcomp.W4Config is W4Config and "W4Config" in kvcomp.__all__


def test_config_is_a_dict_and_back() -> None:
    config = W4Config("all", 32, 3, "search", ["o_proj"])
    assert W4Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(TypeError):
        W4Config.from_dict({**config.to_dict(), "unknown": 1})


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    load(TINY, quantization_config=W4Config()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version: expected 1, got 99"):
        load(tmp_path)
    # Other groups than the bytes have: transformers says that sizes differ.
    config["quantization_config"] |= {"format_version": 1, "group_size": 32}
    path.write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match="size"):
        load(tmp_path)


def test_a_checkpoint_of_layers_of_another_format_is_refused(tmp_path: Path) -> None:
    """Groups of 64 with E5M3 and groups of 128 with fp16 take as many bytes."""
    load(TINY, quantization_config=W4Config("mlp", 64, 3)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"group_size": 128, "scale_mbits": -1}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected \[exponent, group_size 128, scale_mbits -1\], got \[.*, 64, 3\]"):
        load(tmp_path)


@pytest.mark.parametrize("short", [False, True])
def test_a_checkpoint_without_exponents_is_refused(short: bool, tmp_path: Path) -> None:
    load(TINY, quantization_config=W4Config()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    names = [name for name in held if name.endswith("_extra_state")]
    for name in names:
        exponent = held.pop(name)[:1].clone()
        if short:
            held[name] = exponent
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="_extra_state: expected") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_dequantized_model_runs(tmp_path: Path) -> None:
    model = load(qwen(tmp_path), quantization_config=W4Config("all", 32, 3))
    expected = logits(model)
    plain = model.dequantize()
    assert {part.dtype for part in plain.parameters()} == {torch.bfloat16}
    assert (logits(plain) - expected).norm() / expected.norm() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["mlp", "all"])
def test_gpu_model(target: str, tmp_path: Path) -> None:
    model = load(TINY, quantization_config=W4Config(target))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    there = load(tmp_path).cuda()
    assert (logits(there) - expected).norm() / expected.norm() < 0.05
    arguments: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    ids = IDS.cuda()
    plain = there.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    with kvcomp.compress(there, kvcomp.Policy(bits=16)) as packing:  # decode steps are recorded and replayed
        packed = there.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        assert packing.steps.replays > 0
    assert torch.equal(packed[0, : 48 + 4], plain[0, : 48 + 4])
    with kvcomp.compress(there, kvcomp.Policy(bits=4), compile=True):
        assert there.generate(ids, attention_mask=torch.ones_like(ids), **arguments).shape == plain.shape


@pytest.mark.gpu
def test_gpu_fp8() -> None:
    from kvcomp.w4 import arms, matrix
    from kvcomp.w4.fp8 import why_no_fp8

    reason = why_no_fp8(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    (arm,) = matrix.load(EXPERIMENTS / "experiment_matrix.yaml").arms("C1")
    model, _ = arms.load(None, "bf16", torch.device("cuda"))
    expected = logits(model)
    assert 8 < arms.prepare(model, arm)["bits_per_weight"] < 8.2
    assert 1e-4 < (logits(model) - expected).norm() / expected.norm() < 0.1
