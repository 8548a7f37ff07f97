// Softmax and its negative log likelihood in one pass over a chunk of rows; the gradient replaces the logits.
#pragma once

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

inline constexpr int32_t kIgnoreTarget = -1;

struct CrossEntropy {
    int64_t rows, vocab;
    const int32_t* targets;  // (rows); kIgnoreTarget: no loss, gradient 0
    Buffer logits;           // (rows, vocab) at stride
    float* losses;           // (rows), nats
    const float* gradient_scale = nullptr;  // when given, logits become *gradient_scale * (softmax - onehot)
    int64_t stride = 0;      // elements from row to row; 0: vocab
};

/// *sum = losses[0] + ... in an order that depends on rows alone; added to what was there if `add`.
struct LossSum {
    int64_t rows;
    const float* losses;
    double* sum;
    bool add;
};

}  // namespace strobe::gpt
