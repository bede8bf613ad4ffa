"""generate on a GPU: the same choices as on the CPU, recorded steps that equal steps as they are, and what happens when
a recording is of no use any more. Without a GPU: the same steps with recordings that are played by running them."""

import contextlib
import dataclasses
import functools
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from kvcomp import devices, prompt, store_cuda  # noqa: E402
from kvcomp.hf import attention, graph, library  # noqa: E402
from kvcomp.hf.step import step_options  # noqa: E402
from kvcomp.pages import GRANULE_BYTES  # noqa: E402
from kvcomp.w4 import quantize_model  # noqa: E402
from test_hf_generate import GREEDY, padded  # noqa: E402
from test_hf_models import SHAPES, build, decode, gap, tokens, whole  # noqa: E402

GPU = pytest.mark.gpu
EXACT, FOUR = kvcomp.Policy(bits=16), kvcomp.Policy(bits=4)
POLICIES = {
    "16 bit": EXACT,
    "8 bit": kvcomp.Policy(bits=8),
    "4 bit": FOUR,
    "2 bit": kvcomp.Policy(bits=2),
    "K8 V4, window": kvcomp.Policy(k_bits=8, v_bits=4, window=32, sinks=4),
    "unrotated, groups, min-max": kvcomp.Policy(bits=4, rotation="none", group=32, scale="minmax"),
    "search, e5m3": kvcomp.Policy(bits=3, scale="search", scale_dtype="e5m3"),
    "stochastic": kvcomp.Policy(bits=4, stochastic=True, seed=3),
    "4x": kvcomp.Policy(target_ratio=4),
    "8x": kvcomp.Policy(target_ratio=8),
    "4x, layer by layer": kvcomp.Policy(target_ratio=4, prefill="layerwise"),
    "4x, H2O": kvcomp.Policy(target_ratio=4, select=kvcomp.H2O()),
    "SnapKV": kvcomp.Policy(bits=4, select=kvcomp.SnapKV(keep=0.5), window=16),
    "given rotation": kvcomp.Policy(bits=4, rotation=kvcomp.Rotation.random(2, 2, 64)),
}


def shipped() -> Any:
    """The model that kvcomp ships."""
    from kvcomp.experiment import places

    return transformers.AutoModelForCausalLM.from_pretrained(places.shipped(places.MODEL, "--model")).eval()


def shipped_ids(count: int) -> Any:
    from kvcomp.experiment import places

    text = Path(places.shipped(places.TEXT, "--text")).read_bytes()[:count]
    return torch.tensor([list(text)])


# ---- without a GPU


class PlayedGraph:
    """Stands in for a CUDA graph where tensors are on the CPU: recording runs the step, so that the first replay has
    nothing left to do; later ones run it again with what the inputs hold by then, and the positions that the host knew
    when it was recorded."""

    again: Any = None  # set by the recording Steps: runs the step into the recorded output

    def capture_begin(self, **settings: Any) -> None:
        self.fresh = True

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        if not self.fresh:
            self.again()
        self.fresh = False


class PlayedSteps(graph.Steps):
    """Steps with such graphs."""

    def _on_side(self, work: Any) -> Any:
        return work()

    def _record(self, step: Any, parts: Any, compiled: Any) -> Any:
        recording = super()._record(step, parts, compiled)
        found, seen, settings = weakref.ref(step.cache), list(step.cache._state.seen), step.settings

        def again() -> None:
            cache = found()
            state = cache._state
            now, state.seen = state.seen, seen
            with state.packed.stacked.capture(), graph.stepping(parts, cache, compiled):
                again = graph.Step(cache, {}, settings, None)
                recording.output["logits"].copy_(self._call(again, recording.inputs).logits)
            state.seen = now

        recording.graph.again = again
        return recording


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches on the CPU are what they would be on a GPU: stacked layers, steps that are recorded."""

    def stack(arena: Any, layers: Any) -> Any:
        return store_cuda.Stacked(layers, torch.device("cpu"))

    monkeypatch.setattr(devices, "stack", stack)
    monkeypatch.setattr("kvcomp.packed.stack", stack)
    monkeypatch.setattr("kvcomp.prompt.kind_of_layer", lambda arena: store_cuda.CudaLayer)
    monkeypatch.setattr("kvcomp.hf.context.Steps", PlayedSteps)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedGraph)


def generated(model: Any, policy: Any, inputs: Any, settings: Any = GREEDY, **options: Any) -> tuple[Any, Any]:
    """Tokens and logits, and the context they came from."""
    with kvcomp.compress(model, policy, **options) as packing:
        out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    return (out.sequences, torch.stack(out.logits)), packing


LONG = GREEDY | {"max_new_tokens": 150}


@pytest.mark.parametrize("policy", [FOUR, kvcomp.Policy(target_ratio=4)], ids=["4 bit", "4x"])
def test_played_steps_equal_steps_as_they_are(played: None, policy: Any) -> None:
    model, batch = build("llama"), padded([150, 117, 133])
    (ids, logits), packing = generated(model, policy, batch, LONG)
    (plain_ids, plain_logits), plain = generated(model, policy, batch, LONG, graphs=False)
    assert plain.steps.replays == 0 and packing.steps.replays > 100
    assert torch.equal(ids, plain_ids) and torch.equal(logits, plain_logits)
    assert packing.cache.get_seq_length() == plain.cache.get_seq_length() == 150 + 149
    for ours, theirs in zip(packing.cache._state.packed.layers, plain.cache._state.packed.layers, strict=True):
        assert (ours.lists == theirs.lists).all()


def check_turns(model: Any, put: Any) -> None:
    """An answer in parts: at the end of each, a step has been begun that nobody wanted."""
    ids, answer = put({"ids": tokens(1, 150)})["ids"], {**LONG, "eos_token_id": None}
    with kvcomp.compress(model, FOUR, graphs=False) as packing:
        plain = model.generate(ids, **answer)
    lists = [layer.lists.copy() for layer in packing.cache._state.packed.layers]
    with kvcomp.compress(model, FOUR) as packing:
        done, cache = ids, None
        for count in (3, 1, 17, 16, 48, 2, 63):
            done = model.generate(done, **answer | {"max_new_tokens": count}, past_key_values=cache)
            cache = packing.cache
            assert torch.equal(done, plain[:, : done.shape[1]])
        assert packing.steps.replays > 100
    assert all(
        (layer.lists == want).all() for layer, want in zip(cache._state.packed.layers, lists, strict=True)
    )  # fmt: skip


def test_played_answers_in_parts(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomp.hf.context._kind_of", lambda model: "cuda")
    check_turns(build("llama"), lambda inputs: inputs)


def test_played_steps_of_several_caches(played: None) -> None:
    """Two caches in turn, each with recordings of its own; a batch that changes; passes of several tokens between."""
    check_several_caches(build("llama"), "cpu")


def test_what_is_not_a_step(played: None) -> None:
    check_what_is_not_a_step(build("llama"), "cpu")


def test_recordings_keep_no_cache(played: None) -> None:
    """Inside of one context every generate's cache goes when the next one is made, recordings and all."""
    model, batch = build("llama"), padded([50, 17, 33])
    with kvcomp.compress(model, FOUR) as packing:
        model.generate(**batch, **GREEDY)
        first = weakref.ref(packing.cache._state.packed)
        out = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        assert out.past_key_values is packing.cache and packing.steps.replays > 0
        gc.collect()
        assert first() is None and len(packing.steps._kinds) == 1


def test_a_recording_that_fails(played: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once; the step runs as it is, once, and so do all later ones."""
    model, batch = build("llama"), padded([50, 17, 33])
    (expected, _), _ = generated(model, FOUR, batch, graphs=False)

    def fail(self: Any, **settings: Any) -> None:
        raise RuntimeError("no graph today\nmore of it")

    monkeypatch.setattr(PlayedGraph, "capture_begin", fail)
    with pytest.warns(UserWarning, match=r"^compress: graphs: steps run as they are: no graph today$"):
        (ids, _), packing = generated(model, FOUR, batch)
    assert torch.equal(ids, expected) and packing.steps.replays == 0


def check_several_caches(model: Any, device: str) -> None:
    model = model.to(device)
    streams = [tokens(2, 260, seed=seed).to(device) for seed in (5, 6)]
    logits = {}
    for graphs in (False, True):
        with kvcomp.compress(model, FOUR, graphs=graphs) as packing, torch.no_grad():
            caches = [kvcomp.Cache(model.config, FOUR) for _ in streams]
            seen: list[Any] = []
            for cache, ids in zip(caches, streams, strict=True):
                model(ids[:, :90], past_key_values=cache)
            for at in range(90, 180):
                for cache, ids in zip(caches, streams, strict=True):
                    seen.append(model(ids[:, at : at + 1], past_key_values=cache).logits.clone())
            for cache, ids in zip(caches, streams, strict=True):
                seen.append(model(ids[:, 180:187], past_key_values=cache).logits[:, -1:].clone())
                cache.reorder_cache(torch.tensor([1, 1, 0], device=device))
            for at in range(187, 200):
                for cache, ids in zip(caches, streams, strict=True):
                    seen.append(model(ids[[1, 1, 0], at : at + 1], past_key_values=cache).logits.clone())
            assert packing.steps.replays >= graphs * 2 * (90 - 8 + 13 - 4)
        logits[graphs] = seen
    for step, (plain, ours) in enumerate(zip(logits[False], logits[True], strict=True)):
        assert torch.equal(plain, ours), step


def check_what_is_not_a_step(model: Any, device: str) -> None:
    """Hooks, hidden states, autograd, masks with padding: never recorded, and never wrong."""
    model = model.to(device)
    ids = tokens(2, 120).to(device)
    mask = torch.ones(2, 120, dtype=torch.long, device=device)
    with kvcomp.compress(model, EXACT) as packing, torch.no_grad():
        cache = kvcomp.Cache(model.config, EXACT)
        model(ids[:, :90], past_key_values=cache)

        def step(at: int, **settings: Any) -> Any:
            return model(ids[:, at : at + 1], past_key_values=cache, **settings)

        for at in range(90, 94):
            step(at)
        replays = packing.steps.replays
        assert replays == 3
        assert len(step(94, output_hidden_states=True).hidden_states) == 3
        hooked = []
        handle = model.model.layers[1].register_forward_hook(lambda *arguments: hooked.append(1))
        # transformers' own hooks stay on the model from here on
        step(95)
        handle.remove()
        assert hooked == [1] and packing.steps.replays == replays
        wrong = mask[:, :97].clone()
        wrong[0, 3] = 0
        with pytest.raises(ValueError, match="expected the padding that the cache was filled with"):
            step(96, attention_mask=wrong)
        with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 97\)"):
            step(96, attention_mask=mask)
        holes = mask[:, :97].clone()
        holes[0, 96] = 0
        step(96, attention_mask=holes)
        holes = torch.cat([holes, mask[:, :1]], 1)
        step(97, attention_mask=holes)
        assert [int(count) for count in cache._state.packed.layers[0].tokens.reshape(2, -1)[:, 0]] == [97, 98]
        assert packing.steps.replays == replays


def test_compiled_layers_on_the_cpu() -> None:
    """All layers share one compiled function, beside which are the embedding, positions and the last norm; the tokens
    are those of the model as it is."""
    from torch._dynamo.utils import counters

    model, batch = build("qwen3", layers=3), padded([50, 17, 33])
    (expected, plain), _ = generated(model, FOUR, batch)
    counters.clear()
    (ids, logits), _ = generated(model, FOUR, batch, compile=True)
    assert torch.equal(ids, expected) and (logits - plain).abs().max() <= 1e-3 * plain.std()
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_compiled_kernels_overlap_where_they_can(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From sm_90 on, where torch has it; what the caller gives goes first."""
    from torch import _inductor

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on = {"triton.enable_pdl": True, "combo_kernels": True} if capability >= (9, 0) else {}
    gpu = torch.device("cuda", 0)
    assert step_options(torch.device("cpu")) == {} and step_options(gpu) == on
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda run, options, **settings: given.append(options or {}))
    parts = SimpleNamespace(decoders=[torch.nn.Linear(1, 1)], beside=[torch.nn.Identity()], device=gpu)
    for asked in (True, "auto", {"max_autotune": True}, {"triton.enable_pdl": False}):
        steps = graph.Steps(None, None, 0, lambda: None, True, asked)
        assert list(steps._compiled(parts)) == parts.beside + parts.decoders
        assert given[-2:] == [on | (asked if isinstance(asked, dict) else {})] * 2
    monkeypatch.setattr(_inductor, "list_options", lambda: ["max_autotune"])
    assert step_options(gpu) == {}


def test_compiling_that_fails_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama"), padded([50, 17, 33])
    (expected, _), _ = generated(model, FOUR, batch)

    def fail(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda run, **settings: fail)
    monkeypatch.setattr(graph.Steps, "_compiles", lambda self, device: bool(self._compile))
    with pytest.warns(UserWarning, match="^compress: compile: decoder layers run as they are: no compiler$"):
        (ids, _), _ = generated(model, FOUR, batch, compile="auto")
    assert torch.equal(ids, expected)
    with pytest.raises(RuntimeError, match="no compiler"):
        generated(model, FOUR, batch, compile=True)


def test_compiling_that_fails_beside_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even behind them, when the new token is in the cache: what fails runs as it is, and is not tried again."""
    model, batch = build("llama"), padded([50, 17, 33])
    (expected, _), _ = generated(model, FOUR, batch)
    failed: list[Any] = []

    def compile(run: Any, **settings: Any) -> Any:
        def compiled(module: Any, args: Any, kwargs: Any) -> Any:
            if type(module).__name__ == "LlamaRMSNorm":
                failed.append(module)
                raise RuntimeError("no compiler")
            return run(module, args, kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.warns(UserWarning, match="^compress: compile: LlamaRMSNorm runs as it is: no compiler$"):
        (ids, _), _ = generated(model, FOUR, batch, compile=True)
    assert torch.equal(ids, expected) and failed == [model.model.norm]
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_operations_that_torch_knows(device: str) -> None:
    """append and attend apart are append_attend, compiled too; torch's own checks of an operation hold."""
    model, ids = build("llama").to(device), tokens(2, 90).to(device)
    caches = [kvcomp.Cache(model.config, FOUR) for _ in range(3)]
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
    layers = [cache._state.packed.layers[1] for cache in caches]
    apart, both, compiled = (library.handle(layer) for layer in layers)
    queries, keys, values = (torch.randn(2, 2, 1, 64, device=device) for _ in range(3))

    def together(queries: Any, keys: Any, values: Any, layer: Any) -> Any:
        return 2 * torch.ops.kvcomp.append_attend(queries, keys, values, layer, 0.125, 0.0)

    torch.ops.kvcomp.append(keys, values, apart)
    out = torch.ops.kvcomp.attend(queries, apart, 0.125, 0.0)
    assert torch.equal(together(queries, keys, values, both), 2 * out)
    traced = torch.compile(together, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(queries, keys, values, compiled), 2 * out)
    assert [int(layer.tokens[0]) for layer in layers] == [91] * 3
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(library.append_attend, (queries, keys, values, both, 0.125, 0.0), test_utils=tests)
    torch.library.opcheck(library.append, (keys, values, both), test_utils=tests)
    torch.library.opcheck(library.attend, (queries, both, 0.125, 0.0), test_utils=tests)
    with pytest.raises(RuntimeError, match=r"^attend: layer: expected the handle of a packed layer, got 0$"):
        torch.ops.kvcomp.attend(queries, torch.zeros(1, dtype=torch.int64), 0.125, 0.0)


@pytest.mark.parametrize("chunk", [None, 40, 64])
@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("policy", ["4 bit", "K8 V4, window", "stochastic"])
def test_prompts_in_parts(chunk: int | None, by_sequence: bool, policy: str) -> None:
    """Sequence by sequence, in chunks, or both: the same tokens, and bytes, as at once."""
    model, batch = build("llama"), padded([150, 117, 133])
    (expected, _), whole_pass = generated(model, POLICIES[policy], batch)
    (ids, _), parts = generated(model, POLICIES[policy], batch, prefill_chunk=chunk, by_sequence=by_sequence)
    if policy != "stochastic" or not by_sequence:  # keyed by the number of a list, which is another one
        assert torch.equal(ids, expected)
    assert parts.cache.nbytes == whole_pass.cache.nbytes
    ours, theirs = (dataclasses.asdict(one.cache.report) for one in (parts, whole_pass))
    for name, value in theirs.items():
        if name not in ("bytes_per_layer", "planned_bytes", "effective"):  # slabs are rounded up for each sequence
            assert ours[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_a_budget_is_shared_out_by_sequences() -> None:
    model, batch = build("llama"), padded([400, 317, 333])
    policy = kvcomp.Policy(target_ratio=4)
    (_, _), parts = generated(model, policy, batch, prefill_chunk=100, by_sequence=True)
    assert parts.cache.ratio >= 4 * 0.97
    assert parts.cache.report.prompt_tokens == 1050
    (_, _), parts = generated(model, kvcomp.Policy(budget_bytes=200_000), batch, by_sequence=True)
    assert 199_990 <= parts.cache.report.budget_bytes <= 200_000


def after_attention(cache: Any, rows: Any) -> None:
    """The cache is as it is when the first layer's attention over a prompt of these rows has run."""
    cache.update(rows, rows, 0)
    attention.forget(cache.layers[0])
    cache.layers[0].first(rows, None, 0.125, 0.0)


def test_another_device_is_refused() -> None:
    model, rows = build("llama"), torch.zeros(1, 2, 8, 64)
    cache = kvcomp.Cache(model.config, FOUR)
    after_attention(cache, rows)
    assert cache.get_seq_length() == 8
    with pytest.raises(NotImplementedError, match="expected all layers on one device, cpu, got cuda:0"):
        cache._state.check_device(torch.device("cuda:0"))
    assert cache.get_seq_length() == 0
    cache.update(rows, rows, 0)


@pytest.mark.parametrize("which", ["one parameter", "a buffer"])
def test_any_tensor_that_moves_is_noticed(played: None, which: str) -> None:
    """Also where the first and the last parameter lie where they lay, as they may after a model went and came back."""
    model, ids = build("llama"), tokens(2, 100)
    with kvcomp.compress(model, FOUR) as packing, torch.no_grad():
        cache = kvcomp.Cache(model.config, FOUR)
        model(ids[:, :90], past_key_values=cache)
        for at in range(90, 94):
            model(ids[:, at : at + 1], past_key_values=cache)
        replays = packing.steps.replays
        moved = model.model.layers[0].mlp.up_proj.weight if which == "one parameter" else next(model.buffers())
        moved.data = moved.data.clone()
        model(ids[:, 94:95], past_key_values=cache)
        assert packing.steps.replays == replays == 3
        model(ids[:, 95:96], past_key_values=cache)
        assert packing.steps.replays == replays + 1


def test_compiled_layers_see_a_plain_name() -> None:
    """Not every torch.compile can look up others; afterwards it is the one that knows what was set before."""
    model, batch = build("llama"), padded([50, 17])
    names = []

    def look(run: Any, **settings: Any) -> Any:
        def compiled(module: Any, args: Any, kwargs: Any) -> Any:
            names.append(model.config._attn_implementation)
            return run(module, args, kwargs)

        return compiled

    with pytest.MonkeyPatch.context() as patch, kvcomp.compress(model, FOUR, compile=True):
        patch.setattr(torch, "compile", look)
        model.generate(**batch, **GREEDY)
        assert {type(name) for name in names} == {str} and set(names) == {attention.NAME}
        assert model.config._attn_implementation.previous == "sdpa"


def test_wrong_options() -> None:
    model = build("llama")
    for options, kind, sentence in (
        ({"graphs": 1}, TypeError, "compress: graphs: expected True or False, got 1"),
        ({"compile": "yes"}, TypeError, "compress: compile: expected True, False, 'auto' or torch.compile's options"),
        ({"prefill_chunk": 0}, ValueError, "compress: prefill_chunk: expected 1 or more tokens, or None, got 0"),
        ({"by_sequence": "no"}, TypeError, "compress: by_sequence: expected True, False or None, got 'no'"),
    ):  # fmt: skip
        with pytest.raises(kind, match=sentence):
            kvcomp.compress(model, FOUR, **options)


# ---- on a GPU


@pytest.fixture(scope="module")
def cuda_model() -> Any:
    return build("llama").cuda()


def cuda(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in inputs.items()}


@contextlib.contextmanager
def counting_granules() -> Iterator[None]:
    """Plans on the CPU have the bytes that they would have on a GPU, whose memory comes in granules: the same plans."""

    with pytest.MonkeyPatch.context() as patch:
        granule = property(lambda self: GRANULE_BYTES if self.keeps else 1)
        patch.setattr(prompt.Compressor, "_granule", granule)
        patch.setattr(prompt.Compressor, "_taken", lambda self: sum(self._page_bytes) + GRANULE_BYTES)
        yield


def shipped_prompt(planned: bool) -> tuple[Any, int]:
    return (shipped_ids(8 * 760).reshape(8, 760), 700) if planned else (shipped_ids(700), 560)


@functools.cache
def exact_logits(device: str, planned: bool) -> Any:
    model, (ids, count) = shipped().to(device), shipped_prompt(planned)
    return decode(model, kvcomp.Cache(model.config, EXACT), ids.to(device), count).cpu()


@GPU
@pytest.mark.parametrize("policy", POLICIES)
def test_the_gpu_chooses_as_the_cpu(policy: str) -> None:
    """On the shipped model, teacher-forced: the same best token wherever the two best lie further apart than the two
    backends' logits do at 16 bits, twice over. Budgets are of several prompts, as they must be of several granules."""
    model, chosen = shipped(), POLICIES[policy]
    planned = chosen.fixed_class is None
    ids, count = shipped_prompt(planned)
    if policy == "given rotation":
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        chosen = kvcomp.Policy(
            bits=4, rotation=kvcomp.Rotation.random(config.num_hidden_layers, config.num_key_value_heads, head_dim)
        )
    logits, reports = {}, {}
    for device in ("cpu", "cuda"):
        cache = kvcomp.Cache(model.config, chosen)
        with counting_granules() if device == "cpu" else contextlib.nullcontext():
            logits[device] = decode(model.to(device), cache, ids.to(device), count).cpu()
        reports[device] = cache.report
    noise = (exact_logits("cuda", planned) - exact_logits("cpu", planned)).abs().max()
    decided = gap(logits["cpu"]) > 2 * noise
    assert decided.sum() >= 60, "the model decides too little for this test"
    same = logits["cuda"].argmax(-1) == logits["cpu"].argmax(-1)
    if planned:  # ties between plans may fall the other way
        here, there = reports["cpu"], reports["cuda"]
        assert not there.over_budget and abs(there.kept_fraction - here.kept_fraction) < 0.02 < here.kept_fraction
        assert same[decided].float().mean() >= 0.99
    elif policy == "stochastic":
        assert same[decided].float().mean() >= 0.97
    else:
        assert same[decided].all()


@GPU
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", SHAPES)
def test_models_on_the_gpu(family: str, dtype: str) -> None:
    """16 bits are exact storage: the plain model's best token, wherever its own attentions agree about it."""
    model = build(family, getattr(torch, dtype)).cuda()
    ids = tokens(1, 130).cuda()
    plain = whole(model, ids, 90)
    other = whole(build(family, getattr(torch, dtype)).float().cuda(), ids, 90)
    noise = 1.5 * (plain - other).abs().max() + 0.01 * plain.std()
    packed = decode(model, kvcomp.Cache(model.config, EXACT), ids, 90)
    decided = gap(plain) > noise
    assert decided.sum() >= 15, "the model decides too little for this test"
    assert (packed.argmax(-1) == plain.argmax(-1))[decided].all()


@GPU
@pytest.mark.parametrize("family", SHAPES)
def test_recorded_steps_equal_steps_as_they_are(family: str) -> None:
    """Bit by bit, over more than 200 tokens, through pools that grow and pages that are packed."""
    model, batch = build(family, torch.bfloat16).cuda(), cuda(padded([150, 117, 133]))
    settings = GREEDY | {"max_new_tokens": 220}
    (ids, logits), packing = generated(model, FOUR, batch, settings)
    (plain_ids, plain_logits), plain = generated(model, FOUR, batch, settings, graphs=False)
    assert plain.steps.replays == 0 and packing.steps.replays >= 200
    assert torch.equal(ids, plain_ids) and torch.equal(logits, plain_logits)


@GPU
@pytest.mark.parametrize("policy", ["4x", "K8 V4, window"])
def test_recorded_steps_of_other_policies(policy: str, cuda_model: Any) -> None:
    batch = cuda(padded([250, 217, 233]))
    settings = GREEDY | {"max_new_tokens": 220}
    (ids, logits), packing = generated(cuda_model, POLICIES[policy], batch, settings)
    (plain_ids, plain_logits), _ = generated(cuda_model, POLICIES[policy], batch, settings, graphs=False)
    assert packing.steps.replays >= 190
    assert torch.equal(ids, plain_ids) and torch.equal(logits, plain_logits)


@GPU
def test_several_caches_on_the_gpu(cuda_model: Any) -> None:
    check_several_caches(cuda_model, "cuda")


@GPU
def test_what_is_not_a_step_on_the_gpu() -> None:
    check_what_is_not_a_step(build("llama"), "cuda")


@GPU
def test_the_switch_in_the_environment(cuda_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMP_GRAPHS", "0")
    _, packing = generated(cuda_model, FOUR, cuda(padded([50, 17])))
    assert packing.steps.replays == 0


@GPU
def test_a_model_that_moves_is_recorded_anew() -> None:
    model, ids = build("llama").cuda(), tokens(2, 120).cuda()
    logits = {}
    for moves in (False, True):
        with kvcomp.compress(model, FOUR, graphs=moves), torch.no_grad():
            cache, rows = kvcomp.Cache(model.config, FOUR), []
            model(ids[:, :90], past_key_values=cache)
            for at in range(90, 120):
                if moves and at == 100:
                    model.cpu().cuda()
                rows.append(model(ids[:, at : at + 1], past_key_values=cache).logits.clone())
        logits[moves] = torch.cat(rows, 1)
    assert torch.equal(logits[False], logits[True])


@GPU
def test_batches_beams_and_samples_on_the_gpu(cuda_model: Any) -> None:
    """Against the model on the CPU, in 32 bits: the same tokens."""
    model = build("llama")
    batch = padded([50, 17, 33])
    for settings in (GREEDY, GREEDY | {"num_beams": 3}, GREEDY | {"prefill_chunk_size": 16}):
        expected = model.generate(**batch, past_key_values=kvcomp.Cache(model.config, EXACT), **settings)
        (ids, _), packing = generated(cuda_model, EXACT, cuda(batch), settings)
        assert torch.equal(ids.cpu(), expected)
        assert packing.steps.replays > 0 or "num_beams" in settings


@GPU
def test_second_prompts_on_the_gpu(cuda_model: Any) -> None:
    """A later turn with padding between: rows are brought to the left and back."""
    model, batch = build("llama"), padded([30, 21])
    outs = []
    for each, put in ((model, lambda inputs: inputs), (cuda_model, cuda)):
        cache = kvcomp.Cache(each.config, EXACT)
        first = each.generate(**put(batch), past_key_values=cache, **GREEDY).cpu()
        more = padded([9, 4], seed=1)
        turn = {
            "input_ids": torch.cat([first, more["input_ids"]], 1),
            "attention_mask": torch.cat(
                [batch["attention_mask"], torch.ones(2, 12, dtype=torch.long), more["attention_mask"]], 1
            ),
        }
        outs.append(each.generate(**put(turn), past_key_values=cache, **GREEDY).cpu())
    assert torch.equal(*outs)


@GPU
def test_reset_save_and_load_on_the_gpu(cuda_model: Any, tmp_path: Path) -> None:
    batch = cuda(padded([130, 121]))
    cache = kvcomp.Cache(cuda_model.config, FOUR)
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(0)
        cuda_model(**batch, position_ids=positions, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        more = tokens(2, 5, seed=9).cuda()
        expected = cuda_model(more, past_key_values=cache).logits
        loaded = kvcomp.Cache.load(tmp_path / "cache.safetensors", cuda_model.config)
        assert torch.equal(expected, cuda_model(more, past_key_values=loaded).logits)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)


@GPU
def test_answers_in_parts_on_the_gpu(cuda_model: Any) -> None:
    check_turns(cuda_model, cuda)


@GPU
def test_prompts_in_parts_on_the_gpu(cuda_model: Any) -> None:
    batch = cuda(padded([150, 117, 133]))
    (expected, _), whole_pass = generated(cuda_model, FOUR, batch)
    for chunk, by_sequence in ((None, True), (40, False), (40, True)):
        (ids, _), parts = generated(cuda_model, FOUR, batch, prefill_chunk=chunk, by_sequence=by_sequence)
        assert torch.equal(ids, expected)
        assert parts.cache.ratio >= 0.9 * whole_pass.cache.ratio


@GPU
def test_compiled_layers_on_the_gpu() -> None:
    """Recorded and compiled: bit by bit what is compiled and not recorded."""
    model, batch = build("llama", torch.bfloat16, layers=3).cuda(), cuda(padded([150, 117]))
    settings = GREEDY | {"max_new_tokens": 40}
    (ids, logits), packing = generated(model, FOUR, batch, settings, compile=True)
    (plain_ids, plain_logits), _ = generated(model, FOUR, batch, settings, compile=True, graphs=False)
    assert packing.steps.replays >= 35
    assert torch.equal(ids, plain_ids) and torch.equal(logits, plain_logits)


@GPU
@pytest.mark.parametrize("weights", [16, 4])
def test_kernels_that_overlap_give_the_same(weights: int) -> None:
    """Steps whose compiled kernels begin early are, bit by bit, those that wait: 200 tokens of a model large enough
    for several kernels to be under way."""
    settings = GREEDY | {"max_new_tokens": 200}
    model = build("llama", torch.bfloat16, layers=6)
    if weights == 4:
        quantize_model(model, target="all")
    model, batch = model.cuda(), cuda(padded([150, 117, 90, 20]))
    runs = [
        generated(model, FOUR, batch, settings, compile=compile)
        for compile in (True, {"triton.enable_pdl": False, "combo_kernels": False}, {"combo_kernels": False})
    ]
    for (ids, logits), packing in runs:
        assert packing.steps.replays >= 190
        assert torch.equal(ids, runs[0][0][0]) and torch.equal(logits, runs[0][0][1])


@GPU
def test_several_devices_are_refused(cuda_model: Any) -> None:
    """Layers on two devices: by name, and the cache is empty again."""
    cache = kvcomp.Cache(cuda_model.config, FOUR)
    near, far = torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 64, device="cuda")
    after_attention(cache, near)
    with pytest.raises(NotImplementedError, match="expected all layers on one device, cpu, got cuda:0"):
        cache.update(far, far, 1)
    assert cache.get_seq_length() == 0


@GPU
def test_random_weights_of_phi_3_and_gemma() -> None:
    for kind in ("phi3", "gemma"):
        settings: dict[str, Any] = {
            "vocab_size": 211, "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "max_position_embeddings": 2048, "initializer_range": 0.15,
        }  # fmt: skip
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16
        ).eval()
        batch = padded([50, 17])
        expected = model.float().generate(**batch, **GREEDY)
        (ids, _), packing = generated(model.cuda(), EXACT, cuda(batch))
        assert packing.steps.replays > 0
        assert (ids.cpu() == expected).float().mean() >= 0.9


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@GPU
@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_does_not_wait_for_the_device(cuda_model: Any, graphs: bool) -> None:
    ids = tokens(2, 120).cuda()
    positions = torch.arange(120, device="cuda")[None]
    with kvcomp.compress(cuda_model, FOUR, graphs=graphs), torch.no_grad():
        cache = kvcomp.Cache(cuda_model.config, FOUR)
        cuda_model(ids[:, :90], past_key_values=cache)
        for at in range(90, 94):
            cuda_model(ids[:, at : at + 1], position_ids=positions[:, at : at + 1], past_key_values=cache)
        with _no_waiting():
            for at in range(94, 120):
                cuda_model(ids[:, at : at + 1], position_ids=positions[:, at : at + 1], past_key_values=cache)
