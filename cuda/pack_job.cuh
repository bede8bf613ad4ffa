/* pack_job.cuh: what pack.cu's kernels are given, and how a block finds its half page. */
#pragma once
#include "common.cuh"
#include "kvcomp/pack.h"

namespace {

constexpr int THREADS = 128;
constexpr unsigned ALL = 0xffffffffu;
constexpr int STAGE_TILES = KVC_PAGE_TOKENS / KVC_TILE;

/* Blocks of a multiprocessor: as many as the registers of a row allow. Only search with small groups spills, a little.
 */
constexpr int pack_blocks(int tiles, int groups, bool search) {
    if (groups == 1 && !search) return tiles > 8 ? 3 : 6;
    return tiles > 8 ? 2 : 4;
}
constexpr int unpack_blocks(int tiles) { return tiles > 8 ? 3 : 5; }

/* K or V: rows of (b, h, s, d). */
struct rows {
    char *data;
    int64_t b, h, s; /* strides in bytes */
    int32_t dtype;
    int32_t vectors; /* 1: four neighbouring channels are always aligned */
};

struct call {
    rows half[2]; /* K, V */
    uint32_t *arena;
    int64_t arena_bytes;
    const kvc_page *pages;
    const int32_t *lists, *start, *tokens;
    int64_t token_count;
    uint32_t heads, heads_inverse, list_count; /* heads_inverse: 2^32 / heads */
    int32_t s;
    int32_t half_bytes[17]; /* of K or V in a page of 64 tokens, by bits; 0 for bits that are no class */
    int32_t tail_half_bytes;
    kvc_layout layout;
    int32_t rotation, scale, stochastic, layer;
    uint64_t seed;
};

/* What a block works on: one half of one page. */
struct job {
    kvc_page page;
    int list, batch, head, bits, page_tokens, value; /* value: 0 K, 1 V */
    const int32_t *tokens;
    uint32_t *words; /* the half's codes */
    uint8_t *scales; /* and what follows them */
    char *base;      /* row 0 of the list in K or V */
    int64_t stride;
};

/* K from a job that knows its page, or (after that) V. */
__device__ void take_half(const call &a, job *it, int value) {
    if (value) it->words += (it->page_tokens == KVC_TAIL_TOKENS ? a.tail_half_bytes : a.half_bytes[it->bits]) / 4;
    it->value = value;
    it->bits = value ? it->page.v_bits : it->page.k_bits;
    it->scales = (uint8_t *)it->words + it->page_tokens / 8 * a.layout.head_dim * it->bits;
    it->base = a.half[value].data + it->batch * a.half[value].b + it->head * a.half[value].h;
    it->stride = a.half[value].s;
}

/* Every thread of a block runs this before it can load a row: no divisions, sizes from the host's table. */
__device__ bool take_job(const call &a, job *out, int value) {
    const kvc_page page = a.pages[blockIdx.x];
    const uint32_t list = a.lists[blockIdx.x];
    const int start = a.start[blockIdx.x];
    if (page.k_bits > 16 || page.v_bits > 16 || list >= a.list_count || start < 0) return false;
    const bool tail = page.k_bits == 16 && page.v_bits == 16;
    const int page_tokens = tail ? KVC_TAIL_TOKENS : KVC_PAGE_TOKENS;
    const int k_bytes = tail ? a.tail_half_bytes : a.half_bytes[page.k_bits];
    const int v_bytes = tail ? a.tail_half_bytes : a.half_bytes[page.v_bits];
    const int page_bytes = (k_bytes + v_bytes + KVC_UNIT - 1) & -KVC_UNIT;
    const int64_t first = (int64_t)page.unit * KVC_UNIT;
    if (k_bytes == 0 || v_bytes == 0 || page.tokens > page_tokens || start + (int64_t)page.tokens > a.token_count ||
        first + page_bytes > a.arena_bytes)
        return false;
    uint32_t b = __umulhi(list, a.heads_inverse), h = list - b * a.heads; /* b is right, or one too small */
    if (h >= a.heads) b++, h -= a.heads;
    out->page = page;
    out->list = list;
    out->batch = b;
    out->head = h;
    out->page_tokens = page_tokens;
    out->tokens = a.tokens + start;
    out->words = a.arena + first / 4;
    take_half(a, out, 0);
    if (value) take_half(a, out, 1);
    return true;
}

/* What E5M3 can leave behind V: halves are multiples of 64 bytes, pages of 128. */
__device__ void clear_padding(const call &a, const job &it) {
    const int v_bytes = a.half_bytes[it.page.v_bits];
    if (it.value && it.page_tokens == KVC_PAGE_TOKENS && (a.half_bytes[it.page.k_bits] + v_bytes) % KVC_UNIT &&
        threadIdx.x < KVC_UNIT / 2 / sizeof(uint32_t))
        it.words[v_bytes / sizeof(uint32_t) + threadIdx.x] = 0;
}

} // namespace
