// Elementary functions that a compiler can vectorise: no branches, no tables, no library calls, and therefore the same
// bits on every run. Polynomials after Cephes (Moshier); within 2 ulp over the ranges used here.
#pragma once

#include <bit>
#include <cstdint>

#define STROBE_GPT_INLINE static inline __attribute__((always_inline))

namespace strobe::gpt::cpu {

/// e^x for x <= 88; below -87 the result is about 1e-38, never negative.
STROBE_GPT_INLINE float fast_exp(float x) {
    constexpr float kLog2e = 1.44269504f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
    constexpr float kLn2High = 0.693359375f;
    constexpr float kLn2Low = -2.12194440e-4f;
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * kLog2e + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * kLn2High) - n * kLn2Low;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
    return p * std::bit_cast<float>((exponent + 127) << 23);
}

/// 1 / (1 + e^-x)
STROBE_GPT_INLINE float fast_sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

/// Absolute error below 2e-7.
STROBE_GPT_INLINE float fast_tanh(float x) { return 1.0f - 2.0f / (1.0f + fast_exp(2.0f * x)); }

}  // namespace strobe::gpt::cpu
