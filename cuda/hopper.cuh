/* hopper.cuh: what wgmma's kernels say to the hardware: mbarriers, tensor copies (TMA), wgmma, clusters. */
#pragma once
#include <cuda.h>

#include "common.cuh"

/* The instructions exist in sm_90a's code alone; elsewhere the kernel has no body, and the host does not launch it. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVC_HOPPER 1
#endif

namespace {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

#ifdef KVC_HOPPER

/* ---- clusters */

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* The same place in another block's shared memory. */
__device__ __forceinline__ uint32_t shared_of(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

/* What all threads of the cluster have done before, all see behind it. */
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/* ---- mbarriers */

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* In another block of the cluster. No wider than this block's scope: what it lets go of was read by wgmma, and a fence
 * of the whole device a stage would cost more than the stage. */
__device__ __forceinline__ void barrier_arrive_at(uint32_t cluster_address) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address) : "memory");
}

/* Arrives, and tells how many bytes the phase waits for besides. */
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/* Waits for the end of the phase of this parity. CLUSTER: for words that another block of the cluster has sent. */
template <bool CLUSTER = false> __device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef KVC_BSR_GUARD
    const long long begin = clock64();
#endif
    for (;;) {
        uint32_t done;
        if (CLUSTER)
            asm volatile("{\n.reg .pred p;\n"
                         "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                         "selp.u32 %0, 1, 0, p;\n}"
                         : "=r"(done)
                         : "r"(barrier), "r"(parity)
                         : "memory");
        else
            asm volatile("{\n.reg .pred p;\n"
                         "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                         "selp.u32 %0, 1, 0, p;\n}"
                         : "=r"(done)
                         : "r"(barrier), "r"(parity)
                         : "memory");
        if (done) break;
#ifdef KVC_BSR_GUARD
        if (clock64() - begin > 4000000000ll) __trap(); /* two seconds: a phase that never ends */
#endif
    }
}

/* A word into another block's shared memory, and 4 bytes of its barrier's phase. */
__device__ __forceinline__ void store_async(uint32_t cluster_address, uint32_t value, uint32_t cluster_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(cluster_address),
                 "r"(value), "r"(cluster_barrier)
                 : "memory");
}

__device__ __forceinline__ void named_barrier(uint32_t name, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

/* ---- tensor copies */

__device__ __forceinline__ uint64_t policy_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t policy_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* A box of a matrix into this block's shared memory. */
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap *map, int x, int y, uint32_t barrier,
                                         uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
                 : "memory");
}

/* A box of the blocks into the shared memory of every block in `mask`, at the same place, for its own barrier. */
template <bool MULTICAST>
__device__ __forceinline__ void load_block_box(uint32_t to, const CUtensorMap *map, int x, int y, int z,
                                               uint32_t barrier, uint16_t mask, uint64_t policy) {
    if (MULTICAST)
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
            ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(to),
            "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(mask), "l"(policy)
            : "memory");
    else
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                     "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                     "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy)
                     : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap *map, uint32_t from, int x, int y, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(
            map),
        "r"(from), "r"(x), "r"(y), "l"(policy)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Waits until all but the latest LEFT stores have read their shared memory; until all are done. */
template <int LEFT> __device__ __forceinline__ void stores_read_but() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
__device__ __forceinline__ void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/* Ordinary stores to shared memory come before the tensor copies that follow a barrier. */
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* ---- wgmma */

enum { SWIZZLE_128 = 1, SWIZZLE_64 = 2 };

/* Operand in shared memory. `leading` and `stride` in bytes, as in PTX's matrix descriptor. */
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, int swizzle) {
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           (uint64_t)swizzle << 62;
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

template <int REGISTERS> __device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* Operands of asm: so many numbers of d from the first on, read and written; kind: "+f" or "+r". */
#define KVC_SUMS_8(kind, d, first)                                                                  \
    kind(d[first]), kind(d[first + 1]), kind(d[first + 2]), kind(d[first + 3]), kind(d[first + 4]), \
        kind(d[first + 5]), kind(d[first + 6]), kind(d[first + 7])
#define KVC_SUMS_16(kind, d, first) KVC_SUMS_8(kind, d, first), KVC_SUMS_8(kind, d, first + 8)
#define KVC_SUMS_32(kind, d, first) KVC_SUMS_16(kind, d, first), KVC_SUMS_16(kind, d, first + 16)
#define KVC_SUMS_64(kind, d, first) KVC_SUMS_32(kind, d, first), KVC_SUMS_32(kind, d, first + 32)

/* sums (64,256) = left (64,16) times right (16,256), plus what sums holds where `add`. right lies with its columns
 * together, left with its rows (TRANSPOSE: columns of op(A), that is, its stored rows) apart. */
#define KVC_WGMMA(TYPE)                                                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"                                  \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
                 " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
                 " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                \
                 " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                \
                 " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                \
                 " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "    \
                 " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 " \
                 "}, %128, %129, p, 1, 1, %131, 1;\n}\n"                                                            \
                 : KVC_SUMS_64("+f", d, 0), KVC_SUMS_64("+f", d, 64)                                                \
                 : "l"(left), "l"(right), "r"((int)add), "n"(TRANSPOSE ? 1 : 0))

template <bool BRAIN, bool TRANSPOSE>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t left, uint64_t right, bool add) {
    if (BRAIN)
        KVC_WGMMA("bf16");
    else
        KVC_WGMMA("f16");
}

#endif

} // namespace
