// How a call is cut into tasks, and what lies where in its workspace. Pure functions of shapes and options: the same for
// every instruction set, and (but for the number of scratch areas) for every thread count, so that results are too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/params.hpp"

namespace strobe::cpu {

/// Lanes of the widest panel of any instruction set, and of the narrowest: blocks are multiples of the one, arrays have
/// room for the other.
inline constexpr int kMaxPanel = 32;
inline constexpr int kMinPanel = 8;
inline constexpr int kMaxBlockQ = 1024;

/// The most rows of a key head that forward_few_rows.cpp takes, and the keys of its tiles.
inline constexpr int kFewRows = 8;
inline constexpr int64_t kFewRowsTile = 64;

/// With few_rows a task takes block_k keys of a sequence for all its heads. Otherwise a forward task takes block_q rows of one key
/// head: row r is query r / group of query head r % group of the head's group, so that every loaded key serves all heads of the
/// group.
struct ForwardPlan {
    int threads = 1;
    int group = 1;
    int64_t block_q = 0;
    int64_t block_k = 0;
    int64_t blocks = 0;  // of rows, with few_rows of keys, of the longest sequence
    int64_t tasks = 0;   // blocks * batch * num_heads_k, with few_rows blocks * batch
    bool few_rows = false;

    // Shared by all threads, offsets in floats, only with few_rows. rows = num_heads * seqlen_q.
    size_t partial_max = 0;  // [task][row]
    size_t partial_sum = 0;  // [task][row]
    size_t partial_out = 0;  // [task][row][head_dim_v]
    size_t scratch = 0;

    // One thread's scratch, offsets in floats. With few_rows q is [row][head_dim], scores [row][kFewRowsTile].
    size_t q = 0;        // [block_q / panel][head_dim][panel]
    size_t o = 0;        // [block_q / panel][head_dim_v][panel], not yet divided by the row sum
    size_t k = 0;        // [block_k][head_dim]
    size_t v = 0;        // [block_k][head_dim_v] in column blocks
    size_t scores = 0;   // [block_k][panel]
    size_t extra = 0;    // [block_k][panel]: bias, later the dropout factors
    size_t floats_per_thread = 0;

    size_t bytes() const { return (scratch + static_cast<size_t>(threads) * floats_per_thread) * sizeof(float); }
};

ForwardPlan plan_forward(const ForwardParams& params, int num_threads);

/// A backward task takes block_k keys of one key head and runs over the queries of all heads of the group in blocks of
/// block_q. Tasks are started in ascending key order; each block of dQ takes their contributions in that order.
struct BackwardPlan {
    int threads = 1;
    int group = 1;
    int64_t block_q = 0;
    int64_t block_k = 0;
    int64_t blocks_q = 0;  // of the longest sequence
    int64_t blocks_k = 0;
    int64_t padded_dim = 0;
    int64_t padded_dim_v = 0;
    int64_t score_stride = 0;
    int64_t turns_per_head = 0;  // blocks of queries of all sequences, at most: does not grow with an overstated seqlen_q
    bool dq_in_place = false;  // dq is fp32 and takes the sums itself

    // Shared by all threads, offsets in bytes.
    size_t delta = 0;      // (num_heads, total_q) fp32: rowsum(dout * out) - dlse
    size_t neg_lse = 0;    // (num_heads, total_q) fp32: -lse
    size_t turns = 0;      // (num_heads, turns_per_head) int32: key blocks that have been added to this block of dQ
    size_t dq = 0;         // (num_heads, total_q, head_dim) fp32 unless dq_in_place
    size_t scratch = 0;

    // One thread's scratch, offsets in floats.
    size_t k_panels = 0;   // [block_k / panel][head_dim][panel]
    size_t v_panels = 0;   // [block_k / panel][head_dim_v][panel]
    size_t k_rows = 0;     // [block_k][padded_dim]
    size_t dk = 0;         // [block_k][padded_dim]
    size_t dv = 0;         // [block_k][padded_dim_v]
    size_t q_rows = 0;     // [block_q][head_dim]
    size_t dout_rows = 0;  // [block_q][head_dim_v]
    size_t q_down = 0;     // [block_q][padded_dim], with bfloat16 pairs [block_q / 2]
    size_t dout_down = 0;  // [block_q][padded_dim_v], likewise
    size_t dq_tile = 0;    // [block_q][padded_dim]
    size_t p = 0;          // [block_q][score_stride]
    size_t ds = 0;         // [block_q][score_stride]
    size_t ds_rows = 0;    // [block_q][score_stride] bfloat16, where pairs are multiplied
    size_t dbias = 0;      // [block_q][score_stride], only with dbias
    size_t bias_sums = 0;  // [block_q][block_k], only with dbias
    size_t factors = 0;    // [block_q][panel], only with dropout
    size_t floats_per_thread = 0;

    size_t bytes() const { return scratch + static_cast<size_t>(threads) * floats_per_thread * sizeof(float); }
};

BackwardPlan plan_backward(const BackwardParams& params, int num_threads);

}  // namespace strobe::cpu
