// A key warpgroup that always has products of its own in flight, for head dims whose accumulators leave room: dK of the
// query tile before and dP while it makes P, dV and the next tile's S while it makes dS.
//
// What is in flight at the end of the loop's body may only be dK. The compiler serialises all products when an
// accumulator that other instructions read is one of those.
#pragma once

#include "cuda/sm90/backward_key_worker.cuh"

namespace strobe::sm90 {

template <Variant V>
struct PipelinedKeyWorker : KeyWorkerBase<V> {
    using Base = KeyWorkerBase<V>;
    using typename Base::C;
    using typename Base::F;
    using Base::smem, Base::params, Base::launch, Base::warpgroup, Base::lane, Base::rows_of;

    __device__ __forceinline__ void run() {
        Stream at{DsAddress<V>(smem, warpgroup * 64, Base::thread)};
        for (int t = 0;; ++t) {
            const KeyStage<C::kKeyStages> key_stage(t);
            const KeyRows keys{rows_of(smem.k[key_stage.index]), rows_of(smem.v[key_stage.index])};
            smem.k_full[key_stage.index].wait(key_stage.phase);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            smem.v_full[key_stage.index].wait(key_stage.phase);

            Registers r;
#pragma unroll
            for (int i = 0; i < C::kDim / 2; ++i) r.dk[i] = r.dv[i] = 0.0f;
            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
            if (iterations > 0) {
                // Else the compiler clears them behind the first products, which serialises these.
                fence_registers(r.dk);
                fence_registers(r.dv);
                smem.q_full[at.stage.index].wait(at.stage.phase);
                wgmma_fence();
                F::multiply_over_dim(r.s, keys.k, query_tile(at.stage.index));
                wgmma_commit();
                wgmma_wait<0>();
                fence_registers(r.s);
                at.previous = -1;
#pragma unroll 1
                for (int i = iterations; i > 1; --i) step<true>(r, tile, keys, at);
                step<false>(r, tile, keys, at);
                wgmma_wait<0>();
                fence_registers(r.dk);
                fence_registers(r.dv);
                Base::free_stage(at.previous);
            }
            Base::finish(tile, key_stage.index, r.dk, r.dv);
        }
    }

private:
    struct Registers {
        typename F::Gradient dk, dv;
        typename F::Accumulator s, dp;
        typename F::Weights p, ds;
    };
    /// The warpgroup's keys in shared memory.
    struct KeyRows {
        uint32_t k, v;
    };
    /// Where the warpgroup is in the stream of query tiles.
    struct Stream {
        DsAddress<V> ds_address;
        RingPosition stage, ds_stage, slot;
        int previous = -1;  // the stage that dK of the tile before may still be reading
    };

    __device__ __forceinline__ uint32_t query_tile(int stage) const {
        return smem_address(smem.q) + stage * C::kQueryTileBytes;
    }
    __device__ __forceinline__ uint32_t dout_tile(int stage) const {
        return smem_address(smem.dout) + stage * C::kQueryTileBytes;
    }
    /// One query tile whose S is there. kMore: another one follows.
    template <bool kMore>
    __device__ __forceinline__ void step(Registers& r, const BackwardTile& tile, const KeyRows& keys, Stream& at) {
        const int stage = at.stage.index;
        RingPosition next = at.stage;
        next.template advance<C::kStages>();

        smem.dout_full[stage].wait(at.stage.phase);
        wgmma_fence();
        F::multiply_over_dim(r.dp, keys.v, dout_tile(stage));
        wgmma_commit();
        typename F::Statistic statistic;
        F::load(statistic, smem.stats[stage][0], lane());
        F::probabilities(r.p, r.s, statistic, launch.scale_log2);
        const QuerySlot& slot = smem.slot[at.slot.index];
        if (slot.masked >> warpgroup & 1) F::hide(r.p, tile.mask, Base::first_key(tile), slot.query0, lane());
        if constexpr (kMore) smem.q_full[next.index].wait(next.phase);
        wgmma_fence();
        F::multiply_over_queries(r.dv, r.p, dout_tile(stage));
        if constexpr (kMore) F::multiply_over_dim(r.s, keys.k, query_tile(next.index));
        wgmma_commit();

        F::load(statistic, smem.stats[stage][1], lane());
        smem.ds_free[at.ds_stage.index].wait(at.ds_stage.phase ^ 1);
        wgmma_wait<1>();  // dP, and dK of the tile before
        fence_registers(r.dp);
        if (at.previous >= 0) Base::free_stage(at.previous);
#pragma unroll
        for (int k = 0; k < C::kBlockM / 16; ++k) {
            F::score_gradients(r.ds[k], r.p[k], r.dp, statistic, k);
            store_matrices(at.ds_address.at(at.ds_stage.index, k), r.ds[k]);
        }
        Base::publish(at.ds_stage.index);
        wgmma_wait<0>();
        fence_registers(r.s);
        wgmma_fence();
        F::multiply_over_queries(r.dk, r.ds, query_tile(stage));
        wgmma_commit();

        at.previous = stage;
        at.stage = next;
        at.ds_stage.template advance<C::kDsStages>();
        at.slot.template advance<C::kSlots>();
    }
};

}  // namespace strobe::sm90
