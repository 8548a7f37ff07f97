#include "gpt/tokenizer/vocabulary.hpp"

#include <array>
#include <stdexcept>

#include <fmt/core.h>

#include "gpt/io/xxhash64.hpp"

namespace strobe::gpt {

void Vocabulary::validate() const {
    if (tokens.size() > kMaxVocabSize) {
        throw std::invalid_argument(fmt::format("vocabulary has {} ids, the limit is {}", tokens.size(), kMaxVocabSize));
    }
    std::array<bool, 256> has_byte{};
    for (size_t id = 0; id < tokens.size(); ++id) {
        if (tokens[id].size() > kMaxTokenBytes) {
            throw std::invalid_argument(fmt::format("token {} has {} bytes, the limit is {}", id, tokens[id].size(), kMaxTokenBytes));
        }
        if (tokens[id].size() == 1) has_byte[static_cast<uint8_t>(tokens[id][0])] = true;
    }
    for (size_t byte = 0; byte < 256; ++byte) {
        if (!has_byte[byte]) throw std::invalid_argument(fmt::format("byte 0x{:02x} has no token of its own", byte));
    }
    const auto is_token = [&](TokenId id) {
        return id >= 0 && static_cast<size_t>(id) < tokens.size() && !tokens[static_cast<size_t>(id)].empty();
    };
    for (const Merge& m : merges) {
        if (!is_token(m.left) || !is_token(m.right) || !is_token(m.result)) {
            throw std::invalid_argument(fmt::format("merge ({}, {}) -> {} names an id without a token", m.left, m.right, m.result));
        }
        const std::string& left = tokens[static_cast<size_t>(m.left)];
        const std::string& right = tokens[static_cast<size_t>(m.right)];
        const std::string& result = tokens[static_cast<size_t>(m.result)];
        if (result.size() != left.size() + right.size() || !result.starts_with(left) || !result.ends_with(right)) {
            throw std::invalid_argument(fmt::format("merge ({}, {}) -> {} does not spell its result", m.left, m.right, m.result));
        }
    }
    std::vector<bool> is_special(tokens.size());
    for (const SpecialToken& special : specials) {
        const auto id = static_cast<size_t>(special.id);
        if (special.text.empty()) throw std::invalid_argument(fmt::format("special token {} is empty", special.id));
        if (special.id < 0 || id >= tokens.size()) {
            throw std::invalid_argument(fmt::format("special token '{}' has id {}, the vocabulary ends at {}", special.text,
                                                    special.id, tokens.size()));
        }
        if (!tokens[id].empty() || is_special[id]) {
            throw std::invalid_argument(fmt::format("special token '{}' shares id {} with another", special.text, special.id));
        }
        is_special[id] = true;
    }
}

uint64_t Vocabulary::fingerprint() const {
    XxHash64 hash;
    const auto add = [&](std::string_view text) {
        hash.update(uint64_t{text.size()});
        hash.update(text);
    };
    hash.update(uint64_t{ranks_are_ids} << 1 | uint64_t{whole_piece_first});
    add(pattern);
    hash.update(uint64_t{tokens.size()});
    for (const std::string& token : tokens) add(token);
    hash.update(uint64_t{merges.size()});
    for (const Merge& m : merges) {
        for (const int32_t field : {m.left, m.right, m.result, m.rank}) hash.update(static_cast<uint64_t>(field));
    }
    for (const SpecialToken& special : specials) {
        add(special.text);
        hash.update(static_cast<uint64_t>(special.id));
    }
    return hash.digest();
}

Vocabulary byte_vocabulary() {
    Vocabulary vocabulary;
    for (int byte = 0; byte < 256; ++byte) vocabulary.tokens.emplace_back(1, static_cast<char>(byte));
    vocabulary.tokens.emplace_back();
    vocabulary.specials.push_back({std::string(kEndOfText), 256});
    return vocabulary;
}

}  // namespace strobe::gpt
