#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;  // of a thread

struct Constants {
    float beta1, beta2, eps, clip_norm;
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

/// The moments of a thread's elements.
template <class T>
struct Moments {
    Vector<T, kVectorSize<T>> part[kElements / kVectorSize<T>];

    __device__ static Moments load(const T* p) {
        Moments x;
#pragma unroll
        for (int i = 0; i < kElements / kVectorSize<T>; ++i) x.part[i] = Vector<T, kVectorSize<T>>::load(p + i * kVectorSize<T>);
        return x;
    }
    __device__ void store(T* p) const {
#pragma unroll
        for (int i = 0; i < kElements / kVectorSize<T>; ++i) part[i].store(p + i * kVectorSize<T>);
    }
    __device__ float operator[](int i) const { return part[i / kVectorSize<T>][i % kVectorSize<T>]; }
    __device__ void set(int i, float x, uint32_t noise) {
        T& slot = part[i / kVectorSize<T>].x[i % kVectorSize<T>];
        if constexpr (std::is_same_v<T, float>) {
            slot = x;
        } else {
            // As round_bf16_randomly.
            uint32_t bits = __float_as_uint(x);
            if ((bits & 0x7f800000u) != 0x7f800000u) bits += noise & 0xffffu;
            slot = __ushort_as_bfloat16(static_cast<unsigned short>(bits >> 16));
        }
    }
};

// Segments begin at multiples of an arena's alignment, so all elements of a thread decay alike. The loads come first: the
// search for the segment takes as long as they do.
template <class T>
__global__ void __launch_bounds__(kThreads) adamw_kernel(int64_t size, const AdamWSegment* segments, int num_segments, float* values,
                                                         const float* grads, T* m, T* v, const double* squared_norm,
                                                         const AdamWRates* rates, Constants k, bf16* narrow) {
    using Floats = Moments<float>;
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElements;
    if (first >= size) return;
    Floats w = Floats::load(values + first);
    const Floats g = Floats::load(grads + first);
    Moments<T> mean = Moments<T>::load(m + first), square = Moments<T>::load(v + first);
    const AdamWRates r = *rates;
    float scale = 1.0f;
    if (squared_norm) {
        const float norm = static_cast<float>(sqrt(*squared_norm));
        if (norm > k.clip_norm) scale = k.clip_norm / (norm + 1e-6f);
    }
    const float keep = decays(segments, num_segments, first) ? r.keep : 1.0f;
    Vector<bf16, kElements> rounded;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
        const float gradient = g[i] * scale;
        const float new_mean = k.beta1 * mean[i] + (1.0f - k.beta1) * gradient;
        const float new_square = k.beta2 * square[i] + (1.0f - k.beta2) * gradient * gradient;
        const uint32_t noise = std::is_same_v<T, float> ? 0u : adamw_noise(first + i, r.noise);
        mean.set(i, new_mean, noise);
        square.set(i, new_square, noise >> 16);
        w.set(i, keep * w[i] - r.step_size * new_mean / (sqrtf(new_square) * r.inv_sqrt_bias2 + k.eps), 0u);
        rounded.set(i, w[i]);
    }
    w.store(values + first);
    mean.store(m + first);
    square.store(v + first);
    if (narrow) rounded.store(narrow + first);
}

__global__ void narrow_kernel(int64_t size, const float* values, bf16* out) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < size) out[i] = __float2bfloat16(values[i]);
}

}  // namespace

void adamw(Exec& e, const AdamW& a) {
    if (a.size % kElements != 0) throw std::invalid_argument("adamw: an arena holds a multiple of 8 numbers");
    const Constants constants{a.beta1, a.beta2, a.eps, a.clip_norm};
    by_precision(a.m.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        adamw_kernel<T><<<blocks_for(a.size / kElements, kThreads), kThreads, 0, stream_of(e)>>>(
            a.size, a.segments.data(), static_cast<int>(a.segments.size()), a.values, a.grads, as<T>(a.m), as<T>(a.v),
            a.squared_norm, a.rates, constants, as<bf16>(a.narrow));
    });
    check_launch("adamw");
}

void narrow(Exec& e, const Narrow& a) {
    narrow_kernel<<<blocks_for(a.size, kThreads), kThreads, 0, stream_of(e)>>>(a.size, a.values, as<bf16>(a.narrow));
    check_launch("narrow");
}

}  // namespace strobe::gpt::cuda
