/* score_wgmma.cuh: score's two passes with wgmma, on sm_90a: 16-bit rows of up to 128 channels that begin at multiples
 * of 16 bytes, logits without a softcap.
 *
 * A block stays on its multiprocessor and takes spans (score_job.cuh) in turns. Four warps copy: 256 rows that are held
 * into one of two places, tiles of 64 rows that pass by into a ring, some tiles ahead and across spans. Four groups of
 * four warps have 64 held rows each as fragments in registers: while the tensor cores make one group's product, the
 * others take exponentials of theirs.
 *
 * The second pass holds keys, as score.cu's does, unless a block holds all of a list's rows (more than 128 of them):
 * then these stay, keys pass by once more, and a tile's columns are summed up over a warpgroup's rows: spans of 256
 * keys would let no more than four tiles of rows pass by each.
 *
 * Rows lie in shared memory piece by piece: 16 bytes of all rows, then the next 16 of all. Eight rows' pieces are the
 * 128 bytes that copies, ldmatrix and wgmma (no swizzle) want together.
 *
 * What bounds it, for rows of 128 channels and per tile of a block: 256 * 64 exponentials, of which a multiprocessor
 * makes 16 a clock, and 256 * 64 * 128 multiplications, of which it makes 2048 a clock: 1024 clocks of both. */
#pragma once
#include "score_job.cuh"

namespace {

template <int DTYPE, int D> struct hopper_shape {
    static constexpr bool brain = DTYPE == KVC_BFLOAT16;
    static constexpr int pieces = D / 8, steps = D / 16;
    static constexpr int m_rows = 64, groups = 4; /* a product's rows; warpgroups that multiply */
    static constexpr int held = m_rows * groups, passing = 64;
    static constexpr int copiers = 128, threads = 128 * groups + copiers;
    static constexpr int held_bytes = 16 * pieces * held, tile_bytes = 16 * pieces * passing;
    static constexpr int pair_bytes = 8 * passing;                 /* that go with a tile's rows in the second pass */
    static constexpr int column_floats = groups * 2 * 4 * passing; /* sums of a tile's columns: two of every warp's */
    static constexpr int ring = 5, ahead = 2; /* tiles; copies under way before the oldest is waited for */
    static constexpr int tiles = 2 * held_bytes, pairs = tiles + ring * tile_bytes; /* where they begin */
    static constexpr int columns = pairs + ring * pair_bytes;
    static constexpr int full = columns + 4 * column_floats; /* barriers: of tiles that have come, */
    static constexpr int empty = full + 8 * ring;            /* have been used, */
    static constexpr int held_read = empty + 8 * ring;       /* of held rows that are in registers, two */
    static constexpr int shared_bytes = held_read + 2 * 8;
    static_assert(D % 16 == 0 && shared_bytes <= 227 << 10, "whole steps, a block's shared memory");
    static_assert(held <= KVC_SCORE_BLOCK_ROWS && passing >= KVC_SCORE_TILE_ROWS, "the workspace is enough");
};

/* What a kernel is: the first pass; the second one with keys held; the second one with rows held, as in the first,
 * where one block holds all of a list's and there is a part of the sums for each of its warpgroups. */
enum { FIRST, KEYS_HELD, ROWS_HELD };

#ifdef KVC_HOPPER

/* Rows first .. first + ROWS-1 to shared memory, piece by piece; zeros for rows that are not there. The copiers'
 * lanes: 8 rows, 4 pieces. */
template <typename S, int ROWS, typename Rows>
__device__ __forceinline__ void copy_rows(uint32_t to, const Rows &from, int first) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x - 128 * S::groups) / 32;
#pragma unroll 1
    for (int at = 8 * warp; at < ROWS; at += 8 * (S::copiers / 32)) {
        const int row = at + (lane & 7);
        const bool has = from.has(first + row);
        const char *line = has ? from.at(first + row) : from.base;
#pragma unroll
        for (int i = 0; i < S::pieces; i += 4) {
            const int piece = i + (lane >> 3);
            if (S::pieces % 4 == 0 || piece < S::pieces)
                copy_piece(to + 16 * (piece * ROWS + row), line + 16 * piece, has);
        }
    }
}

/* x = the 64 rows of `held` times the 64 rows of the tile at `tile`; under way when this returns. */
#define KVC_SCORE_WGMMA(TYPE, ADD)                                                                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, " \
                 "%9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "     \
                 "%28, %29, %30, %31}, {%32, %33, %34, %35}, %36, " ADD ", 1, 1, 0;"                                  \
                 : "+f"(x[0][0]), "+f"(x[0][1]), "+f"(x[0][2]), "+f"(x[0][3]), "+f"(x[1][0]), "+f"(x[1][1]),          \
                   "+f"(x[1][2]), "+f"(x[1][3]), "+f"(x[2][0]), "+f"(x[2][1]), "+f"(x[2][2]), "+f"(x[2][3]),          \
                   "+f"(x[3][0]), "+f"(x[3][1]), "+f"(x[3][2]), "+f"(x[3][3]), "+f"(x[4][0]), "+f"(x[4][1]),          \
                   "+f"(x[4][2]), "+f"(x[4][3]), "+f"(x[5][0]), "+f"(x[5][1]), "+f"(x[5][2]), "+f"(x[5][3]),          \
                   "+f"(x[6][0]), "+f"(x[6][1]), "+f"(x[6][2]), "+f"(x[6][3]), "+f"(x[7][0]), "+f"(x[7][1]),          \
                   "+f"(x[7][2]), "+f"(x[7][3])                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <bool BRAIN, bool ADD>
__device__ __forceinline__ void wgmma_64(float (&x)[8][4], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (BRAIN && ADD)
        KVC_SCORE_WGMMA("bf16", "1");
    else if constexpr (BRAIN)
        KVC_SCORE_WGMMA("bf16", "0");
    else if constexpr (ADD)
        KVC_SCORE_WGMMA("f16", "1");
    else
        KVC_SCORE_WGMMA("f16", "0");
}
#undef KVC_SCORE_WGMMA

template <typename S>
__device__ __forceinline__ void begin_products(float (&x)[1][8][4], const uint32_t (&held)[S::steps][4],
                                               uint32_t tile) {
    const uint64_t first = descriptor(tile, 16 * S::passing, 128, 0);
    wgmma_begin();
    wgmma_64<S::brain, false>(x[0], held[0], first);
#pragma unroll
    for (int k = 1; k < S::steps; k++) wgmma_64<S::brain, true>(x[0], held[k], first + k * 2 * S::passing);
    wgmma_commit();
}

/* The products are there; reads of x stay behind this. */
__device__ __forceinline__ void end_products(float (&x)[1][8][4]) {
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(x[0][n][i])::"memory");
}

/* A place in the ring, and the parity of the phase that is waited for there. */
template <typename S> struct place {
    int at = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == S::ring) {
            at = 0;
            parity ^= 1;
        }
    }
};

template <typename S, int PASS> __device__ __forceinline__ span span_of(const call &a, int block) {
    return PASS == KEYS_HELD ? second_span<S>(a, block) : first_span<S>(a, block);
}

/* The copying warps. */
template <typename S, int PASS> __device__ __forceinline__ void copy_spans(const call &a, int spans, uint32_t base) {
    const int thread = threadIdx.x - 128 * S::groups;
    place<S> to, come;                         /* where the next tile goes; the oldest that is under way */
    int under_way = 0, tiles = 0, held_at = 0; /* tiles: of the span before */
    uint32_t held_parity = 1;
    const auto publish = [&] {
        fence_async();
        barrier_arrive(base + S::full + 8 * come.at);
        come.next();
    };
    const auto publish_all = [&] {
        copies_wait<0>();
        for (; under_way > 0; under_way--) publish();
    };
    bool waited = false;
    for (int block = blockIdx.x; block < spans; block += gridDim.x) {
        const span p = span_of<S, PASS>(a, block);
        if (!p.there || p.begin >= p.end) continue;
        /* The held rows of two spans ago have been read once the first tile of theirs is known to be there: it is,
         * where more tiles have followed than may be under way. */
        if (tiles <= S::ahead) publish_all();
        tiles = p.end - p.begin;
        barrier_wait(base + S::held_read + 8 * held_at, held_parity);
        const uint32_t held = base + held_at * S::held_bytes;
        held_at ^= 1;
        if (held_at == 0) held_parity ^= 1;
        const key_rows keys = keys_of(a, p.v, p.list);
        const query_rows queries = queries_of(a, p.v, p.list);
        if constexpr (PASS == KEYS_HELD)
            copy_rows<S, S::held>(held, keys, p.low);
        else
            copy_rows<S, S::held>(held, queries, p.low);
        for (int tile = p.begin; tile < p.end; tile++) {
            barrier_wait(base + S::empty + 8 * to.at, to.parity ^ 1);
            const uint32_t there = base + S::tiles + to.at * S::tile_bytes;
            if constexpr (PASS != KEYS_HELD) {
                copy_rows<S, S::passing>(there, keys, tile * S::passing);
            } else {
                copy_rows<S, S::passing>(there, queries, tile * S::passing);
                if (!waited) wait_for_previous(); /* for what is known of the rows */
                waited = true;
                if (thread < S::passing / 2)
                    copy_piece(base + S::pairs + to.at * S::pair_bytes + 16 * thread,
                               a.rows + (int64_t)p.list * a.padded + tile * S::passing + 2 * thread, true);
            }
            copies_end_group();
            to.next();
            if (under_way < S::ahead) {
                under_way++;
            } else {
                copies_wait<S::ahead>();
                publish();
            }
        }
    }
    publish_all();
}

/* A tile's columns, summed up over the rows of a warpgroup and written. */
template <typename S>
__device__ __forceinline__ void write_columns(const call &a, const span &p, int tile, const float (&x)[1][8][4],
                                              const float2 (&rows)[2], float *shared, int &turn) {
    const int lane = threadIdx.x & 31, group = threadIdx.x / 128, thread = threadIdx.x & 127;
    const float2 sum = columns_of_rows(x, rows, a.scale);
    float *const mine = shared + (2 * group + turn) * 4 * S::passing; /* two: one is read while the other is written */
    turn ^= 1;
    *(float2 *)(mine + thread / 32 * S::passing + column_of(lane)) = sum;
    named_barrier(1 + group, 128);
    const int token = tile * S::passing + thread;
    if (thread < S::passing && token < a.s)
        a.sums[((int64_t)p.list * a.row_parts + group) * a.s + token] =
            (mine[thread] + mine[S::passing + thread]) +
            (mine[2 * S::passing + thread] + mine[3 * S::passing + thread]);
}

/* The warps that multiply. */
template <typename S, int PASS>
__device__ __forceinline__ void multiply_spans(const call &a, int spans, char *shared, uint32_t base) {
    const int lane = threadIdx.x & 31, mine = threadIdx.x / 32 * 16;
    place<S> at;
    int held_at = 0, turn = 0;
    if (PASS == ROWS_HELD) wait_for_previous(); /* for what is known of the rows */
    for (int block = blockIdx.x; block < spans; block += gridDim.x) {
        const span p = span_of<S, PASS>(a, block);
        if (!p.there) continue;
        const list_view &v = p.v;
        const int row = p.low + mine + (lane >> 2);
        float most[1][2], total[1][2];
        float2 known_rows[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[0][i] = -CUDART_INF_F;
            total[0][i] = 0.0f;
            known_rows[i] = make_float2(0.0f, 0.0f);
            if (PASS == ROWS_HELD && row + 8 * i < a.padded)
                known_rows[i] = __ldcg(a.rows + (int64_t)p.list * a.padded + row + 8 * i);
        }
        const int bound = PASS == KEYS_HELD ? begin_of(a, v, min(p.low + S::held, a.s) - 1) : end_of(a, v, p.low);
        if (p.begin < p.end) {
            uint32_t held[S::steps][4];
            barrier_wait(base + S::full + 8 * at.at, at.parity); /* with the span's first tile come its held rows */
#pragma unroll
            for (int k = 0; k < S::steps; k++)
                load_matrices(held[k], base + held_at * S::held_bytes +
                                           16 * ((2 * k + (lane >> 4)) * S::held + mine + (lane & 15)));
            __syncwarp();
            if (lane == 0) barrier_arrive(base + S::held_read + 8 * held_at);
            held_at ^= 1;
#pragma unroll 1
            for (int tile = p.begin; tile < p.end; tile++) {
                barrier_wait(base + S::full + 8 * at.at, at.parity);
                float x[1][8][4];
                begin_products<S>(x, held, base + S::tiles + at.at * S::tile_bytes);
                end_products(x);
                const auto used = [&] {
                    __syncwarp();
                    if (lane == 0) barrier_arrive(base + S::empty + 8 * at.at);
                };
                const int column = tile * S::passing + 2 * (lane & 3);
                if constexpr (PASS == KEYS_HELD) {
                    if (tile * S::passing < bound)
                        mask(x, a, column,
                             [&](int, int half) { return make_int2(begin_of(a, v, row + 8 * half), INT_MAX); });
                    const char *pairs = shared + S::pairs + at.at * S::pair_bytes;
                    float sum[1][2] = {};
                    add_to_tokens(sum, x, (const float4 *)pairs + (lane & 3), a.scale);
#pragma unroll
                    for (int i = 0; i < 2; i++) total[0][i] += sum[0][i];
                    used();
                } else {
                    used();
                    if (tile * S::passing < v.first || (tile + 1) * S::passing > bound)
                        mask(x, a, column,
                             [&](int, int half) { return make_int2(v.first, end_of(a, v, row + 8 * half)); });
                    if constexpr (PASS == FIRST)
                        add_to_rows(most, total, x, a.scale);
                    else if (threadIdx.x / 128 < a.row_parts)
                        write_columns<S>(a, p, tile, x, known_rows, (float *)(shared + S::columns), turn);
                }
                at.next();
            }
        }
        if constexpr (PASS == FIRST)
            write_rows(a, p, row, most[0], total[0]);
        else if constexpr (PASS == KEYS_HELD)
            write_tokens(a, p, row, total[0]);
    }
}

#endif

template <typename S, int PASS>
__global__ void __launch_bounds__(S::threads, 1) hopper_kernel(const __grid_constant__ call a, int spans) {
#ifdef KVC_HOPPER
    extern __shared__ __align__(128) char shared[];
    const uint32_t base = shared_address(shared);
    let_next_begin();
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::ring; i++) {
            barrier_init(base + S::full + 8 * i, S::copiers);
            barrier_init(base + S::empty + 8 * i, 4 * S::groups);
        }
        for (int i = 0; i < 2; i++) barrier_init(base + S::held_read + 8 * i, 4 * S::groups);
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * S::groups) {
        registers_give<32>();
        copy_spans<S, PASS>(a, spans, base);
    } else {
        registers_take<112>();
        multiply_spans<S, PASS>(a, spans, shared, base);
    }
#endif
}

} // namespace
