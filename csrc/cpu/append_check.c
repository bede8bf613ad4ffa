/* append_check.c: what append and append_walk refuse; shapes, types and ranges the same for CPU and CUDA. */
#include "cpu/append_check.h"

#include "core/core.h"

#define P KVC_PAGE_TOKENS

kvc_append_walk_args kvc_append_walk_of(const kvc_append_args *args) {
    return (kvc_append_walk_args){.table = args->table,
                                  .lists = args->lists,
                                  .pool_tail = args->pool_tail,
                                  .pool_packed = args->pool_packed,
                                  .left = args->left,
                                  .valid = args->valid,
                                  .classes = args->classes,
                                  .window = args->window,
                                  .q = (int32_t)args->keys.shape[2]};
}

/* Lists n of b sequences. */
static kvc_status check_arrays(const char *op, const kvc_append_walk_args *args, int64_t n, int64_t b) {
    KVC_TRY(kvc_expect_array(op, "table", &args->table, KVC_UINT64, 2, (int64_t[]){n, -1}));
    KVC_TRY(kvc_expect_array(op, "lists", &args->lists, KVC_INT32, 2, (int64_t[]){n, 4}));
    KVC_TRY(kvc_expect_array(op, "pool_tail", &args->pool_tail, KVC_UINT32, 2, (int64_t[]){n, -1}));
    KVC_TRY(kvc_expect_array(op, "pool_packed", &args->pool_packed, KVC_UINT32, 2, (int64_t[]){n, -1}));
    KVC_TRY(kvc_expect_array(op, "left", &args->left, KVC_INT32, 2, (int64_t[]){n, 2}));
    if (kvc_given(&args->valid)) KVC_TRY(kvc_expect_array(op, "valid", &args->valid, KVC_INT32, 1, (int64_t[]){b}));
    KVC_TRY(kvc_expect_array(op, "classes", &args->classes, KVC_UINT8, 2, (int64_t[]){n, 2}));
    KVC_CHECK(args->window >= 0 && args->window <= 1 << 24, KVC_EINVAL, "%s: window: expected 0..2^24, got %d", op,
              args->window);
    return KVC_OK;
}

/* Pages of `bytes` bytes inside the arena. */
static kvc_status check_units(const char *name, const uint32_t *units, int count, int64_t bytes, int64_t arena_bytes) {
    for (int i = 0; i < count; i++)
        KVC_CHECK((int64_t)units[i] * KVC_UNIT + bytes <= arena_bytes, KVC_EINVAL,
                  "append: %s: expected pages inside the arena's %lld bytes, got unit %u", name, (long long)arena_bytes,
                  units[i]);
    return KVC_OK;
}

/* List i, that it has room for `valid` more tokens, and, with `rows`, that its pages lie in the arena. */
static kvc_status check_list(const char *op, const kvc_append_walk_args *args, const kvc_append_args *rows, int64_t i,
                             int valid) {
    const int64_t capacity = args->table.shape[1];
    const int64_t p = args->pool_tail.shape[1], r = args->pool_packed.shape[1];
    const uint8_t *bits = (const uint8_t *)args->classes.data + 2 * i;
    const int32_t *left = (const int32_t *)args->left.data + 2 * i;
    const kvc_list *list = (const kvc_list *)args->lists.data + i;
    const kvc_page *row = (const kvc_page *)args->table.data + i * capacity;
    KVC_CHECK(kvc_bits_ok(bits[0]) && kvc_bits_ok(bits[1]), KVC_EINVAL,
              "%s: classes: expected bits of 2, 3, 4, 8 or 16, got K %d, V %d in list %lld", op, bits[0], bits[1],
              (long long)i);
    for (int stack = 0; stack < 2; stack++) {
        const int64_t room = stack ? r : p;
        KVC_CHECK(left[stack] >= 0 && left[stack] <= room, KVC_EINVAL,
                  "%s: left: expected 0..%lld pages in %s, got %d in list %lld", op, (long long)room,
                  stack ? "pool_packed" : "pool_tail", left[stack], (long long)i);
    }
    KVC_CHECK(list->tokens <= INT32_MAX - valid, KVC_EINVAL,
              "%s: lists: expected fewer than 2^31 tokens, got %d and %d more", op, list->tokens, valid);
    KVC_CHECK(kvc_append_state_ok(list, capacity, valid), KVC_EINVAL,
              "%s: lists: expected a consistent state, got pages %d, tail_page %d, tail_tokens %d in list %lld", op,
              list->pages, list->tail_page, list->tail_tokens, (long long)i);
    const int tail_pages = list->pages - list->tail_page;
    KVC_CHECK((int64_t)left[0] + tail_pages <= p, KVC_ESHAPE,
              "%s: pool_tail: expected room for %lld pages, its own and the tail's, got %lld in list %lld", op,
              (long long)left[0] + tail_pages, (long long)p, (long long)i);
    int peak, flushes;
    kvc_append_need(list->tail_tokens, valid, args->window, bits[0] != 16 || bits[1] != 16, &peak, &flushes);
    KVC_CHECK(peak <= left[0] && flushes <= left[1], KVC_EINVAL,
              "%s: left: expected %d tail and %d packed pages for list %lld, got %d and %d", op, peak, flushes,
              (long long)i, left[0], left[1]);
    /* The table's row never holds more than the old pages, the flushed ones and the tail's peak. */
    KVC_CHECK((int64_t)list->pages + peak + flushes <= capacity, KVC_EINVAL,
              "%s: table: expected room for %d more pages in list %lld, got capacity %lld with %d in use", op,
              peak + flushes, (long long)i, (long long)capacity, list->pages);
    const int64_t arena_bytes = rows ? rows->arena.shape[0] : INT64_MAX;
    const int64_t tail_bytes = rows ? kvc_page_bytes(&rows->layout, 16, 16) : 0;
    for (int at = list->tail_page; at < list->pages; at++) {
        const int expected = at + 1 < list->pages ? KVC_TAIL_TOKENS : (list->tail_tokens - 1) % KVC_TAIL_TOKENS + 1;
        KVC_CHECK(row[at].k_bits == 16 && row[at].v_bits == 16 && row[at].tokens == expected &&
                      (int64_t)row[at].unit * KVC_UNIT + tail_bytes <= arena_bytes,
                  KVC_EINVAL,
                  "%s: table: expected a tail page of %d tokens in the arena, got K %d, V %d, %d tokens at unit %u in "
                  "list %lld",
                  op, expected, row[at].k_bits, row[at].v_bits, row[at].tokens, row[at].unit, (long long)i);
    }
    if (!rows) return KVC_OK;
    KVC_TRY(check_units("pool_tail", (const uint32_t *)args->pool_tail.data + i * p, left[0], tail_bytes, arena_bytes));
    return check_units("pool_packed", (const uint32_t *)args->pool_packed.data + i * r, left[1],
                       kvc_page_bytes(&rows->layout, bits[0], bits[1]), arena_bytes);
}

/* What lies in CPU tensors; h: lists of a sequence. */
static kvc_status check_lists(const char *op, const kvc_append_walk_args *args, const kvc_append_args *rows,
                              int64_t h) {
    const int32_t *given = kvc_given(&args->valid) ? args->valid.data : NULL;
    for (int64_t i = 0; i < args->lists.shape[0]; i++) {
        const int valid = given ? given[i / h] : args->q;
        KVC_CHECK(valid >= 0 && valid <= args->q, KVC_EINVAL, "%s: valid: expected 0..%d, got %d", op, args->q, valid);
        KVC_TRY(check_list(op, args, rows, i, valid));
    }
    return KVC_OK;
}

static kvc_status check_finite(const kvc_append_args *args) {
    const int64_t h = args->keys.shape[1], q = args->keys.shape[2];
    const int32_t *valid = kvc_given(&args->valid) ? args->valid.data : NULL;
    for (int64_t i = 0; i < args->lists.shape[0]; i++)
        for (int64_t j = valid ? q - valid[i / h] : 0; j < q; j++)
            for (int half = 0; half < 2; half++) {
                const kvc_tensor *rows = half ? &args->values : &args->keys;
                KVC_CHECK(kvc_row_finite(kvc_at(rows, i / h, i % h, j), rows->dtype, args->layout.head_dim), KVC_EINVAL,
                          "append: %s: expected finite values, got NaN or Inf in row %lld of list %lld",
                          half ? "values" : "keys", (long long)j, (long long)i);
            }
    return KVC_OK;
}

static kvc_status check_devices(const kvc_append_args *args) {
    const kvc_tensor *arena = &args->arena;
    const struct {
        const char *name;
        const kvc_tensor *tensor;
    } others[] = {{"table", &args->table},         {"lists", &args->lists},
                  {"pool_tail", &args->pool_tail}, {"pool_packed", &args->pool_packed},
                  {"left", &args->left},           {"keys", &args->keys},
                  {"values", &args->values},       {"classes", &args->classes},
                  {"valid", &args->valid}};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        KVC_CHECK(!kvc_given(others[i].tensor) ||
                      (others[i].tensor->device == arena->device && others[i].tensor->device_id == arena->device_id),
                  KVC_EDEVICE, "append: %s: expected the device of arena, got another", others[i].name);
    return KVC_OK;
}

kvc_status kvc_append_check(const kvc_append_args *args) {
    KVC_TRY(check_devices(args));
    KVC_TRY(kvc_expect_layout("append", &args->layout));
    KVC_TRY(kvc_expect_shape("append", "keys", &args->keys, 4, (int64_t[]){-1, -1, -1, args->layout.head_dim}));
    KVC_TRY(kvc_expect_shape("append", "values", &args->values, 4, args->keys.shape));
    KVC_TRY(kvc_expect_float("append", "keys", &args->keys));
    KVC_TRY(kvc_expect_dtype("append", "values", &args->values, args->keys.dtype));
    KVC_TRY(kvc_expect_rows("append", "keys", &args->keys));
    KVC_TRY(kvc_expect_rows("append", "values", &args->values));
    const int64_t b = args->keys.shape[0], h = args->keys.shape[1], q = args->keys.shape[2];
    KVC_CHECK(q <= 1 << 24, KVC_ESHAPE, "append: keys: expected at most 2^24 new tokens, got %lld", (long long)q);
    KVC_TRY(kvc_expect_arena("append", &args->arena));
    const kvc_append_walk_args walk = kvc_append_walk_of(args);
    KVC_TRY(check_arrays("append", &walk, b * h, b));
    KVC_CHECK(args->rotation == KVC_ROTATE_NONE || args->rotation == KVC_ROTATE_HADAMARD, KVC_EINVAL,
              "append: rotation: expected 0 (none) or 1 (hadamard), got %d", args->rotation);
    KVC_CHECK(args->scale >= KVC_SCALE_SIGMA && args->scale <= KVC_SCALE_SEARCH, KVC_EINVAL,
              "append: scale: expected 0 (sigma), 1 (minmax) or 2 (search), got %d", args->scale);
    if (args->arena.device != KVC_CPU) return KVC_OK; /* looking into tensors would have to synchronize */
    KVC_TRY(check_lists("append", &walk, args, h));
    return check_finite(args);
}

kvc_status kvc_append_walk_check(const kvc_append_walk_args *args) {
    const int64_t n = args->lists.ndim == 2 ? args->lists.shape[0] : -1;
    const int64_t b = args->valid.ndim == 1 ? args->valid.shape[0] : -1;
    KVC_TRY(check_arrays("append_walk", args, n, b));
    KVC_CHECK(args->q >= 0 && args->q <= 1 << 24, KVC_EINVAL, "append_walk: q: expected 0..2^24, got %d", args->q);
    KVC_CHECK(b <= 0 ? !kvc_given(&args->valid) || n == 0 : n % b == 0, KVC_ESHAPE,
              "append_walk: valid: expected a divisor of the %lld lists, got %lld sequences", (long long)n,
              (long long)b);
    return check_lists("append_walk", args, NULL, b > 0 ? n / b : 1);
}
