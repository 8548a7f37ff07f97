// bf16 on the host: the upper half of an fp32 number.
#pragma once

#include <bit>
#include <cstdint>

namespace strobe::gpt {

inline float widen_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

/// To the nearest, ties to even. NaN stays NaN.
inline uint16_t round_bf16(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/// An fp32 number in two halves: rounded to bf16 (of two at the same distance to the larger), and the bits that bring it back exactly.
struct SplitFloat {
    uint16_t high, low;
};
inline SplitFloat split_float(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u), 0};
    return {static_cast<uint16_t>((bits + 0x8000u) >> 16), static_cast<uint16_t>(bits)};
}
inline float join_float(SplitFloat s) {
    return std::bit_cast<float>((uint32_t{s.high} << 16) + static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(s.low))));
}

/// Up with a probability of the part that does not fit, else down: the mean over `noise`, 16 random bits, is x itself, so that
/// additions too small for one rounding are not lost over many.
inline uint16_t round_bf16_randomly(float x, uint32_t noise) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return static_cast<uint16_t>((finite ? bits + (noise & 0xffffu) : bits) >> 16);
}

}  // namespace strobe::gpt
