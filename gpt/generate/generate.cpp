#include "gpt/generate/generate.hpp"

#include <algorithm>
#include <chrono>
#include <optional>
#include <stdexcept>

#include <fmt/core.h>

#include "gpt/checkpoint/checkpoint.hpp"
#include "gpt/generate/decoder.hpp"
#include "gpt/host_view.hpp"
#include "gpt/text/utf8.hpp"

namespace strobe::gpt {

namespace {

/// Passes text on as soon as its characters are whole.
class TextStream {
public:
    explicit TextStream(const std::function<void(std::string_view)>& out) : out_(out) {}

    void add(std::string_view bytes) {
        pending_ += bytes;
        const size_t ready = complete_utf8_prefix(pending_);
        if (ready == 0) return;
        if (out_) out_(std::string_view(pending_).substr(0, ready));
        pending_.erase(0, ready);
    }
    void finish() {
        if (out_ && !pending_.empty()) out_(pending_);
        pending_.clear();
    }

private:
    const std::function<void(std::string_view)>& out_;
    std::string pending_;
};

std::vector<int32_t> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt) {
    std::vector<int32_t> tokens;
    if (tokenizer.end_of_text() >= 0) tokens.push_back(tokenizer.end_of_text());
    const std::vector<TokenId> text = tokenizer.encode(tokens.empty() && prompt.empty() ? "\n" : prompt);
    tokens.insert(tokens.end(), text.begin(), text.end());
    return tokens;
}

/// The model behind a growing text: keeps the cache in step with it.
class Reader {
public:
    Reader(const Weights& weights, Backend& backend, int64_t capacity, bool cache)
        : decoder_(weights, backend, capacity), cache_(cache) {}

    /// Logits of the token that follows `text`.
    std::span<const float> read(const std::vector<int32_t>& text) {
        const auto size = static_cast<int64_t>(text.size());
        if (size - begin_ > decoder_.capacity()) {
            begin_ = size - std::max<int64_t>(1, decoder_.capacity() / 2);
            decoder_.clear();
        }
        if (!cache_) decoder_.clear();
        return decoder_.feed(std::span(text).subspan(static_cast<size_t>(begin_ + decoder_.length())));
    }

private:
    Decoder decoder_;
    bool cache_;
    int64_t begin_ = 0;  // what lies before is forgotten
};

}  // namespace

void GenerateOptions::validate() const {
    if (max_tokens < 1) throw std::invalid_argument(fmt::format("tokens is {}, must be 1 or more", max_tokens));
    if (threads < 0 || threads > 1024)
        throw std::invalid_argument(fmt::format("threads is {}, must be between 0 (all) and 1024", threads));
    if (device == Device::cpu && precision != Precision::fp32)
        throw std::invalid_argument(fmt::format("precision is {}, must be fp32 on the cpu", to_string(precision)));
    sampling.validate();
}

GenerateResult generate(const Weights& weights, const Tokenizer& tokenizer, Backend& backend, const GenerateOptions& options,
                        const std::function<void(std::string_view)>& stream) {
    options.validate();
    std::vector<int32_t> text = prompt_tokens(tokenizer, options.prompt);
    const size_t prompt_size = text.size();
    const int64_t wanted = static_cast<int64_t>(prompt_size) + options.max_tokens;
    Reader reader(weights, backend, std::min(weights.config.context_length, wanted), options.cache);
    TokenSampler sampler(options.sampling);
    TextStream out(stream);
    out.add(options.prompt);

    GenerateResult result;
    result.prompt_tokens = static_cast<int64_t>(prompt_size);
    const auto start = std::chrono::steady_clock::now();
    std::optional<std::chrono::steady_clock::time_point> first;
    for (int64_t i = 0; i < options.max_tokens; ++i) {
        // A model may have more rows than its tokenizer has tokens; those beyond mean nothing.
        const std::span<const float> logits = reader.read(text);
        const auto known = std::min(logits.size(), static_cast<size_t>(tokenizer.vocab_size()));
        const int32_t token = sampler.sample(logits.first(known));
        if (!first) first = std::chrono::steady_clock::now();
        if (options.stop_at_end_of_text && token == tokenizer.end_of_text()) break;
        text.push_back(token);
        result.tokens.push_back(token);
        const std::string_view bytes = tokenizer.token_bytes(token);
        result.text += bytes;
        out.add(bytes);
    }
    out.finish();
    result.prompt_seconds = std::chrono::duration<double>(*first - start).count();
    result.decode_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - *first).count();
    return result;
}

GenerateResult generate(const GenerateOptions& options, const std::function<void(std::string_view)>& stream) {
    options.validate();
    const Checkpoint checkpoint = open_checkpoint(options.checkpoint);
    if (!checkpoint.has_tokenizer())
        throw std::invalid_argument(fmt::format("{} holds no tokenizer", checkpoint.folder().string()));
    Backend backend(options.device, options.threads);
    backend.exec().times = nullptr;
    const Weights weights(checkpoint.config(), backend.memory(), options.precision);
    fill_by_host(weights, [&](const ParameterArena& values) { checkpoint.read_values(values); });
    return generate(weights, checkpoint.tokenizer(), backend, options, stream);
}

}  // namespace strobe::gpt
