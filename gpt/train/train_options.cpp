#include "gpt/train/train_options.hpp"

#include <stdexcept>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace strobe::gpt {

namespace {

/// Visits every stored field under its name: writing, reading and comparing walk one list.
template <class Options, class Visit>
void visit_fields(Options& o, Visit&& visit) {
    visit("data", o.data);
    visit("tokenizer", o.tokenizer);
    visit("held_out", o.held_out);
    visit("split_documents", o.split_documents);
    visit("init", o.init);
    visit("vocab_size", o.model.vocab_size);
    visit("context_length", o.model.context_length);
    visit("num_layers", o.model.num_layers);
    visit("hidden_size", o.model.hidden_size);
    visit("num_heads", o.model.num_heads);
    visit("num_heads_k", o.model.num_heads_k);
    visit("head_dim", o.model.head_dim);
    visit("ffn_size", o.model.ffn_size);
    visit("norm_eps", o.model.norm_eps);
    visit("rope_theta", o.model.rope_theta);
    visit("tied_head", o.model.tied_head);
    visit("init_std", o.model.init_std);
    visit("seqlen", o.seqlen);
    visit("batch_size", o.batch_size);
    visit("accumulate", o.accumulate);
    visit("steps", o.steps);
    visit("seed", o.seed);
    visit("learning_rate", o.optimizer.learning_rate);
    visit("final_fraction", o.optimizer.final_fraction);
    visit("warmup_steps", o.optimizer.warmup_steps);
    visit("beta1", o.optimizer.beta1);
    visit("beta2", o.optimizer.beta2);
    visit("eps", o.optimizer.eps);
    visit("weight_decay", o.optimizer.weight_decay);
    visit("clip_norm", o.optimizer.clip_norm);
}

}  // namespace

void TrainOptions::validate() const {
    const auto require = [](bool good, const char* field, auto value, const char* range) {
        if (!good) throw std::invalid_argument(fmt::format("{} is {}, must be {}", field, value, range));
    };
    require(!data.empty(), "data", "missing", "a text file, a folder of text files, or token shards");
    require(held_out >= 0.0 && held_out <= 0.5, "held-out share", held_out, "between 0 and 0.5");
    require(batch_size >= 1 && batch_size <= 1 << 20, "batch size", batch_size, "between 1 and 1048576");
    require(accumulate >= 1 && accumulate <= 1 << 20, "accumulate", accumulate, "between 1 and 1048576");
    require(steps >= 1, "steps", steps, "1 or more");
    require(device == Device::cuda || precision == Precision::fp32, "precision", to_string(precision), "fp32 on the cpu");
    if (gradients != Precision::fp32 && (accumulate > 1 || launch.size > 1 || precision == Precision::fp32))
        throw std::invalid_argument("gradients in bf16 are those of one pass in bf16 by one process: give --gradients fp32, "
                                    "or neither --accumulate nor --processes nor --precision fp32");
    require(masters == Precision::fp32 || precision == Precision::bf16, "masters", to_string(masters), "fp32 where products are in fp32");
    require(threads >= 0 && threads <= 1024, "threads", threads, "between 0 (all) and 1024");
    require(eval_every >= 0, "eval-every", eval_every, "0 (only at the end) or more");
    require(eval_rows >= 1, "eval-rows", eval_rows, "1 or more");
    require(save_every >= 0, "save-every", save_every, "0 (only at the end) or more");
    model.validate();
    require(seqlen >= 0 && seqlen <= model.context_length, "seqlen", seqlen,
            "0 (the model's context) up to the model's context");
    require(row_length() <= (int64_t{1} << 30) / batch_size, "batch size * seqlen", batch_size * row_length(),
            "at most 2^30 tokens");
    optimizer.validate();
}

nlohmann::ordered_json to_json(const TrainOptions& options) {
    nlohmann::ordered_json json;
    json["architecture"] = to_string(options.model.architecture);
    visit_fields(options, [&](const char* name, const auto& value) { json[name] = value; });
    return json;
}

void from_json(const nlohmann::json& json, TrainOptions& options) {
    try {
        options.model.architecture = architecture_from_string(json.at("architecture").get<std::string>());
        visit_fields(options, [&](const char* name, auto& value) { json.at(name).get_to(value); });
    } catch (const nlohmann::json::exception& e) {
        throw std::invalid_argument(fmt::format("training options of the checkpoint: {}", e.what()));
    }
}

void check_resumable(const TrainOptions& asked, const TrainOptions& stored) {
    const TrainOptions defaults;
    const nlohmann::ordered_json a = to_json(asked), s = to_json(stored), plain = to_json(defaults);
    for (const auto& [name, value] : a.items())
        if (value != plain[name] && value != s[name])
            throw std::invalid_argument(
                fmt::format("resume: {} is {} but the run was started with {}; leave the option out, or start a new run in "
                            "another folder", name, value.dump(), s[name].dump()));
}

}  // namespace strobe::gpt
