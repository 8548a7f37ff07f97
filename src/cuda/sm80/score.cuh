// What happens to a tile of scores between the two matrix products, on the accumulator fragments of one warp: the mask,
// and in the general kernels softcap, bias, ALiBi and dropout. Each is a pass over the fragments behind a branch that is
// the same for the whole grid.
#pragma once

#include "core/variant.hpp"
#include "cuda/sm80/ptx.cuh"

namespace strobe::sm80 {

/// Which (query, key) an accumulator element is. `query` and `key` belong to this thread's element 0 of atom (0, 0).
/// kTransposed: accumulator rows are keys (S^T), else queries.
template <bool kTransposed>
struct FragmentOrigin {
    int query;
    int key;

    __device__ static constexpr int row_step(int i, int e) { return 16 * i + 8 * (e >> 1); }
    __device__ static constexpr int col_step(int j, int e) { return 8 * j + (e & 1); }
    __device__ static constexpr int query_step(int i, int j, int e) { return kTransposed ? col_step(j, e) : row_step(i, e); }
    __device__ static constexpr int key_step(int i, int j, int e) { return kTransposed ? row_step(i, e) : col_step(j, e); }
};

/// The band of one sequence in 32 bits: query i sees key j iff low <= j - i <= high and j < seqlen_k.
struct Band {
    int low;
    int high;
    int seqlen_k;

    static constexpr int kUnbounded = 1 << 30;  // sequences are shorter (checked by the plan)

    __device__ explicit Band(const BandMask& m)
        : low(m.left < 0 ? -kUnbounded : clamp(m.diagonal - m.left)),
          high(m.right < 0 ? kUnbounded : clamp(m.diagonal + m.right)),
          seqlen_k(static_cast<int>(m.seqlen_k)) {}

    __device__ static int clamp(int64_t x) {
        return static_cast<int>(x < -kUnbounded ? -kUnbounded : x > kUnbounded ? kUnbounded : x);
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

/// How bias elements of one type are read, one at a time and two at a time.
struct FloatBias {
    using One = float;
    using Two = float2;
    __device__ static float one(float x) { return x; }
    __device__ static float2 two(float2 x) { return x; }
};
template <DType kType>
struct HalfBias {
    using One = uint16_t;
    using Two = uint32_t;
    __device__ static float one(uint16_t x) { return unpack<kType>(x); }
    __device__ static float2 two(uint32_t x) { return unpack2<kType>(x); }
};

/// Bias elements of 16 bits that a tile of scores will need, asked for before its product so that they arrive under it.
template <int kMAtoms, int kNAtoms>
struct BiasAhead {
    uint32_t words[kMAtoms][2][kNAtoms];
    bool held = false;  // the same for the whole warp
};

/// What plain kernels, whose score is softmax_scale * q.k, carry in place of a ScoreFunction.
struct NoScoreFunction {
    __device__ NoScoreFunction(const AttentionParams&, const Sequence&, int, int) {}
    __device__ float unit_log2(const AttentionParams& p) const { return p.score.softmax_scale * kLog2e; }
};

/// The score function of one (batch, head): everything between q.k and the softmax. Scores are held in units of softmax_scale,
/// q.k itself where nothing is added, and brought to base 2 by the softmax in the multiply-add that it does anyway.
template <bool kBias>
struct ScoreFunction {
    float unit;       // score = unit * what the fragments hold
    float prescale;   // 1 unless softmax_scale is no good unit: not positive, or tiny
    float inverse;    // 1 / unit
    float cap;        // softcap / unit; 0: none
    float slope;      // of ALiBi, / unit; 0: none
    int diagonal;
    const void* bias; // of this (batch, head); null: none
    DType bias_dtype;
    int64_t bias_row_stride;
    int64_t bias_col_stride;
    int seqlen_q;
    int seqlen_k;

    static constexpr float kSmallestUnit = 1e-6f;

    __device__ ScoreFunction(const AttentionParams& p, const Sequence& seq, int batch, int head)
        : unit(p.score.softmax_scale >= kSmallestUnit ? p.score.softmax_scale : 1.0f),
          prescale(p.score.softmax_scale >= kSmallestUnit ? 1.0f : p.score.softmax_scale),
          inverse(1.0f / unit),
          cap(p.score.softcap * inverse),
          slope(p.score.alibi_slopes ? p.score.alibi_slopes[batch * p.score.alibi_batch_stride + head] * inverse : 0.0f),
          diagonal(Band::clamp(seq.diagonal)),
          bias(nullptr),
          bias_dtype(p.bias_dtype),
          bias_row_stride(p.score.bias.row_stride),
          bias_col_stride(p.score.bias.col_stride),
          seqlen_q(static_cast<int>(seq.seqlen_q)),
          seqlen_k(static_cast<int>(seq.seqlen_k)) {
        const BiasRef& b = p.score.bias;
        if (!b) return;
        const int64_t offset = batch * b.batch_stride + head * b.head_stride;
        bias = static_cast<const char*>(b.data) + offset * (bias_dtype == DType::f32 ? 4 : 2);
    }

    __device__ float unit_log2(const AttentionParams&) const { return unit * kLog2e; }

    /// Reads the tile's bias if it has 16 bits, lies inside the sequence and two keys side by side can be read as one word.
    template <int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void ask_bias(BiasAhead<kMAtoms, kNAtoms>& ahead, const FragmentOrigin<false>& origin) const {
        ahead.held = false;
        if (!bias || bias_dtype == DType::f32) return;
        const uint16_t* const from = bias_at<uint16_t>(origin);
        if (!__all_sync(0xffffffffu, inside<kMAtoms, kNAtoms>(origin) && paired(from))) return;
        ahead.held = true;
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint16_t* const row = from + (16 * i + 8 * h) * bias_row_stride;
#pragma unroll
                for (int j = 0; j < kNAtoms; ++j) ahead.words[i][h][j] = __ldg(reinterpret_cast<const uint32_t*>(row + 8 * j));
            }
    }

    /// s: q.k in, score out.
    template <bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void apply(float (&s)[kMAtoms][kNAtoms][4], const FragmentOrigin<kTransposed>& origin,
                                          const BiasAhead<kMAtoms, kNAtoms>& ahead) const {
        scale(s);
        if (cap > 0.0f) {
            const float inner = 1.0f / cap;
            if (all_small(s)) {
                for_each(s, [&](float& x, int, int, int) { x *= tanh_ratio(x * x * (inner * inner)); });
            } else {
                for_each(s, [&](float& x, int, int, int) { x = cap * tanh_fast(x * inner); });
            }
        }
        if constexpr (kBias) {
            if (!ahead.held) {
                add_bias(s, origin);
            } else if (bias_dtype == DType::bf16) {
                add_words<DType::bf16>(s, ahead);
            } else {
                add_words<DType::f16>(s, ahead);
            }
        }
        add_slope(s, origin);
    }

    /// The same, and slope_of_cap = d score / d (softmax_scale * q.k) in the kernel's 16-bit type, two columns a word.
    template <DType kType, bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void apply_with_gradient(float (&s)[kMAtoms][kNAtoms][4],
                                                        uint32_t (&slope_of_cap)[kMAtoms][kNAtoms][2],
                                                        const FragmentOrigin<kTransposed>& origin) const {
        scale(s);
        if (cap > 0.0f) {
            if (all_small(s)) {
                cap_with_gradient<kType>(s, slope_of_cap, [](float x) { return x * tanh_ratio(x * x); });
            } else {
                cap_with_gradient<kType>(s, slope_of_cap, [](float x) { return tanh_fast(x); });
            }
        }
        if constexpr (kBias) add_bias(s, origin);
        add_slope(s, origin);
    }

private:
    template <int kMAtoms, int kNAtoms, typename F>
    __device__ __forceinline__ static void for_each(float (&s)[kMAtoms][kNAtoms][4], F f) {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) f(s[i][j][e], i, j, e);
    }

    template <int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void scale(float (&s)[kMAtoms][kNAtoms][4]) const {
        if (prescale != 1.0f) for_each(s, [&](float& x, int, int, int) { x *= prescale; });
    }

    /// No score of the warp's tile is beyond the softcap, so that the short form of tanh serves.
    template <int kMAtoms, int kNAtoms>
    __device__ __forceinline__ bool all_small(float (&s)[kMAtoms][kNAtoms][4]) const {
        float largest = 0.0f;
        for_each(s, [&](float& x, int, int, int) { largest = fmaxf(largest, fabsf(x)); });
        return __all_sync(0xffffffffu, largest <= cap);
    }

    template <DType kType, int kMAtoms, int kNAtoms, typename Tanh>
    __device__ __forceinline__ void cap_with_gradient(float (&s)[kMAtoms][kNAtoms][4],
                                                      uint32_t (&slope_of_cap)[kMAtoms][kNAtoms][2], Tanh tanh) const {
        const float inner = 1.0f / cap;
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float t0 = tanh(s[i][j][2 * h] * inner), t1 = tanh(s[i][j][2 * h + 1] * inner);
                    s[i][j][2 * h] = cap * t0;
                    s[i][j][2 * h + 1] = cap * t1;
                    slope_of_cap[i][j][h] = pack<kType>(1.0f - t0 * t0, 1.0f - t1 * t1);
                }
    }

    template <bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add_slope(float (&s)[kMAtoms][kNAtoms][4], const FragmentOrigin<kTransposed>& origin) const {
        using Origin = FragmentOrigin<kTransposed>;
        if (slope == 0.0f) return;
        const float distance0 = static_cast<float>(origin.query + diagonal - origin.key);
        for_each(s, [&](float& x, int i, int j, int e) {
            const float step = static_cast<float>(Origin::query_step(i, j, e) - Origin::key_step(i, j, e));
            x = fmaf(-slope, fabsf(distance0 + step), x);
        });
    }

    template <typename T, bool kTransposed>
    __device__ __forceinline__ const T* bias_at(const FragmentOrigin<kTransposed>& origin) const {
        return static_cast<const T*>(bias) + origin.query * bias_row_stride + origin.key * bias_col_stride;
    }
    template <int kMAtoms, int kNAtoms, bool kTransposed>
    __device__ __forceinline__ bool inside(const FragmentOrigin<kTransposed>& origin) const {
        using Origin = FragmentOrigin<kTransposed>;
        return origin.query + Origin::query_step(kMAtoms - 1, kNAtoms - 1, 3) < seqlen_q &&
               origin.key + Origin::key_step(kMAtoms - 1, kNAtoms - 1, 3) < seqlen_k && bias_col_stride == 1;
    }
    template <typename T>
    __device__ __forceinline__ bool paired(const T* from) const {
        return bias_row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(from) % (2 * sizeof(T)) == 0;
    }

    template <DType kType, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add_words(float (&s)[kMAtoms][kNAtoms][4], const BiasAhead<kMAtoms, kNAtoms>& ahead) const {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int j = 0; j < kNAtoms; ++j) {
                    const float2 x = unpack2<kType>(ahead.words[i][h][j]);
                    s[i][j][2 * h] = fmaf(x.x, inverse, s[i][j][2 * h]);
                    s[i][j][2 * h + 1] = fmaf(x.y, inverse, s[i][j][2 * h + 1]);
                }
    }

    template <bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add_bias(float (&s)[kMAtoms][kNAtoms][4], const FragmentOrigin<kTransposed>& origin) const {
        if (!bias) return;
        if (bias_dtype == DType::f32) {
            add_bias_of<FloatBias>(s, origin);
        } else if (bias_dtype == DType::bf16) {
            add_bias_of<HalfBias<DType::bf16>>(s, origin);
        } else {
            add_bias_of<HalfBias<DType::f16>>(s, origin);
        }
    }

    /// A tile inside the sequence whose bias has unit column stride is read with one pointer per query row and constant
    /// offsets, two keys at a time where they lie side by side in the thread and in memory; else every element is addressed
    /// and checked by itself.
    template <typename Elements, bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add_bias_of(float (&s)[kMAtoms][kNAtoms][4],
                                                const FragmentOrigin<kTransposed>& origin) const {
        using Origin = FragmentOrigin<kTransposed>;
        using T = typename Elements::One;
        using T2 = typename Elements::Two;
        const T* const from = bias_at<T>(origin);
        const bool whole = inside<kMAtoms, kNAtoms>(origin);
        if (!kTransposed && __all_sync(0xffffffffu, whole && paired(from))) {
#pragma unroll
            for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const T* const row = from + (16 * i + 8 * h) * bias_row_stride;
                    T2 words[kNAtoms];
#pragma unroll
                    for (int j = 0; j < kNAtoms; ++j) words[j] = __ldg(reinterpret_cast<const T2*>(row + 8 * j));
#pragma unroll
                    for (int j = 0; j < kNAtoms; ++j) {
                        const float2 x = Elements::two(words[j]);
                        s[i][j][2 * h] = fmaf(x.x, inverse, s[i][j][2 * h]);
                        s[i][j][2 * h + 1] = fmaf(x.y, inverse, s[i][j][2 * h + 1]);
                    }
                }
        } else if (__all_sync(0xffffffffu, whole)) {
            for_each(s, [&](float& x, int i, int j, int e) {
                x = fmaf(Elements::one(__ldg(from + Origin::query_step(i, j, e) * bias_row_stride + Origin::key_step(i, j, e))), inverse, x);
            });
        } else {
            for_each(s, [&](float& x, int i, int j, int e) {
                const int query = Origin::query_step(i, j, e), key = Origin::key_step(i, j, e);
                if (origin.query + query < seqlen_q && origin.key + key < seqlen_k) {
                    x = fmaf(Elements::one(__ldg(from + query * bias_row_stride + key * bias_col_stride)), inverse, x);
                }
            });
        }
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
template <Features kFeatures>
using ScoreFunctionOf = typename ScoreFunctionChoice<kFeatures>::Type;

/// Calls f(element, kept) for every element of the warp's tile. Bits are addressed by position: on one axis with other
/// blocks when the caller placed them (MaskParams::has_positions), else from the sequence's start.
template <bool kTransposed, int kMAtoms, int kNAtoms, typename F>
__device__ __forceinline__ void for_each_kept(float (&s)[kMAtoms][kNAtoms][4], const Dropout& dropout, const MaskParams& place,
                                              uint32_t batch_head, const FragmentOrigin<kTransposed>& origin, F f) {
    using Origin = FragmentOrigin<kTransposed>;
    const uint32_t query0 = origin.query + (place.has_positions ? static_cast<uint32_t>(place.q_position) : 0u);
    const uint32_t key0 = origin.key + (place.has_positions ? static_cast<uint32_t>(place.k_position) : 0u);
    const uint32_t drop_high = dropout.drop_below << 16;  // a word is below it iff its upper half is below drop_below
    const bool shifted = place.has_positions && ((place.q_position | place.k_position) & 15) != 0;
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int j = 0; j < kNAtoms; j += 2) {
            if (shifted) {
                // The tile straddles the groups of eight: one Philox call for every element.
                uint32_t kept = 0;
#pragma unroll 1
                for (int n = 0; n < 8; ++n) {
                    const uint32_t query = query0 + Origin::query_step(i, j + (n >> 2), n & 3);
                    const uint32_t key = key0 + Origin::key_step(i, j + (n >> 2), n & 3);
                    kept |= static_cast<uint32_t>(dropout.keep(batch_head, query, key)) << n;
                }
#pragma unroll
                for (int n = 0; n < 8; ++n) f(s[i][j + (n >> 2)][n & 3], (kept >> n & 1u) != 0);
                continue;
            }
            // One Philox call gives eight neighbours' bits. A thread of an untransposed tile holds all eight of a group. In a
            // transposed tile two threads, four lanes apart, hold half of the same two groups: each makes one of them and
            // sends the other's half.
            if constexpr (!kTransposed) {
                const Philox4x32 bits = dropout.group(batch_head, query0 + 16 * i, key0 + 8 * j);
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    float (&atom)[4] = s[i][j + (word & 1)];
                    f(atom[2 * (word >> 1)], bits.word[word] << 16 >= drop_high);
                    f(atom[2 * (word >> 1) + 1], bits.word[word] >= drop_high);
                }
            } else {
                const uint32_t odd = key0 & 1u;  // also the half of every word that is this thread's
                const Philox4x32 made = dropout.group(batch_head, query0 + 8 * j + odd, key0 + 16 * i);
                const uint32_t own = odd ? 0x7632u : 0x5410u, others = odd ? 0x5410u : 0x7632u;
#pragma unroll
                for (int col_high = 0; col_high < 2; ++col_high) {
                    const uint32_t low = made.word[2 * col_high], high = made.word[2 * col_high + 1];
                    const uint32_t mine = __byte_perm(low, high, own);
                    const uint32_t theirs = __shfl_xor_sync(0xffffffffu, __byte_perm(low, high, others), 4);
                    const uint32_t even_query = odd ? theirs : mine, odd_query = odd ? mine : theirs;
                    float (&atom)[4] = s[i][j + col_high];
                    f(atom[0], even_query << 16 >= drop_high);
                    f(atom[1], odd_query << 16 >= drop_high);
                    f(atom[2], even_query >= drop_high);
                    f(atom[3], odd_query >= drop_high);
                }
            }
        }
}

}  // namespace strobe::sm80
