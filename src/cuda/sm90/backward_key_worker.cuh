// One key warpgroup: 64 keys against a stream of query tiles.
#pragma once

#include "cuda/sm90/backward_config.cuh"
#include "cuda/sm90/backward_epilogue.cuh"

namespace strobe::sm90 {

template <Variant V>
struct KeyWorker {
    using C = BackwardConfig<V>;
    static constexpr bool kBand = V.mask == MaskClass::band;
    static constexpr int kScores = C::kBlockM / 2;  // accumulators of a 64 x block_m tile

    BackwardSmem<V>& smem;
    const BackwardParams& params;
    const int warpgroup;  // 0 or 1
    const int thread;     // in the warpgroup

    __device__ __forceinline__ void run() {
        const int lane = thread % 32;
        const int quad_column = 2 * (lane % 4);
        const uint32_t v_rows = smem_address(smem.v) + warpgroup * 64 * C::kRowBytes;
        // Lane l stores row l % 8 of 8 x 8 matrix l / 8; matrices go down the keys first. Swizzle: chunk16 ^= row % 8.
        const int ds_row = warpgroup * 64 + thread / 32 * 16 + (lane / 8 % 2) * 8 + lane % 8;
        const uint32_t ds_store = smem_address(smem.ds) + ds_row * C::kRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
        const float scale_log2 = params.score.softmax_scale * 1.4426950408889634f;

        RingPosition stage;
        RingPosition ds_stage;
        for (int t = 0;; ++t) {
            smem.k_full.wait(t & 1);
            const BackwardTile& tile = smem.tiles.entry[t % TileRing::kEntries];
            if (tile.batch < 0) return;
            smem.v_full.wait(t & 1);

            float dk[C::kDim / 2], dv[C::kDim / 2];
#pragma unroll
            for (int i = 0; i < C::kDim / 2; ++i) dk[i] = dv[i] = 0.0f;

            const int iterations = (tile.m_end - tile.m_begin) * (params.size.num_heads / params.size.num_heads_k);
#pragma unroll 1
            for (int i = iterations; i > 0; --i) {
                const uint32_t q = smem_address(smem.q) + stage.index * C::kQueryTileBytes;
                const uint32_t dout = smem_address(smem.dout) + stage.index * C::kQueryTileBytes;
                const uint32_t stats = smem_address(smem.stats) + stage.index * C::kStatsBytes + quad_column * 4;

                // Queues behind dV and dK of the iteration before, so that the tensor cores do not run dry here.
                float s[kScores];
#ifdef BWD_W0
                wgmma_wait<0>();
#endif
                issue_scores(s, stage);
                wgmma_wait<0>();
                fence_registers(s);
                fence_registers(dk);
                fence_registers(dv);
                uint32_t p16[C::kBlockM / 16][4];
#pragma unroll
                for (int j = 0; j < C::kBlockM / 8; ++j) {
                    const float2 lse = load_shared_pair(stats + j * 32);
                    p16[j / 2][j % 2 * 2] = pack_pair<V.dtype>(exp2_approx(s[4 * j + 0] * scale_log2 - lse.x),
                                                               exp2_approx(s[4 * j + 1] * scale_log2 - lse.y));
                    p16[j / 2][j % 2 * 2 + 1] = pack_pair<V.dtype>(exp2_approx(s[4 * j + 2] * scale_log2 - lse.x),
                                                                   exp2_approx(s[4 * j + 3] * scale_log2 - lse.y));
                }
                if (smem.slot[stage.index].masked >> warpgroup & 1) {
                    const int query0 = smem.slot[stage.index].query0 + quad_column;
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const VisibleQueries seen = tile.mask.of_key(first_key(tile) + 8 * r);
#pragma unroll
                        for (int j = 0; j < C::kBlockM / 8; ++j) {
                            const uint32_t keep = (seen.contains(query0 + 8 * j) ? 0x0000FFFFu : 0u) |
                                                  (seen.contains(query0 + 8 * j + 1) ? 0xFFFF0000u : 0u);
                            p16[j / 2][j % 2 * 2 + r] &= keep;
                        }
                    }
                }

                smem.dout_full[stage.index].wait(stage.phase);
                float dp[kScores];
                wgmma_fence();
                multiply_over_dim<V.dtype, C::kBlockM, C::kDim>(dp, k_major(v_rows), C::kKeyChunkBytes, k_major(dout),
                                                                C::kQueryChunkBytes);
                wgmma_commit();
                multiply_over_queries(dv, p16, dout);
                wgmma_commit();

                smem.ds_free[ds_stage.index].wait(ds_stage.phase ^ 1);
#ifdef BWD_W0
                wgmma_wait<1>();
#else
                wgmma_wait<0>();
#endif
                fence_registers(dp);
                uint32_t ds16[C::kBlockM / 16][4];
                const uint32_t ds_buffer = ds_store + ds_stage.index * C::kQueryUnits * C::kDsUnitBytes;
#pragma unroll
                for (int kk = 0; kk < C::kBlockM / 16; ++kk) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int j = 2 * kk + h;
                        const float2 delta = load_shared_pair(stats + C::kBlockM * 4 + j * 32);
                        const float2 upper = unpack_pair<V.dtype>(p16[kk][2 * h]);
                        const float2 lower = unpack_pair<V.dtype>(p16[kk][2 * h + 1]);
                        ds16[kk][2 * h] = pack_pair<V.dtype>(upper.x * (dp[4 * j + 0] - delta.x),
                                                             upper.y * (dp[4 * j + 1] - delta.y));
                        ds16[kk][2 * h + 1] = pack_pair<V.dtype>(lower.x * (dp[4 * j + 2] - delta.x),
                                                                 lower.y * (dp[4 * j + 3] - delta.y));
                    }
                    store_matrices((ds_buffer + kk / 4 * C::kDsUnitBytes) ^ (kk % 4 * 32), ds16[kk]);
                }
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) smem.ds_full[ds_stage.index].arrive();

                wgmma_fence();
                multiply_over_queries(dk, ds16, q);
                wgmma_commit();
                stage.template advance<C::kStages>();
                ds_stage.template advance<C::kDsStages>();
            }
            wgmma_wait<0>();
            fence_registers(dk);
            fence_registers(dv);
            const BackwardTile last = tile;
            __syncwarp();
            if (lane == 0) smem.kv_free.arrive();

            const Sequence seq = sequence_of(params, last.batch);
            const GradRows rows{last, seq, first_key(last), lane % 4};
            store_gradient<V.dtype>(params, params.dv, params.size.head_dim_v, rows, dv, 1.0f);
            store_gradient<V.dtype>(params, params.dk, params.size.head_dim, rows, dk, params.score.softmax_scale);
        }
    }

private:
    /// Starts S^T of the query tile in `stage`.
    __device__ __forceinline__ void issue_scores(float (&s)[kScores], const RingPosition& stage) {
        smem.q_full[stage.index].wait(stage.phase);
        const uint32_t k = smem_address(smem.k) + warpgroup * 64 * C::kRowBytes;
        const uint32_t q = smem_address(smem.q) + stage.index * C::kQueryTileBytes;
        wgmma_fence();
        multiply_over_dim<V.dtype, C::kBlockM, C::kDim>(s, k_major(k), C::kKeyChunkBytes, k_major(q), C::kQueryChunkBytes);
        wgmma_commit();
    }

    /// acc (64 keys x dim) += weights (64 keys x block_m queries) times a query tile.
    __device__ __forceinline__ static void multiply_over_queries(float (&acc)[C::kDim / 2],
                                                                 const uint32_t (&weights)[C::kBlockM / 16][4], uint32_t tile) {
#pragma unroll
        for (int kk = 0; kk < C::kBlockM / 16; ++kk) {
            Wgmma<C::kDim>::template rs<V.dtype, 1>(
                acc, weights[kk], mn_major(tile, C::kQueryChunkBytes) + kk * (16 * C::kRowBytes >> 4), 1);
        }
    }

    /// The first of this thread's two key rows; the other is 8 below.
    __device__ __forceinline__ int first_key(const BackwardTile& tile) const {
        return tile.n_block * C::kBlockN + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
    }
};

}  // namespace strobe::sm90
