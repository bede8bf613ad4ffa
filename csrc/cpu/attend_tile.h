/* attend_tile.h: the inner loops of attend, one build per instruction set (attend_tile.c), chosen at run time.
 *
 * A block is up to four queries of one list; a page here is one packed page, or up to four consecutive tail pages read
 * as one of 64 tokens. 64 scores of a page lie as [e][4*c + t], the order in which the V codes want them:
 * token = 16*t + 2*c + (e>>1) + 8*(e&1). */
#pragma once
#include "core/core.h"

#define KVC_BLOCK 4                              /* queries */
#define KVC_GROUPS (KVC_MAX_HEAD_DIM / KVC_TILE) /* most scale groups */

typedef struct {
    const kvc_layout *layout;
    int queries; /* 1, 2 or 4: rows of what follows, the last ones may be padding */
    float softcap;
    float sum[KVC_GROUPS][KVC_BLOCK];  /* of the scaled query over each group of channels */
    float most[KVC_BLOCK];             /* the logit that probabilities are relative to */
    float total[KVC_BLOCK];            /* sum of probabilities */
    float bias[KVC_GROUPS][KVC_BLOCK]; /* what zeros and middles add to every channel of a group */
    float *query;                      /* [d/16][4][queries][16], 64-aligned: scaled, spread as the K codes lie */
    float *sums;                       /* [d][queries][16], 64-aligned: partial sums of the output */
} kvc_attend_block;

typedef struct {
    const uint8_t *bytes[KVC_PAGE_TOKENS / KVC_TAIL_TOKENS]; /* one page, or tail pages (a missing one: any, unseen) */
    int k_bits, v_bits;
    int room;               /* 64: one page; 16: tail pages */
    int visible[KVC_BLOCK]; /* tokens, from the page's first, that each query sees */
    const uint8_t *next;    /* the page to be read after this one, fetched meanwhile */
    int64_t next_bytes;     /* 0: none */
} kvc_attend_page;

typedef struct {
    const char *name;
    /* Rounds `rows` (queries, d) of scaled, rotated queries into the block and clears its sums. */
    void (*begin)(kvc_attend_block *block, const float *rows);
    /* Logits of one page, softcap included, -INFINITY where not visible. */
    void (*scores)(const kvc_attend_block *block, const kvc_attend_page *page,
                   float scores[KVC_BLOCK][KVC_PAGE_TOKENS]);
    /* One page of softmax and values, from its scores (overwritten by probabilities). */
    void (*values)(kvc_attend_block *block, const kvc_attend_page *page, float scores[KVC_BLOCK][KVC_PAGE_TOKENS]);
    /* Unnormalized output rows (queries, d). */
    void (*end)(const kvc_attend_block *block, float *rows);
    /* exp(scores - most) in place, for the mass pass. */
    void (*probabilities)(float most, float scores[KVC_PAGE_TOKENS]);
} kvc_attend_tile;

const kvc_attend_tile *kvc_attend_tiles(void); /* the best for this machine; KVCOMP_SIMD=base|avx2|avx512 limits it */

static inline int kvc_score_token(int i) {
    const int e = i / 16, c = i % 16 / 4, t = i % 4;
    return 16 * t + 2 * c + (e >> 1) + 8 * (e & 1);
}
