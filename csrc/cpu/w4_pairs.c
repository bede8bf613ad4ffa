/* w4_pairs.c: products of bfloat16 rows with 4-bit weights where the machine multiplies pairs of bfloat16
 * (AVX512-BF16): codes are such numbers, exactly, and their sums over a group are scaled in float32. */
#include "cpu/w4_tile.h"

#include <stdlib.h>
#include <string.h>

#ifdef KVC_HAVE_X86_ISAS
#include <immintrin.h>

#include "cpu/attend_tile.h"
#include "cpu/w4_words.h"

#define HERE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")))
#define INLINE static inline __attribute__((always_inline)) HERE

HERE static void decode(uint32_t *pairs, const uint32_t *words, int inputs) {
    /* -8 .. 7, and again: a code comes with a bit of the next one above it */
    static const uint16_t numbers[32] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                         0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                         0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                         0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i table = _mm512_loadu_si512(numbers);
    for (int chunk = 0; chunk < inputs / 64; chunk++)
        for (int t = 0; t < 4; t++) {
            kvc_words of[16];
            kvc_words_by_input(of, words, chunk, t);
            for (int j = 0; j < 16; j++)
                for (int high = 0; high < 2; high++) {
                    const int pair = 32 * chunk + 8 * (j & 3) + (j >> 2) + 4 * high;
                    _mm512_store_si512(pairs + pair * KVC_W4_ROWS + 16 * t,
                                       _mm512_permutexvar_epi16((__m512i)(of[j] >> kvc_words_shift(high)), table));
                }
        }
}

#define ROWS 6 /* of x, whose sums the registers hold */
#define WIDE 4 /* vectors of 64 rows of W */

INLINE void multiply_of(float *sums, const uint32_t *pairs, const float *scales, const uint16_t *x, int m, int pitch,
                        int inputs, int group) {
    for (int g = 0; g < inputs / group; g++) {
        __m512 sum[ROWS][WIDE];
        for (int i = 0; i < m; i++)
            for (int j = 0; j < WIDE; j++) sum[i][j] = _mm512_setzero_ps();
        for (int pair = g * group / 2; pair < (g + 1) * group / 2; pair++) {
            __m512i w[WIDE];
            for (int j = 0; j < WIDE; j++) w[j] = _mm512_load_si512(pairs + pair * KVC_W4_ROWS + 16 * j);
            for (int i = 0; i < m; i++) {
                uint32_t two;
                memcpy(&two, x + i * pitch + 2 * pair, sizeof two);
                const __m512i both = _mm512_set1_epi32((int)two);
                for (int j = 0; j < WIDE; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)both, (__m512bh)w[j]);
            }
        }
        for (int j = 0; j < WIDE; j++) {
            const __m512 scale = _mm512_load_ps(scales + g * KVC_W4_ROWS + 16 * j);
            for (int i = 0; i < m; i++) {
                float *to = sums + i * KVC_W4_ROWS + 16 * j;
                _mm512_store_ps(to, _mm512_fmadd_ps(sum[i][j], scale, _mm512_load_ps(to)));
            }
        }
    }
}

HERE static void multiply(float *sums, const uint32_t *pairs, const float *scales, const uint16_t *x, int count,
                          int pitch, int inputs, int group) {
    int i = 0;
    for (; i + ROWS <= count; i += ROWS)
        multiply_of(sums + i * KVC_W4_ROWS, pairs, scales, x + i * pitch, ROWS, pitch, inputs, group);
    for (; i + 2 <= count; i += 2)
        multiply_of(sums + i * KVC_W4_ROWS, pairs, scales, x + i * pitch, 2, pitch, inputs, group);
    if (i < count) multiply_of(sums + i * KVC_W4_ROWS, pairs, scales, x + i * pitch, 1, pitch, inputs, group);
}

const kvc_w4_pairs *kvc_w4_pairs_here(void) {
    static const kvc_w4_pairs there = {decode, multiply};
    const char *limit = getenv("KVCOMP_SIMD");
    if ((limit && *limit) || strcmp(kvc_attend_tiles()->name, "avx512") != 0) return NULL;
    return __builtin_cpu_supports("avx512bf16") ? &there : NULL;
}
#else
const kvc_w4_pairs *kvc_w4_pairs_here(void) { return NULL; }
#endif
