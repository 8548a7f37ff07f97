// The forward kernel's unit of work, as the producer hands it to the consumers through shared memory, and where it
// comes from: schedule, sequence lengths and mask are resolved once per tile by one thread.
#pragma once

#include <cstdint>

#include "core/params.hpp"
#include "core/schedule.hpp"
#include "cuda/sm90/ptx.cuh"

namespace strobe::sm90 {

/// A block of query rows of one head and the key blocks it needs, last one first.
struct alignas(16) ForwardTile {
    int batch;  // -1: no more tiles
    int head;
    int row;       // first query row, counted from the sequence's start
    int q_row;     // the sequence's first row in memory, from the batch's start
    int k_row;
    int rows_q;    // query rows in memory
    int seqlen_q;  // query rows that count
    int seqlen_k;
    int right;     // query i sees keys j < i + right ...
    int left;      // ... and j >= i + left
    int n_begin;   // key blocks [n_begin, n_end); equal: no query of the tile sees a key
    int n_end;

    __device__ bool is_end() const { return batch < 0; }
    __device__ bool has_keys() const { return n_end > n_begin; }
    __device__ int num_blocks() const { return n_end - n_begin; }
};

struct ForwardSchedule {
    TileOrder order;
    unsigned* next_tile;  // zeroed counter: workers take tiles as they come free; null: tiles are dealt in turn
    int num_blocks;     // query blocks per sequence (dense)
    int num_pairs;      // batch * heads
    int num_tiles;      // dense; varlen batches end where the sequences do
};

/// Beyond any row or key index, and safe to add to one.
constexpr int kUnbounded = 1 << 30;

template <int kBlockM, int kBlockN>
class TileSource {
public:
    __device__ TileSource(const AttentionParams& params, const ForwardSchedule& schedule)
        : params_(params), schedule_(schedule) {}

    /// Takes the next tile. Tiles of unequal length are balanced
    /// by taking them late: when the one before is nearly done.
    __device__ void advance() {
        if (schedule_.next_tile) wait_for_upstream_kernels();  // one of them zeroes the counter
        index_ = gridDim.x + (schedule_.next_tile ? atomicAdd(schedule_.next_tile, 1u) : index_);
    }

    __device__ ForwardTile tile() {
        const int index = static_cast<int>(index_);
        TileIndex at;
        if (params_.seqlens.cu_seqlens_q) {
            const int32_t* cu = params_.seqlens.cu_seqlens_q;
            const int heads = params_.size.num_heads;
            const auto blocks_of = [&](int b) { return (cu[b + 1] - cu[b] + kBlockM - 1) / kBlockM; };
            const auto tiles_of = [&](int b) { return int64_t{blocks_of(b)} * heads; };
            if (!cursor_.seek(index, params_.size.batch, tiles_of)) return end();
            at = schedule_.order.tile(static_cast<int>(index - cursor_.first), blocks_of(cursor_.batch), heads);
            at.batch = cursor_.batch;
        } else {
            if (index >= schedule_.num_tiles) return end();
            at = schedule_.order.tile(index, schedule_.num_blocks, schedule_.num_pairs);
        }
        return resolve(at);
    }

private:
    __device__ static ForwardTile end() {
        ForwardTile t{};
        t.batch = -1;
        return t;
    }

    __device__ ForwardTile resolve(const TileIndex& at) const {
        const Sequence s = sequence_of(params_, at.batch);
        const BandMask mask = s.mask(params_.mask);
        ForwardTile t;
        t.batch = at.batch;
        t.head = at.head;
        t.row = at.block * kBlockM;
        t.q_row = static_cast<int>(s.q_row);
        t.k_row = static_cast<int>(s.k_row);
        t.rows_q = static_cast<int>(s.rows_q);
        t.seqlen_q = static_cast<int>(s.seqlen_q);
        t.seqlen_k = static_cast<int>(s.seqlen_k);
        t.right = mask.right < 0 ? kUnbounded : clamp(s.diagonal + mask.right + 1);
        t.left = mask.left < 0 ? -kUnbounded : clamp(s.diagonal - mask.left);
        const IndexRange keys = mask.key_range(t.row, t.row + kBlockM);
        t.n_begin = keys.empty() ? 0 : static_cast<int>(keys.begin / kBlockN);
        t.n_end = keys.empty() ? 0 : static_cast<int>((keys.end + kBlockN - 1) / kBlockN);
        return t;
    }

    __device__ static int clamp(int64_t x) {
        return static_cast<int>(x < -kUnbounded ? -kUnbounded : x > kUnbounded ? kUnbounded : x);
    }

    const AttentionParams& params_;
    const ForwardSchedule& schedule_;
    SequenceCursor cursor_;
    uint32_t index_ = blockIdx.x;
};

}  // namespace strobe::sm90
