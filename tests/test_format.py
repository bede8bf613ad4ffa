"""format.h: sizes of pages, and that the index functions say what the text above them says."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kvcomp import _C
from reference import (
    BITS,
    CLASSES,
    E5M3,
    E5M3_VALUES,
    FP16,
    GROUPS,
    HEAD_DIMS,
    VECTORS,
    Layout,
    code_places,
    half_bytes,
    page_bytes,
    page_tokens,
    stored,
    to_e5m3,
)

SOURCES = Path(__file__).parents[1] / "csrc"

# Every place by the functions: word, shift and, at 3 bits, the high bit's; and the way back.
PROGRAM = r"""
#include <stdio.h>
#include "kvcomp/format.h"
int main(void) {
    static const int bits[] = {2, 3, 4, 8, 16, 16}, rooms[] = {64, 64, 64, 64, 64, 16};
    int back = 1;
    for (int i = 0; i < 6; i++)
        for (int value = 0; value < 2; value++)
            for (int token = 0; token < rooms[i]; token++)
                for (int channel = 0; channel < DIM; channel++) {
                    const kvc_place p = value ? kvc_place_v(token, channel) : kvc_place_k(token, channel);
                    const int w = kvc_code_word(bits[i], rooms[i], p.tile, p.element);
                    printf("%d %d ", kvc_word_index(bits[i], rooms[i], p.channel_tile, p.lane, w),
                           kvc_code_shift(bits[i], p.tile, p.element));
                    if (bits[i] == 3)
                        printf("%d %d ", kvc_word_index(bits[i], rooms[i], p.channel_tile, p.lane, 2),
                               kvc_code_high_shift(p.tile, p.element));
                    const int t = value ? kvc_v_token(p.lane, p.element) : kvc_k_token(p.lane, p.element);
                    const int c = value ? kvc_v_channel(p.lane, p.element) : kvc_k_channel(p.lane, p.element);
                    back = back && 16 * p.tile + t == token && 16 * p.channel_tile + c == channel;
                }
    printf("%d\n", back);
}
"""


@pytest.mark.parametrize("bits, room", VECTORS)
@pytest.mark.parametrize("is_value", [False, True])
def test_every_bit_of_a_half_is_used_once(bits: int, room: int, is_value: bool) -> None:
    """The text of format.h fills words without gaps and without overlap."""
    for head_dim in HEAD_DIMS:
        places = code_places(bits, room, head_dim, is_value).reshape(-1, 4)
        used = np.concatenate([32 * word + bit + np.arange(width) for word, bit, width, _ in places])
        assert len(used) == room * head_dim * bits == len(np.unique(used))
        assert used.min() == 0 and used.max() == room * head_dim * bits - 1


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("head_dim", [80, 256])
def test_index_functions(head_dim: int, tmp_path: Path) -> None:
    (tmp_path / "places.c").write_text(PROGRAM)
    command = ["cc", "-std=c11", "-fsanitize=undefined", "-fno-sanitize-recover", f"-DDIM={head_dim}", "-I", SOURCES]
    subprocess.run([*command, tmp_path / "places.c", "-o", tmp_path / "places"], check=True)
    result = subprocess.run([tmp_path / "places"], capture_output=True, text=True, check=True).stdout.split()
    expected = [
        code_places(bits, room, head_dim, is_value)[..., :2].reshape(-1)
        for bits, room in VECTORS
        for is_value in (False, True)
    ]
    assert np.array_equal(np.array(result[:-1], np.int64), np.concatenate(expected))
    assert result[-1] == "1", "kvc_[kv]_(token|channel) is not the way back"


@pytest.mark.parametrize("head_dim, group", GROUPS)
def test_page_sizes(head_dim: int, group: int) -> None:
    for zero_point, scale_dtype in itertools.product((0, 1), (FP16, E5M3)):
        layout = Layout(head_dim, group, zero_point, 1, scale_dtype)
        for k_bits, v_bits in CLASSES:
            room = page_tokens(k_bits, v_bits)
            assert _C.page_tokens(k_bits, v_bits) == room
            assert _C.page_bytes(layout, k_bits, v_bits) == page_bytes(layout, k_bits, v_bits)
            assert _C.page_bytes(layout, k_bits, v_bits) % 128 == 0
            scales = half_bytes(layout, k_bits, room)[1] + half_bytes(layout, v_bits, room)[1]
            assert _C.scale_bytes(layout, k_bits, v_bits) == scales
            assert sum(half_bytes(layout, k_bits, room)) % 64 == 0, "where V begins"


def test_a_page_costs_what_its_bits_cost() -> None:
    """128 channels, one scale and zero a token: 2 bits and 4 bytes a half, 2 of E5M3; nothing is padded."""
    layout, small = Layout(128, 128, 1, 1), Layout(128, 128, 1, 1, E5M3)
    assert _C.page_bytes(layout, 2, 2) == 64 * (2 * 128 * 2 // 8 + 8)
    assert _C.page_bytes(layout, 4, 2) == 64 * (128 * 4 // 8 + 128 * 2 // 8 + 8)
    assert _C.page_bytes(layout, 16, 16) == _C.page_bytes(small, 16, 16) == 16 * 2 * 128 * 2
    assert _C.page_bytes(small, 2, 2) == 64 * (2 * 128 * 2 // 8 + 4)
    assert _C.page_bytes(small._replace(zero_point=0), 2, 2) == 64 * (2 * 128 * 2 // 8 + 2)
    assert _C.page_bytes(small._replace(group=16), 4, 2) == 64 * (128 * 4 // 8 + 128 * 2 // 8 + 2 * 8 * 2)


def test_one_lone_half_of_scales_is_padded() -> None:
    """64 bytes of scales beside 16-bit rows: the page ends half a unit later."""
    layout = Layout(80, 80, 0, 1, E5M3)
    assert _C.scale_bytes(layout, 16, 2) == 64
    assert _C.page_bytes(layout, 16, 2) == 64 * (80 * 2 + 80 * 2 // 8 + 1) + 64


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 9, 15])
def test_other_bits_are_refused(bits: int) -> None:
    expected = "expected 2, 3, 4, 8 or 16, got|expected an integer in 2..16, got"
    for arguments, name in (((bits, 4), "k_bits"), ((4, bits), "v_bits")):
        with pytest.raises(ValueError, match=rf"^page_tokens: {name}: ({expected}) {bits}$"):
            _C.page_tokens(*arguments)
        with pytest.raises(ValueError, match=rf"^page_bytes: {name}: ({expected}) {bits}$"):
            _C.page_bytes((64, 64, 1, 1, 0), *arguments)


@pytest.mark.parametrize(
    "layout, error, sentence",
    [
        ((72, 72, 1, 1, 0), NotImplementedError, "head_dim: expected 64, 80, 96, 128 or 256, got 72"),
        ((512, 64, 1, 1, 0), NotImplementedError, "head_dim: expected 64, 80, 96, 128 or 256, got 512"),
        ((128, 48, 1, 1, 0), ValueError, "group: expected a divisor of head_dim 128 that is a multiple of 16, got 48"),
        ((64, 8, 1, 1, 0), ValueError, "group: expected a divisor of head_dim 64 that is a multiple of 16, got 8"),
        ((64, 0, 1, 1, 0), ValueError, "group: expected a divisor of head_dim 64 that is a multiple of 16, got 0"),
        ((64, 64, 2, 1, 0), ValueError, "zero_point: expected 0 or 1, got 2"),
        ((64, 64, 1, 0, 0), ValueError, r"half: expected float16 \(1\) or bfloat16 \(2\), got 0"),
        (
            (64, 64, 1, 1),
            TypeError,
            r"layout: expected a tuple \(head_dim, group, zero_point, half, scale_dtype\), got tuple",
        ),
        (
            [64, 64, 1, 1, 0],
            TypeError,
            r"layout: expected a tuple \(head_dim, group, zero_point, half, scale_dtype\), got list",
        ),
        ((64, 64, 1, "1", 0), TypeError, "layout: expected an integer, got str"),
        ((64, 64, 1, -1, 0), ValueError, "layout: expected an integer in 0..1048576, got -1"),
        ((64, 64, 1, 1, 2), ValueError, r"scale_dtype: expected 0 \(fp16\) or 1 \(e5m3\), got 2"),
    ],
)
def test_other_layouts_are_refused(layout: tuple[int, ...], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"^page_bytes: {sentence}$"):
        _C.page_bytes(layout, 4, 4)


def test_bits_are_in_order() -> None:
    assert [_C.page_bytes((128, 64, 1, 2, 0), b, b) for b in BITS[:4]] == sorted(
        _C.page_bytes((128, 64, 1, 2, 0), b, b) for b in BITS[:4]
    )


# ---- E5M3: the functions of format.h and pack.h, compiled alone

E5M3_LIBRARY = r"""
#include "kvcomp/pack.h"
uint32_t encode(float scale) { return kvc_float_to_e5m3(scale); }
float decode(uint32_t code) { return kvc_e5m3_to_float(code); }
uint32_t rounded(float *pair, int bits) {
    kvc_e5m3_round(pair, pair + 1, bits);
    return kvc_e5m3_pair(pair[0], pair[1]);
}
float zero(float scale, uint32_t byte) { return kvc_e5m3_zero(scale, byte); }
"""


@pytest.fixture(scope="module")
def e5m3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("e5m3")
    (folder / "e5m3.c").write_text(E5M3_LIBRARY)
    command = ["cc", "-std=c11", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-I", SOURCES, folder / "e5m3.c"]
    subprocess.run([*command, "-o", folder / "e5m3.so"], check=True)
    library = ctypes.CDLL(str(folder / "e5m3.so"))
    library.encode.argtypes, library.encode.restype = [ctypes.c_float], ctypes.c_uint32
    library.decode.argtypes, library.decode.restype = [ctypes.c_uint32], ctypes.c_float
    library.zero.argtypes, library.zero.restype = [ctypes.c_float, ctypes.c_uint32], ctypes.c_float
    return library


def float32(number: float) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(number)


SCALES = st.floats(0, float("inf"), width=32) | st.floats(0, 2.0**-13, width=32) | st.floats(0, 1e5, width=32)
ZEROS = (
    st.floats(-(2.0**97), 2.0**97, width=32)
    | st.floats(-(2.0**-10), 2.0**-10, width=32)
    | st.floats(-1e6, 1e6, width=32)
)


def test_every_e5m3_code_comes_back(e5m3: Any) -> None:
    values = [e5m3.decode(code) for code in range(248)]
    assert values == E5M3_VALUES.tolist() == sorted(set(values))
    assert values[0] == 0 and values[1] == 2.0**-17 and values[8] == 2.0**-14 and values[247] == 61440
    assert [e5m3.encode(value) for value in values] == list(range(248))


def test_e5m3_ties_go_to_even_codes(e5m3: Any) -> None:
    middles = ((E5M3_VALUES[1:] + E5M3_VALUES[:-1]) / 2).astype(np.float32)
    for code, middle in enumerate(middles.tolist()):
        assert e5m3.encode(middle) == code + code % 2
        assert e5m3.encode(float(np.nextafter(np.float32(middle), np.float32(0)))) == code
        assert e5m3.encode(float(np.nextafter(np.float32(middle), np.float32(1e9)))) == code + 1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SCALES)
@example(-0.0)
@example(2.0**-149)
@example(61440.0)
@example(float(np.nextafter(np.float32(2.0**-14), np.float32(0))))
@example(65504.0)
@example(3.4e38)
def test_e5m3_is_the_nearest(e5m3: Any, scale: float) -> None:
    code = e5m3.encode(scale)
    assert code == to_e5m3(np.array([min(scale, 1e9)]))[0] <= 247
    assert abs(e5m3.decode(code) - min(scale, 61440)) <= np.abs(E5M3_VALUES - min(scale, 61440)).min()


@settings(max_examples=500, deadline=None, derandomize=True)
@given(SCALES, ZEROS)
@example(0.0, 0.0)
@example(-0.0, -0.0)
@example(0.0, 2.0**-18)
@example(0.0, float(np.nextafter(np.float32(2.0**-18), np.float32(1))))
@example(1.0, 15.875)
@example(1.0, -16.0)
@example(1.0, 17.0)
@example(float("inf"), -1e30)
def test_e5m3_scale_and_zero(e5m3: Any, scale: float, zero: float) -> None:
    """pack.h's text: the reference's pair; bytes that give it back; a zero within a sixteenth of a step."""
    for bits in 4, 8:
        pair = (ctypes.c_float * 2)(scale, zero)
        raw = e5m3.rounded(pair, bits)
        expected = stored(np.array([float32(scale)]), np.array([float32(zero)]), E5M3, bits)
        assert pair[0] == expected[0][0] and pair[1] == expected[1][0]
        assert e5m3.decode(raw & 255) == pair[0] and e5m3.zero(pair[0], raw >> 8) == pair[1]
        if pair[0] < 61440:
            assert abs(pair[1] - zero) <= max(pair[0] / 16, 2.0**-18) * (1 + 1e-6)
        own = e5m3.decode(e5m3.encode(scale)) if bits < 8 else scale * 1.125 + 2.0**-17
        assert pair[0] <= max(own, abs(zero) / 15.875 * 1.125 + 2.0**-17)
        assert pair[0] >= (min(scale, 61440) if bits == 8 else e5m3.decode(e5m3.encode(scale)))
