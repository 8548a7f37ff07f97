#include "gpt/parameters.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <thread>
#include <utility>

#include <fmt/core.h>

#include "gpt/bf16.hpp"
#include "gpt/random.hpp"

namespace strobe::gpt {

namespace {

constexpr int64_t kAlignElements = kArenaAlignment / sizeof(float);
// Fewer random numbers than this are there before a thread has started.
constexpr int64_t kElementsOfAThread = int64_t{1} << 22;

int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

}  // namespace

int ParameterLayout::add(std::string name, std::vector<int64_t> shape, Init init, bool transposed, bool joined) {
    Parameter p;
    p.name = std::move(name);
    p.shape = std::move(shape);
    p.transposed_in_checkpoint = transposed;
    p.decay = p.shape.size() >= 2;
    p.init = init;
    p.size = std::accumulate(p.shape.begin(), p.shape.end(), int64_t{1}, std::multiplies<>());
    // Of a matrix for now: behind the end of the vectors. A joined parameter lies directly behind the previous one: the
    // two are one matrix to the model.
    int64_t& end = p.decay ? arena_elements_ : vector_elements_;
    p.offset = joined ? end : rounded_up(end, kAlignElements);
    end = p.offset + p.size;
    num_elements_ += p.size;
    parameters_.push_back(std::move(p));
    return static_cast<int>(parameters_.size()) - 1;
}

ParameterLayout::ParameterLayout(const ModelConfig& c, int shards) {
    c.validate();
    const bool gpt2 = c.architecture == Architecture::gpt2;
    const int64_t hidden = c.hidden_size;
    const std::string root = gpt2 ? "transformer." : "model.";

    embedding_ = add(root + (gpt2 ? "wte.weight" : "embed_tokens.weight"), {c.vocab_size, hidden}, Init::normal);
    if (gpt2) positions_ = add(root + "wpe.weight", {c.context_length, hidden}, Init::normal);

    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
        BlockParameters b;
        if (gpt2) {
            const std::string prefix = fmt::format("{}h.{}.", root, layer);
            b.norm1_weight = add(prefix + "ln_1.weight", {hidden}, Init::ones);
            b.norm1_bias = add(prefix + "ln_1.bias", {hidden}, Init::zeros);
            b.qkv_weight = add(prefix + "attn.c_attn.weight", {c.qkv_size(), hidden}, Init::normal, true);
            b.qkv_bias = add(prefix + "attn.c_attn.bias", {c.qkv_size()}, Init::zeros);
            b.proj_weight = add(prefix + "attn.c_proj.weight", {hidden, hidden}, Init::normal_residual, true);
            b.proj_bias = add(prefix + "attn.c_proj.bias", {hidden}, Init::zeros);
            b.norm2_weight = add(prefix + "ln_2.weight", {hidden}, Init::ones);
            b.norm2_bias = add(prefix + "ln_2.bias", {hidden}, Init::zeros);
            b.up_weight = add(prefix + "mlp.c_fc.weight", {c.ffn_size, hidden}, Init::normal, true);
            b.up_bias = add(prefix + "mlp.c_fc.bias", {c.ffn_size}, Init::zeros);
            b.down_weight = add(prefix + "mlp.c_proj.weight", {hidden, c.ffn_size}, Init::normal_residual, true);
            b.down_bias = add(prefix + "mlp.c_proj.bias", {hidden}, Init::zeros);
        } else {
            const std::string prefix = fmt::format("{}layers.{}.", root, layer);
            b.norm1_weight = add(prefix + "input_layernorm.weight", {hidden}, Init::ones);
            b.qkv_weight = add(prefix + "self_attn.q_proj.weight", {c.q_size(), hidden}, Init::normal);
            add(prefix + "self_attn.k_proj.weight", {c.kv_size(), hidden}, Init::normal, false, true);
            add(prefix + "self_attn.v_proj.weight", {c.kv_size(), hidden}, Init::normal, false, true);
            b.proj_weight = add(prefix + "self_attn.o_proj.weight", {hidden, c.q_size()}, Init::normal_residual);
            b.norm2_weight = add(prefix + "post_attention_layernorm.weight", {hidden}, Init::ones);
            b.up_weight = add(prefix + "mlp.gate_proj.weight", {c.ffn_size, hidden}, Init::normal);
            add(prefix + "mlp.up_proj.weight", {c.ffn_size, hidden}, Init::normal, false, true);
            b.down_weight = add(prefix + "mlp.down_proj.weight", {hidden, c.ffn_size}, Init::normal_residual);
        }
        blocks_.push_back(b);
    }

    final_norm_weight_ = add(root + (gpt2 ? "ln_f.weight" : "norm.weight"), {hidden}, Init::ones);
    if (gpt2) final_norm_bias_ = add(root + "ln_f.bias", {hidden}, Init::zeros);
    head_ = c.tied_head ? embedding_ : add("lm_head.weight", {c.vocab_size, hidden}, Init::normal);

    vector_elements_ = rounded_up(vector_elements_, kAlignElements * shards);
    arena_elements_ = vector_elements_ + rounded_up(arena_elements_, kAlignElements * shards);
    for (Parameter& p : parameters_)
        if (p.decay) p.offset += vector_elements_;
}

const Parameter* ParameterLayout::find(std::string_view name) const {
    for (const Parameter& p : parameters_)
        if (p.name == name) return &p;
    return nullptr;
}

void ParameterArena::copy_from(const ParameterArena& other) const {
    Memory& device = memory_->on_host() ? *other.memory_ : *memory_;
    if (precision_ == other.precision_) return device.copy(at(0).data, other.at(0).data, size_bytes());
    device.copy(at(0).data, other.at(0).data, static_cast<size_t>(matrices_begin_) * sizeof(float));
    std::vector<uint16_t> bits(static_cast<size_t>(size_ - matrices_begin_));
    const size_t bytes = bits.size() * sizeof(uint16_t);
    if (precision_ == Precision::fp32) {
        device.copy(bits.data(), other.at(matrices_begin_).data, bytes);
        std::transform(bits.begin(), bits.end(), data() + matrices_begin_, widen_bf16);
    } else {
        std::transform(other.data() + matrices_begin_, other.data() + size_, bits.begin(), round_bf16);
        device.copy(at(matrices_begin_).data, bits.data(), bytes);
    }
}

// Each parameter has a stream of random numbers of its own, so threads change nothing.
void initialize(const ParameterLayout& layout, const ModelConfig& config, uint64_t seed, const ParameterArena& values) {
    const double residual_scale = 1.0 / std::sqrt(2.0 * static_cast<double>(config.num_layers));
    const std::vector<Parameter>& list = layout.list();
    const auto fill = [&](size_t i) {
        const Parameter& p = list[i];
        Random random(seed, i + 1);
        const double scale = config.init_std * (p.init == Init::normal_residual ? residual_scale : 1.0);
        for (float& x : values[p]) {
            switch (p.init) {
                case Init::ones: x = 1.0f; break;
                case Init::zeros: x = 0.0f; break;
                case Init::normal:
                case Init::normal_residual: x = static_cast<float>(scale * random.normal()); break;
            }
        }
    };
    std::atomic<size_t> next = 0;
    const auto work = [&] {
        for (size_t i; (i = next++) < list.size();) fill(i);
    };
    std::vector<std::jthread> threads;
    if (layout.num_elements() > kElementsOfAThread)
        for (unsigned i = 1; i < std::thread::hardware_concurrency(); ++i) threads.emplace_back(work);
    work();
}

}  // namespace strobe::gpt
