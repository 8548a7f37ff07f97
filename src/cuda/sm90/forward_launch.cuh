// Host side of the forward kernel: tensor maps, schedule, grid.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/common/dynamic_smem.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/common/tensor_map.hpp"
#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/forward_workspace.hpp"

namespace strobe::sm90 {

/// Zeroes the tile counter while the forward kernel starts.
static __global__ void reset_tile_counter(unsigned* counter) {
    release_downstream_kernel();
    *counter = 0;
}

template <Variant V>
cudaError_t launch(const ForwardParams& p, const cuda::LaunchContext& context) {
    using Config = ForwardConfig<V>;
    const ProblemSize& size = p.size;
    const bool varlen_q = p.seqlens.cu_seqlens_q, varlen_k = p.seqlens.cu_seqlens_k;
    if (size.total_q == 0 || size.batch == 0) return cudaSuccess;

    const auto map = [&](CUtensorMap& m, const TensorRef& tensor, bool varlen, int64_t seqlen, int64_t total, int heads,
                         int dim, int rows) {
        // Without keys nothing is ever loaded; any valid address will do.
        TensorRef t = tensor;
        if (total == 0) t.data = p.q.data;
        return cuda::make_tensor_map(m, t, V.dtype, varlen ? 1 : size.batch, varlen ? total : seqlen, heads, dim,
                                     {rows, Config::kChunkCols, static_cast<cuda::Swizzle>(Config::kSpan)});
    };
    ForwardArgs args{};
    cudaError_t status = map(args.q_map, p.q, varlen_q, size.seqlen_q, size.total_q, size.num_heads, size.head_dim, 64);
    if (status == cudaSuccess) {
        status =
            map(args.k_map, p.k, varlen_k, size.seqlen_k, size.total_k, size.num_heads_k, size.head_dim, V.block_n);
    }
    if (status == cudaSuccess) {
        status =
            map(args.v_map, p.v, varlen_k, size.seqlen_k, size.total_k, size.num_heads_k, size.head_dim_v, V.block_n);
    }
    if (status == cudaSuccess && p.out_dtype == V.dtype) {
        status = map(args.out_map, p.out, varlen_q, size.seqlen_q, size.total_q, size.num_heads, size.head_dim_v, 16);
    }
    if (status != cudaSuccess) return status;

    args.params = p;
    args.heads_per_key_head = size.num_heads / size.num_heads_k;
    args.scale_log2 = p.score.softmax_scale * 1.4426950408889634f;
    args.clean_tails = varlen_k || p.seqlens.seqused_k;

    // Keys and values of a group of heads should stay in the L2 cache:
    // 50 MB, each half of which holds its own copy of what its SMs read.
    constexpr int64_t kL2Budget = int64_t{16} << 20;
    const int64_t head_bytes = std::max<int64_t>(size.seqlen_k, 1) * (size.head_dim + size.head_dim_v) * 2;
    const int64_t pairs = int64_t{size.batch} * size.num_heads;
    const int64_t blocks = (size.seqlen_q + V.block_m - 1) / V.block_m;
    ForwardSchedule& schedule = args.schedule;
    schedule.num_blocks = static_cast<int>(blocks);
    schedule.num_pairs = static_cast<int>(pairs);
    schedule.num_tiles = static_cast<int>(blocks * pairs);
    schedule.order.num_heads = size.num_heads;
    const int64_t groups = std::max<int64_t>(1, pairs / args.heads_per_key_head * head_bytes / kL2Budget);
    schedule.order.heads_per_group = static_cast<int>((pairs + groups - 1) / groups);
    schedule.order.longest_first = V.mask == MaskClass::band;
    // A varlen batch has at most as many tiles as if each sequence ended in a partial one.
    const int64_t most_tiles =
        varlen_q ? (size.total_q / V.block_m + size.batch) * size.num_heads : schedule.num_tiles;
    const int grid = static_cast<int>(std::min<int64_t>(most_tiles, int64_t{context.num_sms} * Config::kCtasPerSm));

    constexpr int kSmemBytes = sizeof(ForwardSmem<Config>);
    static_assert(kSmemBytes <= Config::kSmemBudget);
    constexpr auto kernel = forward_kernel<cuda::encode_variant(V)>;
    status = cuda::allow_dynamic_smem_once<kernel>(kSmemBytes, context.device);
    if (status != cudaSuccess) return status;

    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.attrs = &early;
    config.numAttrs = 1;
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(Config::kThreads);
    config.dynamicSmemBytes = kSmemBytes;
    config.stream = context.stream;
    // Where every tile has a worker of its own there is nothing to deal, nor a counter to clear.
    if (p.workspace && forward_workspace_bytes(p) > 0 && schedule.num_tiles > grid) {
        schedule.next_tile = static_cast<unsigned*>(p.workspace);
        reset_tile_counter<<<1, 1, 0, context.stream>>>(schedule.next_tile);
        status = cudaGetLastError();
        if (status != cudaSuccess) return status;
    } else {
        args.overlaps_upstream = true;
    }
    return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace strobe::sm90
