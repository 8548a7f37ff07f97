#include "gpt/activations.hpp"

#include <algorithm>
#include <stdexcept>

#include <fmt/core.h>

namespace strobe::gpt {

namespace {

// On a CPU, logits of this many numbers stay in cache between the three passes over them; fewer rows than the minimum would
// make the head's weight gradient a product too thin to be fast. On a GPU products want many rows, and each chunk adds once to
// the whole gradient of the head.
constexpr int64_t kHostLogits = int64_t{1} << 19;
constexpr int64_t kDeviceLogits = int64_t{1} << 29;
constexpr int64_t kMinHeadChunk = 256;

// Rows of logits start on a vector's border of a GPU whatever the vocabulary.
constexpr int64_t kDeviceStride = 64, kDeviceRows = 128;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// Chunks of nearly equal size.
int64_t head_chunk(int64_t rows, int64_t stride, Device device) {
    const int64_t target = device == Device::cpu ? kHostLogits : kDeviceLogits;
    const int64_t largest = std::min(rows, std::max(kMinHeadChunk, target / stride));
    if (device == Device::cpu) return largest;
    const int64_t chunks = (rows + largest - 1) / largest;
    return std::min(rows, round_up((rows + chunks - 1) / chunks, kDeviceRows));
}

/// The same where there is room for `lent` rows. 0: room for fewer than would do without.
int64_t lent_chunk(int64_t rows, int64_t lent, int64_t usual) {
    if (lent >= rows) return rows;
    const int64_t largest = lent / kDeviceRows * kDeviceRows;
    if (largest < usual) return 0;
    const int64_t chunks = (rows + largest - 1) / largest;
    return std::min(largest, round_up((rows + chunks - 1) / chunks, kDeviceRows));
}

}  // namespace

std::string_view to_string(Recompute recompute) {
    switch (recompute) {
        case Recompute::none: return "none";
        case Recompute::norms: return "norms";
        case Recompute::pointwise: return "pointwise";
        case Recompute::block: return "block";
    }
    return "?";
}

Recompute recompute_from_string(std::string_view name) {
    for (const Recompute r : {Recompute::none, Recompute::norms, Recompute::pointwise, Recompute::block})
        if (to_string(r) == name) return r;
    throw std::invalid_argument(fmt::format("recompute '{}' is unknown; choose none, norms, pointwise or block", name));
}

Activations lay_out(const ModelConfig& c, const ActivationOptions& options, std::byte* base, size_t* total_bytes) {
    const int64_t rows = options.rows;
    const bool with_gradients = options.with_gradients;
    const Recompute recompute = options.recompute;
    ArenaPlan plan;
    const auto take = [&](int64_t columns) {
        const size_t offset = plan.reserve(rows * columns, size_of(options.precision));
        return Buffer(base ? base + offset : nullptr, options.precision);
    };
    const auto take_f32 = [&](int64_t columns) {
        const size_t offset = plan.reserve(rows * columns);
        return base ? reinterpret_cast<float*>(base + offset) : nullptr;
    };
    const bool keep_norms = with_gradients && recompute == Recompute::none;
    // A GPU's backward of a norm gives its output again just before the product's weight gradient reads it.
    const bool shared_norm = !with_gradients || (options.device == Device::cuda && (recompute == Recompute::norms || recompute == Recompute::pointwise));
    const bool keep_act = with_gradients && (recompute == Recompute::none || recompute == Recompute::norms);
    const bool keep_products = with_gradients && recompute != Recompute::block;
    const int64_t up_columns = (c.architecture == Architecture::llama ? 2 : 1) * c.ffn_size;

    Activations a;
    BlockActivations b{};
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
        const bool first = layer == 0;
        if (first || with_gradients) b.x = take(c.hidden_size);
        if (first || keep_products) {
            b.mean1 = take_f32(1);
            b.rstd1 = take_f32(1);
            b.mean2 = take_f32(1);
            b.rstd2 = take_f32(1);
            b.qkv = take(c.qkv_size());
            b.lse = take_f32(c.num_heads);
            b.attn = take(c.q_size());
            b.mid = take(c.hidden_size);
            b.up = take(up_columns);
        }
        if (first || keep_norms) {
            b.norm1 = take(c.hidden_size);
            b.norm2 = shared_norm ? b.norm1 : take(c.hidden_size);
        }
        if (first || keep_act) b.act = take(c.ffn_size);
        b.dact = b.act;
        if (c.qkv_size() <= up_columns)
            b.dqkv = b.up;
        else if (first && with_gradients)
            b.dqkv = take(c.qkv_size());
        a.blocks.push_back(b);
    }
    if (options.device == Device::cpu) a.branch = take(c.hidden_size);
    a.final_x = with_gradients ? take(c.hidden_size) : b.x;
    a.final_norm = take(with_gradients ? std::max(c.hidden_size, c.q_size()) : c.hidden_size);
    a.dnorm = a.dattn = a.final_norm;
    a.final_mean = take_f32(1);
    a.final_rstd = take_f32(1);
    a.losses = take_f32(1);
    const size_t loss_sum = plan.reserve(1, sizeof(double));
    a.loss_sum = base ? reinterpret_cast<double*>(base + loss_sum) : nullptr;
    a.logits_stride = options.device == Device::cpu ? c.vocab_size : round_up(c.vocab_size, kDeviceStride);
    a.head_chunk = head_chunk(rows, a.logits_stride, options.device);
    if (const int64_t lent = lent_chunk(rows, options.lent_logits / a.logits_stride, a.head_chunk); lent > 0) {
        a.head_chunk = lent;
    } else {
        const size_t logits = plan.reserve(a.head_chunk * a.logits_stride, size_of(options.precision));
        a.logits = Buffer(base ? base + logits : nullptr, options.precision);
    }
    if (with_gradients) a.dstream = take(c.hidden_size);
    *total_bytes = plan.total_bytes();
    return a;
}

}  // namespace strobe::gpt
