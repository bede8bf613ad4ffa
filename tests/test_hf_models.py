"""Small random models of the families that kvcomp.Cache is for, and: what the packed cache gives against what the plain
model gives, teacher-forced. The other test_hf files build their models here."""

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402

VOCABULARY = 211
# family: query heads, KV heads, head_dim
SHAPES = {"llama": (2, 2, 64), "mistral": (4, 2, 80), "qwen2": (4, 1, 128), "qwen3": (4, 2, 64), "gemma2": (4, 2, 64)}


def config(family: str, layers: int = 2, **changes: Any) -> Any:
    """A configuration whose weights are large enough for attention and logits to have something to decide."""
    heads, kv_heads, head_dim = SHAPES[family]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 32768,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "gemma2":
        settings |= {"layer_types": ["full_attention"] * layers, "attn_logit_softcapping": 3.0}
        settings |= {"query_pre_attn_scalar": head_dim, "attn_implementation": "eager"}
    return transformers.AutoConfig.for_model(family, **settings | changes)


def build(family: str, dtype: Any = torch.float32, layers: int = 2, **changes: Any) -> Any:
    torch.manual_seed(sum(map(ord, family)))
    return transformers.AutoModelForCausalLM.from_config(config(family, layers, **changes)).to(dtype).eval()


def tokens(*shape: int, seed: int = 0) -> Any:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def decode(model: Any, cache: Any, ids: Any, prompt: int, step: int = 1, **inputs: Any) -> Any:
    """Logits (b, positions - prompt + 1, vocabulary) of the positions from the prompt's last on, teacher-forced: the
    prompt in one pass, what follows in passes of `step` rows."""
    mask = inputs.pop("attention_mask", None)
    rows = []
    with torch.no_grad():
        for start, end in [(0, prompt), *((at, at + step) for at in range(prompt, ids.shape[1], step))]:
            part = {name: value[:, start:end] for name, value in inputs.items()}
            seen = None if mask is None else mask[:, :end]
            out = model(ids[:, start:end], past_key_values=cache, attention_mask=seen, use_cache=True, **part)
            rows.append(out.logits[:, -1:] if start == 0 else out.logits)
    return torch.cat(rows, 1).float()


def whole(model: Any, ids: Any, prompt: int, implementation: str | None = None) -> Any:
    """The same logits from one pass without a cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation or before)
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits[:, prompt - 1 :].float()
    finally:
        model.set_attn_implementation(before)


def gap(logits: Any) -> Any:
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


class HalfCache(transformers.DynamicCache):
    """The plain cache, with K and V rounded to 16 bits once the prompt has been attended over, as the packed cache
    stores them for a 32-bit model."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        prompt = self.get_seq_length(layer_idx) == 0
        exact = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        layer.keys, layer.values = layer.keys.half().float(), layer.values.half().float()
        return exact if prompt else (layer.keys, layer.values)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_choose_the_same_token(family: str, dtype: str) -> None:
    """bits=16 is exact storage for a 16-bit model: wherever the plain model's two best tokens lie further apart than
    its own sdpa and eager attention, the packed cache has the plain model's best one."""
    model = build(family, getattr(torch, dtype))
    ids = tokens(1, 130)
    plain = whole(model, ids, 90)
    # sdpa knows no softcap: there the eager attention's own rounding is measured, against the same model in 32 bits.
    other = whole(build(family, getattr(torch, dtype)).float(), ids, 90) if family == "gemma2" else None
    noise = (plain - (whole(model, ids, 90, "eager") if other is None else other)).abs().max()
    packed = decode(model, kvcomp.Cache(model.config, kvcomp.Policy(bits=16)), ids, 90)
    decided = gap(plain) > noise
    assert decided.sum() >= 20, "the model decides too little for this test"
    assert (packed.argmax(-1) == plain.argmax(-1))[decided].all()


@pytest.mark.parametrize("family", SHAPES)
def test_a_32_bit_model_is_rounded_to_16_bits_and_nothing_else(family: str) -> None:
    """The plain cache with K and V rounded to 16 bits explains the whole difference from the exact one, but for values
    that lie on the edge of two 16-bit numbers."""
    model = build(family)
    ids = tokens(1, 110)
    rounded = decode(model, HalfCache(config=model.config), ids, 80)[:, 1:]
    packed = decode(model, kvcomp.Cache(model.config, kvcomp.Policy(bits=16)), ids, 80)[:, 1:]
    exact = whole(model, ids, 80)[:, 1:]
    assert (packed - rounded).square().mean().sqrt() <= 0.2 * (packed - exact).square().mean().sqrt()


class NoisyCache(transformers.DynamicCache):
    """The plain cache with Gaussian noise of relative mean square `error` on the prompt's K and V."""

    def __init__(self, error: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.error = error

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        prompt = self.get_seq_length(layer_idx) == 0
        given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if prompt:
            layer, source = self.layers[layer_idx], torch.Generator().manual_seed(layer_idx)
            layer.keys, layer.values = (
                rows
                + torch.randn(rows.shape, generator=source) * (self.error * rows.square().mean(-1, keepdim=True)).sqrt()
                for rows in given
            )
        return given


# Mean squared error of N(0, 1) rows of 128 at these bits (the bounds that pack keeps to; at 8 bits, measured).
DISTORTION = {8: 6e-5, 4: 0.012, 3: 0.038, 2: 0.12}


@pytest.mark.parametrize("bits", DISTORTION)
@pytest.mark.parametrize("family", SHAPES)
def test_few_bits_cost_what_their_distortion_says(family: str, bits: int) -> None:
    """The logits' error, root mean square, is at most a quarter above that of noise as strong as the packing error is
    allowed to be; and above the error at 16 bits, or nothing has been quantized."""
    model = build(family)
    ids = tokens(1, 300)
    plain = whole(model, ids, 280)[:, 1:]

    def error(cache: Any) -> float:
        return float((decode(model, cache, ids, 280)[:, 1:] - plain).square().mean().sqrt())

    packed = error(kvcomp.Cache(model.config, kvcomp.Policy(bits=bits)))
    assert packed <= 1.25 * error(NoisyCache(DISTORTION[bits], config=model.config))
    assert packed > 3 * error(kvcomp.Cache(model.config, kvcomp.Policy(bits=16)))
