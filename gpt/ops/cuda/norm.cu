// A row is held in registers by one or more warps: N numbers to a vector, K vectors to a thread, W warps to a row. Rows that do
// not fit that - odd widths, very wide ones - take the loop kernels, which read a row again instead.
#include <algorithm>

#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Of a forward's block, if a row needs no more: the last blocks end together with few rows to each.
constexpr int kForwardWarps = 2;

/// A sum over the W warps of a row, to all of them. Every thread of the block calls it equally often; `slots` alternates
/// between two sets of values so that one barrier per call is enough.
template <int W, int Warps, int Values>
__device__ void row_sums(float (&x)[Values], float (*slots)[Warps][Values], int& turn) {
#pragma unroll
    for (int i = 0; i < Values; ++i) x[i] = warp_sum(x[i]);
    if constexpr (W > 1) {
        const int warp = threadIdx.x / 32, first = warp / W * W;
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int i = 0; i < Values; ++i) slots[turn][warp][i] = x[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Values; ++i) {
            x[i] = 0.0f;
#pragma unroll
            for (int w = 0; w < W; ++w) x[i] += slots[turn][first + w][i];
        }
        turn ^= 1;
    }
}

// The row stays in its own precision: converting it three times costs less than the registers of its fp32 numbers.
template <class T, int N, int K, int W, NormKind kind, int Warps>
__global__ void __launch_bounds__(32 * Warps)
    forward_kernel(NormForward a, const T* x, const T* branch, T* sum, T* out) {
    using V = Vector<T, N>;
    __shared__ float slots[2][Warps][1];
    constexpr int kRows = Warps / W;
    const int lane = threadIdx.x % (32 * W);
    const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / (32 * W);
    const bool live = row < a.rows;
    const int64_t n = a.hidden, start = row * n;
    const float* weight = static_cast<const float*>(a.weight.data);
    const float* bias = static_cast<const float*>(a.bias.data);
    const auto column = [&](int k) { return (int64_t(k) * 32 * W + lane) * N; };

    V in[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) in[k].set(i, 0.0f);
        if (live && column(k) < n) in[k] = V::load(x + start + column(k));
    }
    if (branch) {
        V add[K];
#pragma unroll
        for (int k = 0; k < K; ++k)
            if (live && column(k) < n) add[k] = V::load(branch + start + column(k));
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (!live || column(k) >= n) continue;
#pragma unroll
            for (int i = 0; i < N; ++i) in[k].set(i, in[k][i] + add[k][i]);
            in[k].store(sum + start + column(k));
        }
    }
    int turn = 0;
    const float inv_n = 1.0f / static_cast<float>(n);
    float mean = 0.0f;
    if constexpr (kind == NormKind::layernorm) {
        float total[1] = {0.0f};
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int i = 0; i < N; ++i) total[0] += in[k][i];
        row_sums<W>(total, slots, turn);
        mean = total[0] * inv_n;
    }
    float square[1] = {0.0f};
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const bool inside = column(k) < n;
#pragma unroll
        for (int i = 0; i < N; ++i) square[0] += inside ? (in[k][i] - mean) * (in[k][i] - mean) : 0.0f;
    }
    row_sums<W>(square, slots, turn);
    if (!live) return;
    const float rstd = rsqrtf(square[0] * inv_n + a.eps);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int64_t c = column(k);
        if (c >= n) continue;
        V y;
        float w[N], b[N] = {};
        load_floats(weight + c, w);
        if (bias) load_floats(bias + c, b);
#pragma unroll
        for (int i = 0; i < N; ++i) y.set(i, (in[k][i] - mean) * rstd * w[i] + b[i]);
        y.store(out + start + c);
    }
    if (lane == 0) {
        if (a.mean) a.mean[row] = mean;
        if (a.rstd) a.rstd[row] = rstd;
    }
}

// With xhat = (x - mean) * rstd and g = dout * weight:  dx += rstd * (g - mean(g) - xhat * mean(g * xhat)), without the
// mean(g) term for RMSNorm. A block walks over rows and keeps its share of dweight, dbias and dsum in registers; each block leaves
// one row of them in `partial`: (gridDim.x, 3, hidden). While a row is worked on, x and dout of the next are on their way.
template <class T, int N, int K, int W, NormKind kind, bool kSums>
__global__ void __launch_bounds__(kThreads, K <= 2 ? 2 : 1) backward_kernel(NormBackward a, const T* x, const T* dout, T* dx, T* out, float* partial) {
    using V = Vector<T, N>;
    constexpr int kRows = kWarps / W, kColumns = 32 * W * N * K;
    __shared__ float slots[2][kWarps][2];
    extern __shared__ float shares[];  // (kRows, kColumns), one of dweight, dbias and dsum after the other
    const int lane = threadIdx.x % (32 * W), group = threadIdx.x / (32 * W);
    const int n = static_cast<int>(a.hidden);
    const float* weight = static_cast<const float*>(a.weight.data);
    const float* bias = static_cast<const float*>(a.bias.data);
    const float inv_n = 1.0f / static_cast<float>(n);
    const auto column = [&](int k) { return (k * 32 * W + lane) * N; };

    float dweight[K][N] = {}, dbias[K][N] = {}, dsum[K][N] = {};
    V next_x[K], next_dy[K];
    const auto fetch = [&](int64_t row) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = column(k);
            if (row < a.rows && c < n) {
                const int64_t at = row * n + c;
                next_x[k] = V::load(x + at);
                next_dy[k] = V::load(dout + at);
            }
        }
    };
    int turn = 0;
    fetch(int64_t(blockIdx.x) * kRows + group);
    // All rows of the block go round together: row_sums is a barrier of the whole block.
    for (int64_t first = int64_t(blockIdx.x) * kRows; first < a.rows; first += int64_t(gridDim.x) * kRows) {
        const int64_t row = first + group;
        const bool live = row < a.rows;
        V in[K], dy[K], old[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = column(k);
            in[k] = next_x[k];
            dy[k] = next_dy[k];
            if (live && c < n) old[k] = V::load(dx + row * n + c);
        }
        const float mean = kind == NormKind::layernorm && live ? a.mean[row] : 0.0f;
        const float rstd = live ? a.rstd[row] : 0.0f;
        fetch(row + int64_t(gridDim.x) * kRows);
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = column(k);
            if (!live || c >= n) continue;
            float w[N];
            load_floats(weight + c, w);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float xhat = (in[k][i] - mean) * rstd, d = dy[k][i], g = d * w[i];
                sums[0] += g;
                sums[1] += g * xhat;
                dweight[k][i] += d * xhat;
                if constexpr (kind == NormKind::layernorm) dbias[k][i] += d;
            }
        }
        row_sums<W>(sums, slots, turn);
        const float mean_g = kind == NormKind::layernorm ? sums[0] * inv_n : 0.0f, mean_gx = sums[1] * inv_n;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = column(k);
            if (!live || c >= n) continue;
            float w[N];
            load_floats(weight + c, w);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float xhat = (in[k][i] - mean) * rstd;
                old[k].set(i, old[k][i] + rstd * (dy[k][i] * w[i] - mean_g - xhat * mean_gx));
                if constexpr (kSums) dsum[k][i] += old[k][i];
            }
            old[k].store(dx + row * n + c);
            if (!out) continue;
            float b[N] = {};
            if (bias) load_floats(bias + c, b);
#pragma unroll
            for (int i = 0; i < N; ++i) in[k].set(i, (in[k][i] - mean) * rstd * w[i] + b[i]);
            in[k].store(out + row * n + c);
        }
    }

    const auto leave = [&](const float (&share)[K][N], float* to) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int i = 0; i < N; ++i) shares[group * kColumns + (k * 32 * W + lane) * N + i] = share[k][i];
        __syncthreads();
        for (int64_t c = threadIdx.x; c < n; c += kThreads) {
            float total = 0.0f;
#pragma unroll
            for (int r = 0; r < kRows; ++r) total += shares[r * kColumns + c];
            to[c] = total;
        }
    };
    float* mine = partial + 3 * n * blockIdx.x;
    leave(dweight, mine);
    if (kind == NormKind::layernorm) leave(dbias, mine + n);
    if (kSums) leave(dsum, mine + 2 * n);
}

// ---- any width ------------------------------------------------------------------------------------------------------------

template <class T, NormKind kind>
__global__ void forward_loop_kernel(NormForward a, const T* x, const T* branch, T* sum, T* out) {
    __shared__ float slots[32];
    const int64_t n = a.hidden, row = blockIdx.x, start = row * n;
    const float* weight = static_cast<const float*>(a.weight.data);
    const float* bias = static_cast<const float*>(a.bias.data);
    const T* in = branch ? sum : x;
    float total = 0.0f;
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
        if (branch) sum[start + c] = from_float<T>(to_float(x[start + c]) + to_float(branch[start + c]));
        total += to_float(in[start + c]);
    }
    const float mean = kind == NormKind::layernorm ? block_sum(total, slots) / static_cast<float>(n) : 0.0f;
    float square = 0.0f;
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
        const float d = to_float(in[start + c]) - mean;
        square += d * d;
    }
    const float rstd = rsqrtf(block_sum(square, slots) / static_cast<float>(n) + a.eps);
    for (int64_t c = threadIdx.x; c < n; c += kThreads)
        out[start + c] = from_float<T>((to_float(in[start + c]) - mean) * rstd * weight[c] + (bias ? bias[c] : 0.0f));
    if (threadIdx.x == 0) {
        if (a.mean) a.mean[row] = mean;
        if (a.rstd) a.rstd[row] = rstd;
    }
}

// Each block keeps its share of dweight and dbias in its row of `partial`, which no other block touches.
template <class T, NormKind kind>
__global__ void backward_loop_kernel(NormBackward a, const T* x, const T* dout, T* dx, T* out, float* partial) {
    __shared__ float slots[32];
    const int64_t n = a.hidden;
    const float* weight = static_cast<const float*>(a.weight.data);
    const float* bias = static_cast<const float*>(a.bias.data);
    float* dweight = partial + 3 * n * blockIdx.x;
    for (int64_t c = threadIdx.x; c < 3 * n; c += kThreads) dweight[c] = 0.0f;
    __syncthreads();
    for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const int64_t start = row * n;
        const float mean = kind == NormKind::layernorm ? a.mean[row] : 0.0f, rstd = a.rstd[row];
        float sum_g = 0.0f, sum_gx = 0.0f;
        for (int64_t c = threadIdx.x; c < n; c += kThreads) {
            const float xhat = (to_float(x[start + c]) - mean) * rstd, d = to_float(dout[start + c]), g = d * weight[c];
            sum_g += g;
            sum_gx += g * xhat;
            dweight[c] += d * xhat;
            dweight[n + c] += d;
        }
        const float mean_g = kind == NormKind::layernorm ? block_sum(sum_g, slots) / static_cast<float>(n) : 0.0f;
        const float mean_gx = block_sum(sum_gx, slots) / static_cast<float>(n);
        for (int64_t c = threadIdx.x; c < n; c += kThreads) {
            const float xhat = (to_float(x[start + c]) - mean) * rstd;
            const float d = rstd * (to_float(dout[start + c]) * weight[c] - mean_g - xhat * mean_gx);
            dx[start + c] = from_float<T>(to_float(dx[start + c]) + d);
            dweight[2 * n + c] += to_float(dx[start + c]);
            if (out) out[start + c] = from_float<T>(xhat * weight[c] + (bias ? bias[c] : 0.0f));
        }
    }
}

// ---- choice -----------------------------------------------------------------------------------------------------------------

/// Calls fn with the first of the shapes (vectors to a thread K, warps to a row W) that a row fits. False when none is wide enough.
template <int N, class Fn>
bool with_row_shape(int64_t, Fn&&) {
    return false;
}
template <int N, int K, int W, int... More, class Fn>
bool with_row_shape(int64_t hidden, Fn&& fn) {
    if (hidden % N != 0) return false;
    if (hidden > int64_t{32} * K * W * N) return with_row_shape<N, More...>(hidden, fn);
    return fn(std::integral_constant<int, K>(), std::integral_constant<int, W>()), true;
}

// Of fp32, which is for checking, a few shapes are enough.
template <class T, class Fn>
bool with_forward_shape(int64_t hidden, Fn&& fn) {
    // Few warps to a row: its sums then cross no barrier, or few.
    if constexpr (std::is_same_v<T, bf16>)
        return with_row_shape<8, 1, 1, 2, 1, 3, 1, 4, 1, 8, 1, 5, 2, 8, 2, 8, 4, 8, 8>(hidden, fn);
    else
        return with_row_shape<4, 2, 1, 8, 8>(hidden, fn);
}
template <class T, class Fn>
bool with_backward_shape(int64_t hidden, Fn&& fn) {
    // More of them: the shares of the gradients must fit the registers too.
    if constexpr (std::is_same_v<T, bf16>)
        return with_row_shape<8, 1, 1, 2, 1, 2, 2, 2, 4, 2, 8, 4, 8>(hidden, fn);
    else
        return with_row_shape<4, 1, 1, 4, 8>(hidden, fn);
}

template <class T, NormKind kind>
void forward(Exec& e, const NormForward& a) {
    const T* x = as<T>(a.x);
    const T* branch = as<T>(a.branch);
    T* sum = as<T>(a.sum);
    T* out = as<T>(a.out);
    const bool done = with_forward_shape<T>(a.hidden, [&](auto k, auto w) {
        constexpr int kBlockWarps = std::max<int>(kForwardWarps, w);
        const unsigned grid = blocks_for(a.rows, kBlockWarps / w);
        forward_kernel<T, kVectorSize<T>, k, w, kind, kBlockWarps>
            <<<grid, 32 * kBlockWarps, 0, stream_of(e)>>>(a, x, branch, sum, out);
    });
    if (!done) forward_loop_kernel<T, kind><<<static_cast<unsigned>(a.rows), kThreads, 0, stream_of(e)>>>(a, x, branch, sum, out);
    check_launch("norm_forward");
}

template <class T, NormKind kind, bool kSums>
void backward(Exec& e, const NormBackward& a) {
    const T* x = as<T>(a.x);
    const T* dout = as<T>(a.dout);
    T* dx = as<T>(a.dx);
    T* out = as<T>(a.out);
    auto* partial = static_cast<float*>(e.scratch);
    int64_t parts = std::min<int64_t>(e.parts, a.rows);
    const bool done = with_backward_shape<T>(a.hidden, [&](auto k, auto w) {
        constexpr int kRows = kWarps / w;
        const size_t shares = sizeof(float) * kRows * 32 * w * k * kVectorSize<T>;
        parts = std::min<int64_t>(parts, blocks_for(a.rows, kRows));
        backward_kernel<T, kVectorSize<T>, k, w, kind, kSums>
            <<<static_cast<unsigned>(parts), kThreads, shares, stream_of(e)>>>(a, x, dout, dx, out, partial);
    });
    if (!done) backward_loop_kernel<T, kind><<<static_cast<unsigned>(parts), kThreads, 0, stream_of(e)>>>(a, x, dout, dx, out, partial);
    check_launch("norm_backward");
    add_parts(e, partial, parts, a.hidden, 3 * a.hidden, {{a.dweight, a.dbias, a.dsum}});
}

template <class Fn>
void dispatch(Precision precision, NormKind kind, Fn&& fn) {
    by_precision(precision, [&](auto* type) {
        if (kind == NormKind::layernorm)
            fn(type, std::integral_constant<NormKind, NormKind::layernorm>());
        else
            fn(type, std::integral_constant<NormKind, NormKind::rmsnorm>());
    });
}

}  // namespace

void norm_forward(Exec& e, const NormForward& a) {
    dispatch(a.x.precision, a.kind, [&](auto* type, auto kind) { forward<std::remove_pointer_t<decltype(type)>, kind()>(e, a); });
}

void norm_backward(Exec& e, const NormBackward& a) {
    dispatch(a.x.precision, a.kind, [&](auto* type, auto kind) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (!a.dsum) return backward<T, kind(), false>(e, a);
        // The architecture of RMSNorm has no biases.
        if constexpr (kind() == NormKind::layernorm) return backward<T, kind(), true>(e, a);
        throw std::invalid_argument("norm_backward: sums of dx come with LayerNorm only");
    });
}

}  // namespace strobe::gpt::cuda
