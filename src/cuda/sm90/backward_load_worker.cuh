// The load warp: hands out work tiles and keeps the tensor copies going, as far ahead as buffers allow. All lanes run
// the same code, so that addresses stay in uniform registers; one of them issues.
#pragma once

#include "cuda/common/counter.cuh"
#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

template <Variant V>
struct LoadWorker {
    using C = BackwardConfig<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int lane;
    uint32_t dout_phase = 0;  // halves only

    __device__ __forceinline__ void run() {
        wait_for_upstream_kernels();
        RingPosition stage, slot;
        // The row workers wait for work tiles; only a CTA that runs may own one.
        int claimed =
            (C::kInnerRows && launch.inner_rows ? claim() : blockIdx.x / C::kCtas) * launch.schedule.claim_tiles;
        for (int t = 0;; ++t) {
            BackwardTile tile;
            if (C::rank() > 0) claimed = told(t);
            while (claimed < launch.schedule.work_tiles && !decode_tile<V>(params, launch.schedule, claimed, tile)) {
                claimed = launch.schedule.whole_heads ? next(claimed) : claim_behind(claimed);
            }
            if (claimed >= launch.schedule.work_tiles) tile.batch = -1;
            if (C::kPair && C::rank() == 0) tell(t, claimed);
            if (C::kInnerRows && launch.inner_rows && tile.batch >= 0) wait_for_statistics(tile);
            // Every warp has read the entry that this one replaces:
            // the keys of the tile before last have been released.
            if (lane == 0) smem.tiles.entry[t % TileRing::kEntries] = tile;
            __syncwarp();
            const bool any = tile.batch >= 0 && tile.m_begin < tile.m_end;
            if (any) load_queries<true>(tile, stage, slot);
            const KeyStage<C::kKeyStages> key_stage(t);
            if (t >= C::kKeyStages) smem.kv_free[key_stage.index].wait(key_stage.phase ^ 1);
            if (tile.batch < 0) {
                if (lane == 0) smem.k_full[key_stage.index].arrive();
                if (slots_are_watched()) publish_end(stage, slot);
                return;
            }
            load_keys(tile, key_stage.index);
            if (any) load_queries<false>(tile, stage, slot);
            // Now, and not before: claims in the order in which CTAs run out of work are what balances them, and what
            // keeps them in step (backward_schedule.hpp). The copies in flight hide the microsecond that it takes.
            if (C::rank() == 0) claimed = next(claimed);
        }
    }

private:
    __device__ __forceinline__ bool slots_are_watched() const {
        return params.deterministic || (C::kOwnStatistics && launch.own_statistics);
    }

    /// With a single key tile all heads cost the same, and there is no kernel in front that would clear the counter.
    __device__ __forceinline__ int next(int claimed) const {
        if (C::kOwnStatistics && launch.own_statistics) return claimed + gridDim.x;
        return next_tile(launch.schedule, claimed, [&] { return claim(); });
    }

    __device__ __forceinline__ int claim() const {
        int next = 0;
        const int given = C::kInnerRows && launch.inner_rows ? 0 : gridDim.x / C::kCtas;
        if (lane == 0) next = given + atomicAdd(launch.counter, 1);
        return __shfl_sync(0xFFFFFFFFu, next, 0);
    }

    /// The next one behind a work tile that does not exist. Those
    /// of other lengths may follow by the thousand: all at once.
    __device__ __forceinline__ int claim_behind(int missing) const {
        const int next = behind_missing<V>(params, launch.schedule, missing);
        if (next == missing + 1) return claim();
        const int given = C::kInnerRows && launch.inner_rows ? 0 : gridDim.x / C::kCtas;
        int before = 0;
        if (lane == 0) before = given + atomicMax(launch.counter, next + 1 - given);
        return __shfl_sync(0xFFFFFFFFu, before, 0) <= next ? next : claim();
    }

    /// Of all query heads of the group, for the whole sequence.
    __device__ __forceinline__ void wait_for_statistics(const BackwardTile& tile) const {
        const int key_head = tile.head;
        if (key_head < launch.first_inner_head || tile.m_begin >= tile.m_end) return;
        const int64_t rows = min(sequence_of(params, tile.batch).seqlen_q, params.size.seqlen_q);
        const int units = static_cast<int>(ceil_div(rows, C::kBlockM)) * C::kQueryUnits;
        const int all = params.size.num_heads / params.size.num_heads_k * units;
        while (cuda::load_acquire(launch.ready + key_head) < all) {
        }
        fence_async_proxy_global();
        __syncwarp();
    }

    /// The first CTA of a pair claims for both, tells the second its t-th tile, and may be two tiles ahead.
    __device__ __forceinline__ void tell(int t, int claimed) const {
        smem.claim_free[t % 2].wait(t / 2 % 2 ^ 1);
        if (lane == 0) {
            C::peer().store(smem.claim[t % 2], claimed);
            C::peer().arrive(smem.claim_full[t % 2]);
        }
        __syncwarp();
    }
    __device__ __forceinline__ int told(int t) const {
        wait_for_peer(smem.claim_full[t % 2], t / 2 % 2);
        const int claimed = *static_cast<volatile int*>(&smem.claim[t % 2]);
        __syncwarp();
        if (lane == 0) C::peer().arrive(smem.claim_free[t % 2]);
        return claimed;
    }

    /// Without queries nothing is loaded: an empty sequence would make boxes that
    /// lie outside their tensor altogether, for which the hardware still looks at
    /// the map's base address, and that one need not exist (ragged_tensor_map.hpp).
    __device__ __forceinline__ void load_keys(const BackwardTile& tile, int s) {
        const Sequence seq = sequence_of(params, tile.batch);
        const RaggedCoordinates at{static_cast<int>(params.size.seqlen_k - seq.seqlen_k), tile.head_k,
                                   static_cast<int>(seq.k_row + seq.seqlen_k),
                                   params.seqlens.cu_seqlens_k ? 0 : tile.batch};
        const int row = C::first_key(tile);
        if (tile.m_begin >= tile.m_end) {
            if (lane == 0) {
                smem.k_full[s].arrive();
                smem.v_full[s].arrive();
            }
        } else if constexpr (C::kPair) {
            load_keys_of_pair(row, static_cast<int>(seq.seqlen_k), at);
        } else if (lane == 0) {
            load_tile(smem.k[s], C::kKeyChunkBytes, launch.k, params.size.head_dim, smem.k_full[s], 0, row, at);
            load_tile(smem.v[s], C::kKeyChunkBytes, launch.v, params.size.head_dim_v, smem.v_full[s], 0, row, at);
        }
        __syncwarp();
    }

    /// This CTA's keys, and of the other's keys the columns for dq.
    /// The second CTA's keys may lie behind the sequence: zeros.
    __device__ __forceinline__ void load_keys_of_pair(int row, int seqlen_k, const RaggedCoordinates& at) {
        const int other_row = row ^ C::kBlockN;
        const int dim = params.size.head_dim;
        const int other_chunks = max(0, min(C::chunks_of(dim) - C::pair_chunk(), C::kPairChunks));
        const uint32_t other_bytes = other_row < seqlen_k ? other_chunks * C::kKeyChunkBytes : 0;
        if (row >= seqlen_k) {
            clear(smem.k[0]);
            clear(smem.v[0]);
        }
        if (other_row >= seqlen_k) clear(smem.k_peer);
        fence_async_proxy();
        __syncwarp();
        if (lane > 0) return;
        if (row < seqlen_k) {
            load_tile(smem.k[0], C::kKeyChunkBytes, launch.k, dim, smem.k_full[0], other_bytes, row, at);
            load_tile(smem.v[0], C::kKeyChunkBytes, launch.v, params.size.head_dim_v, smem.v_full[0], 0, row, at);
        } else {
            smem.k_full[0].arrive_expect(other_bytes);
            smem.v_full[0].arrive();
        }
        for (int c = 0; other_bytes > 0 && c < other_chunks; ++c) {
            ragged_load(smem_address(smem.k_peer) + c * C::kKeyChunkBytes, launch.k, smem.k_full[0],
                        (C::pair_chunk() + c) * 64, other_row, at);
        }
    }

    template <int kBytes>
    __device__ __forceinline__ void clear(uint8_t (&tile)[kBytes]) const {
        for (int i = lane; i < kBytes / 16; i += 32) reinterpret_cast<uint4*>(tile)[i] = make_uint4(0, 0, 0, 0);
    }

    /// All query heads of the group at one query tile before the next: CTAs that share a key head move through q, dout
    /// and dq side by side, in the direction that their round goes, and find each other's traffic in L2. kFirst: the
    /// first tile alone, which need not wait for the keys to leave; otherwise those behind it.
    template <bool kFirst>
    __device__ __forceinline__ void load_queries(const BackwardTile& tile, RingPosition& stage, RingPosition& slot_at) {
        const Sequence seq = sequence_of(params, tile.batch);
        const int group = params.size.num_heads / params.size.num_heads_k;
        RaggedCoordinates at{static_cast<int>(params.size.seqlen_q - seq.seqlen_q), 0,
                             static_cast<int>(seq.q_row + seq.seqlen_q), params.seqlens.cu_seqlens_q ? 0 : tile.batch};
        const int first = static_cast<int>(first_padded_tile(params, seq, tile.batch, C::kBlockM));
        const int tiles = static_cast<int>(launch.tiles);
        for (int i = 0; i < tile.m_end - tile.m_begin; ++i) {
            const int m = tile.down ? tile.m_end - 1 - i : tile.m_begin + i;
            QuerySlot slot{0, query_turn<V>(tile, m, seq.seqlen_q), m * C::kBlockM, 0, tile.batch, 0};
#pragma unroll
            for (int w = 0; w < C::kKeyUnits; ++w) {
                slot.masked |= !tile.mask.all_visible(slot.query0, C::kBlockM, C::first_key(tile) + w * 64, 64) << w;
            }
            for (int h = !kFirst && i == 0; h < group; ++h) {
                at.head = tile.head_k * group + h;
                slot.head = at.head;
                slot.padded = at.head * tiles + first + m;
                load_query_tile(slot, at, stage, slot_at.index);
                slot_at.template advance<C::kSlots>();
                if (kFirst) return;
            }
        }
    }

    __device__ __forceinline__ void load_query_tile(const QuerySlot& slot, const RaggedCoordinates& at,
                                                    RingPosition& stage, int slot_index) {
        const int s = stage.index;
        smem.stage_free[s].wait(stage.phase ^ 1);
        Barrier& q_full = smem.q_full[s];
        if (lane == 0) {
            smem.slot[slot_index] = slot;
            if (slots_are_watched()) smem.slot_full[slot_index].arrive();
            const bool own = C::kOwnStatistics && launch.own_statistics;
            load_tile(smem.q[s], C::kQueryChunkBytes, launch.q, params.size.head_dim, q_full, own ? 0 : C::kStatsBytes,
                      slot.query0, at);
            if (!own) {
                bulk_load(smem_address(smem.stats) + s * C::kStatsBytes,
                          launch.stats + static_cast<int64_t>(slot.padded) * (2 * C::kBlockM), C::kStatsBytes, q_full);
            }
            if constexpr (!C::kDoutHalves) {
                load_tile(smem.dout[s], C::kQueryChunkBytes, launch.dout, params.size.head_dim_v, smem.dout_full[s], 0,
                          slot.query0, at);
            }
        }
        __syncwarp();
        if constexpr (C::kDoutHalves) load_dout_halves(slot.query0, at);
        stage.template advance<C::kStages>();
    }

    __device__ __forceinline__ void load_dout_halves(int row, const RaggedCoordinates& at) {
        constexpr int kHalf = C::kChunks / 2;
        const int chunks = C::chunks_of(params.size.head_dim_v);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            smem.dout_free[half].wait(dout_phase ^ 1);
            if (lane == 0) {
                smem.dout_full[half].arrive_expect(max(0, min(chunks - half * kHalf, kHalf)) * C::kQueryChunkBytes);
#pragma unroll
                for (int c = half * kHalf; c < (half + 1) * kHalf; ++c) {
                    if (c < chunks) {
                        ragged_load(smem_address(smem.dout) + c * C::kQueryChunkBytes, launch.dout,
                                    smem.dout_full[half], c * 64, row, at);
                    }
                }
            }
            __syncwarp();
        }
        dout_phase ^= 1;
    }

    /// The warps that keep the order know the stream of query tiles
    /// by its slots alone, and two of them see every other one.
    __device__ __forceinline__ void publish_end(RingPosition stage, RingPosition slot_at) {
        for (int i = 0; i < 2; ++i) {
            smem.stage_free[stage.index].wait(stage.phase ^ 1);
            if (lane == 0) {
                smem.slot[slot_at.index].padded = -1;
                smem.slot_full[slot_at.index].arrive();
            }
            __syncwarp();
            stage.template advance<C::kStages>();
            slot_at.template advance<C::kSlots>();
        }
    }

    /// The chunks of a tile that the tensor has; the others stay as clear_missing_chunks left them.
    __device__ __forceinline__ static void load_tile(const uint8_t* tile, uint32_t chunk_bytes, const CUtensorMap& map,
                                                     int dim, Barrier& full, uint32_t other_bytes, int row,
                                                     const RaggedCoordinates& at) {
        const int chunks = C::chunks_of(dim);
        full.arrive_expect(static_cast<uint32_t>(chunks) * chunk_bytes + other_bytes);
#pragma unroll
        for (int c = 0; c < C::kChunks; ++c) {
            if (c < chunks) ragged_load(smem_address(tile) + c * chunk_bytes, map, full, c * 64, row, at);
        }
    }
};

}  // namespace strobe::sm90
