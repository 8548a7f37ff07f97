// Cuts text into the pieces inside which BPE merges, by the regular expression that belongs to a vocabulary.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace strobe::gpt {

// The published patterns, in the notation of their vocabularies.
extern const std::string_view kGpt2Pattern;    // GPT-2, r50k_base, p50k_base
extern const std::string_view kCl100kPattern;  // cl100k_base, Llama 3
extern const std::string_view kO200kPattern;   // o200k_base

/// A compiled pattern. Immutable; one may serve many threads, each through its own PieceCursor.
class Splitter {
public:
    /// An empty pattern leaves a text in one piece. Throws std::invalid_argument on a pattern that does not compile.
    explicit Splitter(std::string_view pattern);
    Splitter(Splitter&&) noexcept;
    Splitter& operator=(Splitter&&) noexcept;
    ~Splitter();

    const std::string& pattern() const { return pattern_; }

private:
    friend class PieceCursor;
    struct Compiled;
    std::string pattern_;
    std::unique_ptr<Compiled> compiled_;
};

/// Walks over the pieces of one text after another. The pieces of a text, put together, are the text, byte for byte:
/// what the pattern does not match, and every maximal run of bytes that are not UTF-8, are pieces of their own.
class PieceCursor {
public:
    explicit PieceCursor(const Splitter& splitter);
    PieceCursor(const PieceCursor&) = delete;
    PieceCursor& operator=(const PieceCursor&) = delete;
    ~PieceCursor();

    void start(std::string_view text);
    /// The next piece, never empty before the end; empty at the end.
    std::string_view next();

private:
    struct State;
    std::string_view next_valid();

    const Splitter::Compiled* compiled_;
    std::unique_ptr<State> state_;
    std::string_view rest_;      // not yet looked at, beyond the current valid stretch
    std::string_view stretch_;   // the current maximal stretch of valid UTF-8
    size_t position_ = 0;        // in stretch_
    size_t match_end_ = 0;       // a match found beyond position_: the gap before it comes first
};

}  // namespace strobe::gpt
