// What the kernels share: 16-byte vectors of either precision, sums over a warp and a block, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "gpt/ops/exec.hpp"

namespace strobe::gpt::cuda {

using bf16 = __nv_bfloat16;

constexpr unsigned kFullWarp = 0xffffffffu;

inline void check_launch(const char* kernel) {
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(status));
}

inline cudaStream_t stream_of(const Exec& e) { return static_cast<cudaStream_t>(e.stream); }

inline unsigned blocks_for(int64_t count, int64_t per_block) {
    return static_cast<unsigned>((count + per_block - 1) / per_block);
}

/// Calls fn with a null pointer of the element type.
template <class Fn>
void by_precision(Precision precision, Fn&& fn) {
    if (precision == Precision::fp32)
        fn(static_cast<float*>(nullptr));
    else
        fn(static_cast<bf16*>(nullptr));
}

template <class T>
T* as(Buffer b) {
    constexpr Precision kExpected = std::is_same_v<std::remove_const_t<T>, float> ? Precision::fp32 : Precision::bf16;
    if (b.data && b.precision != kExpected)
        throw std::invalid_argument("operator: buffers of one call differ in precision");
    return static_cast<T*>(b.data);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ T from_float(float x) {
    if constexpr (std::is_same_v<T, float>)
        return x;
    else
        return __float2bfloat16(x);
}

/// N elements that are loaded and stored at once: 16 bytes, or one element where rows do not start on such a border.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
    T x[N];

    __device__ float operator[](int i) const { return to_float(x[i]); }
    __device__ void set(int i, float value) { x[i] = from_float<T>(value); }

    /// Of as many numbers, rounded two at a time where there is an instruction for that.
    __device__ static Vector of(const float (&values)[N]) {
        Vector v;
        if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
#pragma unroll
            for (int i = 0; i < N; i += 2) {
                const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i], values[i + 1]);
                v.x[i] = pair.x, v.x[i + 1] = pair.y;
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) v.set(i, values[i]);
        }
        return v;
    }
    __device__ static Vector load(const T* p) {
        Vector v;
        if constexpr (N * sizeof(T) == 16)
            *reinterpret_cast<uint4*>(v.x) = *reinterpret_cast<const uint4*>(p);
        else
            v.x[0] = *p;
        return v;
    }
    __device__ void store(T* p) const {
        if constexpr (N * sizeof(T) == 16)
            *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(x);
        else
            *p = x[0];
    }
};

/// N numbers of fp32 from an address that is a multiple of theirs, four at a time: one at a time a warp whose lanes
/// read N numbers each would touch every line N times.
template <int N>
__device__ void load_floats(const float* p, float (&x)[N]) {
    static_assert(N % 4 == 0);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const float4 v = *reinterpret_cast<const float4*>(p + i);
        x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
    }
}

template <class T>
constexpr int kVectorSize = 16 / sizeof(T);

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
    return x;
}
__device__ inline double warp_sum(double x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
    return x;
}

/// Over all threads of the block, to all of them; `slots` holds a value per warp. The order is fixed.
template <class X>
__device__ X block_sum(X x, X* slots) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) slots[warp] = x;
    __syncthreads();
    X sum = 0;
    for (int w = 0; w < warps; ++w) sum += slots[w];
    return sum;
}
__device__ inline float block_max(float x, float* slots) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) slots[warp] = x;
    __syncthreads();
    float m = slots[0];
    for (int w = 1; w < warps; ++w) m = fmaxf(m, slots[w]);
    return m;
}

}  // namespace strobe::gpt::cuda
