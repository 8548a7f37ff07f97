// FlashAttention-2 forward on mma.sync (Dao, "FlashAttention-2: faster attention with better parallelism and work
// partitioning", 2023). One CTA per (query tile, head, batch); warps split the query rows and never exchange scores.
// O stays unnormalised in registers until the end.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm80/config.hpp"
#include "cuda/sm80/output.cuh"
#include "cuda/sm80/schedule.hpp"
#include "cuda/sm80/score.cuh"
#include "cuda/sm80/tile.cuh"

namespace strobe::sm80 {

/// Running maximum and sum of the rows a thread holds. The reference maximum is moved only when a row outgrows it by
/// 2^8: exp2 stays in range, the division at the end removes the reference, and most tiles skip rescaling O.
template <int kMAtoms>
struct OnlineSoftmax {
    float reference[kMAtoms][2];
    float sum[kMAtoms][2];
    float scale_log2;  // > 0

    __device__ explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                reference[i][h] = -INFINITY;
                sum[i][h] = 0.0f;
            }
    }

    /// Scores become exp2(scale_log2 * (s - reference)); o and the sums follow when the reference moves.
    template <int kNAtoms, int kDAtoms>
    __device__ __forceinline__ void update(float (&s)[kMAtoms][kNAtoms][4], float (&o)[kMAtoms][kDAtoms][4]) {
        const float slack = 8.0f / scale_log2;
        float row_max[kMAtoms][2];
        bool grows = false;
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float m = fmaxf(s[i][0][2 * h], s[i][0][2 * h + 1]);
#pragma unroll
                for (int j = 1; j < kNAtoms; ++j) m = fmaxf(m, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
                row_max[i][h] = quad_max(m);
                grows |= row_max[i][h] > reference[i][h] + slack;
            }
        if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
            for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    // Row by row, so that a row's result does not depend on its neighbours.
                    if (!(row_max[i][h] > reference[i][h] + slack)) continue;
                    const float factor = exp2_fast((reference[i][h] - row_max[i][h]) * scale_log2);
                    reference[i][h] = row_max[i][h];
                    sum[i][h] *= factor;
#pragma unroll
                    for (int j = 0; j < kDAtoms; ++j) {
                        o[i][j][2 * h] *= factor;
                        o[i][j][2 * h + 1] *= factor;
                    }
                }
        }
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // A row that has seen nothing yet has reference -inf; its scores are -inf and must become 0, not NaN.
                const float offset = reference[i][h] == -INFINITY ? 0.0f : reference[i][h] * scale_log2;
#pragma unroll
                for (int j = 0; j < kNAtoms; ++j)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) {
                        s[i][j][e] = exp2_fast(fmaf(s[i][j][e], scale_log2, -offset));
                        sum[i][h] += s[i][j][e];
                    }
            }
    }

    __device__ void finish() {
#pragma unroll
        for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) sum[i][h] = quad_sum(sum[i][h]);
    }
    __device__ float lse(int i, int h) const {
        return sum[i][h] == 0.0f ? -INFINITY : (reference[i][h] * scale_log2) * kLn2 + __logf(sum[i][h]);
    }
};

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(ForwardConfig(cuda::decode_variant(kVariantCode)).threads,
                                  ForwardConfig(cuda::decode_variant(kVariantCode)).ctas_per_sm)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ TileOrder order) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr ForwardConfig kConfig(V);
    constexpr int kD = V.head_dim, kM = V.block_m, kN = V.block_n, kStages = V.stages;
    constexpr int kThreads = kConfig.threads, kRows = kConfig.rows;
    constexpr int kMAtoms = kConfig.m_atoms, kNAtoms = kConfig.n_atoms, kDAtoms = kConfig.d_atoms;
    constexpr bool kGeneral = V.features != Features::plain;
    // V's copies are spread over the product before: in one burst they would hold up its operands. (The other head dims have
    // no registers for it.)
    constexpr bool kSpreadsV = kStages == 1 && kD == 256 && !kGeneral;
    extern __shared__ __align__(128) unsigned char smem[];

    const TileIndex index = order.at(blockIdx.x);
    const int batch = static_cast<int>(index.head / p.size.num_heads);
    const int head = static_cast<int>(index.head % p.size.num_heads);
    const Sequence seq = sequence_of(p, batch);
    const int64_t q_begin = static_cast<int64_t>(index.tile) * kM;
    if (q_begin >= seq.rows_q) return;
    MaskParams mask_params = p.mask;
    if constexpr (V.mask == MaskClass::full) mask_params.window_left = mask_params.window_right = -1;
    const BandMask mask = seq.mask(mask_params);
    const Band band(mask);
    const IndexRange keys = mask.key_range(q_begin, q_begin + kM);
    const int tile_begin = keys.empty() ? 0 : static_cast<int>(keys.begin / kN);
    const int tile_end = keys.empty() ? 0 : static_cast<int>((keys.end + kN - 1) / kN);

    const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int q0 = static_cast<int>(q_begin) + warp * kRows;  // this warp's first query

    const uint32_t q_smem = smem_address(smem);
    const uint32_t k_smem = q_smem + kConfig.q_bytes;
    const uint32_t v_smem = k_smem + kStages * kConfig.kv_bytes;
    const Operand q_in(p.q, batch, seq.q_row + q_begin, head);
    const int kv_head = head / (p.size.num_heads / p.size.num_heads_k);
    const Operand k_in(p.k, batch, seq.k_row, kv_head);
    const Operand v_in(p.v, batch, seq.k_row, kv_head);

    const auto load_k = [&](int tile, int stage) {
        load_tile<kN, kD, kThreads, !kGeneral>(k_smem + stage * kConfig.kv_bytes, k_in.row(static_cast<int64_t>(tile) * kN),
                                               k_in.row_stride, band.seqlen_k - tile * kN, p.size.head_dim,
                                               k_in.aligned(p.size.head_dim), thread);
    };
    const auto load_v = [&](int tile, int stage) {
        load_tile<kN, kD, kThreads, !kGeneral>(v_smem + stage * kConfig.kv_bytes, v_in.row(static_cast<int64_t>(tile) * kN),
                                               v_in.row_stride, band.seqlen_k - tile * kN, p.size.head_dim_v,
                                               v_in.aligned(p.size.head_dim_v), thread);
    };

    float o[kMAtoms][kDAtoms][4];
    clear(o);
    const ScoreFunctionOf<V.features> score(p, seq, batch, head);
    OnlineSoftmax<kMAtoms> softmax(score.unit_log2(p));

    if (tile_begin < tile_end) {
        load_tile<kM, kD, kThreads, !kGeneral>(q_smem, q_in.data, q_in.row_stride, static_cast<int>(seq.seqlen_q - q_begin),
                                               p.size.head_dim, q_in.aligned(p.size.head_dim), thread);
        load_k(tile_end - 1, 0);
        if constexpr (kStages > 1) {
            load_v(tile_end - 1, 0);
            cp_async_commit();
#pragma unroll
            for (int ahead = 1; ahead < kStages - 1; ++ahead) {
                if (tile_end - 1 - ahead >= tile_begin) {
                    load_k(tile_end - 1 - ahead, ahead);
                    load_v(tile_end - 1 - ahead, ahead);
                }
                cp_async_commit();
            }
        } else {
            cp_async_commit();
            load_v(tile_end - 1, 0);
            cp_async_commit();
        }
    }

    const auto q_operand = FragmentAddress<kD>::rows_first(q_smem, lane, warp * kRows);
    int stage = 0;
    for (int tile = tile_end - 1; tile >= tile_begin; --tile) {
        if constexpr (kStages > 1) {
            cp_async_wait<kStages - 2>();
            __syncthreads();  // tile's K and V have landed; everyone is done with tile + 1, whose buffers are refilled
            const int next = tile - (kStages - 1);
            if (next >= tile_begin) {
                const int free_stage = stage == 0 ? kStages - 1 : stage - 1;
                load_k(next, free_stage);
                load_v(next, free_stage);
            }
            cp_async_commit();
        } else {
            if (tile == tile_end - 1) {
                cp_async_wait<1>();
                __syncthreads();  // Q and K have landed
            } else {
                cp_async_wait<0>();
                __syncthreads();  // K has landed; everyone is done with the last V
                if constexpr (!kSpreadsV) {
                    load_v(tile, 0);
                    cp_async_commit();
                }
            }
        }

        const int k0 = tile * kN;
        const bool works = V.mask == MaskClass::full || band.any_visible(q0, kRows, k0, kN);
        BiasAhead<kMAtoms, kNAtoms> bias;
        if constexpr (V.features == Features::biased) {
            if (works) score.ask_bias(bias, {q0 + lane / 4, k0 + 2 * (lane % 4)});
        }
        float s[kMAtoms][kNAtoms][4];
        const auto k_operand = FragmentAddress<kD>::chunks_first(k_smem + stage * kConfig.kv_bytes, lane);
        if constexpr (kSpreadsV) {
            constexpr int kCopies = kN * kD / 8 / kThreads, kPerStep = (kCopies + kD / 32 - 1) / (kD / 32);
            const bool wanted = tile != tile_end - 1;
            const bool spread = wanted && works && k0 + kN <= band.seqlen_k && p.size.head_dim_v == kD;
            if (wanted && !spread) load_v(tile, 0);
            if (works) {
                const uint16_t* const v_rows = v_in.row(k0);
                multiply<V.dtype, true, kMAtoms, kNAtoms, kD / 16>(
                    s, a_rows<kMAtoms>(q_operand), b_rows(k_operand), [&](int k) {
#pragma unroll
                        for (int n = k * kPerStep; n < (k + 1) * kPerStep && n < kCopies; ++n) {
                            if (spread) copy_part<kN, kD, kThreads>(v_smem, v_rows, v_in.row_stride, n, thread);
                        }
                    });
            }
            if (wanted) cp_async_commit();
        } else if (works) {
            multiply<V.dtype, true, kMAtoms, kNAtoms, kD / 16>(s, a_rows<kMAtoms>(q_operand), b_rows(k_operand));
        }
        if constexpr (kStages == 1) {
            cp_async_wait<0>();
            __syncthreads();  // V has landed; everyone is done with this K
            if (tile > tile_begin) load_k(tile - 1, 0);
            cp_async_commit();
        }
        if (works) {
            const FragmentOrigin<false> origin{q0 + lane / 4, k0 + 2 * (lane % 4)};
            if constexpr (kGeneral) score.apply(s, origin, bias);
            if (!band.all_visible(q0, kRows, k0, kN)) apply_mask(s, band, origin, -INFINITY);
            softmax.update(s, o);
            if constexpr (kGeneral) {
                if (p.dropout.enabled()) {
                    for_each_kept(s, p.dropout, p.mask, static_cast<uint32_t>(index.head), origin,
                                  [](float& x, bool kept) { x = kept ? x : 0.0f; });
                }
            }
            uint32_t probability[kMAtoms][kNAtoms][2];
            pack_fragments<V.dtype>(probability, s);
            const auto v_operand = FragmentAddress<kD>::rows_first(v_smem + stage * kConfig.kv_bytes, lane);
            multiply<V.dtype, false, kMAtoms, kDAtoms, kN / 16>(o, a_registers(probability), b_columns<1>(v_operand));
        }
        if constexpr (kStages > 1) stage = stage == kStages - 1 ? 0 : stage + 1;
    }

    softmax.finish();
    const float rescale = kGeneral && p.dropout.enabled() ? p.dropout.rescale : 1.0f;
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = q0 + 16 * i + 8 * h + lane / 4;
            const bool live = row < seq.seqlen_q && softmax.sum[i][h] != 0.0f;
            const float factor = live ? rescale / softmax.sum[i][h] : 0.0f;
#pragma unroll
            for (int j = 0; j < kDAtoms; ++j)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; ++e) o[i][j][e] = live ? o[i][j][e] * factor : 0.0f;
            if (p.lse && lane % 4 == 0 && row < seq.rows_q) {
                p.lse.data[batch * p.lse.batch_stride + head * p.lse.head_stride + seq.q_row + row] =
                    live ? softmax.lse(i, h) : -INFINITY;
            }
        }

    // The Q tile is free, and every warp reads back only the rows it wrote.
    const Result out(p.out, p.out_dtype, batch, seq.q_row + q0, head);
    store_rows<V.dtype, kD, kRows, !kGeneral>(o, q_smem + warp * kRows * kD * 2, out, static_cast<int>(seq.rows_q) - q0,
                                              p.size.head_dim_v, false, lane);
}

}  // namespace strobe::sm80
