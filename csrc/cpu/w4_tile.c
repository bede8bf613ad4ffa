/* w4_tile.c: products with one block of 4-bit weights. Built once per instruction set with KVC_ISA=base|avx2|avx512;
 * 16-float vectors are the compiler's, so the code is the same for all.
 *
 * The 16 words of lanes 4*r .. 4*r+3 hold rows r and r + 8 of a tile and 64 inputs: vector element 4*c + s is input
 * 16*s + 2*c + odd + 8*high of nibble (odd, high). */
#include "cpu/w4_tile.h"

#include <string.h>

#define V 16
typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

#define NAME2(name, isa) name##_##isa
#define NAME1(name, isa) NAME2(name, isa)
#define NAME(name) NAME1(name, KVC_ISA)
#define TEXT2(isa) #isa
#define TEXT1(isa) TEXT2(isa)
#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE vf splat(float x) { return x - (vf){0}; }

/* Sixteen words of rows r and r + 8 of tile `tile`, in 64 inputs `chunk`. */
INLINE vu load_words(const uint32_t *words, int chunk, int tile, int r) {
    vu v;
    memcpy(&v, words + ((chunk * 4 + tile) * 32 + 4 * r) * 4, sizeof v);
    return v >> 2 | v << 30;
}

INLINE vf numbers(vu words, int half, int odd, int high) {
    return __builtin_convertvector((vi)(words >> (16 * odd + 4 * (half + 2 * high)) & 15) - 8, vf);
}

/* Scales of a row over the vector of a chunk. */
INLINE vf spread(const float *scales, int chunk, int row, int group) {
    if (group >= 64) return splat(scales[64 * chunk / group * KVC_W4_ROWS + row]);
    const float a = scales[2 * chunk * KVC_W4_ROWS + row], b = scales[(2 * chunk + 1) * KVC_W4_ROWS + row];
    return (vf){a, a, b, b, a, a, b, b, a, a, b, b, a, a, b, b};
}

INLINE void few_of(float *sums, const uint32_t *words, const float *scales, const vf *x, int m, int inputs, int group) {
    for (int chunk = 0; chunk < inputs / 64; chunk++, x += 4 * m)
        for (int tile = 0; tile < 4; tile++)
            for (int r = 0; r < 8; r++) {
                const vu v = load_words(words, chunk, tile, r);
                for (int half = 0; half < 2; half++) {
                    const int row = 16 * tile + 8 * half + r;
                    vf part[KVC_W4_FEW];
                    for (int e = 0; e < 4; e++) {
                        const vf number = numbers(v, half, e & 1, e >> 1);
                        for (int i = 0; i < m; i++)
                            part[i] = e ? part[i] + number * x[e * m + i] : number * x[e * m + i];
                    }
                    const vf scale = spread(scales, chunk, row, group);
                    for (int i = 0; i < m; i++) ((vf *)sums)[row * m + i] += part[i] * scale;
                }
            }
}

static void few(float *sums, const uint32_t *words, const float *scales, const float *x, int m, int inputs, int group) {
    vf order[KVC_W4_INPUTS / 64 * 4 * KVC_W4_FEW];
    for (int input = 0; input < inputs; input++) {
        const int e = (input & 1) + 2 * (input >> 3 & 1), place = 4 * (input % 8 >> 1) + input / 16 % 4;
        for (int i = 0; i < m; i++) ((float *)&order[(input / 64 * 4 + e) * m + i])[place] = x[input * m + i];
    }
    switch (m) {
    case 1: few_of(sums, words, scales, order, 1, inputs, group); break;
    case 2: few_of(sums, words, scales, order, 2, inputs, group); break;
    default: few_of(sums, words, scales, order, 4, inputs, group);
    }
}

static void decode(float *tile, const uint32_t *words, const float *scales, int inputs, int group) {
    for (int chunk = 0; chunk < inputs / 64; chunk++)
        for (int t = 0; t < 4; t++)
            for (int r = 0; r < 8; r++) {
                const vu v = load_words(words, chunk, t, r);
                for (int half = 0; half < 2; half++) {
                    const int row = 16 * t + 8 * half + r;
                    const vf scale = spread(scales, chunk, row, group);
                    for (int e = 0; e < 4; e++) {
                        const vf value = numbers(v, half, e & 1, e >> 1) * scale;
                        float *to = tile + (64 * chunk + (e & 1) + 8 * (e >> 1)) * KVC_W4_ROWS + row;
                        for (int j = 0; j < V; j++) to[(16 * (j & 3) + 2 * (j >> 2)) * KVC_W4_ROWS] = value[j];
                    }
                }
            }
}

INLINE void many_of(float *sums, const float *tile, const float *x, int m, int pitch, int inputs) {
    for (int half = 0; half < 2; half++) {
        vf sum[4][2];
        for (int i = 0; i < m; i++)
            for (int j = 0; j < 2; j++) sum[i][j] = load(sums + i * KVC_W4_ROWS + V * (2 * half + j));
        for (int input = 0; input < inputs; input++) {
            const vf a = load(tile + input * KVC_W4_ROWS + 2 * V * half);
            const vf b = load(tile + input * KVC_W4_ROWS + 2 * V * half + V);
            for (int i = 0; i < m; i++) {
                const float value = x[i * pitch + input];
                sum[i][0] += a * value;
                sum[i][1] += b * value;
            }
        }
        for (int i = 0; i < m; i++)
            for (int j = 0; j < 2; j++) *(vf *)(sums + i * KVC_W4_ROWS + V * (2 * half + j)) = sum[i][j];
    }
}

static void many(float *sums, const float *tile, const float *x, int count, int pitch, int inputs) {
    int i = 0;
    for (; i + 4 <= count; i += 4) many_of(sums + i * KVC_W4_ROWS, tile, x + i * pitch, 4, pitch, inputs);
    for (; i < count; i++) many_of(sums + i * KVC_W4_ROWS, tile, x + i * pitch, 1, pitch, inputs);
}

static void load_row(float *out, const void *row, int dtype, int count) {
    uint32_t bits;
    if (dtype == KVC_FLOAT32) {
        memcpy(out, row, (size_t)count * 4);
    } else if (dtype == KVC_BFLOAT16) {
        for (int i = 0; i < count; i++) {
            bits = (uint32_t)((const uint16_t *)row)[i] << 16;
            memcpy(out + i, &bits, 4);
        }
    } else {
        for (int i = 0; i < count; i++) { /* 2^112 moves the exponent's bias; Inf and NaN have the largest one */
            const uint32_t half = ((const uint16_t *)row)[i], special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
            bits = (half & 0x7fff) << 13;
            float value;
            memcpy(&value, &bits, 4);
            value *= 0x1p112f;
            memcpy(&bits, &value, 4);
            bits |= (half & 0x8000) << 16 | special;
            memcpy(out + i, &bits, 4);
        }
    }
}

extern const kvc_w4_tile NAME(kvc_w4_tile);
const kvc_w4_tile NAME(kvc_w4_tile) = {TEXT1(KVC_ISA), few, decode, many, load_row};
