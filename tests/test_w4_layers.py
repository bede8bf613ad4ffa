"""kvcomp.w4: the seed's functions on weights, SharedScaleLinear, and the operation that torch.compile takes.

The first 18 tests are the properties that the seed checked of its own functions.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from kvcomp.w4 import (  # noqa: E402
    SharedScaleLinear,
    dequantize_weights,
    quant_error,
    quantize_scale,
    quantize_weights,
)
from kvcomp.w4 import library as w4_library  # noqa: E402
from kvcomp.w4 import weights as w4_weights  # noqa: E402

G = 128
FORMATS = [(128, -1), (128, 0), (128, 5), (64, 3), (32, 3), (32, 10)]


def normal(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(k: int = 256, n: int = 128, bias: bool = True, seed: int = 0, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Linear(k, n, bias=bias, dtype=dtype)


def round_trip(w: torch.Tensor, mbits: int, group: int = G, **more: Any) -> dict[str, float]:
    packed, scales = quantize_weights(w, group, mbits, **more)
    return quant_error(w, dequantize_weights(packed, scales, group), group)


# ---- the seed's properties


def test_exact_scales_pass_through() -> None:
    s = normal(16).abs() + 0.01
    assert torch.equal(quantize_scale(s, -1), s)


def test_scales_without_mantissa_are_powers_of_two() -> None:
    exponents = torch.log2(quantize_scale(torch.tensor([0.3, 1.7, 5.5, 0.01, 100.0]), 0))
    assert torch.equal(exponents, exponents.round())


def test_more_mantissa_bits_round_scales_better() -> None:
    s = normal(512).abs() + 0.01
    errors = [float((quantize_scale(s, bits) - s).square().mean()) for bits in (0, 3, 5, 14)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


def test_positive_scales_stay_positive() -> None:
    for bits in (0, 3, 5):
        assert (quantize_scale(torch.tensor([0.5, 1.0, 2.0, 4.0]), bits) > 0).all()


def test_scales_keep_their_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert quantize_scale(torch.tensor([1.5, 0.25], dtype=dtype), 3).dtype == dtype


def test_shapes() -> None:
    w = normal(64, 256)
    packed, scales = quantize_weights(w, G, scale_mbits=5)
    assert packed.shape == (64, 128) and scales.shape == (64, 2)
    assert dequantize_weights(packed, scales, G).shape == w.shape


def test_packed_is_uint8() -> None:
    assert quantize_weights(normal(64, 256), G, 5)[0].dtype == torch.uint8


def test_scales_are_float32() -> None:
    assert quantize_weights(normal(64, 256), G, 5)[1].dtype == torch.float32


def test_relative_error_is_what_four_bits_cost() -> None:
    assert 0.01 < round_trip(normal(128, 512) * 0.1, 5)["rel_mse"] < 0.025


def test_cosine_is_high() -> None:
    assert round_trip(normal(128, 512) * 0.1, 5)["cosine_sim"] > 0.99


def test_error_rises_as_mantissa_bits_fall() -> None:
    # With many groups of every size: the seed's floor then loses most, and five bits all but nothing.
    w = normal(512, 512) * torch.exp2(normal(512, 1, seed=1))
    errors = {bits: round_trip(w, bits)["rel_mse"] for bits in (0, 3, 5)}
    assert errors[0] > 1.2 * errors[3] and errors[3] >= 0.999 * errors[5]


def test_zero_weights_stay_zero() -> None:
    packed, scales = quantize_weights(torch.zeros(64, G), G, 5)
    assert not dequantize_weights(packed, scales, G).any() and not packed.any()


def test_outlier() -> None:
    w = normal(64, 256) * 0.1
    w[0, 0] = 1e6
    packed, scales = quantize_weights(w, G, 5)
    near = dequantize_weights(packed, scales, G)
    assert near.shape == w.shape and abs(float(near[0, 0]) / 1e6 - 1) < 0.02
    # Groups without it keep their own scale, down to the end of its range.
    assert quant_error(w[1:], near[1:], G)["rel_mse"] < 0.1


def test_exact_scales_are_the_textbook_formula() -> None:
    w = normal(8, G) * 0.1
    packed, scales = quantize_weights(w, G, -1)
    s = w.abs().amax(1, keepdim=True) / 7
    assert torch.equal(scales, s)
    assert torch.equal(dequantize_weights(packed, scales, G), (w / s).round().clamp(-8, 7) * s)


def test_layer_shape() -> None:
    assert SharedScaleLinear.from_linear(linear(), G, 5)(normal(4, 256)).shape == (4, 128)


def test_layer_is_close_to_the_linear_it_was_made_of() -> None:
    plain, x = linear(bias=False), normal(4, 256)
    made = SharedScaleLinear.from_linear(plain, G, 5)
    assert (plain(x) - made(x)).norm() / plain(x).norm() < 0.12


def test_mantissa_bits_make_a_difference() -> None:
    plain, x = linear(bias=False), normal(4, 256)
    without, five = (SharedScaleLinear.from_linear(plain, G, bits)(x) for bits in (0, 5))
    assert not torch.allclose(without, five)


def test_repr_names_the_format() -> None:
    assert "scale_mbits=3" in repr(SharedScaleLinear.from_linear(linear(), G, 3))
    assert "group_size=32" in repr(SharedScaleLinear.from_linear(linear(), 32, 3))


# ---- scales


def test_scale_values() -> None:
    s = torch.tensor([0.3, 1.7, -5.5, 0.0, 100.0])
    assert quantize_scale(s, 0).tolist() == [0.25, 1.0, -4.0, 0.0, 64.0]
    assert quantize_scale(s, 0, rounding="nearest").tolist() == [0.25, 2.0, -4.0, 0.0, 128.0]
    assert quantize_scale(s, 2).tolist() == [0.3125, 1.75, -6.0, 0.0, 96.0]
    assert quantize_scale(s, 2, rounding="floor").tolist() == [0.25, 1.5, -5.0, 0.0, 96.0]
    assert quantize_scale(torch.tensor([1.96875]), 3).tolist() == [2.0]  # carries into the exponent


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 10])
def test_range_of_scales(bits: int) -> None:
    top = (2 - 2.0**-bits) * 2.0**15
    least = 2.0 ** (-14 - bits)
    s = torch.tensor([1e9, top, least, least * 0.49, 1e-30])
    assert quantize_scale(s, bits, rounding="nearest").tolist() == [top, top, least, 0.0, 0.0]
    moved = quantize_scale(s * 2.0**-20, bits, rounding="nearest", exponent=-20)
    assert moved.tolist() == [top * 2.0**-20, top * 2.0**-20, least * 2.0**-20, 0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(2.0**-12, 2.0**14, width=32), min_size=2, max_size=20),
    st.integers(0, 14),
    st.sampled_from(["floor", "nearest"]),
)
def test_scales_are_monotone_idempotent_and_close(values: list[float], bits: int, rounding: str) -> None:
    s = torch.tensor(sorted(values))
    rounded = quantize_scale(s, bits, rounding=rounding)
    assert (rounded[1:] >= rounded[:-1]).all()
    assert torch.equal(quantize_scale(rounded, bits, rounding=rounding), rounded)
    relative = (rounded - s) / s
    most = 2.0 ** -(bits + (rounding == "nearest"))
    assert float(relative.abs().max()) <= most
    if rounding == "floor":
        assert float(relative.max()) <= 0


def test_any_shape_and_stride() -> None:
    s = normal(6, 8).abs()
    assert torch.equal(quantize_scale(s.T, 3), quantize_scale(s, 3).T)
    assert quantize_scale(s[0, 0], 3).shape == ()
    assert quantize_scale(s[:0], 3).shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((torch.ones(2), 15), ValueError, "quantize_scale: scale_mbits: expected -1 (exact) or 0 to 14, got 15"),
        ((torch.ones(2), -2), ValueError, "scale_mbits"),
        ((torch.ones(2), True), ValueError, "scale_mbits"),
        ((torch.ones(2, dtype=torch.int32), 3), TypeError, "quantize_scale: s: expected a tensor of floats"),
        ((1.5, 3), TypeError, "got float"),
        ((torch.tensor([torch.nan]), 3), ValueError, "finite"),
        ((torch.tensor([torch.inf]), 3), ValueError, "finite"),
    ],
)
def test_scales_refused(arguments: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        quantize_scale(*arguments)
    assert said in str(caught.value)


def test_rounding_refused() -> None:
    with pytest.raises(ValueError, match="rounding: expected one of floor, nearest, search, got 'ceil'"):
        quantize_scale(torch.ones(2), 3, rounding="ceil")
    with pytest.raises(ValueError, match="looks at weights"):
        quantize_scale(torch.ones(2), 3, rounding="search")


# ---- weights


def test_nibbles() -> None:
    w = torch.zeros(1, 32)
    w[0, :4] = torch.tensor([7.0, -7.0, 1.0, -1.0])
    packed, scales = quantize_weights(w, 32, 5)
    assert scales.tolist() == [[1.0]]
    assert packed[0, :3].tolist() == [7 | 9 << 4, 1 | 15 << 4, 0]


@pytest.mark.parametrize(("group", "mbits"), [*FORMATS, (16, 5), (256, 3), (128, 12), (64, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_format(group: int, mbits: int, dtype: Any) -> None:
    w = normal(33, 512, dtype=dtype) * 0.02
    packed, scales = quantize_weights(w, group, mbits)
    near = dequantize_weights(packed, scales, group)
    assert near.dtype == torch.float32 and (scales > 0).all()
    assert quant_error(w, near, group)["rel_mse"] < 0.03
    # What is read back is coded as it was.
    again = quantize_weights(near, group, mbits)
    assert quant_error(near, dequantize_weights(*again, group), group)["rel_mse"] < 0.03


@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1.0, 1e9, 1e30])
@pytest.mark.parametrize("mbits", [-1, 0, 3, 5, 12])
def test_weights_of_any_size(magnitude: float, mbits: int) -> None:
    w = normal(8, 256) * magnitude
    assert round_trip(w / magnitude, mbits)["rel_mse"] == pytest.approx(
        round_trip(w.double() / magnitude, mbits)["rel_mse"], rel=1e-3
    )
    packed, scales = quantize_weights(w, G, mbits)
    near = dequantize_weights(packed, scales, G).double() / magnitude
    assert float((near - w.double() / magnitude).square().mean()) < 0.03


@pytest.mark.parametrize("power", [-160, -126, -40, -9, -1, 0, 1, 30, 120])
def test_exponents_are_few_and_large_enough(power: int) -> None:
    for largest in (7 * 2.0**power, 7 * 1.999 * 2.0**power):
        exponent = w4_weights.exponent_for(largest)
        assert exponent % 8 == 0 and abs(exponent) <= 120
        if -100 < power < 100:  # two to nine binades below 2^16 times it
            assert 2 <= 15 + exponent - power <= 9
    assert [w4_weights.exponent_for(x) for x in (0.0, float("inf"), float("nan"))] == [0, 0, 0]


def test_search_loses_least_and_floor_most() -> None:
    w = normal(256, 512)
    for mbits in (0, 3, 5):
        floor, nearest, search = (
            round_trip(w, mbits, rounding=how)["rel_mse"] for how in ("floor", "nearest", "search")
        )
        assert search < nearest and search < floor
    assert round_trip(w, 0, rounding="floor")["rel_mse"] > round_trip(w, 0, rounding="nearest")["rel_mse"]


def test_small_groups_with_search_halve_the_error() -> None:
    """The claim: at least 40 % less than groups of 128 with exact scales, in at most 4.29 bits."""
    w = normal(256, 1024)
    layer = torch.nn.Linear(1024, 256, bias=False)
    layer.weight = torch.nn.Parameter(w)
    made = SharedScaleLinear.from_linear(layer, 32, 3, rounding="search")
    assert made.bits_per_weight <= 4.29
    assert quant_error(w, made.dequantize(), 128)["rel_mse"] <= 0.6 * round_trip(w, -1)["rel_mse"]


@pytest.mark.parametrize("mbits", [3, 5])
def test_compressed_scales_lose_less_than_a_percent(mbits: int) -> None:
    w = normal(1024, 1024)
    assert round_trip(w, mbits)["rel_mse"] == pytest.approx(round_trip(w, -1)["rel_mse"], rel=0.01)


@pytest.mark.parametrize(("group", "mbits"), [f for f in FORMATS if f[1] >= 0])
def test_layers_hold_the_same_codes(group: int, mbits: int) -> None:
    plain = linear(512, 70, seed=3)
    how = "floor" if mbits == 0 else "nearest"
    made = SharedScaleLinear.from_linear(plain, group, mbits, rounding=how)
    packed, scales = quantize_weights(plain.weight, group, mbits)
    assert torch.equal(made.dequantize(), dequantize_weights(packed, scales, group))


def test_quant_error() -> None:
    w = normal(4, 256)
    assert quant_error(w, w, G) == {"rel_mse": 0.0, "max_rel_mse": 0.0, "cosine_sim": pytest.approx(1.0)}
    assert quant_error(w, torch.zeros_like(w), G) == pytest.approx(
        {"rel_mse": 1.0, "max_rel_mse": 1.0, "cosine_sim": 0.0}
    )
    one = w.clone()
    one[0, :G] = 0
    found = quant_error(w, one, G)
    assert found["max_rel_mse"] == pytest.approx(1.0) and found["rel_mse"] == pytest.approx(1 / 8)
    small = 1e-8 * w  # as large a part of them
    assert quant_error(small, 1.1 * small, G)["rel_mse"] == pytest.approx(0.01, rel=1e-4)
    zeros = torch.zeros(2, 256)
    assert quant_error(zeros, zeros, G) == {"rel_mse": 0.0, "max_rel_mse": 0.0, "cosine_sim": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: quantize_weights(normal(4, 100), 32, 5), ValueError, "expected a divisor of 100 columns, got 32"),
        (lambda: quantize_weights(normal(4, 128), 0, 5), ValueError, "group_size"),
        (lambda: quantize_weights(normal(4, 9), 3, 5), ValueError, "even number of columns"),
        (lambda: quantize_weights(normal(4), 4, 5), TypeError, "quantize_weights: w: expected a matrix"),
        (lambda: quantize_weights(normal(4, 128), 128, 15), ValueError, "scale_mbits"),
        (lambda: quantize_weights(torch.full((1, 128), torch.nan), 128, 5), ValueError, "finite"),
        (lambda: quantize_weights(torch.full((1, 128), torch.inf), 128, -1), ValueError, "finite"),
        (lambda: quantize_weights(normal(4, 128), 16, 5, rounding="search"), ValueError, "groups of 16"),
        (
            lambda: dequantize_weights(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2), 128),
            ValueError,
            "dequantize_weights: scales: expected (2, 1), got (2, 2)",
        ),
        (lambda: dequantize_weights(normal(2, 64), torch.ones(2, 1), 128), TypeError, "expected a matrix of uint8"),
        (lambda: quant_error(normal(2, 128), normal(2, 64), 128), ValueError, "w_hat"),
        (lambda: quant_error(normal(0, 128), normal(0, 128), 128), ValueError, "w: expected one element or more"),
        (lambda: SharedScaleLinear(32, 8, 32)(torch.tensor(1.0)), ValueError, "x: expected (..., 32), got ()"),
        (lambda: SharedScaleLinear.from_linear(torch.nn.Linear(32, 8, device="meta"), 32), ValueError, "device meta"),
    ],
)
def test_weights_refused(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert said in str(caught.value)


# ---- the layer


@pytest.mark.parametrize(("group", "mbits"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layer_multiplies_what_it_holds(group: int, mbits: int, dtype: Any) -> None:
    plain = linear(300, 70, dtype=dtype)  # tails of both
    made = SharedScaleLinear.from_linear(plain, group, mbits)
    held = made.dequantize().double()
    for rows in (1, 3, 40):
        x = normal(rows, 300, dtype=dtype)
        exact = x.double() @ held.T + plain.bias.double()
        size = x.double().abs() @ held.abs().T
        unit = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        with torch.no_grad():
            out = made(x)
        assert out.dtype == dtype
        assert bool(((out.double() - exact).abs() <= 2.0**-18 * size + unit * exact.abs() + 2.0**-24).all())


def test_layer_takes_any_shape_of_x() -> None:
    made = SharedScaleLinear.from_linear(linear(256, 128), G, 5)
    x = normal(6, 256)
    flat = made(x)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(made(x[0]), flat[0], **close)
    torch.testing.assert_close(made(x.view(2, 3, 256)), flat.view(2, 3, 128), **close)
    torch.testing.assert_close(made(x[::2]), flat[::2], **close)
    torch.testing.assert_close(made(x.T.contiguous().T), flat, **close)
    assert made(x[:0]).shape == (0, 128)
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 256\), got \(6, 100\)"):
        made(x[:, :100])


def test_layer_counts_its_bytes() -> None:
    made = SharedScaleLinear.from_linear(linear(4096, 128), 128, 5)
    assert made.bits_per_weight == 8 * made.weight.nbytes / (4096 * 128) == 4 + 10 / 128
    assert SharedScaleLinear.from_linear(linear(4096, 128), 32, 3).bits_per_weight == 4 + 8 / 32
    assert SharedScaleLinear.from_linear(linear(4096, 128), 128, 0).bits_per_weight == 4 + 5 / 128
    assert SharedScaleLinear.from_linear(linear(4096, 128), 128, -1).bits_per_weight == 4 + 16 / 128
    # The float weights are gone.
    assert sum(part.nbytes for part in made.state_dict().values()) == made.weight.nbytes + 4 * 128 + 12


def test_layer_is_saved_and_loaded_with_its_exponent() -> None:
    plain = linear(256, 128)
    with torch.no_grad():
        plain.weight.mul_(1e-4)
    made = SharedScaleLinear.from_linear(plain, G, 5)
    assert made.exponent != 0
    other = SharedScaleLinear(256, 128, G, 5)
    other.load_state_dict(made.state_dict())
    x = normal(2, 256)
    assert torch.equal(other(x), made(x)) and other.exponent == made.exponent
    assert torch.equal(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize("state", [None, [3], [3, 128, -1], [3, 64, 3, 1], [121, 64, 3]])
def test_a_state_of_another_format_changes_nothing(state: list[int] | None) -> None:
    """Groups of 64 with E5M3 and groups of 128 with fp16 take as many bytes."""
    made, other = (SharedScaleLinear.from_linear(linear(256, 128, seed=s), 64, 3) for s in (1, 2))
    held = made.state_dict()
    if state is None:
        del held["_extra_state"]
    else:
        held["_extra_state"] = torch.tensor(state, dtype=torch.int32)
    before = other.dequantize()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"SharedScaleLinear: _extra_state: expected"):
            other.load_state_dict(held, strict=strict)
    assert torch.equal(other.dequantize(), before)


def test_a_layer_whose_exponent_was_not_read_is_refused() -> None:
    made = SharedScaleLinear(256, 128)
    made.exponent = None
    for call in (lambda: made(normal(2, 256)), made.dequantize):
        with pytest.raises(ValueError, match="_extra_state: expected to be loaded with the weight, got none"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_up_to_the_range_of_sums(dtype: Any) -> None:
    """Sums are kept without 2^exponent: finite below 2^(127 + exponent), and said to be."""
    made = SharedScaleLinear.from_linear(linear(256, 128, bias=False, dtype=dtype), G, 5)
    assert made.exponent is not None
    held = made.dequantize().double()
    x = torch.zeros(1, 256, dtype=dtype)
    x[0, 0] = 1
    size = float((held @ x.double().T).abs().max())
    x *= 2.0 ** (126 + made.exponent) / size
    with torch.no_grad():
        out = made(x)
    assert out.isfinite().all() and float(out.double().abs().max()) > 2.0 ** (125 + made.exponent)
    assert "|x| |W|^T >= 2^(127 + exponent)" in str(SharedScaleLinear.__doc__)


def test_an_empty_layer_is_zeros() -> None:
    assert not SharedScaleLinear(256, 128, bias=False)(normal(2, 256)).any()


def test_layer_leaves_what_it_was_made_of_alone() -> None:
    plain = linear(256, 128)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    made = SharedScaleLinear.from_linear(plain.eval(), G, 5)
    with torch.no_grad():
        made.bias.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not made.training and not made.bias.requires_grad


def test_no_gradients() -> None:
    made = SharedScaleLinear.from_linear(linear(), G, 5)
    x = normal(2, 256).requires_grad_()
    with pytest.raises(NotImplementedError, match="SharedScaleLinear: x: expected one without gradients"):
        made(x)
    with torch.no_grad():
        made(x)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: SharedScaleLinear(256, 128, 100), ValueError, "group_size: expected one of 32, 64, 128, got 100"),
        (lambda: SharedScaleLinear(256, 128, 128, 11), ValueError, "scale_mbits: expected -1 (exact) or 0 to 10"),
        (lambda: SharedScaleLinear(0, 128), ValueError, "in_features: expected 1 or more, got 0"),
        (lambda: SharedScaleLinear.from_linear(torch.nn.ReLU()), TypeError, "expected an nn.Linear, got ReLU"),
        (lambda: SharedScaleLinear.from_linear(linear(), rounding="ceil"), ValueError, "rounding"),
    ],
)
def test_layer_refused(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert said in str(caught.value)


def test_weights_that_are_not_finite_are_refused() -> None:
    plain = linear()
    with torch.no_grad():
        plain.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        SharedScaleLinear.from_linear(plain)


# ---- torch.compile


def test_operation_follows_torchs_rules() -> None:
    made = SharedScaleLinear.from_linear(linear(256, 70), G, 5)
    arguments = (normal(3, 256), made.weight, made.bias.detach(), 70, 256, G, 5, made.exponent)
    torch.library.opcheck(torch.ops.kvcomp.w4_linear.default, arguments)
    assert torch.equal(torch.ops.kvcomp.w4_linear(*arguments), made(arguments[0]))
    assert torch.equal(w4_library.linear(*arguments), made(arguments[0]))


def test_compiles_whole() -> None:
    made = torch.nn.Sequential(
        SharedScaleLinear.from_linear(linear(64, 96), 32, 3),
        torch.nn.SiLU(),
        SharedScaleLinear.from_linear(linear(96, 64), 32, 3),
    )
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for rows in (1, 2, 3):
        x = normal(rows, 64)
        with torch.no_grad():
            assert torch.allclose(compiled(x), made(x))


def test_autocast() -> None:
    """As nn.Linear: floats of 32 bits and fewer become the type that is asked for; compiled, too."""
    made, plain = SharedScaleLinear.from_linear(linear(64, 96), 32, 3), linear(64, 96)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = normal(3, 64).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = made(x)
            assert found.dtype == plain(x).dtype == torch.bfloat16
            assert torch.equal(compiled(x), found)
        with torch.no_grad():
            assert torch.equal(made(x.bfloat16()), found) and made(x).dtype == dtype
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        assert made(normal(3, 64)).dtype == torch.float32


def test_meta_tensors() -> None:
    with torch.device("meta"):
        made = SharedScaleLinear(256, 128)
    assert made(torch.empty(3, 256, device="meta")).shape == (3, 128)


def test_every_stream_and_every_recording_has_workspaces_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what kernels merge through must be filled, and no two that may run at once share it."""
    stream, recording = 0, 0
    for name in ("_workspaces", "_recorded", "_spare"):
        monkeypatch.setattr(w4_library, name, {})
    monkeypatch.setattr(w4_library, "_made", lambda device: torch.full((4,), 0xFF, dtype=torch.uint8))
    monkeypatch.setattr(w4_library, "_recording", lambda stream: recording)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording > 0)

    def taken() -> Any:
        found = w4_library._workspace(0)
        assert found is w4_library._workspace(0)
        return found

    recording = 1
    with pytest.raises(RuntimeError, match="w4_linear: x: expected a call on this device before a graph is recorded"):
        taken()
    recording = 0
    first = taken()
    stream = 5
    recording = 2
    graph = taken()  # a stream without a call before
    stream = 6
    branch = taken()  # a branch of the same recording
    stream, recording = 5, 0
    own = taken()
    recording = 3
    other = taken()  # recorded on the same stream, after a call on it
    recording = 4
    last = taken()
    found = [first, graph, branch, own, other, last]
    assert all(one is not two for i, one in enumerate(found) for two in found[:i])
    recording = 5
    assert taken() is None  # without a call between: a part of the graph
    recording = 3
    assert taken() is other
    recording = 0
    assert taken() is own
    recording = 5
    fresh = taken()  # spares were made again
    assert fresh is not None and all(fresh is not one for one in found)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_layer_is_the_cpus(dtype: Any) -> None:
    made = SharedScaleLinear.from_linear(linear(1024, 500, dtype=dtype), G, 5)
    x = normal(20, 1024, dtype=dtype)
    expected = made(x).float()
    there = copy.deepcopy(made).cuda()
    for rows in (1, 5, 20):
        out = there(x[:rows].cuda()).float().cpu()
        assert (out - expected[:rows]).norm() / expected[:rows].norm() < 5e-3


@pytest.mark.gpu
def test_gpu_layer_in_a_graph_while_workspaces_grow() -> None:
    made = SharedScaleLinear.from_linear(linear(2048, 512, dtype=torch.float16), G, 5).cuda()
    x = normal(2, 2048, dtype=torch.float16).cuda()
    expected = made(x)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(expected)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out.copy_(made(x))
    for rows in (64, 512, 4096):
        made(normal(rows, 2048, dtype=torch.float16).cuda())
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gpu_graphs_are_replayed_at_the_same_time() -> None:
    """Beside each other and beside plain calls; the third is recorded without a call before, and the last has two
    branches."""
    made = SharedScaleLinear.from_linear(linear(2048, 512, dtype=torch.float16), G, 5).cuda()
    xs = [normal(2, 2048, dtype=torch.float16, seed=s).cuda() for s in range(6)]
    expected = [made(x) for x in xs]
    outs = [torch.empty_like(out) for out in expected]
    graphs = [torch.cuda.CUDAGraph() for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in range(5)]
    for i in range(3):
        with torch.cuda.graph(graphs[i], stream=streams[0]):
            outs[i].copy_(made(xs[i]))
    made(xs[0])
    with torch.cuda.graph(graphs[3], stream=streams[0]):
        streams[4].wait_stream(streams[0])
        with torch.cuda.stream(streams[4]):
            outs[4].copy_(made(xs[4]))
        outs[3].copy_(made(xs[3]))
        streams[0].wait_stream(streams[4])
    torch.cuda.synchronize()
    for _ in range(1000):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[4]):
            outs[5] = made(xs[5])
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out, want in zip(outs, expected, strict=True))


@pytest.mark.gpu
def test_gpu_layer_compiles() -> None:
    made = SharedScaleLinear.from_linear(linear(256, 128, dtype=torch.bfloat16), G, 5).cuda()
    compiled = torch.compile(made, fullgraph=True, mode="reduce-overhead")
    x = normal(2, 256, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        for _ in range(3):
            assert torch.allclose(compiled(x), made(x))


@pytest.mark.gpu
def test_gpu_functions_give_tensors_where_theirs_are() -> None:
    w = normal(8, 256).cuda()
    packed, scales = quantize_weights(w, G, 5)
    assert packed.is_cuda and scales.is_cuda and quantize_scale(scales, 3).is_cuda
    assert dequantize_weights(packed, scales, G).is_cuda
    assert torch.equal(packed.cpu(), quantize_weights(w.cpu(), G, 5)[0])
    made = SharedScaleLinear.from_linear(torch.nn.Linear(256, 128, device="cuda"), G, 5)
    assert made.weight.is_cuda and made.bias.is_cuda and made.dequantize().is_cuda


def test_formats_are_checked_in_one_place() -> None:
    with pytest.raises(ValueError, match="op: group_size"):
        w4_weights.check_format("op", 16, 5, "nearest")
