#include "gpt/ops/cpu/kernels.hpp"

namespace strobe::gpt::cpu::STROBE_GPT_ISA {

namespace {

void turn(float* x, const float* __restrict cos, const float* __restrict sin, int64_t half, float sign) {
    float* __restrict low = x;
    float* __restrict high = x + half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = low[i], b = high[i], s = sign * sin[i];
        low[i] = a * cos[i] - b * s;
        high[i] = b * cos[i] + a * s;
    }
}

}  // namespace

void rope(Exec& e, const Rope& a) {
    const int64_t half = a.head_dim / 2;
    const float sign = a.inverse ? -1.0f : 1.0f;
    e.team->ranges(a.rows, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            float* row = a.x.f32() + r * a.row_stride;
            const int64_t angle = a.positions[r] * half;
            for (int64_t h = 0; h < a.heads; ++h)
                turn(row + h * a.head_dim, a.cos + angle, a.sin + angle, half, sign);
        }
    });
}

}  // namespace strobe::gpt::cpu::STROBE_GPT_ISA
