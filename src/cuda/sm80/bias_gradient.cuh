// How the gradient of the additive bias is divided among CTAs: each owns a tile of it
// as the caller stored it, and sums over every (batch, head, query tile, key tile)
// that broadcasts into it, in a fixed order: no atomics, no workspace, repeatable.
#pragma once

#include "core/numeric.hpp"
#include "core/params.hpp"

namespace strobe::sm80 {

/// How many of each axis a tile sums over, and how many tiles there are: an axis with stride 0 is summed.
struct BiasGradientGrid {
    int block_m, block_n;
    int sum_batch, sum_heads, sum_q_tiles, sum_k_tiles;
    int batches, heads, q_tiles, k_tiles;
    int first_batch = 0;  // of a launch

    static BiasGradientGrid make(const BackwardParams& p, int block_m, int block_n) {
        const auto tiles = [](int64_t rows, int block) { return static_cast<int>((rows + block - 1) / block); };
        const int q = tiles(p.size.seqlen_q, block_m);
        const int k = tiles(p.size.seqlen_k, block_n);
        const BiasRef& g = p.dbias;
        BiasGradientGrid r;
        r.block_m = block_m;
        r.block_n = block_n;
        r.sum_batch = g.batch_stride == 0 ? p.size.batch : 1;
        r.sum_heads = g.head_stride == 0 ? p.size.num_heads : 1;
        r.sum_q_tiles = g.row_stride == 0 ? q : 1;
        r.sum_k_tiles = g.col_stride == 0 ? k : 1;
        r.batches = p.size.batch / r.sum_batch;
        r.heads = p.size.num_heads / r.sum_heads;
        r.q_tiles = g.row_stride == 0 ? 1 : q;
        r.k_tiles = g.col_stride == 0 ? 1 : k;
        return r;
    }

    /// launch(grid) for all batches: in several launches where one
    /// grid has no room for them. Stops at an error, which it returns.
    template <class Launch>
    cudaError_t launch_all(Launch&& launch) {
        constexpr int kMostInAGrid = 65535;
        for (first_batch = 0; first_batch < batches; first_batch += kMostInAGrid) {
            const int here = batches - first_batch < kMostInAGrid ? batches - first_batch : kMostInAGrid;
            launch(dim3(static_cast<unsigned>(static_cast<int64_t>(q_tiles) * k_tiles), static_cast<unsigned>(heads),
                        static_cast<unsigned>(here)));
            if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess) return e;
        }
        return cudaSuccess;
    }

    __device__ int my_q_tile() const { return static_cast<int>(blockIdx.x % q_tiles); }
    __device__ int my_k_tile() const { return static_cast<int>(blockIdx.x / q_tiles); }
    __device__ int my_batch() const { return first_batch + static_cast<int>(blockIdx.z); }

    /// f(batch, head, query tile, key tile) of everything that this CTA sums.
    template <class F>
    __device__ __forceinline__ void for_each_item(F&& f) const {
        for (int b = 0; b < sum_batch; ++b) {
            for (int h = 0; h < sum_heads; ++h) {  // a loop for each axis: their product may be beyond 32 bits
                for (int q = 0; q < sum_q_tiles; ++q) {
                    for (int k = 0; k < sum_k_tiles; ++k) {
                        f(my_batch() + b, static_cast<int>(blockIdx.y) + h, my_q_tile() + q, my_k_tile() + k);
                    }
                }
            }
        }
    }

    /// Stores this CTA's tile of sums, block_m x block_n floats in
    /// shared memory; a broadcast row or column is summed by one thread.
    __device__ __forceinline__ void store(const BackwardParams& p, const float* tile, int threads) const {
        const BiasRef& out = p.dbias;
        const int rows_summed = out.row_stride == 0 ? block_m : 1, cols_summed = out.col_stride == 0 ? block_n : 1;
        const int rows = block_m / rows_summed, cols = block_n / cols_summed;
        for (int index = threadIdx.x; index < rows * cols; index += threads) {
            const int row = index / cols, col = index % cols;
            const int64_t query = static_cast<int64_t>(my_q_tile()) * rows + row;
            const int64_t key = static_cast<int64_t>(my_k_tile()) * cols + col;
            if (query >= p.size.seqlen_q || key >= p.size.seqlen_k) continue;
            float x = 0.0f;
            for (int r = 0; r < rows_summed; ++r) {
                for (int c = 0; c < cols_summed; ++c) x += tile[(row + r) * block_n + col + c];
            }
            store_element(out.data, p.dbias_dtype,
                          my_batch() * out.batch_stride + blockIdx.y * out.head_stride + query * out.row_stride +
                              key * out.col_stride,
                          x);
        }
    }
};

}  // namespace strobe::sm80
