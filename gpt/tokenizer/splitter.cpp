#include "gpt/tokenizer/splitter.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <utility>

#include "gpt/text/utf8.hpp"
#include "gpt/tokenizer/unicode_additions.hpp"

namespace strobe::gpt {

const std::string_view kGpt2Pattern =
    R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

const std::string_view kCl100kPattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

const std::string_view kO200kPattern =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

namespace {

constexpr size_t kMaxPatternBytes = 8192;

// White_Space of Unicode, which is what \s means where the vocabularies were made. PCRE2's own \s also takes U+180E.
constexpr std::string_view kSpaces =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

/// Rewrites \s, \S and the categories that newer Unicode extended, inside and outside of character classes, into
/// explicit sets.
std::string spell_out_classes(std::string_view pattern) {
    std::string out;
    bool in_class = false;
    for (size_t i = 0; i < pattern.size(); ++i) {
        const char c = pattern[i];
        const auto addition = std::find_if(kUnicodeAdditions.begin(), kUnicodeAdditions.end(), [&](const UnicodeAddition& a) {
            return pattern.substr(i).starts_with(a.property);
        });
        if (addition != kUnicodeAdditions.end()) {
            out.append(in_class ? "" : "[").append(addition->property).append(addition->ranges).append(in_class ? "" : "]");
            i += addition->property.size() - 1;
            continue;
        }
        if (c == '\\' && i + 1 < pattern.size()) {
            const char escaped = pattern[++i];
            if (escaped == 's') {
                out.append(in_class ? "" : "[").append(kSpaces).append(in_class ? "" : "]");
            } else if (escaped == 'S' && !in_class) {
                out.append("[^").append(kSpaces).append("]");
            } else {
                out.append({c, escaped});
            }
            continue;
        }
        if (c == '[' && !in_class) {
            in_class = true;
        } else if (c == ']' && in_class) {
            in_class = false;
        }
        out.push_back(c);
    }
    return out;
}

std::string pcre2_message(int code) {
    char text[256] = {};
    pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(text), sizeof text);
    return text;
}

}  // namespace

struct Splitter::Compiled {
    pcre2_code* code = nullptr;

    explicit Compiled(const std::string& pattern) {
        int error = 0;
        PCRE2_SIZE offset = 0;
        constexpr uint32_t kOptions =
            PCRE2_UTF | PCRE2_UCP | PCRE2_DOLLAR_ENDONLY | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_UTF_CHECK;
        code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), kOptions, &error, &offset, nullptr);
        if (code == nullptr) {
            throw std::invalid_argument("split pattern does not compile at byte " + std::to_string(offset) + ": " +
                                        pcre2_message(error));
        }
        // Where the machine has no JIT, matching falls back to the interpreter by itself.
        pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
    }
    Compiled(const Compiled&) = delete;
    Compiled& operator=(const Compiled&) = delete;
    ~Compiled() { pcre2_code_free(code); }
};

Splitter::Splitter(std::string_view pattern) : pattern_(pattern) {
    if (pattern.empty()) return;
    if (pattern.size() > kMaxPatternBytes) throw std::invalid_argument("split pattern is longer than 8192 bytes");
    if (valid_utf8_prefix(pattern) != pattern.size()) throw std::invalid_argument("split pattern is not valid UTF-8");
    compiled_ = std::make_unique<Compiled>(spell_out_classes(pattern));
}

Splitter::Splitter(Splitter&&) noexcept = default;
Splitter& Splitter::operator=(Splitter&&) noexcept = default;
Splitter::~Splitter() = default;

struct PieceCursor::State {
    pcre2_match_data* match = nullptr;
    pcre2_match_context* context = nullptr;
    pcre2_jit_stack* stack = nullptr;

    explicit State(const pcre2_code* code)
        : match(pcre2_match_data_create_from_pattern(code, nullptr)),
          context(pcre2_match_context_create(nullptr)),
          stack(pcre2_jit_stack_create(size_t{32} << 10, size_t{8} << 20, nullptr)) {
        if (match == nullptr || context == nullptr) throw std::bad_alloc();
        if (stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
    }
    State(const State&) = delete;
    State& operator=(const State&) = delete;
    ~State() {
        pcre2_match_data_free(match);
        pcre2_match_context_free(context);
        pcre2_jit_stack_free(stack);
    }
};

PieceCursor::PieceCursor(const Splitter& splitter) : compiled_(splitter.compiled_.get()) {
    if (compiled_ != nullptr) state_ = std::make_unique<State>(compiled_->code);
}

PieceCursor::~PieceCursor() = default;

void PieceCursor::start(std::string_view text) {
    rest_ = text;
    stretch_ = {};
    position_ = match_end_ = 0;
}

std::string_view PieceCursor::next() {
    if (compiled_ == nullptr) return std::exchange(rest_, {});
    if (position_ == stretch_.size()) {
        if (rest_.empty()) return {};
        stretch_ = rest_.substr(0, valid_utf8_prefix(rest_));
        rest_.remove_prefix(stretch_.size());
        position_ = match_end_ = 0;
        if (stretch_.empty()) {
            const std::string_view piece = rest_.substr(0, invalid_utf8_prefix(rest_));
            rest_.remove_prefix(piece.size());
            return piece;
        }
    }
    return next_valid();
}

std::string_view PieceCursor::next_valid() {
    const size_t begin = position_;
    if (match_end_ > begin) {
        position_ = match_end_;
        return stretch_.substr(begin, position_ - begin);
    }
    // The stretch was validated as a whole, so every start offset is a character border.
    const int result = pcre2_match(compiled_->code, reinterpret_cast<PCRE2_SPTR>(stretch_.data()), stretch_.size(), begin,
                                   PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, state_->match, state_->context);
    size_t match_begin = stretch_.size();
    match_end_ = stretch_.size();
    if (result >= 0) {
        const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(state_->match);
        match_begin = offsets[0];
        match_end_ = offsets[1];
        if (match_begin < begin || match_end_ <= match_begin) {
            throw std::runtime_error("split pattern moves its match backwards (\\K in a look-around?)");
        }
    } else if (result != PCRE2_ERROR_NOMATCH) {
        throw std::runtime_error("split pattern fails on the text: " + pcre2_message(result));
    }
    position_ = match_begin > begin ? match_begin : match_end_;
    return stretch_.substr(begin, position_ - begin);
}

}  // namespace strobe::gpt
