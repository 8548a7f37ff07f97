// The dq warpgroup: dq = dS K, and the tensor copies for everyone.
#pragma once

#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

/// One lane's view of the stream of copies: it hands out work tiles, and loads q, dout and row statistics ahead of use.
template <Variant V>
struct Loader {
    using C = BackwardConfig<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;

    __device__ __forceinline__ void start() { smem.loader = {static_cast<int>(blockIdx.x), 0, 0, false, 0, C::kStages - 1, 0, 0, 0}; }

    __device__ __forceinline__ BackwardTile& entry(int tile) { return smem.tiles.entry[tile % TileRing::kEntries]; }

    /// Makes ring entry `tile` known. At most TileRing::kAhead beyond the tile being worked on.
    __device__ __forceinline__ void learn(int tile) {
        LoaderState& state = smem.loader;
        while (state.tiles_known <= tile) {
            BackwardTile found;
            bool done = state.tiles_known > 0 && entry(state.tiles_known - 1).batch < 0;
            while (!done) {
                const int index = state.claimed;
                done = index >= launch.schedule.work_tiles;
                if (done) break;
                state.claimed = gridDim.x + atomicAdd(launch.counter, 1);
                if (decode_tile<V>(params, launch.schedule, index, found)) break;
            }
            if (done) found.batch = -1;
            entry(state.tiles_known++) = found;
        }
    }

    __device__ __forceinline__ void load_keys(int tile_number) {
        learn(tile_number);
        const BackwardTile tile = entry(tile_number);
        if (tile.batch < 0) {
            smem.k_full.arrive();
            return;
        }
        const Sequence seq = sequence_of(params, tile.batch);
        const RaggedCoordinates at{static_cast<int>(params.size.seqlen_k - seq.seqlen_k), tile.head_k,
                                   static_cast<int>(seq.k_row + seq.seqlen_k), params.seqlens.cu_seqlens_k ? 0 : tile.batch};
        const int row = tile.n_block * C::kBlockN;
        smem.k_full.arrive_expect(C::kKeyTileBytes);
        for (int c = 0; c < C::kChunks; ++c) {
            ragged_load(smem_address(smem.k) + c * C::kKeyChunkBytes, launch.k, smem.k_full, c * 64, row, at);
        }
        smem.v_full.arrive_expect(C::kKeyTileBytes);
        for (int c = 0; c < C::kChunks; ++c) {
            ragged_load(smem_address(smem.v) + c * C::kKeyChunkBytes, launch.v, smem.v_full, c * 64, row, at);
        }
    }

    /// Issues query loads into the free buffers, until the stream leaves the tiles that may be known by now.
    __device__ __forceinline__ void load_queries(int current_tile) {
        const int group = params.size.num_heads / params.size.num_heads_k;
        LoaderState& state = smem.loader;
        while (state.loads < state.limit) {
            if (!state.tile_open) {
                if (state.load_tile > current_tile + TileRing::kAhead) return;
                learn(state.load_tile);
                state.head = 0;
                state.m = entry(state.load_tile).m_begin;
                state.tile_open = true;
            }
            const BackwardTile& tile = entry(state.load_tile);
            if (tile.batch < 0) return;
            if (state.head == group || tile.m_begin == tile.m_end) {
                ++state.load_tile;
                state.tile_open = false;
                continue;
            }
            load_query_tile(tile, tile.head_k * group + state.head, state.m, state.stage);
            state.stage = state.stage + 1 == C::kStages ? 0 : state.stage + 1;
            ++state.loads;
            if (++state.m == tile.m_end) {
                state.m = tile.m_begin;
                ++state.head;
            }
        }
    }

private:
    /// How many key tiles add to query tile m before this one: those left of it that the query tile sees at all.
    __device__ __forceinline__ int turn_of(const BackwardTile& tile, int m) const {
        if constexpr (V.mask == MaskClass::full) return tile.n_block;
        if (!params.deterministic) return 0;
        const BandMask mask = sequence_of(params, tile.batch).mask(params.mask);
        const IndexRange keys = mask.key_range(static_cast<int64_t>(m) * C::kBlockM, static_cast<int64_t>(m + 1) * C::kBlockM);
        const int64_t first = keys.begin / C::kBlockN;
        return static_cast<int>(tile.n_block - first);
    }

    __device__ __forceinline__ void load_query_tile(const BackwardTile& tile, int query_head, int m, int s) {
        const Sequence seq = sequence_of(params, tile.batch);
        const RaggedCoordinates at{static_cast<int>(params.size.seqlen_q - seq.seqlen_q), query_head,
                                   static_cast<int>(seq.q_row + seq.seqlen_q), params.seqlens.cu_seqlens_q ? 0 : tile.batch};
        const int64_t padded = query_head * launch.tiles + first_padded_tile(params, seq, tile.batch, C::kBlockM) + m;
        const int query0 = m * C::kBlockM;
        int masked = 0;
        for (int w = 0; w < C::kKeyWarpgroups; ++w) {
            masked |= !tile.mask.all_visible(query0, C::kBlockM, tile.n_block * C::kBlockN + w * 64, 64) << w;
        }
        smem.slot[s] = {static_cast<int>(padded), turn_of(tile, m), query0, masked};
        Barrier& q_full = smem.q_full[s];
        q_full.arrive_expect(C::kQueryTileBytes + C::kStatsBytes);
        for (int c = 0; c < C::kChunks; ++c) {
            ragged_load(smem_address(smem.q[s]) + c * C::kQueryChunkBytes, launch.q, q_full, c * 64, query0, at);
        }
        bulk_load(smem_address(smem.stats[s]), launch.stats + padded * 2 * C::kBlockM, C::kStatsBytes, q_full);
        Barrier& dout_full = smem.dout_full[s];
        dout_full.arrive_expect(C::kQueryTileBytes);
        for (int c = 0; c < C::kChunks; ++c) {
            ragged_load(smem_address(smem.dout[s]) + c * C::kQueryChunkBytes, launch.dout, dout_full, c * 64, query0, at);
        }
    }
};

/// Order in which key tiles add to one dq tile when the result must not depend on timing: key tile 0 first.
struct DqOrder {
    int32_t* semaphore;

    __device__ __forceinline__ void wait_for_turn(int turn, int thread) const {
        if (thread == 0) {
            int seen;
            do {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(semaphore) : "memory");
            } while (seen != turn);
        }
    }
    __device__ __forceinline__ void pass_on(int thread) const {
        if (thread == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(semaphore) : "memory");
    }
};

template <Variant V>
struct DqWorker {
    using C = BackwardConfig<V>;
    static constexpr int kBarrier = 1;  // named barrier of the 128 threads

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int thread;  // in the warpgroup

    __device__ __forceinline__ void run() {
        Loader<V> loader{smem, params, launch};
        wait_for_upstream_kernels();
        if (thread == 0) {
            loader.start();
            loader.load_keys(0);
            loader.load_queries(0);
        }
        __syncwarp();

        RingPosition ds_stage;
        int stage = 0;
        for (int t = 0;; ++t) {
            smem.k_full.wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            if (thread == 0) loader.load_queries(t);
            __syncwarp();
            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                smem.ds_full[ds_stage.index].wait(ds_stage.phase);
                // A key warpgroup stores dS of this iteration only after its dV and dK of the one before: that stage is free.
                if (thread == 0) {
                    ++smem.loader.limit;
                    loader.load_queries(t);
                }
                __syncwarp();
                multiply_and_add(ds_stage.index, smem.slot[stage]);
                ds_stage.template advance<C::kDsStages>();
                stage = stage + 1 == C::kStages ? 0 : stage + 1;
            }
            if (thread % 32 == 0) smem.kv_free.arrive();
            if (thread == 0) {
                smem.kv_free.wait(t & 1);
                loader.load_keys(t + 1);
            }
            __syncwarp();
        }
    }

private:
    __device__ __forceinline__ void multiply_and_add(int ds_index, const QuerySlot& slot) {
        const int64_t padded = slot.padded;
        const DqOrder order{launch.semaphore + padded};
        if (params.deterministic) {
            order.wait_for_turn(slot.turn, thread);
            named_barrier_sync(kBarrier, 128);
        }
        const uint32_t ds = smem_address(smem.ds) + ds_index * C::kQueryUnits * C::kDsUnitBytes;
        float* const out = launch.dq + padded * (C::kBlockM * C::kDim) + thread * 4;
#pragma unroll
        for (int u = 0; u < C::kQueryUnits; ++u) {
#pragma unroll
            for (int c = 0; c < C::kChunks; ++c) {
                const bool last = u + 1 == C::kQueryUnits && c + 1 == C::kChunks;
                float* const piece = out + (u * (C::kDim / 8) + c * 8) * 512;
                if (C::kDim - c * 64 >= 64) {
                    multiply_piece<64>(ds + u * C::kDsUnitBytes, c, last ? ds_index : -1, piece);
                } else {
                    multiply_piece<32>(ds + u * C::kDsUnitBytes, c, last ? ds_index : -1, piece);
                }
            }
        }
        if (params.deterministic) {
            __threadfence();
            named_barrier_sync(kBarrier, 128);
            order.pass_on(thread);
        }
    }

    /// 64 queries by N columns of dq, from column 64 * chunk; then frees dS buffer `ds_index` unless negative.
    template <int N>
    __device__ __forceinline__ void multiply_piece(uint32_t ds_unit, int chunk, int ds_index, float* out) {
        float acc[N / 2];
        const uint64_t a = mn_major(ds_unit, C::kDsUnitBytes);
        const uint64_t b = mn_major(smem_address(smem.k) + chunk * C::kKeyChunkBytes, C::kKeyChunkBytes);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < C::kBlockN / 16; ++kk) {
            const int step = kk * (16 * C::kRowBytes >> 4);
            Wgmma<N>::template ss<V.dtype, 1, 1>(acc, a + step, b + step, kk != 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        fence_registers(acc);
        if (ds_index >= 0 && thread % 32 == 0) smem.ds_free[ds_index].arrive();
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            reduce_add(out + j * 512, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
    }
};

}  // namespace strobe::sm90
