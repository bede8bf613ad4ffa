"""What the contracts say (csrc/kvcomp/*.h), in NumPy: pages byte for byte, attention in float64.

The order of codes is derived here from format.h's text alone, not from its index functions.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

BITS = (2, 3, 4, 8, 16)
CLASSES = [(k_bits, v_bits) for k_bits in BITS for v_bits in BITS]
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = [(d, group) for d in HEAD_DIMS for group in range(16, d + 1, 16) if d % group == 0]
FLOAT16, BFLOAT16 = 1, 2
SIGMA, MINMAX, SEARCH = range(3)
FP16, E5M3 = range(2)
UNIT = 128

# Words of one lane in one group of tiles, vector by vector.
VECTORS = {(2, 64): [2], (3, 64): [2, 1], (4, 64): [4], (8, 64): [4, 4], (16, 64): [4, 4, 4, 4], (16, 16): [4]}


class Layout(NamedTuple):
    head_dim: int
    group: int
    zero_point: int
    half: int
    scale_dtype: int = FP16


# ---- sizes


def page_tokens(k_bits: int, v_bits: int) -> int:
    return 16 if (k_bits, v_bits) == (16, 16) else 64


def half_bytes(layout: Layout, bits: int, room: int) -> tuple[int, int]:
    """Bytes of codes and of scales of K or V."""
    groups = layout.head_dim // layout.group
    pair = (2 if layout.zero_point else 1) * (1 if layout.scale_dtype == E5M3 else 2)
    return room * layout.head_dim * bits // 8, 0 if bits == 16 else room * groups * pair


def page_bytes(layout: Layout, k_bits: int, v_bits: int) -> int:
    room = page_tokens(k_bits, v_bits)
    used = sum(half_bytes(layout, k_bits, room)) + sum(half_bytes(layout, v_bits, room))
    return -(-used // UNIT) * UNIT


# ---- where codes lie


@cache
def code_places(bits: int, room: int, head_dim: int, is_value: bool) -> Array:
    """(room, head_dim, parts, 4): word, bit in it, width, first bit of the code, of each part of every code."""
    vectors = VECTORS[bits, room]
    before = [32 * sum(vectors[:i]) for i in range(len(vectors))]

    def word(lane: int, w: int) -> int:
        for start, length in zip(before, vectors, strict=True):
            if w < length:
                return start + lane * length + w
            w -= length
        raise AssertionError

    out = np.zeros((room, head_dim, 2 if bits == 3 else 1, 4), np.int64)
    for lane in range(32):
        r, c = divmod(lane, 4)
        for e in range(8):
            if is_value:
                channel, token = r + 8 * (e >> 2), 2 * c + (e >> 1 & 1) + 8 * (e & 1)
            else:
                token, channel = r + 8 * (e >> 2), 4 * c + (e & 3)
            nibble = 8 * (e & 3) + 4 * (e >> 2)
            for t in range(room // 16):
                plane = (e >> 2) + 2 * (e & 1)
                if bits == 2:
                    parts = [(t >> 1, nibble + 2 * (t & 1), 2, 0)]
                elif bits == 3:
                    parts = [(t >> 1, nibble + 2 * (t & 1), 2, 0), (2, nibble + t, 1, 2)]
                elif bits == 4:
                    parts = [(t, nibble, 4, 0)]
                elif bits == 8:
                    parts = [(4 * (e >> 2) + t, 8 * (e & 3), 8, 0)]
                else:
                    parts = [(plane if room == 16 else 4 * plane + t, 16 * (e >> 1 & 1), 16, 0)]
                for p, (w, *rest) in enumerate(parts):
                    for tile in range(head_dim // 16):
                        place = tile * 32 * sum(vectors) + word(lane, w), *rest
                        out[16 * t + token, 16 * tile + channel, p] = place
    return out


def write_codes(codes: Array, bits: int, room: int, is_value: bool) -> bytes:
    """Codes (room, d) as they lie in a page."""
    words = np.zeros(room * codes.shape[1] * bits // 32, np.uint32)
    for word, bit, width, first in code_places(bits, room, codes.shape[1], is_value).transpose(2, 3, 0, 1):
        part = (codes.astype(np.int64) >> first & (1 << width) - 1) << bit
        np.bitwise_or.at(words, word, part.astype(np.uint32))
    return words.tobytes()


def read_codes(data: bytes, bits: int, room: int, head_dim: int, is_value: bool) -> Array:
    words = np.frombuffer(data, np.uint32).astype(np.int64)
    codes = np.zeros((room, head_dim), np.int64)
    for word, bit, width, first in code_places(bits, room, head_dim, is_value).transpose(2, 3, 0, 1):
        codes |= (words[word] >> bit & (1 << width) - 1) << first
    return codes


# ---- arithmetic of pack.h, in float32 and in its order


def clamp(rows: Array) -> Array:
    return np.clip(rows, np.float32(-(2.0**96)), np.float32(2.0**96))


def rotate(rows: Array) -> Array:
    """Orthonormal Hadamard transform of rows (n, d) float32, its own inverse."""
    d = rows.shape[1]
    block = d & -d
    out = rows.astype(np.float32)
    for stage in range(block.bit_length() - 1):
        pairs = out.reshape(len(rows), d >> stage + 1, 2, 1 << stage)
        out = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(rows.shape)
    return out * (np.float32(1) / np.sqrt(np.float32(block)))


def fma(a: Array, b: Any, c: Any) -> Array:
    """One rounding (the sum's second one, from float64, shows once in 2^29 times)."""
    return np.asarray(np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64), np.float32)


class Rows(NamedTuple):
    """y of pack.h: rows, or the integers that rotated ones become, and what the row before the rotation tells."""

    y: Array
    factor: Array
    before: Array | None = None  # the whole row, if its rotation is one block and one group
    unit: Array | None = None

    def part(self, channels: slice) -> Rows:
        return self._replace(y=self.y[:, channels])


def norm_of(d: int) -> np.float32:
    return np.float32(1) / np.sqrt(np.float32(d & -d))


def rotate_exactly(rows: Array, group: int) -> Rows:
    """pack.h, step 1, for classes below 16."""
    d = rows.shape[1]
    most = np.maximum(np.abs(rows).max(1), np.float32(2.0**-60))
    unit = np.ldexp(np.float32(1), np.frexp(most)[1] - 15).astype(np.float32)
    y = np.rint(rows.astype(np.float64) / unit[:, None]).reshape(len(rows), d // (d & -d), d & -d)
    signs = np.array([[1.0]])
    while len(signs) < d & -d:
        signs = np.block([[signs, signs], [signs, -signs]])
    whole = group == d and d & d - 1 == 0
    integers = (y @ signs).reshape(rows.shape).astype(np.float32)
    return Rows(integers, unit * norm_of(d), rows if whole else None, unit)


def sum_of_squares(rows: Array, zero_point: int) -> Array:
    sums = np.zeros((8, len(rows)), np.float32)
    for c in range(1 if zero_point else 0, rows.shape[1]):
        sums[c // 4 % 8] = fma(rows[:, c], rows[:, c], sums[c // 4 % 8])
    sums = sums[::2] + sums[1::2]
    sums = sums[::2] + sums[1::2]
    return np.asarray(sums[0] + sums[1])


def total_of_32(y: Array, weights: Array | None = None) -> Array:
    """Sums of weights * y, or y, over channels with the same remainder by 32, and a tree over them."""
    sums = np.zeros((32, len(y)), np.float32)
    for c in range(y.shape[1]):
        sums[c % 32] = sums[c % 32] + y[:, c] if weights is None else fma(weights[:, c], y[:, c], sums[c % 32])
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return sums[0]


def total(rows: Array) -> Array:
    """Sums over the last axis in pack.h's order."""
    n = rows.shape[-1]
    block = n & -n
    parts = rows.astype(np.float32).reshape(*rows.shape[:-1], n // block, block)
    while parts.shape[-1] > 1:
        parts = parts[..., : parts.shape[-1] // 2] + parts[..., parts.shape[-1] // 2 :]
    out = parts[..., 0, 0]
    for i in range(1, n // block):
        out = out + parts[..., i, 0]
    return np.asarray(out)


def to_half(rows: Array, half: int) -> Array:
    """Bits of the nearest 16-bit values, saturated."""
    kind = np.float16 if half == FLOAT16 else ml_dtypes.bfloat16
    most = np.float32(ml_dtypes.finfo(kind).max)
    return np.clip(rows, -most, most).astype(kind).view(np.uint16)


def from_half(bits: Array, half: int) -> Array:
    return bits.astype(np.uint16).view(np.float16 if half == FLOAT16 else ml_dtypes.bfloat16).astype(np.float32)


E5M3_VALUES = (np.arange(248) << 7).astype(np.uint16).view(np.float16).astype(np.float64)


def to_e5m3(x: Array) -> Array:
    """The nearest codes of numbers >= 0; of two, the even one."""
    above = np.searchsorted(E5M3_VALUES, x.astype(np.float64)).clip(1, 247)
    low, high = x - E5M3_VALUES[above - 1], E5M3_VALUES[above] - x
    return np.where((high < low) | (high == low) & (above % 2 == 0), above, above - 1)


def stored(scale: Array, zero: Array, scale_dtype: int, bits: int) -> tuple[Array, Array]:
    """Scale and zero as float32 of what the layout stores."""
    if scale_dtype == FP16:
        return tuple(from_half(to_half(x, FLOAT16), FLOAT16) for x in (scale, zero))
    far = np.abs(zero)
    wanted = np.fmax(scale, far / np.float32(15.875))
    code = to_e5m3(wanted)
    nearest = E5M3_VALUES[code].astype(np.float32)
    short = nearest < wanted if bits == 8 else far > np.float32(15.875) * nearest + np.float32(2.0**-18)
    code = np.where(short, np.minimum(code + 1, 247), code)
    scale = E5M3_VALUES[code].astype(np.float32)
    eighths = np.divide(zero * np.float32(8), scale, out=np.zeros_like(scale), where=scale > 0)
    return scale, scale * np.rint(np.clip(eighths, -128, 127)) / np.float32(8)


def write_scales(scale: Array, zero: Array, layout: Layout) -> bytes:
    """Stored scales and zeros, both (groups, tokens), as they lie in a page."""
    if layout.scale_dtype == FP16:
        parts = scale.astype(np.float16), zero.astype(np.float16)
    else:
        z = np.divide(zero * 8, scale, out=np.zeros_like(scale), where=scale > 0)
        parts = to_e5m3(scale).astype(np.uint8), z.astype(np.int8).view(np.uint8)
    return np.stack(parts[: 1 + layout.zero_point], -1).tobytes()


def read_scales(data: bytes, room: int, layout: Layout) -> tuple[Array, Array]:
    """Scales and zeros, both (groups, room) float32."""
    shape = layout.head_dim // layout.group, room, 1 + layout.zero_point
    if layout.scale_dtype == FP16:
        parts = np.frombuffer(data, np.float16).reshape(shape).astype(np.float32)
    else:
        raw = np.frombuffer(data, np.uint8).reshape(shape)
        scale = E5M3_VALUES[raw[..., 0]].astype(np.float32)
        parts = np.stack([scale, scale * raw[..., -1].view(np.int8) / np.float32(8)], -1)
    return parts[..., 0], parts[..., 1] if layout.zero_point else np.zeros_like(parts[..., 0])


def middle(bits: int) -> np.float32:
    return np.float32((2**bits - 1) / 2)


def fit_minmax(x: Rows, bits: int, zero_point: int) -> tuple[Array, Array]:
    low, high = x.y[:, 0], x.y[:, 0]
    for c in range(1, x.y.shape[1]):  # not min(): of two zeros the first one stays
        low, high = np.where(x.y[:, c] < low, x.y[:, c], low), np.where(x.y[:, c] > high, x.y[:, c], high)
    levels = np.float32(2**bits - 1)
    if zero_point:
        return (high - low) * x.factor / levels, (low + high) * np.float32(0.5) * x.factor
    most = np.where(-low > high, -low, high)
    return (most + most) * x.factor / levels, np.zeros_like(low)


def fit_sigma(x: Rows, bits: int, zero_point: int) -> tuple[Array, Array]:
    n, d = np.float32(x.y.shape[1]), x.y.shape[1]
    step = np.float32({2: 0.996, 3: 0.586, 4: 0.335}[bits])
    if x.before is not None:
        sigma = np.sqrt(sum_of_squares(x.before, zero_point) / n)
        return step * sigma, x.before[:, 0] * norm_of(d) if zero_point else np.zeros_like(sigma)
    mean = total(x.y) / n if zero_point else np.zeros(len(x.y), np.float32)
    sigma = np.sqrt(total((x.y - mean[:, None]) ** 2) / n) * x.factor
    return step * sigma, mean * x.factor


def refit(x: Rows, y: Array, scale: Array, zero: Array, bits: int, zero_point: int) -> tuple[Array, Array, Array]:
    """Toward the scale and zero of least squared error for the codes that these give, and what the fit explains of the
    squares (-1: none, and the start stays). y: the mean, or (symmetric) the sum."""
    channels = x.y.shape[1]
    n = np.float32(channels)
    k = encode(x, scale, zero, bits) - np.float32(2 ** (bits - 1))
    sum_k, sum_kk, sum_ky = k.sum(1), (k * k).sum(1), total_of_32(x.y, k)
    m = sum_k / n
    c = fma(-sum_k, y, sum_ky) if zero_point else fma(y, np.float32(0.5), sum_ky)
    t = c / (fma(-m, sum_k, sum_kk) if zero_point else sum_kk + sum_k + np.float32(0.25) * n)
    found = t * x.factor
    good = (t > 0) & (found > 0) & (found < np.inf)
    beyond = np.float32(1.5 if channels <= 32 or not zero_point else 2 if channels < 128 else 2.5)
    step = np.where(np.abs(found - scale) * np.float32(2 << bits) > scale, np.float32(1), beyond)
    there = fma(-t, m + np.float32(0.5), y) * x.factor if zero_point else zero
    moved = fma(step, found - scale, scale), fma(step, there - zero, zero)
    return np.where(good, moved[0], scale), np.where(good, moved[1], zero), np.where(good, c * t, np.float32(-1))


def encode(x: Rows, scale: Array, zero: Array, bits: int, uniform: Array | None = None) -> Array:
    most = np.float32(2**bits - 1)
    per = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0) * (np.float32(1) / most)
    v = fma(x.y, (per * x.factor)[:, None], fma(-zero, per, np.float32(0.5))[:, None])
    if uniform is None:
        return np.rint(np.clip(v, 0, 1).astype(np.float64) * most).astype(np.float32)
    return np.floor(np.clip(fma(v, most, uniform), 0, most))


def decode(codes: Array, scale: Array, zero: Array, bits: int) -> Array:
    return zero[:, None] + scale[:, None] * (codes.astype(np.float32) - middle(bits))


# By bits, for groups of up to 32, 64, 128, 256 channels.
SEARCH_FACTORS = {2: (0.76, 0.64, 0.59, 0.54), 3: (0.92, 0.87, 0.79, 0.73), 4: (0.96, 0.96, 0.94, 0.9), 8: (1, 1, 1, 1)}
SYMMETRIC_STARTS = (1, 0.65, 0.8, 0.9, 1.12, 1.25)


def search(x: Rows, bits: int, zero_point: int) -> tuple[Array, Array]:
    n = x.y.shape[1]
    y = x.before[:, 0] / x.unit if zero_point and x.before is not None else total_of_32(x.y)
    if zero_point and x.before is None:
        y = y / np.float32(n)
    scale, zero = fit_minmax(x, bits, zero_point)
    factor = np.float32(SEARCH_FACTORS[bits][(n > 32) + (n > 64) + (n > 128)])
    scale = scale * (factor if zero_point or bits > 3 else np.float32(0.9) * factor)
    part = 0.5 if bits == 2 and n > 32 else 0.25 if bits == 3 and n > 64 else 0
    if zero_point and part:
        zero = fma(np.float32(part), y * x.factor - zero, zero)
    best, best_zero, most = scale, zero, np.full(len(y), -1, np.float32)
    for times in (1,) if zero_point else SYMMETRIC_STARTS:
        one, its_zero, explained = refit(x, y, scale * np.float32(times), zero, bits, zero_point)
        better = explained > most
        best, best_zero = np.where(better, one, best), np.where(better, its_zero, best_zero)
        most = np.where(better, explained, most)
    return best, best_zero


def fit(x: Rows, bits: int, layout: Layout, kind: int) -> tuple[Array, Array]:
    """Scale and zero, as stored, of every row of one group of channels."""
    base = search if kind == SEARCH else fit_minmax if kind == MINMAX or bits == 8 else fit_sigma
    return stored(*base(x, bits, layout.zero_point), layout.scale_dtype, bits)


def philox_uniform(seed: int, layer: int, list_index: int, rows: Array, channels: int) -> Array:
    """(len(rows), channels) float32 numbers of philox.h."""
    counter = [
        np.broadcast_to(np.asarray(x, np.uint64), (len(rows), channels // 4))
        for x in (np.arange(channels // 4), np.asarray(rows)[:, None], list_index, layer)
    ]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        even, odd = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (odd >> np.uint64(32)) ^ counter[1] ^ np.uint64(key[0]),
            odd & low,
            (even >> np.uint64(32)) ^ counter[3] ^ np.uint64(key[1]),
            even & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    outputs = np.stack(counter, -1).reshape(len(rows), channels)
    return (outputs >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


# ---- pages


class Options(NamedTuple):
    rotation: int = 1
    scale: int = SIGMA
    stochastic: int = 0
    layer: int = 0
    seed: int = 0


PLAIN = Options()


def pack_half(
    rows: Array, bits: int, room: int, layout: Layout, o: Options, is_value: bool, who: int, numbers: Array
) -> bytes:
    n, d = rows.shape
    x = rows.astype(np.float32)
    if o.rotation or bits < 16:
        x = clamp(x)
    codes = np.zeros((room, d), np.int64)
    if bits == 16:
        codes[:n] = to_half(rotate(x) if o.rotation else x, layout.half)
        return write_codes(codes, bits, room, is_value)
    scales, zeros = np.zeros((2, d // layout.group, room), np.float32)
    uniform = philox_uniform(o.seed, o.layer, who, 2 * numbers.astype(np.int64) + is_value, d) if o.stochastic else None
    y = rotate_exactly(x, layout.group) if o.rotation else Rows(x, np.ones(n, np.float32))
    for g in range(d // layout.group):
        part = slice(g * layout.group, (g + 1) * layout.group)
        scale, zero = fit(y.part(part), bits, layout, o.scale)
        codes[:n, part] = encode(y.part(part), scale, zero, bits, None if uniform is None else uniform[:, part])
        scales[g, :n], zeros[g, :n] = scale, zero
    return write_codes(codes, bits, room, is_value) + write_scales(scales, zeros, layout)


def pack_page(
    keys: Array,
    values: Array,
    k_bits: int,
    v_bits: int,
    layout: Layout,
    o: Options = PLAIN,
    who: int = 0,
    numbers: Array | None = None,
) -> bytes:
    """The bytes of one page of rows (n, d): list `who`, token numbers `numbers`."""
    room = page_tokens(k_bits, v_bits)
    numbers = np.arange(len(keys)) if numbers is None else np.asarray(numbers)
    with np.errstate(over="ignore", invalid="ignore"):
        data = pack_half(keys, k_bits, room, layout, o, False, who, numbers)
        data += pack_half(values, v_bits, room, layout, o, True, who, numbers)
    return data + bytes(page_bytes(layout, k_bits, v_bits) - len(data))


def unpack_page(
    data: bytes, k_bits: int, v_bits: int, tokens: int, layout: Layout, rotation: int
) -> tuple[Array, Array]:
    """Keys and values (tokens, d) float32 of one page."""
    room, out, at = page_tokens(k_bits, v_bits), [], 0
    for bits, is_value in (k_bits, False), (v_bits, True):
        code_bytes, scale_bytes = half_bytes(layout, bits, room)
        codes = read_codes(data[at : at + code_bytes], bits, room, layout.head_dim, is_value)[:tokens]
        if bits == 16:
            x = from_half(codes, layout.half)
        else:
            scales, zeros = read_scales(data[at + code_bytes : at + code_bytes + scale_bytes], room, layout)
            groups = zip(np.split(codes, len(scales), 1), scales[:, :tokens], zeros[:, :tokens], strict=True)
            x = np.concatenate([decode(part, scale, zero, bits) for part, scale, zero in groups], 1)
        out.append(rotate(x) if rotation else x)
        at += code_bytes + scale_bytes
    return out[0], out[1]


# ---- attention


def attention(
    queries: Array,
    keys: list[Array],
    values: list[Array],
    *,
    scale: float,
    softcap: float = 0.0,
    new_tokens: Array | None = None,
) -> tuple[Array, list[Array]]:
    """Output (b, hq, q, d) and mass (tokens of each list), float64. keys, values: (tokens, d) of list b * heads + h."""
    b, hq, q, d = queries.shape
    heads = len(keys) // b
    out, masses = np.zeros((b, hq, q, d)), [np.zeros(len(k)) for k in keys]
    for i in range(b):
        new = q if new_tokens is None else int(new_tokens[i])
        for h in range(hq):
            who = i * heads + h // (hq // heads)
            k, v = keys[who].astype(np.float64), values[who].astype(np.float64)
            for j in range(q - new, q):
                seen = len(k) - (q - 1 - j)
                if seen <= 0:
                    continue
                logits = scale * (k[:seen] @ queries[i, h, j].astype(np.float64))
                if softcap > 0:
                    logits = softcap * np.tanh(logits / softcap)
                p = np.exp(logits - logits.max())
                p /= p.sum()
                out[i, h, j] = p @ v[:seen]
                masses[who][:seen] += p
    return out, masses


def error_bound(values: list[Array], tokens: int, length: float = 0.0) -> float:
    """attend.h's bound for float32 queries and output; length: scale * |q| |k|."""
    largest = max((float(np.abs(v).max(initial=0)) for v in values), default=0.0)
    return largest * (2e-6 * (1 + math.log(max(tokens, 1))) + 2e-8 * length) + 1e-30


# ---- arguments of the operations

PAGE = np.dtype([("unit", "<u4"), ("k_bits", "u1"), ("v_bits", "u1"), ("tokens", "u1"), ("flags", "u1")])


def aligned(nbytes: int, fill: int = 0xA5) -> Array:
    """(nbytes,) uint8 at a multiple of 128 bytes."""
    raw = np.full(nbytes + UNIT, fill, np.uint8)
    start = -raw.ctypes.data % UNIT
    return raw[start : start + nbytes]


class Pages:
    """Pages for some tokens of some lists, and an arena of their own, with gaps of one unit between pages."""

    def __init__(self, layout: Layout, wanted: list[tuple[int, int, int, Any]]) -> None:
        """wanted: (list, k_bits, v_bits, token indices) of each page."""
        self.layout = layout
        self.entries = np.zeros(len(wanted), PAGE)
        unit = 1
        for entry, (_, k_bits, v_bits, tokens) in zip(self.entries, wanted, strict=True):
            entry["unit"], entry["k_bits"], entry["v_bits"], entry["tokens"] = unit, k_bits, v_bits, len(tokens)
            unit += page_bytes(layout, k_bits, v_bits) // UNIT + 1
        self.lists = np.array([page[0] for page in wanted], np.int32)
        counts = [len(page[3]) for page in wanted]
        self.start = (np.cumsum(counts) - counts).astype(np.int32)
        self.tokens = np.array([token for page in wanted for token in page[3]], np.int32)
        self.arena = aligned(unit * UNIT)

    @property
    def index(self) -> tuple[Array, Array, Array, Array]:
        return self.entries.view(np.uint64), self.lists, self.start, self.tokens

    def span(self, i: int) -> slice:
        """Bytes of page i in the arena."""
        first = int(self.entries["unit"][i]) * UNIT
        bits = int(self.entries["k_bits"][i]), int(self.entries["v_bits"][i])
        return slice(first, first + page_bytes(self.layout, *bits))
