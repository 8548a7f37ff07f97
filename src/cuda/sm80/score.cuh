// What happens to a tile of scores between the two matrix products, on the accumulator fragments of one warp: the mask,
// and in the general kernels softcap, bias, ALiBi and dropout. Each is a pass over the fragments behind a branch that is
// the same for the whole grid.
#pragma once

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

/// The score function of one (batch, head): everything between q.k and the softmax, in base 2 (score * log2(e)).
struct ScoreFunction {
    float scale_log2;
    float cap_log2;     // softcap * log2(e); 0: none
    float scale_inner;  // softmax_scale / softcap
    float slope_log2;   // 0: no ALiBi
    int diagonal;
    const void* bias;  // of this (batch, head); null: none
    DType bias_dtype;
    int64_t bias_row_stride;
    int64_t bias_col_stride;
    int seqlen_q;
    int seqlen_k;

    __device__ ScoreFunction(const AttentionParams& p, const Sequence& seq, int batch, int head)
        : scale_log2(p.score.softmax_scale * kLog2e),
          cap_log2(p.score.softcap * kLog2e),
          scale_inner(p.score.softcap > 0.0f ? p.score.softmax_scale / p.score.softcap : 0.0f),
          slope_log2(p.score.alibi_slopes ? p.score.alibi_slopes[batch * p.score.alibi_batch_stride + head] * kLog2e : 0.0f),
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

    /// s: q.k in, base-2 score out.
    template <bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void apply(float (&s)[kMAtoms][kNAtoms][4], const FragmentOrigin<kTransposed>& origin) const {
        if (cap_log2 > 0.0f) {
            for_each(s, [&](float& x, int, int, int) { x = cap_log2 * tanh_fast(x * scale_inner); });
        } else {
            for_each(s, [&](float& x, int, int, int) { x *= scale_log2; });
        }
        add_bias_and_slope(s, origin);
    }

    /// The same, and slope_of_cap = d score / d (softmax_scale * q.k) in the kernel's 16-bit type, two columns a word.
    template <DType kType, bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void apply_with_gradient(float (&s)[kMAtoms][kNAtoms][4],
                                                        uint32_t (&slope_of_cap)[kMAtoms][kNAtoms][2],
                                                        const FragmentOrigin<kTransposed>& origin) const {
        if (cap_log2 > 0.0f) {
#pragma unroll
            for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
                for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float t0 = tanh_fast(s[i][j][2 * h] * scale_inner);
                        const float t1 = tanh_fast(s[i][j][2 * h + 1] * scale_inner);
                        s[i][j][2 * h] = cap_log2 * t0;
                        s[i][j][2 * h + 1] = cap_log2 * t1;
                        slope_of_cap[i][j][h] = pack<kType>(1.0f - t0 * t0, 1.0f - t1 * t1);
                    }
        } else {
            for_each(s, [&](float& x, int, int, int) { x *= scale_log2; });
        }
        add_bias_and_slope(s, origin);
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

    template <bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add_bias_and_slope(float (&s)[kMAtoms][kNAtoms][4],
                                                       const FragmentOrigin<kTransposed>& origin) const {
        using Origin = FragmentOrigin<kTransposed>;
        if (bias) {
            if (bias_dtype == DType::f32) {
                add_bias<FloatBias>(s, origin);
            } else if (bias_dtype == DType::bf16) {
                add_bias<HalfBias<DType::bf16>>(s, origin);
            } else {
                add_bias<HalfBias<DType::f16>>(s, origin);
            }
        }
        if (slope_log2 != 0.0f) {
            const float distance0 = static_cast<float>(origin.query + diagonal - origin.key);
            for_each(s, [&](float& x, int i, int j, int e) {
                const float step = static_cast<float>(Origin::query_step(i, j, e) - Origin::key_step(i, j, e));
                x -= slope_log2 * fabsf(distance0 + step);
            });
        }
    }

    /// A tile inside the sequence whose bias has unit column stride is read with one pointer per query row and constant
    /// offsets, two keys at a time where they lie side by side in the thread and in memory; else every element is addressed
    /// and checked by itself.
    template <typename Elements, bool kTransposed, int kMAtoms, int kNAtoms>
    __device__ __forceinline__ void add_bias(float (&s)[kMAtoms][kNAtoms][4],
                                             const FragmentOrigin<kTransposed>& origin) const {
        using Origin = FragmentOrigin<kTransposed>;
        using T = typename Elements::One;
        using T2 = typename Elements::Two;
        const T* const from = static_cast<const T*>(bias) + origin.query * bias_row_stride + origin.key * bias_col_stride;
        const bool inside = origin.query + Origin::query_step(kMAtoms - 1, kNAtoms - 1, 3) < seqlen_q &&
                            origin.key + Origin::key_step(kMAtoms - 1, kNAtoms - 1, 3) < seqlen_k && bias_col_stride == 1;
        const bool paired = !kTransposed && inside && bias_row_stride % 2 == 0 &&
                            reinterpret_cast<uintptr_t>(from) % sizeof(T2) == 0;
        if (__all_sync(0xffffffffu, paired)) {
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
                        s[i][j][2 * h] = fmaf(x.x, kLog2e, s[i][j][2 * h]);
                        s[i][j][2 * h + 1] = fmaf(x.y, kLog2e, s[i][j][2 * h + 1]);
                    }
                }
        } else if (__all_sync(0xffffffffu, inside)) {
            for_each(s, [&](float& x, int i, int j, int e) {
                x = fmaf(Elements::one(__ldg(from + Origin::query_step(i, j, e) * bias_row_stride + Origin::key_step(i, j, e))), kLog2e, x);
            });
        } else {
            for_each(s, [&](float& x, int i, int j, int e) {
                const int query = Origin::query_step(i, j, e), key = Origin::key_step(i, j, e);
                if (origin.query + query < seqlen_q && origin.key + key < seqlen_k) {
                    x = fmaf(Elements::one(__ldg(from + query * bias_row_stride + key * bias_col_stride)), kLog2e, x);
                }
            });
        }
    }
};

/// What plain kernels, whose score is softmax_scale * q.k, carry in its place.
struct NoScoreFunction {
    __device__ NoScoreFunction(const AttentionParams&, const Sequence&, int, int) {}
};

template <bool kGeneral>
struct ScoreFunctionChoice {
    using Type = NoScoreFunction;
};
template <>
struct ScoreFunctionChoice<true> {
    using Type = ScoreFunction;
};
template <bool kGeneral>
using MaybeScoreFunction = typename ScoreFunctionChoice<kGeneral>::Type;

/// Calls f(element, kept) for every element of the warp's tile. Bits are addressed by position: on one axis with other
/// blocks when the caller placed them (MaskParams::has_positions), else from the sequence's start.
template <bool kTransposed, int kMAtoms, int kNAtoms, typename F>
__device__ __forceinline__ void for_each_kept(float (&s)[kMAtoms][kNAtoms][4], const Dropout& dropout, const MaskParams& place,
                                              uint32_t batch_head, const FragmentOrigin<kTransposed>& origin, F f) {
    using Origin = FragmentOrigin<kTransposed>;
    const uint32_t query0 = origin.query + (place.has_positions ? static_cast<uint32_t>(place.q_position) : 0u);
    const uint32_t key0 = origin.key + (place.has_positions ? static_cast<uint32_t>(place.k_position) : 0u);
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
                    f(atom[2 * (word >> 1)], (bits.word[word] & 0xFFFFu) >= dropout.drop_below);
                    f(atom[2 * (word >> 1) + 1], bits.word[word] >> 16 >= dropout.drop_below);
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
                    f(atom[0], (even_query & 0xFFFFu) >= dropout.drop_below);
                    f(atom[1], (odd_query & 0xFFFFu) >= dropout.drop_below);
                    f(atom[2], even_query >> 16 >= dropout.drop_below);
                    f(atom[3], odd_query >> 16 >= dropout.drop_below);
                }
            }
        }
}

}  // namespace strobe::sm80
