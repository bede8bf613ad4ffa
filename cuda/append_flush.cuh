/* append_flush.cuh: four full tail pages of a list become one page of 64 tokens; the CPU's bytes. A block's threads are
 * (128, 2): 4 warps for K, 4 for V, each with one of the pages.
 *
 * A tail page is one tile of tokens, in the order that the packed page's tiles have too: a lane loads its 8 elements of
 * a channel tile with one instruction, all of a group's at once, and its codes of them are a word of the packed page.
 * HEAD: channel tiles of a row; TILES: of a group. Groups come one after the other through the same code. */
#pragma once
#include "append_token.cuh"
#include "kvcomp/philox.h"
#include "pack_lanes.cuh"
#include "pack_steps.cuh"

namespace {

constexpr int TAIL_PAGES = KVC_PAGE_TOKENS / KVC_TAIL_TOKENS;
constexpr int NOISE = KVC_TILE * KVC_TILE; /* Philox's numbers for a tile, which a warp shares */

/* Two values clamped to +-2^96, which only bfloat16 passes. */
__device__ uint32_t clamp_halves(uint32_t two, int dtype) {
    if (dtype != KVC_BFLOAT16) return two;
    constexpr uint32_t most = 0x6f806f80u, least = 0xef80ef80u;
    const __nv_bfloat162 clamped =
        __hmax2(__hmin2(*(__nv_bfloat162 *)&two, *(const __nv_bfloat162 *)&most), *(const __nv_bfloat162 *)&least);
    return *(const uint32_t *)&clamped;
}

__device__ uint4 clamp_words(uint4 eight, int dtype) {
    return make_uint4(clamp_halves(eight.x, dtype), clamp_halves(eight.y, dtype), clamp_halves(eight.z, dtype),
                      clamp_halves(eight.w, dtype));
}

/* The K or V half of a tail page. */
__device__ const char *tail_half(const call &a, uint32_t unit, int value) {
    return (const char *)a.arena + (int64_t)unit * KVC_UNIT + (value ? a.tail_half_bytes : 0);
}

/* Asks for 32 bytes, as near as they can be without registers. */
__device__ void prefetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

/* Asks for a half of a tail page. */
template <int HEAD> __device__ void prefetch_half(const char *half) {
    constexpr int BYTES = 2 * KVC_TILE * KVC_TILE * HEAD;
#pragma unroll
    for (int at = 0; at < BYTES; at += 32 * 32) {
        const int mine = at + 32 * (threadIdx.x & 31);
        if (BYTES % 1024 == 0 || mine < BYTES) prefetch(half + mine);
    }
}

/* A half that stays at 16 bits: word R of a lane's tile t becomes word 4*R + t. */
template <int HEAD> __device__ void copy_halves(const call &a, const job &it, const kvc_page *tail) {
#pragma unroll 1
    for (int at = threadIdx.x; at < 32 * HEAD; at += THREADS) {
        uint4 in[TAIL_PAGES];
#pragma unroll
        for (int t = 0; t < TAIL_PAGES; t++)
            in[t] = clamp_words(((const uint4 *)tail_half(a, tail[t].unit, it.value))[at], a.layout.half);
        uint4 *out = (uint4 *)(it.words + kvc_word_index(16, KVC_PAGE_TOKENS, at / 32, at % 32, 0));
        out[0] = make_uint4(in[0].x, in[1].x, in[2].x, in[3].x);
        out[32] = make_uint4(in[0].y, in[1].y, in[2].y, in[3].y);
        out[64] = make_uint4(in[0].z, in[1].z, in[2].z, in[3].z);
        out[96] = make_uint4(in[0].w, in[1].w, in[2].w, in[3].w);
    }
}

/* ---- a group's tiles: x[tile][element]. K and V take the same instructions where they can. */

/* A lane's place in its warp. */
struct place {
    int lane, value;
    int owned;     /* the token, of the tail page's, whose scale this lane makes */
    int from[4];   /* owners of the tokens of elements 0..3 (V), or of 0, 0, 4, 4 (K) */
    int far[4];    /* lanes between the two that a number of gather's is of, step by step; 0: it is all here */
    bool takes[3]; /* and whether this one goes on with the second of each two numbers */
    __device__ explicit place(int value)
        : lane(threadIdx.x & 31), value(value), owned(value ? owned_token<1>(lane) : owned_token<0>(lane)),
          far{value ? 0 : 2, value ? 16 : 1, value ? 8 : 0, value ? 4 : 1},
          takes{(lane & far[0]) != 0, (lane & far[1]) != 0, (lane & far[2]) != 0} {
#pragma unroll
        for (int i = 0; i < 4; i++) from[i] = value ? owner_of<1>(lane, v_slot_of(i)) : owner_of<0>(lane, i >> 1);
    }
    /* Of a number for each element: f over the tile's channels of each token, at its owners, as a tree with strides 8,
     * 4, 2, 1. A number that is all here is given to oneself. */
    template <typename function> __device__ float gather(const float (&v)[8], function f) const {
        float four[4], two[2];
#pragma unroll
        for (int i = 0; i < 4; i++)
            four[i] = f(takes[0] ? v[4 + i] : v[i], __shfl_xor_sync(ALL, takes[0] ? v[i] : v[4 + i], far[0]));
#pragma unroll
        for (int i = 0; i < 2; i++)
            two[i] = f(takes[1] ? four[2 * i + 1] : four[2 * i],
                       __shfl_xor_sync(ALL, takes[1] ? four[2 * i] : four[2 * i + 1], far[1]));
        const float one = f(takes[2] ? two[1] : two[0], __shfl_xor_sync(ALL, takes[2] ? two[0] : two[1], far[2]));
        return f(one, __shfl_xor_sync(ALL, one, far[3]));
    }
    __device__ float sum(const float (&v)[8]) const {
        return gather(v, [](float a, float b) { return a + b; });
    }
    /* To each element its token's. */
    __device__ void spread(float (&out)[8], float v) const {
        float four[4];
#pragma unroll
        for (int i = 0; i < 4; i++) four[i] = __shfl_sync(ALL, v, from[i]);
#pragma unroll
        for (int e = 0; e < 8; e++) out[e] = value ? four[e & 3] : four[e < 4 ? e & 1 : 2 + (e & 1)];
    }
    __device__ int token(int e) const { return value ? kvc_v_token(lane, e) : kvc_k_token(lane, e); }
    __device__ int channel(int e) const { return value ? kvc_v_channel(lane, e) : kvc_k_channel(lane, e); }
};

/* A lane's words of a tail page's tile: format.h's order of 16 bits. */
__device__ void unpack_tile(float (&x)[8], uint4 raw, int dtype) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < 8; e++)
        x[e] = kvc_cuda_half_to_float(
            (uint16_t)(words[kvc_code_word(16, KVC_TAIL_TOKENS, 0, e)] >> kvc_code_shift(16, 0, e)), dtype);
}

template <int TILES> __device__ void unpack_tiles(float (&x)[TILES][8], uint4 (&raw)[TILES], int dtype) {
    if (dtype != KVC_BFLOAT16) {
#pragma unroll
        for (int j = 0; j < TILES; j++) unpack_tile(x[j], raw[j], KVC_FLOAT16);
        return;
    }
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        most = largest<KVC_BFLOAT16>(largest<KVC_BFLOAT16>(raw[j].x, raw[j].y), most);
        most = largest<KVC_BFLOAT16>(largest<KVC_BFLOAT16>(raw[j].z, raw[j].w), most);
    }
    if (clamp_halves(most, KVC_BFLOAT16) != most) /* hardly ever */
#pragma unroll
        for (int j = 0; j < TILES; j++) raw[j] = clamp_words(raw[j], KVC_BFLOAT16);
#pragma unroll
    for (int j = 0; j < TILES; j++) unpack_tile(x[j], raw[j], KVC_BFLOAT16);
}

/* The sum of f(x, element) over the group's channels, at the tokens' owners. Element by element: what is added lives
 * short, and registers are dear. */
template <int TILES, typename function>
__device__ float sum_group(const float (&x)[TILES][8], const place &here, function f) {
    constexpr int BLOCK = TILES & -TILES;
    float total = 0.0f;
#pragma unroll
    for (int first = 0; first < TILES; first += BLOCK) {
        float sums[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float p[BLOCK];
#pragma unroll
            for (int j = 0; j < BLOCK; j++) p[j] = f(x[first + j][e], e);
#pragma unroll
            for (int stride = BLOCK / 2; stride >= 1; stride /= 2)
#pragma unroll
                for (int j = 0; j < BLOCK / 2; j++)
                    if (j < stride) p[j] += p[j + stride];
            sums[e] = p[0];
        }
        const float sum = here.sum(sums);
        total = first ? total + sum : sum;
    }
    return total;
}

/* ---- scales and zeros, at the tokens' owners: pack.h, step 2, of rows with the factor 1 */

template <int TILES>
__device__ void sigma_of_group(affine<1> &out, const float (&x)[TILES][8], const call &a, int bits, const place &here) {
    constexpr float CHANNELS = TILES * KVC_TILE;
    float mean[8] = {};
    out.zero[0] = 0.0f;
    if (a.layout.zero_point) {
        out.zero[0] = sum_group<TILES>(x, here, [](float value, int) { return value; }) / CHANNELS;
        here.spread(mean, out.zero[0]);
    }
    const float squares = sum_group<TILES>(x, here, [&](float value, int e) {
        const float difference = value - mean[e];
        return difference * difference;
    });
    out.scale[0] = kvc_sigma_step(bits) * sqrtf(squares / CHANNELS);
}

template <int TILES>
__device__ void range_of_group(affine<1> &out, const float (&x)[TILES][8], const call &a, int bits, const place &here) {
    float low[8], high[8];
#pragma unroll
    for (int e = 0; e < 8; e++) low[e] = high[e] = x[0][e];
#pragma unroll
    for (int j = 1; j < TILES; j++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            low[e] = fminf(low[e], x[j][e]);
            high[e] = fmaxf(high[e], x[j][e]);
        }
    float least = here.gather(low, [](float a, float b) { return fminf(a, b); });
    float most = here.gather(high, [](float a, float b) { return fmaxf(a, b); });
    if (__any_sync(ALL, least == most)) { /* zeros, whose sign is the first channel's */
        const int lane = here.lane, slot = here.value ? 2 * (lane >> 4) + (lane >> 3 & 1) : lane >> 1 & 1;
        const int mine = here.value ? (slot >> 1) + 2 * (slot & 1) : 4 * slot;
        float first = 0.0f;
#pragma unroll
        for (int e = 0; e <= 4; e++) {
            const float there = __shfl_sync(ALL, x[0][e], lane & (here.value ? 3 : 28));
            if (e == mine) first = there;
        }
        if (least == most) least = most = first;
    }
    minmax_step(out.scale[0], out.zero[0], least, most, 1.0f, bits, a.layout.zero_point);
}

/* The line of step 3, for each element's token. */
struct lines {
    float slope[8], offset[8];
    __device__ lines(const affine<1> &scales, int bits, const place &here) {
        const float mid = kvc_mid(bits);
        const line<1> at = encoder<1>(scales, {}).at(mid, 2.0f * mid);
        here.spread(slope, at.slope[0]);
        here.spread(offset, at.offset[0]);
    }
    __device__ float operator()(float y, int e) const { return __fmaf_rn(y, slope[e], offset[e]); }
};

/* What f(sums, x, element) adds to 32 chains, of which a tile has 16: even tiles' and odd ones'. */
template <int TILES, typename function>
__device__ float sum_chains(const float (&x)[TILES][8], const place &here, function f) {
    float sums[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
        float chain[2] = {};
#pragma unroll
        for (int j = 0; j < TILES; j++) f(chain[j & 1], x[j][e], e);
        sums[e] = chain[0] + chain[1];
    }
    return here.sum(sums);
}

/* From min-max's scales to search's. */
template <int TILES>
__device__ void search_group(affine<1> &out, const float (&x)[TILES][8], const call &a, int bits, const place &here) {
    constexpr int CHANNELS = TILES * KVC_TILE;
    const float symmetric[] = KVC_SEARCH_STARTS;
    const float most = 2.0f * kvc_mid(bits), half = (float)(1 << (bits - 1));
    const bool zero_point = a.layout.zero_point;
    float explained = -1.0f;
    float y = sum_chains<TILES>(x, here, [](float &sum, float value, int) { sum += value; });
    if (zero_point) y /= (float)CHANNELS;
    search_start(out.scale[0], out.zero[0], y, 1.0f, bits, CHANNELS, zero_point);
    const affine<1> range = out;
#pragma unroll 1
    for (int i = 0; i < (zero_point ? 1 : (int)(sizeof symmetric / sizeof *symmetric)); i++) {
        affine<1> start = range;
        start.scale[0] *= symmetric[i];
        const lines at(start, bits, here);
        float k[8] = {}, kk[8] = {};
        const float ky = sum_chains<TILES>(x, here, [&](float &sum, float value, int e) {
            const float code = code_of(at(value, e), most) - (MAGIC + half);
            k[e] += code;
            kk[e] = __fmaf_rn(code, code, kk[e]);
            sum = __fmaf_rn(code, value, sum);
        });
        const float now =
            refit(start.scale[0], start.zero[0], here.sum(k), here.sum(kk), ky, y, bits, CHANNELS, 1.0f, zero_point);
        if (now > explained) {
            explained = now;
            out = start;
        }
    }
}

/* ---- codes, into the stage: `to` is the lane's word of the group's first tile, `second` 8-bit codes' other one */

template <int TILES>
__device__ void put_nearest(uint32_t *to, int second, const float (&x)[TILES][8], const lines &at, int bits) {
    const float most = 2.0f * kvc_mid(bits);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        uint32_t code[8];
#pragma unroll
        for (int e = 0; e < 8; e++) code[e] = __float_as_uint(code_of(at(x[j][e], e), most));
        put_tile(to + 32 * j, second, code, bits == 8);
    }
}

/* Tile after tile of `in`, from memory once more: the same instructions for all. `noise` is the warp's; `token` and
 * `quad`: numbers of the tile's first token and of the group's first four channels. */
template <int TILES>
__device__ void put_stochastic(uint32_t *to, int second, const uint4 *in, const lines &at, int bits, const place &here,
                               const call &a, int list, int token, int quad, float *noise) {
    const float most = 2.0f * kvc_mid(bits);
#pragma unroll 1
    for (int j = 0; j < TILES; j++) {
        const int column = here.lane & 3;
#pragma unroll 1
        for (int row = here.lane >> 2; row < KVC_TILE; row += 8) {
            float u[4];
            kvc_philox_uniform4(u, a.seed, a.layer, list, 2 * (uint32_t)(token + row) + here.value,
                                quad + 4 * j + column);
            *(float4 *)(noise + KVC_TILE * row + 4 * column) = make_float4(u[0], u[1], u[2], u[3]);
        }
        __syncwarp();
        float x[8];
        uint32_t code[8];
        unpack_tile(x, clamp_words(in[32 * j], a.layout.half), a.layout.half);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float v = __fmaf_rn(at(x[e], e), most, noise[KVC_TILE * here.token(e) + here.channel(e)]);
            code[e] = (uint32_t)floorf(fminf(fmaxf(v, 0.0f), most));
        }
        put_tile(to + 32 * j, second, code, bits == 8);
        __syncwarp();
    }
}

/* ---- a page */

/* Codes into the stage, and scales into the page, of the warp's tail page, whose half is `half`. `before`: tokens of
 * the list before the first page's. */
template <int HEAD, int TILES>
__device__ void flush_tile(const call &a, const job &it, const char *half, int before, uint32_t *stage, float *noise) {
    constexpr int SECOND = STAGE_TILES * 32 * HEAD;
    const place here(it.value);
    const int lane = here.lane, tile = threadIdx.x / 32;
    const uint4 *in = (const uint4 *)half + lane;
    uint4 raw[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) raw[j] = in[32 * j];
    if constexpr (TILES < HEAD) /* the other groups' */
        for (int at = 128 * lane; at < 512 * HEAD; at += 128 * 32) prefetch(half + at);
    uint32_t *to = stage + tile * 32 * HEAD + lane;
    uint8_t *step = it.scales + kvc_scale_offset(&a.layout, KVC_PAGE_TOKENS, 0, KVC_TILE * tile + here.owned);
#pragma unroll 1
    for (int first = 0; first < HEAD; first += TILES) {
        float x[TILES][8];
        unpack_tiles<TILES>(x, raw, a.layout.half);
        if (first + TILES < HEAD)
#pragma unroll
            for (int j = 0; j < TILES; j++) raw[j] = in[32 * (first + TILES + j)];
        affine<1> scales;
        if (a.scale == KVC_SCALE_SIGMA && it.bits < 8)
            sigma_of_group<TILES>(scales, x, a, it.bits, here);
        else
            range_of_group<TILES>(scales, x, a, it.bits, here);
        if (a.scale == KVC_SCALE_SEARCH) search_group<TILES>(scales, x, a, it.bits, here);
        round_to_stored(scales, {}, a.layout, it.bits);
        const lines at(scales, it.bits, here);
        if (a.stochastic)
            put_stochastic<TILES>(to, SECOND, in + 32 * first, at, it.bits, here, a, it.list, before + KVC_TILE * tile,
                                  4 * first, noise);
        else
            put_nearest<TILES>(to, SECOND, x, at, it.bits);
        /* Owners' copies write the same once more. */
        if (a.layout.scale_dtype == KVC_STEP_E5M3)
            put_step<KVC_STEP_E5M3>(step, scales.scale[0], scales.zero[0], a.layout.zero_point);
        else
            put_step<KVC_STEP_FP16>(step, scales.scale[0], scales.zero[0], a.layout.zero_point);
        to += 32 * TILES;
        step += kvc_scale_offset(&a.layout, KVC_PAGE_TOKENS, 1, 0);
    }
}

/* Half a page from the four pages at `tail`: all but the words of what is quantized, which write_half makes of `stage`
 * behind a barrier; before the stage is written again another one has to follow. `before`: tokens of the list before
 * the first page's; `stage`: this half's, 64 * head_dim bytes; `noise`: the warp's. */
template <int HEAD, int TILES>
__device__ void read_half(const call &a, const job &it, const kvc_page *tail, int before, uint32_t *stage,
                          float *noise) {
    if (it.bits == 16)
        copy_halves<HEAD>(a, it, tail);
    else
        flush_tile<HEAD, TILES>(a, it, tail_half(a, tail[threadIdx.x / 32].unit, it.value), before, stage, noise);
    if (a.layout.scale_dtype == KVC_STEP_E5M3) clear_padding(a, it);
}

template <int HEAD> __device__ void write_half(const job &it, const uint32_t *stage) {
    if (it.bits != 16) write_tile_words<HEAD>(it.words, stage, it.bits, false);
}

} // namespace
