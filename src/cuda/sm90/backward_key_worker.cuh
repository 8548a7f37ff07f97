// One of two key warpgroups for head_dim <= 128: 64 keys against a stream of query tiles.
#pragma once

#include "cuda/sm90/backward_epilogue.cuh"
#include "cuda/sm90/backward_fragments.cuh"

namespace strobe::sm90 {

/// What both kinds of key warpgroup share.
template <Variant V>
struct KeyWorkerBase {
    using C = BackwardConfig<V>;
    using F = Fragments<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int warpgroup;  // 0 or 1
    const int thread;     // in the warpgroup

    __device__ __forceinline__ int lane() const { return thread % 32; }

    __device__ __forceinline__ uint32_t rows_of(const uint8_t* tile) const {
        return smem_address(tile) + warpgroup * 64 * C::kRowBytes;
    }

    __device__ __forceinline__ void publish(int ds_stage) {
        fence_async_proxy();
        __syncwarp();
        if (lane() == 0) smem.ds_full[ds_stage].arrive();
    }

    __device__ __forceinline__ void free_stage(int stage) {
        __syncwarp();
        if (lane() == 0) smem.stage_free[stage].arrive();
    }

    /// The first of this thread's two key rows; the other is 8 below.
    __device__ __forceinline__ int first_key(const BackwardTile& tile) const {
        return tile.n_block * C::kBlockN + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
    }

    /// Frees the key tile and writes its gradients.
    __device__ __forceinline__ void finish(const BackwardTile& tile, int key_stage, typename F::Gradient& dk,
                                           typename F::Gradient& dv) {
        const BackwardTile last = tile;
        __syncwarp();
        if (lane() == 0) smem.kv_free[key_stage].arrive();
        if (last.shared >= 0 && !sum_parts<V>(launch, last, warpgroup, thread, dk, dv)) return;
        const auto rows = [&](const TensorRef& grad, int dim) {
            return GradRows::of_keys(params, grad, dim, last, first_key(last), lane() % 4);
        };
        store_gradient<V.dtype>(params, params.dv.data, rows(params.dv, params.size.head_dim_v), dv, 1.0f);
        store_gradient<V.dtype>(params, params.dk.data, rows(params.dk, params.size.head_dim), dk,
                                params.score.softmax_scale);
    }
};

/// P is kept as the 16-bit numbers that multiply dout, also for dS: with it in fp32 the
/// accumulators of S, dP, dK and dV would leave no registers. For the same reason dV is finished
/// before dS is made; S of the next query tile queues behind dK, so that the tensor cores have
/// work of this warpgroup except while it makes P and dS - when the other one's products run.
template <Variant V>
struct KeyWorker : KeyWorkerBase<V> {
    using Base = KeyWorkerBase<V>;
    using typename Base::C;
    using typename Base::F;
    using Base::smem, Base::params, Base::warpgroup, Base::thread;

    __device__ __forceinline__ void run() {
        const int lane = thread % 32;
        const DsAddress<V> ds_address(smem, warpgroup * 64, thread);

        RingPosition stage, ds_stage, slot_at;
        for (int t = 0;; ++t) {
            const KeyStage<C::kKeyStages> key_stage(t);
            const uint32_t k_rows = Base::rows_of(smem.k[key_stage.index]);
            const uint32_t v_rows = Base::rows_of(smem.v[key_stage.index]);
            smem.k_full[key_stage.index].wait(key_stage.phase);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            smem.v_full[key_stage.index].wait(key_stage.phase);

            typename F::Gradient dk, dv;
#pragma unroll
            for (int i = 0; i < C::kDim / 2; ++i) dk[i] = dv[i] = 0.0f;

            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
            int previous = 0;  // the stage that dK of the iteration before is still reading
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                const uint32_t q = smem_address(smem.q) + stage.index * C::kQueryTileBytes;
                const uint32_t dout = smem_address(smem.dout) + stage.index * C::kQueryTileBytes;

                smem.q_full[stage.index].wait(stage.phase);
                typename F::Accumulator s;
                wgmma_fence();
                F::multiply_over_dim(s, k_rows, q);
                wgmma_commit();
                typename F::Statistic minus_lse;
                F::load(minus_lse, smem.stats[stage.index][0], lane);
                wgmma_wait<0>();
                fence_registers(s);
                fence_registers(dk);
                if (i < iterations) Base::free_stage(previous);

                typename F::Weights p;
                F::probabilities(p, s, minus_lse, Base::launch.scale_log2);
                const QuerySlot& slot = smem.slot[slot_at.index];
                if (slot.masked >> warpgroup & 1) F::hide(p, tile.mask, Base::first_key(tile), slot.query0, lane);

                smem.dout_full[stage.index].wait(stage.phase);
                typename F::Accumulator dp;
                wgmma_fence();
                F::multiply_over_dim(dp, v_rows, dout);
                wgmma_commit();
                F::multiply_over_queries(dv, p, dout);
                wgmma_commit();

                typename F::Statistic minus_delta;
                F::load(minus_delta, smem.stats[stage.index][1], lane);
                smem.ds_free[ds_stage.index].wait(ds_stage.phase ^ 1);
                wgmma_wait<0>();
                fence_registers(dp);
                fence_registers(dv);
                typename F::Weights ds;
#pragma unroll
                for (int k = 0; k < C::kBlockM / 16; ++k) {
                    F::score_gradients(ds[k], p[k], dp, minus_delta, k);
                    store_matrices(ds_address.at(ds_stage.index, k), ds[k]);
                    if (C::kDkFollowsDs && k > 0) {
                        wgmma_fence();
                        F::multiply_over_sixteen_queries(dk, ds[k - 1], q, k - 1);
                    }
                }
                if constexpr (!C::kFenceBehindDk) Base::publish(ds_stage.index);
                wgmma_fence();
#pragma unroll
                for (int k = C::kDkFollowsDs ? C::kBlockM / 16 - 1 : 0; k < C::kBlockM / 16; ++k) {
                    F::multiply_over_sixteen_queries(dk, ds[k], q, k);
                }
                wgmma_commit();
                if constexpr (C::kFenceBehindDk) Base::publish(ds_stage.index);
                previous = stage.index;
                stage.template advance<C::kStages>();
                ds_stage.template advance<C::kDsStages>();
                slot_at.template advance<C::kSlots>();
            }
            wgmma_wait<0>();
            fence_registers(dk);
            if (iterations > 0) Base::free_stage(previous);
            Base::finish(tile, key_stage.index, dk, dv);
        }
    }
};

}  // namespace strobe::sm90
