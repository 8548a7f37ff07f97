// strobe generate: text from a checkpoint.
#include "gpt/generate/generate.hpp"

#include <cstdio>
#include <iterator>
#include <memory>

#include <CLI/CLI.hpp>
#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "gpt/text/utf8.hpp"
#include "gpt_commands.hpp"

namespace strobe::gpt {

namespace {

struct Arguments {
    GenerateOptions options;
    std::string device = "cpu", precision;
    bool no_cache = false, endless = false, json = false;
};

/// Fills what follows from other options.
GenerateOptions complete(const Arguments& a) {
    GenerateOptions o = a.options;
    o.cache = !a.no_cache;
    o.stop_at_end_of_text = !a.endless;
    o.device = device_from_string(a.device);
    o.precision = precision_for(o.device, a.precision);
    return o;
}

void run_generate(const GenerateOptions& options, bool json) {
    if (json) {
        const GenerateResult r = generate(options, {});
        const nlohmann::ordered_json out{{"prompt", replace_invalid_utf8(options.prompt)},
                                         {"text", replace_invalid_utf8(r.text)},
                                         {"tokens", r.tokens},
                                         {"prompt_tokens", r.prompt_tokens},
                                         {"prompt_seconds", r.prompt_seconds},
                                         {"decode_seconds", r.decode_seconds},
                                         {"tokens_per_second", r.tokens_per_second()}};
        fmt::print("{}\n", out.dump(2));
        return;
    }
    const GenerateResult r = generate(options, [](std::string_view text) {
        std::fwrite(text.data(), 1, text.size(), stdout);
        std::fflush(stdout);
    });
    fmt::print("\n");
    std::fflush(stdout);
    fmt::print(stderr, "[{} prompt tokens in {:.3f} s; {} tokens, {:.1f} tokens/s]\n", r.prompt_tokens, r.prompt_seconds,
               r.tokens.size(), r.tokens_per_second());
}

}  // namespace

void add_generate_command(CLI::App& app) {
    CLI::App* command = app.add_subcommand("generate", "Sample text from a checkpoint");
    command->option_defaults()->take_last();
    const auto a = std::make_shared<Arguments>();
    GenerateOptions& o = a->options;
    command->add_option("--checkpoint", o.checkpoint, "A checkpoint's folder, or a run's: its newest")->required();
    command->add_option("--prompt", o.prompt, "The text to go on from (default: a new document)");
    command->add_option("--tokens", o.max_tokens, "How many tokens to write")->capture_default_str();
    command->add_option("--temperature", o.sampling.temperature, "0: always the likeliest token")->capture_default_str();
    command->add_option("--top-k", o.sampling.top_k, "Only the k likeliest tokens; 0: all")->capture_default_str();
    command->add_option("--top-p", o.sampling.top_p, "Only the likeliest tokens that together reach this probability")
        ->capture_default_str();
    command->add_option("--seed", o.sampling.seed, "Of the random numbers: the same seed gives the same text")
        ->capture_default_str();
    command->add_flag("--no-cache", a->no_cache, "Read the whole text again for every token (to compare)");
    command->add_flag("--endless", a->endless, "Go on behind an end-of-text token");
    command->add_option("--threads", o.threads, "0: as many as the process may use")->capture_default_str();
    command->add_option("--device", a->device, "cpu or cuda")
        ->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
    command->add_option("--precision", a->precision, "bf16 or fp32 (default: bf16 on cuda, fp32 on the cpu)")
        ->check(CLI::IsMember({"bf16", "fp32"}));
    command->add_flag("--json", a->json, "One JSON object on standard output instead of streamed text");
    command->callback([a] { run_generate(complete(*a), a->json); });
}

}  // namespace strobe::gpt
