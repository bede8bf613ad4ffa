/* w4.cu: kvc_w4_matmul_cuda (w4.h): checks, the job, and which kernel takes it. */
#include <math.h>

#include "score_common.cuh"
#include "w4_job.cuh"
#include "w4_ptx.cuh"

namespace {

constexpr int ALIGN = 256;

int64_t workspace_bytes(int64_t m, const kvc_gpu &device) {
    int64_t words = w4_small_words(m);
    if (m >= KVC_W4_LARGE_ROWS && kvc_has_wgmma(device)) words = w4_large_words(m);
    const int64_t bytes = device.multiprocessors * words * (int64_t)sizeof(float);
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

/* Without inputs a product is the bias, or nothing. */
__global__ void only_bias(w4_job a) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < (int64_t)a.m * a.n;
         i += (int64_t)gridDim.x * blockDim.x) {
        const int64_t m = i / a.n, n = i % a.n;
        w4_store(a.out + m * a.out_stride, a.out_dtype, n, a.bias ? w4_load(a.bias, a.bias_dtype, n) : 0.0f);
    }
}

} // namespace

extern "C" int64_t kvc_w4_workspace_cuda(int64_t m, int64_t n, int64_t k) {
    if (n <= 0 || k <= 0 || m <= 0) return 0;
    int devices = 0;
    int64_t most = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess) cudaGetLastError();
    for (int i = 0; i < devices; i++) {
        kvc_gpu device;
        if (kvc_gpu_of(i, &device) != cudaSuccess) {
            cudaGetLastError();
            continue;
        }
        const int64_t bytes = workspace_bytes(m, device);
        most = bytes > most ? bytes : most;
    }
    return most;
}

extern "C" kvc_status kvc_w4_matmul_cuda(const kvc_w4_matmul_args *args, kvc_stream stream) {
    KVC_TRY(kvc_w4_matmul_check(args));
    const kvc_named tensors[] = {{"x", &args->x},
                                 {"out", &args->out},
                                 {"packed", &args->packed},
                                 {"bias", &args->bias},
                                 {"workspace", &args->workspace}};
    KVC_TRY(kvc_cuda_check("w4_matmul", tensors, 5));
    KVC_CHECK(args->x.dtype != KVC_FLOAT32, KVC_EDTYPE,
              "w4_matmul: x: expected float16 or bfloat16 on CUDA, got float32");
    const kvc_w4_shape *shape = &args->shape;
    const int64_t m = args->x.shape[0];
    if (m == 0 || shape->n == 0) return KVC_OK;
    w4_job a = {};
    const int64_t strips = kvc_w4_strips(shape->n), blocks = kvc_w4_blocks(shape->k, shape->group, shape->scale_bits);
    KVC_CHECK(m <= INT32_MAX && shape->n < INT32_MAX - 64 && shape->k < INT32_MAX / 2 &&
                  strips * blocks <= INT32_MAX / 2,
              KVC_ESHAPE, "w4_matmul: x: expected sizes below 2^31 and weights of fewer than 2^43, got (%lld, %lld)",
              (long long)m, (long long)shape->k);
    kvc_device_scope scope(args->x.device_id);
    if (scope.error != cudaSuccess) return kvc_cuda_fail("w4_matmul", scope.error);
    kvc_gpu device;
    cudaError_t error = kvc_gpu_of(args->x.device_id, &device);
    if (error != cudaSuccess) return kvc_cuda_fail("w4_matmul", error);
    KVC_CHECK(device.capability >= KVC_LEAST_CAPABILITY, KVC_ENOTSUP,
              "w4_matmul: device: expected compute capability %d.%d or newer, got %d.%d", KVC_LEAST_CAPABILITY / 10,
              KVC_LEAST_CAPABILITY % 10, device.capability / 10, device.capability % 10);
    a.packed = (const char *)args->packed.data;
    a.x = (const char *)args->x.data;
    a.out = (char *)args->out.data;
    a.bias = (const char *)args->bias.data;
    a.parts = (float *)args->workspace.data;
    a.x_stride = 2 * args->x.strides[0];
    a.out_stride = kvc_dtype_size(args->out.dtype) * args->out.strides[0];
    a.m = (int32_t)m;
    a.n = (int32_t)shape->n;
    a.k = (int32_t)shape->k;
    a.strips = (int32_t)strips;
    a.blocks = (int32_t)blocks;
    a.inputs = kvc_w4_block_inputs(shape->group, shape->scale_bits);
    a.code_bytes = kvc_w4_code_bytes(shape->group, shape->scale_bits);
    a.block_bytes = kvc_w4_block_bytes(shape->group, shape->scale_bits);
    a.group_bytes = kvc_w4_group_bytes(shape->scale_bits);
    a.scale_bits = kvc_w4_code_bits(shape->scale_bits);
    for (int plane = 8, i = 0, left = a.scale_bits; plane > 0; plane /= 2, i++) {
        if (i > 0) a.plane_at[i - 1] = KVC_W4_ROWS / 8 * (a.scale_bits - left);
        if (left & plane) left -= plane, a.plane_factor[i] = 1u << (15 - a.scale_bits + left);
    }
    a.group_shift = shape->group == 32 ? 5 : shape->group == 64 ? 6 : 7;
    a.out_dtype = args->out.dtype;
    a.bias_dtype = args->bias.dtype;
    a.early = args->early;
    a.aligned = (uintptr_t)a.x % 16 == 0 && (m == 1 || a.x_stride % 16 == 0);
    int64_t end = 0;
    for (int i = 0; i < KVC_W4_MOST_PARTS; i++) {
        if (i > 0) a.begins[i - 1] = i < args->part_count ? (int32_t)end : INT32_MAX;
        a.factors[i] = ldexpf(1.0f, kvc_w4_exponent_of(args, end));
        if (i < args->part_count) end += args->parts[i].n;
    }
    if (blocks == 0) {
        only_bias<<<256, 256, 0, (cudaStream_t)stream>>>(a);
        error = cudaGetLastError();
        return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("w4_matmul", error);
    }
    KVC_TRY(kvc_expect_workspace("w4_matmul", &args->workspace, workspace_bytes(m, device)));
    const bool half = args->x.dtype == KVC_FLOAT16;
    if (m >= KVC_W4_LARGE_ROWS && a.aligned && a.x_stride >= 2 * shape->k && kvc_has_wgmma(device)) {
        error = half ? kvc_w4_large_half(&a, shape->group, &device, (cudaStream_t)stream)
                     : kvc_w4_large_bfloat(&a, shape->group, &device, (cudaStream_t)stream);
        return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("w4_matmul", error);
    }
    a.m = (int32_t)(m < KVC_W4_SMALL_ROWS ? m : KVC_W4_SMALL_ROWS);
    while (a.m > 1 && w4_small_shared(&a, &device) == 0) a.m = (a.m + 1) / 2;
    for (int64_t row = 0, rows = a.m; row < m && error == cudaSuccess; row += rows) {
        w4_job part = a;
        part.m = (int32_t)(m - row < rows ? m - row : rows);
        part.x += row * a.x_stride;
        part.out += row * a.out_stride;
        part.early = a.early || row > 0;
        error = half ? kvc_w4_small_half(&part, shape->group, &device, (cudaStream_t)stream)
                     : kvc_w4_small_bfloat(&part, shape->group, &device, (cudaStream_t)stream);
    }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("w4_matmul", error);
}
