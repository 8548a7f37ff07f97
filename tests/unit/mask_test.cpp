// The band mask against its definition, element by element.
#include "core/mask.hpp"

#include <gtest/gtest.h>

#include <string>

namespace strobe {
namespace {

bool by_definition(const BandMask& m, int64_t i, int64_t j) {
    const int64_t centre = i + m.diagonal;
    if (j >= m.seqlen_k) return false;
    if (m.left >= 0 && j < centre - m.left) return false;
    if (m.right >= 0 && j > centre + m.right) return false;
    return true;
}

std::string text(const BandMask& m) {
    return "left " + std::to_string(m.left) + " right " + std::to_string(m.right) + " diagonal " + std::to_string(m.diagonal) +
           " " + std::to_string(m.seqlen_q) + "x" + std::to_string(m.seqlen_k);
}

/// Calls f with masks of every kind: bands narrower and wider than the sequences, diagonals within and far outside.
template <class F>
void for_each_mask(F&& f) {
    for (int64_t seqlen_q : {0, 1, 2, 7, 12}) {
        for (int64_t seqlen_k : {0, 1, 3, 8, 13}) {
            for (int64_t left : {-1, 0, 1, 4, 20}) {
                for (int64_t right : {-1, 0, 2, 5, 20}) {
                    for (int64_t diagonal : {seqlen_k - seqlen_q, int64_t{0}, int64_t{-3}, int64_t{5}, int64_t{-40}, int64_t{40}}) {
                        f(BandMask{left, right, diagonal, seqlen_q, seqlen_k});
                    }
                }
            }
        }
    }
}

TEST(Mask, VisibleIsTheDefinition) {
    for_each_mask([](const BandMask& m) {
        for (int64_t i = 0; i < m.seqlen_q; ++i) {
            for (int64_t j = 0; j < m.seqlen_k + 3; ++j) {
                ASSERT_EQ(m.visible(i, j), by_definition(m, i, j)) << text(m) << " at " << i << ", " << j;
            }
        }
    });
}

/// The tightest range [begin, end) that holds all n in [0, limit) with test(n).
template <class Test>
IndexRange tightest(int64_t limit, Test test) {
    IndexRange r{0, 0};
    for (int64_t n = 0; n < limit; ++n) {
        if (!test(n)) continue;
        if (r.empty()) r.begin = n;
        r.end = n + 1;
    }
    return r;
}

TEST(Mask, KeyRangeIsTight) {
    for_each_mask([](const BandMask& m) {
        for (int64_t begin = 0; begin < m.seqlen_q; ++begin) {
            for (int64_t end = begin + 1; end <= m.seqlen_q + 2; ++end) {
                const IndexRange expected = tightest(m.seqlen_k, [&](int64_t j) {
                    for (int64_t i = begin; i < end && i < m.seqlen_q; ++i) {
                        if (by_definition(m, i, j)) return true;
                    }
                    return false;
                });
                const IndexRange r = m.key_range(begin, end);
                if (expected.empty()) {
                    ASSERT_TRUE(r.empty()) << text(m) << " queries " << begin << ".." << end;
                } else {
                    ASSERT_EQ(r.begin, expected.begin) << text(m) << " queries " << begin << ".." << end;
                    ASSERT_EQ(r.end, expected.end) << text(m) << " queries " << begin << ".." << end;
                }
            }
        }
    });
}

TEST(Mask, QueryRangeIsTight) {
    for_each_mask([](const BandMask& m) {
        for (int64_t begin = 0; begin < m.seqlen_k; ++begin) {
            for (int64_t end = begin + 1; end <= m.seqlen_k + 2; ++end) {
                const IndexRange expected = tightest(m.seqlen_q, [&](int64_t i) {
                    for (int64_t j = begin; j < end && j < m.seqlen_k; ++j) {
                        if (by_definition(m, i, j)) return true;
                    }
                    return false;
                });
                const IndexRange r = m.query_range(begin, end);
                if (expected.empty()) {
                    ASSERT_TRUE(r.empty()) << text(m) << " keys " << begin << ".." << end;
                } else {
                    ASSERT_EQ(r.begin, expected.begin) << text(m) << " keys " << begin << ".." << end;
                    ASSERT_EQ(r.end, expected.end) << text(m) << " keys " << begin << ".." << end;
                }
            }
        }
    });
}

TEST(Mask, AllVisibleHoldsExactlyWhereEveryElementIs) {
    for_each_mask([](const BandMask& m) {
        for (int64_t i = 0; i < m.seqlen_q; ++i) {
            for (int64_t i_end = i + 1; i_end <= m.seqlen_q; ++i_end) {
                for (int64_t j = 0; j < m.seqlen_k; ++j) {
                    for (int64_t j_end = j + 1; j_end <= m.seqlen_k + 2; ++j_end) {
                        bool all = true;
                        for (int64_t a = i; a < i_end; ++a) {
                            for (int64_t b = j; b < j_end; ++b) all = all && by_definition(m, a, b);
                        }
                        ASSERT_EQ(m.all_visible(i, i_end, j, j_end), all)
                            << text(m) << " tile " << i << ".." << i_end << " x " << j << ".." << j_end;
                    }
                }
            }
        }
    });
}

TEST(Mask, SurvivesSequencesBeyond32Bits) {
    const int64_t n = int64_t{1} << 40;
    const BandMask m{100, 0, 0, n, n};
    EXPECT_EQ(m.key_range(n - 1, n).begin, n - 101);
    EXPECT_EQ(m.key_range(n - 1, n).end, n);
    EXPECT_EQ(m.query_range(n - 200, n - 199).end, n - 99);
    EXPECT_TRUE(m.visible(n - 1, n - 1));
    EXPECT_FALSE(m.visible(n - 2, n - 1));
}

}  // namespace
}  // namespace strobe
