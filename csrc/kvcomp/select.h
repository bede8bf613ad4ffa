/* select.h: importance, budgets -> which tokens each list keeps; and how heads and layers share a budget.
 *
 * kvc_select keeps exactly min(keep[i], real tokens) tokens of list i: first its newest `window` tokens, then its
 * first `sinks` tokens, then the most important others (ties: the older token). Window and sinks count inside `keep`:
 * when it is smaller than they are, the newest tokens win. A list whose real tokens number at most `window` is kept
 * whole, whatever keep says. Importance left out (streaming): sinks and the newest tokens only. Tokens before first[i]
 * do not exist: they are not kept, and their importance is not read. CUDA makes the CPU's choice, bit for bit; what can
 * only be seen in the data is not refused there, as that would need a wait: keep and first are taken as the nearest
 * numbers allowed, NaN and negative importance orders by its bits, above all else.
 *
 * kvc_ada (Feng et al., Ada-KV, arXiv 2407.11550): the `heads` lists of sequence b share keep[b] tokens. Every list
 * first keeps min(floor[b], its real tokens) of its own, just as kvc_select would; what is left goes to the most
 * important tokens over all heads together (ties: the lower head, then the older token), window and sinks that the
 * floor had no room for among them. A sequence keeps exactly min(keep[b], its lists' real tokens), or the sum of its
 * floors (lists that are kept whole, as in kvc_select, included) where that is larger.
 *
 * kvc_select_share divides total tokens over layers: layer l gets clip(weight[l] * x, floor[l], ceiling[l]) with the
 * one x whose sum is `total`, which is what proportional shares become when all that clipping frees or takes is shared
 * out again in proportion. Whole tokens by rounding down, then by largest remainder (ties: the lower layer). Layers of
 * weight 0 get their floor, and, evenly, what the others cannot hold. kvc_select_pyramid gives PyramidKV's weights
 * (arXiv 2406.02069): an arithmetic sequence over layers with mean 1 whose last term is 1/beta of the mean; one
 * layer: 1. Errors: ESHAPE (lists that are no whole number of sequences, too), EDTYPE; EINVAL for negative counts,
 * importance that is negative, NaN or infinite, first outside 0..s, a total outside [sum floor, sum ceiling] or
 * 0..2^53, weights that are negative, not finite, all 0, or more than 200 decades apart, beta < 1. */
#pragma once
#include "kvcomp.h"

typedef struct {
    kvc_tensor kept;       /* out (n,s) uint8: 1 where kept */
    kvc_tensor importance; /* in  (n,s) float32 >= 0; left out: streaming */
    kvc_tensor keep;       /* in  (n,) int32 >= 0 */
    kvc_tensor first;      /* in  (n,) int32: first real token of the list, 0..s; left out: 0 */
    kvc_tensor workspace;  /* (bytes,) uint8: kvc_select_workspace (today 0 bytes) */
    int32_t sinks, window;
} kvc_select_args;

typedef kvc_status kvc_select_fn(const kvc_select_args *args, kvc_stream stream);

typedef struct {
    kvc_tensor kept;       /* out (n,s) uint8: 1 where kept; n = b * heads */
    kvc_tensor importance; /* in  (n,s) float32 >= 0 */
    kvc_tensor keep;       /* in  (b,) int32 >= 0: of a sequence's lists together */
    kvc_tensor first;      /* in  (n,) int32: first real token of the list, 0..s; left out: 0 */
    kvc_tensor floor;      /* in  (b,) int32 >= 0: of every list */
    kvc_tensor workspace;  /* (bytes,) uint8: kvc_ada_workspace */
    int32_t heads, sinks, window;
} kvc_ada_args;

typedef kvc_status kvc_ada_fn(const kvc_ada_args *args, kvc_stream stream);

typedef struct {
    kvc_tensor shares;  /* out (l,) int64 */
    kvc_tensor weight;  /* in  (l,) float64, >= 0, not all zero */
    kvc_tensor floor;   /* in  (l,) int64 */
    kvc_tensor ceiling; /* in  (l,) int64 */
    int64_t total;
} kvc_share_args;

typedef kvc_status kvc_share_fn(const kvc_share_args *args);

#ifdef __cplusplus
extern "C" {
#endif
kvc_select_fn kvc_select_cpu, kvc_select_cuda;
int64_t kvc_select_workspace(int64_t n, int64_t s);
/* What both definitions refuse: shapes, types, ranges; on the CPU also what importance, keep and first say. */
kvc_status kvc_select_check(const kvc_select_args *args);
kvc_ada_fn kvc_ada_cpu;
int64_t kvc_ada_workspace(int64_t n, int64_t s);
kvc_share_fn kvc_select_share;
kvc_status kvc_select_pyramid(int32_t layers, double beta, double *weight);
#ifdef __cplusplus
}
#endif
