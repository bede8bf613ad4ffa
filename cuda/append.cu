/* append.cu: kvc_append_cuda (append.h). Compiled without contraction: the bytes are the CPU's.
 *
 * One block a list, all lists of a layer in one launch. Its threads are (128, 2): 4 warps for K, 4 for V. A new row
 * belongs to one warp; a page of aged tokens is packed by the whole block. All threads carry the list's state; what is
 * in memory is changed once everybody has read it.
 *
 * One new token that makes no page, which is what almost every launch of decoding does, goes the short way: two loads
 * after one another (the list's state; its last page's entry or the stack's last page), the row meanwhile. */
#include "append_flush.cuh"
#include "kvcomp/append.h"
#include "pack_host.cuh"

namespace {

struct append_job {
    call rows; /* keys and values, arena, layout, rounding */
    kvc_page *table;
    kvc_list *lists;
    uint32_t *pool_tail, *pool_packed;
    int32_t *left;
    const int32_t *valid;
    const uint8_t *classes;
    int32_t capacity, tail_room, packed_room; /* of a row of table, pool_tail, pool_packed */
    int32_t heads, q, window, tail_bytes;
};

/* The state of the block's list. */
struct state {
    kvc_list list;
    int left_tail, left_packed, k_bits, v_bits, valid;
    __device__ bool packs() const { return k_bits != 16 || v_bits != 16; }
    __device__ bool flushes(int window) const { return packs() && list.tail_tokens >= window + KVC_PAGE_TOKENS; }
    __device__ int tail_pages() const { return list.pages - list.tail_page; }
};

__device__ int64_t list_of(const append_job &a, int sequence) { return (int64_t)sequence * a.heads + blockIdx.y; }

__device__ const char *rows_of(const append_job &a, int sequence, int value) {
    const rows &half = a.rows.half[value];
    return half.data + sequence * half.b + blockIdx.y * half.h;
}

__device__ state load_state(const append_job &a, int64_t i, int sequence, int4 list) {
    const uchar2 bits = ((const uchar2 *)a.classes)[i];
    const int2 left = ((const int2 *)a.left)[i];
    const int valid = a.valid ? a.valid[sequence] : a.q;
    return {{list.x, list.y, list.z, list.w}, left.x, left.y, bits.x, bits.y, valid};
}

__device__ bool inside(const call &a, uint32_t unit, int bytes) {
    return (int64_t)unit * KVC_UNIT + bytes <= a.arena_bytes;
}

__device__ int flat_thread() { return threadIdx.x + THREADS * threadIdx.y; }

/* All bytes of a tail page. */
template <int TILES> __device__ void clear_page(char *page) {
    constexpr int VECTORS = 2 * KVC_TAIL_TOKENS * TILES * KVC_TILE * 2 / (int)sizeof(uint4);
#pragma unroll
    for (int at = 0; at < VECTORS; at += 2 * THREADS)
        if (VECTORS % (2 * THREADS) == 0 || at + flat_thread() < VECTORS)
            ((uint4 *)page)[at + flat_thread()] = make_uint4(0, 0, 0, 0);
}

__device__ char *page_of(const call &a, uint32_t unit) { return (char *)a.arena + (int64_t)unit * KVC_UNIT; }

__device__ void write_state(const append_job &a, int64_t i, const state &s) {
    if (flat_thread()) return;
    ((int4 *)a.lists)[i] = make_int4(s.list.pages, s.list.tail_page, s.list.tail_tokens, s.list.tokens);
    ((int2 *)a.left)[i] = make_int2(s.left_tail, s.left_packed);
}

__device__ kvc_page entry_of(uint32_t unit, int k_bits, int v_bits, int tokens) {
    return {unit, (uint8_t)k_bits, (uint8_t)v_bits, (uint8_t)tokens, 0};
}

/* What is looked at together: entry k of the tail, and units k places below the stacks' tops. */
struct found {
    uint2 page; /* as kvc_page */
    uint32_t fresh, packed;
};

/* As the CPU's checks: everything that appending `valid` tokens reads and writes is there. One barrier: behind it, all
 * threads have read the state. Entries are asked for, then `meanwhile` runs. */
template <typename function> __device__ bool sound(const append_job &a, int64_t i, const state &s, function meanwhile) {
    bool fine = (uint32_t)s.k_bits <= 16 && (uint32_t)s.v_bits <= 16 && a.rows.half_bytes[s.k_bits] &&
                a.rows.half_bytes[s.v_bits] && s.valid >= 0 && s.valid <= a.q &&
                kvc_append_state_ok(&s.list, a.capacity, s.valid) && s.left_tail >= 0 && s.left_packed >= 0 &&
                s.left_packed <= a.packed_room && s.left_tail + (int64_t)s.tail_pages() <= a.tail_room;
    const int pages = fine ? s.tail_pages() : 0;
    const auto find = [&](int k) {
        found out = {{0, 0}, 0, 0};
        if (k < pages) out.page = ((const uint2 *)a.table)[i * a.capacity + s.list.tail_page + k];
        if (fine && k < s.left_tail) out.fresh = a.pool_tail[i * a.tail_room + s.left_tail - 1 - k];
        if (fine && k < s.left_packed) out.packed = a.pool_packed[i * a.packed_room + s.left_packed - 1 - k];
        return out;
    };
    int k = flat_thread(), peak = 0, flushes = 0;
    found at = find(k); /* asked for before it is known how much of it counts */
    meanwhile();
    if (fine) {
        kvc_append_need(s.list.tail_tokens, s.valid, a.window, s.packs(), &peak, &flushes);
        fine = peak <= s.left_tail && flushes <= s.left_packed && s.list.pages + (int64_t)peak + flushes <= a.capacity;
    }
    const int bytes = fine ? (a.rows.half_bytes[s.k_bits] + a.rows.half_bytes[s.v_bits] + KVC_UNIT - 1) & -KVC_UNIT : 0;
    while (fine && k < max(max(pages, peak), flushes)) {
        const int tokens = k + 1 < pages ? KVC_TAIL_TOKENS : (s.list.tail_tokens - 1) % KVC_TAIL_TOKENS + 1;
        if (k < pages)
            fine &= (at.page.y & 0xffffff) == (16 | 16 << 8 | (uint32_t)tokens << 16) &&
                    inside(a.rows, at.page.x, a.tail_bytes);
        if (k < peak) fine &= inside(a.rows, at.fresh, a.tail_bytes);
        if (k < flushes) fine &= inside(a.rows, at.packed, bytes);
        k += 2 * THREADS;
        if (k < max(max(pages, peak), flushes)) at = find(k);
    }
    return !__syncthreads_or(!fine);
}

/* Pages that rows are written to next: the tail's last one, and the one on top of the stack. */
struct near_pages {
    uint32_t last, top;
};

__device__ near_pages load_near(const append_job &a, int64_t i, const state &s) {
    const int slot = s.list.pages - 1, top = s.left_tail - 1;
    return {s.tail_pages() > 0 ? a.table[i * a.capacity + slot].unit : 0,
            top >= 0 ? a.pool_tail[i * a.tail_room + top] : 0};
}

/* The tail's first 64 tokens become a page. Gives what load_near would now; no barrier at the end. */
template <int TILES, int EACH>
__device__ near_pages flush(const append_job &a, int64_t i, state &s, uint32_t *stage, float *noise) {
    kvc_page *tail = a.table + i * a.capacity + s.list.tail_page;
    int value = threadIdx.y, bits = value ? s.v_bits : s.k_bits;
    /* What follows from these would else be made before the first flush, and kept in registers. */
    asm volatile("" : "+r"(value), "+r"(bits));
    const uint32_t unit = a.pool_packed[i * a.packed_room + s.left_packed - 1];
    job it;
    it.page = entry_of(unit, s.k_bits, s.v_bits, KVC_PAGE_TOKENS);
    it.list = (int)i;
    it.value = value;
    it.bits = bits;
    it.page_tokens = KVC_PAGE_TOKENS;
    it.words = (uint32_t *)(page_of(a.rows, unit) + (value ? a.rows.half_bytes[s.k_bits] : 0));
    it.scales = (uint8_t *)it.words + KVC_PAGE_TOKENS / 8 * a.rows.layout.head_dim * bits;
    stage += value * KVC_PAGE_TOKENS * TILES * KVC_TILE / sizeof *stage;
    read_half<TILES, EACH>(a.rows, it, tail, s.list.tokens - s.list.tail_tokens, stage, noise);
    const int thread = flat_thread(), moved = s.tail_pages() - TAIL_PAGES;
    const uint32_t freed = tail[min(thread, TAIL_PAGES - 1)].unit;
    const near_pages near = {tail[s.tail_pages() - 1].unit, tail[TAIL_PAGES - 1].unit};
    kvc_page page;
    if (thread < moved) page = tail[TAIL_PAGES + thread];
    __syncthreads(); /* all have read what they do of the old tail and its pages */
    write_half<TILES>(it, stage);
    if (thread < moved) tail[1 + thread] = page;
#pragma unroll 1
    for (int first = 2 * THREADS; first < moved; first += 2 * THREADS) {
        if (first + thread < moved) page = tail[TAIL_PAGES + first + thread];
        __syncthreads();
        if (first + thread < moved) tail[1 + first + thread] = page;
    }
    if (thread < TAIL_PAGES) a.pool_tail[i * a.tail_room + s.left_tail + thread] = freed;
    if (thread == 0) *tail = it.page;
    s.left_tail += TAIL_PAGES;
    s.left_packed--;
    s.list.pages -= TAIL_PAGES - 1;
    s.list.tail_page++;
    s.list.tail_tokens -= KVC_PAGE_TOKENS;
    return near;
}

/* `count` new rows from row `first` on, none of which has to wait for a flush. */
template <int TILES>
__device__ void add_rows(const append_job &a, int64_t i, state &s, near_pages near, int first, int count) {
    kvc_page *tail = a.table + i * a.capacity + s.list.tail_page;
    const uint32_t *stack = a.pool_tail + i * a.tail_room + s.left_tail - 1;
    const int value = threadIdx.y, start = s.list.tail_tokens, end = start + count, have = s.tail_pages();
    const int fresh = (end + KVC_TAIL_TOKENS - 1) / KVC_TAIL_TOKENS - have;
    const auto unit_of = [=](int page) {
        return page < have ? near.last : page == have ? near.top : stack[have - page];
    };
    if (fresh > 1) __syncthreads(); /* a flush has just pushed what others pop */
#pragma unroll 1
    for (int k = 0; k < fresh; k++) clear_page<TILES>(page_of(a.rows, unit_of(have + k)));
    __syncthreads();
#pragma unroll 1
    for (int k = threadIdx.x / 32; k < count; k += THREADS / 32) {
        token_row<TILES> row;
        row.fetch(a.rows.half[value], rows_of(a, blockIdx.x, value) + (first + k) * a.rows.half[value].s);
        row.widen(a.rows.half[value]);
        if (a.rows.rotation == KVC_ROTATE_HADAMARD) row.rotate();
        row.store(page_of(a.rows, unit_of((start + k) / KVC_TAIL_TOKENS)) + (value ? a.rows.tail_half_bytes : 0), value,
                  (start + k) % KVC_TAIL_TOKENS, a.rows.layout.half);
    }
#pragma unroll 1
    for (int k = max(have - 1, 0) + flat_thread(); k < have + fresh; k += 2 * THREADS)
        tail[k] = entry_of(unit_of(k), 16, 16, min(end - k * KVC_TAIL_TOKENS, KVC_TAIL_TOKENS));
    s.left_tail -= fresh;
    s.list.pages += fresh;
    s.list.tail_tokens += count;
    s.list.tokens += count;
}

/* Before the kernels ahead are done: what will most likely be read comes into the L2. They may yet write to it, so what
 * is loaded here, past the L1, says where to ask for more, and nothing else. For one warp: the others, which wait for
 * those kernels meanwhile, go on without it where nothing is ahead. */
template <int TILES> __device__ void ask_ahead(const append_job &a) {
    const int64_t i = list_of(a, blockIdx.x);
    const int lane = threadIdx.x & 31, row_bytes = TILES * KVC_TILE * (a.rows.half[0].dtype == KVC_FLOAT32 ? 4 : 2);
    const int4 list = __ldcg((const int4 *)a.lists + i);
    const int2 left = __ldcg((const int2 *)a.left + i);
    const uchar2 bits = __ldcg((const uchar2 *)a.classes + i);
    if (a.valid && lane == 0) prefetch(a.valid + blockIdx.x);
    if (a.q == 1)
#pragma unroll
        for (int value = 0; value < 2; value++)
            for (int at = 32 * lane; at < row_bytes; at += 32 * 32) prefetch(rows_of(a, blockIdx.x, value) + at);
    const state s = {{list.x, list.y, list.z, list.w}, left.x, left.y, bits.x, bits.y, 0};
    const auto ask = [=](const auto *row, int at, int room) {
        if ((uint32_t)at < (uint32_t)room) prefetch(row + i * room + at);
    };
    if (lane == 0) ask(a.pool_tail, s.left_tail - 1, a.tail_room);
    if (lane == 1) ask(a.table, s.list.pages - 1, a.capacity);
    if (!s.flushes(a.window)) return;
    if (lane < TAIL_PAGES) ask(a.table, s.list.tail_page + lane, a.capacity);
    if (lane == TAIL_PAGES) ask(a.pool_packed, s.left_packed - 1, a.packed_room);
}

/* One new token that makes no page; false: another way has to be taken. */
template <int TILES> __device__ bool append_one(const append_job &a) {
    /* Plus a zero that the compiler does not see through: it would take the state through uniform registers, one wait
     * after another. */
    const int sequence = blockIdx.x + (threadIdx.y >> 1), value = threadIdx.y;
    const int64_t i = list_of(a, sequence);
    const int4 list = ((const int4 *)a.lists)[i];
    token_row<TILES> row;
    if (threadIdx.x < 32) row.fetch(a.rows.half[value], rows_of(a, sequence, value));
    state s = load_state(a, i, sequence, list);
    if (s.flushes(a.window)) return false;
    uint2 *const slots = (uint2 *)a.table + i * a.capacity;
    const uint32_t *const stack = a.pool_tail + i * a.tail_room;
    const int place = s.list.tail_tokens & (KVC_TAIL_TOKENS - 1), begins = place == 0;
    const int slot = s.list.pages - 1 + begins;
    uint2 page = make_uint2(0, 16 | 16 << 8); /* as kvc_page */
    if (begins) {
        if ((uint32_t)s.left_tail - 1 < (uint32_t)a.tail_room) page.x = stack[s.left_tail - 1];
    } else {
        if ((uint32_t)slot < (uint32_t)a.capacity) page = slots[slot];
    }
    const bool fine = s.valid == 1 && kvc_append_state_ok(&s.list, a.capacity, 1) && slot < a.capacity &&
                      s.left_tail >= begins && (uint32_t)s.left_tail + s.tail_pages() <= (uint32_t)a.tail_room;
    if (threadIdx.x < 32) {
        row.widen(a.rows.half[value]);
        if (a.rows.rotation == KVC_ROTATE_HADAMARD) row.rotate();
    }
    if (!fine || (page.y & 0xffffff) != (16 | 16 << 8 | (uint32_t)place << 16) || !inside(a.rows, page.x, a.tail_bytes))
        return true;
    char *bytes = page_of(a.rows, page.x);
    if (begins) clear_page<TILES>(bytes);
    __syncthreads();
    if (threadIdx.x < 32) row.store(bytes + (value ? a.rows.tail_half_bytes : 0), value, place, a.rows.layout.half);
    page.y += 1 << 16;
    if (flat_thread() == 32) slots[slot] = page;
    s.left_tail -= begins;
    s.list.pages += begins;
    s.list.tail_tokens++;
    s.list.tokens++;
    write_state(a, i, s);
    return true;
}

template <int TILES, int EACH> __device__ void append_any(const append_job &a, uint32_t *stage, float *noise) {
    const int64_t i = list_of(a, blockIdx.x);
    state s = load_state(a, i, blockIdx.x, ((const int4 *)a.lists)[i]);
    /* Pages of the first flush come nearer while entries are looked at. */
    const auto meanwhile = [&] {
        if (!s.flushes(a.window) || !kvc_append_state_ok(&s.list, a.capacity, 0)) return;
        const uint32_t unit = a.table[i * a.capacity + s.list.tail_page + threadIdx.x / 32].unit;
        if (inside(a.rows, unit, a.tail_bytes)) prefetch_half<TILES>(tail_half(a.rows, unit, threadIdx.y));
    };
    if (!sound(a, i, s, meanwhile)) return;
    for (int done = 0; done < s.valid;) {
        near_pages near;
        if (s.flushes(a.window)) {
            near = flush<TILES, EACH>(a, i, s, stage, noise + flat_thread() / 32 * NOISE);
            if (s.flushes(a.window)) {
                __syncthreads();
                continue;
            }
        } else {
            near = load_near(a, i, s);
        }
        const int until = s.packs() ? a.window + KVC_PAGE_TOKENS - s.list.tail_tokens : s.valid;
        const int count = min(s.valid - done, until);
        add_rows<TILES>(a, i, s, near, a.q - s.valid + done, count);
        done += count;
        if (done < s.valid) __syncthreads();
    }
    write_state(a, i, s);
}

/* TILES: channel tiles of a row; EACH: of a group. */
template <int TILES, int EACH>
__global__ void __launch_bounds__(2 * THREADS, TILES > 8 ? 1 : 2) append_kernel(const __grid_constant__ append_job a) {
    __shared__ uint4 stage[2 * KVC_PAGE_TOKENS * TILES * KVC_TILE / sizeof(uint4)];
    __shared__ float4 noise[2 * THREADS / 32 * NOISE / 4];
    if (flat_thread() >= 2 * THREADS - 32) ask_ahead<TILES>(a);
    wait_for_previous(); /* before the next may begin: it may rely on what came before this kernel */
    let_next_begin();
    if (a.q == 1 && append_one<TILES>(a)) return;
    asm volatile("" ::: "memory"); /* nothing of the short way is kept, which would cost it registers */
    append_any<TILES, EACH>(a, (uint32_t *)stage, (float *)noise);
}

/* The next smaller divisor. */
constexpr int divisor_below(int n, int divisor) {
    do divisor--;
    while (n % divisor);
    return divisor;
}

template <int TILES, int EACH = TILES> cudaError_t launch(const cudaLaunchConfig_t &config, const append_job &a) {
    if constexpr (EACH > 1)
        if (a.rows.layout.group != EACH * KVC_TILE) return launch<TILES, divisor_below(TILES, EACH)>(config, a);
    return cudaLaunchKernelEx(&config, append_kernel<TILES, EACH>, a);
}

append_job make_job(const kvc_append_args *args) {
    append_job a = {};
    a.rows.half[0] = view(&args->keys);
    a.rows.half[1] = view(&args->values);
    a.rows.arena = (uint32_t *)args->arena.data;
    a.rows.arena_bytes = args->arena.shape[0];
    for (int bits = 2; bits <= 16; bits++)
        if (kvc_bits_ok(bits)) a.rows.half_bytes[bits] = kvc_half_bytes(&args->layout, bits, KVC_PAGE_TOKENS);
    a.rows.tail_half_bytes = kvc_half_bytes(&args->layout, 16, KVC_TAIL_TOKENS);
    a.rows.layout = args->layout;
    a.rows.rotation = args->rotation;
    a.rows.scale = args->scale;
    a.rows.stochastic = args->stochastic;
    a.rows.layer = args->layer;
    a.rows.seed = args->seed;
    a.table = (kvc_page *)args->table.data;
    a.lists = (kvc_list *)args->lists.data;
    a.pool_tail = (uint32_t *)args->pool_tail.data;
    a.pool_packed = (uint32_t *)args->pool_packed.data;
    a.left = (int32_t *)args->left.data;
    a.valid = (const int32_t *)args->valid.data;
    a.classes = (const uint8_t *)args->classes.data;
    a.capacity = (int32_t)args->table.shape[1];
    a.tail_room = (int32_t)args->pool_tail.shape[1];
    a.packed_room = (int32_t)args->pool_packed.shape[1];
    a.heads = (int32_t)args->keys.shape[1];
    a.q = (int32_t)args->keys.shape[2];
    a.window = args->window;
    a.tail_bytes = (int32_t)kvc_page_bytes(&args->layout, 16, 16);
    return a;
}

} // namespace

extern "C" kvc_status kvc_append_cuda(const kvc_append_args *args, kvc_stream stream) {
    KVC_TRY(kvc_append_check(args));
    KVC_CHECK(args->arena.device == KVC_CUDA, KVC_EDEVICE, "append: arena: expected a CUDA tensor, got one on the CPU");
    const int64_t b = args->keys.shape[0], h = args->keys.shape[1];
    KVC_CHECK(b * h <= INT32_MAX && h <= UINT16_MAX, KVC_ESHAPE,
              "append: keys: expected fewer than 2^31 lists and 2^16 heads, got %s", kvc_shape_text(&args->keys));
    const struct {
        const char *name;
        int64_t width;
    } wide[] = {{"table", args->table.shape[1]},
                {"pool_tail", args->pool_tail.shape[1]},
                {"pool_packed", args->pool_packed.shape[1]}};
    for (const auto &rows : wide)
        KVC_CHECK(rows.width <= INT32_MAX, KVC_ESHAPE, "append: %s: expected rows of fewer than 2^31, got %lld",
                  rows.name, (long long)rows.width);
    if (b * h * args->keys.shape[2] == 0) return KVC_OK;
    const append_job a = make_job(args);
    kvc_device_scope scope(args->arena.device_id);
    kvc_gpu gpu = {};
    cudaError_t error = scope.error == cudaSuccess ? kvc_gpu_of(args->arena.device_id, &gpu) : scope.error;
    const kvc_launch over(gpu, dim3((unsigned)b, (unsigned)h), dim3(THREADS, 2), 0, (cudaStream_t)stream);
    if (error == cudaSuccess) switch (a.rows.layout.head_dim) {
        case 64: error = launch<4>(over.config, a); break;
        case 80: error = launch<5>(over.config, a); break;
        case 96: error = launch<6>(over.config, a); break;
        case 128: error = launch<8>(over.config, a); break;
        default: error = launch<16>(over.config, a); break;
        }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("append", error);
}
