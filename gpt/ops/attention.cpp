// Attention by strobe, on views of the packed projection. On the CPU strobe has threads of its own; it gets as many as the
// team has.
#include "gpt/ops/attention.hpp"

#include <algorithm>
#include <array>
#include <span>

#include "gpt/ops/attention_device.hpp"

namespace strobe::gpt {

namespace {

/// Tensors of one call: packed rows with borders, or (batch, seqlen) where all sequences are equally long, for which there
/// are faster schedules.
class Views {
public:
    Views(const Exec& exec, const AttentionShape& shape)
        : shape_(shape), device_(attention_device(exec)), dense_(shape.uniform && exec.device == Device::cuda) {}

    Tensor rows(Buffer data, int64_t count, int64_t heads, int64_t row_stride) const {
        const DType type = data.precision == Precision::fp32 ? DType::f32 : DType::bf16;
        if (!dense_) {
            const std::array<int64_t, 3> extents{count, heads, shape_.head_dim}, strides{row_stride, shape_.head_dim, 1};
            return Tensor(data.data, type, extents, strides, device_);
        }
        const int64_t seqlen = count / shape_.batch;
        const std::array<int64_t, 4> extents{shape_.batch, seqlen, heads, shape_.head_dim};
        const std::array<int64_t, 4> strides{seqlen * row_stride, row_stride, shape_.head_dim, 1};
        return Tensor(data.data, type, extents, strides, device_);
    }
    Tensor lse(float* data) const {
        if (!data) return {};
        if (!dense_) return Tensor(data, {shape_.num_heads, shape_.total_q}, device_);
        return Tensor(data, {shape_.batch, shape_.num_heads, shape_.total_q / shape_.batch}, device_);
    }
    void borders(Attention& call) const {
        if (dense_) return;
        call.cu_seqlens_q = Tensor(shape_.cu_seqlens_q, {shape_.batch + 1}, device_);
        call.cu_seqlens_k = Tensor(shape_.cu_seqlens_k, {shape_.batch + 1}, device_);
        call.max_seqlen_q = shape_.max_seqlen_q;
        call.max_seqlen_k = shape_.max_seqlen_k;
    }

private:
    const AttentionShape& shape_;
    strobe::Device device_;
    bool dense_;
};

Attention inputs(const Exec& e, const AttentionForward& a) {
    const AttentionShape& s = a.shape;
    const Views views(e, s);
    Attention call{.q = views.rows(a.q, s.total_q, s.num_heads, a.q_stride),
                   .k = views.rows(a.k, s.total_k, s.num_heads_k, a.k_stride),
                   .v = views.rows(a.v, s.total_k, s.num_heads_k, a.v_stride)};
    views.borders(call);
    call.causal = true;
    call.deterministic = e.deterministic;
    call.num_threads = e.device == Device::cpu ? e.team->size() : 0;
    return call;
}

Forward outputs(const Exec& e, const AttentionForward& a, Workspace workspace) {
    const Views views(e, a.shape);
    return {.out = views.rows(a.out, a.shape.total_q, a.shape.num_heads, a.out_stride), .lse = views.lse(a.lse),
            .workspace = workspace};
}

Backward gradients(const Exec& e, const AttentionBackward& a, Workspace workspace) {
    const AttentionForward& f = a.forward;
    const AttentionShape& s = f.shape;
    const Views views(e, s);
    return {.out = views.rows(f.out, s.total_q, s.num_heads, f.out_stride),
            .lse = views.lse(f.lse),
            .dout = views.rows(a.dout, s.total_q, s.num_heads, a.dout_stride),
            .dq = views.rows(a.dq, s.total_q, s.num_heads, a.dqkv_stride),
            .dk = views.rows(a.dk, s.total_k, s.num_heads_k, a.dqkv_stride),
            .dv = views.rows(a.dv, s.total_k, s.num_heads_k, a.dqkv_stride),
            .workspace = workspace};
}

/// The GPU's kernels of strobe are for 16-bit numbers; fp32 there is this trainer's own plain kernel, which needs no workspace.
bool by_strobe(const Exec& e, const AttentionForward& a) {
    return e.device == Device::cpu || a.q.precision != Precision::fp32;
}

}  // namespace

size_t attention_workspace_bytes(const Exec& e, const AttentionForward& a) {
    const size_t by_library = by_strobe(e, a) ? plan(inputs(e, a), outputs(e, a, {})).workspace_bytes : 0;
    const bool single = e.device == Device::cuda && a.shape.total_q == 1;
    return single ? std::max(by_library, decode_scratch_bytes(a.shape)) : by_library;
}

size_t attention_workspace_bytes(const Exec& e, const AttentionBackward& a) {
    return by_strobe(e, a.forward) ? plan(inputs(e, a.forward), gradients(e, a, {})).workspace_bytes : 0;
}

void strobe_attention_forward(Exec& e, const AttentionForward& a) {
    strobe::forward(inputs(e, a), outputs(e, a, {e.scratch, e.scratch_bytes}), e.stream);
}

void strobe_attention_backward(Exec& e, const AttentionBackward& a) {
    const Workspace workspace = a.scratch_bytes > e.scratch_bytes ? Workspace{a.scratch, a.scratch_bytes} : Workspace{e.scratch, e.scratch_bytes};
    strobe::backward(inputs(e, a.forward), gradients(e, a, workspace), e.stream);
}

}  // namespace strobe::gpt
