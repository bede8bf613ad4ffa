/* pack_host.cuh: what the host makes of a contract's arguments for the kernels that pack. */
#pragma once
#include "pack_rows.cuh"

namespace {

rows view(const kvc_tensor *t) {
    const int64_t size = kvc_dtype_size(t->dtype);
    const int64_t b = t->strides[0] * size, h = t->strides[1] * size, s = t->strides[2] * size;
    const uint64_t bits = (uintptr_t)t->data | (uint64_t)b | (uint64_t)h | (uint64_t)s;
    return {(char *)t->data, b, h, s, t->dtype, bits % (4 * size) == 0};
}

grouping make_grouping(const kvc_layout *layout) {
    const int tiles = layout->group / KVC_TILE;
    grouping g = {layout->group, tiles & -tiles, 0, 0};
    for (int j = 0; j < layout->head_dim / KVC_TILE; j++) {
        g.block_heads |= (uint32_t)(j % g.block_tiles == 0) << j;
        g.group_heads |= (uint32_t)(j % tiles == 0) << j;
    }
    return g;
}

} // namespace
