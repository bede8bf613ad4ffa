/* divide.cu: kvc_divide_cuda (divide.h). One block a layer: what lists cost, where blocks begin, at which page.
 *
 * Two ways to divide, the better one is taken. Apart: every list has blocks of its own, as many as its cost asks
 * for and its pages keep busy, so that no block works on two lists. Through: equal shares of everything, lists one
 * behind the other. */
#include "common.cuh"
#include "kvcomp/divide.h"

namespace {

constexpr int THREADS = 1024, WARPS = THREADS / 32, MOST_BLOCKS = KVC_DIVIDE_MOST_BLOCKS;
constexpr unsigned ALL = 0xffffffffu;
constexpr int MOST_LISTS = 49152; /* of a layer: their costs lie in shared memory */

/* In units of 64 bytes: a page costs its bytes and this, for what its tokens take besides, a quarter of it where a page
 * holds a quarter of them (16 bits; lists of mixed pages: charges of 12 to 200 tried); a further list of a block this
 * much: its warps meet twice, sums are merged, a query is laid out, and the rings are full meanwhile. That is about 7
 * microseconds where 35 GB/s a multiprocessor are read (stamps of blocks with one list and with two, in a model's
 * decode steps at batch 8 and 32k tokens, 4 bits); from half of it to one and a half times hardly differ. */
constexpr uint32_t PAGE_COST = 60, LIST_COST = 4800;

constexpr int MIXED_PAGES = 128; /* of a block: with more its warps stay with a class for long (kvc_share.mixed) */

/* Pages of a block at least, apart: about one for each of its warps, which work on them at the same time. More blocks
 * would be no sooner done, leave more parts to add up, and no multiprocessor on which the next layer's may begin. */
constexpr int LEAST_PAGES = 8;

constexpr int SEGMENT = 128, MOST_SHARED = 160 << 10; /* pages; bytes */

struct call {
    int32_t *divisions;
    const kvc_page *tables;
    const kvc_list *lists;
    int64_t words;
    int32_t n, capacity, blocks;
    int32_t segments;        /* of a list: SEGMENT pages each, whose costs lie in shared memory; 0: no room */
    uint16_t half_units[17]; /* of K or V in a page of 64 tokens, by bits, in units of 64 bytes */
    uint16_t tail_units;
};

__device__ __forceinline__ uint32_t cost_of(const call &a, uint32_t kind) {
    const int k = kind & 0xff, v = kind >> 8 & 0xff;
    if (k == 16 && v == 16) return 2 * a.tail_units + PAGE_COST / 4;
    return a.half_units[min(k, 16)] + a.half_units[min(v, 16)] + PAGE_COST;
}

/* 2, 3, 4, 8, 16 bits -> 1, 0, 2, 3, 4. */
__device__ __forceinline__ uint32_t rank_of(uint32_t bits) { return bits == 3 ? 0 : min(31 - __clz(bits | 1), 4); }

/* A bit for every class; none for 16-bit pages, which tails are made of. */
__device__ __forceinline__ uint32_t class_of(uint32_t kind) {
    const uint32_t k = rank_of(kind & 0xff), v = rank_of(kind >> 8 & 0xff);
    return k == 4 && v == 4 ? 0 : 1u << (5 * k + v);
}

__device__ __forceinline__ uint32_t sum_of_warp(uint32_t x) {
    for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(ALL, x, o);
    return x;
}

/* Inclusive prefix sum over a warp. */
__device__ __forceinline__ uint32_t up_to_lane(uint32_t x) {
    const int lane = threadIdx.x & 31;
    for (int o = 1; o < 32; o <<= 1) {
        const uint32_t other = __shfl_up_sync(ALL, x, o);
        if (lane >= o) x += other;
    }
    return x;
}

/* Exclusive prefix sums of v[0 .. n-1] + extra, in place; returns the total. All threads of the block. */
__device__ uint32_t prefix(uint32_t *v, int n, uint32_t extra, uint32_t *scratch) {
    const int each = (n + THREADS - 1) / THREADS, first = min(n, (int)threadIdx.x * each), end = min(n, first + each);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    uint32_t mine = 0;
    for (int i = first; i < end; i++) mine += v[i] + extra;
    const uint32_t before = up_to_lane(mine);
    if (lane == 31) scratch[warp] = before;
    __syncthreads();
    if (warp == 0) {
        scratch[lane] = up_to_lane(lane < WARPS ? scratch[lane] : 0);
    }
    __syncthreads();
    uint32_t at = before - mine + (warp ? scratch[warp - 1] : 0);
    const uint32_t total = scratch[WARPS - 1];
    for (int i = first; i < end; i++) {
        const uint32_t cost = v[i] + extra;
        v[i] = at;
        at += cost;
    }
    __syncthreads();
    return total;
}

/* Page of a list at which `before` of its cost lie in earlier pages, to the nearest; its number of pages at most.
 * segments: the costs of the list's segments. By one warp. */
__device__ int page_at(const call &a, const kvc_page *row, const uint32_t *segments, int pages, uint32_t before) {
    const int lane = threadIdx.x & 31;
    uint32_t passed = 0;
    int first = 0;
    for (int s = 0; s < a.segments && s * SEGMENT < pages; s += 32) { /* the segment in which it lies */
        const uint32_t mine = s + lane < a.segments ? segments[s + lane] : 0, up_to = up_to_lane(mine);
        const unsigned reached = __ballot_sync(ALL, passed + up_to >= before);
        const int k = reached ? __ffs(reached) - 1 : 31;
        first = (s + k) * SEGMENT;
        passed += __shfl_sync(ALL, reached ? up_to - mine : up_to, k);
        if (reached) break;
        first += SEGMENT;
    }
    for (; first < pages; first += SEGMENT) {
        uint32_t cost[4], mine = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = first + 4 * lane + j;
            cost[j] = i < pages ? cost_of(a, ((const uint2 *)row)[i].y) : 0;
            mine += cost[j];
        }
        const uint32_t up_to = up_to_lane(mine), total = __shfl_sync(ALL, up_to, 31);
        if (passed + total >= before) {
            uint32_t at = passed + up_to - mine;
            int count = 0; /* of this lane's pages that lie before */
#pragma unroll
            for (int j = 0; j < 4; j++) {
                count += first + 4 * lane + j < pages && at + cost[j] / 2 < before;
                at += cost[j];
            }
            return first + (int)sum_of_warp((uint32_t)count);
        }
        passed += total;
    }
    return pages;
}

/* Blocks of a list, apart, that cost at most `most` each. */
__device__ __forceinline__ int cut(uint32_t cost, float most) {
    return max(1, (int)ceilf(cost / fmaxf(most, 1.0f) - 1e-4f));
}

/* Of all lists. By one warp. */
__device__ uint32_t blocks_for(const uint32_t *costs, int n, float most) {
    uint32_t blocks = 0;
    for (int i = threadIdx.x & 31; i < n; i += 32) blocks += cut(costs[i], most);
    return sum_of_warp(blocks);
}

__global__ void __launch_bounds__(THREADS) divide_kernel(const __grid_constant__ call a) {
    extern __shared__ uint32_t costs[]; /* (n), then their prefix sums; (n, segments) */
    __shared__ uint32_t scratch[32];
    __shared__ uint32_t fewest[WARPS];
    __shared__ uint2 starts[MOST_BLOCKS + 1]; /* of blocks: list, page */
    __shared__ uint32_t largest;
    __shared__ int used;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n = a.n;
    int32_t *const out = a.divisions + blockIdx.x * a.words;
    kvc_share *const shares = (kvc_share *)(out + 4);
    kvc_run *const runs = (kvc_run *)(shares + n);
    const kvc_page *const table = a.tables + (int64_t)blockIdx.x * n * a.capacity;
    const kvc_list *const lists = a.lists + (int64_t)blockIdx.x * n;
    if (threadIdx.x == 0) largest = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) shares[i].mixed = 0; /* the classes' bits, until it is written */
    __syncthreads();
    uint32_t *const segments = costs + n;
    const int each = max(1, a.segments), length = a.segments ? SEGMENT : max(1, a.capacity); /* of a list; pages */
    for (int k = warp; k < n * each; k += WARPS) {
        const int i = k / each, from = (k - i * each) * length, pages = min(lists[i].pages, a.capacity);
        const uint2 *row = (const uint2 *)(table + (int64_t)i * a.capacity);
        const int end = min(pages, from + length);
        uint32_t cost = 0, classes = 0;
#pragma unroll 4
        for (int p = from + lane; p < end; p += 32) {
            const uint32_t kind = row[p].y;
            cost += cost_of(a, kind);
            classes |= class_of(kind);
        }
        cost = sum_of_warp(cost);
        classes = __reduce_or_sync(ALL, classes);
        if (lane == 0) (a.segments ? segments : costs)[k] = cost;
        if (lane == 0 && classes) atomicOr(&shares[i].mixed, (int)classes);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        uint32_t cost = a.segments ? 0 : costs[i];
        for (int k = 0; k < a.segments; k++) cost += segments[i * a.segments + k];
        costs[i] = cost;
        atomicMax(&largest, cost);
    }
    __syncthreads();
    /* Apart: the least cost of a block for which the blocks suffice: of those that cut the largest list evenly, and
     * of 32 steps to the next smaller one. */
    float apart = INFINITY;
    if (n <= a.blocks) {
        uint32_t cuts = 0; /* of the largest list: the most that are possible */
        for (uint32_t k = warp + 1; k <= (uint32_t)a.blocks; k += WARPS)
            if (blocks_for(costs, n, largest / (float)k) <= (uint32_t)a.blocks) cuts = k;
        if (lane == 0) scratch[warp] = cuts;
        __syncthreads();
        for (int k = 0; k < WARPS; k++) cuts = max(cuts, scratch[k]);
        const float high = largest / (float)cuts, low = largest / (float)(cuts + 1);
        const uint32_t wanted = blocks_for(costs, n, low + (high - low) * (warp + 1) / WARPS);
        if (lane == 0) fewest[warp] = wanted;
        __syncthreads();
        int step = WARPS - 1;
        while (step > 0 && fewest[step - 1] <= (uint32_t)a.blocks) step--;
        apart = step == WARPS - 1 ? high : low + (high - low) * (step + 1) / WARPS;
        __syncthreads();
    }
    /* What the ways cost at most, before costs become prefix sums. */
    uint32_t sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += costs[i] + LIST_COST;
    sum = sum_of_warp(sum);
    if (lane == 0) scratch[warp] = sum;
    __syncthreads();
    uint32_t total = 0;
    for (int k = 0; k < WARPS; k++) total += scratch[k];
    __syncthreads();
    const bool is_apart = apart <= (float)total / a.blocks + LIST_COST / 2;
    if (is_apart) {
        /* blocks of each list, then their prefix sums; starts of blocks */
        for (int i = threadIdx.x; i < n; i += THREADS) {
            const int pages = min(lists[i].pages, a.capacity);
            const int blocks = cut(costs[i], apart);
            /* the cost is wanted again: it lies in its share until then */
            shares[i].fixed_pages = (int32_t)costs[i];
            costs[i] = max(1, min(blocks, (pages + LEAST_PAGES - 1) / LEAST_PAGES));
        }
        __syncthreads();
        const int blocks = (int)prefix(costs, n, 0, scratch);
        for (int b = warp; b < blocks; b += WARPS) {
            int low = 0, high = n; /* the last list that begins at or before block b */
            while (high - low > 1) {
                const int middle = (low + high) / 2;
                if ((int)costs[middle] <= b)
                    low = middle;
                else
                    high = middle;
            }
            const int of = (low + 1 < n ? (int)costs[low + 1] : blocks) - (int)costs[low], k = b - (int)costs[low];
            const uint32_t cost = (uint32_t)shares[low].fixed_pages;
            const int page = k ? page_at(a, table + (int64_t)low * a.capacity, segments + low * a.segments,
                                         min(lists[low].pages, a.capacity), (uint32_t)((uint64_t)cost * k / of))
                               : 0;
            if (lane == 0) starts[b] = make_uint2(low, page);
        }
        if (threadIdx.x == 0) used = blocks;
    } else {
        prefix(costs, n, LIST_COST, scratch);
        for (int b = warp; b < a.blocks; b += WARPS) {
            const uint32_t at = (uint32_t)((uint64_t)total * b / a.blocks);
            int low = 0, high = n;
            while (high - low > 1) {
                const int middle = (low + high) / 2;
                if (costs[middle] <= at)
                    low = middle;
                else
                    high = middle;
            }
            const uint32_t end = low + 1 < n ? costs[low + 1] : total;
            uint32_t into = at - costs[low];
            into = into > LIST_COST ? into - LIST_COST : 0; /* the charge comes first */
            const uint32_t rest = end - at;
            int list = low, page = 0;
            if (rest < LIST_COST / 2 && into > 0) /* hardly anything left of it */
                list = low + 1;
            else if (into >= LIST_COST / 2)
                page = page_at(a, table + (int64_t)low * a.capacity, segments + low * a.segments,
                               min(lists[low].pages, a.capacity), into);
            if (page > 0 && page >= min(lists[list].pages, a.capacity)) list++, page = 0;
            if (lane == 0) starts[b] = make_uint2(list, page);
        }
        if (threadIdx.x == 0) used = a.blocks;
    }
    __syncthreads();
    /* Without repetitions, so that every run holds something: by one warp. Starts never fall. */
    if (warp == 0) {
        int kept = 0;
        const int blocks = used;
        for (int first = 0; first < blocks; first += 32) {
            const int b = first + lane;
            const uint2 mine = b < blocks ? starts[b] : make_uint2(n, 0);
            uint2 before = b > 0 && b < blocks ? starts[b - 1] : make_uint2(~0u, ~0u);
            if (first > 0 && lane == 0) before = make_uint2(scratch[0], scratch[1]); /* as it was */
            const bool there = b < blocks && (int)mine.x < n && (mine.x != before.x || mine.y != before.y);
            const unsigned mask = __ballot_sync(ALL, there);
            const uint2 last = make_uint2(__shfl_sync(ALL, mine.x, 31), __shfl_sync(ALL, mine.y, 31));
            __syncwarp();
            if (lane == 0) scratch[0] = last.x, scratch[1] = last.y;
            if (there) starts[kept + __popc(mask & ((1u << lane) - 1))] = mine;
            kept += __popc(mask);
            __syncwarp();
        }
        if (lane == 0) {
            used = kept;
            starts[kept] = make_uint2(n, 0);
        }
    }
    __syncthreads();
    const int blocks = used;
    for (int b = threadIdx.x; b < blocks; b += THREADS)
        runs[b] = kvc_run{(int)starts[b].x, (int)starts[b].y, (int)starts[b + 1].x, (int)starts[b + 1].y};
    kvc_page *const entries = (kvc_page *)(runs + a.blocks); /* kvc_divide_entries_at */
    for (int i = threadIdx.x; i < blocks * KVC_DIVIDE_ENTRIES; i += THREADS) {
        const uint2 start = starts[i / KVC_DIVIDE_ENTRIES], next = starts[i / KVC_DIVIDE_ENTRIES + 1];
        const int list = (int)start.x, page = (int)start.y + i % KVC_DIVIDE_ENTRIES;
        int end = min(lists[list].tail_page, a.capacity);
        if (next.x == start.x) end = min(end, (int)next.y);
        entries[i] = page < end ? table[(int64_t)list * a.capacity + page] : kvc_page{};
    }
    for (int i = threadIdx.x; i < n; i += THREADS) {
        int low = 0, high = blocks; /* the last block that begins at or before page 0 of list i */
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if ((int)starts[middle].x < i || ((int)starts[middle].x == i && starts[middle].y == 0))
                low = middle;
            else
                high = middle;
        }
        int end = low, top = blocks; /* the last block that begins before list i + 1 */
        while (top - end > 1) {
            const int middle = (end + top) / 2;
            if ((int)starts[middle].x <= i)
                end = middle;
            else
                top = middle;
        }
        const int of_list = end - low + 1, fixed = lists[i].tail_page, classes = __popc(shares[i].mixed);
        shares[i] = kvc_share{low, of_list, fixed, classes > of_list && fixed < MIXED_PAGES * of_list};
    }
    if (threadIdx.x == 0) *(int4 *)out = make_int4(blocks, n, 0, 0);
}

int multiprocessors(int device) {
    kvc_gpu facts = {};
    if (kvc_gpu_of(device, &facts) != cudaSuccess) cudaGetLastError();
    return facts.multiprocessors < MOST_BLOCKS ? facts.multiprocessors : MOST_BLOCKS;
}

kvc_status check(const kvc_divide_args *args) {
    KVC_TRY(kvc_expect_layout("divide", &args->layout));
    const kvc_tensor *all[] = {&args->divisions, &args->tables, &args->lists};
    const char *names[] = {"divisions", "tables", "lists"};
    for (int i = 0; i < 3; i++) {
        KVC_CHECK(all[i]->device == KVC_CUDA, KVC_EDEVICE, "divide: %s: expected a CUDA tensor, got one on the CPU",
                  names[i]);
        KVC_CHECK(all[i]->device_id == args->divisions.device_id, KVC_EDEVICE,
                  "divide: %s: expected the device of divisions, cuda:%d, got cuda:%d", names[i],
                  args->divisions.device_id, all[i]->device_id);
    }
    const int64_t any[] = {-1, -1, -1};
    KVC_TRY(kvc_expect_array("divide", "tables", &args->tables, KVC_UINT64, 3, any));
    const int64_t l = args->tables.shape[0], n = args->tables.shape[1];
    const int64_t lists[] = {l, n, 4}, words[] = {l, kvc_divide_words(n, args->divisions.device_id)};
    KVC_TRY(kvc_expect_array("divide", "lists", &args->lists, KVC_INT32, 3, lists));
    KVC_TRY(kvc_expect_array("divide", "divisions", &args->divisions, KVC_INT32, 2, words));
    KVC_CHECK(n <= MOST_LISTS, KVC_ENOTSUP, "divide: lists: expected at most %d lists a layer, got %lld", MOST_LISTS,
              (long long)n);
    KVC_CHECK(args->tables.shape[2] <= INT32_MAX && l <= INT32_MAX, KVC_ESHAPE,
              "divide: tables: expected fewer than 2^31 layers and entries, got %s", kvc_shape_text(&args->tables));
    KVC_CHECK(((uintptr_t)args->divisions.data & 15) == 0, KVC_EINVAL,
              "divide: divisions: expected 16-byte alignment, got address %p", args->divisions.data);
    return KVC_OK;
}

} // namespace

extern "C" int64_t kvc_divide_words(int64_t n, int device) {
    const int blocks = multiprocessors(device);
    return blocks ? kvc_divide_words_of(n, blocks) : 0;
}

extern "C" kvc_status kvc_divide_cuda(const kvc_divide_args *args, kvc_stream stream) {
    KVC_TRY(check(args));
    const int64_t l = args->tables.shape[0], n = args->tables.shape[1];
    if (l == 0 || n == 0) return KVC_OK;
    call a = {};
    a.divisions = (int32_t *)args->divisions.data;
    a.tables = (const kvc_page *)args->tables.data;
    a.lists = (const kvc_list *)args->lists.data;
    a.words = args->divisions.shape[1];
    a.n = (int32_t)n;
    a.capacity = (int32_t)args->tables.shape[2];
    a.blocks = multiprocessors(args->divisions.device_id);
    for (int bits = 2; bits <= 16; bits++)
        if (kvc_bits_ok(bits))
            a.half_units[bits] = (uint16_t)(kvc_half_bytes(&args->layout, bits, KVC_PAGE_TOKENS) / 64);
    a.tail_units = (uint16_t)(kvc_half_bytes(&args->layout, 16, KVC_TAIL_TOKENS) / 64);
    kvc_device_scope scope(args->divisions.device_id);
    cudaError_t error = scope.error;
    const int64_t segments = (args->tables.shape[2] + SEGMENT - 1) / SEGMENT;
    a.segments = segments <= MOST_SHARED / 4 / n - 1 ? (int32_t)segments : 0;
    const int bytes = (int)n * 4 * (1 + a.segments);
    if (error == cudaSuccess && bytes > 16 << 10)
        error = cudaFuncSetAttribute(divide_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
        divide_kernel<<<(int)l, THREADS, bytes, (cudaStream_t)stream>>>(a);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("divide", error);
}
