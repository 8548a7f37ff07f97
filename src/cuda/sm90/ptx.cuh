// The Hopper instructions that C++ has no name for: mbarriers, tensor copies, named barriers, register reallocation.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace strobe::sm90 {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// An mbarrier in shared memory. Phase bits follow the usual convention: a fresh barrier is in phase 0, wait(0) returns
/// once phase 0 is complete, and wait(1) on a fresh barrier returns at once.
struct Barrier {
    uint64_t state;

    __device__ __forceinline__ void init(uint32_t arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(this)), "r"(arrivals));
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(this)) : "memory");
    }
    /// Arrives and announces the bytes that tensor copies will bring.
    __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(this)), "r"(bytes)
                     : "memory");
    }
    __device__ __forceinline__ bool test(uint32_t phase) {
        uint32_t done;
        asm volatile(
            "{.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(smem_address(this)), "r"(phase)
            : "memory");
        return done != 0;
    }
    __device__ __forceinline__ void wait(uint32_t phase) {
        while (!test(phase)) {
        }
    }
};

/// Makes barrier initialisation visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/// Makes this thread's ordinary shared memory stores visible to wgmma and the copy engine.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// L2 eviction policies as createpolicy encodes them.
enum class CachePolicy : uint64_t {
    normal = 0x1000000000000000ull,
    evict_first = 0x12F0000000000000ull,
    evict_last = 0x14F0000000000000ull,
};

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Copies one box of a (dim, row, head, batch) tensor to shared memory; its bytes count towards `barrier`.
__device__ __forceinline__ void tma_load(void* smem, const CUtensorMap* map, Barrier& barrier, int dim, int row, int head,
                                         int batch, CachePolicy policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_address(smem)),
        "l"(map), "r"(smem_address(&barrier)), "r"(dim), "r"(row), "r"(head), "r"(batch), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void register_limit_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void register_limit_lower() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// 2^x by the special function unit; -inf gives 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace strobe::sm90
