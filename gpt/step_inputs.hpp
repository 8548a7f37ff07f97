// What a pass reads besides weights: tokens, targets, positions, borders of sequences, and how the rows group by token. Written
// by the host into one block and sent to where operators run in one copy.
#pragma once

#include <memory>

#include "gpt/backend.hpp"
#include "gpt/batch.hpp"
#include "gpt/config.hpp"

namespace strobe::gpt {

class StepInputs {
public:
    /// For batches of at most max_rows tokens.
    StepInputs(const ModelConfig& config, Backend& backend, int64_t max_rows);

    /// Checks everything that operators rely on - no operator looks at indices again - and writes the batch where the host
    /// can while operators still read the one before. Throws std::invalid_argument.
    void write(const Batch& batch, float gradient_scale);
    /// Sends off what was written, in order with the operators.
    void send();
    void load(const Batch& batch, float gradient_scale) {
        write(batch, gradient_scale);
        send();
    }

    int64_t rows() const { return rows_; }
    bool has_targets() const { return has_targets_; }
    // Of sequences of several lengths a GPU is told round numbers: with a few empty sequences behind the true ones, and a bound
    // of their lengths. So batches of one kind of data are calls with the same arguments.
    int64_t num_sequences() const { return num_sequences_; }
    int64_t max_seqlen() const { return max_seqlen_; }
    /// All sequences have max_seqlen() rows.
    bool uniform() const { return uniform_; }

    // Where operators read.
    const int32_t* tokens() const { return at<int32_t>(tokens_); }
    const int32_t* targets() const { return at<int32_t>(targets_); }
    const int32_t* positions() const { return at<int32_t>(positions_); }
    const int32_t* cu_seqlens() const { return at<int32_t>(cu_seqlens_); }
    const float* gradient_scale() const { return at<float>(scale_); }
    RowGroups token_groups() const { return groups(token_groups_); }
    RowGroups position_groups() const { return groups(position_groups_); }

private:
    struct Groups {
        size_t order = 0, pieces = 0, merges = 0, counts = 0;  // offsets
        int64_t table_rows = 0;
    };
    template <class T>
    const T* at(size_t offset) const {
        return reinterpret_cast<const T*>(device_ + offset);
    }
    void check(const Batch& batch) const;
    Groups reserve_groups(ArenaPlan& plan, int64_t table_rows) const;
    void group(std::span<const int32_t> keys, const Groups& groups);
    void round_up_shape(int32_t* end_of_borders);
    int64_t max_pieces(int64_t rows, const Groups& groups) const;
    RowGroups groups(const Groups& g) const;

    const ModelConfig& config_;
    int64_t max_rows_;
    bool wants_groups_;
    size_t tokens_, targets_, positions_, cu_seqlens_, scale_, bytes_;
    Groups token_groups_, position_groups_;
    std::unique_ptr<InputStage> stage_;
    std::byte* host_ = nullptr;
    const std::byte* device_ = nullptr;
    std::vector<int32_t> counts_;

    int64_t rows_ = 0, num_sequences_ = 0, max_seqlen_ = 0;
    bool has_targets_ = false, uniform_ = false;
};

}  // namespace strobe::gpt
