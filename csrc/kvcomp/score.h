/* score.h: queries of an observation window, keys -> importance of every token, per sequence and KV head.
 *
 * SnapKV (arXiv 2404.14469): A = softmax(scale * q k^T) for the last w queries of the prompt, causal among the window's
 * own tokens; per token the sum or the mean over the w rows; averaged over the query heads that share the KV head;
 * pooled along tokens (width `pool`, odd, stride 1; avg counts the tokens inside, so edges are not damped; 1: none).
 * The attention matrix is never built: two passes over blocks of keys (row maxima and denominators, then column sums),
 * memory in proportion to w plus s.
 *
 * Left padding: tokens before first[b] do not exist (their rows are never read): they get no mass and an importance of
 * 0, and pooling does not cross into them. A window longer than the sequence's real tokens uses the real ones, and the
 * mean is over those. first[b] = s: no real token, importance 0.
 *
 * Pooling runs over [first, s - w) and [s - w, s) apart, so that the window's mass does not leak.
 * fp32 throughout, sums over rows and the pooled values in double; probabilities below e^-87 of a row's largest are 0.
 * Errors: ESHAPE, EDTYPE; EINVAL for NaN or infinity in what is read, logits that overflow float32, a scale or softcap
 * that is not finite, a softcap < 0, an even pool.
 * Workspace: kvc_score_workspace bytes (INT64_MAX where that overflows). */
#pragma once
#include "kvcomp.h"

typedef enum { KVC_REDUCE_SUM = 0, KVC_REDUCE_MEAN = 1 } kvc_reduce;
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

typedef kvc_status kvc_score_fn(const kvc_score_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_score_fn kvc_score_cpu;
int64_t kvc_score_workspace(int64_t b, int64_t hq, int64_t w, int64_t s, int64_t d);
#ifdef __cplusplus
}
#endif
