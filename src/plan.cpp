#include "plan.hpp"

#include <algorithm>
#include <cmath>

#include "tensor.hpp"

namespace strobe {
namespace {

/// (B, S, H, D), or (T, H, D) with batch stride 0.
TensorRef rows_by_heads(const strobe_tensor& t) {
    return {t.data, t.ndim == 4 ? t.strides[0] : 0, stride_from_end(t, 3), stride_from_end(t, 2)};
}

/// (B, H, S), or (H, T) with batch stride 0.
RowRef row_values(const strobe_tensor& t) {
    if (!given(t)) return {};
    return {static_cast<float*>(t.data), t.ndim == 3 ? t.strides[0] : 0, stride_from_end(t, 2)};
}

BiasRef bias_ref(const strobe_tensor& t) {
    if (!given(t)) return {};
    const auto stride = [&](int i) { return t.shape[i] == 1 ? 0 : t.strides[i]; };
    return {t.data, stride(0), stride(1), stride(2), stride(3)};
}

const int32_t* indices(const strobe_tensor& t) { return given(t) ? static_cast<const int32_t*>(t.data) : nullptr; }

void fill_shared(AttentionParams& p, const strobe_attention& a, const strobe_tensor& out, const strobe_tensor& lse) {
    p.size = problem_size(a);
    p.seqlens = {indices(a.cu_seqlens_q), indices(a.cu_seqlens_k), indices(a.seqused_q), indices(a.seqused_k)};
    p.mask = {a.window_left, a.causal ? 0 : a.window_right, a.has_positions != 0, a.q_position, a.k_position};
    if (!p.mask.has_positions) p.mask.q_position = p.mask.k_position = 0;
    p.score.softmax_scale = a.has_softmax_scale ? static_cast<float>(a.softmax_scale)
                                                : static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.size.head_dim)));
    p.score.softcap = static_cast<float>(a.softcap);
    if (given(a.alibi_slopes)) {
        p.score.alibi_slopes = static_cast<const float*>(a.alibi_slopes.data);
        p.score.alibi_batch_stride = a.alibi_slopes.ndim == 2 ? a.alibi_slopes.strides[0] : 0;
    }
    p.score.bias = bias_ref(a.bias);
    p.dropout = make_dropout(a.dropout_p, a.dropout_seed, a.dropout_offset);
    p.dtype = static_cast<DType>(a.q.dtype);
    p.out_dtype = static_cast<DType>(out.dtype);
    p.bias_dtype = given(a.bias) ? static_cast<DType>(a.bias.dtype) : DType::f32;
    p.q = rows_by_heads(a.q);
    p.k = rows_by_heads(a.k);
    p.v = rows_by_heads(a.v);
    p.out = rows_by_heads(out);
    p.lse = row_values(lse);
}

}  // namespace

Dropout make_dropout(double dropout_p, uint64_t seed, uint64_t offset) {
    constexpr double kUnits = 65536.0;
    const double drop_below = std::min(std::nearbyint(dropout_p * kUnits), kUnits - 1);
    return {seed, offset, static_cast<uint32_t>(drop_below), static_cast<float>(kUnits / (kUnits - drop_below))};
}

ProblemSize problem_size(const strobe_attention& a) {
    const bool varlen_q = given(a.cu_seqlens_q), varlen_k = given(a.cu_seqlens_k);
    ProblemSize s;
    s.batch = static_cast<int>(varlen_q ? a.cu_seqlens_q.shape[0] - 1 : a.q.shape[0]);
    s.num_heads = static_cast<int>(extent_from_end(a.q, 2));
    s.num_heads_k = static_cast<int>(extent_from_end(a.k, 2));
    s.head_dim = static_cast<int>(extent_from_end(a.q, 1));
    s.head_dim_v = static_cast<int>(extent_from_end(a.v, 1));
    // No sequence is longer than all of them, whatever the caller allowed for. But a bias and its gradient have the
    // extents he gave.
    const auto longest = [&](int64_t allowed, int64_t rows) { return given(a.bias) ? allowed : std::min(allowed, rows); };
    s.seqlen_q = varlen_q ? longest(a.max_seqlen_q, a.q.shape[0]) : a.q.shape[1];
    s.seqlen_k = varlen_k ? longest(a.max_seqlen_k, a.k.shape[0]) : a.k.shape[1];
    s.total_q = varlen_q ? a.q.shape[0] : s.batch * s.seqlen_q;
    s.total_k = varlen_k ? a.k.shape[0] : s.batch * s.seqlen_k;
    return s;
}

ForwardParams forward_params(const Problem& problem) {
    const strobe_forward& f = problem.forward;
    ForwardParams p;
    fill_shared(p, problem.attention, f.out, f.lse);
    p.workspace = f.workspace;
    return p;
}

BackwardParams backward_params(const Problem& problem) {
    const strobe_backward& b = problem.backward;
    BackwardParams p;
    fill_shared(p, problem.attention, b.out, b.lse);
    p.dout = rows_by_heads(b.dout);
    p.dlse = row_values(b.dlse);
    p.dq = rows_by_heads(b.dq);
    p.dk = rows_by_heads(b.dk);
    p.dv = rows_by_heads(b.dv);
    p.grad_dtype = static_cast<DType>(b.dq.dtype);
    p.dbias_dtype = given(b.dbias) ? static_cast<DType>(b.dbias.dtype) : DType::f32;
    p.dbias = bias_ref(b.dbias);
    p.accumulate = b.accumulate != 0;
    p.deterministic = problem.attention.deterministic != 0;
    p.workspace = b.workspace;
    return p;
}

}  // namespace strobe
