/* attend_groups.cu: attention over packed pages of every layout (attend_groups.cuh).
 *
 * A block takes up to R rows of a list's queries and a run of its pages, one page a warp at a time, with an online
 * softmax in each warp, and leaves unnormalized sums with their logit reference and total. A second launch merges a
 * row's runs, rotates back and writes. Mass, where asked for, is a third launch that reads K once more. */
#include "attend_groups.cuh"

#include "attend_groups_page.cuh"

namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int BLOCKS_PER_SM = 8;       /* aimed at, so that unequal lists even out; about four fit at once */
constexpr float LOG2_E = 1.442695041f; /* logits are kept in units of log 2 */

/* Queries or out: rows (b, hq, q, d); strides in bytes. */
struct rows {
    char *data;
    int64_t b, h, q;
    int32_t dtype;
};

struct call {
    rows queries, out;
    const uint8_t *arena;
    const kvc_page *table;
    const kvc_list *lists;
    const int32_t *new_tokens; /* or null */
    float *mass;               /* or null */
    float *sums;               /* [list][chunk][part][R][d], not normalized */
    float2 *ends;              /* [list][chunk][part][R]: logit reference, total */
    float2 *whole;             /* [list][row]: the same over all parts; with mass only */
    int64_t arena_bytes, capacity, mass_tokens;
    int64_t heads, group, q; /* KV heads; query heads of each; queries */
    int64_t chunks;          /* of at most R rows of a list's group * q; row = head of the group * q + query */
    int parts;               /* runs that a list's pages are cut into at most */
    int mass_parts;
    kvc_layout layout;
    int32_t rotation;
    float factor; /* on the rotated queries */
    float cap;    /* 0: none; else the logit is cap * tanh(factor * <q, k>) */
};

/* ---- what a list holds */

__device__ int pages_of(const call &a, int64_t list) {
    const int64_t pages = a.lists[list].pages;
    return (int)(pages < 0 ? 0 : pages > a.capacity ? a.capacity : pages);
}

/* Pages of each of a list's runs but the last, the same number for every warp. */
__device__ int run_pages(int pages, int parts) {
    const int each = pages / parts + (pages % parts != 0);
    return (each + WARPS - 1) / WARPS * WARPS;
}

__device__ int runs_of(int pages, int parts) {
    const int each = run_pages(pages, parts);
    return pages == 0 ? 0 : (pages - 1) / each + 1;
}

/* Tokens of a page; 0 where the entry is wrong. */
__device__ int usable_tokens(const call &a, kvc_page page) {
    if (!kvc_bits_ok(page.k_bits) || !kvc_bits_ok(page.v_bits)) return 0;
    const bool fits =
        page.tokens <= kvc_page_tokens(page.k_bits, page.v_bits) &&
        (int64_t)page.unit * KVC_UNIT + kvc_page_bytes(&a.layout, page.k_bits, page.v_bits) <= a.arena_bytes;
    return fits ? page.tokens : 0;
}

/* Tokens that row `row` of a list's queries sees, from the first on. */
__device__ int seen_by(const call &a, int64_t list, int64_t row) {
    if (row >= a.group * a.q) return 0;
    const int64_t query = row % a.q, added = a.new_tokens ? a.new_tokens[list / a.heads] : a.q;
    const int64_t seen = query < a.q - added ? 0 : a.lists[list].tokens - (a.q - 1 - query);
    return (int)(seen < 0 ? 0 : seen);
}

__device__ char *row_at(const call &a, const rows &of, int64_t list, int64_t row) {
    return of.data + list / a.heads * of.b + (list % a.heads * a.group + row / a.q) * of.h + row % a.q * of.q;
}

__device__ int64_t warp_sum(int64_t v) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(WARP, v, i);
    return v;
}

__device__ float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(WARP, v, i);
    return v;
}

__device__ float warp_most(float v) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(WARP, v, i));
    return v;
}

__device__ void fetch(const uint8_t *bytes, int64_t count) {
    for (int64_t at = 128 * (threadIdx.x & 31); at < count; at += 128 * 32)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + at));
}

/* Every page of entries first .. end that is this warp's, holds tokens, and begins before token `most`: f(page). */
template <typename function>
__device__ void each_page(const call &a, int64_t list, int first, int end, int most, function f) {
    const kvc_page *row = a.table + list * a.capacity;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int64_t before = 0;
    for (int p = lane; p < first; p += 32) before += usable_tokens(a, row[p]);
    before = warp_sum(before);
    for (int base = first; base < end && before < most; base += 32) {
        const kvc_page page = base + lane < end ? row[base + lane] : kvc_page{};
        const int tokens = usable_tokens(a, page), bits = page.k_bits | page.v_bits << 8;
        int through = tokens; /* tokens of this entry and those before it */
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            const int other = __shfl_up_sync(WARP, through, i);
            if (lane >= i) through += other;
        }
        for (int i = warp; i < 32 && base + i < end; i += WARPS) {
            const int next = i + WARPS < 32 ? i + WARPS : i;
            const int next_bits = __shfl_sync(WARP, bits, next);
            const int64_t next_first = (int64_t)__shfl_sync(WARP, page.unit, next) * KVC_UNIT;
            if (next > i && __shfl_sync(WARP, tokens, next) > 0)
                fetch(a.arena + next_first, kvc_page_bytes(&a.layout, next_bits & 255, next_bits >> 8));
            page_view view;
            view.tokens = __shfl_sync(WARP, tokens, i);
            const int64_t at = before + __shfl_sync(WARP, through, i) - view.tokens;
            view.bytes = a.arena + (int64_t)__shfl_sync(WARP, page.unit, i) * KVC_UNIT;
            view.k_bits = __shfl_sync(WARP, bits, i) & 255;
            view.v_bits = __shfl_sync(WARP, bits, i) >> 8;
            if (view.tokens == 0 || at >= most) continue;
            view.before = (int)at;
            f(view);
        }
        before += __shfl_sync(WARP, through, 31);
    }
}

/* ---- rows in shared memory; every thread of the block takes part */

__device__ float load_float(const char *row, int dtype, int channel) {
    return dtype == KVC_FLOAT32 ? ((const float *)row)[channel]
                                : kvc_cuda_half_to_float(((const uint16_t *)row)[channel], dtype);
}

__device__ void store_float(char *row, int dtype, int channel, float x) {
    if (dtype == KVC_FLOAT32)
        ((float *)row)[channel] = x;
    else
        ((uint16_t *)row)[channel] = (uint16_t)kvc_cuda_floats_to_halves(x, 0.0f, dtype);
}

/* pack.h, step 1, in place; then times `factor`. */
__device__ void rotate_rows(float *x, int count, int d, float factor) {
    const int block = d & -d;
    for (int stride = 1; stride < block; stride *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < count * d / 2; i += THREADS) {
            float *at = x + i + (i & -stride);
            const float one = at[0], other = at[stride];
            at[0] = one + other;
            at[stride] = one - other;
        }
    }
    const float norm = factor / sqrtf((float)block);
    __syncthreads();
    for (int i = threadIdx.x; i < count * d; i += THREADS) x[i] *= norm;
}

/* Rows chunk * R and on, [R][d]: rotated, times a.factor; zeros behind the last one. */
template <int R> __device__ void load_queries(float *query, const call &a, int64_t list, int64_t chunk) {
    const int d = a.layout.head_dim;
    const bool rotated = a.rotation == KVC_ROTATE_HADAMARD;
    __syncthreads(); /* the rows before have been read */
    for (int i = threadIdx.x; i < R * d; i += THREADS) {
        const int64_t row = chunk * R + i / d;
        float x = 0.0f;
        if (row < a.group * a.q) x = load_float(row_at(a, a.queries, list, row), a.queries.dtype, i % d);
        query[i] = rotated ? fminf(fmaxf(x, -0x1p96f), 0x1p96f) : x * a.factor;
    }
    if (rotated) rotate_rows(query, R, d, a.factor);
    __syncthreads();
}

/* ---- shared memory of a block: queries [R][d], and of each warp */

template <int R> struct alignas(16) warp_memory {
    float scores[R * SCORE_ROW];
    float factors[R];
    float ends[R][2]; /* logit reference, total */
    float2 steps[STEPS];
};

template <int R> constexpr int memory_bytes(int d, bool values) {
    return R * d * 4 + WARPS * ((int)sizeof(warp_memory<R>) + (values ? R * (d + SUM_PADDING) * 4 : 0));
}

/* In units of log 2. */
__device__ float logit(const call &a, float product) {
    return a.cap > 0.0f ? a.cap * LOG2_E * tanhf(product) : product;
}

/* What exponents are taken relative to: 0 where nothing has been seen, so that 2^-infinity comes out as 0. */
__device__ float reference(float most) { return most == -INFINITY ? 0.0f : most; }

/* ---- kernels */

template <int R>
__global__ void __launch_bounds__(THREADS, R > 4 ? 3 : 4) attend_kernel(const __grid_constant__ call a) {
    extern __shared__ float4 memory[];
    const int d = a.layout.head_dim, lane = threadIdx.x & 31, warp = threadIdx.x / 32, sum_stride = d + SUM_PADDING;
    const int part = blockIdx.x % a.parts;
    const int64_t run = blockIdx.x / a.parts, chunk = run % a.chunks, list = run / a.chunks;
    const int pages = pages_of(a, list), each = run_pages(pages, a.parts);
    if (part >= runs_of(pages, a.parts)) return;
    const int first = part * each, end = pages - first < each ? pages : first + each;
    float *query = (float *)memory;
    warp_memory<R> *warps = (warp_memory<R> *)(query + R * d);
    warp_memory<R> &own = warps[warp];
    float *all_sums = (float *)(warps + WARPS), *sums = all_sums + warp * R * sum_stride;
    load_queries<R>(query, a, list, chunk);
    for (int i = lane; i < R * sum_stride; i += 32) sums[i] = 0.0f;

    float most[R], total[R]; /* of this warp; total: of this lane */
    int seen[R], most_seen = 0;
#pragma unroll
    for (int r = 0; r < R; r++) {
        most[r] = -INFINITY;
        total[r] = 0.0f;
        seen[r] = seen_by(a, list, chunk * R + r);
        most_seen = max(most_seen, seen[r]);
    }
    each_page(a, list, first, end, most_seen, [&](const page_view &page) {
        __syncwarp(); /* the page before has been read */
        page_logits<R>(own.scores, query, own.steps, page, a.layout);
        __syncwarp();
        float p[R][2];
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int visible = min(seen[r] - page.before, page.tokens);
#pragma unroll
            for (int i = 0; i < 2; i++)
                p[r][i] = lane + 32 * i < visible ? logit(a, own.scores[r * SCORE_ROW + lane + 32 * i]) : -INFINITY;
            const float now = fmaxf(most[r], warp_most(fmaxf(p[r][0], p[r][1]))), from = reference(now);
            const float factor = exp2f(most[r] - from);
            p[r][0] = exp2f(p[r][0] - from);
            p[r][1] = exp2f(p[r][1] - from);
            total[r] = fmaf(total[r], factor, p[r][0] + p[r][1]);
            most[r] = now;
            if (lane == 0) own.factors[r] = factor;
        }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < 2; i++) own.scores[r * SCORE_ROW + value_order(lane + 32 * i, SCORE_STRIDE)] = p[r][i];
        __syncwarp();
        page_values<R>(sums, own.factors, own.scores, own.steps, page, a.layout);
    });

#pragma unroll
    for (int r = 0; r < R; r++) {
        const float sum = warp_sum(total[r]);
        if (lane == 0) own.ends[r][0] = most[r], own.ends[r][1] = sum;
    }
    __syncthreads();
    const int64_t out = (int64_t)blockIdx.x * R;
    for (int i = threadIdx.x; i < R * d; i += THREADS) {
        const int r = i / d, c = i % d;
        float highest = -INFINITY, sum = 0.0f, weight = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, warps[w].ends[r][0]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2f(warps[w].ends[r][0] - reference(highest));
            sum = fmaf(factor, all_sums[(w * R + r) * sum_stride + c], sum);
            weight = fmaf(factor, warps[w].ends[r][1], weight);
        }
        a.sums[out * d + i] = sum;
        if (c == 0) a.ends[out + r] = make_float2(highest, weight);
    }
}

/* One row of a list's queries a block; R as in attend_kernel. */
__global__ void __launch_bounds__(THREADS) merge_kernel(const __grid_constant__ call a, int R) {
    constexpr int EACH = KVC_MAX_HEAD_DIM / 32; /* channels of a lane at most */
    __shared__ float shared[WARPS][KVC_MAX_HEAD_DIM], weights[WARPS];
    const int d = a.layout.head_dim, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int64_t list = blockIdx.x / (a.group * a.q), row = blockIdx.x % (a.group * a.q);
    const int runs = runs_of(pages_of(a, list), a.parts);
    const int64_t first = (list * a.chunks + row / R) * a.parts * R + row % R; /* and R further for each run */
    float most = -INFINITY;
    for (int i = lane; i < runs; i += 32) most = fmaxf(most, a.ends[first + (int64_t)i * R].x);
    most = warp_most(most);
    float sum[EACH] = {}, weight = 0.0f;
#pragma unroll 2
    for (int i = warp; i < runs; i += WARPS) {
        const float2 end = a.ends[first + (int64_t)i * R];
        const float factor = exp2f(end.x - reference(most));
        const float *from = a.sums + (first + (int64_t)i * R) * d;
        weight = fmaf(factor, end.y, weight);
#pragma unroll
        for (int k = 0; k < EACH; k++)
            if (lane + 32 * k < d) sum[k] = fmaf(factor, from[lane + 32 * k], sum[k]);
    }
#pragma unroll
    for (int k = 0; k < EACH; k++)
        if (lane + 32 * k < d) shared[warp][lane + 32 * k] = sum[k];
    if (lane == 0) weights[warp] = weight;
    __syncthreads();
    weight = (weights[0] + weights[1]) + (weights[2] + weights[3]);
    const float normal = weight == 0.0f ? 0.0f : 1.0f / weight;
    for (int c = threadIdx.x; c < d; c += THREADS)
        shared[0][c] = ((shared[0][c] + shared[1][c]) + (shared[2][c] + shared[3][c])) * normal;
    if (a.rotation == KVC_ROTATE_HADAMARD) rotate_rows(shared[0], 1, d, 1.0f);
    __syncthreads();
    char *out = row_at(a, a.out, list, row);
    for (int c = threadIdx.x; c < d; c += THREADS) store_float(out, a.out.dtype, c, shared[0][c]);
    if (a.mass && threadIdx.x == 0) a.whole[blockIdx.x] = make_float2(most, normal);
}

/* Adds to a mass of zeros, a run of a list's pages a block, all rows of its queries. A token is always the same lane's.
 */
template <int R> __global__ void __launch_bounds__(THREADS, R > 4 ? 3 : 4) mass_kernel(const __grid_constant__ call a) {
    extern __shared__ float4 memory[];
    const int d = a.layout.head_dim, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int part = blockIdx.x % a.mass_parts;
    const int64_t list = blockIdx.x / a.mass_parts;
    const int pages = pages_of(a, list), each = run_pages(pages, a.mass_parts);
    if (part >= runs_of(pages, a.mass_parts)) return;
    const int first = part * each, end = pages - first < each ? pages : first + each;
    float *query = (float *)memory, *mass = a.mass + list * a.mass_tokens;
    warp_memory<R> &own = ((warp_memory<R> *)(query + R * d))[warp];
    for (int64_t chunk = 0; chunk < a.chunks; chunk++) {
        load_queries<R>(query, a, list, chunk);
        float most[R], normal[R];
        int seen[R], most_seen = 0;
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int64_t row = chunk * R + r;
            const float2 whole = row < a.group * a.q ? a.whole[list * a.group * a.q + row] : make_float2(0.0f, 0.0f);
            most[r] = reference(whole.x);
            normal[r] = whole.y;
            seen[r] = seen_by(a, list, row);
            most_seen = max(most_seen, seen[r]);
        }
        each_page(a, list, first, end, most_seen, [&](const page_view &page) {
            __syncwarp();
            page_logits<R>(own.scores, query, own.steps, page, a.layout);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = lane + 32 * i;
                const int64_t at = (int64_t)page.before + token;
                float sum = 0.0f;
#pragma unroll
                for (int r = 0; r < R; r++)
                    if (token < min(seen[r] - page.before, page.tokens))
                        sum = fmaf(exp2f(logit(a, own.scores[r * SCORE_ROW + token]) - most[r]), normal[r], sum);
                if (token < page.tokens && at < a.mass_tokens) mass[at] += sum;
            }
        });
    }
}

/* ---- sizes and launches */

int rows_of_block(int64_t rows, int d) { return rows <= 1 ? 1 : rows <= 4 || d > 128 ? 4 : 8; }

int64_t parts_of(int64_t blocks, int sms) { return kvc_ceil_div((int64_t)BLOCKS_PER_SM * sms, blocks); }

/* Bytes of sums, of ends, and of the whole's; false where they overflow. */
struct sizes {
    int64_t chunks, parts, rows; /* rows: that sums are left for */
    int64_t sums, ends, whole;
};

bool size_up(sizes *out, int64_t n, int64_t group, int64_t q, int d, bool mass, int sms) {
    int64_t rows, blocks, all;
    if (__builtin_mul_overflow(group, q, &rows) || __builtin_mul_overflow(n, rows, &all)) return false;
    *out = {};
    if (all == 0) return true;
    const int r = rows_of_block(rows, d);
    out->chunks = kvc_ceil_div(rows, r);
    blocks = n * out->chunks;
    out->parts = parts_of(blocks, sms);
    if (__builtin_mul_overflow(blocks, out->parts * r, &out->rows)) return false;
    if (out->rows > INT64_MAX / 4 / (d + 4) || all > INT64_MAX / 64) return false;
    out->sums = out->rows * d * (int64_t)sizeof(float);
    out->ends = out->rows * (int64_t)sizeof(float2);
    out->whole = mass ? all * (int64_t)sizeof(float2) : 0;
    return true;
}

rows view(const kvc_tensor *t) {
    const int64_t size = kvc_dtype_size(t->dtype);
    return {(char *)t->data, t->strides[0] * size, t->strides[1] * size, t->strides[2] * size, t->dtype};
}

template <int R> cudaError_t launch(const call &a, int64_t n, cudaStream_t stream) {
    const int64_t rows = a.group * a.q, blocks = n * a.chunks * a.parts;
    const int d = a.layout.head_dim;
    if (blocks > INT32_MAX || n * rows > INT32_MAX || n * a.mass_parts > INT32_MAX) return cudaErrorInvalidValue;
    attend_kernel<R><<<(unsigned)blocks, THREADS, memory_bytes<R>(d, true), stream>>>(a);
    merge_kernel<<<(unsigned)(n * rows), THREADS, 0, stream>>>(a, R);
    if (a.mass) mass_kernel<R><<<(unsigned)(n * a.mass_parts), THREADS, memory_bytes<R>(d, false), stream>>>(a);
    return cudaGetLastError();
}

} // namespace

int64_t kvc_attend_groups_workspace(int64_t n, int64_t group, int64_t q, int32_t head_dim, int64_t mass_tokens,
                                    int sms) {
    sizes s;
    if (!size_up(&s, n, group, q, head_dim, mass_tokens > 0, sms)) return INT64_MAX;
    int64_t bytes;
    if (__builtin_add_overflow(s.sums, s.ends + s.whole, &bytes)) return INT64_MAX;
    return bytes;
}

cudaError_t kvc_attend_groups(const kvc_attend_args *args, void *workspace, int sms, cudaStream_t stream) {
    const int64_t n = args->table.shape[0], b = args->queries.shape[0];
    const bool mass = kvc_given(&args->mass) && args->mass.shape[1] > 0;
    if (n == 0) return cudaSuccess;
    call a = {};
    a.heads = n / b;
    a.group = args->queries.shape[1] / a.heads;
    a.q = args->queries.shape[2];
    sizes s;
    if (!size_up(&s, n, a.group, a.q, args->layout.head_dim, mass, sms)) return cudaErrorInvalidValue;
    if (mass) {
        const size_t bytes = (size_t)kvc_elements(&args->mass) * sizeof(float);
        const cudaError_t error = cudaMemsetAsync(args->mass.data, 0, bytes, stream);
        if (error != cudaSuccess) return error;
    }
    if (s.rows == 0) return cudaSuccess; /* no queries */
    a.queries = view(&args->queries);
    a.out = view(&args->out);
    a.arena = (const uint8_t *)args->arena.data;
    a.arena_bytes = args->arena.shape[0];
    a.table = (const kvc_page *)args->table.data;
    a.capacity = args->table.shape[1];
    a.lists = (const kvc_list *)args->lists.data;
    a.new_tokens = (const int32_t *)args->new_tokens.data;
    a.sums = (float *)workspace;
    a.ends = (float2 *)((char *)workspace + s.sums);
    if (mass) {
        a.mass = (float *)args->mass.data;
        a.mass_tokens = args->mass.shape[1];
        a.whole = (float2 *)((char *)a.ends + s.ends);
        a.mass_parts = (int)parts_of(n, sms);
    }
    a.chunks = s.chunks;
    a.parts = (int)s.parts;
    a.layout = args->layout;
    a.rotation = args->rotation;
    a.cap = args->softcap;
    a.factor = a.cap > 0.0f ? args->scale / a.cap : args->scale * LOG2_E;
    switch (rows_of_block(a.group * a.q, a.layout.head_dim)) {
    case 1: return launch<1>(a, n, stream);
    case 4: return launch<4>(a, n, stream);
    default: return launch<8>(a, n, stream);
    }
}
