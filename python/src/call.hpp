// The part of an attention call that forward and backward share, from the operator's arguments to strobe's C ABI.
#pragma once

#include "stack.hpp"

namespace strobe::torch_ops {

/// The options behind the tensors, in the order of STROBE_OPTIONS_SCHEMA.
struct Options {
    std::optional<double> softmax_scale;
    bool causal = false;
    int64_t window_left = -1, window_right = -1;
    double softcap = 0;
    Tensor bias, alibi_slopes;
    Tensor cu_seqlens_q, cu_seqlens_k;
    int64_t max_seqlen_q = 0, max_seqlen_k = 0;
    Tensor seqused_q, seqused_k;
    double dropout_p = 0;
    Tensor rng_state;  // (2) int64 on the CPU: seed, offset
    int64_t q_position = -1, k_position = -1;  // -1: bottom-right alignment
    bool deterministic = false;
    int64_t implementation = -1;  // an index of strobe_implementation; -1: the first that serves the call

    static Options take(Arguments& arguments);
    /// Only those of STROBE_PLAIN_OPTIONS_SCHEMA.
    static Options take_plain(Arguments& arguments);
};

// Every option has a default and the common ones come first, so that a call names few.
#define STROBE_OPTIONS_SCHEMA                                                                                           \
    "float? softmax_scale=None, bool causal=False, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, "  \
    "Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "              \
    "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, Tensor? seqused_q=None, Tensor? seqused_k=None, float dropout_p=0.0, " \
    "Tensor? rng_state=None, SymInt q_position=-1, SymInt k_position=-1, bool deterministic=False, int implementation=-1"

// Every argument of an operator costs a call from Python a tenth of a microsecond, given or not.
#define STROBE_PLAIN_OPTIONS_SCHEMA "float? softmax_scale, bool causal"

/// The descriptor of the call; it points into the tensors, which must outlive it.
strobe_attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options);

/// torch's current stream of the tensor's device; null on the CPU. The library itself makes the device current.
void* current_stream(const strobe_tensor& tensor);

/// Calls strobe with a workspace from torch, on torch's current stream.
void run_forward(const strobe_attention& attention, strobe_forward& forward, Device device);
void run_backward(const strobe_attention& attention, strobe_backward& backward, Device device);

/// (seed, offset) of a rng_state tensor.
struct RngState {
    uint64_t seed = 0;
    uint64_t offset = 0;
};
RngState read_rng_state(const Tensor& rng_state);

}  // namespace strobe::torch_ops
