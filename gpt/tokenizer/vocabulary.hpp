// What a byte-level BPE vocabulary is, however the file that brought it was written.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace strobe::gpt {

using TokenId = int32_t;

inline constexpr std::string_view kEndOfText = "<|endoftext|>";
inline constexpr size_t kMaxVocabSize = size_t{1} << 24;
inline constexpr size_t kMaxTokenBytes = 1024;

/// `left` followed by `right` becomes `result`. Among the merges that a piece offers, the lowest rank goes first, and of
/// equal ranks the leftmost.
struct Merge {
    TokenId left, right, result;
    int32_t rank;

    bool operator==(const Merge&) const = default;
};

struct SpecialToken {
    std::string text;
    TokenId id;

    bool operator==(const SpecialToken&) const = default;
};

struct Vocabulary {
    std::vector<std::string> tokens;    // bytes of token i; empty for special tokens and for ids without a token
    std::vector<Merge> merges;
    std::vector<SpecialToken> specials;
    std::string pattern;                // of the splitter; empty: no splitting
    /// A piece that is a token becomes that token without any merging (tiktoken; Hugging Face's ignore_merges).
    bool whole_piece_first = false;
    /// tiktoken's rule: any two neighbours that spell a token merge, at the rank of its id; `merges` follows from `tokens`.
    /// GPT-2's rule otherwise: ranks are positions in the list of merges.
    bool ranks_are_ids = false;

    /// Throws std::invalid_argument if ids, merges or byte coverage are inconsistent.
    void validate() const;
    /// Changes with anything that changes an encoding.
    uint64_t fingerprint() const;
};

/// One token per byte value, id = byte, and <|endoftext|> = 256.
Vocabulary byte_vocabulary();

}  // namespace strobe::gpt
