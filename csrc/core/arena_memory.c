/* arena_memory.c: see arena_memory.h. */
#include "core/arena_memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/core.h"

#define DEFAULT_BYTES ((int64_t)64 << 30)
#define HUGE_BYTES ((uintptr_t)2 << 20)
#define IDLE_BYTES ((int64_t)64 << 20)
#define MAPPING_BYTES ((int64_t)32 << 20) /* at most */

/* A failure of the CUDA library, whose sentence is its own. */
static kvc_status cuda_failure(const kvc_arena_memory *memory, kvc_status status) {
    return status == KVC_OK ? KVC_OK : kvc_fail(status, "%s", memory->cuda->error());
}

/* ---- the CPU */

static kvc_status open_cpu(kvc_arena_memory *memory, int64_t bytes) {
    if (bytes <= 0) bytes = DEFAULT_BYTES;
    bytes = bytes > KVC_MEMORY_MOST ? KVC_MEMORY_MOST : kvc_ceil_div(bytes, KVC_RUN_BYTES) * KVC_RUN_BYTES;
    for (;; bytes = bytes / 2 / KVC_RUN_BYTES * KVC_RUN_BYTES) {
        void *base =
            mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base != MAP_FAILED) {
            memory->space = (kvc_memory){base, bytes, KVC_RUN_BYTES, -1};
            return KVC_OK;
        }
        KVC_CHECK(bytes >= 128 << 20, KVC_ENOMEM, "arena: expected 64 MiB of address space at least, got none");
    }
}

/* Huge memory pages for the whole ones inside a slab: attention reads gigabytes in order; none is held beyond it.
 * MADV_NOHUGEPAGE takes that back. */
static void advise(const kvc_arena_memory *memory, int64_t first, int64_t bytes, int advice) {
    const uintptr_t base = (uintptr_t)memory->space.base + (uintptr_t)first;
    const uintptr_t begin = (base + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1);
    const uintptr_t end = (base + (uintptr_t)bytes) & ~(HUGE_BYTES - 1);
    if (begin < end) madvise((void *)begin, end - begin, advice); /* a hint: failing is as good as not asking */
}

void kvc_arena_memory_advise(const kvc_arena_memory *memory, int64_t first, int64_t bytes) {
    if (!memory->cuda) advise(memory, first, bytes, MADV_HUGEPAGE);
}

void kvc_arena_memory_discard(kvc_arena_memory *memory, int64_t first, int64_t bytes) {
    if (!memory->cuda) madvise(memory->space.base + first, (size_t)bytes, MADV_DONTNEED);
}

/* ---- CUDA */

static kvc_status open_cuda(kvc_arena_memory *memory, int64_t bytes, int device) {
    const char *why = NULL;
    memory->cuda = kvc_cuda(&why);
    KVC_CHECK(memory->cuda, KVC_ENODEV, "arena: expected CUDA to be usable: %s", why);
    KVC_TRY(cuda_failure(memory, memory->cuda->memory_reserve(device, bytes, &memory->space)));
    memory->count = memory->space.reserved / memory->space.granule;
    memory->granules = calloc((size_t)memory->count, sizeof *memory->granules);
    if (memory->granules) return KVC_OK;
    memory->cuda->memory_unreserve(&memory->space);
    return kvc_fail(KVC_ENOMEM, "arena: out of memory");
}

static bool is_idle(const kvc_arena_memory *memory, int64_t first, int64_t length) {
    for (int64_t i = first; i < first + length; i++)
        if (memory->granules[i].slabs > 0) return false;
    return true;
}

/* A mapping, which begins at granule `first`. */
static bool release(kvc_arena_memory *memory, int64_t first) {
    const int64_t granule = memory->space.granule, length = memory->granules[first].length;
    if (memory->cuda->memory_release(&memory->space, first * granule, length * granule) != KVC_OK) return false;
    for (int64_t i = first; i < first + length; i++) memory->granules[i].committed = false;
    memory->bytes -= length * granule;
    return true;
}

/* Takes mappings of idle granules back, those of the highest addresses first, until at most `keep` granules are left,
 * or those that share a mapping with others. Where the device cannot be waited for, while a stream captures, they stay
 * idle. */
static void release_idle(kvc_arena_memory *memory, int64_t keep) {
    for (int64_t end = memory->count, at; memory->idle > keep && end > 0; end = at) {
        at = end - 1;
        if (!memory->granules[at].committed) continue;
        at -= memory->granules[at].place;
        const int64_t length = memory->granules[at].length;
        if (!is_idle(memory, at, length)) continue;
        if (!release(memory, at)) return;
        memory->idle -= length;
    }
}

static void drop_granules(kvc_arena_memory *memory, int64_t low, int64_t high) {
    for (int64_t i = low; i < high; i++) memory->idle += --memory->granules[i].slabs == 0;
}

/* Undoes a commit of runs of fresh granules that came to an end. */
static void release_fresh(kvc_arena_memory *memory, int64_t low, int64_t high) {
    for (int64_t i = low, next; i < high; i = next) {
        const kvc_granule *granule = &memory->granules[i];
        next = i + (granule->fresh ? granule->length : 1);
        if (!granule->fresh) continue;
        if (!release(memory, i)) memory->idle += next - i;
        for (int64_t k = i; k < next; k++) memory->granules[k].fresh = false;
    }
}

static kvc_status take_granules(kvc_arena_memory *memory, int64_t low, int64_t high) {
    const int64_t granule = memory->space.granule, most = MAPPING_BYTES > granule ? MAPPING_BYTES / granule : 1;
    kvc_granule *granules = memory->granules;
    for (int64_t at = low, end; at < high; at = end) {
        end = at + 1;
        if (granules[at].committed) continue;
        while (end < high && !granules[end].committed) end++;
        const kvc_status status =
            memory->cuda->memory_commit(&memory->space, at * granule, (end - at) * granule, most * granule);
        if (status != KVC_OK) {
            cuda_failure(memory, status);
            release_fresh(memory, low, at);
            return status;
        }
        memory->bytes += (end - at) * granule;
        for (int64_t i = at; i < end; i++) {
            const int64_t place = (i - at) % most, rest = end - (i - place);
            granules[i] = (kvc_granule){0, (uint16_t)place, (uint16_t)(rest < most ? rest : most), true, true};
        }
    }
    for (int64_t i = low; i < high; i++) {
        memory->idle -= granules[i].slabs++ == 0 && !granules[i].fresh;
        granules[i].fresh = false;
    }
    return KVC_OK;
}

/* ---- both */

kvc_status kvc_arena_memory_open(kvc_arena_memory *memory, int64_t bytes, int device) {
    *memory = (kvc_arena_memory){0};
    return device < 0 ? open_cpu(memory, bytes) : open_cuda(memory, bytes, device);
}

void kvc_arena_memory_close(kvc_arena_memory *memory) {
    if (!memory->cuda) {
        munmap(memory->space.base, (size_t)memory->space.reserved);
        return;
    }
    memory->idle = 0;
    for (int64_t i = 0; i < memory->count; i++) {
        memory->granules[i].slabs = 0;
        memory->idle += memory->granules[i].committed;
    }
    release_idle(memory, 0);
    if (memory->idle == 0) memory->cuda->memory_unreserve(&memory->space); /* else a device that failed keeps it */
    free(memory->granules);
}

kvc_status kvc_arena_memory_take(kvc_arena_memory *memory, int64_t first, int64_t bytes) {
    if (memory->cuda)
        return take_granules(memory, first / memory->space.granule, kvc_ceil_div(first + bytes, memory->space.granule));
    memory->bytes += bytes;
    advise(memory, first, bytes, MADV_HUGEPAGE);
    return KVC_OK;
}

void kvc_arena_memory_drop(kvc_arena_memory *memory, int64_t first, int64_t bytes) {
    if (memory->cuda) {
        drop_granules(memory, first / memory->space.granule, kvc_ceil_div(first + bytes, memory->space.granule));
        return;
    }
    memory->bytes -= bytes;
    advise(memory, first, bytes, MADV_NOHUGEPAGE);
}

/* Down to half of what may stay: the wait is paid once for many. */
void kvc_arena_memory_trim(kvc_arena_memory *memory) {
    if (memory->cuda && memory->idle * memory->space.granule > IDLE_BYTES)
        release_idle(memory, IDLE_BYTES / 2 / memory->space.granule);
}

/* The spare granule behind the reserved range holds what moves by less than its length. */
kvc_status kvc_arena_memory_begin_moves(kvc_arena_memory *memory) {
    if (!memory->cuda) return KVC_OK;
    const int64_t granule = memory->space.granule;
    KVC_TRY(
        cuda_failure(memory, memory->cuda->memory_commit(&memory->space, memory->space.reserved, granule, granule)));
    memory->moved = kvc_arena_memory_copy(memory, 0, NULL, true, NULL);
    return memory->moved == KVC_OK ? KVC_OK : kvc_arena_memory_end_moves(memory);
}

void kvc_arena_memory_move(kvc_arena_memory *memory, int64_t to, int64_t from, int64_t bytes) {
    char *base = memory->space.base;
    if (!memory->cuda) {
        memmove(base + to, base + from, (size_t)bytes);
        return;
    }
    const int64_t distance = to > from ? to - from : from - to;
    const int64_t step = distance >= bytes ? bytes : memory->space.granule;
    char *spare = base + memory->space.reserved;
    for (int64_t done = 0; done < bytes && memory->moved == KVC_OK; done += step) {
        const int64_t n = bytes - done < step ? bytes - done : step;
        const int64_t at = to < from ? done : bytes - done - n; /* down: from the first byte on; up: from the last */
        const kvc_copy two[2] = {{spare, base + from + at, n}, {base + to + at, spare, n}};
        const kvc_copy one = {base + to + at, base + from + at, n};
        memory->moved = distance >= bytes ? kvc_arena_memory_copy(memory, 1, &one, false, NULL)
                                          : kvc_arena_memory_copy(memory, 2, two, false, NULL);
    }
}

kvc_status kvc_arena_memory_end_moves(kvc_arena_memory *memory) {
    if (!memory->cuda) return KVC_OK;
    if (memory->moved == KVC_OK) memory->moved = kvc_arena_memory_copy(memory, 0, NULL, true, NULL);
    memory->cuda->memory_release(&memory->space, memory->space.reserved, memory->space.granule);
    return memory->moved;
}

kvc_status kvc_arena_memory_copy(const kvc_arena_memory *memory, int64_t count, const kvc_copy *copies, bool wait,
                                 kvc_stream stream) {
    if (memory->cuda)
        return cuda_failure(memory, memory->cuda->memory_copy(&memory->space, count, copies, wait, stream));
    for (int64_t i = 0; i < count; i++) memmove(copies[i].to, copies[i].from, (size_t)copies[i].bytes);
    return KVC_OK;
}
