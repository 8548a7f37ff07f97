#include "gpt/tokenizer/base64.hpp"

#include <cstdint>

namespace strobe::gpt {
namespace {

constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

int digit_value(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    if (c == '+') return 62;
    if (c == '/') return 63;
    return -1;
}

}  // namespace

std::string base64_encode(std::string_view bytes) {
    std::string out;
    for (size_t i = 0; i < bytes.size(); i += 3) {
        const std::string_view group = bytes.substr(i, 3);
        uint32_t bits = 0;
        for (size_t k = 0; k < 3; ++k) bits = bits << 8 | (k < group.size() ? static_cast<uint8_t>(group[k]) : 0u);
        for (size_t k = 0; k < 4; ++k) out += k <= group.size() ? kDigits[bits >> (18 - 6 * k) & 63] : '=';
    }
    return out;
}

std::optional<std::string> base64_decode(std::string_view text) {
    if (text.size() % 4 != 0) return {};
    const size_t padding = text.ends_with("==") ? 2 : text.ends_with("=") ? 1 : 0;
    std::string out;
    for (size_t i = 0; i < text.size(); i += 4) {
        const size_t digits = i + 4 == text.size() ? 4 - padding : 4;
        uint32_t bits = 0;
        for (size_t k = 0; k < 4; ++k) {
            const int value = k < digits ? digit_value(text[i + k]) : 0;
            if (value < 0) return {};
            bits = bits << 6 | static_cast<uint32_t>(value);
        }
        for (size_t k = 0; k + 1 < digits; ++k) out += static_cast<char>(bits >> (16 - 8 * k) & 0xFF);
        // The bits that padding leaves over must be zero, or two texts would decode alike.
        if (digits < 4 && (bits & ((1u << (8 * (4 - digits))) - 1)) != 0) return {};
    }
    return out;
}

}  // namespace strobe::gpt
