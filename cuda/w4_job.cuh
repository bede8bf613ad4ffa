/* w4_job.cuh: what w4's kernels are handed, and how the host finds them. */
#pragma once
#include "common.cuh"

extern "C" {
#include "kvcomp/w4.h"
}

/* n / by for 0 <= n < 2^31, without a division: by a factor of 32 bits, which the host finds. */
struct w4_divisor {
    uint32_t factor, shift;

    static w4_divisor of(uint32_t by) {
        uint32_t bits = 0;
        while (((uint64_t)1 << bits) < by) bits++;
        return {(uint32_t)((((uint64_t)1 << (31 + bits)) + by - 1) / by), 31 + bits};
    }
    __device__ __forceinline__ int operator()(int n) const { return (int)((uint64_t)(uint32_t)n * factor >> shift); }
};

struct w4_job {
    const char *packed, *x;
    char *out;
    const char *bias;             /* or null */
    float *parts;                 /* workspace */
    int64_t x_stride, out_stride; /* bytes of a row */
    int32_t m, n, k;
    int32_t strips, blocks;                               /* of W; blocks of a strip */
    int32_t inputs, code_bytes, block_bytes, group_bytes; /* of a block, and of one group's scales */
    int32_t scale_bits;                                   /* of a code: 5..15, 16 */
    int32_t group_shift;                                  /* of a group: 5, 6, 7 */
    int32_t plane_at[3];                                  /* where a group's planes of 4, 2, 1 bits begin */
    uint32_t plane_factor[4];                             /* 8, 4, 2, 1 bits -> their place in fp16; 0 where none */
    int32_t out_dtype, bias_dtype;
    int32_t early, aligned;      /* aligned: rows of x can be copied by 16 bytes */
    int32_t tensor;              /* w4_small: rows of x come by a tensor map */
    int32_t warps, slots;        /* w4_small: of a block of threads, of a warp */
    int32_t slot_bytes, x_bytes; /* of W and x in a slot */
    int32_t run, longer;         /* w4_small: pieces of work of a block of threads, and how many have one more */
    w4_divisor by_blocks, by_run, by_longer; /* / blocks, / run, / (run + 1) */
    float factors[KVC_W4_MOST_PARTS];        /* 2^exponent of each matrix of a stack */
    int32_t begins[KVC_W4_MOST_PARTS - 1];   /* rows where the second begins, the third, ...; INT32_MAX: none */
};

/* Rows of x that w4_small takes at once: 8, 16, 32. */
#define KVC_W4_SMALL_ROWS 32
/* From here on w4_large takes them, where it can. */
#define KVC_W4_LARGE_ROWS (KVC_W4_SMALL_ROWS + 1)

/* w4_small: tiles of 8 rows of x. */
static inline int w4_small_tiles(int m) { return m <= 8 ? 1 : m <= 16 ? 2 : 4; }

/* Most warps of a block of threads. */
__host__ __device__ constexpr int w4_small_warps(int tiles) { return tiles < 4 ? 12 : 8; }

/* A warp for each piece of 16 x 8 sums, or two: w4_total. */
#define KVC_W4_SMALL_LEAST_WARPS 8

/* Rows of x that a copy brings. */
__host__ __device__ constexpr int w4_small_rows(int tiles, int m) { return tiles == 1 ? m : 8 * tiles; }

/* Bytes of a warp's sums that are added to the others' at once. */
#define KVC_W4_SMALL_SUMS 2048

/* Words of the workspace a multiprocessor: sums of a strip's rows and 8, 16, 32 columns. */
static inline int64_t w4_small_words(int64_t m) { return KVC_W4_ROWS * (m <= 8 ? 8 : m <= 16 ? 16 : 32); }

/* Where the warps' sums lie in shared memory. */
__host__ __device__ inline int w4_small_sums_at(const w4_job *a) {
    return (a->warps * a->slots * (a->x_bytes + a->slot_bytes + 8) + 128 + 15) & ~15;
}

/* Sets warps, slots and their bytes; shared memory of a block of threads, 0 where it does not fit. */
static inline int w4_small_shared(w4_job *a, const kvc_gpu *device) {
    const int tiles = w4_small_tiles(a->m);
    /* Where there is little to do what counts is when the first pieces arrive, and how many sums are added up: fewer
     * warps. (Measured on an H200: 8 warps up to here, 12 above; 16 are slower, but for 28672 x 4096.) */
    const int64_t few = (tiles == 1 ? 60 : 80) * (int64_t)device->multiprocessors;
    const int most = (int64_t)a->strips * a->blocks <= few ? KVC_W4_SMALL_LEAST_WARPS : w4_small_warps(tiles);
    a->x_bytes = w4_small_rows(tiles, a->m) * 2 * a->inputs;
    a->slot_bytes = a->block_bytes;
    /* Two slots a warp: the copies of one hide behind the products of the other. More delay the first pieces, because
     * all are requested at once. One where two do not fit, as blocks of 256 inputs from 9 rows of x on. */
    for (a->slots = 2; a->slots > 0; a->slots--)
        for (a->warps = most; a->warps >= KVC_W4_SMALL_LEAST_WARPS; a->warps--) {
            const int bytes = w4_small_sums_at(a) + a->warps * KVC_W4_SMALL_SUMS;
            /* More than half of what there is: two blocks of threads on one multiprocessor leave another without. */
            const int alone = device->shared_most / 2 + 1;
            if (bytes <= device->shared_most) return bytes > alone ? bytes : alone;
        }
    return 0;
}

/* One definition a dtype of x: w4_small_half.cu, w4_small_bfloat.cu. */
cudaError_t kvc_w4_small_half(w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream);
cudaError_t kvc_w4_small_bfloat(w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream);

/* As many rows of x as there are, on sm_90a, where rows of x can be copied by 16 bytes. Workspace: words of a tile for
 * each multiprocessor. w4_large_half.cu, w4_large_bfloat.cu. */
cudaError_t kvc_w4_large_half(const w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream);
cudaError_t kvc_w4_large_bfloat(const w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream);
static inline int64_t w4_large_words(int64_t m) { return 256 * (m <= 64 ? 64 : 128); }
