// A row is one or more warps': N numbers to a vector, K vectors to a thread, W warps to a row. The forward holds it in
// registers, the backward in shared memory. Rows that do not fit that - odd widths, very wide ones - take the loop
// kernels, which read a row again instead.
#include <algorithm>

#include "gpt/ops/cuda/ahead.cuh"
#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kThreads = 256;  // of the loop kernels' blocks
// Of a forward's block, if a row needs no more: the last blocks end together with few rows to each.
constexpr int kForwardWarps = 2;
// Of a backward's block: what the registers of a multiprocessor hold with the sums of two vectors to a thread.
constexpr int kBackwardWarps = 16, kBackwardThreads = 32 * kBackwardWarps, kBackwardVectors = 2;
constexpr int kRowsAhead = 2;                             // the one at hand among them; more are no faster
constexpr int kStaticBytes = 2 * kBackwardWarps * 2 * 4;  // of shared memory: the sums of warps

/// A sum over the W warps of a row, to all of them. Every thread of the block calls it equally often; `slots`
/// alternates between two sets of values so that one barrier per call is enough.
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

/// A sum over the warps of a group, to all of them; `slots` alternates between two sets of values so that one barrier
/// per call is enough.
template <int Values>
__device__ void group_sums(float (&x)[Values], float (*slots)[kBackwardWarps][Values], int& turn, int group,
                           int warps) {
#pragma unroll
    for (int i = 0; i < Values; ++i) x[i] = warp_sum(x[i]);
    if (warps == 1) return;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < Values; ++i) slots[turn][threadIdx.x / 32][i] = x[i];
    }
    barrier_of(1 + group, 32 * warps);
#pragma unroll
    for (int i = 0; i < Values; ++i) x[i] = 0.0f;
#pragma unroll 4
    for (int w = group * warps; w < (group + 1) * warps; ++w) {
#pragma unroll
        for (int i = 0; i < Values; ++i) x[i] += slots[turn][w][i];
    }
    turn ^= 1;
}

// With xhat = (x - mean) * rstd and g = dout * weight:  dx += rstd * (g - mean(g) - xhat * mean(g * xhat)), without the
// mean(g) term for RMSNorm. A block has a multiprocessor for itself and walks over rows, a group of `warps` warps to a
// row; no group waits for another. While a row is worked on, x, dout and dx of the group's next are on their way to
// shared memory, each thread's numbers to where it alone reads them: a vector that waits in registers takes twice its
// size, for the compiler keeps numbers of 16 bits apart. Weight and bias stay in shared memory, where rows that pass
// through the cache do not drive them out. Each block keeps its share of dweight, dbias and dsum in registers and
// leaves one row of them in `partial`: (gridDim.x, 3, hidden).
template <class T, int N, NormKind kind, bool kSums>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_kernel(NormBackward a, const T* x, const T* dout, T* dx, T* out, float* partial, int warps) {
    using V = Vector<T, N>;
    constexpr int K = kBackwardVectors;
    __shared__ float slots[2][kBackwardWarps][2];
    extern __shared__ uint4 memory[];
    const int width = 32 * warps, groups = blockDim.x / width;
    const int group = threadIdx.x / width, lane = threadIdx.x - group * width;
    const int n = static_cast<int>(a.hidden);
    const float* weight = static_cast<const float*>(a.weight.data);
    const float* bias = static_cast<const float*>(a.bias.data);
    const float inv_n = 1.0f / static_cast<float>(n);
    const auto column = [&](int k) { return (k * width + lane) * N; };
    // Numbers of fp32 lie in fours in the order of the threads that have them: neighbours read and write side by side.
    const int quads = K * (N / 4) * width;
    const auto quad = [&](int k, int i) { return (k * (N / 4) + i / 4) * width + lane; };
    const auto column_of_quad = [&](int q) {
        const int vector = q / width;
        return (vector / (N / 4) * width + q % width) * N + vector % (N / 4) * 4;
    };
    auto* weights = reinterpret_cast<float4*>(memory);
    float4* biases = weights + quads;  // only for `out`
    for (int q = threadIdx.x; q < quads; q += blockDim.x) {
        const int c = column_of_quad(q);
        if (c >= n) continue;
        weights[q] = *reinterpret_cast<const float4*>(weight + c);
        if (out) biases[q] = bias ? *reinterpret_cast<const float4*>(bias + c) : float4{};
    }
    const auto read = [&](const float4* from, int k, float(&to)[N]) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const float4 v = from[quad(k, i)];
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    };
    // (kRowsAhead, 3, K, threads); behind the last row the groups' shares of a sum.
    uint4* const rows = memory + (out ? 2 : 1) * quads;
    const auto place = [&](int stage, int tensor, int k) {
        return reinterpret_cast<T*>(rows + ((stage * 3 + tensor) * K + k) * blockDim.x + threadIdx.x);
    };

    const auto fetch = [&](int64_t row, int stage) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = column(k);
            if (row >= a.rows || c >= n) continue;
            const int64_t at = row * n + c;
            copy_ahead(place(stage, 0, k), x + at);
            copy_ahead(place(stage, 1, k), dout + at);
            copy_ahead(place(stage, 2, k), dx + at);
        }
        end_of_copies();
    };
    float next_mean = 0.0f, next_rstd = 0.0f;
    const auto fetch_statistics = [&](int64_t row) {
        if (row >= a.rows) return;
        if constexpr (kind == NormKind::layernorm) next_mean = a.mean[row];
        next_rstd = a.rstd[row];
    };

    float dweight[K][N] = {}, dbias[K][N] = {}, dsum[K][N] = {};
    const int64_t step = int64_t(gridDim.x) * groups;
    int64_t row = int64_t(blockIdx.x) * groups + group;
    int turn = 0, stage = 0;
#pragma unroll
    for (int s = 0; s < kRowsAhead - 1; ++s) fetch(row + s * step, s);
    fetch_statistics(row);
    __syncthreads();
    for (; row < a.rows; row += step) {
        const float rstd = next_rstd, shift = -next_mean * rstd;  // xhat = x * rstd + shift
        // To where the row before this one lay.
        fetch(row + (kRowsAhead - 1) * step, stage == 0 ? kRowsAhead - 1 : stage - 1);
        fetch_statistics(row + step);
        wait_for_copies<kRowsAhead - 1>();
        float sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = column(k);
            if (c >= n) continue;
            const V in = V::load(place(stage, 0, k)), dy = V::load(place(stage, 1, k));
            float w[N];
            read(weights, k, w);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float d = dy[i], d_xhat = d * fmaf(in[i], rstd, shift);
                sums[0] += d * w[i];
                sums[1] += d_xhat * w[i];
                dweight[k][i] += d_xhat;
                if constexpr (kind == NormKind::layernorm) dbias[k][i] += d;
            }
        }
        group_sums(sums, slots, turn, group, warps);
        const float mean_g = kind == NormKind::layernorm ? sums[0] * inv_n : 0.0f, mean_gx = sums[1] * inv_n;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = column(k);
            if (c >= n) continue;
            const V in = V::load(place(stage, 0, k)), dy = V::load(place(stage, 1, k));
            const V old = V::load(place(stage, 2, k));
            float w[N], result[N];
            read(weights, k, w);
#pragma unroll
            for (int i = 0; i < N; ++i)
                result[i] = old[i] + rstd * (dy[i] * w[i] - mean_g - fmaf(in[i], rstd, shift) * mean_gx);
            const V rounded = V::of(result);
            rounded.store(dx + row * n + c);
            if constexpr (kSums) {
#pragma unroll
                for (int i = 0; i < N; ++i) dsum[k][i] += rounded[i];
            }
            if (!out) continue;
            float b[N];
            read(biases, k, b);
#pragma unroll
            for (int i = 0; i < N; ++i) result[i] = fmaf(in[i], rstd, shift) * w[i] + b[i];
            V::of(result).store(out + row * n + c);
        }
        if (++stage == kRowsAhead) stage = 0;
    }

    wait_for_copies<0>();
    auto* shares = reinterpret_cast<float4*>(rows);
    const auto leave = [&](const float (&share)[K][N], float* to) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int i = 0; i < N; i += 4)
                shares[group * quads + quad(k, i)] =
                    float4{share[k][i], share[k][i + 1], share[k][i + 2], share[k][i + 3]};
        __syncthreads();
        for (int q = threadIdx.x; q < quads; q += blockDim.x) {
            const int c = column_of_quad(q);
            if (c >= n) continue;
            float4 total = shares[q];
#pragma unroll 1
            for (int g = 1; g < groups; ++g) {
                const float4 more = shares[g * quads + q];
                total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
            }
            *reinterpret_cast<float4*>(to + c) = total;
        }
    };
    float* mine = partial + int64_t{3} * n * blockIdx.x;
    leave(dweight, mine);
    if (kind == NormKind::layernorm) leave(dbias, mine + n);
    if (kSums) leave(dsum, mine + 2 * n);
}

// ---- any width ------------------------------------------------------------------------------------------------------

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

// ---- choice ---------------------------------------------------------------------------------------------------------

/// Calls fn with the first of the shapes (vectors to a thread K, warps to a row W) that a row fits. False when none is
/// wide enough.
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
    if (!done) {
        const auto rows = static_cast<unsigned>(a.rows);
        forward_loop_kernel<T, kind><<<rows, kThreads, 0, stream_of(e)>>>(a, x, branch, sum, out);
    }
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
    constexpr int N = kVectorSize<T>, kColumns = 32 * kBackwardVectors * N;  // of a warp
    const int64_t warps = (a.hidden + kColumns - 1) / kColumns;
    // Bytes of weight and bias, and of what a group has on its way.
    const int64_t vectors = (out ? 2 : 1) * warps * kColumns * int64_t{sizeof(float)};
    const int64_t row = kRowsAhead * 3 * warps * kColumns * int64_t{sizeof(T)};
    int shared = 0;
    if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, e.device_index) != cudaSuccess)
        throw std::runtime_error("norm_backward: the GPU does not tell its shared memory");
    const int64_t room = shared - kStaticBytes - vectors;
    const int64_t groups = a.hidden % N == 0 ? std::min(kBackwardWarps / warps, std::max<int64_t>(room, 0) / row) : 0;
    if (groups > 0) {
        const auto kernel = backward_kernel<T, N, kind, kSums>;
        const auto bytes = static_cast<int>(vectors + groups * row);
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
            throw std::runtime_error("norm_backward: the GPU refuses the shared memory");
        // A block per multiprocessor: half of the parts.
        parts = std::min<int64_t>(std::max(1, e.parts / 2), blocks_for(a.rows, groups));
        kernel<<<static_cast<unsigned>(parts), static_cast<unsigned>(32 * warps * groups), bytes, stream_of(e)>>>(
            a, x, dout, dx, out, partial, static_cast<int>(warps));
    } else {
        const auto blocks = static_cast<unsigned>(parts);
        backward_loop_kernel<T, kind><<<blocks, kThreads, 0, stream_of(e)>>>(a, x, dout, dx, out, partial);
    }
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
    dispatch(a.x.precision, a.kind, [&](auto* type, auto kind) {
        forward<std::remove_pointer_t<decltype(type)>, kind()>(e, a);
    });
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
