/* append_flush.cuh: four full tail pages of a list become one page of 64 tokens; the CPU's bytes. A block's threads are
 * (128, 2): as pack.cu's for K, and for V. */
#pragma once
#include "append_token.cuh"
#include "pack_stage.cuh"
#include "pack_steps.cuh"

namespace {

constexpr int TAIL_PAGES = KVC_PAGE_TOKENS / KVC_TAIL_TOKENS;

/* A token of a tail page's half, this lane's 4 channels of each tile of 16. */
template <int TILES>
__device__ void gather_row(float (&x)[TILES][4], const char *half, bool value, int token, int dtype) {
    const int channel = 4 * (threadIdx.x & 3);
    uint2 raw[TILES];
    if (value) {
        int at[4];
#pragma unroll
        for (int i = 0; i < 4; i++) at[i] = token_row<TILES>::place(kvc_place_v(token, channel + i));
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const uint16_t *in = (const uint16_t *)half + 256 * j;
            raw[j] = make_uint2(in[at[0]] | in[at[1]] << 16, in[at[2]] | in[at[3]] << 16);
        }
    } else {
        const int even = token_row<TILES>::place(kvc_place_k(token, channel));
        const int odd = token_row<TILES>::place(kvc_place_k(token, channel + 1));
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const uint16_t *in = (const uint16_t *)half + 256 * j;
            const uint32_t a = *(const uint32_t *)(in + even), b = *(const uint32_t *)(in + odd);
            raw[j] = make_uint2(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
        }
    }
    if (dtype == KVC_BFLOAT16) {
#pragma unroll
        for (int j = 0; j < TILES; j++) unpack_halves(x[j], raw[j], KVC_BFLOAT16);
    } else {
#pragma unroll
        for (int j = 0; j < TILES; j++) unpack_halves(x[j], raw[j], KVC_FLOAT16);
    }
}

/* Two values clamped to +-2^96, which only bfloat16 passes. */
__device__ uint32_t clamp_halves(uint32_t two, int dtype) {
    if (dtype != KVC_BFLOAT16) return two;
    constexpr uint32_t most = 0x6f80;
#pragma unroll
    for (int shift = 0; shift < 32; shift += 16)
        if ((two >> shift & 0x7fffu) > most) two = (two & ~(0x7fffu << shift)) | most << shift;
    return two;
}

/* The K or V half of a tail page. */
__device__ const char *tail_half(const call &a, uint32_t unit, int value) {
    return (const char *)a.arena + (int64_t)unit * KVC_UNIT + (value ? a.tail_half_bytes : 0);
}

/* A half that stays at 16 bits: word R of a lane's tile t becomes word 4*R + t. */
template <int TILES> __device__ void copy_halves(const call &a, const job &it, const kvc_page *tail) {
    for (int at = threadIdx.x; at < 32 * TILES; at += THREADS) {
        uint4 in[TAIL_PAGES];
#pragma unroll
        for (int t = 0; t < TAIL_PAGES; t++) {
            const uint4 four = ((const uint4 *)tail_half(a, tail[t].unit, it.value))[at];
            const int dtype = a.layout.half;
            in[t] = make_uint4(clamp_halves(four.x, dtype), clamp_halves(four.y, dtype), clamp_halves(four.z, dtype),
                               clamp_halves(four.w, dtype));
        }
        uint4 *out = (uint4 *)(it.words + kvc_word_index(16, KVC_PAGE_TOKENS, at / 32, at % 32, 0));
        out[0] = make_uint4(in[0].x, in[1].x, in[2].x, in[3].x);
        out[32] = make_uint4(in[0].y, in[1].y, in[2].y, in[3].y);
        out[64] = make_uint4(in[0].z, in[1].z, in[2].z, in[3].z);
        out[96] = make_uint4(in[0].w, in[1].w, in[2].w, in[3].w);
    }
}

/* A call costs little beside a search, or many groups, and would cost the rest registers. */
template <int TILES, int GROUPS, bool SEARCH, int STEP>
__device__ __noinline__ void fit_apart(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a,
                                       const grouping &g, int bits) {
    fit<TILES, GROUPS, SEARCH, STEP>(out, x, a, g, bits);
}

template <int TILES, int GROUPS, int STEP>
__device__ void fit_step(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a, const grouping &g, int bits) {
    if (a.scale == KVC_SCALE_SEARCH)
        fit_apart<TILES, GROUPS, true, STEP>(out, x, a, g, bits);
    else if constexpr (GROUPS == 1)
        fit<TILES, GROUPS, false, STEP>(out, x, a, g, bits);
    else
        fit_apart<TILES, GROUPS, false, STEP>(out, x, a, g, bits);
}

/* The bytes of `it`'s half of a page, from the four pages at `tail`; `before`: tokens of the list before them. `stage`:
 * this half's, 64 * head_dim bytes. A barrier has to follow. */
template <int TILES, int GROUPS>
__device__ void flush_half(const call &a, const grouping &g, const job &it, const kvc_page *tail, int before,
                           uint8_t *stage) {
    if (it.bits == 16) {
        copy_halves<TILES>(a, it, tail);
    } else {
        const float mid = kvc_mid(it.bits), most = 2.0f * mid;
#pragma unroll 1
        for (int first = 0; first < KVC_PAGE_TOKENS; first += THREADS / 4) {
            const int row = first + threadIdx.x / 4;
            float x[TILES][4];
            gather_row<TILES>(x, tail_half(a, tail[row / KVC_TAIL_TOKENS].unit, it.value), it.value,
                              row % KVC_TAIL_TOKENS, a.layout.half);
            clamp_row<TILES>(x);
            affine<GROUPS> scales;
            if (a.layout.scale_dtype == KVC_STEP_E5M3)
                fit_step<TILES, GROUPS, KVC_STEP_E5M3>(scales, x, a, g, it.bits);
            else
                fit_step<TILES, GROUPS, KVC_STEP_FP16>(scales, x, a, g, it.bits);
            const encoder<GROUPS> encode(scales, g);
            const spots to(it.value, row);
            if (it.value)
                put_codes<TILES, GROUPS, 1>(stage, to, x, encode, mid, most, a, it.list, before + row);
            else
                put_codes<TILES, GROUPS, 0>(stage, to, x, encode, mid, most, a, it.list, before + row);
#pragma unroll
            for (int k = 0, group = 0; k < GROUPS; k++) {
                if (!begins<GROUPS>(g, k) || threadIdx.x & 3) continue;
                uint8_t *step = it.scales + kvc_scale_offset(&a.layout, KVC_PAGE_TOKENS, group++, row);
                if (a.layout.scale_dtype == KVC_STEP_E5M3)
                    put_step<KVC_STEP_E5M3>(step, scales.scale[k], scales.zero[k], a.layout.zero_point);
                else
                    put_step<KVC_STEP_FP16>(step, scales.scale[k], scales.zero[k], a.layout.zero_point);
            }
        }
    }
    if (a.layout.scale_dtype == KVC_STEP_E5M3) clear_padding(a, it);
    __syncthreads();
    switch (it.bits) {
    case 2: write_words<2, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value); break;
    case 3: write_words<3, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value); break;
    case 4: write_words<4, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value); break;
    case 8: write_words<8, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value); break;
    default: break;
    }
}

} // namespace
