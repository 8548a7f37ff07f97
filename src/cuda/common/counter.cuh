// Counters in global memory by which the CTAs of one launch order their work.
#pragma once

#include <cstdint>

namespace strobe::cuda {

__device__ __forceinline__ int load_relaxed(const int32_t* counter) {
    int x;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(counter) : "memory");
    return x;
}

__device__ __forceinline__ int load_acquire(const int32_t* counter) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(counter) : "memory");
    return x;
}

/// Adds once everything that this thread knows to have happened has happened for the whole device.
__device__ __forceinline__ void add_release(int32_t* counter, int x) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(x) : "memory");
}

}  // namespace strobe::cuda
