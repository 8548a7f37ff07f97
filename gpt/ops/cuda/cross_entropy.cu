#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kThreads = 1024;

/// Largest value seen and the sum of exponentials relative to it.
struct Softmax {
    float max, sum;

    __device__ void add(float x) {
        if (x <= max) {
            sum += __expf(x - max);
        } else {
            sum = sum * __expf(max - x) + 1.0f;
            max = x;
        }
    }
};

// A block per row. Two walks over it: what the first has read the second finds in cache, for the rows under way on the
// whole GPU fit there. Columns behind vocab, up to the stride, are not looked at and become 0: they are no logits, but
// a product that reads whole vectors must not meet NaN in them.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(CrossEntropy a, T* logits, int64_t stride) {
    using V = Vector<T, N>;
    __shared__ float slots[32];
    const int64_t row = blockIdx.x;
    T* x = logits + row * stride;
    const int32_t target = a.targets[row];
    if (target == kIgnoreTarget) {
        if (threadIdx.x == 0) a.losses[row] = 0.0f;
        if (!a.gradient_scale) return;
        for (int64_t c = threadIdx.x; c < stride; c += kThreads) x[c] = from_float<T>(0.0f);
        return;
    }
    const float target_logit = to_float(x[target]);
    // Whole vectors, then the rest of the row by single numbers.
    const int64_t whole = a.vocab / N * N;
    Softmax mine{-INFINITY, 0.0f};
    for (int64_t c = threadIdx.x * N; c < whole; c += kThreads * N) {
        const V v = V::load(x + c);
        float m = v[0];
#pragma unroll
        for (int i = 1; i < N; ++i) m = fmaxf(m, v[i]);
        if (m > mine.max) {
            mine.sum *= __expf(mine.max - m);
            mine.max = m;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) mine.sum += __expf(v[i] - mine.max);
    }
    for (int64_t c = whole + threadIdx.x; c < a.vocab; c += kThreads) mine.add(to_float(x[c]));
    const float m = block_max(mine.max, slots);
    const float sum = block_sum(mine.max == -INFINITY ? 0.0f : mine.sum * __expf(mine.max - m), slots);
    if (threadIdx.x == 0) a.losses[row] = logf(sum) + m - target_logit;
    if (!a.gradient_scale) return;

    const float scale = *a.gradient_scale, factor = scale / sum;
    const auto gradient = [&](int64_t c, float logit) {
        return __expf(logit - m) * factor - (c == target ? scale : 0.0f);
    };
    for (int64_t c = threadIdx.x * N; c < whole; c += kThreads * N) {
        V v = V::load(x + c);
#pragma unroll
        for (int i = 0; i < N; ++i) v.set(i, gradient(c + i, v[i]));
        v.store(x + c);
    }
    for (int64_t c = whole + threadIdx.x; c < stride; c += kThreads)
        x[c] = from_float<T>(c < a.vocab ? gradient(c, to_float(x[c])) : 0.0f);
}

}  // namespace

void cross_entropy(Exec& e, const CrossEntropy& a) {
    const int64_t stride = a.stride > 0 ? a.stride : a.vocab;
    by_precision(a.logits.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kWide = kVectorSize<T>;
        const bool wide = stride % kWide == 0 && aligned(a.logits.data);
        const auto kernel = wide ? cross_entropy_kernel<T, kWide> : cross_entropy_kernel<T, 1>;
        kernel<<<static_cast<unsigned>(a.rows), kThreads, 0, stream_of(e)>>>(a, as<T>(a.logits), stride);
    });
    check_launch("cross_entropy");
}

}  // namespace strobe::gpt::cuda
