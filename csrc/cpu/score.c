/* score.c: attention of an observation window over all keys, on the CPU.
 *
 * Work is cut into items (sequence, KV head, chunk of 512 tokens) by shapes alone, so the result does not depend on the
 * number of threads. Keys of 64 tokens are turned to [channel][token], so that one loop serves four query rows of any
 * head of the group. The first pass leaves every row's maximum and denominator per chunk; a merge makes them the row's;
 * the second pass computes the logits again and adds the probabilities up by token. */
#include "kvcomp/score.h"

#include <math.h>
#include <string.h>

#include "cpu/attend_tile.h"

#define ROWS 4
#define TILE KVC_PAGE_TOKENS /* what `probabilities` of attend_tile.h takes at once */
#define CHUNK 512
#define LANES 16

typedef float lanes __attribute__((vector_size(4 * LANES)));

/* ---- logits of four rows and 64 tokens */

typedef void dots_fn(float *out, const float *rows, const float *keys, int64_t d);

/* out[ROWS][TILE] = rows[d][ROWS]^T keys[d][TILE], fp32, summed over channels in order. */
static inline __attribute__((always_inline)) void dots(float *out, const float *rows, const float *keys, int64_t d) {
    for (int at = 0; at < TILE; at += LANES) {
        lanes sum[ROWS] = {{0}};
        for (int64_t c = 0; c < d; c++) {
            const lanes key = *(const lanes *)(keys + c * TILE + at);
            for (int r = 0; r < ROWS; r++) sum[r] += rows[c * ROWS + r] * key;
        }
        for (int r = 0; r < ROWS; r++) *(lanes *)(out + r * TILE + at) = sum[r];
    }
}

static void dots_base(float *out, const float *rows, const float *keys, int64_t d) { dots(out, rows, keys, d); }

#ifdef KVC_HAVE_X86_ISAS
__attribute__((target("avx2,fma"))) static void dots_avx2(float *out, const float *rows, const float *keys, int64_t d) {
    dots(out, rows, keys, d);
}
__attribute__((target("avx512f"))) static void dots_avx512(float *out, const float *rows, const float *keys,
                                                           int64_t d) {
    dots(out, rows, keys, d);
}
#endif

static dots_fn *dots_for(const kvc_attend_tile *tile) {
#ifdef KVC_HAVE_X86_ISAS
    if (strcmp(tile->name, "avx512") == 0) return dots_avx512;
    if (strcmp(tile->name, "avx2") == 0) return dots_avx2;
#endif
    (void)tile;
    return dots_base;
}

/* ---- where things lie */

typedef struct {
    const kvc_score_args *args;
    const kvc_attend_tile *tile;
    dots_fn *dots;
    int64_t h, group, w, s, d;
    int64_t chunks, padded; /* rows of a KV head (group * w), up to a whole number of ROWS */
} job;

/* What the workspace holds for one (sequence, KV head). Row i is query head i % group, window query i / group, counted
 * from the first real one. */
typedef struct {
    int64_t b, h, first;
    int64_t used, rows;  /* window queries that are real; group * used */
    float *queries;      /* [padded / ROWS][d][ROWS], zero rows last */
    float *chunk_most;   /* [chunks][padded]: largest logit */
    float *chunk_total;  /* [chunks][padded]: sum of exp(logit - chunk_most); NaN where a logit was not finite */
    float *most, *share; /* [padded]: largest logit, 1 / sum of exp(logit - most); 0 for zero rows */
    float *sums;         /* [s]: probability by token */
} head;

static int64_t head_floats(int64_t padded, int64_t s, int64_t d) {
    return kvc_ceil_div(padded * (d + 2 * kvc_ceil_div(s, CHUNK) + 2) + s, LANES) * LANES;
}

int64_t kvc_score_workspace(int64_t b, int64_t hq, int64_t w, int64_t s, int64_t d) {
    const double rough =
        (double)b * (double)hq * 4.0 * (((double)w + ROWS) * ((double)d + (double)s / 128) + (double)s + LANES);
    if (rough > 0x1p61) return INT64_MAX;
    /* A group of g heads needs no more than g heads alone do. */
    return b * hq * head_floats(kvc_ceil_div(w, ROWS) * ROWS, s, d) * (int64_t)sizeof(float);
}

static int64_t first_of(const kvc_score_args *args, int64_t b) {
    return kvc_given(&args->first) ? ((const int32_t *)args->first.data)[b] : 0;
}

static head head_at(const job *j, int64_t i) {
    const int64_t first = first_of(j->args, i / j->h), real = j->s - first, used = real < j->w ? real : j->w;
    float *at = (float *)j->args->workspace.data + i * head_floats(j->padded, j->s, j->d);
    head view = {.b = i / j->h, .h = i % j->h, .first = first, .used = used, .rows = j->group * used};
    view.queries = at;
    view.chunk_most = view.queries + j->padded * j->d;
    view.chunk_total = view.chunk_most + j->padded * j->chunks;
    view.most = view.chunk_total + j->padded * j->chunks;
    view.share = view.most + j->padded;
    view.sums = view.share + j->padded;
    return view;
}

/* ---- passes */

static void arrange_queries(void *context, int64_t i) {
    const job *j = context;
    const head view = head_at(j, i);
    float row[KVC_MAX_HEAD_DIM];
    memset(view.queries, 0, (size_t)(j->padded * j->d) * sizeof(float));
    for (int64_t r = 0; r < view.rows; r++) {
        const int64_t query = j->w - view.used + r / j->group;
        kvc_load_row(row, kvc_at(&j->args->queries, view.b, view.h * j->group + r % j->group, query),
                     j->args->queries.dtype, j->d);
        float *out = view.queries + r / ROWS * ROWS * j->d + r % ROWS;
        for (int64_t c = 0; c < j->d; c++) out[c * ROWS] = row[c];
    }
}

/* keys[d][TILE] of tokens begin .. begin+count-1, zeros after them. */
static void load_keys(const job *j, const head *view, int64_t begin, int count, float *keys) {
    float row[KVC_MAX_HEAD_DIM];
    for (int t = 0; t < TILE; t++) {
        if (t < count)
            kvc_load_row(row, kvc_at(&j->args->keys, view->b, view->h, begin + t), j->args->keys.dtype, j->d);
        else if (t == count)
            memset(row, 0, sizeof row);
        for (int64_t c = 0; c < j->d; c++) keys[c * TILE + t] = row[c];
    }
}

/* Tokens of the tile that row r sees: those not after its own position, s - used + r / group. */
static int seen_by(const job *j, const head *view, int64_t r, int64_t begin, int count) {
    const int64_t seen = j->s - view->used + r / j->group + 1 - begin;
    return r >= view->rows || seen > count ? count : seen < 0 ? 0 : (int)seen;
}

/* Logits of rows r .. r+ROWS-1, -INFINITY where not seen. False: one was not finite. */
static bool logits(const job *j, const head *view, int64_t r, int64_t begin, int count, const float *keys,
                   float out[ROWS * TILE]) {
    j->dots(out, view->queries + r * j->d, keys, j->d);
    const float scale = j->args->scale, softcap = j->args->softcap;
    float check[LANES] = {0};
    for (int i = 0; i < ROWS * TILE; i += LANES)
        for (int k = 0; k < LANES; k++) {
            out[i + k] *= scale;
            check[k] += out[i + k] * 0.0f; /* NaN from the first infinity or NaN on */
        }
    bool finite = true;
    for (int k = 0; k < LANES; k++) finite = finite && check[k] == 0.0f;
    if (softcap > 0.0f)
        for (int i = 0; i < ROWS * TILE; i++) out[i] = softcap * tanhf(out[i] / softcap);
    for (int k = 0; k < ROWS; k++)
        for (int t = seen_by(j, view, r + k, begin, count); t < TILE; t++) out[k * TILE + t] = -INFINITY;
    return finite;
}

static float largest(const float *values) {
    float most[LANES];
    memcpy(most, values, sizeof most);
    for (int i = LANES; i < TILE; i += LANES)
        for (int k = 0; k < LANES; k++) most[k] = values[i + k] > most[k] ? values[i + k] : most[k];
    for (int k = 1; k < LANES; k++) most[0] = most[k] > most[0] ? most[k] : most[0];
    return most[0];
}

static float sum_of(const float *values) {
    float sum[LANES];
    memcpy(sum, values, sizeof sum);
    for (int i = LANES; i < TILE; i += LANES)
        for (int k = 0; k < LANES; k++) sum[k] += values[i + k];
    for (int k = 1; k < LANES; k++) sum[0] += sum[k];
    return sum[0];
}

/* The first row block that sees a tile: earlier ones end before it. */
static int64_t first_block(const job *j, const head *view, int64_t begin) {
    const int64_t query = begin - (j->s - view->used);
    return query <= 0 ? 0 : query * j->group / ROWS * ROWS;
}

static void first_pass(void *context, int64_t item) {
    const job *j = context;
    const head view = head_at(j, item / j->chunks);
    const int64_t chunk = item % j->chunks, end = (chunk + 1) * CHUNK < j->s ? (chunk + 1) * CHUNK : j->s;
    float *most = view.chunk_most + chunk * j->padded, *total = view.chunk_total + chunk * j->padded;
    for (int64_t r = 0; r < j->padded; r++) {
        most[r] = -INFINITY;
        total[r] = 0.0f;
    }
    _Alignas(64) float keys[KVC_MAX_HEAD_DIM * TILE], out[ROWS * TILE];
    bool finite = true;
    for (int64_t begin = chunk * CHUNK > view.first ? chunk * CHUNK : view.first; begin < end; begin += TILE) {
        const int count = end - begin < TILE ? (int)(end - begin) : TILE;
        load_keys(j, &view, begin, count, keys);
        for (int64_t r = first_block(j, &view, begin); r < view.rows; r += ROWS) {
            finite = logits(j, &view, r, begin, count, keys, out) && finite;
            for (int k = 0; k < ROWS; k++) {
                const float here = largest(out + k * TILE), now = here > most[r + k] ? here : most[r + k];
                if (now == -INFINITY) continue; /* nothing seen so far */
                j->tile->probabilities(now, out + k * TILE);
                total[r + k] = total[r + k] * expf(most[r + k] - now) + sum_of(out + k * TILE);
                most[r + k] = now;
            }
        }
    }
    if (!finite) total[0] = NAN;
}

static void merge(void *context, int64_t i) {
    const job *j = context;
    const head view = head_at(j, i);
    for (int64_t r = 0; r < j->padded; r++) {
        float most = -INFINITY;
        double total = 0.0;
        for (int64_t c = 0; c < j->chunks; c++)
            most = view.chunk_most[c * j->padded + r] > most ? view.chunk_most[c * j->padded + r] : most;
        for (int64_t c = 0; c < j->chunks; c++) {
            const double part = view.chunk_total[c * j->padded + r];
            if (part != 0.0) total += part * exp((double)view.chunk_most[c * j->padded + r] - (double)most);
        }
        view.most[r] = most;
        view.share[r] = r < view.rows ? (float)(1.0 / total) : 0.0f;
    }
}

static void second_pass(void *context, int64_t item) {
    const job *j = context;
    const head view = head_at(j, item / j->chunks);
    const int64_t chunk = item % j->chunks, end = (chunk + 1) * CHUNK < j->s ? (chunk + 1) * CHUNK : j->s;
    _Alignas(64) float keys[KVC_MAX_HEAD_DIM * TILE], out[ROWS * TILE];
    for (int64_t begin = chunk * CHUNK > view.first ? chunk * CHUNK : view.first; begin < end; begin += TILE) {
        const int count = end - begin < TILE ? (int)(end - begin) : TILE;
        float sums[TILE] = {0};
        load_keys(j, &view, begin, count, keys);
        for (int64_t r = first_block(j, &view, begin); r < view.rows; r += ROWS) {
            logits(j, &view, r, begin, count, keys, out);
            for (int k = 0; k < ROWS && r + k < view.rows; k++) {
                j->tile->probabilities(view.most[r + k], out + k * TILE);
                for (int t = 0; t < TILE; t++) sums[t] += out[k * TILE + t] * view.share[r + k];
            }
        }
        memcpy(view.sums + begin, sums, (size_t)count * sizeof(float));
    }
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
    const job *j = context;
    const head view = head_at(j, i);
    float *out = (float *)j->args->importance.data + i * j->s;
    const int64_t window = j->s - view.used;
    const double rows = (double)(j->args->reduce == KVC_REDUCE_MEAN ? view.rows : j->group);
    for (int64_t t = 0; t < view.first; t++) out[t] = 0.0f;
    pool(j->args, view.sums, view.first, window, 1.0 / rows, out);
    pool(j->args, view.sums, window, j->s, 1.0 / rows, out);
}

/* ---- the operation */

static kvc_status check(const kvc_score_args *args) {
    KVC_TRY(kvc_expect_shape("score", "queries", &args->queries, 4, (int64_t[]){-1, -1, -1, -1}));
    const int64_t b = args->queries.shape[0], hq = args->queries.shape[1], w = args->queries.shape[2],
                  d = args->queries.shape[3];
    KVC_TRY(kvc_expect_shape("score", "keys", &args->keys, 4, (int64_t[]){b, -1, -1, d}));
    const int64_t h = args->keys.shape[1], s = args->keys.shape[2];
    KVC_TRY(kvc_expect_float("score", "queries", &args->queries));
    KVC_TRY(kvc_expect_float("score", "keys", &args->keys));
    KVC_CHECK(d >= 1 && d <= KVC_MAX_HEAD_DIM, KVC_ESHAPE, "score: keys: expected 1..%d channels, got %lld",
              KVC_MAX_HEAD_DIM, (long long)d);
    KVC_CHECK(h >= 1 && hq >= 1 && hq % h == 0, KVC_ESHAPE,
              "score: queries: expected a multiple of the %lld KV heads of keys, got %lld heads", (long long)h,
              (long long)hq);
    KVC_CHECK(w >= 1 && w <= s, KVC_ESHAPE,
              "score: queries: expected a window of 1..%lld tokens (those of keys), got %lld", (long long)s,
              (long long)w);
    KVC_CHECK(s <= INT32_MAX, KVC_ESHAPE, "score: keys: expected at most 2^31 - 1 tokens, got %lld", (long long)s);
    KVC_TRY(kvc_expect_rows("score", "queries", &args->queries));
    KVC_TRY(kvc_expect_rows("score", "keys", &args->keys));
    KVC_TRY(kvc_expect_array("score", "importance", &args->importance, KVC_FLOAT32, 3, (int64_t[]){b, h, s}));
    if (kvc_given(&args->first))
        KVC_TRY(kvc_expect_array("score", "first", &args->first, KVC_INT32, 1, (int64_t[]){b}));
    for (int64_t i = 0; i < b; i++)
        KVC_CHECK(first_of(args, i) >= 0 && first_of(args, i) <= s, KVC_EINVAL,
                  "score: first: expected 0..%lld, got %lld", (long long)s, (long long)first_of(args, i));
    KVC_CHECK(isfinite(args->scale), KVC_EINVAL, "score: scale: expected a finite number, got %g", (double)args->scale);
    KVC_CHECK(isfinite(args->softcap) && args->softcap >= 0.0f, KVC_EINVAL,
              "score: softcap: expected a finite number >= 0, got %g", (double)args->softcap);
    KVC_CHECK(args->reduce == KVC_REDUCE_SUM || args->reduce == KVC_REDUCE_MEAN, KVC_EINVAL,
              "score: reduce: expected 0 (sum) or 1 (mean), got %d", args->reduce);
    KVC_CHECK(args->pool_kind == KVC_POOL_AVG || args->pool_kind == KVC_POOL_MAX, KVC_EINVAL,
              "score: pool_kind: expected 0 (average) or 1 (maximum), got %d", args->pool_kind);
    KVC_CHECK(args->pool >= 1 && args->pool % 2 == 1, KVC_EINVAL, "score: pool: expected an odd width >= 1, got %d",
              args->pool);
    return kvc_expect_workspace("score", &args->workspace, kvc_score_workspace(b, hq, w, s, d));
}

/* Rows begin .. of one sequence. */
static bool finite_from(const kvc_tensor *tensor, int64_t b, int64_t begin) {
    kvc_tensor view = *tensor;
    view.data = kvc_at(tensor, b, 0, begin);
    view.shape[0] = 1;
    view.shape[2] -= begin;
    return kvc_all_finite(&view);
}

/* Something made a logit that is not finite: says what. */
static kvc_status not_finite(const job *j, const head *view) {
    KVC_CHECK(finite_from(&j->args->queries, view->b, j->w - view->used), KVC_EINVAL,
              "score: queries: expected finite values, got NaN or infinity in sequence %lld", (long long)view->b);
    KVC_CHECK(finite_from(&j->args->keys, view->b, view->first), KVC_EINVAL,
              "score: keys: expected finite values, got NaN or infinity in sequence %lld", (long long)view->b);
    return kvc_fail(KVC_EINVAL, "score: queries: expected logits within float32, got an overflow in sequence %lld",
                    (long long)view->b);
}

kvc_status kvc_score_cpu(const kvc_score_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(check(args));
    const int64_t b = args->keys.shape[0], h = args->keys.shape[1], s = args->keys.shape[2];
    job j = {.args = args,
             .tile = kvc_attend_tiles(),
             .h = h,
             .group = args->queries.shape[1] / h,
             .w = args->queries.shape[2],
             .s = s,
             .d = args->keys.shape[3],
             .chunks = kvc_ceil_div(s, CHUNK)};
    j.dots = dots_for(j.tile);
    j.padded = kvc_ceil_div(j.group * j.w, ROWS) * ROWS;
    kvc_parallel(b * h, 0, arrange_queries, &j);
    kvc_parallel(b * h * j.chunks, 0, first_pass, &j);
    kvc_parallel(b * h, 0, merge, &j);
    for (int64_t i = 0; i < b * h; i++) {
        const head view = head_at(&j, i);
        for (int64_t r = 0; r < view.rows; r++)
            if (!isfinite(view.share[r])) return not_finite(&j, &view);
    }
    kvc_parallel(b * h * j.chunks, 0, second_pass, &j);
    kvc_parallel(b * h, 0, finish, &j);
    return KVC_OK;
}
