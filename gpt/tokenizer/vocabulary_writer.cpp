#include <nlohmann/json.hpp>

#include "gpt/io/durable_file.hpp"
#include "gpt/tokenizer/base64.hpp"
#include "gpt/tokenizer/byte_alphabet.hpp"
#include "gpt/tokenizer/merge_table.hpp"
#include "gpt/tokenizer/splitter.hpp"
#include "gpt/tokenizer/vocabulary_files.hpp"

namespace strobe::gpt {
namespace {

using Json = nlohmann::json;

/// One merge per token: its last step when it is built by the merges below its rank. Tokens that no such step makes
/// stay reachable as whole pieces.
std::vector<Merge> canonical_merges(const Vocabulary& vocabulary) {
    if (!vocabulary.ranks_are_ids) return vocabulary.merges;
    const MergeTable table(vocabulary);
    PieceMerger merger(table);
    std::vector<Merge> merges;
    std::vector<TokenId> parts;
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
        if (vocabulary.tokens[id].size() < 2) continue;
        parts.clear();
        merger.encode(vocabulary.tokens[id], parts, static_cast<int32_t>(id));
        if (parts.size() != 2) continue;
        merges.push_back({parts[0], parts[1], static_cast<TokenId>(id), static_cast<int32_t>(merges.size())});
    }
    return merges;
}

Json printable_vocabulary(const Vocabulary& vocabulary) {
    Json entries = Json::object();
    for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
        if (!vocabulary.tokens[id].empty()) entries[bytes_to_printable(vocabulary.tokens[id])] = id;
    }
    for (const SpecialToken& special : vocabulary.specials) entries[special.text] = special.id;
    return entries;
}

std::string merge_line(const Vocabulary& vocabulary, const Merge& merge) {
    return bytes_to_printable(vocabulary.tokens[static_cast<size_t>(merge.left)]) + " " +
           bytes_to_printable(vocabulary.tokens[static_cast<size_t>(merge.right)]);
}

Json byte_level(bool use_regex) {
    return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

Json pre_tokenizer(const std::string& pattern) {
    if (pattern == kGpt2Pattern) return byte_level(true);
    if (pattern.empty()) return byte_level(false);
    const Json split = {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
    return {{"type", "Sequence"}, {"pretokenizers", {split, byte_level(false)}}};
}

Json tokenizer_json(const Vocabulary& vocabulary) {
    Json added = Json::array();
    for (const SpecialToken& special : vocabulary.specials) {
        added.push_back({{"id", special.id}, {"content", special.text}, {"single_word", false}, {"lstrip", false},
                         {"rstrip", false}, {"normalized", false}, {"special", true}});
    }
    Json merges = Json::array();
    for (const Merge& merge : canonical_merges(vocabulary)) merges.push_back(merge_line(vocabulary, merge));
    const Json model = {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", nullptr}, {"continuing_subword_prefix", nullptr},
                        {"end_of_word_suffix", nullptr}, {"fuse_unk", false}, {"byte_fallback", false},
                        {"ignore_merges", vocabulary.whole_piece_first}, {"vocab", printable_vocabulary(vocabulary)},
                        {"merges", std::move(merges)}};
    return {{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}, {"added_tokens", std::move(added)},
            {"normalizer", nullptr}, {"pre_tokenizer", pre_tokenizer(vocabulary.pattern)}, {"post_processor", nullptr},
            {"decoder", byte_level(true)}, {"model", model}};
}

void write_text(const std::filesystem::path& file, const std::string& text) {
    write_file_atomically(file, [&](DurableFile& out) { out.write(text); });
}

}  // namespace

void write_vocabulary(const Vocabulary& vocabulary, const std::filesystem::path& folder) {
    std::filesystem::create_directories(folder);
    write_text(folder / "tokenizer.json", tokenizer_json(vocabulary).dump() + "\n");

    Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
    for (const SpecialToken& special : vocabulary.specials) {
        if (special.text == kEndOfText) config["bos_token"] = config["eos_token"] = config["unk_token"] = special.text;
    }
    write_text(folder / "tokenizer_config.json", config.dump(2) + "\n");

    if (vocabulary.ranks_are_ids) {
        std::string lines;
        for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
            if (!vocabulary.tokens[id].empty()) {
                lines += base64_encode(vocabulary.tokens[id]) + " " + std::to_string(id) + "\n";
            }
        }
        write_text(folder / "tokenizer.tiktoken", lines);
    } else if (vocabulary.pattern == kGpt2Pattern && !vocabulary.whole_piece_first) {
        write_text(folder / "vocab.json", printable_vocabulary(vocabulary).dump() + "\n");
        std::string lines = "#version: 0.2\n";
        for (const Merge& merge : vocabulary.merges) lines += merge_line(vocabulary, merge) + "\n";
        write_text(folder / "merges.txt", lines);
    }
}

}  // namespace strobe::gpt
