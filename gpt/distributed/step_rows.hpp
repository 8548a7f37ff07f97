// The rows of a training step, the same whatever the number of processes, and the share of one process in them.
#pragma once

#include <vector>

#include "gpt/data/sampler.hpp"

namespace strobe::gpt {

struct StepRowsOptions {
    RowOptions row;
    int64_t rows_per_step = 8;  // of all processes
    int64_t rows_per_pass = 8;  // at most, of one process
    uint64_t seed = 0;
    int rank = 0, size = 1;
};

/// Of all processes.
struct StepTotals {
    int64_t tokens = 0;
    int64_t targets = 0;           // with a loss
    double squared_lengths = 0.0;  // of the sequences that attention sees

    void add(const Batch& batch);
};

/// The most rows that a pass of any process has.
int64_t largest_pass(int64_t rows_per_step, int64_t rows_per_pass, int size);

/// Process r takes the r-th of `size` stretches of each step's rows, and its passes are stretches of that. Every process looks
/// at the rows of all, which costs little and saves asking how many targets they have.
class StepRows {
public:
    /// Throws std::invalid_argument where there are fewer rows than processes.
    StepRows(TokenStream stream, const StepRowsOptions& options);

    StepTotals next(std::vector<Batch>& passes);

    int64_t largest_pass() const { return gpt::largest_pass(options_.rows_per_step, options_.rows_per_pass, options_.size); }
    const SamplerPosition& position() const { return sampler_.position(); }
    void seek(const SamplerPosition& position) { sampler_.seek(position); }

private:
    StepRowsOptions options_;
    Sampler sampler_;
    Batch row_;
};

}  // namespace strobe::gpt
