/* score.cu: kvc_score_cuda (score.h): two passes over the products of a KV head's queries with its keys.
 *
 * First pass: a block holds 256 (or 128) rows of queries, and its part of the keys passes by. A lane keeps, for each of
 * its rows, a logit that it has seen (the reference) and the sum of 2^(x - reference) over the keys that were its own;
 * nothing looks for maxima as long as a sum stays below 2^64. Lanes are joined at the end, parts by a kernel of their
 * own: every row's reference and 1 / denominator. The second pass holds 256 keys, lets queries pass by, and adds up
 * 2^(x - reference) / denominator by key, in registers again. A last kernel adds up the parts, weighs and pools.
 * x - reference is one fused multiply-add everywhere: what rounding has done to a reference is the same factor in a
 * row's sums and in its terms.
 * Tiles that no row sees are skipped; logits are multiplied by log2(e) at once.
 *
 * The work is cut by shapes alone, and sums have an order of their own: the result is the same every time.
 *
 * What bounds it (16-bit rows of 128, per warp and 32 x 16 logits): 32 m16n8k16, 8 ldmatrix, 16 each of FFMA, EX2 and
 * FADD (FFMA), in all about 95 instructions, and 16 * 8 clocks of the unit for EX2. Tensor cores take 200 clocks for
 * these mma.sync, so they are the bound as long as four warps a scheduler cover each other's exponentials. */
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

/* What is rare for logits: a softcap, and a tile where not all is seen: range(m, half) says which columns the row held
 * sees, and `column` is the lane's first. The others become what scale makes -infinity of. */
template <int M, typename Range>
__device__ void adjust(float (&x)[M][2][4], const call &a, bool masked, int column, Range range) {
    if (a.capped) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) x[m][n][i] = a.outer * tanhf(x[m][n][i] * a.inner);
    }
    if (masked) {
        const float nothing = a.scale < 0.0f ? CUDART_INF_F : -CUDART_INF_F;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int2 seen = range(m, half);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int at = column + 8 * (k >> 1) + (k & 1);
                    if (at < seen.x || at >= seen.y) x[m][k >> 1][2 * half + (k & 1)] = nothing;
                }
            }
    }
}

/* An element i of an accumulator lies in row lane / 4 + 8 * (i >> 1) of the rows held, and in column
 * 2 * (lane & 3) + (i & 1) of the 8 that pass by. */

/* ---- first pass */

template <typename S> __global__ void __launch_bounds__(S::threads, 2) first_kernel(const __grid_constant__ call a) {
    extern __shared__ __align__(16) char ring[];
    const int list = blockIdx.x % a.lists, part = blockIdx.x / a.lists % a.key_parts;
    const list_view v = view_of(a, list);
    /* The rows that see most come first. */
    const int low =
        (((a.group * a.w + S::held - 1) / S::held - 1) - (int)(blockIdx.x / a.lists / a.key_parts)) * S::held;
    if (low >= v.rows) return;
    const int lane = threadIdx.x & 31, row = low + threadIdx.x / 32 * S::m_tiles * 16 + (lane >> 2);
    const auto end_of = [&](int r) { return v.window + r / a.group + 1; }; /* tokens that row r sees, and padding */
    const int most_end = end_of(min(low + S::held, v.rows) - 1), least_end = end_of(low);
    const int begin = max(part * a.key_step, v.first / S::passing);
    const int end = min((part + 1) * a.key_step, (most_end + S::passing - 1) / S::passing);

    float most[S::m_tiles][2], total[S::m_tiles][2];
#pragma unroll
    for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[m][i] = -CUDART_INF_F;
            total[m][i] = 0.0f;
        }
    const auto body = [&](const char *tile_at, int tile, const uint32_t (&held)[S::m_tiles][S::steps][4]) {
        const int token = tile * S::passing;
        const bool masked = token < v.first || token + S::passing > least_end;
        uint32_t address = passing_address<S>(shared_address(tile_at));
#pragma unroll 1
        for (int at = 0; at < S::passing; at += 16, address += 16 * S::pitch) {
            float x[S::m_tiles][2][4];
            products<S, false>(x, held, address);
            if (a.capped || masked)
                adjust<S::m_tiles>(x, a, masked, token + at + 2 * (lane & 3), [&](int m, int half) {
                    return make_int2(v.first, end_of(row + 16 * m + 8 * half));
                });
            float sum[S::m_tiles][2], check = 0.0f;
#pragma unroll
            for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const auto term = [&](int k) {
                        return exp2_fast(fmaf(x[m][k >> 1][2 * i + (k & 1)], a.scale, -most[m][i]));
                    };
                    sum[m][i] = (term(0) + term(1)) + (term(2) + term(3));
                    check += sum[m][i];
                }
            if (__any_sync(ALL, !(check <= MOST_SUM))) { /* NaN, too: there was no reference */
#pragma unroll
                for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float reference = most[m][i];
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            reference = fmaxf(reference, x[m][k >> 1][2 * i + (k & 1)] * a.scale);
                        total[m][i] *= ratio(most[m][i], reference);
                        most[m][i] = reference;
                        sum[m][i] = 0.0f;
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            sum[m][i] += exp2_fast(fmaf(x[m][k >> 1][2 * i + (k & 1)], a.scale, -known(reference)));
                    }
            }
#pragma unroll
            for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) total[m][i] += sum[m][i];
        }
    };
    if (begin < end)
        pass_by<S>(ring, queries_of(a, v, list), low, keys_of(a, v, list), begin, end, [](char *, int) {}, body);

#pragma unroll
    for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int other = 1; other < 4; other *= 2) {
                const float their_most = __shfl_xor_sync(ALL, most[m][i], other);
                const float their_total = __shfl_xor_sync(ALL, total[m][i], other);
                const float reference = fmaxf(most[m][i], their_most);
                total[m][i] = total[m][i] * ratio(most[m][i], reference) + their_total * ratio(their_most, reference);
                most[m][i] = reference;
            }
            const int r = row + 16 * m + 8 * i;
            if ((lane & 3) == 0 && r < v.rows)
                a.parts[((int64_t)list * a.group * a.w + r) * a.key_parts + part] =
                    make_float2(most[m][i], total[m][i]);
        }
}

/* 8 lanes join the parts of a row; padded is a whole number of blocks' rows. */
constexpr int JOIN_THREADS = 256, JOIN_LANES = 8, JOIN_ROWS = JOIN_THREADS / JOIN_LANES;

__global__ void __launch_bounds__(JOIN_THREADS) join_kernel(const __grid_constant__ call a) {
    const int list = blockIdx.x / (a.padded / JOIN_ROWS);
    const int row = blockIdx.x % (a.padded / JOIN_ROWS) * JOIN_ROWS + threadIdx.x / JOIN_LANES;
    const int parts = row < view_of(a, list).rows ? a.key_parts : 0;
    const float2 *from = a.parts + ((int64_t)list * a.group * a.w + row) * a.key_parts;
    float most = -CUDART_INF_F, total = 0.0f;
    for (int p = threadIdx.x % JOIN_LANES; p < parts; p += JOIN_LANES) most = fmaxf(most, from[p].x);
#pragma unroll
    for (int other = 1; other < JOIN_LANES; other *= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, other));
    for (int p = threadIdx.x % JOIN_LANES; p < parts; p += JOIN_LANES) total += from[p].y * ratio(from[p].x, most);
#pragma unroll
    for (int other = 1; other < JOIN_LANES; other *= 2) total += __shfl_xor_sync(ALL, total, other);
    if (threadIdx.x % JOIN_LANES == 0)
        a.rows[(int64_t)list * a.padded + row] = parts ? make_float2(most, 1.0f / total) : make_float2(0.0f, 0.0f);
}

/* ---- second pass */

template <typename S> __global__ void __launch_bounds__(S::threads, 2) second_kernel(const __grid_constant__ call a) {
    extern __shared__ __align__(16) char ring[];
    const int list = blockIdx.x % a.lists, part = blockIdx.x / a.lists % a.row_parts;
    const list_view v = view_of(a, list);
    const int low = blockIdx.x / a.lists / a.row_parts * S::held;
    if (low + S::held <= v.first) return; /* nobody reads those sums */
    const int lane = threadIdx.x & 31, token = low + threadIdx.x / 32 * S::m_tiles * 16 + (lane >> 2);
    const auto begin_of = [&](int t) { return max(t - v.window, 0) * a.group; }; /* the first row that sees token t */
    const int most_begin = begin_of(min(low + S::held, a.s) - 1);
    const int begin = max(part * a.row_step, begin_of(low) / S::passing);
    const int end = min((part + 1) * a.row_step, (v.rows + S::passing - 1) / S::passing);

    float total[S::m_tiles][2] = {};
    const float2 *rows = a.rows + (int64_t)list * a.padded;
    const auto extra = [&](char *tile_at, int tile) {
        if (threadIdx.x < S::passing / 2)
            copy_piece(tile_at + S::passing * S::pitch + 16 * threadIdx.x, rows + tile * S::passing + 2 * threadIdx.x,
                       true);
    };
    const auto body = [&](const char *tile_at, int tile, const uint32_t (&held)[S::m_tiles][S::steps][4]) {
        const int row = tile * S::passing;
        const bool masked = row < most_begin;
        uint32_t address = passing_address<S>(shared_address(tile_at));
        const float4 *pairs = (const float4 *)(tile_at + S::passing * S::pitch) + (lane & 3); /* of two rows */
        float sum[S::m_tiles][2] = {};
#pragma unroll 1
        for (int at = 0; at < S::passing; at += 16, address += 16 * S::pitch, pairs += 8) {
            float x[S::m_tiles][2][4];
            products<S, true>(x, held, address);
            if (a.capped || masked)
                adjust<S::m_tiles>(x, a, masked, row + at + 2 * (lane & 3), [&](int m, int half) {
                    return make_int2(begin_of(token + 16 * m + 8 * half), INT_MAX);
                });
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float4 pair = pairs[4 * n];
#pragma unroll
                for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        sum[m][i] = fmaf(exp2_fast(fmaf(x[m][n][2 * i], a.scale, -pair.x)), pair.y, sum[m][i]);
                        sum[m][i] = fmaf(exp2_fast(fmaf(x[m][n][2 * i + 1], a.scale, -pair.z)), pair.w, sum[m][i]);
                    }
            }
        }
#pragma unroll
        for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) total[m][i] += sum[m][i];
    };
    if (begin < end) pass_by<S>(ring, keys_of(a, v, list), low, queries_of(a, v, list), begin, end, extra, body);

    float *out = a.sums + ((int64_t)list * a.row_parts + part) * a.s;
#pragma unroll
    for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            total[m][i] += __shfl_xor_sync(ALL, total[m][i], 1);
            total[m][i] += __shfl_xor_sync(ALL, total[m][i], 2);
            const int t = token + 16 * m + 8 * i;
            if ((lane & 3) == 0 && t < a.s) out[t] = total[m][i];
        }
}

/* ---- sums by token, weighed and pooled; a thread a token */

constexpr int POOL_THREADS = 256;

__global__ void __launch_bounds__(POOL_THREADS) pool_kernel(const __grid_constant__ call a) {
    const int list = blockIdx.x % a.lists, token = blockIdx.x / a.lists * POOL_THREADS + threadIdx.x;
    if (token >= a.s) return;
    const list_view v = view_of(a, list);
    const float *sums = a.sums + (int64_t)list * a.row_parts * a.s;
    const auto raw = [&](int t) {
        double sum = 0.0;
        for (int p = 0; p < a.row_parts; p++) sum += (double)sums[(int64_t)p * a.s + t];
        return a.reduce == KVC_REDUCE_SEEN ? (float)(sum / (double)min(v.used, a.s - t)) : (float)sum;
    };
    double value = 0.0;
    if (token >= v.first) {
        const int begin = token < v.window ? v.first : v.window, end = token < v.window ? v.window : a.s;
        const int half = a.pool / 2, low = token - begin > half ? token - half : begin;
        const int high = end - 1 - token > half ? token + half : end - 1;
        for (int t = low; t <= high; t++) {
            const double x = raw(t);
            value = a.pool_kind == KVC_POOL_AVG ? value + x : fmax(value, x);
        }
        if (a.pool_kind == KVC_POOL_AVG) value /= (double)(high - low + 1);
        value *= 1.0 / (double)(a.reduce == KVC_REDUCE_MEAN ? v.rows : a.group);
    }
    a.importance[(int64_t)list * a.s + token] = (float)value;
}

/* ---- launches */

template <typename S> cudaError_t launch(const call &a, cudaStream_t stream) {
    const int rows = a.group * a.w;
    const unsigned first = (unsigned)((int64_t)a.lists * a.key_parts * ((rows + S::held - 1) / S::held));
    const unsigned second = (unsigned)((int64_t)a.lists * a.row_parts * ((a.s + S::held - 1) / S::held));
    cudaError_t error =
        cudaFuncSetAttribute(first_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(second_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
    if (error != cudaSuccess) return error;
    first_kernel<S><<<first, S::threads, S::shared_bytes, stream>>>(a);
    join_kernel<<<a.lists *(a.padded / JOIN_ROWS), JOIN_THREADS, 0, stream>>>(a);
    second_kernel<S><<<second, S::threads, S::shared_bytes, stream>>>(a);
    pool_kernel<<<a.lists *((a.s + POOL_THREADS - 1) / POOL_THREADS), POOL_THREADS, 0, stream>>>(a);
    return cudaGetLastError();
}

/* Into how many parts a pass of `blocks` blocks over `tiles` tiles is cut: the least time in tiles, two more for each
 * part's beginning. */
template <typename S> cudaError_t divide_and_launch(call &a, char *workspace, cudaStream_t stream) {
    const auto divide = [](int64_t blocks, int tiles, int *parts, int *step) {
        const int most = min(tiles, (int)(KVC_SCORE_WAVES * KVC_SCORE_BLOCKS / blocks)); /* 0: more than that already */
        int best = INT_MAX;
        *step = tiles;
        for (int k = 1; k <= most; k++) {
            const int length = (tiles + k - 1) / k;
            const int time = ((int)blocks * k + KVC_SCORE_BLOCKS - 1) / KVC_SCORE_BLOCKS * (length + 2);
            if (time >= best) continue;
            best = time;
            *step = length;
        }
        *parts = (tiles + *step - 1) / *step;
    };
    static_assert(S::held <= KVC_SCORE_BLOCK_ROWS && S::passing >= KVC_SCORE_TILE_ROWS, "the workspace is enough");
    const int rows = a.group * a.w;
    const auto over = [](int n, int by) { return (n + by - 1) / by; };
    divide((int64_t)a.lists * over(rows, S::held), over(a.s, S::passing), &a.key_parts, &a.key_step);
    divide((int64_t)a.lists * over(a.s, S::held), over(rows, S::passing), &a.row_parts, &a.row_step);
    a.rows = (float2 *)workspace;
    a.parts = a.rows + (int64_t)a.lists * a.padded;
    a.sums = (float *)(a.parts + (int64_t)a.lists * rows * a.key_parts);
    return launch<S>(a, stream);
}

template <int DTYPE> cudaError_t launch_type(int64_t d, call &a, char *workspace, cudaStream_t stream) {
    switch (d) {
    case 64: return divide_and_launch<shape<DTYPE, 64>>(a, workspace, stream);
    case 80: return divide_and_launch<shape<DTYPE, 80>>(a, workspace, stream);
    case 96: return divide_and_launch<shape<DTYPE, 96>>(a, workspace, stream);
    case 128: return divide_and_launch<shape<DTYPE, 128>>(a, workspace, stream);
    default: return divide_and_launch<shape<DTYPE, 256>>(a, workspace, stream);
    }
}

rows_view view(const kvc_tensor *t, int dtype) {
    const int64_t size = kvc_dtype_size(t->dtype);
    rows_view rows = {
        (const char *)t->data, t->strides[0] * size, t->strides[1] * size, t->strides[2] * size, t->dtype, false};
    const uint64_t bits = (uintptr_t)t->data | (uint64_t)rows.sequence | (uint64_t)rows.head | (uint64_t)rows.token;
    rows.pieces = t->dtype == dtype && bits % 16 == 0;
    return rows;
}

} // namespace

extern "C" kvc_status kvc_score_cuda(const kvc_score_args *args, kvc_stream stream) {
    KVC_TRY(kvc_score_check(args));
    const kvc_named tensors[] = {{"queries", &args->queries},
                                 {"keys", &args->keys},
                                 {"importance", &args->importance},
                                 {"first", &args->first},
                                 {"workspace", &args->workspace}};
    KVC_TRY(kvc_cuda_check("score", tensors, sizeof tensors / sizeof *tensors));
    const int64_t b = args->keys.shape[0], h = args->keys.shape[1], s = args->keys.shape[2], d = args->keys.shape[3];
    const int64_t group = args->queries.shape[1] / h, w = args->queries.shape[2];
    KVC_CHECK(kvc_head_dim_ok((int)d), KVC_ENOTSUP,
              "score: keys: expected 64, 80, 96, 128 or 256 channels on CUDA, got %lld", (long long)d);
    constexpr int64_t most = (int64_t)1 << 30; /* blocks, rows and tokens are counted in int */
    KVC_CHECK(s < most && group < most / w && b < most / h && b * h < most / (s / KVC_SCORE_TILE_ROWS + 1) &&
                  b * h < most / (group * w / KVC_SCORE_TILE_ROWS + 1),
              KVC_ENOTSUP, "score: queries: expected fewer than 2^30 blocks of rows on CUDA, got %s over %s",
              kvc_shape_text(&args->queries), kvc_shape_text(&args->keys));
    if (b == 0) return KVC_OK;
    const int dtype = args->queries.dtype == args->keys.dtype ? args->keys.dtype : KVC_FLOAT32;
    call a = {};
    a.queries = view(&args->queries, dtype);
    a.keys = view(&args->keys, dtype);
    a.first = kvc_given(&args->first) ? (const int32_t *)args->first.data : nullptr;
    a.importance = (float *)args->importance.data;
    a.lists = (int)(b * h);
    a.heads = (int)h;
    a.group = (int)group;
    a.w = (int)w;
    a.s = (int)s;
    a.padded = (int)((group * w + 63) / 64 * 64);
    a.group_inverse = group > 1 ? (uint32_t)(((uint64_t)1 << 32) / group) : UINT32_MAX;
    a.capped = args->softcap > 0.0f;
    a.inner = a.capped ? args->scale / args->softcap : 0.0f;
    a.outer = args->softcap * LOG2E;
    a.scale = a.capped ? 1.0f : args->scale * LOG2E;
    if (a.scale == 0.0f) a.scale = 0x1p-126f; /* as good as 0, and makes -infinity of -infinity */
    a.reduce = args->reduce;
    a.pool_kind = args->pool_kind;
    a.pool = args->pool;
    kvc_device_scope scope(args->keys.device_id);
    cudaError_t error = scope.error;
    char *workspace = (char *)args->workspace.data;
    if (error == cudaSuccess) switch (dtype) {
        case KVC_FLOAT32: error = launch_type<KVC_FLOAT32>(d, a, workspace, (cudaStream_t)stream); break;
        case KVC_FLOAT16: error = launch_type<KVC_FLOAT16>(d, a, workspace, (cudaStream_t)stream); break;
        default: error = launch_type<KVC_BFLOAT16>(d, a, workspace, (cudaStream_t)stream); break;
        }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("score", error);
}
