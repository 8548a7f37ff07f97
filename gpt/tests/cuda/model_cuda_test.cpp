// Whole passes, steps and decoding on the GPU against the CPU's from the same weights.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "gpt/bf16.hpp"
#include "gpt/generate/decoder.hpp"
#include "gpt/host_view.hpp"
#include "gpt/model.hpp"
#include "gpt/step_graphs.hpp"
#include "gpt/tests/random_model.hpp"
#include "gpt/train/optimizer.hpp"

namespace strobe::gpt::test {

namespace {

struct Setting {
    Architecture architecture;
    Precision precision;
};

ModelConfig small(Architecture architecture) {
    if (architecture == Architecture::gpt2) return gpt2_config(3, 192, 3, 160, 257);
    ModelConfig c = llama_config(3, 192, 4, 2, 160, 257);
    c.head_dim = 64;
    c.tied_head = false;
    return c;
}

double norm_of(std::span<const float> x) {
    double sum = 0.0;
    for (const float v : x) sum += double(v) * v;
    return std::sqrt(sum);
}

/// |a - b| / |b|
double distance(std::span<const float> a, std::span<const float> b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) sum += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    return std::sqrt(sum) / norm_of(b);
}

class CudaModel : public testing::TestWithParam<Setting> {
protected:
    CudaModel() : there(config, gpu.memory(), GetParam().precision) {
        randomize(here, 0.02);
        there.set(here.values);
    }
    bool exact() const { return GetParam().precision == Precision::fp32; }

    ModelConfig config = small(GetParam().architecture);
    Backend cpu{Device::cpu, 2}, gpu{Device::cuda};
    Weights here{config}, there;
};

}  // namespace

TEST_P(CudaModel, loss_and_gradients) {
    for (const std::vector<int32_t>& lengths :
         {std::vector<int32_t>{160, 160}, std::vector<int32_t>{160, 3, 77, 100}}) {
        const Batch batch = random_batch(config, lengths, 5);
        for (const Recompute recompute : {Recompute::none, Recompute::norms, Recompute::pointwise, Recompute::block}) {
            SCOPED_TRACE(to_string(recompute));
            Model a(here, cpu, {.max_rows = 400}), b(there, gpu, {.max_rows = 400, .recompute = recompute});
            const double expected = a.forward_backward(batch, 0.01f), actual = b.forward_backward(batch, 0.01f);
            EXPECT_NEAR(actual, expected, (exact() ? 1e-5 : 2e-3) * expected);
            const HostView gradients(there.layout, b.gradients());
            for (const Parameter& p : here.layout.list()) {
                const double error = distance((*gradients.get())[p], a.gradients()[p]);
                EXPECT_LT(error, exact() ? 1e-4 : 4e-2) << p.name;
            }
        }
    }
}

// Gradients of matrices in bf16, with the logits in their memory: the same but for a rounding.
TEST_P(CudaModel, narrow_gradients) {
    if (exact()) GTEST_SKIP() << "of bf16 alone";
    for (const Recompute recompute : {Recompute::none, Recompute::norms, Recompute::pointwise, Recompute::block}) {
        SCOPED_TRACE(to_string(recompute));
        Model plain(there, gpu, {.max_rows = 400, .recompute = recompute});
        Model narrow(there, gpu, {.max_rows = 400, .recompute = recompute, .gradients = Precision::bf16});
        for (const uint64_t seed : {3, 4, 5}) {
            const Batch batch = random_batch(config, {160, 3, 77, 100}, seed);
            const double expected = (plain.clear_gradients(), plain.forward_backward(batch, 0.01f));
            EXPECT_EQ((narrow.clear_gradients(), narrow.forward_backward(batch, 0.01f)), expected);
            const HostView a(there.layout, plain.gradients()), b(there.layout, narrow.gradients());
            for (const Parameter& p : there.layout.list()) {
                const double error = distance((*b.get())[p], (*a.get())[p]);
                EXPECT_LE(error, p.decay ? 3e-3 : 1e-5) << p.name;
            }
        }
        EXPECT_THROW(narrow.accumulate(random_batch(config, {160}, 6), 0.01f), std::logic_error);
    }
}

TEST_P(CudaModel, masters_come_back_from_their_halves) {
    const HostView values(there);
    EXPECT_TRUE(std::ranges::equal(values.get()->all(), here.values.all()));
}

// Masters that are bf16 alone: as they were set, rounded to the nearest; steps that are all but those of fp32 masters;
// and steps far too small for one rounding, which add up all the same.
TEST_P(CudaModel, masters_in_bf16) {
    if (exact()) GTEST_SKIP() << "of bf16 alone";
    Weights narrow(config, gpu.memory(), Precision::bf16, 1, Precision::bf16);
    narrow.set(here.values);
    const HostView before(narrow);
    const std::span<const float> wide = here.values.all(), rounded = before.get()->all();
    const auto matrices = size_t(here.layout.matrices_begin());
    for (size_t i = 0; i < wide.size(); ++i)
        ASSERT_EQ(rounded[i], i < matrices ? wide[i] : widen_bf16(round_bf16(wide[i]))) << i;
    there.set(*before.get());
    Model a(there, gpu, {.max_rows = 320}), b(narrow, gpu, {.max_rows = 320});
    const OptimizerOptions options{.warmup_steps = 0, .weight_decay = 0.0f};
    Optimizer with_halves(there.layout, options, gpu.memory()), without(narrow.layout, options, gpu.memory());
    for (int64_t step = 1; step <= 20; ++step) {
        const Batch batch = random_batch(config, {160, 160}, uint64_t(step % 4));
        a.clear_gradients();
        b.clear_gradients();
        const double expected = a.forward_backward(batch, 1.0f / 320.0f);
        EXPECT_NEAR(b.forward_backward(batch, 1.0f / 320.0f), expected, 1e-2 * expected) << step;
        // An update is at most about the rate: 1/40 of the distance between neighbours of a number of 0.02 in bf16.
        with_halves.apply(gpu.exec(), there, a.gradients(), step, 3e-6f);
        without.apply(gpu.exec(), narrow, b.gradients(), step, 3e-6f);
    }
    const HostView after(narrow), after_halves(there);
    double moved = 0.0, wanted = 0.0, agreement = 0.0;
    for (size_t i = matrices; i < wide.size(); ++i) {
        const double here_moved = double(after.get()->all()[i]) - rounded[i];
        const double there_moved = double(after_halves.get()->all()[i]) - rounded[i];
        moved += here_moved * there_moved;
        wanted += there_moved * there_moved;
        agreement += after.get()->all()[i] == widen_bf16(round_bf16(after.get()->all()[i]));
    }
    EXPECT_EQ(agreement, double(wide.size() - matrices));
    EXPECT_NEAR(moved / wanted, 1.0, 0.1) << "of the way of fp32 masters";
}

TEST_P(CudaModel, a_step_repeats_bit_for_bit) {
    const Batch batch = random_batch(config, {160, 9, 160}, 17);
    std::vector<float> first;
    for (int i = 0; i < 5; ++i) {
        Model model(there, gpu, {.max_rows = 400});
        model.forward_backward(batch, 0.01f);
        const HostView gradients(there.layout, model.gradients());
        const std::span<const float> all = gradients.get()->all();
        if (first.empty()) first.assign(all.begin(), all.end());
        ASSERT_TRUE(std::equal(all.begin(), all.end(), first.begin())) << "run " << i;
    }
}

TEST_P(CudaModel, logits) {
    const Batch batch = random_batch(config, {160, 31}, 9);
    std::vector<float> expected(batch.tokens.size() * size_t(config.vocab_size)), actual(expected.size());
    Model a(here, cpu, {.max_rows = 200, .training = false}), b(there, gpu, {.max_rows = 200, .training = false});
    a.logits(batch, expected);
    b.logits(batch, actual);
    EXPECT_LT(distance(actual, expected), exact() ? 1e-5 : 2e-2);
}

TEST_P(CudaModel, twenty_steps) {
    Model a(here, cpu, {.max_rows = 320}), b(there, gpu, {.max_rows = 320});
    const OptimizerOptions options{.warmup_steps = 0};
    Optimizer on_cpu(here.layout, options), on_gpu(there.layout, options, gpu.memory());
    for (int64_t step = 1; step <= 20; ++step) {
        const Batch one = random_batch(config, {160, 160}, uint64_t(step % 4));
        const Batch two = random_batch(config, {50, 160}, uint64_t(100 + step % 4));
        a.clear_gradients();
        b.clear_gradients();
        double expected = 0.0;
        for (const Batch& batch : {one, two}) {
            expected += a.forward_backward(batch, 1.0f / 500.0f);
            b.accumulate(batch, 1.0f / 500.0f);
        }
        const double norm = on_cpu.apply(cpu.exec(), here, a.gradients(), step, 1e-3f);
        EXPECT_NEAR(on_gpu.apply(gpu.exec(), there, b.gradients(), step, 1e-3f), norm, (exact() ? 1e-3 : 3e-2) * norm)
            << step;
        EXPECT_NEAR(b.take_loss(), expected, (exact() ? 1e-4 : 1e-2) * expected) << step;
    }
    const HostView values(there);
    EXPECT_LT(distance(values.get()->all(), here.values.all()), exact() ? 1e-3 : 3e-2);
}

// Two shapes in turn, so that each is met, recorded and replayed; against the same steps asked for operator by
// operator.
TEST_P(CudaModel, recorded_steps_are_the_same_steps) {
    const std::vector<std::vector<int32_t>> shapes{{160, 160}, {50, 160, 7}};
    std::vector<float> expected_values;
    std::vector<double> expected_losses;
    for (const bool recorded : {false, true}) {
        Weights weights(config, gpu.memory(), GetParam().precision);
        weights.set(here.values);
        Model model(weights, gpu, {.max_rows = 320});
        Optimizer optimizer(weights.layout, {.warmup_steps = 0}, gpu.memory(), GetParam().precision);
        StepGraphs graphs(gpu);
        gpu.exec().times = nullptr;
        std::vector<double> losses;
        for (int64_t step = 1; step <= 10; ++step) {
            const std::vector<Batch> batches{random_batch(config, shapes[size_t(step % 2)], uint64_t(step)),
                                             random_batch(config, {120, 33}, uint64_t(50 + step))};
            model.prepare(batches, 1.0f / 450.0f);
            model.begin_step();
            optimizer.set_rates(step, 1e-3f);
            const auto enqueue = [&] {
                model.passes();
                optimizer.update(gpu.exec(), weights, model.gradients());
            };
            recorded ? graphs.run(model.step_shape(), enqueue) : enqueue();
            losses.push_back(model.take_loss());
            losses.push_back(optimizer.gradient_norm());
        }
        const HostView values(weights);
        const std::span<const float> all = values.get()->all();
        if (!recorded) {
            expected_losses = losses;
            expected_values.assign(all.begin(), all.end());
        }
        EXPECT_EQ(losses, expected_losses);
        EXPECT_TRUE(std::equal(all.begin(), all.end(), expected_values.begin()));
    }
    EXPECT_GT(distance(expected_values, here.values.all()), 1e-3);
}

TEST_P(CudaModel, decoding) {
    const Batch text = random_batch(config, {40}, 21);
    Decoder a(here, cpu, 60), b(there, gpu, 60);
    const auto close = [&](std::span<const int32_t> tokens) {
        const std::span<const float> expected = a.feed(tokens), actual = b.feed(tokens);
        EXPECT_LT(distance(actual, expected), exact() ? 1e-5 : 2e-2) << "behind " << a.length();
    };
    close(std::span(text.tokens).first(33));
    for (size_t i = 33; i < 40; ++i) close(std::span(text.tokens).subspan(i, 1));
}

INSTANTIATE_TEST_SUITE_P(Settings, CudaModel,
                         testing::Values(Setting{Architecture::gpt2, Precision::fp32},
                                         Setting{Architecture::gpt2, Precision::bf16},
                                         Setting{Architecture::llama, Precision::fp32},
                                         Setting{Architecture::llama, Precision::bf16}),
                         [](const auto& param) {
                             return std::string(to_string(param.param.architecture)) + "_" +
                                    std::string(to_string(param.param.precision));
                         });

}  // namespace strobe::gpt::test
