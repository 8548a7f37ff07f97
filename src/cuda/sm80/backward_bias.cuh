// The gradient of the additive bias, dS summed over everything that broadcasts into a tile; see bias_gradient.cuh.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm80/backward_workspace.hpp"
#include "cuda/sm80/bias_gradient.cuh"
#include "cuda/sm80/config.hpp"
#include "cuda/sm80/output.cuh"
#include "cuda/sm80/score_gradient.cuh"

namespace strobe::sm80 {

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(BiasGradientConfig::kWarps* kWarpSize)
    backward_bias_gradient(const __grid_constant__ BackwardParams p, const __grid_constant__ BiasGradientGrid grid,
                           const __grid_constant__ BackwardWorkspace ws) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr BiasGradientConfig kConfig(V);
    constexpr int kD = V.head_dim, kM = BiasGradientConfig::kBlockM, kN = BiasGradientConfig::kBlockN;
    constexpr int kThreads = BiasGradientConfig::kWarps * kWarpSize;
    constexpr int kRows = kM / BiasGradientConfig::kWarps, kNAtoms = kN / 8;
    extern __shared__ __align__(128) unsigned char smem[];
    const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const uint32_t q_smem = smem_address(smem);
    const uint32_t do_smem = q_smem + kConfig.q_bytes;
    const uint32_t k_smem = do_smem + kConfig.q_bytes;
    const uint32_t v_smem = k_smem + kConfig.kv_bytes;

    float sum[1][kNAtoms][4];
    clear(sum);
    grid.for_each_item([&](int batch, int head, int q_tile, int k_tile) {
        const Sequence seq = sequence_of(p, batch);
        const Band band(seq.mask(p.mask));
        const int64_t q_begin = static_cast<int64_t>(q_tile) * kM, k_begin = static_cast<int64_t>(k_tile) * kN;
        if (q_begin >= seq.seqlen_q || k_begin >= seq.seqlen_k) return;
        if (!band.any_visible(static_cast<int>(q_begin), kM, static_cast<int>(k_begin), kN)) return;
        const int kv_head = head / (p.size.num_heads / p.size.num_heads_k);
        __syncthreads();  // everyone is done with the last tiles
        const Operand q_in(p.q, batch, seq.q_row + q_begin, head);
        const Operand do_in(p.dout, batch, seq.q_row + q_begin, head);
        const Operand k_in(p.k, batch, seq.k_row + k_begin, kv_head);
        const Operand v_in(p.v, batch, seq.k_row + k_begin, kv_head);
        const int q_valid = static_cast<int>(seq.seqlen_q - q_begin);
        const int k_valid = static_cast<int>(seq.seqlen_k - k_begin);
        load_tile<kM, kD, kThreads, false>(q_smem, q_in.data, q_in.row_stride, q_valid, p.size.head_dim,
                                           q_in.aligned(p.size.head_dim), thread);
        load_tile<kM, kD, kThreads, false>(do_smem, do_in.data, do_in.row_stride, q_valid, p.size.head_dim_v,
                                           do_in.aligned(p.size.head_dim_v), thread);
        load_tile<kN, kD, kThreads, false>(k_smem, k_in.data, k_in.row_stride, k_valid, p.size.head_dim,
                                           k_in.aligned(p.size.head_dim), thread);
        load_tile<kN, kD, kThreads, false>(v_smem, v_in.data, v_in.row_stride, k_valid, p.size.head_dim_v,
                                           v_in.aligned(p.size.head_dim_v), thread);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();

        const int q0 = static_cast<int>(q_begin) + warp * kRows, k0 = static_cast<int>(k_begin);
        const int64_t stat0 = ws.template first_tile<V.block_m>(p, seq, batch, head) * V.block_m;
        float lse[2], delta[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = q0 + 8 * h + lane / 4;
            lse[h] = row < seq.seqlen_q ? ws.lse[stat0 + row] : INFINITY;
            delta[h] = row < seq.seqlen_q ? ws.delta[stat0 + row] : 0.0f;
        }
        float s[1][kNAtoms][4], dp[1][kNAtoms][4];
        multiply<V.dtype, true, 1, kNAtoms, kD / 16>(
            s, a_rows<1>(FragmentAddress<kD>::rows_first(q_smem, lane, warp * kRows)),
            b_rows(FragmentAddress<kD>::chunks_first(k_smem, lane)));
        multiply<V.dtype, true, 1, kNAtoms, kD / 16>(
            dp, a_rows<1>(FragmentAddress<kD>::rows_first(do_smem, lane, warp * kRows)),
            b_rows(FragmentAddress<kD>::chunks_first(v_smem, lane)));
        const ScoreFunctionOf<V.features> score(p, seq, batch, head);
        const FragmentOrigin<false> origin{q0 + lane / 4, k0 + 2 * (lane % 4)};
        const DropoutBits<false> bits(p, static_cast<uint32_t>(batch * p.size.num_heads + head), origin);
        // The bias enters after the softcap: its gradient is P * (dP - delta), without the softcap's slope.
        ScoreGradient<V.dtype, false, V.features, 1, kNAtoms, false> gradient;
        gradient.scores(s, score, band, origin, !band.all_visible(q0, kRows, k0, kN), NoBias());
        gradient.probabilities(s, p, score.unit_log2(p), bits,
                               [&](int, int, int h) { return float2{lse[h], lse[h]}; });
        gradient.finish(dp, s, p.dropout, [&](int, int, int h) { return float2{delta[h], delta[h]}; });
#pragma unroll
        for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[0][j][e] += dp[0][j][e];
    });

    __syncthreads();
    float* const tile = reinterpret_cast<float*>(smem);
    const float rescale = p.dropout.enabled() ? p.dropout.rescale : 1.0f;
#pragma unroll
    for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            tile[(warp * kRows + lane / 4 + 8 * (e >> 1)) * kN + 8 * j + 2 * (lane % 4) + (e & 1)] =
                sum[0][j][e] * rescale;
        }
    __syncthreads();
    grid.store(p, tile, kThreads);
}

}  // namespace strobe::sm80
