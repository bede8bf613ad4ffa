/* pack_rows.cuh: K and V rows in registers, 4 lanes a row: load, store, rotate, fit scales (pack.h, steps 1 and 2).
 * Everything here keeps pack.h's order of arithmetic: without contraction the results are the CPU's bits. */
#pragma once
#include "pack_job.cuh"

namespace {

/* ---- rows in and out: this lane's 4 channels of each tile of 16 */

__device__ void unpack_halves(float (&x)[4], uint2 raw, int dtype) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[i] = kvc_cuda_half_to_float((uint16_t)((i < 2 ? raw.x : raw.y) >> 16 * (i & 1)), dtype);
}

template <int TILES> __device__ void pack_halves(uint2 (&raw)[TILES], const float (&x)[TILES][4], int dtype) {
    if (dtype == KVC_BFLOAT16) {
#pragma unroll
        for (int j = 0; j < TILES; j++)
            raw[j] = make_uint2(kvc_cuda_floats_to_halves(x[j][0], x[j][1], KVC_BFLOAT16),
                                kvc_cuda_floats_to_halves(x[j][2], x[j][3], KVC_BFLOAT16));
    } else {
#pragma unroll
        for (int j = 0; j < TILES; j++)
            raw[j] = make_uint2(kvc_cuda_floats_to_halves(x[j][0], x[j][1], KVC_FLOAT16),
                                kvc_cuda_floats_to_halves(x[j][2], x[j][3], KVC_FLOAT16));
    }
}

template <int TILES> __device__ void load_row(float (&x)[TILES][4], const char *row, int dtype, bool vectors) {
    const int first = 4 * (threadIdx.x & 3);
    if (dtype == KVC_FLOAT32) {
        const float *in = (const float *)row + first;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const float4 four = vectors ? *(const float4 *)(in + 16 * j)
                                        : make_float4(in[16 * j], in[16 * j + 1], in[16 * j + 2], in[16 * j + 3]);
            x[j][0] = four.x, x[j][1] = four.y, x[j][2] = four.z, x[j][3] = four.w;
        }
        return;
    }
    const uint16_t *in = (const uint16_t *)row + first;
    uint2 raw[TILES];
    if (vectors) {
#pragma unroll
        for (int j = 0; j < TILES; j++) raw[j] = *(const uint2 *)(in + 16 * j);
    } else {
#pragma unroll
        for (int j = 0; j < TILES; j++)
            raw[j] = make_uint2(in[16 * j] | in[16 * j + 1] << 16, in[16 * j + 2] | in[16 * j + 3] << 16);
    }
    if (dtype == KVC_BFLOAT16) {
#pragma unroll
        for (int j = 0; j < TILES; j++) unpack_halves(x[j], raw[j], KVC_BFLOAT16);
    } else {
#pragma unroll
        for (int j = 0; j < TILES; j++) unpack_halves(x[j], raw[j], KVC_FLOAT16);
    }
}

template <int TILES> __device__ void store_row(char *row, const float (&x)[TILES][4], int dtype, bool vectors) {
    const int first = 4 * (threadIdx.x & 3);
    if (dtype == KVC_FLOAT32) {
        float *out = (float *)row + first;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            if (vectors)
                *(float4 *)(out + 16 * j) = make_float4(x[j][0], x[j][1], x[j][2], x[j][3]);
            else
                for (int i = 0; i < 4; i++) out[16 * j + i] = x[j][i];
        }
        return;
    }
    uint2 raw[TILES];
    pack_halves<TILES>(raw, x, dtype);
    uint16_t *out = (uint16_t *)row + first;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        if (vectors)
            *(uint2 *)(out + 16 * j) = raw[j];
        else
            for (int i = 0; i < 4; i++) out[16 * j + i] = (uint16_t)((i < 2 ? raw[j].x : raw[j].y) >> 16 * (i & 1));
    }
}

/* ---- arithmetic on rows: 4 lanes a row, in pack.h's order */

/* To +-2^96, which hardly any row reaches. */
template <int TILES> __device__ void clamp_row(float (&x)[TILES][4]) {
    float most = 0;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) most = fmaxf(most, fabsf(x[j][i]));
    if (most <= 0x1p96f) return;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[j][i] = fminf(fmaxf(x[j][i], -0x1p96f), 0x1p96f);
}

template <int TILES> __device__ void rotate_row(float (&x)[TILES][4]) {
    constexpr int BLOCK = (TILES & -TILES) * KVC_TILE;
    /* other + own or other - own: the product with 1 or -1 is exact, so this is one rounding. */
    const float signs[2] = {threadIdx.x & 1 ? -1.0f : 1.0f, threadIdx.x & 2 ? -1.0f : 1.0f};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int stride = 1; stride <= 2; stride *= 2)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!(i & stride)) {
                    const float a = x[j][i], b = x[j][i + stride];
                    x[j][i] = a + b;
                    x[j][i + stride] = a - b;
                }
#pragma unroll
        for (int stride = 1; stride <= 2; stride *= 2) /* of lanes: 4 and 8 channels */
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[j][i] = __fmaf_rn(x[j][i], signs[stride - 1], __shfl_xor_sync(ALL, x[j][i], stride));
    }
#pragma unroll
    for (int stride = 1; stride < BLOCK / KVC_TILE; stride *= 2)
#pragma unroll
        for (int j = 0; j < TILES; j++)
            if (!(j & stride))
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float a = x[j][i], b = x[j + stride][i];
                    x[j][i] = a + b;
                    x[j + stride][i] = a - b;
                }
    const float norm = 1.0f / sqrtf((float)BLOCK);
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[j][i] *= norm;
}

/* One number a group of channels, in each of the row's lanes. GROUPS is 1 (one group: the fast case) or TILES (any
 * group; every tile then has its group's number). */
struct grouping {
    int channels;
    int block_tiles;      /* tiles of the largest power of two dividing the group */
    uint32_t block_heads; /* bit j: a block begins at tile j */
    uint32_t group_heads; /* bit j: a group begins at tile j */
};

template <int GROUPS> __device__ bool begins(const grouping &g, int k) {
    return GROUPS == 1 || (g.group_heads >> k & 1);
}

/* v = f(v), computed once a group. */
template <int GROUPS, typename function> __device__ void each_group(float (&v)[GROUPS], const grouping &g, function f) {
#pragma unroll
    for (int k = 0; k < GROUPS; k++) v[k] = begins<GROUPS>(g, k) ? f(v[k]) : v[k ? k - 1 : 0];
}

/* Sums of p over each group; p is used up. */
template <int TILES, int GROUPS>
__device__ void sum_groups(float (&out)[GROUPS], float (&p)[TILES][4], const grouping &g) {
    constexpr int WHOLE_BLOCK = TILES & -TILES;
    const int block_tiles = GROUPS == 1 ? WHOLE_BLOCK : g.block_tiles;
#pragma unroll
    for (int stride = WHOLE_BLOCK / 2; stride >= 1; stride /= 2)
        if (stride < block_tiles)
#pragma unroll
            for (int j = 0; j < TILES; j++)
                if (GROUPS == 1 ? j % WHOLE_BLOCK < stride : !(j & stride))
#pragma unroll
                    for (int i = 0; i < 4; i++) p[j][i] += p[j + stride][i];
    float total = 0;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        if (GROUPS == 1 ? j % WHOLE_BLOCK == 0 : g.block_heads >> j & 1) {
#pragma unroll
            for (int stride = 2; stride >= 1; stride /= 2) /* of lanes: 8 and 4 channels */
#pragma unroll
                for (int i = 0; i < 4; i++) p[j][i] += __shfl_xor_sync(ALL, p[j][i], stride);
            const float sum = (p[j][0] + p[j][2]) + (p[j][1] + p[j][3]);
            total = (GROUPS == 1 ? j == 0 : begins<GROUPS>(g, j)) ? sum : total + sum;
        }
        out[GROUPS == 1 ? 0 : j] = total;
    }
    if constexpr (GROUPS > 1)
#pragma unroll
        for (int j = TILES - 2; j >= 0; j--)
            if (!begins<GROUPS>(g, j + 1)) out[j] = out[j + 1];
}

/* Least and greatest of each group. Where they are equal, the group's first channel: of zeros it gives the sign. */
template <int TILES, int GROUPS>
__device__ void range_groups(float (&low)[GROUPS], float (&high)[GROUPS], const float (&x)[TILES][4],
                             const grouping &g) {
    float begin[GROUPS];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        const float least = fminf(fminf(x[j][0], x[j][1]), fminf(x[j][2], x[j][3]));
        const float most = fmaxf(fmaxf(x[j][0], x[j][1]), fmaxf(x[j][2], x[j][3]));
        const int k = GROUPS == 1 ? 0 : j, before = GROUPS == 1 || j == 0 ? 0 : j - 1;
        const bool first = GROUPS == 1 ? j == 0 : begins<GROUPS>(g, j);
        low[k] = first ? least : fminf(low[before], least);
        high[k] = first ? most : fmaxf(high[before], most);
        begin[k] = first ? x[j][0] : begin[before];
    }
#pragma unroll
    for (int k = GROUPS - 1; k >= 0; k--) {
        if (k + 1 < GROUPS && !begins<GROUPS>(g, k + 1)) {
            low[k] = low[(k + 1) % GROUPS];
            high[k] = high[(k + 1) % GROUPS];
            continue;
        }
#pragma unroll
        for (int stride = 1; stride <= 2; stride *= 2) {
            low[k] = fminf(low[k], __shfl_xor_sync(ALL, low[k], stride));
            high[k] = fmaxf(high[k], __shfl_xor_sync(ALL, high[k], stride));
        }
        begin[k] = __shfl_sync(ALL, begin[k], threadIdx.x & 28); /* of the row's first lane */
        if (low[k] == high[k]) low[k] = high[k] = begin[k];
    }
}

/* fp32 rounded to fp16 and back, saturated. */
__device__ float stored(float value) { return __half2float(__float2half_rn(fminf(fmaxf(value, -65504.0f), 65504.0f))); }

template <int GROUPS> struct affine {
    float scale[GROUPS], zero[GROUPS];
};

/* kvc_e5m3_round, once a group. */
template <int GROUPS> __device__ void round_to_e5m3(affine<GROUPS> &v, const grouping &g) {
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        if (begins<GROUPS>(g, k)) {
            kvc_e5m3_round(&v.scale[k], &v.zero[k]);
        } else {
            v.scale[k] = v.scale[k ? k - 1 : 0];
            v.zero[k] = v.zero[k ? k - 1 : 0];
        }
    }
}

template <int TILES, int GROUPS>
__device__ void fit_sigma(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a, const grouping &g, int bits) {
    float p[TILES][4];
    const float n = (float)(GROUPS == 1 ? TILES * KVC_TILE : g.channels);
    if (a.layout.zero_point) {
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) p[j][i] = x[j][i];
        sum_groups<TILES, GROUPS>(out.zero, p, g);
        each_group(out.zero, g, [=](float sum) { return sum / n; });
    } else {
#pragma unroll
        for (int k = 0; k < GROUPS; k++) out.zero[k] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float difference = x[j][i] - out.zero[j % GROUPS];
            p[j][i] = difference * difference;
        }
    sum_groups<TILES, GROUPS>(out.scale, p, g);
    each_group(out.scale, g, [=](float sum) { return kvc_sigma_step(bits) * sqrtf(sum / n); });
}

template <int TILES, int GROUPS>
__device__ void fit_minmax(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a, const grouping &g,
                           int bits) {
    const float levels = (float)((1 << bits) - 1);
    float low[GROUPS], high[GROUPS];
    range_groups<TILES, GROUPS>(low, high, x, g);
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        const float most = -low[k] > high[k] ? -low[k] : high[k];
        out.zero[k] = a.layout.zero_point ? (low[k] + high[k]) * 0.5f : 0.0f;
        out.scale[k] = a.layout.zero_point ? high[k] - low[k] : most + most;
    }
    each_group(out.scale, g, [=](float range) { return range / levels; });
}

/* (x - zero) * inverse + mid. */
template <int GROUPS> struct encoder {
    float zero[GROUPS], inverse[GROUPS];
    __device__ encoder(const affine<GROUPS> &a, const grouping &g) {
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            zero[k] = a.zero[k];
            inverse[k] = a.scale[k];
        }
        each_group(inverse, g, [](float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; });
    }
    __device__ float operator()(float x, int j, float mid) const {
        return (x - zero[j % GROUPS]) * inverse[j % GROUPS] + mid;
    }
};

constexpr float MAGIC = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits of the sum */

__constant__ const float search_factors[KVC_SIGMA_FACTORS + KVC_MINMAX_FACTORS] = KVC_SEARCH_FACTORS;

template <int TILES, int GROUPS, int STEP>
__device__ void fit_search(affine<GROUPS> &best, const float (&x)[TILES][4], const call &a, const grouping &g,
                           int bits) {
    const float mid = kvc_mid(bits), most = 2.0f * mid;
    float least[GROUPS];
    affine<GROUPS> base;
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        least[k] = INFINITY;
        best.scale[k] = best.zero[k] = 0.0f;
    }
    if (bits < 8) fit_sigma<TILES, GROUPS>(base, x, a, g, bits);
#pragma unroll 1
    for (int trial = bits < 8 ? 0 : KVC_SIGMA_FACTORS; trial < KVC_SIGMA_FACTORS + KVC_MINMAX_FACTORS; trial++) {
        if (trial == KVC_SIGMA_FACTORS) fit_minmax<TILES, GROUPS>(base, x, a, g, bits);
        affine<GROUPS> tried;
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            tried.scale[k] = base.scale[k] * search_factors[trial];
            tried.zero[k] = base.zero[k];
        }
        if constexpr (STEP == KVC_STEP_E5M3)
            round_to_e5m3(tried, g);
        else
#pragma unroll
            for (int k = 0; k < GROUPS; k++) {
                tried.scale[k] = stored(tried.scale[k]);
                tried.zero[k] = stored(tried.zero[k]);
            }
        const encoder<GROUPS> encode(tried, g);
        float p[TILES][4], errors[GROUPS];
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float code = (fminf(fmaxf(encode(x[j][i], j, mid), 0.0f), most) + MAGIC) - MAGIC;
                const float error = tried.zero[j % GROUPS] + tried.scale[j % GROUPS] * (code - mid) - x[j][i];
                p[j][i] = error * error;
            }
        sum_groups<TILES, GROUPS>(errors, p, g);
#pragma unroll
        for (int k = 0; k < GROUPS; k++)
            if (errors[k] < least[k]) {
                least[k] = errors[k];
                best.scale[k] = tried.scale[k];
                best.zero[k] = tried.zero[k];
            }
    }
}

template <int TILES, int GROUPS, bool SEARCH, int STEP>
__device__ void fit(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a, const grouping &g, int bits) {
    if constexpr (SEARCH) {
        fit_search<TILES, GROUPS, STEP>(out, x, a, g, bits);
    } else {
        if (a.scale == KVC_SCALE_MINMAX || bits >= 8)
            fit_minmax<TILES, GROUPS>(out, x, a, g, bits);
        else
            fit_sigma<TILES, GROUPS>(out, x, a, g, bits);
        if constexpr (STEP == KVC_STEP_E5M3) {
            round_to_e5m3(out, g);
        } else {
            each_group(out.scale, g, stored);
            each_group(out.zero, g, stored);
        }
    }
}

} // namespace
