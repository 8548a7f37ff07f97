#include "gpt/tokenizer/printable_vocabulary.hpp"

#include <algorithm>
#include <optional>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/tokenizer/byte_alphabet.hpp"
#include "gpt/tokenizer/splitter.hpp"

namespace strobe::gpt {

std::string excerpt(std::string_view text) {
    return text.size() <= 60 ? std::string(text) : std::string(text.substr(0, 60)) + "...";
}

PrintableVocabulary::PrintableVocabulary(const nlohmann::json& entries, const std::filesystem::path& file) : file_(file) {
    if (!entries.is_object() || entries.empty()) throw FileError(file, "the vocabulary is not an object of token: id");
    for (const auto& [token, id] : entries.items()) {
        if (!id.is_number_unsigned() || id.get<uint64_t>() >= entries.size() + kMaxHoles) {
            throw FileError(file, fmt::format("token '{}' has id {}; expected an integer below {}", excerpt(token),
                                              excerpt(id.dump()), entries.size() + kMaxHoles));
        }
        ids_.emplace(token, id.get<TokenId>());
        size_ = std::max(size_, id.get<size_t>() + 1);
    }
    std::vector<bool> taken(size_);
    for (const auto& [token, id] : ids_) {
        if (taken[static_cast<size_t>(id)]) throw FileError(file, fmt::format("id {} belongs to two tokens", id));
        taken[static_cast<size_t>(id)] = true;
    }
}

Merge PrintableVocabulary::merge(std::string_view left, std::string_view right, size_t rank,
                                 const std::filesystem::path& merges_file) const {
    const auto id_of = [&](const std::string& token) {
        const auto found = ids_.find(token);
        if (found != ids_.end()) return found->second;
        throw FileError(merges_file, fmt::format("merge {} ('{}' '{}') needs token '{}', which is not in {}", rank,
                                                 excerpt(left), excerpt(right), excerpt(token), file_.string()));
    };
    const std::string a(left), b(right);
    return {id_of(a), id_of(b), id_of(a + b), static_cast<int32_t>(rank)};
}

void PrintableVocabulary::place_tokens(Vocabulary& vocabulary,
                                       const std::function<bool(const std::string&, TokenId)>& is_special) const {
    vocabulary.tokens.resize(std::max(vocabulary.tokens.size(), size_));
    for (const auto& [token, id] : ids_) {
        std::optional<std::string> bytes = printable_to_bytes(token);
        if (!bytes || bytes->empty() || is_special(token, id)) {
            vocabulary.specials.push_back({token, id});
        } else {
            vocabulary.tokens[static_cast<size_t>(id)] = std::move(*bytes);
        }
    }
}

Vocabulary checked_vocabulary(Vocabulary vocabulary, const std::filesystem::path& file) {
    std::sort(vocabulary.specials.begin(), vocabulary.specials.end(),
              [](const SpecialToken& a, const SpecialToken& b) { return a.id < b.id; });
    try {
        vocabulary.validate();
        Splitter{vocabulary.pattern};
    } catch (const std::invalid_argument& problem) {
        throw FileError(file, problem.what());
    }
    return vocabulary;
}

}  // namespace strobe::gpt
