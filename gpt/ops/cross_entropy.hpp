// Softmax and its negative log likelihood in one pass over a chunk of rows; the gradient replaces the logits.
#pragma once

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

inline constexpr int32_t kIgnoreTarget = -1;

struct CrossEntropy {
    int64_t rows, vocab;
    const int32_t* targets;  // (rows); kIgnoreTarget: no loss, gradient 0
    Buffer logits;           // (rows, vocab)
    float* losses;           // (rows), nats
    bool gradient = false;   // logits become gradient_scale * (softmax - onehot)
    float gradient_scale = 1.0f;
};

}  // namespace strobe::gpt
