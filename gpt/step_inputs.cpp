#include "gpt/step_inputs.hpp"

#include <algorithm>
#include <bit>
#include <stdexcept>

#include <fmt/core.h>

namespace strobe::gpt {

namespace {

constexpr int64_t kLengthStep = 256;

int64_t max_merges(int64_t rows) { return rows / RowGroups::kPieceRows + 1; }

}  // namespace

StepInputs::StepInputs(const ModelConfig& config, Backend& backend, int64_t max_rows)
    : config_(config), max_rows_(max_rows), wants_groups_(backend.exec().ops->uses_row_groups) {
    ArenaPlan plan;
    tokens_ = plan.reserve(max_rows, sizeof(int32_t));
    targets_ = plan.reserve(max_rows, sizeof(int32_t));
    positions_ = plan.reserve(max_rows, sizeof(int32_t));
    cu_seqlens_ = plan.reserve(max_rows + 1, sizeof(int32_t));
    scale_ = plan.reserve(1, sizeof(float));
    if (wants_groups_) {
        token_groups_ = reserve_groups(plan, config.vocab_size);
        position_groups_ = reserve_groups(plan, config.context_length);
        counts_.resize(static_cast<size_t>(std::max(config.vocab_size, config.context_length)) + 1);
    }
    bytes_ = plan.total_bytes();
    stage_ = backend.runtime().make_stage(bytes_);
}

StepInputs::Groups StepInputs::reserve_groups(ArenaPlan& plan, int64_t table_rows) const {
    Groups g;
    g.table_rows = table_rows;
    g.order = plan.reserve(max_rows_, sizeof(int32_t));
    g.pieces = plan.reserve(max_pieces(max_rows_, g), sizeof(RowGroups::Piece));
    g.merges = plan.reserve(max_merges(max_rows_), sizeof(RowGroups::Merge));
    g.counts = plan.reserve(1, sizeof(RowGroups::Counts));
    return g;
}

int64_t StepInputs::max_pieces(int64_t rows, const Groups& g) const {
    return rows / RowGroups::kPieceRows + std::min(rows, g.table_rows);
}

void StepInputs::check(const Batch& batch) const {
    const auto fail = [](const std::string& text) { throw std::invalid_argument("batch: " + text); };
    const auto rows = static_cast<int64_t>(batch.tokens.size());
    if (rows == 0 || rows > max_rows_) fail(fmt::format("{} tokens, must be between 1 and {}", rows, max_rows_));
    if (!batch.targets.empty() && batch.targets.size() != batch.tokens.size())
        fail(fmt::format("{} targets for {} tokens", batch.targets.size(), rows));
    if (batch.cu_seqlens.size() < 2 || batch.cu_seqlens.front() != 0 || batch.cu_seqlens.back() != rows)
        fail(fmt::format("cu_seqlens must start at 0 and end at {}", rows));
    for (const int32_t token : batch.tokens)
        if (token < 0 || token >= config_.vocab_size)
            fail(fmt::format("token {} is outside the vocabulary of {}", token, config_.vocab_size));
    for (const int32_t target : batch.targets)
        if (target != kIgnoreTarget && (target < 0 || target >= config_.vocab_size))
            fail(fmt::format("target {} is outside the vocabulary of {}", target, config_.vocab_size));
    for (size_t b = 0; b + 1 < batch.cu_seqlens.size(); ++b) {
        const int32_t length = batch.cu_seqlens[b + 1] - batch.cu_seqlens[b];
        if (length < 0) fail("cu_seqlens must not decrease");
        if (length > config_.context_length)
            fail(fmt::format("a sequence of {} tokens exceeds the context of {}", length, config_.context_length));
    }
}

void StepInputs::write(const Batch& batch, float gradient_scale) {
    check(batch);
    rows_ = static_cast<int64_t>(batch.tokens.size());
    has_targets_ = !batch.targets.empty();
    host_ = stage_->host();
    const auto write = [&](size_t offset) { return reinterpret_cast<int32_t*>(host_ + offset); };
    std::copy(batch.tokens.begin(), batch.tokens.end(), write(tokens_));
    std::copy(batch.targets.begin(), batch.targets.end(), write(targets_));
    *reinterpret_cast<float*>(host_ + scale_) = gradient_scale;

    // Sequences without tokens are left out: at most as many borders as rows.
    int32_t* positions = write(positions_);
    int32_t* borders = write(cu_seqlens_);
    *borders++ = 0;
    max_seqlen_ = 0;
    num_sequences_ = 0;
    int64_t shortest = rows_;
    for (size_t b = 0; b + 1 < batch.cu_seqlens.size(); ++b) {
        const int32_t length = batch.cu_seqlens[b + 1] - batch.cu_seqlens[b];
        if (length == 0) continue;
        for (int32_t i = 0; i < length; ++i) *positions++ = i;
        *borders++ = batch.cu_seqlens[b + 1];
        max_seqlen_ = std::max<int64_t>(max_seqlen_, length);
        shortest = std::min<int64_t>(shortest, length);
        ++num_sequences_;
    }
    uniform_ = shortest == max_seqlen_;
    if (!wants_groups_) return;
    if (!uniform_) round_up_shape(borders);
    group({write(tokens_), static_cast<size_t>(rows_)}, token_groups_);
    group({write(positions_), static_cast<size_t>(rows_)}, position_groups_);
}

void StepInputs::send() { device_ = stage_->send(bytes_); }

void StepInputs::round_up_shape(int32_t* end_of_borders) {
    const auto rounded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(num_sequences_)));
    for (const int64_t most = std::min(rounded, max_rows_); num_sequences_ < most; ++num_sequences_)
        *end_of_borders++ = static_cast<int32_t>(rows_);
    max_seqlen_ = std::min(config_.context_length, (max_seqlen_ + kLengthStep - 1) / kLengthStep * kLengthStep);
}

// A stable counting sort, then the cut into pieces.
void StepInputs::group(std::span<const int32_t> keys, const Groups& g) {
    std::fill(counts_.begin(), counts_.end(), 0);
    for (const int32_t key : keys) ++counts_[static_cast<size_t>(key) + 1];
    for (int64_t k = 0; k < g.table_rows; ++k) counts_[static_cast<size_t>(k) + 1] += counts_[static_cast<size_t>(k)];
    auto* pieces = reinterpret_cast<RowGroups::Piece*>(host_ + g.pieces);
    auto* merges = reinterpret_cast<RowGroups::Merge*>(host_ + g.merges);
    int32_t num_pieces = 0, num_merges = 0, num_slots = 0;
    for (int64_t k = 0; k < g.table_rows; ++k) {
        const int32_t begin = counts_[static_cast<size_t>(k)], end = counts_[static_cast<size_t>(k) + 1];
        const int64_t count = (end - begin + RowGroups::kPieceRows - 1) / RowGroups::kPieceRows;
        const int32_t first_slot = num_slots;
        for (int64_t i = 0; i < count; ++i) {
            const auto from = static_cast<int32_t>(begin + i * RowGroups::kPieceRows);
            const auto to = std::min(end, static_cast<int32_t>(from + RowGroups::kPieceRows));
            pieces[num_pieces++] = {from, to, count == 1 ? static_cast<int32_t>(k) : ~num_slots++};
        }
        if (count > 1) merges[num_merges++] = {first_slot, num_slots, static_cast<int32_t>(k)};
    }
    *reinterpret_cast<RowGroups::Counts*>(host_ + g.counts) = {num_pieces, num_merges};
    auto* order = reinterpret_cast<int32_t*>(host_ + g.order);
    for (size_t r = 0; r < keys.size(); ++r) order[counts_[static_cast<size_t>(keys[r])]++] = static_cast<int32_t>(r);
}

RowGroups StepInputs::groups(const Groups& g) const {
    if (!wants_groups_) return {};
    return {.order = at<int32_t>(g.order), .pieces = at<RowGroups::Piece>(g.pieces), .merges = at<RowGroups::Merge>(g.merges),
            .counts = at<RowGroups::Counts>(g.counts), .max_pieces = max_pieces(rows_, g), .max_merges = max_merges(rows_)};
}

}  // namespace strobe::gpt
