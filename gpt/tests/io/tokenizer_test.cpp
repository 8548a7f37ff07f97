// Splitting, merging, training: against small worked examples and against the definitions carried out naively.
#include <algorithm>
#include <map>
#include <random>

#include "gpt/text/utf8.hpp"
#include "gpt/tokenizer/bpe_trainer.hpp"
#include "gpt/tokenizer/byte_alphabet.hpp"
#include "gpt/tokenizer/tokenizer.hpp"
#include "temporary_folder.hpp"

namespace strobe::gpt {
namespace {

std::vector<std::string> pieces(std::string_view pattern, std::string_view text) {
    const Splitter splitter(pattern);
    PieceCursor cursor(splitter);
    std::vector<std::string> out;
    cursor.start(text);
    for (std::string_view piece = cursor.next(); !piece.empty(); piece = cursor.next()) out.emplace_back(piece);
    return out;
}

using Pieces = std::vector<std::string>;

TEST(Splitter, Gpt2Examples) {
    EXPECT_EQ(pieces(kGpt2Pattern, "Hello world, it's 2024!"), (Pieces{"Hello", " world", ",", " it", "'s", " 2024", "!"}));
    EXPECT_EQ(pieces(kGpt2Pattern, "a   b\n\n  c  "), (Pieces{"a", "  ", " b", "\n\n ", " c", "  "}));
    EXPECT_EQ(pieces(kGpt2Pattern, "IT'S"), (Pieces{"IT", "'", "S"}));
    EXPECT_EQ(pieces(kGpt2Pattern, "na\u00efve \u4e2d\u6587\U0001F600x"), (Pieces{"na\u00efve", " \u4e2d\u6587", "\U0001F600", "x"}));
}

TEST(Splitter, Cl100kExamples) {
    EXPECT_EQ(pieces(kCl100kPattern, "IT'S 12345\r\n\r\nx"), (Pieces{"IT", "'S", " ", "123", "45", "\r\n\r\n", "x"}));
    EXPECT_EQ(pieces(kCl100kPattern, "(foo)   bar!!\n"), (Pieces{"(foo", ")", "  ", " bar", "!!\n"}));
}

TEST(Splitter, O200kExamples) {
    EXPECT_EQ(pieces(kO200kPattern, "HelloWorld don't http://x/y"), (Pieces{"Hello", "World", " don't", " http", "://", "x", "/y"}));
}

TEST(Splitter, MongolianVowelSeparatorIsNoSpace) {
    EXPECT_EQ(pieces(kGpt2Pattern, "a\u180e b"), (Pieces{"a", "\u180e", " b"}));
    EXPECT_EQ(pieces(kGpt2Pattern, "a\u0085\u2028b"), (Pieces{"a", "\u0085", "\u2028", "b"}));
}

TEST(Splitter, KnowsTheLettersAndDigitsOfUnicode16) {
    EXPECT_EQ(pieces(kGpt2Pattern, "a\U00031350\u1c89b"), (Pieces{"a\U00031350\u1c89b"}));
    EXPECT_EQ(pieces(kGpt2Pattern, "1\U00016d70x"), (Pieces{"1\U00016d70", "x"}));
    EXPECT_EQ(pieces(kO200kPattern, "a\u1c89\u1c8a"), (Pieces{"a", "\u1c89\u1c8a"})) << "a capital starts a new word";
}

TEST(Splitter, PiecesAreTheTextByteForByte) {
    std::mt19937 random(4);
    const Pieces parts = {"a", "Z", " ", "\n", "\r", "\t", "'s", "7", "!", "\u00e9", "\u4e2d", "\U0001F600", "\u0301", "\u00a0",
                          "\xFF", "\xC3", "\xE2\x82", "\x80", "\xED\xA0\x80", std::string(1, '\0'), "<|endoftext|>"};
    for (const std::string_view pattern : {kGpt2Pattern, kCl100kPattern, kO200kPattern, std::string_view(), std::string_view("b+")}) {
        for (int round = 0; round < 3000; ++round) {
            std::string text;
            for (size_t i = random() % 20; i > 0; --i) text += parts[random() % parts.size()];
            std::string together;
            for (const std::string& piece : pieces(pattern, text)) {
                ASSERT_FALSE(piece.empty());
                together += piece;
            }
            ASSERT_EQ(together, text);
        }
    }
}

TEST(Splitter, LongRunsTakeLinearTime) {
    for (const std::string_view pattern : {kGpt2Pattern, kCl100kPattern, kO200kPattern}) {
        for (const char* part : {" ", "\n", "a", "1", "!", " \n", "\u00e9", "\t "}) {
            std::string text;
            while (text.size() < (size_t{1} << 20)) text += part;
            size_t length = 0;
            for (const std::string& piece : pieces(pattern, text + "x")) length += piece.size();
            EXPECT_EQ(length, text.size() + 1);
        }
    }
}

TEST(Splitter, RefusesPatternsThatDoNotCompile) {
    EXPECT_THROW_WITH(Splitter("(a"), std::invalid_argument, "does not compile");
    EXPECT_THROW_WITH(Splitter("\\C"), std::invalid_argument, "does not compile");
    EXPECT_THROW_WITH(Splitter("\xFF"), std::invalid_argument, "not valid UTF-8");
}

/// BPE as defined: look for the lowest rank over and over.
std::vector<TokenId> naive_encode(const Vocabulary& vocabulary, std::string_view piece) {
    std::map<std::pair<TokenId, TokenId>, Merge> merges;
    for (const Merge& m : vocabulary.merges) merges[{m.left, m.right}] = m;
    std::vector<TokenId> ids;
    for (const char byte : piece) {
        const auto token = std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), std::string(1, byte));
        ids.push_back(static_cast<TokenId>(token - vocabulary.tokens.begin()));
    }
    while (true) {
        size_t best = ids.size();
        int32_t best_rank = INT32_MAX;
        for (size_t i = 0; i + 1 < ids.size(); ++i) {
            const auto m = merges.find({ids[i], ids[i + 1]});
            if (m != merges.end() && m->second.rank < best_rank) best = i, best_rank = m->second.rank;
        }
        if (best == ids.size()) return ids;
        ids[best] = merges.at({ids[best], ids[best + 1]}).result;
        ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
}

std::string random_text(std::mt19937& random, size_t length) {
    // A tiny alphabet makes many overlapping merges.
    std::string text;
    for (size_t i = 0; i < length; ++i) text += "aab bc\n"[random() % 7];
    return text;
}

Vocabulary small_vocabulary(std::string pattern = std::string(kGpt2Pattern)) {
    std::mt19937 random(5);
    BpeTrainer trainer({.vocab_size = 400, .min_frequency = 2, .pattern = std::move(pattern)});
    for (int i = 0; i < 50; ++i) trainer.add(random_text(random, 500));
    return trainer.train();
}

TEST(PieceMerger, ShortAndLongPiecesFollowTheDefinition) {
    const Vocabulary vocabulary = small_vocabulary("");
    ASSERT_GT(vocabulary.merges.size(), 100u);
    const MergeTable table(vocabulary);
    PieceMerger merger(table);
    std::mt19937 random(6);
    for (int round = 0; round < 400; ++round) {
        const std::string piece = random_text(random, 1 + random() % (round % 4 == 0 ? 300 : 60));
        std::vector<TokenId> ids;
        merger.encode(piece, ids);
        ASSERT_EQ(ids, naive_encode(vocabulary, piece)) << piece;
    }
}

TEST(PieceMerger, AMegabyteInOnePieceIsFast) {
    const Vocabulary vocabulary = small_vocabulary("");
    const Tokenizer tokenizer(vocabulary);
    const std::string text(size_t{1} << 20, 'a');
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
}

TEST(Tokenizer, BytesAreTheirValues) {
    const Tokenizer tokenizer = Tokenizer::bytes();
    EXPECT_EQ(tokenizer.vocab_size(), 257);
    EXPECT_EQ(tokenizer.end_of_text(), 256);
    EXPECT_EQ(tokenizer.encode("A\xFF"), (std::vector<TokenId>{65, 255}));
    EXPECT_EQ(tokenizer.encode_with_special("A<|endoftext|>B"), (std::vector<TokenId>{65, 256, 66}));
    EXPECT_EQ(tokenizer.encode("<|endoftext|>").size(), 13u);
    EXPECT_EQ(tokenizer.decode(std::vector<TokenId>{65, 256}), "A<|endoftext|>");
    EXPECT_THROW(tokenizer.decode(std::vector<TokenId>{257}), std::out_of_range);
    EXPECT_THROW(tokenizer.decode(std::vector<TokenId>{-1}), std::out_of_range);
}

TEST(Tokenizer, AnyBytesComeBack) {
    std::mt19937 random(7);
    for (const std::string_view pattern : {kGpt2Pattern, kCl100kPattern, std::string_view()}) {
        const Tokenizer tokenizer(small_vocabulary(std::string(pattern)));
        for (int round = 0; round < 500; ++round) {
            std::string text;
            for (size_t i = random() % 200; i > 0; --i) {
                text += static_cast<char>(random() % 3 == 0 ? random() : 'a' + random() % 3);
            }
            ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
            ASSERT_EQ(tokenizer.decode(tokenizer.encode_with_special(text)), text);
        }
    }
}

TEST(Tokenizer, ACachedPieceEncodesAsAtFirst) {
    const Tokenizer tokenizer(small_vocabulary());
    Encoder encoder(tokenizer);
    std::mt19937 random(8);
    for (int round = 0; round < 200; ++round) {
        const std::string text = random_text(random, 100);
        std::vector<TokenId> warm;
        encoder.encode(text, warm);
        ASSERT_EQ(warm, tokenizer.encode(text));
    }
}

TEST(Tokenizer, OverlappingSpecialTokensTakeTheLeftmostThenTheLongest) {
    Vocabulary vocabulary = byte_vocabulary();
    vocabulary.tokens.resize(260);
    vocabulary.specials = {{"<a>", 257}, {"<a>b", 258}, {"b<", 259}};
    const Tokenizer tokenizer(vocabulary);
    EXPECT_EQ(tokenizer.encode_with_special("x<a>b<a>"), (std::vector<TokenId>{'x', 258, 257}));
    EXPECT_EQ(tokenizer.encode_with_special("b<a>"), (std::vector<TokenId>{259, 'a', '>'}));
    EXPECT_EQ(tokenizer.encode_with_special("<<a"), (std::vector<TokenId>{'<', '<', 'a'}));
    EXPECT_EQ(tokenizer.end_of_text(), -1);
}

TEST(Tokenizer, WholePiecesComeFirstWhereTheVocabularySaysSo) {
    Vocabulary vocabulary = byte_vocabulary();
    vocabulary.tokens[256] = "abc";  // no merge makes it
    vocabulary.specials.clear();
    vocabulary.pattern = kGpt2Pattern;
    EXPECT_EQ(Tokenizer(vocabulary).encode("abc abc"), (std::vector<TokenId>{'a', 'b', 'c', ' ', 'a', 'b', 'c'}));
    vocabulary.whole_piece_first = true;
    EXPECT_EQ(Tokenizer(vocabulary).encode("abc abc"), (std::vector<TokenId>{256, ' ', 'a', 'b', 'c'}));
}

TEST(Tokenizer, FingerprintTellsVocabulariesApart) {
    const Vocabulary base = small_vocabulary();
    Vocabulary other = base;
    EXPECT_EQ(base.fingerprint(), other.fingerprint());
    std::swap(other.merges[3].rank, other.merges[4].rank);
    EXPECT_NE(base.fingerprint(), other.fingerprint());
    other = base;
    other.pattern = kCl100kPattern;
    EXPECT_NE(base.fingerprint(), other.fingerprint());
    other = base;
    other.whole_piece_first = true;
    EXPECT_NE(base.fingerprint(), other.fingerprint());
}

TEST(Vocabulary, RefusesInconsistency) {
    const auto broken = [](auto change) {
        Vocabulary vocabulary = small_vocabulary();
        change(vocabulary);
        return vocabulary;
    };
    EXPECT_THROW_WITH(Tokenizer(broken([](Vocabulary& v) { v.tokens[0] = "zz"; })), std::invalid_argument, "has no token of its own");
    EXPECT_THROW_WITH(Tokenizer(broken([](Vocabulary& v) { v.merges[0].right = 100000; })), std::invalid_argument, "without a token");
    EXPECT_THROW_WITH(Tokenizer(broken([](Vocabulary& v) { v.merges[0].left = -1; })), std::invalid_argument, "without a token");
    EXPECT_THROW_WITH(Tokenizer(broken([](Vocabulary& v) { v.merges[0].result = v.merges[5].result; })), std::invalid_argument, "does not spell");
    EXPECT_THROW_WITH(Tokenizer(broken([](Vocabulary& v) { v.specials[0].id = 3; })), std::invalid_argument, "shares id 3");
    EXPECT_THROW_WITH(Tokenizer(broken([](Vocabulary& v) { v.specials[0].id = 100000; })), std::invalid_argument, "the vocabulary ends at");
    EXPECT_THROW_WITH(Tokenizer(broken([](Vocabulary& v) { v.specials[0].text.clear(); })), std::invalid_argument, "is empty");
}

/// The trainer's definition, counted anew for every merge.
std::vector<Merge> naive_train(const std::vector<std::string>& documents, std::string_view pattern, size_t num_merges) {
    std::vector<std::vector<TokenId>> words;
    std::vector<std::string> tokens;
    std::map<uint8_t, TokenId> byte_ids;
    for (const uint8_t byte : printable_byte_order()) {
        byte_ids[byte] = static_cast<TokenId>(tokens.size());
        tokens.emplace_back(1, static_cast<char>(byte));
    }
    for (const std::string& document : documents) {
        for (const std::string& piece : pieces(pattern, document)) {
            words.emplace_back();
            for (const char byte : piece) words.back().push_back(byte_ids[static_cast<uint8_t>(byte)]);
        }
    }
    std::vector<Merge> merges;
    while (merges.size() < num_merges) {
        std::map<std::pair<TokenId, TokenId>, int> counts;
        for (const auto& word : words) {
            for (size_t i = 0; i + 1 < word.size(); ++i) ++counts[{word[i], word[i + 1]}];
        }
        std::pair<TokenId, TokenId> best;
        int best_count = 1;
        for (const auto& [pair, count] : counts) {
            if (count > best_count) best = pair, best_count = count;
        }
        if (best_count < 2) break;
        const std::string bytes = tokens[static_cast<size_t>(best.first)] + tokens[static_cast<size_t>(best.second)];
        const auto existing = std::find(tokens.begin(), tokens.end(), bytes);
        const auto result = static_cast<TokenId>(existing - tokens.begin());
        if (existing == tokens.end()) tokens.push_back(bytes);
        merges.push_back({best.first, best.second, result, static_cast<int32_t>(merges.size())});
        for (auto& word : words) {
            std::vector<TokenId> merged;
            for (size_t i = 0; i < word.size(); ++i) {
                const bool hit = i + 1 < word.size() && word[i] == best.first && word[i + 1] == best.second;
                merged.push_back(hit ? result : word[i]);
                i += hit;
            }
            word = std::move(merged);
        }
    }
    return merges;
}

TEST(BpeTrainer, FollowsTheDefinition) {
    std::mt19937 random(9);
    for (const std::string_view pattern : {kGpt2Pattern, std::string_view()}) {
        std::vector<std::string> documents;
        BpeTrainer trainer({.vocab_size = 257 + 60, .min_frequency = 2, .pattern = std::string(pattern)});
        for (int i = 0; i < 10; ++i) {
            documents.push_back(random_text(random, 120));
            trainer.add(documents.back());
        }
        Vocabulary vocabulary = trainer.train();
        std::vector<Merge> expected = naive_train(documents, pattern, vocabulary.merges.size());
        EXPECT_EQ(vocabulary.merges, expected);
        EXPECT_GE(vocabulary.merges.size(), 40u);
    }
}

TEST(BpeTrainer, OrderOfDocumentsDoesNotMatter) {
    std::mt19937 random(10);
    std::vector<std::string> documents;
    for (int i = 0; i < 20; ++i) documents.push_back(random_text(random, 200));
    const auto train = [&] {
        BpeTrainer trainer({.vocab_size = 350});
        for (const std::string& document : documents) trainer.add(document);
        return trainer.train().fingerprint();
    };
    const uint64_t first = train();
    std::reverse(documents.begin(), documents.end());
    EXPECT_EQ(train(), first);
}

TEST(BpeTrainer, StopsWhereTheTextHasNothingToMerge) {
    BpeTrainer trainer({.vocab_size = 1000});
    trainer.add("abcdef");
    const Vocabulary vocabulary = trainer.train();
    EXPECT_TRUE(vocabulary.merges.empty());
    EXPECT_EQ(vocabulary.tokens.size(), 257u);
    EXPECT_THROW_WITH(BpeTrainer({.vocab_size = 256}), std::invalid_argument, "between 257");
}

}  // namespace
}  // namespace strobe::gpt
