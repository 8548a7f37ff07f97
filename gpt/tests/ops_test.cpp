#include "gpt/ops/ops.hpp"

#include <gtest/gtest.h>

#include <set>

#include "gpt/backend.hpp"
#include "gpt/bf16.hpp"
#include "gpt/tests/numeric.hpp"

namespace strobe::gpt::test {

namespace {

constexpr double kForward = 2e-6;
constexpr double kBackward = 1e-5;

class OpsTest : public testing::TestWithParam<int> {
protected:
    OpsTest() : backend(Device::cpu, GetParam()) { backend.reserve_scratch(size_t{1} << 22); }
    Backend backend;
    Exec& exec = backend.exec();
};

Doubles norm_reference(NormKind kind, const Doubles& x, const Doubles& weight, const Doubles& bias, size_t hidden, double eps) {
    Doubles y(x.size());
    for (size_t r = 0; r < x.size() / hidden; ++r) {
        double mean = 0.0, variance = 0.0;
        if (kind == NormKind::layernorm)
            for (size_t c = 0; c < hidden; ++c) mean += x[r * hidden + c] / static_cast<double>(hidden);
        for (size_t c = 0; c < hidden; ++c)
            variance += (x[r * hidden + c] - mean) * (x[r * hidden + c] - mean) / static_cast<double>(hidden);
        for (size_t c = 0; c < hidden; ++c)
            y[r * hidden + c] = (x[r * hidden + c] - mean) / std::sqrt(variance + eps) * weight[c] + (bias.empty() ? 0.0 : bias[c]);
    }
    return y;
}

void check_norm(Exec& exec, NormKind kind) {
    constexpr size_t kRows = 5, kHidden = 37;
    constexpr float kEps = 1e-5f;
    const bool biased = kind == NormKind::layernorm;
    const Floats x = random_floats(kRows * kHidden, 1), branch = random_floats(kRows * kHidden, 2);
    const Floats weight = random_floats(kHidden, 3), bias = biased ? random_floats(kHidden, 4) : Floats{};
    const Floats dout = random_floats(kRows * kHidden, 5), dresidual = random_floats(kRows * kHidden, 6);
    Floats sum(x.size()), out(x.size()), mean(kRows), rstd(kRows);
    const Buffer bias_buffer = biased ? Buffer(bias.data()) : Buffer();
    run(exec, NormForward{.kind = kind, .rows = kRows, .hidden = kHidden, .eps = kEps, .x = x.data(), .branch = branch.data(),
                          .sum = sum.data(), .weight = weight.data(), .bias = bias_buffer, .out = out.data(),
                          .mean = mean.data(), .rstd = rstd.data()});
    for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(sum[i], x[i] + branch[i]);
    const auto reference = [&](const Doubles& s, const Doubles& w, const Doubles& b) {
        return norm_reference(kind, s, w, b, kHidden, kEps);
    };
    expect_close(out, reference(widen(sum), widen(weight), widen(bias)), kForward, "out");

    Floats dx = dresidual, dweight(kHidden, 0.5f), dbias(biased ? kHidden : 0, 0.25f);
    run(exec, NormBackward{.kind = kind, .rows = kRows, .hidden = kHidden, .x = sum.data(), .weight = weight.data(),
                           .mean = mean.data(), .rstd = rstd.data(), .dout = dout.data(), .dx = dx.data(),
                           .dweight = dweight.data(), .dbias = biased ? dbias.data() : nullptr});
    Doubles expected = differences([&](const Doubles& s) { return dot(reference(s, widen(weight), widen(bias)), dout); }, sum);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += dresidual[i];
    expect_close(dx, expected, kBackward, "dx adds to the residual's gradient");
    expected = differences([&](const Doubles& w) { return dot(reference(widen(sum), w, widen(bias)), dout); }, weight);
    for (double& v : expected) v += 0.5;
    expect_close(dweight, expected, kBackward, "dweight");
    if (!biased) return;
    expected = differences([&](const Doubles& b) { return dot(reference(widen(sum), widen(weight), b), dout); }, bias);
    for (double& v : expected) v += 0.25;
    expect_close(dbias, expected, kBackward, "dbias");
}

Doubles linear_reference(const Doubles& x, const Doubles& w, const Doubles& b, size_t rows, size_t in, size_t out) {
    Doubles y(rows * out);
    for (size_t r = 0; r < rows; ++r)
        for (size_t o = 0; o < out; ++o) {
            y[r * out + o] = b.empty() ? 0.0 : b[o];
            for (size_t i = 0; i < in; ++i) y[r * out + o] += x[r * in + i] * w[o * in + i];
        }
    return y;
}

void check_linear(Exec& exec, size_t rows, bool biased) {
    constexpr size_t kIn = 13, kOut = 34;
    const Floats x = random_floats(rows * kIn, 1), w = random_floats(kOut * kIn, 2);
    const Floats b = biased ? random_floats(kOut, 3) : Floats{}, dy = random_floats(rows * kOut, 4);
    Floats y(rows * kOut), dx(rows * kIn), dw(kOut * kIn, 1.0f), db(biased ? kOut : 0, 2.0f);
    const Buffer bias = biased ? Buffer(b.data()) : Buffer();
    run(exec, LinearForward{.rows = int64_t(rows), .in = kIn, .out = kOut, .x = x.data(), .weight = w.data(), .bias = bias, .y = y.data()});
    const auto reference = [&](const Doubles& xx, const Doubles& ww, const Doubles& bb) {
        return linear_reference(xx, ww, bb, rows, kIn, kOut);
    };
    expect_close(y, reference(widen(x), widen(w), widen(b)), kForward, "y");
    run(exec, LinearBackward{.rows = int64_t(rows), .in = kIn, .out = kOut, .x = x.data(), .weight = w.data(), .dy = dy.data(),
                             .dx = dx.data(), .dweight = dw.data(), .dbias = biased ? db.data() : nullptr});
    expect_close(dx, differences([&](const Doubles& v) { return dot(reference(v, widen(w), widen(b)), dy); }, x), kBackward, "dx");
    Doubles expected = differences([&](const Doubles& v) { return dot(reference(widen(x), v, widen(b)), dy); }, w);
    for (double& v : expected) v += 1.0;
    expect_close(dw, expected, kBackward, "dweight");
    if (!biased) return;
    expected = differences([&](const Doubles& v) { return dot(reference(widen(x), widen(w), v), dy); }, b);
    for (double& v : expected) v += 2.0;
    expect_close(db, expected, kBackward, "dbias");
}

Doubles activation_reference(ActivationKind kind, const Doubles& x, size_t rows, size_t ffn) {
    Doubles y(rows * ffn);
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < ffn; ++c) {
            if (kind == ActivationKind::gelu) {
                const double v = x[r * ffn + c];
                y[r * ffn + c] = 0.5 * v * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (v + 0.044715 * v * v * v)));
            } else {
                const double gate = x[2 * r * ffn + c], up = x[(2 * r + 1) * ffn + c];
                y[r * ffn + c] = gate / (1.0 + std::exp(-gate)) * up;
            }
        }
    return y;
}

void check_activation(Exec& exec, ActivationKind kind) {
    constexpr size_t kRows = 7, kFfn = 301;
    const size_t columns = kind == ActivationKind::gelu ? kFfn : 2 * kFfn;
    Floats x = random_floats(kRows * columns, 1, 3.0);
    x[0] = 100.0f, x[1] = -100.0f, x[2] = 0.0f;
    const Floats dy = random_floats(kRows * kFfn, 2);
    Floats y(kRows * kFfn), dx(x.size()), in_place = x;
    run(exec, ActivationForward{.kind = kind, .rows = kRows, .ffn = kFfn, .x = x.data(), .y = y.data()});
    expect_close(y, activation_reference(kind, widen(x), kRows, kFfn), kForward, "y");
    run(exec, ActivationBackward{.kind = kind, .rows = kRows, .ffn = kFfn, .x = x.data(), .dy = dy.data(), .dx = dx.data()});
    const auto objective = [&](const Doubles& v) { return dot(activation_reference(kind, v, kRows, kFfn), dy); };
    expect_close(dx, differences(objective, x), kBackward, "dx");
    run(exec, ActivationBackward{.kind = kind, .rows = kRows, .ffn = kFfn, .x = in_place.data(), .dy = dy.data(), .dx = in_place.data()});
    EXPECT_EQ(in_place, dx);
}

}  // namespace

TEST_P(OpsTest, layernorm) { check_norm(exec, NormKind::layernorm); }
TEST_P(OpsTest, rmsnorm) { check_norm(exec, NormKind::rmsnorm); }
TEST_P(OpsTest, linear_with_bias) { check_linear(exec, 19, true); }
TEST_P(OpsTest, linear_without_bias) { check_linear(exec, 19, false); }
TEST_P(OpsTest, linear_of_one_row) { check_linear(exec, 1, true); }
TEST_P(OpsTest, linear_of_few_rows) { check_linear(exec, 3, false); }
TEST_P(OpsTest, gelu) { check_activation(exec, ActivationKind::gelu); }
TEST_P(OpsTest, swiglu) { check_activation(exec, ActivationKind::swiglu); }

TEST_P(OpsTest, embedding) {
    constexpr size_t kRows = 9, kHidden = 21, kVocab = 5, kContext = 4;
    const std::vector<int32_t> tokens{0, 4, 4, 1, 4, 2, 2, 0, 3}, positions{0, 1, 2, 3, 0, 1, 0, 1, 2};
    const Floats table = random_floats(kVocab * kHidden, 1), position_table = random_floats(kContext * kHidden, 2);
    const Floats dout = random_floats(kRows * kHidden, 3);
    Floats out(kRows * kHidden), dtable(table.size(), 1.0f), dpositions(position_table.size(), 0.0f);
    run(exec, EmbeddingForward{.rows = kRows, .hidden = kHidden, .tokens = tokens.data(), .positions = positions.data(),
                               .table = table.data(), .position_table = position_table.data(), .out = out.data()});
    run(exec, EmbeddingBackward{.rows = kRows, .hidden = kHidden, .tokens = tokens.data(), .positions = positions.data(),
                                .dout = dout.data(), .dtable = dtable.data(), .dposition_table = dpositions.data()});
    Doubles expected_table(table.size(), 1.0), expected_positions(position_table.size(), 0.0);
    for (size_t r = 0; r < kRows; ++r)
        for (size_t c = 0; c < kHidden; ++c) {
            const size_t token = size_t(tokens[r]) * kHidden + c, position = size_t(positions[r]) * kHidden + c;
            ASSERT_EQ(out[r * kHidden + c], table[token] + position_table[position]);
            expected_table[token] += dout[r * kHidden + c];
            expected_positions[position] += dout[r * kHidden + c];
        }
    expect_close(dtable, expected_table, kBackward, "dtable");
    expect_close(dpositions, expected_positions, kBackward, "dpositions");
}

TEST_P(OpsTest, rope_turns_halves_and_back) {
    constexpr size_t kRows = 6, kHeads = 3, kDim = 10, kStride = kHeads * kDim + 7;
    constexpr double kTheta = 10000.0;
    const std::vector<int32_t> positions{0, 1, 2, 30, 511, 5};
    const std::vector<float> table = rope_table(512, kDim, float(kTheta));
    const Floats x = random_floats(kRows * kStride, 1);
    Floats turned = x;
    Rope args{.rows = kRows, .heads = kHeads, .head_dim = kDim, .row_stride = kStride, .x = turned.data(),
              .positions = positions.data(), .cos = table.data(), .sin = table.data() + table.size() / 2};
    run(exec, args);
    Doubles expected = widen(x);
    for (size_t r = 0; r < kRows; ++r)
        for (size_t h = 0; h < kHeads; ++h)
            for (size_t i = 0; i < kDim / 2; ++i) {
                const double angle = positions[r] * std::pow(kTheta, -2.0 * double(i) / kDim);
                const size_t low = r * kStride + h * kDim + i, high = low + kDim / 2;
                expected[low] = x[low] * std::cos(angle) - x[high] * std::sin(angle);
                expected[high] = x[high] * std::cos(angle) + x[low] * std::sin(angle);
            }
    // The angle itself is rounded to fp32 on purpose: at position 511 that is 3e-5 of a turn's radian.
    expect_close(turned, expected, 5e-5, "turned");
    args.inverse = true;
    run(exec, args);
    expect_close(turned, widen(x), kForward, "the inverse is the transpose");
}

TEST_P(OpsTest, cross_entropy) {
    constexpr size_t kRows = 6, kVocab = 77;
    constexpr float kScale = 0.125f;
    Floats logits = random_floats(kRows * kVocab, 1, 4.0);
    logits[0] = 500.0f;
    const std::vector<int32_t> targets{0, 76, kIgnoreTarget, 5, 5, 1};
    const auto loss_of = [&](const Doubles& x, size_t r) {
        double m = -1e300, sum = 0.0;
        for (size_t c = 0; c < kVocab; ++c) m = std::max(m, x[r * kVocab + c]);
        for (size_t c = 0; c < kVocab; ++c) sum += std::exp(x[r * kVocab + c] - m);
        return targets[r] < 0 ? 0.0 : std::log(sum) + m - x[r * kVocab + size_t(targets[r])];
    };
    Floats losses(kRows), again(kRows), gradient = logits;
    CrossEntropy args{.rows = kRows, .vocab = kVocab, .targets = targets.data(), .logits = logits.data(), .losses = losses.data()};
    run(exec, args);
    Doubles expected(kRows);
    for (size_t r = 0; r < kRows; ++r) expected[r] = loss_of(widen(logits), r);
    expect_close(losses, expected, kForward, "losses");
    args.logits = gradient.data(), args.losses = again.data(), args.gradient_scale = &kScale;
    run(exec, args);
    expect_close(again, expected, kForward, "losses beside the gradient");
    const Doubles numeric = differences(
        [&](const Doubles& x) {
            double sum = 0.0;
            for (size_t r = 0; r < kRows; ++r) sum += kScale * loss_of(x, r);
            return sum;
        },
        logits);
    expect_close(gradient, numeric, kBackward, "dlogits");
}

TEST_P(OpsTest, adamw_follows_the_paper) {
    constexpr size_t kSize = 10000;
    const std::vector<AdamWSegment> segments{{0, 4500, true}, {4500, 5500, false}};
    Floats w = random_floats(kSize, 1), m(kSize), v(kSize);
    Doubles dw = widen(w), dm(kSize), dv(kSize);
    constexpr double kRate = 0.01, kBeta1 = 0.9, kBeta2 = 0.95, kEps = 1e-8, kDecay = 0.1, kClip = 0.5;
    for (int step = 1; step <= 3; ++step) {
        const Floats g = random_floats(kSize, 10 + uint64_t(step));
        double square = 0.0;
        for (const float x : g) square += double(x) * x;
        // The clip bites from the second step on.
        const double clip_norm = step == 1 ? 2.0 * std::sqrt(square) : kClip * std::sqrt(square);
        const AdamWRates rates = adamw_rates(float(kRate), float(kBeta1), float(kBeta2), float(kDecay), step);
        run(exec, AdamW{.segments = segments, .size = kSize, .values = w.data(), .grads = g.data(), .m = m.data(), .v = v.data(),
                        .rates = &rates, .beta1 = float(kBeta1), .beta2 = float(kBeta2), .eps = float(kEps), .squared_norm = &square,
                        .clip_norm = float(clip_norm)});
        for (size_t i = 0; i < kSize; ++i) {
            const double grad = g[i] * (step == 1 ? 1.0 : kClip);
            dm[i] = kBeta1 * dm[i] + (1 - kBeta1) * grad;
            dv[i] = kBeta2 * dv[i] + (1 - kBeta2) * grad * grad;
            const double mean = dm[i] / (1 - std::pow(kBeta1, step)), square = dv[i] / (1 - std::pow(kBeta2, step));
            dw[i] -= kRate * ((i < 4500 ? kDecay * dw[i] : 0.0) + mean / (std::sqrt(square) + kEps));
        }
        expect_close(w, dw, kForward, "values");
    }
}

// Moments that a nearest rounding would freeze: each step adds less than half of bf16's last digit.
TEST_P(OpsTest, moments_in_bf16_follow_those_in_fp32_in_the_mean) {
    constexpr size_t kSize = 64 * 1024;
    const std::vector<AdamWSegment> segments{{0, kSize, true}};
    const Floats g(kSize, 1.0f);
    Floats w(kSize, 1.0f), exact_w(kSize, 1.0f), exact_m(kSize, 0.90625f), exact_v(kSize, 0.90625f);
    std::vector<uint16_t> m(kSize, round_bf16(0.90625f)), v(kSize, round_bf16(0.90625f));
    for (int step = 1; step <= 20; ++step) {
        const AdamWRates rates = adamw_rates(1e-3f, 0.99f, 0.99f, 0.1f, step);
        const auto update = [&](Floats& values, Buffer first, Buffer second) {
            run(exec, AdamW{.segments = segments, .size = kSize, .values = values.data(), .grads = g.data(), .m = first, .v = second,
                            .rates = &rates, .beta1 = 0.99f, .beta2 = 0.99f, .eps = 1e-8f});
        };
        update(exact_w, exact_m.data(), exact_v.data());
        update(w, {m.data(), Precision::bf16}, {v.data(), Precision::bf16});
    }
    const auto mean_of = [](const std::vector<uint16_t>& x) {
        double sum = 0.0;
        for (const uint16_t bits : x) sum += widen_bf16(bits);
        return sum / static_cast<double>(x.size());
    };
    // One value's rounding is within 2^-8; the mean of 65536 is 256 times closer.
    EXPECT_NEAR(mean_of(m), exact_m[0], 1e-4);
    EXPECT_NEAR(mean_of(v), exact_v[0], 1e-4);
    // A moment near 0.9 walks at random by at most 2^-8 a step, half of that in the mean: by 0.9 % in 20 steps, and the
    // farthest of
    // 65536 by 4.3 times as much. The way that a number has gone follows the moments.
    const double way = std::abs(double(exact_w[0]) - 1.0);
    double largest = 0.0;
    for (size_t i = 0; i < kSize; ++i) largest = std::max(largest, std::abs(double(w[i]) - exact_w[i]));
    EXPECT_LT(largest, 0.05 * way);
    EXPECT_GT(std::set<uint16_t>(m.begin(), m.end()).size(), 1u);
}

TEST_P(OpsTest, squared_norm) {
    const Floats x = random_floats(100003, 1);
    double result = 0.0, expected = 0.0;
    run(exec, SquaredNorm{.size = int64_t(x.size()), .values = x.data(), .result = &result});
    for (const float v : x) expected += double(v) * v;
    EXPECT_NEAR(result, expected, 1e-6 * expected);
    Backend alone(Device::cpu, 1);
    double with_one_thread = 0.0;
    run(alone.exec(), SquaredNorm{.size = int64_t(x.size()), .values = x.data(), .result = &with_one_thread});
    EXPECT_EQ(result, with_one_thread);
}

INSTANTIATE_TEST_SUITE_P(Threads, OpsTest, testing::Values(1, 2, 3));

}  // namespace strobe::gpt::test
