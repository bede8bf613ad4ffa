/* core.h: what the CPU definitions share inside the library: errors, tensor checks, threads. */
#pragma once
#include <stdbool.h>

#include "kvcomp/format.h"
#include "kvcomp/kvcomp.h"

/* Sets this thread's sentence, "operation: argument: ...", and returns `status`. */
kvc_status kvc_fail(kvc_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define KVC_CHECK(condition, status, ...)                       \
    do {                                                        \
        if (!(condition)) return kvc_fail(status, __VA_ARGS__); \
    } while (0)
#define KVC_TRY(call)                          \
    do {                                       \
        const kvc_status status_ = (call);     \
        if (status_ != KVC_OK) return status_; \
    } while (0)

/* "(1, 8, 4096, 96)" in a buffer of this thread, valid until the fourth later call. */
const char *kvc_shape_text(const kvc_tensor *tensor);
const char *kvc_dtype_name(int dtype);
int64_t kvc_dtype_size(int dtype);
int64_t kvc_elements(const kvc_tensor *tensor);
bool kvc_is_contiguous(const kvc_tensor *tensor);
static inline int64_t kvc_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); } /* a >= 0, b > 0 */
static inline bool kvc_given(const kvc_tensor *tensor) { return tensor->data != NULL || tensor->ndim > 0; }

/* Each fails with one sentence naming operation and argument. `shape` entries of -1 match anything. */
kvc_status kvc_expect_shape(const char *op, const char *name, const kvc_tensor *tensor, int ndim, const int64_t *shape);
kvc_status kvc_expect_dtype(const char *op, const char *name, const kvc_tensor *tensor, int dtype);
kvc_status kvc_expect_float(const char *op, const char *name,
                            const kvc_tensor *tensor); /* float32, float16, bfloat16 */
kvc_status kvc_expect_contiguous(const char *op, const char *name, const kvc_tensor *tensor);
kvc_status kvc_expect_rows(const char *op, const char *name, const kvc_tensor *tensor); /* last axis contiguous */
kvc_status kvc_expect_layout(const char *op, const kvc_layout *layout);
kvc_status kvc_expect_workspace(const char *op, const kvc_tensor *workspace, int64_t bytes);
/* Memory of pages: (bytes,) uint8, aligned for the widest loads. */
kvc_status kvc_expect_arena(const char *op, const kvc_tensor *arena);
/* A contiguous tensor of one dtype and shape: the three checks above in one. */
kvc_status kvc_expect_array(const char *op, const char *name, const kvc_tensor *tensor, int dtype, int ndim,
                            const int64_t *shape);

/* 16-bit floats, exact, nearest even; saturating versions clamp to the largest finite value. */
float kvc_half_to_float(uint16_t bits, int dtype);
uint16_t kvc_float_to_half(float value, int dtype);

/* Rows of n contiguous elements to and from float32. */
void kvc_load_row(float *out, const void *row, int dtype, int64_t n);
void kvc_store_row(void *row, const float *in, int dtype, int64_t n);
static inline char *kvc_at(const kvc_tensor *tensor, int64_t i, int64_t j, int64_t k) {
    return (char *)tensor->data +
           kvc_dtype_size(tensor->dtype) * (i * tensor->strides[0] + j * tensor->strides[1] + k * tensor->strides[2]);
}
/* True when every element of a row of n, or of rows (b,h,s,d), is finite. */
bool kvc_row_finite(const void *row, int dtype, int64_t n);
bool kvc_all_finite(const kvc_tensor *tensor);

/* Runs body(context, i) for i in 0..n-1 on up to `threads` threads (0: kvc_threads()), the caller's included; returns
 * when all are done. Survives fork (the child starts a pool of its own). Bodies must not fail or call Python. */
typedef void kvc_body(void *context, int64_t i);
void kvc_parallel(int64_t n, int threads, kvc_body *body, void *context);
int kvc_threads(void);             /* KVCOMP_NUM_THREADS, else the CPUs this process may use */
void kvc_set_threads(int threads); /* >= 1 */
