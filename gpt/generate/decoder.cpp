#include "gpt/generate/decoder.hpp"

#include <algorithm>
#include <stdexcept>

#include <fmt/format.h>

namespace strobe::gpt {

namespace {

constexpr int64_t kChunk = 256;  // prompt tokens read at a time

}  // namespace

Decoder::Decoder(const Weights& weights, Backend& backend, int64_t capacity)
    : weights_(weights), config_(weights.config), exec_(backend.exec()), capacity_(capacity) {
    if (capacity < 1 || capacity > config_.context_length)
        throw std::invalid_argument(
            fmt::format("decoder: capacity is {}, must be between 1 and the model's context of {}", capacity, config_.context_length));
    const int64_t chunk = std::min(kChunk, capacity);
    const int64_t up = (config_.architecture == Architecture::llama ? 2 : 1) * config_.ffn_size;
    ArenaPlan plan;
    const size_t cache = plan.reserve(2 * config_.num_layers * capacity * config_.kv_size());
    const size_t x = plan.reserve(chunk * config_.hidden_size), norm = plan.reserve(chunk * config_.hidden_size);
    const size_t qkv = plan.reserve(chunk * config_.qkv_size()), attn = plan.reserve(chunk * config_.q_size());
    const size_t branch = plan.reserve(chunk * config_.hidden_size), wide = plan.reserve(chunk * up);
    const size_t act = plan.reserve(chunk * config_.ffn_size), logits = plan.reserve(config_.vocab_size);
    arena_ = Arena(plan.total_bytes());
    float* rows = arena_.at<float>(cache);
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
        const int64_t size = capacity * config_.kv_size();
        caches_.push_back({rows + 2 * layer * size, rows + (2 * layer + 1) * size});
    }
    x_ = arena_.at<float>(x);
    norm_ = arena_.at<float>(norm);
    qkv_ = arena_.at<float>(qkv);
    attn_ = arena_.at<float>(attn);
    branch_ = arena_.at<float>(branch);
    up_ = arena_.at<float>(wide);
    act_ = arena_.at<float>(act);
    logits_ = arena_.at<float>(logits);
    if (config_.has_rope()) rope_table_ = rope_table(capacity, config_.head_dim, config_.rope_theta);

    // Workspace is not a simple function of the rows: few of them are another kind of call.
    for (int64_t rows = 1; rows <= chunk; ++rows) {
        const AttentionForward largest = attention(caches_.front(), rows, capacity, nullptr);
        backend.reserve_scratch(attention_workspace_bytes(largest, exec_.team->size()));
    }
}

std::span<const float> Decoder::feed(std::span<const int32_t> tokens) {
    if (tokens.empty()) throw std::invalid_argument("decoder: no tokens to read");
    if (length_ + static_cast<int64_t>(tokens.size()) > capacity_)
        throw std::length_error(fmt::format("decoder: {} tokens behind {} exceed the capacity of {}", tokens.size(), length_, capacity_));
    for (const int32_t token : tokens)
        if (token < 0 || token >= config_.vocab_size)
            throw std::invalid_argument(fmt::format("decoder: token {} is outside the vocabulary of {}", token, config_.vocab_size));
    while (!tokens.empty()) {
        const size_t count = std::min(tokens.size(), static_cast<size_t>(kChunk));
        feed_chunk(tokens.first(count));
        tokens = tokens.subspan(count);
    }
    return {logits_.f32(), static_cast<size_t>(config_.vocab_size)};
}

AttentionForward Decoder::attention(const Cache& cache, int64_t rows, int64_t keys, const int32_t* cu_seqlens) const {
    return {.shape = {.batch = 1, .num_heads = config_.num_heads, .num_heads_k = config_.num_heads_k,
                      .head_dim = config_.head_dim, .total_q = rows, .total_k = keys, .max_seqlen_q = rows,
                      .max_seqlen_k = keys, .cu_seqlens_q = cu_seqlens, .cu_seqlens_k = cu_seqlens ? cu_seqlens + 2 : nullptr},
            .q_stride = config_.qkv_size(), .k_stride = config_.kv_size(), .v_stride = config_.kv_size(),
            .out_stride = config_.q_size(), .q = qkv_, .k = cache.k, .v = cache.v, .out = attn_, .lse = nullptr};
}

void Decoder::append(const Cache& cache, int64_t rows) {
    const int64_t size = config_.kv_size();
    for (int64_t r = 0; r < rows; ++r) {
        const float* k = qkv_.f32() + r * config_.qkv_size() + config_.q_size();
        std::copy_n(k, size, cache.k.f32() + (length_ + r) * size);
        std::copy_n(k + size, size, cache.v.f32() + (length_ + r) * size);
    }
}

void Decoder::feed_chunk(std::span<const int32_t> tokens) {
    const auto rows = static_cast<int64_t>(tokens.size());
    const int64_t hidden = config_.hidden_size;
    const bool gpt2 = config_.architecture == Architecture::gpt2;
    const ParameterLayout& layout = weights_.layout;
    const auto keys = static_cast<int32_t>(length_ + rows);
    const int32_t cu_seqlens[4] = {0, static_cast<int32_t>(rows), 0, keys};
    positions_.resize(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) positions_[i] = static_cast<int32_t>(length_) + static_cast<int32_t>(i);

    const auto norm = [&](Buffer x, Buffer branch, int64_t count, int weight, int bias) {
        run(exec_, NormForward{.kind = gpt2 ? NormKind::layernorm : NormKind::rmsnorm, .rows = count, .hidden = hidden,
                               .eps = config_.norm_eps, .x = x, .branch = branch, .sum = x, .weight = weights_[weight],
                               .bias = weights_[bias], .out = norm_, .mean = nullptr, .rstd = nullptr});
    };
    const auto linear = [&](Buffer x, Buffer y, int64_t count, int weight, int bias, int64_t in, int64_t out) {
        run(exec_, LinearForward{.rows = count, .in = in, .out = out, .x = x, .weight = weights_[weight],
                                 .bias = weights_[bias], .y = y});
    };

    run(exec_, EmbeddingForward{.rows = rows, .hidden = hidden, .tokens = tokens.data(), .positions = positions_.data(),
                                .table = weights_[layout.embedding()], .position_table = weights_[layout.positions()],
                                .out = x_});
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
        const BlockParameters& p = layout.block(layer);
        const Cache& cache = caches_[static_cast<size_t>(layer)];
        norm(x_, layer > 0 ? branch_ : Buffer(), rows, p.norm1_weight, p.norm1_bias);
        linear(norm_, qkv_, rows, p.qkv_weight, p.qkv_bias, hidden, config_.qkv_size());
        if (config_.has_rope())
            run(exec_, Rope{.rows = rows, .heads = config_.num_heads + config_.num_heads_k, .head_dim = config_.head_dim,
                            .row_stride = config_.qkv_size(), .x = qkv_, .positions = positions_.data(),
                            .cos = rope_table_.data(), .sin = rope_table_.data() + rope_table_.size() / 2});
        append(cache, rows);
        run(exec_, attention(cache, rows, keys, cu_seqlens));
        linear(attn_, branch_, rows, p.proj_weight, p.proj_bias, config_.q_size(), hidden);
        norm(x_, branch_, rows, p.norm2_weight, p.norm2_bias);
        linear(norm_, up_, rows, p.up_weight, p.up_bias, hidden, gpt2 ? config_.ffn_size : 2 * config_.ffn_size);
        run(exec_, ActivationForward{.kind = gpt2 ? ActivationKind::gelu : ActivationKind::swiglu, .rows = rows,
                                     .ffn = config_.ffn_size, .x = up_, .y = act_});
        linear(act_, branch_, rows, p.down_weight, p.down_bias, config_.ffn_size, hidden);
    }
    // Only the last row is asked for its successor.
    const int64_t last = (rows - 1) * hidden;
    norm(x_.offset(last), branch_.offset(last), 1, layout.final_norm_weight(), layout.final_norm_bias());
    linear(norm_, logits_, 1, layout.head(), -1, hidden, config_.vocab_size);
    length_ += rows;
}

}  // namespace strobe::gpt
