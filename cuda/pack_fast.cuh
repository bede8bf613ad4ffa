/* pack_fast.cuh: pack for the common case: Hadamard rotation, one scale a row of 64, 128 or 256 16-bit channels,
 * nearest rounding. The bytes are the general kernel's (pack.cu).
 *
 * Rotated rows are sums of integers below 2^24 (pack.h, step 1), exact in any order: the tensor core forms them. A warp
 * takes 16 tokens. Rows are scaled so that their unit is the 16-bit format's least subnormal: one packed multiplication
 * rounds two values to units. Times a Hadamard matrix of +-HIGH they are ordinary numbers again. The matrix is that of
 * 32 channels; what is left of a rotation, 2, 4 or 8 such sums, are additions in registers.
 *
 * K and V take the same instructions, one after the other: two copies of them are more than the instruction caches of a
 * multiprocessor hold. Lane 4*g + t loads 16 bytes, channels 8t .. 8t+7 of every 32, of tokens g and g + 8; (tokens x
 * channels) times the matrix gives it four channels of every tile of these two tokens, and the order of the matrix's
 * columns says which. K's are those of the 8 elements that format.h gives to this lane, so codes become words in
 * registers. V's are 2t, 2t + 1, 2t + 8 and 2t + 9: each 16 bits of a word are of channels g and g + 8 and tokens j and
 * j + 8, and format.h's words come of turning matrices of these (`ldmatrix`).
 */
#pragma once
#include "pack_lanes.cuh"
#include "pack_sixteen.cuh"
#include "pack_steps.cuh"

namespace {

/* ---- the 16-bit formats */

template <int HALF> struct format16;

template <> struct format16<KVC_BFLOAT16> {
    static constexpr uint32_t HIGH = 0x7f00; /* 2^127 */
    static constexpr float LEAST = 0x1p-133f, UNITS = 64.0f, LARGE_FACTOR = 0x1p-100f, MOST = 0x1p127f;
    static __device__ float2 floats(uint32_t two) {
        return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
    }
    static __device__ uint32_t twice(float value) {
        const uint32_t bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
        return bits | bits << 16;
    }
    static __device__ __nv_bfloat162 as(uint32_t two) { return *(__nv_bfloat162 *)&two; }
    static __device__ uint32_t bits(__nv_bfloat162 two) { return *(uint32_t *)&two; }
    static __device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <> struct format16<KVC_FLOAT16> {
    static constexpr uint32_t HIGH = 0x7800; /* 2^15 */
    static constexpr float LEAST = 0x1p-24f, UNITS = 512.0f, LARGE_FACTOR = 0x1p-8f, MOST = 0x1p15f;
    static __device__ float2 floats(uint32_t two) { return __half22float2(as(two)); }
    static __device__ uint32_t twice(float value) {
        const uint32_t bits = __half_as_ushort(__float2half_rn(value));
        return bits | bits << 16;
    }
    static __device__ __half2 as(uint32_t two) { return *(__half2 *)&two; }
    static __device__ uint32_t bits(__half2 two) { return *(uint32_t *)&two; }
    static __device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <int HALF> __device__ uint32_t multiply(uint32_t x, uint32_t by) {
    return format16<HALF>::bits(__hmul2(format16<HALF>::as(x), format16<HALF>::as(by)));
}

__device__ uint32_t &word_of(uint4 &v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

/* ---- where things lie: y[n][u][c] is element c of lane's part of an instruction n = 0, 1 */

constexpr int SLOTS = 2; /* tokens of a lane: g and g + 8 */
__device__ constexpr int slot_of(int c) { return c >> 1; }
/* format.h's number of the element, for K. */
__device__ constexpr int element(int n, int c) { return 2 * n + c % 2 + 4 * (c >> 1); }

/* f over the lanes and slots of each token, at its owners. f is the same in any order. */
template <typename function> __device__ float to_owner(const float (&v)[SLOTS], int lane, function f) {
    const bool far = lane & 2;
    const float one = f(far ? v[1] : v[0], __shfl_xor_sync(ALL, far ? v[0] : v[1], 2));
    return f(one, __shfl_xor_sync(ALL, one, 1));
}

/* The sum of a number for each element, as a tree over the tile's channels: strides 8, 4, 2, 1. */
__device__ float tree_to_owner(const float (&v)[8], int lane, int value) {
    const bool far = lane & 2, odd = lane & 1;
    const auto meet = [](float mine, float sent, int stride) { return mine + __shfl_xor_sync(ALL, sent, stride); };
    float two[2];
    if (value) { /* 8: columns c, 4 and 2: lanes, 1: n */
        float four[4];
#pragma unroll
        for (int i = 0; i < 4; i++) four[i] = v[2 * i] + v[2 * i + 1];
#pragma unroll
        for (int n = 0; n < 2; n++) two[n] = meet(far ? four[2 + n] : four[n], far ? four[n] : four[2 + n], 2);
        const float one = meet(odd ? two[1] : two[0], odd ? two[0] : two[1], 1);
        return meet(one, one, 1);
    }
    float four[4]; /* 8 and 4: lanes, 2: n, 1: columns */
#pragma unroll
    for (int i = 0; i < 4; i++) four[i] = meet(far ? v[4 + i] : v[i], far ? v[i] : v[4 + i], 2);
#pragma unroll
    for (int n = 0; n < 2; n++)
        two[n] = meet(odd ? four[2 * n + 1] : four[2 * n], odd ? four[2 * n] : four[2 * n + 1], 1);
    const float one = two[0] + two[1];
    return meet(one, one, 1);
}

__device__ void from_owner(float (&out)[SLOTS], float v, int lane) {
#pragma unroll
    for (int k = 0; k < SLOTS; k++) out[k] = __shfl_sync(ALL, v, owner_of<0>(lane, k));
}

/* ---- rotation */

/* This lane's part of the matrix of 32 channels, for even channel tiles; odd ones differ by `odd`. From the lowest up,
 * bits of a loaded channel's number are its place in a word, the word r, the half h and two of t; those of a column's
 * are K's g & 1, n and two of g >> 1, or V's n, two of g >> 1 and g & 1. Each bit that both have changes the sign. */
template <int HALF> struct hadamard {
    uint32_t first, halves, words, second[2], odd;
    __device__ explicit hadamard(int lane, int value) {
        const int g = lane >> 2, t = lane & 3;
        constexpr uint32_t pair = format16<HALF>::HIGH * 0x10001u, minus = 0x80008000u, place = 0x80000000u;
        first = pair ^ (!value && g & 1 ? place : 0) ^ (t & (value ? g : g >> 2) & 1 ? minus : 0);
        halves = (value ? g >> 2 : g >> 1) & 1 ? minus : 0;
        words = value && g & 2 ? minus : 0;
        second[0] = value ? place : 0;
        second[1] = value ? place : minus;
        odd = t & 2 ? minus : 0;
    }
    __device__ uint32_t at(int h, int r, int n) const {
        return first ^ (h ? halves : 0) ^ (r ? words : 0) ^ (n ? second[r] : 0);
    }
};

/* y[n][u]: elements of channel tile 2*u (flip 0) or 2*u + 1 (flip: matrix.odd), in units of 1 / UNITS. Without LAST
 * they are sums and differences of such y[n][i] and y[n][i + TILES / 4]. */
template <int TILES, int HALF, bool LAST = true>
__device__ void rotate_tiles(float (&y)[2][TILES / 2][4], uint4 (&rows)[2][TILES / 2], const hadamard<HALF> &matrix,
                             uint32_t flip) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < TILES / 2; i++) {
            const uint32_t tokens[4] = {word_of(rows[0][i], 2 * h), word_of(rows[1][i], 2 * h),
                                        word_of(rows[0][i], 2 * h + 1), word_of(rows[1][i], 2 * h + 1)};
#pragma unroll
            for (int n = 0; n < 2; n++) {
                if (h == 0)
#pragma unroll
                    for (int c = 0; c < 4; c++) y[n][i][c] = 0.0f;
                format16<HALF>::multiply_add(y[n][i], tokens, matrix.at(h, 0, n) ^ flip, matrix.at(h, 1, n) ^ flip);
            }
        }
#pragma unroll
    for (int stride = 1; stride < (LAST ? TILES / 2 : TILES / 4); stride *= 2)
#pragma unroll
        for (int i = 0; i < TILES / 2; i++)
            if (!(i & stride))
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const float a = y[n][i][c], b = y[n][i + stride][c];
                        y[n][i][c] = a + b;
                        y[n][i + stride][c] = a - b;
                    }
}

/* ---- rows before the rotation */

/* What a lane's quad knows of the token g + 8 * (t >> 1) of its warp, and whether that is one. */
struct token_facts {
    row_facts row;
    float mid;
};

/* The sum of squares of the two rows, of all channels or all but the first: pack.h, step 2. */
template <int TILES, int HALF>
__device__ void sum_squares(float (&out)[2], uint4 (&rows)[2][TILES / 2], bool but_first) {
    const bool leave = but_first && (threadIdx.x & 3) == 0;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < TILES / 2; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float2 two = format16<HALF>::floats(word_of(rows[r][i], k));
                if (i == 0 && k == 0) two.x = leave ? 0.0f : two.x;
                sums[k >> 1] = __fmaf_rn(two.x, two.x, sums[k >> 1]);
                sums[k >> 1] = __fmaf_rn(two.y, two.y, sums[k >> 1]);
            }
        out[r] = sums[0] + sums[1];
#pragma unroll
        for (int stride = 1; stride <= 2; stride *= 2) out[r] += __shfl_xor_sync(ALL, out[r], stride);
    }
}

/* Gathers facts and makes the rows multiples of the format's least number, as many as y of pack.h's step 1 has. */
template <int TILES, int HALF>
__device__ void scale_rows(token_facts &facts, uint4 (&rows)[2][TILES / 2], bool with_squares, bool zero_point) {
    using format = format16<HALF>;
    const bool far = threadIdx.x & 2;
    if (with_squares) {
        float squares[2];
        sum_squares<TILES, HALF>(squares, rows, zero_point);
        facts.row.squares = far ? squares[1] : squares[0];
    }
    uint32_t most[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < TILES / 2; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) most[r] = largest<HALF>(word_of(rows[r][i], k), most[r]);
    uint32_t both = largest<HALF>(__byte_perm(most[0], most[1], 0x5410), __byte_perm(most[0], most[1], 0x7632));
#pragma unroll
    for (int stride = 1; stride <= 2; stride *= 2) both = largest<HALF>(__shfl_xor_sync(ALL, both, stride), both);
    const float2 rows_most = format::floats(both & 0x7fff7fffu);
    const uint32_t firsts = __shfl_sync(ALL, __byte_perm(rows[0][0].x, rows[1][0].x, 0x5410), threadIdx.x & 28);
    const float2 rows_first = format::floats(firsts);
    const float largest_of_row = fminf(far ? rows_most.y : rows_most.x, 0x1p96f);
    const float unit = kvc_row_unit(largest_of_row), inverse = kvc_power_inverse(unit);
    facts.row.first = fminf(fmaxf(far ? rows_first.y : rows_first.x, -0x1p96f), 0x1p96f);
    facts.row.first_unit = facts.row.first * inverse;
    facts.row.factor = unit * block_norm<TILES>();
    float factor = inverse * format::LEAST;
    const bool large = largest_of_row >= 32768.0f; /* the factor is less than the format's least number */
    if (__any_sync(ALL, large)) {
        const uint32_t mine = format::twice(large ? format::LARGE_FACTOR : 1.0f);
        const uint32_t other = __shfl_xor_sync(ALL, mine, 2);
        factor = large ? inverse * (format::LEAST / format::LARGE_FACTOR) : factor;
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < TILES / 2; i++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    uint32_t &x = word_of(rows[r][i], k);
                    if (HALF == KVC_BFLOAT16) {
                        const uint32_t limit = format::twice(0x1p96f);
                        x = format::bits(
                            __hmin2(__hmax2(format::as(x), format::as(limit ^ 0x80008000u)), format::as(limit)));
                    }
                    x = multiply<HALF>(x, r == (int)far ? mine : other);
                }
    }
    const uint32_t mine = format::twice(fminf(factor, format::MOST)); /* rows of zeros */
    const uint32_t other = __shfl_xor_sync(ALL, mine, 2);
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < TILES / 2; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                uint32_t &x = word_of(rows[r][i], k);
                x = multiply<HALF>(x, r == (int)far ? mine : other);
            }
}

/* ---- codes */

/* A lane's codes of its tiles into the stage. */
template <int TILES, bool EIGHT>
__device__ void encode_tiles(uint32_t *plane, const float (&y)[2][TILES / 2][4], const float (&slope)[SLOTS],
                             const float (&offset)[SLOTS], float most) {
#pragma unroll
    for (int u = 0; u < TILES / 2; u++) {
        uint32_t code[8];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int k = slot_of(c);
                code[element(n, c)] = __float_as_uint(code_of(__fmaf_rn(y[n][u][c], slope[k], offset[k]), most));
            }
        put_tile(plane + 64 * u, STAGE_TILES * 32 * TILES, code, EIGHT);
    }
}

/* Least and greatest of each slot's numbers, two more with each instruction: of floats read as signed integers the
 * greatest is the greatest, and of unsigned ones the least, where there are numbers of that sign. */
template <int TILES>
__device__ void range_of_held(float (&low)[SLOTS], float (&high)[SLOTS], const float (&y)[2][2][TILES / 2][4]) {
    uint32_t least[SLOTS], most[SLOTS];
    const auto each_slot = [&](auto visit) {
#pragma unroll
        for (int k = 0; k < SLOTS; k++)
#pragma unroll
            for (int u = 0; u < TILES / 2; u++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++)
#pragma unroll
                    for (int n = 0; n < 2; n++) visit(k, y[odd][n][u][2 * k], y[odd][n][u][2 * k + 1]);
    };
    bool mixed = true;
#pragma unroll
    for (int k = 0; k < SLOTS; k++) least[k] = most[k] = __float_as_uint(y[0][0][0][2 * k]);
    each_slot([&](int k, float a, float b) {
        least[k] = __vimax3_u32(least[k], __float_as_uint(a), __float_as_uint(b));
        most[k] = (uint32_t)__vimax3_s32((int)most[k], __float_as_int(a), __float_as_int(b));
    });
#pragma unroll
    for (int k = 0; k < SLOTS; k++) {
        low[k] = __uint_as_float(least[k]);
        high[k] = __uint_as_float(most[k]);
        mixed &= (int)least[k] <= 0 && (int)most[k] >= 0;
    }
    if (mixed) return; /* nearly always */
#pragma unroll
    for (int k = 0; k < SLOTS; k++) low[k] = high[k] = y[0][0][0][2 * k];
    each_slot([&](int k, float a, float b) {
        low[k] = fminf(low[k], fminf(a, b));
        high[k] = fmaxf(high[k], fmaxf(a, b));
    });
}

/* ---- one half of a page, but for the last step: words from the stage, after a barrier */

/* SCALE: the call's kvc_scale. All but sigma look at rotated rows several times, and keep them in registers, where they
 * fit; else each pass rotates again. */
template <int TILES, int SCALE> constexpr bool HOLD = SCALE != KVC_SCALE_SIGMA && TILES <= 8;

template <int TILES, int HALF, int SCALE>
__device__ __forceinline__ void pack_half(uint32_t *stage, const call &a, const job &it, const int (&tokens)[2]) {
    constexpr int CHANNELS = TILES * KVC_TILE;
    constexpr float UNITS = format16<HALF>::UNITS;
    const int lane = threadIdx.x & 31, tile = threadIdx.x / 32, bits = it.bits;
    const float mid = kvc_mid(bits), most = 2.0f * mid;
    const bool zero_point = a.layout.zero_point;
    uint4 rows[2][TILES / 2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const char *in = it.base + 16 * (lane & 3) + tokens[r] * it.stride;
#pragma unroll
        for (int i = 0; i < TILES / 2; i++)
            rows[r][i] = tokens[r] >= 0 ? __ldcs((const uint4 *)(in + 64 * i)) : make_uint4(0, 0, 0, 0);
    }
    constexpr bool searches = SCALE == KVC_SCALE_SEARCH;
    const bool range = SCALE != KVC_SCALE_SIGMA || bits >= 8;
    token_facts facts;
    scale_rows<TILES, HALF>(facts, rows, !range, zero_point);
    facts.mid = (lane & 2 ? tokens[1] : tokens[0]) >= 0 ? mid : 0.0f;
    facts.row.factor *= UNITS; /* as y */

    const hadamard<HALF> matrix(lane, it.value);
    float held[HOLD<TILES, SCALE> ? 2 : 1][2][TILES / 2][4];
    if constexpr (HOLD<TILES, SCALE>) {
        rotate_tiles<TILES, HALF>(held[0], rows, matrix, 0);
        rotate_tiles<TILES, HALF>(held[1], rows, matrix, matrix.odd);
    }
    /* visit(odd, y) */
    const auto each_y = [&](auto visit) {
        if constexpr (HOLD<TILES, SCALE>) {
            visit(0, held[0]);
            visit(1, held[1]);
        } else {
#pragma unroll 1
            for (int odd = 0; odd < 2; odd++) {
                rotate_tiles<TILES, HALF>(held[0], rows, matrix, odd ? matrix.odd : 0);
                visit(odd, held[0]);
            }
        }
    };
    /* At every owner: the line that makes codes; at every lane: those of its slots. */
    float slope[SLOTS], offset[SLOTS];
    const grouping whole = {};
    const auto spread_line = [&](const affine<1> &scales, float mid) {
        const line<1> at = encoder<1>(scales, whole, facts.row.factor).at(mid, most);
        from_owner(slope, at.slope[0], lane);
        from_owner(offset, at.offset[0], lane);
    };
    affine<1> scales;
    if (range) {
        float low[SLOTS], high[SLOTS];
        if constexpr (HOLD<TILES, SCALE>) {
            range_of_held<TILES>(low, high, held);
        } else {
#pragma unroll
            for (int k = 0; k < SLOTS; k++) low[k] = INFINITY, high[k] = -INFINITY;
#pragma unroll 1
            for (int odd = 0; odd < 2; odd++) {
                rotate_tiles<TILES, HALF, false>(held[0], rows, matrix, odd ? matrix.odd : 0);
#pragma unroll
                for (int u = 0; u < TILES / 4; u++) /* of x + y and x - y: x - |y| and x + |y| */
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            const int k = slot_of(c);
                            const float x = held[0][n][u][c], y = fabsf(held[0][n][u + TILES / 4][c]);
                            low[k] = fminf(low[k], x - y);
                            high[k] = fmaxf(high[k], x + y);
                        }
            }
        }
        /* No negative zeros, whatever the tensor core's are. */
        const float least = to_owner(low, lane, [](float a, float b) { return fminf(a, b); }) + 0.0f;
        const float greatest = to_owner(high, lane, [](float a, float b) { return fmaxf(a, b); }) + 0.0f;
        minmax_step(scales.scale[0], scales.zero[0], least, greatest, facts.row.factor, bits, zero_point);
    } else {
        sigma_of_facts<TILES>(scales.scale[0], scales.zero[0], facts.row, bits, zero_point);
    }
    if constexpr (searches) {
        const float mean = facts.row.first_unit * (1.0f / UNITS);
        search_start(scales.scale[0], scales.zero[0], mean, facts.row.factor, bits, CHANNELS, zero_point);
        spread_line(scales, mid);
        const float half = (float)(1 << (bits - 1));
        /* k is summed as bits of floats that hold codes in their lowest: one instruction adds two. */
        uint32_t bit_sums[SLOTS] = {};
        float k[SLOTS], kk[SLOTS] = {}, sums[8] = {};
        each_y([&](int, const float (&y)[2][TILES / 2][4]) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int at = slot_of(c);
                    float chain = 0.0f;
#pragma unroll
                    for (int u = 0; u < TILES / 2; u++) {
                        const float above = code_of(__fmaf_rn(y[n][u][c], slope[at], offset[at]), most);
                        const float code = above - (MAGIC + half);
                        bit_sums[at] += __float_as_uint(above);
                        kk[at] = __fmaf_rn(code, code, kk[at]);
                        chain = __fmaf_rn(code, y[n][u][c], chain);
                    }
                    sums[element(n, c)] += chain;
                }
        });
        constexpr int EACH = 8 * TILES / SLOTS;
#pragma unroll
        for (int i = 0; i < SLOTS; i++) k[i] = (float)(int)(bit_sums[i] - EACH * MAGIC_BITS) - EACH * half;
        const auto add = [](float a, float b) { return a + b; };
        const float sum_k = to_owner(k, lane, add), sum_kk = to_owner(kk, lane, add);
        refit(scales.scale[0], scales.zero[0], sum_k, sum_kk, tree_to_owner(sums, lane, it.value), mean, bits, CHANNELS,
              facts.row.factor, true);
    }
    round_to_stored(scales, whole, a.layout, bits);
    spread_line(scales, facts.mid);
    if (!(lane & 1)) { /* each owner once */
        const int row = KVC_TILE * tile + owned_token<0>(lane);
        uint8_t *to = it.scales + kvc_scale_offset(&a.layout, KVC_PAGE_TOKENS, 0, row);
        if (a.layout.scale_dtype == KVC_STEP_E5M3)
            put_step<KVC_STEP_E5M3>(to, scales.scale[0], scales.zero[0], zero_point);
        else
            put_step<KVC_STEP_FP16>(to, scales.scale[0], scales.zero[0], zero_point);
    }
    uint32_t *plane = stage + tile * 32 * TILES + lane;
    if (bits == 8)
        each_y([&](int odd, const float (&y)[2][TILES / 2][4]) {
            encode_tiles<TILES, true>(plane + 32 * odd, y, slope, offset, most);
        });
    else
        each_y([&](int odd, const float (&y)[2][TILES / 2][4]) {
            encode_tiles<TILES, false>(plane + 32 * odd, y, slope, offset, most);
        });
}

constexpr int fast_blocks(int tiles, int scale) {
    if (scale != KVC_SCALE_SIGMA) return tiles == 4 ? 5 : tiles == 8 ? 4 : 3;
    return tiles == 4 ? 7 : tiles == 8 ? 5 : 3;
}

template <int TILES, int HALF, int SCALE>
__global__ void __launch_bounds__(THREADS, fast_blocks(TILES, SCALE)) pack_fast_kernel(const __grid_constant__ call a) {
    constexpr int HALF_STAGE = 2 * STAGE_TILES * 32 * TILES; /* words of 8-bit codes */
    __shared__ uint4 stage[2 * HALF_STAGE / 4];
    job it;
    if (!take_job(a, &it, 0)) return;
    if (it.page_tokens == KVC_TAIL_TOKENS) {
        pack_tail<TILES, HALF>(stage, a, it);
        return;
    }
    if (it.page.k_bits == 16 || it.page.v_bits == 16) pack_sixteen_half<TILES, HALF>(stage, a, it);
    int tokens[2]; /* -1: none */
#pragma unroll
    for (int r = 0; r < 2; r++)
        tokens[r] = token_of(a, it, threadIdx.x / 32 * KVC_TILE + (threadIdx.x >> 2 & 7) + 8 * r);
#pragma unroll 1
    for (int value = 0; value < 2; value++) {
        uint32_t *own = (uint32_t *)stage + (value ? HALF_STAGE : 0);
        if (value) take_half(a, &it, 1);
        if (it.bits == 16) continue;
        pack_half<TILES, HALF, SCALE>(own, a, it, tokens);
        __syncthreads();
        write_tile_words<TILES>(it.words, own, it.bits, value);
    }
    if (a.layout.scale_dtype == KVC_STEP_E5M3) clear_padding(a, it);
}

/* ---- launches */

/* Whether the kernel above takes this call. Symmetric layouts search in the general one: they sum y too. */
bool takes_fast(const call &a) {
    uint64_t bits = 0;
    for (const rows &half : a.half)
        bits |= (uintptr_t)half.data | (uint64_t)half.b | (uint64_t)half.h | (uint64_t)half.s;
    const int d = a.layout.head_dim;
    return a.rotation == KVC_ROTATE_HADAMARD && !a.stochastic && a.half[0].dtype != KVC_FLOAT32 && bits % 16 == 0 &&
           a.layout.group == d && (d & (d - 1)) == 0 && (a.layout.zero_point || a.scale != KVC_SCALE_SEARCH);
}

template <int TILES, int HALF> void launch_fast(int n, const call &a, cudaStream_t stream) {
    if (a.scale == KVC_SCALE_SEARCH)
        pack_fast_kernel<TILES, HALF, KVC_SCALE_SEARCH><<<n, THREADS, 0, stream>>>(a);
    else if (a.scale == KVC_SCALE_MINMAX)
        pack_fast_kernel<TILES, HALF, KVC_SCALE_MINMAX><<<n, THREADS, 0, stream>>>(a);
    else
        pack_fast_kernel<TILES, HALF, KVC_SCALE_SIGMA><<<n, THREADS, 0, stream>>>(a);
}

template <int TILES> cudaError_t launch_fast(int n, const call &a, cudaStream_t stream) {
    if (a.half[0].dtype == KVC_BFLOAT16)
        launch_fast<TILES, KVC_BFLOAT16>(n, a, stream);
    else
        launch_fast<TILES, KVC_FLOAT16>(n, a, stream);
    return cudaGetLastError();
}

} // namespace
