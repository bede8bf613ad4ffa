/* rotate.c: rows times a matrix of their KV head, on the CPU.
 *
 * Work is cut into items (sequence, KV head, chunk of the rows of its query heads). For 16 output channels at a time,
 * an item multiplies four rows by four with a panel [d][16] of the matrix: where it lies, or turned and padded. Sums
 * run over channels in order, so neither the cut nor the other rows show in them. */
#include "kvcomp/rotate.h"

#include <string.h>

#include "cpu/attend_tile.h"

#define ROWS 4
#define LANES 16
#define CHUNK 64
#define ALONE ((int64_t)1 << 21) /* multiplications that one thread does sooner than others wake up */

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4))); /* at any float */
typedef float chunk_rows[CHUNK][KVC_MAX_HEAD_DIM];
typedef void product_fn(chunk_rows out, const chunk_rows x, int64_t rows, const float *matrix, int64_t d,
                        bool transpose);

/* out = x times matrix for `rows` rows, a multiple of ROWS. Channels of out from d to the next multiple of LANES are
 * written too. */
static inline __attribute__((always_inline)) void product(chunk_rows out, const chunk_rows x, int64_t rows,
                                                          const float *matrix, int64_t d, bool transpose) {
    _Alignas(64) float turned[KVC_MAX_HEAD_DIM * LANES];
    for (int64_t o = 0; o < d; o += LANES) {
        const int64_t width = d - o < LANES ? d - o : LANES;
        const float *panel = matrix + o;
        int64_t stride = d;
        if (transpose || width < LANES) {
            if (width < LANES) memset(turned, 0, sizeof turned);
            for (int64_t k = 0; k < width; k++)
                for (int64_t c = 0; c < d; c++)
                    turned[c * LANES + k] = transpose ? matrix[(o + k) * d + c] : matrix[c * d + o + k];
            panel = turned;
            stride = LANES;
        }
        for (int64_t first = 0; first < rows; first += ROWS) {
            lanes sum[ROWS] = {{0}};
            for (int64_t c = 0; c < d; c++) {
                const lanes weights = *(const loose *)(panel + c * stride);
                for (int r = 0; r < ROWS; r++) sum[r] += x[first + r][c] * weights;
            }
            for (int r = 0; r < ROWS; r++) *(loose *)(out[first + r] + o) = sum[r];
        }
    }
}

static void product_base(chunk_rows out, const chunk_rows x, int64_t rows, const float *matrix, int64_t d,
                         bool transpose) {
    product(out, x, rows, matrix, d, transpose);
}

#ifdef KVC_HAVE_X86_ISAS
__attribute__((target("avx2,fma"))) static void product_avx2(chunk_rows out, const chunk_rows x, int64_t rows,
                                                             const float *matrix, int64_t d, bool transpose) {
    product(out, x, rows, matrix, d, transpose);
}
__attribute__((target("avx512f"))) static void product_avx512(chunk_rows out, const chunk_rows x, int64_t rows,
                                                              const float *matrix, int64_t d, bool transpose) {
    product(out, x, rows, matrix, d, transpose);
}
#endif

static product_fn *product_for_this_machine(void) {
#ifdef KVC_HAVE_X86_ISAS
    const char *name = kvc_attend_tiles()->name;
    if (strcmp(name, "avx512") == 0) return product_avx512;
    if (strcmp(name, "avx2") == 0) return product_avx2;
#endif
    return product_base;
}

typedef struct {
    const kvc_rotate_args *args;
    product_fn *product;
    int64_t h, group, q, d, chunks;
} job;

static void rotate_chunk(void *context, int64_t item) {
    const job *j = context;
    const kvc_rotate_args *args = j->args;
    const int64_t sequence = item / j->chunks / j->h, head = item / j->chunks % j->h, rows = j->group * j->q;
    const int64_t begin = item % j->chunks * CHUNK, count = rows - begin < CHUNK ? rows - begin : CHUNK;
    const int64_t padded = kvc_ceil_div(count, ROWS) * ROWS;
    const float *matrix = (const float *)args->matrix.data + head * j->d * j->d;
    _Alignas(64) chunk_rows x, out;
    for (int64_t r = 0; r < count; r++)
        kvc_load_row(x[r], kvc_at(&args->rows, sequence, head * j->group + (begin + r) / j->q, (begin + r) % j->q),
                     args->rows.dtype, j->d);
    for (int64_t r = count; r < padded; r++) memset(x[r], 0, sizeof x[r]);
    j->product(out, x, padded, matrix, j->d, args->transpose);
    for (int64_t r = 0; r < count; r++)
        kvc_store_row(kvc_at(&args->out, sequence, head * j->group + (begin + r) / j->q, (begin + r) % j->q), out[r],
                      args->out.dtype, j->d);
}

static kvc_status check(const kvc_rotate_args *args) {
    KVC_TRY(kvc_expect_shape("rotate", "rows", &args->rows, 4, (int64_t[]){-1, -1, -1, -1}));
    const int64_t hq = args->rows.shape[1], d = args->rows.shape[3];
    KVC_TRY(kvc_expect_float("rotate", "rows", &args->rows));
    KVC_CHECK(d >= 1 && d <= KVC_MAX_HEAD_DIM, KVC_ESHAPE, "rotate: rows: expected 1..%d channels, got %lld",
              KVC_MAX_HEAD_DIM, (long long)d);
    KVC_TRY(kvc_expect_rows("rotate", "rows", &args->rows));
    KVC_TRY(kvc_expect_array("rotate", "matrix", &args->matrix, KVC_FLOAT32, 3, (int64_t[]){-1, d, d}));
    const int64_t h = args->matrix.shape[0];
    KVC_CHECK(h >= 1 && hq % h == 0, KVC_ESHAPE, "rotate: rows: expected a multiple of matrix's %lld heads, got %lld",
              (long long)h, (long long)hq);
    KVC_TRY(kvc_expect_shape("rotate", "out", &args->out, 4, args->rows.shape));
    KVC_TRY(kvc_expect_float("rotate", "out", &args->out));
    KVC_TRY(kvc_expect_rows("rotate", "out", &args->out));
    KVC_CHECK(args->transpose == 0 || args->transpose == 1, KVC_EINVAL, "rotate: transpose: expected 0 or 1, got %d",
              args->transpose);
    return KVC_OK;
}

kvc_status kvc_rotate_cpu(const kvc_rotate_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(check(args));
    const int64_t h = args->matrix.shape[0], d = args->rows.shape[3];
    job j = {.args = args,
             .product = product_for_this_machine(),
             .h = h,
             .group = args->rows.shape[1] / h,
             .q = args->rows.shape[2],
             .d = d};
    j.chunks = kvc_ceil_div(j.group * j.q, CHUNK);
    kvc_parallel(args->rows.shape[0] * h * j.chunks, kvc_elements(&args->rows) * d < ALONE ? 1 : 0, rotate_chunk, &j);
    return KVC_OK;
}
