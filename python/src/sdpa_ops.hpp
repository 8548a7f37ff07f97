// What torch's scaled_dot_product_attention runs on while strobe.hooks has it: (B, H, S, D) tensors, the arguments and results of
// aten::_scaled_dot_product_flash_attention.
#pragma once

#include "stack.hpp"

namespace strobe::torch_ops {

inline constexpr const char* kSdpaForwardSchema =
    "sdpa_forward(Tensor query, Tensor key, Tensor value, float dropout_p=0.0, bool is_causal=False, "
    "bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, "
    "SymInt max_q, SymInt max_k, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)";

/// Without dropout. Torch's deterministic mode, which no C function tells, is an argument.
inline constexpr const char* kSdpaBackwardSchema =
    "sdpa_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, bool is_causal, "
    "bool deterministic, *, float? scale=None) -> (Tensor, Tensor, Tensor)";

void sdpa_forward(StableIValue* stack, uint64_t num_args, uint64_t num_results);
void sdpa_backward(StableIValue* stack, uint64_t num_args, uint64_t num_results);

}  // namespace strobe::torch_ops
