// exp2 and tanh of vectors, to about one unit in the last place of fp32.
#pragma once

#include "cpu/simd.hpp"

namespace strobe::cpu::STROBE_CPU_ISA {

/// 2^x for x < 127.5, infinity from there to 128, NaN for NaN; below -126, where the result would be subnormal, 0. The argument
/// is split as n + f with |f| <= 1/2 by adding 1.5 * 2^23 + 127, which leaves n + 127 in the low mantissa bits: shifted
/// into place, they are the exponent of 2^n. 2^f is a minimax polynomial (relative error 2e-9 before rounding). The two
/// are multiplied as numbers, so that a NaN stays one whatever its bits are.
STROBE_CPU_INLINE Vec exp2(Vec x) {
    const Vec magic = splat(12582912.0f + 127.0f);
    const Vec shifted = x + magic;
    const Vec f = x - (shifted - magic);
    Vec p = fma(splat(1.534581182e-4f), f, splat(1.339993122e-3f));
    p = fma(p, f, splat(9.618488958e-3f));
    p = fma(p, f, splat(5.550328777e-2f));
    p = fma(p, f, splat(2.402264689e-1f));
    p = fma(p, f, splat(6.931472057e-1f));
    p = fma(p, f, splat(1.0f));
    const Vec power = p * as_float(as_int(shifted) << 23);
    return as_float(as_int(power) & ~(x < splat(-126.0f)));
}

/// tanh(x), relative error below 2e-7: an odd polynomial near 0, where the quotient would cancel, and
/// 1 - 2 / (e^2x + 1) elsewhere.
STROBE_CPU_INLINE Vec tanh(Vec x) {
    const Vec magnitude = as_float(as_int(x) & 0x7FFFFFFF);
    const Vec z = x * x;
    Vec p = fma(splat(-5.717044955e-3f), z, splat(2.065058722e-2f));
    p = fma(p, z, splat(-5.374349806e-2f));
    p = fma(p, z, splat(1.333149129e-1f));
    p = fma(p, z, splat(-3.333328393e-1f));
    const Vec near_zero = fma(p * z, x, x);
    const Vec power = exp2(min(magnitude, splat(20.0f)) * splat(2.885390082f));
    const Vec far = splat(1.0f) - splat(2.0f) / (power + splat(1.0f));
    const Vec signed_far = as_float(as_int(far) | (as_int(x) & static_cast<int32_t>(0x80000000u)));
    return select(magnitude > splat(0.625f), signed_far, near_zero);
}

}  // namespace strobe::cpu::STROBE_CPU_ISA
