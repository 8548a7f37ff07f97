// From text on disk to streams of tokens: documents, splits, and a cache that is trusted only as far as its checksums
// go.
#include <algorithm>
#include <array>

#include "gpt/data/corpus.hpp"
#include "gpt/data/dataset.hpp"
#include "gpt/io/file_error.hpp"
#include "gpt/tokenizer/bpe_trainer.hpp"
#include "temporary_folder.hpp"

namespace strobe::gpt {
namespace {

std::vector<std::string> documents_of(const std::filesystem::path& source) {
    std::vector<std::string> documents;
    Corpus(source).for_each_document([&](std::string_view document) { documents.emplace_back(document); });
    return documents;
}

using Texts = std::vector<std::string>;

TEST(Corpus, SeparatesDocumentsInsideFiles) {
    TemporaryFolder folder;
    write_file(folder / "t.txt", "<|endoftext|>one\n<|endoftext|>\ntwo\n\n<|endoftext|><|endoftext|>\n\nthree");
    EXPECT_EQ(documents_of(folder / "t.txt"), (Texts{"one", "two\n", "\nthree"}));
}

TEST(Corpus, FoldersAreReadInOrderOfPathsWithoutHiddenAndBinaryFiles) {
    TemporaryFolder folder;
    write_file(folder / "b.txt", "b");
    write_file(folder / "a" / "z.md", "az");
    write_file(folder / "a.txt", "a");
    write_file(folder / ".git" / "config", "hidden");
    write_file(folder / ".hidden", "hidden");
    write_file(folder / "image.png", std::string("\x89PNG\0\0", 6));
    write_file(folder / "empty.txt", "");
    const Corpus corpus(folder.path());
    EXPECT_EQ(documents_of(folder.path()), (Texts{"a", "az", "b"}));
    EXPECT_EQ(corpus.num_documents(), 3u);
    EXPECT_EQ(corpus.num_bytes(), 4u);
}

TEST(Corpus, RefusesWhatHoldsNoText) {
    TemporaryFolder folder;
    EXPECT_THROW_WITH(Corpus(folder / "absent"), FileError, "does not exist");
    EXPECT_THROW_WITH(Corpus(folder.path()), FileError, "holds no text");
}

TEST(Corpus, HashFollowsTheTextAlone) {
    TemporaryFolder folder;
    write_file(folder / "1" / "a", "one<|endoftext|>two");
    write_file(folder / "2" / "x", "one");
    write_file(folder / "2" / "y", "two");
    write_file(folder / "3" / "a", "onet<|endoftext|>wo");
    EXPECT_EQ(Corpus(folder / "1").content_hash(), Corpus(folder / "2").content_hash());
    EXPECT_NE(Corpus(folder / "1").content_hash(), Corpus(folder / "3").content_hash());
}

/// Lines with all kinds of ends, as documents of about `bytes` bytes.
std::string prose(uint32_t seed, size_t bytes) {
    static constexpr std::array<const char*, 12> kWords = {"the", "cat's", "caf\u00e9", "1234", "x+y", "\u4e2d\u6587", "  indented", "end.", "!?", "don't", "\tTab", "\U0001F600"};
    std::string text;
    while (text.size() < bytes) {
        seed = seed * 1664525 + 1013904223;
        text += kWords[(seed >> 16) % kWords.size()];
        text += std::array{" ", " ", " ", "\n", "\n\n", "\r\n"}[(seed >> 8) % 6];
    }
    return text;
}

TEST(Slices, EncodeApartAsTogether) {
    const std::string text = prose(1, 60000);
    for (const std::string_view pattern : {kGpt2Pattern, kCl100kPattern, kO200kPattern}) {
        BpeTrainer trainer({.vocab_size = 500, .pattern = std::string(pattern)});
        trainer.add(text);
        const Tokenizer tokenizer(trainer.train());
        const std::vector<TokenId> together = tokenizer.encode(text);
        for (const size_t target : {2, 10, 500, 7000, 100000}) {
            const std::vector<std::string_view> slices = slices_of(text, target);
            std::vector<TokenId> apart;
            Encoder encoder(tokenizer);
            for (const std::string_view slice : slices) encoder.encode(slice, apart);
            ASSERT_EQ(apart, together) << target;
            EXPECT_EQ(slices.size() > 1, target < text.size());
        }
    }
}

std::string decode_all(const TokenStream& stream, const Tokenizer& tokenizer) {
    std::string text;
    for (const TokenShard& shard : stream.shards()) {
        std::vector<TokenId> tokens(shard.info().num_tokens);
        shard.read(0, tokens);
        text += tokenizer.decode(tokens);
    }
    return text;
}

DatasetOptions options_for(const TemporaryFolder& folder, const std::filesystem::path& source) {
    DatasetOptions options;
    options.source = source;
    options.cache = folder / "cache";
    return options;
}

TEST(Dataset, ManyDocumentsHoldOutEveryTenth) {
    TemporaryFolder folder;
    std::string text, train, held_out;
    for (int i = 1; i <= 100; ++i) {
        const std::string document = "document " + std::to_string(i);
        text += document + "\n<|endoftext|>\n";
        (i % 10 == 0 ? held_out : train) += "<|endoftext|>" + document;
    }
    write_file(folder / "t.txt", text);
    const Tokenizer tokenizer = Tokenizer::bytes();
    const Dataset dataset = load_dataset(options_for(folder, folder / "t.txt"), tokenizer);
    EXPECT_EQ(decode_all(dataset.train, tokenizer), train);
    EXPECT_EQ(decode_all(dataset.held_out, tokenizer), held_out);
    EXPECT_EQ(dataset.train.num_documents(), 90u);
    EXPECT_EQ(dataset.train.num_text_bytes() + 90 * 13, train.size());
    EXPECT_EQ(dataset.held_out.num_text_bytes() + 10 * 13, held_out.size());
    EXPECT_EQ(dataset.train.vocab_size(), 257u);
}

TEST(Dataset, FewDocumentsHoldOutTheirEndsAtALine) {
    TemporaryFolder folder;
    std::string text;
    for (int i = 0; i < 1000; ++i) text += "line " + std::to_string(i) + "\n";
    write_file(folder / "t.txt", text);
    const Tokenizer tokenizer = Tokenizer::bytes();
    const Dataset dataset = load_dataset(options_for(folder, folder / "t.txt"), tokenizer);
    const std::string train = decode_all(dataset.train, tokenizer).substr(13), held_out = decode_all(dataset.held_out, tokenizer).substr(13);
    EXPECT_EQ(train + held_out, text);
    EXPECT_TRUE(train.ends_with('\n'));
    EXPECT_NEAR(static_cast<double>(held_out.size()), 0.1 * static_cast<double>(text.size()), 10);
}

TEST(Dataset, ThreadsDoNotChangeTheTokens) {
    TemporaryFolder folder;
    write_file(folder / "t.txt", prose(2, 3 << 20));
    BpeTrainer trainer({.vocab_size = 600});
    trainer.add(prose(3, 50000));
    const Tokenizer tokenizer(trainer.train());
    DatasetOptions options = options_for(folder, folder / "t.txt");
    const Dataset one = load_dataset(options, tokenizer);
    options.cache = folder / "cache2";
    options.num_threads = 3;
    double last_progress = 0;
    options.progress = [&](double share) { last_progress = share; };
    const Dataset three = load_dataset(options, tokenizer);
    EXPECT_EQ(decode_all(one.train, tokenizer), decode_all(three.train, tokenizer));
    EXPECT_EQ(one.train.num_tokens(), three.train.num_tokens());
    EXPECT_EQ(one.fingerprint, three.fingerprint);
    EXPECT_DOUBLE_EQ(last_progress, 1.0);
    EXPECT_EQ(read_file(one.train.shards()[0].path()), read_file(three.train.shards()[0].path()));
}

TEST(Dataset, TheCacheIsUsedAndRepaired) {
    TemporaryFolder folder;
    write_file(folder / "t.txt", prose(4, 20000));
    const Tokenizer tokenizer = Tokenizer::bytes();
    const DatasetOptions options = options_for(folder, folder / "t.txt");
    const Dataset first = load_dataset(options, tokenizer);
    EXPECT_FALSE(first.from_cache);
    EXPECT_TRUE(load_dataset(options, tokenizer).from_cache);
    const std::filesystem::path shard = first.train.shards()[0].path();
    const std::string good = read_file(shard);

    std::string damaged = good;
    damaged[good.size() / 2] = static_cast<char>(damaged[good.size() / 2] ^ 1);
    for (const std::string& bad : {damaged, good.substr(0, good.size() - 1), std::string()}) {
        std::filesystem::remove(shard);  // not in place: the first dataset still maps the file
        write_file(shard, bad);
        const Dataset repaired = load_dataset(options, tokenizer);
        EXPECT_FALSE(repaired.from_cache);
        EXPECT_EQ(read_file(shard), good);
    }

    write_file(folder / "t.txt", prose(5, 20000));
    const Dataset changed = load_dataset(options, tokenizer);
    EXPECT_FALSE(changed.from_cache);
    EXPECT_NE(changed.fingerprint, first.fingerprint);
    DatasetOptions more = options;
    more.held_out = 0.2;
    EXPECT_NE(load_dataset(more, tokenizer).fingerprint, changed.fingerprint);
}

TEST(Dataset, HeldOutMayBeNothing) {
    TemporaryFolder folder;
    write_file(folder / "t.txt", "some text");
    DatasetOptions options = options_for(folder, folder / "t.txt");
    options.held_out = 0;
    const Dataset dataset = load_dataset(options, Tokenizer::bytes());
    EXPECT_EQ(dataset.held_out.num_tokens(), 0u);
    EXPECT_EQ(dataset.train.num_tokens(), 10u);
    EXPECT_TRUE(load_dataset(options, Tokenizer::bytes()).from_cache);
    options.held_out = 0.7;
    EXPECT_THROW_WITH(load_dataset(options, Tokenizer::bytes()), std::invalid_argument, "held_out is 0.7");
}

TEST(Dataset, TakesShardsAsTheyAre) {
    TemporaryFolder folder;
    const auto llm_c = [](const std::vector<uint16_t>& tokens) {
        std::array<int32_t, 256> header{20240520, 1, static_cast<int32_t>(tokens.size())};
        return std::string(reinterpret_cast<const char*>(header.data()), sizeof header) +
               std::string(reinterpret_cast<const char*>(tokens.data()), tokens.size() * 2);
    };
    write_file(folder / "x_train_000001.bin", llm_c({50256, 1, 2}));
    write_file(folder / "x_train_000002.bin", llm_c({50256, 3}));
    write_file(folder / "x_val_000000.bin", llm_c({50256, 4}));
    Vocabulary vocabulary = byte_vocabulary();
    vocabulary.tokens.resize(50257);
    vocabulary.specials = {{std::string(kEndOfText), 50256}};
    const Tokenizer tokenizer(vocabulary);
    const Dataset dataset = load_dataset(options_for(folder, folder.path()), tokenizer);
    EXPECT_EQ(dataset.train.num_tokens(), 5u);
    EXPECT_EQ(dataset.held_out.num_tokens(), 2u);
    EXPECT_EQ(dataset.train.num_text_bytes(), 0u);
    EXPECT_THROW_WITH(load_dataset(options_for(folder, folder.path()), Tokenizer::bytes()), FileError, "written with another tokenizer");
    EXPECT_EQ(load_dataset(options_for(folder, folder / "x_val_000000.bin"), tokenizer).train.num_tokens(), 2u);
}

TEST(Dataset, AShardOfAnotherTokenizerIsRefused) {
    TemporaryFolder folder;
    write_file(folder / "t.txt", prose(6, 2000));
    const Dataset dataset = load_dataset(options_for(folder, folder / "t.txt"), Tokenizer::bytes());
    const std::filesystem::path shard = dataset.train.shards()[0].path();
    EXPECT_EQ(load_dataset(options_for(folder, shard), Tokenizer::bytes()).train.num_tokens(), dataset.train.num_tokens());
    BpeTrainer trainer({.vocab_size = 300});
    trainer.add(prose(7, 2000));
    EXPECT_THROW_WITH(load_dataset(options_for(folder, shard), Tokenizer(trainer.train())), FileError, "written with another tokenizer");
}

}  // namespace
}  // namespace strobe::gpt
