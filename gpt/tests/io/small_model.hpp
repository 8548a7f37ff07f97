// Small models with values that tell every element from every other.
#pragma once

#include <cstring>

#include "gpt/checkpoint/checkpoint.hpp"

namespace strobe::gpt {

inline ModelConfig small_config(Architecture architecture) {
    return architecture == Architecture::gpt2 ? gpt2_config(2, 24, 3, 16, 257) : llama_config(2, 32, 4, 2, 16, 257);
}

/// Values, moments and state of a run at `step`; everything depends on the step.
struct SmallRun {
    ModelConfig config;
    ParameterLayout layout;
    ParameterArena values, first, second;
    Tokenizer tokenizer = Tokenizer::bytes();
    TrainingState state;

    explicit SmallRun(Architecture architecture, int64_t step = 1)
        : config(small_config(architecture)), layout(config), values(layout), first(layout), second(layout) {
        fill(step);
    }

    void fill(int64_t step) {
        const uint64_t seed = static_cast<uint64_t>(step);
        initialize(layout, config, seed, values);
        initialize(layout, config, seed + 1000, first);
        initialize(layout, config, seed + 2000, second);
        state.step = step;
        state.data_position = {seed / 7, seed * 3};
        state.data_fingerprint = 0xFEDCBA9876543210ull + seed;
        state.rng = {seed, ~seed, 0x8000000000000000ull, 1};
        state.trainer = {{"options", {{"lr", 0.1 + 1.0 / static_cast<double>(step)}}}, {"name", "run \u00e9"}};
    }

    CheckpointContents contents() const { return {&config, &layout, &values, &first, &second, &tokenizer, &state}; }

    bool operator==(const SmallRun& other) const {
        const auto same = [](const ParameterArena& a, const ParameterArena& b) {
            return a.size() == b.size() && std::memcmp(a.data(), b.data(), static_cast<size_t>(a.size()) * sizeof(float)) == 0;
        };
        return config == other.config && same(values, other.values) && same(first, other.first) && same(second, other.second) &&
               state == other.state && tokenizer.fingerprint() == other.tokenizer.fingerprint();
    }
};

/// What a checkpoint holds, as a run.
inline SmallRun read_run(const Checkpoint& checkpoint) {
    SmallRun run(checkpoint.config().architecture, 999);
    run.config = checkpoint.config();
    checkpoint.read_values(run.values);
    checkpoint.read_moments(run.first, run.second);
    run.state = checkpoint.state().value();
    run.tokenizer = checkpoint.tokenizer();
    return run;
}

}  // namespace strobe::gpt
