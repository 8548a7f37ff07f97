// UTF-8 as it really arrives: mostly valid, sometimes not. Nothing here changes a byte unless it says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace strobe::gpt {

/// Length of the longest valid UTF-8 prefix (Unicode table 3-7: no overlong forms, no surrogates, at most U+10FFFF).
size_t valid_utf8_prefix(std::string_view text);

/// Length of the prefix of `text` in which no position starts a valid UTF-8 sequence.
size_t invalid_utf8_prefix(std::string_view text);

/// Length of the prefix that can be shown now: `text` without a last character whose remaining bytes may still come.
size_t complete_utf8_prefix(std::string_view text);

/// `text` with every maximal ill-formed part replaced by U+FFFD.
std::string replace_invalid_utf8(std::string_view text);

void append_utf8(std::string& out, char32_t code_point);

struct DecodedCharacter {
    char32_t code_point;
    size_t length;  // in bytes; 0: the text does not start with a valid character
};

DecodedCharacter decode_utf8(std::string_view text);

}  // namespace strobe::gpt
