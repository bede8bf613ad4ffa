/* attend.h: queries, packed pages -> attention output, without unpacking the cache.
 *
 * out[b,i,j] = sum_t softmax_t(scale * <q[b,i,j], k_t>) v_t over the tokens t of list (b, i / (hq/h)), in one pass
 * (online softmax, fp32); q is rotated on the way in and the output back where the pages hold rotated rows. With
 * softcap > 0 logits become softcap * tanh(logit / softcap).
 *
 * Causality among new tokens: the last new[b] tokens of each list of sequence b are the ones that came with these
 * queries, and query j sees all tokens but the last q-1-j of them; the first q - new[b] queries of a left-padded
 * sequence get zeros. An empty list gives zeros.
 *
 * mass (optional): attention probability of every token, in page order, summed over all queries and the heads of the
 * group; what lies behind a list's last token is set to zero.
 *
 * Bound against fp64 on the unpacked values: |error| <= max|v| * (2e-6 * (1 + ln tokens) + 2e-8 * scale * |q| |k|) for
 * fp32 queries and output; half a unit of the output's type on top otherwise.
 * CUDA: K's codes times q in 16-bit fixed point, p times V's scale in fp16, sums in fp32 that are emptied every 512
 * tokens a warp (more than 8 queries a list, sm_90a: every 1024 a warpgroup); for fp32 output the root mean square of
 * the error over a head's channels is at most 1e-3 of the exact output's, and a single channel's error at most 5e-3 of
 * that.
 * Deterministic for one device; the order of sums depends on its number of multiprocessors and on the division. Errors:
 * ESHAPE (query heads that are no multiple of the KV heads, too), EDTYPE, EINVAL, ENOTSUP (head_dim). Workspace:
 * kvc_attend_workspace bytes, 64-aligned; CUDA: kvc_attend_workspace_cuda bytes that are 0xFF before the first call,
 * which every call leaves so, one that is refused, too; one for each stream. What the device aborts loses the whole
 * context, and the workspace with it. */
#pragma once
#include "format.h"
#include "kvcomp.h"

typedef struct {
    kvc_tensor out;        /* out (b,hq,q,d) float32 | float16 | bfloat16 */
    kvc_tensor mass;       /* out (n,m) float32, m >= every list's tokens; optional */
    kvc_tensor queries;    /* in  (b,hq,q,d) float32 | float16 | bfloat16; hq a multiple of h */
    kvc_tensor arena;      /* in  (bytes,) uint8 */
    kvc_tensor table;      /* in  (n,c) uint64: kvc_page */
    kvc_tensor lists;      /* in  (n,4) int32: kvc_list, n = b*h */
    kvc_tensor new_tokens; /* in (b,) int32, 0..q; left out: q */
    kvc_tensor workspace;  /* (bytes,) uint8 */
    kvc_tensor division;   /* in (w,) int32 (divide.h), of these lists, tail and all or before the last appends; CUDA
                            * only; left out: attend divides by itself, in a launch of its own */
    kvc_layout layout;
    int32_t rotation; /* kvc_rotation of the pages */
    float scale;      /* of the logits, > 0, finite */
    float softcap;    /* 0: none */
    int32_t threads;  /* 0: as many as kvc_threads() */
    int32_t early; /* CUDA only. 1: all that is read but the tails, that is queries, division, lists' pages before the
                    * tail and their table entries, comes from before the stream's last kernel, if that is append, which
                    * waits for it; or was complete before that began, if it is attend: reading overlaps it. Without a
                    * division, and for q > 1, the same as 0 */
} kvc_attend_args;

typedef kvc_status kvc_attend_fn(const kvc_attend_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_attend_fn kvc_attend_cpu, kvc_attend_cuda;
/* The checks both definitions share: all that need no tensor's data. */
kvc_status kvc_attend_check(const kvc_attend_args *args);
/* Workspace bytes for n lists of at most `pages` pages each, q queries of `group` heads, with or without mass;
 * INT64_MAX where that overflows. */
int64_t kvc_attend_workspace(int64_t n, int64_t pages, int64_t group, int64_t q, int32_t head_dim);
/* CUDA: for n lists with c table entries each; mass_tokens: columns of mass, 0 without. */
int64_t kvc_attend_workspace_cuda(int64_t n, int64_t c, int64_t group, int64_t q, int32_t head_dim,
                                  int64_t mass_tokens);
#ifdef __cplusplus
}
#endif
