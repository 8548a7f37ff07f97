// Exact attention written out, one head of one sequence per unit of work.
#include <cmath>
#include <vector>

#include "gpt/ops/cpu/kernels.hpp"

namespace strobe::gpt::cpu {

namespace {

struct Head {
    int64_t q0, k0, sq, sk, h, hk;
};

template <class Fn>
void for_heads(Exec& e, const AttentionShape& s, int64_t heads, Fn&& fn) {
    e.team->ranges(s.batch * heads, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) fn(i / heads, i % heads);
    });
}

}  // namespace

void attention_forward(Exec& e, const AttentionForward& a) {
    const AttentionShape& s = a.shape;
    const int64_t d = s.head_dim, group = s.num_heads / s.num_heads_k;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for_heads(e, s, s.num_heads, [&](int64_t b, int64_t h) {
        const int64_t q0 = s.cu_seqlens_q[b], sq = s.cu_seqlens_q[b + 1] - q0;
        const int64_t k0 = s.cu_seqlens_k[b], sk = s.cu_seqlens_k[b + 1] - k0;
        std::vector<float> p(static_cast<size_t>(sk));
        for (int64_t i = 0; i < sq; ++i) {
            const float* q = a.q.f32() + (q0 + i) * a.q_stride + h * d;
            float* out = a.out.f32() + (q0 + i) * a.out_stride + h * d;
            const int64_t visible = i + sk - sq + 1;
            float m = -INFINITY, sum = 0.0f;
            for (int64_t j = 0; j < visible; ++j) {
                const float* k = a.k.f32() + (k0 + j) * a.k_stride + h / group * d;
                float dot = 0.0f;
                for (int64_t c = 0; c < d; ++c) dot += q[c] * k[c];
                p[static_cast<size_t>(j)] = dot * scale;
                m = std::max(m, dot * scale);
            }
            for (int64_t c = 0; c < d; ++c) out[c] = 0.0f;
            for (int64_t j = 0; j < visible; ++j) {
                const float* v = a.v.f32() + (k0 + j) * a.v_stride + h / group * d;
                const float w = std::exp(p[static_cast<size_t>(j)] - m);
                sum += w;
                for (int64_t c = 0; c < d; ++c) out[c] += w * v[c];
            }
            for (int64_t c = 0; c < d; ++c) out[c] /= sum;
            if (a.lse) a.lse[h * s.total_q + q0 + i] = m + std::log(sum);
        }
    });
}

void attention_backward(Exec& e, const AttentionBackward& a) {
    const AttentionForward& f = a.forward;
    const AttentionShape& s = f.shape;
    const int64_t d = s.head_dim, group = s.num_heads / s.num_heads_k;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for_heads(e, s, s.num_heads_k, [&](int64_t b, int64_t hk) {
        const int64_t q0 = s.cu_seqlens_q[b], sq = s.cu_seqlens_q[b + 1] - q0;
        const int64_t k0 = s.cu_seqlens_k[b], sk = s.cu_seqlens_k[b + 1] - k0;
        for (int64_t j = 0; j < sk; ++j)
            for (int64_t c = 0; c < d; ++c)
                a.dk.f32()[(k0 + j) * a.dqkv_stride + hk * d + c] = a.dv.f32()[(k0 + j) * a.dqkv_stride + hk * d + c] = 0.0f;
        for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
            for (int64_t i = 0; i < sq; ++i) {
                const float* q = f.q.f32() + (q0 + i) * f.q_stride + h * d;
                const float* out = f.out.f32() + (q0 + i) * f.out_stride + h * d;
                const float* dout = a.dout.f32() + (q0 + i) * a.dout_stride + h * d;
                float* dq = a.dq.f32() + (q0 + i) * a.dqkv_stride + h * d;
                float delta = 0.0f;
                for (int64_t c = 0; c < d; ++c) delta += out[c] * dout[c], dq[c] = 0.0f;
                for (int64_t j = 0; j < i + sk - sq + 1; ++j) {
                    const float* k = f.k.f32() + (k0 + j) * f.k_stride + hk * d;
                    const float* v = f.v.f32() + (k0 + j) * f.v_stride + hk * d;
                    float* dk = a.dk.f32() + (k0 + j) * a.dqkv_stride + hk * d;
                    float* dv = a.dv.f32() + (k0 + j) * a.dqkv_stride + hk * d;
                    float dot = 0.0f, dp = 0.0f;
                    for (int64_t c = 0; c < d; ++c) dot += q[c] * k[c], dp += dout[c] * v[c];
                    const float p = std::exp(dot * scale - f.lse[h * s.total_q + q0 + i]);
                    const float ds = p * (dp - delta) * scale;
                    for (int64_t c = 0; c < d; ++c) {
                        dq[c] += ds * k[c];
                        dk[c] += ds * q[c];
                        dv[c] += p * dout[c];
                    }
                }
            }
        }
    });
}

}  // namespace strobe::gpt::cpu
