/* plan.h: importance, distortion, one byte budget -> kept tokens and their (k_bits, v_bits), with exact bytes.
 *
 * A list's candidate tokens (kept[i,t] = 1 and not fixed) are ranked by importance (ties: the older token) and cut, in
 * that order, into runs of 64, the last one perhaps shorter. A run has one class:
 *     error(run, class) = sum over its tokens of importance * (distortion_k[list, k_bits] + distortion_v[list, v_bits])
 * with `drop[list]` in the place of the two when it is dropped. It takes one packed page, paid in full, or, at
 * (16, 16), ceil(tokens / 16) pages, which it shares with the list's sinks (below).
 *
 * Levels. Every list has one sequence of classes, rising in both halves:
 *   - from dropped up to the allowed packed class of least distortion (ties: fewer bytes), every time the class within
 *     that one, and above the last in both halves, that saves the most per byte (ties: fewer bytes): where `allowed` is
 *     a rectangle, the lower convex hull of (bytes, distortion);
 *   - before them, for runs that `least_tokens` wants kept (rounded up to whole runs), the same from the cheapest one
 *     (ties: less distortion);
 *   - last (16, 16), where it is allowed and distorts less, for the first `guard` candidates, rounded down to whole
 *     runs; it follows directly on a level from which it saves more per byte than the packed step would.
 * A class that saves nothing over being dropped is no level (fixed_class: it is; steps are then in the order of
 * importance * max(0, drop - distortion)).
 *
 * Steps. All required runs stand at the cheapest class, all others at dropped. A run's step to its next level is open
 * while the run before it is at that level or above: bits never rise with falling importance inside a list. Of the open
 * steps the one that saves the most error per byte comes first (ties: lower list, lower rank; a step without cost comes
 * before all others); it is taken if its bytes fit. After one that does not fit, later ones are taken that do, as long
 * as together they save no more error than that one would have: so more budget never gives a larger error. Where runs
 * are full the error is within one step's saving of the least that these levels allow. A budget of most_bytes or more,
 * or none, takes every run to its best level at once.
 *
 * Groups (bits per KV head, per layer). With `groups`, lists of one number form a group: all candidates of all its
 * lists are kept (least_tokens is implied) at one class, the 64 tokens of a page in any order. A list of c candidates
 * then takes ceil(c / 64) packed pages, or, at (16, 16), what they add to the ceil(tokens / 16) pages it shares with
 * its sinks; bytes and error of a group are sums over its lists. Its levels begin at its cheapest allowed class (ties:
 * less error) and go on, every time, to the class above the last in both halves, and within the one of least error that
 * can be reached, that saves the most per byte: where `allowed` is a rectangle, the lower convex hull of (bytes,
 * error). (16, 16) counts where `guard` covers all candidates of every list of the group. Steps as above, over groups
 * (ties: the lower number); the smallest plan is every group at its cheapest class. Up to 256 lists, the classes of
 * least error from the cheapest to that of least error are found as well: exactly where the costs have a divisor of
 * which 2^14 reach from the smallest plan to the best, else with costs rounded up to a multiple of it. They are taken
 * where they are better.
 *
 * Fixed tokens (fixed[i,t] = 1: sinks, 2: window; both have kept = 1) are stored at (16, 16) whatever they cost: the
 * window, which is newer than all other kept tokens, as the list's tail in pages of its own, sinks and the runs at
 * (16, 16) of their list together in ceil(tokens / 16) pages.
 *
 * Bytes: sum over pages of kvc_page_bytes plus `entry_bytes` for every page-table entry plus `list_bytes` a list: what
 * the arena and the tables really take, page slack included. Never above the budget.
 * Result: k_bits, v_bits per token (0, 0: dropped), and the summary. EBUDGET, with the least bytes that work in
 * summary.least_bytes and nothing else written, when the fixed tokens (and `least_tokens` a list at the cheapest class)
 * do not fit. Values are in double, summed run by run in rank order; the result does not depend on threads.
 * Errors: ESHAPE, EDTYPE, ENOTSUP (head_dim); EINVAL for importance, distortion or drop that is negative, NaN or
 * infinite, negative counts, kept, fixed, allowed or groups out of range, no class allowed, fixed_class with more than
 * one or with groups, window tokens that are not the newest kept ones, least_tokens beyond guard where only (16, 16) is
 * allowed. */
#pragma once
#include "format.h"
#include "kvcomp.h"

#define KVC_PLAN_LEVELS 5 /* columns of a distortion table: 2, 3, 4, 8, 16 bits */

typedef struct {
    int64_t bytes;       /* of the plan */
    int64_t least_bytes; /* of the smallest plan */
    int64_t most_bytes;  /* of the plan in which every run is at its best level */
    int64_t kept;        /* tokens stored, over all lists */
    int64_t pages;
    double error; /* objective: sum of importance * distortion (or drop) over tokens with kept = 1 */
} kvc_plan_summary;

typedef struct {
    kvc_tensor k_bits;       /* out (n,s) uint8: 0, 2, 3, 4, 8, 16 */
    kvc_tensor v_bits;       /* out (n,s) uint8: 0 exactly where k_bits is 0 */
    kvc_tensor importance;   /* in  (n,s) float32 >= 0 */
    kvc_tensor kept;         /* in  (n,s) uint8: 1 for candidates and fixed tokens, else 0 */
    kvc_tensor fixed;        /* in  (n,s) uint8: 1 sink, 2 window (the tail), 0 otherwise */
    kvc_tensor distortion_k; /* in  (n,5) float32 >= 0, at 2, 3, 4, 8, 16 bits */
    kvc_tensor distortion_v; /* in  (n,5) float32 >= 0 */
    kvc_tensor drop;         /* in  (n,) float32 >= 0 */
    kvc_tensor allowed;      /* in  (5,5) uint8: allowed[k,v] = 1 where class (k_bits, v_bits) may be used */
    kvc_tensor least_tokens; /* in  (n,) int32: candidates that must be kept; left out: 0 */
    kvc_tensor guard;        /* in  (n,) int32: the most candidates a list may hold at (16, 16); left out: no limit */
    kvc_tensor groups;       /* in  (n,) int32, 0..n-1: lists with one number have one class; left out: runs choose */
    kvc_tensor workspace;    /* (bytes,) uint8: kvc_plan_workspace */
    kvc_layout layout;
    int64_t budget;            /* bytes; < 0: no limit */
    int64_t entry_bytes;       /* of a page-table entry, 0..2^20 */
    int64_t list_bytes;        /* of a list's state, 0..2^20 */
    int32_t fixed_class;       /* 1: the one allowed class or dropped; the budget decides how many are kept */
    kvc_plan_summary *summary; /* out */
} kvc_plan_args;

typedef kvc_status kvc_plan_fn(const kvc_plan_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_plan_fn kvc_plan_cpu;
int64_t kvc_plan_workspace(int64_t n, int64_t s);
#ifdef __cplusplus
}
#endif
