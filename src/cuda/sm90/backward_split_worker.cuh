// The two key warpgroups for head_dim > 128: the same 64 keys, one for P and dV, the other
// for dS and dK. Thread t of both owns the same elements, so that P travels through the dS
// buffer without bank conflicts and each warp waits for one warp's worth of data only.
#pragma once

#include "cuda/sm90/backward_epilogue.cuh"
#include "cuda/sm90/backward_fragments.cuh"

namespace strobe::sm90 {

template <Variant V>
struct SplitWorkerBase {
    using C = BackwardConfig<V>;
    using F = Fragments<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int thread;

    /// One arrival of this warp, for what all its lanes have done.
    __device__ __forceinline__ void arrive(Barrier& barrier) const {
        __syncwarp();
        if (thread % 32 == 0) barrier.arrive();
    }
};

/// S, P and dV.
template <Variant V>
struct ValueWorker : SplitWorkerBase<V> {
    using Base = SplitWorkerBase<V>;
    using typename Base::C;
    using typename Base::F;
    using Base::smem, Base::params, Base::launch, Base::thread;

    __device__ __forceinline__ void run() {
        const int lane = thread % 32;
        const DsAddress<V> ds_address(smem, C::rank() * C::kBlockN, thread);
        RingPosition stage, ds_stage, slot_at;
        uint32_t dout_phase = 0;
        for (int t = 0;; ++t) {
            smem.k_full[0].wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            typename F::Gradient dv;
#pragma unroll
            for (int i = 0; i < C::kDim / 2; ++i) dv[i] = 0.0f;

            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                const uint32_t q = smem_address(smem.q) + stage.index * C::kQueryTileBytes;
                smem.q_full[stage.index].wait(stage.phase);
                typename F::Accumulator s;
                wgmma_fence();
                F::multiply_over_dim(s, smem_address(smem.k[0]), q);
                wgmma_commit();
                typename F::Statistic minus_lse;
                F::load(minus_lse, smem.stats[stage.index][0], lane);
                wgmma_wait<0>();
                fence_registers(s);

                typename F::Weights p;
                F::probabilities(p, s, minus_lse, launch.scale_log2);
                const QuerySlot& slot = smem.slot[slot_at.index];
                if (slot.masked & 1) {
                    F::hide(p, tile.mask, C::first_key(tile) + thread / 32 * 16 + lane / 4, slot.query0, lane);
                }
                smem.ds_free[ds_stage.index].wait(ds_stage.phase ^ 1);
#pragma unroll
                for (int k = 0; k < C::kBlockM / 16; ++k) store_matrices(ds_address.at(ds_stage.index, k), p[k]);
                Base::arrive(smem.p_full[ds_stage.index]);

                if constexpr (C::kDoutHalves) {
                    if (lane == 0) smem.stage_free[stage.index].arrive();
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        smem.dout_full[half].wait(dout_phase);
                        wgmma_fence();
                        F::multiply_half_over_queries(dv, p, smem_address(smem.dout), half);
                        wgmma_commit();
                    }
                    wgmma_wait<1>();
                    Base::arrive(smem.dout_free[0]);
                    wgmma_wait<0>();
                    fence_registers(dv);
                    Base::arrive(smem.dout_free[1]);
                    dout_phase ^= 1;
                } else {
                    smem.dout_full[stage.index].wait(stage.phase);
                    wgmma_fence();
                    F::multiply_over_queries(dv, p, smem_address(smem.dout) + stage.index * C::kQueryTileBytes);
                    wgmma_commit();
                    wgmma_wait<0>();
                    fence_registers(dv);
                    Base::arrive(smem.stage_free[stage.index]);
                }
                stage.template advance<C::kStages>();
                ds_stage.template advance<C::kDsStages>();
                slot_at.template advance<C::kSlots>();
            }
            const BackwardTile last = tile;
            Base::arrive(smem.kv_free[0]);
            if (may_share_tiles(V) && last.shared >= 0 &&
                !sum_parts_of_one<V>(launch, last, C::rank(), 1, thread, dv)) {
                continue;
            }
            const int row = C::first_key(last) + thread / 32 * 16 + lane / 4;
            store_gradient<V.dtype>(params, params.dv.data,
                                    GradRows::of_keys(params, params.dv, params.size.head_dim_v, last, row, lane % 4),
                                    dv, 1.0f);
        }
    }
};

/// dP, dS and dK.
template <Variant V>
struct KeyGradWorker : SplitWorkerBase<V> {
    using Base = SplitWorkerBase<V>;
    using typename Base::C;
    using typename Base::F;
    using Base::smem, Base::params, Base::launch, Base::thread;

    __device__ __forceinline__ void run() {
        const int lane = thread % 32;
        const DsAddress<V> ds_address(smem, C::rank() * C::kBlockN, thread);
        RingPosition stage, ds_stage;
        uint32_t dout_phase = 0;
        for (int t = 0;; ++t) {
            smem.k_full[0].wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            smem.v_full[0].wait(t & 1);
            typename F::Gradient dk;
#pragma unroll
            for (int i = 0; i < C::kDim / 2; ++i) dk[i] = 0.0f;

            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                const uint32_t q = smem_address(smem.q) + stage.index * C::kQueryTileBytes;
                smem.q_full[stage.index].wait(stage.phase);  // brings the statistics
                typename F::Accumulator dp;
                if constexpr (C::kDoutHalves) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        smem.dout_full[half].wait(dout_phase);
                        wgmma_fence();
                        F::multiply_over_half_dim(dp, smem_address(smem.v[0]), smem_address(smem.dout), half);
                    }
                    dout_phase ^= 1;
                } else {
                    smem.dout_full[stage.index].wait(stage.phase);
                    wgmma_fence();
                    F::multiply_over_dim(dp, smem_address(smem.v[0]),
                                         smem_address(smem.dout) + stage.index * C::kQueryTileBytes);
                }
                wgmma_commit();
                typename F::Statistic minus_delta;
                F::load(minus_delta, smem.stats[stage.index][1], lane);

                smem.p_full[ds_stage.index].wait(ds_stage.phase);
                typename F::Weights p, ds;
#pragma unroll
                for (int k = 0; k < C::kBlockM / 16; ++k) load_matrices(ds_address.at(ds_stage.index, k), p[k]);
                wgmma_wait<0>();
                fence_registers(dp);
                __syncwarp();
                if constexpr (C::kDoutHalves) {
                    if (lane == 0) smem.dout_free[0].arrive(), smem.dout_free[1].arrive();
                }
#pragma unroll
                for (int k = 0; k < C::kBlockM / 16; ++k) {
                    F::score_gradients(ds[k], p[k], dp, minus_delta, k);
                    store_matrices(ds_address.at(ds_stage.index, k), ds[k]);
                }
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) publish(ds_stage.index);

                wgmma_fence();
                F::multiply_over_queries(dk, ds, q);
                wgmma_commit();
                wgmma_wait<0>();
                fence_registers(dk);
                Base::arrive(smem.stage_free[stage.index]);
                stage.template advance<C::kStages>();
                ds_stage.template advance<C::kDsStages>();
            }
            const BackwardTile last = tile;
            Base::arrive(smem.kv_free[0]);
            if (may_share_tiles(V) && last.shared >= 0 &&
                !sum_parts_of_one<V>(launch, last, C::rank(), 0, thread, dk)) {
                continue;
            }
            const int row = C::first_key(last) + thread / 32 * 16 + lane / 4;
            store_gradient<V.dtype>(params, params.dk.data,
                                    GradRows::of_keys(params, params.dk, params.size.head_dim, last, row, lane % 4), dk,
                                    params.score.softmax_scale);
        }
    }

private:
    /// One lane of a warp: the 16 keys of this warp are in the dS buffer, and on their way to the other CTA.
    __device__ __forceinline__ void publish(int ds_stage) const {
        constexpr uint32_t kBytes = 16 * C::kRowBytes;
        const uint8_t* const mine = smem.ds[ds_stage] + C::rank() * C::kBlockN * C::kRowBytes + thread / 32 * kBytes;
        smem.ds_full[ds_stage].arrive_expect(kBytes);  // of the other's
        C::peer().copy(mine, kBytes, smem.ds_full[ds_stage]);
    }
};

}  // namespace strobe::sm90
