// Where every activation of a training pass lies. Computed from sizes before anything is allocated.
#pragma once

#include <string_view>
#include <vector>

#include "gpt/arena.hpp"
#include "gpt/config.hpp"
#include "gpt/device.hpp"

namespace strobe::gpt {

/// What the backward computes again instead of remembering.
/// none: nothing;  norms: outputs of norms;  pointwise: those and outputs of the MLP's nonlinearity;  block: everything but each
/// block's input.
enum class Recompute { none, norms, pointwise, block };

std::string_view to_string(Recompute recompute);
/// Throws std::invalid_argument naming the choices.
Recompute recompute_from_string(std::string_view name);

/// What a block's forward leaves for its backward. T rows.
struct BlockActivations {
    Buffer x;      // (T, hidden) the residual stream on entry
    Buffer norm1;  // (T, hidden); one with norm2 where a norm's output is not needed longer than its product
    Buffer qkv;    // (T, qkv_size), after rotary positions
    Buffer attn;   // (T, q_size)
    Buffer mid;    // (T, hidden) the residual stream between attention and MLP
    Buffer norm2;  // (T, hidden)
    Buffer up;     // (T, ffn) or (T, 2 ffn)
    Buffer act;    // (T, ffn)
    // Gradients in flight, in the place of what the backward has read by then.
    Buffer dqkv;   // (T, qkv_size) in that of up, if it is wide enough
    Buffer dact;   // (T, ffn) in that of act; behind it, scratch of attention's backward
    float *mean1, *rstd1, *mean2, *rstd2;  // (T)
    float* lse;                            // (num_heads, T)
};

struct Activations {
    std::vector<BlockActivations> blocks;
    Buffer branch;        // (T, hidden) what attention or MLP adds to the stream; none where products add it themselves
    Buffer final_x;       // (T, hidden)
    Buffer final_norm;    // (T, hidden)
    float *final_mean, *final_rstd;
    float* losses;        // (T)
    double* loss_sum;     // (1)
    Buffer logits;        // (head_chunk, vocab) at logits_stride; null: in memory that is lent

    // Gradients in flight.
    Buffer dstream;       // (T, hidden) of the residual stream
    Buffer dnorm;         // (T, hidden) of a norm's output; in the place of final_norm, whose product's backward comes first
    Buffer dattn;         // (T, q_size) in the same place: the gradient of one norm is used up before it, that of the next comes behind

    int64_t head_chunk = 0;     // rows of logits that exist at a time
    int64_t logits_stride = 0;  // elements from row to row
};

struct ActivationOptions {
    int64_t rows = 0;
    Recompute recompute = Recompute::none;
    bool with_gradients = true;  // false leaves out what only the backward needs
    Device device = Device::cpu;
    Precision precision = Precision::fp32;
    int64_t lent_logits = 0;     // numbers that there is room for elsewhere
};

/// Lays out a pass over at most `rows` tokens. With a null base the pointers mean nothing and only the size counts.
Activations lay_out(const ModelConfig& config, const ActivationOptions& options, std::byte* base, size_t* total_bytes);

}  // namespace strobe::gpt
