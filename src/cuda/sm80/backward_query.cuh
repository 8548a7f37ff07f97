// dQ by its own pass over the keys, one CTA per query tile: dQ = softmax_scale * sum over keys of dS K, summed in a
// fixed order by one CTA, hence bitwise repeatable for every head dim and feature, without an accumulator in memory.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm80/backward_workspace.hpp"
#include "cuda/sm80/config.hpp"
#include "cuda/sm80/output.cuh"
#include "cuda/sm80/schedule.hpp"
#include "cuda/sm80/score_gradient.cuh"

namespace strobe::sm80 {

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(QueryGradientConfig::kWarps* kWarpSize,
                                  QueryGradientConfig(cuda::decode_variant(kVariantCode)).ctas_per_sm)
    backward_query_gradient(const __grid_constant__ BackwardParams p, const __grid_constant__ TileOrder order,
                            const __grid_constant__ BackwardWorkspace ws) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr QueryGradientConfig kConfig(V);
    constexpr int kD = V.head_dim, kM = kConfig.block_m, kN = kConfig.block_n, kRows = kConfig.rows;
    constexpr int kThreads = QueryGradientConfig::kWarps * kWarpSize, kStages = kConfig.stages;
    constexpr int kMAtoms = kRows / 16, kNAtoms = kN / 8, kDAtoms = kD / 8;
    constexpr bool kGeneral = is_general(V.features);
    extern __shared__ __align__(128) unsigned char smem[];

    const TileIndex index = order.at(blockIdx.x);
    const int batch = index.head / p.size.num_heads;
    const int head = index.head % p.size.num_heads;
    const Sequence seq = sequence_of(p, batch);
    const int64_t q_begin = static_cast<int64_t>(index.tile) * kM;
    if (q_begin >= seq.rows_q) return;
    const BandMask mask = seq.mask(p.mask);
    const Band band(mask);
    const IndexRange keys = mask.key_range(q_begin, q_begin + kM);
    const int tile_begin = keys.empty() ? 0 : static_cast<int>(keys.begin / kN);
    const int tile_end = keys.empty() ? 0 : static_cast<int>((keys.end + kN - 1) / kN);

    const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int q0 = static_cast<int>(q_begin) + warp * kRows;
    const uint32_t q_smem = smem_address(smem);
    const uint32_t do_smem = q_smem + kConfig.q_bytes;
    const uint32_t k_smem = do_smem + kConfig.q_bytes;
    const uint32_t v_smem = k_smem + kStages * kConfig.kv_bytes;
    const int kv_head = head / (p.size.num_heads / p.size.num_heads_k);
    const Operand k_in(p.k, batch, seq.k_row, kv_head);
    const Operand v_in(p.v, batch, seq.k_row, kv_head);
    const auto load_keys = [&](int tile, int stage) {
        const int64_t row = static_cast<int64_t>(tile) * kN;
        const int valid = band.seqlen_k - tile * kN;
        load_tile<kN, kD, kThreads, !kGeneral>(k_smem + stage * kConfig.kv_bytes, k_in.row(row), k_in.row_stride, valid,
                                               p.size.head_dim, k_in.aligned(p.size.head_dim), thread);
        load_tile<kN, kD, kThreads, !kGeneral>(v_smem + stage * kConfig.kv_bytes, v_in.row(row), v_in.row_stride, valid,
                                               p.size.head_dim_v, v_in.aligned(p.size.head_dim_v), thread);
        cp_async_commit();
    };

    float dq[kMAtoms][kDAtoms][4];
    clear(dq);
    float lse[kMAtoms][2], delta[kMAtoms][2];
    const int64_t stat0 = ws.template first_tile<V.block_m>(p, seq, batch, head) * V.block_m;
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = q0 + 16 * i + 8 * h + lane / 4;
            lse[i][h] = row < seq.seqlen_q ? ws.lse[stat0 + row] : INFINITY;
            delta[i][h] = row < seq.seqlen_q ? ws.delta[stat0 + row] : 0.0f;
        }
    if (tile_begin < tile_end) {
        const Operand q_in(p.q, batch, seq.q_row + q_begin, head);
        const Operand do_in(p.dout, batch, seq.q_row + q_begin, head);
        const int valid = static_cast<int>(seq.seqlen_q - q_begin);
        load_tile<kM, kD, kThreads, !kGeneral>(q_smem, q_in.data, q_in.row_stride, valid, p.size.head_dim,
                                               q_in.aligned(p.size.head_dim), thread);
        load_tile<kM, kD, kThreads, !kGeneral>(do_smem, do_in.data, do_in.row_stride, valid, p.size.head_dim_v,
                                               do_in.aligned(p.size.head_dim_v), thread);
        load_keys(tile_begin, 0);
    }

    const ScoreFunctionOf<V.features> score(p, seq, batch, head);
    const float scale =
        p.score.softmax_scale * (may_drop(V.features) && p.dropout.enabled() ? p.dropout.rescale : 1.0f);
    const uint32_t batch_head = static_cast<uint32_t>(index.head);
    const auto q_operand = FragmentAddress<kD>::rows_first(q_smem, lane, warp * kRows);
    const auto do_operand = FragmentAddress<kD>::rows_first(do_smem, lane, warp * kRows);
    for (int tile = tile_begin; tile < tile_end; ++tile) {
        const int stage = kStages > 1 ? (tile - tile_begin) & 1 : 0;
        cp_async_wait<0>();
        __syncthreads();  // the tile has landed; everyone is done with the last one
        if (kStages > 1 && tile + 1 < tile_end) load_keys(tile + 1, stage ^ 1);
        const int k0 = tile * kN;
        if (band.any_visible(q0, kRows, k0, kN)) {
            float s[kMAtoms][kNAtoms][4], dp[kMAtoms][kNAtoms][4];
            const uint32_t k_tile = k_smem + stage * kConfig.kv_bytes, v_tile = v_smem + stage * kConfig.kv_bytes;
            const FragmentOrigin<false> origin{q0 + lane / 4, k0 + 2 * (lane % 4)};
            const DropoutBits<false> bits(p, batch_head, origin);
            ScoreGradient<V.dtype, false, V.features, kMAtoms, kNAtoms> gradient;
            multiply<V.dtype, true, kMAtoms, kNAtoms, kD / 16>(s, a_rows<kMAtoms>(q_operand),
                                                               b_rows(FragmentAddress<kD>::chunks_first(k_tile, lane)),
                                                               gradient.template beside_scores<kD / 16>(bits));
            gradient.scores(s, score, band, origin, !band.all_visible(q0, kRows, k0, kN), NoBias());
            multiply<V.dtype, true, kMAtoms, kNAtoms, kD / 16>(dp, a_rows<kMAtoms>(do_operand),
                                                         b_rows(FragmentAddress<kD>::chunks_first(v_tile, lane)));
            gradient.probabilities(s, p, score.unit_log2(p), bits,
                                   [&](int i, int, int h) { return float2{lse[i][h], lse[i][h]}; });
            gradient.finish(dp, s, p.dropout, [&](int i, int, int h) { return float2{delta[i][h], delta[i][h]}; });
            uint32_t ds[kMAtoms][kNAtoms][2];
            pack_fragments<V.dtype>(ds, dp);
            multiply<V.dtype, false, kMAtoms, kDAtoms, kN / 16>(dq, a_registers(ds),
                                                         b_columns<1>(FragmentAddress<kD>::rows_first(k_tile, lane)));
        }
        if (kStages == 1 && tile + 1 < tile_end) {
            __syncthreads();  // everyone is done with the keys
            load_keys(tile + 1, 0);
        }
    }

#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const bool live = q0 + 16 * i + 8 * (e >> 1) + lane / 4 < seq.seqlen_q;
#pragma unroll
            for (int j = 0; j < kDAtoms; ++j) dq[i][j][e] = live ? dq[i][j][e] * scale : 0.0f;
        }
    const Result out(p.dq, p.grad_dtype, batch, seq.q_row + q0, head);
    store_rows<V.dtype, kD, kRows, !kGeneral>(dq, q_smem + warp * kRows * kD * 2, out,
                                              static_cast<int>(seq.rows_q) - q0, p.size.head_dim, p.accumulate, lane);
}

}  // namespace strobe::sm80
