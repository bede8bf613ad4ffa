/* attend_check.c: what attend refuses without a look at tensors' data, the same for CPU and CUDA. */
#include <math.h>

#include "core/core.h"
#include "kvcomp/attend.h"
#include "kvcomp/pack.h"

kvc_status kvc_attend_check(const kvc_attend_args *args) {
    KVC_TRY(kvc_expect_layout("attend", &args->layout));
    KVC_TRY(kvc_expect_shape("attend", "queries", &args->queries, 4, (int64_t[]){-1, -1, -1, args->layout.head_dim}));
    KVC_TRY(kvc_expect_float("attend", "queries", &args->queries));
    KVC_TRY(kvc_expect_rows("attend", "queries", &args->queries));
    KVC_TRY(kvc_expect_shape("attend", "out", &args->out, 4, args->queries.shape));
    KVC_TRY(kvc_expect_float("attend", "out", &args->out));
    KVC_TRY(kvc_expect_rows("attend", "out", &args->out));
    const int64_t b = args->queries.shape[0], hq = args->queries.shape[1];
    KVC_TRY(kvc_expect_arena("attend", &args->arena));
    KVC_TRY(kvc_expect_array("attend", "table", &args->table, KVC_UINT64, 2, (int64_t[]){-1, -1}));
    const int64_t n = args->table.shape[0], h = b > 0 ? n / b : 0;
    KVC_TRY(kvc_expect_array("attend", "lists", &args->lists, KVC_INT32, 2, (int64_t[]){n, 4}));
    if (kvc_given(&args->new_tokens))
        KVC_TRY(kvc_expect_array("attend", "new_tokens", &args->new_tokens, KVC_INT32, 1, (int64_t[]){b}));
    KVC_CHECK(
        b == 0 ? n == 0 : n == b * h && (h == 0 ? hq == 0 : hq % h == 0), KVC_ESHAPE,
        "attend: queries: expected the %lld lists to divide (b, hq, q, d) with hq a multiple of the KV heads, got %s",
        (long long)n, kvc_shape_text(&args->queries));
    if (kvc_given(&args->mass))
        KVC_TRY(kvc_expect_array("attend", "mass", &args->mass, KVC_FLOAT32, 2, (int64_t[]){n, -1}));
    if (kvc_given(&args->division)) {
        KVC_TRY(kvc_expect_array("attend", "division", &args->division, KVC_INT32, 1, (int64_t[]){-1}));
        KVC_CHECK(args->queries.device != KVC_CPU, KVC_EINVAL,
                  "attend: division: expected none on the CPU, got shape %s", kvc_shape_text(&args->division));
    }
    KVC_CHECK(args->early == 0 || (args->early == 1 && args->queries.device != KVC_CPU), KVC_EINVAL,
              "attend: early: expected 0, or 1 on CUDA, got %d", args->early);
    KVC_CHECK(args->rotation == KVC_ROTATE_NONE || args->rotation == KVC_ROTATE_HADAMARD, KVC_EINVAL,
              "attend: rotation: expected 0 (none) or 1 (hadamard), got %d", args->rotation);
    KVC_CHECK(args->scale > 0.0f && isfinite(args->scale), KVC_EINVAL,
              "attend: scale: expected a positive number, got %g", (double)args->scale);
    KVC_CHECK(args->softcap >= 0.0f && isfinite(args->softcap), KVC_EINVAL,
              "attend: softcap: expected 0 or a positive number, got %g", (double)args->softcap);
    return KVC_OK;
}
