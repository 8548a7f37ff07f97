#include "gpt/generate/decoder.hpp"

#include <gtest/gtest.h>

#include "gpt/model.hpp"
#include "gpt/generate/token_sampler.hpp"
#include "gpt/tests/numeric.hpp"

namespace strobe::gpt::test {

namespace {

class DecoderTest : public testing::TestWithParam<Architecture> {
protected:
    DecoderTest() {
        initialize(weights.layout, config, 3, weights.values);
        for (float& x : weights.values.all()) x *= 3.0f;
        Random random(5);
        for (int i = 0; i < 300; ++i) tokens.push_back(int32_t(random.below(uint64_t(config.vocab_size))));
    }
    ModelConfig config = GetParam() == Architecture::gpt2 ? gpt2_config(2, 32, 4, 512, 61) : llama_config(3, 32, 4, 2, 512, 61);
    Weights weights{config};
    Backend backend{Device::cpu, 2};
    std::vector<int32_t> tokens;
};

}  // namespace

TEST_P(DecoderTest, agrees_with_the_whole_forward_pass) {
    Model model(weights, backend, {.max_rows = 512, .training = false});
    const auto vocab = static_cast<size_t>(config.vocab_size);
    std::vector<float> expected(tokens.size() * vocab);
    model.logits({.tokens = tokens, .targets = {}, .cu_seqlens = {0, int32_t(tokens.size())}}, expected);
    Decoder decoder(weights, backend, 300);
    // A prompt longer than a chunk, then single tokens.
    size_t read = 270;
    std::span<const float> logits = decoder.feed(std::span(tokens).first(read));
    for (;;) {
        for (size_t i = 0; i < vocab; ++i) ASSERT_NEAR(logits[i], expected[(read - 1) * vocab + i], 1e-4) << read;
        if (read == tokens.size()) break;
        logits = decoder.feed(std::span(tokens).subspan(read++, 1));
    }
    EXPECT_THROW(decoder.feed(std::span(tokens).first(1)), std::length_error);
    decoder.clear();
    logits = decoder.feed(std::span(tokens).first(1));
    for (size_t i = 0; i < vocab; ++i) ASSERT_NEAR(logits[i], expected[i], 1e-4);
}

TEST_P(DecoderTest, cache_and_no_cache_sample_the_same_tokens) {
    const SamplingOptions options{.temperature = 0.9f, .top_k = 40, .top_p = 0.95f, .seed = 9};
    TokenSampler with(options), without(options);
    Decoder cached(weights, backend, 128), fresh(weights, backend, 128);
    std::vector<int32_t> a{1, 2, 3}, b = a;
    std::span<const float> logits = cached.feed(a);
    for (int i = 0; i < 100; ++i) {
        a.push_back(with.sample(logits));
        logits = cached.feed(std::span(a).last(1));
        fresh.clear();
        b.push_back(without.sample(fresh.feed(b)));
    }
    EXPECT_EQ(a, b);
}

INSTANTIATE_TEST_SUITE_P(Architectures, DecoderTest, testing::Values(Architecture::gpt2, Architecture::llama),
                         [](const auto& param) { return std::string(to_string(param.param)); });

TEST(TokenSampler, temperature_zero_takes_the_first_of_the_largest) {
    TokenSampler sampler({.temperature = 0.0f});
    EXPECT_EQ(sampler.sample(std::vector<float>{0.0f, 3.0f, 3.0f, 1.0f}), 1);
}

TEST(TokenSampler, frequencies_are_the_softmax) {
    TokenSampler sampler({.temperature = 2.0f, .seed = 4});
    const std::vector<float> logits{2.0f, 0.0f, 4.0f};
    std::vector<int> count(3);
    constexpr int kDraws = 100000;
    for (int i = 0; i < kDraws; ++i) ++count[size_t(sampler.sample(logits))];
    const double total = std::exp(1.0) + 1.0 + std::exp(2.0);
    EXPECT_NEAR(count[0] / double(kDraws), std::exp(1.0) / total, 0.006);
    EXPECT_NEAR(count[1] / double(kDraws), 1.0 / total, 0.006);
}

TEST(TokenSampler, top_k_and_top_p_cut_the_tail) {
    const std::vector<float> logits{0.0f, 1.0f, 2.0f, 3.0f};
    TokenSampler two({.top_k = 2}), half({.top_p = 0.5f});
    for (int i = 0; i < 1000; ++i) {
        EXPECT_GE(two.sample(logits), 2);
        EXPECT_EQ(half.sample(logits), 3);  // alone it has 0.64 of the probability
    }
}

TEST(TokenSampler, top_p_of_a_large_vocabulary) {
    // Equally likely all: half of the probability is half of the tokens, the lower ids.
    const std::vector<float> logits(1000, 0.25f);
    TokenSampler sampler({.top_p = 0.5f});
    int largest = 0;
    for (int i = 0; i < 4000; ++i) largest = std::max(largest, sampler.sample(logits));
    EXPECT_LE(largest, 500);
    EXPECT_GE(largest, 490);
}

TEST(TokenSampler, refuses_nonsense) {
    EXPECT_THROW(TokenSampler({.temperature = -1.0f}), std::invalid_argument);
    EXPECT_THROW(TokenSampler({.top_k = -1}), std::invalid_argument);
    EXPECT_THROW(TokenSampler({.top_p = 0.0f}), std::invalid_argument);
    TokenSampler sampler({});
    EXPECT_THROW(sampler.sample(std::vector<float>{NAN, NAN}), std::runtime_error);
}

}  // namespace strobe::gpt::test
