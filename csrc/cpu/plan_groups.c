/* plan_groups.c: bits per head or per layer: one class for all candidates of a group of lists.
 *
 * To the steps of plan.c a group is a list of one run, whose bytes and error are sums over its lists. Where there are
 * few groups such steps are coarse (a layer's may be a tenth of the budget), and what is left in the end is worth much
 * error: so few groups are also planned by a dynamic program over bytes, and the better plan is taken. */
#include <math.h>
#include <string.h>

#include "plan_job.h"

static int64_t pages_of(const kvc_plan_list *l, bool whole) {
    return whole ? kvc_ceil_div((int64_t)l->sinks + l->candidates, KVC_TAIL_TOKENS) -
                       kvc_ceil_div(l->sinks, KVC_TAIL_TOKENS) /* beyond those of the sinks */
                 : kvc_ceil_div(l->candidates, KVC_PAGE_TOKENS);
}

static kvc_plan_list *group_of(const kvc_plan_job *j, int64_t i) {
    return &j->groups[((const int32_t *)j->args->groups.data)[i]];
}

/* Groups and their members, in the order of lists. */
static void join(kvc_plan_job *j) {
    for (int64_t g = 0; g < j->n; g++) {
        memset(&j->groups[g], 0, sizeof j->groups[g]);
        j->groups[g].first_member = -1;
    }
    for (int64_t i = j->n - 1; i >= 0; i--) {
        kvc_plan_list *group = group_of(j, i);
        j->lists[i].next_member = group->first_member;
        group->first_member = i;
    }
}

/* The classes a group may have: from its cheapest one, *cheapest, those above it in both halves and within the one of
 * least error among them, *top. plan.c has refused lists without any. */
static int options_of(const kvc_plan_job *j, const kvc_plan_list *group, kvc_plan_option *options,
                      const kvc_plan_option **cheapest, const kvc_plan_option **top) {
    int count = 0;
    for (int k = 0; k < KVC_PLAN_LEVELS; k++)
        for (int v = 0; v < KVC_PLAN_LEVELS; v++) {
            const bool whole = k == KVC_PLAN_TOP && v == KVC_PLAN_TOP;
            bool possible = kvc_plan_allows(j, k, v);
            kvc_plan_option sum = {k, v, 0, 0.0};
            for (int64_t i = group->first_member; i >= 0 && possible; i = j->lists[i].next_member) {
                const kvc_plan_list *l = &j->lists[i];
                const kvc_plan_option one = kvc_plan_option_of(j, i, k, v);
                sum.bytes += pages_of(l, whole) * one.bytes;
                sum.distortion += l->importance * one.distortion;
                possible = !whole || l->guarded == l->runs;
            }
            if (possible) options[count++] = sum;
        }
    kvc_plan_option low = options[0], high;
    for (int o = 1; o < count; o++)
        if (options[o].bytes < low.bytes || (options[o].bytes == low.bytes && options[o].distortion < low.distortion))
            low = options[o];
    high = low;
    for (int o = 0; o < count; o++)
        if (kvc_plan_within(&low, &options[o]) &&
            (options[o].distortion < high.distortion ||
             (options[o].distortion == high.distortion && options[o].bytes < high.bytes)))
            high = options[o];
    int between = 0;
    for (int o = 0; o < count; o++) {
        if (!kvc_plan_within(&low, &options[o]) || !kvc_plan_within(&options[o], &high)) continue;
        options[between] = options[o];
        if (options[o].k == low.k && options[o].v == low.v) *cheapest = &options[between];
        if (options[o].k == high.k && options[o].v == high.v) *top = &options[between];
        between++;
    }
    return between;
}

/* Levels 1 .. of a group: always the class above in both halves that saves the most error per byte. */
static void make_levels(const kvc_plan_job *j, kvc_plan_list *group) {
    kvc_plan_option options[KVC_PLAN_CLASSES];
    const kvc_plan_option *cheapest = NULL, *top = NULL;
    const int count = options_of(j, group, options, &cheapest, &top);
    group->runs = group->levels = 1;
    for (const kvc_plan_option *o = cheapest; o; o = kvc_plan_steepest(options, count, o, top))
        kvc_plan_add_level(group, o);
    for (int level = 1; level + 1 < group->levels; level++) group->next[0][level] = level + 1;
}

/* ---- few groups */

static int64_t common_divisor(int64_t a, int64_t b) {
    while (b) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* What a group may cost above its smallest class, without classes that another one beats in bytes and error. */
static int choices_of(const kvc_plan_job *j, const kvc_plan_list *group, kvc_plan_option *choices) {
    kvc_plan_option options[KVC_PLAN_CLASSES];
    const kvc_plan_option *cheapest = NULL, *top = NULL;
    const int count = options_of(j, group, options, &cheapest, &top);
    int kept = 0;
    for (int o = 0; o < count; o++) {
        bool beaten = false;
        for (int p = 0; p < count && !beaten; p++)
            beaten = options[p].bytes <= options[o].bytes && options[p].distortion <= options[o].distortion &&
                     (options[p].bytes < options[o].bytes || options[p].distortion < options[o].distortion || p < o);
        if (beaten) continue;
        choices[kept] = options[o];
        choices[kept++].bytes -= cheapest->bytes;
    }
    return kept;
}

/* The bytes that costs are rounded up to: a divisor of them all where KVC_PLAN_UNITS of it reach from the smallest plan
 * to the best. */
static int64_t unit_of(const kvc_plan_job *j, int64_t range) {
    int64_t unit = 0;
    for (int64_t g = 0; g < j->n; g++) {
        kvc_plan_option choices[KVC_PLAN_CLASSES];
        const int count = j->groups[g].runs ? choices_of(j, &j->groups[g], choices) : 0;
        for (int o = 0; o < count; o++) unit = common_divisor(unit, choices[o].bytes);
    }
    return unit * kvc_ceil_div(range / unit, KVC_PLAN_UNITS);
}

/* Finds the classes of least error in `left` bytes above the smallest plan, and takes them, as level 0, where they are
 * better than the levels given. As costs are rounded up, by the same unit whatever is left, more bytes are never worse.
 */
static void spend_exactly(kvc_plan_job *j, int64_t left, int64_t range) {
    const int64_t unit = unit_of(j, range), units = left / unit;
    double *row = j->rows, *next = j->rows + KVC_PLAN_UNITS + 1, given = 0.0;
    kvc_plan_option choices[KVC_PLAN_CLASSES];
    for (int64_t u = 0; u <= units; u++) row[u] = 0.0;
    for (int64_t g = 0; g < j->n; g++) {
        const kvc_plan_list *group = &j->groups[g];
        uint8_t *chosen = j->choices + g * (KVC_PLAN_UNITS + 1);
        if (!group->runs) continue;
        given += group->distortion[j->level[g]];
        const int count = choices_of(j, group, choices);
        for (int64_t u = 0; u <= units; u++) next[u] = INFINITY;
        for (int o = 0; o < count; o++) {
            const int64_t cost = kvc_ceil_div(choices[o].bytes, unit);
            for (int64_t u = cost; u <= units; u++) {
                const double error = row[u - cost] + choices[o].distortion;
                chosen[u] = error < next[u] ? (uint8_t)o : chosen[u];
                next[u] = error < next[u] ? error : next[u];
            }
        }
        double *swap = row;
        row = next;
        next = swap;
    }
    if (row[units] >= given) return;
    for (int64_t g = j->n - 1, u = units; g >= 0; g--) {
        kvc_plan_list *group = &j->groups[g];
        if (!group->runs) continue;
        choices_of(j, group, choices);
        const kvc_plan_option *o = &choices[j->choices[g * (KVC_PLAN_UNITS + 1) + u]];
        group->k[0] = kvc_plan_bits[o->k];
        group->v[0] = kvc_plan_bits[o->v];
        group->bytes[0] = group->bytes[1] + o->bytes;
        group->distortion[0] = o->distortion;
        j->level[g] = 0;
        u -= kvc_ceil_div(o->bytes, unit);
    }
}

/* ---- the operation */

static void account(const kvc_plan_job *j, kvc_plan_summary *summary) {
    for (int64_t i = 0; i < j->n; i++) {
        const kvc_plan_list *l = &j->lists[i], *group = group_of(j, i);
        const int level = j->level[group - j->groups];
        summary->kept += (int64_t)l->candidates + l->sinks + l->window;
        summary->pages += pages_of(l, group->k[level] == 16 && group->v[level] == 16) +
                          kvc_ceil_div(l->sinks, KVC_TAIL_TOKENS) + kvc_ceil_div(l->window, KVC_TAIL_TOKENS);
        summary->bytes += kvc_plan_fixed_bytes(j, l);
        summary->error += l->fixed_error;
    }
    for (int64_t g = 0; g < j->n; g++) {
        summary->bytes += j->groups[g].bytes[j->level[g]];
        summary->error += j->groups[g].distortion[j->level[g]];
    }
}

static void write_list(void *context, int64_t i) {
    const kvc_plan_job *j = context;
    const kvc_plan_list *group = group_of(j, i);
    const int level = j->level[group - j->groups];
    const uint8_t *fixed = (const uint8_t *)j->args->fixed.data + i * j->s,
                  *kept = (const uint8_t *)j->args->kept.data + i * j->s;
    uint8_t *k = (uint8_t *)j->args->k_bits.data + i * j->s, *v = (uint8_t *)j->args->v_bits.data + i * j->s;
    for (int64_t t = 0; t < j->s; t++) {
        k[t] = fixed[t] ? 16 : kept[t] ? group->k[level] : 0;
        v[t] = fixed[t] ? 16 : kept[t] ? group->v[level] : 0;
    }
}

kvc_status kvc_plan_by_groups(kvc_plan_job *j) {
    join(j);
    int64_t least = 0, most = 0;
    for (int64_t i = 0; i < j->n; i++) least += kvc_plan_fixed_bytes(j, &j->lists[i]);
    most = least;
    for (int64_t g = 0; g < j->n; g++) {
        kvc_plan_list *group = &j->groups[g];
        if (group->first_member >= 0) make_levels(j, group);
        j->level[g] = group->runs ? 1 : 0;
        j->weight[g] = 1.0;
        least += group->bytes[j->level[g]];
        most += group->runs ? group->bytes[group->levels - 1] : 0;
    }
    KVC_TRY(kvc_plan_expect_budget(j, least));
    if (j->args->budget < 0 || j->args->budget >= most) {
        for (int64_t g = 0; g < j->n; g++) j->level[g] = (uint8_t)(j->groups[g].runs ? j->groups[g].levels - 1 : 0);
    } else {
        kvc_plan_job of_groups = *j;
        of_groups.lists = j->groups;
        of_groups.most_runs = 1;
        kvc_plan_spend(&of_groups, j->args->budget - least);
        if (j->n <= KVC_PLAN_FEW) spend_exactly(j, j->args->budget - least, most - least);
    }
    kvc_plan_summary summary = {.least_bytes = least, .most_bytes = most};
    account(j, &summary);
    kvc_parallel(j->n, 0, write_list, j);
    *j->args->summary = summary;
    return KVC_OK;
}
