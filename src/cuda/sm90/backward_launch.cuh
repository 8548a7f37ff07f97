// Host side of the Hopper backward pass: row statistics, main
// kernel, conversion of dq, in one chain of dependent launches.
#pragma once

#include "cuda/common/launch.hpp"
#include "cuda/sm90/backward_kernel.cuh"
#include "cuda/sm90/backward_rows.cuh"
#include "cuda/sm90/ragged_tensor_map.hpp"

namespace strobe::sm90 {

namespace detail {

struct LaunchShape {
    dim3 grid;
    int threads = 0;
    int smem_bytes = 0;
    bool overlaps_upstream = false;  // may start before the kernel in front has finished; waits for it itself
    int cluster = 1;
};

template <typename... Args>
cudaError_t launch_chained(void (*kernel)(Args...), const LaunchShape& shape, cudaStream_t stream,
                           const Args&... args) {
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (shape.overlaps_upstream) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

/// A kernel around the main one, for `count` sequences from `first` on: in several launches where one grid has no room.
template <typename Kernel>
cudaError_t launch_rows(Kernel kernel, const dim3& tiles, int first, int count, bool overlaps_upstream,
                        cudaStream_t stream, const BackwardParams& p, BackwardLaunch args) {
    constexpr int kMostInAGrid = 65535;
    for (int done = 0; done < count; done += kMostInAGrid) {
        args.first_position = first + done;
        const int here = count - done < kMostInAGrid ? count - done : kMostInAGrid;
        const LaunchShape shape{dim3(tiles.x, tiles.y, static_cast<unsigned>(here)), kRowThreads, 0, overlaps_upstream};
        const cudaError_t status = launch_chained(kernel, shape, stream, p, args);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace detail

template <Variant V>
cudaError_t launch(const BackwardParams& params, const cuda::LaunchContext& context) {
    using C = BackwardConfig<V>;
    constexpr uint64_t kCode = cuda::encode_variant(V);
    const ProblemSize& n = params.size;
    if (n.batch == 0) return cudaSuccess;
    const BackwardWorkspace layout = backward_workspace(V, params);
    BackwardParams p = params;
    char* const workspace = static_cast<char*>(p.workspace);

    BackwardLaunch args;
    args.schedule = backward_schedule(V, p);
    if (args.schedule.whole_heads) p.deterministic = false;  // there is no order to keep
    args.scale_log2 = p.score.softmax_scale * kLog2E;
    args.stats = reinterpret_cast<float*>(workspace + layout.stats_offset);
    args.dq = reinterpret_cast<float*>(workspace + layout.dq_offset);
    args.private_tiles = layout.private_tiles;
    args.semaphore = reinterpret_cast<int32_t*>(workspace + layout.semaphore_offset);
    args.counter = reinterpret_cast<int32_t*>(workspace + layout.counter_offset);
    args.tiles = layout.tiles;
    args.finished = reinterpret_cast<int32_t*>(workspace + layout.finished_offset);
    args.parts = reinterpret_cast<float4*>(workspace + layout.parts_offset);

    const int64_t batch_q = p.seqlens.cu_seqlens_q ? 1 : n.batch;
    const int64_t batch_k = p.seqlens.cu_seqlens_k ? 1 : n.batch;
    const int64_t rows_q = p.seqlens.cu_seqlens_q ? n.total_q : n.seqlen_q;
    const int64_t rows_k = p.seqlens.cu_seqlens_k ? n.total_k : n.seqlen_k;
    const auto map = [&](CUtensorMap& m, const TensorRef& tensor, const cuda::RaggedExtents& extents, int box_rows) {
        // Of an empty tensor nothing is ever loaded; any valid address will do.
        TensorRef t = tensor;
        if (!t) t.data = p.workspace;
        return cuda::make_ragged_tensor_map(m, t, V.dtype, extents, box_rows);
    };
    cudaError_t status = map(args.q, p.q, {n.head_dim, n.seqlen_q, n.num_heads, rows_q, batch_q}, V.block_m);
    if (status == cudaSuccess) {
        status = map(args.k, p.k, {n.head_dim, n.seqlen_k, n.num_heads_k, rows_k, batch_k}, C::kBlockN);
    }
    if (status == cudaSuccess) {
        status = map(args.v, p.v, {n.head_dim_v, n.seqlen_k, n.num_heads_k, rows_k, batch_k}, C::kBlockN);
    }
    if (status == cudaSuccess) {
        status = map(args.dout, p.dout, {n.head_dim_v, n.seqlen_q, n.num_heads, rows_q, batch_q}, V.block_m);
    }
    if (status != cudaSuccess) return status;

    args.bulk_add = C::kBulkAdd && bulk_add_pays(V, p);
    // The row workers have no registers for other types than the usual.
    const int ends = outer_heads(args.schedule);
    const bool usual_types = p.out_dtype == V.dtype && p.grad_dtype == V.dtype;
    if (C::kInnerRows && usual_types && !p.deterministic && !args.schedule.whole_heads && args.schedule.heads > ends &&
        inner_rows_pay(V, p)) {
        const cuda::RaggedExtents rows{n.head_dim_v, n.seqlen_q, n.num_heads, rows_q, batch_q};
        args.inner_rows = map(args.dout_rows, p.dout, rows, C::kRowBufferRows) == cudaSuccess &&
                          map(args.out, p.out, rows, C::kRowBufferRows) == cudaSuccess;
    }
    if (args.inner_rows) {
        args.first_inner_head = ends;
        args.inner_conversions = args.schedule.heads - ends;
        args.ready = reinterpret_cast<int32_t*>(workspace + layout.progress_offset);
        args.done = args.ready + args.schedule.heads;
    }

    if (C::kOwnStatistics && args.schedule.whole_heads && args.schedule.claim_tiles == 1 &&
        args.schedule.work_tiles > 0 && p.out_dtype == V.dtype) {
        const cuda::RaggedExtents rows{n.head_dim_v, n.seqlen_q, n.num_heads, rows_q, batch_q};
        args.own_statistics = map(args.out, p.out, rows, C::kBlockM / 2) == cudaSuccess;
    }

    if (!args.own_statistics && longest_first(V, p) && n.batch <= kMostOrderedSequences) {
        int32_t* const sequences = reinterpret_cast<int32_t*>(workspace + layout.sequences_offset);
        args.schedule.sequences = sequences;
        const detail::LaunchShape one{dim3(1), kRowThreads, 0, false};
        status = detail::launch_chained(backward_order_sequences<kCode>, one, context.stream, p, sequences);
        if (status != cudaSuccess) return status;
    }

    const auto tiles = [&](int rows) {
        const int64_t count = ceil_div(n.seqlen_q, rows);
        return dim3(static_cast<unsigned>(count > 0 ? count : 1), static_cast<unsigned>(n.num_heads));
    };
    const int first_batches = args.inner_rows ? static_cast<int>(ceil_div(ends, n.num_heads_k)) : n.batch;
    if (!args.own_statistics) {
        status = detail::launch_rows(backward_row_stats<kCode>, tiles(C::kBlockM), 0, first_batches, false,
                                     context.stream, p, args);
    }
    if (status != cudaSuccess) return status;

    if (args.schedule.work_tiles > 0) {
        constexpr int kSmemBytes = sizeof(BackwardSmem<V>);
        static_assert(kSmemBytes <= 227 * 1024);
        status = cuda::allow_dynamic_smem(backward_kernel<kCode>, kSmemBytes);
        if (status != cudaSuccess) return status;
        const int room = context.num_sms < C::kCtas ? 1 : context.num_sms / C::kCtas;
        const int work = args.schedule.work_tiles / args.schedule.claim_tiles;
        // Of a machine with more SMs than that, some have no memory of their own.
        const int most = args.schedule.whole_heads && machine_tiles(V) < room ? machine_tiles(V) : room;
        const int ctas = C::kCtas * (work < most ? work : most);
        const detail::LaunchShape main{dim3(static_cast<unsigned>(ctas)), C::kThreads, kSmemBytes, !args.own_statistics,
                                       C::kCtas};
        status = detail::launch_chained(backward_kernel<kCode>, main, context.stream, p, args);
        if (status != cudaSuccess) return status;
    }
    if (args.schedule.whole_heads) return cudaSuccess;
    const int first_last = args.inner_conversions / static_cast<int>(n.num_heads_k);
    return detail::launch_rows(backward_convert_dq<kCode>, tiles(64), first_last, n.batch - first_last, true,
                               context.stream, p, args);
}

}  // namespace strobe::sm90
