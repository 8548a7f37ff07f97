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
    void (*activation_forward)(Exec&, const ActivationForward&);
    void (*activation_backward)(Exec&, const ActivationBackward&);
    void (*rope)(Exec&, const Rope&);
    void (*attention_forward)(Exec&, const AttentionForward&);
    void (*attention_backward)(Exec&, const AttentionBackward&);
    void (*cross_entropy)(Exec&, const CrossEntropy&);
    void (*adamw)(Exec&, const AdamW&);
    void (*squared_norm)(Exec&, const SquaredNorm&);
};

/// The best table for the device; throws std::invalid_argument when there is none.
const Ops& ops_for(Device device);

namespace detail {

template <class Args>
void timed(Exec& e, OpKind kind, double flops, void (*op)(Exec&, const Args&), const Args& args) {
    if (!e.times) return op(e, args);
    const auto start = std::chrono::steady_clock::now();
    op(e, args);
    OpTimes::Entry& entry = (*e.times)[kind];
    entry.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    entry.flops += flops;
    ++entry.calls;
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

inline void run(Exec& e, const EmbeddingForward& a) { detail::timed(e, OpKind::embedding, 0, e.ops->embedding_forward, a); }
inline void run(Exec& e, const EmbeddingBackward& a) { detail::timed(e, OpKind::embedding, 0, e.ops->embedding_backward, a); }
inline void run(Exec& e, const NormForward& a) { detail::timed(e, OpKind::norm, 0, e.ops->norm_forward, a); }
inline void run(Exec& e, const NormBackward& a) { detail::timed(e, OpKind::norm, 0, e.ops->norm_backward, a); }
inline void run(Exec& e, const LinearForward& a) {
    detail::timed(e, OpKind::linear, detail::gemm_flops(a.rows, a.out, a.in), e.ops->linear_forward, a);
}
inline void run(Exec& e, const LinearBackward& a) {
    const double products = a.dx ? 2.0 : 1.0;
    detail::timed(e, OpKind::linear, products * detail::gemm_flops(a.rows, a.out, a.in), e.ops->linear_backward, a);
}
inline void run(Exec& e, const ActivationForward& a) { detail::timed(e, OpKind::activation, 0, e.ops->activation_forward, a); }
inline void run(Exec& e, const ActivationBackward& a) { detail::timed(e, OpKind::activation, 0, e.ops->activation_backward, a); }
inline void run(Exec& e, const Rope& a) { detail::timed(e, OpKind::rope, 0, e.ops->rope, a); }
inline void run(Exec& e, const AttentionForward& a) {
    detail::timed(e, OpKind::attention, detail::attention_flops(a.shape), e.ops->attention_forward, a);
}
inline void run(Exec& e, const AttentionBackward& a) {
    detail::timed(e, OpKind::attention, 2.0 * detail::attention_flops(a.forward.shape), e.ops->attention_backward, a);
}
inline void run(Exec& e, const CrossEntropy& a) { detail::timed(e, OpKind::cross_entropy, 0, e.ops->cross_entropy, a); }
inline void run(Exec& e, const AdamW& a) { detail::timed(e, OpKind::optimizer, 0, e.ops->adamw, a); }
inline void run(Exec& e, const SquaredNorm& a) { detail::timed(e, OpKind::optimizer, 0, e.ops->squared_norm, a); }

}  // namespace strobe::gpt
