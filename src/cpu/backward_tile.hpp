// One tile of the backward: a block of queries against a block of keys, from the caller's tensors to P and dS. The keys
// are cut into panels of kPanel keys, one key per SIMD lane; queries are read one element at a time and broadcast.
#pragma once

#include "cpu/micro_kernel.hpp"
#include "cpu/operands.hpp"
#include "cpu/plan.hpp"
#include "cpu/score.hpp"
#include "cpu/tile_io.hpp"
#include "cpu/vec_math.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

/// Query rows are visited in groups: those that a panel needs are rounded outwards to whole groups, so that for each
/// group the panels which hold its scores lie side by side.
inline constexpr int64_t kRowGroup = 16;
inline constexpr int64_t kMaxBlockKeys = 256;

STROBE_CPU_INLINE IndexRange intersection(IndexRange a, IndexRange b) {
    return {greater(a.begin, b.begin), lesser(a.end, b.end)};
}

/// Where a row's entry lies in the fp32 row arrays of the workspace.
STROBE_CPU_INLINE int64_t row_index(const BackwardParams& p, const Sequence& s, int64_t batch, int64_t head, int64_t i) {
    const int64_t first = p.seqlens.cu_seqlens_q ? s.q_row : batch * p.size.seqlen_q;
    return head * p.size.total_q + first + i;
}

template <class T>
class BackwardTile {
public:
    BackwardTile(const BackwardParams& p, const BackwardPlan& plan, float* scratch)
        : p_(p), plan_(plan), scratch_(scratch), score_(p.score) {}

    /// The block's keys that count; empty where the block lies past the sequence's end.
    IndexRange enter_keys(int64_t batch, int64_t head_k, int64_t block) {
        batch_ = batch;
        sequence_ = sequence_of(p_, static_cast<int>(batch));
        mask_ = sequence_.mask(p_.mask);
        block_k_ = block;
        keys_ = {block * plan_.block_k, lesser((block + 1) * plan_.block_k, sequence_.seqlen_k)};
        if (keys_.empty()) return keys_;
        panels_ = (keys_.size() + kPanel - 1) / kPanel;
        pack(p_.k, head_k, p_.size.head_dim, scratch_ + plan_.k_panels);
        pack(p_.v, head_k, p_.size.head_dim_v, scratch_ + plan_.v_panels);
        return keys_;
    }

    /// Computes P (times the dropout factors) and dS of the block's rows against the keys entered. False when no element is visible.
    bool enter_queries(int64_t head, int64_t block) {
        head_ = head;
        queries_ = {block * plan_.block_q, lesser((block + 1) * plan_.block_q, sequence_.seqlen_q)};
        if (intersection(queries_, mask_.query_range(keys_.begin, keys_.end)).empty()) return false;
        const int64_t row = sequence_.q_row + queries_.begin;
        const int64_t d = p_.size.head_dim, dv = p_.size.head_dim_v;
        const T* const q = row_of<const T>(p_.q, batch_, row, head);
        const T* const dout = row_of<const T>(p_.dout, batch_, row, head);
        q_down_ = read_rows_down(q, p_.q.row_stride, queries_.size(), d, plan_.padded_dim, scratch_ + plan_.q_down);
        dout_down_ = read_rows_down(dout, p_.dout.row_stride, queries_.size(), dv, plan_.padded_dim_v, scratch_ + plan_.dout_down);
        q_rows_ = q_down_;
        dout_rows_ = dout_down_;
        if constexpr (kPairsOf<T>) {
            q_rows_ = read_rows(q, p_.q.row_stride, queries_.size(), d, scratch_ + plan_.q_rows);
            dout_rows_ = read_rows(dout, p_.dout.row_stride, queries_.size(), dv, scratch_ + plan_.dout_rows);
        }
        enter_rows();
        for (int64_t panel = 0; panel < panels_; ++panel) {
            rows_[panel] = panel_rows(panel);
            if (!rows_[panel].empty()) score_panel(panel);
        }
        return true;
    }

    const Sequence& sequence() const { return sequence_; }
    const BandMask& mask() const { return mask_; }
    IndexRange keys() const { return keys_; }
    IndexRange queries() const { return queries_; }
    int64_t panels() const { return panels_; }
    /// Rows, counted from the block's first, for which the panel's scores were computed.
    IndexRange rows(int64_t panel) const { return rows_[panel]; }
    /// The queries and output gradients as operands that are summed down their rows.
    Rows q_down() const { return q_down_; }
    Rows dout_down() const { return dout_down_; }
    /// Whether some element of the tile had to be hidden.
    bool masked() const { return masked_; }
    /// The keys that row r of the block takes part with: those that the mask shows it, or none where its lse is -inf, because then every
    /// one of its probabilities is 0 whatever the keys and values hold.
    IndexRange seen_keys(int64_t r) const {
        return is_dead(r) ? IndexRange{} : mask_.key_range(queries_.begin + r, queries_.begin + r + 1);
    }
    /// P times the dropout factors, and dS: word of (row r, key j) at r / kPerWord * kPerWord * score_stride + j.
    float* p() const { return scratch_ + plan_.p; }
    float* ds() const { return scratch_ + plan_.ds; }
    /// dS again, as words along the keys.
    Rows ds_rows() const {
        if constexpr (kPairsOf<T>) return {scratch_ + plan_.ds_rows, plan_.score_stride / kPerWord<T>};
        return {ds(), plan_.score_stride};
    }
    /// dS before the derivative of the softcap: the gradient of the bias.
    float* dbias() const { return scratch_ + plan_.dbias; }

private:
    void pack(const TensorRef& tensor, int64_t head_k, int64_t columns, float* panels) const {
        for (int64_t panel = 0; panel < panels_; ++panel) {
            const T* rows[kPanel];
            for (int64_t lane = 0; lane < kPanel; ++lane) {
                const int64_t j = keys_.begin + panel * kPanel + lane;
                rows[lane] = j < keys_.end ? row_of<const T>(tensor, batch_, sequence_.k_row + j, head_k) : nullptr;
            }
            pack_panel(rows, columns, panels + panel * kPanel * words<T>(columns));
        }
    }

    IndexRange panel_keys(int64_t panel) const {
        const int64_t first = keys_.begin + panel * kPanel;
        return {first, lesser(first + kPanel, keys_.end)};
    }

    IndexRange panel_rows(int64_t panel) const {
        const IndexRange keys = panel_keys(panel);
        const IndexRange seen = intersection(queries_, mask_.query_range(keys.begin, keys.end));
        if (seen.empty()) return {};
        const int64_t begin = (seen.begin - queries_.begin) / kRowGroup * kRowGroup;
        return {begin, lesser(round_up(seen.end - queries_.begin, kRowGroup), queries_.size())};
    }

    void score_panel(int64_t panel) {
        const IndexRange rows = rows_[panel];
        const int64_t first = queries_.begin + rows.begin, column = keys_.begin + panel * kPanel;
        const int64_t stride = plan_.score_stride;
        const int64_t at = rows.begin * stride + panel * kPanel;
        const auto multiply = [&](Rows a, size_t panels, int64_t steps, float* c) {
            multiply_scores<kPairsOf<T>>(
                {.rows = rows.size(), .steps = steps, .a = a.data + rows.begin * a.stride, .a_stride = a.stride,
                 .b = scratch_ + panels + panel * kPanel * steps, .b_stride = kPanel, .c = c + at, .c_stride = stride});
        };
        multiply(q_rows_, plan_.k_panels, words<T>(p_.size.head_dim), p());
        multiply(dout_rows_, plan_.v_panels, words<T>(p_.size.head_dim_v), ds());
        const bool masked = has_dead_rows_ || !mask_.all_visible(first, first + rows.size(), column, column + kPanel);
        masked_ |= masked;
        if (score_.plain && !p_.dropout.enabled()) {
            if (masked) {
                plain_scores<true>(panel);
            } else {
                plain_scores<false>(panel);
            }
        } else {
            general_scores(panel);
        }
    }

    void enter_rows() {
        const int64_t first = row_index(p_, sequence_, batch_, head_, queries_.begin);
        const auto array = [&](size_t offset) {
            return reinterpret_cast<const float*>(static_cast<const char*>(p_.workspace) + offset) + first;
        };
        delta_ = array(plan_.delta);
        neg_lse_ = array(plan_.neg_lse);
        has_dead_rows_ = false;
        for (int64_t r = 0; r < queries_.size(); ++r) has_dead_rows_ |= is_dead(r);
        masked_ = has_dead_rows_;
    }

    bool is_dead(int64_t r) const { return neg_lse_[r] == kInfinity; }

    /// Subtracted first and then brought to base 2: the other way round, two numbers of the size of the score would each be
    /// rounded before they cancel.
    STROBE_CPU_INLINE Vec probability(Vec score, Vec scale, int64_t r) const {
        return exp2(min(splat(128.0f), fma(score, scale, splat(neg_lse_[r])) * splat(kLog2E)));
    }

    /// Lanes of the panel that row r sees.
    IVec visible_lanes(int64_t r, int64_t column, int lane) const {
        alignas(64) static constexpr int32_t kIota[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                          16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
        const IndexRange seen = seen_keys(r);
        const IVec key = load(kIota + lane);
        return (key >= saturate(seen.begin - column)) & (key < saturate(seen.end - column));
    }

    /// Replaces the scores of a panel and the dP beside them. compute(row, lane) gives P and dS of one vector.
    template <class Compute>
    STROBE_CPU_INLINE void replace_scores(int64_t panel, Compute compute) {
        const IndexRange rows = rows_[panel];
        for (int64_t r = rows.begin; r < rows.end; r += kPerWord<T>) {
            for (int lane = 0; lane < kPanel; lane += kWidth) {
                const int64_t at = r * plan_.score_stride + panel * kPanel + lane;
                const Gradient low = compute(r, lane);
                if constexpr (kPairsOf<T>) {
                    const Gradient high = r + 1 < rows.end ? compute(r + 1, lane) : Gradient{zero(), zero()};
                    store(p() + at, bfloat_pairs(low.p, high.p));
                    store(ds() + at, bfloat_pairs(low.ds, high.ds));
                    BFloat16* const row = reinterpret_cast<BFloat16*>(scratch_ + plan_.ds_rows) + r * plan_.score_stride + panel * kPanel + lane;
                    store_float_as(row, low.ds);
                    if (r + 1 < rows.end) store_float_as(row + plan_.score_stride, high.ds);
                } else {
                    store(p() + at, low.p);
                    store(ds() + at, low.ds);
                }
            }
        }
    }

    struct Gradient {
        Vec p, ds;
    };

    template <bool kMasked>
    void plain_scores(int64_t panel) {
        const int64_t column = keys_.begin + panel * kPanel;
        const Vec scale = splat(score_.final_scale);
        replace_scores(panel, [&](int64_t r, int lane) __attribute__((always_inline)) {
            const int64_t at = r * plan_.score_stride + panel * kPanel + lane;
            Vec prob = probability(load(p() + at), scale, r);
            Vec grad = prob * (load(ds() + at) - splat(delta_[r]));
            if constexpr (kMasked) {
                const IVec visible = visible_lanes(r, column, lane);
                prob = select(visible, prob, zero());
                grad = select(visible, grad, zero());
            }
            return Gradient{prob, grad};
        });
    }

    void general_scores(int64_t panel) {
        const IndexRange rows = rows_[panel];
        const int64_t column = keys_.begin + panel * kPanel;
        const Vec scale = splat(score_.final_scale);
        const float slope = p_.score.alibi_slopes ? p_.score.alibi_slopes[batch_ * p_.score.alibi_batch_stride + head_] : 0.0f;
        const float* const factors = p_.dropout.enabled() ? dropout_factors(panel) : nullptr;
        alignas(64) float bias[kWidth] = {};
        replace_scores(panel, [&](int64_t r, int lane) __attribute__((always_inline)) {
            const int64_t i = queries_.begin + r, at = r * plan_.score_stride + panel * kPanel + lane;
            const IVec visible = visible_lanes(r, column, lane);
            const Vec product = load(p() + at);
            Vec prob, cap_tanh = zero();
            if (score_.plain) {
                prob = probability(product, scale, r);
            } else {
                const int64_t first = lesser(column + lane, keys_.end);
                if (p_.score.bias) read_bias(i, {first, lesser(first + kWidth, keys_.end)}, bias);
                cap_tanh = score_.cap_tanh(product);
                Vec x = score_.capped(product, cap_tanh) + load(bias);
                if (p_.score.alibi_slopes) x += alibi(splat(slope), distances(i, column, lane));
                prob = probability(x, scale, r);
            }
            const Vec factor = factors ? load(factors + (r - rows.begin) * kPanel + lane) : splat(1.0f);
            prob = select(visible, prob, zero());
            const Vec grad = prob * (load(ds() + at) * factor - splat(delta_[r]));
            if (p_.dbias) store(dbias() + at, select(visible, grad, zero()));
            return Gradient{prob * factor, select(visible, grad * (splat(1.0f) - cap_tanh * cap_tanh), zero())};
        });
    }

    const float* dropout_factors(int64_t panel) const {
        const IndexRange rows = rows_[panel];
        const bool placed = p_.mask.has_positions;
        const int64_t row = (placed ? p_.mask.q_position : 0) + queries_.begin + rows.begin;
        const int64_t key = (placed ? p_.mask.k_position : 0) + keys_.begin + panel * kPanel;
        float* const factors = scratch_ + plan_.factors;
        dropout_factors_by_key(p_.dropout, static_cast<uint32_t>(batch_ * p_.size.num_heads + head_), static_cast<uint32_t>(row),
                               rows.size(), static_cast<uint32_t>(key), factors);
        return factors;
    }

    /// i + diagonal - j for the lanes' keys j.
    IVec distances(int64_t i, int64_t column, int lane) const {
        alignas(64) int32_t d[kWidth];
        for (int x = 0; x < kWidth; ++x) d[x] = saturate(i + sequence_.diagonal - column - lane - x);
        return load(d);
    }

    void read_bias(int64_t i, IndexRange keys, float* bias) const {
        with_type(p_.bias_dtype, [&]<class B>(B*) {
            const BiasRef& ref = p_.score.bias;
            const B* const row = bias_row<B>(ref, batch_, head_, i) + keys.begin * ref.col_stride;
            if (ref.col_stride == 1) {
                read_row(row, keys.size(), bias, kWidth);
            } else {
                for (int64_t t = 0; t < keys.size(); ++t) bias[t] = to_scalar(row[t * ref.col_stride]);
            }
        });
    }

    const BackwardParams& p_;
    const BackwardPlan& plan_;
    float* const scratch_;
    const ScoreFunction score_;

    int64_t batch_ = 0, head_ = 0, block_k_ = 0, panels_ = 0;
    Sequence sequence_;
    BandMask mask_;
    IndexRange keys_, queries_;
    Rows q_rows_, dout_rows_, q_down_, dout_down_;
    const float* delta_ = nullptr;    // per row of the block: what the first pass left in the workspace
    const float* neg_lse_ = nullptr;  // +inf: a dead row
    bool has_dead_rows_ = false, masked_ = false;
    IndexRange rows_[kMaxBlockKeys / kMinPanel];
};

}  // namespace strobe::cpu::STROBE_CPU_ISA
