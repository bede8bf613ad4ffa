/* attend_80.cu: attention for head dimension 80. */
#include "attend_kernel.cuh"

cudaError_t kvc_launch_attend_80(void *job, int blocks, int shared_most, cudaStream_t stream) {
    return launch_attend<80>(*(attend_job *)job, blocks, shared_most, stream);
}
