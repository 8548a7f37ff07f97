// Residual addition and normalisation in one pass: sum = x + branch, out = norm(sum).
//   LayerNorm  out = (sum - mean) * rstd * weight + bias   (Ba, Kiros, Hinton 2016)
//   RMSNorm    out = sum * rstd * weight                   (Zhang, Sennrich 2019); `bias` and `mean` are null
#pragma once

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

enum class NormKind { layernorm, rmsnorm };

struct NormForward {
    NormKind kind;
    int64_t rows, hidden;
    float eps;
    Buffer x;       // (rows, hidden)
    Buffer branch;  // (rows, hidden) or null: sum is x
    Buffer sum;     // (rows, hidden); unused without branch; may be x
    Buffer weight;  // (hidden), fp32
    Buffer bias;    // (hidden), fp32
    Buffer out;     // (rows, hidden)
    float* mean;    // (rows)
    float* rstd;    // (rows)
};

/// dx += d norm / d x; dweight and dbias are added to.
struct NormBackward {
    NormKind kind;
    int64_t rows, hidden;
    Buffer x;        // (rows, hidden), the normalised sum
    Buffer weight;   // (hidden), fp32
    const float* mean;
    const float* rstd;
    Buffer dout;     // (rows, hidden)
    Buffer dx;       // (rows, hidden)
    float* dweight;  // (hidden)
    float* dbias;    // (hidden) or null
    // Only where Ops::norms_again:
    Buffer out{};           // (rows, hidden): when given, gets what the forward gave, which needs the
    Buffer bias{};          // (hidden), fp32
    float* dsum = nullptr;  // (hidden): when given, the sums over the rows of the new dx are added: the bias gradient of the
                            // product whose result x is the sum with
};

/// What norm_backward needs of Exec::scratch.
inline size_t norm_scratch_bytes(int parts, int64_t hidden) {
    return static_cast<size_t>(3 * hidden * parts) * sizeof(float);
}

}  // namespace strobe::gpt
