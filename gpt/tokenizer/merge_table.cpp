#include "gpt/tokenizer/merge_table.hpp"

#include <algorithm>
#include <bit>
#include <functional>
#include <stdexcept>

namespace strobe::gpt {
namespace {

// Below this length rescanning all parts per merge beats a heap: it stays in the first-level cache.
constexpr size_t kShortPiece = 48;
// Node indices of a piece are 32-bit.
constexpr size_t kMaxPieceBytes = size_t{1} << 30;
constexpr uint64_t kEmptyKey = ~uint64_t{0};

uint64_t pair_key(TokenId left, TokenId right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

MergeTable::MergeTable(const Vocabulary& vocabulary) {
    for (size_t id = vocabulary.tokens.size(); id-- > 0;) {
        const std::string& token = vocabulary.tokens[id];
        if (token.size() == 1) byte_tokens_[static_cast<uint8_t>(token[0])] = static_cast<TokenId>(id);
    }
    const size_t capacity = std::bit_ceil(std::max<size_t>(16, vocabulary.merges.size() * 2));
    shift_ = 64 - std::countr_zero(capacity);
    slots_.assign(capacity, Slot{kEmptyKey, {}});
    for (const Merge& m : vocabulary.merges) {
        const uint64_t key = pair_key(m.left, m.right);
        size_t slot = home(key);
        while (slots_[slot].key != kEmptyKey && slots_[slot].key != key) slot = (slot + 1) & (capacity - 1);
        // Of a pair listed twice the last counts, as in the dictionaries of the Python implementations.
        slots_[slot] = {key, {m.rank, m.result}};
    }
}

MergeTable::Found MergeTable::find(TokenId left, TokenId right) const {
    const uint64_t key = pair_key(left, right);
    for (size_t slot = home(key);; slot = (slot + 1) & (slots_.size() - 1)) {
        if (slots_[slot].key == key) return slots_[slot].value;
        if (slots_[slot].key == kEmptyKey) return {};
    }
}

void PieceMerger::encode(std::string_view piece, std::vector<TokenId>& out, int32_t rank_limit) {
    if (piece.size() <= kShortPiece) {
        encode_short(piece, out, rank_limit);
    } else {
        encode_long(piece, out, rank_limit);
    }
}

void PieceMerger::encode_short(std::string_view piece, std::vector<TokenId>& out, int32_t rank_limit) {
    parts_.clear();
    for (const char byte : piece) parts_.push_back({table_->byte_token(static_cast<uint8_t>(byte)), {}});
    const auto refresh = [&](size_t i) {
        parts_[i].with_next = i + 1 < parts_.size() ? table_->find(parts_[i].id, parts_[i + 1].id) : MergeTable::Found{};
    };
    for (size_t i = 0; i < parts_.size(); ++i) refresh(i);
    while (parts_.size() > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < parts_.size(); ++i) {
            if (parts_[i].with_next.rank < parts_[best].with_next.rank) best = i;
        }
        if (parts_[best].with_next.rank >= rank_limit) break;
        parts_[best].id = parts_[best].with_next.result;
        parts_.erase(parts_.begin() + static_cast<std::ptrdiff_t>(best) + 1);
        refresh(best);
        if (best > 0) refresh(best - 1);
    }
    for (const Part& part : parts_) out.push_back(part.id);
}

void PieceMerger::encode_long(std::string_view piece, std::vector<TokenId>& out, int32_t rank_limit) {
    if (piece.size() > kMaxPieceBytes) throw std::length_error("a piece of text without a split point exceeds 1 GiB");
    const auto count = static_cast<int32_t>(piece.size());
    nodes_.resize(piece.size());
    heap_.clear();
    for (int32_t i = 0; i < count; ++i) {
        nodes_[static_cast<size_t>(i)] = {table_->byte_token(static_cast<uint8_t>(piece[static_cast<size_t>(i)])), i - 1,
                                          i + 1 < count ? i + 1 : -1, MergeTable::kNoRank, -1};
    }
    const auto node = [&](int32_t i) -> Node& { return nodes_[static_cast<size_t>(i)]; };
    const auto find_merge = [&](int32_t i) {
        const MergeTable::Found found = node(i).next < 0 ? MergeTable::Found{} : table_->find(node(i).id, node(node(i).next).id);
        node(i).rank = found.rank;
        node(i).result = found.result;
        return found.rank < rank_limit;
    };
    const auto entry = [&](int32_t i) { return uint64_t{static_cast<uint32_t>(node(i).rank)} << 32 | static_cast<uint32_t>(i); };
    const auto push = [&](int32_t i) {
        if (!find_merge(i)) return;
        heap_.push_back(entry(i));
        std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
    };
    for (int32_t i = 0; i < count; ++i) {
        if (find_merge(i)) heap_.push_back(entry(i));
    }
    std::make_heap(heap_.begin(), heap_.end(), std::greater<>());

    while (!heap_.empty()) {
        std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
        const uint64_t top = heap_.back();
        heap_.pop_back();
        const auto left = static_cast<int32_t>(top & 0xFFFFFFFFu);
        // A node whose pair changed since carries another rank; a swallowed node carries none.
        if (node(left).rank != static_cast<int32_t>(top >> 32)) continue;
        const int32_t right = node(left).next;
        node(left).id = node(left).result;
        node(left).next = node(right).next;
        if (node(right).next >= 0) node(node(right).next).previous = left;
        node(right).rank = MergeTable::kNoRank;
        push(left);
        if (node(left).previous >= 0) push(node(left).previous);
    }
    for (int32_t i = count > 0 ? 0 : -1; i >= 0; i = node(i).next) out.push_back(node(i).id);
}

}  // namespace strobe::gpt
