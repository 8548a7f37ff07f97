// Chooses the next token from its logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpt/random.hpp"

namespace strobe::gpt {

struct SamplingOptions {
    float temperature = 1.0f;  // 0: the most likely token
    int64_t top_k = 0;         // 0: all
    float top_p = 1.0f;        // keep the likeliest tokens that together reach this probability
    uint64_t seed = 1;

    /// Throws std::invalid_argument that names the field.
    void validate() const;
};

class TokenSampler {
public:
    explicit TokenSampler(const SamplingOptions& options);

    /// A token id. Equal logits go to the lower id.
    int32_t sample(std::span<const float> logits);

private:
    struct Candidate {
        float logit;
        int32_t token;
        double probability;
    };

    SamplingOptions options_;
    Random random_;
    std::vector<Candidate> candidates_;
};

}  // namespace strobe::gpt
