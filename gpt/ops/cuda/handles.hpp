// Objects of CUDA's runtime that somebody owns.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "cuda/device.hpp"

namespace strobe::gpt::cuda {

using strobe::cuda::check;

template <auto kDestroy>
struct Destroyer {
    template <class T>
    void operator()(T* object) const {
        kDestroy(object);
    }
};

using Stream = std::unique_ptr<CUstream_st, Destroyer<cudaStreamDestroy>>;
using Event = std::unique_ptr<CUevent_st, Destroyer<cudaEventDestroy>>;
using PinnedMemory = std::unique_ptr<void, Destroyer<cudaFreeHost>>;

}  // namespace strobe::gpt::cuda
