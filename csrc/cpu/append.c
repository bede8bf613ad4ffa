/* append.c: rows into 16-bit tails, and aged tokens into packed pages, on the CPU. */
#include "kvcomp/append.h"

#include <string.h>

#include "cpu/pack_page.h"

#define T KVC_TILE
#define P KVC_PAGE_TOKENS
#define TAIL_PAGES (P / KVC_TAIL_TOKENS)

_Static_assert(KVC_TAIL_TOKENS == T, "a tail page is one tile");

typedef struct {
    int k_bits, v_bits;
    bool packs; /* any class but (16, 16) */
} class;

static class class_at(const kvc_append_args *args, int64_t index) {
    const uint8_t *bits = (const uint8_t *)args->classes.data + 2 * index;
    return (class){bits[0], bits[1], bits[0] != 16 || bits[1] != 16};
}

/* The stack of list i's class: its row of pool_packed, and after pool_tail its place in left. */
static int stack_of(const kvc_append_args *args, int64_t i) { return ((const uint8_t *)args->aged.data)[i]; }

void kvc_append_need(int tail_tokens, int q, int window, int packs_aged, int *tail_pages, int *packed_pages) {
    *tail_pages = *packed_pages = 0;
    int room = -tail_tokens & (KVC_TAIL_TOKENS - 1), taken = 0;
    for (int left = q; left > 0;) {
        while (packs_aged && tail_tokens >= window + P) {
            tail_tokens -= P;
            taken -= TAIL_PAGES;
            ++*packed_pages;
        }
        if (room == 0) {
            room = KVC_TAIL_TOKENS;
            if (++taken > *tail_pages) *tail_pages = taken;
        }
        const int until_flush = packs_aged ? window + P - tail_tokens : left; /* > 0 after the loop above */
        int step = left < room ? left : room;
        if (step > until_flush) step = until_flush;
        left -= step;
        room -= step;
        tail_tokens += step;
    }
}

/* New tokens of a sequence. */
static int valid_of(const kvc_append_args *args, int64_t sequence) {
    return kvc_given(&args->valid) ? ((const int32_t *)args->valid.data)[sequence] : (int)args->keys.shape[2];
}

static kvc_status check(const kvc_append_args *args) {
    const int d = args->layout.head_dim;
    KVC_TRY(kvc_expect_layout("append", &args->layout));
    KVC_TRY(kvc_expect_shape("append", "keys", &args->keys, 4, (int64_t[]){-1, -1, -1, d}));
    KVC_TRY(kvc_expect_shape("append", "values", &args->values, 4, args->keys.shape));
    KVC_TRY(kvc_expect_float("append", "keys", &args->keys));
    KVC_TRY(kvc_expect_dtype("append", "values", &args->values, args->keys.dtype));
    KVC_TRY(kvc_expect_rows("append", "keys", &args->keys));
    KVC_TRY(kvc_expect_rows("append", "values", &args->values));
    const int64_t b = args->keys.shape[0], h = args->keys.shape[1], q = args->keys.shape[2], n = b * h;
    KVC_TRY(kvc_expect_arena("append", &args->arena));
    KVC_TRY(kvc_expect_array("append", "table", &args->table, KVC_UINT64, 2, (int64_t[]){n, -1}));
    KVC_TRY(kvc_expect_array("append", "lists", &args->lists, KVC_INT32, 2, (int64_t[]){n, 4}));
    KVC_TRY(kvc_expect_array("append", "pool_tail", &args->pool_tail, KVC_UINT32, 1, (int64_t[]){-1}));
    KVC_TRY(kvc_expect_array("append", "classes", &args->classes, KVC_UINT8, 2, (int64_t[]){-1, 2}));
    const int64_t k = args->classes.shape[0];
    KVC_CHECK(k >= 1 && k <= KVC_APPEND_CLASSES, KVC_ESHAPE, "append: classes: expected 1..%d classes, got %lld",
              KVC_APPEND_CLASSES, (long long)k);
    KVC_TRY(kvc_expect_array("append", "aged", &args->aged, KVC_UINT8, 1, (int64_t[]){n}));
    KVC_TRY(kvc_expect_array("append", "pool_packed", &args->pool_packed, KVC_UINT32, 2, (int64_t[]){k, -1}));
    KVC_TRY(kvc_expect_array("append", "left", &args->left, KVC_INT32, 1, (int64_t[]){1 + k}));
    if (kvc_given(&args->valid))
        KVC_TRY(kvc_expect_array("append", "valid", &args->valid, KVC_INT32, 1, (int64_t[]){b}));
    for (int64_t c = 0; c < k; c++)
        KVC_CHECK(kvc_bits_ok(class_at(args, c).k_bits) && kvc_bits_ok(class_at(args, c).v_bits), KVC_EINVAL,
                  "append: classes: expected bits of 2, 3, 4, 8 or 16, got K %d, V %d in class %lld",
                  class_at(args, c).k_bits, class_at(args, c).v_bits, (long long)c);
    KVC_CHECK(args->window >= 0 && args->window <= 1 << 24, KVC_EINVAL, "append: window: expected 0..2^24, got %d",
              args->window);
    KVC_CHECK(q <= 1 << 24, KVC_ESHAPE, "append: keys: expected at most 2^24 new tokens, got %lld", (long long)q);
    KVC_CHECK(args->rotation == KVC_ROTATE_NONE || args->rotation == KVC_ROTATE_HADAMARD, KVC_EINVAL,
              "append: rotation: expected 0 (none) or 1 (hadamard), got %d", args->rotation);
    KVC_CHECK(args->scale >= KVC_SCALE_SIGMA && args->scale <= KVC_SCALE_SEARCH, KVC_EINVAL,
              "append: scale: expected 0 (sigma), 1 (minmax) or 2 (search), got %d", args->scale);
    const int64_t tail_bytes = kvc_page_bytes(&args->layout, 16, 16);
    const int32_t *left = args->left.data;
    for (int64_t p = 0; p <= k; p++) {
        const int64_t room = p ? args->pool_packed.shape[1] : args->pool_tail.shape[0];
        KVC_CHECK(left[p] >= 0 && left[p] <= room, KVC_EINVAL,
                  "append: left: expected 0..%lld pages in stack %lld, got %d", (long long)room, (long long)p, left[p]);
        const class c = class_at(args, p ? p - 1 : 0);
        const int64_t bytes = p ? kvc_page_bytes(&args->layout, c.k_bits, c.v_bits) : tail_bytes;
        const uint32_t *units = p ? (const uint32_t *)args->pool_packed.data + (p - 1) * room : args->pool_tail.data;
        for (int32_t i = 0; i < left[p]; i++)
            KVC_CHECK((int64_t)units[i] * KVC_UNIT + bytes <= args->arena.shape[0], KVC_EINVAL,
                      "append: %s: expected pages inside the arena's %lld bytes, got unit %u",
                      p ? "pool_packed" : "pool_tail", (long long)args->arena.shape[0], units[i]);
    }
    /* Lists run one after the other, so what the first gives back serves the next: walk as the operation will. */
    int64_t tail = left[0], tail_total = left[0], packed[KVC_APPEND_CLASSES];
    for (int64_t c = 0; c < k; c++) packed[c] = left[1 + c];
    for (int64_t i = 0; i < n; i++) {
        const kvc_list *list = (const kvc_list *)args->lists.data + i;
        const int valid = valid_of(args, i / h);
        KVC_CHECK(valid >= 0 && valid <= q, KVC_EINVAL, "append: valid: expected 0..%lld, got %d", (long long)q, valid);
        const int64_t tail_pages = ((int64_t)list->tail_tokens + KVC_TAIL_TOKENS - 1) / KVC_TAIL_TOKENS;
        KVC_CHECK(list->pages >= 0 && list->tail_page >= 0 && list->tail_tokens >= 0 &&
                      list->pages <= args->table.shape[1] && list->tail_page + tail_pages == list->pages &&
                      list->tokens >= list->tail_tokens,
                  KVC_EINVAL,
                  "append: lists: expected a consistent state, got pages %d, tail_page %d, tail_tokens %d in list %lld",
                  list->pages, list->tail_page, list->tail_tokens, (long long)i);
        KVC_CHECK(list->tokens <= INT32_MAX - valid, KVC_EINVAL,
                  "append: keys: expected fewer than 2^31 tokens, got %d and %d more", list->tokens, valid);
        const int stack = stack_of(args, i);
        KVC_CHECK(stack < k, KVC_EINVAL, "append: aged: expected 0..%lld, got %d for list %lld", (long long)k - 1,
                  stack, (long long)i);
        int peak, flushes;
        kvc_append_need(list->tail_tokens, valid, args->window, class_at(args, stack).packs, &peak, &flushes);
        KVC_CHECK(peak <= tail && flushes <= packed[stack], KVC_EINVAL,
                  "append: pool: expected %d tail and %d packed pages for list %lld, got %lld and %lld", peak, flushes,
                  (long long)i, (long long)tail, (long long)packed[stack]);
        const int end = (list->tail_tokens + valid - flushes * P + KVC_TAIL_TOKENS - 1) / KVC_TAIL_TOKENS;
        tail += tail_pages - end;
        tail_total += tail_pages;
        packed[stack] -= flushes;
        /* The table's row never holds more than the old pages, the flushed ones and the tail's peak. */
        KVC_CHECK((int64_t)list->pages + peak + flushes <= args->table.shape[1], KVC_EINVAL,
                  "append: table: expected room for %d more pages in list %lld, got capacity %lld with %d in use",
                  peak + flushes, (long long)i, (long long)args->table.shape[1], list->pages);
        const kvc_page *row = (const kvc_page *)args->table.data + i * args->table.shape[1];
        for (int p = list->tail_page; p < list->pages; p++) {
            const int expected = p + 1 < list->pages ? KVC_TAIL_TOKENS : (list->tail_tokens - 1) % KVC_TAIL_TOKENS + 1;
            KVC_CHECK(row[p].k_bits == 16 && row[p].v_bits == 16 && row[p].tokens == expected &&
                          (int64_t)row[p].unit * KVC_UNIT + tail_bytes <= args->arena.shape[0],
                      KVC_EINVAL,
                      "append: table: expected a tail page of %d tokens in the arena, got K %d, V %d, %d tokens at "
                      "unit %u in list %lld",
                      expected, row[p].k_bits, row[p].v_bits, row[p].tokens, row[p].unit, (long long)i);
        }
    }
    KVC_CHECK(tail_total <= args->pool_tail.shape[0], KVC_ESHAPE,
              "append: pool_tail: expected room for all %lld tail pages, its own and the lists', got %lld",
              (long long)tail_total, (long long)args->pool_tail.shape[0]);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = q - valid_of(args, i / h); j < q; j++)
            for (int half = 0; half < 2; half++) {
                const kvc_tensor *rows = half ? &args->values : &args->keys;
                KVC_CHECK(kvc_row_finite(kvc_at(rows, i / h, i % h, j), rows->dtype, d), KVC_EINVAL,
                          "append: %s: expected finite values, got NaN or Inf in row %lld of list %lld",
                          half ? "values" : "keys", (long long)j, (long long)i);
            }
    return KVC_OK;
}

static uint8_t *page_at(const kvc_append_args *args, uint32_t unit) {
    return (uint8_t *)args->arena.data + (int64_t)unit * KVC_UNIT;
}

/* The tail's first 64 tokens become one page of the class of stack `stack`; their four pages return to the pool. */
static void flush(const kvc_append_args *args, kvc_list *list, kvc_page *row, int stack, const kvc_rounding *rounding) {
    int32_t *left = args->left.data;
    uint32_t *pool_tail = args->pool_tail.data;
    const uint32_t *pages = (const uint32_t *)args->pool_packed.data + stack * args->pool_packed.shape[1];
    const class c = class_at(args, stack);
    const kvc_page packed = {pages[--left[1 + stack]], (uint8_t)c.k_bits, (uint8_t)c.v_bits, P, 0};
    const uint32_t before = (uint32_t)(list->tokens - list->tail_tokens);
    uint8_t *bytes = page_at(args, packed.unit);
    memset(bytes, 0, (size_t)kvc_page_bytes(&args->layout, c.k_bits, c.v_bits));
    for (int tile = 0; tile < TAIL_PAGES; tile++) {
        uint32_t numbers[T];
        for (int j = 0; j < T; j++) numbers[j] = before + (uint32_t)(tile * T + j);
        for (int half = 0; half < 2; half++) {
            kvc_tile x;
            kvc_tile_read(x, page_at(args, row[list->tail_page + tile].unit), 16, 16, half, 0, &args->layout);
            kvc_tile_clamp(x, args->layout.head_dim);
            kvc_tile_write(bytes, c.k_bits, c.v_bits, half, tile, T, x, numbers, rounding);
        }
        pool_tail[left[0]++] = row[list->tail_page + tile].unit;
    }
    row[list->tail_page] = packed;
    memmove(row + list->tail_page + 1, row + list->tail_page + TAIL_PAGES,
            (size_t)(list->pages - list->tail_page - TAIL_PAGES) * sizeof *row);
    list->pages -= TAIL_PAGES - 1;
    list->tail_page++;
    list->tail_tokens -= P;
}

/* One rotated row into place j of a tail page. */
static void write_row(uint8_t *page, const kvc_layout *layout, int half, int j, const float *row) {
    uint32_t *words = (uint32_t *)(page + (half ? kvc_half_bytes(layout, 16, KVC_TAIL_TOKENS) : 0));
    for (int c = 0; c < layout->head_dim; c++)
        kvc_code_set(words, 16, KVC_TAIL_TOKENS, half ? kvc_place_v(j, c) : kvc_place_k(j, c),
                     kvc_float_to_half(row[c], layout->half));
}

static void append_token(const kvc_append_args *args, kvc_list *list, kvc_page *row, int64_t sequence, int64_t head,
                         int64_t i) {
    const int d = args->layout.head_dim, place = list->tail_tokens % KVC_TAIL_TOKENS;
    if (place == 0) {
        int32_t *left = args->left.data;
        const kvc_page fresh = {((const uint32_t *)args->pool_tail.data)[--left[0]], 16, 16, 0, 0};
        memset(page_at(args, fresh.unit), 0, (size_t)kvc_page_bytes(&args->layout, 16, 16));
        row[list->pages++] = fresh;
    }
    kvc_page *page = &row[list->pages - 1];
    for (int half = 0; half < 2; half++) {
        const kvc_tensor *rows = half ? &args->values : &args->keys;
        float x[KVC_MAX_HEAD_DIM];
        kvc_load_row(x, kvc_at(rows, sequence, head, i), rows->dtype, d);
        if (args->rotation == KVC_ROTATE_HADAMARD) kvc_row_rotate(x, d);
        write_row(page_at(args, page->unit), &args->layout, half, place, x);
    }
    page->tokens++;
    list->tail_tokens++;
    list->tokens++;
}

kvc_status kvc_append_cpu(const kvc_append_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(check(args));
    const int64_t b = args->keys.shape[0], h = args->keys.shape[1], q = args->keys.shape[2];
    for (int64_t i = 0; i < b * h; i++) {
        kvc_list *list = (kvc_list *)args->lists.data + i;
        kvc_page *row = (kvc_page *)args->table.data + i * args->table.shape[1];
        const int stack = stack_of(args, i);
        const bool packs = class_at(args, stack).packs;
        const kvc_rounding rounding = {&args->layout, args->scale, args->stochastic, args->layer, (int)i, args->seed};
        for (int64_t j = q - valid_of(args, i / h); j < q; j++) {
            while (packs && list->tail_tokens >= args->window + P) flush(args, list, row, stack, &rounding);
            append_token(args, list, row, i / h, i % h, j);
        }
    }
    return KVC_OK;
}
