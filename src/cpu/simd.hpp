// The one file that knows instruction sets: vectors of W floats and of W 32-bit integers, and the few operations that
// GCC's vector extensions do not express. Everything else in the kernels is written on these types. Included only by the
// sources that are compiled once per instruction set, inside the namespace of that set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>

#ifndef STROBE_CPU_ISA
#error "compile with -DSTROBE_CPU_ISA=portable|avx2|avx512|avx512_bf16"
#endif

#define STROBE_CPU_INLINE inline __attribute__((always_inline))

namespace strobe::cpu::STROBE_CPU_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

/// Rows of a panel: two vectors. The register block is kPanel columns by up to kBlockRows rows of accumulators, beside
/// which one broadcast and two loaded vectors fit the register file.
inline constexpr int kPanel = 2 * kWidth;
#if defined(__AVX512F__)
inline constexpr int kBlockRows = 12;
#else
inline constexpr int kBlockRows = 6;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef uint64_t U64Vec __attribute__((vector_size(8 * kWidth)));
typedef uint16_t U16Vec __attribute__((vector_size(2 * kWidth)));
typedef float UnalignedVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t UnalignedIVec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef uint16_t UnalignedU16Vec __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));

STROBE_CPU_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
STROBE_CPU_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
STROBE_CPU_INLINE IVec load(const int32_t* p) { return *reinterpret_cast<const UnalignedIVec*>(p); }
STROBE_CPU_INLINE Vec zero() { return Vec{}; }
STROBE_CPU_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return _mm256_set1_ps(x);
#else
    return Vec{x, x, x, x};
#endif
}
STROBE_CPU_INLINE IVec splat(int32_t x) { return x - IVec{}; }
STROBE_CPU_INLINE UVec splat(uint32_t x) { return x - UVec{}; }
STROBE_CPU_INLINE IVec as_int(Vec v) { return reinterpret_cast<IVec>(v); }
STROBE_CPU_INLINE Vec as_float(IVec v) { return reinterpret_cast<Vec>(v); }
STROBE_CPU_INLINE Vec to_float(IVec v) { return __builtin_convertvector(v, Vec); }

/// Lanes where the mask is set from a, the others from b.
STROBE_CPU_INLINE Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }
STROBE_CPU_INLINE UVec select(IVec mask, UVec a, UVec b) { return mask ? a : b; }

/// a * b + c in one rounding where the machine can; max and min return b when either is NaN.
#if defined(__AVX512F__)
STROBE_CPU_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
STROBE_CPU_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
STROBE_CPU_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
STROBE_CPU_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
STROBE_CPU_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
STROBE_CPU_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#else
STROBE_CPU_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
STROBE_CPU_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
STROBE_CPU_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

/// The same for one number: where a scalar loop has to end with the bits of a vector one.
STROBE_CPU_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

STROBE_CPU_INLINE bool any(IVec mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

/// The sum of the lanes, halves first.
STROBE_CPU_INLINE float sum_of_lanes(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#elif defined(__AVX2__)
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

/// The 64-bit products of 32-bit lanes, as their low and high halves.
STROBE_CPU_INLINE void multiply_wide(UVec a, uint32_t b, UVec& low, UVec& high) {
#if defined(__AVX512F__)
    const __m512i x = reinterpret_cast<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(b));
    const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
    low = reinterpret_cast<UVec>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
    high = reinterpret_cast<UVec>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#elif defined(__AVX2__)
    const __m256i x = reinterpret_cast<__m256i>(a), y = _mm256_set1_epi32(static_cast<int>(b));
    const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    low = reinterpret_cast<UVec>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
    high = reinterpret_cast<UVec>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
    const U64Vec wide = __builtin_convertvector(a, U64Vec) * static_cast<uint64_t>(b);
    low = __builtin_convertvector(wide, UVec);
    high = __builtin_convertvector(wide >> 32, UVec);
#endif
}

/// Half-precision scalars, round to nearest even. The portable path has no instruction for them.
STROBE_CPU_INLINE float float_from_half(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u;
    uint32_t mantissa = bits & 1023u;
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t wide = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
    return __builtin_bit_cast(float, wide);
#endif
}

STROBE_CPU_INLINE uint16_t half_from_float(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 lets the FPU round at the right bit.
        const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3F000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude + 0xFFFu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
#endif
}

STROBE_CPU_INLINE Vec load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    return Vec{float_from_half(p[0]), float_from_half(p[1]), float_from_half(p[2]), float_from_half(p[3])};
#endif
}

STROBE_CPU_INLINE void store_half(uint16_t* p, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth; ++i) p[i] = half_from_float(v[i]);
#endif
}

STROBE_CPU_INLINE Vec load_bfloat(const uint16_t* p) {
    const UVec wide = __builtin_convertvector(*reinterpret_cast<const UnalignedU16Vec*>(p), UVec);
    return reinterpret_cast<Vec>(wide << 16);
}

/// bfloat16 bits in the low half of each lane, round to nearest even; NaN stays NaN.
STROBE_CPU_INLINE UVec bfloat_bits(Vec v) {
    const UVec bits = reinterpret_cast<UVec>(v);
    const UVec rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return select(v != v, (bits >> 16) | 0x40u, rounded);
}

STROBE_CPU_INLINE void store_bfloat(uint16_t* p, Vec v) {
    *reinterpret_cast<UnalignedU16Vec*>(p) = __builtin_convertvector(bfloat_bits(v), U16Vec);
}

/// dst[c * dst_stride + r] = src[r * src_stride + c] for 8 x 8 floats.
STROBE_CPU_INLINE void transpose_8x8(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
#if defined(__AVX2__)
    const auto pair = [&](int row, int column) __attribute__((always_inline)) {
        const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(src + row * src_stride + column));
        return _mm256_insertf128_ps(low, _mm_loadu_ps(src + (row + 4) * src_stride + column), 1);
    };
    for (int column = 0; column < 8; column += 4) {
        const __m256 a = pair(0, column), b = pair(1, column), c = pair(2, column), d = pair(3, column);
        const __m256 ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
        const __m256 cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
        float* out = dst + column * dst_stride;
        _mm256_storeu_ps(out, _mm256_shuffle_ps(ab_low, cd_low, 0x44));
        _mm256_storeu_ps(out + dst_stride, _mm256_shuffle_ps(ab_low, cd_low, 0xEE));
        _mm256_storeu_ps(out + 2 * dst_stride, _mm256_shuffle_ps(ab_high, cd_high, 0x44));
        _mm256_storeu_ps(out + 3 * dst_stride, _mm256_shuffle_ps(ab_high, cd_high, 0xEE));
    }
#else
    for (int r = 0; r < 8; ++r) {
        for (int c = 0; c < 8; ++c) dst[c * dst_stride + r] = src[r * src_stride + c];
    }
#endif
}

/// Two bfloat16 numbers in each 32-bit lane, `low` in the low half: what a step of the paired products reads.
STROBE_CPU_INLINE Vec bfloat_pairs(Vec low, Vec high) {
#if defined(__AVX512BF16__)
    const UVec l = reinterpret_cast<UVec>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(low))));
    const UVec h = reinterpret_cast<UVec>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(high))));
    return reinterpret_cast<Vec>(l | (h << 16));
#else
    return reinterpret_cast<Vec>(bfloat_bits(low) | (bfloat_bits(high) << 16));
#endif
}

/// c + a * b, or, where operands are bfloat16 pairs, c + a.low * b.low + a.high * b.high.
template <bool kPairs>
STROBE_CPU_INLINE Vec accumulate(Vec a, Vec b, Vec c) {
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
        const UVec x = reinterpret_cast<UVec>(a), y = reinterpret_cast<UVec>(b);
        c = fma(reinterpret_cast<Vec>(x << 16), reinterpret_cast<Vec>(y << 16), c);
        return fma(reinterpret_cast<Vec>(x & 0xFFFF0000u), reinterpret_cast<Vec>(y & 0xFFFF0000u), c);
#endif
    } else {
        return fma(a, b, c);
    }
}

/// Whether bfloat16 tensors are multiplied as pairs, and not widened to fp32 first.
#if defined(__AVX512BF16__) || defined(STROBE_CPU_EMULATE_PAIRS)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

}  // namespace strobe::cpu::STROBE_CPU_ISA
