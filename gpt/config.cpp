#include "gpt/config.hpp"

#include <stdexcept>

#include <fmt/core.h>

#include "gpt/parameters.hpp"

namespace strobe::gpt {

namespace {

// Bounds that keep every product of two sizes far inside 64 bits, whatever a checkpoint claims.
constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1024;

void check_range(const char* field, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
        throw std::invalid_argument(
            fmt::format("model config: {} is {}, must be between {} and {}", field, value, low, high));
}

}  // namespace

std::string_view to_string(Architecture architecture) {
    return architecture == Architecture::gpt2 ? "gpt2" : "llama";
}

Architecture architecture_from_string(std::string_view name) {
    if (name == "gpt2") return Architecture::gpt2;
    if (name == "llama") return Architecture::llama;
    throw std::invalid_argument(fmt::format("architecture '{}' is unknown; choose gpt2 or llama", name));
}

void ModelConfig::validate() const {
    check_range("vocab_size", vocab_size, 1, kMaxSize);
    check_range("context_length", context_length, 1, kMaxSize);
    check_range("num_layers", num_layers, 1, kMaxLayers);
    check_range("hidden_size", hidden_size, 1, kMaxSize);
    check_range("num_heads", num_heads, 1, 4096);
    check_range("num_heads_k", num_heads_k, 1, num_heads);
    check_range("head_dim", head_dim, 1, 4096);
    check_range("ffn_size", ffn_size, 1, kMaxSize);
    if (num_heads % num_heads_k != 0)
        throw std::invalid_argument(
            fmt::format("model config: num_heads is {}, must be a multiple of num_heads_k = {}", num_heads, num_heads_k));
    if (!(norm_eps > 0.0f && norm_eps < 1.0f))
        throw std::invalid_argument(fmt::format("model config: norm_eps is {}, must be between 0 and 1", norm_eps));
    if (!(init_std >= 0.0f && init_std < 100.0f))
        throw std::invalid_argument(fmt::format("model config: init_std is {}, must be between 0 and 100", init_std));
    if (architecture == Architecture::gpt2) {
        if (num_heads_k != num_heads)
            throw std::invalid_argument(fmt::format(
                "model config: num_heads_k is {}, but gpt2 has one key head per query head ({})", num_heads_k, num_heads));
        if (head_dim * num_heads != hidden_size)
            throw std::invalid_argument(fmt::format("model config: gpt2 needs num_heads * head_dim = hidden_size, got {} * {} and {}",
                                                    num_heads, head_dim, hidden_size));
        if (!tied_head) throw std::invalid_argument("model config: gpt2 always ties its head to the embedding");
    } else {
        if (head_dim % 2 != 0)
            throw std::invalid_argument(
                fmt::format("model config: head_dim is {}, must be even for rotary positions", head_dim));
        if (!(rope_theta > 0.0f))
            throw std::invalid_argument(fmt::format("model config: rope_theta is {}, must be positive", rope_theta));
    }
}

int64_t ModelConfig::num_parameters() const { return ParameterLayout(*this).num_elements(); }

int64_t ModelConfig::num_matmul_parameters() const {
    const int64_t mlp = (architecture == Architecture::llama ? 3 : 2) * hidden_size * ffn_size;
    return num_layers * (hidden_size * qkv_size() + q_size() * hidden_size + mlp) + vocab_size * hidden_size;
}

double ModelConfig::flops_per_token(int64_t seqlen) const {
    return 6.0 * static_cast<double>(num_matmul_parameters()) +
           12.0 * static_cast<double>(num_layers) * static_cast<double>(q_size()) * static_cast<double>(seqlen);
}

ModelConfig gpt2_config(int64_t num_layers, int64_t hidden_size, int64_t num_heads, int64_t context_length,
                        int64_t vocab_size) {
    ModelConfig c;
    c.architecture = Architecture::gpt2;
    c.vocab_size = vocab_size;
    c.context_length = context_length;
    c.num_layers = num_layers;
    c.hidden_size = hidden_size;
    c.num_heads = c.num_heads_k = num_heads;
    c.head_dim = num_heads > 0 ? hidden_size / num_heads : 0;
    c.ffn_size = 4 * hidden_size;
    c.tied_head = true;
    c.validate();
    return c;
}

ModelConfig llama_config(int64_t num_layers, int64_t hidden_size, int64_t num_heads, int64_t num_heads_k,
                         int64_t context_length, int64_t vocab_size) {
    ModelConfig c;
    c.architecture = Architecture::llama;
    c.vocab_size = vocab_size;
    c.context_length = context_length;
    c.num_layers = num_layers;
    c.hidden_size = hidden_size;
    c.num_heads = num_heads;
    c.num_heads_k = num_heads_k;
    c.head_dim = num_heads > 0 ? hidden_size / num_heads : 0;
    c.ffn_size = (8 * hidden_size / 3 + 31) / 32 * 32;
    c.validate();
    return c;
}

}  // namespace strobe::gpt
