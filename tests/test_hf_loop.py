"""kvcomp's loop over new tokens: transformers' own, token for token, with the host a step ahead."""

import copy
import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from kvcomp.hf import context, loop  # noqa: E402
from test_hf_generate import EXACT, padded  # noqa: E402
from test_hf_models import build, tokens  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


class Passes:
    """How many forward passes a model makes."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        self.hook = model.register_forward_hook(self.add)

    def add(self, *_: Any) -> None:
        self.count += 1


class EndsAt(transformers.StoppingCriteria):  # type: ignore[misc]
    """Sequence i ends with its token at[i]."""

    def __init__(self, at: list[int], prompt: int) -> None:
        self.at, self.prompt, self.calls = torch.tensor(at), prompt, 0

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.calls += 1
        return self.at <= ids.shape[1] - self.prompt


def answers(model: Any, **given: Any) -> tuple[Any, int, Any]:
    """What generate gives, the passes that it makes, and the state of the random numbers behind it."""
    passes = Passes(model)
    try:
        torch.manual_seed(1)
        return model.generate(past_key_values=kvcomp.Cache(model.config, EXACT), **given), passes.count, torch.rand(1)
    finally:
        passes.hook.remove()


def same(model: Any, **given: Any) -> Any:
    want, passes, chance = answers(model, **copy.deepcopy(given))
    got, as_many, same_chance = answers(model, custom_generate=loop.decode, **copy.deepcopy(given))
    assert as_many == passes and torch.equal(chance, same_chance)
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
        return got
    assert type(got) is type(want) and list(got) == list(want)
    assert torch.equal(got.sequences, want.sequences)
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
    for name in ("scores", "logits"):
        one, other = getattr(got, name), getattr(want, name)
        assert (one is None) == (other is None)
        assert one is None or all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return got


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "processed": {"do_sample": True, "repetition_penalty": 1.3, "min_new_tokens": 4, "top_p": 0.9},
    "one token": {"do_sample": False, "max_new_tokens": 1},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "parts": {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "no scores": {"do_sample": False, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [[40], [50, 17, 33]])
def test_the_same_tokens(way: str, lengths: list[int], model: Any) -> None:
    given = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None} | WAYS[way]
    same(model, **padded(lengths), **given)


@pytest.mark.parametrize("at", [[1, 1, 1], [3, 7, 5], [2, 99, 1]])
def test_sequences_end_when_they_end(at: list[int], model: Any) -> None:
    batch = padded([50, 17, 33])
    given: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 8}
    ends = EndsAt(at, 50)
    out = model.generate(
        **batch, **given, past_key_values=kvcomp.Cache(model.config, EXACT), stopping_criteria=[ends],
        custom_generate=loop.decode,
    )  # fmt: skip
    assert out.shape[1] == 50 + min(max(at), 8) == 50 + ends.calls
    same(model, **batch, **given, stopping_criteria=[EndsAt(at, 50)])


def test_an_end_token_is_padded_behind(model: Any) -> None:
    batch = padded([50, 17, 33])
    given: dict[str, Any] = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": 12}
    plain = model.generate(**batch, **given, eos_token_id=None)
    early = int(plain[1, 50 + 3])  # sequence 1 ends with its fourth token, at the latest
    out = same(model, **batch, **given, eos_token_id=early)
    assert (out[1, 50 + 4 :] == 1).all()
    assert same(model, **batch, **given, eos_token_id=sorted({int(x) for x in plain[:, 51]})).shape[1] <= 52


def test_the_next_step_is_ready_before_the_end_is_asked_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def noting(name: str, run: Any) -> Any:
        @functools.wraps(run)
        def noted(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return run(*args, **kwargs)

        return noted

    for name in ("send", "wait"):
        monkeypatch.setattr(loop._Flag, name, noting(name, getattr(loop._Flag, name)))
    monkeypatch.setattr(model, "prepare_inputs_for_generation", noting("ready", model.prepare_inputs_for_generation))
    monkeypatch.setattr(model, "forward", noting("pass", model.forward))
    model.generate(
        tokens(1, 30), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None,
        past_key_values=kvcomp.Cache(model.config, EXACT), custom_generate=loop.decode,
    )  # fmt: skip
    step = ["send", "ready", "wait", "pass"]
    assert events == ["ready", "pass", *step, *step, "send"]  # the host counts tokens


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows, count", [(1, 128256), (8, 32064), (3, 50257), (2, 211), (5, 2 * 10007), (2, 1)])
def test_the_largest(rows: int, count: int, device: str) -> None:
    """As torch.argmax has it: the first of several, and NaN before all."""
    logits = torch.randn(rows, count, device=device, generator=torch.Generator(device).manual_seed(1))
    cases = [logits, logits.round(), torch.zeros_like(logits), torch.full_like(logits, -torch.inf), logits.clone()]
    cases[-1][0, count // 3] = cases[-1][0, count // 2] = torch.nan
    for case in cases:
        want = [row.index(max(row)) for row in case.nan_to_num(torch.inf).tolist()]
        got = loop._largest(case)
        assert got.dtype == torch.int64 and got.tolist() == want == torch.argmax(case, -1).tolist()


def test_which_calls_it_takes(model: Any) -> None:
    config = transformers.GenerationConfig
    assert loop.takes(model, {}) and loop.takes(model, {"do_sample": True, "num_beams": 1, "top_k": 5})
    assert loop.takes(model, {"generation_config": config(num_beams=3), "num_beams": 1})
    assisting = config()
    assisting.is_assistant = True  # as transformers sets it
    others: list[dict[str, Any]] = [
        {"num_beams": 2}, {"generation_config": config(num_beams=3)}, {"streamer": object()}, {"synced_gpus": True},
        {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}, {"output_attentions": True},
        {"generation_config": config(output_hidden_states=True, return_dict_in_generate=True)},
        {"custom_generate": loop.decode}, {"generation_config": assisting}, {"tokenizer": object()},
        {"stop_strings": ["."]}, {"token_healing": True}, {"use_mtp": True},
    ]  # fmt: skip
    for other in others:
        assert not loop.takes(model, other), other
    for name in ("generate", "_sample"):  # a way of its own
        own = type("Own", (type(model),), {name: lambda self, *args, **kwargs: None})
        assert not loop.takes(own(model.config), {}), name


class Handing(torch.nn.Module):
    """Hands generate over to a model inside, as adapters do."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config, self.generation_config = inner, inner.config, inner.generation_config

    def forward(self, **given: Any) -> Any:
        return self.inner(**given)

    def generate(self, *args: Any, **given: Any) -> Any:
        return self.inner.generate(*args, **given)


def test_a_model_that_hands_over(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(tokens(1, 20), **given)
    with kvcomp.compress(Handing(model), EXACT):  # which says nothing of a device
        assert torch.equal(model.generate(tokens(1, 20), **given), plain)
    monkeypatch.setattr(context, "_kind_of", lambda model: "cuda")
    passes = Passes(model)
    try:
        with kvcomp.compress(Handing(model), EXACT) as packing:
            assert torch.equal(packing._model.generate(tokens(1, 20), **given), plain)
            assert passes.count == 3
            # Even where the loop is asked for with another model's steps, and where those never hear of a pass.
            decode = functools.partial(loop.decode, steps=packing.steps)
            assert torch.equal(model.generate(tokens(1, 20), **given, custom_generate=decode), plain)
            monkeypatch.setattr(packing.steps, "runs", lambda model: True)
            assert torch.equal(model.generate(tokens(1, 20), **given, custom_generate=decode), plain)
    finally:
        passes.hook.remove()


def test_other_ways_are_refused(model: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"^generate: expected one answer a prompt, greedy or sampled, got"):
        model.generate(tokens(1, 9), num_beams=2, max_new_tokens=2, pad_token_id=0, custom_generate=loop.decode)


@pytest.mark.parametrize("graphs", [True, False])
def test_where_it_is_used(graphs: bool, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, and not where recording is switched off; here the model says that it is on one."""
    calls: list[bool] = []
    plain, decode = model.generate(tokens(1, 20), max_new_tokens=3, do_sample=False, pad_token_id=0), loop.decode

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        return decode(*args, **kwargs)

    monkeypatch.setattr(context.loop, "decode", counting)
    for device, used in (("cpu", 0), ("cuda", int(graphs))):
        monkeypatch.setattr(context, "_kind_of", lambda model, device=device: device)
        calls.clear()
        with kvcomp.compress(model, EXACT, graphs=graphs):
            out = model.generate(tokens(1, 20), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert len(calls) == used and out.shape == plain.shape


@pytest.mark.parametrize("compiles", [False, True])
def test_a_pass_is_asked_for_when_nothing_is_left_to_do(
    compiles: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside compress: the same tokens and passes, ended early too, and a cache that goes on as it should."""
    monkeypatch.setattr(context, "_kind_of", lambda model: "cuda")
    monkeypatch.setattr(torch, "compile", lambda run, **settings: run)
    given: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    plain = model.generate(tokens(1, 40), **given, past_key_values=kvcomp.Cache(model.config, EXACT))
    end = int(plain[0, 45])
    waits: list[bool] = []
    wait = loop._Flag.wait

    def waiting(flag: Any) -> bool:
        waits.append(bool(asked))
        return wait(flag)

    asked: list[bool] = []
    monkeypatch.setattr(loop._Flag, "wait", waiting)
    with kvcomp.compress(model, EXACT, compile=compiles) as packing:
        ask = packing.steps._ask

        def noting() -> None:
            asked.append(True)
            ask()
            asked.clear()

        monkeypatch.setattr(packing.steps, "_ask", noting)
        assert torch.equal(model.generate(tokens(1, 40), **given), plain)
        out = model.generate(tokens(1, 40), **given | {"eos_token_id": end}, return_dict_in_generate=True)
        first = plain[0, 40:].tolist().index(end) + 1
        assert out.sequences.shape == (1, 40 + first) and torch.equal(out.sequences, plain[:, : 40 + first])
        assert out.past_key_values.get_seq_length() == 40 + first - 1
        rest = model.generate(
            out.sequences, **given | {"max_new_tokens": 8 - first}, past_key_values=out.past_key_values
        )
        assert torch.equal(rest, plain)
        assert waits and all(waits)
        waits.clear()
        hook = model.register_forward_pre_hook(lambda *_: None)  # sees passes that are called for: asked before
        try:
            assert torch.equal(model.generate(tokens(1, 40), **given), plain)
        finally:
            hook.remove()
        assert waits and not any(waits)
