/* w4_large.cuh: x * W^T for more than 32 rows of x, on sm_90a: wgmma with W as its register operand.
 *
 * A tile is 128 * STRIPS rows of W (64 * STRIPS a warpgroup) times COLUMNS rows of x. One warp requests copies, x by a
 * tensor map with a swizzle of 128 bytes, W as it lies; two or four warpgroups turn codes into numbers, times their
 * scales, while products of the step before run; codes and scales are loaded 64 inputs ahead.
 *
 * Few tiles: each is one block's, or its inputs are shared by the blocks of a cluster, which add their sums up through
 * each other's shared memory. Many tiles: as many as fill all multiprocessors equally are taken whole; what is left is
 * cut into equal runs, each the end of a tile and the beginning of another at most. The beginning is worked on first,
 * and its sums go to the workspace for the run that has the tile's end, as in w4_small.cuh. */
#pragma once
#include <math.h>

#include "w4_end.cuh"
#include "w4_job.cuh"
#include "w4_map.cuh"
#include "w4_ptx.cuh"
#include "w4_wgmma.cuh"

namespace {

constexpr int STEP = 128;       /* inputs of a stage */
constexpr int PANEL = 8;        /* tiles of x that are worked on together, for the L2 */
constexpr int SCALE_ROOM = 512; /* most bytes of a block's scales */
constexpr int CODES = KVC_W4_ROWS * STEP / 2, STRIP = CODES + SCALE_ROOM; /* of a strip in a stage */
/* Warpgroups that multiply in tiles of four strips: four of a strip each hide more than two of two strips, which had a
 * half of the loads of x from shared memory, do. */
constexpr int WIDE_GROUPS = 4;
constexpr int MOST_SPLIT = 8; /* blocks of a cluster, everywhere */

__host__ __device__ constexpr int w4_stage_bytes(int tall, int columns) { return columns * STEP * 2 + tall * STRIP; }

struct w4_plan {
    int32_t n_tiles, m_tiles, steps; /* steps of STEP inputs in a tile */
    int32_t stages;
    int32_t split; /* blocks that share a tile, a cluster if more than 1; 0: runs */
    int32_t whole; /* tiles that a block takes whole */
    /* What is left after whole tiles is cut into as many runs as tiles or more, of `run` steps, the first `longer` of
     * them of one more. */
    int32_t runs, run, longer;
};

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
            const int rank = blockIdx.x % plan.split;
            tile = blockIdx.x / plan.split;
            from = plan.steps * rank / plan.split;
            to = plan.steps * (rank + 1) / plan.split;
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
        if (item - 2 >= plan.whole) return false;
        tile = (item - 2) * (int)gridDim.x + (int)blockIdx.x;
        from = 0;
        to = plan.steps;
        return true;
    }
    /* Panels of PANEL tiles of x, in which those of x follow each other. */
    __device__ __forceinline__ void place(int &n_tile, int &m_tile) const {
        const int panel = tile / (PANEL * plan.n_tiles), at = tile - panel * PANEL * plan.n_tiles;
        const int width = min(PANEL, plan.m_tiles - panel * PANEL);
        n_tile = at / width;
        m_tile = panel * PANEL + at % width;
    }
};

/* Bytes of a stage whose arrival is waited for. */
template <int TALL, int COLUMNS> __device__ __forceinline__ int w4_stage_arrives(const w4_job &a) {
    return COLUMNS * STEP * 2 + TALL * (CODES + a.block_bytes - a.code_bytes);
}

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

/* [rows][64 inputs] of 16 bits with a swizzle of 128 bytes, at a multiple of 1024 bytes. */
__device__ __forceinline__ uint64_t w4_descriptor(uint32_t at) {
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}

/* The copying warp: its lanes share the copies of a stage. */
template <int TALL, int COLUMNS>
__device__ __forceinline__ void w4_produce(const w4_job &a, const w4_plan &plan, const CUtensorMap *map,
                                           uint32_t stages, uint32_t full, uint32_t empty, int lane) {
    constexpr int BYTES = w4_stage_bytes(TALL, COLUMNS), X = COLUMNS * STEP * 2;
    const int shift = a.inputs == STEP ? 0 : 1, arrives = w4_stage_arrives<TALL, COLUMNS>(a);
    /* W is read again where there is more than one tile of x. */
    uint64_t policy;
    if (plan.m_tiles > 1)
        asm("createpolicy.fractional.L2::evict_last.b64 %0,1.0;" : "=l"(policy));
    else
        policy = w4_read_once();
    /* Lanes 0 .. TALL - 1 have a strip each, with its scales where a step is a block; else as many more have
     * those; two more have half of x each. */
    const int strip = lane % (TALL);
    const bool codes = lane < TALL, weights = lane < (TALL << shift);
    const bool rows = lane >= 2 * TALL && lane < 2 * TALL + 2;
    const int bytes = !codes ? a.block_bytes - a.code_bytes : shift ? CODES : a.block_bytes;
    const uint32_t to = stages + (rows ? (lane & 1) * (X / 2) : X + strip * STRIP + (codes ? 0 : CODES));
    int early = 0; /* stages whose weights were requested before the kernel before had ended */
#pragma unroll 1
    for (int pass = a.early ? 0 : 1; pass < 2; pass++) {
        if (pass == 1 && a.early) w4_wait_for_previous();
        int slot = 0, parity = 1, count = 0;
#pragma unroll 1
        for (w4_work work(plan); (pass == 1 || count < plan.stages) && work.next();) {
            int n_tile, m_tile;
            work.place(n_tile, m_tile);
            const char *const from =
                a.packed + (int64_t)min(n_tile * TALL + strip, a.strips - 1) * a.blocks * a.block_bytes;
#pragma unroll 1
            for (int step = work.from; step < work.to && (pass == 1 || count < plan.stages); step++, count++) {
                const uint32_t bar = full + 8 * slot;
                if (pass == 1) w4_barrier_wait(empty + 8 * slot, parity);
                if (pass == 0 || count >= early) {
                    if (lane == 0) w4_expect(bar, arrives);
                    __syncwarp();
                    if (weights)
                        w4_copy_counted(to + slot * BYTES,
                                        from + (int64_t)(step >> shift) * a.block_bytes +
                                            (codes ? (step & shift) * CODES : a.code_bytes),
                                        bytes, bar, policy);
                }
                if (pass == 1 && rows)
                    w4_copy_rows(to + slot * BYTES, map, step * STEP + 64 * (lane & 1), m_tile * COLUMNS, bar);
                if (++slot == plan.stages) slot = 0, parity ^= 1;
            }
        }
        if (pass == 0) {
            early = count;
            w4_let_next_begin();
        }
    }
}

/* Codes and scales of 64 inputs. */
template <int STRIPS, bool FINE> struct w4_fragment {
    uint32_t word[STRIPS][4], pair[STRIPS][FINE ? 2 : 1];

    /* `at`: this warpgroup's strips in a stage. `before`: the 64 inputs before, where those may have the same scales.
     */
    __device__ __forceinline__ void load(const w4_job &a, const char *at, int step, int chunk, int lane,
                                         const w4_planes &of, const w4_fragment *before = nullptr) {
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            const uint4 v = *(const uint4 *)(at + s * STRIP + chunk * 2048 + lane * 16);
            word[s][0] = v.x, word[s][1] = v.y, word[s][2] = v.z, word[s][3] = v.w;
            if (!FINE && before) pair[s][0] = before->pair[s][0];
        }
        if (!FINE && before && a.group_shift == 7) return;
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
#pragma unroll
            for (int f = 0; f < (FINE ? 2 : 1); f++) {
                const int input = (a.inputs == STEP ? 0 : step & 1) * STEP + chunk * 64 + f * 32;
                const int group = FINE ? input / 32 : input >> a.group_shift;
                pair[s][f] = w4_scale_pair(a, at + s * STRIP + CODES + group * a.group_bytes, of);
            }
        }
    }
};

/* Sums of a tile whose inputs a cluster's blocks have shared: each adds up, in the order of blocks, and stores as many
 * pieces of 8 rows of x as the others. The stages are free by now. */
template <typename T, int GROUPS, int STRIPS, int COLUMNS>
__device__ __forceinline__ void w4_large_add(const w4_job &a, int split, float (&acc)[STRIPS][COLUMNS / 2],
                                             uint32_t base, char *stages, int n_tile, int m_tile) {
    constexpr int EIGHTS = COLUMNS / 8, PIECES = STRIPS * EIGHTS, AT_ONCE = 4, THREADS = 128 * GROUPS;
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    w4_consumers_sync<THREADS>();
    float4 *const own = (float4 *)stages + threadIdx.x;
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
            own[(s * EIGHTS + j) * THREADS] =
                make_float4(acc[s][4 * j], acc[s][4 * j + 1], acc[s][4 * j + 2], acc[s][4 * j + 3]);
    w4_cluster_sync();
    const int rank = blockIdx.x % split, stop = PIECES * (rank + 1) / split;
#pragma unroll 1
    for (int piece = PIECES * rank / split; piece < stop; piece++) {
        const int s = piece / EIGHTS, m0 = m_tile * COLUMNS + piece % EIGHTS * 8;
        if (m0 >= a.m) continue;
        const uint32_t at = base + (piece * THREADS + threadIdx.x) * 16;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int first = 0; first < split; first += AT_ONCE) {
            float4 v[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                v[i] = first + i < split ? w4_load_remote(at, first + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
        }
        const int n0 = ((n_tile * GROUPS + group) * STRIPS + s) * KVC_W4_ROWS + 16 * warp;
        w4_store_sums(a, w4_end_of(a, w4_scaled<T>::FACTOR, n0, lane), sum.x, sum.y, sum.z, sum.w, m0, lane);
    }
    w4_cluster_met(); /* the others have read */
}

template <typename T, int GROUPS, int STRIPS, int COLUMNS, bool FINE>
__global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    w4_large(const __grid_constant__ w4_job a, const __grid_constant__ w4_plan plan,
             const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) char memory[];
    constexpr int TALL = GROUPS * STRIPS, BYTES = w4_stage_bytes(TALL, COLUMNS), X = COLUMNS * STEP * 2;
    constexpr int SUMS = COLUMNS / 2, THREADS = 128 * GROUPS,
                  WORDS = STRIPS * SUMS * THREADS; /* of a thread and strip; of a tile */
    const uint32_t base = (w4_shared(memory) + 1023) & ~1023u;
    char *const stages = memory + (base - w4_shared(memory));
    const uint32_t full = base + plan.stages * BYTES, empty = full + 8 * plan.stages;
    const int group = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
    if (threadIdx.x < plan.stages) {
        w4_barrier_init(full + 8 * threadIdx.x, 1);
        w4_barrier_init(empty + 8 * threadIdx.x, 4 * GROUPS);
    }
    if (threadIdx.x == 0) w4_prefetch_map(&map);
    w4_barriers_ready();
    if (!a.early) {
        w4_wait_for_previous();
        w4_let_next_begin();
    }
    if (group == GROUPS) {
        w4_leave_registers<GROUPS == 2 ? 40 : 32>();
        if (warp == 0) w4_produce<TALL, COLUMNS>(a, plan, &map, base, full, empty, lane);
        return;
    }
    w4_take_registers<GROUPS == 2 ? 232 : 112>();
    if (a.early) w4_wait_for_previous(); /* out and the workspace are written below */
    const char *const mine = stages + X + group * STRIPS * STRIP;
    const int in_group = threadIdx.x & 127;
    w4_planes planes = w4_planes_of(a, lane >> 2, warp);
    if (COLUMNS < 128) w4_keep(planes); /* there is room for it */
    int slot = 0, parity = 0;
    for (w4_work work(plan); work.next();) {
        float acc[STRIPS][COLUMNS / 2];
#pragma unroll
        for (int s = 0; s < STRIPS; s++)
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++) acc[s][i] = 0.0f;
#pragma unroll
        for (int s = 0; s < STRIPS; s++) w4_wgmma_hold(acc[s]);
        int held = -1; /* the stage whose products may still run */
        uint32_t numbers[2][STRIPS][4];
        w4_fragment<STRIPS, FINE> part[2];
        w4_barrier_wait(full + 8 * slot, parity);
        part[0].load(a, mine + slot * BYTES, work.from, 0, in_group, planes);
#pragma unroll 1
        for (int step = work.from; step < work.to; step++) {
            const uint64_t x = w4_descriptor(base + slot * BYTES);
            const int now = slot;
            if (++slot == plan.stages) slot = 0, parity ^= 1;
#pragma unroll
            for (int chunk = 0; chunk < 2; chunk++) {
                uint32_t scale[STRIPS][FINE ? 2 : 1][2];
#pragma unroll
                for (int s = 0; s < STRIPS; s++)
#pragma unroll
                    for (int f = 0; f < (FINE ? 2 : 1); f++) w4_scaled<T>::twice(scale[s][f], part[chunk].pair[s][f]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int at = 4 * chunk + i;
                    w4_wgmma_wait<1>(); /* the products of two steps ago have read their numbers */
                    if (at == 1) {
                        if (held >= 0 && lane == 0) w4_barrier_arrive(empty + 8 * held);
                        held = now;
                    }
#pragma unroll
                    for (int s = 0; s < STRIPS; s++)
                        w4_scaled<T>::numbers(numbers[at & 1][s], part[chunk].word[s][i], scale[s][FINE ? i >> 1 : 0]);
                    w4_wgmma_fence();
#pragma unroll
                    for (int s = 0; s < STRIPS; s++)
                        w4_wgmma(acc[s], numbers[at & 1][s], x + (chunk * (X / 2) + i * 32) / 16, (const T *)nullptr);
                    w4_wgmma_commit();
                    /* What comes next is loaded behind products. */
                    if (at == 1) part[1].load(a, mine + now * BYTES, step, 1, in_group, planes, &part[0]);
                    if (at == 5 && step + 1 < work.to) {
                        w4_barrier_wait(full + 8 * slot, parity);
                        part[0].load(a, mine + slot * BYTES, step + 1, 0, in_group, planes);
                    }
                }
            }
        }
        w4_wgmma_wait<0>();
#pragma unroll
        for (int s = 0; s < STRIPS; s++) w4_wgmma_hold(acc[s]);
        __syncwarp();
        if (lane == 0) w4_barrier_arrive(empty + 8 * held);
        int n_tile, m_tile;
        constexpr int AT_ONCE = GROUPS > 2 ? 4 : 8;
        if (plan.split > 1) {
            work.place(n_tile, m_tile);
            w4_large_add<T, GROUPS, STRIPS, COLUMNS>(a, plan.split, acc, base, stages, n_tile, m_tile);
            continue;
        }
        uint32_t *const parts = (uint32_t *)a.parts + 4 * threadIdx.x;
        if (work.to < plan.steps) {
            uint32_t *const own = parts + (int64_t)blockIdx.x * WORDS;
#pragma unroll
            for (int s = 0; s < STRIPS; s++)
#pragma unroll
                for (int i = 0; i < SUMS; i += 4)
                    w4_store_parts(own + (s * SUMS + i) * THREADS, w4_part(acc[s][i]), w4_part(acc[s][i + 1]),
                                   w4_part(acc[s][i + 2]), w4_part(acc[s][i + 3]));
            continue;
        }
        if (work.from > 0) { /* the rest of the tile lies in runs before */
            const int start = (work.tile - work.first_rest()) * plan.steps;
            int other = blockIdx.x;
            do {
                uint32_t *const from = parts + (int64_t)--other * WORDS;
#pragma unroll
                for (int s = 0; s < STRIPS; s++)
#pragma unroll
                    for (int i = 0; i < SUMS; i += 4 * AT_ONCE) {
                        uint32_t bits[AT_ONCE][4];
#pragma unroll
                        for (int e = 0; e < AT_ONCE; e++)
                            w4_load_parts(bits[e], from + (s * SUMS + i + 4 * e) * THREADS);
#pragma unroll
                        for (int e = 0; e < AT_ONCE; e++) {
                            uint32_t *const at = from + (s * SUMS + i + 4 * e) * THREADS;
                            while (bits[e][0] == EMPTY || bits[e][1] == EMPTY || bits[e][2] == EMPTY ||
                                   bits[e][3] == EMPTY)
                                w4_load_parts(bits[e], at);
                            w4_store_parts(at, EMPTY, EMPTY, EMPTY, EMPTY);
#pragma unroll
                            for (int f = 0; f < 4; f++) acc[s][i + 4 * e + f] += __uint_as_float(bits[e][f]);
                        }
                    }
            } while (work.bound(other) > start);
        }
        work.place(n_tile, m_tile);
#pragma unroll
        for (int s = 0; s < STRIPS; s++) {
            const w4_end end = w4_end_of(a, w4_scaled<T>::FACTOR,
                                         ((n_tile * GROUPS + group) * STRIPS + s) * KVC_W4_ROWS + 16 * warp, lane);
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++)
                if (m_tile * COLUMNS + 8 * j < a.m)
                    w4_store_sums(a, end, acc[s][4 * j], acc[s][4 * j + 1], acc[s][4 * j + 2], acc[s][4 * j + 3],
                                  m_tile * COLUMNS + 8 * j, lane);
        }
    }
#endif
}

/* Clocks, only to choose by: of a step (products, or what the L2 gives a multiprocessor, and waiting), of adding up in
 * a cluster, of a run that waits for others, of reading the sums of one. */
struct w4_costs {
    double step, add, merge, parts;
};

w4_costs w4_costs_of(int tall, int columns) {
    const double products = 4.0 * tall * columns, bytes = 1.0 * tall * (CODES + 64) + 256.0 * columns;
    const double step = products > bytes / 22 ? products : bytes / 22;
    return {step + 250, 1000 + 10.0 * tall * columns, 6000, 1500 + 15.0 * tall * columns};
}

/* The plan without its runs; bytes of shared memory. */
int w4_plan_tiles(w4_plan *plan, const w4_job *a, int tall, int columns, const kvc_gpu *device) {
    plan->n_tiles = (a->strips + tall - 1) / tall;
    plan->m_tiles = (a->m + columns - 1) / columns;
    plan->steps = a->blocks * (a->inputs / STEP);
    plan->stages = (device->shared_most - 1024) / (w4_stage_bytes(tall, columns) + 16);
    plan->split = 0;
    return 1024 + plan->stages * (w4_stage_bytes(tall, columns) + 16);
}

/* Runs, or tiles shared by clusters of 1 .. MOST_SPLIT blocks, of which fit[split] have room at once: what takes fewer
 * clocks, which are returned; `blocks`: of threads. */
double w4_plan_of(w4_plan *plan, int *blocks, const w4_job *a, int tall, int columns, const kvc_gpu *device,
                  const int (&fit)[MOST_SPLIT + 1]) {
    w4_plan_tiles(plan, a, tall, columns, device);
    const w4_costs cost = w4_costs_of(tall, columns);
    const int64_t tiles = (int64_t)plan->n_tiles * plan->m_tiles, steps = tiles * plan->steps;
    const int64_t most = steps < device->multiprocessors ? steps : device->multiprocessors;
    /* A run of few steps is worked on faster, and its sums are one more piece to add: both weigh the same near the
     * square root. */
    const int root = (int)(1.2f * sqrtf((float)plan->steps)) + 1, least = root < plan->steps ? root : plan->steps;
    const int64_t rest = tiles % most, runs = rest * plan->steps / least;
    plan->runs = (int32_t)(runs < 1 ? 1 : runs < most ? runs : most);
    plan->whole = (int32_t)(tiles / most);
    plan->run = (int32_t)(rest * plan->steps / plan->runs);
    plan->longer = (int32_t)(rest * plan->steps % plan->runs);
    *blocks = (int)(tiles >= most ? most : plan->runs);
    double best = (double)(tiles / most * plan->steps) * cost.step;
    if (rest > 0)
        best +=
            (double)(rest * plan->steps) / plan->runs * cost.step + cost.merge + cost.parts * plan->runs / (double)rest;
    for (int split = 1; split <= MOST_SPLIT; split++) {
        if (tiles > fit[split] || (split > 1 && plan->steps < 2 * split)) continue;
        const double clocks = (plan->steps + split - 1) / split * cost.step + (split > 1 ? cost.add + 150 * split : 0);
        if (clocks >= best) continue;
        best = clocks;
        plan->split = split;
        *blocks = (int)tiles * split;
    }
    return best;
}

template <typename T, int GROUPS, int STRIPS, int COLUMNS, bool FINE> struct w4_large_kind {
    static constexpr int TALL = GROUPS * STRIPS; /* strips of a tile */
    static constexpr auto *KERNEL = w4_large<T, GROUPS, STRIPS, COLUMNS, FINE>;

    static void configure(cudaLaunchConfig_t *config, cudaLaunchAttribute (&about)[2], int blocks, int split,
                          int shared) {
        config->gridDim = dim3((unsigned)blocks);
        config->blockDim = dim3(128 * (GROUPS + 1));
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
                configure(&config, about, split * device->multiprocessors, split, shared);
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

    static cudaError_t plan(w4_plan *plan, int *blocks, double *clocks, const w4_job *a, const kvc_gpu *device) {
        int room[MOST_SPLIT + 1];
        const cudaError_t error = fit(room, device, w4_plan_tiles(plan, a, TALL, COLUMNS, device));
        if (error == cudaSuccess) *clocks = w4_plan_of(plan, blocks, a, TALL, COLUMNS, device, room);
        return error;
    }

    static cudaError_t launch(const w4_plan *plan, int blocks, const w4_job *a, cudaStream_t stream) {
        CUtensorMap map;
        const cudaError_t error = w4_map_of(&map, a, 2, COLUMNS, w4_type<T>::DTYPE == KVC_BFLOAT16);
        if (error != cudaSuccess) return error;
        cudaLaunchConfig_t config = {};
        cudaLaunchAttribute about[2] = {};
        configure(&config, about, blocks, plan->split, 1024 + plan->stages * (w4_stage_bytes(TALL, COLUMNS) + 16));
        config.stream = stream;
        return cudaLaunchKernelEx(&config, KERNEL, *a, *plan, map);
    }
};

/* One or two strips a warpgroup: two halve the reads of x, one makes more tiles. */
template <typename T, int COLUMNS, bool FINE>
cudaError_t w4_large_take(const w4_job *a, const kvc_gpu *device, cudaStream_t stream) {
    using one = w4_large_kind<T, 2, 1, COLUMNS, FINE>;
    using two = w4_large_kind<T, WIDE_GROUPS, 4 / WIDE_GROUPS, COLUMNS, FINE>;
    w4_plan narrow, wide;
    int narrow_blocks = 0, wide_blocks = 0;
    double narrow_clocks = 0, wide_clocks = 0;
    cudaError_t error = one::plan(&narrow, &narrow_blocks, &narrow_clocks, a, device);
    if (error == cudaSuccess) error = two::plan(&wide, &wide_blocks, &wide_clocks, a, device);
    if (error != cudaSuccess) return error;
    return wide_clocks <= narrow_clocks ? two::launch(&wide, wide_blocks, a, stream)
                                        : one::launch(&narrow, narrow_blocks, a, stream);
}

template <typename T> cudaError_t w4_large_any(const w4_job *a, int group, const kvc_gpu *device, cudaStream_t stream) {
#define TAKE(COLUMNS)                                                 \
    (group == 32 ? w4_large_take<T, COLUMNS, true>(a, device, stream) \
                 : w4_large_take<T, COLUMNS, false>(a, device, stream))
    return a->m <= 64 ? TAKE(64) : TAKE(128);
#undef TAKE
}

} // namespace
