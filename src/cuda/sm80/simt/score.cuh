// One element of the score matrix in fp32, with every option of the interface.
#pragma once

#include "core/params.hpp"

namespace strobe::sm80::simt {

struct Score {
    float value;  // -inf where the mask hides the key
    float slope;  // d value / d (softmax_scale * q.k)
};

/// The score function of one (batch, head).
struct ElementScore {
    const AttentionParams& p;
    BandMask mask;
    int64_t seqlen_q;
    float alibi_slope;
    int64_t bias_base;
    uint32_t batch_head;

    __device__ ElementScore(const AttentionParams& params, const Sequence& seq, int batch, int head)
        : p(params),
          mask(seq.mask(params.mask)),
          seqlen_q(seq.seqlen_q),
          alibi_slope(params.score.alibi_slopes ? params.score.alibi_slopes[batch * params.score.alibi_batch_stride + head] : 0.0f),
          bias_base(batch * params.score.bias.batch_stride + head * params.score.bias.head_stride),
          batch_head(static_cast<uint32_t>(batch * params.size.num_heads + head)) {}

    __device__ Score operator()(float dot, int64_t query, int64_t key) const {
        Score s{p.score.softmax_scale * dot, 1.0f};
        if (query >= seqlen_q || !mask.visible(query, key)) return {-INFINITY, 0.0f};
        if (p.score.softcap > 0.0f) {
            const float t = tanhf(s.value / p.score.softcap);
            s = {p.score.softcap * t, 1.0f - t * t};
        }
        if (p.score.bias) {
            const BiasRef& b = p.score.bias;
            s.value += static_cast<const float*>(b.data)[bias_base + query * b.row_stride + key * b.col_stride];
        }
        if (p.score.alibi_slopes) s.value -= alibi_slope * static_cast<float>(llabs(query + mask.diagonal - key));
        return s;
    }

    __device__ bool kept(int64_t query, int64_t key) const {
        if (!p.dropout.enabled()) return true;
        const int64_t row = query + (p.mask.has_positions ? p.mask.q_position : 0);
        const int64_t col = key + (p.mask.has_positions ? p.mask.k_position : 0);
        return p.dropout.keep(batch_head, static_cast<uint32_t>(row), static_cast<uint32_t>(col));
    }
};

}  // namespace strobe::sm80::simt
