// The Hopper instructions that C++ has no name for: mbarriers, tensor copies, named barriers, register
// reallocation, dependent launches.
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
    /// test() may sleep a while; this one answers at once.
    __device__ __forceinline__ bool peek(uint32_t phase) {
        uint32_t done;
        asm volatile(
            "{.reg .pred p;\n"
            "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
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
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

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
__device__ __forceinline__ void tma_load(void* smem, const CUtensorMap* map, Barrier& barrier, int dim, int row,
                                         int head, int batch, CachePolicy policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_address(smem)),
        "l"(map), "r"(smem_address(&barrier)), "r"(dim), "r"(row), "r"(head), "r"(batch), "l"(policy)
        : "memory");
}

/// Copies one box from shared memory; coordinates outside the tensor are dropped. Part of the thread's open bulk group.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t smem, int dim, int row, int head,
                                          int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(smem), "r"(dim), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Waits until this thread's bulk groups have read their shared memory.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

/// Four 8 x 8 matrices of 16-bit elements, fragments as mma
/// accumulators hold them; lane 8 i + j gives row j of matrix i.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared_vector(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

/// 16 aligned bytes to global memory. (The compiler splits a plain uint4 store when it fails to see the alignment.)
__device__ __forceinline__ void store_global_vector(void* address, const uint4& x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
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

/// Waits until the kernels this one was launched behind have finished and their writes are visible.
__device__ __forceinline__ void wait_for_upstream_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
/// Lets the kernel behind this one start as soon as there is room.
__device__ __forceinline__ void release_downstream_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/// 2^x by the special function unit; -inf gives 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace strobe::sm90
