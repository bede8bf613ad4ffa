/* bsr_tile.cuh: tensor-core products of sm_80 and later, out of shared memory, for bsr_mma.cu and bsr_sddmm.cu. */
#pragma once
#include "bsr_job.cuh"

namespace {

__device__ __forceinline__ uint32_t tile_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 16 bytes to shared memory, of which the first `bytes` come from `from` and the others are zeros. ALIGNED: `from` is a
 * multiple of 16 bytes and the copy is done when tile_wait says so. */
template <bool ALIGNED> __device__ __forceinline__ void tile_copy(uint32_t to, const char *from, int bytes) {
    if constexpr (ALIGNED) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    } else {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t low = 4 * i < bytes ? ((const uint16_t *)from)[2 * i] : 0;
            const uint32_t high = 4 * i + 2 < bytes ? ((const uint16_t *)from)[2 * i + 1] : 0;
            word[i] = low | high << 16;
        }
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                     "r"(word[3])
                     : "memory");
    }
}

__device__ __forceinline__ void tile_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void tile_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* Four 8 x 8 matrices, a row each from one lane's address. */
template <bool TRANSPOSE> __device__ __forceinline__ void tile_load(uint32_t (&r)[4], uint32_t address) {
    if (TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
}

/* d (16,8) += a (16,16) times b (16,8). */
template <bool BRAIN>
__device__ __forceinline__ void tile_multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (BRAIN)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Where the 16-byte part `part` of row `row` lies among rows of BYTES: parts are exchanged so that eight rows' parts
 * of one number lie in different banks. */
template <int BYTES> __device__ __forceinline__ int tile_place(int row, int part) {
    constexpr int SHIFT = BYTES >= 128 ? 0 : BYTES == 64 ? 1 : 2, MASK = BYTES >= 128 ? 7 : BYTES / 16 - 1;
    return row * BYTES + ((part ^ (row >> SHIFT & MASK)) << 4);
}

} // namespace
