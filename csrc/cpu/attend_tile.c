/* attend_tile.c: attention over one page at a time, on codes decoded in registers. Built once per instruction set with
 * KVC_ISA=base|avx2|avx512; 16-float vectors are the compiler's, so the code is the same for all.
 *
 * A row of a channel tile is the 16 words that lanes 4*r .. 4*r+3 hold for the four token tiles: vector element
 * 4*c + t. It decodes to eight vectors, one per element e: 128 codes from at most 16 words, each used by every query at
 * once. */
#include "cpu/attend_tile.h"

#include <math.h>
#include <string.h>

#define V 16
typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vu16 __attribute__((vector_size(32)));
typedef uint8_t vu8 __attribute__((vector_size(16)));
typedef float vf4 __attribute__((vector_size(16)));

#define NAME2(name, isa) name##_##isa
#define NAME1(name, isa) NAME2(name, isa)
#define NAME(name) NAME1(name, KVC_ISA)
#define TEXT2(isa) #isa
#define TEXT1(isa) TEXT2(isa)
#define INLINE static inline __attribute__((always_inline))

INLINE vu load_words(const uint32_t *words) {
    vu v;
    memcpy(&v, words, sizeof v);
    return v;
}
INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf to_float(vu codes) { return __builtin_convertvector((vi)codes, vf); }
INLINE vf pick(vu mask, vf yes, vf no) { return (vf)((mask & (vu)yes) | (~mask & (vu)no)); }

/* ---- 16-bit values */

INLINE vf from_half(vu low16, int dtype) {
    if (dtype == KVC_BFLOAT16) return (vf)(low16 << 16);
    const vf magnitude = (vf)((low16 & 0x7fff) << 13) * 0x1p112f; /* moves the exponent's bias; subnormals too */
    return (vf)((vu)magnitude | (low16 & 0x8000) << 16);
}

/* ---- one row of a channel tile: eight vectors of codes or values. `w` is the half's first word. */

INLINE void decode_row(vf out[8], const uint32_t *const w[4], int bits, int room, int half, int ct, int r) {
    if (bits == 2 || bits == 3) {
        /* Sixteen words are loaded where eight or four are wanted: what follows a half's codes is its scales, 64 bytes
         * or more. */
        const uint32_t *const row = w[0] + ct * 32 * bits;
        vu v = load_words(row + 8 * r), x = {0};
        v = __builtin_shuffle(v, (vu){0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7});
        v >>= (vu){0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2};
        if (bits == 3) {
            x = __builtin_shuffle(load_words(row + 64 + 4 * r), (vu){0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3});
            x >>= (vu){0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        }
        for (int e = 0; e < 8; e++) {
            const int shift = 8 * (e & 3) + 4 * (e >> 2);
            vu code = v >> shift & 3;
            if (bits == 3) code |= (x >> shift & 1) << 2;
            out[e] = to_float(code);
        }
    } else if (bits == 4) {
        vu v = load_words(w[0] + ct * 128 + 16 * r);
        for (int e = 0; e < 8; e++) out[e] = to_float(v >> (8 * (e & 3) + 4 * (e >> 2)) & 15);
    } else if (bits == 8) {
        for (int plane = 0; plane < 2; plane++) {
            const vu v = load_words(w[0] + ct * 256 + 128 * plane + 16 * r);
            for (int e = 0; e < 4; e++) out[4 * plane + e] = to_float(v >> (8 * e) & 255);
        }
    } else {
        vu plane[4];
        if (room == KVC_PAGE_TOKENS) {
            for (int i = 0; i < 4; i++) plane[i] = load_words(w[0] + ct * 512 + 128 * i + 16 * r);
        } else { /* four pages' [c][plane] words to [c][page], plane by plane */
            vu page[4];
            for (int i = 0; i < 4; i++) page[i] = load_words(w[i] + ct * 128 + 16 * r);
            const vu even = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
            const vu odd = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
            const vu low = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
            const vu high = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
            const vu a = __builtin_shuffle(page[0], page[1], even), b = __builtin_shuffle(page[0], page[1], odd);
            const vu c = __builtin_shuffle(page[2], page[3], even), d = __builtin_shuffle(page[2], page[3], odd);
            plane[0] = __builtin_shuffle(a, c, low);
            plane[1] = __builtin_shuffle(b, d, low);
            plane[2] = __builtin_shuffle(a, c, high);
            plane[3] = __builtin_shuffle(b, d, high);
        }
        for (int e = 0; e < 8; e++) {
            const vu v = plane[(e >> 2) + 2 * (e & 1)];
            out[e] = from_half(e & 2 ? v >> 16 : v & 0xffff, half);
        }
    }
}

/* Sixteen bytes or pairs of bytes, each in a word of its own. Bytes in two steps: GCC has no one instruction for it. */
INLINE vu load_bytes(const uint8_t *bytes) {
    vu8 v;
    memcpy(&v, bytes, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, vu16), vu);
}
INLINE vu load_pairs(const uint8_t *pairs) {
    vu16 v;
    memcpy(&v, pairs, sizeof v);
    return __builtin_convertvector(v, vu);
}

/* Scales and zeros of one group, in the order of scores. `scales` is what follows the half's codes. */
INLINE void load_scales(vf scale[4], vf zero[4], const uint8_t *scales, int room, int g, const kvc_layout *layout) {
    float natural[2][KVC_PAGE_TOKENS] __attribute__((aligned(64)));
    scales += kvc_scale_offset(layout, room, g, 0);
    for (int i = 0; i < KVC_PAGE_TOKENS / V; i++) {
        vf s, z = {0};
        if (layout->scale_dtype == KVC_STEP_E5M3) {
            const vu v = layout->zero_point ? load_pairs(scales + 2 * V * i) : load_bytes(scales + V * i);
            s = (vf)((v & 0xff) << 20) * 0x1p112f; /* kvc_e5m3_to_float */
            if (layout->zero_point) z = s * (__builtin_convertvector((vi)(v << 16) >> 24, vf) * 0.125f);
        } else if (layout->zero_point) {
            const vu v = load_words((const uint32_t *)scales + V * i);
            s = from_half(v & 0xffff, KVC_FLOAT16);
            z = from_half(v >> 16, KVC_FLOAT16);
        } else {
            s = from_half(load_pairs(scales + 2 * V * i), KVC_FLOAT16);
        }
        *(vf *)&natural[0][V * i] = s;
        *(vf *)&natural[1][V * i] = z;
    }
    float *const to[2] = {(float *)scale, (float *)zero};
    for (int part = 0; part < 2; part++)
        for (int e = 0; e < 4; e++)
            for (int c = 0; c < 4; c++)
                for (int t = 0; t < 4; t++)
                    to[part][16 * e + 4 * c + t] = natural[part][16 * t + 2 * c + (e >> 1) + 8 * (e & 1)];
}

/* ---- begin, end */

static void begin(kvc_attend_block *block, const float *rows) {
    const int d = block->layout->head_dim, n = block->queries, group = block->layout->group;
    for (int q = 0; q < n; q++) {
        for (int g = 0; g < d / group; g++) {
            float sum = 0.0f;
            for (int i = 0; i < group; i++) sum += rows[q * d + g * group + i];
            block->sum[g][q] = sum;
            block->bias[g][q] = 0.0f;
        }
        block->most[q] = -INFINITY;
        block->total[q] = 0.0f;
        for (int ct = 0; ct < d / KVC_TILE; ct++)
            for (int e = 0; e < 4; e++)
                for (int i = 0; i < V; i++)
                    block->query[((ct * 4 + e) * n + q) * V + i] = rows[q * d + 16 * ct + 4 * (i / 4) + e];
    }
    memset(block->sums, 0, (size_t)d * (size_t)n * V * sizeof(float));
}

static void end(const kvc_attend_block *block, float *rows) {
    const int d = block->layout->head_dim, n = block->queries;
    for (int q = 0; q < n; q++)
        for (int c = 0; c < d; c++) {
            float sum = block->bias[c / block->layout->group][q];
            for (int i = 0; i < V; i++) sum += block->sums[(c * n + q) * V + i];
            rows[q * d + c] = sum;
        }
}

/* Asks for the part-th of `parts` pieces of the next page: hardware does not foresee the stride that rows lie in. */
INLINE void fetch(const kvc_attend_page *page, int part, int parts) {
    const int64_t lines = page->next_bytes / 64, end = lines * (part + 1) / parts;
    for (int64_t i = lines * part / parts; i < end; i++) __builtin_prefetch(page->next + 64 * i, 0, 2);
}

/* ---- K */

INLINE void scores_of(const kvc_attend_block *block, const kvc_attend_page *page, float (*scores)[KVC_PAGE_TOKENS],
                      int bits, int room, int n) {
    const kvc_layout *layout = block->layout;
    const uint32_t *words[4];
    for (int i = 0; i < 4; i++) words[i] = (const uint32_t *)page->bytes[i];
    const int tiles = layout->head_dim / KVC_TILE, per_group = bits == 16 ? tiles : layout->group / KVC_TILE;
    const uint8_t *scales = page->bytes[0] + kvc_code_bytes(layout, bits, room);
    const float mid = kvc_mid(bits);
    for (int first = 0, g = 0; first < tiles; first += per_group, g++) {
        vf part[KVC_BLOCK][4]; /* [query][e] */
        for (int r = 0; r < 8; r++) {
            if (g == 0) fetch(page, r, 16);
            vf sum[2][KVC_BLOCK];
            for (int i = 0; i < 2; i++)
                for (int q = 0; q < n; q++) sum[i][q] = (vf){0};
            for (int ct = first; ct < first + per_group; ct++) {
                vf code[8];
                decode_row(code, words, bits, room, layout->half, ct, r);
                for (int e = 0; e < 8; e++)
                    for (int q = 0; q < n; q++)
                        sum[e >> 2][q] += code[e] * load(block->query + ((ct * 4 + (e & 3)) * n + q) * V);
            }
            /* over c: token 16*t + r + 8*i is element 4*(r>>1) + t of vector 2*(r&1) + i */
            for (int i = 0; i < 2; i++)
                for (int q = 0; q < n; q++) {
                    vf4 quarter[4];
                    memcpy(quarter, &sum[i][q], sizeof quarter);
                    const vf4 token = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
                    memcpy((float *)&part[q][2 * (r & 1) + i] + 4 * (r >> 1), &token, sizeof token);
                }
        }
        if (bits == 16) {
            for (int q = 0; q < n; q++) memcpy(scores[q], part[q], sizeof part[q]);
            return;
        }
        vf scale[4], zero[4];
        load_scales(scale, zero, scales, room, g, layout);
        for (int q = 0; q < n; q++)
            for (int e = 0; e < 4; e++) {
                const float sum = block->sum[g][q];
                const vf s = scale[e] * (part[q][e] - mid * sum) + zero[e] * sum;
                vf *to = (vf *)scores[q] + e;
                *to = g ? *to + s : s;
            }
    }
}

static const vi token_order[4] = {
    {0, 16, 32, 48, 2, 18, 34, 50, 4, 20, 36, 52, 6, 22, 38, 54},
    {8, 24, 40, 56, 10, 26, 42, 58, 12, 28, 44, 60, 14, 30, 46, 62},
    {1, 17, 33, 49, 3, 19, 35, 51, 5, 21, 37, 53, 7, 23, 39, 55},
    {9, 25, 41, 57, 11, 27, 43, 59, 13, 29, 45, 61, 15, 31, 47, 63},
};

INLINE void scores_n(const kvc_attend_block *block, const kvc_attend_page *page, float (*scores)[KVC_PAGE_TOKENS],
                     int n) {
    switch (page->k_bits) {
    case 2: scores_of(block, page, scores, 2, KVC_PAGE_TOKENS, n); break;
    case 3: scores_of(block, page, scores, 3, KVC_PAGE_TOKENS, n); break;
    case 4: scores_of(block, page, scores, 4, KVC_PAGE_TOKENS, n); break;
    case 8: scores_of(block, page, scores, 8, KVC_PAGE_TOKENS, n); break;
    default:
        if (page->room == KVC_PAGE_TOKENS)
            scores_of(block, page, scores, 16, KVC_PAGE_TOKENS, n);
        else
            scores_of(block, page, scores, 16, KVC_TAIL_TOKENS, n);
    }
    for (int q = 0; q < n; q++) {
        if (block->softcap > 0.0f)
            for (int i = 0; i < KVC_PAGE_TOKENS; i++)
                scores[q][i] = block->softcap * tanhf(scores[q][i] / block->softcap);
        if (page->visible[q] >= KVC_PAGE_TOKENS) continue;
        for (int e = 0; e < 4; e++) {
            vf *s = (vf *)scores[q] + e;
            *s = pick((vu)(token_order[e] < page->visible[q]), *s, splat(-INFINITY));
        }
    }
}

static void scores(const kvc_attend_block *block, const kvc_attend_page *page, float (*out)[KVC_PAGE_TOKENS]) {
    switch (block->queries) {
    case 1: scores_n(block, page, out, 1); break;
    case 2: scores_n(block, page, out, 2); break;
    default: scores_n(block, page, out, 4);
    }
}

/* ---- softmax */

/* e^x for x <= about 88, relative error 2e-7; 0 below -87. */
INLINE vf exponential(vf x) {
    const vf y = x * 1.44269504f, magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const vf n = (y + magic) - magic, f = y - n;
    vf p = splat(1.52527338e-5f);
    p = p * f + 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    const vf power = (vf)((vu)(__builtin_convertvector(n, vi) + 127) << 23);
    return pick((vu)(x > -87.0f), p * power, (vf){0});
}

INLINE float sum_of(vf v) {
    vf4 quarter[4];
    memcpy(quarter, &v, sizeof quarter);
    const vf4 sum = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

INLINE float largest(const float *scores) {
    vf m = load(scores);
    for (int e = 1; e < 4; e++) {
        const vf s = load(scores + V * e);
        m = pick((vu)(s > m), s, m);
    }
    vf4 quarter[4];
    memcpy(quarter, &m, sizeof quarter);
    for (int i = 2; i > 0; i /= 2)
        for (int j = 0; j < i; j++)
            for (int k = 0; k < 4; k++)
                quarter[j][k] = quarter[j + i][k] > quarter[j][k] ? quarter[j + i][k] : quarter[j][k];
    float most = quarter[0][0];
    for (int k = 1; k < 4; k++) most = quarter[0][k] > most ? quarter[0][k] : most;
    return most;
}

static void probabilities(float most, float *scores) {
    for (int e = 0; e < 4; e++) *((vf *)scores + e) = exponential(load(scores + V * e) - most);
}

/* ---- V */

INLINE void values_of(kvc_attend_block *block, const kvc_attend_page *page, float (*p)[KVC_PAGE_TOKENS], int bits,
                      int room, int n) {
    const kvc_layout *layout = block->layout;
    const uint32_t *words[4];
    for (int i = 0; i < 4; i++)
        words[i] = (const uint32_t *)(page->bytes[i] + kvc_half_bytes(layout, page->k_bits, room));
    const int tiles = layout->head_dim / KVC_TILE, per_group = bits == 16 ? tiles : layout->group / KVC_TILE;
    const uint8_t *scales = (const uint8_t *)words[0] + kvc_code_bytes(layout, bits, room);
    const float mid = kvc_mid(bits);
    for (int first = 0, g = 0; first < tiles; first += per_group, g++) {
        vf weight[KVC_BLOCK][4];
        if (bits == 16) {
            for (int q = 0; q < n; q++) memcpy(weight[q], p[q], sizeof weight[q]);
        } else {
            vf scale[4], zero[4];
            load_scales(scale, zero, scales, room, g, layout);
            for (int q = 0; q < n; q++) {
                vf bias = {0};
                for (int e = 0; e < 4; e++) {
                    const vf probability = load(p[q] + V * e);
                    weight[q][e] = probability * scale[e];
                    bias += probability * zero[e] - mid * weight[q][e];
                }
                block->bias[g][q] += sum_of(bias);
            }
        }
        for (int ct = first; ct < first + per_group; ct++) {
            fetch(page, tiles + ct, 2 * tiles);
            for (int r = 0; r < 8; r++) {
                vf code[8];
                decode_row(code, words, bits, room, layout->half, ct, r);
                for (int i = 0; i < 2; i++)
                    for (int q = 0; q < n; q++) {
                        vf *sum = (vf *)(block->sums + ((16 * ct + r + 8 * i) * n + q) * V);
                        vf total = *sum;
                        for (int e = 0; e < 4; e++) total += code[4 * i + e] * weight[q][e];
                        *sum = total;
                    }
            }
        }
    }
}

INLINE void values_n(kvc_attend_block *block, const kvc_attend_page *page, float (*p)[KVC_PAGE_TOKENS], int n) {
    const int d = block->layout->head_dim;
    for (int q = 0; q < n; q++) {
        const float most = largest(p[q]);
        if (most == -INFINITY) {
            memset(p[q], 0, sizeof p[q]);
            continue;
        }
        /* Probabilities may grow to e^8 before the sums are brought back: a rescale costs half a page's work. */
        if (!(most <= block->most[q] + 8.0f)) {
            const float factor = expf(block->most[q] - most); /* 0 the first time */
            for (int c = 0; c < d; c++) {
                vf *sum = (vf *)(block->sums + (c * n + q) * V);
                *sum *= factor;
            }
            for (int g = 0; g < d / block->layout->group; g++) block->bias[g][q] *= factor;
            block->total[q] *= factor;
            block->most[q] = most;
        }
        probabilities(block->most[q], p[q]);
        const vf sum = (load(p[q]) + load(p[q] + V)) + (load(p[q] + 2 * V) + load(p[q] + 3 * V));
        block->total[q] += sum_of(sum);
    }
    switch (page->v_bits) {
    case 2: values_of(block, page, p, 2, KVC_PAGE_TOKENS, n); break;
    case 3: values_of(block, page, p, 3, KVC_PAGE_TOKENS, n); break;
    case 4: values_of(block, page, p, 4, KVC_PAGE_TOKENS, n); break;
    case 8: values_of(block, page, p, 8, KVC_PAGE_TOKENS, n); break;
    default:
        if (page->room == KVC_PAGE_TOKENS)
            values_of(block, page, p, 16, KVC_PAGE_TOKENS, n);
        else
            values_of(block, page, p, 16, KVC_TAIL_TOKENS, n);
    }
}

static void values(kvc_attend_block *block, const kvc_attend_page *page, float (*p)[KVC_PAGE_TOKENS]) {
    switch (block->queries) {
    case 1: values_n(block, page, p, 1); break;
    case 2: values_n(block, page, p, 2); break;
    default: values_n(block, page, p, 4);
    }
}

extern const kvc_attend_tile NAME(kvc_attend_tile);
const kvc_attend_tile NAME(kvc_attend_tile) = {TEXT1(KVC_ISA), begin, scores, values, end, probabilities};
