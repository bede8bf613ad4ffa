/* binding.h: how Python arguments become contract structs. One frame per call: it borrows every tensor, checks devices
 * and overlaps in one place, and lets everything go at the end.
 *
 *     kvc_frame frame = {.op = "score"};
 *     kvc_score_args args = {0};
 *     if (frame_tensor(&frame, argv[0], "importance", FRAME_OUT, &args.importance) || ...) goto done;
 *     if (frame_check(&frame)) goto done;                 // one device, outputs overlap nothing
 *     FRAME_DISPATCH(&frame, score);                      // without the GIL; status to exception
 *   done:
 *     return frame_return(&frame);                        // NULL with an exception set, or None
 */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "core/core.h"
#include "kvcomp/backend.h"

#define FRAME_MAX 16
enum {
    FRAME_IN = 0,
    FRAME_OUT = 1,
    FRAME_OPTIONAL = 2,
    FRAME_INOUT = 5,
    FRAME_CUDA = 8,     /* CUDA tensors are welcome */
    FRAME_ANYWHERE = 16 /* and may lie elsewhere than the others */
};

typedef struct {
    PyObject *object; /* keeps the memory alive */
    void *managed;    /* DLManagedTensor or DLManagedTensorVersioned to delete, by `versioned` */
    int versioned;
} kvc_held;

typedef struct {
    const char *op;
    int count;
    kvc_held held[FRAME_MAX];
    kvc_tensor *tensors[FRAME_MAX];
    const char *names[FRAME_MAX];
    int modes[FRAME_MAX];
    void *stream;  /* the current one of the CUDA tensors' library; NULL on the CPU */
    bool streamed; /* it has been looked up */
    bool failed;
} kvc_frame;

/* Each returns 0, or -1 with a Python exception set (and frame->failed). None for an optional tensor leaves it zero. */
int frame_tensor(kvc_frame *frame, PyObject *object, const char *name, int mode, kvc_tensor *out);
int frame_int(kvc_frame *frame, PyObject *object, const char *name, int64_t low, int64_t high, int64_t *out);
int frame_int32(kvc_frame *frame, PyObject *object, const char *name, int64_t low, int64_t high, int32_t *out);
int frame_double(kvc_frame *frame, PyObject *object, const char *name, double low, double high, double *out);
int frame_float(kvc_frame *frame, PyObject *object, const char *name, double low, double high, float *out);
int frame_layout(kvc_frame *frame, PyObject *object, kvc_layout *out); /* five ints, kvc_layout */
int frame_check(kvc_frame *frame);
int frame_count(kvc_frame *frame, Py_ssize_t got, Py_ssize_t want); /* number of positional arguments */
kvc_device frame_device(const kvc_frame *frame);
PyObject *frame_return(kvc_frame *frame);

#define FRAME_RUN(frame, call)                        \
    do {                                              \
        kvc_status status_;                           \
        Py_BEGIN_ALLOW_THREADS status_ = (call);      \
        Py_END_ALLOW_THREADS if (status_ != KVC_OK) { \
            raise_status(status_);                    \
            (frame)->failed = true;                   \
        }                                             \
    } while (0)

/* As FRAME_RUN for an operation of both devices, whose arguments are `args`: kvc_<operation>_cpu, or the CUDA library's
 * on the tensors' stream. A CUDA sentence is the library's own. */
#define FRAME_DISPATCH(frame, operation)                                                            \
    do {                                                                                            \
        if (frame_device(frame) == KVC_CPU) {                                                       \
            FRAME_RUN(frame, kvc_##operation##_cpu(&args, NULL));                                   \
            break;                                                                                  \
        }                                                                                           \
        const kvc_backend *backend_ = frame_backend(frame);                                         \
        if (backend_) FRAME_RUN_CUDA(frame, backend_, backend_->operation(&args, (frame)->stream)); \
    } while (0)
#define FRAME_RUN_CUDA(frame, backend, call)          \
    do {                                              \
        kvc_status status_;                           \
        Py_BEGIN_ALLOW_THREADS status_ = (call);      \
        Py_END_ALLOW_THREADS if (status_ != KVC_OK) { \
            raise_text(status_, (backend)->error());  \
            (frame)->failed = true;                   \
        }                                             \
    } while (0)

/* The CUDA library's table, or NULL with an exception that says why there is none. */
const kvc_backend *frame_backend(kvc_frame *frame);

/* raise.c: the only map from kvc_status to exceptions; takes kvc_last_error(). Returns NULL. */
PyObject *raise_status(kvc_status status);
PyObject *raise_text(kvc_status status, const char *text);
int raise_init(PyObject *module);

/* numpy.c: 0 when `object` was an ndarray and is now `out`; 1 when it is not one; -1 with an exception. */
int numpy_import(void);
int numpy_tensor(kvc_frame *frame, PyObject *object, const char *name, kvc_tensor *out);

/* Method tables of the module, one a file. */
extern PyMethodDef ops_cache_methods[];  /* ops_cache.c: pack .. attend, rotate, sizes of the format */
extern PyMethodDef ops_policy_methods[]; /* ops_policy.c: score .. plan, shrink */
extern PyMethodDef ops_bsr_methods[];    /* ops_bsr.c: block-sparse rows */
extern PyMethodDef ops_w4_methods[];     /* ops_w4.c: w4_pack .. w4_matmul */
extern PyMethodDef module_methods[];     /* module.c: backend, threads, version */
/* A new uint32 array of n elements and its memory. */
PyObject *numpy_uint32(Py_ssize_t n, uint32_t **data);
int arena_init(PyObject *module); /* arena_type.c: the type Arena */
/* The memory of an Arena object as a uint8 tensor, or 1 when it is no Arena. */
int arena_tensor(PyObject *object, kvc_tensor *out);
