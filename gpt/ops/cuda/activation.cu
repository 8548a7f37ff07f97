#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kThreads = 256;
constexpr float kSqrt2OverPi = 0.7978845608f;
constexpr float kCubic = 0.044715f;

__device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
// 1 - 2 / (1 + e^2u): absolute error about 1e-7, which is below what either precision keeps of the result.
__device__ float tanh_of(float u) { return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * fminf(u, 20.0f))); }

__device__ float gelu(float x) { return 0.5f * x * (1.0f + tanh_of(kSqrt2OverPi * (x + kCubic * x * x * x))); }
__device__ float gelu_slope(float x) {
    const float t = tanh_of(kSqrt2OverPi * (x + kCubic * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
}

template <class T, int N>
__global__ void gelu_forward_kernel(int64_t count, const T* x, T* y) {
    using V = Vector<T, N>;
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
    if (i >= count) return;
    const V in = V::load(x + i);
    V out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.set(j, gelu(in[j]));
    out.store(y + i);
}

// dx may be x: each thread reads what it writes.
template <class T, int N>
__global__ void gelu_backward_kernel(int64_t count, const T* x, const T* dy, T* dx) {
    using V = Vector<T, N>;
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
    if (i >= count) return;
    const V in = V::load(x + i), d = V::load(dy + i);
    V out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.set(j, d[j] * gelu_slope(in[j]));
    out.store(dx + i);
}

template <class T, int N>
__global__ void swiglu_forward_kernel(int64_t rows, int64_t ffn, const T* x, T* y) {
    using V = Vector<T, N>;
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
    if (i >= rows * ffn) return;
    const int64_t row = i / ffn, gate = i + row * ffn;
    const V g = V::load(x + gate), u = V::load(x + gate + ffn);
    V out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.set(j, g[j] * sigmoid(g[j]) * u[j]);
    out.store(y + i);
}

template <class T, int N>
__global__ void swiglu_backward_kernel(int64_t rows, int64_t ffn, const T* x, const T* dy, T* dx) {
    using V = Vector<T, N>;
    const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
    if (i >= rows * ffn) return;
    const int64_t row = i / ffn, gate = i + row * ffn;
    const V g = V::load(x + gate), u = V::load(x + gate + ffn), d = V::load(dy + i);
    V dgate, dup;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const float s = sigmoid(g[j]);
        dup.set(j, d[j] * g[j] * s);
        dgate.set(j, d[j] * u[j] * s * (1.0f + g[j] * (1.0f - s)));
    }
    dgate.store(dx + gate);
    dup.store(dx + gate + ffn);
}

/// Calls launch(type, width, blocks): a thread takes a vector where rows are made of whole ones, else a number.
template <class Fn>
void by_width(Precision precision, int64_t rows, int64_t ffn, Fn&& launch) {
    by_precision(precision, [&](auto* type) {
        const auto with = [&](auto width) { launch(type, width, blocks_for(rows * ffn, kThreads * width)); };
        constexpr int kWide = kVectorSize<std::remove_pointer_t<decltype(type)>>;
        ffn % kWide == 0 ? with(std::integral_constant<int, kWide>()) : with(std::integral_constant<int, 1>());
    });
}

}  // namespace

void activation_forward(Exec& e, const ActivationForward& a) {
    by_width(a.x.precision, a.rows, a.ffn, [&](auto* type, auto width, unsigned blocks) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (a.kind == ActivationKind::gelu)
            gelu_forward_kernel<T, width>
                <<<blocks, kThreads, 0, stream_of(e)>>>(a.rows * a.ffn, as<T>(a.x), as<T>(a.y));
        else
            swiglu_forward_kernel<T, width>
                <<<blocks, kThreads, 0, stream_of(e)>>>(a.rows, a.ffn, as<T>(a.x), as<T>(a.y));
    });
    check_launch("activation_forward");
}

void activation_backward(Exec& e, const ActivationBackward& a) {
    by_width(a.x.precision, a.rows, a.ffn, [&](auto* type, auto width, unsigned blocks) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (a.kind == ActivationKind::gelu)
            gelu_backward_kernel<T, width>
                <<<blocks, kThreads, 0, stream_of(e)>>>(a.rows * a.ffn, as<T>(a.x), as<T>(a.dy), as<T>(a.dx));
        else
            swiglu_backward_kernel<T, width>
                <<<blocks, kThreads, 0, stream_of(e)>>>(a.rows, a.ffn, as<T>(a.x), as<T>(a.dy), as<T>(a.dx));
    });
    check_launch("activation_backward");
}

}  // namespace strobe::gpt::cuda
