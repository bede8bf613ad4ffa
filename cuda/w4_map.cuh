/* w4_map.cuh: tensor maps of x: 64 inputs of some rows at a time, with a swizzle of 128 bytes. */
#pragma once
#include <cuda.h>

#include "w4_job.cuh"

namespace {

using w4_encode_fn = decltype(&cuTensorMapEncodeTiled);

cudaError_t w4_encoder(w4_encode_fn *out) {
    static w4_encode_fn encode;
    if (!encode) {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess) return error;
        if (!found) return cudaErrorNotSupported;
        encode = (w4_encode_fn)found;
    }
    *out = encode;
    return cudaSuccess;
}

/* `rank` 2: [m][k]; 3: [k / 64][m][64], which wants whole 64 inputs. A copy brings 64 inputs of `rows` rows, or those
 * of a block of W. */
cudaError_t w4_map_of(CUtensorMap *map, const w4_job *a, int rank, int rows, bool brain) {
    w4_encode_fn encode;
    const cudaError_t error = w4_encoder(&encode);
    if (error != cudaSuccess) return error;
    const cuuint64_t sizes[3] = {(cuuint64_t)(rank == 2 ? a->k : 64), (cuuint64_t)a->m, (cuuint64_t)(a->k / 64)};
    const cuuint64_t strides[2] = {a->m == 1 ? ((cuuint64_t)a->k * 2 + 15) / 16 * 16 : (cuuint64_t)a->x_stride, 128};
    const cuuint32_t box[3] = {64, (cuuint32_t)rows, (cuuint32_t)(a->inputs / 64)}, steps[3] = {1, 1, 1};
    const CUresult result =
        encode(map, brain ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, (cuuint32_t)rank,
               (void *)a->x, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

} // namespace
