/* attend_ring.cuh: pieces of pages on their way from the arena into shared memory. Four warps of a block fetch for
 * the others: a lane for each reader walks through its pages and requests their pieces, in the order in which they
 * are worked on, as slots of its ring are given back. (Four, because barriers and bulk copies take lanes one by one.)
 * By bulk copies on sm_90 and later, by cp.async before. */
#pragma once
#include "attend_job.cuh"
#include "hopper.cuh"

namespace {

constexpr int NO_LIST = 0x7fffffff;

/* What lies in the slot, and behind it where a page has several pieces. */
struct page_note {
    int32_t list, page; /* NO_LIST: no more pages */
    uint32_t kind;      /* k_bits | v_bits << 8 | tokens << 16 */
    int32_t joint;      /* bytes of K where V lies behind it in the same slot; 0: it does not */
};

/* A page whose table entry has been asked for. `pair`: the 16 bytes that hold the entry. */
struct page_entry {
    uint2 pair[2];
    int32_t list, page, which, spare;
};

#if __CUDA_ARCH__ >= 900
constexpr int ARRIVALS = 1; /* on a full slot: the request's, and the copy's bytes */
#else
constexpr int ARRIVALS = 33; /* every lane's copies, and the request's */
#endif

/* Arrivals at an empty slot: a warp's lanes, or one for all behind __syncwarp, which compute-sanitizer's racecheck does
 * not take for an order between the others' reads and that arrival. */
#ifdef KVC_RACECHECK
constexpr int RELEASES = 32;
#else
constexpr int RELEASES = 1;
#endif

/* Shared memory of a block's rings: (READERS, slots) each, entries (READERS, AHEAD). A reader is a warp or a warpgroup.
 */
struct rings {
    char *slots;
    uint64_t *full, *empty;
    page_note *notes;
    page_entry *entries;
    int count; /* slots of a reader */

    static constexpr int SLOT_BYTES = SLOT + 2 * (int)sizeof(uint64_t) + (int)sizeof(page_note);
    static constexpr int READER_BYTES = AHEAD * (int)sizeof(page_entry);

    /* Makes a reader of so many warps its barriers; by one thread. */
    __device__ __forceinline__ void begin(int reader, int warps) const {
#pragma unroll 1
        for (int i = reader * count; i < (reader + 1) * count; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(full + i)), "n"(ARRIVALS));
            asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(empty + i)),
                         "r"(warps * RELEASES));
        }
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;");
#endif
    }
};

__device__ __forceinline__ void arrive(const uint64_t *bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ __forceinline__ bool has_passed(const uint64_t *bar, int parity) {
    uint32_t ok;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
                 : "=r"(ok)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
    return ok;
}

__device__ __forceinline__ void pass(const uint64_t *bar, int parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; LOOP: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @!p bra LOOP;}" ::"r"(
                     shared_address(bar)),
                 "r"(parity)
                 : "memory");
#else
    while (!has_passed(bar, parity)) {
    }
#endif
}

/* The working warps have made the rings ready; `wait`: until all have. */
template <int THREADS> __device__ __forceinline__ void rings_are_ready(bool wait) {
    if (wait)
        asm volatile("bar.sync 2,%0;" ::"n"(THREADS) : "memory");
    else
        asm volatile("bar.arrive 2,%0;" ::"n"(THREADS) : "memory");
}

/* A working warp's end of its ring, which it may share with the others of its warpgroup. */
struct ring {
    const char *slots;
    const uint64_t *full, *empty;
    const page_note *notes;
    int count, slot, phase; /* slot: of the piece that is worked on next */

    __device__ __forceinline__ ring(const rings &all, int reader)
        : slots(all.slots + reader * all.count * SLOT), full(all.full + reader * all.count),
          empty(all.empty + reader * all.count), notes(all.notes + reader * all.count), count(all.count), slot(0),
          phase(0) {}

    /* The next piece, which has arrived. */
    __device__ __forceinline__ const char *next() const { return slots + slot * SLOT; }

    /* The piece `ahead` of the next one, once it has arrived. */
    __device__ __forceinline__ const char *arrived(int ahead = 0) const {
        int at = slot + ahead, parity = phase;
        if (ahead && at >= count) at -= count, parity ^= 1;
        pass(full + at, parity);
        return slots + at * SLOT;
    }

    /* The page whose first piece is next, once that has arrived. */
    __device__ __forceinline__ page_note note() const {
        pass(full + slot, phase);
        const int4 words = *(const int4 *)(notes + slot);
        return page_note{words.x, words.y, (uint32_t)words.z, words.w};
    }

    /* The next piece has been read by all lanes: its slot takes another. */
    __device__ __forceinline__ void release() {
        __syncwarp();
        if (RELEASES == 32 || (threadIdx.x & 31) == 0) arrive(empty + slot);
        if (++slot == count) slot = 0, phase ^= 1;
    }
};

/* A fetching warp's; its first lanes serve a reader each: a working warp or, GROUPS, a working warpgroup. */
template <int READERS, bool GROUPS = false> struct fetcher {
    const attend_job &a;
    const rings &all;
    static constexpr int LANES = (READERS + 3) / 4;
    static constexpr bool ALONE = GROUPS && LANES == 1; /* a warp's only one */
    const int served;                                   /* the reader */
    uint64_t policy;
    page_entry *entries;
    uint64_t *full, *empty;
    /* the walk through the table */
    const uint2 *next;              /* entry of `page` */
    int list, page, stop, end_page; /* stop: pages of the list that may be read now; end_page: that belong to the run */
    int end_list, last_page;
    int pushed, popped;        /* table entries */
    bool waited, ended, loose; /* loose: an entry was asked for that turned out to be none */
    /* the piece that is next; of no bytes: there is none */
    const char *from;
    int bytes;
    page_note note;    /* where the piece is a page's first */
    bool ready, first; /* there is a next piece; it is a page's first */
    /* those behind it */
    const char *value;
    half_facts k, v;
    int place, pieces;
    int fill, parity; /* the slot that is filled next */

    __device__ __forceinline__ fetcher(const attend_job &a, const rings &all, int which)
        : a(a), all(all), served(which * LANES + (threadIdx.x & 31)), entries(all.entries + served * AHEAD),
          full(all.full + served * all.count), empty(all.empty + served * all.count), page(0), stop(0), end_page(0),
          pushed(0), popped(0), waited(!a.early), ended(false), loose(false), bytes(0), ready(false), first(false),
          value(nullptr), place(0), pieces(0), fill(0), parity(1) {
#if __CUDA_ARCH__ >= 900
        asm("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
#endif
    }

    __device__ __forceinline__ page_entry *entry(int i) const { return entries + (i & (AHEAD - 1)); }

    /* Asks for an entry, past the L1 cache, which may hold it as it was. */
    __device__ __forceinline__ void ask(const uint2 *where) {
        page_entry *to = entry(pushed);
        if (loose) asm volatile("cp.async.wait_group 0;" ::: "memory"); /* it goes to the same place */
        loose = false;
        const int which = (int)((uintptr_t)where >> 3 & 1);
        const uint2 *pair = where - which, *first = (const uint2 *)a.table;
        if (pair >= first && pair + 2 <= first + (int64_t)a.n * a.capacity)
            asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(shared_address(to->pair)), "l"(pair)
                         : "memory");
        else /* half of the 16 bytes lies outside */
            to->pair[which] = __ldcg(where);
        asm volatile("cp.async.commit_group;" ::: "memory");
        to->list = list, to->page = page, to->which = which;
    }

    static __device__ __forceinline__ bool serves(int reader) { return READERS % 4 == 0 || reader < READERS; }

    /* The entry that the division has for this lane; of no tokens: it has none. */
    static __device__ __forceinline__ kvc_page first_entry(const attend_job &a, int block, int which) {
        static_assert(READERS <= KVC_DIVIDE_ENTRIES, "a page a lane");
        const int lane = threadIdx.x & 31;
        if (lane >= LANES || !serves(which * LANES + lane)) return kvc_page{};
        return a.first_entries[block * KVC_DIVIDE_ENTRIES + which * LANES + lane];
    }

    /* Pages of the list that may be read now. */
    __device__ __forceinline__ int known() const {
        const kvc_share *shares = (const kvc_share *)(a.division + 4);
        return waited ? __ldcg(&a.lists[list].pages) : shares[list].fixed_pages;
    }

    __device__ __forceinline__ void go_to(int which, int begin) {
        list = which;
        page = begin + served;
        end_page = which == end_list ? last_page : NO_LIST;
        next = (const uint2 *)a.table + (int64_t)list * a.capacity + page;
    }

    /* To a list's page whose entry is there; where the list stops is left to find out. */
    __device__ __forceinline__ void open(int which, int begin, const kvc_page &given) {
        go_to(which, begin);
        page_entry *to = entry(pushed);
        to->pair[0] = *(const uint2 *)&given;
        to->list = list, to->page = page, to->which = 0;
        asm volatile("cp.async.commit_group;" ::: "memory"); /* of nothing: groups are counted */
        step();
    }

    /* To a list's page; its entry is asked for before it is known whether there is such a page. */
    __device__ __forceinline__ void open(int which, int begin) {
        go_to(which, begin);
        if (a.capacity > 0) ask(next - max(0, page - (a.capacity - 1)));
        stop = min(min(end_page, known()), a.capacity);
        if (page < stop)
            step();
        else
            loose = true;
    }

    __device__ __forceinline__ void step() { pushed++, page += READERS, next += READERS; }

    /* Asks for further entries; true where the walk goes on only after the kernel before. */
    __device__ __forceinline__ bool push() {
#pragma unroll 1
        while (!ended && pushed - popped < AHEAD) {
            if (page < stop) {
                ask(next);
                step();
            } else if (!waited && end_page > stop) { /* the tail, which that kernel may have changed */
                return true;
            } else if (list >= end_list) {
                ended = true;
            } else {
                open(list + 1, 0);
            }
        }
        return false;
    }

    __device__ __forceinline__ void wait() {
        wait_for_previous();
        waited = true;
        if (end_page > stop) {
            stop = min(min(end_page, known()), a.capacity);
            if (page >= stop) end_page = stop;
        }
    }

    /* The oldest entry becomes the page whose pieces are next; an entry that is none is passed over. */
    __device__ __forceinline__ void pop() {
        if (pushed - popped == AHEAD)
            asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
        else
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        const page_entry *oldest = entry(popped++);
        const uint2 word = oldest->pair[oldest->which];
        const int k_bits = word.y & 0xff, v_bits = word.y >> 8 & 0xff, tokens = word.y >> 16 & 0xff;
        const bool tail = (word.y & 0xffff) == 0x1010;
        if (k_bits > 16 || v_bits > 16 || tokens == 0 || tokens > (tail ? 16 : 64)) return;
        k = a.halves[tail ? 17 : k_bits];
        v = a.halves[tail ? 17 : v_bits];
        const int64_t at = (int64_t)word.x * KVC_UNIT;
        if (k.bytes == 0 || v.bytes == 0 || at + k.bytes + v.bytes > a.arena_bytes) return;
        from = a.arena + at;
        value = from + k.bytes;
        bytes = k.pieces == 1 ? k.bytes : k.step;
        pieces = k.pieces + v.pieces;
        const bool joint = k.bytes + v.bytes <= SLOT && k_bits <= 8 && v_bits <= 8;
        if (joint) pieces = 1, bytes = k.bytes + v.bytes;
        note = page_note{oldest->list, oldest->page, word.y, joint ? k.bytes : 0};
        place = 1;
        ready = first = true;
    }

    /* The page's next piece. V's come last first: its scales are wanted before its codes. A warpgroup takes several of
     * 16 bits together, which have no scales: theirs come in order. */
    __device__ __forceinline__ void turn() {
        ready = true, first = false;
        if (pieces == 2) {
            from = value, bytes = v.bytes;
        } else if (place < k.pieces) {
            from += k.step;
            bytes = place == k.pieces - 1 ? k.bytes - place * k.step : k.step;
        } else {
            const int i = place - k.pieces;
            const bool in_order = GROUPS && (note.kind >> 8 & 0xff) == 16;
            const int which = in_order ? i : i == 0 ? v.pieces - 1 : i - 1;
            from = value + which * v.step;
            bytes = which == v.pieces - 1 ? v.bytes - which * v.step : v.step;
        }
        place++;
    }

    /* Requests the piece into the slot that is free. */
    __device__ __forceinline__ void request(bool go) {
        char *const slot = all.slots + (served * all.count + fill) * SLOT;
        const uint64_t *const bar = full + fill;
        if (go) {
            if (first)
                *(int4 *)(all.notes + served * all.count + fill) =
                    make_int4(note.list, note.page, (int)note.kind, note.joint);
#if __CUDA_ARCH__ >= 900
            if (bytes) {
                asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(shared_address(bar)),
                             "r"(bytes)
                             : "memory");
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                             "[%0],[%1],%2,[%3],%4;" ::"r"(shared_address(slot)),
                             "l"(from), "r"(bytes), "r"(shared_address(bar)), "l"(policy)
                             : "memory");
            } else {
                arrive(bar);
            }
#else
            arrive(bar);
#endif
            if (++fill == all.count) fill = 0, parity ^= 1;
            ready = false;
        }
#if __CUDA_ARCH__ < 900
        __syncwarp(); /* what one lane has seen free, all write to */
        unsigned lanes = __ballot_sync(ALL, go);
#pragma unroll 1
        while (lanes) { /* all lanes copy for one */
            const int one = __ffs(lanes) - 1;
            lanes &= lanes - 1;
            const char *source = (const char *)__shfl_sync(ALL, (unsigned long long)from, one);
            const uint32_t to = __shfl_sync(ALL, shared_address(slot), one);
            const uint32_t done = __shfl_sync(ALL, shared_address(bar), one);
            const int size = __shfl_sync(ALL, bytes, one);
            for (int i = (threadIdx.x & 31) * 16; i < size; i += 512)
                asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to + i), "l"(source + i) : "memory");
            asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(done) : "memory");
        }
#endif
    }

    /* The run's pages. THREADS: of the block. */
    template <int THREADS> __device__ __forceinline__ void fetch(const kvc_run &run, const kvc_page &given) {
        end_list = run.end_page > 0 ? run.end_list : run.end_list - 1;
        last_page = run.end_page > 0 ? run.end_page : NO_LIST;
        bool done = (threadIdx.x & 31) >= LANES || !serves(served);
        const bool knows = given.tokens > 0; /* so the first page waits for the division alone */
        int fixed = 0;                       /* asked for here, looked at behind those copies */
        if (knows) {
            open(run.first_list, run.first_page, given);
            fixed = known();
        } else if (!done) {
            open(run.first_list, run.first_page);
        }
        rings_are_ready<THREADS>(true);
        if (knows) pop();
        request(ready);
#pragma unroll 1
        for (int i = 1; i < all.count && __any_sync(ALL, knows && place < pieces); i++) { /* nor do its other pieces */
            const bool go = knows && place < pieces;
            if (go) turn();
            request(go);
        }
        if (knows) stop = min(min(end_page, fixed), a.capacity);
#pragma unroll 1
        while (!__all_sync(ALL, done)) {
            /* A lane alone in its warp sleeps at the barrier: asking again and again takes issue slots from the working
             * warps. */
            if (ALONE && ready) pass(empty + fill, parity);
            const bool go = ready && (ALONE || has_passed(empty + fill, parity));
            const bool last = go && bytes == 0;
            request(go);
            done = done || last;
            bool wants = false, moved = go;
            if (!ready && !done) {
                if (place < pieces) {
                    turn();
                } else {
                    wants = push();
                    if (popped < pushed) {
                        pop();
                        moved = true;
                    } else if (ended) {
                        note.list = NO_LIST;
                        bytes = 0;
                        ready = first = moved = true;
                    }
                }
            }
            /* As late as possible. A lane that waits for a slot must not hold the others up: its warp may wait for
             * theirs. */
            if (!__any_sync(ALL, moved)) {
                if (!waited && __any_sync(ALL, wants && !ready))
                    wait();
                else
                    __nanosleep(300);
            }
        }
#if __CUDA_ARCH__ < 900
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }
};

} // namespace
