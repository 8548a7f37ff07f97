// The two memory-bound kernels around the backward pass: row statistics before it, conversion of dq behind it.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

inline constexpr int kRowThreads = 256;
inline constexpr int kMostOrderedSequences = 1024;

/// Eight consecutive elements of a row as fp32.
template <DType kType>
__device__ __forceinline__ void load_eight(const void* row, int column, float (&x)[8]) {
    if constexpr (kType == DType::f32) {
        const float4* const p = reinterpret_cast<const float4*>(static_cast<const float*>(row) + column);
        const float4 a = p[0], b = p[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        const uint4 a = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + column);
        const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack_pair<kType>(words[i]);
            x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
        }
    }
}

__device__ __forceinline__ const void* element(const TensorRef& t, DType type, int64_t index) {
    return static_cast<const char*>(t.data) + index * (type == DType::f32 ? 4 : 2);
}

/// Writes eight columns of a dq row.
template <DType kType>
__device__ __forceinline__ void store_eight(const BackwardParams& p, int64_t index, const float (&x)[8]) {
    if (p.grad_dtype == DType::f32) {
        float4* const out = reinterpret_cast<float4*>(static_cast<float*>(p.dq.data) + index);
        float4 lo = make_float4(x[0], x[1], x[2], x[3]), hi = make_float4(x[4], x[5], x[6], x[7]);
        if (p.accumulate) {
            const float4 a = out[0], b = out[1];
            lo = make_float4(lo.x + a.x, lo.y + a.y, lo.z + a.z, lo.w + a.w);
            hi = make_float4(hi.x + b.x, hi.y + b.y, hi.z + b.z, hi.w + b.w);
        }
        out[0] = lo;
        out[1] = hi;
    } else {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.dq.data) + index) =
            make_uint4(pack_pair<kType>(x[0], x[1]), pack_pair<kType>(x[2], x[3]), pack_pair<kType>(x[4], x[5]),
                       pack_pair<kType>(x[6], x[7]));
    }
}

/// dq = 0 for the query tile from row0 on, if none of its rows sees a key.
template <Variant V>
__device__ __forceinline__ void clear_unseen_rows(const BackwardParams& p, const Sequence& seq, int batch, int head,
                                                  int64_t row0) {
    constexpr int kColumns = V.head_dim / 8;
    if (p.accumulate || (row0 < seq.seqlen_q && !seq.mask(p.mask).key_range(row0, row0 + V.block_m).empty())) return;
    const int64_t batch_q = p.seqlens.cu_seqlens_q ? 0 : batch;
    const int64_t dq0 = batch_q * p.dq.batch_stride + head * p.dq.head_stride + seq.q_row * p.dq.row_stride;
    for (int i = threadIdx.x; i < V.block_m * kColumns; i += kRowThreads) {
        const int64_t row = row0 + i / kColumns;
        const int column = i % kColumns * 8;
        if (row < seq.rows_q && column < p.size.head_dim) {
            store_eight<V.dtype>(p, dq0 + row * p.dq.row_stride + column, {});
        }
    }
}

/// Numbers the sequences from the longest to the shortest, so that the last work tiles are short ones.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(kRowThreads)
    backward_order_sequences(const __grid_constant__ BackwardParams p, int32_t* sequences) {
    __shared__ int rows[kMostOrderedSequences];
    for (int b = threadIdx.x; b < p.size.batch; b += kRowThreads) {
        rows[b] = static_cast<int>(sequence_of(p, b).seqlen_q);
    }
    __syncthreads();
    for (int b = threadIdx.x; b < p.size.batch; b += kRowThreads) {
        const int mine = rows[b];
        int longer = 0;
        for (int i = 0; i < p.size.batch; ++i) longer += rows[i] > mine || (rows[i] == mine && i < b);
        sequences[longer] = b;
    }
}

/// The row statistics of one query tile and head: -lse log2(e) and dlse - rowsum(dout * out). Rows past the sequence
/// and rows that see no key get -inf, so that P = 0 there. Also clears the dq accumulator, the semaphores and the work
/// counter, or with whole heads dq itself where no key tile will come by.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(kRowThreads)
    backward_row_stats(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardLaunch launch) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    using C = BackwardConfig<V>;
    constexpr int kLanes = C::kDim <= 64 ? 8 : C::kDim <= 128 ? 16 : 32;  // threads of one row, 16 bytes each
    constexpr int kRowsAtOnce = kRowThreads / kLanes;
    release_downstream_kernel();
    // The heads that the main kernel begins with come last: they are in L2 then.
    const int m = blockIdx.x, head = gridDim.y - 1 - blockIdx.y;
    const int position = launch.first_position + gridDim.z - 1 - blockIdx.z;
    if (m == 0 && head == 0 && position == 0 && threadIdx.x == 0) {
        launch.counter[0] = launch.counter[kStatisticsTickets] = launch.counter[kConversionTickets] = 0;
    }
    if (m == 0 && head == 0 && position == 0) {
        for (int i = threadIdx.x; i < launch.schedule.shared.counters(V); i += kRowThreads) launch.finished[i] = 0;
    }
    if (launch.inner_rows) {
        const int key_head = position * p.size.num_heads_k + head / (p.size.num_heads / p.size.num_heads_k);
        const int blocks = gridDim.x * gridDim.y * gridDim.z;
        const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + m;
        for (int i = block * kRowThreads + threadIdx.x; i < launch.schedule.heads; i += blocks * kRowThreads) {
            launch.ready[i] = launch.done[i] = 0;
        }
        if (key_head >= launch.first_inner_head) return;
    }
    const int batch = launch.schedule.sequences ? launch.schedule.sequences[position] : position;
    const Sequence seq = sequence_of(p, batch);
    if (launch.schedule.whole_heads) clear_unseen_rows<V>(p, seq, batch, head, static_cast<int64_t>(m) * C::kBlockM);
    if (static_cast<int64_t>(m) * C::kBlockM >= seq.seqlen_q) return;
    const int64_t padded = head * launch.tiles + first_padded_tile(p, seq, batch, C::kBlockM) + m;
    if (!launch.schedule.whole_heads) {
        if (threadIdx.x == 0) launch.semaphore[padded] = 0;
        float4* const dq = reinterpret_cast<float4*>(launch.dq + padded * (C::kBlockM * C::kDim));
#pragma unroll
        for (int i = threadIdx.x; i < C::kBlockM * C::kDim / 4; i += kRowThreads) {
            dq[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        }
    }

    const int column = threadIdx.x % kLanes * 8;
    const int64_t batch_q = p.seqlens.cu_seqlens_q ? 0 : batch;
    const int64_t out0 = batch_q * p.out.batch_stride + head * p.out.head_stride;
    const int64_t dout0 = batch_q * p.dout.batch_stride + head * p.dout.head_stride;
#pragma unroll
    for (int pass = 0; pass < C::kBlockM / kRowsAtOnce; ++pass) {
        const int row = pass * kRowsAtOnce + threadIdx.x / kLanes;
        const int64_t query = static_cast<int64_t>(m) * C::kBlockM + row;
        float sum = 0.0f;
        if (query < seq.seqlen_q && column < p.size.head_dim_v) {
            float o[8], g[8];
            const int64_t at = seq.q_row + query;
            load_eight<V.dtype>(element(p.dout, V.dtype, dout0 + at * p.dout.row_stride), column, g);
            const void* const out_row = element(p.out, p.out_dtype, out0 + at * p.out.row_stride);
            if (p.out_dtype == DType::f32) {
                load_eight<DType::f32>(out_row, column, o);
            } else {
                load_eight<V.dtype>(out_row, column, o);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += o[i] * g[i];
        }
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
        if (threadIdx.x % kLanes == 0) {
            float minus_lse = -INFINITY;
            float delta = 0.0f;
            if (query < seq.seqlen_q) {
                const int64_t at = batch_q * p.lse.batch_stride + head * p.lse.head_stride + seq.q_row + query;
                const float lse = p.lse.data[at];
                if (lse != -INFINITY) {
                    minus_lse = -lse * kLog2E;
                    const int64_t at_dlse =
                        batch_q * p.dlse.batch_stride + head * p.dlse.head_stride + seq.q_row + query;
                    delta = p.dlse ? sum - p.dlse.data[at_dlse] : sum;
                }
            }
            float* const stats = launch.stats + padded * 2 * C::kBlockM;
            stats[row] = minus_lse;
            stats[C::kBlockM + row] = -delta;
        }
    }
}

/// A unit of dq^T is stored as (4 warps, 64 queries / 8, 32 lanes, 4): lane l of warp w holds queries 2 (l % 4), + 1 of
/// columns 16 w + l / 4 and 8 further.
template <uint64_t kVariantCode>
__device__ __forceinline__ void convert_transposed(const BackwardParams& p, const float4* acc, int64_t row0,
                                                   const Sequence& seq, int64_t dq0) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    if (threadIdx.x >= 128) return;
    const int quad = threadIdx.x % 4, warp = threadIdx.x / 4 % 4, j = threadIdx.x / 16;
    float x[2][2][8] = {};  // row, half of the 16 columns
    if (row0 < seq.seqlen_q) {
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            const float4 a = acc[warp * 256 + j * 32 + g * 4 + quad];
            const float scale = p.score.softmax_scale;
            x[0][0][g] = a.x * scale, x[1][0][g] = a.y * scale, x[0][1][g] = a.z * scale, x[1][1][g] = a.w * scale;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t row = row0 + 8 * j + 2 * quad + r;
        if (row >= seq.rows_q) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = 16 * warp + 8 * half;
            if (column < p.size.head_dim) store_eight<V.dtype>(p, dq0 + row * p.dq.row_stride + column, x[r][half]);
        }
    }
}

/// dq = softmax_scale * accumulator, for one 64-row unit and head. A unit is stored as (dim / 8, 128 threads, 4):
/// thread t holds columns 2 (t % 4), + 1 of rows 16 (t / 32) + t % 32 / 4 and 8 below.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(kRowThreads)
    backward_convert_dq(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardLaunch launch) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    using C = BackwardConfig<V>;
    constexpr int kColumns = C::kDim / 8;
    constexpr int kItems = 32 * kColumns;  // two rows by eight columns each
    // The heads that the main kernel ended with come first, out of L2.
    const int unit = blockIdx.x, head = gridDim.y - 1 - blockIdx.y;
    const int position = launch.first_position + gridDim.z - 1 - blockIdx.z;
    wait_for_upstream_kernels();  // every block, or this kernel could count as finished before the one in front
    const int batch = launch.schedule.sequences ? launch.schedule.sequences[position] : position;
    const Sequence seq = sequence_of(p, batch);
    const int64_t row0 = static_cast<int64_t>(unit) * 64;
    if (row0 >= seq.rows_q) return;
    if (launch.inner_rows) {
        const int key_head = position * p.size.num_heads_k + head / (p.size.num_heads / p.size.num_heads_k);
        if (key_head < launch.inner_conversions) return;
    }
    const int64_t padded_unit =
        (head * launch.tiles + first_padded_tile(p, seq, batch, C::kBlockM)) * C::kQueryUnits + unit;
    const float4* const acc = reinterpret_cast<const float4*>(launch.dq + padded_unit * (64 * C::kDim));
    const int64_t batch_q = p.seqlens.cu_seqlens_q ? 0 : batch;
    const int64_t dq0 = batch_q * p.dq.batch_stride + head * p.dq.head_stride + seq.q_row * p.dq.row_stride;
    const float scale = p.score.softmax_scale;
    if constexpr (C::kTransposedDq) {
        convert_transposed<kVariantCode>(p, acc, row0, seq, dq0);
    } else {
#pragma unroll
        for (int item = threadIdx.x; item < kItems; item += kRowThreads) {
            const int j = item % kColumns;
            const int row = item / kColumns;  // warp * 8 + row of eight
            float upper[8] = {}, lower[8] = {};
            if (row0 < seq.seqlen_q) {
#pragma unroll
                for (int quad = 0; quad < 4; ++quad) {
                    const float4 a = acc[C::kWarpMajor ? row / 8 * (4 * C::kDim) + j * 32 + row % 8 * 4 + quad
                                                       : j * 128 + row * 4 + quad];
                    upper[2 * quad] = a.x * scale, upper[2 * quad + 1] = a.y * scale;
                    lower[2 * quad] = a.z * scale, lower[2 * quad + 1] = a.w * scale;
                }
            }
            if (j * 8 >= p.size.head_dim) continue;
            const int64_t first = row0 + row / 8 * 16 + row % 8;
            if (first < seq.rows_q) store_eight<V.dtype>(p, dq0 + first * p.dq.row_stride + j * 8, upper);
            if (first + 8 < seq.rows_q) store_eight<V.dtype>(p, dq0 + (first + 8) * p.dq.row_stride + j * 8, lower);
        }
    }
}

}  // namespace strobe::sm90
