// One backward call on the stream: row statistics, the main kernel, then dQ (conversion or its own pass) and the bias
// gradient.
#pragma once

#include "cuda/common/launch.hpp"
#include "cuda/sm80/backward_bias.cuh"
#include "cuda/sm80/backward_kernel.cuh"
#include "cuda/sm80/backward_query.cuh"
#include "cuda/sm80/simt/backward.cuh"
#include "cuda/sm80/tf32/backward.cuh"

namespace strobe::sm80 {

template <Variant V>
    requires(V.dtype != DType::f32)
cudaError_t launch(const BackwardParams& p, const cuda::LaunchContext& context) {
    constexpr uint64_t kCode = cuda::encode_variant(V);
    constexpr BackwardConfig kConfig(V);
    constexpr BiasGradientConfig kBias(V);
    const cudaStream_t stream = context.stream;
    const BackwardWorkspace ws = BackwardWorkspace::make(p, V);
    // Tiled rows have no deterministic mode.
    constexpr bool kHasQueryPass = !takes_turns(V) && V.features != Features::tiled;
    if (!ws.dq && !kHasQueryPass) return cudaErrorInvalidValue;
    const int64_t heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads;
    const auto blocks = [](int64_t rows, int64_t block) { return (rows + block - 1) / block; };
    const int64_t head_y = heads < 32768 ? heads : 32768;
    const dim3 row_grid(static_cast<unsigned>(blocks(p.size.seqlen_q, V.block_m)), static_cast<unsigned>(head_y),
                        static_cast<unsigned>(head_y > 0 ? blocks(heads, head_y) : 0));
    const bool has_queries = heads > 0 && p.size.seqlen_q > 0;

    if (has_queries) {
        backward_row_statistics<kCode><<<row_grid, kRowThreads, 0, stream>>>(p, ws);
    }

    const int64_t stream_bytes = p.size.seqlen_q * V.head_dim * (2 + 2 + 4) * p.size.num_heads / p.size.num_heads_k;
    const int64_t key_heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads_k;
    const int64_t key_tiles = blocks(p.size.seqlen_k, V.block_n);
    const bool in_turns = ws.turns && has_queries, band = p.mask.is_band();
    const int64_t resident_ctas = int64_t{context.num_sms} * kConfig.ctas_per_sm;
    const KeyTileOrder key_order =
        in_turns ? KeyTileOrder::in_turns(key_heads, key_tiles, stream_bytes, band, resident_ctas)
                 : KeyTileOrder{TileOrder::make(key_heads, key_tiles, stream_bytes, band, false)};
    if (key_order.size() > 0) {
        auto kernel = backward_kernel<kCode, false>;
        if constexpr (takes_turns(V)) {
            if (in_turns) kernel = backward_kernel<kCode, true>;
        }
        if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kConfig.smem_bytes); e != cudaSuccess) return e;
        const auto ctas = static_cast<unsigned>(key_order.size());
        kernel<<<ctas, kConfig.threads, kConfig.smem_bytes, stream>>>(p, key_order, ws);
    }

    if (has_queries && ws.dq) {
        backward_convert_dq<kCode><<<row_grid, kConfig.threads, 0, stream>>>(p, ws);
    } else if (has_queries) {
        if constexpr (kHasQueryPass) {
            constexpr QueryGradientConfig kDq(V);
            const int64_t head_bytes = 2 * p.size.seqlen_k * V.head_dim * 2 * p.size.num_heads_k / p.size.num_heads;
            const TileOrder order =
                TileOrder::make(heads, blocks(p.size.seqlen_q, kDq.block_m), head_bytes, band, true);
            const auto kernel = backward_query_gradient<kCode>;
            if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kDq.smem_bytes); e != cudaSuccess) return e;
            const auto ctas = static_cast<unsigned>(order.size());
            kernel<<<ctas, kDq.kWarps * kWarpSize, kDq.smem_bytes, stream>>>(p, order, ws);
        }
    }

    if constexpr (V.features == Features::biased) {
        if (p.dbias && p.size.seqlen_q > 0 && p.size.seqlen_k > 0) {
            BiasGradientGrid grid = BiasGradientGrid::make(p, kBias.kBlockM, kBias.kBlockN);
            const auto kernel = backward_bias_gradient<kCode>;
            if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kBias.smem_bytes); e != cudaSuccess) return e;
            return grid.launch_all([&](dim3 ctas) {
                kernel<<<ctas, kBias.kWarps * kWarpSize, kBias.smem_bytes, stream>>>(p, grid, ws);
            });
        }
    }
    return cudaGetLastError();
}

template <Variant V>
    requires(V.dtype == DType::f32)
cudaError_t launch(const BackwardParams& p, const cuda::LaunchContext& context) {
    if constexpr (uses_tf32(V)) {
        return tf32::launch_backward<V>(p, context);
    } else {
        return simt::launch_backward<V>(p, context);
    }
}

}  // namespace strobe::sm80
