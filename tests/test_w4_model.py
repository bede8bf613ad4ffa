"""Quantized models: which layers are found, what a model then holds, and what it answers.

The quality of C0, C3, C4, C5_m0, C5_m3, C5_m5 and C7 is measured on the shipped model, of the quantized model itself:
the tests below fail where an evaluation goes around its layers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from experiment_support import EXPERIMENTS  # noqa: E402
from kvcomp import results  # noqa: E402
from kvcomp.eval.tasks import FAMILIES  # noqa: E402
from kvcomp.experiment import tables, tables_w4  # noqa: E402
from kvcomp.w4 import (  # noqa: E402
    SharedScaleLinear,
    acceptance,
    analysis,
    arms,
    find_linears,
    matrix,
    quantize_model,
    report,
)
from kvcomp.w4 import claims as w4_claims  # noqa: E402
from kvcomp.w4 import pareto as w4_pareto  # noqa: E402
from kvcomp.w4 import quality as w4_quality  # noqa: E402
from kvcomp.w4.model import model_bytes  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

BNB = "bitsandbytes"
MATRIX = EXPERIMENTS / "experiment_matrix.yaml"
TINY = EXPERIMENTS / "models" / "tiny-base"
TEXT = EXPERIMENTS / "data" / "held_out.txt"
ASKED = w4_quality.Asked(length=640, questions=4, windows=3, scored=384)
TASKS = ["needle_single", "needle_multi_key"]  # whose answers are short
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def small(kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == BNB else find(name, *more))


def shipped() -> matrix.Matrix:
    """The shipped matrix, with fewer tasks and questions."""
    loaded = matrix.load(MATRIX)
    quality = loaded.metrics.quality.model_copy(update={"tasks": TASKS, "min_questions": 4})
    return loaded.model_copy(update={"metrics": loaded.metrics.model_copy(update={"quality": quality})})


# ---- which layers


def test_finds_the_projections_of_a_llama() -> None:
    model = small()
    mlp, every = find_linears(model, "mlp"), find_linears(model, "all")
    assert mlp == [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")]
    assert set(every) - set(mlp) == {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"}
    assert not any("lm_head" in name or "embed" in name for name in every)


def test_finds_fused_projections() -> None:
    model = small("Phi3")
    assert find_linears(model, "mlp") == [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate_up", "down")]
    every = find_linears(model, "all")
    assert {name.rpartition(".")[2] for name in every} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("kind", "mlp", "others"),
    [
        ("Qwen2", {"gate_proj", "up_proj", "down_proj"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("GPTNeoX", {"dense_h_to_4h", "dense_4h_to_h"}, {"query_key_value", "dense"}),
        ("OPT", {"fc1", "fc2"}, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ],
)
def test_finds_those_of_other_models(kind: str, mlp: set[str], others: set[str]) -> None:
    more = {"OPT": {"ffn_dim": 192, "word_embed_proj_dim": 128}}.get(kind, {})
    model = small(kind, **more)
    assert {name.rpartition(".")[2] for name in find_linears(model, "mlp")} == mlp
    assert {name.rpartition(".")[2] for name in find_linears(model, "all")} == mlp | others


def test_skips() -> None:
    model = small()
    quantize_model(model, "all", skip=["o_proj", "model.layers.0.mlp.up_proj"])
    plain = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert plain == {"lm_head", "model.layers.0.mlp.up_proj", *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))}


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        (lambda: small(), {"target": "attention"}, "quantize_model: target: expected one of mlp, all, got 'attention'"),
        (lambda: small(), {"group_size": 48}, "quantize_model: group_size"),
        (lambda: torch.nn.Linear(4, 4), {}, "expected nn.Linear layers in repeated blocks (target mlp), got none"),
        (
            lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2)),
            {"target": "all"},
            "got none in GPT2LMHeadModel",
        ),
    ],
)
def test_refused(model: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        quantize_model(model(), **arguments)
    assert said in str(caught.value)


def test_a_model_that_is_quantized_is_not_quantized_again() -> None:
    """A checkpoint's configuration has room for one format, and would be of the last call."""
    model = small()
    quantize_model(model, "mlp", group_size=64, scale_mbits=3)
    before = report(model)
    with pytest.raises(ValueError, match="model: expected one that is not quantized, got one with 6 packed layers"):
        quantize_model(model, "all", scale_mbits=-1)
    assert report(model) == before and model.config.quantization_config.target == "mlp"
    other = small()
    other.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(ValueError, match="got one whose configuration says that it is"):
        quantize_model(other)


def test_t5_keeps_what_it_reads_itself() -> None:
    """Its attention is SelfAttention and EncDecAttention; wo's weight is asked for its dtype, and may be in fp32."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, vocab_size=64, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert {name.rpartition(".")[2] for name in find_linears(model, "mlp")} == {"wi"}
    assert {name.rpartition(".")[2] for name in find_linears(model, "all")} == {"wi", *"qkvo"}
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        exact = model(input_ids=ids, decoder_input_ids=ids).logits
        quantize_model(model, "all", group_size=32)
        near = model(input_ids=ids, decoder_input_ids=ids).logits
    assert 0 < (exact - near).norm() / exact.norm() < 0.3


def test_a_layer_in_two_places_is_one_after_too() -> None:
    model = torch.nn.Sequential(linear := torch.nn.Linear(32, 32), torch.nn.SiLU(), linear)
    made = quantize_model(model, "all", group_size=32)
    assert model[0] is model[2] and isinstance(model[0], SharedScaleLinear) and len(made.layers) == 1
    assert model_bytes(model) == made.nbytes + 4 * 32


def test_experts_that_are_one_parameter_are_left_alone() -> None:
    model = small("Mixtral", num_local_experts=2)
    assert find_linears(model, "all") == [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"]
    with pytest.raises(ValueError, match=r"expected nn\.Linear layers in repeated blocks"):
        find_linears(model, "mlp")


def test_models_without_what_is_asked_for() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"0: expected weights that are loaded, got none \(device meta\)"):
        quantize_model(model, "all", group_size=32)
    assert report(model).bits_per_weight == 0 and type(model[0]) is torch.nn.Linear


class Doubled(torch.nn.Linear):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


def test_subclasses_are_left_alone() -> None:
    model = torch.nn.Sequential(Doubled(64, 64), torch.nn.Linear(64, 64))
    assert find_linears(model, "all") == ["1"]
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got Doubled"):
        SharedScaleLinear.from_linear(model[0])


class Reader(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleDict({"read": torch.nn.Linear(64, 64), "placed": torch.nn.Linear(64, 64)})
        self.own = torch.nn.Linear(64, 64)

    def forward(self, x: Any) -> Any:
        x = self.own(x).to(self.own.weight.device)
        return self.inner.placed(x) @ self.inner.read.weight


def test_layers_whose_weights_others_read_are_left_alone() -> None:
    model = torch.nn.Sequential(Reader())
    assert find_linears(model, "all") == ["0.inner.placed", "0.own"]
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2).eval()
    with pytest.raises(ValueError, match="got none in TransformerEncoder"):
        quantize_model(encoder, "all")
    decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(64, 2, 128, batch_first=True), 1).eval()
    x = torch.randn(1, 5, 64)
    assert [layer.name for layer in quantize_model(decoder, "all").layers] == ["layers.0.linear1", "layers.0.linear2"]
    with torch.no_grad():
        assert decoder(x, x).isfinite().all()


def test_scales_of_bitsandbytes_are_counted() -> None:
    """They hang on the weight, and are neither parameters nor buffers; C6's are quantized again."""

    class State:
        def __init__(self, scales: int, state2: Any = None) -> None:
            self.absmax, self.code, self.state2 = torch.zeros(scales), torch.zeros(16), state2

    layer = torch.nn.Linear(4, 4, bias=False)
    layer.weight.quant_state = State(8, State(2))
    assert model_bytes(torch.nn.Sequential(layer)) == 4 * (16 + 8 + 16 + 2 + 16)
    assert sum(part.nbytes for part in arms.held(layer)) == 4 * (16 + 8 + 16 + 2 + 16)


def test_weights_that_are_not_finite_change_nothing() -> None:
    model = small()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: expected finite weights"):
        quantize_model(model)
    assert not any(isinstance(module, SharedScaleLinear) for module in model.modules())


# ---- what it holds


@pytest.mark.parametrize("kind", ["Llama", "Phi3"])
def test_reports_allocated_bytes(kind: str) -> None:
    model = small(kind)
    before = model_bytes(model)
    found = quantize_model(model, "all", group_size=64, scale_mbits=3)
    layers = [module for module in model.modules() if isinstance(module, SharedScaleLinear)]
    assert len(found.layers) == len(layers) and found == report(model)
    assert found.nbytes == sum(layer.weight.nbytes for layer in layers)
    assert found.bits_per_weight == pytest.approx(8 * found.nbytes / found.weights)
    assert 4 + 8 / 64 <= found.bits_per_weight < 4.5  # padded to whole blocks
    assert before - model_bytes(model) == 4 * found.weights - found.nbytes


def test_model_of_tied_weights_counts_them_once() -> None:
    model = small(tie_word_embeddings=True)
    assert model_bytes(model) == sum(part.nbytes for part in model.parameters()) + sum(
        part.nbytes for part in model.buffers()
    )


def test_quantized_model_is_near_the_plain_one() -> None:
    plain, model = small(), small()
    quantize_model(model, "all", group_size=32, scale_mbits=3, rounding="search")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        exact, near = plain(ids).logits, model(ids).logits
    assert 0 < (exact - near).norm() / exact.norm() < 0.2


def test_sensitivity_of_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    found = list(analysis.sensitivity(model, [-1, 0, 3, 5], group_size=128))
    assert len(found) == 14 * 4 and all(tuple(row) == analysis.SENSITIVITY for row in found)
    assert {row["layer_name"] for row in found} == set(find_linears(model, "all"))
    assert all(0 < row["rel_mse"] <= row["max_rel_mse"] < 0.1 and row["cosine_sim"] > 0.98 for row in found)
    by_bits = {b: sum(r["rel_mse"] for r in found if r["scale_mbits"] == b) for b in (-1, 0, 3, 5)}
    assert by_bits[5] == pytest.approx(by_bits[-1], rel=0.01) and by_bits[0] > by_bits[3]
    out = tmp_path / "s.csv"
    assert analysis.main_sensitivity(["--scale_mbits_list", "3", "--quant_target", "mlp", "--out_csv", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 1 + 18
    assert analysis.main_sensitivity(["--scale_mbits_list", "12"]) == 2
    assert "scale_mbits: expected -1 (exact) or 0 to 10, got 12" in capsys.readouterr().err


@pytest.mark.usefixtures("without_bitsandbytes")
def test_memory_audit() -> None:
    loaded = matrix.load(MATRIX)
    asked = [arm for name in ("C0", "C1", "C2", "C3", "C4", "C7") for arm in loaded.arms(name)]
    said: list[str] = []
    found = {row["config"]: row for row in analysis.audit(None, asked, torch.device("cpu"), said.append)}
    assert set(found) == {"C0", "C3", "C4", "C7"} and len(said) == 2
    assert said[0].startswith("C1 is left out: fp8: expected a GPU") and "bitsandbytes" in said[1]
    assert found["C0"]["saving_pct"] == 0 and found["C0"]["theoretical_saving_pct"] is None
    for name in ("C3", "C4", "C7"):  # sizes of this model fill whole blocks
        assert found[name]["saving_pct"] == pytest.approx(found[name]["theoretical_saving_pct"], abs=1e-6)
        assert found[name]["bits_per_weight"] == pytest.approx(found[name]["theoretical_bits_per_weight"])
    assert found["C7"]["model_mem_mb"] < found["C4"]["model_mem_mb"] < found["C3"]["model_mem_mb"]


@pytest.mark.skipif(importlib.util.find_spec(BNB) is None, reason="bitsandbytes is not installed")
def test_scales_that_are_quantized_again_are_what_c6_saves() -> None:
    """C2 and C6 are NF4 in blocks of 64 of the same layers: 32 bits a scale, or 8 and 32 for every 256 of them."""
    asked = [arm for name in ("C0", "C2", "C6") for arm in matrix.load(MATRIX).arms(name)]
    plain, nf4, double = analysis.audit(None, asked, torch.device("cpu"), print)
    assert plain["model_mem_mb"] > nf4["model_mem_mb"] > double["model_mem_mb"]
    assert nf4["bits_per_weight"] == pytest.approx(4.5, rel=0.005)
    assert double["bits_per_weight"] == pytest.approx(4 + 8 / 64 + 32 / 256 / 64, rel=0.02)


def test_memory_audit_holds_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that is left out frees its model, too, before the next one's bytes are counted."""
    (arm,) = matrix.load(MATRIX).arms("C0")
    made: list[Any] = []
    alive: list[int] = []

    def load(*arguments: Any) -> Any:
        model = torch.nn.Linear(4, 4)
        made.append(weakref.ref(model))
        return model, "m"

    def refuse(*arguments: Any) -> Any:
        raise NotImplementedError("not here")

    monkeypatch.setattr(arms, "load", load)
    monkeypatch.setattr(arms, "prepare", refuse)
    monkeypatch.setattr(analysis, "_tidy", lambda device: alive.append(sum(ref() is not None for ref in made)))
    assert analysis.audit(None, [arm, arm], torch.device("cpu"), lambda said: None) == []
    assert alive == [0, 0]


# ---- what it answers


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    asked = ["C0", "C3", "C4", "C5", "C7"]
    return w4_quality.measure(shipped(), asked, ASKED, model=TINY, text=TEXT, command="test")[0]


def test_every_configuration_is_measured(measured: dict[str, Any]) -> None:
    assert list(measured["configs"]) == ["C0", "C3", "C4", "C5_m0", "C5_m3", "C5_m5", "C7"]
    assert results.failures(measured) == []
    for name, one in measured["configs"].items():
        cells = [cell for cell in measured["cells"] if cell["case"]["config_id"] == name]
        assert [cell["case"]["task"] for cell in cells] == ["held_out", *TASKS]
        assert all(cell["case"]["model"] == "tiny-base" for cell in cells)
        assert cells[0]["tokens"] == sum(cells[0]["window_tokens"]) == ASKED.windows * ASKED.scored
        assert all(len(cell["scores"]) == cell["n"] == 4 for cell in cells[1:])
        assert [cell["contexts"] for cell in cells[1:]] == [4, 1]
        assert 1.8 < one["perplexity"] < 2.6 and 0 <= one["accuracy"] <= 1


def test_quality_is_what_the_weights_say(measured: dict[str, Any]) -> None:
    of = measured["configs"]
    assert of["C0"]["kl"] == 0 and of["C0"]["top1"] == 1 and of["C0"]["avg_relative_drop_pct"] == 0
    assert of["C0"]["accuracy"] > 0.5
    for name in ("C3", "C4", "C5_m0", "C5_m3", "C5_m5", "C7"):
        assert 0.002 < of[name]["kl"] < 0.08 and 0.85 < of[name]["top1"] < 1
        assert 0.995 < of[name]["perplexity"] / of["C0"]["perplexity"] < 1.06
    assert of["C7"]["kl"] > 1.2 * of["C4"]["kl"]  # attention too
    assert of["C4"]["perplexity"] == pytest.approx(of["C3"]["perplexity"], rel=0.005)
    # C5_m5 is C4 under another name.
    assert [c["perplexity"] for c in measured["cells"] if c["case"]["task"] == "held_out" and
            c["case"]["config_id"] in ("C4", "C5_m5")] == [of["C4"]["perplexity"]] * 2  # fmt: skip
    assert of["C5_m0"]["kl"] > of["C5_m5"]["kl"]
    bits = [of[name]["bits_per_weight"] for name in ("C0", "C3", "C4", "C5_m3", "C5_m0")]
    assert bits == [16, 4.125, 4.078125, 4.0625, 4.0390625]


def quick() -> dict[str, Any]:
    asked = w4_quality.Asked(length=640, questions=1, windows=1, scored=256)
    return w4_quality.measure(shipped(), ["C4"], asked, model=TINY, text=TEXT, command="test")[0]


def test_evaluation_goes_through_the_quantized_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that give zeros are noticed."""
    monkeypatch.setattr(SharedScaleLinear, "forward", lambda self, x: x.new_zeros((*x.shape[:-1], self.out_features)))
    found = quick()["configs"]
    assert found["C0"]["perplexity"] < 2.5 and found["C4"]["perplexity"] > 4


def test_an_evaluation_of_the_plain_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed's mistake: a configuration's name over the figures of 16-bit weights."""
    prepare = arms.prepare

    def pretend(model: Any, arm: Any) -> Any:
        other, _ = arms.load(str(TINY), arm.dtype, torch.device("cpu"))
        return prepare(other, arm)

    monkeypatch.setattr(arms, "prepare", pretend)
    found = quick()
    assert {cell["error"]["value"] for cell in found["cells"] if cell["case"]["config_id"] == "C4"} == {1.0}
    assert any("tokens that went around a quantized layer" in sentence for sentence in results.failures(found))


def test_a_layer_that_tokens_go_around_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = arms.prepare

    def detour(model: Any, arm: Any) -> Any:
        weights = prepare(model, arm)
        monkeypatch.setattr(model.model.layers[2].mlp, "forward", lambda x: x)
        return weights

    monkeypatch.setattr(arms, "prepare", detour)
    found = quick()
    assert {cell["error"]["value"] for cell in found["cells"] if cell["case"]["config_id"] == "C4"} == {1.0}


@pytest.mark.usefixtures("without_bitsandbytes")
def test_quality_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All families are asked and shown; a run that was stopped goes on where it was."""
    out = tmp_path / "q.json"
    arguments = ["--config_ids", "C1", "C2", "C5_m3", "--length", "800", "--questions", "1", "--windows", "1",
                 "--scored", "64", "--output", str(out)]  # fmt: skip
    answer, asked = w4_quality.quality.answer, 0

    def stops(*given: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 12:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(w4_quality.quality, "answer", stops)
    assert w4_quality.main(arguments) == 130
    assert "13 units are kept" in capsys.readouterr().err and not out.exists()
    assert w4_quality.main([*arguments, "--seed", "7001"]) == 2
    assert "expected the partial file of this very command" in capsys.readouterr().err
    assert w4_quality.main(arguments) == 0 and asked == 12 + 5
    found = results.read(out, kind="w4_quality")
    assert list(found["configs"]) == ["C0", "C5_m3"] and "bitsandbytes" in found["skipped"]["C2"]
    assert found["skipped"]["C1"].startswith("fp8: expected a GPU whose torch multiplies FP8 by rows, got none")
    assert list(tmp_path.iterdir()) == [out]
    said = capsys.readouterr()
    assert "C5_m3" in said.out and "C2 is skipped" in said.err
    for family in FAMILIES:
        assert family.replace("_", " ") in said.out and family in found["configs"]["C5_m3"]["per_task"]
    assert w4_quality.main(["--config_ids", "C99"]) == 2
    assert "--config_id: expected among C0, C1" in capsys.readouterr().err
    assert w4_quality.main(["--per_context", "0"]) == 2
    assert "--per_context: expected 1 or more, got 0" in capsys.readouterr().err


# ---- what decides


def family_of(scores: list[float], contexts: int) -> dict[str, Any]:
    return {"scores": scores, "accuracy": sum(scores) / len(scores), "contexts": contexts}


def test_shipped_rule() -> None:
    """Every family is asked, by as many questions as the rule wants, of seeds that nothing was chosen on."""
    aims, asked = matrix.load(MATRIX).metrics.quality, w4_quality.Asked()
    assert aims.tasks == list(FAMILIES)
    assert (aims.min_reference_accuracy, aims.min_questions) == (0.5, 20)
    assert asked.seed == 7000
    for family in FAMILIES:
        made = asked.tasks(family)
        assert sum(len(task.questions) for task in made) >= 2 * aims.min_questions
        assert len({len(task.questions) for task in made}) == 1 and len(made) >= 12
        assert [task.seed for task in made] == list(range(7000, 7000 + len(made)))


def test_families_that_count() -> None:
    aims = matrix.load(MATRIX).metrics.quality
    half, few, weak = family_of([1.0, 0.0] * 12, 6), family_of([1.0] * 19, 19), family_of([1.0] * 11 + [0.0] * 13, 24)
    good = family_of([1.0] * 24, 6)
    theirs = {"half": half, "few": few, "weak": weak, "good": good}
    decided = acceptance.rule("C0", theirs, aims)
    assert decided["averaged"] == ["half", "good"]
    assert decided["shown_only"] == {
        "few": "19 questions, fewer than 20", "weak": "C0 answers 45.8 %, less than 50 %"
    }  # fmt: skip
    mine = theirs | {"good": family_of([0.5] * 4 + [1.0] * 20, 6), "weak": family_of([0.0] * 24, 24)}
    said = acceptance.judge(mine, theirs, decided)
    assert said["relative_drop_pct"] == {"half": 0, "few": 0, "weak": 100, "good": pytest.approx(100 / 12)}
    assert said["avg_relative_drop_pct"] == pytest.approx(100 / 24)  # each family weighs the same
    low, high = said["avg_relative_drop_ci95"]
    assert said["accepted"] is False and 0 <= low < said["avg_relative_drop_pct"] < high
    better = acceptance.judge(theirs | {"half": family_of([1.0] * 24, 6)}, theirs, decided)
    assert better["avg_relative_drop_pct"] == -50 and better["accepted"] is True  # a gain is a negative drop
    same = acceptance.judge(theirs, theirs, decided)
    assert same["avg_relative_drop_ci95"] == [0, 0] and same["accepted"] is True
    none = acceptance.judge(theirs, theirs, decided | {"averaged": []})
    assert none["avg_relative_drop_pct"] is none["avg_relative_drop_ci95"] is none["accepted"] is None


# ---- what is made of it


def test_claims(measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(config: str, tpot: float, ci: str = "0.01") -> dict[str, str]:
        case = {"config_id": config, "model": "m", "prompt_len": "128", "output_len": "64", "processor": "P",
                "kv_cache_dtype": "auto"}  # fmt: skip
        return case | {"tpot_p50_ms_mean": str(tpot), "tpot_p50_ms_ci95": ci}

    one, two, three, four = w4_claims.answer([[row("C3", 5.0), row("C4", 5.05), row("C2", 6.0)]], measured)
    assert one["holds"] and one["figures"][0]["ratio"] == pytest.approx(1.01)
    assert two["figures"][0]["config_id"] == "C3" and two["figures"][2]["C4 over C3"] == pytest.approx(1, abs=0.005)
    assert [figure["config_id"] for figure in three["figures"][:3]] == ["C5_m0", "C5_m3", "C5_m5"]
    assert four["holds"] and len(four["figures"]) == 2
    slower = w4_claims.answer([[row("C3", 5.0), row("C4", 5.5), row("C2", 4.0)]], None)
    assert [claim["holds"] for claim in slower] == [False, None, None, False]
    assert slower[0]["why"] == "1 of 1 cells are more than 2 % apart"
    assert slower[1]["why"] == "no quality of C3 and C4"
    # What was measured elsewhere is not beside it.
    apart = [[row("C3", 5.0)], [row("C4", 5.0) | {"processor": "Q"}]]
    assert w4_claims.answer(apart, None)[0]["why"] == "no times of C4 beside C3"
    # Where repeats differ by more than what is to be told, nothing is.
    noisy = w4_claims.answer([[row("C3", 5.0, "0.4"), row("C4", 5.01, "0.4")]], None)[0]
    assert noisy["holds"] is None and noisy["why"] == "1 of 1 cells vary by too much to tell 2 %"
    # Of windows of text, too.
    windows = {"C5_m0": [2.10, 1.90, 2.0], "C5_m3": [2.01, 1.81, 1.9], "C5_m5": [2.0, 1.82, 1.9]}
    cells = [{"case": {"config_id": name, "task": "held_out"}, "window_losses": losses}
             for name, losses in windows.items()]  # fmt: skip
    sweep = {"configs": {name: measured["configs"][name] for name in windows}, "cells": cells}
    falls = w4_claims.answer([], sweep)[2]
    assert falls["holds"] is None and falls["why"] == "C5_m3 and C5_m5 cannot be told apart"
    assert falls["figures"][3]["C5_m0 over C5_m3"] == pytest.approx(math.exp(28 / 300))
    cells[2]["window_losses"] = [2.05, 1.85, 1.94]
    assert w4_claims.answer([], sweep)[2]["holds"] is False
    cells[2]["window_losses"] = [1.99, 1.79, 1.88]
    assert w4_claims.answer([], sweep)[2]["holds"] is True
    path, out = tmp_path / "q.json", tmp_path / "c.json"
    results.write(path, measured)
    assert w4_claims.main(["--quality_json", str(path), "--output", str(out)]) == 0
    assert "1. C3 and C4 are equally fast: not decided" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["claims"]) == 4
    assert w4_claims.main([]) == 2
    _, shown = tables_w4.claim_rows({"claims": [one, two, three, four, slower[1]]})
    assert shown[0][1:] == ("holds", "time per token of C4 / C3 (m, P): 1.010 to 1.010 in 1 cells")
    assert shown[1][2].startswith("perplexity of C4 over C3: ") and "; accuracy of C3 " in shown[1][2]
    assert shown[4][1:] == ("not decided: no quality of C3 and C4", "-")


def test_claims_about_linear_layers(tmp_path: Path) -> None:
    """Of kvcomp bench w4: C3 are exact scales of 128, C4 E5M5, C2 bitsandbytes."""

    def cell(impl: str, group: int, mbits: int | None, us: float, m: int = 1) -> dict[str, Any]:
        case = {"n": 8, "k": 4, "m": m, "group": group, "scale_mbits": mbits, "dtype": "bf16"}
        return {"impl": impl, "case": case, "median_us": us, "samples_us": [us - 0.01, us, us + 0.01]}

    cells = [
        cell("kvcomp", 128, -1, 10.0), cell("kvcomp", 128, 5, 10.1), cell("kvcomp", 32, -1, 90.0),
        cell("bitsandbytes NF4", 64, None, 20.0), cell("torch int4", 128, None, 1.0), cell("kvcomp", 128, 5, 50.0, 2),
        {"impl": "kvcomp weights", "case": {"group": 128, "scale_mbits": 5}, "rel_mse": 0.1},
        {"impl": "torch sum", "case": {"read": "sum"}, "role": "ceiling"},
    ]  # fmt: skip
    found = results.new("w4", command="test") | {"cells": cells, "machine": {"gpu": "G", "cpu": "P"}}
    one, _, _, four = w4_claims.answer([], None, [found])
    assert [(f["config_id"], f["place"], f["ratio"]) for f in one["figures"]] == [("C4", "G", pytest.approx(1.01))]
    assert one["holds"] and 0 < one["figures"][0]["ratio_ci95"] < 0.01
    assert four["holds"] and [f["ratio"] for f in four["figures"]] == [pytest.approx(0.5), pytest.approx(0.505)]
    cells[1]["median_us"] = 10.7
    assert w4_claims.answer([], None, [found])[0]["holds"] is False
    path, out = tmp_path / "w4.json", tmp_path / "c.json"
    results.write(path, found)
    assert w4_claims.main(["--bench_json", str(path), "--output", str(out)]) == 0
    _, shown = tables_w4.claim_rows(results.read(out, kind="w4_claims"))
    assert shown[0][1:] == (
        "does not hold: 1 of 1 cells are more than 2 % apart",
        "linear layers' time of C4 / C3 (G): 1.070 to 1.070 in 1 cells",
    )
    assert w4_claims.main(["--bench_json", str(tmp_path / "none.json")]) == 2


def test_tables(measured: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "experiments" / "results" / "w4_quality.json"
    results.write(path, measured)
    text = "<!-- table: w4_quality -->\n<!-- /table -->\n<!-- table: w4_tasks -->\n<!-- /table -->\n"
    made = tables.render(text, tmp_path).splitlines()
    assert made[1].startswith("|  | bits per weight | perplexity") and "average drop < 3 %" in made[1]
    shown = {line.split(" | ")[0].removeprefix("| "): line for line in made}
    assert "16.000" in shown["C0: 16 bit"] and "4.078" in shown["C4: E5M5 of 128, mlp"]
    assert "C3: exact of 128, mlp" in shown and "C7: E5M5 of 128, all" in shown
    assert shown["needle multi key"].count("%") == 7 and "| 4 | yes |" in shown["needle single"]


def test_pareto(measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [("a", 1.0, 5.0), ("b", 2.0, 4.0), ("c", 3.0, 4.0), ("d", 2.0, 6.0)]
    assert [name for name, *_ in w4_pareto.pareto_front(points)] == ["a", "b"]
    # 8 bits for each of 3072 * 24 groups; the seed's 144 KiB of fp16.
    assert w4_pareto.scale_bytes(3072, 3072, 128, 3) == 3072 * 24
    assert w4_pareto.scale_bytes(3072, 3072, 128, -1) == 144 * 1024
    pytest.importorskip("matplotlib")
    path, out = tmp_path / "q.json", tmp_path / "p.png"
    results.write(path, measured)
    assert w4_pareto.main(["--lmeval_jsons", str(path), str(path), "--out_png", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert w4_pareto.main(["--agg_csv", str(path)]) == 2
    assert "expected a table of aggregate_results.py" in capsys.readouterr().err
    for main in (w4_pareto.main, w4_claims.main):
        assert main(["--agg_csv", str(tmp_path / "nowhere.csv")]) == 2
        assert "nowhere.csv: expected a file that can be used, got: No such file" in capsys.readouterr().err
    assert w4_pareto.main(["--out_png", str(tmp_path / "p.xyz")]) == 2
