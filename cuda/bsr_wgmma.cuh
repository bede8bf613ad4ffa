/* bsr_wgmma.cuh: block-sparse times dense on sm_90a: blocks of 32, 64, 128, tiles of 128 rows by 256 columns.
 *
 * A block of threads is a producer warp and two consumer warpgroups of 64 rows each; CLUSTER blocks side by side along
 * the columns share a tile's rows, steps and values: each loads its part of the values for all of them (multicast), and
 * its own columns of the dense matrix. A stage is 64 (32) columns of op(A): 16 (8) KB of values and 32 (16) KB dense.
 *
 * A stage also says what it is for: which warpgroups have blocks in it, which tile, whether the tile ends with it. So
 * consumers follow the stages and nothing else; a tile without steps, and the end, are stages without data.
 *
 *     full[stage]   1 arrival (this block's producer) + bytes: values from all blocks of the cluster, dense from its
 * own empty[stage]  8 warps x CLUSTER blocks: a producer writes into the shared memory of all blocks, so it waits for
 *                   the consumers of all; each warp arrives in all blocks.
 *     next[turn]    CLUSTER > 1: the leader's producer takes the cluster's work from a counter and sends it to all: 1
 *                   arrival (this block's producer) + 4 bytes. There are more of these than stages: work for turn t + 1
 *                   is sent during turn t, when the leader has waited for stages of turn t - 1 - STAGES or later to be
 *                   empty everywhere, so for all producers to have read that turn's work.
 *
 * Order of the work: kvc_bsr_place_of. It is taken as late as the way of a number to all blocks allows: who takes a
 * tile when the one before begins keeps it from those who are done earlier. What a sum adds up does not depend on who
 * adds it up: results are the same every time. */
#pragma once
#include "bsr_job.cuh"
#include "hopper.cuh"

struct bsr_wgmma_job {
    CUtensorMap values; /* (block, block, blocks): boxes of a stage's part for one block of the cluster */
    CUtensorMap dense;  /* (columns, depth): boxes of 64 by a stage's depth */
    CUtensorMap out;    /* (columns, rows): boxes of 128 bytes by 64 */
    bsr_job job;
    uint32_t work;         /* tiles * groups */
    int32_t groups, panel; /* of 256 * CLUSTER columns: all, of a panel */
};

namespace bsr {

constexpr int COLUMNS = 256;
constexpr int THREADS = 384;
constexpr int WARPS = 8; /* that consume */
constexpr int PIECE_BYTES = 64 * 128;
/* Of a warpgroup, 2 or 4: a tile of 16-bit sums has 4, which wait for no store where all have room; stages pay for it.
 */
#ifndef KVC_BSR_PIECES
#define KVC_BSR_PIECES 2
#endif
constexpr int PIECES_EACH = KVC_BSR_PIECES;
constexpr int CONTROL_BYTES = 1024, ALIGNMENT = 1024;
constexpr int SHARED = 232448; /* bytes of a block of threads on sm_90 */
constexpr int TURNS = 16;

template <int BLOCK, int CLUSTER> struct shape {
    static constexpr int WIDTH = BLOCK < 64 ? BLOCK : 64; /* columns of op(A) in a stage */
    static constexpr int HALVES = BLOCK / WIDTH;          /* stages of a step */
    static constexpr int SUBS = KVC_BSR_ROWS / BLOCK;     /* block rows of a tile */
    static constexpr int WORDS = 1 + SUBS;                /* of a step */
    static constexpr int VALUES = KVC_BSR_ROWS * WIDTH * 2;
    static constexpr int STAGE = VALUES + WIDTH * COLUMNS * 2; /* bytes */
    static constexpr int STAGES = (SHARED - ALIGNMENT - CONTROL_BYTES - 2 * PIECES_EACH * PIECE_BYTES) / STAGE;
    static constexpr int LATE = 256 / BLOCK; /* steps before a tile's end, when the next work is asked for */
    /* A box of values is BOX by WIDTH; 128 / BOX of them are a stage's, PART of them one block's of the cluster. */
    static constexpr int SHARE = KVC_BSR_ROWS / CLUSTER;
    static constexpr int BOX = WIDTH < SHARE ? WIDTH : SHARE;
    static constexpr int PART = SHARE / BOX;
    static constexpr int PIECES = STAGES * STAGE; /* offset of what goes out */
    static constexpr int CONTROL = PIECES + 2 * PIECES_EACH * PIECE_BYTES;
    static constexpr int BYTES = CONTROL + CONTROL_BYTES + ALIGNMENT;
};

template <int STAGES> struct control {
    uint64_t full[STAGES], empty[STAGES], next[TURNS];
    int4 info[STAGES]; /* flags, tile, first column */
    uint32_t work[TURNS];
};
static_assert(sizeof(control<8>) <= CONTROL_BYTES && 8 + 3 < TURNS, "see the head");

enum { LAST = 4, STOP = 8 }; /* flags; 1, 2: the warpgroup has blocks */

} // namespace bsr

namespace {

#ifdef KVC_HOPPER

/* ---- the producer: one warp */

template <int BLOCK, int CLUSTER, bool TRANSPOSE> struct bsr_producer {
    using S = bsr::shape<BLOCK, CLUSTER>;
    const bsr_wgmma_job &j;
    bsr::control<S::STAGES> *control;
    uint32_t stages; /* address of the first */
    int lane;
    uint32_t rank;
    uint64_t first, last; /* policies */
    int slot;
    uint32_t phase;

    /* Sends (or keeps) the work of a turn: every block of the cluster gets the same. */
    __device__ __forceinline__ uint32_t request(uint32_t turn) {
        uint32_t work = 0;
        if (rank == 0 && lane == 0) work = atomicAdd(j.job.counter, 1u);
        if (CLUSTER > 1 && rank == 0) {
            work = __shfl_sync(0xffffffffu, work, 0);
            const int at = turn % bsr::TURNS;
            if (lane < CLUSTER)
                store_async(shared_of(shared_address(&control->work[at]), lane), work,
                            shared_of(shared_address(&control->next[at]), lane));
        }
        return work;
    }

    __device__ __forceinline__ uint32_t receive(uint32_t turn, uint32_t requested) {
        if (CLUSTER == 1) return __shfl_sync(0xffffffffu, requested, 0);
        const int at = turn % bsr::TURNS;
        const uint32_t barrier = shared_address(&control->next[at]);
        if (lane == 0) barrier_expect(barrier, 4);
        barrier_wait<true>(barrier, turn / bsr::TURNS & 1);
        return control->work[at];
    }

    __device__ __forceinline__ void advance() {
        if (++slot == S::STAGES) {
            slot = 0;
            phase ^= 1;
        }
    }

    /* A stage without data. */
    __device__ __forceinline__ void say(int flags, int tile, int column) {
        barrier_wait(shared_address(&control->empty[slot]), phase ^ 1);
        if (lane == 0) {
            control->info[slot] = make_int4(flags, tile, column, 0);
            barrier_arrive(shared_address(&control->full[slot]));
        }
        __syncwarp();
        advance();
    }

    /* Half `half` of a step: block column `column`, blocks sub[]. */
    __device__ __forceinline__ void load(int column, const int (&sub)[S::SUBS], int half, int flags, int tile,
                                         int first_column) {
        barrier_wait(shared_address(&control->empty[slot]), phase ^ 1);
        if (lane == 0) {
            const uint32_t barrier = shared_address(&control->full[slot]), values = stages + slot * S::STAGE;
            control->info[slot] = make_int4(flags, tile, first_column, 0);
            const int halves = (flags & 1) + (flags >> 1 & 1);
            barrier_expect(barrier, S::STAGE - S::VALUES + halves * (S::VALUES / 2));
#pragma unroll
            for (int i = 0; i < bsr::COLUMNS / 64; i++)
                load_box(values + S::VALUES + i * (S::WIDTH * 128), &j.dense, first_column + 64 * i,
                         column * BLOCK + half * S::WIDTH, barrier, last);
#pragma unroll
            for (int q = 0; q < S::PART * CLUSTER; q++) {
                if (CLUSTER > 1 && q / S::PART != (int)rank) continue;
                const int row = q * S::BOX; /* of the tile; TRANSPOSE: of chunks of WIDTH rows, each WIDTH deep */
                if (!(flags >> (row / 64) & 1)) continue;
                int block, x, y;
                if (TRANSPOSE) {
                    const int chunk = row / S::WIDTH * S::WIDTH;
                    block = sub[chunk / BLOCK];
                    x = chunk % BLOCK;
                    y = half * S::WIDTH + row % S::WIDTH;
                } else {
                    block = sub[row / BLOCK];
                    x = half * S::WIDTH;
                    y = row % BLOCK;
                }
                /* A block that is not there lies behind the last one: zeros. */
                load_block_box<(CLUSTER > 1)>(values + row * (S::WIDTH * 2), &j.values, x, y,
                                              block < 0 ? j.job.head.blocks : block, barrier,
                                              (uint16_t)((1 << CLUSTER) - 1), first);
            }
        }
        __syncwarp();
        advance();
    }

    /* Words of a tile's steps pass by the lanes, a batch ahead. Returns what it requested: the next turn's work. */
    __device__ __forceinline__ uint32_t run_tile(const kvc_bsr_tile &tile, const int32_t *words, int first_column,
                                                 uint32_t turn) {
        constexpr int BATCH = 32 / S::WORDS; /* steps */
        uint32_t requested = 0;
        if (tile.steps <= S::LATE) requested = request(turn + 1);
        if (tile.steps == 0) {
            say(bsr::LAST, tile.row, first_column);
            return requested;
        }
        words += (int64_t)tile.first * S::WORDS;
        const int64_t count = (int64_t)tile.steps * S::WORDS;
        auto fetch = [&](int64_t from) {
            return lane < BATCH * S::WORDS && from + lane < count ? __ldg(words + from + lane) : -1;
        };
        int32_t mine = fetch(0);
        for (int64_t begin = 0; begin < tile.steps; begin += BATCH) {
            const int32_t next = fetch((begin + BATCH) * S::WORDS);
            const int steps = (int)(tile.steps - begin < BATCH ? tile.steps - begin : BATCH);
            for (int i = 0; i < steps; i++) {
                if (begin + i + S::LATE == tile.steps - 1) requested = request(turn + 1);
                const int column = __shfl_sync(0xffffffffu, mine, i * S::WORDS);
                int sub[S::SUBS], flags = 0;
#pragma unroll
                for (int s = 0; s < S::SUBS; s++) {
                    sub[s] = __shfl_sync(0xffffffffu, mine, i * S::WORDS + 1 + s);
                    if (sub[s] >= 0) flags |= BLOCK == 128 ? 3 : 1 << (s * BLOCK / 64);
                }
                const bool end = begin + i == tile.steps - 1;
#pragma unroll
                for (int half = 0; half < S::HALVES; half++)
                    load(column, sub, half, flags | (end && half == S::HALVES - 1 ? bsr::LAST : 0), tile.row,
                         first_column);
            }
            mine = next;
        }
        return requested;
    }

    __device__ __forceinline__ void run() {
        first = policy_first();
        last = policy_last();
        slot = 0;
        phase = 0;
        const kvc_bsr_tile *tiles = bsr_tiles(j.job);
        const int32_t *steps = bsr_steps(j.job);
        uint32_t turn = 0, requested = request(0);
        for (;; turn++) {
            const uint32_t work = receive(turn, requested);
            if (work >= j.work) break;
            const kvc_bsr_place at = bsr_place(j.job, work, (uint32_t)j.groups, (uint32_t)j.panel);
            const int4 tile = ((const int4 *)tiles)[at.tile];
            requested = run_tile(kvc_bsr_tile{tile.x, tile.y, tile.z, tile.w}, steps,
                                 (int)((at.group * CLUSTER + rank) * bsr::COLUMNS), turn);
        }
        say(bsr::STOP, 0, 0);
    }
};

/* ---- a consumer: one warpgroup, 64 rows */

template <int BLOCK, int CLUSTER, bool BRAIN, bool TRANSPOSE> struct bsr_consumer {
    using S = bsr::shape<BLOCK, CLUSTER>;
    const bsr_wgmma_job &j;
    bsr::control<S::STAGES> *control;
    uint32_t stages, pieces; /* addresses; pieces: this warpgroup's */
    char *piece;
    int group, thread, lane, warp; /* of the warpgroup */
    uint32_t stored;               /* pieces so far */
    int slot;
    uint32_t phase;

    /* The stage may be written again, by all blocks of the cluster. */
    __device__ __forceinline__ void release(int slot) {
        __syncwarp();
        const uint32_t barrier = shared_address(&control->empty[slot]);
        if (CLUSTER == 1) {
            if (lane == 0) barrier_arrive(barrier);
        } else if (lane < CLUSTER) {
            barrier_arrive_at(shared_of(barrier, lane));
        }
    }

    __device__ __forceinline__ void multiply(float (&d)[128], int slot, bool add) {
        const uint32_t values = stages + slot * S::STAGE + group * (S::VALUES / 2);
        const uint32_t dense = stages + slot * S::STAGE + S::VALUES;
        /* Values with rows apart: 8 rows of WIDTH * 2 bytes are the swizzle's unit, 16 columns are 32 bytes of a row.
         * Transposed: rows of op(A) lie together, WIDTH of them in a chunk; 8 columns of it are the unit. */
        constexpr int SWIZZLE = S::WIDTH == 64 ? SWIZZLE_128 : SWIZZLE_64;
        const uint64_t left = descriptor(values, TRANSPOSE ? S::WIDTH * S::WIDTH * 2 : 16, 8 * S::WIDTH * 2, SWIZZLE);
        const uint64_t right = descriptor(dense, S::WIDTH * 128, 8 * 128, SWIZZLE_128);
        constexpr int LEFT_STEP = TRANSPOSE ? 16 * S::WIDTH * 2 : 32;
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < S::WIDTH / 16; i++)
            wgmma<BRAIN, TRANSPOSE>(d, left + (uint64_t)(i * LEFT_STEP >> 4), right + (uint64_t)(i * 16 * 128 >> 4),
                                    add || i > 0);
        wgmma_commit();
    }

    /* Accumulator 4 * i + {0, 1} is row lane / 4, columns 8 * i + 2 * (lane % 4) + {0, 1}; {2, 3}: 8 rows below. */
    template <int TYPE> __device__ __forceinline__ void add_before(float (&d)[128], int first_row, int column) {
        const bsr_job &job = j.job;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + warp * 16 + lane / 4 + 8 * half;
            const char *before = job.out + row * job.out_pitch * (TYPE == KVC_FLOAT32 ? 4 : 2);
#pragma unroll
            for (int i = 0; i < bsr::COLUMNS / 8; i++) {
                const int c = column + 8 * i + 2 * (lane % 4);
                if (row < job.rows && c < job.columns) d[4 * i + 2 * half] += job.beta * bsr_load(before, c, TYPE);
                if (row < job.rows && c + 1 < job.columns)
                    d[4 * i + 2 * half + 1] += job.beta * bsr_load(before, c + 1, TYPE);
            }
        }
    }

    /* Sums go out in pieces of 64 rows and 128 bytes, 16-byte parts of a row exchanged by its number (the swizzle of
     * the store, and what keeps shared memory free of conflicts). */
    template <int TYPE> __device__ __forceinline__ void finish(float (&d)[128], int tile, int column) {
        constexpr int SIZE = TYPE == KVC_FLOAT32 ? 4 : 2, WIDE = 128 / SIZE;
        const int first_row = tile * KVC_BSR_ROWS + group * 64, row = warp * 16 + lane / 4;
        if (first_row >= j.job.rows) return;
        if (j.job.beta != 0.0f) add_before<TYPE>(d, first_row, column);
#pragma unroll
        for (int p = 0; p < bsr::COLUMNS / WIDE; p++) {
            const int x = column + p * WIDE;
            if (x >= j.job.columns) return;
            const uint32_t which = stored++ % bsr::PIECES_EACH;
            if (thread == 0) stores_read_but<bsr::PIECES_EACH - 1>();
            named_barrier(1 + group, 128);
            char *to = piece + which * bsr::PIECE_BYTES;
#pragma unroll
            for (int i = 0; i < WIDE / 8; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = 4 * (p * (WIDE / 8) + i) + 2 * half, r = row + 8 * half;
                    if (SIZE == 2)
                        *(uint32_t *)(to + r * 128 + ((i ^ (r & 7)) << 4) + 4 * (lane % 4)) =
                            bsr_pair(d[at], d[at + 1], TYPE);
                    else
                        *(float2 *)(to + r * 128 + (((2 * i + lane % 4 / 2) ^ (r & 7)) << 4) + 8 * (lane & 1)) =
                            make_float2(d[at], d[at + 1]);
                }
            }
            fence_async();
            named_barrier(1 + group, 128);
            if (thread == 0) store_box(&j.out, pieces + which * bsr::PIECE_BYTES, x, first_row, policy_first());
        }
    }

    /* The stage at hand, once it is there. */
    __device__ __forceinline__ int4 wait() {
        barrier_wait(shared_address(&control->full[slot]), phase);
        const int4 info = control->info[slot];
        return make_int4(__shfl_sync(0xffffffffu, info.x, 0), info.y, info.z, 0);
    }

    __device__ __forceinline__ void advance() {
        if (++slot == S::STAGES) {
            slot = 0;
            phase ^= 1;
        }
    }

    /* A tile's sums, from its first stage, which is there, to its last; false: there are none, d is not defined.
     * Blocks of 128: every stage is for both warpgroups, and while one is multiplied the next is started. */
    __device__ __forceinline__ bool tile(float (&d)[128], int4 &info) {
        if (BLOCK == 128) {
            if (!(info.x & 3)) {
                release(slot);
                return false;
            }
            multiply(d, slot, false);
            while (!(info.x & bsr::LAST)) {
                const int before = slot;
                advance();
                info = wait();
                multiply(d, slot, true);
                wgmma_wait<1>();
                release(before);
            }
            wgmma_wait<0>();
            release(slot);
            return true;
        }
        bool any = false;
        for (;;) {
            if (info.x >> group & 1) {
                multiply(d, slot, any);
                wgmma_wait<0>();
                any = true;
            }
            release(slot);
            if (info.x & bsr::LAST) return any;
            advance();
            info = wait();
        }
    }

    __device__ __forceinline__ void run() {
        float d[128];
        slot = 0;
        phase = 0;
        stored = 0;
        for (;; advance()) {
            int4 info = wait();
            if (info.x & bsr::STOP) break;
            if (!tile(d, info)) {
#pragma unroll
                for (int i = 0; i < 128; i++) d[i] = 0.0f;
            }
            if (j.job.out_type == KVC_FLOAT32)
                finish<KVC_FLOAT32>(d, info.y, info.z);
            else if (j.job.out_type == KVC_FLOAT16)
                finish<KVC_FLOAT16>(d, info.y, info.z);
            else
                finish<KVC_BFLOAT16>(d, info.y, info.z);
        }
        if (thread == 0) stores_done();
    }
};

#endif

template <int BLOCK, int CLUSTER, bool BRAIN, bool TRANSPOSE>
__global__ void __launch_bounds__(bsr::THREADS, 1) bsr_wgmma_kernel(const __grid_constant__ bsr_wgmma_job j) {
#ifdef KVC_HOPPER
    using S = bsr::shape<BLOCK, CLUSTER>;
    extern __shared__ char shared[];
    if (!bsr_plan_fits(j.job)) return;
    char *const base = shared + (-shared_address(shared) & 1023);
    auto *const control = (bsr::control<S::STAGES> *)(base + S::CONTROL);
    const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(shared_address(&control->full[i]), 1);
            barrier_init(shared_address(&control->empty[i]), bsr::WARPS * CLUSTER);
        }
        for (int i = 0; i < bsr::TURNS; i++) barrier_init(shared_address(&control->next[i]), 1);
        barrier_init_done();
        prefetch_map(&j.values);
        prefetch_map(&j.dense);
        prefetch_map(&j.out);
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();
    if (warpgroup == 0) {
        registers_give<40>();
        if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 0) {
            bsr_producer<BLOCK, CLUSTER, TRANSPOSE> producer{j, control, shared_address(base), lane,
                                                             CLUSTER > 1 ? cluster_rank() : 0};
            producer.run();
        }
    } else {
        registers_take<232>();
        const int group = warpgroup - 1, thread = threadIdx.x % 128;
        char *const piece = base + S::PIECES + group * bsr::PIECES_EACH * bsr::PIECE_BYTES;
        bsr_consumer<BLOCK, CLUSTER, BRAIN, TRANSPOSE> consumer{
            j, control, shared_address(base), shared_address(piece), piece, group, thread, lane, thread / 32};
        consumer.run();
    }
    /* Nobody leaves while others write into its shared memory or arrive at its barriers. */
    if (CLUSTER > 1) cluster_sync();
#endif
}

} // namespace
