/* w4_large.cuh: x * W^T for more than 32 rows of x, on sm_90a: wgmma with W as its register operand.
 *
 * A tile is TALL strips of 64 rows of W, one a warpgroup, times COLUMNS rows of x. A stage is 128 inputs of both. One
 * warp copies weights as they lie, another x by a tensor map with a swizzle of 128 bytes, two unpack scales; two or
 * four warpgroups turn codes into numbers, times their scales, while the batch of products before runs. What all of
 * them do has few instructions, which bound this kernel before bytes and products do (w4.md): addresses of stages and
 * barriers are in uniform registers, which the compiler takes only where it sees that lanes agree and stay together.
 *
 * Few tiles: each is one block's, or its inputs are shared by the blocks of a cluster, which add their sums up through
 * each other's shared memory. Many tiles: blocks take whole ones in turn; what is left when all have had as many may be
 * cut into equal runs, each the end of a tile and the beginning of another at most. The beginning is worked on first,
 * and its sums go to the workspace for the run that has the tile's end, as in w4_small.cuh. */
#pragma once
#include <math.h>

#include "w4_end.cuh"
#include "w4_job.cuh"
#include "w4_map.cuh"
#include "w4_ptx.cuh"
#include "wgmma_registers.cuh"

namespace {

constexpr int STEP = 128;       /* inputs of a stage */
constexpr int PANEL = 8;        /* tiles of x that are worked on together, for the L2 */
constexpr int SCALE_ROOM = 512; /* most bytes of a block's scales */
constexpr int CODES = KVC_W4_ROWS * STEP / 2, STRIP = CODES + SCALE_ROOM; /* of a strip in a stage */
constexpr int SCALERS = 2;                                                /* warps that unpack scales; two more copy */
constexpr int BESIDE = 1024 + 16; /* bytes of shared memory that are no stage's: what aligns them, a barrier */
constexpr int MOST_SPLIT = 8;     /* blocks of a cluster, everywhere */

__host__ __device__ constexpr int w4_stage_bytes(int tall, int columns) { return columns * STEP * 2 + tall * STRIP; }
/* Of a stage's unpacked scales. */
__host__ __device__ constexpr int w4_pair_bytes(int tall, int group) { return tall * (STEP / group) * 128; }
/* Of everything that a stage has. */
__host__ __device__ constexpr int w4_all_bytes(int tall, int columns, int group) {
    return w4_stage_bytes(tall, columns) + w4_pair_bytes(tall, group) + 3 * 8;
}

struct w4_plan {
    int32_t n_tiles, m_tiles, steps; /* steps of STEP inputs in a tile */
    int32_t stages;
    /* Rows of x that a copy brings, a multiple of 8, and where the last tile's begin: copies of rows that x does not
     * have are slow, so the last tile has some of the one before again, which nobody stores. */
    int32_t rows, last_row;
    int32_t split; /* blocks (x of a grid of tiles) that share a tile, a cluster if more than 1; 0: runs */
    int32_t whole; /* tiles that a block takes whole, at most */
    /* What is left after whole tiles, if anything, is cut into as many runs as tiles or more, of `run` steps, the first
     * `longer` of them of one more. So are a tile's steps among the blocks that share it. */
    int32_t runs, run, longer;
};

/* What is the same in all lanes, so that the compiler sees it: it takes uniform registers then. */
__device__ __forceinline__ int w4_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

/* What one block of threads works on, in order: a beginning, an end, whole tiles. */
struct w4_work {
    const w4_plan &plan;
    int item, tile, from, to; /* the item: steps from .. to - 1 of the tile */

    /* The first of the tiles that are cut, and where in their steps a run begins. */
    __device__ __forceinline__ int first_rest() const { return plan.whole * (int)gridDim.x; }
    __device__ __forceinline__ int bound(int block) const {
        return min(block, plan.runs) * plan.run + min(block, plan.longer);
    }
    __device__ __forceinline__ explicit w4_work(const w4_plan &plan) : plan(plan), item(-1) {}
    __device__ __forceinline__ bool next() {
        item++;
        if (plan.split > 0) {
            const int rank = blockIdx.x;
            tile = 0;
            from = rank * plan.run + min(rank, plan.longer);
            to = from + plan.run + (rank < plan.longer);
            return item == 0;
        }
        if (item < 2) { /* the end of a run is the beginning of a tile */
            const int begin = bound(blockIdx.x), end = bound(blockIdx.x + 1);
            const int cut = end / plan.steps, tail = min(end - cut * plan.steps, end - begin);
            if (item == 0 && tail > 0) {
                tile = first_rest() + cut;
                to = end - cut * plan.steps;
                from = to - tail;
                return true;
            }
            item = 1;
            if (end - tail > begin) {
                tile = first_rest() + begin / plan.steps;
                from = begin % plan.steps;
                to = plan.steps;
                return true;
            }
            item = 2;
        }
        tile = (item - 2) * (int)gridDim.x + (int)blockIdx.x;
        if (item - 2 >= plan.whole || tile >= plan.n_tiles * plan.m_tiles) return false;
        from = 0;
        to = plan.steps;
        return true;
    }
    /* Panels of PANEL tiles of x, in which those of x follow each other. */
    __device__ __forceinline__ void place(int &n_tile, int &m_tile) const {
        n_tile = blockIdx.y, m_tile = blockIdx.z;
        if (plan.split > 0) return;
        const int panel = tile / (PANEL * plan.n_tiles), at = tile - panel * PANEL * plan.n_tiles;
        const int width = min(PANEL, plan.m_tiles - panel * PANEL);
        n_tile = at / width;
        m_tile = panel * PANEL + at % width;
    }
    /* The first of the tile's rows of x. */
    template <int COLUMNS> __device__ __forceinline__ int row_of(int m_tile) const {
        return min(m_tile * COLUMNS, plan.last_row);
    }
};

/* Numbers q * s (bf16) or q * s / 16 (fp16, so that none overflows), of scales given twice each. */
template <typename T> struct w4_scaled;

template <> struct w4_scaled<__half> {
    static constexpr float FACTOR = 16.0f;
    static __device__ __forceinline__ void twice(uint32_t (&s)[2], uint32_t two) {
        s[0] = __byte_perm(two, 0, 0x1010);
        s[1] = __byte_perm(two, 0, 0x3232);
    }
    template <uint32_t MASK, uint32_t BASE>
    static __device__ __forceinline__ uint32_t pair(uint32_t word, float middle, uint32_t scale) {
        uint32_t bits;
        asm("lop3.b32 %0,%1,%2,%3,0xea;" : "=r"(bits) : "r"(word), "n"(MASK), "n"(BASE));
        const __half2 value =
            __hmul2(__hsub2(*(const __half2 *)&bits, __float2half2_rn(middle)), *(const __half2 *)&scale);
        return *(const uint32_t *)&value;
    }
    static __device__ __forceinline__ void numbers(uint32_t (&a)[4], uint32_t word, const uint32_t (&s)[2]) {
        const uint32_t next = __funnelshift_r(word, word, 8);
        a[0] = pair<0x003c003cu, 0x4c004c00u>(word, 16.5f, s[0]);
        a[1] = pair<0x03c003c0u, 0x3c003c00u>(word, 1.5f, s[1]);
        a[2] = pair<0x003c003cu, 0x4c004c00u>(next, 16.5f, s[0]);
        a[3] = pair<0x03c003c0u, 0x3c003c00u>(next, 1.5f, s[1]);
    }
};

template <> struct w4_scaled<__nv_bfloat16> {
    static constexpr float FACTOR = 1.0f;
    static __device__ __forceinline__ void twice(uint32_t (&s)[2], uint32_t two) {
        const float2 both = __half22float2(*(const __half2 *)&two);
        const __nv_bfloat162 low = __float2bfloat162_rn(both.x), high = __float2bfloat162_rn(both.y);
        s[0] = *(const uint32_t *)&low;
        s[1] = *(const uint32_t *)&high;
    }
    static __device__ __forceinline__ void numbers(uint32_t (&a)[4], uint32_t word, const uint32_t (&s)[2]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t turned = i ? __funnelshift_r(word, word, 4 * i) : word;
            uint32_t bits;
            asm("lop3.b32 %0,%1,%2,%3,0xea;" : "=r"(bits) : "r"(turned), "n"(0x003c003cu), "n"(0x42004200u));
            const __nv_bfloat162 value = __hmul2(__hsub2(*(const __nv_bfloat162 *)&bits, __float2bfloat162_rn(40.0f)),
                                                 *(const __nv_bfloat162 *)&s[i & 1]);
            a[i] = *(const uint32_t *)&value;
        }
    }
};

/* Of a block's items, in order: steps, and the stages that they come in. All of it is the same in all lanes. */
struct w4_walk {
    w4_work work;
    int n_tile, m_tile, step, stop, slot, parity;

    __device__ __forceinline__ explicit w4_walk(const w4_plan &plan)
        : work(plan), n_tile(0), m_tile(0), step(0), stop(0), slot(0), parity(0) {}
    /* To the next item, if there is one. */
    __device__ __forceinline__ bool next() {
        if (!work.next()) return false;
        work.place(n_tile, m_tile);
        n_tile = w4_uniform(n_tile), m_tile = w4_uniform(m_tile);
        step = w4_uniform(work.from), stop = w4_uniform(work.to);
        slot = w4_uniform(slot), parity = w4_uniform(parity);
        return true;
    }
    __device__ __forceinline__ void advance() {
        step++;
        if (++slot == work.plan.stages) slot = 0, parity ^= 1;
    }
};

/* The warp that copies x. */
template <int TALL, int COLUMNS>
__device__ __forceinline__ void w4_copy_x(const w4_job &a, const w4_plan &plan, const CUtensorMap *map, uint32_t stages,
                                          uint32_t full, uint32_t empty) {
    constexpr int BYTES = w4_stage_bytes(TALL, COLUMNS), X = COLUMNS * STEP * 2;
    if (a.early) wait_for_previous();
    let_next_begin(); /* it may rely on what came before this kernel */
    for (w4_walk at(plan); at.next();) {
        const int row = at.work.row_of<COLUMNS>(at.m_tile);
#pragma unroll 1
        for (; at.step < at.stop; at.advance()) {
            const uint32_t bar = full + 8 * at.slot, to = stages + at.slot * BYTES;
            w4_barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            if (w4_elected()) {
                w4_expect(bar, plan.rows * STEP * 2);
                w4_copy_rows(to, map, at.step * STEP, row, bar);
                w4_copy_rows(to + X / 2, map, at.step * STEP + 64, row, bar);
            }
        }
    }
}

/* The warp that copies weights, which may run while the kernel before does. HALVES: a block of W is two steps. */
template <int TALL, int COLUMNS, bool HALVES>
__device__ __forceinline__ void w4_copy_weights(const w4_job &a, const w4_plan &plan, uint32_t stages, uint32_t full,
                                                uint32_t empty) {
    constexpr int BYTES = w4_stage_bytes(TALL, COLUMNS), X = COLUMNS * STEP * 2;
    const int scales = a.block_bytes - a.code_bytes;
    uint64_t policy;
    if (plan.m_tiles > 1)
        asm("createpolicy.fractional.L2::evict_last.b64 %0,1.0;" : "=l"(policy));
    else
        policy = w4_read_once();
    for (w4_walk at(plan); at.next();) {
        const char *from[TALL]; /* the next block of each strip; those behind W's end bring the last again */
#pragma unroll
        for (int s = 0; s < TALL; s++)
            from[s] = a.packed + ((int64_t)min(at.n_tile * TALL + s, a.strips - 1) * a.blocks +
                                  (HALVES ? at.step >> 1 : at.step)) *
                                     a.block_bytes;
#pragma unroll 1
        for (; at.step < at.stop; at.advance()) {
            const uint32_t bar = full + 8 * at.slot, to = stages + at.slot * BYTES + X;
            w4_barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            if (w4_elected()) {
                w4_expect(bar, TALL * (CODES + scales));
#pragma unroll
                for (int s = 0; s < TALL; s++)
                    if (!HALVES) {
                        w4_copy_counted(to + s * STRIP, from[s], CODES + scales, bar, policy);
                    } else {
                        w4_copy_counted(to + s * STRIP, from[s] + (at.step & 1) * CODES, CODES, bar, policy);
                        w4_copy_counted(to + s * STRIP + CODES, from[s] + a.code_bytes, scales, bar, policy);
                    }
            }
            if (!HALVES || (at.step & 1))
#pragma unroll
                for (int s = 0; s < TALL; s++) from[s] += a.block_bytes;
        }
    }
}

/* The warps that unpack scales of what has arrived, `me` of SCALERS: to pairs of fp16 at `pairs`, 128 bytes for the 64
 * rows of a strip and a group, those of rows r and r + 8 of 16 rows `tile` at 16 * r + 4 * tile. */
template <int TALL, int COLUMNS, int GROUP>
__device__ __forceinline__ void w4_unpack_scales(const w4_job &a, const w4_plan &plan, const char *stages, char *pairs,
                                                 uint32_t full, uint32_t ready, int me, int lane) {
    constexpr int BYTES = w4_stage_bytes(TALL, COLUMNS), X = COLUMNS * STEP * 2, GROUPS = STEP / GROUP;
    const w4_planes planes = w4_planes_of(a, lane >> 2, lane & 3);
    for (w4_walk at(plan); at.next();)
#pragma unroll 1
        for (; at.step < at.stop; at.advance()) {
            const char *const from = stages + at.slot * BYTES + X + CODES;
            char *const to = pairs + at.slot * w4_pair_bytes(TALL, GROUP) + planes.at16;
            const int first = GROUPS == 1 ? at.step & (a.inputs / STEP - 1) : 0;
            w4_barrier_wait(full + 8 * at.slot, at.parity);
#pragma unroll 1
            for (int s = me; s < TALL; s += SCALERS)
#pragma unroll
                for (int g = 0; g < GROUPS; g++)
                    *(uint32_t *)(to + (s * GROUPS + g) * 128) =
                        w4_scale_pair(a, from + s * STRIP + (first + g) * a.group_bytes, planes);
            __syncwarp();
            if (arrives_for_warp(lane)) w4_barrier_arrive(ready + 8 * at.slot);
        }
}

/* Codes of 64 inputs of a strip, and their scales. */
template <int GROUP> struct w4_fragment {
    static constexpr int GROUPS = GROUP == 32 ? 2 : 1; /* of those 64, or of more */
    uint32_t word[4], pair[GROUPS];

    /* `codes`: this lane's of the strip in a stage, `scales`: likewise. Groups of 128 have theirs with their first 64
     * inputs. */
    __device__ __forceinline__ void load(uint32_t codes, uint32_t scales, int chunk) {
        w4_load_codes(word, codes + chunk * 2048);
        if (GROUP == 128 && chunk > 0) return;
#pragma unroll
        for (int f = 0; f < GROUPS; f++)
            asm volatile("ld.shared.u32 %0,[%1];" : "=r"(pair[f]) : "r"(scales + (chunk * (64 / GROUP) + f) * 128));
    }
};

/* Of a tile's pieces of 8 rows of x those that the block `rank` of `split` adds up: the first, and the first of the
 * next block's. */
template <int COLUMNS> __device__ __forceinline__ int w4_first_piece(int split, int rank) {
    return COLUMNS / 8 * rank / split;
}

/* Bytes of sums that such a block is sent. */
template <int TALL, int COLUMNS> __device__ __forceinline__ int w4_sent_bytes(int split, int rank) {
    return (w4_first_piece<COLUMNS>(split, rank + 1) - w4_first_piece<COLUMNS>(split, rank)) * split * TALL * 128 * 16;
}

/* Sums of a tile whose inputs the blocks of a cluster have shared: each is sent a piece of all, into its stages, which
 * nobody reads any more, adds up, in the order of blocks, and stores. `sent` counts the bytes. Nobody reads what
 * another has in its shared memory, which would take a fence of the whole GPU. */
template <typename T, int TALL, int COLUMNS>
__device__ __forceinline__ void w4_large_add(const w4_job &a, const w4_work &work, const float (&acc)[COLUMNS / 2],
                                             uint32_t base, uint32_t sent, int n_tile, int m_tile) {
    constexpr int PIECES = COLUMNS / 8, THREADS = 128 * TALL;
    const int split = work.plan.split, rank = blockIdx.x, n0 = n_tile * TALL * KVC_W4_ROWS + 16 * (threadIdx.x >> 5);
    const uint32_t own = base + threadIdx.x * 16;
    w4_cluster_met();
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
        const int owner = ((j + 1) * split - 1) / PIECES;
        const uint32_t at = own + ((j - w4_first_piece<COLUMNS>(split, owner)) * split + rank) * THREADS * 16;
        w4_send(at, sent, owner, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
    }
    const w4_end end = w4_end_of(a, w4_scaled<T>::FACTOR, n0, threadIdx.x & 31);
    const int first = w4_first_piece<COLUMNS>(split, rank), count = w4_first_piece<COLUMNS>(split, rank + 1) - first;
    w4_barrier_wait(sent, 0);
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        const int m0 = work.row_of<COLUMNS>(m_tile) + (first + i) * 8;
        if (m0 < m_tile * COLUMNS || m0 >= a.m) continue;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int other = 0; other < split; other++) {
            const float4 v = w4_load_sums(own + (i * split + other) * THREADS * 16);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        w4_store_sums(a, end, sum.x, sum.y, sum.z, sum.w, m0, threadIdx.x & 31);
    }
}

/* Sums of the beginning of a tile, to the workspace of this block. */
template <int SUMS, int THREADS>
__device__ __forceinline__ void w4_large_leave(uint32_t *parts, const float (&acc)[SUMS]) {
    uint32_t *const own = parts + (int64_t)blockIdx.x * SUMS * THREADS;
#pragma unroll
    for (int i = 0; i < SUMS; i += 4)
        w4_store_parts(own + i * THREADS, w4_part(acc[i]), w4_part(acc[i + 1]), w4_part(acc[i + 2]),
                       w4_part(acc[i + 3]));
}

/* What the runs before have of a tile from its step `start` of all on, added. */
template <int SUMS, int THREADS, int AT_ONCE>
__device__ __forceinline__ void w4_large_gather(const w4_work &work, uint32_t *parts, int start, float (&acc)[SUMS]) {
    int other = blockIdx.x;
    do {
        uint32_t *const from = parts + (int64_t)--other * SUMS * THREADS;
#pragma unroll
        for (int i = 0; i < SUMS; i += 4 * AT_ONCE) {
            uint32_t bits[AT_ONCE][4];
#pragma unroll
            for (int e = 0; e < AT_ONCE; e++) w4_load_parts(bits[e], from + (i + 4 * e) * THREADS);
#pragma unroll
            for (int e = 0; e < AT_ONCE; e++) {
                uint32_t *const at = from + (i + 4 * e) * THREADS;
                /* The warp stays together, so that the loops around this may use uniform registers. */
                while (__any_sync(0xffffffffu, bits[e][0] == EMPTY || bits[e][1] == EMPTY || bits[e][2] == EMPTY ||
                                                   bits[e][3] == EMPTY))
                    w4_load_parts(bits[e], at);
                w4_store_parts(at, EMPTY, EMPTY, EMPTY, EMPTY);
#pragma unroll
                for (int f = 0; f < 4; f++) acc[i + 4 * e + f] += __uint_as_float(bits[e][f]);
            }
        }
    } while (work.bound(other) > start);
}

/* Tiles of TALL strips, one a warpgroup. */
template <typename T, int TALL, int COLUMNS, int GROUP>
__global__ void __launch_bounds__(128 * (TALL + 1), 1)
    w4_large(const __grid_constant__ w4_job a, const __grid_constant__ w4_plan plan,
             const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    constexpr int BYTES = w4_stage_bytes(TALL, COLUMNS), X = COLUMNS * STEP * 2;
    constexpr int SUMS = COLUMNS / 2, THREADS = 128 * TALL;
    /* Products that are begun together: while they run, the numbers of as many more are made. */
    constexpr int BATCH = COLUMNS <= 64 || TALL == 2 ? 4 : 2, BATCHES = STEP / 16 / BATCH;
    const uint32_t base = (w4_shared(memory) + 1023) & ~1023u;
    char *const stages = memory + (base - w4_shared(memory));
    constexpr int PAIRS = w4_pair_bytes(TALL, GROUP);
    const uint32_t pairs = base + plan.stages * BYTES, full = pairs + plan.stages * PAIRS,
                   empty = full + 8 * plan.stages, ready = empty + 8 * plan.stages, sent = ready + 8 * plan.stages;
    /* The same in all lanes, which the compiler sees: what depends on it alone is in uniform registers. */
    const int group = w4_uniform(threadIdx.x >> 7);
    const int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    if (threadIdx.x < plan.stages) {
        w4_barrier_init(full + 8 * threadIdx.x, 2);
        w4_barrier_init(ready + 8 * threadIdx.x, SCALERS * WARP_ARRIVALS);
        w4_barrier_init(empty + 8 * threadIdx.x, 4 * TALL * WARP_ARRIVALS);
    }
    if (threadIdx.x == 0) {
        w4_prefetch_map(&map);
        w4_barrier_init(sent, 1);
    }
    w4_barriers_ready();
    if (threadIdx.x == 0 && plan.split > 1) w4_expect(sent, w4_sent_bytes<TALL, COLUMNS>(plan.split, blockIdx.x));
    if (!a.early) wait_for_previous();
    if (group == TALL) {
        registers_give<TALL == 2 ? 40 : 32>();
        const int role = w4_uniform(warp);
        if (role == 0)
            a.inputs == STEP ? w4_copy_weights<TALL, COLUMNS, false>(a, plan, base, full, empty)
                             : w4_copy_weights<TALL, COLUMNS, true>(a, plan, base, full, empty);
        else if (role == 1)
            w4_copy_x<TALL, COLUMNS>(a, plan, &map, base, full, empty);
        else
            w4_unpack_scales<TALL, COLUMNS, GROUP>(a, plan, stages, stages + plan.stages * BYTES, full, ready, role - 2,
                                                   lane);
        return;
    }
    registers_take<TALL == 2 ? 232 : 112>();
    if (a.early) wait_for_previous(); /* out and the workspace are written below */
    const uint32_t codes = base + X + group * STRIP + (threadIdx.x & 127) * 16;
    const uint32_t scales = pairs + group * (PAIRS / TALL) + (lane >> 2) * 16 + warp * 4;
    int next_slot = 0, next_parity = 0;
    for (w4_work work(plan); work.next();) {
        int slot = w4_uniform(next_slot), parity = w4_uniform(next_parity);
        const int from = w4_uniform(work.from), to = w4_uniform(work.to);
        float acc[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; i++) acc[i] = 0.0f;
        hold(acc);
        int held = -1; /* the stage whose products may still run */
        uint32_t numbers[2][BATCH][4];
        w4_fragment<GROUP> part;
        w4_barrier_wait(ready + 8 * slot, parity);
        part.load(codes + slot * BYTES, scales + slot * PAIRS, 0);
#pragma unroll 1
        for (int step = from; step < to; step++) {
            const uint64_t x = descriptor(base + slot * BYTES, 16, 1024, SWIZZLE_128);
            const int now = slot;
            if (++slot == plan.stages) slot = 0, parity ^= 1;
            uint32_t scale[w4_fragment<GROUP>::GROUPS][2];
#pragma unroll
            for (int batch = 0; batch < BATCHES; batch++) {
                const int chunk = batch * BATCH / 4, first = batch * BATCH % 4;
                wgmma_wait<1>(); /* the batch before the last has read its numbers and x */
                if (batch == 1) {
                    w4_barrier_arrive_if(empty + 8 * held, held >= 0 && arrives_for_warp(lane));
                    held = now;
                }
                if (first == 0 && (GROUP < 128 || chunk == 0))
#pragma unroll
                    for (int f = 0; f < w4_fragment<GROUP>::GROUPS; f++) w4_scaled<T>::twice(scale[f], part.pair[f]);
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    w4_scaled<T>::numbers(numbers[batch & 1][i], part.word[first + i],
                                          scale[GROUP == 32 ? (first + i) >> 1 : 0]);
                    hold(numbers[batch & 1][i]);
                }
                wgmma_begin();
#pragma unroll
                for (int i = 0; i < BATCH; i++)
                    wgmma_halves<w4_type<T>::DTYPE == KVC_BFLOAT16>(acc, numbers[batch & 1][i],
                                                                    x + (chunk * (X / 2) + (first + i) * 32) / 16);
                wgmma_commit();
                /* What comes next is loaded behind products. */
                if (batch == BATCHES / 2 - 1) part.load(codes + now * BYTES, scales + now * PAIRS, 1);
                if (batch == BATCHES - 1 && step + 1 < to) {
                    w4_barrier_wait(ready + 8 * slot, parity);
                    part.load(codes + slot * BYTES, scales + slot * PAIRS, 0);
                }
            }
        }
        next_slot = slot, next_parity = parity;
        wgmma_wait<0>();
        hold(acc);
        __syncwarp();
        if (arrives_for_warp(lane)) w4_barrier_arrive(empty + 8 * held);
        int n_tile, m_tile;
        if (plan.split > 1) {
            work.place(n_tile, m_tile);
            w4_large_add<T, TALL, COLUMNS>(a, work, acc, base, sent, n_tile, m_tile);
            return;
        }
        uint32_t *const parts = (uint32_t *)a.parts + 4 * threadIdx.x;
        if (work.to < plan.steps) {
            w4_large_leave<SUMS, THREADS>(parts, acc);
            continue;
        }
        if (work.from > 0) /* the rest of the tile lies in runs before */
            w4_large_gather<SUMS, THREADS, TALL == 2 ? 8 : 4>(work, parts, (work.tile - work.first_rest()) * plan.steps,
                                                              acc);
        work.place(n_tile, m_tile);
        const w4_end end = w4_end_of(a, w4_scaled<T>::FACTOR, (n_tile * TALL + group) * KVC_W4_ROWS + 16 * warp, lane);
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            const int m0 = work.row_of<COLUMNS>(m_tile) + 8 * j;
            if (m0 >= m_tile * COLUMNS && m0 < a.m)
                w4_store_sums(a, end, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3], m0, lane);
        }
    }
#endif
}

/* Nanoseconds on an H200, only to choose by: of a step, of a kernel's beginning and end, of a further tile's end, of
 * runs that wait for others, and of each run of a tile. Fitted to times of 33 to 1024 rows of x (w4.md). */
struct w4_costs {
    double step, once, tile, merge, parts;
};

constexpr w4_costs w4_costs_of(int tall, int columns) {
    return columns <= 64 ? tall == 2 ? w4_costs{480, 2900, 1000, 4000, 650} : w4_costs{900, 2900, 1500, 9000, 500}
           : tall == 2   ? w4_costs{700, 3500, 1500, 5500, 1150}
                         : w4_costs{1300, 5000, 2500, 12000, 1400};
}

/* Of blocks that add their sums up in a cluster. */
constexpr double w4_cluster_cost(int split) { return split > 1 ? 900.0 + 450.0 * split : 0.0; }

/* The plan without its runs; bytes of shared memory. */
int w4_plan_tiles(w4_plan *plan, const w4_job *a, int tall, int columns, int group, const kvc_gpu *device) {
    plan->n_tiles = (a->strips + tall - 1) / tall;
    plan->m_tiles = (a->m + columns - 1) / columns;
    plan->steps = a->blocks * (a->inputs / STEP);
    const int whole = (a->m + 7) / 8 * 8;
    plan->rows = whole < columns ? whole : columns;
    plan->last_row = whole - plan->rows;
    plan->stages = (device->shared_most - BESIDE) / w4_all_bytes(tall, columns, group);
    plan->split = 0;
    return BESIDE + plan->stages * w4_all_bytes(tall, columns, group);
}

/* Whole tiles, whole tiles and runs, or tiles shared by clusters of 1 .. MOST_SPLIT blocks, of which fit[split] have
 * room at once: what takes less time, which is returned; `blocks`: of threads, along x. */
double w4_plan_of(w4_plan *plan, int *blocks, const w4_job *a, int tall, int columns, int group, const kvc_gpu *device,
                  const int (&fit)[MOST_SPLIT + 1]) {
    w4_plan_tiles(plan, a, tall, columns, group, device);
    const w4_costs cost = w4_costs_of(tall, columns);
    const int64_t tiles = (int64_t)plan->n_tiles * plan->m_tiles, steps = tiles * plan->steps;
    const int64_t most = steps < device->multiprocessors ? steps : device->multiprocessors;
    const double tile = plan->steps * cost.step + cost.tile;
    /* A run of few steps is worked on faster, and its sums are one more piece to add: both weigh the same near the
     * square root. */
    const int root = (int)(1.2f * sqrtf((float)plan->steps)) + 1, least = root < plan->steps ? root : plan->steps;
    const int64_t rest = tiles % most, runs = rest * plan->steps / least;
    plan->whole = (int32_t)(tiles / most);
    plan->runs = (int32_t)(runs < 1 ? 1 : runs < most ? runs : most);
    plan->run = (int32_t)(rest * plan->steps / plan->runs);
    plan->longer = (int32_t)(rest * plan->steps % plan->runs);
    *blocks = (int)(tiles >= most ? most : plan->runs);
    double best = cost.once + plan->whole * tile;
    if (rest > 0)
        best += (double)(rest * plan->steps) / plan->runs * cost.step + cost.merge + cost.parts * plan->runs / rest;
    if (rest > 0 && tiles > most && cost.once + (plan->whole + 1) * tile < best) {
        plan->whole++;
        plan->runs = 1;
        plan->run = plan->longer = 0;
        best = cost.once + plan->whole * tile;
    }
    for (int split = 1; split <= MOST_SPLIT; split++) {
        if (tiles > fit[split] || (split > 1 && plan->steps < 2 * split)) continue;
        const double took = cost.once + (plan->steps + split - 1) / split * cost.step + w4_cluster_cost(split);
        if (took >= best) continue;
        best = took;
        plan->split = split;
        plan->run = plan->steps / split;
        plan->longer = plan->steps % split;
        *blocks = split;
    }
    return best;
}

template <typename T, int TALL, int COLUMNS, int GROUP> struct w4_large_kind {
    static constexpr auto *KERNEL = w4_large<T, TALL, COLUMNS, GROUP>;
    w4_plan plan;
    int blocks;

    static void configure(cudaLaunchConfig_t *config, cudaLaunchAttribute (&about)[2], int blocks, int n_tiles,
                          int m_tiles, int split, int shared) {
        config->gridDim = dim3((unsigned)blocks, (unsigned)n_tiles, (unsigned)m_tiles);
        config->blockDim = dim3(128 * (TALL + 1));
        config->dynamicSmemBytes = shared;
        about[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        about[0].val.programmaticStreamSerializationAllowed = 1;
        about[1].id = cudaLaunchAttributeClusterDimension;
        about[1].val.clusterDim.x = (unsigned)split;
        about[1].val.clusterDim.y = about[1].val.clusterDim.z = 1;
        config->attrs = about;
        config->numAttrs = split > 1 ? 2 : 1;
    }

    /* Of this device: how many clusters of 1 .. MOST_SPLIT blocks have room at once. Asked for once. */
    static cudaError_t fit(int (&out)[MOST_SPLIT + 1], const kvc_gpu *device, int shared) {
        static int known[64][MOST_SPLIT + 1];
        int at = 0;
        cudaError_t error = cudaGetDevice(&at);
        if (error != cudaSuccess) return error;
        if (at >= 64) return cudaErrorInvalidDevice;
        if (known[at][1] == 0) {
            error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, device->shared_most);
            if (error != cudaSuccess) return error;
            for (int split = 2; split <= MOST_SPLIT; split++) {
                cudaLaunchConfig_t config = {};
                cudaLaunchAttribute about[2] = {};
                configure(&config, about, split, device->multiprocessors, 1, split, shared);
                int clusters = 0;
                if (cudaOccupancyMaxActiveClusters(&clusters, KERNEL, &config) != cudaSuccess) {
                    cudaGetLastError();
                    clusters = 0;
                }
                known[at][split] = clusters;
            }
            known[at][1] = device->multiprocessors;
        }
        for (int split = 0; split <= MOST_SPLIT; split++) out[split] = known[at][split];
        return cudaSuccess;
    }

    /* *ns: what it is thought to take. */
    cudaError_t prepare(double *ns, const w4_job *a, const kvc_gpu *device) {
        int room[MOST_SPLIT + 1];
        const cudaError_t error = fit(room, device, w4_plan_tiles(&plan, a, TALL, COLUMNS, GROUP, device));
        if (error == cudaSuccess) *ns = w4_plan_of(&plan, &blocks, a, TALL, COLUMNS, GROUP, device, room);
        return error;
    }

    cudaError_t launch(const w4_job *a, cudaStream_t stream) const {
        CUtensorMap map;
        const cudaError_t error = w4_map_of(&map, a, 2, plan.rows, w4_type<T>::DTYPE == KVC_BFLOAT16);
        if (error != cudaSuccess) return error;
        cudaLaunchConfig_t config = {};
        cudaLaunchAttribute about[2] = {};
        configure(&config, about, blocks, plan.split > 0 ? plan.n_tiles : 1, plan.split > 0 ? plan.m_tiles : 1,
                  plan.split, BESIDE + plan.stages * w4_all_bytes(TALL, COLUMNS, GROUP));
        config.stream = stream;
        return cudaLaunchKernelEx(&config, KERNEL, *a, plan, map);
    }
};

/* Tiles of four strips halve the reads of x, those of two are more. */
template <typename T, int COLUMNS, int GROUP>
cudaError_t w4_large_take(const w4_job *a, const kvc_gpu *device, cudaStream_t stream) {
    w4_large_kind<T, 4, COLUMNS, GROUP> wide;
    w4_large_kind<T, 2, COLUMNS, GROUP> narrow;
    double wide_ns = 0, narrow_ns = 0;
    cudaError_t error = wide.prepare(&wide_ns, a, device);
    if (error == cudaSuccess) error = narrow.prepare(&narrow_ns, a, device);
    if (error != cudaSuccess) return error;
    return wide_ns <= narrow_ns ? wide.launch(a, stream) : narrow.launch(a, stream);
}

template <typename T> cudaError_t w4_large_any(const w4_job *a, int group, const kvc_gpu *device, cudaStream_t stream) {
#define TAKE(COLUMNS)                                                 \
    (group == 32   ? w4_large_take<T, COLUMNS, 32>(a, device, stream) \
     : group == 64 ? w4_large_take<T, COLUMNS, 64>(a, device, stream) \
                   : w4_large_take<T, COLUMNS, 128>(a, device, stream))
    return a->m <= 64 ? TAKE(64) : TAKE(128);
#undef TAKE
}

} // namespace
