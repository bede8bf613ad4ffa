"""compress_prompt from end to end: budgets met in bytes really held, every byte accounted for, every token in place."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp import _C, BudgetError
from kvcomp.layer_input import LayerInput
from kvcomp.packed import Packed
from kvcomp.policy import Policy
from kvcomp.prompt import compress_prompt
from kvcomp.selectors import Full, Hybrid, LayerRatio, PyramidKV, SnapKV, Streaming
from kvcomp.store import LEDGER, PAGES, TAIL_TOKENS
from reference import Array

LAYERS, B, H, S, D = 3, 2, 2, 320, 64
SELECTORS = {
    "none": None,
    "full": Full(),
    "streaming": Streaming(),
    "streaming half": Streaming(keep=0.5),
    "snap": SnapKV(window=16),
    "snap max": SnapKV(window=16, pool=7, pool_kind="max", reduce="sum", keep=0.4),
    "pyramid": PyramidKV(window=16, keep=0.4),
    "hybrid": Hybrid(window=16, keep=0.4, min_tokens=20),
    "hybrid ratios": Hybrid(
        window=16,
        model_layers=12,
        layer_ratios=(
            LayerRatio(layer_index=0, retain_ratio=0.8),
            LayerRatio(layer_index=11, retain_ratio=0.3, priority=2.0),
        ),
    ),
}


def inputs(
    seed: int = 0,
    s: int = S,
    *,
    layers: int = LAYERS,
    first: Any = None,
    kind: Any = np.float32,
    window: int = 32,
    d: int = D,
) -> list[LayerInput]:
    """Layers whose keys have a few strong directions, so that some tokens matter more than others."""
    random = np.random.default_rng(seed)
    out = []
    for _ in range(layers):
        keys, values = (random.standard_normal((B, H, s, d)).astype(np.float32) for _ in range(2))
        strong = random.choice(s, s // 16, replace=False) if s else []
        keys[:, :, strong] += 3 * random.standard_normal(d).astype(np.float32)
        queries = random.standard_normal((B, 2 * H, min(window, s), d)).astype(np.float32)
        out.append(LayerInput(keys.astype(kind), values.astype(kind), queries.astype(kind), first=first))
    return out


def bf16_bytes(layers: list[LayerInput], first: Any = None) -> int:
    b, _, s, d = layers[0].shape
    real = b * s - (0 if first is None else int(np.sum(first)))
    return real * sum(layer.shape[1] for layer in layers) * d * 4


def allocated(packed: Packed) -> int:
    """What the layers' pages and tables must take, from the page tables alone: slabs of 4 KiB multiples by size."""
    sizes: dict[int, int] = {}
    for layer in packed.layers:
        for (k_bits, v_bits), entries in itertools.groupby(sorted(layer.entries()[["k_bits", "v_bits"]].tolist())):
            size = _C.page_bytes(layer.coding.layout, k_bits, v_bits)
            sizes[size] = sizes.get(size, 0) + len(list(entries))
    slabs = sum(-(-size * count // 4096) * 4096 for size, count in sizes.items())
    tables = sum(layer.table.size * 8 + layer.lists.size * 4 + len(layer.lists) * 2 for layer in packed.layers)
    ranks = [array for layer in packed.layers if layer.ranks for array in vars(layer.ranks).values()]
    return slabs + tables + sum(array.nbytes for array in ranks)


def check_bytes(packed: Packed) -> None:
    ledger = packed.ledger()
    assert set(ledger) == set(LEDGER) and all(n >= 0 for n in ledger.values())
    assert sum(ledger.values()) == packed.nbytes == allocated(packed) == packed.report.planned_bytes
    assert ledger["codes"] + ledger["scales"] + ledger["window"] + ledger["slack"] == packed.arena.nbytes
    assert ledger["page_table"] == sum(layer.table_bytes for layer in packed.layers)
    units = np.concatenate([layer.entries()["unit"] for layer in packed.layers])
    assert len(np.unique(units)) == len(units)


def check_tails(packed: Packed, window: int, real: Array) -> None:
    """16-bit runs at every list's end, all pages full but the last; the window's tokens among them."""
    for layer in packed.layers:
        for i, (pages, tail_page, tail_tokens, tokens) in enumerate(layer.lists):
            entries = layer.table[i, :pages].view(layer.entries().dtype)
            tail = entries[tail_page:]
            assert (tail["k_bits"] == 16).all() and (tail["v_bits"] == 16).all()
            assert (tail["tokens"][:-1] == 16).all() and int(tail["tokens"].sum()) == tail_tokens
            assert int(entries["tokens"].sum()) == tokens
            assert tail_tokens >= min(window, int(real[i // layer.heads]), tokens)


def check_contents(packed: Packed, layers: list[LayerInput], first: Array, policy: Policy) -> None:
    """Every kept token is a real one, kept once, close to what it was; sinks and the window are there at 16 bits."""
    assert packed.positions is not None
    s = layers[0].shape[2]
    for layer, source, places in zip(packed.layers, layers, packed.positions, strict=True):
        keys, values = layer.unpack()
        at = 0
        entries = layer.entries()
        page_at = 0
        for i, count in enumerate(layer.tokens):
            row, head = divmod(i, layer.heads)
            tokens = places[at : at + count]
            at += int(count)
            assert len(set(tokens.tolist())) == count and (tokens >= first[row]).all()
            mine = entries[page_at : page_at + layer.lists[i, PAGES]]
            page_at += int(layer.lists[i, PAGES])
            bits = np.repeat(np.minimum(mine["k_bits"], mine["v_bits"]), mine["tokens"])
            must = {t for t in range(int(first[row]), min(int(first[row]) + policy.sinks, s))}
            must |= set(range(max(int(first[row]), s - policy.window), s))
            assert must <= set(tokens[bits == 16].tolist())
            assert (np.diff(tokens[int(count) - int(layer.lists[i, TAIL_TOKENS]) :]) > 0).all(), "the tail is in order"
            for b, error in ((16, 0.02), (8, 0.1), (4, 0.9), (3, 1.5), (2, 3.0)):
                for stored, exact in ((keys, source.keys), (values, source.values)):
                    original = np.asarray(exact[row, head, tokens[bits == b]], np.float32)
                    difference = np.abs(stored[row, head, :count][bits == b] - original)
                    size = np.abs(original).max(1, keepdims=True, initial=1)
                    assert (difference.max(1, initial=0) <= error * size[:, 0]).all()


# ---- budgets


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("ratio", [2.5, 4.0, 6.0])
def test_a_ratio_is_met_in_held_bytes(name: str, ratio: float) -> None:
    first = np.array([0, 75], np.int32)
    layers = inputs(first=first)
    policy = Policy(target_ratio=ratio, select=SELECTORS[name], sinks=4, window=16)
    packed = compress_prompt(layers, policy, positions=True)
    assert packed.nbytes <= bf16_bytes(layers, first) / ratio
    assert packed.ratio >= ratio and packed.ratio == packed.report.bf16_bytes / packed.nbytes
    assert packed.report.bf16_bytes == bf16_bytes(layers, first) and packed.report.prompt_tokens == B * S - 75
    assert not packed.report.over_budget
    check_bytes(packed)
    check_tails(packed, 16, S - first)
    check_contents(packed, layers, first, policy)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_budget_is_met_or_refused(data: st.DataObject) -> None:
    """Never a byte above the budget; when it cannot be had, the least bytes that can are named, and they work."""
    s = data.draw(st.sampled_from([1, 16, 65, 130, 300]))
    first = np.array(data.draw(st.lists(st.integers(0, s), min_size=B, max_size=B)), np.int32)
    head_dim, group = data.draw(st.sampled_from([(64, 64), (80, 16), (128, 64)]))
    layers = inputs(data.draw(st.integers(0, 99)), s, layers=data.draw(st.integers(1, 3)), first=first, d=head_dim)
    whole = bf16_bytes(layers, first)
    policy = Policy(
        budget_bytes=max(1, int(whole * data.draw(st.floats(0.02, 1.3)))),
        select=SELECTORS[data.draw(st.sampled_from(list(SELECTORS)))],
        sinks=data.draw(st.integers(0, 5)),
        window=data.draw(st.sampled_from([0, 3, 16, 80])),
        group=group,
        zero_point=data.draw(st.booleans()),
        guard=data.draw(st.none() | st.floats(0, 1)),
        classes=data.draw(st.none() | st.just(((4, 4),)) | st.just(((8, 4), (3, 2), (16, 4)))),
        calibration_tokens=32,
    )
    try:
        packed = compress_prompt(layers, policy, positions=True)
    except BudgetError as error:
        least = error.least_bytes
        assert least > policy.budget_bytes and f"expected at least {least} bytes" in str(error)
        over = compress_prompt(layers, policy, least_if_over=True)
        assert over.report.over_budget and over.nbytes == least
        check_bytes(over)
        policy = replace(policy, budget_bytes=least)
        packed = compress_prompt(layers, policy, positions=True)
        assert packed.nbytes <= least and not packed.report.over_budget
    else:
        assert packed.nbytes <= policy.budget_bytes
    check_bytes(packed)
    check_tails(packed, policy.window, s - first)
    check_contents(packed, layers, first, policy)
    if policy.guard is not None:
        for layer in packed.layers:
            plain = layer.tokens * policy.guard + np.minimum(policy.sinks + policy.window, s - np.repeat(first, H))
            entries, owners = layer.entries(), np.repeat(np.arange(len(layer.lists)), layer.lists[:, PAGES])
            wide = (entries["k_bits"] == 16) & (entries["v_bits"] == 16)
            assert (
                np.bincount(owners[wide], entries["tokens"][wide], minlength=len(layer.lists)) <= plain + 1e-9
            ).all()


@pytest.mark.parametrize(
    "budget", [{"fraction": 0.25}, {"target_ratio": 4.0}, {"budget_bytes": bf16_bytes(inputs()) // 4}]
)
def test_three_ways_to_say_a_budget(budget: dict[str, Any]) -> None:
    packed = compress_prompt(inputs(), Policy(**budget))
    assert packed.report.budget_bytes == bf16_bytes(inputs()) // 4
    assert packed.nbytes <= packed.report.budget_bytes
    assert packed.nbytes == compress_prompt(inputs(), Policy(target_ratio=4.0)).nbytes


def test_more_bytes_keep_more() -> None:
    reports = [compress_prompt(inputs(), Policy(target_ratio=ratio)).report for ratio in (8, 6, 4, 3, 2)]
    kept = [report.kept_fraction * report.bits_per_element for report in reports]
    assert kept == sorted(kept) and kept[0] < 2.1 and kept[-1] > 6


def test_a_budget_for_everything_keeps_everything_at_16_bits() -> None:
    packed = compress_prompt(inputs(), Policy(fraction=1.0))
    generous = compress_prompt(inputs(), Policy(budget_bytes=2 * bf16_bytes(inputs())))
    assert packed.report.kept_fraction == 1.0
    assert (
        generous.report.tokens_per_class == {"16/16": LAYERS * B * H * S}
        and generous.report.high_precision_fraction == 1.0
    )


def test_important_tokens_get_the_bits() -> None:
    importance = np.full((B, H, S), 0.05, np.float32)
    strong = np.random.default_rng(5).choice(S, 64, replace=False)
    importance[:, :, strong] = 1.0
    layers = [LayerInput(x.keys, x.values, importance=importance) for x in inputs()]
    packed = compress_prompt(layers, Policy(target_ratio=5), positions=True)
    assert packed.positions is not None
    for layer, places in zip(packed.layers, packed.positions, strict=True):
        entries = layer.entries()
        bits = np.repeat(entries["k_bits"].astype(int) + entries["v_bits"], entries["tokens"])
        chosen = np.isin(places, strong)
        assert chosen.sum() == B * H * 64, "an important token was dropped"
        assert bits[chosen].mean() > bits[~chosen].mean()


def test_importance_of_another_shape() -> None:
    layers = inputs(layers=1)
    wrong = LayerInput(layers[0].keys, layers[0].values, importance=np.ones((B, H, S - 1), np.float32))
    with pytest.raises(
        ValueError, match=r"^compress: importance: expected \(2, 2, 320\) in layer 0, got \(2, 2, 319\)$"
    ):
        compress_prompt([wrong], Policy(target_ratio=4))


# ---- fixed bits


@pytest.mark.parametrize(
    "bits", [{"bits": b} for b in (2, 3, 4, 8, 16)] + [{"k_bits": 4, "v_bits": 2}, {"k_bits": 16, "v_bits": 4}]
)
@pytest.mark.parametrize("window", [0, 30])
def test_fixed_bits(bits: dict[str, int], window: int) -> None:
    """Full pages of the class, sinks at 16 bits, the newest rest and the window in the tail."""
    first = np.array([0, 100], np.int32)
    layers = inputs(first=first, kind=ml_dtypes.bfloat16)
    policy = Policy(**bits, sinks=3, window=window)
    packed = compress_prompt(layers, policy, positions=True)
    pair = policy.fixed_class
    assert pair is not None and all((layer.aged == pair).all() for layer in packed.layers)
    check_bytes(packed)
    check_tails(packed, window, S - first)
    check_contents(packed, layers, first, policy)
    assert packed.report.kept_fraction == 1.0 and packed.report.budget_bytes is None
    if pair == (16, 16):
        assert packed.report.tokens_per_class == {"16/16": LAYERS * H * (2 * S - 100)}
        for layer, source in zip(packed.layers, layers, strict=True):  # not a bit is lost
            assert np.array_equal(layer.unpack()[0][0], np.asarray(source.keys[0], np.float32))
    else:
        full = sum((S - f - 3 - window) // 64 * 64 for f in (0, 100))
        assert packed.report.tokens_per_class[f"{pair[0]}/{pair[1]}"] == LAYERS * H * full


def test_fixed_bits_of_chosen_tokens() -> None:
    layers = inputs()
    packed = compress_prompt(
        layers, Policy(bits=4, select=SnapKV(window=16, keep=0.5), sinks=2, window=8), positions=True
    )
    assert packed.report.kept_per_layer == [0.5] * LAYERS
    check_bytes(packed)
    check_contents(packed, layers, np.zeros(B, np.int32), Policy(bits=4, sinks=2, window=8))
    streaming = compress_prompt(layers, Policy(bits=4, select=Streaming(keep=0.25), sinks=4), positions=True)
    assert streaming.positions is not None
    expected = [*range(4), *range(S - 76, S)]
    assert sorted(streaming.positions[0][:80].tolist()) == expected


def test_same_inputs_same_bytes() -> None:
    policy = Policy(target_ratio=5, stochastic=True, seed=3, select=PyramidKV(window=16))
    a, b = compress_prompt(inputs(), policy), compress_prompt(inputs(), policy)
    other = compress_prompt(inputs(), replace(policy, seed=4))
    assert all(np.array_equal(x.unpack()[0], y.unpack()[0]) for x, y in zip(a.layers, b.layers, strict=True))
    assert not np.array_equal(a.layers[0].unpack()[0], other.layers[0].unpack()[0])


def test_torch_inputs_give_the_same_cache() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    layers = inputs(first=np.array([3, 0], np.int32))
    tensors = [LayerInput(*(torch.from_numpy(x) for x in (i.keys, i.values, i.queries)), first=i.first) for i in layers]
    for policy in (Policy(bits=3), Policy(target_ratio=4, select=Hybrid(window=16))):
        a, b = compress_prompt(layers, policy), compress_prompt(tensors, policy)
        assert a.nbytes == b.nbytes
        assert all(np.array_equal(x.unpack()[0], y.unpack()[0]) for x, y in zip(a.layers, b.layers, strict=True))
    half = [LayerInput(i.keys.bfloat16(), i.values.bfloat16(), i.queries.bfloat16()) for i in tensors]
    assert compress_prompt(half, Policy(target_ratio=4)).ratio >= 4


def test_decoding_goes_on_from_every_plan() -> None:
    for select in SELECTORS.values():
        packed = compress_prompt(inputs(), Policy(target_ratio=4, select=select, window=20))
        for layer in packed.layers:
            before = layer.tokens.copy()
            new = np.random.default_rng(0).standard_normal((B, H, 90, D)).astype(np.float32)
            out = layer.append_attend(np.repeat(new, 2, 1), new, new, scale=0.1)
            assert np.isfinite(out).all() and (layer.tokens == before + 90).all()
        ledger = packed.ledger()
        assert sum(ledger.values()) == packed.nbytes and min(ledger.values()) >= 0


def test_one_tail_page_more_than_nothing() -> None:
    """Short prompts, empty prompts, prompts of padding alone."""
    for s, first in ((0, [0, 0]), (1, [0, 0]), (5, [5, 5]), (40, [40, 0]), (64, [0, 63])):
        layers = inputs(0, s, first=np.array(first, np.int32))
        packed = compress_prompt(layers, Policy(bits=4, window=3), positions=True)
        check_bytes(packed)
        check_contents(packed, layers, np.array(first), Policy(bits=4, window=3))
        new = np.ones((B, H, 70, D), np.float32)
        packed.layers[0].append_attend(new, new, new, scale=0.1)
        assert (packed.layers[0].tokens.reshape(B, H)[:, 0] == [s - f + 70 for f in first]).all()


# ---- refusals


def test_least_bytes_are_named() -> None:
    """The fixed tokens do not fit: the error says what would do, as bytes and as a ratio."""
    layers = inputs()
    policy = Policy(target_ratio=20, sinks=16, window=64)
    with pytest.raises(
        BudgetError, match=r"^plan: budget: expected at least \d+ bytes \(a ratio of [0-9.]+ or less\), got \d+ bytes$"
    ) as caught:
        compress_prompt(layers, policy)
    assert isinstance(caught.value, ValueError)
    least = caught.value.least_bytes
    packed = compress_prompt(layers, Policy(budget_bytes=least, sinks=16, window=64))
    assert packed.nbytes == least >= packed.report.least_bytes
    with pytest.raises(BudgetError):
        compress_prompt(layers, Policy(budget_bytes=packed.nbytes - 1, sinks=16, window=64))
    over = compress_prompt(layers, policy, least_if_over=True)
    assert over.report.over_budget and over.nbytes == packed.nbytes
    check_bytes(over)


def changed(**fields: Any) -> list[LayerInput]:
    layers = inputs(layers=2)
    for name, value in fields.items():
        setattr(layers[1], name, value)
    return layers


NAN = np.full((B, H, S, D), np.nan, np.float32)
REFUSED: list[tuple[list[LayerInput], Policy, str]] = [
    ([], Policy(bits=4), "compress: layers: expected at least one, got none"),
    (
        changed(keys=NAN[0]),
        Policy(bits=4),
        r"compress: layers\[1\]: expected keys and values of one shape \(b, h, s, d\), got .*",
    ),
    (changed(values=NAN[:, :, :5]), Policy(bits=4), r"compress: layers\[1\]: expected keys and values of one shape .*"),
    (
        changed(keys=NAN[:, :, 1:], values=NAN[:, :, 1:]),
        Policy(bits=4),
        r"compress: layers\[1\]: expected shape \(2, 2, 320, 64\), got \(2, 2, 319, 64\)",
    ),
    (changed(values=NAN), Policy(bits=4), r"pack: values: expected finite values, got NaN or Inf in token 0 of list 0"),
    (
        changed(keys=NAN),
        Policy(target_ratio=4),
        r"score: keys: expected finite values, got NaN or infinity in sequence 0",
    ),
    (
        changed(queries=None),
        Policy(target_ratio=4),
        "compress: queries: expected the prompt's last queries or an importance, got neither",
    ),
    (
        changed(importance=np.full((B, H, S), -1.0)),
        Policy(target_ratio=4),
        "compress: importance: expected finite values of 0 or more, got NaN, Inf or less",
    ),
    (
        changed(importance=np.full((B, H, S), np.inf)),
        Policy(target_ratio=4),
        "compress: importance: expected finite values of 0 or more, got NaN, Inf or less",
    ),
    (
        inputs(first=np.array([0, S + 1])),
        Policy(bits=4),
        r"compress: first: expected 2 indices in 0\.\.320, got \[0, 321\]",
    ),
    (inputs(first=np.array([0])), Policy(bits=4), r"compress: first: expected 2 indices in 0\.\.320, got \[0\]"),
    (
        inputs(first=np.array([0.0, 1.5])),
        Policy(bits=4),
        r"compress: first: expected 2 indices in 0\.\.320, got \[0\.0, 1\.5\]",
    ),
    (
        changed(first=np.array([0, 7])),
        Policy(bits=4),
        r"compress: layers\[1\]: expected first \[0, 0\] as in layers\[0\], got \[0, 7\]",
    ),
    (changed(keys=[1], values=[1]), Policy(bits=4), r"compress: layers\[1\]: expected keys .*, got \(\) and \(\)"),
    (inputs(d=72), Policy(bits=4), "page_bytes: head_dim: expected 64, 80, 96, 128 or 256, got 72"),
    (
        inputs(),
        Policy(bits=4, group=48),
        "page_bytes: group: expected a divisor of head_dim 64 that is a multiple of 16, got 48",
    ),
    (inputs(kind=np.float64), Policy(bits=4), "pack: keys: expected float32, float16 or bfloat16, got float64"),
]


@pytest.mark.parametrize("layers, policy, sentence", REFUSED, ids=[case[2][:60] for case in REFUSED])
def test_refused(layers: list[LayerInput], policy: Policy, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=rf"^{sentence}$"):
        compress_prompt(layers, policy)


def test_padding_may_hold_anything() -> None:
    first = np.array([50, 0], np.int32)
    clean, dirty = inputs(first=first), inputs(first=first)
    for layer in dirty:
        layer.keys[0, :, :50] = np.nan
        layer.values[0, :, :50] = np.inf
    for policy in (Policy(bits=4), Policy(target_ratio=4), Policy(target_ratio=4, select=PyramidKV(window=16))):
        a, b = compress_prompt(clean, policy), compress_prompt(dirty, policy)
        assert all(np.array_equal(x.unpack()[0], y.unpack()[0]) for x, y in zip(a.layers, b.layers, strict=True))


def test_layers_of_low_priority_give_up_bytes_first() -> None:
    def bytes_by_layer(priorities: tuple[float, float, float]) -> list[int]:
        ratios = tuple(
            LayerRatio(layer_index=index, retain_ratio=1.0, priority=priority)
            for index, priority in enumerate(priorities)
        )
        select = Hybrid(window=16, model_layers=LAYERS, layer_ratios=ratios)
        return compress_prompt(inputs(), Policy(target_ratio=6, select=select)).report.bytes_per_layer

    even, uneven = bytes_by_layer((1, 1, 1)), bytes_by_layer((1, 0.01, 100))
    assert uneven[1] < even[1] and uneven[2] > even[2] and sum(uneven) <= sum(even) * 1.02
