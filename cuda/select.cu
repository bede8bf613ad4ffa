/* select.cu: kvc_select_cuda (select.h): exactly the CPU's choice. A block a list: the least importance that is kept is
 * found bit by bit, 11 at a time, by counting in shared memory; the oldest at it are found by a scan in their order. */
#include "kvcomp/select.h"
#include "score_common.cuh"

extern "C" {
#include "cpu/select_list.h"
}

namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr int BATCH = 4; /* loads in flight of a thread */
static_assert(KVC_DIGITS == 2 * THREADS, "a thread looks at two digits");

struct call {
    uint8_t *kept;
    const float *importance;
    const int32_t *keep, *first;
    int s, sinks, window;
};

struct shared {
    uint32_t histogram[KVC_DIGITS];
    uint32_t warps[WARPS];
    uint32_t digit, equal, here;
};

/* Order of floats >= 0; -0 is +0. */
__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value + 0.0f); }

/* The sum of what the threads before this one have; sums over a warp are left in m.warps. */
__device__ uint32_t sum_before(uint32_t value, shared &m) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    uint32_t sum = value;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const uint32_t other = __shfl_up_sync(ALL, sum, by);
        if (lane >= by) sum += other;
    }
    if (lane == 31) m.warps[warp] = sum;
    __syncthreads();
    return sum - value + __reduce_add_sync(ALL, lane < warp ? m.warps[lane] : 0);
}

/* Of tokens begin .. end-1, those that agree with `threshold` in the bits `known`, counted by their digit at `shift`.
 */
__device__ void count(shared &m, const float *importance, int begin, int end, uint32_t threshold, uint32_t known,
                      int shift) {
    m.histogram[threadIdx.x] = m.histogram[threadIdx.x + THREADS] = 0;
    __syncthreads();
    for (int64_t t = (int64_t)begin + threadIdx.x; t < end; t += BATCH * THREADS) {
        float x[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) x[k] = t + k * THREADS < end ? __ldg(importance + t + k * THREADS) : 0.0f;
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const uint32_t bits = bits_of(x[k]);
            if (t + k * THREADS < end && (bits & known) == threshold)
                atomicAdd(&m.histogram[bits >> shift & (KVC_DIGITS - 1)], 1u);
        }
    }
    __syncthreads();
}

__global__ void __launch_bounds__(THREADS) select_kernel(const __grid_constant__ call a) {
    __shared__ shared m;
    const int64_t list = blockIdx.x;
    const int first = a.first ? min(max(a.first[list], 0), a.s) : 0;
    const int keep = (int)kvc_select_kept(a.s - first, max(a.keep[list], 0), a.window);
    int window = min(keep, a.window);
    const int sinks = min(keep - window, a.sinks);
    if (!a.importance) window = keep - sinks;
    const int begin = first + sinks, end = a.s - window;
    uint32_t equal = keep - window - sinks; /* to be found among begin .. end-1, which are as many or more */
    const float *importance = a.importance + list * a.s;
    uint8_t *kept = a.kept + list * a.s;

    uint32_t threshold = ALL, ties = 0; /* ALL: nothing is kept for its importance */
    if (equal > 0) {
        threshold = 0;
        uint32_t known = 0;
        for (int shift = 2 * KVC_DIGIT_BITS; shift >= 0; shift -= KVC_DIGIT_BITS) {
            count(m, importance, begin, end, threshold, known, shift);
            /* Thread i has the digits 2i and 2i + 1 from the top. */
            const uint32_t top = KVC_DIGITS - 1 - 2 * threadIdx.x;
            const uint32_t high = m.histogram[top], low = m.histogram[top - 1];
            const uint32_t above = sum_before(high + low, m);
            if (above < equal && above + high + low >= equal) { /* one thread */
                const bool second = above + high < equal;
                m.digit = second ? top - 1 : top;
                m.equal = equal - above - (second ? high : 0);
                m.here = second ? low : high;
            }
            __syncthreads();
            threshold |= m.digit << shift;
            known |= (uint32_t)(KVC_DIGITS - 1) << shift;
            equal = m.equal;
            ties = m.here;
        }
    }

    /* Of tokens at the threshold the oldest `equal`. Warps have neighbouring stretches of whole warp widths. */
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int stretch = ((end - begin) / THREADS + 1) * 32; /* 32 of them are more than all */
    const int64_t from = begin + (int64_t)warp * stretch, to = min(from + stretch, (int64_t)end);
    uint32_t older = 0; /* at the threshold */
    if (equal < ties) {
        uint32_t mine = 0;
        for (int64_t t = from + lane; t < to; t += 32) mine += bits_of(__ldg(importance + t)) == threshold;
        mine = __reduce_add_sync(ALL, mine);
        older = sum_before(lane == 0 ? mine : 0, m); /* lane 0: of the warps before */
        older = __shfl_sync(ALL, older, 0);
    }
    for (int64_t t0 = from; t0 < to; t0 += 32) {
        const int64_t t = t0 + lane;
        const uint32_t bits = t < to && ties > 0 ? bits_of(__ldg(importance + t)) : 0;
        const unsigned at = __ballot_sync(ALL, t < to && ties > 0 && bits == threshold);
        const uint32_t rank = older + __popc(at & ((1u << lane) - 1));
        older += __popc(at);
        if (t < to) kept[t] = ties > 0 && (bits > threshold || (bits == threshold && rank < equal));
    }
    for (int64_t t = threadIdx.x; t < begin; t += THREADS) kept[t] = t >= first;
    for (int64_t t = (int64_t)end + threadIdx.x; t < a.s; t += THREADS) kept[t] = 1;
}

} // namespace

extern "C" kvc_status kvc_select_cuda(const kvc_select_args *args, kvc_stream stream) {
    KVC_TRY(kvc_select_check(args));
    const kvc_named tensors[] = {
        {"kept", &args->kept}, {"importance", &args->importance}, {"keep", &args->keep}, {"first", &args->first}};
    KVC_TRY(kvc_cuda_check("select", tensors, sizeof tensors / sizeof *tensors));
    const int64_t n = args->kept.shape[0], s = args->kept.shape[1];
    KVC_CHECK(n <= INT32_MAX, KVC_ENOTSUP, "select: kept: expected fewer than 2^31 lists on CUDA, got %lld",
              (long long)n);
    if (n == 0 || s == 0) return KVC_OK;
    const call a = {(uint8_t *)args->kept.data,
                    kvc_given(&args->importance) ? (const float *)args->importance.data : nullptr,
                    (const int32_t *)args->keep.data,
                    kvc_given(&args->first) ? (const int32_t *)args->first.data : nullptr,
                    (int)s,
                    args->sinks,
                    args->window};
    kvc_device_scope scope(args->kept.device_id);
    cudaError_t error = scope.error;
    if (error == cudaSuccess) {
        select_kernel<<<(unsigned)n, THREADS, 0, (cudaStream_t)stream>>>(a);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("select", error);
}
