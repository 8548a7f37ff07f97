// Checkpoints of a training run. One is a folder that Hugging Face's transformers load as it is:
//
//     config.json, model.safetensors, tokenizer.json ...   the model and its tokenizer
//     optimizer.safetensors                                AdamW's moments: exp_avg.NAME and exp_avg_sq.NAME
//     training_state.json                                  step, data position, RNG; size and XXH64 of every other file
//
// A run's folder holds them as step-00000100 and so on. A checkpoint is written under a hidden name, every file and the folder
// reach the disk, and only then it gets its name: what is called step-N is complete, whatever happened to the writer.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "gpt/checkpoint/weights.hpp"
#include "gpt/data/sampler.hpp"
#include "gpt/parameters.hpp"
#include "gpt/tokenizer/tokenizer.hpp"

namespace strobe::gpt {

/// What a run needs, besides weights and moments, to go on as if it had never stopped.
struct TrainingState {
    int64_t step = 0;
    SamplerPosition data_position;
    uint64_t data_fingerprint = 0;       // Dataset::fingerprint; a resumed run must find the same data
    std::array<uint64_t, 4> rng{};       // Random::state()
    nlohmann::json trainer;              // the trainer's own: options, best loss, ...

    bool operator==(const TrainingState&) const = default;
};

/// Everything that is saved. Without moments and state it is a model to be used or fine-tuned, not a run to be resumed.
struct CheckpointContents {
    const ModelConfig* config = nullptr;
    const ParameterLayout* layout = nullptr;
    const ParameterArena* values = nullptr;
    const ParameterArena* first_moment = nullptr;   // or null
    const ParameterArena* second_moment = nullptr;  // or null
    const Tokenizer* tokenizer = nullptr;           // or null
    const TrainingState* state = nullptr;           // or null
};

/// Writes the files into an existing empty folder, each fsynced, and fsyncs the folder.
void write_checkpoint_files(const std::filesystem::path& folder, const CheckpointContents& contents);

/// The folder of one run's checkpoints, locked against a second writer while this object lives.
class CheckpointStore {
public:
    /// Creates the folder; removes what an interrupted writer left. `keep` >= 1 newest checkpoints survive a save. Throws
    /// FileError if another process is writing there.
    explicit CheckpointStore(const std::filesystem::path& root, int keep = 2);
    CheckpointStore(const CheckpointStore&) = delete;
    CheckpointStore& operator=(const CheckpointStore&) = delete;
    ~CheckpointStore();

    /// Returns the new checkpoint's folder. The older ones are touched only after it is safely on disk. On an exception
    /// (disk full, say) they are all still there.
    std::filesystem::path save(const CheckpointContents& contents);

private:
    void prune(const std::filesystem::path& newest) const;

    std::filesystem::path root_;
    int keep_;
    int lock_fd_ = -1;
};

/// A checkpoint opened for reading: ours, or any folder with a config.json and safetensors. Opening checks every file
/// against the record of training_state.json, if there is one, and the tensors against the config.
class Checkpoint {
public:
    explicit Checkpoint(const std::filesystem::path& folder);

    const std::filesystem::path& folder() const { return folder_; }
    const ModelConfig& config() const { return config_; }
    const ParameterLayout& layout() const { return layout_; }
    /// Present only where training can be resumed.
    const std::optional<TrainingState>& state() const { return state_; }
    bool has_tokenizer() const;
    Tokenizer tokenizer() const { return Tokenizer::load(folder_); }

    /// Into an arena of `layout`, which is of this config, for any number of shards; without one, of layout().
    void read_values(const ParameterLayout& layout, const ParameterArena& values) const;
    void read_values(const ParameterArena& values) const { read_values(layout_, values); }
    /// Throws FileError where there are none.
    void read_moments(const ParameterLayout& layout, const ParameterArena& first, const ParameterArena& second) const;
    void read_moments(const ParameterArena& first, const ParameterArena& second) const { read_moments(layout_, first, second); }

private:
    std::filesystem::path folder_;
    std::optional<TrainingState> state_;
    ModelConfig config_;
    ParameterLayout layout_;
    WeightFiles weights_;
};

/// The checkpoints of a run, newest first.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& root);

/// `path` itself if it is a checkpoint; the newest one that opens if it is a run's folder. What was newer but did not open
/// is told in `refused`. Throws FileError if there is nothing to open.
Checkpoint open_checkpoint(const std::filesystem::path& path, std::vector<std::string>* refused = nullptr);

}  // namespace strobe::gpt
