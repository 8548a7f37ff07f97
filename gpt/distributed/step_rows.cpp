#include "gpt/distributed/step_rows.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include <fmt/core.h>

#include "gpt/ops/cross_entropy.hpp"

namespace strobe::gpt {

namespace {

/// Stretch `part` of `parts` that share `count` rows.
std::pair<int64_t, int64_t> stretch(int64_t count, int64_t part, int64_t parts) {
    return {count * part / parts, count * (part + 1) / parts};
}

int64_t quotient_rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void append(const Batch& row, Batch& batch) {
    if (batch.cu_seqlens.empty()) batch.cu_seqlens.push_back(0);
    const auto at = static_cast<int32_t>(batch.tokens.size());
    batch.tokens.insert(batch.tokens.end(), row.tokens.begin(), row.tokens.end());
    batch.targets.insert(batch.targets.end(), row.targets.begin(), row.targets.end());
    for (size_t i = 1; i < row.cu_seqlens.size(); ++i) batch.cu_seqlens.push_back(at + row.cu_seqlens[i]);
}

const StepRowsOptions& checked(const StepRowsOptions& o) {
    if (o.rows_per_step < o.size)
        throw std::invalid_argument(fmt::format("a step of {} rows (batch * accumulate) cannot be shared by {} processes", o.rows_per_step, o.size));
    return o;
}

}  // namespace

void StepTotals::add(const Batch& batch) {
    tokens += static_cast<int64_t>(batch.tokens.size());
    targets += std::count_if(batch.targets.begin(), batch.targets.end(), [](int32_t t) { return t != kIgnoreTarget; });
    for (size_t b = 0; b + 1 < batch.cu_seqlens.size(); ++b) {
        const auto length = static_cast<double>(batch.cu_seqlens[b + 1] - batch.cu_seqlens[b]);
        squared_lengths += length * length;
    }
}

StepRows::StepRows(TokenStream stream, const StepRowsOptions& options)
    : options_(checked(options)), sampler_(std::move(stream), {.row = options.row, .batch_size = 1, .seed = options.seed}) {}

StepTotals StepRows::next(std::vector<Batch>& passes) {
    const auto [begin, end] = stretch(options_.rows_per_step, options_.rank, options_.size);
    const int64_t count = quotient_rounded_up(end - begin, options_.rows_per_pass);
    passes.resize(static_cast<size_t>(count));
    for (Batch& batch : passes) {
        batch.tokens.clear();
        batch.targets.clear();
        batch.cu_seqlens.clear();
    }
    StepTotals totals;
    int64_t pass = 0;
    for (int64_t i = 0; i < options_.rows_per_step; ++i) {
        sampler_.next(row_);
        totals.add(row_);
        if (i < begin || i >= end) continue;
        while (i - begin >= stretch(end - begin, pass, count).second) ++pass;
        append(row_, passes[static_cast<size_t>(pass)]);
    }
    return totals;
}

// A process has that many rows or, where they do not divide, one more; and that one row may be what makes it share them
// out among more, smaller passes.
int64_t largest_pass(int64_t rows_per_step, int64_t rows_per_pass, int size) {
    const auto largest_of = [&](int64_t rows) { return quotient_rounded_up(rows, quotient_rounded_up(rows, rows_per_pass)); };
    return std::max(largest_of(rows_per_step / size), largest_of(quotient_rounded_up(rows_per_step, size)));
}

}  // namespace strobe::gpt
