#include "gpt/generate/decoder.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include <fmt/core.h>

namespace strobe::gpt {

namespace {

// A GPU is told a round number of keys, at most the capacity, and finds the true one in memory: single tokens are then
// calls with the same arguments, which it records.
constexpr int64_t kKeysStep = 2048;

/// Prompt tokens read at a time: what stays in a CPU's cache, what fills a GPU.
int64_t chunk_of(Device device) { return device == Device::cpu ? 256 : 2048; }

}  // namespace

Decoder::Decoder(const Weights& weights, Backend& backend, int64_t capacity)
    : weights_(weights), config_(weights.config), backend_(backend), exec_(backend.exec()), capacity_(capacity), graphs_(backend) {
    if (capacity < 1 || capacity > config_.context_length)
        throw std::invalid_argument(
            fmt::format("decoder: capacity is {}, must be between 1 and the model's context of {}", capacity, config_.context_length));
    const int64_t chunk = std::min(chunk_of(backend.device()), capacity);
    const int64_t up = (config_.architecture == Architecture::llama ? 2 : 1) * config_.ffn_size;
    const Precision precision = weights.precision;
    ArenaPlan plan;
    std::vector<std::pair<Buffer*, size_t>> places;
    const auto place = [&](Buffer& buffer, int64_t count) { places.emplace_back(&buffer, plan.reserve(count, size_of(precision))); };
    caches_.resize(static_cast<size_t>(config_.num_layers));
    for (Cache& cache : caches_) {
        place(cache.k, capacity * config_.kv_size());
        place(cache.v, capacity * config_.kv_size());
    }
    place(x_, chunk * config_.hidden_size);
    place(norm_, chunk * config_.hidden_size);
    place(qkv_, chunk * config_.qkv_size());
    place(attn_, chunk * config_.q_size());
    place(branch_, chunk * config_.hidden_size);
    place(up_, chunk * up);
    place(act_, chunk * config_.ffn_size);
    const size_t logits = plan.reserve(config_.vocab_size);
    arena_ = Arena(plan.total_bytes(), backend.memory());
    for (const auto& [buffer, offset] : places) *buffer = Buffer(arena_.at<void>(offset), precision);
    logits_ = arena_.at<float>(logits);
    answer_.resize(static_cast<size_t>(config_.vocab_size));
    inputs_ = backend.runtime().make_stage(static_cast<size_t>(2 * chunk + 4) * sizeof(int32_t));
    if (config_.has_rope()) {
        const std::vector<float> table = rope_table(capacity, config_.head_dim, config_.rope_theta);
        rope_table_ = Arena(table.size() * sizeof(float), backend.memory());
        backend.memory().copy(rope_table_.at<void>(0), table.data(), rope_table_.size_bytes());
    }

    // Workspace is not a simple function of the rows: few of them are another kind of call.
    size_t workspace = 0;
    for (int64_t rows = 1; rows <= chunk; ++rows) {
        const AttentionForward largest = attention(caches_.front(), rows, capacity, nullptr);
        workspace = std::max(workspace, attention_workspace_bytes(exec_, largest));
    }
    backend.reserve_scratch(workspace);
}

std::span<const float> Decoder::feed(std::span<const int32_t> tokens) {
    if (tokens.empty()) throw std::invalid_argument("decoder: no tokens to read");
    if (length_ + static_cast<int64_t>(tokens.size()) > capacity_)
        throw std::length_error(fmt::format("decoder: {} tokens behind {} exceed the capacity of {}", tokens.size(), length_, capacity_));
    for (const int32_t token : tokens)
        if (token < 0 || token >= config_.vocab_size)
            throw std::invalid_argument(fmt::format("decoder: token {} is outside the vocabulary of {}", token, config_.vocab_size));
    while (!tokens.empty()) {
        const size_t count = std::min(tokens.size(), static_cast<size_t>(chunk_of(exec_.device)));
        feed_chunk(tokens.first(count));
        tokens = tokens.subspan(count);
    }
    backend_.memory().copy(answer_.data(), logits_, answer_.size() * sizeof(float));
    return answer_;
}

AttentionForward Decoder::attention(const Cache& cache, int64_t rows, int64_t keys, const int32_t* cu_seqlens) const {
    return {.shape = {.batch = 1, .num_heads = config_.num_heads, .num_heads_k = config_.num_heads_k,
                      .head_dim = config_.head_dim, .total_q = rows, .total_k = keys, .max_seqlen_q = rows,
                      .max_seqlen_k = keys, .cu_seqlens_q = cu_seqlens, .cu_seqlens_k = cu_seqlens ? cu_seqlens + 2 : nullptr},
            .q_stride = config_.qkv_size(), .k_stride = config_.kv_size(), .v_stride = config_.kv_size(),
            .out_stride = config_.q_size(), .q = qkv_, .k = cache.k, .v = cache.v, .out = attn_, .lse = nullptr};
}

void Decoder::feed_chunk(std::span<const int32_t> tokens) {
    const auto rows = static_cast<int64_t>(tokens.size());
    const int64_t hidden = config_.hidden_size;
    const bool gpt2 = config_.architecture == Architecture::gpt2;
    const ParameterLayout& layout = weights_.layout;
    const auto keys = static_cast<int32_t>(length_ + rows);
    auto* host = reinterpret_cast<int32_t*>(inputs_->host());
    std::copy(tokens.begin(), tokens.end(), host);
    for (int64_t i = 0; i < rows; ++i) host[rows + i] = static_cast<int32_t>(length_ + i);
    const std::array<int32_t, 4> borders{0, static_cast<int32_t>(rows), 0, keys};
    std::copy(borders.begin(), borders.end(), host + 2 * rows);
    const auto* tokens_there = reinterpret_cast<const int32_t*>(inputs_->send(static_cast<size_t>(2 * rows + 4) * sizeof(int32_t)));
    const int32_t* positions = tokens_there + rows;
    const int32_t* cu_seqlens = positions + rows;

    const bool recorded = rows == 1 && backend_.device() != Device::cpu;
    const int64_t told_keys = recorded ? std::min(capacity_, (keys + kKeysStep - 1) / kKeysStep * kKeysStep) : keys;

    const auto norm = [&](Buffer x, Buffer branch, int64_t count, int weight, int bias) {
        run(exec_, NormForward{.kind = gpt2 ? NormKind::layernorm : NormKind::rmsnorm, .rows = count, .hidden = hidden,
                               .eps = config_.norm_eps, .x = x, .branch = branch, .sum = x, .weight = weights_.master(weight),
                               .bias = weights_.master(bias), .out = norm_, .mean = nullptr, .rstd = nullptr});
    };
    const auto linear = [&](Buffer x, Buffer y, int64_t count, int weight, int bias, int64_t in, int64_t out) {
        run(exec_, LinearForward{.rows = count, .in = in, .out = out, .x = x, .weight = weights_[weight],
                                 .bias = weights_[bias], .y = y});
    };

    const auto enqueue = [&] {
        run(exec_, EmbeddingForward{.rows = rows, .hidden = hidden, .tokens = tokens_there, .positions = positions,
                                    .table = weights_[layout.embedding()], .position_table = weights_[layout.positions()],
                                    .out = x_});
        for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
            const BlockParameters& p = layout.block(layer);
            const Cache& cache = caches_[static_cast<size_t>(layer)];
            norm(x_, layer > 0 ? branch_ : Buffer(), rows, p.norm1_weight, p.norm1_bias);
            linear(norm_, qkv_, rows, p.qkv_weight, p.qkv_bias, hidden, config_.qkv_size());
            if (config_.has_rope())
                run(exec_, Rope{.rows = rows, .heads = config_.num_heads + config_.num_heads_k, .head_dim = config_.head_dim,
                                .row_stride = config_.qkv_size(), .x = qkv_, .positions = positions,
                                .cos = rope_table_.at<float>(0), .sin = rope_table_.at<float>(rope_table_.size_bytes() / 2)});
            run(exec_, CacheAppend{.rows = rows, .columns = config_.kv_size(), .stride = config_.qkv_size(), .positions = positions,
                                   .k = qkv_.offset(config_.q_size()), .v = qkv_.offset(config_.q_size() + config_.kv_size()),
                                   .k_cache = cache.k, .v_cache = cache.v});
            run(exec_, attention(cache, rows, told_keys, cu_seqlens));
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
    };
    if (recorded)
        graphs_.run({told_keys, reinterpret_cast<int64_t>(exec_.scratch)}, enqueue);
    else
        enqueue();
    length_ += rows;
}

}  // namespace strobe::gpt
