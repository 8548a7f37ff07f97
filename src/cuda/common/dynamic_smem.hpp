// A kernel's dynamic shared memory limit, raised once per device: asking the runtime takes a tenth as long as a launch.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/common/launch.hpp"

namespace strobe::cuda {

/// allow_dynamic_smem for a kernel whose limit never changes. It lasts
/// until cudaDeviceReset, which ends every context of CUDA's runtime.
template <auto* kKernel>
cudaError_t allow_dynamic_smem_once(int bytes, int device) {
    static std::atomic<uint64_t> raised{0};  // one bit per device
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (raised.load(std::memory_order_acquire) & bit) return cudaSuccess;
    const cudaError_t status = allow_dynamic_smem(kKernel, bytes);
    if (status == cudaSuccess) raised.fetch_or(bit, std::memory_order_release);
    return status;
}

}  // namespace strobe::cuda
