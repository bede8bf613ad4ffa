"""While tokens are appended: which class aged tokens take, and byte budgets that are held for good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kvcomp import BudgetError, Policy, Rotation
from kvcomp.hold import make_room
from kvcomp.layer_input import LayerInput
from kvcomp.packed import Packed
from kvcomp.prompt import compress_prompt
from kvcomp.ranks import LEVELS, WORTH_BYTES, Ranks, ladder, list_bytes
from kvcomp.store import PAGE, PAGES, TAIL_PAGE, TAIL_TOKENS, TOKENS
from reference import Array
from test_prompt import LAYERS, B, D, H, check_tails, inputs


def rows(random: np.random.Generator, heads: int, q: int = 1) -> Array:
    return random.standard_normal((B, heads, q, D)).astype(np.float32)


def step(packed: Packed, random: np.random.Generator, q: int = 1, **options: Any) -> list[Array]:
    """One forward pass of q tokens; the limit is checked after every layer."""
    room = None if packed.hold_bytes is None else lambda nbytes: make_room(packed, nbytes)
    out = []
    for layer in packed.layers:
        queries, keys, values = rows(random, 2 * H, q), rows(random, H, q), rows(random, H, q)
        out.append(layer.append_attend(queries, keys, values, scale=D**-0.5, make_room=room, **options))
        assert packed.hold_bytes is None or packed.nbytes <= packed.hold_bytes
    return out


def check_state(packed: Packed) -> None:
    """Lists, tables and ledger agree, and no page is used twice."""
    assert sum(packed.ledger().values()) == packed.nbytes
    units = []
    for layer in packed.layers:
        assert (layer.lists[:, TAIL_PAGE] <= layer.lists[:, PAGES]).all()
        for row, (pages, tail_page, tail_tokens, tokens) in enumerate(layer.lists):
            entries = layer.table[row, :pages].view(PAGE)
            assert int(entries["tokens"].sum()) == tokens
            assert int(entries["tokens"][tail_page:].sum()) == tail_tokens
            units += [(int(e["unit"]), int(e["k_bits"]), int(e["v_bits"])) for e in entries]
        if layer.ranks is not None and layer.ranks.holds:
            assert layer.ranks.worth.shape == layer.table.shape
            behind = np.arange(layer.table.shape[1]) >= layer.lists[:, PAGES, None]
            assert (layer.ranks.worth[behind] == 0).all()
    assert len({unit for unit, _, _ in units}) == len(units)


# ---- the class of aged tokens


def test_the_ladder_of_a_plan() -> None:
    importance = np.concatenate([np.full(64, 0.01), np.full(64, 0.001), np.full(64, 1e-4)])[None].astype(np.float32)
    bits = np.repeat([4, 3, 0], 64)[None].astype(np.uint8)
    kind, level = ladder(importance, bits, np.minimum(bits, 2), np.zeros_like(bits))
    assert kind[0].tolist() == [[4, 2], [3, 2], [0, 0], [0, 0]]
    np.testing.assert_allclose(level[0], [np.sqrt(0.01 * 0.001), 0, 0, 0], rtol=1e-5)


def test_the_ladder_leaves_out_fixed_tokens_and_16_bits_and_keeps_four_classes() -> None:
    classes = [(16, 16), (8, 8), (8, 4), (4, 4), (4, 3), (3, 3), (2, 2)]
    counts = [64, 64, 128, 128, 128, 128, 74]
    importance = np.repeat(2.0 ** -np.arange(7), counts)[None].astype(np.float32)
    k, v = (np.repeat([c[i] for c in classes], counts)[None].astype(np.uint8) for i in range(2))
    fixed = np.zeros_like(k)
    fixed[0, -10:] = 1
    kind, level = ladder(importance, k, v, fixed)
    # Six packed classes, four places: the classes of fewest tokens give way.
    assert kind[0].tolist() == [[8, 4], [4, 4], [4, 3], [3, 3]]
    assert (np.diff(level[0]) < 0).all() and level[0, -1] == 0


def test_a_list_without_packed_tokens_has_no_ladder() -> None:
    kind, level = ladder(np.ones((2, 8), np.float32), np.full((2, 8), 16, np.uint8), np.full((2, 8), 16, np.uint8),
                         np.zeros((2, 8), np.uint8))  # fmt: skip
    assert kind.shape == (2, LEVELS, 2) and not kind.any() and not level.any()


def test_aging_takes_the_class_of_the_observed_importance() -> None:
    kind = np.zeros((4, LEVELS, 2), np.uint8)
    kind[:3, 0], kind[:3, 1] = (4, 4), (2, 2)
    level = np.zeros((4, LEVELS), np.float32)
    level[:, 0] = 0.5
    recent = np.array([[64 * 0.6 * 16, 16], [64 * 0.4 * 16, 16], [0, 0], [1e9, 16]], np.float32)
    nothing = np.zeros((0, 5), np.float32)
    ranks = Ranks(kind, level, recent, np.zeros((4, 0), np.float32), nothing, nothing, np.zeros(0, np.float32))
    aged = np.full((4, 2), 3, np.uint8)
    ranks.age(aged, np.ones(4, bool))
    # Important, unimportant, not observed, no ladder.
    assert aged.tolist() == [[4, 4], [2, 2], [3, 3], [3, 3]]


def attended(importance: float, target: float) -> Packed:
    """64 new tokens whose keys the following queries like (or not), aged behind a prompt."""
    random = np.random.default_rng(0)
    packed = compress_prompt(inputs(s=1000, layers=1), Policy(target_ratio=target))
    (layer,) = packed.layers
    direction = np.ones(D, np.float32)
    for count in range(64 + 80):
        keys = rows(random, H) * 0.1 + (importance if count < 64 else 0.0) * direction
        queries = rows(random, 2 * H) * 0.1 + direction
        layer.append_attend(queries, keys, rows(random, H), scale=D**-0.5)
    return packed


def test_what_new_tokens_gather_decides_their_bits() -> None:
    classes = []
    for importance in (2.0, -2.0):
        packed = attended(importance, 5.5)
        layer = packed.layers[0]
        assert layer.ranks is not None and (layer.ranks.kind[:, 1, 0] > 0).all(), "the plan used several classes"
        page = layer.table[np.arange(len(layer.lists)), layer.lists[:, TAIL_PAGE] - 1].view(PAGE)
        classes.append(np.stack([page["k_bits"], page["v_bits"]], 1))
        richest, leanest = (
            layer.ranks.kind[:, 0],
            layer.ranks.kind[np.arange(4), (layer.ranks.kind[:, :, 0] > 0).sum(1) - 1],
        )
        assert (classes[-1] == (richest if importance > 0 else leanest)).all()
    assert (classes[0].sum(1) > classes[1].sum(1)).all()


def test_fixed_bits_have_no_ranks() -> None:
    packed = compress_prompt(inputs(), Policy(k_bits=4, v_bits=2))
    assert all(layer.ranks is None and (layer.aged == (4, 2)).all() for layer in packed.layers)


@pytest.mark.parametrize("decode", ["grow", "hold"])
def test_what_is_remembered_is_planned_for(decode: Any) -> None:
    for layer in compress_prompt(inputs(s=1000), Policy(target_ratio=5, decode=decode)).layers:
        ranks = layer.ranks
        assert ranks is not None and ranks.worth.itemsize == WORTH_BYTES
        assert ranks.nbytes == len(layer.lists) * list_bytes(decode == "hold") + ranks.worth.nbytes


# ---- held budgets


@pytest.mark.parametrize("policy", [
    Policy(target_ratio=5, decode="hold"),
    Policy(target_ratio=6, decode="hold", sinks=4, window=32, stochastic=True),
    Policy(target_ratio=5, decode="hold", scale_dtype="e5m3", zero_point=False, prefill="layerwise", decay=0.0),
    Policy(target_ratio=5, decode="hold", rotation=Rotation.random(LAYERS, H, D), granularity="head"),
], ids=["auto", "sinks", "e5m3 layerwise", "rotated"])  # fmt: skip
def test_a_budget_is_held(policy: Policy) -> None:
    random = np.random.default_rng(1)
    packed = compress_prompt(inputs(s=1000), policy)
    assert packed.hold_bytes is not None and packed.nbytes <= packed.hold_bytes
    for _ in range(400):
        assert all(np.isfinite(out).all() for out in step(packed, random))
    check_state(packed)
    check_tails(packed, policy.kept_window, np.full(B, 1000))
    assert packed.nbytes > 0.8 * packed.hold_bytes, "what is allowed is used"
    if policy.sinks:
        for layer in packed.layers:
            at = [np.flatnonzero(np.isinf(row)) for row in layer.ranks.worth]  # type: ignore[union-attr]
            assert all(len(places) == 1 for places in at), "sinks stay"
    for q in (5, 64, 150):
        step(packed, random, q)
    check_state(packed)


def test_bits_never_rise_and_halves_that_keep_their_bits_keep_their_bytes() -> None:
    policy = Policy(fraction=0.6, decode="hold", classes=((8, 8), (8, 2)), guard=0.0)
    packed = compress_prompt(inputs(s=1000), policy)

    def tokens_at(pair: tuple[int, int]) -> int:
        return sum(layer.bits_histogram().get(pair, 0) for layer in packed.layers)

    before, rich, tokens = [layer.unpack() for layer in packed.layers], tokens_at((8, 8)), [
        layer.tokens.copy() for layer in packed.layers
    ]  # fmt: skip
    packed.hold_bytes = packed.nbytes * 8 // 10
    make_room(packed, 0)
    assert packed.nbytes <= packed.hold_bytes
    check_state(packed)
    assert 0 < tokens_at((8, 8)) < rich and tokens_at((8, 2)) > 0
    for layer, (keys, values), count in zip(packed.layers, before, tokens, strict=True):
        assert (layer.tokens == count).all(), "bits were enough, nothing was evicted"
        now = layer.unpack()
        np.testing.assert_array_equal(now[0], keys)
        assert set(layer.bits_histogram()) <= {(16, 16), (8, 8), (8, 2)} and not np.array_equal(now[1], values)


def test_least_important_pages_go_first() -> None:
    """Importance 1 or 1e-6, page by page: after holding half of the bytes, what mattered is there."""
    s, d = 1024, 64
    random = np.random.default_rng(3)
    important = np.zeros(s, bool)
    important[random.choice(s, 256, replace=False)] = True
    keys, values = (random.standard_normal((1, 1, s, d)).astype(np.float32) for _ in range(2))
    values[0, 0, important, 0] = 9  # marks them
    importance = np.where(important, 1.0, 1e-6).astype(np.float32)[None, None]
    policy = Policy(budget_bytes=80_000, decode="hold", classes=((4, 4),), rotation="none", scale="minmax")
    packed = compress_prompt([LayerInput(keys, values, importance=importance)], policy)
    (layer,) = packed.layers
    assert int((layer.unpack()[1][0, 0, :, 0] > 5).sum()) == 256
    kept = int(layer.lists[0, TOKENS])
    packed.hold_bytes = packed.nbytes // 2
    make_room(packed, 0)
    assert int(layer.lists[0, TOKENS]) < kept
    assert int((layer.unpack()[1][0, 0, :, 0] > 5).sum()) == 256


def test_a_budget_below_what_tails_need_is_refused_or_said() -> None:
    policy = Policy(target_ratio=9, decode="hold")
    with pytest.raises(
        BudgetError, match=r"^plan: budget: expected at least \d+ bytes \(a ratio of [\d.]+ or less\), got \d+ bytes$"
    ) as caught:
        compress_prompt(inputs(), policy)
    packed = compress_prompt(inputs(), policy, least_if_over=True)
    assert packed.report.over_budget and packed.hold_bytes is not None and packed.hold_bytes >= caught.value.least_bytes
    random = np.random.default_rng(0)
    for _ in range(200):
        step(packed, random)
    check_state(packed)


def test_room_that_cannot_be_made_is_an_error_and_leaves_a_sound_cache() -> None:
    packed = compress_prompt(inputs(s=1000), Policy(target_ratio=5, decode="hold"))
    before = [layer.lists[:, TOKENS].copy() for layer in packed.layers]
    packed.hold_bytes = 1000
    sentence = r"^append: budget: expected at least \d+ bytes, which tails and pages that stay take, got 1000 bytes$"
    with pytest.raises(BudgetError, match=sentence) as caught:
        step(packed, np.random.default_rng(0))
    assert 1000 < caught.value.least_bytes <= packed.nbytes
    check_state(packed)
    for layer, tokens in zip(packed.layers, before, strict=True):
        assert (layer.lists[:, TOKENS] == tokens).all() and (layer.lists[:, TAIL_TOKENS] > 0).all()


def test_refused_rows_change_nothing() -> None:
    packed = compress_prompt(inputs(s=1000), Policy(target_ratio=5, decode="hold"))
    layer = packed.layers[0]
    packed.hold_bytes = packed.nbytes  # the next page needs room
    table, lists, nbytes = layer.table.copy(), layer.lists.copy(), packed.nbytes
    bad = np.full((B, H, 1, D), np.nan, np.float32)
    with pytest.raises(ValueError, match="append: keys: expected finite values"):
        for _ in range(20):
            layer.append_attend(np.zeros((B, 2 * H, 1, D), np.float32), bad, bad, scale=1.0,
                                make_room=lambda n: make_room(packed, n))  # fmt: skip
    assert (layer.table == table).all() and (layer.lists == lists).all() and packed.nbytes == nbytes


def test_padded_sequences_that_get_nothing_keep_their_worth() -> None:
    random = np.random.default_rng(5)
    packed = compress_prompt(inputs(s=1000), Policy(target_ratio=5, decode="hold"))
    layer = packed.layers[0]
    assert layer.ranks is not None
    valid = np.array([0, 1])
    for _ in range(60):
        worth = layer.ranks.worth[:H].copy()
        layer.append_attend(rows(random, 2 * H), rows(random, H), rows(random, H), scale=D**-0.5, valid=valid)
        np.testing.assert_array_equal(layer.ranks.worth[:H, : worth.shape[1]], worth)


def test_beams_share_a_budget_by_sequence() -> None:
    packed = compress_prompt(inputs(s=1000), Policy(target_ratio=5, decode="hold"))
    for layer in packed.layers:
        layer.select(np.array([1, 1, 0]))
        assert len(layer.aged) == len(layer.lists) == 3 * H
        assert layer.ranks is not None and layer.ranks.worth.shape == layer.table.shape
        assert len(layer.ranks.drop) == len(layer.ranks.kind) == 3 * H
    check_state(packed)
