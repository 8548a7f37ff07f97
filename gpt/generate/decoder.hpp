// Inference with a key-value cache: a token costs one pass over the cached keys, not over the whole text again.
#pragma once

#include <span>
#include <vector>

#include "gpt/step_graphs.hpp"
#include "gpt/weights.hpp"

namespace strobe::gpt {

class Decoder {
public:
    /// Room for `capacity` tokens, at most the model's context.
    Decoder(const Weights& weights, Backend& backend, int64_t capacity);

    /// Reads tokens behind those already read and returns the logits (vocab) of the one that follows. The span is valid
    /// until the next call. Throws std::length_error when the cache cannot hold them.
    std::span<const float> feed(std::span<const int32_t> tokens);

    /// Forgets everything read.
    void clear() { length_ = 0; }

    int64_t length() const { return length_; }
    int64_t capacity() const { return capacity_; }

private:
    // Keys and values of one layer, row by position.
    struct Cache {
        Buffer k, v;  // (capacity, kv_size)
    };

    void feed_chunk(std::span<const int32_t> tokens);
    AttentionForward attention(const Cache& cache, int64_t rows, int64_t keys, const int32_t* cu_seqlens) const;

    const Weights& weights_;
    const ModelConfig& config_;
    Backend& backend_;
    Exec& exec_;
    int64_t capacity_;
    int64_t length_ = 0;
    Arena arena_;
    std::vector<Cache> caches_;
    Buffer x_, norm_, qkv_, attn_, branch_, up_, act_;
    float* logits_ = nullptr;       // (vocab)
    std::vector<float> answer_;     // the same in host memory
    Arena rope_table_;
    StepGraphs graphs_;             // of single tokens
    std::unique_ptr<InputStage> inputs_;  // tokens, positions, borders of queries and keys
};

}  // namespace strobe::gpt
