/* attend_rows_page.cuh: one page of one warpgroup, for up to 64 queries of a list at once, on sm_90a.
 *
 * Both products have the page's codes as wgmma's 64-row operand, converted in registers once for all queries; the other
 * operand lies in shared memory, rows of 128 bytes with their 16-byte parts exchanged by the row's number. Lane = 4*r+c
 * of warp w:
 *
 *     logits: tokens 16w + r, 16w + r + 8 times queries. Below 16 bits K's codes meet q in fixed point, whose high and
 *             low byte are neighbouring columns, as integers: the sums are exact. 16-bit K: q in two 16-bit floats.
 *     values: channels 16(4i + w) + r, + 8 of block i times queries. V's codes less their middle, and weights times V's
 *             scale, as fp16; 16-bit V: weights in two 16-bit floats. Weights go through shared memory (stmatrix).
 *
 * Columns of q are in such an order that the logits of a lane are those of queries 8j + 2c, 8j + 2c + 1, whose sums of
 * values it holds as well: what belongs to a query stays in a lane's registers, the same in all lanes of this c.
 *
 * Weights' unit is raised when a weight has outgrown fp16; that is rare, and settled by all warps together. */
#pragma once
#include "attend_codes.cuh"
#include "attend_list.cuh"
#include "attend_ring.cuh"
#include "wgmma_registers.cuh"

namespace {

/* Sizes for head dimension D and N queries. */
template <int D, int N> struct rows_sizes {
    static constexpr int TILES = D / 16, BLOCKS = (TILES + 3) / 4; /* of channels: blocks of 64 */
    static constexpr int READERS = N == 64 || (N == 32 && D > 128) ? 2 : N == 32 || D > 128 ? 3 : 4; /* warpgroups */
    static constexpr int QUERIES = N, PARTS_OF_BLOCK = READERS, WORKING_THREADS = READERS * 128;     /* of merge_list */
    static constexpr int THREADS = WORKING_THREADS + 128; /* and those that fetch */
    static constexpr int WORKING_REGISTERS = READERS == 2 ? 224 : READERS == 3 ? 152 : 104;
    static constexpr int FETCHING_REGISTERS = 56;
    /* Floats of a row of sums, with room for channels that are none; its rows' lanes lie in different banks. */
    static constexpr int PITCH = 64 * BLOCKS + 4;
    static constexpr int ITEMS = N * D / 4;
    static constexpr int GROUPS = WORKING_THREADS < 2 * ITEMS ? 1 : WORKING_THREADS / ITEMS;
    static constexpr int PANEL = 2 * N * 128;
    static constexpr int CODE_BYTES = PANEL * ((D + 127) / 128), HALF_BYTES = PANEL * ((D + 63) / 64);
    static constexpr int WEIGHT_BYTES = N * 128; /* of a buffer; a warpgroup has two */
    static constexpr int SUMS_BYTES = READERS * N * PITCH * 4;
    static constexpr int ALIGNMENT = 1024;
    static constexpr int FIXED_BYTES = ALIGNMENT + CODE_BYTES + HALF_BYTES + READERS * 2 * WEIGHT_BYTES + SUMS_BYTES +
                                       (READERS + 1) * N * 16 + READERS * N * 16 + READERS * 4 * N * 8 + GROUPS * N * 8;
    static_assert(GROUPS <= READERS, "groups of merge_list write where parts lie");
};

/* Pages after which sums are emptied, as the tensor cores truncate: weights are numbers of 11 bits times small
 * integers, so a sum of 1024 of them loses no bit of any but the least ones (a model of it with 32 pages differs from
 * exact sums by less than the rounding of weights does). */
constexpr int ROWS_DRAIN = 16;

/* log2 of the greatest weight where a unit is chosen. One query that outgrows fp16 makes the whole warpgroup settle: so
 * there are five octaves of room, rather than the other kernel's one and a half, with which every eighth page settled
 * (4 bits, 16 queries of 32k random tokens). What fp16 loses is still below 2^-36 of the greatest: of 2^17 tokens,
 * 2^-19. */
constexpr float ROWS_SHIFT_AT = 11.0f;

#ifdef KVC_HOPPER

/* Where a query's numbers go: two rows of each operand, as its bytes and as 16-bit floats. */
template <int N> struct operand_place {
    uint8_t *codes, *halves;
    int row; /* the first of the two */

    __device__ __forceinline__ operand_place(uint8_t *codes, uint8_t *halves, int n)
        : codes(codes), halves(halves), row(2 * ((n & ~7) | (n & 1) << 2 | (n >> 1 & 3))) {}

    __device__ __forceinline__ uint32_t at(int row, int byte) const {
        return (byte >> 7) * (2 * N * 128) + row * 128 + ((byte & 127) ^ (row & 7) << 4);
    }

    __device__ __forceinline__ void code(int channel, int high, int low) const {
        codes[at(row, channel)] = (uint8_t)high;
        codes[at(row + 1, channel)] = (uint8_t)low;
    }

    /* In the order in which a lane has a tile's 16-bit channels: 4c, 4c + 2, and behind all lanes' 4c + 1, 4c + 3. */
    __device__ __forceinline__ void half(int channel, uint16_t first, uint16_t second) const {
        const int byte = 2 * ((channel & ~15) + (channel & 1) * 8 + (channel >> 2 & 3) * 2 + (channel >> 1 & 1));
        *(uint16_t *)(halves + at(row, byte)) = first;
        *(uint16_t *)(halves + at(row + 1, byte)) = second;
    }
};

/* Four 8 x 8 blocks of 16-bit numbers, each transposed, to rows of 16 bytes: lane l has the address of row l % 8 of
 * block l / 8. */
__device__ __forceinline__ void store_transposed(uint32_t at, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0],{%1,%2,%3,%4};" ::"r"(at), "r"(x), "r"(y), "r"(z),
                 "r"(w)
                 : "memory");
}

/* Weights as fp16, or as two 16-bit floats.
 *
 * V's codes meet fp16 weights less middle_code, half a step above the true middle. What that adds is taken off again by
 * the very weights that were rounded (`zeros`), not by those before: else each weight's rounding error would move all
 * channels alike by half a step times itself, which the Hadamard rotation of the result gathers in one channel, its
 * sqrt(block) fold. At 2 bits that alone was up to twice the bound; so a weight's error meets codes less the true
 * middle, whose signs differ from channel to channel. */
enum { WEIGHTS_HALF, WEIGHTS_TWO };

template <int D, int N> struct rows_worker {
    using S = rows_sizes<D, N>;
    static constexpr int TILES = S::TILES, BLOCKS = S::BLOCKS;
    static constexpr int T = N / 4; /* queries of a lane */
    static constexpr int AT_ONCE = T < 8 ? T : 8, PASSES = T / AT_ONCE;

    const attend_job &a;
    ring copies;
    uint64_t codes, halves, numbers; /* descriptors: of q as bytes, as 16-bit floats; of the first buffer of weights */
    uint32_t store_at;               /* this lane's address for store_transposed, in the first buffer */
    float *sums;                     /* (N, PITCH): this warpgroup's, emptied into */
    float2 *scratch;                 /* (4, N): a pair a warp */
    float4 *constants;               /* (N): factor, total, shift */
    const float4 *info;
    int lane, r, c, warp, barrier; /* warp: of the warpgroup */
    float weights[T], zeros[T];
    float sum[BLOCKS][N / 2];
    unsigned begun; /* bit t: query t has seen a token */
    int since_drain, turn, joint;
    bool has_sums;
    int tail_page, tail_tokens, open_page; /* of the list; open_page: the first that some query does not see all of */

    __device__ __forceinline__ rows_worker(const attend_job &a, const rings &all, int reader)
        : a(a), copies(all, reader), lane(threadIdx.x & 31), r(lane >> 2), c(lane & 3),
          warp(__shfl_sync(ALL, threadIdx.x >> 5, 0) & 3), barrier(3 + reader), turn(0) {}

    __device__ __forceinline__ int query(int t) const { return 8 * (t >> 1) + 2 * c + (t & 1); }
    __device__ __forceinline__ float shift_of(int t) const { return constants[query(t)].z; }

    /* The warpgroup's. */
    __device__ __forceinline__ void meet_group() const { named_barrier(barrier, 128); }
    __device__ __forceinline__ bool any_of_group(bool x) const {
        uint32_t any;
        asm volatile("{.reg .pred p,q; setp.ne.u32 p,%1,0; bar.red.or.pred q,%2,128,p; selp.u32 %0,1,0,q;}"
                     : "=r"(any)
                     : "r"((uint32_t)x), "r"(barrier)
                     : "memory");
        return any;
    }

    /* Once q is laid out. */
    __device__ __forceinline__ void begin_list(int list) {
#pragma unroll
        for (int t = 0; t < T; t++) weights[t] = zeros[t] = 0;
        const int n = threadIdx.x & 127;
        if (n < N) constants[n] = make_float4(info[n].x, info[n].y, 0, 0);
        meet_group();
#pragma unroll
        for (int i = 0; i < BLOCKS; i++)
#pragma unroll
            for (int j = 0; j < N / 2; j++) sum[i][j] = 0;
        begun = 0;
        since_drain = 0;
        has_sums = false;
        open_page = NO_LIST;
        if (a.q > 1) { /* then the kernel before has ended (`early`) */
            tail_page = a.lists[list].tail_page;
            tail_tokens = a.lists[list].tail_tokens;
            int behind = tail_tokens;
            open_page = min(tail_page, a.capacity);
            while (open_page > 0 && behind < a.q) behind += a.table[(int64_t)list * a.capacity + --open_page].tokens;
        }
    }

    /* ---- K */

    /* Shared memory's addresses stay within the lower word. */
    static __device__ __forceinline__ uint64_t ahead(uint64_t of, int bytes) {
        return (of & 0xffffffff00000000u) | (uint32_t)((uint32_t)of + (bytes >> 4));
    }

    /* Products of q and K's codes, in units of both, of a page of 64 tokens, whose first piece is there. Returns where
     * its last piece lies, which is not given back yet; where q is looked at in several passes none is. */
    template <int BITS> __device__ __forceinline__ const char *code_products(float (&x)[T][2]) {
        using C = piece<BITS, 64>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, MOST = TILES < C::TILES ? TILES : C::TILES;
        constexpr int LAST_TILES = TILES - (PIECES - 1) * C::TILES;
        const char *last = nullptr;
        uint32_t rows[(MOST + 1) / 2][4];
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            int products[4 * AT_ONCE] = {};
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const int tiles = p + 1 < PIECES ? C::TILES : LAST_TILES;
                if (pass == 0 || PIECES > 1) {
                    const char *at = last = p == 0 ? copies.next() : copies.arrived(PASSES == 1 ? 0 : p);
#pragma unroll
                    for (int i = 0; i < tiles; i++)
                        tile_codes<BITS>(rows[i / 2][i % 2 * 2], rows[i / 2][i % 2 * 2 + 1], at + i * C::TILE_BYTES,
                                         lane, warp);
                    if (tiles % 2) rows[tiles / 2][2] = rows[tiles / 2][3] = 0;
                }
#pragma unroll
                for (int i = 0; i < tiles; i += 2) hold(rows[i / 2]);
                hold(products);
                wgmma_begin();
#pragma unroll
                for (int i = 0; i < tiles; i += 2) {
                    const int step = (p * C::TILES + i) / 2;
                    wgmma_bytes(products, rows[i / 2],
                                ahead(codes, step / 4 * S::PANEL + step % 4 * 32 + pass * 64 * 128));
                }
                wgmma_commit();
                wgmma_wait<0>();
                hold(products);
                if (PASSES == 1 && p + 1 < PIECES) copies.release();
            }
#pragma unroll
            for (int t = 0; t < AT_ONCE; t++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    x[pass * AT_ONCE + t][j] =
                        __int2float_rn(256 * products[4 * t + 2 * j] + products[4 * t + 2 * j + 1]);
        }
        return last;
    }

    /* Logits, not yet capped or masked, from products; `scales`: behind K's codes. */
    template <bool PLAIN>
    __device__ __forceinline__ void scale_products(float (&x)[T][2], const char *scales, int bits) const {
        float scale[2], zero[2];
        steps<PLAIN>(scale, zero, a, scales, 16 * warp + r);
        const float middle = -0.5f * (float)((1 << bits) - 1);
#pragma unroll
        for (int j = 0; j < 2; j++) zero[j] = fmaf(scale[j], middle, zero[j]);
        if (bits < 8) scale[1] *= 1.0f / 16; /* rows r + 8 */
        const bool capped = !PLAIN && a.softcap > 0;
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float4 of = constants[query(t)];
            const float less = capped ? 0.0f : -of.z;
#pragma unroll
            for (int j = 0; j < 2; j++) x[t][j] = fmaf(scale[j], x[t][j] * of.x, fmaf(zero[j], of.y, less));
        }
    }

    /* Logits of 16-bit values; P = 16 or 64 tokens. */
    template <int P, bool BRAIN> __device__ __forceinline__ void half_logits(float (&x)[T][2]) {
        using C = piece<16, P>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES;
        const bool capped = a.softcap > 0;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            float products[4 * AT_ONCE] = {};
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const char *at = copies.arrived(PASSES == 1 ? 0 : p);
                const int tiles = p + 1 < PIECES ? C::TILES : TILES - (PIECES - 1) * C::TILES;
                uint32_t rows[C::TILES][4];
#pragma unroll
                for (int i = 0; i < tiles; i++) {
                    const char *tile = at + i * C::TILE_BYTES;
#pragma unroll
                    for (int v = 0; v < 4; v++)
                        rows[i][v] = ((const uint32_t *)tile)[P == 16 ? 4 * lane + v : 128 * v + 4 * lane + warp];
                    hold(rows[i]);
                }
                hold(products);
                wgmma_begin();
#pragma unroll
                for (int i = 0; i < tiles; i++) {
                    const int step = p * C::TILES + i;
                    wgmma_halves<BRAIN>(products, rows[i],
                                        ahead(halves, step / 4 * S::PANEL + step % 4 * 32 + pass * 64 * 128));
                }
                wgmma_commit();
                wgmma_wait<0>();
                hold(products);
                if (PASSES == 1) copies.release();
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int t = pass * AT_ONCE + i;
                const float4 of = constants[query(t)];
                const float factor = 256.0f * of.x, less = capped ? 0.0f : -of.z;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float logit = fmaf(products[4 * i + 2 * j] + products[4 * i + 2 * j + 1], factor, less);
                    x[t][j] = P == 16 && warp > 0 ? -INFINITY : logit; /* the same tokens again */
                }
            }
        }
        if (PASSES > 1)
#pragma unroll
            for (int p = 0; p < PIECES; p++) copies.release();
    }

    __device__ __forceinline__ void cap(float (&x)[T][2]) const {
#pragma unroll
        for (int t = 0; t < T; t++)
#pragma unroll
            for (int j = 0; j < 2; j++) x[t][j] = capped(x[t][j], a.softcap) - shift_of(t);
    }

    __device__ __forceinline__ void mask(float (&x)[T][2], int tokens, int behind) const {
#pragma unroll
        for (int t = 0; t < T; t++) {
            const int seen = tokens - (a.q > 1 ? max(0, __float_as_int(info[query(t)].z) - behind) : 0);
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (16 * warp + r + 8 * j >= seen) x[t][j] = -INFINITY;
        }
    }

    /* ---- weights and V */

    /* Weights of a page's tokens, times V's scale, into the buffer of this turn (WEIGHTS_TWO: into both); `weight` and
     * `offset`: what they add to their sums. True where one is too large. */
    template <int KIND>
    __device__ __forceinline__ bool weigh(float (&weight)[T], float (&offset)[T], const float (&x)[T][2],
                                          const float (&scale)[2], const float (&zero)[2]) const {
        half2 most = __float2half2_rn(0.0f);
        float most_weight = 0;
        const uint32_t to = store_at + (KIND == WEIGHTS_HALF ? turn * S::WEIGHT_BYTES : 0);
#pragma unroll
        for (int i = 0; i < T; i += 4) { /* two blocks of 8 queries */
            uint32_t rounded[2][2], rest[2][2];
#pragma unroll
            for (int k = 0; k < 2; k++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int t = i + 2 * k;
                    const float first = exp2_of(x[t][j]), second = exp2_of(x[t + 1][j]);
                    weight[t] = j == 0 ? first : weight[t] + first;
                    weight[t + 1] = j == 0 ? second : weight[t + 1] + second;
                    if constexpr (KIND == WEIGHTS_HALF) {
                        rounded[k][j] = half2_bits(first * scale[j], second * scale[j]);
                        const half2 both = *(const half2 *)&rounded[k][j];
                        most = __hmax2(most, both);
                        offset[t] = j == 0 ? first * zero[j] : fmaf(first, zero[j], offset[t]);
                        offset[t + 1] = j == 0 ? second * zero[j] : fmaf(second, zero[j], offset[t + 1]);
                        offset[t] = fmaf(0.5f, __low2float(both), offset[t]);
                        offset[t + 1] = fmaf(0.5f, __high2float(both), offset[t + 1]);
                    } else {
                        most_weight = fmaxf(most_weight, fmaxf(first, second));
                        offset[t] = offset[t + 1] = 0;
                        split(rounded[k][j], rest[k][j], first, second, a.half == KVC_BFLOAT16);
                    }
                }
            store_transposed(to + i / 2 * 1024, rounded[0][0], rounded[0][1], rounded[1][0], rounded[1][1]);
            if constexpr (KIND == WEIGHTS_TWO)
                store_transposed(to + S::WEIGHT_BYTES + i / 2 * 1024, rest[0][0], rest[0][1], rest[1][0], rest[1][1]);
        }
        return KIND == WEIGHTS_HALF ? fmaxf(__low2float(most), __high2float(most)) > MOST_WEIGHT
                                    : most_weight > MOST_WEIGHT;
    }

    /* Where a weight is too large, or a query's first ones have no unit yet: a new unit, to which sums and x are
     * brought. False: all stays as it is. By the whole warpgroup. */
    __device__ __forceinline__ bool settle(float (&x)[T][2], const float (&scale)[2]) {
        float logit[T]; /* the greatest, plus log2 of V's scale */
        const float log_scale[2] = {fmaxf(log2_of(scale[0]), -24.0f), fmaxf(log2_of(scale[1]), -24.0f)};
#pragma unroll
        for (int t = 0; t < T; t++) {
            logit[t] = fmaxf(x[t][0] + log_scale[0], x[t][1] + log_scale[1]);
#pragma unroll
            for (int o = 4; o < 32; o <<= 1) logit[t] = fmaxf(logit[t], __shfl_xor_sync(ALL, logit[t], o));
            if (r == 0) scratch[warp * N + query(t)].x = logit[t];
        }
        meet_group();
        bool change = false;
        float before[T];
#pragma unroll
        for (int t = 0; t < T; t++) {
            before[t] = shift_of(t);
            logit[t] = scratch[query(t)].x;
#pragma unroll
            for (int k = 1; k < 4; k++) logit[t] = fmaxf(logit[t], scratch[k * N + query(t)].x);
            change = change || logit[t] > 15.97f || (!(begun >> t & 1) && logit[t] > -INFINITY); /* 64600 = 2^15.98 */
        }
        meet_group(); /* scratch may be written again, and shifts */
        if (!__any_sync(ALL, change)) return false;
        const bool empties = since_drain || has_sums;
#pragma unroll
        for (int t = 0; t < T; t++) {
            float by = 1;
            if (fabsf(logit[t]) < INFINITY) { /* else nothing is seen, or a NaN */
                const float lowest = begun >> t & 1 ? before[t] : NOTHING;
                const float next = fmaxf(unit_for(logit[t] + before[t] - ROWS_SHIFT_AT), lowest),
                            less = before[t] - next;
                by = begun >> t & 1 ? exp2_of(less) : 0.0f;
                constants[query(t)].z = next; /* by every lane of the query the same */
                begun |= 1u << t;
                weights[t] *= by;
                zeros[t] *= by;
#pragma unroll
                for (int j = 0; j < 2; j++) x[t][j] = at_most(x[t][j] + less, ROWS_SHIFT_AT + 1 - log_scale[j]);
            }
            if (empties) drain_query(t, by);
        }
        if (empties) drained();
        return true; /* the weights' barrier lies before the next look at shifts */
    }

    /* Registers' sums of a query go to shared memory, where the whole is then multiplied. */
    __device__ __forceinline__ void drain_query(int t, float by) {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float *const to = sums + query(t) * S::PITCH + 16 * (4 * i + warp) + r + 8 * j;
                float &value = sum[i][(t >> 1) * 4 + 2 * j + (t & 1)];
                *to = (has_sums ? *to + value : value) * by;
            }
        }
    }

    __device__ __forceinline__ void drained() {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++)
#pragma unroll
            for (int j = 0; j < N / 2; j++) sum[i][j] = 0;
        has_sums = true;
        since_drain = 0;
    }

    __device__ __forceinline__ void drain() {
#pragma unroll
        for (int t = 0; t < T; t++) drain_query(t, 1.0f);
        drained();
    }

    /* A page's weights into their sums and into shared memory, where all warps see them. */
    template <int KIND>
    __device__ __forceinline__ void add_weights(float (&x)[T][2], const float (&scale)[2], const float (&zero)[2]) {
        float weight[T], offset[T];
        bool settled = false;
#pragma unroll 1
        for (;;) {
            const bool large = weigh<KIND>(weight, offset, x, scale, zero);
            if (T == 16) hold(weight), hold(offset); /* now, rather than keep what they are made of */
            fence_async();
            /* A weight may be infinite where V's scale is 0, and what is rounded then says nothing. */
            const bool hidden = KIND == WEIGHTS_HALF && (scale[0] == 0 || scale[1] == 0);
            const bool wrong = any_of_group(large || hidden || begun != (1u << T) - 1);
            if (__builtin_expect(!wrong, 1) || settled || !settle(x, scale)) break;
            settled = true;
        }
#pragma unroll
        for (int t = 0; t < T; t++) {
            weights[t] += weight[t];
            zeros[t] += offset[t];
        }
    }

    /* Adds V's codes, whose last piece lies at `at`, times this turn's weights. */
    template <int BITS> __device__ __forceinline__ void add_codes(const char *at) {
        using C = piece<BITS, 64>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES;
        const uint64_t weights_at = ahead(numbers, turn * S::WEIGHT_BYTES);
        turn ^= 1;
#pragma unroll
        for (int k = 0; k < PIECES; k++) { /* the last one comes first */
            const int first = (k == 0 ? PIECES - 1 : k - 1) * C::TILES;
            if (k > 0) at = copies.arrived();
#pragma unroll
            for (int i = first / 4; 4 * i < (first + C::TILES < TILES ? first + C::TILES : TILES); i++) {
                uint32_t v[4][4]; /* of each token tile */
                ::halves<BITS>(v, at + (min(4 * i + warp, TILES - 1) - first) * C::TILE_BYTES, lane);
#pragma unroll
                for (int u = 0; u < 4; u++) hold(v[u]);
                hold(sum[i]);
                wgmma_begin();
#pragma unroll
                for (int u = 0; u < 4; u++) wgmma_halves<false>(sum[i], v[u], ahead(weights_at, 32 * u));
                wgmma_commit();
            }
            wgmma_wait<0>();
#pragma unroll
            for (int i = first / 4; 4 * i < (first + C::TILES < TILES ? first + C::TILES : TILES); i++) hold(sum[i]);
            copies.release();
        }
        since_drain++;
    }

    /* The same of 16-bit values. */
    template <int P, bool BRAIN> __device__ __forceinline__ void add_halves() {
        using C = piece<16, P>;
        constexpr int PIECES = (TILES + C::TILES - 1) / C::TILES, STEPS = P / 16;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            constexpr int EACH = P == 64 ? 4 / C::TILES : 1; /* pieces of a block */
            const int tile = min(4 * i + warp, TILES - 1);   /* rows of a tile that is not there are not looked at */
            const char *at = copies.arrived();
            if (P == 64) {
                const bool second = 2 * i + 1 < PIECES;
                const char *other = second ? copies.arrived(1) : at;
                at = (tile - 4 * i >> 1 ? other : at) + (tile & 1) * C::TILE_BYTES;
            } else {
                at += (tile - i / 2 * 8) * C::TILE_BYTES;
            }
            uint32_t v[STEPS][4];
#pragma unroll
            for (int row = 0; row < 4; row++) {
                if constexpr (P == 64) {
                    const uint4 w = ((const uint4 *)at)[32 * row + lane];
                    v[0][row] = w.x, v[1][row] = w.y, v[2][row] = w.z, v[3][row] = w.w;
                } else {
                    v[0][row] = ((const uint32_t *)at)[4 * lane + row];
                }
            }
#pragma unroll
            for (int u = 0; u < STEPS; u++) hold(v[u]);
            hold(sum[i]);
            wgmma_begin();
#pragma unroll
            for (int u = 0; u < STEPS; u++) {
                wgmma_halves<BRAIN>(sum[i], v[u], ahead(numbers, 32 * u));
                wgmma_halves<BRAIN>(sum[i], v[u], ahead(numbers, S::WEIGHT_BYTES + 32 * u));
            }
            wgmma_commit();
            wgmma_wait<0>();
            hold(sum[i]);
            if (P == 64) {
#pragma unroll
                for (int p = EACH * i; p < EACH * (i + 1); p++)
                    if (p < PIECES) copies.release();
            } else if (i % 2 || i + 1 == BLOCKS) {
                copies.release();
            }
        }
        since_drain++;
    }

    /* ---- a page; the end of a list */

    /* Full pages with K and V of so many bits. */
    static __device__ constexpr uint32_t full_of(int k_bits, int v_bits) {
        return (uint32_t)(k_bits | v_bits << 8 | 64 << 16);
    }

    /* The page that is next, and all behind it that are the same: full, of one class, with fp16 scales and zeros,
     * uncapped and seen by all queries. The usual case, for which nothing is decided page by page. The note of what
     * comes then. */
    template <int K, int V> __device__ __forceinline__ page_note usual_pages(const page_note &first) {
        constexpr int K_PIECES = (TILES + piece<K, 64>::TILES - 1) / piece<K, 64>::TILES;
        constexpr int K_BYTES = 8 * D * K + 4 * 64, V_BYTES = 8 * D * V + 4 * 64;
        constexpr int JOINT = K_BYTES + V_BYTES <= SLOT ? K_BYTES : 0; /* as page_note has it */
        page_note note;
        bool more;
#pragma unroll 1
        do {
            float x[T][2], scale[2], zero[2];
            const char *at = code_products<K>(x);
            scale_products<true>(x, at + last_codes<K>(), K);
            if (JOINT) {
                at = copies.next() + JOINT;
            } else {
#pragma unroll
                for (int p = 0; p < (PASSES == 1 ? 1 : K_PIECES); p++) copies.release();
                at = copies.arrived();
            }
            steps<true>(scale, zero, a, at + last_codes<V>(), 16 * warp + r);
            add_weights<WEIGHTS_HALF>(x, scale, zero);
            add_codes<V>(at);
            if (since_drain >= ROWS_DRAIN) drain();
            note = copies.note();
            more = note.kind == full_of(K, V) && note.list == first.list && note.page < open_page;
        } while (__all_sync(ALL, more));
        return note;
    }

    /* Bytes of codes in the last piece of a full page's K or V, behind which its scales lie. */
    template <int BITS> static __device__ constexpr int last_codes() {
        using C = piece<BITS, 64>;
        return (TILES - (TILES - 1) / C::TILES * C::TILES) * C::TILE_BYTES;
    }

    /* The page that is next, and others behind it; the note of what comes then. */
    __device__ __forceinline__ page_note page(const page_note &note) {
        const uint32_t kind = __shfl_sync(ALL, note.kind, 0);
        if (__all_sync(ALL, a.plain && note.page < open_page)) {
            if (kind == full_of(4, 4)) return usual_pages<4, 4>(note);
            if (kind == full_of(4, 2)) return usual_pages<4, 2>(note);
            if (kind == full_of(2, 2)) return usual_pages<2, 2>(note);
            if (kind == full_of(8, 8)) return usual_pages<8, 8>(note);
        }
        const int k_bits = kind & 0xff, v_bits = kind >> 8 & 0xff, tokens = kind >> 16 & 0xff;
        const bool tail = (kind & 0xffff) == 0x1010, brain = a.half == KVC_BFLOAT16;
        const int behind = a.q > 1 && note.page >= open_page
                               ? tokens_behind(a, tail_page, tail_tokens, note.list, note.page, tokens)
                               : a.q;
        joint = note.joint;
        float x[T][2];
        if (k_bits < 16) {
            const char *last;
            switch (k_bits) {
            case 2: last = code_products<2>(x); break;
            case 3: last = code_products<3>(x); break;
            case 4: last = code_products<4>(x); break;
            default: last = code_products<8>(x);
            }
            scale_products<false>(x, last + a.halves[k_bits].last_codes, k_bits);
            if (!joint) {
                const int pieces = PASSES == 1 ? 1 : a.halves[k_bits].pieces;
#pragma unroll 1
                for (int p = 0; p < pieces; p++) copies.release();
            }
        } else if (tail) {
            brain ? half_logits<16, true>(x) : half_logits<16, false>(x);
        } else {
            brain ? half_logits<64, true>(x) : half_logits<64, false>(x);
        }
        if (a.softcap > 0) cap(x);
        if (tokens < (tail ? 16 : 64) || behind < a.q) mask(x, tokens, behind);
        float scale[2], zero[2];
        if (v_bits < 16) {
            const char *at = joint ? copies.next() + joint : copies.arrived();
            steps<false>(scale, zero, a, at + a.halves[v_bits].last_codes, 16 * warp + r);
            add_weights<WEIGHTS_HALF>(x, scale, zero);
            switch (v_bits) {
            case 2: add_codes<2>(at); break;
            case 3: add_codes<3>(at); break;
            case 4: add_codes<4>(at); break;
            default: add_codes<8>(at);
            }
        } else {
            scale[0] = scale[1] = 1, zero[0] = zero[1] = 0;
            meet_group(); /* nobody multiplies with either buffer any more */
            add_weights<WEIGHTS_TWO>(x, scale, zero);
            if (tail)
                brain ? add_halves<16, true>() : add_halves<16, false>();
            else
                brain ? add_halves<64, true>() : add_halves<64, false>();
            meet_group();
        }
        if (since_drain >= ROWS_DRAIN) drain();
        return copies.note();
    }

    /* This warpgroup's part of a list: sums, and `ends` (N) as merge_list wants them. */
    __device__ __forceinline__ void end_list(float4 *ends) {
        if (since_drain) drain();
#pragma unroll
        for (int t = 0; t < T; t++) {
#pragma unroll
            for (int o = 4; o < 32; o <<= 1) {
                weights[t] += __shfl_xor_sync(ALL, weights[t], o);
                zeros[t] += __shfl_xor_sync(ALL, zeros[t], o);
            }
            if (r == 0) scratch[warp * N + query(t)] = make_float2(weights[t], zeros[t]);
        }
        meet_group();
        if (warp == 0 && r == 0) {
#pragma unroll
            for (int t = 0; t < T; t++) {
                float2 all = scratch[query(t)];
#pragma unroll
                for (int k = 1; k < 4; k++) {
                    const float2 more = scratch[k * N + query(t)];
                    all.x += more.x, all.y += more.y;
                }
                ends[query(t)] =
                    make_float4(begun >> t & 1 ? shift_of(t) : NOTHING, all.x, all.y, has_sums ? 1.0f : 0.0f);
            }
        }
    }
};

#endif

} // namespace
