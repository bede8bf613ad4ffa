/* w4_small_half.cu: w4_small.cuh for fp16 x. */
#include "w4_small.cuh"

cudaError_t kvc_w4_small_half(w4_job *job, int group, const kvc_gpu *device, cudaStream_t stream) {
    return w4_small_any<__half>(job, group, device, stream);
}
