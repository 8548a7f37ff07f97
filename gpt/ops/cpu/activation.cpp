#include "gpt/ops/cpu/kernels.hpp"
#include "gpt/ops/cpu/simd.hpp"

namespace strobe::gpt::cpu::STROBE_GPT_ISA {

namespace {

constexpr float kSqrt2OverPi = 0.7978845608f;
constexpr float kCubic = 0.044715f;

// Elements per unit of work: small enough to balance, large enough to be worth a call.
constexpr int64_t kGrain = 1024;

void gelu_forward(const float* __restrict x, float* __restrict y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float u = kSqrt2OverPi * (x[i] + kCubic * x[i] * x[i] * x[i]);
        y[i] = 0.5f * x[i] * (1.0f + fast_tanh(u));
    }
}

// Reads element i of every input before it writes element i: dx may be x.
void gelu_backward(const float* x, const float* dy, float* dx, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float v = x[i];
        const float t = fast_tanh(kSqrt2OverPi * (v + kCubic * v * v * v));
        const float du = kSqrt2OverPi * (1.0f + 3.0f * kCubic * v * v);
        dx[i] = dy[i] * (0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * du);
    }
}

void swiglu_forward(const float* __restrict gate, const float* __restrict up, float* __restrict y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * fast_sigmoid(gate[i]) * up[i];
}

// Reads element i of every input before it writes element i: the gradients may replace gate and up.
void swiglu_backward(const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float g = gate[i], u = up[i], d = dy[i];
        const float s = fast_sigmoid(g);
        dup[i] = d * g * s;
        dgate[i] = d * u * s * (1.0f + g * (1.0f - s));
    }
}

}  // namespace

void activation_forward(Exec& e, const ActivationForward& a) {
    const float* x = a.x.f32();
    float* y = a.y.f32();
    if (a.kind == ActivationKind::gelu) {
        e.team->ranges(a.rows * a.ffn, kGrain, [&](int64_t begin, int64_t end, int) {
            gelu_forward(x + begin, y + begin, end - begin);
        });
        return;
    }
    e.team->ranges(a.rows, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r)
            swiglu_forward(x + 2 * r * a.ffn, x + (2 * r + 1) * a.ffn, y + r * a.ffn, a.ffn);
    });
}

void activation_backward(Exec& e, const ActivationBackward& a) {
    const float* x = a.x.f32();
    const float* dy = a.dy.f32();
    float* dx = a.dx.f32();
    if (a.kind == ActivationKind::gelu) {
        e.team->ranges(a.rows * a.ffn, kGrain, [&](int64_t begin, int64_t end, int) {
            gelu_backward(x + begin, dy + begin, dx + begin, end - begin);
        });
        return;
    }
    e.team->ranges(a.rows, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t gate = 2 * r * a.ffn, up = gate + a.ffn;
            swiglu_backward(x + gate, x + up, dy + r * a.ffn, dx + gate, dx + up, a.ffn);
        }
    });
}

}  // namespace strobe::gpt::cpu::STROBE_GPT_ISA
