// Batches out of token shards: for training a shuffled stream whose place is three numbers, for evaluation everything once
// in order.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gpt/batch.hpp"
#include "gpt/data/token_shard.hpp"

namespace strobe::gpt {

/// Shards behind one another. Windows never cross from one into the next.
class TokenStream {
public:
    TokenStream() = default;
    explicit TokenStream(std::vector<TokenShard> shards);

    const std::vector<TokenShard>& shards() const { return *shards_; }
    uint64_t num_tokens() const { return num_tokens_; }
    uint64_t num_documents() const { return num_documents_; }
    /// Length of the text behind the tokens; 0 if a shard does not tell.
    uint64_t num_text_bytes() const { return num_text_bytes_; }
    uint64_t vocab_size() const { return vocab_size_; }

private:
    std::shared_ptr<const std::vector<TokenShard>> shards_ = std::make_shared<std::vector<TokenShard>>();
    uint64_t num_tokens_ = 0, num_documents_ = 0, num_text_bytes_ = 0, vocab_size_ = 0;
};

/// How rows are cut and what they may see.
struct RowOptions {
    int64_t seqlen = 256;
    /// A document border inside a row starts a new sequence: nothing attends across it. Otherwise one row is one sequence.
    bool split_documents = true;
};

/// The place of a sampler: row `next_row` of the order of `epoch` comes next.
struct SamplerPosition {
    uint64_t epoch = 0;
    uint64_t next_row = 0;

    bool operator==(const SamplerPosition&) const = default;
};

struct SamplerOptions {
    RowOptions row;
    int64_t batch_size = 8;  // rows per batch and rank
    uint64_t seed = 0;
    int64_t rank = 0, num_ranks = 1;
};

/// Every epoch cuts the shards anew, at an offset drawn from (seed, epoch), and visits each row once in an order drawn from the
/// same. A pure function of (shards, options, position): any position can be taken up again.
class Sampler {
public:
    /// Throws std::invalid_argument where the stream is shorter than one row and its last target.
    Sampler(TokenStream stream, const SamplerOptions& options);

    /// Replaces `batch` by the next rows of this rank; all ranks move on together.
    void next(Batch& batch);

    const SamplerPosition& position() const { return position_; }
    void seek(const SamplerPosition& position);
    uint64_t rows_per_epoch() const { return rows_; }

private:
    void start_epoch();
    uint64_t shuffled(uint64_t row) const;

    TokenStream stream_;
    SamplerOptions options_;
    SamplerPosition position_;
    std::vector<uint64_t> first_row_;  // of each shard, and the total
    std::vector<uint64_t> offset_;     // of each shard's first row in this epoch
    uint64_t rows_ = 0;
    int half_bits_ = 1;
    uint64_t order_key_ = 0;
};

/// Every target once: the last row of a shard may be shorter.
class SequentialBatches {
public:
    /// `max_rows` > 0 takes that many rows, spread evenly.
    SequentialBatches(TokenStream stream, const RowOptions& row, int64_t batch_size, uint64_t max_rows = 0);

    /// False, and an empty batch, at the end.
    bool next(Batch& batch);
    void rewind() { next_row_ = 0; }
    uint64_t num_rows() const { return taken_rows_; }

private:
    TokenStream stream_;
    RowOptions row_;
    int64_t batch_size_;
    std::vector<uint64_t> first_row_;
    uint64_t rows_ = 0, taken_rows_ = 0, next_row_ = 0;
};

}  // namespace strobe::gpt
