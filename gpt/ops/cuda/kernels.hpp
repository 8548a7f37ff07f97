// The GPU's operators.
#pragma once

#include "gpt/ops/ops.hpp"

namespace strobe::gpt::cuda {

void embedding_forward(Exec&, const EmbeddingForward&);
void embedding_backward(Exec&, const EmbeddingBackward&);
void norm_forward(Exec&, const NormForward&);
void norm_backward(Exec&, const NormBackward&);
void linear_forward(Exec&, const LinearForward&);
void linear_backward(Exec&, const LinearBackward&);
void bias_backward(Exec&, const BiasBackward&);
void activation_forward(Exec&, const ActivationForward&);
void activation_backward(Exec&, const ActivationBackward&);
void rope(Exec&, const Rope&);
void attention_forward(Exec&, const AttentionForward&);
void attention_backward(Exec&, const AttentionBackward&);
void cache_append(Exec&, const CacheAppend&);
void cross_entropy(Exec&, const CrossEntropy&);
void loss_sum(Exec&, const LossSum&);
void adamw(Exec&, const AdamW&);
void squared_norm(Exec&, const SquaredNorm&);

// fp32 attention, plain: a warp per row, no tiles. For checking the rest against the CPU, not for speed.
void plain_attention_forward(Exec&, const AttentionForward&);
void plain_attention_backward(Exec&, const AttentionBackward&);

// Single tokens in bf16: attention over a cache, whose length lies in device memory, and products with one row.
bool decodes(const AttentionForward&);
void decode_attention(Exec&, const AttentionForward&);
bool is_row_product(const LinearForward&);
void row_product(Exec&, const LinearForward&);

// Sums over rows, each in a fixed order: within a part, then over the parts.
void add_column_sums(Exec&, Buffer x, int64_t rows, int64_t columns, int64_t stride, float* sums);
/// Where up to three sums of as many columns go, which lie behind one another in each part; null: not wanted.
struct PartSums {
    static constexpr int kMost = 3;
    float* to[kMost] = {};
};
/// out.to[s][c] += the sum over parts of partial[part * stride + s * columns + c].
void add_parts(Exec&, const float* partial, int64_t parts, int64_t columns, int64_t stride, const PartSums& out);

const Ops& table();

}  // namespace strobe::gpt::cuda
