/* select_ada.c: tokens shared by the heads of a sequence. Every list is a work item; between rounds each sequence finds
 * one more digit of its threshold from its lists' histograms. */
#include "cpu/select_list.h"

typedef struct {
    const kvc_ada_args *args;
    int64_t s;
    kvc_top *tops;        /* [b]: equal = 0 where there is nothing to share */
    int64_t *equals;      /* [n]: tokens to be marked at the threshold */
    uint32_t *histograms; /* [n][KVC_DIGITS] */
} job;

static int64_t first_of(const kvc_ada_args *args, int64_t i) {
    return kvc_given(&args->first) ? ((const int32_t *)args->first.data)[i] : 0;
}

static uint8_t *kept_at(const job *j, int64_t i) { return (uint8_t *)j->args->kept.data + i * j->s; }
static const float *importance_at(const job *j, int64_t i) {
    return (const float *)j->args->importance.data + i * j->s;
}

static void floor_list(void *context, int64_t i) {
    const job *j = context;
    kvc_select_list(kept_at(j, i), importance_at(j, i), j->s, first_of(j->args, i),
                    ((const int32_t *)j->args->floor.data)[i / j->args->heads], j->args->sinks, j->args->window);
}

static void count_list(void *context, int64_t i) {
    const job *j = context;
    const kvc_top *top = &j->tops[i / j->args->heads];
    const int64_t first = first_of(j->args, i);
    if (top->equal > 0)
        kvc_top_count(top, kept_at(j, i) + first, importance_at(j, i) + first, j->s - first,
                      j->histograms + i * KVC_DIGITS);
}

static void mark_list(void *context, int64_t i) {
    const job *j = context;
    const kvc_top *top = &j->tops[i / j->args->heads];
    const int64_t first = first_of(j->args, i);
    if (top->equal > 0)
        kvc_top_mark(top, kept_at(j, i) + first, importance_at(j, i) + first, j->s - first, j->equals[i]);
}

/* Tokens of sequence b that its floors leave. */
static int64_t left_of(const job *j, int64_t b) {
    const kvc_ada_args *args = j->args;
    int64_t real = 0, floors = 0, keep = ((const int32_t *)args->keep.data)[b];
    for (int64_t i = b * args->heads; i < (b + 1) * args->heads; i++) {
        const int64_t here = j->s - first_of(args, i);
        real += here;
        floors += kvc_select_kept(here, ((const int32_t *)args->floor.data)[b], args->window);
    }
    if (keep > real) keep = real;
    return keep > floors ? keep - floors : 0;
}

/* Tokens at the threshold, those with this last digit, go to the lower heads. */
static void share_equals(const job *j, int64_t b, uint32_t digit) {
    int64_t left = j->tops[b].equal;
    for (int64_t i = b * j->args->heads; i < (b + 1) * j->args->heads; i++) {
        const int64_t here = j->histograms[i * KVC_DIGITS + digit];
        j->equals[i] = here < left ? here : left;
        left -= j->equals[i];
    }
}

static kvc_status check_counts(const char *name, const kvc_tensor *counts, int64_t b) {
    KVC_TRY(kvc_expect_array("ada", name, counts, KVC_INT32, 1, &b));
    for (int64_t i = 0; i < b; i++)
        KVC_CHECK(((const int32_t *)counts->data)[i] >= 0, KVC_EINVAL,
                  "ada: %s: expected counts >= 0, got %d for sequence %lld", name, ((const int32_t *)counts->data)[i],
                  (long long)i);
    return KVC_OK;
}

static kvc_status check(const kvc_ada_args *args) {
    KVC_TRY(kvc_expect_array("ada", "kept", &args->kept, KVC_UINT8, 2, (int64_t[]){-1, -1}));
    const int64_t n = args->kept.shape[0], s = args->kept.shape[1];
    KVC_CHECK(s <= INT32_MAX, KVC_ESHAPE, "ada: kept: expected at most 2^31 - 1 tokens, got %lld", (long long)s);
    KVC_TRY(kvc_expect_array("ada", "importance", &args->importance, KVC_FLOAT32, 2, args->kept.shape));
    KVC_CHECK(args->heads >= 1, KVC_EINVAL, "ada: heads: expected a count >= 1, got %d", args->heads);
    KVC_CHECK(n % args->heads == 0, KVC_ESHAPE, "ada: kept: expected a multiple of %d heads as lists, got %lld",
              args->heads, (long long)n);
    KVC_TRY(check_counts("keep", &args->keep, n / args->heads));
    KVC_TRY(check_counts("floor", &args->floor, n / args->heads));
    if (kvc_given(&args->first)) KVC_TRY(kvc_expect_array("ada", "first", &args->first, KVC_INT32, 1, &n));
    KVC_CHECK(args->sinks >= 0, KVC_EINVAL, "ada: sinks: expected a count >= 0, got %d", args->sinks);
    KVC_CHECK(args->window >= 0, KVC_EINVAL, "ada: window: expected a count >= 0, got %d", args->window);
    for (int64_t i = 0; i < n; i++)
        KVC_TRY(kvc_select_check_list("ada", (const float *)args->importance.data + i * s, s, first_of(args, i), i));
    return kvc_expect_workspace("ada", &args->workspace, kvc_ada_workspace(n, s));
}

int64_t kvc_ada_workspace(int64_t n, int64_t s) {
    (void)s;
    const int64_t list = sizeof(kvc_top) + sizeof(int64_t) + KVC_DIGITS * sizeof(uint32_t);
    return n > INT64_MAX / list ? INT64_MAX : n * list;
}

kvc_status kvc_ada_cpu(const kvc_ada_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(check(args));
    const int64_t n = args->kept.shape[0], b = n / args->heads;
    job j = {.args = args, .s = args->kept.shape[1], .tops = args->workspace.data};
    j.equals = (int64_t *)(j.tops + n);
    j.histograms = (uint32_t *)(j.equals + n);
    kvc_parallel(n, 0, floor_list, &j);
    for (int64_t i = 0; i < b; i++) j.tops[i] = kvc_top_begin(left_of(&j, i));
    for (int32_t shift = kvc_top_begin(1).shift; shift >= 0; shift -= KVC_DIGIT_BITS) {
        kvc_parallel(n, 0, count_list, &j);
        for (int64_t i = 0; i < b; i++) {
            if (j.tops[i].equal == 0) continue;
            const uint32_t digit = kvc_top_next(&j.tops[i], j.histograms + i * args->heads * KVC_DIGITS, args->heads);
            share_equals(&j, i, digit); /* the last digit's counts */
        }
    }
    kvc_parallel(n, 0, mark_list, &j);
    return KVC_OK;
}
