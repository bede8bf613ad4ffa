/* attend_codes.cuh: a lane's words of one channel tile of 64 tokens as operands
 * of the tensor cores. */
#pragma once
#include "attend_job.cuh"

namespace {

/* (w & MASK) | (h & OTHER) */
template <uint32_t MASK, uint32_t OTHER> __device__ __forceinline__ uint32_t both(uint32_t w, uint32_t h) {
    return pick_or<MASK>(w, h & OTHER);
}

/* Bytes: rows[u][x] holds four codes of token tile u, row r + 8x. Below 8 bits rows r + 8 are 16 times too large, and
 * row r's codes are added to them: a mask less, and products' differences are exact. With 2 bits, unless ALIGNED, odd
 * tiles are 4 times too large, and what rows r + 8 of the even tile hold is added to theirs, too. */
template <int BITS, bool ALIGNED>
__device__ __forceinline__ void codes(uint32_t (&rows)[4][2], const char *tile, int lane) {
    if constexpr (BITS == 2) {
        const uint2 two = ((const uint2 *)tile)[lane];
        const uint32_t w[2] = {two.x, two.y};
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const bool odd = u & 1;
            const uint32_t x = ALIGNED && odd ? w[u >> 1] >> 2 : w[u >> 1];
            rows[u][0] = x & (ALIGNED || !odd ? 0x03030303u : 0x0c0c0c0cu);
            rows[u][1] = ALIGNED || !odd ? x & 0x33333333u : x;
        }
    } else if constexpr (BITS == 3) {
        const uint2 two = ((const uint2 *)tile)[lane];
        const uint32_t high = ((const uint32_t *)tile)[64 + lane];
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const uint32_t w = u < 2 ? two.x : two.y, x = u & 1 ? w >> 2 : w;
            const uint32_t h = u == 0 ? high << 2 : u == 1 ? high << 1 : u == 2 ? high : high >> 1;
            rows[u][1] = both<0x33333333u, 0x44444444u>(x, h);
            rows[u][0] = rows[u][1] & 0x07070707u;
        }
    } else if constexpr (BITS == 4) {
        const uint4 four = ((const uint4 *)tile)[lane];
        const uint32_t w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int u = 0; u < 4; u++) rows[u][0] = w[u] & 0x0f0f0f0fu, rows[u][1] = w[u];
    } else {
        const uint4 low = ((const uint4 *)tile)[lane], up = ((const uint4 *)tile)[32 + lane];
        rows[0][0] = low.x, rows[1][0] = low.y, rows[2][0] = low.z, rows[3][0] = low.w;
        rows[0][1] = up.x, rows[1][1] = up.y, rows[2][1] = up.z, rows[3][1] = up.w;
    }
}

/* The same of token tile u only: rows r and r + 8. Below 8 bits rows r + 8 are 16 times too large. */
template <int BITS>
__device__ __forceinline__ void tile_codes(uint32_t &low, uint32_t &up, const char *tile, int lane, int u) {
    const uint32_t *const words = (const uint32_t *)tile;
    if constexpr (BITS == 2) {
        const uint32_t w = words[2 * lane + (u >> 1)] >> 2 * (u & 1);
        low = w & 0x03030303u, up = w & 0x30303030u;
    } else if constexpr (BITS == 3) {
        const uint32_t w = words[2 * lane + (u >> 1)] >> 2 * (u & 1), bit = words[64 + lane];
        const uint32_t h = __funnelshift_l(bit, bit, 2 - u);
        low = both<0x03030303u, 0x04040404u>(w, h), up = both<0x30303030u, 0x40404040u>(w, h);
    } else if constexpr (BITS == 4) {
        const uint32_t w = words[4 * lane + u];
        low = w & 0x0f0f0f0fu, up = w & 0xf0f0f0f0u;
    } else {
        low = words[4 * lane + u], up = words[128 + 4 * lane + u];
    }
}

/* The integer that `halves` takes off codes. */
__host__ __device__ constexpr int middle_code(int bits) { return 1 << (bits - 1); }

/* A pair of fp16 integers, 0 < n < 2048. */
__host__ __device__ constexpr uint32_t pair_of(int n) {
    int e = 0;
    while (n >> e > 1) e++;
    return (uint32_t)((e + 15) << 10 | (n << (10 - e) & 1023)) * 0x10001u;
}

template <int BY> __device__ __forceinline__ uint32_t less(uint32_t x) {
    constexpr uint32_t by = pair_of(BY);
    uint32_t y;
    asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(y) : "r"(x), "r"(by));
    return y;
}

/* V's codes less middle_code as fp16: v[u] is the fragment of token tile u:
 * rows r and r + 8 of tokens 2c, 2c + 1, then of tokens 2c + 8, 2c + 9. A code
 * or-ed into a mantissa is a constant plus the code. */
template <int BITS> __device__ __forceinline__ void halves(uint32_t (&v)[4][4], const char *tile, int lane) {
    constexpr int M = middle_code(BITS);
    if constexpr (BITS == 8) {
        const uint4 low = ((const uint4 *)tile)[lane], up = ((const uint4 *)tile)[32 + lane];
        const uint32_t rows[2][4] = {{low.x, low.y, low.z, low.w}, {up.x, up.y, up.z, up.w}};
#pragma unroll
        for (int u = 0; u < 4; u++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                v[u][j] = less<1024 + M>(__byte_perm(rows[j & 1][u], 0x64646464u, j < 2 ? 0x4240 : 0x4341));
    } else { /* bytes are tokens 2c, 2c + 8, 2c + 1, 2c + 9: halves of 16 bits hold two, of which one is wanted */
        constexpr uint32_t LOW = BITS == 2 ? 0x00030003u : 0x000f000fu, UP = LOW << 4;
        uint32_t x[4][2]; /* words with both rows of a token tile, or one of each */
        if constexpr (BITS == 3) {
            codes<BITS, true>(x, tile, lane);
        } else if constexpr (BITS == 2) {
            const uint2 two = ((const uint2 *)tile)[lane];
            x[0][0] = x[0][1] = two.x, x[1][0] = x[1][1] = two.x >> 2;
            x[2][0] = x[2][1] = two.y, x[3][0] = x[3][1] = two.y >> 2;
        } else {
            const uint4 four = ((const uint4 *)tile)[lane];
            x[0][0] = x[0][1] = four.x, x[1][0] = x[1][1] = four.y;
            x[2][0] = x[2][1] = four.z, x[3][0] = x[3][1] = four.w;
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
            v[u][0] = less<1024 + M>(pick<LOW, 0x64006400u>(x[u][0]));
            v[u][1] = less<64 + M>(pick<UP, 0x54005400u>(x[u][1]));
            v[u][2] = less<1024 + M>(pick<LOW, 0x64006400u>(x[u][0] >> 8));
            v[u][3] = less<64 + M>(pick<UP, 0x54005400u>(x[u][1] >> 8));
        }
    }
}

} // namespace
