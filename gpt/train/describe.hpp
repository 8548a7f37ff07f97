// What a training run would need, without touching the data.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "gpt/train/train_options.hpp"

namespace strobe::gpt {

/// Sizes, memory, FLOPs; for a run on a GPU also whether it has room there, and what would have.
nlohmann::ordered_json describe(const TrainOptions& options);

}  // namespace strobe::gpt
