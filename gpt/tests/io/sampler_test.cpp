// Shards there and back; samplers that see every row once, resume anywhere, and keep documents apart.
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>

#include "gpt/data/sampler.hpp"
#include "gpt/io/file_error.hpp"
#include "gpt/ops/cross_entropy.hpp"
#include "temporary_folder.hpp"

namespace strobe::gpt {
namespace {

constexpr TokenId kEnd = 60000;

/// Token i of the stream is i, except that documents start with kEnd at the places given.
TokenShard write_shard(const std::filesystem::path& file, uint64_t num_tokens, const std::vector<uint64_t>& starts,
                       uint64_t vocab_size = 60001, TokenId end_of_text = kEnd) {
    write_file_atomically(file, [&](DurableFile& out) {
        TokenShardWriter writer(out, {.vocab_size = vocab_size, .end_of_text = end_of_text, .source_hash = 7, .tokenizer_hash = 8});
        for (uint64_t i = 0; i < num_tokens; ++i) {
            const bool start = std::find(starts.begin(), starts.end(), i) != starts.end();
            if (start) writer.begin_document();
            const TokenId token = start && end_of_text >= 0 ? end_of_text : static_cast<TokenId>(i);
            writer.add(std::span(&token, 1));
        }
        writer.add_text_bytes(num_tokens * 3);
        writer.finish();
    });
    return TokenShard(file);
}

TEST(TokenShard, KeepsTokensDocumentsAndCounts) {
    for (const uint64_t vocab_size : {60001ull, 100000ull}) {
        for (const uint64_t num_tokens : {1, 2, 3, 4, 5, 1000}) {
            TemporaryFolder folder;
            const TokenShard shard = write_shard(folder / "s.tok", num_tokens, {0, 3, 700}, vocab_size);
            EXPECT_EQ(shard.info().num_tokens, num_tokens);
            EXPECT_EQ(shard.info().num_documents, 1u + (num_tokens > 3) + (num_tokens > 700));
            EXPECT_EQ(shard.info().num_text_bytes, num_tokens * 3);
            EXPECT_EQ(shard.info().vocab_size, vocab_size);
            EXPECT_EQ(shard.info().end_of_text, kEnd);
            EXPECT_EQ(shard.info().source_hash, 7u);
            EXPECT_EQ(shard.info().tokenizer_hash, 8u);
            shard.verify();
            std::vector<TokenId> tokens(num_tokens);
            shard.read(0, tokens);
            for (uint64_t i = 0; i < num_tokens; ++i) {
                EXPECT_EQ(tokens[i], i == 0 || i == 3 || i == 700 ? kEnd : static_cast<TokenId>(i));
            }
            EXPECT_THROW_WITH(shard.read(1, tokens), FileError, "beyond its");
        }
    }
}

TEST(TokenShard, EveryDamagedByteIsNoticed) {
    TemporaryFolder folder;
    write_shard(folder / "s.tok", 21, {0, 5});
    const std::string good = read_file(folder / "s.tok");
    for (size_t i = 0; i < good.size(); ++i) {
        std::string bad = good;
        bad[i] = static_cast<char>(bad[i] ^ 4);
        write_file(folder / "bad.tok", bad);
        EXPECT_THROW(TokenShard(folder / "bad.tok").verify(), FileError) << "byte " << i;
        write_file(folder / "cut.tok", good.substr(0, i));
        EXPECT_THROW(TokenShard(folder / "cut.tok"), FileError) << "cut to " << i;
    }
    write_file(folder / "long.tok", good + std::string(8, '\0'));
    EXPECT_THROW_WITH(TokenShard(folder / "long.tok"), FileError, "does not fit its header");
}

TEST(TokenShard, RefusesHostileHeaders) {
    TemporaryFolder folder;
    write_shard(folder / "s.tok", 21, {0, 5});
    const std::string good = read_file(folder / "s.tok");
    const auto with = [&](size_t offset, uint64_t value, size_t bytes = 8) {
        std::string bad = good;
        std::memcpy(bad.data() + offset, &value, bytes);
        write_file(folder / "bad.tok", bad);
        return TokenShard(folder / "bad.tok");
    };
    EXPECT_THROW_WITH(with(8, 2, 4), FileError, "version 2; this program reads version 1");
    EXPECT_THROW_WITH(with(12, 3, 4), FileError, "3 bytes per token");
    EXPECT_THROW_WITH(with(16, ~uint64_t{0}), FileError, "does not fit its header");
    EXPECT_THROW_WITH(with(16, uint64_t{1} << 63), FileError, "does not fit its header");
    EXPECT_THROW_WITH(with(24, uint64_t{1} << 61), FileError, "does not fit its header");
    EXPECT_THROW_WITH(with(40, 0), FileError, "vocabulary size of 0");
    EXPECT_THROW_WITH(with(48, 60001), FileError, "end-of-text token 60001");
    EXPECT_THROW_WITH(with(80 + 48, 1), FileError, "document 0 starts at token 1");
    EXPECT_THROW_WITH(with(80 + 48 + 8, 0), FileError, "document 1 starts at token 0");
    EXPECT_THROW_WITH(with(80 + 48 + 8, 21), FileError, "document 1 starts at token 21");
    EXPECT_THROW_WITH(with(40, 5), FileError, "end-of-text token 60000 in a vocabulary of 5");
    EXPECT_THROW_WITH(with(80 + 2, 60005, 2).verify(), FileError, "checksum");
    std::vector<TokenId> two(2);
    EXPECT_THROW_WITH(with(80 + 2, 60005, 2).read(0, two), FileError, "token 1 is 60005, outside the vocabulary of 60001");
}

std::string llm_c_file(int32_t magic, int32_t version, int32_t count, const std::string& tokens) {
    std::array<int32_t, 256> header{magic, version, count};
    return std::string(reinterpret_cast<const char*>(header.data()), sizeof header) + tokens;
}

TEST(TokenShard, ReadsLlmC) {
    TemporaryFolder folder;
    const std::vector<uint16_t> narrow = {50256, 1, 2, 50256, 3};
    write_file(folder / "a.bin", llm_c_file(20240520, 1, 5, std::string(reinterpret_cast<const char*>(narrow.data()), 10)));
    const TokenShard a(folder / "a.bin");
    EXPECT_EQ(a.info().num_tokens, 5u);
    EXPECT_EQ(a.info().end_of_text, 50256);
    std::vector<TokenId> tokens(5);
    a.read(0, tokens);
    EXPECT_EQ(tokens, (std::vector<TokenId>{50256, 1, 2, 50256, 3}));
    std::vector<int32_t> starts;
    a.document_starts(1, 5, starts);
    EXPECT_EQ(starts, (std::vector<int32_t>{2}));

    const std::vector<uint32_t> wide = {128000, 100000, 5};
    const std::string wide_bytes(reinterpret_cast<const char*>(wide.data()), 12);
    write_file(folder / "b.bin", llm_c_file(20240801, 7, 3, wide_bytes));
    tokens.resize(3);
    TokenShard(folder / "b.bin").read(0, tokens);
    EXPECT_EQ(tokens, (std::vector<TokenId>{128000, 100000, 5}));

    write_file(folder / "c.bin", llm_c_file(20240801, 7, 4, wide_bytes));
    EXPECT_THROW_WITH(TokenShard(folder / "c.bin"), FileError, "announces 4 tokens of 4 bytes, the file holds 12");
    write_file(folder / "c.bin", llm_c_file(20240801, 7, -3, wide_bytes));
    EXPECT_THROW_WITH(TokenShard(folder / "c.bin"), FileError, "announces -3");
    write_file(folder / "c.bin", llm_c_file(20240520, 2, 3, wide_bytes));
    EXPECT_THROW_WITH(TokenShard(folder / "c.bin"), FileError, "is not a token shard");
    write_file(folder / "c.bin", "short");
    EXPECT_THROW_WITH(TokenShard(folder / "c.bin"), FileError, "is not a token shard");
}

TokenStream stream_of(const TemporaryFolder& folder, const std::vector<uint64_t>& sizes, const std::vector<uint64_t>& starts = {0},
                      TokenId end_of_text = kEnd) {
    std::vector<TokenShard> shards;
    for (size_t s = 0; s < sizes.size(); ++s) {
        shards.push_back(write_shard(folder / (std::to_string(s) + ".tok"), sizes[s], starts, 60001, end_of_text));
    }
    return TokenStream(std::move(shards));
}

void expect_sound(const Batch& batch) {
    ASSERT_EQ(batch.tokens.size(), batch.targets.size());
    ASSERT_EQ(batch.cu_seqlens.front(), 0);
    ASSERT_EQ(batch.cu_seqlens.back(), static_cast<int32_t>(batch.tokens.size()));
    for (size_t i = 1; i < batch.cu_seqlens.size(); ++i) ASSERT_LT(batch.cu_seqlens[i - 1], batch.cu_seqlens[i]);
}

TEST(Sampler, AnEpochVisitsEveryRowOnce) {
    for (const uint64_t tokens : {18, 33, 1000, 4097}) {
        TemporaryFolder folder;
        Sampler sampler(stream_of(folder, {tokens, 50}), {.row = {.seqlen = 16}, .batch_size = 1, .seed = 3});
        Batch batch;
        for (int epoch = 0; epoch < 3; ++epoch) {
            std::multiset<TokenId> last_tokens;
            for (uint64_t row = 0; row < sampler.rows_per_epoch(); ++row) {
                EXPECT_EQ(sampler.position(), (SamplerPosition{static_cast<uint64_t>(epoch), row}));
                sampler.next(batch);
                expect_sound(batch);
                ASSERT_EQ(batch.tokens.size(), 16u);
                for (size_t i = 1; i < 16; ++i) ASSERT_EQ(batch.tokens[i], batch.targets[i - 1]);
                ASSERT_EQ(batch.targets[15], batch.tokens[15] + 1);
                last_tokens.insert(batch.tokens[15]);
            }
            // Rows of a shard are 16 apart; two shards may share numbers, a shard never does.
            std::map<TokenId, int> count;
            for (const TokenId token : last_tokens) ASSERT_LE(++count[token], 2);
            if (sampler.position().next_row == sampler.rows_per_epoch()) {
                sampler.seek({static_cast<uint64_t>(epoch) + 1, 0});
            }
        }
    }
}

TEST(Sampler, RowsTileTheShardFromAnOffsetThatChanges) {
    TemporaryFolder folder;
    Sampler sampler(stream_of(folder, {1000}), {.row = {.seqlen = 16}, .batch_size = 1, .seed = 3});
    std::set<TokenId> offsets;
    for (uint64_t epoch = 0; epoch < 30; ++epoch) {
        sampler.seek({epoch, 0});
        std::set<TokenId> firsts;
        Batch batch;
        for (uint64_t row = 0; row < sampler.rows_per_epoch(); ++row) {
            sampler.next(batch);
            firsts.insert(batch.targets[0] - 1);
        }
        ASSERT_EQ(firsts.size(), sampler.rows_per_epoch());
        TokenId expected = *firsts.begin();
        ASSERT_LE(expected, 16);
        for (const TokenId first : firsts) {
            ASSERT_EQ(first, expected);
            expected += 16;
        }
        offsets.insert(*firsts.begin());
    }
    EXPECT_GT(offsets.size(), 8u);
}

TEST(Sampler, OrdersDifferBySeedAndEpoch) {
    TemporaryFolder folder;
    const TokenStream stream = stream_of(folder, {5000});
    const auto order = [&](uint64_t seed, uint64_t epoch) {
        Sampler sampler(stream, {.row = {.seqlen = 16}, .batch_size = 100, .seed = seed});
        sampler.seek({epoch, 0});
        Batch batch;
        sampler.next(batch);
        return batch.tokens;
    };
    EXPECT_EQ(order(1, 0), order(1, 0));
    EXPECT_NE(order(1, 0), order(2, 0));
    EXPECT_NE(order(1, 0), order(1, 1));
}

TEST(Sampler, ResumesAnywhereBitForBit) {
    TemporaryFolder folder;
    const TokenStream stream = stream_of(folder, {700, 300}, {0, 9, 33});
    const SamplerOptions options{.row = {.seqlen = 16}, .batch_size = 7, .seed = 11};
    Sampler sampler(stream, options);
    std::vector<std::pair<SamplerPosition, Batch>> history;
    for (int step = 0; step < 40; ++step) {  // several epochs, batches across their borders
        history.emplace_back(sampler.position(), Batch{});
        sampler.next(history.back().second);
        expect_sound(history.back().second);
    }
    EXPECT_GT(sampler.position().epoch, 2u);
    for (const auto& [position, expected] : history) {
        Sampler resumed(stream, options);
        resumed.seek(position);
        Batch batch;
        resumed.next(batch);
        ASSERT_EQ(batch.tokens, expected.tokens);
        ASSERT_EQ(batch.targets, expected.targets);
        ASSERT_EQ(batch.cu_seqlens, expected.cu_seqlens);
    }
    EXPECT_THROW_WITH(sampler.seek({0, sampler.rows_per_epoch() + 1}), std::invalid_argument, "data position");
}

TEST(Sampler, RanksShareOneOrder) {
    TemporaryFolder folder;
    const TokenStream stream = stream_of(folder, {3000});
    Sampler whole(stream, {.row = {.seqlen = 16}, .batch_size = 6, .seed = 5});
    for (int step = 0; step < 10; ++step) {
        Batch all;
        whole.next(all);
        std::vector<TokenId> together;
        for (int64_t rank = 0; rank < 3; ++rank) {
            Sampler part(stream, {.row = {.seqlen = 16}, .batch_size = 2, .seed = 5, .rank = rank, .num_ranks = 3});
            Batch batch;
            for (int s = 0; s <= step; ++s) part.next(batch);
            EXPECT_EQ(part.position(), whole.position());
            together.insert(together.end(), batch.tokens.begin(), batch.tokens.end());
        }
        ASSERT_EQ(together, all.tokens);
    }
}

TEST(Sampler, DocumentBordersStartSequences) {
    TemporaryFolder folder;
    // Documents of 10, 1, 22 and 17 tokens; one row over all of it.
    const TokenStream with_end = stream_of(folder, {50}, {0, 10, 11, 33});
    SequentialBatches rows(with_end, {.seqlen = 49}, 1);
    Batch batch;
    ASSERT_TRUE(rows.next(batch));
    EXPECT_EQ(batch.cu_seqlens, (std::vector<int32_t>{0, 10, 11, 33, 49}));
    EXPECT_EQ(batch.targets[9], kEnd) << "the end of a document can be foreseen";
    EXPECT_EQ(std::count(batch.targets.begin(), batch.targets.end(), kIgnoreTarget), 0);

    SequentialBatches whole_rows(with_end, {.seqlen = 49, .split_documents = false}, 1);
    ASSERT_TRUE(whole_rows.next(batch));
    EXPECT_EQ(batch.cu_seqlens, (std::vector<int32_t>{0, 49}));

    // A border at the row's very end adds no empty sequence.
    SequentialBatches short_rows(with_end, {.seqlen = 10}, 5);
    ASSERT_TRUE(short_rows.next(batch));
    EXPECT_EQ(batch.cu_seqlens, (std::vector<int32_t>{0, 10, 11, 20, 30, 33, 40, 49}));
}

TEST(Sampler, WithoutAnEndTokenTheNextDocumentIsNoTarget) {
    TemporaryFolder folder;
    const TokenStream stream = stream_of(folder, {50}, {0, 10, 11, 33}, -1);
    SequentialBatches rows(stream, {.seqlen = 10}, 5);
    Batch batch;
    ASSERT_TRUE(rows.next(batch));
    for (size_t i = 0; i < batch.targets.size(); ++i) {
        const TokenId expected = static_cast<TokenId>(i) + 1;
        const bool border = expected == 10 || expected == 11 || expected == 33;
        EXPECT_EQ(batch.targets[i], border ? kIgnoreTarget : expected) << i;
    }
}

TEST(SequentialBatches, EveryTargetOnce) {
    TemporaryFolder folder;
    const TokenStream stream = stream_of(folder, {100, 1, 17});
    SequentialBatches rows(stream, {.seqlen = 16}, 3);
    EXPECT_EQ(rows.num_rows(), 7u + 0 + 1);
    for (int pass = 0; pass < 2; ++pass) {
        Batch batch;
        std::vector<TokenId> targets;
        while (rows.next(batch)) {
            expect_sound(batch);
            targets.insert(targets.end(), batch.targets.begin(), batch.targets.end());
        }
        EXPECT_TRUE(batch.tokens.empty());
        ASSERT_EQ(targets.size(), 99u + 16);
        for (size_t i = 0; i < 99; ++i) EXPECT_EQ(targets[i], static_cast<TokenId>(i + 1));
        for (size_t i = 0; i < 16; ++i) EXPECT_EQ(targets[99 + i], static_cast<TokenId>(i + 1));
        rows.rewind();
    }
    SequentialBatches some(stream, {.seqlen = 16}, 3, 4);
    EXPECT_EQ(some.num_rows(), 4u);
    Batch batch;
    std::vector<TokenId> firsts;
    while (some.next(batch)) {
        for (size_t i = 0; i + 1 < batch.cu_seqlens.size(); ++i) {
            firsts.push_back(batch.targets[static_cast<size_t>(batch.cu_seqlens[i])] - 1);
        }
    }
    EXPECT_EQ(firsts, (std::vector<TokenId>{0, 32, 64, 96}));
}

TEST(Sampler, RefusesTooLittleDataAndImpossibleOptions) {
    TemporaryFolder folder;
    const TokenStream stream = stream_of(folder, {16});
    EXPECT_THROW_WITH(Sampler(stream, {.row = {.seqlen = 16}}), std::invalid_argument, "has 16 tokens; a sequence length of 16 needs at least 17");
    EXPECT_NO_THROW(Sampler(stream, {.row = {.seqlen = 15}}));
    EXPECT_THROW_WITH(Sampler(stream, {.row = {.seqlen = 0}}), std::invalid_argument, "must be between");
    EXPECT_THROW_WITH(Sampler(stream, {.row = {.seqlen = 8}, .batch_size = 0}), std::invalid_argument, "must be between");
    EXPECT_THROW_WITH(Sampler(stream, {.row = {.seqlen = 8}, .rank = 2, .num_ranks = 2}), std::invalid_argument, "rank 2 of 2");
    EXPECT_EQ(SequentialBatches(TokenStream(), {.seqlen = 8}, 1).num_rows(), 0u);
}

}  // namespace
}  // namespace strobe::gpt
