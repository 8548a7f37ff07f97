// A case: one attention problem, small enough to print, complete enough to rebuild. Tests, `strobe verify` and `strobe
// bench` draw from the same lists.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/params.hpp"

namespace strobe::verify {

enum class Layout {
    bshd,    // (B, S, H, D), dense
    bhsd,    // (B, H, S, D), dense, handed over as a transposed view
    padded,  // (B, S, H, D) with room behind each head, row and batch
    packed,  // q, k, v and their gradients are views of one (B, S, H + 2 Hk, D)
};

/// Which extents of the additive bias (B, H, Sq, Sk) are not 1.
enum class BiasShape { none, full, heads, shared, keys, queries, scalar };

enum class Alibi { none, per_head, per_batch_and_head };

struct Case {
    DType dtype = DType::f32;
    int batch = 2;
    int num_heads = 2;
    int num_heads_k = 2;
    int64_t seqlen_q = 33;  // with varlen: of the longest sequence
    int64_t seqlen_k = 45;
    int head_dim = 64;
    int head_dim_v = 0;  // 0: head_dim

    int64_t window_left = -1;
    int64_t window_right = -1;
    bool positions = false;
    int64_t q_position = 0;
    int64_t k_position = 0;

    double softmax_scale = 0;  // 0: 1 / sqrt(head_dim)
    double softcap = 0;
    Alibi alibi = Alibi::none;
    BiasShape bias = BiasShape::none;
    bool bias_in_dtype = false;  // else f32
    bool bias_hides = false;     // a part of the bias is -inf, on some rows all of it; of BiasShape::keys, the ends of sequences
    bool bias_least = false;     // ... or the least finite number of `dtype`, as masks of padding are made of
    bool dbias = false;
    double dropout_p = 0;

    bool varlen_q = false;  // sequences of different lengths, among them empty ones, behind one another
    bool varlen_k = false;
    bool seqused_q = false;
    bool seqused_k = false;

    Layout layout = Layout::bshd;
    bool out_f32 = false;
    bool grad_f32 = false;
    bool accumulate = false;
    bool dlse = false;
    bool global_out = false;  // the backward gets out and lse of a longer sequence, of which these keys are a part
    bool deterministic = false;
    bool loud = false;        // scores in the hundreds: the softmax is all but one-hot

    int dim_v() const { return head_dim_v ? head_dim_v : head_dim; }
    DType out_dtype() const { return out_f32 ? DType::f32 : dtype; }
    DType grad_dtype() const { return grad_f32 ? DType::f32 : dtype; }
    DType bias_dtype() const { return bias_in_dtype ? dtype : DType::f32; }

    /// Everything that tells this case from another, e.g. "bf16-d64-b2-h4k2-s33x45-causal-softcap".
    std::string name() const;

    /// False where two options contradict each other (a packed tensor has one sequence length, ...).
    bool consistent() const;

    /// Multiply-adds count two: what a benchmark divides by the time. Counts the visible elements only.
    double forward_flops() const;
    double backward_flops() const { return 2.5 * forward_flops(); }

    /// Rows in memory of each sequence, and how many of them count.
    std::vector<int64_t> lengths_q() const;
    std::vector<int64_t> lengths_k() const;
    std::vector<int64_t> used_q() const;
    std::vector<int64_t> used_k() const;
};

std::string_view dtype_name(DType dtype);

/// The correctness list: over 3,000 cases, each named once.
std::vector<Case> verify_cases();

/// `base` with every option alone and with every pair of options that go together.
std::vector<Case> option_cases(const Case& base);

/// The speed list: dtype x head_dim x mask x sequence length x heads.
std::vector<Case> bench_cases();

/// The same for GPUs, the grid of the FlashAttention papers: bf16, 16k tokens per call, hidden size 2048.
std::vector<Case> device_bench_cases();

/// Comma-separated terms: a case matches when any term matches its name and no term with a leading '!' does. A term is
/// a piece of the name; '*' and '?' stand for any run and any one character.
bool matches(std::string_view name, std::string_view filter);

std::vector<Case> filtered(std::vector<Case> cases, std::string_view filter);

}  // namespace strobe::verify
