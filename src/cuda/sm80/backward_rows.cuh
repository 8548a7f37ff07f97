// The passes over query rows around the main backward kernel: row statistics before it, dQ's conversion after it.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm80/backward_workspace.hpp"
#include "cuda/sm80/config.hpp"
#include "cuda/sm80/output.cuh"

namespace strobe::sm80 {

constexpr int kRowThreads = 256;

/// lse in base 2 and delta = rowsum(dout * out) - dlse of one query tile; rows that take no part get lse +inf, hence P = 0.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(kRowThreads)
    backward_row_statistics(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardWorkspace ws) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr bool kAligned = V.features == Features::plain;
    constexpr int kPairs = (V.head_dim + 63) / 64;  // pairs of elements per lane
    constexpr int kRowsAtOnce = 4;
    const int64_t head_index = blockIdx.y + static_cast<int64_t>(blockIdx.z) * gridDim.y;
    if (head_index >= static_cast<int64_t>(p.size.batch) * p.size.num_heads) return;
    const int batch = static_cast<int>(head_index / p.size.num_heads);
    const int head = static_cast<int>(head_index % p.size.num_heads);
    const Sequence seq = sequence_of(p, batch);
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * V.block_m;
    if (row0 >= seq.rows_q) return;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const Operand dout(p.dout, batch, seq.q_row + row0, head);
    const Result out(p.out, p.out_dtype, batch, seq.q_row + row0, head);
    const int cols = p.size.head_dim_v;
    const int64_t stat0 = (ws.first_tile(p, seq, batch, head) + blockIdx.x) * V.block_m;

    const auto read_dout = [&](const uint16_t* row, int col) -> float2 {
        if (kAligned) {
            return col < cols ? unpack2<V.dtype>(*reinterpret_cast<const uint32_t*>(row + col)) : float2{0.0f, 0.0f};
        }
        return {col < cols ? unpack<V.dtype>(row[col]) : 0.0f, col + 1 < cols ? unpack<V.dtype>(row[col + 1]) : 0.0f};
    };
    const auto read_out = [&](int64_t row, int col) -> float2 {
        if (!out.is_float) return read_dout(out.half_row(row), col);
        return {col < cols ? out.float_row(row)[col] : 0.0f, col + 1 < cols ? out.float_row(row)[col + 1] : 0.0f};
    };
    for (int first = warp; first < V.block_m; first += kRowsAtOnce * (kRowThreads / kWarpSize)) {
        float2 a[kRowsAtOnce][kPairs], b[kRowsAtOnce][kPairs];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            const int row = first + r * (kRowThreads / kWarpSize);
            const bool live = row < V.block_m && row0 + row < seq.seqlen_q;
#pragma unroll
            for (int k = 0; k < kPairs; ++k) {
                const int col = 2 * lane + 64 * k;
                a[r][k] = live ? read_dout(dout.row(row), col) : float2{0.0f, 0.0f};
                b[r][k] = live ? read_out(row, col) : float2{0.0f, 0.0f};
            }
        }
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
            const int row = first + r * (kRowThreads / kWarpSize);
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < kPairs; ++k) sum += a[r][k].x * b[r][k].x + a[r][k].y * b[r][k].y;
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
            if (lane != 0 || row >= V.block_m) continue;
            float lse = -INFINITY, dlse = 0.0f;
            if (row0 + row < seq.seqlen_q) {
                const int64_t at = seq.q_row + row0 + row;
                lse = p.lse.data[batch * p.lse.batch_stride + head * p.lse.head_stride + at];
                if (p.dlse) dlse = p.dlse.data[batch * p.dlse.batch_stride + head * p.dlse.head_stride + at];
            }
            const bool sees = lse != -INFINITY;
            ws.lse_log2[stat0 + row] = sees ? lse * kLog2e : INFINITY;
            ws.delta[stat0 + row] = sees ? sum - dlse : 0.0f;
        }
    }
}

/// Fragment order of the dQ accumulator: group f of a warp's tile holds four elements of every lane. One vector reduction
/// per lane where the device has it (sm_90), else four coalesced scalar ones.
__device__ __forceinline__ int64_t dq_offset(int f, int lane, int e) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return (f * 32 + lane) * 4 + e;
#else
    return (f * 4 + e) * 32 + lane;
#endif
}

__device__ __forceinline__ void add_dq_group(float* warp_tile, int f, int lane, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(warp_tile + dq_offset(f, lane, 0)), "f"(a), "f"(b),
                 "f"(c), "f"(d)
                 : "memory");
#else
    atomicAdd(warp_tile + dq_offset(f, lane, 0), a);
    atomicAdd(warp_tile + dq_offset(f, lane, 1), b);
    atomicAdd(warp_tile + dq_offset(f, lane, 2), c);
    atomicAdd(warp_tile + dq_offset(f, lane, 3), d);
#endif
}

/// dQ = softmax_scale * accumulator, in the caller's layout and type.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(BackwardConfig(cuda::decode_variant(kVariantCode)).threads)
    backward_convert_dq(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardWorkspace ws) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr BackwardConfig kConfig(V);
    constexpr int kRows = V.block_m / kConfig.dq_warps_m;
    constexpr int kPairs = V.head_dim / kConfig.dq_warps_d / 16;
    const int64_t head_index = blockIdx.y + static_cast<int64_t>(blockIdx.z) * gridDim.y;
    if (head_index >= static_cast<int64_t>(p.size.batch) * p.size.num_heads) return;
    const int batch = static_cast<int>(head_index / p.size.num_heads);
    const int head = static_cast<int>(head_index % p.size.num_heads);
    const Sequence seq = sequence_of(p, batch);
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * V.block_m;
    if (row0 >= seq.rows_q) return;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int warp_row = warp / kConfig.dq_warps_d * kRows, warp_block = warp % kConfig.dq_warps_d;
    const float* from = ws.dq + (ws.first_tile(p, seq, batch, head) + blockIdx.x) * (V.block_m * V.head_dim) +
                        warp * (kRows * kPairs * 16);
    const Result dq(p.dq, p.grad_dtype, batch, seq.q_row + row0, head);
    const float scale = p.score.softmax_scale;
    const bool pairs_aligned = (reinterpret_cast<uintptr_t>(dq.data) & 3) == 0 && dq.row_stride % 2 == 0;
#pragma unroll
    for (int f = 0; f < kRows / 8 * kPairs; ++f) {
        const int row = warp_row + f / kPairs * 8 + lane / 4;
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = scale * from[dq_offset(f, lane, e)];
        if (row0 + row >= seq.rows_q) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int col = 16 * (f % kPairs * kConfig.dq_warps_d + warp_block) + 8 * half + 2 * (lane % 4);
            if (dq.is_float) {
                float* to = dq.float_row(row) + col;
                if (col < p.size.head_dim) to[0] = p.accumulate ? to[0] + x[2 * half] : x[2 * half];
                if (col + 1 < p.size.head_dim) to[1] = p.accumulate ? to[1] + x[2 * half + 1] : x[2 * half + 1];
            } else {
                uint16_t* to = dq.half_row(row) + col;
                const uint32_t two = pack<V.dtype>(x[2 * half], x[2 * half + 1]);
                if (pairs_aligned && col + 1 < p.size.head_dim) {
                    *reinterpret_cast<uint32_t*>(to) = two;
                } else {
                    if (col < p.size.head_dim) to[0] = static_cast<uint16_t>(two);
                    if (col + 1 < p.size.head_dim) to[1] = static_cast<uint16_t>(two >> 16);
                }
            }
        }
    }
}

}  // namespace strobe::sm80
