// Memory on its way to shared memory while a block computes, and barriers of some of a block's warps.
#pragma once

#include <cuda_runtime.h>

namespace strobe::gpt::cuda {

/// Begins to copy 16 bytes of device memory to shared memory. The thread that asks may read them behind
/// wait_for_copies; for others a barrier has to follow.
__device__ inline void copy_ahead(void* to, const void* from) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
/// Ends a group of copies, which may be empty.
__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Until no more than this many of the thread's latest groups are under way.
template <int Groups>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

/// Of `threads` threads, all of their warps; barrier 0 is __syncthreads.
__device__ inline void barrier_of(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace strobe::gpt::cuda
