// What one core sustains from registers: the yardstick for the kernels' efficiency.
#include <time.h>

#include "cpu/kernels.hpp"
#include "cpu/simd.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {
namespace {

constexpr int kChains = 12;  // more than latency times issue width of any core so far, few enough for 16 registers
constexpr int64_t kSteps = 200'000;

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Steps per second of kChains independent chains, the best of several short runs: others may use the machine.
template <class Step>
double best_rate(Step step) {
    double best = 0;
    for (int run = 0; run < 20; ++run) {
        Vec chain[kChains];
        for (int i = 0; i < kChains; ++i) chain[i] = splat(static_cast<float>(i));
        const double start = now();
        for (int64_t s = 0; s < kSteps; ++s) {
#pragma GCC unroll 16
            for (int i = 0; i < kChains; ++i) {
                chain[i] = step(chain[i]);
                // Opaque to the optimiser, or it would move the work out of the loop.
                asm volatile("" : "+x"(chain[i]));
            }
        }
        const double rate = static_cast<double>(kSteps) * kChains / (now() - start);
        best = rate > best ? rate : best;
    }
    return best;
}

}  // namespace

double fma_peak() {
    const Vec a = splat(0.999f), b = splat(0.001f);
    return best_rate([&](Vec x) { return fma(x, a, b); }) * kWidth * 2;
}

#if defined(__AVX512BF16__)
double bf16_dot_peak() {
    const Vec a = splat(0.0f), b = splat(0.0f);
    return best_rate([&](Vec x) { return accumulate<true>(a, b, x); }) * kWidth * 4;
}
#endif

}  // namespace strobe::cpu::STROBE_CPU_ISA
