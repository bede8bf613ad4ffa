"""Packed caches on a GPU against the same ones on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from kvcomp import measure  # noqa: E402
from kvcomp.layer_input import LayerInput  # noqa: E402
from kvcomp.packed import Packed  # noqa: E402
from kvcomp.policy import Policy  # noqa: E402
from kvcomp.prompt import Compressor, compress_prompt  # noqa: E402
from kvcomp.rotation import Rotation  # noqa: E402
from kvcomp.saved import Saved, load, save  # noqa: E402
from kvcomp.selectors import H2O, KeyNorm, SnapKV, Streaming  # noqa: E402
from kvcomp.store import Coding, Layout  # noqa: E402
from reference import Array  # noqa: E402

pytestmark = pytest.mark.gpu
B, H, D, LAYERS = 2, 2, 128, 3


def tensor_of(seed: int, *shape: int, kind: Any = None) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kind or torch.bfloat16)


def prompt(
    s: int = 500, first: Any = None, layers: int = LAYERS, b: int = B, h: int = H, d: int = D
) -> list[LayerInput]:
    return [
        LayerInput(
            tensor_of(i, b, h, s, d),
            tensor_of(50 + i, b, h, s, d),
            tensor_of(90 + i, b, 2 * h, min(s, 32), d),
            first=first,
        )
        for i in range(layers)
    ]


def on_gpu(layers: list[LayerInput]) -> list[LayerInput]:
    return [
        LayerInput(
            layer.keys.cuda(), layer.values.cuda(), None if layer.queries is None else layer.queries.cuda(),
            importance=layer.importance, first=layer.first, scale=layer.scale, softcap=layer.softcap,
        )
        for layer in layers
    ]  # fmt: skip


def same_pages(a: Packed, b: Packed) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        assert np.array_equal(x.lists, y.lists) and np.array_equal(x.aged, y.aged)
        names = ["k_bits", "v_bits", "tokens"]
        assert np.array_equal(x.entries()[names], y.entries()[names])
        assert all(np.array_equal(one, other) for one, other in zip(x.unpack(), y.unpack(), strict=True))


def same_mirrors(packed: Packed) -> None:
    """What the host says of the device is so."""
    assert packed.stacked is not None
    torch.cuda.synchronize()
    for group in packed.stacked.groups:
        group.catch_up(range(len(group.layers)))
        for mirror, there in zip(group.mirror, group.there, strict=True):
            assert np.array_equal(mirror.view(there.cpu().numpy().dtype), there.cpu().numpy())


def near(out: Any, expected: Array, what: Any = None) -> None:
    """attend's bound, and half a unit of the output's type."""
    found = out.float().cpu().numpy()
    rms = np.sqrt((expected.astype(np.float64) ** 2).mean(-1, keepdims=True))
    unit = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[out.dtype]
    assert (np.abs(found - expected) <= 4e-3 * rms + 2 * unit * np.abs(expected) + 1e-6).all(), what


def step_rows(seed: int, b: int, q: int, kind: Any = None) -> tuple[Any, Any, Any]:
    return tuple(tensor_of(seed + i, b, heads, q, D, kind=kind) for i, heads in enumerate((2 * H, H, H)))  # type: ignore[return-value]


def run(plain: Packed, there: Packed, seed: int, q: int, valid: Any = None) -> None:
    """One pass over both."""
    assert there.stacked is not None
    there.stacked.begin_step(q, valid)
    for index, (a, b) in enumerate(zip(plain.layers, there.layers, strict=True)):
        rows = step_rows(1000 * seed + 10 * index, a.batch, q)
        expected = a.append_attend(*(part.float() for part in rows), scale=0.1, valid=valid)
        out = b.append_attend(*(part.cuda() for part in rows), scale=0.1, valid=valid)
        near(out, expected.numpy(), (seed, index))


POLICIES = {
    "2 bits": Policy(bits=2),
    "4 bits": Policy(bits=4, window=20, sinks=3),
    "16 bits": Policy(bits=16),
    "K 8, V 3": Policy(k_bits=8, v_bits=3),
    "chosen tokens": Policy(bits=4, select=KeyNorm(keep=0.5), window=16),
}


# ---- the prompt


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("first", [None, [0, 333]])
def test_fixed_bits(name: str, first: Any) -> None:
    """The same bytes in the same pages."""
    layers = prompt(first=None if first is None else np.array(first))
    plain = compress_prompt(layers, POLICIES[name], positions=True)
    there = compress_prompt(on_gpu(layers), POLICIES[name], positions=True)
    assert there.arena.device == torch.cuda.current_device() and there.stacked is not None
    same_pages(plain, there)
    assert plain.positions is not None and there.positions is not None
    assert all(np.array_equal(a, b) for a, b in zip(plain.positions, there.positions, strict=True))
    assert plain.report.tokens_per_class == there.report.tokens_per_class
    assert sum(there.ledger().values()) == there.nbytes and there.nbytes % (2 << 20) < 1 << 20


def test_given_importance_gives_the_same_plan() -> None:
    """Where the budget is what a GPU's granules make of it."""
    layers = prompt(4096)
    for i, layer in enumerate(layers):
        layer.importance = np.random.default_rng(i).random((B, H, 4096), np.float32) ** 8
    policy = Policy(target_ratio=4)
    there = compress_prompt(on_gpu(layers), policy)
    assert there.nbytes <= (there.report.budget_bytes or 0) and there.ratio >= 4
    plain = compress_prompt(layers, Policy(budget_bytes=there.nbytes))
    assert abs(plain.report.kept_fraction - there.report.kept_fraction) < 0.1
    same_pages(there.to("cpu"), there)
    moved = plain.to("cuda")
    same_pages(plain, moved)
    same_pages(plain, moved.to("cpu"))


@pytest.mark.parametrize("select", [None, SnapKV(window=16), KeyNorm(), H2O(), SnapKV(values="centered")])
def test_measures(select: Any) -> None:
    """Importance up to rounding; distortion to the bit, as its sample is measured on the host."""
    layer = prompt(700, first=np.array([0, 300]), layers=1)[0]
    layer.queries = tensor_of(5, B, 2 * H, 700, D)
    there = on_gpu([layer])[0]
    policy = Policy(target_ratio=4, select=select)
    a, b = measure.importance_of(layer, policy, 0), measure.importance_of(there, policy, 0)
    np.testing.assert_allclose(b, a, rtol=3e-2, atol=1e-6)
    coding = Coding(Layout(D, D, 1, 2), 1, 0, 0, 0)
    for x, y in zip(*(measure.distortion_begun(part, coding, 128, 0)() for part in (layer, there)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4)


@pytest.mark.parametrize("select", [None, KeyNorm(values="norm"), H2O(), Streaming()])
def test_measured_behind_a_busy_gpu(select: Any) -> None:
    """The host does not wait for the layer that was added last; the plan is that of a host that waits for each."""
    layers = prompt(4096)
    for index, layer in enumerate(layers):
        layer.queries = tensor_of(90 + index, B, 2 * H, 4096, D)
    layers, policy = on_gpu(layers), Policy(target_ratio=4, select=select)
    packed = []
    for waits in (True, False):
        compressor = Compressor(policy, LAYERS)
        for index, layer in enumerate(layers):
            torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s
            compressor.add(layer)
            if waits:
                compressor._catch_up()
            elif index == 0:  # memory for copies is there from the first round
                assert not torch.cuda.current_stream().query()
        packed.append(compressor.finish())
    same_pages(packed[0].to("cpu"), packed[1])


def same_rows(plain: Packed, there: Packed) -> None:
    """The same rows, but for roundings of their products with a matrix, in which a value between two codes may take the
    other one."""
    for a, b in zip(plain.layers, there.layers, strict=True):
        assert np.array_equal(a.lists, b.lists)
        for x, y in zip(a.unpack(), b.unpack(), strict=True):
            assert np.abs(x - y).mean() < 1e-3
            assert (np.linalg.norm(x - y, axis=-1) > 0.1).mean() < 5e-3


def test_given_rotation() -> None:
    """One code that is another one may be more than attend's bound: attention is compared over the very same pages."""
    layers = prompt()
    rotation = Rotation.random(LAYERS, H, D, seed=1)
    plain, there = (compress_prompt(part, Policy(bits=4, rotation=rotation)) for part in (layers, on_gpu(layers)))
    same_rows(plain, there)
    for step in range(80):
        assert there.stacked is not None
        there.stacked.begin_step(1)
        rows = [step_rows(1000 * step + 10 * index, B, 1) for index in range(LAYERS)]
        outs = [
            layer.append_attend(*(part.cuda() for part in each), scale=0.1)
            for layer, each in zip(there.layers, rows, strict=True)
        ]
        copy = there.to("cpu")
        for index, (layer, out, each) in enumerate(zip(copy.layers, outs, rows, strict=True)):
            near(out, layer.attend(each[0].float(), scale=0.1).numpy(), (step, index))
            plain.layers[index].append(*(part.float() for part in each[1:]))
    same_rows(plain, there)


def test_layers_are_packed_as_they_come() -> None:
    """With fixed bits the prompt's K and V are needed no longer than until the next layer."""
    size = 4 * 8 * 4096 * 128 * 2
    compressor = Compressor(Policy(bits=4), 8)
    assert not compressor.keeps
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(8):
        keys = torch.randn(4, 8, 4096, 128, device="cuda", dtype=torch.bfloat16)
        compressor.add(LayerInput(keys, keys))
        del keys
    packed = compressor.finish()
    assert torch.cuda.max_memory_allocated() - before < 3 * size
    assert packed.ratio > 3.5


# ---- decoding


@pytest.mark.parametrize("name", POLICIES)
def test_decode(name: str) -> None:
    layers = prompt()
    plain, there = compress_prompt(layers, POLICIES[name]), compress_prompt(on_gpu(layers), POLICIES[name])
    for step in range(200):
        run(plain, there, step, 1)
        if step % 50 == 0:
            same_mirrors(there)
    same_mirrors(there)
    same_pages(plain, there)
    ledger = there.ledger()
    assert sum(ledger.values()) == there.nbytes and min(ledger.values()) >= 0


def test_planned_decode() -> None:
    """Aged tokens take classes by the attention they got, here as there, but for ranks that rounding decides."""
    plain = compress_prompt(prompt(1000), Policy(target_ratio=4))
    there = plain.to("cuda")
    for step in range(200):
        run(plain, there, step, 1)
    same_mirrors(there)
    for a, b in zip(plain.layers, there.layers, strict=True):
        assert np.array_equal(a.lists, b.lists)
        assert a.ranks is not None and b.ranks is not None and there.stacked is not None
        there.stacked.read()
        np.testing.assert_allclose(b.ranks.recent, a.ranks.recent, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("first", [None, [0, 333]])
def test_passes_of_any_length(first: Any) -> None:
    layers = prompt(first=None if first is None else np.array(first))
    plain, there = (compress_prompt(part, Policy(bits=4)) for part in (layers, on_gpu(layers)))
    passes: list[tuple[int, Any]] = [(1, None), (5, None), (64, None), (130, None), (1, [1, 0]), (7, [7, 3])]
    for seed, (q, valid) in enumerate([*passes, (130, [130, 2]), (1, None), (16, [0, 16])]):
        run(plain, there, seed, q, None if valid is None else np.array(valid))
    same_mirrors(there)
    same_pages(plain, there)


@pytest.mark.parametrize(
    "policy", [Policy(bits=4), Policy(bits=16), Policy(target_ratio=4)], ids=["4", "16", "planned"]
)
def test_graphs(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps, replayed while tables and pools grow, are the eager ones."""
    monkeypatch.setattr("kvcomp.stacked.SPARE_ENTRIES", 1)  # with more, 300 tokens at few bits move no tensor
    source = compress_prompt(prompt(1000), policy)
    eager, there = source.to("cuda"), source.to("cuda")
    assert eager.stacked is not None and there.stacked is not None
    inputs = [[part.cuda() for part in step_rows(i, B, 1)] for i in range(LAYERS)]
    outs = [torch.empty_like(rows[0]) for rows in inputs]
    graphs: dict[Any, Any] = {}
    replays = 0
    for step in range(300):
        fresh = [[part.cuda() for part in step_rows(1000 * step + 10 * i, B, 1)] for i in range(LAYERS)]
        for rows, new in zip(inputs, fresh, strict=True):
            for row, part in zip(rows, new, strict=True):
                row.copy_(part)
        eager.stacked.begin_step(1)
        expected = [layer.append_attend(*new, scale=0.1) for layer, new in zip(eager.layers, fresh, strict=True)]
        there.stacked.begin_step(1)
        key = there.stacked.step_key()
        if key in graphs:
            graphs[key].replay()
            there.stacked.replayed()
            replays += 1
        else:
            for layer, rows, out in zip(there.layers, inputs, outs, strict=True):
                layer.append_attend(*rows, scale=0.1, out=out)
            graph = torch.cuda.CUDAGraph()
            with there.stacked.capture(), torch.cuda.graph(graph):
                for layer, rows, out in zip(there.layers, inputs, outs, strict=True):
                    layer.append_attend(*rows, scale=0.1, out=out)
            graphs[key] = graph
        for out, wanted in zip(outs, expected, strict=True):
            torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    assert replays > 250 and there.stacked.generation > 1
    same_mirrors(there)
    same_pages(eager, there)


def test_select() -> None:
    layers = prompt()
    plain, there = (compress_prompt(part, Policy(bits=4)) for part in (layers, on_gpu(layers)))
    for turn, sequences in enumerate([[1, 0], [0, 0, 1], [2, 2]]):
        for packed in (plain, there):
            for layer in packed.layers:
                layer.select(np.array(sequences))
        same_pages(plain, there)
        for step in range(70):
            run(plain, there, 100 * turn + step, 1)
        same_mirrors(there)
        same_pages(plain, there)


def test_streams() -> None:
    """A pass on another stream runs behind those before it."""
    layers = prompt(4000)
    plain, there = (compress_prompt(part, Policy(bits=4)) for part in (layers, on_gpu(layers)))
    streams = [torch.cuda.Stream() for _ in range(3)]
    for step in range(80):
        with torch.cuda.stream(streams[step % 3]):
            run(plain, there, step, 1)
    same_mirrors(there)
    same_pages(plain, there)


def test_bytes_behind_2_to_the_31() -> None:
    """Pages that lie gigabytes into the arena."""
    near_by = compress_prompt(on_gpu(prompt(100, layers=1)), Policy(bits=8))
    far = near_by.to("cpu").to("cuda")
    between = far.arena.alloc(2 << 20, 1100)
    for packed in (near_by, far):
        packed.layers[0].select(np.array([0, 1, 0, 1]))
    assert int(far.layers[0].entries()["unit"].max()) * 128 > 2**31
    for step in range(70):
        rows = [part.cuda() for part in step_rows(step, 4, 1)]
        a, b = (packed.layers[0].append_attend(*rows, scale=0.1) for packed in (near_by, far))
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    same_pages(near_by, far)
    far.arena.free(2 << 20, between)


# ---- files, refusals


def test_saved(tmp_path: Path) -> None:
    there = compress_prompt(on_gpu(prompt()), Policy(bits=4))
    plain = there.to("cpu")
    for step in range(30):
        run(plain, there, step, 1)
    model = {"num_hidden_layers": LAYERS, "num_key_value_heads": H, "head_dim": D}
    for name, packed in (("a", plain), ("b", there)):
        save(tmp_path / name, Saved(packed, 530, [[0, 530]] * B, packed.ratio), model)
    a, b = load(tmp_path / "a", model, "cuda").packed, load(tmp_path / "b", model).packed
    same_pages(plain, a)
    same_pages(plain, b)
    for step in range(70):
        run(b, a, 100 + step, 1)


@pytest.mark.parametrize("policy", [Policy(bits=4), Policy(target_ratio=4)], ids=["4 bits", "4x"])
def test_out_of_memory_leaves_the_cache_as_it_was(policy: Policy) -> None:
    """A pass for which the device has no room is one sentence; then the cache goes on as its twin on the CPU does."""
    plain = compress_prompt(prompt(), policy)
    there = plain.to("cuda")
    for seed in range(3):
        run(plain, there, seed, 1)
    before = [(layer.lists.copy(), *layer.unpack()) for layer in there.layers]
    used = there.arena.used
    torch.cuda.empty_cache()
    taken = torch.empty(torch.cuda.mem_get_info(0)[0] - (64 << 20), dtype=torch.uint8, device="cuda")
    assert there.stacked is not None
    with pytest.raises(MemoryError, match=r"^(arena|append: tables): expected [^\n]*$"):
        there.stacked.begin_step(1 << 20)
    assert there.arena.used == used
    del taken
    torch.cuda.empty_cache()
    for layer, (lists, keys, values) in zip(there.layers, before, strict=True):
        assert np.array_equal(layer.lists, lists)
        assert all(np.array_equal(one, other) for one, other in zip(layer.unpack(), (keys, values), strict=True))
    for seed in range(3, 90):
        run(plain, there, seed, 1)
    same_mirrors(there)


def test_refused() -> None:
    layers = on_gpu(prompt())
    with pytest.raises(NotImplementedError, match=r"^compress: decode: expected 'grow' on cuda:\d, got 'hold'"):
        compress_prompt(layers, Policy(target_ratio=2, decode="hold"))
    mixed = on_gpu(prompt())
    mixed[1].values = mixed[1].values.cpu()
    with pytest.raises(
        ValueError, match=r"^compress: layers\[1\]: expected keys and values on cuda:\d, got cuda:\d and cpu$"
    ):
        compress_prompt(mixed, Policy(bits=4))
    broken = on_gpu(prompt())
    broken[1].values[1, 0, 7] = float("inf")
    for policy in (Policy(bits=4), Policy(target_ratio=2)):
        with pytest.raises(ValueError, match=r"^pack: values: expected finite values, got NaN or Inf in layer 1$"):
            compress_prompt(broken, policy)
    compress_prompt([replace(layer, first=np.array([0, 8])) for layer in broken], Policy(bits=4))  # in the padding
    there = compress_prompt(layers, Policy(bits=4))
    queries, keys, values = step_rows(0, B, 1)
    assert there.stacked is not None
    there.stacked.begin_step(1)
    with pytest.raises((ValueError, TypeError)):
        there.layers[0].append_attend(queries.cuda(), keys, values.cuda(), scale=0.1)
    assert (there.layers[0].tokens == 500).all()
    with pytest.raises(NotImplementedError, match=r"^to: decode: expected 'grow' on cuda, got 'hold'"):
        compress_prompt(prompt(4096), Policy(target_ratio=2, decode="hold")).to("cuda")
