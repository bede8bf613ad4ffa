/* score.c: attention of an observation window over all keys, on the CPU.
 *
 * Work is cut into items by shapes alone, so the result does not depend on the number of threads. Keys of 64 tokens are
 * turned to [channel][token], so that one loop serves four query rows of any head of the group. The first pass leaves
 * every row's maximum and denominator: an item is a band of rows and a part of the keys, more parts where rows are few.
 * A merge joins the parts. The second pass computes the logits again and adds the probabilities up by token: an item is
 * a chunk of tokens. Both skip the rows that see nothing of a tile, and no row looks at keys that its band cannot see.
 */
#include "kvcomp/score.h"

#include <math.h>
#include <string.h>

#include "cpu/score_block.h"

#define CHUNK KVC_SCORE_CHUNK
#define BLOCK 64 /* rows converted at once */
#define BAND 512 /* rows of an item of the first pass */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t first_of(const kvc_score_args *args, int64_t b) {
    return kvc_given(&args->first) ? ((const int32_t *)args->first.data)[b] : 0;
}

static kvc_score_head head_at(const kvc_score_job *j, int64_t i) {
    const int64_t first = first_of(j->args, i / j->h), real = j->s - first, used = real < j->w ? real : j->w;
    kvc_score_head view = {.b = i / j->h, .h = i % j->h, .first = first, .used = used, .rows = j->group * used};
    view.part_most = (float *)j->args->workspace.data + i * kvc_score_head_floats(j->padded, j->s);
    view.part_total = view.part_most + j->padded * j->parts;
    view.most = view.part_total + j->padded * j->parts;
    view.share = view.most + j->padded;
    view.sums = view.share + j->padded;
    return view;
}

/* ---- rows and keys as the loops want them */

/* rows[BLOCK][d] from row r on, those from view->rows on zero. */
static void load_rows(const kvc_score_job *j, const kvc_score_head *view, int64_t r, float *rows) {
    for (int64_t i = 0; i < BLOCK; i++, r++) {
        if (r < view->rows)
            kvc_load_row(
                rows + i * j->d,
                kvc_at(&j->args->queries, view->b, view->h * j->group + r % j->group, j->w - view->used + r / j->group),
                j->args->queries.dtype, j->d);
        else
            memset(rows + i * j->d, 0, (size_t)j->d * sizeof *rows);
    }
}

/* keys[tiles][d][KVC_SCORE_TILE] of tokens begin .. begin+count-1, zeros after them. */
static void load_keys(const kvc_score_job *j, const kvc_score_head *view, int64_t begin, int count, float *keys) {
    float row[KVC_MAX_HEAD_DIM];
    for (int t = 0; t < (count + KVC_SCORE_TILE - 1) / KVC_SCORE_TILE * KVC_SCORE_TILE; t++) {
        if (t < count)
            kvc_load_row(row, kvc_at(&j->args->keys, view->b, view->h, begin + t), j->args->keys.dtype, j->d);
        else if (t == count)
            memset(row, 0, sizeof row);
        float *out = keys + t / KVC_SCORE_TILE * KVC_SCORE_TILE * j->d + t % KVC_SCORE_TILE;
        for (int64_t c = 0; c < j->d; c++) out[c * KVC_SCORE_TILE] = row[c];
    }
}

/* ---- passes */

typedef struct {
    float keys[CHUNK * KVC_MAX_HEAD_DIM] __attribute__((aligned(64)));
    float rows[BLOCK * KVC_MAX_HEAD_DIM] __attribute__((aligned(64)));
} scratch;

static void first_pass(void *context, int64_t item) {
    const kvc_score_job *j = context;
    const int64_t band = j->bands - 1 - item % j->bands, part = item / j->bands % j->parts; /* the longest first */
    const kvc_score_head view = head_at(j, item / j->bands / j->parts);
    const int64_t low = band * BAND, high = least(low + BAND, view.rows);
    float *most = view.part_most + part * j->padded, *total = view.part_total + part * j->padded;
    for (int64_t r = low; r < least(low + BAND, j->padded); r++) {
        most[r] = -INFINITY;
        total[r] = 0.0f;
    }
    if (low >= high) return;
    const int64_t start = part * j->step, seen = j->s - view.used + (high - 1) / j->group + 1;
    const int64_t end = least(least(start + j->step, j->s), seen);
    scratch x;
    bool finite = true;
    for (int64_t begin = start > view.first ? start : view.first; begin < end; begin += CHUNK) {
        const int count = (int)least(end - begin, CHUNK);
        const int64_t row = kvc_score_first_row(j, &view, begin);
        load_keys(j, &view, begin, count, x.keys);
        for (int64_t r = low > row ? low : row; r < high; r += BLOCK) {
            load_rows(j, &view, r, x.rows);
            finite = j->blocks->first(j, &view, r, least(r + BLOCK, high), begin, count, x.rows, x.keys, most, total) &&
                     finite;
        }
    }
    if (!finite) total[low] = NAN;
}

static void merge(void *context, int64_t i) {
    const kvc_score_job *j = context;
    const kvc_score_head view = head_at(j, i);
    for (int64_t r = 0; r < view.rows; r++) {
        float most = -INFINITY;
        double total = 0.0;
        for (int64_t p = 0; p < j->parts; p++)
            most = view.part_most[p * j->padded + r] > most ? view.part_most[p * j->padded + r] : most;
        for (int64_t p = 0; p < j->parts; p++) {
            const double part = view.part_total[p * j->padded + r];
            if (part != 0.0) total += part * exp((double)view.part_most[p * j->padded + r] - (double)most);
        }
        view.most[r] = most;
        view.share[r] = (float)(1.0 / total);
    }
}

static void second_pass(void *context, int64_t item) {
    const kvc_score_job *j = context;
    const kvc_score_head view = head_at(j, item / j->chunks);
    const int64_t start = item % j->chunks * CHUNK, end = least(start + CHUNK, j->s);
    const int64_t begin = start > view.first ? start : view.first;
    if (begin >= end) return;
    const int count = (int)(end - begin);
    scratch x;
    double sums[CHUNK] = {0};
    load_keys(j, &view, begin, count, x.keys);
    for (int64_t r = kvc_score_first_row(j, &view, begin); r < view.rows; r += BLOCK) {
        load_rows(j, &view, r, x.rows);
        j->blocks->second(j, &view, r, least(r + BLOCK, view.rows), begin, count, x.rows, x.keys, sums);
    }
    for (int t = 0; t < count; t++) view.sums[begin + t] = (float)sums[t];
}

/* Averages or maxima of raw[begin .. end) over `pool` tokens, those outside left out, times factor. */
static void pool(const kvc_score_args *args, const float *raw, int64_t begin, int64_t end, double factor, float *out) {
    const int64_t half = args->pool / 2;
    for (int64_t t = begin; t < end; t++) {
        const int64_t low = t - half > begin ? t - half : begin, high = t + half < end - 1 ? t + half : end - 1;
        double value = 0.0;
        for (int64_t k = low; k <= high; k++)
            value = args->pool_kind == KVC_POOL_AVG ? value + raw[k] : raw[k] > value ? raw[k] : value;
        if (args->pool_kind == KVC_POOL_AVG) value /= (double)(high - low + 1);
        out[t] = (float)(value * factor);
    }
}

static void finish(void *context, int64_t i) {
    const kvc_score_job *j = context;
    const kvc_score_head view = head_at(j, i);
    float *out = (float *)j->args->importance.data + i * j->s;
    const int64_t window = j->s - view.used;
    if (j->args->reduce == KVC_REDUCE_SEEN)
        for (int64_t t = view.first; t < j->s; t++)
            view.sums[t] = (float)((double)view.sums[t] / (double)least(view.used, j->s - t));
    const double factor = 1.0 / (double)(j->args->reduce == KVC_REDUCE_MEAN ? view.rows : j->group);
    for (int64_t t = 0; t < view.first; t++) out[t] = 0.0f;
    pool(j->args, view.sums, view.first, window, factor, out);
    pool(j->args, view.sums, window, j->s, factor, out);
}

/* ---- the operation */

/* Rows begin .. of one sequence. */
static bool finite_from(const kvc_tensor *tensor, int64_t b, int64_t begin) {
    kvc_tensor view = *tensor;
    view.data = kvc_at(tensor, b, 0, begin);
    view.shape[0] = 1;
    view.shape[2] -= begin;
    return kvc_all_finite(&view);
}

/* Something made a logit that is not finite: says what. */
static kvc_status not_finite(const kvc_score_job *j, const kvc_score_head *view) {
    KVC_CHECK(finite_from(&j->args->queries, view->b, j->w - view->used), KVC_EINVAL,
              "score: queries: expected finite values, got NaN or infinity in sequence %lld", (long long)view->b);
    KVC_CHECK(finite_from(&j->args->keys, view->b, view->first), KVC_EINVAL,
              "score: keys: expected finite values, got NaN or infinity in sequence %lld", (long long)view->b);
    return kvc_fail(KVC_EINVAL, "score: queries: expected logits within float32, got an overflow in sequence %lld",
                    (long long)view->b);
}

kvc_status kvc_score_cpu(const kvc_score_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_score_check(args));
    const int64_t b = args->keys.shape[0], h = args->keys.shape[1], s = args->keys.shape[2];
    kvc_score_job j = {.args = args,
                       .tile = kvc_attend_tiles(),
                       .h = h,
                       .group = args->queries.shape[1] / h,
                       .w = args->queries.shape[2],
                       .s = s,
                       .d = args->keys.shape[3],
                       .chunks = kvc_ceil_div(s, CHUNK)};
    j.blocks = kvc_score_blocks_for(j.tile);
    j.padded = kvc_ceil_div(j.group * j.w, KVC_SCORE_ROWS) * KVC_SCORE_ROWS;
    j.bands = kvc_ceil_div(j.padded, BAND);
    j.step = kvc_score_step(j.padded, s);
    j.parts = kvc_ceil_div(s, j.step);
    kvc_parallel(b * h * j.parts * j.bands, 0, first_pass, &j);
    kvc_parallel(b * h, 0, merge, &j);
    for (int64_t i = 0; i < b * h; i++) {
        const kvc_score_head view = head_at(&j, i);
        for (int64_t r = 0; r < view.rows; r++)
            if (!isfinite(view.share[r])) return not_finite(&j, &view);
    }
    kvc_parallel(b * h * j.chunks, 0, second_pass, &j);
    kvc_parallel(b * h, 0, finish, &j);
    return KVC_OK;
}
