// Writes gradients from the accumulators of a 64 x dim tile.
#pragma once

#include "cuda/sm90/backward_ptx.cuh"
#include "cuda/sm90/backward_schedule.hpp"

namespace strobe::sm90 {

/// The rows of one head of a sequence in a gradient, and which two of them (row, row + 8) a thread's accumulators belong to.
struct GradRows {
    int64_t first;       // of the sequence, in elements
    int64_t row_stride;
    int rows;
    int dim;
    int row;
    int quad;            // the thread's place among the four that share a row

    __device__ __forceinline__ static GradRows of_keys(const BackwardParams& p, const TensorRef& grad, int dim,
                                                       const BackwardTile& tile, int row, int quad) {
        const Sequence seq = sequence_of(p, tile.batch);
        const int64_t batch = p.seqlens.cu_seqlens_k ? 0 : tile.batch * grad.batch_stride;
        return {batch + seq.k_row * grad.row_stride + tile.head_k * grad.head_stride, grad.row_stride,
                static_cast<int>(seq.rows_k), dim, row, quad};
    }
};

/// Transposes a 4 x 4 matrix of words over the four lanes of a quad: lane q ends up with word q of lanes 0...3.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int quad) {
    const auto exchange = [](uint32_t& a, uint32_t& b, bool upper, int distance) {
        const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, upper ? a : b, distance);
        if (upper) a = got; else b = got;
    };
    exchange(w[0], w[1], quad & 1, 1);
    exchange(w[2], w[3], quad & 1, 1);
    exchange(w[0], w[2], quad & 2, 2);
    exchange(w[1], w[3], quad & 2, 2);
}

template <DType kType, int kCount>
__device__ __forceinline__ void store_gradient(const BackwardParams& p, void* grad, const GradRows& at, const float (&acc)[kCount],
                                               float scale, int first_column = 0) {
    if (p.grad_dtype == DType::f32) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = at.row + 8 * r;
            if (row >= at.rows) continue;
            float* const out = static_cast<float*>(grad) + at.first + row * at.row_stride;
#pragma unroll
            for (int j = 0; j < kCount / 4; ++j) {
                const int column = first_column + 8 * j + 2 * at.quad;
                if (column >= at.dim) continue;
                float2 value = make_float2(acc[4 * j + 2 * r] * scale, acc[4 * j + 2 * r + 1] * scale);
                if (p.accumulate) {
                    const float2 old = *reinterpret_cast<const float2*>(out + column);
                    value = make_float2(value.x + old.x, value.y + old.y);
                }
                *reinterpret_cast<float2*>(out + column) = value;
            }
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < kCount / 4; j += 4) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                words[i] = pack_pair<kType>(acc[4 * (j + i) + 2 * r] * scale, acc[4 * (j + i) + 2 * r + 1] * scale);
            }
            transpose_quad(words, at.quad);
            const int row = at.row + 8 * r;
            const int column = first_column + 8 * (j + at.quad);
            if (row < at.rows && column < at.dim) {
                uint16_t* const out = static_cast<uint16_t*>(grad) + at.first + row * at.row_stride + column;
                store_global_vector(out, make_uint4(words[0], words[1], words[2], words[3]));
            }
        }
    }
}

}  // namespace strobe::sm90
