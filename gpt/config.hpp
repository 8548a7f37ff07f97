// What a model is: its architecture and sizes. Everything else - parameter list, memory plan, FLOP count, checkpoint
// header - is computed from this struct.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace strobe::gpt {

/// gpt2:  learned positions, LayerNorm, GELU (tanh form), biases everywhere, tied head; Radford et al. 2019.
/// llama: rotary positions (rotate-half form), RMSNorm, SwiGLU, grouped-query attention, no biases; Touvron et al. 2023.
enum class Architecture { gpt2, llama };

std::string_view to_string(Architecture architecture);
/// Throws std::invalid_argument naming the choices.
Architecture architecture_from_string(std::string_view name);

struct ModelConfig {
    Architecture architecture = Architecture::llama;
    int64_t vocab_size = 256;
    int64_t context_length = 256;  // gpt2: rows of the position table; llama: the longest sequence trained on
    int64_t num_layers = 4;
    int64_t hidden_size = 192;
    int64_t num_heads = 6;
    int64_t num_heads_k = 6;       // divides num_heads; gpt2: equal to it
    int64_t head_dim = 32;         // gpt2: hidden_size / num_heads; llama: free, even
    int64_t ffn_size = 512;
    float norm_eps = 1e-5f;
    float rope_theta = 10000.0f;   // llama only
    bool tied_head = true;         // the head's weight is the embedding; gpt2: always
    float init_std = 0.02f;        // of the normal distribution of fresh weights

    bool operator==(const ModelConfig&) const = default;

    /// Throws std::invalid_argument that names the field, its value and what is possible.
    void validate() const;

    int64_t q_size() const { return num_heads * head_dim; }
    int64_t kv_size() const { return num_heads_k * head_dim; }
    /// Columns of the packed projection: q, then k, then v.
    int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
    bool has_biases() const { return architecture == Architecture::gpt2; }
    bool has_rope() const { return architecture == Architecture::llama; }

    /// All trainable numbers; a tied head counts once.
    int64_t num_parameters() const;
    /// Parameters that take part in a matrix product per token: all but position table and, when untied, the embedding.
    int64_t num_matmul_parameters() const;
    /// Matrix FLOPs of one trained token (forward and backward) at sequence length s: 6 N + 12 L (heads * head_dim) s, the
    /// formula of Megatron and the FlashAttention papers, which counts causal attention as if it were full.
    double flops_per_token(int64_t seqlen) const;
};

/// A config of GPT-2's proportions (ffn = 4 * hidden, one head per 64 or fewer columns).
ModelConfig gpt2_config(int64_t num_layers, int64_t hidden_size, int64_t num_heads, int64_t context_length,
                        int64_t vocab_size);
/// A config of Llama's proportions (ffn = 8/3 * hidden rounded up to 32).
ModelConfig llama_config(int64_t num_layers, int64_t hidden_size, int64_t num_heads, int64_t num_heads_k,
                         int64_t context_length, int64_t vocab_size);

}  // namespace strobe::gpt
