/* bsr_wgmma_32.cu: blocks of 32 by wgmma. */
#include "bsr_wgmma_launch.cuh"

kvc_status bsr_wgmma_32(const bsr_job &job, int32_t type, int cluster, int panel_columns, int device,
                        cudaStream_t stream) {
    return launch_block<32>(job, type, cluster, panel_columns, device, stream);
}
