"""kvcomp.Cache over many steps, many caches at once, and passes that stop half-way."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from kvcomp import Policy  # noqa: E402
from kvcomp.hf import state  # noqa: E402
from kvcomp.hold import least_held  # noqa: E402
from kvcomp.layer_input import LayerInput  # noqa: E402
from kvcomp.store import PackedLayer  # noqa: E402
from test_hf_generate import GREEDY, padded, snapshot  # noqa: E402
from test_hf_models import build, decode, tokens  # noqa: E402

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc/self/status")
HOLD = Policy(target_ratio=3, decode="hold")
AFTER = {
    "bits": Policy(bits=4),
    "selected": Policy(bits=4, select=kvcomp.SnapKV(keep=0.5)),
    "ratio": Policy(target_ratio=3),
    "hold": HOLD,
    "layerwise": Policy(target_ratio=3, prefill="layerwise"),
    "layerwise hold": Policy(target_ratio=3, prefill="layerwise", decode="hold"),
    "uniform": Policy(target_ratio=3, allocate="uniform", select=kvcomp.AdaKV()),
    "h2o": Policy(target_ratio=3, select=kvcomp.H2O(keep=0.5)),
    "key norm": Policy(target_ratio=3, select=kvcomp.KeyNorm(keep=0.5, values="centered")),
    "rotated": Policy(target_ratio=3, rotation=kvcomp.Rotation.random(2, 2, 64)),
    "layer": Policy(target_ratio=3, granularity="layer"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


pytestmark = pytest.mark.filterwarnings("ignore::kvcomp.BudgetWarning")  # prompts too short for their budgets


def filled(model: Any, policy: Policy, ids: Any) -> Any:
    cache = kvcomp.Cache(model.config, policy)
    decode(model, cache, ids, ids.shape[1])
    return cache


# ---- in a process of its own, whose memory the kernel tells

PROCESS = """
import ctypes, gc, json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
import kvcomp
from kvcomp import Policy

def kib(field):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))

torch.set_num_threads(1)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 16)).eval()
ids = torch.randint(3, 64, (1, 2048))

def prefill(policy, tokens):
    cache = kvcomp.Cache(model.config, policy)
    with torch.inference_mode():
        model(ids[:, :tokens], past_key_values=cache, logits_to_keep=1)
    return cache
"""

ENDURE = """
cache = prefill(Policy(target_ratio=4, decode="hold"), 2048)
budget = 2048 * 2 * 2 * 2 * 64 * 2 // 4  # tokens, layers, K and V, heads, channels, bytes, ratio
most, finite, rss, new = cache.nbytes, True, {}, ids[:, :1]
with torch.inference_mode():
    for step in range(1, 10001):
        logits = model(new, past_key_values=cache).logits[:, -1]
        new = logits.argmax(-1, keepdim=True)
        most, finite = max(most, cache.nbytes), finite and bool(logits.isfinite().all())
        if step in (2000, 10000):
            rss[step] = kib("VmRSS")
kept = cache._state.packed.layers[0].tokens.tolist()
print(json.dumps({"budget": budget, "most": most, "least": cache.nbytes, "finite": finite, "rss": rss, "kept": kept,
                  "ledger": sum(cache.ledger().values()), "seen": cache.get_seq_length(),
                  "hold": cache._state.packed.hold_bytes}))
"""

MANY = """
prefill(Policy(target_ratio=3), 600)  # what is allocated once
def look():
    return {"rss": kib("VmRSS"), "space": kib("VmSize")}
found = {"start": look()}
caches = [prefill(Policy(target_ratio=3), 400 + i % 200) for i in range(200)]
found |= {"all": look(), "nbytes": [cache.nbytes for cache in caches]}
del caches[100:]
found |= {"half": look()}
for cache in caches:
    cache.reset()
found |= {"reset": look(), "after": sum(cache.nbytes for cache in caches)}
print(json.dumps(found))
"""


def process(code: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", PROCESS + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@linux
def test_ten_thousand_steps_hold_memory_constant() -> None:
    """At every step the cache's bytes are within the budget of 4x of 2048 tokens; between step 2000 and step 10000 the
    process grows by no more than 256 KiB, where the uncompressed cache would by 16 MiB (in 32 bits)."""
    found = process(ENDURE)
    assert found["hold"] == found["budget"]
    assert found["most"] <= found["budget"] and found["least"] >= 0.85 * found["budget"]
    assert found["finite"] and found["seen"] == 2048 + 10000
    assert found["ledger"] == found["least"] and min(found["kept"]) > 512
    assert abs(found["rss"]["10000"] - found["rss"]["2000"]) <= 256, found


@linux
def test_many_caches_alive_at_once() -> None:
    """200 caches: each has bytes of its own, memory is what they say and 5 KiB each (Python objects), address space is
    64 GiB each; closing gives all of it back."""
    found = process(MANY)
    sizes = found["nbytes"]
    for i in (0, 57, 199):
        assert sizes[i] <= (400 + i % 200) * 2 * 2 * 2 * 64 * 2 / 3
    assert sizes[0] < sizes[199] and sizes.count(0) == 0
    rss, space = ({when: found[when][kind] for when in ("start", "all", "half", "reset")} for kind in ("rss", "space"))
    held = sum(sizes) / 1024
    assert 0.95 * held <= rss["all"] - rss["start"] <= held + 200 * 5 + 4096, found
    assert 0.9 * sum(sizes[100:]) / 1024 <= rss["all"] - rss["half"], found
    assert rss["reset"] - rss["start"] <= 4096 and found["after"] == 0, found
    reserved = 64 << 20
    assert 0.99 * 200 * reserved <= space["all"] - space["start"] <= 1.01 * 200 * reserved
    assert 0.99 * 100 * reserved <= space["half"] - space["start"] <= 1.01 * 100 * reserved
    assert space["reset"] - space["start"] <= 1 << 16, found


def test_interleaved_caches_do_not_see_each_other(model: Any) -> None:
    policies = [HOLD, Policy(target_ratio=5), Policy(bits=2), Policy(target_ratio=3, prefill="layerwise")]
    sequences = [tokens(1, 500 + 30 * i, seed=i) for i in range(4)]

    def steps(cache: Any, ids: Any) -> Any:
        with torch.no_grad():
            for at in range(400, ids.shape[1]):
                yield model(ids[:, at : at + 1], past_key_values=cache).logits[0, -1]

    alone = []
    for policy, ids in zip(policies, sequences, strict=True):
        alone.append(list(steps(filled(model, policy, ids[:, :400]), ids)))
    caches = [filled(model, policy, ids[:, :400]) for policy, ids in zip(policies, sequences, strict=True)]
    running = [steps(cache, ids) for cache, ids in zip(caches, sequences, strict=True)]
    together: list[list[Any]] = [[] for _ in running]
    for turn in range(200):
        which = turn % 4 if turn % 3 else 3 - turn % 4
        together[which] += [logits for _, logits in zip(range(3), running[which], strict=False)]
    for which, rest in enumerate(running):
        together[which] += list(rest)
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) > 50 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- prompts that hardly are any


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("empty", ["one row", "all rows"])
def test_rows_that_are_all_padding(model: Any, name: str, empty: str) -> None:
    """Such a row holds nothing, and what comes later is all that it attends to: as a sequence that begins there."""
    prompt, more = (300, 90) if empty == "one row" else (40, 90)
    mask = torch.ones(2, prompt + more, dtype=torch.long)
    mask[: 1 if empty == "one row" else 2, :prompt] = 0
    ids, positions = tokens(2, prompt + more), (mask.cumsum(1) - 1).clamp(0)
    cache = kvcomp.Cache(model.config, AFTER[name])
    inputs = {"attention_mask": mask[:, :prompt], "position_ids": positions[:, :prompt]}
    decode(model, cache, ids[:, :prompt], prompt, **inputs)
    layers = cache._state.packed.layers
    assert all((layer.tokens[:2] == 0).all() and (layer.lists[:2] == 0).all() for layer in layers)
    assert empty == "one row" or all((layer.tokens == 0).all() for layer in layers)
    out = []
    with torch.no_grad():
        for at in range(prompt, prompt + more):
            part = {"attention_mask": mask[:, : at + 1], "position_ids": positions[:, at : at + 1]}
            out.append(model(ids[:, at : at + 1], past_key_values=cache, **part).logits[0, -1])
    assert all(layer.tokens[0] == more for layer in layers), "nothing of what is that new has been evicted"
    exact = kvcomp.Cache(model.config, Policy(bits=16))
    expected = decode(model, exact, ids[:1, prompt:], 1)[0]
    # The newest 64 are at 16 bits.
    assert (torch.stack(out)[:60] - expected[:60]).square().mean().sqrt() <= 0.003 * expected.std()
    assert torch.stack(out).isfinite().all()


@pytest.mark.parametrize("name", AFTER)
def test_a_prompt_of_one_token(model: Any, name: str) -> None:
    cache = filled(model, AFTER[name], tokens(2, 1))
    out = model.generate(tokens(2, 2), past_key_values=cache, **GREEDY | {"max_new_tokens": 80})
    assert out.shape == (2, 82) and cache.get_seq_length() == 81
    assert sum(cache.ledger().values()) == cache.nbytes


@pytest.mark.parametrize("chosen", [[0], [1], [1, 0, 1, 1, 0], [0, 0, 0]])
def test_a_held_budget_goes_with_its_sequences(model: Any, chosen: list[int]) -> None:
    """Sequences of 1200 and 200 tokens: each takes its tokens' share along, or what decoding needs at least; the bytes
    are inside of it at once, and stay there."""
    ids, mask = tokens(2, 1200), torch.ones(2, 1200, dtype=torch.long)
    mask[1, :1000] = 0
    cache = kvcomp.Cache(model.config, HOLD)
    decode(model, cache, ids, 1200, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0))
    packed = cache._state.packed
    held, kept = packed.hold_bytes, packed.layers[0].tokens[0]
    cache.batch_select_indices(torch.tensor(chosen))
    share = held * int(mask[chosen].sum()) // 1400
    assert packed.hold_bytes == share or (
        chosen == [1] and share < least_held(packed.layers) <= packed.hold_bytes < held
    )
    assert cache.nbytes <= packed.hold_bytes
    if chosen == [0]:
        assert packed.layers[0].tokens[0] >= 0.95 * kept
    mask = mask[chosen]
    for _ in range(100):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
        with torch.no_grad():
            model(ids[:1, :1].expand(len(mask), 1), attention_mask=mask, past_key_values=cache)
        assert cache.nbytes <= packed.hold_bytes


def test_an_empty_batch(model: Any) -> None:
    """The model cannot run one (compress_prompt can: test_selectors); the cache is as before."""
    cache = kvcomp.Cache(model.config, HOLD)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        model(tokens(0, 30), past_key_values=cache)
    assert cache.nbytes == cache.get_seq_length() == 0
    expect_usable(model, cache, HOLD, tokens(1, 320))


# ---- of_prompt


@pytest.mark.parametrize(
    "policy",
    [
        Policy(bits=4),
        Policy(target_ratio=4),
        Policy(target_ratio=4, decode="hold"),
        Policy(target_ratio=4, prefill="layerwise"),
        Policy(target_ratio=4, select=kvcomp.H2O(keep=0.6)),
    ],
    ids=["bits", "ratio", "hold", "layerwise", "h2o"],
)
def test_a_cache_of_a_prompt_equals_one_that_a_pass_has_filled(
    model: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[LayerInput] = []

    class Watched(state.Compressor):
        def add(self, layer: LayerInput) -> None:
            taken.append(
                LayerInput(
                    layer.keys.clone(), layer.values.clone(),
                    None if layer.queries is None else layer.queries.clone(), scale=layer.scale,
                )
            )  # fmt: skip
            super().add(layer)

    ids = tokens(1, 700)
    with monkeypatch.context() as patch:
        patch.setattr(state, "Compressor", Watched)
        passed = filled(model, policy, ids[:, :600])
    made = kvcomp.Cache.of_prompt(model.config, policy, taken)
    assert (made.nbytes, made.ledger(), made.ratio) == (passed.nbytes, passed.ledger(), passed.ratio)
    assert made.report == passed.report and made.get_seq_length() == passed.get_seq_length() == 600
    with torch.no_grad():
        for at in range(600, 700):
            one, other = (model(ids[:, at : at + 1], past_key_values=cache).logits for cache in (made, passed))
            assert torch.equal(one, other)
    assert made.nbytes == passed.nbytes
    with pytest.raises(ValueError, match=r"^Cache: prompt: expected 2 layers, got 1$"):
        kvcomp.Cache.of_prompt(model.config, policy, taken[:1])


# ---- prefill in chunks


def test_prompt_in_chunks_within_a_held_budget(model: Any) -> None:
    """The budget is the first chunk's; the chunks behind it live in it."""
    batch = padded([600, 500])
    cache = kvcomp.Cache(model.config, HOLD)
    out = model.generate(**batch, past_key_values=cache, **GREEDY | {"prefill_chunk_size": 256, "max_new_tokens": 40})
    first = (256 + 156) * 2 * 2 * 2 * 64 * 2
    assert out.shape == (2, 640) and cache.report.bf16_bytes == first
    packed = cache._state.packed
    assert cache.nbytes <= packed.hold_bytes == max(first // 3, packed.hold_bytes)
    assert sum(cache.ledger().values()) == cache.nbytes
    assert all((layer.tokens < 500).all() for layer in packed.layers)


@pytest.mark.parametrize("name", AFTER)
def test_prompt_in_chunks_under_every_policy(model: Any, name: str) -> None:
    cache = kvcomp.Cache(model.config, AFTER[name])
    batch, settings = padded([300, 200]), GREEDY | {"prefill_chunk_size": 128}
    out = model.generate(**batch, past_key_values=cache, **settings)
    assert out.shape == (2, 312) and sum(cache.ledger().values()) == cache.nbytes
    assert cache.get_seq_length() == 311
    assert cache.report.prompt_tokens == 128 + 28


# ---- Ctrl-C


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def interrupted(model: Any, cache: Any, ids: Any) -> None:
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)


def expect_usable(model: Any, cache: Any, policy: Policy, ids: Any) -> None:
    """The cache gives what a new one gives."""
    fresh = kvcomp.Cache(model.config, policy)
    assert torch.equal(decode(model, cache, ids, 300), decode(model, fresh, ids, 300))
    assert cache.nbytes == fresh.nbytes and cache.get_seq_length() == ids.shape[1]


def expect_refused(model: Any, cache: Any, ids: Any) -> None:
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"an earlier pass that did not finish; reset\(\) empties the cache"),
    ):
        model(ids, past_key_values=cache)


PREFILLS = {"joint": Policy(target_ratio=3), "layerwise": Policy(target_ratio=3, prefill="layerwise", decode="hold")}


@pytest.mark.parametrize("policy", PREFILLS.values(), ids=PREFILLS)
@pytest.mark.parametrize("place", ["layer", "attention", "compression", "packing"])
def test_ctrl_c_in_the_prompt(model: Any, policy: Policy, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, cache = tokens(1, 320), kvcomp.Cache(model.config, policy)
    with monkeypatch.context() as patch:
        if place == "layer":
            hook = model.model.layers[1].register_forward_pre_hook(stop)
        elif place == "attention":
            hook = None
            calls = []
            whole = torch.nn.functional.scaled_dot_product_attention

            def second(*args: Any, **kwargs: Any) -> Any:
                calls.append(0)
                return stop() if len(calls) == 2 else whole(*args, **kwargs)

            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", second)
        else:
            hook = None
            name = {"compression": "distortion_begun", "packing": "write_pages"}[place]
            patch.setattr(f"kvcomp.prompt.{name}", stop)
        interrupted(model, cache, ids[:, :300])
        if hook is not None:
            hook.remove()
    assert cache.nbytes == 0
    if place == "layer":  # nothing of the cache was running: it cannot know
        expect_refused(model, cache, ids[:, :300])
        cache.reset()
    expect_usable(model, cache, policy, ids)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("place", ["before append", "after append", "after room"])
def test_ctrl_c_in_a_layer_of_a_later_pass(layers: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last layer, where all layers have been given the new token: no pass goes on from half of one."""
    small, ids = build("llama", layers=layers), tokens(1, 320)
    cache = kvcomp.Cache(small.config, HOLD)
    decode(small, cache, ids[:, :310], 300)
    where = {"before append": "append", "after append": "_attend_observed", "after room": "_write"}[place]
    plain = getattr(PackedLayer, where)

    def last(layer: PackedLayer, *args: Any, **kwargs: Any) -> Any:
        return stop() if layer.layer == layers - 1 else plain(layer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PackedLayer, where, last)
        interrupted(small, cache, ids[:, 310:311])
    expect_refused(small, cache, ids[:, 310:311])
    with pytest.raises(RuntimeError, match=r"^save: cache: expected one between two forward passes, got"):
        cache.save("nowhere")
    cache.reset()
    expect_usable(small, cache, HOLD, ids)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_later_pass_that_ends_before_its_attention(model: Any, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between update and attention, in the model's own code: undone in the first layer, refused behind it."""
    ids, policy = tokens(1, 320), Policy(bits=8)
    cache = kvcomp.Cache(model.config, policy)
    decode(model, cache, ids[:, :310], 300)
    update = kvcomp.hf.cache.PackedCacheLayer.update

    def stopped(at: Any, *args: Any, **kwargs: Any) -> Any:
        found = update(at, *args, **kwargs)
        return stop() if at.index == layer else found

    with monkeypatch.context() as patch:
        patch.setattr(kvcomp.hf.cache.PackedCacheLayer, "update", stopped)
        interrupted(model, cache, ids[:, 310:311])
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"its attention did not run|that did not finish"):
        model(ids[:, 310:311], past_key_values=cache)
    if layer == 0:
        with torch.no_grad():
            rest = model(ids[:, 310:], past_key_values=cache).logits[0]
        fresh = kvcomp.Cache(model.config, policy)
        decode(model, fresh, ids[:, :310], 300)
        with torch.no_grad():
            assert torch.equal(rest, model(ids[:, 310:], past_key_values=fresh).logits[0])
    else:
        expect_refused(model, cache, ids[:, 310:311])
        cache.reset()
        expect_usable(model, cache, policy, ids)


def test_an_error_before_anything_is_stored_is_undone(model: Any) -> None:
    """The first layer refuses NaN: the pass may be run again with what was meant."""
    ids, cache = tokens(1, 320), kvcomp.Cache(model.config, HOLD)
    decode(model, cache, ids[:, :310], 300)
    before = cache.nbytes
    bad = model.model.embed_tokens(ids[:, 310:311]).detach() * float("nan")
    with torch.no_grad(), pytest.raises(ValueError, match="keys: expected finite values"):
        model(inputs_embeds=bad, past_key_values=cache)
    assert (cache.nbytes, cache.get_seq_length()) == (before, 310)
    fresh = kvcomp.Cache(model.config, HOLD)
    decode(model, fresh, ids[:, :310], 300)
    with torch.no_grad():
        one, other = (model(ids[:, 310:], past_key_values=each).logits for each in (cache, fresh))
    assert torch.equal(one, other)


def test_an_error_behind_the_first_part_of_a_long_pass_is_not_forgotten(model: Any) -> None:
    """100 rows are stored 64 at a time. Room for the rest cannot be made: BudgetError, and no second try on top."""
    ids, cache = tokens(1, 500), kvcomp.Cache(model.config, HOLD)
    decode(model, cache, ids[:, :300], 300)
    packed = cache._state.packed
    layer = packed.layers[0]
    stored: list[int] = []
    write = layer._write

    def tight(*args: Any) -> None:
        write(*args)
        stored.append(1)
        packed.hold_bytes = 1000

    layer._write = tight
    with torch.no_grad(), pytest.raises(kvcomp.BudgetError):
        model(ids[:, 300:400], past_key_values=cache)
    assert stored == [1]
    expect_refused(model, cache, ids[:, 300:301])


def test_ctrl_c_inside_the_context_manager() -> None:
    fresh = build("llama")
    batch, before = padded([300, 210]), snapshot(fresh)
    plain = fresh.generate(**batch, **GREEDY)
    for index, policy in enumerate(PREFILLS.values()):
        with pytest.raises(KeyboardInterrupt), kvcomp.compress(fresh, policy):
            hook = fresh.model.layers[index].mlp.register_forward_pre_hook(stop)
            try:
                fresh.generate(**batch, **GREEDY)
            finally:
                hook.remove()
        assert snapshot(fresh) == before
        assert torch.equal(plain, fresh.generate(**batch, **GREEDY))
    with kvcomp.compress(fresh, Policy(bits=16)) as packing:
        fresh.generate(**batch, **GREEDY)
    assert packing.cache.get_seq_length() == 311 and np.isfinite(packing.cache.ratio)
