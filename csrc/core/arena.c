/* arena.c: see arena.h. */
#include "core/arena.h"

#include <stdlib.h>
#include <string.h>

#include "core/arena_memory.h"

#define RUN_UNITS (KVC_RUN_BYTES / KVC_UNIT)             /* a slab is a whole number of 4 KiB memory pages */
#define GIVE_BACK_UNITS ((uint32_t)(4 << 20) / KVC_UNIT) /* what compact moves before it gives memory back */
#define FREE_END UINT32_MAX
#define LIVE (UINT32_MAX - 1)

typedef struct {
    uint32_t first, units;      /* the slab's run */
    uint32_t page_units, pages; /* pages in it */
    uint32_t live, free_head;
    uint32_t *next; /* of each page: the next free one, FREE_END, or LIVE */
} slab;

struct kvc_arena {
    kvc_arena_memory memory;
    int64_t used;
    slab *slabs; /* by first unit; what lies between them is free */
    size_t slab_count, slab_room;
};

kvc_status kvc_arena_create(int64_t bytes, int device, kvc_arena **out) {
    kvc_arena *arena = calloc(1, sizeof *arena);
    KVC_CHECK(arena, KVC_ENOMEM, "arena: out of memory");
    const kvc_status status = kvc_arena_memory_open(&arena->memory, bytes, device);
    if (status == KVC_OK)
        *out = arena;
    else
        free(arena);
    return status;
}

void kvc_arena_destroy(kvc_arena *arena) {
    if (!arena) return;
    kvc_arena_memory_close(&arena->memory);
    for (size_t i = 0; i < arena->slab_count; i++) free(arena->slabs[i].next);
    free(arena->slabs);
    free(arena);
}

static void *grown(void *items, size_t *room, size_t wanted, size_t size) {
    if (wanted <= *room) return items;
    const size_t next = wanted < 8 ? 8 : wanted * 2;
    void *larger = realloc(items, next * size);
    if (larger) *room = next;
    return larger;
}

static int64_t bytes_at(int64_t units) { return units * KVC_UNIT; }

static void give_back(kvc_arena *arena, int64_t first, int64_t units) {
    kvc_arena_memory_discard(&arena->memory, bytes_at(first), bytes_at(units));
}

static uint32_t end_of(const slab *of) { return of->first + of->units; }

/* The gap before slab s, or behind the last one. */
static void gap_before(const kvc_arena *arena, size_t s, int64_t *low, int64_t *high) {
    *low = s ? end_of(&arena->slabs[s - 1]) : 0;
    *high = s < arena->slab_count ? arena->slabs[s].first : kvc_arena_reserved(arena) / KVC_UNIT;
}

static int64_t whole_runs(int64_t units) { return (units + RUN_UNITS - 1) / RUN_UNITS * RUN_UNITS; }

/* There is room for it, and it has its memory. */
static void slab_insert(kvc_arena *arena, size_t at, slab added) {
    memmove(arena->slabs + at + 1, arena->slabs + at, (arena->slab_count++ - at) * sizeof added);
    arena->slabs[at] = added;
}

/* A new slab of `pages` pages. ENOMEM: nothing has changed. */
static kvc_status slab_create(kvc_arena *arena, uint32_t page_units, int64_t pages) {
    const int64_t units = whole_runs(pages * page_units);
    int64_t low, high;
    size_t at = 0;
    for (gap_before(arena, 0, &low, &high); high - low < units; gap_before(arena, at, &low, &high))
        KVC_CHECK(at++ < arena->slab_count, KVC_ENOMEM,
                  "arena: expected room for %lld pages of %lld bytes, got %lld bytes reserved and %lld taken",
                  (long long)pages, (long long)bytes_at(page_units), (long long)kvc_arena_reserved(arena),
                  (long long)kvc_arena_nbytes(arena));
    slab *slabs = grown(arena->slabs, &arena->slab_room, arena->slab_count + 1, sizeof *slabs);
    KVC_CHECK(slabs, KVC_ENOMEM, "arena: out of memory");
    arena->slabs = slabs;
    uint32_t *next = malloc((size_t)pages * sizeof *next);
    KVC_CHECK(next, KVC_ENOMEM, "arena: out of memory");
    const kvc_status status = kvc_arena_memory_take(&arena->memory, bytes_at(low), bytes_at(units));
    if (status != KVC_OK) {
        free(next);
        return status;
    }
    for (int64_t i = 0; i < pages; i++) next[i] = i + 1 < pages ? (uint32_t)(i + 1) : FREE_END;
    slab_insert(arena, at, (slab){(uint32_t)low, (uint32_t)units, page_units, (uint32_t)pages, 0, 0, next});
    return KVC_OK;
}

/* Gives an empty slab's memory back. */
static void slab_release(kvc_arena *arena, size_t s) {
    const slab gone = arena->slabs[s];
    memmove(arena->slabs + s, arena->slabs + s + 1, (--arena->slab_count - s) * sizeof gone);
    free(gone.next);
    kvc_arena_memory_drop(&arena->memory, bytes_at(gone.first), bytes_at(gone.units));
    give_back(arena, gone.first, gone.units);
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
    if (idle < count) KVC_TRY(slab_create(arena, page_units, count - idle));
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
    kvc_arena_memory_trim(&arena->memory);
    return KVC_OK;
}

/* ---- compact: the pages `from`, in order, go to `place`, slots of the slabs that are to be */

typedef struct {
    kvc_arena *arena;
    uint32_t page_units;
    int64_t n; /* live pages, > 0 */
    uint32_t *from, *place;
    slab *slabs; /* those to be, by first unit; at most as many as there were */
    size_t count;
} compaction;

/* Index in `from`, or -1. */
static int64_t index_of(const compaction *c, uint32_t unit) {
    int64_t low = 0, high = c->n;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (c->from[middle] < unit)
            low = middle + 1;
        else
            high = middle;
    }
    return low < c->n && c->from[low] == unit ? low : -1;
}

/* Fills `from`; EINVAL unless `units` are these pages, each once. Uses `place` for marks. */
static kvc_status list_live(compaction *c, const uint32_t *units) {
    const long long page_bytes = (long long)c->page_units * KVC_UNIT;
    int64_t i = 0;
    for (const slab *at = c->arena->slabs; at < c->arena->slabs + c->arena->slab_count; at++)
        for (uint32_t page = 0; at->page_units == c->page_units && page < at->pages; page++)
            if (at->next[page] == LIVE) c->from[i++] = at->first + page * c->page_units;
    memset(c->place, 0, (size_t)c->n * sizeof *c->place);
    for (int64_t k = 0; k < c->n; k++) {
        i = index_of(c, units[k]);
        KVC_CHECK(i >= 0, KVC_EINVAL, "arena: units: expected live pages of %lld bytes, got unit %u", page_bytes,
                  units[k]);
        KVC_CHECK(!c->place[i]++, KVC_EINVAL,
                  "arena: units: expected every live page of %lld bytes once, got unit %u twice", page_bytes, units[k]);
    }
    return KVC_OK;
}

/* Adds a slab for n pages to those to be; false: memory is out. */
static bool plan_slab(compaction *c, int64_t first, int64_t n) {
    const int64_t units = whole_runs(n * c->page_units), pages = units / c->page_units;
    uint32_t *next = calloc((size_t)pages, sizeof *next);
    if (next)
        c->slabs[c->count++] = (slab){(uint32_t)first,
                                      (uint32_t)units,
                                      c->page_units,
                                      (uint32_t)pages,
                                      (uint32_t)n,
                                      n < pages ? (uint32_t)n : FREE_END,
                                      next};
    return next != NULL;
}

/* One slab for all pages, begun where the most of them can stay, which is at a slab's first page if anywhere; where
 * other pages leave no such room, the slabs that are there. */
static bool plan_slabs(compaction *c) {
    const kvc_arena *arena = c->arena;
    const int64_t wanted = whole_runs(c->n * c->page_units);
    int64_t best = -1, most = -1, i = 0;
    for (size_t s = 0, other;; s = other + 1) { /* a stretch between slabs of other pages: s .. other - 1 are ours */
        for (other = s; other < arena->slab_count && arena->slabs[other].page_units == c->page_units;) other++;
        int64_t low, high, unused;
        gap_before(arena, s, &low, &unused);
        gap_before(arena, other, &unused, &high);
        if (most < 0 && low + wanted <= high) best = low, most = 0;
        for (; s < other; s++) {
            const slab *at = &arena->slabs[s];
            int64_t stay = 0;
            for (; i < c->n && c->from[i] < end_of(at); i++) stay += c->from[i] < at->first + c->n * c->page_units;
            if (stay > most && at->first + wanted <= high) best = at->first, most = stay;
        }
        if (other == arena->slab_count) break;
    }
    if (best >= 0) return plan_slab(c, best, c->n);
    int64_t left = c->n;
    for (size_t s = 0; s < arena->slab_count && left > 0; s++) {
        const slab *at = &arena->slabs[s];
        if (at->page_units != c->page_units) continue;
        const int64_t room = at->units / at->page_units, n = left < room ? left : room;
        if (!plan_slab(c, at->first, n)) return false;
        left -= n;
    }
    return true;
}

/* Fills `place`: a page that is in a slot stays, the others take the free ones in order. */
static void plan_places(compaction *c) {
    const slab *to = c->slabs, *last = c->slabs + c->count - 1;
    for (int64_t i = 0; i < c->n; i++) {
        while (to < last && c->from[i] >= end_of(to)) to++;
        const uint32_t offset = c->from[i] - to->first, slot = offset / c->page_units;
        const bool stays = c->from[i] >= to->first && offset % c->page_units == 0 && slot < to->live;
        c->place[i] = stays ? c->from[i] : FREE_END;
        if (stays) to->next[slot] = LIVE;
    }
    to = c->slabs;
    uint32_t page = 0;
    for (int64_t i = 0; i < c->n; i++) {
        if (c->place[i] != FREE_END) continue;
        while (page == to->live || to->next[page] == LIVE)
            if (page++ == to->live) to++, page = 0;
        c->place[i] = to->first + page * c->page_units;
        to->next[page] = LIVE;
    }
    for (to = c->slabs; to < c->slabs + c->count; to++)
        for (page = to->live; page < to->pages; page++) to->next[page] = page + 1 < to->pages ? page + 1 : FREE_END;
}

/* Gives back the whole memory pages of low .. high-1 that are in no slab that is to be. */
static void give_back_rest(const compaction *c, int64_t low, int64_t high) {
    low = whole_runs(low);
    high = high / RUN_UNITS * RUN_UNITS;
    for (const slab *to = c->slabs; to < c->slabs + c->count && low < high; to++) {
        if (end_of(to) <= low) continue;
        if (low < to->first) give_back(c->arena, low, (to->first < high ? to->first : high) - low);
        low = end_of(to);
    }
    if (low < high) give_back(c->arena, low, high - low);
}

/* Pages that lie, and move, one behind the other. */
typedef struct {
    int64_t from, to, units;
} stretch;

static void move_stretch(const compaction *c, stretch *moved) {
    if (moved->units)
        kvc_arena_memory_move(&c->arena->memory, bytes_at(moved->to), bytes_at(moved->from), bytes_at(moved->units));
    moved->units = 0;
}

/* Moves the pages that go up, from the last to the first, or those that go down, from the first to the last. As places
 * are in the order of pages, none is written over before it has moved, and the two directions never meet. Memory is
 * given back on the way, so that on the CPU a move to somewhere else takes no second copy's. */
static void move_pages(const compaction *c, bool up) {
    const uint32_t size = c->page_units;
    uint32_t low = 0, high = 0; /* a part of one slab from which all pages have moved away */
    stretch s = {0, 0, 0};
    for (int64_t k = 0; k < c->n; k++) {
        const int64_t i = up ? c->n - 1 - k : k;
        const uint32_t from = c->from[i], to = c->place[i];
        const bool moves = up ? to > from : to < from;
        const bool joins = moves && low < high && slab_of(c->arena, from) == slab_of(c->arena, low);
        if (!joins || high - low >= GIVE_BACK_UNITS) {
            move_stretch(c, &s);
            give_back_rest(c, low, high);
            low = high = moves ? from : 0;
        }
        if (!moves) continue;
        if (up || low == high) low = from;
        if (!up || high < from + size) high = from + size;
        if (s.units &&
            (up ? from + size != s.from || to + size != s.to : from != s.from + s.units || to != s.to + s.units))
            move_stretch(c, &s);
        if (!s.units || up) s.from = from, s.to = to;
        s.units += size;
    }
    move_stretch(c, &s);
}

/* The slabs that are to be instead of those that were. */
static void replace_slabs(compaction *c) {
    kvc_arena *arena = c->arena;
    size_t kept = 0;
    for (size_t s = 0; s < arena->slab_count; s++) {
        slab *at = &arena->slabs[s];
        if (at->page_units != c->page_units) {
            arena->slabs[kept++] = *at;
            continue;
        }
        kvc_arena_memory_drop(&arena->memory, bytes_at(at->first), bytes_at(at->units));
        give_back_rest(c, at->first, end_of(at));
        free(at->next);
    }
    arena->slab_count = kept;
    for (size_t s = 0, at = 0; s < c->count; s++) {
        while (at < arena->slab_count && arena->slabs[at].first < c->slabs[s].first) at++;
        slab_insert(arena, at, c->slabs[s]);
        kvc_arena_memory_advise(&arena->memory, bytes_at(c->slabs[s].first), bytes_at(c->slabs[s].units));
    }
}

/* Memory of the slabs that are to be, besides that of those that are. */
static kvc_status take_slabs(const compaction *c) {
    kvc_arena_memory *memory = &c->arena->memory;
    KVC_TRY(kvc_arena_memory_begin_moves(memory));
    for (size_t s = 0; s < c->count; s++) {
        const kvc_status status =
            kvc_arena_memory_take(memory, bytes_at(c->slabs[s].first), bytes_at(c->slabs[s].units));
        if (status == KVC_OK) continue;
        while (s-- > 0) kvc_arena_memory_drop(memory, bytes_at(c->slabs[s].first), bytes_at(c->slabs[s].units));
        kvc_arena_memory_trim(memory);
        kvc_arena_memory_end_moves(memory);
        return status;
    }
    return KVC_OK;
}

kvc_status kvc_arena_compact(kvc_arena *arena, int64_t page_bytes, int64_t count, uint32_t *units) {
    KVC_TRY(check_page(page_bytes, count));
    compaction c = {.arena = arena, .page_units = (uint32_t)(page_bytes / KVC_UNIT)};
    size_t slabs = 0;
    for (size_t s = 0; s < arena->slab_count; s++)
        if (arena->slabs[s].page_units == c.page_units) {
            c.n += arena->slabs[s].live;
            slabs++;
        }
    KVC_CHECK(count == c.n, KVC_EINVAL, "arena: units: expected all %lld live pages of %lld bytes, got %lld units",
              (long long)c.n, (long long)page_bytes, (long long)count);
    if (count == 0) return KVC_OK;
    c.from = malloc((size_t)count * sizeof *c.from);
    c.place = malloc((size_t)count * sizeof *c.place);
    c.slabs = malloc(slabs * sizeof *c.slabs);
    kvc_status status = KVC_OK;
    if (!c.from || !c.place || !c.slabs) status = kvc_fail(KVC_ENOMEM, "arena: out of memory");
    if (status == KVC_OK) status = list_live(&c, units);
    if (status == KVC_OK && !plan_slabs(&c)) status = kvc_fail(KVC_ENOMEM, "arena: out of memory");
    if (status == KVC_OK) status = take_slabs(&c);
    if (status != KVC_OK)
        while (c.count > 0) free(c.slabs[--c.count].next);
    if (status == KVC_OK) { /* nothing but the device fails from here on */
        plan_places(&c);
        move_pages(&c, false);
        move_pages(&c, true);
        status = kvc_arena_memory_end_moves(&arena->memory);
        replace_slabs(&c);
        kvc_arena_memory_trim(&arena->memory);
        for (int64_t k = 0; k < count; k++) units[k] = c.place[index_of(&c, units[k])];
    }
    free(c.from);
    free(c.place);
    free(c.slabs);
    return status;
}

void *kvc_arena_base(const kvc_arena *arena) { return arena->memory.space.base; }
int64_t kvc_arena_reserved(const kvc_arena *arena) { return arena->memory.space.reserved; }
int kvc_arena_device(const kvc_arena *arena) { return arena->memory.space.device; }
int64_t kvc_arena_nbytes(const kvc_arena *arena) { return arena->memory.bytes; }
int64_t kvc_arena_used(const kvc_arena *arena) { return arena->used; }

kvc_status kvc_arena_copy(const kvc_arena *arena, int64_t count, const kvc_copy *copies, bool wait, kvc_stream stream) {
    return kvc_arena_memory_copy(&arena->memory, count, copies, wait, stream);
}
