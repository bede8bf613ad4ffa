"""Stacked, on CPU tensors: pools, tables, mirrors and the schedule of passes, against layers that look each time."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import kvcomp.stacked  # noqa: E402
from kvcomp import _C, measure  # noqa: E402
from kvcomp.layer_input import LayerInput  # noqa: E402
from kvcomp.packed import Packed  # noqa: E402
from kvcomp.policy import Policy  # noqa: E402
from kvcomp.prompt import compress_prompt  # noqa: E402
from kvcomp.rotation import Rotation  # noqa: E402
from kvcomp.store import PAGE, PAGES, TAIL_PAGE, TAIL_TOKENS, PackedLayer  # noqa: E402
from kvcomp.store_cuda import CudaLayer, Stacked  # noqa: E402
from reference import Array  # noqa: E402

B, D, LAYERS = 2, 64, 3
HOST = torch.device("cpu")


def rows_of(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def prompt(policy: Policy, s: int = 300, heads: tuple[int, ...] = (2, 2, 2), first: Any = None) -> Packed:
    layers = [
        LayerInput(rows_of(i, B, h, s, D), rows_of(50 + i, B, h, s, D), rows_of(90 + i, B, 2 * h, 16, D), first=first)
        for i, h in enumerate(heads)
    ]
    return compress_prompt(layers, policy)


class Other:
    """Layers, and the Stacked behind which they are."""

    def __init__(self, layers: list[CudaLayer]) -> None:
        self.layers, self.stacked = layers, Stacked(layers, HOST)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stacked, name)


def stacked(packed: Packed) -> Other:
    """The same cache, behind a Stacked of CPU tensors."""
    layers = [
        CudaLayer(
            packed.arena, layer.coding, layer.table, layer.lists, heads=layer.heads, layer=layer.layer,
            aged=layer.aged, window=layer.window, ranks=layer.ranks, rotation=layer.rotation, decay=layer.decay,
        )
        for layer in packed.layers
    ]  # fmt: skip
    return Other(layers)


def step_rows(seed: int, layer: PackedLayer, q: int) -> tuple[Array, Array, Array]:
    b, h = layer.batch, layer.heads
    return rows_of(seed, b, 2 * h, q, D), rows_of(seed + 1, b, h, q, D), rows_of(seed + 2, b, h, q, D)


def run(plain: Packed, other: Other, seed: int, q: int, valid: Any = None, *, begun: bool = True) -> None:
    """One pass over both; the same outputs."""
    if begun:
        other.begin_step(q, valid)
    for index, (a, b) in enumerate(zip(plain.layers, other.layers, strict=True)):
        queries, keys, values = step_rows(1000 * seed + 10 * index, a, q)
        expected = a.append_attend(queries, keys, values, scale=0.1, valid=valid)
        tensors = [torch.from_numpy(part) for part in (queries, keys, values)]
        out = b.append_attend(*tensors, scale=0.1, valid=None if begun else valid)
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


def same(plain: Packed, other: Other) -> None:
    """The mirrors are what the tensors are, and both caches hold the same rows in the same classes."""
    for a, b in zip(plain.layers, other.layers, strict=True):
        assert np.array_equal(a.lists, b.lists) and np.array_equal(a.aged, b.aged)
        names = ["k_bits", "v_bits", "tokens"]
        assert np.array_equal(a.entries()[names], b.entries()[names])
        assert all(np.array_equal(x, y) for x, y in zip(a.unpack(), b.unpack(), strict=True))
        group = b.group
        if group.active:
            group.catch_up([b.place])
            for mirror, there in zip(group.by_layer[b.place], group.there_by_layer[b.place], strict=True):
                assert np.array_equal(mirror, there.numpy())
    for group in other.groups:
        assert_pools(group)


def assert_pools(group: Any) -> None:
    """Every page of the arena is in one table or on one stack."""
    if not group.active:
        return
    group.catch_up(range(len(group.layers)))
    for rows in group.by_layer:
        units: list[int] = []
        for row, (tail, packed) in enumerate(rows.left):
            units += rows.table[row, : rows.lists[row, PAGES]].view(PAGE)["unit"].tolist()
            units += rows.pool_tail[row, :tail].tolist() + rows.pool_packed[row, :packed].tolist()
        assert len(set(units)) == len(units)


POLICIES = {
    "4 bits": Policy(bits=4),
    "4 bits, window": Policy(bits=4, window=20, sinks=2),
    "16 bits": Policy(bits=16),
    "planned": Policy(target_ratio=4),
    "planned, all kept": Policy(fraction=0.3, drop=False),
}


@pytest.mark.parametrize("name", POLICIES)
def test_decode(name: str) -> None:
    """200 steps, with flushes, growing tables and, where there is something to choose, classes from attention."""
    plain, source = prompt(POLICIES[name]), prompt(POLICIES[name])
    other = stacked(source)
    generations = set()
    for step in range(200):
        run(plain, other, step, 1)
        generations.add(other.generation)
        if step % 37 == 0:
            same(plain, other)
    same(plain, other)
    assert all(layer.appends == 200 for layer in other.layers)
    assert len(generations) <= 4, "tables and pools grow seldom"
    used = source.arena.used
    for group in other.groups:
        group.settle()
    assert source.arena.used < used
    assert source.arena.used == plain.arena.used
    same(plain, other)


@pytest.mark.parametrize("name", ["4 bits", "planned"])
@pytest.mark.parametrize("begun", [True, False])
def test_passes_of_any_length(name: str, begun: bool) -> None:
    """Chunks, padding, nothing at all; begun as one pass, or by each layer."""
    plain, source = prompt(POLICIES[name]), prompt(POLICIES[name])
    other = stacked(source)
    passes: list[tuple[int, Any]] = [(1, None), (5, None), (5, None), (64, None), (65, None), (0, None), (200, None)]
    passes += [(1, [1, 0]), (7, [7, 3]), (130, [130, 2]), (1, None), (16, None), (64, [0, 64]), (1, None)]
    for seed, (q, valid) in enumerate(passes):
        run(plain, other, seed, q, None if valid is None else np.array(valid), begun=begun)
        same(plain, other)


def test_other_head_counts_and_padding() -> None:
    first = np.array([0, 170])
    plain, source = (prompt(POLICIES["planned"], heads=(2, 1, 2), first=first) for _ in range(2))
    other = stacked(source)
    assert len(other.groups) == 2
    for step in range(90):
        run(plain, other, step, 1)
    same(plain, other)


def test_whatever_was_begun_and_not_run_counts_for_nothing() -> None:
    plain, source = prompt(POLICIES["planned"]), prompt(POLICIES["planned"])
    other = stacked(source)
    for step in range(150):
        if step % 7 == 0:
            other.begin_step(1)
        if step % 50 == 0:
            other.begin_step(3)
            other.begin_step(100)
        run(plain, other, step, 1)
    same(plain, other)


def test_replayed_passes_are_counted() -> None:
    """What a graph does without the host: here the layers' calls under capture, which run and are not counted."""
    plain, source = prompt(POLICIES["planned"]), prompt(POLICIES["planned"])
    other = stacked(source)
    keys: dict[Any, int] = {}
    for step in range(150):
        other.begin_step(1)
        key = other.step_key()
        if key not in keys:
            keys[key] = 0
            other.begin_step(1)
            run(plain, other, step, 1, begun=True)
            assert other.step_key() == key
            continue
        keys[key] += 1
        for index, (a, b) in enumerate(zip(plain.layers, other.layers, strict=True)):
            queries, new_keys, values = step_rows(1000 * step + 10 * index, a, 1)
            a.append_attend(queries, new_keys, values, scale=0.1)
            with other.capture():
                b.append_attend(*(torch.from_numpy(part) for part in (queries, new_keys, values)), scale=0.1)
        other.replayed()
    same(plain, other)
    assert len(keys) <= 6 and {key[3] for key in keys} == {False, True}


def test_select() -> None:
    plain, source = prompt(POLICIES["planned"]), prompt(POLICIES["planned"])
    other = stacked(source)
    for step, sequences in enumerate([[1, 0], [0, 0, 1], [2], []]):
        for layers in (plain.layers, other.layers):
            for layer in layers:
                layer.select(np.array(sequences, np.int64))
        same(plain, other)
        for more in range(70):
            run(plain, other, 100 * step + more, 1)
        same(plain, other)
    for layer in other.layers:
        layer.release()
    assert source.arena.used == 0


def test_room_that_cannot_be_had_changes_nothing() -> None:
    packed = prompt(Policy(bits=4))
    other = stacked(packed)
    other.begin_step(1)
    for layer in other.layers:
        layer.append_attend(*(torch.from_numpy(part) for part in step_rows(0, layer, 1)), scale=0.1)
    before = [(layer.table.copy(), layer.lists.copy()) for layer in other.layers]
    used = packed.arena.used

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(packed.arena, name)

        def alloc(self, size: int, count: int) -> Any:
            raise MemoryError("arena: out of memory")

    other.groups[0].arena = Full()
    with pytest.raises(MemoryError, match=r"^arena: out of memory$"):
        other.begin_step(200)
    other.groups[0].arena = packed.arena
    assert packed.arena.used == used
    for layer, (table, lists) in zip(other.layers, before, strict=True):
        assert np.array_equal(layer.table, table) and np.array_equal(layer.lists, lists)


def test_room_for_the_attention_mass_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that are undecided are observed: where that has no memory, no page has been taken and nothing has moved."""
    packed = prompt(Policy(target_ratio=4))
    other = stacked(packed)
    used, groups = packed.arena.used, other.groups
    make = kvcomp.stacked.filled

    def none(shape: Any, dtype: Any, *others: Any) -> Any:
        if dtype == torch.float32:
            raise MemoryError("append: tables: expected room, got none")
        return make(shape, dtype, *others)

    monkeypatch.setattr(kvcomp.stacked, "filled", none)
    with pytest.raises(MemoryError, match=r"^append: tables: "):
        other.begin_step(1)
    assert packed.arena.used == used and not any(group.active for group in groups)
    monkeypatch.undo()
    other.begin_step(1)
    assert all(group.active and group.mass is not None for group in groups)


@pytest.mark.parametrize("rotation", ["hadamard", Rotation.random(LAYERS, 2, D, seed=1)], ids=["hadamard", "given"])
@pytest.mark.parametrize("what", ["sums", "rows"])
def test_a_pass_without_memory_appends_nothing(rotation: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence where torch finds no room; the same pass goes on when there is some."""
    policy = Policy(bits=4, rotation=rotation)
    plain, other = prompt(policy), stacked(prompt(policy))
    run(plain, other, 0, 1)
    other.begin_step(1)
    layer = other.layers[0]
    queries, keys, values = (torch.from_numpy(part) for part in step_rows(1000, layer, 1))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    before = layer.tokens.copy()
    with monkeypatch.context() as patch:
        if what == "sums":
            patch.setattr(type(layer.group), "workspace", full)
        else:
            patch.setattr(torch.Tensor, "new_empty", full)
        with pytest.raises(MemoryError, match=r"^append: memory: expected room for rows and sums on cpu, got none$"):
            layer.append_attend(queries, keys, values, scale=0.1)
        if what == "sums":
            with pytest.raises(MemoryError, match=r"^attend: memory: expected room for rows and sums on cpu, got none"):
                layer.attend(queries, scale=0.1)
    assert np.array_equal(layer.tokens, before)
    run(plain, other, 1, 1, begun=False)
    for a, b in zip(plain.layers, other.layers, strict=True):
        assert np.array_equal(a.lists, b.lists)
    with pytest.raises(ValueError, match=r"^attend: queries: expected shape \(2, a multiple of 2, q, 64\), got \(\)$"):
        layer.attend([1.0], scale=0.1)


def test_a_cache_goes_when_the_last_layer_goes() -> None:
    """By counting references alone: the memory behind it is a GPU's."""
    other = stacked(prompt(Policy(bits=4)))
    other.begin_step(1)
    parts = [weakref.ref(part) for part in (other.stacked, *other.groups, *other.layers)]
    layers, enabled = other.layers, gc.isenabled()
    gc.disable()
    try:
        del other
        assert parts[0]() is not None
        del layers
        assert not any(part() for part in parts)
    finally:
        if enabled:
            gc.enable()


def test_refused() -> None:
    packed = prompt(Policy(bits=4))
    other = stacked(packed)
    layer = other.layers[0]
    queries, keys, values = (torch.from_numpy(part) for part in step_rows(0, layer, 1))
    with pytest.raises(ValueError, match=r"^append: valid: expected 2 integers in 0\.\.1, got \[2, 0\]$"):
        other.begin_step(1, np.array([2, 0]))
    other.begin_step(2)
    with pytest.raises(ValueError, match=r"^append: keys: expected 2 new tokens, as the pass was begun with, got 1$"):
        layer.append_attend(queries, keys, values, scale=0.1)
    other.begin_step(1)
    with pytest.raises(ValueError, match=r"^attend: scale: "):
        layer.append_attend(queries, keys, values, scale=float("nan"))
    with pytest.raises(ValueError, match=r"^append: keys: expected shape"):
        layer.append_attend(queries, keys[:, :, :, :8], values, scale=0.1)
    assert (layer.tokens == 300).all()
    layer.append_attend(queries, keys, values, scale=0.1)
    assert (layer.tokens == 301).all()
    alone = CudaLayer(packed.arena, layer.coding, layer.table, layer.lists, heads=2, layer=0, aged=layer.aged, window=0)
    with pytest.raises(RuntimeError, match=r"^append: layer: expected one of a finished cache"):
        alone.append(keys, values)


def test_bytes() -> None:
    """What tensors hold is counted, page by page and table by table."""
    packed = prompt(Policy(target_ratio=4))
    other = stacked(packed)
    packed.layers = list(other.layers)
    before = packed.nbytes
    for step in range(70):
        other.begin_step(1)
        for layer in other.layers:
            layer.append_attend(*(torch.from_numpy(part) for part in step_rows(step, layer, 1)), scale=0.1)
        ledger = packed.ledger()
        assert sum(ledger.values()) == packed.nbytes and min(ledger.values()) >= 0
    tensors = sum(tensor.nbytes for group in other.groups for tensor in group.tensors)
    ranks = sum(layer.ranks.nbytes for layer in other.layers)
    assert packed.nbytes == packed.arena.nbytes + tensors + ranks > before


def test_tails_and_states_hold_together() -> None:
    other = stacked(prompt(Policy(bits=4, window=10)))
    for step in range(100):
        other.begin_step(1)
        for layer in other.layers:
            layer.append(*(torch.from_numpy(part) for part in step_rows(step, layer, 1)[1:]))
    for layer in other.layers:
        tail_pages = layer.lists[:, PAGES] - layer.lists[:, TAIL_PAGE]
        assert (tail_pages == -(-layer.lists[:, TAIL_TOKENS] // _C.page_tokens(16, 16))).all()
        assert (layer.lists[:, TAIL_TOKENS] <= 74).all() and (layer.tokens == 400).all()


def test_rows_that_are_not_finite_are_found() -> None:
    """By their largest magnitudes: rows that are as large as they can be are finite, and padding is not looked at."""
    rows = torch.full((2, 2, 9, D), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    for bad in (None, float("nan"), float("inf"), -float("inf")):
        values = rows.clone()
        if bad is not None:
            values[1, 0, 3, 5] = bad
        for first in ([0, 0], [0, 4], [0, 9]):
            layer = LayerInput(rows, values, first=np.array(first))
            found = [(f"{name}: layer 7", part) for name, part in measure.peaks_on_gpu(layer, np.array(first))]
            if bad is None or first[1] > 3:
                measure.check_peaks(found)
                continue
            with pytest.raises(ValueError, match=r"^pack: values: expected finite values, got NaN or Inf in layer 7$"):
                measure.check_peaks(found)


def test_a_sample_that_is_not_finite_names_its_layer() -> None:
    rows = rows_of(1, B, 2, 300, D)
    values = rows.copy()
    values[1, 0, 0, 3] = np.inf
    with pytest.raises(ValueError, match=r"^pack: values: expected finite values, got NaN or Inf in layer 1$"):
        compress_prompt([LayerInput(rows, part, rows) for part in (rows, values)], Policy(target_ratio=2))
