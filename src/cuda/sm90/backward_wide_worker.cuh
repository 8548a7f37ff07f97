// A key warpgroup with 128 keys, 64 at a time against each query tile (KeyWorker's order of work): head dim 64 has the registers.
// Twice the keys for each query tile halve what dq adds in L2 and what the copies bring.
#pragma once

#include "cuda/sm90/backward_epilogue.cuh"
#include "cuda/sm90/backward_fragments.cuh"

namespace strobe::sm90 {

template <Variant V>
struct WideKeyWorker {
    using C = BackwardConfig<V>;
    using F = Fragments<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int warpgroup;  // 0 or 1
    const int thread;     // in the warpgroup

    __device__ __forceinline__ void run() {
        const int lane = thread % 32;
        const uint32_t k_rows = smem_address(smem.k) + warpgroup * 128 * C::kRowBytes;
        const uint32_t v_rows = smem_address(smem.v) + warpgroup * 128 * C::kRowBytes;
        const DsAddress<V> ds_address(smem, warpgroup * 128, thread);

        RingPosition stage, ds_stage, slot_at;
        for (int t = 0;; ++t) {
            smem.k_full.wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            smem.v_full.wait(t & 1);

            typename F::Gradient dk[2], dv[2];
#pragma unroll
            for (int i = 0; i < C::kDim / 2; ++i) dk[0][i] = dv[0][i] = dk[1][i] = dv[1][i] = 0.0f;

            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
            int previous = 0;  // the stage that dK of the iteration before is still reading
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                const uint32_t q = smem_address(smem.q) + stage.index * C::kQueryTileBytes;
                const uint32_t dout = smem_address(smem.dout) + stage.index * C::kQueryTileBytes;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (h == 0) smem.q_full[stage.index].wait(stage.phase);
                    typename F::Accumulator s;
                    wgmma_fence();
                    F::multiply_over_dim(s, k_rows + h * 64 * C::kRowBytes, q);
                    wgmma_commit();
                    typename F::Statistic minus_lse;
                    F::load(minus_lse, smem.stats[stage.index][0], lane);
                    wgmma_wait<0>();
                    fence_registers(s);
                    fence_registers(dk[1 - h]);
                    if (h == 0 && i < iterations) free_stage(previous, lane);

                    typename F::Weights p;
                    F::probabilities(p, s, minus_lse, launch.scale_log2);
                    const QuerySlot& slot = smem.slot[slot_at.index];
                    if (slot.masked >> (warpgroup * 2 + h) & 1) F::hide(p, tile.mask, first_key(tile) + h * 64, slot.query0, lane);

                    if (h == 0) smem.dout_full[stage.index].wait(stage.phase);
                    typename F::Accumulator dp;
                    wgmma_fence();
                    F::multiply_over_dim(dp, v_rows + h * 64 * C::kRowBytes, dout);
                    wgmma_commit();
                    F::multiply_over_queries(dv[h], p, dout);
                    wgmma_commit();

                    typename F::Statistic minus_delta;
                    if constexpr (!C::kLateDelta) F::load(minus_delta, smem.stats[stage.index][1], lane);
                    if (h == 0) smem.ds_free[ds_stage.index].wait(ds_stage.phase ^ 1);
                    wgmma_wait<0>();
                    fence_registers(dp);
                    fence_registers(dv[h]);
                    if constexpr (C::kLateDelta) F::load(minus_delta, smem.stats[stage.index][1], lane);
                    typename F::Weights ds;
#pragma unroll
                    for (int k = 0; k < C::kBlockM / 16; ++k) {
                        F::score_gradients(ds[k], p[k], dp, minus_delta, k);
                        store_matrices(ds_address.at(ds_stage.index, k) + h * 64 * C::kRowBytes, ds[k]);
                    }
                    fence_async_proxy();
                    __syncwarp();
                    if (lane == 0) smem.ds_full[ds_stage.index * 2 + h].arrive();
                    wgmma_fence();
                    F::multiply_over_queries(dk[h], ds, q);
                    wgmma_commit();
                }
                previous = stage.index;
                stage.template advance<C::kStages>();
                ds_stage.template advance<C::kDsStages>();
                slot_at.template advance<C::kSlots>();
            }
            wgmma_wait<0>();
            fence_registers(dk[0]);
            fence_registers(dk[1]);
            if (iterations > 0) free_stage(previous, lane);
            const BackwardTile last = tile;
            __syncwarp();
            if (lane == 0) smem.kv_free.arrive();

            const Sequence seq = sequence_of(params, last.batch);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (last.shared >= 0 && !sum_parts<V>(launch, last, warpgroup * 2 + h, thread, dk[h], dv[h])) continue;
                const GradRows rows{last, seq, first_key(last) + h * 64, lane % 4};
                store_gradient<V.dtype>(params, params.dv, params.size.head_dim_v, rows, dv[h], 1.0f);
                store_gradient<V.dtype>(params, params.dk, params.size.head_dim, rows, dk[h], params.score.softmax_scale);
            }
        }
    }

private:
    __device__ __forceinline__ void free_stage(int stage, int lane) {
        __syncwarp();
        if (lane == 0) smem.stage_free[stage].arrive();
    }

    /// The first of this thread's key rows.
    __device__ __forceinline__ int first_key(const BackwardTile& tile) const {
        return tile.n_block * C::kBlockN + warpgroup * 128 + thread / 32 * 16 + thread % 32 / 4;
    }
};

}  // namespace strobe::sm90
