// UTF-8 against a decoder written the slow way, XXH64 against published values, base64 and the byte alphabet both ways.
#include <random>
#include <set>

#include <gtest/gtest.h>

#include "gpt/io/xxhash64.hpp"
#include "gpt/text/utf8.hpp"
#include "gpt/tokenizer/base64.hpp"
#include "gpt/tokenizer/byte_alphabet.hpp"

namespace strobe::gpt {
namespace {

/// Length of the valid character at the start of `text`, by trying all code points' own encodings.
size_t slow_character_length(std::string_view text) {
    for (size_t length = 1; length <= 4 && length <= text.size(); ++length) {
        const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
        char32_t c = length == 1 ? byte(0) : byte(0) & (0x7Fu >> length);
        for (size_t i = 1; i < length; ++i) c = c << 6 | (byte(i) & 0x3F);
        if (c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) continue;
        std::string encoded;
        append_utf8(encoded, c);
        if (encoded == text.substr(0, length)) return length;
    }
    return 0;
}

TEST(Utf8, EveryCodePointRoundTrips) {
    for (char32_t c = 0; c <= 0x10FFFF; ++c) {
        std::string text;
        append_utf8(text, c);
        const bool surrogate = c >= 0xD800 && c < 0xE000;
        const DecodedCharacter decoded = decode_utf8(text);
        ASSERT_EQ(decoded.length, surrogate ? 0 : text.size()) << std::hex << static_cast<uint32_t>(c);
        if (!surrogate) {
            ASSERT_EQ(decoded.code_point, c);
        }
        ASSERT_EQ(valid_utf8_prefix(text), surrogate ? 0 : text.size());
    }
}

TEST(Utf8, AgreesWithTheSlowDecoderOnRandomBytes) {
    std::mt19937 random(1);
    // Bytes that matter: borders of the lead and continuation ranges.
    const std::string alphabet = "a\x7F\x80\x8F\x90\x9F\xA0\xBF\xC0\xC1\xC2\xDF\xE0\xE1\xEC\xED\xEE\xEF\xF0\xF1\xF3\xF4\xF5\xFF";
    for (int round = 0; round < 200000; ++round) {
        std::string text;
        for (size_t i = random() % 12; i > 0; --i) text += alphabet[random() % alphabet.size()];
        size_t valid = 0;
        while (valid < text.size()) {
            const size_t length = slow_character_length(std::string_view(text).substr(valid));
            if (length == 0) break;
            valid += length;
        }
        ASSERT_EQ(valid_utf8_prefix(text), valid);
        size_t invalid = 0;
        while (invalid < text.size() && slow_character_length(std::string_view(text).substr(invalid)) == 0) ++invalid;
        ASSERT_EQ(invalid_utf8_prefix(text), invalid);
        const std::string replaced = replace_invalid_utf8(text);
        ASSERT_EQ(valid_utf8_prefix(replaced), replaced.size());
        if (valid == text.size()) {
            ASSERT_EQ(replaced, text);
        }
    }
}

TEST(Utf8, AnUnfinishedLastCharacterWaits) {
    const std::string text = "a\u00e9\u20ac\U0001F600";
    size_t shown_before = 0;
    for (size_t length = 0; length <= text.size(); ++length) {
        const size_t shown = complete_utf8_prefix(std::string_view(text).substr(0, length));
        EXPECT_EQ(valid_utf8_prefix(std::string_view(text).substr(0, shown)), shown);
        EXPECT_GE(shown, shown_before);
        shown_before = shown;
    }
    EXPECT_EQ(shown_before, text.size());
    EXPECT_EQ(complete_utf8_prefix("ab\xFF"), 3u) << "a byte that can start nothing is not waited for";
    EXPECT_EQ(complete_utf8_prefix("ab\xE2\x82"), 2u);
}

TEST(XxHash64, MatchesPublishedValues) {
    EXPECT_EQ(xxhash64(""), 0xEF46DB3751D8E999ull);
    EXPECT_EQ(xxhash64("a"), 0xD24EC4F1A98C6E5Bull);
    EXPECT_EQ(xxhash64("abc"), 0x44BC2CF5AD770999ull);
    EXPECT_EQ(xxhash64("Nobody inspects the spammish repetition"), 0xFBCEA83C8A378BF1ull);
}

TEST(XxHash64, DoesNotDependOnHowTheBytesArrive) {
    std::mt19937 random(2);
    std::string text(1000, ' ');
    for (char& c : text) c = static_cast<char>(random());
    for (int round = 0; round < 200; ++round) {
        const std::string_view part = std::string_view(text).substr(0, random() % text.size());
        XxHash64 hash;
        for (size_t at = 0; at < part.size();) {
            const size_t length = std::min<size_t>(random() % 70, part.size() - at);
            hash.update(part.substr(at, length));
            at += length;
        }
        ASSERT_EQ(hash.digest(), xxhash64(part));
    }
}

TEST(Base64, RoundTripsAndRefusesWhatNoEncoderWrites) {
    std::mt19937 random(3);
    for (size_t length = 0; length < 200; ++length) {
        std::string bytes(length, ' ');
        for (char& c : bytes) c = static_cast<char>(random());
        EXPECT_EQ(base64_decode(base64_encode(bytes)), bytes);
    }
    EXPECT_EQ(base64_encode("Ma"), "TWE=");
    for (const char* bad : {"T", "TWE", "TWE==", "TW=E", "T===", "TWF=", "TW F", "TWE=TWE=", "=", "===="}) {
        EXPECT_FALSE(base64_decode(bad)) << bad;
    }
}

TEST(ByteAlphabet, IsGpt2s) {
    EXPECT_EQ(printable_byte_order()[0], '!');
    EXPECT_EQ(printable_byte_order()[93], '~');
    EXPECT_EQ(printable_byte_order()[188], 0);
    EXPECT_EQ(bytes_to_printable(" \n\xAD"), "\u0120\u010a\u0143");
    std::set<uint8_t> bytes(printable_byte_order().begin(), printable_byte_order().end());
    EXPECT_EQ(bytes.size(), 256u);
    for (int byte = 0; byte < 256; ++byte) {
        const std::string one(1, static_cast<char>(byte));
        EXPECT_EQ(printable_to_bytes(bytes_to_printable(one)), one);
    }
    EXPECT_FALSE(printable_to_bytes(" "));
    EXPECT_FALSE(printable_to_bytes("\u0144"));
    EXPECT_FALSE(printable_to_bytes("\xFF"));
}

}  // namespace
}  // namespace strobe::gpt
