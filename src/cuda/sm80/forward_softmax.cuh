// The online softmax of the forward, on the accumulator fragments of one warp.
#pragma once

#include "cuda/sm80/config.hpp"
#include "cuda/sm80/score.cuh"

namespace strobe::sm80 {

/// f(i, h) for the rows that a thread holds a part of: two of each m-atom.
template <int kMAtoms, typename F>
__device__ __forceinline__ void for_each_row(F f) {
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) f(i, h);
}

/// f(element) for what a thread holds of one row of an m-atom.
template <int kNAtoms, typename F>
__device__ __forceinline__ void for_row(float (&x)[kNAtoms][4], int h, F f) {
#pragma unroll
    for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) f(x[j][e]);
}

/// Running maximum and sum of the rows a thread holds. The reference maximum is moved only when a row outgrows it by
/// 2^8: exp2 stays in range, the division at the end removes the reference, and most tiles skip rescaling O. kHuge: a
/// score times scale_log2 may be beyond all floats, or so large that its rounding is. The reference of such a row is
/// subtracted from its scores ahead of the exponentials; the others pay nothing for it.
template <int kMAtoms, bool kHuge = false>
struct OnlineSoftmax {
    float reference[kMAtoms][2];
    float sum[kMAtoms][2];
    float scale_log2;  // > 0
    bool any_far = false;  // kHuge: one of this thread's rows is far

    __device__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                reference[i][h] = -INFINITY;
                sum[i][h] = 0.0f;
            }
    }

    /// The maxima of what this thread has of a tile's rows; true if one outgrows its reference. If a row does, one of
    /// the four threads that share it sees so: only then are their maxima brought together (quad_maxima).
    template <int kNAtoms>
    __device__ __forceinline__ bool row_maxima(const float (&s)[kMAtoms][kNAtoms][4],
                                               float (&row_max)[kMAtoms][2]) const {
        bool grows = false;
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float m = fmaxf(s[i][0][2 * h], s[i][0][2 * h + 1]);
#pragma unroll
                for (int j = 1; j < kNAtoms; ++j) m = fmaxf(m, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
                row_max[i][h] = m;
                grows |= outgrows(row_max[i][h], reference[i][h]);
            }
        return grows;
    }

    __device__ __forceinline__ static void quad_maxima(float (&row_max)[kMAtoms][2]) {
        for_each_row<kMAtoms>([&](int i, int h) { row_max[i][h] = quad_max(row_max[i][h]); });
    }

    /// Brings the references of rows that outgrow them up to row_max; o and the sums follow.
    template <int kDAtoms>
    __device__ __forceinline__ void grow(const float (&row_max)[kMAtoms][2], float (&o)[kMAtoms][kDAtoms][4]) {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // Row by row, so that a row's result does not depend on its neighbours.
                if (!outgrows(row_max[i][h], reference[i][h])) continue;
                const float factor = exp2_fast((reference[i][h] - row_max[i][h]) * scale_log2);
                reference[i][h] = row_max[i][h];
                sum[i][h] *= factor;
#pragma unroll
                for (int j = 0; j < kDAtoms; ++j) {
                    o[i][j][2 * h] *= factor;
                    o[i][j][2 * h + 1] *= factor;
                }
            }
    }

    /// kHuge: the reference times scale_log2 is better not subtracted in one rounding with the product. (Far below what
    /// the range of exp2 takes, lest log-sum-exps be off by more than their own rounding.)
    __device__ static bool is_far(float offset) { return !(fabsf(offset) <= 1024.0f); }

    /// Rows far from zero: their scores relative to their references.
    template <int kNAtoms>
    __device__ __forceinline__ void bring_near(float (&s)[kMAtoms][kNAtoms][4]) {
        any_far = false;
        for_each_row<kMAtoms>([&](int i, int h) {
            if (!is_far(reference[i][h] * scale_log2) || reference[i][h] == -INFINITY) return;
            any_far = true;
#pragma unroll
            for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; ++e) s[i][j][e] -= reference[i][h];
        });
    }

    /// What is subtracted from the scores of a row times scale_log2. A row that has seen nothing yet has reference
    /// -inf; its scores are -inf and must become 0, not NaN.
    __device__ float exponent_offset(int i, int h) const {
        const bool is_near = kHuge ? !is_far(reference[i][h] * scale_log2) : reference[i][h] != -INFINITY;
        return is_near ? reference[i][h] * scale_log2 : 0.0f;
    }

    /// s becomes exp2(exponent(s, offset, i, h)), offset = scale_log2 * reference,
    /// or 0 for rows that are brought near; total += its row sums.
    template <int kNAtoms, typename Exponent>
    __device__ __forceinline__ void exponentiate(float (&s)[kMAtoms][kNAtoms][4], float (&total)[kMAtoms][2],
                                                 Exponent exponent) const {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float offset = exponent_offset(i, h);
#pragma unroll
                for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) {
                        s[i][j][e] = exp2_fast(exponent(s[i][j][e], offset, i, h));
                        total[i][h] += s[i][j][e];
                    }
            }
    }

    /// s becomes exp2(scale_log2 * (s - reference)); total += its row sums.
    template <int kNAtoms>
    __device__ __forceinline__ void exponentiate(float (&s)[kMAtoms][kNAtoms][4], float (&total)[kMAtoms][2]) const {
        exponentiate(s, total, [this](float x, float offset, int, int) { return fmaf(x, scale_log2, -offset); });
    }

    /// What comes before the exponentials of a tile whose scores the softcap has yet to bend; `curve` is what they then
    /// take. In bf16, whose range is that of floats, the largest magnitude of a row serves as its maximum. Rows that
    /// `tight` does not serve are bent here, each for itself, so that no result depends on a neighbour, and get a
    /// straight curve. Hidden elements are NaN until all maxima are known.
    template <int kNAtoms, int kDAtoms>
    __device__ __forceinline__ void prepare(float (&s)[kMAtoms][kNAtoms][4], float (&o)[kMAtoms][kDAtoms][4],
                                            const TightSoftcap& tight, const Softcap& softcap,
                                            SoftcapCurve (&curve)[kMAtoms][2]) {
        float row_max[kMAtoms][2];
        bool rare = tight.largest < 0.0f;
        for_each_row<kMAtoms>([&](int i, int h) {
            float m = fmaxf(fabsf(s[i][0][2 * h]), fabsf(s[i][0][2 * h + 1]));
#pragma unroll
            for (int j = 1; j < kNAtoms; ++j) m = fmaxf(m, fmaxf(fabsf(s[i][j][2 * h]), fabsf(s[i][j][2 * h + 1])));
            row_max[i][h] = m;
            rare |= m > tight.largest || outgrows(tight.score(m), reference[i][h]);
            curve[i][h] = tight.curve;
        });
        if (!__any_sync(0xffffffffu, rare)) return;

        bool tightly[kMAtoms][2];
        bool all = true, grows = false;
        for_each_row<kMAtoms>([&](int i, int h) {
            const float m = quad_max(row_max[i][h]);
            tightly[i][h] = tight.largest >= 0.0f && !(m > tight.largest);
            all &= tightly[i][h];
            row_max[i][h] = tight.score(m);
        });
        if (!__all_sync(0xffffffffu, all)) {
            for_each_row<kMAtoms>([&](int i, int h) {
                if (tightly[i][h]) return;
                curve[i][h] = {0.0f, 0.0f};
                float m = -INFINITY;
#pragma unroll
                for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) {
                        const float bent = softcap(s[i][j][e]);
                        m = fmaxf(m, bent);
                        s[i][j][e] = bent * (1.0f / TightSoftcap::kSlope);
                    }
                row_max[i][h] = m;
            });
            for_each_row<kMAtoms>([&](int i, int h) {
                const float m = quad_max(row_max[i][h]);
                if (!tightly[i][h]) row_max[i][h] = m;
            });
        }
        for_each_row<kMAtoms>([&](int i, int h) { grows |= outgrows(row_max[i][h], reference[i][h]); });
        if (__any_sync(0xffffffffu, grows)) grow(row_max, o);
    }

    /// What comes before the exponentials of a tile: o and the sums follow when a reference moves.
    template <int kNAtoms, int kDAtoms>
    __device__ __forceinline__ void settle(float (&s)[kMAtoms][kNAtoms][4], float (&o)[kMAtoms][kDAtoms][4]) {
        float row_max[kMAtoms][2];
        const bool grows = row_maxima(s, row_max);
        if (__any_sync(0xffffffffu, grows || (kHuge && any_far))) {
            quad_maxima(row_max);
            grow(row_max, o);
            if constexpr (kHuge) bring_near(s);
        }
    }

    /// One tile: scores become probabilities.
    template <int kNAtoms, int kDAtoms>
    __device__ __forceinline__ void update(float (&s)[kMAtoms][kNAtoms][4], float (&o)[kMAtoms][kDAtoms][4]) {
        settle(s, o);
        exponentiate(s, sum);
    }

    /// The probabilities of settled scores as the A operand of their product with V, each step of k made when it is
    /// asked for; keep(k)(i)(n, pair) is what stays of word n of fragment i.
    template <DType kType, int kNAtoms, typename Keep>
    __device__ __forceinline__ auto a_probabilities(const float (&s)[kMAtoms][kNAtoms][4],
                                                    const float (&offset)[kMAtoms][2], Keep keep) {
        return [this, &s, &offset, keep](int k, uint32_t (&a)[kMAtoms][4]) {
            const auto keep_step = keep(k);
#pragma unroll
            for (int i = 0; i < kMAtoms; ++i) {
                const auto keep_pair = keep_step(i);
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const int h = n & 1;
                    const float(&pair)[4] = s[i][2 * k + n / 2];
                    const float x = exp2_fast(fmaf(pair[2 * h], scale_log2, -offset[i][h]));
                    const float y = exp2_fast(fmaf(pair[2 * h + 1], scale_log2, -offset[i][h]));
                    sum[i][h] += x;
                    sum[i][h] += y;
                    a[i][n] = keep_pair(n, pack<kType>(x, y));
                }
            }
        };
    }

    __device__ void finish() {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) sum[i][h] = quad_sum(sum[i][h]);
    }
    __device__ float lse(int i, int h) const {
        if (sum[i][h] == 0.0f) return -INFINITY;
        // A huge score is its own log-sum-exp, to the bit: the backward subtracts the one from the other.
        static_assert(kLog2e * kLn2 == 1.0f);
        const bool far = kHuge && is_far(reference[i][h] * scale_log2);
        const float natural = far ? reference[i][h] * (scale_log2 * kLn2) : (reference[i][h] * scale_log2) * kLn2;
        return natural + __logf(sum[i][h]);
    }

private:
    /// Not where both are -inf.
    __device__ bool outgrows(float maximum, float old) const { return (maximum - old) * scale_log2 > 8.0f; }
};

/// Two warps that share query rows: each has the scores of half the keys of a tile and half the columns of O. Their
/// references are the same at all times; their sums are added at the end.
template <int kMAtoms>
struct WarpPair {
    static constexpr int kThreads = 64;
    static constexpr int kCtaThreads = 128;
    static constexpr int kRowBytes = kMAtoms * 16 * 4;
    /// In shared memory: a float of every row of this warp, then or before of the other one; at this lane's first row.
    uint32_t rows;

    /// `all_rows`: of the first pair, on a multiple of 2 * kRowBytes.
    __device__ WarpPair(uint32_t all_rows, int thread)
        : rows(all_rows + thread / kWarpSize * kRowBytes + thread % kWarpSize / 4 * 4) {}

    // Both pairs meet at the CTA's own barrier: barriers of a pair are
    // 1 % faster, but racecheck takes them for none between the pairs.
    __device__ static bool any(bool x) { return barrier_any<kCtaThreads>(0, x); }
    __device__ static void sync() { barrier_sync<kCtaThreads>(0); }

    /// `update` of a tile of which this pair sees nothing: it meets the other one as often.
    __device__ static void idle(bool first) {
        if (first) {
            sync(), sync();
        } else if (any(false)) {
            sync(), sync();
        }
    }

    /// x of the other warp. The pair meets at another barrier before it swaps again.
    __device__ __forceinline__ void swap(const float (&x)[kMAtoms][2], float (&other)[kMAtoms][2]) const {
        const bool writes = thread_index() % 4 == 0;
        for_each_row<kMAtoms>([&](int i, int h) {
            if (writes) store_shared(rows + 4 * (16 * i + 8 * h), x[i][h]);
        });
        sync();
        for_each_row<kMAtoms>(
            [&](int i, int h) { other[i][h] = load_shared_float((rows ^ kRowBytes) + 4 * (16 * i + 8 * h)); });
    }

    /// One tile: the pair's probabilities, in the tile that `to` points into. They
    /// are made with the references of the last tile, and once more in the rare case
    /// that a row has outgrown its own: so most tiles cost the pair one barrier.
    template <DType kType, int kNAtoms, int kDAtoms, int kCols>
    __device__ __forceinline__ void update(OnlineSoftmax<kMAtoms>& softmax, const float (&s)[kMAtoms][kNAtoms][4],
                                           float (&o)[kMAtoms][kDAtoms][4], const FragmentAddress<kCols>& to,
                                           bool first) const {
        float row_max[kMAtoms][2], total[kMAtoms][2];
        const auto store = [&] {
            float x[kMAtoms][kNAtoms][4];
            for_each(x, [&](float& copy, int i, int j, int e) { copy = s[i][j][e]; });
            for_each_row<kMAtoms>([&](int i, int h) { total[i][h] = 0.0f; });
            softmax.exponentiate(x, total);
            uint32_t probability[kMAtoms][kNAtoms][2];
            pack_fragments<kType>(probability, x);
            packed_to_tile(probability, to);
        };
        const bool grows = softmax.row_maxima(s, row_max);
        if (!first) store();  // else it would be in vain
        if (first || any(grows)) {
            float other[kMAtoms][2];
            softmax.quad_maxima(row_max);
            swap(row_max, other);
            for_each_row<kMAtoms>([&](int i, int h) { row_max[i][h] = fmaxf(row_max[i][h], other[i][h]); });
            if (first) {  // o is zero
                for_each_row<kMAtoms>([&](int i, int h) { softmax.reference[i][h] = row_max[i][h]; });
            } else {
                softmax.grow(row_max, o);
            }
            store();
            sync();
        }
        for_each_row<kMAtoms>([&](int i, int h) { softmax.sum[i][h] += total[i][h]; });
    }

    __device__ __forceinline__ void finish(OnlineSoftmax<kMAtoms>& softmax) const {
        softmax.finish();
        float other[kMAtoms][2];
        swap(softmax.sum, other);
        for_each_row<kMAtoms>([&](int i, int h) { softmax.sum[i][h] += other[i][h]; });
    }
};

}  // namespace strobe::sm80
