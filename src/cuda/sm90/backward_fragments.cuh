// Arithmetic on a (64 keys, block_m queries) tile of S^T or dP^T as one warpgroup's registers hold it: a thread has key
// rows r and r + 8 and, in every group of 8 queries, the columns 2 (t % 4), + 1. Packed to 16 bits, four words at a
// time form the left operand of a wgmma that contracts over 16 queries.
#pragma once

#include "cuda/sm90/backward_config.cuh"

namespace strobe::sm90 {

template <Variant V>
struct Fragments {
    using C = BackwardConfig<V>;
    static constexpr int kCount = C::kBlockM / 2;
    using Accumulator = float[kCount];
    using Weights = uint32_t[C::kBlockM / 16][4];
    using Gradient = float[C::kDim / 2];  // (64 keys, dim) of dK or dV

    /// One row statistic for each of a thread's query columns. Load it before waiting for the product it belongs to.
    using Statistic = float2[C::kBlockM / 8];

    __device__ __forceinline__ static void load(Statistic& statistic, const float* stats, int lane) {
#pragma unroll
        for (int j = 0; j < C::kBlockM / 8; ++j) {
            statistic[j] = *reinterpret_cast<const float2*>(stats + 8 * j + 2 * (lane % 4));
        }
    }

    /// P = exp2(c S - lse log2(e)).
    __device__ __forceinline__ static void probabilities(Weights& p, const Accumulator& s, const Statistic& minus_lse,
                                                         float scale_log2) {
#pragma unroll
        for (int j = 0; j < C::kBlockM / 8; ++j) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int e = 4 * j + 2 * r;
                p[j / 2][j % 2 * 2 + r] = pack_pair<V.dtype>(exp2_approx(s[e] * scale_log2 + minus_lse[j].x),
                                                             exp2_approx(s[e + 1] * scale_log2 + minus_lse[j].y));
            }
        }
    }

    /// P = 0 where the query does not see the key. `first_key` is this thread's upper key row.
    __device__ __forceinline__ static void hide(Weights& p, const TileMask& mask, int first_key, int query0, int lane) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const VisibleQueries seen = mask.of_key(first_key + 8 * r);
#pragma unroll
            for (int j = 0; j < C::kBlockM / 8; ++j) {
                const int query = query0 + 8 * j + 2 * (lane % 4);
                const uint32_t keep =
                    (seen.contains(query) ? 0x0000FFFFu : 0u) | (seen.contains(query + 1) ? 0xFFFF0000u : 0u);
                p[j / 2][j % 2 * 2 + r] &= keep;
            }
        }
    }

    /// dS = P (dP - delta) for queries 16 k ... 16 k + 15.
    __device__ __forceinline__ static void score_gradients(uint32_t (&ds)[4], const uint32_t (&p)[4],
                                                           const Accumulator& dp, const Statistic& minus_delta, int k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 weight = unpack_pair<V.dtype>(p[i]);
            const float2 shift = minus_delta[2 * k + i / 2];
            const int e = 8 * k + 2 * i;
            ds[i] = pack_pair<V.dtype>(weight.x * (dp[e] + shift.x), weight.y * (dp[e + 1] + shift.y));
        }
    }

    /// gradient (64 keys, dim) += weights (64 keys, queries 16 k ... 16 k + 15) times
    /// these rows of a query tile in shared memory. At most 128 columns at a time: before
    /// registers are reallocated a thread has 128, and an instruction must fit that.
    __device__ __forceinline__ static void multiply_over_sixteen_queries(Gradient& gradient,
                                                                         const uint32_t (&weights)[4], uint32_t tile,
                                                                         int k) {
        constexpr int kFirst = C::kDim < 128 ? C::kDim : 128;
        const uint64_t rows = mn_major(tile, C::kQueryChunkBytes) + k * (16 * C::kRowBytes >> 4);
        Wgmma<kFirst>::template rs<V.dtype, 1>(reinterpret_cast<float(&)[kFirst / 2]>(gradient[0]), weights, rows, 1);
        if constexpr (C::kDim > 128) {
            constexpr int kRest = C::kDim - 128;
            Wgmma<kRest>::template rs<V.dtype, 1>(reinterpret_cast<float(&)[kRest / 2]>(gradient[64]), weights,
                                                  rows + (2 * C::kQueryChunkBytes >> 4), 1);
        }
    }

    __device__ __forceinline__ static void multiply_over_queries(Gradient& gradient, const Weights& weights,
                                                                 uint32_t tile) {
#pragma unroll
        for (int k = 0; k < C::kBlockM / 16; ++k) multiply_over_sixteen_queries(gradient, weights[k], tile, k);
    }

    /// Half of multiply_over_queries: the columns of one half of the tile.
    __device__ __forceinline__ static void multiply_half_over_queries(Gradient& gradient, const Weights& weights,
                                                                      uint32_t tile, int half) {
        constexpr int kColumns = C::kDim / 2;
        static_assert(kColumns % 64 == 0 && kColumns <= 128);
        const uint64_t first = mn_major(tile + half * (C::kChunks / 2 * C::kQueryChunkBytes), C::kQueryChunkBytes);
#pragma unroll
        for (int k = 0; k < C::kBlockM / 16; ++k) {
            Wgmma<kColumns>::template rs<V.dtype, 1>(
                reinterpret_cast<float(&)[kColumns / 2]>(gradient[half * (kColumns / 2)]), weights[k],
                first + k * (16 * C::kRowBytes >> 4), 1);
        }
    }

    /// Half of multiply_over_dim: the products of one half of the columns, added to those of the first.
    __device__ __forceinline__ static void multiply_over_half_dim(Accumulator& acc, uint32_t key_rows,
                                                                  uint32_t query_rows, int half) {
        constexpr int kHalf = C::kChunks / 2;
        const uint64_t a = k_major(key_rows + half * kHalf * C::kKeyChunkBytes);
        const uint64_t b = k_major(query_rows + half * kHalf * C::kQueryChunkBytes);
#pragma unroll
        for (int k = 0; k < C::kDim / 32; ++k) {
            const int chunk = k / 4, within = k % 4 * 2;
            Wgmma<C::kBlockM>::template ss<V.dtype, 0, 0>(acc, a + (chunk * C::kKeyChunkBytes >> 4) + within,
                                                          b + (chunk * C::kQueryChunkBytes >> 4) + within,
                                                          half + k != 0);
        }
    }

    /// scores (64 keys, block_m queries) = key rows times query rows.
    __device__ __forceinline__ static void multiply_over_dim(Accumulator& acc, uint32_t key_rows, uint32_t query_rows) {
        sm90::multiply_over_dim<V.dtype, C::kBlockM, C::kDim>(acc, k_major(key_rows), C::kKeyChunkBytes,
                                                              k_major(query_rows), C::kQueryChunkBytes);
    }
};

/// Where a lane stores or loads its share of a (keys, queries) tile by 8 x 8
/// matrices: lane l serves row l % 8 of matrix l / 8, and matrices go down the
/// keys first. The swizzle exchanges 16-byte columns by the row's last three bits.
template <Variant V>
struct DsAddress {
    using C = BackwardConfig<V>;
    uint32_t base;

    __device__ __forceinline__ DsAddress(const BackwardSmem<V>& smem, int first_key, int thread) {
        const int lane = thread % 32;
        const int row = first_key + thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
        base = smem_address(smem.ds) + row * C::kRowBytes + (lane / 16 ^ lane % 8) * 16;
    }
    __device__ __forceinline__ uint32_t at(int stage, int k) const {
        return (base + stage * C::kQueryUnits * C::kDsUnitBytes + k / 4 * C::kDsUnitBytes) ^ k % 4 * 32;
    }
};

}  // namespace strobe::sm90
