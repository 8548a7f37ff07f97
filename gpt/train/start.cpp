#include "gpt/train/start.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace strobe::gpt {

namespace {

Start resume_from(const TrainOptions& asked, Checkpoint checkpoint) {
    if (!checkpoint.state())
        throw std::invalid_argument(
            fmt::format("resume: {} holds weights but no training state", checkpoint.folder().string()));
    TrainOptions options = asked;
    from_json(checkpoint.state()->trainer.at("options"), options);
    check_resumable(asked, options);
    options.validate();
    std::optional<TrainingState> state = checkpoint.state();
    Tokenizer tokenizer = checkpoint.tokenizer();
    return {std::move(options), std::move(state), std::move(checkpoint), std::move(tokenizer)};
}

Start start_anew(const TrainOptions& asked) {
    TrainOptions options = asked;
    std::optional<Checkpoint> checkpoint;
    if (!options.init.empty()) checkpoint.emplace(open_checkpoint(options.init));
    const bool own_tokenizer = checkpoint && checkpoint->has_tokenizer() && options.tokenizer == "bytes";
    Tokenizer tokenizer = own_tokenizer ? checkpoint->tokenizer() : Tokenizer::load(options.tokenizer);
    if (checkpoint) {
        options.model = checkpoint->config();
        if (options.model.vocab_size < tokenizer.vocab_size())
            throw std::invalid_argument(fmt::format("init: the tokenizer has {} tokens, the checkpoint's model {}",
                                                    tokenizer.vocab_size(), options.model.vocab_size));
    } else {
        options.model.vocab_size = tokenizer.vocab_size();
    }
    options.validate();
    return {std::move(options), std::nullopt, std::move(checkpoint), std::move(tokenizer)};
}

}  // namespace

Start find_start(const TrainOptions& asked, Progress& progress) {
    const bool has_run = std::filesystem::exists(asked.out) && !list_checkpoints(asked.out).empty();
    if (has_run && asked.resume) {
        std::vector<std::string> refused;
        Checkpoint checkpoint = open_checkpoint(asked.out, &refused);
        for (const std::string& text : refused) progress.message("passed over a checkpoint: " + text);
        return resume_from(asked, std::move(checkpoint));
    }
    if (has_run && !asked.overwrite)
        throw std::invalid_argument(
            fmt::format("{} holds checkpoints of a run: give --resume to go on with it, --overwrite to start anew, or "
                        "another --out", asked.out.string()));
    return start_anew(asked);
}

void check_agreement(const Start& start, ProcessGroup& group) {
    nlohmann::ordered_json mine = to_json(start.options);
    mine["device"] = to_string(start.options.device);
    mine["precision"] = to_string(start.options.precision);
    mine["moments"] = to_string(start.options.moments);
    mine["gradients"] = to_string(start.options.gradients);
    mine["masters"] = to_string(start.options.masters);
    mine["eval-every"] = start.options.eval_every;
    mine["eval-rows"] = start.options.eval_rows;
    mine["save-every"] = start.options.save_every;
    mine["step to resume from"] = start.state ? start.state->step : 0;
    const std::vector<std::string> all = group.exchange(mine.dump());
    const auto leaders = nlohmann::ordered_json::parse(all.front());
    for (size_t rank = 1; rank < all.size(); ++rank) {
        const auto theirs = nlohmann::ordered_json::parse(all[rank]);
        for (const auto& [name, value] : theirs.items())
            if (value != leaders[name])
                throw std::invalid_argument(
                    fmt::format("{} is {} for rank {} and {} for rank 0: all processes need the same options and "
                                "must see the same files", name, value.dump(), rank, leaders[name].dump()));
    }
}

Dataset load_data(const Start& start, Progress& progress, ProcessGroup* group) {
    const std::string& source = start.options.data;
    progress.message("reading " + source);
    // One process of a machine makes the shards, the others find them.
    const bool first = !group || group->launch().local_rank == 0;
    if (!first) group->barrier();
    Dataset data = load_dataset({.source = source, .cache = {}, .held_out = start.options.held_out,
                                 .num_threads = std::max(1, start.options.threads), .progress = {}},
                                start.tokenizer);
    if (start.state && start.state->data_fingerprint != data.fingerprint)
        throw std::invalid_argument(fmt::format("resume: {} is not the text that the run was started with", source));
    if (!group) return data;
    if (first) group->barrier();
    const std::vector<std::string> all = group->exchange(std::to_string(data.fingerprint));
    for (size_t rank = 1; rank < all.size(); ++rank)
        if (all[rank] != all.front())
            throw std::invalid_argument(
                fmt::format("data: {} is another text for rank {} than for rank 0", source, rank));
    return data;
}

}  // namespace strobe::gpt
