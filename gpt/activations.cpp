#include "gpt/activations.hpp"

#include <algorithm>
#include <stdexcept>

#include <fmt/format.h>

namespace strobe::gpt {

namespace {

// Logits of this many numbers stay in cache between the three passes over them; fewer rows than the minimum would make the
// head's weight gradient a product too thin to be fast.
constexpr int64_t kLogitsTarget = int64_t{1} << 19;
constexpr int64_t kMinHeadChunk = 256;

}  // namespace

std::string_view to_string(Recompute recompute) {
    switch (recompute) {
        case Recompute::none: return "none";
        case Recompute::pointwise: return "pointwise";
        case Recompute::block: return "block";
    }
    return "?";
}

Recompute recompute_from_string(std::string_view name) {
    for (const Recompute r : {Recompute::none, Recompute::pointwise, Recompute::block})
        if (to_string(r) == name) return r;
    throw std::invalid_argument(fmt::format("recompute '{}' is unknown; choose none, pointwise or block", name));
}

Activations lay_out(const ModelConfig& c, int64_t rows, Recompute recompute, bool with_gradients, std::byte* base,
                    size_t* total_bytes) {
    ArenaPlan plan;
    const auto take = [&](int64_t columns) {
        const size_t offset = plan.reserve(rows * columns);
        return base ? reinterpret_cast<float*>(base + offset) : nullptr;
    };
    const bool keep_pointwise = with_gradients && recompute == Recompute::none;
    const bool keep_products = with_gradients && recompute != Recompute::block;
    const int64_t up_columns = (c.architecture == Architecture::llama ? 2 : 1) * c.ffn_size;

    Activations a;
    BlockActivations b{};
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
        const bool first = layer == 0;
        if (first || with_gradients) b.x = take(c.hidden_size);
        if (first || keep_products) {
            b.mean1 = take(1);
            b.rstd1 = take(1);
            b.mean2 = take(1);
            b.rstd2 = take(1);
            b.qkv = take(c.qkv_size());
            b.lse = take(c.num_heads);
            b.attn = take(c.q_size());
            b.mid = take(c.hidden_size);
            b.up = take(up_columns);
        }
        if (first || keep_pointwise) {
            b.norm1 = take(c.hidden_size);
            b.norm2 = take(c.hidden_size);
            b.act = take(c.ffn_size);
        }
        a.blocks.push_back(b);
    }
    a.branch = take(c.hidden_size);
    a.final_x = with_gradients ? take(c.hidden_size) : b.x.f32();
    a.final_norm = take(c.hidden_size);
    a.final_mean = take(1);
    a.final_rstd = take(1);
    a.losses = take(1);
    a.head_chunk = std::min(rows, std::max(kMinHeadChunk, kLogitsTarget / c.vocab_size));
    const size_t logits = plan.reserve(a.head_chunk * c.vocab_size);
    a.logits = base ? reinterpret_cast<float*>(base + logits) : nullptr;
    if (with_gradients) {
        a.dstream = take(c.hidden_size);
        a.dnorm = take(c.hidden_size);
        a.dact = take(c.ffn_size);
        a.dqkv = take(c.qkv_size());
        a.dattn = take(c.q_size());
    }
    *total_bytes = plan.total_bytes();
    return a;
}

}  // namespace strobe::gpt
