/* w4_large_bfloat.cu: w4_large.cuh for bf16 x. */
#include "w4_large.cuh"

cudaError_t kvc_w4_large_bfloat(const w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream) {
    return w4_large_any<__nv_bfloat16>(job, group, device, stream);
}
