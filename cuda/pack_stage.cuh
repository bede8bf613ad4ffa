/* pack_stage.cuh: codes in shared memory, between rows and the words of a page (format.h). */
#pragma once
#include "kvcomp/philox.h"
#include "pack_rows.cuh"

namespace {

/* ---- codes in shared memory: [channel tile][4 tiles][lane][element], one byte each (class 16: two) */

constexpr int STAGE_STEP = STAGE_TILES * 32 * 8; /* elements from one channel tile to the next */

/* Where a thread's 4 channels of a token lie in the first channel tile. Four channels of K are neighbours, those of V
 * lie in 4 lanes. */
struct spots {
    int at[4], value;
    __device__ spots(int value, int token) : value(value) {
        __builtin_assume(token >= 0 && token < KVC_PAGE_TOKENS);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int channel = 4 * (threadIdx.x & 3) + i;
            const kvc_place p = value ? kvc_place_v(token, channel) : kvc_place_k(token, channel);
            at[i] = (p.tile * 32 + p.lane) * 8 + p.element;
        }
    }
};

template <int VALUE> __device__ void stage_put(uint8_t *stage, const spots &to, int j, const uint32_t (&code)[4]) {
    stage += j * STAGE_STEP;
    if constexpr (VALUE) {
#pragma unroll
        for (int i = 0; i < 4; i++) stage[to.at[i]] = (uint8_t)code[i];
    } else {
        *(uint32_t *)(stage + to.at[0]) =
            __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410);
    }
}

__device__ void stage_put(uint16_t *stage, const spots &to, int j, uint2 halves) {
    stage += j * STAGE_STEP;
    if (to.value) {
#pragma unroll
        for (int i = 0; i < 4; i++) stage[to.at[i]] = (uint16_t)((i < 2 ? halves.x : halves.y) >> 16 * (i & 1));
    } else {
        *(uint2 *)(stage + to.at[0]) = halves;
    }
}

/* The codes as floats. */
__device__ void stage_get(float (&code)[4], const uint8_t *stage, const spots &from, int j) {
    stage += j * STAGE_STEP;
    if (from.value) {
#pragma unroll
        for (int i = 0; i < 4; i++) code[i] = (float)stage[from.at[i]];
    } else {
        const uint32_t four = *(const uint32_t *)(stage + from.at[0]);
#pragma unroll
        for (int i = 0; i < 4; i++) code[i] = (float)(four >> 8 * i & 0xff);
    }
}

__device__ uint2 stage_get(const uint16_t *stage, const spots &from, int j) {
    stage += j * STAGE_STEP;
    if (from.value)
        return make_uint2(stage[from.at[0]] | stage[from.at[1]] << 16, stage[from.at[2]] | stage[from.at[3]] << 16);
    return *(const uint2 *)(stage + from.at[0]);
}

/* Step 3 of pack.h: a row's codes into the stage. */
template <int TILES, int GROUPS, int VALUE>
__device__ void put_codes(uint8_t *stage, const spots &to, const float (&x)[TILES][4], const encoder<GROUPS> &encode,
                          float mid, float most, const call &a, int list, int token) {
    const line<GROUPS> at = encode.at(mid, most);
    uint32_t code[4];
    if (a.stochastic) {
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            float u[4];
            kvc_philox_uniform4(u, a.seed, a.layer, list, 2 * (uint32_t)token + VALUE, 4 * j + (threadIdx.x & 3));
#pragma unroll
            for (int i = 0; i < 4; i++)
                code[i] = (uint32_t)floorf(fminf(fmaxf(__fmaf_rn(at(x[j][i], j), most, u[i]), 0.0f), most));
            stage_put<VALUE>(stage, to, j, code);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) code[i] = __float_as_uint(code_of(at(x[j][i], j), most));
        stage_put<VALUE>(stage, to, j, code);
    }
}

/* ---- stage <-> page words, one lane of a channel tile a thread */

template <int BITS, int PAGE>
__device__ void write_words(uint32_t *words, const void *stage, int channel_tiles, int value) {
    constexpr int WORDS = BITS * PAGE / 64, TILES = PAGE / KVC_TILE;
    for (int at = threadIdx.x; at < 32 * channel_tiles; at += THREADS) {
        const int ct = at / 32, lane = at % 32;
        uint32_t w[WORDS] = {};
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            if constexpr (BITS == 16) {
                const uint4 eight = ((const uint4 *)stage)[(ct * STAGE_TILES + t) * 32 + lane];
                const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
                for (int e = 0; e < 8; e++)
                    w[kvc_code_word(16, PAGE, t, e)] |= (pairs[e / 2] >> 16 * (e & 1) & 0xffffu)
                                                        << kvc_code_shift(16, t, e);
            } else {
                const uint2 eight = ((const uint2 *)stage)[(ct * STAGE_TILES + t) * 32 + lane];
#pragma unroll
                for (int e = 0; e < 8; e += 4) { /* elements e .. e+3 lie 8 bits apart in every class below 16 */
                    const uint32_t four = e ? eight.y : eight.x;
                    w[kvc_code_word(BITS, PAGE, t, e)] |= (BITS == 3 ? four & 0x03030303u : four)
                                                          << kvc_code_shift(BITS, t, e);
                    if (BITS == 3) w[WORDS - 1] |= (four >> 2 & 0x01010101u) << kvc_code_high_shift(t, e);
                }
            }
        }
        if (WORDS < 4) {
            *(uint2 *)(words + kvc_word_index(BITS, PAGE, ct, lane, 0)) = make_uint2(w[0], w[1]);
            if (WORDS == 3) words[kvc_word_index(BITS, PAGE, ct, lane, 2)] = w[WORDS - 1];
        } else {
#pragma unroll
            for (int k = 0; k < WORDS / 4; k++)
                *(uint4 *)(words + kvc_word_index(BITS, PAGE, ct, lane, 4 * k)) =
                    make_uint4(w[4 * k], w[4 * k + 1], w[4 * k + 2], w[4 * k + 3]);
        }
    }
}

/* A half of class 16: all of it, but for the check of its tokens. */
template <int TILES> __device__ void pack_sixteen(void *stage, const call &a, const job &it) {
    for (int first = 0; first < it.page_tokens; first += THREADS / 4) {
        const int row = first + threadIdx.x / 4;
        const int token = row < it.page.tokens ? it.tokens[row] : -1;
        float x[TILES][4] = {};
        if (token >= 0 && token < a.s)
            load_row<TILES>(x, it.base + token * it.stride, a.half[it.value].dtype, a.half[it.value].vectors);
        if (a.rotation == KVC_ROTATE_HADAMARD) {
            clamp_row(x);
            rotate_row(x);
        }
        uint2 halves[TILES];
        pack_halves<TILES>(halves, x, a.layout.half);
        if (row >= it.page_tokens) continue; /* pages of 16 tokens are half a pass */
        const spots to(it.value, row);
#pragma unroll
        for (int j = 0; j < TILES; j++) stage_put((uint16_t *)stage, to, j, halves[j]);
    }
    __syncthreads();
    if (it.page_tokens == KVC_TAIL_TOKENS)
        write_words<16, KVC_TAIL_TOKENS>(it.words, stage, TILES, it.value);
    else
        write_words<16, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value);
}

template <int BITS, int PAGE>
__device__ void read_words(void *stage, const uint32_t *words, int channel_tiles, int value) {
    constexpr int WORDS = BITS * PAGE / 64, TILES = PAGE / KVC_TILE;
    for (int at = threadIdx.x; at < 32 * channel_tiles; at += THREADS) {
        const int ct = at / 32, lane = at % 32;
        uint32_t w[WORDS];
        if (WORDS < 4) {
            const uint2 two = *(const uint2 *)(words + kvc_word_index(BITS, PAGE, ct, lane, 0));
            w[0] = two.x, w[1] = two.y;
            if (WORDS == 3) w[WORDS - 1] = words[kvc_word_index(BITS, PAGE, ct, lane, 2)];
        } else {
#pragma unroll
            for (int k = 0; k < WORDS / 4; k++) {
                const uint4 four = *(const uint4 *)(words + kvc_word_index(BITS, PAGE, ct, lane, 4 * k));
                w[4 * k] = four.x, w[4 * k + 1] = four.y, w[4 * k + 2] = four.z, w[4 * k + 3] = four.w;
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            if constexpr (BITS == 16) {
                uint32_t pairs[4] = {};
#pragma unroll
                for (int e = 0; e < 8; e++)
                    pairs[e / 2] |= (w[kvc_code_word(16, PAGE, t, e)] >> kvc_code_shift(16, t, e) & 0xffffu)
                                    << 16 * (e & 1);
                ((uint4 *)stage)[(ct * STAGE_TILES + t) * 32 + lane] =
                    make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            } else {
                constexpr uint32_t mask = BITS == 8 ? 0xffffffffu : BITS == 4 ? 0x0f0f0f0fu : 0x03030303u;
                uint32_t four[2];
#pragma unroll
                for (int e = 0; e < 8; e += 4) {
                    four[e / 4] = w[kvc_code_word(BITS, PAGE, t, e)] >> kvc_code_shift(BITS, t, e) & mask;
                    if (BITS == 3) four[e / 4] |= (w[WORDS - 1] >> kvc_code_high_shift(t, e) & 0x01010101u) << 2;
                }
                ((uint2 *)stage)[(ct * STAGE_TILES + t) * 32 + lane] = make_uint2(four[0], four[1]);
            }
        }
    }
}

} // namespace
