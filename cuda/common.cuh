/* common.cuh: what the CUDA definitions share: the C core's headers with C linkage, devices, errors, 16-bit floats. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

extern "C" {
#include "core/core.h"
}

#define KVC_LEAST_CAPABILITY 80 /* bf16 arithmetic and cp.async */

/* Fails with one sentence: the CUDA error's name and text, and what the binary holds where that is the matter. */
kvc_status kvc_cuda_fail(const char *op, cudaError_t error);

struct kvc_gpu {
    int multiprocessors;
    int shared_most; /* bytes of shared memory that a block may ask for */
    int capability;  /* 10 * major + minor */
};

/* Of a device; asked for once, by any thread. An error is the caller's to report. */
cudaError_t kvc_gpu_of(int device, kvc_gpu *out);

/* Whether a device runs sm_90a's instructions (wgmma, TMA), and the library has code with them. */
static inline bool kvc_has_wgmma(const kvc_gpu &gpu) { return gpu.capability == 90 && strstr(KVC_CUDA_ARCHS, "90a"); }

/* Whether a kernel may be launched while the one before it runs: where the code that a device loads waits for that
 * (`wait_for_previous`), which PTX for 8.0 does not, whatever the device could do. */
static inline bool kvc_overlaps(const kvc_gpu &gpu) {
    return kvc_has_wgmma(gpu) || (gpu.capability == 100 && strstr(KVC_CUDA_ARCHS, "100a"));
}

/* Where, and how large, a kernel is launched: over the one before it where that may be. */
struct kvc_launch {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute overlap = {};
    kvc_launch(const kvc_gpu &gpu, dim3 grid, dim3 block, int shared, cudaStream_t stream) {
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared;
        config.stream = stream;
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &overlap;
        config.numAttrs = kvc_overlaps(gpu) ? 1 : 0;
    }
    kvc_launch(const kvc_launch &) = delete;
    kvc_launch &operator=(const kvc_launch &) = delete;
};

/* Makes `device` current for a scope. Costs no driver call where it is current already. */
struct kvc_device_scope {
    int previous;
    cudaError_t error;
    explicit kvc_device_scope(int device) : previous(device) {
        error = cudaGetDevice(&previous);
        if (error == cudaSuccess && previous != device)
            error = cudaSetDevice(device);
        else
            previous = -1;
    }
    ~kvc_device_scope() {
        if (previous >= 0) cudaSetDevice(previous);
    }
    kvc_device_scope(const kvc_device_scope &) = delete;
    kvc_device_scope &operator=(const kvc_device_scope &) = delete;
};

/* Programmatic dependent launch: until what the kernels before wrote may be read. */
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Arrivals of a warp at a barrier, where one lane arrives for all: compute-sanitizer's racecheck does not take a
 * __syncwarp for an order between what the others did and that arrival, so its build lets every lane arrive. */
#ifdef KVC_RACECHECK
constexpr int WARP_ARRIVALS = 32;
#else
constexpr int WARP_ARRIVALS = 1;
#endif

__device__ __forceinline__ bool arrives_for_warp(int lane) { return WARP_ARRIVALS == 32 || lane == 0; }

/* 16-bit floats as core.h's, bit for bit: nearest even, saturated at the largest finite value; Inf and NaN stay. */
__device__ inline float kvc_cuda_half_to_float(uint16_t bits, int dtype) {
    return dtype == KVC_BFLOAT16 ? __uint_as_float((uint32_t)bits << 16) : __half2float(__ushort_as_half(bits));
}

/* Two in a word, `low` in its low half. */
__device__ inline uint32_t kvc_cuda_floats_to_halves(float low, float high, int dtype) {
    const bool brain = dtype == KVC_BFLOAT16;
    uint32_t bits;
    if (brain)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    if (fmaxf(fabsf(low), fabsf(high)) >= (brain ? 0x1.ffp127f : 65520.0f)) {
        const uint32_t infinity = brain ? 0x7f80 : 0x7c00; /* less one: the largest finite number */
        if ((bits & 0x7fff) == infinity && fabsf(low) < INFINITY) bits -= 1;
        if ((bits >> 16 & 0x7fff) == infinity && fabsf(high) < INFINITY) bits -= 0x10000;
    }
    return bits;
}
