/* format.h: the only definition of packed bytes, shared by the C and the CUDA code.
 *
 * A page holds up to P tokens of one (layer, sequence, KV head) in one class (k_bits, v_bits), each of 2, 3, 4, 8, 16:
 *
 *   [ K codes | K scales | V codes | V scales ]          P = 16 for class (16, 16), 64 for every other class
 *
 * Codes. A half (K or V) is cut into tiles of 16 tokens x 16 channels; a tile is what one m16n8k16 tensor-core
 * instruction reads: 32 lanes with 8 elements each. Lane = 4*r + c (r = 0..7, c = 0..3), element e = 0..7:
 *
 *   K: token   r + 8*(e>>2)   channel 4*c + (e&3)           rows are tokens, so 4 bytes are 4 channels (s8 MMA too)
 *   V: channel r + 8*(e>>2)   token   2*c + (e>>1&1) + 8*(e&1)       rows are channels, half2 pairs are tokens
 *
 * The P/16 tiles of one channel tile form a group; a lane's words of a group, W = bits*P/64 of them, lie in vectors of
 * up to 4 words (16 bytes, one shared-memory load), vector after vector, lane after lane. Inside a word:
 *
 *   bits  words of a lane                          element (tile t of the group, e)
 *     2   w0 w1          one vector of 2           word t>>1,            bit 8*(e&3) + 4*(e>>2) + 2*(t&1)
 *     3   w0 w1, w2      a vector of 2, one of 1   low 2 bits as 2-bit;  high bit: word 2, bit 8*(e&3) + 4*(e>>2) + t
 *     4   w0 .. w3       one vector of 4           word t,               bit 8*(e&3) + 4*(e>>2)
 *     8   w0 .. w7       two vectors of 4          word 4*(e>>2) + t,    bit 8*(e&3)
 *    16   w0 .. w15      four vectors of 4         word 4*R + t,         bit 16*(e>>1&1)    R = (e>>2) + 2*(e&1)
 *    16   w0 .. w3       P = 16: one vector of 4   word R,               bit 16*(e>>1&1)
 *
 * A byte's codes belong to one row or two, and the four bytes to four channels (K) or tokens (V): a mask, and for odd
 * tiles a shift, makes an operand of an 8-bit integer product of a word. 2 and 4 bits leave rows r + 8 times 16.
 *
 * Scales. Per token and group of `group` channels: a scale, and a zero unless the layout is symmetric; stored as
 * [group][token] pairs {scale, zero} (or scales alone). value = zero + scale * (code - mid), mid = (2^bits - 1) / 2, so
 * that the zero is the value of the middle of the range. Class 16 holds the 16-bit values themselves and has no scales.
 *
 *   KVC_STEP_FP16   scale and zero: fp16, 2 bytes each
 *   KVC_STEP_E5M3   scale: one byte s = 0..247, fp16's exponent and its first three mantissa bits, no sign: s << 7 are
 *                   the bits of the fp16 that it stands for, 0 or 2^-17 .. 61440. Zero: int8 z in eighths of the scale,
 *                   zero = scale * z / 8, which fp32 holds exactly.
 *
 * Every use of the order of codes goes through the functions below. */
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define KVC_HD __host__ __device__ static inline
#else
#define KVC_HD static inline
#endif

#define KVC_FORMAT_VERSION 4
#define KVC_TILE 16        /* tokens and channels of a tile */
#define KVC_PAGE_TOKENS 64 /* of a page of any class but (16, 16) */
#define KVC_TAIL_TOKENS 16 /* of a page of class (16, 16) */
#define KVC_UNIT 128       /* bytes; page addresses and sizes are multiples */
#define KVC_MAX_HEAD_DIM 256

/* What scales and zeros are stored as. */
typedef enum { KVC_STEP_FP16 = 0, KVC_STEP_E5M3 = 1 } kvc_step;

/* How the pages of one cache are laid out. */
typedef struct {
    int32_t head_dim;    /* 64, 80, 96, 128, 256 */
    int32_t group;       /* channels that share a scale: a divisor of head_dim and a multiple of 16 */
    int32_t zero_point;  /* 1: scale and zero; 0: symmetric, scale only */
    int32_t half;        /* KVC_FLOAT16 or KVC_BFLOAT16: what 16-bit halves hold */
    int32_t scale_dtype; /* kvc_step */
} kvc_layout;

/* One entry of a page table, 8 bytes. */
typedef struct {
    uint32_t unit; /* first byte = unit * KVC_UNIT from the arena's base */
    uint8_t k_bits;
    uint8_t v_bits;
    uint8_t tokens; /* valid tokens, 0..P; the rest of the page is zero bytes */
    uint8_t flags;  /* 0 */
} kvc_page;

/* The state of one list of pages (one sequence and KV head of a layer), 16 bytes. The tail is the run of class-(16, 16)
 * pages at the list's end, in the order of arrival: all full but the last. append writes there, and turns the first 64
 * tail tokens into one packed page when they have aged. */
typedef struct {
    int32_t pages;       /* entries of the list's row of the page table in use */
    int32_t tail_page;   /* index of the first tail page, <= pages */
    int32_t tail_tokens; /* tokens in tail pages */
    int32_t tokens;      /* tokens in all pages */
} kvc_list;

#if defined(__cplusplus)
static_assert(sizeof(kvc_page) == 8 && sizeof(kvc_list) == 16 && sizeof(kvc_layout) == 20, "packed structs");
static_assert(KVC_PAGE_TOKENS % KVC_TAIL_TOKENS == 0 && KVC_TAIL_TOKENS % KVC_TILE == 0, "pages are whole tiles");
#else
_Static_assert(sizeof(kvc_page) == 8 && sizeof(kvc_list) == 16 && sizeof(kvc_layout) == 20, "packed structs");
_Static_assert(KVC_PAGE_TOKENS % KVC_TAIL_TOKENS == 0 && KVC_TAIL_TOKENS % KVC_TILE == 0, "pages are whole tiles");
#endif

KVC_HD int kvc_bits_ok(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16; }

KVC_HD int kvc_head_dim_ok(int d) { return d == 64 || d == 80 || d == 96 || d == 128 || d == 256; }

KVC_HD int kvc_group_ok(int d, int group) { return group >= KVC_TILE && group % KVC_TILE == 0 && d % group == 0; }

/* Tokens a page of this class can hold. */
KVC_HD int kvc_page_tokens(int k_bits, int v_bits) {
    return k_bits == 16 && v_bits == 16 ? KVC_TAIL_TOKENS : KVC_PAGE_TOKENS;
}

KVC_HD int64_t kvc_code_bytes(const kvc_layout *layout, int bits, int page_tokens) {
    return (int64_t)page_tokens * layout->head_dim * bits / 8;
}

/* Bytes of the scale, and zero, of one token and group. */
KVC_HD int kvc_step_bytes(const kvc_layout *layout) {
    return (layout->zero_point ? 2 : 1) * (layout->scale_dtype == KVC_STEP_E5M3 ? 1 : 2);
}

KVC_HD int64_t kvc_scale_bytes(const kvc_layout *layout, int bits, int page_tokens) {
    return bits == 16 ? 0 : (int64_t)page_tokens * (layout->head_dim / layout->group) * kvc_step_bytes(layout);
}

/* A multiple of 64. */
KVC_HD int64_t kvc_half_bytes(const kvc_layout *layout, int bits, int page_tokens) {
    return kvc_code_bytes(layout, bits, page_tokens) + kvc_scale_bytes(layout, bits, page_tokens);
}

/* Bytes of a whole page: a multiple of KVC_UNIT. Also where the V half begins: kvc_half_bytes of K. */
KVC_HD int64_t kvc_page_bytes(const kvc_layout *layout, int k_bits, int v_bits) {
    const int tokens = kvc_page_tokens(k_bits, v_bits);
    const int64_t bytes = kvc_half_bytes(layout, k_bits, tokens) + kvc_half_bytes(layout, v_bits, tokens);
    return (bytes + KVC_UNIT - 1) / KVC_UNIT * KVC_UNIT;
}

/* The middle of the code range, whose value is the stored zero. */
KVC_HD float kvc_mid(int bits) { return 0.5f * (float)((1 << bits) - 1); }

/* Where an element of a half lies: channel tile, tile of the group, lane, element of the lane. */
typedef struct {
    int32_t channel_tile, tile, lane, element;
} kvc_place;

KVC_HD kvc_place kvc_place_k(int token, int channel) {
    const int t = token % KVC_TILE, c = channel % KVC_TILE;
    const kvc_place place = {channel / KVC_TILE, token / KVC_TILE, 4 * (t & 7) + (c >> 2), (c & 3) + 4 * (t >> 3)};
    return place;
}

KVC_HD kvc_place kvc_place_v(int token, int channel) {
    const int t = token % KVC_TILE, c = channel % KVC_TILE;
    const kvc_place place = {channel / KVC_TILE, token / KVC_TILE, 4 * (c & 7) + ((t & 7) >> 1),
                             (t >> 3) + 2 * (t & 1) + 4 * (c >> 3)};
    return place;
}

/* The way back: token and channel, inside its tile, of element e of a lane. */
KVC_HD int kvc_k_token(int lane, int e) { return (lane >> 2) + 8 * (e >> 2); }
KVC_HD int kvc_k_channel(int lane, int e) { return 4 * (lane & 3) + (e & 3); }
KVC_HD int kvc_v_token(int lane, int e) { return 2 * (lane & 3) + (e >> 1 & 1) + 8 * (e & 1); }
KVC_HD int kvc_v_channel(int lane, int e) { return (lane >> 2) + 8 * (e >> 2); }

/* Words of a lane in one group of tiles. */
KVC_HD int kvc_lane_words(int bits, int page_tokens) { return bits * page_tokens / 64; }

/* 32-bit word index, from the start of the half, of word `w` of `lane` in channel tile `channel_tile`. */
KVC_HD int kvc_word_index(int bits, int page_tokens, int channel_tile, int lane, int w) {
    const int words = kvc_lane_words(bits, page_tokens);
    const int base = channel_tile * 32 * words;
    if (words < 4) return w < 2 ? base + 2 * lane + w : base + 64 + lane;
    return base + 128 * (w >> 2) + 4 * lane + (w & 3);
}

/* Word of the lane that holds element `e` of tile `t` (3 bits: its low two bits). */
KVC_HD int kvc_code_word(int bits, int page_tokens, int t, int e) {
    const int r = (e >> 2) + 2 * (e & 1);
    switch (bits) {
    case 4: return t;
    case 8: return 4 * (e >> 2) + t;
    case 16: return page_tokens == KVC_TAIL_TOKENS ? r : 4 * r + t;
    default: return t >> 1;
    }
}

/* The first bit in it. */
KVC_HD int kvc_code_shift(int bits, int t, int e) {
    switch (bits) {
    case 4: return 8 * (e & 3) + 4 * (e >> 2);
    case 8: return 8 * (e & 3);
    case 16: return 16 * (e >> 1 & 1);
    default: return 8 * (e & 3) + 4 * (e >> 2) + 2 * (t & 1);
    }
}

/* The bit of word 2 that holds the high bit of a 3-bit code. */
KVC_HD int kvc_code_high_shift(int t, int e) { return 8 * (e & 3) + 4 * (e >> 2) + t; }

KVC_HD uint32_t kvc_rotate_left(uint32_t word, int bits) { return word << bits | word >> (-bits & 31); }

/* Reads and writes of single codes: the specification, and slow. `half` is the first word of a K or V half; words must
 * be zero before kvc_code_set. */
KVC_HD uint32_t kvc_code_get(const uint32_t *half, int bits, int page_tokens, kvc_place p) {
    const int w =
        kvc_word_index(bits, page_tokens, p.channel_tile, p.lane, kvc_code_word(bits, page_tokens, p.tile, p.element));
    const uint32_t mask = bits == 3 ? 3u : (1u << bits) - 1u;
    uint32_t code = half[w] >> kvc_code_shift(bits, p.tile, p.element) & mask;
    if (bits == 3) {
        const int high = kvc_word_index(bits, page_tokens, p.channel_tile, p.lane, 2);
        code |= (half[high] >> kvc_code_high_shift(p.tile, p.element) & 1u) << 2;
    }
    return code;
}

KVC_HD void kvc_code_set(uint32_t *half, int bits, int page_tokens, kvc_place p, uint32_t code) {
    const int w =
        kvc_word_index(bits, page_tokens, p.channel_tile, p.lane, kvc_code_word(bits, page_tokens, p.tile, p.element));
    half[w] |= (bits == 3 ? code & 3u : code) << kvc_code_shift(bits, p.tile, p.element);
    if (bits == 3) {
        const int high = kvc_word_index(bits, page_tokens, p.channel_tile, p.lane, 2);
        half[high] |= (code >> 2) << kvc_code_high_shift(p.tile, p.element);
    }
}

/* Byte of (group, token)'s scale, from the start of the half's scales; the zero follows it. */
KVC_HD int kvc_scale_offset(const kvc_layout *layout, int page_tokens, int group, int token) {
    return (group * page_tokens + token) * kvc_step_bytes(layout);
}

#define KVC_E5M3_MOST 247 /* 61440; above it lie fp16's infinity and NaNs */

KVC_HD float kvc_e5m3_to_float(uint32_t code) {
    const uint32_t bits = code << 20; /* fp32's place for them; 2^112 moves the exponent's bias from 15 to 127 */
    float value;
    memcpy(&value, &bits, 4);
    return value * 0x1p112f;
}

/* The nearest code, ties to even, saturated, of a scale >= 0; infinity too. */
KVC_HD uint32_t kvc_float_to_e5m3(float scale) {
    const int normal = scale >= 0x1p-14f;
    uint32_t bits;
    scale = scale < 61440.0f ? scale : 61440.0f;
    if (!normal) scale += 64.0f; /* aligns the subnormal's last bit, 2^-17, with fp32's: the sum rounds to even */
    memcpy(&bits, &scale, 4);
    return normal ? (bits - 0x38000000 + 0x7ffff + (bits >> 20 & 1)) >> 20 : bits - 0x42800000;
}
