/* kvcomp.h: what every operation's contract shares: status, tensor views, streams.
 *
 * An operation X is declared once, in X.h, as a function type `kvc_X_fn`; the CPU and the CUDA definition are both
 * of that type, so they cannot drift. Operations never allocate, never synchronize and never print; memory they need
 * beyond their arguments is a `workspace` whose size a pure function states.
 *
 * Letters in shapes: b sequences, h KV heads, q new tokens of a call, s tokens, d head dimension, n lists (= b*h,
 * list index = sequence * heads + head). */
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVC_VERSION "0.1.0"
#define KVC_MAX_DIMS 5

typedef enum {
    KVC_OK = 0,
    KVC_EINVAL,  /* a value out of its range                -> ValueError */
    KVC_ESHAPE,  /* shapes that do not fit                   -> ValueError */
    KVC_EDTYPE,  /* an element type that is not taken        -> TypeError */
    KVC_EDEVICE, /* a tensor on the wrong device             -> ValueError */
    KVC_ENOMEM,  /* host or device memory exhausted          -> MemoryError */
    KVC_ENOTSUP, /* understood, and not done (yet)           -> NotImplementedError */
    KVC_ENODEV,  /* CUDA asked for and not there             -> kvcomp.CudaError */
    KVC_ECUDA,   /* a CUDA call failed                       -> kvcomp.CudaError */
    KVC_EBUDGET  /* a byte budget below the smallest plan    -> kvcomp.BudgetError (a ValueError) */
} kvc_status;

typedef enum {
    KVC_FLOAT32 = 0,
    KVC_FLOAT16,
    KVC_BFLOAT16,
    KVC_INT32,
    KVC_INT64,
    KVC_UINT8,
    KVC_UINT32,
    KVC_UINT64,
    KVC_FLOAT64
} kvc_dtype;

typedef enum { KVC_CPU = 1, KVC_CUDA = 2 } kvc_device; /* DLPack's numbers */

/* A borrowed view of somebody else's memory. Strides count elements. data == NULL: an optional argument left out. */
typedef struct {
    void *data;
    int32_t dtype; /* kvc_dtype */
    int32_t ndim;  /* 0..KVC_MAX_DIMS */
    int64_t shape[KVC_MAX_DIMS];
    int64_t strides[KVC_MAX_DIMS];
    int32_t device;    /* kvc_device */
    int32_t device_id; /* CUDA ordinal, 0 on the CPU */
    int32_t read_only; /* 1 where the exporting protocol says so */
} kvc_tensor;

typedef void *kvc_stream; /* a cudaStream_t; ignored by the CPU */

/* The sentence of the last failure on this thread: "operation: argument: expected ..., got ...". */
const char *kvc_last_error(void);

#ifdef __cplusplus
}
#endif
