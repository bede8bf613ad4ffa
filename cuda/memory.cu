/* memory.cu: see memory.cuh. Virtual memory management is the driver's: its functions are found by name, so that the
 * library needs no libcuda to load. A mapping has memory of its own, and is only ever undone as a whole. */
#include <cuda.h>

#include "memory.cuh"

#define LOOK_BYTES ((int64_t)64 << 20) /* from here on a look at what is free is cheaper than to find out by trying */

namespace {

struct driver {
    decltype(&cuGetErrorName) error_name;
    decltype(&cuDeviceGetAttribute) attribute;
    decltype(&cuMemGetAllocationGranularity) granularity;
    decltype(&cuMemAddressReserve) reserve;
    decltype(&cuMemAddressFree) unreserve;
    decltype(&cuMemCreate) create;
    decltype(&cuMemMap) map;
    decltype(&cuMemSetAccess) access;
    decltype(&cuMemUnmap) unmap;
    decltype(&cuMemRelease) release;
    bool complete;
};

template <typename F> bool find(F &function, const char *name) {
    const unsigned int version = 12000; /* all of them are older */
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, (void **)&function, version, cudaEnableDefault, &found);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess && function != nullptr;
}

driver find_driver() {
    driver d = {};
    d.complete = find(d.error_name, "cuGetErrorName") && find(d.attribute, "cuDeviceGetAttribute") &&
                 find(d.granularity, "cuMemGetAllocationGranularity") && find(d.reserve, "cuMemAddressReserve") &&
                 find(d.unreserve, "cuMemAddressFree") && find(d.create, "cuMemCreate") && find(d.map, "cuMemMap") &&
                 find(d.access, "cuMemSetAccess") && find(d.unmap, "cuMemUnmap") && find(d.release, "cuMemRelease");
    return d;
}

/* Called when there is a driver. */
const driver &cu() {
    static const driver table = find_driver();
    return table;
}

CUmemAllocationProp properties(int device) {
    CUmemAllocationProp p = {};
    p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    p.location.id = device;
    return p;
}

kvc_status fail(const char *what, CUresult error) {
    const char *name = nullptr;
    if (cu().error_name(error, &name) != CUDA_SUCCESS || !name) name = "an unknown error";
    return kvc_fail(KVC_ECUDA, "arena: CUDA: expected %s, got %s", what, name);
}

kvc_status fail_runtime(const char *what, cudaError_t error) {
    cudaGetLastError();
    return kvc_fail(KVC_ECUDA, "arena: CUDA: expected %s, got %s: %s", what, cudaGetErrorName(error),
                    cudaGetErrorString(error));
}

kvc_status fail_memory(const kvc_memory *memory, int64_t bytes, size_t available, size_t total) {
    return kvc_fail(KVC_ENOMEM, "arena: expected %lld bytes of free memory on cuda:%d, got %lld of %lld",
                    (long long)bytes, memory->device, (long long)available, (long long)total);
}

/* Memory calls are no stream operations: a capture on any thread may go on. */
struct capture_scope {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    capture_scope() { cudaThreadExchangeStreamCaptureMode(&mode); }
    ~capture_scope() { cudaThreadExchangeStreamCaptureMode(&mode); }
    capture_scope(const capture_scope &) = delete;
    capture_scope &operator=(const capture_scope &) = delete;
};

} // namespace

kvc_status kvc_memory_reserve(int device, int64_t bytes, kvc_memory *out) {
    const char *why = nullptr;
    const int count = kvc_device_count(&why);
    KVC_CHECK(count > 0, KVC_ENODEV, "arena: expected CUDA to be usable: %s", why);
    KVC_CHECK(device < count, KVC_EINVAL, "arena: device: expected a CUDA device in 0..%d, got %d", count - 1, device);
    const kvc_device_scope scope(device);
    cudaError_t error = scope.error;
    size_t available = 0, total = 0;
    if (error == cudaSuccess) error = cudaMemGetInfo(&available, &total); /* makes the device's context, too */
    if (error != cudaSuccess) return fail_runtime("a usable device", error);
    int managed = 0;
    if (cu().complete) cu().attribute(&managed, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device);
    KVC_CHECK(managed, KVC_ENOTSUP, "arena: device: expected virtual memory management, got none on cuda:%d", device);
    const CUmemAllocationProp of = properties(device);
    size_t granule = 0;
    CUresult result = cu().granularity(&granule, &of, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (result != CUDA_SUCCESS) return fail("a granularity of memory", result);
    const int64_t wanted = bytes > 0 ? bytes : 2 * (int64_t)total;
    const int64_t reserved =
        kvc_ceil_div(wanted < KVC_MEMORY_MOST ? wanted : KVC_MEMORY_MOST, (int64_t)granule) * (int64_t)granule;
    CUdeviceptr base = 0;
    result = cu().reserve(&base, (size_t)reserved + granule, 0, 0, 0);
    KVC_CHECK(result == CUDA_SUCCESS, KVC_ENOMEM, "arena: expected %lld bytes of address space on cuda:%d, got none",
              (long long)reserved, device);
    out->base = (char *)base;
    out->reserved = reserved;
    out->granule = (int64_t)granule;
    out->device = device;
    return KVC_OK;
}

kvc_status kvc_memory_commit(const kvc_memory *memory, int64_t first, int64_t bytes, int64_t each) {
    const kvc_device_scope scope(memory->device);
    if (scope.error != cudaSuccess) return fail_runtime("a usable device", scope.error);
    const capture_scope relaxed;
    const CUmemAllocationProp of = properties(memory->device);
    size_t available = 0, total = 0;
    if (bytes >= LOOK_BYTES) {
        const cudaError_t error = cudaMemGetInfo(&available, &total);
        if (error != cudaSuccess) return fail_runtime("a usable device", error);
        if (available < (size_t)bytes) return fail_memory(memory, bytes, available, total);
    }
    CUresult result = CUDA_SUCCESS;
    int64_t done = 0;
    while (result == CUDA_SUCCESS && done < bytes) {
        const int64_t now = bytes - done < each ? bytes - done : each;
        CUmemGenericAllocationHandle handle;
        result = cu().create(&handle, (size_t)now, &of, 0);
        if (result != CUDA_SUCCESS) break;
        result = cu().map((CUdeviceptr)(memory->base + first + done), (size_t)now, 0, handle, 0);
        cu().release(handle); /* the mapping keeps the memory */
        if (result == CUDA_SUCCESS) done += now;
    }
    if (result == CUDA_SUCCESS) {
        CUmemAccessDesc access = {};
        access.location = of.location;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        result = cu().access((CUdeviceptr)(memory->base + first), (size_t)bytes, &access, 1);
    }
    if (result == CUDA_SUCCESS) return KVC_OK;
    for (int64_t at = 0; at < done; at += each) {
        const int64_t length = done - at < each ? done - at : each;
        cu().unmap((CUdeviceptr)(memory->base + first + at), (size_t)length);
    }
    if (result != CUDA_ERROR_OUT_OF_MEMORY || cudaMemGetInfo(&available, &total) != cudaSuccess)
        return fail("memory behind an arena", result);
    return fail_memory(memory, bytes, available, total);
}

kvc_status kvc_memory_release(const kvc_memory *memory, int64_t first, int64_t bytes) {
    const kvc_device_scope scope(memory->device);
    const capture_scope relaxed;
    cudaError_t error = scope.error;
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return fail_runtime("an idle device", error);
    cu().unmap((CUdeviceptr)(memory->base + first), (size_t)bytes);
    return KVC_OK;
}

kvc_status kvc_memory_unreserve(const kvc_memory *memory) {
    const kvc_device_scope scope(memory->device);
    if (scope.error != cudaSuccess) return fail_runtime("a usable device", scope.error);
    const CUresult result = cu().unreserve((CUdeviceptr)memory->base, (size_t)(memory->reserved + memory->granule));
    return result == CUDA_SUCCESS ? KVC_OK : fail("address space to be given back", result);
}

kvc_status kvc_memory_copy(const kvc_memory *memory, int64_t count, const kvc_copy *copies, int32_t wait,
                           kvc_stream stream) {
    const kvc_device_scope scope(memory->device);
    cudaError_t error = scope.error;
    if (error == cudaSuccess && wait) error = cudaDeviceSynchronize();
    for (int64_t i = 0; error == cudaSuccess && i < count; i++)
        error = cudaMemcpyAsync(copies[i].to, copies[i].from, (size_t)copies[i].bytes, cudaMemcpyDefault,
                                (cudaStream_t)stream);
    if (error == cudaSuccess && wait) error = cudaStreamSynchronize((cudaStream_t)stream);
    return error == cudaSuccess ? KVC_OK : fail_runtime("copies", error);
}
