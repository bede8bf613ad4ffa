/* arena.h: memory for pages, on the CPU or a CUDA device. One range of address space is reserved; slabs (runs of pages
 * of one size) are taken from it and, when all their pages are free again, given back, so freed memory is really freed.
 * Live pages stay where they are, except that compact moves those of one size: what growth adds lies beside them, and
 * CUDA graphs captured before stay right. Not thread-safe: one owner.
 *
 * CUDA: bookkeeping is the host's, pages are the device's, mapped by granules of 2 MiB that slabs share. New pages hold
 * anything (on the CPU zeros, or what freed pages of a slab in use held): pack and append write pages in full. alloc
 * waits for nothing and may be called while a stream captures. What is given back may still be in use by kernels, so
 * giving back waits for the device; up to 64 MiB of free granules stay mapped to spare that wait, and free, which gives
 * back the rest, compact and destroy must not be called during a capture. */
#pragma once
#include "core/core.h"
#include "kvcomp/backend.h"

typedef struct kvc_arena kvc_arena;

/* device -1: the CPU; reserves `bytes` (<= 0: 64 GiB) or, halving, what the system gives; ENOMEM when not even 64 MiB
 * of address space can be had. device >= 0: that CUDA device; bytes <= 0: twice its memory. ENODEV: no CUDA; EINVAL: no
 * such device; ENOTSUP: a device without virtual memory management; ENOMEM. */
kvc_status kvc_arena_create(int64_t bytes, int device, kvc_arena **out);
void kvc_arena_destroy(kvc_arena *arena); /* CUDA: waits for the device first */

/* `count` pages of page_bytes (a multiple of KVC_UNIT) each; their units go to `units`. Either all or none.
 * Free pages of slabs are taken first; the rest makes one new slab of just that many pages (rounded up to 4 KiB).
 * ENOMEM, and nothing has changed: addresses or memory are out. */
kvc_status kvc_arena_alloc(kvc_arena *arena, int64_t page_bytes, int64_t count, uint32_t *units);
/* EINVAL, and nothing freed, when a unit is no live page of that size. */
kvc_status kvc_arena_free(kvc_arena *arena, int64_t page_bytes, int64_t count, const uint32_t *units);
/* Moves all live pages of this size together, into ceil(bytes / 4 KiB) memory pages, bits and all; the memory they
 * leave goes back. `units`: every live page of the size, once, in any order; on return where each is now. As many as
 * can stay where they are. Where slabs of other sizes leave no room in one piece, pages fill the slabs there are from
 * the lowest address on. EINVAL for other units, ENOMEM: nothing has changed. CUDA: waits for the device, and the
 * memory pages go to is there before those they leave are given back. */
kvc_status kvc_arena_compact(kvc_arena *arena, int64_t page_bytes, int64_t count, uint32_t *units);

/* Copies to, from or inside pages, one after the other. CUDA: with `wait` any direction, after all work of the device,
 * and done on return; without it work of `stream`, whose memory is the device's. */
kvc_status kvc_arena_copy(const kvc_arena *arena, int64_t count, const kvc_copy *copies, bool wait, kvc_stream stream);

void *kvc_arena_base(const kvc_arena *arena);
int kvc_arena_device(const kvc_arena *arena); /* -1: the CPU */
int64_t kvc_arena_reserved(const kvc_arena *arena);
int64_t kvc_arena_nbytes(const kvc_arena *arena);                               /* of all slabs; CUDA: of granules */
int64_t kvc_arena_used(const kvc_arena *arena);                                 /* of live pages */
bool kvc_arena_live(const kvc_arena *arena, int64_t page_bytes, uint32_t unit); /* a live page of that size */
