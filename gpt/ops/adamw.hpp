// AdamW (Loshchilov, Hutter 2019) over a whole arena in one call, with the clip by global norm folded in.
//   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr (decay w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))
// Moments are fp32, or bf16 with stochastic rounding: half the memory and half the traffic. Values are fp32, or two halves that
// together are fp32 (SplitFloat), so that what products read is no copy beside them, or bf16 alone with stochastic rounding.
#pragma once

#include <cmath>
#include <span>

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

/// A stretch of the arena with one decay; neighbours of equal decay are one segment.
struct AdamWSegment {
    int64_t offset, size;
    bool decay;
};

/// What changes from step to step.
struct AdamWRates {
    float keep;            // 1 - lr * weight_decay: what a step leaves of a number that decays
    float step_size;       // lr / (1 - beta1^t)
    float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
    uint32_t noise;        // of the stochastic rounding: another for each step
};

/// step is 1 for the first.
inline AdamWRates adamw_rates(float learning_rate, float beta1, float beta2, float weight_decay, int64_t step) {
    const double bias1 = 1.0 - std::pow(static_cast<double>(beta1), static_cast<double>(step));
    const double bias2 = 1.0 - std::pow(static_cast<double>(beta2), static_cast<double>(step));
    return {1.0f - learning_rate * weight_decay, static_cast<float>(learning_rate / bias1),
            static_cast<float>(1.0 / std::sqrt(bias2)), static_cast<uint32_t>(step) * 0x85EBCA6Bu};
}

/// 32 bits that look random, of an element in a step: the upper half rounds v, the lower m. A 32-bit mixer, after Murmur3.
constexpr uint32_t adamw_noise(int64_t element, uint32_t noise_of_step) {
    uint32_t x = static_cast<uint32_t>(element) * 0x9E3779B9u + noise_of_step;
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

/// The same for the values: other bits than those of the moments, which an update depends on.
constexpr uint32_t adamw_value_noise(int64_t element, uint32_t noise_of_step) { return adamw_noise(element, noise_of_step ^ 0x68E31DA4u); }

struct AdamW {
    std::span<const AdamWSegment> segments;  // ascending, in memory that the operator can read
    int64_t size;                            // elements of the arena
    Buffer values;                           // fp32; of bf16: the lower halves, and `narrow` has the upper ones; null: these are all
    Buffer grads;
    Buffer m, v;                             // of one precision
    const AdamWRates* rates;                 // in memory that the operator can read
    float beta1, beta2, eps;
    const double* squared_norm = nullptr;    // of the gradients, for the clip; null: none
    float clip_norm = 0.0f;                  // gradients are scaled by min(1, clip_norm / norm)
    Buffer narrow{};                         // gets the new values rounded to its precision, or null
};

/// *result = sum of squares (behind `add`: more of them), in fixed blocks, so it does not depend on the number of threads.
struct SquaredNorm {
    int64_t size;
    Buffer values;
    double* result;
    bool add = false;  // to what is in *result
};

/// What squared_norm needs of Exec::scratch.
inline size_t squared_norm_scratch_bytes(int parts) { return static_cast<size_t>(parts) * sizeof(double); }

}  // namespace strobe::gpt
