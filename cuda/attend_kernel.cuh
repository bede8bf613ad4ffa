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

/* Where a query's numbers go: fragments of both kinds. */
template <int D, int NQ> struct fragments_place {
    using S = sizes<D, NQ>;
    uint8_t *codes;
    uint16_t *halves;
    int tile, column; /* of the tile: of the high part; the low one's is the next */

    __device__ __forceinline__ void code(int channel, int high, int low) const {
        const int ct = channel >> 4, quarter = channel >> 2 & 3, i = channel & 3;
        const int pairs = (S::TILES + 1) / 2;
        uint8_t *const code = codes + ((tile * pairs + (ct >> 1)) * 32 + column * 4 + quarter) * 8 + (ct & 1) * 4 + i;
        code[0] = (uint8_t)high;
        code[4 * 8] = (uint8_t)low;
    }

    __device__ __forceinline__ void half(int channel, uint16_t first, uint16_t second) const {
        const int ct = channel >> 4, quarter = channel >> 2 & 3, i = channel & 3;
        uint16_t *const half =
            halves + ((tile * S::TILES + ct) * 32 + column * 4 + quarter) * 4 + (i & 1) * 2 + (i >> 1);
        half[0] = first;
        half[4 * 4] = second;
    }
};

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

template <int D, int NQ>
__global__ void __launch_bounds__(sizes<D, NQ>::THREADS, 1) attend_kernel(const __grid_constant__ attend_job a) {
    using S = sizes<D, NQ>;
    constexpr int WARPS = S::WARPS; /* that work */
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
    float4 *const info = (float4 *)next; /* (NQ): of lay_out_query */
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
    if ((threadIdx.x & 31) == 0) all.begin(warp, 1); /* each its own: a warp's threads would do it one by one */
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
                lay_out_query<D>(
                    a, list, chunk * NQ + n,
                    fragments_place<D, NQ>{(uint8_t *)code_fragments, (uint16_t *)half_fragments, n >> 2, 2 * (n & 3)},
                    info + n);
        w.begin_list(list);
        const kvc_share share = shares[list];
        w.mixed = share.mixed;
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
        if (w.held != SUMS_NONE) w.drain();
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
        if (!waited) wait_for_previous();
        waited = true;
        merge_list<D, S>(a, list, share, block, chunk, sums, ends, group_ends);
    }
}

constexpr int LEAST_SLOTS = 2;

/* Copies of a warp that fit. */
template <int D, int NQ> int slots_for(int shared_most) {
    using S = sizes<D, NQ>;
    return (shared_most - S::FIXED_BYTES - S::WARPS * rings::READER_BYTES - 128) / (S::WARPS * rings::SLOT_BYTES);
}

template <int D, int NQ> cudaError_t launch_attend(attend_job &a, int blocks, int shared_most, cudaStream_t stream) {
    using S = sizes<D, NQ>;
    static int prepared[64]; /* bytes that the kernel may take, by device */
    a.slots = slots_for<D, NQ>(shared_most);
    if (a.slots < LEAST_SLOTS) return cudaErrorInvalidConfiguration;
    a.slots = a.slots > 6 ? 6 : a.slots;
    a.chunks = (a.columns + NQ - 1) / NQ;
    const int bytes = S::FIXED_BYTES + S::WARPS * (rings::READER_BYTES + a.slots * rings::SLOT_BYTES);
    return launch_overlapping(attend_kernel<D, NQ>, prepared, a, blocks, S::THREADS, bytes, stream);
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
