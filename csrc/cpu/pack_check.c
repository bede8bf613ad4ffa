/* pack_check.c: what pack and unpack refuse, the same for CPU and CUDA. */
#include "core/core.h"
#include "kvcomp/pack.h"

static kvc_status check_pages(const char *op, const kvc_tensor *arena, const kvc_tensor *pages, const kvc_tensor *lists,
                              const kvc_tensor *start, const kvc_tensor *tokens, const kvc_tensor *rows,
                              const kvc_layout *layout) {
    const int64_t n = pages->ndim == 1 ? pages->shape[0] : -1;
    KVC_TRY(kvc_expect_arena(op, arena));
    KVC_TRY(kvc_expect_array(op, "pages", pages, KVC_UINT64, 1, (int64_t[]){-1}));
    KVC_TRY(kvc_expect_array(op, "lists", lists, KVC_INT32, 1, (int64_t[]){n}));
    KVC_TRY(kvc_expect_array(op, "start", start, KVC_INT32, 1, (int64_t[]){n}));
    KVC_TRY(kvc_expect_array(op, "tokens", tokens, KVC_INT32, 1, (int64_t[]){-1}));
    if (arena->device != KVC_CPU) return KVC_OK; /* reading indices would have to synchronize */
    const int64_t list_count = rows->shape[0] * rows->shape[1];
    for (int64_t i = 0; i < n; i++) {
        const kvc_page page = ((const kvc_page *)pages->data)[i];
        const int32_t list = ((const int32_t *)lists->data)[i], first = ((const int32_t *)start->data)[i];
        KVC_CHECK(kvc_bits_ok(page.k_bits) && kvc_bits_ok(page.v_bits), KVC_EINVAL,
                  "%s: pages: expected 2, 3, 4, 8 or 16 bits, got K %d, V %d in page %lld", op, page.k_bits,
                  page.v_bits, (long long)i);
        const int room = kvc_page_tokens(page.k_bits, page.v_bits);
        KVC_CHECK(page.tokens <= room, KVC_EINVAL, "%s: pages: expected at most %d tokens, got %d in page %lld", op,
                  room, page.tokens, (long long)i);
        KVC_CHECK((int64_t)page.unit * KVC_UNIT + kvc_page_bytes(layout, page.k_bits, page.v_bits) <= arena->shape[0],
                  KVC_EINVAL, "%s: pages: expected pages inside the arena's %lld bytes, got page %lld at byte %lld", op,
                  (long long)arena->shape[0], (long long)i, (long long)page.unit * KVC_UNIT);
        KVC_CHECK(list >= 0 && list < list_count, KVC_EINVAL, "%s: lists: expected 0..%lld, got %d", op,
                  (long long)list_count - 1, list);
        KVC_CHECK(first >= 0 && (int64_t)first + page.tokens <= tokens->shape[0], KVC_EINVAL,
                  "%s: start: expected indices inside the %lld tokens, got %d and %d more", op,
                  (long long)tokens->shape[0], first, page.tokens);
        for (int j = 0; j < page.tokens; j++) {
            const int32_t token = ((const int32_t *)tokens->data)[first + j];
            KVC_CHECK(token >= 0 && token < rows->shape[2], KVC_EINVAL, "%s: tokens: expected 0..%lld, got %d", op,
                      (long long)rows->shape[2] - 1, token);
        }
    }
    return KVC_OK;
}

static kvc_status check_rows(const char *op, const kvc_tensor *keys, const kvc_tensor *values, const kvc_layout *layout,
                             int rotation) {
    KVC_TRY(kvc_expect_layout(op, layout));
    KVC_TRY(kvc_expect_shape(op, "keys", keys, 4, (int64_t[]){-1, -1, -1, layout->head_dim}));
    KVC_TRY(kvc_expect_shape(op, "values", values, 4, keys->shape));
    KVC_TRY(kvc_expect_float(op, "keys", keys));
    KVC_TRY(kvc_expect_dtype(op, "values", values, keys->dtype));
    KVC_TRY(kvc_expect_rows(op, "keys", keys));
    KVC_TRY(kvc_expect_rows(op, "values", values));
    KVC_CHECK(rotation == KVC_ROTATE_NONE || rotation == KVC_ROTATE_HADAMARD, KVC_EINVAL,
              "%s: rotation: expected 0 (none) or 1 (hadamard), got %d", op, rotation);
    return KVC_OK;
}

/* Rows that no page names are not looked at: padding may hold anything. */
static kvc_status check_finite(const kvc_pack_args *args) {
    const int64_t n = args->pages.shape[0], heads = args->keys.shape[1];
    for (int64_t i = 0; i < n; i++) {
        const int32_t list = ((const int32_t *)args->lists.data)[i];
        const int32_t *tokens = (const int32_t *)args->tokens.data + ((const int32_t *)args->start.data)[i];
        for (int j = 0; j < ((const kvc_page *)args->pages.data)[i].tokens; j++)
            for (int half = 0; half < 2; half++) {
                const kvc_tensor *rows = half ? &args->values : &args->keys;
                KVC_CHECK(
                    kvc_row_finite(kvc_at(rows, list / heads, list % heads, tokens[j]), rows->dtype, rows->shape[3]),
                    KVC_EINVAL, "pack: %s: expected finite values, got NaN or Inf in token %d of list %d",
                    half ? "values" : "keys", tokens[j], list);
            }
    }
    return KVC_OK;
}

kvc_status kvc_pack_check(const kvc_pack_args *args) {
    KVC_TRY(check_rows("pack", &args->keys, &args->values, &args->layout, args->rotation));
    KVC_CHECK(args->scale >= KVC_SCALE_SIGMA && args->scale <= KVC_SCALE_SEARCH, KVC_EINVAL,
              "pack: scale: expected 0 (sigma), 1 (minmax) or 2 (search), got %d", args->scale);
    KVC_TRY(check_pages("pack", &args->arena, &args->pages, &args->lists, &args->start, &args->tokens, &args->keys,
                        &args->layout));
    return args->keys.device == KVC_CPU ? check_finite(args) : KVC_OK;
}

kvc_status kvc_unpack_check(const kvc_unpack_args *args) {
    KVC_TRY(check_rows("unpack", &args->keys, &args->values, &args->layout, args->rotation));
    return check_pages("unpack", &args->arena, &args->pages, &args->lists, &args->start, &args->tokens, &args->keys,
                       &args->layout);
}
