/* pack.cu: kvc_pack_cuda and kvc_unpack_cuda (pack.h). Compiled without contraction: the bytes are the CPU's.
 *
 * pack_fast.cuh has the common case. Here, for all others: one block of 4 warps takes one half (K or V) of one page. A
 * row of d channels belongs to 4 lanes, each with 4 neighbouring channels of every 16: the Hadamard stages of stride 1
 * and 2 and of 16 and more then stay inside a lane (4 and 8: one shuffle each), four channels are one Philox block, and
 * a warp holds the 8 rows of a tile's half. Codes pass through shared memory, where every lane of the page's format
 * finds its 8 elements of a tile side by side; 4 codes of 8 bits in a word become a word of packed codes by one shift.
 *
 * Entries that name memory outside the arena or the tensors are skipped, so that a wrong page table can cost values but
 * never the device. The caller checks tables on the host (pack.h). */
#include "pack_fast.cuh"
#include "pack_host.cuh"
#include "pack_stage.cuh"
#include "pack_steps.cuh"
#include "score_common.cuh"

namespace {

/* ---- kernels */

template <int TILES, int GROUPS, bool SEARCH>
__global__ void __launch_bounds__(THREADS, pack_blocks(TILES, GROUPS, SEARCH))
    pack_kernel(const __grid_constant__ call a, const __grid_constant__ grouping g) {
    __shared__ uint4 stage[KVC_PAGE_TOKENS * TILES * KVC_TILE * 2 / sizeof(uint4)];
    job it;
    if (!take_job(a, &it, blockIdx.y)) return;
    const bool e5m3 = a.layout.scale_dtype == KVC_STEP_E5M3;
    if (e5m3) clear_padding(a, it);
    if (it.bits == 16) {
        pack_sixteen<TILES>(stage, a, it);
        return;
    }
    const int lane = threadIdx.x & 31;
    const float most = 2.0f * kvc_mid(it.bits);
    for (int first = 0; first < KVC_PAGE_TOKENS; first += THREADS / 4) {
        const int row = first + threadIdx.x / 4;
        const spots to(it.value, row);
        const int token = row < it.page.tokens ? it.tokens[row] : -1;
        const bool valid = token >= 0 && token < a.s;
        float x[TILES][4] = {};
        if (valid) load_row<TILES>(x, it.base + token * it.stride, a.half[it.value].dtype, a.half[it.value].vectors);
        clamp_row(x);
        row_facts facts;
        if (a.rotation == KVC_ROTATE_HADAMARD) rotate_exactly<TILES, GROUPS>(x, facts, a.layout.zero_point);
        affine<GROUPS> scales;
        fit<TILES, GROUPS, SEARCH>(scales, x, a, g, it.bits, facts);
        const encoder<GROUPS> encode(scales, g, facts.factor);
        /* No token: zeros all the way, and around a middle of 0 their code and its bytes are 0 too. */
        const float mid = valid ? kvc_mid(it.bits) : 0.0f;
        if (it.value)
            put_codes<TILES, GROUPS, 1>((uint8_t *)stage, to, x, encode, mid, most, a, it.list, token);
        else
            put_codes<TILES, GROUPS, 0>((uint8_t *)stage, to, x, encode, mid, most, a, it.list, token);
#pragma unroll
        for (int k = 0, group = 0; k < GROUPS; k++) {
            if (!begins<GROUPS>(g, k) || lane & 3) continue;
            uint8_t *step = it.scales + kvc_scale_offset(&a.layout, KVC_PAGE_TOKENS, group++, row);
            if (e5m3)
                put_step<KVC_STEP_E5M3>(step, scales.scale[k], scales.zero[k], a.layout.zero_point);
            else
                put_step<KVC_STEP_FP16>(step, scales.scale[k], scales.zero[k], a.layout.zero_point);
        }
    }
    __syncthreads();
    switch (it.bits) {
    case 2: write_words<2, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value); break;
    case 3: write_words<3, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value); break;
    case 4: write_words<4, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value); break;
    case 8: write_words<8, KVC_PAGE_TOKENS>(it.words, stage, TILES, it.value); break;
    default: break;
    }
}

template <int TILES, int STEP>
__global__ void __launch_bounds__(THREADS, unpack_blocks(TILES))
    unpack_kernel(const __grid_constant__ call a, const __grid_constant__ grouping g) {
    __shared__ uint4 stage[KVC_PAGE_TOKENS * TILES * KVC_TILE * 2 / sizeof(uint4)];
    job it;
    if (!take_job(a, &it, blockIdx.y)) return;
    switch (it.bits) {
    case 2: read_words<2, KVC_PAGE_TOKENS>(stage, it.words, TILES, it.value); break;
    case 3: read_words<3, KVC_PAGE_TOKENS>(stage, it.words, TILES, it.value); break;
    case 4: read_words<4, KVC_PAGE_TOKENS>(stage, it.words, TILES, it.value); break;
    case 8: read_words<8, KVC_PAGE_TOKENS>(stage, it.words, TILES, it.value); break;
    default:
        if (it.page_tokens == KVC_TAIL_TOKENS)
            read_words<16, KVC_TAIL_TOKENS>(stage, it.words, TILES, it.value);
        else
            read_words<16, KVC_PAGE_TOKENS>(stage, it.words, TILES, it.value);
    }
    __syncthreads();
    const float mid = kvc_mid(it.bits);
    for (int first = 0; first < it.page_tokens; first += THREADS / 4) {
        const int row =
            min(first + (int)threadIdx.x / 4, it.page_tokens - 1); /* pages of 16 tokens: the last one again */
        const spots from(it.value, row);
        float x[TILES][4];
        if (it.bits == 16) {
#pragma unroll
            for (int j = 0; j < TILES; j++)
                unpack_halves(x[j], stage_get((const uint16_t *)stage, from, j), a.layout.half);
        } else {
            float scale = 0, zero = 0;
#pragma unroll
            for (int j = 0, group = 0; j < TILES; j++) {
                if (j == 0 || g.group_heads >> j & 1) {
                    get_step<STEP>(scale, zero, it.scales + kvc_scale_offset(&a.layout, it.page_tokens, group++, row),
                                   a.layout.zero_point);
                }
                stage_get(x[j], (const uint8_t *)stage, from, j);
#pragma unroll
                for (int i = 0; i < 4; i++) x[j][i] = zero + scale * (x[j][i] - mid);
            }
        }
        if (a.rotation == KVC_ROTATE_HADAMARD) rotate_row(x);
        const int token = row < it.page.tokens ? it.tokens[row] : -1;
        if (token >= 0 && token < a.s)
            store_row<TILES>(it.base + token * it.stride, x, a.half[it.value].dtype, a.half[it.value].vectors);
    }
}

/* ---- launches */

/* pack's and unpack's argument structs share these names. */
template <typename arguments> kvc_status make_call(const char *op, const arguments *args, call *out) {
    const kvc_named tensors[] = {{"arena", &args->arena},  {"keys", &args->keys},   {"values", &args->values},
                                 {"pages", &args->pages},  {"lists", &args->lists}, {"start", &args->start},
                                 {"tokens", &args->tokens}};
    KVC_TRY(kvc_cuda_check(op, tensors, sizeof tensors / sizeof *tensors));
    KVC_CHECK(args->pages.shape[0] <= INT32_MAX, KVC_ESHAPE, "%s: pages: expected fewer than 2^31, got %lld", op,
              (long long)args->pages.shape[0]);
    KVC_CHECK(args->keys.shape[0] * args->keys.shape[1] <= INT32_MAX && args->keys.shape[2] <= INT32_MAX, KVC_ESHAPE,
              "%s: keys: expected fewer than 2^31 lists and tokens, got %s", op, kvc_shape_text(&args->keys));
    out->half[0] = view(&args->keys);
    out->half[1] = view(&args->values);
    out->arena = (uint32_t *)args->arena.data;
    out->arena_bytes = args->arena.shape[0];
    out->pages = (const kvc_page *)args->pages.data;
    out->lists = (const int32_t *)args->lists.data;
    out->start = (const int32_t *)args->start.data;
    out->tokens = (const int32_t *)args->tokens.data;
    out->token_count = args->tokens.shape[0];
    out->heads = args->keys.shape[1];
    out->heads_inverse = out->heads > 1 ? (uint32_t)(((uint64_t)1 << 32) / out->heads) : UINT32_MAX;
    out->list_count = args->keys.shape[0] * args->keys.shape[1];
    out->s = args->keys.shape[2];
    for (int bits = 2; bits <= 16; bits++)
        if (kvc_bits_ok(bits)) out->half_bytes[bits] = kvc_half_bytes(&args->layout, bits, KVC_PAGE_TOKENS);
    out->tail_half_bytes = kvc_half_bytes(&args->layout, 16, KVC_TAIL_TOKENS);
    out->layout = args->layout;
    out->rotation = args->rotation;
    return KVC_OK;
}

template <int TILES, int GROUPS> cudaError_t launch_pack(int n, const call &a, cudaStream_t stream) {
    const grouping g = make_grouping(&a.layout);
    if (a.scale == KVC_SCALE_SEARCH)
        pack_kernel<TILES, GROUPS, true><<<dim3(n, 2), THREADS, 0, stream>>>(a, g);
    else
        pack_kernel<TILES, GROUPS, false><<<dim3(n, 2), THREADS, 0, stream>>>(a, g);
    return cudaGetLastError();
}

template <int TILES> cudaError_t launch_pack(int n, const call &a, cudaStream_t stream) {
    if constexpr ((TILES & (TILES - 1)) == 0)
        if (takes_fast(a)) return launch_fast<TILES>(n, a, stream);
    return a.layout.group == a.layout.head_dim ? launch_pack<TILES, 1>(n, a, stream)
                                               : launch_pack<TILES, TILES>(n, a, stream);
}

template <int TILES> cudaError_t launch_unpack(int n, const call &a, cudaStream_t stream) {
    const grouping g = make_grouping(&a.layout);
    if (a.layout.scale_dtype == KVC_STEP_E5M3)
        unpack_kernel<TILES, KVC_STEP_E5M3><<<dim3(n, 2), THREADS, 0, stream>>>(a, g);
    else
        unpack_kernel<TILES, KVC_STEP_FP16><<<dim3(n, 2), THREADS, 0, stream>>>(a, g);
    return cudaGetLastError();
}

} // namespace

extern "C" kvc_status kvc_pack_cuda(const kvc_pack_args *args, kvc_stream stream) {
    KVC_TRY(kvc_pack_check(args));
    call a = {};
    KVC_TRY(make_call("pack", args, &a));
    a.scale = args->scale;
    a.stochastic = args->stochastic;
    a.layer = args->layer;
    a.seed = args->seed;
    const int n = (int)args->pages.shape[0];
    if (n == 0) return KVC_OK;
    kvc_device_scope scope(args->arena.device_id);
    cudaError_t error = scope.error;
    if (error == cudaSuccess) switch (a.layout.head_dim) {
        case 64: error = launch_pack<4>(n, a, (cudaStream_t)stream); break;
        case 80: error = launch_pack<5>(n, a, (cudaStream_t)stream); break;
        case 96: error = launch_pack<6>(n, a, (cudaStream_t)stream); break;
        case 128: error = launch_pack<8>(n, a, (cudaStream_t)stream); break;
        default: error = launch_pack<16>(n, a, (cudaStream_t)stream); break;
        }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("pack", error);
}

extern "C" kvc_status kvc_unpack_cuda(const kvc_unpack_args *args, kvc_stream stream) {
    KVC_TRY(kvc_unpack_check(args));
    call a = {};
    KVC_TRY(make_call("unpack", args, &a));
    const int n = (int)args->pages.shape[0];
    if (n == 0) return KVC_OK;
    kvc_device_scope scope(args->arena.device_id);
    cudaError_t error = scope.error;
    if (error == cudaSuccess) switch (a.layout.head_dim) {
        case 64: error = launch_unpack<4>(n, a, (cudaStream_t)stream); break;
        case 80: error = launch_unpack<5>(n, a, (cudaStream_t)stream); break;
        case 96: error = launch_unpack<6>(n, a, (cudaStream_t)stream); break;
        case 128: error = launch_unpack<8>(n, a, (cudaStream_t)stream); break;
        default: error = launch_unpack<16>(n, a, (cudaStream_t)stream); break;
        }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("unpack", error);
}
