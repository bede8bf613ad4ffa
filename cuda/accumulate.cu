/* accumulate.cu: kvc_accumulate_cuda (score.h). A block takes 64 entries of a list's table, after counting the tokens
 * of the pages before them; a warp a page. Tables that lie cost values: nothing is read beyond a list's mass. */
#include "kvcomp/score.h"
#include "score_common.cuh"

#include <float.h>
#include <math_constants.h>

namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int PAGES = 64; /* of a block */

struct call {
    float *worth;
    const float *mass;
    const kvc_page *table;
    const kvc_list *lists;
    int64_t capacity, room; /* entries of a list's row of the table; of the mass */
    double keep, gain;
    int64_t blocks; /* of a list */
};

__device__ inline int tokens_of(const kvc_page *page) { return page->tokens; }

__global__ void __launch_bounds__(THREADS) accumulate_kernel(const __grid_constant__ call a) {
    __shared__ int64_t before[WARPS];
    __shared__ int32_t start[PAGES + 1]; /* of the pages' tokens, after those of the pages before */
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int64_t list = blockIdx.x / a.blocks, low = blockIdx.x % a.blocks * PAGES;
    const int64_t pages = min(max((int64_t)a.lists[list].pages, (int64_t)0), a.capacity);
    const kvc_page *row = a.table + list * a.capacity;

    int64_t sum = 0;
    for (int64_t p = threadIdx.x; p < min(low, pages); p += THREADS) sum += tokens_of(row + p);
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(ALL, sum, other);
    if (lane == 0) before[warp] = sum;
    if (warp == 0) {
        int ahead = 0;
#pragma unroll
        for (int first = 0; first < PAGES; first += 32) {
            int here = low + first + lane < pages ? tokens_of(row + low + first + lane) : 0;
#pragma unroll
            for (int by = 1; by < 32; by *= 2) {
                const int other = __shfl_up_sync(ALL, here, by);
                if (lane >= by) here += other;
            }
            start[first + lane + 1] = ahead + here;
            ahead += __shfl_sync(ALL, here, 31);
        }
        if (lane == 0) start[0] = 0;
    }
    __syncthreads();
    int64_t from = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) from += before[i];

    for (int i = warp; i < PAGES && low + i < a.capacity; i += WARPS) {
        const int64_t end = min(from + start[i + 1], a.room);
        double mass = 0.0;
        for (int64_t t = from + start[i] + lane; t < end; t += 32) mass += (double)a.mass[list * a.room + t];
#pragma unroll
        for (int other = 16; other > 0; other /= 2) mass += __shfl_xor_sync(ALL, mass, other);
        if (lane > 0) continue;
        float *worth = a.worth + list * a.capacity + low + i;
        if (low + i >= pages) {
            *worth = 0.0f;
        } else if (fabsf(*worth) < CUDART_INF_F) { /* infinity stays, whatever it gathers */
            const double value = __dadd_rn(__dmul_rn(a.keep, (double)*worth), __dmul_rn(a.gain, mass));
            *worth = value > (double)FLT_MAX ? FLT_MAX : (float)value;
        }
    }
}

} // namespace

extern "C" kvc_status kvc_accumulate_cuda(const kvc_accumulate_args *args, kvc_stream stream) {
    KVC_TRY(kvc_accumulate_check(args));
    const kvc_named tensors[] = {
        {"table", &args->table}, {"worth", &args->worth}, {"mass", &args->mass}, {"lists", &args->lists}};
    KVC_TRY(kvc_cuda_check("accumulate", tensors, sizeof tensors / sizeof *tensors));
    const int64_t n = args->table.shape[0], capacity = args->table.shape[1], blocks = kvc_ceil_div(capacity, PAGES);
    if (n == 0 || capacity == 0) return KVC_OK;
    KVC_CHECK(n <= INT32_MAX / blocks, KVC_ENOTSUP,
              "accumulate: table: expected fewer than 2^31 blocks on CUDA, got %s", kvc_shape_text(&args->table));
    const call a = {(float *)args->worth.data,
                    (const float *)args->mass.data,
                    (const kvc_page *)args->table.data,
                    (const kvc_list *)args->lists.data,
                    capacity,
                    args->mass.shape[1],
                    (double)args->keep,
                    (double)args->gain,
                    blocks};
    kvc_device_scope scope(args->table.device_id);
    cudaError_t error = scope.error;
    if (error == cudaSuccess) {
        accumulate_kernel<<<(unsigned)(n * blocks), THREADS, 0, (cudaStream_t)stream>>>(a);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("accumulate", error);
}
