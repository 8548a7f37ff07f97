// What a training run is: everything that its result depends on, and a few things that it does not. The first part goes
// into every checkpoint, so that a run can be resumed by naming its folder.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "gpt/activations.hpp"
#include "gpt/config.hpp"
#include "gpt/device.hpp"
#include "gpt/distributed/launch.hpp"
#include "gpt/train/optimizer.hpp"

namespace strobe::gpt {

struct TrainOptions {
    // The result depends on these (and on the number of threads, through the order of sums).
    std::string data;                 // text file or folder, token shards
    std::string tokenizer = "bytes";  // "bytes" or a vocabulary's path
    double held_out = 0.1;            // share of the text
    bool split_documents = true;      // a document attends to itself only
    ModelConfig model;                // vocab_size is the tokenizer's
    std::string init;                 // checkpoint to start from; its config replaces `model`
    int64_t seqlen = 0;               // tokens of a row; 0: the model's context
    int64_t batch_size = 16;          // rows in one pass, at most
    int64_t accumulate = 1;           // a step has batch_size * accumulate rows, which the processes share
    int64_t steps = 1000;
    uint64_t seed = 1;
    OptimizerOptions optimizer;

    // On these it depends by rounding alone: a checkpoint is fp32 and goes on anywhere.
    Device device = Device::cpu;
    Precision precision = Precision::fp32;  // what the device computes in; the cpu: fp32
    Precision moments = Precision::fp32;    // what AdamW's moments lie in; bf16 is rounded stochastically
    Precision gradients = Precision::fp32;  // what those of matrices lie in; bf16: of a step of one pass
    Precision masters = Precision::fp32;    // what weights of matrices lie in; bf16: what products read, rounded stochastically
    bool deterministic = true;              // cuda: attention's backward repeats bit for bit, at some cost
    bool graph = true;                      // cuda: steps are recorded and replayed whole
    Launch launch;                          // among how many processes, and as which one

    // On these it does not depend.
    std::filesystem::path out = "out/gpt";
    bool resume = false;
    bool overwrite = false;
    Recompute recompute = Recompute::none;
    int threads = 0;
    int64_t eval_every = 100;         // steps; 0: only at the end
    int64_t eval_rows = 64;           // of the evaluations on the way; the last one takes the whole held-out part
    int64_t save_every = 200;         // steps; 0: only at the end
    bool quiet = false;

    int64_t row_length() const { return seqlen > 0 ? seqlen : model.context_length; }
    int64_t tokens_per_step() const { return batch_size * accumulate * row_length(); }
    /// Throws std::invalid_argument that names the option.
    void validate() const;
};

/// The part that the result depends on.
nlohmann::ordered_json to_json(const TrainOptions& options);
/// Replaces that part. Throws std::invalid_argument when the JSON is not what to_json writes.
void from_json(const nlohmann::json& json, TrainOptions& options);

/// Throws std::invalid_argument if `asked` differs from the defaults in something and from `stored` too: the user wants
/// what a resumed run cannot give.
void check_resumable(const TrainOptions& asked, const TrainOptions& stored);

}  // namespace strobe::gpt
