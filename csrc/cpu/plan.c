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
#include "kvcomp/plan.h"

#include <math.h>
#include <string.h>

#include "core/core.h"

#define RUN KVC_PAGE_TOKENS
#define SORTERS 64 /* how many lists are ranked at a time */
#define TOP (KVC_PLAN_LEVELS - 1)
#define LEVELS 10 /* a chain of classes rising in both halves has at most nine; 0 is dropped */
#define DIGIT_BITS 11
#define DIGITS (1 << DIGIT_BITS)
#define MOST_TABLE_BYTES (1 << 20)

static const uint8_t level_bits[KVC_PLAN_LEVELS] = {2, 3, 4, 8, 16};

/* One list. Level 0 is dropped, level l >= 1 the class (k[l], v[l]); both rise with the level. */
typedef struct {
    int32_t levels, least;   /* levels in use, 0 included; where tokens that must be kept begin */
    int32_t runs, required;  /* all, and those that must be kept: the first ones */
    int32_t guarded;         /* runs, from the first, that may be at (16, 16) */
    int32_t last_tokens;     /* of the last run */
    int32_t sinks, window;   /* fixed tokens */
    int32_t whole;           /* the level (16, 16), or 0 where it is not used */
    int32_t next[2][LEVELS]; /* [may be at (16, 16)]: the level after this one, or 0 */
    double distortion[LEVELS];
    int64_t bytes[LEVELS];   /* of a full run */
    int64_t last_tail_bytes; /* of the last run at (16, 16): what it adds to the list's pages of that class */
    double fixed_error;
    uint8_t k[LEVELS], v[LEVELS];
} list;

typedef struct {
    double gain; /* error saved per byte */
    int64_t run; /* index over all lists' rows of runs */
} step;

typedef struct {
    const kvc_plan_args *args;
    int64_t n, s, most_runs, tail_bytes; /* runs a list has at most; of a page of class (16, 16), its entry included */
    list *lists;
    double *weight; /* [n][most_runs]: sum of importance */
    uint8_t *level; /* [n][most_runs] */
    int32_t *order; /* [n][s]: candidates, the most important first */
    step *heap;
    int64_t heap_size;
    uint64_t *sorting; /* [SORTERS][2][s] */
} job;

/* ---- workspace */

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static int64_t sorters(int64_t n) { return n < SORTERS ? n : SORTERS; }

int64_t kvc_plan_workspace(int64_t n, int64_t s) {
    const double rough = (double)n * ((double)s * 5.0 + 1024.0 + sizeof(list)) + SORTERS * 16.0 * (double)s;
    if (rough > 0x1p61) return INT64_MAX;
    const int64_t runs = n * kvc_ceil_div(s, RUN);
    return aligned(n * (int64_t)sizeof(list)) + aligned(runs * (int64_t)sizeof(double)) + aligned(runs) +
           aligned(n * s * (int64_t)sizeof(int32_t)) + aligned(runs * (int64_t)sizeof(step)) +
           sorters(n) * 2 * s * (int64_t)sizeof(uint64_t);
}

static void carve(job *j) {
    char *at = j->args->workspace.data;
    const int64_t runs = j->n * j->most_runs;
    j->lists = (list *)at;
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

typedef struct {
    int k, v; /* columns of the distortion tables */
    int64_t bytes;
    double distortion;
} option;

static bool within(const option *a, const option *b) { return a->k <= b->k && a->v <= b->v; }

/* The option, among those within `top` in both halves, that saves the most per byte over what `from` is; NULL: none. */
static const option *steepest(const option *options, int count, const option *from, const option *top) {
    const option *best = NULL;
    double best_slope = 0.0;
    for (int i = 0; i < count; i++) {
        const option *o = &options[i];
        if (!within(o, top) || !within(from, o) || o->bytes <= from->bytes || o->distortion >= from->distortion)
            continue;
        const double slope = (from->distortion - o->distortion) / (double)(o->bytes - from->bytes);
        if (best && (slope < best_slope || (slope == best_slope && o->bytes >= best->bytes))) continue;
        best = o;
        best_slope = slope;
    }
    return best;
}

static void add_level(list *l, const option *o) {
    l->k[l->levels] = level_bits[o->k];
    l->v[l->levels] = level_bits[o->v];
    l->bytes[l->levels] = o->bytes;
    l->distortion[l->levels++] = o->distortion;
}

static option option_of(const job *j, int64_t i, int k, int v) {
    const kvc_plan_args *args = j->args;
    const float *dk = (const float *)args->distortion_k.data + i * KVC_PLAN_LEVELS;
    const float *dv = (const float *)args->distortion_v.data + i * KVC_PLAN_LEVELS;
    const int64_t bytes = kvc_page_bytes(&args->layout, level_bits[k], level_bits[v]) + args->entry_bytes;
    return (option){k, v, bytes, (double)dk[k] + (double)dv[v]};
}

static bool is_allowed(const job *j, int k, int v) {
    return ((const uint8_t *)j->args->allowed.data)[k * KVC_PLAN_LEVELS + v];
}

/* Levels 1 .. of packed classes, and the step from each, and from dropped, to the next. */
static void packed_levels(const job *j, int64_t i, list *l, double dropped) {
    option options[KVC_PLAN_LEVELS * KVC_PLAN_LEVELS];
    int count = 0;
    for (int k = 0; k < KVC_PLAN_LEVELS; k++)
        for (int v = 0; v < KVC_PLAN_LEVELS; v++)
            if (is_allowed(j, k, v) && !(k == TOP && v == TOP)) options[count++] = option_of(j, i, k, v);
    const option nothing = {0, 0, 0, dropped}, *best = NULL;
    for (int o = 0; o < count; o++)
        if (!best || options[o].distortion < best->distortion ||
            (options[o].distortion == best->distortion && options[o].bytes < best->bytes))
            best = &options[o];
    if (!best) return;
    const option *first = steepest(options, count, &nothing, best), *bound = first ? first : best, *cheapest = bound;
    for (int o = 0; o < count; o++)
        if (within(&options[o], bound) &&
            (options[o].bytes < cheapest->bytes ||
             (options[o].bytes == cheapest->bytes && options[o].distortion < cheapest->distortion)))
            cheapest = &options[o];
    for (const option *o = cheapest; o && o != bound; o = steepest(options, count, o, bound)) add_level(l, o);
    if (first) l->next[0][0] = l->levels;
    for (const option *o = bound; o; o = steepest(options, count, o, best)) add_level(l, o);
    for (int level = 1; level + 1 < l->levels; level++) l->next[0][level] = level + 1;
    l->least = 1;
}

/* The level (16, 16), after all others. It follows a level from which it saves more per byte than the packed step. */
static void whole_level(const job *j, int64_t i, list *l, double dropped) {
    option whole = option_of(j, i, TOP, TOP);
    whole.bytes = l->runs == 1 ? l->last_tail_bytes : RUN / KVC_TAIL_TOKENS * j->tail_bytes;
    const int packed = l->levels;
    if (is_allowed(j, TOP, TOP) && l->guarded > 0 && (packed == 1 || whole.distortion < l->distortion[packed - 1])) {
        l->whole = packed;
        add_level(l, &whole);
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

static int64_t fixed_bytes(const job *j, const list *l) {
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

static bool before(const step *a, const step *b) {
    return a->gain > b->gain || (a->gain == b->gain && a->run < b->run);
}

static void push(job *j, int64_t run, const offer *o) {
    const step added = {o->bytes > 0 ? o->saved / (double)o->bytes : INFINITY, run};
    int64_t at = j->heap_size++;
    for (; at > 0 && before(&added, &j->heap[(at - 1) / 2]); at = (at - 1) / 2) j->heap[at] = j->heap[(at - 1) / 2];
    j->heap[at] = added;
}

static int64_t pop(job *j) {
    const int64_t run = j->heap[0].run;
    const step moved = j->heap[--j->heap_size];
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < j->heap_size; at = child) {
        if (child + 1 < j->heap_size && before(&j->heap[child + 1], &j->heap[child])) child++;
        if (!before(&j->heap[child], &moved)) break;
        j->heap[at] = j->heap[child];
    }
    j->heap[at] = moved;
    return run;
}

/* Pushes the run's next step if it is open now and was not while the run before stood at `was`. */
static void open_step(job *j, int64_t run, int was) {
    const offer o = offer_of(j, run);
    const int ahead = run % j->most_runs ? j->level[run - 1] : LEVELS;
    if (o.level && o.level <= ahead && o.level > was) push(j, run, &o);
}

static void spend(job *j, int64_t left) {
    double room = INFINITY; /* what steps after one that did not fit may save, all together */
    j->heap_size = 0;
    for (int64_t i = 0; i < j->n; i++)
        for (int64_t r = 0; r < j->lists[i].runs; r++) open_step(j, i * j->most_runs + r, 0);
    while (j->heap_size > 0) {
        const int64_t run = pop(j);
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

static kvc_status check_table(const char *name, const kvc_tensor *tensor) {
    const float *values = tensor->data;
    const int64_t columns = tensor->ndim == 2 ? tensor->shape[1] : 1;
    for (int64_t i = 0; i < kvc_elements(tensor); i++)
        KVC_CHECK(values[i] >= 0.0f && isfinite(values[i]), KVC_EINVAL,
                  "plan: %s: expected finite values >= 0, got %g for list %lld", name, (double)values[i],
                  (long long)(i / columns));
    return KVC_OK;
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

static kvc_status check(const kvc_plan_args *args) {
    KVC_TRY(kvc_expect_array("plan", "k_bits", &args->k_bits, KVC_UINT8, 2, (int64_t[]){-1, -1}));
    const int64_t *shape = args->k_bits.shape, n = shape[0], s = shape[1], table[] = {n, KVC_PLAN_LEVELS};
    KVC_CHECK(s <= INT32_MAX, KVC_ESHAPE, "plan: k_bits: expected at most 2^31 - 1 tokens, got %lld", (long long)s);
    KVC_TRY(kvc_expect_array("plan", "v_bits", &args->v_bits, KVC_UINT8, 2, shape));
    KVC_TRY(kvc_expect_array("plan", "importance", &args->importance, KVC_FLOAT32, 2, shape));
    KVC_TRY(kvc_expect_array("plan", "kept", &args->kept, KVC_UINT8, 2, shape));
    KVC_TRY(kvc_expect_array("plan", "fixed", &args->fixed, KVC_UINT8, 2, shape));
    KVC_TRY(kvc_expect_array("plan", "distortion_k", &args->distortion_k, KVC_FLOAT32, 2, table));
    KVC_TRY(kvc_expect_array("plan", "distortion_v", &args->distortion_v, KVC_FLOAT32, 2, table));
    KVC_TRY(kvc_expect_array("plan", "drop", &args->drop, KVC_FLOAT32, 1, &n));
    KVC_TRY(kvc_expect_array("plan", "allowed", &args->allowed, KVC_UINT8, 2,
                             (int64_t[]){KVC_PLAN_LEVELS, KVC_PLAN_LEVELS}));
    KVC_TRY(kvc_expect_layout("plan", &args->layout));
    KVC_TRY(check_table("distortion_k", &args->distortion_k));
    KVC_TRY(check_table("distortion_v", &args->distortion_v));
    KVC_TRY(check_table("drop", &args->drop));
    KVC_TRY(check_counts("least_tokens", &args->least_tokens, n));
    KVC_TRY(check_counts("guard", &args->guard, n));
    KVC_CHECK(args->entry_bytes >= 0 && args->entry_bytes <= MOST_TABLE_BYTES, KVC_EINVAL,
              "plan: entry_bytes: expected 0..%d, got %lld", MOST_TABLE_BYTES, (long long)args->entry_bytes);
    KVC_CHECK(args->list_bytes >= 0 && args->list_bytes <= MOST_TABLE_BYTES, KVC_EINVAL,
              "plan: list_bytes: expected 0..%d, got %lld", MOST_TABLE_BYTES, (long long)args->list_bytes);
    KVC_CHECK(args->fixed_class == 0 || args->fixed_class == 1, KVC_EINVAL,
              "plan: fixed_class: expected 0 or 1, got %d", args->fixed_class);
    int classes = 0;
    for (int i = 0; i < KVC_PLAN_LEVELS * KVC_PLAN_LEVELS; i++) {
        const int value = ((const uint8_t *)args->allowed.data)[i];
        KVC_CHECK(value <= 1, KVC_EINVAL, "plan: allowed: expected 0 or 1, got %d", value);
        classes += value;
    }
    KVC_CHECK(classes >= 1, KVC_EINVAL, "plan: allowed: expected at least one class, got none");
    KVC_CHECK(!args->fixed_class || classes == 1, KVC_EINVAL,
              "plan: allowed: expected one class with fixed_class, got %d", classes);
    return kvc_expect_workspace("plan", &args->workspace, kvc_plan_workspace(n, s));
}

/* Checks the tokens of list i and counts them. */
static kvc_status read_list(const job *j, int64_t i) {
    const kvc_plan_args *args = j->args;
    const uint8_t *kept = (const uint8_t *)args->kept.data + i * j->s,
                  *fixed = (const uint8_t *)args->fixed.data + i * j->s;
    const float *importance = (const float *)args->importance.data + i * j->s;
    const double whole = option_of(j, i, TOP, TOP).distortion;
    list *l = &j->lists[i];
    memset(l, 0, sizeof *l);
    int64_t candidates = 0;
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
        candidates += !fixed[t];
        l->sinks += fixed[t] == 1;
        l->window += fixed[t] == 2;
        if (fixed[t]) l->fixed_error += (double)importance[t] * whole;
    }
    const int64_t least = kvc_given(&args->least_tokens) ? ((const int32_t *)args->least_tokens.data)[i] : 0;
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

kvc_status kvc_plan_cpu(const kvc_plan_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(check(args));
    job j = {.args = args, .n = args->k_bits.shape[0], .s = args->k_bits.shape[1]};
    j.most_runs = kvc_ceil_div(j.s, RUN);
    j.tail_bytes = kvc_page_bytes(&args->layout, 16, 16) + args->entry_bytes;
    carve(&j);
    int64_t least = 0, most = 0;
    for (int64_t i = 0; i < j.n; i++) {
        KVC_TRY(read_list(&j, i));
        const list *l = &j.lists[i];
        least += fixed_bytes(&j, l);
        most += fixed_bytes(&j, l);
        for (int64_t r = 0; r < l->runs; r++) {
            const int from = least_of(l, r);
            j.level[i * j.most_runs + r] = (uint8_t)from;
            least += run_bytes(l, r, from);
            most += run_bytes(l, r, best_of(l, r, from));
        }
    }
    kvc_plan_summary summary = {.least_bytes = least < most ? least : most, .most_bytes = most};
    if (args->budget >= 0 && args->budget < summary.least_bytes) {
        args->summary->least_bytes = summary.least_bytes;
        return kvc_fail(KVC_EBUDGET, "plan: budget: expected at least %lld bytes, got %lld",
                        (long long)summary.least_bytes, (long long)args->budget);
    }
    kvc_parallel(sorters(j.n), 0, rank_lists, &j);
    if (args->budget < 0 || args->budget >= most) {
        for (int64_t i = 0; i < j.n; i++)
            for (int64_t r = 0; r < j.lists[i].runs; r++) {
                uint8_t *level = &j.level[i * j.most_runs + r];
                *level = (uint8_t)best_of(&j.lists[i], r, *level);
            }
    } else {
        spend(&j, args->budget - least);
    }
    account(&j, &summary);
    kvc_parallel(j.n, 0, write_list, &j);
    *args->summary = summary;
    return KVC_OK;
}
