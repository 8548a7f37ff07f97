// AdamW's state, one step of it with the clip by global norm, and the learning rate over a run.
#pragma once

#include <vector>

#include "gpt/model.hpp"

namespace strobe::gpt {

struct OptimizerOptions {
    float learning_rate = 1e-3f;   // the peak
    float final_fraction = 0.1f;   // of the peak, at the end
    int64_t warmup_steps = 100;
    float beta1 = 0.9f;
    float beta2 = 0.95f;
    float eps = 1e-8f;
    float weight_decay = 0.1f;
    float clip_norm = 1.0f;        // 0: no clipping

    /// Throws std::invalid_argument that names the field.
    void validate() const;
};

/// Linear warm-up to the peak at warmup_steps, then half a cosine down to final_fraction of it at total_steps. `step` is 1
/// for the first.
float learning_rate_at(const OptimizerOptions& options, int64_t step, int64_t total_steps);

class Optimizer {
public:
    /// The state lies in `memory`; moments in bf16 are those of matrices, rounded stochastically.
    Optimizer(const ParameterLayout& layout, const OptimizerOptions& options, Memory& memory = host_memory(),
              Precision moments = Precision::fp32);

    /// Updates the values by the gradients; returns the gradients' norm before clipping. All of the following in one.
    double apply(Exec& exec, const Weights& weights, const ParameterArena& gradients, int64_t step, float learning_rate);

    /// What the next update goes by. step is 1 for the first.
    void set_rates(int64_t step, float learning_rate);
    /// Asks for operators on fixed memory and nothing else, so it can be part of a recording.
    void update(Exec& exec, const Weights& weights, const ParameterArena& gradients);
    /// Of the gradients of the last update, before clipping. Waits for it.
    double gradient_norm() const;

    const ParameterArena& first_moments() const { return m_; }
    const ParameterArena& second_moments() const { return v_; }

private:
    OptimizerOptions options_;
    ParameterArena m_, v_;
    Arena segments_;  // AdamW's: vectors, matrices
    Arena squared_norm_;
    Arena rates_;
};

}  // namespace strobe::gpt
