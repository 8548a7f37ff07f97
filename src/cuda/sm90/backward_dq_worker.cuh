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
    int claimed;  // the next work index of this CTA, fetched early since the atomic takes most of a microsecond

    __device__ __forceinline__ void start() {
        claimed = blockIdx.x;
        LoaderState& state = smem.loader;
        state.tiles_known = state.load_tile = state.loads = state.heads_left = 0;
        state.limit = C::kStages - 1;
        state.stage = {};
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

    /// Issues query loads up to the limit, each as soon as its buffer is free, within the tiles that may be known by now.
    __device__ __forceinline__ void load_queries(int current_tile) {
        const LoaderState& state = smem.loader;
        while (state.loads < state.limit && (state.heads_left > 0 || open_tile(current_tile))) load_query_tile();
    }

private:
    __device__ __forceinline__ BackwardTile& entry(int tile) { return smem.tiles.entry[tile % TileRing::kEntries]; }

    /// Makes ring entry `tile` known. At most TileRing::kAhead beyond the tile being worked on.
    __device__ __forceinline__ void learn(int tile) {
        LoaderState& state = smem.loader;
        while (state.tiles_known <= tile) {
            BackwardTile found;
            bool done = state.tiles_known > 0 && entry(state.tiles_known - 1).batch < 0;
            while (!done) {
                const int index = claimed;
                done = index >= launch.schedule.work_tiles;
                if (done) break;
                claimed = gridDim.x + atomicAdd(launch.counter, 1);
                if (decode_tile<V>(params, launch.schedule, index, found)) break;
            }
            if (done) found.batch = -1;
            entry(state.tiles_known++) = found;
        }
    }

    /// Opens the next tile that has queries. False: there is none within the ring's reach.
    __device__ __forceinline__ bool open_tile(int current_tile) {
        LoaderState& state = smem.loader;
        while (state.load_tile <= current_tile + TileRing::kAhead) {
            learn(state.load_tile);
            const BackwardTile tile = entry(state.load_tile);
            if (tile.batch < 0) return false;
            state.tile = state.load_tile++;
            if (tile.m_begin == tile.m_end) continue;
            const Sequence seq = sequence_of(params, tile.batch);
            const int group = params.size.num_heads / params.size.num_heads_k;
            const int head = tile.head_k * group;
            state.at = {static_cast<int>(params.size.seqlen_q - seq.seqlen_q), head,
                        static_cast<int>(seq.q_row + seq.seqlen_q), params.seqlens.cu_seqlens_q ? 0 : tile.batch};
            state.heads_left = group;
            state.m = state.m_begin = tile.m_begin;
            state.m_end = tile.m_end;
            state.padded = static_cast<int>(head * launch.tiles +
                                            first_padded_tile(params, seq, tile.batch, C::kBlockM) + tile.m_begin);
            for (int w = 0; w < C::kKeyUnits; ++w) {
                const IndexRange clear = tile.mask.clear_tiles(tile.n_block * C::kBlockN + w * 64, 64, C::kBlockM);
                state.clear_begin[w] = static_cast<int>(clear.begin);
                state.clear_end[w] = static_cast<int>(clear.end);
            }
            return true;
        }
        return false;
    }

    __device__ __forceinline__ void load_query_tile() {
        LoaderState& state = smem.loader;
        const RingPosition stage = state.stage;
        const int s = stage.index;
        const int m = state.m;
        const RaggedCoordinates at = state.at;
        const int row = m * C::kBlockM;
        Barrier& q_full = smem.q_full[s];
        Barrier& dout_full = smem.dout_full[s];
        int masked = 0;
        for (int w = 0; w < C::kKeyUnits; ++w) {
            masked |= (m < state.clear_begin[w] || m >= state.clear_end[w]) << w;
        }
        smem.stage_free[s].wait(stage.phase ^ 1);
        smem.slot[s] = {state.padded, params.deterministic ? turn_of(entry(state.tile), m) : 0, row, masked};
        q_full.arrive_expect(C::kQueryTileBytes + C::kStatsBytes);
        for (int c = 0; c < C::kChunks; ++c) {
            ragged_load(smem_address(smem.q[s]) + c * C::kQueryChunkBytes, launch.q, q_full, c * 64, row, at);
        }
        bulk_load(smem_address(smem.stats[s]), launch.stats + static_cast<int64_t>(state.padded) * (2 * C::kBlockM),
                  C::kStatsBytes, q_full);
        dout_full.arrive_expect(C::kQueryTileBytes);
        for (int c = 0; c < C::kChunks; ++c) {
            ragged_load(smem_address(smem.dout[s]) + c * C::kQueryChunkBytes, launch.dout, dout_full, c * 64, row, at);
        }
        state.stage.template advance<C::kStages>();
        ++state.loads;
        if (m + 1 < state.m_end) {
            state.m = m + 1;
            ++state.padded;
        } else {
            state.padded += static_cast<int>(launch.tiles) - (m - state.m_begin);
            state.m = state.m_begin;
            ++state.at.head;
            --state.heads_left;
        }
    }

    /// How many key tiles add to query tile m before this one: those left of it that the query tile sees at all.
    __device__ __forceinline__ int turn_of(const BackwardTile& tile, int m) const {
        return tile.n_block - tile.mask.first_key(m * C::kBlockM) / C::kBlockN;
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
                // The key warps free the stage of the iteration before on their way to this dS: the loader never blocks it.
                if (thread == 0) {
                    ++smem.loader.limit;
                    loader.load_queries(t);
                }
                __syncwarp();
                smem.ds_full[ds_stage.index].wait(ds_stage.phase);
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
    /// dq (block_m queries x dim) += dS K in pieces of 64 x 64, which need few registers.
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
                constexpr int kTail = C::kDim % 64;
                if (kTail == 0 || c + 1 < C::kChunks) {
                    multiply_piece<64>(ds, ds_index, u, c, out);
                } else {
                    multiply_piece<kTail == 0 ? 64 : kTail>(ds, ds_index, u, c, out);
                }
            }
        }
        if (params.deterministic) {
            __threadfence();
            named_barrier_sync(kBarrier, 128);
            order.pass_on(thread);
        }
    }

    /// 64 queries (unit) by N columns from 64 * chunk. The last piece frees the dS buffer.
    template <int N>
    __device__ __forceinline__ void multiply_piece(uint32_t ds, int ds_index, int unit, int chunk, float* out) {
        float acc[N / 2];
        const uint64_t a = mn_major(ds + unit * C::kDsUnitBytes, C::kDsUnitBytes);
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
        if (unit + 1 == C::kQueryUnits && chunk + 1 == C::kChunks && thread % 32 == 0) smem.ds_free[ds_index].arrive();
        float* const piece = out + (unit * (C::kDim / 8) + chunk * 8) * 512;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            reduce_add(piece + j * 512, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
    }
};

}  // namespace strobe::sm90
