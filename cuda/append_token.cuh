/* append_token.cuh: one row of K or V in a warp, rotated and written into a 16-bit tail page; the CPU's bytes. */
#pragma once
#include "pack_rows.cuh"

namespace {

/* Lane l has the 4 channels of quad l, and at head dimension 256 those of quad l + 32. Lanes without a quad of their
 * own repeat the last one. */
template <int TILES> struct token_row {
    static constexpr int QUADS = 4 * TILES, EACH = (QUADS + 31) / 32, BLOCK = (TILES & -TILES) * KVC_TILE;
    uint4 raw[EACH];
    float x[EACH][4];

    /* Asks for the row, and does not wait for it. */
    __device__ void fetch(const rows &from, const char *row) {
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int first = 4 * min((int)(threadIdx.x & 31) + 32 * k, QUADS - 1);
            if (from.dtype == KVC_FLOAT32) {
                const uint32_t *in = (const uint32_t *)row + first;
                raw[k] = from.vectors ? *(const uint4 *)in : make_uint4(in[0], in[1], in[2], in[3]);
            } else {
                const uint16_t *in = (const uint16_t *)row + first;
                if (from.vectors)
                    *(uint2 *)&raw[k] = *(const uint2 *)in;
                else
                    raw[k] = make_uint4(in[0], in[1], in[2], in[3]);
            }
        }
    }

    __device__ void widen(const rows &from) {
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (from.dtype == KVC_FLOAT32) {
                x[k][0] = __uint_as_float(raw[k].x), x[k][1] = __uint_as_float(raw[k].y);
                x[k][2] = __uint_as_float(raw[k].z), x[k][3] = __uint_as_float(raw[k].w);
            } else {
                const uint2 two = from.vectors ? make_uint2(raw[k].x, raw[k].y)
                                               : make_uint2(raw[k].x | raw[k].y << 16, raw[k].z | raw[k].w << 16);
                unpack_halves(x[k], two, from.dtype);
            }
    }

    /* pack.h, step 1: stages of stride 1, 2, 4, ... in order. */
    __device__ void rotate() {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) x[k][i] = fminf(fmaxf(x[k][i], -0x1p96f), 0x1p96f);
#pragma unroll
            for (int stride = 1; stride <= 2; stride *= 2)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (!(i & stride)) butterfly(x[k][i], x[k][i + stride]);
#pragma unroll
            for (int stride = 1; stride < 32 && 4 * stride < BLOCK; stride *= 2) {
                /* other + own or other - own: the product with 1 or -1 is exact, so this is one rounding. */
                const float sign = lane & stride ? -1.0f : 1.0f;
#pragma unroll
                for (int i = 0; i < 4; i++) x[k][i] = __fmaf_rn(x[k][i], sign, __shfl_xor_sync(ALL, x[k][i], stride));
            }
        }
        if constexpr (BLOCK > 128)
#pragma unroll
            for (int i = 0; i < 4; i++) butterfly(x[0][i], x[EACH - 1][i]);
        const float norm = 1.0f / sqrtf((float)BLOCK);
#pragma unroll
        for (int k = 0; k < EACH; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[k][i] *= norm;
    }

    /* Into place `token` of a tail page; `half` is the K or V half's first byte. No two threads write into one byte,
     * and nothing is read. */
    __device__ void store(char *half, bool value, int token, int dtype) const {
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int quad = (threadIdx.x & 31) + 32 * k;
            if (QUADS % 32 && quad >= QUADS) return;
            const uint32_t even = kvc_cuda_floats_to_halves(x[k][0], x[k][2], dtype);
            const uint32_t odd = kvc_cuda_floats_to_halves(x[k][1], x[k][3], dtype);
            if (value) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    ((uint16_t *)half)[place(kvc_place_v(token, 4 * quad + i))] =
                        (uint16_t)((i & 1 ? odd : even) >> 16 * (i >> 1));
            } else { /* channels 0 and 2 make one word, 1 and 3 another */
                *(uint32_t *)((uint16_t *)half + place(kvc_place_k(token, 4 * quad))) = even;
                *(uint32_t *)((uint16_t *)half + place(kvc_place_k(token, 4 * quad + 1))) = odd;
            }
        }
    }

    /* Where the 16 bits of an element lie in a tail page's half. */
    static __device__ int place(kvc_place p) {
        const int word = kvc_code_word(16, KVC_TAIL_TOKENS, 0, p.element);
        return 2 * kvc_word_index(16, KVC_TAIL_TOKENS, p.channel_tile, p.lane, word) +
               kvc_code_shift(16, 0, p.element) / 16;
    }

  private:
    static __device__ void butterfly(float &a, float &b) {
        const float sum = a + b, difference = a - b;
        a = sum;
        b = difference;
    }
};

} // namespace
