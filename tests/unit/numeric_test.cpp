// The 16-bit types against the compiler's own and against first principles, over all of their values.
#include "core/numeric.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace strobe {
namespace {

float f16_value(uint16_t bits) { return to_float(F16{bits}); }
float bf16_value(uint16_t bits) { return to_float(Bf16{bits}); }

/// Value of a half from its fields, without a conversion.
double f16_by_definition(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

TEST(Numeric, EveryHalfWidens) {
    for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
        const double expected = f16_by_definition(static_cast<uint16_t>(bits));
        const float x = f16_value(static_cast<uint16_t>(bits));
        if (std::isnan(expected)) {
            EXPECT_TRUE(std::isnan(x)) << bits;
        } else {
            ASSERT_EQ(x, expected) << bits;
            ASSERT_EQ(std::signbit(x), (bits & 0x8000) != 0) << bits;
        }
    }
}

TEST(Numeric, Every16BitValueSurvivesTheRoundTrip) {
    for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
        const auto b = static_cast<uint16_t>(bits);
        if (std::isnan(f16_value(b))) {
            EXPECT_TRUE(std::isnan(to_float(to_f16(f16_value(b))))) << bits;
        } else {
            ASSERT_EQ(to_f16(f16_value(b)).bits, b);
        }
        if (std::isnan(bf16_value(b))) {
            EXPECT_TRUE(std::isnan(to_float(to_bf16(bf16_value(b))))) << bits;
        } else {
            ASSERT_EQ(to_bf16(bf16_value(b)).bits, b);
        }
    }
}

/// Rounding is monotone, so it is right everywhere if it is right at and on both sides of each midpoint of neighbours.
template <class Widen, class Narrow>
void check_midpoints(uint16_t largest_finite, double past_largest, Widen widen, Narrow narrow) {
    for (uint32_t bits = 0; bits <= largest_finite; ++bits) {
        const auto b = static_cast<uint16_t>(bits);
        const double low = widen(b);
        const double high = bits == largest_finite ? past_largest : widen(static_cast<uint16_t>(b + 1));
        const double exact_midpoint = low + (high - low) / 2;
        const auto midpoint = static_cast<float>(exact_midpoint);
        ASSERT_EQ(midpoint, exact_midpoint);
        const uint16_t up = static_cast<uint16_t>(b + 1);  // behind the largest comes infinity
        const uint16_t even = bits % 2 == 0 ? b : up;
        ASSERT_EQ(narrow(midpoint), even) << bits;
        ASSERT_EQ(narrow(std::nextafterf(midpoint, 0.0f)), b) << bits;
        ASSERT_EQ(narrow(std::nextafterf(midpoint, INFINITY)), up) << bits;
        ASSERT_EQ(narrow(-midpoint), even | 0x8000) << bits;
        ASSERT_EQ(narrow(-std::nextafterf(midpoint, 0.0f)), b | 0x8000) << bits;
        ASSERT_EQ(narrow(-std::nextafterf(midpoint, INFINITY)), up | 0x8000) << bits;
    }
}

TEST(Numeric, HalfRoundsToNearestEvenAtEveryMidpoint) {
    check_midpoints(0x7BFF, 65536.0, f16_value, [](float x) { return to_f16(x).bits; });
}

TEST(Numeric, Bfloat16RoundsToNearestEvenAtEveryMidpoint) {
    check_midpoints(0x7F7F, 0x1p128, bf16_value, [](float x) { return to_bf16(x).bits; });
}

#ifdef __FLT16_MAX__
TEST(Numeric, HalfAgreesWithTheCompilersHalf) {
    for (uint64_t bits = 0; bits <= 0xFFFFFFFFull; bits += 997) {
        const float x = float_from_bits(static_cast<uint32_t>(bits));
        const _Float16 compilers = static_cast<_Float16>(x);
        uint16_t expected;
        std::memcpy(&expected, &compilers, sizeof expected);
        if (std::isnan(x)) {
            ASSERT_TRUE(std::isnan(to_float(to_f16(x))));
        } else {
            ASSERT_EQ(to_f16(x).bits, expected) << x;
        }
    }
}
#endif

TEST(Numeric, SpecialValues) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    EXPECT_EQ(to_f16(kInf).bits, 0x7C00);
    EXPECT_EQ(to_f16(-kInf).bits, 0xFC00);
    EXPECT_EQ(to_f16(65519.0f).bits, 0x7BFF);
    EXPECT_EQ(to_f16(65520.0f).bits, 0x7C00);
    EXPECT_EQ(to_f16(std::numeric_limits<float>::max()).bits, 0x7C00);
    EXPECT_EQ(to_f16(-0.0f).bits, 0x8000);
    EXPECT_EQ(to_f16(0x1p-25f).bits, 0);
    EXPECT_EQ(to_f16(0x1.8p-25f).bits, 1);
    EXPECT_EQ(to_bf16(kInf).bits, 0x7F80);
    EXPECT_EQ(to_bf16(-kInf).bits, 0xFF80);
    EXPECT_EQ(to_bf16(std::numeric_limits<float>::max()).bits, 0x7F80);
    // A NaN whose payload lies in the dropped bits must not become an infinity.
    EXPECT_TRUE(std::isnan(to_float(to_bf16(float_from_bits(0x7F800001)))));
    EXPECT_TRUE(std::isnan(to_float(to_f16(float_from_bits(0x7F800001)))));
}

TEST(Numeric, ADoubleIsRoundedOnce) {
    // Just above the midpoint of 1 and its upper neighbour, by less than a float can tell.
    const double above_f16 = 1.0 + 0x1p-11 + 0x1p-40;
    const double above_bf16 = 1.0 + 0x1p-8 + 0x1p-40;
    uint16_t half = 0, brain = 0;
    store_element(&half, DType::f16, 0, above_f16);
    store_element(&brain, DType::bf16, 0, above_bf16);
    EXPECT_EQ(half, 0x3C01);
    EXPECT_EQ(brain, 0x3F81);
    store_element(&half, DType::f16, 0, -above_f16);
    store_element(&brain, DType::bf16, 0, -above_bf16);
    EXPECT_EQ(half, 0xBC01);
    EXPECT_EQ(brain, 0xBF81);
    store_element(&half, DType::f16, 0, 1.0 + 0x1p-11 - 0x1p-40);
    EXPECT_EQ(half, 0x3C00);
    store_element(&half, DType::f16, 0, static_cast<double>(NAN));
    EXPECT_TRUE(std::isnan(f16_value(half)));
    store_element(&half, DType::f16, 0, -1e300);
    EXPECT_EQ(half, 0xFC00);
    store_element(&half, DType::f16, 0, 1e-300);
    EXPECT_EQ(half, 0);
}

TEST(Numeric, ElementsAreStoredWhereTheIndexSays) {
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        unsigned char buffer[32];
        std::memset(buffer, 0xFF, sizeof buffer);
        store_element(buffer, dtype, 2, 1.5f);
        EXPECT_EQ(load_element(buffer, dtype, 2), 1.5f);
        EXPECT_TRUE(std::isnan(load_element(buffer, dtype, 1)));
        EXPECT_TRUE(std::isnan(load_element(buffer, dtype, 3)));
        EXPECT_EQ(round_to(dtype, 1.5f), 1.5f);
    }
    EXPECT_EQ(round_to(DType::bf16, 1.001f), 1.0f);
    EXPECT_EQ(round_to(DType::f16, 1.0001f), 1.0f);
    EXPECT_EQ(round_to(DType::f32, 1.0001f), 1.0001f);
    EXPECT_EQ(size_of(DType::f32), 4u);
    EXPECT_EQ(size_of(DType::i32), 4u);
    EXPECT_EQ(size_of(DType::bf16), 2u);
    EXPECT_EQ(size_of(DType::f16), 2u);
    EXPECT_EQ(size_of(DType::u8), 1u);
}

static_assert(to_f16(1.0f).bits == 0x3C00 && to_bf16(1.0f).bits == 0x3F80, "the conversions are constant expressions");

}  // namespace
}  // namespace strobe
