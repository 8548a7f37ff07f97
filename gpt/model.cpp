#include "gpt/model.hpp"

#include <algorithm>
#include <stdexcept>

#include <fmt/core.h>

namespace strobe::gpt {

namespace {

/// Logits in a GPU's bf16 may lie where the gradients of the blocks' matrices come to lie behind them. [begin, end) in the arena.
std::pair<int64_t, int64_t> lent_to_logits(const ParameterLayout& layout, const ModelOptions& o) {
    const bool lent = o.training && o.device == Device::cuda && o.precision == Precision::bf16 && o.gradients == Precision::bf16;
    if (!lent) return {0, 0};
    const int head = layout.head();
    return {layout[layout.block(0).qkv_weight].offset, head == layout.embedding() ? layout.arena_elements() : layout[head].offset};
}

ActivationOptions activation_options(const ParameterLayout& layout, const ModelOptions& o) {
    const auto [begin, end] = lent_to_logits(layout, o);
    return {.rows = o.max_rows, .recompute = o.recompute, .with_gradients = o.training, .device = o.device, .precision = o.precision,
            .lent_logits = end - begin};
}

size_t arena_bytes(const ModelConfig& config, const ParameterLayout& layout, const ModelOptions& options) {
    size_t bytes = 0;
    lay_out(config, activation_options(layout, options), nullptr, &bytes);
    return bytes;
}

/// Of all operators but attention.
size_t scratch_bytes(const ModelConfig& c, const ModelOptions& options, int parts) {
    const int64_t up = (c.architecture == Architecture::llama ? 2 : 1) * c.ffn_size;
    size_t bytes = norm_scratch_bytes(parts, c.hidden_size);
    bytes = std::max(bytes, linear_scratch_bytes(parts, std::max({c.qkv_size(), up, c.hidden_size})));
    bytes = std::max(bytes, squared_norm_scratch_bytes(parts));
    if (options.device == Device::cuda) bytes = std::max(bytes, embedding_scratch_bytes(options.max_rows, c.hidden_size));
    return bytes;
}

/// Stretches of the arena between the gradients that one product computes whole.
std::vector<std::pair<int64_t, int64_t>> outside_products(const ModelConfig& c, const ParameterLayout& layout) {
    std::vector<std::pair<int64_t, int64_t>> products;
    const auto add = [&](int parameter, int64_t size) {
        const int64_t begin = layout[parameter].offset;
        products.emplace_back(begin, begin + size);
    };
    const int64_t up = (c.architecture == Architecture::llama ? 2 : 1) * c.ffn_size;
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
        const BlockParameters& p = layout.block(layer);
        add(p.qkv_weight, c.qkv_size() * c.hidden_size);
        add(p.proj_weight, c.hidden_size * c.q_size());
        add(p.up_weight, up * c.hidden_size);
        add(p.down_weight, c.hidden_size * c.ffn_size);
    }
    add(layout.head(), c.vocab_size * c.hidden_size);
    std::sort(products.begin(), products.end());
    std::vector<std::pair<int64_t, int64_t>> between;
    int64_t at = 0;
    for (const auto& [begin, end] : products) {
        if (begin > at) between.emplace_back(at, begin);
        at = end;
    }
    if (at < layout.arena_elements()) between.emplace_back(at, layout.arena_elements());
    return between;
}

ModelOptions placed(ModelOptions options, const Weights& weights, const Backend& backend) {
    options.device = backend.device();
    options.precision = weights.precision;
    return options;
}

}  // namespace

MemoryPlan plan_memory(const ModelConfig& config, const ModelOptions& options) {
    const ParameterLayout layout(config);
    const auto elements = static_cast<size_t>(layout.arena_elements());
    MemoryPlan plan;
    plan.values = ParameterArena::bytes_of(layout, options.precision, options.masters == Precision::fp32);
    plan.narrow_values = options.precision == Precision::fp32 ? 0 : elements * size_of(options.precision);
    plan.gradients = options.training ? ParameterArena::bytes_of(layout, options.gradients) : 0;
    plan.moments = options.training ? 2 * ParameterArena::bytes_of(layout, options.moments) / static_cast<size_t>(options.processes) : 0;
    plan.activations = arena_bytes(config, layout, options);
    constexpr int kTypicalParts = 264;
    plan.scratch = scratch_bytes(config, options, options.device == Device::cpu ? 1 : kTypicalParts);
    if (options.device == Device::cuda) {
        // The backward's fp32 sums of dq and its row statistics, where they do not fit a block's activations.
        const int64_t per_row = config.q_size() + 4 * config.num_heads;
        const auto needed = static_cast<size_t>(options.max_rows * per_row) * sizeof(float);
        const size_t lent = options.training ? static_cast<size_t>(options.max_rows * config.ffn_size) * size_of(options.precision) : 0;
        if (needed > lent) plan.scratch = std::max(plan.scratch, needed);
    }
    return plan;
}

Model::Model(const Weights& weights, Backend& backend, const ModelOptions& options)
    : weights_(weights),
      config_(weights.config),
      backend_(backend),
      exec_(backend.exec()),
      options_(placed(options, weights, backend)),
      norm_kind_(config_.architecture == Architecture::gpt2 ? NormKind::layernorm : NormKind::rmsnorm),
      activation_kind_(config_.architecture == Architecture::gpt2 ? ActivationKind::gelu : ActivationKind::swiglu),
      fuses_gelu_(activation_kind_ == ActivationKind::gelu && exec_.ops->fuses_gelu),
      fuses_residual_(exec_.ops->fuses_residual),
      arena_(arena_bytes(config_, weights.layout, options_), backend.memory()),
      gradients_(options.training ? ParameterArena(weights.layout, backend.memory(), options.gradients) : ParameterArena()),
      single_(config_, backend, options.max_rows) {
    size_t bytes = 0;
    act_ = lay_out(config_, activation_options(weights.layout, options_), arena_.at<std::byte>(0), &bytes);
    if (!act_.logits) act_.logits = gradients_.at(lent_to_logits(weights.layout, options_).first);
    backend_.reserve_scratch(scratch_bytes(config_, options_, exec_.parts));
    if (options.training) added_to_ = outside_products(config_, weights.layout);
    if (!config_.has_rope()) return;
    const std::vector<float> table = rope_table(config_.context_length, config_.head_dim, config_.rope_theta);
    rope_table_ = Arena(table.size() * sizeof(float), backend.memory());
    backend.memory().copy(rope_table_.at<void>(0), table.data(), table.size() * sizeof(float));
}

void Model::clear_gradients() {
    for (const auto& [begin, end] : added_to_) {
        auto* const first = static_cast<std::byte*>(gradients_.at(begin).data);
        backend_.memory().zero(first, static_cast<size_t>(static_cast<std::byte*>(gradients_.at(end).data) - first));
    }
    fresh_ = true;
}

Buffer Model::gradient(int index) const { return index < 0 ? Buffer() : gradients_.at(weights_.layout[index].offset); }

void Model::use(const StepInputs& inputs) {
    inputs_ = &inputs;
    rows_ = inputs.rows();
}

void Model::load(const Batch& batch, float gradient_scale) {
    single_.load(batch, gradient_scale);
    use(single_);
    reserve_attention_workspace();
}

// Of the batch at hand. Scratch may move when it grows, so before the first operator of a step.
void Model::reserve_attention_workspace() {
    const BlockActivations& a = act_.blocks.front();
    size_t workspace = attention_workspace_bytes(exec_, attention(a));
    if (options_.training) {
        const AttentionBackward backward = attention_backward(a);
        if (const size_t bytes = attention_workspace_bytes(exec_, backward); bytes > backward.scratch_bytes) workspace = std::max(workspace, bytes);
    }
    backend_.reserve_scratch(workspace);
}

void Model::prepare(std::span<const Batch> batches, float gradient_scale) {
    if (!options_.training) throw std::logic_error("model: made without gradients");
    while (prepared_.size() < batches.size())
        prepared_.push_back(std::make_unique<StepInputs>(config_, backend_, options_.max_rows));
    for (size_t i = 0; i < batches.size(); ++i) prepared_[i]->write(batches[i], gradient_scale);
    num_prepared_ = batches.size();
}

void Model::begin_step() {
    for (size_t i = 0; i < num_prepared_; ++i) {
        prepared_[i]->send();
        use(*prepared_[i]);
        reserve_attention_workspace();
    }
    has_loss_ = true;
}

void Model::passes(GradientSink* sink) {
    clear_gradients();
    has_loss_ = false;
    for (size_t i = 0; i < num_prepared_; ++i) {
        use(*prepared_[i]);
        pass(i + 1 == num_prepared_ ? sink : nullptr);
    }
}

std::vector<int64_t> Model::step_shape() const {
    std::vector<int64_t> shape{reinterpret_cast<int64_t>(exec_.scratch), exec_.deterministic};
    for (size_t i = 0; i < num_prepared_; ++i) {
        const StepInputs& p = *prepared_[i];
        shape.insert(shape.end(), {p.rows(), p.num_sequences(), p.max_seqlen(), p.uniform()});
    }
    return shape;
}

NormForward Model::norm(Buffer x, Buffer out, int weight, int bias, float* mean, float* rstd) const {
    return {.kind = norm_kind_, .rows = rows_, .hidden = config_.hidden_size, .eps = config_.norm_eps, .x = x, .branch = {},
            .sum = {}, .weight = weights_.master(weight), .bias = weights_.master(bias), .out = out, .mean = mean, .rstd = rstd};
}

NormBackward Model::norm_backward(Buffer x, Buffer dout, int weight, int bias, const float* mean, const float* rstd) const {
    return {.kind = norm_kind_, .rows = rows_, .hidden = config_.hidden_size, .x = x, .weight = weights_.master(weight),
            .mean = mean, .rstd = rstd, .dout = dout, .dx = act_.dstream, .dweight = vector_gradient(weight),
            .dbias = vector_gradient(bias)};
}

LinearForward Model::linear(Buffer x, Buffer y, int weight, int bias, int64_t in, int64_t out) const {
    return {.rows = rows_, .in = in, .out = out, .x = x, .weight = weights_[weight], .bias = weights_[bias], .y = y};
}

// dbias of the product whose result was added to the stream that the norm reads: the sums of the stream's gradient behind it, which
// passes through the norm's gradient where that can do it, and else is the product's own.
NormBackward Model::with_bias_of_branch(NormBackward a, int branch_bias) const {
    if (exec_.ops->norms_again) a.dsum = vector_gradient(branch_bias);
    return a;
}

LinearBackward Model::branch_backward(Buffer x, Buffer dx, int weight, int bias, int64_t in) const {
    LinearBackward a = linear_backward(x, act_.dstream, dx, weight, bias, in, config_.hidden_size);
    if (exec_.ops->norms_again) a.dbias = nullptr;
    return a;
}

LinearBackward Model::linear_backward(Buffer x, Buffer dy, Buffer dx, int weight, int bias, int64_t in, int64_t out) const {
    return {.rows = rows_, .in = in, .out = out, .x = x, .weight = weights_[weight], .dy = dy, .dx = dx,
            .dweight = gradient(weight), .dbias = vector_gradient(bias), .overwrite = fresh_};
}

AttentionForward Model::attention(const BlockActivations& a) const {
    const int64_t stride = config_.qkv_size();
    return {.shape = {.batch = inputs_->num_sequences(), .num_heads = config_.num_heads, .num_heads_k = config_.num_heads_k,
                      .head_dim = config_.head_dim, .total_q = rows_, .total_k = rows_, .max_seqlen_q = inputs_->max_seqlen(),
                      .max_seqlen_k = inputs_->max_seqlen(), .cu_seqlens_q = inputs_->cu_seqlens(),
                      .cu_seqlens_k = inputs_->cu_seqlens(), .uniform = inputs_->uniform()},
            .q_stride = stride, .k_stride = stride, .v_stride = stride, .out_stride = config_.q_size(), .q = a.qkv,
            .k = a.qkv.offset(config_.q_size()), .v = a.qkv.offset(config_.q_size() + config_.kv_size()), .out = a.attn,
            .lse = a.lse};
}

AttentionBackward Model::attention_backward(const BlockActivations& a) const {
    return {.forward = attention(a), .dout_stride = config_.q_size(), .dqkv_stride = config_.qkv_size(),
            .dout = act_.dattn, .dq = a.dqkv, .dk = a.dqkv.offset(config_.q_size()),
            .dv = a.dqkv.offset(config_.q_size() + config_.kv_size()), .scratch = a.dact.data,
            .scratch_bytes = static_cast<size_t>(rows_ * config_.ffn_size) * size_of(a.dact.precision)};
}

Rope Model::rope(Buffer qkv, bool inverse) const {
    return {.rows = rows_, .heads = config_.num_heads + config_.num_heads_k, .head_dim = config_.head_dim,
            .row_stride = config_.qkv_size(), .x = qkv, .positions = inputs_->positions(), .cos = rope_table_.at<float>(0),
            .sin = rope_table_.at<float>(rope_table_.size_bytes() / 2), .inverse = inverse};
}

// y gets what a branch gives, or, where products add the stream themselves, the stream behind the branch.
LinearForward Model::branch(Buffer x, int weight, int bias, int64_t in, Buffer stream, Buffer next_stream) const {
    LinearForward a = linear(x, fuses_residual_ ? next_stream : act_.branch, weight, bias, in, config_.hidden_size);
    if (fuses_residual_) a.residual = stream;
    return a;
}

// The norm of the stream behind a branch; it adds the two where products do not.
NormForward Model::norm_behind(Buffer stream, Buffer next_stream, Buffer out, int weight, int bias, float* mean, float* rstd) const {
    NormForward a = norm(fuses_residual_ ? next_stream : stream, out, weight, bias, mean, rstd);
    if (fuses_residual_) return a;
    a.branch = act_.branch;
    a.sum = next_stream;
    return a;
}

// `again`: the backward wants the block's activations back. The stream x is still there, and neither the branch of the
// block before nor this block's own is needed.
void Model::forward_block(int64_t layer, bool again) {
    const BlockActivations& a = act_.blocks[static_cast<size_t>(layer)];
    const BlockParameters& p = weights_.layout.block(layer);
    const int64_t hidden = config_.hidden_size;

    if (layer > 0 && !again) {
        const Buffer before = act_.blocks[static_cast<size_t>(layer - 1)].mid;
        run(exec_, norm_behind(before, a.x, a.norm1, p.norm1_weight, p.norm1_bias, a.mean1, a.rstd1));
    } else {
        run(exec_, norm(a.x, a.norm1, p.norm1_weight, p.norm1_bias, a.mean1, a.rstd1));
    }
    run(exec_, linear(a.norm1, a.qkv, p.qkv_weight, p.qkv_bias, hidden, config_.qkv_size()));
    if (config_.has_rope()) run(exec_, rope(a.qkv, false));
    run(exec_, attention(a));
    run(exec_, branch(a.attn, p.proj_weight, p.proj_bias, config_.q_size(), a.x, a.mid));

    run(exec_, norm_behind(a.x, a.mid, a.norm2, p.norm2_weight, p.norm2_bias, a.mean2, a.rstd2));
    const int64_t up = activation_kind_ == ActivationKind::swiglu ? 2 * config_.ffn_size : config_.ffn_size;
    if (fuses_gelu_) {
        LinearForward both = linear(a.norm2, a.act, p.up_weight, p.up_bias, hidden, up);
        both.gelu_input = a.up;
        run(exec_, both);
    } else {
        run(exec_, linear(a.norm2, a.up, p.up_weight, p.up_bias, hidden, up));
        run(exec_, ActivationForward{.kind = activation_kind_, .rows = rows_, .ffn = config_.ffn_size, .x = a.up, .y = a.act});
    }
    if (again) return;
    const bool last = layer + 1 == config_.num_layers;
    const Buffer next = last ? act_.final_x : act_.blocks[static_cast<size_t>(layer + 1)].x;
    run(exec_, branch(a.act, p.down_weight, p.down_bias, config_.ffn_size, a.mid, next));
}

// Embedding to final norm.
void Model::forward_stream() {
    const ParameterLayout& layout = weights_.layout;
    run(exec_, EmbeddingForward{.rows = rows_, .hidden = config_.hidden_size, .tokens = inputs_->tokens(),
                                .positions = inputs_->positions(), .table = weights_[layout.embedding()],
                                .position_table = weights_[layout.positions()], .out = act_.blocks.front().x});
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) forward_block(layer, false);
    run(exec_, norm_behind(act_.blocks.back().mid, act_.final_x, act_.final_norm, layout.final_norm_weight(),
                           layout.final_norm_bias(), act_.final_mean, act_.final_rstd));
}

void Model::recompute_norms(const BlockActivations& a, const BlockParameters& p) {
    run(exec_, norm(a.x, a.norm1, p.norm1_weight, p.norm1_bias, a.mean1, a.rstd1));
    run(exec_, norm(a.mid, a.norm2, p.norm2_weight, p.norm2_bias, a.mean2, a.rstd2));
}

// The gradients of a norm and of the product that reads it, from the product's dy to the stream. The product's weight needs the
// norm's output: kept, computed again before, or given again by the norm's own gradient, which must then come between.
void Model::backward_into_norm(LinearBackward product, NormBackward normed, int bias) {
    if (!norms_are_recomputed() || !exec_.ops->norms_again) {
        run(exec_, product);
        return run(exec_, normed);
    }
    LinearBackward weight = product;
    weight.dx = {};
    product.dweight = {};
    product.dbias = nullptr;
    normed.out = product.x;
    normed.bias = weights_.master(bias);
    run(exec_, product);
    run(exec_, normed);
    run(exec_, weight);
}

// Of the packed projection's bias only the queries' part takes a sum over rows. A constant added to all keys changes no softmax: that
// gradient is zero. One added to all values is added to attention's output, each row of weights being one: that gradient is the bias's
// behind attention, back through its product; what earlier passes of the step left there is in those sums too.
void Model::attention_bias_gradients(LinearBackward& product, const BlockParameters& p) {
    const bool plain = exec_.ops->avoids_row_sums && !config_.has_rope() && config_.num_heads == config_.num_heads_k;
    if (!product.dbias || p.proj_bias < 0 || !plain) return;
    product.dbias_columns = config_.q_size();
    run(exec_, BiasBackward{.in = config_.q_size(), .out = config_.hidden_size, .weight = weights_[p.proj_weight],
                            .sums = vector_gradient(p.proj_bias), .dx = vector_gradient(p.qkv_bias) + config_.q_size() + config_.kv_size()});
}

// On entry dstream is the gradient of the stream behind the block, on return of the stream before it.
void Model::backward_block(int64_t layer) {
    const BlockActivations& a = act_.blocks[static_cast<size_t>(layer)];
    const BlockParameters& p = weights_.layout.block(layer);
    const int64_t hidden = config_.hidden_size;
    if (options_.recompute == Recompute::block) forward_block(layer, true);
    if (norms_are_recomputed() && !exec_.ops->norms_again) recompute_norms(a, p);
    if (options_.recompute == Recompute::pointwise)
        run(exec_, ActivationForward{.kind = activation_kind_, .rows = rows_, .ffn = config_.ffn_size, .x = a.up, .y = a.act});

    LinearBackward down = branch_backward(a.act, a.dact, p.down_weight, p.down_bias, config_.ffn_size);
    Buffer dup = a.dact;
    if (fuses_gelu_) {
        down.gelu_input = a.up;
        run(exec_, down);
    } else {
        run(exec_, down);
        // The gradient takes the place of the saved input, which nothing reads after this.
        dup = a.up;
        run(exec_, ActivationBackward{.kind = activation_kind_, .rows = rows_, .ffn = config_.ffn_size, .x = a.up,
                                      .dy = a.dact, .dx = dup});
    }
    const int64_t up = activation_kind_ == ActivationKind::swiglu ? 2 * config_.ffn_size : config_.ffn_size;
    backward_into_norm(linear_backward(a.norm2, dup, act_.dnorm, p.up_weight, p.up_bias, hidden, up),
                       with_bias_of_branch(norm_backward(a.mid, act_.dnorm, p.norm2_weight, p.norm2_bias, a.mean2, a.rstd2), p.proj_bias),
                       p.norm2_bias);

    run(exec_, branch_backward(a.attn, act_.dattn, p.proj_weight, p.proj_bias, config_.q_size()));
    run(exec_, attention_backward(a));
    if (config_.has_rope()) run(exec_, rope(a.dqkv, true));
    LinearBackward qkv = linear_backward(a.norm1, a.dqkv, act_.dnorm, p.qkv_weight, p.qkv_bias, hidden, config_.qkv_size());
    attention_bias_gradients(qkv, p);
    backward_into_norm(qkv,
                       with_bias_of_branch(norm_backward(a.x, act_.dnorm, p.norm1_weight, p.norm1_bias, a.mean1, a.rstd1),
                                           layer > 0 ? weights_.layout.block(layer - 1).down_bias : -1),
                       p.norm1_bias);
}

// From dnorm, the gradient of the final norm's output, down to the embedding.
void Model::backward_stream(GradientSink* sink) {
    const ParameterLayout& layout = weights_.layout;
    backend_.memory().zero(act_.dstream.data, static_cast<size_t>(rows_ * config_.hidden_size) * size_of(act_.dstream.precision));
    run(exec_, with_bias_of_branch(norm_backward(act_.final_x, act_.dnorm, layout.final_norm_weight(), layout.final_norm_bias(),
                                                 act_.final_mean, act_.final_rstd),
                                   layout.block(config_.num_layers - 1).down_bias));
    for (int64_t layer = config_.num_layers - 1; layer >= 0; --layer) {
        backward_block(layer);
        // A block's matrices lie behind one another, before them those of the blocks to come.
        if (sink) sink->ready(layout[layout.block(layer).qkv_weight].offset);
    }
    run(exec_, EmbeddingBackward{.rows = rows_, .hidden = config_.hidden_size, .tokens = inputs_->tokens(),
                                 .positions = inputs_->positions(), .dout = act_.dstream,
                                 .dtable = gradient(layout.embedding()), .dposition_table = gradient(layout.positions()),
                                 .token_groups = inputs_->token_groups(), .position_groups = inputs_->position_groups()});
    if (sink) sink->ready(0);
}

double Model::take_loss() {
    double sum = 0.0;
    if (has_loss_) backend_.memory().copy(&sum, act_.loss_sum, sizeof sum);
    has_loss_ = false;
    return sum;
}

double Model::loss(const Batch& batch) {
    load(batch, 0.0f);
    forward_stream();
    head(false);
    return take_loss();
}

void Model::accumulate(const Batch& batch, float gradient_scale) {
    if (!options_.training) throw std::logic_error("model: made without gradients");
    load(batch, gradient_scale);
    pass(nullptr);
}

void Model::pass(GradientSink* sink) {
    if (!fresh_ && gradients_.precision() != Precision::fp32) throw std::logic_error("model: gradients in bf16 are those of one pass");
    forward_stream();
    head(true);
    backward_stream(sink);
    fresh_ = false;
}

double Model::forward_backward(const Batch& batch, float gradient_scale) {
    accumulate(batch, gradient_scale);
    return take_loss();
}

// The head and its loss, a chunk of rows at a time: the logits of a whole batch never exist. With `gradient_too` leaves the
// gradient of the final norm's output in dnorm.
void Model::head(bool gradient_too) {
    if (!inputs_->has_targets()) throw std::invalid_argument("batch: a loss needs targets");
    const int64_t hidden = config_.hidden_size, vocab = config_.vocab_size;
    const int weight = weights_.layout.head();
    for (int64_t begin = 0; begin < rows_; begin += act_.head_chunk) {
        const int64_t rows = std::min(act_.head_chunk, rows_ - begin);
        const Buffer x = act_.final_norm.offset(begin * hidden);
        run(exec_, LinearForward{.rows = rows, .in = hidden, .out = vocab, .x = x, .weight = weights_[weight], .bias = {},
                                 .y = act_.logits, .y_stride = act_.logits_stride});
        run(exec_, CrossEntropy{.rows = rows, .vocab = vocab, .targets = inputs_->targets() + begin, .logits = act_.logits,
                                .losses = act_.losses + begin, .gradient_scale = gradient_too ? inputs_->gradient_scale() : nullptr,
                                .stride = act_.logits_stride});
        if (gradient_too)
            run(exec_, LinearBackward{.rows = rows, .in = hidden, .out = vocab, .x = x, .weight = weights_[weight],
                                      .dy = act_.logits, .dx = act_.dnorm.offset(begin * hidden),
                                      .dweight = gradient(weight), .dbias = nullptr, .dy_stride = act_.logits_stride,
                                      .overwrite = fresh_ && begin == 0});
    }
    run(exec_, LossSum{.rows = rows_, .losses = act_.losses, .sum = act_.loss_sum, .add = has_loss_});
    has_loss_ = true;
}

void Model::logits(const Batch& batch, std::span<float> out) {
    load(batch, 0.0f);
    const int64_t vocab = config_.vocab_size, hidden = config_.hidden_size;
    if (static_cast<int64_t>(out.size()) != rows_ * vocab)
        throw std::invalid_argument(fmt::format("logits: room for {} numbers, need {}", out.size(), rows_ * vocab));
    forward_stream();
    const Arena rows(out.size_bytes(), backend_.memory());
    run(exec_, LinearForward{.rows = rows_, .in = hidden, .out = vocab, .x = act_.final_norm,
                             .weight = weights_[weights_.layout.head()], .bias = {}, .y = rows.at<float>(0)});
    backend_.memory().copy(out.data(), rows.at<void>(0), out.size_bytes());
}

}  // namespace strobe::gpt
