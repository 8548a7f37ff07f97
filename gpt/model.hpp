// Forward and backward of the whole model, over packed sequences. Both architectures are one sequence of operators; the
// config chooses among them.
#pragma once

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "gpt/activations.hpp"
#include "gpt/backend.hpp"
#include "gpt/batch.hpp"
#include "gpt/step_inputs.hpp"
#include "gpt/weights.hpp"

namespace strobe::gpt {

struct ModelOptions {
    int64_t max_rows = 0;  // tokens of the largest batch
    Recompute recompute = Recompute::none;
    bool training = true;  // false: no gradients, activations of one block only
    Precision gradients = Precision::fp32;  // of matrices; in bf16 a step is one pass, and loss() and logits() spoil them
    // Of the plan alone: a model takes them from its backend and weights.
    Device device = Device::cpu;
    Precision precision = Precision::fp32;
    Precision moments = Precision::fp32;  // of the optimizer
    Precision masters = Precision::fp32;  // of matrices
    int processes = 1;                    // which share the optimizer's moments
};

/// Bytes by purpose, known before the first allocation.
struct MemoryPlan {
    size_t values = 0, narrow_values = 0, gradients = 0, moments = 0, activations = 0;
    size_t scratch = 0;  // of operators; on a GPU an estimate, for attention's part depends on the kernels that it finds
    size_t total() const { return values + narrow_values + gradients + moments + activations + scratch; }
};
MemoryPlan plan_memory(const ModelConfig& config, const ModelOptions& options);

/// Hears how far a backward is.
class GradientSink {
public:
    virtual ~GradientSink() = default;
    /// The gradients from element `from` of their arena on will not change any more.
    virtual void ready(int64_t from) = 0;
};

class Model {
public:
    Model(const Weights& weights, Backend& backend, const ModelOptions& options);

    /// Sum of the losses (nats) over the batch's targets.
    double loss(const Batch& batch);

    /// The same, and adds gradient_scale * d loss / d parameter to gradients().
    double forward_backward(const Batch& batch, float gradient_scale);

    /// The same without waiting for a device: the loss is added to what take_loss() returns next.
    void accumulate(const Batch& batch, float gradient_scale);
    double take_loss();
    /// Where the sum lies that take_loss() returns.
    double* loss_sum() const { return act_.loss_sum; }

    // The same in two halves, for a step whose second half is always the same work and can be recorded. prepare writes down the
    // step's batches and may do so while the device is busy with the step before; begin_step sends them off; passes asks for
    // operators alone: gradients start from zero and get the sum over the batches, the loss goes to take_loss(). `sink` hears
    // of the last batch's backward.
    void prepare(std::span<const Batch> batches, float gradient_scale);
    void begin_step();
    void passes(GradientSink* sink = nullptr);
    /// Equal for two steps whose passes are the same calls on the same memory.
    std::vector<int64_t> step_shape() const;

    /// (rows, vocab) of every token of the batch, in host memory.
    void logits(const Batch& batch, std::span<float> out);

    const ParameterArena& gradients() const { return gradients_; }
    /// The next pass starts from zero. Those that a product computes are not cleared but overwritten then.
    void clear_gradients();

    const Weights& weights() const { return weights_; }
    Backend& backend() { return backend_; }

private:
    void use(const StepInputs& inputs);
    void load(const Batch& batch, float gradient_scale);
    void reserve_attention_workspace();
    void pass(GradientSink* sink);
    void forward_stream();
    void forward_block(int64_t layer, bool again);
    void head(bool gradient_too);
    void backward_stream(GradientSink* sink);
    void backward_block(int64_t layer);
    void recompute_norms(const BlockActivations& a, const BlockParameters& p);
    bool norms_are_recomputed() const { return options_.recompute == Recompute::norms || options_.recompute == Recompute::pointwise; }
    void backward_into_norm(LinearBackward product, NormBackward normed, int bias);
    void attention_bias_gradients(LinearBackward& product, const BlockParameters& p);
    NormForward norm(Buffer x, Buffer out, int weight, int bias, float* mean, float* rstd) const;
    NormBackward norm_backward(Buffer x, Buffer dout, int weight, int bias, const float* mean, const float* rstd) const;
    LinearForward linear(Buffer x, Buffer y, int weight, int bias, int64_t in, int64_t out) const;
    LinearForward branch(Buffer x, int weight, int bias, int64_t in, Buffer stream, Buffer next_stream) const;
    NormForward norm_behind(Buffer stream, Buffer next_stream, Buffer out, int weight, int bias, float* mean, float* rstd) const;
    NormBackward with_bias_of_branch(NormBackward a, int branch_bias) const;
    LinearBackward branch_backward(Buffer x, Buffer dx, int weight, int bias, int64_t in) const;
    LinearBackward linear_backward(Buffer x, Buffer dy, Buffer dx, int weight, int bias, int64_t in, int64_t out) const;
    AttentionForward attention(const BlockActivations& a) const;
    AttentionBackward attention_backward(const BlockActivations& a) const;
    Rope rope(Buffer qkv, bool inverse) const;
    Buffer gradient(int index) const;
    float* vector_gradient(int index) const { return gradient(index).f32(); }

    const Weights& weights_;
    const ModelConfig& config_;
    Backend& backend_;
    Exec& exec_;
    ModelOptions options_;
    NormKind norm_kind_;
    ActivationKind activation_kind_;
    bool fuses_gelu_, fuses_residual_;
    Arena arena_;
    Activations act_;
    ParameterArena gradients_;
    Arena rope_table_;
    StepInputs single_;    // of a batch that is loaded and used at once
    std::vector<std::unique_ptr<StepInputs>> prepared_;  // of the step to come, one for each of its batches
    size_t num_prepared_ = 0;
    const StepInputs* inputs_ = &single_;  // of the batch at hand
    int64_t rows_ = 0;     // of the batch at hand
    bool has_loss_ = false;
    bool fresh_ = true;    // the next pass overwrites the gradients of products
    std::vector<std::pair<int64_t, int64_t>> added_to_;  // [begin, end) of the gradients that are no product's
};

}  // namespace strobe::gpt
