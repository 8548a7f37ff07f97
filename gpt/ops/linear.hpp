// y = x W^T + b with W (out, in).
#pragma once

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

struct LinearForward {
    int64_t rows, in, out;
    Buffer x;       // (rows, in)
    Buffer weight;  // (out, in)
    Buffer bias;    // (out) or null
    Buffer y;       // (rows, out)
};

struct LinearBackward {
    int64_t rows, in, out;
    Buffer x;       // (rows, in)
    Buffer weight;  // (out, in)
    Buffer dy;      // (rows, out)
    Buffer dx;      // (rows, in), overwritten; null: not wanted
    float* dweight; // (out, in), added to
    float* dbias;   // (out), added to, or null
};

}  // namespace strobe::gpt
