#include "gpt/tokenizer/bpe_trainer.hpp"

#include <algorithm>
#include <queue>
#include <stdexcept>

#include <fmt/core.h>

#include "gpt/tokenizer/byte_alphabet.hpp"

namespace strobe::gpt {
namespace {

using Pair = uint64_t;  // left << 32 | right; ordered as (left, right)

Pair make_pair_key(TokenId left, TokenId right) {
    return Pair{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

struct Candidate {
    int64_t count;
    Pair pair;

    /// For a max-heap: the more frequent pair on top, then the smaller one.
    bool operator<(const Candidate& other) const { return count != other.count ? count < other.count : pair > other.pair; }
};

/// The distinct pieces as token sequences, and for every pair of neighbours how often it occurs and where.
class PairIndex {
public:
    struct Word {
        std::vector<TokenId> ids;
        int64_t count;
    };

    explicit PairIndex(std::vector<Word> words) : words_(std::move(words)) {
        for (size_t w = 0; w < words_.size(); ++w) {
            for (size_t i = 0; i + 1 < words_[w].ids.size(); ++i) {
                add_occurrence(make_pair_key(words_[w].ids[i], words_[w].ids[i + 1]), static_cast<uint32_t>(w), words_[w].count);
            }
        }
        for (const auto& [pair, entry] : pairs_) queue_.push({entry.count, pair});
    }

    /// The most frequent pair, if any occurs at least `min_count` times.
    bool pop(int64_t min_count, Pair& pair) {
        while (!queue_.empty()) {
            const Candidate top = queue_.top();
            queue_.pop();
            const auto entry = pairs_.find(top.pair);
            const int64_t count = entry == pairs_.end() ? 0 : entry->second.count;
            if (count == top.count && count >= min_count) {
                pair = top.pair;
                return true;
            }
            // Counts fall without the queue hearing of it; a rise always queues the pair anew.
            if (count < top.count && count >= min_count) queue_.push({count, top.pair});
        }
        return false;
    }

    void merge(Pair pair, TokenId result) {
        const auto left = static_cast<TokenId>(pair >> 32);
        const auto right = static_cast<TokenId>(pair & 0xFFFFFFFFu);
        std::vector<uint32_t> places = std::move(pairs_.at(pair).words);
        std::sort(places.begin(), places.end());
        places.erase(std::unique(places.begin(), places.end()), places.end());
        risen_.clear();
        for (const uint32_t w : places) merge_in_word(w, left, right, result);
        pairs_.erase(pair);
        for (const Pair changed : risen_) {
            if (const auto entry = pairs_.find(changed); entry != pairs_.end()) {
                queue_.push({entry->second.count, changed});
            }
        }
    }

private:
    struct Entry {
        int64_t count = 0;
        std::vector<uint32_t> words;  // where it occurs, or once occurred
    };

    void add_occurrence(Pair pair, uint32_t word, int64_t count) {
        Entry& entry = pairs_[pair];
        entry.count += count;
        if (entry.words.empty() || entry.words.back() != word) entry.words.push_back(word);
    }

    void remove_occurrence(Pair pair, int64_t count) {
        if (const auto entry = pairs_.find(pair); entry != pairs_.end()) entry->second.count -= count;
    }

    void merge_in_word(uint32_t w, TokenId left, TokenId right, TokenId result) {
        Word& word = words_[w];
        std::vector<TokenId>& ids = word.ids;
        // Recounting a whole word costs as much as patching around each merge and cannot go wrong on overlaps ("aaa").
        bool found = false;
        for (size_t i = 0; i + 1 < ids.size() && !found; ++i) found = ids[i] == left && ids[i + 1] == right;
        if (!found) return;
        for (size_t i = 0; i + 1 < ids.size(); ++i) remove_occurrence(make_pair_key(ids[i], ids[i + 1]), word.count);
        size_t kept = 0;
        for (size_t i = 0; i < ids.size(); ++i) {
            const bool merges = i + 1 < ids.size() && ids[i] == left && ids[i + 1] == right;
            ids[kept++] = merges ? result : ids[i];
            if (merges) ++i;
        }
        ids.resize(kept);
        for (size_t i = 0; i + 1 < ids.size(); ++i) {
            const Pair pair = make_pair_key(ids[i], ids[i + 1]);
            add_occurrence(pair, w, word.count);
            if (ids[i] == result || ids[i + 1] == result) risen_.push_back(pair);
        }
    }

    std::vector<Word> words_;
    std::unordered_map<Pair, Entry> pairs_;
    std::priority_queue<Candidate> queue_;
    std::vector<Pair> risen_;
};

}  // namespace

BpeTrainer::BpeTrainer(BpeTrainerOptions options) : options_(std::move(options)), splitter_(options_.pattern) {
    if (options_.vocab_size < 257 || options_.vocab_size > static_cast<int64_t>(kMaxVocabSize)) {
        throw std::invalid_argument(fmt::format("BPE vocab_size is {}, must be between 257 and {}", options_.vocab_size, kMaxVocabSize));
    }
    if (options_.min_frequency < 1) throw std::invalid_argument("BPE min_frequency must be at least 1");
}

void BpeTrainer::add(std::string_view document) {
    PieceCursor cursor(splitter_);
    cursor.start(document);
    for (std::string_view piece = cursor.next(); !piece.empty(); piece = cursor.next()) {
        if (piece.size() < 2) continue;
        const auto found = counts_.find(piece);
        if (found != counts_.end()) {
            ++found->second;
        } else {
            counts_.emplace(piece, 1);
        }
    }
}

Vocabulary BpeTrainer::train() const {
    Vocabulary vocabulary;
    vocabulary.pattern = options_.pattern;
    std::array<TokenId, 256> byte_ids{};
    std::unordered_map<std::string, TokenId> ids;
    for (const uint8_t byte : printable_byte_order()) {
        byte_ids[byte] = static_cast<TokenId>(vocabulary.tokens.size());
        vocabulary.tokens.emplace_back(1, static_cast<char>(byte));
        ids.emplace(vocabulary.tokens.back(), byte_ids[byte]);
    }

    std::vector<PairIndex::Word> words;
    words.reserve(counts_.size());
    for (const auto& [piece, count] : counts_) {
        PairIndex::Word word{{}, count};
        for (const char byte : piece) word.ids.push_back(byte_ids[static_cast<uint8_t>(byte)]);
        words.push_back(std::move(word));
    }

    PairIndex index(std::move(words));
    Pair pair = 0;
    while (static_cast<int64_t>(vocabulary.tokens.size()) + 1 < options_.vocab_size && index.pop(options_.min_frequency, pair)) {
        const auto left = static_cast<TokenId>(pair >> 32);
        const auto right = static_cast<TokenId>(pair & 0xFFFFFFFFu);
        std::string bytes = vocabulary.tokens[static_cast<size_t>(left)] + vocabulary.tokens[static_cast<size_t>(right)];
        if (bytes.size() > kMaxTokenBytes) continue;
        // Two pairs may spell the same token; it keeps its first id.
        const auto [entry, is_new] = ids.emplace(std::move(bytes), static_cast<TokenId>(vocabulary.tokens.size()));
        if (is_new) vocabulary.tokens.push_back(entry->first);
        vocabulary.merges.push_back({left, right, entry->second, static_cast<int32_t>(vocabulary.merges.size())});
        index.merge(pair, entry->second);
    }
    vocabulary.specials.push_back({std::string(kEndOfText), static_cast<TokenId>(vocabulary.tokens.size())});
    vocabulary.tokens.emplace_back();
    vocabulary.validate();
    return vocabulary;
}

}  // namespace strobe::gpt
