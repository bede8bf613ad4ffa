"""Measuring quality: the decode path, answers of several questions, errors of cache and attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from experiment_support import save_model  # noqa: E402
from kvcomp import BudgetError, Policy  # noqa: E402
from kvcomp.eval import perplexity, quality, tasks  # noqa: E402
from kvcomp.eval.quality import Method  # noqa: E402
from kvcomp.layer_input import LayerInput  # noqa: E402
from kvcomp.prompt import compress_prompt  # noqa: E402

PLAIN = Method("bf16", 1.0)
EXACT = Method("exact", 1.0, Policy(bits=16))
COARSE = Method("coarse", 1.0, Policy(bits=2))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from kvcomp.experiment import workload

    folder = save_model(tmp_path_factory.mktemp("model"))
    text = folder / "text.txt"
    text.write_text("".join(f"line {number}: {number * 37 % 101} apples\n" for number in range(400)))
    return workload.load(folder, text)


def tokens(count: int, seed: int = 0) -> Any:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def logits_of(subject: Any, method: Method, context: Any, following: Any, **options: Any) -> Any:
    with method.cache(subject.model) as cache:
        return perplexity.continuation(subject.model, cache, context, following, **options)


@pytest.mark.parametrize("single", [0, 5, 100])
def test_a_continuation_in_pieces_equals_one_forward_pass(subject: Any, single: int) -> None:
    context, following = tokens(200), tokens(50, seed=1)
    said = logits_of(subject, PLAIN, context, following, single=single, chunk=16)
    with torch.inference_mode():
        whole = subject.model(torch.cat([context, following])[None]).logits[0, 199:-1]
    assert torch.allclose(said.logits, whole, atol=1e-4)
    assert len(said.step_seconds) == min(single, 49)


def test_the_compressed_cache_is_what_gets_scored(subject: Any) -> None:
    """2-bit logits differ from the first token on that was fed to the packed cache; 16-bit ones hardly."""
    context, following = tokens(200), tokens(40, seed=1)
    plain, exact, coarse = (logits_of(subject, m, context, following).logits for m in (PLAIN, EXACT, COARSE))
    assert torch.equal(plain[0], coarse[0])  # said by the prefill
    near, far = perplexity.divergence(plain, exact), perplexity.divergence(plain, coarse)
    assert float(near.max()) < 1e-4 < 1e-3 < float(far[1:].mean())
    assert float(perplexity.agreement(plain, plain).min()) == 1.0


def test_losses_divergence_and_perplexity_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 7, 11, generator=generator)
    following = torch.randint(0, 11, (7,), generator=generator)
    p, q = (np.exp(x.double().numpy()) for x in (first, second))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    losses = -np.log(p[np.arange(7), following.numpy()])
    assert np.allclose(perplexity.token_losses(first, following), losses, atol=1e-5)
    assert np.allclose(perplexity.divergence(first, second), (p * np.log(p / q)).sum(1), atol=1e-5)
    assert np.isclose(perplexity.perplexity(losses.tolist()), np.exp(losses.mean()))
    assert perplexity.agreement(first, second).tolist() == (p.argmax(1) == q.argmax(1)).astype(float).tolist()


@pytest.mark.parametrize("method", [PLAIN, EXACT], ids=lambda method: method.name)
def test_questions_asked_together_are_answered_as_alone(subject: Any, method: Method) -> None:
    """Prompts of different lengths on copies of one cache, against plain greedy generation from the whole text."""
    task = tasks.generate("needle_multi_key", length=600, seed=3, mode="agnostic", questions=4)
    assert len({len(question.prompt) for question in task.questions}) > 1
    with method.cache(subject.model) as cache:
        found = quality.answer(subject.model, subject.tokenizer, cache, task)
    assert found.prompt_tokens == len(task.context)
    for text, question in zip(found.texts, task.questions, strict=True):
        prompt = subject.tokenizer(task.context + question.prompt, return_tensors="pt")
        out = subject.model.generate(
            **prompt, do_sample=False, max_new_tokens=len(question.target), eos_token_id=None, pad_token_id=0
        )
        alone = subject.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        # A batch goes on until its last answer has ended.
        assert text.split("\n")[0][: len(alone)] == alone.split("\n")[0][: len(text)]


def test_aware_reads_the_question_with_the_context(subject: Any) -> None:
    task = tasks.generate("needle_single", length=400, seed=1)
    with PLAIN.cache(subject.model) as cache:
        found = quality.answer(subject.model, subject.tokenizer, cache, task)
    assert found.prompt_tokens == len(task.context) + len(task.questions[0].prompt)
    assert found.nbytes == 4 * 2 * 2 * 64 * found.prompt_tokens  # fp32 K and V of two layers
    assert quality.uncompressed_bytes(subject.model, 100) == 2 * 2 * 2 * 64 * 100


def test_a_budget_that_cannot_be_met_is_an_error(subject: Any) -> None:
    task = tasks.generate("needle_single", length=300, seed=1)
    before = subject.model.config._attn_implementation
    method = Method("tight", 20, Policy(target_ratio=20, window=64))
    with pytest.raises(BudgetError, match="or less"), method.cache(subject.model) as cache:
        quality.answer(subject.model, subject.tokenizer, cache, task)
    assert subject.model.config._attn_implementation == before


def layers(seed: int = 0, tokens: int = 130) -> list[LayerInput]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    return [
        LayerInput(normal(1, 2, tokens, 64), normal(1, 2, tokens, 64), queries=normal(1, 4, 32, 64)) for _ in range(3)
    ]


def test_stored_rows_are_at_their_places() -> None:
    """At 16 bits without rotation every stored row is the exact row, rounded; dropped rows are zeros."""
    prompt = [LayerInput(x.keys.bfloat16(), x.values.bfloat16(), queries=x.queries) for x in layers()]
    policy = Policy(target_ratio=3, classes=((16, 16),), rotation="none", sinks=2, window=5)
    packed = compress_prompt(prompt, policy, positions=True)
    for index, layer in enumerate(prompt):
        keys, values, kept = quality.stored_rows(packed, index, layer)
        assert 0 < int(kept.sum()) < kept.numel()
        assert bool(kept[:, :, :2].all()) and bool(kept[:, :, -5:].all())
        assert torch.equal(keys, layer.keys.float() * kept[..., None])
        assert torch.equal(values, layer.values.float() * kept[..., None])


def test_error_sums_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values, noise = torch.randn(3, 1, 2, 50, 64, generator=generator)
    kept = torch.rand(1, 2, 50, generator=generator) < 0.6
    stored_keys, stored_values = ((x + 0.1 * noise) * kept[..., None] for x in (keys, values))
    sums = quality.ErrorSums()
    for _ in range(2):  # two layers alike
        sums.add(quality.error_sums(keys, values, stored_keys, stored_values, kept))
    got = sums.summary()
    for name, exact, stored in (("key", keys, stored_keys), ("value", values, stored_values)):
        x, y = exact.double().numpy(), stored.double().numpy()
        assert np.isclose(got[f"{name}_mse"], ((x - y) ** 2).mean())
        assert np.isclose(got[f"{name}_cosine"], (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        rows = (x * y).sum(-1)[kept] / np.linalg.norm(x, axis=-1)[kept] / np.linalg.norm(y, axis=-1)[kept]
        assert np.isclose(got[f"{name}_cosine_selected"], rows.mean())
    assert np.isclose(got["selected_fraction"], kept.double().mean())


def test_errors_grow_with_compression() -> None:
    prompt = layers(tokens=640)
    asked = [quality.Asked(torch.randn(1, 4, 3, 64), 0.125) for _ in prompt]
    fine, coarse = (
        quality.cache_errors(compress_prompt(prompt, Policy(bits=bits), positions=True), prompt, asked)
        for bits in (8, 2)
    )
    assert fine["key_mse"] < 1e-3 < 0.05 < coarse["key_mse"] < 0.2
    assert fine["attention_output_error"] < 0.02 < coarse["attention_output_error"] < 1
    assert len(coarse["attention_output_error_per_layer"]) == 3
    assert fine["selected_fraction"] == 1.0
    assert fine["attention_output_error_of_dropping"] < 1e-6
    assert np.isclose(fine["attention_output_error_of_quantizing"], fine["attention_output_error"], rtol=1e-3)


def test_the_parts_of_the_attention_error_against_numpy() -> None:
    """Kept tokens at 16 bits without rotation: what is left is what dropping does."""
    prompt = [LayerInput(x.keys.bfloat16(), x.values.bfloat16(), queries=x.queries) for x in layers(tokens=80)[:1]]
    asked = quality.Asked(torch.randn(1, 4, 3, 64, generator=torch.Generator().manual_seed(1)), 0.125)
    packed = compress_prompt(prompt, Policy(target_ratio=3, classes=((16, 16),), rotation="none"), positions=True)
    got = quality.cache_errors(packed, prompt, [asked])
    kept = quality.stored_rows(packed, 0, prompt[0])[2].numpy()
    keys, values, queries = (x.double().numpy() for x in (prompt[0].keys, prompt[0].values, asked.queries))
    square = norm = 0.0
    for head in range(4):
        logits = 0.125 * queries[0, head] @ keys[0, head // 2].T
        weights = np.exp(logits)
        part = weights * kept[0, head // 2]
        exact, dropped = ((w / w.sum(1, keepdims=True)) @ values[0, head // 2] for w in (weights, part))
        square, norm = square + ((exact - dropped) ** 2).sum(), norm + (exact**2).sum()
    assert np.isclose(got["attention_output_error_of_dropping"], np.sqrt(square / norm), rtol=1e-4)
    assert got["attention_output_error_of_quantizing"] < 5e-3 < got["attention_output_error_of_dropping"]


def test_probe_sees_the_queries_and_leaves_the_model_as_it_was(subject: Any) -> None:
    before = subject.model.config._attn_implementation
    context = tokens(40)
    with PLAIN.cache(subject.model) as cache, quality.probe(subject.model) as seen:
        logits, _ = perplexity.prefill(subject.model, cache, context[None])
    assert [tuple(asked.queries.shape) for asked in seen] == [(1, 2, 40, 64)] * 2
    assert [asked.scale for asked in seen] == [64**-0.5] * 2
    assert subject.model.config._attn_implementation == before
    with PLAIN.cache(subject.model) as cache:
        assert torch.equal(logits, perplexity.prefill(subject.model, cache, context[None])[0])
