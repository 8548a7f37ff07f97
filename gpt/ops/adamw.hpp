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
    std::span<const AdamWSegment> segments;  // ascending, in memory that the operator can read
    int64_t size;                            // elements of the arena
    float* values;
    const float* grads;
    float* m;
    float* v;
    float learning_rate, beta1, beta2, eps, weight_decay;
    int64_t step;                            // 1 for the first
    const double* squared_norm = nullptr;    // of the gradients, for the clip; null: none
    float clip_norm = 0.0f;                  // gradients are scaled by min(1, clip_norm / norm)
    Buffer narrow{};                         // gets the new values in its precision, or null
};

/// narrow = values, rounded.
struct Narrow {
    int64_t size;
    const float* values;
    Buffer narrow;
};

/// *result = sum of squares, in fixed blocks, so it does not depend on the number of threads.
struct SquaredNorm {
    int64_t size;
    const float* values;
    double* result;
};

/// What squared_norm needs of Exec::scratch.
inline size_t squared_norm_scratch_bytes(int parts) { return static_cast<size_t>(parts) * sizeof(double); }

}  // namespace strobe::gpt
