/* w4_pack.c: scales to codes, weights to packed bytes and back. Compiled without contraction: which scale the search
 * chooses must not depend on the machine. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu/w4_format.h"

#define V 16
#define MOST_TRIED 40
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

/* ---- scales */

/* The nearest or next smaller of the numbers with 5 exponent bits (fp16's bias) and x mantissa bits, 0..14, for
 * scale >= 0, saturated. */
static double round_scale(double scale, int x, int rounding) {
    const double most = ldexp(2.0 - ldexp(1.0, -x), 15);
    if (scale >= most) return most;
    int e;
    frexp(scale, &e); /* scale in [2^(e-1), 2^e) */
    const int unit = (e - 1 > -14 ? e - 1 : -14) - x;
    const double steps = ldexp(scale, -unit), down = floor(steps), over = steps - down;
    /* The code below ends with `down`; without mantissa bits the exponent's last bit is the code's. */
    const bool odd = ((int64_t)down + (x == 0 ? unit + 14 : 0)) % 2 != 0;
    const bool up = rounding != KVC_W4_FLOOR && (over > 0.5 || (over == 0.5 && odd));
    const double rounded = ldexp(down + up, unit);
    return rounded < most ? rounded : most;
}

/* The code of a number that round_scale returned, x = 0..10. */
static uint32_t code_of(double scale, int x) {
    return (uint32_t)kvc_float_to_half((float)scale, KVC_FLOAT16) >> (10 - x);
}

kvc_status kvc_w4_scales(const kvc_w4_scales_args *args) {
    const kvc_tensor *in = &args->scales;
    KVC_TRY(kvc_expect_array("w4_scales", "scales", in, KVC_FLOAT32, in->ndim, in->shape));
    KVC_TRY(kvc_expect_array("w4_scales", "out", &args->out, KVC_FLOAT32, in->ndim, in->shape));
    const int64_t count = kvc_elements(in);
    const float *scales = in->data;
    float *out = args->out.data;
    for (int64_t i = 0; i < count; i++)
        KVC_CHECK(scales[i] >= 0.0f && isfinite(scales[i]), KVC_EINVAL,
                  "w4_scales: scales: expected finite numbers >= 0, got %g at element %lld", (double)scales[i],
                  (long long)i);
    for (int64_t i = 0; i < count; i++) {
        if (args->scale_bits < 0) {
            out[i] = scales[i];
            continue;
        }
        const double scale = ldexp((double)scales[i], -args->exponent);
        double value = ldexp(round_scale(scale, args->scale_bits, args->rounding), args->exponent);
        if (value > FLT_MAX) value = ldexp(round_scale(scale, args->scale_bits, KVC_W4_FLOOR), args->exponent);
        out[i] = (float)value;
    }
    return KVC_OK;
}

/* ---- one group of weights */

/* w / s to the nearest of -8..7, ties to even. */
static inline vf quantize(vf w, float s) {
    vf q = w / s;
    const vi high = q > 7.0f, low = q < -8.0f;
    q = (vf)((high & (vi)(7.0f - (vf){0})) | (~high & (vi)q));
    q = (vf)((low & (vi)(-8.0f - (vf){0})) | (~low & (vi)q));
    return (q + 0x1.8p23f) - 0x1.8p23f;
}

static inline vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Squared error of a group of whole vectors, and what the best multiple of its codes needs. */
static double group_error(const float *w, int count, float s, double *product, double *square) {
    vf error = {0}, wq = {0}, qq = {0};
    for (int i = 0; i < count; i += V) {
        const vf value = load(w + i), q = quantize(value, s), miss = value - q * s;
        error += miss * miss;
        wq += value * q;
        qq += q * q;
    }
    double sums[3] = {0};
    for (int j = 0; j < V; j++) {
        sums[0] += (double)error[j];
        sums[1] += (double)wq[j];
        sums[2] += (double)qq[j];
    }
    *product = sums[1];
    *square = sums[2];
    return sums[0];
}

typedef struct {
    const kvc_w4_shape *shape;
    int rounding, exponent;
} packer;

static float value_of(const packer *p, uint32_t code) {
    return ldexpf(kvc_w4_scale(code, p->shape->scale_bits), p->exponent);
}

/* The code of a group's scale. Errors are compared relative to max|w|, so that squares of tiny weights count. */
static uint32_t choose_scale(const packer *p, const float *w, int count) {
    float most = 0.0f;
    for (int i = 0; i < count; i++) most = fabsf(w[i]) > most ? fabsf(w[i]) : most;
    if (most == 0.0f) return 0;
    const int x = p->shape->scale_bits < 0 ? 10 : p->shape->scale_bits;
    const double plain = ldexp((double)(most / 7.0f), -p->exponent);
    const int nearest = p->rounding == KVC_W4_FLOOR ? KVC_W4_FLOOR : KVC_W4_NEAREST;
    uint32_t best = code_of(round_scale(plain, x, nearest), x);
    if (p->rounding != KVC_W4_SEARCH) return best;
    int binade;
    frexp((double)most, &binade);
    float scaled[128];
    for (int i = 0; i < count; i++) scaled[i] = ldexpf(w[i], -binade);
    const uint32_t low = code_of(round_scale(0.5 * plain, x, nearest), x);
    const uint32_t high = code_of(round_scale(1.1 * plain, x, nearest), x);
    const uint32_t step = (high - low) / MOST_TRIED + 1;
    double least = INFINITY, fit = 0.0;
    const int shift = p->exponent - binade;
    /* The plain choice first, so that it wins ties. */
    for (int64_t tried = -1; tried <= (int64_t)((high - low) / step); tried++) {
        const uint32_t code = tried < 0 ? best : low + (uint32_t)tried * step;
        const float s = ldexpf(kvc_w4_scale(code, p->shape->scale_bits), shift);
        if (s == 0.0f) continue;
        double product, square;
        const double error = group_error(scaled, count, s, &product, &square);
        if (error < least) {
            least = error;
            best = code;
            fit = square > 0.0 ? product / square : 0.0;
        }
    }
    if (step > 1 && fit > 0.0) {
        const uint32_t code = code_of(round_scale(ldexp(fit, -shift), x, nearest), x);
        const float s = ldexpf(kvc_w4_scale(code, p->shape->scale_bits), shift);
        double product, square;
        if (s > 0.0f && group_error(scaled, count, s, &product, &square) < least) best = code;
    }
    return best;
}

/* ---- strips */

typedef struct {
    packer packer;
    const kvc_w4_pack_args *args;
} pack_job;

static const char *row_of(const kvc_tensor *tensor, int64_t row) {
    return (const char *)tensor->data + kvc_dtype_size(tensor->dtype) * row * tensor->strides[0];
}

static void load_part(float *out, const kvc_tensor *tensor, int64_t row, int64_t first, int64_t count) {
    kvc_load_row(out, row_of(tensor, row) + kvc_dtype_size(tensor->dtype) * first, tensor->dtype, count);
}

static void pack_strip(void *context, int64_t strip) {
    const pack_job *job = context;
    const kvc_w4_shape *shape = job->packer.shape;
    const int inputs = kvc_w4_block_inputs(shape->group, shape->scale_bits), bits = kvc_w4_code_bits(shape->scale_bits);
    const int64_t blocks = kvc_w4_blocks(shape->k, shape->group, shape->scale_bits);
    const int64_t bytes = kvc_w4_block_bytes(shape->group, shape->scale_bits);
    const int64_t rows = shape->n - strip * KVC_W4_ROWS < KVC_W4_ROWS ? shape->n - strip * KVC_W4_ROWS : KVC_W4_ROWS;
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t *block = (uint8_t *)job->args->packed.data + (strip * blocks + b) * bytes;
        uint32_t *words = (uint32_t *)block;
        uint8_t *scales = block + kvc_w4_code_bytes(shape->group, shape->scale_bits);
        memset(block, 0x22, (size_t)(scales - block)); /* q = 0: codes 8, rotated */
        memset(scales, 0, (size_t)(bytes - (scales - block)));
        for (int64_t row = 0; row < rows; row++) {
            for (int g = 0; g < inputs / shape->group; g++) {
                const int64_t first = b * inputs + (int64_t)g * shape->group;
                const int64_t left = shape->k - first, count = left < shape->group ? left : shape->group;
                if (count <= 0) break;
                float w[128] = {0};
                load_part(w, &job->args->weights, strip * KVC_W4_ROWS + row, first, count);
                const uint32_t code = choose_scale(&job->packer, w, shape->group);
                const float s = value_of(&job->packer, code);
                if (s == 0.0f) continue;
                kvc_w4_set_scale(scales + g * kvc_w4_group_bytes(shape->scale_bits), (int)row, bits, code);
                for (int i = 0; i < shape->group; i += V) {
                    const vf q = quantize(load(w + i), s);
                    for (int j = 0; j < V; j++) {
                        const int input = g * shape->group + i + j;
                        const uint32_t flips = (uint32_t)((int)q[j] + 8) ^ 8u; /* of the 8 that lies there */
                        words[kvc_w4_word((int)row, input)] ^=
                            kvc_rotate_left(flips << kvc_w4_shift((int)row, input), 2);
                    }
                }
            }
        }
    }
}

/* max|w| of the matrix, or -1 where a weight is not finite. */
static float greatest(const kvc_tensor *weights) {
    float most = 0.0f;
    for (int64_t row = 0; row < weights->shape[0]; row++) {
        if (!kvc_row_finite(row_of(weights, row), weights->dtype, weights->shape[1])) return -1.0f;
        for (int64_t first = 0; first < weights->shape[1]; first += 256) {
            float w[256];
            const int64_t left = weights->shape[1] - first, count = left < 256 ? left : 256;
            load_part(w, weights, row, first, count);
            for (int64_t i = 0; i < count; i++) most = fabsf(w[i]) > most ? fabsf(w[i]) : most;
        }
    }
    return most;
}

kvc_status kvc_w4_pack(const kvc_w4_pack_args *args) {
    KVC_TRY(kvc_w4_pack_check(args));
    const float most = greatest(&args->weights);
    KVC_CHECK(most >= 0.0f, KVC_EINVAL, "w4_pack: weights: expected finite numbers, got Inf or NaN");
    int exponent = args->shape.exponent;
    if (exponent == KVC_W4_AUTO) {
        int binade = 14;
        if (most / 7.0f > 0.0f) frexpf(most / 7.0f, &binade);
        exponent = binade - 14; /* the largest scale in [2^13, 2^14) */
        if (exponent > KVC_W4_MOST_EXPONENT) exponent = KVC_W4_MOST_EXPONENT;
        if (exponent < -KVC_W4_MOST_EXPONENT) exponent = -KVC_W4_MOST_EXPONENT;
    }
    pack_job job = {{&args->shape, args->rounding, exponent}, args};
    if (args->shape.k > 0) kvc_parallel(kvc_w4_strips(args->shape.n), args->threads, pack_strip, &job);
    *args->exponent = exponent;
    return KVC_OK;
}

static void unpack_strip(void *context, int64_t strip) {
    const kvc_w4_unpack_args *args = context;
    const kvc_w4_shape *shape = &args->shape;
    const int inputs = kvc_w4_block_inputs(shape->group, shape->scale_bits), bits = kvc_w4_code_bits(shape->scale_bits);
    const int64_t blocks = kvc_w4_blocks(shape->k, shape->group, shape->scale_bits);
    const int64_t bytes = kvc_w4_block_bytes(shape->group, shape->scale_bits);
    const int64_t all_groups = kvc_ceil_div(shape->k, shape->group), first_row = strip * KVC_W4_ROWS;
    const int64_t rows = shape->n - first_row < KVC_W4_ROWS ? shape->n - first_row : KVC_W4_ROWS;
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *block = (const uint8_t *)args->packed.data + (strip * blocks + b) * bytes;
        const uint32_t *words = (const uint32_t *)block;
        const uint8_t *scales = block + kvc_w4_code_bytes(shape->group, shape->scale_bits);
        const int64_t left = shape->k - b * inputs;
        const int count = (int)(left < inputs ? left : inputs);
        for (int row = 0; row < rows; row++) {
            uint8_t codes[256];
            float values[256], s = 0.0f;
            for (int i = 0; i < count; i++) {
                if (i % shape->group == 0) {
                    const int g = i / shape->group;
                    const uint32_t code =
                        kvc_w4_get_scale(scales + g * kvc_w4_group_bytes(shape->scale_bits), row, bits);
                    s = ldexpf(kvc_w4_scale(code, shape->scale_bits), shape->exponent);
                    if (kvc_given(&args->scales))
                        ((float *)args->scales.data)[(first_row + row) * all_groups + b * inputs / shape->group + g] =
                            s;
                }
                codes[i] = kvc_rotate_left(words[kvc_w4_word(row, i)], 30) >> kvc_w4_shift(row, i) & 15;
                values[i] = (float)(codes[i] - 8) * s;
            }
            if (kvc_given(&args->codes))
                memcpy((uint8_t *)args->codes.data + (first_row + row) * shape->k + b * inputs, codes, (size_t)count);
            if (kvc_given(&args->out))
                kvc_store_row((char *)row_of(&args->out, first_row + row) +
                                  kvc_dtype_size(args->out.dtype) * b * inputs,
                              values, args->out.dtype, count);
        }
    }
}

kvc_status kvc_w4_unpack(const kvc_w4_unpack_args *args) {
    KVC_TRY(kvc_w4_unpack_check(args));
    if (args->shape.k > 0) kvc_parallel(kvc_w4_strips(args->shape.n), args->threads, unpack_strip, (void *)args);
    return KVC_OK;
}
