/* bsr_plan.c: the structure of a block-sparse matrix: looked at, turned into a plan, joined to larger blocks. */
#include <stdlib.h>
#include <string.h>

#include "cpu/bsr_check.h"

/* ---- structure */

static inline int64_t at(const kvc_tensor *tensor, int64_t i) {
    i *= tensor->strides[0];
    return tensor->dtype == KVC_INT32 ? ((const int32_t *)tensor->data)[i] : ((const int64_t *)tensor->data)[i];
}

static kvc_status check_integers(const char *op, const char *name, const kvc_tensor *tensor) {
    KVC_CHECK(tensor->dtype == KVC_INT32 || tensor->dtype == KVC_INT64, KVC_EDTYPE,
              "%s: %s: expected int32 or int64, got %s", op, name, kvc_dtype_name(tensor->dtype));
    return kvc_expect_shape(op, name, tensor, 1, (int64_t[]){-1});
}

static kvc_status check(const char *op, const kvc_bsr_structure *a) {
    KVC_TRY(check_integers(op, "indptr", &a->indptr));
    KVC_TRY(check_integers(op, "indices", &a->indices));
    KVC_CHECK(kvc_bsr_block_ok(a->block), KVC_EINVAL, "%s: block: expected 16, 32, 64 or 128, got %d", op, a->block);
    KVC_CHECK(a->m >= 0 && a->m <= INT32_MAX, KVC_EINVAL, "%s: m: expected 0..2^31 - 1, got %lld", op, (long long)a->m);
    KVC_CHECK(a->k >= 0 && a->k <= INT32_MAX, KVC_EINVAL, "%s: k: expected 0..2^31 - 1, got %lld", op, (long long)a->k);
    const int64_t rows = kvc_ceil_div(a->m, a->block), columns = kvc_ceil_div(a->k, a->block);
    KVC_TRY(kvc_expect_shape(op, "indptr", &a->indptr, 1, (int64_t[]){rows + 1}));
    const int64_t blocks = a->indices.shape[0];
    KVC_CHECK(blocks <= INT32_MAX, KVC_ESHAPE, "%s: indices: expected at most 2^31 - 1 blocks, got %lld", op,
              (long long)blocks);
    KVC_CHECK(at(&a->indptr, 0) == 0, KVC_EINVAL, "%s: indptr: expected to begin with 0, got %lld", op,
              (long long)at(&a->indptr, 0));
    KVC_CHECK(at(&a->indptr, rows) == blocks, KVC_EINVAL,
              "%s: indptr: expected to end with the %lld blocks of indices, got %lld", op, (long long)blocks,
              (long long)at(&a->indptr, rows));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = at(&a->indptr, r), end = at(&a->indptr, r + 1);
        KVC_CHECK(first <= end && end <= blocks, KVC_EINVAL,
                  "%s: indptr: expected numbers that do not fall, up to %lld, got %lld after %lld at block row %lld",
                  op, (long long)blocks, (long long)end, (long long)first, (long long)r);
        int64_t before = -1;
        for (int64_t i = first; i < end; i++) {
            const int64_t column = at(&a->indices, i);
            KVC_CHECK(column >= 0 && column < columns, KVC_EINVAL,
                      "%s: indices: expected block columns in 0..%lld, got %lld in block row %lld", op,
                      (long long)columns - 1, (long long)column, (long long)r);
            KVC_CHECK(column > before, KVC_EINVAL,
                      "%s: indices: expected ascending block columns, each once, got %lld after %lld in block row %lld",
                      op, (long long)column, (long long)before, (long long)r);
            before = column;
        }
    }
    return KVC_OK;
}

kvc_status kvc_bsr_check(const kvc_bsr_structure *a) { return check("bsr_check", a); }

/* ---- plan */

int64_t kvc_bsr_plan_words(int64_t m, int64_t k, int64_t block, int64_t blocks, int transpose) {
    return kvc_bsr_steps(transpose ? k : m, blocks) + blocks * kvc_bsr_step_words(block);
}

static int more_steps_first(const void *left, const void *right) {
    const kvc_bsr_tile *a = left, *b = right;
    if (a->steps != b->steps) return a->steps < b->steps ? 1 : -1;
    return a->row < b->row ? -1 : 1;
}

/* Blocks of op(A) by row, ascending columns: where each row begins, and of each block its number and column. Held in
 * the place of the steps, which come out of them: `lists` has 2 words a block, a step no fewer than 2 words. */
typedef struct {
    int64_t rows;
    int32_t *begin; /* rows + 1 */
    int32_t *lists; /* (block, column) */
} sorted;

static void sort_blocks(const kvc_bsr_structure *a, const int32_t *coordinates, int transpose, sorted *s) {
    const int64_t blocks = a->indices.shape[0];
    memset(s->begin, 0, (size_t)(s->rows + 1) * sizeof *s->begin);
    for (int64_t i = 0; i < blocks; i++) s->begin[coordinates[2 * i + transpose] + 1]++;
    for (int64_t r = 0; r < s->rows; r++) s->begin[r + 1] += s->begin[r];
    /* Blocks come row by row, so columns of a row, and rows of a column, ascend by themselves. */
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t to = s->begin[coordinates[2 * i + transpose]]++;
        s->lists[2 * to] = (int32_t)i;
        s->lists[2 * to + 1] = coordinates[2 * i + 1 - transpose];
    }
    memmove(s->begin + 1, s->begin, (size_t)s->rows * sizeof *s->begin);
    s->begin[0] = 0;
}

kvc_status kvc_bsr_plan(const kvc_bsr_plan_args *args) {
    const kvc_bsr_structure *a = &args->a;
    KVC_TRY(check("bsr_plan", a));
    KVC_CHECK(args->transpose == 0 || args->transpose == 1, KVC_EINVAL, "bsr_plan: transpose: expected 0 or 1, got %d",
              args->transpose);
    KVC_TRY(kvc_expect_array("bsr_plan", "plan", &args->plan, KVC_INT32, 1, (int64_t[]){-1}));
    const int64_t blocks = a->indices.shape[0], rows = args->transpose ? a->k : a->m, block = a->block;
    const int64_t words = kvc_bsr_plan_words(a->m, a->k, block, blocks, args->transpose);
    KVC_CHECK(args->plan.shape[0] >= words, KVC_ESHAPE, "bsr_plan: plan: expected at least %lld words, got %lld",
              (long long)words, (long long)args->plan.shape[0]);
    const int64_t block_rows = kvc_ceil_div(rows, block), per_tile = KVC_BSR_ROWS / block;
    const int64_t tiles = kvc_bsr_tiles(rows), step_words = 1 + per_tile;
    sorted s = {.rows = block_rows, .begin = malloc(((size_t)block_rows + 1) * 4 + 8 * (size_t)blocks + 8)};
    KVC_CHECK(s.begin, KVC_ENOMEM, "bsr_plan: expected memory for %lld block rows and %lld blocks",
              (long long)block_rows, (long long)blocks);
    s.lists = s.begin + block_rows + 1;

    int32_t *plan = args->plan.data;
    int32_t *coordinates = plan + kvc_bsr_coordinates(rows), *step = plan + kvc_bsr_steps(rows, blocks);
    const int64_t stored_rows = kvc_ceil_div(a->m, block);
    for (int64_t r = 0; r < stored_rows; r++)
        for (int64_t i = at(&a->indptr, r); i < at(&a->indptr, r + 1); i++) {
            coordinates[2 * i] = (int32_t)r;
            coordinates[2 * i + 1] = (int32_t)at(&a->indices, i);
        }
    sort_blocks(a, coordinates, args->transpose, &s);

    kvc_bsr_tile *tile = (kvc_bsr_tile *)(plan + KVC_BSR_HEAD);
    int64_t steps = 0;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t next[KVC_BSR_ROWS / 16], end[KVC_BSR_ROWS / 16];
        for (int64_t i = 0; i < per_tile; i++) {
            const int64_t row = t * per_tile + i;
            next[i] = row < block_rows ? s.begin[row] : 0;
            end[i] = row < block_rows ? s.begin[row + 1] : 0;
        }
        tile[t] = (kvc_bsr_tile){.row = (int32_t)t, .first = (int32_t)steps};
        for (;;) {
            int32_t column = INT32_MAX;
            for (int64_t i = 0; i < per_tile; i++)
                if (next[i] < end[i] && s.lists[2 * next[i] + 1] < column) column = s.lists[2 * next[i] + 1];
            if (column == INT32_MAX) break;
            step[0] = column;
            for (int64_t i = 0; i < per_tile; i++) {
                const bool here = next[i] < end[i] && s.lists[2 * next[i] + 1] == column;
                step[1 + i] = here ? s.lists[2 * next[i]] : -1;
                next[i] += here;
            }
            step += step_words;
            steps++;
        }
        tile[t].steps = (int32_t)(steps - tile[t].first);
    }
    free(s.begin);
    qsort(tile, (size_t)tiles, sizeof *tile, more_steps_first);
    int64_t long_tiles = 0;
    while (long_tiles < tiles && tile[long_tiles].steps * tiles > 2 * steps) long_tiles++;
    *(kvc_bsr_head *)plan = (kvc_bsr_head){.magic = KVC_BSR_MAGIC,
                                           .block = a->block,
                                           .transpose = args->transpose,
                                           .tiles = (int32_t)tiles,
                                           .m = (int32_t)a->m,
                                           .k = (int32_t)a->k,
                                           .blocks = (int32_t)blocks,
                                           .steps = (int32_t)steps,
                                           .long_tiles = (int32_t)long_tiles};
    *args->used = step - plan;
    return KVC_OK;
}

/* ---- merge */

kvc_status kvc_bsr_merge(const kvc_bsr_merge_args *args) {
    const kvc_bsr_structure *a = &args->a;
    KVC_TRY(check("bsr_merge", a));
    const int64_t factor = args->factor, blocks = a->indices.shape[0];
    KVC_CHECK((factor == 2 || factor == 4 || factor == 8) && factor * a->block <= KVC_BSR_ROWS, KVC_EINVAL,
              "bsr_merge: factor: expected 2, 4 or 8 and blocks of at most %d, got %d for blocks of %d", KVC_BSR_ROWS,
              args->factor, a->block);
    const int64_t rows = kvc_ceil_div(a->m, a->block), larger = kvc_ceil_div(a->m, factor * a->block);
    KVC_TRY(kvc_expect_array("bsr_merge", "indptr_out", &args->indptr, KVC_INT64, 1, (int64_t[]){larger + 1}));
    KVC_TRY(kvc_expect_array("bsr_merge", "indices_out", &args->indices, KVC_INT64, 1, (int64_t[]){blocks}));
    KVC_TRY(kvc_expect_array("bsr_merge", "place", &args->place, KVC_INT64, 1, (int64_t[]){blocks}));
    int64_t *indptr = args->indptr.data, *indices = args->indices.data, *place = args->place.data, count = 0;
    indptr[0] = 0;
    for (int64_t big = 0; big < larger; big++) {
        int64_t next[8], end[8];
        for (int64_t i = 0; i < factor; i++) {
            const int64_t row = big * factor + i;
            next[i] = row < rows ? at(&a->indptr, row) : 0;
            end[i] = row < rows ? at(&a->indptr, row + 1) : 0;
        }
        for (;;) {
            int64_t column = INT64_MAX;
            for (int64_t i = 0; i < factor; i++)
                if (next[i] < end[i] && at(&a->indices, next[i]) / factor < column)
                    column = at(&a->indices, next[i]) / factor;
            if (column == INT64_MAX) break;
            for (int64_t i = 0; i < factor; i++)
                for (; next[i] < end[i] && at(&a->indices, next[i]) / factor == column; next[i]++)
                    place[next[i]] = (count * factor + i) * factor + at(&a->indices, next[i]) % factor;
            indices[count++] = column;
        }
        indptr[big + 1] = count;
    }
    *args->blocks = count;
    return KVC_OK;
}
