/* bsr_job.cuh: one product with a block-sparse matrix, as its kernels see it. */
#pragma once
#include "common.cuh"
#include "kvcomp/bsr.h"

struct bsr_job {
    const int32_t *plan;
    const char *values, *dense;
    char *out;
    int64_t dense_pitch, out_pitch; /* elements */
    kvc_bsr_head head;              /* what the plan's has to be; steps is not compared */
    int32_t rows, depth, columns;   /* of op(A), of op(A), of dense */
    int32_t out_type;
    float beta;
    uint32_t *counter;
};

/* The wgmma kernel, if it takes this product: KVC_ENOTSUP, and nothing said, where it does not. */
kvc_status bsr_wgmma(const bsr_job &job, int32_t type, int device, cudaStream_t stream);
kvc_status bsr_mma(const bsr_job &job, int32_t type, cudaStream_t stream);

namespace {

__device__ __forceinline__ const kvc_bsr_tile *bsr_tiles(const bsr_job &job) {
    return (const kvc_bsr_tile *)(job.plan + KVC_BSR_HEAD);
}

__device__ __forceinline__ const int32_t *bsr_steps(const bsr_job &job) {
    return job.plan + kvc_bsr_steps(job.rows, job.head.blocks);
}

/* What the work `work` of tiles x groups is. */
__device__ __forceinline__ kvc_bsr_place bsr_place(const bsr_job &job, uint32_t work, uint32_t groups, uint32_t panel) {
    const uint32_t tiles = (uint32_t)job.head.tiles;
    return kvc_bsr_place_of(work, tiles, min((uint32_t)((const kvc_bsr_head *)job.plan)->long_tiles, tiles), groups,
                            panel);
}

/* Whether the plan is one of this matrix. */
__device__ __forceinline__ bool bsr_plan_fits(const bsr_job &job) {
    const int4 a = ((const int4 *)job.plan)[0], b = ((const int4 *)job.plan)[1];
    return a.x == job.head.magic && a.y == job.head.block && a.z == job.head.transpose && a.w == job.head.tiles &&
           b.x == job.head.m && b.y == job.head.k && b.z == job.head.blocks;
}

/* Element i of a row of `type`, as float32. */
__device__ __forceinline__ float bsr_load(const char *row, int64_t i, int type) {
    if (type == KVC_FLOAT32) return ((const float *)row)[i];
    if (type == KVC_FLOAT16) return __half2float(((const __half *)row)[i]);
    return __bfloat162float(((const __nv_bfloat16 *)row)[i]);
}

__device__ __forceinline__ void bsr_store(char *row, int64_t i, int type, float value) {
    if (type == KVC_FLOAT32)
        ((float *)row)[i] = value;
    else if (type == KVC_FLOAT16)
        ((__half *)row)[i] = __float2half_rn(value);
    else
        ((__nv_bfloat16 *)row)[i] = __float2bfloat16_rn(value);
}

/* Two in a word; too large for the type becomes infinite. */
__device__ __forceinline__ uint32_t bsr_pair(float low, float high, int type) {
    uint32_t bits;
    if (type == KVC_FLOAT16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

} // namespace
