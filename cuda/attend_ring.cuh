/* attend_ring.cuh: a warp's ring of copies from the arena into shared memory: pieces of pages in the order in which
 * they are worked on, requested as slots become free. By bulk copies on sm_90 and later, by cp.async before. */
#pragma once
#include "attend_job.cuh"

namespace {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* What a warp works on next: a page whose copies have been requested. */
struct page_note {
    int32_t list, page;
    uint32_t kind; /* k_bits | v_bits << 8 | tokens << 16 */
    uint32_t spare;
};

template <int TILES, int WARPS> struct ring {
    const attend_job &a;
    char *slots;
    uint64_t *bars;
    page_note *notes; /* as many as slots: a page has two pieces or more */
    uint64_t policy;
    int slot, phase;    /* of the piece that is worked on next */
    int fill;           /* slot that is requested next */
    int started, noted; /* pages requested, places in notes */
    /* the page that is being requested */
    int list, page, stop, last, end_page; /* stop: pages of the list that may be read now */
    int first_list, first_page, end_list;
    int pieces, place; /* of the page: all, requested */
    uint32_t kind;
    const char *bytes;
    uint2 entry; /* lane l: the table's entry of the l-th page from `batch` on */
    int batch;
    bool waited, done;
    int lane, warp;

    __device__ __forceinline__ ring(const attend_job &a, char *slots, uint64_t *bars, page_note *notes, int warp)
        : a(a), slots(slots), bars(bars), notes(notes), slot(0), phase(0), fill(0), started(0), noted(0), pieces(0),
          place(0), kind(0), bytes(nullptr), waited(!a.early), done(false), lane(threadIdx.x & 31), warp(warp) {
#if __CUDA_ARCH__ >= 900
        constexpr int arrivals = 1;
        asm("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
#else
        constexpr int arrivals = 32;
#endif
        if (lane < a.slots)
            asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(bars + lane)), "n"(arrivals));
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;");
#endif
        __syncwarp();
    }

    __device__ __forceinline__ const kvc_share *shares() const {
        return (const kvc_share *)(a.division + 4 + 4 * a.division[0]);
    }

    /* Entries of 32 pages of this warp, from `page` on. */
    __device__ __forceinline__ void load_batch() {
        batch = page;
        const int mine = page + lane * WARPS;
        entry = mine < stop ? ((const uint2 *)a.table)[(int64_t)list * a.capacity + mine] : make_uint2(0, 0);
    }

    __device__ __forceinline__ void open(int which) {
        list = which;
        page = (which == first_list ? first_page : 0) + warp;
        end_page = which == end_list ? last : INT32_MAX;
        const int known = waited ? a.lists[which].pages : shares()[which].fixed_pages;
        stop = min(min(end_page, known), a.capacity);
        load_batch();
    }

    __device__ __forceinline__ void begin(const kvc_run &run) {
        first_list = run.first_list;
        first_page = run.first_page;
        end_list = run.end_page > 0 ? run.end_list : run.end_list - 1;
        last = run.end_page > 0 ? run.end_page : INT32_MAX;
        open(first_list);
    }

    __device__ __forceinline__ void wait() {
        if (!waited) wait_for_previous();
        waited = true;
    }

    /* The next page that is there, or done. */
    __device__ __forceinline__ bool next_page() {
        for (;;) {
            while (page >= stop) {
                if (!waited && end_page > stop) { /* the tail, which the kernel before may have changed */
                    wait();
                    stop = min(min(end_page, a.lists[list].pages), a.capacity);
                    if (page >= stop) end_page = stop; /* nothing more to wait for */
                    load_batch();
                } else if (list == end_list) {
                    done = true;
                    return false;
                } else {
                    open(list + 1);
                }
            }
            const int from = (page - batch) / WARPS;
            const uint32_t unit = __shfl_sync(ALL, entry.x, from);
            kind = __shfl_sync(ALL, entry.y, from);
            const int k_bits = kind & 0xff, v_bits = kind >> 8 & 0xff, tokens = kind >> 16 & 0xff;
            const int at = page;
            page += WARPS;
            if (from == 31) load_batch();
            const bool tail = k_bits == 16 && v_bits == 16;
            if (k_bits > 16 || v_bits > 16 || tokens == 0 || tokens > (tail ? 16 : 64)) continue;
            const int k_bytes = tail ? a.tail_half_bytes : a.half_bytes[k_bits];
            const int v_bytes = tail ? a.tail_half_bytes : a.half_bytes[v_bits];
            const int64_t first = (int64_t)unit * KVC_UNIT;
            if (k_bytes == 0 || v_bytes == 0 || first + k_bytes + v_bytes > a.arena_bytes) continue;
            bytes = a.arena + first;
            if (lane == 0) notes[noted] = page_note{list, at, kind, 0};
            if (++noted == a.slots) noted = 0;
            started++;
            place = 0;
            return true;
        }
    }

    __device__ __forceinline__ void copy(const char *from, int count) {
        const uint32_t to = shared_address(slots + fill * SLOT), bar = shared_address(bars + fill);
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(bar), "r"(count) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                         "[%0],[%1],%2,[%3],%4;" ::"r"(to),
                         "l"(from), "r"(count), "r"(bar), "l"(policy)
                         : "memory");
        }
#else
        for (int i = lane * 16; i < count; i += 512)
            asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to + i), "l"(from + i) : "memory");
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
#endif
        if (++fill == a.slots) fill = 0;
    }

    /* Channel tiles of a piece times bytes of a channel tile (piece::BYTES). */
    static __device__ __forceinline__ int piece_bytes(int bits) { return bits == 3 ? 3072 : 4096; }

    /* Requests the next piece, if there is one. V's pieces come last first: its scales are wanted before its codes. */
    __device__ __forceinline__ void request() {
        if (place == pieces) {
            if (done || !next_page()) return;
        }
        const int k_bits = kind & 0xff, v_bits = kind >> 8 & 0xff;
        const bool tail = k_bits == 16 && v_bits == 16;
        const int k_bytes = tail ? a.tail_half_bytes : a.half_bytes[k_bits];
        const int v_bytes = tail ? a.tail_half_bytes : a.half_bytes[v_bits];
        const int k_pieces = count_pieces(k_bits, tail), v_pieces = count_pieces(v_bits, tail);
        pieces = k_pieces + v_pieces;
        const bool value = place >= k_pieces;
        const int step = piece_bytes(value ? v_bits : k_bits), half = value ? v_bytes : k_bytes;
        const int n = value ? v_pieces : k_pieces, i = value ? place - k_pieces : place;
        const int which = !value ? i : i == 0 ? n - 1 : i - 1;
        const int from = which * step;
        copy(bytes + (value ? k_bytes : 0) + from, which == n - 1 ? half - from : step);
        place++;
    }

    /* A page of 16 tokens has 8 channel tiles in a piece of 16 bits. */
    static __device__ __forceinline__ int count_pieces(int bits, bool tail) {
        const int per = tail ? 8 : bits == 2 ? 16 : bits <= 4 ? 8 : bits == 8 ? 4 : 2;
        return (TILES + per - 1) / per;
    }

    /* The piece `ahead` of the next one, once it has arrived. */
    __device__ __forceinline__ const char *arrived(int ahead = 0) {
        int at = slot + ahead, parity = phase;
        if (at >= a.slots) at -= a.slots, parity ^= 1;
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p; LOOP: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @!p bra LOOP;}" ::"r"(
                         shared_address(bars + at)),
                     "r"(parity)
                     : "memory");
#else
        uint32_t ok = 0;
        while (!ok)
            asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
                         : "=r"(ok)
                         : "r"(shared_address(bars + at)), "r"(parity)
                         : "memory");
#endif
        return slots + at * SLOT;
    }

    /* The next piece has been read by all lanes: its slot takes another. */
    __device__ __forceinline__ void release() {
        __syncwarp();
        request();
        if (++slot == a.slots) slot = 0, phase ^= 1;
    }
};

} // namespace
