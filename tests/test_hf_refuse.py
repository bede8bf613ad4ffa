"""What kvcomp.Cache does not do is refused by one sentence that names it, and nothing is changed."""

import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from test_hf_models import build, config, decode, tokens  # noqa: E402

EXACT = kvcomp.Policy(bits=16)
GREEDY = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def for_model(kind: str, **settings: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **settings)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: config("mistral", sliding_window=128), "expected full_attention in every layer, got sliding"),
        (lambda: for_model("gemma3_text"), "got sliding_attention in layer 0"),
        (lambda: for_model("llama4_text"), "got chunked_attention in layer 0"),
        (lambda: for_model("qwen3_next"), "got linear_attention in layer 0"),
        (lambda: for_model("mamba"), "got linear_attention in layer 0"),
        (lambda: for_model("jamba"), "got linear_attention in layer 0"),
        (lambda: for_model("rwkv"), "expected attention layers, got rwkv, a recurrent model"),
        (lambda: for_model("deepseek_v3"), r"deepseek_v3 with MLA \(kv_lora_rank=512\)"),
        (lambda: for_model("gpt_oss"), "expected attention without sinks, got gpt_oss, which passes s_aux"),
        (lambda: for_model("bart"), "expected a decoder-only model, got bart, an encoder-decoder"),
        (lambda: for_model("gemma3n_text"), "num_kv_shared_layers"),
        (lambda: config("llama", head_dim=72), r"expected head_dim in \(64, 80, 96, 128, 256\), got 72"),
        (lambda: config("llama", attn_implementation="eager", output_attentions=True), "output_attentions=False"),
    ],
)
def test_refused_at_construction(make: Any, sentence: str) -> None:
    settings = make()
    before = settings._attn_implementation
    with pytest.raises(NotImplementedError, match=sentence) as caught:
        kvcomp.Cache(settings, EXACT)
    assert str(caught.value).startswith("Cache: config: expected ") and "\n" not in str(caught.value)
    assert settings._attn_implementation == before


def test_wrong_arguments(model: Any) -> None:
    with pytest.raises(TypeError, match=r"Cache: policy: expected a kvcomp.Policy, got int"):
        kvcomp.Cache(model.config, 4)
    with pytest.raises(TypeError, match=r"Cache: config: expected a transformers configuration, got LlamaForCausalLM"):
        kvcomp.Cache(model, EXACT)
    with pytest.raises(TypeError, match=r"compress: model: expected a transformers model that generates, got dict"):
        kvcomp.compress({}, EXACT)
    with pytest.raises(TypeError, match=r"compress: policy: expected a kvcomp.Policy, got str"):
        kvcomp.compress(model, "8x")


def test_implementation_without_a_mask_function() -> None:
    settings = config("llama", attn_implementation="eager")
    settings._attn_implementation = "nobody's"
    with pytest.raises(NotImplementedError, match="expected an attention implementation with a mask function"):
        kvcomp.Cache(settings, EXACT)
    assert settings._attn_implementation == "nobody's"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([1, 1, 1, 1, 0, 0], "expected padding on the left, got padding on the right in sequence 1"),
        ([0, 1, 0, 1, 1, 1], "expected padding on the left, got holes in sequence 1"),
    ],
)
def test_prompts_that_are_not_left_padded(model: Any, row: list[int], sentence: str) -> None:
    cache = kvcomp.Cache(model.config, EXACT)
    mask = torch.tensor([[1] * 6, row])
    with torch.no_grad(), pytest.raises(ValueError, match=sentence):
        model(tokens(2, 6), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == cache.nbytes == 0
    model.generate(tokens(2, 6), past_key_values=cache, **GREEDY)  # usable as if nothing had happened


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (
            kvcomp.Policy(bits=4, group=48),
            "page_bytes: group: expected a divisor of head_dim 64 that is a multiple of ",
        ),
        (
            kvcomp.Policy(target_ratio=4, group=128),
            "page_bytes: group: expected a divisor of head_dim 64 that is a mul",
        ),
        (
            kvcomp.Policy(bits=4, rotation=kvcomp.Rotation.random(2, 2, 128)),
            r"compress: rotation: expected matrices of 2 layers, 2 heads and 64 channels, got Rotation\(2 layers, 2 h",
        ),
        (
            kvcomp.Policy(target_ratio=4, rotation=kvcomp.Rotation.random(3, 2, 64), prefill="layerwise"),
            r"compress: rotation: expected matrices of 2 layers, 2 heads and 64 channels, got Rotation\(3 layers, 2 h",
        ),
        (
            kvcomp.Policy(target_ratio=4, prefill="layerwise", layer_weights=(1, 2, 3)),
            "compress: layer_weights: expected one for each of 2 layers, got 3",
        ),
    ],
    ids=["group", "wide group", "head_dim", "layers", "weights"],
)
def test_policies_for_another_model(model: Any, policy: kvcomp.Policy, sentence: str) -> None:
    """The first pass says so; the cache stays empty, and the model is as it was."""
    cache, ids = kvcomp.Cache(model.config, policy), tokens(1, 40)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match=f"^{sentence}"):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == cache.nbytes == 0
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"^{sentence}"), kvcomp.compress(model, policy):
        model.generate(ids, **GREEDY)
    assert model.config._attn_implementation == before
    model.generate(ids, past_key_values=kvcomp.Cache(model.config, EXACT), **GREEDY)


def test_later_masks_that_deny_what_is_stored(model: Any) -> None:
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = 0
    cache, plain = kvcomp.Cache(model.config, EXACT), transformers.DynamicCache(config=model.config)
    decode(model, cache, ids[:, :30], 30, attention_mask=mask[:, :30])
    nbytes = cache.nbytes
    wrong = mask.clone()
    wrong[1, 12] = 0
    right = mask.clone()
    right[1, 38:] = 0
    for bad, sentence in (
        (wrong, r"\(what is stored cannot be masked later\), got another value for sequence 1, position 12"),
        (right, "got padding on the right in sequence 1"),
        (mask[:, 30:], r"expected shape \(2, 40\), all positions seen and the new ones, got \(2, 10\)"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=sentence):
            model(ids[:, 30:], attention_mask=bad, past_key_values=cache)
        assert (cache.get_seq_length(), cache.nbytes) == (30, nbytes)
    ours = decode(model, kvcomp.Cache(model.config, EXACT), ids, 30, attention_mask=mask)
    assert (ours - decode(model, plain, ids, 30, attention_mask=mask)).abs().max() < 0.1 * ours.std()


def test_masks_of_another_shape_or_pattern(model: Any) -> None:
    cache = kvcomp.Cache(model.config, EXACT)
    full = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=r"expected a causal mask, made from \(b, positions\), got"),
    ):
        model(tokens(1, 8), attention_mask=full, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_autograd_through_the_cache(model: Any) -> None:
    cache = kvcomp.Cache(model.config, EXACT)
    with pytest.raises(NotImplementedError, match="expected no autograd through a packed cache"):
        model(tokens(1, 8), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("extra", [{"assistant": True}, {"prompt_lookup_num_tokens": 3}])
def test_assisted_generation(model: Any, extra: dict[str, Any]) -> None:
    settings = {"assistant_model": build("llama")} if extra.get("assistant") else extra
    cache = kvcomp.Cache(model.config, EXACT)
    with pytest.raises(NotImplementedError, match="assisted generation: expected a cache that can be cropped"):
        model.generate(tokens(1, 8), past_key_values=cache, **settings, **GREEDY)


def test_crop_and_offload(model: Any) -> None:
    cache = kvcomp.Cache(model.config, EXACT)
    model.generate(tokens(1, 8), past_key_values=cache, **GREEDY)
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="crop: expected 0 for a packed cache, got -2"):
        cache.crop(-2)
    with pytest.raises(NotImplementedError, match="offload"):
        cache.offload(0)
    assert cache.get_seq_length() == 11


def test_output_attentions_at_run_time() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    cache = kvcomp.Cache(model.config, EXACT)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="output_attentions: expected none with a packed"):
        model(tokens(1, 8), past_key_values=cache, output_attentions=True)
    with torch.no_grad():
        assert model(tokens(1, 8), output_attentions=True).attentions[0].shape == (1, 2, 8, 8)


@pytest.mark.parametrize(
    ("name", "value"), [("s_aux", torch.zeros(2)), ("sliding_window", 64), ("is_causal", False), ("dropout", 0.1)]
)
def test_arguments_of_the_attention_function(model: Any, name: str, value: Any) -> None:
    """Models hand these to the attention function; the packed layer refuses them, before and after the prompt."""
    cache = kvcomp.Cache(model.config, EXACT)
    function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["kvcomp"]
    module = model.model.layers[0].self_attn
    query, key = torch.randn(1, 2, 8, 64), torch.randn(1, 2, 8, 64)
    with pytest.raises(NotImplementedError, match=f"Cache: {name}"):
        function(module, query, *cache.update(key, key, 0), None, scaling=0.125, **{name: value})
    assert cache.get_seq_length() == 0


def test_the_mark_on_the_keys_is_lost(model: Any) -> None:
    """A model that changes keys between update and attention: an error naming the layer, never a silent fallback; and
    plain generation goes on."""
    cache = kvcomp.Cache(model.config, EXACT)
    function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["kvcomp"]
    module = model.model.layers[0].self_attn
    key = torch.randn(1, 2, 8, 64)
    marked, values = cache.update(key, key, 0)
    with pytest.raises(RuntimeError, match="layer 0: the mark on its keys was lost between update and attention"):
        function(module, key, marked + 0, values, None, scaling=0.125)
    model.generate(tokens(1, 8), **GREEDY)
    marked, values = kvcomp.Cache(model.config, EXACT).update(key, key, 0)
    function(module, key, marked, values, None, scaling=0.125)
    with pytest.raises(RuntimeError, match="layer 0: expected one attention call for every update, got two"):
        function(module, key, marked, values, None, scaling=0.125)


def test_a_cache_of_another_configuration(model: Any) -> None:
    """Nothing would ever read the packed layers: the second layer's update says so."""
    cache = kvcomp.Cache(config("llama"), EXACT)
    with pytest.raises(RuntimeError, match="layer 0: its attention did not run as 'kvcomp'"):
        build("llama").generate(tokens(1, 8), past_key_values=cache, **GREEDY)
    cache = kvcomp.Cache(config("llama", layers=1), EXACT)
    with pytest.raises(RuntimeError, match="layer 0: its attention did not run as 'kvcomp'"):
        build("llama", layers=1).generate(tokens(1, 8), past_key_values=cache, **GREEDY)


def test_an_interrupted_pass(model: Any) -> None:
    """A later pass that stops half-way leaves layers of different lengths: refused until reset()."""
    cache = kvcomp.Cache(model.config, EXACT)
    decode(model, cache, tokens(1, 20), 20)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(tokens(1, 1), past_key_values=cache)
    hook.remove()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"an earlier pass that did not finish; reset\(\) empties"):
        model(tokens(1, 1), past_key_values=cache)
    cache.reset()
    decode(model, cache, tokens(1, 20), 20)
    assert cache.get_seq_length() == 20


def test_other_devices_and_types(model: Any) -> None:
    cache = kvcomp.Cache(model.config, EXACT)
    far = torch.empty(1, 2, 8, 64, device="meta")
    with pytest.raises(NotImplementedError, match="Cache: keys and values: expected CPU or CUDA tensors, got meta"):
        cache.update(far, far, 0)
    wide = torch.zeros(1, 2, 8, 64, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"expected float32, float16 or bfloat16, got torch\.float64"):
        cache.update(wide, wide, 0)
    with pytest.raises(NotImplementedError, match=r"expected the same shape, got .* \(MLA\?\)"):
        cache.update(torch.zeros(1, 2, 8, 96), torch.zeros(1, 2, 8, 64), 0)
    assert cache.get_seq_length() == 0


def test_without_transformers() -> None:
    """`import kvcomp` needs neither torch nor transformers; kvcomp.Cache says what is missing."""
    code = """
import sys
import kvcomp
assert not {"torch", "transformers"} & set(sys.modules)
sys.modules["transformers"] = None
kvcomp.Cache
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    sentence = "ImportError: kvcomp.hf: expected torch and transformers (pip install 'kvcomp[hf]'), got: "
    assert done.stderr.splitlines()[-1].startswith(sentence), done.stderr
