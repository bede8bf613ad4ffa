/* pack_lanes.cuh: a warp with 16 tokens, of which each lane has the 8 elements of a tile that format.h gives it: whose
 * they are, what is gathered for each token, and words of a page. */
#pragma once
#include "pack_job.cuh"

namespace {

/* ---- where things lie: VALUE 0 is K, 1 is V */

/* Tokens of a lane's elements, and which of them an element belongs to. */
template <int VALUE> constexpr int SLOTS = VALUE ? 4 : 2;
template <int VALUE> __device__ constexpr int slot_of(int element) {
    return VALUE ? 2 * (element & 1) + (element >> 1 & 1) : element >> 2;
}

/* Per token there is one lane (with copies) that makes its scale: the token, of 16. */
template <int VALUE> __device__ int owned_token(int lane) {
    return VALUE ? 2 * (lane & 3) + (lane >> 3 & 1) + 8 * (lane >> 4) : (lane >> 2) + 8 * (lane >> 1 & 1);
}
/* The lane that owns the token of this lane's slot. */
template <int VALUE> __device__ int owner_of(int lane, int slot) {
    return VALUE ? 16 * (slot >> 1) + 8 * (slot & 1) + (lane & 3) : (lane & 28) + 2 * slot;
}
/* Whether this lane is the one that writes for its token. */
template <int VALUE> __device__ bool writes(int lane) { return !(lane & (VALUE ? 4 : 1)); }

/* ---- from lanes to owners, and back */

/* f over the lanes and slots of each token, at its owners. f is the same in any order. */
template <int VALUE, typename function>
__device__ float to_owner(const float (&v)[SLOTS<VALUE>], int lane, function f) {
    if constexpr (VALUE) {
        const bool far = lane & 16, odd = lane & 8;
        float two[2];
#pragma unroll
        for (int k = 0; k < 2; k++) two[k] = f(far ? v[2 + k] : v[k], __shfl_xor_sync(ALL, far ? v[k] : v[2 + k], 16));
        const float one = f(odd ? two[1] : two[0], __shfl_xor_sync(ALL, odd ? two[0] : two[1], 8));
        return f(one, __shfl_xor_sync(ALL, one, 4));
    } else {
        const bool far = lane & 2;
        const float one = f(far ? v[1] : v[0], __shfl_xor_sync(ALL, far ? v[0] : v[1], 2));
        return f(one, __shfl_xor_sync(ALL, one, 1));
    }
}

/* The same of a number for each element, in the order of a tree over the tile's channels: strides 8, 4, 2, 1. */
template <int VALUE, typename function> __device__ float tree_to_owner(const float (&v)[8], int lane, function f) {
    if constexpr (VALUE) {
        float four[4];
#pragma unroll
        for (int e = 0; e < 4; e++) four[slot_of<1>(e)] = f(v[e], v[e + 4]);
        return to_owner<1>(four, lane, f);
    } else {
        const bool far = lane & 2, odd = lane & 1;
        float four[4], two[2];
#pragma unroll
        for (int i = 0; i < 4; i++) four[i] = f(far ? v[4 + i] : v[i], __shfl_xor_sync(ALL, far ? v[i] : v[4 + i], 2));
#pragma unroll
        for (int i = 0; i < 4; i += 2)
            two[i / 2] = f(odd ? four[i + 1] : four[i], __shfl_xor_sync(ALL, odd ? four[i] : four[i + 1], 1));
        const float one = f(two[0], two[1]);
        return f(one, __shfl_xor_sync(ALL, one, 1));
    }
}

template <int VALUE> __device__ void from_owner(float (&out)[SLOTS<VALUE>], float v, int lane) {
#pragma unroll
    for (int k = 0; k < SLOTS<VALUE>; k++) out[k] = __shfl_sync(ALL, v, owner_of<VALUE>(lane, k));
}

/* ---- words */

/* The larger magnitudes of two 16-bit floats in a word; the signs are anything. */
template <int HALF> __device__ uint32_t largest(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
    uint32_t most;
    if (HALF == KVC_BFLOAT16)
        asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    else
        asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
#else
    return __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu);
#endif
}

__device__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

/* A lane's 8 codes of a tile, with anything above their low bytes: in nibbles, where 4-bit words have them, or (eight)
 * in bytes, e = 4.. in another word `second` words farther. */
__device__ void put_tile(uint32_t *to, int second, const uint32_t (&code)[8], bool eight) {
    const uint32_t low = low_bytes(code[0], code[1], code[2], code[3]);
    const uint32_t high = low_bytes(code[4], code[5], code[6], code[7]);
    to[0] = low + high * (eight ? 0 : 16);
    if (eight) to[second] = high;
}

/* Words of a page from the tiles' words: [tile (8 bits: tile, then tile + 4)][channel tile][lane]. */
template <int TILES> __device__ void write_tile_words(uint32_t *words, const uint32_t *stage, int bits, int value) {
    constexpr int STEP = 32 * TILES;
#pragma unroll
    for (int at = threadIdx.x; at < STEP; at += THREADS) {
        uint32_t w[4];
#pragma unroll
        for (int t = 0; t < 4; t++) w[t] = stage[t * STEP + at];
        uint32_t *to = words + kvc_word_index(bits, KVC_PAGE_TOKENS, at / 32, at % 32, 0);
        if (bits == 4) {
            *(uint4 *)to = make_uint4(w[0], w[1], w[2], w[3]);
        } else if (bits == 8) {
            *(uint4 *)to = make_uint4(w[0], w[1], w[2], w[3]);
            *(uint4 *)(to + 128) =
                make_uint4(stage[4 * STEP + at], stage[5 * STEP + at], stage[6 * STEP + at], stage[7 * STEP + at]);
        } else {
            constexpr uint32_t low = 0x33333333u, high = 0x11111111u;
            const uint32_t a = (w[0] & low) | (w[1] & low) << 2, b = (w[2] & low) | (w[3] & low) << 2;
            *(uint2 *)to = make_uint2(a, b);
            if (bits == 3)
                words[kvc_word_index(3, KVC_PAGE_TOKENS, at / 32, at % 32, 2)] =
                    (w[0] >> 2 & high) | (w[1] >> 1 & high << 1) | (w[2] & high << 2) | (w[3] << 1 & high << 3);
        }
    }
}

} // namespace
