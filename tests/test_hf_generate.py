"""generate from packed bytes: batches, later prompts, sampling, beams, reset, the context manager."""

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from test_hf_models import HalfCache, build, decode, tokens  # noqa: E402

EXACT = kvcomp.Policy(bits=16)
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def padded(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """Prompts of these lengths as one left-padded batch."""
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    return {"input_ids": tokens(len(lengths), longest, seed=seed) * mask, "attention_mask": mask}


def rounded(model: Any) -> Any:
    """The plain cache with the 16-bit rounding of a packed one: what greedy tokens are compared with."""
    return HalfCache(config=model.config)


def test_greedy_batch_with_left_padding(model: Any) -> None:
    batch = padded([50, 17, 33])
    cache = kvcomp.Cache(model.config, EXACT)
    packed = model.generate(**batch, past_key_values=cache, **GREEDY)
    assert torch.equal(packed, model.generate(**batch, past_key_values=rounded(model), **GREEDY))
    assert cache.get_seq_length() == 50 + 12 - 1
    # Padding is not stored: 100 real tokens of 150 positions, then 11 of each sequence.
    assert [int(count) for count in cache._state.packed.layers[0].tokens.reshape(3, -1)[:, 0]] == [61, 28, 44]


def test_batch_equals_each_sequence_alone(model: Any) -> None:
    batch = padded([50, 17, 33])
    together = model.generate(**batch, past_key_values=kvcomp.Cache(model.config, EXACT), **GREEDY)
    for sequence, length in enumerate((50, 17, 33)):
        alone = model.generate(
            batch["input_ids"][sequence : sequence + 1, -length:],
            past_key_values=kvcomp.Cache(model.config, EXACT),
            **GREEDY,
        )
        assert torch.equal(together[sequence, -12:], alone[0, -12:])


@pytest.mark.parametrize("count", [1, 7, 64, 200])
def test_a_second_prompt_equals_one_long_prompt(model: Any, count: int) -> None:
    """Logits of the last position after prompts of 90 and `count` tokens, against one prompt of both. The bound is
    what rounding K and V to 16 bits costs in the plain cache, and a quarter on top."""
    ids = tokens(1, 90 + count, seed=count)
    cache = kvcomp.Cache(model.config, EXACT)
    both = decode(model, cache, ids, 90, step=count)[:, -1]
    with torch.no_grad():
        one = model(ids, use_cache=False).logits[:, -1]
    cost = decode(model, rounded(model), ids, 90, step=count)[:, -1]
    assert (both - one).abs().max() <= 1.25 * (cost - one).abs().max() + 1e-5
    assert cache.get_seq_length() == 90 + count


@pytest.mark.parametrize("second", [[9, 4], [3, 40], [1, 1], [150, 70]])
def test_second_prompts_of_different_lengths(model: Any, second: list[int]) -> None:
    """A later turn: the last token of the first answer, which no pass has seen yet, then padding, then the prompt."""
    batch = padded([30, 21])
    packed, plain = kvcomp.Cache(model.config, EXACT), rounded(model)
    first = model.generate(**batch, past_key_values=packed, **GREEDY)
    assert torch.equal(first, model.generate(**batch, past_key_values=plain, **GREEDY))
    more = padded(second, seed=1)
    turn = {
        "input_ids": torch.cat([first, more["input_ids"]], 1),
        "attention_mask": torch.cat(
            [batch["attention_mask"], torch.ones(2, 12, dtype=torch.long), more["attention_mask"]], 1
        ),
    }
    again = model.generate(**turn, past_key_values=packed, **GREEDY)
    assert torch.equal(again, model.generate(**turn, past_key_values=plain, **GREEDY))
    assert packed.get_seq_length() == again.shape[1] - 1


def test_a_sequence_may_get_no_second_prompt(model: Any) -> None:
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:36] = 0
    ours, plain = (
        decode(model, cache, ids, 30, step=6, attention_mask=mask, position_ids=mask.cumsum(1) - 1)
        for cache in (kvcomp.Cache(model.config, EXACT), rounded(model))
    )  # fmt: skip
    assert (ours - plain)[0].abs().max() <= 0.01 * plain.std()
    assert (ours - plain)[1, -4:].abs().max() <= 0.01 * plain.std()


def test_sampling_and_several_answers(model: Any) -> None:
    batch = padded([20, 31])
    settings = GREEDY | {"do_sample": True, "temperature": 0.7, "num_return_sequences": 3}
    torch.manual_seed(1)
    packed = model.generate(**batch, past_key_values=kvcomp.Cache(model.config, EXACT), **settings)
    torch.manual_seed(1)
    assert torch.equal(packed, model.generate(**batch, past_key_values=rounded(model), **settings))
    assert len({tuple(row.tolist()) for row in packed}) > 2


def test_beam_search(model: Any) -> None:
    batch = padded([20, 31])
    settings = GREEDY | {"num_beams": 3}
    packed = model.generate(**batch, past_key_values=kvcomp.Cache(model.config, EXACT), **settings)
    assert torch.equal(packed, model.generate(**batch, past_key_values=rounded(model), **settings))
    assert not torch.equal(packed, model.generate(**batch, **GREEDY)), "beams that change nothing test nothing"


def test_the_batch_can_be_chosen_from(model: Any) -> None:
    """Repeated, then reordered with repetition, then thinned out: each time as the plain cache."""
    batch = padded([20, 31])
    caches = kvcomp.Cache(model.config, EXACT), rounded(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    chosen = torch.tensor([2, 0, 1])
    outs = []
    for cache in caches:
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0), past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(chosen)
            cache.batch_select_indices(torch.tensor([0, 2]))
            rows = mask.repeat_interleave(2, 0)[chosen][[0, 2]]
            rows = torch.cat([rows, torch.ones(2, 5, dtype=rows.dtype)], 1)
            positions = (rows.cumsum(1) - 1)[:, -5:]
            outs.append(model(tokens(2, 5), attention_mask=rows, position_ids=positions, past_key_values=cache).logits)
    assert (outs[0] - outs[1]).abs().max() <= 0.01 * outs[1].std()


def test_repeated_sequences_do_not_share_bytes(model: Any) -> None:
    """At 4 bits: one sequence three times over, each continued differently, through pages that age, as alone."""
    prompt, more = tokens(1, 150), tokens(3, 100, seed=1)
    many = kvcomp.Cache(model.config, kvcomp.Policy(bits=4))
    decode(model, many, prompt, 150)
    many.batch_repeat_interleave(3)
    with torch.no_grad():
        together = model(more, past_key_values=many).logits
    for sequence in range(3):
        alone = kvcomp.Cache(model.config, kvcomp.Policy(bits=4))
        decode(model, alone, prompt, 150)
        with torch.no_grad():
            assert torch.equal(
                together[sequence], model(more[sequence : sequence + 1], past_key_values=alone).logits[0]
            )


def test_prompt_in_chunks(model: Any) -> None:
    """transformers' chunked prefill: the first chunk is the prompt that is compressed, the others follow."""
    batch = padded([50, 44])
    chunks = GREEDY | {"prefill_chunk_size": 16}
    packed = model.generate(**batch, past_key_values=kvcomp.Cache(model.config, EXACT), **chunks)
    assert torch.equal(packed, model.generate(**batch, past_key_values=rounded(model), **chunks))


def test_reset_empties(model: Any) -> None:
    batch = padded([30, 21])
    cache = kvcomp.Cache(model.config, EXACT)
    assert (cache.nbytes, cache.ratio, cache.report) == (0, None, None)
    first = model.generate(**batch, past_key_values=cache, **GREEDY)
    assert cache.nbytes > 0
    cache.reset()
    assert (cache.nbytes, cache.ratio, cache.report, cache.get_seq_length()) == (0, None, None, 0)
    assert sum(cache.ledger().values()) == 0
    assert torch.equal(first, model.generate(**batch, past_key_values=cache, **GREEDY))


def test_plain_generation_is_unchanged_once_a_cache_was_made(model: Any) -> None:
    batch = padded([30, 21])
    fresh = build("llama")
    before = fresh.generate(**batch, **GREEDY)
    kvcomp.Cache(fresh.config, EXACT)
    assert fresh.config._attn_implementation == "kvcomp"
    assert torch.equal(before, fresh.generate(**batch, **GREEDY))
    with torch.no_grad():
        plain, ours = build("llama")(**batch, use_cache=False).logits, fresh(**batch, use_cache=False).logits
    assert torch.equal(plain, ours)


def test_what_transformers_asks_a_cache(model: Any) -> None:
    """Later masks cover the new rows alone: no mask of q times all positions is ever made."""
    cache = kvcomp.Cache(model.config, EXACT)
    assert cache.get_mask_sizes(30, 0) == (30, 0) and len(cache) == 2
    decode(model, cache, tokens(1, 30), 30)
    assert [cache.get_mask_sizes(count, layer) for layer in (0, 1) for count in (1, 7)] == [(1, 30), (7, 30)] * 2
    assert cache.layers[0].get_mask_sizes(torch.arange(30, 37)) == (7, 30)  # the older signature
    assert (cache.get_seq_length(), cache.get_query_offset(1), cache.get_max_length()) == (30, 30, -1)
    assert cache.is_sliding == [False, False] and not cache.is_compileable and not cache.is_croppable


def test_the_configuration_keeps_what_was_set_before() -> None:
    """Copies too; and nothing of it is written out."""
    fresh = build("llama")
    written = fresh.config.to_json_string()
    kvcomp.Cache(fresh.config, EXACT)
    kvcomp.Cache(fresh.config, EXACT)
    for settings in (fresh.config, copy.deepcopy(fresh.config)):
        assert settings._attn_implementation == "kvcomp" and settings._attn_implementation.previous == "sdpa"
    assert fresh.config.to_json_string() == written


def snapshot(model: Any) -> dict[str, Any]:
    return dict(vars(model)) | {
        "hooks": dict(model._forward_pre_hooks),
        "implementation": model.config._attn_implementation,
        "config": model.config.to_dict(),
    }


def test_context_manager(model: Any) -> None:
    fresh = build("llama")
    batch, before = padded([30, 21]), snapshot(fresh)
    plain = fresh.generate(**batch, **GREEDY)
    with kvcomp.compress(fresh, kvcomp.Policy(bits=4)) as packing:
        assert packing.cache is None
        fresh.generate(**batch, **GREEDY)
        first = packing.cache
        assert first.nbytes > 0
        fresh.generate(**batch, **GREEDY)
        assert packing.cache is not first
        last = packing.cache
        fresh.generate(**batch, use_cache=False, **GREEDY)
        own = transformers.DynamicCache(config=fresh.config)
        assert torch.equal(plain, fresh.generate(**batch, past_key_values=own, **GREEDY))
        assert packing.cache is last
        with torch.no_grad():
            out = fresh(**batch)
        assert out.past_key_values is packing.cache is not last
    assert snapshot(fresh) == before
    assert torch.equal(plain, fresh.generate(**batch, **GREEDY))
    with pytest.raises(RuntimeError, match=r"expected 'kvcomp' as long as the cache is used, got 'sdpa'"):
        fresh.generate(**batch, past_key_values=last, **GREEDY)


def test_context_manager_leaves_by_an_exception(model: Any) -> None:
    fresh = build("llama")
    fresh.generate = fresh.generate
    before = snapshot(fresh)
    with pytest.raises(ZeroDivisionError), kvcomp.compress(fresh, EXACT), kvcomp.compress(fresh, EXACT):
        raise ZeroDivisionError
    assert snapshot(fresh) == before
