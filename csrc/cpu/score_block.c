/* score_block.c: logits of four rows and 64 tokens, and what the two passes take from them, compiled for every
 * instruction set. */
#include "cpu/score_block.h"

#include <math.h>
#include <string.h>

#define LANES 16

#define INNER static inline __attribute__((always_inline))

typedef void dots_of(float *out, const float *rows, const float *keys, int64_t d);

/* out[KVC_SCORE_ROWS][KVC_SCORE_TILE] = rows[KVC_SCORE_ROWS][d] keys[d][KVC_SCORE_TILE], fp32, summed over channels in
 * order; `wide` vectors of `bytes` at once: as many sums as registers hold, and registers as long as the machine's
 * (longer ones are kept in memory). */
#define DOTS(name, bytes, wide, ...)                                                                   \
    typedef float vector_##name __attribute__((vector_size(bytes)));                                   \
    __VA_ARGS__ static void dots_##name(float *out, const float *rows, const float *keys, int64_t d) { \
        for (int at = 0; at < KVC_SCORE_TILE; at += (wide) * (bytes) / 4) {                            \
            vector_##name sum[KVC_SCORE_ROWS][wide] = {{{0}}};                                         \
            for (int64_t c = 0; c < d; c++)                                                            \
                for (int v = 0; v < (wide); v++) {                                                     \
                    const vector_##name key =                                                          \
                        *(const vector_##name *)(keys + c * KVC_SCORE_TILE + at + v * (bytes) / 4);    \
                    for (int r = 0; r < KVC_SCORE_ROWS; r++) sum[r][v] += rows[r * d + c] * key;       \
                }                                                                                      \
            for (int r = 0; r < KVC_SCORE_ROWS; r++)                                                   \
                for (int v = 0; v < (wide); v++)                                                       \
                    *(vector_##name *)(out + r * KVC_SCORE_TILE + at + v * (bytes) / 4) = sum[r][v];   \
        }                                                                                              \
    }

/* Tokens of the tile that row r sees: those not after its own position, s - used + r / group. */
INNER int seen_by(const kvc_score_job *j, const kvc_score_head *view, int64_t r, int64_t begin, int count) {
    const int64_t seen = j->s - view->used + r / j->group + 1 - begin;
    return r >= view->rows || seen > count ? count : seen < 0 ? 0 : (int)seen;
}

/* Logits of rows r .. r+KVC_SCORE_ROWS-1, -INFINITY where not seen. False: one was not finite. */
INNER bool logits(const kvc_score_job *j, const kvc_score_head *view, int64_t r, int64_t begin, int count,
                  const float *rows, const float *keys, float out[KVC_SCORE_ROWS * KVC_SCORE_TILE],
                  dots_of *const dots) {
    dots(out, rows, keys, j->d);
    const float scale = j->args->scale, softcap = j->args->softcap;
    float check[LANES] = {0};
    for (int i = 0; i < KVC_SCORE_ROWS * KVC_SCORE_TILE; i += LANES)
        for (int k = 0; k < LANES; k++) {
            out[i + k] *= scale;
            check[k] += out[i + k] * 0.0f; /* NaN from the first infinity or NaN on */
        }
    bool finite = true;
    for (int k = 0; k < LANES; k++) finite = finite && check[k] == 0.0f;
    if (softcap > 0.0f)
        for (int i = 0; i < KVC_SCORE_ROWS * KVC_SCORE_TILE; i++) out[i] = softcap * tanhf(out[i] / softcap);
    for (int k = 0; k < KVC_SCORE_ROWS; k++)
        for (int t = seen_by(j, view, r + k, begin, count); t < KVC_SCORE_TILE; t++)
            out[k * KVC_SCORE_TILE + t] = -INFINITY;
    return finite;
}

INNER float largest(const float *values) {
    float most[LANES];
    memcpy(most, values, sizeof most);
    for (int i = LANES; i < KVC_SCORE_TILE; i += LANES)
        for (int k = 0; k < LANES; k++) most[k] = values[i + k] > most[k] ? values[i + k] : most[k];
    for (int k = 1; k < LANES; k++) most[0] = most[k] > most[0] ? most[k] : most[0];
    return most[0];
}

INNER float sum_of(const float *values) {
    float sum[LANES];
    memcpy(sum, values, sizeof sum);
    for (int i = LANES; i < KVC_SCORE_TILE; i += LANES)
        for (int k = 0; k < LANES; k++) sum[k] += values[i + k];
    for (int k = 1; k < LANES; k++) sum[0] += sum[k];
    return sum[0];
}

/* Rows low .. high-1 (a block that begins at `low`) and a chunk's tokens: maxima and denominators move on. False: a
 * logit was not finite. */
INNER bool first_block(const kvc_score_job *j, const kvc_score_head *view, int64_t low, int64_t high, int64_t begin,
                       int count, const float *rows, const float *keys, float *most, float *total,
                       dots_of *const dots) {
    _Alignas(64) float out[KVC_SCORE_ROWS * KVC_SCORE_TILE];
    bool finite = true;
    for (int at = 0; at < count; at += KVC_SCORE_TILE) {
        const int here = count - at < KVC_SCORE_TILE ? count - at : KVC_SCORE_TILE;
        const int64_t seen = kvc_score_first_row(j, view, begin + at);
        for (int64_t r = low > seen ? low : seen; r < high; r += KVC_SCORE_ROWS) {
            finite =
                logits(j, view, r, begin + at, here, rows + (r - low) * j->d, keys + at * j->d, out, dots) && finite;
            for (int64_t k = 0; k < KVC_SCORE_ROWS; k++) {
                const float top = largest(out + k * KVC_SCORE_TILE), now = top > most[r + k] ? top : most[r + k];
                if (now == -INFINITY) continue; /* nothing seen so far */
                j->tile->probabilities(now, out + k * KVC_SCORE_TILE);
                if (now != most[r + k]) total[r + k] *= expf(most[r + k] - now);
                total[r + k] += sum_of(out + k * KVC_SCORE_TILE);
                most[r + k] = now;
            }
        }
    }
    return finite;
}

/* The same rows and tokens: probabilities are added to the tokens' sums. */
INNER void second_block(const kvc_score_job *j, const kvc_score_head *view, int64_t low, int64_t high, int64_t begin,
                        int count, const float *rows, const float *keys, double *sums, dots_of *const dots) {
    _Alignas(64) float out[KVC_SCORE_ROWS * KVC_SCORE_TILE];
    for (int at = 0; at < count; at += KVC_SCORE_TILE) {
        const int here = count - at < KVC_SCORE_TILE ? count - at : KVC_SCORE_TILE;
        const int64_t seen = kvc_score_first_row(j, view, begin + at);
        float block[KVC_SCORE_TILE] = {0};
        for (int64_t r = low > seen ? low : seen; r < high; r += KVC_SCORE_ROWS) {
            logits(j, view, r, begin + at, here, rows + (r - low) * j->d, keys + at * j->d, out, dots);
            for (int64_t k = 0; k < KVC_SCORE_ROWS && r + k < view->rows; k++) {
                j->tile->probabilities(view->most[r + k], out + k * KVC_SCORE_TILE);
                for (int t = 0; t < KVC_SCORE_TILE; t++) block[t] += out[k * KVC_SCORE_TILE + t] * view->share[r + k];
            }
        }
        for (int t = 0; t < KVC_SCORE_TILE; t++) sums[at + t] += (double)block[t];
    }
}

#define BLOCKS(name, bytes, wide, ...)                                                                                 \
    DOTS(name, bytes, wide, __VA_ARGS__)                                                                               \
    __VA_ARGS__ static bool first_##name(const kvc_score_job *j, const kvc_score_head *view, int64_t low,              \
                                         int64_t high, int64_t begin, int count, const float *rows, const float *keys, \
                                         float *most, float *total) {                                                  \
        return first_block(j, view, low, high, begin, count, rows, keys, most, total, dots_##name);                    \
    }                                                                                                                  \
    __VA_ARGS__ static void second_##name(const kvc_score_job *j, const kvc_score_head *view, int64_t low,             \
                                          int64_t high, int64_t begin, int count, const float *rows,                   \
                                          const float *keys, double *sums) {                                           \
        second_block(j, view, low, high, begin, count, rows, keys, sums, dots_##name);                                 \
    }                                                                                                                  \
    static const kvc_score_blocks blocks_##name = {first_##name, second_##name};

BLOCKS(base, 16, 2)
#ifdef KVC_HAVE_X86_ISAS
BLOCKS(avx2, 32, 2, __attribute__((target("avx2,fma"))))
BLOCKS(avx512, 64, 4, __attribute__((target("avx512f,prefer-vector-width=512"))))
#endif

const kvc_score_blocks *kvc_score_blocks_for(const kvc_attend_tile *tile) {
#ifdef KVC_HAVE_X86_ISAS
    if (strcmp(tile->name, "avx512") == 0) return &blocks_avx512;
    if (strcmp(tile->name, "avx2") == 0) return &blocks_avx2;
#endif
    (void)tile;
    return &blocks_base;
}
