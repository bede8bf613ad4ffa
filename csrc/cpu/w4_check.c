/* w4_check.c: what w4 refuses without a look at tensors' data, and sizes: the same for CPU and CUDA. */
#include "core/core.h"
#include "kvcomp/w4.h"

kvc_status kvc_w4_shape_check(const char *op, const kvc_w4_shape *shape) {
    KVC_CHECK(shape->group == 32 || shape->group == 64 || shape->group == 128, KVC_EINVAL,
              "%s: group: expected 32, 64 or 128, got %d", op, shape->group);
    KVC_CHECK(shape->scale_bits >= -1 && shape->scale_bits <= KVC_W4_MOST_SCALE_BITS, KVC_EINVAL,
              "%s: scale_bits: expected -1 (fp16) or 0..%d, got %d", op, KVC_W4_MOST_SCALE_BITS, shape->scale_bits);
    KVC_CHECK(shape->exponent == KVC_W4_AUTO ||
                  (shape->exponent >= -KVC_W4_MOST_EXPONENT && shape->exponent <= KVC_W4_MOST_EXPONENT),
              KVC_EINVAL, "%s: exponent: expected -%d..%d, got %d", op, KVC_W4_MOST_EXPONENT, KVC_W4_MOST_EXPONENT,
              shape->exponent);
    KVC_CHECK(shape->n >= 0 && shape->k >= 0 &&
                  kvc_w4_bytes(shape->n, shape->k, shape->group, shape->scale_bits) < INT64_MAX,
              KVC_ESHAPE, "%s: weights: expected a matrix that memory can hold, got (%lld, %lld)", op,
              (long long)shape->n, (long long)shape->k);
    return KVC_OK;
}

int64_t kvc_w4_bytes(int64_t n, int64_t k, int32_t group, int32_t scale_bits) {
    const int64_t strips = kvc_w4_strips(n), blocks = kvc_w4_blocks(k, group, scale_bits);
    const int64_t bytes = kvc_w4_block_bytes(group, scale_bits);
    int64_t strip, all;
    if (__builtin_mul_overflow(blocks, bytes, &strip) || __builtin_mul_overflow(strip, strips, &all)) return INT64_MAX;
    return all;
}

static kvc_status check_packed(const char *op, const kvc_tensor *packed, const kvc_w4_shape *shape) {
    const int64_t bytes = kvc_w4_bytes(shape->n, shape->k, shape->group, shape->scale_bits);
    KVC_TRY(kvc_expect_array(op, "packed", packed, KVC_UINT8, 1, &bytes));
    KVC_CHECK(((uintptr_t)packed->data & 15) == 0, KVC_EINVAL, "%s: packed: expected 16-byte alignment, got address %p",
              op, packed->data);
    return KVC_OK;
}

kvc_status kvc_w4_pack_check(const kvc_w4_pack_args *args) {
    const kvc_w4_shape *shape = &args->shape;
    KVC_TRY(kvc_w4_shape_check("w4_pack", shape));
    KVC_TRY(kvc_expect_float("w4_pack", "weights", &args->weights));
    KVC_TRY(kvc_expect_shape("w4_pack", "weights", &args->weights, 2, (int64_t[]){shape->n, shape->k}));
    KVC_TRY(kvc_expect_rows("w4_pack", "weights", &args->weights));
    KVC_CHECK(args->rounding >= KVC_W4_FLOOR && args->rounding <= KVC_W4_SEARCH, KVC_EINVAL,
              "w4_pack: rounding: expected 0 (floor), 1 (nearest) or 2 (search), got %d", args->rounding);
    return check_packed("w4_pack", &args->packed, shape);
}

kvc_status kvc_w4_unpack_check(const kvc_w4_unpack_args *args) {
    const kvc_w4_shape *shape = &args->shape;
    const int64_t n = shape->n, k = shape->k;
    KVC_TRY(kvc_w4_shape_check("w4_unpack", shape));
    KVC_CHECK(shape->exponent != KVC_W4_AUTO, KVC_EINVAL, "w4_unpack: exponent: expected the one of w4_pack, got none");
    if (kvc_given(&args->out)) {
        KVC_TRY(kvc_expect_float("w4_unpack", "out", &args->out));
        KVC_TRY(kvc_expect_shape("w4_unpack", "out", &args->out, 2, (int64_t[]){n, k}));
        KVC_TRY(kvc_expect_rows("w4_unpack", "out", &args->out));
    }
    if (kvc_given(&args->codes))
        KVC_TRY(kvc_expect_array("w4_unpack", "codes", &args->codes, KVC_UINT8, 2, (int64_t[]){n, k}));
    if (kvc_given(&args->scales))
        KVC_TRY(kvc_expect_array("w4_unpack", "scales", &args->scales, KVC_FLOAT32, 2,
                                 (int64_t[]){n, kvc_ceil_div(k, shape->group)}));
    return check_packed("w4_unpack", &args->packed, shape);
}

static kvc_status check_parts(const kvc_w4_matmul_args *args) {
    const int count = args->part_count;
    int64_t rows = 0;
    KVC_CHECK(count >= 0 && count <= KVC_W4_MOST_PARTS, KVC_EINVAL, "w4_matmul: rows: expected 1 to %d parts, got %d",
              KVC_W4_MOST_PARTS, count);
    for (int i = 0; i < count; i++) {
        const kvc_w4_part *part = args->parts + i;
        KVC_CHECK(part->n > 0, KVC_ESHAPE, "w4_matmul: rows: expected one or more in every part, got %lld in part %d",
                  (long long)part->n, i);
        KVC_CHECK(part->n % KVC_W4_ROWS == 0 || i == count - 1, KVC_ESHAPE,
                  "w4_matmul: rows: expected a multiple of %d before the last part, got %lld", KVC_W4_ROWS,
                  (long long)part->n);
        KVC_CHECK(part->exponent >= -KVC_W4_MOST_EXPONENT && part->exponent <= KVC_W4_MOST_EXPONENT, KVC_EINVAL,
                  "w4_matmul: exponent: expected -%d..%d, got %d", KVC_W4_MOST_EXPONENT, KVC_W4_MOST_EXPONENT,
                  part->exponent);
        if (__builtin_add_overflow(rows, part->n, &rows)) rows = INT64_MAX;
    }
    KVC_CHECK(count == 0 || rows == args->shape.n, KVC_ESHAPE,
              "w4_matmul: rows: expected parts of %lld in all, got %lld", (long long)args->shape.n, (long long)rows);
    return KVC_OK;
}

kvc_status kvc_w4_matmul_check(const kvc_w4_matmul_args *args) {
    const kvc_w4_shape *shape = &args->shape;
    const int64_t m = args->x.ndim == 2 ? args->x.shape[0] : -1, n = shape->n;
    KVC_TRY(kvc_w4_shape_check("w4_matmul", shape));
    KVC_CHECK(shape->exponent != KVC_W4_AUTO, KVC_EINVAL, "w4_matmul: exponent: expected the one of w4_pack, got none");
    KVC_TRY(kvc_expect_float("w4_matmul", "x", &args->x));
    KVC_TRY(kvc_expect_shape("w4_matmul", "x", &args->x, 2, (int64_t[]){-1, shape->k}));
    KVC_TRY(kvc_expect_rows("w4_matmul", "x", &args->x));
    KVC_TRY(kvc_expect_float("w4_matmul", "out", &args->out));
    KVC_TRY(kvc_expect_shape("w4_matmul", "out", &args->out, 2, (int64_t[]){m, n}));
    KVC_TRY(kvc_expect_rows("w4_matmul", "out", &args->out));
    if (kvc_given(&args->bias)) {
        KVC_TRY(kvc_expect_float("w4_matmul", "bias", &args->bias));
        KVC_TRY(kvc_expect_shape("w4_matmul", "bias", &args->bias, 1, (int64_t[]){n}));
        KVC_TRY(kvc_expect_contiguous("w4_matmul", "bias", &args->bias));
    }
    KVC_TRY(check_parts(args));
    KVC_CHECK(args->early == 0 || (args->early == 1 && args->x.device != KVC_CPU), KVC_EINVAL,
              "w4_matmul: early: expected 0, or 1 on CUDA, got %d", args->early);
    return check_packed("w4_matmul", &args->packed, shape);
}
