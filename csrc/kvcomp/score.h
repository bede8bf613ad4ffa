/* score.h: what tokens are worth: by the attention they get, by the length of their rows, by what decoding gave them.
 *
 * score: queries of an observation window, keys -> importance of every token, per sequence and KV head.
 *
 * SnapKV (arXiv 2404.14469): A = softmax(scale * q k^T) for the last w queries of the prompt, causal among the window's
 * own tokens; per token reduced over the w rows; averaged over the query heads that share the KV head; pooled along
 * tokens (width `pool`, odd, stride 1; avg counts the tokens inside, so edges are not damped; 1: none). Reductions: the
 * sum; the mean over the w rows; the mean over those rows that see the token. The window may be the whole prompt,
 * w = s: its sums are H2O's accumulated attention (Zhang et al., arXiv 2306.14048), which favours old tokens, as more
 * rows see them; the mean over the rows that see a token does not.
 * The attention matrix is never built: two passes over blocks of keys (row maxima and denominators, then column sums)
 * that skip what is not seen; memory in proportion to w plus s.
 *
 * Left padding: tokens before first[b] do not exist (their rows are never read): they get no mass and an importance of
 * 0, and pooling does not cross into them. A window longer than the sequence's real tokens uses the real ones, and the
 * mean is over those. first[b] = s: no real token, importance 0.
 *
 * Pooling runs over [first, s - w) and [s - w, s) apart, so that the window's mass does not leak; over [first, s) where
 * the window covers all real tokens.
 * fp32 throughout, sums over rows and the pooled values in double; probabilities below e^-87 of a row's largest are 0.
 * Errors: ESHAPE, EDTYPE; EINVAL for NaN or infinity in what is read, logits that overflow float32, a scale or softcap
 * that is not finite, a softcap < 0, an even pool.
 * Workspace: kvc_score_workspace bytes, of either device's definition (INT64_MAX where that overflows).
 *
 * CUDA: head dimensions 64, 80, 96, 128, 256, fewer than 2^30 rows and tokens (else ENOTSUP). 16-bit queries and keys
 * of one type are multiplied as they are, anything else as float32 in three products of 11-bit parts; sums in float32,
 * over rows in two steps. Against exact arithmetic a value is off by a factor of at most e^(4 * (d + 2) * 2^-24 *
 * |scale| * (sum of |q k|)) + 2e-4, by the rounding of products; tests hold it to 1e-4 of the largest for logits of a
 * trained model's size. A row's probabilities below 2^-126 of its largest are 0. Logits are to stay below 2^29. What
 * can only be seen in the data is not refused, as that would need a wait: first is taken as the nearest of 0..s, NaN,
 * infinity and overflow leave undefined importance in their sequence and KV head, and float32 above 3.4e38 counts as
 * infinite where it is split. The work is divided by shapes alone: the same bits every time on one device.
 *
 * norms: the L2 norm of every row: of keys a score by itself (Devoto et al., arXiv 2406.11430: keys of small norm draw
 * attention), of values a weight for attention scores. centered: of the row minus its list's mean over real tokens.
 * Sums in double, rounded once; at most FLT_MAX. Tokens before first[b] get 0, and their rows are never read. Errors:
 * ESHAPE, EDTYPE; EINVAL for NaN or infinity in a real row, first outside 0..s (CUDA: norms of such rows, and,
 * centered, of their list, are not defined; first as in score).
 *
 * accumulate: attention collected page by page while decoding, from attend's mass: worth = keep * worth + gain * (sum
 * of the page's mass) for each list's pages in use, in double, at most FLT_MAX; infinity stays; entries behind the last
 * page become 0.
 * Errors: ESHAPE, EDTYPE; EINVAL for a page of unknown bits or with more tokens than its class holds, a list whose
 * pages or tokens disagree with the table, worth in use that is negative or NaN, mass in use that is negative, NaN or
 * infinite, keep outside 0..1, a gain that is negative, NaN or infinite. All are found before anything is written. CUDA
 * looks at no data before it runs: pages beyond the table and tokens beyond the mass are left out, values are taken as
 * they are. */
#pragma once
#include "kvcomp.h"

typedef enum { KVC_REDUCE_SUM = 0, KVC_REDUCE_MEAN = 1, KVC_REDUCE_SEEN = 2 } kvc_reduce;
typedef enum { KVC_POOL_AVG = 0, KVC_POOL_MAX = 1 } kvc_pool;

typedef struct {
    kvc_tensor importance; /* out (b,h,s) float32 */
    kvc_tensor queries;    /* in  (b,hq,w,d) float32 | float16 | bfloat16: the last w queries, after RoPE */
    kvc_tensor keys;       /* in  (b,h,s,d) float32 | float16 | bfloat16, after RoPE; any d in 1..256, 1 <= w <= s */
    kvc_tensor first;      /* in  (b,) int32: first real token, 0..s; left out: 0 */
    kvc_tensor workspace;  /* (bytes,) uint8 */
    float scale;           /* of the logits */
    float softcap;         /* 0: none */
    int32_t reduce;        /* kvc_reduce over the window's rows */
    int32_t pool_kind;     /* kvc_pool */
    int32_t pool;          /* width, odd, >= 1 */
} kvc_score_args;

typedef struct {
    kvc_tensor out;   /* out (b,h,s) float32 */
    kvc_tensor rows;  /* in  (b,h,s,d) float32 | float16 | bfloat16; any d in 1..256 */
    kvc_tensor first; /* in  (b,) int32: first real token, 0..s; left out: 0 */
    int32_t centered; /* 0, 1 */
} kvc_norms_args;

typedef struct {
    kvc_tensor worth; /* in/out (n,c) float32, a value a page */
    kvc_tensor mass;  /* in  (n,m) float32, in page order, m >= every list's tokens */
    kvc_tensor table; /* in  (n,c) uint64: kvc_page */
    kvc_tensor lists; /* in  (n,4) int32: kvc_list */
    float keep, gain;
} kvc_accumulate_args;

typedef kvc_status kvc_score_fn(const kvc_score_args *args, kvc_stream stream);
typedef kvc_status kvc_norms_fn(const kvc_norms_args *args, kvc_stream stream);
typedef kvc_status kvc_accumulate_fn(const kvc_accumulate_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_score_fn kvc_score_cpu, kvc_score_cuda;
kvc_norms_fn kvc_norms_cpu, kvc_norms_cuda;
kvc_accumulate_fn kvc_accumulate_cpu, kvc_accumulate_cuda;
int64_t kvc_score_workspace(int64_t b, int64_t hq, int64_t w, int64_t s, int64_t d);
/* What both definitions refuse: shapes, types, ranges; on the CPU also what first, table and lists say. */
kvc_status kvc_score_check(const kvc_score_args *args);
kvc_status kvc_norms_check(const kvc_norms_args *args);
kvc_status kvc_accumulate_check(const kvc_accumulate_args *args);
#ifdef __cplusplus
}
#endif
