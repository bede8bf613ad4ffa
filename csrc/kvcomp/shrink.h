/* shrink.h: pages of a living cache give up bytes, where a byte given up costs the least error.
 *
 * Page p of list lists[p] has the class (k_bits[p], v_bits[p]), or (0, 0): evicted already. It takes kvc_page_bytes and
 * `entry_bytes` of a page-table entry, and its error is
 *     weight[p] * (distortion_k[list, k_bits] + distortion_v[list, v_bits]), or weight[p] * drop[list] once evicted.
 * It may move to an allowed class of fewer bytes with no more bits in either half (nothing is encoded upwards; its
 * present class need not be allowed), or be evicted. No token is lost by a move. A page of class (16, 16) holds 16
 * tokens; counts[p] (up to four) of them may stand as one, which moves to one page of 64 tokens, or is evicted whole.
 *
 * Steps. From every class one step leads down: to the class, or eviction, that adds the least error per byte freed
 * (ties: fewer bytes). Steps are taken in the order of error added per byte freed (ties: the lower page) until one
 * would free all that is still wanted; the last is then the one, of those that free as much, that adds the least error
 * (ties: as before). Where `allowed` is a rectangle a page's steps follow the lower convex hull of (bytes, error), and
 * the error is within one step's of the least at which so many bytes can be freed; where fewer bits distort more, it is
 * no smaller for more bytes wanted. Pages of weight infinity are left alone.
 *
 * Result: k_bits, v_bits of every page, summary.freed. EBUDGET, with nothing written but summary.least_bytes, what all
 * pages together take at least, when evicting every page that may be touched frees less than `wanted`. Deterministic;
 * O(m log m + n).
 * Errors: ESHAPE, EDTYPE, ENOTSUP (head_dim); EINVAL for bits that are no class, lists out of range, weights that are
 * negative or NaN, distortion or drop that is negative or not finite, allowed other than 0 and 1 or without a class,
 * wanted < 0, entry_bytes outside 0..2^20. */
#pragma once
#include "format.h"
#include "kvcomp.h"

typedef struct {
    int64_t freed;       /* bytes, entries included */
    int64_t least_bytes; /* of all pages, entries included, when every page that may be touched is evicted */
} kvc_shrink_summary;

typedef struct {
    kvc_tensor k_bits;       /* in/out (m,) uint8: 2, 3, 4, 8, 16, or 0 with v_bits 0 */
    kvc_tensor v_bits;       /* in/out (m,) uint8 */
    kvc_tensor lists;        /* in  (m,) int32, 0..n-1 */
    kvc_tensor counts;       /* in  (m,) uint8: 1, or 2..4 pages of class (16, 16) that move together; left out: 1 */
    kvc_tensor weight;       /* in  (m,) float32 >= 0: the sum of importance over the page's tokens; may be infinity */
    kvc_tensor distortion_k; /* in  (n,5) float32 >= 0, at 2, 3, 4, 8, 16 bits */
    kvc_tensor distortion_v; /* in  (n,5) float32 >= 0 */
    kvc_tensor drop;         /* in  (n,) float32 >= 0 */
    kvc_tensor allowed;      /* in  (5,5) uint8: allowed[k,v] = 1 where a page may move to class (k_bits, v_bits) */
    kvc_tensor workspace;    /* (bytes,) uint8: kvc_shrink_workspace */
    kvc_layout layout;
    int64_t entry_bytes;         /* of a page-table entry, 0..2^20; freed with an evicted page */
    int64_t wanted;              /* bytes to free, >= 0 */
    kvc_shrink_summary *summary; /* out */
} kvc_shrink_args;

typedef kvc_status kvc_shrink_fn(const kvc_shrink_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_shrink_fn kvc_shrink_cpu;
int64_t kvc_shrink_workspace(int64_t n, int64_t m);
#ifdef __cplusplus
}
#endif
