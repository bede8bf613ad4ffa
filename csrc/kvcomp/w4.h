/* w4.h: 4-bit weights with packed scales: weights -> packed bytes, and x -> x * W^T (+ bias) straight from them.
 *
 * A weight is q * s, q = -8..7, s the scale of its row's group of 32, 64 or 128 consecutive inputs. A scale is a code
 * of 5 exponent and x mantissa bits (E5Mx, x = 0..10, no sign), or fp16 (scale_bits -1, "exact"): the fp16 number whose
 * upper bits it is, times 2^exponent, one exponent for the whole matrix: s = fp16(code << (10 - x)) * 2^exponent. So
 * code 0 is 0, subnormals count, the largest exponent field is 30, and what is larger saturates at
 * (2 - 2^-x) * 2^(15 + exponent). A group of zeros has scale 0, and a scale that rounds to 0 makes a group of zeros.
 * The method is that of maia-inspired-phi35-smq (seed 004), with the bits really packed and the range defined.
 *
 * Packed bytes. Rows (outputs, n of them, padded to 64) and inputs (k, padded to the block) are cut into blocks of
 * 64 x 128, or 64 x 256 where scales of 64 x 128 would not fill 16 bytes (groups of 128, an odd number of bits); a
 * strip is the blocks of 64 rows, and strips follow each other. What pads has scale 0. A block:
 *
 *   [ codes: per 64 inputs, per 16 rows, per lane: 4 words ][ scales: per group, per plane, per r = 0..7: 8 codes ]
 *
 * Codes are q + 8. The 4 words of a lane (= 4*r + c, r = 0..7, c = 0..3) are 4 steps of 16 inputs; a step of 16 rows is
 * what one m16n8k16 instruction, or one warp of a wgmma, takes as its first operand: element e = 0..7 of a lane is
 * row r + 8*(e>>1&1), input 2*c + (e&1) + 8*(e>>2). Element e lies at bit 16*(e&1) + 4*(e>>1) of the word, which is
 * stored rotated left by 2 bits: so masks make fp16 or bf16 numbers of codes without shifts (kvc_w4_shift).
 * Scales: bits of a code are cut from the top into planes of 16, 8, 4, 2, 1 bits; a plane holds for each r the pieces
 * of the rows r + 8*j, j = 0..7, little-endian, plane_bits bytes in all: what a lane wants is one aligned load. */
#pragma once
#include "format.h"
#include "kvcomp.h"

#define KVC_W4_ROWS 64
#define KVC_W4_MOST_SCALE_BITS 10
#define KVC_W4_MOST_ROUNDED_BITS 14 /* of kvc_w4_scales */
#define KVC_W4_MOST_EXPONENT 120    /* and its negative */
#define KVC_W4_MOST_PARTS 8
#define KVC_W4_AUTO INT32_MIN /* exponent: chosen so that the largest scale lies two binades below saturation */

typedef enum { KVC_W4_FLOOR = 0, KVC_W4_NEAREST = 1, KVC_W4_SEARCH = 2 } kvc_w4_rounding;

typedef struct {
    int64_t n, k;       /* rows (outputs), inputs */
    int32_t group;      /* 32, 64, 128 */
    int32_t scale_bits; /* mantissa bits of scales, 0..10; -1: fp16 */
    int32_t exponent;   /* -120..120; KVC_W4_AUTO for pack only */
} kvc_w4_shape;

/* scales -> the nearest (KVC_W4_NEAREST, ties to even) or next smaller (KVC_W4_FLOOR) numbers that codes stand for.
 * scale_bits 0..14 or -1 (as they are). Errors: EDTYPE, ESHAPE, EINVAL (a negative or non-finite scale, too). */
typedef struct {
    kvc_tensor out;    /* out, any shape, float32, contiguous */
    kvc_tensor scales; /* in, the same */
    int32_t scale_bits, exponent, rounding;
} kvc_w4_scales_args;

/* weights -> packed bytes. s = max|w| / 7 over the group, rounded; q = w / s, ties to even, clipped. KVC_W4_SEARCH: of
 * the codes between 0.5 and 1.1 of max|w| / 7 (fp16: 40 of them and the least-squares fit of the best) the one with the
 * least squared error. Weights are finite (EINVAL). `exponent` is what was used, chosen or given. */
typedef struct {
    kvc_tensor packed;  /* out (kvc_w4_bytes,) uint8 */
    kvc_tensor weights; /* in  (n,k) float32 | float16 | bfloat16, last axis contiguous */
    kvc_w4_shape shape;
    int32_t rounding; /* kvc_w4_rounding */
    int32_t threads;  /* 0: as many as kvc_threads() */
    int32_t *exponent;
} kvc_w4_pack_args;

/* packed bytes -> q * s, or q + 8 and s apart. */
typedef struct {
    kvc_tensor out;    /* out (n,k) float32 | float16 | bfloat16; optional */
    kvc_tensor codes;  /* out (n,k) uint8, 0..15; optional */
    kvc_tensor scales; /* out (n, ceil(k/group)) float32; optional */
    kvc_tensor packed; /* in  (kvc_w4_bytes,) uint8, 16-aligned */
    kvc_w4_shape shape;
    int32_t threads;
} kvc_w4_unpack_args;

/* One of several matrices that are multiplied as one, stacked along their rows. */
typedef struct {
    int64_t n;        /* rows; whole strips, but of the last one */
    int32_t exponent; /* -120..120 */
} kvc_w4_part;

/* out = x * W^T + bias; sums in fp32. W may be several matrices of one k, group and scale_bits, whose packed bytes
 * follow each other; their products follow each other in the rows of out, and their biases in bias. Bound against fp64,
 * with S = sum |x| |q s| of an element: 2^-20 * S, and half a unit of the output's type. CUDA, more than 32 rows of x:
 * 2^-16 * S, and q * s is rounded to x's type first, 2^-12 * S (fp16) or 2^-9 * S (bf16; scales of more than 7 mantissa
 * bits twice that) more; nothing where x's type has the bits: fp16 up to E5M5, bf16 up to E5M4 (fp16 beyond, and fp16
 * scales: 2^(exponent-21) of a weight more, where q * s / 16 is subnormal). CPU: where the processor multiplies pairs
 * of bf16 (AVX512-BF16), an x of bf16 below 2^-126 counts as 0 in products of five and more rows. Deterministic for one
 * device. Errors: ESHAPE, EDTYPE, EINVAL.
 */
typedef struct {
    kvc_tensor out;       /* out (m,n) float32 | float16 | bfloat16, last axis contiguous */
    kvc_tensor x;         /* in  (m,k) float16 | bfloat16 (CPU: float32, too), last axis contiguous */
    kvc_tensor packed;    /* in  (kvc_w4_bytes,) uint8, 16-aligned */
    kvc_tensor bias;      /* in  (n,) float32 | float16 | bfloat16; optional */
    kvc_tensor workspace; /* (bytes,) uint8; CUDA only: kvc_w4_workspace_cuda bytes that are 0xFF before the first call,
                           * which every call leaves so; one for each stream and each recorded graph */
    kvc_w4_shape shape;
    kvc_w4_part parts[KVC_W4_MOST_PARTS]; /* shape.n rows in all */
    int32_t part_count;                   /* 0: W is one matrix; else shape.exponent is not looked at */
    int32_t threads;                      /* CPU; 0: as many as kvc_threads() */
    int32_t early; /* CUDA only. 1: nothing that the stream may still be doing writes packed: reading overlaps it */
} kvc_w4_matmul_args;

typedef kvc_status kvc_w4_matmul_fn(const kvc_w4_matmul_args *args, kvc_stream stream);

/* ---- the format; all uses of it go through these */

KVC_HD int kvc_w4_code_bits(int scale_bits) { return scale_bits < 0 ? 16 : 5 + scale_bits; }

/* fp16's bits of a scale's code. */
KVC_HD uint32_t kvc_w4_scale_half(uint32_t code, int scale_bits) {
    return scale_bits < 0 ? code : code << (10 - scale_bits);
}

/* Inputs of a block, 128 or 256. */
KVC_HD int kvc_w4_block_inputs(int group, int scale_bits) {
    return group == 128 && kvc_w4_code_bits(scale_bits) % 2 != 0 ? 256 : 128;
}

KVC_HD int kvc_w4_code_bytes(int group, int scale_bits) {
    return KVC_W4_ROWS / 2 * kvc_w4_block_inputs(group, scale_bits);
}

/* Bytes of the scales of 64 rows and one group. */
KVC_HD int kvc_w4_group_bytes(int scale_bits) { return KVC_W4_ROWS / 8 * kvc_w4_code_bits(scale_bits); }

/* A multiple of 16. */
KVC_HD int kvc_w4_block_bytes(int group, int scale_bits) {
    return kvc_w4_code_bytes(group, scale_bits) +
           kvc_w4_block_inputs(group, scale_bits) / group * kvc_w4_group_bytes(scale_bits);
}

KVC_HD int64_t kvc_w4_strips(int64_t n) { return n / KVC_W4_ROWS + (n % KVC_W4_ROWS != 0); }

KVC_HD int64_t kvc_w4_blocks(int64_t k, int group, int scale_bits) {
    const int inputs = kvc_w4_block_inputs(group, scale_bits);
    return k / inputs + (k % inputs != 0);
}

/* 32-bit word of a block that holds the code of (row 0..63, input of the block), and the code's first bit in it once
 * the word has been rotated right by 2. */
KVC_HD int kvc_w4_word(int row, int input) {
    const int lane = 4 * (row & 7) + (input % 8 >> 1);
    return ((input / 64 * 4 + row / 16) * 32 + lane) * 4 + input / 16 % 4;
}
KVC_HD int kvc_w4_shift(int row, int input) { return 16 * (input & 1) + 4 * ((row >> 3 & 1) + 2 * (input >> 3 & 1)); }

/* The exponent of the matrix that has a row of W. */
static inline int kvc_w4_exponent_of(const kvc_w4_matmul_args *args, int64_t row) {
    if (args->part_count == 0) return args->shape.exponent;
    int i = 0;
    for (; i < args->part_count - 1 && row >= args->parts[i].n; i++) row -= args->parts[i].n;
    return args->parts[i].exponent;
}

#ifdef __cplusplus
extern "C" {
#endif
kvc_w4_matmul_fn kvc_w4_matmul_cpu, kvc_w4_matmul_cuda;
kvc_status kvc_w4_scales(const kvc_w4_scales_args *args);
kvc_status kvc_w4_pack(const kvc_w4_pack_args *args);
kvc_status kvc_w4_unpack(const kvc_w4_unpack_args *args);
/* The checks both definitions share: all that need no tensor's data. */
kvc_status kvc_w4_matmul_check(const kvc_w4_matmul_args *args);
kvc_status kvc_w4_shape_check(const char *op, const kvc_w4_shape *shape);
/* Bytes of packed weights; 0 without rows or inputs, INT64_MAX where that overflows. */
int64_t kvc_w4_bytes(int64_t n, int64_t k, int32_t group, int32_t scale_bits);
/* CUDA: for x of up to m rows, on any device of this machine. */
int64_t kvc_w4_workspace_cuda(int64_t m, int64_t n, int64_t k);
#ifdef __cplusplus
}
#endif
