/* w4_tile.h: the inner loops of w4's matrix product on the CPU, one build per instruction set (w4_tile.c), chosen at
 * run time. */
#pragma once
#include "core/core.h"
#include "kvcomp/w4.h"

#define KVC_W4_FEW 4      /* rows of x that are worked on with weights in registers */
#define KVC_W4_MANY 256   /* rows of x that share a block of weights that was decoded to memory */
#define KVC_W4_AT_ONCE 64 /* of these, that are brought to float32 together */
#define KVC_W4_INPUTS 256 /* most inputs of a block */

typedef struct {
    const char *name;
    /* sums[row][m] += block * x for rows 0..63 and m rows of x (1, 2 or 4), whose `inputs` values of this block lie in
     * x[m][input], 64-aligned. sums: 64 x m x 16 floats, partial sums, 64-aligned. scales[group of the block][64 rows].
     */
    void (*few)(float *sums, const uint32_t *words, const float *scales, const float *x, int m, int inputs, int group);
    /* Decodes a block to tile[input][64 rows]; tile and scales 64-aligned. */
    void (*decode)(float *tile, const uint32_t *words, const float *scales, int inputs, int group);
    /* sums[m][64 rows] += x[m][0 .. inputs-1] * tile for `count` rows of x, `pitch` floats apart. */
    void (*many)(float *sums, const float *tile, const float *x, int count, int pitch, int inputs);
    /* As kvc_load_row. */
    void (*load)(float *out, const void *row, int dtype, int count);
    /* What the scales of 64 rows and a group stand for, without the matrix's exponent. */
    void (*load_scales)(float *out, const uint8_t *at, int scale_bits);
} kvc_w4_tile;

const kvc_w4_tile *kvc_w4_tiles(void); /* the best for this machine; KVCOMP_SIMD=base|avx2|avx512 limits it */

/* bfloat16 rows of x, in pairs of inputs. */
typedef struct {
    /* Codes of a block as bfloat16, without their scales: pairs[input / 2][64 rows], 64-aligned. */
    void (*decode)(uint32_t *pairs, const uint32_t *words, int inputs);
    /* sums[m][64 rows] += x[m][0 .. inputs-1] * block for `count` rows of x, `pitch` apart; inputs: whole groups;
     * scales[group of the block][64 rows]; all 64-aligned. */
    void (*multiply)(float *sums, const uint32_t *pairs, const float *scales, const uint16_t *x, int count, int pitch,
                     int inputs, int group);
} kvc_w4_pairs;

/* NULL: the machine does not multiply them, or KVCOMP_SIMD is given. */
const kvc_w4_pairs *kvc_w4_pairs_here(void);
