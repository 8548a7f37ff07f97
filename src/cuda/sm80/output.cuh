// Between tensors in global memory and a CTA: addressing of operands and results, and the way out of accumulators.
#pragma once

#include "core/params.hpp"
#include "cuda/sm80/tile.cuh"

namespace strobe::sm80 {

/// The rows of one (batch, head) of a 16-bit tensor, from `row` on.
struct Operand {
    const uint16_t* data;
    int64_t row_stride;

    __device__ Operand(const TensorRef& t, int batch, int64_t row, int head)
        : data(static_cast<const uint16_t*>(t.data) + batch * t.batch_stride + row * t.row_stride +
               head * t.head_stride),
          row_stride(t.row_stride) {}

    __device__ const uint16_t* row(int64_t i) const { return data + i * row_stride; }
    __device__ bool aligned(int cols) const {
        return (reinterpret_cast<uintptr_t>(data) & 15) == 0 && row_stride % 8 == 0 && cols % 8 == 0;
    }
};

/// The same of a tensor that is written, of type `dtype`: the kernel's 16-bit type or fp32.
struct Result {
    char* data;
    int64_t row_stride;
    bool is_float;

    __device__ Result(const TensorRef& t, DType dtype, int batch, int64_t row, int head)
        : row_stride(t.row_stride), is_float(dtype == DType::f32) {
        const int64_t offset = batch * t.batch_stride + row * t.row_stride + head * t.head_stride;
        data = static_cast<char*>(t.data) + offset * (is_float ? 4 : 2);
    }

    __device__ bool aligned(int cols) const {
        return (reinterpret_cast<uintptr_t>(data) & 15) == 0 && row_stride % 8 == 0 && cols % 8 == 0;
    }
    __device__ float* float_row(int64_t i) const { return reinterpret_cast<float*>(data) + i * row_stride; }
    __device__ uint16_t* half_row(int64_t i) const { return reinterpret_cast<uint16_t*>(data) + i * row_stride; }
};

/// Accumulator fragments, pairs of n-atoms kStride * 16 columns apart from col0 on, straight to an fp32 tensor.
template <int kStride, int kMAtoms, int kNAtoms>
__device__ __forceinline__ void store_float(const float (&acc)[kMAtoms][kNAtoms][4], const Result& out, int row0,
                                            int col0, int rows_valid, int cols_valid, bool accumulate, int lane) {
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = row0 + 16 * i + 8 * (e >> 1) + lane / 4;
            if (row >= rows_valid) continue;
            float* to = out.float_row(row);
#pragma unroll
            for (int j = 0; j < kNAtoms; ++j) {
                const int col = col0 + 16 * kStride * (j >> 1) + 8 * (j & 1) + 2 * (lane % 4) + (e & 1);
                if (col >= cols_valid) continue;
                to[col] = accumulate ? to[col] + acc[i][j][e] : acc[i][j][e];
            }
        }
}

/// Accumulator fragments, rounded, into a tile of shared memory.
template <DType kType, int kCols, int kStride, int kMAtoms, int kNAtoms>
__device__ __forceinline__ void fragments_to_tile(const float (&acc)[kMAtoms][kNAtoms][4], uint32_t tile, int row0,
                                                  int col0, int lane) {
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int j = 0; j < kNAtoms; ++j) {
                const int row = row0 + 16 * i + 8 * h + lane / 4;
                const int chunk = (col0 >> 3) + 2 * kStride * (j >> 1) + (j & 1);
                store_shared(tile + TileLayout<kCols>::offset(row, chunk) + 4 * (lane % 4),
                             pack<kType>(acc[i][j][2 * h], acc[i][j][2 * h + 1]));
            }
}

/// kRows of a tile in shared memory to a 16-bit tensor, by `threads` threads, 16 bytes each where the tensor allows.
template <int kCols, int kRows, bool kAligned>
__device__ __forceinline__ void tile_to_global(uint32_t tile, const Result& out, int rows_valid, int cols_valid,
                                               int thread, int threads) {
    constexpr int kChunks = kCols / 8;
    const bool aligned = kAligned || out.aligned(cols_valid);
#pragma unroll 4
    for (int index = thread; index < kRows * kChunks; index += threads) {
        const int row = index / kChunks, chunk = index % kChunks;
        if (row >= rows_valid || chunk * 8 >= cols_valid) continue;
        const uint4 v = load_shared_16(tile + TileLayout<kCols>::offset(row, chunk));
        uint16_t* to = out.half_row(row) + chunk * 8;
        if (aligned) {
            *reinterpret_cast<uint4*>(to) = v;
        } else {
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (chunk * 8 + i < cols_valid) to[i] = static_cast<uint16_t>(w[i >> 1] >> (16 * (i & 1)));
            }
        }
    }
}

/// The same for whole rows, 16 bytes at a time: a fraction of the instructions. `tile` is on a multiple of 128 bytes.
template <int kCols, int kRows, int kThreads>
__device__ __forceinline__ void whole_tile_to_global(uint32_t tile, const Result& out, int thread) {
    constexpr int kChunks = kCols / 8, kAtOnce = kThreads / kChunks;
    static_assert(TileLayout<kCols>::kWideRows && kThreads % kChunks == 0 && 8 % kAtOnce == 0 && kRows % kAtOnce == 0);
    const int row = thread / kChunks, chunk = thread % kChunks;
    const uint32_t from = tile + TileLayout<kCols>::offset(row, chunk);
    uint16_t* to = out.half_row(row) + chunk * 8;
    const int64_t step = kAtOnce * out.row_stride;
#pragma unroll
    for (int i = 0; i < kRows; i += kAtOnce) {
        *reinterpret_cast<uint4*>(to) = load_shared_16((from ^ (i & 7) << 4) + i * TileLayout<kCols>::kRowBytes);
        to += step;
    }
}

/// A warp's accumulators of kRows x kCols to its tensor rows.
/// `tile` is kRows of shared memory that belong to this warp.
template <DType kType, int kCols, int kRows, bool kAligned, int kMAtoms, int kNAtoms>
__device__ __forceinline__ void store_rows(const float (&acc)[kMAtoms][kNAtoms][4], uint32_t tile, const Result& out,
                                           int rows_valid, int cols_valid, bool accumulate, int lane) {
    if (out.is_float) {
        store_float<1>(acc, out, 0, 0, rows_valid, cols_valid, accumulate, lane);
        return;
    }
    __syncwarp();
    fragments_to_tile<kType, kCols, 1>(acc, tile, 0, 0, lane);
    __syncwarp();
    tile_to_global<kCols, kRows, kAligned>(tile, out, rows_valid, cols_valid, lane, 32);
}

}  // namespace strobe::sm80
