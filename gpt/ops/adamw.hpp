// AdamW (Loshchilov, Hutter 2019) over a whole arena in one call, with the clip by global norm folded in.
//   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr (decay w + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))
#pragma once

#include <span>

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

/// A stretch of the arena with one decay; neighbours of equal decay are one segment.
struct AdamWSegment {
    int64_t offset, size;
    bool decay;
};

struct AdamW {
    std::span<const AdamWSegment> segments;
    float* values;
    const float* grads;
    float* m;
    float* v;
    float learning_rate, beta1, beta2, eps, weight_decay;
    int64_t step;       // 1 for the first
    float grad_scale;   // the clip: min(1, max_norm / norm)
};

/// *result = sum of squares, in fixed blocks, so it does not depend on the number of threads.
struct SquaredNorm {
    int64_t size;
    const float* values;
    double* result;
};

}  // namespace strobe::gpt
