/* attend_rows_256.cu: attention of several queries a list for head dimension 256. */
#include "attend_rows.cuh"

cudaError_t kvc_launch_attend_rows_256(void *job, int blocks, int shared_most, cudaStream_t stream) {
    return launch_rows<256>(*(attend_job *)job, blocks, shared_most, stream);
}
