/* bsr_check.c: what bsr_matmul and bsr_sddmm refuse: the same for CPU and CUDA. A plan is read on the CPU alone: a
 * device would have to be waited for, so there the kernels compare its head. */
#include "cpu/bsr_check.h"

static kvc_status check_plan(const char *op, const kvc_tensor *plan, const kvc_bsr_head *want) {
    KVC_TRY(kvc_expect_array(op, "plan", plan, KVC_INT32, 1, (int64_t[]){-1}));
    const int64_t rows = want->transpose ? want->k : want->m, words = plan->shape[0];
    const int64_t least = kvc_bsr_steps(rows, want->blocks);
    KVC_CHECK(words >= least, KVC_ESHAPE, "%s: plan: expected at least %lld words, got %lld", op, (long long)least,
              (long long)words);
    KVC_CHECK(((uintptr_t)plan->data & 15) == 0, KVC_EINVAL, "%s: plan: expected 16-byte alignment, got address %p", op,
              plan->data);
    if (plan->device != KVC_CPU) return KVC_OK;
    const int32_t *at = plan->data;
    const kvc_bsr_head *head = plan->data;
    KVC_CHECK(head->magic == KVC_BSR_MAGIC, KVC_EINVAL, "%s: plan: expected one that bsr_plan made, got other numbers",
              op);
    KVC_CHECK(head->block == want->block && head->transpose == want->transpose && head->m == want->m &&
                  head->k == want->k && head->blocks == want->blocks && head->tiles == want->tiles,
              KVC_EINVAL,
              "%s: plan: expected one of a (%d, %d) matrix of %d blocks of %d, transpose %d, got one of (%d, %d), "
              "%d blocks of %d, transpose %d",
              op, want->m, want->k, want->blocks, want->block, want->transpose, head->m, head->k, head->blocks,
              head->block, head->transpose);
    const int64_t step_words = kvc_bsr_step_words(want->block), columns = want->transpose ? want->m : want->k;
    const int64_t column_blocks = kvc_ceil_div(columns, want->block);
    KVC_CHECK(head->steps >= 0 && least + head->steps * step_words <= words, KVC_ESHAPE,
              "%s: plan: expected %lld words for its %d steps, got %lld", op,
              (long long)(least + head->steps * step_words), head->steps, (long long)words);
    const kvc_bsr_tile *tile = (const kvc_bsr_tile *)(at + KVC_BSR_HEAD);
    for (int64_t i = 0; i < head->tiles; i++)
        KVC_CHECK(tile[i].row >= 0 && tile[i].row < head->tiles && tile[i].first >= 0 && tile[i].steps >= 0 &&
                      tile[i].steps <= head->steps - tile[i].first,
                  KVC_EINVAL, "%s: plan: expected one that bsr_plan made, got a tile at row %d with steps %d to %lld",
                  op, tile[i].row, tile[i].first, (long long)tile[i].first + tile[i].steps);
    const int32_t *coordinate = at + kvc_bsr_coordinates(rows);
    const int64_t limit[2] = {kvc_ceil_div(want->m, want->block), kvc_ceil_div(want->k, want->block)};
    for (int64_t i = 0; i < 2 * (int64_t)want->blocks; i++)
        KVC_CHECK(coordinate[i] >= 0 && coordinate[i] < limit[i & 1], KVC_EINVAL,
                  "%s: plan: expected one that bsr_plan made, got block %lld at row or column %d", op,
                  (long long)(i / 2), coordinate[i]);
    const int32_t *step = at + least;
    for (int64_t i = 0; i < head->steps; i++, step += step_words) {
        bool ok = step[0] >= 0 && step[0] < column_blocks;
        for (int64_t s = 1; s < step_words; s++) ok &= step[s] >= -1 && step[s] < want->blocks;
        KVC_CHECK(ok, KVC_EINVAL, "%s: plan: expected one that bsr_plan made, got step %lld beyond the matrix", op,
                  (long long)i);
    }
    return KVC_OK;
}

/* Blocks (nnzb,block,block) of values or of their gradient, and the head of their plan. */
static kvc_status check_blocks(const char *op, const char *name, const kvc_tensor *values, int64_t m, int64_t k,
                               int32_t transpose, kvc_bsr_head *head) {
    KVC_TRY(kvc_expect_float(op, name, values));
    KVC_TRY(kvc_expect_shape(op, name, values, 3, (int64_t[]){-1, -1, -1}));
    const int64_t blocks = values->shape[0], block = values->shape[1];
    KVC_CHECK(kvc_bsr_block_ok(block) && values->shape[2] == block, KVC_ESHAPE,
              "%s: %s: expected square blocks of 16, 32, 64 or 128, got shape %s", op, name, kvc_shape_text(values));
    KVC_TRY(kvc_expect_contiguous(op, name, values));
    KVC_CHECK(m >= 0 && m <= INT32_MAX, KVC_EINVAL, "%s: m: expected 0..2^31 - 1, got %lld", op, (long long)m);
    KVC_CHECK(k >= 0 && k <= INT32_MAX, KVC_EINVAL, "%s: k: expected 0..2^31 - 1, got %lld", op, (long long)k);
    KVC_CHECK(transpose == 0 || transpose == 1, KVC_EINVAL, "%s: transpose: expected 0 or 1, got %d", op, transpose);
    KVC_CHECK(blocks <= INT32_MAX, KVC_ESHAPE, "%s: %s: expected at most 2^31 - 1 blocks, got %lld", op, name,
              (long long)blocks);
    *head = (kvc_bsr_head){.magic = KVC_BSR_MAGIC,
                           .block = (int32_t)block,
                           .transpose = transpose,
                           .tiles = (int32_t)kvc_bsr_tiles(transpose ? k : m),
                           .m = (int32_t)m,
                           .k = (int32_t)k,
                           .blocks = (int32_t)blocks};
    return KVC_OK;
}

static kvc_status check_dense(const char *op, const char *name, const kvc_tensor *dense, int64_t rows, int64_t n,
                              int dtype) {
    KVC_TRY(kvc_expect_shape(op, name, dense, 2, (int64_t[]){rows, n}));
    KVC_TRY(kvc_expect_rows(op, name, dense));
    if (dtype < 0) return kvc_expect_float(op, name, dense);
    return kvc_expect_dtype(op, name, dense, dtype);
}

static kvc_status check_cuda(const char *op, const char *name, const kvc_tensor *values) {
    KVC_CHECK(values->device == KVC_CPU || values->dtype != KVC_FLOAT32, KVC_ENOTSUP,
              "%s: %s: expected float16 or bfloat16 on CUDA, got float32", op, name);
    return KVC_OK;
}

kvc_status kvc_bsr_matmul_check(const kvc_bsr_matmul_args *args) {
    const char *op = "bsr_matmul";
    kvc_bsr_head head;
    KVC_TRY(check_blocks(op, "values", &args->values, args->m, args->k, args->transpose, &head));
    KVC_TRY(check_cuda(op, "values", &args->values));
    KVC_TRY(check_dense(op, "dense", &args->dense, args->transpose ? args->m : args->k, -1, args->values.dtype));
    const int64_t n = args->dense.shape[1];
    KVC_CHECK(n <= INT32_MAX, KVC_ESHAPE, "%s: dense: expected at most 2^31 - 1 columns, got %lld", op, (long long)n);
    KVC_TRY(check_dense(op, "out", &args->out, args->transpose ? args->k : args->m, n, -1));
    KVC_CHECK(args->beta - args->beta == 0.0f, KVC_EINVAL, "%s: beta: expected a finite number, got %g", op,
              (double)args->beta);
    if (args->out.device != KVC_CPU || kvc_given(&args->workspace))
        KVC_TRY(kvc_expect_workspace(op, &args->workspace, KVC_BSR_WORKSPACE));
    return check_plan(op, &args->plan, &head);
}

kvc_status kvc_bsr_sddmm_check(const kvc_bsr_sddmm_args *args) {
    const char *op = "bsr_sddmm";
    KVC_TRY(kvc_expect_float(op, "left", &args->left));
    KVC_TRY(check_cuda(op, "left", &args->left));
    KVC_TRY(check_dense(op, "left", &args->left, -1, -1, args->left.dtype));
    KVC_TRY(check_dense(op, "right", &args->right, -1, args->left.shape[1], args->left.dtype));
    kvc_bsr_head head;
    KVC_TRY(check_blocks(op, "out", &args->out, args->left.shape[0], args->right.shape[0], args->transpose, &head));
    return check_plan(op, &args->plan, &head);
}
