"""Linear layers that multiply in float32 where torch has no bfloat16 instructions."""

from __future__ import annotations

import copy

import pytest
import torch
from experiment_support import EXPERIMENTS, save_model
from kvcomp.eval import products
from kvcomp.experiment import workload

BF16 = torch.bfloat16


def layers(dtype: torch.dtype = BF16, *, bias: bool = True) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 40, bias=bias), torch.nn.SiLU(), torch.nn.Linear(40, 24)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 96), (1, 5, 96), (3, 1, 96)])
def test_rounded_once(shape: tuple[int, ...], bias: bool) -> None:
    """Within half a step of bfloat16, and float32's own error, of the exact product; the layer's dtype and shape."""
    layer = layers(bias=bias)[:1]
    products.multiply_in_float32(layer)
    x = torch.randn(shape).to(BF16)
    got = layer(x)
    exact = torch.nn.functional.linear(x.double(), layer[0].weight.double(), layer[0].bias.double() if bias else None)
    assert got.dtype == BF16 and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all()


def test_one_row_is_torchs() -> None:
    plain = layers()
    changed = copy.deepcopy(plain)
    products.multiply_in_float32(changed)
    x = torch.randn(1, 1, 96).to(BF16)
    assert torch.equal(changed(x), plain(x))


def test_other_dtypes_are_left() -> None:
    plain = layers(torch.float32)
    products.multiply_in_float32(plain)
    assert all("forward" not in vars(layer) for layer in plain)


def test_a_copy_has_its_own_weights() -> None:
    first = layers()
    products.multiply_in_float32(first)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight.zero_()
    x = torch.randn(4, 96).to(BF16)
    assert torch.equal(second[0](x), second[0].bias.expand(4, -1))
    assert not torch.equal(first[0](x), second[0](x))


@pytest.mark.parametrize("slow", [True, False])
def test_loaded_models(tmp_path, monkeypatch, slow: bool) -> None:  # type: ignore[no-untyped-def]
    """A model that is measured multiplies so where it is sooner, and nowhere else."""
    monkeypatch.setattr(products, "slow_bfloat16", lambda: slow)
    folder = save_model(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=BF16).save_pretrained(folder)
    subject = workload.load(folder, EXPERIMENTS / "data" / "held_out.txt")
    linear = [module for module in subject.model.modules() if type(module) is torch.nn.Linear]
    assert linear and all(("forward" in vars(module)) == slow for module in linear)
    with torch.inference_mode():
        assert subject.model(torch.arange(7)[None]).logits.dtype == BF16
