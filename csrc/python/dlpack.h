/* dlpack.h: the parts of the DLPack 1.x ABI (dmlc/dlpack, dlpack.h) that reading tensors needs. */
#pragma once
#include <stdint.h>

typedef struct {
    int32_t type, id;
} dl_device;

typedef struct {
    uint8_t code, bits; /* code: 0 int, 1 uint, 2 float, 4 bfloat */
    uint16_t lanes;
} dl_dtype;

typedef struct {
    void *data;
    dl_device device;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* NULL: contiguous (before 1.2) */
    uint64_t byte_offset;
} dl_tensor;

typedef struct {
    uint32_t major, minor;
} dl_version;

typedef struct dl_managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

#define DL_READ_ONLY 1u
typedef struct dl_managed_versioned {
    dl_version version;
    void *context;
    void (*deleter)(struct dl_managed_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_versioned;

/* The exchange table that a tensor type offers as `__dlpack_c_exchange_api__` (DLPack 1.2 and later). */
typedef struct dl_exchange {
    dl_version version;
    struct dl_exchange *previous;
    void *allocate;
    int (*managed_from_object)(void *object, dl_managed_versioned **out);
    void *managed_to_object;
    int (*tensor_from_object)(void *object, dl_tensor *out); /* a borrowed view; may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} dl_exchange;
