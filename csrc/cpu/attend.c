/* attend.c: attention over packed pages on the CPU.
 *
 * Work is cut into items (list, chunk of 64 page-table entries, block of four queries), by shapes alone, so the result
 * does not depend on the number of threads. Every item leaves unnormalized rows with their logit reference and total;
 * a second round merges the chunks. Probability mass, where asked for, is a third round that reads K once more. */
#include "kvcomp/attend.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/attend_tile.h"
#include "cpu/pack_page.h"

#define CHUNK 64

#ifdef KVC_HAVE_X86_ISAS
extern const kvc_attend_tile kvc_attend_tile_avx2, kvc_attend_tile_avx512;
#endif
extern const kvc_attend_tile kvc_attend_tile_base;

const kvc_attend_tile *kvc_attend_tiles(void) {
    static const kvc_attend_tile *best;
    if (best) return best;
    const kvc_attend_tile *found = &kvc_attend_tile_base;
#ifdef KVC_HAVE_X86_ISAS
    const char *limit = getenv("KVCOMP_SIMD");
    const bool any = !limit || !*limit, wide = any || strcmp(limit, "avx512") == 0;
    __builtin_cpu_init();
    if ((wide || strcmp(limit, "avx2") == 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found = &kvc_attend_tile_avx2;
    if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        found = &kvc_attend_tile_avx512;
#endif
    return best = found;
}

typedef struct {
    const kvc_attend_args *args;
    const kvc_attend_tile *tile;
    int64_t heads, group, q, chunks, blocks; /* chunks a list has at most, blocks of queries */
    float *partial;                          /* per item: KVC_BLOCK * (d + 2) floats: rows, references, totals */
} job;

static int64_t chunks_of(int64_t pages) { return pages < 1 ? 1 : (pages + CHUNK - 1) / CHUNK; }
static int64_t blocks_of(int64_t group, int64_t q) { return (group * q + KVC_BLOCK - 1) / KVC_BLOCK; }

int64_t kvc_attend_workspace(int64_t n, int64_t pages, int64_t group, int64_t q, int32_t head_dim) {
    const int64_t factors[] = {chunks_of(pages), blocks_of(group, q),
                               KVC_BLOCK * (head_dim + 2) * (int64_t)sizeof(float)};
    for (int i = 0; i < 3; i++)
        if (__builtin_mul_overflow(n, factors[i], &n)) return INT64_MAX;
    return n;
}

static const kvc_list *list_at(const job *j, int64_t i) { return (const kvc_list *)j->args->lists.data + i; }
static const kvc_page *row_at(const job *j, int64_t i) {
    return (const kvc_page *)j->args->table.data + i * j->args->table.shape[1];
}

/* New tokens of the list's sequence. */
static int64_t fresh(const job *j, int64_t list) {
    const kvc_tensor *given = &j->args->new_tokens;
    return kvc_given(given) ? ((const int32_t *)given->data)[list / j->heads] : j->q;
}

/* Row `i` of a list's queries is head i / q of the group, query i % q: the tokens it sees, 0 for padding. */
static int64_t visible(const job *j, int64_t list, int64_t i) {
    const int64_t query = i % j->q;
    if (i >= j->group * j->q || query < j->q - fresh(j, list)) return 0;
    const int64_t seen = list_at(j, list)->tokens - (j->q - 1 - query);
    return seen < 0 ? 0 : seen;
}

static char *query_row(const job *j, const kvc_tensor *tensor, int64_t list, int64_t i) {
    return kvc_at(tensor, list / j->heads, list % j->heads * j->group + i / j->q, i % j->q);
}

/* The next page of `row` from entry `p` on: one packed page, or tail pages read as one. Returns entries taken. */
static int next_page(const job *j, const kvc_page *row, int p, int end, kvc_attend_page *page, int *tokens) {
    const kvc_attend_args *args = j->args;
    const uint8_t *arena = args->arena.data;
    page->k_bits = row[p].k_bits;
    page->v_bits = row[p].v_bits;
    page->room = kvc_page_tokens(page->k_bits, page->v_bits);
    const int most = KVC_PAGE_TOKENS / page->room;
    int taken = 0;
    *tokens = 0;
    do {
        page->bytes[taken] = arena + (int64_t)row[p + taken].unit * KVC_UNIT;
        *tokens += row[p + taken].tokens;
        taken++;
    } while (taken < most && p + taken < end && row[p + taken].k_bits == 16 && row[p + taken].v_bits == 16 &&
             *tokens == taken * KVC_TAIL_TOKENS);
    for (int i = taken; i < 4; i++) page->bytes[i] = page->bytes[0];
    page->next_bytes = 0;
    if (p + taken < end) {
        page->next = arena + (int64_t)row[p + taken].unit * KVC_UNIT;
        page->next_bytes = kvc_page_bytes(&args->layout, row[p + taken].k_bits, row[p + taken].v_bits);
    }
    return taken;
}

/* Loads, scales and rotates the block's queries; `seen` gets how many tokens each may look at. */
static void load_block(const job *j, int64_t list, int64_t block, float *rows, int *queries, int64_t seen[KVC_BLOCK]) {
    const kvc_attend_args *args = j->args;
    const int d = args->layout.head_dim;
    const int64_t first = block * KVC_BLOCK, left = j->group * j->q - first;
    *queries = left >= 3 ? 4 : (int)left;
    memset(rows, 0, sizeof(float) * KVC_BLOCK * (size_t)d);
    for (int i = 0; i < KVC_BLOCK; i++) {
        seen[i] = visible(j, list, first + i);
        if (i >= left) continue;
        float *row = rows + i * d;
        kvc_load_row(row, query_row(j, &args->queries, list, first + i), args->queries.dtype, d);
        if (args->rotation == KVC_ROTATE_HADAMARD) kvc_row_rotate(row, d);
        for (int c = 0; c < d; c++) row[c] *= args->scale;
    }
}

static float *partial_at(const job *j, int64_t list, int64_t chunk, int64_t block) {
    const int64_t item = (list * j->chunks + chunk) * j->blocks + block;
    return j->partial + item * KVC_BLOCK * (j->args->layout.head_dim + 2);
}

static void set_visible(kvc_attend_page *page, const int64_t seen[KVC_BLOCK], int64_t before, int tokens) {
    for (int i = 0; i < KVC_BLOCK; i++) {
        const int64_t left = seen[i] - before;
        page->visible[i] = left <= 0 ? 0 : left < tokens ? (int)left : tokens;
    }
}

typedef struct {
    kvc_attend_block block;
    float rows[KVC_BLOCK * KVC_MAX_HEAD_DIM] __attribute__((aligned(64)));
    float query[KVC_MAX_HEAD_DIM / KVC_TILE * 4 * KVC_BLOCK * 16] __attribute__((aligned(64)));
    float sums[KVC_MAX_HEAD_DIM * KVC_BLOCK * 16] __attribute__((aligned(64)));
    float scores[KVC_BLOCK][KVC_PAGE_TOKENS] __attribute__((aligned(64)));
} scratch;

static void prepare(const job *j, int64_t list, int64_t block, scratch *s, int64_t seen[KVC_BLOCK]) {
    s->block.layout = &j->args->layout;
    s->block.softcap = j->args->softcap;
    s->block.query = s->query;
    s->block.sums = s->sums;
    load_block(j, list, block, s->rows, &s->block.queries, seen);
    j->tile->begin(&s->block, s->rows);
}

static int64_t tokens_before(const kvc_page *row, int entry) {
    int64_t tokens = 0;
    for (int p = 0; p < entry; p++) tokens += row[p].tokens;
    return tokens;
}

static void attend_item(void *context, int64_t item) {
    const job *j = context;
    const int64_t block = item % j->blocks, chunk = item / j->blocks % j->chunks, list = item / j->blocks / j->chunks;
    const int d = j->args->layout.head_dim;
    const kvc_page *row = row_at(j, list);
    const int first = (int)chunk * CHUNK, pages = list_at(j, list)->pages,
              end = first + CHUNK < pages ? first + CHUNK : pages;
    float *out = partial_at(j, list, chunk, block);
    scratch s;
    int64_t seen[KVC_BLOCK];
    prepare(j, list, block, &s, seen);
    int64_t before = first < end ? tokens_before(row, first) : 0;
    for (int p = first, tokens; p < end; before += tokens) {
        kvc_attend_page page;
        p += next_page(j, row, p, end, &page, &tokens);
        set_visible(&page, seen, before, tokens);
        if (!(page.visible[0] | page.visible[1] | page.visible[2] | page.visible[3])) continue;
        j->tile->scores(&s.block, &page, s.scores);
        j->tile->values(&s.block, &page, s.scores);
    }
    j->tile->end(&s.block, out);
    memcpy(out + KVC_BLOCK * d, s.block.most, sizeof s.block.most);
    memcpy(out + KVC_BLOCK * (d + 1), s.block.total, sizeof s.block.total);
}

/* Merges the chunks of one row of queries, and leaves in chunk 0's place its logit reference and total for the mass. */
static void merge_row(void *context, int64_t item) {
    const job *j = context;
    const int64_t list = item / (j->group * j->q), i = item % (j->group * j->q), block = i / KVC_BLOCK;
    const int d = j->args->layout.head_dim, at = (int)(i % KVC_BLOCK);
    const int64_t chunks = chunks_of(list_at(j, list)->pages);
    float most = -INFINITY, total = 0.0f, row[KVC_MAX_HEAD_DIM] = {0};
    for (int64_t c = 0; c < chunks; c++) {
        const float m = partial_at(j, list, c, block)[KVC_BLOCK * d + at];
        most = m > most || m != m ? m : most;
    }
    if (most != -INFINITY)
        for (int64_t c = 0; c < chunks; c++) {
            const float *part = partial_at(j, list, c, block);
            const float factor = expf(part[KVC_BLOCK * d + at] - most);
            if (factor == 0.0f) continue;
            total += factor * part[KVC_BLOCK * (d + 1) + at];
            for (int k = 0; k < d; k++) row[k] += factor * part[at * d + k];
        }
    if (total != 0.0f)
        for (int k = 0; k < d; k++) row[k] /= total;
    if (j->args->rotation == KVC_ROTATE_HADAMARD) kvc_row_rotate(row, d);
    kvc_store_row(query_row(j, &j->args->out, list, i), row, j->args->out.dtype, d);
    partial_at(j, list, 0, block)[KVC_BLOCK * d + at] = most;
    partial_at(j, list, 0, block)[KVC_BLOCK * (d + 1) + at] = total;
}

static void mass_item(void *context, int64_t item) {
    const job *j = context;
    const int64_t chunk = item % j->chunks, list = item / j->chunks, capacity = j->args->mass.shape[1];
    const int d = j->args->layout.head_dim;
    const kvc_page *row = row_at(j, list);
    const kvc_list *state = list_at(j, list);
    const int first = (int)chunk * CHUNK, end = first + CHUNK < state->pages ? first + CHUNK : state->pages;
    float *mass = (float *)j->args->mass.data + list * capacity;
    if (chunk == 0) memset(mass + state->tokens, 0, (size_t)(capacity - state->tokens) * sizeof *mass);
    if (first >= end) return;
    const int64_t start = tokens_before(row, first);
    for (int64_t block = 0; block < j->blocks; block++) {
        scratch s;
        int64_t seen[KVC_BLOCK], before = start;
        prepare(j, list, block, &s, seen);
        const float *merged = partial_at(j, list, 0, block) + KVC_BLOCK * d;
        for (int p = first, tokens; p < end; before += tokens) {
            kvc_attend_page page;
            p += next_page(j, row, p, end, &page, &tokens);
            set_visible(&page, seen, before, tokens);
            j->tile->scores(&s.block, &page, s.scores);
            for (int i = 0; i < tokens && block == 0; i++) mass[before + i] = 0.0f;
            for (int q = 0; q < s.block.queries; q++) {
                if (page.visible[q] == 0 || merged[KVC_BLOCK + q] == 0.0f) continue;
                j->tile->probabilities(merged[q], s.scores[q]);
                for (int i = 0; i < KVC_PAGE_TOKENS; i++) {
                    const int token = kvc_score_token(i);
                    if (token < page.visible[q]) mass[before + token] += s.scores[q][i] / merged[KVC_BLOCK + q];
                }
            }
        }
    }
}

static kvc_status check(const kvc_attend_args *args, job *j) {
    KVC_TRY(kvc_attend_check(args));
    const int64_t b = args->queries.shape[0], hq = args->queries.shape[1], q = args->queries.shape[2];
    const int64_t n = args->table.shape[0], capacity = args->table.shape[1], h = b > 0 ? n / b : 0;
    int64_t most_pages = 0;
    for (int64_t i = 0; i < n; i++) {
        const kvc_list *list = (const kvc_list *)args->lists.data + i;
        const kvc_page *row = (const kvc_page *)args->table.data + i * capacity;
        KVC_CHECK(list->pages >= 0 && list->pages <= capacity, KVC_EINVAL,
                  "attend: lists: expected 0..%lld pages, got %d in list %lld", (long long)capacity, list->pages,
                  (long long)i);
        int64_t tokens = 0;
        for (int p = 0; p < list->pages; p++) {
            const kvc_page page = row[p];
            KVC_CHECK(kvc_bits_ok(page.k_bits) && kvc_bits_ok(page.v_bits) &&
                          page.tokens <= kvc_page_tokens(page.k_bits, page.v_bits) &&
                          (int64_t)page.unit * KVC_UNIT + kvc_page_bytes(&args->layout, page.k_bits, page.v_bits) <=
                              args->arena.shape[0],
                      KVC_EINVAL,
                      "attend: table: expected a valid page, got K %d, V %d bits, %d tokens at unit %u in list %lld",
                      page.k_bits, page.v_bits, page.tokens, page.unit, (long long)i);
            tokens += page.tokens;
        }
        KVC_CHECK(tokens == list->tokens, KVC_EINVAL,
                  "attend: lists: expected %lld tokens as in the pages, got %d in list %lld", (long long)tokens,
                  list->tokens, (long long)i);
        const int64_t added = kvc_given(&args->new_tokens) ? ((const int32_t *)args->new_tokens.data)[i / h] : q;
        KVC_CHECK(added >= 0 && added <= q, KVC_EINVAL, "attend: new_tokens: expected 0..%lld, got %lld", (long long)q,
                  (long long)added);
        if (kvc_given(&args->mass))
            KVC_CHECK(tokens <= args->mass.shape[1], KVC_ESHAPE, "attend: mass: expected (%lld, %lld or more), got %s",
                      (long long)n, (long long)tokens, kvc_shape_text(&args->mass));
        if (list->pages > most_pages) most_pages = list->pages;
    }
    *j = (job){.args = args,
               .tile = kvc_attend_tiles(),
               .heads = h,
               .group = h ? hq / h : 0,
               .q = q,
               .chunks = chunks_of(most_pages),
               .blocks = h ? blocks_of(hq / h, q) : 0,
               .partial = args->workspace.data};
    return kvc_expect_workspace("attend", &args->workspace,
                                kvc_attend_workspace(n, most_pages, j->group, q, args->layout.head_dim));
}

kvc_status kvc_attend_cpu(const kvc_attend_args *args, kvc_stream stream) {
    (void)stream;
    job j;
    KVC_TRY(check(args, &j));
    const int64_t n = args->table.shape[0];
    if (n == 0) return KVC_OK;
    if (j.blocks == 0) { /* no queries */
        if (kvc_given(&args->mass)) memset(args->mass.data, 0, (size_t)kvc_elements(&args->mass) * sizeof(float));
        return KVC_OK;
    }
    kvc_parallel(n * j.chunks * j.blocks, args->threads, attend_item, &j);
    kvc_parallel(n * j.group * j.q, n * j.group * j.q < 256 ? 1 : args->threads, merge_row, &j);
    if (kvc_given(&args->mass)) kvc_parallel(n * j.chunks, args->threads, mass_item, &j);
    return KVC_OK;
}
