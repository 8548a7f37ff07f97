// config.json as Hugging Face's transformers write and read it, for the two architectures of this trainer.
#pragma once

#include <filesystem>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

#include "gpt/config.hpp"
#include "gpt/tokenizer/vocabulary.hpp"

namespace strobe::gpt {

/// `end_of_text` < 0: the vocabulary has none.
nlohmann::json to_hf_config(const ModelConfig& config, TokenId end_of_text);

/// Throws FileError on a field that is missing, out of range, or asks for arithmetic that this trainer does not have: silence
/// would give other numbers than the file's author got.
ModelConfig parse_hf_config(std::string_view text, const std::filesystem::path& file);

}  // namespace strobe::gpt
