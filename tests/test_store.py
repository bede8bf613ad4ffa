"""PackedLayer: what a prompt leaves behind, then tokens appended and attended to, sequences moved, bytes counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp import _C, store
from kvcomp.layer_input import LayerInput
from kvcomp.packed import Packed
from kvcomp.policy import Policy
from kvcomp.prompt import compress_prompt
from kvcomp.store import PAGES, TAIL_PAGE, TAIL_TOKENS, TOKENS, PackedLayer
from reference import Array, attention, error_bound

B, H, D = 2, 3, 64


def rows_of(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(s: int = 200, bits: int = 4, *, layers: int = 1, first: list[int] | None = None, **options: Any) -> Packed:
    inputs = [
        LayerInput(
            rows_of(i, B, H, s, D), rows_of(100 + i, B, H, s, D), first=None if first is None else np.array(first)
        )
        for i in range(layers)
    ]
    return compress_prompt(inputs, Policy(bits=bits, **options))


def layer_of(s: int = 200, bits: int = 4, **options: Any) -> PackedLayer:
    return packed(s, bits, **options).layers[0]


def attended(layer: PackedLayer, queries: Array, **options: Any) -> Array:
    """Checks attend against float64 over what the layer unpacks to."""
    keys, values = layer.unpack()
    lists = [(i // layer.heads, i % layer.heads, int(n)) for i, n in enumerate(layer.tokens)]
    k, v = ([rows[i, h, :n] for i, h, n in lists] for rows in (keys, values))
    out = layer.attend(queries, **options)
    expected, _ = attention(
        queries, k, v, scale=options["scale"], softcap=options.get("softcap", 0.0), new_tokens=options.get("new_tokens")
    )
    assert np.abs(out - expected).max(initial=0) <= error_bound(v, int(layer.tokens.max(initial=0)))
    return np.asarray(out)


def snapshot(layer: PackedLayer) -> list[Any]:
    return [layer.table.copy(), layer.lists.copy(), *layer.unpack(), layer.arena.used]


def assert_unchanged(layer: PackedLayer, before: list[Any]) -> None:
    for now, then in zip(snapshot(layer), before, strict=True):
        assert np.array_equal(now, then)


def live_bytes(layers: list[PackedLayer]) -> int:
    return sum(
        _C.page_bytes(layer.coding.layout, int(e["k_bits"]), int(e["v_bits"]))
        for layer in layers
        for e in layer.entries()
    )


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ---- append, attend


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_decode(bits: int) -> None:
    """One token at a time behind a prompt: exact attention over what is stored, memory conserved."""
    layer = layer_of(bits=bits, window=7)
    for i in range(150):
        new = rows_of(1000 + i, B, H, 1, D)
        layer.append(new, new)
        if i % 30 == 0:
            attended(layer, rows_of(i, B, 2 * H, 1, D), scale=0.125, softcap=30.0)
        assert layer.arena.used == live_bytes([layer])
    assert (layer.tokens == 350).all()
    if bits < 16:
        assert (layer.lists[:, TAIL_TOKENS] <= 7 + 64).all() and (layer.lists[:, TAIL_TOKENS] > 7).all()
    keys, _ = layer.unpack()
    newest = np.stack([rows_of(1000 + i, B, H, 1, D)[:, :, 0] for i in range(143, 150)], 2)
    assert np.abs(keys[:, :, -7:] - newest).max() < 0.01, "the newest tokens are last, and at 16 bits"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_random_use(data: st.DataObject) -> None:
    """Prompts, padded appends of any length, selections: contents as in a plain model of lists of rows."""
    s = data.draw(st.sampled_from([0, 1, 63, 64, 65, 200]))
    first = data.draw(st.lists(st.integers(0, s), min_size=B, max_size=B))
    layer = layer_of(s, 8, window=data.draw(st.sampled_from([0, 5, 64])), first=first)
    model = [[rows_of(0, B, H, s, D)[i, h, first[i] :] for h in range(H)] for i in range(B)]
    for step in range(data.draw(st.integers(1, 5))):
        if layer.batch and data.draw(st.booleans()):
            q = data.draw(st.sampled_from([0, 1, 3, 64, 65, 150]))
            valid = data.draw(st.none() | st.lists(st.integers(0, q), min_size=layer.batch, max_size=layer.batch))
            new = rows_of(step, layer.batch, H, q, D)
            queries = rows_of(step, layer.batch, 2 * H, q, D)
            layer.append_attend(queries, new, new, scale=0.1, valid=None if valid is None else np.array(valid))
            for i, heads in enumerate(model):
                start = 0 if valid is None else q - valid[i]
                model[i] = [np.concatenate([rows, new[i, h, start:]]) for h, rows in enumerate(heads)]
        else:
            chosen = data.draw(st.lists(st.integers(0, layer.batch - 1), max_size=4)) if layer.batch else []
            layer.select(np.array(chosen, np.int64))
            model = [list(model[i]) for i in chosen]
        assert layer.tokens.tolist() == [len(rows) for heads in model for rows in heads]
        assert layer.arena.used == live_bytes([layer])
        keys, _ = layer.unpack()
        for i, heads in enumerate(model):
            for h, rows in enumerate(heads):
                assert np.abs(keys[i, h, : len(rows)] - rows).max(initial=0) < 0.1
    layer.release()
    assert layer.arena.used == layer.arena.nbytes == 0


@pytest.mark.parametrize("q", [1, 64, 65, 200])
@pytest.mark.parametrize("valid", [None, [200, 200], [0, 130], [65, 64], [1, 0]])
def test_append_attend_is_one_append_and_one_attend_after_another(q: int, valid: list[int] | None) -> None:
    """In pieces of 64 tokens, each causal: as if the pieces had come one by one."""
    counts = None if valid is None else np.minimum(valid, q)
    whole, pieces = layer_of(window=10), layer_of(window=10)
    queries, keys, values = rows_of(1, B, 2 * H, q, D), rows_of(2, B, H, q, D), rows_of(3, B, H, q, D)
    out = whole.append_attend(queries, keys, values, scale=0.1, valid=counts)
    for start in range(0, q, store.CHUNK):
        end = min(start + store.CHUNK, q)
        part = None if counts is None else np.clip(counts - (q - end), 0, end - start)
        pieces.append(keys[:, :, start:end], values[:, :, start:end], part)
        expected = attended(pieces, queries[:, :, start:end], scale=0.1, new_tokens=part)
        assert np.array_equal(out[:, :, start:end], expected)
    assert np.array_equal(whole.lists, pieces.lists)
    assert all(np.array_equal(a, b) for a, b in zip(whole.unpack(), pieces.unpack(), strict=True))


def test_a_second_prompt() -> None:
    """Hundreds of tokens behind a compressed prompt, twice, then decoding."""
    layer = layer_of(300, 4, window=32)
    for turn, q in enumerate((500, 1, 1, 333, 1)):
        new = rows_of(turn, B, H, q, D)
        out = layer.append_attend(rows_of(turn, B, H, q, D), new, new, scale=0.1)
        assert out.shape == (B, H, q, D) and np.isfinite(out).all()
    assert (layer.tokens == 300 + 836).all()
    attended(layer, rows_of(9, B, H, 1, D), scale=0.1)
    assert layer.arena.used == live_bytes([layer])


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    plain, tensors = layer_of(), layer_of()
    queries, keys = rows_of(1, B, H, 70, D), rows_of(2, B, H, 70, D)
    expected = plain.append_attend(queries, keys, keys, scale=0.1)
    out = tensors.append_attend(*map(torch.from_numpy, (queries, keys, keys)), scale=0.1)
    assert isinstance(out, torch.Tensor) and np.array_equal(out.numpy(), expected)
    half = tensors.attend(torch.from_numpy(queries).bfloat16(), scale=0.1)
    assert half.dtype == torch.bfloat16


def test_layers_share_an_arena() -> None:
    result = packed(130, 4, layers=3)
    layers = result.layers
    for i in range(200):
        layer = layers[i % 3]
        layer.append(rows_of(i, B, H, 1, D), rows_of(i, B, H, 1, D))
    assert result.arena.used == live_bytes(layers)
    before = [layer.unpack()[0] for layer in layers]
    layers[1].release()
    assert result.arena.used == live_bytes([layers[0], layers[2]])
    assert np.array_equal(layers[0].unpack()[0], before[0]) and np.array_equal(layers[2].unpack()[0], before[2])


# ---- select, release


@pytest.mark.parametrize("chosen", [[0, 1], [1, 0], [0, 0], [1, 1, 1, 0], [1], [], [0, 1, 0, 1, 0]])
def test_select(chosen: list[int]) -> None:
    layer = layer_of(150, 3, window=20)
    layer.append(rows_of(1, B, H, 9, D), rows_of(1, B, H, 9, D), np.array([9, 4]))
    keys, values = layer.unpack()
    tokens = layer.tokens.reshape(B, H).copy()
    layer.select(np.array(chosen, np.int64))
    assert layer.batch == len(chosen) and np.array_equal(layer.tokens.reshape(-1, H), tokens[chosen])
    assert layer.arena.used == live_bytes([layer])
    most = int(layer.tokens.max(initial=0))
    for now, then in zip(layer.unpack(), (keys, values), strict=True):
        assert np.array_equal(now, then[chosen][:, :, :most])
    units = layer.entries()["unit"]
    assert len(np.unique(units)) == len(units), "sequences share pages"
    new = rows_of(5, len(chosen), H, 100, D)
    layer.append(new, new)  # copies go their own ways
    again, _ = layer.unpack()
    for i in range(len(chosen)):
        for h in range(H):
            n = tokens[chosen[i], h]
            assert np.abs(again[i, h, n : n + 100] - new[i, h]).max() < 1.5


@pytest.mark.parametrize("wrong", [[-1], [2], [0, 5], [0.0, 1.0], [[0, 1]], 1, [True]])
def test_select_refuses(wrong: Any) -> None:
    layer = layer_of()
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"^select: sequences: expected indices in 0\.\.1, got "):
        layer.select(wrong)
    assert_unchanged(layer, before)


def test_release_frees_everything() -> None:
    base = resident()
    result = packed(20_000, 4)
    layer = result.layers[0]
    grown = resident()
    assert result.arena.nbytes > 5 << 20
    layer.release()
    assert result.arena.nbytes == result.arena.used == 0 and layer.table_bytes == 0
    assert resident() < max(grown - (5 << 20), base + (1 << 20))
    layer.release()
    assert layer.batch == 0 and layer.unpack()[0].shape == (0, H, 0, D)


# ---- what is refused leaves all as it was

GOOD = rows_of(1, B, H, 2, D)
APPENDS: list[tuple[tuple[Any, ...], str]] = [
    ((GOOD[:, :2], GOOD[:, :2]), r"append: keys: expected shape \(2, 3, q, 64\), got \(2, 2, 2, 64\)"),
    ((GOOD.reshape(H, B, 2, D), GOOD), r"append: keys: expected shape \(2, 3, q, 64\), got \(3, 2, 2, 64\)"),
    ((np.repeat(GOOD, 2, 1), GOOD), r"append: keys: expected shape \(2, 3, q, 64\), got \(2, 6, 2, 64\)"),
    ((GOOD[0], GOOD), r"append: keys: expected shape \(2, 3, q, 64\), got \(3, 2, 64\)"),
    ((GOOD[..., :32], GOOD), r"append: keys: expected shape \(2, 3, q, 64\), got \(2, 3, 2, 32\)"),
    (([1.0], GOOD), r"append: keys: expected shape \(2, 3, q, 64\), got \(\)"),
    ((GOOD, GOOD[:, :, :1]), r"append: values: expected shape \(2, 3, 2, 64\), got \(2, 3, 1, 64\)"),
    ((GOOD, GOOD.astype(np.float16)), "append: values: expected float32, got float16"),
    ((GOOD, np.full_like(GOOD, np.nan)), "append: values: expected finite values, got NaN or Inf in row 0 of list 0"),
    ((GOOD, GOOD, np.array([1, 3])), r"append: valid: expected 2 integers in 0\.\.2, got \[1, 3\]"),
    ((GOOD, GOOD, np.array([1, -1])), r"append: valid: expected 2 integers in 0\.\.2, got \[1, -1\]"),
    ((GOOD, GOOD, np.array([1])), r"append: valid: expected 2 integers in 0\.\.2, got \[1\]"),
    ((GOOD, GOOD, np.array([1.0, 2.0])), r"append: valid: expected 2 integers in 0\.\.2, got \[1\.0, 2\.0\]"),
]


@pytest.mark.parametrize("arguments, sentence", APPENDS, ids=[case[1][:60] for case in APPENDS])
def test_append_refuses(arguments: tuple[Any, ...], sentence: str) -> None:
    layer = layer_of(window=5)
    before = snapshot(layer)
    with pytest.raises((ValueError, TypeError), match=rf"^{sentence}$"):
        layer.append(*arguments)
    assert_unchanged(layer, before)


@pytest.mark.parametrize(
    "queries, options, sentence",
    [
        (rows_of(1, B, H + 1, 1, D), {}, r"queries: expected shape \(2, a multiple of 3, q, 64\), got \(2, 4, 1, 64\)"),
        (rows_of(1, B + 1, H, 1, D), {}, r"queries: expected shape \(2, a multiple of 3, q, 64\), got \(3, 3, 1, 64\)"),
        (rows_of(1, B, H - 1, 1, D), {}, r"queries: expected shape \(2, a multiple of 3, q, 64\), got \(2, 2, 1, 64\)"),
        (rows_of(1, B, H, D), {}, r"queries: expected shape \(2, a multiple of 3, q, 64\), got \(2, 3, 64\)"),
        (GOOD, {"new_tokens": [0, 3]}, r"new_tokens: expected 2 integers in 0\.\.2, got \[0, 3\]"),
        (GOOD, {"scale": math.inf}, r"scale: expected a number in 1e-30\.\.1e\+30, got inf"),
        (GOOD, {"softcap": -1}, r"softcap: expected a number in 0\.\.1e\+30, got -1"),
        (
            GOOD,
            {"out": np.zeros((B, H, 1, D), np.float32)},
            r"out: expected shape \(2, 3, 2, 64\), got \(2, 3, 1, 64\)",
        ),
        (GOOD, {"mass": np.zeros((B * H, 199), np.float32)}, r"mass: expected \(6, 200 or more\), got \(6, 199\)"),
    ],
)
def test_attend_refuses(queries: Array, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^attend: {sentence}$"):
        layer_of().attend(queries, **{"scale": 0.1, **options})


@pytest.mark.parametrize("q", [2, 100])
def test_append_attend_refuses_before_it_appends(q: int) -> None:
    """Whatever is wrong with queries, numbers or a late row: nothing was appended."""
    layer = layer_of(window=5)
    before = snapshot(layer)
    rows, late = rows_of(1, B, H, q, D), rows_of(1, B, H, q, D)
    late[1, 0, q - 1, 0] = np.nan
    wide = np.zeros((B, H, q, 2 * D), np.float32)[..., ::2]
    for arguments, options, error in (
        ((rows.astype(np.float64), rows, rows), {}, TypeError),
        ((wide, rows, rows), {}, ValueError),
        ((rows[:, :, 1:], rows, rows), {}, ValueError),
        ((rows, rows, rows), {"scale": 0.0}, ValueError),
        ((rows, rows, rows), {"softcap": math.nan}, ValueError),
        ((rows, rows, rows), {"valid": np.array([q + 1, 0])}, ValueError),
        ((rows, late, rows), {}, ValueError),
        ((rows, rows, late), {}, ValueError),
    ):
        with pytest.raises(error, match=r"^(append|attend): [a-z_]+: expected "):
            layer.append_attend(*arguments, **{"scale": 0.1, **options})
        assert_unchanged(layer, before)
    late[0, :, : q - 1] = late[1, :, : q - 1] = np.inf
    late[1] = 1
    layer.append_attend(rows, late, late, scale=0.1, valid=np.array([1, q]))  # padding may hold anything


def test_an_arena_without_room_loses_nothing() -> None:
    """Whichever of the two allocations fails, and in the middle of a selection: all pages are still accounted for."""
    layer = layer_of(200, 4)
    live = layer.arena.used

    class Full:
        """The arena, out of memory at the n-th allocation."""

        def __init__(self, arena: Any, calls: int) -> None:
            self.arena, self.calls = arena, calls

        def alloc(self, size: int, count: int) -> Array:
            if self.calls == 0:
                raise MemoryError("arena: expected room")
            self.calls -= 1
            return np.asarray(self.arena.alloc(size, count))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.arena, name)

    real, before = layer.arena, snapshot(layer)
    new = rows_of(1, B, H, 200, D)
    for calls in (0, 1):
        layer.arena = Full(real, calls)  # type: ignore[assignment]
        with pytest.raises(MemoryError):
            layer.append(new, new)
        layer.arena = real
        assert real.used == live
        assert_unchanged(layer, before)
    for calls in (0, 3):
        layer.arena = Full(real, calls)  # type: ignore[assignment]
        with pytest.raises(MemoryError):
            layer.select(np.array([0, 0, 1, 1]))
        layer.arena = real
        assert real.used == live
        assert_unchanged(layer, before)


# ---- bytes


def test_ledger_counts_what_is_there() -> None:
    layer = layer_of(200, 4, window=10)
    entries = layer.entries()
    assert layer.bits_histogram() == {(4, 4): 2 * H * 128, (16, 16): 2 * H * 72}
    ledger = layer.page_ledger()
    assert ledger == {
        "codes": B * H * 128 * D * 8 // 8,
        "scales": B * H * 128 * 2 * 4,
        "window": B * H * 72 * D * 4,
    }
    assert layer.table_bytes == layer.table.nbytes + layer.lists.nbytes + 2 * len(layer.lists)
    assert (layer.lists[:, TAIL_PAGE] == 2).all() and (layer.lists[:, PAGES] == 7).all()
    assert int(entries["tokens"].sum()) == int(layer.lists[:, TOKENS].sum())


def test_the_scratch_memory_is_aligned_and_reused() -> None:
    first = store.workspace(1000)
    assert first.size >= 1000 and first.ctypes.data % 64 == 0
    assert store.workspace(500) is first
    larger = store.workspace(first.size + 1)
    assert larger is not first and larger.ctypes.data % 64 == 0
