"""format.h: sizes of pages, and that the index functions say what the text above them says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from kvcomp import _C
from reference import (
    BITS,
    CLASSES,
    GROUPS,
    HEAD_DIMS,
    VECTORS,
    Layout,
    code_places,
    half_bytes,
    page_bytes,
    page_tokens,
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
    for zero_point in (0, 1):
        layout = Layout(head_dim, group, zero_point, 1)
        for k_bits, v_bits in CLASSES:
            room = page_tokens(k_bits, v_bits)
            assert _C.page_tokens(k_bits, v_bits) == room
            assert _C.page_bytes(layout, k_bits, v_bits) == page_bytes(layout, k_bits, v_bits)
            assert _C.page_bytes(layout, k_bits, v_bits) % 128 == 0
            scales = half_bytes(layout, k_bits, room)[1] + half_bytes(layout, v_bits, room)[1]
            assert _C.scale_bytes(layout, k_bits, v_bits) == scales


def test_a_page_costs_what_its_bits_cost() -> None:
    """128 channels, one scale and zero a token: 2 bits and 4 bytes a half; nothing is padded."""
    layout = Layout(128, 128, 1, 1)
    assert _C.page_bytes(layout, 2, 2) == 64 * (2 * 128 * 2 // 8 + 8)
    assert _C.page_bytes(layout, 4, 2) == 64 * (128 * 4 // 8 + 128 * 2 // 8 + 8)
    assert _C.page_bytes(layout, 16, 16) == 16 * 2 * 128 * 2


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 9, 15])
def test_other_bits_are_refused(bits: int) -> None:
    expected = "expected 2, 3, 4, 8 or 16, got|expected an integer in 2..16, got"
    for arguments, name in (((bits, 4), "k_bits"), ((4, bits), "v_bits")):
        with pytest.raises(ValueError, match=rf"^page_tokens: {name}: ({expected}) {bits}$"):
            _C.page_tokens(*arguments)
        with pytest.raises(ValueError, match=rf"^page_bytes: {name}: ({expected}) {bits}$"):
            _C.page_bytes((64, 64, 1, 1), *arguments)


@pytest.mark.parametrize(
    "layout, error, sentence",
    [
        ((72, 72, 1, 1), NotImplementedError, "head_dim: expected 64, 80, 96, 128 or 256, got 72"),
        ((512, 64, 1, 1), NotImplementedError, "head_dim: expected 64, 80, 96, 128 or 256, got 512"),
        ((128, 48, 1, 1), ValueError, "group: expected a divisor of head_dim 128 that is a multiple of 16, got 48"),
        ((64, 8, 1, 1), ValueError, "group: expected a divisor of head_dim 64 that is a multiple of 16, got 8"),
        ((64, 0, 1, 1), ValueError, "group: expected a divisor of head_dim 64 that is a multiple of 16, got 0"),
        ((64, 64, 2, 1), ValueError, "zero_point: expected 0 or 1, got 2"),
        ((64, 64, 1, 0), ValueError, r"half: expected float16 \(1\) or bfloat16 \(2\), got 0"),
        ((64, 64, 1), TypeError, r"layout: expected a tuple \(head_dim, group, zero_point, half\), got tuple"),
        ([64, 64, 1, 1], TypeError, r"layout: expected a tuple \(head_dim, group, zero_point, half\), got list"),
        ((64, 64, 1, "1"), TypeError, "layout: expected an integer, got str"),
        ((64, 64, 1, -1), ValueError, "layout: expected an integer in 0..1048576, got -1"),
    ],
)
def test_other_layouts_are_refused(layout: tuple[int, ...], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"^page_bytes: {sentence}$"):
        _C.page_bytes(layout, 4, 4)


def test_bits_are_in_order() -> None:
    assert [_C.page_bytes((128, 64, 1, 2), b, b) for b in BITS[:4]] == sorted(
        _C.page_bytes((128, 64, 1, 2), b, b) for b in BITS[:4]
    )
