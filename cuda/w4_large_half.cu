/* w4_large_half.cu: w4_large.cuh for fp16 x. */
#include "w4_large.cuh"

cudaError_t kvc_w4_large_half(const w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream) {
    return w4_large_any<__half>(job, group, device, stream);
}
