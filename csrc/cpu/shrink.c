/* shrink.c: pages give up bytes, the least error per byte first.
 *
 * The step from a class depends on the list's tables only, so it is found once for every list and state; a page's share
 * is a factor, its weight. From a class c whose step is c -> a, whatever a's step leads to could be reached from c as
 * well and was no better: error per byte rises along the steps, and one heap finds the best ones of all pages. */
#include "kvcomp/shrink.h"

#include <math.h>

#include "plan_tables.h"

#define WHOLE (KVC_PLAN_CLASSES - 1) /* class (16, 16): a page; two to four of them that move together follow */
#define STATES (WHOLE + KVC_PAGE_TOKENS / KVC_TAIL_TOKENS)
#define EVICTED STATES

/* What a page in some state does next. */
typedef struct {
    double rate;   /* error added per byte freed, for a weight of 1 */
    int64_t freed; /* bytes */
    int64_t to;    /* the class it becomes, or EVICTED */
} step;

typedef struct {
    const kvc_shrink_args *args;
    int64_t n, m;
    int64_t bytes[STATES]; /* of a page in each state, its entry included */
    step *steps;           /* [n][STATES] */
    kvc_plan_step *heap;
    int64_t heap_size;
} job;

int64_t kvc_shrink_workspace(int64_t n, int64_t m) {
    const double rough = (double)n * STATES * sizeof(step) + (double)m * sizeof(kvc_plan_step);
    if (rough > 0x1p61) return INT64_MAX;
    return n * STATES * (int64_t)sizeof(step) + m * (int64_t)sizeof(kvc_plan_step);
}

/* How many pages of class (16, 16) page p stands for. */
static int count_of(const job *j, int64_t p) {
    return kvc_given(&j->args->counts) ? ((const uint8_t *)j->args->counts.data)[p] : 1;
}

/* The state of page p: its class, several pages of class (16, 16), or EVICTED. */
static int state_of(const job *j, int64_t p) {
    static const uint8_t column[] = {[2] = 0, [3] = 1, [4] = 2, [8] = 3, [16] = 4};
    const int k = ((const uint8_t *)j->args->k_bits.data)[p], v = ((const uint8_t *)j->args->v_bits.data)[p];
    if (k == 0) return EVICTED;
    const int class = column[k] * KVC_PLAN_LEVELS + column[v];
    return class == WHOLE ? class + count_of(j, p) - 1 : class;
}

static bool touchable(const job *j, int64_t p) { return isfinite(((const float *)j->args->weight.data)[p]); }

/* The step from state `from` in list i. */
static step step_of(const job *j, int64_t i, int from) {
    const kvc_shrink_args *args = j->args;
    const int class = from < WHOLE ? from : WHOLE, k = class / KVC_PLAN_LEVELS, v = class % KVC_PLAN_LEVELS;
    const double now = kvc_plan_distortion(&args->distortion_k, &args->distortion_v, i, k, v);
    const double evicted = (double)((const float *)args->drop.data)[i];
    step best = {(evicted - now) / (double)j->bytes[from], j->bytes[from], EVICTED};
    for (int to = 0; to < WHOLE; to++) {
        const int to_k = to / KVC_PLAN_LEVELS, to_v = to % KVC_PLAN_LEVELS;
        const int64_t freed = j->bytes[from] - j->bytes[to];
        if (!((const uint8_t *)args->allowed.data)[to] || to_k > k || to_v > v || freed <= 0) continue;
        const double after = kvc_plan_distortion(&args->distortion_k, &args->distortion_v, i, to_k, to_v);
        const double rate = (after - now) / (double)freed;
        if (rate < best.rate || (rate == best.rate && freed < best.freed)) best = (step){rate, freed, to};
    }
    return best;
}

static void find_steps(void *context, int64_t i) {
    const job *j = context;
    for (int state = 0; state < STATES; state++) j->steps[i * STATES + state] = step_of(j, i, state);
}

static const step *next_of(const job *j, int64_t p) {
    return &j->steps[((const int32_t *)j->args->lists.data)[p] * (int64_t)STATES + state_of(j, p)];
}

static kvc_plan_step open_of(const job *j, int64_t p) {
    const double weight = (double)((const float *)j->args->weight.data)[p];
    return (kvc_plan_step){-weight * next_of(j, p)->rate, p};
}

/* Of the open steps that free `wanted` bytes the one that adds the least error (ties: as in the heap). */
static int64_t last_page(const job *j, int64_t wanted) {
    const kvc_plan_step *best = NULL;
    double least = 0.0;
    for (const kvc_plan_step *open = j->heap; open < j->heap + j->heap_size; open++) {
        const int64_t freed = next_of(j, open->at)->freed;
        const double added = -open->gain * (double)freed;
        if (freed < wanted || (best && (added > least || (added == least && kvc_plan_before(best, open))))) continue;
        best = open;
        least = added;
    }
    return best->at;
}

/* Takes steps until `wanted` bytes are freed, which are known to be there; returns the bytes freed. */
static int64_t free_bytes(job *j) {
    uint8_t *k_bits = j->args->k_bits.data, *v_bits = j->args->v_bits.data;
    int64_t freed = 0;
    j->heap_size = 0;
    for (int64_t p = 0; p < j->m; p++)
        if (touchable(j, p) && state_of(j, p) != EVICTED) kvc_plan_push(j->heap, &j->heap_size, open_of(j, p));
    while (freed < j->args->wanted) {
        const int64_t left = j->args->wanted - freed, first = j->heap[0].at;
        const bool last = next_of(j, first)->freed >= left;
        const int64_t p = last ? last_page(j, left) : first;
        const step taken = *next_of(j, p);
        const bool gone = taken.to == EVICTED;
        k_bits[p] = gone ? 0 : kvc_plan_bits[taken.to / KVC_PLAN_LEVELS];
        v_bits[p] = gone ? 0 : kvc_plan_bits[taken.to % KVC_PLAN_LEVELS];
        freed += taken.freed;
        if (last) break;
        if (gone)
            kvc_plan_pop(j->heap, &j->heap_size);
        else
            kvc_plan_replace(j->heap, j->heap_size, open_of(j, p));
    }
    return freed;
}

static kvc_status check(const kvc_shrink_args *args) {
    KVC_TRY(kvc_expect_array("shrink", "k_bits", &args->k_bits, KVC_UINT8, 1, (int64_t[]){-1}));
    const int64_t m = args->k_bits.shape[0];
    KVC_TRY(kvc_expect_array("shrink", "v_bits", &args->v_bits, KVC_UINT8, 1, &m));
    KVC_TRY(kvc_expect_array("shrink", "lists", &args->lists, KVC_INT32, 1, &m));
    if (kvc_given(&args->counts)) KVC_TRY(kvc_expect_array("shrink", "counts", &args->counts, KVC_UINT8, 1, &m));
    KVC_TRY(kvc_expect_array("shrink", "weight", &args->weight, KVC_FLOAT32, 1, &m));
    KVC_TRY(kvc_expect_array("shrink", "drop", &args->drop, KVC_FLOAT32, 1, (int64_t[]){-1}));
    const int64_t n = args->drop.shape[0];
    int classes;
    KVC_TRY(kvc_plan_check_tables("shrink", n, &args->distortion_k, &args->distortion_v, &args->drop, &args->allowed,
                                  &classes));
    KVC_TRY(kvc_expect_layout("shrink", &args->layout));
    KVC_TRY(kvc_plan_check_bytes("shrink", "entry_bytes", args->entry_bytes));
    KVC_CHECK(args->wanted >= 0, KVC_EINVAL, "shrink: wanted: expected bytes >= 0, got %lld", (long long)args->wanted);
    for (int64_t p = 0; p < m; p++) {
        const int k = ((const uint8_t *)args->k_bits.data)[p], v = ((const uint8_t *)args->v_bits.data)[p];
        const int32_t list = ((const int32_t *)args->lists.data)[p];
        const float weight = ((const float *)args->weight.data)[p];
        KVC_CHECK(
            (k == 0 && v == 0) || (kvc_bits_ok(k) && kvc_bits_ok(v)), KVC_EINVAL,
            "shrink: k_bits: expected 2, 3, 4, 8 or 16 for both halves, or 0 for both, got %d and %d at page %lld", k,
            v, (long long)p);
        KVC_CHECK(list >= 0 && list < n, KVC_EINVAL, "shrink: lists: expected 0..%lld, got %d at page %lld",
                  (long long)(n - 1), list, (long long)p);
        const int count = kvc_given(&args->counts) ? ((const uint8_t *)args->counts.data)[p] : 1;
        KVC_CHECK(count == 1 || (k == 16 && v == 16 && count >= 1 && count <= STATES - WHOLE), KVC_EINVAL,
                  "shrink: counts: expected 1, or up to %d pages of class (16, 16), got %d at page %lld",
                  STATES - WHOLE, count, (long long)p);
        KVC_CHECK(weight >= 0.0f, KVC_EINVAL, "shrink: weight: expected values >= 0, got %g at page %lld",
                  (double)weight, (long long)p);
    }
    return kvc_expect_workspace("shrink", &args->workspace, kvc_shrink_workspace(n, m));
}

kvc_status kvc_shrink_cpu(const kvc_shrink_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(check(args));
    job j = {.args = args, .n = args->drop.shape[0], .m = args->k_bits.shape[0], .steps = args->workspace.data};
    j.heap = (kvc_plan_step *)(j.steps + j.n * STATES);
    for (int state = 0; state < STATES; state++) {
        const int class = state < WHOLE ? state : WHOLE;
        j.bytes[state] = kvc_page_bytes(&args->layout, kvc_plan_bits[class / KVC_PLAN_LEVELS],
                                        kvc_plan_bits[class % KVC_PLAN_LEVELS]) +
                         args->entry_bytes;
        if (state > WHOLE) j.bytes[state] *= state - WHOLE + 1;
    }
    int64_t all = 0, most = 0; /* bytes: of the pages, and of those that may go */
    for (int64_t p = 0; p < j.m; p++) {
        const int state = state_of(&j, p);
        if (state == EVICTED) continue;
        all += j.bytes[state];
        most += touchable(&j, p) ? j.bytes[state] : 0;
    }
    const kvc_shrink_summary before = {.least_bytes = all - most};
    if (args->wanted > most) {
        *args->summary = before;
        return kvc_fail(
            KVC_EBUDGET,
            "shrink: wanted: expected at most %lld bytes, which evicting every page of finite weight frees, got %lld",
            (long long)most, (long long)args->wanted);
    }
    kvc_parallel(j.n, 0, find_steps, &j);
    *args->summary = (kvc_shrink_summary){free_bytes(&j), all - most};
    return KVC_OK;
}
