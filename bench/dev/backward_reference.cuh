// What the development driver of the Hopper backward kernels measures them against: random data, the attention gradient in fp64 on the
// GPU, exact or with every intermediate matrix rounded to the working precision, and the comparison of both with a result.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "core/params.hpp"

namespace strobe::backward_dev {

inline __device__ float uniform(uint64_t seed, uint64_t i) {
    uint64_t z = seed * 0x9E3779B97F4A7C15ull + i * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return static_cast<float>((z ^ (z >> 31)) >> 40) / 16777216.0f;
}
inline __device__ float normal(uint64_t seed, uint64_t i) {
    return sqrtf(-2.0f * logf(uniform(seed, 2 * i) + 1e-7f)) * cospif(2.0f * uniform(seed, 2 * i + 1));
}

template <DType kType>
__device__ float load(const void* p, int64_t i) {
    if constexpr (kType == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    else if constexpr (kType == DType::f16) return __half2float(static_cast<const __half*>(p)[i]);
    else return static_cast<const float*>(p)[i];
}
template <DType kType>
__device__ void store(void* p, int64_t i, double x) {
    if constexpr (kType == DType::bf16) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(static_cast<float>(x));
    else if constexpr (kType == DType::f16) static_cast<__half*>(p)[i] = __float2half(static_cast<float>(x));
    else static_cast<float*>(p)[i] = static_cast<float>(x);
}
template <DType kType>
__device__ double round_to(double x) {
    if constexpr (kType == DType::bf16) return __bfloat162float(__float2bfloat16(static_cast<float>(x)));
    else return __half2float(__float2half(static_cast<float>(x)));
}

template <DType kType>
__global__ void fill(void* p, int64_t n, uint64_t seed, float scale) {
    for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) store<kType>(p, i, scale * normal(seed, i));
}

/// Reference tensors: fp64, (row, head, dim) contiguous over all rows of all sequences.
struct Reference {
    double *lse, *delta, *out, *dq, *dk, *dv;
};

inline __device__ int64_t offset(const BackwardParams& p, const TensorRef& t, bool keys, int b, int64_t row, int head) {
    const bool varlen = keys ? p.seqlens.cu_seqlens_k : p.seqlens.cu_seqlens_q;
    return (varlen ? 0 : b * t.batch_stride) + row * t.row_stride + head * t.head_stride;
}
inline __device__ int64_t flat_row(const BackwardParams& p, const Sequence& s, bool keys, int b, int64_t i) {
    if (keys) return (p.seqlens.cu_seqlens_k ? s.k_row : b * p.size.seqlen_k) + i;
    return (p.seqlens.cu_seqlens_q ? s.q_row : b * p.size.seqlen_q) + i;
}

inline __device__ double block_sum(double x) {
    __shared__ double part[8];
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    double s = 0;
    for (int i = 0; i < 4; ++i) s += part[i];
    return s;
}

template <DType kType>
__device__ double dot(const void* a, int64_t ia, const void* b, int64_t ib, int dim) {
    double s = 0;
    for (int d = 0; d < dim; ++d) s += double(load<kType>(a, ia + d)) * load<kType>(b, ib + d);
    return s;
}

/// One block per query row: lse, out, delta and dq. kRound: intermediate matrices in the working precision.
template <DType kType, bool kRound>
__global__ void reference_rows(BackwardParams p, Reference r) {
    extern __shared__ double scores[];
    const int head = blockIdx.y, b = blockIdx.z;
    const Sequence s = sequence_of(p, b);
    const int64_t i = blockIdx.x;
    if (i >= s.rows_q) return;
    const int hk = head / (p.size.num_heads / p.size.num_heads_k);
    const BandMask mask = s.mask(p.mask);
    const int dim = p.size.head_dim;
    const int64_t flat = flat_row(p, s, false, b, i);
    const int64_t row = flat * p.size.num_heads + head;
    const int64_t iq = offset(p, p.q, false, b, s.q_row + i, head), ig = offset(p, p.dout, false, b, s.q_row + i, head);
    const auto rounded = [](double x) { return kRound ? round_to<kType>(x) : x; };
    const bool live = i < s.seqlen_q;
    double top = -INFINITY;
    for (int64_t j = threadIdx.x; live && j < s.seqlen_k; j += 128) {
        const int64_t ik = offset(p, p.k, true, b, s.k_row + j, hk);
        scores[j] = mask.visible(i, j) ? rounded(dot<kType>(p.q.data, iq, p.k.data, ik, dim) * p.score.softmax_scale) : -INFINITY;
        top = fmax(top, scores[j]);
    }
    for (int d = 16; d; d /= 2) top = fmax(top, __shfl_xor_sync(~0u, top, d));
    __shared__ double tops[4];
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    top = fmax(fmax(tops[0], tops[1]), fmax(tops[2], tops[3]));
    const bool any = live && top != -INFINITY;
    double sum = 0;
    for (int64_t j = threadIdx.x; any && j < s.seqlen_k; j += 128) sum += exp(scores[j] - top);
    sum = block_sum(sum);
    const double lse = any ? top + log(sum) : -INFINITY;
    for (int64_t j = threadIdx.x; any && j < s.seqlen_k; j += 128) scores[j] = rounded(exp(scores[j] - lse));
    __syncthreads();
    double delta = 0;
    for (int d = threadIdx.x; d < dim; d += 128) {
        double o = 0;
        for (int64_t j = 0; any && j < s.seqlen_k; ++j) o += scores[j] * load<kType>(p.v.data, offset(p, p.v, true, b, s.k_row + j, hk) + d);
        r.out[row * dim + d] = o;
        delta += rounded(o) * load<kType>(p.dout.data, ig + d);
    }
    delta = block_sum(delta);
    if (p.dlse && live) delta -= p.dlse.data[offset(p, TensorRef{nullptr, p.dlse.batch_stride, 1, p.dlse.head_stride}, false, b, s.q_row + i, head)];
    if (threadIdx.x == 0) r.lse[row] = lse, r.delta[row] = any ? delta : 0;
    for (int64_t j = threadIdx.x; any && j < s.seqlen_k; j += 128) {
        const int64_t iv = offset(p, p.v, true, b, s.k_row + j, hk);
        const double dp = rounded(dot<kType>(p.dout.data, ig, p.v.data, iv, dim));
        scores[j] = rounded(scores[j] * (dp - delta));
    }
    __syncthreads();
    for (int d = threadIdx.x; d < dim; d += 128) {
        double g = 0;
        for (int64_t j = 0; any && j < s.seqlen_k; ++j) g += scores[j] * load<kType>(p.k.data, offset(p, p.k, true, b, s.k_row + j, hk) + d);
        r.dq[row * dim + d] = rounded(g * p.score.softmax_scale);
    }
}

/// One block per key row and key head: dk, dv.
template <DType kType, bool kRound>
__global__ void reference_columns(BackwardParams p, Reference r) {
    extern __shared__ double weights[];  // P, dS of this key
    const int hk = blockIdx.y, b = blockIdx.z;
    const Sequence s = sequence_of(p, b);
    const int64_t j = blockIdx.x;
    if (j >= s.rows_k) return;
    const int group = p.size.num_heads / p.size.num_heads_k;
    const BandMask mask = s.mask(p.mask);
    const int dim = p.size.head_dim;
    const int64_t ik = offset(p, p.k, true, b, s.k_row + j, hk), iv = offset(p, p.v, true, b, s.k_row + j, hk);
    const auto rounded = [](double x) { return kRound ? round_to<kType>(x) : x; };
    double dk[2] = {}, dv[2] = {};
    for (int g = 0; g < group; ++g) {
        const int head = hk * group + g;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < s.seqlen_q; i += 128) {
            const int64_t row = flat_row(p, s, false, b, i) * p.size.num_heads + head;
            double w = 0, ds = 0;
            if (mask.visible(i, j)) {
                const double score = rounded(dot<kType>(p.q.data, offset(p, p.q, false, b, s.q_row + i, head), p.k.data, ik, dim) * p.score.softmax_scale);
                const double dp = rounded(dot<kType>(p.dout.data, offset(p, p.dout, false, b, s.q_row + i, head), p.v.data, iv, dim));
                w = rounded(exp(score - r.lse[row]));
                ds = rounded(w * (dp - r.delta[row]));
            }
            weights[2 * i] = w;
            weights[2 * i + 1] = ds;
        }
        __syncthreads();
        for (int n = 0; n < 2; ++n) {
            const int d = threadIdx.x + 128 * n;
            for (int64_t i = 0; d < dim && i < s.seqlen_q; ++i) {
                if (!mask.visible(i, j)) continue;
                dv[n] += weights[2 * i] * load<kType>(p.dout.data, offset(p, p.dout, false, b, s.q_row + i, head) + d);
                dk[n] += weights[2 * i + 1] * load<kType>(p.q.data, offset(p, p.q, false, b, s.q_row + i, head) + d);
            }
        }
    }
    const int64_t row = flat_row(p, s, true, b, j) * p.size.num_heads_k + hk;
    for (int n = 0; n < 2; ++n) {
        const int d = threadIdx.x + 128 * n;
        if (d < dim) r.dv[row * dim + d] = rounded(dv[n]), r.dk[row * dim + d] = rounded(dk[n] * p.score.softmax_scale);
    }
}

/// Gives the kernel under test the out and lse of the exact forward.
template <DType kType>
__global__ void export_forward(BackwardParams p, Reference r) {
    const int head = blockIdx.y, b = blockIdx.z;
    const Sequence s = sequence_of(p, b);
    const int64_t i = blockIdx.x;
    if (i >= s.rows_q) return;
    const int64_t row = flat_row(p, s, false, b, i) * p.size.num_heads + head;
    for (int d = threadIdx.x; d < p.size.head_dim; d += 128) {
        const int64_t at = offset(p, p.out, false, b, s.q_row + i, head) + d;
        if (p.out_dtype == DType::f32) store<DType::f32>(p.out.data, at, r.out[row * p.size.head_dim + d]);
        else store<kType>(p.out.data, at, r.out[row * p.size.head_dim + d]);
    }
    if (threadIdx.x == 0) p.lse.data[offset(p, TensorRef{nullptr, p.lse.batch_stride, 1, p.lse.head_stride}, false, b, s.q_row + i, head)] = static_cast<float>(r.lse[row]);
}

/// max |got - exact|, max |naive - exact| and max |exact|; NaN counts as infinity.
template <DType kType>
__global__ void compare(BackwardParams p, TensorRef got, bool keys, const double* exact, const double* naive, float initial, double* result) {
    const int head = blockIdx.y, b = blockIdx.z;
    const int heads = keys ? p.size.num_heads_k : p.size.num_heads;
    const Sequence s = sequence_of(p, b);
    const int64_t i = blockIdx.x;
    if (i >= (keys ? s.rows_k : s.rows_q)) return;
    const int64_t row = flat_row(p, s, keys, b, i) * heads + head;
    double mine = 0, theirs = 0, size = 0;
    for (int d = threadIdx.x; d < p.size.head_dim; d += 128) {
        const double x = load<kType>(got.data, offset(p, got, keys, b, (keys ? s.k_row : s.q_row) + i, head) + d) - initial;
        const double e = exact[row * p.size.head_dim + d];
        const double error = fabs(x - e);
        mine = fmax(mine, isnan(error) ? INFINITY : error);
        theirs = fmax(theirs, fabs(naive[row * p.size.head_dim + d] - e));
        size = fmax(size, fabs(e));
    }
    const auto raise = [](double* at, double x) { atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(__double_as_longlong(x))); };
    raise(result, mine);
    raise(result + 1, theirs);
    raise(result + 2, size);
}

}  // namespace strobe::backward_dev
