/* pack.c: pages on the CPU: the specification of the packed bytes. Compiled without contraction of a*b+c. */
#include "kvcomp/pack.h"

#include <math.h>
#include <string.h>

#include "cpu/attend_tile.h"
#include "cpu/pack_page.h"
#include "kvcomp/philox.h"

#define T KVC_TILE

/* What must be compiled once for each instruction set: without its instruction a fused multiply-add is a slow call. */
#define INLINE static inline __attribute__((always_inline))
#define FMA __builtin_fmaf

/* As ternaries: they vectorize, and which of two zeros or equals comes out is part of the contract (the second). */
static inline float least_of(float a, float b) { return a < b ? a : b; }
static inline float most_of(float a, float b) { return a > b ? a : b; }
static inline float clamped(float v, float low, float high) { return least_of(most_of(v, low), high); }

void kvc_tile_clamp(kvc_tile x, int d) {
    for (int c = 0; c < d; c++)
        for (int j = 0; j < T; j++) x[c][j] = clamped(x[c][j], -0x1p96f, 0x1p96f);
}

static float norm_of(int d) { return 1.0f / sqrtf((float)(d & -d)); }

static void butterflies(kvc_tile x, int d) {
    const int block = d & -d;
    for (int stride = 1; stride < block; stride *= 2)
        for (int base = 0; base < d; base += 2 * stride)
            for (int c = base; c < base + stride; c++)
                for (int j = 0; j < T; j++) {
                    const float a = x[c][j], b = x[c + stride][j];
                    x[c][j] = a + b;
                    x[c + stride][j] = a - b;
                }
}

void kvc_tile_rotate(kvc_tile x, int d) {
    const float norm = norm_of(d);
    butterflies(x, d);
    for (int c = 0; c < d; c++)
        for (int j = 0; j < T; j++) x[c][j] *= norm;
}

/* What a tile's rows of y are: factors, and where the rows before the rotation tell mean and sigma, what they tell. */
typedef struct {
    float factor[T], first[T], first_unit[T], squares[T]; /* x[0], x[0] / unit, the sum of squares */
    int whole;                                            /* 1: first, first_unit, squares are there */
} facts;

/* Rotates for classes below 16: pack.h, step 1. x is clamped. */
INLINE void rotate_exactly(kvc_tile x, facts *f, const kvc_layout *layout) {
    const int d = layout->head_dim;
    const float norm = norm_of(d), magic = 12582912.0f;
    float most[T] = {0}, inverse[T];
    f->whole = layout->group == d && (d & (d - 1)) == 0;
    if (f->whole) {
        float sums[8][T] = {{0}};
        for (int c = layout->zero_point ? 1 : 0; c < d; c++)
            for (int j = 0; j < T; j++) sums[c / 4 % 8][j] = FMA(x[c][j], x[c][j], sums[c / 4 % 8][j]);
        for (int stride = 1; stride < 8; stride *= 2)
            for (int k = 0; k < 8; k += 2 * stride)
                for (int j = 0; j < T; j++) sums[k][j] += sums[k + stride][j];
        memcpy(f->squares, sums[0], sizeof sums[0]);
        memcpy(f->first, x[0], sizeof x[0]);
    }
    for (int c = 0; c < d; c++)
        for (int j = 0; j < T; j++) most[j] = most_of(x[c][j] < 0.0f ? -x[c][j] : x[c][j], most[j]);
    for (int j = 0; j < T; j++) {
        const float unit = kvc_row_unit(most[j]);
        inverse[j] = kvc_power_inverse(unit);
        f->factor[j] = unit * norm;
        f->first_unit[j] = x[0][j] * inverse[j];
    }
    for (int c = 0; c < d; c++)
        for (int j = 0; j < T; j++) x[c][j] = (x[c][j] * inverse[j] + magic) - magic;
    butterflies(x, d);
}

void kvc_row_rotate(float *x, int d) {
    const int block = d & -d;
    const float norm = 1.0f / sqrtf((float)block);
    for (int c = 0; c < d; c++) x[c] = clamped(x[c], -0x1p96f, 0x1p96f);
    for (int stride = 1; stride < block; stride *= 2)
        for (int base = 0; base < d; base += 2 * stride)
            for (int c = base; c < base + stride; c++) {
                const float a = x[c], b = x[c + stride];
                x[c] = a + b;
                x[c + stride] = a - b;
            }
    for (int c = 0; c < d; c++) x[c] *= norm;
}

/* Sums over n channels in the contract's order; the rows of `x` are used up. */
INLINE void tree_sum(float out[T], float (*x)[T], int n) {
    const int block = n & -n;
    for (int stride = block / 2; stride >= 1; stride /= 2)
        for (int base = 0; base < n; base += block)
            for (int c = base; c < base + stride; c++)
                for (int j = 0; j < T; j++) x[c][j] += x[c + stride][j];
    memcpy(out, x[0], sizeof(float[T]));
    for (int base = block; base < n; base += block)
        for (int j = 0; j < T; j++) out[j] += x[base][j];
}

static float rounded_to_half(float value) {
    return kvc_half_to_float(kvc_float_to_half(clamped(value, -65504.0f, 65504.0f), KVC_FLOAT16), KVC_FLOAT16);
}

typedef struct {
    float scale[T], zero[T];
} affine;

/* v = y * slope + offset: pack.h, step 3. */
typedef struct {
    float slope[T], offset[T];
} line;

INLINE void line_of(line *out, const affine *a, const float *factor, int bits) {
    const float step = 1.0f / (float)((1 << bits) - 1);
    for (int j = 0; j < T; j++) {
        const float per = (a->scale[j] > 0.0f ? 1.0f / a->scale[j] : 0.0f) * step;
        out->slope[j] = per * factor[j];
        out->offset[j] = FMA(-a->zero[j], per, 0.5f);
    }
}

/* Codes of one group as floats. */
INLINE void encode(float (*code)[T], float (*x)[T], int n, int bits, const affine *a, const float *factor) {
    const float most = (float)((1 << bits) - 1), magic = 12582912.0f; /* 1.5 * 2^23 */
    line at;
    line_of(&at, a, factor, bits);
    for (int c = 0; c < n; c++)
        for (int j = 0; j < T; j++) {
            const float v = FMA(x[c][j], at.slope[j], at.offset[j]);
            code[c][j] = FMA(clamped(v, 0.0f, 1.0f), most, magic) - magic;
        }
}

INLINE void encode_stochastic(float (*code)[T], float (*x)[T], int n, int bits, const affine *a, const float *factor,
                              int first_channel, int half, const uint32_t *numbers, const kvc_rounding *r) {
    const float most = (float)((1 << bits) - 1);
    line at;
    line_of(&at, a, factor, bits);
    for (int j = 0; j < T; j++)
        for (int c = 0; c < n; c += 4) {
            float u[4];
            kvc_philox_uniform4(u, r->seed, r->layer, r->list, 2 * numbers[j] + (uint32_t)half,
                                (uint32_t)(first_channel + c) / 4);
            for (int i = 0; i < 4; i++) {
                const float v = FMA(FMA(x[c + i][j], at.slope[j], at.offset[j]), most, u[i]);
                code[c + i][j] = floorf(clamped(v, 0.0f, most));
            }
        }
}

INLINE void fit_minmax(affine *out, float (*x)[T], const float *factor, int n, int bits, int zero_point) {
    float low[T], high[T];
    memcpy(low, x[0], sizeof low);
    memcpy(high, x[0], sizeof high);
    for (int c = 1; c < n; c++)
        for (int j = 0; j < T; j++) {
            low[j] = least_of(x[c][j], low[j]);
            high[j] = most_of(x[c][j], high[j]);
        }
    const float levels = (float)((1 << bits) - 1);
    for (int j = 0; j < T; j++) {
        const float most = most_of(-low[j], high[j]);
        out->zero[j] = zero_point ? (low[j] + high[j]) * 0.5f * factor[j] : 0.0f;
        out->scale[j] = (zero_point ? high[j] - low[j] : most + most) * factor[j] / levels;
    }
}

INLINE void fit_sigma(affine *out, float (*x)[T], const facts *f, int n, int bits, int zero_point,
                      float (*scratch)[T]) {
    float mean[T] = {0}, variance[T];
    if (f->whole) {
        const float norm = norm_of(n);
        for (int j = 0; j < T; j++) {
            out->zero[j] = zero_point ? f->first[j] * norm : 0.0f;
            out->scale[j] = kvc_sigma_step(bits) * sqrtf(f->squares[j] / (float)n);
        }
        return;
    }
    if (zero_point) {
        memcpy(scratch, x, (size_t)n * sizeof *x);
        tree_sum(mean, scratch, n);
        for (int j = 0; j < T; j++) mean[j] = mean[j] / (float)n;
    }
    for (int c = 0; c < n; c++)
        for (int j = 0; j < T; j++) {
            const float difference = x[c][j] - mean[j];
            scratch[c][j] = difference * difference;
        }
    tree_sum(variance, scratch, n);
    for (int j = 0; j < T; j++) {
        out->zero[j] = mean[j] * f->factor[j];
        out->scale[j] = kvc_sigma_step(bits) * (sqrtf(variance[j] / (float)n) * f->factor[j]);
    }
}

INLINE void store_precision(affine *a, const kvc_layout *layout, int bits) {
    if (layout->scale_dtype == KVC_STEP_E5M3)
        for (int j = 0; j < T; j++) kvc_e5m3_round(&a->scale[j], &a->zero[j], bits);
    else
        for (int j = 0; j < T; j++) {
            a->scale[j] = rounded_to_half(a->scale[j]);
            a->zero[j] = rounded_to_half(a->zero[j]);
        }
}

/* The tree over 32 sums. */
INLINE void tree_of_32(float out[T], float (*sums)[T]) {
    for (int stride = 16; stride >= 1; stride /= 2)
        for (int k = 0; k < stride; k++)
            for (int j = 0; j < T; j++) sums[k][j] += sums[k + stride][j];
    memcpy(out, sums[0], sizeof sums[0]);
}

INLINE void sum_of_32(float out[T], float (*x)[T], int n) {
    float parts[32][T] = {{0}};
    for (int c = 0; c < n; c++)
        for (int j = 0; j < T; j++) parts[c % 32][j] += x[c][j];
    tree_of_32(out, parts);
}

/* From a start to (nearly) the scale and zero of least squared error for its codes. y: the mean of x, or (symmetric)
 * its sum. most[j]: the greatest part of the squares so far that a fit explains; worse starts change nothing. */
INLINE void refit(affine *a, float most[T], const affine *start, float (*x)[T], const float *y, const float *factor,
                  const kvc_layout *layout, int bits, float (*scratch)[T]) {
    const int n = layout->group, zero_point = layout->zero_point;
    const float half = (float)(1 << (bits - 1)), count = (float)n;
    float k[T] = {0}, kk[T] = {0}, ky[T], parts[32][T] = {{0}};
    encode(scratch, x, n, bits, start, factor);
    for (int c = 0; c < n; c++)
        for (int j = 0; j < T; j++) {
            const float code = scratch[c][j] - half;
            k[j] += code;
            kk[j] = FMA(code, code, kk[j]);
            parts[c % 32][j] = FMA(code, x[c][j], parts[c % 32][j]);
        }
    tree_of_32(ky, parts);
    for (int j = 0; j < T; j++) {
        const float from = start->scale[j], m = k[j] / count;
        const float c = zero_point ? FMA(-k[j], y[j], ky[j]) : FMA(0.5f, y[j], ky[j]);
        const float t = c / (zero_point ? FMA(-m, k[j], kk[j]) : kk[j] + k[j] + 0.25f * count), fit = t * factor[j];
        if (!(t > 0.0f && fit > 0.0f && fit < INFINITY && c * t > most[j])) continue;
        const float step = kvc_search_step(from, fit, bits, n, zero_point), zero = FMA(-t, m + 0.5f, y[j]) * factor[j];
        most[j] = c * t;
        a->scale[j] = FMA(step, fit - from, from);
        a->zero[j] = zero_point ? FMA(step, zero - start->zero[j], start->zero[j]) : 0.0f;
    }
}

INLINE void search(affine *best, float (*x)[T], const facts *f, const kvc_layout *layout, int bits,
                   float (*scratch)[T]) {
    static const float symmetric[] = KVC_SEARCH_STARTS;
    const int n = layout->group, zero_point = layout->zero_point;
    const int starts = zero_point ? 1 : (int)(sizeof symmetric / sizeof *symmetric);
    const float part = kvc_search_mean(bits, n);
    float y[T], most[T];
    affine range;
    if (zero_point && f->whole)
        memcpy(y, f->first_unit, sizeof y);
    else
        sum_of_32(y, x, n);
    fit_minmax(&range, x, f->factor, n, bits, zero_point);
    for (int j = 0; j < T; j++) {
        if (zero_point && !f->whole) y[j] /= (float)n;
        range.scale[j] *= kvc_search_factor(bits, n, zero_point);
        if (zero_point && part > 0.0f) range.zero[j] = FMA(part, y[j] * f->factor[j] - range.zero[j], range.zero[j]);
        most[j] = -1.0f;
    }
    *best = range;
    for (int i = 0; i < starts; i++) {
        affine start = range;
        for (int j = 0; j < T; j++) start.scale[j] *= symmetric[i];
        refit(best, most, &start, x, y, f->factor, layout, bits, scratch);
    }
    store_precision(best, layout, bits);
}

/* Scales and zeros that are rounded already, as bytes and back. */
static void put_step(uint8_t *to, float scale, float zero, const kvc_layout *layout) {
    if (layout->scale_dtype == KVC_STEP_E5M3) {
        const uint32_t pair = kvc_e5m3_pair(scale, zero);
        to[0] = (uint8_t)pair;
        if (layout->zero_point) to[1] = (uint8_t)(pair >> 8);
    } else {
        const uint16_t pair[2] = {kvc_float_to_half(scale, KVC_FLOAT16), kvc_float_to_half(zero, KVC_FLOAT16)};
        memcpy(to, pair, layout->zero_point ? 4 : 2);
    }
}

static void get_step(float *scale, float *zero, const uint8_t *from, const kvc_layout *layout) {
    if (layout->scale_dtype == KVC_STEP_E5M3) {
        *scale = kvc_e5m3_to_float(from[0]);
        *zero = layout->zero_point ? kvc_e5m3_zero(*scale, from[1]) : 0.0f;
    } else {
        uint16_t pair[2] = {0};
        memcpy(pair, from, layout->zero_point ? 4 : 2);
        *scale = kvc_half_to_float(pair[0], KVC_FLOAT16);
        *zero = kvc_half_to_float(pair[1], KVC_FLOAT16);
    }
}

/* Where a half begins in its page. */
static uint8_t *half_at(const uint8_t *page, const kvc_layout *layout, int k_bits, int v_bits, int half) {
    return (uint8_t *)page + (half ? kvc_half_bytes(layout, k_bits, kvc_page_tokens(k_bits, v_bits)) : 0);
}

static int token_of(int half, int lane, int e) { return half ? kvc_v_token(lane, e) : kvc_k_token(lane, e); }
static int channel_of(int half, int lane, int e) { return half ? kvc_v_channel(lane, e) : kvc_k_channel(lane, e); }

INLINE void write_tile(uint8_t *page, int k_bits, int v_bits, int half, int tile, int valid, kvc_tile x, const facts *f,
                       const uint32_t *numbers, const kvc_rounding *r) {
    const kvc_layout *layout = r->layout;
    const int d = layout->head_dim, n = layout->group, bits = half ? v_bits : k_bits;
    const int room = kvc_page_tokens(k_bits, v_bits);
    uint8_t *at = half_at(page, layout, k_bits, v_bits, half);
    uint32_t *words = (uint32_t *)at;
    kvc_tile codes, scratch;
    uint16_t halves[KVC_MAX_HEAD_DIM][T];
    if (bits == 16) {
        for (int c = 0; c < d; c++)
            for (int j = 0; j < T; j++) halves[c][j] = j < valid ? kvc_float_to_half(x[c][j], layout->half) : 0;
    } else {
        uint8_t *scales = at + kvc_code_bytes(layout, bits, room);
        for (int g = 0; g < d / n; g++) {
            float (*rows)[T] = x + g * n;
            affine a;
            if (r->scale == KVC_SCALE_SEARCH) {
                search(&a, rows, f, layout, bits, scratch);
            } else {
                if (r->scale == KVC_SCALE_MINMAX || bits >= 8)
                    fit_minmax(&a, rows, f->factor, n, bits, layout->zero_point);
                else
                    fit_sigma(&a, rows, f, n, bits, layout->zero_point, scratch);
                store_precision(&a, layout, bits);
            }
            if (r->stochastic)
                encode_stochastic(codes + g * n, rows, n, bits, &a, f->factor, g * n, half, numbers, r);
            else
                encode(codes + g * n, rows, n, bits, &a, f->factor);
            for (int j = 0; j < valid; j++)
                put_step(scales + kvc_scale_offset(layout, room, g, tile * T + j), a.scale[j], a.zero[j], layout);
        }
        for (int c = 0; c < d; c++)
            for (int j = 0; j < T; j++) halves[c][j] = j < valid ? (uint16_t)codes[c][j] : 0;
    }
    for (int ct = 0; ct < d / T; ct++)
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 8; e++) {
                const kvc_place place = {ct, tile, lane, e};
                kvc_code_set(words, bits, room, place,
                             halves[ct * T + channel_of(half, lane, e)][token_of(half, lane, e)]);
            }
}

/* Rows as they come (clamped, where they are to be) or, `rotated`, as pack rotates them first. */
INLINE void put_tile(uint8_t *page, int k_bits, int v_bits, int half, int tile, int valid, kvc_tile x, int rotated,
                     const uint32_t *numbers, const kvc_rounding *r) {
    facts f = {.whole = 0};
    for (int j = 0; j < T; j++) f.factor[j] = 1.0f;
    if (rotated && (half ? v_bits : k_bits) < 16)
        rotate_exactly(x, &f, r->layout);
    else if (rotated)
        kvc_tile_rotate(x, r->layout->head_dim);
    write_tile(page, k_bits, v_bits, half, tile, valid, x, &f, numbers, r);
}

typedef void put_fn(uint8_t *page, int k_bits, int v_bits, int half, int tile, int valid, kvc_tile x, int rotated,
                    const uint32_t *numbers, const kvc_rounding *r);

static void put_base(uint8_t *page, int k_bits, int v_bits, int half, int tile, int valid, kvc_tile x, int rotated,
                     const uint32_t *numbers, const kvc_rounding *r) {
    put_tile(page, k_bits, v_bits, half, tile, valid, x, rotated, numbers, r);
}

#ifdef KVC_HAVE_X86_ISAS
__attribute__((target("avx2,fma"))) static void put_avx2(uint8_t *page, int k_bits, int v_bits, int half, int tile,
                                                         int valid, kvc_tile x, int rotated, const uint32_t *numbers,
                                                         const kvc_rounding *r) {
    put_tile(page, k_bits, v_bits, half, tile, valid, x, rotated, numbers, r);
}
__attribute__((target("avx512f"))) static void put_avx512(uint8_t *page, int k_bits, int v_bits, int half, int tile,
                                                          int valid, kvc_tile x, int rotated, const uint32_t *numbers,
                                                          const kvc_rounding *r) {
    put_tile(page, k_bits, v_bits, half, tile, valid, x, rotated, numbers, r);
}
#endif

static put_fn *put_for_this_machine(void) {
#ifdef KVC_HAVE_X86_ISAS
    const char *name = kvc_attend_tiles()->name;
    if (strcmp(name, "avx512") == 0) return put_avx512;
    if (strcmp(name, "avx2") == 0) return put_avx2;
#endif
    return put_base;
}

void kvc_tile_write(uint8_t *page, int k_bits, int v_bits, int half, int tile, int valid, kvc_tile x,
                    const uint32_t *numbers, const kvc_rounding *r) {
    static const uint32_t no_numbers[T];
    put_for_this_machine()(page, k_bits, v_bits, half, tile, valid, x, 0, numbers ? numbers : no_numbers, r);
}

void kvc_tile_read(kvc_tile x, const uint8_t *page, int k_bits, int v_bits, int half, int tile,
                   const kvc_layout *layout) {
    const int d = layout->head_dim, bits = half ? v_bits : k_bits, room = kvc_page_tokens(k_bits, v_bits);
    const uint8_t *at = half_at(page, layout, k_bits, v_bits, half);
    for (int ct = 0; ct < d / T; ct++)
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 8; e++) {
                const kvc_place place = {ct, tile, lane, e};
                const uint32_t code = kvc_code_get((const uint32_t *)at, bits, room, place);
                x[ct * T + channel_of(half, lane, e)][token_of(half, lane, e)] =
                    bits == 16 ? kvc_half_to_float((uint16_t)code, layout->half) : (float)code;
            }
    if (bits == 16) return;
    const uint8_t *scales = at + kvc_code_bytes(layout, bits, room);
    const float mid = kvc_mid(bits);
    for (int g = 0; g < d / layout->group; g++) {
        affine a;
        for (int j = 0; j < T; j++)
            get_step(&a.scale[j], &a.zero[j], scales + kvc_scale_offset(layout, room, g, tile * T + j), layout);
        for (int c = g * layout->group; c < (g + 1) * layout->group; c++)
            for (int j = 0; j < T; j++) x[c][j] = a.zero[j] + a.scale[j] * (x[c][j] - mid);
    }
}

static void pack_page(void *context, int64_t i) {
    const kvc_pack_args *args = context;
    const kvc_page page = ((const kvc_page *)args->pages.data)[i];
    const int32_t list = ((const int32_t *)args->lists.data)[i];
    const int32_t *tokens = (const int32_t *)args->tokens.data + ((const int32_t *)args->start.data)[i];
    const int64_t heads = args->keys.shape[1];
    const int d = args->layout.head_dim;
    const kvc_rounding rounding = {&args->layout, args->scale, args->stochastic, args->layer, list, args->seed};
    put_fn *const put = put_for_this_machine();
    uint8_t *bytes = (uint8_t *)args->arena.data + (int64_t)page.unit * KVC_UNIT;
    memset(bytes, 0, (size_t)kvc_page_bytes(&args->layout, page.k_bits, page.v_bits));
    for (int half = 0; half < 2; half++) {
        const kvc_tensor *rows = half ? &args->values : &args->keys;
        const int bits = half ? page.v_bits : page.k_bits;
        for (int tile = 0; tile * T < page.tokens; tile++) {
            const int valid = page.tokens - tile * T < T ? page.tokens - tile * T : T;
            kvc_tile x;
            uint32_t numbers[T] = {0};
            memset(x, 0, sizeof x);
            for (int j = 0; j < valid; j++) {
                float row[KVC_MAX_HEAD_DIM];
                numbers[j] = (uint32_t)tokens[tile * T + j];
                kvc_load_row(row, kvc_at(rows, list / heads, list % heads, numbers[j]), rows->dtype, d);
                for (int c = 0; c < d; c++) x[c][j] = row[c];
            }
            if (args->rotation != KVC_ROTATE_NONE || bits < 16) kvc_tile_clamp(x, d);
            put(bytes, page.k_bits, page.v_bits, half, tile, valid, x, args->rotation == KVC_ROTATE_HADAMARD, numbers,
                &rounding);
        }
    }
}

kvc_status kvc_pack_cpu(const kvc_pack_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_pack_check(args));
    kvc_parallel(args->pages.shape[0], 0, pack_page, (void *)args);
    return KVC_OK;
}

static void unpack_page(void *context, int64_t i) {
    const kvc_unpack_args *args = context;
    const kvc_page page = ((const kvc_page *)args->pages.data)[i];
    const int32_t list = ((const int32_t *)args->lists.data)[i];
    const int32_t *tokens = (const int32_t *)args->tokens.data + ((const int32_t *)args->start.data)[i];
    const int64_t heads = args->keys.shape[1];
    const int d = args->layout.head_dim;
    const uint8_t *bytes = (const uint8_t *)args->arena.data + (int64_t)page.unit * KVC_UNIT;
    for (int half = 0; half < 2; half++) {
        const kvc_tensor *rows = half ? &args->values : &args->keys;
        for (int tile = 0; tile * T < page.tokens; tile++) {
            kvc_tile x;
            kvc_tile_read(x, bytes, page.k_bits, page.v_bits, half, tile, &args->layout);
            if (args->rotation == KVC_ROTATE_HADAMARD) kvc_tile_rotate(x, d);
            for (int j = 0; j < T && tile * T + j < page.tokens; j++) {
                float row[KVC_MAX_HEAD_DIM];
                for (int c = 0; c < d; c++) row[c] = x[c][j];
                kvc_store_row(kvc_at(rows, list / heads, list % heads, tokens[tile * T + j]), row, rows->dtype, d);
            }
        }
    }
}

kvc_status kvc_unpack_cpu(const kvc_unpack_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_unpack_check(args));
    kvc_parallel(args->pages.shape[0], 0, unpack_page, (void *)args);
    return KVC_OK;
}
