/* attend.cu: kvc_attend_cuda (attend.h): checks, the job, and which kernel takes it: attend_kernel.cuh few queries a
 * list, attend_rows.cuh more on devices with wgmma, attend_groups.cuh what neither serves (groups of channels, mass,
 * little shared memory). */
#include "attend_groups.cuh"
#include "attend_launch.cuh"

namespace {

constexpr int64_t ALIGN = 256;

int64_t aligned(int64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

/* Columns of a block, and all of them rounded up to whole blocks'. */
int columns_of_block(int64_t columns, int head_dim) {
    return columns <= 4 ? 4 : columns <= 8 || head_dim > 128 ? 8 : 16;
}

/* The same of attend_rows. */
int columns_of_rows(int64_t columns, int head_dim) {
    return columns <= 16 ? 16 : columns <= 32 || head_dim > ROWS_WIDE_DIM ? 32 : 64;
}

/* Whichever kernel takes them. */
int64_t whole_columns(int64_t columns, int head_dim) {
    const int64_t of_block = columns_of_block(columns, head_dim), of_rows = columns_of_rows(columns, head_dim);
    const int64_t whole = (columns + of_block - 1) / of_block * of_block;
    const int64_t rows = (columns + of_rows - 1) / of_rows * of_rows;
    return rows > whole ? rows : whole;
}

int blocks_of(int multiprocessors) {
    return multiprocessors < KVC_DIVIDE_MOST_BLOCKS ? multiprocessors : KVC_DIVIDE_MOST_BLOCKS;
}

int64_t division_bytes(int64_t n, int multiprocessors) {
    return aligned(4 * kvc_divide_words_of(n, blocks_of(multiprocessors)));
}

int64_t parts_bytes(int64_t columns, int head_dim, int multiprocessors) {
    const int64_t rows = multiprocessors * whole_columns(columns, head_dim);
    return aligned(rows * head_dim * 4) + aligned(rows * 8);
}

kvc_status check_devices(const kvc_attend_args *args) {
    const struct {
        const char *name;
        const kvc_tensor *tensor;
    } all[] = {{"queries", &args->queries},  {"out", &args->out},
               {"arena", &args->arena},      {"table", &args->table},
               {"lists", &args->lists},      {"workspace", &args->workspace},
               {"mass", &args->mass},        {"new_tokens", &args->new_tokens},
               {"division", &args->division}};
    for (const auto &one : all) {
        if (!kvc_given(one.tensor)) continue;
        KVC_CHECK(one.tensor->device == KVC_CUDA, KVC_EDEVICE, "attend: %s: expected a CUDA tensor, got one on the CPU",
                  one.name);
        KVC_CHECK(one.tensor->device_id == args->queries.device_id, KVC_EDEVICE,
                  "attend: %s: expected the device of queries, cuda:%d, got cuda:%d", one.name, args->queries.device_id,
                  one.tensor->device_id);
    }
    return KVC_OK;
}

void strides(int64_t (&bytes)[3], const kvc_tensor *t) {
    for (int i = 0; i < 3; i++) bytes[i] = t->strides[i] * kvc_dtype_size(t->dtype);
}

half_facts facts_of_half(const kvc_layout *layout, int bits, int tokens) {
    const int tiles = layout->head_dim / 16, each = tiles_of(bits, tokens);
    half_facts facts;
    facts.bytes = (int32_t)kvc_half_bytes(layout, bits, tokens);
    facts.pieces = (int16_t)((tiles + each - 1) / each);
    facts.step = (int16_t)(each * tile_bytes(bits, tokens));
    facts.last_codes = (tiles - (facts.pieces - 1) * each) * tile_bytes(bits, tokens);
    facts.reserved = 0;
    return facts;
}

cudaError_t launch(attend_job &a, int head_dim, const kvc_gpu &facts, cudaStream_t stream) {
    switch (head_dim) {
    case 64: return kvc_launch_attend_64(&a, facts.multiprocessors, facts.shared_most, stream);
    case 80: return kvc_launch_attend_80(&a, facts.multiprocessors, facts.shared_most, stream);
    case 96: return kvc_launch_attend_96(&a, facts.multiprocessors, facts.shared_most, stream);
    case 128: return kvc_launch_attend_128(&a, facts.multiprocessors, facts.shared_most, stream);
    default: return kvc_launch_attend_256(&a, facts.multiprocessors, facts.shared_most, stream);
    }
}

/* Several queries a list, on devices with wgmma. */
cudaError_t launch_rows(attend_job &a, int head_dim, const kvc_gpu &facts, cudaStream_t stream) {
    switch (head_dim) {
    case 64: return kvc_launch_attend_rows_64(&a, facts.multiprocessors, facts.shared_most, stream);
    case 80: return kvc_launch_attend_rows_80(&a, facts.multiprocessors, facts.shared_most, stream);
    case 96: return kvc_launch_attend_rows_96(&a, facts.multiprocessors, facts.shared_most, stream);
    case 128: return kvc_launch_attend_rows_128(&a, facts.multiprocessors, facts.shared_most, stream);
    default: return kvc_launch_attend_rows_256(&a, facts.multiprocessors, facts.shared_most, stream);
    }
}

bool takes_rows(int columns, const kvc_gpu &facts) {
    return columns >= ROWS_LEAST && kvc_has_wgmma(facts) && facts.shared_most >= KVC_ATTEND_ROWS_SHARED;
}

bool serves(int head_dim, int columns, int shared_most) {
    switch (head_dim) {
    case 64: return kvc_serves_attend_64(columns, shared_most);
    case 80: return kvc_serves_attend_80(columns, shared_most);
    case 96: return kvc_serves_attend_96(columns, shared_most);
    case 128: return kvc_serves_attend_128(columns, shared_most);
    default: return kvc_serves_attend_256(columns, shared_most);
    }
}

/* Queries that are none give nobody weight. */
kvc_status no_mass(const kvc_attend_args *args, cudaStream_t stream) {
    const kvc_tensor *mass = &args->mass;
    if (!kvc_given(mass) || mass->shape[1] == 0) return KVC_OK;
    kvc_device_scope scope(mass->device_id);
    cudaError_t error = scope.error;
    if (error == cudaSuccess)
        error = cudaMemset2DAsync(mass->data, (size_t)mass->strides[0] * 4, 0, (size_t)mass->shape[1] * 4,
                                  (size_t)mass->shape[0], stream);
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("attend", error);
}

/* Groups of channels with scales of their own, mass, and devices of little shared memory: kernels of their own, whose
 * workspace is made EMPTY again. */
kvc_status attend_groups(const kvc_attend_args *args, const kvc_gpu &facts, cudaStream_t stream) {
    const int64_t n = args->lists.shape[0], h = n / (args->queries.shape[0] ? args->queries.shape[0] : 1);
    const int64_t group = h ? args->queries.shape[1] / h : 1;
    const int64_t bytes =
        kvc_attend_groups_workspace(n, group, args->queries.shape[2], args->layout.head_dim,
                                    kvc_given(&args->mass) ? args->mass.shape[1] : 0, facts.multiprocessors);
    KVC_TRY(kvc_expect_workspace("attend", &args->workspace, bytes));
    cudaError_t error = kvc_attend_groups(args, args->workspace.data, facts.multiprocessors, stream);
    const cudaError_t cleared = cudaMemsetAsync(args->workspace.data, 0xff, (size_t)bytes, stream);
    if (error == cudaSuccess) error = cleared;
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("attend", error);
}

} // namespace

extern "C" int64_t kvc_attend_workspace_cuda(int64_t n, int64_t c, int64_t group, int64_t q, int32_t head_dim,
                                             int64_t mass_tokens) {
    (void)c;
    int devices = 0, most = 1;
    if (cudaGetDeviceCount(&devices) != cudaSuccess) cudaGetLastError();
    for (int i = 0; i < devices; i++) {
        kvc_gpu facts;
        if (kvc_gpu_of(i, &facts) == cudaSuccess && facts.multiprocessors > most) most = facts.multiprocessors;
    }
    const int64_t fast = parts_bytes(group * q, head_dim, most) + division_bytes(n, most);
    const int64_t groups = kvc_attend_groups_workspace(n, group, q, head_dim, mass_tokens, most);
    return fast > groups ? fast : groups;
}

extern "C" kvc_status kvc_attend_cuda(const kvc_attend_args *args, kvc_stream stream) {
    KVC_TRY(kvc_attend_check(args));
    KVC_TRY(check_devices(args));
    const int device = args->queries.device_id, d = args->layout.head_dim;
    const int64_t b = args->queries.shape[0], q = args->queries.shape[2], n = args->lists.shape[0];
    if (b == 0 || n == 0) return KVC_OK;
    if (q == 0 || args->queries.shape[1] == 0) return no_mass(args, (cudaStream_t)stream);
    const int64_t heads = n / b, group = args->queries.shape[1] / heads;
    kvc_device_scope scope(device);
    if (scope.error != cudaSuccess) return kvc_cuda_fail("attend", scope.error);
    kvc_gpu facts;
    cudaError_t error = kvc_gpu_of(device, &facts);
    if (error != cudaSuccess) return kvc_cuda_fail("attend", error);
    KVC_CHECK(facts.capability >= KVC_LEAST_CAPABILITY, KVC_ENOTSUP,
              "attend: device: expected compute capability %d.%d or newer, got %d.%d", KVC_LEAST_CAPABILITY / 10,
              KVC_LEAST_CAPABILITY % 10, facts.capability / 10, facts.capability % 10);
    KVC_CHECK(group * q <= 1 << 20 && n <= INT32_MAX && args->table.shape[1] <= INT32_MAX, KVC_ESHAPE,
              "attend: queries: expected at most 2^20 queries a KV head, got %lld", (long long)(group * q));
    if (args->layout.group != d || kvc_given(&args->mass) || !serves(d, (int)(group * q), facts.shared_most))
        return attend_groups(args, facts, (cudaStream_t)stream);
    const bool divided = kvc_given(&args->division);
    const int64_t parts = parts_bytes(group * q, d, facts.multiprocessors);
    const int64_t own_division = divided ? 0 : division_bytes(n, facts.multiprocessors);
    KVC_TRY(kvc_expect_workspace("attend", &args->workspace, parts + own_division));
    char *const workspace = (char *)args->workspace.data;
    if (divided) {
        const int64_t words = kvc_divide_words(n, device);
        KVC_TRY(kvc_expect_array("attend", "division", &args->division, KVC_INT32, 1, &words));
        KVC_CHECK(((uintptr_t)args->division.data & 15) == 0, KVC_EINVAL,
                  "attend: division: expected 16-byte alignment, got address %p", args->division.data);
    } else {
        kvc_divide_args divide = {};
        divide.divisions.data = workspace + parts;
        divide.divisions.dtype = KVC_INT32;
        divide.divisions.ndim = 2;
        divide.divisions.shape[0] = divide.divisions.strides[1] = 1;
        divide.divisions.shape[1] = divide.divisions.strides[0] = kvc_divide_words(n, device);
        divide.divisions.device = KVC_CUDA;
        divide.divisions.device_id = device;
        const kvc_tensor *from[] = {&args->table, &args->lists};
        kvc_tensor *to[] = {&divide.tables, &divide.lists};
        for (int i = 0; i < 2; i++) { /* one layer more in front */
            *to[i] = *from[i];
            to[i]->ndim = 3;
            to[i]->shape[0] = 1;
            to[i]->strides[0] = kvc_elements(from[i]);
            for (int axis = 0; axis < 2; axis++) {
                to[i]->shape[1 + axis] = from[i]->shape[axis];
                to[i]->strides[1 + axis] = from[i]->strides[axis];
            }
        }
        divide.layout = args->layout;
        KVC_TRY(kvc_divide_cuda(&divide, stream));
    }
    attend_job a = {};
    a.queries = (const char *)args->queries.data;
    a.out = (char *)args->out.data;
    strides(a.q_stride, &args->queries);
    strides(a.out_stride, &args->out);
    a.arena = (const char *)args->arena.data;
    a.arena_bytes = args->arena.shape[0];
    a.table = (const kvc_page *)args->table.data;
    a.lists = (const kvc_list *)args->lists.data;
    a.new_tokens = (const int32_t *)args->new_tokens.data;
    a.division = divided ? (const int32_t *)args->division.data : (const int32_t *)(workspace + parts);
    a.first_entries = (const kvc_page *)(a.division + kvc_divide_entries_at(n, blocks_of(facts.multiprocessors)));
    a.parts = (float *)workspace;
    a.part_sums = (float2 *)(workspace + aligned(facts.multiprocessors * whole_columns(group * q, d) * d * 4));
    a.capacity = (int32_t)args->table.shape[1];
    a.n = (int32_t)n;
    a.heads = (int32_t)heads;
    a.group = (int32_t)group;
    a.q = (int32_t)q;
    a.columns = (int32_t)(group * q);
    for (int bits = 2; bits <= 16; bits++)
        if (kvc_bits_ok(bits)) a.halves[bits] = facts_of_half(&args->layout, bits, KVC_PAGE_TOKENS);
    a.halves[17] = facts_of_half(&args->layout, 16, KVC_TAIL_TOKENS);
    a.q_dtype = args->queries.dtype;
    a.out_dtype = args->out.dtype;
    a.half = args->layout.half;
    a.zero_point = args->layout.zero_point;
    a.e5m3 = args->layout.scale_dtype == KVC_STEP_E5M3;
    a.by_heads = (uint32_t)(((1ull << 32) + (uint64_t)a.heads - 1) / (uint64_t)a.heads); /* exact below 2^32 / heads */
    a.plain = !a.e5m3 && args->layout.zero_point && !(args->softcap > 0);
    a.rotation = args->rotation;
    a.early = args->early && divided && q == 1;
    a.scale = args->scale;
    a.softcap = args->softcap;
    error = takes_rows(a.columns, facts) ? launch_rows(a, d, facts, (cudaStream_t)stream)
                                         : launch(a, d, facts, (cudaStream_t)stream);
    if (!divided) { /* EMPTY again: another call's partial results may lie there */
        const cudaError_t cleared =
            cudaMemsetAsync(workspace + parts, 0xff, (size_t)own_division, (cudaStream_t)stream);
        if (error == cudaSuccess) error = cleared;
    }
    return error == cudaSuccess ? KVC_OK : kvc_cuda_fail("attend", error);
}
