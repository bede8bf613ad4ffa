/* w4_format.h: codes and scales of packed weights, one by one, and what the packers' checks are called. */
#pragma once
#include "core/core.h"
#include "kvcomp/w4.h"

kvc_status kvc_w4_pack_check(const kvc_w4_pack_args *args);
kvc_status kvc_w4_unpack_check(const kvc_w4_unpack_args *args);

/* Bits of the plane that begins below the upper `done` bits of a code of `bits`. */
static inline int kvc_w4_plane_bits(int bits, int done) {
    const int left = bits - done;
    return left >= 16 ? 16 : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

/* `at`: the scales of 64 rows and one group. Before kvc_w4_set_scale they are zero bytes. */
static inline uint32_t kvc_w4_get_scale(const uint8_t *at, int row, int bits) {
    uint32_t code = 0;
    const int r = row & 7, j = row >> 3;
    for (int done = 0; done < bits;) {
        const int plane = kvc_w4_plane_bits(bits, done);
        const uint8_t *byte = at + 8 * done + r * plane + plane * j / 8;
        uint32_t piece = byte[0];
        if (plane == 16) piece |= (uint32_t)byte[1] << 8;
        if (plane < 8) piece = piece >> (plane * j & 7) & ((1u << plane) - 1);
        code = code << plane | piece;
        done += plane;
    }
    return code;
}

static inline void kvc_w4_set_scale(uint8_t *at, int row, int bits, uint32_t code) {
    const int r = row & 7, j = row >> 3;
    for (int done = 0; done < bits;) {
        const int plane = kvc_w4_plane_bits(bits, done);
        uint8_t *byte = at + 8 * done + r * plane + plane * j / 8;
        const uint32_t piece = code >> (bits - done - plane) & ((1u << plane) - 1);
        byte[0] |= (uint8_t)(plane < 8 ? piece << (plane * j & 7) : piece);
        if (plane == 16) byte[1] |= (uint8_t)(piece >> 8);
        done += plane;
    }
}

/* What a code stands for, without the matrix's exponent. */
static inline float kvc_w4_scale(uint32_t code, int scale_bits) {
    return kvc_half_to_float((uint16_t)kvc_w4_scale_half(code, scale_bits), KVC_FLOAT16);
}
