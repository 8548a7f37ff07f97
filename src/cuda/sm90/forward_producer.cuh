// The forward kernel's producers: one thread decides the tiles and loads queries and keys, one warp loads values.
#pragma once

#include "cuda/sm90/forward_config.cuh"

namespace strobe::sm90 {

/// One thread decides the tiles and loads queries and keys.
template <typename Config>
__device__ void produce_queries_and_keys(const ForwardArgs& args, ForwardSmem<Config>& smem) {
    constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kCols = Config::kChunkCols;
    const int group_size = args.params.size.num_heads / args.params.size.num_heads_k;
    const bool varlen_q = args.params.seqlens.cu_seqlens_q, varlen_k = args.params.seqlens.cu_seqlens_k;
    TileSource<kBlockM, kBlockN> source(args.params, args.schedule);
    uint32_t q_count = 0, k_count = 0;
    for (uint32_t tile_count = 0;; ++tile_count) {
        const ForwardTile tile = source.next();
        const int slot = ring_slot<kTileSlots>(tile_count);
        smem.tile_empty[slot].wait(ring_phase<kTileSlots>(tile_count) ^ 1);
        smem.tiles[slot] = tile;
        smem.tile_full[slot].arrive();
        if (tile.is_end()) return;
        if (!tile.has_keys()) continue;
        for (int n = tile.n_end - 1; n >= tile.n_begin; --n, ++k_count) {
            const int k = ring_slot<Config::kStages>(k_count);
            smem.k_empty[k].wait(ring_phase<Config::kStages>(k_count) ^ 1);
            smem.k_full[k].arrive_expect(sizeof(smem.k[0]));
#pragma unroll
            for (int c = 0; c < Config::kChunks; ++c) {
                tma_load(&smem.k[k][c * kBlockN * kCols], &args.k_map, smem.k_full[k], c * kCols,
                         tile.k_row + n * kBlockN, tile.head / group_size, varlen_k ? 0 : tile.batch,
                         CachePolicy::evict_last);
            }
            if (n == tile.n_end - 1) {
                const int q = ring_slot<Config::kQStages>(q_count);
                smem.q_empty[q].wait(ring_phase<Config::kQStages>(q_count) ^ 1);
                smem.q_full[q].arrive_expect(sizeof(smem.q[0]));
#pragma unroll
                for (int c = 0; c < Config::kChunks; ++c) {
                    tma_load(&smem.q[q][c * kBlockM * kCols], &args.q_map, smem.q_full[q], c * kCols,
                             tile.q_row + tile.row, tile.head, varlen_q ? 0 : tile.batch, CachePolicy::evict_first);
                }
                ++q_count;
            }
        }
    }
}

/// Zeroes the rows of a value block from `row` on: their weights are zero, but zero times NaN is not.
template <typename Config>
__device__ void zero_rows_from(uint16_t* block, int row) {
    constexpr int kVectorsPerRow = Config::kSpan / 16;
    const int lane = threadIdx.x % 32;
    for (int c = 0; c < Config::kChunks; ++c) {
        uint4* chunk = reinterpret_cast<uint4*>(block + c * Config::kBlockN * Config::kChunkCols);
        for (int i = row * kVectorsPerRow + lane; i < Config::kBlockN * kVectorsPerRow; i += 32) chunk[i] = uint4{0, 0, 0, 0};
    }
}

/// One warp loads the values.
template <typename Config>
__device__ void produce_values(const ForwardArgs& args, ForwardSmem<Config>& smem) {
    constexpr int kBlockN = Config::kBlockN, kCols = Config::kChunkCols;
    const int group_size = args.params.size.num_heads / args.params.size.num_heads_k;
    const bool varlen_k = args.params.seqlens.cu_seqlens_k;
    const bool leader = threadIdx.x % 32 == 0;
    uint32_t v_count = 0, tail_phase = 0;
    for (uint32_t tile_count = 0;; ++tile_count) {
        const int slot = ring_slot<kTileSlots>(tile_count);
        smem.tile_full[slot].wait(ring_phase<kTileSlots>(tile_count));
        const ForwardTile tile = smem.tiles[slot];
        __syncwarp();
        if (leader) smem.tile_empty[slot].arrive();
        if (tile.is_end()) return;
        for (int n = tile.n_end - 1; n >= tile.n_begin; --n, ++v_count) {
            const int v = ring_slot<Config::kStages>(v_count);
            const bool ragged = args.clean_tails && (n + 1) * kBlockN > tile.seqlen_k;
            smem.v_empty[v].wait(ring_phase<Config::kStages>(v_count) ^ 1);
            if (leader) {
                Barrier& arrival = ragged ? smem.v_tail : smem.v_full[v];
                arrival.arrive_expect(sizeof(smem.v[0]));
#pragma unroll
                for (int c = 0; c < Config::kChunks; ++c) {
                    tma_load(&smem.v[v][c * kBlockN * kCols], &args.v_map, arrival, c * kCols,
                             tile.k_row + n * kBlockN, tile.head / group_size, varlen_k ? 0 : tile.batch,
                             CachePolicy::evict_last);
                }
            }
            if (ragged) {
                smem.v_tail.wait(tail_phase);
                tail_phase ^= 1;
                zero_rows_from<Config>(smem.v[v], tile.seqlen_k - n * kBlockN);
                fence_async_proxy();
                __syncwarp();
                if (leader) smem.v_full[v].arrive();
            }
        }
    }
}

}  // namespace strobe::sm90
