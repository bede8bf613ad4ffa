/* backend.cu: the table behind the library's one exported symbol, and the words for what CUDA can answer. */
#include <stdio.h>
#include <stdlib.h>

#include "common.cuh"
#include "memory.cuh"

static int driver_version(void) {
    int version = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess) cudaGetLastError();
    return version;
}

static int runtime_version(void) { return CUDART_VERSION; }

cudaError_t kvc_gpu_of(int device, kvc_gpu *out) {
    static kvc_gpu known[64];
    if (device < 0 || device >= (int)(sizeof known / sizeof *known)) return cudaErrorInvalidDevice;
    if (__atomic_load_n(&known[device].multiprocessors, __ATOMIC_ACQUIRE) == 0) {
        kvc_gpu found = {};
        int major = 0, minor = 0;
        const struct {
            int *to;
            cudaDeviceAttr what;
        } facts[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                     {&minor, cudaDevAttrComputeCapabilityMinor},
                     {&found.shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                     {&found.multiprocessors, cudaDevAttrMultiProcessorCount}};
        for (const auto &fact : facts) {
            const cudaError_t error = cudaDeviceGetAttribute(fact.to, fact.what, device);
            if (error != cudaSuccess) return error;
        }
        known[device].shared_most = found.shared_most;
        known[device].capability = 10 * major + minor;
        __atomic_store_n(&known[device].multiprocessors, found.multiprocessors, __ATOMIC_RELEASE);
    }
    *out = known[device];
    return cudaSuccess;
}

static int capability(int device) {
    kvc_gpu facts = {};
    if (kvc_gpu_of(device, &facts) != cudaSuccess) cudaGetLastError();
    return facts.capability;
}

static const char *device_name(int device, int *compute_capability) {
    static thread_local cudaDeviceProp properties;
    if (compute_capability) *compute_capability = capability(device);
    if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) return properties.name;
    cudaGetLastError();
    return "";
}

int kvc_device_count(const char **why) {
    static thread_local char sentence[512];
    int count = 0, best = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) cudaGetLastError();
    for (int i = 0; error == cudaSuccess && i < count; i++) best = capability(i) > best ? capability(i) : best;
    const int driver = driver_version();
    *why = sentence;
    /* Without a driver the runtime answers 35 or 100, by its version; an old driver is 35 too. */
    if ((error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) && driver == 0)
        snprintf(sentence, sizeof sentence, "cuda: driver: expected an NVIDIA driver, got none");
    else if (error == cudaErrorInsufficientDriver)
        snprintf(sentence, sizeof sentence, "cuda: driver: expected one for CUDA %d.%d or newer, got one for %d.%d",
                 CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, driver / 1000, driver % 1000 / 10);
    else if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0))
        snprintf(sentence, sizeof sentence, "cuda: devices: expected at least one NVIDIA GPU, got none%s",
                 getenv("CUDA_VISIBLE_DEVICES") ? " (CUDA_VISIBLE_DEVICES is set)" : "");
    else if (error != cudaSuccess)
        snprintf(sentence, sizeof sentence, "cuda: driver: expected a device count, got %s: %s",
                 cudaGetErrorName(error), cudaGetErrorString(error));
    else if (best < KVC_LEAST_CAPABILITY)
        snprintf(sentence, sizeof sentence,
                 "cuda: devices: expected compute capability %d.%d or newer, got %d.%d at best",
                 KVC_LEAST_CAPABILITY / 10, KVC_LEAST_CAPABILITY % 10, best / 10, best % 10);
    else
        *why = nullptr;
    return *why ? 0 : count;
}

kvc_status kvc_cuda_fail(const char *op, cudaError_t error) {
    cudaGetLastError(); /* the next launch must not report it again */
    if (error == cudaErrorMemoryAllocation)
        return kvc_fail(KVC_ENOMEM, "%s: CUDA: expected free device memory, got %s", op, cudaGetErrorName(error));
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
        return kvc_fail(KVC_ECUDA, "%s: CUDA: expected a device of the architectures %s, got %s: %s", op,
                        KVC_CUDA_ARCHS, cudaGetErrorName(error), cudaGetErrorString(error));
    return kvc_fail(KVC_ECUDA, "%s: CUDA: expected a launch, got %s: %s", op, cudaGetErrorName(error),
                    cudaGetErrorString(error));
}

extern "C" __attribute__((visibility("default"))) const kvc_backend *kvc_cuda_backend(void) {
    static const kvc_backend table = {
        .api_version = KVC_BACKEND_API,
        .format_version = KVC_FORMAT_VERSION,
        .architectures = KVC_CUDA_ARCHS,
        .device_count = kvc_device_count,
        .runtime_version = runtime_version,
        .driver_version = driver_version,
        .device_name = device_name,
        .error = kvc_last_error,
        .pack = kvc_pack_cuda,
        .unpack = kvc_unpack_cuda,
        .append = kvc_append_cuda,
        .attend = kvc_attend_cuda,
        .attend_workspace = kvc_attend_workspace_cuda,
        .divide = kvc_divide_cuda,
        .divide_words = kvc_divide_words,
        .score = kvc_score_cuda,
        .norms = kvc_norms_cuda,
        .accumulate = kvc_accumulate_cuda,
        .select = kvc_select_cuda,
        .bsr_matmul = kvc_bsr_matmul_cuda,
        .bsr_sddmm = kvc_bsr_sddmm_cuda,
        .memory_reserve = kvc_memory_reserve,
        .memory_commit = kvc_memory_commit,
        .memory_release = kvc_memory_release,
        .memory_unreserve = kvc_memory_unreserve,
        .memory_copy = kvc_memory_copy,
        .w4_matmul = kvc_w4_matmul_cuda,
        .w4_workspace = kvc_w4_workspace_cuda,
    };
    return &table;
}
