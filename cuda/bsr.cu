/* bsr.cu: kvc_bsr_matmul_cuda: which kernel takes a product: wgmma on sm_90a where rows and addresses are multiples of
 * 16 bytes and blocks are larger than 16, mma.sync everywhere else. */
#ifdef KVC_BSR_TUNE
#include <stdlib.h>
#endif

#include "bsr_job.cuh"

namespace {

constexpr int64_t MOST_COLUMNS = INT32_MAX - 4095; /* coordinates of tiles behind the last column are int32, too */
constexpr int64_t PANEL_BYTES = 17 << 20;          /* of the dense matrix, that stay in L2 while all tiles pass */

/* Blocks of threads side by side that share values: two, where that leaves at most an eighth of the columns to nobody.
 * Four take 3 to 10 % longer: they wait for each other. */
int cluster_for(int64_t columns) {
    const int64_t tiles = kvc_ceil_div(columns, 256);
    return tiles % 2 == 0 || tiles > 7 ? 2 : 1;
}

bool hopper(int device) {
    kvc_gpu facts = {};
    if (kvc_gpu_of(device, &facts) != cudaSuccess) cudaGetLastError();
    return facts.capability == 90;
}

bool fits(uintptr_t address, int64_t pitch, int64_t columns, int64_t size) {
    return address % 16 == 0 && pitch * size % 16 == 0 && pitch >= columns && pitch < (int64_t)1 << 35;
}

} // namespace

kvc_status bsr_wgmma_32(const bsr_job &job, int32_t type, int cluster, int panel_columns, int device,
                        cudaStream_t stream);
kvc_status bsr_wgmma_64(const bsr_job &job, int32_t type, int cluster, int panel_columns, int device,
                        cudaStream_t stream);
kvc_status bsr_wgmma_128(const bsr_job &job, int32_t type, int cluster, int panel_columns, int device,
                         cudaStream_t stream);

kvc_status bsr_wgmma(const bsr_job &job, int32_t type, int device, cudaStream_t stream) {
    const int64_t out_size = job.out_type == KVC_FLOAT32 ? 4 : 2;
    if (job.head.block < 32 || job.head.blocks == 0 || job.depth == 0 || (uintptr_t)job.values % 16 != 0 ||
        !fits((uintptr_t)job.dense, job.dense_pitch, job.columns, 2) ||
        !fits((uintptr_t)job.out, job.out_pitch, job.columns, out_size) || !hopper(device))
        return KVC_ENOTSUP;
    int cluster = cluster_for(job.columns);
    int panel = (int)(PANEL_BYTES / (2 * (int64_t)job.depth) + 1);
#ifdef KVC_BSR_TUNE
    if (getenv("KVC_BSR_MMA")) return KVC_ENOTSUP;
    if (getenv("KVC_BSR_CLUSTER")) cluster = atoi(getenv("KVC_BSR_CLUSTER"));
    if (getenv("KVC_BSR_PANEL")) panel = atoi(getenv("KVC_BSR_PANEL"));
#endif
    switch (job.head.block) {
    case 32: return bsr_wgmma_32(job, type, cluster, panel, device, stream);
    case 64: return bsr_wgmma_64(job, type, cluster, panel, device, stream);
    default: return bsr_wgmma_128(job, type, cluster, panel, device, stream);
    }
}

extern "C" kvc_status kvc_bsr_matmul_cuda(const kvc_bsr_matmul_args *args, kvc_stream stream) {
    KVC_TRY(kvc_bsr_matmul_check(args));
    const int64_t rows = args->out.shape[0], n = args->out.shape[1];
    if (rows == 0 || n == 0) return KVC_OK;
    if (n > MOST_COLUMNS)
        return kvc_fail(KVC_ENOTSUP, "bsr_matmul: dense: expected at most %lld columns on CUDA, got %lld",
                        (long long)MOST_COLUMNS, (long long)n);
    bsr_job job = {};
    job.plan = (const int32_t *)args->plan.data;
    job.values = (const char *)args->values.data;
    job.dense = (const char *)args->dense.data;
    job.out = (char *)args->out.data;
    job.dense_pitch = args->dense.strides[0];
    job.out_pitch = args->out.strides[0];
    job.head.magic = KVC_BSR_MAGIC;
    job.head.block = (int32_t)args->values.shape[1];
    job.head.transpose = args->transpose;
    job.head.tiles = (int32_t)kvc_bsr_tiles(rows);
    job.head.m = (int32_t)args->m;
    job.head.k = (int32_t)args->k;
    job.head.blocks = (int32_t)args->values.shape[0];
    job.rows = (int32_t)rows;
    job.depth = (int32_t)args->dense.shape[0];
    job.columns = (int32_t)n;
    job.out_type = args->out.dtype;
    job.beta = args->beta;
    job.counter = (uint32_t *)args->workspace.data;
    const int device = args->out.device_id;
    kvc_device_scope scope(device);
    if (scope.error != cudaSuccess) return kvc_cuda_fail("bsr_matmul", scope.error);
    const kvc_status status = bsr_wgmma(job, args->values.dtype, device, (cudaStream_t)stream);
    return status == KVC_ENOTSUP ? bsr_mma(job, args->values.dtype, (cudaStream_t)stream) : status;
}
