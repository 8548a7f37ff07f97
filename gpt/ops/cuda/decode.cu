// Attention of a single token over a cache, and products with a single row: all read each number once, so what counts
// is how many loads are on their way.
#include <algorithm>
#include <cmath>

#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr float kLog2E = 1.4426950408889634f;

struct Cache {
    const bf16 *q, *k, *v;        // (heads, head_dim), (keys, heads_k, head_dim) at their strides
    int64_t k_stride, v_stride;
    const int32_t* cu_seqlens_k;  // [0, keys]
    int head_dim, heads, heads_k;
    float scale;                  // of log2
};

// What weights are relative to where the largest score is m. A worker without keys has none, and one whose scores are
// all NaN has no larger one either: relative to zero the former's sums stay zero and the latter's stay NaN.
__device__ float reference(float m) { return m == -INFINITY ? 0.0f : m; }

// Block (x, y): head y over the x-th share of the keys, of whose softmax it leaves (head_dim sums, largest score, sum
// of weights) in `partial`: (shares, heads, head_dim + 2). L lanes hold a row, eight numbers each; the 32 / L rows of a
// warp are workers that take keys in turn.
template <int L>
__global__ void __launch_bounds__(kThreads) decode_kernel(Cache a, float* partial) {
    constexpr int kWorkers = kThreads / L, kAhead = 4;
    using V = Vector<bf16, 8>;
    __shared__ float sums[kWorkers][8 * L], largest[kWorkers], totals[kWorkers];
    const int worker = threadIdx.x / L, column = threadIdx.x % L * 8, head = blockIdx.y;
    const bool inside = column < a.head_dim;
    const int64_t head_k = int64_t(head) * a.heads_k / a.heads;
    const int64_t first = a.cu_seqlens_k[0], keys = a.cu_seqlens_k[1] - first;
    const int64_t begin = keys * blockIdx.x / gridDim.x, end = keys * (blockIdx.x + 1) / gridDim.x;
    const bf16* k = a.k + first * a.k_stride + head_k * a.head_dim + column;
    const bf16* v = a.v + first * a.v_stride + head_k * a.head_dim + column;
    float q[8] = {}, sum[8] = {}, m = -INFINITY, total = 0.0f;
    if (inside) {
        const V row = V::load(a.q + int64_t(head) * a.head_dim + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) q[i] = a.scale * row[i];
    }
    // All lanes go round equally often: the sums over a row's lanes are the whole warp's.
    for (int64_t j = begin; j < end; j += kWorkers * kAhead) {
        V key[kAhead], value[kAhead];
        float score[kAhead];
        const float before = m;
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const int64_t at = j + u * kWorkers + worker;
#pragma unroll
            for (int i = 0; i < 8; ++i) key[u].set(i, 0.0f), value[u].set(i, 0.0f);
            if (at < end && inside) key[u] = V::load(k + at * a.k_stride), value[u] = V::load(v + at * a.v_stride);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) dot += q[i] * key[u][i];
#pragma unroll
            for (int offset = L / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(kFullWarp, dot, offset);
            score[u] = j + u * kWorkers + worker < end ? dot : -INFINITY;
            m = fmaxf(m, score[u]);
        }
        const float base = reference(m), shrink = exp2f(before - base);
        total *= shrink;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] *= shrink;
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const float weight = exp2f(score[u] - base);
            total += weight;
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] += weight * value[u][i];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[worker][column + i] = sum[i];
    if (column == 0) largest[worker] = m, totals[worker] = total;
    __syncthreads();
    float* out = partial + (int64_t(blockIdx.x) * a.heads + head) * (a.head_dim + 2);
    float top = -INFINITY;
    for (int w = 0; w < kWorkers; ++w) top = fmaxf(top, largest[w]);
    for (int c = threadIdx.x; c <= a.head_dim; c += kThreads) {
        float x = 0.0f;
        for (int w = 0; w < kWorkers; ++w) {
            const float part = c < a.head_dim ? sums[w][c] : totals[w];
            x += exp2f(largest[w] - reference(top)) * part;
        }
        out[c < a.head_dim ? c : c + 1] = x;
    }
    if (threadIdx.x == 0) out[a.head_dim] = top;
}

// A block per head.
__global__ void merge_kernel(const float* partial, int shares, int heads, int head_dim, bf16* out) {
    const int head = blockIdx.x;
    const int64_t stride = int64_t(heads) * (head_dim + 2);
    const float* mine = partial + int64_t(head) * (head_dim + 2);
    float top = -INFINITY;
    for (int s = 0; s < shares; ++s) top = fmaxf(top, mine[s * stride + head_dim]);
    for (int c = threadIdx.x; c < head_dim; c += blockDim.x) {
        float x = 0.0f, total = 0.0f;
#pragma unroll 4
        for (int s = 0; s < shares; ++s) {
            const float weight = exp2f(mine[s * stride + head_dim] - reference(top));
            x += weight * mine[s * stride + c];
            total += weight * mine[s * stride + head_dim + 1];
        }
        out[int64_t(head) * head_dim + c] = __float2bfloat16(total == 0.0f ? 0.0f : x / total);
    }
}

// A warp per row of the weight.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_product_kernel(int64_t in, int64_t out, const bf16* x, const bf16* weight, const T* bias, const T* residual,
                       T* y) {
    using V = Vector<bf16, 8>;
    constexpr int kAhead = 8;
    const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (row >= out) return;
    const int64_t first = threadIdx.x % 32 * 8;
    const bf16* w = weight + row * in;
    float sum = 0.0f;
    for (int64_t c = first; c < in; c += kAhead * 256) {
        V numbers[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u)
            if (c + u * 256 < in) numbers[u] = V::load(w + c + u * 256);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            if (c + u * 256 >= in) continue;
            const V factor = V::load(x + c + u * 256);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += numbers[u][i] * factor[i];
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 > 0) return;
    if (bias) sum += to_float(bias[row]);
    if (residual) sum += to_float(residual[row]);
    y[row] = from_float<T>(sum);
}

// dx = sums W. A block: as many columns as kLanes threads hold, N each (a sector of bf16); its groups of so many take
// the rows of W in turn.
constexpr int kColumnThreads = 1024, kLanes = 2;

template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads)
    column_product_kernel(int64_t in, int64_t out, const T* weight, const float* sums, float* dx) {
    using V = Vector<T, N>;
    constexpr int kGroups = kColumnThreads / kLanes, kColumns = kLanes * N;
    __shared__ float parts[kColumnThreads / 32][kColumns];
    const int lane = threadIdx.x % kLanes;
    const int64_t first = int64_t(blockIdx.x) * kColumns, column = first + lane * N;
    float sum[N] = {};
    if (column < in) {
#pragma unroll 8
        for (int64_t row = threadIdx.x / kLanes; row < out; row += kGroups) {
            const V w = V::load(weight + row * in + column);
            const float factor = sums[row];
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] += factor * w[i];
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        for (int offset = kLanes; offset < 32; offset *= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], offset);
        if (threadIdx.x % 32 < kLanes) parts[threadIdx.x / 32][lane * N + i] = sum[i];
    }
    __syncthreads();
    const int c = threadIdx.x;
    if (c >= kColumns || first + c >= in) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kColumnThreads / 32; ++w) total += parts[w][c];
    dx[first + c] = total;
}

int shares_of(const Exec& e, const AttentionShape& s) {
    return static_cast<int>(std::clamp<int64_t>(2 * e.parts / s.num_heads, 1, kMostDecodeShares));
}

}  // namespace

bool decodes(const AttentionForward& a) {
    const AttentionShape& s = a.shape;
    return a.q.precision == Precision::bf16 && s.batch == 1 && s.total_q == 1 && !a.lse && s.head_dim % 8 == 0 &&
           s.head_dim <= 256 && a.k_stride % 8 == 0 && a.v_stride % 8 == 0 && aligned(a.q.data) && aligned(a.k.data) &&
           aligned(a.v.data);
}

void decode_attention(Exec& e, const AttentionForward& a) {
    const AttentionShape& s = a.shape;
    const Cache cache{.q = as<bf16>(a.q), .k = as<bf16>(a.k), .v = as<bf16>(a.v), .k_stride = a.k_stride,
                      .v_stride = a.v_stride, .cu_seqlens_k = s.cu_seqlens_k, .head_dim = static_cast<int>(s.head_dim),
                      .heads = static_cast<int>(s.num_heads), .heads_k = static_cast<int>(s.num_heads_k),
                      .scale = kLog2E / std::sqrt(static_cast<float>(s.head_dim))};
    auto* partial = static_cast<float*>(e.scratch);
    const int shares = shares_of(e, s);
    const dim3 grid(static_cast<unsigned>(shares), static_cast<unsigned>(s.num_heads));
    const auto kernel = s.head_dim <= 64 ? decode_kernel<8> : s.head_dim <= 128 ? decode_kernel<16> : decode_kernel<32>;
    kernel<<<grid, kThreads, 0, stream_of(e)>>>(cache, partial);
    merge_kernel<<<static_cast<unsigned>(s.num_heads), 128, 0, stream_of(e)>>>(
        partial, shares, cache.heads, cache.head_dim, as<bf16>(a.out));
    check_launch("decode_attention");
}

bool is_row_product(const LinearForward& a) {
    return a.rows == 1 && a.x.precision == Precision::bf16 && !a.gelu_input && a.in % 8 == 0 && aligned(a.x.data) &&
           aligned(a.weight.data);
}

void row_product(Exec& e, const LinearForward& a) {
    const auto launch = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        row_product_kernel<T><<<blocks_for(a.out, kWarps), kThreads, 0, stream_of(e)>>>(
            a.in, a.out, as<bf16>(a.x), as<bf16>(a.weight), as<T>(a.bias), as<T>(a.residual), as<T>(a.y));
    };
    by_precision(a.y.precision, launch);
    check_launch("row_product");
}

void bias_backward(Exec& e, const BiasBackward& a) {
    by_precision(a.weight.precision, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kWide = kVectorSize<T>;
        const auto launch = [&](auto kernel, int width) {
            kernel<<<blocks_for(a.in, int64_t{kLanes} * width), kColumnThreads, 0, stream_of(e)>>>(
                a.in, a.out, as<T>(a.weight), a.sums, a.dx);
        };
        if (a.in % kWide == 0 && aligned(a.weight.data))
            launch(column_product_kernel<T, kWide>, kWide);
        else
            launch(column_product_kernel<T, 1>, 1);
    });
    check_launch("bias_backward");
}

}  // namespace strobe::gpt::cuda
