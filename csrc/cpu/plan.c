/* plan.c: one byte budget over all lists, spent where a byte saves the most error.
 *
 * Lists are ranked and cut into runs in parallel; then one heap holds, of every run whose next step is open, error
 * saved per byte. A step is open while the run before it in its list is at the step's level or above, which is what
 * keeps bits from rising with falling importance, whatever the costs of a short last run.
 *
 * More budget never gives a larger objective: two budgets take the same steps until one fits the larger budget only.
 * From there on the smaller one may save, with what is left, no more than that step would have (`room` below). Where
 * steps come in falling order of saving per byte that holds by itself; a short last run's page of 16 tokens may come
 * out of order. */
#include <math.h>
#include <string.h>

#include "plan_job.h"

#define RUN KVC_PAGE_TOKENS
#define SORTERS 64 /* how many lists are ranked at a time */
#define TOP KVC_PLAN_TOP
#define DIGIT_BITS 11
#define DIGITS (1 << DIGIT_BITS)

typedef kvc_plan_list list;
typedef kvc_plan_option option;
typedef kvc_plan_step step;
typedef kvc_plan_job job;

/* ---- workspace */

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static int64_t sorters(int64_t n) { return n < SORTERS ? n : SORTERS; }
static int64_t most_runs(int64_t s) { return s ? kvc_ceil_div(s, RUN) : 1; } /* a group is one */
static int64_t row_bytes(int64_t n) {
    return n && n <= KVC_PLAN_FEW ? 2 * (KVC_PLAN_UNITS + 1) * (int64_t)sizeof(double) : 0;
}

int64_t kvc_plan_workspace(int64_t n, int64_t s) {
    const double rough = (double)n * ((double)s * 5.0 + 1024.0 + 2.0 * sizeof(list)) + SORTERS * 16.0 * (double)s;
    if (rough > 0x1p61) return INT64_MAX;
    const int64_t runs = n * most_runs(s);
    return 2 * aligned(n * (int64_t)sizeof(list)) + aligned(runs * (int64_t)sizeof(double)) + aligned(runs) +
           aligned(n * s * (int64_t)sizeof(int32_t)) + aligned(runs * (int64_t)sizeof(step)) +
           aligned(sorters(n) * 2 * s * (int64_t)sizeof(uint64_t)) + aligned(row_bytes(n)) +
           (n <= KVC_PLAN_FEW ? n * (KVC_PLAN_UNITS + 1) : 0);
}

static void carve(job *j) {
    char *at = j->args->workspace.data;
    const int64_t runs = j->n * j->most_runs;
    j->lists = (list *)at;
    at += aligned(j->n * (int64_t)sizeof(list));
    j->groups = (list *)at;
    at += aligned(j->n * (int64_t)sizeof(list));
    j->weight = (double *)at;
    at += aligned(runs * (int64_t)sizeof(double));
    j->level = (uint8_t *)at;
    at += aligned(runs);
    j->order = (int32_t *)at;
    at += aligned(j->n * j->s * (int64_t)sizeof(int32_t));
    j->heap = (step *)at;
    at += aligned(runs * (int64_t)sizeof(step));
    j->sorting = (uint64_t *)at;
    at += aligned(sorters(j->n) * 2 * j->s * (int64_t)sizeof(uint64_t));
    j->rows = (double *)at;
    at += aligned(row_bytes(j->n));
    j->choices = (uint8_t *)at;
}

/* ---- ranking */

/* Sorts pairs (importance bits << 32 | token) by falling importance, equal ones in the order given. Returns the half of
 * `pairs` (two of `count` with a distance of s) that holds the result. */
static const uint64_t *rank(uint64_t *pairs, int64_t count, int64_t s) {
    uint64_t *from = pairs, *to = pairs + s;
    for (int shift = 32; shift < 64; shift += DIGIT_BITS) {
        int32_t start[DIGITS + 1] = {0};
        for (int64_t i = 0; i < count; i++) start[DIGITS - (from[i] >> shift & (DIGITS - 1))]++;
        for (int digit = 1; digit <= DIGITS; digit++) start[digit] += start[digit - 1];
        /* the largest digit, counted at 1, begins at start[0] = 0 */
        for (int64_t i = 0; i < count; i++) to[start[DIGITS - 1 - (from[i] >> shift & (DIGITS - 1))]++] = from[i];
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    return from;
}

static int tokens_of(const list *l, int64_t run) { return run == l->runs - 1 ? l->last_tokens : RUN; }

/* Ranks the candidates of lists slot, slot + SORTERS, ... and sums importance by run. */
static void rank_lists(void *context, int64_t slot) {
    job *j = context;
    const uint8_t *kept = j->args->kept.data, *fixed = j->args->fixed.data;
    const float *importance = j->args->importance.data;
    uint64_t *pairs = j->sorting + slot * 2 * j->s;
    for (int64_t i = slot; i < j->n; i += SORTERS) {
        int64_t count = 0;
        for (int64_t t = 0; t < j->s; t++) {
            const int64_t at = i * j->s + t;
            if (!kept[at] || fixed[at]) continue;
            const float value = importance[at] + 0.0f; /* -0 to +0: non-negative floats order as their bits do */
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            pairs[count++] = (uint64_t)bits << 32 | (uint64_t)t;
        }
        const uint64_t *ranked = rank(pairs, count, j->s);
        double *weight = j->weight + i * j->most_runs;
        memset(weight, 0, (size_t)kvc_ceil_div(count, RUN) * sizeof(double));
        for (int64_t at = 0; at < count; at++) {
            const int32_t token = (int32_t)(uint32_t)ranked[at];
            j->order[i * j->s + at] = token;
            weight[at / RUN] += (double)importance[i * j->s + token];
        }
    }
}

/* ---- the levels of a list */

const option *kvc_plan_steepest(const option *options, int count, const option *from, const option *top) {
    const option *best = NULL;
    double best_slope = 0.0;
    for (int i = 0; i < count; i++) {
        const option *o = &options[i];
        if (!kvc_plan_within(o, top) || !kvc_plan_within(from, o) || o->bytes <= from->bytes ||
            o->distortion >= from->distortion)
            continue;
        const double slope = (from->distortion - o->distortion) / (double)(o->bytes - from->bytes);
        if (best && (slope < best_slope || (slope == best_slope && o->bytes >= best->bytes))) continue;
        best = o;
        best_slope = slope;
    }
    return best;
}

void kvc_plan_add_level(list *l, const option *o) {
    l->k[l->levels] = kvc_plan_bits[o->k];
    l->v[l->levels] = kvc_plan_bits[o->v];
    l->bytes[l->levels] = o->bytes;
    l->distortion[l->levels++] = o->distortion;
}

option kvc_plan_option_of(const job *j, int64_t i, int k, int v) {
    const kvc_plan_args *args = j->args;
    const int64_t bytes = kvc_page_bytes(&args->layout, kvc_plan_bits[k], kvc_plan_bits[v]) + args->entry_bytes;
    return (option){k, v, bytes, kvc_plan_distortion(&args->distortion_k, &args->distortion_v, i, k, v)};
}

bool kvc_plan_allows(const job *j, int k, int v) {
    return ((const uint8_t *)j->args->allowed.data)[k * KVC_PLAN_LEVELS + v];
}

/* Levels 1 .. of packed classes, and the step from each, and from dropped, to the next. */
static void packed_levels(const job *j, int64_t i, list *l, double dropped) {
    option options[KVC_PLAN_LEVELS * KVC_PLAN_LEVELS];
    int count = 0;
    for (int k = 0; k < KVC_PLAN_LEVELS; k++)
        for (int v = 0; v < KVC_PLAN_LEVELS; v++)
            if (kvc_plan_allows(j, k, v) && !(k == TOP && v == TOP)) options[count++] = kvc_plan_option_of(j, i, k, v);
    const option nothing = {0, 0, 0, dropped}, *best = NULL;
    for (int o = 0; o < count; o++)
        if (!best || options[o].distortion < best->distortion ||
            (options[o].distortion == best->distortion && options[o].bytes < best->bytes))
            best = &options[o];
    if (!best) return;
    const option *first = kvc_plan_steepest(options, count, &nothing, best), *bound = first ? first : best,
                 *cheapest = bound;
    for (int o = 0; o < count; o++)
        if (kvc_plan_within(&options[o], bound) &&
            (options[o].bytes < cheapest->bytes ||
             (options[o].bytes == cheapest->bytes && options[o].distortion < cheapest->distortion)))
            cheapest = &options[o];
    for (const option *o = cheapest; o && o != bound; o = kvc_plan_steepest(options, count, o, bound))
        kvc_plan_add_level(l, o);
    if (first) l->next[0][0] = l->levels;
    for (const option *o = bound; o; o = kvc_plan_steepest(options, count, o, best)) kvc_plan_add_level(l, o);
    for (int level = 1; level + 1 < l->levels; level++) l->next[0][level] = level + 1;
    l->least = 1;
}

/* The level (16, 16), after all others. It follows a level from which it saves more per byte than the packed step. */
static void whole_level(const job *j, int64_t i, list *l, double dropped) {
    option whole = kvc_plan_option_of(j, i, TOP, TOP);
    whole.bytes = l->runs == 1 ? l->last_tail_bytes : RUN / KVC_TAIL_TOKENS * j->tail_bytes;
    const int packed = l->levels;
    if (kvc_plan_allows(j, TOP, TOP) && l->guarded > 0 &&
        (packed == 1 || whole.distortion < l->distortion[packed - 1])) {
        l->whole = packed;
        kvc_plan_add_level(l, &whole);
        if (l->least == 0 || (l->runs == 1 && whole.bytes <= l->bytes[l->least])) l->least = packed;
    }
    for (int level = 0; level < packed; level++) {
        const double now = level ? l->distortion[level] : dropped;
        const int next = l->next[0][level];
        const int64_t jump = whole.bytes - l->bytes[level], stride = l->bytes[next] - l->bytes[level];
        const bool better = next == 0 || jump <= 0 ||
                            (now - whole.distortion) * (double)stride > (now - l->distortion[next]) * (double)jump;
        l->next[1][level] = l->whole && now > whole.distortion && better ? packed : next;
    }
}

static void make_levels(const job *j, int64_t i, list *l) {
    l->levels = 1;
    l->distortion[0] = (double)((const float *)j->args->drop.data)[i];
    const double dropped =
        j->args->fixed_class ? INFINITY : l->distortion[0]; /* the one class is a level at any rate */
    packed_levels(j, i, l, dropped);
    whole_level(j, i, l, dropped);
}

/* ---- accounts */

static int64_t run_bytes(const list *l, int64_t run, int level) {
    return level && level == l->whole && run == l->runs - 1 ? l->last_tail_bytes : l->bytes[level];
}

static int next_of(const list *l, int64_t run, int level) { return l->next[run < l->guarded][level]; }

static int best_of(const list *l, int64_t run, int level) {
    while (next_of(l, run, level)) level = next_of(l, run, level);
    return level;
}

static int least_of(const list *l, int64_t run) { return run < l->required ? l->least : 0; }

int64_t kvc_plan_fixed_bytes(const job *j, const list *l) {
    return (kvc_ceil_div(l->sinks, KVC_TAIL_TOKENS) + kvc_ceil_div(l->window, KVC_TAIL_TOKENS)) * j->tail_bytes +
           j->args->list_bytes;
}

static void account(const job *j, kvc_plan_summary *summary) {
    summary->bytes = summary->kept = summary->pages = 0;
    summary->error = 0.0;
    for (int64_t i = 0; i < j->n; i++) {
        const list *l = &j->lists[i];
        int64_t tail = l->sinks;
        double error = l->fixed_error;
        for (int64_t r = 0; r < l->runs; r++) {
            const int level = j->level[i * j->most_runs + r];
            error += j->weight[i * j->most_runs + r] * l->distortion[level];
            if (level == 0) continue;
            summary->kept += tokens_of(l, r);
            if (level == l->whole) {
                tail += tokens_of(l, r);
            } else {
                summary->pages++;
                summary->bytes += l->bytes[level];
            }
        }
        const int64_t tail_pages = kvc_ceil_div(tail, KVC_TAIL_TOKENS) + kvc_ceil_div(l->window, KVC_TAIL_TOKENS);
        summary->kept += l->sinks + l->window;
        summary->pages += tail_pages;
        summary->bytes += tail_pages * j->tail_bytes + j->args->list_bytes;
        summary->error += error;
    }
}

/* ---- steps */

/* What the next step of a run costs and saves. */
typedef struct {
    int level;
    int64_t bytes;
    double saved;
} offer;

static offer offer_of(const job *j, int64_t run) {
    const int64_t r = run % j->most_runs;
    const list *l = &j->lists[run / j->most_runs];
    const int now = j->level[run], next = next_of(l, r, now);
    const double saved = l->distortion[now] - l->distortion[next]; /* of one class the caller may fix, < 0 */
    return (offer){next, run_bytes(l, r, next) - run_bytes(l, r, now), j->weight[run] * (saved > 0.0 ? saved : 0.0)};
}

/* Pushes the run's next step if it is open now and was not while the run before stood at `was`. */
static void open_step(job *j, int64_t run, int was) {
    const offer o = offer_of(j, run);
    const int ahead = run % j->most_runs ? j->level[run - 1] : KVC_PLAN_CHAIN;
    if (o.level && o.level <= ahead && o.level > was)
        kvc_plan_push(j->heap, &j->heap_size, (step){o.bytes > 0 ? o.saved / (double)o.bytes : INFINITY, run});
}

void kvc_plan_spend(job *j, int64_t left) {
    double room = INFINITY; /* what steps after one that did not fit may save, all together */
    j->heap_size = 0;
    for (int64_t i = 0; i < j->n; i++)
        for (int64_t r = 0; r < j->lists[i].runs; r++) open_step(j, i * j->most_runs + r, 0);
    while (j->heap_size > 0) {
        const int64_t run = kvc_plan_pop(j->heap, &j->heap_size);
        const offer o = offer_of(j, run);
        if (o.bytes > left) {
            room = o.saved < room ? o.saved : room;
        } else if (o.saved <= room) {
            const int was = j->level[run];
            j->level[run] = (uint8_t)o.level;
            left -= o.bytes;
            room -= o.saved;
            open_step(j, run, 0);
            if (run % j->most_runs + 1 < j->lists[run / j->most_runs].runs) open_step(j, run + 1, was);
        }
    }
}

/* ---- the operation */

static void write_list(void *context, int64_t i) {
    const job *j = context;
    const list *l = &j->lists[i];
    const uint8_t *fixed = (const uint8_t *)j->args->fixed.data + i * j->s;
    uint8_t *k = (uint8_t *)j->args->k_bits.data + i * j->s, *v = (uint8_t *)j->args->v_bits.data + i * j->s;
    for (int64_t t = 0; t < j->s; t++) k[t] = v[t] = fixed[t] ? 16 : 0;
    for (int64_t r = 0; r < l->runs; r++) {
        const int level = j->level[i * j->most_runs + r];
        for (int at = 0; at < tokens_of(l, r); at++) {
            const int32_t token = j->order[i * j->s + r * RUN + at];
            k[token] = l->k[level];
            v[token] = l->v[level];
        }
    }
}

static kvc_status check_counts(const char *name, const kvc_tensor *tensor, int64_t n) {
    if (!kvc_given(tensor)) return KVC_OK;
    KVC_TRY(kvc_expect_array("plan", name, tensor, KVC_INT32, 1, &n));
    for (int64_t i = 0; i < n; i++) {
        const int32_t count = ((const int32_t *)tensor->data)[i];
        KVC_CHECK(count >= 0, KVC_EINVAL, "plan: %s: expected counts >= 0, got %d for list %lld", name, count,
                  (long long)i);
    }
    return KVC_OK;
}

static kvc_status check_groups(const kvc_plan_args *args, int64_t n) {
    if (!kvc_given(&args->groups)) return KVC_OK;
    KVC_TRY(kvc_expect_array("plan", "groups", &args->groups, KVC_INT32, 1, &n));
    for (int64_t i = 0; i < n; i++) {
        const int32_t group = ((const int32_t *)args->groups.data)[i];
        KVC_CHECK(group >= 0 && group < n, KVC_EINVAL, "plan: groups: expected 0..%lld, got %d for list %lld",
                  (long long)(n - 1), group, (long long)i);
    }
    KVC_CHECK(!args->fixed_class, KVC_EINVAL, "plan: fixed_class: expected 0 with groups, got %d", args->fixed_class);
    return KVC_OK;
}

static kvc_status check(const kvc_plan_args *args) {
    KVC_TRY(kvc_expect_array("plan", "k_bits", &args->k_bits, KVC_UINT8, 2, (int64_t[]){-1, -1}));
    const int64_t *shape = args->k_bits.shape, n = shape[0], s = shape[1];
    KVC_CHECK(s <= INT32_MAX, KVC_ESHAPE, "plan: k_bits: expected at most 2^31 - 1 tokens, got %lld", (long long)s);
    KVC_TRY(kvc_expect_array("plan", "v_bits", &args->v_bits, KVC_UINT8, 2, shape));
    KVC_TRY(kvc_expect_array("plan", "importance", &args->importance, KVC_FLOAT32, 2, shape));
    KVC_TRY(kvc_expect_array("plan", "kept", &args->kept, KVC_UINT8, 2, shape));
    KVC_TRY(kvc_expect_array("plan", "fixed", &args->fixed, KVC_UINT8, 2, shape));
    KVC_TRY(kvc_expect_layout("plan", &args->layout));
    int classes;
    KVC_TRY(kvc_plan_check_tables("plan", n, &args->distortion_k, &args->distortion_v, &args->drop, &args->allowed,
                                  &classes));
    KVC_TRY(check_counts("least_tokens", &args->least_tokens, n));
    KVC_TRY(check_counts("guard", &args->guard, n));
    KVC_TRY(kvc_plan_check_bytes("plan", "entry_bytes", args->entry_bytes));
    KVC_TRY(kvc_plan_check_bytes("plan", "list_bytes", args->list_bytes));
    KVC_CHECK(args->fixed_class == 0 || args->fixed_class == 1, KVC_EINVAL,
              "plan: fixed_class: expected 0 or 1, got %d", args->fixed_class);
    KVC_CHECK(!args->fixed_class || classes == 1, KVC_EINVAL,
              "plan: allowed: expected one class with fixed_class, got %d", classes);
    KVC_TRY(check_groups(args, n));
    return kvc_expect_workspace("plan", &args->workspace, kvc_plan_workspace(n, s));
}

/* Checks the tokens of list i and counts them. */
static kvc_status read_list(const job *j, int64_t i) {
    const kvc_plan_args *args = j->args;
    const uint8_t *kept = (const uint8_t *)args->kept.data + i * j->s,
                  *fixed = (const uint8_t *)args->fixed.data + i * j->s;
    const float *importance = (const float *)args->importance.data + i * j->s;
    const double whole = kvc_plan_option_of(j, i, TOP, TOP).distortion;
    list *l = &j->lists[i];
    memset(l, 0, sizeof *l);
    for (int64_t t = 0; t < j->s; t++) {
        KVC_CHECK(importance[t] >= 0.0f && isfinite(importance[t]), KVC_EINVAL,
                  "plan: importance: expected finite values >= 0, got %g at list %lld, token %lld",
                  (double)importance[t], (long long)i, (long long)t);
        KVC_CHECK(kept[t] <= 1, KVC_EINVAL, "plan: kept: expected 0 or 1, got %d at list %lld, token %lld", kept[t],
                  (long long)i, (long long)t);
        KVC_CHECK(fixed[t] <= (kept[t] ? 2 : 0), KVC_EINVAL,
                  "plan: fixed: expected 0, 1 or 2, and 0 where kept is 0, got %d at list %lld, token %lld", fixed[t],
                  (long long)i, (long long)t);
        KVC_CHECK(!kept[t] || fixed[t] == 2 || l->window == 0, KVC_EINVAL,
                  "plan: fixed: expected window tokens (2) after all others that are kept, got token %lld of list %lld "
                  "after one",
                  (long long)t, (long long)i);
        if (!kept[t]) continue;
        l->candidates += !fixed[t];
        l->sinks += fixed[t] == 1;
        l->window += fixed[t] == 2;
        if (fixed[t])
            l->fixed_error += (double)importance[t] * whole;
        else
            l->importance += (double)importance[t];
    }
    const int64_t candidates = l->candidates;
    const int64_t least = kvc_given(&args->groups)         ? candidates
                          : kvc_given(&args->least_tokens) ? ((const int32_t *)args->least_tokens.data)[i]
                                                           : 0;
    const int64_t guard = kvc_given(&args->guard) ? ((const int32_t *)args->guard.data)[i] : candidates;
    l->runs = (int32_t)kvc_ceil_div(candidates, RUN);
    l->last_tokens = (int32_t)(candidates - (int64_t)(l->runs - 1) * RUN);
    l->required = (int32_t)kvc_ceil_div(least < candidates ? least : candidates, RUN);
    l->guarded = guard >= candidates ? l->runs : (int32_t)(guard / RUN);
    l->last_tail_bytes =
        l->runs == 0
            ? 0
            : (kvc_ceil_div(l->sinks + l->last_tokens, KVC_TAIL_TOKENS) - kvc_ceil_div(l->sinks, KVC_TAIL_TOKENS)) *
                  j->tail_bytes;
    make_levels(j, i, l);
    KVC_CHECK(
        l->required <= l->guarded || (l->least && l->least != l->whole), KVC_EINVAL,
        "plan: guard: expected room for the least_tokens of list %lld, for which only (16, 16) is allowed, got %lld",
        (long long)i, (long long)guard);
    return KVC_OK;
}

kvc_status kvc_plan_expect_budget(const job *j, int64_t least) {
    const int64_t budget = j->args->budget;
    if (budget < 0 || budget >= least) return KVC_OK;
    j->args->summary->least_bytes = least;
    return kvc_fail(KVC_EBUDGET, "plan: budget: expected at least %lld bytes, got %lld", (long long)least,
                    (long long)budget);
}

static kvc_status by_runs(job *j) {
    int64_t least = 0, most = 0;
    for (int64_t i = 0; i < j->n; i++) {
        const list *l = &j->lists[i];
        least += kvc_plan_fixed_bytes(j, l);
        most += kvc_plan_fixed_bytes(j, l);
        for (int64_t r = 0; r < l->runs; r++) {
            const int from = least_of(l, r);
            j->level[i * j->most_runs + r] = (uint8_t)from;
            least += run_bytes(l, r, from);
            most += run_bytes(l, r, best_of(l, r, from));
        }
    }
    kvc_plan_summary summary = {.least_bytes = least < most ? least : most, .most_bytes = most};
    KVC_TRY(kvc_plan_expect_budget(j, summary.least_bytes));
    kvc_parallel(sorters(j->n), 0, rank_lists, j);
    if (j->args->budget < 0 || j->args->budget >= most) {
        for (int64_t i = 0; i < j->n; i++)
            for (int64_t r = 0; r < j->lists[i].runs; r++) {
                uint8_t *level = &j->level[i * j->most_runs + r];
                *level = (uint8_t)best_of(&j->lists[i], r, *level);
            }
    } else {
        kvc_plan_spend(j, j->args->budget - least);
    }
    account(j, &summary);
    kvc_parallel(j->n, 0, write_list, j);
    *j->args->summary = summary;
    return KVC_OK;
}

kvc_status kvc_plan_cpu(const kvc_plan_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(check(args));
    job j = {.args = args, .n = args->k_bits.shape[0], .s = args->k_bits.shape[1]};
    j.most_runs = most_runs(j.s);
    j.tail_bytes = kvc_page_bytes(&args->layout, 16, 16) + args->entry_bytes;
    carve(&j);
    for (int64_t i = 0; i < j.n; i++) KVC_TRY(read_list(&j, i));
    return kvc_given(&args->groups) ? kvc_plan_by_groups(&j) : by_runs(&j);
}
