#include "gpt/checkpoint/checkpoint.hpp"

#include <algorithm>
#include <charconv>

#include <fmt/core.h>

#include "gpt/checkpoint/hf_config.hpp"
#include "gpt/checkpoint/safetensors.hpp"
#include "gpt/io/durable_file.hpp"
#include "gpt/io/file_error.hpp"
#include "gpt/io/mapped_file.hpp"
#include "gpt/io/strict_json.hpp"

namespace strobe::gpt {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* kStateFile = "training_state.json";
constexpr const char* kOptimizerFile = "optimizer.safetensors";
constexpr const char* kFirstMoment = "exp_avg.";
constexpr const char* kSecondMoment = "exp_avg_sq.";
constexpr int64_t kStateVersion = 1;

Json to_json(const TrainingState& state) {
    Json rng = Json::array();
    for (const uint64_t word : state.rng) rng.push_back(to_hex(word));
    return {{"format", "strobe training state"}, {"version", kStateVersion}, {"step", state.step},
            {"data", {{"epoch", state.data_position.epoch}, {"next_row", state.data_position.next_row}, {"fingerprint", to_hex(state.data_fingerprint)}}},
            {"rng", std::move(rng)}, {"trainer", state.trainer}};
}

/// Walks training_state.json and names the first thing wrong with it.
class StateReader {
public:
    explicit StateReader(const fs::path& file) : file_(file), document_(read_json_file(file, {.max_bytes = size_t{16} << 20})) {
        if (!document_.is_object() || document_.value("format", Json()) != "strobe training state") {
            refuse("is not a training state of strobe");
        }
        if (document_.value("version", Json()) != kStateVersion) {
            refuse(fmt::format("is of another version than {}", kStateVersion));
        }
        const uint64_t written = hex(member(document_, "xxh64"));
        document_.erase("xxh64");
        if (xxhash64(document_.dump()) != written) refuse("checksum does not match: the file is damaged");
    }

    TrainingState state() const {
        TrainingState state;
        state.step = static_cast<int64_t>(number(document_, "step"));
        const Json& data = object(document_, "data");
        state.data_position = {number(data, "epoch"), number(data, "next_row")};
        state.data_fingerprint = hex(member(data, "fingerprint"));
        const Json& rng = member(document_, "rng");
        if (!rng.is_array() || rng.size() != state.rng.size()) refuse("rng is not four words");
        for (size_t i = 0; i < state.rng.size(); ++i) state.rng[i] = hex(rng[i]);
        state.trainer = member(document_, "trainer");
        return state;
    }

    /// Every file listed is there and is what was written.
    void verify_files(const fs::path& folder) const {
        for (const auto& [name, record] : object(document_, "files").items()) {
            if (name.find('/') != std::string::npos || name.starts_with('.')) refuse(fmt::format("lists a file '{}'", name.substr(0, 60)));
            if (!record.is_object()) refuse(fmt::format("the record of '{}' is not an object", name.substr(0, 60)));
            const MappedFile file(folder / name);
            if (file.bytes().size() != number(record, "size")) {
                throw FileError(file.path(), fmt::format("has {} bytes, {} were written", file.bytes().size(), number(record, "size")));
            }
            if (xxhash64(file.bytes()) != hex(member(record, "xxh64"))) {
                throw FileError(file.path(), "checksum does not match: the file is damaged");
            }
        }
    }

private:
    [[noreturn]] void refuse(std::string_view problem) const { throw FileError(file_, problem); }

    const Json& member(const Json& parent, const char* name) const {
        const auto found = parent.find(name);
        if (found == parent.end()) refuse(fmt::format("has no {}", name));
        return *found;
    }
    const Json& object(const Json& parent, const char* name) const {
        const Json& value = member(parent, name);
        if (!value.is_object()) refuse(fmt::format("{} is not an object", name));
        return value;
    }
    uint64_t number(const Json& parent, const char* name) const {
        const Json& value = member(parent, name);
        if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
            refuse(fmt::format("{} is not a whole number", name));
        }
        return value.get<uint64_t>();
    }
    uint64_t hex(const Json& value) const {
        uint64_t word = 0;
        const std::string text = value.is_string() ? value.get<std::string>() : "";
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), word, 16);
        if (text.size() != 16 || error != std::errc() || end != text.data() + text.size()) {
            refuse("holds a word that is not 16 hexadecimal digits");
        }
        return word;
    }

    fs::path file_;
    Json document_;
};

/// Writes one file and returns its record for training_state.json.
template <class Write>
Json write_recorded(const fs::path& path, Write write) {
    DurableFile file(path);
    write(file);
    file.finish();
    return {{"size", file.size()}, {"xxh64", to_hex(file.hash())}};
}

std::optional<TrainingState> read_verified_state(const fs::path& folder) {
    const fs::path file = folder / kStateFile;
    if (!fs::exists(file)) return {};
    const StateReader reader(file);
    reader.verify_files(folder);
    return reader.state();
}

ModelConfig read_config(const fs::path& folder) {
    const fs::path file = folder / "config.json";
    return parse_hf_config(MappedFile(file).text(), file);
}

}  // namespace

void write_checkpoint_files(const fs::path& folder, const CheckpointContents& contents) {
    Json files = Json::object();
    if (contents.tokenizer != nullptr) {
        contents.tokenizer->save(folder);
        for (const auto& entry : fs::directory_iterator(folder)) {
            const MappedFile file(entry.path());
            files[entry.path().filename().string()] = {{"size", file.bytes().size()}, {"xxh64", to_hex(xxhash64(file.bytes()))}};
        }
    }
    const TokenId end_of_text = contents.tokenizer != nullptr ? contents.tokenizer->end_of_text() : -1;
    files["config.json"] = write_recorded(folder / "config.json", [&](DurableFile& file) {
        file.write(to_hf_config(*contents.config, end_of_text).dump(2) + "\n");
    });
    files["model.safetensors"] = write_recorded(folder / "model.safetensors", [&](DurableFile& file) {
        write_safetensors(file, tensors_of(*contents.layout, *contents.values), {{"format", "pt"}});
    });
    if (contents.first_moment != nullptr && contents.second_moment != nullptr) {
        files[kOptimizerFile] = write_recorded(folder / kOptimizerFile, [&](DurableFile& file) {
            std::vector<TensorToStore> tensors = tensors_of(*contents.layout, *contents.first_moment, kFirstMoment);
            std::vector<TensorToStore> second = tensors_of(*contents.layout, *contents.second_moment, kSecondMoment);
            std::move(second.begin(), second.end(), std::back_inserter(tensors));
            write_safetensors(file, tensors, {{"format", "pt"}});
        });
    }
    if (contents.state != nullptr) {
        Json state = to_json(*contents.state);
        state["files"] = std::move(files);
        state["xxh64"] = to_hex(xxhash64(state.dump()));
        write_recorded(folder / kStateFile, [&](DurableFile& file) { file.write(state.dump(2) + "\n"); });
    }
    fsync_folder(folder);
}

Checkpoint::Checkpoint(const fs::path& folder)
    : folder_(folder), state_(read_verified_state(folder)), config_(read_config(folder)), layout_(config_), weights_(folder) {
    weights_.check(layout_);
}

bool Checkpoint::has_tokenizer() const {
    return fs::exists(folder_ / "tokenizer.json") || fs::exists(folder_ / "vocab.json");
}

void Checkpoint::read_values(const ParameterLayout& layout, const ParameterArena& values) const { weights_.read(layout, values); }

void Checkpoint::read_moments(const ParameterLayout& layout, const ParameterArena& first, const ParameterArena& second) const {
    const WeightFiles moments = WeightFiles::single(folder_ / kOptimizerFile);
    moments.check(layout, kFirstMoment);
    moments.check(layout, kSecondMoment);
    moments.read(layout, first, kFirstMoment);
    moments.read(layout, second, kSecondMoment);
}

}  // namespace strobe::gpt
