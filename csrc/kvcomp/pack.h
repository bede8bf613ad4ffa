/* pack.h: K, V rows -> rotate, quantize, write pages; and back.
 *
 * pack: page i of `pages` takes the tokens tokens[start[i] .. start[i] + pages[i].tokens) of list lists[i].
 *   1. rotate: orthonormal Hadamard in blocks of the largest power of two dividing d (128: one block; 80: five of 16).
 *      Class 16: stages of stride 1, 2, 4, ... in order, each (a + b, a - b) in fp32, then one multiplication by
 *      1/sqrt(block). Other classes: the row is first rounded to multiples (nearest even) of a power of two, its unit:
 *      kvc_row_unit of its largest magnitude, a 2^-14 of that or less. Then all sums are integers below 2^24, exact in
 *      fp32 in any order, and the row stays as these integers with the factor unit * (1/sqrt(block)). Rows that are not
 *      rotated have the factor 1. y below are the integers, or the row; a value is y * factor.
 *   2. per token and group of n channels a scale s and a zero z, both fp32, rounded to what the layout stores before
 *      they are used:
 *        KVC_SCALE_SIGMA   z = mean, s = c(bits) * sigma, c = 0.996, 0.586, 0.335 for 2, 3, 4 bits (the mean squared
 *                          error's minimum on Gaussian rows); 8 bits: min-max. Symmetric layouts: sigma about 0.
 *        KVC_SCALE_MINMAX  z = (min + max) / 2, s = (max - min) / (2^bits - 1); symmetric: 2 max|x| / (2^bits - 1)
 *        KVC_SCALE_SEARCH  a start, its codes, and near the scale and zero of least squared error for these codes
 *      sigma = sqrt(sum((y - mean)^2) / n), times factor. Where a rotated row is one block and one group, its mean and
 *      sigma come from the row before the rotation, which keeps lengths and turns the mean into the first channel: mean
 *      = x[0] * (1/sqrt(n)), sigma = sqrt(sum of the other channels' squares / n) (symmetric: of all), the sum as 8
 *      chains of fma over the channels with the same (channel / 4) % 8, in their order, then added as pairs of pairs.
 *      search: the start is min-max's zero and its scale times kvc_search_factor, the zero moved toward the mean by the
 *      part of the way that kvc_search_mean says. With its codes, k = code - 2^(bits-1), m = sum(k) / n and M = mean of
 *      y (one block and group: x[0] / unit): t = (sum(k y) - sum(k) M) / (sum(k k) - m sum(k)), the least-squares scale
 *      is t * factor, its zero (M - t (m + 0.5)) * factor. Symmetric: c = sum(k y) + sum(y) / 2, t = c / (sum(k k) +
 *      sum(k) + n / 4), from the start times each of KVC_SEARCH_STARTS, of which the first with the greatest c t
 *      counts, the least squared error. Codes change with their scale, so the way from the start to this fit is gone on
 *      with: start + kvc_search_step * (fit - start). A start stays where t is not above 0, or t * factor no finite
 *      number above 0. Sums of k are exact; that of k y is 32 chains of fma, one for each channel % 32 of the group,
 *      then a tree (strides 16, 8, 4, 2, 1), and sum(y) the same with additions.
 *      Rounded, KVC_STEP_FP16: both to fp16, nearest even, saturated at 65504.
 *      Rounded, KVC_STEP_E5M3: a zero far outside the group's spread would not fit in its int8, so it raises the scale:
 *      1. s = max(s, |z| / 15.875), to the nearest E5M3, ties to even, saturated at 61440; at 8 bits to the least that
 *         is not smaller: of 255 steps a scale that is 6 percent short cuts off more than rounding costs;
 *      2. where 15.875 * s + 2^-18 < |z| still, s becomes the next larger E5M3, if there is one;
 *      3. z = s / 8 times z * 8 / s, clamped to -128 .. 127 and rounded to the nearest even integer; 0 where s is 0.
 *      Step 3 so clamps nothing but zeros above 15.875 * 61440 and, by less than 2^-18, some of tiny groups: 2^-18 is
 *      half the smallest scale, so groups with |z| and s up to that become zeros, which is nearer to them (but not at 8
 *      bits, which keep any s above 0).
 *   3. r = (1 / s) * (1 / most), most = 2^bits - 1, and 0 for a zero scale; v = fma(y, r * factor, fma(-z, r, 0.5)):
 *      the place between the lowest code's value and the highest one's, 0 .. 1 where nothing is clamped.
 *      code = v clamped to 0 .. 1, times most, rounded once, to the nearest even integer; or, with stochastic rounding,
 *      floor of fma(v, most, u) clamped to 0 .. most, u uniform in [0, 1) from philox.h, row 2*token + is_value.
 *   A group of zeros takes the sign of its first channel's zero (the ternaries of pack.c).
 *   Rotated or quantized values are clamped to +-2^96 first, so that nothing overflows on the way.
 *   Other sums over n channels: blocks of the largest power of two dividing n, inside a block a tree (strides halving
 *   from n/2), then block after block. fma is one rounding, wherever this text or the code says it, and nothing else is
 *   fused: CPU and CUDA write the same bytes.
 *   Class 16 rounds (rotated) values to the layout's 16-bit type, nearest even, saturated at its largest finite value.
 *
 * unpack: the inverse, value = z + s * (code - mid), un-rotated unless told otherwise; exact for class 16 without
 * rotation.
 *
 * Reached on N(0, 1) rows of 128: mean squared error <= 0.12, 0.038, 0.012 at 2, 3, 4 bits, with E5M3 scales at most 2
 * percent more than with fp16 (search: 3); at 8 bits E5M3 costs 12 percent, and with zeros half as much again. search
 * with fp16 scales: at most 0.5 percent above the best of ten factors on sigma's and min-max's scale for each row.
 * Errors: ESHAPE, EDTYPE, EDEVICE; EINVAL for classes, indices or pages out of range and for NaN or Inf in a row that a
 * page takes (CPU; checked before anything is written. CUDA leaves the check to its caller: it would have to
 * synchronize).
 * Sources: Hadamard rotation before quantization: QuaRot (arXiv 2404.00456); Gaussian step sizes: Max 1960. */
#pragma once
#include "format.h"
#include "kvcomp.h"

typedef enum { KVC_ROTATE_NONE = 0, KVC_ROTATE_HADAMARD = 1 } kvc_rotation;
typedef enum { KVC_SCALE_SIGMA = 0, KVC_SCALE_MINMAX = 1, KVC_SCALE_SEARCH = 2 } kvc_scale;

/* c(bits): the step in sigmas. */
KVC_HD float kvc_sigma_step(int bits) { return bits == 2 ? 0.996f : bits == 3 ? 0.586f : 0.335f; }

/* Rounds a scale >= 0 (infinity too) and a finite zero to what E5M3 layouts store: step 2. */
KVC_HD void kvc_e5m3_round(float *scale, float *zero, int bits) {
    const float far = *zero < 0.0f ? -*zero : *zero, least = far / 15.875f, wanted = *scale > least ? *scale : least;
    uint32_t code = kvc_float_to_e5m3(wanted);
    const float nearest = kvc_e5m3_to_float(code);
    if ((bits == 8 ? nearest < wanted : 15.875f * nearest + 0x1p-18f < far) && code < KVC_E5M3_MOST) code++;
    *scale = kvc_e5m3_to_float(code);
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float eighths = code ? *zero * 8.0f / *scale : 0.0f;
    eighths = eighths < -128.0f ? -128.0f : eighths > 127.0f ? 127.0f : eighths;
    *zero = *scale * ((eighths + magic) - magic) * 0.125f;
}

/* The bytes of what kvc_e5m3_round made: the scale's, and above it the zero's. */
KVC_HD uint32_t kvc_e5m3_pair(float scale, float zero) {
    const int eighths = scale > 0.0f ? (int)(zero * 8.0f / scale) : 0;
    return kvc_float_to_e5m3(scale) | (uint32_t)(eighths & 0xff) << 8;
}

/* And back. */
KVC_HD float kvc_e5m3_zero(float scale, uint32_t byte) { return scale * (float)(int8_t)byte * 0.125f; }

/* Where search starts, as a part of min-max's scale: the fewer the channels, the nearer the extremes are. */
KVC_HD float kvc_search_factor(int bits, int n, int zero_point) {
    float part = 1.0f;
    if (bits == 2) part = n <= 32 ? 0.76f : n <= 64 ? 0.64f : n <= 128 ? 0.59f : 0.54f;
    if (bits == 3) part = n <= 32 ? 0.92f : n <= 64 ? 0.87f : n <= 128 ? 0.79f : 0.73f;
    if (bits == 4) part = n <= 64 ? 0.96f : n <= 128 ? 0.94f : 0.9f;
    return zero_point || bits > 3 ? part : 0.9f * part;
}

/* The mean's part of the start's zero: with few bits the extremes, which are cut off, tell less of it. */
KVC_HD float kvc_search_mean(int bits, int n) {
    return bits == 2 && n > 32 ? 0.5f : bits == 3 && n > 64 ? 0.25f : 0.0f;
}

/* How far search goes from a start to the fit for its codes: all the way, and beyond where the fit moves the outermost
 * code by a quarter of a step at most. The more channels, the farther the next fits would lie. */
KVC_HD float kvc_search_step(float start, float fit, int bits, int n, int zero_point) {
    const float way = fit < start ? start - fit : fit - start;
    if (way * (float)(2 << bits) > start) return 1.0f;
    return n <= 32 || !zero_point ? 1.5f : n < 128 ? 2.0f : 2.5f;
}

#define KVC_SEARCH_STARTS {1.0f, 0.65f, 0.8f, 0.9f, 1.12f, 1.25f} /* of symmetric layouts */

/* 2^(e - 14) for 2^e <= most < 2^(e+1), e at least -60: what a row with the largest magnitude `most` <= 2^96 is rounded
 * to. */
KVC_HD float kvc_row_unit(float most) {
    uint32_t bits;
    float unit;
    most = most > 0x1p-60f ? most : 0x1p-60f;
    memcpy(&bits, &most, 4);
    bits = (bits & 0x7f800000) - (14u << 23);
    memcpy(&unit, &bits, 4);
    return unit;
}

/* 1 / x for a power of two between 2^-126 and 2^126. */
KVC_HD float kvc_power_inverse(float power) {
    uint32_t bits;
    memcpy(&bits, &power, 4);
    bits = (254u << 23) - bits;
    memcpy(&power, &bits, 4);
    return power;
}

typedef struct kvc_pack_args {
    kvc_tensor arena;  /* out (bytes,) uint8: where pages lie */
    kvc_tensor keys;   /* in  (b,h,s,d) float32 | float16 | bfloat16, any strides with channels contiguous */
    kvc_tensor values; /* in  (b,h,s,d) as keys */
    kvc_tensor pages;  /* in  (n,) uint64: kvc_page entries; every page's bytes are written in full */
    kvc_tensor lists;  /* in  (n,) int32: list of page i, 0 .. b*h-1 */
    kvc_tensor start;  /* in  (n,) int32: where page i's indices begin in `tokens` */
    kvc_tensor tokens; /* in  (m,) int32: token indices, 0 .. s-1 */
    kvc_layout layout;
    int32_t rotation;   /* kvc_rotation */
    int32_t scale;      /* kvc_scale */
    int32_t stochastic; /* 1: stochastic rounding */
    int32_t layer;      /* for Philox's key only */
    uint64_t seed;      /* for Philox's key only */
} kvc_pack_args;

typedef struct kvc_unpack_args {
    kvc_tensor keys;   /* out (b,h,s,d) float32 | float16 | bfloat16; rows that no page names stay as they were */
    kvc_tensor values; /* out (b,h,s,d) as keys */
    kvc_tensor arena;  /* in  (bytes,) uint8 */
    kvc_tensor pages;  /* in  (n,) uint64 */
    kvc_tensor lists;  /* in  (n,) int32 */
    kvc_tensor start;  /* in  (n,) int32 */
    kvc_tensor tokens; /* in  (m,) int32 */
    kvc_layout layout;
    int32_t rotation; /* KVC_ROTATE_HADAMARD: rotate back */
} kvc_unpack_args;

typedef kvc_status kvc_pack_fn(const kvc_pack_args *args, kvc_stream stream);
typedef kvc_status kvc_unpack_fn(const kvc_unpack_args *args, kvc_stream stream);

#ifdef __cplusplus
extern "C" {
#endif
kvc_pack_fn kvc_pack_cpu, kvc_pack_cuda;
kvc_unpack_fn kvc_unpack_cpu, kvc_unpack_cuda;
/* The checks both definitions share: shapes, types, devices, classes, page bounds (index tensors: CPU only). */
kvc_status kvc_pack_check(const kvc_pack_args *args);
kvc_status kvc_unpack_check(const kvc_unpack_args *args);
#ifdef __cplusplus
}
#endif
