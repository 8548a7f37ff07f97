#include "gpt/tokenizer/vocabulary_files.hpp"

#include <algorithm>
#include <charconv>
#include <optional>
#include <unordered_map>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/io/mapped_file.hpp"
#include "gpt/io/strict_json.hpp"
#include "gpt/tokenizer/base64.hpp"
#include "gpt/tokenizer/printable_vocabulary.hpp"
#include "gpt/tokenizer/splitter.hpp"

namespace strobe::gpt {
namespace {

using Path = std::filesystem::path;

/// Calls visit(line, number) for every line; a final line feed ends the last line, "\r\n" counts as a line feed.
template <class Visit>
void for_each_line(std::string_view text, Visit visit) {
    for (size_t number = 1; !text.empty(); ++number) {
        const size_t end = text.find('\n');
        std::string_view line = text.substr(0, end);
        text = end == std::string_view::npos ? std::string_view{} : text.substr(end + 1);
        if (line.ends_with('\r')) line.remove_suffix(1);
        visit(line, number);
    }
}

bool looks_special(std::string_view token) { return token.size() > 2 && token.starts_with('<') && token.ends_with('>'); }

}  // namespace

Vocabulary parse_gpt2_vocabulary(std::string_view vocab_json, const Path& vocab_file, std::string_view merges_txt,
                                 const Path& merges_file) {
    const PrintableVocabulary printable(parse_strict_json(vocab_json, vocab_file), vocab_file);
    Vocabulary vocabulary;
    vocabulary.pattern = kGpt2Pattern;
    for_each_line(merges_txt, [&](std::string_view line, size_t number) {
        if (line.empty() || (number == 1 && line.starts_with("#version"))) return;
        const size_t space = line.find(' ');
        if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) {
            throw FileError(merges_file, fmt::format("line {} is '{}'; expected two tokens and one space", number, excerpt(line)));
        }
        vocabulary.merges.push_back(
            printable.merge(line.substr(0, space), line.substr(space + 1), vocabulary.merges.size(), merges_file));
    });
    std::vector<bool> is_result(printable.size());
    for (const Merge& m : vocabulary.merges) is_result[static_cast<size_t>(m.result)] = true;
    printable.place_tokens(vocabulary, [&](const std::string& token, TokenId id) {
        return looks_special(token) && !is_result[static_cast<size_t>(id)];
    });
    return checked_vocabulary(std::move(vocabulary), vocab_file);
}

Vocabulary parse_tiktoken_vocabulary(std::string_view text, const Path& file) {
    std::vector<std::pair<std::string, size_t>> entries;
    size_t end = 0;
    for_each_line(text, [&](std::string_view line, size_t number) {
        if (line.empty()) return;
        const size_t space = line.find(' ');
        const std::optional<std::string> token = base64_decode(line.substr(0, space));
        if (space == std::string_view::npos || !token || token->empty()) {
            throw FileError(file, fmt::format("line {} is '{}'; expected a base64 token and its rank", number, excerpt(line)));
        }
        size_t rank = 0;
        const std::string_view digits = line.substr(space + 1);
        const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
        if (error != std::errc() || stop != digits.data() + digits.size() || rank >= kMaxVocabSize) {
            throw FileError(file, fmt::format("line {} has rank '{}'; expected a number below {}", number, excerpt(digits), kMaxVocabSize));
        }
        end = std::max(end, rank + 1);
        entries.emplace_back(std::move(*token), rank);
    });
    if (end > entries.size() + kMaxHoles) {
        throw FileError(file, fmt::format("has {} tokens but a rank of {}", entries.size(), end - 1));
    }
    Vocabulary vocabulary;
    vocabulary.ranks_are_ids = vocabulary.whole_piece_first = true;
    vocabulary.tokens.resize(end);
    std::unordered_map<std::string_view, size_t> seen;
    for (auto& [token, rank] : entries) {
        if (token.size() > kMaxTokenBytes) {
            throw FileError(file, fmt::format("token of rank {} is longer than {} bytes", rank, kMaxTokenBytes));
        }
        if (!vocabulary.tokens[rank].empty()) throw FileError(file, fmt::format("rank {} occurs twice", rank));
        vocabulary.tokens[rank] = std::move(token);
        if (!seen.emplace(vocabulary.tokens[rank], rank).second) {
            throw FileError(file, fmt::format("the token of rank {} occurs twice", rank));
        }
    }
    vocabulary.merges = merges_of_ranked_tokens(vocabulary.tokens);
    return checked_vocabulary(std::move(vocabulary), file);
}

std::vector<Merge> merges_of_ranked_tokens(const std::vector<std::string>& tokens) {
    std::unordered_map<std::string_view, TokenId> ids;
    for (size_t id = 0; id < tokens.size(); ++id) {
        if (!tokens[id].empty()) ids.emplace(tokens[id], static_cast<TokenId>(id));
    }
    std::vector<Merge> merges;
    for (size_t id = 0; id < tokens.size(); ++id) {
        const std::string_view token = tokens[id];
        for (size_t cut = 1; cut < token.size(); ++cut) {
            const auto left = ids.find(token.substr(0, cut));
            if (left == ids.end()) continue;
            const auto right = ids.find(token.substr(cut));
            if (right == ids.end()) continue;
            merges.push_back({left->second, right->second, static_cast<TokenId>(id), static_cast<int32_t>(id)});
        }
    }
    return merges;
}

void add_tiktoken_conventions(Vocabulary& vocabulary, std::string_view name) {
    const auto mentions = [&](std::string_view word) { return name.find(word) != std::string_view::npos; };
    const bool gpt2 = mentions("gpt2") || mentions("r50k") || mentions("p50k");
    vocabulary.pattern = gpt2 ? kGpt2Pattern : mentions("o200k") ? kO200kPattern : kCl100kPattern;
    if (mentions("cl100k_base") && vocabulary.tokens.size() == 100256) {
        vocabulary.specials = {{std::string(kEndOfText), 100257}, {"<|fim_prefix|>", 100258}, {"<|fim_middle|>", 100259},
                               {"<|fim_suffix|>", 100260}, {"<|endofprompt|>", 100276}};
    } else if (mentions("o200k_base") && vocabulary.tokens.size() == 199998) {
        vocabulary.specials = {{std::string(kEndOfText), 199999}, {"<|endofprompt|>", 200018}};
    } else {
        const auto hole = std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), std::string());
        vocabulary.specials = {{std::string(kEndOfText), static_cast<TokenId>(hole - vocabulary.tokens.begin())}};
    }
    const auto last = static_cast<size_t>(vocabulary.specials.back().id);
    vocabulary.tokens.resize(std::max(vocabulary.tokens.size(), last + 1));
}

Vocabulary read_vocabulary(const Path& source) {
    const auto read_tokenizer_json = [](const Path& file) { return parse_tokenizer_json(MappedFile(file).text(), file); };
    const auto read_tiktoken = [](const Path& file) { return parse_tiktoken_vocabulary(MappedFile(file).text(), file); };
    const auto read_gpt2 = [](const Path& vocab, const Path& merges) {
        return parse_gpt2_vocabulary(MappedFile(vocab).text(), vocab, MappedFile(merges).text(), merges);
    };
    if (!std::filesystem::exists(source)) {
        throw FileError(source, "does not exist; a tokenizer is 'bytes', a folder or a vocabulary file");
    }
    if (!std::filesystem::is_directory(source)) {
        if (source.extension() == ".tiktoken") {
            Vocabulary vocabulary = read_tiktoken(source);
            add_tiktoken_conventions(vocabulary, source.filename().string());
            return vocabulary;
        }
        if (source.filename() == "tokenizer.json") return read_tokenizer_json(source);
        if (source.extension() == ".json") return read_gpt2(source, source.parent_path() / "merges.txt");
        throw FileError(source, "is none of vocab.json, tokenizer.json and *.tiktoken");
    }
    const Path tiktoken = source / "tokenizer.tiktoken";
    const Path tokenizer_json = source / "tokenizer.json";
    if (std::filesystem::exists(tiktoken)) {
        Vocabulary vocabulary = read_tiktoken(tiktoken);
        if (!std::filesystem::exists(tokenizer_json)) {
            add_tiktoken_conventions(vocabulary, source.filename().string());
            return vocabulary;
        }
        Vocabulary rest = read_tokenizer_json(tokenizer_json);
        if (rest.tokens.size() < vocabulary.tokens.size()) {
            throw FileError(tokenizer_json, "has fewer ids than tokenizer.tiktoken");
        }
        vocabulary.tokens.resize(rest.tokens.size());
        vocabulary.pattern = std::move(rest.pattern);
        vocabulary.specials = std::move(rest.specials);
        return checked_vocabulary(std::move(vocabulary), tokenizer_json);
    }
    if (std::filesystem::exists(tokenizer_json)) return read_tokenizer_json(tokenizer_json);
    if (std::filesystem::exists(source / "vocab.json")) return read_gpt2(source / "vocab.json", source / "merges.txt");
    throw FileError(source, "holds none of tokenizer.tiktoken, tokenizer.json and vocab.json");
}

}  // namespace strobe::gpt
