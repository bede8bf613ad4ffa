/* bsr_wgmma_128.cu: blocks of 128 by wgmma. */
#include "bsr_wgmma_launch.cuh"

kvc_status bsr_wgmma_128(const bsr_job &job, int32_t type, int cluster, int panel_columns, int device,
                         cudaStream_t stream) {
    return launch_block<128>(job, type, cluster, panel_columns, device, stream);
}
