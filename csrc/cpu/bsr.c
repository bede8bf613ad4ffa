/* bsr.c: products with a block-sparse matrix on the CPU. A thread takes a tile (128 rows of op(A)) and a panel of
 * columns; each step's rows of the dense matrix become float32 once for all block rows of the tile. */
#include <string.h>

#include "cpu/attend_tile.h"
#include "cpu/bsr_check.h"
#include "cpu/bsr_tile.h"

#define ALONE ((int64_t)1 << 20) /* multiplications that one thread does sooner than others wake up */

extern const kvc_bsr_ops kvc_bsr_ops_base;
#ifdef KVC_HAVE_X86_ISAS
extern const kvc_bsr_ops kvc_bsr_ops_avx2, kvc_bsr_ops_avx512;
#endif

const kvc_bsr_ops *kvc_bsr_best(void) {
#ifdef KVC_HAVE_X86_ISAS
    const char *name = kvc_attend_tiles()->name;
    if (strcmp(name, "avx512") == 0) return &kvc_bsr_ops_avx512;
    if (strcmp(name, "avx2") == 0) return &kvc_bsr_ops_avx2;
#endif
    return &kvc_bsr_ops_base;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- matmul */

typedef struct {
    const kvc_bsr_matmul_args *args;
    const kvc_bsr_ops *ops;
    kvc_bsr_view plan;
    int64_t block, rows, depth, n, panels; /* rows, depth: of op(A) */
} product;

/* Rows of op(A)'s block, columns from `first` on, as float32 rows of KVC_BSR_DEPTH. */
static void load_block(const product *p, float *a, int64_t which, int64_t rows, int64_t first, int64_t depth) {
    const kvc_tensor *values = &p->args->values;
    const int64_t size = kvc_dtype_size(values->dtype), b = p->block;
    const char *block = (const char *)values->data + which * b * b * size;
    if (!p->args->transpose) {
        for (int64_t r = 0; r < rows; r++)
            p->ops->widen(a + r * KVC_BSR_DEPTH, block + (r * b + first) * size, values->dtype, depth);
        return;
    }
    float row[KVC_BSR_ROWS];
    for (int64_t d = 0; d < depth; d++) {
        p->ops->widen(row, block + (first + d) * b * size, values->dtype, rows);
        for (int64_t r = 0; r < rows; r++) a[r * KVC_BSR_DEPTH + d] = row[r];
    }
}

static void multiply_tile(void *context, int64_t item) {
    const product *p = context;
    const kvc_bsr_matmul_args *args = p->args;
    const kvc_bsr_tile *tile = p->plan.tiles + item / p->panels;
    const int64_t column = item % p->panels * KVC_BSR_PANEL, columns = least(p->n - column, KVC_BSR_PANEL);
    const int64_t first_row = (int64_t)tile->row * KVC_BSR_ROWS, rows = least(p->rows - first_row, KVC_BSR_ROWS);
    const int64_t words = kvc_bsr_step_words(p->block), b = p->block;
    _Alignas(64) float sums[KVC_BSR_ROWS * KVC_BSR_PANEL];
    _Alignas(64) float packed[KVC_BSR_DEPTH * KVC_BSR_PANEL];
    _Alignas(64) float a[KVC_BSR_ROWS * KVC_BSR_DEPTH];
    memset(sums, 0, sizeof sums);
    const int32_t *step = p->plan.steps + tile->first * words;
    for (int64_t i = 0; i < tile->steps; i++, step += words) {
        const int64_t at = (int64_t)step[0] * b, end = least(p->depth - at, b);
        for (int64_t first = 0; first < end; first += KVC_BSR_DEPTH) {
            const int64_t depth = least(end - first, KVC_BSR_DEPTH);
            p->ops->pack(packed, kvc_at2(&args->dense, at + first, column),
                         args->dense.strides[0] * kvc_dtype_size(args->dense.dtype), args->dense.dtype, depth, columns);
            for (int64_t s = 0; s < words - 1 && s * b < rows; s++) {
                if (step[1 + s] < 0) continue;
                load_block(p, a, step[1 + s], b, first, depth);
                p->ops->multiply(sums + s * b * KVC_BSR_PANEL, a, packed, b, depth, columns);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++)
        p->ops->finish(kvc_at2(&args->out, first_row + r, column), sums + r * KVC_BSR_PANEL, args->out.dtype, columns,
                       args->beta);
}

kvc_status kvc_bsr_matmul_cpu(const kvc_bsr_matmul_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_bsr_matmul_check(args));
    const int64_t blocks = args->values.shape[0], rows = args->out.shape[0], b = args->values.shape[1];
    product p = {.args = args,
                 .ops = kvc_bsr_best(),
                 .plan = kvc_bsr_view_of(args->plan.data, rows, blocks),
                 .block = b,
                 .rows = rows,
                 .depth = args->dense.shape[0],
                 .n = args->dense.shape[1]};
    p.panels = kvc_ceil_div(p.n, KVC_BSR_PANEL);
    const bool alone = (double)blocks * (double)(b * b) * (double)p.n < (double)ALONE;
    kvc_parallel(kvc_bsr_tiles(rows) * p.panels, alone ? 1 : 0, multiply_tile, &p);
    return KVC_OK;
}

/* ---- sddmm: a thread takes a stored block, and multiplies 32 rows by 32 rows of it at a time. */

#define SIDE 32
#define LENGTH 512

typedef struct {
    const kvc_bsr_sddmm_args *args;
    const kvc_bsr_ops *ops;
    const int32_t *coordinates;
    int64_t block, n;
} gradient;

/* Up to `count` rows from `row` on of a matrix, columns [first, first + length), zeros behind its end. */
static void load_rows(const gradient *g, float *out, const kvc_tensor *matrix, int64_t row, int64_t count,
                      int64_t first, int64_t length, int64_t padded) {
    for (int64_t r = 0; r < count; r++) {
        int64_t filled = 0;
        if (row + r < matrix->shape[0]) {
            g->ops->widen(out + r * padded, kvc_at2(matrix, row + r, first), matrix->dtype, length);
            filled = length;
        }
        memset(out + r * padded + filled, 0, (size_t)(padded - filled) * sizeof(float));
    }
}

static void multiply_rows(void *context, int64_t item) {
    const gradient *g = context;
    const kvc_bsr_sddmm_args *args = g->args;
    const int64_t b = g->block, side = least(b, SIDE);
    const int64_t row = g->coordinates[2 * item] * b, column = g->coordinates[2 * item + 1] * b;
    _Alignas(64) float left[SIDE * LENGTH], right[SIDE * LENGTH], sums[SIDE * KVC_BSR_ROWS];
    char *out = (char *)args->out.data + item * b * b * kvc_dtype_size(args->out.dtype);
    for (int64_t r = 0; r < b; r += side) {
        memset(sums, 0, sizeof sums);
        for (int64_t first = 0; first < g->n; first += LENGTH) {
            const int64_t length = least(g->n - first, LENGTH), padded = kvc_ceil_div(length, 16) * 16;
            load_rows(g, left, &args->left, row + r, side, first, length, padded);
            for (int64_t c = 0; c < b; c += side) {
                load_rows(g, right, &args->right, column + c, side, first, length, padded);
                g->ops->dots(sums + c, b, left, right, side, side, padded);
            }
        }
        g->ops->finish(out + r * b * kvc_dtype_size(args->out.dtype), sums, args->out.dtype, side * b, 0.0f);
    }
}

kvc_status kvc_bsr_sddmm_cpu(const kvc_bsr_sddmm_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_bsr_sddmm_check(args));
    const int64_t blocks = args->out.shape[0], b = args->out.shape[1], n = args->left.shape[1];
    const int64_t rows = args->transpose ? args->right.shape[0] : args->left.shape[0];
    gradient g = {.args = args,
                  .ops = kvc_bsr_best(),
                  .coordinates = kvc_bsr_view_of(args->plan.data, rows, blocks).coordinates,
                  .block = b,
                  .n = n};
    const bool alone = (double)blocks * (double)(b * b) * (double)n < (double)ALONE;
    kvc_parallel(blocks, alone ? 1 : 0, multiply_rows, &g);
    return KVC_OK;
}
