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
            claimed = claim();  // early: the answer takes most of a microsecond
            load_keys(tile);
            load_queries(tile, stage, slot);
        }
    }

private:
    __device__ __forceinline__ int claim() const {
        int next = 0;
        if (lane == 0) next = gridDim.x + atomicAdd(launch.counter, 1);
        return __shfl_sync(0xFFFFFFFFu, next, 0);
    }

    __device__ __forceinline__ void load_keys(const BackwardTile& tile) {
        const Sequence seq = sequence_of(params, tile.batch);
        const RaggedCoordinates at{static_cast<int>(params.size.seqlen_k - seq.seqlen_k), tile.head_k,
                                   static_cast<int>(seq.k_row + seq.seqlen_k), params.seqlens.cu_seqlens_k ? 0 : tile.batch};
        const int row = tile.n_block * C::kBlockN;
        if (lane == 0) {
            smem.k_full.arrive_expect(C::kKeyTileBytes);
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                ragged_load(smem_address(smem.k) + c * C::kKeyChunkBytes, launch.k, smem.k_full, c * 64, row, at);
            }
            smem.v_full.arrive_expect(C::kKeyTileBytes);
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                ragged_load(smem_address(smem.v) + c * C::kKeyChunkBytes, launch.v, smem.v_full, c * 64, row, at);
            }
        }
        __syncwarp();
    }

    /// All query heads of the group at one query tile before the next: CTAs that share a key head move through q, dout and dq
    /// side by side and find each other's traffic in L2.
    __device__ __forceinline__ void load_queries(const BackwardTile& tile, RingPosition& stage, RingPosition& slot_at) {
        const Sequence seq = sequence_of(params, tile.batch);
        const int group = params.size.num_heads / params.size.num_heads_k;
        RaggedCoordinates at{static_cast<int>(params.size.seqlen_q - seq.seqlen_q), 0,
                             static_cast<int>(seq.q_row + seq.seqlen_q), params.seqlens.cu_seqlens_q ? 0 : tile.batch};
        const int first = static_cast<int>(first_padded_tile(params, seq, tile.batch, C::kBlockM));
        const int tiles = static_cast<int>(launch.tiles);
        for (int m = tile.m_begin; m < tile.m_end; ++m) {
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
        const uint32_t q = smem_address(smem.q) + s * C::kQueryTileBytes;
        const uint32_t dout = smem_address(smem.dout) + s * C::kQueryTileBytes;
        if (lane == 0) {
            published = slot;
            q_full.arrive_expect(C::kQueryTileBytes + C::kStatsBytes);
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                ragged_load(q + c * C::kQueryChunkBytes, launch.q, q_full, c * 64, slot.query0, at);
            }
            bulk_load(smem_address(smem.stats) + s * C::kStatsBytes,
                      launch.stats + static_cast<int64_t>(slot.padded) * (2 * C::kBlockM), C::kStatsBytes, q_full);
            dout_full.arrive_expect(C::kQueryTileBytes);
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                ragged_load(dout + c * C::kQueryChunkBytes, launch.dout, dout_full, c * 64, slot.query0, at);
            }
        }
        __syncwarp();
        stage.template advance<C::kStages>();
    }
};

}  // namespace strobe::sm90
