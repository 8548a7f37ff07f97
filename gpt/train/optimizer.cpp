#include "gpt/train/optimizer.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <stdexcept>

#include <fmt/core.h>

namespace strobe::gpt {

void OptimizerOptions::validate() const {
    const auto require = [](bool good, const char* field, double value, const char* range) {
        if (!good) throw std::invalid_argument(fmt::format("{} is {}, must be {}", field, value, range));
    };
    require(learning_rate > 0.0f && learning_rate < 10.0f, "learning rate", learning_rate, "above 0 and below 10");
    require(final_fraction >= 0.0f && final_fraction <= 1.0f, "final learning rate fraction", final_fraction,
            "between 0 and 1");
    require(warmup_steps >= 0, "warm-up", static_cast<double>(warmup_steps), "0 or more steps");
    require(beta1 >= 0.0f && beta1 < 1.0f, "beta1", beta1, "at least 0 and below 1");
    require(beta2 >= 0.0f && beta2 < 1.0f, "beta2", beta2, "at least 0 and below 1");
    require(eps > 0.0f, "eps", eps, "above 0");
    require(weight_decay >= 0.0f && weight_decay <= 10.0f, "weight decay", weight_decay, "between 0 and 10");
    require(clip_norm >= 0.0f, "clip norm", clip_norm, "0 (off) or more");
}

float learning_rate_at(const OptimizerOptions& o, int64_t step, int64_t total_steps) {
    if (step <= o.warmup_steps) return o.learning_rate * static_cast<float>(step) / static_cast<float>(o.warmup_steps);
    const double length = static_cast<double>(std::max<int64_t>(1, total_steps - o.warmup_steps));
    const double progress = std::min(1.0, static_cast<double>(step - o.warmup_steps) / length);
    const double cosine = 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
    return static_cast<float>(o.learning_rate * (o.final_fraction + (1.0 - o.final_fraction) * cosine));
}

Optimizer::Optimizer(const ParameterLayout& layout, const OptimizerOptions& options, Memory& memory, Precision moments)
    : options_(options),
      m_(layout, memory, moments),
      v_(layout, memory, moments),
      squared_norm_(sizeof(double), memory),
      rates_(sizeof(AdamWRates), memory) {
    options.validate();
    const int64_t matrices = layout.matrices_begin();
    const AdamWSegment segments[] = {{0, matrices, false}, {0, layout.arena_elements() - matrices, true}};
    segments_ = Arena(sizeof segments, memory);
    memory.copy(segments_.at<void>(0), segments, sizeof segments);
}

void Optimizer::set_rates(int64_t step, float learning_rate) {
    const AdamWRates rates = adamw_rates(learning_rate, options_.beta1, options_.beta2, options_.weight_decay, step);
    m_.memory().put(rates_.at<void>(0), &rates, sizeof rates);
}

void Optimizer::update(Exec& exec, const Weights& weights, const ParameterArena& gradients) {
    auto* square = squared_norm_.at<double>(0);
    const bool narrow = weights.precision != Precision::fp32;
    // Vectors, which do not decay, then matrices.
    const int64_t matrices = gradients.matrices_begin();
    const int64_t sizes[] = {matrices, gradients.size() - matrices};
    if (gradients.precision() == Precision::fp32)
        run(exec, SquaredNorm{.size = gradients.size(), .values = gradients.at(0), .result = square});
    else
        for (const int part : {0, 1})
            run(exec, SquaredNorm{.size = sizes[part],
                                  .values = gradients.at(part * matrices),
                                  .result = square,
                                  .add = part > 0});
    for (const int part : {0, 1})
        run(exec, AdamW{.segments = {segments_.at<AdamWSegment>(0) + part, 1},
                        .size = sizes[part],
                        .values = weights.values.at(part * matrices),
                        .grads = gradients.at(part * matrices),
                        .m = m_.at(part * matrices),
                        .v = v_.at(part * matrices),
                        .rates = rates_.at<AdamWRates>(0),
                        .beta1 = options_.beta1,
                        .beta2 = options_.beta2,
                        .eps = options_.eps,
                        .squared_norm = options_.clip_norm > 0.0f ? square : nullptr,
                        .clip_norm = options_.clip_norm,
                        .narrow = narrow ? weights.all().offset(part * matrices) : Buffer()});
}

double Optimizer::gradient_norm() const {
    double square = 0.0;
    m_.memory().copy(&square, squared_norm_.at<double>(0), sizeof square);
    return std::sqrt(square);
}

double Optimizer::apply(Exec& exec, const Weights& weights, const ParameterArena& gradients, int64_t step,
                        float learning_rate) {
    set_rates(step, learning_rate);
    update(exec, weights, gradients);
    return gradient_norm();
}

}  // namespace strobe::gpt
