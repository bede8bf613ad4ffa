/* bsr_mma.cu: block-sparse times dense by mma.sync: every block size, architecture, alignment. A block of threads makes
 * a tile's 128 rows by 128 columns, a warp 32 by 64 of them; values and dense come by cp.async, four stages of 32 (16)
 * columns of op(A). Blocks of A that a step does not have are neither read nor multiplied. */
#include "bsr_tile.cuh"

namespace {

constexpr int COLUMNS = 128, THREADS = 256, STAGES = 4;
constexpr int PANEL = 8; /* tiles of columns that all rows pass before the next ones */

template <bool BRAIN, bool SMALL, bool TRANSPOSE, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, 2) mma_kernel(const bsr_job job, int column_tiles) {
    constexpr int DEPTH = SMALL ? 16 : 32; /* of a stage */
    constexpr int VALUES = KVC_BSR_ROWS * DEPTH * 2, STAGE = VALUES + DEPTH * COLUMNS * 2;
    constexpr int PARTS = KVC_BSR_ROWS * DEPTH / 8 / THREADS; /* of 16 bytes, by each thread; of dense as many */
    extern __shared__ __align__(128) char shared[];
    __shared__ int present[STAGES][KVC_BSR_ROWS / 16];
    if (!bsr_plan_fits(job)) return;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, wm = warp / 2, wn = warp % 2;
    const int b = SMALL ? 16 : job.head.block, subs = KVC_BSR_ROWS / b, words = 1 + subs, per_step = b / DEPTH;
    const kvc_bsr_place at = bsr_place(job, blockIdx.x, (uint32_t)column_tiles, PANEL);
    const kvc_bsr_tile tile = bsr_tiles(job)[at.tile];
    const int first_column = (int)at.group * COLUMNS;
    const int32_t *steps = bsr_steps(job) + (int64_t)tile.first * words;
    const int64_t count = (int64_t)tile.steps * per_step, block_bytes = (int64_t)b * b * 2;

    /* What this thread copies: PARTS of values, PARTS of dense. */
    int sub[PARTS], value_place[PARTS], value_offset[PARTS], dense_row[PARTS], dense_place[PARTS], dense_bytes[PARTS];
    int64_t dense_offset[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const int c = thread + i * THREADS;
        if (TRANSPOSE) {
            const int k = c / 16, m = c % 16 * 8;
            sub[i] = m / b;
            value_offset[i] = (k * b + m % b) * 2;
            value_place[i] = tile_place<256>(k, c % 16);
        } else {
            const int row = c / (DEPTH / 8), part = c % (DEPTH / 8);
            sub[i] = row / b;
            value_offset[i] = (row % b * b + part * 8) * 2;
            value_place[i] = tile_place<DEPTH * 2>(row, part);
        }
        const int column = first_column + c % 16 * 8;
        dense_row[i] = c / 16;
        dense_place[i] = VALUES + tile_place<256>(dense_row[i], c % 16);
        dense_bytes[i] = 2 * max(0, min(8, job.columns - column));
        dense_offset[i] = dense_bytes[i] ? 2ll * column : 0;
    }
    const int half_step = DEPTH * (TRANSPOSE ? b : 1) * 2; /* bytes of values from one stage of a step to the next */

    /* The step whose stages are requested next, read ahead. */
    int32_t column = 0, block[PARTS], mine = -1;
    auto look = [&](int64_t step) {
        if (step >= tile.steps) return;
        const int32_t *word = steps + step * words;
        column = __ldg(word);
#pragma unroll
        for (int i = 0; i < PARTS; i++) block[i] = __ldg(word + 1 + sub[i]);
        if (thread < subs) mine = __ldg(word + 1 + thread);
    };
    int64_t asked_step = 0;
    int asked_part = 0;
    auto request = [&](int stage) {
        if (asked_step < tile.steps) {
            const uint32_t to = tile_address(shared) + stage * STAGE;
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                if (block[i] >= 0 && block[i] < job.head.blocks)
                    tile_copy<ALIGNED>(to + value_place[i],
                                       job.values + block[i] * block_bytes + value_offset[i] + asked_part * half_step,
                                       16);
                const int64_t row = (int64_t)column * b + asked_part * DEPTH + dense_row[i];
                const bool real = row < job.depth;
                tile_copy<ALIGNED>(to + dense_place[i],
                                   job.dense + (real ? row : 0) * job.dense_pitch * 2 + dense_offset[i],
                                   real ? dense_bytes[i] : 0);
            }
            if (thread < subs) present[stage][thread] = mine >= 0;
            if (++asked_part == per_step) {
                asked_part = 0;
                look(++asked_step);
            }
        }
        tile_commit();
    };
    look(0);
    for (int i = 0; i < STAGES - 1; i++) request(i);

    float d[2][8][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) d[i][n][e] = 0.0f;
    for (int64_t it = 0; it < count; it++) {
        const int stage = (int)(it % STAGES);
        tile_wait<STAGES - 2>();
        __syncthreads(); /* the stage is there for all, and nobody reads the one before */
        request((int)((it + STAGES - 1) % STAGES));
        const bool first = present[stage][SMALL ? 2 * wm : wm * 32 / b];
        const bool second = SMALL ? present[stage][2 * wm + 1] : first;
        if (!first && !second) continue;
        const uint32_t values = tile_address(shared) + stage * STAGE, dense = values + VALUES;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t left[2][4], right[4][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int m = wm * 32 + i * 16;
                if (TRANSPOSE)
                    tile_load<true>(left[i],
                                    values + tile_place<256>(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
                else
                    tile_load<false>(left[i], values + tile_place<DEPTH * 2>(m + lane % 16, k / 8 + lane / 16));
            }
#pragma unroll
            for (int n = 0; n < 4; n++)
                tile_load<true>(right[n], dense + tile_place<256>(k + lane % 16, wn * 8 + 2 * n + lane / 16));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (SMALL && !(i ? second : first)) continue;
#pragma unroll
                for (int n = 0; n < 8; n++)
                    tile_multiply<BRAIN>(d[i][n], left[i], right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]);
            }
        }
    }

    const int size = job.out_type == KVC_FLOAT32 ? 4 : 2;
    const bool pairs = job.out_pitch % 2 == 0 && (uintptr_t)job.out % (2 * size) == 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t row = (int64_t)tile.row * KVC_BSR_ROWS + wm * 32 + i * 16 + half * 8 + lane / 4;
            if (row >= job.rows) continue;
            char *out = job.out + row * job.out_pitch * size;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const int64_t x = (int64_t)first_column + wn * 64 + n * 8 + lane % 4 * 2;
                if (x >= job.columns) continue;
                const bool both = x + 1 < job.columns;
                float low = d[i][n][2 * half], high = d[i][n][2 * half + 1];
                if (job.beta != 0.0f) {
                    low += job.beta * bsr_load(out, x, job.out_type);
                    if (both) high += job.beta * bsr_load(out, x + 1, job.out_type);
                }
                if (pairs && both) {
                    if (size == 4)
                        *(float2 *)(out + 4 * x) = make_float2(low, high);
                    else
                        *(uint32_t *)(out + 2 * x) = bsr_pair(low, high, job.out_type);
                } else {
                    bsr_store(out, x, job.out_type, low);
                    if (both) bsr_store(out, x + 1, job.out_type, high);
                }
            }
        }
}

template <bool BRAIN, bool SMALL, bool TRANSPOSE, bool ALIGNED>
kvc_status launch(const bsr_job &job, cudaStream_t stream) {
    const int64_t column_tiles = kvc_ceil_div(job.columns, COLUMNS), work = column_tiles * job.head.tiles;
    if (work > INT32_MAX)
        return kvc_fail(KVC_ENOTSUP, "bsr_matmul: out: expected at most 2^31 - 1 tiles of %d by %d, got %lld",
                        KVC_BSR_ROWS, COLUMNS, (long long)work);
    constexpr int BYTES = STAGES * (KVC_BSR_ROWS + COLUMNS) * (SMALL ? 16 : 32) * 2;
    cudaError_t error = cudaFuncSetAttribute(mma_kernel<BRAIN, SMALL, TRANSPOSE, ALIGNED>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error != cudaSuccess) return kvc_cuda_fail("bsr_matmul", error);
    mma_kernel<BRAIN, SMALL, TRANSPOSE, ALIGNED><<<(unsigned)work, THREADS, BYTES, stream>>>(job, (int)column_tiles);
    error = cudaGetLastError();
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("bsr_matmul", error);
}

template <bool BRAIN, bool SMALL> kvc_status launch_any(const bsr_job &job, cudaStream_t stream) {
    const bool aligned = ((uintptr_t)job.values | (uintptr_t)job.dense | (uintptr_t)(2 * job.dense_pitch)) % 16 == 0;
    if (job.head.transpose)
        return aligned ? launch<BRAIN, SMALL, true, true>(job, stream) : launch<BRAIN, SMALL, true, false>(job, stream);
    return aligned ? launch<BRAIN, SMALL, false, true>(job, stream) : launch<BRAIN, SMALL, false, false>(job, stream);
}

} // namespace

kvc_status bsr_mma(const bsr_job &job, int32_t type, cudaStream_t stream) {
    const bool small = job.head.block == 16;
    if (type == KVC_BFLOAT16) return small ? launch_any<true, true>(job, stream) : launch_any<true, false>(job, stream);
    return small ? launch_any<false, true>(job, stream) : launch_any<false, false>(job, stream);
}
