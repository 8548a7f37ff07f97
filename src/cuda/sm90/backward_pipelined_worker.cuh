// A key warpgroup that always has products of its own in flight, for head dims whose accumulators leave room: dK of the query
// tile before and dP while it makes P, dV and the next tile's S while it makes dS.
//
// What is in flight at the end of the loop's body may only be dK. The compiler serialises all products when an accumulator that
// other instructions read is one of those.
#pragma once

#include "cuda/sm90/backward_epilogue.cuh"
#include "cuda/sm90/backward_fragments.cuh"

namespace strobe::sm90 {

template <Variant V>
struct PipelinedKeyWorker {
    using C = BackwardConfig<V>;
    using F = Fragments<V>;

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const BackwardLaunch& launch;
    const int warpgroup;  // 0 or 1
    const int thread;     // in the warpgroup

    __device__ __forceinline__ void run() {
        Stream at{DsAddress<V>(smem, warpgroup * 64, thread)};
        for (int t = 0;; ++t) {
            smem.k_full.wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            smem.v_full.wait(t & 1);

            Registers r;
#pragma unroll
            for (int i = 0; i < C::kDim / 2; ++i) r.dk[i] = r.dv[i] = 0.0f;
            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
            if (iterations > 0) {
                fence_registers(r.dk);  // else the compiler clears them behind the first products, which serialises these
                fence_registers(r.dv);
                smem.q_full[at.stage.index].wait(at.stage.phase);
                wgmma_fence();
                F::multiply_over_dim(r.s, rows_of(smem.k), query_tile(at.stage.index));
                wgmma_commit();
                wgmma_wait<0>();
                fence_registers(r.s);
                at.previous = -1;
#pragma unroll 1
                for (int i = iterations; i > 1; --i) step<true>(r, tile, at);
                step<false>(r, tile, at);
                wgmma_wait<0>();
                fence_registers(r.dk);
                fence_registers(r.dv);
                free_stage(at.previous);
            }
            const BackwardTile last = tile;
            __syncwarp();
            if (lane() == 0) smem.kv_free.arrive();
            if (last.shared >= 0 && !sum_parts<V>(launch, last, warpgroup, thread, r.dk, r.dv)) continue;
            const Sequence seq = sequence_of(params, last.batch);
            const GradRows rows{last, seq, first_key(last), lane() % 4};
            store_gradient<V.dtype>(params, params.dv, params.size.head_dim_v, rows, r.dv, 1.0f);
            store_gradient<V.dtype>(params, params.dk, params.size.head_dim, rows, r.dk, params.score.softmax_scale);
        }
    }

private:
    struct Registers {
        typename F::Gradient dk, dv;
        typename F::Accumulator s, dp;
        typename F::Weights p, ds;
    };
    /// Where the warpgroup is in the stream of query tiles.
    struct Stream {
        DsAddress<V> ds_address;
        RingPosition stage, ds_stage, slot;
        int previous = -1;  // the stage that dK of the tile before may still be reading
    };

    __device__ __forceinline__ int lane() const { return thread % 32; }
    __device__ __forceinline__ uint32_t rows_of(const uint8_t* tile) const {
        return smem_address(tile) + warpgroup * 64 * C::kRowBytes;
    }
    __device__ __forceinline__ uint32_t query_tile(int stage) const { return smem_address(smem.q) + stage * C::kQueryTileBytes; }
    __device__ __forceinline__ uint32_t dout_tile(int stage) const {
        return smem_address(smem.dout) + stage * C::kQueryTileBytes;
    }
    __device__ __forceinline__ void free_stage(int stage) {
        __syncwarp();
        if (lane() == 0) smem.stage_free[stage].arrive();
    }
    __device__ __forceinline__ int first_key(const BackwardTile& tile) const {
        return tile.n_block * C::kBlockN + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
    }

    /// One query tile whose S is there. kMore: another one follows.
    template <bool kMore>
    __device__ __forceinline__ void step(Registers& r, const BackwardTile& tile, Stream& at) {
        const int stage = at.stage.index;
        RingPosition next = at.stage;
        next.template advance<C::kStages>();

        smem.dout_full[stage].wait(at.stage.phase);
        wgmma_fence();
        F::multiply_over_dim(r.dp, rows_of(smem.v), dout_tile(stage));
        wgmma_commit();
        typename F::Statistic statistic;
        F::load(statistic, smem.stats[stage][0], lane());
        F::probabilities(r.p, r.s, statistic, launch.scale_log2);
        const QuerySlot& slot = smem.slot[at.slot.index];
        if (slot.masked >> warpgroup & 1) F::hide(r.p, tile.mask, first_key(tile), slot.query0, lane());
        if constexpr (kMore) smem.q_full[next.index].wait(next.phase);
        wgmma_fence();
        F::multiply_over_queries(r.dv, r.p, dout_tile(stage));
        if constexpr (kMore) F::multiply_over_dim(r.s, rows_of(smem.k), query_tile(next.index));
        wgmma_commit();

        F::load(statistic, smem.stats[stage][1], lane());
        smem.ds_free[at.ds_stage.index].wait(at.ds_stage.phase ^ 1);
        wgmma_wait<1>();  // dP, and dK of the tile before
        fence_registers(r.dp);
        if (at.previous >= 0) free_stage(at.previous);
#pragma unroll
        for (int k = 0; k < C::kBlockM / 16; ++k) {
            F::score_gradients(r.ds[k], r.p[k], r.dp, statistic, k);
            store_matrices(at.ds_address.at(at.ds_stage.index, k), r.ds[k]);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane() == 0) smem.ds_full[at.ds_stage.index].arrive();
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
