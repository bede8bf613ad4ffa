/* arena.c: see arena.h. */
#include "core/arena.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define RUN_UNITS 32 /* a slab is a whole number of 4 KiB memory pages */
#define HUGE_BYTES ((uintptr_t)2 << 20)
#define FREE_END UINT32_MAX
#define LIVE (UINT32_MAX - 1)

typedef struct {
    uint32_t first, units;      /* the slab's run */
    uint32_t page_units, pages; /* pages in it */
    uint32_t live, free_head;
    uint32_t *next; /* of each page: the next free one, FREE_END, or LIVE */
} slab;

typedef struct {
    uint32_t first, units;
} run;

struct kvc_arena {
    char *base;
    int64_t reserved, nbytes, used;
    slab *slabs; /* by first unit */
    run *runs;   /* free runs by first unit, never adjacent */
    size_t slab_count, run_count, slab_room, run_room;
};

kvc_status kvc_arena_create(int64_t bytes, kvc_arena **out) {
    kvc_arena *arena = calloc(1, sizeof *arena);
    KVC_CHECK(arena, KVC_ENOMEM, "arena: out of memory");
    const int64_t most = (int64_t)UINT32_MAX * KVC_UNIT / (RUN_UNITS * KVC_UNIT) * (RUN_UNITS * KVC_UNIT);
    bytes = bytes > most ? most : (bytes + RUN_UNITS * KVC_UNIT - 1) / (RUN_UNITS * KVC_UNIT) * (RUN_UNITS * KVC_UNIT);
    for (;; bytes = bytes / 2 / (RUN_UNITS * KVC_UNIT) * (RUN_UNITS * KVC_UNIT)) {
        arena->base =
            mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena->base != MAP_FAILED) break;
        if (bytes < 128 << 20) {
            free(arena);
            return kvc_fail(KVC_ENOMEM, "arena: expected 64 MiB of address space at least, got none");
        }
    }
    arena->reserved = bytes;
    arena->runs = malloc(sizeof *arena->runs);
    if (!arena->runs) {
        kvc_arena_destroy(arena);
        return kvc_fail(KVC_ENOMEM, "arena: out of memory");
    }
    arena->runs[0] = (run){0, (uint32_t)(bytes / KVC_UNIT)};
    arena->run_count = arena->run_room = 1;
    *out = arena;
    return KVC_OK;
}

void kvc_arena_destroy(kvc_arena *arena) {
    if (!arena) return;
    munmap(arena->base, (size_t)arena->reserved);
    for (size_t i = 0; i < arena->slab_count; i++) free(arena->slabs[i].next);
    free(arena->slabs);
    free(arena->runs);
    free(arena);
}

static void *grown(void *items, size_t *room, size_t wanted, size_t size) {
    if (wanted <= *room) return items;
    const size_t next = wanted < 8 ? 8 : wanted * 2;
    void *larger = realloc(items, next * size);
    if (larger) *room = next;
    return larger;
}

/* Huge memory pages for the whole ones inside a slab: attention reads gigabytes in order; none is held beyond it. */
static void use_huge_pages(char *first, int64_t bytes) {
    const uintptr_t begin = ((uintptr_t)first + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1);
    const uintptr_t end = ((uintptr_t)first + (uintptr_t)bytes) & ~(HUGE_BYTES - 1);
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* a hint: failing is as good as not asking */
}

/* A new slab of `pages` pages, or NULL when memory or address space is out. */
static slab *slab_create(kvc_arena *arena, uint32_t page_units, int64_t pages) {
    const int64_t units = (pages * page_units + RUN_UNITS - 1) / RUN_UNITS * RUN_UNITS;
    size_t r = 0;
    while (r < arena->run_count && arena->runs[r].units < units) r++;
    if (r == arena->run_count) return NULL;
    slab *slabs = grown(arena->slabs, &arena->slab_room, arena->slab_count + 1, sizeof *slabs);
    if (!slabs) return NULL;
    arena->slabs = slabs;
    uint32_t *next = malloc((size_t)pages * sizeof *next);
    if (!next) return NULL;
    for (int64_t i = 0; i < pages; i++) next[i] = i + 1 < pages ? (uint32_t)(i + 1) : FREE_END;
    const uint32_t first = arena->runs[r].first;
    arena->runs[r].first += (uint32_t)units;
    arena->runs[r].units -= (uint32_t)units;
    if (arena->runs[r].units == 0)
        memmove(arena->runs + r, arena->runs + r + 1, (--arena->run_count - r) * sizeof *arena->runs);
    size_t at = 0;
    while (at < arena->slab_count && slabs[at].first < first) at++;
    memmove(slabs + at + 1, slabs + at, (arena->slab_count++ - at) * sizeof *slabs);
    slabs[at] = (slab){first, (uint32_t)units, page_units, (uint32_t)pages, 0, 0, next};
    arena->nbytes += units * KVC_UNIT;
    use_huge_pages(arena->base + (int64_t)first * KVC_UNIT, units * KVC_UNIT);
    return &slabs[at];
}

/* Gives an empty slab's memory back. Room for one more run was made when the slab's pages were freed. */
static void slab_release(kvc_arena *arena, size_t s) {
    const slab gone = arena->slabs[s];
    memmove(arena->slabs + s, arena->slabs + s + 1, (--arena->slab_count - s) * sizeof gone);
    free(gone.next);
    arena->nbytes -= (int64_t)gone.units * KVC_UNIT;
    madvise(arena->base + (int64_t)gone.first * KVC_UNIT, (size_t)gone.units * KVC_UNIT, MADV_DONTNEED);
    size_t r = 0;
    while (r < arena->run_count && arena->runs[r].first < gone.first) r++;
    memmove(arena->runs + r + 1, arena->runs + r, (arena->run_count++ - r) * sizeof *arena->runs);
    arena->runs[r] = (run){gone.first, gone.units};
    if (r + 1 < arena->run_count && gone.first + gone.units == arena->runs[r + 1].first) {
        arena->runs[r].units += arena->runs[r + 1].units;
        memmove(arena->runs + r + 1, arena->runs + r + 2, (--arena->run_count - r - 1) * sizeof *arena->runs);
    }
    if (r > 0 && arena->runs[r - 1].first + arena->runs[r - 1].units == gone.first) {
        arena->runs[r - 1].units += arena->runs[r].units;
        memmove(arena->runs + r, arena->runs + r + 1, (--arena->run_count - r) * sizeof *arena->runs);
    }
}

static kvc_status check_page(int64_t page_bytes, int64_t count) {
    KVC_CHECK(page_bytes > 0 && page_bytes % KVC_UNIT == 0 && page_bytes < (int64_t)1 << 31, KVC_EINVAL,
              "arena: page_bytes: expected a positive multiple of %d, got %lld", KVC_UNIT, (long long)page_bytes);
    KVC_CHECK(count >= 0 && count < LIVE, KVC_EINVAL, "arena: count: expected 0 or more, got %lld", (long long)count);
    return KVC_OK;
}

kvc_status kvc_arena_alloc(kvc_arena *arena, int64_t page_bytes, int64_t count, uint32_t *units) {
    KVC_TRY(check_page(page_bytes, count));
    const uint32_t page_units = (uint32_t)(page_bytes / KVC_UNIT);
    int64_t idle = 0;
    for (size_t s = 0; s < arena->slab_count; s++)
        if (arena->slabs[s].page_units == page_units) idle += arena->slabs[s].pages - arena->slabs[s].live;
    if (idle < count)
        KVC_CHECK(slab_create(arena, page_units, count - idle), KVC_ENOMEM,
                  "arena: expected room for %lld pages of %lld bytes, got %lld bytes reserved and %lld taken",
                  (long long)(count - idle), (long long)page_bytes, (long long)arena->reserved,
                  (long long)arena->nbytes);
    int64_t taken = 0;
    for (size_t s = 0; s < arena->slab_count && taken < count; s++) {
        slab *from = &arena->slabs[s];
        if (from->page_units != page_units) continue;
        for (; taken < count && from->free_head != FREE_END; taken++, from->live++) {
            const uint32_t page = from->free_head;
            from->free_head = from->next[page];
            from->next[page] = LIVE;
            units[taken] = from->first + page * page_units;
        }
    }
    arena->used += count * page_bytes;
    return KVC_OK;
}

static slab *slab_of(const kvc_arena *arena, uint32_t unit) {
    size_t low = 0, high = arena->slab_count;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (arena->slabs[middle].first <= unit)
            low = middle + 1;
        else
            high = middle;
    }
    return low ? &arena->slabs[low - 1] : NULL;
}

bool kvc_arena_live(const kvc_arena *arena, int64_t page_bytes, uint32_t unit) {
    const slab *at = slab_of(arena, unit);
    const uint32_t offset = at ? unit - at->first : 0;
    return at && (int64_t)at->page_units * KVC_UNIT == page_bytes && offset % at->page_units == 0 &&
           offset / at->page_units < at->pages && at->next[offset / at->page_units] == LIVE;
}

kvc_status kvc_arena_free(kvc_arena *arena, int64_t page_bytes, int64_t count, const uint32_t *units) {
    KVC_TRY(check_page(page_bytes, count));
    const uint32_t page_units = (uint32_t)(page_bytes / KVC_UNIT);
    run *runs = grown(arena->runs, &arena->run_room, arena->run_count + arena->slab_count + 1, sizeof *runs);
    KVC_CHECK(runs, KVC_ENOMEM, "arena: out of memory");
    arena->runs = runs;
    int64_t done = 0;
    for (; done < count; done++) {
        if (!kvc_arena_live(arena, page_bytes, units[done])) break;
        slab *to = slab_of(arena, units[done]);
        const uint32_t page = (units[done] - to->first) / page_units;
        to->next[page] = to->free_head;
        to->free_head = page;
        to->live--;
    }
    if (done < count) { /* take back what was freed, newest first: the free lists end as they began */
        const uint32_t bad = units[done];
        while (done-- > 0) {
            slab *from = slab_of(arena, units[done]);
            const uint32_t page = (units[done] - from->first) / page_units;
            from->free_head = from->next[page];
            from->next[page] = LIVE;
            from->live++;
        }
        return kvc_fail(KVC_EINVAL, "arena: units: expected live pages of %lld bytes, got unit %u",
                        (long long)page_bytes, bad);
    }
    arena->used -= count * page_bytes;
    for (size_t s = arena->slab_count; s-- > 0;)
        if (arena->slabs[s].live == 0) slab_release(arena, s);
    return KVC_OK;
}

void *kvc_arena_base(const kvc_arena *arena) { return arena->base; }
int64_t kvc_arena_reserved(const kvc_arena *arena) { return arena->reserved; }
int64_t kvc_arena_nbytes(const kvc_arena *arena) { return arena->nbytes; }
int64_t kvc_arena_used(const kvc_arena *arena) { return arena->used; }
