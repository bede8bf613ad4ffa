/* pack_sixteen.cuh: 16-bit halves of pages from 16-bit rows on 16-byte addresses (pack_fast.cuh), rotated in fp32.
 *
 * Four lanes take a row, 8 neighbouring channels of every 32 each. Rounded rows lie in shared memory as 16-byte chunks,
 * two a channel tile: V's channels 0..7 and 8..15, K's even and its odd ones. Words of format.h's lanes are then 8x8
 * matrices of 8 tokens and a chunk, as the matrix loads give them, K's as they are and V's transposed. */
#pragma once
#include "pack_lanes.cuh"
#include "pack_rows.cuh"

namespace {

/* Where a token's chunk lies: 8 tokens' chunks of one number are in 8 different places of four banks, and so are 4
 * chunks of a token and the same 4 of the next. */
template <int TILES> __device__ int chunk_place(int token, int chunk) {
    return 2 * TILES * token + (chunk ^ ((token & 1) << 2 | (token >> 1 & 3)));
}

/* Two rotated values, which come from at most 2^96: bfloat16 holds all that there can be. */
template <int DTYPE> __device__ uint32_t rotated_halves(float low, float high) {
    if (DTYPE != KVC_BFLOAT16) return kvc_cuda_floats_to_halves(low, high, DTYPE);
    uint32_t two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

/* This lane's channels of a row, already rotated, into the stage. */
template <int TILES, int DTYPE>
__device__ void put_halves(uint4 *stage, const float (&x)[TILES / 2][8], int token, int value, int lane) {
    const int tile = lane >> 1 & 1, part = lane & 1;
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
        uint32_t w[4];
        if (value) {
#pragma unroll
            for (int k = 0; k < 4; k++) w[k] = rotated_halves<DTYPE>(x[i][2 * k], x[i][2 * k + 1]);
            stage[chunk_place<TILES>(token, 4 * i + 2 * tile + part)] = make_uint4(w[0], w[1], w[2], w[3]);
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++)
                w[k] = rotated_halves<DTYPE>(x[i][4 * (k & 1) + (k >> 1)], x[i][4 * (k & 1) + (k >> 1) + 2]);
            uint2 *const even = (uint2 *)(stage + chunk_place<TILES>(token, 4 * i + 2 * tile));
            uint2 *const odd = (uint2 *)(stage + chunk_place<TILES>(token, 4 * i + 2 * tile + 1));
            even[part] = make_uint2(w[0], w[1]);
            odd[part] = make_uint2(w[2], w[3]);
        }
    }
}

/* A row, of which `row` is -1 or this quad's token, into the stage as token `token` of a half. */
template <int TILES, int HALF>
__device__ void put_sixteen(uint4 *stage, const call &a, const job &it, int row, int token) {
    const int lane = threadIdx.x & 31;
    const uint4 *in = (const uint4 *)(it.base + row * it.stride) + (lane & 3);
    uint4 raw[TILES / 2];
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) raw[i] = row >= 0 ? __ldcs(in + 4 * i) : make_uint4(0, 0, 0, 0);
    float x[TILES / 2][8];
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
        const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (int c = 0; c < 8; c++) x[i][c] = kvc_cuda_half_to_float((uint16_t)(words[c / 2] >> 16 * (c & 1)), HALF);
    }
    if (HALF == KVC_BFLOAT16) clamp_row(x);
    rotate_row(x);
    if (a.layout.half == KVC_BFLOAT16)
        put_halves<TILES, KVC_BFLOAT16>(stage, x, token, it.value, lane);
    else
        put_halves<TILES, KVC_FLOAT16>(stage, x, token, it.value, lane);
}

/* A half's words from the stage, after a barrier, by `warps` warps of which this is number `warp`. */
template <int TILES> __device__ void write_sixteen(const uint4 *stage, const job &it, int warp, int warps) {
    const int lane = threadIdx.x & 31, matrix = lane >> 3;
    const bool tail = it.page_tokens == KVC_TAIL_TOKENS;
#pragma unroll 4
    for (int at = warp; at < (tail ? TILES : 4 * TILES); at += warps) { /* vectors of 4 words (format.h) */
        const int tile = tail ? at : at >> 2, r = tail ? matrix : at & 3;
        const int token = (tail ? 0 : KVC_TILE * matrix) + 8 * (it.value ? r >> 1 : r & 1) + (lane & 7);
        const int chunk = 2 * tile + (it.value ? r & 1 : r >> 1);
        ((uint4 *)it.words)[32 * at + lane] = load_matrices(stage + chunk_place<TILES>(token, chunk), it.value);
    }
}

/* The token that row `row` of a page takes, -1: none. */
__device__ int token_of(const call &a, const job &it, int row) {
    const int token = row < it.page.tokens ? it.tokens[row] : -1;
    return token < a.s ? token : -1;
}

/* A page of class (16, 16), both halves at once: two warps each. */
template <int TILES, int HALF> __device__ void pack_tail(uint4 *stage, const call &a, job it) {
    const int warp = threadIdx.x / 32, row = 8 * (warp & 1) + (threadIdx.x >> 2 & 7);
    if (warp & 2) take_half(a, &it, 1);
    stage += warp & 2 ? 2 * TILES * KVC_TAIL_TOKENS : 0;
    put_sixteen<TILES, HALF>(stage, a, it, token_of(a, it, row), row);
    __syncthreads();
    write_sixteen<TILES>(stage, it, warp & 1, 2);
}

/* Of any other page the half that has 16 bits, ahead of the other one: in a loop with it this would cost registers. */
template <int TILES, int HALF> __device__ void pack_sixteen_half(uint4 *stage, const call &a, job it) {
    const int warp = threadIdx.x / 32;
    if (it.bits != 16) take_half(a, &it, 1);
#pragma unroll 1
    for (int row = threadIdx.x / 4; row < KVC_PAGE_TOKENS; row += THREADS / 4)
        put_sixteen<TILES, HALF>(stage, a, it, token_of(a, it, row), row);
    __syncthreads();
    write_sixteen<TILES>(stage, it, warp, THREADS / 32);
    __syncthreads(); /* before the stage is written again */
}

} // namespace
