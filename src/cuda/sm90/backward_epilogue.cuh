// Writes gradients from the accumulators of a 64 x dim tile.
#pragma once

#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

/// The rows of one head of a sequence in a gradient, and which
/// two of them (row, row + 8) a thread's accumulators belong to.
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

/// Of a shared tile: leaves this part of dK and dV for whoever finishes last. If that is this warp, it ends up with the
/// sums of all parts. `unit`: of 64 keys; `thread`: in its warpgroup. Warps have nothing to do with each other here.
template <Variant V, int kCount>
__device__ __forceinline__ bool sum_parts(const BackwardLaunch& launch, const BackwardTile& tile, int unit, int thread,
                                          float (&dk)[kCount], float (&dv)[kCount]) {
    constexpr int kUnits = V.block_n / 64;
    constexpr int kVectors = kCount / 4 * 128;
    const int parts = launch.schedule.shared.parts;
    const auto part_at = [&](int part) {
        return launch.parts + (int64_t{tile.shared * parts + part} * kUnits + unit) * (2 * kVectors) + thread;
    };
    float4* const mine = part_at(tile.part);
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
        __stcg(mine + i * 128, make_float4(dk[4 * i], dk[4 * i + 1], dk[4 * i + 2], dk[4 * i + 3]));
        __stcg(mine + kVectors + i * 128, make_float4(dv[4 * i], dv[4 * i + 1], dv[4 * i + 2], dv[4 * i + 3]));
    }
    __threadfence();
    __syncwarp();
    int before = 0;
    if (thread % 32 == 0) before = atomicAdd(launch.finished + (tile.shared * kUnits + unit) * 4 + thread / 32, 1);
    before = __shfl_sync(0xFFFFFFFFu, before, 0);
    if (before + 1 < parts) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < kCount; ++i) dk[i] = dv[i] = 0.0f;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
        const float4* const from = part_at(part);
        const auto add = [](float* sum, const float4& x) {
            sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
        };
#pragma unroll
        for (int i = 0; i < kCount / 4; ++i) {
            add(dk + 4 * i, __ldcg(from + i * 128));
            add(dv + 4 * i, __ldcg(from + kVectors + i * 128));
        }
    }
    return true;
}

/// The same for a warpgroup that has one of the gradients: 0, dK, or 1, dV.
template <Variant V, int kCount>
__device__ __forceinline__ bool sum_parts_of_one(const BackwardLaunch& launch, const BackwardTile& tile, int unit,
                                                 int gradient, int thread, float (&acc)[kCount]) {
    constexpr int kUnits = V.block_n / 64;
    constexpr int kVectors = kCount / 4 * 128;
    const int parts = launch.schedule.shared.parts;
    const auto part_at = [&](int part) {  // in 32 bits: at most 132 tiles of 8 parts, and no register to spare
        return launch.parts + (((tile.shared * parts + part) * kUnits + unit) * 2 + gradient) * kVectors + thread;
    };
    float4* const mine = part_at(tile.part);
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
        __stcg(mine + i * 128, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
    }
    __threadfence();
    __syncwarp();
    int before = 0;
    if (thread % 32 == 0) {
        before = atomicAdd(launch.finished + ((tile.shared * kUnits + unit) * 2 + gradient) * 4 + thread / 32, 1);
    }
    before = __shfl_sync(0xFFFFFFFFu, before, 0);
    if (before + 1 < parts) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < kCount; ++i) acc[i] = 0.0f;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
        const float4* const from = part_at(part);
#pragma unroll
        for (int i = 0; i < kCount / 4; ++i) {
            const float4 x = __ldcg(from + i * 128);
            acc[4 * i] += x.x, acc[4 * i + 1] += x.y, acc[4 * i + 2] += x.z, acc[4 * i + 3] += x.w;
        }
    }
    return true;
}

template <DType kType, int kCount>
__device__ __forceinline__ void store_gradient(const BackwardParams& p, void* grad, const GradRows& at,
                                               const float (&acc)[kCount], float scale, int first_column = 0) {
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
