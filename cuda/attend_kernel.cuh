/* attend_kernel.cuh: attention over packed pages in one launch. A block works through its run of the division, list by
 * list: queries are rotated and laid out as fragments, warps take turns at pages, their sums are merged, and lists that
 * several blocks share are finished by the first of these, which waits for what the others write.
 *
 * Partial results are their own flags: words of the workspace are EMPTY (0xFFFFFFFF, a NaN that no arithmetic gives)
 * until they are written, and again once they have been read. Blocks run in falling order of runs, so those that a
 * block waits for have begun before it, whatever else the GPU does. */
#pragma once
#include "attend_page.cuh"

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

/* Query `column`, rotated, as fragments of both kinds, its factor and its sum. info: factor, sum of q in logit units,
 * tokens that it does not see. By one warp. */
template <int D, int NQ>
__device__ __forceinline__ void lay_out_query(const attend_job &a, int list, int column, int n, uint8_t *codes,
                                              uint16_t *halves, float4 *info) {
    using S = sizes<D, NQ>;
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
    const float most = __uint_as_float(bits), to_fixed = most > 1e-30f && !strange ? __fdividef(32600.0f, most) : 0.0f;
    int sum = 0;
    const int tile = n >> 2, column_of_tile = 2 * (n & 3); /* of the high part; the low one's is the next */
#pragma unroll
    for (int k = 0; k < N; k++) {
        const int channel = lane + 32 * k;
        if (channel >= D) continue;
        const float scaled = x[k] * to_fixed;
        const int fixed = __float2int_rn(scaled), high = (fixed + 128) >> 8, low = fixed - 256 * high;
        sum += fixed;
        const int ct = channel >> 4, quarter = channel >> 2 & 3, i = channel & 3;
        const int pairs = (S::TILES + 1) / 2;
        uint8_t *const code =
            codes + ((tile * pairs + (ct >> 1)) * 32 + column_of_tile * 4 + quarter) * 8 + (ct & 1) * 4 + i;
        code[0] = (uint8_t)high;
        code[4 * 8] = (uint8_t)low;
        const float value = scaled * (1.0f / 256);
        const uint32_t first = a.half == KVC_BFLOAT16 ? bfloat2_bits(value, 0) : half2_bits(value, 0);
        const float rest = value - kvc_cuda_half_to_float((uint16_t)first, a.half);
        const uint32_t second = a.half == KVC_BFLOAT16 ? bfloat2_bits(rest, 0) : half2_bits(rest, 0);
        uint16_t *const half =
            halves + ((tile * S::TILES + ct) * 32 + column_of_tile * 4 + quarter) * 4 + (i & 1) * 2 + (i >> 1);
        half[0] = (uint16_t)first;
        half[4 * 4] = (uint16_t)second;
    }
    sum = __reduce_add_sync(ALL, sum);
    const float unit = a.scale * (a.softcap > 0 ? 2.0f / a.softcap : 1.0f) * LOG2E;
    const float factor = strange ? NAN : unit * most * (1.0f / 32600);
    if (lane == 0)
        info[n] =
            make_float4(factor, factor * (float)sum, __int_as_float(place.there ? a.q - 1 - place.position : 0), 0);
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

/* Registers go from the fetching warpgroup to the working ones; numbers that leave few over. */
template <int WARPS, bool FETCHES> __device__ __forceinline__ void share_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
    static_assert(WARPS == 8 || WARPS == 12, "");
    if constexpr (FETCHES)
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPS == 8 ? 40 : 56));
    else
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPS == 8 ? 232 : 152));
#endif
}

/* Of the working warps. */
template <int WARPS> __device__ __forceinline__ void meet() {
    asm volatile("bar.sync 1,%0;" ::"n"(WARPS * 32) : "memory");
}

template <int D, int NQ>
__global__ void __launch_bounds__(sizes<D, NQ>::THREADS, 1) attend_kernel(const __grid_constant__ attend_job a) {
    using S = sizes<D, NQ>;
    constexpr int WARPS = S::WARPS, THREADS = WARPS * 32; /* that work */
    extern __shared__ __align__(128) char shared[];
    rings all;
    all.count = a.slots;
    all.slots = shared;
    char *next = shared + WARPS * a.slots * SLOT;
    uint2 *const code_fragments = (uint2 *)next;
    next += S::CODE_FRAGMENTS * 8;
    uint2 *const half_fragments = (uint2 *)next;
    next += S::HALF_FRAGMENTS * 8;
    float *const sums = (float *)next; /* (WARPS, NQ, PITCH) */
    next += S::SUMS_BYTES;
    float4 *const ends = (float4 *)next; /* (WARPS, NQ): shift, sum of weights, of zeros, 1 where there are sums */
    next += WARPS * NQ * 16;
    float4 *const info = (float4 *)next; /* (NQ): of lay_out_query; at last the sum of weights */
    next += NQ * 16;
    float2 *const group_ends = (float2 *)next; /* (GROUPS, NQ): shift, sum of weights */
    next += S::GROUPS * NQ * 8;
    all.entries = (page_entry *)next;
    next += WARPS * AHEAD * sizeof(page_entry);
    all.notes = (page_note *)next;
    next += WARPS * a.slots * sizeof(page_note);
    all.full = (uint64_t *)next;
    all.empty = all.full + WARPS * a.slots;

    const int warp = threadIdx.x >> 5;
    const int reversed = gridDim.x - 1 - blockIdx.x, block = reversed / a.chunks, chunk = reversed - block * a.chunks;
    if (!a.early) wait_for_previous(); /* before the next may begin: it may rely on what came before this kernel */
    let_next_begin();
    const int blocks = a.division[0];
    const kvc_share *const shares = (const kvc_share *)(a.division + 4);
    const kvc_run run = ((const kvc_run *)(shares + a.n))[block]; /* of no meaning from block `blocks` on */
    if (warp >= WARPS) {
        const kvc_page given = fetcher<WARPS>::first_entry(a, block, warp - WARPS);
        share_registers<WARPS, true>();
        if (block < blocks)
            fetcher<WARPS>(a, all, warp - WARPS).template fetch<S::THREADS>(run, given);
        else
            rings_are_ready<S::THREADS>(true);
        return;
    }
    if ((threadIdx.x & 31) == 0) { /* each its own: a warp's threads would do it one by one */
#pragma unroll 1
        for (int i = warp * a.slots; i < (warp + 1) * a.slots; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(all.full + i)), "n"(ARRIVALS));
            asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(all.empty + i)), "n"(RELEASES));
        }
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;");
#endif
    }
    __syncwarp();
    rings_are_ready<S::THREADS>(false);
    if (block >= blocks) return;
    share_registers<WARPS, false>();
    worker<D, NQ> w(a, all, warp);
    w.code_fragments = code_fragments;
    w.half_fragments = half_fragments;
    w.sums = sums + warp * NQ * S::PITCH;
    bool waited = !a.early;
    const int last = run.end_page > 0 ? run.end_list : run.end_list - 1;
#pragma unroll 1
    for (int list = run.first_list; list <= last; list++) {
        if (NQ > 4 || warp < NQ)
#pragma unroll 1
            for (int n = warp; n < NQ; n += WARPS)
                lay_out_query<D, NQ>(a, list, chunk * NQ + n, n, (uint8_t *)code_fragments, (uint16_t *)half_fragments,
                                     info);
        w.begin_list(list);
        const kvc_share share = shares[list];
        meet<WARPS>();
#pragma unroll
        for (int t = 0; t < S::QT; t++) {
            const float4 mine = info[w.query(t)];
            w.factor[t] = mine.x;
            w.total[t] = mine.y;
            w.hidden[t] = __float_as_int(mine.z);
        }
        page_note note = w.copies.note();
#pragma unroll 1
        while (note.list == list) note = w.pages(note);
        /* this warp's part */
        if (w.since_drain) w.drain();
#pragma unroll
        for (int t = 0; t < S::QT; t++) {
#pragma unroll
            for (int o = 4; o < 32; o <<= 1) {
                w.weights[t] += __shfl_xor_sync(ALL, w.weights[t], o);
                w.zeros[t] += __shfl_xor_sync(ALL, w.zeros[t], o);
            }
            if (w.r == 0)
                ends[warp * NQ + w.query(t)] = make_float4(w.top[t] > NOTHING ? w.shift[t] : NOTHING, w.weights[t],
                                                           w.zeros[t], w.has_sums ? 1.0f : 0.0f);
        }
        meet<WARPS>();
        /* The block's part: four channels a thread; where there are threads for it several groups share the warps and
         * the other blocks' parts, and the first one adds up what they have. */
        const bool alone = share.blocks == 1, first = share.first_block == block;
        if (!waited) wait_for_previous();
        waited = true;
        for (int i = threadIdx.x; i < S::GROUPS * S::ITEMS; i += THREADS) {
            const int group = i / S::ITEMS, item = i - group * S::ITEMS, n = item / (D / 4),
                      channel = item % (D / 4) * 4;
            float shift = NOTHING, total = 0;
            float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int k = 0; k < WARPS; k++) shift = fmaxf(shift, ends[k * NQ + n].x);
#pragma unroll
            for (int j = 0; j < (WARPS + S::GROUPS - 1) / S::GROUPS; j++) {
                const int k = group + j * S::GROUPS;
                if (WARPS % S::GROUPS && k >= WARPS) break;
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
        meet<WARPS>(); /* also: nobody reads other blocks' parts any more */
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
                if (channel == 0) info[n].w = end.y;
            } else { /* to the block that finishes the list */
                const int64_t at = (int64_t)(block * a.chunks + chunk) * NQ + n;
                *(float4 *)(a.parts + at * D + channel) =
                    make_float4(not_empty(sum.x), not_empty(sum.y), not_empty(sum.z), not_empty(sum.w));
                if (channel == 0) a.part_sums[at] = make_float2(not_empty(end.x), not_empty(end.y));
            }
        }
        if (first) {
            meet<WARPS>();
#pragma unroll 1
            for (int n = warp; n < NQ; n += WARPS)
                store_query<D>(a, list, chunk * NQ + n, sums + n * S::PITCH, info[n].w);
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
}

constexpr int LEAST_SLOTS = 2;

/* Copies of a warp that fit. */
template <int D, int NQ> int slots_for(int shared_most) {
    using S = sizes<D, NQ>;
    return (shared_most - S::FIXED_BYTES - S::WARPS * rings::WARP_BYTES - 128) / (S::WARPS * rings::SLOT_BYTES);
}

template <int D, int NQ> cudaError_t launch_attend(attend_job &a, int blocks, int shared_most, cudaStream_t stream) {
    using S = sizes<D, NQ>;
    static int prepared[64]; /* bytes that the kernel may take, by device */
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    a.slots = slots_for<D, NQ>(shared_most);
    if (a.slots < LEAST_SLOTS) return cudaErrorInvalidConfiguration;
    a.slots = a.slots > 6 ? 6 : a.slots;
    const int bytes = S::FIXED_BYTES + S::WARPS * (rings::WARP_BYTES + a.slots * rings::SLOT_BYTES);
    if (device >= 64 || prepared[device] < bytes) {
        error = cudaFuncSetAttribute(attend_kernel<D, NQ>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
        if (device < 64) prepared[device] = bytes;
    }
    a.chunks = (a.columns + NQ - 1) / NQ;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks * a.chunks);
    config.blockDim = dim3(S::THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, attend_kernel<D, NQ>, a);
}

/* Queries of a block. For D = 256 at most 8: registers. 16 look at all pieces of a 16-bit K together. 0: devices of so
 * little shared memory are not served here. */
template <int D> int queries_of_block(int columns, int shared_most) {
    if (columns <= 4) return slots_for<D, 4>(shared_most) >= LEAST_SLOTS ? 4 : 0;
    if constexpr (D <= 128)
        if (columns > 8 && slots_for<D, 16>(shared_most) >= (D / 16 + 1) / 2) return 16;
    return slots_for<D, 8>(shared_most) >= LEAST_SLOTS ? 8 : 0;
}

template <int D> cudaError_t launch_attend(attend_job &a, int blocks, int shared_most, cudaStream_t stream) {
    switch (queries_of_block<D>(a.columns, shared_most)) {
    case 4: return launch_attend<D, 4>(a, blocks, shared_most, stream);
    case 8: return launch_attend<D, 8>(a, blocks, shared_most, stream);
    case 16:
        if constexpr (D <= 128) return launch_attend<D, 16>(a, blocks, shared_most, stream);
    default: return cudaErrorInvalidConfiguration;
    }
}

} // namespace

/* One a head dimension, each in a file of its own, so that they compile side by side. */
cudaError_t kvc_launch_attend_64(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_64(int columns, int shared_most);
cudaError_t kvc_launch_attend_80(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_80(int columns, int shared_most);
cudaError_t kvc_launch_attend_96(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_96(int columns, int shared_most);
cudaError_t kvc_launch_attend_128(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_128(int columns, int shared_most);
cudaError_t kvc_launch_attend_256(void *job, int blocks, int shared_most, cudaStream_t stream);
bool kvc_serves_attend_256(int columns, int shared_most);
