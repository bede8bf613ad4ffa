/* bsr_tile.c: built once per instruction set with KVC_ISA=base|avx2|avx512. A sum of products stays in registers: four
 * rows by as many vectors of columns as there are registers for. */
#include "cpu/bsr_tile.h"

#include <string.h>

#if defined(__AVX512F__)
#define V 16 /* floats of a vector */
#define WIDE 4
#elif defined(__AVX2__)
#define V 8
#define WIDE 2
#else
#define V 4
#define WIDE 2
#endif
#define GROUP (V * WIDE)
#define ROWS 4

typedef float vf __attribute__((vector_size(4 * V)));

#define NAME2(name, isa) name##_##isa
#define NAME1(name, isa) NAME2(name, isa)
#define NAME(name) NAME1(name, KVC_ISA)
#define TEXT2(isa) #isa
#define TEXT1(isa) TEXT2(isa)
#define INLINE static inline __attribute__((always_inline))

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* ---- rows in and out: loops that a compiler makes vectors of */

static void widen(float *out, const void *row, int dtype, int64_t n) {
    const uint16_t *in = row;
    if (dtype == KVC_FLOAT32) {
        memcpy(out, row, (size_t)n * 4);
    } else if (dtype == KVC_BFLOAT16) {
        for (int64_t i = 0; i < n; i++) out[i] = from_bits((uint32_t)in[i] << 16);
    } else {
        for (int64_t i = 0; i < n; i++) {
            const uint32_t magnitude = in[i] & 0x7fff;
            const uint32_t bits = to_bits(from_bits(magnitude << 13) * 0x1p112f); /* moves the exponent's bias */
            out[i] = from_bits(bits | (magnitude >= 0x7c00 ? 0x7f800000u : 0) | (uint32_t)(in[i] & 0x8000) << 16);
        }
    }
}

/* Nearest even; infinite beyond the largest number: a sum that has left the type is to be seen (loss scaling). */
INLINE uint16_t to_half(float value) {
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t tiny = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    uint32_t out = magnitude < 0x38800000 ? tiny : normal;
    out = magnitude >= 0x477ff000 ? 0x7c00 : out;
    out = magnitude > 0x7f800000 ? 0x7e00 : out;
    return (uint16_t)(out | (bits >> 16 & 0x8000));
}

INLINE uint16_t to_brain(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

static void finish(void *row, const float *sums, int dtype, int64_t n, float beta) {
    float before[KVC_BSR_PANEL], all[KVC_BSR_PANEL];
    for (int64_t first = 0; first < n; first += KVC_BSR_PANEL) {
        const int64_t count = n - first < KVC_BSR_PANEL ? n - first : KVC_BSR_PANEL;
        char *at = (char *)row + first * (dtype == KVC_FLOAT32 ? 4 : 2);
        const float *from = sums + first;
        if (beta != 0.0f) {
            widen(before, at, dtype, count);
            for (int64_t i = 0; i < count; i++) all[i] = from[i] + beta * before[i];
            from = all;
        }
        if (dtype == KVC_FLOAT32)
            memcpy(at, from, (size_t)count * 4);
        else if (dtype == KVC_BFLOAT16)
            for (int64_t i = 0; i < count; i++) ((uint16_t *)at)[i] = to_brain(from[i]);
        else
            for (int64_t i = 0; i < count; i++) ((uint16_t *)at)[i] = to_half(from[i]);
    }
}

static void pack(float *out, const char *rows, int64_t pitch, int dtype, int64_t depth, int64_t columns) {
    _Alignas(64) float row[KVC_BSR_PANEL];
    for (int64_t d = 0; d < depth; d++) {
        widen(row, rows + d * pitch, dtype, columns);
        const int64_t padded = (columns + GROUP - 1) / GROUP * GROUP;
        for (int64_t i = columns; i < padded; i++) row[i] = 0.0f;
        for (int64_t g = 0; g < padded; g += GROUP) memcpy(out + g * depth + d * GROUP, row + g, sizeof(vf) * WIDE);
    }
}

/* ---- products */

static void multiply(float *sums, const float *a, const float *packed, int64_t rows, int64_t depth, int64_t columns) {
    for (int64_t g = 0; g < columns; g += GROUP) {
        const float *panel = packed + g * depth;
        for (int64_t r = 0; r < rows; r += ROWS) {
            vf sum[ROWS][WIDE];
            for (int i = 0; i < ROWS; i++)
                for (int w = 0; w < WIDE; w++) sum[i][w] = *(const vf *)(sums + (r + i) * KVC_BSR_PANEL + g + w * V);
            const float *left = a + r * KVC_BSR_DEPTH;
            for (int64_t d = 0; d < depth; d++) {
                vf right[WIDE];
                for (int w = 0; w < WIDE; w++) right[w] = *(const vf *)(panel + d * GROUP + w * V);
                for (int i = 0; i < ROWS; i++)
                    for (int w = 0; w < WIDE; w++) sum[i][w] += left[i * KVC_BSR_DEPTH + d] * right[w];
            }
            for (int i = 0; i < ROWS; i++)
                for (int w = 0; w < WIDE; w++) *(vf *)(sums + (r + i) * KVC_BSR_PANEL + g + w * V) = sum[i][w];
        }
    }
}

#define SIDE (WIDE == 4 ? 4 : 2) /* columns of dots at a time */

static void dots(float *sums, int64_t stride, const float *left, const float *right, int64_t rows, int64_t columns,
                 int64_t n) {
    for (int64_t r = 0; r < rows; r += ROWS)
        for (int64_t c = 0; c < columns; c += SIDE) {
            vf sum[ROWS][SIDE];
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < SIDE; j++) sum[i][j] = (vf){0};
            for (int64_t d = 0; d < n; d += V) {
                vf other[SIDE];
                for (int j = 0; j < SIDE; j++) other[j] = *(const vf *)(right + (c + j) * n + d);
                for (int i = 0; i < ROWS; i++) {
                    const vf mine = *(const vf *)(left + (r + i) * n + d);
                    for (int j = 0; j < SIDE; j++) sum[i][j] += mine * other[j];
                }
            }
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < SIDE; j++) {
                    float total = 0.0f;
                    for (int v = 0; v < V; v++) total += sum[i][j][v];
                    sums[(r + i) * stride + c + j] += total;
                }
        }
}

extern const kvc_bsr_ops NAME(kvc_bsr_ops);
const kvc_bsr_ops NAME(kvc_bsr_ops) = {TEXT1(KVC_ISA), widen, pack, multiply, dots, finish};
