// The file formats of byte-level BPE vocabularies. Parsers take the text and the file's name for messages; they throw
// FileError and never trust a number or a name in the file.
#pragma once

#include <filesystem>
#include <string_view>

#include "gpt/tokenizer/vocabulary.hpp"

namespace strobe::gpt {

/// GPT-2: vocab.json maps printable tokens to ids, merges.txt lists "left right" by rank. A token of the form <...> that no
/// merge makes is a special token.
Vocabulary parse_gpt2_vocabulary(std::string_view vocab_json, const std::filesystem::path& vocab_file,
                                 std::string_view merges_txt, const std::filesystem::path& merges_file);

/// tiktoken: one "BASE64 RANK" per line. Without special tokens and pattern, which the format does not hold.
Vocabulary parse_tiktoken_vocabulary(std::string_view text, const std::filesystem::path& file);

/// Hugging Face tokenizer.json with a byte-level BPE model. What would change tokens and is not supported is refused.
Vocabulary parse_tokenizer_json(std::string_view text, const std::filesystem::path& file);

/// Pattern and special tokens of the published tiktoken vocabulary that `name` (a file name) tells; <|endoftext|> takes the
/// first free id where the name is not a published one.
void add_tiktoken_conventions(Vocabulary& vocabulary, std::string_view name);

/// The merges that tiktoken's rule implies.
std::vector<Merge> merges_of_ranked_tokens(const std::vector<std::string>& tokens);

/// See Tokenizer::load and Tokenizer::save.
Vocabulary read_vocabulary(const std::filesystem::path& source);
void write_vocabulary(const Vocabulary& vocabulary, const std::filesystem::path& folder);

}  // namespace strobe::gpt
