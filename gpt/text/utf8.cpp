#include "gpt/text/utf8.hpp"

#include <algorithm>
#include <cstring>

namespace strobe::gpt {
namespace {

constexpr uint64_t kHighBits = 0x8080808080808080ull;

/// What a lead byte promises; length 0 for a byte that leads nothing. The second byte's range excludes overlong forms,
/// surrogates and code points above U+10FFFF.
struct Lead {
    size_t length;
    uint8_t second_low, second_high;
};

constexpr Lead lead_of(uint8_t byte) {
    if (byte < 0x80) return {1, 0, 0};
    if (byte < 0xC2) return {0, 0, 0};
    if (byte < 0xE0) return {2, 0x80, 0xBF};
    if (byte == 0xE0) return {3, 0xA0, 0xBF};
    if (byte == 0xED) return {3, 0x80, 0x9F};
    if (byte < 0xF0) return {3, 0x80, 0xBF};
    if (byte == 0xF0) return {4, 0x90, 0xBF};
    if (byte < 0xF4) return {4, 0x80, 0xBF};
    if (byte == 0xF4) return {4, 0x80, 0x8F};
    return {0, 0, 0};
}

/// How many bytes at the start of `text` can begin (or are) a character, and whether that character is complete.
struct Start {
    size_t length;
    bool complete;
    bool cut_short;  // the text ended before the character did
};

Start start_of(std::string_view text) {
    if (text.empty()) return {0, false, false};
    const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
    const Lead lead = lead_of(byte(0));
    if (lead.length == 0) return {0, false, false};
    for (size_t i = 1; i < lead.length; ++i) {
        if (i == text.size()) return {i, false, true};
        const uint8_t low = i == 1 ? lead.second_low : 0x80;
        const uint8_t high = i == 1 ? lead.second_high : 0xBF;
        if (byte(i) < low || byte(i) > high) return {i, false, false};
    }
    return {lead.length, true, false};
}

}  // namespace

size_t valid_utf8_prefix(std::string_view text) {
    size_t at = 0;
    while (at < text.size()) {
        uint64_t word;
        if (text.size() - at >= sizeof word) {
            std::memcpy(&word, text.data() + at, sizeof word);
            if ((word & kHighBits) == 0) {
                at += sizeof word;
                continue;
            }
        }
        const Start start = start_of(text.substr(at, 4));
        if (!start.complete) return at;
        at += start.length;
    }
    return at;
}

size_t invalid_utf8_prefix(std::string_view text) {
    size_t at = 0;
    while (at < text.size() && !start_of(text.substr(at, 4)).complete) ++at;
    return at;
}

size_t complete_utf8_prefix(std::string_view text) {
    const size_t window = std::min<size_t>(3, text.size());
    for (size_t back = 1; back <= window; ++back) {
        const size_t at = text.size() - back;
        if (start_of(text.substr(at)).cut_short) return at;
    }
    return text.size();
}

std::string replace_invalid_utf8(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    while (!text.empty()) {
        const size_t valid = valid_utf8_prefix(text);
        out.append(text.substr(0, valid));
        text.remove_prefix(valid);
        if (text.empty()) break;
        append_utf8(out, 0xFFFD);
        text.remove_prefix(std::max<size_t>(1, start_of(text).length));
    }
    return out;
}

void append_utf8(std::string& out, char32_t c) {
    const auto continuation = [&](int shift) { out.push_back(static_cast<char>(0x80 | (c >> shift & 0x3F))); };
    if (c < 0x80) {
        out.push_back(static_cast<char>(c));
    } else if (c < 0x800) {
        out.push_back(static_cast<char>(0xC0 | c >> 6));
        continuation(0);
    } else if (c < 0x10000) {
        out.push_back(static_cast<char>(0xE0 | c >> 12));
        continuation(6);
        continuation(0);
    } else {
        out.push_back(static_cast<char>(0xF0 | c >> 18));
        continuation(12);
        continuation(6);
        continuation(0);
    }
}

DecodedCharacter decode_utf8(std::string_view text) {
    const Start start = start_of(text);
    if (!start.complete) return {0, 0};
    const auto byte = [&](size_t i) { return static_cast<char32_t>(static_cast<uint8_t>(text[i])); };
    switch (start.length) {
        case 1: return {byte(0), 1};
        case 2: return {(byte(0) & 0x1F) << 6 | (byte(1) & 0x3F), 2};
        case 3: return {(byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F), 3};
        default:
            return {(byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F), 4};
    }
}

}  // namespace strobe::gpt
