// The fp32 forward: one CTA per (query tile, head, batch) over the key tiles that its queries see.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/sm80/schedule.hpp"
#include "cuda/sm80/simt/score.cuh"
#include "cuda/sm80/simt/tile.cuh"

namespace strobe::sm80::simt {

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(SimtConfig::kThreads)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ TileOrder order) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr SimtConfig kConfig(V);
    constexpr int kRows = kConfig.rows, kCols = kConfig.cols, kD = V.head_dim;
    constexpr int kSide = SimtConfig::kSide, kI = kRows / kSide, kJ = kCols / kSide;
    extern __shared__ __align__(128) float smem[];
    float* const q_tile = smem;
    float* const kv_tile = q_tile + kConfig.operand_floats(kRows);
    float* const weights = kv_tile + kConfig.operand_floats(kCols);

    const TileIndex index = order.at(blockIdx.x);
    const int batch = static_cast<int>(index.head / p.size.num_heads), head = static_cast<int>(index.head % p.size.num_heads);
    const Sequence seq = sequence_of(p, batch);
    const int64_t q_begin = static_cast<int64_t>(index.tile) * kRows;
    if (q_begin >= seq.rows_q) return;
    const int kv_head = head / (p.size.num_heads / p.size.num_heads_k);
    const Place at;
    const ElementScore score(p, seq, batch, head);

    float reference[kI], sum[kI];
#pragma unroll
    for (int i = 0; i < kI; ++i) reference[i] = -INFINITY, sum[i] = 0.0f;
    RowSums<kD, kI> out;

    load_rows<kRows, kD>(q_tile, Rows(p.q, batch, seq.q_row + q_begin, head), seq.seqlen_q - q_begin, p.size.head_dim);
    const IndexRange keys = score.mask.key_range(q_begin, q_begin + kRows);
    for (int64_t k_begin = keys.begin / kCols * kCols; k_begin < keys.end; k_begin += kCols) {
        __syncthreads();  // everyone is done with the last values
        load_rows<kCols, kD>(kv_tile, Rows(p.k, batch, seq.k_row + k_begin, kv_head), seq.seqlen_k - k_begin, p.size.head_dim);
        __syncthreads();
        float s[kI][kJ];
        dot_rows<kD>(s, q_tile, kv_tile, at);
        __syncthreads();  // everyone is done with the keys
        load_rows<kCols, kD>(kv_tile, Rows(p.v, batch, seq.k_row + k_begin, kv_head), seq.seqlen_k - k_begin, p.size.head_dim_v);
#pragma unroll
        for (int i = 0; i < kI; ++i) {
            const int64_t query = q_begin + at.y + kSide * i;
            float largest = -INFINITY;
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                s[i][j] = score(s[i][j], query, k_begin + at.x + kSide * j).value;
                largest = fmaxf(largest, s[i][j]);
            }
            const float next = fmaxf(reference[i], row_max(largest));
            const float factor = next == reference[i] ? 1.0f : expf(reference[i] - next);
            reference[i] = next;
            sum[i] *= factor;
            if (factor != 1.0f) out.scale(i, factor);
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                const int64_t key = k_begin + at.x + kSide * j;
                const float probability = s[i][j] == -INFINITY ? 0.0f : expf(s[i][j] - next);
                sum[i] += probability;
                weights[(at.y + kSide * i) * (kCols + SimtConfig::kPadding) + at.x + kSide * j] =
                    score.kept(query, key) ? probability : 0.0f;
            }
        }
        __syncthreads();
        out.template add<kCols>(weights, kv_tile, at);
    }

    const Rows result(p.out, batch, seq.q_row, head);
#pragma unroll
    for (int i = 0; i < kI; ++i) {
        const int64_t row = q_begin + at.y + kSide * i;
        const float total = row_sum(sum[i]);
        if (row >= seq.rows_q) continue;
        const bool live = row < seq.seqlen_q && total != 0.0f;
        out.store(i, result.row(row), live ? p.dropout.rescale / total : 0.0f, p.size.head_dim_v, false, at);
        if (p.lse && at.x == 0) {
            p.lse.data[batch * p.lse.batch_stride + head * p.lse.head_stride + seq.q_row + row] =
                live ? reference[i] + logf(total) : -INFINITY;
        }
    }
}

template <Variant V>
cudaError_t launch_forward(const ForwardParams& p, const cuda::LaunchContext& context) {
    constexpr SimtConfig kConfig(V);
    const auto kernel = forward_kernel<cuda::encode_variant(V)>;
    const TileOrder order = TileOrder::make(static_cast<int64_t>(p.size.batch) * p.size.num_heads,
                                            (p.size.seqlen_q + kConfig.rows - 1) / kConfig.rows,
                                            2 * p.size.seqlen_k * V.head_dim * 4, p.mask.is_band(), true);
    if (order.size() == 0) return cudaSuccess;
    if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kConfig.smem_bytes); e != cudaSuccess) return e;
    kernel<<<static_cast<unsigned>(order.size()), SimtConfig::kThreads, kConfig.smem_bytes, context.stream>>>(p, order);
    return cudaGetLastError();
}

}  // namespace strobe::sm80::simt
