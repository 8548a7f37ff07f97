#include "gpt/generate/token_sampler.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include <fmt/core.h>

namespace strobe::gpt {

void SamplingOptions::validate() const {
    if (!(temperature >= 0.0f && std::isfinite(temperature)))
        throw std::invalid_argument(fmt::format("temperature is {}, must be 0 or more", temperature));
    if (top_k < 0) throw std::invalid_argument(fmt::format("top-k is {}, must be 0 (all) or more", top_k));
    if (!(top_p > 0.0f && top_p <= 1.0f))
        throw std::invalid_argument(fmt::format("top-p is {}, must be above 0 and at most 1", top_p));
}

TokenSampler::TokenSampler(const SamplingOptions& options) : options_(options), random_(options.seed) { options.validate(); }

int32_t TokenSampler::sample(std::span<const float> logits) {
    candidates_.clear();
    for (size_t i = 0; i < logits.size(); ++i)
        if (!std::isnan(logits[i])) candidates_.push_back({logits[i], static_cast<int32_t>(i), 0.0});
    if (candidates_.empty()) throw std::runtime_error("sampling: every logit is NaN; the model's weights are broken");

    const auto likelier = [](const Candidate& a, const Candidate& b) {
        return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
    };
    if (options_.temperature == 0.0f)
        return std::min_element(candidates_.begin(), candidates_.end(), likelier)->token;
    if (options_.top_k > 0 && static_cast<size_t>(options_.top_k) < candidates_.size()) {
        std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k - 1, candidates_.end(), likelier);
        candidates_.resize(static_cast<size_t>(options_.top_k));
    }
    const float largest = std::min_element(candidates_.begin(), candidates_.end(), likelier)->logit;
    double total = 0.0;
    for (Candidate& c : candidates_) {
        c.probability = std::exp(static_cast<double>(c.logit - largest) / options_.temperature);
        total += c.probability;
    }
    double kept = total;
    size_t count = candidates_.size();
    if (options_.top_p < 1.0f) {
        // The likeliest few nearly always suffice: a vocabulary is not sorted for each token.
        kept = 0.0;
        count = 0;
        for (size_t sorted = 0; count < candidates_.size() && (count == 0 || kept < options_.top_p * total);) {
            if (count == sorted) {
                sorted = std::min(candidates_.size(), std::max<size_t>(64, 4 * sorted));
                std::partial_sort(candidates_.begin() + static_cast<std::ptrdiff_t>(count),
                                  candidates_.begin() + static_cast<std::ptrdiff_t>(sorted), candidates_.end(), likelier);
            }
            kept += candidates_[count++].probability;
        }
    }

    double left = random_.uniform() * kept;
    for (size_t i = 0; i < count; ++i) {
        left -= candidates_[i].probability;
        if (left < 0.0) return candidates_[i].token;
    }
    return candidates_[count - 1].token;
}

}  // namespace strobe::gpt
