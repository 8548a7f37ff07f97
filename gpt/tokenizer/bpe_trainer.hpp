// Learns a byte-level BPE vocabulary from one's own text (Sennrich et al. 2016): again and again the most frequent pair of
// neighbours becomes a token. Deterministic: of equally frequent pairs the one with the smaller ids goes first.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "gpt/tokenizer/splitter.hpp"
#include "gpt/tokenizer/vocabulary.hpp"

namespace strobe::gpt {

struct BpeTrainerOptions {
    int64_t vocab_size = 4096;          // with the 256 bytes and <|endoftext|>; at least 257
    int64_t min_frequency = 2;          // pairs seen less often are not merged
    std::string pattern{kGpt2Pattern};  // merges never cross the pieces it makes
};

class BpeTrainer {
public:
    explicit BpeTrainer(BpeTrainerOptions options);

    /// Counts the pieces of one document; order does not matter, except that ties in time cost nothing.
    void add(std::string_view document);

    /// Ids: the bytes in GPT-2's order, the merges in the order learned, then <|endoftext|>. May end up smaller than asked
    /// where the text has too few pairs.
    Vocabulary train() const;

private:
    struct PieceHash {
        using is_transparent = void;
        size_t operator()(std::string_view piece) const { return std::hash<std::string_view>()(piece); }
    };

    BpeTrainerOptions options_;
    Splitter splitter_;
    std::unordered_map<std::string, int64_t, PieceHash, std::equal_to<>> counts_;
};

}  // namespace strobe::gpt
