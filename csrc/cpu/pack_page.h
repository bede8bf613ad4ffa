/* pack_page.h: one page from tiles of rows, and tiles of rows from one page; what pack and append share.
 * A tile is 16 tokens, channel-major: x[channel][token], so that all arithmetic runs across tokens. */
#pragma once
#include "core/core.h"
#include "kvcomp/pack.h"

typedef float kvc_tile[KVC_MAX_HEAD_DIM][KVC_TILE];

typedef struct {
    const kvc_layout *layout;
    int scale, stochastic, layer, list;
    uint64_t seed;
} kvc_rounding;

/* In place: orthonormal Hadamard over the first d channels, in blocks of the largest power of two dividing d. */
void kvc_tile_rotate(kvc_tile x, int d);
/* The same for one row, clamped first: the same bits as a tile's token gets. */
void kvc_row_rotate(float *x, int d);
/* Clamps to +-2^96: pack.h, step 3. */
void kvc_tile_clamp(kvc_tile x, int d);

/* Half (0: K, 1: V) of the page at `page`: writes its tile `tile` of `bits` codes and scales. The half must be zero
 * bytes before its first tile. Tokens from `valid` on become zero bytes. numbers[j]: token j's number for Philox. */
void kvc_tile_write(uint8_t *page, int k_bits, int v_bits, int half, int tile, int valid, kvc_tile x,
                    const uint32_t *numbers, const kvc_rounding *rounding);
/* The tile's values, as stored (rotated where they were). */
void kvc_tile_read(kvc_tile x, const uint8_t *page, int k_bits, int v_bits, int half, int tile,
                   const kvc_layout *layout);
