// strobe checkpoint: look at one, check it, take the model out of a run.
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "commands.hpp"
#include "gpt/checkpoint/checkpoint.hpp"
#include "gpt/checkpoint/hf_config.hpp"
#include "gpt_commands.hpp"

namespace strobe::gpt {
namespace {

namespace fs = std::filesystem;

struct CheckpointArguments {
    std::string source, out;
    bool json = false;
};

Checkpoint open_and_warn(const std::string& source) {
    std::vector<std::string> refused;
    Checkpoint checkpoint = open_checkpoint(source, &refused);
    for (const std::string& problem : refused) fmt::print(stderr, "strobe: passed over a damaged checkpoint: {}\n", problem);
    return checkpoint;
}

void run_show(const CheckpointArguments& a) {
    const Checkpoint checkpoint = open_and_warn(a.source);
    nlohmann::ordered_json report{{"folder", checkpoint.folder().string()},
                                  {"architecture", to_string(checkpoint.config().architecture)},
                                  {"parameters", checkpoint.layout().num_elements()},
                                  {"tokenizer", checkpoint.has_tokenizer()},
                                  {"resumable", checkpoint.state().has_value()}};
    if (checkpoint.state()) {
        const TrainingState& state = *checkpoint.state();
        report["step"] = state.step;
        report["epoch"] = state.data_position.epoch;
        report["row"] = state.data_position.next_row;
    }
    if (a.json) {
        report["config"] = to_hf_config(checkpoint.config(), -1);
        fmt::print("{}\n", report.dump(2));
        return;
    }
    for (const auto& [name, value] : report.items()) {
        fmt::print("{:<14}{}\n", name, value.is_string() ? value.get<std::string>() : value.dump());
    }
}

void run_export(const CheckpointArguments& a) {
    const Checkpoint checkpoint = open_and_warn(a.source);
    const fs::path out = a.out;
    if (fs::exists(out) && (!fs::is_directory(out) || !fs::is_empty(out))) {
        throw cli::Exit{cli::kExitUsage, fmt::format("{} exists and is not an empty folder", a.out)};
    }
    const ParameterArena values(checkpoint.layout());
    checkpoint.read_values(values);
    std::optional<Tokenizer> tokenizer;
    if (checkpoint.has_tokenizer()) tokenizer.emplace(checkpoint.tokenizer());
    fs::create_directories(out);
    write_checkpoint_files(out, {.config = &checkpoint.config(),
                                 .layout = &checkpoint.layout(),
                                 .values = &values,
                                 .tokenizer = tokenizer ? &*tokenizer : nullptr});
    fmt::print("wrote {} parameters to {}\n", checkpoint.layout().num_elements(), a.out);
}

}  // namespace

void add_checkpoint_command(CLI::App& app) {
    static CheckpointArguments a;
    CLI::App* command = app.add_subcommand("checkpoint", "Check, show and export checkpoints");
    command->require_subcommand(1);
    constexpr const char* kSource = "A checkpoint, a run's folder (its newest checkpoint), or a Hugging Face model folder";

    CLI::App* show = command->add_subcommand("show", "Check every file against its record and say what is in it");
    show->add_option("source", a.source, kSource)->required();
    show->add_flag("--json", a.json, "Report as JSON");
    show->callback([] { run_show(a); });

    CLI::App* export_model =
        command->add_subcommand("export", "Write model and tokenizer alone, fp32, as transformers load them");
    export_model->add_option("source", a.source, kSource)->required();
    export_model->add_option("out", a.out, "A new or empty folder")->required();
    export_model->callback([] { run_export(a); });
}

}  // namespace strobe::gpt
