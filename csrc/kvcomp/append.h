/* append.h: new K, V rows of every sequence and head -> the lists' 16-bit tails; what has aged is quantized once.
 *
 * For each list and each valid new token, in order: while the tail holds window + 64 tokens or more, its first 64
 * tokens (four full pages) become one page of the list's class, and the four pages go back to the list's stack; then
 * the token is rotated, rounded to 16 bit and written behind the last tail token, on a page from the stack where that
 * one is full. A list of class (16, 16) never quantizes.
 *
 * Sequences are left-padded: the last valid[b] of the q rows of sequence b are real, the others are not looked at.
 *
 * Every list has two stacks of free pages (units), taken from their ends: left[i][0] pages of class (16, 16) in row i
 * of pool_tail, left[i][1] pages of its own class in row i of pool_packed; a flush pushes its four pages in order.
 * kvc_append_need states how many pages a list takes at most; a row of pool_tail has room for what is left in it and
 * the pages of the list's tail.
 *
 * append_walk does to table, lists, left and pools what append does, without rows: a host's mirror of a device's
 * appends. Tokens come one by one, so a walk of q tokens is q walks of one.
 *
 * Errors: ESHAPE, EDTYPE, EDEVICE; on the CPU also EINVAL for a class that is none, a stack with too few pages, a full
 * row of the page table, a state that contradicts itself, NaN or Inf in a real row. All are found before anything is
 * written. On CUDA they would need a synchronization: the caller checks on its mirror. There a list whose state does
 * not hold together, or has no room, is left as it was, and NaN and Inf are not looked for. */
#pragma once
#include "pack.h"

typedef struct kvc_append_args {
    kvc_tensor arena;       /* in/out (bytes,) uint8 */
    kvc_tensor table;       /* in/out (n,c) uint64: kvc_page entries, c = capacity of a row */
    kvc_tensor lists;       /* in/out (n,4) int32: kvc_list */
    kvc_tensor pool_tail;   /* in/out (n,p) uint32 units */
    kvc_tensor pool_packed; /* in/out (n,r) uint32 units */
    kvc_tensor left;        /* in/out (n,2) int32: pages left in the list's row of pool_tail, of pool_packed */
    kvc_tensor keys;        /* in  (b,h,q,d) float32 | float16 | bfloat16, n = b*h */
    kvc_tensor values;      /* in  (b,h,q,d) */
    kvc_tensor valid;       /* in  (b,) int32, 0..q; left out: q */
    kvc_tensor classes;     /* in  (n,2) uint8: k_bits, v_bits of what leaves the list's tail */
    kvc_layout layout;
    int32_t window;                             /* newest tokens that stay at 16 bit, 0..2^24 */
    int32_t rotation, scale, stochastic, layer; /* as pack.h */
    uint64_t seed;                              /* Philox's token number is the list's running count of tokens */
} kvc_append_args;

typedef kvc_status kvc_append_fn(const kvc_append_args *args, kvc_stream stream);

typedef struct kvc_append_walk_args {
    kvc_tensor table;       /* in/out (n,c) uint64 */
    kvc_tensor lists;       /* in/out (n,4) int32 */
    kvc_tensor pool_tail;   /* in/out (n,p) uint32 */
    kvc_tensor pool_packed; /* in/out (n,r) uint32 */
    kvc_tensor left;        /* in/out (n,2) int32 */
    kvc_tensor valid;       /* in  (b,) int32, 0..q, b a divisor of n; left out: q for every list */
    kvc_tensor classes;     /* in  (n,2) uint8 */
    int32_t window;
    int32_t q; /* new tokens, 0..2^24 */
} kvc_append_walk_args;

#ifdef __cplusplus
extern "C" {
#endif
kvc_append_fn kvc_append_cpu, kvc_append_cuda;
/* The checks both definitions share; what lies in the tensors is looked at on the CPU only. */
kvc_status kvc_append_check(const kvc_append_args *args);
/* CPU tensors only. */
kvc_status kvc_append_walk(const kvc_append_walk_args *args);
#ifdef __cplusplus
}
#endif

/* Most pages one list with `tail_tokens` in its tail takes for q new tokens: of class (16, 16), of its aged tokens'
 * class (packs: that is another one). */
KVC_HD void kvc_append_need(int tail_tokens, int q, int window, int packs, int *tail_pages, int *packed_pages) {
    *tail_pages = *packed_pages = 0;
    int room = -tail_tokens & (KVC_TAIL_TOKENS - 1), taken = 0;
    for (int left = q; left > 0;) {
        while (packs && tail_tokens >= window + KVC_PAGE_TOKENS) {
            tail_tokens -= KVC_PAGE_TOKENS;
            taken -= KVC_PAGE_TOKENS / KVC_TAIL_TOKENS;
            ++*packed_pages;
        }
        if (room == 0) {
            room = KVC_TAIL_TOKENS;
            if (++taken > *tail_pages) *tail_pages = taken;
        }
        const int until_flush = packs ? window + KVC_PAGE_TOKENS - tail_tokens : left; /* > 0 after the loop above */
        int step = left < room ? left : room;
        if (step > until_flush) step = until_flush;
        left -= step;
        room -= step;
        tail_tokens += step;
    }
}

/* A list's state that holds together, in a row of `capacity` entries, and `more` new tokens fit in its counts. */
KVC_HD int kvc_append_state_ok(const kvc_list *list, int64_t capacity, int more) {
    const uint32_t tail_pages = ((uint32_t)list->tail_tokens + KVC_TAIL_TOKENS - 1) / KVC_TAIL_TOKENS;
    return list->pages >= 0 && list->tail_page >= 0 && list->tail_tokens >= 0 && list->pages <= capacity &&
           (uint32_t)(list->pages - list->tail_page) == tail_pages && list->tokens >= list->tail_tokens &&
           list->tokens <= INT32_MAX - more;
}
