// One forward call on the stream.
#pragma once

#include "cuda/common/launch.hpp"
#include "cuda/sm80/forward_kernel.cuh"
#include "cuda/sm80/simt/forward.cuh"
#include "cuda/sm80/tf32/forward.cuh"

namespace strobe::sm80 {

template <Variant V>
    requires(V.dtype != DType::f32)
cudaError_t launch(const ForwardParams& p, const cuda::LaunchContext& context) {
    constexpr ForwardConfig kConfig(V);
    constexpr int kSmemBytes = kConfig.smem_bytes + column_bytes(V);
    const auto kernel = forward_kernel<cuda::encode_variant(V)>;
    const int64_t heads = static_cast<int64_t>(p.size.batch) * p.size.num_heads;
    const int64_t tiles = (p.size.seqlen_q + V.block_m - 1) / V.block_m;
    const int64_t head_bytes = 2 * p.size.seqlen_k * V.head_dim * 2 * p.size.num_heads_k / p.size.num_heads;
    const TileOrder order = TileOrder::make(heads, tiles, head_bytes, p.mask.is_band(), true);
    if (order.size() == 0) return cudaSuccess;
    if (const cudaError_t e = cuda::allow_dynamic_smem(kernel, kSmemBytes); e != cudaSuccess) return e;
    kernel<<<static_cast<unsigned>(order.size()), kConfig.threads, kSmemBytes, context.stream>>>(p, order);
    return cudaGetLastError();
}

template <Variant V>
    requires(V.dtype == DType::f32)
cudaError_t launch(const ForwardParams& p, const cuda::LaunchContext& context) {
    if constexpr (uses_tf32(V)) {
        return tf32::launch_forward<V>(p, context);
    } else {
        return simt::launch_forward<V>(p, context);
    }
}

}  // namespace strobe::sm80
