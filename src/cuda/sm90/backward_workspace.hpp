// Scratch memory of the backward pass: what lies where. The caller owns it and need not clear it.
//
// Rows of q are cut into tiles of block_m rows that never straddle two sequences; the tiles of a head lie behind one another
// ("padded tiles"), so that kernels read and add without any bounds check.
#pragma once

#include <cstdint>

#include "core/params.hpp"
#include "core/variant.hpp"
#include "cuda/sm90/backward_sharing.hpp"

namespace strobe::sm90 {

/// Byte offsets from BackwardParams::workspace.
struct BackwardWorkspace {
    int64_t tiles = 0;             // padded query tiles of one head, over the whole batch
    int64_t stats_offset = 0;      // (num_heads, tiles, 2, block_m) fp32: -lse * log2(e), then -delta
    int64_t dq_offset = 0;         // (num_heads, tiles, block_m * bucket) fp32, in the order of the accumulator registers
    int64_t dq_tiles = 0;          // of block_m * bucket, in all
    int64_t private_tiles = 0;     // whole heads: dq is (CTAs or pairs, private_tiles, block_m * bucket) instead
    int64_t semaphore_offset = 0;  // (num_heads, tiles) int32: key tiles that have added to a dq tile (deterministic mode)
    int64_t counter_offset = 0;    // int32 counters: the next work tile, the next ticket of each row worker
    int64_t progress_offset = 0;   // (2, batch * num_heads_k) int32: BackwardLaunch::ready, ::done
    int64_t sequences_offset = 0;  // (batch) int32: BackwardSchedule::sequences
    int64_t finished_offset = 0;   // int32 counters of shared key tiles
    int64_t parts_offset = 0;      // (shared tiles, parts, 64-key units, dK and dV, bucket / 4, 128 threads, 4) fp32
    int64_t bytes = 0;
};

/// Head dims 64 and 128 have two rows each for few keys. The first, with two buffers for q, may take whole heads; the other one is for
/// what is too long for that, and for a row of many keys too short.
STROBE_HD constexpr bool may_take_whole_heads(const Variant& v) {
    return v.keys == Keys::few ? v.stages == 2 : v.head_dim != 64 && v.head_dim != 128;
}

/// Whole heads: a CTA (or pair) takes all key tiles of a key head, one after the other. It alone adds to the head's dq then: no
/// atomics, no clearing, no conversion behind, the same bits every time. Between two key tiles dq waits in memory, which should not
/// come to more traffic than L2 bears; with one key tile there is no such thing. And heads must go round: one tile each of a few heads,
/// against many queries, is better shared.
inline bool takes_whole_heads(const Variant& v, const BackwardParams& p) {
    constexpr int64_t kMostBytes = 72 << 20;  // measured: 69 MB still gained 10 %, 104 MB lost as much
    const int64_t key_tiles = ceil_div(p.size.seqlen_k, v.block_n);
    if (!may_take_whole_heads(v)) return false;
    const int64_t machine = machine_tiles(v);
    const int64_t heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads_k;
    constexpr int kGain = 3;  // of sharing over whole heads, at least: with two parts they are level (measured)
    if (key_tiles <= 1) return heads * kGain > machine || shared_tiles(v, p).parts < kGain;
    const int64_t group = p.size.num_heads / p.size.num_heads_k;
    const int64_t dq_bytes = machine * group * ceil_div(p.size.seqlen_q, v.block_m) * v.block_m * v.head_dim * 4;
    const int64_t times = key_tiles - 1;  // that a tile of dq waits; half of that, about, under a mask
    const bool stays_near = dq_bytes <= (v.mask == MaskClass::band ? 2 : 1) * kMostBytes / times;
    return stays_near && heads * 8 >= ceil_div(heads, machine) * machine * 7;
}

inline BackwardWorkspace backward_workspace(const Variant& v, const BackwardParams& p) {
    const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 1024) * 1024; };
    BackwardWorkspace w;
    w.tiles = p.seqlens.cu_seqlens_q ? p.size.total_q / v.block_m + p.size.batch
                                     : p.size.batch * ceil_div(p.size.seqlen_q, v.block_m);
    const int64_t all_tiles = w.tiles * p.size.num_heads;
    w.dq_offset = aligned(all_tiles * 2 * v.block_m * 4);
    const bool whole = takes_whole_heads(v, p);
    if (whole && p.size.seqlen_k > v.block_n) {
        const int64_t heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads_k;
        w.private_tiles = p.size.num_heads / p.size.num_heads_k * ceil_div(p.size.seqlen_q, v.block_m);
        w.dq_tiles = w.private_tiles * (heads < machine_tiles(v) ? heads : machine_tiles(v));
    } else if (!whole) {
        w.dq_tiles = all_tiles;
    }
    w.semaphore_offset = w.dq_offset + aligned(w.dq_tiles * v.block_m * v.head_dim * 4);
    w.counter_offset = w.semaphore_offset + (whole ? 0 : aligned(all_tiles * 4));
    w.progress_offset = w.counter_offset + 1024;
    w.sequences_offset = w.progress_offset + aligned(int64_t{2} * 4 * p.size.batch * p.size.num_heads_k);
    w.finished_offset = w.sequences_offset + aligned(int64_t{4} * p.size.batch);
    const SharedTiles shared = whole ? SharedTiles{} : shared_tiles(v, p);
    w.parts_offset = w.finished_offset + aligned(shared.counters(v) * 4);
    w.bytes = w.parts_offset + shared.tiles * shared.parts * SharedTiles::part_bytes(v);
    return w;
}

/// First padded tile of a sequence. Varlen: sum of ceil(rows_i / block_m) over earlier sequences <= q_row / block_m + index.
STROBE_HD int64_t first_padded_tile(const BackwardParams& p, const Sequence& seq, int batch_index, int block_m) {
    return p.seqlens.cu_seqlens_q ? seq.q_row / block_m + batch_index
                                  : batch_index * ceil_div(p.size.seqlen_q, block_m);
}

}  // namespace strobe::sm90
