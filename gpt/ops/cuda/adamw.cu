#include <cmath>

#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kThreads = 256;

struct Rates {
    float beta1, beta2, eps;
    float decay;           // lr * weight_decay
    float step_size;       // lr / (1 - beta1^t)
    float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
    float clip_norm;
};

__device__ bool decays(const AdamWSegment* segments, int count, int64_t element) {
    int low = 0, high = count;  // the last segment that begins at or before the element is in [low, high)
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (segments[middle].offset <= element)
            low = middle;
        else
            high = middle;
    }
    return segments[low].decay;
}

// A thread per four elements: segments begin at multiples of an arena's alignment, so all four decay alike.
__global__ void adamw_kernel(int64_t size, const AdamWSegment* segments, int num_segments, float4* values, const float4* grads,
                             float4* m, float4* v, const double* squared_norm, Rates k, bf16* narrow) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (4 * i >= size) return;
    float scale = 1.0f;
    if (squared_norm) {
        const float norm = static_cast<float>(sqrt(*squared_norm));
        if (norm > k.clip_norm) scale = k.clip_norm / (norm + 1e-6f);
    }
    const float keep = decays(segments, num_segments, 4 * i) ? 1.0f - k.decay : 1.0f;
    float4 w4 = values[i], m4 = m[i], v4 = v[i];
    const float4 g4 = grads[i];
    const auto update = [&](float& w, float& first, float& second, float gradient) {
        const float g = gradient * scale;
        first = k.beta1 * first + (1.0f - k.beta1) * g;
        second = k.beta2 * second + (1.0f - k.beta2) * g * g;
        w = keep * w - k.step_size * first / (sqrtf(second) * k.inv_sqrt_bias2 + k.eps);
    };
    update(w4.x, m4.x, v4.x, g4.x);
    update(w4.y, m4.y, v4.y, g4.y);
    update(w4.z, m4.z, v4.z, g4.z);
    update(w4.w, m4.w, v4.w, g4.w);
    values[i] = w4;
    m[i] = m4;
    v[i] = v4;
    if (!narrow) return;
    const __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(w4.x, w4.y), __floats2bfloat162_rn(w4.z, w4.w)};
    reinterpret_cast<uint2*>(narrow)[i] = *reinterpret_cast<const uint2*>(pair);
}

__global__ void narrow_kernel(int64_t size, const float* values, bf16* out) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < size) out[i] = __float2bfloat16(values[i]);
}

}  // namespace

void adamw(Exec& e, const AdamW& a) {
    const double bias1 = 1.0 - std::pow(static_cast<double>(a.beta1), static_cast<double>(a.step));
    const double bias2 = 1.0 - std::pow(static_cast<double>(a.beta2), static_cast<double>(a.step));
    const Rates rates{a.beta1, a.beta2, a.eps, a.learning_rate * a.weight_decay, static_cast<float>(a.learning_rate / bias1),
                      static_cast<float>(1.0 / std::sqrt(bias2)), a.clip_norm};
    if (a.size % 4 != 0) throw std::invalid_argument("adamw: an arena holds a multiple of 4 numbers");
    adamw_kernel<<<blocks_for(a.size / 4, kThreads), kThreads, 0, stream_of(e)>>>(
        a.size, a.segments.data(), static_cast<int>(a.segments.size()), reinterpret_cast<float4*>(a.values),
        reinterpret_cast<const float4*>(a.grads), reinterpret_cast<float4*>(a.m), reinterpret_cast<float4*>(a.v),
        a.squared_norm, rates, as<bf16>(a.narrow));
    check_launch("adamw");
}

void narrow(Exec& e, const Narrow& a) {
    narrow_kernel<<<blocks_for(a.size, kThreads), kThreads, 0, stream_of(e)>>>(a.size, a.values, as<bf16>(a.narrow));
    check_launch("narrow");
}

}  // namespace strobe::gpt::cuda
