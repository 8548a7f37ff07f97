// BPE inside one piece: from bytes, apply the merge of the lowest rank (leftmost first) until none applies.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "gpt/tokenizer/vocabulary.hpp"

namespace strobe::gpt {

/// Merges keyed by their pair: open addressing, immutable after construction.
class MergeTable {
public:
    static constexpr int32_t kNoRank = INT32_MAX;

    struct Found {
        int32_t rank = kNoRank;
        TokenId result = -1;
    };

    explicit MergeTable(const Vocabulary& vocabulary);

    Found find(TokenId left, TokenId right) const;
    TokenId byte_token(uint8_t byte) const { return byte_tokens_[byte]; }

private:
    struct Slot {
        uint64_t key;
        Found value;
    };
    size_t home(uint64_t key) const { return (key * 0x9E3779B97F4A7C15ull) >> shift_; }

    std::array<TokenId, 256> byte_tokens_{};
    std::vector<Slot> slots_;
    int shift_ = 64;
};

/// Scratch memory of the merging; reused from piece to piece, one per thread.
class PieceMerger {
public:
    explicit PieceMerger(const MergeTable& table) : table_(&table) {}

    /// Appends the tokens of `piece` to `out`. Merges of rank >= `rank_limit` do not apply.
    void encode(std::string_view piece, std::vector<TokenId>& out, int32_t rank_limit = MergeTable::kNoRank);

private:
    void encode_short(std::string_view piece, std::vector<TokenId>& out, int32_t rank_limit);
    void encode_long(std::string_view piece, std::vector<TokenId>& out, int32_t rank_limit);

    struct Part {
        TokenId id;
        MergeTable::Found with_next;
    };
    struct Node {
        TokenId id;
        int32_t previous, next;  // -1 at the ends
        int32_t rank;            // of the merge with `next`, to tell a live heap entry from a stale one
        TokenId result;
    };

    const MergeTable* table_;
    std::vector<Part> parts_;
    std::vector<Node> nodes_;
    std::vector<uint64_t> heap_;  // rank << 32 | node, smallest first
};

}  // namespace strobe::gpt
