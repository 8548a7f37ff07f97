// Dropout's random bits: Philox4x32-7 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011; seven rounds are the fewest that pass BigCrush there), addressed by position and not by order, so that every
// kernel, on any device and with any tiling, forward and backward, sees the same bit for the same element.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.hpp"

namespace strobe {

struct Philox4x32 {
    uint32_t word[4];
};

constexpr int kPhiloxRounds = 7;

/// The 64 bits of a product. From the plain expression nvcc 13 makes an addition of zero to the upper half of each, a third more instructions.
STROBE_HD constexpr uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    if (!std::is_constant_evaluated()) {
        uint64_t product = 0;
        asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
        return product;
    }
#endif
    return uint64_t{a} * b;
}

template <int kRounds = kPhiloxRounds>
STROBE_HD constexpr Philox4x32 philox4x32(Philox4x32 counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < kRounds; ++round) {
        const uint64_t a = wide_product(0xD2511F53u, counter.word[0]);
        const uint64_t b = wide_product(0xCD9E8D57u, counter.word[2]);
        counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                    static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

/// Dropout of one attention call. `drop_below` is the drop probability in units of 2^-16: an element is dropped iff the
/// rank of its 16 random bits is below it. `rescale` = 65536 / (65536 - drop_below), exact for the probability actually used.
struct Dropout {
    uint64_t seed = 0;
    uint64_t offset = 0;
    uint32_t drop_below = 0;
    float rescale = 1.0f;

    STROBE_HD constexpr bool enabled() const { return drop_below != 0; }

    /// Eight elements share one Philox call: rows {i, i + 8} x columns {2t, 2t + 1, 2t + 8, 2t + 9} of an aligned 16 x 16
    /// block, which is what one thread of an mma.m16n8 accumulator pair holds. `row` and `col` are global positions of
    /// any one of the eight; batch_head = batch index * num_heads + head.
    STROBE_HD constexpr Philox4x32 group(uint32_t batch_head, uint32_t row, uint32_t col) const {
        return group_at(batch_head, row_group(row), col_group(col));
    }
    /// The same by group numbers: 16 rows on is row_group + 8, 16 columns on col_group + 4.
    STROBE_HD constexpr Philox4x32 group_at(uint32_t batch_head, uint32_t row_group, uint32_t col_group) const {
        const uint64_t key = seed + offset * 0x9E3779B97F4A7C15ull;
        return philox4x32({{col_group, row_group, batch_head, 0u}}, static_cast<uint32_t>(key),
                             static_cast<uint32_t>(key >> 32));
    }
    STROBE_HD static constexpr uint32_t row_group(uint32_t row) { return (row >> 4 << 3) | (row & 7u); }
    STROBE_HD static constexpr uint32_t col_group(uint32_t col) { return (col >> 4 << 2) | ((col & 7u) >> 1); }

    /// The 16 bits of one element inside its group: word = 2 * (row bit 3) + (col bit 3), half = col bit 0.
    STROBE_HD static constexpr uint32_t bits(const Philox4x32& group, uint32_t row, uint32_t col) {
        const uint32_t word = group.word[((row >> 3 & 1u) << 1) | (col >> 3 & 1u)];
        return col & 1u ? word >> 16 : word & 0xFFFFu;
    }

    /// The order in which the values of 16 bits are dropped as the probability grows: 0xfc00, 0xfbff, ..., 0, 0xffff, ..., 0xfc01.
    /// Read as an IEEE half the first kHalfRanks of them are the negative numbers from minus infinity up: as long as drop_below goes no
    /// further, one comparison of two halves, numbers or not, tells a GPU for two elements whether they stay.
    STROBE_HD static constexpr uint32_t rank(uint32_t bits) { return (0xFC00u - bits) & 0xFFFFu; }
    static constexpr uint32_t kHalfRanks = 0x7C00;

    STROBE_HD constexpr bool keep(uint32_t batch_head, uint32_t row, uint32_t col) const {
        return rank(bits(group(batch_head, row, col), row, col)) >= drop_below;
    }
};

}  // namespace strobe
