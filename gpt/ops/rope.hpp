// Rotary positions in the rotate-half form: within a head, columns i and i + head_dim / 2 are turned together by the angle
// position * theta^(-2i / head_dim) (Su et al. 2021). In place, on q and k of a packed projection, which lie side by side.
#pragma once

#include <vector>

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

struct Rope {
    int64_t rows, heads, head_dim;
    int64_t row_stride;
    Buffer x;                  // (rows, heads, head_dim) at row_stride
    const int32_t* positions;  // (rows)
    const float* cos;          // (context, head_dim / 2)
    const float* sin;          // (context, head_dim / 2)
    bool inverse = false;      // the backward is the turn the other way
};

/// Rows of cos, then of sin: (2, context, head_dim / 2). The angle is rounded to fp32 before the cosine is taken, as in
/// the models that checkpoints come from.
std::vector<float> rope_table(int64_t context, int64_t head_dim, float theta);

}  // namespace strobe::gpt
