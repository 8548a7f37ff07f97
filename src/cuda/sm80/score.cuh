// What happens to a tile of scores between the two matrix products, on the accumulator
// fragments of one warp: the mask, and in the general kernels softcap, bias and ALiBi.
// Each is a pass over the fragments behind a branch that is the same for the whole grid.
#pragma once

#include "core/variant.hpp"
#include "cuda/sm80/bias.cuh"

namespace strobe::sm80 {

/// The band of one sequence in 32 bits: query i sees key j iff low <= j - i <= high and j < seqlen_k.
struct Band {
    int low;
    int high;
    int seqlen_k;

    static constexpr int kUnbounded = 1 << 30;  // sequences are shorter (select.cpp)

    __device__ explicit Band(const BandMask& m)
        : low(m.left < 0 ? -kUnbounded : clamp(m.diagonal - m.left)),
          high(m.right < 0 ? kUnbounded : clamp(m.diagonal + m.right)),
          seqlen_k(static_cast<int>(m.seqlen_k)) {}

    __device__ static int clamp(int64_t x) {
        return static_cast<int>(x < -kUnbounded ? -kUnbounded : x > kUnbounded ? kUnbounded : x);
    }
    /// What BandMask::key_range says, in 32 bits; 0 to 0 if there is none.
    __device__ int2 key_range(int q_begin, int rows, int seqlen_q) const {
        const int last_q = min(q_begin + rows, seqlen_q) - 1;
        const int begin = max(q_begin + low, 0), end = min(last_q + high + 1, seqlen_k);
        return last_q >= q_begin && end > begin ? make_int2(begin, end) : make_int2(0, 0);
    }
    /// Queries [q0, q0 + rows) see all keys [k0, k0 + cols).
    __device__ bool all_visible(int q0, int rows, int k0, int cols) const {
        return k0 + cols <= seqlen_k && k0 + cols - 1 - q0 <= high && k0 - (q0 + rows - 1) >= low;
    }
    /// Some query in [q0, q0 + rows) sees some key in [k0, k0 + cols).
    __device__ bool any_visible(int q0, int rows, int k0, int cols) const {
        return k0 < seqlen_k && k0 - (q0 + rows - 1) <= high && k0 + cols - 1 - q0 >= low;
    }
};

/// Hidden elements become `hidden`.
template <bool kTransposed, int kMAtoms, int kNAtoms>
__device__ __forceinline__ void apply_mask(float (&s)[kMAtoms][kNAtoms][4], const Band& band,
                                           const FragmentOrigin<kTransposed>& origin, float hidden) {
    using Origin = FragmentOrigin<kTransposed>;
    const int low = band.low - (origin.key - origin.query);
    const int high = band.high - (origin.key - origin.query);
    const int keys_left = band.seqlen_k - origin.key;
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = Origin::key_step(i, j, e);
                const int distance = key - Origin::query_step(i, j, e);
                if (distance < low || distance > high || key >= keys_left) s[i][j][e] = hidden;
            }
}

/// What plain kernels, whose score is softmax_scale * q.k, carry in place of a ScoreFunction.
struct NoScoreFunction {
    __device__ NoScoreFunction(const AttentionParams&, const Sequence&, int, int) {}
    __device__ float unit_log2(const AttentionParams& p) const { return p.score.softmax_scale * kLog2e; }
};

/// softmax_scale * q.k and a bias whose tiles lie in shared memory, in the kernel's type.
struct TiledBias {
    Bias bias;
    float scale;

    __device__ TiledBias(const AttentionParams& p, const Sequence& seq, int batch, int head)
        : bias(p, seq, batch, head), scale(p.score.softmax_scale) {}
    __device__ float unit_log2(const AttentionParams&) const { return kLog2e; }
};

/// cap * tanh(x / cap) as x * polynomial(x^2) while |x| <= cap, to 8e-5 of it: no special function unit, which the
/// exponentials keep busy. The powers of 1 / cap are in the coefficients.
struct SmallSoftcap {
    float c1, c2, c3;

    __device__ explicit SmallSoftcap(float inner) {
        const float square = inner * inner;
        c1 = kTanh[1] * square;
        c2 = kTanh[2] * (square * square);
        c3 = kTanh[3] * (square * square * square);
    }
    __device__ float operator()(float x) const {
        const float square = x * x;
        return x * fmaf(fmaf(fmaf(c3, square, c2), square, c1), square, kTanh[0]);
    }
};

/// The softcap alone, of scores in any unit.
struct Softcap {
    float cap;  // 0: none

    /// s: score in, capped score out.
    template <int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void apply(float (&s)[kMAtoms][kNAtoms][4]) const {
        if (all_small(s)) {
            const SmallSoftcap small(1.0f / cap);
            for_each(s, [&](float& x, int, int, int) { x = small(x); });
        } else {
            for_each(s, [&](float& x, int, int, int) { x = (*this)(x); });
        }
    }

    /// Each element decides for itself by which formula, lest a result depend on its neighbours.
    __device__ float operator()(float x) const {
        const float inner = 1.0f / cap;
        return fabsf(x) <= cap && is_moderate_softcap(cap) ? SmallSoftcap(inner)(x) : cap * tanh_fast(x * inner);
    }

    /// No score of the warp's tile is beyond the softcap, so that the short form of tanh serves.
    template <int kMAtoms, int kNAtoms>
    __device__ __forceinline__ bool all_small(float (&s)[kMAtoms][kNAtoms][4]) const {
        float largest[4] = {};  // of each element of an atom: chains short enough to run side by side
        for_each(s, [&](float& x, int, int, int e) { largest[e] = fmaxf(largest[e], fabsf(x)); });
        const float all = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
        return __all_sync(0xffffffffu, all <= cap && is_moderate_softcap(cap));
    }
};

/// What bends the scores of a row: x (slope + c1 x^2 + c2 x^4).
struct SoftcapCurve {
    float c1, c2;
};

/// The same while |x| <= cap / 2, to 2.3e-5 of it, as the exponent of a probability: what scores are multiplied by is
/// in the coefficients, so that it takes three multiply-adds more than scores without a softcap.
struct TightSoftcap {
    static constexpr float kSlope = 0.99997744f;
    // Its powers are finite, so that a straight curve takes it to no NaN, and every curve out of sight.
    static constexpr float kHidden = -1e18f;
    float largest;  // that it serves; negative: nothing
    float slope;
    SoftcapCurve curve;
    float inverse;

    __device__ TightSoftcap(const Softcap& softcap, float scale_log2) : inverse(1.0f / scale_log2) {
        // exp2 of any capped score minus any other one is far from the smallest float, so that a bound of a row's
        // scores serves as well as the largest of them.
        constexpr float kWidest = 40.0f;
        const float half = 0.5f * softcap.cap;
        largest = is_moderate_softcap(softcap.cap) && half * scale_log2 < kWidest ? half : -1.0f;
        const float square = 1.0f / (softcap.cap * softcap.cap);
        slope = kSlope * scale_log2;
        curve = {-0.33169151f * square * scale_log2, 0.11520976f * (square * square) * scale_log2};
    }
    __device__ float exponent(float x, float offset, const SoftcapCurve& row) const {
        const float square = x * x;
        return fmaf(x, fmaf(fmaf(row.c2, square, row.c1), square, slope), -offset);
    }
    __device__ float score(float x) const { return exponent(x, 0.0f, curve) * inverse; }
};

/// softmax_scale * q.k and a softcap.
struct CappedScore {
    Softcap softcap;  // in units of softmax_scale, as the scores

    __device__ CappedScore(const AttentionParams& p, const Sequence&, int, int)
        : softcap{p.score.softcap / p.score.softmax_scale} {}
    __device__ float unit_log2(const AttentionParams& p) const { return p.score.softmax_scale * kLog2e; }
};

/// The score function of one (batch, head): everything between q.k and the softmax. Scores are held in units of
/// softmax_scale, q.k itself where nothing is added, and brought to base 2 by the softmax in the multiply-add that it
/// does anyway. With a bias they are held as they are: of a bias that is the least finite number of its type, as masks
/// are made of, no multiple is finite.
template <bool kBias>
struct ScoreFunction {
    float product_unit;  // before bias and ALiBi: score = product_unit * what the fragments hold
    float unit;          // behind them: 1 with a bias, else the same
    float prescale;      // 1 unless softmax_scale is no good unit: not positive, or tiny
    Softcap softcap;     // / product_unit
    float slope;         // of ALiBi, / unit; 0: none
    int diagonal;
    BiasOf<kBias> bias;

    static constexpr float kSmallestUnit = 1e-6f;

    __device__ ScoreFunction(const AttentionParams& p, const Sequence& seq, int batch, int head)
        : product_unit(p.score.softmax_scale >= kSmallestUnit ? p.score.softmax_scale : 1.0f),
          unit(kBias && p.score.bias ? 1.0f : product_unit),
          prescale(p.score.softmax_scale >= kSmallestUnit ? 1.0f : p.score.softmax_scale),
          softcap{p.score.softcap * (1.0f / product_unit)},
          slope(p.score.alibi_slopes ? p.score.alibi_slopes[batch * p.score.alibi_batch_stride + head] * (1.0f / unit)
                                     : 0.0f),
          diagonal(Band::clamp(seq.diagonal)),
          bias(p, seq, batch, head) {}

    __device__ float unit_log2(const AttentionParams&) const { return unit * kLog2e; }

    /// s: q.k in, score out. `staged`: where the tile's bias lies in shared memory, if bias.staged.
    template <bool kTransposed, int kMAtoms, int kNAtoms, typename Staged>
    __device__ __forceinline__ void apply(float (&s)[kMAtoms][kNAtoms][4], const FragmentOrigin<kTransposed>& origin,
                                          const Staged& staged) const {
        scale(s);
        if (softcap.cap > 0.0f) softcap.apply(s);
        bias.add(s, origin, product_unit, staged);
        add_slope(s, origin);
    }

    /// The same, and slope_of_cap = d score / d (softmax_scale * q.k) in the kernel's 16-bit type, two columns a word.
    template <DType kType, bool kTransposed, int kMAtoms, int kNAtoms, typename Staged>
    __device__ __forceinline__ void apply_with_gradient(float (&s)[kMAtoms][kNAtoms][4],
                                                        uint32_t (&slope_of_cap)[kMAtoms][kNAtoms][2],
                                                        const FragmentOrigin<kTransposed>& origin,
                                                        const Staged& staged) const {
        scale(s);
        if (softcap.cap > 0.0f) {
            const float inner = 1.0f / softcap.cap;
            if (softcap.all_small(s)) {
                cap_with_gradient<kType>(s, slope_of_cap, inner, SmallSoftcap(inner));
            } else {
                cap_with_gradient<kType>(s, slope_of_cap, inner, softcap);
            }
        }
        bias.add(s, origin, product_unit, staged);
        add_slope(s, origin);
    }

private:
    template <int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void scale(float (&s)[kMAtoms][kNAtoms][4]) const {
        if (prescale != 1.0f) for_each(s, [&](float& x, int, int, int) { x *= prescale; });
    }

    template <DType kType, int kMAtoms, int kNAtoms, typename Cap>
    __device__ __forceinline__ static void cap_with_gradient(float (&s)[kMAtoms][kNAtoms][4],
                                                             uint32_t (&slope_of_cap)[kMAtoms][kNAtoms][2], float inner,
                                                             Cap capped) {
        const float square = -inner * inner;
        for_each_pair<kMAtoms, kNAtoms>([&](int i, int j, int h) {
            const float x = capped(s[i][j][2 * h]), y = capped(s[i][j][2 * h + 1]);
            s[i][j][2 * h] = x;
            s[i][j][2 * h + 1] = y;
            slope_of_cap[i][j][h] = pack<kType>(fmaf(x * square, x, 1.0f), fmaf(y * square, y, 1.0f));
        });
    }

    template <bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add_slope(float (&s)[kMAtoms][kNAtoms][4],
                                              const FragmentOrigin<kTransposed>& origin) const {
        using Origin = FragmentOrigin<kTransposed>;
        if (slope == 0.0f) return;
        const float distance0 = static_cast<float>(origin.query + diagonal - origin.key);
        for_each(s, [&](float& x, int i, int j, int e) {
            const float step = static_cast<float>(Origin::query_step(i, j, e) - Origin::key_step(i, j, e));
            x = fmaf(-slope, fabsf(distance0 + step), x);
        });
    }
};

template <Features kFeatures>
struct ScoreFunctionChoice {
    using Type = ScoreFunction<kFeatures == Features::biased>;
};
template <>
struct ScoreFunctionChoice<Features::plain> {
    using Type = NoScoreFunction;
};
template <>
struct ScoreFunctionChoice<Features::dropout> {
    using Type = NoScoreFunction;
};
template <>
struct ScoreFunctionChoice<Features::capped> {
    using Type = CappedScore;
};
template <>
struct ScoreFunctionChoice<Features::tiled> {
    using Type = TiledBias;
};
template <Features kFeatures>
using ScoreFunctionOf = typename ScoreFunctionChoice<kFeatures>::Type;

}  // namespace strobe::sm80
