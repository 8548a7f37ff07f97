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

/// A thread's elements of one of the arenas.
template <class T>
struct Share {
    Vector<T, kVectorSize<T>> part[kElements / kVectorSize<T>];

    __device__ static Share load(const T* p) {
        Share x;
#pragma unroll
        for (int i = 0; i < kElements / kVectorSize<T>; ++i)
            x.part[i] = Vector<T, kVectorSize<T>>::load(p + i * kVectorSize<T>);
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

/// The values of a thread's elements: fp32; or the halves that split_float makes, of which the upper ones lie in
/// `narrow`; or these alone.
struct UpperHalves {};
template <class T>
struct Values;

template <>
struct Values<float> {
    Share<float> whole;

    __device__ static Values load(const float* values, const bf16*, int64_t first) {
        return {Share<float>::load(values + first)};
    }
    __device__ float operator[](int i) const { return whole[i]; }
    __device__ void set(int i, float x, uint32_t) { whole.set(i, x, 0u); }
    __device__ void store(float* values, bf16* narrow, int64_t first) const {
        whole.store(values + first);
        if (!narrow) return;
        Vector<bf16, kElements> rounded;
#pragma unroll
        for (int i = 0; i < kElements; ++i) rounded.set(i, whole[i]);
        rounded.store(narrow + first);
    }
};

template <>
struct Values<bf16> {
    Vector<bf16, kElements> low, high;

    __device__ static Values load(const bf16* values, const bf16* narrow, int64_t first) {
        return {Vector<bf16, kElements>::load(values + first), Vector<bf16, kElements>::load(narrow + first)};
    }
    __device__ float operator[](int i) const {
        const int below = static_cast<short>(__bfloat16_as_ushort(low.x[i]));
        return __uint_as_float((static_cast<unsigned>(__bfloat16_as_ushort(high.x[i])) << 16) +
                               static_cast<unsigned>(below));
    }
    __device__ void set(int i, float x, uint32_t) {
        const unsigned bits = __float_as_uint(x), nan = (bits & 0x7fffffffu) > 0x7f800000u;
        high.x[i] =
            __ushort_as_bfloat16(static_cast<unsigned short>(nan ? bits >> 16 | 0x40u : (bits + 0x8000u) >> 16));
        low.x[i] = __ushort_as_bfloat16(static_cast<unsigned short>(nan ? 0u : bits));
    }
    __device__ void store(bf16* values, bf16* narrow, int64_t first) const {
        low.store(values + first);
        high.store(narrow + first);
    }
};

template <>
struct Values<UpperHalves> {
    Share<bf16> high;

    __device__ static Values load(const UpperHalves*, const bf16* narrow, int64_t first) {
        return {Share<bf16>::load(narrow + first)};
    }
    __device__ float operator[](int i) const { return high[i]; }
    __device__ void set(int i, float x, uint32_t noise) { high.set(i, x, noise); }
    __device__ void store(UpperHalves*, bf16* narrow, int64_t first) const { high.store(narrow + first); }
};

// Segments begin at multiples of an arena's alignment, so all elements of a thread decay alike. The loads come first:
// the search for the segment takes as long as they do.
template <class W, class G, class T>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(int64_t size, const AdamWSegment* segments, int num_segments, W* values, const G* grads, T* m, T* v,
                 const double* squared_norm, const AdamWRates* rates, Constants k, bf16* narrow) {
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElements;
    if (first >= size) return;
    Values<W> w = Values<W>::load(values, narrow, first);
    const Share<G> g = Share<G>::load(grads + first);
    Share<T> mean = Share<T>::load(m + first), square = Share<T>::load(v + first);
    const AdamWRates r = *rates;
    float scale = 1.0f;
    if (squared_norm) {
        const float norm = static_cast<float>(sqrt(*squared_norm));
        if (norm > k.clip_norm) scale = k.clip_norm / (norm + 1e-6f);
    }
    const float keep = decays(segments, num_segments, first) ? r.keep : 1.0f;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
        const float gradient = g[i] * scale;
        const float new_mean = k.beta1 * mean[i] + (1.0f - k.beta1) * gradient;
        const float new_square = k.beta2 * square[i] + (1.0f - k.beta2) * gradient * gradient;
        const uint32_t noise = std::is_same_v<T, float> ? 0u : adamw_noise(first + i, r.noise);
        mean.set(i, new_mean, noise);
        square.set(i, new_square, noise >> 16);
        const uint32_t value_noise = std::is_same_v<W, UpperHalves> ? adamw_value_noise(first + i, r.noise) : 0u;
        w.set(i, keep * w[i] - r.step_size * new_mean / (sqrtf(new_square) * r.inv_sqrt_bias2 + k.eps), value_noise);
    }
    w.store(values, narrow, first);
    mean.store(m + first);
    square.store(v + first);
}

}  // namespace

void adamw(Exec& e, const AdamW& a) {
    if (a.size % kElements != 0) throw std::invalid_argument("adamw: an arena holds a multiple of 8 numbers");
    const Constants constants{a.beta1, a.beta2, a.eps, a.clip_norm};
    if ((a.values.precision != Precision::fp32 || !a.values) && !a.narrow)
        throw std::invalid_argument("adamw: no upper halves of the values");
    const auto launch = [&]<class W>(W* values) {
        by_precision(a.grads.precision, [&](auto* gradient_type) {
            by_precision(a.m.precision, [&](auto* moment_type) {
                using G = std::remove_pointer_t<decltype(gradient_type)>;
                using T = std::remove_pointer_t<decltype(moment_type)>;
                adamw_kernel<W, G, T><<<blocks_for(a.size / kElements, kThreads), kThreads, 0, stream_of(e)>>>(
                    a.size, a.segments.data(), static_cast<int>(a.segments.size()), values, as<G>(a.grads),
                    as<T>(a.m), as<T>(a.v), a.squared_norm, a.rates, constants, as<bf16>(a.narrow));
            });
        });
    };
    if (!a.values) return launch(static_cast<UpperHalves*>(nullptr)), check_launch("adamw");
    by_precision(a.values.precision, [&](auto* type) { launch(as<std::remove_pointer_t<decltype(type)>>(a.values)); });
    check_launch("adamw");
}

}  // namespace strobe::gpt::cuda
