// From a checkpoint and a prompt to text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "gpt/backend.hpp"
#include "gpt/generate/token_sampler.hpp"
#include "gpt/tokenizer/tokenizer.hpp"
#include "gpt/weights.hpp"

namespace strobe::gpt {

struct GenerateOptions {
    std::filesystem::path checkpoint;  // a checkpoint, or a run's folder: its newest
    std::string prompt;                // empty: a new document
    int64_t max_tokens = 256;
    SamplingOptions sampling;
    bool cache = true;                 // false: every token reads the whole text again
    bool stop_at_end_of_text = true;
    int threads = 0;
    Device device = Device::cpu;
    Precision precision = Precision::fp32;

    /// Throws std::invalid_argument that names the option.
    void validate() const;
};

struct GenerateResult {
    std::string text;                // without the prompt
    std::vector<int32_t> tokens;     // of the text
    int64_t prompt_tokens = 0;
    double prompt_seconds = 0.0;     // to the first token
    double decode_seconds = 0.0;     // for all tokens after the first
    double tokens_per_second() const {
        return decode_seconds > 0.0 ? static_cast<double>(tokens.size() - 1) / decode_seconds : 0.0;
    }
};

/// Calls `stream` with the prompt once the model is there, then with the text as it comes, whole characters at a time. When
/// the context is full the older half of the text is forgotten.
GenerateResult generate(const GenerateOptions& options, const std::function<void(std::string_view)>& stream);

/// The same on a model that is in memory.
GenerateResult generate(const Weights& weights, const Tokenizer& tokenizer, Backend& backend, const GenerateOptions& options,
                        const std::function<void(std::string_view)>& stream);

}  // namespace strobe::gpt
