// Attention by strobe, on views of the packed projection. strobe has threads of its own; it gets as many as the team has.
#include <algorithm>
#include <array>
#include <span>

#include "gpt/ops/cpu/kernels.hpp"
#include "strobe/strobe.hpp"

namespace strobe::gpt {

namespace {

Tensor rows_of(Buffer data, int64_t rows, int64_t heads, int64_t head_dim, int64_t row_stride) {
    const std::array<int64_t, 3> shape{rows, heads, head_dim};
    const std::array<int64_t, 3> strides{row_stride, head_dim, 1};
    return Tensor(data.data, data.precision == Precision::fp32 ? DType::f32 : DType::bf16, shape, strides);
}

Tensor lse_of(const AttentionForward& a) {
    return a.lse ? Tensor(a.lse, {a.shape.num_heads, a.shape.total_q}) : Tensor();
}

Attention inputs(const AttentionForward& a, int threads) {
    const AttentionShape& s = a.shape;
    Attention call{.q = rows_of(a.q, s.total_q, s.num_heads, s.head_dim, a.q_stride),
                   .k = rows_of(a.k, s.total_k, s.num_heads_k, s.head_dim, a.k_stride),
                   .v = rows_of(a.v, s.total_k, s.num_heads_k, s.head_dim, a.v_stride)};
    call.cu_seqlens_q = Tensor(s.cu_seqlens_q, {s.batch + 1});
    call.cu_seqlens_k = Tensor(s.cu_seqlens_k, {s.batch + 1});
    call.max_seqlen_q = s.max_seqlen_q;
    call.max_seqlen_k = s.max_seqlen_k;
    call.causal = true;
    call.deterministic = true;
    call.num_threads = threads;
    return call;
}

Forward outputs(const AttentionForward& a, Workspace workspace) {
    const AttentionShape& s = a.shape;
    return {.out = rows_of(a.out, s.total_q, s.num_heads, s.head_dim, a.out_stride), .lse = lse_of(a),
            .workspace = workspace};
}

Backward gradients(const AttentionBackward& a, Workspace workspace) {
    const AttentionForward& f = a.forward;
    const AttentionShape& s = f.shape;
    return {.out = rows_of(f.out, s.total_q, s.num_heads, s.head_dim, f.out_stride),
            .lse = lse_of(f),
            .dout = rows_of(a.dout, s.total_q, s.num_heads, s.head_dim, a.dout_stride),
            .dq = rows_of(a.dq, s.total_q, s.num_heads, s.head_dim, a.dqkv_stride),
            .dk = rows_of(a.dk, s.total_k, s.num_heads_k, s.head_dim, a.dqkv_stride),
            .dv = rows_of(a.dv, s.total_k, s.num_heads_k, s.head_dim, a.dqkv_stride),
            .workspace = workspace};
}

}  // namespace

size_t attention_workspace_bytes(const AttentionForward& a, int threads) {
    return plan(inputs(a, threads), outputs(a, {})).workspace_bytes;
}

size_t attention_workspace_bytes(const AttentionBackward& a, int threads) {
    return plan(inputs(a.forward, threads), gradients(a, {})).workspace_bytes;
}

namespace cpu {

void attention_forward(Exec& e, const AttentionForward& a) {
    strobe::forward(inputs(a, e.team->size()), outputs(a, {e.scratch, e.scratch_bytes}));
}

void attention_backward(Exec& e, const AttentionBackward& a) {
    strobe::backward(inputs(a.forward, e.team->size()), gradients(a, {e.scratch, e.scratch_bytes}));
}

}  // namespace cpu

}  // namespace strobe::gpt
