// The forward kernel's producers: what decides the tiles and loads queries, keys and values.
#pragma once

#include "cuda/sm90/forward_config.cuh"

namespace strobe::sm90 {

/// Streams queries and keys; used by one thread.
template <typename Config>
class QueryKeyLoader {
    static constexpr int kBlockN = Config::kBlockN, kCols = Config::kChunkCols;

public:
    __device__ QueryKeyLoader(const ForwardArgs& args, ForwardSmem<Config>& smem) : args_(args), smem_(smem) {}

    __device__ __forceinline__ void load_keys(const ForwardTile& tile, int n) {
        const int slot = ring_slot<Config::kStages>(k_count_);
        smem_.k_empty[slot].wait(ring_phase<Config::kStages>(k_count_) ^ 1);
        smem_.k_full[slot].arrive_expect(sizeof(smem_.k[0]));
        const int batch = args_.params.seqlens.cu_seqlens_k ? 0 : tile.batch;
#pragma unroll
        for (int c = 0; c < Config::kChunks; ++c) {
            tma_load(&smem_.k[slot][c * kBlockN * kCols], &args_.k_map, smem_.k_full[slot], c * kCols,
                     tile.k_row + n * kBlockN, tile.head / args_.heads_per_key_head, batch, CachePolicy::evict_last);
        }
        ++k_count_;
    }

    __device__ __forceinline__ void load_queries(const ForwardTile& tile) {
        const int slot = ring_slot<Config::kQStages>(q_count_);
        const int batch = args_.params.seqlens.cu_seqlens_q ? 0 : tile.batch;
#pragma unroll
        for (int g = 0; g < Config::kConsumers; ++g) {
            Barrier& full = smem_.q_full[g][slot];
            smem_.q_empty[g][slot].wait(ring_phase<Config::kQStages>(q_count_) ^ 1);
            // No box that lies outside the tensor altogether; nothing is stored of rows that do not exist.
            if (tile.row + 64 * g >= tile.rows_q) {
                full.arrive();
                continue;
            }
            full.arrive_expect(sizeof(smem_.q[0][0]));
#pragma unroll
            for (int c = 0; c < Config::kChunks; ++c) {
                tma_load(&smem_.q[slot][g][c * 64 * kCols], &args_.q_map, full, c * kCols,
                         tile.q_row + tile.row + 64 * g, tile.head, batch, CachePolicy::evict_first);
            }
        }
        ++q_count_;
    }

private:
    const ForwardArgs& args_;
    ForwardSmem<Config>& smem_;
    uint32_t q_count_ = 0, k_count_ = 0;
};

/// Streams values; used by one warp.
template <typename Config>
class ValueLoader {
    static constexpr int kBlockN = Config::kBlockN, kCols = Config::kChunkCols;

public:
    __device__ ValueLoader(const ForwardArgs& args, ForwardSmem<Config>& smem) : args_(args), smem_(smem) {}

    __device__ __forceinline__ void load(const ForwardTile& tile, int n) {
        const int slot = ring_slot<Config::kStages>(count_);
        const bool ragged = args_.clean_tails && (n + 1) * kBlockN > tile.seqlen_k;
        smem_.v_empty[slot].wait(ring_phase<Config::kStages>(count_) ^ 1);
        if (leader()) {
            Barrier& arrival = ragged ? smem_.v_tail : smem_.v_full[slot];
            arrival.arrive_expect(sizeof(smem_.v[0]));
            const int batch = args_.params.seqlens.cu_seqlens_k ? 0 : tile.batch;
#pragma unroll
            for (int c = 0; c < Config::kChunks; ++c) {
                tma_load(&smem_.v[slot][c * kBlockN * kCols], &args_.v_map, arrival, c * kCols,
                         tile.k_row + n * kBlockN, tile.head / args_.heads_per_key_head, batch,
                         CachePolicy::evict_last);
            }
        }
        if (ragged) {
            smem_.v_tail.wait(tail_phase_);
            tail_phase_ ^= 1;
            zero_rows_from(smem_.v[slot], tile.seqlen_k - n * kBlockN);
            fence_async_proxy();
            __syncwarp();
            if (leader()) smem_.v_full[slot].arrive();
        }
        ++count_;
    }

    /// Hands each consumer an empty buffer for its output.
    __device__ __forceinline__ void lend_for_output() {
#pragma unroll
        for (int g = 0; g < Config::kConsumers; ++g, ++count_) {
            const int slot = ring_slot<Config::kStages>(count_);
            smem_.v_empty[slot].wait(ring_phase<Config::kStages>(count_) ^ 1);
            if (leader()) smem_.v_full[slot].arrive();
        }
    }

private:
    __device__ static bool leader() { return threadIdx.x % 32 == 0; }

    /// Zeroes the rows of a value block from `row` on: their weights are zero, but zero times NaN is not.
    __device__ static void zero_rows_from(uint16_t* block, int row) {
        constexpr int kVectorsPerRow = Config::kSpan / 16;
        const int lane = threadIdx.x % 32;
        for (int c = 0; c < Config::kChunks; ++c) {
            uint4* chunk = reinterpret_cast<uint4*>(block + c * kBlockN * kCols);
            for (int i = row * kVectorsPerRow + lane; i < kBlockN * kVectorsPerRow; i += 32) {
                chunk[i] = uint4{0, 0, 0, 0};
            }
        }
    }

    const ForwardArgs& args_;
    ForwardSmem<Config>& smem_;
    uint32_t count_ = 0, tail_phase_ = 0;
};

/// One thread decides the tiles and loads queries and keys, ...
template <typename Config>
__device__ void produce_queries_and_keys(const ForwardArgs& args, ForwardSmem<Config>& smem) {
    // The kernel in front may still write what this one reads, or read what it writes. Everybody else waits for a tile.
    if (args.overlaps_upstream) wait_for_upstream_kernels();
    TileSource<Config::kBlockM, Config::kBlockN> source(args.params, args.schedule);
    QueryKeyLoader<Config> loader(args, smem);
    for (uint32_t count = 0;; ++count) {
        const int slot = ring_slot<kTileSlots>(count);
        const ForwardTile& tile = smem.tiles[slot];
        smem.tile_empty[slot].wait(ring_phase<kTileSlots>(count) ^ 1);
        smem.tiles[slot] = source.tile();
        smem.tile_full[slot].arrive();
        if (tile.is_end()) return;
        for (int n = tile.n_end - 1; n >= tile.n_begin; --n) {
            // One block ahead: a counter takes a microsecond to answer.
            if (n == tile.n_begin) source.advance();
            loader.load_keys(tile, n);
            if (n == tile.n_end - 1) loader.load_queries(tile);
        }
        if (!tile.has_keys()) source.advance();
    }
}

/// ... and one warp loads the values.
template <typename Config>
__device__ void produce_values(const ForwardArgs& args, ForwardSmem<Config>& smem) {
    ValueLoader<Config> loader(args, smem);
    for (uint32_t count = 0;; ++count) {
        const int slot = ring_slot<kTileSlots>(count);
        smem.tile_full[slot].wait(ring_phase<kTileSlots>(count));
        const ForwardTile tile = smem.tiles[slot];
        __syncwarp();
        if (threadIdx.x % 32 == 0) smem.tile_empty[slot].arrive();
        if (tile.is_end()) return;
        for (int n = tile.n_end - 1; n >= tile.n_begin; --n) loader.load(tile, n);
        if constexpr (Config::kOutputInValues) {
            if (tile.has_keys()) loader.lend_for_output();
        }
    }
}

}  // namespace strobe::sm90
