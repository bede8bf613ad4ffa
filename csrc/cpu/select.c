/* select.c: which tokens a list keeps, and how layers share a budget. */
#include "kvcomp/select.h"

#include <math.h>
#include <string.h>

#include "cpu/select_list.h"

/* ---- kvc_select */

typedef struct {
    const kvc_select_args *args;
    int64_t s;
} job;

static int64_t first_of(const kvc_select_args *args, int64_t i) {
    return kvc_given(&args->first) ? ((const int32_t *)args->first.data)[i] : 0;
}

/* Non-negative floats order as their bits do. */
static uint32_t bits_of(float value) {
    uint32_t bits;
    value += 0.0f; /* -0 to +0 */
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

void kvc_top_count(const kvc_top *top, const uint8_t *kept, const float *importance, int64_t count,
                   uint32_t histogram[KVC_DIGITS]) {
    memset(histogram, 0, KVC_DIGITS * sizeof *histogram);
    for (int64_t t = 0; t < count; t++) {
        const uint32_t bits = bits_of(importance[t]);
        histogram[bits >> top->shift & (KVC_DIGITS - 1)] += !kept[t] && (bits & top->known) == top->threshold;
    }
}

uint32_t kvc_top_next(kvc_top *top, const uint32_t *histograms, int64_t lists) {
    for (uint32_t digit = KVC_DIGITS - 1;; digit--) {
        int64_t here = 0;
        for (int64_t i = 0; i < lists; i++) here += histograms[i * KVC_DIGITS + digit];
        if (here < top->equal) {
            top->equal -= here;
            continue;
        }
        top->threshold |= digit << top->shift;
        top->known |= (uint32_t)(KVC_DIGITS - 1) << top->shift;
        top->shift -= KVC_DIGIT_BITS;
        return digit;
    }
}

void kvc_top_mark(const kvc_top *top, uint8_t *kept, const float *importance, int64_t count, int64_t equal) {
    for (int64_t t = 0; t < count; t++) {
        const uint32_t bits = bits_of(importance[t]);
        if (!kept[t]) kept[t] = bits > top->threshold || (bits == top->threshold && equal-- > 0);
    }
}

/* Marks the `count` most important of tokens begin .. end-1 (count <= end - begin), ties to the older. */
static void mark_top(uint8_t *kept, const float *importance, int64_t begin, int64_t end, int64_t count) {
    if (count <= 0) return;
    kvc_top top = kvc_top_begin(count);
    while (top.shift >= 0) {
        uint32_t histogram[KVC_DIGITS];
        kvc_top_count(&top, kept + begin, importance + begin, end - begin, histogram);
        kvc_top_next(&top, histogram, 1);
    }
    kvc_top_mark(&top, kept + begin, importance + begin, end - begin, top.equal);
}

void kvc_select_list(uint8_t *kept, const float *importance, int64_t s, int64_t first, int64_t keep, int64_t most_sinks,
                     int64_t most_window) {
    keep = kvc_select_kept(s - first, keep, most_window);
    memset(kept, 0, (size_t)s);
    int64_t window = keep < most_window ? keep : most_window;
    const int64_t others = keep - window, sinks = others < most_sinks ? others : most_sinks;
    if (!importance) window = keep - sinks;
    memset(kept + s - window, 1, (size_t)window);
    memset(kept + first, 1, (size_t)sinks);
    if (importance) mark_top(kept, importance, first + sinks, s - window, others - sinks);
}

static void select_list(void *context, int64_t i) {
    const job *j = context;
    const kvc_select_args *args = j->args;
    const float *importance = kvc_given(&args->importance) ? (const float *)args->importance.data + i * j->s : NULL;
    kvc_select_list((uint8_t *)args->kept.data + i * j->s, importance, j->s, first_of(args, i),
                    ((const int32_t *)args->keep.data)[i], args->sinks, args->window);
}

kvc_status kvc_select_cpu(const kvc_select_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_select_check(args));
    const job j = {args, args->kept.shape[1]};
    kvc_parallel(args->kept.shape[0], 0, select_list, (void *)&j);
    return KVC_OK;
}

/* ---- kvc_select_share */

#define MOST_TOTAL ((int64_t)1 << 53) /* so that every count is exact in a double */

typedef struct {
    const double *weight;
    const int64_t *floor, *ceiling;
    int64_t layers, total;
    double unit;      /* of weights: the largest is 1, so that sums do not overflow */
    bool zero_weight; /* layers of weight 0 share what the others cannot hold, evenly */
} division;

/* Layer l's part at `level` tokens per unit of weight. Layers that do not take part stay at a bound. */
static double part(const division *d, int64_t l, double level) {
    const double low = (double)d->floor[l], high = (double)d->ceiling[l];
    if (d->zero_weight && d->weight[l] > 0.0) return high;
    const double x = d->zero_weight ? level : d->weight[l] / d->unit * level;
    return x < low ? low : x > high ? high : x;
}

static double parts(const division *d, double level) {
    double sum = 0.0;
    for (int64_t l = 0; l < d->layers; l++) sum += part(d, l, level);
    return sum;
}

/* The least double at which the parts reach the total. Bits of non-negative doubles order as they do. */
static double find_level(const division *d) {
    uint64_t low = 0, high = 0x7fefffffffffffff; /* of the largest double */
    double level = 0.0;
    while (low < high) {
        const uint64_t middle = low + (high - low) / 2;
        memcpy(&level, &middle, sizeof level);
        if (parts(d, level) >= (double)d->total)
            high = middle;
        else
            low = middle + 1;
    }
    memcpy(&level, &high, sizeof level);
    return level;
}

/* Whole tokens: rounded down, then one more to the largest remainders. */
static void round_parts(const division *d, double level, int64_t *shares) {
    int64_t left = d->total;
    for (int64_t l = 0; l < d->layers; l++) {
        shares[l] = (int64_t)part(d, l, level);
        left -= shares[l];
    }
    for (; left != 0; left += left > 0 ? -1 : 1) { /* < 0: a part was rounded up to a whole token */
        int64_t chosen = -1;
        double best = 0.0;
        for (int64_t l = 0; l < d->layers; l++) {
            if (left > 0 ? shares[l] >= d->ceiling[l] : shares[l] <= d->floor[l]) continue;
            const double lacks = part(d, l, level) - (double)shares[l], gain = left > 0 ? lacks : -lacks;
            if (chosen >= 0 && gain <= best) continue;
            chosen = l;
            best = gain;
        }
        shares[chosen] += left > 0 ? 1 : -1;
    }
}

kvc_status kvc_select_share(const kvc_share_args *args) {
    KVC_TRY(kvc_expect_array("share", "weight", &args->weight, KVC_FLOAT64, 1, (int64_t[]){-1}));
    const int64_t layers = args->weight.shape[0];
    KVC_TRY(kvc_expect_array("share", "shares", &args->shares, KVC_INT64, 1, &layers));
    KVC_TRY(kvc_expect_array("share", "floor", &args->floor, KVC_INT64, 1, &layers));
    KVC_TRY(kvc_expect_array("share", "ceiling", &args->ceiling, KVC_INT64, 1, &layers));
    KVC_CHECK(layers >= 1, KVC_ESHAPE, "share: weight: expected at least one layer, got none");
    KVC_CHECK(args->total >= 0 && args->total <= MOST_TOTAL, KVC_EINVAL, "share: total: expected 0..2^53, got %lld",
              (long long)args->total);
    division d = {.weight = args->weight.data,
                  .floor = args->floor.data,
                  .ceiling = args->ceiling.data,
                  .layers = layers,
                  .total = args->total};
    int64_t least = 0, most = 0, heavy = 0; /* heavy: the most that layers of weight > 0 leave room for */
    for (int64_t l = 0; l < layers; l++) {
        KVC_CHECK(d.weight[l] >= 0.0 && isfinite(d.weight[l]), KVC_EINVAL,
                  "share: weight: expected finite values >= 0, got %g for layer %lld", d.weight[l], (long long)l);
        KVC_CHECK(d.floor[l] >= 0 && d.floor[l] <= MOST_TOTAL, KVC_EINVAL,
                  "share: floor: expected 0..2^53, got %lld for layer %lld", (long long)d.floor[l], (long long)l);
        KVC_CHECK(d.ceiling[l] >= d.floor[l], KVC_EINVAL,
                  "share: ceiling: expected at least the floor %lld, got %lld for layer %lld", (long long)d.floor[l],
                  (long long)d.ceiling[l], (long long)l);
        const int64_t ceiling = d.ceiling[l] < MOST_TOTAL ? d.ceiling[l] : MOST_TOTAL;
        least = least + d.floor[l] < MOST_TOTAL ? least + d.floor[l] : MOST_TOTAL + 1;
        most = most + ceiling < MOST_TOTAL ? most + ceiling : MOST_TOTAL;
        heavy = heavy + (d.weight[l] > 0.0 ? ceiling : d.floor[l]);
        heavy = heavy < MOST_TOTAL ? heavy : MOST_TOTAL;
        d.unit = d.weight[l] > d.unit ? d.weight[l] : d.unit;
    }
    KVC_CHECK(d.unit > 0.0, KVC_EINVAL, "share: weight: expected at least one value > 0, got only zeros");
    for (int64_t l = 0; l < layers; l++) /* else no level of a double brings the lightest layer to its ceiling */
        KVC_CHECK(d.weight[l] == 0.0 || d.weight[l] / d.unit > 1e-200, KVC_EINVAL,
                  "share: weight: expected 0 or more than 1e-200 of the largest, %g, got %g for layer %lld", d.unit,
                  d.weight[l], (long long)l);
    KVC_CHECK(args->total >= least && args->total <= most, KVC_EINVAL,
              "share: total: expected %lld..%lld (sums of floor and ceiling), got %lld", (long long)least,
              (long long)most, (long long)args->total);
    d.zero_weight = args->total > heavy;
    round_parts(&d, find_level(&d), args->shares.data);
    return KVC_OK;
}

/* ---- kvc_select_pyramid */

kvc_status kvc_select_pyramid(int32_t layers, double beta, double *weight) {
    KVC_CHECK(layers >= 1, KVC_EINVAL, "pyramid: weight: expected at least one layer, got %d", layers);
    KVC_CHECK(beta >= 1.0 && isfinite(beta), KVC_EINVAL, "pyramid: beta: expected a finite number >= 1, got %g", beta);
    const double least = 1.0 / beta, most = 2.0 - least;
    for (int32_t l = 0; l < layers; l++) weight[l] = layers == 1 ? 1.0 : most - (most - least) * l / (layers - 1);
    return KVC_OK;
}
