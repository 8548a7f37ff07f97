#include "cuda/companion.hpp"

#include <algorithm>

#include "core/numeric.hpp"

namespace strobe::cuda {
namespace {

constexpr int kThreads = 256, kWarpSize = 32, kRowsPerCta = kThreads / kWarpSize;
constexpr int64_t kMaxCtas = 1 << 20;

/// The parts travel with the launch: nothing is allocated or copied, and a captured graph keeps its own.
template <int kParts>
struct MergeArguments {
    int64_t rows, num_heads, head_dim_v, total_rows;
    int num_parts;
    PartialResult result;
    PartialResult parts[kParts];
};

/// One warp a row: it reads every part's lse before it writes
/// its own, and each column of every part before that column.
template <int kParts>
__global__ void __launch_bounds__(kThreads) merge_parts(const __grid_constant__ MergeArguments<kParts> a) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * kRowsPerCta;
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRowsPerCta + threadIdx.x / kWarpSize; n < a.total_rows;
         n += warps) {
        const int64_t row = n % a.rows, head = n / a.rows % a.num_heads, batch = n / a.rows / a.num_heads;
        const auto lse_of = [&](int part) {
            const RowRef& r = a.parts[part].lse;
            return r.data[batch * r.batch_stride + head * r.head_stride + row];
        };
        float largest = -INFINITY;
        bool seen = false;
        for (int part = 0; part < a.num_parts; ++part) {
            const float lse = lse_of(part);
            largest = fmaxf(largest, lse);
            seen |= lse != -INFINITY;
        }
        float sum = 0.0f;
        for (int part = 0; part < a.num_parts && seen; ++part) sum += expf(lse_of(part) - largest);
        const TensorRef& out = a.result.out;
        const int64_t to = batch * out.batch_stride + row * out.row_stride + head * out.head_stride;
        for (int64_t d = lane; d < a.head_dim_v; d += kWarpSize) {
            float x = 0.0f;
            for (int part = 0; part < a.num_parts && seen; ++part) {
                const float weight = expf(lse_of(part) - largest);
                if (weight == 0.0f) continue;  // its out may be anything
                const TensorRef& t = a.parts[part].out;
                const int64_t at = batch * t.batch_stride + row * t.row_stride + head * t.head_stride + d;
                x = fmaf(weight, load_element(t.data, a.parts[part].dtype, at), x);
            }
            store_element(out.data, a.result.dtype, to + d, seen ? x / sum : 0.0f);
        }
        __syncwarp();
        const RowRef& r = a.result.lse;
        if (lane == 0) {
            r.data[batch * r.batch_stride + head * r.head_stride + row] = seen ? largest + logf(sum) : -INFINITY;
        }
    }
}

template <int kParts>
cudaError_t launch_merge_of(const MergeParams& p, const LaunchContext& context) {
    const int64_t total_rows = p.batch * p.num_heads * p.rows;
    MergeArguments<kParts> a{p.rows, p.num_heads, p.head_dim_v, total_rows, p.num_parts, p.result, {}};
    std::copy_n(p.parts, p.num_parts, a.parts);
    const int64_t ctas = std::min((a.total_rows + kRowsPerCta - 1) / kRowsPerCta, kMaxCtas);
    if (ctas > 0) merge_parts<kParts><<<static_cast<unsigned>(ctas), kThreads, 0, context.stream>>>(a);
    return cudaGetLastError();
}

__global__ void __launch_bounds__(kThreads) write_dropout_mask(const __grid_constant__ DropoutMaskParams p) {
    const int64_t total = p.shape[0] * p.shape[1] * p.shape[2] * p.shape[3];
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; n < total; n += threads) {
        const int64_t j = n % p.shape[3], i = n / p.shape[3] % p.shape[2], bh = n / p.shape[3] / p.shape[2];
        const int64_t h = bh % p.shape[1], b = bh / p.shape[1];
        p.keep[b * p.strides[0] + h * p.strides[1] + i * p.strides[2] + j * p.strides[3]] = p.value(b, h, i, j);
    }
}

}  // namespace

cudaError_t launch_merge(const MergeParams& p, const LaunchContext& context) {
    constexpr int kFew = 16;
    return p.num_parts <= kFew ? launch_merge_of<kFew>(p, context) : launch_merge_of<kMaxMergeParts>(p, context);
}

cudaError_t launch_dropout_mask(const DropoutMaskParams& p, const LaunchContext& context) {
    const int64_t total = p.shape[0] * p.shape[1] * p.shape[2] * p.shape[3];
    const int64_t ctas = std::min((total + kThreads - 1) / kThreads, kMaxCtas);
    if (ctas > 0) write_dropout_mask<<<static_cast<unsigned>(ctas), kThreads, 0, context.stream>>>(p);
    return cudaGetLastError();
}

}  // namespace strobe::cuda
