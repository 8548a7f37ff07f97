// A training run from data to final checkpoint.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>

#include "gpt/checkpoint/checkpoint.hpp"
#include "gpt/data/dataset.hpp"
#include "gpt/model.hpp"
#include "gpt/train/optimizer.hpp"
#include "gpt/train/progress.hpp"
#include "gpt/train/run_log.hpp"
#include "gpt/train/train_options.hpp"

namespace strobe::gpt {

struct TrainResult {
    bool interrupted = false;
    int64_t steps = 0;                     // done, those before a resume included
    int64_t parameters = 0;
    std::optional<double> held_out_loss;   // nats per token, over the whole held-out part
    std::optional<double> held_out_loss_per_byte;
    double seconds = 0.0;                  // of this process, in steps
    double tokens_per_second = 0.0;
    double flops_per_second = 0.0;
    double peak_flops_per_second = 0.0;
    std::filesystem::path checkpoint, log, plot;
    nlohmann::ordered_json operators;      // where the time went
};

/// Runs until the last step or a signal. Throws FileError, std::invalid_argument, and std::runtime_error when the loss is
/// no number any more.
TrainResult train(const TrainOptions& options);

}  // namespace strobe::gpt
