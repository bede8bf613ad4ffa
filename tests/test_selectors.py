"""Selectors, allocators and rotations through compress_prompt: the property that defines each, against plain NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kvcomp import (
    H2O,
    AdaKV,
    BudgetError,
    Full,
    Hybrid,
    KeyNorm,
    Policy,
    PyramidKV,
    Random,
    Rotation,
    SnapKV,
    Streaming,
)
from kvcomp.hold import make_room
from kvcomp.layer_input import LayerInput
from kvcomp.measure import importance_of
from kvcomp.packed import Packed
from kvcomp.prompt import compress_prompt
from kvcomp.store import PAGES
from reference import Array
from test_prompt import LAYERS, B, D, H, S, bf16_bytes, check_bytes, check_contents, inputs

EVERYTHING = Policy(budget_bytes=1 << 30)


def kept(packed: Packed) -> list[list[list[int]]]:
    """Tokens kept, in order, by layer and list."""
    assert packed.positions is not None
    return [
        [sorted(part.tolist()) for part in np.split(places, np.cumsum(layer.tokens)[:-1])]
        for layer, places in zip(packed.layers, packed.positions, strict=True)
    ]


def choose(layers: list[LayerInput], select: Any, **fields: Any) -> list[list[list[int]]]:
    return kept(compress_prompt(layers, Policy(bits=16, select=select, **fields), positions=True))


def attention(layer: LayerInput, window: int) -> Array:
    """(b, h, window, s) attention of the last queries, the mean of a KV head's query heads."""
    b, h, s, d = layer.shape
    keys = np.repeat(layer.keys.astype(np.float64), layer.queries.shape[1] // h, 1)
    logits = layer.queries[:, :, -window:].astype(np.float64) @ keys.swapaxes(2, 3) / np.sqrt(d)
    logits[..., np.arange(s) > np.arange(s - window, s)[:, None]] = -np.inf
    weights = np.exp(logits - logits.max(3, keepdims=True))
    weights /= weights.sum(3, keepdims=True)
    return np.asarray(weights.reshape(b, h, -1, window, s).mean(2))


def best(importance: Array, count: int) -> list[list[int]]:
    """The `count` most important tokens of every list."""
    flat = importance.reshape(-1, importance.shape[-1])
    return [sorted(np.argsort(-row, kind="stable")[:count].tolist()) for row in flat]


def norm(rows: Array, *, centered: bool = False) -> Array:
    rows = rows.astype(np.float64)
    return np.asarray(np.linalg.norm(rows - (rows.mean(2, keepdims=True) if centered else 0), axis=3))


# ---- which tokens


def test_h2o_takes_what_all_queries_attend_to() -> None:
    layers = inputs(window=S)
    found = choose(layers, H2O(keep=0.5))
    for layer, lists in zip(layers, found, strict=True):
        seen_by = S - np.arange(S)
        assert lists == best(attention(layer, S).sum(2) / seen_by, S // 2)
    pooled = choose(layers, H2O(keep=0.5, pool=5, pool_kind="max"))
    assert pooled != found and all(len(one) == S // 2 for lists in pooled for one in lists)


@pytest.mark.parametrize("window", [1, 32, S - 1])
def test_h2o_needs_all_queries(window: int) -> None:
    sentence = rf"^compress: queries: expected those of all {S} tokens for H2O, got {window}$"
    for policy in (Policy(target_ratio=4, select=H2O()), Policy(bits=4, select=H2O(keep=0.5))):
        with pytest.raises(ValueError, match=sentence):
            compress_prompt(inputs(window=window), policy)


def test_key_norm_takes_the_smallest_keys() -> None:
    layers = inputs()
    for layer in layers:
        layer.queries = None
    found = choose(layers, KeyNorm(keep=0.3))
    for layer, lists in zip(layers, found, strict=True):
        assert lists == best(-norm(layer.keys), round(0.3 * S))


@pytest.mark.parametrize("values", ["none", "norm", "centered"])
def test_values_weigh_importance(values: Any) -> None:
    """Values of one large mean: their norms say little, what they differ from it by says which of them matter."""
    layers = inputs(window=S)
    random = np.random.default_rng(7)
    for layer in layers:
        layer.values = (layer.values * random.lognormal(size=(B, H, S, 1)) + 5).astype(np.float32)
    for select, measured in (
        (Full(keep=0.4, values=values), lambda layer: attention(layer, 32).mean(2)),
        (H2O(keep=0.4, values=values), lambda layer: attention(layer, S).sum(2) / (S - np.arange(S))),
        (KeyNorm(keep=0.4, values=values), lambda layer: 1 / norm(layer.keys)),
    ):
        found = choose(layers, select)
        for layer, lists in zip(layers, found, strict=True):
            weight = {
                "none": 1.0,
                "norm": norm(layer.values),
                "centered": norm(layer.values, centered=True),
            }[values]
            assert lists == best(measured(layer) * weight, round(0.4 * S))


def test_random_is_reproducible_by_its_seed() -> None:
    layers = inputs()
    for layer in layers:
        layer.queries = None
    one, again, other = (choose(layers, Random(keep=0.5), seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    lists = [tuple(tokens) for layer in one for tokens in layer]
    assert len(set(lists)) == len(lists) == LAYERS * B * H, "every list draws for itself"
    counts = np.bincount(np.concatenate([np.array(tokens) for tokens in lists]), minlength=S)
    assert all(len(tokens) == S // 2 for tokens in lists) and 3 <= counts.mean() <= 9 and counts.std() < 2.5


# ---- AdaKV


def uneven(seed: int = 0) -> list[LayerInput]:
    """The second head attends to everything alike, the first one to a sixteenth of the tokens."""
    layers = inputs(seed)
    for layer in layers:
        layer.keys[:, 1] *= 0.05
        layer.keys[:, 0] *= 1.5
    return layers


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("sinks, window", [(0, 0), (4, 16)])
def test_ada_shares_a_layers_tokens_over_its_heads(safeguard: float, sinks: int, window: int) -> None:
    layers, keep = uneven(), 0.25
    share = round(keep * S)
    select = AdaKV(keep=keep, safeguard=safeguard, pool=1)
    found = choose(layers, select, sinks=sinks, window=window)
    floor = max(int(safeguard * share), min(sinks + window, share))
    must = [*range(sinks), *range(S - window, S)]
    for index, (layer, lists) in enumerate(zip(layers, found, strict=True)):
        importance = importance_of(layer, Policy(target_ratio=4, select=select), index)
        np.testing.assert_allclose(importance, attention(layer, 32).mean(2), rtol=1e-3, atol=1e-7)
        importance[..., must] = np.inf
        for b in range(B):
            chosen = {(h, t) for h in range(H) for t in best(importance[b, h], floor)[0]}
            rest = sorted((-importance[b, h, t], h, t) for h in range(H) for t in range(S) if (h, t) not in chosen)
            chosen |= {(h, t) for _, h, t in rest[: share * H - len(chosen)]}
            assert {(h, t) for h in range(H) for t in lists[b * H + h]} == chosen
            counts = [len(lists[b * H + h]) for h in range(H)]
            assert sum(counts) == share * H and min(counts) >= floor
            if safeguard < 0.5:
                assert counts[0] != counts[1], "heads that differ get different counts"
    if safeguard == 1:
        snap = choose(layers, SnapKV(keep=keep, pool=1), sinks=sinks, window=window)
        assert snap == found, "nothing is left to share out"


def test_uneven_heads_free_real_bytes() -> None:
    """Lists take what they keep: as many bytes as as many tokens shared out evenly, and a head's follow its count."""
    layers = [LayerInput(x.keys, x.values, x.queries) for x in inputs(s=2000)]
    for layer in layers:
        layer.keys[:, 1] *= 0.05
    whole = compress_prompt(layers, Policy(bits=4))
    ada = compress_prompt(layers, Policy(bits=4, select=AdaKV(keep=0.25)))
    snap = compress_prompt(layers, Policy(bits=4, select=SnapKV(keep=0.25)))
    assert ada.nbytes < 0.4 * whole.nbytes and abs(ada.nbytes - snap.nbytes) < 0.15 * snap.nbytes
    assert ada.report.kept_per_layer == snap.report.kept_per_layer == [0.25] * LAYERS
    for layer in ada.layers:
        counts = layer.tokens.reshape(B, H)
        assert (counts.max(1) > 1.2 * counts.min(1)).all()
        pages = layer.lists[:, PAGES]
        assert (np.abs(pages - layer.tokens / 64) <= 5).all()
    check_bytes(ada)


# ---- how a budget is spent


@pytest.mark.parametrize(
    "select", [None, SnapKV(), AdaKV(), H2O(), KeyNorm(), Random(), Streaming(), PyramidKV(keep=0.5), Hybrid(keep=0.5)],
    ids=lambda select: type(select).__name__,
)  # fmt: skip
@pytest.mark.parametrize("ratio", [3.0, 7.0, 12.0])
def test_uniform_has_one_class_besides_16_bit_tails(select: Any, ratio: float) -> None:
    layers = inputs(s=1000, window=1000)
    policy = Policy(target_ratio=ratio, select=select, allocate="uniform", sinks=2)
    packed = compress_prompt(layers, policy, positions=True)
    assert bf16_bytes(layers) / ratio * 0.8 <= packed.nbytes <= bf16_bytes(layers) / ratio
    check_bytes(packed)
    check_contents(packed, layers, np.zeros(B, np.int32), policy)
    classes = [name for name in packed.report.tokens_per_class if name != "16/16"]
    assert len(classes) == 1
    assert packed.report.tokens_per_class["16/16"] <= LAYERS * B * H * (64 + 2 + policy.kept_window)
    if ratio == 12.0:
        assert classes == ["2/2"] and packed.report.kept_fraction < 1
    if ratio == 3.0 and getattr(select, "keep", None) is None:
        assert packed.report.kept_fraction == 1 and classes != ["2/2"]


def test_uniform_keeps_what_the_selector_ranks_first() -> None:
    layers = inputs(s=1000, window=1000)
    packed = compress_prompt(layers, Policy(target_ratio=14, allocate="uniform", select=H2O()), positions=True)
    for layer, lists in zip(layers, kept(packed), strict=True):
        (count,) = {len(tokens) for tokens in lists}
        assert 100 < count < 900
        assert lists == best(attention(layer, 1000).sum(2) / (1000 - np.arange(1000)), count)


def test_uniform_with_more_bytes_has_more_bits() -> None:
    bits = [
        compress_prompt(inputs(s=1000), Policy(target_ratio=ratio, allocate="uniform")).report
        for ratio in (1.5, 2.0, 3.0, 4.0, 5.0, 6.5, 9.0)
    ]
    held = [report.bits_per_element * report.kept_fraction for report in bits]
    assert held == sorted(held, reverse=True)


def test_every_head_has_bits_of_its_own() -> None:
    """Values of the first head are 8 times as large: it gets more bits, all tokens of it alike."""
    layers = inputs(s=1000)
    for layer in layers:
        layer.values[:, 0] *= 8
    packed = compress_prompt(layers, Policy(target_ratio=4, granularity="head"))
    assert packed.nbytes <= bf16_bytes(layers) / 4 and packed.report.kept_fraction == 1
    for layer in packed.layers:
        bits = []
        for i in range(len(layer.lists)):
            entries = layer.table[i, : layer.lists[i, PAGES]].view(layer.entries().dtype)
            classes = {(int(e["k_bits"]), int(e["v_bits"])) for e in entries} - {(16, 16)}
            assert len(classes) == 1
            bits.append(sum(classes.pop()))
        assert all(bits[2 * b] > bits[2 * b + 1] for b in range(B))


def test_every_layer_has_bits_of_its_own() -> None:
    layers = inputs(s=1000)
    layers[1].values *= 8
    for prefill in ("joint", "layerwise"):
        packed = compress_prompt(layers, Policy(target_ratio=4, granularity="layer", prefill=prefill))  # type: ignore[arg-type]
        assert packed.nbytes <= bf16_bytes(layers) / 4 and packed.report.kept_fraction == 1
        bits = []
        for layer in packed.layers:
            classes = {pair for pair in layer.bits_histogram() if pair != (16, 16)}
            assert len(classes) == 1
            bits.append(sum(classes.pop()))
        assert bits[1] > bits[0] == bits[2] if prefill == "joint" else len(set(bits)) == 1


@pytest.mark.parametrize("fields", [{"drop": False}, {"granularity": "head"}, {"granularity": "layer"}])
@pytest.mark.parametrize("select", [None, SnapKV(keep=0.5), AdaKV(keep=0.5)], ids=["all", "snap", "ada"])
def test_nothing_is_dropped(fields: dict[str, Any], select: Any) -> None:
    layers = inputs(s=1000)
    for ratio in (2.0, 4.0, 5.0):
        packed = compress_prompt(layers, Policy(target_ratio=ratio, select=select, **fields))
        assert packed.nbytes <= bf16_bytes(layers) / ratio
        assert packed.report.kept_per_layer == [1.0 if select is None else 0.5] * LAYERS
    with pytest.raises(BudgetError) as caught:
        compress_prompt(layers, Policy(target_ratio=30, select=select, **fields))
    least = caught.value.least_bytes
    packed = compress_prompt(layers, Policy(budget_bytes=least, select=select, **fields))
    assert packed.nbytes == least and packed.report.kept_per_layer == [1.0 if select is None else 0.5] * LAYERS


def test_a_plan_told_that_newer_is_more_important() -> None:
    packed = compress_prompt(inputs(s=1000), Policy(target_ratio=9, allocate="position"), positions=True)
    assert packed.positions is not None
    for layer, places in zip(packed.layers, packed.positions, strict=True):
        entries = layer.entries()
        bits = np.repeat(entries["k_bits"].astype(int) + entries["v_bits"], entries["tokens"])
        assert np.corrcoef(bits, places)[0, 1] > 0.2
        ends = np.cumsum(layer.tokens)
        for tokens in np.split(places, ends[:-1]):
            assert sorted(tokens.tolist()) == list(range(1000 - len(tokens), 1000)), "the oldest go first"


def test_a_plan_told_random_importance() -> None:
    policies = [Policy(target_ratio=9, allocate="random", seed=seed) for seed in (1, 1, 2)]
    one, again, other = (kept(compress_prompt(inputs(s=1000), policy, positions=True)) for policy in policies)
    assert one == again != other
    dropped = [set(range(1000)) - set(tokens) for layer in one for tokens in layer]
    assert min(map(len, dropped)) > 50
    assert all(abs(np.mean(list(tokens)) - 492) < 100 for tokens in dropped), "no part of the prompt is spared"


def test_steps_of_8_bits_take_half_the_bytes() -> None:
    packs = {name: compress_prompt(inputs(s=1000), Policy(bits=3, scale_dtype=name)) for name in ("fp16", "e5m3")}  # type: ignore[arg-type]
    ledgers = {name: packed.ledger() for name, packed in packs.items()}
    assert 2 * ledgers["e5m3"]["scales"] == ledgers["fp16"]["scales"] > 0
    assert packs["e5m3"].nbytes < packs["fp16"].nbytes
    source = inputs(s=1000)
    errors = {name: error(packed, source) for name, packed in packs.items()}
    assert errors["fp16"] < errors["e5m3"] < 1.05 * errors["fp16"]


@pytest.mark.parametrize("classes", [(), ((16, 16),), ((8, 8),), ((16, 4),), ((2, 16), (3, 8))])
@pytest.mark.parametrize("allocate", ["plan", "uniform"])
@pytest.mark.parametrize("s", [30, 600])
def test_no_token_ever_has_other_bits_than_the_policy_allows(classes: Any, allocate: Any, s: int) -> None:
    """New tokens take one of its classes too, where the prompt was so short that none of it was packed."""
    packed = compress_prompt(inputs(s=s), Policy(target_ratio=1.2, classes=classes, allocate=allocate))
    random = np.random.default_rng(0)
    for layer in packed.layers:
        new = random.standard_normal((B, H, 150, D)).astype(np.float32)
        layer.append_attend(np.repeat(new, 2, 1), new, new, scale=0.1)
        assert set(layer.bits_histogram()) <= {*classes, (16, 16)}
        if any(min(pair) < 16 for pair in classes):
            assert len(layer.bits_histogram()) > 1


# ---- rotations


def error(packed: Packed, layers: list[LayerInput], part: int = 1) -> float:
    """Mean squared error of stored values (or keys), relative, where all tokens were kept in order."""
    total = size = 0.0
    for layer, source in zip(packed.layers, layers, strict=True):
        exact = np.asarray((source.keys, source.values)[part], np.float64)
        total += ((layer.unpack()[part] - exact) ** 2).sum()
        size += (exact**2).sum()
    return total / size


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_a_rotation_gives_back_what_it_was_given(kind: Any) -> None:
    """At 16 bits: rows rounded after rotation, and rotated back, are within the 16-bit type's rounding."""
    layers = inputs(kind=kind)
    packed = compress_prompt(layers, replace(EVERYTHING, rotation=Rotation.random(LAYERS, H, D)))
    assert packed.report.tokens_per_class == {"16/16": LAYERS * B * H * S}
    step = 2.0**-11 if kind is np.float32 else 2.0**-8
    for layer, source in zip(packed.layers, layers, strict=True):
        for stored, given in zip(layer.unpack(), (source.keys, source.values), strict=True):
            exact = np.asarray(given, np.float64)
            lengths = np.linalg.norm(exact, axis=3, keepdims=True)
            assert (np.linalg.norm(stored - exact, axis=3, keepdims=True) <= step * lengths).all()
            assert not np.array_equal(stored, exact)
    plain = compress_prompt(layers, Policy(bits=16, rotation=Rotation.random(LAYERS, H, D)))
    half = np.float16 if kind is np.float32 else kind
    for layer, source in zip(plain.layers, layers, strict=True):  # fixed 16 bits are stored as they are
        assert np.array_equal(layer.unpack()[0], source.keys.astype(half).astype(np.float32))


def attended(layers: list[LayerInput], policy: Policy) -> Array:
    """Outputs of four new tokens, all layers, after 30 others."""
    random, out = np.random.default_rng(3), []
    packed = compress_prompt(layers, policy)
    for layer in packed.layers:
        for q in (30, 4):
            queries = random.standard_normal((B, 2 * H, q, D)).astype(np.float32)
            keys, values = (random.standard_normal((B, H, q, D)).astype(np.float32) for _ in range(2))
            last = layer.append_attend(queries, keys, values, scale=D**-0.5)
        out.append(last)
    return np.stack(out)


def test_attention_over_rotated_rows() -> None:
    """Queries turn with the keys, outputs turn back: 16 bits to within their rounding, 4 bits to within Hadamard's."""
    layers, rotation = inputs(), Rotation.random(LAYERS, H, D, seed=5)
    exact = attended(layers, Policy(bits=16))
    turned = attended(layers, replace(EVERYTHING, rotation=rotation))
    assert np.abs(turned - exact).max() <= 2e-3 * np.abs(exact).max()
    errors = [
        ((attended(layers, Policy(bits=4, rotation=kind)) - exact) ** 2).mean()  # type: ignore[arg-type]
        for kind in ("hadamard", rotation)
    ]
    assert 0.5 * errors[0] <= errors[1] <= 1.25 * errors[0] and errors[1] > 10 * ((turned - exact) ** 2).mean()


def test_every_layer_and_head_turns_by_its_own_matrix() -> None:
    """The identity in all heads but one: those are as without rotation, that one is not."""
    keys, values = (np.tile(np.eye(D, dtype=np.float32), (LAYERS, H, 1, 1)) for _ in range(2))
    keys[1, 1] = Rotation.random(1, 1, D).keys[0][0]
    policy = Policy(bits=3, rotation="none", scale="minmax")
    plain = compress_prompt(inputs(), policy)
    packed = compress_prompt(inputs(), replace(policy, rotation=Rotation(list(keys), list(values))))
    for index, (layer, other) in enumerate(zip(packed.layers, plain.layers, strict=True)):
        assert np.array_equal(layer.unpack()[1], other.unpack()[1])
        for head in range(H):
            same = np.array_equal(layer.unpack()[0][:, head], other.unpack()[0][:, head])
            assert same == ((index, head) != (1, 1))


def test_calibrated_rotations_concentrate() -> None:
    """Rows along two strong directions of their own in every head: at 2 bits a fifth less than Hadamard's error."""
    random, layers = np.random.default_rng(0), inputs(s=1024)
    for layer in layers:
        for h in range(H):
            strong = random.standard_normal((D, D)) * np.where(np.arange(D) < 2, 8, 0.3)[:, None]
            for rows in (layer.keys, layer.values):
                rows[:, h] = (random.standard_normal((B, 1024, D)) @ strong).astype(np.float32)
    moments = [
        [np.einsum("bhsd,bhse->hde", rows.astype(np.float64), rows) for rows in (layer.keys, layer.values)]
        for layer in layers
    ]
    rotation = Rotation.calibrated([k for k, _ in moments], [v for _, v in moments])
    for part in (0, 1):
        plain, calibrated = (
            error(compress_prompt(layers, Policy(bits=2, rotation=kind)), layers, part)  # type: ignore[arg-type]
            for kind in ("hadamard", rotation)
        )
        assert calibrated < 0.8 * plain
    ratio = compress_prompt(layers, Policy(target_ratio=6, rotation=rotation))
    assert ratio.nbytes <= bf16_bytes(layers) / 6


@pytest.mark.parametrize("sizes", [(LAYERS - 1, H, D), (LAYERS, H + 1, D), (LAYERS, 1, D), (LAYERS, H, 128)])
@pytest.mark.parametrize("budget", [{"bits": 4}, {"target_ratio": 4}])
def test_rotations_of_another_model(sizes: tuple[int, int, int], budget: dict[str, Any]) -> None:
    sentence = (
        rf"^compress: rotation: expected matrices of {LAYERS} layers, {H} heads and {D} channels, got "
        rf"Rotation\({sizes[0]} layers, {sizes[1]} heads, {sizes[2]} channels, sha256 [0-9a-f]{{16}}\)$"
    )
    for prefill in ("joint", "layerwise"):
        with pytest.raises(ValueError, match=sentence):
            compress_prompt(inputs(), Policy(**budget, rotation=Rotation.random(*sizes), prefill=prefill))  # type: ignore[arg-type]


def test_matrices_that_are_no_rotations() -> None:
    eye = np.tile(np.eye(D), (H, 1, 1))
    skew = eye.copy()
    skew[1, 0, 1] = 0.1
    for bad in (skew, 1.1 * eye, eye * np.nan, 0 * eye):
        for keys, values, name in (([bad], [eye], "keys"), ([eye], [bad], "values")):
            with pytest.raises(
                ValueError, match=rf"^rotation: {name}: expected orthogonal matrices, got R R\^T up to "
            ):
                Rotation(keys, values)
    for bad in (eye[0], eye[:, :5], np.zeros((0, D, D))):
        with pytest.raises(ValueError, match=r"^rotation: keys: expected matrices \(h, d, d\) for layer 0, got shape"):
            Rotation([bad], [eye])
    with pytest.raises(
        ValueError, match=r"^rotation: values: expected matrices \(h, d, d\) for every layer, got none$"
    ):
        Rotation([eye], [])
    with pytest.raises(ValueError, match=r"^rotation: values: expected as many matrices of the same sizes as keys"):
        Rotation([eye, eye], [eye])
    with pytest.raises(ValueError, match=r"^rotation: moment: expected \(h, d, d\) for every layer, d a power of two"):
        Rotation.calibrated([np.zeros((H, 80, 80))], [np.zeros((H, 80, 80))])
    with pytest.raises(ValueError, match=r"^rotation: moment: expected finite numbers, got NaN or Inf$"):
        Rotation.calibrated([np.full((H, D, D), np.nan)], [eye])
    Rotation([eye.astype(ml_dtypes.bfloat16)], [eye.astype(np.float16)])


# ---- hardly any tokens

ALL = {
    "none": {},
    "ada": {"select": AdaKV(keep=0.5)},
    "h2o": {"select": H2O(keep=0.5)},
    "key norm": {"select": KeyNorm(keep=0.5, values="centered")},
    "random": {"select": Random(keep=0.5)},
    "streaming": {"select": Streaming()},
    "pyramid": {"select": PyramidKV()},
    "uniform": {"allocate": "uniform", "select": AdaKV()},
    "head": {"granularity": "head"},
    "drop": {"drop": False},
    "layerwise": {"prefill": "layerwise"},
    "hold": {"decode": "hold"},
    "layerwise hold": {"decode": "hold", "prefill": "layerwise", "layer_weights": (1, 2)},
    "rotated": {"rotation": Rotation.random(2, H, D)},
    "e5m3": {"scale_dtype": "e5m3"},
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("b, s", [(0, 0), (0, 40), (2, 0), (2, 1), (1, 2)])
def test_empty_batches_and_prompts(name: str, b: int, s: int) -> None:
    """Nothing, or next to nothing, is held; what comes later is attended to."""
    layers = [
        LayerInput(layer.keys[:b, :, :s], layer.values[:b, :, :s], layer.queries[:b, :, :s])
        for layer in inputs(s=40, window=40, layers=2)
    ]
    budgets: list[dict[str, Any]] = [{"budget_bytes": 1 << 20}]
    budgets += [{"bits": 4}] if name in ("none", "ada", "h2o", "layerwise", "rotated", "e5m3") else []
    for budget in budgets:
        packed = compress_prompt(layers, Policy(**budget, **ALL[name]))
        assert packed.nbytes <= (0 if b == 0 else 1 << 19)
        assert packed.report.prompt_tokens == b * s
        tokens = [layer.tokens.copy() for layer in packed.layers]
        assert all((each <= s).all() for each in tokens)
        room = None if packed.hold_bytes is None else lambda nbytes, packed=packed: make_room(packed, nbytes)
        new = np.random.default_rng(0).standard_normal((b, H, 150, D)).astype(np.float32)
        for layer, before in zip(packed.layers, tokens, strict=True):
            for part in (slice(0, 1), slice(1, 2), slice(2, 150)):
                rows = new[:, :, part]
                out = layer.append_attend(np.repeat(rows, 2, 1), rows, rows, scale=0.1, make_room=room)
                assert np.isfinite(out).all()
            assert (layer.tokens == before + 150).all()
        assert sum(packed.ledger().values()) == packed.nbytes


@pytest.mark.parametrize("name", ALL)
def test_padding_among_the_last_queries_may_hold_anything(name: str) -> None:
    """A sequence of ten real tokens, and one of none: what lies before them is not looked at."""
    first = np.array([S - 10, S], np.int32)
    budget = {"budget_bytes": 1 << 18}
    found = []
    for dirt in (0.0, np.nan, np.inf):
        layers = inputs(first=first, window=S, layers=2)
        for layer in layers:
            for rows in (layer.keys, layer.values, layer.queries):
                rows[0, :, :-10] = dirt
                rows[1] = dirt
        with np.errstate(invalid="ignore"):
            packed = compress_prompt(layers, Policy(**budget, **ALL[name]))
        assert (packed.layers[0].tokens[H:] == 0).all()
        found.append((packed.nbytes, *(part.tobytes() for layer in packed.layers for part in layer.unpack())))
    assert found[0] == found[1] == found[2]
