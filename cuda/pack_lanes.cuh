/* pack_lanes.cuh: a warp with 16 tokens, of which each lane has 8 elements of a tile: whose they are in format.h's
 * order, and words of a page. */
#pragma once
#include "pack_job.cuh"

namespace {

/* ---- where things lie: VALUE 0 is K, 1 is V */

/* Which of its 4 tokens an element of V belongs to. */
__device__ constexpr int v_slot_of(int element) { return 2 * (element & 1) + (element >> 1 & 1); }

/* Per token there is one lane (with copies) that makes its scale: the token, of 16. */
template <int VALUE> __device__ int owned_token(int lane) {
    return VALUE ? 2 * (lane & 3) + (lane >> 3 & 1) + 8 * (lane >> 4) : (lane >> 2) + 8 * (lane >> 1 & 1);
}
/* The lane that owns the token of this lane's slot: of K's two, or V's four. */
template <int VALUE> __device__ int owner_of(int lane, int slot) {
    return VALUE ? 16 * (slot >> 1) + 8 * (slot & 1) + (lane & 3) : (lane & 28) + 2 * slot;
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

__device__ uint4 load_matrices(const uint4 *row, int transposed) {
    uint4 v;
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(at)
                     : "memory");
    return v;
}

/* A lane's words of a channel tile in four tiles, which lie `step` apart. TURNED: they lie as K's do, a token's four
 * lanes side by side, but each 16 bits belong to channels g and g + 8. */
__device__ uint4 load_tiles(const uint32_t *stage, int step, bool turned) {
    const int lane = threadIdx.x & 31;
    if (turned) return load_matrices((const uint4 *)(stage + (lane >> 3) * step + 4 * (lane & 7)), 1);
    return make_uint4(stage[lane], stage[step + lane], stage[2 * step + lane], stage[3 * step + lane]);
}

/* Of the four nibbles of each 16 bits the middle ones change places: two channels and two tokens are turned. */
__device__ uint32_t turn_nibbles(uint32_t w) {
    return (w & 0xf00ff00fu) | (w << 4 & 0x0f000f00u) | (w >> 4 & 0x00f000f0u);
}

/* Words of a page from the tiles' words: [tile (8 bits: tile, then tile + 4)][channel tile][lane]. */
template <int TILES> __device__ void write_tile_words(uint32_t *words, const uint32_t *stage, int bits, bool turned) {
    constexpr int STEP = 32 * TILES, WARPS = THREADS / 32, ROUNDS = (TILES + WARPS - 1) / WARPS;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const auto each = [=](auto visit) {
#pragma unroll
        for (int k = 0; k < ROUNDS; k++)
            if (TILES % WARPS == 0 || warp + WARPS * k < TILES) visit(k);
    };
    uint4 w[ROUNDS];
    stage += 32 * warp;
    each([&](int k) { w[k] = load_tiles(stage + 32 * WARPS * k, STEP, turned); });
    uint32_t *to = words + kvc_word_index(bits, KVC_PAGE_TOKENS, warp, lane, 0);
    if (bits == 4) {
        if (turned)
            each([&](int k) {
                w[k] =
                    make_uint4(turn_nibbles(w[k].x), turn_nibbles(w[k].y), turn_nibbles(w[k].z), turn_nibbles(w[k].w));
            });
        each([&](int k) { *(uint4 *)(to + 32 * 4 * WARPS * k) = w[k]; });
    } else if (bits == 8) {
        /* Turned, bytes are of channels g and g + 8 by turns. */
        const uint32_t first = turned ? 0x6240 : 0x3210, second = turned ? 0x7351 : 0x7654;
        each([&](int k) {
            const uint4 far = load_tiles(stage + 4 * STEP + 32 * WARPS * k, STEP, turned);
            uint4 *const eight = (uint4 *)(to + 32 * 8 * WARPS * k);
            eight[0] = make_uint4(__byte_perm(w[k].x, far.x, first), __byte_perm(w[k].y, far.y, first),
                                  __byte_perm(w[k].z, far.z, first), __byte_perm(w[k].w, far.w, first));
            eight[32] = make_uint4(__byte_perm(w[k].x, far.x, second), __byte_perm(w[k].y, far.y, second),
                                   __byte_perm(w[k].z, far.z, second), __byte_perm(w[k].w, far.w, second));
        });
    } else {
        constexpr uint32_t low = 0x33333333u, high = 0x11111111u;
        each([&](int k) {
            uint2 two = make_uint2((w[k].x & low) | (w[k].y & low) << 2, (w[k].z & low) | (w[k].w & low) << 2);
            if (turned) two = make_uint2(turn_nibbles(two.x), turn_nibbles(two.y));
            *(uint2 *)(to + 32 * bits * WARPS * k) = two;
        });
        if (bits == 3)
            each([&](int k) {
                const uint32_t third =
                    (w[k].x >> 2 & high) | (w[k].y >> 1 & high << 1) | (w[k].z & high << 2) | (w[k].w << 1 & high << 3);
                words[kvc_word_index(3, KVC_PAGE_TOKENS, warp + WARPS * k, lane, 2)] =
                    turned ? turn_nibbles(third) : third;
            });
    }
}

} // namespace
