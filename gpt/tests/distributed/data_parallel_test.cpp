// Steps of several ranks against those of a single process.
#include "gpt/distributed/data_parallel.hpp"

#include <cmath>

#include "gpt/distributed/step_rows.hpp"
#include "gpt/io/durable_file.hpp"
#include "gpt/random.hpp"
#include "gpt/tests/distributed/ranks.hpp"
#include "gpt/tests/io/temporary_folder.hpp"

namespace strobe::gpt::test {

namespace {

ModelConfig config_of(Architecture architecture) {
    if (architecture == Architecture::gpt2) return gpt2_config(3, 24, 3, 16, 61);
    ModelConfig c = llama_config(3, 24, 4, 2, 16, 61);
    c.tied_head = false;
    return c;
}

TokenStream stream_of(const std::filesystem::path& file, bool with_documents) {
    write_file_atomically(file, [&](DurableFile& out) {
        TokenShardWriter writer(out, {.vocab_size = 61, .end_of_text = 60, .source_hash = 7, .tokenizer_hash = 8});
        Random random(5);
        for (int i = 0; i < 4000; ++i) {
            const bool start = i == 0 || (with_documents && random.below(11) == 0);
            if (start) writer.begin_document();
            // A document that does not begin with the end of the one before has a token that cannot be foretold.
            const TokenId token = start && random.below(2) ? 60 : static_cast<TokenId>(random.below(60));
            writer.add(std::span(&token, 1));
        }
        writer.finish();
    });
    std::vector<TokenShard> shards;
    shards.emplace_back(file);
    return TokenStream(std::move(shards));
}

double distance(std::span<const float> a, std::span<const float> b) {
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        difference += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
        norm += std::pow(static_cast<double>(b[i]), 2);
    }
    return std::sqrt(difference / std::max(norm, 1e-30));
}

StepRowsOptions options_of(int64_t rows, int64_t pass, int rank = 0, int size = 1, bool with_documents = true) {
    return {.row = {.seqlen = 16, .split_documents = with_documents}, .rows_per_step = rows, .rows_per_pass = pass, .seed = 3, .rank = rank, .size = size};
}

}  // namespace

TEST(StepRows, are_the_same_whatever_the_number_of_processes) {
    const TemporaryFolder folder;
    const TokenStream stream = stream_of(folder / "s.tok", true);
    for (const int64_t rows : {6, 7}) {
        StepRows whole(stream, options_of(rows, rows));
        Sampler sampler(stream, {.row = {.seqlen = 16}, .batch_size = rows, .seed = 3});
        std::vector<StepRows> shares;
        constexpr int kSizes[] = {2, 3, 5};
        for (const int size : kSizes)
            for (int rank = 0; rank < size; ++rank) shares.emplace_back(stream, options_of(rows, 2, rank, size));
        std::vector<Batch> expected, passes;
        Batch plain;
        for (int step = 0; step < 100; ++step) {
            const StepTotals totals = whole.next(expected);
            sampler.next(plain);
            ASSERT_EQ(expected.size(), 1u);
            ASSERT_EQ(expected[0].tokens, plain.tokens);
            ASSERT_EQ(expected[0].targets, plain.targets);
            ASSERT_EQ(expected[0].cu_seqlens, plain.cu_seqlens);
            ASSERT_EQ(whole.position(), sampler.position());
            size_t share = 0;
            for (const int size : kSizes) {
                std::vector<int32_t> tokens, targets, lengths;
                for (int rank = 0; rank < size; ++rank, ++share) {
                    const StepTotals theirs = shares[share].next(passes);
                    EXPECT_EQ(theirs.tokens, totals.tokens);
                    EXPECT_EQ(theirs.targets, totals.targets);
                    EXPECT_EQ(theirs.squared_lengths, totals.squared_lengths);
                    EXPECT_EQ(shares[share].position(), whole.position());
                    for (const Batch& batch : passes) {
                        EXPECT_LE(batch.tokens.size(), static_cast<size_t>(16 * shares[share].largest_pass()));
                        EXPECT_LE(shares[share].largest_pass(), 2);
                        tokens.insert(tokens.end(), batch.tokens.begin(), batch.tokens.end());
                        targets.insert(targets.end(), batch.targets.begin(), batch.targets.end());
                        for (size_t b = 1; b < batch.cu_seqlens.size(); ++b) {
                            lengths.push_back(batch.cu_seqlens[b] - batch.cu_seqlens[b - 1]);
                        }
                    }
                }
                ASSERT_EQ(tokens, plain.tokens) << size << " processes";
                ASSERT_EQ(targets, plain.targets);
                std::vector<int32_t> plain_lengths;
                for (size_t b = 1; b < plain.cu_seqlens.size(); ++b) {
                    plain_lengths.push_back(plain.cu_seqlens[b] - plain.cu_seqlens[b - 1]);
                }
                ASSERT_EQ(lengths, plain_lengths);
            }
        }
    }
    EXPECT_THROW(StepRows(stream, options_of(2, 2, 0, 3)), std::invalid_argument);
}

// The process with the fewest rows may have the largest pass: 15 rows by 4 processes, 3 at most in a pass, are 3 in one
// pass and 4 in two.
TEST(StepRows, no_pass_is_larger_than_is_said) {
    const TemporaryFolder folder;
    const TokenStream stream = stream_of(folder / "s.tok", true);
    std::vector<Batch> passes;
    for (int64_t rows = 1; rows <= 25; ++rows) {
        for (int64_t pass = 1; pass <= 6; ++pass) {
            for (int size = 1; size <= std::min<int64_t>(rows, 6); ++size) {
                size_t largest = 0;
                for (int rank = 0; rank < size; ++rank) {
                    StepRows(stream, options_of(rows, pass, rank, size)).next(passes);
                    for (const Batch& batch : passes) largest = std::max(largest, batch.tokens.size() / 16);
                }
                EXPECT_EQ(static_cast<int64_t>(largest), largest_pass(rows, pass, size)) << rows << " rows, " << pass << " in a pass, " << size << " processes";
                EXPECT_LE(static_cast<int64_t>(largest), pass);
            }
        }
    }
}

TEST(Shards, tile_the_arena_from_its_end) {
    for (const Architecture architecture : {Architecture::gpt2, Architecture::llama}) {
        for (const int size : {1, 2, 3, 7}) {
            const ParameterLayout layout(config_of(architecture), size);
            const std::vector<Bucket> buckets = plan_buckets(layout, size);
            EXPECT_GE(buckets.size(), size == 7 ? 3u : 5u);
            int64_t end = layout.arena_elements(), local = 0;
            for (const Bucket& b : buckets) {
                EXPECT_EQ(b.begin + b.piece * size, end);
                EXPECT_EQ(b.piece % 64, 0);
                EXPECT_GT(b.piece, 0);
                EXPECT_EQ(b.local, local);
                EXPECT_EQ(b.decay, b.begin >= layout.matrices_begin());
                end = b.begin;
                local += b.piece;
            }
            EXPECT_EQ(end, 0);
            for (const Parameter& p : layout.list()) EXPECT_EQ(p.decay, p.offset >= layout.matrices_begin()) << p.name;
        }
    }
    EXPECT_THROW(plan_buckets(ParameterLayout(config_of(Architecture::gpt2), 1), 48), std::logic_error);
}

class DataParallelSteps : public testing::TestWithParam<std::tuple<Architecture, int, Precision>> {};

// Five steps, then the states: all as with one process but for the order of sums.
TEST_P(DataParallelSteps, are_those_of_a_single_process) {
    const auto [architecture, size, moments] = GetParam();
    const ModelConfig config = config_of(architecture);
    const TemporaryFolder folder;
    const TokenStream stream = stream_of(folder / "s.tok", true);
    // A norm that clips. Some gradients are nothing but rounding: eps keeps AdamW from making steps of them.
    const OptimizerOptions options{.warmup_steps = 0, .eps = 1e-4f, .clip_norm = 0.5f};
    constexpr int kSteps = 5, kRows = 7;

    Backend backend(Device::cpu, 1);
    Weights single(config);
    initialize(single.layout, config, 7, single.values);
    Model model(single, backend, {.max_rows = 16 * kRows});
    Optimizer optimizer(single.layout, options);
    StepRows rows(stream, options_of(kRows, kRows));
    std::vector<Batch> batches;
    std::vector<double> losses, norms;
    for (int step = 1; step <= kSteps; ++step) {
        const StepTotals totals = rows.next(batches);
        model.clear_gradients();
        losses.push_back(model.forward_backward(batches[0], 1.0f / static_cast<float>(totals.targets)));
        norms.push_back(optimizer.apply(backend.exec(), single, model.gradients(), step, 1e-2f));
    }

    on_ranks(size, [&](ProcessGroup& group) {
        Backend own(Device::cpu, 1);
        Weights weights(config, own.memory(), Precision::fp32, size);
        initialize(weights.layout, config, 7, weights.values);
        StepRows share(stream, options_of(kRows, 2, group.rank(), size));
        Model part(weights, own, {.max_rows = 16 * share.largest_pass()});
        DataParallel parallel(group, own, weights, part.gradients(), options, moments);
        std::vector<Batch> passes;
        for (int step = 1; step <= kSteps; ++step) {
            const StepTotals totals = share.next(passes);
            part.prepare(passes, 1.0f / static_cast<float>(totals.targets));
            part.begin_step();
            parallel.set_rates(step, 1e-2f);
            part.passes(&parallel);
            parallel.update(part.loss_sum());
            const auto at = static_cast<size_t>(step - 1);
            // bf16 moments walk elsewhere, slowly.
            const double tolerance = moments == Precision::fp32 ? 1e-4 : 2e-2;
            EXPECT_NEAR(parallel.gradient_norm(), norms[at], tolerance * norms[at]) << "step " << step;
            EXPECT_NEAR(part.take_loss(), losses[at], tolerance * losses[at]) << "step " << step;
        }
        parallel.gather_values();
        const double tolerance = moments == Precision::fp32 ? 1e-3 : 2e-1;
        for (const Parameter& p : single.layout.list()) {
            const Parameter& q = *weights.layout.find(p.name);
            EXPECT_LT(distance(weights.values[q], single.values[p]), tolerance) << p.name;
        }
        for (const bool first : {true, false}) {
            const ParameterArena& whole = first ? parallel.gather_first_moments() : parallel.gather_second_moments();
            const ParameterArena& expected = first ? optimizer.first_moments() : optimizer.second_moments();
            for (const Parameter& p : single.layout.list())
                EXPECT_LT(distance(whole[*weights.layout.find(p.name)], expected[p]), tolerance) << p.name;
        }
        EXPECT_EQ(parallel.moment_bytes(), 2 * size_of(moments) * static_cast<size_t>(weights.layout.arena_elements() / size));
    });
}

INSTANTIATE_TEST_SUITE_P(, DataParallelSteps,
                         testing::Combine(testing::Values(Architecture::gpt2, Architecture::llama), testing::Values(2, 3),
                                          testing::Values(Precision::fp32, Precision::bf16)),
                         [](const auto& info) {
                             return std::string(to_string(std::get<0>(info.param))) + "_" + std::to_string(std::get<1>(info.param)) + "_" +
                                    std::string(to_string(std::get<2>(info.param)));
                         });

TEST(DataParallelStates, come_back_as_they_were_set) {
    const ModelConfig config = config_of(Architecture::llama);
    for (const Precision moments : {Precision::fp32, Precision::bf16}) {
        on_ranks(3, [&](ProcessGroup& group) {
            Backend backend(Device::cpu, 1);
            Weights weights(config, backend.memory(), Precision::fp32, 3);
            const ParameterArena gradients(weights.layout), first(weights.layout), second(weights.layout);
            DataParallel parallel(group, backend, weights, gradients, {}, moments);
            for (int64_t i = 0; i < first.size(); ++i) {
                // Numbers that bf16 holds.
                first.data()[i] = static_cast<float>(i % 251 - 100);
                second.data()[i] = static_cast<float>(i % 127) * 0.25f;
            }
            parallel.set_moments(first, second);
            const std::span<const float> a = parallel.gather_first_moments().all();
            EXPECT_TRUE(std::equal(a.begin(), a.end(), first.data()));
            const std::span<const float> b = parallel.gather_second_moments().all();
            EXPECT_TRUE(std::equal(b.begin(), b.end(), second.data()));
        });
    }
}

}  // namespace strobe::gpt::test
