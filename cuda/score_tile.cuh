/* score_tile.cuh: rows of queries and keys on their way from memory through a ring of tiles in shared memory to the
 * tensor cores.
 *
 * A block of warps holds some rows in registers, as the 16-row side of the products, and lets tiles of the other rows
 * pass by: queries stay and keys pass in score's first pass, the other way round in its second. Everything is counted
 * in steps of 32 bytes of a row: 16 channels of 16 bits for m16n8k16, 8 channels of float32 for m16n8k8. The fragments
 * of both have the same bytes in the same places, so that float32 differs only in the products.
 *
 * Rows in shared memory are 16 bytes longer than what they hold: an odd number of 16-byte pieces, so that the 8 rows
 * that ldmatrix reads at once lie in different banks whatever the head dimension. */
#pragma once
#include "hopper.cuh"

namespace {

constexpr unsigned ALL = 0xffffffffu;

/* Sizes for rows of D elements. */
template <int DTYPE, int D> struct shape {
    static constexpr int dtype = DTYPE;
    static constexpr int bytes = D * (DTYPE == KVC_FLOAT32 ? 4 : 2);
    static constexpr int steps = bytes / 32;
    static constexpr int pitch = bytes + 16;
    static constexpr int m_tiles = DTYPE == KVC_FLOAT32 || steps > 8 ? 1 : 2; /* of 16 rows that a warp holds */
    static constexpr int warps = steps > 16 ? 4 : 8;
    static constexpr int threads = 32 * warps;
    static constexpr int held = warps * m_tiles * 16;        /* rows that a block holds */
    static constexpr int passing = m_tiles == 2 ? 64 : 32;   /* rows of a tile that passes by */
    static constexpr int ring = held / passing + 1;          /* tiles: all that is held, and the first to pass */
    static constexpr int tile_bytes = passing * (pitch + 8); /* rows, and 8 bytes that go with each */
    static constexpr int shared_bytes = ring * tile_bytes;
    static_assert(bytes % 32 == 0 && held % passing == 0, "whole steps and tiles");
};

/* ---- where rows come from; rows that are not there are zeros, and never read */

struct key_rows {
    const char *base;
    int64_t stride;
    int low, high; /* rows low .. high-1 exist */
    int type;
    bool pieces; /* every row begins at a multiple of 16 bytes and has the type that the products want */
    __device__ bool has(int row) const { return row >= low && row < high; }
    __device__ const char *at(int row) const { return base + row * stride; }
};

/* Row i is query head i % group, window query i / group. */
struct query_rows {
    const char *base;
    int64_t head, token; /* strides */
    uint32_t group, inverse;
    int high;
    int type;
    bool pieces;
    __device__ bool has(int row) const { return row < high; }
    __device__ const char *at(int row) const {
        uint32_t query = __umulhi((uint32_t)row, inverse), of = (uint32_t)row - query * group;
        if (of >= group) { /* inverse is rounded down */
            query += 1;
            of -= group;
        }
        return base + query * token + of * head;
    }
};

/* 16 bytes of a row as the products want them, from any type and place. */
template <int DTYPE> __device__ uint4 gather(const char *row, int piece, int type) {
    if constexpr (DTYPE == KVC_FLOAT32) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            x[i] = type == KVC_FLOAT32 ? ((const float *)row)[4 * piece + i]
                                       : kvc_cuda_half_to_float(((const uint16_t *)row)[4 * piece + i], type);
        return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
    } else {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint16_t *pair = (const uint16_t *)row + 8 * piece + 2 * i;
            x[i] = pair[0] | (uint32_t)pair[1] << 16;
        }
        return make_uint4(x[0], x[1], x[2], x[3]);
    }
}

/* 16 bytes to shared memory, zeros unless `has`: nothing is read then. */
__device__ inline void copy_piece(uint32_t to, const void *from, bool has) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(has ? 16 : 0) : "memory");
}

__device__ inline void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Rows begin .. begin + passing-1 into one tile of the ring. */
template <typename S, typename Rows> __device__ void load_tile(char *tile, const Rows &from, int begin) {
    constexpr int row_pieces = S::bytes / 16, count = S::passing * row_pieces;
    if (from.pieces) {
#pragma unroll
        for (int first = 0; first < count; first += S::threads) {
            const int i = first + threadIdx.x, row = i / row_pieces, piece = i % row_pieces;
            if (count % S::threads != 0 && i >= count) break;
            const bool has = from.has(begin + row);
            copy_piece(shared_address(tile + row * S::pitch + 16 * piece),
                       has ? from.at(begin + row) + 16 * piece : from.base, has);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < count; i += S::threads) {
            const int row = i / row_pieces, piece = i % row_pieces;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (from.has(begin + row)) x = gather<S::dtype>(from.at(begin + row), piece, from.type);
            *(uint4 *)(tile + row * S::pitch + 16 * piece) = x;
        }
    }
}

/* ---- fragments and products */

__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

/* Fragments of the 16 rows at `address`, every step: rows 0-7, 8-15 of the first 16 bytes, then of the second. */
template <typename S> __device__ void load_held(uint32_t (&x)[S::steps][4], uint32_t address) {
    const int lane = threadIdx.x & 31;
    address += (lane & 15) * S::pitch + (lane >> 4) * 16;
#pragma unroll
    for (int k = 0; k < S::steps; k++) load_matrices(x[k], address + 32 * k);
}

template <int DTYPE>
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (DTYPE == KVC_BFLOAT16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else if constexpr (DTYPE == KVC_FLOAT16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* A float32 as two numbers of 11 bits: the nearest one, and what is left of it (whose own last bits the product
 * drops). */
__device__ inline void split(uint32_t x, uint32_t &high, uint32_t &low) {
    asm volatile("" : "+r"(x)); /* done again for every product: there is no room to keep what is held twice */
    high = (x + 0x1000) & 0xffffe000;
    low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}

/* x[m tile][n tile] = the rows held times 16 rows that pass by, at `address`, whose fragment addresses are the lane's.
 * KEYS_HELD only orders float32's products, so that both passes add up in the same order. */
template <typename S, bool KEYS_HELD>
__device__ void products(float (&x)[S::m_tiles][2][4], const uint32_t (&a)[S::m_tiles][S::steps][4], uint32_t address) {
#pragma unroll
    for (int m = 0; m < S::m_tiles; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < S::steps; k++) {
        uint32_t b[4];
        load_matrices(b, address + 32 * k);
        if constexpr (S::dtype != KVC_FLOAT32) {
#pragma unroll
            for (int m = 0; m < S::m_tiles; m++) {
                multiply<S::dtype>(x[m][0], a[m][k], b[0], b[1]);
                multiply<S::dtype>(x[m][1], a[m][k], b[2], b[3]);
            }
        } else {
            uint32_t b_high[4], b_low[4], a_high[4], a_low[4];
#pragma unroll
            for (int i = 0; i < 4; i++) split(b[i], b_high[i], b_low[i]);
#pragma unroll
            for (int m = 0; m < S::m_tiles; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) split(a[m][k][i], a_high[i], a_low[i]);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    if (KEYS_HELD) multiply<S::dtype>(x[m][n], a_high, b_low[2 * n], b_low[2 * n + 1]);
                    multiply<S::dtype>(x[m][n], a_low, b_high[2 * n], b_high[2 * n + 1]);
                    if (!KEYS_HELD) multiply<S::dtype>(x[m][n], a_high, b_low[2 * n], b_low[2 * n + 1]);
                    multiply<S::dtype>(x[m][n], a_high, b_high[2 * n], b_high[2 * n + 1]);
                }
            }
        }
    }
}

/* The lane's address of fragments of the 16 rows at `address`: rows 0-7 (both 16-byte halves of a step), then 8-15. */
template <typename S> __device__ uint32_t passing_address(uint32_t address) {
    const int lane = threadIdx.x & 31;
    return address + ((lane >> 4) * 8 + (lane & 7)) * S::pitch + (lane >> 3 & 1) * 16;
}

/* Holds rows low .. low + S::held-1 of `held` and lets tiles begin .. end-1 of `passing` (begin < end) pass by:
 * extra(tile in the ring, tile) adds what goes with a tile's rows by copy_piece, body(tile in the ring, tile,
 * fragments) is called when it has come. */
template <typename S, typename Held, typename Passing, typename Extra, typename Body>
__device__ void pass_by(char *ring, const Held &held, int low, const Passing &passing, int begin, int end, Extra extra,
                        Body body) {
    const auto load = [&](int at, int tile) {
        load_tile<S>(ring + at * S::tile_bytes, passing, tile * S::passing);
        extra(ring + at * S::tile_bytes, tile);
    };
#pragma unroll 1
    for (int i = 0; i < S::ring - 1; i++) load_tile<S>(ring + i * S::tile_bytes, held, low + i * S::passing);
    load(S::ring - 1, begin);
    copies_end_group();
    copies_wait<0>();
    __syncthreads();
    uint32_t a[S::m_tiles][S::steps][4];
    const int first_row = threadIdx.x / 32 * S::m_tiles * 16;
    const uint32_t mine =
        shared_address(ring + first_row / S::passing * S::tile_bytes) + first_row % S::passing * S::pitch;
#pragma unroll
    for (int m = 0; m < S::m_tiles; m++) load_held<S>(a[m], mine + m * 16 * S::pitch);
    __syncthreads();
    /* Tile begin + i lies in the ring at (ring - 1 + i) % ring: S::ring - 2 more are on their way, a group each. */
#pragma unroll 1
    for (int i = 1; i < S::ring - 1; i++) {
        if (begin + i < end) load(i - 1, begin + i);
        copies_end_group();
    }
    int at = S::ring - 1;
#pragma unroll 1
    for (int tile = begin; tile < end; tile++) {
        copies_wait<S::ring - 2>();
        __syncthreads(); /* this tile has come for all, and nobody reads the one before it any more */
        const int before = at == 0 ? S::ring - 1 : at - 1;
        if (tile + S::ring - 1 < end) load(before, tile + S::ring - 1);
        copies_end_group();
        body(ring + at * S::tile_bytes, tile, a);
        at = at == S::ring - 1 ? 0 : at + 1;
    }
    copies_wait<0>();
}

} // namespace
