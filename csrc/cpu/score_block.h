/* score_block.h: score's inner loops, a block of rows over a chunk of tokens, one build per instruction set. */
#pragma once
#include "cpu/attend_tile.h"
#include "cpu/score_check.h"

#define KVC_SCORE_TILE KVC_PAGE_TOKENS /* what `probabilities` of attend_tile.h takes at once */

typedef struct kvc_score_blocks kvc_score_blocks;

typedef struct {
    const kvc_score_args *args;
    const kvc_attend_tile *tile;
    const kvc_score_blocks *blocks;
    int64_t h, group, w, s, d;
    int64_t padded;      /* rows of a KV head (group * w), up to a whole number of KVC_SCORE_ROWS */
    int64_t chunks;      /* of tokens */
    int64_t bands;       /* of rows, in the first pass */
    int64_t parts, step; /* of the keys in the first pass, and the tokens of each */
} kvc_score_job;

/* What the workspace holds for one (sequence, KV head). Row i is query head i % group, window query i / group, counted
 * from the first real one. */
typedef struct {
    int64_t b, h, first;
    int64_t used, rows;  /* window queries that are real; group * used */
    float *part_most;    /* [parts][padded]: largest logit */
    float *part_total;   /* [parts][padded]: sum of exp(logit - part_most); NaN where a logit was not finite */
    float *most, *share; /* [padded]: largest logit, 1 / sum of exp(logit - most) */
    float *sums;         /* [s]: probability by token */
} kvc_score_head;

/* Both take rows low .. high-1 (low a multiple of KVC_SCORE_ROWS), given as rows[high - low up to KVC_SCORE_ROWS][d],
 * and tokens begin .. begin+count-1, given as keys[tiles][d][KVC_SCORE_TILE] with zeros behind them. */
struct kvc_score_blocks {
    /* Maxima and denominators of a part, by row, move on. False: a logit was not finite. */
    bool (*first)(const kvc_score_job *j, const kvc_score_head *view, int64_t low, int64_t high, int64_t begin,
                  int count, const float *rows, const float *keys, float *most, float *total);
    /* Probabilities are added to the tokens' sums[tiles * KVC_SCORE_TILE]. */
    void (*second)(const kvc_score_job *j, const kvc_score_head *view, int64_t low, int64_t high, int64_t begin,
                   int count, const float *rows, const float *keys, double *sums);
};

const kvc_score_blocks *kvc_score_blocks_for(const kvc_attend_tile *tile);

/* The first row, rounded down to a multiple of KVC_SCORE_ROWS, that sees `token`: earlier ones end before it. */
static inline int64_t kvc_score_first_row(const kvc_score_job *j, const kvc_score_head *view, int64_t token) {
    const int64_t query = token - (j->s - view->used);
    return query <= 0 ? 0 : query * j->group / KVC_SCORE_ROWS * KVC_SCORE_ROWS;
}
