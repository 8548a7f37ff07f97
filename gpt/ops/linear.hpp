// y = x W^T + b with W (out, in).
#pragma once

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

struct LinearForward {
    int64_t rows, in, out;
    Buffer x;       // (rows, in)
    Buffer weight;  // (out, in)
    Buffer bias;    // (out) or null
    Buffer y;       // (rows, out) at y_stride
    int64_t y_stride = 0;  // elements from row to row; 0: out
    /// When given (only where Ops::fuses_gelu): y = gelu(x W^T + b), and this gets what gelu was applied to.
    Buffer gelu_input{};  // (rows, out)
    /// When given (only where Ops::fuses_residual): y = x W^T + b + residual. May be y.
    Buffer residual{};    // (rows, out) at y_stride
};

struct LinearBackward {
    int64_t rows, in, out;
    Buffer x;       // (rows, in)
    Buffer weight;  // (out, in)
    Buffer dy;      // (rows, out) at dy_stride
    Buffer dx;      // (rows, in), overwritten behind dweight, so that x may be its place; null: not wanted
    Buffer dweight; // (out, in), added to, or overwritten; null: not wanted
    float* dbias;   // (out), added to, or null
    int64_t dbias_columns = 0;  // so many of the first are wanted (only where Ops::avoids_row_sums); 0: all
    int64_t dy_stride = 0;  // 0: out
    bool overwrite = false; // dweight; dbias is added to in any case
    /// When given (only where Ops::fuses_gelu): x was gelu(gelu_input), and dx is the gradient of gelu_input.
    Buffer gelu_input{};  // (rows, in)
};

/// dx = sums W: the gradient of what is added to each row of a product's input, from that of what is added to each row of its result.
/// Only where Ops::avoids_row_sums.
struct BiasBackward {
    int64_t in, out;
    Buffer weight;  // (out, in)
    const float* sums;  // (out)
    float* dx;          // (in), overwritten
};

/// What linear_backward needs of Exec::scratch for its bias.
inline size_t linear_scratch_bytes(int parts, int64_t out) { return static_cast<size_t>(parts) * static_cast<size_t>(out) * sizeof(float); }

}  // namespace strobe::gpt
