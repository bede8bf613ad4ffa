/* bsr_wgmma_launch.cuh: tensor maps, grid and launch of the wgmma kernel, for one size of blocks (bsr_wgmma_32.cu ...).
 */
#pragma once
#include <atomic>

#include "bsr_wgmma.cuh"

namespace {

decltype(&cuTensorMapEncodeTiled) find_encode() {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? (decltype(&cuTensorMapEncodeTiled))function
                                                                        : nullptr;
}

/* A matrix or a stack of them, innermost first; pitches in bytes, of all but the innermost. */
bool encode(CUtensorMap *map, int type, int rank, const void *data, const uint64_t *sizes, const uint64_t *pitches,
            const uint32_t *box, bool wide, CUtensorMapL2promotion promotion) {
    static const auto function = find_encode();
    const uint32_t ones[3] = {1, 1, 1};
    const CUtensorMapDataType types = type == KVC_FLOAT32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                      : type == KVC_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return function &&
           function(map, types, rank, (void *)data, sizes, pitches, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                    wide ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, promotion,
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

constexpr int DEVICES = 64;

/* Clusters of this kernel that a device holds at a time; 0: none (its code is not in the library). */
template <int BLOCK, int CLUSTER, bool BRAIN, bool TRANSPOSE> kvc_status clusters_of(int device, int *clusters) {
    static std::atomic<int> known[DEVICES]; /* one more than the number; 0: not known */
    if (device < DEVICES && known[device].load(std::memory_order_acquire)) {
        *clusters = known[device].load(std::memory_order_relaxed) - 1;
        return KVC_OK;
    }
    const auto kernel = bsr_wgmma_kernel<BLOCK, CLUSTER, BRAIN, TRANSPOSE>;
    constexpr int BYTES = bsr::shape<BLOCK, CLUSTER>::BYTES;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    *clusters = 0;
    if (error == cudaSuccess && attributes.binaryVersion == 90) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
        cudaLaunchAttribute cluster = {};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = CLUSTER;
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(CLUSTER);
        config.blockDim = dim3(bsr::THREADS);
        config.dynamicSmemBytes = BYTES;
        config.attrs = &cluster;
        config.numAttrs = 1;
        if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
    }
    if (error != cudaSuccess) return kvc_cuda_fail("bsr_matmul", error);
    if (device < DEVICES) known[device].store(*clusters + 1, std::memory_order_release);
    return KVC_OK;
}

template <int BLOCK, int CLUSTER, bool BRAIN, bool TRANSPOSE>
kvc_status launch(const bsr_job &job, int panel_columns, int device, cudaStream_t stream) {
    using S = bsr::shape<BLOCK, CLUSTER>;
    int clusters;
    KVC_TRY((clusters_of<BLOCK, CLUSTER, BRAIN, TRANSPOSE>(device, &clusters)));
    if (clusters == 0) return KVC_ENOTSUP;
    const int64_t groups = kvc_ceil_div(job.columns, bsr::COLUMNS * CLUSTER), work = groups * job.head.tiles;
    if (work > INT32_MAX) return KVC_ENOTSUP;
    bsr_wgmma_job j = {};
    j.job = job;
    j.work = (uint32_t)work;
    j.groups = (int32_t)groups;
    const int64_t panel = panel_columns / (bsr::COLUMNS * CLUSTER);
    j.panel = (int32_t)(panel < 1 ? 1 : panel < groups ? panel : groups);

    const int type = BRAIN ? KVC_BFLOAT16 : KVC_FLOAT16, out_size = job.out_type == KVC_FLOAT32 ? 4 : 2;
    const uint64_t b = BLOCK, values_sizes[3] = {b, b, (uint64_t)job.head.blocks},
                   values_pitches[2] = {2 * b, 2 * b * b};
    const uint32_t values_box[3] = {S::WIDTH, S::BOX, 1};
    const uint64_t dense_sizes[2] = {(uint64_t)job.columns, (uint64_t)job.depth},
                   dense_pitch = 2 * (uint64_t)job.dense_pitch;
    const uint32_t dense_box[2] = {64, S::WIDTH};
    const uint64_t out_sizes[2] = {(uint64_t)job.columns, (uint64_t)job.rows},
                   out_pitch = (uint64_t)out_size * (uint64_t)job.out_pitch;
    const uint32_t out_box[2] = {128u / (uint32_t)out_size, 64};
    if (!encode(&j.values, type, 3, job.values, values_sizes, values_pitches, values_box, S::WIDTH == 64,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B) ||
        !encode(&j.dense, type, 2, job.dense, dense_sizes, &dense_pitch, dense_box, true,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B) ||
        !encode(&j.out, job.out_type, 2, job.out, out_sizes, &out_pitch, out_box, true,
                CU_TENSOR_MAP_L2_PROMOTION_NONE))
        return KVC_ENOTSUP;

    cudaError_t error = cudaMemsetAsync(job.counter, 0, sizeof *job.counter, stream);
    if (error != cudaSuccess) return kvc_cuda_fail("bsr_matmul", error);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = CLUSTER;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((work < clusters ? work : clusters) * CLUSTER));
    config.blockDim = dim3(bsr::THREADS);
    config.dynamicSmemBytes = S::BYTES;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, bsr_wgmma_kernel<BLOCK, CLUSTER, BRAIN, TRANSPOSE>, j);
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("bsr_matmul", error);
}

template <int BLOCK, int CLUSTER>
kvc_status launch_any(const bsr_job &job, int32_t type, int panel_columns, int device, cudaStream_t stream) {
    if (type == KVC_BFLOAT16)
        return job.head.transpose ? launch<BLOCK, CLUSTER, true, true>(job, panel_columns, device, stream)
                                  : launch<BLOCK, CLUSTER, true, false>(job, panel_columns, device, stream);
    return job.head.transpose ? launch<BLOCK, CLUSTER, false, true>(job, panel_columns, device, stream)
                              : launch<BLOCK, CLUSTER, false, false>(job, panel_columns, device, stream);
}

template <int BLOCK>
kvc_status launch_block(const bsr_job &job, int32_t type, int cluster, int panel_columns, int device,
                        cudaStream_t stream) {
    return cluster == 2 ? launch_any<BLOCK, 2>(job, type, panel_columns, device, stream)
                        : launch_any<BLOCK, 1>(job, type, panel_columns, device, stream);
}

} // namespace
