/* attend_rows.cuh: attention over packed pages for lists with several queries (new tokens, and heads of a group), on
 * sm_90a: the kernel of attend_kernel.cuh, but that warpgroups take the place of warps, and unpack each page once for
 * up to 64 queries (attend_rows_page.cuh). Lists, runs, rings, partial results and their merging are the same. */
#pragma once
#include "attend_launch.cuh"
#include "attend_rows_page.cuh"

namespace {

template <int D, int N>
__global__ void __launch_bounds__(rows_sizes<D, N>::THREADS, 1)
    attend_rows_kernel(const __grid_constant__ attend_job a) {
#ifdef KVC_HOPPER
    using S = rows_sizes<D, N>;
    constexpr int READERS = S::READERS, WARPS = READERS * 4;
    extern __shared__ __align__(128) char shared[];
    char *next = shared + (-shared_address(shared) & (S::ALIGNMENT - 1));
    uint8_t *const codes = (uint8_t *)next;
    next += S::CODE_BYTES;
    uint8_t *const halves = (uint8_t *)next;
    next += S::HALF_BYTES;
    char *const weights = next;
    next += READERS * 2 * S::WEIGHT_BYTES;
    rings all;
    all.count = a.slots;
    all.slots = next;
    next += READERS * a.slots * SLOT;
    float *const sums = (float *)next; /* (READERS, N, PITCH) */
    next += S::SUMS_BYTES;
    float4 *const ends = (float4 *)next; /* (READERS, N): shift, sum of weights, of zeros, 1 where there are sums */
    next += READERS * N * 16;
    float4 *const info = (float4 *)next; /* (N): of lay_out_query */
    next += N * 16;
    float4 *const constants = (float4 *)next; /* (READERS, N): of a query, and the warpgroup */
    next += READERS * N * 16;
    float2 *const scratch = (float2 *)next; /* (READERS, 4, N) */
    next += READERS * 4 * N * 8;
    float2 *const group_ends = (float2 *)next; /* (GROUPS, N): shift, sum of weights */
    next += S::GROUPS * N * 8;
    all.entries = (page_entry *)next;
    next += READERS * AHEAD * sizeof(page_entry);
    all.notes = (page_note *)next;
    next += READERS * a.slots * sizeof(page_note);
    all.full = (uint64_t *)next;
    all.empty = all.full + READERS * a.slots;

    const int warp = __shfl_sync(ALL, threadIdx.x >> 5, 0), reader = warp >> 2;
    const int reversed = gridDim.x - 1 - blockIdx.x, block = reversed / a.chunks, chunk = reversed - block * a.chunks;
    if (!a.early) wait_for_previous(); /* before the next may begin: it may rely on what came before this kernel */
    let_next_begin();
    const int blocks = a.division[0];
    const kvc_share *const shares = (const kvc_share *)(a.division + 4);
    const kvc_run run = ((const kvc_run *)(shares + a.n))[block]; /* of no meaning from block `blocks` on */
    if (reader == READERS) {
        const kvc_page given = fetcher<READERS, true>::first_entry(a, block, warp - WARPS);
        registers_give<S::FETCHING_REGISTERS>();
        if (block < blocks)
            fetcher<READERS, true>(a, all, warp - WARPS).template fetch<S::THREADS>(run, given);
        else
            rings_are_ready<S::THREADS>(true);
        return;
    }
    if ((threadIdx.x & 127) == 0) all.begin(reader, 4);
    __syncwarp();
    rings_are_ready<S::THREADS>(false);
    if (block >= blocks) return;
    registers_take<S::WORKING_REGISTERS>();
    rows_worker<D, N> w(a, all, reader);
    w.codes = descriptor(shared_address(codes), 16, 1024, SWIZZLE_128);
    w.halves = descriptor(shared_address(halves), 16, 1024, SWIZZLE_128);
    const uint32_t mine = shared_address(weights) + reader * 2 * S::WEIGHT_BYTES;
    w.numbers = descriptor(mine, 16, 1024, SWIZZLE_128);
    /* rows of blocks (queries 0-7, tokens 0-7 of this warp), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15) */
    w.store_at =
        mine + (w.lane >> 4) * 1024 + (w.lane & 7) * 128 + ((2 * w.warp + (w.lane >> 3 & 1)) ^ (w.lane & 7)) * 16;
    w.sums = sums + reader * N * S::PITCH;
    w.scratch = scratch + reader * 4 * N;
    w.constants = constants + reader * N;
    w.info = info;
    bool waited = !a.early;
    const int last = run.end_page > 0 ? run.end_list : run.end_list - 1;
#pragma unroll 1
    for (int list = run.first_list; list <= last; list++) {
#pragma unroll 1
        for (int n = warp; n < N; n += WARPS)
            lay_out_query<D>(a, list, chunk * N + n, operand_place<N>(codes, halves, n), info + n);
        fence_async();
        const kvc_share share = shares[list];
        meet<WARPS>(); /* also: the barriers of the ring are seen */
        w.begin_list(list);
        page_note note = w.copies.note();
#pragma unroll 1
        while (__shfl_sync(ALL, note.list, 0) == list) note = w.page(note);
        w.end_list(ends + reader * N);
        meet<WARPS>();
        if (!waited) wait_for_previous();
        waited = true;
        merge_list<D, S>(a, list, share, block, chunk, sums, ends, group_ends);
    }
#endif
}

/* Copies of a warpgroup that fit. */
template <int D, int N> constexpr int rows_slots(int shared_most) {
    using S = rows_sizes<D, N>;
    return (shared_most - S::FIXED_BYTES - S::READERS * rings::READER_BYTES - 128) / (S::READERS * rings::SLOT_BYTES);
}

template <int D, int N> cudaError_t launch_rows(attend_job &a, int blocks, int shared_most, cudaStream_t stream) {
    using S = rows_sizes<D, N>;
    constexpr int TOGETHER = N > 32 ? (S::TILES + 1) / 2 : 2; /* pieces of 16 bits that are looked at together */
    static_assert(rows_slots<D, N>(KVC_ATTEND_ROWS_SHARED) > TOGETHER, "they are there at the same time");
    static int prepared[64]; /* bytes that the kernel may take, by device */
    a.slots = rows_slots<D, N>(shared_most);
    a.slots = a.slots > 12 ? 12 : a.slots;
    a.chunks = (a.columns + N - 1) / N;
    const int bytes = S::FIXED_BYTES + S::READERS * (rings::READER_BYTES + a.slots * rings::SLOT_BYTES);
    return launch_overlapping(attend_rows_kernel<D, N>, prepared, a, blocks, S::THREADS, bytes, stream);
}

template <int D> cudaError_t launch_rows(attend_job &a, int blocks, int shared_most, cudaStream_t stream) {
    if (a.columns <= 16) return launch_rows<D, 16>(a, blocks, shared_most, stream);
    if (a.columns <= 32 || D > ROWS_WIDE_DIM) return launch_rows<D, 32>(a, blocks, shared_most, stream);
    if constexpr (D <= ROWS_WIDE_DIM) return launch_rows<D, 64>(a, blocks, shared_most, stream);
    return cudaErrorInvalidConfiguration;
}

} // namespace
