// Any bytes as a vocabulary: refused with a FileError, or a tokenizer that gives any text back. The first byte chooses the
// format and whether the file is as given or the fuzzer lends the 256 tokens without which nothing behind the reader is
// reached; text to encode follows after the last 0xFF.
#include <algorithm>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/tokenizer/base64.hpp"
#include "gpt/tokenizer/byte_alphabet.hpp"
#include "gpt/tokenizer/tokenizer.hpp"
#include "gpt/tokenizer/vocabulary_files.hpp"

namespace {

using namespace strobe::gpt;

/// The 256 bytes as tokens 0 to 255, as lines of a .tiktoken file and as entries of a JSON vocabulary.
struct LentTokens {
    std::string tiktoken, json;

    LentTokens() {
        for (int byte = 0; byte < 256; ++byte) {
            const std::string one(1, static_cast<char>(byte));
            tiktoken += base64_encode(one) + " " + std::to_string(byte) + "\n";
            json += (byte ? "," : "") + nlohmann::json(bytes_to_printable(one)).dump() + ":" + std::to_string(byte);
        }
    }
};

/// What stands before the next '\1', which is removed with it.
std::string take_part(std::string_view& text) {
    const size_t cut = std::min(text.find('\1'), text.size());
    const std::string part(text.substr(0, cut));
    text.remove_prefix(std::min(cut + 1, text.size()));
    return part;
}

Vocabulary parse(uint8_t format, std::string_view text) {
    static const LentTokens lent;
    switch (format % 6) {
        case 0: return parse_tokenizer_json(text, "tokenizer.json");
        case 1: {
            const std::string tokens = take_part(text), merges = take_part(text), splitting = take_part(text), added = take_part(text);
            return parse_tokenizer_json(R"({"model":{"type":"BPE","vocab":{)" + lent.json + tokens + R"(},"merges":[)" + merges +
                                            R"(]},"pre_tokenizer":)" + splitting + R"(,"added_tokens":[)" + added + "]}",
                                        "tokenizer.json");
        }
        case 2: return parse_tiktoken_vocabulary(text, "x.tiktoken");
        case 3: return parse_tiktoken_vocabulary(lent.tiktoken + std::string(text), "x.tiktoken");
        default: {
            const std::string tokens = take_part(text);
            return parse_gpt2_vocabulary(format % 6 == 4 ? tokens : "{" + lent.json + tokens + "}", "vocab.json", text, "merges.txt");
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const std::string_view all(reinterpret_cast<const char*>(data) + 1, size - 1);
    const size_t cut = all.rfind('\xFF');
    const std::string_view file = all.substr(0, cut);
    const std::string_view text = cut == std::string_view::npos ? std::string_view("some text, 123 \xC3\x28") : all.substr(cut + 1);
    try {
        const Tokenizer tokenizer(parse(data[0], file));
        // A pattern from a file may run into PCRE2's limits on a text; that is an answer too.
        try {
            if (tokenizer.decode(tokenizer.encode(text)) != text) std::abort();
            if (tokenizer.decode(tokenizer.encode_with_special(text)) != text) std::abort();
        } catch (const std::runtime_error&) {
        }
    } catch (const FileError&) {
    }
    return 0;
}
