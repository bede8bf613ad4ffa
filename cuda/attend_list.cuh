/* attend_list.cuh: what attention does with a list besides its pages: rows in and out, queries' numbers, the end of a
 * list, which blocks share; and with a page's scales, caps, and the tokens behind it. For both kernels
 * (attend_kernel.cuh, attend_rows.cuh). */
#pragma once
#include "attend_job.cuh"

namespace {

/* Elements l, l + 32, ... of a row, by lane l; 0 behind its end. All loads are on their way before one is looked at. */
template <int D>
__device__ __forceinline__ void load_row(float (&x)[(D + 31) / 32], const char *row, bool there, int dtype) {
    constexpr int N = (D + 31) / 32;
    const int lane = threadIdx.x & 31;
    uint32_t raw[N];
    if (dtype == KVC_FLOAT32) {
#pragma unroll
        for (int k = 0; k < N; k++) raw[k] = there && lane + 32 * k < D ? ((const uint32_t *)row)[lane + 32 * k] : 0;
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) raw[k] = there && lane + 32 * k < D ? ((const uint16_t *)row)[lane + 32 * k] : 0;
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        x[k] = dtype == KVC_FLOAT32    ? __uint_as_float(raw[k])
               : dtype == KVC_BFLOAT16 ? __uint_as_float(raw[k] << 16)
                                       : __half2float(__ushort_as_half((uint16_t)raw[k]));
}

__device__ __forceinline__ void store_element(char *row, int i, float value, int dtype) {
    if (dtype == KVC_FLOAT32)
        ((float *)row)[i] = value;
    else
        ((uint16_t *)row)[i] = (uint16_t)kvc_cuda_floats_to_halves(value, value, dtype);
}

/* Hadamard in blocks of the largest power of two dividing D (pack.h); lane l holds channels l, l + 32, ... */
template <int D> __device__ __forceinline__ void rotate(float (&x)[(D + 31) / 32]) {
    constexpr int N = (D + 31) / 32, BLOCK = D & -D;
#pragma unroll
    for (int stride = 1; stride < BLOCK; stride *= 2) {
        if (stride < 32) {
            const bool low = !(threadIdx.x & stride);
#pragma unroll
            for (int k = 0; k < N; k++) {
                const float other = __shfl_xor_sync(ALL, x[k], stride);
                x[k] = low ? x[k] + other : other - x[k];
            }
        } else {
#pragma unroll
            for (int k = 0; k < N; k++)
                if (!(k & stride / 32) && k + stride / 32 < N) {
                    const float first = x[k], second = x[(k + stride / 32) % N];
                    x[k] = first + second;
                    x[(k + stride / 32) % N] = first - second;
                }
        }
    }
    const float norm = rsqrtf((float)BLOCK);
#pragma unroll
    for (int k = 0; k < N; k++) x[k] *= norm;
}

__device__ __forceinline__ float not_empty(float x) {
    return __float_as_uint(x) == EMPTY ? __uint_as_float(0x7fffffffu) : x;
}
__device__ __forceinline__ bool empty(float x) { return __float_as_uint(x) == EMPTY; }

/* One query of a list: row `column` of its q * group. */
struct query_place {
    int sequence, head, position; /* of the query heads */
    bool there, real;
};

__device__ __forceinline__ query_place place_of(const attend_job &a, int list, int column) {
    query_place p;
    p.sequence = a.heads == 1 ? list : (int)__umulhi((unsigned)list, a.by_heads);
    p.position = a.q == 1 ? 0 : column / a.group;
    p.head = (list - p.sequence * a.heads) * a.group + column - p.position * a.group;
    p.there = column < a.columns;
    p.real = p.there && (!a.new_tokens || p.position >= a.q - a.new_tokens[p.sequence]);
    return p;
}

/* Query `column` of a list, rotated, to where `place` has it: code(channel, high, low) takes the two bytes of its fixed
 * point, half(channel, first, second) the same as two 16-bit floats. info: factor, sum of q in logit units, tokens that
 * it does not see. By one warp. */
template <int D, class PLACE>
__device__ __forceinline__ void lay_out_query(const attend_job &a, int list, int column, const PLACE &to,
                                              float4 *info) {
    constexpr int N = (D + 31) / 32;
    const int lane = threadIdx.x & 31;
    const query_place place = place_of(a, list, column);
    const char *row =
        a.queries + place.sequence * a.q_stride[0] + place.head * a.q_stride[1] + place.position * a.q_stride[2];
    float x[N];
    load_row<D>(x, row, place.real, a.q_dtype);
    if (a.rotation == KVC_ROTATE_HADAMARD) rotate<D>(x);
    unsigned bits = 0; /* of the greatest size */
#pragma unroll
    for (int k = 0; k < N; k++) bits = max(bits, __float_as_uint(fabsf(x[k])));
    bits = __reduce_max_sync(ALL, bits);
    const bool strange = bits >= 0x7f800000u; /* NaN or infinite: so is what comes out */
    const float most = __uint_as_float(bits);
    /* both by 2^-8: __fdividef gives 0 where a divisor is above 2^126 */
    const float to_fixed = most > 1e-30f && !strange ? __fdividef(0x1p-8f * 32600, 0x1p-8f * most) : 0.0f;
    int sum = 0;
#pragma unroll
    for (int k = 0; k < N; k++) {
        const int channel = lane + 32 * k;
        if (channel >= D) continue;
        const float scaled = x[k] * to_fixed;
        const int fixed = __float2int_rn(scaled), high = (fixed + 128) >> 8, low = fixed - 256 * high;
        sum += fixed;
        to.code(channel, high, low);
        const float value = scaled * (1.0f / 256);
        const uint32_t first = a.half == KVC_BFLOAT16 ? bfloat2_bits(value, 0) : half2_bits(value, 0);
        const float rest = value - kvc_cuda_half_to_float((uint16_t)first, a.half);
        const uint32_t second = a.half == KVC_BFLOAT16 ? bfloat2_bits(rest, 0) : half2_bits(rest, 0);
        to.half(channel, (uint16_t)first, (uint16_t)second);
    }
    sum = __reduce_add_sync(ALL, sum);
    const float unit = a.scale * (a.softcap > 0 ? 2.0f / a.softcap : 1.0f) * LOG2E;
    const float factor = strange ? NAN : unit * most * (1.0f / 32600);
    if (lane == 0)
        *info = make_float4(factor, factor * (float)sum, __int_as_float(place.there ? a.q - 1 - place.position : 0), 0);
}

/* Row `column` of the result, from sums (D) over `total`: rotated back and stored. By one warp. */
template <int D>
__device__ __forceinline__ void store_query(const attend_job &a, int list, int column, const float *sums, float total) {
    constexpr int N = (D + 31) / 32;
    const int lane = threadIdx.x & 31;
    const query_place place = place_of(a, list, column);
    if (!place.there) return;
    const float by = place.real && total != 0 ? __frcp_rn(total) : 0.0f;
    float x[N];
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = by != 0 && lane + 32 * k < D ? sums[lane + 32 * k] * by : 0;
    if (a.rotation == KVC_ROTATE_HADAMARD) rotate<D>(x);
    char *row =
        a.out + place.sequence * a.out_stride[0] + place.head * a.out_stride[1] + place.position * a.out_stride[2];
#pragma unroll
    for (int k = 0; k < N; k++)
        if (lane + 32 * k < D) store_element(row, lane + 32 * k, x[k], a.out_dtype);
}

/* Adds what is in another unit of weights. */
__device__ __forceinline__ void add_part(float &shift, float &total, float4 &sum, const float2 &end,
                                         const float4 &part) {
    const float next = fmaxf(shift, end.x), mine = exp2_of(shift - next), theirs = exp2_of(end.x - next);
    shift = next;
    total = fmaf(theirs, end.y, total * mine);
    sum.x = fmaf(theirs, part.x, sum.x * mine);
    sum.y = fmaf(theirs, part.y, sum.y * mine);
    sum.z = fmaf(theirs, part.z, sum.z * mine);
    sum.w = fmaf(theirs, part.w, sum.w * mine);
}

/* Of the working warps. */
template <int WARPS> __device__ __forceinline__ void meet() {
    asm volatile("bar.sync 1,%0;" ::"n"(WARPS * 32) : "memory");
}

/* A list's end, by the threads that work: the block's part, from those of its PARTS_OF_BLOCK parts (`sums`, (parts,
 * QUERIES, PITCH), with `ends`: shift, sum of weights, of zeros, 1 where there are sums), goes to the list's first
 * block, which adds up all blocks' and stores the result. Four channels a thread; where there are threads for it
 * several groups share the parts and the other blocks', and the first one adds up what they have. `sums` is free again
 * when all threads have met once more. */
template <int D, class S>
__device__ __forceinline__ void merge_list(const attend_job &a, int list, const kvc_share &share, int block, int chunk,
                                           float *sums, const float4 *ends, float2 *group_ends) {
    constexpr int PARTS = S::PARTS_OF_BLOCK, THREADS = S::WORKING_THREADS, NQ = S::QUERIES;
    const bool alone = share.blocks == 1, first = share.first_block == block;
    const int warp = threadIdx.x >> 5;
    for (int i = threadIdx.x; i < S::GROUPS * S::ITEMS; i += THREADS) {
        const int group = i / S::ITEMS, item = i - group * S::ITEMS, n = item / (D / 4), channel = item % (D / 4) * 4;
        float shift = NOTHING, total = 0;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < PARTS; k++) shift = fmaxf(shift, ends[k * NQ + n].x);
#pragma unroll
        for (int j = 0; j < (PARTS + S::GROUPS - 1) / S::GROUPS; j++) {
            const int k = group + j * S::GROUPS;
            if (PARTS % S::GROUPS && k >= PARTS) break;
            const float4 end = ends[k * NQ + n], part = *(const float4 *)(sums + (k * NQ + n) * S::PITCH + channel);
            const bool there = end.w != 0; /* else `part` is anything */
            const float by = exp2_of(end.x - shift);
            total = there ? fmaf(by, end.y, total) : total;
            sum.x = there ? fmaf(by, part.x + end.z, sum.x) : sum.x;
            sum.y = there ? fmaf(by, part.y + end.z, sum.y) : sum.y;
            sum.z = there ? fmaf(by, part.z + end.z, sum.z) : sum.z;
            sum.w = there ? fmaf(by, part.w + end.z, sum.w) : sum.w;
        }
        if (first && !alone) {
            constexpr int AT_ONCE = NQ == 4 ? 6 : 4;
#pragma unroll 1
            for (int k = 1 + group; k < share.blocks; k += AT_ONCE * S::GROUPS) {
                float2 ends_of[AT_ONCE];
                float4 parts_of[AT_ONCE];
                bool missing;
                do {
                    missing = false;
#pragma unroll
                    for (int j = 0; j < AT_ONCE; j++) {
                        const int other = k + j * S::GROUPS < share.blocks ? k + j * S::GROUPS : k;
                        const int64_t from = (int64_t)((block + other) * a.chunks + chunk) * NQ + n;
                        ends_of[j] = load_volatile(a.part_sums + from);
                        parts_of[j] = load_volatile((const float4 *)(a.parts + from * D + channel));
                    }
#pragma unroll
                    for (int j = 0; j < AT_ONCE; j++)
                        missing = missing || empty(ends_of[j].x) || empty(ends_of[j].y) || empty(parts_of[j].x) ||
                                  empty(parts_of[j].y) || empty(parts_of[j].z) || empty(parts_of[j].w);
                } while (missing);
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++)
                    if (k + j * S::GROUPS < share.blocks) add_part(shift, total, sum, ends_of[j], parts_of[j]);
            }
        }
        /* warps' rows hold it: each thread overwrites only what it alone has read */
        *(float4 *)(sums + (group * NQ + n) * S::PITCH + channel) = sum;
        if (channel == 0) group_ends[group * NQ + n] = make_float2(shift, total);
    }
    meet<THREADS / 32>(); /* also: nobody reads other blocks' parts any more */
    for (int i = threadIdx.x; i < S::ITEMS; i += THREADS) {
        const int n = i / (D / 4), channel = i % (D / 4) * 4;
        float2 end = group_ends[n];
        float4 sum = *(const float4 *)(sums + n * S::PITCH + channel);
#pragma unroll
        for (int k = 1; k < S::GROUPS; k++)
            add_part(end.x, end.y, sum, group_ends[k * NQ + n],
                     *(const float4 *)(sums + (k * NQ + n) * S::PITCH + channel));
        if (first) {
            *(float4 *)(sums + n * S::PITCH + channel) = sum;
            if (channel == 0) sums[n * S::PITCH + D] = end.y;
        } else { /* to the block that finishes the list */
            const int64_t at = (int64_t)(block * a.chunks + chunk) * NQ + n;
            *(float4 *)(a.parts + at * D + channel) =
                make_float4(not_empty(sum.x), not_empty(sum.y), not_empty(sum.z), not_empty(sum.w));
            if (channel == 0) a.part_sums[at] = make_float2(not_empty(end.x), not_empty(end.y));
        }
    }
    if (first) {
        meet<THREADS / 32>();
        /* by the last warps: the first ones lay out the next list's queries meanwhile */
#pragma unroll 1
        for (int n = THREADS / 32 - 1 - warp; n < NQ; n += THREADS / 32)
            store_query<D>(a, list, chunk * NQ + n, sums + n * S::PITCH, sums[n * S::PITCH + D]);
        if (!alone)
#pragma unroll 1
            for (int i = threadIdx.x; i < (share.blocks - 1) * NQ * D / 4; i += THREADS) {
                const int64_t from = (int64_t)(block + 1 + i / (NQ * D / 4)) * a.chunks + chunk;
                const float nan = __uint_as_float(EMPTY);
                ((float4 *)a.parts)[from * (NQ * D / 4) + i % (NQ * D / 4)] = make_float4(nan, nan, nan, nan);
                if (i % (NQ * D / 4) < NQ) a.part_sums[from * NQ + i % (NQ * D / 4)] = make_float2(nan, nan);
            }
    }
}

/* ---- pages */

/* Scales and zeros of the tokens first, first + 8, ...; `scales` is what follows a half's codes. */
template <bool PLAIN, int N>
__device__ __forceinline__ void steps(float (&scale)[N], float (&zero)[N], const attend_job &a, const char *scales,
                                      int first) {
    if (PLAIN || (!a.e5m3 && a.zero_point)) {
        half2 pairs[N];
#pragma unroll
        for (int j = 0; j < N; j++) pairs[j] = ((const half2 *)scales)[first + 8 * j];
#pragma unroll
        for (int j = 0; j < N; j++) scale[j] = __low2float(pairs[j]), zero[j] = __high2float(pairs[j]);
    } else {
        const int bytes = (a.e5m3 ? 1 : 2) * (a.zero_point ? 2 : 1);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const char *at = scales + (first + 8 * j) * bytes;
            const uint32_t word = bytes == 1 ? *(const uint8_t *)at : *(const uint16_t *)at;
            zero[j] = 0;
            if (a.e5m3) {
                scale[j] = __uint_as_float((word & 0xff) << 20) * 0x1p112f;
                if (a.zero_point) zero[j] = scale[j] * (float)(int8_t)(word >> 8) * 0.125f;
            } else {
                scale[j] = __half2float(__ushort_as_half((uint16_t)word));
            }
        }
    }
}

/* The logit in bits under a cap; x is 2 log2 e times logit / cap: tanh by one power, or its series. */
__device__ __forceinline__ float capped(float x, float softcap) {
    const float size = fabsf(x), power = exp2_of(fminf(size, 64.0f));
    const float y = size * (0.5f / LOG2E), square = y * y;
    const float series = y * fmaf(square, fmaf(square, 2.0f / 15, -1.0f / 3), 1.0f);
    const float tanh = y < 0.1f ? series : 1.0f - 2.0f / (power + 1.0f);
    return size < INFINITY ? copysignf(tanh, x) * (softcap * LOG2E) : x;
}

/* Tokens in pages behind page `page` of the list, up to a few more than a query can miss. */
__device__ __forceinline__ int tokens_behind(const attend_job &a, int tail_page, int tail_tokens, int list, int page,
                                             int tokens) {
    if (page >= tail_page) return tail_tokens - 16 * (page - tail_page) - tokens;
    int behind = tail_tokens;
    for (int i = page + 1; i < tail_page && behind < a.q; i++) behind += a.table[(int64_t)list * a.capacity + i].tokens;
    return behind;
}

/* The unit for logits of a page, lower by what rounding may do to it: so the greatest ones are not below what a unit is
 * chosen for, and `at_most` brings them there. It matters where shifts have lost the fraction of a bit. */
__device__ __forceinline__ float unit_for(float shift) { return fmaf(fabsf(shift), -0x1p-21f, shift); }

/* NaN stays NaN. */
__device__ __forceinline__ float at_most(float x, float most) {
    float y;
    asm("min.NaN.f32 %0,%1,%2;" : "=f"(y) : "f"(x), "f"(most));
    return y;
}

/* Two 16-bit floats each: the numbers rounded, and what that leaves. */
__device__ __forceinline__ void split(uint32_t &rounded, uint32_t &rest, float x, float y, bool brain) {
    if (brain) {
        rounded = bfloat2_bits(x, y);
        rest = bfloat2_bits(x - __uint_as_float(rounded << 16), y - __uint_as_float(rounded & 0xffff0000u));
    } else {
        rounded = half2_bits(x, y);
        const half2 both = __halves2half2(__ushort_as_half((uint16_t)rounded), __ushort_as_half(rounded >> 16));
        rest = half2_bits(x - __low2float(both), y - __high2float(both));
    }
}

/* ---- the host's side */

/* `prepared`: bytes that the kernel may take, by device. */
inline cudaError_t launch_overlapping(void (*kernel)(attend_job), int (&prepared)[64], const attend_job &a, int blocks,
                                      int threads, int bytes, cudaStream_t stream) {
    int device = 0;
    kvc_gpu gpu = {};
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = kvc_gpu_of(device, &gpu);
    if (error != cudaSuccess) return error;
    if (device >= 64 || prepared[device] < bytes) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
        if (device < 64) prepared[device] = bytes;
    }
    const kvc_launch launch(gpu, dim3(blocks * a.chunks), dim3(threads), bytes, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, a);
}

} // namespace
