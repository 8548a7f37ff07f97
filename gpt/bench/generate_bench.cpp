// Times decoding on random weights behind texts of several lengths, with the key-value cache and without (then a token
// costs what reading the whole text costs), and says where the time of a token goes, as JSON.
//   gpt_generate_bench gpt2|llama layers hidden heads vocab tokens threads|cuda length...
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <nlohmann/json.hpp>

#include "gpt/generate/decoder.hpp"
#include "gpt/generate/token_sampler.hpp"
#include "gpt/host_view.hpp"
#include "gpt/random.hpp"

namespace {

using namespace strobe::gpt;

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

nlohmann::ordered_json time_at(const Weights& weights, Backend& backend, int64_t length, int64_t tokens) {
    Random random(1);
    std::vector<int32_t> text;
    for (int64_t i = 0; i < length; ++i)
        text.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(weights.config.vocab_size))));
    Decoder decoder(weights, backend, length + tokens);
    TokenSampler sampler({.temperature = 0.0f});

    auto start = std::chrono::steady_clock::now();
    std::span<const float> logits = decoder.feed(text);
    const double prompt_seconds = seconds_since(start);

    // A GPU's marks around each operator cost time: half of the tokens are timed, the others by operator.
    OpTimes* const times = backend.exec().times;
    const auto decode = [&](int64_t count, OpTimes* clock) {
        backend.exec().times = clock;
        std::vector<double> seconds;
        for (int64_t i = 0; i < count; ++i) {
            start = std::chrono::steady_clock::now();
            const int32_t token = sampler.sample(logits);
            logits = decoder.feed({&token, 1});
            seconds.push_back(seconds_since(start));
        }
        return seconds;
    };
    std::vector<double> seconds = decode(tokens - tokens / 2, nullptr);
    backend.times().clear();
    decode(tokens / 2, times);
    backend.exec().times = times;
    nlohmann::ordered_json operators;
    OpTimes& profiled = backend.times();
    for (int kind = 0; kind < static_cast<int>(OpKind::count); ++kind) {
        const OpTimes::Entry& e = profiled[static_cast<OpKind>(kind)];
        if (e.calls > 0) {
            operators[std::string(to_string(static_cast<OpKind>(kind)))] = e.seconds / static_cast<double>(tokens / 2);
        }
    }
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2];

    decoder.clear();
    start = std::chrono::steady_clock::now();
    decoder.feed(text);
    const double uncached = std::min(prompt_seconds, seconds_since(start));
    return {{"length", length},
            {"prompt_tokens_per_second", static_cast<double>(length) / uncached},
            {"tokens_per_second", 1.0 / median},
            {"tokens_per_second_without_cache", 1.0 / uncached},
            {"cache_bytes", 2 * weights.config.num_layers * length * weights.config.kv_size() * static_cast<int64_t>(size_of(weights.precision))},
            {"seconds_per_token", operators}};
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 9) {
        std::fprintf(stderr, "usage: %s gpt2|llama layers hidden heads vocab tokens threads|cuda length...\n", argv[0]);
        return 2;
    }
    try {
        const auto number = [&](int i) { return static_cast<int64_t>(std::atoll(argv[i])); };
        const int64_t layers = number(2), hidden = number(3), heads = number(4), vocab = number(5), tokens = number(6);
        int64_t context = 0;
        for (int i = 8; i < argc; ++i) context = std::max(context, number(i) + tokens);
        const ModelConfig config = architecture_from_string(argv[1]) == Architecture::gpt2
                                       ? gpt2_config(layers, hidden, heads, context, vocab)
                                       : llama_config(layers, hidden, heads, heads, context, vocab);
        const Device device = std::strcmp(argv[7], "cuda") == 0 ? Device::cuda : Device::cpu;
        Backend backend(device, device == Device::cpu ? static_cast<int>(number(7)) : 0);
        const Weights weights(config, backend.memory(), precision_for(device, ""));
        fill_by_host(weights, [&](const ParameterArena& values) { initialize(weights.layout, config, 1, values); });
        nlohmann::ordered_json out{{"architecture", argv[1]},
                                   {"parameters", config.num_parameters()},
                                   {"device", backend.runtime().name()},
                                   {"precision", to_string(weights.precision)},
                                   {"threads", backend.team().size()},
                                   {"lengths", nlohmann::ordered_json::array()}};
        for (int i = 8; i < argc; ++i) out["lengths"].push_back(time_at(weights, backend, number(i), tokens));
        std::printf("%s\n", out.dump(2).c_str());
        return 0;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
