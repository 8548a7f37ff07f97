#include <cmath>

#include "gpt/ops/cpu/kernels.hpp"
#include "gpt/ops/cpu/simd.hpp"

namespace strobe::gpt::cpu::STROBE_GPT_ISA {

namespace {

float row_max(const float* x, int64_t n) {
    float m = x[0];
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
    return m;
}

float loss_of_row(const float* x, int64_t n, int32_t target) {
    const float m = row_max(x, n);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += fast_exp(x[i] - m);
    return std::log(sum) + m - x[target];
}

float loss_and_gradient_of_row(float* x, int64_t n, int32_t target, float scale) {
    const float m = row_max(x, n);
    const float target_logit = x[target];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
        x[i] = fast_exp(x[i] - m);
        sum += x[i];
    }
    const float factor = scale / sum;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] *= factor;
    x[target] -= scale;
    return std::log(sum) + m - target_logit;
}

}  // namespace

void cross_entropy(Exec& e, const CrossEntropy& a) {
    const int64_t stride = a.stride > 0 ? a.stride : a.vocab;
    e.team->ranges(a.rows, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            float* x = a.logits.f32() + r * stride;
            const int32_t target = a.targets[r];
            if (target == kIgnoreTarget) {
                a.losses[r] = 0.0f;
                if (a.gradient_scale)
                    for (int64_t i = 0; i < a.vocab; ++i) x[i] = 0.0f;
            } else if (a.gradient_scale) {
                a.losses[r] = loss_and_gradient_of_row(x, a.vocab, target, *a.gradient_scale);
            } else {
                a.losses[r] = loss_of_row(x, a.vocab, target);
            }
        }
    });
}

}  // namespace strobe::gpt::cpu::STROBE_GPT_ISA
