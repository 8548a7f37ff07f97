#include "gpt/tokenizer/byte_alphabet.hpp"

#include "gpt/text/utf8.hpp"

namespace strobe::gpt {
namespace {

constexpr bool prints(int byte) {
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

struct Alphabet {
    std::array<uint8_t, 256> order{};           // rank of the printable character -> byte
    std::array<char32_t, 256> character{};      // byte -> printable character
    std::array<int16_t, 0x100 + 68> byte_of{};  // printable character -> byte, -1: none

    constexpr Alphabet() {
        byte_of.fill(-1);
        size_t rank = 0;
        for (int byte = 0; byte < 256; ++byte) {
            if (prints(byte)) {
                order[rank++] = static_cast<uint8_t>(byte);
                character[static_cast<size_t>(byte)] = static_cast<char32_t>(byte);
            }
        }
        char32_t next = 0x100;
        for (int byte = 0; byte < 256; ++byte) {
            if (!prints(byte)) {
                order[rank++] = static_cast<uint8_t>(byte);
                character[static_cast<size_t>(byte)] = next++;
            }
        }
        for (size_t byte = 0; byte < 256; ++byte) byte_of[character[byte]] = static_cast<int16_t>(byte);
    }
};

constexpr Alphabet kAlphabet;

}  // namespace

const std::array<uint8_t, 256>& printable_byte_order() { return kAlphabet.order; }

std::string bytes_to_printable(std::string_view bytes) {
    std::string out;
    out.reserve(bytes.size() * 2);
    for (const char byte : bytes) append_utf8(out, kAlphabet.character[static_cast<uint8_t>(byte)]);
    return out;
}

std::optional<std::string> printable_to_bytes(std::string_view printable) {
    std::string out;
    out.reserve(printable.size());
    while (!printable.empty()) {
        const DecodedCharacter c = decode_utf8(printable);
        if (c.length == 0 || c.code_point >= kAlphabet.byte_of.size() || kAlphabet.byte_of[c.code_point] < 0) return {};
        out.push_back(static_cast<char>(kAlphabet.byte_of[c.code_point]));
        printable.remove_prefix(c.length);
    }
    return out;
}

}  // namespace strobe::gpt
