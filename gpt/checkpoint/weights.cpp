#include "gpt/checkpoint/weights.hpp"

#include <algorithm>
#include <cstring>
#include <set>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "gpt/io/file_error.hpp"
#include "gpt/io/strict_json.hpp"

namespace strobe::gpt {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxFiles = 1000;

bool is_plain_file_name(const std::string& name) {
    return !name.empty() && !name.starts_with('.') && name.find('/') == std::string::npos && name.find('\0') == std::string::npos;
}

std::vector<int64_t> stored_shape(const Parameter& p) {
    std::vector<int64_t> shape = p.shape;
    if (p.transposed_in_checkpoint) std::swap(shape[0], shape[1]);
    return shape;
}

/// Checkpoints of a model without its head leave this off: GPT-2's own on the Hugging Face hub does.
std::string without_root(const std::string& name) {
    for (const std::string_view root : {"transformer.", "model."}) {
        if (name.starts_with(root)) return name.substr(root.size());
    }
    return name;
}

/// Causal masks and rotary frequencies: computed, not learned.
bool is_known_buffer(const std::string& name) {
    return name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") || name.ends_with(".rotary_emb.inv_freq");
}

bool is_weight_type(StoredType type) {
    return type == StoredType::f32 || type == StoredType::f16 || type == StoredType::bf16 || type == StoredType::f64;
}

/// fp32 memory (rows, columns) from a stored (columns, rows), in blocks that stay in cache.
void read_transposed(const StoredTensor& stored, std::span<float> out, int64_t rows, int64_t columns) {
    constexpr int64_t kBlock = 32;
    std::vector<float> lines(static_cast<size_t>(kBlock * rows));
    for (int64_t first = 0; first < columns; first += kBlock) {
        const int64_t count = std::min(kBlock, columns - first);
        stored.read_f32(first * rows, std::span(lines).first(static_cast<size_t>(count * rows)));
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < count; ++j) {
                out[static_cast<size_t>(i * columns + first + j)] = lines[static_cast<size_t>(j * rows + i)];
            }
        }
    }
}

bool same_values(const StoredTensor& a, const StoredTensor& b) {
    return a.type == b.type && a.shape == b.shape && std::equal(a.bytes.begin(), a.bytes.end(), b.bytes.begin(), b.bytes.end());
}

}  // namespace

std::vector<TensorToStore> tensors_of(const ParameterLayout& layout, const ParameterArena& values, const std::string& prefix) {
    std::vector<TensorToStore> tensors;
    for (const Parameter& p : layout.list()) {
        tensors.push_back({prefix + p.name, stored_shape(p), values[p], p.transposed_in_checkpoint});
    }
    return tensors;
}

WeightFiles::WeightFiles(const fs::path& folder) : name_(folder) {
    const fs::path index_file = folder / "model.safetensors.index.json";
    if (fs::exists(folder / "model.safetensors") || !fs::exists(index_file)) {
        files_.emplace_back(folder / "model.safetensors");
        name_ = files_.back().path();
        return;
    }
    const nlohmann::json index = read_json_file(index_file);
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
        throw FileError(index_file, "has no weight_map");
    }
    std::set<std::string> names;
    for (const auto& [tensor, file] : index["weight_map"].items()) {
        if (!file.is_string() || !is_plain_file_name(file.get_ref<const std::string&>())) {
            throw FileError(index_file, fmt::format("tensor '{}' is not mapped to the name of a file beside it", tensor.substr(0, 60)));
        }
        names.insert(file.get<std::string>());
    }
    if (names.empty() || names.size() > kMaxFiles) {
        throw FileError(index_file, fmt::format("names {} files", names.size()));
    }
    for (const std::string& name : names) files_.emplace_back(folder / name);
}

WeightFiles WeightFiles::single(const fs::path& file) {
    WeightFiles weights;
    weights.name_ = file;
    weights.files_.emplace_back(file);
    return weights;
}

const StoredTensor* WeightFiles::find(const std::string& name) const {
    for (const SafetensorsFile& file : files_) {
        if (const StoredTensor* tensor = file.find(name)) return tensor;
    }
    return nullptr;
}

const StoredTensor* WeightFiles::find_parameter(const Parameter& parameter, const std::string& prefix) const {
    if (const StoredTensor* tensor = find(prefix + parameter.name)) return tensor;
    return find(prefix + without_root(parameter.name));
}

void WeightFiles::check(const ParameterLayout& layout, const std::string& prefix) const {
    std::set<std::string> expected;
    for (const Parameter& p : layout.list()) {
        const StoredTensor* tensor = find_parameter(p, prefix);
        if (tensor == nullptr) throw FileError(name_, fmt::format("has no tensor '{}{}'", prefix, p.name));
        if (tensor->shape != stored_shape(p)) {
            throw FileError(name_, fmt::format("tensor '{}{}' has shape {}, the model's config asks for {}", prefix, p.name,
                                               shape_to_string(tensor->shape), shape_to_string(stored_shape(p))));
        }
        if (!is_weight_type(tensor->type)) {
            throw FileError(name_, fmt::format("tensor '{}{}' is stored as {}; F32, F16, BF16 and F64 can be read", prefix, p.name, to_string(tensor->type)));
        }
        expected.insert(prefix + p.name);
        expected.insert(prefix + without_root(p.name));
    }
    const bool tied = layout.head() == layout.embedding();
    std::set<std::string> seen;
    for (const SafetensorsFile& file : files_) {
        for (const auto& [name, tensor] : file.tensors()) {
            if (!seen.insert(name).second) {
                throw FileError(file.path(), fmt::format("tensor '{}' is in another file too", name));
            }
            if (!name.starts_with(prefix) || expected.contains(name) || is_known_buffer(name)) continue;
            if (tied && name == prefix + "lm_head.weight") {
                if (same_values(tensor, *find_parameter(layout[layout.embedding()], prefix))) continue;
                throw FileError(file.path(), "lm_head.weight differs from the embedding that the config ties it to");
            }
            throw FileError(file.path(), fmt::format("tensor '{}' has no place in a model of this config", name));
        }
    }
}

void WeightFiles::read(const ParameterLayout& layout, const ParameterArena& values, const std::string& prefix) const {
    for (const Parameter& p : layout.list()) {
        const StoredTensor& stored = *find_parameter(p, prefix);
        if (p.transposed_in_checkpoint) {
            read_transposed(stored, values[p], p.shape[0], p.shape[1]);
        } else {
            stored.read_f32(0, values[p]);
        }
    }
}

}  // namespace strobe::gpt
