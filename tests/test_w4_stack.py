"""Layers that are called with the same x as one product (kvcomp.w4.stack): the same bits as apart, whatever is called,
changed or moved; without a second copy of weights."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import kvcomp  # noqa: E402
from experiment_support import EXPERIMENTS  # noqa: E402
from kvcomp.w4 import SharedScaleLinear, W4Config, quantize_model, report  # noqa: E402
from kvcomp.w4 import library as w4_library  # noqa: E402
from kvcomp.w4 import stack as w4_stack  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = EXPERIMENTS / "models" / "tiny-base"
FORMATS = [(128, 5), (64, -1), (32, 3)]
KINDS = ("Llama", "Qwen2", "Mistral", "Phi3")  # Qwen2: biases; Phi3: fused projections
LAYERS = 2


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of W of every product that is computed."""
    found: list[int] = []
    plain = w4_library.linear

    def counting(x: Any, packed: Any, bias: Any, n: int, *more: Any) -> Any:
        found.append(n)
        return plain(x, packed, bias, n, *more)

    monkeypatch.setattr(w4_library, "linear", counting)
    return found


def plain(kind: str = "Llama", dtype: Any = torch.bfloat16) -> Any:
    """Values and up-projections are larger than the others: exponents of a stack differ."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        sliding_window=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
        if "v_proj.weight" in name or "up_proj.weight" in name:
            parameter.data *= 2**9
    return model.requires_grad_(False)


def make(
    kind: str = "Llama", group: int = 32, mbits: int = 3, stacked: bool = True, dtype: Any = torch.bfloat16
) -> Any:
    model = plain(kind, dtype)
    quantize_model(model, "all", group_size=group, scale_mbits=mbits, stacked=stacked)
    return model


def logits(model: Any, tokens: int = 7) -> torch.Tensor:
    ids = torch.randint(0, 128, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(model.device)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.float().cpu()
    return found


def attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


def rows_of(seed: int = 0, count: int = 3, dtype: Any = torch.bfloat16) -> torch.Tensor:
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alone(layer: SharedScaleLinear, x: torch.Tensor) -> torch.Tensor:
    """The ordinary product, from the layer's own state."""
    return w4_library.linear(
        x, layer.weight, layer.bias, layer.out_features, layer.in_features, layer.group_size,
        layer.scale_mbits, layer.exponent,
    )  # fmt: skip


def storage_bytes(model: Any) -> int:
    storages = [held.untyped_storage() for held in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group", "mbits"), FORMATS)
def test_logits_are_those_of_layers_apart(kind: str, group: int, mbits: int) -> None:
    model, apart = make(kind, group, mbits), make(kind, group, mbits, False)
    assert report(model).stacks == (0 if kind == "Phi3" else 2 * LAYERS) and report(apart).stacks == 0
    assert report(model).layers == report(apart).layers
    for tokens in (1, 5, 256, 300):
        assert torch.equal(logits(model, tokens), logits(apart, tokens))


def test_exponents_of_a_stack_differ() -> None:
    assert len({getattr(attention(make()), name).exponent for name in ("q_proj", "k_proj", "v_proj")}) == 2


def test_the_shipped_model() -> None:
    found = []
    for stacked in (True, False):
        config = W4Config("all", stacked=stacked)
        model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype="auto", quantization_config=config).eval()
        assert (report(model).stacks > 0) == stacked
        found.append(logits(model, 48))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_one_product_a_stack(kind: str, products: list[int]) -> None:
    model = make(kind)
    logits(model)
    assert products == [256, 128, 384, 128] * LAYERS
    products.clear()
    logits(model, 300)  # rows
    assert products == [128, 64, 64, 128, 192, 192, 128] * LAYERS
    assert w4_stack._plain.open is None


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_no_byte_is_held_twice(kind: str) -> None:
    model, apart = make(kind), make(kind, stacked=False)
    assert storage_bytes(model) == storage_bytes(apart)
    assert report(model).bits_per_weight == report(apart).bits_per_weight
    moved = model.to(torch.float32)
    assert storage_bytes(moved) == storage_bytes(apart.to(torch.float32)) and report(moved).stacks == 2 * LAYERS
    storages = {layer.weight.untyped_storage().data_ptr() for layer in model.modules() if hasattr(layer, "stack_rank")}
    assert len(storages) == 4 * LAYERS


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_saved_and_read_as_apart(kind: str, tmp_path: Path) -> None:
    model, apart = make(kind), make(kind, stacked=False)
    assert list(model.state_dict()) == list(apart.state_dict())
    model.save_pretrained(tmp_path / "stacked")
    apart.save_pretrained(tmp_path / "apart")
    files = [tmp_path / name / "model.safetensors" for name in ("stacked", "apart")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for folder, stacks in (("stacked", 2 * LAYERS), ("apart", 0)):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").eval()
        assert report(again).stacks == stacks and torch.equal(logits(again), logits(apart))
    path = tmp_path / "apart" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"].pop("stacked") is False
    path.write_text(json.dumps(config))  # one from before there were stacks
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "apart", dtype="auto").eval()
    assert report(again).stacks == 2 * LAYERS and torch.equal(logits(again), logits(apart))


def test_sharded(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert torch.equal(logits(again), logits(model)) and report(again).stacks == 2 * LAYERS


@pytest.mark.parametrize("assign", [False, True])
def test_another_state_is_loaded(assign: bool) -> None:
    model, other = make("Qwen2"), plain("Qwen2")
    for name, parameter in other.named_parameters():
        if "q_proj" in name:
            parameter.data *= 2**9
    quantize_model(other, "all", group_size=32, scale_mbits=3, stacked=False)
    logits(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert torch.equal(logits(model), logits(other))
    assert report(model).stacks == (0 if assign else 2 * LAYERS)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_copies(kind: str, products: list[int]) -> None:
    model = make(kind)
    expected = logits(model)
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    written.seek(0)
    assert all(torch.equal(held, model.state_dict()[name]) for name, held in torch.load(written).items())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert report(made).stacks == 2 * LAYERS and storage_bytes(made) == storage_bytes(model)
        assert not {held.data_ptr() for held in made.buffers()} & {held.data_ptr() for held in model.buffers()}
        products.clear()
        assert torch.equal(logits(made), expected) and len(products) == 4 * LAYERS
        made._apply(torch.clone)  # as a move is
        assert report(made).stacks == 2 * LAYERS and torch.equal(logits(made), expected)
    x, part = rows_of(), copy.deepcopy(attention(model).k_proj)
    assert torch.equal(part(x), attention(model).k_proj(x))


def test_any_order_and_any_x() -> None:
    found = attention(make("Qwen2"))
    layers = [found.q_proj, found.k_proj, found.v_proj]
    x, other = rows_of(), rows_of(1)
    for calls in (
        [(2, x), (1, x), (0, x)], [(1, x)], [(0, x), (2, x), (1, x), (2, x), (1, x)], [(0, x), (1, other), (2, x)],
        [(0, x), (0, other), (1, x), (2, other)], [(0, x), (1, x.clone()), (2, x[:2])], [(0, x), (1, x.view(3, 128))],
    ):  # fmt: skip
        for i, given in calls:
            assert torch.equal(layers[i](given), alone(layers[i], given))


def test_what_a_caller_changes_is_its_own() -> None:
    found = attention(make("Llama"))
    x = rows_of()
    for _ in range(2):
        for layer in (found.q_proj, found.k_proj, found.k_proj, found.v_proj):
            got = layer(x)
            assert torch.equal(got, alone(layer, x))
            got.mul_(2)


def test_what_changed_between_the_calls_counts() -> None:
    found = attention(make("Qwen2"))
    q, k, v = found.q_proj, found.k_proj, found.v_proj
    x = rows_of()

    def turned() -> None:
        k.weight.copy_(v.weight)

    def replaced() -> None:
        k.weight = k.weight.clone()

    def biased() -> None:
        k.bias.add_(1)

    def shifted() -> None:
        k.exponent += 1

    def unbiased() -> None:
        k.bias = None

    for change in (lambda: x.mul_(2), biased, turned, shifted, replaced, unbiased):
        q(x)
        change()
        assert torch.equal(k(x), alone(k, x)) and torch.equal(v(x), alone(v, x))
        assert torch.equal(q(x), alone(q, x)) and torch.equal(k(x), alone(k, x))


def test_data_that_was_set_counts() -> None:
    found = attention(make("Qwen2"))
    x = rows_of()
    found.k_proj.bias.data = found.k_proj.bias + 1
    found.v_proj.weight.data = found.k_proj.weight.clone()
    for layer in (found.q_proj, found.k_proj, found.v_proj):
        assert torch.equal(layer(x), alone(layer, x))


def test_replaced_layers() -> None:
    model = make()
    found, x = attention(model), rows_of()
    expected = logits(model)
    found.k_proj = copy.deepcopy(found.k_proj)
    assert torch.equal(logits(model), expected)
    found.k_proj = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(found.q_proj(x), alone(found.q_proj, x))
        assert torch.equal(found.k_proj(x), torch.nn.functional.linear(x, found.k_proj.weight, found.k_proj.bias))
        assert torch.equal(found.v_proj(x), alone(found.v_proj, x))
    assert attention(make().dequantize()).q_proj(x).shape == (3, 128)


def test_gradients_are_refused_of_every_layer() -> None:
    found = attention(make())
    x = rows_of().requires_grad_()
    with torch.no_grad():
        found.q_proj(x)
    for layer in (found.k_proj, found.q_proj):
        with pytest.raises(NotImplementedError, match="expected one without gradients"):
            layer(x)


def test_autocast_and_inference_mode_between_the_calls() -> None:
    found = attention(make(dtype=torch.float32))
    x = rows_of(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert found.q_proj(x).dtype == found.k_proj(x).dtype == torch.bfloat16
        assert found.q_proj(x).dtype == torch.bfloat16
    assert found.k_proj(x).dtype == torch.float32
    with torch.inference_mode():
        found.q_proj(x)
    assert not found.k_proj(x).is_inference()
    with torch.inference_mode():
        inside = x * 1
        for layer in (found.q_proj, found.k_proj, found.v_proj):
            assert torch.equal(layer(inside), alone(layer, x))


def test_nothing_is_kept() -> None:
    model = make()
    found, x = attention(model), rows_of()
    seen = weakref.ref(x)
    for layer in (found.q_proj, found.k_proj, found.v_proj):
        layer(x)
    del x
    assert seen() is None
    held = weakref.ref(found.q_proj)
    del model, found, layer
    assert held() is None  # without the collector: a stack is no cycle


def test_threads_do_not_take_each_others() -> None:
    found = attention(make())
    x = rows_of()
    found.q_proj(x)
    seen: list[Any] = []
    other = threading.Thread(target=lambda: seen.extend([w4_stack._plain.open, found.k_proj(x)]))
    other.start()
    other.join()
    assert seen[0] is None and torch.equal(seen[1], alone(found.k_proj, x))


class Block(torch.nn.Module):
    def __init__(self, rows: tuple[int, ...] = (128, 64, 64), biases: tuple[int, ...] = (0, 0, 0)) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj")
        for name, n, bias in zip(names, rows, biases, strict=True):
            setattr(self, name, torch.nn.Linear(128, n, bias=bool(bias)))


@pytest.mark.parametrize(
    ("block", "name", "stacks"),
    [
        (Block(), "attn", 1),
        (Block(rows=(128, 64, 70)), "attn", 1),
        (Block(rows=(128, 70, 64)), "attn", 0),
        (Block(biases=(1, 1, 1)), "attn", 1),
        (Block(biases=(1, 0, 1)), "attn", 0),  # Whisper
        (Block(), "cross_attn", 0),
        (Block(), "encoder_attn", 0),
    ],
)
def test_which_layers_are_stacked(block: Any, name: str, stacks: int) -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({name: copy.deepcopy(block)})])})
    assert quantize_model(model, "all").stacks == stacks
    found = model["layers"][0][name]
    x = rows_of(dtype=torch.float32)
    for layer in (found.q_proj, found.k_proj, found.v_proj):
        assert torch.equal(layer(x), alone(layer, x))


@pytest.mark.parametrize("order", list(itertools.permutations(("q_proj", "k_proj", "v_proj"))))
def test_moved_in_any_order(order: tuple[str, ...]) -> None:
    """As OPT's, whose queries are its last layer."""
    block = torch.nn.Module()
    for name in order:
        setattr(block, name, torch.nn.Linear(128, 64, bias=False))
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"attn": block})])})
    assert quantize_model(model, "all").stacks == 1
    before = storage_bytes(model)
    model._apply(torch.clone)  # as a move is
    assert report(model).stacks == 1 and storage_bytes(model) == before


def test_a_layer_of_two_modules_is_not_stacked() -> None:
    one, two = Block(), Block()
    two.k_proj = one.k_proj
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([one, two])})
    assert quantize_model(model, "all").stacks == 0


def test_layers_of_several_formats_are_not_stacked() -> None:
    block = Block()
    for name, mbits in (("q_proj", 5), ("k_proj", 5), ("v_proj", 3)):
        setattr(block, name, SharedScaleLinear.from_linear(getattr(block, name), 128, mbits))
    assert w4_stack.stack_layers(block) == 0


def test_config() -> None:
    assert W4Config("all").stacked and W4Config.from_dict(W4Config(stacked=False).to_dict()).stacked is False
    with pytest.raises(ValueError, match="W4Config: stacked: expected True or False, got 1"):
        W4Config(stacked=1)  # type: ignore[arg-type]


# ---- torch.compile


def stack_arguments(apart: bool = False) -> tuple[Any, ...]:
    found = attention(make("Qwen2"))
    layers = [found.q_proj, found.k_proj, found.v_proj]
    weights, biases = ([getattr(layer, name).detach() for layer in layers] for name in ("weight", "bias"))
    if apart:
        weights, biases = ([held.clone() for held in part] for part in (weights, biases))
    return rows_of(), weights, biases, [128, 64, 64], 128, 32, 3, [layer.exponent for layer in layers]


@pytest.mark.parametrize("apart", [False, True])
def test_operation_follows_torchs_rules(apart: bool, products: list[int]) -> None:
    arguments = stack_arguments(apart)
    torch.library.opcheck(torch.ops.kvcomp.w4_stack.default, arguments)
    products.clear()
    found = torch.ops.kvcomp.w4_stack(*arguments)
    assert products == ([128, 64, 64] if apart else [256])
    assert torch.equal(found, torch.ops.kvcomp.w4_stack(*stack_arguments(not apart)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_compiles_whole_and_once(kind: str, backend: str, products: list[int]) -> None:
    """As a decode step is: one function for all layers, without breaks, again and again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model, apart = make(kind), make(kind, stacked=False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def run(layer: Any, x: torch.Tensor) -> torch.Tensor:
        of = layer.self_attn
        parts = torch.cat((of.q_proj(x), of.k_proj(x), of.v_proj(x)), -1)
        return layer.mlp(x) + parts[..., :128] * parts[..., 128:]

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for seed in range(3):
            x = rows_of(seed, 2)
            seen = weakref.ref(x)
            for layer, other in zip(model.model.layers, apart.model.layers, strict=True):
                products.clear()
                out = compiled(layer, x)
                assert sorted(products) == [128, 256, 384] and w4_stack._traced.open is None
                torch.testing.assert_close(out, run(other, x), rtol=0.05, atol=0.05 * float(out.abs().max()))
            del x
            assert seed == 0 or seen() is None
    assert counter.frame_count == 1
    # Moved apart, it is other products of the same bits.
    x = rows_of()
    want = compiled(model.model.layers[0], x)
    for module in model.model.layers[0].modules():
        if isinstance(module, SharedScaleLinear):
            module.weight = module.weight.clone()
    products.clear()
    with torch.no_grad():
        assert torch.equal(compiled(model.model.layers[0], x), want)
    assert sorted(products) == [64, 64, 128, 128, 192, 192]


def test_compiled_calls_in_any_order() -> None:
    found = attention(make("Qwen2"))
    x, other = rows_of(), rows_of(1)

    def run(x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = found.q_proj, found.k_proj, found.v_proj
        return k(x), q(x), v(other), k(other), q(other), k(x), v(other), k(x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            for got, want in zip(compiled(x, other), run(x, other), strict=True):
                assert torch.equal(got, want)
        one = torch.compile(found.q_proj, backend="aot_eager", fullgraph=True)
        assert torch.equal(one(x), alone(found.q_proj, x))
        assert torch.equal(compiled(x, other)[2], alone(found.v_proj, other))


def test_compiled_model_and_packed_cache(products: list[int]) -> None:
    """kvcomp.compress compiles decoder layers of decode steps."""
    model, apart = make(), make(stacked=False)
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0
    }  # fmt: skip
    for compiles in (False, True):
        found = []
        for each in (model, apart):
            torch._dynamo.reset()
            products.clear()
            with kvcomp.compress(each, kvcomp.Policy(bits=16), compile=compiles):
                found.append(each.generate(ids, **arguments))
            # The prompt, and seven steps.
            assert products.count(256) == products.count(384) == (8 * LAYERS if each is model else 0)
            assert products.count(64) == (0 if each is model else 2 * 8 * LAYERS)
        assert torch.equal(found[0][:, :28], found[1][:, :28])
        assert w4_stack._plain.open is None and w4_stack._traced.open is None


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_gpu_layers_are_those_apart(kind: str, dtype: Any, products: list[int]) -> None:
    """Sums may be of another order: nothing but the last bit of what is rounded to x's type."""
    model = make(kind, dtype=dtype)
    found = attention(model.cuda())
    assert report(model).stacks == 2 * LAYERS
    layers = [found.q_proj, found.k_proj, found.v_proj]
    for count in (1, 8, 16, 17, 33, 64, 256, 300):
        x = rows_of(count, count, dtype).cuda()
        want = [alone(layer, x) for layer in layers]
        products.clear()
        got = [layer(x) for layer in layers]
        assert products == ([256] if count <= 256 else [128, 64, 64])
        for one, other in zip(got, want, strict=True):
            unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
            torch.testing.assert_close(one, other, rtol=unit, atol=unit * float(other.abs().max()) / 8)


@pytest.mark.gpu
def test_gpu_stacks_in_a_graph() -> None:
    found = attention(make("Qwen2").cuda())
    layers = [found.q_proj, found.k_proj, found.v_proj]
    x = rows_of().cuda()
    for layer in layers:
        layer(x)
    graph = torch.cuda.CUDAGraph()
    found.q_proj(x)  # is not what the recording takes from
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        first = found.k_proj(x)
        outs = [layer(x) for layer in layers]
    for seed in range(3):
        x.copy_(rows_of(seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first, found.k_proj(x))
        assert all(torch.equal(out, layer(x)) for out, layer in zip(outs, layers, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_gpu_model_with_the_packed_cache(kind: str, products: list[int]) -> None:
    """Moved, compiled, recorded and replayed."""
    model, apart = make(kind).cuda(), make(kind, stacked=False).cuda()
    assert report(model).stacks == 2 * LAYERS and storage_bytes(model) == storage_bytes(apart)
    torch.testing.assert_close(logits(model), logits(apart), rtol=0.05, atol=0.05 * float(logits(apart).abs().max()))
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0)).cuda()
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0
    }  # fmt: skip
    for compiles in (False, True):
        torch._dynamo.reset()
        products.clear()
        with kvcomp.compress(model, kvcomp.Policy(bits=16), compile=compiles) as packing:
            out = model.generate(ids, **arguments)
            assert packing.steps.replays > 0
        assert out.shape == (2, 48) and 64 not in products and {256, 384} <= set(products)
        assert w4_stack._plain.open is None and w4_stack._traced.open is None
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        x = rows_of(0, 2).cuda()
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model.model.layers[0].mlp(x), rtol=0.05, atol=1.0)
