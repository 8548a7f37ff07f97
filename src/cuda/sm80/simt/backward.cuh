// The fp32 backward: a pass over the key tiles for dK and dV and a pass over the query tiles for dQ, each summed by one CTA in a
// fixed order. Nothing is added across CTAs, so every call is repeatable to the bit; the only workspace is delta.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/sm80/bias_gradient.cuh"
#include "cuda/sm80/schedule.hpp"
#include "cuda/sm80/simt/score.cuh"
#include "cuda/sm80/simt/tile.cuh"

namespace strobe::sm80::simt {

/// delta of all rows, (batch, heads, seqlen_q) or varlen (heads, total_q).
struct DeltaRows {
    float* data;
    int64_t batch_stride, head_stride;

    static DeltaRows make(const BackwardParams& p) {
        const bool varlen = p.seqlens.cu_seqlens_q != nullptr;
        const int64_t rows = varlen ? p.size.total_q : p.size.seqlen_q;
        return {static_cast<float*>(p.workspace), varlen ? 0 : rows * p.size.num_heads, rows};
    }
    __device__ float* rows(int batch, int head, int64_t first) const {
        return data + batch * batch_stride + head * head_stride + first;
    }
};

/// delta = rowsum(dout * out) - dlse, one warp a row.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(SimtConfig::kThreads)
    row_delta(const __grid_constant__ BackwardParams p, const __grid_constant__ DeltaRows delta) {
    const int64_t head_index = blockIdx.y + static_cast<int64_t>(blockIdx.z) * gridDim.y;
    if (head_index >= static_cast<int64_t>(p.size.batch) * p.size.num_heads) return;
    const int batch = static_cast<int>(head_index / p.size.num_heads), head = static_cast<int>(head_index % p.size.num_heads);
    const Sequence seq = sequence_of(p, batch);
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (SimtConfig::kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    if (row >= seq.seqlen_q) return;
    const float* const dout = Rows(p.dout, batch, seq.q_row + row, head).data;
    const float* const out = Rows(p.out, batch, seq.q_row + row, head).data;
    float sum = 0.0f;
    for (int d = lane; d < p.size.head_dim_v; d += kWarpSize) sum = fmaf(dout[d], out[d], sum);
#pragma unroll
    for (int n = 1; n < kWarpSize; n *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, n);
    if (lane != 0) return;
    if (p.dlse) sum -= p.dlse.data[batch * p.dlse.batch_stride + head * p.dlse.head_stride + seq.q_row + row];
    *delta.rows(batch, head, seq.q_row + row) = sum;
}

template <uint64_t kVariantCode>
cudaError_t launch_delta(const BackwardParams& p, const DeltaRows& delta, cudaStream_t stream) {
    const auto blocks = [](int64_t rows, int64_t block) { return (rows + block - 1) / block; };
    const int64_t heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads, head_y = heads < 32768 ? heads : 32768;
    if (heads == 0 || p.size.seqlen_q == 0) return cudaSuccess;
    const dim3 rows(static_cast<unsigned>(blocks(p.size.seqlen_q, SimtConfig::kThreads / kWarpSize)), static_cast<unsigned>(head_y),
                    static_cast<unsigned>(blocks(heads, head_y)));
    row_delta<kVariantCode><<<rows, SimtConfig::kThreads, 0, stream>>>(p, delta);
    return cudaGetLastError();
}

/// P and dS of one element. Hidden elements and rows that see nothing give zeros.
struct Gradient {
    float kept_probability = 0.0f;  // what multiplied v in the forward, before its rescaling
    float probability = 0.0f;
    float slope = 0.0f;
    bool kept = false;

    __device__ Gradient() {}
    __device__ Gradient(const ElementScore& score, float dot, int64_t query, int64_t key, const float* lse) {
        const Score s = score(dot, query, key);
        if (s.value == -INFINITY || lse[query] == -INFINITY) return;
        probability = expf(s.value - lse[query]);
        slope = s.slope;
        kept = score.kept(query, key);
        kept_probability = kept ? probability : 0.0f;
    }
    /// d loss / d score, through the softcap or in front of it.
    __device__ float of_score(float dp, const Dropout& dropout, float delta) const {
        if (probability == 0.0f) return 0.0f;
        return probability * ((kept ? dp * dropout.rescale : 0.0f) - delta);
    }
    __device__ float of_dot(float dp, const Dropout& dropout, float delta) const { return slope * of_score(dp, dropout, delta); }
};

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(SimtConfig::kThreads)
    key_gradient(const __grid_constant__ BackwardParams p, const __grid_constant__ TileOrder order,
                 const __grid_constant__ DeltaRows delta) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr SimtConfig kConfig(V);
    constexpr int kRows = kConfig.rows, kCols = kConfig.cols, kD = V.head_dim;
    constexpr int kSide = SimtConfig::kSide, kI = kRows / kSide, kJ = kCols / kSide, kScoreStride = kCols + SimtConfig::kPadding;
    extern __shared__ __align__(128) float smem[];
    float* const k_tile = smem;
    float* const v_tile = k_tile + kConfig.operand_floats(kRows);
    float* const query_tile = v_tile + kConfig.operand_floats(kRows);
    float* const weights = query_tile + kConfig.operand_floats(kCols);

    const TileIndex index = order.at(blockIdx.x);
    const int batch = static_cast<int>(index.head / p.size.num_heads_k), kv_head = static_cast<int>(index.head % p.size.num_heads_k);
    const int group = p.size.num_heads / p.size.num_heads_k;
    const Sequence seq = sequence_of(p, batch);
    const int64_t k_begin = static_cast<int64_t>(index.tile) * kRows;
    if (k_begin >= seq.rows_k) return;
    const Place at;

    load_rows<kRows, kD>(k_tile, Rows(p.k, batch, seq.k_row + k_begin, kv_head), seq.seqlen_k - k_begin, p.size.head_dim);
    load_rows<kRows, kD>(v_tile, Rows(p.v, batch, seq.k_row + k_begin, kv_head), seq.seqlen_k - k_begin, p.size.head_dim_v);
    RowSums<kD, kI> dk, dv;
    const IndexRange queries = seq.mask(p.mask).query_range(k_begin, k_begin + kRows);
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const ElementScore score(p, seq, batch, head);
        const float* const lse = p.lse.data + batch * p.lse.batch_stride + head * p.lse.head_stride + seq.q_row;
        const float* const deltas = delta.rows(batch, head, seq.q_row);
        for (int64_t q_begin = queries.begin / kCols * kCols; q_begin < queries.end; q_begin += kCols) {
            const Rows q(p.q, batch, seq.q_row + q_begin, head), dout(p.dout, batch, seq.q_row + q_begin, head);
            const int64_t valid = seq.seqlen_q - q_begin;
            __syncthreads();  // everyone is done with the last queries
            load_rows<kCols, kD>(query_tile, q, valid, p.size.head_dim);
            __syncthreads();
            float s[kI][kJ], dp[kI][kJ];
            dot_rows<kD>(s, k_tile, query_tile, at);
            __syncthreads();  // everyone is done with the queries
            load_rows<kCols, kD>(query_tile, dout, valid, p.size.head_dim_v);
            Gradient gradient[kI][kJ];
#pragma unroll
            for (int i = 0; i < kI; ++i)
#pragma unroll
                for (int j = 0; j < kJ; ++j) {
                    const int row = at.y + kSide * i, col = at.x + kSide * j;
                    gradient[i][j] = Gradient(score, s[i][j], q_begin + col, k_begin + row, lse);
                    weights[row * kScoreStride + col] = gradient[i][j].kept_probability;
                }
            __syncthreads();
            dot_rows<kD>(dp, v_tile, query_tile, at);
            dv.template add<kCols>(weights, query_tile, at);
            __syncthreads();  // everyone is done with dout and P
            load_rows<kCols, kD>(query_tile, q, valid, p.size.head_dim);
#pragma unroll
            for (int i = 0; i < kI; ++i)
#pragma unroll
                for (int j = 0; j < kJ; ++j) {
                    const int row = at.y + kSide * i, col = at.x + kSide * j;
                    const float d = q_begin + col < seq.seqlen_q ? deltas[q_begin + col] : 0.0f;
                    weights[row * kScoreStride + col] = gradient[i][j].of_dot(dp[i][j], p.dropout, d);
                }
            __syncthreads();
            dk.template add<kCols>(weights, query_tile, at);
        }
    }

    const Rows dk_out(p.dk, batch, seq.k_row, kv_head), dv_out(p.dv, batch, seq.k_row, kv_head);
#pragma unroll
    for (int i = 0; i < kI; ++i) {
        const int64_t row = k_begin + at.y + kSide * i;
        if (row >= seq.rows_k) continue;
        const bool live = row < seq.seqlen_k;
        dk.store(i, dk_out.row(row), live ? p.score.softmax_scale : 0.0f, p.size.head_dim, p.accumulate, at);
        dv.store(i, dv_out.row(row), live ? p.dropout.rescale : 0.0f, p.size.head_dim_v, p.accumulate, at);
    }
}

template <uint64_t kVariantCode>
__global__ void __launch_bounds__(SimtConfig::kThreads)
    query_gradient(const __grid_constant__ BackwardParams p, const __grid_constant__ TileOrder order,
                   const __grid_constant__ DeltaRows delta) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr SimtConfig kConfig(V);
    constexpr int kRows = kConfig.rows, kCols = kConfig.cols, kD = V.head_dim;
    constexpr int kSide = SimtConfig::kSide, kI = kRows / kSide, kJ = kCols / kSide, kScoreStride = kCols + SimtConfig::kPadding;
    extern __shared__ __align__(128) float smem[];
    float* const q_tile = smem;
    float* const dout_tile = q_tile + kConfig.operand_floats(kRows);
    float* const key_tile = dout_tile + kConfig.operand_floats(kRows);
    float* const weights = key_tile + kConfig.operand_floats(kCols);

    const TileIndex index = order.at(blockIdx.x);
    const int batch = static_cast<int>(index.head / p.size.num_heads), head = static_cast<int>(index.head % p.size.num_heads);
    const Sequence seq = sequence_of(p, batch);
    const int64_t q_begin = static_cast<int64_t>(index.tile) * kRows;
    if (q_begin >= seq.rows_q) return;
    const int kv_head = head / (p.size.num_heads / p.size.num_heads_k);
    const Place at;
    const ElementScore score(p, seq, batch, head);
    const float* const lse = p.lse.data + batch * p.lse.batch_stride + head * p.lse.head_stride + seq.q_row;
    const float* const deltas = delta.rows(batch, head, seq.q_row);

    const int64_t valid = seq.seqlen_q - q_begin;
    load_rows<kRows, kD>(q_tile, Rows(p.q, batch, seq.q_row + q_begin, head), valid, p.size.head_dim);
    load_rows<kRows, kD>(dout_tile, Rows(p.dout, batch, seq.q_row + q_begin, head), valid, p.size.head_dim_v);
    RowSums<kD, kI> dq;
    const IndexRange keys = score.mask.key_range(q_begin, q_begin + kRows);
    for (int64_t k_begin = keys.begin / kCols * kCols; k_begin < keys.end; k_begin += kCols) {
        const Rows k(p.k, batch, seq.k_row + k_begin, kv_head), v(p.v, batch, seq.k_row + k_begin, kv_head);
        __syncthreads();  // everyone is done with the last keys and dS
        load_rows<kCols, kD>(key_tile, v, seq.seqlen_k - k_begin, p.size.head_dim_v);
        __syncthreads();
        float s[kI][kJ], dp[kI][kJ];
        dot_rows<kD>(dp, dout_tile, key_tile, at);
        __syncthreads();  // everyone is done with the values
        load_rows<kCols, kD>(key_tile, k, seq.seqlen_k - k_begin, p.size.head_dim);
        __syncthreads();
        dot_rows<kD>(s, q_tile, key_tile, at);
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                const int row = at.y + kSide * i, col = at.x + kSide * j;
                const Gradient gradient(score, s[i][j], q_begin + row, k_begin + col, lse);
                const float d = row < valid ? deltas[q_begin + row] : 0.0f;
                weights[row * kScoreStride + col] = gradient.of_dot(dp[i][j], p.dropout, d);
            }
        __syncthreads();
        dq.template add<kCols>(weights, key_tile, at);
    }

    const Rows result(p.dq, batch, seq.q_row, head);
#pragma unroll
    for (int i = 0; i < kI; ++i) {
        const int64_t row = q_begin + at.y + kSide * i;
        if (row >= seq.rows_q) continue;
        dq.store(i, result.row(row), row < seq.seqlen_q ? p.score.softmax_scale : 0.0f, p.size.head_dim, p.accumulate, at);
    }
}

/// One CTA per tile of the bias gradient, as in backward_bias.cuh.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(SimtConfig::kThreads)
    bias_gradient(const __grid_constant__ BackwardParams p, const __grid_constant__ BiasGradientGrid grid,
                  const __grid_constant__ DeltaRows delta) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr SimtConfig kConfig(V);
    constexpr int kRows = kConfig.rows, kCols = kConfig.cols, kD = V.head_dim;
    constexpr int kSide = SimtConfig::kSide, kI = kRows / kSide, kJ = kCols / kSide;
    extern __shared__ __align__(128) float smem[];
    float* const query_tile = smem;
    float* const key_tile = query_tile + kConfig.operand_floats(kRows);
    float* const sums = key_tile + kConfig.operand_floats(kCols);
    const Place at;

    float sum[kI][kJ] = {};
    grid.for_each_item([&](int batch, int head, int q_tile, int k_tile) {
        const Sequence seq = sequence_of(p, batch);
        const int64_t q_begin = static_cast<int64_t>(q_tile) * kRows, k_begin = static_cast<int64_t>(k_tile) * kCols;
        if (q_begin >= seq.seqlen_q || k_begin >= seq.seqlen_k) return;
        const ElementScore score(p, seq, batch, head);
        const IndexRange keys = score.mask.key_range(q_begin, q_begin + kRows);
        if (keys.begin >= k_begin + kCols || keys.end <= k_begin) return;
        const int kv_head = head / (p.size.num_heads / p.size.num_heads_k);
        const int64_t q_valid = seq.seqlen_q - q_begin, k_valid = seq.seqlen_k - k_begin;
        float s[kI][kJ], dp[kI][kJ];
        __syncthreads();  // everyone is done with the last tiles
        load_rows<kRows, kD>(query_tile, Rows(p.q, batch, seq.q_row + q_begin, head), q_valid, p.size.head_dim);
        load_rows<kCols, kD>(key_tile, Rows(p.k, batch, seq.k_row + k_begin, kv_head), k_valid, p.size.head_dim);
        __syncthreads();
        dot_rows<kD>(s, query_tile, key_tile, at);
        __syncthreads();
        load_rows<kRows, kD>(query_tile, Rows(p.dout, batch, seq.q_row + q_begin, head), q_valid, p.size.head_dim_v);
        load_rows<kCols, kD>(key_tile, Rows(p.v, batch, seq.k_row + k_begin, kv_head), k_valid, p.size.head_dim_v);
        __syncthreads();
        dot_rows<kD>(dp, query_tile, key_tile, at);
        const float* const lse = p.lse.data + batch * p.lse.batch_stride + head * p.lse.head_stride + seq.q_row;
        const float* const deltas = delta.rows(batch, head, seq.q_row);
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                const int row = at.y + kSide * i, col = at.x + kSide * j;
                const Gradient gradient(score, s[i][j], q_begin + row, k_begin + col, lse);
                sum[i][j] += gradient.of_score(dp[i][j], p.dropout, row < q_valid ? deltas[q_begin + row] : 0.0f);
            }
    });
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int j = 0; j < kJ; ++j) sums[(at.y + kSide * i) * kCols + at.x + kSide * j] = sum[i][j];
    __syncthreads();
    grid.store(p, sums, SimtConfig::kThreads);
}

template <Variant V>
cudaError_t launch_backward(const BackwardParams& p, const cuda::LaunchContext& context) {
    constexpr uint64_t kCode = cuda::encode_variant(V);
    constexpr SimtConfig kConfig(V);
    constexpr int kRows = kConfig.rows, kThreads = SimtConfig::kThreads;
    const cudaStream_t stream = context.stream;
    const DeltaRows delta = DeltaRows::make(p);
    const int64_t heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads;
    const auto blocks = [](int64_t rows, int64_t block) { return (rows + block - 1) / block; };
    const bool band = p.mask.is_band();
    const bool has_queries = heads > 0 && p.size.seqlen_q > 0;

    if (const cudaError_t e = launch_delta<kCode>(p, delta, stream); e != cudaSuccess) return e;
    const TileOrder key_order = TileOrder::make(static_cast<int64_t>(p.size.batch) * p.size.num_heads_k,
                                                blocks(p.size.seqlen_k, kRows), 2 * p.size.seqlen_q * V.head_dim * 4, band, false);
    if (key_order.size() > 0) {
        const auto kernel = key_gradient<kCode>;
        if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kConfig.smem_bytes); e != cudaSuccess) return e;
        kernel<<<static_cast<unsigned>(key_order.size()), kThreads, kConfig.smem_bytes, stream>>>(p, key_order, delta);
    }
    if (has_queries) {
        const TileOrder order =
            TileOrder::make(heads, blocks(p.size.seqlen_q, kRows), 2 * p.size.seqlen_k * V.head_dim * 4, band, true);
        const auto kernel = query_gradient<kCode>;
        if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kConfig.smem_bytes); e != cudaSuccess) return e;
        kernel<<<static_cast<unsigned>(order.size()), kThreads, kConfig.smem_bytes, stream>>>(p, order, delta);
    }
    if (p.dbias && p.size.seqlen_q > 0 && p.size.seqlen_k > 0) {
        BiasGradientGrid grid = BiasGradientGrid::make(p, kRows, kConfig.cols);
        const auto kernel = bias_gradient<kCode>;
        if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kConfig.smem_bytes); e != cudaSuccess) return e;
        return grid.launch_all([&](dim3 ctas) {
            kernel<<<ctas, kThreads, kConfig.smem_bytes, stream>>>(p, grid, delta);
        });
    }
    return cudaGetLastError();
}

}  // namespace strobe::sm80::simt
