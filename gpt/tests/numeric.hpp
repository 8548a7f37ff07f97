// Operators are checked against plain double-precision formulas: values directly, gradients through central differences of
// the double formula, which are exact to about 1e-9.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "gpt/random.hpp"

namespace strobe::gpt::test {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

inline Floats random_floats(size_t n, uint64_t seed, double scale = 1.0) {
    Random random(seed);
    Floats x(n);
    for (float& v : x) v = static_cast<float>(scale * random.normal());
    return x;
}

inline Doubles widen(const Floats& x) { return {x.begin(), x.end()}; }

inline double dot(const Doubles& a, const Floats& b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * static_cast<double>(b[i]);
    return sum;
}

/// The error is measured against the largest entry: an entry near zero is a difference of large numbers.
inline void expect_close(const Floats& actual, const Doubles& expected, double tolerance, const char* what) {
    ASSERT_EQ(actual.size(), expected.size()) << what;
    double largest = 0.0;
    for (const double v : expected) largest = std::max(largest, std::abs(v));
    for (size_t i = 0; i < actual.size(); ++i)
        ASSERT_NEAR(actual[i], expected[i], tolerance * largest + 1e-30) << what << " at " << i;
}

/// d objective / d x by central differences.
inline Doubles differences(const std::function<double(const Doubles&)>& objective, const Floats& at) {
    constexpr double kStep = 1e-5;
    Doubles x = widen(at), gradient(at.size());
    for (size_t i = 0; i < x.size(); ++i) {
        const double middle = x[i];
        x[i] = middle + kStep;
        const double above = objective(x);
        x[i] = middle - kStep;
        const double below = objective(x);
        x[i] = middle;
        gradient[i] = (above - below) / (2 * kStep);
    }
    return gradient;
}

}  // namespace strobe::gpt::test
