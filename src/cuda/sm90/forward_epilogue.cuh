// The forward kernel's epilogue: normalised output and LSE of one warp's 16 rows, from wgmma accumulators to memory.
#pragma once

#include "cuda/sm90/forward_config.cuh"
#include "cuda/sm90/softmax.cuh"

namespace strobe::sm90 {

/// Where the two rows of a thread go and what they are multiplied by.
struct OutputRows {
    int row[2];       // counted from the sequence's start
    bool stored[2];   // exists in memory
    float inverse[2]; // 1 / row sum; 0 for a row that sees no key or does not count
};

__device__ __forceinline__ int64_t out_offset(const AttentionParams& p, const ForwardTile& tile, int row) {
    return tile.batch * p.out.batch_stride + (tile.q_row + row) * p.out.row_stride + tile.head * p.out.head_stride;
}

/// Finds how to scale the output. Rows past seqlen_q count as rows that see no key.
__device__ __forceinline__ OutputRows finish_rows(const ForwardTile& tile, int thread_row, OnlineSoftmax& softmax) {
    softmax.finish();
    OutputRows rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        rows.row[r] = thread_row + 8 * r;
        rows.stored[r] = rows.row[r] < tile.rows_q;
        const bool dead = softmax.sum(r) == 0.0f || rows.row[r] >= tile.seqlen_q;
        rows.inverse[r] = dead ? 0.0f : __frcp_rn(softmax.sum(r));
    }
    return rows;
}

__device__ __forceinline__ void store_lse(const AttentionParams& p, const ForwardTile& tile, const OutputRows& rows,
                                          const OnlineSoftmax& softmax) {
    if (!p.lse || threadIdx.x % 4 != 0) return;
    float* lse = p.lse.data + tile.batch * p.lse.batch_stride + tile.head * p.lse.head_stride + tile.q_row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (rows.stored[r]) lse[rows.row[r]] = rows.inverse[r] == 0.0f ? -INFINITY : softmax.lse(r);
    }
}

/// Multiplies, but keeps a NaN accumulator out of rows that see no key.
__device__ __forceinline__ float scaled(float x, float inverse) { return inverse == 0.0f ? 0.0f : x * inverse; }

template <typename Config>
__device__ void store_output_f32(const AttentionParams& p, const ForwardTile& tile, const OutputRows& rows,
                                 const float (&o)[Config::kHeadDim / 2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float* out = static_cast<float*>(p.out.data) + out_offset(p, tile, rows.row[r]) + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < Config::kHeadDim / 8; ++j) {
            if (rows.stored[r] && 8 * j < p.size.head_dim_v) {
                *reinterpret_cast<float2*>(out + 8 * j) = float2{scaled(o[4 * j + 2 * r], rows.inverse[r]),
                                                                 scaled(o[4 * j + 2 * r + 1], rows.inverse[r])};
            }
        }
    }
}

/// Through shared memory: `staging` is this warp's 16 rows of a buffer that is chunked and swizzled like queries. The
/// copy engine takes whole blocks of rows; where a varlen sequence ends inside the block, the warp stores what exists.
template <typename Config, DType kType>
__device__ __forceinline__ void store_output_staged(const ForwardArgs& args, const ForwardTile& tile, int warp_row,
                                                    const OutputRows& rows, const float (&o)[Config::kHeadDim / 2],
                                                    uint32_t staging) {
    constexpr int kSpan = Config::kSpan;
    constexpr uint32_t kSwizzleMask = kSpan == 128 ? 7 : 3;
    constexpr int kChunkBytes = Config::kGroupChunkBytes;
    const AttentionParams& p = args.params;
    const int lane = threadIdx.x % 32;
    const auto swizzled = [](uint32_t address) { return address ^ (address >> 7 & kSwizzleMask) << 4; };

    // Lane l addresses row l % 16 of the left (l < 16) or right half of 16 columns.
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
        const uint32_t column = i * 32 + lane / 16 * 16;  // bytes
        const uint32_t address = staging + column / kSpan * kChunkBytes + lane % 16 * kSpan + column % kSpan;
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[j] = pack<kType>(scaled(o[8 * i + 2 * j], rows.inverse[j % 2]),
                               scaled(o[8 * i + 2 * j + 1], rows.inverse[j % 2]));
        }
        store_matrices(swizzled(address), x);
    }
    fence_async_proxy();
    __syncwarp();
    const bool whole = !p.seqlens.cu_seqlens_q || warp_row + 16 <= tile.rows_q;
    if (whole) {
        if (lane == 0 && warp_row < tile.rows_q) {
#pragma unroll
            for (int c = 0; c < Config::kChunks; ++c) {
                tma_store(&args.out_map, staging + c * kChunkBytes, c * Config::kChunkCols, tile.q_row + warp_row,
                          tile.head, p.seqlens.cu_seqlens_q ? 0 : tile.batch);
            }
            bulk_commit();
        }
    } else {
        constexpr int kVectors = Config::kHeadDim / 8;
        const int count = min(16, tile.rows_q - warp_row) * kVectors;
#pragma unroll 1
        for (int i = lane; i < count; i += 32) {
            const int row = i / kVectors, column = i % kVectors * 8;
            if (column >= p.size.head_dim_v) continue;
            const uint32_t address = staging + column * 2 / kSpan * kChunkBytes + row * kSpan + column * 2 % kSpan;
            const uint4 x = load_shared_vector(swizzled(address));
            store_global_vector(static_cast<uint16_t*>(p.out.data) + out_offset(p, tile, warp_row + row) + column, x);
        }
        fence_async_proxy();
    }
}

/// A tile whose queries see no key, 64 rows by one warpgroup: out = 0, lse = -inf.
template <typename Config>
__device__ __noinline__ void store_nothing_seen(const AttentionParams& p, const ForwardTile& tile, int first_row) {
    const int thread = threadIdx.x % 128;
    const int element = p.out_dtype == DType::f32 ? 4 : 2;
    const int vectors = p.size.head_dim_v * element / 16;
    const int rows = min(64, tile.rows_q - first_row);
    for (int i = thread; i < rows * vectors; i += 128) {
        char* out = static_cast<char*>(p.out.data) + out_offset(p, tile, first_row + i / vectors) * element;
        reinterpret_cast<uint4*>(out)[i % vectors] = uint4{0, 0, 0, 0};
    }
    if (p.lse && thread < rows) {
        p.lse.data[tile.batch * p.lse.batch_stride + tile.head * p.lse.head_stride + tile.q_row + first_row + thread] =
            -INFINITY;
    }
}

}  // namespace strobe::sm90
