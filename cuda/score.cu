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
 * On sm_90a most 16-bit rows are score_wgmma.cuh's; the kernels here take float32, rows of 256 channels, rows at odd
 * addresses, softcaps, and other devices. What bounds them (16-bit rows of 128, per warp and 32 x 16 logits): 200
 * clocks of the tensor cores for 32 m16n8k16, and 128 of the unit for EX2, which on an H200 do not overlap: 367 clocks.
 */
#include "score_wgmma.cuh"

namespace {

template <typename S> __global__ void __launch_bounds__(S::threads, 2) first_kernel(const __grid_constant__ call a) {
    extern __shared__ __align__(16) char ring[];
    const span p = first_span<S>(a, blockIdx.x);
    if (!p.there) return;
    const list_view &v = p.v;
    const int lane = threadIdx.x & 31, row = p.low + threadIdx.x / 32 * S::m_tiles * 16 + (lane >> 2);
    const int least_end = end_of(a, v, p.low);

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
            if (a.capped) cap(x, a);
            if (masked)
                mask(x, a, token + at + 2 * (lane & 3),
                     [&](int m, int half) { return make_int2(v.first, end_of(a, v, row + 16 * m + 8 * half)); });
            add_to_rows(most, total, x, a.scale);
        }
    };
    if (p.begin < p.end)
        pass_by<S>(
            ring, queries_of(a, v, p.list), p.low, keys_of(a, v, p.list), p.begin, p.end, [](char *, int) {}, body);
#pragma unroll
    for (int m = 0; m < S::m_tiles; m++) write_rows(a, p, row + 16 * m, most[m], total[m]);
}

/* 8 lanes join the parts of a row; padded is a whole number of blocks' rows. */
constexpr int JOIN_THREADS = 256, JOIN_LANES = 8, JOIN_ROWS = JOIN_THREADS / JOIN_LANES;

__global__ void __launch_bounds__(JOIN_THREADS) join_kernel(const __grid_constant__ call a) {
    let_next_begin();
    wait_for_previous();
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

template <typename S> __global__ void __launch_bounds__(S::threads, 2) second_kernel(const __grid_constant__ call a) {
    extern __shared__ __align__(16) char ring[];
    const span p = second_span<S>(a, blockIdx.x);
    if (!p.there) return;
    const list_view &v = p.v;
    const int lane = threadIdx.x & 31, token = p.low + threadIdx.x / 32 * S::m_tiles * 16 + (lane >> 2);
    const int most_begin = begin_of(a, v, min(p.low + S::held, a.s) - 1);

    float total[S::m_tiles][2] = {};
    const float2 *rows = a.rows + (int64_t)p.list * a.padded;
    const auto extra = [&](char *tile_at, int tile) {
        if (threadIdx.x < S::passing / 2)
            copy_piece(shared_address(tile_at + S::passing * S::pitch + 16 * threadIdx.x),
                       rows + tile * S::passing + 2 * threadIdx.x, true);
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
            if (a.capped) cap(x, a);
            if (masked)
                mask(x, a, row + at + 2 * (lane & 3),
                     [&](int m, int half) { return make_int2(begin_of(a, v, token + 16 * m + 8 * half), INT_MAX); });
            add_to_tokens(sum, x, pairs, a.scale);
        }
#pragma unroll
        for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) total[m][i] += sum[m][i];
    };
    if (p.begin < p.end)
        pass_by<S>(ring, keys_of(a, v, p.list), p.low, queries_of(a, v, p.list), p.begin, p.end, extra, body);
#pragma unroll
    for (int m = 0; m < S::m_tiles; m++) write_tokens(a, p, token + 16 * m, total[m]);
}

/* ---- sums by token, weighed and pooled; a thread a token */

constexpr int POOL_THREADS = 256;

__global__ void __launch_bounds__(POOL_THREADS) pool_kernel(const __grid_constant__ call a) {
    wait_for_previous();
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

/* Into how many parts a pass of `blocks` blocks over `tiles` tiles is cut, `at_once` blocks running at a time: the
 * least time in tiles, two more for each part's beginning. */
void cut(int64_t blocks, int tiles, int at_once, int *parts, int *step) {
    const int most = min(tiles, (int)(KVC_SCORE_WAVES * KVC_SCORE_BLOCKS / blocks)); /* 0: more than that already */
    int best = INT_MAX;
    *step = tiles;
    for (int k = 1; k <= most; k++) {
        const int length = (tiles + k - 1) / k;
        const int time = ((int)blocks * k + at_once - 1) / at_once * (length + 2);
        if (time >= best) continue;
        best = time;
        *step = length;
    }
    *parts = (tiles + *step - 1) / *step;
}

/* Cuts both passes, and places what they write in the workspace -> spans of the first and of the second pass. */
template <typename S> void divide(call &a, char *workspace, int at_once, unsigned (&spans)[2]) {
    static_assert(S::held <= KVC_SCORE_BLOCK_ROWS && S::passing >= KVC_SCORE_TILE_ROWS, "the workspace is enough");
    const int rows = a.group * a.w;
    const auto over = [](int n, int by) { return (n + by - 1) / by; };
    cut((int64_t)a.lists * over(rows, S::held), over(a.s, S::passing), at_once, &a.key_parts, &a.key_step);
    cut((int64_t)a.lists * over(a.s, S::held), over(rows, S::passing), at_once, &a.row_parts, &a.row_step);
    spans[0] = (unsigned)((int64_t)a.lists * a.key_parts * over(rows, S::held));
    spans[1] = (unsigned)((int64_t)a.lists * a.row_parts * over(a.s, S::held));
    a.rows = (float2 *)workspace;
    a.parts = a.rows + (int64_t)a.lists * a.padded;
    a.sums = (float *)(a.parts + (int64_t)a.lists * rows * a.key_parts);
}

/* pass(0) and pass(1), and what follows each, which begins while the pass ends. So may a pass(1) that waits: keys and
 * queries were there before pass(0), which follows what came before it in the stream's order. What begins early waits
 * before it ends, so that the end of a call is the end of all its kernels. */
template <typename Pass> cudaError_t launch(const call &a, const kvc_gpu &gpu, cudaStream_t stream, Pass pass) {
    cudaError_t error = pass(0);
    if (error != cudaSuccess) return error;
    const kvc_launch join(gpu, dim3(a.lists * (a.padded / JOIN_ROWS)), dim3(JOIN_THREADS), 0, stream);
    error = cudaLaunchKernelEx(&join.config, join_kernel, a);
    if (error == cudaSuccess) error = pass(1);
    if (error != cudaSuccess) return error;
    const kvc_launch pool(gpu, dim3(a.lists * ((a.s + POOL_THREADS - 1) / POOL_THREADS)), dim3(POOL_THREADS), 0,
                          stream);
    return cudaLaunchKernelEx(&pool.config, pool_kernel, a);
}

template <typename S> cudaError_t launch_anywhere(call &a, char *workspace, const kvc_gpu &gpu, cudaStream_t stream) {
    unsigned spans[2];
    divide<S>(a, workspace, KVC_SCORE_BLOCKS, spans);
    return launch(a, gpu, stream, [&](int i) {
        const auto kernel = i ? second_kernel<S> : first_kernel<S>;
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
        if (error == cudaSuccess) {
            kernel<<<spans[i], S::threads, S::shared_bytes, stream>>>(a);
            error = cudaGetLastError();
        }
        return error;
    });
}

template <typename S> cudaError_t launch_hopper(call &a, char *workspace, const kvc_gpu &gpu, cudaStream_t stream) {
    unsigned spans[2];
    divide<S>(a, workspace, KVC_SCORE_BLOCKS / 2, spans);
    /* Whether rows stay in the second pass. The workspace has room for as many parts of the sums as a group has heads.
     */
    const int rows = a.group * a.w, groups = (rows + S::m_rows - 1) / S::m_rows;
    const bool stay = groups > S::groups / 2 && groups <= S::groups && groups <= a.group;
    if (stay) {
        spans[1] = spans[0];
        a.row_parts = groups;
    }
    return launch(a, gpu, stream, [&](int i) {
        const auto kernel = i == 0 ? hopper_kernel<S, FIRST>
                            : stay ? hopper_kernel<S, ROWS_HELD>
                                   : hopper_kernel<S, KEYS_HELD>;
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared_bytes);
        kvc_launch launch(gpu, dim3(min(spans[i], gpu.multiprocessors)), dim3(S::threads), S::shared_bytes, stream);
        /* With keys held only copies wait for what is ahead, and there may be none. */
        if (i == 0 || !stay) launch.config.numAttrs = 0;
        if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch.config, kernel, a, (int)spans[i]);
        return error;
    });
}

template <int DTYPE, int D>
cudaError_t launch_shape(call &a, char *workspace, const kvc_gpu &gpu, cudaStream_t stream) {
    if constexpr (DTYPE != KVC_FLOAT32 && D <= 128)
        if (kvc_has_wgmma(gpu) && a.queries.pieces && a.keys.pieces && !a.capped)
            return launch_hopper<hopper_shape<DTYPE, D>>(a, workspace, gpu, stream);
    return launch_anywhere<shape<DTYPE, D>>(a, workspace, gpu, stream);
}

template <int DTYPE>
cudaError_t launch_type(int64_t d, call &a, char *workspace, const kvc_gpu &gpu, cudaStream_t stream) {
    switch (d) {
    case 64: return launch_shape<DTYPE, 64>(a, workspace, gpu, stream);
    case 80: return launch_shape<DTYPE, 80>(a, workspace, gpu, stream);
    case 96: return launch_shape<DTYPE, 96>(a, workspace, gpu, stream);
    case 128: return launch_shape<DTYPE, 128>(a, workspace, gpu, stream);
    default: return launch_shape<DTYPE, 256>(a, workspace, gpu, stream);
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
    kvc_gpu gpu = {};
    cudaError_t error = scope.error == cudaSuccess ? kvc_gpu_of(args->keys.device_id, &gpu) : scope.error;
    char *workspace = (char *)args->workspace.data;
    if (error == cudaSuccess) switch (dtype) {
        case KVC_FLOAT32: error = launch_type<KVC_FLOAT32>(d, a, workspace, gpu, (cudaStream_t)stream); break;
        case KVC_FLOAT16: error = launch_type<KVC_FLOAT16>(d, a, workspace, gpu, (cudaStream_t)stream); break;
        default: error = launch_type<KVC_BFLOAT16>(d, a, workspace, gpu, (cudaStream_t)stream); break;
        }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("score", error);
}
