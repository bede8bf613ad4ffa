/* append.h: new K, V rows of every sequence and head -> the lists' 16-bit tails; what has aged is quantized once.
 *
 * For each list and each valid new token, in order: while the tail holds window + 64 tokens or more, its first 64
 * tokens (four full pages) become one page of the list's class, and the four pages return to the pool; then the token
 * is rotated, rounded to 16 bit and written behind the last tail token, on a page from the pool where that one is full.
 * The class of list i is row aged[i] of `classes`; a list of class (16, 16) never quantizes.
 *
 * Sequences are left-padded: the last valid[b] of the q rows of sequence b are real, the others are not looked at.
 *
 * The pool is stacks of free pages (units), taken from their ends: left[0] pages of class (16, 16) in pool_tail, and
 * for each class c left[1 + c] pages in row c of pool_packed. kvc_append_need states how many pages one list takes at
 * most; lists run one after the other, so what one gives back serves the next. pool_tail has room for its own pages and
 * all that the lists' tails hold.
 * Errors: ESHAPE, EDTYPE; EINVAL for a class that is none, an index that names no class, a stack with too few pages, a
 * full row of the page table, NaN or Inf in a real row. All are found before anything is written. */
#pragma once
#include "pack.h"

#define KVC_APPEND_CLASSES 25 /* most rows of `classes`: all there are */

typedef struct {
    kvc_tensor arena;       /* in/out (bytes,) uint8 */
    kvc_tensor table;       /* in/out (n,c) uint64: kvc_page entries, c = capacity of a row */
    kvc_tensor lists;       /* in/out (n,4) int32: kvc_list */
    kvc_tensor pool_tail;   /* in/out (p,) uint32 units */
    kvc_tensor pool_packed; /* in/out (k,r) uint32 units: a stack a class */
    kvc_tensor left;        /* in/out (1+k,) int32: pages left in pool_tail, in each class's stack */
    kvc_tensor keys;        /* in  (b,h,q,d) float32 | float16 | bfloat16, n = b*h */
    kvc_tensor values;      /* in  (b,h,q,d) */
    kvc_tensor valid;       /* in  (b,) int32, 0..q; left out: q */
    kvc_tensor classes;     /* in  (k,2) uint8: k_bits, v_bits, 1 <= k <= 25 */
    kvc_tensor aged;        /* in  (n,) uint8: the class of a list's aged tokens, 0..k-1 */
    kvc_layout layout;
    int32_t window;                             /* newest tokens that stay at 16 bit, >= 0 */
    int32_t rotation, scale, stochastic, layer; /* as pack.h */
    uint64_t seed;                              /* Philox's token number is the list's running count of tokens */
} kvc_append_args;

typedef kvc_status kvc_append_fn(const kvc_append_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_append_fn kvc_append_cpu;
/* Most pages one list with `tail_tokens` in its tail takes for q new tokens: of class (16, 16), of its aged tokens'
 * class (packs: that is another one). */
void kvc_append_need(int tail_tokens, int q, int window, int packs, int *tail_pages, int *packed_pages);
#ifdef __cplusplus
}
#endif
