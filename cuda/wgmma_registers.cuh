/* wgmma_registers.cuh: wgmma with the 64-row operand from registers: 64 rows times 16 to 128 columns that lie in shared
 * memory. A warp's rows are 16 of the 64, laid out among its lanes as mma.m16n8k16 (k32 of bytes) has them. */
#pragma once
#include "hopper.cuh"

#ifdef KVC_HOPPER

namespace {

/* Keeps what makes and what reads registers on its side of this point: products that are under way take and give them
 * without the compiler's knowing. */
template <int N> __device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(int (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(uint32_t (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

/* d += a * b, of 32 unsigned bytes a row and signed ones a column; b: descriptor of [columns][32 bytes]. */
__device__ __forceinline__ void wgmma_bytes(int (&d)[16], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},{%16,%17,%18,%19},%20,1;"
                 : KVC_SUMS_16("+r", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma_bytes(int (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%"
                 "27,%28,%29,%30,%31},{%32,%33,%34,%35},%36,1;"
                 : KVC_SUMS_32("+r", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* d += a * b, of 16 16-bit floats; b: descriptor of [columns][16 of them]. */
template <bool BRAIN> __device__ __forceinline__ void wgmma_halves(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
#define PRODUCT(TYPE)                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE \
                 " {%0,%1,%2,%3,%4,%5,%6,%7},{%8,%9,%10,%11},%12,1,1,1,0;"   \
                 : KVC_SUMS_8("+f", d, 0)                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (BRAIN)
        PRODUCT("bf16");
    else
        PRODUCT("f16");
#undef PRODUCT
}

template <bool BRAIN> __device__ __forceinline__ void wgmma_halves(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
#define PRODUCT(TYPE)                                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " "                          \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},{%16,%17,%18,%19},%20,1,1,1,0;" \
                 : KVC_SUMS_16("+f", d, 0)                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (BRAIN)
        PRODUCT("bf16");
    else
        PRODUCT("f16");
#undef PRODUCT
}

template <bool BRAIN> __device__ __forceinline__ void wgmma_halves(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#define PRODUCT(TYPE)                                                                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "                                    \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%" \
                 "26,%27,%28,%29,%30,%31},{%32,%33,%34,%35},%36,1,1,1,0;"                                           \
                 : KVC_SUMS_32("+f", d, 0)                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (BRAIN)
        PRODUCT("bf16");
    else
        PRODUCT("f16");
#undef PRODUCT
}

template <bool BRAIN> __device__ __forceinline__ void wgmma_halves(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
#define PRODUCT(TYPE)                                                                                          \
    asm volatile(                                                                                              \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "                                       \
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%" \
        "27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%" \
        "52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"                                                      \
        ",{%64,%65,%66,%67},%68,1,1,1,0;"                                                                      \
        : KVC_SUMS_64("+f", d, 0)                                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (BRAIN)
        PRODUCT("bf16");
    else
        PRODUCT("f16");
#undef PRODUCT
}

} // namespace

#endif
