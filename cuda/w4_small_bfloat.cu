/* w4_small_bfloat.cu: w4_small.cuh for bf16 x. */
#include "w4_small.cuh"

cudaError_t kvc_w4_small_bfloat(w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream) {
    return w4_small_any<__nv_bfloat16>(job, group, device, stream);
}
