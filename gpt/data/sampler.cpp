#include "gpt/data/sampler.hpp"

#include <algorithm>
#include <bit>
#include <stdexcept>

#include <fmt/core.h>

#include "gpt/ops/cross_entropy.hpp"

namespace strobe::gpt {
namespace {

uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

/// Appends tokens [begin, begin + length) of a shard and the targets one further to the batch.
void append_row(const TokenShard& shard, uint64_t begin, uint64_t length, bool split_documents, Batch& batch) {
    const size_t at = batch.tokens.size();
    batch.tokens.resize(at + length);
    batch.targets.resize(at + length);
    shard.read(begin, std::span(batch.tokens).subspan(at));
    std::copy(batch.tokens.begin() + static_cast<std::ptrdiff_t>(at) + 1, batch.tokens.end(),
              batch.targets.begin() + static_cast<std::ptrdiff_t>(at));
    shard.read(begin + length, std::span(batch.targets).last(1));

    if (split_documents) {
        const size_t first = batch.cu_seqlens.size();
        shard.document_starts(begin + 1, begin + length + 1, batch.cu_seqlens);
        const TokenId end_of_text = shard.info().end_of_text;
        for (size_t i = first; i < batch.cu_seqlens.size(); ++i) {
            // Relative to begin + 1, so this is also the index of the target that is the new document's first token.
            // Only an end-of-text token can be foreseen from the old document.
            int32_t& target = batch.targets[at + static_cast<size_t>(batch.cu_seqlens[i])];
            if (target != end_of_text) target = kIgnoreTarget;
            batch.cu_seqlens[i] += static_cast<int32_t>(at) + 1;
        }
        if (batch.cu_seqlens.size() > first && batch.cu_seqlens.back() == static_cast<int32_t>(batch.tokens.size())) {
            return;
        }
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.tokens.size()));
}

void clear(Batch& batch) {
    batch.tokens.clear();
    batch.targets.clear();
    batch.cu_seqlens.assign(1, 0);
}

void check(const RowOptions& row, int64_t batch_size) {
    if (row.seqlen < 1 || batch_size < 1 || row.seqlen > INT32_MAX / batch_size) {
        throw std::invalid_argument(fmt::format("sequence length {} times batch size {} must be between 1 and {}", row.seqlen,
                                                batch_size, INT32_MAX));
    }
}

/// The shard that holds `row`, by the table of first rows.
size_t shard_of(const std::vector<uint64_t>& first_row, uint64_t row) {
    return static_cast<size_t>(std::upper_bound(first_row.begin(), first_row.end(), row) - first_row.begin()) - 1;
}

}  // namespace

TokenStream::TokenStream(std::vector<TokenShard> shards) {
    bool text_is_known = true;
    for (const TokenShard& shard : shards) {
        num_tokens_ += shard.info().num_tokens;
        num_documents_ += shard.info().num_documents;
        num_text_bytes_ += shard.info().num_text_bytes;
        text_is_known = text_is_known && shard.info().num_text_bytes > 0;
        vocab_size_ = std::max(vocab_size_, shard.info().vocab_size);
    }
    if (!text_is_known) num_text_bytes_ = 0;
    shards_ = std::make_shared<const std::vector<TokenShard>>(std::move(shards));
}

Sampler::Sampler(TokenStream stream, const SamplerOptions& options) : stream_(std::move(stream)), options_(options) {
    check(options.row, options.batch_size);
    if (options.num_ranks < 1 || options.rank < 0 || options.rank >= options.num_ranks) {
        throw std::invalid_argument(fmt::format("rank {} of {}", options.rank, options.num_ranks));
    }
    const auto seqlen = static_cast<uint64_t>(options.row.seqlen);
    first_row_.push_back(0);
    for (const TokenShard& shard : stream_.shards()) {
        const uint64_t targets = shard.info().num_tokens > 0 ? shard.info().num_tokens - 1 : 0;
        // With two rows or more, one is given up for the freedom to start anywhere within a row's length.
        const uint64_t rows = targets / seqlen;
        rows_ += rows > 1 ? rows - 1 : rows;
        first_row_.push_back(rows_);
    }
    if (rows_ == 0) {
        throw std::invalid_argument(fmt::format("the training data has {} tokens; a sequence length of {} needs at least {}",
                                                stream_.num_tokens(), seqlen, seqlen + 1));
    }
    half_bits_ = std::max(1, (static_cast<int>(std::bit_width(rows_ - 1)) + 1) / 2);
    start_epoch();
}

void Sampler::start_epoch() {
    const auto seqlen = static_cast<uint64_t>(options_.row.seqlen);
    order_key_ = mix(mix(options_.seed) ^ position_.epoch);
    offset_.clear();
    for (size_t s = 0; s < stream_.shards().size(); ++s) {
        const uint64_t rows = first_row_[s + 1] - first_row_[s];
        const uint64_t tokens = stream_.shards()[s].info().num_tokens;
        const uint64_t slack = rows == 0 ? 0 : std::min(seqlen, tokens - 1 - rows * seqlen);
        offset_.push_back(mix(order_key_ ^ mix(s + 1)) % (slack + 1));
    }
}

/// A four-round Feistel network permutes the next power of four; walking the cycle until inside restricts it to the
/// rows.
uint64_t Sampler::shuffled(uint64_t row) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    do {
        uint64_t left = row >> half_bits_, right = row & mask;
        for (uint64_t round = 0; round < 4; ++round) {
            const uint64_t next = left ^ (mix(order_key_ + (round << 56) + right) & mask);
            left = right;
            right = next;
        }
        row = left << half_bits_ | right;
    } while (row >= rows_);
    return row;
}

void Sampler::seek(const SamplerPosition& position) {
    if (position.next_row > rows_) {
        throw std::invalid_argument(fmt::format("data position: row {} of an epoch of {}", position.next_row, rows_));
    }
    position_ = position;
    start_epoch();
}

void Sampler::next(Batch& batch) {
    clear(batch);
    const auto seqlen = static_cast<uint64_t>(options_.row.seqlen);
    for (int64_t i = 0; i < options_.batch_size * options_.num_ranks; ++i) {
        if (position_.next_row == rows_) {
            position_ = {position_.epoch + 1, 0};
            start_epoch();
        }
        const uint64_t row = shuffled(position_.next_row++);
        if (i / options_.batch_size != options_.rank) continue;
        const size_t s = shard_of(first_row_, row);
        append_row(stream_.shards()[s], offset_[s] + (row - first_row_[s]) * seqlen, seqlen, options_.row.split_documents, batch);
    }
}

SequentialBatches::SequentialBatches(TokenStream stream, const RowOptions& row, int64_t batch_size, uint64_t max_rows)
    : stream_(std::move(stream)), row_(row), batch_size_(batch_size) {
    check(row, batch_size);
    const auto seqlen = static_cast<uint64_t>(row.seqlen);
    first_row_.push_back(0);
    for (const TokenShard& shard : stream_.shards()) {
        const uint64_t targets = shard.info().num_tokens > 0 ? shard.info().num_tokens - 1 : 0;
        rows_ += (targets + seqlen - 1) / seqlen;
        first_row_.push_back(rows_);
    }
    taken_rows_ = max_rows == 0 ? rows_ : std::min(rows_, max_rows);
}

bool SequentialBatches::next(Batch& batch) {
    clear(batch);
    const auto seqlen = static_cast<uint64_t>(row_.seqlen);
    for (int64_t i = 0; i < batch_size_ && next_row_ < taken_rows_; ++i, ++next_row_) {
        const uint64_t row = taken_rows_ == rows_ ? next_row_ : next_row_ * rows_ / taken_rows_;
        const size_t s = shard_of(first_row_, row);
        const TokenShard& shard = stream_.shards()[s];
        const uint64_t begin = (row - first_row_[s]) * seqlen;
        append_row(shard, begin, std::min(seqlen, shard.info().num_tokens - 1 - begin), row_.split_documents, batch);
    }
    return !batch.tokens.empty();
}

}  // namespace strobe::gpt
