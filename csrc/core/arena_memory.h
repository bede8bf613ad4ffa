/* arena_memory.h: where an arena's bytes come from: one range of address space of the CPU or of a CUDA device. Offsets
 * and lengths are whole runs of 4 KiB; a run has memory while a slab holds it.
 *
 * CUDA has memory in granules (2 MiB), so slabs share one where they meet. Granules that a slab needs at once have it
 * together, up to 32 MiB in one mapping, as every mapping costs the host its time; it is given back whole. A granule
 * that no slab touches is idle: up to 64 MiB of them stay, because taking them back waits for the device. */
#pragma once
#include <stdbool.h>

#include "kvcomp/backend.h"

#define KVC_RUN_BYTES 4096

typedef struct {
    uint16_t slabs;         /* that touch it */
    uint16_t place, length; /* in its mapping; of that, in granules */
    bool committed;
    bool fresh; /* committed by the call that is running */
} kvc_granule;

typedef struct {
    kvc_memory space;        /* device -1, granule KVC_RUN_BYTES: the CPU */
    int64_t bytes;           /* with memory */
    const kvc_backend *cuda; /* NULL: the CPU; the rest is CUDA's */
    kvc_granule *granules;
    int64_t count, idle; /* granules; those idle */
    kvc_status moved;    /* the first failure since begin_moves */
} kvc_arena_memory;

kvc_status kvc_arena_memory_open(kvc_arena_memory *memory, int64_t bytes, int device);
void kvc_arena_memory_close(kvc_arena_memory *memory); /* waits for the device */

/* A slab's memory; ENOMEM: nothing has changed. */
kvc_status kvc_arena_memory_take(kvc_arena_memory *memory, int64_t first, int64_t bytes);
/* A slab is gone: its bytes count no longer. CPU: they are there until discarded. CUDA: until trimmed. */
void kvc_arena_memory_drop(kvc_arena_memory *memory, int64_t first, int64_t bytes);
void kvc_arena_memory_discard(kvc_arena_memory *memory, int64_t first, int64_t bytes);
void kvc_arena_memory_trim(kvc_arena_memory *memory);
/* A hint that a slab is there (still): huge memory pages. */
void kvc_arena_memory_advise(const kvc_arena_memory *memory, int64_t first, int64_t bytes);

/* Moves inside the memory, as memmove: between begin, which may fail with nothing changed, and end, which waits for
 * them and says what failed. */
kvc_status kvc_arena_memory_begin_moves(kvc_arena_memory *memory);
void kvc_arena_memory_move(kvc_arena_memory *memory, int64_t to, int64_t from, int64_t bytes);
kvc_status kvc_arena_memory_end_moves(kvc_arena_memory *memory);

/* Copies to, from or inside the memory, as memory_copy of backend.h; the CPU's are done on return. */
kvc_status kvc_arena_memory_copy(const kvc_arena_memory *memory, int64_t count, const kvc_copy *copies, bool wait,
                                 kvc_stream stream);
