/* bsr_sddmm.cu: kvc_bsr_sddmm_cuda: a block of threads for each stored block, eight warps of 32 by 32 (128: by 64, 16:
 * 16 by 16); where fewer make up the block, the others take other columns, and their sums are added in order. */
#include "bsr_tile.cuh"

namespace {

constexpr int THREADS = 256, STAGES = 3;

struct job {
    const int32_t *plan;
    kvc_bsr_head head;
    const char *left, *right;
    int64_t left_pitch, right_pitch, coordinates;
    char *out;
    int64_t n;
    int32_t out_type;
};

template <int B> struct shape {
    static constexpr int TILE_M = B < 32 ? B : 32, TILE_N = B == 128 ? 64 : TILE_M; /* of a warp */
    static constexpr int WARPS_M = B / TILE_M, WARPS_N = B / TILE_N, WARPS_K = 8 / (WARPS_M * WARPS_N);
    static constexpr int DEPTH = B == 128 ? 32 : B == 64 ? 64 : 128; /* columns of a stage */
    static constexpr int SIDE = B * DEPTH * 2, STAGE = 2 * SIDE;
    static constexpr int SUMS = (WARPS_K - 1) * B * B * 4;
    static constexpr int BYTES = STAGES * STAGE > SUMS ? STAGES * STAGE : SUMS;
};

template <bool BRAIN, int B, bool ALIGNED> __global__ void __launch_bounds__(THREADS, 2) sddmm_kernel(const job j) {
    using S = shape<B>;
    constexpr int PARTS = 2 * B * S::DEPTH / 8 / THREADS, ROW_PARTS = S::DEPTH / 8, MT = S::TILE_M / 16,
                  NT = S::TILE_N / 16, DEEP = S::DEPTH / S::WARPS_K;
    __shared__ __align__(128) char shared[S::BYTES];
    {
        const int4 a = ((const int4 *)j.plan)[0], b = ((const int4 *)j.plan)[1];
        if (a.x != j.head.magic || a.y != j.head.block || a.z != j.head.transpose || b.x != j.head.m ||
            b.y != j.head.k || b.z != j.head.blocks)
            return;
    }
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int wm = warp % S::WARPS_M, wn = warp / S::WARPS_M % S::WARPS_N, wk = warp / (S::WARPS_M * S::WARPS_N);
    const int2 at = ((const int2 *)(j.plan + j.coordinates))[blockIdx.x];
    const int64_t count = (j.n + S::DEPTH - 1) / S::DEPTH;

    const char *from[PARTS];
    int place[PARTS], first[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const int c = thread + i * THREADS, row = c / ROW_PARTS, part = c % ROW_PARTS;
        const bool right = row >= B;
        const int64_t r = right ? (int64_t)at.y * B + row - B : (int64_t)at.x * B + row;
        const bool real = r < (right ? j.head.k : j.head.m);
        from[i] = !real ? nullptr : right ? j.right + r * j.right_pitch * 2 : j.left + r * j.left_pitch * 2;
        first[i] = part * 8;
        place[i] = tile_place<S::DEPTH * 2>(row, part);
    }
    auto request = [&](int64_t it) {
        if (it < count) {
            const uint32_t to = tile_address(shared) + (int)(it % STAGES) * S::STAGE;
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const int64_t column = it * S::DEPTH + first[i], left = 2 * (j.n - column);
                const int bytes = from[i] == nullptr || left <= 0 ? 0 : left < 16 ? (int)left : 16;
                tile_copy<ALIGNED>(to + place[i], bytes ? from[i] + 2 * column : j.left, bytes);
            }
        }
        tile_commit();
    };
    for (int i = 0; i < STAGES - 1; i++) request(i);

    float d[MT][2 * NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < 2 * NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) d[m][n][e] = 0.0f;
    for (int64_t it = 0; it < count; it++) {
        tile_wait<STAGES - 2>();
        __syncthreads();
        request(it + STAGES - 1);
        const uint32_t stage = tile_address(shared) + (int)(it % STAGES) * S::STAGE;
#pragma unroll
        for (int k = 0; k < DEEP; k += 16) {
            const int part = (wk * DEEP + k) / 8;
            uint32_t left[MT][4], right[NT][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
                tile_load<false>(
                    left[m], stage + tile_place<S::DEPTH * 2>(wm * S::TILE_M + m * 16 + lane % 16, part + lane / 16));
#pragma unroll
            for (int n = 0; n < NT; n++)
                tile_load<false>(
                    right[n], stage + tile_place<S::DEPTH * 2>(B + wn * S::TILE_N + n * 16 + lane % 8 + lane / 16 * 8,
                                                               part + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < 2 * NT; n++)
                    tile_multiply<BRAIN>(d[m][n], left[m], right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]);
        }
    }

    auto each = [&](auto what) { /* sums of this warp: element, row and column in the block */
#pragma unroll
                                 for (int m = 0; m < MT; m++)
#pragma unroll
                                     for (int n = 0; n < 2 * NT; n++)
#pragma unroll
                                         for (int e = 0; e < 4; e++)
                                             what(d[m][n][e], wm * S::TILE_M + m * 16 + lane / 4 + e / 2 * 8,
                                                  wn * S::TILE_N + n * 8 + lane % 4 * 2 + e % 2);
    };
    if (S::WARPS_K > 1) {
        float *sums = (float *)shared;
        tile_wait<0>();
        __syncthreads();
        if (wk > 0) each([&](float &value, int r, int c) { sums[((wk - 1) * B + r) * B + c] = value; });
        __syncthreads();
        if (wk > 0) return;
        for (int w = 0; w < S::WARPS_K - 1; w++)
            each([&](float &value, int r, int c) { value += sums[(w * B + r) * B + c]; });
    }
    char *out = j.out + (int64_t)blockIdx.x * B * B * (j.out_type == KVC_FLOAT32 ? 4 : 2);
    each([&](float &value, int r, int c) { bsr_store(out, r * B + c, j.out_type, value); });
}

template <bool BRAIN, int B> kvc_status launch(const job &j, bool aligned, cudaStream_t stream) {
    if (aligned)
        sddmm_kernel<BRAIN, B, true><<<(unsigned)j.head.blocks, THREADS, 0, stream>>>(j);
    else
        sddmm_kernel<BRAIN, B, false><<<(unsigned)j.head.blocks, THREADS, 0, stream>>>(j);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("bsr_sddmm", error);
}

template <bool BRAIN> kvc_status launch_any(const job &j, bool aligned, cudaStream_t stream) {
    switch (j.head.block) {
    case 16: return launch<BRAIN, 16>(j, aligned, stream);
    case 32: return launch<BRAIN, 32>(j, aligned, stream);
    case 64: return launch<BRAIN, 64>(j, aligned, stream);
    default: return launch<BRAIN, 128>(j, aligned, stream);
    }
}

} // namespace

extern "C" kvc_status kvc_bsr_sddmm_cuda(const kvc_bsr_sddmm_args *args, kvc_stream stream) {
    KVC_TRY(kvc_bsr_sddmm_check(args));
    const int64_t m = args->left.shape[0], k = args->right.shape[0], blocks = args->out.shape[0];
    if (blocks == 0) return KVC_OK;
    job j = {};
    j.plan = (const int32_t *)args->plan.data;
    j.head.magic = KVC_BSR_MAGIC;
    j.head.block = (int32_t)args->out.shape[1];
    j.head.transpose = args->transpose;
    j.head.m = (int32_t)m;
    j.head.k = (int32_t)k;
    j.head.blocks = (int32_t)blocks;
    j.left = (const char *)args->left.data;
    j.right = (const char *)args->right.data;
    j.left_pitch = args->left.strides[0];
    j.right_pitch = args->right.strides[0];
    j.coordinates = kvc_bsr_coordinates(args->transpose ? k : m);
    j.out = (char *)args->out.data;
    j.n = args->left.shape[1];
    j.out_type = args->out.dtype;
    kvc_device_scope scope(args->out.device_id);
    if (scope.error != cudaSuccess) return kvc_cuda_fail("bsr_sddmm", scope.error);
    const bool aligned =
        ((uintptr_t)j.left | (uintptr_t)j.right | (uintptr_t)(2 * j.left_pitch) | (uintptr_t)(2 * j.right_pitch)) %
            16 ==
        0;
    return args->left.dtype == KVC_BFLOAT16 ? launch_any<true>(j, aligned, (cudaStream_t)stream)
                                            : launch_any<false>(j, aligned, (cudaStream_t)stream);
}
