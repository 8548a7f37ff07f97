// Every vocabulary format there and back, and what its reader refuses.
#include <algorithm>

#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/io/strict_json.hpp"
#include "gpt/tokenizer/base64.hpp"
#include "gpt/tokenizer/bpe_trainer.hpp"
#include "gpt/tokenizer/byte_alphabet.hpp"
#include "gpt/tokenizer/tokenizer.hpp"
#include "gpt/tokenizer/vocabulary_files.hpp"
#include "temporary_folder.hpp"

namespace strobe::gpt {
namespace {

const std::string kText = "the cat sat on the mat; the hat of that cat is a flat hat. The cat's mat isn't that flat, is it?\n\n";

Vocabulary trained(std::string_view pattern) {
    BpeTrainer trainer({.vocab_size = 300, .min_frequency = 2, .pattern = std::string(pattern)});
    for (int i = 0; i < 3; ++i) trainer.add(kText);
    return trainer.train();
}

/// The same tokens as tiktoken holds them: bytes by rank, nothing else.
std::string tiktoken_text(const Vocabulary& vocabulary) {
    std::string lines;
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
        if (!vocabulary.tokens[id].empty()) {
            lines += base64_encode(vocabulary.tokens[id]) + " " + std::to_string(id) + "\n";
        }
    }
    return lines;
}

TEST(VocabularyFiles, SavedAndLoadedIsTheSame) {
    for (const std::string_view pattern : {kGpt2Pattern, kCl100kPattern, kO200kPattern, std::string_view()}) {
        TemporaryFolder folder;
        const Tokenizer tokenizer(trained(pattern));
        tokenizer.save(folder.path());
        const Tokenizer loaded = Tokenizer::load(folder.path());
        EXPECT_EQ(loaded.fingerprint(), tokenizer.fingerprint());
        EXPECT_EQ(loaded.encode(kText), tokenizer.encode(kText));
        EXPECT_EQ(Tokenizer::load(folder / "tokenizer.json").fingerprint(), tokenizer.fingerprint());
        EXPECT_EQ(std::filesystem::exists(folder / "vocab.json"), pattern == kGpt2Pattern);
        if (pattern == kGpt2Pattern) {
            EXPECT_EQ(Tokenizer::load(folder / "vocab.json").fingerprint(), tokenizer.fingerprint());
        }
    }
}

TEST(VocabularyFiles, BytesSavedAndLoadedAreTheSame) {
    TemporaryFolder folder;
    Tokenizer::bytes().save(folder.path());
    EXPECT_EQ(Tokenizer::load(folder.path()).fingerprint(), Tokenizer::bytes().fingerprint());
    EXPECT_EQ(Tokenizer::load("bytes").fingerprint(), Tokenizer::bytes().fingerprint());
}

TEST(VocabularyFiles, TiktokenSavedAndLoadedIsTheSame) {
    TemporaryFolder folder, saved;
    write_file(folder / "my_r50k.tiktoken", tiktoken_text(trained(kGpt2Pattern)));
    const Tokenizer tokenizer = Tokenizer::load(folder / "my_r50k.tiktoken");
    EXPECT_TRUE(tokenizer.vocabulary().ranks_are_ids);
    EXPECT_EQ(tokenizer.vocabulary().pattern, kGpt2Pattern);
    EXPECT_EQ(tokenizer.encode(kText), Tokenizer(trained(kGpt2Pattern)).encode(kText));
    tokenizer.save(saved.path());
    const Tokenizer loaded = Tokenizer::load(saved.path());
    EXPECT_EQ(loaded.fingerprint(), tokenizer.fingerprint());
    EXPECT_EQ(loaded.end_of_text(), tokenizer.end_of_text());
    // The merges written for Hugging Face give the same tokens.
    EXPECT_EQ(Tokenizer::load(saved / "tokenizer.json").encode(kText), tokenizer.encode(kText));
}

TEST(VocabularyFiles, TiktokenNamesTellPatternAndSpecialTokens) {
    Vocabulary vocabulary;
    vocabulary.tokens.resize(100256, "x");
    add_tiktoken_conventions(vocabulary, "cl100k_base.tiktoken");
    EXPECT_EQ(vocabulary.pattern, kCl100kPattern);
    EXPECT_EQ(vocabulary.tokens.size(), 100277u);
    EXPECT_EQ(vocabulary.specials.front(), (SpecialToken{"<|endoftext|>", 100257}));

    vocabulary.tokens.assign(50256, "x");
    add_tiktoken_conventions(vocabulary, "r50k_base.tiktoken");
    EXPECT_EQ(vocabulary.pattern, kGpt2Pattern);
    EXPECT_EQ(vocabulary.specials, (std::vector<SpecialToken>{{"<|endoftext|>", 50256}}));

    vocabulary.tokens.assign(199998, "x");
    add_tiktoken_conventions(vocabulary, "o200k_base.tiktoken");
    EXPECT_EQ(vocabulary.pattern, kO200kPattern);
    EXPECT_EQ(vocabulary.specials.back(), (SpecialToken{"<|endofprompt|>", 200018}));
}

TEST(VocabularyFiles, TiktokenRefusals) {
    const auto parse = [](const std::string& text) { return parse_tiktoken_vocabulary(text, "v.tiktoken"); };
    const std::string good = tiktoken_text(trained(kGpt2Pattern));
    EXPECT_NO_THROW(parse(good));
    EXPECT_THROW_WITH(parse(good + "YWE= 5\n"), FileError, "v.tiktoken: rank 5 occurs twice");
    EXPECT_THROW_WITH(parse(good + "YQ== 2000\n"), FileError, "token of rank 2000 occurs twice");
    EXPECT_THROW_WITH(parse(good + "!!!! 2000\n"), FileError, "is '!!!! 2000'; expected a base64");
    EXPECT_THROW_WITH(parse(good + "enp6\n"), FileError, "expected a base64 token and its rank");
    EXPECT_THROW_WITH(parse(good + "enp6 -1\n"), FileError, "has rank '-1'");
    EXPECT_THROW_WITH(parse(good + "enp6 16000000\n"), FileError, "but a rank of 16000000");
    EXPECT_THROW_WITH(parse(good + "enp6 99999999999999999999\n"), FileError, "has rank");
    EXPECT_THROW_WITH(parse(good.substr(good.find('\n') + 1)), FileError, "byte 0x21 has no token of its own");
    EXPECT_THROW_WITH(parse(""), FileError, "has no token of its own");
    EXPECT_THROW_WITH(parse(good + base64_encode(std::string(2000, 'q')) + " 2000\n"), FileError, "longer than 1024");
}

struct Gpt2Files {
    std::string vocab, merges;
};

Gpt2Files gpt2_files() {
    TemporaryFolder folder;
    Tokenizer(trained(kGpt2Pattern)).save(folder.path());
    return {read_file(folder / "vocab.json"), read_file(folder / "merges.txt")};
}

TEST(VocabularyFiles, Gpt2Refusals) {
    const Gpt2Files good = gpt2_files();
    const auto parse = [&](const std::string& vocab, const std::string& merges) {
        return parse_gpt2_vocabulary(vocab, "vocab.json", merges, "merges.txt");
    };
    EXPECT_NO_THROW(parse(good.vocab, good.merges));
    const std::string tail = good.vocab.substr(1);
    EXPECT_THROW_WITH(parse("{\"zzz\": -1, " + tail, good.merges), FileError, "vocab.json: token 'zzz' has id -1");
    EXPECT_THROW_WITH(parse("{\"zzz\": 1e9, " + tail, good.merges), FileError, "token 'zzz' has id");
    EXPECT_THROW_WITH(parse("{\"zzz\": 4000000000, " + tail, good.merges), FileError, "token 'zzz' has id 4000000000");
    EXPECT_THROW_WITH(parse("{\"zzz\": 5, " + tail, good.merges), FileError, "id 5 belongs to two tokens");
    EXPECT_THROW_WITH(parse("{\"!\": 600, " + tail, good.merges), FileError, "key '!' occurs twice");
    EXPECT_THROW_WITH(parse("[]", good.merges), FileError, "not an object of token: id");
    EXPECT_THROW_WITH(parse("{\"!\": 0}", "#version: 0.2\n"), FileError, "has no token of its own");
    EXPECT_THROW_WITH(parse(good.vocab, good.merges + "q zq\n"), FileError, "merges.txt: merge");
    EXPECT_THROW_WITH(parse(good.vocab, good.merges + "one two three\n"), FileError, "expected two tokens and one space");
    EXPECT_THROW_WITH(parse(good.vocab, good.merges + "one\n"), FileError, "expected two tokens and one space");
}

TEST(VocabularyFiles, CarriageReturnsInMergesAreLineEnds) {
    const Gpt2Files good = gpt2_files();
    std::string windows;
    for (const char c : good.merges) windows += c == '\n' ? std::string("\r\n") : std::string(1, c);
    EXPECT_EQ(parse_gpt2_vocabulary(good.vocab, "v", windows, "m").fingerprint(),
              parse_gpt2_vocabulary(good.vocab, "v", good.merges, "m").fingerprint());
}

TEST(VocabularyFiles, TokenizerJsonRefusesWhatWouldChangeTokens) {
    TemporaryFolder folder;
    Tokenizer(trained(kCl100kPattern)).save(folder.path());
    const nlohmann::json good = read_json_file(folder / "tokenizer.json");
    const auto with = [&](const char* pointer, const nlohmann::json& value) {
        nlohmann::json changed = good;
        changed[nlohmann::json::json_pointer(pointer)] = value;
        return parse_tokenizer_json(changed.dump(), "t.json");
    };
    EXPECT_EQ(with("/version", "1.0").fingerprint(), Tokenizer(trained(kCl100kPattern)).fingerprint());
    EXPECT_THROW_WITH(with("/model/type", "Unigram"), FileError, "a model other than BPE is not supported");
    EXPECT_THROW_WITH(with("/normalizer", {{"type", "NFC"}}), FileError, "a normalizer is not supported");
    EXPECT_THROW_WITH(with("/model/byte_fallback", true), FileError, "byte_fallback");
    EXPECT_THROW_WITH(with("/model/dropout", 0.1), FileError, "merge dropout");
    EXPECT_THROW_WITH(with("/model/end_of_word_suffix", "</w>"), FileError, "end_of_word_suffix");
    EXPECT_THROW_WITH(with("/pre_tokenizer", nullptr), FileError, "does not end in ByteLevel");
    EXPECT_THROW_WITH(with("/pre_tokenizer/pretokenizers/1/add_prefix_space", true), FileError, "add_prefix_space");
    EXPECT_THROW_WITH(with("/pre_tokenizer/pretokenizers/1/use_regex", true), FileError, "splits again");
    EXPECT_THROW_WITH(with("/pre_tokenizer/pretokenizers/0/behavior", "Removed"), FileError, "Split other than Isolated");
    EXPECT_THROW_WITH(with("/pre_tokenizer/pretokenizers/0/pattern", {{"String", "x"}}), FileError, "Split by a Regex");
    EXPECT_THROW_WITH(with("/pre_tokenizer/pretokenizers/0/pattern/Regex", "(("), FileError, "does not compile");
    EXPECT_THROW_WITH(with("/added_tokens/0/lstrip", true), FileError, "with lstrip");
    EXPECT_THROW_WITH(with("/added_tokens/0/id", 7), FileError, "has id 7 but");
    EXPECT_THROW_WITH(with("/added_tokens/0/id", 1u << 31), FileError, "needs a content and an id");
    EXPECT_THROW_WITH(with("/model/merges/0", "a"), FileError, "merge 0 is not a pair");
    EXPECT_THROW_WITH(with("/model/merges/0", {"a", "q", "z"}), FileError, "merge 0 is not a pair");
    EXPECT_THROW_WITH(with("/model/vocab", nullptr), FileError, "not an object of token: id");
}

TEST(VocabularyFiles, MergesMayBePairsOrLines) {
    TemporaryFolder folder;
    Tokenizer(trained(kGpt2Pattern)).save(folder.path());
    nlohmann::json document = read_json_file(folder / "tokenizer.json");
    const uint64_t lines = parse_tokenizer_json(document.dump(), "t").fingerprint();
    for (nlohmann::json& merge : document["model"]["merges"]) {
        const std::string line = merge.get<std::string>();
        const size_t space = line.find(' ');
        merge = {line.substr(0, space), line.substr(space + 1)};
    }
    EXPECT_EQ(parse_tokenizer_json(document.dump(), "t").fingerprint(), lines);
}

TEST(VocabularyFiles, LoadNamesWhatItLookedFor) {
    TemporaryFolder folder;
    EXPECT_THROW_WITH(Tokenizer::load(folder.path()), FileError, "holds none of");
    EXPECT_THROW_WITH(Tokenizer::load(folder / "nowhere"), FileError, "does not exist");
    write_file(folder / "x.txt", "x");
    EXPECT_THROW_WITH(Tokenizer::load(folder / "x.txt"), FileError, "is none of vocab.json");
    write_file(folder / "vocab.json", "{}");
    EXPECT_THROW_WITH(Tokenizer::load(folder.path()), FileError, "merges.txt: cannot open");
}

}  // namespace
}  // namespace strobe::gpt
