/* arena.h: memory for pages on the CPU. One range of address space is reserved; slabs (runs of pages of one size) are
 * taken from it and, when all their pages are free again, given back to the system, so freed memory is really freed.
 * Live pages stay where they are, except that compact moves those of one size. Not thread-safe: one owner. */
#pragma once
#include "core/core.h"

typedef struct kvc_arena kvc_arena;

/* Reserves `bytes` or, halving, what the system gives; ENOMEM when not even 64 MiB of address space can be had. */
kvc_status kvc_arena_create(int64_t bytes, kvc_arena **out);
void kvc_arena_destroy(kvc_arena *arena);

/* `count` pages of page_bytes (a multiple of KVC_UNIT) each; their units go to `units`. Either all or none.
 * Free pages of slabs are taken first; the rest makes one new slab of just that many pages (rounded up to 4 KiB). */
kvc_status kvc_arena_alloc(kvc_arena *arena, int64_t page_bytes, int64_t count, uint32_t *units);
/* EINVAL, and nothing freed, when a unit is no live page of that size. */
kvc_status kvc_arena_free(kvc_arena *arena, int64_t page_bytes, int64_t count, const uint32_t *units);
/* Moves all live pages of this size together, into ceil(bytes / 4 KiB) memory pages, bits and all; the memory they
 * leave goes back. `units`: every live page of the size, once, in any order; on return where each is now. As many as
 * can stay where they are. Where slabs of other sizes leave no room in one piece, pages fill the slabs there are from
 * the lowest address on. EINVAL for other units, ENOMEM: nothing has changed. */
kvc_status kvc_arena_compact(kvc_arena *arena, int64_t page_bytes, int64_t count, uint32_t *units);

void *kvc_arena_base(const kvc_arena *arena);
int64_t kvc_arena_reserved(const kvc_arena *arena);
int64_t kvc_arena_nbytes(const kvc_arena *arena);                               /* of all slabs: what is allocated */
int64_t kvc_arena_used(const kvc_arena *arena);                                 /* of live pages */
bool kvc_arena_live(const kvc_arena *arena, int64_t page_bytes, uint32_t unit); /* a live page of that size */
