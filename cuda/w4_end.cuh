/* w4_end.cuh: sums of a warp become elements of out. */
#pragma once
#include "w4_ptx.cuh"

namespace {

/* How sums of 16 rows of W from n0 on become elements of out. */
struct w4_end {
    float factor, bias[2]; /* of this lane's rows r and r + 8 */
    int n0;
    bool wide; /* whether four elements may be written at once */
};

/* `factor`: of sums, beside the one of their matrix. */
__device__ __forceinline__ w4_end w4_end_of(const w4_job &a, float factor, int n0, int lane) {
    int part = 0;
#pragma unroll
    for (int i = 0; i < KVC_W4_MOST_PARTS - 1; i++) part += n0 >= a.begins[i];
    w4_end end = {a.factors[part] * factor, {0.0f, 0.0f}, n0, false};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int n = n0 + (lane >> 2) + 8 * i;
        if (a.bias && n < a.n) end.bias[i] = w4_load(a.bias, a.bias_dtype, n);
    }
    end.wide = (a.out_stride | (int64_t)(intptr_t)a.out) % 8 == 0;
    return end;
}

/* Sums of 16 rows of W and 8 rows of x from m0 on, as m16n8k16 and wgmma leave them in a warp, to out. */
__device__ __forceinline__ void w4_store_sums(const w4_job &a, const w4_end &end, float s0, float s1, float s2,
                                              float s3, int m0, int lane) {
    const int r = lane >> 2, c = lane & 3;
    const float v[4] = {s0 * end.factor + end.bias[0], s1 * end.factor + end.bias[0], s2 * end.factor + end.bias[1],
                        s3 * end.factor + end.bias[1]};
    if (a.out_dtype == KVC_FLOAT32) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int m = m0 + 2 * c + (e & 1), n = end.n0 + r + 8 * (e >> 1);
            if (m < a.m && n < a.n) ((float *)(a.out + m * a.out_stride))[n] = v[e];
        }
        return;
    }
    /* Rows of W become neighbours: a lane has x's row r, then four rows of W after an exchange with its neighbour. */
    uint32_t low = kvc_cuda_floats_to_halves(v[0], v[1], a.out_dtype);
    uint32_t high = kvc_cuda_floats_to_halves(v[2], v[3], a.out_dtype);
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%0;" : "+r"(low));
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%0;" : "+r"(high));
    const bool odd = c & 1;
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
    const uint2 four = odd ? make_uint2(got, high) : make_uint2(low, got);
    const int m = m0 + r, n = end.n0 + (odd ? 6 + 2 * c : 2 * c);
    if (m >= a.m) return;
    uint16_t *const to = (uint16_t *)(a.out + m * a.out_stride) + n;
    if (end.wide && n + 3 < a.n) {
        *(uint2 *)to = four;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (n + i < a.n) to[i] = (uint16_t)((i < 2 ? four.x : four.y) >> (16 * (i & 1)));
    }
}

} // namespace
