/* select_list.h: what select and ada share: one list's tokens, and the search for a place in the order of importance.
 */
#pragma once
#include "core/core.h"
#include "kvcomp/select.h"

#define KVC_DIGIT_BITS 11
#define KVC_DIGITS (1 << KVC_DIGIT_BITS)

/* Tokens that a list keeps of `real` ones. */
KVC_HD int64_t kvc_select_kept(int64_t real, int64_t keep, int64_t window) {
    return keep > real || real <= window ? real : keep;
}

/* kvc_select of one list, kept (s,); importance NULL: streaming. */
void kvc_select_list(uint8_t *kept, const float *importance, int64_t s, int64_t first, int64_t keep, int64_t most_sinks,
                     int64_t most_window);

/* Checks one list's first and its importance (unless NULL). */
kvc_status kvc_select_check_list(const char *op, const float *importance, int64_t s, int64_t first, int64_t i);

/* The search for the bits of the least important token to be marked among those not kept, digit by digit from the top;
 * over when shift < 0. */
typedef struct {
    uint32_t threshold, known; /* the digits found so far, and the mask over them */
    int32_t shift;             /* of the next digit */
    int64_t equal;             /* to be marked among the tokens that agree with the digits found */
} kvc_top;

/* count >= 1, no more than there are. */
static inline kvc_top kvc_top_begin(int64_t count) {
    const kvc_top top = {.shift = 2 * KVC_DIGIT_BITS, .equal = count};
    return top;
}
/* The next digits of a list's tokens that agree with what was found. */
void kvc_top_count(const kvc_top *top, const uint8_t *kept, const float *importance, int64_t count,
                   uint32_t histogram[KVC_DIGITS]);
/* Finds and returns one digit from the histograms of all lists. */
uint32_t kvc_top_next(kvc_top *top, const uint32_t *histograms, int64_t lists);
/* After the search: marks a list's tokens above the threshold, and the `equal` oldest at it. */
void kvc_top_mark(const kvc_top *top, uint8_t *kept, const float *importance, int64_t count, int64_t equal);
