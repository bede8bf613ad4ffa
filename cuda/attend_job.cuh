/* attend_job.cuh: what the attention kernel is given, its sizes, and the instructions it is made of. */
#pragma once
#include "common.cuh"
#include "kvcomp/attend.h"
#include "kvcomp/divide.h"
#include "kvcomp/pack.h"

namespace {

constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float NOTHING = -3.4028235e38f; /* a maximum over no tokens */

/* Weights are 2^(x - shift), with x the logit in bits. Times V's scale they are numbers of 16 bits, integers or
 * fp16: the shift is chosen so that a page's largest one is 2^14.5, and stays while that lies between 2^11 and
 * 64600, which fp16 holds, too. */
constexpr float SHIFT_AT = 14.5f, SHIFT_LEAST = 11.0f;
constexpr float MOST_WEIGHT = 64600.0f, LEAST_WEIGHT = 2048.0f;
/* Weights 2^-37 of the greatest one may be lost: 2^17 of them are 2^-20 of it. */
constexpr float SHIFT_NEGLIGIBLE = 26.0f;
/* Weights by themselves: below 2^40 where V's scale, at least 2^-24, has its part; a scale of 0 bounds nothing. */
constexpr float MOST_BARE_WEIGHT = 0x1p44f;

constexpr int SLOT = 4608;               /* bytes of a copy at most: 4096 of codes, 256 of
                                            scales and zeros; K and V of 2 bits */
constexpr int AHEAD = 16;                /* places of a reader's queue of table entries; a power of two */
constexpr int DRAIN_PAGES = 8;           /* the tensor cores' fp32 sums truncate: emptied
                                            into true fp32 after so many pages */
constexpr int DRAIN_PAGES_OF_CODES = 64; /* integers: below 2^29 then, and the difference to the middle is exact
                                            enough */
constexpr uint32_t EMPTY = ~0u;          /* a word of a partial result that is not there yet */

/* attend_rows (sm_90a) takes lists from so many queries on (8 are one pass of the other kernel, whose warps need
 * nothing of each other); 64 of them together up to this head dimension, else 32. */
constexpr int ROWS_LEAST = 9, ROWS_WIDE_DIM = 128;

/* K or V of a page with so many bits. */
struct alignas(16) half_facts {
    int32_t bytes;        /* 0 for bits that are no class */
    int16_t pieces, step; /* copies of it; bytes from one to the next */
    int32_t last_codes;   /* bytes of codes in the last one, behind which its scales
                             lie */
    int32_t reserved;
};

struct attend_job {
    const char *queries;
    char *out;
    int64_t q_stride[3], out_stride[3]; /* of b, hq, q in bytes */
    const char *arena;
    int64_t arena_bytes;
    const kvc_page *table;
    const kvc_list *lists;
    const int32_t *new_tokens;
    const int32_t *division;
    const kvc_page *first_entries; /* of the division: (blocks, KVC_DIVIDE_ENTRIES) */
    float *parts;                  /* (blocks * chunks, NQ, D): what blocks give to a list's first
                                      block */
    float2 *part_sums;             /* (blocks * chunks, NQ): shift, sum of weights */
    int32_t capacity, n, heads, group, q, columns, chunks, slots;
    half_facts halves[18]; /* by bits, of 64 tokens; 17: a tail page's */
    int32_t q_dtype, out_dtype, half, zero_point, e5m3, rotation, early;
    uint32_t by_heads; /* 2^32 / heads, rounded up, where heads > 1 */
    int32_t plain;     /* scales and zeros of fp16, no cap */
    float scale, softcap;
};

/* Sizes for head dimension D and NQ queries (positions x heads of a group), each in two parts: a column tile of 8 is
 * four queries. */
template <int D, int NQ> struct sizes {
    static constexpr int TILES = D / 16;
    static constexpr int QT = NQ / 4;                          /* column tiles of q */
    static constexpr int PARTS = QT < 2 ? 1 : 2;               /* that are looked at at once */
    static constexpr bool INTEGER = NQ <= 8;                   /* V's codes meet integers */
    static constexpr int VT = INTEGER ? QT : QT / 2;           /* column tiles of sums */
    static constexpr int PITCH = D + 8;                        /* floats of a row of sums in shared memory */
    static constexpr int WARPS = NQ == 4 && D <= 128 ? 12 : 8; /* that work */
    static constexpr int THREADS = (WARPS + 4) * 32;           /* and a warpgroup that fetches */
    static constexpr int QUERIES = NQ, PARTS_OF_BLOCK = WARPS, WORKING_THREADS = WARPS * 32; /* of merge_list */
    static constexpr int CODE_FRAGMENTS = QT * ((TILES + 1) / 2) * 32;                       /* uint2 each */
    static constexpr int HALF_FRAGMENTS = QT * TILES * 32;
    static constexpr int SUMS_BYTES = WARPS * NQ * PITCH * 4;
    static constexpr int ITEMS = NQ * D / 4;                                       /* of a merge: four channels */
    static constexpr int GROUPS = WARPS * 32 < 2 * ITEMS ? 1 : WARPS * 32 / ITEMS; /* of threads that merge */
    static constexpr int FIXED_BYTES =
        (CODE_FRAGMENTS + HALF_FRAGMENTS) * 8 + SUMS_BYTES + (WARPS + 1) * NQ * 16 + GROUPS * NQ * 8;
};

/* Channel tiles of a copy. P: tokens of the page. */
constexpr int tile_bytes(int bits, int tokens) { return tokens * 16 * bits / 8; }
constexpr int tiles_of(int bits, int tokens) {
    return bits == 2 ? 16 : bits == 3 ? 8 : 4096 / tile_bytes(bits, tokens);
}

template <int BITS, int P> struct piece {
    static constexpr int TILE_BYTES = tile_bytes(BITS, P), TILES = tiles_of(BITS, P);
};

/* ---- instructions */

__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The same into sums that other kinds share. */
__device__ __forceinline__ void mma_f16(uint32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                        uint32_t b0, uint32_t b1) {
    float f[4] = {__uint_as_float(d[0]), __uint_as_float(d[1]), __uint_as_float(d[2]), __uint_as_float(d[3])};
    mma_f16(f, a0, a1, a2, a3, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; i++) d[i] = __float_as_uint(f[i]);
}

__device__ __forceinline__ void mma_bf16(uint32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
    float f[4] = {__uint_as_float(d[0]), __uint_as_float(d[1]), __uint_as_float(d[2]), __uint_as_float(d[3])};
    mma_bf16(f, a0, a1, a2, a3, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; i++) d[i] = __float_as_uint(f[i]);
}

__device__ __forceinline__ void mma_u8u8(uint32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_u8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Of 16 channels only. */
__device__ __forceinline__ void mma_u8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 "
        "{%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

/* An 8 x 8 block of 16-bit values, transposed. */
__device__ __forceinline__ uint32_t transposed(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_of(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}

/* (w & MASK) | OR */
template <uint32_t MASK, uint32_t OR> __device__ __forceinline__ uint32_t pick(uint32_t w) {
    uint32_t r;
    asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(r) : "r"(w), "n"(MASK), "n"(OR));
    return r;
}

/* (w & MASK) | other */
template <uint32_t MASK> __device__ __forceinline__ uint32_t pick_or(uint32_t w, uint32_t other) {
    uint32_t r;
    asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(r) : "r"(w), "n"(MASK), "r"(other));
    return r;
}

__device__ __forceinline__ uint32_t half2_bits(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ uint32_t bfloat2_bits(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ float4 load_volatile(const float4 *p) {
    float4 v;
    asm volatile("ld.volatile.global.v4.f32 {%0,%1,%2,%3},[%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ float2 load_volatile(const float2 *p) {
    float2 v;
    asm volatile("ld.volatile.global.v2.f32 {%0,%1},[%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}

} // namespace
