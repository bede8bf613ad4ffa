/* tensor.c: checks on tensor views, and rows of floats in and out of them. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/core.h"

static const struct {
    const char *name;
    int64_t size;
} dtypes[] = {
    [KVC_FLOAT32] = {"float32", 4}, [KVC_FLOAT16] = {"float16", 2}, [KVC_BFLOAT16] = {"bfloat16", 2},
    [KVC_INT32] = {"int32", 4},     [KVC_INT64] = {"int64", 8},     [KVC_UINT8] = {"uint8", 1},
    [KVC_UINT32] = {"uint32", 4},   [KVC_UINT64] = {"uint64", 8},   [KVC_FLOAT64] = {"float64", 8},
};

const char *kvc_dtype_name(int dtype) { return dtypes[dtype].name; }
int64_t kvc_dtype_size(int dtype) { return dtypes[dtype].size; }

int64_t kvc_elements(const kvc_tensor *tensor) {
    int64_t n = 1;
    for (int i = 0; i < tensor->ndim; i++) n *= tensor->shape[i];
    return n;
}

bool kvc_is_contiguous(const kvc_tensor *tensor) {
    int64_t expected = 1;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != expected) return kvc_elements(tensor) == 0;
        expected *= tensor->shape[i];
    }
    return true;
}

const char *kvc_shape_text(const kvc_tensor *tensor) {
    static _Thread_local char buffers[4][160];
    static _Thread_local unsigned next;
    char *text = buffers[next++ % 4];
    size_t used = (size_t)snprintf(text, sizeof buffers[0], "(");
    for (int i = 0; i < tensor->ndim; i++)
        used +=
            (size_t)snprintf(text + used, sizeof buffers[0] - used, i ? ", %lld" : "%lld", (long long)tensor->shape[i]);
    snprintf(text + used, sizeof buffers[0] - used, tensor->ndim == 1 ? ",)" : ")");
    return text;
}

kvc_status kvc_expect_shape(const char *op, const char *name, const kvc_tensor *tensor, int ndim,
                            const int64_t *shape) {
    bool same = tensor->ndim == ndim;
    for (int i = 0; same && i < ndim; i++) same = shape[i] < 0 || tensor->shape[i] == shape[i];
    if (same) return KVC_OK;
    char expected[160];
    size_t used = (size_t)snprintf(expected, sizeof expected, "(");
    for (int i = 0; i < ndim; i++)
        used += shape[i] < 0 ? (size_t)snprintf(expected + used, sizeof expected - used, i ? ", *" : "*")
                             : (size_t)snprintf(expected + used, sizeof expected - used, i ? ", %lld" : "%lld",
                                                (long long)shape[i]);
    snprintf(expected + used, sizeof expected - used, ndim == 1 ? ",)" : ")");
    return kvc_fail(KVC_ESHAPE, "%s: %s: expected shape %s, got %s", op, name, expected, kvc_shape_text(tensor));
}

kvc_status kvc_expect_dtype(const char *op, const char *name, const kvc_tensor *tensor, int dtype) {
    KVC_CHECK(tensor->dtype == dtype, KVC_EDTYPE, "%s: %s: expected %s, got %s", op, name, kvc_dtype_name(dtype),
              kvc_dtype_name(tensor->dtype));
    return KVC_OK;
}

kvc_status kvc_expect_float(const char *op, const char *name, const kvc_tensor *tensor) {
    KVC_CHECK(tensor->dtype == KVC_FLOAT32 || tensor->dtype == KVC_FLOAT16 || tensor->dtype == KVC_BFLOAT16, KVC_EDTYPE,
              "%s: %s: expected float32, float16 or bfloat16, got %s", op, name, kvc_dtype_name(tensor->dtype));
    return KVC_OK;
}

kvc_status kvc_expect_contiguous(const char *op, const char *name, const kvc_tensor *tensor) {
    KVC_CHECK(kvc_is_contiguous(tensor), KVC_EINVAL, "%s: %s: expected a contiguous array, got strides over shape %s",
              op, name, kvc_shape_text(tensor));
    return KVC_OK;
}

kvc_status kvc_expect_rows(const char *op, const char *name, const kvc_tensor *tensor) {
    const int last = tensor->ndim - 1;
    const int64_t stride = last < 0 || tensor->shape[last] <= 1 ? 1 : tensor->strides[last];
    /* A new empty NumPy array has strides of 0. */
    KVC_CHECK(stride == 1 || (stride == 0 && kvc_elements(tensor) == 0), KVC_EINVAL,
              "%s: %s: expected contiguous channels (last stride 1), got last stride %lld", op, name,
              (long long)stride);
    return KVC_OK;
}

kvc_status kvc_expect_array(const char *op, const char *name, const kvc_tensor *tensor, int dtype, int ndim,
                            const int64_t *shape) {
    KVC_TRY(kvc_expect_dtype(op, name, tensor, dtype));
    KVC_TRY(kvc_expect_shape(op, name, tensor, ndim, shape));
    return kvc_expect_contiguous(op, name, tensor);
}

kvc_status kvc_expect_arena(const char *op, const kvc_tensor *arena) {
    KVC_TRY(kvc_expect_array(op, "arena", arena, KVC_UINT8, 1, (int64_t[]){-1}));
    KVC_CHECK(((uintptr_t)arena->data & 15) == 0, KVC_EINVAL, "%s: arena: expected 16-byte alignment, got address %p",
              op, arena->data);
    return KVC_OK;
}

kvc_status kvc_expect_layout(const char *op, const kvc_layout *layout) {
    KVC_CHECK(kvc_head_dim_ok(layout->head_dim), KVC_ENOTSUP, "%s: head_dim: expected 64, 80, 96, 128 or 256, got %d",
              op, layout->head_dim);
    KVC_CHECK(kvc_group_ok(layout->head_dim, layout->group), KVC_EINVAL,
              "%s: group: expected a divisor of head_dim %d that is a multiple of %d, got %d", op, layout->head_dim,
              KVC_TILE, layout->group);
    KVC_CHECK(layout->zero_point == 0 || layout->zero_point == 1, KVC_EINVAL, "%s: zero_point: expected 0 or 1, got %d",
              op, layout->zero_point);
    KVC_CHECK(layout->half == KVC_FLOAT16 || layout->half == KVC_BFLOAT16, KVC_EINVAL,
              "%s: half: expected float16 (%d) or bfloat16 (%d), got %d", op, KVC_FLOAT16, KVC_BFLOAT16, layout->half);
    KVC_CHECK(layout->scale_dtype == KVC_STEP_FP16 || layout->scale_dtype == KVC_STEP_E5M3, KVC_EINVAL,
              "%s: scale_dtype: expected 0 (fp16) or 1 (e5m3), got %d", op, layout->scale_dtype);
    return KVC_OK;
}

kvc_status kvc_expect_workspace(const char *op, const kvc_tensor *workspace, int64_t bytes) {
    if (bytes == 0) return KVC_OK;
    KVC_TRY(kvc_expect_dtype(op, "workspace", workspace, KVC_UINT8));
    KVC_TRY(kvc_expect_contiguous(op, "workspace", workspace));
    KVC_CHECK(kvc_elements(workspace) >= bytes, KVC_ESHAPE, "%s: workspace: expected %lld bytes, got %lld", op,
              (long long)bytes, (long long)kvc_elements(workspace));
    KVC_CHECK(((uintptr_t)workspace->data & 63) == 0, KVC_EINVAL, "%s: workspace: expected 64-byte alignment", op);
    return KVC_OK;
}

/* ---- 16-bit floats */

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

float kvc_half_to_float(uint16_t bits, int dtype) {
    if (dtype == KVC_BFLOAT16) return from_bits((uint32_t)bits << 16);
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* 2^112 moves the exponent's bias from 15 to 127, subnormals included. */
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}

uint16_t kvc_float_to_half(float value, int dtype) {
    const uint32_t bits = to_bits(value);
    if (dtype == KVC_BFLOAT16) {
        if (value != value) return (uint16_t)(bits >> 16 | 0x40);
        const uint32_t magnitude = (bits & 0x7fffffff) + 0x7fff + (bits >> 16 & 1);
        if (!isinf(value) && magnitude >= 0x7f800000) return (uint16_t)((bits >> 16 & 0x8000) | 0x7f7f);
        return (uint16_t)((bits >> 16 & 0x8000) | magnitude >> 16);
    }
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude == 0x7f800000) return sign | 0x7c00;
    if (magnitude >= 0x477ff000) return sign | 0x7bff; /* 65520 and more would round to infinity */
    if (magnitude < 0x38800000) /* below 2^-14: adding 2^-1 aligns the subnormal's last bit, rounding to even */
        return sign | (uint16_t)(to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000);
    return sign | (uint16_t)((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

void kvc_load_row(float *out, const void *row, int dtype, int64_t n) {
    if (dtype == KVC_FLOAT32) {
        memcpy(out, row, (size_t)n * 4);
    } else if (dtype == KVC_BFLOAT16) {
        const uint16_t *in = row;
        for (int64_t i = 0; i < n; i++) out[i] = from_bits((uint32_t)in[i] << 16);
    } else {
        const uint16_t *in = row;
        for (int64_t i = 0; i < n; i++) out[i] = kvc_half_to_float(in[i], KVC_FLOAT16);
    }
}

void kvc_store_row(void *row, const float *in, int dtype, int64_t n) {
    if (dtype == KVC_FLOAT32) {
        memcpy(row, in, (size_t)n * 4);
    } else {
        uint16_t *out = row;
        for (int64_t i = 0; i < n; i++) out[i] = kvc_float_to_half(in[i], dtype);
    }
}

bool kvc_row_finite(const void *row, int dtype, int64_t n) {
    const uint32_t exponent32 = 0x7f800000, exponent16 = dtype == KVC_BFLOAT16 ? 0x7f80 : 0x7c00;
    uint32_t bad = 0;
    if (dtype == KVC_FLOAT32)
        for (int64_t c = 0; c < n; c++) bad |= (((const uint32_t *)row)[c] & exponent32) == exponent32;
    else
        for (int64_t c = 0; c < n; c++) bad |= (((const uint16_t *)row)[c] & exponent16) == exponent16;
    return !bad;
}

bool kvc_all_finite(const kvc_tensor *tensor) {
    for (int64_t i = 0; i < tensor->shape[0]; i++)
        for (int64_t j = 0; j < tensor->shape[1]; j++)
            for (int64_t k = 0; k < tensor->shape[2]; k++)
                if (!kvc_row_finite(kvc_at(tensor, i, j, k), tensor->dtype, tensor->shape[3])) return false;
    return true;
}
