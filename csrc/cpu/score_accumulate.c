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

kvc_status kvc_accumulate_cpu(const kvc_accumulate_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_accumulate_check(args));
    job j = {args, args->table.shape[1], args->mass.shape[1]};
    kvc_parallel(args->table.shape[0], args->table.shape[0] < 64 ? 1 : 0, accumulate_list, &j);
    return KVC_OK;
}
