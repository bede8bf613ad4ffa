/* w4_ptx.cuh: the instructions that w4's kernels are made of: copies, barriers, products, codes to numbers. */
#pragma once
#include <cuda.h>

#include "w4_job.cuh"

namespace {

__device__ __forceinline__ uint32_t w4_shared(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* ---- barriers of shared memory */

__device__ __forceinline__ void w4_barrier_init(uint32_t bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(bar), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void w4_barriers_ready() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    __syncthreads();
}

/* Of barriers that no other warp, but copies, uses. */
__device__ __forceinline__ void w4_own_barriers_ready() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    __syncwarp();
}

__device__ __forceinline__ void w4_barrier_arrive(uint32_t bar) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state,[%0];}" ::"r"(bar) : "memory");
}

/* Without a branch, which between products keeps the compiler from letting them run on. */
__device__ __forceinline__ void w4_barrier_arrive_if(uint32_t bar, bool yes) {
    asm volatile(
        "{.reg .b64 state; .reg .pred p; setp.ne.u32 p,%1,0; @p mbarrier.arrive.shared::cta.b64 state,[%0];}" ::"r"(
            bar),
        "r"((uint32_t)yes)
        : "memory");
}

/* Once this thread's cp.async are complete; the barrier counts it. */
__device__ __forceinline__ void w4_barrier_arrive_after_copies(uint32_t bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void w4_barrier_wait(uint32_t bar, int parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; LOOP: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @!p bra LOOP;}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
#else
    uint32_t ok = 0;
    while (!ok)
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
                     : "=r"(ok)
                     : "r"(bar), "r"(parity)
                     : "memory");
#endif
}

/* ---- copies to shared memory */

/* 16 bytes, or zeros where `bytes` is 0. Between them all 16 would be read. */
__device__ __forceinline__ void w4_copy16(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* sm_90 and later. */
__device__ __forceinline__ uint64_t w4_read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
    return policy;
}

/* An arrival, and bytes that copies will bring before the barrier's phase ends. */
__device__ __forceinline__ void w4_expect(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void w4_copy_counted(uint32_t to, const void *from, int bytes, uint32_t bar,
                                                uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0],[%1],%2,[%3],%4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar), "l"(policy)
                 : "memory");
}

/* Rows of x from `row` on, 64 inputs each, in 128 bytes whose pieces of 16 lie where w4_turned says. */
__device__ __forceinline__ void w4_copy_rows(uint32_t to, const CUtensorMap *map, int input, int row, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1,{%2,%3}],[%4];" ::"r"(to),
        "l"(map), "r"(input), "r"(row), "r"(bar)
        : "memory");
}

/* All rows of x, 64 inputs each, from those `chunk` on, of a tensor map of rank 3. */
__device__ __forceinline__ void w4_copy_pieces(uint32_t to, const CUtensorMap *map, int chunk, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0],[%1,{%2,%2,%3}],[%4];" ::"r"(to),
                 "l"(map), "r"(0), "r"(chunk), "r"(bar)
                 : "memory");
}

/* Where piece 0..7 of the 128 bytes at `line` lies: the swizzle of tensor maps, which makes columns free of conflicts.
 */
__device__ __forceinline__ uint32_t w4_turned(uint32_t line, int piece) {
    return line + ((uint32_t)(piece << 4) ^ (line >> 3 & 0x70));
}

/* One lane of a warp that is together: the compiler knows that it is one. */
__device__ __forceinline__ bool w4_elected() {
    uint32_t one;
    asm volatile("{.reg .pred p; elect.sync _|p,0xffffffff; selp.u32 %0,1,0,p;}" : "=r"(one));
    return one != 0;
}

/* The map's first use does not wait for it. */
__device__ __forceinline__ void w4_prefetch_map(const CUtensorMap *map) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

/* ---- clusters: sm_90 and later */

/* The others have come here: what they have loaded, they have. */
__device__ __forceinline__ void w4_cluster_met() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

/* To where `at` lies in the shared memory of the cluster's block `rank`, whose barrier there counts the 16 bytes. */
__device__ __forceinline__ void w4_send(uint32_t at, uint32_t bar, int rank, float x, float y, float z, float w) {
    asm volatile(
        "{.reg .u32 there,counts; mapa.shared::cluster.u32 there,%0,%2; mapa.shared::cluster.u32 counts,%1,%2; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there],{%3,%4,%5,%6},[counts];}" ::"r"(at),
        "r"(bar), "r"(rank), "f"(x), "f"(y), "f"(z), "f"(w)
        : "memory");
}

__device__ __forceinline__ float4 w4_load_sums(uint32_t at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3},[%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
    return v;
}

/* ---- elements of bias and out */

__device__ __forceinline__ float w4_load(const char *p, int dtype, int64_t i) {
    if (dtype == KVC_FLOAT32) return ((const float *)p)[i];
    return kvc_cuda_half_to_float(((const uint16_t *)p)[i], dtype);
}

__device__ __forceinline__ void w4_store(char *row, int dtype, int64_t i, float value) {
    if (dtype == KVC_FLOAT32)
        ((float *)row)[i] = value;
    else
        ((uint16_t *)row)[i] = (uint16_t)kvc_cuda_floats_to_halves(value, value, dtype);
}

/* ---- partial results that are their own flags: read past the first cache, and written whole */

constexpr uint32_t EMPTY = ~0u; /* a word that is not there yet */

/* A sum's bits, which are not EMPTY. */
__device__ __forceinline__ uint32_t w4_part(float sum) {
    const uint32_t bits = __float_as_uint(sum);
    return bits == EMPTY ? 0x7fffffffu : bits;
}

__device__ __forceinline__ void w4_load_parts(uint32_t (&v)[4], const uint32_t *from) {
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(from)
                 : "memory");
}

__device__ __forceinline__ void w4_store_parts(uint32_t *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.volatile.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

/* ---- operands from shared memory */

__device__ __forceinline__ void w4_load_codes(uint32_t (&v)[4], uint32_t at) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at));
}

__device__ __forceinline__ void w4_load_columns(uint32_t (&b)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(at)
                 : "memory");
}

template <typename T> struct w4_type;

template <> struct w4_type<__half> {
    static constexpr int DTYPE = KVC_FLOAT16;
    /* Four pairs of q from a word of codes, exact: a code in the mantissa of 256 or 16 is that number plus it. */
    static __device__ __forceinline__ void numbers(uint32_t (&a)[4], uint32_t word) {
        const uint32_t next = __funnelshift_r(word, word, 8);
        pairs<0x003c003cu, 0x5c005c00u, 264>(a[0], word);
        pairs<0x03c003c0u, 0x4c004c00u, 24>(a[1], word);
        pairs<0x003c003cu, 0x5c005c00u, 264>(a[2], next);
        pairs<0x03c003c0u, 0x4c004c00u, 24>(a[3], next);
    }
    template <uint32_t MASK, uint32_t BASE, int MIDDLE>
    static __device__ __forceinline__ void pairs(uint32_t &out, uint32_t word) {
        uint32_t bits;
        asm("lop3.b32 %0,%1,%2,%3,0xea;" : "=r"(bits) : "r"(word), "n"(MASK), "n"(BASE));
        const __half2 value = __hsub2(*(const __half2 *)&bits, __float2half2_rn((float)MIDDLE));
        out = *(const uint32_t *)&value;
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <> struct w4_type<__nv_bfloat16> {
    static constexpr int DTYPE = KVC_BFLOAT16;
    /* As above; a mantissa of 7 bits takes one code, in that of 32. */
    static __device__ __forceinline__ void numbers(uint32_t (&a)[4], uint32_t word) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t turned = i ? __funnelshift_r(word, word, 4 * i) : word;
            uint32_t bits;
            asm("lop3.b32 %0,%1,%2,%3,0xea;" : "=r"(bits) : "r"(turned), "n"(0x003c003cu), "n"(0x42004200u));
            const __nv_bfloat162 value = __hsub2(*(const __nv_bfloat162 *)&bits, __float2bfloat162_rn(40.0f));
            a[i] = *(const uint32_t *)&value;
        }
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

/* ---- scales */

/* Where the bits of the scales of rows r and r + 8 of 16 rows `tile` of 64 lie in a group's, by planes of 16, 8, 4, 2
 * and 1 bits, and how far those of the last two are shifted. */
struct w4_planes {
    int at16, at8, at4, at2, at1, shift2, shift1;
};

__device__ __forceinline__ w4_planes w4_planes_of(const w4_job &a, int r, int tile) {
    return {16 * r + 4 * tile,
            8 * r + 2 * tile,
            a.plane_at[0] + 4 * r + tile,
            a.plane_at[1] + 2 * r + (tile >> 1),
            a.plane_at[2] + r,
            4 * (tile & 1),
            2 * tile};
}

/* fp16's bits of those scales (r in the low half), without the matrix's exponent. `at`: the scales of 64 rows and one
 * group, in shared memory, and 128 bytes that may be read. No branch depends on the format: what planes that are not
 * there give is multiplied by 0. */
__device__ __forceinline__ uint32_t w4_scale_pair(const w4_job &a, const char *at, const w4_planes &of) {
    const uint32_t v16 = *(const uint32_t *)(at + of.at16), v8 = *(const uint16_t *)(at + of.at8);
    const uint32_t v4 = *(const uint8_t *)(at + of.at4), v2 = *(const uint8_t *)(at + of.at2) >> of.shift2;
    const uint32_t v1 = *(const uint8_t *)(at + of.at1) >> of.shift1;
    const uint32_t pair =
        __byte_perm(v8, 0, 0x4140) * a.plane_factor[0] + (v4 * 0x1001 & 0x000f000f) * a.plane_factor[1] +
        ((v2 * 0x4001) & 0x00030003) * a.plane_factor[2] + ((v1 * 0x8001) & 0x00010001) * a.plane_factor[3];
    return a.scale_bits == 16 ? v16 : pair;
}

/* The same of 16 rows and of the next 16, whose number `of` is of, and even. `BITS`: of a code; 0: as `a` says. Codes
 * of 10 bits are planes of 8 and of 2. */
template <int BITS>
__device__ __forceinline__ void w4_scale_pairs(uint32_t (&pair)[2], const w4_job &a, uint32_t at, const w4_planes &of) {
    uint32_t v16[2], v8, v4, v2, v1;
    static_assert(BITS == 0 || BITS == 10, "formats that have a reader");
    if (BITS == 10) {
        asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v8) : "r"(at + of.at8));
        asm volatile("ld.shared.u8 %0,[%1];" : "=r"(v2) : "r"(at + of.at2));
#pragma unroll
        for (int i = 0; i < 2; i++)
            pair[i] = __byte_perm(v8, 0, i ? 0x4342 : 0x4140) * 0x80 + ((v2 * (i ? 0x8002 : 0x80020)) & 0x00600060);
        return;
    }
    asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v16[0]), "=r"(v16[1]) : "r"(at + of.at16));
    asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v8) : "r"(at + of.at8));
    asm volatile("ld.shared.u16 %0,[%1];" : "=r"(v4) : "r"(at + of.at4));
    asm volatile("ld.shared.u8 %0,[%1];" : "=r"(v2) : "r"(at + of.at2));
    asm volatile("ld.shared.u8 %0,[%1];" : "=r"(v1) : "r"(at + of.at1));
    v1 >>= of.shift1;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        pair[i] = __byte_perm(v8, 0, i ? 0x4342 : 0x4140) * a.plane_factor[0] +
                  ((v4 >> (8 * i) & 0xff) * 0x1001 & 0x000f000f) * a.plane_factor[1] +
                  ((v2 >> (4 * i)) * 0x4001 & 0x00030003) * a.plane_factor[2] +
                  ((v1 >> (2 * i)) * 0x8001 & 0x00010001) * a.plane_factor[3];
        if (a.scale_bits == 16) pair[i] = v16[i];
    }
}

} // namespace
