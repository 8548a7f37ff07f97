// The vocabulary as Hugging Face's JSON files spell it - printable token to id - while it is read and checked.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>

#include <nlohmann/json_fwd.hpp>

#include "gpt/tokenizer/vocabulary.hpp"

namespace strobe::gpt {

// Ids may leave holes (tiktoken's do), but a file must not make us allocate much more than it is long.
inline constexpr size_t kMaxHoles = 4096;

/// The start of `text`, for messages.
std::string excerpt(std::string_view text);

class PrintableVocabulary {
public:
    /// Throws FileError unless `entries` maps tokens to distinct ids of sensible size.
    PrintableVocabulary(const nlohmann::json& entries, const std::filesystem::path& file);

    size_t size() const { return size_; }
    const std::unordered_map<std::string, TokenId>& ids() const { return ids_; }

    Merge merge(std::string_view left, std::string_view right, size_t rank, const std::filesystem::path& merges_file) const;

    /// Fills `vocabulary.tokens` with everything that spells bytes; what does not, and what `is_special` says, is appended
    /// to `vocabulary.specials`.
    void place_tokens(Vocabulary& vocabulary, const std::function<bool(const std::string&, TokenId)>& is_special) const;

private:
    std::filesystem::path file_;
    std::unordered_map<std::string, TokenId> ids_;
    size_t size_ = 0;
};

/// What reading promises: all that Tokenizer's constructor would refuse is refused here, with the file's name. Orders the
/// special tokens by id.
Vocabulary checked_vocabulary(Vocabulary vocabulary, const std::filesystem::path& file);

}  // namespace strobe::gpt
