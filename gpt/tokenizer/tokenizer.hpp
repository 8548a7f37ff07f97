// Text to token ids and back, byte-exactly: decode(encode(text)) == text for every byte string.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "gpt/tokenizer/merge_table.hpp"
#include "gpt/tokenizer/splitter.hpp"
#include "gpt/tokenizer/vocabulary.hpp"

namespace strobe::gpt {

class Tokenizer {
public:
    /// Throws std::invalid_argument on an inconsistent vocabulary.
    explicit Tokenizer(Vocabulary vocabulary);

    /// One token per byte; needs no file.
    static Tokenizer bytes();

    /// "bytes", or a path:
    ///   a folder with tokenizer.tiktoken, tokenizer.json, or vocab.json + merges.txt (the first that is there),
    ///   a vocab.json (merges.txt beside it), a tokenizer.json, or a *.tiktoken file. The pattern of a lone .tiktoken file is
    ///   told by its name: gpt2, r50k, p50k; o200k; otherwise cl100k.
    /// Throws FileError.
    static Tokenizer load(const std::filesystem::path& source);

    /// Writes what `load` and Hugging Face's tokenizers read: tokenizer.json, tokenizer_config.json, and either vocab.json +
    /// merges.txt or tokenizer.tiktoken. `load` of the folder gives a tokenizer of the same fingerprint.
    void save(const std::filesystem::path& folder) const;

    /// Number of ids, special tokens included. Ids without a token count.
    int64_t vocab_size() const { return static_cast<int64_t>(vocabulary_.tokens.size()); }
    /// <|endoftext|>, which stands at the start of every document; -1 where the vocabulary has none.
    TokenId end_of_text() const { return end_of_text_; }
    std::optional<TokenId> special(std::string_view text) const;

    /// Special tokens in `text` are ordinary text.
    std::vector<TokenId> encode(std::string_view text) const;
    /// Special tokens in `text` become their ids: leftmost first, the longest of those that start together.
    std::vector<TokenId> encode_with_special(std::string_view text) const;

    /// Throws std::out_of_range on an id that has no token.
    std::string decode(std::span<const TokenId> ids) const;
    /// The bytes of one token; a special token's text.
    std::string_view token_bytes(TokenId id) const;

    uint64_t fingerprint() const { return fingerprint_; }
    const Vocabulary& vocabulary() const { return vocabulary_; }

private:
    friend class Encoder;

    Vocabulary vocabulary_;
    MergeTable merges_;
    Splitter splitter_;
    std::unordered_map<std::string_view, TokenId> whole_pieces_;  // if whole_piece_first; views into vocabulary_
    std::unordered_map<TokenId, std::string_view> special_texts_;
    std::vector<SpecialToken> specials_longest_first_;
    std::string special_first_bytes_;
    TokenId end_of_text_ = -1;
    uint64_t fingerprint_ = 0;
};

/// Encodes many texts on one thread: keeps scratch memory and the tokens of pieces already seen. The tokenizer must
/// outlive it and stay where it is.
class Encoder {
public:
    explicit Encoder(const Tokenizer& tokenizer);

    void encode(std::string_view text, std::vector<TokenId>& out);
    void encode_with_special(std::string_view text, std::vector<TokenId>& out);

private:
    void encode_piece(std::string_view piece, std::vector<TokenId>& out);

    struct PieceHash {
        using is_transparent = void;
        size_t operator()(std::string_view piece) const { return std::hash<std::string_view>()(piece); }
    };
    struct Range {
        uint32_t begin, count;
    };

    const Tokenizer* tokenizer_;
    PieceCursor cursor_;
    PieceMerger merger_;
    std::unordered_map<std::string, Range, PieceHash, std::equal_to<>> seen_;
    std::vector<TokenId> seen_tokens_;
};

}  // namespace strobe::gpt
