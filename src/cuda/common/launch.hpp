// What a kernel launch needs beside its parameters.
#pragma once

#include <cuda_runtime.h>

namespace strobe::cuda {

struct LaunchContext {
    cudaStream_t stream = nullptr;
    int device = 0;
    int num_sms = 0;
};

/// Raises a kernel's dynamic shared memory limit. Idempotent and cheap; legal while a stream is being captured.
template <typename Kernel>
cudaError_t allow_dynamic_smem(Kernel* kernel, int bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                bytes);
}

}  // namespace strobe::cuda
