/* pack.c: pages on the CPU: the specification of the packed bytes. Compiled without contraction of a*b+c. */
#include "kvcomp/pack.h"

#include <math.h>
#include <string.h>

#include "cpu/pack_page.h"
#include "kvcomp/philox.h"

#define T KVC_TILE

static const float search_factors[KVC_SIGMA_FACTORS + KVC_MINMAX_FACTORS] = KVC_SEARCH_FACTORS;

/* As ternaries: they vectorize, and which of two zeros or equals comes out is part of the contract (the second). */
static inline float least_of(float a, float b) { return a < b ? a : b; }
static inline float most_of(float a, float b) { return a > b ? a : b; }
static inline float clamped(float v, float low, float high) { return least_of(most_of(v, low), high); }

void kvc_tile_clamp(kvc_tile x, int d) {
    for (int c = 0; c < d; c++)
        for (int j = 0; j < T; j++) x[c][j] = clamped(x[c][j], -0x1p96f, 0x1p96f);
}

void kvc_tile_rotate(kvc_tile x, int d) {
    const int block = d & -d;
    const float norm = 1.0f / sqrtf((float)block);
    for (int stride = 1; stride < block; stride *= 2)
        for (int base = 0; base < d; base += 2 * stride)
            for (int c = base; c < base + stride; c++)
                for (int j = 0; j < T; j++) {
                    const float a = x[c][j], b = x[c + stride][j];
                    x[c][j] = a + b;
                    x[c + stride][j] = a - b;
                }
    for (int c = 0; c < d; c++)
        for (int j = 0; j < T; j++) x[c][j] *= norm;
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
static void tree_sum(float out[T], float (*x)[T], int n) {
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

/* Codes of one group as floats. */
static void encode(float (*code)[T], float (*x)[T], int n, int bits, const affine *a) {
    const float mid = kvc_mid(bits), most = (float)((1 << bits) - 1), magic = 12582912.0f; /* 1.5 * 2^23 */
    float inverse[T];
    for (int j = 0; j < T; j++) inverse[j] = a->scale[j] > 0.0f ? 1.0f / a->scale[j] : 0.0f;
    for (int c = 0; c < n; c++)
        for (int j = 0; j < T; j++) {
            const float v = (x[c][j] - a->zero[j]) * inverse[j] + mid;
            code[c][j] = (clamped(v, 0.0f, most) + magic) - magic;
        }
}

static void encode_stochastic(float (*code)[T], float (*x)[T], int n, int bits, const affine *a, int first_channel,
                              int half, const uint32_t *numbers, const kvc_rounding *r) {
    const float mid = kvc_mid(bits), most = (float)((1 << bits) - 1);
    for (int j = 0; j < T; j++) {
        const float inverse = a->scale[j] > 0.0f ? 1.0f / a->scale[j] : 0.0f;
        for (int c = 0; c < n; c += 4) {
            float u[4];
            kvc_philox_uniform4(u, r->seed, r->layer, r->list, 2 * numbers[j] + (uint32_t)half,
                                (uint32_t)(first_channel + c) / 4);
            for (int i = 0; i < 4; i++) {
                const float v = (x[c + i][j] - a->zero[j]) * inverse + mid;
                code[c + i][j] = floorf(clamped(v + u[i], 0.0f, most));
            }
        }
    }
}

static void fit_minmax(affine *out, float (*x)[T], int n, int bits, int zero_point) {
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
        out->zero[j] = zero_point ? (low[j] + high[j]) * 0.5f : 0.0f;
        out->scale[j] = (zero_point ? high[j] - low[j] : most + most) / levels;
    }
}

static void fit_sigma(affine *out, float (*x)[T], int n, int bits, int zero_point, float (*scratch)[T]) {
    float mean[T] = {0}, variance[T];
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
        out->zero[j] = mean[j];
        out->scale[j] = kvc_sigma_step(bits) * sqrtf(variance[j] / (float)n);
    }
}

static void store_precision(affine *a, const kvc_layout *layout) {
    if (layout->scale_dtype == KVC_STEP_E5M3)
        for (int j = 0; j < T; j++) kvc_e5m3_round(&a->scale[j], &a->zero[j]);
    else
        for (int j = 0; j < T; j++) {
            a->scale[j] = rounded_to_half(a->scale[j]);
            a->zero[j] = rounded_to_half(a->zero[j]);
        }
}

static void search(affine *best, float (*x)[T], const kvc_layout *layout, int bits, float (*scratch)[T]) {
    const int n = layout->group, zero_point = layout->zero_point;
    const int first = bits < 8 ? 0 : KVC_SIGMA_FACTORS;
    const float mid = kvc_mid(bits);
    float least[T];
    affine base;
    for (int j = 0; j < T; j++) least[j] = INFINITY;
    *best = (affine){0};
    if (first == 0) fit_sigma(&base, x, n, bits, zero_point, scratch);
    for (int f = first; f < KVC_SIGMA_FACTORS + KVC_MINMAX_FACTORS; f++) {
        if (f == KVC_SIGMA_FACTORS) fit_minmax(&base, x, n, bits, zero_point);
        affine trial = base;
        for (int j = 0; j < T; j++) trial.scale[j] *= search_factors[f];
        store_precision(&trial, layout);
        encode(scratch, x, n, bits, &trial);
        for (int c = 0; c < n; c++)
            for (int j = 0; j < T; j++) {
                const float error = trial.zero[j] + trial.scale[j] * (scratch[c][j] - mid) - x[c][j];
                scratch[c][j] = error * error;
            }
        float errors[T];
        tree_sum(errors, scratch, n);
        for (int j = 0; j < T; j++)
            if (errors[j] < least[j]) {
                least[j] = errors[j];
                best->scale[j] = trial.scale[j];
                best->zero[j] = trial.zero[j];
            }
    }
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

void kvc_tile_write(uint8_t *page, int k_bits, int v_bits, int half, int tile, int valid, kvc_tile x,
                    const uint32_t *numbers, const kvc_rounding *r) {
    static const uint32_t no_numbers[T];
    const kvc_layout *layout = r->layout;
    const int d = layout->head_dim, bits = half ? v_bits : k_bits, room = kvc_page_tokens(k_bits, v_bits);
    uint8_t *at = half_at(page, layout, k_bits, v_bits, half);
    uint32_t *words = (uint32_t *)at;
    kvc_tile codes, scratch;
    uint16_t halves[KVC_MAX_HEAD_DIM][T];
    if (bits == 16) {
        for (int c = 0; c < d; c++)
            for (int j = 0; j < T; j++) halves[c][j] = j < valid ? kvc_float_to_half(x[c][j], layout->half) : 0;
    } else {
        uint8_t *scales = at + kvc_code_bytes(layout, bits, room);
        for (int g = 0; g < d / layout->group; g++) {
            float (*rows)[T] = x + g * layout->group;
            affine a;
            if (r->scale == KVC_SCALE_SEARCH) {
                search(&a, rows, layout, bits, scratch);
            } else {
                if (r->scale == KVC_SCALE_MINMAX || bits >= 8)
                    fit_minmax(&a, rows, layout->group, bits, layout->zero_point);
                else
                    fit_sigma(&a, rows, layout->group, bits, layout->zero_point, scratch);
                store_precision(&a, layout);
            }
            if (r->stochastic)
                encode_stochastic(codes + g * layout->group, rows, layout->group, bits, &a, g * layout->group, half,
                                  numbers ? numbers : no_numbers, r);
            else
                encode(codes + g * layout->group, rows, layout->group, bits, &a);
            for (int j = 0; j < valid; j++)
                put_step(scales + kvc_scale_offset(layout, room, g, tile * T + j), a.scale[j], a.zero[j], layout);
        }
        for (int c = 0; c < d; c++)
            for (int j = 0; j < T; j++) halves[c][j] = j < valid ? (uint16_t)codes[c][j] : 0;
    }
    for (int ct = 0; ct < d / T; ct++)
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 8; e++) {
                const kvc_place place = {ct, tile, lane, e, half};
                kvc_code_set(words, bits, room, place,
                             halves[ct * T + channel_of(half, lane, e)][token_of(half, lane, e)]);
            }
}

void kvc_tile_read(kvc_tile x, const uint8_t *page, int k_bits, int v_bits, int half, int tile,
                   const kvc_layout *layout) {
    const int d = layout->head_dim, bits = half ? v_bits : k_bits, room = kvc_page_tokens(k_bits, v_bits);
    const uint8_t *at = half_at(page, layout, k_bits, v_bits, half);
    for (int ct = 0; ct < d / T; ct++)
        for (int lane = 0; lane < 32; lane++)
            for (int e = 0; e < 8; e++) {
                const kvc_place place = {ct, tile, lane, e, half};
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
            if (args->rotation == KVC_ROTATE_HADAMARD) kvc_tile_rotate(x, d);
            kvc_tile_write(bytes, page.k_bits, page.v_bits, half, tile, valid, x, numbers, &rounding);
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
