#include "gpt/model.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "gpt/tests/numeric.hpp"
#include "gpt/tests/random_model.hpp"

namespace strobe::gpt::test {

namespace {

ModelConfig tiny(Architecture architecture) {
    if (architecture == Architecture::gpt2) return gpt2_config(2, 24, 3, 16, 29);
    ModelConfig c = llama_config(2, 24, 4, 2, 16, 29);
    c.head_dim = 8;
    c.ffn_size = 40;
    c.tied_head = false;
    return c;
}

// Larger than fresh weights, so that no operator stays in its linear range.
Weights random_weights(const ModelConfig& c) {
    Weights weights(c);
    randomize(weights, 0.15);
    return weights;
}

class ModelTest : public testing::TestWithParam<Architecture> {
protected:
    ModelConfig config = tiny(GetParam());
    Weights weights = random_weights(config);
    Backend backend{Device::cpu, 2};
};

std::vector<float> gradients_of(const Weights& weights, Backend& backend, Recompute recompute, const Batch& batch) {
    Model model(weights, backend, {.max_rows = 64, .recompute = recompute});
    model.forward_backward(batch, 1.0f);
    const auto all = model.gradients().all();
    return {all.begin(), all.end()};
}

}  // namespace

// Along random directions: (loss(w + h d) - loss(w - h d)) / 2h = gradient . d. The loss is fp32, so the step is wide
// and the tolerance is that of the difference.
TEST_P(ModelTest, gradient_is_the_slope_of_the_loss) {
    const Batch batch = random_batch(config, {16, 1, 7, 12}, 3);
    Model model(weights, backend, {.max_rows = 64});
    model.clear_gradients();
    model.forward_backward(batch, 1.0f);
    for (const Parameter& p : weights.layout.list()) {
        const std::span<float> w = weights.values[p];
        const std::span<float> g = model.gradients()[p];
        double norm = 0.0;
        for (const float x : g) norm += double(x) * x;
        norm = std::sqrt(norm);
        ASSERT_GT(norm, 0.0) << p.name;
        const std::vector<float> before(w.begin(), w.end());
        const double step = 2e-3;
        const auto loss_at = [&](double h) {
            for (size_t i = 0; i < w.size(); ++i) w[i] = before[i] + static_cast<float>(h * g[i] / norm);
            return model.loss(batch);
        };
        const double slope = (8 * (loss_at(step) - loss_at(-step)) - (loss_at(2 * step) - loss_at(-2 * step))) / (12 * step);
        std::copy(before.begin(), before.end(), w.begin());
        EXPECT_NEAR(slope, norm, 1e-3 * norm + 2e-3) << p.name;
    }
}

TEST_P(ModelTest, recomputation_changes_no_bit) {
    const Batch batch = random_batch(config, {16, 3, 16}, 5);
    const std::vector<float> kept = gradients_of(weights, backend, Recompute::none, batch);
    for (const Recompute recompute : {Recompute::norms, Recompute::pointwise, Recompute::block})
        EXPECT_EQ(kept, gradients_of(weights, backend, recompute, batch)) << to_string(recompute);
}

TEST_P(ModelTest, recomputation_needs_less_memory) {
    const auto bytes = [&](Recompute r) { return plan_memory(config, {.max_rows = 64, .recompute = r}).activations; };
    EXPECT_LT(bytes(Recompute::norms), bytes(Recompute::none));
    EXPECT_LT(bytes(Recompute::pointwise), bytes(Recompute::norms));
    EXPECT_LT(bytes(Recompute::block), bytes(Recompute::pointwise));
}

TEST_P(ModelTest, packed_documents_do_not_see_each_other) {
    const Batch packed = random_batch(config, {5, 11, 1, 16}, 9);
    const auto vocab = static_cast<size_t>(config.vocab_size);
    Model model(weights, backend, {.max_rows = 64, .training = false});
    std::vector<float> together(packed.tokens.size() * vocab);
    model.logits(packed, together);
    for (size_t b = 0; b + 1 < packed.cu_seqlens.size(); ++b) {
        const auto begin = size_t(packed.cu_seqlens[b]), end = size_t(packed.cu_seqlens[b + 1]);
        const Batch single{.tokens = {packed.tokens.begin() + long(begin), packed.tokens.begin() + long(end)},
                           .targets = {}, .cu_seqlens = {0, int32_t(end - begin)}};
        std::vector<float> alone((end - begin) * vocab);
        model.logits(single, alone);
        for (size_t i = 0; i < alone.size(); ++i) {
            ASSERT_NEAR(alone[i], together[begin * vocab + i], 1e-4) << "document " << b;
        }
    }
}

TEST_P(ModelTest, accumulated_batches_add_up) {
    const Batch whole = random_batch(config, {16, 16}, 13);
    const auto half = [&](long begin) {
        return Batch{.tokens = {whole.tokens.begin() + begin, whole.tokens.begin() + begin + 16},
                     .targets = {whole.targets.begin() + begin, whole.targets.begin() + begin + 16}, .cu_seqlens = {0, 16}};
    };
    const std::vector<float> expected = gradients_of(weights, backend, Recompute::none, whole);
    Model model(weights, backend, {.max_rows = 64});
    model.forward_backward(half(0), 1.0f);
    model.forward_backward(half(16), 1.0f);
    const auto actual = model.gradients().all();
    for (size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(actual[i], expected[i], 1e-4 * std::abs(expected[i]) + 1e-4);
    }
}

TEST_P(ModelTest, a_prepared_step_is_the_sum_of_its_batches) {
    const std::vector<Batch> batches{random_batch(config, {16, 3}, 13), random_batch(config, {7, 16}, 15)};
    Model model(weights, backend, {.max_rows = 64}), twice(weights, backend, {.max_rows = 64});
    twice.clear_gradients();
    for (const Batch& batch : batches) model.accumulate(batch, 0.5f);
    const double expected = model.take_loss();
    for (int i = 0; i < 2; ++i) {
        twice.prepare(batches, 0.5f);
        // Whatever comes between leaves the prepared batches alone.
        twice.loss(random_batch(config, {16}, 99));
        twice.begin_step();
        twice.passes();
        EXPECT_EQ(twice.take_loss(), expected);
        EXPECT_TRUE(std::ranges::equal(twice.gradients().all(), model.gradients().all()));
    }
}

TEST_P(ModelTest, a_step_repeats_bit_for_bit) {
    const Batch batch = random_batch(config, {16, 9}, 17);
    const std::vector<float> first = gradients_of(weights, backend, Recompute::none, batch);
    for (int i = 0; i < 5; ++i) ASSERT_EQ(first, gradients_of(weights, backend, Recompute::none, batch));
}

TEST_P(ModelTest, refuses_what_it_cannot_read) {
    Model model(weights, backend, {.max_rows = 16});
    Batch batch = random_batch(config, {8}, 1);
    batch.tokens[3] = int32_t(config.vocab_size);
    EXPECT_THROW(model.loss(batch), std::invalid_argument);
    batch = random_batch(config, {8}, 1);
    batch.targets[3] = -2;
    EXPECT_THROW(model.loss(batch), std::invalid_argument);
    batch = random_batch(config, {8, 9}, 1);
    EXPECT_THROW(model.loss(batch), std::invalid_argument);
    batch = random_batch(config, {8}, 1);
    batch.cu_seqlens = {0, 5, 3, 8};
    EXPECT_THROW(model.loss(batch), std::invalid_argument);
    batch = random_batch(config, {16}, 1);
    EXPECT_NO_THROW(model.loss(batch));
}

INSTANTIATE_TEST_SUITE_P(Architectures, ModelTest, testing::Values(Architecture::gpt2, Architecture::llama),
                         [](const auto& param) { return std::string(to_string(param.param)); });

}  // namespace strobe::gpt::test
