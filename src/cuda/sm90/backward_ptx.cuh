// Instructions that only the backward pass needs: ragged and bulk copies, vector reductions, dependent launches.
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
        "l"(&map), "r"(smem_address(&barrier)), "r"(col), "r"(at.row_shift + row), "r"(at.head), "r"(at.end), "r"(at.batch)
        : "memory");
}

/// Copies `bytes` (a multiple of 16) from global memory; they count towards `barrier`.
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* global, uint32_t bytes, Barrier& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
                 "l"(global), "r"(bytes), "r"(smem_address(&barrier))
                 : "memory");
}

__device__ __forceinline__ void reduce_add(float* global, float x, float y, float z, float w) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(x), "f"(y), "f"(z), "f"(w)
                 : "memory");
}

/// Waits until the kernels this one was launched behind have finished and their writes are visible.
__device__ __forceinline__ void wait_for_upstream_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
/// Lets the kernel behind this one start as soon as there is room.
__device__ __forceinline__ void release_downstream_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

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
