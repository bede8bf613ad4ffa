/* backend.h: the CUDA backend's table: what libkvcomp_cuda.so hands over through its one exported symbol,
 * kvc_cuda_backend(). Operations run on the caller's stream; they neither allocate nor synchronize, so that a CUDA
 * graph can capture them. */
#pragma once
#include "append.h"
#include "attend.h"
#include "bsr.h"
#include "divide.h"
#include "pack.h"
#include "score.h"
#include "select.h"
#include "w4.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVC_BACKEND_API 4

#define KVC_MEMORY_MOST (((int64_t)UINT32_MAX * KVC_UNIT) >> 21 << 21) /* bytes that units of pages can address */

/* Address space of a device, made of granules that have memory behind them or not. */
typedef struct {
    char *base;
    int64_t reserved, granule; /* bytes; whole granules */
    int32_t device;            /* CUDA ordinal */
} kvc_memory;

typedef struct {
    void *to;
    const void *from;
    int64_t bytes;
} kvc_copy;

typedef struct {
    uint32_t api_version;                  /* KVC_BACKEND_API of the library's build */
    uint32_t format_version;               /* KVC_FORMAT_VERSION of the library's build */
    const char *architectures;             /* "90a" or "80,89,90a,100a,ptx80": what the binary holds */
    int (*device_count)(const char **why); /* >= 0; 0 with a sentence in *why when CUDA cannot be used */
    int (*runtime_version)(void);          /* CUDART_VERSION of the build */
    int (*driver_version)(void);           /* 0 without a driver */
    const char *(*device_name)(int device, int *compute_capability);
    const char *(*error)(void); /* the last failure's sentence on this thread */

    kvc_pack_fn *pack;
    kvc_unpack_fn *unpack;
    kvc_append_fn *append;
    kvc_attend_fn *attend;
    int64_t (*attend_workspace)(int64_t n, int64_t c, int64_t group, int64_t q, int32_t head_dim, int64_t mass_tokens);
    kvc_divide_fn *divide;
    int64_t (*divide_words)(int64_t n, int device);
    kvc_score_fn *score;
    kvc_norms_fn *norms;
    kvc_accumulate_fn *accumulate;
    kvc_select_fn *select;
    kvc_bsr_matmul_fn *bsr_matmul;
    kvc_bsr_sddmm_fn *bsr_sddmm;

    /* Memory of an arena: `bytes` of address space, rounded up, at most KVC_MEMORY_MOST, and a spare granule behind it;
     * bytes <= 0: twice the device's memory, as holes between slabs cost addresses only. ENODEV: no CUDA;
     * EINVAL: no such device; ENOTSUP: a device without virtual memory management; ENOMEM. */
    kvc_status (*memory_reserve)(int device, int64_t bytes, kvc_memory *out);
    /* Puts memory behind whole granules that have none, in mappings of `each` bytes, whole granules, and a last one of
     * what is left; what it holds is not defined. ENOMEM: nothing has changed. Waits for nothing, and may be called
     * while a stream captures. */
    kvc_status (*memory_commit)(const kvc_memory *memory, int64_t first, int64_t bytes, int64_t each);
    /* Waits for the device and takes one whole mapping back; where the wait fails, nothing has changed. */
    kvc_status (*memory_release)(const kvc_memory *memory, int64_t first, int64_t bytes);
    kvc_status (*memory_unreserve)(const kvc_memory *memory); /* its memory is released before */
    /* Copies one after the other, in any direction, each to another place than it comes from. `wait`: for the device
     * before and for the copies after; otherwise they are work of the stream. */
    kvc_status (*memory_copy)(const kvc_memory *memory, int64_t count, const kvc_copy *copies, int32_t wait,
                              kvc_stream stream);

    kvc_w4_matmul_fn *w4_matmul;
    int64_t (*w4_workspace)(int64_t m, int64_t n, int64_t k);
} kvc_backend;
typedef const kvc_backend *kvc_backend_fn(void);

/* The CUDA backend, loaded on the first call from `directory` (the folder of the extension module); NULL with a
 * sentence in *why when there is none. Thread-safe; never initializes CUDA by itself. */
const kvc_backend *kvc_cuda(const char **why);
void kvc_cuda_set_directory(const char *directory);

#ifdef __cplusplus
}
#endif
