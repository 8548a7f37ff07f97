// What torch's scaled_dot_product_attention runs on while strobe.hooks has it: (B, H, S, D) tensors, the arguments and
// results of aten::_scaled_dot_product_flash_attention and of its backward.
#pragma once

#include "stack.hpp"

namespace strobe::torch_ops {

inline constexpr const char* kSdpaForwardSchema =
    "sdpa_forward(Tensor query, Tensor key, Tensor value, float dropout_p=0.0, bool is_causal=False, "
    "bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, "
    "Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)";

inline constexpr const char* kSdpaBackwardSchema =
    "sdpa_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
    "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed, Tensor philox_offset, *, "
    "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)";

void sdpa_forward(StableIValue* stack, uint64_t num_args, uint64_t num_results);
void sdpa_backward(StableIValue* stack, uint64_t num_args, uint64_t num_results);

}  // namespace strobe::torch_ops
