"""A prompt on a GPU is measured one layer behind what the GPU does. Here its tensors are the CPU's: what comes out is
the same as when every layer is waited for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from kvcomp import layer_input, measure, pages, prompt  # noqa: E402
from kvcomp.layer_input import LayerInput  # noqa: E402
from kvcomp.packed import Packed  # noqa: E402
from kvcomp.policy import Policy  # noqa: E402
from kvcomp.prompt import Compressor, compress_prompt  # noqa: E402
from kvcomp.rotation import Rotation  # noqa: E402
from kvcomp.selectors import H2O, AdaKV, KeyNorm, Random, SnapKV, Streaming  # noqa: E402

B, H, S, D, LAYERS = 2, 2, 300, 64, 3


def rows_of(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layers_of(first: Any = None, window: int = S) -> list[LayerInput]:
    return [
        LayerInput(
            rows_of(i, B, H, S, D), rows_of(50 + i, B, H, S, D), rows_of(90 + i, B, 2 * H, window, D), first=first
        )
        for i in range(LAYERS)
    ]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's tensors are on a device, which is the CPU."""

    def device_of(tensor: Any) -> Any:
        return tensor.device if isinstance(tensor, torch.Tensor) else None

    for module in (layer_input, measure, pages, prompt):
        monkeypatch.setattr(module, "cuda_of", device_of)
    monkeypatch.setattr(prompt, "GRANULE_BYTES", 1)  # a GPU's is more than all of these prompts


def same(a: Packed, b: Packed) -> None:
    assert a.nbytes == b.nbytes
    for x, y in zip(a.layers, b.layers, strict=True):
        assert np.array_equal(x.lists, y.lists) and np.array_equal(x.aged, y.aged)
        names = ["k_bits", "v_bits", "tokens"]
        assert np.array_equal(x.entries()[names], y.entries()[names])
        assert all(np.array_equal(one, other) for one, other in zip(x.unpack(), y.unpack(), strict=True))
        assert (x.ranks is None) == (y.ranks is None)
        if x.ranks is not None and y.ranks is not None:
            assert np.array_equal(x.ranks.level, y.ranks.level) and np.array_equal(x.ranks.kind, y.ranks.kind)


POLICIES = {
    "plan": Policy(target_ratio=4),
    "uniform": Policy(target_ratio=4, allocate="uniform", select=SnapKV(window=16)),
    "values": Policy(target_ratio=3, select=SnapKV(values="centered")),
    "H2O": Policy(target_ratio=4, select=H2O()),
    "norms": Policy(target_ratio=4, select=KeyNorm(values="norm")),
    "AdaKV": Policy(target_ratio=4, select=AdaKV(keep=0.5)),
    "streaming": Policy(target_ratio=4, select=Streaming()),
    "random": Policy(target_ratio=4, select=Random()),
    "position": Policy(target_ratio=4, allocate="position"),
    "rotation": Policy(target_ratio=4, rotation=Rotation.random(LAYERS, H, D, seed=1)),
    "layer by layer": Policy(target_ratio=3, prefill="layerwise"),
    "some at 4 bits": Policy(bits=4, select=KeyNorm(keep=0.5)),
    "4 bits": Policy(bits=4),
}


@pytest.mark.parametrize("first", [None, [0, 300], [77, 0]])
@pytest.mark.parametrize("name", POLICIES)
def test_the_same_as_when_every_layer_is_waited_for(name: str, first: Any, device: None) -> None:
    layers = layers_of(None if first is None else np.array(first))
    ahead = compress_prompt(layers, POLICIES[name], least_if_over=True)
    compressor = Compressor(POLICIES[name], LAYERS, least_if_over=True)
    for layer in layers:
        compressor.add(layer)
        compressor._catch_up()
    same(ahead, compressor.finish())


@pytest.mark.parametrize("name", ["norms", "streaming", "random", "some at 4 bits", "4 bits"])
def test_the_same_as_on_the_host(name: str, request: pytest.FixtureRequest) -> None:
    """Where no sum over queries is torch's on one side and NumPy's on the other."""
    layers = [replace(layer, queries=None) for layer in layers_of(np.array([0, 77]))]
    on_host = compress_prompt(layers, POLICIES[name], least_if_over=True)
    request.getfixturevalue("device")
    same(on_host, compress_prompt(layers, POLICIES[name], least_if_over=True))


def test_rows_that_require_grad(device: None) -> None:
    layers = layers_of()
    expected = compress_prompt(layers, POLICIES["plan"])
    for layer in layers:
        for rows in (layer.keys, layer.values, layer.queries):
            rows.requires_grad_()
    same(expected, compress_prompt(layers, POLICIES["plan"]))


def events_of(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is queued and what is waited for, by layer."""
    events: list[str] = []
    queue = measure.fetching

    def fetching(*tensors: Any) -> Any:
        place = len(compressor._shapes) - 1
        events.append(f"queue {place}")
        wait = queue(*tensors)

        def waited() -> Any:
            events.append(f"wait {place}")
            return wait()

        return waited

    monkeypatch.setattr(measure, "fetching", fetching)
    compressor = Compressor(policy, LAYERS)
    for layer in layers_of():
        compressor.add(layer)
    compressor.finish()
    return list(dict.fromkeys(events))


def test_nothing_is_waited_for_before_the_next_layer_is_queued(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert events_of(POLICIES["plan"], monkeypatch) == [
        "queue 0", "queue 1", "wait 0", "queue 2", "wait 1", "wait 2",
    ]  # fmt: skip


def test_layers_that_are_packed_as_they_come_are_waited_for(device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    events = events_of(POLICIES["layer by layer"], monkeypatch)
    assert events == [f"{what} {place}" for place in range(LAYERS) for what in ("queue", "wait")]


@pytest.mark.parametrize("index", range(LAYERS))
@pytest.mark.parametrize("part", ["queries", "keys", "values"])
def test_what_is_not_finite_is_refused(part: str, index: int, device: None) -> None:
    layers = layers_of(window=32)
    getattr(layers[index], part)[1, 0, 5] = float("nan")
    with pytest.raises(
        ValueError, match=rf"^(score|pack): {part}: expected finite values, got NaN or (Inf|infinity) in "
    ):
        compress_prompt(layers, POLICIES["plan"])


def test_what_a_gpu_gives_on_is_refused_when_it_is_waited_for() -> None:
    found = torch.ones(2, 1, 3)
    assert np.array_equal(measure._fetching(found, "score: keys")(), found.numpy())
    found[1, 0, 2] = float("nan")
    coming = measure._fetching(found, "score: keys")
    with pytest.raises(ValueError, match=r"^score: keys: expected finite values, got NaN or infinity in sequence 1$"):
        coming()


class There(torch.Tensor):
    """Says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda", 1))  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl


def test_copies_are_read_when_the_gpu_has_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into page-locked memory, behind what the stream of the tensors' own device does."""
    log: list[Any] = []
    empty = torch.empty

    def locked(*shape: Any, pin_memory: bool, **how: Any) -> Any:
        assert pin_memory
        log.append("memory")
        return empty(*shape, **how)

    def stream(device: Any) -> Any:
        assert device == torch.device("cuda", 1)
        return SimpleNamespace(record_event=event)

    def event() -> Any:
        log.append("event")
        return SimpleNamespace(synchronize=lambda: log.append("waited"))

    monkeypatch.setattr(torch, "empty", locked)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    copied = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda to, tensor, non_blocking: (log.append("copy"), copied(to, tensor))[1]
    )
    given = [torch.arange(6.0).view(2, 3), torch.zeros(0, 4)]
    coming = layer_input.fetching(*(tensor.as_subclass(There).requires_grad_() for tensor in given))
    assert log == ["memory", "memory", "copy", "copy", "event"]
    found = coming()
    assert log[5:] == ["waited"] and all(np.array_equal(one, other) for one, other in zip(found, given, strict=True))


def test_what_stays_is_not_in_the_memory_that_a_gpu_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is page-locked, and as much for every layer."""
    locked = np.ones((2, 1, 3), np.float32)
    monkeypatch.setattr(measure, "fetching", lambda *tensors: lambda: [locked])
    assert not np.shares_memory(measure._fetching(torch.ones(2, 1, 3), "score: keys")(), locked)


@pytest.mark.parametrize("name", ["plan", "H2O", "norms", "streaming", "random", "position", "rotation"])
def test_a_layer_that_waits_holds_no_queries(name: str, device: None) -> None:
    compressor = Compressor(POLICIES[name], LAYERS)
    layers = layers_of()
    held = torch.utils.weak.WeakTensorKeyDictionary()
    held[layers[0].queries] = 0
    compressor.add(layers[0])
    del layers
    assert compressor._begun is not None and not len(held)


@pytest.mark.parametrize("when", ["add", "finish"])
def test_a_device_without_room_is_one_sentence(when: str, device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    compressor = Compressor(POLICIES["plan"], LAYERS)
    first, *others = layers_of()
    compressor.add(first)
    for layer in others if when == "finish" else ():
        compressor.add(layer)
    monkeypatch.setattr(prompt, "peaks_on_gpu" if when == "add" else "check_peaks", full)
    with pytest.raises(MemoryError, match=r"^compress: memory: expected room for rows and sums on cpu, got none$"):
        compressor.finish() if when == "finish" else compressor.add(others[0])
