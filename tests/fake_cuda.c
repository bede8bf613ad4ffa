/* fake_cuda.c: a libkvcomp_cuda.so without CUDA, for tests of an arena's bookkeeping: device memory is the CPU's, in
 * granules of 64 KiB, MEMORY bytes of them at most. What a driver would refuse or a kernel would trip over aborts. */
#include "kvcomp/backend.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define GRANULE ((int64_t)64 << 10)
#define MOST (1 << 16)
#define EXPECT(condition) ((condition) ? (void)0 : (fprintf(stderr, "fake CUDA: %s\n", #condition), abort()))

static char sentence[256];
static char committed[MOST + 1]; /* 1: a mapping begins, 2: it goes on */
static int64_t taken;

static int device_count(const char **why) {
    *why = NULL;
    return 1;
}
static int version(void) { return 13000; }
static const char *device_name(int device, int *capability) {
    *capability = 90 + device;
    return "fake";
}
static const char *error(void) { return sentence; }

static kvc_status reserve(int device, int64_t bytes, kvc_memory *out) {
    if (device != 0) {
        snprintf(sentence, sizeof sentence, "arena: device: expected a CUDA device in 0..0, got %d", device);
        return KVC_EINVAL;
    }
    if (bytes <= 0) bytes = 2 * (int64_t)MEMORY;
    out->reserved = (bytes + GRANULE - 1) / GRANULE * GRANULE;
    out->granule = GRANULE;
    out->device = device;
    EXPECT(out->reserved / GRANULE < MOST);
    char *base = mmap(NULL, (size_t)(out->reserved + 2 * GRANULE), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(base != MAP_FAILED);
    out->base = base + (GRANULE - (intptr_t)base % GRANULE) % GRANULE;
    memset(committed, 0, sizeof committed);
    taken = 0;
    return KVC_OK;
}

static kvc_status commit(const kvc_memory *memory, int64_t first, int64_t bytes, int64_t each) {
    EXPECT(each % GRANULE == 0 && each > 0);
    EXPECT(first % GRANULE == 0 && bytes % GRANULE == 0 && bytes > 0 && first + bytes <= memory->reserved + GRANULE);
    if (taken + bytes > MEMORY) {
        snprintf(sentence, sizeof sentence, "arena: expected %lld bytes of free memory on cuda:0, got %lld of %lld",
                 (long long)bytes, (long long)(MEMORY - taken), (long long)MEMORY);
        return KVC_ENOMEM;
    }
    for (int64_t i = first / GRANULE; i < (first + bytes) / GRANULE; i++) {
        EXPECT(!committed[i]);
        committed[i] = (i * GRANULE - first) % each ? 2 : 1;
    }
    taken += bytes;
    EXPECT(mprotect(memory->base + first, (size_t)bytes, PROT_READ | PROT_WRITE) == 0);
    memset(memory->base + first, 0xA5, (size_t)bytes);
    return KVC_OK;
}

static kvc_status release(const kvc_memory *memory, int64_t first, int64_t bytes) {
    if (getenv("FAKE_CAPTURE")) return KVC_ECUDA;
    EXPECT(committed[(first + bytes) / GRANULE] != 2);
    for (int64_t i = first / GRANULE; i < (first + bytes) / GRANULE; i++) {
        EXPECT(committed[i] == (i * GRANULE == first ? 1 : 2));
        committed[i] = 0;
    }
    taken -= bytes;
    EXPECT(mprotect(memory->base + first, (size_t)bytes, PROT_NONE) == 0);
    return KVC_OK;
}

static kvc_status unreserve(const kvc_memory *memory) {
    EXPECT(taken == 0);
    return munmap(memory->base, (size_t)(memory->reserved + GRANULE)) == 0 ? KVC_OK : KVC_ECUDA;
}

static kvc_status copy(const kvc_memory *memory, int64_t count, const kvc_copy *copies, int32_t wait,
                       kvc_stream stream) {
    (void)memory, (void)wait, (void)stream;
    for (const kvc_copy *c = copies; c < copies + count; c++) {
        EXPECT((char *)c->to + c->bytes <= (char *)c->from || (char *)c->from + c->bytes <= (char *)c->to);
        memcpy(c->to, c->from, (size_t)c->bytes);
    }
    return KVC_OK;
}

const kvc_backend *kvc_cuda_backend(void) {
    static const kvc_backend table = {.api_version = KVC_BACKEND_API,
                                      .format_version = KVC_FORMAT_VERSION,
                                      .architectures = "fake",
                                      .device_count = device_count,
                                      .runtime_version = version,
                                      .driver_version = version,
                                      .device_name = device_name,
                                      .error = error,
                                      .memory_reserve = reserve,
                                      .memory_commit = commit,
                                      .memory_release = release,
                                      .memory_unreserve = unreserve,
                                      .memory_copy = copy};
    return &table;
}
