#include <unordered_map>
#include <utility>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/io/strict_json.hpp"
#include "gpt/tokenizer/printable_vocabulary.hpp"
#include "gpt/tokenizer/splitter.hpp"
#include "gpt/tokenizer/vocabulary_files.hpp"

namespace strobe::gpt {
namespace {

using Json = nlohmann::json;
using Path = std::filesystem::path;

constexpr size_t kMaxPatternBytes = 4096;

[[noreturn]] void refuse(const Path& file, std::string_view what) {
    throw FileError(file, fmt::format("{} is not supported; only byte-level BPE as in GPT-2, tiktoken and Llama 3 is", what));
}

const Json& field(const Json& object, const char* name) {
    static const Json kNull;
    if (!object.is_object()) return kNull;
    const auto found = object.find(name);
    return found == object.end() ? kNull : *found;
}

bool is_true(const Json& value) { return value.is_boolean() && value.get<bool>(); }
bool is_false(const Json& value) { return value.is_boolean() && !value.get<bool>(); }

void read_byte_level(const Json& step, const Path& file, std::string& pattern) {
    if (is_true(field(step, "add_prefix_space"))) refuse(file, "pre_tokenizer ByteLevel with add_prefix_space");
    if (is_false(field(step, "use_regex"))) return;
    if (!pattern.empty()) refuse(file, "a Split before a ByteLevel that splits again");
    pattern = kGpt2Pattern;
}

/// The pattern that a pre_tokenizer stands for.
std::string read_pre_tokenizer(const Json& pre_tokenizer, const Path& file) {
    const Json single = Json::array({pre_tokenizer});
    const bool is_sequence = field(pre_tokenizer, "type") == "Sequence";
    const Json& steps = is_sequence ? field(pre_tokenizer, "pretokenizers") : single;
    if (!steps.is_array() || steps.empty() || steps.size() > 2) refuse(file, "this pre_tokenizer");
    std::string pattern;
    for (size_t i = 0; i < steps.size(); ++i) {
        const Json& step = steps[i];
        if (i + 1 == steps.size()) {
            if (field(step, "type") != "ByteLevel") refuse(file, "a pre_tokenizer that does not end in ByteLevel");
            read_byte_level(step, file, pattern);
            break;
        }
        const Json& regex = field(field(step, "pattern"), "Regex");
        if (field(step, "type") != "Split" || !regex.is_string()) {
            refuse(file, "a pre_tokenizer step other than Split by a Regex");
        }
        if (field(step, "behavior") != "Isolated" || is_true(field(step, "invert"))) {
            refuse(file, "Split other than Isolated");
        }
        pattern = regex.get<std::string>();
        if (pattern.empty() || pattern.size() > kMaxPatternBytes) {
            throw FileError(file, "the split pattern is empty or too long");
        }
    }
    return pattern;
}

void read_added_tokens(const Json& added, const Path& file, Vocabulary& vocabulary, const PrintableVocabulary& printable) {
    if (added.is_null()) return;
    if (!added.is_array()) throw FileError(file, "added_tokens is not an array");
    for (const Json& token : added) {
        const Json& content = field(token, "content");
        const Json& id = field(token, "id");
        if (!content.is_string() || content.get_ref<const std::string&>().empty() || !id.is_number_unsigned() ||
            id.get<uint64_t>() >= printable.size() + added.size() + kMaxHoles) {
            throw FileError(file, fmt::format("added token {} needs a content and an id near the vocabulary's", excerpt(token.dump())));
        }
        for (const char* option : {"lstrip", "rstrip", "single_word"}) {
            if (is_true(field(token, option))) {
                refuse(file, fmt::format("added token '{}' with {}", excerpt(content.get<std::string>()), option));
            }
        }
        const auto listed = printable.ids().find(content.get<std::string>());
        if (listed != printable.ids().end() && listed->second != id.get<TokenId>()) {
            throw FileError(file, fmt::format("added token '{}' has id {} but {} in the vocabulary",
                                              excerpt(content.get<std::string>()), id.get<TokenId>(), listed->second));
        }
        vocabulary.tokens.resize(std::max(vocabulary.tokens.size(), id.get<size_t>() + 1));
        vocabulary.specials.push_back({content.get<std::string>(), id.get<TokenId>()});
    }
}

}  // namespace

Vocabulary parse_tokenizer_json(std::string_view text, const Path& file) {
    const Json document = parse_strict_json(text, file);
    const Json& model = field(document, "model");
    if (field(model, "type") != "BPE") refuse(file, "a model other than BPE");
    if (!field(document, "normalizer").is_null()) refuse(file, "a normalizer");
    if (is_true(field(model, "byte_fallback"))) refuse(file, "byte_fallback");
    for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
        if (!field(model, affix).is_null() && field(model, affix) != "") refuse(file, affix);
    }
    if (!field(model, "dropout").is_null() && field(model, "dropout") != 0.0) refuse(file, "merge dropout");

    Vocabulary vocabulary;
    vocabulary.pattern = read_pre_tokenizer(field(document, "pre_tokenizer"), file);
    vocabulary.whole_piece_first = is_true(field(model, "ignore_merges"));
    const PrintableVocabulary printable(field(model, "vocab"), file);
    read_added_tokens(field(document, "added_tokens"), file, vocabulary, printable);

    const Json& merges = field(model, "merges");
    if (!merges.is_array()) throw FileError(file, "model.merges is not an array");
    for (const Json& merge : merges) {
        const size_t rank = vocabulary.merges.size();
        if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
            vocabulary.merges.push_back(printable.merge(merge[0].get<std::string>(), merge[1].get<std::string>(), rank, file));
            continue;
        }
        const std::string line = merge.is_string() ? merge.get<std::string>() : "";
        const size_t space = line.find(' ');
        if (space == std::string::npos) throw FileError(file, fmt::format("merge {} is not a pair of tokens", rank));
        vocabulary.merges.push_back(printable.merge(line.substr(0, space), line.substr(space + 1), rank, file));
    }

    std::vector<SpecialToken> added = std::exchange(vocabulary.specials, {});
    std::unordered_map<TokenId, std::string_view> added_ids;
    for (const SpecialToken& token : added) {
        if (!added_ids.emplace(token.id, token.text).second) {
            throw FileError(file, fmt::format("id {} is added twice", token.id));
        }
    }
    printable.place_tokens(vocabulary, [&](const std::string&, TokenId id) { return added_ids.contains(id); });
    for (SpecialToken& token : added) {
        if (!printable.ids().contains(token.text)) vocabulary.specials.push_back(std::move(token));
    }
    return checked_vocabulary(std::move(vocabulary), file);
}

}  // namespace strobe::gpt
