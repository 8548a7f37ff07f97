// Any bytes as a vocabulary: refused with a FileError, or a tokenizer that gives any text back. The first byte chooses the
// format; text to encode follows after the last 0xFF.
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

/// Few files of a fuzzer cover all 256 bytes, without which nothing behind the reader is reached: it lends them.
std::string with_all_bytes(std::string_view tokens, bool tiktoken) {
    static const auto lent = [] {
        std::pair<std::string, std::string> out;
        for (int byte = 0; byte < 256; ++byte) {
            const std::string one(1, static_cast<char>(byte));
            out.first += base64_encode(one) + " " + std::to_string(byte) + "\n";
            out.second += nlohmann::json(bytes_to_printable(one)).dump() + ":" + std::to_string(byte) + ",";
        }
        return out;
    }();
    return tiktoken ? lent.first + std::string(tokens) : "{" + lent.second + std::string(tokens);
}

Vocabulary parse(uint8_t format, std::string_view text) {
    switch (format % 5) {
        case 0: return parse_tokenizer_json(text, "tokenizer.json");
        case 1: return parse_tiktoken_vocabulary(text, "x.tiktoken");
        case 2: return parse_tiktoken_vocabulary(with_all_bytes(text, true), "x.tiktoken");
        default: {
            const size_t cut = std::min(text.find('\1'), text.size());
            const std::string_view merges = text.substr(std::min(cut + 1, text.size()));
            const std::string vocab = format % 5 == 3 ? std::string(text.substr(0, cut)) : with_all_bytes(text.substr(0, cut), false);
            return parse_gpt2_vocabulary(vocab, "vocab.json", merges, "merges.txt");
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
