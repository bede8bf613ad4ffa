/* l2_rate.cu: the rate at which tensor copies (TMA) bring a panel from the L2 cache into shared memory, sent to 1, 2 or
 * 4 blocks of a cluster at once. It bounds block-sparse products, and decides how wide their panels are.
 *
 * A program of its own; scripts/l2_rate.py builds it (sm_90a), runs it and writes what it found. It prints an object in
 * JSON for each case, a line each. Usage: l2_rate [SAMPLES]. Exit codes: 0; 1, CUDA failed; 2, no GPU of compute
 * capability 9.0, or bad arguments. Copies, barriers and tensor maps are those of the product's kernel. */
#define KVC_BSR_GUARD /* a barrier that waits for seconds traps */
#include "bsr_wgmma_launch.cuh"

#include <stdio.h>
#include <stdlib.h>

namespace {

/* What is copied in a stage. SHARED: 64 rows of 256 columns of the panel, the same for all blocks of a cluster.
 * PRODUCT: as the product with blocks of 128 does, half of a block, the same for all of them, and to each 64 rows of
 * 256 columns of its own. */
enum { SHARED, PRODUCT };

constexpr int ROWS = 8192, PITCH = 8192; /* of the dense matrix; its first columns are the panel */
constexpr int HALVES = 2 * 901;          /* of blocks of 128 x 128: as many as 22 % of 8192 x 8192 has */
constexpr int SIDE = 128, DEPTH = 64, WIDTH = 256, BOX_BYTES = 128; /* of a box's row: the swizzle's width */
constexpr int STAGES = 4, LEFT_BYTES = SIDE * BOX_BYTES, STRIP_BYTES = DEPTH * BOX_BYTES, STRIPS = WIDTH / 64;
constexpr int STAGE_BYTES = LEFT_BYTES + STRIPS * STRIP_BYTES, SHARED_BYTES = STAGES * STAGE_BYTES + 1024;
constexpr int THREADS = 128, PRODUCER = 0, CONSUMER = 32; /* the first threads of two warps */
constexpr int TIMED_STAGES = 3000, CHECKED_STAGES = 64, WARMUP = 2;
constexpr uint32_t DENSE_SALT = 0, VALUES_SALT = 0x9e3779b9u;

/* Rows of a box: what one block of a cluster of C sends to all of it. */
template <int C> constexpr int panel_box = DEPTH / C;
template <int C> constexpr int left_box = C > 2 ? SIDE / C : 64;

/* Memory holds in every word another number, by its place. */
__host__ __device__ inline uint32_t word_of(uint32_t place, uint32_t salt) { return (place ^ salt) * 2654435761u; }

__global__ void fill_kernel(uint32_t *words, uint32_t count, uint32_t salt) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        words[i] = word_of(i, salt);
}

struct place {
    int row, column, half; /* of the panel; number of the half block */
};

/* Places anywhere, one behind the other: the same for all blocks of a cluster. */
struct walk {
    uint32_t state;

    __device__ explicit walk(int cluster) : state(cluster * 2654435761u + 12345u) {}

    __device__ place next(int mode, int columns) {
        state = state * 1664525u + 1013904223u;
        const int strips = columns / WIDTH, strip = mode == SHARED ? (state >> 20) % strips : blockIdx.x % strips;
        return {int((state >> 8) % (ROWS / DEPTH)) * DEPTH, strip * WIDTH, int((state >> 9) % HALVES)};
    }
};

#ifdef KVC_HOPPER

/* How many words of a box in shared memory are not those of memory: `rows` of 128 bytes, swizzled; `first`: the place
 * of its first word, `pitch` words from row to row. Of one warp, each lane its own. */
__device__ uint32_t wrong_words(const char *box, int rows, uint32_t first, uint32_t pitch, uint32_t salt) {
    uint32_t wrong = 0;
    const uint32_t word = threadIdx.x % 32;
    for (int row = 0; row < rows; row++) {
        const uint32_t at = row * BOX_BYTES + ((word / 4 ^ (row & 7)) * 16) + word % 4 * 4;
        wrong += *reinterpret_cast<const volatile uint32_t *>(box + at) != word_of(first + row * pitch + word, salt);
    }
    return wrong;
}

template <int C, int MODE>
__device__ void produce(const CUtensorMap *left, const CUtensorMap *panel, uint32_t base, uint64_t *full,
                        uint64_t *empty, uint32_t rank, int stages, int columns) {
    const uint64_t last = policy_last(), first = policy_first();
    const uint16_t all = (1 << C) - 1;
    walk way(blockIdx.x / C);
    for (int i = 0; i < stages; i++) {
        const int slot = i % STAGES;
        const place at = way.next(MODE, columns);
        const uint32_t barrier = shared_address(&full[slot]);
        const uint32_t to = base + slot * STAGE_BYTES, strips = to + LEFT_BYTES;
        barrier_wait(shared_address(&empty[slot]), (i / STAGES & 1) ^ 1);
        barrier_expect(barrier, STRIPS * STRIP_BYTES + (MODE == PRODUCT ? LEFT_BYTES : 0));
        for (int strip = 0; strip < STRIPS; strip++) {
            const uint32_t there = strips + strip * STRIP_BYTES;
            const int column = at.column + 64 * strip;
            if (MODE == SHARED) {
                const int begin = rank * panel_box<C>;
                load_block_box<(C > 1)>(there + begin * BOX_BYTES, panel, column, at.row + begin, 0, barrier, all,
                                        last);
            } else {
                load_box(there, panel, column, at.row, barrier, last);
            }
        }
        if (MODE == PRODUCT) {
            constexpr int boxes = SIDE / left_box<C> / C;
            for (int box = 0; box < boxes; box++) {
                const int begin = (rank * boxes + box) * left_box<C>;
                load_block_box<(C > 1)>(to + begin * BOX_BYTES, left, 0, at.half * SIDE + begin, 0, barrier, all,
                                        first);
            }
        }
    }
}

/* Lets go of every stage at once, or, by all lanes of the warp, when it was looked at. */
template <int C, int MODE, bool CHECK>
__device__ void consume(const char *stage_bytes, uint64_t *full, uint64_t *empty, int stages, int columns,
                        unsigned long long *wrong) {
    walk way(blockIdx.x / C);
    uint32_t found = 0;
    for (int i = 0; i < stages; i++) {
        const int slot = i % STAGES;
        barrier_wait<CHECK>(shared_address(&full[slot]), i / STAGES & 1);
        if (CHECK) {
            const place at = way.next(MODE, columns);
            const char *stage = stage_bytes + slot * STAGE_BYTES;
            for (int strip = 0; strip < STRIPS; strip++) {
                const uint32_t first = (uint32_t(at.row) * PITCH + at.column + 64 * strip) / 2;
                found += wrong_words(stage + LEFT_BYTES + strip * STRIP_BYTES, DEPTH, first, PITCH / 2, DENSE_SALT);
            }
            if (MODE == PRODUCT) found += wrong_words(stage, SIDE, at.half * SIDE * 32u, 32, VALUES_SALT);
            __syncwarp();
        }
        if (threadIdx.x == CONSUMER)
            for (uint32_t rank = 0; rank < C; rank++) {
                const uint32_t barrier = shared_address(&empty[slot]);
                barrier_arrive_at(C > 1 ? shared_of(barrier, rank) : barrier);
            }
    }
    if (CHECK && found) atomicAdd(wrong, (unsigned long long)found);
}
#endif

template <int C, int MODE, bool CHECK>
__global__ void __launch_bounds__(THREADS, 1)
    rate_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap panel, int stages,
                int columns, unsigned long long *wrong) {
#ifdef KVC_HOPPER
    extern __shared__ char memory[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    const uint32_t raw = shared_address(memory), base = (raw + 1023) & ~1023u;
    const uint32_t rank = C > 1 ? cluster_rank() : 0;
    if (threadIdx.x == PRODUCER) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared_address(&full[i]), 1);
            barrier_init(shared_address(&empty[i]), C);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (C > 1) cluster_sync();
    if (threadIdx.x == PRODUCER)
        produce<C, MODE>(&left, &panel, base, full, empty, rank, stages, columns);
    else if (CHECK ? threadIdx.x / 32 == CONSUMER / 32 : threadIdx.x == CONSUMER)
        consume<C, MODE, CHECK>(memory + (base - raw), full, empty, stages, columns, wrong);
    __syncthreads();
    /* No block is gone while others send to it. */
    if (C > 1) cluster_sync();
#endif
}

/* ---- host */

void must(cudaError_t error, const char *call) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "l2_rate: %s: expected success, got %s\n", call, cudaGetErrorString(error));
    exit(1);
}
#define MUST(call) must(call, #call)

/* Of 16-bit elements; boxes of 64 by `box`. */
CUtensorMap map_of(void *memory, int rank, uint64_t columns, uint64_t rows, uint64_t pitch_bytes, uint32_t box) {
    CUtensorMap map;
    const uint64_t sides[3] = {columns, rows, 1}, pitches[2] = {pitch_bytes, pitch_bytes * rows};
    const uint32_t boxes[3] = {64, box, 1};
    if (!encode(&map, KVC_BFLOAT16, rank, memory, sides, pitches, boxes, true, CU_TENSOR_MAP_L2_PROMOTION_L2_256B)) {
        fprintf(stderr, "l2_rate: cuTensorMapEncodeTiled: expected a tensor map, got none\n");
        exit(1);
    }
    return map;
}

struct memory {
    char *dense, *values;
    unsigned long long *wrong;
};

/* Microseconds of a launch; `clusters` of them run at once, as many as fit. */
template <int C, int MODE, bool CHECK>
float launched_us(const memory &m, const CUtensorMap &left, const CUtensorMap &panel, int stages, int columns,
                  int *clusters) {
    const auto kernel = rate_kernel<C, MODE, CHECK>;
    MUST(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = C;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = SHARED_BYTES;
    config.attrs = &attribute;
    config.numAttrs = 1;
    config.gridDim = dim3(C);
    MUST(cudaOccupancyMaxActiveClusters(clusters, kernel, &config));
    config.gridDim = dim3(*clusters * C);
    cudaEvent_t begin, end;
    MUST(cudaEventCreate(&begin));
    MUST(cudaEventCreate(&end));
    MUST(cudaEventRecord(begin));
    MUST(cudaLaunchKernelEx(&config, kernel, left, panel, stages, columns, m.wrong));
    MUST(cudaEventRecord(end));
    MUST(cudaDeviceSynchronize());
    float ms;
    MUST(cudaEventElapsedTime(&ms, begin, end));
    MUST(cudaEventDestroy(begin));
    MUST(cudaEventDestroy(end));
    return ms * 1e3f;
}

template <int C, int MODE> void measure(const memory &m, int columns, int samples) {
    const CUtensorMap left = map_of(m.values, 3, 64, (uint64_t)HALVES * SIDE, BOX_BYTES, left_box<C>);
    const CUtensorMap panel =
        map_of(m.dense, MODE == SHARED ? 3 : 2, columns, ROWS, 2 * PITCH, MODE == SHARED ? panel_box<C> : DEPTH);
    int clusters;
    MUST(cudaMemset(m.wrong, 0, sizeof *m.wrong));
    launched_us<C, MODE, true>(m, left, panel, CHECKED_STAGES, columns, &clusters);
    unsigned long long wrong;
    MUST(cudaMemcpy(&wrong, m.wrong, sizeof wrong, cudaMemcpyDeviceToHost));
    const double left_bytes = MODE == PRODUCT ? LEFT_BYTES : 0, strip_bytes = STRIPS * STRIP_BYTES;
    const double checked = (left_bytes + strip_bytes) / 4 * CHECKED_STAGES * clusters * C;
    for (int i = 0; i < WARMUP; i++) launched_us<C, MODE, false>(m, left, panel, TIMED_STAGES, columns, &clusters);
    const double stages = (double)clusters * TIMED_STAGES;
    printf("{\"mode\": \"%s\", \"multicast\": %d, \"columns\": %d, \"panel_bytes\": %lld, \"blocks\": %d, "
           "\"bytes_filled\": %.0f, \"bytes_read\": %.0f, \"flops\": %.0f, \"checked_words\": %.0f, "
           "\"wrong_words\": %llu, \"samples_us\": [",
           MODE == SHARED ? "shared" : "product", C, columns, 2ll * ROWS * columns, clusters * C,
           stages * C * (left_bytes + strip_bytes), stages * (left_bytes + strip_bytes * (MODE == SHARED ? 1 : C)),
           MODE == PRODUCT ? stages * C * 2 * SIDE * WIDTH * DEPTH : 0.0, checked, wrong);
    for (int i = 0; i < samples; i++)
        printf("%s%.3f", i ? ", " : "", launched_us<C, MODE, false>(m, left, panel, TIMED_STAGES, columns, &clusters));
    printf("]}\n");
    fflush(stdout);
}

/* Clusters whose blocks have all columns of their own fit in the panel. */
template <int C> void measure_both(const memory &m, int columns, int samples) {
    measure<C, SHARED>(m, columns, samples);
    if (columns % (C * WIDTH) == 0) measure<C, PRODUCT>(m, columns, samples);
}

} // namespace

int main(int argc, char **argv) {
    const int samples = argc > 1 ? atoi(argv[1]) : 20;
    if (argc > 2 || samples < 1) {
        fprintf(stderr, "l2_rate: expected a number of samples of 1 or more, got another argument\n");
        return 2;
    }
    cudaDeviceProp gpu;
    if (cudaGetDeviceProperties(&gpu, 0) != cudaSuccess || gpu.major != 9) {
        fprintf(stderr, "l2_rate: expected a GPU of compute capability 9.0, got none\n");
        return 2;
    }
    memory m;
    const uint32_t dense_words = ROWS * (PITCH / 2), values_words = HALVES * SIDE * 32;
    MUST(cudaMalloc((void **)&m.dense, 4ull * dense_words));
    MUST(cudaMalloc((void **)&m.values, 4ull * values_words));
    MUST(cudaMalloc((void **)&m.wrong, sizeof *m.wrong));
    fill_kernel<<<1024, 256>>>((uint32_t *)m.dense, dense_words, DENSE_SALT);
    fill_kernel<<<1024, 256>>>((uint32_t *)m.values, values_words, VALUES_SALT);
    MUST(cudaDeviceSynchronize());
    for (int columns : {512, 1024, 2048}) {
        measure_both<1>(m, columns, samples);
        measure_both<2>(m, columns, samples);
        measure_both<4>(m, columns, samples);
    }
    return 0;
}
