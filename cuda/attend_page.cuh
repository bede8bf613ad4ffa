/* attend_page.cuh: one page of one warp: logits from K's codes, weights, V's codes times weights.
 *
 * The 16-row side of every product is tokens (K) or channels (V), the 8-column side is queries. Fragments are a lane's
 * words of the page as they lie (format.h): lane = 4*r + c holds rows r and r + 8.
 *
 * K below 16 bits: integer products with q in 16-bit fixed point, its high and low bytes in columns of their own. Codes
 * stay where they are in their byte: a mask is all it takes, and powers of two go into the scale. Class 16: q in two
 * 16-bit floats. Logits are in bits (log2 e is in q's factor).
 *
 * V: a code or-ed into a mantissa is a constant plus the code. Constants above 16 are subtracted, as the tensor cores'
 * sums, which they would swell, are truncated; the share of what is left comes from a product of its own (`bias`).
 * The scale is in the weight, the zero in `zeros`.
 */
#pragma once
#include "attend_ring.cuh"

namespace {

/* The code whose value V's sums are taken around, and the zero's share is moved to. */
__host__ __device__ constexpr int sum_code(int bits) { return bits == 2 ? 2 : bits == 3 ? 4 : bits == 4 ? 6 : 128; }

/* A pair of fp16 numbers x: multiples of 1/2, of 1 from 1024 on, below 2048. */
__host__ __device__ constexpr uint32_t pair_of(float x) {
    int n = (int)(2 * (x < 0 ? -x : x)), e = 0;
    if (n == 0) return 0;
    while (n >> e > 1) e++;
    return (uint32_t)((x < 0 ? 0x8000 : 0) | (e + 14) << 10 | ((e > 10 ? n >> (e - 10) : n << (10 - e)) & 1023)) *
           0x10001u;
}

template <int BY> __device__ __forceinline__ uint32_t less(uint32_t x) {
    constexpr uint32_t by = pair_of(BY);
    uint32_t y;
    asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(y) : "r"(x), "r"(by));
    return y;
}

/* V's codes of one word as half2: rows r and r + 8 of tokens 2c, 2c + 1, then of tokens 2c + 8, 2c + 9; in rows r less
 * sum_code, in rows r + 8 with a constant. */
__device__ __forceinline__ void four_bits(uint32_t (&a)[4], uint32_t w) {
    const uint32_t other = __funnelshift_r(w, w, 8);
    a[0] = less<256 + sum_code(4)>(pick<0x003c003cu, 0x5c005c00u>(w));
    a[1] = pick<0x03c003c0u, 0x4c004c00u>(w);
    a[2] = less<256 + sum_code(4)>(pick<0x003c003cu, 0x5c005c00u>(other));
    a[3] = pick<0x03c003c0u, 0x4c004c00u>(other);
}

template <int ODD> __device__ __forceinline__ void two_bits(uint32_t (&a)[4], uint32_t w, uint32_t other) {
    constexpr int large = (ODD ? 64 : 256) + sum_code(2);
    a[0] = less<large>(ODD ? pick<0x00300030u, 0x54005400u>(w) : pick<0x000c000cu, 0x5c005c00u>(w));
    a[1] = ODD ? pick<0x03000300u, 0x44004400u>(w) : pick<0x00c000c0u, 0x4c004c00u>(w);
    a[2] = less<large>(ODD ? pick<0x00300030u, 0x54005400u>(other) : pick<0x000c000cu, 0x5c005c00u>(other));
    a[3] = ODD ? pick<0x03000300u, 0x44004400u>(other) : pick<0x00c000c0u, 0x4c004c00u>(other);
}

/* w, high: low two bits, high bit shifted to its place beside them. */
template <int ODD> __device__ __forceinline__ void three_bits(uint32_t &low, uint32_t &up, uint32_t w, uint32_t high) {
    if (ODD) {
        low = less<256 + sum_code(3)>(pick_or<0x00100010u>(high, pick<0x000c000cu, 0x5c005c00u>(w)));
        up = pick_or<0x01000100u>(high, pick<0x00c000c0u, 0x4c004c00u>(w));
    } else {
        low = less<1024 + sum_code(3)>(pick_or<0x00040004u>(high, pick<0x00030003u, 0x64006400u>(w)));
        up = less<64 + sum_code(3)>(pick_or<0x00400040u>(high, pick<0x00300030u, 0x54005400u>(w)));
    }
}

/* The constant in rows r + 8 of a token tile; 0: none. */
__host__ __device__ constexpr int kept(int bits, int odd) {
    return bits == 4 ? 16 : bits == 2 ? (odd ? 4 : 16) : bits == 3 && odd ? 16 : 0;
}

template <int D, int NQ> struct worker {
    using S = sizes<D, NQ>;
    static constexpr int TILES = S::TILES, CT = S::CT, TS = S::TS, QT = S::QT;
    static constexpr bool PAIR = S::PAIR;

    const attend_job &a;
    ring copies;
    const uint2 *code_fragments, *half_fragments;
    float *sums; /* (NQ, PITCH): this warp's, emptied into */
    int lane, r, c;
    bool upper; /* with PAIR: of the lanes that have the odd token tiles */
    /* of a lane's two queries in each column tile */
    float factor[CT][2], total[CT][2]; /* of an integer product; of zeros: sum of q */
    int hidden[CT][2];                 /* how many of the list's last tokens it does not see */
    float shift[CT][2], drained[CT][2], weights[CT][2], zeros[CT][2];
    float sum[TILES][CT][4], bias[CT][4];
    int since_drain;
    int joint; /* bytes of K in the slot that holds the whole page; 0: K and V have slots of their own */
    bool has_sums;
    int tail_page, tail_tokens; /* of the list */

    __device__ __forceinline__ worker(const attend_job &a, const rings &all, int warp)
        : a(a), copies(all, warp), lane(threadIdx.x & 31), r(lane >> 2), c(lane & 3), upper(c >= 2) {}

    /* The first column tile's query of this lane. */
    __device__ __forceinline__ int query(int ct, int g) const { return PAIR ? (c & 1) * 2 + g : 8 * ct + 2 * c + g; }

    /* Token of the page in a lane's token tile u, row half x. */
    __device__ __forceinline__ int token(int u, int x) const { return 16 * (PAIR ? 2 * u + upper : u) + r + 8 * x; }

    __device__ __forceinline__ void begin_list(int list) {
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
                shift[ct][g] = drained[ct][g] = NOTHING;
                weights[ct][g] = zeros[ct][g] = 0;
            }
        clear_sums();
        since_drain = 0;
        has_sums = false;
        if (a.q > 1) { /* then the kernel before has ended (`early`) */
            tail_page = a.lists[list].tail_page;
            tail_tokens = a.lists[list].tail_tokens;
        }
    }

    __device__ __forceinline__ void clear_sums() {
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                bias[ct][j] = 0;
#pragma unroll
                for (int i = 0; i < TILES; i++) sum[i][ct][j] = 0;
            }
    }

    /* ---- scales */

    /* Scales and zeros of this lane's tokens; `scales` is what follows a half's codes. */
    __device__ __forceinline__ void steps(float (&scale)[TS][2], float (&zero)[TS][2], const char *scales) const {
        if (!a.e5m3 && a.zero_point) {
            half2 pairs[TS][2];
#pragma unroll
            for (int u = 0; u < TS; u++)
#pragma unroll
                for (int i = 0; i < 2; i++) pairs[u][i] = ((const half2 *)scales)[token(u, i)];
#pragma unroll
            for (int u = 0; u < TS; u++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    scale[u][i] = __low2float(pairs[u][i]), zero[u][i] = __high2float(pairs[u][i]);
        } else {
            const int bytes = (a.e5m3 ? 1 : 2) * (a.zero_point ? 2 : 1);
#pragma unroll
            for (int u = 0; u < TS; u++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const char *at = scales + token(u, i) * bytes;
                    const uint32_t word = bytes == 1 ? *(const uint8_t *)at : *(const uint16_t *)at;
                    zero[u][i] = 0;
                    if (a.e5m3) {
                        scale[u][i] = __uint_as_float((word & 0xff) << 20) * 0x1p112f;
                        if (a.zero_point) zero[u][i] = scale[u][i] * (float)(int8_t)(word >> 8) * 0.125f;
                    } else {
                        scale[u][i] = __half2float(__ushort_as_half((uint16_t)word));
                    }
                }
        }
    }

    /* ---- K */

    /* The low and the high part of q beside each other in lanes c and c ^ 2 become one logit of one of two tiles. */
    template <typename number> __device__ __forceinline__ number joined(number even, number odd, number high) const {
        const number sent = upper ? even : odd, kept = upper ? odd : even;
        const number other = __shfl_xor_sync(ALL, sent, 2);
        return upper ? kept + high * other : high * kept + other;
    }

    /* Logits, not yet capped or masked, of a page of 64 tokens. */
    template <int BITS> __device__ __forceinline__ void code_logits(float (&x)[CT][TS][4]) {
        using C = piece<BITS, 64>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, VECTORS = BITS == 8 ? 2 : 1;
        constexpr int PARTS = PAIR ? 1 : 2; /* column tiles of q that belong to one of queries */
        const char *scales = nullptr;
#pragma unroll
        for (int ct = 0; ct < CT; ct++) {
            int t[4][PARTS][4] = {}, high[BITS == 3 ? 4 : 1][PARTS][4] = {};
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const char *at = copies.arrived(CT == 1 ? 0 : p);
                const int tiles = p + 1 < PIECES ? C::TILES : TILES - (PIECES - 1) * C::TILES;
                if (p == PIECES - 1) scales = at + tiles * C::TILE_BYTES;
#pragma unroll
                for (int i = 0; i < tiles; i += 2) {
                    uint32_t w[2][4 * VECTORS], h[2];
                    uint2 q[PARTS];
#pragma unroll
                    for (int k = 0; k < PARTS; k++)
                        q[k] =
                            code_fragments[((ct * PARTS + k) * ((TILES + 1) / 2) + (p * C::TILES + i) / 2) * 32 + lane];
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        const char *tile = at + (i + k) * C::TILE_BYTES;
                        if (i + k >= tiles) continue;
                        if constexpr (BITS == 2 || BITS == 3) {
                            const uint2 two = ((const uint2 *)tile)[lane];
                            w[k][0] = two.x, w[k][1] = two.y;
                            if (BITS == 3) h[k] = ((const uint32_t *)tile)[64 + lane];
                        } else {
#pragma unroll
                            for (int v = 0; v < VECTORS; v++) {
                                const uint4 four = ((const uint4 *)tile)[32 * v + lane];
                                w[k][4 * v] = four.x, w[k][4 * v + 1] = four.y;
                                w[k][4 * v + 2] = four.z, w[k][4 * v + 3] = four.w;
                            }
                        }
                    }
#pragma unroll
                    for (int u = 0; u < 4; u++) {
                        uint32_t rows[2][2];
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            if (i + k >= tiles) continue;
                            if constexpr (BITS == 8) {
                                rows[k][0] = w[k][u], rows[k][1] = w[k][4 + u];
                            } else if constexpr (BITS == 4) {
                                rows[k][0] = w[k][u] & 0x0f0f0f0fu, rows[k][1] = w[k][u] & 0xf0f0f0f0u;
                            } else {
                                rows[k][0] = w[k][u >> 1] & 0x03030303u << 2 * (u & 1);
                                rows[k][1] = w[k][u >> 1] & 0x30303030u << 2 * (u & 1);
                            }
                        }
#pragma unroll
                        for (int k = 0; k < PARTS; k++)
                            if (i + 1 < tiles)
                                mma_u8(t[u][k], rows[0][0], rows[0][1], rows[1][0], rows[1][1], q[k].x, q[k].y);
                            else
                                mma_u8(t[u][k], rows[0][0], rows[0][1], q[k].x);
                        if constexpr (BITS == 3) {
#pragma unroll
                            for (int k = 0; k < PARTS; k++)
                                if (i + 1 < tiles)
                                    mma_u8(high[u][k], h[0] & 0x01010101u << u, h[0] & 0x10101010u << u,
                                           h[1] & 0x01010101u << u, h[1] & 0x10101010u << u, q[k].x, q[k].y);
                                else
                                    mma_u8(high[u][k], h[0] & 0x01010101u << u, h[0] & 0x10101010u << u, q[k].x);
                        }
                    }
                }
                if (CT == 1 && p + 1 < PIECES) copies.release();
            }
            if constexpr (BITS == 3) { /* both in units of the low bits' place */
                constexpr int times[4] = {4, 8, 1, 2};
#pragma unroll
                for (int u = 0; u < 4; u++)
#pragma unroll
                    for (int k = 0; k < PARTS; k++)
#pragma unroll
                        for (int j = 0; j < 4; j++) t[u][k][j] += times[u] * high[u][k][j];
            }
#pragma unroll
            for (int u = 0; u < TS; u++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if constexpr (PAIR && BITS == 3) /* too large for an int */
                        x[ct][u][j] = joined((float)t[2 * u][0][j], (float)t[2 * u + 1][0][j], 256.0f);
                    else if constexpr (PAIR)
                        x[ct][u][j] = __int2float_rn(joined(t[2 * u][0][j], t[2 * u + 1][0][j], 256));
                    else if constexpr (BITS == 3)
                        x[ct][u][j] = fmaf(256.0f, (float)t[u][0][j], (float)t[u][1][j]);
                    else
                        x[ct][u][j] = __int2float_rn(256 * t[u][0][j] + t[u][1][j]);
        }
        /* What a code's place in its byte multiplies it by: 16 in rows r + 8, 4 in odd tiles of 2 and 3 bits. */
        float scale[TS][2], zero[TS][2];
        steps(scale, zero, scales);
#pragma unroll
        for (int u = 0; u < TS; u++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                zero[u][i] = fmaf(scale[u][i], -kvc_mid(BITS), zero[u][i]);
                if (BITS < 8 && i) scale[u][i] *= 1.0f / 16;
                if (BITS < 4) scale[u][i] *= (PAIR ? upper : u & 1) ? 0.25f : 1.0f;
#pragma unroll
                for (int ct = 0; ct < CT; ct++)
#pragma unroll
                    for (int g = 0; g < 2; g++)
                        x[ct][u][2 * i + g] =
                            fmaf(scale[u][i] * factor[ct][g], x[ct][u][2 * i + g], zero[u][i] * total[ct][g]);
            }
        release_keys<PIECES>();
    }

    /* K's pieces that are still there have been read; not a slot that holds V as well. */
    template <int PIECES> __device__ __forceinline__ void release_keys() {
        if (joint) return;
#pragma unroll
        for (int p = CT == 1 ? PIECES - 1 : 0; p < PIECES; p++) copies.release();
    }

    /* V's first piece, in a slot of its own or behind K's. */
    __device__ __forceinline__ const char *values_arrived() {
        return joint ? copies.arrived() + joint : copies.arrived();
    }

    /* Of 16-bit values; P = 16 or 64 tokens. */
    template <int P> __device__ __forceinline__ void half_logits(float (&x)[CT][TS][4]) {
        using C = piece<16, P>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, PARTS = PAIR ? 1 : 2, T = P / 16;
#pragma unroll
        for (int ct = 0; ct < CT; ct++) {
            float t[T][PARTS][4] = {};
#pragma unroll 1
            for (int p = 0; p < PIECES; p++) {
                const char *at = copies.arrived(CT == 1 ? 0 : p);
#pragma unroll
                for (int i = 0; i < C::TILES; i++) {
                    const int tile = p * C::TILES + i;
                    if (tile >= TILES) break;
                    uint2 q[PARTS];
#pragma unroll
                    for (int k = 0; k < PARTS; k++)
                        q[k] = half_fragments[((ct * PARTS + k) * TILES + tile) * 32 + lane];
                    const uint4 *vector = (const uint4 *)(at + i * C::TILE_BYTES) + lane;
                    uint4 w[4];
                    if (P == 16) {
                        w[0] = vector[0];
                    } else {
#pragma unroll
                        for (int v = 0; v < 4; v++) w[v] = vector[32 * v];
                    }
#pragma unroll
                    for (int u = 0; u < T; u++) {
                        uint32_t row[4];
                        fragment<P>(row, w, u);
#pragma unroll
                        for (int k = 0; k < PARTS; k++)
                            if (a.half == KVC_BFLOAT16)
                                mma_bf16(t[u][k], row[0], row[1], row[2], row[3], q[k].x, q[k].y);
                            else
                                mma_f16(t[u][k], row[0], row[1], row[2], row[3], q[k].x, q[k].y);
                    }
                }
                if (CT == 1) copies.release();
            }
#pragma unroll
            for (int u = 0; u < TS; u++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float value = 0;
                    bool there = false;
                    if constexpr (PAIR) {
                        if (2 * u < T)
                            value = joined(t[2 * u % T][0][j], 2 * u + 1 < T ? t[(2 * u + 1) % T][0][j] : 0.0f, 1.0f);
                        there = 2 * u + upper < T;
                    } else if (u < T) {
                        value = t[u % T][0][j] + t[u % T][1][j];
                        there = true;
                    }
                    x[ct][u][j] = there ? 256.0f * value * factor[ct][j & 1] : -INFINITY;
                }
        }
        if (CT > 1)
#pragma unroll 1
            for (int p = 0; p < PIECES; p++) copies.release();
    }

    /* Registers of a tile of 16-bit values, K or V: rows r, r + 8, then the same of the second half of the sum. */
    template <int P> static __device__ __forceinline__ void fragment(uint32_t (&row)[4], const uint4 (&w)[4], int u) {
        if (P == 16) {
            row[0] = w[0].x, row[1] = w[0].y, row[2] = w[0].z, row[3] = w[0].w;
        } else {
#pragma unroll
            for (int v = 0; v < 4; v++) row[v] = u == 0 ? w[v].x : u == 1 ? w[v].y : u == 2 ? w[v].z : w[v].w;
        }
    }

    /* ---- caps, masks */

    __device__ __forceinline__ void cap(float (&x)[CT][TS][4]) const {
        if (a.softcap > 0) {
#pragma unroll
            for (int ct = 0; ct < CT; ct++)
#pragma unroll
                for (int u = 0; u < TS; u++)
#pragma unroll
                    for (int j = 0; j < 4;
                         j++) { /* x is 2 log2 e times logit / cap; tanh by one power, or its series */
                        const float size = fabsf(x[ct][u][j]), power = exp2_of(fminf(size, 64.0f));
                        const float y = size * (0.5f / LOG2E), square = y * y;
                        const float series = y * fmaf(square, fmaf(square, 2.0f / 15, -1.0f / 3), 1.0f);
                        const float tanh = y < 0.1f ? series : 1.0f - 2.0f / (power + 1.0f);
                        if (fabsf(x[ct][u][j]) < INFINITY)
                            x[ct][u][j] = copysignf(tanh, x[ct][u][j]) * (a.softcap * LOG2E);
                    }
        }
    }

    /* Tokens in pages behind page `page` of the list, up to a few more than a query can miss. */
    __device__ __forceinline__ int tokens_behind(int list, int page, int tokens) const {
        if (page >= tail_page) return tail_tokens - 16 * (page - tail_page) - tokens;
        int behind = tail_tokens;
        for (int i = page + 1; i < tail_page && behind < a.q; i++)
            behind += a.table[(int64_t)list * a.capacity + i].tokens;
        return behind;
    }

    __device__ __forceinline__ void mask(float (&x)[CT][TS][4], const page_note &note, int room) const {
        const int tokens = note.kind >> 16 & 0xff;
        const int behind = a.q > 1 ? tokens_behind(note.list, note.page, tokens) : 0;
        if (tokens == room && (a.q == 1 || behind >= a.q)) return;
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
                const int seen = tokens - (a.q > 1 ? max(0, hidden[ct][g] - behind) : 0);
#pragma unroll
                for (int u = 0; u < TS; u++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (token(u, i) >= seen) x[ct][u][2 * i + g] = -INFINITY;
            }
    }

    /* ---- weights and V */

    /* A new shift where some weight times scale would leave fp16. `most`: greatest logit plus log2 of V's scale. */
    __device__ __forceinline__ void rescale(float (&most)[CT][2]) {
        bool over = false;
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int g = 0; g < 2; g++) over = over || most[ct][g] > shift[ct][g] + SHIFT_MOST;
        if (!__any_sync(ALL, over)) return;
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
#pragma unroll
                for (int o = PAIR ? 2 : 4; o < 32; o <<= 1)
                    most[ct][g] = fmaxf(most[ct][g], __shfl_xor_sync(ALL, most[ct][g], o));
                const float next = fmaxf(shift[ct][g], most[ct][g] - SHIFT_AT), by = exp2_of(shift[ct][g] - next);
                shift[ct][g] = next;
                weights[ct][g] *= by;
                zeros[ct][g] *= by;
                bias[ct][2 + g] *= by;
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    sum[i][ct][g] *= by;
                    sum[i][ct][2 + g] *= by;
                }
            }
    }

    /* Weights of a token tile pair or tile u, row half i, from lanes of tokens to lanes of queries: fragments of the
     * product with V. `pair` holds the lane's two queries. */
    template <int T> __device__ __forceinline__ void spread(uint32_t (&p)[T][2], int u, int i, uint32_t pair) const {
        const uint32_t turned = transposed(pair);
        if constexpr (PAIR) { /* columns 0 to 3 are the even tile's, 4 to 7 the odd one's */
            p[2 * u % T][i] = r < 4 ? turned : 0;
            if (2 * u + 1 < T) p[(2 * u + 1) % T][i] = r < 4 ? 0 : turned;
        } else {
            p[u % T][i] = turned;
        }
    }

    /* x: logits, or -inf. Adds the page's weights and V. */
    template <int BITS> __device__ __forceinline__ void code_values(float (&x)[CT][TS][4]) {
        using C = piece<BITS, 64>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, REST = TILES - (PIECES - 1) * C::TILES;
        const char *at = values_arrived();
        float scale[TS][2], zero[TS][2], most[CT][2];
#pragma unroll
        for (int ct = 0; ct < CT; ct++) most[ct][0] = most[ct][1] = -INFINITY;
        steps(scale, zero, at + REST * C::TILE_BYTES);
#pragma unroll
        for (int u = 0; u < TS; u++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                zero[u][i] = fmaf(scale[u][i], (float)sum_code(BITS) - kvc_mid(BITS), zero[u][i]);
                const float size = fmaxf(log2_of(scale[u][i]), -24.0f);
#pragma unroll
                for (int ct = 0; ct < CT; ct++)
#pragma unroll
                    for (int g = 0; g < 2; g++) most[ct][g] = fmaxf(most[ct][g], x[ct][u][2 * i + g] + size);
            }
        rescale(most);
        uint32_t p[CT][4][2];
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int u = 0; u < TS; u++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float first = exp2_of(x[ct][u][2 * i] - shift[ct][0]);
                    const float second = exp2_of(x[ct][u][2 * i + 1] - shift[ct][1]);
                    weights[ct][0] += first;
                    weights[ct][1] += second;
                    zeros[ct][0] = fmaf(first, zero[u][i], zeros[ct][0]);
                    zeros[ct][1] = fmaf(second, zero[u][i], zeros[ct][1]);
                    spread<4>(p[ct], u, i, half2_bits(first * scale[u][i], second * scale[u][i]));
                }
        if constexpr (BITS < 8)
#pragma unroll
            for (int ct = 0; ct < CT; ct++)
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    constexpr uint32_t even = kept(BITS, 0) ? pair_of(kept(BITS, 0) + sum_code(BITS)) : 0;
                    constexpr uint32_t odd = kept(BITS, 1) ? pair_of(kept(BITS, 1) + sum_code(BITS)) : 0;
                    const uint32_t up = u & 1 ? odd : even;
                    if (up) mma_f16(bias[ct], 0, up, 0, up, p[ct][u][0], p[ct][u][1]);
                }
        add_values<BITS, REST>(at, (PIECES - 1) * C::TILES, p);
        copies.release();
#pragma unroll
        for (int k = 0; k + 1 < PIECES; k++) {
            add_values<BITS, C::TILES>(copies.arrived(), k * C::TILES, p);
            copies.release();
        }
    }

    /* Channel tiles first .. first + N - 1, which lie at `at`. */
    template <int BITS, int N>
    __device__ __forceinline__ void add_values(const char *at, int first, const uint32_t (&p)[CT][4][2]) {
        using C = piece<BITS, 64>;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const char *tile = at + i * C::TILE_BYTES;
            uint32_t v[4][4]; /* of each token tile */
            if constexpr (BITS == 2) {
                const uint2 two = ((const uint2 *)tile)[lane];
                const uint32_t x = __funnelshift_r(two.x, two.x, 8), y = __funnelshift_r(two.y, two.y, 8);
                two_bits<0>(v[0], two.x, x);
                two_bits<1>(v[1], two.x, x);
                two_bits<0>(v[2], two.y, y);
                two_bits<1>(v[3], two.y, y);
            } else if constexpr (BITS == 3) {
                const uint2 two = ((const uint2 *)tile)[lane];
                const uint32_t high = ((const uint32_t *)tile)[64 + lane];
                const uint32_t x = two.x >> 8, y = two.y >> 8;
                three_bits<0>(v[0][0], v[0][1], two.x, high << 2);
                three_bits<0>(v[0][2], v[0][3], x, high >> 6);
                three_bits<1>(v[1][0], v[1][1], two.x, high << 3);
                three_bits<1>(v[1][2], v[1][3], x, high >> 5);
                three_bits<0>(v[2][0], v[2][1], two.y, high);
                three_bits<0>(v[2][2], v[2][3], y, high >> 8);
                three_bits<1>(v[3][0], v[3][1], two.y, high << 1);
                three_bits<1>(v[3][2], v[3][3], y, high >> 7);
            } else if constexpr (BITS == 4) {
                const uint4 four = ((const uint4 *)tile)[lane];
                four_bits(v[0], four.x);
                four_bits(v[1], four.y);
                four_bits(v[2], four.z);
                four_bits(v[3], four.w);
            } else {
                const uint4 low = ((const uint4 *)tile)[lane], up = ((const uint4 *)tile)[32 + lane];
                const uint32_t rows[2][4] = {{low.x, low.y, low.z, low.w}, {up.x, up.y, up.z, up.w}};
#pragma unroll
                for (int u = 0; u < 4; u++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const uint32_t bits = __byte_perm(rows[j & 1][u], 0x64646464u, j < 2 ? 0x4240 : 0x4341);
                        v[u][j] = less<1024 + sum_code(8)>(bits);
                    }
            }
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int ct = 0; ct < CT; ct++)
                    mma_f16(sum[first + i][ct], v[u][0], v[u][1], v[u][2], v[u][3], p[ct][u][0], p[ct][u][1]);
        }
    }

    /* As code_values, of 16-bit values. With bf16 the weights are two bf16 numbers each. */
    template <int P> __device__ __forceinline__ void half_values(float (&x)[CT][TS][4]) {
        using C = piece<16, P>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, T = P / 16, US = PAIR ? (T + 1) / 2 : T;
        float most[CT][2];
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
                most[ct][g] = -INFINITY;
#pragma unroll
                for (int u = 0; u < US; u++) most[ct][g] = fmaxf(most[ct][g], fmaxf(x[ct][u][g], x[ct][u][2 + g]));
            }
        rescale(most);
        const bool brain = a.half == KVC_BFLOAT16;
        uint32_t p[CT][T][2], rest[CT][T][2];
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int u = 0; u < US; u++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float first = exp2_of(x[ct][u][2 * i] - shift[ct][0]);
                    const float second = exp2_of(x[ct][u][2 * i + 1] - shift[ct][1]);
                    weights[ct][0] += first;
                    weights[ct][1] += second;
                    if (brain) {
                        const uint32_t pair = bfloat2_bits(first, second);
                        spread<T>(p[ct], u, i, pair);
                        spread<T>(rest[ct], u, i,
                                  bfloat2_bits(first - __uint_as_float(pair << 16),
                                               second - __uint_as_float(pair & 0xffff0000u)));
                    } else {
                        spread<T>(p[ct], u, i, half2_bits(first, second));
                    }
                }
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            const int piece_at = k == 0 ? PIECES - 1 : k - 1;
            const char *at = copies.arrived();
#pragma unroll
            for (int i = 0; i < C::TILES; i++) {
                const int tile = piece_at * C::TILES + i;
                if (tile >= TILES) break;
                const uint4 *vector = (const uint4 *)(at + i * C::TILE_BYTES) + lane;
                uint4 w[4];
                if (P == 16) {
                    w[0] = vector[0];
                } else {
#pragma unroll
                    for (int v = 0; v < 4; v++) w[v] = vector[32 * v];
                }
#pragma unroll
                for (int u = 0; u < T; u++) {
                    uint32_t row[4];
                    fragment<P>(row, w, u);
#pragma unroll
                    for (int ct = 0; ct < CT; ct++)
                        if (brain) {
                            mma_bf16(sum[tile][ct], row[0], row[1], row[2], row[3], p[ct][u][0], p[ct][u][1]);
                            mma_bf16(sum[tile][ct], row[0], row[1], row[2], row[3], rest[ct][u][0], rest[ct][u][1]);
                        } else {
                            mma_f16(sum[tile][ct], row[0], row[1], row[2], row[3], p[ct][u][0], p[ct][u][1]);
                        }
                }
            }
            copies.release();
        }
    }

    /* ---- a page; sums into shared memory */

    __device__ __forceinline__ void page(const page_note &note) {
        const int k_bits = note.kind & 0xff, v_bits = note.kind >> 8 & 0xff;
        const bool tail = k_bits == 16 && v_bits == 16;
        joint = (int)note.joint;
        float x[CT][TS][4];
        switch (k_bits) {
        case 2: code_logits<2>(x); break;
        case 3: code_logits<3>(x); break;
        case 4: code_logits<4>(x); break;
        case 8: code_logits<8>(x); break;
        default:
            if (tail)
                half_logits<16>(x);
            else
                half_logits<64>(x);
        }
        cap(x);
        mask(x, note, tail ? 16 : 64);
        switch (v_bits) {
        case 2: code_values<2>(x); break;
        case 3: code_values<3>(x); break;
        case 4: code_values<4>(x); break;
        case 8: code_values<8>(x); break;
        default:
            if (tail)
                half_values<16>(x);
            else
                half_values<64>(x);
        }
        if (++since_drain == DRAIN_PAGES) drain();
    }

    /* The registers' sums, less the constants' share, into this warp's rows of shared memory: (query, channel). */
    __device__ __forceinline__ void drain() {
        since_drain = 0;
        float by[CT][2];
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int g = 0; g < 2; g++) {
                by[ct][g] = exp2_of(drained[ct][g] - shift[ct][g]);
                drained[ct][g] = shift[ct][g];
            }
        constexpr int HALF =
            (TILES + 1) / 2; /* with PAIR: the lower lanes write tiles 0 .. HALF-1, the upper the rest */
#pragma unroll
        for (int ct = 0; ct < CT; ct++)
#pragma unroll
            for (int i = 0; i < (PAIR ? HALF : TILES); i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float value = j < 2 ? sum[i][ct][j] : sum[i][ct][j] - bias[ct][j];
                    int tile = i;
                    bool mine = true;
                    if constexpr (PAIR) {
                        float other = i + HALF < TILES ? sum[(i + HALF) % TILES][ct][j] : 0.0f;
                        if (i + HALF < TILES && j >= 2) other -= bias[ct][j];
                        const float got = __shfl_xor_sync(ALL, upper ? value : other, 2);
                        value = (upper ? other : value) + got;
                        tile = upper ? i + HALF : i;
                        mine = tile < TILES;
                    }
                    float *to = sums + query(ct, j & 1) * S::PITCH + 16 * tile + r + 8 * (j >> 1);
                    if (mine) *to = has_sums ? fmaf(*to, by[ct][j & 1], value) : value;
                }
        has_sums = true;
        clear_sums();
    }
};

} // namespace
