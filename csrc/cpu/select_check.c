/* select_check.c: what select refuses, and its workspace: the same for CPU and CUDA. What only the data can tell is
 * looked at on the CPU alone: a device would have to be waited for. */
#include <math.h>

#include "cpu/select_list.h"

kvc_status kvc_select_check_list(const char *op, const float *importance, int64_t s, int64_t first, int64_t i) {
    KVC_CHECK(first >= 0 && first <= s, KVC_EINVAL, "%s: first: expected 0..%lld, got %lld for list %lld", op,
              (long long)s, (long long)first, (long long)i);
    for (int64_t t = first; importance && t < s; t++)
        KVC_CHECK(importance[t] >= 0.0f && isfinite(importance[t]), KVC_EINVAL,
                  "%s: importance: expected finite values >= 0, got %g at list %lld, token %lld", op,
                  (double)importance[t], (long long)i, (long long)t);
    return KVC_OK;
}

kvc_status kvc_select_check(const kvc_select_args *args) {
    KVC_TRY(kvc_expect_array("select", "kept", &args->kept, KVC_UINT8, 2, (int64_t[]){-1, -1}));
    const int64_t n = args->kept.shape[0], s = args->kept.shape[1];
    KVC_CHECK(s <= INT32_MAX, KVC_ESHAPE, "select: kept: expected at most 2^31 - 1 tokens, got %lld", (long long)s);
    if (kvc_given(&args->importance))
        KVC_TRY(kvc_expect_array("select", "importance", &args->importance, KVC_FLOAT32, 2, args->kept.shape));
    KVC_TRY(kvc_expect_array("select", "keep", &args->keep, KVC_INT32, 1, &n));
    if (kvc_given(&args->first)) KVC_TRY(kvc_expect_array("select", "first", &args->first, KVC_INT32, 1, &n));
    KVC_CHECK(args->sinks >= 0, KVC_EINVAL, "select: sinks: expected a count >= 0, got %d", args->sinks);
    KVC_CHECK(args->window >= 0, KVC_EINVAL, "select: window: expected a count >= 0, got %d", args->window);
    KVC_TRY(kvc_expect_workspace("select", &args->workspace, kvc_select_workspace(n, s)));
    if (args->kept.device != KVC_CPU) return KVC_OK;
    for (int64_t i = 0; i < n; i++) {
        const int32_t keep = ((const int32_t *)args->keep.data)[i];
        const float *importance = kvc_given(&args->importance) ? (const float *)args->importance.data + i * s : NULL;
        const int64_t first = kvc_given(&args->first) ? ((const int32_t *)args->first.data)[i] : 0;
        KVC_CHECK(keep >= 0, KVC_EINVAL, "select: keep: expected counts >= 0, got %d for list %lld", keep,
                  (long long)i);
        KVC_TRY(kvc_select_check_list("select", importance, s, first, i));
    }
    return KVC_OK;
}

int64_t kvc_select_workspace(int64_t n, int64_t s) {
    (void)n;
    (void)s;
    return 0; /* thresholds are found by counting, on the stack or in shared memory */
}
