"""Layers that read the same rows as one product in compiled decode steps (kvcomp.hf.joined)."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from kvcomp.hf import graph, joined  # noqa: E402
from test_hf_cuda import FOUR, generated  # noqa: E402
from test_hf_generate import padded  # noqa: E402
from test_hf_models import build, tokens  # noqa: E402


def weights(model: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_as_it_was(model: Any, before: dict[str, Any]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.untyped_storage().nbytes() == value.nbytes, name
    for module in model.modules():
        assert not any(name.startswith("_kvc") for name in vars(module)) and type(module) is not joined._Part


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_product_for_several_layers(family: str) -> None:
    """qwen2's queries, keys and values have biases."""
    model = build(family, torch.bfloat16)
    before, ids = weights(model), tokens(3, 1, 128).bfloat16()
    layer = model.model.layers[0]
    if family == "qwen2":
        with torch.no_grad():
            layer.self_attn.k_proj.bias.normal_()
            before = weights(model)
    names = [(layer.self_attn, name) for name in joined.SETS[0]] + [(layer.mlp, name) for name in joined.SETS[1]]
    with torch.no_grad():
        expected = [getattr(module, name)(ids) for module, name in names]
        both = joined.Joined(model.modules())
        assert len(both) == 2 * 2
        storages = {getattr(layer.self_attn, name).weight.untyped_storage().data_ptr() for name in joined.SETS[0]}
        assert len(storages) == 1
        calls: list[Any] = []
        linear = torch.nn.functional.linear
        with both.active(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", lambda *rows: calls.append(rows) or linear(*rows))
            got = [getattr(module, name)(ids) for module, name in names]
            assert len(calls) == 2
            other = layer.self_attn.k_proj(ids + 1)  # rows that the first one was not called with
            assert len(calls) == 3
            assert layer.self_attn.v_proj(ids).shape == expected[2].shape
        for ours, plain in zip(got, expected, strict=True):
            assert (ours.float() - plain.float()).abs().max() <= 2**-7 * plain.float().abs().max()
        assert (other.float() - layer.self_attn.k_proj(ids + 1).float()).abs().max() <= 0.1
        both.undo()
    check_as_it_was(model, before)


def test_what_is_not_joined() -> None:
    model = build("llama")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.k_proj.weight = attention.v_proj.weight  # held twice
    mlp.gate_proj = torch.nn.Sequential(mlp.gate_proj)
    assert len(joined.Joined(model.modules())) == 2
    assert len(joined.Joined(build("llama").model.layers[0].self_attn.modules())) == 1
    of_two = torch.zeros(2, 128, 128)
    for part, name in zip(of_two, ("gate_proj", "up_proj"), strict=True):
        getattr(model.model.layers[1].mlp, name).weight.data = part  # parts of something larger
    assert len(joined.Joined(model.model.layers[1].mlp.modules())) == 0


def test_compiled_steps_are_joined_and_the_model_is_as_it_was() -> None:
    from torch._inductor.utils import run_and_get_code

    model, batch = build("llama"), padded([50, 17, 33])
    before = weights(model)
    (expected, plain), _ = generated(model, FOUR, batch)
    seen: dict[str, Any] = {}

    def run() -> None:
        seen["out"], seen["packing"] = generated(model, FOUR, batch, compile=True)

    _, code = run_and_get_code(run)
    (ids, logits), packing = seen["out"], seen["packing"]
    assert torch.equal(ids, expected) and (logits - plain).abs().max() <= 1e-3 * plain.std()
    text = "".join(code)
    assert text.count("extern_kernels.mm(") + text.count("addmm") == 4  # not 7
    assert packing.steps._joined is None
    check_as_it_was(model, before)


def test_a_model_that_moved_is_joined_anew() -> None:
    model, ids = build("llama"), tokens(2, 120)
    rows: dict[bool, Any] = {}
    for moves in (False, True):
        with kvcomp.compress(model, FOUR, compile=True) as packing, torch.no_grad():
            cache, logits = kvcomp.Cache(model.config, FOUR), []
            model(ids[:, :90], past_key_values=cache)
            for at in range(90, 100):
                if moves and at == 95:
                    first = packing.steps._joined
                    for parameter in model.parameters():  # as model.to() does
                        parameter.data = parameter.data.clone()
                logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
            assert not moves or packing.steps._joined is not first
        rows[moves] = torch.cat(logits)
    assert torch.equal(rows[False], rows[True])


def test_joining_that_fails_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled without; or, for want of memory, not tried again."""
    model, batch = build("llama"), padded([50, 17, 33])
    before = weights(model)
    (expected, _), _ = generated(model, FOUR, batch)

    def fails(self: Any, input: Any) -> Any:
        raise RuntimeError("not these")

    with monkeypatch.context() as patch:
        patch.setattr(joined._Part, "forward", fails)
        (ids, _), packing = generated(model, FOUR, batch, compile=True)
    assert torch.equal(ids, expected) and packing.steps._compile is True
    check_as_it_was(model, before)

    def full(modules: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(graph, "Joined", full)
    (ids, _), _ = generated(model, FOUR, batch, compile=True)
    assert torch.equal(ids, expected)
