#include "gpt/ops/cuda/noise.hpp"

#include "gpt/ops/cuda/common.cuh"

namespace strobe::gpt::cuda {

namespace {

template <class T>
__global__ void noise_kernel(T* data, int64_t count, uint32_t seed) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
        uint32_t x = static_cast<uint32_t>(i) * 2654435761u ^ seed * 0x9E3779B9u;  // a 32-bit mixer, after Murmur3
        x = (x ^ x >> 16) * 0x85EBCA6Bu;
        x = (x ^ x >> 13) * 0xC2B2AE35u;
        x ^= x >> 16;
        data[i] = from_float<T>(static_cast<float>(x) * 0x1.0p-31f - 1.0f);
    }
}

}  // namespace

void fill_noise(void* stream, Buffer data, int64_t count, uint32_t seed) {
    by_precision(data.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        noise_kernel<T><<<1024, 256, 0, static_cast<cudaStream_t>(stream)>>>(as<T>(data), count, seed);
    });
    check_launch("fill_noise");
}

}  // namespace strobe::gpt::cuda
