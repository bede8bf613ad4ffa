/* score_wgmma.cuh: score's two passes with wgmma, on sm_90a: 16-bit rows of up to 128 channels that begin at multiples
 * of 16 bytes, logits without a softcap.
 *
 * A block stays on its multiprocessor and takes spans (score_job.cuh) in turns. Four warps copy: 256 rows that are held
 * into a place of their own, tiles of 64 rows that pass by into a ring, some tiles ahead and across spans. Two groups
 * of four warps have 128 held rows each as fragments in registers, 64 for each of two products: while the tensor cores
 * make one, the warps take exponentials of the other.
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
    static constexpr int m_rows = 64, m_tiles = 2,
                         groups = 2; /* a product's rows; products and warpgroups of a block */
    static constexpr int held = m_rows * m_tiles * groups, passing = 64;
    static constexpr int copiers = 128, threads = 128 * groups + copiers;
    static constexpr int held_bytes = 16 * pieces * held, tile_bytes = 16 * pieces * passing;
    static constexpr int pair_bytes = 8 * passing; /* that go with a tile's rows in the second pass */
    static constexpr int ring = 8, ahead = 4;      /* tiles; copies under way before the oldest is waited for */
    static constexpr int full = held_bytes + ring * (tile_bytes + pair_bytes); /* barriers: of tiles that have come, */
    static constexpr int empty = full + 8 * ring;                              /* have been used, */
    static constexpr int held_read = empty + 8 * ring;                         /* of held rows that are in registers */
    static constexpr int shared_bytes = held_read + 8;
    static_assert(D % 16 == 0 && shared_bytes <= 227 << 10, "whole steps, a block's shared memory");
    static_assert(held <= KVC_SCORE_BLOCK_ROWS && passing >= KVC_SCORE_TILE_ROWS, "the workspace is enough");
};

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

template <typename S, bool FIRST> __device__ __forceinline__ span span_of(const call &a, int block) {
    return FIRST ? first_span<S>(a, block) : second_span<S>(a, block);
}

/* The copying warps. */
template <typename S, bool FIRST> __device__ __forceinline__ void copy_spans(const call &a, int spans, uint32_t base) {
    const int thread = threadIdx.x - 128 * S::groups;
    place<S> to, come; /* where the next tile goes; the oldest that is under way */
    int under_way = 0;
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
    for (int block = blockIdx.x; block < spans; block += gridDim.x) {
        const span p = span_of<S, FIRST>(a, block);
        if (!p.there || p.begin >= p.end) continue;
        publish_all(); /* who is to read the held rows needs the tiles that came with them */
        barrier_wait(base + S::held_read, held_parity);
        held_parity ^= 1;
        const key_rows keys = keys_of(a, p.v, p.list);
        const query_rows queries = queries_of(a, p.v, p.list);
        if constexpr (FIRST)
            copy_rows<S, S::held>(base, queries, p.low);
        else
            copy_rows<S, S::held>(base, keys, p.low);
        for (int tile = p.begin; tile < p.end; tile++) {
            barrier_wait(base + S::empty + 8 * to.at, to.parity ^ 1);
            const uint32_t there = base + S::held_bytes + to.at * S::tile_bytes;
            if constexpr (FIRST) {
                copy_rows<S, S::passing>(there, keys, tile * S::passing);
            } else {
                copy_rows<S, S::passing>(there, queries, tile * S::passing);
                if (thread < S::passing / 2)
                    copy_piece(base + S::held_bytes + S::ring * S::tile_bytes + to.at * S::pair_bytes + 16 * thread,
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

/* The warps that multiply. */
template <typename S, bool FIRST>
__device__ __forceinline__ void multiply_spans(const call &a, int spans, const char *shared, uint32_t base) {
    const int lane = threadIdx.x & 31, mine = threadIdx.x / 128 * S::m_rows * S::m_tiles + threadIdx.x / 32 % 4 * 16;
    place<S> at;
    for (int block = blockIdx.x; block < spans; block += gridDim.x) {
        const span p = span_of<S, FIRST>(a, block);
        if (!p.there) continue;
        const list_view &v = p.v;
        const int row = p.low + mine + (lane >> 2);
        float most[S::m_tiles][1][2], total[S::m_tiles][1][2];
#pragma unroll
        for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                most[m][0][i] = -CUDART_INF_F;
                total[m][0][i] = 0.0f;
            }
        const int bound = FIRST ? end_of(a, v, p.low) : begin_of(a, v, min(p.low + S::held, a.s) - 1);
        /* What a tile's logits add to the sums of 64 rows held. */
        const auto take = [&](float (&x)[1][8][4], int m, int tile) {
            const int column = tile * S::passing + 2 * (lane & 3);
            const int here = row + S::m_rows * m;
            if constexpr (FIRST) {
                if (tile * S::passing < v.first || (tile + 1) * S::passing > bound)
                    mask(x, a, column,
                         [&](int, int half) { return make_int2(v.first, end_of(a, v, here + 8 * half)); });
                add_to_rows(most[m], total[m], x, a.scale);
            } else {
                if (tile * S::passing < bound)
                    mask(x, a, column,
                         [&](int, int half) { return make_int2(begin_of(a, v, here + 8 * half), INT_MAX); });
                const char *pairs = shared + S::held_bytes + S::ring * S::tile_bytes + at.at * S::pair_bytes;
                float sum[1][2] = {};
                add_to_tokens(sum, x, (const float4 *)pairs + (lane & 3), a.scale);
#pragma unroll
                for (int i = 0; i < 2; i++) total[m][0][i] += sum[0][i];
            }
        };
        if (p.begin < p.end) {
            const auto here = [&] { return base + S::held_bytes + at.at * S::tile_bytes; };
            const auto used = [&] {
                __syncwarp();
                if (lane == 0) barrier_arrive(base + S::empty + 8 * at.at);
            };
            uint32_t held[S::m_tiles][S::steps][4];
            float x[2][1][8][4];
            barrier_wait(base + S::full + 8 * at.at, at.parity); /* with the span's first tile come its held rows */
#pragma unroll
            for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
                for (int k = 0; k < S::steps; k++)
                    load_matrices(held[m][k],
                                  base + 16 * ((2 * k + (lane >> 4)) * S::held + mine + S::m_rows * m + (lane & 15)));
            __syncwarp();
            if (lane == 0) barrier_arrive(base + S::held_read);
            begin_products<S>(x[0], held[0], here());
            end_products(x[0]);
#pragma unroll 1
            for (int tile = p.begin; tile < p.end - 1; tile++) {
                begin_products<S>(x[1], held[1], here());
                take(x[0], 0, tile);
                place<S> next = at;
                next.next();
                barrier_wait(base + S::full + 8 * next.at, next.parity);
                end_products(x[1]);
                begin_products<S>(x[0], held[0], base + S::held_bytes + next.at * S::tile_bytes);
                take(x[1], 1, tile);
                end_products(x[0]);
                used();
                at = next;
            }
            begin_products<S>(x[1], held[1], here());
            take(x[0], 0, p.end - 1);
            end_products(x[1]);
            take(x[1], 1, p.end - 1);
            used();
            at.next();
        }
#pragma unroll
        for (int m = 0; m < S::m_tiles; m++) {
            if constexpr (FIRST)
                write_rows(a, p, row + S::m_rows * m, most[m][0], total[m][0]);
            else
                write_tokens(a, p, row + S::m_rows * m, total[m][0]);
        }
    }
}

#endif

template <typename S, bool FIRST>
__global__ void __launch_bounds__(S::threads, 1) hopper_kernel(const __grid_constant__ call a, int spans) {
#ifdef KVC_HOPPER
    extern __shared__ __align__(128) char shared[];
    const uint32_t base = shared_address(shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::ring; i++) {
            barrier_init(base + S::full + 8 * i, S::copiers);
            barrier_init(base + S::empty + 8 * i, 4 * S::groups);
        }
        barrier_init(base + S::held_read, 4 * S::groups);
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * S::groups) {
        registers_give<40>();
        copy_spans<S, FIRST>(a, spans, base);
    } else {
        registers_take<232>();
        multiply_spans<S, FIRST>(a, spans, shared, base);
    }
#endif
}

} // namespace
