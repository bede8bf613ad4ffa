/* plan_tables.c: checks of the tables that plan and shrink take. */
#include "plan_tables.h"

#include <math.h>

static kvc_status check_table(const char *op, const char *name, const kvc_tensor *tensor, int ndim,
                              const int64_t *shape) {
    KVC_TRY(kvc_expect_array(op, name, tensor, KVC_FLOAT32, ndim, shape));
    const float *values = tensor->data;
    const int64_t columns = ndim == 2 ? shape[1] : 1;
    for (int64_t i = 0; i < kvc_elements(tensor); i++)
        KVC_CHECK(values[i] >= 0.0f && isfinite(values[i]), KVC_EINVAL,
                  "%s: %s: expected finite values >= 0, got %g for list %lld", op, name, (double)values[i],
                  (long long)(i / columns));
    return KVC_OK;
}

kvc_status kvc_plan_check_tables(const char *op, int64_t n, const kvc_tensor *distortion_k,
                                 const kvc_tensor *distortion_v, const kvc_tensor *drop, const kvc_tensor *allowed,
                                 int *classes) {
    const int64_t table[] = {n, KVC_PLAN_LEVELS}, square[] = {KVC_PLAN_LEVELS, KVC_PLAN_LEVELS};
    KVC_TRY(check_table(op, "distortion_k", distortion_k, 2, table));
    KVC_TRY(check_table(op, "distortion_v", distortion_v, 2, table));
    KVC_TRY(check_table(op, "drop", drop, 1, table));
    KVC_TRY(kvc_expect_array(op, "allowed", allowed, KVC_UINT8, 2, square));
    *classes = 0;
    for (int i = 0; i < KVC_PLAN_CLASSES; i++) {
        const int value = ((const uint8_t *)allowed->data)[i];
        KVC_CHECK(value <= 1, KVC_EINVAL, "%s: allowed: expected 0 or 1, got %d", op, value);
        *classes += value;
    }
    KVC_CHECK(*classes >= 1, KVC_EINVAL, "%s: allowed: expected at least one class, got none", op);
    return KVC_OK;
}

kvc_status kvc_plan_check_bytes(const char *op, const char *name, int64_t bytes) {
    KVC_CHECK(bytes >= 0 && bytes <= KVC_PLAN_MOST_TABLE_BYTES, KVC_EINVAL, "%s: %s: expected 0..%d, got %lld", op,
              name, KVC_PLAN_MOST_TABLE_BYTES, (long long)bytes);
    return KVC_OK;
}
