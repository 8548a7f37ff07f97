#include "gpt/tokenizer/tokenizer.hpp"

#include <algorithm>
#include <stdexcept>

#include <fmt/core.h>

#include "gpt/io/file_error.hpp"
#include "gpt/tokenizer/vocabulary_files.hpp"

namespace strobe::gpt {
namespace {

// Longer pieces are rarely seen twice; beyond the entry limit the common pieces are in.
constexpr size_t kMaxSeenPieceBytes = 48;
constexpr size_t kMaxSeenPieces = size_t{1} << 17;

Vocabulary validated(Vocabulary vocabulary) {
    vocabulary.validate();
    return vocabulary;
}

}  // namespace

Tokenizer::Tokenizer(Vocabulary vocabulary)
    : vocabulary_(validated(std::move(vocabulary))),
      merges_(vocabulary_),
      splitter_(vocabulary_.pattern),
      specials_longest_first_(vocabulary_.specials),
      fingerprint_(vocabulary_.fingerprint()) {
    if (vocabulary_.whole_piece_first) {
        // Of equal tokens the lowest id counts.
        for (size_t id = 0; id < vocabulary_.tokens.size(); ++id) {
            if (!vocabulary_.tokens[id].empty()) {
                whole_pieces_.emplace(vocabulary_.tokens[id], static_cast<TokenId>(id));
            }
        }
    }
    for (const SpecialToken& special : vocabulary_.specials) {
        special_texts_.emplace(special.id, special.text);
        if (special_first_bytes_.find(special.text[0]) == std::string::npos) special_first_bytes_ += special.text[0];
    }
    std::stable_sort(specials_longest_first_.begin(), specials_longest_first_.end(),
                     [](const SpecialToken& a, const SpecialToken& b) { return a.text.size() > b.text.size(); });
    end_of_text_ = special(kEndOfText).value_or(-1);
}

Tokenizer Tokenizer::bytes() { return Tokenizer(byte_vocabulary()); }

Tokenizer Tokenizer::load(const std::filesystem::path& source) {
    if (source == "bytes") return bytes();
    try {
        return Tokenizer(read_vocabulary(source));
    } catch (const std::invalid_argument& problem) {
        throw FileError(source, problem.what());
    }
}

void Tokenizer::save(const std::filesystem::path& folder) const { write_vocabulary(vocabulary_, folder); }

std::optional<TokenId> Tokenizer::special(std::string_view text) const {
    for (const SpecialToken& special : vocabulary_.specials) {
        if (special.text == text) return special.id;
    }
    return {};
}

std::vector<TokenId> Tokenizer::encode(std::string_view text) const {
    std::vector<TokenId> ids;
    Encoder(*this).encode(text, ids);
    return ids;
}

std::vector<TokenId> Tokenizer::encode_with_special(std::string_view text) const {
    std::vector<TokenId> ids;
    Encoder(*this).encode_with_special(text, ids);
    return ids;
}

std::string_view Tokenizer::token_bytes(TokenId id) const {
    if (id >= 0 && static_cast<size_t>(id) < vocabulary_.tokens.size()) {
        const std::string& token = vocabulary_.tokens[static_cast<size_t>(id)];
        if (!token.empty()) return token;
        if (const auto special = special_texts_.find(id); special != special_texts_.end()) return special->second;
    }
    throw std::out_of_range(fmt::format("token id {} is not in the vocabulary of {} ids", id, vocab_size()));
}

std::string Tokenizer::decode(std::span<const TokenId> ids) const {
    std::string text;
    for (const TokenId id : ids) text += token_bytes(id);
    return text;
}

Encoder::Encoder(const Tokenizer& tokenizer)
    : tokenizer_(&tokenizer), cursor_(tokenizer.splitter_), merger_(tokenizer.merges_) {}

void Encoder::encode(std::string_view text, std::vector<TokenId>& out) {
    if (tokenizer_->vocabulary_.merges.empty() && tokenizer_->whole_pieces_.empty()) {
        for (const char byte : text) out.push_back(tokenizer_->merges_.byte_token(static_cast<uint8_t>(byte)));
        return;
    }
    cursor_.start(text);
    for (std::string_view piece = cursor_.next(); !piece.empty(); piece = cursor_.next()) encode_piece(piece, out);
}

void Encoder::encode_with_special(std::string_view text, std::vector<TokenId>& out) {
    const std::vector<SpecialToken>& specials = tokenizer_->specials_longest_first_;
    size_t at = 0;
    while ((at = text.find_first_of(tokenizer_->special_first_bytes_, at)) != std::string_view::npos) {
        const auto special = std::find_if(specials.begin(), specials.end(), [&](const SpecialToken& candidate) {
            return text.substr(at).starts_with(candidate.text);
        });
        if (special == specials.end()) {
            ++at;
            continue;
        }
        encode(text.substr(0, at), out);
        out.push_back(special->id);
        text.remove_prefix(at + special->text.size());
        at = 0;
    }
    encode(text, out);
}

void Encoder::encode_piece(std::string_view piece, std::vector<TokenId>& out) {
    if (piece.size() == 1) {
        out.push_back(tokenizer_->merges_.byte_token(static_cast<uint8_t>(piece[0])));
        return;
    }
    if (!tokenizer_->whole_pieces_.empty()) {
        if (const auto token = tokenizer_->whole_pieces_.find(piece); token != tokenizer_->whole_pieces_.end()) {
            out.push_back(token->second);
            return;
        }
    }
    if (piece.size() > kMaxSeenPieceBytes) {
        merger_.encode(piece, out);
        return;
    }
    if (const auto seen = seen_.find(piece); seen != seen_.end()) {
        const auto begin = seen_tokens_.begin() + seen->second.begin;
        out.insert(out.end(), begin, begin + seen->second.count);
        return;
    }
    const size_t before = out.size();
    merger_.encode(piece, out);
    if (seen_.size() >= kMaxSeenPieces) return;
    const Range range{static_cast<uint32_t>(seen_tokens_.size()), static_cast<uint32_t>(out.size() - before)};
    seen_tokens_.insert(seen_tokens_.end(), out.begin() + static_cast<std::ptrdiff_t>(before), out.end());
    seen_.emplace(piece, range);
}

}  // namespace strobe::gpt
