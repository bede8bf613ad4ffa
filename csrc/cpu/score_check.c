/* score_check.c: what score, norms and accumulate refuse, and score's workspace: the same for CPU and CUDA. What only
 * the data can tell is looked at on the CPU alone: a device would have to be waited for. */
#include "cpu/score_check.h"

#include <float.h>
#include <math.h>

#include "core/core.h"

#define SPREAD 8192 /* rows times parts of the CPU's first pass do not exceed this, or there is one part */
#define LANES 16    /* floats that a head's part of the CPU's workspace is a multiple of */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- score's workspace */

int64_t kvc_score_step(int64_t padded, int64_t s) {
    const int64_t chunks = kvc_ceil_div(s, KVC_SCORE_CHUNK), most = SPREAD / padded;
    return kvc_ceil_div(chunks, most < 1 ? 1 : least(most, chunks)) * KVC_SCORE_CHUNK;
}

int64_t kvc_score_head_floats(int64_t padded, int64_t s) {
    return kvc_ceil_div(2 * padded * (kvc_ceil_div(s, kvc_score_step(padded, s)) + 1) + s, LANES) * LANES;
}

/* What CUDA needs at most, however the hq heads are grouped: a pair of floats by row, a pair by row and part of the
 * keys, a float by token and part of the rows. A pass is cut into at most BLOCKS * WAVES blocks, or not at all,
 * or the second one into as many parts of the rows as a group has heads. */
static int64_t cuda_floats(int64_t b, int64_t hq, int64_t w, int64_t s) {
    const int64_t spread = (int64_t)KVC_SCORE_BLOCKS * KVC_SCORE_WAVES * KVC_SCORE_BLOCK_ROWS;
    const int64_t rows = b * hq * w, tokens = b * hq * s;
    const int64_t row_parts = least(greatest(rows, spread), rows * kvc_ceil_div(s, KVC_SCORE_TILE_ROWS));
    const int64_t token_parts = least(greatest(tokens, spread), tokens * kvc_ceil_div(w, KVC_SCORE_TILE_ROWS));
    return 2 * b * hq * (w + 63) + 2 * row_parts + token_parts;
}

int64_t kvc_score_workspace(int64_t b, int64_t hq, int64_t w, int64_t s, int64_t d) {
    (void)d;
    if (b == 0 || hq == 0 || w == 0 || s == 0) return 0;
    const double heads = (double)b * (double)hq;
    if (heads * 4.0 * (4.0 * ((double)w + KVC_SCORE_ROWS) + 2.0 * SPREAD + (double)s + LANES) > 0x1p61 ||
        heads * (double)w * (double)s > 0x1p61)
        return INT64_MAX;
    /* A group of g heads needs no more than g heads alone do. */
    const int64_t padded = kvc_ceil_div(w, KVC_SCORE_ROWS) * KVC_SCORE_ROWS;
    return greatest(b * hq * kvc_score_head_floats(padded, s), cuda_floats(b, hq, w, s)) * (int64_t)sizeof(float);
}

/* ---- checks */

static kvc_status check_first(const char *op, const kvc_tensor *first, int64_t b, int64_t s) {
    if (!kvc_given(first)) return KVC_OK;
    KVC_TRY(kvc_expect_array(op, "first", first, KVC_INT32, 1, (int64_t[]){b}));
    for (int64_t i = 0; first->device == KVC_CPU && i < b; i++) {
        const int32_t token = ((const int32_t *)first->data)[i];
        KVC_CHECK(token >= 0 && token <= s, KVC_EINVAL, "%s: first: expected 0..%lld, got %d", op, (long long)s, token);
    }
    return KVC_OK;
}

kvc_status kvc_score_check(const kvc_score_args *args) {
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
    KVC_TRY(check_first("score", &args->first, b, s));
    KVC_CHECK(isfinite(args->scale), KVC_EINVAL, "score: scale: expected a finite number, got %g", (double)args->scale);
    KVC_CHECK(isfinite(args->softcap) && args->softcap >= 0.0f, KVC_EINVAL,
              "score: softcap: expected a finite number >= 0, got %g", (double)args->softcap);
    KVC_CHECK(args->reduce >= KVC_REDUCE_SUM && args->reduce <= KVC_REDUCE_SEEN, KVC_EINVAL,
              "score: reduce: expected 0 (sum), 1 (mean) or 2 (mean over the rows that see the token), got %d",
              args->reduce);
    KVC_CHECK(args->pool_kind == KVC_POOL_AVG || args->pool_kind == KVC_POOL_MAX, KVC_EINVAL,
              "score: pool_kind: expected 0 (average) or 1 (maximum), got %d", args->pool_kind);
    KVC_CHECK(args->pool >= 1 && args->pool % 2 == 1, KVC_EINVAL, "score: pool: expected an odd width >= 1, got %d",
              args->pool);
    return kvc_expect_workspace("score", &args->workspace, kvc_score_workspace(b, hq, w, s, d));
}

kvc_status kvc_norms_check(const kvc_norms_args *args) {
    KVC_TRY(kvc_expect_shape("norms", "rows", &args->rows, 4, (int64_t[]){-1, -1, -1, -1}));
    KVC_TRY(kvc_expect_float("norms", "rows", &args->rows));
    const int64_t b = args->rows.shape[0], s = args->rows.shape[2], d = args->rows.shape[3];
    KVC_CHECK(d >= 1 && d <= KVC_MAX_HEAD_DIM, KVC_ESHAPE, "norms: rows: expected 1..%d channels, got %lld",
              KVC_MAX_HEAD_DIM, (long long)d);
    KVC_TRY(kvc_expect_rows("norms", "rows", &args->rows));
    KVC_TRY(kvc_expect_array("norms", "out", &args->out, KVC_FLOAT32, 3, args->rows.shape));
    KVC_TRY(check_first("norms", &args->first, b, s));
    KVC_CHECK(args->centered == 0 || args->centered == 1, KVC_EINVAL, "norms: centered: expected 0 or 1, got %d",
              args->centered);
    return KVC_OK;
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
    const kvc_list *list = (const kvc_list *)args->lists.data + i;
    const int64_t capacity = args->table.shape[1], room = args->mass.shape[1];
    const kvc_page *row = (const kvc_page *)args->table.data + i * capacity;
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

kvc_status kvc_accumulate_check(const kvc_accumulate_args *args) {
    KVC_TRY(kvc_expect_array("accumulate", "table", &args->table, KVC_UINT64, 2, (int64_t[]){-1, -1}));
    const int64_t n = args->table.shape[0];
    KVC_TRY(kvc_expect_array("accumulate", "worth", &args->worth, KVC_FLOAT32, 2, args->table.shape));
    KVC_TRY(kvc_expect_array("accumulate", "mass", &args->mass, KVC_FLOAT32, 2, (int64_t[]){n, -1}));
    KVC_TRY(kvc_expect_array("accumulate", "lists", &args->lists, KVC_INT32, 2, (int64_t[]){n, 4}));
    KVC_CHECK(args->keep >= 0.0f && args->keep <= 1.0f, KVC_EINVAL, "accumulate: keep: expected 0..1, got %g",
              (double)args->keep);
    KVC_CHECK(args->gain >= 0.0f && isfinite(args->gain), KVC_EINVAL,
              "accumulate: gain: expected a finite number >= 0, got %g", (double)args->gain);
    for (int64_t i = 0; args->table.device == KVC_CPU && i < n; i++) KVC_TRY(check_list(args, i));
    return KVC_OK;
}
