// bf16: strobe. fp32: the plain kernels here, causal within each sequence, the last query at the last key.
#include <cmath>

#include "gpt/ops/cuda/common.cuh"
#include "gpt/ops/cuda/kernels.hpp"

namespace strobe::gpt::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

/// Which sequence a row belongs to, and where that lies.
struct Place {
    int64_t q_begin, q_end, k_begin, k_end;
};

__device__ Place place_of(const AttentionShape& s, const int32_t* borders, int64_t row) {
    int64_t low = 0, high = s.batch;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (borders[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return {s.cu_seqlens_q[low], s.cu_seqlens_q[low + 1], s.cu_seqlens_k[low], s.cu_seqlens_k[low + 1]};
}

/// A head's row, D columns spread over the lanes.
template <int C>
struct Row {
    float x[C];

    __device__ static Row load(const float* p, int64_t head_dim) {
        Row r;
#pragma unroll
        for (int i = 0; i < C; ++i) {
            const int64_t d = threadIdx.x % 32 + 32 * i;
            r.x[i] = d < head_dim ? p[d] : 0.0f;
        }
        return r;
    }
    __device__ void store(float* p, int64_t head_dim) const {
#pragma unroll
        for (int i = 0; i < C; ++i) {
            const int64_t d = threadIdx.x % 32 + 32 * i;
            if (d < head_dim) p[d] = x[i];
        }
    }
    __device__ float dot(const Row& other) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < C; ++i) sum += x[i] * other.x[i];
        return warp_sum(sum);
    }
    __device__ void add(float factor, const Row& other) {
#pragma unroll
        for (int i = 0; i < C; ++i) x[i] += factor * other.x[i];
    }
};

struct Views {
    AttentionShape s;
    int64_t q_stride, k_stride, v_stride, out_stride, dout_stride, dqkv_stride;
    const float *q, *k, *v, *dout;
    float *out, *lse, *dq, *dk, *dv;
    float scale;
};

// A warp per query row and head.
template <int C>
__global__ void forward_kernel(Views a) {
    const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, d = a.s.head_dim;
    if (index >= a.s.total_q * a.s.num_heads) return;
    const int64_t row = index / a.s.num_heads, head = index % a.s.num_heads;
    const int64_t head_k = head * a.s.num_heads_k / a.s.num_heads;
    const Place at = place_of(a.s, a.s.cu_seqlens_q, row);
    const int64_t last = at.k_end - (at.q_end - 1 - row);  // one behind the last key that the row sees
    const Row<C> q = Row<C>::load(a.q + row * a.q_stride + head * d, d);
    Row<C> sum{};
    float m = -INFINITY, total = 0.0f;
    for (int64_t j = at.k_begin; j < last; ++j) {
        const float score = a.scale * q.dot(Row<C>::load(a.k + j * a.k_stride + head_k * d, d));
        const float larger = fmaxf(m, score), shrink = expf(m - larger), p = expf(score - larger);
#pragma unroll
        for (int i = 0; i < C; ++i) sum.x[i] *= shrink;
        sum.add(p, Row<C>::load(a.v + j * a.v_stride + head_k * d, d));
        total = total * shrink + p;
        m = larger;
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int i = 0; i < C; ++i) sum.x[i] *= inverse;
    sum.store(a.out + row * a.out_stride + head * d, d);
    if (a.lse && threadIdx.x % 32 == 0) a.lse[head * a.s.total_q + row] = m + logf(total);
}

// A warp per query row and head: dq.
template <int C>
__global__ void dq_kernel(Views a) {
    const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, d = a.s.head_dim;
    if (index >= a.s.total_q * a.s.num_heads) return;
    const int64_t row = index / a.s.num_heads, head = index % a.s.num_heads;
    const int64_t head_k = head * a.s.num_heads_k / a.s.num_heads;
    const Place at = place_of(a.s, a.s.cu_seqlens_q, row);
    const int64_t last = at.k_end - (at.q_end - 1 - row);
    const Row<C> q = Row<C>::load(a.q + row * a.q_stride + head * d, d);
    const Row<C> dout = Row<C>::load(a.dout + row * a.dout_stride + head * d, d);
    const float delta = dout.dot(Row<C>::load(a.out + row * a.out_stride + head * d, d));
    const float lse = a.lse[head * a.s.total_q + row];
    Row<C> dq{};
    for (int64_t j = at.k_begin; j < last; ++j) {
        const Row<C> k = Row<C>::load(a.k + j * a.k_stride + head_k * d, d);
        const float p = expf(a.scale * q.dot(k) - lse);
        const float dp = dout.dot(Row<C>::load(a.v + j * a.v_stride + head_k * d, d));
        dq.add(a.scale * p * (dp - delta), k);
    }
    dq.store(a.dq + row * a.dqkv_stride + head * d, d);
}

// A warp per key row and key head: dk and dv, over the query heads that share it.
template <int C>
__global__ void dkv_kernel(Views a) {
    const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, d = a.s.head_dim;
    if (index >= a.s.total_k * a.s.num_heads_k) return;
    const int64_t row = index / a.s.num_heads_k, head_k = index % a.s.num_heads_k;
    const int64_t group = a.s.num_heads / a.s.num_heads_k;
    const Place at = place_of(a.s, a.s.cu_seqlens_k, row);
    const int64_t first = max(at.q_begin, at.q_end - (at.k_end - row));
    const Row<C> k = Row<C>::load(a.k + row * a.k_stride + head_k * d, d);
    const Row<C> v = Row<C>::load(a.v + row * a.v_stride + head_k * d, d);
    Row<C> dk{}, dv{};
    for (int64_t head = head_k * group; head < (head_k + 1) * group; ++head) {
        for (int64_t i = first; i < at.q_end; ++i) {
            const Row<C> q = Row<C>::load(a.q + i * a.q_stride + head * d, d);
            const Row<C> dout = Row<C>::load(a.dout + i * a.dout_stride + head * d, d);
            const float delta = dout.dot(Row<C>::load(a.out + i * a.out_stride + head * d, d));
            const float p = expf(a.scale * q.dot(k) - a.lse[head * a.s.total_q + i]);
            dv.add(p, dout);
            dk.add(a.scale * p * (dout.dot(v) - delta), q);
        }
    }
    dk.store(a.dk + row * a.dqkv_stride + head_k * d, d);
    dv.store(a.dv + row * a.dqkv_stride + head_k * d, d);
}

Views views_of(const AttentionForward& a) {
    Views v{};
    v.s = a.shape;
    v.q_stride = a.q_stride, v.k_stride = a.k_stride, v.v_stride = a.v_stride, v.out_stride = a.out_stride;
    v.q = as<float>(a.q), v.k = as<float>(a.k), v.v = as<float>(a.v);
    v.out = as<float>(a.out), v.lse = a.lse;
    v.scale = 1.0f / std::sqrt(static_cast<float>(a.shape.head_dim));
    return v;
}

template <class Fn>
void with_columns(int64_t head_dim, Fn&& fn) {
    if (head_dim <= 32) return fn(std::integral_constant<int, 1>());
    if (head_dim <= 64) return fn(std::integral_constant<int, 2>());
    if (head_dim <= 128) return fn(std::integral_constant<int, 4>());
    if (head_dim <= 256) return fn(std::integral_constant<int, 8>());
    if (head_dim <= 512) return fn(std::integral_constant<int, 16>());
    throw std::invalid_argument("attention: head_dim is " + std::to_string(head_dim) + ", at most 512 is possible");
}

}  // namespace

void plain_attention_forward(Exec& e, const AttentionForward& a) {
    const Views v = views_of(a);
    with_columns(a.shape.head_dim, [&](auto c) {
        forward_kernel<c><<<blocks_for(v.s.total_q * v.s.num_heads, kWarps), kThreads, 0, stream_of(e)>>>(v);
    });
    check_launch("attention_forward");
}

void plain_attention_backward(Exec& e, const AttentionBackward& a) {
    Views v = views_of(a.forward);
    v.dout_stride = a.dout_stride, v.dqkv_stride = a.dqkv_stride;
    v.dout = as<float>(a.dout);
    v.dq = as<float>(a.dq), v.dk = as<float>(a.dk), v.dv = as<float>(a.dv);
    with_columns(v.s.head_dim, [&](auto c) {
        dq_kernel<c><<<blocks_for(v.s.total_q * v.s.num_heads, kWarps), kThreads, 0, stream_of(e)>>>(v);
        dkv_kernel<c><<<blocks_for(v.s.total_k * v.s.num_heads_k, kWarps), kThreads, 0, stream_of(e)>>>(v);
    });
    check_launch("attention_backward");
}

void attention_forward(Exec& e, const AttentionForward& a) {
    if (decodes(a)) return decode_attention(e, a);
    a.q.precision == Precision::fp32 ? plain_attention_forward(e, a) : strobe_attention_forward(e, a);
}

void attention_backward(Exec& e, const AttentionBackward& a) {
    a.forward.q.precision == Precision::fp32 ? plain_attention_backward(e, a) : strobe_attention_backward(e, a);
}

}  // namespace strobe::gpt::cuda
