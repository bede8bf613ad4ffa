/* score_job.cuh: what score's kernels are told, and what both kinds do with logits: score.cu's, for every architecture,
 * and score_wgmma.cuh's, for sm_90a.
 *
 * A lane has x[m][n][i] of a warp's products: row lane / 4 + 8 * (i >> 1) of the m-th 16 rows held, column
 * 2 * (lane & 3) + (i & 1) of the n-th 8 rows that pass by. */
#pragma once
#include "score_common.cuh"
#include "score_tile.cuh"

extern "C" {
#include "cpu/score_check.h"
}

#include <limits.h>
#include <math_constants.h>

namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float MOST_SUM = 0x1p64f; /* of 2^(x - reference): beyond it the reference moves */

struct rows_view {
    const char *data;
    int64_t sequence, head, token; /* strides in bytes */
    int type;
    bool pieces;
};

struct call {
    rows_view queries, keys;
    const int32_t *first;
    float *importance;
    float2 *parts; /* (lists, group * w, key_parts): reference, sum */
    float2 *rows;  /* (lists, padded): reference, 1 / denominator; zeros behind the real rows */
    float *sums;   /* (lists, row_parts, s) */
    int lists, heads, group, w, s;
    int padded;              /* group * w, up to a multiple of 64 */
    uint32_t group_inverse;  /* 2^32 / group, rounded down */
    int key_parts, key_step; /* of the keys in the first pass, and the tiles of each */
    int row_parts, row_step; /* of the rows in the second */
    float scale;             /* of products, to bits */
    bool capped;
    float inner, outer; /* capped: the logit in bits is outer * tanh(product * inner), and scale is 1 */
    int reduce, pool_kind, pool;
};

/* One (sequence, KV head). */
struct list_view {
    int first, used, rows; /* first real token; window queries that are real; group * used */
    int window;            /* first token of the window: s - used */
};

__device__ list_view view_of(const call &a, int list) {
    list_view v;
    v.first = a.first ? min(max(a.first[list / a.heads], 0), a.s) : 0;
    v.used = min(a.w, a.s - v.first);
    v.rows = a.group * v.used;
    v.window = a.s - v.used;
    return v;
}

__device__ key_rows keys_of(const call &a, const list_view &v, int list) {
    const char *base = a.keys.data + list / a.heads * a.keys.sequence + list % a.heads * a.keys.head;
    return {base, a.keys.token, v.first, a.s, a.keys.type, a.keys.pieces};
}

__device__ query_rows queries_of(const call &a, const list_view &v, int list) {
    const rows_view &q = a.queries;
    const char *base = q.data + list / a.heads * q.sequence + (int64_t)(list % a.heads) * a.group * q.head +
                       (int64_t)(a.w - v.used) * q.token;
    return {base, q.head, q.token, (uint32_t)a.group, a.group_inverse, v.rows, q.type, q.pieces};
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* A reference to take logits from: any number will do where there is none yet. */
__device__ inline float known(float reference) { return reference == -CUDART_INF_F ? 0.0f : reference; }
/* 2^(a - b), 0 for a = -infinity whatever b. */
__device__ inline float ratio(float a, float b) { return exp2_fast(a - known(b)); }

/* What is rare for logits: a softcap, */
template <int M, int N> __device__ void cap(float (&x)[M][N][4], const call &a) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][n][i] = a.outer * tanhf(x[m][n][i] * a.inner);
}

/* and a tile where not all is seen: range(m, half) says which columns the row held sees, and `column` is the lane's
 * first. The others become what scale makes -infinity of. */
template <int M, int N, typename Range>
__device__ void mask(float (&x)[M][N][4], const call &a, int column, Range range) {
    const float nothing = a.scale < 0.0f ? CUDART_INF_F : -CUDART_INF_F;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int2 seen = range(m, half);
#pragma unroll
            for (int k = 0; k < 2 * N; k++) {
                const int at = column + 8 * (k >> 1) + (k & 1);
                if (at < seen.x || at >= seen.y) x[m][k >> 1][2 * half + (k & 1)] = nothing;
            }
        }
}

/* ---- what a block does: its part of a pass */

struct span {
    list_view v;
    int list, part, low; /* low: the first row held */
    int begin, end;      /* tiles that pass by */
    bool there;          /* something is to be written */
};

/* Rows of queries held, keys pass by. The blocks whose rows see most come first. */
template <typename S> __device__ span first_span(const call &a, int block) {
    span p;
    p.list = block % a.lists;
    p.part = block / a.lists % a.key_parts;
    p.v = view_of(a, p.list);
    p.low = ((a.group * a.w + S::held - 1) / S::held - 1 - block / a.lists / a.key_parts) * S::held;
    p.there = p.low < p.v.rows;
    p.begin = max(p.part * a.key_step, p.v.first / S::passing);
    p.end = min((p.part + 1) * a.key_step,
                (p.v.window + (min(p.low + S::held, p.v.rows) - 1) / a.group + S::passing) / S::passing);
    return p;
}

/* Keys held, rows of queries pass by. Nobody reads the sums of padding alone. */
template <typename S> __device__ span second_span(const call &a, int block) {
    span p;
    p.list = block % a.lists;
    p.part = block / a.lists % a.row_parts;
    p.v = view_of(a, p.list);
    p.low = block / a.lists / a.row_parts * S::held;
    p.there = p.low + S::held > p.v.first;
    p.begin = max(p.part * a.row_step, max(p.low - p.v.window, 0) * a.group / S::passing);
    p.end = min((p.part + 1) * a.row_step, (p.v.rows + S::passing - 1) / S::passing);
    return p;
}

/* Tokens before this one are seen by a row, padding aside. */
__device__ int end_of(const call &a, const list_view &v, int row) { return v.window + row / a.group + 1; }
/* The first row that sees a token. */
__device__ int begin_of(const call &a, const list_view &v, int token) { return max(token - v.window, 0) * a.group; }

/* ---- first pass: sums of 2^(x * scale - most) by row, over the columns that are this lane's */

template <int M, int N>
__device__ __forceinline__ void add_to_rows(float (&most)[M][2], float (&total)[M][2], const float (&x)[M][N][4],
                                            float scale) {
    float sum[M][2], check = 0.0f;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const auto term = [&](int k) { return exp2_fast(fmaf(x[m][k >> 1][2 * i + (k & 1)], scale, -most[m][i])); };
            sum[m][i] = (term(0) + term(1)) + (term(2) + term(3));
#pragma unroll
            for (int k = 4; k < 2 * N; k += 4) sum[m][i] += (term(k) + term(k + 1)) + (term(k + 2) + term(k + 3));
            check += sum[m][i];
        }
    if (__any_sync(ALL, !(check <= MOST_SUM))) { /* NaN, too: there was no reference */
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float reference = most[m][i];
#pragma unroll
                for (int k = 0; k < 2 * N; k++) reference = fmaxf(reference, x[m][k >> 1][2 * i + (k & 1)] * scale);
                total[m][i] *= ratio(most[m][i], reference);
                most[m][i] = reference;
                sum[m][i] = 0.0f;
#pragma unroll
                for (int k = 0; k < 2 * N; k++)
                    sum[m][i] += exp2_fast(fmaf(x[m][k >> 1][2 * i + (k & 1)], scale, -known(reference)));
            }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) total[m][i] += sum[m][i];
}

/* A row's sums of the four lanes that share it, joined and written, where it exists. */
__device__ __forceinline__ void write_rows(const call &a, const span &p, int row, float (&most)[2], float (&total)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int other = 1; other < 4; other *= 2) {
            const float their_most = __shfl_xor_sync(ALL, most[i], other);
            const float their_total = __shfl_xor_sync(ALL, total[i], other);
            const float reference = fmaxf(most[i], their_most);
            total[i] = total[i] * ratio(most[i], reference) + their_total * ratio(their_most, reference);
            most[i] = reference;
        }
        const int r = row + 8 * i;
        if ((threadIdx.x & 3) == 0 && r < p.v.rows)
            a.parts[((int64_t)p.list * a.group * a.w + r) * a.key_parts + p.part] = make_float2(most[i], total[i]);
    }
}

/* ---- second pass: sums of 2^(x * scale - reference) / denominator by key. pairs: of two rows that pass by, this
 * lane's of the first 8; the next 8's are 4 further. */

template <int M, int N>
__device__ __forceinline__ void add_to_tokens(float (&sum)[M][2], const float (&x)[M][N][4], const float4 *pairs,
                                              float scale) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float4 pair = pairs[4 * n];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                sum[m][i] = fmaf(exp2_fast(fmaf(x[m][n][2 * i], scale, -pair.x)), pair.y, sum[m][i]);
                sum[m][i] = fmaf(exp2_fast(fmaf(x[m][n][2 * i + 1], scale, -pair.z)), pair.w, sum[m][i]);
            }
    }
}

/* The same with rows held (of each lane two: reference, 1 / denominator) and 64 keys passing by: this lane's two of the
 * columns' sums over the warp's 16 rows, from column_of(lane) on. */
__device__ __forceinline__ float2 columns_of_rows(const float (&x)[1][8][4], const float2 (&rows)[2], float scale) {
    float sum[8][2];
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            sum[n][i] = fmaf(exp2_fast(fmaf(x[0][n][i + 2], scale, -rows[1].x)), rows[1].y,
                             exp2_fast(fmaf(x[0][n][i], scale, -rows[0].x)) * rows[0].y);
#pragma unroll
    for (int half = 4; half > 0; half /= 2) { /* of what is left each of two lanes takes one half over from the other */
        const bool upper = threadIdx.x & 4 * half;
#pragma unroll
        for (int n = 0; n < half; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float given = upper ? sum[n][i] : sum[n + half][i];
                sum[n][i] = (upper ? sum[n + half][i] : sum[n][i]) + __shfl_xor_sync(ALL, given, 4 * half);
            }
    }
    return make_float2(sum[0][0], sum[0][1]);
}

__device__ __forceinline__ int column_of(int lane) { return 8 * (lane >> 2) + 2 * (lane & 3); }

__device__ __forceinline__ void write_tokens(const call &a, const span &p, int token, float (&total)[2]) {
    float *out = a.sums + ((int64_t)p.list * a.row_parts + p.part) * a.s;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        total[i] += __shfl_xor_sync(ALL, total[i], 1);
        total[i] += __shfl_xor_sync(ALL, total[i], 2);
        if ((threadIdx.x & 3) == 0 && token + 8 * i < a.s) out[token + 8 * i] = total[i];
    }
}

} // namespace
