#include "gpt/model.hpp"

#include <algorithm>
#include <stdexcept>

#include <fmt/format.h>

namespace strobe::gpt {

namespace {

size_t arena_bytes(const ModelConfig& config, const ModelOptions& options) {
    size_t bytes = 0;
    lay_out(config, options.max_rows, options.recompute, options.training, nullptr, &bytes);
    return bytes;
}

}  // namespace

MemoryPlan plan_memory(const ModelConfig& config, const ModelOptions& options) {
    const size_t arena = static_cast<size_t>(ParameterLayout(config).arena_elements()) * sizeof(float);
    MemoryPlan plan;
    plan.values = arena;
    plan.gradients = options.training ? arena : 0;
    plan.moments = options.training ? 2 * arena : 0;
    plan.activations = arena_bytes(config, options);
    return plan;
}

Model::Model(const Weights& weights, Backend& backend, const ModelOptions& options)
    : weights_(weights),
      config_(weights.config),
      backend_(backend),
      exec_(backend.exec()),
      options_(options),
      norm_kind_(config_.architecture == Architecture::gpt2 ? NormKind::layernorm : NormKind::rmsnorm),
      activation_kind_(config_.architecture == Architecture::gpt2 ? ActivationKind::gelu : ActivationKind::swiglu),
      arena_(arena_bytes(config_, options)),
      gradients_(options.training ? ParameterArena(weights.layout) : ParameterArena()) {
    size_t bytes = 0;
    act_ = lay_out(config_, options.max_rows, options.recompute, options.training, arena_.at<std::byte>(0), &bytes);
    backend_.reserve_scratch(norm_scratch_bytes(backend_.team().size(), config_.hidden_size));
    if (config_.has_rope()) rope_table_ = rope_table(config_.context_length, config_.head_dim, config_.rope_theta);
    positions_.reserve(static_cast<size_t>(options.max_rows));
}

void Model::clear_gradients() {
    const std::span<float> all = gradients_.all();
    exec_.team->ranges(gradients_.size(), 4096, [&](int64_t begin, int64_t end, int) {
        std::fill(all.begin() + begin, all.begin() + end, 0.0f);
    });
}

float* Model::gradient(int index) const {
    return index < 0 ? nullptr : gradients_.data() + weights_.layout[index].offset;
}

// Checks everything that operators rely on: no operator looks at indices again.
void Model::load(const Batch& batch) {
    const auto fail = [](const std::string& text) { throw std::invalid_argument("batch: " + text); };
    rows_ = static_cast<int64_t>(batch.tokens.size());
    if (rows_ == 0 || rows_ > options_.max_rows)
        fail(fmt::format("{} tokens, must be between 1 and {}", rows_, options_.max_rows));
    if (!batch.targets.empty() && batch.targets.size() != batch.tokens.size())
        fail(fmt::format("{} targets for {} tokens", batch.targets.size(), rows_));
    if (batch.cu_seqlens.size() < 2 || batch.cu_seqlens.front() != 0 || batch.cu_seqlens.back() != rows_)
        fail(fmt::format("cu_seqlens must start at 0 and end at {}", rows_));
    for (const int32_t token : batch.tokens)
        if (token < 0 || token >= config_.vocab_size)
            fail(fmt::format("token {} is outside the vocabulary of {}", token, config_.vocab_size));
    for (const int32_t target : batch.targets)
        if (target != kIgnoreTarget && (target < 0 || target >= config_.vocab_size))
            fail(fmt::format("target {} is outside the vocabulary of {}", target, config_.vocab_size));
    max_seqlen_ = 0;
    positions_.clear();
    for (size_t b = 0; b + 1 < batch.cu_seqlens.size(); ++b) {
        const int32_t length = batch.cu_seqlens[b + 1] - batch.cu_seqlens[b];
        if (length < 0) fail("cu_seqlens must not decrease");
        if (length > config_.context_length)
            fail(fmt::format("a sequence of {} tokens exceeds the context of {}", length, config_.context_length));
        max_seqlen_ = std::max<int64_t>(max_seqlen_, length);
        for (int32_t i = 0; i < length; ++i) positions_.push_back(i);
    }
    batch_ = &batch;
    const BlockActivations& a = act_.blocks.front();
    size_t workspace = attention_workspace_bytes(attention(a), exec_.team->size());
    if (options_.training)
        workspace = std::max(workspace, attention_workspace_bytes(attention_backward(a), exec_.team->size()));
    backend_.reserve_scratch(workspace);
}

NormForward Model::norm(Buffer x, Buffer out, int weight, int bias, float* mean, float* rstd) const {
    return {.kind = norm_kind_, .rows = rows_, .hidden = config_.hidden_size, .eps = config_.norm_eps, .x = x, .branch = {},
            .sum = {}, .weight = weights_[weight], .bias = weights_[bias], .out = out, .mean = mean, .rstd = rstd};
}

NormBackward Model::norm_backward(Buffer x, Buffer dout, int weight, int bias, const float* mean, const float* rstd) const {
    return {.kind = norm_kind_, .rows = rows_, .hidden = config_.hidden_size, .x = x, .weight = weights_[weight],
            .mean = mean, .rstd = rstd, .dout = dout, .dx = act_.dstream, .dweight = gradient(weight),
            .dbias = gradient(bias)};
}

LinearForward Model::linear(Buffer x, Buffer y, int weight, int bias, int64_t in, int64_t out) const {
    return {.rows = rows_, .in = in, .out = out, .x = x, .weight = weights_[weight], .bias = weights_[bias], .y = y};
}

LinearBackward Model::linear_backward(Buffer x, Buffer dy, Buffer dx, int weight, int bias, int64_t in, int64_t out) const {
    return {.rows = rows_, .in = in, .out = out, .x = x, .weight = weights_[weight], .dy = dy, .dx = dx,
            .dweight = gradient(weight), .dbias = gradient(bias)};
}

AttentionForward Model::attention(const BlockActivations& a) const {
    const int32_t* cu_seqlens = batch_->cu_seqlens.data();
    const int64_t stride = config_.qkv_size();
    return {.shape = {.batch = static_cast<int64_t>(batch_->cu_seqlens.size()) - 1, .num_heads = config_.num_heads,
                      .num_heads_k = config_.num_heads_k, .head_dim = config_.head_dim, .total_q = rows_, .total_k = rows_,
                      .max_seqlen_q = max_seqlen_, .max_seqlen_k = max_seqlen_, .cu_seqlens_q = cu_seqlens,
                      .cu_seqlens_k = cu_seqlens},
            .q_stride = stride, .k_stride = stride, .v_stride = stride, .out_stride = config_.q_size(), .q = a.qkv,
            .k = a.qkv.offset(config_.q_size()), .v = a.qkv.offset(config_.q_size() + config_.kv_size()), .out = a.attn,
            .lse = a.lse};
}

AttentionBackward Model::attention_backward(const BlockActivations& a) const {
    return {.forward = attention(a), .dout_stride = config_.q_size(), .dqkv_stride = config_.qkv_size(),
            .dout = act_.dattn, .dq = act_.dqkv, .dk = act_.dqkv.offset(config_.q_size()),
            .dv = act_.dqkv.offset(config_.q_size() + config_.kv_size())};
}

Rope Model::rope(Buffer qkv, bool inverse) const {
    return {.rows = rows_, .heads = config_.num_heads + config_.num_heads_k, .head_dim = config_.head_dim,
            .row_stride = config_.qkv_size(), .x = qkv, .positions = positions_.data(), .cos = rope_table_.data(),
            .sin = rope_table_.data() + rope_table_.size() / 2, .inverse = inverse};
}

// `again`: the backward wants the block's activations back. The stream x is still there, and neither the branch of the
// block before nor this block's own is needed.
void Model::forward_block(int64_t layer, bool again) {
    const BlockActivations& a = act_.blocks[static_cast<size_t>(layer)];
    const BlockParameters& p = weights_.layout.block(layer);
    const int64_t hidden = config_.hidden_size;

    NormForward norm1 = norm(a.x, a.norm1, p.norm1_weight, p.norm1_bias, a.mean1, a.rstd1);
    if (layer > 0 && !again) {
        norm1.x = act_.blocks[static_cast<size_t>(layer - 1)].mid;
        norm1.branch = act_.branch;
        norm1.sum = a.x;
    }
    run(exec_, norm1);
    run(exec_, linear(a.norm1, a.qkv, p.qkv_weight, p.qkv_bias, hidden, config_.qkv_size()));
    if (config_.has_rope()) run(exec_, rope(a.qkv, false));
    run(exec_, attention(a));
    run(exec_, linear(a.attn, act_.branch, p.proj_weight, p.proj_bias, config_.q_size(), hidden));

    NormForward norm2 = norm(a.x, a.norm2, p.norm2_weight, p.norm2_bias, a.mean2, a.rstd2);
    norm2.branch = act_.branch;
    norm2.sum = a.mid;
    run(exec_, norm2);
    const int64_t up = activation_kind_ == ActivationKind::swiglu ? 2 * config_.ffn_size : config_.ffn_size;
    run(exec_, linear(a.norm2, a.up, p.up_weight, p.up_bias, hidden, up));
    run(exec_, ActivationForward{.kind = activation_kind_, .rows = rows_, .ffn = config_.ffn_size, .x = a.up, .y = a.act});
    if (!again) run(exec_, linear(a.act, act_.branch, p.down_weight, p.down_bias, config_.ffn_size, hidden));
}

// Embedding to final norm.
void Model::forward_stream() {
    const ParameterLayout& layout = weights_.layout;
    run(exec_, EmbeddingForward{.rows = rows_, .hidden = config_.hidden_size, .tokens = batch_->tokens.data(),
                                .positions = positions_.data(), .table = weights_[layout.embedding()],
                                .position_table = weights_[layout.positions()], .out = act_.blocks.front().x});
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) forward_block(layer, false);
    NormForward last = norm(act_.blocks.back().mid, act_.final_norm, layout.final_norm_weight(), layout.final_norm_bias(),
                            act_.final_mean, act_.final_rstd);
    last.branch = act_.branch;
    last.sum = act_.final_x;
    run(exec_, last);
}

void Model::recompute_pointwise(const BlockActivations& a, const BlockParameters& p) {
    run(exec_, norm(a.x, a.norm1, p.norm1_weight, p.norm1_bias, a.mean1, a.rstd1));
    run(exec_, norm(a.mid, a.norm2, p.norm2_weight, p.norm2_bias, a.mean2, a.rstd2));
    run(exec_, ActivationForward{.kind = activation_kind_, .rows = rows_, .ffn = config_.ffn_size, .x = a.up, .y = a.act});
}

// On entry dstream is the gradient of the stream behind the block, on return of the stream before it.
void Model::backward_block(int64_t layer) {
    const BlockActivations& a = act_.blocks[static_cast<size_t>(layer)];
    const BlockParameters& p = weights_.layout.block(layer);
    const int64_t hidden = config_.hidden_size;
    if (options_.recompute == Recompute::block) forward_block(layer, true);
    if (options_.recompute == Recompute::pointwise) recompute_pointwise(a, p);

    run(exec_, linear_backward(a.act, act_.dstream, act_.dact, p.down_weight, p.down_bias, config_.ffn_size, hidden));
    // The gradient takes the place of the saved input, which nothing reads after this.
    run(exec_, ActivationBackward{.kind = activation_kind_, .rows = rows_, .ffn = config_.ffn_size, .x = a.up,
                                  .dy = act_.dact, .dx = a.up});
    const int64_t up = activation_kind_ == ActivationKind::swiglu ? 2 * config_.ffn_size : config_.ffn_size;
    run(exec_, linear_backward(a.norm2, a.up, act_.dnorm, p.up_weight, p.up_bias, hidden, up));
    run(exec_, norm_backward(a.mid, act_.dnorm, p.norm2_weight, p.norm2_bias, a.mean2, a.rstd2));

    run(exec_, linear_backward(a.attn, act_.dstream, act_.dattn, p.proj_weight, p.proj_bias, config_.q_size(), hidden));
    run(exec_, attention_backward(a));
    if (config_.has_rope()) run(exec_, rope(act_.dqkv, true));
    run(exec_, linear_backward(a.norm1, act_.dqkv, act_.dnorm, p.qkv_weight, p.qkv_bias, hidden, config_.qkv_size()));
    run(exec_, norm_backward(a.x, act_.dnorm, p.norm1_weight, p.norm1_bias, a.mean1, a.rstd1));
}

// From dnorm, the gradient of the final norm's output, down to the embedding.
void Model::backward_stream() {
    const ParameterLayout& layout = weights_.layout;
    std::fill_n(act_.dstream.f32(), rows_ * config_.hidden_size, 0.0f);
    run(exec_, norm_backward(act_.final_x, act_.dnorm, layout.final_norm_weight(), layout.final_norm_bias(),
                             act_.final_mean, act_.final_rstd));
    for (int64_t layer = config_.num_layers - 1; layer >= 0; --layer) backward_block(layer);
    run(exec_, EmbeddingBackward{.rows = rows_, .hidden = config_.hidden_size, .tokens = batch_->tokens.data(),
                                 .positions = positions_.data(), .dout = act_.dstream,
                                 .dtable = gradient(layout.embedding()), .dposition_table = gradient(layout.positions())});
}

double Model::sum_losses() const {
    double sum = 0.0;
    for (int64_t r = 0; r < rows_; ++r) sum += static_cast<double>(act_.losses[r]);
    return sum;
}

double Model::loss(const Batch& batch) {
    load(batch);
    forward_stream();
    head(false, 1.0f);
    return sum_losses();
}

double Model::forward_backward(const Batch& batch, float gradient_scale) {
    if (!options_.training) throw std::logic_error("model: made without gradients");
    load(batch);
    forward_stream();
    head(true, gradient_scale);
    backward_stream();
    return sum_losses();
}

// The head and its loss, a chunk of rows at a time: the logits of a whole batch never exist. With `gradient` leaves the
// gradient of the final norm's output in dnorm.
void Model::head(bool gradient_too, float gradient_scale) {
    if (batch_->targets.empty()) throw std::invalid_argument("batch: a loss needs targets");
    const int64_t hidden = config_.hidden_size, vocab = config_.vocab_size;
    const int weight = weights_.layout.head();
    for (int64_t begin = 0; begin < rows_; begin += act_.head_chunk) {
        const int64_t rows = std::min(act_.head_chunk, rows_ - begin);
        const Buffer x = act_.final_norm.offset(begin * hidden);
        run(exec_, LinearForward{.rows = rows, .in = hidden, .out = vocab, .x = x, .weight = weights_[weight], .bias = {},
                                 .y = act_.logits});
        run(exec_, CrossEntropy{.rows = rows, .vocab = vocab, .targets = batch_->targets.data() + begin,
                                .logits = act_.logits, .losses = act_.losses + begin, .gradient = gradient_too,
                                .gradient_scale = gradient_scale});
        if (gradient_too)
            run(exec_, LinearBackward{.rows = rows, .in = hidden, .out = vocab, .x = x, .weight = weights_[weight],
                                      .dy = act_.logits, .dx = act_.dnorm.offset(begin * hidden),
                                      .dweight = gradient(weight), .dbias = nullptr});
    }
}

void Model::logits(const Batch& batch, std::span<float> out) {
    load(batch);
    if (static_cast<int64_t>(out.size()) != rows_ * config_.vocab_size)
        throw std::invalid_argument(fmt::format("logits: room for {} numbers, need {}", out.size(), rows_ * config_.vocab_size));
    forward_stream();
    run(exec_, LinearForward{.rows = rows_, .in = config_.hidden_size, .out = config_.vocab_size, .x = act_.final_norm,
                             .weight = weights_[weights_.layout.head()], .bias = {}, .y = out.data()});
}

}  // namespace strobe::gpt
