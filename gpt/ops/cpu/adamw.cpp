#include <algorithm>
#include <cmath>

#include "gpt/bf16.hpp"
#include "gpt/ops/cpu/kernels.hpp"

namespace strobe::gpt::cpu::STROBE_GPT_ISA {

namespace {

constexpr int64_t kGrain = 4096;

struct Rates {
    float beta1, beta2, eps, grad_scale;
    float keep;              // 1 - lr * decay
    float step_size;         // lr / (1 - beta1^t)
    float inv_sqrt_bias2;    // 1 / sqrt(1 - beta2^t)
    uint32_t noise;
};

void update(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n,
            const Rates& rates) {
    const Rates k = rates;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * k.grad_scale;
        m[i] = k.beta1 * m[i] + (1.0f - k.beta1) * grad;
        v[i] = k.beta2 * v[i] + (1.0f - k.beta2) * grad * grad;
        w[i] = k.keep * w[i] - k.step_size * m[i] / (std::sqrt(v[i]) * k.inv_sqrt_bias2 + k.eps);
    }
}

/// Moments in bf16. The update itself uses them before they are rounded. `first` is the element that the pointers point
/// at.
void update_narrow(float* __restrict w, const float* __restrict g, uint16_t* __restrict m, uint16_t* __restrict v, int64_t n,
                   int64_t first, const Rates& rates) {
    const Rates k = rates;
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * k.grad_scale;
        const float mean = k.beta1 * widen_bf16(m[i]) + (1.0f - k.beta1) * grad;
        const float square = k.beta2 * widen_bf16(v[i]) + (1.0f - k.beta2) * grad * grad;
        const uint32_t noise = adamw_noise(first + i, k.noise);
        m[i] = round_bf16_randomly(mean, noise);
        v[i] = round_bf16_randomly(square, noise >> 16);
        w[i] = k.keep * w[i] - k.step_size * mean / (std::sqrt(square) * k.inv_sqrt_bias2 + k.eps);
    }
}

// Compiled once: two copies may add in two orders, and the sum must not depend on which one a thread runs.
[[gnu::noinline]] float sum_of_squares(const float* x, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    return sum;
}

}  // namespace

void adamw(Exec& e, const AdamW& a) {
    float grad_scale = 1.0f;
    if (a.squared_norm) {
        const double norm = std::sqrt(*a.squared_norm);
        if (norm > static_cast<double>(a.clip_norm)) {
            grad_scale = static_cast<float>(static_cast<double>(a.clip_norm) / (norm + 1e-6));
        }
    }
    float* values = a.values.f32();
    const float* grads = a.grads.f32();
    const Rates rates{a.beta1, a.beta2, a.eps, grad_scale, 1.0f, a.rates->step_size, a.rates->inv_sqrt_bias2, a.rates->noise};
    e.team->ranges(a.size, kGrain, [&](int64_t begin, int64_t end, int) {
        Rates mine = rates;
        for (const AdamWSegment& s : a.segments) {
            const int64_t from = std::max(begin, s.offset), to = std::min(end, s.offset + s.size);
            if (from >= to) continue;
            mine.keep = s.decay ? a.rates->keep : 1.0f;
            if (a.m.precision == Precision::fp32)
                update(values + from, grads + from, a.m.f32() + from, a.v.f32() + from, to - from, mine);
            else
                update_narrow(values + from, grads + from, static_cast<uint16_t*>(a.m.data) + from,
                              static_cast<uint16_t*>(a.v.data) + from, to - from, from, mine);
        }
    });
}

void squared_norm(Exec& e, const SquaredNorm& a) {
    // At most this many blocks, each summed by one thread; the sums are added in order.
    constexpr int64_t kMaxBlocks = 16;
    double sums[kMaxBlocks] = {};
    const float* values = a.values.f32();
    const int64_t block = (a.size + kMaxBlocks - 1) / kMaxBlocks;
    e.team->ranges(kMaxBlocks, 1, [&](int64_t first, int64_t last, int) {
        for (int64_t b = first; b < last; ++b) {
            const int64_t end = std::min(a.size, (b + 1) * block);
            double total = 0.0;
            for (int64_t i = b * block; i < end; i += kGrain) {
                const int64_t stop = std::min(end, i + kGrain);
                total += static_cast<double>(sum_of_squares(values + i, stop - i));
            }
            sums[b] = total;
        }
    });
    if (!a.add) *a.result = 0.0;
    for (const double sum : sums) *a.result += sum;
}

}  // namespace strobe::gpt::cpu::STROBE_GPT_ISA
