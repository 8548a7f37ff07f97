#include <cmath>

#include "gpt/ops/cpu/kernels.hpp"

namespace strobe::gpt::cpu::STROBE_GPT_ISA {

namespace {

template <NormKind kind>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
    const int64_t n = a.hidden;
    const float* weight = a.weight.f32();
    const float* bias = a.bias ? a.bias.f32() : nullptr;
    const float inv_n = 1.0f / static_cast<float>(n);
    for (int64_t r = begin; r < end; ++r) {
        const float* x = a.x.f32() + r * n;
        float* y = a.out.f32() + r * n;
        if (a.branch) {
            const float* branch = a.branch.f32() + r * n;
            float* sum = a.sum.f32() + r * n;
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) sum[c] = x[c] + branch[c];
            x = sum;
        }
        float mean = 0.0f;
        if constexpr (kind == NormKind::layernorm) {
#pragma omp simd reduction(+ : mean)
            for (int64_t c = 0; c < n; ++c) mean += x[c];
            mean *= inv_n;
        }
        float variance = 0.0f;
#pragma omp simd reduction(+ : variance)
        for (int64_t c = 0; c < n; ++c) variance += (x[c] - mean) * (x[c] - mean);
        const float rstd = 1.0f / std::sqrt(variance * inv_n + a.eps);
        if (bias) {
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) y[c] = (x[c] - mean) * rstd * weight[c] + bias[c];
        } else {
#pragma omp simd
            for (int64_t c = 0; c < n; ++c) y[c] = (x[c] - mean) * rstd * weight[c];
        }
        if (a.mean) a.mean[r] = mean;
        if (a.rstd) a.rstd[r] = rstd;
    }
}

// With xhat = (x - mean) * rstd and g = dout * weight:  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), without the
// mean(g) term for RMSNorm.
template <NormKind kind>
void backward_rows(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
    const int64_t n = a.hidden;
    const float* weight = a.weight.f32();
    const float inv_n = 1.0f / static_cast<float>(n);
    for (int64_t r = begin; r < end; ++r) {
        const float* x = a.x.f32() + r * n;
        const float* dy = a.dout.f32() + r * n;
        float* dx = a.dx.f32() + r * n;
        const float mean = kind == NormKind::layernorm ? a.mean[r] : 0.0f;
        const float rstd = a.rstd[r];
        float sum_g = 0.0f, sum_gx = 0.0f;
#pragma omp simd reduction(+ : sum_g, sum_gx)
        for (int64_t c = 0; c < n; ++c) {
            const float xhat = (x[c] - mean) * rstd;
            const float g = dy[c] * weight[c];
            sum_g += g;
            sum_gx += g * xhat;
            dweight[c] += dy[c] * xhat;
        }
        const float mean_g = kind == NormKind::layernorm ? sum_g * inv_n : 0.0f;
        const float mean_gx = sum_gx * inv_n;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) {
            const float xhat = (x[c] - mean) * rstd;
            dx[c] += rstd * (dy[c] * weight[c] - mean_g - xhat * mean_gx);
        }
        if (!dbias) continue;
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) dbias[c] += dy[c];
    }
}

}  // namespace

void norm_forward(Exec& e, const NormForward& a) {
    e.team->ranges(a.rows, 1, [&](int64_t begin, int64_t end, int) {
        if (a.kind == NormKind::layernorm)
            forward_rows<NormKind::layernorm>(a, begin, end);
        else
            forward_rows<NormKind::rmsnorm>(a, begin, end);
    });
}

void norm_backward(Exec& e, const NormBackward& a) {
    // Each part of the rows has sums of its own; they are added in order.
    float* partial = static_cast<float*>(e.scratch);
    const int64_t n = a.hidden;
    const int parts = e.team->size();
    for (int64_t i = 0; i < 2 * n * parts; ++i) partial[i] = 0.0f;
    e.team->ranges(a.rows, 1, [&](int64_t begin, int64_t end, int part) {
        float* dweight = partial + 2 * n * part;
        float* dbias = a.dbias ? dweight + n : nullptr;
        if (a.kind == NormKind::layernorm)
            backward_rows<NormKind::layernorm>(a, begin, end, dweight, dbias);
        else
            backward_rows<NormKind::rmsnorm>(a, begin, end, dweight, dbias);
    });
    for (int part = 0; part < parts; ++part) {
        const float* sums = partial + 2 * n * part;
        for (int64_t c = 0; c < n; ++c) a.dweight[c] += sums[c];
        if (!a.dbias) continue;
        for (int64_t c = 0; c < n; ++c) a.dbias[c] += sums[n + c];
    }
}

}  // namespace strobe::gpt::cpu::STROBE_GPT_ISA
