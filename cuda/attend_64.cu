/* attend_64.cu: attention for head dimension 64. */
#include "attend_kernel.cuh"
#include "attend_launch.cuh"

cudaError_t kvc_launch_attend_64(void *job, int blocks, int shared_most, cudaStream_t stream) {
    return launch_attend<64>(*(attend_job *)job, blocks, shared_most, stream);
}

bool kvc_serves_attend_64(int columns, int shared_most) { return queries_of_block<64>(columns, shared_most) > 0; }
