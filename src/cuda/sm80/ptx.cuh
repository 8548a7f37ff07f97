// The instructions of the sm_80 path, one wrapper each: ldmatrix, mma.sync m16n8k16, cp.async, and the float helpers.
#pragma once

#include <cstdint>

#include "core/params.hpp"

namespace strobe::sm80 {

__device__ __forceinline__ uint32_t smem_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kStoresMatrices = true;
#else
constexpr bool kStoresMatrices = false;
#endif

/// The reverse of ldmatrix, on sm_90.
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ float load_shared_float(uint32_t address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}

/// d = a * b + (kFresh ? 0 : d), fp32 accumulators; a is 16 x 16 row-major, b 16 x 8 column-major.
template <DType kType, bool kFresh>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const float c[4] = {kFresh ? 0.0f : d[0], kFresh ? 0.0f : d[1], kFresh ? 0.0f : d[2], kFresh ? 0.0f : d[3]};
    if constexpr (kType == DType::bf16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%10,%11,%12,%13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%10,%11,%12,%13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
}

/// 16 bytes to shared memory, the first `bytes` of them from global memory, then zeros. Nothing beyond `bytes` is read.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* gmem, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* gmem) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(smem), "l"(gmem) : "memory");
}

/// The same of 4 bytes, from any address that floats have.
__device__ __forceinline__ void cp_async_4(uint32_t smem, const void* gmem, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(gmem), "r"(bytes) : "memory");
}

/// 16 bytes where `wanted`, without a branch.
__device__ __forceinline__ void cp_async_16_if(bool wanted, uint32_t smem, const void* gmem) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global.L2::128B [%0], [%1], 16; }" ::"r"(smem),
        "l"(gmem), "r"(static_cast<uint32_t>(wanted))
        : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most kPending of this thread's latest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Two floats rounded to the 16-bit type, `lo` in the low half.
template <DType kType>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
    uint32_t r;
    if constexpr (kType == DType::bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    }
    return r;
}

template <DType kType>
__device__ __forceinline__ float unpack(uint16_t bits) {
    float r;
    if constexpr (kType == DType::bf16) {
        r = __uint_as_float(static_cast<uint32_t>(bits) << 16);
    } else {
        asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
    }
    return r;
}

template <DType kType>
__device__ __forceinline__ float2 unpack2(uint32_t bits) {
    return {unpack<kType>(static_cast<uint16_t>(bits)), unpack<kType>(static_cast<uint16_t>(bits >> 16))};
}

__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

/// tanh to about 1e-6 absolute: tanh.approx (5e-4) would show in scores of some tens.
__device__ __forceinline__ float tanh_fast(float x) {
    return 1.0f - 2.0f * reciprocal_fast(exp2_fast(2.0f * kLog2e * x) + 1.0f);
}

/// tanh(x) / x = kTanh[0] + kTanh[1] x^2 + ... for |x| <= 1, to 8e-5 of it.
__device__ constexpr float kTanh[4] = {9.99918558e-1f, -3.30654300e-1f, 1.18897550e-1f, -2.66296779e-2f};

/// threadIdx.x, read each time.
__device__ __forceinline__ int thread_index() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/// The same value, of which the compiler keeps nothing that was derived before in a register.
template <typename T>
__device__ __forceinline__ T made_anew(T x) {
    asm volatile("" : "+r"(x));
    return x;
}

/// A barrier of kThreads threads (whole warps); true for all of them when it is for one.
template <int kThreads>
__device__ __forceinline__ bool barrier_any(int barrier, bool x) {
    uint32_t any;
    asm volatile(
        "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.cta.red.or.aligned.pred q, %2, %3, p; selp.u32 %0, 1, 0, q; }"
        : "=r"(any)
        : "r"(static_cast<uint32_t>(x)), "r"(barrier), "n"(kThreads)
        : "memory");
    return any != 0;
}

template <int kThreads>
__device__ __forceinline__ void barrier_sync(int barrier) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace strobe::sm80
