// Online softmax on wgmma accumulators. A thread of a warpgroup holds two rows, 8 apart, of a 64 x N tile:
// s[4 * j + 0, 1] are columns 8 j + 2 (lane % 4) + {0, 1} of the first row, s[4 * j + 2, 3] the same of the second.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cmath>
#include <cstdint>

#include "core/params.hpp"
#include "cuda/sm90/ptx.cuh"

namespace strobe::sm90 {

template <DType kType>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (kType == DType::bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    }
    return packed;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

/// Hides s[i] unless its column lies in [lo, hi) of its row; bounds are relative to the thread's first column.
template <int kCount>
__device__ __forceinline__ void mask_columns(float (&s)[kCount], const int (&lo)[2], const int (&hi)[2]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const int column = i / 4 * 8 + i % 2;
        const int r = i / 2 % 2;
        if (column >= hi[r] || column < lo[r]) s[i] = -INFINITY;
    }
}

class OnlineSoftmax {
public:
    /// The reference maximum of a row is raised, and what was summed so far rescaled, only when a score exceeds it by
    /// this many powers of two. In between, weights are up to 2^8 instead of 1, which fp32 sums and 16-bit weights hold
    /// as exactly; the normalisation at the end cancels the reference.
    static constexpr float kSlack = 8.0f;

    __device__ explicit OnlineSoftmax(float scale_log2) : scale_log2_(scale_log2) {}

    /// Takes the references from the scores of a tile's first key block.
    template <int kCount>
    __device__ __forceinline__ void start(const float (&s)[kCount]) {
#pragma unroll
        for (float& x : sum_) x = 0.0f;
        row_max(s, max_);
        set_limits();
    }

    /// Makes the references fit another block. Returns whether the output so far must be multiplied by `factor`.
    template <int kCount>
    __device__ __forceinline__ bool adapt(const float (&s)[kCount], float (&factor)[2]) {
        if (!__any_sync(0xFFFFFFFFu, exceeds_limits(s))) return false;
        float top[2];
        row_max(s, top);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = fmaxf(max_[r], top[r]);
            factor[r] = exp2_approx((max_[r] - finite(top[r])) * scale_log2_);
            sum_[2 * r] *= factor[r];
            sum_[2 * r + 1] *= factor[r];
            max_[r] = top[r];
        }
        set_limits();
        return true;
    }

    /// Turns scores into weights and adds them to the row sums.
    template <int kCount>
    __device__ __forceinline__ void exponentiate(float (&s)[kCount]) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int r = i / 2 % 2;
            s[i] = exp2_approx(fmaf(s[i], scale_log2_, -shift_[r]));
            sum_[2 * r + i % 2] += s[i];
        }
    }

    /// Row sums over all key blocks; valid in every lane of a quad.
    __device__ __forceinline__ void finish() {
        sum_[0] = quad_sum(sum_[0] + sum_[1]);
        sum_[1] = quad_sum(sum_[2] + sum_[3]);
    }

    /// After finish(): zero iff the row sees no key.
    __device__ float sum(int r) const { return sum_[r]; }
    __device__ float lse(int r) const {
        constexpr float kLn2 = 0.69314718055994531f;
        return sum_[r] == 0.0f ? -INFINITY : (shift_[r] + __log2f(sum_[r])) * kLn2;
    }

private:
    __device__ static float finite(float m) { return m == -INFINITY ? 0.0f : m; }

    /// Positive floats order like their bits and above all negative ones: where a limit is positive, a three-way
    /// integer maximum tests scores against it without finding their maximum. Other limits are always exceeded.
    __device__ __forceinline__ void set_limits() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float limit = max_[r] + kSlack / scale_log2_;
            limit_[r] = limit >= 0.0f ? __float_as_int(limit) : INT_MIN;
            shift_[r] = finite(max_[r]) * scale_log2_;
        }
    }

    template <int kCount>
    __device__ __forceinline__ bool exceeds_limits(const float (&s)[kCount]) const {
        int top[4] = {INT_MIN, INT_MIN, INT_MIN, INT_MIN};
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            top[i % 4] = __vimax3_s32(top[i % 4], __float_as_int(s[2 * i]), __float_as_int(s[2 * i + 1]));
        }
        return max(top[0], top[2]) > limit_[0] || max(top[1], top[3]) > limit_[1];
    }

    template <int kCount>
    __device__ __forceinline__ static void row_max(const float (&s)[kCount], float (&m)[2]) {
        float top[4] = {s[0], s[2], s[1], s[3]};
#pragma unroll
        for (int i = 4; i < kCount; ++i) top[i / 2 % 2 + i % 2 * 2] = fmaxf(top[i / 2 % 2 + i % 2 * 2], s[i]);
        m[0] = quad_max(fmaxf(top[0], top[2]));
        m[1] = quad_max(fmaxf(top[1], top[3]));
    }

    float scale_log2_;
    float max_[2];
    float shift_[2];  // max_ in powers of two; 0 for a row that has seen no key
    int limit_[2];
    float sum_[4];    // even and odd columns of the two rows
};

}  // namespace strobe::sm90
