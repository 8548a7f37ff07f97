// The dropout bits: the generator against published vectors, the addressing against its description, and the statistics.
#include "core/philox.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

namespace strobe {
namespace {

TEST(Philox, KnownAnswers) {  // the test vectors of the Random123 library
    struct Vector {
        Philox4x32 counter;
        uint32_t key[2];
        uint32_t seven_rounds[4];
        uint32_t ten_rounds[4];
    };
    const Vector vectors[] = {
        {{{0, 0, 0, 0}},
         {0, 0},
         {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48},
         {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
         {0xffffffff, 0xffffffff},
         {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
         {0xa4093822, 0x299f31d0},
         {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (const Vector& v : vectors) {
        const Philox4x32 seven = philox4x32<7>(v.counter, v.key[0], v.key[1]), ten = philox4x32<10>(v.counter, v.key[0], v.key[1]);
        for (int n = 0; n < 4; ++n) {
            EXPECT_EQ(seven.word[n], v.seven_rounds[n]) << n;
            EXPECT_EQ(ten.word[n], v.ten_rounds[n]) << n;
        }
    }
}

/// 16 bits as an IEEE half: the number itself, exactly, or NaN.
float half_of(uint32_t bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31u), fraction = static_cast<int>(bits & 1023u);
    if (exponent == 31 && fraction != 0) return std::nanf("");
    const float size = exponent == 31 ? INFINITY : exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -size : size;
}

TEST(Dropout, OneComparisonOfHalvesTellsTheRank) {
    for (uint32_t drop_below : {1u, 2u, 1000u, 1024u, 11141u, 30000u, Dropout::kHalfRanks - 1, Dropout::kHalfRanks}) {
        const float limit = half_of(0xFC00u - drop_below);
        for (uint32_t bits = 0; bits < 65536; ++bits) {
            ASSERT_EQ(half_of(bits) < limit, Dropout::rank(bits) < drop_below) << bits << " " << drop_below;
        }
    }
}

TEST(Dropout, RanksAreAnOrderOfAllValues) {
    std::vector<int> seen(65536);
    for (uint32_t bits = 0; bits < 65536; ++bits) ++seen[Dropout::rank(bits)];
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), 65536);
}

/// The 64 bits of two words as one number: which group an element belongs to.
uint64_t group_id(const Dropout& d, uint32_t batch_head, uint32_t row, uint32_t col) {
    const Philox4x32 g = d.group(batch_head, row, col);
    return uint64_t{g.word[0]} << 32 | g.word[1];
}

TEST(Dropout, EightElementsShareAGroupAndHaveTheirOwnBits) {
    const Dropout d{.seed = 7, .offset = 3, .drop_below = 1};
    const uint32_t row0 = 48, col0 = 80;
    for (uint32_t i = 0; i < 8; ++i) {
        for (uint32_t t = 0; t < 4; ++t) {
            const uint64_t id = group_id(d, 5, row0 + i, col0 + 2 * t);
            const Philox4x32 group = d.group(5, row0 + i, col0 + 2 * t);
            std::set<int> places;
            for (uint32_t row : {row0 + i, row0 + i + 8}) {
                for (uint32_t col : {col0 + 2 * t, col0 + 2 * t + 1, col0 + 2 * t + 8, col0 + 2 * t + 9}) {
                    EXPECT_EQ(group_id(d, 5, row, col), id);
                    const uint32_t bits = Dropout::bits(group, row, col);
                    int place = -1;
                    for (int n = 0; n < 8; ++n) {
                        if ((group.word[n / 2] >> 16 * (n % 2) & 0xFFFFu) == bits) place = n;
                    }
                    EXPECT_GE(place, 0);
                    places.insert(place);
                }
            }
            EXPECT_EQ(places.size(), 8u);
        }
    }
}

TEST(Dropout, NoTwoGroupsShareTheirBits) {
    std::set<uint64_t> seen;
    size_t groups = 0;
    for (uint64_t seed : {0ull, 1ull, 1ull << 40}) {
        for (uint64_t offset : {0ull, 1ull, 77ull}) {
            const Dropout d{.seed = seed, .offset = offset, .drop_below = 1};
            for (uint32_t batch_head : {0u, 1u, 1000u}) {
                for (uint32_t row = 0; row < 64; ++row) {
                    if (row & 8) continue;
                    for (uint32_t col = 0; col < 64; col += 2) {
                        if (col & 8) continue;
                        seen.insert(group_id(d, batch_head, row, col));
                        ++groups;
                    }
                }
            }
        }
    }
    EXPECT_EQ(seen.size(), groups);
}

TEST(Dropout, PositionsBeyondSixteenBitsMatter) {
    const Dropout d{.seed = 7, .offset = 3, .drop_below = 1};
    EXPECT_NE(group_id(d, 0, 0, 0), group_id(d, 0, 1u << 20, 0));
    EXPECT_NE(group_id(d, 0, 0, 0), group_id(d, 0, 0, 1u << 30));
    EXPECT_NE(group_id(d, 0, 1u << 30, 0), group_id(d, 0, 0, 1u << 30));
}

TEST(Dropout, DropsWithTheProbabilityAskedFor) {
    constexpr uint32_t kRows = 1024, kCols = 2048;
    for (uint32_t drop_below : {3u, 655u, 11141u, 32768u, 60000u}) {
        const Dropout d{.seed = 123, .offset = 5, .drop_below = drop_below};
        double dropped = 0;
        for (uint32_t row = 0; row < kRows; ++row) {
            for (uint32_t col = 0; col < kCols; ++col) dropped += d.keep(2, row, col) ? 0 : 1;
        }
        const double n = double{kRows} * kCols;
        const double p = drop_below / 65536.0;
        EXPECT_NEAR(dropped, n * p, 5 * std::sqrt(n * p * (1 - p))) << drop_below;
    }
}

/// Correlation of the keep bits at a fixed distance, in standard deviations.
double correlation(const Dropout& d, uint32_t row_step, uint32_t col_step, uint32_t head_step) {
    constexpr uint32_t kSize = 512;
    const double p = d.drop_below / 65536.0;
    double sum = 0;
    for (uint32_t row = 0; row < kSize; ++row) {
        for (uint32_t col = 0; col < kSize; ++col) {
            const double a = (d.keep(1, row, col) ? 0 : 1) - p;
            const double b = (d.keep(1 + head_step, row + row_step, col + col_step) ? 0 : 1) - p;
            sum += a * b;
        }
    }
    return sum / (p * (1 - p) * kSize);
}

TEST(Dropout, NeighboursAreIndependent) {
    const Dropout d{.seed = 99, .offset = 1, .drop_below = 20000};
    const uint32_t steps[][3] = {{0, 1, 0}, {1, 0, 0}, {1, 1, 0}, {0, 8, 0}, {8, 0, 0}, {0, 16, 0}, {16, 0, 0}, {0, 0, 1}, {8, 8, 0}, {2, 0, 1}};
    for (const auto& s : steps) EXPECT_LT(std::abs(correlation(d, s[0], s[1], s[2])), 4.5) << s[0] << " " << s[1] << " " << s[2];
}

TEST(Dropout, EveryBitOfTheSixteenIsFair) {
    const Dropout d{.seed = 5, .offset = 5, .drop_below = 1};
    constexpr uint32_t kSize = 256;
    std::vector<int> ones(16);
    for (uint32_t row = 0; row < kSize; ++row) {
        for (uint32_t col = 0; col < kSize; ++col) {
            const uint32_t bits = Dropout::bits(d.group(0, row, col), row, col);
            for (int n = 0; n < 16; ++n) ones[n] += bits >> n & 1u;
        }
    }
    const double n = double{kSize} * kSize;
    for (int bit = 0; bit < 16; ++bit) EXPECT_NEAR(ones[bit], n / 2, 5 * std::sqrt(n) / 2) << bit;
}

}  // namespace
}  // namespace strobe
