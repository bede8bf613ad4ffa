/* bsr_check.h: the plan of a block-sparse matrix as the kernels read it. */
#pragma once
#include "core/core.h"
#include "kvcomp/bsr.h"

typedef struct {
    const kvc_bsr_tile *tiles;
    const int32_t *coordinates; /* (row, column) of each stored block */
    const int32_t *steps;
} kvc_bsr_view;

/* `rows`: of op(A). */
static inline kvc_bsr_view kvc_bsr_view_of(const int32_t *plan, int64_t rows, int64_t blocks) {
    return (kvc_bsr_view){(const kvc_bsr_tile *)(plan + KVC_BSR_HEAD), plan + kvc_bsr_coordinates(rows),
                          plan + kvc_bsr_steps(rows, blocks)};
}

/* Address of element (i, j) of a matrix whose rows are contiguous. */
static inline char *kvc_at2(const kvc_tensor *matrix, int64_t i, int64_t j) {
    return (char *)matrix->data + kvc_dtype_size(matrix->dtype) * (i * matrix->strides[0] + j);
}
