// Sums over rows and over everything, each in an order that depends on sizes alone.
#include <algorithm>

#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSumThreads = 512, kRowsAhead = 8;

// Block (x, y): a stretch of columns, N to a thread; of the groups of kRowsAhead rows it takes every gridDim.y-th. No
// sum crosses a thread.
template <class T, int N>
__global__ void __launch_bounds__(kSumThreads, 2)
    column_sums_kernel(const T* x, int64_t rows, int64_t columns, int64_t stride, float* partial) {
    using V = Vector<T, N>;
    const int64_t c = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (c >= columns) return;
    const int64_t groups = (rows + kRowsAhead - 1) / kRowsAhead;
    float sum[N] = {};
    for (int64_t turn = blockIdx.y; turn < groups; turn += gridDim.y) {
        const int64_t first = turn * kRowsAhead;
        const T* p = x + first * stride + c;
        if (first + kRowsAhead <= rows) {
            V v[kRowsAhead];
#pragma unroll
            for (int k = 0; k < kRowsAhead; ++k) v[k] = V::load(p + k * stride);
#pragma unroll
            for (int k = 0; k < kRowsAhead; ++k)
#pragma unroll
                for (int i = 0; i < N; ++i) sum[i] += v[k][i];
        } else {
            for (int64_t r = first; r < rows; ++r, p += stride) {
                const V v = V::load(p);
#pragma unroll
                for (int i = 0; i < N; ++i) sum[i] += v[i];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) partial[blockIdx.y * columns + c + i] = sum[i];
}

// A block: 32 columns; a warp takes every kWarps-th part. Behind the columns of one sum lie those of the next.
__global__ void parts_kernel(const float* partial, int64_t parts, int64_t columns, int64_t stride, PartSums out) {
    __shared__ float sums[kWarps][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t c = int64_t(blockIdx.x) * 32 + lane, which = c / columns;
    float* to = which < PartSums::kMost ? out.to[which] : nullptr;
    float sum = 0.0f;
    if (to) {
#pragma unroll 8
        for (int64_t p = warp; p < parts; p += kWarps) sum += partial[p * stride + c];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || !to) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
    to[c - which * columns] += total;
}

__global__ void loss_sum_kernel(const float* losses, int64_t rows, double* sum, bool add) {
    __shared__ double slots[32];
    double mine = 0.0;
    for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) mine += losses[r];
    const double total = block_sum(mine, slots);
    if (threadIdx.x == 0) *sum = add ? *sum + total : total;
}

// Block b: a contiguous share, summed in fp32 within a vector and in fp64 beyond.
template <class T>
__global__ void squares_kernel(const T* values, int64_t size, double* partial) {
    constexpr int N = kVectorSize<T>;
    __shared__ double slots[32];
    const int64_t vectors = size / N;
    const int64_t begin = vectors * blockIdx.x / gridDim.x, end = vectors * (blockIdx.x + 1) / gridDim.x;
    double mine = 0.0;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const auto v = Vector<T, N>::load(values + i * N);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < N; ++j) sum += v[j] * v[j];
        mine += static_cast<double>(sum);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        for (int64_t i = N * vectors; i < size; ++i)
            mine += static_cast<double>(to_float(values[i])) * to_float(values[i]);
    const double total = block_sum(mine, slots);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void sum_doubles_kernel(const double* partial, int count, double* result, bool add) {
    __shared__ double slots[32];
    double mine = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) mine += partial[i];
    const double total = block_sum(mine, slots);
    if (threadIdx.x == 0) *result = add ? *result + total : total;
}

}  // namespace

void add_parts(Exec& e, const float* partial, int64_t parts, int64_t columns, int64_t stride, const PartSums& out) {
    int64_t sums = PartSums::kMost;
    while (sums > 1 && !out.to[sums - 1]) --sums;
    parts_kernel<<<blocks_for(sums * columns, 32), kThreads, 0, stream_of(e)>>>(partial, parts, columns, stride, out);
    check_launch("add_parts");
}

void add_column_sums(Exec& e, Buffer x, int64_t rows, int64_t columns, int64_t stride, float* sums) {
    auto* partial = static_cast<float*>(e.scratch);
    by_precision(x.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto launch = [&](auto kernel, int width) {
            const int64_t wanted = (columns / width + 31) / 32 * 32;  // threads that a row keeps busy
            const int64_t stretches = (wanted + kSumThreads - 1) / kSumThreads;
            const auto threads = static_cast<unsigned>(std::max<int64_t>(32, (wanted / stretches + 31) / 32 * 32));
            const unsigned blocks = blocks_for(columns, int64_t{threads} * width);
            // No more parts than run at once, and as many groups of rows to each.
            const int64_t groups = (rows + kRowsAhead - 1) / kRowsAhead, most = std::max<int64_t>(1, e.parts / blocks);
            const int64_t parts = blocks_for(groups, blocks_for(groups, most));
            const dim3 grid(blocks, static_cast<unsigned>(parts));
            kernel<<<grid, threads, 0, stream_of(e)>>>(as<T>(x), rows, columns, stride, partial);
            check_launch("column_sums");
            add_parts(e, partial, parts, columns, columns, {{sums}});
        };
        constexpr int kWide = kVectorSize<T>;
        if (columns % kWide == 0 && stride % kWide == 0 && aligned(x.data))
            launch(column_sums_kernel<T, kWide>, kWide);
        else
            launch(column_sums_kernel<T, 1>, 1);
    });
}

void loss_sum(Exec& e, const LossSum& a) {
    loss_sum_kernel<<<1, 1024, 0, stream_of(e)>>>(a.losses, a.rows, a.sum, a.add);
    check_launch("loss_sum");
}

void squared_norm(Exec& e, const SquaredNorm& a) {
    auto* partial = static_cast<double*>(e.scratch);
    by_precision(a.values.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        squares_kernel<T><<<static_cast<unsigned>(e.parts), 512, 0, stream_of(e)>>>(
            static_cast<const T*>(as<T>(a.values)), a.size, partial);
    });
    sum_doubles_kernel<<<1, 256, 0, stream_of(e)>>>(partial, e.parts, a.result, a.add);
    check_launch("squared_norm");
}

}  // namespace strobe::gpt::cuda
