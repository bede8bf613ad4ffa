/* score_accumulate.c: what decoding's attention adds to the worth of pages, on the CPU. */
#include <float.h>
#include <math.h>

#include "core/core.h"
#include "kvcomp/score.h"

typedef struct {
    const kvc_accumulate_args *args;
    int64_t capacity, room; /* entries of a list's row of the table; of the mass */
} job;

static const kvc_list *list_at(const kvc_accumulate_args *args, int64_t i) {
    return (const kvc_list *)args->lists.data + i;
}
static const kvc_page *row_at(const kvc_accumulate_args *args, int64_t i) {
    return (const kvc_page *)args->table.data + i * args->table.shape[1];
}

static void accumulate_list(void *context, int64_t i) {
    const job *j = context;
    const kvc_page *row = row_at(j->args, i);
    const double keep = j->args->keep, gain = j->args->gain;
    const int64_t pages = list_at(j->args, i)->pages;
    const float *mass = (const float *)j->args->mass.data + i * j->room;
    float *worth = (float *)j->args->worth.data + i * j->capacity;
    for (int64_t p = 0; p < pages; p++) {
        double sum = 0.0;
        for (int t = 0; t < row[p].tokens; t++) sum += (double)*mass++;
        if (isinf(worth[p])) continue; /* stays, whatever it gathers */
        const double value = keep * (double)worth[p] + gain * sum;
        worth[p] = value > (double)FLT_MAX ? FLT_MAX : (float)value;
    }
    for (int64_t p = pages; p < j->capacity; p++) worth[p] = 0.0f;
}

/* Values of one list that are in use, at most `most` each. */
static kvc_status check_values(const char *name, const float *values, int64_t count, float most, int64_t list) {
    for (int64_t k = 0; k < count; k++)
        KVC_CHECK(values[k] >= 0.0f && values[k] <= most, KVC_EINVAL,
                  "accumulate: %s: expected values of 0..%g, got %g at list %lld, entry %lld", name, (double)most,
                  (double)values[k], (long long)list, (long long)k);
    return KVC_OK;
}

static kvc_status check_list(const kvc_accumulate_args *args, int64_t i) {
    const kvc_list *list = list_at(args, i);
    const kvc_page *row = row_at(args, i);
    const int64_t capacity = args->table.shape[1], room = args->mass.shape[1];
    KVC_CHECK(list->pages >= 0 && list->pages <= capacity, KVC_EINVAL,
              "accumulate: lists: expected 0..%lld pages, got %d in list %lld", (long long)capacity, list->pages,
              (long long)i);
    int64_t tokens = 0;
    for (int p = 0; p < list->pages; p++) {
        KVC_CHECK(kvc_bits_ok(row[p].k_bits) && kvc_bits_ok(row[p].v_bits) &&
                      row[p].tokens <= kvc_page_tokens(row[p].k_bits, row[p].v_bits),
                  KVC_EINVAL,
                  "accumulate: table: expected a valid page, got K %d, V %d bits, %d tokens at unit %u in list %lld",
                  row[p].k_bits, row[p].v_bits, row[p].tokens, row[p].unit, (long long)i);
        tokens += row[p].tokens;
    }
    KVC_CHECK(tokens == list->tokens, KVC_EINVAL,
              "accumulate: lists: expected %lld tokens as in the pages, got %d in list %lld", (long long)tokens,
              list->tokens, (long long)i);
    KVC_CHECK(tokens <= room, KVC_ESHAPE, "accumulate: mass: expected (%lld, %lld or more), got %s",
              (long long)args->table.shape[0], (long long)tokens, kvc_shape_text(&args->mass));
    KVC_TRY(check_values("worth", (const float *)args->worth.data + i * capacity, list->pages, INFINITY, i));
    return check_values("mass", (const float *)args->mass.data + i * room, tokens, FLT_MAX, i);
}

static kvc_status check(const kvc_accumulate_args *args) {
    KVC_TRY(kvc_expect_array("accumulate", "table", &args->table, KVC_UINT64, 2, (int64_t[]){-1, -1}));
    const int64_t n = args->table.shape[0];
    KVC_TRY(kvc_expect_array("accumulate", "worth", &args->worth, KVC_FLOAT32, 2, args->table.shape));
    KVC_TRY(kvc_expect_array("accumulate", "mass", &args->mass, KVC_FLOAT32, 2, (int64_t[]){n, -1}));
    KVC_TRY(kvc_expect_array("accumulate", "lists", &args->lists, KVC_INT32, 2, (int64_t[]){n, 4}));
    KVC_CHECK(args->keep >= 0.0f && args->keep <= 1.0f, KVC_EINVAL, "accumulate: keep: expected 0..1, got %g",
              (double)args->keep);
    KVC_CHECK(args->gain >= 0.0f && isfinite(args->gain), KVC_EINVAL,
              "accumulate: gain: expected a finite number >= 0, got %g", (double)args->gain);
    for (int64_t i = 0; i < n; i++) KVC_TRY(check_list(args, i));
    return KVC_OK;
}

kvc_status kvc_accumulate_cpu(const kvc_accumulate_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(check(args));
    job j = {args, args->table.shape[1], args->mass.shape[1]};
    kvc_parallel(args->table.shape[0], args->table.shape[0] < 64 ? 1 : 0, accumulate_list, &j);
    return KVC_OK;
}
