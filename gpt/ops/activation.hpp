// The MLP's nonlinearity.
//   gelu    y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))   x, y: (rows, ffn)        (Hendrycks, Gimpel 2016)
//   swiglu  y = silu(gate) * up                                    x: (rows, 2 ffn) = [gate | up]    (Shazeer 2020)
#pragma once

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

enum class ActivationKind { gelu, swiglu };

struct ActivationForward {
    ActivationKind kind;
    int64_t rows, ffn;
    Buffer x;
    Buffer y;  // (rows, ffn)
};

struct ActivationBackward {
    ActivationKind kind;
    int64_t rows, ffn;
    Buffer x;
    Buffer dy;  // (rows, ffn)
    Buffer dx;  // shape of x; may be x itself
};

}  // namespace strobe::gpt
