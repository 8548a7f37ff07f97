// Random weights and batches for tests of whole models.
#pragma once

#include <vector>

#include "gpt/batch.hpp"
#include "gpt/ops/cross_entropy.hpp"
#include "gpt/random.hpp"
#include "gpt/weights.hpp"

namespace strobe::gpt::test {

/// Every `ignored`-th target has no loss.
inline Batch random_batch(const ModelConfig& c, const std::vector<int32_t>& lengths, uint64_t seed, int32_t ignored = 5) {
    Batch batch;
    Random random(seed);
    batch.cu_seqlens.push_back(0);
    for (const int32_t length : lengths) {
        for (int32_t i = 0; i < length; ++i) {
            batch.tokens.push_back(int32_t(random.below(uint64_t(c.vocab_size))));
            batch.targets.push_back(i % ignored == 3 ? kIgnoreTarget : int32_t(random.below(uint64_t(c.vocab_size))));
        }
        batch.cu_seqlens.push_back(int32_t(batch.tokens.size()));
    }
    return batch;
}

/// Fresh weights and noise on each: biases and gains are not all alike.
inline void randomize(const Weights& weights, double noise) {
    initialize(weights.layout, weights.config, 7, weights.values);
    Random random(11);
    for (const Parameter& p : weights.layout.list())
        for (float& x : weights.values[p]) x += static_cast<float>(noise * random.normal());
}

}  // namespace strobe::gpt::test
