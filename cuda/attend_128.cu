/* attend_128.cu: attention for head dimension 128. */
#include "attend_kernel.cuh"

cudaError_t kvc_launch_attend_128(void *job, int blocks, int shared_most, cudaStream_t stream) {
    return launch_attend<128>(*(attend_job *)job, blocks, shared_most, stream);
}
