/* bsr.h: block-sparse rows times dense.
 *
 * A (m,k) is stored as in SciPy and torch: indptr (rows+1,), indices (nnzb,), values (nnzb,block,block), row-major
 * blocks; rows = ceil(m / block) block rows, cols = ceil(k / block) block columns; indices of a row ascend and differ.
 * The last block row and column may be cut by m and k: what their blocks hold beyond them takes no part (CUDA
 * multiplies it with zeros, so it must be finite there).
 *
 * kvc_bsr_check looks at the structure. kvc_bsr_plan turns it, once, into a plan: a small int32 array that all products
 * with A (and, made with transpose, with its transpose) read instead of indptr and indices. It is made on the CPU and
 * copied to where the values are (it alone allocates, for the time it takes); values may change, the structure may not.
 * Rows of op(A) are taken KVC_BSR_ROWS at a time: a tile. A tile's steps are the block columns in which any of its
 * block rows has a block, ascending; each names the block of every block row, or -1: blocks smaller than a tile share
 * what they read of the dense matrix. Layout in words, S = KVC_BSR_ROWS / block: kvc_bsr_head; tiles x kvc_bsr_tile,
 * most steps first (ties: the upper tile); nnzb x (block row, block column) as in A; steps x (block column of op(A), S
 * blocks). The first long_tiles of the tiles have more than twice the mean's steps: see kvc_bsr_place_of.
 *
 * kvc_bsr_merge joins factor x factor blocks into blocks `factor` times as large: the structure of the larger blocks
 * and, for each block, its place: larger block * factor^2 + row in it * factor + column in it. Larger values are zeros
 * into which the blocks are copied.
 *
 * kvc_bsr_matmul: out = op(A) dense + beta * out, op(A) = A or its transpose (by the plan of the same transpose). Sums
 * are fp32 (CPU: in the order of columns, whatever the threads; CUDA: on tensor cores, whose sums keep a few bits
 * less), rounded to out's type once, nearest even; too large for it becomes infinite. beta = 0: out is not read. Empty
 * rows become beta * out. What is infinite or NaN in dense may, with blocks of 32 on CUDA, reach rows of the block
 * row beside, as 0 times it. On CUDA, rows of `dense` and `out` that are a multiple of 16 bytes apart, at such
 * addresses, are what runs fast; a plan whose head disagrees with the arguments leaves out as it was.
 *
 * kvc_bsr_sddmm: the gradient of values: out[i] = rows r of left (m,n) times rows c of right (k,n), transposed, for
 * block i at (r, c); 0 beyond m and k.
 *
 * Errors: ESHAPE, EDTYPE; EINVAL for a structure that is not as above, a plan of another matrix or of the other
 * transpose (on CUDA these are not looked at), beta that is not finite; ENOTSUP for float32 values on CUDA. */
#pragma once
#include "format.h"
#include "kvcomp.h"

#define KVC_BSR_ROWS 128         /* of op(A) in a tile */
#define KVC_BSR_MAGIC 0x31525342 /* "BSR1" */
#define KVC_BSR_WORKSPACE 64     /* bytes */
KVC_HD int kvc_bsr_block_ok(int64_t block) { return block == 16 || block == 32 || block == 64 || block == 128; }

typedef struct {
    int32_t magic, block, transpose, tiles;
    int32_t m, k, blocks, steps; /* of A */
    int32_t long_tiles, spare[7];
} kvc_bsr_head;

typedef struct {
    int32_t row, first, steps, spare; /* tile's number from above, its first step, how many */
} kvc_bsr_tile;

#define KVC_BSR_HEAD ((int64_t)(sizeof(kvc_bsr_head) / 4)) /* words */
KVC_HD int64_t kvc_bsr_tiles(int64_t rows) { return rows / KVC_BSR_ROWS + (rows % KVC_BSR_ROWS != 0); }
KVC_HD int64_t kvc_bsr_step_words(int64_t block) { return 1 + KVC_BSR_ROWS / block; }
KVC_HD int64_t kvc_bsr_coordinates(int64_t rows) { return KVC_BSR_HEAD + 4 * kvc_bsr_tiles(rows); } /* offset */
KVC_HD int64_t kvc_bsr_steps(int64_t rows, int64_t blocks) { return kvc_bsr_coordinates(rows) + 2 * blocks; }

typedef struct {
    uint32_t tile, group; /* the tile's place in the plan */
} kvc_bsr_place;

/* Which tile and which group of columns the work `work` of tiles * groups is, on CUDA, where work is taken in ascending
 * order. Panels of columns are outermost, so that what they read of the dense matrix stays in L2 while all tiles pass;
 * in a panel the tiles with most steps come first. But long tiles come before everything, panel by panel: the last
 * panel's would begin when the others are nearly done, and be waited for alone. */
KVC_HD kvc_bsr_place kvc_bsr_place_of(uint32_t work, uint32_t tiles, uint32_t long_tiles, uint32_t groups,
                                      uint32_t panel) {
    const uint32_t long_work = long_tiles * groups;
    const uint32_t first = work < long_work ? 0 : long_tiles, at = work < long_work ? work : work - long_work;
    const uint32_t panel_work = (work < long_work ? long_tiles : tiles - long_tiles) * panel;
    const uint32_t begin = at / panel_work * panel, rest = at % panel_work;
    const uint32_t width = panel < groups - begin ? panel : groups - begin;
    kvc_bsr_place place;
    place.tile = first + rest / width;
    place.group = begin + rest % width;
    return place;
}

typedef struct {
    kvc_tensor indptr;  /* in (rows+1,) int32 | int64 */
    kvc_tensor indices; /* in (nnzb,) int32 | int64 */
    int64_t m, k;       /* 0..2^31 - 1 */
    int32_t block;      /* 16, 32, 64, 128 */
} kvc_bsr_structure;

typedef struct {
    kvc_tensor plan; /* out (words,) int32, words >= kvc_bsr_plan_words */
    kvc_bsr_structure a;
    int32_t transpose; /* 0, 1 */
    int64_t *used;     /* out: words of the plan; the rest is left as it was */
} kvc_bsr_plan_args;

typedef struct {
    kvc_tensor indptr;  /* out (ceil(m / (factor * block)) + 1,) int64 */
    kvc_tensor indices; /* out (nnzb,) int64: the first `blocks` are written */
    kvc_tensor place;   /* out (nnzb,) int64 */
    kvc_bsr_structure a;
    int32_t factor;  /* 2, 4, 8; factor * block <= 128 */
    int64_t *blocks; /* out: how many larger blocks */
} kvc_bsr_merge_args;

typedef struct {
    kvc_tensor out;       /* in/out (m,n), transpose: (k,n); float32 | float16 | bfloat16; rows contiguous */
    kvc_tensor values;    /* in (nnzb,block,block) float16 | bfloat16; float32 on the CPU; contiguous */
    kvc_tensor plan;      /* in (words,) int32 */
    kvc_tensor dense;     /* in (k,n), transpose: (m,n); as values; rows contiguous */
    kvc_tensor workspace; /* (bytes,) uint8: KVC_BSR_WORKSPACE; one for each stream (CPU: may be left out) */
    int64_t m, k;
    int32_t transpose;
    float beta;
} kvc_bsr_matmul_args;

typedef struct {
    kvc_tensor out;    /* out (nnzb,block,block) float32 | float16 | bfloat16; contiguous */
    kvc_tensor plan;   /* in (words,) int32, of A or of its transpose */
    kvc_tensor left;   /* in (m,n) float16 | bfloat16; float32 on the CPU; rows contiguous */
    kvc_tensor right;  /* in (k,n), as left */
    int32_t transpose; /* of the plan */
} kvc_bsr_sddmm_args;

typedef kvc_status kvc_bsr_matmul_fn(const kvc_bsr_matmul_args *args, kvc_stream stream);
typedef kvc_status kvc_bsr_sddmm_fn(const kvc_bsr_sddmm_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_status kvc_bsr_check(const kvc_bsr_structure *a);
/* The most words that a plan of such a matrix has. */
int64_t kvc_bsr_plan_words(int64_t m, int64_t k, int64_t block, int64_t blocks, int transpose);
kvc_status kvc_bsr_plan(const kvc_bsr_plan_args *args);
kvc_status kvc_bsr_merge(const kvc_bsr_merge_args *args);
kvc_bsr_matmul_fn kvc_bsr_matmul_cpu, kvc_bsr_matmul_cuda;
kvc_bsr_sddmm_fn kvc_bsr_sddmm_cpu, kvc_bsr_sddmm_cuda;
/* What both definitions refuse; on the CPU also what the plan says. */
kvc_status kvc_bsr_matmul_check(const kvc_bsr_matmul_args *args);
kvc_status kvc_bsr_sddmm_check(const kvc_bsr_sddmm_args *args);
#ifdef __cplusplus
}
#endif
