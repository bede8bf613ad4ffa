/* attend_rows_64.cu: attention of several queries a list for head dimension 64. */
#include "attend_rows.cuh"

cudaError_t kvc_launch_attend_rows_64(void *job, int blocks, int shared_most, cudaStream_t stream) {
    return launch_rows<64>(*(attend_job *)job, blocks, shared_most, stream);
}
