// strobe tokenizer: vocabularies from one's own text, and any vocabulary tried out.
#include <charconv>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "commands.hpp"
#include "gpt/data/corpus.hpp"
#include "gpt/io/mapped_file.hpp"
#include "gpt/io/xxhash64.hpp"
#include "gpt/tokenizer/bpe_trainer.hpp"
#include "gpt/tokenizer/tokenizer.hpp"
#include "gpt_commands.hpp"

namespace strobe::gpt {
namespace {

struct TokenizerArguments {
    std::string data, out, pattern = "gpt2", tokenizer = "bytes", file;
    int64_t vocab_size = 4096, min_frequency = 2;
    bool special = false, binary = false, json = false;
};

std::string read_input(const std::string& file) {
    if (!file.empty() && file != "-") return std::string(MappedFile(file).text());
    std::string text;
    std::vector<char> block(1 << 16);
    while (const size_t count = std::fread(block.data(), 1, block.size(), stdin)) text.append(block.data(), count);
    return text;
}

void write_output(const void* data, size_t size) {
    if (std::fwrite(data, 1, size, stdout) != size) throw cli::Exit{cli::kExitNo, "cannot write to standard output"};
}

std::string_view pattern_named(const std::string& name) {
    if (name == "gpt2") return kGpt2Pattern;
    return name == "cl100k" ? kCl100kPattern : kO200kPattern;
}

void print_summary(const Tokenizer& tokenizer, const std::string& source, bool json) {
    nlohmann::ordered_json specials = nlohmann::ordered_json::object();
    for (const SpecialToken& special : tokenizer.vocabulary().specials) specials[special.text] = special.id;
    const size_t merges = tokenizer.vocabulary().merges.size();
    const std::string fingerprint = to_hex(tokenizer.fingerprint());
    if (json) {
        const nlohmann::ordered_json report{{"source", source},
                                            {"vocab_size", tokenizer.vocab_size()},
                                            {"merges", merges},
                                            {"pattern", tokenizer.vocabulary().pattern},
                                            {"special", specials},
                                            {"fingerprint", fingerprint}};
        fmt::print("{}\n", report.dump(2));
        return;
    }
    fmt::print("{}: {} ids, {} merges, fingerprint {}\n", source, tokenizer.vocab_size(), merges, fingerprint);
    for (const auto& [text, id] : specials.items()) fmt::print("  {} = {}\n", text, id.get<int64_t>());
}

void run_train(const TokenizerArguments& a) {
    BpeTrainer trainer({.vocab_size = a.vocab_size,
                        .min_frequency = a.min_frequency,
                        .pattern = std::string(pattern_named(a.pattern))});
    Corpus(a.data).for_each_document([&](std::string_view document) { trainer.add(document); });
    const Tokenizer tokenizer(trainer.train());
    tokenizer.save(a.out);
    print_summary(tokenizer, a.out, a.json);
}

void run_encode(const TokenizerArguments& a) {
    const Tokenizer tokenizer = Tokenizer::load(a.tokenizer);
    const std::string text = read_input(a.file);
    const std::vector<TokenId> ids = a.special ? tokenizer.encode_with_special(text) : tokenizer.encode(text);
    if (a.binary) {
        write_output(ids.data(), ids.size() * sizeof(TokenId));
    } else {
        std::string line;
        for (TokenId id : ids) line += fmt::format("{}{}", line.empty() ? "" : " ", id);
        line += '\n';
        write_output(line.data(), line.size());
    }
}

std::vector<TokenId> parse_ids(const std::string& text) {
    std::vector<TokenId> ids;
    const char* at = text.data();
    const char* end = at + text.size();
    while (true) {
        while (at < end && std::string_view(" \n\t\r,").find(*at) != std::string_view::npos) ++at;
        if (at == end) return ids;
        const auto [stop, error] = std::from_chars(at, end, ids.emplace_back());
        if (error != std::errc()) {
            throw cli::Exit{cli::kExitUsage, fmt::format("byte {} of the input is not a token id", at - text.data())};
        }
        at = stop;
    }
}

void run_decode(const TokenizerArguments& a) {
    const Tokenizer tokenizer = Tokenizer::load(a.tokenizer);
    const std::string input = read_input(a.file);
    std::vector<TokenId> ids;
    if (a.binary) {
        if (input.size() % sizeof(TokenId) != 0) {
            throw cli::Exit{cli::kExitUsage, "the input is not a whole number of 32-bit ids"};
        }
        ids.resize(input.size() / sizeof(TokenId));
        std::memcpy(ids.data(), input.data(), input.size());
    } else {
        ids = parse_ids(input);
    }
    const std::string text = tokenizer.decode(ids);
    write_output(text.data(), text.size());
}

}  // namespace

void add_tokenizer_command(CLI::App& app) {
    static TokenizerArguments a;
    CLI::App* command = app.add_subcommand("tokenizer", "Train, inspect and apply vocabularies");
    command->require_subcommand(1);
    const auto add_tokenizer_option = [](CLI::App* sub) {
        sub->add_option("--tokenizer", a.tokenizer,
                        "bytes, or a vocabulary (folder, vocab.json, tokenizer.json, .tiktoken)")
            ->capture_default_str();
    };

    CLI::App* train = command->add_subcommand("train", "Learn a byte-level BPE vocabulary from text");
    train->add_option("--data", a.data, "A text file or a folder of text files")->required();
    train->add_option("--out", a.out, "Folder for tokenizer.json and, with the gpt2 pattern, vocab.json and merges.txt")
        ->required();
    train->add_option("--vocab-size", a.vocab_size, "With the 256 bytes and <|endoftext|>")->capture_default_str();
    train->add_option("--min-frequency", a.min_frequency, "Pairs seen less often are not merged")
        ->capture_default_str();
    train->add_option("--pattern", a.pattern, "How text is split before merging")
        ->check(CLI::IsMember({"gpt2", "cl100k", "o200k"}))->capture_default_str();
    train->add_flag("--json", a.json, "Report as JSON");
    train->callback([] { run_train(a); });

    CLI::App* encode = command->add_subcommand("encode", "Text to token ids");
    add_tokenizer_option(encode);
    encode->add_option("file", a.file, "Text (default: standard input)");
    encode->add_flag("--special", a.special, "Special tokens in the text become their ids");
    encode->add_flag("--binary", a.binary, "Ids as 32-bit little-endian words");
    encode->callback([] { run_encode(a); });

    CLI::App* decode = command->add_subcommand("decode", "Token ids to text");
    add_tokenizer_option(decode);
    decode->add_option("file", a.file, "Ids, separated by spaces or commas (default: standard input)");
    decode->add_flag("--binary", a.binary, "Ids are 32-bit little-endian words");
    decode->callback([] { run_decode(a); });

    CLI::App* info = command->add_subcommand("info", "Size, special tokens and fingerprint of a vocabulary");
    add_tokenizer_option(info);
    info->add_flag("--json", a.json, "Report as JSON");
    info->callback([] { print_summary(Tokenizer::load(a.tokenizer), a.tokenizer, a.json); });
}

}  // namespace strobe::gpt
