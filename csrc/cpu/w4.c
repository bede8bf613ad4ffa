/* w4.c: x * W^T on the CPU, strip by strip of 64 rows of W: up to four rows of x with weights in registers, more with a
 * block of weights decoded to 64 KB of stack at most. */
#include <math.h>
#include <string.h>

#include "cpu/attend_tile.h"
#include "cpu/w4_format.h"
#include "cpu/w4_tile.h"

#ifdef KVC_HAVE_X86_ISAS
extern const kvc_w4_tile kvc_w4_tile_avx2, kvc_w4_tile_avx512;
#endif
extern const kvc_w4_tile kvc_w4_tile_base;

const kvc_w4_tile *kvc_w4_tiles(void) {
#ifdef KVC_HAVE_X86_ISAS
    const char *name = kvc_attend_tiles()->name; /* one choice for all */
    if (strcmp(name, "avx512") == 0) return &kvc_w4_tile_avx512;
    if (strcmp(name, "avx2") == 0) return &kvc_w4_tile_avx2;
#endif
    return &kvc_w4_tile_base;
}

typedef struct {
    const kvc_w4_matmul_args *args;
    const kvc_w4_tile *tile;
    const kvc_w4_pairs *pairs;    /* NULL: x is brought to float32 */
    int64_t parts, blocks, bytes; /* parts of x's rows, blocks of a strip, bytes of a block */
    int inputs, most;             /* inputs of a block, rows of a part */
} matmul_job;

static const char *row_at(const kvc_tensor *tensor, int64_t row, int64_t column) {
    return (const char *)tensor->data + kvc_dtype_size(tensor->dtype) * (row * tensor->strides[0] + column);
}

static void load_scales(const matmul_job *job, float *out, const uint8_t *block) {
    const kvc_w4_shape *shape = &job->args->shape;
    const uint8_t *at = block + kvc_w4_code_bytes(shape->group, shape->scale_bits);
    for (int g = 0; g < job->inputs / shape->group; g++)
        job->tile->load_scales(out + g * KVC_W4_ROWS, at + g * kvc_w4_group_bytes(shape->scale_bits),
                               shape->scale_bits);
}

/* sum * 2^exponent + bias, rounded to out's type. */
static void store(const kvc_w4_matmul_args *args, int64_t m, int64_t first, int rows, const float *sums) {
    float values[KVC_W4_ROWS], bias[KVC_W4_ROWS] = {0};
    const float factor = ldexpf(1.0f, kvc_w4_exponent_of(args, first));
    if (kvc_given(&args->bias))
        kvc_load_row(bias, (const char *)args->bias.data + kvc_dtype_size(args->bias.dtype) * first, args->bias.dtype,
                     rows);
    for (int i = 0; i < rows; i++) values[i] = sums[i] * factor + bias[i];
    kvc_store_row((char *)row_at(&args->out, m, first), values, args->out.dtype, rows);
}

typedef struct {
    float scales[KVC_W4_INPUTS / 32 * KVC_W4_ROWS];
    float x[KVC_W4_AT_ONCE * KVC_W4_INPUTS];
    float sums[KVC_W4_MANY * KVC_W4_ROWS];
    float tile[KVC_W4_INPUTS * KVC_W4_ROWS];
} __attribute__((aligned(64))) memory;

static void many_rows(const matmul_job *job, int64_t strip, int64_t first, int count) {
    const kvc_w4_matmul_args *args = job->args;
    const kvc_w4_shape *shape = &args->shape;
    const int whole = shape->group > 64 ? shape->group : 64; /* inputs that are decoded together */
    memory at;
    memset(at.sums, 0, (size_t)count * KVC_W4_ROWS * sizeof *at.sums);
    for (int64_t b = 0; b < job->blocks; b++) {
        const uint8_t *block = (const uint8_t *)args->packed.data + (strip * job->blocks + b) * job->bytes;
        const int64_t left = shape->k - b * job->inputs;
        const int inputs = (int)(left < job->inputs ? left : job->inputs);
        const int used = (inputs + whole - 1) / whole * whole;
        load_scales(job, at.scales, block);
        if (job->pairs)
            job->pairs->decode((uint32_t *)at.tile, (const uint32_t *)block, used);
        else
            job->tile->decode(at.tile, (const uint32_t *)block, at.scales, used, shape->group);
        for (int i = 0; i < count; i += KVC_W4_AT_ONCE) {
            const int some = count - i < KVC_W4_AT_ONCE ? count - i : KVC_W4_AT_ONCE;
            if (job->pairs) {
                uint16_t *const x = (uint16_t *)at.x;
                for (int k = 0; k < some; k++) {
                    memcpy(x + k * job->inputs, row_at(&args->x, first + i + k, b * job->inputs), 2 * (size_t)inputs);
                    memset(x + k * job->inputs + inputs, 0, 2 * (size_t)(used - inputs));
                }
                job->pairs->multiply(at.sums + i * KVC_W4_ROWS, (const uint32_t *)at.tile, at.scales, x, some,
                                     job->inputs, used, shape->group);
                continue;
            }
            for (int k = 0; k < some; k++)
                job->tile->load(at.x + k * job->inputs, row_at(&args->x, first + i + k, b * job->inputs), args->x.dtype,
                                inputs);
            job->tile->many(at.sums + i * KVC_W4_ROWS, at.tile, at.x, some, job->inputs, inputs);
        }
    }
    const int64_t rows = shape->n - strip * KVC_W4_ROWS;
    for (int i = 0; i < count; i++)
        store(args, first + i, strip * KVC_W4_ROWS, (int)(rows < KVC_W4_ROWS ? rows : KVC_W4_ROWS),
              at.sums + i * KVC_W4_ROWS);
}

static void few_rows(const matmul_job *job, int64_t strip, int64_t first, int count) {
    const kvc_w4_matmul_args *args = job->args;
    const kvc_w4_shape *shape = &args->shape;
    const int m = count == 3 ? 4 : count;
    float sums[KVC_W4_ROWS * KVC_W4_FEW * 16] __attribute__((aligned(64))) = {0};
    float x[KVC_W4_INPUTS * KVC_W4_FEW] __attribute__((aligned(64)));
    float scales[KVC_W4_INPUTS / 32 * KVC_W4_ROWS];
    for (int64_t b = 0; b < job->blocks; b++) {
        const uint8_t *block = (const uint8_t *)args->packed.data + (strip * job->blocks + b) * job->bytes;
        const int64_t left = shape->k - b * job->inputs;
        const int inputs = (int)(left < job->inputs ? left : job->inputs);
        if (b == 0 || inputs < job->inputs) memset(x, 0, sizeof x); /* rows and inputs that are not there */
        for (int i = 0; i < count; i++)
            job->tile->load(x + i * job->inputs, row_at(&args->x, first + i, b * job->inputs), args->x.dtype, inputs);
        load_scales(job, scales, block);
        job->tile->few(sums, (const uint32_t *)block, scales, x, m, job->inputs, shape->group);
    }
    const int64_t rows = shape->n - strip * KVC_W4_ROWS;
    for (int i = 0; i < count; i++) {
        float total[KVC_W4_ROWS];
        for (int row = 0; row < KVC_W4_ROWS; row++) {
            const float *part = sums + (row * m + i) * 16;
            float quarter[4];
            for (int j = 0; j < 4; j++) quarter[j] = (part[j] + part[4 + j]) + (part[8 + j] + part[12 + j]);
            total[row] = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
        }
        store(args, first + i, strip * KVC_W4_ROWS, (int)(rows < KVC_W4_ROWS ? rows : KVC_W4_ROWS), total);
    }
}

static void matmul_part(void *context, int64_t index) {
    const matmul_job *job = context;
    const int64_t strip = index / job->parts, first = index % job->parts * job->most;
    const int64_t left = job->args->x.shape[0] - first;
    const int count = (int)(left < job->most ? left : job->most);
    if (job->most <= KVC_W4_FEW)
        few_rows(job, strip, first, count);
    else
        many_rows(job, strip, first, count);
}

kvc_status kvc_w4_matmul_cpu(const kvc_w4_matmul_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_w4_matmul_check(args));
    const int64_t m = args->x.shape[0];
    const kvc_w4_shape *shape = &args->shape;
    if (m == 0 || shape->n == 0) return KVC_OK;
    matmul_job job = {.args = args,
                      .tile = kvc_w4_tiles(),
                      .pairs = m > KVC_W4_FEW && args->x.dtype == KVC_BFLOAT16 ? kvc_w4_pairs_here() : NULL,
                      .blocks = kvc_w4_blocks(shape->k, shape->group, shape->scale_bits),
                      .bytes = kvc_w4_block_bytes(shape->group, shape->scale_bits),
                      .inputs = kvc_w4_block_inputs(shape->group, shape->scale_bits),
                      .most = m <= KVC_W4_FEW ? KVC_W4_FEW : KVC_W4_MANY};
    /* Enough parts for all threads, though each decodes its blocks anew. */
    const int64_t threads = args->threads > 0 ? args->threads : kvc_threads(), strips = kvc_w4_strips(shape->n);
    while (job.most > KVC_W4_AT_ONCE && strips * kvc_ceil_div(m, job.most) < 2 * threads) job.most /= 2;
    job.parts = kvc_ceil_div(m, job.most);
    kvc_parallel(kvc_w4_strips(shape->n) * job.parts, args->threads, matmul_part, &job);
    return KVC_OK;
}
