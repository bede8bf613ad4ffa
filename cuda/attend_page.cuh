/* attend_page.cuh: one page of one warp: logits from K's codes, weights, V's codes times weights.
 *
 * The 16-row side of every product is tokens (K) or channels (V), the 8-column side is queries: four of them, each in
 * two parts side by side, so that a lane's two columns are one query's. Fragments are a lane's words of the page as
 * they lie (format.h): lane = 4*r + c holds rows r and r + 8, and query c of each column tile.
 *
 * Codes below 16 bits meet integers: q (for K), and weight times V's scale (for V), in 16-bit fixed point, whose parts
 * are the high and the low byte. Sums are exact. Codes stay where they are in their byte where a mask is all it takes,
 * and powers of two go into the factors. Weights' unit is chosen so that a page's largest one has 11 to 16 bits; sums
 * are emptied into fp32 in shared memory when it changes. With 16 queries registers do not suffice for V's integer
 * sums: fp16 takes their place, and a lane's two columns are two queries.
 *
 * Class 16: q and weights in two 16-bit floats. Logits are in bits (log2 e is in q's factor), and from the start
 * relative to the weights' unit. */
#pragma once
#include "attend_codes.cuh"
#include "attend_list.cuh"
#include "attend_ring.cuh"

namespace {

/* What a warp's sums of V hold. SHIFTED: rows r + 8 are 16 times too large, and have rows r on top. */
enum { SUMS_NONE, SUMS_SHIFTED, SUMS_BYTES, SUMS_FLOAT };

template <int D, int NQ> struct worker {
    using S = sizes<D, NQ>;
    static constexpr int TILES = S::TILES, QT = S::QT, VT = S::VT, PARTS = S::PARTS;
    static constexpr bool INTEGER = S::INTEGER; /* V's codes meet integers */

    const attend_job &a;
    ring copies;
    const uint2 *code_fragments, *half_fragments;
    float *sums; /* (NQ, PITCH): this warp's, emptied into */
    int lane, r, c;
    /* of a lane's query in each column tile */
    float factor[QT], total[QT]; /* of an integer product; of zeros: sum of q */
    int hidden[QT];              /* how many of the list's last tokens it does not see */
    float shift[QT], drained[QT], weights[QT], zeros[QT];
    float top[QT];              /* the greatest shift so far; NOTHING before a token is seen */
    uint32_t sum[TILES][VT][4]; /* int32, or fp32: `held` */
    int middles[QT];            /* sum of weights times twice the middle code, of this lane's column of weights */
    int held, room;             /* room: pages until they are emptied */
    int joint;                  /* bytes of K in the slot that holds the whole page; 0: K and V
                                   have slots of their own */
    bool has_sums;
    bool mixed;                 /* the list, as divide.h has it */
    int tail_page, tail_tokens; /* of the list */

    __device__ __forceinline__ worker(const attend_job &a, const rings &all, int warp)
        : a(a), copies(all, warp), lane(threadIdx.x & 31), r(lane >> 2), c(lane & 3) {}

    __device__ __forceinline__ int query(int t) const { return 4 * t + c; }

    /* Token of the page that is a lane's j-th, of 8. */
    __device__ __forceinline__ int token(int j) const { return r + 8 * j; }

    __device__ __forceinline__ void begin_list(int list) {
#pragma unroll
        for (int t = 0; t < QT; t++) {
            shift[t] = weights[t] = zeros[t] = 0;
            drained[t] = top[t] = NOTHING;
        }
        clear_sums();
        has_sums = false;
        if (a.q > 1) { /* then the kernel before has ended (`early`) */
            tail_page = a.lists[list].tail_page;
            tail_tokens = a.lists[list].tail_tokens;
        }
    }

    __device__ __forceinline__ void clear_sums() {
        held = SUMS_NONE;
        room = 0;
#pragma unroll
        for (int t = 0; t < QT; t++) middles[t] = 0;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int v = 0; v < VT; v++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][v][j] = 0;
    }

    /* ---- K */

    /* What is taken off logits at once: with a cap nothing. */
    __device__ __forceinline__ float base(int t) const { return a.softcap > 0 ? 0.0f : shift[t]; }

    /* Products of q and K's codes, in units of both, of a page of 64 tokens, whose first piece is there. Returns where
     * its last piece lies, which is not given back yet; where q has more column tiles than are looked at at once none
     * is. AT_ONCE: pairs of channel tiles whose code follows each other. */
    template <int BITS, int AT_ONCE> __device__ __forceinline__ const char *code_products(float (&x)[QT][8]) {
        using C = piece<BITS, 64>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES;
        const char *last = nullptr;
#pragma unroll
        for (int first = 0; first < QT; first += PARTS) {
            int t[4][PARTS][4] = {};
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const char *at = last = p == 0 ? copies.next() : copies.arrived(QT == PARTS ? 0 : p);
                const int tiles = p + 1 < PIECES ? C::TILES : TILES - (PIECES - 1) * C::TILES;
#pragma unroll AT_ONCE
                for (int i = 0; i < tiles; i += 2) {
                    uint32_t rows[2][4][2];
                    uint2 q[PARTS];
#pragma unroll
                    for (int k = 0; k < PARTS; k++)
                        q[k] = code_fragments[((first + k) * ((TILES + 1) / 2) + (p * C::TILES + i) / 2) * 32 + lane];
                    codes<BITS, false>(rows[0], at + i * C::TILE_BYTES, lane);
                    if (i + 1 < tiles) codes<BITS, false>(rows[1], at + (i + 1) * C::TILE_BYTES, lane);
#pragma unroll
                    for (int u = 0; u < 4; u++)
#pragma unroll
                        for (int k = 0; k < PARTS; k++)
                            if (i + 1 < tiles)
                                mma_u8(t[u][k], rows[0][u][0], rows[0][u][1], rows[1][u][0], rows[1][u][1], q[k].x,
                                       q[k].y);
                            else
                                mma_u8(t[u][k], rows[0][u][0], rows[0][u][1], q[k].x);
                }
                if (QT == PARTS && p + 1 < PIECES) copies.release();
            }
#pragma unroll
            for (int k = 0; k < PARTS; k++) {
                int all[8];
#pragma unroll
                for (int j = 0; j < 8; j++) all[j] = 256 * t[j >> 1][k][2 * (j & 1)] + t[j >> 1][k][2 * (j & 1) + 1];
#pragma unroll
                for (int j = 7; j >= 0; j--) { /* rows r + 8 less what `codes` leaves in them */
                    if (BITS < 8 && j % 2) all[j] -= all[j - 1] + (BITS == 2 && j % 4 == 3 ? all[j - 2] : 0);
                    x[first + k][j] = __int2float_rn(all[j]);
                }
            }
        }
        return last;
    }

    /* Logits, not yet capped or masked, from products; `scales`: behind K's codes. */
    template <bool PLAIN>
    __device__ __forceinline__ void scale_products(float (&x)[QT][8], const char *scales, int bits) const {
        float scale[8], zero[8];
        steps<PLAIN>(scale, zero, a, scales, r);
        const float middle = -0.5f * (float)((1 << bits) - 1);
        const float up = bits < 8 ? 1.0f / 16 : 1.0f; /* of rows r + 8 */
        const float odd = bits == 2 ? 0.25f : 1.0f;   /* of odd token tiles */
#pragma unroll
        for (int t = 0; t < QT; t++) {
            const float of[4] = {factor[t], factor[t] * up, factor[t] * odd, factor[t] * up * odd};
            const float off = middle * total[t], less = PLAIN ? -shift[t] : -base(t);
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[t][j] = fmaf(scale[j], fmaf(x[t][j], of[j & 3], off), fmaf(zero[j], total[t], less));
        }
    }

    /* V's first piece, in a slot of its own or behind K's. */
    __device__ __forceinline__ const char *values_arrived() { return joint ? copies.next() + joint : copies.arrived(); }

    /* A lane's words of one channel tile of 16-bit values. */
    template <int P> __device__ __forceinline__ void load_tile(uint4 (&w)[4], const char *tile) const {
        const uint4 *vector = (const uint4 *)tile + lane;
#pragma unroll
        for (int v = 0; v < (P == 16 ? 1 : 4); v++) w[v] = vector[32 * v];
    }

    /* Of 16-bit values; P = 16 or 64 tokens. */
    template <int P> __device__ __forceinline__ void half_logits(float (&x)[QT][8]) {
        using C = piece<16, P>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, T = P / 16;
#pragma unroll
        for (int first = 0; first < QT; first += PARTS) {
            float t[T][PARTS][4] = {};
#pragma unroll 1
            for (int p = 0; p < PIECES; p++) {
                const char *at = copies.arrived(QT == PARTS ? 0 : p);
#pragma unroll
                for (int i = 0; i < C::TILES; i++) {
                    const int tile = p * C::TILES + i;
                    if (tile >= TILES) break;
                    uint2 q[PARTS];
#pragma unroll
                    for (int k = 0; k < PARTS; k++) q[k] = half_fragments[((first + k) * TILES + tile) * 32 + lane];
                    uint4 w[4];
                    load_tile<P>(w, at + i * C::TILE_BYTES);
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
                if (QT == PARTS) copies.release();
            }
#pragma unroll
            for (int k = 0; k < PARTS; k++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (j < 2 * T) {
                        const float (&both)[4] = t[(j >> 1) % T][k];
                        const float value = both[2 * (j & 1)] + both[2 * (j & 1) + 1];
                        x[first + k][j] = fmaf(value, 256.0f * factor[first + k], -base(first + k));
                    } else {
                        x[first + k][j] = -INFINITY;
                    }
        }
        if (QT > PARTS)
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

    __device__ __forceinline__ void cap(float (&x)[QT][8]) const {
        if (a.softcap > 0) {
#pragma unroll
            for (int t = 0; t < QT; t++)
#pragma unroll
                for (int j = 0; j < 8; j++) x[t][j] = capped(x[t][j], a.softcap) - shift[t];
        }
    }

    __device__ __forceinline__ void mask(float (&x)[QT][8], int tokens, int behind) const {
#pragma unroll
        for (int t = 0; t < QT; t++) {
            const int seen = tokens - (a.q > 1 ? max(0, hidden[t] - behind) : 0);
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (token(j) >= seen) x[t][j] = -INFINITY;
        }
    }

    /* ---- weights and V */

    /* Weights of a page's tokens, times V's scale, plus `above`; what they add to the sums; the greatest. */
    __device__ __forceinline__ void weigh(float (&n)[QT][8], float (&weight)[QT], float (&offset)[QT],
                                          float (&most)[QT], const float (&x)[QT][8], const float (&scale)[8],
                                          const float (&zero)[8], float above) const {
#pragma unroll
        for (int t = 0; t < QT; t++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float w = exp2_of(x[t][j]);
                weight[t] = j == 0 ? w : weight[t] + w;
                offset[t] = j == 0 ? w * zero[j] : fmaf(w, zero[j], offset[t]);
                n[t][j] = fmaf(w, scale[j], above);
                most[t] = j == 0 ? n[t][j] : fmaxf(most[t], n[t][j]);
            }
        }
    }

    /* Whether a page's V may join the sums: these are of its form, and its weights neither too large for 16 bits nor,
     * with integers, too small to be exact enough. `most`, `weight`: of `weigh`. */
    __device__ __forceinline__ bool suits(const float (&most)[QT], const float (&weight)[QT], float above, int what,
                                          bool &large) const {
        constexpr uint32_t FINE = (1u << NQ) - 1;
        bool none = false;
        uint32_t fine = 0; /* a bit a query; of lanes with a query one must have a weight of some size */
        large = false;
#pragma unroll
        for (int t = 0; t < QT; t++) {
            large = large || most[t] > above + MOST_WEIGHT || weight[t] > MOST_BARE_WEIGHT;
            if (!INTEGER || what == SUMS_FLOAT)
                none = none || top[t] == NOTHING;
            else if (most[t] >= above + LEAST_WEIGHT && top[t] > NOTHING)
                fine |= 1u << 4 * t;
        }
        fine = large || none ? ~0u : !INTEGER || what == SUMS_FLOAT ? FINE : fine << c;
        return __reduce_or_sync(ALL, fine) == FINE && held == what && room > 0;
    }

    /* Makes them suit each other: sums are emptied, or get a new unit of weights; then true, and x is relative to that.
     */
    __device__ __forceinline__ bool settle(float (&x)[QT][8], const float (&scale)[8], int what, bool large) {
        float logit[QT], log_scale[8]; /* logit: the greatest, plus log2 of V's scale */
        bool change = large;
#pragma unroll
        for (int j = 0; j < 8; j++) log_scale[j] = fmaxf(log2_of(scale[j]), -24.0f);
#pragma unroll
        for (int t = 0; t < QT; t++) {
            logit[t] = -INFINITY;
#pragma unroll
            for (int j = 0; j < 8; j++) logit[t] = fmaxf(logit[t], x[t][j] + log_scale[j]);
#pragma unroll
            for (int o = 4; o < 32; o <<= 1) logit[t] = fmaxf(logit[t], __shfl_xor_sync(ALL, logit[t], o));
            const float least = what == SUMS_FLOAT || !INTEGER ? -INFINITY : SHIFT_LEAST;
            change = change || (logit[t] < least && logit[t] + shift[t] >= top[t] - SHIFT_NEGLIGIBLE) ||
                     (top[t] == NOTHING && logit[t] > -INFINITY);
        }
        change = __any_sync(ALL, change);
        if (held != SUMS_NONE && (change || held != what || room == 0)) drain();
        if (held == SUMS_NONE) room = what == SUMS_FLOAT ? DRAIN_PAGES : DRAIN_PAGES_OF_CODES;
        held = what;
        if (!change) return false;
#pragma unroll
        for (int t = 0; t < QT; t++) {
            if (!(fabsf(logit[t]) < INFINITY)) continue; /* nothing is seen, or a NaN */
            const float lowest = top[t] == NOTHING ? NOTHING
                                 : INTEGER         ? top[t] - SHIFT_NEGLIGIBLE - SHIFT_AT
                                                   : shift[t];
            const float next = fmaxf(unit_for(logit[t] + shift[t] - SHIFT_AT), lowest), less = shift[t] - next;
            const float by = top[t] == NOTHING ? 0.0f : exp2_of(less);
            shift[t] = next;
            top[t] = fmaxf(top[t], next);
            weights[t] *= by;
            zeros[t] *= by;
#pragma unroll
            for (int j = 0; j < 8; j++) x[t][j] = at_most(x[t][j] + less, SHIFT_AT + 1 - log_scale[j]);
        }
        return true;
    }

    /* Of V's codes: 2^23 + n, so that the integer is in the low bits. */
    static constexpr float ABOVE = INTEGER ? 0x1p23f : 0.0f;

    static __device__ __forceinline__ int sums_of(int bits) {
        return !INTEGER || bits == 16 ? SUMS_FLOAT : bits < 8 ? SUMS_SHIFTED : SUMS_BYTES;
    }

    /* V's scales, and zeros for what is added of its codes; `scales`: behind these. */
    template <bool PLAIN>
    __device__ __forceinline__ void value_steps(float (&scale)[8], float (&zero)[8], const char *scales,
                                                int bits) const {
        steps<PLAIN>(scale, zero, a, scales, r);
        if (!INTEGER) {
            const float off = (float)middle_code(bits) - 0.5f * (float)((1 << bits) - 1);
#pragma unroll
            for (int j = 0; j < 8; j++) zero[j] = fmaf(scale[j], off, zero[j]);
        }
    }

    /* Adds V's codes, which lie at `at`, times n. */
    __device__ __forceinline__ void code_values(const float (&n)[QT][8], const char *at, int bits) {
        if constexpr (INTEGER) {
            uint32_t p[QT][4];
#pragma unroll
            for (int t = 0; t < QT; t++) {
                uint32_t all = 0;
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    /* bytes of lanes of tokens become those of lanes of queries: p[t][u] holds, of token tile u, the
                     * tokens 2c, 2c + 8, 2c + 1, 2c + 9 of column r: the high or the low byte of query r / 2 */
                    p[t][u] =
                        transposed(__byte_perm(__float_as_uint(n[t][2 * u]), __float_as_uint(n[t][2 * u + 1]), 0x4051));
                    all = __dp4a(p[t][u], 0x01010101u, all);
                }
                middles[t] += (int)all * ((1 << bits) - 1);
            }
            switch (bits) {
            case 2: add_codes<2>(at, p); break;
            case 3: add_codes<3>(at, p); break;
            case 4: add_codes<4>(at, p); break;
            default: add_codes<8>(at, p);
            }
        } else {
            uint32_t p[VT][4][2];
#pragma unroll
            for (int v = 0; v < VT; v++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    p[v][j >> 1][j & 1] = transposed(half2_bits(n[2 * v % QT][j], n[(2 * v + 1) % QT][j]));
            switch (bits) {
            case 2: add_halves<2>(at, p); break;
            case 3: add_halves<3>(at, p); break;
            case 4: add_halves<4>(at, p); break;
            default: add_halves<8>(at, p);
            }
        }
    }

    /* Weights into their sums, of logits or -inf; n: of `weigh`, in a unit that suits them. */
    __device__ __forceinline__ void add_weights(float (&n)[QT][8], float (&x)[QT][8], const float (&scale)[8],
                                                const float (&zero)[8], float above, int what) {
        float weight[QT], offset[QT], most[QT];
        weigh(n, weight, offset, most, x, scale, zero, above);
        bool large;
        if (__builtin_expect(!suits(most, weight, above, what, large), 0))
            if (settle(x, scale, what, large)) weigh(n, weight, offset, most, x, scale, zero, above);
        room--;
#pragma unroll
        for (int t = 0; t < QT; t++) {
            weights[t] += weight[t];
            zeros[t] += offset[t];
        }
    }

    /* V's pieces, the last one first, which is there. */
    template <int BITS> __device__ __forceinline__ void add_codes(const char *at, const uint32_t (&p)[QT][4]) {
        using C = piece<BITS, 64>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, REST = TILES - (PIECES - 1) * C::TILES;
        add_code_tiles<BITS, REST>(at, (PIECES - 1) * C::TILES, p);
        copies.release();
#pragma unroll
        for (int k = 0; k + 1 < PIECES; k++) {
            add_code_tiles<BITS, C::TILES>(copies.arrived(), k * C::TILES, p);
            copies.release();
        }
    }

    /* Channel tiles first .. first + N - 1, which lie at `at`. */
    template <int BITS, int N>
    __device__ __forceinline__ void add_code_tiles(const char *at, int first, const uint32_t (&p)[QT][4]) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            uint32_t rows[4][2];
            codes<BITS, true>(rows, at + i * piece<BITS, 64>::TILE_BYTES, lane);
#pragma unroll
            for (int u = 0; u < 2; u++) /* these pairs want the fewest moves: a load's words lie side by side */
#pragma unroll
                for (int t = 0; t < VT; t++)
                    mma_u8u8(sum[first + i][t], rows[u][0], rows[u][1], rows[u + 2][0], rows[u + 2][1], p[t % QT][u],
                             p[t % QT][u + 2]);
        }
    }

    template <int BITS> __device__ __forceinline__ void add_halves(const char *at, const uint32_t (&p)[VT][4][2]) {
        using C = piece<BITS, 64>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, REST = TILES - (PIECES - 1) * C::TILES;
        add_half_tiles<BITS, REST>(at, (PIECES - 1) * C::TILES, p);
        copies.release();
#pragma unroll
        for (int k = 0; k + 1 < PIECES; k++) {
            add_half_tiles<BITS, C::TILES>(copies.arrived(), k * C::TILES, p);
            copies.release();
        }
    }

    template <int BITS, int N>
    __device__ __forceinline__ void add_half_tiles(const char *at, int first, const uint32_t (&p)[VT][4][2]) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            uint32_t v[4][4]; /* of each token tile */
            halves<BITS>(v, at + i * piece<BITS, 64>::TILE_BYTES, lane);
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int k = 0; k < VT; k++)
                    mma_f16(sum[first + i][k], v[u][0], v[u][1], v[u][2], v[u][3], p[k][u][0], p[k][u][1]);
        }
    }

    /* As code_values, of 16-bit values. */
    template <int P> __device__ __forceinline__ void half_values(const float (&n)[QT][8]) {
        using C = piece<16, P>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, T = P / 16;
        const bool brain = a.half == KVC_BFLOAT16;
        /* both parts are columns of a tile, or, where its columns are queries, tiles of their own */
        uint32_t p[VT][T][2], rest[VT][T][2];
#pragma unroll
        for (int v = 0; v < VT; v++)
#pragma unroll
            for (int u = 0; u < T; u++) {
                if constexpr (INTEGER) {
                    uint32_t first, second;
                    split(first, second, n[v % QT][2 * u], n[v % QT][2 * u + 1], brain);
                    p[v][u][0] = transposed(__byte_perm(first, second, 0x5410));
                    p[v][u][1] = transposed(__byte_perm(first, second, 0x7632));
                } else {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        uint32_t first, second;
                        split(first, second, n[2 * v % QT][2 * u + i], n[(2 * v + 1) % QT][2 * u + i], brain);
                        p[v][u][i] = transposed(first);
                        rest[v][u][i] = transposed(second);
                    }
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
                uint4 w[4];
                load_tile<P>(w, at + i * C::TILE_BYTES);
#pragma unroll
                for (int u = 0; u < T; u++) {
                    uint32_t row[4];
                    fragment<P>(row, w, u);
#pragma unroll
                    for (int v = 0; v < VT; v++)
                        if (brain) {
                            mma_bf16(sum[tile][v], row[0], row[1], row[2], row[3], p[v][u][0], p[v][u][1]);
                            if (!INTEGER)
                                mma_bf16(sum[tile][v], row[0], row[1], row[2], row[3], rest[v][u][0], rest[v][u][1]);
                        } else {
                            mma_f16(sum[tile][v], row[0], row[1], row[2], row[3], p[v][u][0], p[v][u][1]);
                            if (!INTEGER)
                                mma_f16(sum[tile][v], row[0], row[1], row[2], row[3], rest[v][u][0], rest[v][u][1]);
                        }
                }
            }
            copies.release();
        }
    }

    /* ---- a page; sums into shared memory */

    /* The page that is next, K and V of BITS bits, of a plain layout. */
    template <int BITS> __device__ __forceinline__ void plain_page(bool seen, int tokens, int behind) {
        using C = piece<BITS, 64>;
        constexpr int LAST = (TILES - 1) / C::TILES, CODES = (TILES - LAST * C::TILES) * C::TILE_BYTES;
        constexpr int HALF = TILES * C::TILE_BYTES + 64 * (int)sizeof(half2);
        joint = 2 * HALF <= SLOT ? HALF : 0;
        float x[QT][8], n[QT][8], scale[8], zero[8];
        const char *last = code_products<BITS, (TILES + 1) / 2>(x);
        scale_products<true>(x, last + CODES, BITS);
        if (!joint)
#pragma unroll
            for (int p = 0; p < (QT == PARTS ? 1 : LAST + 1); p++) copies.release();
        if (!seen) mask(x, tokens, behind);
        const char *at = values_arrived();
        value_steps<true>(scale, zero, at + CODES, BITS);
        add_weights(n, x, scale, zero, ABOVE, sums_of(BITS));
        code_values(n, at, BITS);
    }

    /* And those of the same class behind it, of which the last one may hold fewer tokens. The note of what comes then.
     *
     * Code that has not run for a while has to come from far away, which takes as long as several pages: where classes
     * follow each other soon (`mixed`) they share what `pages` has. */
    template <int BITS> __device__ __forceinline__ page_note plain_pages(page_note note, bool seen, int behind) {
        const int list = a.q == 1 ? note.list : -1;
        uint32_t other; /* than a full page */
#pragma unroll 1
        do {
            plain_page<BITS>(seen, note.kind >> 16 & 0xff, behind);
            note = copies.note();
            other = note.kind ^ (BITS | BITS << 8 | 64 << 16);
            seen = other == 0;
        } while (note.list == list && (other & 0xffff) == 0);
        return note;
    }

    /* A page, or several; the note of what comes then. Of what all classes go through there is one copy, and K's codes
     * take a loop: see plain_pages. */
    __device__ __forceinline__ page_note pages(const page_note &note) {
        const int k_bits = note.kind & 0xff, v_bits = note.kind >> 8 & 0xff, tokens = note.kind >> 16 & 0xff;
        const bool tail = k_bits == 16 && v_bits == 16;
        const int behind = a.q > 1 ? tokens_behind(a, tail_page, tail_tokens, note.list, note.page, tokens) : 0;
        const bool seen = tokens == (tail ? 16 : 64) && (a.q == 1 || behind >= a.q);
        if (k_bits == v_bits && !tail && a.plain && !mixed) {
            switch (k_bits) {
            case 2: return plain_pages<2>(note, seen, behind);
            case 3: return plain_pages<3>(note, seen, behind);
            case 4: return plain_pages<4>(note, seen, behind);
            default: return plain_pages<8>(note, seen, behind);
            }
        }
        joint = note.joint;
        float x[QT][8], n[QT][8], scale[8], zero[8];
        if (k_bits < 16) {
            const char *last;
            switch (k_bits) {
            case 2: last = code_products<2, 1>(x); break;
            case 3: last = code_products<3, 1>(x); break;
            case 4: last = code_products<4, 1>(x); break;
            default: last = code_products<8, 1>(x);
            }
            const half_facts k = a.halves[k_bits];
            scale_products<false>(x, last + k.last_codes, k_bits);
            if (!joint) {
                const int pieces = QT == PARTS ? 1 : k.pieces;
#pragma unroll 1
                for (int p = 0; p < pieces; p++) copies.release();
            }
        } else if (tail) {
            half_logits<16>(x);
        } else {
            half_logits<64>(x);
        }
        cap(x);
        if (!seen) mask(x, tokens, behind);
        const char *at = nullptr;
        if (v_bits < 16) {
            at = values_arrived();
            value_steps<false>(scale, zero, at + a.halves[v_bits].last_codes, v_bits);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) scale[j] = 1, zero[j] = 0;
        }
        add_weights(n, x, scale, zero, v_bits < 16 ? ABOVE : 0.0f, sums_of(v_bits));
        if (v_bits < 16)
            code_values(n, at, v_bits);
        else if (tail)
            half_values<16>(n);
        else
            half_values<64>(n);
        return copies.note();
    }

    /* Half of `middles`, over all tokens, of this lane's queries. */
    __device__ __forceinline__ void middle_sums(float (&middle)[QT]) const {
#pragma unroll
        for (int t = 0; t < QT; t++) {
            middle[t] = 0;
            if (!INTEGER || held == SUMS_FLOAT) continue;
            int all = middles[t]; /* of column r */
            all += __shfl_xor_sync(ALL, all, 1);
            all += __shfl_xor_sync(ALL, all, 2);
            const int high = __shfl_sync(ALL, all, 8 * c), low = __shfl_sync(ALL, all, 8 * c + 4);
            middle[t] = 0.5f * fmaf(256.0f, (float)high, (float)low);
        }
    }

    /* The registers' sums into this warp's rows of shared memory: (query, channel). */
    __device__ __forceinline__ void drain() {
        float middle[QT];
        middle_sums(middle);
        const float up = held == SUMS_SHIFTED ? 1.0f / 16 : 1.0f;
#pragma unroll
        for (int t = 0; t < QT; t++) {
            const float by = exp2_of(drained[t] - shift[t]);
            drained[t] = top[t] == NOTHING ? NOTHING : shift[t];
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float value;
                    if constexpr (INTEGER) {
                        uint32_t high = sum[i][t % VT][2 * half], low = sum[i][t % VT][2 * half + 1];
                        if (half && held == SUMS_SHIFTED) high -= sum[i][t % VT][0], low -= sum[i][t % VT][1];
                        if (held == SUMS_FLOAT)
                            value = __uint_as_float(high) + __uint_as_float(low);
                        else
                            value = fmaf(fmaf(256.0f, (float)(int)high, (float)(int)low), half ? up : 1.0f, -middle[t]);
                    } else {
                        value = __uint_as_float(sum[i][t >> 1 & 1][2 * half + (t & 1)]);
                    }
                    float *to = sums + query(t) * S::PITCH + 16 * i + r + 8 * half;
                    *to = has_sums ? fmaf(*to, by, value) : value;
                }
        }
        has_sums = true;
        clear_sums();
    }
};

} // namespace
