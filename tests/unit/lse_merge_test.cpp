// Merging partial results: the weights, and the specification of the merge.
#include "core/lse_merge.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "reference/reference.hpp"

namespace strobe {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

TEST(LseMerge, WeightsAreThoseOfTheDefinition) {
    const double parts[] = {0.3, -2.0, 5.0, 4.999, -40.0};
    LseMerge<double> m;
    std::vector<double> weights;
    double exact = 0;
    for (double part : parts) {
        m.add(part);
        for (double& w : weights) w *= m.weight_old;
        weights.push_back(m.weight_new);
        exact += std::exp(part);
    }
    EXPECT_NEAR(m.lse, std::log(exact), 1e-14);
    double sum = 0;
    for (size_t n = 0; n < weights.size(); ++n) {
        EXPECT_NEAR(weights[n], std::exp(parts[n]) / exact, 1e-14);
        sum += weights[n];
    }
    EXPECT_NEAR(sum, 1.0, 1e-14);
}

TEST(LseMerge, PartsThatSawNoKeyWeighNothing) {
    LseMerge<double> m;
    m.add(-kInf);
    EXPECT_EQ(m.lse, -kInf);
    EXPECT_EQ(m.weight_old, 0);
    EXPECT_EQ(m.weight_new, 0);
    m.add(1.5);
    EXPECT_EQ(m.lse, 1.5);
    EXPECT_EQ(m.weight_new, 1);
    m.add(-kInf);
    EXPECT_EQ(m.lse, 1.5);
    EXPECT_EQ(m.weight_old, 1);
    EXPECT_EQ(m.weight_new, 0);
}

TEST(LseMerge, FarApartPartsNeitherOverflowNorVanish) {
    for (double big : {700.0, 1e4, 1e30}) {
        LseMerge<double> m;
        m.add(big);
        m.add(-big);
        EXPECT_EQ(m.lse, big);
        EXPECT_EQ(m.weight_old, 1);
        EXPECT_EQ(m.weight_new, 0);
        LseMerge<double> other;
        other.add(-big);
        other.add(big);
        EXPECT_EQ(other.lse, big);
        EXPECT_EQ(other.weight_old, 0);
        EXPECT_EQ(other.weight_new, 1);
    }
    LseMerge<float> f;
    f.add(300.0f);
    f.add(300.0f);
    EXPECT_NEAR(f.lse, 300.0 + std::log(2.0), 1e-4);
    EXPECT_NEAR(f.weight_old, 0.5, 1e-6);
}

TEST(LseMerge, OutputsOfEmptyPartsAreNotLookedAt) {
    // Two parts of one row with two values; the second saw no key and its out was never written.
    float out_a[] = {1.0f, 2.0f}, out_b[] = {NAN, NAN}, lse_a = 0.25f, lse_b = -INFINITY, lse = NAN;
    float out[] = {NAN, NAN};
    const auto part = [](float* o, float* l) {
        return PartialResult{{o, 2, 2, 2}, {l, 1, 1}, DType::f32};
    };
    const PartialResult parts[] = {part(out_b, &lse_b), part(out_a, &lse_a)};
    reference::merge({1, 1, 1, 2, parts, 2, part(out, &lse)});
    EXPECT_EQ(out[0], 1.0f);
    EXPECT_EQ(out[1], 2.0f);
    EXPECT_EQ(lse, 0.25f);

    reference::merge({1, 1, 1, 2, parts, 1, part(out, &lse)});
    EXPECT_EQ(out[0], 0.0f);
    EXPECT_EQ(out[1], 0.0f);
    EXPECT_EQ(lse, -INFINITY);
}

TEST(LseMerge, TheResultMayBeOneOfTheParts) {
    float out_a[] = {1.0f, -2.0f, 0.5f}, out_b[] = {3.0f, 1.0f, 0.0f}, lse_a[] = {0.0f, 1.0f, 2.0f}, lse_b[] = {0.0f, -1.0f, 2.5f};
    const auto part = [](float* o, float* l) {  // three rows of one value
        return PartialResult{{o, 3, 1, 1}, {l, 3, 3}, DType::f32};
    };
    const PartialResult parts[] = {part(out_a, lse_a), part(out_b, lse_b)};
    const float a[] = {1.0f, -2.0f, 0.5f};
    const double la[] = {0, 1, 2}, lb[] = {0, -1, 2.5};
    reference::merge({1, 3, 1, 1, parts, 2, parts[0]});
    for (int i = 0; i < 3; ++i) {
        const double wa = std::exp(la[i]), wb = std::exp(lb[i]);
        EXPECT_NEAR(out_a[i], (wa * a[i] + wb * out_b[i]) / (wa + wb), 1e-6);
        EXPECT_NEAR(lse_a[i], std::log(wa + wb), 1e-6);
    }
}

}  // namespace
}  // namespace strobe
