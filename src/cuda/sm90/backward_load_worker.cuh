// The load warp: hands out work tiles and keeps the tensor copies going, as far ahead as buffers allow. All lanes run the same
// code, so that addresses stay in uniform registers; one of them issues.
#pragma once

#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

template <Variant V>
struct LoadWorker {
    using C = BackwardConfig<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int lane;

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();
        RingPosition stage, slot;
        int claimed = blockIdx.x;
        for (int t = 0;; ++t) {
            BackwardTile tile;
            while (claimed < launch.schedule.work_tiles && !decode_tile<V>(params, launch.schedule, claimed, tile)) {
                claimed = claim();
            }
            if (claimed >= launch.schedule.work_tiles) tile.batch = -1;
            // Every warp has read the entry that this one replaces: the keys of the tile before last have been released.
            if (lane == 0) smem.tiles.entry[t % TileRing::kEntries] = tile;
            __syncwarp();
            if (t > 0) smem.kv_free.wait(t - 1 & 1);
            if (tile.batch < 0) {
                if (lane == 0) smem.k_full.arrive();
                return;
            }
            load_keys(tile);
            load_queries(tile, stage, slot);
            // Now, and not before: claims in the order in which CTAs run out of work are what balances them, and what keeps
            // them in step (backward_schedule.hpp). The copies in flight hide the microsecond that it takes.
            claimed = claim();
        }
    }

private:
    __device__ __forceinline__ int claim() const {
        int next = 0;
        if (lane == 0) next = gridDim.x + atomicAdd(launch.counter, 1);
        return __shfl_sync(0xFFFFFFFFu, next, 0);
    }

    /// Without queries nothing is loaded: an empty sequence would make boxes that lie outside their tensor altogether, for
    /// which the hardware still looks at the map's base address, and that one need not exist (ragged_tensor_map.hpp).
    __device__ __forceinline__ void load_keys(const BackwardTile& tile) {
        const Sequence seq = sequence_of(params, tile.batch);
        const RaggedCoordinates at{static_cast<int>(params.size.seqlen_k - seq.seqlen_k), tile.head_k,
                                   static_cast<int>(seq.k_row + seq.seqlen_k), params.seqlens.cu_seqlens_k ? 0 : tile.batch};
        const int row = tile.n_block * C::kBlockN;
        if (lane == 0 && tile.m_begin < tile.m_end) {
            load_tile(smem.k, C::kKeyChunkBytes, launch.k, params.size.head_dim, smem.k_full, 0, row, at);
            load_tile(smem.v, C::kKeyChunkBytes, launch.v, params.size.head_dim_v, smem.v_full, 0, row, at);
        } else if (lane == 0) {
            smem.k_full.arrive();
            smem.v_full.arrive();
        }
        __syncwarp();
    }

    /// All query heads of the group at one query tile before the next: CTAs that share a key head move through q, dout and dq
    /// side by side, in the direction that their round goes, and find each other's traffic in L2.
    __device__ __forceinline__ void load_queries(const BackwardTile& tile, RingPosition& stage, RingPosition& slot_at) {
        const Sequence seq = sequence_of(params, tile.batch);
        const int group = params.size.num_heads / params.size.num_heads_k;
        RaggedCoordinates at{static_cast<int>(params.size.seqlen_q - seq.seqlen_q), 0,
                             static_cast<int>(seq.q_row + seq.seqlen_q), params.seqlens.cu_seqlens_q ? 0 : tile.batch};
        const int first = static_cast<int>(first_padded_tile(params, seq, tile.batch, C::kBlockM));
        const int tiles = static_cast<int>(launch.tiles);
        for (int i = 0; i < tile.m_end - tile.m_begin; ++i) {
            const int m = tile.down ? tile.m_end - 1 - i : tile.m_begin + i;
            QuerySlot slot{0, tile.n_block - tile.mask.first_key(m * C::kBlockM) / C::kBlockN, m * C::kBlockM, 0};
#pragma unroll
            for (int w = 0; w < C::kKeyUnits; ++w) {
                slot.masked |= !tile.mask.all_visible(slot.query0, C::kBlockM, tile.n_block * C::kBlockN + w * 64, 64) << w;
            }
            for (int h = 0; h < group; ++h) {
                at.head = tile.head_k * group + h;
                slot.padded = at.head * tiles + first + m;
                load_query_tile(slot, at, stage, smem.slot[slot_at.index]);
                slot_at.template advance<C::kSlots>();
            }
        }
    }

    __device__ __forceinline__ void load_query_tile(const QuerySlot& slot, const RaggedCoordinates& at, RingPosition& stage,
                                                    QuerySlot& published) {
        const int s = stage.index;
        smem.stage_free[s].wait(stage.phase ^ 1);
        Barrier& q_full = smem.q_full[s];
        Barrier& dout_full = smem.dout_full[s];
        if (lane == 0) {
            published = slot;
            load_tile(smem.q[s], C::kQueryChunkBytes, launch.q, params.size.head_dim, q_full, C::kStatsBytes, slot.query0, at);
            bulk_load(smem_address(smem.stats) + s * C::kStatsBytes,
                      launch.stats + static_cast<int64_t>(slot.padded) * (2 * C::kBlockM), C::kStatsBytes, q_full);
            load_tile(smem.dout[s], C::kQueryChunkBytes, launch.dout, params.size.head_dim_v, dout_full, 0, slot.query0, at);
        }
        __syncwarp();
        stage.template advance<C::kStages>();
    }

    /// The chunks of a tile that the tensor has; the others stay as clear_missing_chunks left them.
    __device__ __forceinline__ static void load_tile(const uint8_t* tile, uint32_t chunk_bytes, const CUtensorMap& map, int dim,
                                                     Barrier& full, uint32_t other_bytes, int row, const RaggedCoordinates& at) {
        const int chunks = C::chunks_of(dim);
        full.arrive_expect(static_cast<uint32_t>(chunks) * chunk_bytes + other_bytes);
#pragma unroll
        for (int c = 0; c < C::kChunks; ++c) {
            if (c < chunks) ragged_load(smem_address(tile) + c * chunk_bytes, map, full, c * 64, row, at);
        }
    }
};

}  // namespace strobe::sm90
