// The 16-bit floating-point types and their conversions, bit-exact on the host and on the device: round to nearest, ties to
// even, subnormals kept, overflow to infinity, NaN stays NaN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_device.hpp"
#include "strobe/dtype.hpp"

namespace strobe {

/// bfloat16: the upper half of a float.
struct Bf16 {
    uint16_t bits;
};

/// IEEE binary16.
struct F16 {
    uint16_t bits;
};

STROBE_HD constexpr uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
STROBE_HD constexpr float float_from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

STROBE_HD constexpr float to_float(float x) { return x; }
STROBE_HD constexpr float to_float(Bf16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

STROBE_HD constexpr float to_float(F16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16;
    const uint32_t exponent = x.bits >> 10 & 0x1Fu;
    const uint32_t fraction = x.bits & 0x3FFu;
    if (exponent == 31) return float_from_bits(sign | 0x7F800000u | fraction << 13);
    if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return float_from_bits(sign | float_bits(magnitude));
}

/// x / 2^shift, to nearest, ties to even; 1 <= shift <= 24.
STROBE_HD constexpr uint32_t round_shift(uint32_t x, uint32_t shift) {
    return (x + (1u << (shift - 1)) - 1u + (x >> shift & 1u)) >> shift;
}

STROBE_HD constexpr Bf16 to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
    return {static_cast<uint16_t>(round_shift(bits, 16))};
}

STROBE_HD constexpr F16 to_f16(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t exponent = magnitude >> 23;
    uint32_t half = 0;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u | (magnitude >> 13 & 0x3FFu);
    } else if (magnitude >= 0x477FF000u) {  // 65520, halfway between the largest half and 2^16
        half = 0x7C00u;
    } else if (exponent >= 113) {
        half = round_shift(magnitude - (112u << 23), 13);
    } else if (exponent >= 102) {  // a multiple of 2^-24 after rounding; anything smaller rounds to zero
        half = round_shift((magnitude & 0x7FFFFFu) | 0x800000u, 126 - exponent);
    }
    return {static_cast<uint16_t>(sign | half)};
}

/// The float that rounds to the same 16-bit number as `x` itself would: inexact results get an odd last bit, which no
/// later rounding to half the width mistakes for a tie.
STROBE_HD constexpr float round_to_odd(double x) {
    const float nearest = static_cast<float>(x);
    const double back = static_cast<double>(nearest);
    if (!(back < x || back > x)) return nearest;
    const uint32_t bits = float_bits(nearest);
    if ((bits & 0x7FFFFFFFu) == 0x7F800000u) return nearest;
    const bool away_from_zero = x < 0 ? back < x : back > x;
    return float_from_bits((away_from_zero ? bits - 1u : bits) | 1u);
}

STROBE_HD constexpr size_t size_of(DType dtype) {
    return dtype == DType::u8 ? 1 : dtype == DType::bf16 || dtype == DType::f16 ? 2 : 4;
}

/// Element `index` of an f32, bf16 or f16 array.
STROBE_HD float load_element(const void* data, DType dtype, int64_t index) {
    switch (dtype) {
        case DType::bf16: return to_float(static_cast<const Bf16*>(data)[index]);
        case DType::f16: return to_float(static_cast<const F16*>(data)[index]);
        default: return static_cast<const float*>(data)[index];
    }
}

STROBE_HD void store_element(void* data, DType dtype, int64_t index, float x) {
    switch (dtype) {
        case DType::bf16: static_cast<Bf16*>(data)[index] = to_bf16(x); break;
        case DType::f16: static_cast<F16*>(data)[index] = to_f16(x); break;
        default: static_cast<float*>(data)[index] = x; break;
    }
}

/// Rounded once, from double.
STROBE_HD void store_element(void* data, DType dtype, int64_t index, double x) {
    store_element(data, dtype, index, dtype == DType::f32 ? static_cast<float>(x) : round_to_odd(x));
}

/// The nearest number of type `dtype`.
STROBE_HD constexpr float round_to(DType dtype, float x) {
    return dtype == DType::bf16 ? to_float(to_bf16(x)) : dtype == DType::f16 ? to_float(to_f16(x)) : x;
}

}  // namespace strobe
