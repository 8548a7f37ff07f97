#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kThreads = 256;

// A thread turns N columns of the low half of a head with their partners of the high half.
template <class T, int N>
__global__ void rope_kernel(Rope a, T* x) {
    using V = Vector<T, N>;
    const int64_t half = a.head_dim / 2, per_head = half / N;
    const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= a.rows * a.heads * per_head) return;
    const int64_t i = index % per_head * N, head = index / per_head % a.heads, row = index / per_head / a.heads;
    T* low = x + row * a.row_stride + head * a.head_dim + i;
    const int64_t angle = a.positions[row] * half + i;
    const V v = V::load(low), w = V::load(low + half);
    V turned_low, turned_high;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const float cos = a.cos[angle + j], sin = a.inverse ? -a.sin[angle + j] : a.sin[angle + j];
        turned_low.set(j, v[j] * cos - w[j] * sin);
        turned_high.set(j, w[j] * cos + v[j] * sin);
    }
    turned_low.store(low);
    turned_high.store(low + half);
}

template <class T>
__global__ void append_kernel(CacheAppend a, const T* k, const T* v, T* k_cache, T* v_cache) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= a.rows * a.columns) return;
    const int64_t from = i / a.columns * a.stride + i % a.columns,
                  to = a.positions[i / a.columns] * a.columns + i % a.columns;
    k_cache[to] = k[from];
    v_cache[to] = v[from];
}

}  // namespace

void rope(Exec& e, const Rope& a) {
    by_precision(a.x.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kWide = kVectorSize<T>;
        const bool wide = a.head_dim / 2 % kWide == 0 && a.row_stride % kWide == 0 && aligned(a.x.data);
        const int64_t threads = a.rows * a.heads * (a.head_dim / 2 / (wide ? kWide : 1));
        const auto kernel = wide ? rope_kernel<T, kWide> : rope_kernel<T, 1>;
        kernel<<<blocks_for(threads, kThreads), kThreads, 0, stream_of(e)>>>(a, as<T>(a.x));
    });
    check_launch("rope");
}

void cache_append(Exec& e, const CacheAppend& a) {
    by_precision(a.k.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        append_kernel<T><<<blocks_for(a.rows * a.columns, kThreads), kThreads, 0, stream_of(e)>>>(
            a, as<T>(a.k), as<T>(a.v), as<T>(a.k_cache), as<T>(a.v_cache));
    });
    check_launch("cache_append");
}

}  // namespace strobe::gpt::cuda
