// The named parameters of a model, and arenas that hold one number per parameter: values, gradients and the
// optimizer's moments all share one layout, so the optimizer and the checkpoint writer walk them alike.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gpt/arena.hpp"
#include "gpt/config.hpp"

namespace strobe::gpt {

/// How a fresh parameter is filled.
enum class Init { normal, normal_residual, ones, zeros };  // residual: std divided by sqrt(2 * num_layers)

struct Parameter {
    std::string name;                       // as in a Hugging Face checkpoint of the architecture
    std::vector<int64_t> shape;             // in memory; a linear weight is (out, in)
    bool transposed_in_checkpoint = false;  // gpt2's Conv1D weights lie as (in, out) in checkpoints
    bool decay = false;                     // weight decay applies: matrices and embeddings, not norms and biases
    Init init = Init::normal;
    int64_t offset = 0;                     // in elements, into any arena of this layout
    int64_t size = 0;
};

/// The parameters of one transformer block as indices into the layout; -1 where the architecture has none.
struct BlockParameters {
    int norm1_weight = -1, norm1_bias = -1;
    int qkv_weight = -1;  // (qkv_size, hidden): one parameter (gpt2) or the first of q, k, v, which lie behind one another
    int qkv_bias = -1;
    int proj_weight = -1, proj_bias = -1;  // (hidden, q_size)
    int norm2_weight = -1, norm2_bias = -1;
    int up_weight = -1;                    // gpt2 (ffn, hidden); llama: gate, the first of gate and up, (2 ffn, hidden) in memory
    int up_bias = -1;
    int down_weight = -1, down_bias = -1;  // (hidden, ffn)
};

/// Norms and biases lie in front of everything, then the matrices in the order in which the model meets them: the backward
/// finishes their gradients from the end of the arena to its beginning.
class ParameterLayout {
public:
    /// The vectors' part and the matrices' part of an arena can each be cut into `shards` equal and aligned pieces.
    explicit ParameterLayout(const ModelConfig& config, int shards = 1);

    const std::vector<Parameter>& list() const { return parameters_; }
    const Parameter& operator[](int index) const { return parameters_[static_cast<size_t>(index)]; }
    /// Null when there is no such parameter.
    const Parameter* find(std::string_view name) const;

    const BlockParameters& block(int64_t layer) const { return blocks_[static_cast<size_t>(layer)]; }
    int embedding() const { return embedding_; }
    int positions() const { return positions_; }
    int final_norm_weight() const { return final_norm_weight_; }
    int final_norm_bias() const { return final_norm_bias_; }
    /// The embedding when tied.
    int head() const { return head_; }

    /// Trainable numbers.
    int64_t num_elements() const { return num_elements_; }
    /// Length of an arena in floats; padding between parameters is zero and stays zero.
    int64_t arena_elements() const { return arena_elements_; }
    /// Where the matrices begin: weight decay applies from here on.
    int64_t matrices_begin() const { return vector_elements_; }

private:
    int add(std::string name, std::vector<int64_t> shape, Init init, bool transposed = false, bool joined = false);

    std::vector<Parameter> parameters_;
    std::vector<BlockParameters> blocks_;
    int embedding_ = -1, positions_ = -1, final_norm_weight_ = -1, final_norm_bias_ = -1, head_ = -1;
    int64_t num_elements_ = 0;
    int64_t arena_elements_ = 0;
    int64_t vector_elements_ = 0;
};

/// One number for each parameter, zero at first: fp32, or, where half the memory is worth more than the digits, 16 bits for those of
/// matrices. Those of vectors are fp32 in any case. Without matrices there is no memory for these.
class ParameterArena {
public:
    ParameterArena() = default;
    explicit ParameterArena(const ParameterLayout& layout, Memory& memory = host_memory(), Precision precision = Precision::fp32,
                            bool matrices = true)
        : arena_(bytes_of(layout, precision, matrices), memory), memory_(&memory), size_(layout.arena_elements()),
          matrices_begin_(layout.matrices_begin()), precision_(precision), has_matrices_(matrices) {}

    static size_t bytes_of(const ParameterLayout& layout, Precision precision, bool matrices = true) {
        const int64_t vectors = layout.matrices_begin();
        const int64_t others = matrices ? layout.arena_elements() - vectors : 0;
        return static_cast<size_t>(vectors) * sizeof(float) + static_cast<size_t>(others) * size_of(precision);
    }

    /// From an element on: to the end of the vectors, or of the matrices. Null where those are left out.
    Buffer at(int64_t element) const {
        if (element >= matrices_begin_ && !has_matrices_) return {nullptr, precision_};
        const int64_t in_vectors = element < matrices_begin_ ? element : matrices_begin_;
        const size_t offset = static_cast<size_t>(in_vectors) * sizeof(float) + static_cast<size_t>(element - in_vectors) * size_of(precision_);
        return {arena_.at<void>(offset), element < matrices_begin_ ? Precision::fp32 : precision_};
    }
    /// Of the matrices.
    Precision precision() const { return precision_; }
    int64_t size() const { return size_; }
    int64_t matrices_begin() const { return matrices_begin_; }
    size_t size_bytes() const { return arena_.size_bytes(); }
    Memory& memory() const { return *memory_; }

    /// Of fp32 only.
    float* data() const { return arena_.at<float>(0); }
    /// Of fp32 in host memory only.
    std::span<float> all() const { return {data(), static_cast<size_t>(size_)}; }
    std::span<float> operator[](const Parameter& p) const {
        return {data() + p.offset, static_cast<size_t>(p.size)};
    }

    /// From an arena of the same layout; at least one of the two is in host memory, or both are on one device. Between the
    /// precisions: one of the two is fp32 in host memory; to bf16 numbers are rounded to the nearest.
    void copy_from(const ParameterArena& other) const;

private:
    Arena arena_;
    Memory* memory_ = &host_memory();
    int64_t size_ = 0, matrices_begin_ = 0;
    Precision precision_ = Precision::fp32;
    bool has_matrices_ = true;
};

/// Fills `values` by each parameter's Init; a pure function of layout, config and seed.
void initialize(const ParameterLayout& layout, const ModelConfig& config, uint64_t seed, const ParameterArena& values);

}  // namespace strobe::gpt
