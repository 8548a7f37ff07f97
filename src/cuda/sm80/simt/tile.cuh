// fp32 problems: FlashAttention-2 in plain fp32 arithmetic, one FMA after another, as exact as a naive fp32 evaluation. Tensor
// cores would round the operands: three bf16 products leave 2^-17 of each score and TF32 2^-11, where fp32 leaves 2^-24.
//
// A CTA's 16 x 16 threads share a tile of scores: stationary rows (queries, or keys in the backward) times streamed columns.
// Thread (y, x) holds the elements (y + 16 i, x + 16 j), and of a result row the columns 64 c + 4 x ... + 3.
#pragma once

#include "core/params.hpp"
#include "cuda/sm80/config.hpp"

namespace strobe::sm80::simt {

/// Rows of one (batch, head) of an fp32 tensor, from `row` on.
struct Rows {
    float* data;
    int64_t row_stride;

    __device__ Rows(const TensorRef& t, int batch, int64_t row, int head)
        : data(static_cast<float*>(t.data) + batch * t.batch_stride + row * t.row_stride + head * t.head_stride),
          row_stride(t.row_stride) {}

    __device__ float* row(int64_t i) const { return data + i * row_stride; }
};

/// kRows x kDim of `from` into shared memory, kDim + kPadding floats a row; rows and columns past the valid ones become zero.
template <int kRows, int kDim>
__device__ __forceinline__ void load_rows(float* tile, const Rows& from, int64_t rows_valid, int cols_valid) {
#pragma unroll 4
    for (int n = threadIdx.x; n < kRows * kDim; n += SimtConfig::kThreads) {
        const int row = n / kDim, col = n % kDim;
        tile[row * (kDim + SimtConfig::kPadding) + col] = row < rows_valid && col < cols_valid ? from.row(row)[col] : 0.0f;
    }
}

/// This thread's place.
struct Place {
    int x = threadIdx.x % SimtConfig::kSide;
    int y = threadIdx.x / SimtConfig::kSide;
};

/// acc(i, j) = dot of row y + 16 i of `a` and row x + 16 j of `b`.
template <int kDim, int kI, int kJ>
__device__ __forceinline__ void dot_rows(float (&acc)[kI][kJ], const float* a, const float* b, Place at) {
    constexpr int kStride = kDim + SimtConfig::kPadding, kSide = SimtConfig::kSide;
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int j = 0; j < kJ; ++j) acc[i][j] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < kDim; d += 4) {
        float4 u[kI], v[kJ];
#pragma unroll
        for (int i = 0; i < kI; ++i) u[i] = *reinterpret_cast<const float4*>(a + (at.y + kSide * i) * kStride + d);
#pragma unroll
        for (int j = 0; j < kJ; ++j) v[j] = *reinterpret_cast<const float4*>(b + (at.x + kSide * j) * kStride + d);
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                acc[i][j] = fmaf(u[i].x, v[j].x, acc[i][j]);
                acc[i][j] = fmaf(u[i].y, v[j].y, acc[i][j]);
                acc[i][j] = fmaf(u[i].z, v[j].z, acc[i][j]);
                acc[i][j] = fmaf(u[i].w, v[j].w, acc[i][j]);
            }
    }
}

/// What a thread holds of kI * 16 result rows.
template <int kDim, int kI>
struct RowSums {
    static constexpr int kChunks = kDim / 64;
    float value[kI][kChunks][4];

    __device__ RowSums() {
#pragma unroll
        for (int i = 0; i < kI; ++i) scale(i, 0.0f);
    }
    __device__ void scale(int i, float factor) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) value[i][c][e] = factor == 0.0f ? 0.0f : value[i][c][e] * factor;
    }

    /// += weights * x: `weights` is a tile of scores, `x` kCols rows of kDim.
    template <int kCols>
    __device__ __forceinline__ void add(const float* weights, const float* x, Place at) {
        constexpr int kSide = SimtConfig::kSide, kStride = kDim + SimtConfig::kPadding;
        constexpr int kWeightStride = kCols + SimtConfig::kPadding;
#pragma unroll 2
        for (int n = 0; n < kCols; n += 4) {
            float w[kI][4];
#pragma unroll
            for (int i = 0; i < kI; ++i) {
                const float4 four = *reinterpret_cast<const float4*>(weights + (at.y + kSide * i) * kWeightStride + n);
                w[i][0] = four.x, w[i][1] = four.y, w[i][2] = four.z, w[i][3] = four.w;
            }
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int c = 0; c < kChunks; ++c) {
                    const float4 v = *reinterpret_cast<const float4*>(x + (n + m) * kStride + 64 * c + 4 * at.x);
#pragma unroll
                    for (int i = 0; i < kI; ++i) {
                        value[i][c][0] = fmaf(w[i][m], v.x, value[i][c][0]);
                        value[i][c][1] = fmaf(w[i][m], v.y, value[i][c][1]);
                        value[i][c][2] = fmaf(w[i][m], v.z, value[i][c][2]);
                        value[i][c][3] = fmaf(w[i][m], v.w, value[i][c][3]);
                    }
                }
        }
    }

    /// Row i, times `factor`, to its place in memory.
    __device__ __forceinline__ void store(int i, float* to, float factor, int cols_valid, bool accumulate, Place at) const {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int col = 64 * c + 4 * at.x + e;
                if (col >= cols_valid) continue;
                const float x = factor == 0.0f ? 0.0f : value[i][c][e] * factor;
                to[col] = accumulate ? to[col] + x : x;
            }
    }
};

/// Over the sixteen threads that share a row.
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int n = 1; n < SimtConfig::kSide; n *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, n));
    return x;
}
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int n = 1; n < SimtConfig::kSide; n *= 2) x += __shfl_xor_sync(0xffffffffu, x, n);
    return x;
}

}  // namespace strobe::sm80::simt
