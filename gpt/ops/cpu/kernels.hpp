// The CPU's operators. The vector kernels are compiled once per instruction set, each time in a namespace of its own that
// the build names; the others are compiled once.
#pragma once

#include "gpt/ops/ops.hpp"

#define STROBE_GPT_DECLARE_KERNELS                                 \
    void embedding_forward(Exec&, const EmbeddingForward&);        \
    void embedding_backward(Exec&, const EmbeddingBackward&);      \
    void norm_forward(Exec&, const NormForward&);                  \
    void norm_backward(Exec&, const NormBackward&);                \
    void activation_forward(Exec&, const ActivationForward&);      \
    void activation_backward(Exec&, const ActivationBackward&);    \
    void rope(Exec&, const Rope&);                                 \
    void cross_entropy(Exec&, const CrossEntropy&);                \
    void adamw(Exec&, const AdamW&);                               \
    void squared_norm(Exec&, const SquaredNorm&);

namespace strobe::gpt::cpu {

namespace baseline {
STROBE_GPT_DECLARE_KERNELS
}
namespace avx2 {
STROBE_GPT_DECLARE_KERNELS
}

void linear_forward(Exec&, const LinearForward&);
void linear_backward(Exec&, const LinearBackward&);
void cache_append(Exec&, const CacheAppend&);
void loss_sum(Exec&, const LossSum&);

/// The best for this machine.
const Ops& table();

}  // namespace strobe::gpt::cpu
