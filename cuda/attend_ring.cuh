/* attend_ring.cuh: pieces of pages on their way from the arena into shared memory. Four warps of a block fetch for
 * the others: a lane for each reader requests its pages' pieces, in the order in which they are worked on, as slots of
 * its ring are given back. (Four, because barriers and bulk copies take lanes one by one.) Table entries come many at a
 * time, one a lane, and wait in a queue of each reader. By bulk copies on sm_90 and later, by cp.async before. */
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

/* A page in its reader's queue: of its table entry, and where that lies. */
struct page_entry {
    uint32_t unit, kind; /* of page_note; 0: no more pages */
    int32_t list, page;
};

#if __CUDA_ARCH__ >= 900
constexpr int ARRIVALS = 1; /* on a full slot: the request's, and the copy's bytes */
#else
constexpr int ARRIVALS = 33; /* every lane's copies, and the request's */
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
                         "r"(warps * WARP_ARRIVALS));
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
        if (arrives_for_warp(threadIdx.x & 31)) arrive(empty + slot);
        if (++slot == count) slot = 0, phase ^= 1;
    }
};

/* A fetching warp's; its first lanes serve a reader each: a working warp or, GROUPS, a working warpgroup. The others
 * help them with table entries: STEPS lanes look at a reader's next pages. */
template <int READERS, bool GROUPS = false> struct fetcher {
    const attend_job &a;
    const rings &all;
    static constexpr int LANES = (READERS + 3) / 4, STEPS = AHEAD / 2, LOW = STEPS / 2;
    static constexpr bool ALONE = GROUPS && LANES == 1; /* a warp's only one */
    static_assert(LANES * STEPS <= 32, "an entry a lane");
    const int served; /* the reader, of all lanes with the same remainder */
    uint64_t policy;
    page_entry *entries;
    uint64_t *full, *empty;
    /* the reader's walk through the table */
    const int mine;                                /* this lane's page: so many behind `base` */
    int list, base, end_page, end_list, last_page; /* end_page: pages of the list that belong to the run */
    int begin;                                     /* pages before this one have been there */
    uint2 asked;                                   /* the entry */
    int known;                                     /* pages of the list that may be read now */
    bool waited, walks, blocked;                   /* walks: there may be more; blocked: but behind the kernel before */
    int queued, taken;                             /* of the reader's queue; taken: in the lane that serves it */
    int low_at;                                    /* entries to be taken until more are to join */
    /* the piece that is next; of no bytes: there is none */
    const char *from;
    int bytes;
    page_note note; /* of its page */
    bool ready;     /* there is a next piece */
    /* those behind it */
    const char *value;
    int place, pieces;                                  /* place: 1 after a page's first */
    int first_bytes, second_bytes, class_pieces, joint; /* of the page's class: K's first piece, or all; V */
    int fill, parity;                                   /* the slot that is filled next */

    __device__ __forceinline__ fetcher(const attend_job &a, const rings &all, int which)
        : a(a), all(all), served(which * LANES + (threadIdx.x & 31) % LANES), entries(all.entries + served * AHEAD),
          full(all.full + served * all.count), empty(all.empty + served * all.count),
          mine((threadIdx.x & 31) < LANES * STEPS && serves(served) ? served + READERS * ((threadIdx.x & 31) / LANES)
                                                                    : NO_LIST / 2),
          begin(0), waited(!a.early), walks(true), blocked(false), queued(0), taken(0), low_at(NO_LIST), bytes(0),
          note{NO_LIST, 0, 0, 0}, ready(false), value(nullptr), place(0), pieces(0), first_bytes(0), second_bytes(0),
          class_pieces(0), joint(0), fill(0), parity(1) {
#if __CUDA_ARCH__ >= 900
        asm("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
#endif
    }

    __device__ __forceinline__ int4 *entry(int i) const { return (int4 *)(entries + (i & (AHEAD - 1))); }

    static __device__ __forceinline__ bool serves(int reader) { return READERS % 4 == 0 || reader < READERS; }

    /* The entry that the division has for this lane; of no tokens: it has none. */
    static __device__ __forceinline__ kvc_page first_entry(const attend_job &a, int block, int which) {
        static_assert(READERS <= KVC_DIVIDE_ENTRIES, "a page a lane");
        const int lane = threadIdx.x & 31;
        if (lane >= LANES || !serves(which * LANES + lane)) return kvc_page{};
        return a.first_entries[block * KVC_DIVIDE_ENTRIES + which * LANES + lane];
    }

    __device__ __forceinline__ half_facts facts(uint32_t kind, int bits) const {
        return a.halves[(kind & 0xffff) == 0x1010 ? 17 : bits];
    }

    /* Whether it is a page that there may be. */
    __device__ __forceinline__ bool is_page(const uint2 &word) const {
        const int k_bits = word.y & 0xff, v_bits = word.y >> 8 & 0xff, tokens = word.y >> 16 & 0xff;
        if (k_bits > 16 || v_bits > 16 || tokens == 0 || tokens > ((word.y & 0xffff) == 0x1010 ? 16 : 64)) return false;
        const int k = facts(word.y, k_bits).bytes, v = facts(word.y, v_bits).bytes;
        return k != 0 && v != 0 && (int64_t)word.x * KVC_UNIT + k + v <= a.arena_bytes;
    }

    __device__ __forceinline__ void go_to(int which, int page) {
        list = which;
        base = page;
        begin = 0;
        end_page = which == end_list ? last_page : NO_LIST;
    }

    /* Asks for entries before it is known whether there are such pages, and past the L1 cache, which may hold them as
     * they were. */
    __device__ __forceinline__ void ask() {
        const int page = base + mine;
        asked = make_uint2(0, 0);
        if (page < a.capacity) asked = __ldcg((const uint2 *)a.table + (int64_t)list * a.capacity + page);
        known = waited ? __ldcg(&a.lists[list].pages) : ((const kvc_share *)(a.division + 4))[list].fixed_pages;
    }

    /* What was asked for joins the queues that have places for it, but entries that are no pages; asks for more. */
    __device__ __forceinline__ void fill_queues() {
        const int page = base + mine, stop = min(min(end_page, known), a.capacity), lane = threadIdx.x & 31;
        const int waiting = queued - __shfl_sync(ALL, taken, lane % LANES);
        const bool joins = walks && !blocked && waiting < STEPS;
        const bool there = joins && page >= begin && page < stop && is_page(asked);
        uint32_t same = 0; /* lanes of this reader */
#pragma unroll
        for (int i = 0; i < STEPS; i++) same |= 1u << i * LANES;
        const uint32_t joining = __ballot_sync(ALL, there) & same << lane % LANES;
        __syncwarp(); /* what lay there has been read */
        if (there)
            *entry(queued + __popc(joining & ((1u << lane) - 1))) = make_int4((int)asked.x, (int)asked.y, list, page);
        queued += __popc(joining);
        if (joins) {
            if (base + READERS * STEPS < stop) {
                base += READERS * STEPS;
            } else if (!waited && end_page > stop) { /* the tail, which that kernel may have changed */
                begin = stop;
                blocked = true;
            } else if (list < end_list) {
                go_to(list + 1, 0);
            } else {
                if (lane < LANES && serves(served)) *entry(queued) = make_int4(0, 0, NO_LIST, 0);
                queued++;
                walks = false;
            }
            if (walks && !blocked) ask();
            low_at = walks && !blocked && lane < LANES ? queued - LOW : NO_LIST;
        }
        __syncwarp();
    }

    __device__ __forceinline__ void wait() {
        wait_for_previous();
        if (blocked) {
            waited = true;
            blocked = false;
            ask();
            if ((threadIdx.x & 31) < LANES) low_at = queued - LOW;
        }
    }

    /* The page whose pieces are next: unit, kind, list, page. Pages of one class follow each other, mostly. */
    __device__ __forceinline__ void open(const int4 &next) {
        const uint32_t kind = (uint32_t)next.y;
        if ((kind ^ note.kind) & 0xffff) {
            const int k_bits = kind & 0xff, v_bits = kind >> 8 & 0xff;
            const half_facts k = facts(kind, k_bits), v = facts(kind, v_bits);
            const bool together = k.bytes + v.bytes <= SLOT && k_bits <= 8 && v_bits <= 8;
            joint = together ? k.bytes : 0;
            class_pieces = together ? 1 : k.pieces + v.pieces;
            first_bytes = together ? k.bytes + v.bytes : k.pieces == 1 ? k.bytes : k.step;
            second_bytes = v.bytes;
        }
        from = a.arena + (uint64_t)(uint32_t)next.x * KVC_UNIT;
        bytes = first_bytes;
        pieces = class_pieces;
        note = page_note{next.z, next.w, kind, joint};
        place = 1;
        ready = true;
    }

    /* The page's next piece. V's come last first: its scales are wanted before its codes. A warpgroup takes several of
     * 16 bits together, which have no scales: theirs come in order. */
    __device__ __forceinline__ void turn() {
        ready = true;
        if (pieces == 2) {
            from += bytes;
            bytes = second_bytes;
        } else {
            const half_facts k = facts(note.kind, note.kind & 0xff), v = facts(note.kind, note.kind >> 8 & 0xff);
            if (place < k.pieces) {
                from += k.step;
                bytes = place == k.pieces - 1 ? k.bytes - place * k.step : k.step;
            } else {
                const int i = place - k.pieces;
                if (i == 0) value = from + bytes;
                const bool in_order = GROUPS && (note.kind >> 8 & 0xff) == 16;
                const int which = in_order ? i : i == 0 ? v.pieces - 1 : i - 1;
                from = value + which * v.step;
                bytes = which == v.pieces - 1 ? v.bytes - which * v.step : v.step;
            }
        }
        place++;
    }

    /* Requests the piece into the slot that is free. */
    __device__ __forceinline__ void request(bool go) {
        char *const slot = all.slots + (served * all.count + fill) * SLOT;
        const uint64_t *const bar = full + fill;
        if (go) {
            if (place == 1)
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
        const uint2 word = *(const uint2 *)&given;
        const bool knows = is_page(word); /* so the first page waits for the division alone */
        go_to(run.first_list, run.first_page);
        ask(); /* looked at behind that page's copies */
        if (knows) begin = base + mine + 1;
        rings_are_ready<THREADS>(true);
        if (knows) open(make_int4((int)word.x, (int)word.y, list, base + mine));
        request(ready);
#pragma unroll 1
        for (int i = 1; i < all.count && __any_sync(ALL, place < pieces); i++) { /* nor do its other pieces */
            const bool go = place < pieces;
            if (go) turn();
            request(go);
        }
        bool low = true, stuck = false, over = false; /* over: the kernel before */
#pragma unroll 1
        while (true) {
            /* A lane alone in its warp sleeps at the barrier: asking again and again takes issue slots from the working
             * warps. */
            if (ALONE && ready) pass(empty + fill, parity);
            const bool go = ready && (ALONE || has_passed(empty + fill, parity));
            if (__any_sync(ALL, go)) {
                done = done || (go && bytes == 0);
                request(go);
            } else if (!low && !stuck) {
                __nanosleep(300);
                continue;
            } else if (low) {
                fill_queues();
            } else { /* as late as possible */
                wait();
                over = true;
            }
            if (!ready && !done) {
                if (place < pieces)
                    turn();
                else if (taken < queued)
                    open(*entry(taken++));
            }
            if (__all_sync(ALL, done)) break;
            low = __any_sync(ALL, taken > low_at);
            stuck = __any_sync(ALL, blocked && (over || (!ready && !done)));
        }
#if __CUDA_ARCH__ < 900
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }
};

} // namespace
