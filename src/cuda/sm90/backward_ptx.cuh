// Instructions that only the backward pass needs: ragged and bulk copies, vector reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/params.hpp"
#include "cuda/sm90/ptx.cuh"

namespace strobe::sm90 {

/// Where one sequence of one head lies in a ragged tensor map.
struct RaggedCoordinates {
    int row_shift = 0;  // limit - length
    int head = 0;
    int end = 0;        // first + length
    int batch = 0;
};

__device__ __forceinline__ void ragged_load(uint32_t smem, const CUtensorMap& map, Barrier& barrier, int col, int row,
                                            const RaggedCoordinates& at) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2];" ::"r"(smem),
        "l"(&map), "r"(smem_address(&barrier)), "r"(col), "r"(at.row_shift + row), "r"(at.head), "r"(at.end),
        "r"(at.batch)
        : "memory");
}

/// Copies `bytes` (a multiple of 16) from global memory; they count towards `barrier`.
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* global, uint32_t bytes, Barrier& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
                 "l"(global), "r"(bytes), "r"(smem_address(&barrier))
                 : "memory");
}

/// The other CTA of a pair, seen from this one: its shared memory has the same layout.
struct Peer {
    uint32_t rank;  // the other's

    __device__ __forceinline__ uint32_t address(const void* mine) const {
        uint32_t theirs;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(smem_address(mine)), "r"(rank));
        return theirs;
    }
    __device__ __forceinline__ void arrive(Barrier& barrier) const {
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address(&barrier))
                     : "memory");
    }
    __device__ __forceinline__ void store(int& mine, int value) const {
        asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(address(&mine)), "r"(value) : "memory");
    }
    /// Copies `bytes` to the same place; they count towards the other's `barrier`.
    __device__ __forceinline__ void copy(const void* from, uint32_t bytes, Barrier& barrier) const {
        asm volatile(
            "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                address(from)),
            "r"(smem_address(from)), "r"(bytes), "r"(address(&barrier))
            : "memory");
    }
};

/// Orders what the other CTA wrote before it arrived.
__device__ __forceinline__ void wait_for_peer(Barrier& barrier, uint32_t phase) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(smem_address(&barrier)), "r"(phase)
            : "memory");
    }
}

/// Between what generic accesses did to global memory and what bulk copies will do, either way round.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ void reduce_add(float* global, float x, float y, float z, float w) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(x), "f"(y), "f"(z),
                 "f"(w)
                 : "memory");
}

/// Adds fp32 numbers from shared memory to global memory. Part of the thread's open bulk group.
__device__ __forceinline__ void bulk_reduce_add(float* global, uint32_t smem, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(smem),
                 "r"(bytes)
                 : "memory");
}
/// Waits until this thread's bulk groups are complete, but for the last kGroups.
template <int kGroups>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared_vector(uint32_t address, float x, float y, float z, float w) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

/// Loads what store_matrices stored.
__device__ __forceinline__ void load_matrices(uint32_t smem, uint32_t (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t smem, uint32_t (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}

/// Two fp32 values as a pair of 16-bit ones, `lo` in the low half.
template <DType kType>
__device__ __forceinline__ uint32_t pack_pair(float lo, float hi) {
    uint32_t r;
    if constexpr (kType == DType::bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    }
    return r;
}

template <DType kType>
__device__ __forceinline__ float2 unpack_pair(uint32_t r) {
    if constexpr (kType == DType::bf16) {
        return make_float2(__uint_as_float(r << 16), __uint_as_float(r & 0xFFFF0000u));
    } else {
        return __half22float2(*reinterpret_cast<__half2*>(&r));
    }
}

}  // namespace strobe::sm90
