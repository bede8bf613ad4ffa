/* append.c: rows into 16-bit tails, and aged tokens into packed pages, on the CPU. */
#include "kvcomp/append.h"

#include <string.h>

#include "cpu/append_check.h"
#include "cpu/pack_page.h"

#define T KVC_TILE
#define P KVC_PAGE_TOKENS
#define TAIL_PAGES (P / KVC_TAIL_TOKENS)

_Static_assert(KVC_TAIL_TOKENS == T, "a tail page is one tile");

/* ---- what becomes of table, lists, pools and left */

typedef struct {
    kvc_list *list;
    kvc_page *row;
    uint32_t *tail;
    const uint32_t *packed;
    int32_t *left;
    int k_bits, v_bits;
} books;

static books books_of(const kvc_append_walk_args *args, int64_t i) {
    const uint8_t *bits = (const uint8_t *)args->classes.data + 2 * i;
    return (books){(kvc_list *)args->lists.data + i,
                   (kvc_page *)args->table.data + i * args->table.shape[1],
                   (uint32_t *)args->pool_tail.data + i * args->pool_tail.shape[1],
                   (const uint32_t *)args->pool_packed.data + i * args->pool_packed.shape[1],
                   (int32_t *)args->left.data + 2 * i,
                   bits[0],
                   bits[1]};
}

/* New tokens of list i; h: lists of a sequence. */
static int valid_of(const kvc_append_walk_args *args, int64_t i, int64_t h) {
    return kvc_given(&args->valid) ? ((const int32_t *)args->valid.data)[i / h] : args->q;
}

static bool flushes(const books *b, int window) {
    return (b->k_bits != 16 || b->v_bits != 16) && b->list->tail_tokens >= window + P;
}

static void flush_books(const books *b) {
    kvc_list *list = b->list;
    kvc_page *first = b->row + list->tail_page;
    for (int tile = 0; tile < TAIL_PAGES; tile++) b->tail[b->left[0]++] = first[tile].unit;
    *first = (kvc_page){b->packed[--b->left[1]], (uint8_t)b->k_bits, (uint8_t)b->v_bits, P, 0};
    memmove(first + 1, first + TAIL_PAGES, (size_t)(list->pages - list->tail_page - TAIL_PAGES) * sizeof *first);
    list->pages -= TAIL_PAGES - 1;
    list->tail_page++;
    list->tail_tokens -= P;
}

/* Room for one more token, in the page returned. */
static const kvc_page *token_books(const books *b) {
    kvc_list *list = b->list;
    if (list->tail_tokens % KVC_TAIL_TOKENS == 0)
        b->row[list->pages++] = (kvc_page){b->tail[--b->left[0]], 16, 16, 0, 0};
    kvc_page *page = &b->row[list->pages - 1];
    page->tokens++;
    list->tail_tokens++;
    list->tokens++;
    return page;
}

/* ---- rows */

static uint8_t *page_at(const kvc_append_args *args, uint32_t unit) {
    return (uint8_t *)args->arena.data + (int64_t)unit * KVC_UNIT;
}

/* The bytes of the page that the tail's first 64 tokens become. */
static void flush_rows(const kvc_append_args *args, const books *b, const kvc_rounding *rounding) {
    const kvc_list *list = b->list;
    const kvc_page *first = b->row + list->tail_page;
    const uint32_t before = (uint32_t)(list->tokens - list->tail_tokens);
    uint8_t *bytes = page_at(args, b->packed[b->left[1] - 1]);
    memset(bytes, 0, (size_t)kvc_page_bytes(&args->layout, b->k_bits, b->v_bits));
    for (int tile = 0; tile < TAIL_PAGES; tile++) {
        uint32_t numbers[T];
        for (int j = 0; j < T; j++) numbers[j] = before + (uint32_t)(tile * T + j);
        for (int half = 0; half < 2; half++) {
            kvc_tile x;
            kvc_tile_read(x, page_at(args, first[tile].unit), 16, 16, half, 0, &args->layout);
            kvc_tile_clamp(x, args->layout.head_dim);
            kvc_tile_write(bytes, b->k_bits, b->v_bits, half, tile, T, x, numbers, rounding);
        }
    }
}

/* One rotated row into place j of a tail page. */
static void write_row(uint8_t *page, const kvc_layout *layout, int half, int j, const float *row) {
    uint32_t *words = (uint32_t *)(page + (half ? kvc_half_bytes(layout, 16, KVC_TAIL_TOKENS) : 0));
    for (int c = 0; c < layout->head_dim; c++)
        kvc_code_set(words, 16, KVC_TAIL_TOKENS, half ? kvc_place_v(j, c) : kvc_place_k(j, c),
                     kvc_float_to_half(row[c], layout->half));
}

/* Token j of the new ones, which the books have already, into its page. */
static void token_rows(const kvc_append_args *args, const kvc_page *page, int64_t sequence, int64_t head, int64_t j) {
    const int d = args->layout.head_dim;
    uint8_t *bytes = page_at(args, page->unit);
    if (page->tokens == 1) memset(bytes, 0, (size_t)kvc_page_bytes(&args->layout, 16, 16));
    for (int half = 0; half < 2; half++) {
        const kvc_tensor *rows = half ? &args->values : &args->keys;
        float x[KVC_MAX_HEAD_DIM];
        kvc_load_row(x, kvc_at(rows, sequence, head, j), rows->dtype, d);
        if (args->rotation == KVC_ROTATE_HADAMARD) kvc_row_rotate(x, d);
        write_row(bytes, &args->layout, half, page->tokens - 1, x);
    }
}

/* ---- operations */

kvc_status kvc_append_cpu(const kvc_append_args *args, kvc_stream stream) {
    (void)stream;
    KVC_TRY(kvc_append_check(args));
    const kvc_append_walk_args walk = kvc_append_walk_of(args);
    const int64_t h = args->keys.shape[1];
    for (int64_t i = 0; i < args->lists.shape[0]; i++) {
        const books b = books_of(&walk, i);
        const kvc_rounding rounding = {&args->layout, args->scale, args->stochastic, args->layer, (int)i, args->seed};
        for (int64_t j = walk.q - valid_of(&walk, i, h); j < walk.q; j++) {
            while (flushes(&b, args->window)) {
                flush_rows(args, &b, &rounding);
                flush_books(&b);
            }
            token_rows(args, token_books(&b), i / h, i % h, j);
        }
    }
    return KVC_OK;
}

kvc_status kvc_append_walk(const kvc_append_walk_args *args) {
    KVC_TRY(kvc_append_walk_check(args));
    const int64_t n = args->lists.shape[0], h = kvc_given(&args->valid) && n ? n / args->valid.shape[0] : 1;
    for (int64_t i = 0; i < n; i++) {
        const books b = books_of(args, i);
        for (int left = valid_of(args, i, h); left > 0; left--) {
            while (flushes(&b, args->window)) flush_books(&b);
            token_books(&b);
        }
    }
    return KVC_OK;
}
