/* w4_small.cuh: x * W^T for up to 32 rows of x: a stream of weights.
 *
 * One block of threads a multiprocessor takes an equal run of W's pieces (a block of one strip, or those of two strips
 * and the same inputs, which share x), in the order strip by strip; its warps take turns, each with a ring of its own
 * of copies of pieces and of the inputs of x that go with them. W is the first operand of m16n8k16, as its codes lie; q
 * is exact, and a group's sums are multiplied by its scales in fp32. What a warp does between two pieces is short: one
 * lane requests W by one copy a strip and x by a tensor map, without divisions.
 *
 * A run may end within a strip: the sums of that part, which is worked on first, go to the workspace, where the block
 * of threads that has the strip's end finds them. They are their own flags: words of the workspace are EMPTY
 * (0xFFFFFFFF, a NaN that no arithmetic gives) until they are there, and again once they have been read. Who waits
 * waits for blocks of lower index, which began before. */
#pragma once
#include "w4_job.cuh"
#include "w4_map.cuh"
#include "w4_ptx.cuh"

namespace {

/* A run: `tail` pieces, its last part, come first. */
struct w4_run {
    int count, tail;
    int rest_from;  /* the run's i-th piece is W's i + rest_from, or, i < tail, i + rest_from + count */
    int rest_block; /* where in its strip the first of the others lies */
};

/* The run's i-th piece, and where in its strip it lies. */
struct w4_place {
    int i, block;

    __device__ __forceinline__ void set(const w4_run &run, int blocks, int at) {
        i = at;
        block = at < run.tail ? (at + run.rest_from + run.count) % blocks : run.rest_block + at - run.tail;
        wrap(blocks);
    }
    __device__ __forceinline__ void advance(const w4_run &run, int blocks, int by) {
        block += by;
        i += by;
        if (i >= run.tail && i - by < run.tail) block = run.rest_block + i - run.tail;
        wrap(blocks);
    }
    __device__ __forceinline__ void wrap(int blocks) {
#pragma unroll 1
        while (block >= blocks) block -= blocks;
    }
    __device__ __forceinline__ int piece(const w4_run &run) const {
        return i + run.rest_from + (i < run.tail ? run.count : 0);
    }
};

template <int TILES> struct w4_ring {
    static constexpr int STRIPS = w4_small_strips(TILES);
    const w4_job &a;
    const w4_run &run;
    const CUtensorMap *map;
    uint32_t slots, bars; /* this warp's, in shared memory */
    uint32_t x_at;        /* of a slot */
    int lane;
    uint64_t policy;

    __device__ __forceinline__ int rows() const { return TILES == 1 ? a.m : 8 * TILES; }

    __device__ __forceinline__ void request_weights(int slot, const w4_place &p) const {
        const uint32_t to = slots + slot * a.slot_bytes;
        const int piece = p.piece(run), block = STRIPS == 1 ? piece : 2 * piece - p.block;
        const char *const from = a.packed + (int64_t)block * a.block_bytes;
        /* Without a second strip the first one comes again, for rows that nobody stores. */
        const int64_t second = block - p.block + a.blocks < a.strips * a.blocks ? (int64_t)a.blocks * a.block_bytes : 0;
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            w4_expect(bars + 8 * slot, STRIPS * a.block_bytes + (a.tensor ? a.x_bytes : 0));
            w4_copy_counted(to, from, a.block_bytes, bars + 8 * slot, policy);
            if (STRIPS == 2) w4_copy_counted(to + a.block_bytes, from + second, a.block_bytes, bars + 8 * slot, policy);
        }
#else
        for (int at = 16 * lane; at < a.block_bytes; at += 512) {
            w4_copy16(to + at, from + at, 16);
            if (STRIPS == 2) w4_copy16(to + a.block_bytes + at, from + second + at, 16);
        }
#endif
    }

    __device__ __forceinline__ void request_x(int slot, const w4_place &p) const {
        const uint32_t to = slots + slot * a.slot_bytes + x_at, bar = bars + 8 * slot;
        const int k0 = p.block * a.inputs, pitch = 128 * rows(); /* bytes of 64 inputs */
#if __CUDA_ARCH__ >= 900
        if (a.tensor) {
            if (lane == 0) {
                w4_copy_rows(to, map, k0, 0, bar);
                w4_copy_rows(to + pitch, map, k0 + 64, 0, bar);
                if (a.inputs == 256) {
                    w4_copy_rows(to + 2 * pitch, map, k0 + 128, 0, bar);
                    w4_copy_rows(to + 3 * pitch, map, k0 + 192, 0, bar);
                }
            }
            return;
        }
#endif
        const int shift = a.inputs == 128 ? 4 : 5, pieces = a.m << shift; /* of 8 inputs */
        if (a.aligned) {
#pragma unroll 1
            for (int q = lane; q < pieces; q += 32) {
                const int row = q >> shift, piece = q & ((1 << shift) - 1), k = k0 + 8 * piece;
                const int bytes = min(max(2 * (a.k - k), 0), 16);
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

/* One block of W times its inputs of x: acc[16 rows][8 columns]. `line`: this lane's row of x in the slot; 64 inputs
 * further it is x_step on, 8 rows further 1024. */
template <typename T, int TILES, int GROUP>
__device__ __forceinline__ void w4_small_block(float (*acc)[TILES][4], const char *bytes, uint32_t line,
                                               uint32_t x_step, const w4_job &a, int lane) {
    constexpr int UNIT = GROUP > 64 ? GROUP : 64, GROUPS = UNIT / GROUP;         /* inputs that are worked on at once */
    constexpr int TURNS = TILES == 4 ? 4 : TILES == 2 ? 1 : 2, ROWS = 4 / TURNS; /* of the 64 rows */
#pragma unroll 1
    for (int unit = 0; unit < a.inputs; unit += UNIT) {
        uint32_t pair[GROUPS]; /* of lane 4 * r + c: rows r and r + 8 of 16 rows c */
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            pair[g] = w4_scale_pair(a, bytes + a.code_bytes + (unit / GROUP + g) * a.group_bytes,
                                    w4_planes_of(a, lane >> 2, lane & 3));
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            asm volatile("" ::: "memory"); /* a turn's words are not loaded before: registers */
            float part[ROWS][TILES][4];
#pragma unroll
            for (int chunk = 0; chunk < UNIT / 64; chunk++) {
                uint32_t b[TILES][2][4], word[ROWS][4];
                const uint32_t at = line + (unit / 64 + chunk) * x_step;
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const uint32_t from = w4_turned(at + t * 1024, lane >> 3);
                    w4_load_columns(b[t][0], from);
                    w4_load_columns(b[t][1], from ^ 64);
                }
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    const uint4 v =
                        *(const uint4 *)(bytes + (((unit / 64 + chunk) * 4 + turn * ROWS + i) * 32 + lane) * 16);
                    word[i][0] = v.x, word[i][1] = v.y, word[i][2] = v.z, word[i][3] = v.w;
                }
#pragma unroll
                for (int step = 0; step < 4; step++) {
                    if ((64 * chunk + 16 * step) % GROUP == 0)
#pragma unroll
                        for (int i = 0; i < ROWS; i++)
#pragma unroll
                            for (int t = 0; t < TILES; t++)
#pragma unroll
                                for (int e = 0; e < 4; e++) part[i][t][e] = 0.0f;
#pragma unroll
                    for (int i = 0; i < ROWS; i++) {
                        uint32_t q[4];
                        w4_type<T>::numbers(q, word[i][step]);
#pragma unroll
                        for (int t = 0; t < TILES; t++)
                            w4_type<T>::multiply(part[i][t], q, b[t][step >> 1][2 * (step & 1)],
                                                 b[t][step >> 1][2 * (step & 1) + 1]);
                    }
                    if ((64 * chunk + 16 * step + 16) % GROUP == 0)
#pragma unroll
                        for (int i = 0; i < ROWS; i++) {
                            const uint32_t two = __shfl_sync(0xffffffffu, pair[(64 * chunk + 16 * step) / GROUP],
                                                             (lane & 28) + turn * ROWS + i);
                            const float2 scale = __half22float2(*(const __half2 *)&two);
#pragma unroll
                            for (int t = 0; t < TILES; t++)
#pragma unroll
                                for (int e = 0; e < 4; e++)
                                    acc[turn * ROWS + i][t][e] += part[i][t][e] * (e < 2 ? scale.x : scale.y);
                        }
                }
            }
        }
    }
}

/* Whose sums a thread has after the warps' have been added up: of round ROUND, element EACH. */
template <int TILES> struct w4_sums {
    static constexpr int THREADS = 32 * w4_small_warps(TILES), ROWS = w4_sum_rows(TILES);
    static constexpr int ROUNDS = w4_small_strips(TILES) * KVC_W4_ROWS / ROWS;
    static constexpr int EACH = (8 * TILES * ROWS + THREADS - 1) / THREADS;
    static constexpr int OTHERS = 2; /* runs whose parts are read at once */
    float value[ROUNDS][EACH];

    /* Of x's row m: its place in that row's STRIPS * 64 sums. */
    static __device__ __forceinline__ bool place(const w4_job &a, int round, int each, int &m, int &row) {
        const int e = threadIdx.x + each * THREADS;
        m = e / ROWS;
        row = round * ROWS + e % ROWS;
        return m < a.m;
    }
};

/* The sums of a run's part of a strip (or two): to the workspace, or with what `others` runs before have of it, to
 * out. */
template <int TILES>
__device__ __forceinline__ void w4_small_end(const w4_job &a, w4_sums<TILES> &sums, int strip, bool last, int others) {
    using S = w4_sums<TILES>;
    constexpr int WIDTH = w4_small_strips(TILES) * KVC_W4_ROWS;
    const int pitch = a.m * WIDTH;
    volatile uint32_t *const mine = (volatile uint32_t *)a.parts + (int64_t)blockIdx.x * pitch;
    int m, row;
    if (!last) {
#pragma unroll
        for (int i = 0; i < S::ROUNDS; i++)
#pragma unroll
            for (int j = 0; j < S::EACH; j++)
                if (S::place(a, i, j, m, row)) mine[m * WIDTH + row] = w4_part(sums.value[i][j]);
        return;
    }
#pragma unroll 1
    for (int other = 1; other <= others; other += S::OTHERS) {
        uint32_t bits[S::OTHERS][S::ROUNDS][S::EACH];
#pragma unroll
        for (int o = 0; o < S::OTHERS; o++)
#pragma unroll
            for (int i = 0; i < S::ROUNDS; i++)
#pragma unroll
                for (int j = 0; j < S::EACH; j++)
                    if (S::place(a, i, j, m, row) && other + o <= others)
                        bits[o][i][j] = mine[m * WIDTH + row - (other + o) * pitch];
#pragma unroll
        for (int o = 0; o < S::OTHERS; o++)
#pragma unroll
            for (int i = 0; i < S::ROUNDS; i++)
#pragma unroll
                for (int j = 0; j < S::EACH; j++) {
                    if (!S::place(a, i, j, m, row) || other + o > others) continue;
                    volatile uint32_t *const from = mine + (m * WIDTH + row - (other + o) * pitch);
                    while (bits[o][i][j] == EMPTY) bits[o][i][j] = *from;
                    *from = EMPTY;
                    sums.value[i][j] += __uint_as_float(bits[o][i][j]);
                }
    }
#pragma unroll
    for (int i = 0; i < S::ROUNDS; i++)
#pragma unroll
        for (int j = 0; j < S::EACH; j++) {
            const bool has = S::place(a, i, j, m, row);
            const int n = strip * WIDTH + row;
            if (!has || n >= a.n) continue;
            float sum = sums.value[i][j] * a.factor;
            if (a.bias) sum += w4_load(a.bias, a.bias_dtype, n);
            w4_store(a.out + m * a.out_stride, a.out_dtype, n, sum);
        }
}

template <typename T, int TILES, int GROUP>
__global__ void __launch_bounds__(32 * w4_small_warps(TILES), TILES == 1 ? 2 : 1)
    w4_small(const __grid_constant__ w4_job a, const __grid_constant__ CUtensorMap map) {
    extern __shared__ __align__(1024) char memory[];
    constexpr int ROWS = w4_sum_rows(TILES), PITCH = w4_sum_pitch(TILES), STRIPS = w4_small_strips(TILES);
    constexpr int WARPS = w4_small_warps(TILES);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, me = blockIdx.x;
    /* [rings][zeros][barriers][sums] */
    char *const slots = memory + warp * a.slots * a.slot_bytes;
    char *const zeros = memory + WARPS * a.slots * a.slot_bytes;
    const uint32_t bars = w4_shared(zeros + 128) + 8 * warp * a.slots;
    float *const sums = (float *)(zeros + 128 + ((8 * WARPS * a.slots + 15) & ~15));
    const int x_at = (STRIPS * a.block_bytes + 127) & ~127;

    w4_run run;
    w4_ring<TILES> ring = {a, run, &map, w4_shared(slots), bars, (uint32_t)x_at, lane, 0};
    int arrivals = 32;
#if __CUDA_ARCH__ >= 900
    ring.policy = w4_read_once();
    arrivals = a.tensor ? 1 : 33;
#endif
    if (lane < a.slots) w4_barrier_init(bars + 8 * lane, arrivals);
    if (threadIdx.x == 0 && a.tensor) w4_prefetch_map(&map);
    if (threadIdx.x < 32) ((uint32_t *)zeros)[threadIdx.x] = 0;
    w4_barriers_ready();

    const int first = me * a.run + min(me, a.longer), end = first + a.run + (me < a.longer);
    const int last_strip = end / a.blocks;
    run.count = end - first;
    run.tail = min(end - last_strip * a.blocks, run.count);
    run.rest_from = first - run.tail;
    run.rest_block = first % a.blocks;
    if (!a.early) w4_wait_for_previous();
    w4_place ahead; /* of the next request */
    ahead.set(run, a.blocks, warp);
    const w4_place begun = ahead;
    for (int s = 0; s < a.slots && ahead.i < run.count; s++) {
        ring.request_weights(s, ahead);
        ahead.advance(run, a.blocks, WARPS);
    }
    w4_let_next_begin();
    if (a.early) w4_wait_for_previous();
    ahead = begun;
    for (int s = 0; s < a.slots && ahead.i < run.count; s++) {
        ring.request_x(s, ahead);
        ahead.advance(run, a.blocks, WARPS);
    }

    const int column = lane & 7;
    int at = warp, slot = 0, parity = 0;
    int strip = run.tail > 0 ? last_strip : first / a.blocks;
    for (int stop = 0; stop < run.count;) {
        const bool last = stop >= run.tail;
        stop = last ? min((strip + 1) * a.blocks - run.rest_from, run.count) : run.tail;
        float acc[STRIPS * 4][TILES][4];
#pragma unroll
        for (int i = 0; i < STRIPS * 4; i++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][t][e] = 0.0f;
#pragma unroll 1
        for (; at < stop; at += WARPS) {
            w4_barrier_wait(bars + 8 * slot, parity);
            __syncwarp();
            const char *const bytes = slots + slot * a.slot_bytes;
            /* Columns that x does not have are read from one place. */
            const bool has = TILES > 1 || column < a.m;
            const uint32_t line = has ? w4_shared(bytes) + x_at + column * 128 : w4_shared(zeros);
#pragma unroll
            for (int s = 0; s < STRIPS; s++)
                w4_small_block<T, TILES, GROUP>(acc + 4 * s, bytes + s * a.block_bytes, line,
                                                has ? 128 * ring.rows() : 0, a, lane);
            __syncwarp();
            ahead.i = at + WARPS * a.slots;
            if (ahead.i < run.count) {
                ring.request_weights(slot, ahead);
                ring.request_x(slot, ahead);
                ahead.advance(run, a.blocks, WARPS);
            }
            if (++slot == a.slots) slot = 0, parity ^= 1;
        }
        /* Runs that have a part of this strip: those since the one in which it begins. */
        int other = me;
        if (const int from = strip * a.blocks; first > from) {
            const int far = a.longer * (a.run + 1);
            other = from < far ? from / (a.run + 1) : a.longer + (from - far) / a.run;
        }
        w4_sums<TILES> total;
#pragma unroll
        for (int round = 0; round < w4_sums<TILES>::ROUNDS; round++) {
#pragma unroll
            for (int i = 0; i < ROWS / 16; i++)
#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int m = 8 * t + 2 * (lane & 3) + (e & 1), row = 16 * i + (lane >> 2) + 8 * (e >> 1);
                        if (m < a.m) sums[(warp * a.m + m) * PITCH + row] = acc[round * (ROWS / 16) + i][t][e];
                    }
            __syncthreads();
#pragma unroll
            for (int j = 0; j < w4_sums<TILES>::EACH; j++) {
                int m, row;
                float sum = 0.0f;
                if (w4_sums<TILES>::place(a, 0, j, m, row))
#pragma unroll
                    for (int w = 0; w < WARPS; w++) sum += sums[(w * a.m + m) * PITCH + row];
                total.value[round][j] = sum;
            }
            __syncthreads();
        }
        w4_small_end<TILES>(a, total, strip, last, me - other);
        strip = last ? strip + 1 : first / a.blocks;
    }
}

template <typename T, int TILES, int GROUP>
cudaError_t w4_small_launch(w4_job *a, const kvc_gpu *device, cudaStream_t stream) {
    const int shared = w4_small_shared(a, device);
    if (shared == 0) return cudaErrorInvalidConfiguration;
    CUtensorMap map = {};
    a->tensor = a->aligned && device->capability >= 90 && (a->m == 1 || a->x_stride >= 2 * (int64_t)a->k) &&
                w4_map_of(&map, a, TILES == 1 ? a->m : 8 * TILES, w4_type<T>::DTYPE == KVC_BFLOAT16) == cudaSuccess;
    auto *const kernel = w4_small<T, TILES, GROUP>;
    static bool known[64]; /* by device */
    int at = 0;
    cudaError_t error = cudaGetDevice(&at);
    if (error == cudaSuccess && (at >= 64 || !known[at])) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device->shared_most);
        if (error == cudaSuccess && at < 64) known[at] = true;
    }
    if (error != cudaSuccess) return error;
    constexpr int STRIPS = w4_small_strips(TILES);
    const int pieces = (a->strips + STRIPS - 1) / STRIPS * a->blocks;
    const int grid = pieces < device->multiprocessors ? pieces : device->multiprocessors;
    a->run = pieces / grid;
    a->longer = pieces % grid;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)grid);
    config.blockDim = dim3(32 * w4_small_warps(TILES));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = device->capability >= 90 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, *a, map);
}

template <typename T> cudaError_t w4_small_any(w4_job *a, int group, const kvc_gpu *device, cudaStream_t stream) {
#define TAKE(TILES)                                                   \
    (group == 32   ? w4_small_launch<T, TILES, 32>(a, device, stream) \
     : group == 64 ? w4_small_launch<T, TILES, 64>(a, device, stream) \
                   : w4_small_launch<T, TILES, 128>(a, device, stream))
    return a->m <= 8 ? TAKE(1) : a->m <= 16 ? TAKE(2) : TAKE(4);
#undef TAKE
}

} // namespace
