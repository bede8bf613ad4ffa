/* norms.cu: kvc_norms_cuda (score.h). A warp a row; sums in double. Centered, one block has a list, as its mean comes
 * first. */
#include "kvcomp/score.h"
#include "score_common.cuh"

#include <float.h>

namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr int BLOCK_ROWS = 4 * WARPS; /* of a block that has no mean to find */

struct call {
    float *out;
    const char *rows;
    int64_t sequence, head, token; /* strides in bytes */
    const int32_t *first;
    int type, heads, s, d;
    int blocks; /* of a list */
};

__device__ inline float element(const char *row, int channel, int type) {
    return type == KVC_FLOAT32 ? __ldg((const float *)row + channel)
                               : kvc_cuda_half_to_float(__ldg((const uint16_t *)row + channel), type);
}

/* The mean over tokens first .. s-1 by channel: threads share the tokens of a channel, in a fixed order. */
__device__ void find_mean(double *mean, double *parts, const call &a, const char *rows, int first) {
    const int channel = threadIdx.x % a.d, shares = THREADS / a.d, share = threadIdx.x / a.d;
    double sum = 0.0;
    if (share < shares) {
#pragma unroll 8
        for (int64_t t = first + share; t < a.s; t += shares)
            sum += (double)element(rows + t * a.token, channel, a.type);
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < a.d) {
        sum = 0.0;
        for (int i = 0; i < shares; i++) sum += parts[i * a.d + threadIdx.x];
        mean[threadIdx.x] = sum / (double)max(a.s - first, 1);
    }
    __syncthreads();
}

template <bool CENTERED> __global__ void __launch_bounds__(THREADS) norms_kernel(const __grid_constant__ call a) {
    __shared__ double mean[KVC_MAX_HEAD_DIM], parts[CENTERED ? THREADS : 1];
    const int64_t list = blockIdx.x / a.blocks, block = blockIdx.x % a.blocks;
    const int first = a.first ? min(max(a.first[list / a.heads], 0), a.s) : 0, lane = threadIdx.x & 31;
    const char *rows = a.rows + list / a.heads * a.sequence + list % a.heads * a.head;
    if (CENTERED) find_mean(mean, parts, a, rows, first);
    const int64_t begin = CENTERED ? 0 : block * BLOCK_ROWS,
                  end = CENTERED ? a.s : min(begin + BLOCK_ROWS, (int64_t)a.s);
    for (int64_t t = begin + threadIdx.x / 32; t < end; t += WARPS) {
        double sum = 0.0;
        if (t >= first) {
#pragma unroll
            for (int k = 0; k < KVC_MAX_HEAD_DIM / 32; k++) {
                const int channel = 32 * k + lane;
                if (channel >= a.d) break;
                const double x =
                    (double)element(rows + t * a.token, channel, a.type) - (CENTERED ? mean[channel] : 0.0);
                sum += x * x;
            }
        }
#pragma unroll
        for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(ALL, sum, other);
        if (lane == 0) {
            const double norm = sqrt(sum);
            a.out[list * a.s + t] = norm > (double)FLT_MAX ? FLT_MAX : (float)norm;
        }
    }
}

} // namespace

extern "C" kvc_status kvc_norms_cuda(const kvc_norms_args *args, kvc_stream stream) {
    KVC_TRY(kvc_norms_check(args));
    const kvc_named tensors[] = {{"rows", &args->rows}, {"out", &args->out}, {"first", &args->first}};
    KVC_TRY(kvc_cuda_check("norms", tensors, sizeof tensors / sizeof *tensors));
    const kvc_tensor *rows = &args->rows;
    const int64_t lists = rows->shape[0] * rows->shape[1], s = rows->shape[2], size = kvc_dtype_size(rows->dtype);
    const int64_t blocks = args->centered ? 1 : kvc_ceil_div(s, BLOCK_ROWS);
    if (lists == 0 || s == 0) return KVC_OK;
    KVC_CHECK(s <= INT32_MAX && lists <= INT32_MAX / blocks, KVC_ENOTSUP,
              "norms: rows: expected fewer than 2^31 tokens and blocks of %d on CUDA, got %s", BLOCK_ROWS,
              kvc_shape_text(rows));
    const call a = {(float *)args->out.data,
                    (const char *)rows->data,
                    rows->strides[0] * size,
                    rows->strides[1] * size,
                    rows->strides[2] * size,
                    kvc_given(&args->first) ? (const int32_t *)args->first.data : nullptr,
                    rows->dtype,
                    (int)rows->shape[1],
                    (int)s,
                    (int)rows->shape[3],
                    (int)blocks};
    kvc_device_scope scope(rows->device_id);
    cudaError_t error = scope.error;
    if (error == cudaSuccess) {
        if (args->centered)
            norms_kernel<true><<<(unsigned)lists, THREADS, 0, (cudaStream_t)stream>>>(a);
        else
            norms_kernel<false><<<(unsigned)(lists * blocks), THREADS, 0, (cudaStream_t)stream>>>(a);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("norms", error);
}
