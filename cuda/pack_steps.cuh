/* pack_steps.cuh: scales and zeros as bytes of a page (format.h). */
#pragma once
#include "pack_job.cuh"

namespace {

/* ---- scales and zeros, rounded already, as bytes and back */

template <int STEP> __device__ void put_step(uint8_t *to, float scale, float zero, bool zero_point) {
    if constexpr (STEP == KVC_STEP_E5M3) {
        const uint32_t pair = kvc_e5m3_pair(scale, zero);
        if (zero_point)
            *(uint16_t *)to = (uint16_t)pair;
        else
            *to = (uint8_t)pair;
    } else {
        const uint32_t low = __half_as_ushort(__float2half_rn(scale)), high = __half_as_ushort(__float2half_rn(zero));
        if (zero_point)
            *(uint32_t *)to = low | high << 16;
        else
            *(uint16_t *)to = (uint16_t)low;
    }
}

/* A symmetric layout's zero stays as it is. */
template <int STEP> __device__ void get_step(float &scale, float &zero, const uint8_t *from, bool zero_point) {
    if constexpr (STEP == KVC_STEP_E5M3) {
        scale = kvc_e5m3_to_float(from[0]);
        if (zero_point) zero = kvc_e5m3_zero(scale, from[1]);
    } else {
        scale = kvc_cuda_half_to_float(((const uint16_t *)from)[0], KVC_FLOAT16);
        if (zero_point) zero = kvc_cuda_half_to_float(((const uint16_t *)from)[1], KVC_FLOAT16);
    }
}

} // namespace
