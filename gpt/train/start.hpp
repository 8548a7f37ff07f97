// Where a training run starts: from a checkpoint of its own, from somebody's weights, or from nothing; and its text.
#pragma once

#include <optional>

#include "gpt/checkpoint/checkpoint.hpp"
#include "gpt/data/dataset.hpp"
#include "gpt/distributed/process_group.hpp"
#include "gpt/tokenizer/tokenizer.hpp"
#include "gpt/train/progress.hpp"
#include "gpt/train/train_options.hpp"

namespace strobe::gpt {

struct Start {
    TrainOptions options;                  // complete and valid; those of the checkpoint where a run is resumed
    std::optional<TrainingState> state;    // of the run that is resumed
    std::optional<Checkpoint> checkpoint;  // whose weights the run starts with
    Tokenizer tokenizer;
};

/// Throws std::invalid_argument where the options do not fit each other, the run in the folder or the checkpoint.
Start find_start(const TrainOptions& asked, Progress& progress);

/// Throws std::invalid_argument unless all processes were started with the same options and see the same checkpoint.
void check_agreement(const Start& start, ProcessGroup& group);

/// The text as tokens; the same one as before a resume, and for all processes. group: null for a single process.
Dataset load_data(const Start& start, Progress& progress, ProcessGroup* group);

}  // namespace strobe::gpt
