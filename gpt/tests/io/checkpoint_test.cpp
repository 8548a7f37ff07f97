// Checkpoints there and back bit for bit, the order of events on disk, and everything that must be refused.
#include <cstring>
#include <map>

#include "gpt/checkpoint/hf_config.hpp"
#include "gpt/io/file_error.hpp"
#include "gpt/io/strict_json.hpp"
#include "small_model.hpp"
#include "temporary_folder.hpp"

namespace strobe::gpt {
namespace {

namespace fs = std::filesystem;

class ForEachArchitecture : public testing::TestWithParam<Architecture> {};
INSTANTIATE_TEST_SUITE_P(Checkpoint, ForEachArchitecture, testing::Values(Architecture::gpt2, Architecture::llama),
                         [](const auto& param_info) { return std::string(to_string(param_info.param)); });

TEST_P(ForEachArchitecture, SavedAndReadIsTheSameBitForBit) {
    TemporaryFolder folder;
    const SmallRun run(GetParam(), 42);
    CheckpointStore store(folder / "run");
    const fs::path saved = store.save(run.contents());
    EXPECT_EQ(saved.filename(), "step-00000042");
    EXPECT_EQ(read_run(Checkpoint(saved)), run);
    EXPECT_EQ(read_run(open_checkpoint(folder / "run")), run);
    EXPECT_EQ(read_run(open_checkpoint(saved)), run);
}

TEST_P(ForEachArchitecture, AModelAloneHasNoStateAndNoMoments) {
    TemporaryFolder folder;
    const SmallRun run(GetParam());
    fs::create_directory(folder / "m");
    write_checkpoint_files(folder / "m", {&run.config, &run.layout, &run.values});
    const Checkpoint checkpoint(folder / "m");
    EXPECT_FALSE(checkpoint.state());
    EXPECT_FALSE(checkpoint.has_tokenizer());
    const ParameterArena values(run.layout), moments(run.layout);
    checkpoint.read_values(values);
    EXPECT_EQ(std::memcmp(values.data(), run.values.data(), static_cast<size_t>(values.size()) * 4), 0);
    EXPECT_THROW_WITH(checkpoint.read_moments(moments, moments), FileError, "optimizer.safetensors: cannot open");
}

TEST_P(ForEachArchitecture, ConfigSurvivesJson) {
    ModelConfig config = small_config(GetParam());
    config.norm_eps = 1.2345678e-7f;
    config.init_std = 0.1f;
    config.rope_theta = GetParam() == Architecture::llama ? 500000.0f : config.rope_theta;
    for (const bool tied : {true, false}) {
        if (GetParam() == Architecture::gpt2 && !tied) continue;
        config.tied_head = tied;
        const std::string text = to_hf_config(config, 5).dump();
        EXPECT_EQ(parse_hf_config(text, "config.json"), config) << text;
        EXPECT_NE(text.find("\"initializer_range\":0.1,"), std::string::npos) << text;
    }
}

TEST_P(ForEachArchitecture, EveryDamagedFileIsNoticed) {
    TemporaryFolder folder;
    const SmallRun run(GetParam(), 5);
    CheckpointStore store(folder / "run");
    const fs::path saved = store.save(run.contents());
    std::map<fs::path, std::string> files;
    for (const auto& entry : fs::directory_iterator(saved)) files[entry.path()] = read_file(entry.path());
    ASSERT_GE(files.size(), 6u);
    for (const auto& [file, good] : files) {
        for (size_t step = 0; step < 40; ++step) {
            const size_t at = good.size() * step / 40;
            std::string bad = good;
            bad[at] = static_cast<char>(bad[at] ^ 1);
            write_file(file, bad);
            EXPECT_THROW(Checkpoint{saved}, FileError) << file << " byte " << at;
            write_file(file, good.substr(0, at));
            EXPECT_THROW(Checkpoint{saved}, FileError) << file << " cut to " << at;
        }
        fs::remove(file);
        if (file.filename() != "training_state.json") {
            EXPECT_THROW_WITH(Checkpoint{saved}, FileError, file.filename().string());
        }
        write_file(file, good);
    }
    EXPECT_EQ(read_run(Checkpoint(saved)), run);
}

TEST(CheckpointStore, KeepsTheNewestAndFallsBackPastADamagedOne) {
    TemporaryFolder folder;
    SmallRun run(Architecture::llama);
    CheckpointStore store(folder / "run", 2);
    for (const int64_t step : {8, 9, 10, 100}) {
        run.fill(step);
        store.save(run.contents());
    }
    const std::vector<fs::path> left = list_checkpoints(folder / "run");
    ASSERT_EQ(left.size(), 2u);
    EXPECT_EQ(left[0].filename(), "step-00000100");
    EXPECT_EQ(left[1].filename(), "step-00000010");
    EXPECT_EQ(std::distance(fs::directory_iterator(folder / "run"), {}), 3) << "two checkpoints and the lock";
    EXPECT_EQ(open_checkpoint(folder / "run").state()->step, 100);

    write_file(left[0] / "model.safetensors", "damaged");
    std::vector<std::string> refused;
    EXPECT_EQ(open_checkpoint(folder / "run", &refused).state()->step, 10);
    ASSERT_EQ(refused.size(), 1u);
    EXPECT_NE(refused[0].find("model.safetensors: has 7 bytes"), std::string::npos) << refused[0];
    write_file(left[1] / "config.json", "{}");
    EXPECT_THROW_WITH(open_checkpoint(folder / "run"), FileError, "none of its checkpoints can be read");
    EXPECT_THROW_WITH(open_checkpoint(folder / "nothing"), FileError, "is neither a checkpoint");
}

TEST(CheckpointStore, TheSameStepIsReplaced) {
    TemporaryFolder folder;
    SmallRun run(Architecture::gpt2, 3);
    CheckpointStore store(folder / "run");
    store.save(run.contents());
    run.state.trainer = "second";
    store.save(run.contents());
    EXPECT_EQ(open_checkpoint(folder / "run").state()->trainer, "second");
    EXPECT_EQ(list_checkpoints(folder / "run").size(), 1u);
    EXPECT_EQ(std::distance(fs::directory_iterator(folder / "run"), {}), 2);
}

TEST(CheckpointStore, AnOlderStepJustSavedIsNotPruned) {
    TemporaryFolder folder;
    SmallRun run(Architecture::gpt2);
    CheckpointStore store(folder / "run", 1);
    run.fill(50);
    store.save(run.contents());
    run.fill(20);
    EXPECT_TRUE(fs::exists(store.save(run.contents())));
}

TEST(CheckpointStore, LocksOutASecondWriterAndClearsLeftovers) {
    TemporaryFolder folder;
    {
        CheckpointStore store(folder / "run");
        EXPECT_THROW_WITH(CheckpointStore(folder / "run"), FileError, "another process is saving");
    }
    fs::create_directory(folder / "run" / ".step-00000005.tmp-1-0");
    write_file(folder / "run" / ".removed-step-00000001.tmp-1-0" / "model.safetensors", "old");
    write_file(folder / "run" / "notes.txt", "the user's own");
    CheckpointStore store(folder / "run");
    EXPECT_EQ(std::distance(fs::directory_iterator(folder / "run"), {}), 2) << "the lock and the notes";
    EXPECT_THROW_WITH(CheckpointStore(folder / "r", 0), std::invalid_argument, "cannot keep 0");
}

TEST(CheckpointStore, AFailedSaveLeavesTheOldCheckpoint) {
    TemporaryFolder folder;
    SmallRun run(Architecture::gpt2, 1);
    CheckpointStore store(folder / "run");
    store.save(run.contents());
    run.fill(2);
    run.state.trainer = std::string("\xFF");  // cannot be written as JSON
    EXPECT_ANY_THROW(store.save(run.contents()));
    EXPECT_EQ(open_checkpoint(folder / "run").state()->step, 1);
    EXPECT_EQ(std::distance(fs::directory_iterator(folder / "run"), {}), 2);
}

std::string changed_config(Architecture architecture, const char* field, const nlohmann::json& value) {
    nlohmann::json document = to_hf_config(small_config(architecture), -1);
    document[field] = value;
    return document.dump();
}

TEST(HfConfig, RefusesOtherArithmeticAndNonsense) {
    const auto gpt2 = [](const char* field, const nlohmann::json& value) { parse_hf_config(changed_config(Architecture::gpt2, field, value), "config.json"); };
    const auto llama = [](const char* field, const nlohmann::json& value) { parse_hf_config(changed_config(Architecture::llama, field, value), "config.json"); };
    EXPECT_THROW_WITH(gpt2("model_type", "bert"), FileError, "config.json: model_type is \"bert\"; only");
    EXPECT_THROW_WITH(gpt2("model_type", nullptr), FileError, "model_type is missing");
    EXPECT_THROW_WITH(gpt2("activation_function", "relu"), FileError, "activation_function is \"relu\"; only \"gelu_new\" or");
    EXPECT_THROW_WITH(gpt2("scale_attn_by_inverse_layer_idx", true), FileError, "only false is supported");
    EXPECT_THROW_WITH(gpt2("tie_word_embeddings", false), FileError, "only true is supported");
    EXPECT_THROW_WITH(gpt2("n_layer", nullptr), FileError, "has no n_layer");
    EXPECT_THROW_WITH(gpt2("n_layer", 1.5), FileError, "n_layer is 1.5, expected a whole number");
    EXPECT_THROW_WITH(gpt2("n_layer", -1), FileError, "num_layers is -1");
    EXPECT_THROW_WITH(gpt2("n_layer", 1 << 30), FileError, "num_layers is 1073741824");
    EXPECT_THROW_WITH(gpt2("n_embd", 18446744073709551615ull), FileError, "n_embd is 18446744073709551615");
    EXPECT_THROW_WITH(gpt2("n_head", 0), FileError, "n_head is 0");
    EXPECT_THROW_WITH(gpt2("n_head", 5), FileError, "gpt2 needs num_heads * head_dim = hidden_size");
    EXPECT_THROW_WITH(gpt2("layer_norm_epsilon", "x"), FileError, "expected a number");
    EXPECT_NO_THROW(gpt2("n_inner", nullptr));
    EXPECT_THROW_WITH(llama("hidden_act", "gelu"), FileError, "only \"silu\" is supported");
    EXPECT_THROW_WITH(llama("attention_bias", true), FileError, "attention_bias is true");
    EXPECT_THROW_WITH(llama("rope_parameters", {{"rope_type", "llama3"}}), FileError, "rotary type \"llama3\" is not supported");
    EXPECT_THROW_WITH(llama("rope_parameters", {{"rope_type", "default"}, {"rope_theta", "x"}}), FileError, "rope_theta is \"x\", expected a number");
    EXPECT_THROW_WITH(llama("rope_parameters", {{"rope_theta", 1e300}}), FileError, "expected a number that fp32 can hold");
    EXPECT_THROW_WITH(llama("rope_parameters", 3), FileError, "are not an object");
    EXPECT_THROW_WITH(llama("num_key_value_heads", 3), FileError, "must be a multiple of num_heads_k");
    EXPECT_THROW_WITH(llama("num_attention_heads", -4), FileError, "num_attention_heads is -4");
    EXPECT_THROW_WITH(llama("tie_word_embeddings", "yes"), FileError, "expected true or false");
    EXPECT_THROW_WITH(parse_hf_config("[]", "config.json"), FileError, "is not a JSON object");
    EXPECT_THROW_WITH(parse_hf_config("{", "config.json"), FileError, "is not valid JSON");
}

TEST(HfConfig, OldFormsOfRotaryParametersAreRead) {
    nlohmann::json document = to_hf_config(small_config(Architecture::llama), -1);
    document.erase("rope_parameters");
    document["rope_theta"] = 20000.0;
    document["rope_scaling"] = nullptr;
    EXPECT_EQ(parse_hf_config(document.dump(), "c").rope_theta, 20000.0f);
    document["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
    EXPECT_THROW_WITH(parse_hf_config(document.dump(), "c"), FileError, "rotary type \"linear\"");
}

/// Writes the tensors of a run as model.safetensors after `change` had its way with them.
template <class Change>
fs::path write_model(const TemporaryFolder& folder, const SmallRun& run, Change change) {
    const fs::path model = folder / "model";
    fs::remove_all(model);
    fs::create_directory(model);
    write_file(model / "config.json", to_hf_config(run.config, -1).dump());
    std::vector<TensorToStore> tensors = tensors_of(run.layout, run.values);
    change(tensors);
    DurableFile file(model / "model.safetensors");
    write_safetensors(file, tensors, {{"format", "pt"}});
    file.finish();
    return model;
}

TEST(Weights, RefusesTensorsThatDoNotBelong) {
    TemporaryFolder folder;
    const SmallRun run(Architecture::gpt2);
    const std::vector<float> spare(16);
    const auto with = [&](auto change) { Checkpoint{write_model(folder, run, change)}; };
    EXPECT_NO_THROW(with([](auto&) {}));
    EXPECT_THROW_WITH(with([](auto& t) { t.pop_back(); }), FileError, "has no tensor 'transformer.ln_f.bias'");
    EXPECT_THROW_WITH(with([](auto& t) { t[2].name += "x"; }), FileError, "has no tensor 'transformer.h.0.ln_1.weight'");
    EXPECT_THROW_WITH(with([&](auto& t) { t.push_back({"transformer.h.7.ln_1.weight", {16}, spare}); }), FileError, "has no place in a model");
    EXPECT_THROW_WITH(with([](auto& t) { t[2].shape = {2, 12}; }), FileError, "has shape (2, 12), the model's config asks for (24)");
    EXPECT_THROW_WITH(with([](auto& t) { t[4].shape = {72, 24}; }), FileError, "has shape (72, 24), the model's config asks for (24, 72)");
    EXPECT_NO_THROW(with([&](auto& t) { t.push_back({"transformer.h.0.attn.bias", {1, 1, 4, 4}, spare}); })) << "a stored mask";
    EXPECT_NO_THROW(with([&](auto& t) { t.push_back({"lm_head.weight", {257, 24}, run.values[run.layout[0]]}); })) << "the tied head";
    std::vector<float> other(257 * 24);
    EXPECT_THROW_WITH(with([&](auto& t) { t.push_back({"lm_head.weight", {257, 24}, other}); }), FileError, "differs from the embedding");
}

TEST(Weights, NamesWithoutTheRootAreRead) {
    TemporaryFolder folder;
    const SmallRun run(Architecture::gpt2);
    const Checkpoint checkpoint(write_model(folder, run, [](auto& tensors) {
        for (TensorToStore& tensor : tensors) tensor.name = tensor.name.substr(std::string("transformer.").size());
    }));
    const ParameterArena values(run.layout);
    checkpoint.read_values(values);
    EXPECT_EQ(std::memcmp(values.data(), run.values.data(), static_cast<size_t>(values.size()) * 4), 0);
}

TEST(Weights, SeveralFilesWithAnIndexAreRead) {
    TemporaryFolder folder;
    const SmallRun run(Architecture::llama);
    const fs::path model = write_model(folder, run, [](auto&) {});
    fs::remove(model / "model.safetensors");
    const std::vector<TensorToStore> tensors = tensors_of(run.layout, run.values);
    nlohmann::json map;
    for (int part = 0; part < 2; ++part) {
        const std::string name = "model-0000" + std::to_string(part + 1) + "-of-00002.safetensors";
        std::vector<TensorToStore> some;
        for (size_t i = static_cast<size_t>(part); i < tensors.size(); i += 2) {
            some.push_back(tensors[i]), map[tensors[i].name] = name;
        }
        DurableFile file(model / name);
        write_safetensors(file, some, {{"format", "pt"}});
        file.finish();
    }
    const auto write_index = [&](const nlohmann::json& index) { write_file(model / "model.safetensors.index.json", index.dump()); };
    write_index({{"weight_map", map}});
    const ParameterArena values(run.layout);
    Checkpoint(model).read_values(values);
    EXPECT_EQ(std::memcmp(values.data(), run.values.data(), static_cast<size_t>(values.size()) * 4), 0);

    nlohmann::json hostile = map;
    for (const char* name : {"../../etc/passwd", "/etc/passwd", "..", "", ".hidden"}) {
        hostile["lm_head.weight"] = name;
        write_index({{"weight_map", hostile}});
        EXPECT_THROW_WITH(Checkpoint{model}, FileError, "is not mapped to the name of a file beside it");
    }
    write_index({{"x", 1}});
    EXPECT_THROW_WITH(Checkpoint{model}, FileError, "has no weight_map");
}

}  // namespace
}  // namespace strobe::gpt
