// A model's parameters in safetensors files: one file, or several with an index, as Hugging Face names them.
#pragma once

#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "gpt/checkpoint/safetensors.hpp"
#include "gpt/parameters.hpp"

namespace strobe::gpt {

/// The tensors of one array of the layout (values, or a moment) under their checkpoint names, each behind `prefix`. The
/// array must stay where it is while they are used.
std::vector<TensorToStore> tensors_of(const ParameterLayout& layout, const ParameterArena& values, const std::string& prefix = "");

/// Opens model.safetensors, or the files that model.safetensors.index.json names, in a checkpoint's folder.
class WeightFiles {
public:
    explicit WeightFiles(const std::filesystem::path& folder);

    /// The file that must hold everything, without an index.
    static WeightFiles single(const std::filesystem::path& file);

    /// Throws FileError unless the files hold exactly the layout's parameters, each of its shape and a type that can be
    /// read. What a checkpoint may hold besides: buffers that older versions of transformers stored, and the head's weight
    /// where it is tied, if equal to the embedding.
    void check(const ParameterLayout& layout, const std::string& prefix = "") const;

    /// After a successful check of the same layout and prefix.
    void read(const ParameterLayout& layout, const ParameterArena& values, const std::string& prefix = "") const;

private:
    WeightFiles() = default;
    const StoredTensor* find(const std::string& name) const;
    const StoredTensor* find_parameter(const Parameter& parameter, const std::string& prefix) const;

    std::filesystem::path name_;  // for messages
    std::vector<SafetensorsFile> files_;
};

}  // namespace strobe::gpt
