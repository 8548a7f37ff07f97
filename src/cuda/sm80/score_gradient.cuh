// From scores to P and dS, on the accumulator fragments of one
// warp: what every backward pass does between its products.
#pragma once

#include "cuda/sm80/dropout.cuh"

namespace strobe::sm80 {

/// The LSE of a row's statistics: natural LSE times this. With a bias
/// it may be huge, and no multiple of it finite (OnlineSoftmax).
template <Features kFeatures>
__device__ __forceinline__ float lse_factor(const AttentionParams& p) {
    if constexpr (!has_bias(kFeatures)) return kLog2e;
    const float scale = p.score.softmax_scale;
    return p.score.bias || scale < ScoreFunction<true>::kSmallestUnit ? 1.0f : 1.0f / scale;
}

/// P and dS of one tile of scores, from s = q.k and dp = dout.v. kThroughSoftcap: dS is the gradient of what the
/// softcap was given (softmax_scale * q.k), else of what it returned. Dropout's factor 1 / (1 - p) is left out of P, dS
/// and delta: it is one factor of each result.
template <DType kType, bool kTransposed, Features kFeatures, int kMAtoms, int kNAtoms, bool kThroughSoftcap = true>
struct ScoreGradient {
    static constexpr bool kGeneral = is_general(kFeatures);
    uint32_t probability[kMAtoms][kNAtoms][2];  // as multiplied with v in the forward: dropped elements are zero
    uint32_t slope_of_cap[kMAtoms][kNAtoms][2];
    bool capped;  // slope_of_cap says something
    DropoutMask<kMAtoms, kNAtoms> dropped;

    /// What `multiply` does beside the product s = q.k, in kSteps steps of k: the dropout mask.
    template <int kSteps>
    __device__ __forceinline__ auto beside_scores(const DropoutBits<kTransposed>& bits) {
        return [this, &bits](int k) {
            if constexpr (kFeatures == Features::dropout) bits.template make_part<kSteps>(dropped, k);
        };
    }

    /// s: q.k in, scores out. All that branches is here, so that `probabilities`, which does not (in a plain kernel),
    /// can share its basic block with the product dp = dout.v and run under it. `staged`: see ScoreFunction::apply.
    template <typename Staged>
    __device__ __forceinline__ void scores(float (&s)[kMAtoms][kNAtoms][4], const ScoreFunctionOf<kFeatures>& score,
                                           const Band& band, const FragmentOrigin<kTransposed>& origin, bool masked,
                                           const Staged& staged) {
        if constexpr (kGeneral) {
            score.template apply_with_gradient<kType>(s, slope_of_cap, origin, staged);
            capped = score.softcap.cap > 0.0f;
        } else if constexpr (kFeatures == Features::tiled) {
            score.bias.template add_tile<kType, kTransposed>(s, score.scale, staged);
        }
        if (masked) apply_mask(s, band, origin, -INFINITY);
    }

    /// s becomes P times the softcap's slope, the factor of dS. scale_log2: base-2 score
    /// per unit of s. lse(i, j, h) gives the LSE of the queries of elements 2h and 2h + 1
    /// of an atom, in base 2 or with a bias in the unit of s (lse_factor); delta likewise.
    template <typename Lse>
    __device__ __forceinline__ void probabilities(float (&s)[kMAtoms][kNAtoms][4], const AttentionParams& p,
                                                  float scale_log2, const DropoutBits<kTransposed>& bits, Lse lse) {
        for_each_pair<kMAtoms, kNAtoms>([&](int i, int j, int h) {
            const float2 l = lse(i, j, h);
            const auto exponent = [&](float x, float row_lse) {
                return has_bias(kFeatures) ? (x - row_lse) * scale_log2 : fmaf(x, scale_log2, -row_lse);
            };
            s[i][j][2 * h] = exp2_fast(exponent(s[i][j][2 * h], l.x));
            s[i][j][2 * h + 1] = exp2_fast(exponent(s[i][j][2 * h + 1], l.y));
            probability[i][j][h] = pack<kType>(s[i][j][2 * h], s[i][j][2 * h + 1]);
        });
        if constexpr (kFeatures == Features::dropout) {
            dropped.apply(probability);
        } else if constexpr (kFeatures == Features::biased) {
            if (p.dropout.enabled()) {
                bits.make_anywhere(dropped, p.mask);
                dropped.apply(probability);
            }
        }
        if constexpr (kGeneral && kThroughSoftcap) {
            if (capped) {
                for_each_pair<kMAtoms, kNAtoms>([&](int i, int j, int h) {
                    const float2 slope = unpack2<kType>(slope_of_cap[i][j][h]);
                    s[i][j][2 * h] *= slope.x;
                    s[i][j][2 * h + 1] *= slope.y;
                });
            }
        }
    }

    /// dp becomes dS / softmax_scale.
    template <typename Delta>
    __device__ __forceinline__ void finish(float (&dp)[kMAtoms][kNAtoms][4], const float (&s)[kMAtoms][kNAtoms][4],
                                           const Dropout& dropout, Delta delta) const {
        if (kFeatures == Features::dropout || (kFeatures == Features::biased && dropout.enabled())) dropped.apply(dp);
        for_each_pair<kMAtoms, kNAtoms>([&](int i, int j, int h) {
            const float2 d = delta(i, j, h);
            dp[i][j][2 * h] = s[i][j][2 * h] * (dp[i][j][2 * h] - d.x);
            dp[i][j][2 * h + 1] = s[i][j][2 * h + 1] * (dp[i][j][2 * h + 1] - d.y);
        });
    }
};

}  // namespace strobe::sm80
