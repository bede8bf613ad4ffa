/* attend_groups_page.cuh: one warp, one page, R rows of queries: logits from K, weighed sums of V, in fp32.
 *
 * A lane decodes what the page's format gives it, 8 elements of a tile of 16 tokens x 16 channels: of K four channels
 * of two tokens, of V four tokens of two channels. Four lanes share a token or a channel and add up at the end. Logits
 * lie in shared memory in the order of tokens; probabilities, in the same place, in the order in which a lane meets
 * V's tokens. */
#pragma once
#include "common.cuh"
#include "kvcomp/pack.h"

namespace {

constexpr unsigned WARP = 0xffffffffu;
constexpr int SCORE_STRIDE = 20;            /* floats from one lane's 16 tokens of V to the next one's: no conflicts */
constexpr int SCORE_ROW = 4 * SCORE_STRIDE; /* floats of a row of scores */
constexpr int STEP_STRIDE = 18;             /* the same for pairs of scale and zero */
constexpr int STEPS = 4 * STEP_STRIDE;      /* pairs of one group of channels */
constexpr int SUM_PADDING = 4;              /* floats behind a row of sums: no conflicts */

/* Where a page's token stands in V's order: by lane, tile, element. */
__device__ inline int value_order(int token, int stride) {
    const kvc_place place = kvc_place_v(token, 0);
    return place.lane * stride + 4 * place.tile + place.element;
}

/* ---- codes */

/* A lane's words of one channel tile. */
template <int BITS, int PAGE, int VALUE>
__device__ void load_words(uint32_t (&w)[BITS * PAGE / 64], const uint8_t *half, int channel_tile) {
    constexpr int WORDS = BITS * PAGE / 64;
    const int lane = threadIdx.x & 31;
    const uint32_t *words = (const uint32_t *)half;
    if constexpr (WORDS < 4) {
        const uint2 two = *(const uint2 *)(words + kvc_word_index(BITS, PAGE, channel_tile, lane, 0));
        w[0] = two.x, w[1] = two.y;
        if (WORDS == 3) w[WORDS - 1] = words[kvc_word_index(BITS, PAGE, channel_tile, lane, 2)];
    } else {
#pragma unroll
        for (int k = 0; k < WORDS; k += 4) {
            const uint4 four = *(const uint4 *)(words + kvc_word_index(BITS, PAGE, channel_tile, lane, k));
            w[k] = four.x, w[k + 1] = four.y, w[k + 2] = four.z, w[k + 3] = four.w;
        }
    }
}

/* Element `e` of tile `t`: its code less the middle; of 16 bits the value. */
template <int BITS, int PAGE>
__device__ float element_of(const uint32_t (&w)[BITS * PAGE / 64], int t, int e, int half_dtype) {
    const uint32_t word = w[kvc_code_word(BITS, PAGE, t, e)];
    const int shift = kvc_code_shift(BITS, t, e);
    if constexpr (BITS == 16) return kvc_cuda_half_to_float((uint16_t)(word >> shift), half_dtype);
    /* Doubled and or-ed into 2^22, whose last bit is a half, the code makes 2^22 + code, and the middle goes exactly.
     */
    constexpr uint32_t mask = BITS == 3 ? 3u << 1 : ((1u << BITS) - 1) << 1;
    uint32_t code = (shift ? word >> (shift - 1) : word << 1) & mask;
    if constexpr (BITS == 3) {
        const int high = kvc_code_high_shift(t, e);
        code |= (high > 3 ? w[2] >> (high - 3) : w[2] << (3 - high)) & 8;
    }
    return __uint_as_float(code | 0x4a800000) - (0x1p22f + kvc_mid(BITS));
}

/* ---- scales and zeros */

__device__ inline float2 read_step(const uint8_t *at, const kvc_layout &layout) {
    float2 step = {0.0f, 0.0f};
    if (layout.scale_dtype == KVC_STEP_E5M3) {
        step.x = kvc_e5m3_to_float(at[0]);
        if (layout.zero_point) step.y = kvc_e5m3_zero(step.x, at[1]);
    } else {
        step.x = kvc_cuda_half_to_float(((const uint16_t *)at)[0], KVC_FLOAT16);
        if (layout.zero_point) step.y = kvc_cuda_half_to_float(((const uint16_t *)at)[1], KVC_FLOAT16);
    }
    return step;
}

/* The whole warp brings one group's pairs to shared memory, for K in the order of tokens, for V in V's. */
template <int VALUE>
__device__ void stage_steps(float2 *steps, const uint8_t *scales, int group, const kvc_layout &layout) {
    __syncwarp(); /* the group before has been read */
#pragma unroll
    for (int token = threadIdx.x & 31; token < KVC_PAGE_TOKENS; token += 32)
        steps[VALUE ? value_order(token, STEP_STRIDE) : token] =
            read_step(scales + kvc_scale_offset(&layout, KVC_PAGE_TOKENS, group, token), layout);
    __syncwarp();
}

/* ---- sums over the four lanes of a token or channel */

/* Each lane keeps max(N/4, 1) of the N sums, in v[0..]; returns the first one's index. With N = 2 lanes 2 and 3 keep
 * what lanes 0 and 1 do. */
template <int N> __device__ int sum_lanes(float (&v)[N]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float keep = odd ? v[i + N / 2] : v[i], give = odd ? v[i] : v[i + N / 2];
        v[i] = keep + __shfl_xor_sync(WARP, give, 1);
    }
    if constexpr (N == 2) {
        v[0] += __shfl_xor_sync(WARP, v[0], 2);
        return odd;
    } else {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            const float keep = high ? v[i + N / 4] : v[i], give = high ? v[i] : v[i + N / 4];
            v[i] = keep + __shfl_xor_sync(WARP, give, 2);
        }
        return odd * (N / 2) + high * (N / 4);
    }
}

/* ---- K and V */

/* scores[row][token] = sum over channels of query[row][channel] * K[token][channel]. */
template <int R, int BITS, int PAGE>
__device__ void logits_of(float *scores, const float *query, float2 *steps, const uint8_t *half,
                          const kvc_layout &layout) {
    constexpr int TILES = PAGE / KVC_TILE;
    const int lane = threadIdx.x & 31, d = layout.head_dim;
    float sum[R][2 * TILES] = {}; /* [row][tile and half of its tokens] */
    int group = 0, left = 0;      /* the next group of channels, channels left in this one */
#pragma unroll 1
    for (int ct = 0; ct < d / KVC_TILE; ct++) {
        uint32_t w[BITS * PAGE / 64];
        load_words<BITS, PAGE, 0>(w, half, ct);
        if (BITS < 16 && left == 0) {
            stage_steps<0>(steps, half + PAGE / 8 * BITS * d, group++, layout);
            left = layout.group;
        }
        left -= KVC_TILE;
        const float *own = query + KVC_TILE * ct + kvc_k_channel(lane, 0);
#pragma unroll
        for (int j = 0; j < 2 * TILES; j++) {
            float x[4];
            float2 step;
            if (BITS < 16) step = steps[KVC_TILE * (j / 2) + kvc_k_token(lane, 4 * (j & 1))];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[i] = element_of<BITS, PAGE>(w, j / 2, 4 * (j & 1) + i, layout.half);
                if (BITS < 16) x[i] = fmaf(step.x, x[i], step.y);
            }
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float4 q = *(const float4 *)(own + r * d);
                sum[r][j] = fmaf(x[3], q.w, fmaf(x[2], q.z, fmaf(x[1], q.y, fmaf(x[0], q.x, sum[r][j]))));
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int first = sum_lanes(sum[r]);
#pragma unroll
        for (int i = 0; i < (TILES + 1) / 2; i++) {
            const int j = first + i;
            scores[r * SCORE_ROW + KVC_TILE * (j / 2) + kvc_k_token(lane, 4 * (j & 1))] = sum[r][i];
        }
    }
}

/* sums[row][channel] = sums * factors[row] + sum over tokens of probability * V[token][channel]. */
template <int R, int BITS, int PAGE>
__device__ void values_of(float *sums, const float *factors, const float *scores, float2 *steps, const uint8_t *half,
                          const kvc_layout &layout) {
    constexpr int TILES = PAGE / KVC_TILE;
    const int lane = threadIdx.x & 31, d = layout.head_dim;
    int group = 0, left = 0;
#pragma unroll 1
    for (int ct = 0; ct < d / KVC_TILE; ct++) {
        uint32_t w[BITS * PAGE / 64];
        load_words<BITS, PAGE, 1>(w, half, ct);
        if (BITS < 16 && left == 0) {
            stage_steps<1>(steps, half + PAGE / 8 * BITS * d, group++, layout);
            left = layout.group;
        }
        left -= KVC_TILE;
        float sum[2 * R] = {}; /* [row][half of the tile's channels] */
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float x[8];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                x[e] = element_of<BITS, PAGE>(w, t, e, layout.half);
                if (BITS < 16) {
                    const float2 step = steps[(lane & 3) * STEP_STRIDE + 4 * t + (e & 3)];
                    x[e] = fmaf(step.x, x[e], step.y);
                }
            }
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float4 p = *(const float4 *)(scores + r * SCORE_ROW + (lane & 3) * SCORE_STRIDE + 4 * t);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float *v = x + 4 * i;
                    sum[2 * r + i] = fmaf(p.w, v[3], fmaf(p.z, v[2], fmaf(p.y, v[1], fmaf(p.x, v[0], sum[2 * r + i]))));
                }
            }
        }
        const int first = sum_lanes(sum);
        if (R == 1 && (lane & 2)) continue; /* what lanes 0 and 1 keep too */
#pragma unroll
        for (int i = 0; i < (R + 1) / 2; i++) {
            const int r = (first + i) / 2, c = KVC_TILE * ct + kvc_v_channel(lane, 4 * ((first + i) & 1));
            float *at = sums + r * (d + SUM_PADDING) + c;
            *at = fmaf(*at, factors[r], sum[i]);
        }
    }
}

/* ---- by class */

/* A page as a warp meets it. */
struct page_view {
    const uint8_t *bytes;
    int k_bits, v_bits;
    int tokens;
    int before; /* tokens of the list's pages before it */
};

template <int R>
__device__ void page_logits(float *scores, const float *query, float2 *steps, const page_view &page,
                            const kvc_layout &layout) {
    switch (page.k_bits) {
    case 2: logits_of<R, 2, KVC_PAGE_TOKENS>(scores, query, steps, page.bytes, layout); break;
    case 3: logits_of<R, 3, KVC_PAGE_TOKENS>(scores, query, steps, page.bytes, layout); break;
    case 4: logits_of<R, 4, KVC_PAGE_TOKENS>(scores, query, steps, page.bytes, layout); break;
    case 8: logits_of<R, 8, KVC_PAGE_TOKENS>(scores, query, steps, page.bytes, layout); break;
    default:
        if (page.v_bits == 16)
            logits_of<R, 16, KVC_TAIL_TOKENS>(scores, query, steps, page.bytes, layout);
        else
            logits_of<R, 16, KVC_PAGE_TOKENS>(scores, query, steps, page.bytes, layout);
    }
}

template <int R>
__device__ void page_values(float *sums, const float *factors, const float *scores, float2 *steps,
                            const page_view &page, const kvc_layout &layout) {
    const int page_tokens = kvc_page_tokens(page.k_bits, page.v_bits);
    const uint8_t *half = page.bytes + kvc_half_bytes(&layout, page.k_bits, page_tokens);
    switch (page.v_bits) {
    case 2: values_of<R, 2, KVC_PAGE_TOKENS>(sums, factors, scores, steps, half, layout); break;
    case 3: values_of<R, 3, KVC_PAGE_TOKENS>(sums, factors, scores, steps, half, layout); break;
    case 4: values_of<R, 4, KVC_PAGE_TOKENS>(sums, factors, scores, steps, half, layout); break;
    case 8: values_of<R, 8, KVC_PAGE_TOKENS>(sums, factors, scores, steps, half, layout); break;
    default:
        if (page.k_bits == 16)
            values_of<R, 16, KVC_TAIL_TOKENS>(sums, factors, scores, steps, half, layout);
        else
            values_of<R, 16, KVC_PAGE_TOKENS>(sums, factors, scores, steps, half, layout);
    }
}

} // namespace
