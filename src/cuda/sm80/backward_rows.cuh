// The passes over query rows around the main backward kernel: row statistics before it, dQ's conversion after it.
#pragma once

#include "cuda/common/kernel_variant.hpp"
#include "cuda/sm80/backward_workspace.hpp"
#include "cuda/sm80/config.hpp"
#include "cuda/sm80/output.cuh"
#include "cuda/sm80/score_gradient.cuh"

namespace strobe::sm80 {

constexpr int kRowThreads = 256;

/// lse as lse_factor says and delta = rowsum(dout * out) - dlse of one query tile; rows that take no part get lse +inf,
/// hence P = 0. Clears the tile's dQ accumulator and its turns.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(kRowThreads)
    backward_row_statistics(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardWorkspace ws) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr bool kGeneral = is_general(V.features);
    constexpr int kLanes = V.head_dim <= 32 ? 4 : V.head_dim <= 64 ? 8 : V.head_dim <= 128 ? 16 : 32;  // of one row
    constexpr int kRowsAtOnce = kRowThreads / kLanes;
    constexpr int kPasses = (V.block_m + kRowsAtOnce - 1) / kRowsAtOnce;
    const int64_t head_index = blockIdx.y + static_cast<int64_t>(blockIdx.z) * gridDim.y;
    if (ws.claims && head_index == 0 && blockIdx.x == 0 && threadIdx.x == 0) *ws.claims = 0;
    if (head_index >= static_cast<int64_t>(p.size.batch) * p.size.num_heads) return;
    const int batch = static_cast<int>(head_index / p.size.num_heads);
    const int head = static_cast<int>(head_index % p.size.num_heads);
    const Sequence seq = sequence_of(p, batch);
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * V.block_m;
    if (row0 >= seq.rows_q) return;
    const Operand dout(p.dout, batch, seq.q_row + row0, head);
    const Result out(p.out, p.out_dtype, batch, seq.q_row + row0, head);
    const int cols = p.size.head_dim_v;
    const int64_t tile = ws.template first_tile<V.block_m>(p, seq, batch, head) + blockIdx.x;
    const int thread = threadIdx.x, col = thread % kLanes * 8;
    const bool aligned = !kGeneral || (dout.aligned(cols) && out.aligned(cols));
    // delta without dropout's factor 1 / (1 - p), as dS: see score_gradient.cuh.
    const float keep = may_drop(V.features) && p.dropout.enabled() ? 1.0f / p.dropout.rescale : 1.0f;

    const auto read = [&](const uint16_t* row) -> uint4 {
        if (col >= cols) return {0, 0, 0, 0};
        return aligned ? *reinterpret_cast<const uint4*>(row + col) : gather_chunk(row + col, cols - col);
    };
    uint4 a[kPasses], b[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int row = thread / kLanes + pass * kRowsAtOnce;
        const bool live = row < V.block_m && row0 + row < seq.seqlen_q;
        a[pass] = b[pass] = {0, 0, 0, 0};
        if (live) a[pass] = read(dout.row(row));
        if (live && !out.is_float) b[pass] = read(out.half_row(row));
    }
    if (ws.turns && thread == 0) ws.turns[tile] = 0;
    if (ws.dq) {
        float4* const dq = reinterpret_cast<float4*>(ws.dq + tile * (V.block_m * V.head_dim));
#pragma unroll 4
        for (int i = thread; i < V.block_m * V.head_dim / 4; i += kRowThreads) dq[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int row = thread / kLanes + pass * kRowsAtOnce;
        const bool live = row < V.block_m && row0 + row < seq.seqlen_q;
        const uint32_t x[4] = {a[pass].x, a[pass].y, a[pass].z, a[pass].w};
        const uint32_t y[4] = {b[pass].x, b[pass].y, b[pass].z, b[pass].w};
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 u = unpack2<V.dtype>(x[i]);
            float2 w = unpack2<V.dtype>(y[i]);
            if (out.is_float && live) {
                if (col + 2 * i < cols) w.x = out.float_row(row)[col + 2 * i];
                if (col + 2 * i + 1 < cols) w.y = out.float_row(row)[col + 2 * i + 1];
            }
            sum = fmaf(u.x, w.x, fmaf(u.y, w.y, sum));
        }
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (thread % kLanes != 0 || row >= V.block_m) continue;
        float lse = -INFINITY, dlse = 0.0f;
        if (live) {
            const int64_t at = seq.q_row + row0 + row;
            lse = p.lse.data[batch * p.lse.batch_stride + head * p.lse.head_stride + at];
            if (p.dlse) dlse = p.dlse.data[batch * p.dlse.batch_stride + head * p.dlse.head_stride + at];
        }
        const bool sees = lse != -INFINITY;
        ws.lse[tile * V.block_m + row] = sees ? lse * lse_factor<V.features>(p) : INFINITY;
        ws.delta[tile * V.block_m + row] = sees ? keep * (sum - dlse) : 0.0f;
    }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kVectorReductions = true;
#else
constexpr bool kVectorReductions = false;
#endif

/// Fragment order of the dQ accumulator: atom f of a warp's tile, as its accumulator registers lie. One vector
/// reduction per lane where the device has it (sm_90), else four coalesced scalar ones.
__device__ __forceinline__ int64_t dq_offset(int f, int lane, int e) {
    return kVectorReductions ? (f * 32 + lane) * 4 + e : (f * 4 + e) * 32 + lane;
}

/// Adds a lane's part of an atom; `to` is its first element.
__device__ __forceinline__ void add_dq_atom(float* to, const float (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
#else
    for (int e = 0; e < 4; ++e) atomicAdd(to + 32 * e, x[e]);
#endif
}

__device__ __forceinline__ float4 read_dq_atom(const float* tile, int f, int lane) {
    if constexpr (kVectorReductions) {
        return *reinterpret_cast<const float4*>(tile + dq_offset(f, lane, 0));
    } else {
        return {tile[dq_offset(f, lane, 0)], tile[dq_offset(f, lane, 1)], tile[dq_offset(f, lane, 2)],
                tile[dq_offset(f, lane, 3)]};
    }
}

/// dQ = softmax_scale * accumulator, in the caller's layout and type.
template <uint64_t kVariantCode>
__global__ void __launch_bounds__(BackwardConfig(cuda::decode_variant(kVariantCode)).threads)
    backward_convert_dq(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardWorkspace ws) {
    constexpr Variant V = cuda::decode_variant(kVariantCode);
    constexpr BackwardConfig kConfig(V);
    constexpr int kRows = V.block_m / kConfig.dq_warps_m;
    constexpr int kNAtoms = V.head_dim / kConfig.dq_warps_d / 8;
    const int64_t head_index = blockIdx.y + static_cast<int64_t>(blockIdx.z) * gridDim.y;
    if (head_index >= static_cast<int64_t>(p.size.batch) * p.size.num_heads) return;
    const int batch = static_cast<int>(head_index / p.size.num_heads);
    const int head = static_cast<int>(head_index % p.size.num_heads);
    const Sequence seq = sequence_of(p, batch);
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * V.block_m;
    if (row0 >= seq.rows_q) return;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int warp_row = warp / kConfig.dq_warps_d * kRows, warp_block = warp % kConfig.dq_warps_d;
    const float* from =
        ws.dq + (ws.template first_tile<V.block_m>(p, seq, batch, head) + blockIdx.x) * (V.block_m * V.head_dim) +
        warp * (kRows * kNAtoms * 8);
    const Result dq(p.dq, p.grad_dtype, batch, seq.q_row + row0, head);
    constexpr int kMAtoms = kRows / 16;
    const bool drops = may_drop(V.features) && p.dropout.enabled();
    const float scale = p.score.softmax_scale * (drops ? p.dropout.rescale : 1.0f);
    float acc[kMAtoms][kNAtoms][4];
#pragma unroll
    for (int i = 0; i < kMAtoms; ++i)
#pragma unroll
        for (int j = 0; j < kNAtoms; ++j) {
            const float4 x = read_dq_atom(from, i * kNAtoms + j, lane);
            acc[i][j][0] = scale * x.x;
            acc[i][j][1] = scale * x.y;
            acc[i][j][2] = scale * x.z;
            acc[i][j][3] = scale * x.w;
        }
    const int rows_left = static_cast<int>(seq.rows_q - row0);
    if (dq.is_float) {
        store_float<kConfig.dq_warps_d>(acc, dq, warp_row, warp_block * 16, rows_left, p.size.head_dim, p.accumulate,
                                        lane);
        return;
    }
    __shared__ __align__(128) unsigned char smem[V.block_m * V.head_dim * 2];
    fragments_to_tile<V.dtype, V.head_dim, kConfig.dq_warps_d>(acc, smem_address(smem), warp_row, warp_block * 16,
                                                               lane);
    __syncthreads();
    tile_to_global<V.head_dim, V.block_m, !is_general(V.features)>(smem_address(smem), dq, rows_left, p.size.head_dim,
                                                                        threadIdx.x, kConfig.threads);
}

}  // namespace strobe::sm80
