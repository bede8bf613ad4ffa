/* rotate.h: rows times a d x d matrix of their KV head: what a rotation other than Hadamard's needs around pack, append
 * and attend (rows in, queries in, outputs back by the transpose).
 *
 * out[i,j,t] = rows[i,j,t] times matrix[j / (hq/h)], that is out[o] = sum over c of rows[c] * matrix[c][o]; transposed:
 * matrix[o][c]. Sums are fp32 and do not depend on the number of threads or on which rows come together; out is rounded
 * to its type once (float16, bfloat16: finite values saturate). The matrix may be any; NaN and Inf pass through.
 * Errors: ESHAPE, EDTYPE; EINVAL for channels or a matrix that are not contiguous. */
#pragma once
#include "kvcomp.h"

typedef struct {
    kvc_tensor out;    /* out (b,hq,q,d) float32 | float16 | bfloat16 */
    kvc_tensor rows;   /* in  (b,hq,q,d) float32 | float16 | bfloat16; any d in 1..256 */
    kvc_tensor matrix; /* in  (h,d,d) float32, hq a multiple of h */
    int32_t transpose; /* 1: the matrix's transpose */
} kvc_rotate_args;

typedef kvc_status kvc_rotate_fn(const kvc_rotate_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_rotate_fn kvc_rotate_cpu;
#ifdef __cplusplus
}
#endif
