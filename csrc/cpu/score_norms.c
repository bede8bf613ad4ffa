/* score_norms.c: L2 norms of rows, on the CPU, a list at a time. */
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/core.h"
#include "kvcomp/score.h"

#define LANES 8 /* sums side by side, so that the order of additions does not depend on the compiler */

typedef struct {
    const kvc_norms_args *args;
    int64_t h, s, d;
    atomic_bool bad; /* a real row is not finite */
} job;

static int64_t first_of(const kvc_norms_args *args, int64_t b) {
    return kvc_given(&args->first) ? ((const int32_t *)args->first.data)[b] : 0;
}

static const void *row_at(const job *j, int64_t i, int64_t t) { return kvc_at(&j->args->rows, i / j->h, i % j->h, t); }

static void check_list(void *context, int64_t i) {
    job *j = context;
    for (int64_t t = first_of(j->args, i / j->h); t < j->s; t++)
        if (!kvc_row_finite(row_at(j, i, t), j->args->rows.dtype, j->d)) {
            atomic_store(&j->bad, true);
            return;
        }
}

/* The mean over the list's real rows. */
static void mean_of(const job *j, int64_t i, double *mean) {
    const int64_t first = first_of(j->args, i / j->h);
    float row[KVC_MAX_HEAD_DIM];
    for (int64_t t = first; t < j->s; t++) {
        kvc_load_row(row, row_at(j, i, t), j->args->rows.dtype, j->d);
        for (int64_t c = 0; c < j->d; c++) mean[c] += (double)row[c];
    }
    for (int64_t c = 0; c < j->d && first < j->s; c++) mean[c] /= (double)(j->s - first);
}

static float norm_of(const float *row, const double *mean, int64_t d) {
    double sum[LANES] = {0};
    for (int64_t c = 0; c < d; c += LANES)
        for (int k = 0; k < LANES; k++) {
            const double x = (double)row[c + k] - mean[c + k];
            sum[k] += x * x;
        }
    for (int k = 1; k < LANES; k++) sum[0] += sum[k];
    const double norm = sqrt(sum[0]);
    return norm > (double)FLT_MAX ? FLT_MAX : (float)norm;
}

static void norms_list(void *context, int64_t i) {
    const job *j = context;
    const int64_t first = first_of(j->args, i / j->h);
    float *out = (float *)j->args->out.data + i * j->s;
    float row[KVC_MAX_HEAD_DIM + LANES] = {0}; /* zeros behind d, up to a whole number of LANES */
    double mean[KVC_MAX_HEAD_DIM + LANES] = {0};
    if (j->args->centered) mean_of(j, i, mean);
    memset(out, 0, (size_t)first * sizeof *out);
    for (int64_t t = first; t < j->s; t++) {
        kvc_load_row(row, row_at(j, i, t), j->args->rows.dtype, j->d);
        out[t] = norm_of(row, mean, j->d);
    }
}

kvc_status kvc_norms_cpu(const kvc_norms_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_norms_check(args));
    const int64_t lists = args->rows.shape[0] * args->rows.shape[1];
    job j = {.args = args, .h = args->rows.shape[1], .s = args->rows.shape[2], .d = args->rows.shape[3]};
    kvc_parallel(lists, 0, check_list, &j);
    if (atomic_load(&j.bad)) /* which one: the same sentence whatever the threads did */
        for (int64_t i = 0; i < lists; i++) {
            atomic_store(&j.bad, false);
            check_list(&j, i);
            KVC_CHECK(!atomic_load(&j.bad), KVC_EINVAL,
                      "norms: rows: expected finite values, got NaN or infinity in sequence %lld",
                      (long long)(i / j.h));
        }
    kvc_parallel(lists, 0, norms_list, &j);
    return KVC_OK;
}
