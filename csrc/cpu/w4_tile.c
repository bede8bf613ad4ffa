/* w4_tile.c: products with one block of 4-bit weights. Built once per instruction set with KVC_ISA=base|avx2|avx512;
 * 16-float vectors are the compiler's, so the code is the same for all, but for how many sums the registers hold. */
#include "cpu/w4_tile.h"
#include "cpu/w4_format.h"
#include "cpu/w4_words.h"

#include <string.h>

typedef float vf __attribute__((vector_size(64)));
typedef kvc_words vu;
typedef int32_t vi __attribute__((vector_size(64)));

#define NAME2(name, isa) name##_##isa
#define NAME1(name, isa) NAME2(name, isa)
#define NAME(name) NAME1(name, KVC_ISA)
#define TEXT2(isa) #isa
#define TEXT1(isa) TEXT2(isa)
#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE vf splat(float x) { return x - (vf){0}; }

/* The numbers of the nibbles from bit `shift` on. */
INLINE vf numbers(vu words, vu shift) {
#ifdef __AVX512F__ /* one instruction that looks at four bits of its indices */
    const vf codes = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return __builtin_shuffle(codes, (vi)(words >> shift));
#else
    return __builtin_convertvector((vi)(words >> shift & 15) - 8, vf);
#endif
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
                const vu v = kvc_load_words(words, chunk, tile, r);
                for (int half = 0; half < 2; half++) {
                    const int row = 16 * tile + 8 * half + r;
                    vf part[KVC_W4_FEW];
                    for (int e = 0; e < 4; e++) {
                        const vf number = numbers(v, (vu){0} + 4 * (half + 2 * (e >> 1)) + 16 * (e & 1));
                        for (int i = 0; i < m; i++)
                            part[i] = e ? part[i] + number * x[e * m + i] : number * x[e * m + i];
                    }
                    const vf scale = spread(scales, chunk, row, group);
                    for (int i = 0; i < m; i++) ((vf *)sums)[row * m + i] += part[i] * scale;
                }
            }
}

/* Of 64 inputs those that vectors of words meet: element 4*c + s is input 16*s + 2*c + first. */
INLINE vf meeting(const float *x, int first) {
    const vi two = (vi){0, 16, 2, 18, 4, 20, 6, 22, 0, 16, 2, 18, 4, 20, 6, 22} + first;
    const vf low = __builtin_shuffle(load(x), load(x + 16), two);
    const vf high = __builtin_shuffle(load(x + 32), load(x + 48), two);
    return __builtin_shuffle(low, high, (vi){0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23});
}

static void few(float *sums, const uint32_t *words, const float *scales, const float *x, int m, int inputs, int group) {
    vf order[KVC_W4_INPUTS / 64 * 4 * KVC_W4_FEW];
    for (int chunk = 0; chunk < inputs / 64; chunk++)
        for (int e = 0; e < 4; e++)
            for (int i = 0; i < m; i++)
                order[(4 * chunk + e) * m + i] = meeting(x + i * inputs + 64 * chunk, (e & 1) + 8 * (e >> 1));
    switch (m) {
    case 1: few_of(sums, words, scales, order, 1, inputs, group); break;
    case 2: few_of(sums, words, scales, order, 2, inputs, group); break;
    default: few_of(sums, words, scales, order, 4, inputs, group);
    }
}

static void decode(float *tile, const uint32_t *words, const float *scales, int inputs, int group) {
    for (int chunk = 0; chunk < inputs / 64; chunk++)
        for (int t = 0; t < 4; t++) {
            vu of[16];
            kvc_words_by_input(of, words, chunk, t);
            for (int j = 0; j < 16; j++) {
                const int first = 64 * chunk + 16 * (j & 3) + 2 * (j >> 2); /* within 16 inputs of one group */
                const vf scale = load(scales + first / group * KVC_W4_ROWS + 16 * t);
                for (int e = 0; e < 4; e++) {
                    const vu shift = kvc_words_shift(e >> 1) + 16 * (e & 1);
                    *(vf *)(tile + (first + (e & 1) + 8 * (e >> 1)) * KVC_W4_ROWS + 16 * t) =
                        numbers(of[j], shift) * scale;
                }
            }
        }
}

/* As many sums as the registers hold: ROWS rows of x, WIDE vectors of rows of W, as wide as the machine's: wider ones
 * are kept in memory. */
#if defined(__AVX512F__)
#define BYTES 64
#define WIDE 4
#elif defined(__AVX2__)
#define BYTES 32
#define WIDE 2
#else
#define BYTES 16
#define WIDE 2
#endif
#define ROWS 6
typedef float nf __attribute__((vector_size(BYTES)));

INLINE void many_of(float *sums, const float *tile, const float *x, int m, int pitch, int inputs) {
    for (int first = 0; first < KVC_W4_ROWS; first += WIDE * BYTES / 4) {
        nf sum[ROWS][WIDE];
        for (int i = 0; i < m; i++)
            for (int j = 0; j < WIDE; j++) sum[i][j] = *(const nf *)(sums + i * KVC_W4_ROWS + first + BYTES / 4 * j);
        for (int input = 0; input < inputs; input++) {
            nf w[WIDE];
            for (int j = 0; j < WIDE; j++) w[j] = *(const nf *)(tile + input * KVC_W4_ROWS + first + BYTES / 4 * j);
            for (int i = 0; i < m; i++)
                for (int j = 0; j < WIDE; j++) sum[i][j] += w[j] * x[i * pitch + input];
        }
        for (int i = 0; i < m; i++)
            for (int j = 0; j < WIDE; j++) *(nf *)(sums + i * KVC_W4_ROWS + first + BYTES / 4 * j) = sum[i][j];
    }
}

static void many(float *sums, const float *tile, const float *x, int count, int pitch, int inputs) {
    int i = 0;
    for (; i + ROWS <= count; i += ROWS) many_of(sums + i * KVC_W4_ROWS, tile, x + i * pitch, ROWS, pitch, inputs);
    for (; i + 2 <= count; i += 2) many_of(sums + i * KVC_W4_ROWS, tile, x + i * pitch, 2, pitch, inputs);
    if (i < count) many_of(sums + i * KVC_W4_ROWS, tile, x + i * pitch, 1, pitch, inputs);
}

static void load_halves(float *out, const uint16_t *halves, int count) {
    for (int i = 0; i < count; i++) { /* 2^112 moves the exponent's bias; Inf and NaN have the largest one */
        const uint32_t half = halves[i], special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
        uint32_t bits = (half & 0x7fff) << 13;
        float value;
        memcpy(&value, &bits, 4);
        value *= 0x1p112f;
        memcpy(&bits, &value, 4);
        bits |= (half & 0x8000) << 16 | special;
        memcpy(out + i, &bits, 4);
    }
}

static void load_row(float *out, const void *row, int dtype, int count) {
    if (dtype == KVC_FLOAT32) {
        memcpy(out, row, (size_t)count * 4);
    } else if (dtype == KVC_BFLOAT16) {
        for (int i = 0; i < count; i++) {
            const uint32_t bits = (uint32_t)((const uint16_t *)row)[i] << 16;
            memcpy(out + i, &bits, 4);
        }
    } else {
        load_halves(out, row, count);
    }
}

/* Pieces of codes, `plane` bits each, behind what the codes have: byte by byte as they lie there. */
INLINE void add_plane(uint16_t *codes, const uint8_t *at, int plane) {
    for (int byte = 0; byte < 8 * plane; byte++)
        for (int k = 0; k < 8 / plane; k++) {
            uint16_t *const code = codes + byte * (8 / plane) + k;
            *code = (uint16_t)(*code << plane | (at[byte] >> plane * k & ((1 << plane) - 1)));
        }
}

static void load_scales(float *out, const uint8_t *at, int scale_bits) {
    const int bits = kvc_w4_code_bits(scale_bits), left = scale_bits < 0 ? 0 : 10 - scale_bits;
    uint16_t codes[KVC_W4_ROWS] = {0}; /* of rows 0, 8, 16, ..., 1, 9, ... */
    for (int done = 0; done < bits;) {
        const int plane = kvc_w4_plane_bits(bits, done);
        const uint8_t *const from = at + 8 * done;
        switch (plane) {
        case 16:
            for (int i = 0; i < KVC_W4_ROWS; i++) codes[i] = (uint16_t)(from[2 * i] | from[2 * i + 1] << 8);
            break;
        case 8: add_plane(codes, from, 8); break;
        case 4: add_plane(codes, from, 4); break;
        case 2: add_plane(codes, from, 2); break;
        default: add_plane(codes, from, 1);
        }
        done += plane;
    }
    for (int i = 0; i < KVC_W4_ROWS; i++) codes[i] = (uint16_t)(codes[i] << left);
    float values[KVC_W4_ROWS];
    load_halves(values, codes, KVC_W4_ROWS);
    for (int row = 0; row < KVC_W4_ROWS; row++) out[row] = values[8 * (row & 7) + (row >> 3)];
}

extern const kvc_w4_tile NAME(kvc_w4_tile);
const kvc_w4_tile NAME(kvc_w4_tile) = {TEXT1(KVC_ISA), few, decode, many, load_row, load_scales};
