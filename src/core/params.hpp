// What a kernel is launched with: plain structs of pointers and sizes, grouped by tensor, strides in elements. They are
// made by `plan` from a validated Problem; kernels read nothing else, on every device.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"
#include "core/mask.hpp"
#include "core/philox.hpp"
#include "strobe/dtype.hpp"

namespace strobe {

/// A (batch, seqlen, heads, dim) tensor with unit stride over dim. With cu_seqlens the rows of all sequences lie behind
/// one another and batch_stride is 0.
struct TensorRef {
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t row_stride = 0;
    int64_t head_stride = 0;

    STROBE_HD explicit operator bool() const { return data != nullptr; }
};

/// A (batch, heads, seqlen) fp32 tensor with unit stride over seqlen: lse, dlse, delta. Varlen: (heads, total_q), batch_stride 0.
struct RowRef {
    float* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;

    STROBE_HD explicit operator bool() const { return data != nullptr; }
};

/// The additive bias, or its gradient, viewed as (batch, heads, seqlen_q, seqlen_k): a broadcast axis has stride 0.
struct BiasRef {
    void* data = nullptr;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t row_stride = 0;
    int64_t col_stride = 0;

    STROBE_HD explicit operator bool() const { return data != nullptr; }
};

/// Where sequence b of the batch lies. Null pointers: every sequence has the full seqlen and starts at b * batch_stride.
/// cu_seqlens: (batch + 1) int32 prefix sums of the rows. seqused: (batch) int32, rows that count, from the sequence's start.
struct SeqlenParams {
    const int32_t* cu_seqlens_q = nullptr;
    const int32_t* cu_seqlens_k = nullptr;
    const int32_t* seqused_q = nullptr;
    const int32_t* seqused_k = nullptr;
};

struct MaskParams {
    int64_t window_left = -1;   // -1: unbounded
    int64_t window_right = -1;  // -1: unbounded; causal: 0
    bool has_positions = false; // the caller placed q and k on one axis (ring attention)
    int64_t q_position = 0;     // position of the first query row
    int64_t k_position = 0;     // position of the first key row

    /// False: no element is hidden but by the sequence ends.
    STROBE_HD bool is_band() const { return window_left >= 0 || window_right >= 0; }
};

/// s = softmax_scale * q.k; softcap > 0: s = softcap * tanh(s / softcap); s += bias; s -= slope * |i + diagonal - j|.
struct ScoreParams {
    float softmax_scale = 1.0f;
    float softcap = 0.0f;                 // 0: none
    const float* alibi_slopes = nullptr;  // (heads) or (batch, heads) fp32; null: none
    int64_t alibi_batch_stride = 0;
    BiasRef bias;                         // element type bias_dtype; null: none
};

struct ProblemSize {
    int batch = 0;
    int num_heads = 0;
    int num_heads_k = 0;      // divides num_heads: query head h reads key head h / (num_heads / num_heads_k)
    int head_dim = 0;
    int head_dim_v = 0;
    int64_t seqlen_q = 0;     // varlen: an upper bound on any one sequence (max_seqlen_q)
    int64_t seqlen_k = 0;
    int64_t total_q = 0;      // rows of q in memory: batch * seqlen_q, or cu_seqlens_q[batch]
    int64_t total_k = 0;
};

/// Everything that forward and backward share.
struct AttentionParams {
    ProblemSize size;
    SeqlenParams seqlens;
    MaskParams mask;
    ScoreParams score;
    Dropout dropout;
    DType dtype = DType::f32;       // of q, k, v (and dout)
    DType out_dtype = DType::f32;   // of out: dtype, or f32 for a partial result that will be merged
    DType bias_dtype = DType::f32;
    TensorRef q;                    // (batch, seqlen_q, num_heads, head_dim)
    TensorRef k;                    // (batch, seqlen_k, num_heads_k, head_dim)
    TensorRef v;                    // (batch, seqlen_k, num_heads_k, head_dim_v)
    TensorRef out;                  // (batch, seqlen_q, num_heads, head_dim_v)
    RowRef lse;                     // natural log; -inf and out = 0 on a row that sees no key. Forward: null if not wanted
};

struct ForwardParams : AttentionParams {
    void* workspace = nullptr;
};

struct BackwardParams : AttentionParams {
    TensorRef dout;                 // (batch, seqlen_q, num_heads, head_dim_v)
    RowRef dlse;                    // null: zero
    TensorRef dq, dk, dv;           // shapes of q, k, v
    DType grad_dtype = DType::f32;  // of dq, dk, dv: dtype, or f32
    DType dbias_dtype = DType::f32;
    BiasRef dbias;                  // summed over the broadcast axes; null: not wanted
    bool accumulate = false;        // add to dq, dk, dv (f32 only) instead of overwriting them
    bool deterministic = false;
    void* workspace = nullptr;
};

/// One partial result over a subset of the keys: out (batch, rows, heads, dim) of type `dtype`, lse (batch, heads, rows).
struct PartialResult {
    TensorRef out;
    RowRef lse;
    DType dtype = DType::f32;
};

/// Merging partial results. Varlen: batch = 1, rows = all of them.
struct MergeParams {
    int64_t batch = 0;
    int64_t rows = 0;
    int64_t num_heads = 0;
    int64_t head_dim_v = 0;
    const PartialResult* parts = nullptr;  // host memory
    int num_parts = 0;
    PartialResult result;                  // may be the first part
};

/// The mask that dropout applies, (batch, heads, seqlen_q, seqlen_k) bytes, 1 = kept.
struct DropoutMaskParams {
    Dropout dropout;
    int64_t q_position = 0;
    int64_t k_position = 0;
    int64_t shape[4] = {};
    int64_t strides[4] = {};
    uint8_t* keep = nullptr;

    STROBE_HD uint8_t value(int64_t b, int64_t h, int64_t i, int64_t j) const {
        return !dropout.enabled() || dropout.keep(static_cast<uint32_t>(b * shape[1] + h), static_cast<uint32_t>(q_position + i),
                                                  static_cast<uint32_t>(k_position + j));
    }
};

/// One sequence of the batch: where its rows start, how many count, and its mask.
struct Sequence {
    int64_t q_row = 0;   // first row of q, out, dq ... counted from the batch's start (varlen: from the tensor's start)
    int64_t k_row = 0;
    int64_t rows_q = 0;  // rows in memory; those past seqlen_q get out = 0, lse = -inf, dq = 0
    int64_t rows_k = 0;  // keys in memory; those past seqlen_k are never seen and get dk = dv = 0
    int64_t seqlen_q = 0;
    int64_t seqlen_k = 0;
    int64_t diagonal = 0;

    STROBE_HD BandMask mask(const MaskParams& m) const {
        return {m.window_left, m.window_right, diagonal, seqlen_q, seqlen_k};
    }
};

STROBE_HD Sequence sequence_of(const AttentionParams& p, int batch_index) {
    const SeqlenParams& s = p.seqlens;
    Sequence r;
    r.rows_q = p.size.seqlen_q;
    r.rows_k = p.size.seqlen_k;
    if (s.cu_seqlens_q) {
        r.q_row = s.cu_seqlens_q[batch_index];
        r.rows_q = s.cu_seqlens_q[batch_index + 1] - r.q_row;
    }
    if (s.cu_seqlens_k) {
        r.k_row = s.cu_seqlens_k[batch_index];
        r.rows_k = s.cu_seqlens_k[batch_index + 1] - r.k_row;
    }
    r.seqlen_q = s.seqused_q ? s.seqused_q[batch_index] : r.rows_q;
    r.seqlen_k = s.seqused_k ? s.seqused_k[batch_index] : r.rows_k;
    r.diagonal = p.mask.has_positions ? p.mask.q_position - p.mask.k_position : r.seqlen_k - r.seqlen_q;
    return r;
}

}  // namespace strobe
