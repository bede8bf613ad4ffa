/* w4_job.cuh: what w4's kernels are handed, and how the host finds them. */
#pragma once
#include "common.cuh"

extern "C" {
#include "kvcomp/w4.h"
}

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
    int32_t early, aligned;             /* aligned: rows of x can be copied by 16 bytes */
    int32_t tensor;                     /* w4_small: rows of x come by a tensor map */
    int32_t slots, slot_bytes, x_bytes; /* w4_small's rings; of x in a slot */
    int32_t run, longer;                /* w4_small: pieces of work of a block of threads, and how many have one more */
    float factor;                       /* 2^exponent */
};

/* Rows of x that w4_small takes at once: 8, 16, 32. */
#define KVC_W4_SMALL_ROWS 32
/* From here on w4_large takes them, where it can. */
#define KVC_W4_LARGE_ROWS 17

/* w4_small: tiles of 8 rows of x. */
static inline int w4_small_tiles(int m) { return m <= 8 ? 1 : m <= 16 ? 2 : 4; }

/* Warps of a block of threads; strips of W that share a copy of x, of which there is as much as of W at 16 rows. */
__host__ __device__ constexpr int w4_small_warps(int tiles) { return tiles == 1 ? 12 : 8; }
__host__ __device__ constexpr int w4_small_strips(int tiles) { return tiles == 2 ? 2 : 1; }

/* Rows of W whose sums the warps add up at once, and floats between rows of x there: no two lanes meet in a bank. */
__host__ __device__ constexpr int w4_sum_rows(int tiles) { return tiles == 1 ? KVC_W4_ROWS : tiles == 2 ? 32 : 16; }
__host__ __device__ constexpr int w4_sum_pitch(int tiles) { return w4_sum_rows(tiles) + 4; }

/* Words of the workspace a multiprocessor. */
static inline int64_t w4_small_words(int64_t m) {
    const int64_t rows = m < KVC_W4_SMALL_ROWS ? m : KVC_W4_SMALL_ROWS, pairs = rows < 16 ? rows : 16;
    const int64_t one = rows * KVC_W4_ROWS, two = rows > 8 ? 2 * pairs * KVC_W4_ROWS : 0;
    return one > two ? one : two;
}

/* Sets slots and their bytes; shared memory of a block of threads, 0 where it does not fit. */
static inline int w4_small_shared(w4_job *a, const kvc_gpu *device) {
    const int tiles = w4_small_tiles(a->m), warps = w4_small_warps(tiles), strips = w4_small_strips(tiles);
    a->x_bytes = (tiles == 1 ? a->m : 8 * tiles) * 2 * a->inputs;
    a->slot_bytes = (strips * a->block_bytes + 127) / 128 * 128 + a->x_bytes;
    const int rest = warps * a->m * w4_sum_pitch(tiles) * 4 + 128 + 16;
    /* Weights in flight: 68 KB of a multiprocessor hide the memory's latency. Two slots a warp are 100 KB with 12
     * warps, and leave room for the next launch's block of threads beside this one. */
    const int most = (device->shared_most - rest) / (warps * (a->slot_bytes + 8)), wanted = tiles == 4 ? 3 : 2;
    a->slots = most < wanted ? most : wanted;
    return a->slots < 1 ? 0 : warps * a->slots * (a->slot_bytes + 8) + rest;
}

/* One definition a dtype of x: w4_small_half.cu, w4_small_bfloat.cu. */
cudaError_t kvc_w4_small_half(w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream);
cudaError_t kvc_w4_small_bfloat(w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream);

/* As many rows of x as there are, on sm_90a, where rows of x can be copied by 16 bytes. Workspace: words of a tile for
 * each multiprocessor. w4_large_half.cu, w4_large_bfloat.cu. */
cudaError_t kvc_w4_large_half(const w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream);
cudaError_t kvc_w4_large_bfloat(const w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream);
static inline int64_t w4_large_words(int64_t m) { return 256 * (m <= 32 ? 32 : m <= 64 ? 64 : 128); }
