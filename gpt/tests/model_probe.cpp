// Lets another framework look inside: loads a checkpoint, computes logits, loss, gradients and some AdamW steps on
// given sequences, and writes all of it.
//   gpt_model_probe CHECKPOINT INPUT.json OUTPUT_FOLDER
// INPUT: {"sequences": [[ids ...] ...], "steps": n, "learning_rate": x, "weight_decay": x, "clip_norm": x}; the target
// of a token is its successor. OUTPUT_FOLDER gets probe.safetensors (logits, losses, grad.NAME, logits_after of the
// weights after the steps), checkpoint/ (the weights before the steps, as strobe saves them) and trained/ (those
// after).
#include <cstdio>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "gpt/checkpoint/checkpoint.hpp"
#include "gpt/io/strict_json.hpp"
#include "gpt/train/optimizer.hpp"

namespace strobe::gpt {

namespace {

Batch pack(const nlohmann::json& sequences) {
    Batch batch;
    batch.cu_seqlens.push_back(0);
    for (const nlohmann::json& sequence : sequences) {
        const auto ids = sequence.get<std::vector<int32_t>>();
        batch.tokens.insert(batch.tokens.end(), ids.begin(), ids.end());
        batch.targets.insert(batch.targets.end(), ids.begin() + 1, ids.end());
        batch.targets.push_back(kIgnoreTarget);
        batch.cu_seqlens.push_back(static_cast<int32_t>(batch.tokens.size()));
    }
    return batch;
}

void probe(const std::filesystem::path& folder, const std::filesystem::path& input_file, const std::filesystem::path& out) {
    const nlohmann::json input = read_json_file(input_file);
    const Checkpoint checkpoint(folder);
    Weights weights(checkpoint.config());
    checkpoint.read_values(weights.values);

    const Batch batch = pack(input.at("sequences"));
    const auto rows = static_cast<int64_t>(batch.tokens.size());
    const auto targets = static_cast<float>(rows - static_cast<int64_t>(batch.cu_seqlens.size()) + 1);
    Backend backend;
    Model model(weights, backend, {.max_rows = rows});

    const auto save = [&](const char* name) {
        std::filesystem::create_directories(out / name);
        write_checkpoint_files(out / name, {.config = &weights.config, .layout = &weights.layout, .values = &weights.values});
    };
    save("checkpoint");
    std::vector<float> logits(static_cast<size_t>(rows * weights.config.vocab_size)), logits_after(logits.size());
    model.logits(batch, logits);
    std::vector<float> losses{static_cast<float>(model.forward_backward(batch, 1.0f / targets)) / targets};
    const ParameterArena first_gradients(weights.layout);
    std::copy(model.gradients().all().begin(), model.gradients().all().end(), first_gradients.all().begin());

    const OptimizerOptions options{.learning_rate = input.at("learning_rate"), .beta2 = 0.95f,
                                   .weight_decay = input.at("weight_decay"), .clip_norm = input.at("clip_norm")};
    Optimizer optimizer(weights.layout, options);
    for (int64_t step = 1; step <= input.at("steps").get<int64_t>(); ++step) {
        optimizer.apply(backend.exec(), weights, model.gradients(), step, options.learning_rate);
        model.clear_gradients();
        losses.push_back(static_cast<float>(model.forward_backward(batch, 1.0f / targets)) / targets);
    }

    model.logits(batch, logits_after);
    save("trained");

    std::vector<TensorToStore> tensors = tensors_of(weights.layout, first_gradients, "grad.");
    tensors.push_back({"logits", {rows, weights.config.vocab_size}, logits});
    tensors.push_back({"logits_after", {rows, weights.config.vocab_size}, logits_after});
    tensors.push_back({"losses", {static_cast<int64_t>(losses.size())}, losses});
    DurableFile file(out / "probe.safetensors");
    write_safetensors(file, tensors, {{"format", "pt"}});
    file.finish();
}

}  // namespace

}  // namespace strobe::gpt

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: %s CHECKPOINT INPUT.json OUTPUT_FOLDER\n", argv[0]);
        return 2;
    }
    try {
        strobe::gpt::probe(argv[1], argv[2], argv[3]);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
