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
template <int N, int EACH> __device__ void clamp_row(float (&x)[N][EACH]) {
    float most = 0;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int i = 0; i < EACH; i++) most = fmaxf(most, fabsf(x[j][i]));
    if (most <= 0x1p96f) return;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int i = 0; i < EACH; i++) x[j][i] = fminf(fmaxf(x[j][i], -0x1p96f), 0x1p96f);
}

/* Hadamard sums, not yet normalized, of EACH neighbouring channels of every 4 * EACH. */
template <int N, int EACH> __device__ void butterflies(float (&x)[N][EACH]) {
    /* other + own or other - own: the product with 1 or -1 is exact, so this is one rounding. */
    const float signs[2] = {threadIdx.x & 1 ? -1.0f : 1.0f, threadIdx.x & 2 ? -1.0f : 1.0f};
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
        for (int stride = 1; stride < EACH; stride *= 2)
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (!(i & stride)) {
                    const float a = x[j][i], b = x[j][i + stride];
                    x[j][i] = a + b;
                    x[j][i + stride] = a - b;
                }
#pragma unroll
        for (int stride = 1; stride <= 2; stride *= 2) /* of lanes: EACH and 2 * EACH channels */
#pragma unroll
            for (int i = 0; i < EACH; i++)
                x[j][i] = __fmaf_rn(x[j][i], signs[stride - 1], __shfl_xor_sync(ALL, x[j][i], stride));
    }
#pragma unroll
    for (int stride = 1; stride < (N & -N); stride *= 2)
#pragma unroll
        for (int j = 0; j < N; j++)
            if (!(j & stride))
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const float a = x[j][i], b = x[j + stride][i];
                    x[j][i] = a + b;
                    x[j + stride][i] = a - b;
                }
}

/* 1 / sqrt(channels of a Hadamard block). */
template <int TILES> __device__ float block_norm() { return 1.0f / sqrtf((float)((TILES & -TILES) * KVC_TILE)); }

template <int N, int EACH> __device__ void rotate_row(float (&x)[N][EACH]) {
    butterflies(x);
    const float norm = block_norm<N * EACH / 4>();
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int i = 0; i < EACH; i++) x[j][i] *= norm;
}

constexpr float MAGIC = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the low bits of the sum */
constexpr uint32_t MAGIC_BITS = 0x4b400000;

/* What y of pack.h is to be multiplied by, and where the row before the rotation tells mean and sigma, what it tells.
 */
struct row_facts {
    float factor = 1.0f, first = 0.0f, first_unit = 0.0f, squares = 0.0f; /* x[0], x[0] / unit, the sum of squares */
    bool whole = false;                                                   /* the last three are there */
};

/* Step 1 of pack.h for classes below 16. x is clamped. */
template <int TILES, int GROUPS> __device__ void rotate_exactly(float (&x)[TILES][4], row_facts &f, bool zero_point) {
    f.whole = GROUPS == 1 && (TILES & (TILES - 1)) == 0;
    f.first = __shfl_sync(ALL, x[0][0], threadIdx.x & 28);
    if (f.whole) {
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float v = i == 0 && j == 0 && zero_point && (threadIdx.x & 3) == 0 ? 0.0f : x[j][i];
                sums[j & 1] = __fmaf_rn(v, v, sums[j & 1]);
            }
#pragma unroll
        for (int stride = 1; stride <= 2; stride *= 2)
#pragma unroll
            for (int k = 0; k < 2; k++) sums[k] += __shfl_xor_sync(ALL, sums[k], stride);
        f.squares = sums[0] + sums[1];
    }
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) most = fmaxf(most, fabsf(x[j][i]));
#pragma unroll
    for (int stride = 1; stride <= 2; stride *= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, stride));
    const float unit = kvc_row_unit(most), inverse = kvc_power_inverse(unit);
    f.first_unit = f.first * inverse;
    f.factor = unit * block_norm<TILES>();
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[j][i] = (x[j][i] * inverse + MAGIC) - MAGIC;
    butterflies(x);
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

/* Sums of w * x, or (PLAIN) of x, over each group: 32 chains over pairs of tiles, then strides 16, 8, 4, 2, 1. */
template <int TILES, int GROUPS, bool PLAIN>
__device__ void sum_groups_32(float (&out)[GROUPS], const float (&w)[TILES][4], const float (&x)[TILES][4],
                              const grouping &g) {
    float chain[2][4]; /* even and odd tiles: which of them the group begins with shows nowhere */
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        const bool first = GROUPS == 1 ? j == 0 : begins<GROUPS>(g, j);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (first) chain[0][i] = chain[1][i] = 0.0f;
            chain[j & 1][i] = PLAIN ? chain[j & 1][i] + x[j][i] : __fmaf_rn(w[j][i], x[j][i], chain[j & 1][i]);
        }
        if (GROUPS == 1 ? j + 1 < TILES : j + 1 < TILES && !begins<GROUPS>(g, j + 1)) continue;
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sums[i] = chain[0][i] + chain[1][i];
            sums[i] += __shfl_xor_sync(ALL, sums[i], 2);
            sums[i] += __shfl_xor_sync(ALL, sums[i], 1);
        }
        out[GROUPS == 1 ? 0 : j] = (sums[0] + sums[2]) + (sums[1] + sums[3]);
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
template <int GROUPS> __device__ void round_to_e5m3(affine<GROUPS> &v, const grouping &g, int bits) {
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        if (begins<GROUPS>(g, k)) {
            kvc_e5m3_round(&v.scale[k], &v.zero[k], bits);
        } else {
            v.scale[k] = v.scale[k ? k - 1 : 0];
            v.zero[k] = v.zero[k ? k - 1 : 0];
        }
    }
}

/* sigma's, of a row that is one block and one group. */
template <int TILES>
__device__ void sigma_of_facts(float &scale, float &zero, const row_facts &f, int bits, bool zero_point) {
    zero = zero_point ? f.first * block_norm<TILES>() : 0.0f;
    scale = kvc_sigma_step(bits) * sqrtf(f.squares / (float)(TILES * KVC_TILE));
}

__device__ void minmax_step(float &scale, float &zero, float low, float high, float factor, int bits, bool zero_point) {
    const float levels = (float)((1 << bits) - 1), most = -low > high ? -low : high;
    zero = zero_point ? (low + high) * 0.5f * factor : 0.0f;
    scale = (zero_point ? high - low : most + most) * factor / levels;
}

template <int TILES, int GROUPS>
__device__ void fit_sigma(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a, const grouping &g, int bits,
                          const row_facts &f) {
    const float n = (float)(GROUPS == 1 ? TILES * KVC_TILE : g.channels), factor = f.factor;
    if (GROUPS == 1 && f.whole) {
        sigma_of_facts<TILES>(out.scale[0], out.zero[0], f, bits, a.layout.zero_point);
        return;
    }
    float p[TILES][4];
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
    each_group(out.scale, g, [=](float sum) { return kvc_sigma_step(bits) * (sqrtf(sum / n) * factor); });
#pragma unroll
    for (int k = 0; k < GROUPS; k++) out.zero[k] *= factor;
}

template <int TILES, int GROUPS>
__device__ void fit_minmax(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a, const grouping &g, int bits,
                           float factor) {
    float low[GROUPS], high[GROUPS];
    range_groups<TILES, GROUPS>(low, high, x, g);
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        if (begins<GROUPS>(g, k)) {
            minmax_step(out.scale[k], out.zero[k], low[k], high[k], factor, bits, a.layout.zero_point);
        } else {
            out.scale[k] = out.scale[k ? k - 1 : 0];
            out.zero[k] = out.zero[k ? k - 1 : 0];
        }
    }
}

/* Step 3 of pack.h: v = fma(y, slope, offset). */
template <int GROUPS> struct line {
    float slope[GROUPS], offset[GROUPS];
    __device__ float operator()(float y, int j) const { return __fmaf_rn(y, slope[j % GROUPS], offset[j % GROUPS]); }
};

template <int GROUPS> struct encoder {
    float zero[GROUPS], inverse[GROUPS], factor;
    __device__ encoder(const affine<GROUPS> &a, const grouping &g, float factor = 1.0f) : factor(factor) {
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            zero[k] = a.zero[k];
            inverse[k] = a.scale[k];
        }
        each_group(inverse, g, [](float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; });
    }
    /* mid 0: no token; its zeros become code 0. */
    __device__ line<GROUPS> at(float mid, float most) const {
        const float step = most == 15.0f  ? 1.0f / 15.0f
                           : most == 3.0f ? 1.0f / 3.0f
                           : most == 7.0f ? 1.0f / 7.0f
                                          : 1.0f / 255.0f;
        line<GROUPS> out;
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            const float per = inverse[k] * step;
            out.slope[k] = per * factor;
            out.offset[k] = mid > 0.0f ? __fmaf_rn(-zero[k], per, 0.5f) : 0.0f;
        }
        return out;
    }
};

/* v of step 3, clamped, as a code in the low bits of a float: MAGIC more than the code. */
__device__ float code_of(float v, float most) { return __fmaf_rn(__saturatef(v), most, MAGIC); }

template <int GROUPS>
__device__ void round_to_stored(affine<GROUPS> &v, const grouping &g, const kvc_layout &layout, int bits) {
    if (layout.scale_dtype == KVC_STEP_E5M3) {
        round_to_e5m3(v, g, bits);
    } else {
        each_group(v.scale, g, stored);
        each_group(v.zero, g, stored);
    }
}

/* Where search starts, from min-max's scale and zero. */
__device__ void search_start(float &scale, float &zero, float mean, float factor, int bits, int channels,
                             bool zero_point) {
    const float part = kvc_search_mean(bits, channels);
    scale *= kvc_search_factor(bits, channels, zero_point);
    if (zero_point && part > 0.0f) zero = __fmaf_rn(part, mean * factor - zero, zero);
}

/* From a start to (nearly) the scale and zero of least squared error for its codes; y: the mean, or (symmetric) the
 * sum. Gives what the fit explains of the squares, or -1, where there is none and the start stays. */
__device__ float refit(float &scale, float &zero, float k, float kk, float ky, float y, int bits, int channels,
                       float factor, bool zero_point) {
    const float n = (float)channels, m = k / n, c = zero_point ? __fmaf_rn(-k, y, ky) : __fmaf_rn(0.5f, y, ky);
    const float t = c / (zero_point ? __fmaf_rn(-m, k, kk) : kk + k + 0.25f * n), fit = t * factor;
    if (!(t > 0.0f && fit > 0.0f && fit < INFINITY)) return -1.0f;
    const float step = kvc_search_step(scale, fit, bits, channels, zero_point);
    if (zero_point) zero = __fmaf_rn(step, __fmaf_rn(-t, m + 0.5f, y) * factor - zero, zero);
    scale = __fmaf_rn(step, fit - scale, scale);
    return c * t;
}

template <int TILES, int GROUPS>
__device__ void fit_search(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a, const grouping &g, int bits,
                           const row_facts &f) {
    const float symmetric[] = KVC_SEARCH_STARTS;
    const int channels = GROUPS == 1 ? TILES * KVC_TILE : g.channels;
    const float n = (float)channels, mid = kvc_mid(bits), most = 2.0f * mid, half = (float)(1 << (bits - 1));
    const bool zero_point = a.layout.zero_point;
    const int starts = zero_point ? 1 : (int)(sizeof symmetric / sizeof *symmetric);
    float y[GROUPS], explained[GROUPS];
    if (zero_point && GROUPS == 1 && f.whole) {
        y[0] = f.first_unit;
    } else {
        sum_groups_32<TILES, GROUPS, true>(y, x, x, g);
        if (zero_point) each_group(y, g, [=](float sum) { return sum / n; });
    }
    affine<GROUPS> range;
    fit_minmax<TILES, GROUPS>(range, x, a, g, bits, f.factor);
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        search_start(range.scale[k], range.zero[k], y[k], f.factor, bits, channels, zero_point);
        explained[k] = -1.0f;
    }
    out = range;
#pragma unroll 1
    for (int i = 0; i < starts; i++) {
        affine<GROUPS> start = range;
#pragma unroll
        for (int k = 0; k < GROUPS; k++) start.scale[k] *= symmetric[i];
        const line<GROUPS> at = encoder<GROUPS>(start, g, f.factor).at(mid, most);
        float codes[TILES][4], k[GROUPS], kk[GROUPS], ky[GROUPS];
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) codes[j][e] = code_of(at(x[j][e], j), most) - (MAGIC + half);
        sum_groups_32<TILES, GROUPS, false>(ky, codes, x, g);
        sum_groups_32<TILES, GROUPS, false>(kk, codes, codes, g);
        sum_groups_32<TILES, GROUPS, true>(k, codes, codes, g);
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            if (begins<GROUPS>(g, j)) {
                const float now = refit(start.scale[j], start.zero[j], k[j], kk[j], ky[j], y[j], bits, channels,
                                        f.factor, zero_point);
                if (now > explained[j]) {
                    explained[j] = now;
                    out.scale[j] = start.scale[j];
                    out.zero[j] = start.zero[j];
                }
            } else {
                out.scale[j] = out.scale[j ? j - 1 : 0];
                out.zero[j] = out.zero[j ? j - 1 : 0];
            }
        }
    }
    round_to_stored(out, g, a.layout, bits);
}

template <int TILES, int GROUPS, bool SEARCH>
__device__ void fit(affine<GROUPS> &out, const float (&x)[TILES][4], const call &a, const grouping &g, int bits,
                    const row_facts &f) {
    if constexpr (SEARCH) {
        fit_search<TILES, GROUPS>(out, x, a, g, bits, f);
    } else {
        if (a.scale == KVC_SCALE_MINMAX || bits >= 8)
            fit_minmax<TILES, GROUPS>(out, x, a, g, bits, f.factor);
        else
            fit_sigma<TILES, GROUPS>(out, x, a, g, bits, f);
        round_to_stored(out, g, a.layout, bits);
    }
}

} // namespace
