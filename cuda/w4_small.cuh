/* w4_small.cuh: x * W^T for up to 32 rows of x: a stream of weights.
 *
 * One block of threads a multiprocessor takes an equal run of W's pieces (blocks), in the order strip by strip; its
 * warps take turns, each with a ring of its own of copies of pieces and of the inputs of x that go with them. (The L2
 * gives twice what the memory does, so that up to 16 rows of x may come as often as W.) W is the first operand of
 * m16n8k16, as its codes lie; q is exact, and a group's sums are multiplied by its scales in fp32. What a warp does for
 * a piece is bound by latency and by instructions: four sums or more are under way at once, one lane requests W by one
 * copy and all of x by one copy of a tensor map, and nothing is divided in between.
 *
 * A run may end within a strip: the sums of that part, which is worked on first, go to the workspace, where the block
 * of threads that has the strip's end finds them. They are their own flags: words of the workspace are EMPTY
 * (0xFFFFFFFF, a NaN that no arithmetic gives) until they are there, and again once they have been read. Who waits
 * waits for blocks of lower index, which began before. */
#pragma once
#include "w4_end.cuh"
#include "w4_job.cuh"
#include "w4_map.cuh"
#include "w4_run.cuh"

namespace {

/* Where things lie in shared memory: [x of every slot][W of every slot][128 bytes][barriers][sums]. */
struct w4_small_room {
    uint32_t x, weights, bars; /* this warp's */

    __device__ __forceinline__ w4_small_room(const w4_job &a, uint32_t base, int warp) {
        const int all = a.warps * a.slots, mine = warp * a.slots;
        x = base + mine * a.x_bytes;
        weights = base + all * a.x_bytes + mine * a.slot_bytes;
        bars = base + all * (a.x_bytes + a.slot_bytes) + 128 + 8 * mine;
    }
};

template <int TILES> struct w4_ring {
    const w4_job &a;
    const w4_run &run;
    const CUtensorMap *map;
    w4_small_room room;
    int lane;
    uint64_t policy;

    __device__ __forceinline__ void request_weights(int slot, const w4_place &p) const {
        const uint32_t to = room.weights + slot * a.slot_bytes;
        const char *const from = a.packed + (int64_t)p.piece(run) * a.block_bytes;
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            const uint32_t bar = room.bars + 8 * slot;
            w4_expect(bar, a.block_bytes + (a.tensor ? a.x_bytes : 0));
            w4_copy_counted(to, from, a.block_bytes, bar, policy);
        }
#else
        for (int at = 16 * lane; at < a.block_bytes; at += 512) w4_copy16(to + at, from + at, 16);
#endif
    }

    __device__ __forceinline__ void request_x(int slot, const w4_place &p) const {
        const int pitch = 128 * w4_small_rows(TILES, a.m); /* bytes of 64 inputs */
        const uint32_t to = room.x + slot * a.x_bytes, bar = room.bars + 8 * slot;
        const int k0 = p.block * a.inputs;
#if __CUDA_ARCH__ >= 900
        if (a.tensor) {
            if (lane == 0) w4_copy_pieces(to, map, k0 >> 6, bar);
            return;
        }
#endif
        const int shift = a.inputs == 128 ? 4 : 5, pieces = a.m << shift; /* of 8 inputs */
        if (a.aligned && a.k % 8 == 0) { /* a copy of fewer than 16 bytes would read 16 */
#pragma unroll 1
            for (int q = lane; q < pieces; q += 32) {
                const int row = q >> shift, piece = q & ((1 << shift) - 1), k = k0 + 8 * piece;
                const int bytes = k < a.k ? 16 : 0;
                w4_copy16(w4_turned(to + (piece >> 3) * pitch + 128 * row, piece & 7),
                          a.x + row * a.x_stride + (bytes ? 2 * (int64_t)k : 0), bytes);
            }
        } else {
#pragma unroll 1
            for (int e = lane; e < 8 * pieces; e += 32) {
                const int row = e >> (shift + 3), at = e & ((8 << shift) - 1), k = k0 + at;
                const uint16_t value = k < a.k ? *(const uint16_t *)(a.x + row * a.x_stride + 2 * (int64_t)k) : 0;
                const uint32_t line = to + (at >> 6) * pitch + 128 * row;
                asm volatile("st.shared.u16 [%0],%1;" ::"r"(w4_turned(line, at >> 3 & 7) + 2 * (at & 7)), "h"(value)
                             : "memory");
            }
        }
        w4_barrier_arrive_after_copies(bar);
    }
};

/* What a lane reads of a slot: from where in its row of x, its codes; where its scales lie. */
template <int TILES> struct w4_small_lane {
    uint32_t row, step; /* bytes of 64 inputs of x: of those before the row, of all rows */
    uint32_t piece;     /* of 16 bytes, 0..3 */
    uint32_t codes;
    w4_planes planes; /* of lane 4 * r + c: rows r and r + 8 of the first 16 rows (one tile), or of 16 rows c */

    /* Columns that x does not have are its last row (one tile), zeros, or what lay there: nobody stores them. */
    __device__ __forceinline__ w4_small_lane(const w4_job &a, int lane)
        : row(128 * min(lane & 7, w4_small_rows(TILES, a.m) - 1)), step(128 * w4_small_rows(TILES, a.m)),
          piece(lane >> 3), codes(16 * lane), planes(w4_planes_of(a, lane >> 2, TILES == 1 ? 0 : lane & 3)) {}
};

/* One block of W times its inputs of x: acc[16 rows][8 columns]. `x`, `weights`: of the slot. `BITS`: of a scale's
 * code, for one tile; 0: as `a` says. */
template <typename T, int TILES, int GROUP, int BITS>
__device__ __forceinline__ void w4_small_block(float (&acc)[4][TILES][4], uint32_t x, const char *weights,
                                               const w4_job &a, const w4_small_lane<TILES> &of, int lane) {
    /* Inputs that are worked on at once, with 32 rows. Four or more sums are under way together: of 16 rows each, of
     * tiles, or of halves of the inputs. */
    constexpr int UNIT = GROUP == 32 || TILES == 4 ? 64 : 128, STEPS = UNIT / 16, CHUNKS = UNIT / 64;
    constexpr int GROUPS = UNIT / (GROUP < UNIT ? GROUP : UNIT), SUMS = GROUPS == 1 && TILES > 1 ? 1 : 2;
    uint32_t codes = w4_shared(weights) + of.codes, line = x + of.row;
#pragma unroll 1
    for (int unit = 0; unit < a.inputs; unit += UNIT) {
        uint32_t b[CHUNKS][TILES][2][4];
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const uint32_t from = w4_turned(line + chunk * of.step, of.piece) + t * 1024;
                w4_load_columns(b[chunk][t][0], from);
                w4_load_columns(b[chunk][t][1], from ^ 64);
            }
        /* One tile: every lane has the scales of all its rows, which is faster, and takes more registers. */
        uint32_t own[GROUPS];
        const char *const scales = weights + a.code_bytes + (unit >> a.group_shift) * a.group_bytes;
        if (TILES > 1)
#pragma unroll
            for (int g = 0; g < GROUPS; g++) own[g] = w4_scale_pair(a, scales + g * a.group_bytes, of.planes);
#pragma unroll
        for (int turn = 0; turn < 2; turn++) {
            uint32_t word[CHUNKS][2][4], pair[GROUPS][2];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
                for (int h = 0; h < 2; h++) w4_load_codes(word[chunk][h], codes + (chunk * 4 + turn * 2 + h) * 512);
            w4_planes planes = of.planes;
            planes.at16 += 8 * turn, planes.at8 += 4 * turn, planes.at4 += 2 * turn, planes.at2 += turn;
            planes.shift1 += 4 * turn;
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                if (TILES == 1)
                    w4_scale_pairs<BITS>(pair[g], a, w4_shared(scales) + g * a.group_bytes, planes);
                else
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        pair[g][h] = __shfl_sync(0xffffffffu, own[g], (lane & 28) + 2 * turn + h);
            }
            float part[SUMS][2][TILES][4];
#pragma unroll
            for (int sum = 0; sum < SUMS; sum++)
#pragma unroll
                for (int j = 0; j < 8 * TILES; j++) part[sum][j / (4 * TILES)][j / 4 % TILES][j % 4] = 0.0f;
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                /* Halves in turns. */
                const int sum = i % SUMS, at = sum * (STEPS / SUMS) + i / SUMS, chunk = at >> 2, step = at & 3;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint32_t q[4];
                    w4_type<T>::numbers(q, word[chunk][h][step]);
#pragma unroll
                    for (int t = 0; t < TILES; t++)
                        w4_type<T>::multiply(part[sum][h][t], q, b[chunk][t][step >> 1][2 * (step & 1)],
                                             b[chunk][t][step >> 1][2 * (step & 1) + 1]);
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float2 scale[GROUPS];
#pragma unroll
                for (int g = 0; g < GROUPS; g++) scale[g] = __half22float2(*(const __half2 *)&pair[g][h]);
#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float one = part[0][h][t][e], two = part[SUMS - 1][h][t][e];
                        const float s = e < 2 ? scale[0].x : scale[0].y;
                        const float other = e < 2 ? scale[GROUPS - 1].x : scale[GROUPS - 1].y;
                        float &sum = acc[2 * turn + h][t][e];
                        sum = GROUPS == 1 ? fmaf(SUMS == 1 ? one : one + two, s, sum)
                                          : fmaf(two, other, fmaf(one, s, sum));
                    }
            }
        }
        codes += CHUNKS * 2048;
        line += CHUNKS * of.step;
    }
}

/* Sums of a run's part of a strip, piece by piece of 16 rows and 8 columns: of pieces i and i + WARPS, warp i has the
 * total. */
template <int TILES> struct w4_total {
    static constexpr int PIECES = 4 * TILES, WARPS = PIECES < 8 ? PIECES : 8;
    static constexpr int MOST = PIECES / WARPS;             /* totals of a warp */
    static constexpr int AT_ONCE = KVC_W4_SMALL_SUMS / 512; /* pieces of every warp that are added up at once */
    static_assert(WARPS <= KVC_W4_SMALL_LEAST_WARPS, "every total has a warp");
    float v[MOST][4];

    /* Of this warp's i-th total: 16 rows of the strip, 8 columns. */
    static __device__ __forceinline__ int rows_of(int i, int warp) { return (i * WARPS + warp) / TILES; }
    static __device__ __forceinline__ int columns_of(int warp) { return warp % TILES; }

    /* Adds the warps' up. `room`: KVC_W4_SMALL_SUMS bytes of each. */
    __device__ __forceinline__ void add(const w4_job &a, float *room, const float (&acc)[4][TILES][4], int warp,
                                        int lane) {
#pragma unroll
        for (int first = 0; first < PIECES; first += AT_ONCE) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float (&from)[4] = acc[(first + i) / TILES][i % TILES];
                *(float4 *)(room + ((warp * AT_ONCE + i) * 32 + lane) * 4) =
                    make_float4(from[0], from[1], from[2], from[3]);
            }
            __syncthreads();
            const int i = warp - first % WARPS;
            if (i < 0 || i >= AT_ONCE) continue;
            float (&sum)[4] = v[first / WARPS];
            sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
#pragma unroll 8
            for (int w = 0; w < a.warps; w++) {
                const float4 one = *(const float4 *)(room + ((w * AT_ONCE + i) * 32 + lane) * 4);
                sum[0] += one.x, sum[1] += one.y, sum[2] += one.z, sum[3] += one.w;
            }
        }
    }
};

/* A part's sums: to the workspace, or with what `others` runs before have of it, to out. Only columns that x has. */
template <int TILES>
__device__ __forceinline__ void w4_small_end(const w4_job &a, w4_total<TILES> &total, int strip, bool last, int others,
                                             int warp, int lane) {
    using W = w4_total<TILES>;
    constexpr int PITCH = W::PIECES * 128, AT_ONCE = 4; /* words of a run; runs that are read at once */
    const int column = 8 * W::columns_of(warp);
    const bool has = column + 2 * (lane & 3) < a.m;
    uint32_t *const mine = (uint32_t *)a.parts + (int64_t)blockIdx.x * PITCH + (warp * 32 + lane) * 4;
    if (!last) {
#pragma unroll
        for (int i = 0; i < W::MOST; i++)
            if (has)
                w4_store_parts(mine + i * W::WARPS * 128, w4_part(total.v[i][0]), w4_part(total.v[i][1]),
                               w4_part(total.v[i][2]), w4_part(total.v[i][3]));
        return;
    }
#pragma unroll 1
    for (int other = 1; other <= others; other += AT_ONCE) {
        uint32_t bits[AT_ONCE][W::MOST][4];
#pragma unroll
        for (int o = 0; o < AT_ONCE; o++)
#pragma unroll
            for (int i = 0; i < W::MOST; i++)
                if (has && other + o <= others)
                    w4_load_parts(bits[o][i], mine - (other + o) * PITCH + i * W::WARPS * 128);
#pragma unroll
        for (int o = 0; o < AT_ONCE; o++)
#pragma unroll
            for (int i = 0; i < W::MOST; i++) {
                if (!has || other + o > others) continue;
                uint32_t *const from = mine - (other + o) * PITCH + i * W::WARPS * 128;
                uint32_t (&v)[4] = bits[o][i];
                while (v[0] == EMPTY || v[1] == EMPTY || v[2] == EMPTY || v[3] == EMPTY) w4_load_parts(v, from);
                w4_store_parts(from, EMPTY, EMPTY, EMPTY, EMPTY);
#pragma unroll
                for (int e = 0; e < 4; e++) total.v[i][e] += __uint_as_float(v[e]);
            }
    }
#pragma unroll
    for (int i = 0; i < W::MOST; i++) {
        const int n0 = strip * KVC_W4_ROWS + 16 * W::rows_of(i, warp);
        const float (&v)[4] = total.v[i];
        w4_store_sums(a, w4_end_of(a, 1.0f, n0, lane), v[0], v[1], v[2], v[3], column, lane);
    }
}

template <typename T, int TILES, int GROUP, int BITS>
__global__ void __launch_bounds__(32 * w4_small_warps(TILES), 1)
    w4_small(const __grid_constant__ w4_job a, const __grid_constant__ CUtensorMap map) {
    extern __shared__ __align__(1024) char memory[];
    /* The same in all lanes, which the compiler is meant to see; it tests the operands of copies nonetheless. */
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, warps = a.warps;
    const w4_small_room room(a, w4_shared(memory), warp);
    const char *const weights = memory + (room.weights - w4_shared(memory));
    float *const sums = (float *)(memory + w4_small_sums_at(&a));
    const w4_run run(a, blockIdx.x);
    w4_ring<TILES> ring = {a, run, &map, room, lane, 0};
    int arrivals = 32;
#if __CUDA_ARCH__ >= 900
    ring.policy = w4_read_once();
    arrivals = a.tensor ? 1 : 33;
#endif
    if (lane < a.slots) w4_barrier_init(room.bars + 8 * lane, arrivals);
    if (threadIdx.x == 0 && a.tensor) w4_prefetch_map(&map);
    w4_own_barriers_ready();

    /* What has been asked for comes in turn, and x is late: so all warps' first pieces, then x, then further pieces.
     * (Not with 32 rows, for which registers are short, nor where x's copies say that those before them are there.) */
#if __CUDA_ARCH__ >= 900
    constexpr bool FEW = TILES < 4;
#else
    constexpr bool FEW = false;
#endif
    if (!a.early) wait_for_previous();
    w4_place ahead; /* of the next request */
    ahead.set(run, a.blocks, warp);
    w4_place begun = ahead;
    if (FEW && ahead.i < run.count) {
        ring.request_weights(0, ahead);
        ahead.advance(run, a.blocks, warps);
    }
    for (int s = 0; !FEW && s < a.slots && ahead.i < run.count; s++) {
        ring.request_weights(s, ahead);
        ahead.advance(run, a.blocks, warps);
    }
    if (a.early) wait_for_previous();
    let_next_begin(); /* it may rely on what came before this kernel */
    for (int s = 0; s < a.slots && begun.i < run.count; s++) {
        ring.request_x(s, begun);
        begun.advance(run, a.blocks, warps);
    }
    if (!FEW) ahead = begun;
    for (int s = 1; FEW && s < a.slots && ahead.i < run.count; s++) {
        ring.request_weights(s, ahead);
        ahead.advance(run, a.blocks, warps);
    }

    const w4_small_lane<TILES> of(a, lane);
    int at = warp, slot = 0, parity = 0;
    int strip = run.tail > 0 ? run.last_strip : run.first / a.blocks;
    for (int stop = 0; stop < run.count;) {
        const bool last = stop >= run.tail;
        stop = last ? min((strip + 1) * a.blocks - run.rest_from, run.count) : run.tail;
        float acc[4][TILES][4];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][t][e] = 0.0f;
#pragma unroll 1
        for (; at < stop; at += warps) {
            w4_barrier_wait(room.bars + 8 * slot, parity);
            __syncwarp();
            w4_small_block<T, TILES, GROUP, BITS>(acc, room.x + slot * a.x_bytes, weights + slot * a.slot_bytes, a, of,
                                                  lane);
            __syncwarp();
            if (ahead.i < run.count) {
                ring.request_weights(slot, ahead);
                ring.request_x(slot, ahead);
                ahead.advance(run, a.blocks, warps);
            }
            if (++slot == a.slots) slot = 0, parity ^= 1;
        }
        w4_total<TILES> total;
        total.add(a, sums, acc, warp, lane);
        if (warp < w4_total<TILES>::WARPS)
            w4_small_end<TILES>(a, total, strip, last, blockIdx.x - run.begins_in(a, strip), warp, lane);
        strip = last ? strip + 1 : run.first / a.blocks;
    }
}

template <typename T, int TILES, int GROUP, int BITS>
cudaError_t w4_small_launch(w4_job *a, const kvc_gpu *device, cudaStream_t stream) {
    const int shared = w4_small_shared(a, device);
    if (shared == 0) return cudaErrorInvalidConfiguration;
    CUtensorMap map = {};
    a->tensor = a->aligned && device->capability >= 90 && a->k % 64 == 0 &&
                (a->m == 1 || a->x_stride >= 2 * (int64_t)a->k) &&
                w4_map_of(&map, a, 3, w4_small_rows(TILES, a->m), w4_type<T>::DTYPE == KVC_BFLOAT16) == cudaSuccess;
    auto *const kernel = w4_small<T, TILES, GROUP, BITS>;
    static bool known[64]; /* by device */
    int at = 0;
    cudaError_t error = cudaGetDevice(&at);
    if (error == cudaSuccess && (at >= 64 || !known[at])) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device->shared_most);
        if (error == cudaSuccess && at < 64) known[at] = true;
    }
    if (error != cudaSuccess) return error;
    const int pieces = a->strips * a->blocks;
    const int grid = pieces < device->multiprocessors ? pieces : device->multiprocessors;
    a->run = pieces / grid;
    a->longer = pieces % grid;
    a->by_run = w4_divisor::of(a->run);
    a->by_longer = w4_divisor::of(a->run + 1);
    a->by_blocks = w4_divisor::of(a->blocks);
    const kvc_launch launch(*device, dim3((unsigned)grid), dim3(32 * a->warps), shared, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, *a, map);
}

template <typename T> cudaError_t w4_small_any(w4_job *a, int group, const kvc_gpu *device, cudaStream_t stream) {
    /* E5M5's codes in groups of 128, the default, take fewer instructions of their own. (With more rows of
     * x they take registers that are not there.) */
    if (a->m <= 8 && group == 128 && a->scale_bits == 10) return w4_small_launch<T, 1, 128, 10>(a, device, stream);
#define TAKE(TILES)                                                      \
    (group == 32   ? w4_small_launch<T, TILES, 32, 0>(a, device, stream) \
     : group == 64 ? w4_small_launch<T, TILES, 64, 0>(a, device, stream) \
                   : w4_small_launch<T, TILES, 128, 0>(a, device, stream))
    return a->m <= 8 ? TAKE(1) : a->m <= 16 ? TAKE(2) : TAKE(4);
#undef TAKE
}

} // namespace
