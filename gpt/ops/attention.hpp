// Causal attention over packed sequences, by strobe. q, k and v are column ranges of one packed projection, or k and v are
// a cache; nothing is permuted or copied. Sequence b has queries cu_seqlens_q[b] .. and keys cu_seqlens_k[b] ..; with more
// keys than queries the queries are the last ones.
#pragma once

#include "gpt/ops/exec.hpp"

namespace strobe::gpt {

struct AttentionShape {
    int64_t batch;                // sequences
    int64_t num_heads, num_heads_k, head_dim;
    int64_t total_q, total_k;     // rows
    int64_t max_seqlen_q, max_seqlen_k;
    const int32_t* cu_seqlens_q;  // (batch + 1)
    const int32_t* cu_seqlens_k;  // (batch + 1)
    bool uniform = false;         // all sequences have max_seqlen_q = max_seqlen_k rows
};

struct AttentionForward {
    AttentionShape shape;
    int64_t q_stride, k_stride, v_stride, out_stride;  // elements from row to row
    Buffer q;    // (total_q, num_heads, head_dim)
    Buffer k;    // (total_k, num_heads_k, head_dim)
    Buffer v;    // (total_k, num_heads_k, head_dim)
    Buffer out;  // (total_q, num_heads, head_dim)
    float* lse;  // (num_heads, total_q), or null: no backward will follow
};

struct AttentionBackward {
    AttentionForward forward;
    int64_t dout_stride, dqkv_stride;
    Buffer dout;     // (total_q, num_heads, head_dim)
    Buffer dq;       // (total_q, num_heads, head_dim)   dq, dk and dv are columns of one packed gradient
    Buffer dk;       // (total_k, num_heads_k, head_dim)
    Buffer dv;       // (total_k, num_heads_k, head_dim)
    void* scratch = nullptr;   // in the place of Exec::scratch where it is larger than that
    size_t scratch_bytes = 0;
};

/// What the call needs of Exec::scratch. Pointers are not looked at.
size_t attention_workspace_bytes(const Exec& exec, const AttentionForward& attention);
size_t attention_workspace_bytes(const Exec& exec, const AttentionBackward& attention);

/// What a GPU needs for a single token, whose keys it shares out.
inline constexpr int64_t kMostDecodeShares = 64;
inline size_t decode_scratch_bytes(const AttentionShape& s) {
    return static_cast<size_t>(kMostDecodeShares * s.num_heads * (s.head_dim + 2)) * sizeof(float);
}

/// The call by strobe's public interface, on any device.
void strobe_attention_forward(Exec& exec, const AttentionForward& attention);
void strobe_attention_backward(Exec& exec, const AttentionBackward& attention);

/// k and v, columns of a packed projection, go to the rows `positions` of a cache.
struct CacheAppend {
    int64_t rows, columns;  // columns: num_heads_k * head_dim
    int64_t stride;         // elements from row to row of k and v
    const int32_t* positions;  // (rows), in memory that the operator can read
    Buffer k, v;              // (rows, columns) at stride
    Buffer k_cache, v_cache;  // (capacity, columns)
};

}  // namespace strobe::gpt
