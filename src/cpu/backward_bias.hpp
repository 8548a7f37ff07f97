// The gradient of the additive bias: dS summed over the axes along which the bias was broadcast. A task owns one tile of
// the gradient, computes every dS that falls on it again and sums them in a fixed order: no atomics, no buffer of the
// size of the scores, whatever is broadcast.
#pragma once

#include "cpu/backward_tile.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

STROBE_CPU_INLINE int64_t bias_tasks(const BackwardParams& p, const BackwardPlan& plan) {
    return (p.dbias.batch_stride ? p.size.batch : 1) * (p.dbias.head_stride ? p.size.num_heads : 1) *
           (p.dbias.row_stride ? plan.blocks_q : 1) * (p.dbias.col_stride ? plan.blocks_k : 1);
}

template <class T>
class BiasGradient {
public:
    BiasGradient(const BackwardParams& p, const BackwardPlan& plan, float* scratch)
        : p_(p), plan_(plan), sums_(scratch + plan.bias_sums), tile_(p, plan, scratch) {}

    void run(int64_t task) {
        const IndexRange col_blocks = axis(task, p_.dbias.col_stride, plan_.blocks_k);
        const IndexRange row_blocks = axis(task, p_.dbias.row_stride, plan_.blocks_q);
        const IndexRange heads = axis(task, p_.dbias.head_stride, p_.size.num_heads);
        const IndexRange batches = axis(task, p_.dbias.batch_stride, p_.size.batch);
        rows_ = p_.dbias.row_stride ? plan_.block_q : 1;
        cols_ = p_.dbias.col_stride ? plan_.block_k : 1;
        for (int64_t x = 0; x < rows_ * cols_; ++x) sums_[x] = 0.0f;
        for (int64_t batch = batches.begin; batch < batches.end; ++batch) {
            for (int64_t head = heads.begin; head < heads.end; ++head) {
                for (int64_t col = col_blocks.begin; col < col_blocks.end; ++col) {
                    if (tile_.enter_keys(batch, head / plan_.group, col).empty()) continue;
                    for (int64_t row = row_blocks.begin; row < row_blocks.end; ++row) {
                        if (tile_.enter_queries(head, row)) add_tile();
                    }
                }
            }
        }
        with_type(p_.dbias_dtype, [&]<class B>(B*) { write<B>(batches.begin, heads.begin, row_blocks.begin, col_blocks.begin); });
    }

private:
    /// Takes one axis off the task number: this task's index alone, or all of a broadcast axis.
    static IndexRange axis(int64_t& task, int64_t stride, int64_t size) {
        if (stride == 0) return {0, size};
        const int64_t index = task % size;
        task /= size;
        return {index, index + 1};
    }

    void add_tile() {
        for (int64_t panel = 0; panel < tile_.panels(); ++panel) {
            const IndexRange rows = tile_.rows(panel);
            const int64_t first = panel * kPanel, end = lesser<int64_t>(first + kPanel, tile_.keys().size());
            if (p_.dbias.row_stride) {
                for (int64_t r = rows.begin; r < rows.end; ++r) add_row(r, first, end, sums_ + r * cols_);
            } else {
                // The rows of a tile are summed first and then added: shorter chains of rounding.
                float partial[kPanel] = {};
                for (int64_t r = rows.begin; r < rows.end; ++r) {
                    for (int64_t c = first; c < end; ++c) partial[c - first] += element(r, c);
                }
                float total = 0.0f;
                for (int64_t c = first; c < end; ++c) {
                    total += partial[c - first];
                    if (p_.dbias.col_stride) sums_[c] += partial[c - first];
                }
                if (!p_.dbias.col_stride) sums_[0] += total;
            }
        }
    }

    float element(int64_t row, int64_t col) const { return tile_.dbias()[row * plan_.score_stride + col]; }

    void add_row(int64_t row, int64_t first, int64_t end, float* sums) const {
        float total = 0.0f;
        for (int64_t c = first; c < end; ++c) {
            if (p_.dbias.col_stride) {
                sums[c] += element(row, c);
            } else {
                total += element(row, c);
            }
        }
        if (!p_.dbias.col_stride) sums[0] += total;
    }

    template <class B>
    void write(int64_t batch, int64_t head, int64_t row_block, int64_t col_block) const {
        const int64_t i0 = row_block * plan_.block_q, j0 = col_block * plan_.block_k;
        const int64_t rows = p_.dbias.row_stride ? lesser(plan_.block_q, p_.size.seqlen_q - i0) : 1;
        const int64_t cols = p_.dbias.col_stride ? lesser(plan_.block_k, p_.size.seqlen_k - j0) : 1;
        B* const base = static_cast<B*>(p_.dbias.data) + batch * p_.dbias.batch_stride + head * p_.dbias.head_stride;
        for (int64_t r = 0; r < rows; ++r) {
            B* const dst = base + (i0 + r) * p_.dbias.row_stride + j0 * p_.dbias.col_stride;
            for (int64_t c = 0; c < cols; ++c) from_scalar(dst + c * p_.dbias.col_stride, sums_[r * cols_ + c]);
        }
    }

    const BackwardParams& p_;
    const BackwardPlan& plan_;
    float* const sums_;  // [rows_][cols_]
    BackwardTile<T> tile_;
    int64_t rows_ = 0, cols_ = 0;
};

}  // namespace strobe::cpu::STROBE_CPU_ISA
