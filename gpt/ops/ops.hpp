// The operator table of a device, and `run`, which calls through it. A device without a table is one that this build or
// machine lacks; adding a device is adding a folder beside cpu/ with one table.
#pragma once

#include "gpt/ops/activation.hpp"
#include "gpt/ops/adamw.hpp"
#include "gpt/ops/attention.hpp"
#include "gpt/ops/cross_entropy.hpp"
#include "gpt/ops/embedding.hpp"
#include "gpt/ops/exec.hpp"
#include "gpt/ops/linear.hpp"
#include "gpt/ops/norm.hpp"
#include "gpt/ops/rope.hpp"

namespace strobe::gpt {

struct Ops {
    void (*embedding_forward)(Exec&, const EmbeddingForward&);
    void (*embedding_backward)(Exec&, const EmbeddingBackward&);
    void (*norm_forward)(Exec&, const NormForward&);
    void (*norm_backward)(Exec&, const NormBackward&);
    void (*linear_forward)(Exec&, const LinearForward&);
    void (*linear_backward)(Exec&, const LinearBackward&);
    void (*bias_backward)(Exec&, const BiasBackward&) = nullptr;
    void (*activation_forward)(Exec&, const ActivationForward&);
    void (*activation_backward)(Exec&, const ActivationBackward&);
    void (*rope)(Exec&, const Rope&);
    void (*attention_forward)(Exec&, const AttentionForward&);
    void (*attention_backward)(Exec&, const AttentionBackward&);
    void (*cache_append)(Exec&, const CacheAppend&);
    void (*cross_entropy)(Exec&, const CrossEntropy&);
    void (*loss_sum)(Exec&, const LossSum&);
    void (*adamw)(Exec&, const AdamW&);
    void (*squared_norm)(Exec&, const SquaredNorm&);
    bool fuses_gelu = false;       // linear operators take gelu_input
    bool fuses_residual = false;   // linear_forward takes residual
    bool norms_again = false;      // norm_backward gives the norm's output and the sums of dx too
    bool avoids_row_sums = false;  // there is bias_backward, and linear_backward sums some columns of dbias alone if asked to
    bool uses_row_groups = false;  // embedding_backward reads the row groups, not the tokens
};

namespace detail {

template <class Args>
void timed(Exec& e, OpKind kind, const Work& work, void (*op)(Exec&, const Args&), const Args& args) {
    if (!e.times) return op(e, args);
    if (e.clock) {
        e.clock->begin();
        op(e, args);
        return e.clock->end(kind, work);
    }
    const auto start = std::chrono::steady_clock::now();
    op(e, args);
    e.times->add(kind, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), work);
}

/// Bytes of so many passes over (rows, columns).
inline double pass_bytes(double passes, int64_t rows, int64_t columns, Buffer of) {
    return passes * static_cast<double>(rows) * static_cast<double>(columns) * static_cast<double>(size_of(of.precision));
}

inline double gemm_flops(int64_t m, int64_t n, int64_t k) {
    return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

/// As if attention were full, like ModelConfig::flops_per_token.
inline double attention_flops(const AttentionShape& s) {
    return 4.0 * static_cast<double>(s.total_q) * static_cast<double>(s.max_seqlen_k) *
           static_cast<double>(s.num_heads * s.head_dim);
}

}  // namespace detail

inline void run(Exec& e, const EmbeddingForward& a) {
    const Work work{.bytes = detail::pass_bytes(a.position_table ? 3 : 2, a.rows, a.hidden, a.out), .part = "forward"};
    detail::timed(e, OpKind::embedding, work, e.ops->embedding_forward, a);
}
inline void run(Exec& e, const EmbeddingBackward& a) {
    const Work work{.bytes = detail::pass_bytes(a.dposition_table ? 2 : 1, a.rows, a.hidden, a.dout), .part = "backward"};
    detail::timed(e, OpKind::embedding, work, e.ops->embedding_backward, a);
}
inline void run(Exec& e, const NormForward& a) {
    const Work work{.bytes = detail::pass_bytes(a.branch ? 4 : 2, a.rows, a.hidden, a.x), .part = "forward"};
    detail::timed(e, OpKind::norm, work, e.ops->norm_forward, a);
}
inline void run(Exec& e, const NormBackward& a) {
    const Work work{.bytes = detail::pass_bytes(a.out ? 5 : 4, a.rows, a.hidden, a.x), .part = "backward"};
    detail::timed(e, OpKind::norm, work, e.ops->norm_backward, a);
}
inline void run(Exec& e, const LinearForward& a) {
    const Work work{.flops = detail::gemm_flops(a.rows, a.out, a.in), .part = "forward", .in = a.in, .out = a.out};
    detail::timed(e, OpKind::linear, work, e.ops->linear_forward, a);
}
inline void run(Exec& e, const LinearBackward& a) {
    const double products = (a.dx ? 1.0 : 0.0) + (a.dweight ? 1.0 : 0.0);
    const Work work{.flops = products * detail::gemm_flops(a.rows, a.out, a.in), .part = "backward", .in = a.in, .out = a.out};
    detail::timed(e, OpKind::linear, work, e.ops->linear_backward, a);
}
inline void run(Exec& e, const BiasBackward& a) {
    detail::timed(e, OpKind::linear, {.flops = detail::gemm_flops(1, a.out, a.in), .part = "bias", .in = a.in, .out = a.out},
                  e.ops->bias_backward, a);
}
inline void run(Exec& e, const ActivationForward& a) {
    const Work work{.bytes = detail::pass_bytes(a.kind == ActivationKind::gelu ? 2 : 3, a.rows, a.ffn, a.x), .part = "forward"};
    detail::timed(e, OpKind::activation, work, e.ops->activation_forward, a);
}
inline void run(Exec& e, const ActivationBackward& a) {
    const Work work{.bytes = detail::pass_bytes(a.kind == ActivationKind::gelu ? 3 : 5, a.rows, a.ffn, a.x), .part = "backward"};
    detail::timed(e, OpKind::activation, work, e.ops->activation_backward, a);
}
inline void run(Exec& e, const Rope& a) {
    const Work work{.bytes = detail::pass_bytes(2, a.rows, a.heads * a.head_dim, a.x)};
    detail::timed(e, OpKind::rope, work, e.ops->rope, a);
}
inline void run(Exec& e, const AttentionForward& a) {
    detail::timed(e, OpKind::attention, {.flops = detail::attention_flops(a.shape), .part = "forward"}, e.ops->attention_forward, a);
}
inline void run(Exec& e, const AttentionBackward& a) {
    detail::timed(e, OpKind::attention, {.flops = 2.0 * detail::attention_flops(a.forward.shape), .part = "backward"},
                  e.ops->attention_backward, a);
}
inline void run(Exec& e, const CacheAppend& a) { detail::timed(e, OpKind::attention, {.part = "append"}, e.ops->cache_append, a); }
inline void run(Exec& e, const CrossEntropy& a) {
    const Work work{.bytes = detail::pass_bytes(a.gradient_scale ? 2 : 1, a.rows, a.vocab, a.logits), .part = "loss"};
    detail::timed(e, OpKind::cross_entropy, work, e.ops->cross_entropy, a);
}
inline void run(Exec& e, const LossSum& a) { detail::timed(e, OpKind::cross_entropy, {.part = "sum"}, e.ops->loss_sum, a); }
inline void run(Exec& e, const AdamW& a) {
    const bool split = a.values.precision != Precision::fp32 || !a.values;  // then what is in `narrow` is read, too
    const double per_number = static_cast<double>((a.values ? 2 : 0) * size_of(a.values.precision) + size_of(a.grads.precision) + 4 * size_of(a.m.precision) +
                                                  (a.narrow ? (split ? 2 : 1) * size_of(a.narrow.precision) : 0));
    detail::timed(e, OpKind::optimizer, {.bytes = per_number * static_cast<double>(a.size), .part = "adamw"}, e.ops->adamw, a);
}
inline void run(Exec& e, const SquaredNorm& a) {
    const Work work{.bytes = static_cast<double>(size_of(a.values.precision)) * static_cast<double>(a.size), .part = "norm"};
    detail::timed(e, OpKind::optimizer, work, e.ops->squared_norm, a);
}

}  // namespace strobe::gpt
