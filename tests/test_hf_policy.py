"""Budgets of kvcomp.Cache: what is held, what it is for, what was asked for, and what happens when it cannot be had."""

import warnings
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from kvcomp.hf import state  # noqa: E402
from kvcomp.prompt import Compressor  # noqa: E402
from test_hf_models import build, tokens  # noqa: E402

GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
SELECTORS = {
    "none": None,
    "full": kvcomp.Full(),
    "streaming": kvcomp.Streaming(),
    "snap": kvcomp.SnapKV(window=16),
    "pyramid": kvcomp.PyramidKV(window=16, keep=0.3),
    "hybrid": kvcomp.Hybrid(window=16, keep=0.3, min_tokens=8),
}
PADDING = 200


@pytest.fixture(scope="module")
def model() -> Any:
    return build("qwen3", torch.bfloat16)


@pytest.fixture(scope="module")
def prompt() -> dict[str, Any]:
    mask = torch.ones(2, 600, dtype=torch.long)
    mask[0, :PADDING] = 0
    return {"input_ids": tokens(2, 600) * mask, "attention_mask": mask}


def bf16_bytes(model: Any) -> int:
    """Of the prompt's real tokens: tokens, layers, K and V, KV heads, head_dim, 2 bytes."""
    return (2 * 600 - PADDING) * 2 * 2 * model.config.num_key_value_heads * model.config.head_dim * 2


def prefill(model: Any, prompt: dict[str, Any], policy: kvcomp.Policy) -> kvcomp.Cache:
    cache = kvcomp.Cache(model.config, policy)
    with torch.no_grad():
        model(**prompt, past_key_values=cache)
    return cache


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("ratio", [3, 6])
def test_a_ratio_is_met(model: Any, prompt: dict[str, Any], selector: str, ratio: float) -> None:
    policy = kvcomp.Policy(target_ratio=ratio, select=SELECTORS[selector], sinks=4, window=16)
    cache = prefill(model, prompt, policy)
    assert cache.nbytes <= bf16_bytes(model) / ratio
    assert cache.ratio == bf16_bytes(model) / cache.nbytes
    assert cache.report.prompt_tokens == 2 * 600 - PADDING
    before = cache.ratio
    model.generate(
        input_ids=torch.cat([prompt["input_ids"], tokens(2, 1)], 1),
        attention_mask=torch.nn.functional.pad(prompt["attention_mask"], (0, 1), value=1),
        past_key_values=cache,
        **GREEDY,
    )
    assert cache.ratio == before  # of the prompt, whatever comes after it
    assert cache.get_seq_length() == 608


def test_what_is_handed_to_compression_and_that_it_is_let_go(
    model: Any, prompt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """K, V and the last queries exactly as attention had them, where each sequence begins, the logits' scale; all
    layers at once; and nothing of it is alive once the first pass has ended."""
    had: list[tuple[Any, ...]] = []
    attend = transformers.AttentionInterface._global_mapping["sdpa"]

    def spy(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        had.append((query[:, :, -16:].clone(), key.clone(), value.clone(), kwargs["scaling"]))
        return attend(module, query, key, value, *args, **kwargs)

    alive: list[weakref.ref[Any]] = []

    class Watched(Compressor):
        def add(self, layer: Any) -> None:
            *tensors, scale = had[-1]
            for given, expected in zip((layer.queries, layer.keys, layer.values), tensors, strict=True):
                assert torch.equal(given, expected)
                alive.append(weakref.ref(given))
            for given in (layer.keys, layer.values):
                assert given.untyped_storage().nbytes() == given.nbytes  # not a part of something larger
            assert (layer.first.tolist(), layer.scale, layer.softcap) == ([PADDING, 0], scale, 0.0)
            super().add(layer)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", spy)
    monkeypatch.setattr(state, "Compressor", Watched)
    cache = prefill(model, prompt, kvcomp.Policy(target_ratio=4, select=SELECTORS["snap"]))
    assert cache.nbytes > 0 and len(alive) == 6
    assert not any(tensor() is not None for tensor in alive)


@pytest.mark.parametrize(
    "policy",
    [kvcomp.Policy(bits=2), kvcomp.Policy(bits=16), kvcomp.Policy(k_bits=4, v_bits=3), kvcomp.Policy(fraction=0.2)],
)
def test_the_ledger_sums_to_what_is_held(model: Any, prompt: dict[str, Any], policy: kvcomp.Policy) -> None:
    cache = prefill(model, prompt, policy)
    ledger = cache.ledger()
    assert list(ledger) == ["codes", "scales", "positions", "page_table", "slack", "window"]
    assert sum(ledger.values()) == cache.nbytes and min(ledger.values()) >= 0
    packed = cache._state.packed
    assert cache.nbytes == packed.arena.nbytes + sum(layer.table_bytes for layer in packed.layers)


def test_bytes_follow_the_bits(model: Any, prompt: dict[str, Any]) -> None:
    held = [prefill(model, prompt, kvcomp.Policy(bits=bits)).nbytes for bits in (2, 3, 4, 8, 16)]
    assert held == sorted(held)
    assert bf16_bytes(model) <= held[-1] <= 1.1 * bf16_bytes(model)


def test_decode_grows_by_what_it_appends(model: Any, prompt: dict[str, Any]) -> None:
    """256 tokens more at 4 bits: at most what they take at 16 bits, at least what they take at 4."""
    cache = prefill(model, prompt, kvcomp.Policy(bits=4))
    before = cache.nbytes
    mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 256), value=1)
    with torch.no_grad():
        model(tokens(2, 256), attention_mask=mask, past_key_values=cache)
    row = 2 * 256 * 2 * 2 * model.config.num_key_value_heads * model.config.head_dim
    assert row / 2 <= cache.nbytes - before <= row * 2
    assert sum(cache.ledger().values()) == cache.nbytes


def test_a_budget_below_the_smallest_plan(model: Any, prompt: dict[str, Any]) -> None:
    """generate keeps the smallest plan, and says so once."""
    policy = kvcomp.Policy(budget_bytes=64, sinks=8, window=32)
    cache = kvcomp.Cache(model.config, policy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = model.generate(**prompt, past_key_values=cache, **GREEDY)
    said = [warning for warning in caught if issubclass(warning.category, kvcomp.BudgetWarning)]
    assert len(said) == 1
    assert "Cache: policy: expected a budget of at least" in str(said[0].message)
    assert "got 64 bytes: the smallest plan is kept" in str(said[0].message)
    assert out.shape == (2, 608) and cache.nbytes > 64
    assert cache.report.over_budget
    # Sinks and window alone: 40 tokens of every list, and those that generate has added.
    assert set(cache._state.packed.layers[0].tokens.tolist()) == {47}


def test_a_budget_that_fits_says_nothing(model: Any, prompt: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", kvcomp.BudgetWarning)
        cache = prefill(model, prompt, kvcomp.Policy(budget_bytes=bf16_bytes(model) // 4))
    assert cache.nbytes <= bf16_bytes(model) // 4
