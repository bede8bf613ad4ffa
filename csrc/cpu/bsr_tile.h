/* bsr_tile.h: the inner loops of bsr_matmul and bsr_sddmm, one build per instruction set (bsr_tile.c). */
#pragma once
#include "core/core.h"

#define KVC_BSR_PANEL 256 /* columns of out that a thread works on at a time */
#define KVC_BSR_DEPTH 64  /* columns of A that are multiplied at a time */

typedef struct {
    const char *name;
    /* n values to float32; Inf and NaN stay. */
    void (*widen)(float *out, const void *row, int dtype, int64_t n);
    /* depth rows of up to KVC_BSR_PANEL columns to what multiply takes: groups of columns, each [depth][group]; the
     * last group is filled up with zeros. */
    void (*pack)(float *out, const char *rows, int64_t pitch, int dtype, int64_t depth, int64_t columns);
    /* sums (rows, KVC_BSR_PANEL) += a (rows, KVC_BSR_DEPTH)[:, :depth] times what pack made. rows: a multiple of 4. */
    void (*multiply)(float *sums, const float *a, const float *packed, int64_t rows, int64_t depth, int64_t columns);
    /* sums (rows, stride) += left (rows, n) times right (columns, n) transposed; n a multiple of 16, rows and columns
     * of 4. */
    void (*dots)(float *sums, int64_t stride, const float *left, const float *right, int64_t rows, int64_t columns,
                 int64_t n);
    /* row = sums + beta * row, rounded; row is not read where beta is 0. */
    void (*finish)(void *row, const float *sums, int dtype, int64_t n, float beta);
} kvc_bsr_ops;

const kvc_bsr_ops *kvc_bsr_best(void); /* for this machine, as kvc_attend_tiles() */
